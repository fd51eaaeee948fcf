"""The attention cache: keys and values of all tokens so far, and which tokens these are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nitinol.models.base import Config

DTYPES = {"fp16": "float16", "fp32": "float32"}


class KVCache:
    """Of one sequence. layers: keys and values of each block, both [1, kv_heads, context, head_dim]. position: int32
    [1] on the device, where the next token goes; kernels advance it. tokens: what it holds, as the host knows it.
    """

    def __init__(self, config: Config, context: int, dtype: str, device: Any) -> None:
        from nitinol.graph.conversion import array, empty

        shape = config.cache_shape(context)
        kind = DTYPES[dtype]
        self.layers = [(empty(shape, kind, device), empty(shape, kind, device)) for _ in range(config.layers)]
        self.position = array(np.zeros(1, np.int32), device=device)
        self.tokens: list[int] = []

    def reuse(self, ids: Sequence[int]) -> int:
        """Forget what is not a beginning of `ids`, and at least their last token, whose logits are wanted; how many
        tokens remain. What lies behind them in memory is overwritten before it is read."""
        shared = 0
        for old, new in zip(self.tokens, ids[:-1]):
            if old != new:
                break
            shared += 1
        self.move(shared)
        return shared

    def move(self, position: int) -> None:
        """Forget all tokens from `position` on; nothing may be running on the device."""
        del self.tokens[position:]
        self.position.buffer.write(np.array([position], np.int32))

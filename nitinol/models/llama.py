"""Llama 1 to 3 (Touvron et al., 2023; Dubey et al., 2024) and Mistral 7B (Jiang et al., 2023).

Grouped-query attention; positions by RoPE on neighbouring pairs, because GGUF files of this architecture have the rows
of queries and keys in that order. Llama 3's longer context comes as a tensor of divisors of the frequencies; Mistral's
attention sees a sliding window in every layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import nitinol as op
from nitinol.models import base
from nitinol.models.base import Metadata, Tensor


@dataclass(frozen=True)
class Config(base.Config):
    window: int  # 0: none

    @classmethod
    def read(cls, metadata: Metadata) -> Config:
        return cls(**base.read_decoder(metadata), window=metadata.integer("attention.sliding_window", 0, least=0))

    def window_of(self, layer: int) -> int:
        return self.window


def tensors(config: Config) -> Iterator[Tensor]:
    yield from base.outer_tensors(config)
    yield Tensor("rope_freqs.weight", (config.head_dim // 2,), required=False)
    for layer in range(config.layers):
        yield from base.block_tensors(config, layer)


class Network(base.Network):
    family = "Llama"

    def __init__(self, config: Config, weights: SimpleNamespace, device: Any) -> None:
        super().__init__(config, weights, device)
        factors = getattr(weights, "rope_freqs", 1.0)
        self.frequencies = config.rope.frequencies(config.head_dim, device, factors)

    def attention(self, x: Any, block: Any, positions: Any, keys: Any, values: Any) -> Any:
        h = op.rms_norm(x, block.attn_norm, self.config.epsilon)
        q = op.linear(h, block.attn_q)
        k = op.linear(h, block.attn_k)
        v = op.linear(h, block.attn_v)
        q = op.rope_and_cache(q, k, v, self.frequencies, positions, keys, values, interleaved=True)
        h = op.cached_attention(q, keys, values, positions, window=self.config.window)
        return op.linear(h, block.attn_output, residual=x)

    def feed_forward(self, x: Any, block: Any) -> Any:
        h = op.rms_norm(x, block.ffn_norm, self.config.epsilon)
        h = op.swiglu(h, block.ffn_gate, block.ffn_up)
        return op.linear(h, block.ffn_down, residual=x)

    def forward(self, tokens: Any, positions: Any, cache: Sequence[tuple[Any, Any]]) -> Any:
        x = op.embedding(self.weights.token_embd, tokens, "float32")
        for block, (keys, values) in zip(self.weights.blocks, cache):
            x = self.attention(x, block, positions, keys, values)
            x = self.feed_forward(x, block)
        return op.rms_norm(x, self.weights.output_norm, self.config.epsilon)

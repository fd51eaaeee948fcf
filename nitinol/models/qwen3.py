"""Qwen 3 (Yang et al., 2025): no biases, but RMSNorm on every query and key head before RoPE turns its halves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import nitinol as op
from nitinol.models import base
from nitinol.models.base import Metadata, Tensor


@dataclass(frozen=True)
class Config(base.Config):
    @classmethod
    def read(cls, metadata: Metadata) -> Config:
        config = cls(**base.read_decoder(metadata))
        # Files do not say in which layers the window is. Within its window a model with one is a model without.
        window = metadata.integer("attention.sliding_window", 0, least=0)
        return replace(config, context=min(config.context, window or config.context))


def tensors(config: Config) -> Iterator[Tensor]:
    yield from base.outer_tensors(config)
    for layer in range(config.layers):
        yield from base.block_tensors(config, layer)
        yield Tensor(f"blk.{layer}.attn_q_norm.weight", (config.head_dim,))
        yield Tensor(f"blk.{layer}.attn_k_norm.weight", (config.head_dim,))


class Network(base.Network):
    family = "Qwen 3"

    def __init__(self, config: Config, weights: SimpleNamespace, device: Any) -> None:
        super().__init__(config, weights, device)
        self.frequencies = config.rope.frequencies(config.head_dim, device)

    def attention(self, x: Any, block: Any, positions: Any, keys: Any, values: Any) -> Any:
        h = op.rms_norm(x, block.attn_norm, self.config.epsilon)
        q = op.linear(h, block.attn_q)
        k = op.linear(h, block.attn_k)
        v = op.linear(h, block.attn_v)
        q = op.rope_and_cache(
            q, k, v, self.frequencies, positions, keys, values, interleaved=False, q_norm=block.attn_q_norm,
            k_norm=block.attn_k_norm, epsilon=self.config.epsilon,
        )  # fmt: skip
        h = op.cached_attention(q, keys, values, positions)
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

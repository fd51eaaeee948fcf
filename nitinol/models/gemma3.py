"""Gemma 3 (Gemma Team, "Gemma 3 Technical Report", 2025), the text model.

Five layers of six see a sliding window and turn positions by a base of their own; every sixth sees everything. RMSNorm
stands before and after attention and the feed-forward layer, and on every query and key head; the feed-forward layer is
GeGLU; the embedding is scaled by the root of its width and is the output matrix, too. Norms' weights lie in GGUF files
as they are multiplied: 1 is added to the published ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import nitinol as op
from nitinol.models import base
from nitinol.models.base import Metadata, RoPE, Tensor

LAYERS_OF_27B = 62


@dataclass(frozen=True)
class Config(base.Config):
    local_rope: RoPE  # of layers with a window; it is not scaled
    window: int
    pattern: int  # every so many layers one has no window

    @classmethod
    def read(cls, metadata: Metadata) -> Config:
        return cls(**base.read_decoder(metadata), local_rope=RoPE(metadata.number("rope.freq_base_swa", 10000.0)),
                   window=metadata.integer("attention.sliding_window", 0, least=0),
                   pattern=metadata.integer("attention.sliding_window_pattern", 6))

    def window_of(self, layer: int) -> int:
        return 0 if (layer + 1) % self.pattern == 0 else self.window

    @property
    def scale(self) -> float:
        """What scores are multiplied by. The 27B model's is not that of its heads of 128, and files do not say so."""
        return (self.hidden / self.heads if self.layers == LAYERS_OF_27B else self.head_dim) ** -0.5


def tensors(config: Config) -> Iterator[Tensor]:
    yield from base.outer_tensors(config)
    for layer in range(config.layers):
        yield from base.block_tensors(config, layer)
        yield Tensor(f"blk.{layer}.attn_q_norm.weight", (config.head_dim,))
        yield Tensor(f"blk.{layer}.attn_k_norm.weight", (config.head_dim,))
        yield Tensor(f"blk.{layer}.post_attention_norm.weight", (config.hidden,))
        yield Tensor(f"blk.{layer}.post_ffw_norm.weight", (config.hidden,))


class Network(base.Network):
    family = "Gemma 3"

    def __init__(self, config: Config, weights: SimpleNamespace, device: Any) -> None:
        super().__init__(config, weights, device)
        everywhere = config.rope.frequencies(config.head_dim, device)
        nearby = config.local_rope.frequencies(config.head_dim, device)
        self.frequencies = [nearby if config.window_of(layer) else everywhere for layer in range(config.layers)]

    def attention(self, x: Any, layer: int, positions: Any, keys: Any, values: Any) -> Any:
        block, epsilon = self.weights.blocks[layer], self.config.epsilon
        h = op.rms_norm(x, block.attn_norm, epsilon)
        q = op.linear(h, block.attn_q)
        k = op.linear(h, block.attn_k)
        v = op.linear(h, block.attn_v)
        q = op.rope_and_cache(
            q, k, v, self.frequencies[layer], positions, keys, values, interleaved=False, q_norm=block.attn_q_norm,
            k_norm=block.attn_k_norm, epsilon=epsilon,
        )  # fmt: skip
        window = self.config.window_of(layer)
        h = op.cached_attention(q, keys, values, positions, scale=self.config.scale, window=window)
        h = op.linear(h, block.attn_output)
        return x + op.rms_norm(h, block.post_attention_norm, epsilon)

    def feed_forward(self, x: Any, layer: int) -> Any:
        block, epsilon = self.weights.blocks[layer], self.config.epsilon
        h = op.rms_norm(x, block.ffn_norm, epsilon)
        h = op.geglu(h, block.ffn_gate, block.ffn_up)
        h = op.linear(h, block.ffn_down)
        return x + op.rms_norm(h, block.post_ffw_norm, epsilon)

    def forward(self, tokens: Any, positions: Any, cache: Sequence[tuple[Any, Any]]) -> Any:
        x = op.embedding(self.weights.token_embd, tokens, "float32") * math.sqrt(self.config.hidden)
        for layer, (keys, values) in enumerate(cache):
            x = self.attention(x, layer, positions, keys, values)
            x = self.feed_forward(x, layer)
        return op.rms_norm(x, self.weights.output_norm, self.config.epsilon)

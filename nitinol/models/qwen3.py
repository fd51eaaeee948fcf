"""Qwen 3 (Yang et al., 2025): no biases, but RMSNorm on every query and key head before it is turned by RoPE."""

from typing import Any

from nitinol.models.config import Config
from nitinol.ops.attention import cached_attention
from nitinol.ops.linear import linear
from nitinol.ops.rope import rope_and_cache


def attend(x: Any, block: Any, rope: Any, position: Any, keys: Any, values: Any, config: Config) -> Any:
    """Attention's heads side by side, float32 [T, heads * head_dim]; keys and values are added to the cache."""
    q = linear(x, block.attn_q)
    k = linear(x, block.attn_k)
    v = linear(x, block.attn_v)
    q = rope_and_cache(q, k, v, rope, position, keys, values, interleaved=False, q_norm=block.attn_q_norm,
                       k_norm=block.attn_k_norm, epsilon=config.epsilon)
    return cached_attention(q, keys, values, position)

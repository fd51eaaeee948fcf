"""Qwen 2 and 2.5 (Yang et al., 2024): Llama with biases on queries, keys and values; RoPE turns a head's halves."""

from typing import Any

from nitinol.models.config import Config
from nitinol.ops.attention import cached_attention
from nitinol.ops.linear import linear
from nitinol.ops.rope import rope_and_cache


def attend(x: Any, block: Any, rope: Any, position: Any, keys: Any, values: Any, config: Config) -> Any:
    """Attention's heads side by side, float32 [T, heads * head_dim]; keys and values are added to the cache."""
    q = linear(x, block.attn_q, bias=block.attn_q_bias)
    k = linear(x, block.attn_k, bias=block.attn_k_bias)
    v = linear(x, block.attn_v, bias=block.attn_v_bias)
    q = rope_and_cache(q, k, v, rope, position, keys, values, interleaved=False)
    return cached_attention(q, keys, values, position)

"""Llama 1 to 3 (Touvron et al., 2023; Dubey et al., 2024) and Mistral 7B (Jiang et al., 2023).

Grouped-query attention; positions by RoPE on neighbouring pairs, because GGUF files of this architecture have the rows
of queries and keys in that order. Llama 3's longer context is in the frequencies (weights.py).
"""

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
    q = rope_and_cache(q, k, v, rope, position, keys, values, interleaved=True)
    return cached_attention(q, keys, values, position)

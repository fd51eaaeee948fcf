"""Attention out of elementwise operations, reductions and products, with all scores in memory: the form for float64,
whose gradients, of any order, are those of its parts."""

from __future__ import annotations

from nitinol.graph.array import Array
from nitinol.language.types import int32
from nitinol.ops import elementwise as e
from nitinol.ops.creation import arange
from nitinol.ops.matmul import matmul

HIDDEN = -1e30  # the score of a key that is not seen: finite, so that no gradient becomes inf - inf


def composed_attention(
    q: Array, k: Array, v: Array, starts_q: Array | None, starts_k: Array | None, *, scale: float, causal: bool,
    window: int | None, softcap: float | None,
) -> Array:  # fmt: skip
    """out [batch, heads, T, head_dim] of q of that shape and k, v [batch, kv_heads, S, head_dim]; packed sequences are
    one batch."""
    batch, heads, tokens, head_dim = q.shape
    kv_heads, context = k.shape[1:3]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, tokens, head_dim)
    scores = matmul(grouped, k.expand_dims(2).swapaxes(-1, -2)) * scale
    if softcap is not None:
        scores = e.tanh(scores / softcap) * softcap
    seen = seen_keys(tokens, context, starts_q, starts_k, causal, window)
    scores = e.where(seen, scores, HIDDEN)
    weights = e.exp(scores - scores.max(-1, True)) * seen.astype(q.dtype)
    total = weights.sum(-1, True)
    weights = weights / e.where(e.equal(total, 0.0), 1.0, total)  # a query without a key gives zeros
    return matmul(weights, v.expand_dims(2)).reshape(q.shape)


def seen_keys(
    tokens: int, context: int, starts_q: Array | None, starts_k: Array | None, causal: bool, window: int | None
) -> Array:
    """bool [T, S]: which keys each query sees. The last query of a sequence stands at its last key."""
    query, key = arange(tokens, dtype=int32).reshape(-1, 1), arange(context, dtype=int32).reshape(1, -1)
    if starts_q is None or starts_k is None:
        place = query + (context - tokens)
        seen = e.greater_equal(key + 0 * query, 0)
    else:
        sequence = e.greater_equal(query, starts_q[1:-1].reshape(1, -1)).astype(int32).sum(1)
        first, last = (starts_k.take(index).reshape(-1, 1) for index in (sequence, sequence + 1))
        place = query - starts_q.take(sequence + 1).reshape(-1, 1) + last
        seen = e.greater_equal(key, first) & e.less(key, last)
    if causal:
        seen = seen & e.less_equal(key, place)
    if window is not None:
        seen = seen & e.greater(key, place - window)
    return seen

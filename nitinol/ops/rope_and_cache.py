"""Rotary position embedding of inference (see rope.py), fused with what stands around it in a decoder layer: the
norms of query and key heads before it (QK-norm) and the write of keys and values into the cache after it.

Pair i of a head turns by the angle position * frequencies[i]. Which two values are a pair: (2 i, 2 i + 1) in the
interleaved layout of GGUF's `llama`, (i, i + head_dim / 2) in the half-split layout of the other architectures.
"""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

from typing import Any

import numpy as np

import nitinol.language as tl
from nitinol.graph.array import Array
from nitinol.graph.launch import InPlace, Output, launch
from nitinol.graph.operation import Operation
from nitinol.language.jit import jit
from nitinol.ops.attention import tokens_of_each
from nitinol.ops.rope import rope_reference as turned_reference


@jit
def rope_kernel(
    q, k, v, frequencies, position, q_norm, k_norm, q_out, k_cache, v_cache, context, epsilon,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Program (t, h, s): key and value head h of token t of sequence s, and the GROUP query heads that share them.

    `position` (int32 [sequences]) is that of each sequence's token 0. Tokens whose position is outside the cache are
    not written there.
    """
    sequence = tl.program_id(2)
    token = sequence * tl.num_programs(0) + tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    place = tl.load(position + sequence) + tl.program_id(0)
    pair = tl.arange(0, BLOCK)
    frequency = tl.load(frequencies + pair, mask=pair < HEAD_DIM // 2, other=0.0)
    # All loads come before the first use of one: a program that does little else waits for memory once.
    ROWS: tl.constexpr = 1 << (GROUP - 1).bit_length()
    member = tl.arange(0, ROWS)
    row = (token * heads + head) * GROUP + member
    query, query_pair = load_pairs(q, row, member < GROUP, HEAD_DIM, BLOCK, INTERLEAVED)
    alone = tl.arange(0, 1)
    key, key_pair = load_pairs(k, token * heads + head + alone, alone < 1, HEAD_DIM, BLOCK, INTERLEAVED)
    lane = tl.arange(0, 2 * BLOCK)
    value = tl.load(v + (token * heads + head) * HEAD_DIM + lane, mask=lane < HEAD_DIM)
    if NORM:
        q_gain, q_gain_pair = load_pairs(q_norm, alone, alone < 1, HEAD_DIM, BLOCK, INTERLEAVED)
        k_gain, k_gain_pair = load_pairs(k_norm, alone, alone < 1, HEAD_DIM, BLOCK, INTERLEAVED)
        query, query_pair = normalise(query, query_pair, q_gain, q_gain_pair, epsilon, HEAD_DIM)
        key, key_pair = normalise(key, key_pair, k_gain, k_gain_pair, epsilon, HEAD_DIM)
    angle = place.to(tl.float32) * frequency
    cosine, sine = tl.cos(angle)[None, :], tl.sin(angle)[None, :]
    rotate(q_out, row, member < GROUP, query, query_pair, cosine, sine, HEAD_DIM, BLOCK, INTERLEAVED)
    if (place >= 0) & (place < context):
        slot = (sequence * heads + head).to(tl.int64) * context + place
        rotate(k_cache, slot + alone, alone < 1, key, key_pair, cosine, sine, HEAD_DIM, BLOCK, INTERLEAVED)
        tl.store(v_cache + slot * HEAD_DIM + lane, value, mask=lane < HEAD_DIM)


@jit
def load_pairs(base, row, inside, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The first and the second values of the pairs of heads `row`, [rows, BLOCK] each, 0 past the end."""
    pair = tl.arange(0, BLOCK)
    if INTERLEAVED:
        lane = 2 * pair[:, None] + tl.arange(0, 2)[None, :]
        at, mask = (row * HEAD_DIM)[:, None, None] + lane[None], inside[:, None, None] & (lane < HEAD_DIM)[None]
        return tl.split(tl.load(base + at, mask=mask, other=0.0))
    at, mask = (row * HEAD_DIM)[:, None] + pair[None, :], inside[:, None] & (pair < HEAD_DIM // 2)[None, :]
    return tl.load(base + at, mask=mask, other=0.0), tl.load(base + at + HEAD_DIM // 2, mask=mask, other=0.0)


@jit
def normalise(first, second, first_gain, second_gain, epsilon, HEAD_DIM: tl.constexpr):
    """RMSNorm of heads that are given as pairs."""
    squares = tl.sum(first * first + second * second, axis=1)
    scale = tl.rsqrt(squares * (1.0 / HEAD_DIM) + epsilon)[:, None]
    return first * scale * first_gain, second * scale * second_gain


@jit
def rotate(
    out, row, inside, first, second, cosine, sine,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Writes the pairs of heads, turned, as heads `row`."""
    pair = tl.arange(0, BLOCK)
    turned_first = first * cosine - second * sine
    turned_second = second * cosine + first * sine
    if INTERLEAVED:
        lane = 2 * pair[:, None] + tl.arange(0, 2)[None, :]
        at, mask = (row * HEAD_DIM)[:, None, None] + lane[None], inside[:, None, None] & (lane < HEAD_DIM)[None]
        tl.store(out + at, tl.join(turned_first, turned_second), mask=mask)
    else:
        at, mask = (row * HEAD_DIM)[:, None] + pair[None, :], inside[:, None] & (pair < HEAD_DIM // 2)[None, :]
        tl.store(out + at, turned_first, mask=mask)
        tl.store(out + at + HEAD_DIM // 2, turned_second, mask=mask)


def _rope_rule(
    q: Array, k: Array, v: Array, frequencies: Array, position: Array, k_cache: Array, v_cache: Array,
    q_norm: Array | None, k_norm: Array | None, interleaved: bool, epsilon: float,
) -> Any:  # fmt: skip
    sequences, kv_heads, _, head_dim = k_cache.shape
    rows, width = q.shape
    if k.shape != (rows, kv_heads * head_dim) or v.shape != k.shape or width % k.shape[1]:
        raise ValueError(
            f"rope_and_cache: q, k, v have shapes {q.shape}, {k.shape}, {v.shape}; expected "
            f"{(rows, kv_heads * head_dim)} for k and v, and a multiple of that width for q"
        )
    tokens_of_each("rope_and_cache", rows, sequences, position)
    return q.shape, q.dtype


def _rope_lower(
    target: str, q: Array, k: Array, v: Array, frequencies: Array, position: Array, k_cache: Array, v_cache: Array,
    q_norm: Array | None, k_norm: Array | None, interleaved: bool, epsilon: float,
) -> Array:  # fmt: skip
    sequences, kv_heads, context, head_dim = k_cache.shape
    rows, width = q.shape
    constants = head_arguments(width // k.shape[1], head_dim, interleaved, q_norm is not None)
    return launch(
        rope_kernel, (rows // sequences, kv_heads, sequences), q=q, k=k, v=v, frequencies=frequencies,
        position=position, q_norm=q_norm, k_norm=k_norm, q_out=Output(q.shape, q.dtype), k_cache=InPlace(k_cache),
        v_cache=InPlace(v_cache), context=context, epsilon=epsilon, _warps=warps_of(rows, **constants), **constants,
    )  # fmt: skip


ROPE_AND_CACHE = Operation(
    "rope_and_cache", rule=_rope_rule, lower=_rope_lower, updates=(5, 6),
    vjp="it writes a cache in place, which is for inference; train with nitinol.rope",
)  # fmt: skip


def rope_and_cache(
    q: Any, k: Any, v: Any, frequencies: Any, position: Any, k_cache: Any, v_cache: Any, *,
    interleaved: bool, q_norm: Any = None, k_norm: Any = None, epsilon: float = 1e-6,
) -> Array:  # fmt: skip
    """Turns queries and keys, writes keys and values to the cache; returns the queries, of q's shape and type.

    q float32 [sequences * T, heads * head_dim], one sequence's rows after the other's, k and v [sequences * T,
    kv_heads * head_dim], frequencies float32 [head_dim / 2], position int32 [sequences] (of each one's first token),
    caches [sequences, kv_heads, context, head_dim] of float32 or float16. With q_norm and k_norm (both [head_dim])
    every query and key head goes through RMSNorm first. Positions below 0 and from `context` on are dropped.
    """
    if len(k_cache.shape) != 4:
        raise ValueError(
            f"rope_and_cache: the cache has shape {tuple(k_cache.shape)}, expected [sequences, kv_heads, context, "
            "head_dim]"
        )
    return ROPE_AND_CACHE(
        q, k, v, frequencies, position, k_cache, v_cache, q_norm, k_norm, interleaved=interleaved,
        epsilon=float(epsilon),
    )  # fmt: skip


def warps_of(rows: int, GROUP: int, BLOCK: int, INTERLEAVED: bool, **_: Any) -> int:
    """For GPUs, one angle for each thread where there are few programs: each waits for memory, a sine and a cosine
    once. 0: the compiler chooses."""
    angles = BLOCK if INTERLEAVED else BLOCK * tl.next_power_of_2(GROUP)
    return min(8, max(1, angles // 32)) if rows <= 16 else 0


def head_arguments(group: int, head_dim: int, interleaved: bool, norm: bool) -> dict[str, Any]:
    """The kernel's constexpr arguments. ValueError for an odd head_dim."""
    if head_dim % 2 or not 0 < head_dim <= 1024:
        raise ValueError(f"rotary embedding turns pairs of values: head_dim is {head_dim}, expected 2, 4, .. 1024")
    block = tl.next_power_of_2(head_dim // 2)
    return {"GROUP": group, "HEAD_DIM": head_dim, "BLOCK": block, "INTERLEAVED": interleaved, "NORM": norm}


def rope_reference(heads: np.ndarray, positions: np.ndarray, frequencies: np.ndarray, interleaved: bool) -> np.ndarray:
    """heads [T, n, head_dim] turned by positions [T], in float64."""
    return turned_reference(heads[None], frequencies, positions, interleaved=interleaved)[0]

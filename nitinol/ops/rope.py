<<<<<<< HEAD
"""Rotary position embedding (Su et al., "RoFormer", 2021), fused with what stands around it in a decoder layer: the
norms of query and key heads before it (QK-norm) and the write of keys and values into the cache after it.

Pair i of a head turns by the angle position * frequencies[i]. Which two values are a pair: (2 i, 2 i + 1) in the
interleaved layout of GGUF's `llama`, (i, i + head_dim / 2) in the half-split layout of the other architectures.
"""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"
=======
"""Rotary position embedding (Su et al., "RoFormer", 2021) of queries and keys together, for training.

Pair i of a head turns by the angle position * frequencies[i], in fp32. Which two of the first `rotated` values are a
pair: (2 i, 2 i + 1) interleaved, (i, i + rotated / 2) half-split; the values after them stay (partial rotation, as in
GPT-NeoX). A rotation's gradient is the rotation back: backward is the same kernel with the sine negated.
"""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc,union-attr"
>>>>>>> h-rows

from __future__ import annotations

from typing import Any

import numpy as np

import nitinol.language as tl
<<<<<<< HEAD
from nitinol.graph.array import Array
from nitinol.graph.launch import InPlace, Output, launch
from nitinol.graph.operation import Operation
from nitinol.language.jit import jit
from nitinol.ops.attention import tokens_of_each
=======
from nitinol.array import Array, Output, Strided, launch
from nitinol.language.jit import jit
>>>>>>> h-rows


@jit
def rope_kernel(
<<<<<<< HEAD
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


def rope_frequencies(head_dim: int, base: float = 10000.0, factors: Any = None) -> np.ndarray:
    """base ** (-2 i / head_dim) / factors[i] for i below head_dim / 2, float32, computed in float64.

    `factors` is the tensor `rope_freqs.weight` by which GGUF files of Llama 3.1 and later stretch the context, or what
    `llama3_factors` gives.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequencies = float(base) ** -exponents
    if factors is not None:
        frequencies = frequencies / np.asarray(factors, np.float64)[: head_dim // 2]
    return frequencies.astype(np.float32)


def llama3_factors(
    head_dim: int, base: float, factor: float = 8.0, low: float = 1.0, high: float = 4.0, context: int = 8192
) -> np.ndarray:
    """Llama 3.1's stretching: wavelengths longer than context / low are divided by `factor`, shorter than
    context / high kept, in between interpolated. float32 [head_dim / 2], to divide frequencies by."""
    frequencies = rope_frequencies(head_dim, base).astype(np.float64)
    turns = context * frequencies / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def rope_reference(heads: np.ndarray, positions: np.ndarray, frequencies: np.ndarray, interleaved: bool) -> np.ndarray:
    """heads [T, n, head_dim] turned by positions [T], in float64 (the angle is float32, as in the kernel)."""
    angle = (positions.astype(np.float32)[:, None] * frequencies).astype(np.float64)[:, None, :]
    half = heads.shape[-1] // 2
    pairs = (np.s_[..., 0::2], np.s_[..., 1::2]) if interleaved else (np.s_[..., :half], np.s_[..., half:])
    first, second = (heads[p].astype(np.float64) for p in pairs)
    out = np.empty(heads.shape, np.float64)
    out[pairs[0]] = first * np.cos(angle) - second * np.sin(angle)
    out[pairs[1]] = second * np.cos(angle) + first * np.sin(angle)
=======
    q, k, positions, frequencies, q_out, k_out, tokens, position_batch,
    q_heads, q_batch, q_token, q_head, k_heads, k_batch, k_token, k_head,
    HEAD_DIM: tl.constexpr, ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr, BACK: tl.constexpr,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Program (b * tokens + t, p): part p of the heads of token t of batch b, Q_HEADS of q and K_HEADS of k, with the
    same cosines and sines.

    The names x_batch, x_token and x_head are strides in elements; q_out and k_out [batch, tokens, heads, HEAD_DIM].
    PAIRS is at least ROTATED / 2, REST at least HEAD_DIM - ROTATED (0: none). k may be None.
    """
    row = tl.program_id(0)
    part = tl.program_id(1)
    batch = (row // tokens).to(tl.int64)
    token = row % tokens
    place = token if positions is None else tl.load(positions + batch * position_batch + token)
    pair = tl.arange(0, PAIRS)
    frequency = tl.load(frequencies + pair, mask=pair < ROTATED // 2, other=0.0)
    angle = place.to(tl.float32) * frequency
    cosine, sine = tl.cos(angle)[None, :], tl.sin(angle)[None, :]
    if BACK:
        sine = -sine
    token = token.to(tl.int64)
    row = row.to(tl.int64)
    turn_heads(
        q + batch * q_batch + token * q_token, q_out + row * q_heads * HEAD_DIM, part * Q_HEADS + tl.arange(0, Q_HEADS),
        q_heads, q_head, cosine, sine, HEAD_DIM, ROTATED, INTERLEAVED, REST,
    )  # fmt: skip
    if k is not None:
        turn_heads(
            k + batch * k_batch + token * k_token, k_out + row * k_heads * HEAD_DIM,
            part * K_HEADS + tl.arange(0, K_HEADS), k_heads, k_head, cosine, sine, HEAD_DIM, ROTATED, INTERLEAVED, REST,
        )  # fmt: skip


@jit
def turn_heads(
    source, out, head, heads, stride, cosine, sine,
    HEAD_DIM: tl.constexpr, ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Those heads of one token, `stride` apart, to `out`, where they are neighbours."""
    pair = tl.arange(0, cosine.shape[1])
    inside = (head < heads)[:, None]
    if INTERLEAVED:
        lane = (2 * pair[:, None] + tl.arange(0, 2)[None, :])[None]
        mask = inside[:, :, None] & (lane < ROTATED)
        x = tl.load(source + (head * stride)[:, None, None] + lane, mask=mask, other=0.0).to(tl.float32)
        one, other = tl.split(x)
        turned = tl.join(one * cosine - other * sine, other * cosine + one * sine)
        tl.store(out + (head * HEAD_DIM)[:, None, None] + lane, turned, mask=mask)
    else:
        lane = pair[None, :]
        mask = inside & (lane < ROTATED // 2)
        at = source + (head * stride)[:, None] + lane
        one = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        other = tl.load(at + ROTATED // 2, mask=mask, other=0.0).to(tl.float32)
        to = out + (head * HEAD_DIM)[:, None] + lane
        tl.store(to, one * cosine - other * sine, mask=mask)
        tl.store(to + ROTATED // 2, other * cosine + one * sine, mask=mask)
    if REST:
        lane = ROTATED + tl.arange(0, REST)[None, :]
        mask = inside & (lane < HEAD_DIM)
        rest = tl.load(source + (head * stride)[:, None] + lane, mask=mask)
        tl.store(out + (head * HEAD_DIM)[:, None] + lane, rest, mask=mask)


def blocks(target: str, heads: int, kv_heads: int, rotated: int) -> tuple[int, dict[str, int]]:
    """Parts of the heads, and the heads of q and k in a part. On a CPU a token is one program, which needs each cosine
    once; on GPUs 2048 pairs (16 a thread of 128)."""
    pairs = tl.next_power_of_2(rotated // 2)
    most = max(1, {"cpu": 1 << 16, "metal": 2048, "cuda": 2048}[target] // pairs)
    q_heads = min(tl.next_power_of_2(heads), most)
    parts = tl.cdiv(heads, q_heads)
    k_heads = tl.next_power_of_2(max(1, tl.cdiv(kv_heads, parts)))
    return parts, {"Q_HEADS": q_heads, "K_HEADS": k_heads, "PAIRS": pairs}


def rope_forward(
    target: str, q: Array, k: Array | None, frequencies: Array, positions: Array | None = None, *, interleaved: bool,
    back: bool = False,
) -> tuple[Array, Array | None]:  # fmt: skip
    """q [batch, T, heads, head_dim] and k [batch, T, kv_heads, head_dim] (or None), turned; contiguous, of their types.

    q and k may have any strides but that of the last axis, which is 1 (others are copied first). frequencies float32
    [rotated / 2]: the first `rotated` values of a head turn. positions int32 [T] or [batch, T]; None: 0, 1, .. T - 1.
    back: by the negative angles.

    Raises ValueError for shapes that do not fit.
    """
    batch, tokens, heads, head_dim = check(q, k, frequencies, positions)
    rotated = 2 * frequencies.shape[0]
    q, k = (x if x is None or x.strides[-1] == 1 else x.contiguous() for x in (q, k))
    rest = head_dim - rotated
    kv_heads = 0 if k is None else k.shape[2]
    parts, constants = blocks(target, heads, kv_heads, rotated)
    found = launch(
        rope_kernel, (batch * tokens, parts), q=Strided(q), k=None if k is None else Strided(k), positions=positions,
        frequencies=frequencies, q_out=Output(q.shape, q.dtype), k_out=None if k is None else Output(k.shape, k.dtype),
        tokens=tokens, position_batch=tokens if positions is not None and positions.ndim == 2 else 0,
        q_heads=heads, **strides("q", q), k_heads=kv_heads, **strides("k", k),
        HEAD_DIM=head_dim, ROTATED=rotated, INTERLEAVED=interleaved, BACK=back,
        REST=tl.next_power_of_2(rest) if rest else 0, **constants,
    )  # fmt: skip
    return (found, None) if k is None else found


def rope_backward(
    target: str, d_q: Array, d_k: Array | None, frequencies: Array, positions: Array | None = None, *,
    interleaved: bool,
) -> tuple[Array, Array | None]:  # fmt: skip
    """The gradients of q and k from those of the turned ones."""
    return rope_forward(target, d_q, d_k, frequencies, positions, interleaved=interleaved, back=True)


def strides(name: str, x: Array | None) -> dict[str, int]:
    """Those that the kernel takes."""
    values = (0, 0, 0) if x is None else x.strides[:3]
    return {f"{name}_{axis}": stride for axis, stride in zip(("batch", "token", "head"), values)}


def check(q: Any, k: Any, frequencies: Any, positions: Any) -> tuple[int, int, int, int]:
    """q's shape; ValueError if something does not fit it."""
    if len(q.shape) != 4 or (k is not None and (len(k.shape) != 4 or (*k.shape[:2], k.shape[3]) !=
                                                (*q.shape[:2], q.shape[3]))):  # fmt: skip
        raise ValueError(
            f"rope: found q of shape {tuple(q.shape)} and k of {None if k is None else tuple(k.shape)}; expected "
            "[batch, T, heads, head_dim] and [batch, T, kv_heads, head_dim]"
        )
    batch, tokens, heads, head_dim = q.shape
    if len(frequencies.shape) != 1 or not 0 < 2 * frequencies.shape[0] <= head_dim:
        raise ValueError(
            f"rope: frequencies have shape {tuple(frequencies.shape)}; expected one per pair of values that turn, at "
            f"most ({head_dim // 2},) for a head_dim of {head_dim}"
        )
    if positions is not None and tuple(positions.shape) not in ((tokens,), (batch, tokens)):
        raise ValueError(
            f"rope: positions have shape {tuple(positions.shape)}, expected ({tokens},) or ({batch}, {tokens})"
        )
    return batch, tokens, heads, head_dim


def rope_reference(
    x: np.ndarray, frequencies: np.ndarray, positions: np.ndarray | None = None, *, interleaved: bool,
    back: bool = False,
) -> np.ndarray:  # fmt: skip
    """x [batch, T, heads, head_dim] turned, in float64 (the angle is float32, as in the kernel)."""
    positions = np.arange(x.shape[1]) if positions is None else positions
    angle = np.asarray(positions, np.float32)[..., None] * frequencies  # [T, pairs] or [batch, T, pairs]
    angle = angle.astype(np.float64)[..., None, :] * (-1 if back else 1)
    half = len(frequencies)
    pairs = (np.s_[..., 0 : 2 * half : 2], np.s_[..., 1 : 2 * half : 2]) if interleaved else (
        np.s_[..., :half], np.s_[..., half : 2 * half])  # fmt: skip
    out = x.astype(np.float64)
    one, other = out[pairs[0]].copy(), out[pairs[1]].copy()
    out[pairs[0]] = one * np.cos(angle) - other * np.sin(angle)
    out[pairs[1]] = other * np.cos(angle) + one * np.sin(angle)
>>>>>>> h-rows
    return out

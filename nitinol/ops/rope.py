"""Rotary position embedding (Su et al., "RoFormer", 2021) of queries and keys together.

Pair i of a head turns by the angle position * frequencies[i], in fp32. Which two of the first `rotated` values are a
pair: (2 i, 2 i + 1) interleaved, (i, i + rotated / 2) half-split; the values after them stay (partial rotation, as in
GPT-NeoX). A rotation's gradient is the rotation back: backward is the same kernel with the sine negated.
"""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc,union-attr"

from __future__ import annotations

from typing import Any

import numpy as np

import nitinol.language as tl
from nitinol.graph.array import Array
from nitinol.graph.conversion import as_operand
from nitinol.graph.launch import Output, Strided, launch
from nitinol.graph.operation import Operation
from nitinol.language.jit import jit
from nitinol.ops import elementwise as e
from nitinol.ops.creation import arange
from nitinol.ops.indexing import concatenate, stack


@jit
def rope_kernel(
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
    return out


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


# -------------------------------------------------------------------------------------------------- the operations


def _rope_rule(q: Array, k: Array | None, frequencies: Array, positions: Array | None, **options: Any) -> Any:
    return [(x.shape, x.dtype) for x in (q, k) if x is not None]


def _rope_lower(
    target: str, q: Array, k: Array | None, frequencies: Array, positions: Array | None, interleaved: bool, back: bool
) -> Any:
    found = rope_forward(target, q, k, frequencies, positions, interleaved=interleaved, back=back)
    return found[0] if k is None else found


def _rope_vjp(
    g: Any, out: Any, q: Array, k: Array | None, frequencies: Array, positions: Array | None, interleaved: bool,
    back: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Of q and k: the rotation back."""
    d_q, d_k = (g, None) if k is None else g
    found = ROPE(d_q, d_k, frequencies, positions, interleaved=interleaved, back=not back)
    return *((found, None) if k is None else found), None, None


ROPE = Operation("rope", rule=_rope_rule, lower=_rope_lower, vjp=_rope_vjp)


def rope(x: Any, frequencies: Any, positions: Any = None, *, interleaved: bool = False) -> Any:
    """Rotary position embedding (Su et al., "RoFormer", 2021): pair i of each head turned by position * frequencies[i].

    x: an array [batch, T, heads, head_dim], or a pair (q, k) of these that differ in nothing but heads, for which one
    kernel computes sines and cosines once; the result is like x. They may be views with any order of the first three
    axes. frequencies: float32 [pairs] (see `rope_frequencies`); values after the first 2 * pairs of a head stay.
    positions: int32 [T] or [batch, T], 0 .. T - 1 unless given. interleaved: the values of a pair are neighbours;
    otherwise they are `pairs` apart. Computed in float32, of float64 in float64 (but for the angles).

    No gradient flows to the frequencies. Raises ValueError for shapes that do not fit, TypeError for types.
    """
    q, k = (as_operand(part) for part in (x if isinstance(x, (tuple, list)) else (x, None)))
    frequencies, positions = as_operand(frequencies), as_operand(positions)
    check(q, k, frequencies, positions)
    for what, operand, fits in (("q", q, q.dtype.is_float), ("k", k, k is None or k.dtype.is_float),
                                ("frequencies", frequencies, frequencies.dtype == tl.float32),
                                ("positions", positions, positions is None or positions.dtype.is_int)):  # fmt: skip
        if not fits:
            raise TypeError(f"rope: {what} is of type {operand.dtype}; expected floats, float32 frequencies and "
                            "integer positions")  # fmt: skip
    if tl.float64 in [part.dtype for part in (q, k) if part is not None]:
        turned = [None if part is None else composed_rope(part, frequencies, positions, interleaved) for part in (q, k)]
    else:
        found = ROPE(q, k, frequencies, positions, interleaved=bool(interleaved), back=False)
        turned = [found] if k is None else found
    return turned[0] if k is None else tuple(turned)


def composed_rope(x: Array, frequencies: Array, positions: Array | None, interleaved: bool) -> Array:
    """x turned, in elementwise operations of x's type; angles are float32, as the kernel's."""
    place = arange(x.shape[1]) if positions is None else positions
    angle = (place.astype("float32").expand_dims(-1) * frequencies).astype(x.dtype).expand_dims(-2)
    cosine, sine = e.cos(angle), e.sin(angle)
    pairs = frequencies.shape[0]
    turning, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    one, other = (turning[..., 0::2], turning[..., 1::2]) if interleaved else (turning[..., :pairs],
                                                                              turning[..., pairs:])  # fmt: skip
    turned = [one * cosine - other * sine, other * cosine + one * sine]
    whole = stack(turned, -1).reshape(turning.shape) if interleaved else concatenate(turned, -1)
    return concatenate([whole, rest], -1) if rest.size else whole

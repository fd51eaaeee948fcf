"""Quantised weights in plain NumPy: blocks to values, the reference for all kernels, and values to blocks.

The formats themselves are described in `blocks.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nitinol.formats.blocks import (
    FORMATS,
    BlockFormat,
    Blocks,
    Bytes,
    Floats,
    as_blocks,
    lookup,
    pack_planes,
    quants_of,
    scales_of,
)

# Temporaries of one step stay near 16 MB, so that a gigabyte tensor needs its result and little more.
_STEP_VALUES = 1 << 20


def _decode(blocks: Blocks, layout: BlockFormat) -> Floats:
    if layout.name == "BF16":
        return (blocks["value"].astype(np.uint32) << 16).view(np.float32)
    if layout.values == 1:
        return blocks["value"].astype(np.float32)
    scales, minimums = scales_of(blocks, layout.name)
    grouped = quants_of(blocks, layout.name).reshape(len(blocks), -1, layout.group)
    values = scales[:, :, None] * grouped
    if minimums is not None:
        values += minimums[:, :, None]
    return values.reshape(-1)


def dequantize(data: NDArray[Any], format: str, shape: Sequence[int]) -> Floats:
    """Blocks to float32 values of `shape` (outermost dimension first).

    `data` holds the bytes of `prod(shape)` values. ValueError when they do not fit each other. NaN and
    infinite scales pass through as the arithmetic has them. Bit-exact with ggml's reference.
    """
    layout = lookup(format)
    count = math.prod(shape)
    blocks = as_blocks(data, layout)
    if len(blocks) * layout.values != count:
        raise ValueError(
            f"{format} data of {len(blocks) * layout.bytes} bytes holds {len(blocks) * layout.values} values, "
            f"but shape {tuple(shape)} has {count}"
        )
    out = np.empty(count, dtype=np.float32)
    step = _STEP_VALUES // layout.values
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(blocks), step):
            part = _decode(blocks[start : start + step], layout)
            out[start * layout.values : start * layout.values + part.size] = part
    return out.reshape(shape)


def _pack_scales_and_minimums(scales: NDArray[Any], minimums: NDArray[Any]) -> Bytes:
    s, m = scales.astype(np.uint8), minimums.astype(np.uint8)
    a = s[:, :4] | (s[:, 4:] >> 4) << 6
    b = m[:, :4] | (m[:, 4:] >> 4) << 6
    return np.concatenate([a, b, (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4], axis=1)


def _inverse(scale: Floats) -> Floats:
    """1 / scale, and 0 where the scale is zero or so small (subnormal) that its inverse is not finite."""
    usable = np.abs(scale) >= np.finfo(np.float32).tiny
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=usable)


def _extreme(values: Floats) -> Floats:
    """The value of largest magnitude along the last axis, with its sign; the axis is kept with length 1."""
    return np.take_along_axis(values, np.abs(values).argmax(axis=-1, keepdims=True), axis=-1)


def _round(values: Floats, low: int, high: int) -> NDArray[np.int16]:
    return np.clip(np.rint(values), low, high).astype(np.int16)


def _encode_32(x: Floats, name: str) -> Blocks:
    """Blocks of 32 values, x is `[n, 32]`: the rounding of ggml's reference, bit for bit."""
    blocks = np.zeros(len(x), dtype=FORMATS[name].layout)
    if name == "Q8_0":
        d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
        y = x * _inverse(d)
        q = np.trunc(y)
        q = q + np.trunc(2 * (y - q))  # ties go away from zero, unlike np.rint
        blocks["quants"] = np.clip(q, -127, 127)
    elif name in ("Q4_0", "Q5_0"):
        half = 8 if name == "Q4_0" else 16
        d = _extreme(x) / np.float32(-half)
        q = np.clip(np.trunc(x * _inverse(d) + np.float32(half + 0.5)), 0, 2 * half - 1)
    else:
        top = 15 if name == "Q4_1" else 31
        low = x.min(axis=1, keepdims=True)
        d = (x.max(axis=1, keepdims=True) - low) / np.float32(top)
        q = np.clip(np.trunc((x - low) * _inverse(d) + np.float32(0.5)), 0, top)
        blocks["m"] = low[:, 0]
    blocks["d"] = d[:, 0]
    if name != "Q8_0":
        integers = q.astype(np.uint8)
        blocks["low"] = pack_planes(integers & 15, 4, 16)
        if name in ("Q5_0", "Q5_1"):
            blocks["high"] = pack_planes(integers >> 4, 1, 1)
    return blocks


def _encode_256(x: Floats, layout: BlockFormat) -> Blocks:
    """Blocks of 256 values, x is `[n, 256]`: scales from each group's extremes, then rounding. No search for
    better scales, so the error is somewhat above that of ggml's own quantiser."""
    name = layout.name
    blocks = np.zeros(len(x), dtype=layout.layout)
    groups = x.reshape(len(x), -1, layout.group)
    if name in ("Q3_K", "Q6_K"):  # symmetric: quants from -half to half - 1, signed group scales
        half, limit = (4, 32) if name == "Q3_K" else (32, 128)
        wanted = _extreme(groups)[:, :, 0] / np.float32(-half)
        blocks["d"] = (_extreme(wanted) / np.float32(-limit))[:, 0]
        d = blocks["d"].astype(np.float32)[:, None]
        scales = _round(wanted * _inverse(d), -limit, limit - 1)
        q = _round(groups * _inverse(d * scales)[:, :, None], -half, half - 1).reshape(len(x), -1) + half
        integers = q.astype(np.uint8)
        if name == "Q3_K":
            six = (scales + 32).astype(np.uint8)
            blocks["scales"] = np.concatenate([pack_planes(six & 15, 4, 8), pack_planes(six >> 4, 2, 4)], axis=1)
            blocks["low"] = pack_planes(integers & 3, 2, 32)
            blocks["high"] = pack_planes(integers >> 2, 1, 32)
        else:
            blocks["scales"] = scales
            blocks["low"] = pack_planes(integers & 15, 4, 64)
            blocks["high"] = pack_planes(integers >> 4, 2, 32)
        return blocks
    # With minimums: quants from 0 to top; a group's minimum is never above zero, and is kept negated.
    top, limit = {"Q2_K": (3, 15), "Q4_K": (15, 63), "Q5_K": (31, 63)}[name]
    lowest = np.maximum(-groups.min(axis=2), np.float32(0))
    wanted = np.maximum(groups.max(axis=2) + lowest, np.float32(0)) / np.float32(top)
    blocks["d"] = wanted.max(axis=1) / np.float32(limit)
    blocks["dmin"] = lowest.max(axis=1) / np.float32(limit)
    d, dmin = (blocks[field].astype(np.float32)[:, None] for field in ("d", "dmin"))
    scales = _round(wanted * _inverse(d), 0, limit)
    minimums = _round(lowest * _inverse(dmin), 0, limit)
    shifted = groups + (dmin * minimums)[:, :, None]
    integers = _round(shifted * _inverse(d * scales)[:, :, None], 0, top).reshape(len(x), -1).astype(np.uint8)
    if name == "Q2_K":
        blocks["scales"] = scales | minimums << 4
        blocks["low"] = pack_planes(integers, 2, 32)
        return blocks
    blocks["scales"] = _pack_scales_and_minimums(scales, minimums)
    blocks["low"] = pack_planes(integers & 15, 4, 32)
    if name == "Q5_K":
        blocks["high"] = pack_planes(integers >> 4, 1, 32)
    return blocks


def _encode(x: Floats, layout: BlockFormat) -> Blocks:
    """x is float32 `[n, values]`."""
    if layout.name == "BF16":
        bits = x.reshape(-1).view(np.uint32)
        rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16  # to nearest, ties to even
        quiet_nan = bits >> 16 | 64
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return np.where(is_nan, quiet_nan, rounded).astype("<u2").view(layout.layout)
    if layout.values == 1:
        return x.reshape(-1).astype(layout.layout["value"]).view(layout.layout)
    if not np.isfinite(x).all():
        raise ValueError(f"{layout.name} cannot hold NaN or infinity; found one among the values")
    blocks = _encode_32(x, layout.name) if layout.values == 32 else _encode_256(x, layout)
    if not all(np.isfinite(blocks[f]).all() for f in ("d", "m", "dmin") if f in (layout.layout.names or ())):
        raise ValueError(f"{layout.name} keeps its scale as float16, too small for {np.abs(x).max():g}")
    return blocks


def quantize(values: NDArray[Any], format: str) -> Bytes:
    """Values `[..., n]` of any float dtype to blocks, as uint8 `[bytes]`.

    The last dimension must be a multiple of the format's block (ValueError). F16 and BF16 round to nearest
    even, Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1 match ggml's reference bit for bit, the K formats are simple.
    """
    layout = lookup(format)
    if values.ndim == 0 or values.shape[-1] % layout.values:
        raise ValueError(
            f"{format} needs rows of a multiple of {layout.values} values, but the shape is {values.shape}"
        )
    flat = values.reshape(-1, layout.values)
    out = np.empty(len(flat) * layout.bytes, dtype=np.uint8)
    step = _STEP_VALUES // layout.values
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(flat), step):
            part = _encode(np.ascontiguousarray(flat[start : start + step], dtype=np.float32), layout)
            out[start * layout.bytes : start * layout.bytes + part.nbytes] = part.view(np.uint8).reshape(-1)
    return out

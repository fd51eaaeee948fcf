"""y = W x for one token or a few: the product of decoding, bound by the speed at which weights come from memory.

A program owns ROWS rows and streams through them once, a run of whole blocks at a time. Quantised weights meet
activations in int8: eight lanes of four-byte dot products per 32 values, then one product with both scales. For a
weight's minimum the group's sum of activations is enough. Everything is accumulated in float32, in an order that
depends on the shapes alone.
"""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc,call-overload,union-attr"

from __future__ import annotations

import numpy as np

import nitinol.language as tl
from nitinol.formats.quantization import dequantize
from nitinol.language.jit import jit
from nitinol.ops.activations import Activations
from nitinol.ops.decode import centre_of, decode, has_minimum, lanes_of
from nitinol.ops.epilogue import activate, finish


@jit
def matvec_kernel(
    x, x_scales, x_sums, weights, up, bias, residual, out, tokens, rows, columns, row_bytes,
    FORMAT: tl.constexpr, BLOCKS: tl.constexpr, VALUES: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    EVEN: tl.constexpr, LANES: tl.constexpr = 0, EARLY: tl.constexpr = False, COUNT: tl.constexpr = 0,
    GELU: tl.constexpr = False,
):  # fmt: skip
    """Rows ROWS * i ... of out [tokens, rows] = x @ weights^T (+ bias) (+ residual); bias and residual may be None.

    With `up`, a second matrix of the same shape and format: silu(weights x) * (up x), the gate of a SwiGLU layer
    (GELU: gelu in its place).
    x is int8 with scales and sums for block formats, float32 (scales and sums None) for F32, F16, BF16. EVEN: rows is
    a multiple of ROWS and tokens is TOKENS. LANES: into how many sums the products of a group of 32 go before they meet
    the scale; 0: one for every four bytes of a slice, as a CPU's vectors have them. EARLY: the first run of each row is
    loaded before the kernel waits for those before it (rows are whole runs). COUNT: the runs of a row of block formats,
    if their loop is to be unrolled: one is on its way while another is multiplied. 0: it is not.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    source = row if EVEN else tl.minimum(row, rows - 1)
    reader = token if EVEN else tl.minimum(token, tokens - 1)
    first = None
    if EARLY:
        first = first_run(weights, source, columns, row_bytes, FORMAT, BLOCKS, VALUES, x_scales is None)
        tl.extra.cuda.gdc_wait()
    if residual is not None:  # on its way while the weights are, not after them
        place = token[:, None].to(tl.int64) * rows + row[None, :]
        inside = (token < tokens)[:, None] & (row < rows)[None, :]
        added = tl.load(residual + place) if EVEN else tl.load(residual + place, mask=inside, other=0.0)
    y = product(
        x, x_scales, x_sums, weights, source, reader, columns, row_bytes, first, FORMAT, BLOCKS, VALUES, LANES, COUNT
    )
    if up is not None:
        right = product(
            x, x_scales, x_sums, up, source, reader, columns, row_bytes, None, FORMAT, BLOCKS, VALUES, LANES, COUNT
        )
        y = activate(y, GELU) * right
    if residual is not None:
        y += added
    finish(y, out, token, row, tokens, rows, bias, None, None, EVEN)


@jit
def first_run(
    weights, row, columns, row_bytes,
    FORMAT: tl.constexpr, BLOCKS: tl.constexpr, VALUES: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """What `product` begins with: weights as they are, or decoded."""
    if PLAIN:
        return tl.load(weights + row[:, None].to(tl.int64) * columns + tl.arange(0, VALUES)[None, :])
    return decode(weights + row.to(tl.int64) * row_bytes, 0, FORMAT, BLOCKS, True)


@jit
def product(
    x, x_scales, x_sums, weights, row, token, columns, row_bytes, first,
    FORMAT: tl.constexpr, BLOCKS: tl.constexpr, VALUES: tl.constexpr, SUMS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Dot products of tokens and rows, float32 [tokens, rows]. first: of first_run, or None."""
    if x_scales is None:
        return float_product(x, weights, row, token, columns, first, VALUES)
    GROUPS: tl.constexpr = VALUES // 32
    group = tl.arange(0, GROUPS)
    pointers = weights + row.to(tl.int64) * row_bytes
    count = columns // VALUES  # of runs; what is a multiple of it is known to be aligned
    values = x + token[:, None] * columns + group[None, :] * 32
    scales = x_scales + token[:, None] * (count * GROUPS) + group[None, :]
    sums = x_sums + token[:, None, None] * (count * (2 * GROUPS)) + sixteen(GROUPS)[None]
    LANES: tl.constexpr = SUMS or lanes_of(FORMAT)
    STORED: tl.constexpr = LANES <= 2 and SUMS > 0  # each thread has the values that one sum of activations is for
    CENTRE: tl.constexpr = centre_of(FORMAT) if STORED else 0
    MINIMUM: tl.constexpr = has_minimum(FORMAT) and not STORED  # sums of minimums' own
    SIDE: tl.constexpr = min(GROUPS, 16 // LANES)  # groups side by side: 16 lanes are a vector of 512 bits
    shape: tl.constexpr = (token.shape[0], row.shape[0], GROUPS // SIDE, LANES * SIDE)
    total = tl.zeros((token.shape[0], row.shape[0], LANES * SIDE), tl.float32)
    if MINIMUM:
        low = tl.zeros((token.shape[0], row.shape[0], GROUPS), tl.float32)
    if first is not None:
        scaled, part = run_products(first, values, scales, sums, 0, GROUPS, LANES, CENTRE, STORED)
        total += tl.sum(tl.reshape(scaled, shape), axis=2)
    START: tl.constexpr = 0 if first is None else 1
    for run in tl.static_range(START, COUNT) if COUNT else range(START, count):
        decoded = decode(pointers, run * BLOCKS, FORMAT, BLOCKS, STORED)
        scaled, part = run_products(decoded, values, scales, sums, run, GROUPS, LANES, CENTRE, STORED)
        if MINIMUM:
            low += part
        total += tl.sum(tl.reshape(scaled, shape), axis=2)
    if MINIMUM:
        return tl.sum(total, axis=2) + tl.sum(low, axis=2)
    return tl.sum(total, axis=2)


@jit
def run_products(
    decoded, values, scales, sums, run,
    GROUPS: tl.constexpr, LANES: tl.constexpr, CENTRE: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """Decoded weights of a run times its activations, float32 [tokens, rows, groups, LANES], and the part of the
    minimums if they have sums of their own [tokens, rows, groups], else None."""
    quants, scale, minimum = decoded
    x_scale = tl.load(scales + run * GROUPS)
    if minimum is not None or CENTRE > 0:
        x_sum = tl.load(sums + run * (2 * GROUPS))
        if LANES == 1:
            x_sum = tl.sum(x_sum, axis=2, keep_dims=True)
    dots = lane_dots(quants[0], values + run * (32 * GROUPS), LANES)
    if len(quants) == 2:
        dots += lane_dots(quants[1], values + (run * (32 * GROUPS) + 16), LANES)
    if CENTRE > 0:
        dots -= CENTRE * x_sum[:, None]
    scaled = dots.to(tl.float32) * over_lanes(scale[None] * x_scale[:, None, :, None], LANES)
    part = None
    if minimum is not None:
        if STORED:  # where the products are
            scaled += over_lanes(minimum[None], LANES) * (x_sum.to(tl.float32) * x_scale[:, :, None])[:, None]
        else:
            part = minimum_term(minimum, x_sum, x_scale)
    return scaled, part


@jit
def sixteen(GROUPS: tl.constexpr):
    """Places of the sums of 16 values: [GROUPS, 2]."""
    return tl.arange(0, GROUPS)[:, None] * 2 + tl.arange(0, 2)[None, :]


@jit
def lane_dots(quants, values, LANES: tl.constexpr):
    """Quants [rows, groups, n] times n bytes each from `values` (pointers [tokens, groups]), n / LANES products a lane:
    int32 [tokens, rows, groups, LANES]."""
    count: tl.constexpr = quants.shape[2]
    activations = tl.load(values[:, :, None] + tl.arange(0, count)[None, None, :])
    shape: tl.constexpr = (values.shape[0], quants.shape[0], quants.shape[1], LANES, count // LANES)
    left = tl.broadcast_to(tl.reshape(quants, (1, *shape[1:])), shape)
    right = tl.broadcast_to(tl.reshape(activations, (shape[0], 1, *shape[2:])), shape)
    return tl.sum(left.to(tl.int32) * right.to(tl.int32), axis=4)


@jit
def over_lanes(scale, LANES: tl.constexpr):
    """[tokens, rows, groups, parts] repeated over the lanes of a group."""
    shape: tl.constexpr = scale.shape
    if shape[3] == 1:
        return tl.broadcast_to(scale, (*shape[:3], LANES))
    return tl.reshape(tl.broadcast_to(scale[:, :, :, :, None], (*shape, LANES // shape[3])), (*shape[:3], LANES))


@jit
def minimum_term(minimum, sums, x_scale):
    """minimum [rows, groups, parts] times the sums of 16 activations: integer sums [tokens, groups, 2] and scales
    [tokens, groups], to [tokens, rows, groups]."""
    first, second = tl.split(sums)
    if minimum.shape[2] == 1:
        total = (first + second).to(tl.float32) * x_scale
        return tl.reshape(minimum, (1, minimum.shape[0], minimum.shape[1])) * total[:, None, :]
    low, high = tl.split(minimum)
    left, right = first.to(tl.float32) * x_scale, second.to(tl.float32) * x_scale
    return low[None] * left[:, None, :] + high[None] * right[:, None, :]


@jit
def float_product(x, weights, row, token, columns, first, VALUES: tl.constexpr):
    """The same for weights of float32, float16 or bfloat16."""
    at = tl.arange(0, VALUES)
    source = weights + row[:, None].to(tl.int64) * columns + at[None, :]
    values = x + token[:, None] * columns + at[None, :]
    SUMS: tl.constexpr = min(VALUES, 64)  # partial sums of a row: four vectors of a CPU; a GPU's threads share them
    total = tl.zeros((token.shape[0], row.shape[0], SUMS), tl.float32)
    whole = columns // VALUES * VALUES
    if first is not None:
        total = add_products(first.to(tl.float32)[None], tl.load(values)[:, None, :], total)
    for start in range(0 if first is None else VALUES, whole, VALUES):
        weight = tl.load(source + start).to(tl.float32)
        total = add_products(weight[None], tl.load(values + start)[:, None, :], total)
    y = tl.sum(total, axis=2)
    if whole < columns:
        inside = (whole + at < columns)[None, :]
        weight = tl.load(source + whole, mask=inside, other=0.0).to(tl.float32)
        y += tl.sum(weight[None] * tl.load(values + whole, mask=inside, other=0.0)[:, None, :], axis=2)
    return y


@jit
def add_products(left, right, total):
    """total [tokens, rows, sums] + left * right [tokens, rows, values], folded to as many sums."""
    sums: tl.constexpr = total.shape[2]
    if left.shape[2] == sums:
        return tl.fma(left, right, total)
    products = left * right
    count: tl.constexpr = products.shape[2] // sums
    return total + tl.sum(tl.reshape(products, (total.shape[0], total.shape[1], count, sums)), axis=2)


def matvec_reference(
    x: np.ndarray | Activations, data: np.ndarray, format: str, shape: tuple[int, int],
    bias: np.ndarray | None = None, residual: np.ndarray | None = None, up: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """The same in float64 on dequantised operands."""
    if isinstance(x, Activations):
        scales = np.repeat(np.asarray(x.scales, np.float64), 32, axis=1)
        x = np.asarray(x.values, np.float64) * scales
    y = x.astype(np.float64) @ dequantize(data, format, shape).astype(np.float64).T
    if up is not None:
        y = y / (1 + np.exp(-y)) * (x.astype(np.float64) @ dequantize(up, format, shape).astype(np.float64).T)
    for term in (bias, residual):
        if term is not None:
            y = y + term
    return y

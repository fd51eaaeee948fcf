"""Products of activations with weights [rows, columns] of any format, as parts of larger kernels.

`row_products` is x @ weights^T, what a layer does forwards; `weight_block` gives the tile that a gradient needs for
dy @ weights. Block formats are decoded in registers; activations are not rounded to int8, unlike those of
kernels.linear, so that a gradient is that of what was computed.

Two ways of adding up, `DOT`: matrix products of blocks for many tokens; for a few, whose time is that of reading the
weights, sums of products in vector registers.
"""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc,call-overload"

from __future__ import annotations

from typing import Any

import nitinol.language as tl
from nitinol.formats.blocks import FORMATS
from nitinol.graph.array import Array
from nitinol.language.jit import jit
from nitinol.ops.decode import FLOAT_FORMATS, decode_values
from nitinol.ops.matmul_kernels import multiply
from nitinol.ops.matvec import add_products
from nitinol.ops.quantized import run_arguments
from nitinol.ops.tiles import part

FEW_TOKENS = 4  # up to here the weights' bytes are what takes time, not the products


@jit
def row_products(
    x, source, weights, row, columns, row_bytes, gain, inverse,
    FORMAT: tl.constexpr, BLOCKS: tl.constexpr, VALUES: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Dot products of rows `source` (int [tokens]) of x and rows `row` of the weights: float32 [tokens, rows].

    With gain [columns] and inverse [tokens], the reciprocals of the rows' root mean squares, x is normalised on its
    way. EVEN: columns is a multiple of VALUES, of which block formats always have a whole number.
    """
    values = x + source.to(tl.int64)[:, None] * columns
    SUMS: tl.constexpr = min(VALUES, 64)  # partial sums of a row: four vectors of a CPU; a GPU's threads share them
    total = tl.zeros((source.shape[0], row.shape[0]) if DOT else (source.shape[0], row.shape[0], SUMS), tl.float32)
    if FORMAT == "F32" or FORMAT == "F16" or FORMAT == "BF16":
        at = tl.arange(0, VALUES)
        pointers = weights + row.to(tl.int64)[:, None] * columns
        whole = columns // VALUES * VALUES
        for start in range(0, whole, VALUES):
            left = activation(values, gain, inverse, start + at, None, DOT)
            total = add_block(left, tl.load(pointers + (start + at)[None, :]), total, DOT)
        if not EVEN:
            inside = whole + at < columns
            left = activation(values, gain, inverse, whole + at, inside, DOT)
            weight = tl.load(pointers + (whole + at)[None, :], mask=inside[None, :], other=0.0)
            total = add_block(left, weight, total, DOT)
    else:
        pointers = weights + row.to(tl.int64) * row_bytes
        for run in range(0, columns // VALUES):
            decoded = decode_values(pointers, run * BLOCKS, FORMAT, BLOCKS)
            if DOT:  # in parts of 32 columns, so that blocks of 256 values need no more shared memory than others
                for group in tl.static_range(VALUES // 32):
                    at = run * VALUES + group * 32 + tl.arange(0, 32)
                    left = activation(values, gain, inverse, at, None, DOT)
                    total = tl.dot(left, tl.trans(part(decoded, group).to(left.dtype)), total)
            else:
                at = run * VALUES + tl.arange(0, VALUES)
                weight = tl.reshape(decoded, (row.shape[0], VALUES))
                total = add_block(activation(values, gain, inverse, at, None, DOT), weight, total, DOT)
    return total if DOT else tl.sum(total, axis=2)


@jit
def activation(values, gain, inverse, at, inside, DOT: tl.constexpr):
    """Columns `at` of rows at pointers `values` [tokens, 1], 0 where not `inside`; with gain and inverse normalised,
    and then for DOT rounded to the type of x, as a norm of its own would store it."""
    if inside is None:
        value = tl.load(values + at[None, :])
    else:
        value = tl.load(values + at[None, :], mask=inside[None, :], other=0.0)
    if gain is None:
        return value
    weight = tl.load(gain + at) if inside is None else tl.load(gain + at, mask=inside, other=0.0)
    normal = value.to(tl.float32) * inverse[:, None] * weight.to(tl.float32)[None, :]
    return normal.to(value.dtype) if DOT else normal


@jit
def add_block(left, right, total, DOT: tl.constexpr):
    """total + left [tokens, values] @ right [rows, values]^T; without DOT total is [tokens, rows, sums]."""
    if DOT:
        return multiply(left, tl.trans(right), total)
    return add_products(right.to(tl.float32)[None], left.to(tl.float32)[:, None, :], total)


@jit
def inverse_rms(x, source, columns, epsilon, VALUES: tl.constexpr, EVEN: tl.constexpr):
    """1 / sqrt(mean(x ** 2) + epsilon) of rows `source`: float32 [tokens]."""
    values = x + source.to(tl.int64)[:, None] * columns
    at = tl.arange(0, VALUES)
    total = tl.zeros((source.shape[0], VALUES), tl.float32)
    for start in range(0, columns, VALUES):
        if EVEN:
            value = tl.load(values + (start + at)[None, :]).to(tl.float32)
        else:
            value = tl.load(values + (start + at)[None, :], mask=(start + at < columns)[None, :], other=0.0)
            value = value.to(tl.float32)
        total += value * value
    return tl.rsqrt(tl.sum(total, axis=1) / columns + epsilon)


@jit
def weight_block(
    weights, row, run, columns, row_bytes,
    FORMAT: tl.constexpr, BLOCKS: tl.constexpr, VALUES: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Columns run * VALUES ... of rows `row`, [rows, VALUES]: as they are stored, or float32 of block formats."""
    if FORMAT == "F32" or FORMAT == "F16" or FORMAT == "BF16":
        at = run * VALUES + tl.arange(0, VALUES)
        pointers = weights + row.to(tl.int64)[:, None] * columns + at[None, :]
        return tl.load(pointers) if EVEN else tl.load(pointers, mask=(at < columns)[None, :], other=0.0)
    decoded = decode_values(weights + row.to(tl.int64) * row_bytes, run * BLOCKS, FORMAT, BLOCKS)
    return tl.reshape(decoded, (row.shape[0], VALUES))


@jit
def column_products(
    dy, source, token_inside, weights, first, rows, run, columns, row_bytes,
    TOKENS: tl.constexpr, ROWS: tl.constexpr,
    FORMAT: tl.constexpr, BLOCKS: tl.constexpr, VALUES: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """dy [.., rows] @ weights, columns run * VALUES ...: float32 [TOKENS, VALUES]; `first` is the row of the weights
    that dy's column 0 belongs to. Weights of a block format are rounded to dy's type, as its products are of that."""
    total = tl.zeros((TOKENS, VALUES), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = token_inside[:, None] & (row < rows)[None, :]
        left = tl.load(dy + source.to(tl.int64)[:, None] * rows + row[None, :], mask=inside, other=0.0)
        right = weight_block(
            weights, first + tl.minimum(row, rows - 1), run, columns, row_bytes, FORMAT, BLOCKS, VALUES, EVEN
        )
        if FORMAT == "F32" or FORMAT == "F16" or FORMAT == "BF16":
            total = multiply(left, right, total)
        else:
            total = tl.dot(left, right.to(left.dtype), total)
    return total


def format_of(weights: Array) -> str:
    """The name of the weights' format; TypeError where they are neither floats of 16 or 32 bits nor in blocks."""
    if weights.format not in FORMATS:
        raise TypeError(f"weights are {weights.dtype}, expected float32, float16, bfloat16 or a block format")
    return weights.format


def weight_arguments(format: str, columns: int, values: int) -> dict[str, Any]:
    """What kernels need to know of weights of a format: the bytes of a row, and about how many of its values are one
    step. ValueError if a row is not a whole number of blocks."""
    run = run_arguments(format, columns, values)
    return {"row_bytes": FORMATS[format].nbytes(columns), "EVEN": columns % run["VALUES"] == 0, **run}


def is_float(format: str) -> bool:
    """Whether weights of that format are stored as numbers, not blocks."""
    return format in FLOAT_FORMATS

"""Softmax of rows: exp(x - max) / sum, each row in one program that reads memory once."""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

import math
from typing import Any

import numpy as np

import nitinol.language as tl
from nitinol.graph.array import Array
from nitinol.graph.launch import Output, launch
from nitinol.graph.operation import Operation
from nitinol.language.jit import jit
from nitinol.ops import elementwise as e
from nitinol.ops.reductions import floats, logsumexp
from nitinol.ops.tiles import load_row, store_row

LARGEST_ROW = 1 << 16  # values that a program keeps as one tile (256 KB of scratch, in a core's cache)


@jit
def softmax_kernel(x, out, columns, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """One program per row; BLOCK is at least `columns`."""
    row = tl.program_id(0).to(tl.int64) * columns
    at = tl.arange(0, BLOCK)
    value = load_row(x + row, at, columns, EVEN, float("-inf"))
    weight = tl.exp(value - tl.max(value))
    store_row(out + row, at, columns, weight * (1.0 / tl.sum(weight)), EVEN)


@jit
def long_softmax_kernel(x, out, columns, BLOCK: tl.constexpr):
    """One program per row of any length, BLOCK values at a time; `out` keeps the numerators in between."""
    row = tl.program_id(0).to(tl.int64) * columns
    at = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, columns, BLOCK):
        top = tl.maximum(top, load_row(x + row + start, at, columns - start, False, float("-inf")))
    highest = tl.max(top)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        weight = tl.exp(load_row(x + row + start, at, columns - start, False, float("-inf")) - highest)
        store_row(out + row + start, at, columns - start, weight, False)
        total += weight
    scale = 1.0 / tl.sum(total)
    for start in range(0, columns, BLOCK):
        weight = load_row(out + row + start, at, columns - start, False)
        store_row(out + row + start, at, columns - start, weight * scale, False)


def _softmax_lower(target: str, x: Array, axis: int) -> Array:
    if x.dtype == tl.float64:  # the kernels compute in float32
        weights = e.exp(x - x.max(axis, True))
        return weights / weights.sum(axis, True)
    rows = x.swapaxes(axis, -1)
    columns = rows.shape[-1]
    arguments = {"x": rows, "out": Output(rows.shape, x.dtype), "columns": columns}
    grid = (math.prod(rows.shape[:-1]),)
    if columns > LARGEST_ROW:
        out = launch(long_softmax_kernel, grid, BLOCK=1024, **arguments)
    else:
        block = tl.next_power_of_2(columns)
        out = launch(softmax_kernel, grid, BLOCK=block, EVEN=block == columns, **arguments)
    return out.swapaxes(axis, -1)


def softmax_reference(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """The same in float64."""
    wide = x.astype(np.float64)
    weights = np.exp(wide - wide.max(axis=axis, keepdims=True))
    return weights / weights.sum(axis=axis, keepdims=True)


SOFTMAX = Operation(
    "softmax", rule=lambda x, axis: (x.shape, x.dtype), lower=_softmax_lower, reference=softmax_reference,
    vjp=lambda g, out, x, axis: (out * (g - (g * out).sum(axis, True)),),
)  # fmt: skip


def softmax(x: Any, axis: int = -1) -> Array:
    """exp(x - max(x)) / sum along an axis, of x's type (integers give fp32), computed in fp32 or wider.

    A row with NaN or +inf, or of nothing but -inf, gives NaN.
    """
    x = floats(x)
    return SOFTMAX(x, axis=x.axis(axis, "softmax"))


def log_softmax(x: Any, axis: int = -1) -> Array:
    """log(softmax(x)) along an axis, without underflow."""
    x = floats(x)
    return x - logsumexp(x, axis, True)

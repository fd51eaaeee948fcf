"""Softmax of rows: exp(x - max) / sum, each row in one program that reads memory once."""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

import math
from typing import Any

import numpy as np

import nitinol.language as tl
from nitinol.array import Output, launch
from nitinol.kernels.tiles import load_row, store_row
from nitinol.language.jit import jit

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


def softmax(x: Any) -> Any:
    """exp(x - max(x)) / sum along the last axis, float32 of x's shape; x float32, float16 or bfloat16.

    A row with NaN or +inf, or of nothing but -inf, gives NaN.
    """
    columns = x.shape[-1]
    rows = math.prod(x.shape[:-1])
    arguments = {"x": x, "out": Output(x.shape, "float32"), "columns": columns}
    if columns > LARGEST_ROW:
        return launch(long_softmax_kernel, (rows,), BLOCK=1024, **arguments)
    block = tl.next_power_of_2(columns)
    return launch(softmax_kernel, (rows,), BLOCK=block, EVEN=block == columns, **arguments)


def softmax_reference(x: np.ndarray) -> np.ndarray:
    """The same in float64."""
    wide = x.astype(np.float64)
    weights = np.exp(wide - wide.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)

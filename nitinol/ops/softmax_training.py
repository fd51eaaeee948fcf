"""Softmax and log-softmax of rows with their gradients, in the dtype of what is given.

With y = softmax(x): d_x = y (d_y - sum(y d_y)). With y = log_softmax(x): d_x = d_y - exp(y) sum(d_y). Both need the
result and not x. Rows that fit a tile are read once; longer ones are read twice, block by block.
"""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

import math
from typing import Any

import numpy as np

import nitinol.language as tl
from nitinol.graph.array import Array
from nitinol.graph.launch import Output, launch
from nitinol.language.jit import jit
from nitinol.ops.cross_entropy import add_exponentials
from nitinol.ops.tiles import load_row, store_row


@jit
def softmax_kernel(x, out, columns, LOG: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """One program per row; BLOCK is at least `columns`, with EVEN equal."""
    row = tl.program_id(0).to(tl.int64) * columns
    at = tl.arange(0, BLOCK)
    value = load_row(x + row, at, columns, EVEN, float("-inf"))
    distance = value - tl.max(value)
    weight = tl.exp(distance)
    total = tl.sum(weight)
    store_row(out + row, at, columns, distance - tl.log(total) if LOG else weight * (1.0 / total), EVEN)


@jit
def long_softmax_kernel(x, out, columns, LOG: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row of any length, BLOCK values at a time."""
    row = tl.program_id(0).to(tl.int64) * columns
    at = tl.arange(0, BLOCK)
    top, total = float("-inf"), 0.0
    for start in range(0, columns, BLOCK):
        value = load_row(x + row + start, at, columns - start, False, float("-inf"))
        top, total = add_exponentials(value, top, total, 0)
    lse = tl.log(total)
    scale = 1.0 / total
    for start in range(0, columns, BLOCK):
        distance = load_row(x + row + start, at, columns - start, False) - top
        result = distance - lse if LOG else tl.exp(distance) * scale
        store_row(out + row + start, at, columns - start, result, False)


@jit
def softmax_gradient_kernel(d_y, y, out, columns, LOG: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """One program per row; BLOCK is at least `columns`, with EVEN equal."""
    row = tl.program_id(0).to(tl.int64) * columns
    at = tl.arange(0, BLOCK)
    slope, result = load_row(d_y + row, at, columns, EVEN), load_row(y + row, at, columns, EVEN)
    total = tl.sum(summand(slope, result, LOG))
    store_row(out + row, at, columns, gradient_of(slope, result, total, LOG), EVEN)


@jit
def long_softmax_gradient_kernel(d_y, y, out, columns, LOG: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row of any length, BLOCK values at a time."""
    row = tl.program_id(0).to(tl.int64) * columns
    at = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        slope = load_row(d_y + row + start, at, columns - start, False)
        sums += summand(slope, load_row(y + row + start, at, columns - start, False), LOG)
    total = tl.sum(sums)
    for start in range(0, columns, BLOCK):
        slope = load_row(d_y + row + start, at, columns - start, False)
        result = load_row(y + row + start, at, columns - start, False)
        store_row(out + row + start, at, columns - start, gradient_of(slope, result, total, LOG), False)


@jit
def summand(slope, result, LOG: tl.constexpr):
    """What a row's gradient needs the sum of."""
    return slope if LOG else slope * result


@jit
def gradient_of(slope, result, total, LOG: tl.constexpr):
    """d_x, given that sum."""
    return slope - tl.exp(result) * total if LOG else result * (slope - total)


def blocks(target: str) -> dict[str, int]:
    """LARGEST: the longest row that is one tile: 256 KB in a CPU's second cache, 32 registers a thread on GPUs (256
    threads on Metal, 1024 on CUDA). BLOCK: of longer rows, 16 KB in a CPU's first cache."""
    return {
        "cpu": {"LARGEST": 1 << 16, "BLOCK": 4096},
        "metal": {"LARGEST": 1 << 13, "BLOCK": 1024},
        "cuda": {"LARGEST": 1 << 15, "BLOCK": 4096},
    }[target]


def softmax_forward(target: str, x: Array, log: bool = False) -> Array:
    """softmax or log-softmax along the last axis, of x's shape and dtype (float32, float16, bfloat16; sums in fp32).

    A row with NaN or +inf, or of nothing but -inf, gives NaN.
    """
    check(x)
    return launch_rows(target, softmax_kernel, long_softmax_kernel, {"x": x}, x, log)


def softmax_backward(target: str, d_y: Array, y: Array, log: bool = False) -> Array:
    """d_x of y's shape and dtype, from y = softmax(x) or log_softmax(x)."""
    check(y)
    if tuple(d_y.shape) != tuple(y.shape):
        raise ValueError(f"softmax: d_y has shape {tuple(d_y.shape)}, expected y's {tuple(y.shape)}")
    return launch_rows(target, softmax_gradient_kernel, long_softmax_gradient_kernel, {"d_y": d_y, "y": y}, y, log)


def launch_rows(target: str, kernel: Any, long_kernel: Any, operands: dict[str, Array], like: Array, log: bool) -> Any:
    """One of two kernels, by the length of rows."""
    columns = like.shape[-1]
    grid = (math.prod(like.shape[:-1]),)
    arguments = {**operands, "out": Output(like.shape, like.dtype), "columns": columns, "LOG": log}
    sizes = blocks(target)
    if columns > sizes["LARGEST"]:
        return launch(long_kernel, grid, BLOCK=sizes["BLOCK"], **arguments)
    block = tl.next_power_of_2(columns)
    return launch(kernel, grid, BLOCK=block, EVEN=block == columns, **arguments)


def check(x: Any) -> None:
    """TypeError for integers, ValueError for arrays without a last axis or with nothing along it."""
    if not x.dtype.is_float:
        raise TypeError(f"softmax of an array of {x.dtype}, expected floats; cast with .astype()")
    if not x.shape or not x.shape[-1]:
        raise ValueError(f"softmax of an array of shape {tuple(x.shape)}: expected values along the last axis")


def softmax_reference(x: np.ndarray, log: bool = False) -> np.ndarray:
    """The result in float64."""
    distance = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
    total = np.exp(distance).sum(axis=-1, keepdims=True)
    return distance - np.log(total) if log else np.exp(distance) / total


def softmax_gradient_reference(d_y: np.ndarray, y: np.ndarray, log: bool = False) -> np.ndarray:
    """d_x in float64."""
    d_y, y = d_y.astype(np.float64), y.astype(np.float64)
    if log:
        return d_y - np.exp(y) * d_y.sum(axis=-1, keepdims=True)
    return y * (d_y - (y * d_y).sum(axis=-1, keepdims=True))

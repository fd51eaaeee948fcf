"""Softmax and log-softmax of rows, and their gradients.

With y = softmax(x): d_x = y (d_y - sum(y d_y)). With y = log_softmax(x): d_x = d_y - exp(y) sum(d_y). Both need the
result and not x. Rows that fit a tile are read once; longer ones are read twice, block by block.
"""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

import functools
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
from nitinol.ops.tiles import add_exponentials, load_row, store_row


@jit
def softmax_kernel(x, out, columns, BLOCK: tl.constexpr, EVEN: tl.constexpr, LOG: tl.constexpr = False):
    """One program per row; BLOCK is at least `columns`, with EVEN equal."""
    row = tl.program_id(0).to(tl.int64) * columns
    at = tl.arange(0, BLOCK)
    value = load_row(x + row, at, columns, EVEN, float("-inf"))
    distance = value - tl.max(value)
    weight = tl.exp(distance)
    total = tl.sum(weight)
    store_row(out + row, at, columns, distance - tl.log(total) if LOG else weight * (1.0 / total), EVEN)


@jit
def long_softmax_kernel(x, out, columns, BLOCK: tl.constexpr, LOG: tl.constexpr = False):
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


def softmax_reference(x: np.ndarray, axis: int = -1, log: bool = False) -> np.ndarray:
    """The result in float64."""
    distance = x.astype(np.float64) - x.max(axis=axis, keepdims=True)
    total = np.exp(distance).sum(axis=axis, keepdims=True)
    return distance - np.log(total) if log else np.exp(distance) / total


def softmax_gradient_reference(d_y: np.ndarray, y: np.ndarray, log: bool = False) -> np.ndarray:
    """d_x in float64."""
    d_y, y = d_y.astype(np.float64), y.astype(np.float64)
    if log:
        return d_y - np.exp(y) * d_y.sum(axis=-1, keepdims=True)
    return y * (d_y - (y * d_y).sum(axis=-1, keepdims=True))


# -------------------------------------------------------------------------------------------------- the operations


def _lower(log: bool, target: str, x: Array, axis: int) -> Array:
    if x.dtype == tl.float64:  # the kernels compute in float32
        if log:
            return x - logsumexp(x, axis, True)
        weights = e.exp(x - x.max(axis, True))
        return weights / weights.sum(axis, True)
    rows = x.swapaxes(axis, -1)
    return launch_rows(target, softmax_kernel, long_softmax_kernel, {"x": rows}, rows, log).swapaxes(axis, -1)


def _vjp(log: bool, g: Array, y: Array, x: Array, axis: int) -> tuple[Array]:
    if y.dtype != tl.float64 and axis == y.ndim - 1:
        return (SOFTMAX_GRADIENT(g, y, log=log),)
    return (g - e.exp(y) * g.sum(axis, True) if log else y * (g - (g * y).sum(axis, True)),)


def _gradient_vjp(h: Array, d_x: Array, d_y: Array, y: Array, log: bool) -> tuple[Array, Array]:
    """Of sum(h d_x): d_x is linear in d_y."""
    if log:
        weights = e.exp(y)
        return h - (weights * h).sum(-1, True), -(weights * h * d_y.sum(-1, True))
    total, along = (y * d_y).sum(-1, True), (y * h).sum(-1, True)
    return SOFTMAX_GRADIENT(h, y, log=False), h * (d_y - total) - d_y * along


SOFTMAX, LOG_SOFTMAX = (
    Operation(
        name, rule=lambda x, axis: (x.shape, x.dtype), lower=functools.partial(_lower, log),
        reference=functools.partial(softmax_reference, log=log), vjp=functools.partial(_vjp, log),
    )
    for name, log in (("softmax", False), ("log_softmax", True))
)  # fmt: skip
SOFTMAX_GRADIENT = Operation(
    "softmax_gradient", rule=lambda d_y, y, log: (y.shape, y.dtype), lower=softmax_backward,
    reference=softmax_gradient_reference, vjp=_gradient_vjp,
)  # fmt: skip


def softmax(x: Any, axis: int = -1) -> Array:
    """exp(x - max(x)) / sum along an axis, of x's type (integers give fp32), computed in fp32 or wider.

    A row with NaN or +inf, or of nothing but -inf, gives NaN.
    """
    x = floats(x)
    return SOFTMAX(x, axis=x.axis(axis, "softmax"))


def log_softmax(x: Any, axis: int = -1) -> Array:
    """log(softmax(x)) along an axis, without underflow; otherwise as `softmax`."""
    x = floats(x)
    return LOG_SOFTMAX(x, axis=x.axis(axis, "log_softmax"))

"""Normalisation of rows: RMSNorm (Zhang and Sennrich, 2019) and layer norm (Ba, Kiros and Hinton, 2016)."""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

from typing import Any

import numpy as np

import nitinol.language as tl
from nitinol.array import Output, launch
from nitinol.kernels.tiles import load_row, store_row
from nitinol.language.jit import jit
from nitinol.runtime import get_device

LARGEST_ROW = 1 << 20  # the most values of a tile


@jit
def rms_norm_kernel(
    x, weight, residual, total, out, columns, epsilon,
    BLOCK: tl.constexpr, EVEN: tl.constexpr, ADD: tl.constexpr, PARTS: tl.constexpr = 1,
):  # fmt: skip
    """Program (r, p): part p of PARTS of row r. With ADD the row is x + residual, which `total` keeps."""
    row = tl.program_id(0).to(tl.int64) * columns
    at, value, normal = normal_part(x, weight, residual, row, columns, epsilon, BLOCK, EVEN, ADD, PARTS)
    if ADD:
        store_row(total + row, at, columns, value, EVEN)
    store_row(out + row, at, columns, normal, EVEN)


@jit
def normal_part(
    x, weight, residual, row, columns, epsilon,
    BLOCK: tl.constexpr, EVEN: tl.constexpr, ADD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Places in the row, values and normal form of a program's part. Every part adds up the whole row's squares.

    All loads come before the first use of one: weights behind the sum would wait for memory a second time.
    """
    SIZE: tl.constexpr = BLOCK // PARTS
    inverse = 1.0 / BLOCK if EVEN else 1.0 / columns
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE) if PARTS > 1 else tl.arange(0, SIZE)
    value = load_sum(x, residual, row, at, columns, EVEN, ADD)
    gain = load_row(weight, at, columns, EVEN)
    if PARTS == 1:
        squares = value * value
    else:
        squares = tl.zeros((SIZE,), tl.float32)
        for part in tl.static_range(PARTS):
            other = load_sum(x, residual, row, part * SIZE + tl.arange(0, SIZE), columns, EVEN, ADD)
            squares += other * other
    scale = tl.rsqrt(tl.sum(squares) * inverse + epsilon)
    return at, value, value * scale * gain


@jit
def load_sum(x, residual, row, at, columns, EVEN: tl.constexpr, ADD: tl.constexpr):
    """x, or x + residual, at places of a row."""
    value = load_row(x + row, at, columns, EVEN)
    if ADD:
        value += load_row(residual + row, at, columns, EVEN)
    return value


@jit
def layer_norm_kernel(x, weight, bias, out, columns, epsilon, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """One program per row; the variance is the mean of squared distances from the mean, in a second pass."""
    row = tl.program_id(0).to(tl.int64) * columns
    at = tl.arange(0, BLOCK)
    value = load_row(x + row, at, columns, EVEN)
    mean = tl.sum(value) / columns
    distance = value - mean if EVEN else tl.where(at < columns, value - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(distance * distance) / columns + epsilon)
    normal = distance * scale * load_row(weight, at, columns, EVEN) + load_row(bias, at, columns, EVEN)
    store_row(out + row, at, columns, normal, EVEN)


def rms_norm(x: Any, weight: Any, epsilon: float = 1e-6, residual: Any = None) -> Any:
    """x / sqrt(mean(x ** 2) + epsilon) * weight along the last axis.

    `x` is an Array [..., columns], `weight` [columns] with columns = the last extent of x or a whole part of it: the
    norm is then taken over runs of that many values, such as the heads of a query (QK-norm). With `residual`, of x's
    shape, the result is a pair: the norm of x + residual, and x + residual.
    """
    columns = _columns("rms_norm", x, weight)
    if residual is not None and tuple(residual.shape) != tuple(x.shape):
        raise ValueError(f"rms_norm: residual has shape {tuple(residual.shape)}, expected x's {tuple(x.shape)}")
    result = Output(x.shape, "float32")
    rows = _size(x) // columns
    parts, warps = row_parts(rows, columns)
    arguments = {
        "x": x, "weight": weight, "columns": columns, "epsilon": float(epsilon), "PARTS": parts, "_warps": warps,
        **_block(columns),
    }  # fmt: skip
    grid = (rows, parts)
    if residual is None:
        return launch(rms_norm_kernel, grid, residual=None, total=None, out=result, ADD=False, **arguments)
    total = Output(x.shape, "float32")
    total, normal = launch(rms_norm_kernel, grid, residual=residual, total=total, out=result, ADD=True, **arguments)
    return normal, total


def layer_norm(x: Any, weight: Any, bias: Any, epsilon: float = 1e-5) -> Any:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias along the last axis of x; weight and bias [columns]."""
    columns = _columns("layer_norm", x, weight)
    return launch(
        layer_norm_kernel, (_size(x) // columns,), x=x, weight=weight, bias=bias, out=Output(x.shape, "float32"),
        columns=columns, epsilon=float(epsilon), **_block(columns),
    )  # fmt: skip


def row_parts(rows: int, columns: int) -> tuple[int, int]:
    """Programs that share a row's norm, and their warps (0: the compiler chooses).

    A few rows on CUDA are a matter of how long one program takes: then 512 values of the result are a program's, 2 a
    thread's. That all read the whole row costs nothing. Many rows fill the multiprocessors as they are.
    """
    block = tl.next_power_of_2(columns)
    if get_device().name != "cuda" or rows > 16 or block < 1024:
        return 1, 0
    return min(16, block // 512), 8


def _columns(name: str, x: Any, weight: Any) -> int:
    columns = int(weight.shape[-1])
    if len(weight.shape) != 1 or x.shape[-1] % columns:
        raise ValueError(
            f"{name}: weight has shape {tuple(weight.shape)}, expected one axis that x's last extent {x.shape[-1]} is "
            "a multiple of"
        )
    return columns


def _size(x: Any) -> int:
    return int(np.prod(x.shape, dtype=np.int64))


def _block(columns: int) -> dict[str, Any]:
    if not 0 < columns <= LARGEST_ROW:
        raise ValueError(f"a norm over {columns} values: expected 1 to {LARGEST_ROW}")
    block = tl.next_power_of_2(columns)
    return {"BLOCK": block, "EVEN": block == columns}


def rms_norm_reference(x: np.ndarray, weight: np.ndarray, epsilon: float = 1e-6) -> np.ndarray:
    """The same in float64."""
    runs = x.astype(np.float64).reshape(-1, weight.size)
    result = runs / np.sqrt(np.mean(runs**2, axis=-1, keepdims=True) + epsilon) * weight
    return result.reshape(x.shape)


def layer_norm_reference(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, epsilon: float = 1e-5) -> np.ndarray:
    """The same in float64."""
    wide = x.astype(np.float64)
    distance = wide - wide.mean(axis=-1, keepdims=True)
    return distance / np.sqrt(np.mean(distance**2, axis=-1, keepdims=True) + epsilon) * weight + bias

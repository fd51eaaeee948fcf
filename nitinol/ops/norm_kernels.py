"""RMSNorm and layer norm of rows, each in one program: results in x's dtype, and the statistics of each row in fp32:
scale = 1 / sqrt(variance + epsilon), and the mean.

RMSNorm: y = x scale weight, with mean(x^2) as the variance. Layer norm: y = (x - mean) scale weight + bias.
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
from nitinol.ops.tiles import load_row, store_row


@jit
def norm_kernel(
    x, residual, weight, bias, total, out, means, scales, columns, epsilon,
    LAYER: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One program per row; BLOCK is at least `columns`, with EVEN equal. With a residual, the row is x + residual,
    rounded to x's dtype, which `total` keeps. Of out, means and scales, what is None is not wanted."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    value = load_row(x + row * columns, at, columns, EVEN)
    if residual is not None:
        value = (value + load_row(residual + row * columns, at, columns, EVEN)).to(x.dtype.element_ty)
        store_row(total + row * columns, at, columns, value, EVEN)
        value = value.to(tl.float32)
    distance = value
    if LAYER:
        mean = tl.sum(value) / columns
        distance = value - mean if EVEN else tl.where(at < columns, value - mean, 0.0)
        if means is not None:
            tl.store(means + row, mean)
    scale = tl.rsqrt(tl.sum(distance * distance) / columns + epsilon)
    if scales is not None:
        tl.store(scales + row, scale)
    if out is not None:
        store_row(out + row * columns, at, columns, affine(distance * scale, weight, bias, at, columns, EVEN), EVEN)


@jit
def long_norm_kernel(
    x, residual, weight, bias, total, out, means, scales, columns, epsilon, LAYER: tl.constexpr, BLOCK: tl.constexpr
):
    """The same for rows of any length, BLOCK values at a time. A row that is a sum is read back from `total`."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x += row * columns
    sums = tl.zeros((BLOCK,), tl.float32)
    if residual is not None:
        total += row * columns
        for start in range(0, columns, BLOCK):
            value = load_row(x + start, at, columns - start, False)
            value += load_row(residual + row * columns + start, at, columns - start, False)
            value = value.to(x.dtype.element_ty)
            store_row(total + start, at, columns - start, value, False)
        x = total
    mean = 0.0
    if LAYER:
        for start in range(0, columns, BLOCK):
            sums += load_row(x + start, at, columns - start, False)
        mean = tl.sum(sums) / columns
        if means is not None:
            tl.store(means + row, mean)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        value = load_row(x + start, at, columns - start, False)
        distance = tl.where(at < columns - start, value - mean, 0.0) if LAYER else value
        squares += distance * distance
    scale = tl.rsqrt(tl.sum(squares) / columns + epsilon)
    if scales is not None:
        tl.store(scales + row, scale)
    if out is not None:
        for start in range(0, columns, BLOCK):
            normal = (load_row(x + start, at, columns - start, False) - mean) * scale
            normal = affine(normal, weight, bias, start + at, columns, False)
            store_row(out + row * columns + start, at, columns - start, normal, False)


@jit
def affine(normal, weight, bias, at, columns, EVEN: tl.constexpr):
    """normal * weight + bias; what is None is left out."""
    if weight is not None:
        normal *= load_row(weight, at, columns, EVEN)
    if bias is not None:
        normal += load_row(bias, at, columns, EVEN)
    return normal


def blocks(target: str) -> dict[str, int]:
    """LARGEST: the longest row that is one tile, BLOCK: of longer rows. A CPU keeps a row of 65,536 values and the two
    sums of backward in its second cache (768 KB); on GPUs they are registers, 3 times 16 a thread of 512 (Metal), 3
    times 8 of 1024 (CUDA)."""
    return {
        "cpu": {"LARGEST": 1 << 16, "BLOCK": 4096},
        "metal": {"LARGEST": 1 << 13, "BLOCK": 1024},
        "cuda": {"LARGEST": 1 << 13, "BLOCK": 4096},
    }[target]


def norm_forward(
    target: str, x: Array, weight: Array | None = None, bias: Array | None = None, epsilon: float = 1e-5, *,
    layer: bool, residual: Array | None = None,
) -> tuple[Array, Array | None, Array, Array]:  # fmt: skip
    """y, mean, scale and total: RMSNorm of the rows of x [..., columns], or with `layer` layer norm.

    y has x's shape and dtype (float32, float16, bfloat16); mean (None for RMSNorm) and scale are float32 [rows]; weight
    and bias are [columns] or None, for 1 and 0. With a residual of x's shape the norm is that of total = x + residual,
    which has x's dtype; without, total is x.

    Raises ValueError for shapes that do not fit.
    """
    if residual is not None and tuple(residual.shape) != tuple(x.shape):
        raise ValueError(f"norm: residual has shape {tuple(residual.shape)}, expected x's {tuple(x.shape)}")
    found = launch_rows(target, x, weight, bias, epsilon, layer, residual)
    total, (out, *mean, scale) = (x, found) if residual is None else (found[0], found[1:])
    return out, mean[0] if layer else None, scale, total


def normal_rows(
    target: str, x: Array, weight: Array | None, bias: Array | None, epsilon: float, *, layer: bool,
    residual: Array | None = None,
) -> Any:  # fmt: skip
    """y of `norm_forward` without the statistics; with a residual total and y."""
    return launch_rows(target, x, weight, bias, epsilon, layer, residual, statistics=False)


def row_statistics(target: str, x: Array, epsilon: float, *, layer: bool) -> tuple[Array, Array | None]:
    """scale and mean (None for RMSNorm) of the rows of x, float32 [rows]."""
    found = launch_rows(target, x, None, None, epsilon, layer, None, result=False)
    return (found[1], found[0]) if layer else (found, None)


def launch_rows(
    target: str, x: Array, weight: Array | None, bias: Array | None, epsilon: float, layer: bool,
    residual: Array | None, *, result: bool = True, statistics: bool = True,
) -> Any:  # fmt: skip
    """Of total, y, means and scales, those that are wanted."""
    rows, columns = check(x, weight, bias)
    kernel, constants = kernel_and_blocks(target, columns, norm_kernel, long_norm_kernel)
    like_x, per_row = Output(x.shape, x.dtype), Output((rows,), "float32")
    return launch(
        kernel, (rows,), x=x, residual=residual, weight=weight, bias=bias, total=None if residual is None else like_x,
        out=like_x if result else None, means=per_row if layer and statistics else None,
        scales=per_row if statistics else None, columns=columns, epsilon=float(epsilon), LAYER=layer, **constants,
    )  # fmt: skip


def kernel_and_blocks(target: str, columns: int, kernel: Any, long_kernel: Any) -> tuple[Any, dict[str, Any]]:
    """The kernel for rows that fit a tile or the one for longer ones, and its block size."""
    sizes = blocks(target)
    if columns > sizes["LARGEST"]:
        return long_kernel, {"BLOCK": sizes["BLOCK"]}
    block = tl.next_power_of_2(columns)
    return kernel, {"BLOCK": block, "EVEN": block == columns}


def check(x: Any, weight: Any, bias: Any) -> tuple[int, int]:
    """Rows and columns of x [..., columns]; ValueError unless weight and bias are [columns] or None."""
    if not x.shape or not x.shape[-1]:
        raise ValueError(f"norm of an array of shape {tuple(x.shape)}: expected values along the last axis")
    columns = int(x.shape[-1])
    for name, operand in (("weight", weight), ("bias", bias)):
        if operand is not None and tuple(operand.shape) != (columns,):
            raise ValueError(f"norm: {name} has shape {tuple(operand.shape)}, expected ({columns},), x's last extent")
    return math.prod(x.shape[:-1]), columns


def norm_reference(
    x: np.ndarray, weight: Any = None, bias: Any = None, epsilon: float = 1e-5, *, layer: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y, mean (0 for RMSNorm) and scale in float64."""
    x = x.astype(np.float64)
    mean = x.mean(axis=-1) if layer else np.zeros(x.shape[:-1])
    distance = x - mean[..., None]
    scale = 1 / np.sqrt(np.mean(distance**2, axis=-1) + epsilon)
    normal = distance * scale[..., None] * (1 if weight is None else weight) + (0 if bias is None else bias)
    return normal, mean, scale

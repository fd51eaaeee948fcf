<<<<<<< HEAD
"""Normalisation of rows: RMSNorm (Zhang and Sennrich, 2019) and layer norm (Ba, Kiros and Hinton, 2016)."""
=======
"""RMSNorm (Zhang and Sennrich, 2019) and layer norm (Ba, Kiros and Hinton, 2016) for training: results in x's dtype,
and what the gradients need of each row, in fp32: scale = 1 / sqrt(variance + epsilon), and the mean.

RMSNorm: y = x scale weight, with mean(x^2) as the variance. Layer norm: y = (x - mean) scale weight + bias.
"""
>>>>>>> h-rows

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

<<<<<<< HEAD
=======
import math
>>>>>>> h-rows
from typing import Any

import numpy as np

import nitinol.language as tl
<<<<<<< HEAD
from nitinol.graph.array import Array
from nitinol.graph.launch import Output, launch
from nitinol.graph.operation import Operation
from nitinol.language.jit import jit
from nitinol.ops import elementwise as e
from nitinol.ops.reductions import floats
from nitinol.ops.tiles import load_row, store_row

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
    gain = 1.0 if weight is None else load_row(weight, at, columns, EVEN)
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
    normal = distance * scale
=======
from nitinol.array import Array, Output, launch
from nitinol.kernels.tiles import load_row, store_row
from nitinol.language.jit import jit


@jit
def norm_kernel(
    x, residual, weight, bias, total, out, means, scales, columns, epsilon,
    LAYER: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One program per row; BLOCK is at least `columns`, with EVEN equal. With a residual, the row is x + residual,
    rounded to x's dtype, which `total` keeps."""
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
        tl.store(means + row, mean)
    scale = tl.rsqrt(tl.sum(distance * distance) / columns + epsilon)
    tl.store(scales + row, scale)
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
        tl.store(means + row, mean)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        value = load_row(x + start, at, columns - start, False)
        distance = tl.where(at < columns - start, value - mean, 0.0) if LAYER else value
        squares += distance * distance
    scale = tl.rsqrt(tl.sum(squares) / columns + epsilon)
    tl.store(scales + row, scale)
    for start in range(0, columns, BLOCK):
        normal = (load_row(x + start, at, columns - start, False) - mean) * scale
        normal = affine(normal, weight, bias, start + at, columns, False)
        store_row(out + row * columns + start, at, columns - start, normal, False)


@jit
def affine(normal, weight, bias, at, columns, EVEN: tl.constexpr):
    """normal * weight + bias; what is None is left out."""
>>>>>>> h-rows
    if weight is not None:
        normal *= load_row(weight, at, columns, EVEN)
    if bias is not None:
        normal += load_row(bias, at, columns, EVEN)
<<<<<<< HEAD
    store_row(out + row, at, columns, normal, EVEN)


def _rms_norm_lower(
    target: str, x: Array, weight: Array | None, residual: Array | None, epsilon: float
) -> Array | tuple[Array, Array]:
    if x.dtype == tl.float64:  # the kernel computes in float32
        return _composed_rms_norm(x, weight, residual, epsilon)
    columns = x.shape[-1] if weight is None else weight.shape[0]
    rows = x.size // columns
    parts, warps = row_parts(target, rows, columns)
    arguments = {
        "x": x, "weight": weight, "residual": residual, "out": Output(x.shape, x.dtype), "columns": columns,
        "epsilon": epsilon, "ADD": residual is not None, "PARTS": parts, "_warps": warps, **_block(columns),
    }  # fmt: skip
    if residual is None:
        return launch(rms_norm_kernel, (rows, parts), total=None, **arguments)
    total, normal = launch(rms_norm_kernel, (rows, parts), total=Output(x.shape, x.dtype), **arguments)
    return normal, total


def _composed_rms_norm(x: Array, weight: Array | None, residual: Array | None, epsilon: float) -> Any:
    """In elementwise operations and reductions."""
    total = x if residual is None else x + residual
    runs = total if weight is None else total.reshape(*x.shape[:-1], -1, weight.shape[0])
    scale = e.rsqrt(e.square(runs.astype(_wide(x))).mean(-1, True) + epsilon)
    normal = (runs * scale if weight is None else runs * scale * weight).astype(x.dtype).reshape(x.shape)
    return normal if residual is None else (normal, total)


def _layer_norm_lower(target: str, x: Array, weight: Array | None, bias: Array | None, epsilon: float) -> Array:
    if x.dtype == tl.float64:
        distance = x - x.mean(-1, True)
        normal = distance * e.rsqrt(e.square(distance).mean(-1, True) + epsilon)
        normal = normal if weight is None else normal * weight
        return (normal if bias is None else normal + bias).astype(x.dtype)
    columns = x.shape[-1]
    return launch(
        layer_norm_kernel, (x.size // columns,), x=x, weight=weight, bias=bias, out=Output(x.shape, x.dtype),
        columns=columns, epsilon=epsilon, **_block(columns),
    )  # fmt: skip


def row_parts(target: str, rows: int, columns: int) -> tuple[int, int]:
    """Programs that share a row's norm, and their warps (0: the compiler chooses).

    A few rows on CUDA are a matter of how long one program takes: then 512 values of the result are a program's, 2 a
    thread's. That all read the whole row costs nothing. Many rows fill the multiprocessors as they are.
    """
    block = tl.next_power_of_2(columns)
    if target != "cuda" or rows > 16 or block < 1024:
        return 1, 0
    return min(16, block // 512), 8


def _block(columns: int) -> dict[str, Any]:
    block = tl.next_power_of_2(columns)
    return {"BLOCK": block, "EVEN": block == columns}


def _wide(x: Array) -> Any:
    return tl.float64 if x.dtype == tl.float64 else tl.float32


# -------------------------------------------------------------------------------------------------- the operations


def _rms_norm_rule(x: Array, weight: Array | None, residual: Array | None, epsilon: float) -> Any:
    if weight is not None and (weight.ndim != 1 or not weight.size or x.shape[-1:] == () or x.shape[-1] % weight.size):
        raise ValueError(
            f"rms_norm: weight has shape {weight.shape}, expected one axis that the last extent of x's shape {x.shape} "
            "is a multiple of"
        )
    _check_columns(x.shape[-1] if weight is None else weight.size)
    if residual is None:
        return x.shape, x.dtype
    if residual.shape != x.shape:
        raise ValueError(f"rms_norm: residual has shape {residual.shape}, expected x's {x.shape}")
    return [(x.shape, x.dtype)] * 2


def _layer_norm_rule(x: Array, weight: Array | None, bias: Array | None, epsilon: float) -> Any:
    for name, operand in (("weight", weight), ("bias", bias)):
        if operand is not None and operand.shape != x.shape[-1:]:
            raise ValueError(f"layer_norm: {name} has shape {operand.shape}, expected the last axis of x's {x.shape}")
    _check_columns(x.shape[-1])
    return x.shape, x.dtype


def _check_columns(columns: int) -> None:
    if not 0 < columns <= LARGEST_ROW:
        raise ValueError(f"a norm over {columns} values: expected 1 to {LARGEST_ROW}")


def _rms_norm_vjp(g: Any, out: Any, x: Array, weight: Array | None, residual: Array | None, epsilon: float) -> Any:
    """With n = x * scale, scale = rsqrt(mean(x^2) + epsilon): dx = scale * (gw - n * mean(gw * n)), gw = g * weight."""
    g, g_total = g if residual is not None else (g, None)
    total = (x if residual is None else x + residual).astype(_wide(x))
    columns = x.shape[-1] if weight is None else weight.shape[0]
    runs, gradient = total.reshape(-1, columns), g.astype(_wide(x)).reshape(-1, columns)
    scale = e.rsqrt(e.square(runs).mean(-1, True) + epsilon)
    normal = runs * scale
    weighted = gradient if weight is None else gradient * weight
    dx = (scale * (weighted - normal * (weighted * normal).mean(-1, True))).reshape(x.shape).astype(x.dtype)
    if g_total is not None:
        dx = dx + g_total
    d_weight = None if weight is None else (gradient * normal).sum(0).astype(weight.dtype)
    return dx, d_weight, None if residual is None else dx


def _layer_norm_vjp(
    g: Array, out: Array, x: Array, weight: Array | None, bias: Array | None, epsilon: float
) -> tuple[Any, ...]:
    """With n = (x - mean) * scale: dx = scale * (gw - mean(gw) - n * mean(gw * n)), gw = g * weight."""
    wide, gradient = x.astype(_wide(x)).reshape(-1, x.shape[-1]), g.astype(_wide(x)).reshape(-1, x.shape[-1])
    distance = wide - wide.mean(-1, True)
    scale = e.rsqrt(e.square(distance).mean(-1, True) + epsilon)
    normal = distance * scale
    weighted = gradient if weight is None else gradient * weight
    dx = scale * (weighted - weighted.mean(-1, True) - normal * (weighted * normal).mean(-1, True))
    return (
        dx.reshape(x.shape).astype(x.dtype),
        None if weight is None else (gradient * normal).sum(0).astype(weight.dtype),
        None if bias is None else gradient.sum(0).astype(bias.dtype),
    )


def rms_norm_reference(
    x: np.ndarray, weight: np.ndarray | None = None, residual: np.ndarray | None = None, epsilon: float = 1e-6
) -> Any:
    """The same in float64."""
    total = x.astype(np.float64) if residual is None else x.astype(np.float64) + residual
    runs = total.reshape(-1, total.shape[-1] if weight is None else weight.size)
    result = runs / np.sqrt(np.mean(runs**2, axis=-1, keepdims=True) + epsilon)
    result = (result if weight is None else result * weight).reshape(x.shape)
    return result if residual is None else (result, total)


def layer_norm_reference(
    x: np.ndarray, weight: np.ndarray | None = None, bias: np.ndarray | None = None, epsilon: float = 1e-5
) -> np.ndarray:
    """The same in float64."""
    wide = x.astype(np.float64)
    distance = wide - wide.mean(axis=-1, keepdims=True)
    result = distance / np.sqrt(np.mean(distance**2, axis=-1, keepdims=True) + epsilon)
    result = result if weight is None else result * weight
    return result if bias is None else result + bias


RMS_NORM = Operation(
    "rms_norm", rule=_rms_norm_rule, lower=_rms_norm_lower, reference=rms_norm_reference, vjp=_rms_norm_vjp
)
LAYER_NORM = Operation(
    "layer_norm", rule=_layer_norm_rule, lower=_layer_norm_lower, reference=layer_norm_reference, vjp=_layer_norm_vjp
)


def rms_norm(x: Any, weight: Any = None, epsilon: float = 1e-6, residual: Any = None) -> Any:
    """x / sqrt(mean(x ** 2) + epsilon) * weight along the last axis (Zhang and Sennrich, 2019), of x's type, computed
    in fp32 or wider.

    `x` is [..., columns], `weight` [columns] with columns = the last extent of x or a whole part of it: the norm is
    then taken over runs of that many values, such as the heads of a query (QK-norm). With `residual`, of x's shape,
    the result is a pair: the norm of x + residual, and x + residual.
    """
    return RMS_NORM(floats(x), weight, residual, epsilon=float(epsilon))


def layer_norm(x: Any, weight: Any = None, bias: Any = None, epsilon: float = 1e-5) -> Array:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias along the last axis of x (Ba, Kiros and Hinton, 2016), of
    x's type, computed in fp32 or wider; weight and bias [columns]."""
    return LAYER_NORM(floats(x), weight, bias, epsilon=float(epsilon))
=======
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
    rows, columns = check(x, weight, bias)
    if residual is not None and tuple(residual.shape) != tuple(x.shape):
        raise ValueError(f"norm: residual has shape {tuple(residual.shape)}, expected x's {tuple(x.shape)}")
    like_x, per_row = Output(x.shape, x.dtype), Output((rows,), "float32")
    kernel, constants = kernel_and_blocks(target, columns, norm_kernel, long_norm_kernel)
    found = launch(
        kernel, (rows,), x=x, residual=residual, weight=weight, bias=bias,
        total=None if residual is None else like_x, out=like_x, means=per_row if layer else None, scales=per_row,
        columns=columns, epsilon=float(epsilon), LAYER=layer, **constants,
    )  # fmt: skip
    total, (out, *mean, scale) = (x, found) if residual is None else (found[0], found[1:])
    return out, mean[0] if layer else None, scale, total


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
>>>>>>> h-rows

"""Normalisation of rows: RMSNorm (Zhang and Sennrich, 2019) and layer norm (Ba, Kiros and Hinton, 2016)."""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

from typing import Any

import numpy as np

import nitinol.language as tl
from nitinol.graph.array import Array
from nitinol.graph.launch import Output, launch
from nitinol.graph.operation import Operation
from nitinol.language.jit import jit
from nitinol.ops.norm_backward import norm_gradient, normal_form
from nitinol.ops.norm_kernels import normal_rows
from nitinol.ops.reductions import floats
from nitinol.ops.tiles import load_row, store_row

LARGEST_ROW = 1 << 20  # values of a row
LARGEST_TILE = 1 << 16  # values that a program keeps; longer rows are read block by block


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


def _rms_norm_lower(
    target: str, x: Array, weight: Array | None, residual: Array | None, epsilon: float
) -> Array | tuple[Array, Array]:
    if x.dtype == tl.float64:  # the kernel computes in float32
        return _composed_rms_norm(x, weight, residual, epsilon)
    shape = x.shape
    columns = x.shape[-1] if weight is None else weight.shape[0]
    rows = x.size // columns
    if columns > LARGEST_TILE:
        x, residual = (a if a is None else a.reshape(rows, columns) for a in (x, residual))
        found = normal_rows(target, x, weight, None, epsilon, layer=False, residual=residual)
        return found.reshape(shape) if residual is None else (found[1].reshape(shape), found[0].reshape(shape))
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
    normal, _ = normal_form(runs, False, epsilon)
    normal = (normal if weight is None else normal * weight).astype(x.dtype).reshape(x.shape)
    return normal if residual is None else (normal, total)


def _layer_norm_lower(target: str, x: Array, weight: Array | None, bias: Array | None, epsilon: float) -> Array:
    if x.dtype == tl.float64:
        normal, _ = normal_form(x, True, epsilon)
        normal = normal if weight is None else normal * weight
        return (normal if bias is None else normal + bias).astype(x.dtype)
    return normal_rows(target, x, weight, bias, epsilon, layer=True)


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
    g, d_total = g if residual is not None else (g, None)
    rows = (-1, x.shape[-1] if weight is None else weight.shape[0])
    d_x, d_weight, _ = norm_gradient(
        g.reshape(*rows), (x if residual is None else out[1]).reshape(*rows), weight,
        None if d_total is None else d_total.reshape(*rows), layer=False, bias=False, epsilon=epsilon,
    )  # fmt: skip
    d_x = d_x.reshape(x.shape)
    return d_x, d_weight, None if residual is None else d_x


def _layer_norm_vjp(
    g: Array, out: Array, x: Array, weight: Array | None, bias: Array | None, epsilon: float
) -> tuple[Any, ...]:
    d_x, d_weight, d_bias = norm_gradient(g, x, weight, None, layer=True, bias=bias is not None, epsilon=epsilon)
    return d_x, d_weight, d_bias if d_bias is None or bias is None else d_bias.astype(bias.dtype)


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

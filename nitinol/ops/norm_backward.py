"""Gradients of RMSNorm and layer norm: those of x, and of weight and bias, from one pass over the rows.

Of a row x with n = (x - mean) scale (RMSNorm: x scale), y = n weight + bias and g = d_y weight:

    d_x = scale (g - mean(g) - n mean(g n)), without mean(g) for RMSNorm
    d_weight = sum over rows of d_y n,  d_bias = sum over rows of d_y

The sums over rows are taken in two steps, so that they do not depend on which program comes first: each adds up rows of
its own, a second kernel adds the programs in order. Rows that fit a tile are read once. Longer rows are read block by
block: twice for d_x, and a third time by programs that sum up columns.
"""

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
from nitinol.ops import elementwise as e
from nitinol.ops.norm_kernels import affine, blocks, check, kernel_and_blocks, norm_reference, row_statistics
from nitinol.ops.tiles import load_row, store_row


@jit
def norm_gradient_kernel(
    d_y, x, weight, means, scales, d_total, d_x, d_weights, d_biases, rows, columns, run, epsilon,
    LAYER: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Program p: rows run * p .. run * (p + 1) - 1. Their sums go to row p of d_weights and d_biases, fp32 [programs,
    columns]; d_total, if any, is added to d_x. Arrays that are None are not wanted; without scales the statistics of a
    row are computed here, from values that are needed anyway."""
    at = tl.arange(0, BLOCK)
    gain = load_row(weight, at, columns, EVEN) if weight is not None else 1.0
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    bias_sum = tl.zeros((BLOCK,), tl.float32)
    program = tl.program_id(0).to(tl.int64)
    for row in range(program * run, tl.minimum((program + 1) * run, rows)):
        normal = load_row(x + row * columns, at, columns, EVEN)
        slope = load_row(d_y + row * columns, at, columns, EVEN)
        if LAYER:  # values past the end, which are -mean * scale, meet a slope of 0
            normal = normal - (tl.sum(normal) / columns if means is None else tl.load(means + row))
        if scales is None:
            distance = normal if EVEN or not LAYER else tl.where(at < columns, normal, 0.0)
            scale = tl.rsqrt(tl.sum(distance * distance) / columns + epsilon)
        else:
            scale = tl.load(scales + row)
        normal *= scale
        g = slope * gain
        along = tl.sum(g * normal) / columns
        gradient = g - normal * along
        if LAYER:
            gradient -= tl.sum(g) / columns
        gradient *= scale
        if d_total is not None:
            gradient += load_row(d_total + row * columns, at, columns, EVEN)
        store_row(d_x + row * columns, at, columns, gradient, EVEN)
        if d_weights is not None:
            weight_sum += slope * normal
        if d_biases is not None:
            bias_sum += slope
    if d_weights is not None:
        store_row(d_weights + program * columns, at, columns, weight_sum, EVEN)
    if d_biases is not None:
        store_row(d_biases + program * columns, at, columns, bias_sum, EVEN)


@jit
def long_norm_gradient_kernel(
    d_y, x, weight, means, scales, d_total, d_x, columns, LAYER: tl.constexpr, BLOCK: tl.constexpr
):
    """d_x of one row of any length, BLOCK values at a time."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    scale = tl.load(scales + row)
    mean = tl.load(means + row) if LAYER else 0.0
    along = tl.zeros((BLOCK,), tl.float32)
    level = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        normal, g = normal_and_slope(d_y, x, weight, row, start + at, columns, mean, scale)
        along += g * normal
        level += g
    mean_along = tl.sum(along) / columns
    mean_level = tl.sum(level) / columns if LAYER else 0.0
    for start in range(0, columns, BLOCK):
        normal, g = normal_and_slope(d_y, x, weight, row, start + at, columns, mean, scale)
        gradient = (g - mean_level - normal * mean_along) * scale
        if d_total is not None:
            gradient += load_row(d_total + row * columns, start + at, columns, False)
        store_row(d_x + row * columns, start + at, columns, gradient, False)


@jit
def normal_and_slope(d_y, x, weight, row, at, columns, mean, scale):
    """n, and d_y weight, at places of a row; the second is 0 past the end."""
    normal = (load_row(x + row * columns, at, columns, False) - mean) * scale
    return normal, affine(load_row(d_y + row * columns, at, columns, False), weight, None, at, columns, False)


@jit
def row_sums_kernel(
    d_y, x, means, scales, d_weights, d_biases, rows, columns, run, LAYER: tl.constexpr, BLOCK: tl.constexpr
):
    """Program (c, p): a block of columns of what norm_gradient_kernel's program p sums up."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    program = tl.program_id(1).to(tl.int64)
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    bias_sum = tl.zeros((BLOCK,), tl.float32)
    for row in range(program * run, tl.minimum((program + 1) * run, rows)):
        mean = tl.load(means + row) if LAYER else 0.0
        normal, slope = normal_and_slope(d_y, x, None, row, at, columns, mean, tl.load(scales + row))
        weight_sum += slope * normal
        bias_sum += slope
    if d_weights is not None:
        store_row(d_weights + program * columns, at, columns, weight_sum, False)
    if d_biases is not None:
        store_row(d_biases + program * columns, at, columns, bias_sum, False)


@jit
def add_programs_kernel(parts, out, programs, columns, BLOCK: tl.constexpr):
    """Program c: a block of out [columns] = the sum of parts [programs, columns], in order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for program in range(programs):
        total += load_row(parts + program.to(tl.int64) * columns, at, columns, False)
    store_row(out, at, columns, total, False)


def programs(target: str) -> int:
    """Programs that sum up rows. Fixed, so that results do not depend on the machine; sums of all of them are written
    and read once more: with 16 and 4096 rows, 1/256 of the rows' bytes. CUDA: two a multiprocessor of an H200."""
    return {"cpu": 16, "metal": 64, "cuda": 264}[target]


def norm_backward(
    target: str, d_y: Array, x: Array, scale: Array | None, mean: Array | None = None, weight: Array | None = None, *,
    layer: bool, bias: bool = False, d_total: Array | None = None, epsilon: float = 1e-5,
) -> tuple[Array, Array | None, Array | None]:  # fmt: skip
    """d_x, d_weight, d_bias of a norm of x [..., columns] (forward's `total`), with the mean and scale of its rows;
    without these they are computed again, with epsilon.

    d_x has x's dtype, d_weight (None without weight) and d_bias (None unless `bias`) [columns] the weight's, or x's
    without one. d_total, of x's shape: what x, a sum with a residual, has from other users; it is added to d_x.
    """
    rows, columns = check(x, weight, None)
    for name, operand in (("d_y", d_y), ("d_total", d_total)):
        if operand is not None and tuple(operand.shape) != tuple(x.shape):
            raise ValueError(f"norm: {name} has shape {tuple(operand.shape)}, expected x's {tuple(x.shape)}")
    if layer and scale is not None and mean is None:
        raise ValueError("norm: layer norm's gradient needs the mean of each row that forward gave, found None")
    kernel, constants = kernel_and_blocks(target, columns, norm_gradient_kernel, long_norm_gradient_kernel)
    if scale is None and kernel is long_norm_gradient_kernel:
        scale, mean = row_statistics(target, x, epsilon, layer=layer)
    run = max(1, tl.cdiv(rows, programs(target)))
    count = tl.cdiv(rows, run)
    part = Output((count, columns), "float32")
    common = {"d_y": d_y, "x": x, "means": mean if layer else None, "scales": scale, "columns": columns,
              "LAYER": layer}  # fmt: skip
    sums = {"d_weights": None if weight is None else part, "d_biases": part if bias else None, "rows": rows, "run": run}
    to_x = {"weight": weight, "d_total": d_total, "d_x": Output(x.shape, x.dtype)}
    wanted = [name for name in ("d_weights", "d_biases") if sums[name] is not None]
    if kernel is norm_gradient_kernel:
        found = launch(kernel, (count,), epsilon=float(epsilon), **to_x, **sums, **common, **constants)
        d_x, *parts = found if isinstance(found, tuple) else (found,)
    else:
        d_x = launch(kernel, (rows,), **to_x, **common, **constants)
        grid = (tl.cdiv(columns, constants["BLOCK"]), count)
        found = launch(row_sums_kernel, grid, **sums, **common, **constants) if wanted else ()
        parts = found if isinstance(found, tuple) else (found,)
    dtype = x.dtype if weight is None else weight.dtype
    block = min(blocks(target)["BLOCK"], tl.next_power_of_2(columns), 256)
    totals = {
        name: launch(add_programs_kernel, (tl.cdiv(columns, block),), parts=part, out=Output((columns,), dtype),
                     programs=count, columns=columns, BLOCK=block)
        for name, part in zip(wanted, parts)
    }  # fmt: skip
    return d_x, totals.get("d_weights"), totals.get("d_biases")


def norm_gradient_reference(
    d_y: np.ndarray, x: np.ndarray, weight: Any = None, epsilon: float = 1e-5, *, layer: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """d_x, d_weight and d_bias in float64."""
    normal, _, scale = norm_reference(x, None, None, epsilon, layer=layer)
    d_y = d_y.astype(np.float64)
    g = d_y * (1 if weight is None else weight)
    d_x = g - normal * np.mean(g * normal, axis=-1, keepdims=True)
    if layer:
        d_x -= g.mean(axis=-1, keepdims=True)
    axes = tuple(range(x.ndim - 1))
    return d_x * scale[..., None], (d_y * normal).sum(axis=axes), d_y.sum(axis=axes)


# --------------------------------------------------------------------------------------------------- the operation


def _lower(
    target: str, d_y: Array, x: Array, weight: Array | None, d_total: Array | None, layer: bool, bias: bool,
    epsilon: float,
) -> Any:  # fmt: skip
    found = norm_backward(
        target, d_y, x, None, None, weight, layer=layer, bias=bias, d_total=d_total, epsilon=epsilon
    )
    return [gradient for gradient in found if gradient is not None]


def _rule(
    d_y: Array, x: Array, weight: Array | None, d_total: Array | None, layer: bool, bias: bool, epsilon: float
) -> list[Any]:
    sums = x.shape[-1:], x.dtype if weight is None else weight.dtype
    return [(x.shape, x.dtype), *[sums] * ((weight is not None) + bias)]


def _vjp(
    g: Any, results: Any, d_y: Array, x: Array, weight: Array | None, d_total: Array | None, layer: bool, bias: bool,
    epsilon: float,
) -> tuple[Any, ...]:  # fmt: skip
    """Of sum(h d_x) + sum(k d_weight) + sum(l d_bias), in elementwise operations and reductions, of float32.

    With c = x - mean (RMSNorm: x) and s = 1 / sqrt(mean(c^2) + epsilon), n = c s, and v = d_y weight, the first is N s
    (mean(h v) - mean(h) mean(v) - mean(h n) mean(v n)), whose derivative by c follows from that of s, -s^2 n / N.
    """
    given, *sums = g if isinstance(g, tuple) else (g,)
    k = sums[0] if weight is not None else None
    shift = sums[-1] if bias else None
    normal, scale = normal_form(x, layer, epsilon)
    slope, h = d_y.astype(normal.dtype), given.astype(normal.dtype)
    v = slope if weight is None else slope * weight
    along_h, along_v = (h * normal).mean(-1, True), (v * normal).mean(-1, True)
    to_v = scale * (centred(h, layer) - normal * along_h)
    level = (h * centred(v, layer)).mean(-1, True)
    to_x = normal * (3.0 * along_h * along_v - level) - h * along_v - v * along_h
    to_x = centred(to_x * scale * scale, layer)
    to_slope = to_v if weight is None else to_v * weight
    if k is not None:
        by_normal = slope * k
        to_x = to_x + scale * (centred(by_normal, layer) - normal * (by_normal * normal).mean(-1, True))
        to_slope = to_slope + normal * k
    if shift is not None:
        to_slope = to_slope + shift
    axes = tuple(range(x.ndim - 1))
    return (
        to_slope.astype(d_y.dtype),
        to_x.astype(x.dtype),
        None if weight is None else (slope * to_v).sum(axes).astype(weight.dtype),
        None if d_total is None else given,
    )


NORM_GRADIENT = Operation("norm_gradient", rule=_rule, lower=_lower, vjp=_vjp)


def norm_gradient(
    d_y: Array, x: Array, weight: Array | None, d_total: Array | None, *, layer: bool, bias: bool, epsilon: float
) -> tuple[Array, Array | None, Array | None]:
    """d_x, d_weight and d_bias, see norm_backward, of arrays of any float type."""
    if tl.float64 in [a.dtype for a in (d_y, x, weight) if a is not None]:  # the kernels compute in float32
        return _composed(d_y, x, weight, d_total, layer, bias, epsilon)
    found = NORM_GRADIENT(d_y, x, weight, d_total, layer=layer, bias=bias, epsilon=epsilon)
    d_x, *sums = found if isinstance(found, tuple) else (found,)
    return d_x, sums[0] if weight is not None else None, sums[-1] if bias else None


def _composed(
    d_y: Array, x: Array, weight: Array | None, d_total: Array | None, layer: bool, bias: bool, epsilon: float
) -> tuple[Array, Array | None, Array | None]:
    normal, scale = normal_form(x, layer, epsilon)
    g = d_y if weight is None else d_y * weight
    d_x = (scale * (centred(g, layer) - normal * (g * normal).mean(-1, True))).astype(x.dtype)
    axes = tuple(range(x.ndim - 1))
    return (
        d_x if d_total is None else d_x + d_total,
        None if weight is None else (d_y * normal).sum(axes).astype(weight.dtype),
        d_y.sum(axes).astype(x.dtype if weight is None else weight.dtype) if bias else None,
    )


def normal_form(x: Array, layer: bool, epsilon: float) -> tuple[Array, Array]:
    """(x - mean) scale, for RMSNorm x scale, and scale [..., 1], in elementwise operations, in float32 or float64."""
    distance = centred(x if x.dtype == tl.float64 else x.astype("float32"), layer)
    scale = e.rsqrt(e.square(distance).mean(-1, True) + epsilon)
    return distance * scale, scale


def centred(x: Array, layer: bool) -> Array:
    """x less the mean of its rows, for layer norm."""
    return x - x.mean(-1, True) if layer else x

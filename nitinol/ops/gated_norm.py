"""RMSNorm with a gate, behind the gated delta rule (Yang, Kautz and Hatamizadeh, 2024; Qwen3-Next):

    y = n weight silu(gate),   n = x / sqrt(mean(x ** 2) + epsilon),   silu(z) = z sigmoid(z)

along the last axis, which is a head: rows are short and many, so a program has several.
"""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

import math
from typing import Any

import numpy as np

import nitinol.language as tl
from nitinol.graph.array import Array
from nitinol.graph.launch import Output
from nitinol.graph.operation import Operation
from nitinol.language.jit import jit
from nitinol.ops import elementwise as e
from nitinol.ops.arguments import launch_on
from nitinol.ops.epilogue import silu
from nitinol.ops.reductions import floats

LARGEST_ROW = 1 << 14  # values that a program keeps as one tile, several times in the backward pass


@jit
def load_block(pointer, row, rows, column, columns):
    """Rows and columns of a matrix [rows, columns] in fp32, zeros outside."""
    at = row[:, None].to(tl.int64) * columns + column[None, :]
    return tl.load(pointer + at, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0).to(tl.float32)


@jit
def store_block(pointer, row, rows, column, columns, value):
    """The counterpart of `load_block`."""
    at = row[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(pointer + at, value, mask=(row < rows)[:, None] & (column < columns)[None, :])


@jit(do_not_specialize=["rows"])
def gated_norm_kernel(
    x, gate, weight, out, rows, columns, epsilon, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Program r: BLOCK_ROWS rows; BLOCK is at least `columns`."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK)
    value = load_block(x, row, rows, column, columns)
    opened = silu(load_block(gate, row, rows, column, columns))
    factor = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / columns + epsilon)
    store_block(out, row, rows, column, columns, value * scale[:, None] * factor[None, :] * opened)


@jit(do_not_specialize=["rows"])
def gated_norm_gradient_kernel(
    x, gate, weight, d_out, d_x, d_gate, sums, rows, columns, epsilon,
    BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program p: part p of the rows, BLOCK_ROWS at a time; its share of the weight's gradient in sums [parts, columns].

    With n_bar = y_bar weight silu(gate) and r = 1 / sqrt(mean(x ** 2) + epsilon): x_bar = r (n_bar - n mean(n n_bar)).
    """
    part = tl.program_id(0)
    share = tl.cdiv(tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0)) * BLOCK_ROWS
    column = tl.arange(0, BLOCK)
    factor = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK,), tl.float32)
    for first in range(part * share, tl.minimum((part + 1) * share, rows), BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        value = load_block(x, row, rows, column, columns)
        door = load_block(gate, row, rows, column, columns)
        d_result = load_block(d_out, row, rows, column, columns)
        scale = tl.rsqrt(tl.sum(value * value, axis=1) / columns + epsilon)
        normal = value * scale[:, None]
        sigmoid = tl.sigmoid(door)
        d_weight += tl.sum(d_result * normal * (door * sigmoid), axis=0)
        d_weighted = d_result * factor[None, :]
        d_door = d_weighted * normal * (sigmoid * (1.0 + door * (1.0 - sigmoid)))
        store_block(d_gate, row, rows, column, columns, d_door)
        d_normal = d_weighted * (door * sigmoid)
        along = tl.sum(d_normal * normal, axis=1) / columns
        store_block(d_x, row, rows, column, columns, scale[:, None] * (d_normal - normal * along[:, None]))
    tl.store(sums + part.to(tl.int64) * columns + column, d_weight, mask=column < columns)


@jit
def add_parts_kernel(sums, total, parts, columns, BLOCK: tl.constexpr):
    """Program c: BLOCK columns of sums [parts, columns] added over the parts, in their order."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    result = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        result += tl.load(sums + part.to(tl.int64) * columns + column, mask=column < columns, other=0.0)
    tl.store(total + column, result, mask=column < columns)


def blocks(target: str, columns: int) -> dict[str, int]:
    """Rows of a program, and into how many parts the rows are split for the weight's gradient."""
    values, parts = {"cpu": (1024, 16), "metal": (1024, 64), "cuda": (2048, 264)}[target]
    block = tl.next_power_of_2(columns)
    return {"BLOCK": block, "BLOCK_ROWS": max(1, values // block), "parts": parts}


def gated_norm_forward(target: str, x: Any, gate: Any, weight: Any, epsilon: float = 1e-6) -> Any:
    """x / sqrt(mean(x ** 2) + epsilon) * weight * silu(gate) along the last axis, of x's shape and dtype.

    x and gate [..., columns] and weight [columns], each float32, float16 or bfloat16; ValueError for other shapes.
    """
    problem = describe("gated_norm_forward", target, x, gate, weight, epsilon)
    (out,) = launch_on(problem, gated_norm_kernel, (problem["blocks"],), {"out": Output(x.shape, x.dtype)})
    return out


def gated_norm_backward(
    target: str, d_out: Any, x: Any, gate: Any, weight: Any, epsilon: float = 1e-6
) -> tuple[Any, Any, Any]:  # fmt: skip
    """The gradients by x, gate and weight, in their dtypes, from d_out, that by the result."""
    problem = describe("gated_norm_backward", target, x, gate, weight, epsilon)
    if tuple(d_out.shape) != tuple(x.shape):
        raise ValueError(f"gated_norm_backward: d_out has shape {tuple(d_out.shape)}, expected x's {tuple(x.shape)}")
    parts, columns = min(problem["parts"], problem["blocks"]), problem["columns"]
    d_x, d_gate, sums = launch_on(
        problem, gated_norm_gradient_kernel, (parts,),
        {"d_x": Output(x.shape, x.dtype), "d_gate": Output(gate.shape, gate.dtype),
         "sums": Output((parts, columns), "float32")}, d_out=d_out,
    )  # fmt: skip
    block = min(128, problem["BLOCK"])
    (d_weight,) = launch_on(
        problem, add_parts_kernel, (tl.cdiv(columns, block),), {"total": Output(weight.shape, weight.dtype)}, sums=sums,
        parts=parts, BLOCK=block,
    )  # fmt: skip
    return d_x, d_gate, d_weight


def describe(name: str, target: str, x: Any, gate: Any, weight: Any, epsilon: float) -> dict[str, Any]:
    """What the kernels take of these arguments, by the names of their parameters, and the blocks of rows."""
    columns = check(name, x, gate, weight)
    rows = math.prod(x.shape[:-1])
    constants = blocks(target, columns)
    return constants | {
        "x": x, "gate": gate, "weight": weight, "epsilon": float(epsilon), "rows": rows, "columns": columns,
        "blocks": tl.cdiv(rows, constants["BLOCK_ROWS"]),
    }  # fmt: skip


def check(name: str, x: Any, gate: Any, weight: Any) -> int:
    """The columns; ValueError for shapes that do not fit."""
    columns = x.shape[-1] if len(x.shape) else 0
    if not 0 < columns <= LARGEST_ROW or 0 in x.shape:
        raise ValueError(
            f"{name}: x has shape {tuple(x.shape)}, expected [..., columns] with 1 to {LARGEST_ROW} columns and no "
            "extent of 0"
        )
    for what, found, expected in (("gate", gate, tuple(x.shape)), ("weight", weight, (columns,))):
        if tuple(found.shape) != expected:
            raise ValueError(f"{name}: {what} has shape {tuple(found.shape)}, expected {expected}")
    return columns


def gated_norm_reference(x: np.ndarray, gate: np.ndarray, weight: np.ndarray, epsilon: float = 1e-6) -> np.ndarray:
    """The same in float64."""
    wide, door = x.astype(np.float64), gate.astype(np.float64)
    normal = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + epsilon)
    return normal * weight * door / (1 + np.exp(-door))


def _rule(x: Array, gate: Array, weight: Array, epsilon: float) -> Any:
    check("gated_norm", x, gate, weight)
    return x.shape, x.dtype


def _vjp(g: Array, out: Array, x: Array, gate: Array, weight: Array, epsilon: float) -> Any:
    return GATED_NORM_GRADIENTS(g, x, gate, weight, epsilon=epsilon)


GATED_NORM = Operation(
    "gated_norm", rule=_rule, lower=gated_norm_forward, reference=gated_norm_reference, vjp=_vjp
)
GATED_NORM_GRADIENTS = Operation(
    "gated_norm_gradients", lower=gated_norm_backward, vjp="a second derivative needs float64 operands",
    rule=lambda d_out, *operands, epsilon: [(operand.shape, operand.dtype) for operand in operands],
)  # fmt: skip


def gated_norm(x: Any, gate: Any, weight: Any, epsilon: float = 1e-6) -> Array:
    """x / sqrt(mean(x ** 2) + epsilon) * weight * silu(gate) along the last axis, of x's shape and type.

    x and gate [..., columns] and weight [columns], float16, bfloat16 or float32, computed in float32; with float64
    operands composed of elementwise operations. ValueError for other shapes.
    """
    x, gate, weight = floats(x), floats(gate), floats(weight)
    if tl.float64 not in (x.dtype, gate.dtype, weight.dtype):
        return GATED_NORM(x, gate, weight, epsilon=float(epsilon))
    check("gated_norm", x, gate, weight)
    return (x * e.rsqrt(e.square(x).mean(-1, True) + epsilon) * weight * e.silu(gate)).astype(x.dtype)

"""The gradients of low-rank adapters, and of the norm in front of them; the formulas stand in lora.py."""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

import nitinol.language as tl
from nitinol.graph.array import Array
from nitinol.graph.launch import Output, Strided, launch
from nitinol.language.jit import jit
from nitinol.ops.lora import Lora, extents, normal_reference
from nitinol.ops.matmul_kernels import matmul_kernel, multiply
from nitinol.ops.tiles import load_row, store_row
from nitinol.ops.weight_products import column_products, format_of, is_float, weight_arguments

LARGEST_ROW = 1 << 16  # values that the norm's gradient keeps as one tile


class LoraGradients(NamedTuple):
    """Of x, A, B and gain (None without a norm), each of its operand's shape and type, and of W if asked for."""

    x: Any
    down: Any
    up: Any
    gain: Any = None
    weights: Any = None


@jit
def ranks_kernel(
    dy, up, ranks, tokens, rows, rank, scale, TOKENS: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr
):
    """Program t: ranks [tokens, rank] = scale * dy @ up."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    lane = tl.arange(0, RANK)
    source = dy + tl.minimum(token, tokens - 1).to(tl.int64)[:, None] * rows
    total = tl.zeros((TOKENS, RANK), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        left = tl.load(source + row[None, :], mask=(row < rows)[None, :], other=0.0)
        inside = (row < rows)[:, None] & (lane < rank)[None, :]
        total = multiply(left, tl.load(up + row[:, None] * rank + lane[None, :], mask=inside, other=0.0), total)
    inside = (token < tokens)[:, None] & (lane < rank)[None, :]
    tl.store(ranks + token[:, None] * rank + lane[None, :], total * scale, mask=inside)


@jit
def input_gradient_kernel(
    dy, weights, ranks, down, out, tokens, rows, columns, row_bytes, rank,
    FORMAT: tl.constexpr, BLOCKS: tl.constexpr, VALUES: tl.constexpr, EVEN: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Program (k, t): VALUES columns of out [tokens, columns] = dy @ weights + ranks @ down."""
    run = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    source = tl.minimum(token, tokens - 1)
    total = column_products(
        dy, source, token < tokens, weights, 0, rows, run, columns, row_bytes, TOKENS, ROWS, FORMAT, BLOCKS, VALUES,
        EVEN,
    )  # fmt: skip
    column = run * VALUES + tl.arange(0, VALUES)
    lane = tl.arange(0, RANK)
    left = tl.load(ranks + source[:, None] * rank + lane[None, :], mask=(lane < rank)[None, :], other=0.0)
    inside = (lane < rank)[:, None] & (column < columns)[None, :]
    right = tl.load(down + lane[:, None] * columns + column[None, :], mask=inside, other=0.0).to(tl.float32)
    total = tl.dot(left, right, total)
    at = token[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(out + at, total, mask=(token < tokens)[:, None] & (column < columns)[None, :])


@jit
def adapter_gradients_kernel(
    x, gain, inverse, ranks, dy, hidden, d_down, d_up, tokens, rows, columns, rank,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Program (i, 0): BLOCK columns of d_down [rank, columns] = ranks^T @ n; (i, 1): BLOCK rows of d_up [rows, rank] =
    dy^T @ hidden. Each adds up all tokens in order, so that nothing depends on which program is first."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, RANK)[:, None]
    if tl.program_id(1) == 0:
        total = token_products(ranks, inverse, x, column, tokens, columns, rank, TOKENS, BLOCK, RANK)
        if gain is not None:
            total *= tl.load(gain + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
        tl.store(d_down + lane * columns + column[None, :], total, mask=(lane < rank) & (column < columns)[None, :])
    else:
        total = token_products(hidden, None, dy, column, tokens, rows, rank, TOKENS, BLOCK, RANK)
        tl.store(d_up + column[None, :] * rank + lane, total, mask=(lane < rank) & (column < rows)[None, :])


@jit
def token_products(
    ranks, inverse, values, column, tokens, columns, rank,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """(ranks * inverse)^T @ values[:, column]: float32 [RANK, BLOCK]; inverse [tokens] may be None."""
    lane = tl.arange(0, RANK)
    total = tl.zeros((RANK, BLOCK), tl.float32)
    for start in range(0, tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        here = token < tokens
        left = tl.load(
            ranks + token[None, :] * rank + lane[:, None], mask=(lane < rank)[:, None] & here[None, :], other=0.0
        )
        if inverse is not None:
            left *= tl.load(inverse + token, mask=here, other=0.0)[None, :]
        at = values + token.to(tl.int64)[:, None] * columns + column[None, :]
        right = tl.load(at, mask=here[:, None] & (column < columns)[None, :], other=0.0)
        total = tl.dot(left, right.to(tl.float32), total)
    return total


@jit
def norm_gradient_kernel(
    d_normal, x, gain, inverse, dx, partial, tokens, columns, BLOCK: tl.constexpr, EVEN: tl.constexpr
):
    """Program p: the gradients of the RMSNorm of rows p, p + programs, ...; partial [programs, columns] is its part of
    gain's.

    With u = x * inverse: dx = inverse * (d_normal * gain - u * mean(d_normal * gain * u)) and d_gain = sum over rows of
    d_normal * u.
    """
    at = tl.arange(0, BLOCK)
    weight = load_row(gain, at, columns, EVEN)
    total = tl.zeros((BLOCK,), tl.float32)
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        row = token.to(tl.int64) * columns
        root = tl.load(inverse + token)
        unit = load_row(x + row, at, columns, EVEN) * root
        given = load_row(d_normal + row, at, columns, EVEN)
        total += given * unit
        scaled = given * weight
        store_row(dx + row, at, columns, root * (scaled - unit * (tl.sum(scaled * unit) / columns)), EVEN)
    store_row(partial + tl.program_id(0) * columns, at, columns, total, EVEN)


@jit
def sum_parts_kernel(partial, out, parts, columns, BLOCK: tl.constexpr):
    """Program i: BLOCK columns of out [columns], the sum of partial [parts, columns] over its parts in order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for place in range(0, parts):
        total += tl.load(partial + place * columns + at, mask=at < columns, other=0.0)
    tl.store(out + at, total, mask=at < columns)


def blocks(target: str, format: str) -> dict[str, Any]:
    """Sizes of the blocks of each kernel."""
    plain = is_float(format)
    return {
        "input": {"TOKENS": 32, "ROWS": 64 if plain or target == "cpu" else 16},
        "values": 64 if plain else 256,
        "ranks": {"TOKENS": 32, "ROWS": 64},
        "adapter": {"TOKENS": 64 if target == "cpu" else 32, "BLOCK": 64},
        "weights": {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64 if target == "cpu" else 32},
        "norm_programs": 64,
    }


def lora_backward(
    target: str, dy: Array, x: Array, weights: Any, down: Array, up: Array, scale: float, forward: Lora,
    gain: Array | None = None, weight_gradient: bool = False,
) -> LoraGradients:  # fmt: skip
    """Gradients of a loss to x, A, B, with a norm to gain, and with weight_gradient (float W, no norm) to W.

    dy [N, M] = dloss / dy; forward: what lora_forward gave for the same operands. ValueError for shapes that do not fit
    and for a weight gradient that there is none of.
    """
    rows, columns, rank = extents(x, weights, down, up, gain)
    tokens = x.shape[0]
    format = format_of(weights)
    if tuple(dy.shape) != (tokens, rows):
        raise ValueError(f"lora: dy has shape {dy.shape}, expected {(tokens, rows)}")
    if weight_gradient and (gain is not None or not is_float(format)):
        raise ValueError("lora: the gradient of the weights is that of float weights without a norm; leave it out")
    sizes = blocks(target, format)
    common = {"tokens": tokens, "rows": rows, "rank": rank, "RANK": tl.next_power_of_2(rank)}
    ranks = launch(
        ranks_kernel, (tl.cdiv(tokens, sizes["ranks"]["TOKENS"]),), dy=dy, up=up,
        ranks=Output((tokens, rank), "float32"), scale=float(scale), **common, **sizes["ranks"],
    )  # fmt: skip
    run = weight_arguments(format, columns, sizes["values"])
    d_normal = launch(
        input_gradient_kernel, (tl.cdiv(columns, run["VALUES"]), tl.cdiv(tokens, sizes["input"]["TOKENS"])), dy=dy,
        weights=weights, ranks=ranks, down=down, out=Output((tokens, columns), x.dtype if gain is None else "float32"),
        columns=columns, _operations=2 * tokens * columns * (rows + rank), **common, **sizes["input"], **run,
    )  # fmt: skip
    d_down, d_up = launch(
        adapter_gradients_kernel, (tl.cdiv(max(rows, columns), sizes["adapter"]["BLOCK"]), 2), x=x, gain=gain,
        inverse=forward.inverse, ranks=ranks, dy=dy, hidden=forward.hidden, d_down=Output(down.shape, down.dtype),
        d_up=Output(up.shape, up.dtype), columns=columns, _operations=2 * tokens * rank * (rows + columns), **common,
        **sizes["adapter"],
    )  # fmt: skip
    if gain is not None:
        dx, d_gain = norm_backward(d_normal, x, gain, forward.inverse, sizes["norm_programs"])
        return LoraGradients(dx, d_down, d_up, d_gain)
    d_weights = _weight_gradient(dy, x, sizes["weights"]) if weight_gradient else None
    return LoraGradients(d_normal, d_down, d_up, None, d_weights)


def norm_backward(d_normal: Array, x: Array, gain: Array, inverse: Array, most: int) -> tuple[Array, Array]:
    """Gradients of RMSNorm(x) * gain to x and gain; d_normal float32 [N, K], inverse float32 [N] of the forward pass.

    Rows are shared among up to `most` programs, whatever the device, so that results depend on the shapes alone.
    ValueError for rows of more than 65536 values.
    """
    tokens, columns = x.shape
    if columns > LARGEST_ROW:
        raise ValueError(f"the gradient of a norm over {columns} values: expected 1 to {LARGEST_ROW}")
    block = tl.next_power_of_2(columns)
    parts = min(most, tl.cdiv(tokens, 4))
    dx, partial = launch(
        norm_gradient_kernel, (parts,), d_normal=d_normal, x=x, gain=gain, inverse=inverse,
        dx=Output(x.shape, x.dtype), partial=Output((parts, columns), "float32"), tokens=tokens, columns=columns,
        BLOCK=block, EVEN=block == columns,
    )  # fmt: skip
    d_gain = launch(
        sum_parts_kernel, (tl.cdiv(columns, 128),), partial=partial, out=Output(gain.shape, gain.dtype), parts=parts,
        columns=columns, BLOCK=128,
    )  # fmt: skip
    return dx, d_gain


def _weight_gradient(dy: Array, x: Array, block: dict[str, int]) -> Array:
    """dy^T @ x: [M, K] of x's type."""
    (tokens, rows), columns = dy.shape, x.shape[1]
    even = rows % block["BLOCK_M"] == 0 and columns % block["BLOCK_N"] == 0
    return launch(
        matmul_kernel, (tl.cdiv(columns, block["BLOCK_N"]), tl.cdiv(rows, block["BLOCK_M"]), 1), a=Strided(dy.T),
        b=Strided(x), bias=None, residual=None, gate=None, out=Output((rows, columns), x.dtype), m=rows, n=columns,
        k=tokens, a_batch=0, a_m=dy.strides[1], a_k=dy.strides[0], b_batch=0, b_k=x.strides[0], b_n=x.strides[1],
        EVEN=even, EVEN_K=tokens % block["BLOCK_K"] == 0, _operations=2 * tokens * rows * columns, **block,
    )  # fmt: skip


def lora_gradients_reference(
    dy: np.ndarray, x: np.ndarray, weights: np.ndarray, down: np.ndarray, up: np.ndarray, scale: float,
    gain: np.ndarray | None = None, epsilon: float = 1e-6,
) -> LoraGradients:  # fmt: skip
    """The gradients in float64."""
    normal, inverse = normal_reference(x, gain, epsilon)
    dy, weights, down, up = (a.astype(np.float64) for a in (dy, weights, down, up))
    ranks = scale * dy @ up
    d_normal = dy @ weights + ranks @ down
    d_down, d_up = ranks.T @ normal, scale * dy.T @ (normal @ down.T)
    if gain is None:
        return LoraGradients(d_normal, d_down, d_up, None, dy.T @ normal)
    unit = x.astype(np.float64) * inverse
    scaled = d_normal * gain
    dx = inverse * (scaled - unit * np.mean(scaled * unit, axis=1, keepdims=True))
    return LoraGradients(dx, d_down, d_up, np.sum(d_normal * unit, axis=0), dy.T @ normal)

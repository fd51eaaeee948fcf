"""Mixture of experts: the products of tokens with the weights of the experts that take them (for who takes which, see
routing.py).

Rows of tokens are in the order of their experts. One launch multiplies all of them: a program looks up its expert and
its rows in the table of tiles that `dispatch` made on the device, and a program of a tile that is not there ends. The
first product of a layer reads tokens where they are, by the order; the next ones read rows; `combine` adds the k rows
of each token up in a fixed order. Sums are float32 and nothing is added by atomics, so that results do not depend on
which program is first.
"""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

from typing import Any

import numpy as np

import nitinol.language as tl
from nitinol.graph.array import Array
from nitinol.graph.launch import Output, launch
from nitinol.language.jit import jit
from nitinol.ops.decode import FLOAT_FORMATS
from nitinol.ops.routing import Dispatch
from nitinol.ops.weight_products import (
    FEW_TOKENS,
    column_products,
    format_of,
    is_float,
    row_products,
    weight_arguments,
)


@jit
def grouped_kernel(
    x, source, weights, table, out, tiles, rows, columns, row_bytes,
    FORMAT: tl.constexpr, BLOCKS: tl.constexpr, VALUES: tl.constexpr, EVEN: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    """Program (m, i): ROWS columns of the rows of tile i of out [pairs, rows] = x[...] @ weights[expert]^T.

    x is read at token source[row] // CHOSEN, or where source is None at the row itself.
    """
    tile = tl.program_id(1)
    expert = tl.load(table + tile)
    if expert >= 0:
        place = tl.load(table + tiles + tile) + tl.arange(0, TOKENS)
        stop = tl.load(table + 2 * tiles + tile)
        reader = tl.minimum(place, stop - 1)
        if source is not None:
            reader = tl.load(source + reader) // CHOSEN
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        weight_row = expert * rows + tl.minimum(row, rows - 1)
        y = row_products(
            x, reader, weights, weight_row, columns, row_bytes, None, None, FORMAT, BLOCKS, VALUES, EVEN, DOT
        )
        at = place.to(tl.int64)[:, None] * rows + row[None, :]
        tl.store(out + at, y, mask=(place < stop)[:, None] & (row < rows)[None, :])


@jit
def grouped_input_gradient_kernel(
    dy, weights, table, out, tiles, rows, columns, row_bytes,
    FORMAT: tl.constexpr, BLOCKS: tl.constexpr, VALUES: tl.constexpr, EVEN: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (k, i): VALUES columns of the rows of tile i of out [pairs, columns] = dy @ weights[expert]."""
    tile = tl.program_id(1)
    expert = tl.load(table + tile)
    if expert >= 0:
        place = tl.load(table + tiles + tile) + tl.arange(0, TOKENS)
        stop = tl.load(table + 2 * tiles + tile)
        run = tl.program_id(0)
        total = column_products(
            dy, tl.minimum(place, stop - 1), place < stop, weights, expert * rows, rows, run, columns, row_bytes,
            TOKENS, ROWS, FORMAT, BLOCKS, VALUES, EVEN,
        )  # fmt: skip
        column = run * VALUES + tl.arange(0, VALUES)
        at = place.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(out + at, total, mask=(place < stop)[:, None] & (column < columns)[None, :])


@jit
def grouped_weight_gradient_kernel(
    dy, x, source, offsets, out, rows, columns,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    """Program (k, m, e): a block of out [e, rows, columns] = dy[rows of e]^T @ x[their tokens], in the order of rows;
    zeros for an expert without any."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    expert = tl.program_id(2)
    stop = tl.load(offsets + expert + 1)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(tl.load(offsets + expert), stop, TOKENS):
        place = start + tl.arange(0, TOKENS)
        inside = place < stop
        reader = place
        if source is not None:
            reader = tl.load(source + place, mask=inside, other=0) // CHOSEN
        left = tl.load(
            dy + place.to(tl.int64)[None, :] * rows + row[:, None], mask=(row < rows)[:, None] & inside[None, :],
            other=0.0,
        )  # fmt: skip
        right = tl.load(
            x + reader.to(tl.int64)[:, None] * columns + column[None, :],
            mask=inside[:, None] & (column < columns)[None, :], other=0.0,
        )  # fmt: skip
        total = tl.dot(left, right.to(left.dtype), total)
    at = (expert * rows + row).to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out + at, total, mask=(row < rows)[:, None] & (column < columns)[None, :])


@jit
def combine_kernel(y, place, weights, out, columns, BLOCK: tl.constexpr, CHOSEN: tl.constexpr):
    """Program (t, c): BLOCK columns of out [t] = the sum of weights [t, j] * y [place [t, j]] over j = 0, 1, ...;
    without weights of the rows themselves."""
    token = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(CHOSEN):
        row = y + tl.load(place + token * CHOSEN + choice).to(tl.int64) * columns
        value = tl.load(row + at, mask=at < columns, other=0.0).to(tl.float32)
        if weights is not None:
            value *= tl.load(weights + token * CHOSEN + choice)
        total += value
    tl.store(out + token.to(tl.int64) * columns + at, total, mask=at < columns)


@jit
def combine_gradient_kernel(
    d_out, y, place, weights, dy, d_weights, columns, BLOCK: tl.constexpr, CHOSEN: tl.constexpr
):
    """Program (t, j): dy [place [t, j]] = weights [t, j] * d_out [t], and d_weights [t, j] = d_out [t] . y of that
    row."""
    token = tl.program_id(0)
    pair = token * CHOSEN + tl.program_id(1)
    row = tl.load(place + pair).to(tl.int64) * columns
    source = d_out + token.to(tl.int64) * columns
    weight = tl.load(weights + pair)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        given = tl.load(source + at, mask=at < columns, other=0.0).to(tl.float32)
        total += given * tl.load(y + row + at, mask=at < columns, other=0.0).to(tl.float32)
        tl.store(dy + row + at, given * weight, mask=at < columns)
    tl.store(d_weights + pair, tl.sum(total))


def blocks(target: str, block: int, columns: int, format: str) -> dict[str, Any]:
    """Sizes of the blocks of the products and their gradients; `block` is the rows of a tile."""
    few, plain = block <= FEW_TOKENS, is_float(format)
    if few:
        values, rows = {
            "cpu": (64, 4) if plain else (512, 1),
            "metal": (256, 16) if plain else (256, 8),
            "cuda": (512, 4) if plain else (256, 4),
        }[target]
    else:
        values = {"cpu": 128, "metal": 32, "cuda": 64}[target] if plain else 256
        rows = 64 if plain or target == "cpu" else 32
    return {
        "product": {"TOKENS": block, "ROWS": rows, "DOT": not few},
        "values": min(values, tl.next_power_of_2(columns)),
        "input_gradient": {"TOKENS": block, "ROWS": 32},
        "input_gradient_values": 64 if plain else 256,
        "weight_gradient": {"TOKENS": 32, "ROWS": 64, "COLUMNS": 64},
        "combine": 1024,
    }  # fmt: skip


def expert_linear_forward(target: str, x: Array, weights: Any, dispatch: Dispatch, gather: bool) -> Array:
    """x @ weights[expert]^T for every pair of a token and an expert: [N * k, M] in the order of experts, of x's type.

    weights [E, M, K]: an Array, or a quantised array of any block format. With `gather` x [N, K] are tokens, each read
    by its k pairs; else x [N * k, K] are rows in the order of experts. ValueError for shapes that do not fit.
    """
    rows, columns, pairs = extents(x, weights, dispatch, gather)
    format = format_of(weights)
    sizes = blocks(target, dispatch.block, columns, format)
    tiles, product = dispatch.table.shape[1], sizes["product"]
    return launch(
        grouped_kernel, (tl.cdiv(rows, product["ROWS"]), tiles), x=x, source=dispatch.source if gather else None,
        weights=weights, table=dispatch.table, out=Output((pairs, rows), x.dtype), tiles=tiles, rows=rows,
        columns=columns, CHOSEN=dispatch.chosen, _operations=2 * pairs * rows * columns, **product,
        **weight_arguments(format, columns, sizes["values"]),
    )  # fmt: skip


def expert_linear_backward(
    target: str, dy: Array, x: Array, weights: Any, dispatch: Dispatch, gather: bool, weight_gradient: bool = True
) -> tuple[Array, Array | None]:
    """Gradients of a loss to x, of its shape and type, and with weight_gradient (float weights) to the weights.

    dy [N * k, M] in the order of experts; the other arguments as forwards. An expert without tokens has a gradient of
    zeros. ValueError for shapes that do not fit and for a gradient of weights in blocks.
    """
    rows, columns, pairs = extents(x, weights, dispatch, gather)
    format = format_of(weights)
    if tuple(dy.shape) != (pairs, rows):
        raise ValueError(f"expert_linear: dy has shape {dy.shape}, expected {(pairs, rows)}")
    if weight_gradient and not is_float(format):
        raise ValueError(f"expert_linear: weights in blocks of {format} have no gradient; leave it out")
    sizes = blocks(target, dispatch.block, columns, format)
    run = weight_arguments(format, columns, sizes["input_gradient_values"])
    tiles = dispatch.table.shape[1]
    dx = launch(
        grouped_input_gradient_kernel, (tl.cdiv(columns, run["VALUES"]), tiles), dy=dy, weights=weights,
        table=dispatch.table, out=Output((pairs, columns), "float32" if gather else x.dtype), tiles=tiles, rows=rows,
        columns=columns, _operations=2 * pairs * rows * columns, **sizes["input_gradient"], **run,
    )  # fmt: skip
    if gather:
        dx = combine_forward(target, dx, None, dispatch, x.dtype)
    if not weight_gradient:
        return dx, None
    block = sizes["weight_gradient"]
    d_weights = launch(
        grouped_weight_gradient_kernel,
        (tl.cdiv(columns, block["COLUMNS"]), tl.cdiv(rows, block["ROWS"]), weights.shape[0]), dy=dy, x=x,
        source=dispatch.source if gather else None, offsets=dispatch.offsets,
        out=Output(weights.shape, _element(weights)), rows=rows, columns=columns, CHOSEN=dispatch.chosen,
        _operations=2 * pairs * rows * columns, **block,
    )  # fmt: skip
    return dx, d_weights


def combine_forward(target: str, y: Array, weights: Array | None, dispatch: Dispatch, dtype: Any = None) -> Array:
    """The rows of each token added up, times weights [N, k] (None: as they are): [N, M] of y's type or another.

    y [N * k, M] in the order of experts. ValueError for shapes that do not fit.
    """
    tokens, columns = combined_extents(y, weights, dispatch)
    block = min(blocks(target, dispatch.block, columns, "F32")["combine"], tl.next_power_of_2(columns))
    return launch(
        combine_kernel, (tokens, tl.cdiv(columns, block)), y=y, place=dispatch.place, weights=weights,
        out=Output((tokens, columns), dtype or y.dtype), columns=columns, BLOCK=block, CHOSEN=dispatch.chosen,
    )  # fmt: skip


def combine_backward(target: str, d_out: Array, y: Array, weights: Array, dispatch: Dispatch) -> tuple[Array, Array]:
    """Gradients to y, of its shape and type, and to weights, float32 [N, k]; d_out [N, M]."""
    tokens, columns = combined_extents(y, weights, dispatch)
    if tuple(d_out.shape) != (tokens, columns):
        raise ValueError(f"combine: d_out has shape {d_out.shape}, expected {(tokens, columns)}")
    block = min(blocks(target, dispatch.block, columns, "F32")["combine"], tl.next_power_of_2(columns))
    return launch(
        combine_gradient_kernel, (tokens, dispatch.chosen), d_out=d_out, y=y, place=dispatch.place, weights=weights,
        dy=Output(y.shape, y.dtype), d_weights=Output(weights.shape, "float32"), columns=columns, BLOCK=block,
        CHOSEN=dispatch.chosen,
    )  # fmt: skip


def _element(weights: Any) -> Any:
    """The element type of float weights, an Array or a quantised array of a float format."""
    return FLOAT_FORMATS[format_of(weights)]


def extents(x: Array, weights: Any, dispatch: Dispatch, gather: bool) -> tuple[int, int, int]:
    """M, K and N * k, or ValueError."""
    pairs, experts = dispatch.source.shape[0], dispatch.offsets.shape[0] - 1
    if len(weights.shape) != 3 or weights.shape[0] != experts:
        raise ValueError(f"expert_linear: weights have shape {tuple(weights.shape)}, expected [{experts}, M, K]")
    wanted = (pairs // dispatch.chosen if gather else pairs, weights.shape[2])
    if tuple(x.shape) != wanted:
        raise ValueError(f"expert_linear: x has shape {tuple(x.shape)}, expected {wanted}")
    return weights.shape[1], weights.shape[2], pairs


def combined_extents(y: Array, weights: Array | None, dispatch: Dispatch) -> tuple[int, int]:
    """N and M, or ValueError."""
    pairs = dispatch.source.shape[0]
    shape = (pairs // dispatch.chosen, dispatch.chosen)
    if y.ndim != 2 or y.shape[0] != pairs or (weights is not None and tuple(weights.shape) != shape):
        raise ValueError(
            f"combine: y has shape {y.shape} and the weights {None if weights is None else weights.shape}, expected "
            f"{(pairs, 'M')} and {shape}"
        )
    return shape[0], y.shape[1]


def expert_linear_reference(
    x: np.ndarray, weights: np.ndarray, chosen: np.ndarray, source: np.ndarray, gather: bool
) -> np.ndarray:
    """The same in float64, row by row; chosen [N, k], source [N * k] as dispatch_reference gives it."""
    rows = x.astype(np.float64)[source // chosen.shape[1]] if gather else x.astype(np.float64)
    return np.einsum("pk,pmk->pm", rows, weights.astype(np.float64)[chosen.reshape(-1)[source]])


def expert_linear_gradients_reference(
    dy: np.ndarray, x: np.ndarray, weights: np.ndarray, chosen: np.ndarray, source: np.ndarray, gather: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The gradients to x and weights in float64."""
    token = source // chosen.shape[1] if gather else np.arange(source.size)
    expert = chosen.reshape(-1)[source]
    dx = np.zeros(x.shape)
    d_weights = np.zeros(weights.shape)
    given = dy.astype(np.float64)
    np.add.at(dx, token, np.einsum("pm,pmk->pk", given, weights.astype(np.float64)[expert]))
    np.add.at(d_weights, expert, np.einsum("pm,pk->pmk", given, x.astype(np.float64)[token]))
    return dx, d_weights


def combine_reference(y: np.ndarray, weights: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The same in float64; place [N * k]."""
    rows = y.astype(np.float64)[place].reshape(*weights.shape, -1)
    return np.einsum("tj,tjm->tm", weights.astype(np.float64), rows)


def combine_gradients_reference(
    d_out: np.ndarray, y: np.ndarray, weights: np.ndarray, place: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The gradients to y and weights in float64."""
    wide = d_out.astype(np.float64)
    rows = y.astype(np.float64)[place].reshape(*weights.shape, -1)
    dy = np.empty(y.shape)
    dy[place] = (weights.astype(np.float64)[:, :, None] * wide[:, None]).reshape(y.shape)
    return dy, np.einsum("tm,tjm->tj", wide, rows)

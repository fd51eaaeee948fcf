"""Low-rank adapters (Hu et al., "LoRA: low-rank adaptation of large language models", 2021) in one product with the
weights that they adapt:

    y = n @ W^T + scale * (n @ A^T) @ B^T          n = x, or RMSNorm(x) * gain

x [N, K], W [M, K] of any format, frozen; A [r, K] and B [M, r] are trained, r small. Two ways to the adapter: "first",
a small kernel makes hidden = scale * n @ A^T [N, r] and the product with W adds hidden @ B^T before it stores a block;
or "beside", every program of the one kernel makes the hidden rows that it needs itself, which repeats r rows of work
for every ROWS rows of weights and spares a launch.

Gradients of a loss with dy = dloss / dy, by the same letters:

    ranks = scale * dy @ B [N, r]     dn = dy @ W + ranks @ A     dA = ranks^T @ n     dB = dy^T @ hidden
"""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

import nitinol.language as tl
from nitinol.array import Array, Output, Strided, launch
from nitinol.kernels.matmul import matmul_kernel, multiply
from nitinol.kernels.tiles import load_row, store_row
from nitinol.language.jit import jit
from nitinol.ops.weight_products import (
    FEW_TOKENS,
    column_products,
    format_of,
    inverse_rms,
    is_float,
    row_products,
    weight_arguments,
)

LARGEST_RANK = 128  # hidden rows are one tile of a program
LARGEST_ROW = 1 << 16  # values that the norm's gradient keeps as one tile


class Lora(NamedTuple):
    """y [N, M] of x's type; what the gradients need: hidden float32 [N, r] = scale * n @ A^T, and with a norm inverse
    float32 [N], the reciprocals of the root mean squares of x's rows, else None."""

    y: Any
    hidden: Any
    inverse: Any


class LoraGradients(NamedTuple):
    """Of x, A, B and gain (None without a norm), each of its operand's shape and type, and of W if asked for."""

    x: Any
    down: Any
    up: Any
    gain: Any = None
    weights: Any = None


@jit
def hidden_kernel(
    x, gain, down, hidden, inverse, tokens, columns, rank, scale, epsilon,
    TOKENS: tl.constexpr, RANK: tl.constexpr, VALUES: tl.constexpr, EVEN: tl.constexpr, FORMAT: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Program (r, t): RANK columns of hidden [tokens, rank] = scale * n @ down^T, and of inverse [tokens]."""
    lane = tl.program_id(0) * RANK + tl.arange(0, RANK)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    source = tl.minimum(token, tokens - 1)
    root = None
    if gain is not None:
        root = inverse_rms(x, source, columns, epsilon, VALUES, EVEN)
        if tl.program_id(0) == 0:
            tl.store(inverse + token, root, mask=token < tokens)
    values = row_products(
        x, source, down, tl.minimum(lane, rank - 1), columns, 0, gain, root, FORMAT, 1, VALUES, EVEN, DOT
    )
    inside = (token < tokens)[:, None] & (lane < rank)[None, :]
    tl.store(hidden + token[:, None] * rank + lane[None, :], values * scale, mask=inside)


@jit
def lora_kernel(
    x, gain, weights, down, up, hidden, inverse, out, tokens, rows, columns, row_bytes, rank, scale, epsilon,
    FORMAT: tl.constexpr, BLOCKS: tl.constexpr, VALUES: tl.constexpr, EVEN: tl.constexpr, DOWN: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, DOT: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    """Program (m, t): ROWS columns of out [tokens, rows] for TOKENS tokens. RANK is at least `rank`; DOWN is the
    format of `down`. hidden and inverse are read, or with BESIDE made, and stored by the first program of a row."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    source = tl.minimum(token, tokens - 1)
    lane = tl.arange(0, RANK)
    places = source[:, None] * rank + lane[None, :]
    root = None
    if BESIDE:
        if gain is not None:
            root = inverse_rms(x, source, columns, epsilon, VALUES, EVEN)
        ranks = scale * row_products(
            x, source, down, tl.minimum(lane, rank - 1), columns, 0, gain, root, DOWN, 1, VALUES, EVEN, DOT
        )
        ranks = tl.where((lane < rank)[None, :], ranks, 0.0)
        if tl.program_id(0) == 0:
            tl.store(hidden + places, ranks, mask=(token < tokens)[:, None] & (lane < rank)[None, :])
            if gain is not None:
                tl.store(inverse + token, root, mask=token < tokens)
    else:
        if gain is not None:
            root = tl.load(inverse + source)
        ranks = tl.load(hidden + places, mask=(lane < rank)[None, :], other=0.0)
    base = row_products(
        x, source, weights, tl.minimum(row, rows - 1), columns, row_bytes, gain, root, FORMAT, BLOCKS, VALUES, EVEN, DOT
    )
    inside = (row < rows)[:, None] & (lane < rank)[None, :]
    adapter = tl.load(up + row[:, None] * rank + lane[None, :], mask=inside, other=0.0).to(tl.float32)
    if DOT:
        y = tl.dot(ranks, tl.trans(adapter), base)
    else:
        y = base + tl.sum(ranks[:, None, :] * adapter[None], axis=2)
    at = token[:, None].to(tl.int64) * rows + row[None, :]
    tl.store(out + at, y, mask=(token < tokens)[:, None] & (row < rows)[None, :])


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


def blocks(target: str, tokens: int, rows: int, columns: int, rank: int, format: str) -> dict[str, Any]:
    """Sizes of the blocks of each kernel, and where the adapter's first half is computed ("first" or "beside")."""
    few, plain = tokens <= FEW_TOKENS, is_float(format)
    if few:
        block_tokens = tl.next_power_of_2(tokens)
        values, block_rows = {
            "cpu": (64, 4) if plain else (512, 1),
            "metal": (256, 16) if plain else (256, 8),
            "cuda": (512, 4) if plain else (256, 4),
        }[target]
    else:
        block_tokens = min(64 if plain or target != "metal" else 32, max(16, tl.next_power_of_2(tokens)))
        values = {"cpu": 128, "metal": 32, "cuda": 64}[target] if plain else 256
        block_rows = 64 if plain or target == "cpu" else 32
    return {
        "product": {"TOKENS": block_tokens, "ROWS": block_rows, "DOT": not few},
        "values": min(values, tl.next_power_of_2(columns)),
        "hidden_ranks": min(4 if few else 32, tl.next_power_of_2(rank)),
        "gradient": {"TOKENS": 32, "ROWS": 64 if plain or target == "cpu" else 16},
        "gradient_values": 64 if plain else 256,
        "sums": {"TOKENS": 64 if target == "cpu" else 32, "BLOCK": 64},
        "adapter": "first",
    }  # fmt: skip


def lora_forward(
    target: str, x: Array, weights: Any, down: Array, up: Array, scale: float, gain: Array | None = None,
    epsilon: float = 1e-6, adapter: str | None = None,
) -> Lora:  # fmt: skip
    """n @ W^T + scale * (n @ A^T) @ B^T with n = x, or with `gain` [K] RMSNorm(x) * gain.

    x [N, K], weights [M, K] (an Array, or a quantised array of any block format), down = A [r, K] and up = B [M, r],
    r up to 128; x, A, B and gain float32, float16 or bfloat16. Half types are multiplied as such, where two meet that
    are not the same in float32; sums are float32. adapter: "first" or "beside" (see the module), None: what suits the
    target. ValueError for shapes that do not fit.
    """
    rows, columns, rank = _extents(x, weights, down, up, gain)
    tokens = x.shape[0]
    format = format_of(weights)
    sizes = blocks(target, tokens, rows, columns, rank, format)
    adapter = adapter or sizes["adapter"]
    if adapter not in ("first", "beside"):
        raise ValueError(f'lora: adapter is {adapter!r}, expected "first" or "beside"')
    product = sizes["product"]
    run = weight_arguments(format, columns, sizes["values"])
    hidden: Any = Output((tokens, rank), "float32")
    inverse: Any = None if gain is None else Output((tokens,), "float32")
    common = {
        "x": x, "gain": gain, "down": down, "tokens": tokens, "columns": columns, "rank": rank, "scale": float(scale),
        "epsilon": float(epsilon),
    }  # fmt: skip
    if adapter == "first":
        ranks = sizes["hidden_ranks"]
        values = min(sizes["values"], 128)
        made = launch(
            hidden_kernel, (tl.cdiv(rank, ranks), tl.cdiv(tokens, product["TOKENS"])), hidden=hidden, inverse=inverse,
            TOKENS=product["TOKENS"], RANK=ranks, VALUES=values, EVEN=columns % values == 0, FORMAT=format_of(down),
            DOT=product["DOT"], _operations=2 * tokens * columns * rank, **common,
        )  # fmt: skip
        hidden, inverse = (made, None) if gain is None else made
    made = launch(
        lora_kernel, (tl.cdiv(rows, product["ROWS"]), tl.cdiv(tokens, product["TOKENS"])), weights=weights, up=up,
        hidden=hidden, inverse=inverse, out=Output((tokens, rows), x.dtype), rows=rows, DOWN=format_of(down),
        RANK=tl.next_power_of_2(rank), BESIDE=adapter == "beside",
        _operations=2 * tokens * (rows * columns + rows * rank), **common, **product, **run,
    )  # fmt: skip
    if adapter == "first":
        return Lora(made, hidden, inverse)
    return Lora(made[-1], made[0], None if gain is None else made[1])


def lora_backward(
    target: str, dy: Array, x: Array, weights: Any, down: Array, up: Array, scale: float, forward: Lora,
    gain: Array | None = None, weight_gradient: bool = False,
) -> LoraGradients:  # fmt: skip
    """Gradients of a loss to x, A, B, with a norm to gain, and with weight_gradient (float W, no norm) to W.

    dy [N, M] = dloss / dy; forward: what lora_forward gave for the same operands. ValueError for shapes that do not fit
    and for a weight gradient that there is none of.
    """
    rows, columns, rank = _extents(x, weights, down, up, gain)
    tokens = x.shape[0]
    format = format_of(weights)
    if tuple(dy.shape) != (tokens, rows):
        raise ValueError(f"lora: dy has shape {dy.shape}, expected {(tokens, rows)}")
    if weight_gradient and (gain is not None or not is_float(format)):
        raise ValueError("lora: the gradient of the weights is that of float weights without a norm; leave it out")
    sizes = blocks(target, tokens, rows, columns, rank, format)
    block_rank = tl.next_power_of_2(rank)
    gradient, sums = sizes["gradient"], sizes["sums"]
    ranks = launch(
        ranks_kernel, (tl.cdiv(tokens, gradient["TOKENS"]),), dy=dy, up=up, ranks=Output((tokens, rank), "float32"),
        tokens=tokens, rows=rows, rank=rank, scale=float(scale), TOKENS=gradient["TOKENS"], ROWS=64, RANK=block_rank,
    )  # fmt: skip
    run = weight_arguments(format, columns, sizes["gradient_values"])
    d_normal = launch(
        input_gradient_kernel, (tl.cdiv(columns, run["VALUES"]), tl.cdiv(tokens, gradient["TOKENS"])), dy=dy,
        weights=weights, ranks=ranks, down=down,
        out=Output((tokens, columns), x.dtype if gain is None else "float32"), tokens=tokens, rows=rows,
        columns=columns, rank=rank, RANK=block_rank, _operations=2 * tokens * columns * (rows + rank), **gradient,
        **run,
    )  # fmt: skip
    d_down, d_up = launch(
        adapter_gradients_kernel, (tl.cdiv(max(rows, columns), sums["BLOCK"]), 2), x=x, gain=gain,
        inverse=forward.inverse, ranks=ranks, dy=dy, hidden=forward.hidden, d_down=Output(down.shape, down.dtype),
        d_up=Output(up.shape, up.dtype), tokens=tokens, rows=rows, columns=columns, rank=rank, RANK=block_rank,
        _operations=2 * tokens * rank * (rows + columns), **sums,
    )  # fmt: skip
    if gain is not None:
        dx, d_gain = norm_backward(d_normal, x, gain, forward.inverse)
        return LoraGradients(dx, d_down, d_up, d_gain)
    return LoraGradients(d_normal, d_down, d_up, None, _weight_gradient(target, dy, x) if weight_gradient else None)


def norm_backward(d_normal: Array, x: Array, gain: Array, inverse: Array) -> tuple[Array, Array]:
    """Gradients of RMSNorm(x) * gain to x and gain; d_normal float32 [N, K], inverse float32 [N] of the forward pass.

    ValueError for rows of more than 65536 values.
    """
    tokens, columns = x.shape
    if columns > LARGEST_ROW:
        raise ValueError(f"the gradient of a norm over {columns} values: expected 1 to {LARGEST_ROW}")
    block = tl.next_power_of_2(columns)
    parts = min(64, tl.cdiv(tokens, 4))  # a fixed number, so that results depend on the shapes alone
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


def _weight_gradient(target: str, dy: Array, x: Array) -> Array:
    """dy^T @ x: [M, K] of x's type."""
    (tokens, rows), columns = dy.shape, x.shape[1]
    block = 64 if target == "cpu" else 32
    return launch(
        matmul_kernel, (tl.cdiv(columns, 64), tl.cdiv(rows, 64), 1), a=Strided(dy.T), b=Strided(x), bias=None,
        residual=None, gate=None, out=Output((rows, columns), x.dtype), m=rows, n=columns, k=tokens, a_batch=0,
        a_m=dy.strides[1], a_k=dy.strides[0], b_batch=0, b_k=x.strides[0], b_n=x.strides[1], BLOCK_M=64, BLOCK_N=64,
        BLOCK_K=block, EVEN=rows % 64 == 0 and columns % 64 == 0, EVEN_K=tokens % block == 0,
        _operations=2 * tokens * rows * columns,
    )  # fmt: skip


def _extents(x: Any, weights: Any, down: Any, up: Any, gain: Any) -> tuple[int, int, int]:
    """M, K and r, or ValueError."""
    shapes = [tuple(operand.shape) for operand in (x, weights, down, up)]
    if any(len(shape) != 2 for shape in shapes):
        raise ValueError(f"lora: x, weights, A and B have shapes {shapes}, expected [N, K], [M, K], [r, K] and [M, r]")
    (rows, columns), rank = shapes[1], shapes[2][0]
    if shapes[0][1] != columns or shapes[2] != (rank, columns) or shapes[3] != (rows, rank):
        raise ValueError(f"lora: x, weights, A and B have shapes {shapes}, expected [N, K], [M, K], [r, K] and [M, r]")
    if not 1 <= rank <= LARGEST_RANK:
        raise ValueError(f"lora: the rank is {rank}, expected 1 to {LARGEST_RANK}")
    if gain is not None and tuple(gain.shape) != (columns,):
        raise ValueError(f"lora: gain has shape {tuple(gain.shape)}, expected {(columns,)}")
    return rows, columns, rank


def lora_reference(
    x: np.ndarray, weights: np.ndarray, down: np.ndarray, up: np.ndarray, scale: float,
    gain: np.ndarray | None = None, epsilon: float = 1e-6,
) -> np.ndarray:  # fmt: skip
    """The same in float64; weights as numbers."""
    normal, _ = _normal(x, gain, epsilon)
    wide = [a.astype(np.float64) for a in (weights, down, up)]
    return normal @ wide[0].T + scale * (normal @ wide[1].T) @ wide[2].T


def lora_gradients_reference(
    dy: np.ndarray, x: np.ndarray, weights: np.ndarray, down: np.ndarray, up: np.ndarray, scale: float,
    gain: np.ndarray | None = None, epsilon: float = 1e-6,
) -> LoraGradients:  # fmt: skip
    """The gradients in float64."""
    normal, inverse = _normal(x, gain, epsilon)
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


def _normal(x: np.ndarray, gain: np.ndarray | None, epsilon: float) -> tuple[np.ndarray, Any]:
    """n and the reciprocals of the rows' root mean squares, float64."""
    wide = x.astype(np.float64)
    if gain is None:
        return wide, None
    inverse = 1 / np.sqrt(np.mean(wide**2, axis=1, keepdims=True) + epsilon)
    return wide * inverse * gain.astype(np.float64), inverse

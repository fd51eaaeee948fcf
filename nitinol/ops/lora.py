"""Low-rank adapters (Hu et al., "LoRA: low-rank adaptation of large language models", 2021) in one product with the
weights that they adapt:

    y = n @ W^T + scale * (n @ A^T) @ B^T          n = x, or RMSNorm(x) * gain

x [N, K], W [M, K] of any format, frozen; A [r, K] and B [M, r] are trained, r small. Two ways to the adapter: "first",
a small kernel makes n and hidden = scale * n @ A^T [N, r], and the product with W adds hidden @ B^T before it stores a
block; or "beside", every program of the one kernel makes the norm and the hidden rows that it needs itself, which
repeats r rows of work for every ROWS rows of weights and spares a launch.

Gradients of a loss with dy = dloss / dy, by the same letters:

    ranks = scale * dy @ B [N, r]     dn = dy @ W + ranks @ A     dA = ranks^T @ n     dB = dy^T @ hidden
"""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

import nitinol.language as tl
from nitinol.graph.array import Array
from nitinol.graph.launch import Output, launch
from nitinol.language.jit import jit
from nitinol.ops.activations import groups_per_program, quantize_activations_kernel, rms_norm_quantize_kernel
from nitinol.ops.matvec import product
from nitinol.ops.weight_products import (
    FEW_TOKENS,
    format_of,
    inverse_rms,
    is_float,
    row_products,
    weight_arguments,
)

LARGEST_RANK = 128  # hidden rows are one tile of a program


class Lora(NamedTuple):
    """y [N, M] of x's type; what the gradients need: hidden float32 [N, r] = scale * n @ A^T, and with a norm inverse
    float32 [N], the reciprocals of the root mean squares of x's rows, else None."""

    y: Any
    hidden: Any
    inverse: Any


@jit
def hidden_kernel(
    x, gain, down, hidden, inverse, normal, tokens, columns, rank, scale, epsilon,
    TOKENS: tl.constexpr, RANK: tl.constexpr, VALUES: tl.constexpr, EVEN: tl.constexpr, FORMAT: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Program (r, t): RANK columns of hidden [tokens, rank] = scale * n @ down^T. With gain the first program of a row
    also stores inverse [tokens] and, where it is not None, normal [tokens, columns] = n."""
    lane = tl.program_id(0) * RANK + tl.arange(0, RANK)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    source = tl.minimum(token, tokens - 1)
    root = None
    if gain is not None:
        root = inverse_rms(x, source, columns, epsilon, VALUES, EVEN)
        if tl.program_id(0) == 0:
            tl.store(inverse + token, root, mask=token < tokens)
            if normal is not None:
                store_normal(x, gain, root, normal, token, tokens, columns, VALUES)
    values = row_products(
        x, source, down, tl.minimum(lane, rank - 1), columns, 0, gain, root, FORMAT, 1, VALUES, EVEN, DOT
    )
    inside = (token < tokens)[:, None] & (lane < rank)[None, :]
    tl.store(hidden + token[:, None] * rank + lane[None, :], values * scale, mask=inside)


@jit
def store_normal(x, gain, inverse, normal, token, tokens, columns, VALUES: tl.constexpr):
    """normal = x * inverse * gain for rows `token`."""
    row = token.to(tl.int64)[:, None] * columns
    for start in range(0, columns, VALUES):
        at = start + tl.arange(0, VALUES)
        inside = (token < tokens)[:, None] & (at < columns)[None, :]
        value = tl.load(x + row + at[None, :], mask=inside, other=0.0).to(tl.float32) * inverse[:, None]
        weight = tl.load(gain + at, mask=at < columns, other=0.0).to(tl.float32)
        tl.store(normal + row + at[None, :], value * weight[None, :], mask=inside)


@jit
def lora_kernel(
    x, gain, weights, down, up, hidden, inverse, out, tokens, rows, columns, row_bytes, rank, scale, epsilon,
    FORMAT: tl.constexpr, BLOCKS: tl.constexpr, VALUES: tl.constexpr, EVEN: tl.constexpr, DOWN: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, DOT: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    """Program (m, t): ROWS columns of out [tokens, rows] for TOKENS tokens. RANK is at least `rank`; DOWN is the
    format of `down`. hidden is read and x is n; or with BESIDE hidden and inverse are made, and stored by the first
    program of a row."""
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
        ranks = tl.load(hidden + places, mask=(lane < rank)[None, :], other=0.0)
    base = row_products(
        x, source, weights, tl.minimum(row, rows - 1), columns, row_bytes, gain, root, FORMAT, BLOCKS, VALUES, EVEN, DOT
    )
    store_adapted(base, ranks, up, out, token, row, tokens, rows, rank, DOT)


@jit
def lora_bytes_kernel(
    x, x_scales, x_sums, weights, up, hidden, out, tokens, rows, columns, row_bytes, rank,
    FORMAT: tl.constexpr, BLOCKS: tl.constexpr, VALUES: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """Program m: ROWS columns of out [tokens, rows] for a few tokens whose n is int8, as kernels.matvec has it."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    source = tl.minimum(token, tokens - 1)
    lane = tl.arange(0, RANK)
    ranks = tl.load(hidden + source[:, None] * rank + lane[None, :], mask=(lane < rank)[None, :], other=0.0)
    base = product(
        x, x_scales, x_sums, weights, tl.minimum(row, rows - 1), source, columns, row_bytes, None, FORMAT, BLOCKS,
        VALUES, 0, 0,
    )  # fmt: skip
    store_adapted(base, ranks, up, out, token, row, tokens, rows, rank, False)


@jit
def store_adapted(base, ranks, up, out, token, row, tokens, rows, rank, DOT: tl.constexpr):
    """out [token, row] = base + ranks @ up[row]^T; base [tokens, rows] and ranks [tokens, RANK] of a block."""
    lane = tl.arange(0, ranks.shape[1])
    inside = (row < rows)[:, None] & (lane < rank)[None, :]
    adapter = tl.load(up + row[:, None] * rank + lane[None, :], mask=inside, other=0.0).to(tl.float32)
    if DOT:
        y = tl.dot(ranks, tl.trans(adapter), base)
    else:
        y = base + tl.sum(ranks[:, None, :] * adapter[None], axis=2)
    at = token[:, None].to(tl.int64) * rows + row[None, :]
    tl.store(out + at, y, mask=(token < tokens)[:, None] & (row < rows)[None, :])


def blocks(target: str, tokens: int, columns: int, rank: int, format: str) -> dict[str, Any]:
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
        least = 16 if target == "cuda" else 8  # rows of a matrix instruction
        block_tokens = min(64 if plain or target != "metal" else 32, max(least, tl.next_power_of_2(tokens)))
        values = {"cpu": 128, "metal": 32, "cuda": 64}[target] if plain else 256
        block_rows = 64 if plain or target == "cpu" else 32
    return {
        "product": {"TOKENS": block_tokens, "ROWS": block_rows, "DOT": not few},
        # Sums in registers of as many rows of A and W as fit; matrix products of more, also for a few tokens.
        "beside": {"ROWS": 16, "DOT": False} if few and block_tokens * rank <= 64 else {"ROWS": 64, "DOT": True},
        "values": min(values, tl.next_power_of_2(columns)),
        "bytes": {"cpu": (1, 512), "metal": (16, 2048), "cuda": (2, 2048)}[target],  # rows and values of a step
        "hidden_ranks": min(4 if few else 32, tl.next_power_of_2(rank)),
        "hidden_values": min(128, tl.next_power_of_2(columns)),
        "adapter": "first",
    }


def lora_forward(
    target: str, x: Array, weights: Any, down: Array, up: Array, scale: float, gain: Array | None = None,
    epsilon: float = 1e-6, adapter: str | None = None, integers: bool = False,
) -> Lora:  # fmt: skip
    """n @ W^T + scale * (n @ A^T) @ B^T with n = x, or with `gain` [K] RMSNorm(x) * gain.

    x [N, K], weights [M, K] (an Array, or a quantised array of any block format), down = A [r, K] and up = B [M, r],
    r up to 128; x, A, B and gain float32, float16 or bfloat16. Half types are multiplied as such, where two meet that
    are not the same in float32; sums are float32. adapter: "first" or "beside" (see the module), None: what suits the
    target. integers: of up to 4 tokens n may be rounded to int8, with a scale per 32 values, for the product with
    weights of a block format, as kernels.linear does. ValueError for shapes that do not fit.
    """
    rows, columns, rank = extents(x, weights, down, up, gain)
    tokens, format = x.shape[0], format_of(weights)
    sizes = blocks(target, tokens, columns, rank, format)
    adapter = adapter or sizes["adapter"]
    if adapter not in ("first", "beside"):
        raise ValueError(f'lora: adapter is {adapter!r}, expected "first" or "beside"')
    product = sizes["product"]
    common = {"tokens": tokens, "columns": columns, "rank": rank}
    scales = {"scale": float(scale), "epsilon": float(epsilon)}
    outputs = {
        "hidden": Output((tokens, rank), "float32"),
        "inverse": None if gain is None else Output((tokens,), "float32"),
    }
    last = {
        "weights": weights, "up": up, "rows": rows, "out": Output((tokens, rows), x.dtype),
        "RANK": tl.next_power_of_2(rank), "_operations": 2 * tokens * rows * (columns + rank), **common,
    }  # fmt: skip
    if adapter == "beside":
        product = {**product, **sizes["beside"]}
        made = launch(
            lora_kernel, (tl.cdiv(rows, product["ROWS"]), tl.cdiv(tokens, product["TOKENS"])), x=x, gain=gain,
            down=down, DOWN=format_of(down), BESIDE=True, **outputs, **last, **scales, **product,
            **weight_arguments(format, columns, sizes["values"]),
        )  # fmt: skip
        return Lora(made[-1], made[0], None if gain is None else made[1])
    integers = integers and tokens <= FEW_TOKENS and not is_float(format)
    ranks, values = sizes["hidden_ranks"], sizes["hidden_values"]
    keep = gain is not None and not integers
    made = launch(
        hidden_kernel, (tl.cdiv(rank, ranks), tl.cdiv(tokens, product["TOKENS"])), x=x, gain=gain, down=down,
        normal=Output(x.shape, x.dtype) if keep else None, TOKENS=product["TOKENS"], RANK=ranks, VALUES=values,
        EVEN=columns % values == 0, FORMAT=format_of(down), DOT=product["DOT"],
        _operations=2 * tokens * columns * rank, **outputs, **common, **scales,
    )  # fmt: skip
    hidden, inverse, normal = (made, None, x) if gain is None else made if keep else (*made, None)
    if integers:
        block_rows, values = sizes["bytes"]
        run = weight_arguments(format, columns, values)
        del run["EVEN"]
        y = launch(
            lora_bytes_kernel, (tl.cdiv(rows, block_rows),), hidden=hidden, TOKENS=product["TOKENS"], ROWS=block_rows,
            **_bytes(x, gain, epsilon), **last, **run,
        )  # fmt: skip
    else:
        y = launch(
            lora_kernel, (tl.cdiv(rows, product["ROWS"]), tl.cdiv(tokens, product["TOKENS"])), x=normal, gain=None,
            down=None, hidden=hidden, inverse=None, DOWN="F32", BESIDE=False, **last, **scales, **product,
            **weight_arguments(format, columns, sizes["values"]),
        )  # fmt: skip
    return Lora(y, hidden, inverse)


def _bytes(x: Array, gain: Array | None, epsilon: float) -> dict[str, Array]:
    """n as int8, its scales and sums, by the names of kernels' parameters."""
    tokens, columns = x.shape
    outputs = {
        "values": Output((tokens, columns), "int8"), "scales": Output((tokens, columns // 32), "float32"),
        "sums": Output((tokens, columns // 16), "int32"),
    }  # fmt: skip
    if gain is None:
        groups = groups_per_program(columns)
        made = launch(
            quantize_activations_kernel, (tokens, columns // (32 * groups)), x=x, columns=columns, GROUPS=groups,
            **outputs,
        )  # fmt: skip
    else:
        block = tl.next_power_of_2(columns)
        made = launch(
            rms_norm_quantize_kernel, (tokens, 1), x=x, weight=gain, columns=columns, epsilon=float(epsilon),
            BLOCK=block, EVEN=block == columns, **outputs,
        )  # fmt: skip
    return dict(zip(("x", "x_scales", "x_sums"), made))


def extents(x: Any, weights: Any, down: Any, up: Any, gain: Any) -> tuple[int, int, int]:
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
    normal, _ = normal_reference(x, gain, epsilon)
    wide = [a.astype(np.float64) for a in (weights, down, up)]
    return normal @ wide[0].T + scale * (normal @ wide[1].T) @ wide[2].T


def normal_reference(x: np.ndarray, gain: np.ndarray | None, epsilon: float) -> tuple[np.ndarray, Any]:
    """n and the reciprocals of the rows' root mean squares, float64."""
    wide = x.astype(np.float64)
    if gain is None:
        return wide, None
    inverse = 1 / np.sqrt(np.mean(wide**2, axis=1, keepdims=True) + epsilon)
    return wide * inverse * gain.astype(np.float64), inverse

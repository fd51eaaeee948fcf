"""Matrix products of arrays of floats or bytes."""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

from typing import Any

import numpy as np

import nitinol.language as tl
from nitinol.graph.array import Array
from nitinol.graph.conversion import as_operand
from nitinol.graph.launch import Output, Strided, launch
from nitinol.graph.operation import Operation
from nitinol.graph.views import broadcast_shapes, collapse
from nitinol.language import semantic
from nitinol.language.jit import jit
from nitinol.language.types import DType, bfloat16, float16, float32, int8, int32, uint8
from nitinol.ops.creation import zeros
from nitinol.ops.elementwise import _operator
from nitinol.ops.matmul_kernels import matmul_kernel

MULTIPROCESSORS = 128  # of a GPU, about (A100 108, H100 and H200 132): fewer programs leave some without work
NO_EPILOGUE = {"bias": None, "residual": None, "gate": None}


@jit
def general_matmul_kernel(
    a, b, out, m, n, k, a_batch, a_row, a_column, b_batch, b_row, b_column,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, EVEN_K: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """Program (j, i, batch): the M x N tile (i, j) of out [batch, m, n] = a [batch, m, k] @ b [batch, k, n]."""
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * M + tl.arange(0, M)
    column = tl.program_id(0) * N + tl.arange(0, N)
    at = tl.arange(0, K)
    left = a + batch * a_batch + row[:, None].to(tl.int64) * a_row + at[None, :] * a_column
    right = b + batch * b_batch + at[:, None].to(tl.int64) * b_row + column[None, :] * b_column
    total = tl.zeros((M, N), ACCUMULATOR)
    inside = (row < m)[:, None] & (column < n)[None, :]
    for start in range(0, k, K):
        if EVEN and EVEN_K:
            x, y = tl.load(left), tl.load(right)
        elif EVEN:
            x = tl.load(left, mask=(start + at < k)[None, :], other=0)
            y = tl.load(right, mask=(start + at < k)[:, None], other=0)
        else:
            x = tl.load(left, mask=(row < m)[:, None] & (start + at < k)[None, :], other=0)
            y = tl.load(right, mask=(start + at < k)[:, None] & (column < n)[None, :], other=0)
        total = tl.dot(x, y, total, out_dtype=ACCUMULATOR)
        left += K * a_column
        right += K * b_row
    place = out + batch * m * n + row[:, None].to(tl.int64) * n + column[None, :]
    if EVEN:
        tl.store(place, total.to(out.dtype.element_ty))
    else:
        tl.store(place, total.to(out.dtype.element_ty), mask=inside)


def _matmul_rule(a: Array, b: Array) -> tuple[tuple[int, ...], DType]:
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    if b.shape[-2] != k:
        raise ValueError(
            f"matmul: shapes {a.shape} and {b.shape}: the inner extents {k} and {b.shape[-2]} differ; transpose one "
            "with .mT?"
        )
    try:
        batch = broadcast_shapes("matmul", a.shape[:-2], b.shape[:-2])
    except ValueError:
        raise ValueError(f"matmul: the leading axes of shapes {a.shape} and {b.shape} do not fit together") from None
    return (*batch, m, n), _types(a.dtype, b.dtype)[0] or int32


def _matmul_lower(target: str, a: Array, b: Array) -> Array:
    shape, output = _matmul_rule(a, b)
    dtype, accumulator = _types(a.dtype, b.dtype)
    if not a.shape[-1]:
        return zeros(shape, output).contiguous()
    if dtype is not None:
        a, b = a.astype(dtype), b.astype(dtype)
    a, a_batch, b, b_batch, count = _batches(a, b, shape[:-2])
    if output in (float32, float16, bfloat16):
        out = Output((count, *shape[-2:]), output)
        return product(target, a, a_batch, b, b_batch, count, {**NO_EPILOGUE, "out": out}).reshape(shape)
    return _general_product(a, b, shape, count, a_batch, b_batch, output, accumulator)


def _sum_to(g: Array, shape: tuple[int, ...]) -> Array:
    """The sum over the axes along which an operand of that shape was repeated."""
    missing = g.ndim - len(shape)
    axes = tuple(a for a in range(g.ndim) if a < missing or (shape[a - missing] == 1 and g.shape[a] != 1))
    return g.sum(axes).reshape(shape) if axes else g


def _matmul_vjp(g: Array, out: Array, a: Array, b: Array) -> tuple[Array, Array]:
    return _sum_to(matmul(g, b.mT), a.shape).astype(a.dtype), _sum_to(matmul(a.mT, g), b.shape).astype(b.dtype)


MATMUL = Operation("matmul", rule=_matmul_rule, lower=_matmul_lower, reference=np.matmul, vjp=_matmul_vjp)


def matmul(x: Any, y: Any) -> Array:
    """The matrix product x @ y of the last two axes; leading axes broadcast, arrays of one axis as in NumPy.

    Types: floats, promoted to one and accumulated in fp32 (fp64 of fp64), or int8 and uint8, which give int32.
    """
    left, right = as_operand(x), as_operand(y)
    if not isinstance(left, Array) or not isinstance(right, Array) or not left.ndim or not right.ndim:
        found = [getattr(v, "shape", "a number") for v in (left, right)]
        raise ValueError(f"matmul: shapes {found[0]} and {found[1]}, expected one axis or more; use * for numbers")
    a = left.expand_dims(0) if left.ndim == 1 else left
    b = right.expand_dims(1) if right.ndim == 1 else right
    result = MATMUL(a, b)
    if left.ndim > 1 and right.ndim > 1:
        return result
    batch = result.shape[:-2]
    return result.reshape((*batch, *a.shape[-2:-1] * (left.ndim > 1), *b.shape[-1:] * (right.ndim > 1)))


_operator("matmul", matmul)


def _types(a: DType, b: DType) -> tuple[DType | None, DType]:
    """The operands' common type (None: as they are) and the accumulator's."""
    if a in (int8, uint8) and b in (int8, uint8):
        return None, int32
    if "block" in (a.kind, b.kind):
        raise TypeError(f"matmul of {a} and {b}: weights in blocks are multiplied by nitinol.linear(x, weights)")
    if a.is_int or b.is_int:
        raise TypeError(f"matmul of {a} and {b}: expected floats, or int8 and uint8; cast with .astype()")
    dtype = a if a == b else semantic.promote(a, b, "matmul")
    return dtype, float32 if dtype in (float16, bfloat16) else dtype


def _batches(a: Array, b: Array, batch: tuple[int, ...]) -> tuple[Array, int, Array, int, int]:
    """Operands whose leading axes are one stride each, and how many products there are."""
    a, b = a.broadcast_to(*batch, *a.shape[-2:]), b.broadcast_to(*batch, *b.shape[-2:])
    axes, strides = collapse(batch, [a.strides[:-2], b.strides[:-2]])
    if len(axes) > 1:
        a, b = a.contiguous(), b.contiguous()
        axes, strides = collapse(batch, [a.strides[:-2], b.strides[:-2]])
    if len(axes) == 0:
        return a, 0, b, 0, 1 if 0 not in batch else 0
    return a, strides[0][0], b, strides[1][0], axes[0]


def _general_product(
    a: Array, b: Array, shape: tuple[int, ...], count: int, a_batch: int, b_batch: int, output: DType,
    accumulator: DType,
) -> Array:  # fmt: skip
    m, n, k = shape[-2], shape[-1], a.shape[-1]
    # Tiles that one core's caches hold; more rows use a packed row of b more often, fewer leave more programs to share.
    rows = 128 if m * n >= 1 << 20 else 64
    M, N, K = min(rows, tl.next_power_of_2(m)), min(128, tl.next_power_of_2(n)), min(128, tl.next_power_of_2(k))
    grid = (-(-n // N), -(-m // M), count)
    return launch(
        general_matmul_kernel, grid, a=Strided(a), b=Strided(b), out=Output(shape, output), m=m, n=n, k=k,
        a_batch=a_batch, a_row=a.strides[-2], a_column=a.strides[-1],
        b_batch=b_batch, b_row=b.strides[-2], b_column=b.strides[-1],
        M=M, N=N, K=K, EVEN=m % M == 0 and n % N == 0, EVEN_K=k % K == 0, ACCUMULATOR=accumulator,
        _operations=2 * m * n * k * count,
    )  # fmt: skip


def product(
    target: str, a: Array, a_batch: int, b: Array, b_batch: int, batch: int, epilogue: dict[str, Any]
) -> Array:
    """[..., m, k] @ [..., k, n] of `batch` matrices, a_batch and b_batch elements apart (0: one for all)."""
    (m, k), n = a.shape[-2:], b.shape[-1]
    halves = a.dtype.nbytes == 2 and b.dtype.nbytes == 2 and m >= 128
    most_m, most_n, most_k, warps = matmul_blocks(target, halves, batch * m, n)
    block_m, block_n = min(most_m, tl.next_power_of_2(m)), min(most_n, max(16, tl.next_power_of_2(n)))
    block_k = min(most_k, max(4, tl.next_power_of_2(k)))
    blocks = tl.cdiv(n, block_n), tl.cdiv(m, block_m)
    m_first = target == "cuda"  # the weights of a layer exceed its L2 cache, a prompt's activations do not
    return launch(
        matmul_kernel, (*(blocks[::-1] if m_first else blocks), batch), a=Strided(a), b=Strided(b), m=m, n=n, k=k,
        a_batch=a_batch, a_m=a.strides[-2], a_k=a.strides[-1],
        b_batch=b_batch, b_k=b.strides[-2], b_n=b.strides[-1],
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, EVEN=m % block_m == 0 and n % block_n == 0,
        EVEN_K=k % block_k == 0, M_FIRST=m_first, _operations=2 * batch * m * n * k, _warps=warps, **epilogue,
    )  # fmt: skip


def matmul_blocks(target: str, halves: bool, m: int, n: int) -> tuple[int, int, int, int]:
    """The largest blocks of m, n and k, and warps: of two half operands with 128 rows or more, or of others."""
    if target == "cpu":
        return 64, 64, 128, 0
    if target != "cuda" or not halves:
        return 64, 64, 32, 4
    sizes = (128, 256, 8), (128, 128, 4), (64, 128, 4), (64, 64, 4)
    enough = (size for size in sizes if tl.cdiv(m, size[0]) * tl.cdiv(n, size[1]) >= MULTIPROCESSORS)
    block_m, block_n, warps = next(enough, sizes[-1])
    return block_m, block_n, 64, warps

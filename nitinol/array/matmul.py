"""Matrix products of arrays of floats or bytes."""

from __future__ import annotations

from typing import Any

from nitinol.array import elementwise as e
from nitinol.array.array import Array
from nitinol.array.conversion import as_operand
from nitinol.array.creation import zeros
from nitinol.array.fusion import power_of_two
from nitinol.array.graph import collapse
from nitinol.array.launch import Output, Strided, launch
from nitinol.array.tiles import matmul_kernel
from nitinol.language import semantic
from nitinol.language.types import DType, bfloat16, float16, float32, int8, int32, uint8


def matmul(x: Any, y: Any) -> Array:
    """The matrix product x @ y of the last two axes; leading axes broadcast, arrays of one axis as in NumPy.

    Types: floats, promoted to one and accumulated in fp32 (fp64 of fp64), or int8 and uint8, which give int32.
    """
    left, right = as_operand(x), as_operand(y)
    if left is None or right is None or not left.ndim or not right.ndim:
        found = [getattr(v, "shape", "a number") for v in (x, y)]
        raise ValueError(f"matmul: shapes {found[0]} and {found[1]}, expected one axis or more; use * for numbers")
    shapes = f"{left.shape} and {right.shape}"
    a = left.expand_dims(0) if left.ndim == 1 else left
    b = right.expand_dims(1) if right.ndim == 1 else right
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    if b.shape[-2] != k:
        raise ValueError(f"matmul: shapes {shapes}: the inner extents {k} and {b.shape[-2]} differ")
    dtype, accumulator = _types(left.dtype, right.dtype)
    if dtype is not None:
        a, b = e.astype(a, dtype), e.astype(b, dtype)
    try:
        batch = e.broadcast_shapes("matmul", a.shape[:-2], b.shape[:-2])
    except ValueError:
        raise ValueError(f"matmul: the leading axes of shapes {shapes} do not fit together") from None
    output = dtype or int32
    if k:
        a, a_batch, b, b_batch, count = _batches(a, b, batch)
        result = _product(a, b, (*batch, m, n), count, a_batch, b_batch, output, accumulator)
    else:
        result = zeros((*batch, m, n), output)
    shape = (*batch, *(() if left.ndim == 1 else (m,)), *(() if right.ndim == 1 else (n,)))
    return result.reshape(shape)


def _types(a: DType, b: DType) -> tuple[DType | None, DType]:
    """The operands' common type (None: as they are) and the accumulator's."""
    if a in (int8, uint8) and b in (int8, uint8):
        return None, int32
    if a.is_int or b.is_int:
        raise TypeError(f"matmul of {a} and {b}: expected floats, or int8 and uint8; cast with .astype()")
    dtype = a if a == b else semantic.promote(a, b, "matmul")
    return dtype, float32 if dtype in (float16, bfloat16) else dtype


def _batches(a: Array, b: Array, batch: tuple[int, ...]) -> tuple[Array, int, Array, int, int]:
    """Operands whose leading axes are one stride each, and how many products there are."""
    a, b = a.broadcast_to(*batch, *a.shape[-2:]), b.broadcast_to(*batch, *b.shape[-2:])
    axes, strides = collapse(batch, [a.strides[:-2], b.strides[:-2]])
    if len(axes) > 1:
        a, b = e.contiguous(a), e.contiguous(b)
        axes, strides = collapse(batch, [a.strides[:-2], b.strides[:-2]])
    if len(axes) == 0:
        return a, 0, b, 0, 1 if 0 not in batch else 0
    return a, strides[0][0], b, strides[1][0], axes[0]


def _product(
    a: Array, b: Array, shape: tuple[int, ...], count: int, a_batch: int, b_batch: int, output: DType,
    accumulator: DType,
) -> Array:  # fmt: skip
    m, n, k = shape[-2], shape[-1], a.shape[-1]
    # Tiles that one core's caches hold; more rows use a packed row of b more often, fewer leave more programs to share.
    rows = 128 if m * n >= 1 << 20 else 64
    M, N, K = min(rows, power_of_two(m)), min(128, power_of_two(n)), min(128, power_of_two(k))
    grid = (-(-n // N), -(-m // M), count)
    return launch(
        matmul_kernel, grid, a=Strided(a), b=Strided(b), out=Output(shape, output), m=m, n=n, k=k,
        a_batch=a_batch, a_row=a.strides[-2], a_column=a.strides[-1],
        b_batch=b_batch, b_row=b.strides[-2], b_column=b.strides[-1],
        M=M, N=N, K=K, EVEN=m % M == 0 and n % N == 0, EVEN_K=k % K == 0, ACCUMULATOR=accumulator,
        _operations=2 * m * n * k * count,
    )  # fmt: skip

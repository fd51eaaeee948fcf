"""The tile kernels of array operations that are not generated: rows by index, prefix sums, matrix products."""

# mypy: ignore-errors
# Kernels are checked by the tile compiler; to Python they are not ordinary functions.
from __future__ import annotations

import nitinol.language as tl
from nitinol.language.jit import jit


@jit
def take_kernel(x, index, out, count, extent, inner, BLOCK: tl.constexpr):
    """Program (b, i, o): a block of out[o, i, :] = x[o, index[i], :]. Negative indices count from the end."""
    i = tl.program_id(1)
    place = tl.load(index + i).to(tl.int64)
    place = tl.where(place < 0, place + extent, place)
    tl.device_assert((place >= 0) & (place < extent), "take: an index is out of range")
    place = tl.minimum(tl.maximum(place, 0), extent - 1)
    outer = tl.program_id(2).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < inner
    row = tl.load(x + (outer * extent + place) * inner + at, mask=inside)
    tl.store(out + (outer * count + i) * inner + at, row, mask=inside)


@jit
def update_kernel(state, x, start, count, extent, inner, BLOCK: tl.constexpr):
    """Program (b, i, o): a block of state[o, start + i, :] = x[o, i, :]."""
    i = tl.program_id(1)
    place = tl.load(start).to(tl.int64) + i
    tl.device_assert((place >= 0) & (place < extent), "update_slice: the slice does not fit the array")
    place = tl.minimum(tl.maximum(place, 0), extent - 1)
    outer = tl.program_id(2).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < inner
    row = tl.load(x + (outer * count + i) * inner + at, mask=inside)
    tl.store(state + (outer * extent + place) * inner + at, row, mask=inside)


@jit
def cumsum_kernel(x, out, n, BLOCK: tl.constexpr):
    """One program per row, a block at a time, carrying the sum so far."""
    row = tl.program_id(0).to(tl.int64) * n
    carried = tl.load(x + row) * 0
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        block = tl.load(x + row + at, mask=at < n, other=0)
        tl.store(out + row + at, tl.cumsum(block, 0) + carried, mask=at < n)
        carried += tl.sum(block, 0)


@jit
def matmul_kernel(
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

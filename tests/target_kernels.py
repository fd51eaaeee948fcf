"""Kernels that the tests of several targets share, and memory for them."""

from __future__ import annotations

import nitinol.language as tl
from nitinol.language.jit import jit
from nitinol.language.types import bfloat16


class BFloat16:
    """uint16 memory that kernels see as bfloat16."""

    def __init__(self, array):
        self.array, self.__nitinol_pointer__ = array, (array.ctypes.data, bfloat16)


@jit
def reverse_in_place(x, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n
    value = tl.load(x + (n - 1 - offsets), mask=mask)
    tl.store(x + offsets, value, mask=mask)


@jit
def product(
    a, b, c, K, M: tl.constexpr, N: tl.constexpr, A_TURNED: tl.constexpr, B_TURNED: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, STEP)
    total = tl.zeros((M, N), c.dtype.element_ty)
    for start in range(0, K, STEP):
        if A_TURNED:
            x = tl.load(a + (start + k)[:, None] * M + m[None, :]).trans()
        else:
            x = tl.load(a + m[:, None] * K + (start + k)[None, :])
        if B_TURNED:
            y = tl.load(b + n[:, None] * K + (start + k)[None, :]).trans()
        else:
            y = tl.load(b + (start + k)[:, None] * N + n[None, :])
        total = tl.dot(x, y, total, input_precision=PRECISION)
    tl.store(c + m[:, None] * N + n[None, :], total)

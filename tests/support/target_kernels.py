"""Kernels that the tests of several targets share, and memory for them."""

from __future__ import annotations

import nitinol.language as tl
from nitinol.language.types import bfloat16
from nitinol.runtime.kernel import jit


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
def exchange(a, b, out, n, BLOCK: tl.constexpr):
    """Two pointers change places: what was loaded before the loop is wanted after it."""
    offsets = tl.arange(0, BLOCK)
    first = tl.load(a + offsets)
    to, source = a, b
    for _ in range(n):
        tl.store(to + offsets, tl.load(source + offsets) * 2)
        kept = to
        to = source
        source = kept
    tl.store(out + offsets, first + tl.load(b + offsets))


def exchange_reference(a, b, n):
    """What `exchange` leaves in out, a and b."""
    first, pair = a, [a, b]
    for number in range(n):
        pair[number % 2] = pair[1 - number % 2] * 2
    return first + pair[1], *pair


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

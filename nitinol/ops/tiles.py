"""Small @jit functions that several kernels share: rows with ragged ends, sums of exponentials, tiles side by side and
their parts."""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

import nitinol.language as tl
from nitinol.language.jit import jit


@jit
def load_row(pointer, at, count, EVEN: tl.constexpr, FILL: tl.constexpr = 0.0):
    """pointer[at] in fp32; FILL where `at` is not below `count`, which with EVEN never happens."""
    if EVEN:
        return tl.load(pointer + at).to(tl.float32)
    return tl.load(pointer + at, mask=at < count, other=FILL).to(tl.float32)


@jit
def store_row(pointer, at, count, value, EVEN: tl.constexpr):
    """pointer[at] = value where `at` is below `count`."""
    if EVEN:
        tl.store(pointer + at, value)
    else:
        tl.store(pointer + at, value, mask=at < count)


@jit
def add_exponentials(value, top, total, axis: tl.constexpr):
    """The maximum, and the sum of exp(x - maximum), of what was summed before and the values along an axis."""
    highest = tl.maximum(top, tl.max(value, axis))
    shift = tl.where(highest == float("-inf"), 0.0, highest)  # of nothing but -inf so far: no -inf - -inf
    weights = tl.exp(value - (shift if len(value.shape) == 1 else tl.expand_dims(shift, axis)))
    return highest, total * tl.exp(top - shift) + tl.sum(weights, axis)


@jit
def stack(x, y):
    """[..., n] twice to [..., 2, n]."""
    rank: tl.constexpr = len(x.shape)
    pair = tl.join(x, y)
    if rank == 1:
        return tl.permute(pair, (1, 0))
    if rank == 2:
        return tl.permute(pair, (0, 2, 1))
    return tl.permute(pair, (0, 1, 3, 2))


@jit
def beside(x, y):
    """[..., n] twice to [..., 2 n], x first."""
    return tl.reshape(stack(x, y), (*x.shape[:-1], 2 * x.shape[-1]))


@jit
def part(x, index: tl.constexpr):
    """x[:, index] of a tile [rows, parts, values]: a view, nothing is moved."""
    count: tl.constexpr = x.shape[1]
    x = tl.permute(x, (0, 2, 1))
    for bit in tl.static_range(count.bit_length() - 1):
        pair = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // 2, 2)))
        x = pair[(index >> bit) & 1]
    return tl.reshape(x, (x.shape[0], x.shape[1]))

"""The library that is written in tiles: reductions by name, softmax, cumulative sums, index arithmetic, sorting."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from nitinol.language.combine import associative_scan, reduce
from nitinol.language.core import known, known_axis, member, tensor
from nitinol.language.math import exp, fdiv, maximum, minimum
from nitinol.language.operations import arange, full, where, zeros
from nitinol.language.semantic import cast, compare, is_number, to_tensor
from nitinol.language.shapes import broadcast_to, expand_dims, gather, join, reshape
from nitinol.language.types import DType, bfloat16, float32, int1, int32, uint32


def eq(x: Any, y: Any) -> tensor:
    """`x == y` as a function, for which type checkers know the result."""
    return compare("eq", x, y)


@member
def cdiv(x: Any, div: Any) -> Any:
    """x / div rounded up, of integers; at compile time if both are known."""
    return (x + (div - 1)) // div


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (int(n) - 1).bit_length() if n > 1 else 1


@member
def sigmoid(x: Any) -> tensor:
    """1 / (1 + exp(-x)), elementwise."""
    return 1 / (exp(-x) + 1)


@member
def softmax(x: Any, dim: Any = None, keep_dims: Any = False, ieee_rounding: Any = False) -> tensor:
    """exp(x - max) / sum along an axis, by default the first."""
    axis = 0 if dim is None else dim
    shifted = x - max(x, axis, keep_dims=True)
    numerator = exp(shifted)
    return fdiv(numerator, sum(numerator, axis, keep_dims=True))


def _wide(x: Any) -> tensor:
    """Sums and products of bf16 are taken in fp32."""
    x = to_tensor(x, "the operand of a reduction")
    return cast(x, float32) if x.dtype == bfloat16 else x


@member
def sum(input: Any, axis: Any = None, keep_dims: Any = False, dtype: Any = None) -> tensor:
    """The sum along an axis or of everything. Integers below 32 bits sum as int32 or uint32, bf16 as fp32."""
    x = to_tensor(input, "the operand of sum")
    assert isinstance(x.dtype, DType)
    target = known(dtype, "the dtype of sum")
    if target is None and x.dtype.is_int and x.dtype.bits < 32:
        target = int32 if x.dtype.is_signed else uint32
    return reduce(_wide(x) if target is None else cast(x, target), axis, operator.add, keep_dims=keep_dims)


@member
def xor_sum(input: Any, axis: Any = None, keep_dims: Any = False) -> tensor:
    """The exclusive or of integers along an axis or of everything."""
    return reduce(input, axis, operator.xor, keep_dims=keep_dims)


@member
def reduce_or(input: Any, axis: Any = None, keep_dims: Any = False) -> tensor:
    """The bitwise or of integers along an axis or of everything."""
    return reduce(input, axis, operator.or_, keep_dims=keep_dims)


def _extreme(
    input: Any, axis: Any, keep_dims: Any, combine: Callable[[Any, Any], tensor], better: Callable[[Any, Any], Any],
    indices: bool, tie_break_left: bool,
) -> Any:  # fmt: skip
    x = _wide(input)
    assert isinstance(x.dtype, DType)
    if not indices:
        if x.dtype.bits < 32:
            x = cast(x, float32 if x.dtype.is_float else int32)
        return reduce(x, axis, combine, keep_dims=keep_dims)
    flat = known(axis, "the axis") is None
    rank = len(x.shape)
    if flat:
        x, place = reshape(x, (x.numel,)), 0
    else:
        place = known_axis(axis, rank, "a reduction")
    index = _lanes(x, place)

    def pick(value1: Any, index1: Any, value2: Any, index2: Any) -> tuple[tensor, tensor]:
        first = better(value1, value2)
        if tie_break_left:
            first = first | (eq(value1, value2) & (index1 < index2))
        return where(first, value1, value2), where(first, index1, index2)

    value, where_found = reduce((x, index), place, pick, keep_dims=keep_dims and not flat)
    if flat and keep_dims:
        value, where_found = (reshape(v, (1,) * rank) for v in (value, where_found))
    return value, where_found


@member
def max(
    input: Any, axis: Any = None, return_indices: Any = False, return_indices_tie_break_left: Any = True,
    keep_dims: Any = False,
) -> Any:  # fmt: skip
    """The maximum along an axis or of everything; with `return_indices` also its place (the first among equals)."""
    return _extreme(
        input, axis, known(keep_dims, "keep_dims"), maximum, operator.gt, known(return_indices, "return_indices"),
        known(return_indices_tie_break_left, "return_indices_tie_break_left"),
    )  # fmt: skip


@member
def min(
    input: Any, axis: Any = None, return_indices: Any = False, return_indices_tie_break_left: Any = True,
    keep_dims: Any = False,
) -> Any:  # fmt: skip
    """The minimum along an axis or of everything; with `return_indices` also its place (the first among equals)."""
    return _extreme(
        input, axis, known(keep_dims, "keep_dims"), minimum, operator.lt, known(return_indices, "return_indices"),
        known(return_indices_tie_break_left, "return_indices_tie_break_left"),
    )  # fmt: skip


@member
def argmax(input: Any, axis: Any, tie_break_left: Any = True, keep_dims: Any = False) -> tensor:
    """The place of the maximum along an axis, int32; the first among equals."""
    return max(input, axis, True, tie_break_left, keep_dims)[1]


@member
def argmin(input: Any, axis: Any, tie_break_left: Any = True, keep_dims: Any = False) -> tensor:
    """The place of the minimum along an axis, int32; the first among equals."""
    return min(input, axis, True, tie_break_left, keep_dims)[1]


@member
def cumsum(input: Any, axis: Any = 0, reverse: Any = False, dtype: Any = None) -> tensor:
    """Sums of all prefixes along an axis."""
    x = _wide(input) if dtype is None else cast(input, known(dtype, "the dtype of cumsum"))
    return associative_scan(x, axis, operator.add, reverse)


@member
def cumprod(input: Any, axis: Any = 0, reverse: Any = False) -> tensor:
    """Products of all prefixes along an axis."""
    return associative_scan(_wide(input), axis, operator.mul, reverse)


@member
def ravel(x: Any, can_reorder: Any = False) -> tensor:
    """All elements in row-major order as one axis."""
    return reshape(x, (to_tensor(x).numel,))


def _lanes(x: tensor, axis: int) -> tensor:
    """The index along an axis, in the tile's shape."""
    index = arange(0, x.shape[axis])
    others = tuple(i for i in range(len(x.shape)) if i != axis)
    return broadcast_to(expand_dims(index, others) if others else index, x.shape)


@member
def flip(x: Any, dim: Any = None) -> tensor:
    """The elements in reverse order along an axis, by default the last."""
    axis = known_axis(-1 if dim is None else dim, len(x.shape), "flip")
    return gather(x, x.shape[axis] - 1 - _lanes(x, axis), axis)


@member
def sort(x: Any, dim: Any = None, descending: Any = False) -> tensor:
    """The elements in order along an axis, by default the last (Batcher's bitonic network)."""
    axis = known_axis(-1 if dim is None else dim, len(x.shape), "sort")
    lane, extent = _lanes(x, axis), x.shape[axis]
    down = bool(known(descending, "descending"))
    size = 2
    while size <= extent:
        last = size == extent
        rising = full(x.shape, not down, int1) if last else eq(lane & size, size if down else 0)
        distance = size // 2
        while distance:
            other = gather(x, lane ^ distance, axis)
            is_low = eq(lane & distance, 0)
            low, high = where(is_low, x, other), where(is_low, other, x)
            x = where(where(rising, low > high, low < high), other, x)
            distance //= 2
        size *= 2
    return x


def interleave(a: Any, b: Any) -> tensor:
    """The elements of two tiles in turn along the last axis: a[0], b[0], a[1], ..."""
    pairs = join(a, b)
    rows = pairs.shape[:-2]
    return reshape(pairs, (*rows, 2 * pairs.shape[-2])) if len(pairs.shape) > 1 else pairs


def zeros_like(input: Any) -> tensor:
    """Zeros of the shape and type of another tensor."""
    x = to_tensor(input)
    return zeros(x.shape, x.dtype)


def full_like(input: Any, value: Any) -> tensor:
    """One value in the shape and type of another tensor."""
    x = to_tensor(input)
    return full(x.shape, value, x.dtype)


def swizzle2d(i: Any, j: Any, size_i: Any, size_j: Any, size_g: Any) -> tuple[Any, Any]:
    """Row-major indices of a size_i x size_j grid, reordered column by column within groups of size_g rows."""
    flat = i * size_j + j
    per_group = size_g * size_j
    first = flat // per_group * size_g
    left = size_i - first
    rows = minimum(left, size_g) if not (is_number(left) and is_number(size_g)) else (left if left < size_g else size_g)
    return first + flat % per_group % rows, flat % per_group // rows

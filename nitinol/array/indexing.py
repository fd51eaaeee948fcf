"""Rows by index, and arrays put together and taken apart."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from nitinol.array import elementwise as e
from nitinol.array.array import Array
from nitinol.array.conversion import array, as_operand
from nitinol.array.graph import Value, whole
from nitinol.array.launch import Output, launch
from nitinol.array.tiles import take_kernel, update_kernel
from nitinol.language import semantic
from nitinol.language.types import DType


def take(x: Array, index: Any, axis: int = 0) -> Array:
    """Slices of x along an axis by integer indices (any shape, which takes the axis' place): x[index] on one axis.

    An index outside the axis is an error when the operation runs.
    """
    axis = x._axis(axis, "take")
    indices = as_operand(index if not isinstance(index, int) else array(index))
    assert indices is not None
    if not indices.dtype.is_int or indices.dtype.kind == "bool":
        raise TypeError(f"take: the indices are of type {indices.dtype}, expected integers")
    shape = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    outer, inner = math.prod(x.shape[:axis]), math.prod(x.shape[axis + 1 :])
    if indices.size and not x.shape[axis]:
        raise IndexError(f"take: an array of shape {x.shape} has nothing along axis {axis}")
    block = 1 << (max(min(inner, 1024), 1) - 1).bit_length()
    grid = (-(-inner // block), indices.size, outer)
    return launch(
        take_kernel, grid, x=x, index=indices, out=Output(shape, x.dtype), count=indices.size, extent=x.shape[axis],
        inner=inner, BLOCK=block, _bytes=2 * math.prod(shape) * x.dtype.nbytes + indices.nbytes,
    )  # fmt: skip


def embedding(weights: Array, tokens: Any) -> Array:
    """Rows of [vocabulary, columns] by token ids of any shape: [*tokens.shape, columns]."""
    return take(weights, tokens, 0)


def concatenate(arrays: Sequence[Any], axis: int = 0) -> Array:
    """Arrays after each other along an axis; their other extents are equal, their types promote."""
    parts = [as_operand(a) for a in arrays]
    if not parts or any(p is None for p in parts):
        raise ValueError(f"concatenate: expected one array or more, found {arrays!r}")
    found: list[Array] = [p for p in parts if p is not None]
    shapes = [a.shape for a in found]
    rank = found[0].ndim
    axis = operator.index(axis)
    if not rank or not -rank <= axis < rank:
        raise ValueError(f"concatenate: axis {axis} is out of range for shapes {' and '.join(map(str, shapes))}")
    axis %= rank
    rest = {(len(s), s[:axis], s[axis + 1 :]) for s in shapes}
    if len(rest) > 1:
        raise ValueError(
            f"concatenate: shapes {' and '.join(map(str, shapes))} differ in another axis than {axis}"
        )
    dtype: DType = found[0].dtype
    for a in found[1:]:
        dtype = dtype if a.dtype == dtype else semantic.promote(dtype, a.dtype, "concatenate")
    total = sum(s[axis] for s in shapes)
    result = Array(whole(Value((*shapes[0][:axis], total, *shapes[0][axis + 1 :]), dtype)))
    start = 0
    for a in found:
        stop = start + a.shape[axis]
        if a.size:
            e.assign(result[(slice(None),) * axis + (slice(start, stop),)], a)
        start = stop
    return result


def stack(arrays: Sequence[Any], axis: int = 0) -> Array:
    """Arrays of one shape along a new axis."""
    parts = [a for a in map(as_operand, arrays) if a is not None]
    if not parts or any(a.shape != parts[0].shape for a in parts):
        raise ValueError(f"stack: expected arrays of one shape, found {' and '.join(str(a.shape) for a in parts)}")
    return concatenate([a.expand_dims(axis) for a in parts], axis)


def split(x: Array, parts: int | Sequence[int], axis: int = 0) -> list[Array]:
    """Views of so many equal parts along an axis, or of what lies between the given positions."""
    axis = x._axis(axis, "split")
    extent = x.shape[axis]
    if isinstance(parts, int):
        if parts < 1 or extent % parts:
            raise ValueError(f"split: axis {axis} of an array of shape {x.shape} does not divide into {parts} parts")
        places = [extent // parts * i for i in range(1, parts)]
    else:
        places = [operator.index(p) for p in parts]
    bounds = [0, *places, extent]
    before = (slice(None),) * axis
    return [x[(*before, slice(a, b))] for a, b in pairwise(bounds)]


def repeat(x: Array, count: int, axis: int) -> Array:
    """Each slice along an axis so many times in a row."""
    axis = x._axis(axis, "repeat")
    wide = x.expand_dims(axis + 1)
    wide = wide.broadcast_to(*wide.shape[: axis + 1], count, *wide.shape[axis + 2 :])
    return wide.reshape(*x.shape[:axis], x.shape[axis] * count, *x.shape[axis + 1 :])


def outer(x: Array, y: Array) -> Array:
    """x[i] * y[j] of two arrays of one axis each."""
    if x.ndim != 1 or y.ndim != 1:
        raise ValueError(f"outer: shapes {x.shape} and {y.shape}, expected one axis each")
    return e.multiply(x.expand_dims(1), y.expand_dims(0))


def update_slice(state: Array, x: Array, start: Any, axis: int = 0) -> Array:
    """Replaces state[..., start : start + n, ...] along an axis in place by x, of extent n there; returns the state.

    `start` is an integer or an Array with one integer, which may change from run to run of a compiled function; the
    state is then contiguous, and a slice that does not fit is an error when the operation runs.
    """
    from nitinol.array.launch import InPlace

    axis = state._axis(axis, "update_slice")
    count = x.shape[axis] if x.ndim == state.ndim else -1
    if count < 0 or x.shape[:axis] != state.shape[:axis] or x.shape[axis + 1 :] != state.shape[axis + 1 :]:
        raise ValueError(f"update_slice: shapes {state.shape} and {x.shape} may differ only along axis {axis}")
    if not isinstance(start, Array):
        place = operator.index(start)
        if not 0 <= place <= state.shape[axis] - count:
            raise IndexError(f"update_slice: {place}..{place + count} does not fit axis {axis} of shape {state.shape}")
        state[(slice(None),) * axis + (slice(place, place + count),)].assign(x)
        return state
    if not state.is_contiguous or start.size != 1 or not start.dtype.is_int:
        raise ValueError(
            f"update_slice: a start of shape {start.shape} and type {start.dtype} in a state with strides "
            f"{state.strides}; expected one integer and a contiguous state"
        )
    outer, inner = math.prod(state.shape[:axis]), math.prod(state.shape[axis + 1 :])
    block = 1 << (max(min(inner, 1024), 1) - 1).bit_length()
    launch(
        update_kernel, (-(-inner // block), count, outer), state=InPlace(state), x=e.astype(x, state.dtype),
        start=start, count=count, extent=state.shape[axis], inner=inner, BLOCK=block, _bytes=2 * x.nbytes,
    )  # fmt: skip
    return state

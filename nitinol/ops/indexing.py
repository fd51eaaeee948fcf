"""Rows by index, arrays put together, and updates in place."""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc,has-type"

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

import nitinol.language as tl
from nitinol.graph.array import Array, method, whole_array
from nitinol.graph.conversion import array, as_operand
from nitinol.graph.launch import InPlace, Output, launch
from nitinol.graph.nodes import Value, record
from nitinol.graph.operation import Form, Operation, known_form, remember
from nitinol.graph.views import Layout, broadcast_layout, broadcast_shapes
from nitinol.language import semantic
from nitinol.language.jit import jit
from nitinol.language.types import DType
from nitinol.ops.creation import zeros
from nitinol.ops.elementwise import ASTYPE, COPY, assigned_type

# --------------------------------------------------------------------------------------------------- rows by index


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
def scatter_sum_kernel(
    x, index, out, count, extent, inner, BLOCK: tl.constexpr, INDICES: tl.constexpr, SUM: tl.constexpr
):
    """Program (b, e, o): a block of out[o, e, :] = the sum of x[o, i, :] over all i with index[i] = e, in their order.

    It reads all indices, INDICES at a time, so that no two programs write one place and sums do not depend on luck.
    """
    row = tl.program_id(1)
    outer = tl.program_id(2).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < inner
    total = tl.zeros((BLOCK,), SUM)
    for start in range(0, count, INDICES):
        lane = start + tl.arange(0, INDICES)
        place = tl.load(index + lane, mask=lane < count, other=0).to(tl.int64)
        place = tl.where(place < 0, place + extent, place)
        found = tl.sum(((place == row) & (lane < count)).to(tl.int32))
        if found > 0:
            for i in range(start, tl.minimum(start + INDICES, count)):
                one = tl.load(index + i).to(tl.int64)
                if tl.where(one < 0, one + extent, one) == row:
                    total += tl.load(x + (outer * count + i) * inner + at, mask=inside, other=0).to(SUM)
    tl.store(out + (outer * extent + row) * inner + at, total, mask=inside)


def _take_rule(x: Array, indices: Array, axis: int) -> tuple[tuple[int, ...], DType]:
    if not indices.dtype.is_int or indices.dtype.kind == "bool":
        raise TypeError(f"take: the indices are of type {indices.dtype}, expected integers")
    if indices.size and not x.shape[axis]:
        raise IndexError(f"take: an array of shape {x.shape} has nothing along axis {axis}")
    return (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]), x.dtype


def _take_lower(target: str, x: Array, indices: Array, axis: int) -> Array:
    shape = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    outer, inner = math.prod(x.shape[:axis]), math.prod(x.shape[axis + 1 :])
    block = tl.next_power_of_2(max(min(inner, 1024), 1))
    return launch(
        take_kernel, (tl.cdiv(inner, block), indices.size, outer), x=x, index=indices, out=Output(shape, x.dtype),
        count=indices.size, extent=x.shape[axis], inner=inner, BLOCK=block,
        _bytes=2 * math.prod(shape) * x.dtype.nbytes + indices.nbytes,
    )  # fmt: skip


def _scatter_sum_lower(target: str, x: Array, indices: Array, axis: int, extent: int) -> Array:
    before, after = x.shape[:axis], x.shape[axis + indices.ndim :]
    outer, inner = math.prod(before), math.prod(after)
    block = tl.next_power_of_2(max(min(inner, 1024), 1))
    return launch(
        scatter_sum_kernel, (tl.cdiv(inner, block), extent, outer), x=x, index=indices,
        out=Output((*before, extent, *after), x.dtype), count=indices.size, extent=extent, inner=inner, BLOCK=block,
        INDICES=64, SUM=tl.float64 if x.dtype == tl.float64 else tl.float32,
    )  # fmt: skip


def _scatter_sum_reference(x: np.ndarray, indices: np.ndarray, axis: int, extent: int) -> np.ndarray:
    rows = np.moveaxis(x.reshape(*x.shape[:axis], indices.size, *x.shape[axis + indices.ndim :]), axis, 0)
    out = np.zeros((extent, *rows.shape[1:]))
    np.add.at(out, indices.reshape(-1), rows)
    return np.moveaxis(out, 0, axis)


TAKE = Operation(
    "take", rule=_take_rule, lower=_take_lower, reference=lambda x, indices, axis: np.take(x, indices, axis),
    vjp=lambda g, out, x, indices, axis: (SCATTER_SUM(g, indices, axis=axis, extent=x.shape[axis]), None),
)  # fmt: skip
SCATTER_SUM = Operation(
    "scatter_sum", lower=_scatter_sum_lower, reference=_scatter_sum_reference,
    rule=lambda x, indices, axis, extent: (
        (*x.shape[:axis], extent, *x.shape[axis + indices.ndim :]), x.dtype
    ),
    vjp=lambda g, out, x, indices, axis, extent: (TAKE(g, indices, axis=axis), None),
)  # fmt: skip


@method
def take(x: Any, index: Any, axis: int = 0) -> Array:
    """Slices of x along an axis by integer indices (any shape, which takes the axis' place): x[index] on one axis.

    An index outside the axis is an error when the operation runs.
    """
    x = as_operand(x)
    indices = index if isinstance(index, Array) else array(index)
    return TAKE(x, indices, axis=x.axis(axis, "take"))


# ---------------------------------------------------------------------------------------------------- put together


def _concatenate_rule(*arrays: Array, axis: int, dtype: DType) -> tuple[tuple[int, ...], DType]:
    first = arrays[0].shape
    return (*first[:axis], sum(a.shape[axis] for a in arrays), *first[axis + 1 :]), dtype


def _concatenate_lower(target: str, *arrays: Array, axis: int, dtype: DType) -> Array:
    result = whole_array(Value(*_concatenate_rule(*arrays, axis=axis, dtype=dtype)))
    start = 0
    for a in arrays:
        stop = start + a.shape[axis]
        if a.size:
            assign(result[(slice(None),) * axis + (slice(start, stop),)], a)
        start = stop
    return result


def _concatenate_vjp(g: Array, out: Array, *arrays: Array, axis: int, dtype: DType) -> list[Array]:
    found, start = [], 0
    for a in arrays:
        found.append(g[(slice(None),) * axis + (slice(start, start + a.shape[axis]),)])
        start += a.shape[axis]
    return found


CONCATENATE = Operation(
    "concatenate", rule=_concatenate_rule, lower=_concatenate_lower, vjp=_concatenate_vjp,
    reference=lambda *arrays, axis, dtype: np.concatenate(arrays, axis),
)  # fmt: skip


def concatenate(arrays: Sequence[Any], axis: int = 0) -> Array:
    """Arrays after each other along an axis; their other extents are equal, their types promote."""
    found = [as_operand(a) for a in arrays]
    if not found or not all(isinstance(p, Array) for p in found):
        raise ValueError(f"concatenate: expected one array or more, found {arrays!r}")
    shapes = [a.shape for a in found]
    rank = found[0].ndim
    axis = operator.index(axis)
    if not rank or not -rank <= axis < rank:
        raise ValueError(f"concatenate: axis {axis} is out of range for shapes {' and '.join(map(str, shapes))}")
    axis %= rank
    if len({(len(s), s[:axis], s[axis + 1 :]) for s in shapes}) > 1:
        raise ValueError(f"concatenate: shapes {' and '.join(map(str, shapes))} differ in another axis than {axis}")
    dtype: DType = found[0].dtype
    for a in found[1:]:
        dtype = dtype if a.dtype == dtype else semantic.promote(dtype, a.dtype, "concatenate")
    return CONCATENATE(*found, axis=axis, dtype=dtype)


def stack(arrays: Sequence[Any], axis: int = 0) -> Array:
    """Arrays of one shape along a new axis."""
    parts = [as_operand(a) for a in arrays]
    if not parts or any(a.shape != parts[0].shape for a in parts):
        raise ValueError(f"stack: expected arrays of one shape, found {' and '.join(str(a.shape) for a in parts)}")
    return concatenate([a.expand_dims(axis) for a in parts], axis)


def repeat(x: Array, count: int, axis: int) -> Array:
    """Each slice along an axis so many times in a row."""
    axis = x.axis(axis, "repeat")
    wide = x.expand_dims(axis + 1)
    wide = wide.broadcast_to(*wide.shape[: axis + 1], count, *wide.shape[axis + 2 :])
    return wide.reshape(*x.shape[:axis], x.shape[axis] * count, *x.shape[axis + 1 :])


def outer(x: Array, y: Array) -> Array:
    """x[i] * y[j] of two arrays of one axis each."""
    if x.ndim != 1 or y.ndim != 1:
        raise ValueError(f"outer: shapes {x.shape} and {y.shape}, expected one axis each")
    return x.expand_dims(1) * y.expand_dims(0)


# -------------------------------------------------------------------------------------------------- views, backwards


def _scatter_view_lower(target: str, x: Array, shape: tuple[int, ...], layout: Layout) -> Array:
    result = zeros(shape, x.dtype).contiguous()
    assign(result.looking(layout.shape, layout.strides, layout.offset), x)
    return result


SCATTER_VIEW = Operation(
    "scatter_view", rule=lambda x, shape, layout: (shape, x.dtype), lower=_scatter_view_lower,
    vjp=lambda g, out, x, shape, layout: (g.looking(layout.shape, layout.strides, layout.offset),),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------- in place


@method
def assign(self: Array, value: Any) -> Array:
    """Replaces the elements in place (cast to this array's type, broadcast to its shape); returns the array.

    Other arrays that view the same memory see the new elements; operations recorded before see the old ones.
    """
    layout, source = self.layout, as_operand(value)
    if self.is_quantized:
        raise TypeError(f"assign to an array that is stored as {self.dtype}: blocks are not updated in place")
    if 0 in layout.strides and any(s == 0 and n > 1 for s, n in zip(layout.strides, layout.shape)):
        raise ValueError(f"assign to a broadcast view of shape {layout.shape}: several elements share one place")
    if not isinstance(source, Array):
        assigned_type("assign", source, layout.dtype)
        operand, given = source, semantic.promote(semantic.number_type(source), layout.dtype, "+", True, False)
        operation = COPY if given == layout.dtype else ASTYPE
    else:
        if broadcast_shapes("assign", layout.shape, source.shape) != layout.shape:
            raise ValueError(f"assign: an array of shape {source.shape} does not fit the target's shape {layout.shape}")
        if source.value is self.value and source.layout != layout:
            source = source.copy()  # else the kernel could overwrite what it has yet to read
        operand, given = source.value, broadcast_layout(source.layout, layout.shape)
        operation = COPY if source.dtype == layout.dtype else ASTYPE
    key = ("assign", operation, given, layout)
    form = known_form(key)
    if form is None:
        attributes = {} if operation is COPY else {"dtype": layout.dtype}
        form = remember(key, Form(operation, attributes, (given, layout), (), (1,)))
    record(form, (operand, self.value))
    return self


@method
def __setitem__(self: Array, index: Any, value: Any) -> None:
    target = self[index]
    if isinstance(value, Array) and value.value is target.value and value.layout == target.layout:
        return  # `x[i] += y` has assigned already
    if target.value is not self.value:
        raise IndexError("assignment through an integer array is not supported; assign slice by slice")
    target.assign(value)


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


@method
def update_slice(state: Array, x: Array, start: Any, axis: int = 0) -> Array:
    """Replaces state[..., start : start + n, ...] along an axis in place by x, of extent n there; returns the state.

    `start` is an integer or an Array with one integer, which may change from run to run of a compiled function; the
    state is then contiguous, and a slice that does not fit is an error when the operation runs.
    """
    axis = state.axis(axis, "update_slice")
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
    block = tl.next_power_of_2(max(min(inner, 1024), 1))
    launch(
        update_kernel, (tl.cdiv(inner, block), count, outer), state=InPlace(state), x=x.astype(state.dtype),
        start=start, count=count, extent=state.shape[axis], inner=inner, BLOCK=block, _bytes=2 * x.nbytes,
    )  # fmt: skip
    return state

"""Arrays that look at the same memory in another way: slices, transposes, broadcasts, reshapes. No copy."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from nitinol.graph.array import Array, attribute, method
from nitinol.graph.dtypes import as_dtype
from nitinol.graph.views import broadcast_layout, layout_of, reshape_layout, row_major

Index = Any  # int, slice, None, Ellipsis, an integer array on one axis, or a tuple of these


@method
def reshape(self: Array, *shape: Any) -> Array:
    """The elements in row-major order under another shape; one extent may be -1. A view where strides allow."""
    wanted = _shape_of(shape)
    unknown = [i for i, n in enumerate(wanted) if n == -1]
    rest = math.prod(n for n in wanted if n != -1)
    if len(unknown) == 1 and rest and self.size % rest == 0:
        wanted = tuple(self.size // rest if n == -1 else n for n in wanted)
    if min(wanted, default=0) < 0 or math.prod(wanted) != self.size:
        raise ValueError(f"reshape of an array of shape {self.shape} to {wanted}: {self.size} elements do not fit")
    if self.is_quantized and wanted[-1:] != self.shape[-1:]:
        raise _whole_rows("reshape", self)
    layout = reshape_layout(self.layout, wanted)
    return Array(self.value, layout) if layout is not None else self.contiguous().reshape(wanted)


@method
def flatten(self: Array) -> Array:
    """All elements in row-major order along one axis."""
    return self.reshape(-1) if self.size else self.reshape(0)


@method
def permute(self: Array, *axes: Any) -> Array:
    """Axes in another order: result axis i is this array's axis axes[i]."""
    order = [self.axis(a, "permute") for a in _shape_of(axes)]
    if sorted(order) != list(range(self.ndim)):
        raise ValueError(f"permute of an array of shape {self.shape}: {tuple(order)} does not name each axis once")
    if self.is_quantized:
        raise _whole_rows("permute", self)
    return self.looking(tuple([self.shape[a] for a in order]), tuple([self.strides[a] for a in order]))


@method
def transpose(self: Array, *axes: Any) -> Array:
    """Axes reversed, or in the order given."""
    return self.permute(*(axes or tuple(reversed(range(self.ndim)))))


@method
def swapaxes(self: Array, a: int, b: int) -> Array:
    """Two axes exchanged."""
    order = list(range(self.ndim))
    a, b = self.axis(a, "swapaxes"), self.axis(b, "swapaxes")
    order[a], order[b] = order[b], order[a]
    return self.permute(order)


def _reversed_axes(self: Array) -> Array:
    """Axes reversed."""
    return self.transpose()


def _exchanged_axes(self: Array) -> Array:
    """The last two axes exchanged."""
    return self.swapaxes(-1, -2)


attribute("T", property(_reversed_axes))
attribute("mT", property(_exchanged_axes))


@method
def broadcast_to(self: Array, *shape: Any) -> Array:
    """Missing leading axes added and extents of 1 repeated, as a view."""
    wanted = _shape_of(shape)
    have = (1,) * (len(wanted) - self.ndim) + self.shape
    if len(have) != len(wanted) or any(h not in (1, w) for h, w in zip(have, wanted)):
        raise ValueError(f"broadcast_to: an array of shape {self.shape} cannot be broadcast to {wanted}")
    return Array(self.value, broadcast_layout(self.layout, wanted))


@method
def expand_dims(self: Array, axis: int) -> Array:
    """A new axis of extent 1 at this place of the result."""
    place = operator.index(axis)
    if not -self.ndim - 1 <= place <= self.ndim:
        raise ValueError(f"expand_dims: axis {axis} is out of range for an array of shape {self.shape}")
    place %= self.ndim + 1
    shape, strides = self.shape, self.strides
    return self.looking((*shape[:place], 1, *shape[place:]), (*strides[:place], 0, *strides[place:]))


@method
def squeeze(self: Array, axis: int | None = None) -> Array:
    """Without the axes of extent 1, or without that axis."""
    gone = [i for i, n in enumerate(self.shape) if n == 1] if axis is None else [self.axis(axis, "squeeze")]
    if any(self.shape[i] != 1 for i in gone):
        raise ValueError(f"squeeze: axis {axis} of an array of shape {self.shape} is not of extent 1")
    left = [i for i in range(self.ndim) if i not in gone]
    return self.looking(tuple([self.shape[i] for i in left]), tuple([self.strides[i] for i in left]))


@method
def flip(self: Array, axis: int) -> Array:
    """The elements along an axis in reverse, as a view."""
    return self[(slice(None),) * self.axis(axis, "flip") + (slice(None, None, -1),)]


@method
def bitcast(self: Array, dtype: Any) -> Array:
    """The bits read as another type, as a view. The last axis shrinks or grows if the width differs."""
    target = as_dtype(dtype)
    if self.is_quantized:
        raise _whole_rows("bitcast", self)
    a, b = self.dtype.nbytes, target.nbytes
    if a == b:
        return Array(self.value, layout_of(target, self.shape, self.strides, self.layout.offset))
    if not self.shape or not self.is_contiguous or self.shape[-1] * a % b or self.layout.offset * a % b:
        raise ValueError(
            f"bitcast of an array of shape {self.shape} from {self.dtype} to {target}: the last axis must be "
            "contiguous and a whole number of the new elements"
        )
    shape = (*self.shape[:-1], self.shape[-1] * a // b)
    return Array(self.value, layout_of(target, shape, row_major(shape), self.layout.offset * a // b))


@method
def __getitem__(self: Array, index: Index) -> Array:
    """Slices with any step, integers, None, Ellipsis: a view. One integer array (or list) on one axis: a copy
    with the array's axes in place of that axis."""
    shape: list[int] = []
    strides: list[int] = []
    offset = self.layout.offset
    axis = 0
    gather: tuple[int, Any] | None = None
    for entry in _entries(self, index):
        if entry is None:
            shape.append(1)
            strides.append(0)
            continue
        extent, stride = self.shape[axis], self.strides[axis]
        if isinstance(entry, slice):
            start, stop, step = entry.indices(extent)
            count = len(range(start, stop, step))
            shape.append(count)
            strides.append(stride * step)
            offset += start * stride if count else 0
        elif isinstance(entry, (list, np.ndarray, Array)) and not (isinstance(entry, Array) and entry.ndim == 0):
            if gather is not None:
                raise IndexError("an index has more than one integer array; index one axis at a time")
            gather = (len(shape), entry)
            shape.append(extent)
            strides.append(stride)
        else:
            try:
                position = operator.index(entry)
            except TypeError:
                raise IndexError(
                    f"an array is indexed with integers, slices, None, ... or one integer array, found {entry!r}"
                ) from None
            if not -extent <= position < extent:
                raise IndexError(f"index {position} is out of range for axis {axis} of an array of shape {self.shape}")
            offset += position % extent * stride
        axis += 1
    if self.is_quantized and (shape[-1:] != list(self.shape[-1:]) or strides[-1:] != [1] or gather is not None):
        raise _whole_rows("indexing", self)
    result = self.looking(tuple(shape), tuple(strides), offset)
    return result if gather is None else result.take(gather[1], gather[0])


def _entries(x: Array, index: Index) -> list[Any]:
    """One entry an axis, and None for each new one."""
    entries = list(index) if isinstance(index, tuple) else [index]
    given = sum(entry is not None and entry is not Ellipsis for entry in entries)
    if given > x.ndim:
        raise IndexError(f"an array of shape {x.shape} was given {given} indices, it has {x.ndim} axes")
    place = next((i for i, entry in enumerate(entries) if entry is Ellipsis), None)
    if place is None:
        entries += [slice(None)] * (x.ndim - given)
    else:
        entries[place : place + 1] = [slice(None)] * (x.ndim - given)
    if any(entry is Ellipsis for entry in entries):
        raise IndexError("an index has more than one '...'")
    return entries


def split(x: Array, parts: int | Sequence[int], axis: int = 0) -> list[Array]:
    """Views of so many equal parts along an axis, or of what lies between the given positions."""
    axis = x.axis(axis, "split")
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


def _whole_rows(what: str, x: Array) -> ValueError:
    return ValueError(
        f"{what} of an array of shape {x.shape} that is stored as {x.dtype}: only whole rows can be picked; use "
        "nitinol.dequantize(x) first"
    )


def _shape_of(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    """A shape given as one sequence or as several integers."""
    if len(arguments) == 1 and not hasattr(arguments[0], "__index__"):
        arguments = tuple(arguments[0])
    return tuple([operator.index(n) for n in arguments])

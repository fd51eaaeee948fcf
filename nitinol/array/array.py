"""`Array`: a lazy n-dimensional array. Its operations record what to compute; `numpy()`, `item()`, `evaluate()` and
printing compute it."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from nitinol.array import evaluation
from nitinol.array.dtypes import as_dtype, from_bfloat16_bits
from nitinol.array.graph import View, broadcast_view, reshape_view, row_major
from nitinol.array.operators import Operators, _functions
from nitinol.array.program import as_numpy
from nitinol.language.types import DType, bfloat16, int1
from nitinol.runtime.device import Buffer

Index = Any  # int, slice, None, Ellipsis, an integer array on one axis, or a tuple of these


class Array(Operators):
    """Elements of one type under a shape, computed when they are needed.

    Slices (also with steps), transposes, broadcasts and most reshapes are views: no copy, shared memory. Arithmetic
    broadcasts as NumPy's and promotes as the tile language: a Python number never widens an array of its kind,
    int meets float as that float, float16 meets bfloat16 as float16.
    """

    __slots__ = ("__weakref__", "view")
    __array_priority__ = 1000  # NumPy arrays on the left leave the operators to us
    __hash__ = object.__hash__

    def __init__(self, view: View) -> None:
        self.view = view
        view.value.handles += 1

    def __del__(self) -> None:
        if hasattr(self, "view"):
            self.view.value.handles -= 1

    # -------------------------------------------------------------------------------------------- what it is

    @property
    def shape(self) -> tuple[int, ...]:
        return self.view.shape

    @property
    def dtype(self) -> DType:
        return self.view.dtype

    @property
    def strides(self) -> tuple[int, ...]:
        """Distances between neighbours along each axis, in elements (NumPy and DLPack differ: bytes, elements)."""
        return self.view.strides

    @property
    def ndim(self) -> int:
        return len(self.view.shape)

    @property
    def size(self) -> int:
        return self.view.size

    @property
    def nbytes(self) -> int:
        """What the elements hold; a view's memory may be less or more."""
        return self.view.size * self.dtype.nbytes

    @property
    def is_contiguous(self) -> bool:
        return self.view.contiguous

    @property
    def evaluated(self) -> bool:
        """Whether the elements are in memory already."""
        return not self.view.value.pending

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("an array of shape () has no length")
        return self.shape[0]

    def __repr__(self) -> str:
        if not self.evaluated and evaluation.tracing is not None:
            return f"Array(shape={self.shape}, dtype={self.dtype}, not evaluated)"
        text = np.array2string(self.numpy(), separator=", ", prefix="Array(", threshold=200)
        return f"Array({text}, shape={self.shape}, dtype={self.dtype})"

    def __bool__(self) -> bool:
        if self.size != 1:
            raise ValueError(f"an array of shape {self.shape} has no one truth value; use .any() or .all()")
        return bool(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __index__(self) -> int:
        if not self.dtype.is_int or self.size != 1:
            raise TypeError(f"an array of shape {self.shape} and type {self.dtype} is no index; expected one integer")
        return int(self.item())

    def __iter__(self) -> Iterator[Array]:
        return (self[i] for i in range(len(self)))

    # ------------------------------------------------------------------------------------------- evaluation

    def evaluate(self) -> Array:
        """Computes the elements now: one submission, one wait. Returns the array itself."""
        evaluation.evaluate([self.view.value])
        return self

    @property
    def buffer(self) -> Buffer:
        """The device memory of the whole value that this array is a view of; evaluates first."""
        self.evaluate()
        buffer = self.view.value.buffer
        assert buffer is not None
        return buffer

    @property
    def __nitinol_pointer__(self) -> tuple[int, DType]:
        """Address of the first element and its type, for `kernel[grid](array)`."""
        return self.buffer.address + self.view.offset * self.dtype.nbytes, self.dtype

    def numpy(self, copy: bool = True) -> np.ndarray:
        """The elements as a NumPy array (bfloat16 as float32, which holds every value of it).

        copy=False: a read-only window on the memory where the type allows, for reading at once: a compiled function's
        next call overwrites its results, and in-place updates show.
        """
        raw = as_numpy(self.buffer, self.view)
        if self.dtype == bfloat16:
            return from_bfloat16_bits(raw)
        raw = raw.view(np.bool_) if self.dtype == int1 else raw
        if copy:
            return raw.copy()
        raw.flags.writeable = False
        return raw

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        result = self.numpy(copy=copy is not False)
        return result if dtype is None else result.astype(dtype, copy=False)

    def item(self) -> Any:
        """The only element as a Python number."""
        if self.size != 1:
            raise ValueError(f"item() of an array of shape {self.shape}, which has {self.size} elements; expected one")
        return self.numpy(copy=False).item()

    def tolist(self) -> Any:
        """The elements as nested lists of Python numbers."""
        return self.numpy(copy=False).tolist()

    # -------------------------------------------------------------------------------------------- views

    def _with(self, shape: Sequence[int], strides: Sequence[int], offset: int | None = None) -> Array:
        offset = self.view.offset if offset is None else offset
        return Array(View(self.view.value, self.dtype, tuple(shape), tuple(strides), offset))

    def reshape(self, *shape: Any) -> Array:
        """The elements in row-major order under another shape; one extent may be -1. A view where strides allow."""
        wanted = _shape_of(shape)
        unknown = [i for i, n in enumerate(wanted) if n == -1]
        rest = int(np.prod([n for n in wanted if n != -1], dtype=np.int64))
        if len(unknown) == 1 and rest and self.size % rest == 0:
            wanted = tuple(self.size // rest if n == -1 else n for n in wanted)
        if min(wanted, default=0) < 0 or int(np.prod(wanted, dtype=np.int64)) != self.size:
            raise ValueError(f"reshape of an array of shape {self.shape} to {wanted}: {self.size} elements do not fit")
        view = reshape_view(self.view, wanted)
        return Array(view) if view is not None else self.contiguous().reshape(wanted)

    def flatten(self) -> Array:
        """All elements in row-major order along one axis."""
        return self.reshape(-1) if self.size else self.reshape(0)

    def permute(self, *axes: Any) -> Array:
        """Axes in another order: result axis i is this array's axis axes[i]."""
        order = [self._axis(a, "permute") for a in _shape_of(axes)]
        if sorted(order) != list(range(self.ndim)):
            raise ValueError(f"permute of an array of shape {self.shape}: {tuple(order)} does not name each axis once")
        return self._with([self.shape[a] for a in order], [self.strides[a] for a in order])

    def transpose(self, *axes: Any) -> Array:
        """Axes reversed, or in the order given."""
        return self.permute(*(axes or tuple(reversed(range(self.ndim)))))

    def swapaxes(self, a: int, b: int) -> Array:
        """Two axes exchanged."""
        order = list(range(self.ndim))
        a, b = self._axis(a, "swapaxes"), self._axis(b, "swapaxes")
        order[a], order[b] = order[b], order[a]
        return self.permute(order)

    @property
    def T(self) -> Array:
        """Axes reversed."""
        return self.transpose()

    @property
    def mT(self) -> Array:
        """The last two axes exchanged."""
        return self.swapaxes(-1, -2)

    def broadcast_to(self, *shape: Any) -> Array:
        """Missing leading axes added and extents of 1 repeated, as a view."""
        wanted = _shape_of(shape)
        have = (1,) * (len(wanted) - self.ndim) + self.shape
        if len(have) != len(wanted) or any(h not in (1, w) for h, w in zip(have, wanted)):
            raise ValueError(f"broadcast_to: an array of shape {self.shape} cannot be broadcast to {wanted}")
        return Array(broadcast_view(self.view, wanted))

    def expand_dims(self, axis: int) -> Array:
        """A new axis of extent 1 at this place of the result."""
        place = operator.index(axis)
        if not -self.ndim - 1 <= place <= self.ndim:
            raise ValueError(f"expand_dims: axis {axis} is out of range for an array of shape {self.shape}")
        place %= self.ndim + 1
        return self._with(
            (*self.shape[:place], 1, *self.shape[place:]), (*self.strides[:place], 0, *self.strides[place:])
        )

    def squeeze(self, axis: int | None = None) -> Array:
        """Without the axes of extent 1, or without that axis."""
        gone = [i for i, n in enumerate(self.shape) if n == 1] if axis is None else [self._axis(axis, "squeeze")]
        if any(self.shape[i] != 1 for i in gone):
            raise ValueError(f"squeeze: axis {axis} of an array of shape {self.shape} is not of extent 1")
        left = [i for i in range(self.ndim) if i not in gone]
        return self._with([self.shape[i] for i in left], [self.strides[i] for i in left])

    def flip(self, axis: int) -> Array:
        """The elements along an axis in reverse, as a view."""
        return self[(slice(None),) * self._axis(axis, "flip") + (slice(None, None, -1),)]

    def bitcast(self, dtype: Any) -> Array:
        """The bits read as another type, as a view. The last axis shrinks or grows if the width differs."""
        target = as_dtype(dtype)
        a, b = self.dtype.nbytes, target.nbytes
        if a == b:
            return Array(View(self.view.value, target, self.shape, self.strides, self.view.offset))
        if not self.shape or not self.is_contiguous or self.shape[-1] * a % b or self.view.offset * a % b:
            raise ValueError(
                f"bitcast of an array of shape {self.shape} from {self.dtype} to {target}: the last axis must be "
                "contiguous and a whole number of the new elements"
            )
        shape = (*self.shape[:-1], self.shape[-1] * a // b)
        return Array(View(self.view.value, target, shape, row_major(shape), self.view.offset * a // b))

    def __getitem__(self, index: Index) -> Array:
        """Slices with any step, integers, None, Ellipsis: a view. One integer array (or list) on one axis: a copy
        with the array's axes in place of that axis."""
        entries = list(index) if isinstance(index, tuple) else [index]
        given = sum(entry is not None and entry is not Ellipsis for entry in entries)
        if given > self.ndim:
            raise IndexError(f"an array of shape {self.shape} was given {given} indices, it has {self.ndim} axes")
        place = next((i for i, entry in enumerate(entries) if entry is Ellipsis), None)
        if place is None:
            entries += [slice(None)] * (self.ndim - given)
        else:
            entries[place : place + 1] = [slice(None)] * (self.ndim - given)
        if any(entry is Ellipsis for entry in entries):
            raise IndexError("an index has more than one '...'")
        shape: list[int] = []
        strides: list[int] = []
        offset = self.view.offset
        axis = 0
        gather: tuple[int, Any] | None = None
        for entry in entries:
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
                    raise IndexError(
                        f"index {position} is out of range for axis {axis} of an array of shape {self.shape}"
                    )
                offset += position % extent * stride
            axis += 1
        result = self._with(shape, strides, offset)
        if gather is None:
            return result
        return _functions().take(result, gather[1], gather[0])

    # --------------------------------------------------------------------------------------- state in place

    def assign(self, value: Any) -> Array:
        """Replaces the elements in place (cast to this array's type, broadcast to its shape); returns the array.

        Other arrays that view the same memory see the new elements; operations recorded before see the old ones.
        """
        _functions().assign(self, value)
        return self

    def __setitem__(self, index: Index, value: Any) -> None:
        if isinstance(value, Array) and value.view == (target := self[index]).view:
            return  # `x[i] += y` has assigned already
        target = self[index]
        if target.view.value is not self.view.value:
            raise IndexError("assignment through an integer array is not supported; assign slice by slice")
        target.assign(value)

    def _axis(self, axis: Any, what: str) -> int:
        place = operator.index(axis)
        if not -self.ndim <= place < self.ndim:
            raise ValueError(f"{what}: axis {axis} is out of range for an array of shape {self.shape}")
        return place % self.ndim


def _shape_of(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    """A shape given as one sequence or as several integers."""
    if len(arguments) == 1 and not hasattr(arguments[0], "__index__"):
        arguments = tuple(arguments[0])
    return tuple(operator.index(n) for n in arguments)

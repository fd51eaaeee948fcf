"""`Array`: what the user holds of the graph. Its methods are installed by the files of the operations (`method`)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from nitinol.graph.dtypes import FORMAT_OF, BlockType, bytes_of
from nitinol.graph.nodes import Value, View, root, state
from nitinol.graph.views import Layout, Shape, Strides, layout_of, whole_layout
from nitinol.language.types import DType

Function = TypeVar("Function", bound=Callable[..., Any])


class Array:
    """Elements of one type under a shape, computed when they are needed.

    Slices (also with steps), transposes, broadcasts and most reshapes are views: no copy, shared memory. Arithmetic
    broadcasts as NumPy's and promotes as the tile language: a Python number never widens an array of its kind,
    int meets float as that float, float16 meets bfloat16 as float16. An array may be stored in blocks of a format
    (`quantize`): the operations that decode them in registers take it, others say so.
    """

    __slots__ = ("__weakref__", "layout", "value")
    __array_priority__ = 1000  # NumPy arrays on the left leave the operators to us
    __hash__ = object.__hash__

    def __init__(self, value: Value, layout: Layout) -> None:
        self.value = value
        self.layout = layout
        value.handles.append(None)

    def __del__(self) -> None:
        if hasattr(self, "layout"):
            self.value.handles.pop()

    if TYPE_CHECKING:  # what the files of the operations install

        def __getattr__(self, name: str) -> Any: ...

        __add__: Callable[[Any, Any], Array]
        __radd__: Callable[[Any, Any], Array]
        __sub__: Callable[[Any, Any], Array]
        __rsub__: Callable[[Any, Any], Array]
        __mul__: Callable[[Any, Any], Array]
        __rmul__: Callable[[Any, Any], Array]
        __truediv__: Callable[[Any, Any], Array]
        __rtruediv__: Callable[[Any, Any], Array]
        __matmul__: Callable[[Any, Any], Array]
        __neg__: Callable[[Any], Array]
        __gt__: Callable[[Any, Any], Array]
        __ge__: Callable[[Any, Any], Array]
        __lt__: Callable[[Any, Any], Array]
        __le__: Callable[[Any, Any], Array]
        __and__: Callable[[Any, Any], Array]
        __pow__: Callable[[Any, Any], Array]
        __getitem__: Callable[[Any, Any], Array]
        __setitem__: Callable[[Any, Any, Any], None]

    @property
    def view(self) -> View:
        return View(self.value, self.layout)

    @property
    def shape(self) -> Shape:
        return self.layout.shape

    @property
    def dtype(self) -> DType:
        """The element type; of an array that is stored in blocks its BlockType."""
        return self.layout.dtype

    @property
    def format(self) -> str:
        """The name of the storage format, as GGUF's: "Q4_0", "F32", ...; of other plain types the type's name."""
        dtype = self.layout.dtype
        return FORMAT_OF.get(dtype, dtype.name)

    @property
    def strides(self) -> Strides:
        """Distances between neighbours along each axis, in elements (NumPy and DLPack differ: bytes, elements)."""
        return self.layout.strides

    @property
    def ndim(self) -> int:
        return len(self.layout.shape)

    @property
    def size(self) -> int:
        return self.layout.size

    @property
    def nbytes(self) -> int:
        """What the elements hold; a view's memory may be less or more."""
        return bytes_of(self.layout.dtype, self.layout.size)

    @property
    def is_contiguous(self) -> bool:
        return self.layout.contiguous

    @property
    def is_quantized(self) -> bool:
        """Whether the elements are stored in blocks of a format."""
        return isinstance(self.layout.dtype, BlockType)

    @property
    def evaluated(self) -> bool:
        """Whether the elements are in memory already."""
        return not root(self.value).pending

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("an array of shape () has no length")
        return self.shape[0]

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

    def __copy__(self) -> Array:
        """Another array on the same memory."""
        return Array(self.value, self.layout)

    def __deepcopy__(self, memo: Any) -> Array:
        return self.copy()

    def looking(self, shape: Shape, strides: Strides, offset: int | None = None) -> Array:
        """The same memory under another shape, strides and offset."""
        layout = self.layout
        offset = layout.offset if offset is None else offset
        return Array(self.value, layout_of(layout.dtype, tuple(shape), tuple(strides), offset))

    def axis(self, axis: Any, what: str) -> int:
        """An axis from 0 on; ValueError naming the operation `what`."""
        place = operator.index(axis)
        if not -self.ndim <= place < self.ndim:
            raise ValueError(f"{what}: axis {axis} is out of range for an array of shape {self.shape}")
        return place % self.ndim


def whole_array(value: Value) -> Array:
    """An array of all of a value."""
    return Array(value, whole_layout(value.dtype, value.shape))  # type: ignore[arg-type]


def method(function: Function) -> Function:
    """Makes a function a method of Array by the same name."""
    setattr(Array, function.__name__, function)
    return function


def attribute(name: str, value: Any) -> None:
    """Gives Array an attribute: a property, an operator."""
    setattr(Array, name, value)


def tracing() -> bool:
    """Whether this thread is inside a function that `compile` traces, where nothing has elements yet."""
    return state.tracing is not None

"""What a kernel's values are at compile time: `tensor` for run-time values, plain Python objects for known ones.

A kernel is compiled by executing its Python abstractly. Tile operations append IR to the current builder, an object
that the front end sets (`set_builder`) and that offers

    create(kind, operands, result_types, regions=(), **attributes) -> operation with .results
    region(argument_types, function) -> block               function: tensors -> tensors that the region yields
    call(function, arguments) -> value                      calls a @jit function or a tile operation
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from nitinol.language.types import (
    DType,
    PointerType,
    TileType,
    Type,
    element_type,
    shape_of,
    with_element,
    with_shape,
)

MAX_TILE_ELEMENTS = 1 << 20  # Triton's limit; also keeps a typing mistake from compiling for minutes


class _State(threading.local):
    builder: Any = None


_state = _State()


def set_builder(builder: Any) -> Any:
    """Makes `builder` the current one of this thread and returns the previous one (None outside compilation)."""
    previous, _state.builder = _state.builder, builder
    return previous


def builder() -> Any:
    """The current builder; RuntimeError outside a kernel."""
    if _state.builder is None:
        raise RuntimeError("a tile operation was called outside a kernel: call it inside a @jit function")
    return _state.builder


class constexpr:
    """A value known at compile time: an annotation of kernel parameters, and the wrapper that globals need.

    Inside kernels known values are plain Python objects; the wrapper only exists outside.
    """

    def __init__(self, value: Any = None) -> None:
        self.value = unwrap(value)

    def __class_getitem__(cls, _: Any) -> type:
        return cls

    def __repr__(self) -> str:
        return f"constexpr[{self.value!r}]"

    def __bool__(self) -> bool:
        return bool(self.value)

    def __index__(self) -> int:
        return operator.index(self.value)

    def __hash__(self) -> int:
        return hash(self.value)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.value(*arguments, **keywords)

    def __getitem__(self, index: Any) -> Any:
        return self.value[unwrap(index)]


def unwrap(value: Any) -> Any:
    """The plain value of a constexpr, anything else as it is."""
    return value.value if isinstance(value, constexpr) else value


class tensor:
    """A run-time value of a kernel: a scalar (shape ()) or a tile; wraps one IR value.

    Operators follow Triton's promotion rules (semantic.py); tile operations are also methods (`x.sum(0)`).
    """

    __slots__ = ("handle",)
    __hash__ = object.__hash__
    if TYPE_CHECKING:  # the operators are installed by semantic.py
        Binary = Callable[["tensor", Any], "tensor"]
        __add__: Binary
        __radd__: Binary
        __sub__: Binary
        __rsub__: Binary
        __mul__: Binary
        __rmul__: Binary
        __truediv__: Binary
        __rtruediv__: Binary
        __getitem__: Binary
        __floordiv__: Binary
        __mod__: Binary
        __and__: Binary
        __or__: Binary
        __xor__: Binary
        __lshift__: Binary
        __rshift__: Binary
        __lt__: Binary
        __gt__: Binary

        def __neg__(self) -> tensor: ...

        def __invert__(self) -> tensor: ...

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    @property
    def type(self) -> Type:
        return self.handle.type

    @property
    def dtype(self) -> DType | PointerType:
        return element_type(self.handle.type)

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.handle.type)

    @property
    def numel(self) -> int:
        return self.type.size if isinstance(self.type, TileType) else 1

    def __repr__(self) -> str:
        return f"{self.handle.name or 'value'} ({self.type})"

    def __bool__(self) -> bool:
        raise TypeError(f"{self!r} is known only at run time, where a value known at compile time was expected")

    __index__ = __int__ = __float__ = __iter__ = __len__ = __bool__  # type: ignore[assignment]


def emit(kind: str, /, operands: Sequence[tensor], result: Type, **attributes: Any) -> tensor:
    """Appends an operation with one result."""
    return tensor(builder().create(kind, [o.handle for o in operands], [result], **attributes).results[0])


def emit_many(
    kind: str, /, operands: Sequence[tensor], results: Sequence[Type], **attributes: Any
) -> tuple[tensor, ...]:
    """Appends an operation with any number of results."""
    op = builder().create(kind, [o.handle for o in operands], list(results), **attributes)
    return tuple(tensor(r) for r in op.results)


def member(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a tile operation also a method of `tensor`."""
    setattr(tensor, function.__name__, function)
    return function


def known(value: Any, what: str) -> Any:
    """The Python value of an argument that must be known at compile time, also of a run-time constant."""
    value = unwrap(value)
    if isinstance(value, tensor):
        op = value.handle.op
        if op is None or op.kind != "constant":
            raise TypeError(f"{what} must be known at compile time (a constexpr), found {value!r}")
        return op.attributes["value"]
    if isinstance(value, (tuple, list)):
        return tuple(known(v, what) for v in value)
    return value


def known_int(value: Any, what: str) -> int:
    """An integer known at compile time, else TypeError."""
    value = known(value, what)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} must be an integer, found {value!r}")
    return value


def known_shape(shape: Any, what: str) -> tuple[int, ...]:
    """A shape of powers of two within the size limit; an integer stands for one extent."""
    shape = known(shape, f"the shape of {what}")
    extents = shape if isinstance(shape, tuple) else (shape,)
    size = 1
    for extent in extents:
        if isinstance(extent, bool) or not isinstance(extent, int) or extent < 1 or extent & (extent - 1):
            raise ValueError(f"{what}: every extent must be a power of two, found shape {extents}")
        size *= extent
    if size > MAX_TILE_ELEMENTS:
        raise ValueError(f"{what}: shape {extents} has {size} elements, the limit is {MAX_TILE_ELEMENTS}")
    return extents


def known_axis(axis: Any, rank: int, what: str) -> int:
    """An axis of a tile of that rank, counted from the front."""
    axis = known_int(axis, f"the axis of {what}")
    if not -rank <= axis < rank:
        raise ValueError(f"{what}: axis {axis} is out of range for a tile of rank {rank}")
    return axis % rank


class range:
    """`tl.range(start, stop, step)`: a run-time loop. The scheduling hints of Triton are accepted and ignored."""

    def __init__(
        self,
        arg1: Any,
        arg2: Any = None,
        step: Any = 1,
        num_stages: Any = None,
        loop_unroll_factor: Any = None,
        disallow_acc_multi_buffer: Any = False,
        flatten: Any = False,
        warp_specialize: Any = False,
        disable_licm: Any = False,
    ) -> None:
        self.start: Any = 0 if arg2 is None else arg1
        self.end = arg1 if arg2 is None else arg2
        self.step = step


class static_range(range):
    """A loop over integers known at compile time, unrolled: in its body the index is a constexpr."""


def dtype_attribute(type: Type, name: str) -> Any:
    """Triton's attributes of types, as kernels use them (`x.dtype.is_floating()`, `p.type.element_ty`)."""
    element = element_type(type)
    scalar = element if isinstance(element, DType) else None
    predicates = {
        "is_floating": scalar is not None and scalar.is_float,
        "is_standard_floating": scalar is not None and scalar.is_float,
        "is_int": scalar is not None and scalar.is_int,
        "is_integer_type": scalar is not None and scalar.is_int,
        "is_int_signed": scalar is not None and scalar.kind == "int",
        "is_int_unsigned": scalar is not None and scalar.kind in ("uint", "bool"),
        "is_bool": scalar is not None and scalar.kind == "bool",
        "is_int1": scalar is not None and scalar.kind == "bool",
        "is_ptr": not isinstance(type, TileType) and scalar is None,
        "is_block": isinstance(type, TileType),
        "is_fp8": False,
        "is_const": False,
    }
    if name in predicates:
        return lambda: predicates[name]
    if name.startswith("is_") and scalar is not None:  # is_fp16, is_bf16, is_uint8, ...
        return lambda: scalar.name == name[3:]
    if name in ("primitive_bitwidth", "int_bitwidth"):
        return scalar.bits if scalar is not None else 64
    if name == "itemsize":
        return element.nbytes
    if name == "scalar":
        return element
    if name == "element_ty":
        if isinstance(type, TileType):
            return element
        if isinstance(type, PointerType):
            return type.element
        raise AttributeError(f"{type} has no element_ty: it is neither a pointer nor a tile")
    if name == "shape":
        return shape_of(type)
    if name == "numel":
        return type.size if isinstance(type, TileType) else 1
    if name == "name":
        return str(type)
    if name == "with_element_ty":
        return lambda dtype: with_element(type, dtype)
    raise AttributeError(f"the type {type} has no attribute {name!r}")


def block_type(dtype: DType | PointerType, shape: Sequence[int]) -> Type:
    """The type of a tile."""
    return with_shape(dtype, tuple(shape))


def _fold(symbol: Callable[..., Any]) -> Callable[..., constexpr]:
    return lambda *operands: constexpr(symbol(*map(unwrap, operands)))


for _name in "add sub mul truediv floordiv mod pow lshift rshift and_ or_ xor".split():
    _function = getattr(operator, _name)
    _plain = _name.rstrip("_")
    setattr(constexpr, f"__{_plain}__", _fold(_function))
    setattr(constexpr, f"__r{_plain}__", _fold(lambda a, b, f=_function: f(b, a)))
for _name in "eq ne lt le gt ge neg pos invert".split():
    setattr(constexpr, f"__{_name}__", _fold(getattr(operator, _name)))

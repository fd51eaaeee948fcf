"""The typing rules of the tile language: constants, promotion, broadcasting, casts, operators.

The rules are Triton's (triton.language.semantic): the kinds order bool < int < float; a Python number does not widen
a tensor of its own or a higher kind; among floats fp64 > fp32 > fp16, and bf16 with fp16 gives fp16; integers promote
as in C; `/` and `%` of half types compute in fp32; `//` and `%` of integers truncate toward zero as in C.
"""

from __future__ import annotations

from typing import Any

from nitinol.language.core import emit, tensor, unwrap
from nitinol.language.types import (
    DType,
    PointerType,
    bfloat16,
    float16,
    float32,
    float64,
    int1,
    int32,
    int64,
    shape_of,
    uint32,
    uint64,
    with_element,
    with_shape,
)

KIND = {"bool": 0, "int": 1, "uint": 1, "float": 2}
FLOAT_MIN, FLOAT_MAX = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # normal range of fp32


# ------------------------------------------------------------------------------------------------------- constants


def number_type(value: int | float | bool) -> DType:
    """The type of a Python number that becomes a tensor."""
    if isinstance(value, bool):
        return int1
    if isinstance(value, int):
        for dtype, low, high in ((int32, -(2**31), 2**31), (uint32, 0, 2**32), (int64, -(2**63), 2**63)):
            if low <= value < high:
                return dtype
        if 0 <= value < 2**64:
            return uint64
        raise ValueError(f"the integer {value} does not fit into 64 bits")
    magnitude = abs(value)
    fits = magnitude in (0.0, float("inf")) or value != value or FLOAT_MIN <= magnitude <= FLOAT_MAX
    return float32 if fits else float64


def integer_limits(dtype: DType) -> tuple[int, int]:
    """The smallest and the largest value of an integer type."""
    if dtype.is_signed:
        return -(1 << (dtype.bits - 1)), (1 << (dtype.bits - 1)) - 1
    return 0, (1 << dtype.bits) - 1


def constant(value: Any, dtype: DType | PointerType) -> tensor:
    """A scalar constant of that type."""
    if isinstance(dtype, PointerType):
        return cast(constant(value, int64), dtype)
    if dtype.is_float:
        value = float(value)
    elif dtype == int1:
        value = bool(value)
    else:
        low, high = integer_limits(dtype)
        value = int(value)
        if not low <= value <= high:
            raise ValueError(f"the number {value} is out of range for {dtype} ({low} to {high})")
    return emit("constant", (), dtype, value=value)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def to_tensor(value: Any, what: str = "an operand") -> tensor:
    """A tensor as it is, a Python number as a scalar constant, else TypeError."""
    value = unwrap(value)
    if isinstance(value, tensor):
        return value
    if is_number(value):
        return constant(value, number_type(value))
    if isinstance(value, (str, tuple, list)) or value is None:
        raise TypeError(f"{what} must be a tensor or a number, found {value!r}")
    raise TypeError(f"{what} must be a tensor or a number, found {value!r} of type {type(value).__name__}")


def full(shape: tuple[int, ...], value: Any, dtype: DType | PointerType) -> tensor:
    """A tile of one value, which may be a run-time scalar."""
    scalar = cast(value, dtype) if isinstance(value, tensor) else constant(value, dtype)
    if scalar.shape:
        if scalar.numel != 1:
            raise ValueError(f"full: the value must be a scalar, found a tile of shape {scalar.shape}")
        return broadcast_to(emit("reshape", (scalar,), with_shape(dtype, (1,) * max(1, len(shape)))), shape, "full")
    return splat(scalar, shape)


# ------------------------------------------------------------------------------------------------------- promotion


def promote_integers(a: DType, b: DType) -> DType:
    """C's usual arithmetic conversions; the boolean counts as an unsigned type of one bit."""
    if a.is_signed == b.is_signed:
        return a if a.bits > b.bits else b
    unsigned, signed = (b, a) if a.is_signed else (a, b)
    return unsigned if unsigned.bits >= signed.bits else signed


def promote(a: DType, b: DType, symbol: str, a_is_number: bool = False, b_is_number: bool = False) -> DType:
    """The type in which an operator computes; TypeError where Triton refuses."""
    division = symbol in ("/", "//", "%")
    if a_is_number != b_is_number:
        number, other = (a, b) if a_is_number else (b, a)
        if KIND[number.kind] <= KIND[other.kind]:
            return float32 if division and other in (float16, bfloat16) else other
    for dtype in (float64, float32):
        if dtype in (a, b):
            return dtype
    if float16 in (a, b):
        return float32 if division else float16
    if bfloat16 in (a, b):
        return float32 if division or a != b else bfloat16
    if division and a.is_signed != b.is_signed:
        raise TypeError(f"'{symbol}' of {a} and {b}: the signedness differs; cast one of them with .to()")
    return promote_integers(a, b)


def unify(x: Any, y: Any, symbol: str, pointers: bool = False) -> tuple[tensor, tensor]:
    """Two operands, promoted to one type and broadcast to one shape; pointers keep their type where allowed."""
    x, y = unwrap(x), unwrap(y)
    x_is_number, y_is_number = is_number(x), is_number(y)
    a = number_type(x) if x_is_number else to_tensor(x, f"the left operand of '{symbol}'").dtype
    b = number_type(y) if y_is_number else to_tensor(y, f"the right operand of '{symbol}'").dtype
    if isinstance(a, DType) and isinstance(b, DType):
        dtype = promote(a, b, symbol, x_is_number, y_is_number)
        if dtype.kind == "uint" and ((x_is_number and x < 0) or (y_is_number and y < 0)):
            raise ValueError(f"'{symbol}' of the unsigned type {dtype} and a negative number: cast explicitly")
        x = constant(x, dtype) if x_is_number else cast(x, dtype)
        y = constant(y, dtype) if y_is_number else cast(y, dtype)
    elif not pointers or (isinstance(a, PointerType) and isinstance(b, PointerType) and a != b):
        raise TypeError(f"'{symbol}' does not take {a} and {b}")
    elif (isinstance(a, DType) and a.is_float) or (isinstance(b, DType) and b.is_float):
        raise TypeError(f"'{symbol}' of a pointer takes an integer, found {a} and {b}")
    return broadcast(to_tensor(x), to_tensor(y), symbol)


# ---------------------------------------------------------------------------------------------------- broadcasting


def splat(scalar: tensor, shape: tuple[int, ...]) -> tensor:
    return emit("splat", (scalar,), with_shape(scalar.dtype, shape)) if shape else scalar


def broadcast_to(x: tensor, shape: tuple[int, ...], what: str) -> tensor:
    """x grown to `shape` (same rank; extents of 1 grow; a scalar fits any shape)."""
    if x.shape == shape:
        return x
    if not x.shape:
        return splat(x, shape)
    if len(x.shape) != len(shape) or any(s not in (1, n) for s, n in zip(x.shape, shape)):
        raise ValueError(f"{what}: a tile of shape {x.shape} cannot be broadcast to shape {shape}")
    return emit("broadcast", (x,), with_shape(x.dtype, shape))


def broadcast_shapes(a: tuple[int, ...], b: tuple[int, ...], what: str) -> tuple[int, ...]:
    rank = max(len(a), len(b))
    left, right = (1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b
    for axis, (m, n) in enumerate(zip(left, right)):
        if m != n and 1 not in (m, n):
            raise ValueError(
                f"'{what}' of shapes {a} and {b}: the extents {m} and {n} at axis {axis} differ, and neither is 1"
            )
    return tuple(max(m, n) for m, n in zip(left, right))


def broadcast(x: tensor, y: tensor, what: str) -> tuple[tensor, tensor]:
    """Both operands in their common shape; missing leading axes count as 1."""
    if x.shape == y.shape:
        return x, y
    shape = broadcast_shapes(x.shape, y.shape, what)
    return _grow(x, shape, what), _grow(y, shape, what)


def _grow(x: tensor, shape: tuple[int, ...], what: str) -> tensor:
    if x.shape and len(x.shape) < len(shape):
        x = emit("reshape", (x,), with_shape(x.dtype, (1,) * (len(shape) - len(x.shape)) + x.shape))
    return broadcast_to(x, shape, what)


# ----------------------------------------------------------------------------------------------------------- casts


def cast(x: Any, dtype: DType | PointerType) -> tensor:
    """The values converted; see `cast` in the IR's list for rounding."""
    x = to_tensor(x)
    source = x.dtype
    if source == dtype:
        return x
    if isinstance(source, PointerType) != isinstance(dtype, PointerType):
        number = dtype if isinstance(source, PointerType) else source
        if number == int1:
            return compare("ne", cast(x, int64), 0)
        if not isinstance(number, DType) or not number.is_int:
            raise TypeError(f"cannot cast {source} to {dtype}: a pointer casts only to and from int64")
        if number != int64:
            return cast(cast(x, int64), dtype)
    both_pointers = isinstance(source, PointerType) and isinstance(dtype, PointerType)
    return emit("bitcast" if both_pointers else "cast", (x,), with_element(x.type, dtype))


def bitcast(x: tensor, dtype: DType | PointerType) -> tensor:
    """The bits read as another type of the same width."""
    source = x.dtype
    if source == dtype:
        return x
    if isinstance(source, PointerType) or isinstance(dtype, PointerType):
        return cast(x, dtype)
    if source.bits != dtype.bits:
        raise ValueError(f"cannot bitcast {source} ({source.bits} bits) to {dtype} ({dtype.bits} bits)")
    return emit("bitcast", (x,), with_element(x.type, dtype))


# ------------------------------------------------------------------------------------------------------- operators


def add(x: Any, y: Any) -> tensor:
    x, y = unify(x, y, "+", pointers=True)
    if isinstance(x.dtype, PointerType) and isinstance(y.dtype, PointerType):
        raise TypeError(f"cannot add two pointers ({x.type} and {y.type})")
    if isinstance(y.dtype, PointerType):
        x, y = y, x
    if isinstance(x.dtype, PointerType):
        return _offset(x, y)
    return emit("add", (x, y), x.type)


def _offset(pointer: tensor, offset: tensor) -> tensor:
    assert isinstance(offset.dtype, DType)
    if not offset.dtype.is_signed:  # addptr reads the offset as signed: widen so that it stays positive
        offset = cast(offset, int64)
    return emit("addptr", (pointer, offset), pointer.type)


def sub(x: Any, y: Any) -> tensor:
    x, y = unify(x, y, "-", pointers=True)
    if isinstance(y.dtype, PointerType):
        raise TypeError(f"'-' does not take {x.dtype} and {y.dtype}; cast pointers to int64 to compare addresses")
    if isinstance(x.dtype, PointerType):
        wide = cast(y, int64) if not y.dtype.is_signed else y
        return _offset(x, emit("neg", (wide,), wide.type))
    return emit("sub", (x, y), x.type)


def mul(x: Any, y: Any) -> tensor:
    x, y = unify(x, y, "*")
    return emit("mul", (x, y), x.type)


def truediv(x: Any, y: Any) -> tensor:
    """`/`: always floats; two integers divide in fp32."""
    x, y = unify(x, y, "/")
    if x.dtype.is_int:  # type: ignore[union-attr]
        x, y = cast(x, float32), cast(y, float32)
    return emit("div", (x, y), x.type)


def floordiv(x: Any, y: Any) -> tensor:
    """`//`: integers only, truncates toward zero as in C."""
    x, y = unify(x, y, "//")
    if not x.dtype.is_int:  # type: ignore[union-attr]
        raise TypeError(f"'//' takes integers, found {x.dtype}; use tl.floor(x / y)")
    return emit("div", (x, y), x.type)


def mod(x: Any, y: Any) -> tensor:
    """`%`: the sign of the dividend, as in C."""
    x, y = unify(x, y, "%")
    return emit("rem", (x, y), x.type)


def bitwise(kind: str, symbol: str, x: Any, y: Any) -> tensor:
    """and, or, xor, shl, shr: integers only."""
    x, y = unify(x, y, symbol)
    if not x.dtype.is_int:  # type: ignore[union-attr]
        raise TypeError(f"'{symbol}' takes integers, found {x.dtype}")
    return emit(kind, (x, y), x.type)


SYMBOLS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


def compare(kind: str, x: Any, y: Any) -> tensor:
    """An int1 of the common shape. Pointers compare by address."""
    x, y = unwrap(x), unwrap(y)
    if isinstance(x, tensor) and isinstance(y, tensor) and x.dtype == y.dtype and isinstance(x.dtype, PointerType):
        x, y = cast(x, int64), cast(y, int64)
    x, y = unify(x, y, SYMBOLS[kind])
    return emit(kind, (x, y), with_element(x.type, int1))


def neg(x: tensor) -> tensor:
    if isinstance(x.dtype, PointerType):
        raise TypeError(f"unary '-' does not take {x.dtype}")
    return emit("neg", (x,), x.type)


def invert(x: tensor) -> tensor:
    if not isinstance(x.dtype, DType) or not x.dtype.is_int:
        raise TypeError(f"'~' takes integers, found {x.dtype}")
    return emit("not", (x,), x.type)


def truth(x: Any) -> tensor:
    """The value as int1: whether it is not zero."""
    return cast(x, int1)


def where(condition: Any, x: Any, y: Any) -> tensor:
    condition = truth(condition)
    x, y = unify(x, y, "where", pointers=True)
    if isinstance(x.dtype, PointerType) != isinstance(y.dtype, PointerType):
        raise TypeError(f"'where' does not take {x.dtype} and {y.dtype}")
    condition, x = broadcast(condition, x, "where")
    x, y = broadcast(x, y, "where")
    return emit("select", (condition, x, y), x.type)


def getitem(x: tensor, index: Any) -> tensor:
    """`x[:, None]`: full slices keep an axis, None adds one."""
    entries = index if isinstance(index, tuple) else (index,)
    shape: list[int] = []
    axes = list(shape_of(x.type))
    for entry in entries:
        if entry is None:
            shape.append(1)
        elif isinstance(entry, slice) and entry == slice(None) and axes:
            shape.append(axes.pop(0))
        else:
            raise TypeError(f"a tile of shape {x.shape} is indexed only with ':' and None, found {entry!r}")
    if axes:
        shape += axes
    if tuple(shape) == x.shape:
        return x
    return emit("reshape", (x,), with_shape(x.dtype, tuple(shape))) if x.shape else splat(x, tuple(shape))


def _install() -> None:
    binary: dict[str, Any] = {
        "add": add, "sub": sub, "mul": mul, "truediv": truediv, "floordiv": floordiv, "mod": mod,
    }  # fmt: skip
    for name, kind, symbol in (
        ("and", "and", "&"), ("or", "or", "|"), ("xor", "xor", "^"), ("lshift", "shl", "<<"), ("rshift", "shr", ">>"),
    ):  # fmt: skip
        binary[name] = lambda x, y, k=kind, s=symbol: bitwise(k, s, x, y)
    for name, function in binary.items():
        setattr(tensor, f"__{name}__", lambda x, y, f=function: f(x, y))
        setattr(tensor, f"__r{name}__", lambda x, y, f=function: f(y, x))
    for kind in SYMBOLS:
        setattr(tensor, f"__{kind}__", lambda x, y, k=kind: compare(k, x, y))
    for name, unary in (("neg", neg), ("pos", lambda x: x), ("invert", invert)):
        setattr(tensor, f"__{name}__", unary)
    setattr(tensor, "__getitem__", getitem)  # noqa: B010


_install()

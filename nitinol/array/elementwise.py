"""Elementwise operations: each one is a function of the tile language, which also decides the types."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from nitinol.array.array import Array
from nitinol.array.conversion import as_operand
from nitinol.array.dtypes import as_dtype
from nitinol.array.emit import infer
from nitinol.array.graph import Map, Operation, Scalar, View, broadcast_view, record, whole
from nitinol.language import math as tl
from nitinol.language import semantic
from nitinol.language.core import tensor
from nitinol.language.types import DType, float32, int1

# ------------------------------------------------------------------------------------------------- recording


def broadcast_shapes(name: str, *shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The common shape; ValueError naming the operation and the shapes."""
    if len(set(shapes)) == 1:
        return shapes[0]
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(s)) + s for s in shapes]
    result = []
    for extents in zip(*padded):
        wide = {n for n in extents if n != 1}
        if len(wide) > 1:
            text = " and ".join(map(str, shapes))
            raise ValueError(f"{name}: shapes {text} do not fit together; extents must be equal or 1")
        result.append(wide.pop() if wide else 1)
    return tuple(result)


def number_dtype(name: str, value: Any, dtype: DType, symbol: str = "+") -> DType:
    """The type in which a Python number meets an array of `dtype`."""
    result = semantic.promote(semantic.number_type(value), dtype, symbol, True, False)
    if result.kind in ("int", "uint"):
        low, high = semantic.integer_limits(result)
        if not low <= value <= high:
            raise ValueError(f"{name}: the number {value} is out of range for {result} ({low} to {high})")
    return result


def apply(operation: Operation, *operands: Any, symbol: str = "+", free: int = 0) -> Array:
    """Records an operation on arrays and numbers. The first `free` operands take no part in promotion."""
    name = operation.name.split(":")[0]
    arrays = [_checked(name, partial(as_operand, operand), []) for operand in operands]
    dtypes = [a.dtype for a in arrays[free:] if a is not None]
    if not dtypes:
        numbers = [semantic.number_type(value) for value in operands[free:]]
        dtypes = [max(numbers, key=lambda t: (semantic.KIND[t.kind], t.bits))]
    common = dtypes[0]
    for dtype in dtypes[1:]:
        common = _checked(name, partial(semantic.promote, common, dtype, symbol), dtypes)
    shapes = [a.shape for a in arrays if a is not None]
    shape = broadcast_shapes(name, *shapes) if shapes else ()
    inputs: list[View | Scalar] = []
    for position, (a, value) in enumerate(zip(arrays, operands)):
        if a is not None:
            inputs.append(broadcast_view(a.view, shape))
        else:
            inputs.append(Scalar(value, int1 if position < free else number_dtype(name, value, common, symbol)))
    dtype = _checked(name, lambda: infer(operation, tuple(i.dtype for i in inputs)), [i.dtype for i in inputs])
    return make(operation, inputs, shape, dtype)


def make(operation: Operation, inputs: list[View | Scalar], shape: tuple[int, ...], dtype: DType) -> Array:
    """Records an elementwise node whose inputs have its shape already."""
    (value,) = record(Map(tuple(inputs), operation, shape, dtype), [(shape, dtype)])
    return Array(whole(value))


def _checked(name: str, function: Callable[[], Any], dtypes: list[DType]) -> Any:
    try:
        return function()
    except TypeError as error:
        of = f" of {' and '.join(map(str, dtypes))}" if dtypes else ""
        raise TypeError(f"{name}{of}: {error}") from None


def _unary(name: str, function: Callable[[Any], Any], text: str, cost: int = 1, floats: bool = True) -> Any:
    operation = Operation(name, _in_floats(function) if floats else function, cost)

    def method(x: Any) -> Array:
        return apply(operation, x)

    method.__name__ = name
    method.__doc__ = f"{text}, element by element." + (" Integers give fp32." if floats else "")
    return method


def _in_floats(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Integers become fp32 first, as in NumPy; the tile language alone would refuse them."""

    def convert(x: tensor) -> tensor:
        return function(semantic.cast(x, float32) if x.dtype.is_int else x)  # type: ignore[union-attr]

    return convert


def _halves(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Composed functions of half types compute in fp32 and round once."""

    def wide(x: tensor) -> tensor:
        narrow = x.dtype
        if isinstance(narrow, DType) and narrow.is_float and narrow.bits == 16:
            return semantic.cast(function(semantic.cast(x, float32)), narrow)
        return function(x)

    return wide


# ---------------------------------------------------------------------------------------- functions of one array


def _sigmoid(x: tensor) -> tensor:
    return 1.0 / (tl.exp(-x) + 1.0)


def _gelu(x: tensor) -> tensor:
    return x * 0.5 * (tl.erf(x * math.sqrt(0.5)) + 1.0)


def _gelu_tanh(x: tensor) -> tensor:
    return x * 0.5 * (tl.tanh((x * x * x * 0.044715 + x) * math.sqrt(2 / math.pi)) + 1.0)


def _sign(x: tensor) -> tensor:
    ones = semantic.constant(1, x.dtype)
    result = semantic.where(semantic.compare("gt", x, 0), ones, semantic.constant(0, x.dtype))
    if not x.dtype.is_float and not x.dtype.is_signed:  # type: ignore[union-attr]
        return result
    result = semantic.where(semantic.compare("lt", x, 0), semantic.constant(-1, x.dtype), result)
    return semantic.where(semantic.compare("ne", x, x), x, result) if x.dtype.is_float else result  # type: ignore


def _invert(x: tensor) -> tensor:
    return semantic.invert(x)


def _same(x: tensor) -> tensor:
    return x


exp = _unary("exp", tl.exp, "e to the x", 4)
exp2 = _unary("exp2", tl.exp2, "2 to the x", 4)
log = _unary("log", tl.log, "The natural logarithm", 4)
log2 = _unary("log2", tl.log2, "The binary logarithm", 4)
sqrt = _unary("sqrt", tl.sqrt, "The square root")
rsqrt = _unary("rsqrt", tl.rsqrt, "1 / sqrt(x)")
sin = _unary("sin", tl.sin, "The sine (radians)", 4)
cos = _unary("cos", tl.cos, "The cosine (radians)", 4)
tanh = _unary("tanh", tl.tanh, "The hyperbolic tangent", 4)
erf = _unary("erf", tl.erf, "The error function", 4)
floor = _unary("floor", tl.floor, "The largest whole number not above x")
ceil = _unary("ceil", tl.ceil, "The smallest whole number not below x")
sigmoid = _unary("sigmoid", _halves(_sigmoid), "1 / (1 + exp(-x))", 6)
silu = _unary("silu", _halves(lambda x: x * _sigmoid(x)), "x * sigmoid(x)", 7)
reciprocal = _unary("reciprocal", _halves(lambda x: 1.0 / x), "1 / x")
abs = _unary("abs", tl.abs, "The absolute value", floats=False)
negative = _unary("negative", semantic.neg, "-x", floats=False)
sign = _unary("sign", _sign, "-1, 0 or 1 (NaN of NaN)", floats=False)
square = _unary("square", lambda x: x * x, "x * x", floats=False)
invert = _unary("invert", _invert, "The bits (or truth values) inverted; integers only", floats=False)
isnan = _unary("isnan", lambda x: semantic.compare("ne", x, x), "Whether x is NaN", floats=False)
relu = _unary("relu", lambda x: tl.maximum(x, 0, True), "max(x, 0)", floats=False)
_gelu_exact = _unary("gelu", _halves(_gelu), "x * Phi(x)", 8)
_gelu_fast = _unary("gelu_tanh", _halves(_gelu_tanh), "gelu by way of tanh", 10)


def gelu(x: Any, approximate: str = "none") -> Array:
    """x * Phi(x), Phi the standard normal distribution function; approximate="tanh" for the common approximation."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate is {approximate!r}, expected 'none' or 'tanh'")
    return _gelu_fast(x) if approximate == "tanh" else _gelu_exact(x)


def astype(x: Any, dtype: Any) -> Array:
    """The values converted: floats round to nearest even, float to integer truncates, anything to bool is != 0."""
    target = as_dtype(dtype)
    x = as_operand(x)
    assert x is not None
    if x.dtype == target:
        return x
    return apply(Operation(f"astype:{target}", lambda t: semantic.cast(t, target)), x)


_COPY = Operation("copy", _same)


def copy(x: Array) -> Array:
    """The elements in fresh, contiguous memory."""
    return apply(_COPY, x)


def contiguous(x: Array) -> Array:
    """The array itself if its elements follow each other in memory, else a copy where they do."""
    return x if x.is_contiguous else copy(x)


# --------------------------------------------------------------------------------------- functions of two arrays


def _floor_divide(x: tensor, y: tensor) -> tensor:
    """Rounds down, as Python; the tile language's own // truncates. Integers by 0 give 0."""
    x, y = semantic.unify(x, y, "/" if tensor_is_float(x, y) else "//")
    if x.dtype.is_float:  # type: ignore[union-attr]
        return tl.floor(x / y)
    quotient, rest = _divide(x, y)
    if not x.dtype.is_signed:  # type: ignore[union-attr]
        return quotient
    off = semantic.compare("ne", rest, 0) & ((rest < 0) ^ (y < 0))
    return semantic.where(off, quotient - 1, quotient)


def _mod(x: tensor, y: tensor) -> tensor:
    """The sign of the divisor, as Python. Integers by 0 give 0."""
    x, y = semantic.unify(x, y, "%")
    if x.dtype.is_float:  # type: ignore[union-attr]
        rest = semantic.mod(x, y)
    else:
        rest = _divide(x, y)[1]
        if not x.dtype.is_signed:  # type: ignore[union-attr]
            return rest
    off = semantic.compare("ne", rest, 0) & ((rest < 0) ^ (y < 0))
    return semantic.where(off, rest + y, rest)


def _divide(x: tensor, y: tensor) -> tuple[tensor, tensor]:
    """Quotient and remainder of integers as in C, but 0 and 0 where the divisor is 0; processors trap on that, and on
    the smallest integer by -1."""
    zero = semantic.compare("eq", y, 0)
    unsafe = zero
    if x.dtype.is_signed:  # type: ignore[union-attr]
        minus = semantic.compare("eq", y, -1)
        unsafe = zero | minus
    divisor = semantic.where(unsafe, 1, y)
    quotient = semantic.floordiv(x, divisor)
    rest = x - quotient * divisor
    if x.dtype.is_signed:  # type: ignore[union-attr]
        quotient = semantic.where(minus, -x, quotient)
    return semantic.where(zero, 0, quotient), semantic.where(zero, 0, rest)


def tensor_is_float(*values: tensor) -> bool:
    return any(v.dtype.is_float for v in values)  # type: ignore[union-attr]


def _power(x: tensor, y: tensor) -> tensor:
    """Of floats: exp2(y log2 |x|), with the sign that a whole y gives; NaN for negative x and other y."""
    x, y = semantic.unify(x, y, "/")
    if not x.dtype.is_float:  # type: ignore[union-attr]
        x, y = semantic.cast(x, float32), semantic.cast(y, float32)
    narrow = x.dtype
    if narrow.bits == 16:  # type: ignore[union-attr]
        x, y = semantic.cast(x, float32), semantic.cast(y, float32)
    size = tl.exp2(y * tl.log2(tl.abs(x)))
    whole_exponent = semantic.compare("eq", tl.floor(y), y)
    half = y * 0.5
    odd = whole_exponent & semantic.compare("ne", tl.floor(half), half)
    signed = semantic.where(odd, -size, size)
    signed = semantic.where(whole_exponent, signed, float("nan"))
    result = semantic.where(x < 0, signed, size)
    result = semantic.where(semantic.compare("eq", y, 0), 1.0, result)
    return semantic.cast(result, narrow)


def _add(x: tensor, y: tensor) -> tensor:
    """Booleans add to a boolean, as in NumPy and torch: true and true is true, not the 0 of one bit."""
    return semantic.bitwise("or", "|", x, y) if x.dtype == y.dtype == int1 else semantic.add(x, y)


_ADD, _SUB = Operation("add", _add), Operation("subtract", semantic.sub)
_MUL, _DIV = Operation("multiply", semantic.mul), Operation("divide", semantic.truediv)
_FLOORDIV = Operation("floordiv", _floor_divide, 4)
_MODULO, _POWER = Operation("mod", _mod, 4), Operation("power", _power, 12)
_MAXIMUM = Operation("maximum", lambda x, y: tl.maximum(x, y, True))
_MINIMUM = Operation("minimum", lambda x, y: tl.minimum(x, y, True))
_WHERE = Operation("where", semantic.where)
_COMPARE = {kind: Operation(kind, lambda x, y, k=kind: semantic.compare(k, x, y)) for kind in semantic.SYMBOLS}
_BITS = {
    kind: Operation(name, lambda x, y, k=kind, s=symbol: semantic.bitwise(k, s, x, y))
    for kind, name, symbol in (
        ("and", "bitwise_and", "&"), ("or", "bitwise_or", "|"), ("xor", "bitwise_xor", "^"),
        ("shl", "left_shift", "<<"), ("shr", "right_shift", ">>"),
    )
}  # fmt: skip


def add(x: Any, y: Any) -> Array:
    """x + y"""
    return apply(_ADD, x, y)


def subtract(x: Any, y: Any) -> Array:
    """x - y"""
    return apply(_SUB, x, y, symbol="-")


def multiply(x: Any, y: Any) -> Array:
    """x * y"""
    return apply(_MUL, x, y, symbol="*")


def divide(x: Any, y: Any) -> Array:
    """x / y, always floats; integers and half types divide in fp32."""
    if not _any_float(x, y):
        x, y = (float(v) if isinstance(v, int) else astype(v, float32) for v in (x, y))
    return apply(_DIV, x, y, symbol="/")


def floor_divide(x: Any, y: Any) -> Array:
    """x // y rounded down, as Python and NumPy (the tile language's // truncates). Integers by 0: 0."""
    return apply(_FLOORDIV, x, y, symbol="/" if _any_float(x, y) else "//")


def mod(x: Any, y: Any) -> Array:
    """x % y with the sign of y, as Python and NumPy (the tile language's % has the sign of x). Integers
    by 0: 0."""
    return apply(_MODULO, x, y, symbol="%")


def _any_float(*values: Any) -> bool:
    arrays = [as_operand(v) for v in values]
    return any(isinstance(v, float) if a is None else a.dtype.is_float for v, a in zip(values, arrays))


def power(x: Any, y: Any) -> Array:
    """x ** y. A small whole Python exponent multiplies, in any type; else floats, with a relative error that grows as
    |y log2 x| (about 1e-7 times that in fp32)."""
    if isinstance(y, (int, float)) and not isinstance(y, bool) and isinstance(x, Array):
        if y == 0.5:
            return sqrt(x)
        if y == int(y) and 1 <= y <= 16 and (isinstance(y, int) or x.dtype.is_float):
            return apply(_whole_power(int(y)), x)
    return apply(_POWER, x, y, symbol="/")


def _whole_power(n: int) -> Operation:
    def function(x: tensor) -> tensor:
        result, factor, left = None, x, n
        while left:
            if left & 1:
                result = factor if result is None else result * factor
            left >>= 1
            factor = factor * factor if left else factor
        assert result is not None
        return result

    return Operation(f"power:{n}", _halves(function), n.bit_length())


def maximum(x: Any, y: Any) -> Array:
    """The larger element; NaN if either is."""
    return apply(_MAXIMUM, x, y, symbol="maximum")


def minimum(x: Any, y: Any) -> Array:
    """The smaller element; NaN if either is."""
    return apply(_MINIMUM, x, y, symbol="minimum")


def clip(x: Any, low: Any = None, high: Any = None) -> Array:
    """x limited to low..high; None leaves that side open."""
    if low is not None:
        x = maximum(x, low)
    return x if high is None else minimum(x, high)


def where(condition: Any, x: Any, y: Any) -> Array:
    """x where the condition is not 0, else y."""
    return apply(_WHERE, condition, x, y, symbol="where", free=1)


def _comparison(kind: str, symbol: str) -> Callable[[Any, Any], Array]:
    operation = _COMPARE[kind]

    def compare(x: Any, y: Any) -> Array:
        return apply(operation, x, y, symbol=symbol)

    compare.__name__ = kind
    compare.__doc__ = f"x {symbol} y as booleans."
    return compare


equal, not_equal = _comparison("eq", "=="), _comparison("ne", "!=")
less, less_equal = _comparison("lt", "<"), _comparison("le", "<=")
greater, greater_equal = _comparison("gt", ">"), _comparison("ge", ">=")


def _bitwise(kind: str, symbol: str) -> Callable[[Any, Any], Array]:
    operation = _BITS[kind]

    def function(x: Any, y: Any) -> Array:
        return apply(operation, x, y, symbol=symbol)

    function.__name__ = operation.name
    function.__doc__ = f"x {symbol} y; integers and booleans."
    return function


bitwise_and, bitwise_or, bitwise_xor = _bitwise("and", "&"), _bitwise("or", "|"), _bitwise("xor", "^")
left_shift, right_shift = _bitwise("shl", "<<"), _bitwise("shr", ">>")


# ------------------------------------------------------------------------------------------------------- in place


def assign(target: Array, value: Any) -> None:
    """Records `target[...] = value` (see Array.assign)."""
    view = target.view
    source = as_operand(value)
    if 0 in view.strides and any(s == 0 and n > 1 for s, n in zip(view.strides, view.shape)):
        raise ValueError(f"assign to a broadcast view of shape {view.shape}: several elements share one place")
    if source is None:
        operand: View | Scalar = Scalar(value, number_dtype("assign", value, view.dtype))
    else:
        if broadcast_shapes("assign", view.shape, source.shape) != view.shape:
            raise ValueError(f"assign: an array of shape {source.shape} does not fit the target's shape {view.shape}")
        if source.view.value is view.value and source.view != view:
            source = copy(source)  # else the kernel could overwrite what it has yet to read
        operand = broadcast_view(source.view, view.shape)
    dtype = view.dtype
    operation = _COPY if operand.dtype == dtype else Operation(f"astype:{dtype}", lambda t: semantic.cast(t, dtype))
    record(Map((operand,), operation, view.shape, dtype), (), [view])

"""Elementwise operations. Each is a function of the tile language, which also decides the types; beside it stand the
same in NumPy and the gradient. vjp(g, out, x, y): what the gradient g of the result `out` is for x and y.
"""

# mypy: disable-error-code="has-type"

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from nitinol.graph.array import Array, attribute, method
from nitinol.graph.conversion import as_operand
from nitinol.graph.dtypes import as_dtype, numpy_dtype
from nitinol.graph.operation import Operation
from nitinol.language import math as tl
from nitinol.language import semantic
from nitinol.language.core import tensor
from nitinol.language.types import DType, float32
from nitinol.ops import elementwise_tiles as tiles


def constant_pieces(g: Array, out: Array, *operands: Any, **attributes: Any) -> tuple[None, ...]:
    """The gradients of what is constant in pieces, or counts."""
    return (None,) * len(operands)


# ---------------------------------------------------------------------------------------- functions of one array


def _unary(
    name: str, tile: Callable[[Any], Any], text: str, vjp: Callable[..., Any], reference: Callable[..., Any] | None,
    cost: int = 1, floats: bool = True,
) -> Any:  # fmt: skip
    operation = Operation(
        name, tile=tiles.in_floats(tile) if floats else tile, reference=reference, cost=cost, vjp=vjp
    )  # fmt: skip

    def function(x: Any) -> Array:
        return operation(x)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"{text}, element by element." + (" Integers give fp32." if floats else "")
    function.operation = operation  # type: ignore[attr-defined]
    return function


def _np_erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf, otypes=[np.float64])(x)


def _np_sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _np_gelu(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + _np_erf(x / math.sqrt(2)))


def _np_gelu_tanh(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _gelu_vjp(g: Array, out: Array, x: Array) -> tuple[Array]:
    density = exp(x * x * -0.5) * (1 / math.sqrt(2 * math.pi))
    return (g * ((erf(x * math.sqrt(0.5)) + 1.0) * 0.5 + x * density),)


def _gelu_tanh_vjp(g: Array, out: Array, x: Array) -> tuple[Array]:
    slope = math.sqrt(2 / math.pi)
    bent = tanh((x * x * x * 0.044715 + x) * slope)
    return (g * ((bent + 1.0) * 0.5 + x * 0.5 * (1.0 - bent * bent) * (x * x * (3 * 0.044715) + 1.0) * slope),)


def _silu_vjp(g: Array, out: Array, x: Array) -> tuple[Array]:
    s = sigmoid(x)
    return (g * (s + out * (1.0 - s)),)


LN2 = math.log(2)
exp = _unary("exp", tl.exp, "e to the x", lambda g, out, x: (g * out,), np.exp, 4)
exp2 = _unary("exp2", tl.exp2, "2 to the x", lambda g, out, x: (g * out * LN2,), np.exp2, 4)
log = _unary("log", tl.log, "The natural logarithm", lambda g, out, x: (g / x,), np.log, 4)
log2 = _unary("log2", tl.log2, "The binary logarithm", lambda g, out, x: (g / (x * LN2),), np.log2, 4)
sqrt = _unary("sqrt", tl.sqrt, "The square root", lambda g, out, x: (g * 0.5 / out,), np.sqrt)
rsqrt = _unary("rsqrt", tl.rsqrt, "1 / sqrt(x)", lambda g, out, x: (g * out * out * out * -0.5,),
               lambda x: 1 / np.sqrt(x))  # fmt: skip
sin = _unary("sin", tl.sin, "The sine (radians)", lambda g, out, x: (g * cos(x),), np.sin, 4)
cos = _unary("cos", tl.cos, "The cosine (radians)", lambda g, out, x: (-(g * sin(x)),), np.cos, 4)
tanh = _unary("tanh", tl.tanh, "The hyperbolic tangent", lambda g, out, x: (g * (1.0 - out * out),), np.tanh, 4)
erf = _unary("erf", tl.erf, "The error function",
             lambda g, out, x: (g * exp(-(x * x)) * (2 / math.sqrt(math.pi)),), _np_erf, 4)  # fmt: skip
floor = _unary("floor", tl.floor, "The largest whole number not above x", constant_pieces, np.floor)
ceil = _unary("ceil", tl.ceil, "The smallest whole number not below x", constant_pieces, np.ceil)
sigmoid = _unary("sigmoid", tiles.halves(tiles.sigmoid), "1 / (1 + exp(-x))",
                 lambda g, out, x: (g * out * (1.0 - out),), _np_sigmoid, 6)  # fmt: skip
silu = _unary("silu", tiles.halves(lambda x: x * tiles.sigmoid(x)), "x * sigmoid(x)", _silu_vjp,
              lambda x: x * _np_sigmoid(x), 7)  # fmt: skip
reciprocal = _unary("reciprocal", tiles.halves(lambda x: 1.0 / x), "1 / x", lambda g, out, x: (-(g * out * out),),
                    lambda x: 1 / x)  # fmt: skip
abs = _unary("abs", tl.abs, "The absolute value", lambda g, out, x: (g * sign(x),), np.abs, floats=False)
negative = _unary("negative", semantic.neg, "-x", lambda g, out, x: (-g,), np.negative, floats=False)
sign = _unary("sign", tiles.sign, "-1, 0 or 1 (NaN of NaN)", constant_pieces, np.sign, floats=False)
square = _unary("square", lambda x: x * x, "x * x", lambda g, out, x: (g * x * 2.0,), np.square, floats=False)
invert = _unary("invert", tiles.invert, "The bits (or truth values) inverted; integers only", constant_pieces,
                np.invert, floats=False)  # fmt: skip
isnan = _unary("isnan", lambda x: semantic.compare("ne", x, x), "Whether x is NaN", constant_pieces, np.isnan,
               floats=False)  # fmt: skip
relu = _unary("relu", lambda x: tl.maximum(x, 0, True), "max(x, 0)", lambda g, out, x: (where(x > 0, g, 0.0),),
              lambda x: np.maximum(x, 0), floats=False)  # fmt: skip
_gelu_exact = _unary("gelu", tiles.halves(tiles.gelu), "x * Phi(x)", _gelu_vjp, _np_gelu, 8)
_gelu_fast = _unary("gelu_tanh", tiles.halves(tiles.gelu_tanh), "gelu by way of tanh", _gelu_tanh_vjp, _np_gelu_tanh,
                    10)  # fmt: skip


def gelu(x: Any, approximate: str = "none") -> Array:
    """x * Phi(x), Phi the standard normal distribution function; approximate="tanh" for the common approximation."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate is {approximate!r}, expected 'none' or 'tanh'")
    return _gelu_fast(x) if approximate == "tanh" else _gelu_exact(x)


ASTYPE = Operation(
    "astype", tile=lambda x, dtype: semantic.cast(x, dtype), reference=lambda x, dtype: x.astype(numpy_dtype(dtype)),
    vjp=lambda g, out, x, dtype: (g if dtype.is_float else None,),
)  # fmt: skip
COPY = Operation("copy", tile=tiles.same, reference=np.copy, vjp=lambda g, out, x: (g,))


@method
def astype(x: Any, dtype: Any) -> Array:
    """The values converted: floats round to nearest even, float to integer truncates, anything to bool is != 0."""
    target = as_dtype(dtype)
    x = as_operand(x)
    if isinstance(x, Array) and x.dtype == target:
        return x
    return ASTYPE(x, dtype=target)


@method
def copy(x: Array) -> Array:
    """The elements in fresh, contiguous memory."""
    return COPY(x)


@method
def contiguous(x: Array) -> Array:
    """The array itself if its elements follow each other in memory, else a copy where they do."""
    return x if x.layout.contiguous else COPY(x)


# --------------------------------------------------------------------------------------- functions of two arrays


def _power_vjp(g: Array, out: Array, x: Any, y: Any) -> tuple[Array, Array]:
    """At 0 ** 0 and for the logarithm of what is not positive as PyTorch."""
    base = where(equal(y, 0), 0.0, g * y * power(x, y - 1))
    return base, where(equal(x, 0) & greater_equal(y, 0), 0.0, g * out * log(x))


def _share(chosen: Callable[[Any, Any], Array]) -> Callable[..., Any]:
    """The gradient of a maximum or minimum: to the operand that was chosen, in halves where they are equal."""

    def vjp(g: Array, out: Array, x: Any, y: Any) -> tuple[Array, Array]:
        half = where(equal(x, y), g * 0.5, 0.0)
        return where(chosen(x, y), g, half), where(chosen(y, x), g, half)

    return vjp


ADD = Operation("add", tile=tiles.add, reference=np.add, vjp=lambda g, out, x, y: (g, g))
SUBTRACT = Operation(
    "subtract", tile=semantic.sub, reference=np.subtract, vjp=lambda g, out, x, y: (g, -g), symbol="-"
)
MULTIPLY = Operation(
    "multiply", tile=semantic.mul, reference=np.multiply, vjp=lambda g, out, x, y: (g * y, g * x), symbol="*"
)
DIVIDE = Operation(
    "divide", tile=semantic.truediv, reference=np.divide, vjp=lambda g, out, x, y: (g / y, -(g * out) / y), symbol="/"
)
FLOOR_DIVIDE = Operation(
    "floor_divide", tile=tiles.floor_divide, reference=np.floor_divide, vjp=constant_pieces, cost=4, symbol="//"
)
FLOOR_DIVIDE_FLOATS = Operation(
    "floor_divide", tile=tiles.floor_divide, reference=np.floor_divide, vjp=constant_pieces, cost=4, symbol="/"
)
MOD = Operation(
    "mod", tile=tiles.mod, reference=np.mod, vjp=lambda g, out, x, y: (g, -(g * floor(divide(x, y)))), cost=4,
    symbol="%",
)  # fmt: skip
POWER = Operation("power", tile=tiles.power, reference=np.power, vjp=_power_vjp, cost=12, symbol="/")
WHOLE_POWER = Operation(
    "power", tile=tiles.halves(tiles.whole_power), reference=lambda x, exponent: x**exponent, cost=4,
    vjp=lambda g, out, x, exponent: (g * power(x, exponent - 1) * exponent,),
)  # fmt: skip
MAXIMUM = Operation(
    "maximum", tile=lambda x, y: tl.maximum(x, y, True), reference=np.maximum, symbol="maximum",
    vjp=_share(lambda a, b: greater(a, b)),
)  # fmt: skip
MINIMUM = Operation(
    "minimum", tile=lambda x, y: tl.minimum(x, y, True), reference=np.minimum, symbol="minimum",
    vjp=_share(lambda a, b: less(a, b)),
)  # fmt: skip
WHERE = Operation(
    "where", tile=semantic.where, reference=np.where, symbol="where", free=1,
    vjp=lambda g, out, c, x, y: (None, where(c, g, 0.0), where(c, 0.0, g)),
)  # fmt: skip


def add(x: Any, y: Any) -> Array:
    """x + y"""
    return ADD(x, y)


def subtract(x: Any, y: Any) -> Array:
    """x - y"""
    return SUBTRACT(x, y)


def multiply(x: Any, y: Any) -> Array:
    """x * y"""
    return MULTIPLY(x, y)


def divide(x: Any, y: Any) -> Array:
    """x / y, always floats; integers and half types divide in fp32."""
    x, y = as_operand(x), as_operand(y)
    if not _any_float(x, y):
        x, y = (v.astype(float32) if isinstance(v, Array) else float(v) for v in (x, y))
    return DIVIDE(x, y)


def floor_divide(x: Any, y: Any) -> Array:
    """x // y rounded down, as Python and NumPy (the tile language's // truncates). Integers by 0: 0."""
    x, y = as_operand(x), as_operand(y)
    return (FLOOR_DIVIDE_FLOATS if _any_float(x, y) else FLOOR_DIVIDE)(x, y)


def mod(x: Any, y: Any) -> Array:
    """x % y with the sign of y, as Python and NumPy (the tile language's % has the sign of x). Integers
    by 0: 0."""
    return MOD(x, y)


def _any_float(*values: Any) -> bool:
    return any(v.dtype.is_float if isinstance(v, Array) else isinstance(v, float) for v in values)


def power(x: Any, y: Any) -> Array:
    """x ** y. A small whole Python exponent multiplies, in any type; else floats, with a relative error that grows as
    |y log2 x| (about 1e-7 times that in fp32)."""
    if isinstance(y, (int, float)) and not isinstance(y, bool) and isinstance(x, Array):
        if y == 0.5:
            return sqrt(x)
        if y == int(y) and 1 <= y <= 16 and (isinstance(y, int) or x.dtype.is_float):
            return WHOLE_POWER(x, exponent=int(y))
    return POWER(x, y)


def maximum(x: Any, y: Any) -> Array:
    """The larger element; NaN if either is."""
    return MAXIMUM(x, y)


def minimum(x: Any, y: Any) -> Array:
    """The smaller element; NaN if either is."""
    return MINIMUM(x, y)


@method
def clip(x: Any, low: Any = None, high: Any = None) -> Array:
    """x limited to low..high; None leaves that side open."""
    if low is not None:
        x = maximum(x, low)
    return x if high is None else minimum(x, high)


def where(condition: Any, x: Any, y: Any) -> Array:
    """x where the condition is not 0, else y."""
    return WHERE(condition, x, y)


def _of_two(operation: Operation, name: str, doc: str) -> Callable[[Any, Any], Array]:
    """The public function of an operation of two operands."""

    def function(x: Any, y: Any) -> Array:
        return operation(x, y)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc
    function.operation = operation  # type: ignore[attr-defined]
    return function


def _comparison(kind: str, name: str, symbol: str) -> Callable[[Any, Any], Array]:
    def compared(x: tensor, y: tensor) -> tensor:
        return semantic.compare(kind, x, y)

    operation = Operation(kind, tile=compared, reference=getattr(np, name), vjp=constant_pieces, symbol=symbol)

    return _of_two(operation, name, f"x {symbol} y as booleans.")


equal, not_equal = _comparison("eq", "equal", "=="), _comparison("ne", "not_equal", "!=")
less, less_equal = _comparison("lt", "less", "<"), _comparison("le", "less_equal", "<=")
greater, greater_equal = _comparison("gt", "greater", ">"), _comparison("ge", "greater_equal", ">=")


def _bitwise(kind: str, name: str, symbol: str) -> Callable[[Any, Any], Array]:
    def combined(x: tensor, y: tensor) -> tensor:
        return semantic.bitwise(kind, symbol, x, y)

    operation = Operation(name, tile=combined, reference=getattr(np, name), vjp=constant_pieces, symbol=symbol)

    return _of_two(operation, name, f"x {symbol} y; integers and booleans.")


bitwise_and, bitwise_or = _bitwise("and", "bitwise_and", "&"), _bitwise("or", "bitwise_or", "|")
bitwise_xor = _bitwise("xor", "bitwise_xor", "^")
left_shift, right_shift = _bitwise("shl", "left_shift", "<<"), _bitwise("shr", "right_shift", ">>")


# ------------------------------------------------------------------------------------------------------- of Array


def _fits(value: Any) -> bool:
    """Whether an operator takes it; else Python tries the other operand's method."""
    kind = type(value)
    if kind is Array or kind is float or kind is int:
        return True
    return isinstance(value, (bool, int, float, np.ndarray, np.generic, list)) or hasattr(value, "__dlpack__")


def _operator(name: str, function: Callable[[Any, Any], Array], reflected: bool = True) -> None:
    def forward(self: Array, other: Any) -> Any:
        return function(self, other) if _fits(other) else NotImplemented

    def backward(self: Array, other: Any) -> Any:
        return function(other, self) if _fits(other) else NotImplemented

    attribute(f"__{name}__", forward)
    if reflected:
        attribute(f"__r{name}__", backward)


_function: Any
for _name, _function in {
    "add": ADD, "sub": SUBTRACT, "mul": MULTIPLY, "truediv": divide, "floordiv": floor_divide, "mod": MOD,
    "pow": power, "and": bitwise_and, "or": bitwise_or, "xor": bitwise_xor, "lshift": left_shift,
    "rshift": right_shift,
}.items():  # fmt: skip
    _operator(_name, _function)
for _name, _function in {
    "eq": equal, "ne": not_equal, "lt": less, "le": less_equal, "gt": greater, "ge": greater_equal,
}.items():  # fmt: skip
    _operator(_name, _function, reflected=False)
for _name, _function in {"neg": negative, "abs": abs, "invert": invert}.items():
    attribute(f"__{_name}__", _function)
for _function in (exp, log, sqrt, rsqrt, sin, cos, tanh, sigmoid, square):
    method(_function)


def assigned_type(name: str, value: Any, dtype: DType) -> None:
    """ValueError for a number that does not fit a type."""
    if dtype.kind in ("int", "uint") and isinstance(value, int):
        low, high = semantic.integer_limits(dtype)
        if not low <= value <= high:
            raise ValueError(f"{name}: the number {value} is out of range for {dtype} ({low} to {high})")

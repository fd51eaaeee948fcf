"""Elementwise mathematics as inline, branch-free LLVM IR, for scalars and vectors of float and double.

LLVM has no vector `exp`: it would call libm once per lane. So every function here is a polynomial in fused
multiply-adds with an exact argument reduction, the same formula for any lane count. Compensation relies on
the order of operations: no fast-math flags are set, and a caller must not add `reassoc` to these instructions.

Largest errors found, in units in the last place (tests/compiler/test_cpu_math.py samples them again):

=================  ======  ======  =================================================================
function           float   double  note
=================  ======  ======  =================================================================
exp, exp2          0.92    0.90    subnormal results included; exp2 is exact at integers
log                0.94    1.2     subnormal arguments included
log2               1.8     1.6     exact at powers of two
tanh               1.96    1.92
erf                1.82    1.6
sin, cos           1.6     1.5     float: every argument (cos(7.729179e28), the worst: 2.7);
                                   double: up to 2^40; from about 2^50 on only within [-1, 1]
rsqrt              1.5     1.5     sqrt, then division
=================  ======  ======  =================================================================

The coefficients are minimax fits made for this file: weighted least squares on Chebyshev nodes with mpmath
at 80 digits, rounded one after the other from the lowest order up, the rest fitted again each time. The
stated 2^-k is the fit's largest relative error in the function's value.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from llvmlite import ir
from llvmlite.ir import IRBuilder as Builder
from llvmlite.ir import Value


class _Format(NamedTuple):
    """One IEEE 754 format: its layout, and the tables of the formulas below."""

    width: int  # bits
    mantissa: int  # stored bits, the position of the exponent
    bias: int
    log_start: int  # bits of the lower end of the interval to which log reduces its argument
    exp_range: tuple[float, float]  # beyond it exp is 0 or infinity
    tanh_limit: float  # tanh(x) rounds to 1 beyond half of it
    erf_limit: float  # erf(x) rounds to 1 beyond it
    ln2: tuple[float, float]  # a value of this format and what it misses of ln 2
    expm1: tuple[float, ...]  # (e^r - 1 - r) / r^2 on |r| <= 0.348
    log: tuple[float, ...]
    erf: tuple[float, ...]  # -ln(erfc(t)) / t - 1 on [0, erf_limit]
    sin: tuple[float, ...]  # (sin r - r) / r^3 in powers of r^2, on |r| <= 0.794
    cos: tuple[float, ...]  # (cos r - 1 + r^2 / 2) / r^4 in powers of r^2, on |r| <= 0.794


_FLOAT = _Format(
    width=32,
    mantissa=23,
    bias=127,
    log_start=0x3F2AAAAB,  # 2/3
    exp_range=(-104.0, 89.0),
    tanh_limit=20.0,
    erf_limit=3.95,
    ln2=(0.6931471824645996, -1.904654299957768e-09),
    expm1=(0.49999997, 0.1666654, 0.041667525, 0.008366894, 0.0013862828),  # 2^-26.1
    # (ln(1 + f) - f + f^2 / 2) / f^3 on |f| <= 1/3: 2^-27.6
    log=(0.33333206, -0.24999888, 0.20010838, -0.16676392, 0.14000015, -0.122407526, 0.14009427, -0.12647742),
    erf=(0.12837917, 0.63661957, 0.102776185, -0.019146996, -0.00017160283, 0.001678234, -0.0006389704,
         0.00011936129, -9.448724e-06),  # 2^-27.7
    sin=(-0.16666654, 0.008332106, -0.0001950789),  # 2^-27.8
    cos=(0.041666646, -0.0013887297, 2.4429864e-05),  # 2^-32.7
)  # fmt: skip

_DOUBLE = _Format(
    width=64,
    mantissa=52,
    bias=1023,
    log_start=0x3FE6A09E667F3BCD,  # sqrt(1/2)
    exp_range=(-746.0, 710.0),
    tanh_limit=40.0,
    erf_limit=5.95,
    ln2=(0.6931471805599453, 2.3190468138462996e-17),
    expm1=(0.5, 0.16666666666666677, 0.041666666666666595, 0.008333333333321357, 0.0013888888888932433,
           0.00019841269886954359, 2.4801587219577724e-05, 2.755724325515901e-06, 2.75573681910406e-07,
           2.5109407634475016e-08, 2.0884905911168825e-09),  # 2^-61.5
    # (ln((1 + s) / (1 - s)) - 2 s) / s^3 in powers of s^2, on s^2 <= 0.02944: 2^-59.5
    log=(0.6666666666666734, 0.39999999999416547, 0.28571428742063726, 0.22222198600088838,
         0.1818356317135885, 0.15314075215132814, 0.1479574273779989),
    erf=(0.12837916709551256, 0.6366197723675849, 0.10277260330173407, -0.01912844700400435,
         -0.00020919470675557732, 0.0016962064708397671, -0.0005901259692310415, 2.5880067358878474e-05,
         6.448803982523484e-05, -2.971644084573939e-05, 3.3955095745836228e-06, 2.8494520059614445e-06,
         -1.755410485755314e-06, 3.4712347428644653e-07, 1.3046543979163601e-07, -1.3838499745706106e-07,
         6.436865041411754e-08, -2.0521528842581817e-08, 4.884752749075737e-09, -8.856496768958311e-10,
         1.2140042695448122e-10, -1.2225279750838934e-11, 8.546147055436208e-13, -3.706919296703144e-14,
         7.513941406037616e-16),  # 2^-56.8
    sin=(-0.16666666666666627, 0.008333333333321043, -0.00019841269828666284, 2.7557313285071973e-06,
         -2.5050693094453314e-08, 1.589296209873078e-10),  # 2^-57.4
    cos=(0.04166666666666658, -0.001388888888887097, 2.480158728752801e-05, -2.7557313791500763e-07,
         2.0875647460889247e-09, -1.1355741175574853e-11),  # 2^-63.7
)  # fmt: skip

LOG2_E = 1.4426950408889634
HALF_PI = 1.5707963267948966
# pi/2 as a sum of three doubles, 160 bits.
HALF_PI_PARTS = (HALF_PI, 6.123233995736766e-17, -1.4973849048591833e-33)
# 1/(2 pi) as a sum of integers of 29 bits times powers of two: a float (24 bits) times a piece is exact in
# double. 205 bits: the 2^128 of the largest float, then 77 for the fraction of a turn.
TURN_PIECES = (
    (341782637, 31), (423170132, 60), (352195499, 89), (488592205, 118), (461485765, 147), (90590992, 176),
    (478285810, 205),
)  # fmt: skip


# --- Small pieces of IR -----------------------------------------------------------------------------------


def _element(type_: ir.Type) -> ir.Type:
    return type_.element if isinstance(type_, ir.VectorType) else type_


def _with_element(type_: ir.Type, element: ir.Type) -> ir.Type:
    return ir.VectorType(element, type_.count) if isinstance(type_, ir.VectorType) else element


def _format(x: Value) -> _Format:
    return _FLOAT if isinstance(_element(x.type), ir.FloatType) else _DOUBLE


def _bits_type(x: Value) -> ir.Type:
    return _with_element(x.type, ir.IntType(_format(x).width))


def _constant(type_: ir.Type, value: float) -> Value:
    """`value` in every lane; the `splat` form keeps the text of wide vectors readable."""
    scalar = ir.Constant(_element(type_), value)
    if not isinstance(type_, ir.VectorType):
        return scalar
    splat = ir.FormattedConstant(scalar.type, f"splat ({scalar})")
    splat.type = type_  # afterwards: the constructor would split the text into lanes
    return splat


def _call(b: Builder, intrinsic: str, *args: Value, flags: Sequence[str] = ()) -> Value:
    type_ = args[0].type
    element = "f32" if isinstance(_element(type_), ir.FloatType) else "f64"
    lanes = f"v{type_.count}" if isinstance(type_, ir.VectorType) else ""
    name = f"llvm.{intrinsic}.{lanes}{element}"
    function = b.module.globals.get(name)
    if function is None:
        function = ir.Function(b.module, ir.FunctionType(type_, [type_] * len(args)), name)
    return b.call(function, args, fastmath=flags)


def _fma(b: Builder, x: Value, y: Value | float, z: Value | float) -> Value:
    """x * y + z with one rounding; numbers stand for themselves in every lane."""
    terms = [v if isinstance(v, Value) else _constant(x.type, v) for v in (x, y, z)]
    return _call(b, "fma", *terms)


def _polynomial(b: Builder, x: Value, coefficients: Sequence[float]) -> Value:
    """c0 + c1 x + c2 x^2 + ..., by Horner's rule: the fewest instructions."""
    result: Value = _constant(x.type, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = _fma(b, x, result, coefficient)
    return result


def _at_least(b: Builder, x: Value, low: float) -> Value:
    """max(x, low) that keeps NaN, one instruction on x86."""
    limit = _constant(x.type, low)
    return b.select(b.fcmp_ordered(">", limit, x), limit, x)


def _at_most(b: Builder, x: Value, high: float) -> Value:
    limit = _constant(x.type, high)
    return b.select(b.fcmp_ordered("<", limit, x), limit, x)


def _to_bits(b: Builder, x: Value) -> Value:
    return b.bitcast(x, _bits_type(x))


def _round_with_bits(b: Builder, x: Value, factor: float, bias: int) -> tuple[Value, Value]:
    """n = x * factor rounded to an integer, and an integer whose low bits are n + bias.

    Adding 1.5 * 2^mantissa pushes the fraction out of the mantissa and leaves the integer in its low bits.
    Holds for |n| < 2^(mantissa - 2); unlike a conversion it is harmless for NaN and infinity.
    """
    shift = 1.5 * 2.0 ** _format(x).mantissa + bias
    shifted = _fma(b, x, factor, shift)
    return b.fsub(shifted, _constant(x.type, shift)), _to_bits(b, shifted)


def _power_of_two(b: Builder, biased: Value, x: Value) -> Value:
    """2^(biased - bias), of the type of x; all but the low bits of `biased` are shifted out."""
    return b.bitcast(b.shl(biased, _constant(biased.type, _format(x).mantissa)), x.type)


# --- Exponentials -----------------------------------------------------------------------------------------


def _reduce_exp(b: Builder, x: Value, bias: int) -> tuple[Value, Value]:
    """r and n + bias (in low bits) with x = n ln 2 + r and |r| <= ln 2 / 2."""
    n, biased = _round_with_bits(b, x, LOG2_E, bias)
    high, low = _format(x).ln2
    return _fma(b, n, -low, _fma(b, n, -high, x)), biased


def _expm1_of_reduced(b: Builder, r: Value) -> Value:
    """e^r - 1 = r + r^2 q(r), to full relative precision down to r = 0."""
    return _fma(b, b.fmul(r, r), _polynomial(b, r, _format(r).expm1), r)


def _exp_of_reduced(b: Builder, r: Value) -> Value:
    return _polynomial(b, r, (1.0, 1.0, *_format(r).expm1))


def _scaled(b: Builder, value: Value, biased: Value) -> Value:
    """value * 2^n, where biased is n + 2 bias. Two factors, since 2^n alone may be out of range: the first
    product is exact, so that a subnormal result is rounded once and an overflow ends in infinity."""
    half = b.lshr(biased, _constant(biased.type, 1))
    product = b.fmul(value, _power_of_two(b, half, value))
    return b.fmul(product, _power_of_two(b, b.sub(biased, half), value))


def _exp(b: Builder, x: Value) -> Value:
    low, high = _format(x).exp_range
    r, biased = _reduce_exp(b, _at_most(b, _at_least(b, x, low), high), 2 * _format(x).bias)
    return _scaled(b, _exp_of_reduced(b, r), biased)


def _exp2(b: Builder, x: Value) -> Value:
    format_ = _format(x)
    x = _at_most(b, _at_least(b, x, -format_.bias - format_.mantissa - 2.0), format_.bias + 2.0)
    n, biased = _round_with_bits(b, x, 1.0, 2 * format_.bias)
    r = b.fmul(b.fsub(x, n), _constant(x.type, format_.ln2[0]))
    return _scaled(b, _exp_of_reduced(b, r), biased)


def _expm1_parts(b: Builder, x: Value) -> tuple[Value, Value]:
    """p and 2^n with e^x = 2^n (1 + p), for -100 < x <= 0, where 2^n is in range."""
    r, biased = _reduce_exp(b, x, _format(x).bias)
    return _expm1_of_reduced(b, r), _power_of_two(b, biased, x)


def _tanh(b: Builder, x: Value) -> Value:
    """(1 - e) / (1 + e) with e = exp(-2 |x|) = 2^n (1 + p): for small x that is -p / (2 + p), without
    cancellation. Both terms come from p directly; the sum (e - 1) + 2 would double a rounding error."""
    doubled = b.fmul(_call(b, "fabs", x), _constant(x.type, -2.0))
    p, scale = _expm1_parts(b, _at_least(b, doubled, -_format(x).tanh_limit))
    one = _constant(x.type, 1.0)
    below = _fma(b, p, scale, b.fsub(scale, one))
    above = _fma(b, p, scale, b.fadd(scale, one))
    return _call(b, "copysign", b.fdiv(below, above), x)


def _erf(b: Builder, x: Value) -> Value:
    """1 - exp(-t - t q(t)) with t = |x|: one smooth q for the whole axis, and no cancellation near 0."""
    format_ = _format(x)
    t = _at_most(b, _call(b, "fabs", x), format_.erf_limit)
    q = _polynomial(b, t, [-c for c in format_.erf])
    p, scale = _expm1_parts(b, _fma(b, q, t, b.fneg(t)))
    return _call(b, "copysign", _fma(b, p, scale, b.fsub(scale, _constant(x.type, 1.0))), x)


# --- Logarithms -------------------------------------------------------------------------------------------


def _log_of_reduced(b: Builder, f: Value) -> Value:
    """ln(1 + f) for 1 + f in [2/3, 4/3] (float) or [sqrt(1/2), sqrt(2)] (double)."""
    coefficients = _format(f).log
    if _format(f) is _FLOAT:
        return _fma(b, _polynomial(b, f, (-0.5, *coefficients)), b.fmul(f, f), f)
    # ln(1 + f) = f - (h - s (h + z p(z))) with s = f / (2 + f), h = f^2 / 2: the formula of Sun's fdlibm.
    s = b.fdiv(f, b.fadd(f, _constant(f.type, 2.0)))
    z = b.fmul(s, s)
    h = b.fmul(b.fmul(f, f), _constant(f.type, 0.5))
    return b.fsub(f, _fma(b, b.fneg(s), _fma(b, z, _polynomial(b, z, coefficients), h), h))


def _exponent(b: Builder, x: Value) -> tuple[Value, Value]:
    """For normal x > 0: k with x = m 2^k and m in the interval of _log_of_reduced, and k in the exponent's
    place."""
    format_ = _format(x)
    mantissa = _constant(_bits_type(x), format_.mantissa)
    k = b.ashr(b.sub(_to_bits(b, x), _constant(_bits_type(x), format_.log_start)), mantissa)
    placed = b.shl(k, mantissa)
    if format_ is _DOUBLE:  # before AVX-512 there is no vector conversion of 64-bit integers
        k = b.trunc(k, _with_element(x.type, ir.IntType(32)))
    return b.sitofp(k, x.type), placed


def _log_parts(b: Builder, x: Value) -> tuple[Value, Value]:
    """(k, ln m) with x = m 2^k, for x > 0."""
    format_ = _format(x)
    subnormal = b.fcmp_ordered("<", x, _constant(x.type, 2.0 ** (1 - format_.bias)))
    x = b.select(subnormal, b.fmul(x, _constant(x.type, 2.0**format_.mantissa)), x)
    k, placed = _exponent(b, x)
    k = b.select(subnormal, b.fsub(k, _constant(x.type, format_.mantissa)), k)
    m = b.bitcast(b.sub(_to_bits(b, x), placed), x.type)
    return k, _log_of_reduced(b, b.fsub(m, _constant(x.type, 1.0)))


def _log_specials(b: Builder, x: Value, result: Value) -> Value:
    """-inf at 0, NaN below it, x itself for infinity and NaN."""
    zero, inf = _constant(x.type, 0.0), float("inf")
    outside = b.select(b.fcmp_ordered("==", x, zero), _constant(x.type, -inf), _constant(x.type, float("nan")))
    result = b.select(b.fcmp_ordered("<", x, _constant(x.type, inf)), result, x)
    return b.select(b.fcmp_ordered("<=", x, zero), outside, result)


def _log(b: Builder, x: Value) -> Value:
    k, fraction = _log_parts(b, x)
    return _log_specials(b, x, _fma(b, k, _format(x).ln2[0], fraction))


def _log2(b: Builder, x: Value) -> Value:
    k, fraction = _log_parts(b, x)
    return _log_specials(b, x, _fma(b, fraction, LOG2_E, k))


# --- Sine and cosine --------------------------------------------------------------------------------------


def _reduce_quarter_turns(b: Builder, x: Value) -> tuple[Value, Value]:
    """r and an integer q (modulo 4, in low bits) with x = q pi/2 + r and |r| <= pi/4, for x >= 0."""
    if _format(x) is _DOUBLE:
        # Cody and Waite: the first product cancels exactly up to 2^50, the 160 bits of pi/2 do the rest.
        n, q = _round_with_bits(b, x, 1 / HALF_PI, 0)
        for part in HALF_PI_PARTS:
            x = _fma(b, n, -part, x)
        # No effect below 2^45. Far beyond, where no bit is right, it keeps the result within [-1, 1].
        return _at_most(b, _at_least(b, x, -0.8), 0.8), q
    # Payne and Hanek's idea without tables or integers: the turns of each exact product, whole ones dropped.
    wide = b.fpext(x, _with_element(x.type, ir.DoubleType()))
    turns: Value | None = None
    for piece, shift in TURN_PIECES:
        part = b.fmul(wide, _constant(wide.type, piece * 2.0**-shift))
        part = b.fsub(part, _call(b, "rint", part))
        turns = part if turns is None else b.fadd(turns, part)
    n, q = _round_with_bits(b, turns, 4.0, 0)
    r = b.fmul(_fma(b, turns, 4.0, b.fneg(n)), _constant(wide.type, HALF_PI))
    return b.fptrunc(r, x.type), b.trunc(q, _bits_type(x))


def _sin_or_cos(quarter_turns: int, b: Builder, x: Value) -> Value:
    """sin(x + quarter_turns * pi/2), quarter_turns 0 or 1."""
    format_, bits = _format(x), _bits_type(x)
    r, q = _reduce_quarter_turns(b, _call(b, "fabs", x))
    square = b.fmul(r, r)
    sin = _fma(b, b.fmul(r, square), _polynomial(b, square, format_.sin), r)
    cos = _fma(b, square, _polynomial(b, square, (-0.5, *format_.cos)), 1.0)
    if quarter_turns:
        q = b.add(q, _constant(bits, quarter_turns))
    odd = b.icmp_unsigned("!=", b.and_(q, _constant(bits, 1)), _constant(bits, 0))
    flips = b.shl(q, _constant(bits, format_.width - 2))  # the second half turn changes the sign
    if not quarter_turns:  # so does the sign of x, even of -0
        flips = b.xor(flips, _to_bits(b, x))
    flips = b.and_(flips, _constant(bits, 1 << format_.width - 1))
    return b.bitcast(b.xor(_to_bits(b, b.select(odd, cos, sin)), flips), x.type)


# --- The dispatch -----------------------------------------------------------------------------------------


def _rsqrt(b: Builder, x: Value) -> Value:
    return b.fdiv(_constant(x.type, 1.0), _call(b, "sqrt", x))


def _intrinsic(name: str, *flags: str) -> Callable[..., Value]:
    return lambda b, *args: _call(b, name, *args, flags=flags)


_FUNCTIONS: dict[str, tuple[int, Callable[..., Value]]] = {
    "exp": (1, _exp),
    "exp2": (1, _exp2),
    "log": (1, _log),
    "log2": (1, _log2),
    "sin": (1, partial(_sin_or_cos, 0)),
    "cos": (1, partial(_sin_or_cos, 1)),
    "tanh": (1, _tanh),
    "erf": (1, _erf),
    "sqrt": (1, _intrinsic("sqrt")),
    "rsqrt": (1, _rsqrt),
    "floor": (1, _intrinsic("floor")),
    "ceil": (1, _intrinsic("ceil")),
    "abs": (1, _intrinsic("fabs")),
    "fma": (3, _intrinsic("fma")),
    # nsz: which zero min(-0, 0) returns is not promised; promising it costs x86 three more instructions.
    "min": (2, _intrinsic("minnum", "nsz")),
    "max": (2, _intrinsic("maxnum", "nsz")),
    "min_nan": (2, _intrinsic("minimum", "nsz")),
    "max_nan": (2, _intrinsic("maximum", "nsz")),
}


def emit_math(builder: ir.IRBuilder, name: str, args: Sequence[ir.Value]) -> ir.Value:
    """Emit the mathematical function `name` of `args` at the builder's position and return its value.

    name: exp exp2 log log2 sin cos tanh erf sqrt rsqrt floor ceil abs (one argument),
        min max (a NaN beside a number is ignored), min_nan max_nan (a NaN wins), fma (three arguments).
    args: values of one type, float or double or a vector of them with any number of lanes. The result has
        the same type. The target should have fused multiply-add (AVX2 or NEON): without it LLVM calls libm.
    Raises ValueError for an unknown name or a wrong number of arguments, TypeError for another type.
    """
    if name not in _FUNCTIONS:
        raise ValueError(f"unknown mathematical function {name!r}; expected one of {', '.join(_FUNCTIONS)}")
    count, function = _FUNCTIONS[name]
    if len(args) != count:
        raise ValueError(f"{name} got {len(args)} arguments and takes {count}")
    if not isinstance(_element(args[0].type), (ir.FloatType, ir.DoubleType)):
        raise TypeError(f"{name} got {args[0].type}; expected float or double lanes: convert the value first")
    if any(arg.type != args[0].type for arg in args):
        raise TypeError(f"{name} got {', '.join(str(arg.type) for arg in args)}; expected one type: convert first")
    return function(builder, *args)


# --- bfloat16, which llvmlite has no type for ---------------------------------------------------------------


def float_to_bfloat16_bits(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """The bfloat16 nearest to each float of `x` (ties to even), as i16 lanes; NaN stays a (quiet) NaN."""
    b, type_ = builder, _with_element(x.type, ir.IntType(32))
    bits = b.bitcast(x, type_)
    sixteen = _constant(type_, 16)
    upper = b.lshr(bits, sixteen)
    # Just under half of the last place, plus the last bit: a tie carries into it only where it is odd.
    half = b.add(b.and_(upper, _constant(type_, 1)), _constant(type_, 0x7FFF))
    rounded = b.lshr(b.add(bits, half), sixteen)
    quiet = b.or_(upper, _constant(type_, 0x40))
    result = b.select(b.fcmp_unordered("uno", x, x), quiet, rounded)
    return b.trunc(result, _with_element(x.type, ir.IntType(16)))


def bfloat16_bits_to_float(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """The floats whose bfloat16 patterns are the i16 lanes of `bits`; exact."""
    type_ = _with_element(bits.type, ir.IntType(32))
    widened = builder.shl(builder.zext(bits, type_), _constant(type_, 16))
    return builder.bitcast(widened, _with_element(bits.type, ir.FloatType()))

"""Vector mathematics of the CPU target: accuracy in ulp against float64 and mpmath, special values, bfloat16.

Every function is compiled into a small loop for 1, 4, 8 and 16 lanes. Limits are in units in the last place
of the exact result; a result that should round to infinity counts as 2^128 (2^1024).
"""

import ctypes
import functools
import math
import re
from collections.abc import Callable

import ml_dtypes
import mpmath
import numpy as np
import pytest
from llvmlite import binding, ir

from nitinol.compiler.cpu.math import bfloat16_bits_to_float, emit_math, float_to_bfloat16_bits

pytestmark = pytest.mark.cpu

LANES = (1, 4, 8, 16)
UNARY = "exp exp2 log log2 sin cos tanh erf sqrt rsqrt floor ceil abs".split()
BINARY = "min max min_nan max_nan".split()
Emit = Callable[[ir.IRBuilder, list[ir.Value]], ir.Value]


def loop(module: ir.Module, name: str, emit: Emit, source: ir.Type, result: ir.Type, lanes: int, count: int) -> None:
    """void name(source*... [count], result*, i64 size): emit() over whole vectors; size is a multiple of lanes."""
    i64, wide = ir.IntType(64), ir.VectorType(source, lanes) if lanes > 1 else source
    signature = ir.FunctionType(ir.VoidType(), [ir.PointerType()] * (count + 1) + [i64])
    function = ir.Function(module, signature, name)
    entry, body, done = (function.append_basic_block(label) for label in ("entry", "body", "done"))
    b = ir.IRBuilder(entry)
    b.branch(body)
    b.position_at_end(body)
    index = b.phi(i64)
    index.add_incoming(i64(0), entry)
    operands = [
        b.load(b.gep(pointer, [index], source_etype=source), typ=wide, align=1) for pointer in function.args[:count]
    ]
    b.store(emit(b, operands), b.gep(function.args[count], [index], source_etype=result), align=1)
    index.add_incoming(b.add(index, i64(lanes)), b.block)
    b.cbranch(b.icmp_unsigned("<", index.incomings[1][0], function.args[-1]), body, done)
    b.position_at_end(done)
    b.ret_void()


def compile_module(module: ir.Module) -> binding.ExecutionEngine:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=2
    )
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(2))
    passes.getModulePassManager().run(parsed, passes)
    engine = binding.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    return engine


@functools.cache
def compiled(dtype: type, lanes: int) -> binding.ExecutionEngine:
    """Every function for one element type and lane count."""
    module = ir.Module()
    element = ir.FloatType() if dtype is np.float32 else ir.DoubleType()
    for name in [*UNARY, *BINARY, "fma"]:
        count = 1 if name in UNARY else 2 if name in BINARY else 3
        loop(module, name, functools.partial(emit_by_name, name), element, element, lanes, count)
    if dtype is np.float32:
        i16 = ir.IntType(16)
        loop(module, "to_bfloat16", lambda b, args: float_to_bfloat16_bits(b, args[0]), element, i16, lanes, 1)
        loop(module, "from_bfloat16", lambda b, args: bfloat16_bits_to_float(b, args[0]), i16, element, lanes, 1)
    return compile_module(module)


def emit_by_name(name: str, b: ir.IRBuilder, args: list[ir.Value]) -> ir.Value:
    return emit_math(b, name, args)


def call(
    name: str, *arrays: np.ndarray, lanes: int, dtype: type | None = None, result: type | None = None
) -> np.ndarray:
    """Run a compiled loop over the arrays, padded to whole vectors; the output is poisoned before."""
    dtype = dtype or arrays[0].dtype.type
    size = len(arrays[0])
    padded = [np.concatenate([a, np.ones(-size % lanes, a.dtype)]) for a in arrays]
    out = np.full(len(padded[0]), 77, result or dtype)
    address = compiled(dtype, lanes).get_function_address(name)
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * (len(arrays) + 1), ctypes.c_int64)(address)
    function(*[a.ctypes.data for a in padded], out.ctypes.data, len(out))
    return out[:size]


# Per function: float64 reference, mpmath reference, intervals to sample, and the limits for float and double.
REFERENCES: dict[str, tuple[Callable, Callable, list[tuple[float, float]], float, float]] = {
    "exp": (np.exp, mpmath.exp, [(-1, 1), (-104, 89), (-746, 710)], 1, 1),
    "exp2": (np.exp2, lambda x: mpmath.power(2, x), [(-1, 1), (-151, 129), (-1076, 1025)], 1, 1),
    "log": (np.log, mpmath.log, [(0.5, 2), (0.99, 1.01), (0, 1e4)], 1, 1.3),
    "log2": (np.log2, lambda x: mpmath.log(x, 2), [(0.5, 2), (0.99, 1.01), (0, 1e4)], 2, 2),
    "sin": (np.sin, mpmath.sin, [(-7, 7), (-1e5, 1e5), (-1e12, 1e12)], 1.7, 1.7),
    "cos": (np.cos, mpmath.cos, [(-7, 7), (-1e5, 1e5), (-1e12, 1e12)], 1.7, 1.7),
    "tanh": (np.tanh, mpmath.tanh, [(-1, 1), (-20, 20)], 2, 2.1),
    "erf": (np.vectorize(math.erf, otypes=[float]), mpmath.erf, [(-1, 1), (-6, 6)], 2, 2),
    "sqrt": (np.sqrt, mpmath.sqrt, [(0, 1e4)], 0.5, 0.5),
    "rsqrt": (lambda x: 1 / np.sqrt(x), lambda x: 1 / mpmath.sqrt(x), [(0, 1e4)], 1.5, 1.5),
}

THRESHOLDS = [
    0.0, 1.0, 2.0, 0.5, 2 / 3, 4 / 3, math.sqrt(0.5), math.sqrt(2), 1e-3, 1e-8, 1e-16, 3.95, 5.95, 9.0109, 19.07,
    math.log(2) / 2, 1.5 * math.log(2), 87.3365, 88.0297, 88.72284, 103.2789, 103.972, 126.0, 127.0, 128.0, 149.0,
    150.0, 709.782712893384, 708.396418532264, 745.133219101941, 1022.0, 1023.0, 1024.0, 1074.0, 1075.0, 2.0**-126,
    2.0**-149, 2.0**-1022, 5e-324, 2.0**-25, 2.0**-54, 2.0**64, 2.0**127, 3.4028235e38, 1.7976931348623157e308,
    *(k * math.pi / 4 for k in range(1, 13)), 63662 * math.pi / 2, 1e5, 105615.0,
]  # fmt: skip


def inputs(name: str, dtype: type, random: np.random.Generator, count: int) -> np.ndarray:
    """Random points of every interval, random bit patterns, and three neighbours on each side of thresholds."""
    width = 32 if dtype is np.float32 else 64
    with np.errstate(over="ignore"):
        edges = np.array([*THRESHOLDS, *(-t for t in THRESHOLDS)]).astype(dtype)
        near = [edges]
        for direction in (np.inf, -np.inf):
            step = edges
            for _ in range(3):
                step = np.nextafter(step, dtype(direction))
                near.append(step)
    sampled = [random.uniform(low, high, count).astype(dtype) for low, high in REFERENCES[name][2]]
    patterns = random.integers(0, 2**width, count, dtype=f"u{width // 8}").view(dtype)
    subnormal = (random.integers(0, 2**40, 100) * 2.0 ** (-166 if width == 32 else -1074)).astype(dtype)
    x = np.concatenate([*near, *sampled, patterns, subnormal, -subnormal])
    if dtype is np.float64 and name in ("sin", "cos"):  # the double reduction is exact up to here
        x = x[~(np.abs(x) > 2.0**40)]
    return x


def float_error(got: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """|got - exact| in ulp of float32, for float64 `exact`."""
    limit = 2.0**128
    got, exact = (np.clip(a.astype(np.float64), -limit, limit) for a in (got, exact))
    ulp = np.ldexp(1.0, np.maximum(np.frexp(exact)[1] - 24, -149))
    return np.abs(got - exact) / ulp


def double_error(got: float, exact: mpmath.mpf) -> float:
    limit = mpmath.mpf(2) ** 1024
    value = math.copysign(1, got) * limit if math.isinf(got) else mpmath.mpf(got)
    exact = min(max(exact, -limit), limit)
    exponent = max(int(mpmath.frexp(exact)[1]), -1021)
    return float(abs(value - exact) / mpmath.mpf(2) ** (exponent - 53))


def assert_within(name: str, x: np.ndarray, error: np.ndarray, limit: float) -> None:
    worst = int(np.argmax(error))
    found = f"{name}: {error[worst]:.3f} ulp at {x[worst]!r} ({x[worst].item().hex()}), limit {limit}"
    assert error[worst] <= limit, found


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("name", REFERENCES)
def test_float_accuracy(name: str, lanes: int) -> None:
    reference, _, _, limit, _ = REFERENCES[name]
    x = inputs(name, np.float32, np.random.default_rng(), 5000)
    got = call(name, x, lanes=lanes)
    with np.errstate(all="ignore"):
        exact = reference(x.astype(np.float64))
    number = ~np.isnan(exact)
    np.testing.assert_array_equal(np.isnan(got), ~number)
    zero = got == 0
    np.testing.assert_array_equal(np.signbit(got[zero]), np.signbit(exact[zero]), err_msg="sign of zero")
    assert_within(name, x[number], float_error(got[number], exact[number]), limit)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("name", REFERENCES)
def test_double_accuracy(name: str, lanes: int) -> None:
    rough, reference, _, _, limit = REFERENCES[name]
    x = inputs(name, np.float64, np.random.default_rng(), 150)
    got = call(name, x, lanes=lanes)
    with np.errstate(all="ignore"):
        approximate = rough(x)
    number = ~np.isnan(approximate)
    np.testing.assert_array_equal(np.isnan(got), ~number)
    regular = np.isfinite(x) & number & (np.isfinite(approximate) | (np.abs(x) > 1)) & (x != 0)
    np.testing.assert_array_equal(got[number & ~regular], approximate[number & ~regular])
    with mpmath.workprec(120):
        exact = [reference(mpmath.mpf(float(v))) for v in x[regular]]
        error = np.array([double_error(float(g), e) for g, e in zip(got[regular], exact)])
    assert_within(name, x[regular], error, limit)


SPECIAL = [
    # x, {function: f(x)}
    (0.0, {"exp": 1, "exp2": 1, "log": -math.inf, "log2": -math.inf, "sin": 0.0, "cos": 1, "tanh": 0.0, "erf": 0.0,
           "sqrt": 0.0, "rsqrt": math.inf}),
    (-0.0, {"exp": 1, "exp2": 1, "log": -math.inf, "log2": -math.inf, "sin": -0.0, "cos": 1, "tanh": -0.0, "erf": -0.0,
            "sqrt": -0.0, "rsqrt": -math.inf}),
    (math.inf, {"exp": math.inf, "exp2": math.inf, "log": math.inf, "log2": math.inf, "sin": math.nan,
                "cos": math.nan, "tanh": 1, "erf": 1, "sqrt": math.inf, "rsqrt": 0.0}),
    (-math.inf, {"exp": 0.0, "exp2": 0.0, "log": math.nan, "log2": math.nan, "sin": math.nan, "cos": math.nan,
                 "tanh": -1, "erf": -1, "sqrt": math.nan, "rsqrt": math.nan}),
    (math.nan, dict.fromkeys(REFERENCES, math.nan)),
    (-1.0, {"log": math.nan, "log2": math.nan, "sqrt": math.nan}),
    (-2.0, {"exp2": 0.25}),
    (1.0, {"log": 0.0, "log2": 0.0, "exp2": 2, "sqrt": 1, "rsqrt": 1}),
]  # fmt: skip


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_special_values(dtype: type, lanes: int) -> None:
    for x, expected in SPECIAL:
        for name, value in expected.items():
            got = call(name, np.full(lanes, x, dtype), lanes=lanes)
            np.testing.assert_array_equal(got, dtype(value), err_msg=f"{name}({x})")
            if not math.isnan(value):
                np.testing.assert_array_equal(np.signbit(got), math.copysign(1, value) < 0, err_msg=f"{name}({x})")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nan_payloads_stay_nan(dtype: type) -> None:
    """The exponent arithmetic on a NaN's bits must not turn it into a number."""
    bits, infinity, mantissa = (np.uint32, 0x7F800000, 23) if dtype is np.float32 else (np.uint64, 0x7FF << 52, 52)
    payload = np.random.default_rng().integers(1, 2**mantissa, 500, dtype=bits)
    sign = np.random.default_rng().integers(0, 2, 500, dtype=bits) << bits(mantissa + (8 if bits is np.uint32 else 11))
    x = (payload | bits(infinity) | sign).view(dtype)
    for name in REFERENCES:
        assert np.isnan(call(name, x, lanes=8)).all(), name


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_powers_of_two_are_exact(dtype: type) -> None:
    n = np.arange(-149, 128) if dtype is np.float32 else np.arange(-1074, 1024)
    powers = np.ldexp(dtype(1), n).astype(dtype)
    np.testing.assert_array_equal(call("exp2", n.astype(dtype), lanes=8), powers)
    np.testing.assert_array_equal(call("log2", powers, lanes=8), n.astype(dtype))


def test_float_sine_of_every_magnitude() -> None:
    """Where many bits of pi/2 are needed: the floats nearest to its multiples, and random ones up to 2^128.

    The reduction's absolute error of about 2^-51 shows only there: a search of all floats whose sine or cosine
    is below 2^-20 found one above 2 ulp, cos(7.729179e28) with 2.7.
    """
    random = np.random.default_rng()
    x = np.ldexp(random.uniform(1, 2, 20000), random.integers(-149, 128, 20000)).astype(np.float32)
    x = np.concatenate([x, -x, np.array([16367173 * 2.0**72, 43998770000.0, 3.4028235e38], np.float32)])
    for name in ("sin", "cos"):
        exact = REFERENCES[name][0](x.astype(np.float64))
        error = float_error(call(name, x, lanes=16), exact)
        assert_within(name, x, np.where(np.abs(exact) < 2.0**-26, error / 2, error), 1.7)


def test_double_sine_stays_bounded() -> None:
    random = np.random.default_rng()
    x = np.ldexp(random.uniform(-1, 1, 5000), random.integers(40, 1024, 5000))
    for name in ("sin", "cos"):
        assert (np.abs(call(name, x, lanes=8)) <= 1).all()


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounding_and_absolute_value(dtype: type, lanes: int) -> None:
    x = inputs("sqrt", dtype, np.random.default_rng(), 500)
    x = np.concatenate([x, -x, np.arange(-4, 4, 0.25).astype(dtype), np.array([np.inf, -np.inf, np.nan], dtype)])
    for name, reference in (("floor", np.floor), ("ceil", np.ceil), ("abs", np.abs)):
        with np.errstate(invalid="ignore"):
            got, expected = call(name, x, lanes=lanes), reference(x)
        np.testing.assert_array_equal(got, expected)
        number = ~np.isnan(expected)
        np.testing.assert_array_equal(np.signbit(got[number]), np.signbit(expected[number]))


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_minimum_and_maximum(dtype: type, lanes: int) -> None:
    random = np.random.default_rng()
    special = np.array([0.0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 1e-40], dtype)
    left, right = (a.ravel() for a in np.meshgrid(special, special))
    left = np.concatenate([left, random.standard_normal(100).astype(dtype)])
    right = np.concatenate([right, random.standard_normal(100).astype(dtype)])
    for name, reference in (("min", np.fmin), ("max", np.fmax), ("min_nan", np.minimum), ("max_nan", np.maximum)):
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(call(name, left, right, lanes=lanes), reference(left, right), err_msg=name)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize(("dtype", "precision"), [(np.float32, 24), (np.float64, 53)])
def test_fma_rounds_once(dtype: type, precision: int, lanes: int) -> None:
    random = np.random.default_rng()
    a, b = (random.standard_normal(400).astype(dtype) for _ in range(2))
    c = (-a * b * random.choice([1, 1 + 2.0**-10, 0.3], 400)).astype(dtype)  # cancellation shows a second rounding
    with mpmath.workprec(400):
        exact = [mpmath.mpf(float(p)) * float(q) + float(r) for p, q, r in zip(a, b, c)]
    with mpmath.workprec(precision):
        expected = np.array([float(+value) for value in exact], dtype)
    np.testing.assert_array_equal(call("fma", a, b, c, lanes=lanes), expected)


@pytest.mark.parametrize("lanes", LANES)
def test_every_bfloat16(lanes: int) -> None:
    bits = np.arange(65536).astype(np.uint16)
    got = call("from_bfloat16", bits, lanes=lanes, dtype=np.float32)
    expected = bits.view(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))
    back = call("to_bfloat16", got, lanes=lanes, result=np.uint16)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(back[~nan], bits[~nan])
    np.testing.assert_array_equal(back[nan], bits[nan] | 0x40)


@pytest.mark.parametrize("lanes", LANES)
def test_rounding_to_bfloat16(lanes: int) -> None:
    random = np.random.default_rng()
    patterns = random.integers(0, 2**32, 20000, dtype=np.uint32)
    ties = (patterns & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    edges = [0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 1, 0x8000, 0x8001]
    bits = np.concatenate([patterns, ties, ties - np.uint32(1), ties + np.uint32(1), np.array(edges, np.uint32)])
    x = bits.view(np.float32)
    got = call("to_bfloat16", x, lanes=lanes, result=np.uint16)
    with np.errstate(all="ignore"):
        expected = x.astype(ml_dtypes.bfloat16).view(np.uint16)
    nan = np.isnan(x)
    np.testing.assert_array_equal(got[~nan], expected[~nan])
    assert np.isnan(got[nan].view(ml_dtypes.bfloat16).astype(np.float32)).all()


@pytest.mark.parametrize(
    ("triple", "cpu"), [("x86_64-unknown-linux-gnu", "x86-64-v3"), ("arm64-apple-macosx", "apple-m1")]
)
def test_no_calls_to_libm(triple: str, cpu: str) -> None:
    """Inline on every target with fused multiply-add: no function of the module calls anything."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    module = ir.Module()
    for element in (ir.FloatType(), ir.DoubleType()):
        for name in UNARY:
            emit = functools.partial(emit_by_name, name)
            loop(module, f"{name}_{element}", emit, element, element, 8, 1)
    machine = binding.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=1)
    assembly = machine.emit_assembly(binding.parse_assembly(str(module)))
    assert "fma" in assembly or "fmla" in assembly
    assert re.findall(r"^\s+(?:callq?|blr?)\s.*$", assembly, re.MULTILINE) == []


def test_errors_name_what_was_found() -> None:
    types = [ir.IntType(32), ir.FloatType(), ir.DoubleType()]
    function = ir.Function(ir.Module(), ir.FunctionType(ir.VoidType(), types), "f")
    b = ir.IRBuilder(function.append_basic_block())
    integer, single, double = function.args
    with pytest.raises(TypeError, match="exp got i32; expected float or double"):
        emit_math(b, "exp", [integer])
    with pytest.raises(TypeError, match="min got float, double; expected one type"):
        emit_math(b, "min", [single, double])
    with pytest.raises(ValueError, match="unknown mathematical function 'gamma'"):
        emit_math(b, "gamma", [single])
    with pytest.raises(ValueError, match="fma got 1 arguments and takes 3"):
        emit_math(b, "fma", [single])

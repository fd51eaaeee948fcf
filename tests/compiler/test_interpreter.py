"""The interpreter against references that share no code with it: Python integers, exact fractions, NumPy formulas."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from helpers import Build, pointer, tile_of
from random_programs import FEATURES, random_program

from nitinol.compiler import interpreter, ir
from nitinol.compiler.interpreter import KernelAssertion, OutOfBounds, Region, run
from nitinol.compiler.semantics import from_memory, memory_dtype, numpy_dtype, to_memory
from nitinol.language.types import (
    DType,
    bfloat16,
    float16,
    float32,
    float64,
    int1,
    int8,
    int16,
    int32,
    int64,
    uint8,
    uint16,
    uint32,
    uint64,
)

INTEGERS = (int8, int16, int32, int64, uint8, uint16, uint32, uint64)
FLOATS = (float16, bfloat16, float32, float64)
MANTISSA = {float16: (11, -24), bfloat16: (8, -133), float32: (24, -149), float64: (53, -1074)}  # bits, smallest


def apply(kind: str, element: DType, *arrays: np.ndarray, to: DType | None = None, **attributes) -> np.ndarray:
    """One elementwise operation on whole arrays (of a power of two length), through memory."""
    to = to or element
    n = len(arrays[0])
    result = bool(to == int1)
    b = Build(*[pointer(element)] * len(arrays), pointer(int8 if result else to))
    value = b(kind, *(b.load(i, (n,)) for i in range(len(arrays))), type=tile_of(to, (n,)), **attributes)
    if result:
        value = b("cast", value, type=tile_of(int8, (n,)))
    b.store(len(arrays), value)
    out = np.zeros(n, memory_dtype(int8 if result else to))
    run(b.function, (1,), [*(to_memory(a.astype(numpy_dtype(element)), element) for a in arrays), out])
    return from_memory(out, int8 if result else to)


def wrap(number: int, element: DType) -> int:
    number &= (1 << element.bits) - 1
    return number - (1 << element.bits) if element.is_signed and number >> (element.bits - 1) else number


def nearest(x: Fraction, element: DType) -> float:
    """The fraction rounded once to nearest even."""
    bits, smallest = MANTISSA[element]
    if x == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(x)))
    while Fraction(2) ** exponent > abs(x):
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= abs(x):
        exponent += 1
    step = Fraction(2) ** max(exponent - bits + 1, smallest)
    return float(round(x / step) * step)  # round() of a Fraction takes ties to even


def integers(rng, element, n=64):
    limits = np.iinfo(memory_dtype(element))
    values = rng.integers(limits.min, limits.max, n, dtype=memory_dtype(element), endpoint=True)
    values[: n // 4] = rng.integers(max(limits.min, -4), 5, n // 4)
    values[n // 4], values[n // 4 + 1] = limits.min, limits.max
    return rng.permutation(values)


def floats(rng, element, n=64, scale=4.0):
    values = rng.normal(size=n) * scale
    return from_memory(to_memory(apply("cast", float64, values, to=element), element), element)


@pytest.fixture
def rng():
    return np.random.default_rng()


@pytest.mark.parametrize("element", INTEGERS, ids=str)
def test_integer_operations(element, rng):
    x, y = integers(rng, element), integers(rng, element)
    safe = np.where(y == 0, 3, y).astype(y.dtype)
    shift = (y.astype(np.int64) & (element.bits - 1)).astype(y.dtype)
    bits = element.bits
    references = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "mulhi": lambda a, b: (a * b) >> bits,
        "and": lambda a, b: a & b,
        "or": lambda a, b: a | b,
        "xor": lambda a, b: a ^ b,
        "min": min,
        "max": max,
        "div": lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1),
        "rem": lambda a, b: abs(a) % abs(b) * (-1 if a < 0 else 1),
        "shl": lambda a, b: a << b,
        "shr": lambda a, b: a >> b,
        "eq": lambda a, b: a == b,
        "ne": lambda a, b: a != b,
        "lt": lambda a, b: a < b,
        "le": lambda a, b: a <= b,
        "gt": lambda a, b: a > b,
        "ge": lambda a, b: a >= b,
    }
    for kind, reference in references.items():
        second = safe if kind in ("div", "rem") else shift if kind in ("shl", "shr") else y
        got = apply(kind, element, x, second, to=int1 if kind in ir.COMPARISONS else None)
        expected = [wrap(int(reference(int(a), int(b))), element) for a, b in zip(x, second)]
        assert got.tolist() == expected, kind
    for kind, single in {"neg": lambda a: -a, "not": lambda a: ~a, "abs": abs}.items():
        assert apply(kind, element, x).tolist() == [wrap(single(int(a)), element) for a in x], kind


def test_integer_division_by_zero_is_defined_here():
    x = np.array([5, -5, 0, -(2**31)], np.int32)
    assert apply("div", int32, x, np.zeros(4, np.int32)).tolist() == [0, 0, 0, 0]
    assert apply("rem", int32, x, np.zeros(4, np.int32)).tolist() == x.tolist()


@pytest.mark.parametrize("element", FLOATS, ids=str)
def test_float_arithmetic_rounds_once(element, rng):
    x, y = floats(rng, element), floats(rng, element)
    y[y == 0] = 1
    z = floats(rng, element, scale=64.0)
    z[::3] *= x.dtype.type(2.0**-9)  # far apart, so that a second rounding would show
    z = apply("cast", float64, z.astype(np.float64), to=element)
    exact = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "div": lambda a, b: a / b,
        "min": min,
        "max": max,
        "rem": lambda a, b: a - b * math.trunc(a / b),
    }
    for kind, reference in exact.items():
        expected = [nearest(reference(Fraction(float(a)), Fraction(float(b))), element) for a, b in zip(x, y)]
        assert apply(kind, element, x, y).tolist() == expected, kind
    fused = [nearest(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)), element) for a, b, c in zip(x, y, z)]
    got = apply("fma", element, x, y, z).tolist()
    assert got == fused


def test_fma_does_not_round_twice():
    x, y = np.float32(1 + 2.0**-23), np.float32(1 + 2.0**-24 * 2)
    z = np.array([2.0**-60, -(2.0**-60), 2.0**53, 2.0**30], np.float32)
    expected = [nearest(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(c)), float32) for c in z]
    assert apply("fma", float32, np.full(4, x), np.full(4, y), z).tolist() == expected
    # A tie of float32 in the product, decided by a term that float64 cannot hold beside it.
    x = y = np.full(2, 1 + 2.0**-12, np.float32)
    z = np.array([2.0**-70, -(2.0**-70)], np.float32)
    product = Fraction(float(x[0])) * Fraction(float(y[0]))
    got = apply("fma", float32, x, y, z).tolist()
    assert got == [nearest(product + Fraction(float(c)), float32) for c in z]
    assert got[0] > float(product) > got[1]


@pytest.mark.parametrize("element", FLOATS, ids=str)
def test_math_functions(element, rng):
    """Within a unit in the last place of Python's `math`; two for fp64, where both round."""
    tolerance = 2.0 ** (1 - MANTISSA[element][0]) * (2 if element == float64 else 1)
    x = np.clip(floats(rng, element), -8, 8)  # exp(8) and exp(-8) are normal float16
    positive = np.abs(x) + x.dtype.type(0.25)
    functions = {"sin": math.sin, "cos": math.cos, "tanh": math.tanh, "erf": math.erf, "exp": math.exp}
    functions |= {"floor": math.floor, "ceil": math.ceil, "abs": abs, "exp2": lambda v: 2.0**v}
    roots = {"log": math.log, "log2": math.log2, "sqrt": math.sqrt, "rsqrt": lambda v: 1 / math.sqrt(v)}
    for kind, reference in (functions | roots).items():
        values = apply("cast", float64, (positive if kind in roots else x).astype(np.float64), to=element)
        expected = [reference(float(v)) for v in values]
        np.testing.assert_allclose(apply(kind, element, values), expected, rtol=tolerance, atol=0, err_msg=kind)


@pytest.mark.parametrize("element", FLOATS, ids=str)
def test_special_values(element):
    nan, inf = math.nan, math.inf
    x = np.array([nan, 1.0, nan, inf, -inf, -0.0, 0.0, 2.0])
    y = np.array([2.0, nan, nan, -inf, 1.0, 0.0, -0.0, 2.0])

    def values(kind, *arrays, **options):
        return apply(kind, element, *arrays, **options).astype(float)

    np.testing.assert_array_equal(values("min", x, y), [2, 1, nan, -inf, -inf, 0, 0, 2])
    np.testing.assert_array_equal(values("max", x, y), [2, 1, nan, inf, 1, 0, 0, 2])
    np.testing.assert_array_equal(values("min", x, y, propagate_nan=True), [nan, nan, nan, -inf, -inf, 0, 0, 2])
    assert values("eq", x, y, to=int1).tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert values("ne", x, y, to=int1).tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    assert values("le", x, y, to=int1).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    np.testing.assert_array_equal(values("add", x, y), [nan, nan, nan, nan, -inf, 0, 0, 4])
    np.testing.assert_array_equal(values("fma", x, y, y), [nan, nan, nan, -inf, -inf, 0, 0, 6])
    assert values("cast", x, to=int1).tolist() == [1, 1, 1, 1, 1, 0, 0, 1]
    limits = np.iinfo(np.int16)
    assert apply("cast", element, x, to=int16).tolist() == [0, 1, 0, limits.max, limits.min, 0, 0, 2]
    assert np.signbit(values("neg", np.array([0.0, -0.0]))).tolist() == [True, False]


@pytest.mark.parametrize("target", (*INTEGERS, *FLOATS), ids=str)
@pytest.mark.parametrize("source", (*INTEGERS, *FLOATS), ids=str)
def test_casts(source, target, rng):
    if source.is_float:
        x = floats(rng, source, scale=300.0)
        x[:2] = [2.0**15, -(2.0**15)]
        numbers = [Fraction(float(v)) for v in x]
    else:
        x = integers(rng, source)
        if source.bits == 64 and target.is_float:  # the way over float64 may round twice above 2**53
            x = x >> 12 if source.is_signed else x >> np.uint64(12)
        numbers = [Fraction(int(v)) for v in x]
    got = apply("cast", source, x, to=target)
    if target.is_float:
        expected = [nearest(v, target) for v in numbers]
        if target == float16:
            expected = [math.copysign(math.inf, v) if abs(v) >= 65520 else v for v in expected]
        assert got.tolist() == expected
    elif source.is_float:  # saturates
        limits = np.iinfo(memory_dtype(target))
        assert got.tolist() == [min(max(math.trunc(v), limits.min), limits.max) for v in numbers]
    else:
        assert got.tolist() == [wrap(int(v), target) for v in numbers]


def test_float64_to_bfloat16_rounds_once():
    x = np.array([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8 - 2.0**-40, 1 + 2.0**-8, 1 + 3 * 2.0**-8])
    assert apply("cast", float64, x, to=bfloat16).tolist() == [1 + 2.0**-7, 1.0, 1.0, 1 + 2.0**-6]


def test_bitcasts(rng):
    pairs = ((float32, int32), (int32, float32), (float16, uint16), (uint16, bfloat16), (bfloat16, int16))
    for source, target in pairs:
        raw = rng.integers(0, 1 << source.bits, 32).astype(f"u{source.nbytes}")
        b = Build(pointer(source), pointer(target))
        b.store(1, b("bitcast", b.load(0, (32,)), type=tile_of(target, (32,))))
        out = np.zeros(32, memory_dtype(target))
        run(b.function, (1,), [raw.view(memory_dtype(source)), out])
        assert (out.view(raw.dtype) == raw).all()


def test_views(rng):
    x = rng.integers(-99, 99, (4, 8)).astype(np.int32)
    y = rng.integers(-99, 99, (4, 8)).astype(np.int32)
    cases = {
        "trans": (lambda b, u, v: b("trans", u, type=tile_of(int32, (8, 4)), perm=(1, 0)), x.T),
        "reshape": (lambda b, u, v: b("reshape", u, type=tile_of(int32, (2, 16))), x.reshape(2, 16)),
        "join": (lambda b, u, v: b("join", u, v, type=tile_of(int32, (4, 8, 2))), np.stack([x, y], -1)),
        "cat": (lambda b, u, v: b("cat", u, v, type=tile_of(int32, (4, 16)), axis=1), np.concatenate([x, y], 1)),
        "split": (
            lambda b, u, v: b(
                "sub",
                *b(
                    "split",
                    b("reshape", u, type=tile_of(int32, (4, 4, 2))),
                    type=[tile_of(int32, (4, 4))] * 2,
                ),
            ),
            x[:, ::2] - x[:, 1::2],
        ),
        "gather": (
            lambda b, u, v: b("gather", u, b("and", v, b.constant(3, v.type)), axis=0),
            np.take_along_axis(x, y & 3, 0),
        ),
    }
    for name, (make, expected) in cases.items():
        b = Build(*[pointer(int32)] * 3)
        b.store(2, make(b, b.load(0, (4, 8)), b.load(1, (4, 8))))
        out = np.zeros(expected.shape, np.int32)
        run(b.function, (1,), [x, y, out])
        assert (out == expected).all(), name


def reduction(kind, element, shape, axis, body, reverse=False):
    """A kernel that reduces or scans parameter 0 into parameter 1 with `body(b, left, right)`."""
    left = shape[:axis] + shape[axis + 1 :] if kind == "reduce" else shape
    b = Build(pointer(element), pointer(element))
    with b.block(element, element) as region:
        b("yield", body(b, *region.arguments))
    options = {"reverse": reverse} if kind == "scan" else {}
    b.store(1, b(kind, b.load(0, shape), type=tile_of(element, left), regions=[region], axis=axis, **options))
    return b.function


@pytest.mark.parametrize("axis", range(3))
def test_reductions_and_scans(axis, rng):
    shape = (2, 8, 4)
    x = rng.integers(-1000, 1000, shape).astype(np.int32)
    kept = shape[:axis] + shape[axis + 1 :]

    def result(function, like):
        out = np.zeros(like, np.int32)
        run(function, (1,), [x, out])
        return out

    for name, ufunc in {"add": np.add, "mul": np.multiply, "min": np.minimum, "xor": np.bitwise_xor}.items():
        body = lambda b, u, v, name=name: b(name, u, v)  # noqa: E731
        expected = ufunc.reduce(x, axis=axis, dtype=np.int32)
        assert (result(reduction("reduce", int32, shape, axis, body), kept) == expected).all(), name
        expected = ufunc.accumulate(x, axis=axis, dtype=np.int32)
        assert (result(reduction("scan", int32, shape, axis, body), shape) == expected).all(), name
        expected = np.flip(ufunc.accumulate(np.flip(x, axis), axis=axis, dtype=np.int32), axis)
        assert (result(reduction("scan", int32, shape, axis, body, reverse=True), shape) == expected).all(), name

    last = lambda b, u, v: b("or", v, b.constant(0, v.type))  # noqa: E731  associative, but not commutative
    assert (result(reduction("reduce", int32, shape, axis, last), kept) == x.take(-1, axis)).all()

    def branching(b, u, v):  # max, by an `if`: one lane at a time
        with b.block() as then:
            b("yield", u)
        with b.block() as other:
            b("yield", v)
        return b("if", b("gt", u, v), type=int32, regions=[then, other])

    assert (result(reduction("reduce", int32, shape, axis, branching), kept) == x.max(axis)).all()


def test_argmax_is_a_pair(rng):
    x = rng.integers(0, 4, (8, 16)).astype(np.float32)
    b = Build(pointer(float32), pointer(float32), pointer(int32))
    with b.block(float32, int32, float32, int32) as region:
        u, i, v, j = region.arguments
        first = b("or", b("gt", u, v), b("and", b("eq", u, v), b("lt", i, j)))
        b("yield", b("select", first, u, v, type=float32), b("select", first, i, j, type=int32))
    index = b("broadcast", b("reshape", b.arange(16), type=tile_of(int32, (1, 16))), type=tile_of(int32, (8, 16)))
    types = [tile_of(float32, (8,)), tile_of(int32, (8,))]
    best, where = b("reduce", b.load(0, (8, 16)), index, type=types, regions=[region], axis=1)
    b.store(1, best)
    b.store(2, where)
    out, at = np.zeros(8, np.float32), np.zeros(8, np.int32)
    run(b.function, (1,), [x, out, at])
    assert (out == x.max(1)).all()
    assert (at == x.argmax(1)).all()


@pytest.mark.parametrize("element", (*FLOATS, int8, uint8), ids=str)
def test_dot_is_exact_but_for_one_rounding(element, rng):
    m, n, k = 4, 8, 16
    wide = int32 if not element.is_float else float64 if element == float64 else float32
    draw = floats if element.is_float else integers
    a, c = draw(rng, element, m * k).reshape(m, k), draw(rng, element, k * n).reshape(k, n)
    acc = rng.integers(-9, 9, (m, n)).astype(numpy_dtype(wide))
    b = Build(pointer(element), pointer(element), pointer(wide))
    b.store(2, b("dot", b.load(0, (m, k)), b.load(1, (k, n)), b.load(2, (m, n))))
    out = acc.copy()
    run(b.function, (1,), [to_memory(a, element), to_memory(c, element), out])

    def entry(i, j):
        products = (Fraction(float(a[i, p])) * Fraction(float(c[p, j])) for p in range(k))
        return sum(products, Fraction(int(acc[i, j])))

    exact = [[entry(i, j) for j in range(n)] for i in range(m)]
    if wide == int32:
        assert out.tolist() == [[int(v) for v in row] for row in exact]
    else:  # float64 sums of 17 terms, then one rounding
        scale = float(np.abs(a.astype(float)).max() * np.abs(c.astype(float)).max() * k + 9)
        rounding = [[nearest(v, wide) for v in row] for row in exact]
        np.testing.assert_allclose(out, rounding, rtol=2.0**-23 if wide == float32 else 0, atol=scale * 17 * 2.0**-53)


def test_half_precision_sums_are_rounded_at_the_end():
    x = np.full(1024, 1.0, np.float16)
    x[0] = 2048  # where float16 counts in steps of 2: adding ones one by one would stay there
    out = np.zeros(1, np.float16)
    run(reduction("reduce", float16, (1024,), 0, lambda b, u, v: b("add", u, v)), (1,), [x, out])
    assert out[0] == 2048 + 1024  # 3071 is not a float16; ties to even


# -------------------------------------------------------------------------------------------------------- memory


def copy_kernel(shape=(8,), offset=0, other=None, masked=True):
    b = Build(pointer(float32), pointer(float32), int32, names=["source", "target", "n"])
    index = b.arange(shape[0])
    mask = b("lt", index, b("splat", b.parameters[2], type=index.type))
    moved = b("add", index, b.constant(offset, index.type))
    operands = [b.at(0, shape, moved)] + ([mask] if masked else [])
    if other is not None:
        operands.append(b.constant(other, tile_of(float32, shape)))
    value = b("load", *operands, type=tile_of(float32, shape))
    b("store", b.at(1, shape), value, *([mask] if other is None and masked else []))
    return b.function


def test_masks_and_poison():
    x, out = np.arange(5, dtype=np.float32), np.full(8, -1, np.float32)
    run(copy_kernel(), (1,), [x, out, 5])
    assert out.tolist() == [0, 1, 2, 3, 4, -1, -1, -1]
    run(copy_kernel(other=7.5), (1,), [x, out, 5])
    assert out.tolist() == [0, 1, 2, 3, 4, 7.5, 7.5, 7.5]
    b = Build(pointer(float32), pointer(float32), pointer(int32))
    mask = b("lt", b.arange(4), b.constant(2, tile_of(int32, (4,))))
    b.store(1, b("load", b.at(0, (4,)), mask, type=tile_of(float32, (4,))))
    b.store(2, b("load", b.at(2, (4,)), mask, type=tile_of(int32, (4,))))
    integers = np.arange(4, dtype=np.int32)
    run(b.function, (1,), [x, out, integers])
    np.testing.assert_array_equal(out[:4], [0, 1, np.nan, np.nan])
    assert integers.tolist() == [0, 1, -(2**31), -(2**31)]


def test_out_of_bounds_names_kernel_line_lane_and_buffer():
    x, out = np.zeros(5, np.float32), np.full(8, -1, np.float32)
    with pytest.raises(OutOfBounds) as error:
        run(copy_kernel(masked=False), (1,), [x, out, 8])
    text = str(error.value)
    for part in ("kernel test", "test.py:", "load in lane (5,)", "element 5 of source", "5 elements of fp32"):
        assert part in text
    assert (out == -1).all()
    with pytest.raises(OutOfBounds, match=r"lane \(0,\) of element -3 of source"):
        run(copy_kernel(offset=-3), (1,), [x, out, 5])
    with pytest.raises(OutOfBounds, match=r"store in lane \(3,\) of element 3 of target, which has 3 elements"):
        run(copy_kernel(), (1,), [x, np.zeros(3, np.float32), 5])
    with pytest.raises(OutOfBounds, match="of source, which has 0 elements"):
        run(copy_kernel(), (1,), [np.zeros(0, np.float32), out, 1])
    run(copy_kernel(), (1,), [np.zeros(0, np.float32), out, 0])  # nothing touched: fine


def test_the_lane_of_a_masked_access_is_that_of_the_tile():
    with pytest.raises(OutOfBounds, match=r"lane \(2,\) of element 5"):
        run(copy_kernel(offset=3), (1,), [np.zeros(5, np.float32), np.zeros(8, np.float32), 4])


def test_a_pointer_does_not_stray_into_its_neighbour():
    memory = np.arange(16, dtype=np.float32)
    with pytest.raises(OutOfBounds, match="element 4 of source, which has 4"):
        run(copy_kernel(masked=False), (1,), [memory[:4], memory[4:12], 8])


def test_read_only_memory_is_not_written():
    out = np.zeros(8, np.float32)
    out.flags.writeable = False
    with pytest.raises(OutOfBounds, match="target, which is read-only"):
        run(copy_kernel(), (1,), [np.zeros(8, np.float32), out, 8])


def test_strided_and_reversed_arrays_cover_their_memory():
    base = np.arange(16, dtype=np.float32)
    out = np.zeros(8, np.float32)
    run(copy_kernel(offset=-7), (1,), [base[7::-1], out, 8])  # points at 7; elements 0..7 of base are its memory
    assert out.tolist() == list(range(8))
    with pytest.raises(OutOfBounds, match="element 1 of source"):
        run(copy_kernel(offset=1), (1,), [base[7::-1], out, 8])
    run(copy_kernel(), (1,), [base[::2], out, 8])
    assert out.tolist() == list(range(8))


def test_unaligned_access():
    raw = bytearray(17)
    raw[1:] = np.arange(4, dtype=np.float32).tobytes()
    b = Build(pointer(uint8), pointer(float32))
    address = b("addptr", b.parameters[0], b.constant(1, int32))
    source = b("bitcast", address, type=pointer(float32))
    tile = b("addptr", b("splat", source, type=tile_of(pointer(float32), (4,))), b.arange(4))
    value = b("load", tile)
    b.store(1, value)
    b("store", tile, b("neg", value))
    out = np.zeros(4, np.float32)
    run(b.function, (1,), [raw, out])
    assert out.tolist() == [0, 1, 2, 3]
    assert np.frombuffer(raw, np.float32, 4, 1).tolist() == [0, -1, -2, -3]


def test_raw_addresses_and_pointers_made_from_integers():
    x, y = np.arange(4, dtype=np.int32), np.arange(10, 14, dtype=np.int32)
    table, out = np.array([y.ctypes.data, x.ctypes.data]), np.zeros(2, np.int32)
    b = Build(pointer(int64), pointer(int32))
    pointers = b("cast", b.load(0, (2,)), type=tile_of(pointer(int32), (2,)))
    b.store(1, b("load", b("addptr", pointers, b.constant(2, tile_of(int32, (2,))))))
    table_region, out_region, *regions = [Region(a.ctypes.data, a.nbytes) for a in (table, out, x, y)]
    run(b.function, (1,), [table_region, out_region], regions=regions)
    assert out.tolist() == [12, 2]
    with pytest.raises(OutOfBounds, match="in no buffer of this kernel"):
        run(b.function, (1,), [table, out])
    memory = np.arange(16, dtype=np.float32)
    inner = Region(memory.ctypes.data, 64, pointer=memory.ctypes.data + 16)
    out = np.zeros(8, np.float32)
    run(copy_kernel(offset=-4), (1,), [inner, out, 8])
    assert out.tolist() == list(range(8))
    with pytest.raises(OutOfBounds, match="lane \\(3,\\) of element 12 of source"):
        run(copy_kernel(offset=9), (1,), [inner, out, 8])
    with pytest.raises(OutOfBounds, match="read-only"):
        run(copy_kernel(), (1,), [inner, Region(out.ctypes.data, 32, writable=False), 8])


def test_pointers_compare_by_address():
    b = Build(pointer(int32), pointer(int32), pointer(int64))
    same = b("eq", b.parameters[0], b("addptr", b.parameters[1], b.constant(-2, int32)))
    b.store(2, b("cast", same, type=int64))
    memory, out = np.zeros(4, np.int32), np.zeros(1, np.int64)
    run(b.function, (1,), [memory[:2], memory[2:], out])
    assert out[0] == 1
    b = Build(pointer(int32), pointer(int64))
    b.store(1, b("cast", b.parameters[0], type=int64))
    run(b.function, (1,), [memory, out])
    assert out[0] == memory.ctypes.data


@pytest.mark.parametrize("element", (int32, uint64, int8, float16, bfloat16, float32), ids=str)
def test_atomics_take_lanes_one_after_the_other(element):
    for kind, expected in (("add", [6, 4]), ("max", [3, 4]), ("min", [0, 0]), ("xchg", [3, 4])):
        b = Build(pointer(element), pointer(element))
        index = b("shr", b.arange(4), b.constant(1, tile_of(int32, (4,))))  # 0 0 1 1
        one = b("add", b.arange(4), b.constant(1, tile_of(int32, (4,))))
        mask = b("ne", one, b.constant(3, one.type))  # lanes 1, 2, 4: values 1, 2 | 4
        value = b("cast", one, type=tile_of(element, (4,)))
        value = b("select", b("eq", one, b.constant(2, one.type)), b.constant(3, value.type), value, type=value.type)
        old = b("atomic_rmw", b.at(0, (4,), index), value, mask, type=value.type, kind=kind)
        b("store", b.at(1, (4,)), old, mask)
        cells = to_memory(np.array([2, 0], numpy_dtype(element)), element)
        if kind in ("min", "max"):
            cells = to_memory(np.array([0, 0], numpy_dtype(element)), element)
        start = from_memory(cells.copy(), element)
        old_out = np.zeros(4, memory_dtype(element))
        run(b.function, (1,), [cells, old_out])
        assert from_memory(cells, element).tolist() == expected, kind
        after_first = {"add": 3, "max": 1, "min": 0, "xchg": 1}[kind]
        assert from_memory(old_out, element).tolist() == [start[0], after_first, 0, 0], kind


def test_compare_and_swap():
    b = Build(pointer(int32), pointer(int32))
    shape = tile_of(int32, (4,))
    old = b("atomic_cas", b.at(0, (4,), b.constant(0, shape)), b.arange(4), b.arange(4, 1), type=shape)
    b.store(1, old)
    cell, out = np.zeros(1, np.int32), np.zeros(4, np.int32)
    run(b.function, (1,), [cell, out])
    assert cell[0] == 4
    assert out.tolist() == [0, 1, 2, 3]


# --------------------------------------------------------------------------------------------- control and the rest


def test_loops_and_branches(rng):
    """Sum of the collatz lengths of 1..n, with for, while and if."""
    b = Build(pointer(int32), int32)
    with b.block(int32, int32) as body:
        i, total = body.arguments
        with b.block(int32, int32) as before:
            v, steps = before.arguments
            b("condition", b("gt", v, b.constant(1, int32)), v, steps)
        with b.block(int32, int32) as after:
            v, steps = after.arguments
            with b.block() as odd:
                b("yield", b("add", b("mul", v, b.constant(3, int32)), b.constant(1, int32)))
            with b.block() as even:
                b("yield", b("shr", v, b.constant(1, int32)))
            is_odd = b("eq", b("and", v, b.constant(1, int32)), b.constant(1, int32))
            following = b("if", is_odd, type=int32, regions=[odd, even])
            b("yield", following, b("add", steps, b.constant(1, int32)))
        _, steps = b("while", i, b.constant(0, int32), type=[int32, int32], regions=[before, after])
        b("yield", b("add", total, steps))
    one = b.constant(1, int32)
    b.store(0, b("for", one, b.parameters[1], one, b.constant(0, int32), type=int32, regions=[body]))

    def collatz(v):
        steps = 0
        while v > 1:
            v, steps = (3 * v + 1 if v % 2 else v // 2), steps + 1
        return steps

    for n in (0, 1, 2, int(rng.integers(3, 30))):
        out = np.full(1, -1, np.int32)
        run(b.function, (1,), [out, n])
        assert out[0] == sum(collatz(v) for v in range(1, n))


def test_programs_run_in_order_and_know_their_place():
    b = Build(pointer(int32))
    x, y, z = (b("program_id", type=int32, axis=a) for a in range(3))
    nx, ny = (b("num_programs", type=int32, axis=a) for a in range(2))
    flat = b("add", x, b("mul", nx, b("add", y, b("mul", ny, z))))
    count = b("load", b.parameters[0])
    b("store", b("addptr", b.parameters[0], b("add", flat, b.constant(1, int32))), count)
    b("store", b.parameters[0], b("add", count, b.constant(1, int32)))
    out = np.zeros(1 + 24, np.int32)
    run(b.function, (2, 3, 4), [out])
    assert out.tolist() == [24, *range(24)]


def test_print_assert_and_trace(capsys):
    b = Build(int32)
    b("device_print", b.parameters[0], b.arange(2), prefix="x =", hex=False)
    b("device_print", b.parameters[0], prefix="hex", hex=True)
    b("assert", b("lt", b.arange(4), b("splat", b.parameters[0], type=tile_of(int32, (4,)))), message="too small")
    seen: list[str] = []
    run(b.function, (1,), [-0 + 4], trace=lambda op, values: seen.append(op.kind + str(len(values))))
    assert capsys.readouterr().out == "pid (0, 0, 0) x = 4 [0 1]\npid (0, 0, 0) hex 0x4\n"
    assert seen == [op.kind + str(len(op.results)) for op in b.function.body.ops]
    with pytest.raises(KernelAssertion, match=r"test.py:\d+.*too small \(lane \(3,\)\)"):
        run(b.function, (1,), [3])


def test_arguments_that_do_not_fit():
    function = copy_kernel()
    x = np.zeros(8, np.float32)
    with pytest.raises(TypeError, match="takes 3 arguments, got 2"):
        run(function, (1,), [x, x])
    with pytest.raises(TypeError, match="source is a pointer: expected an array or a buffer, got int"):
        run(function, (1,), [5, x, 1])
    with pytest.raises(TypeError, match="n is int32: expected a number, got ndarray"):
        run(function, (1,), [x, x, x])
    with pytest.raises(OverflowError):
        run(function, (1,), [x, x, 2**31])


def test_gather_checks_its_index():
    b = Build(pointer(int32))
    x = b.load(0, (4,))
    b.store(0, b("gather", x, x, axis=0))
    with pytest.raises(OutOfBounds, match=r"gather in lane \(2,\) of index 4, extent 4"):
        run(b.function, (1,), [np.array([0, 3, 4, 1], np.int32)])


# --------------------------------------------------------------------------------------- the generator of programs


@pytest.mark.parametrize("size", ("small", "medium"))
def test_random_programs_run(size):
    """Verified, in bounds, the same twice; no float of an output is far from its bound or NaN."""
    seed = int(np.random.default_rng().integers(1 << 30))
    for number in range(30 if size == "small" else 8):
        program = random_program(np.random.default_rng(seed + number), size)
        first, second = program.copies(), program.copies()
        run(program.function, program.grid, first)
        run(program.function, program.grid, second)
        program.compare(first, second)
        for index in program.outputs:
            values = from_memory(first[index], program.function.parameters[index].type.element)
            tame = values.dtype.kind in "iu" or np.all(np.abs(values.astype(np.float64)) <= 200)
            assert tame, f"seed {seed + number}"


def test_aliases_are_one_memory():
    rng, found = np.random.default_rng(), 0
    for _ in range(20):
        program = random_program(rng, "small", FEATURES | {"alias"})
        first, second = program.copies(), program.copies()
        run(program.function, program.grid, first)
        run(program.function, program.grid, second)
        program.compare(first, second)
        for i, j in enumerate(program.aliases):
            assert first[i] is first[j]
            found += i != j
    assert found


def test_random_programs_use_every_operation():
    kinds: set[str] = set()
    rng = np.random.default_rng()
    for _ in range(150):
        kinds |= {op.kind for op in ir.walk(random_program(rng, "small").function.body)}
    every = ir.ELEMENTWISE | ir.VIEWS | ir.CONTROL | {"gather", "dot", "reduce", "scan", "load", "store", "atomic_rmw"}
    assert len(every - kinds) <= 3, every - kinds  # the rarest may be missing once
    plain = random_program(rng, "small", features=set(), dtypes=[float32])
    assert not {op.kind for op in ir.walk(plain.function.body)} & (ir.CONTROL | {"dot", "reduce", "scan", "gather"})
    assert "dot" in FEATURES


def test_compare_notices_a_difference(rng):
    while True:
        program = random_program(rng, "small")
        if program.outputs:
            break
    expected, actual = program.copies(), program.copies()
    run(program.function, program.grid, expected)
    run(program.function, program.grid, actual)
    index = program.outputs[0]
    step = 2 * program.tolerance[0] + 1
    element = program.function.parameters[index].type.element
    values = from_memory(actual[index], element)
    actual[index][:] = to_memory((values + values.dtype.type(max(1, step))).astype(values.dtype), element)
    with pytest.raises(AssertionError, match="differs"):
        program.compare(actual, expected)


def test_tolerances_cover_rounding(monkeypatch):
    """An interpreter with a last bit of noise in every rounding stays within the stated tolerances."""
    exact = interpreter.elementwise
    rng = np.random.default_rng()
    ulp = {float16: 2.0**-11, bfloat16: 2.0**-8, float32: 2.0**-24, float64: 2.0**-53}

    def noisy(op):
        function, element = exact(op), op.results[0].element
        if element not in ulp or op.kind not in "add sub mul div fma exp log sin tanh sqrt".split():
            return function

        def step(*values):
            result = function(*values)
            noise = 1 + ulp[element] * rng.uniform(-1, 1, np.shape(result))
            return interpreter.round_to(np.asarray(result, np.float64) * noise, element)

        return step

    for _ in range(15):
        program = random_program(rng, "small")
        expected, actual = program.copies(), program.copies()
        run(program.function, program.grid, expected)
        with monkeypatch.context() as patch:
            patch.setattr(interpreter, "elementwise", noisy)
            run(program.function, program.grid, actual)
        program.compare(actual, expected)

"""The tile language, interpreted and compiled, for the CPU or with `--device`: every construct against NumPy."""

from __future__ import annotations

import native
import numpy as np
import pytest

import nitinol.language as tl
from nitinol.compiler import interpreter, ir
from nitinol.compiler.frontend import build_ir
from nitinol.language import specialise
from nitinol.runtime import get_device
from nitinol.runtime.kernel import jit


def build(kernel, *arguments, **keywords):
    """The IR for a call and the values of its run-time parameters (arrays stay arrays)."""
    bound = kernel.bind(arguments, keywords)
    signature, _ = specialise(kernel, bound)
    return build_ir(kernel, signature), [bound[name] for name, _, _ in signature.parameters]


ENGINES = {"interpreter": interpreter.run, "native": native.run}


def runner(engine):
    """run(kernel, grid, *arguments, **keywords): compiles, runs, and returns the IR."""

    def run(kernel, grid, *arguments, **keywords):
        function, values = build(kernel, *arguments, **keywords)
        if engine == "native" and get_device().name != "cpu":
            jit(kernel)[grid](*arguments, **keywords)
        else:
            ENGINES[engine](function, (*grid, 1, 1)[:3], values)
        return function

    return run


@pytest.fixture(params=ENGINES)
def run(request):
    return runner(request.param)


@pytest.fixture
def rng():
    return np.random.default_rng()


# ------------------------------------------------------------------------------------------------------ typing rules

TYPES = [
    tl.int1, tl.int8, tl.int16, tl.int32, tl.int64, tl.uint8, tl.uint16, tl.uint32, tl.uint64,
    tl.float16, tl.bfloat16, tl.float32, tl.float64,
]  # fmt: skip
NUMPY = {
    tl.int1: np.bool_, tl.int8: np.int8, tl.int16: np.int16, tl.int32: np.int32, tl.int64: np.int64, tl.uint8: np.uint8,
    tl.uint16: np.uint16, tl.uint32: np.uint32, tl.uint64: np.uint64, tl.float16: np.float16, tl.float32: np.float32,
    tl.float64: np.float64,
}  # fmt: skip


def typed(expression, x, y):
    """The type of an expression over two tiles of shape (4,)."""

    @jit
    def kernel(X: tl.constexpr, Y: tl.constexpr):
        x = tl.zeros((4,), X)
        y = tl.zeros((4,), Y) if Y is not None else 0
        result = expression(x, y)
        tl.device_print("", result)

    function, _ = build(kernel, x, y)
    return function.body.ops[-1].operands[0].element


@jit
def plus(x, y):
    return x + y


@jit
def over(x, y):
    return x / y


@jit
def floor_over(x, y):
    return x // y


@jit
def remainder(x, y):
    return x % y


@pytest.mark.parametrize(
    "x, y, expected",
    [
        (tl.int8, tl.int32, tl.int32), (tl.int32, tl.uint32, tl.uint32), (tl.int64, tl.uint32, tl.int64),
        (tl.uint8, tl.int8, tl.uint8), (tl.int1, tl.int8, tl.int8), (tl.int1, tl.int1, tl.int1),
        (tl.float16, tl.float32, tl.float32), (tl.bfloat16, tl.float16, tl.float16),
        (tl.bfloat16, tl.bfloat16, tl.bfloat16), (tl.float16, tl.int64, tl.float16), (tl.bfloat16, tl.int8, tl.float32),
        (tl.int64, tl.float32, tl.float32), (tl.float32, tl.float64, tl.float64), (tl.int64, tl.bfloat16, tl.float32),
    ],
)  # fmt: skip
def test_promotion_of_tiles(x, y, expected):
    assert typed(plus, x, y) == typed(plus, y, x) == expected


@pytest.mark.parametrize(
    "number, tile, expected",
    [
        (1, tl.int8, tl.int8), (1, tl.uint64, tl.uint64), (1.5, tl.int8, tl.float32), (1.5, tl.float16, tl.float16),
        (2, tl.bfloat16, tl.bfloat16), (True, tl.int8, tl.int8), (1, tl.int1, tl.int32),
        (1e300, tl.float32, tl.float32), (1e300, tl.int32, tl.float64), (2**40, tl.int64, tl.int64),
        (2**31, tl.int1, tl.uint32),
    ],
)  # fmt: skip
def test_numbers_do_not_widen_their_own_kind(number, tile, expected):
    @jit
    def both(x, y):
        tl.static_assert(x.dtype == expected_constant)
        return x + number_constant

    number_constant, expected_constant = tl.constexpr(number), tl.constexpr(tile)
    assert typed(both, tile, None) == expected


def test_variables_do_widen():
    """A number assigned to a variable is a run-time scalar (int32 or fp32), as in Triton."""

    @jit
    def kernel(X: tl.constexpr):
        one = 1.5
        tl.device_print("", tl.zeros((4,), X) * one)

    function, _ = build(kernel, tl.float16)
    assert function.body.ops[-1].operands[0].element == tl.float32


@pytest.mark.parametrize(
    "expression, x, y, expected",
    [
        (over, tl.int32, tl.int8, tl.float32), (over, tl.float16, tl.float16, tl.float32),
        (over, tl.bfloat16, tl.bfloat16, tl.float32), (over, tl.float64, tl.int32, tl.float64),
        (floor_over, tl.int8, tl.int32, tl.int32), (floor_over, tl.uint8, tl.uint16, tl.uint16),
        (remainder, tl.float16, tl.float16, tl.float32), (remainder, tl.int64, tl.int8, tl.int64),
    ],
)  # fmt: skip
def test_division_types(expression, x, y, expected):
    assert typed(expression, x, y) == expected


def test_integer_division_truncates_at_run_time_and_floors_at_compile_time(run):
    @jit
    def kernel(out, a, b, A: tl.constexpr, B: tl.constexpr):
        tl.store(out, a // b)
        tl.store(out + 1, a % b)
        tl.store(out + 2, A // B)
        tl.store(out + 3, A % B)

    for a, b in ((-7, 3), (7, -3), (-7, -3), (7, 3)):
        out = np.zeros(4, np.int64)
        run(kernel, (1,), out, a, b, a, b)
        truncated = int(a / b)
        assert out.tolist() == [truncated, a - b * truncated, a // b, a % b]


@pytest.mark.parametrize(
    "dtype", [pytest.param(t, marks=pytest.mark.float64 if t == tl.float64 else ()) for t in TYPES if t in NUMPY]
)
def test_operators_match_numpy(run, rng, dtype):
    """The operators of each type; values are small enough for every result to be exact."""

    @jit
    def kernel(x_ptr, y_ptr, sums, products, less, equal, N: tl.constexpr):
        lanes = tl.arange(0, N)
        x = tl.load(x_ptr + lanes)
        y = tl.load(y_ptr + lanes)
        if x.dtype != tl.int1:
            tl.store(sums + lanes, x + y - 1)
            tl.store(products + lanes, x * y)
        else:
            tl.store(sums + lanes, x ^ y)
            tl.store(products + lanes, x & y)
        tl.store(less + lanes, x < y)
        tl.store(equal + lanes, x == y)

    kind = NUMPY[dtype]
    x, y = (rng.integers(0 if dtype.kind in ("uint", "bool") else -5, 2 if kind is np.bool_ else 6, 32) for _ in "xy")
    x, y = (x + (dtype.kind == "uint")).astype(kind), y.astype(kind)
    sums, products = np.zeros(32, kind), np.zeros(32, kind)
    less, equal = np.zeros(32, np.bool_), np.zeros(32, np.bool_)
    run(kernel, (1,), x, y, sums, products, less, equal, 32)
    assert np.array_equal(sums, x ^ y if kind is np.bool_ else x + y - kind(1))
    assert np.array_equal(products, x * y)
    assert np.array_equal(less, x < y) and np.array_equal(equal, x == y)


# -------------------------------------------------------------------------------------------------------- operations


def test_vector_add_with_a_ragged_end(run, rng):
    @jit
    def add(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
        offsets = tl.program_id(axis=0) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < n
        tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask) + tl.load(y_ptr + offsets, mask=mask), mask=mask)

    n = int(rng.integers(65, 200))
    x, y, out = rng.random(n, np.float32), rng.random(n, np.float32), np.full(n, np.nan, np.float32)
    function = run(add, (-(-n // 64),), x, y, out, n, BLOCK=64)
    assert np.array_equal(out, x + y)
    assert "%offsets = add" in str(function) and all(op.location is not None for op in ir.walk(function.body))


def test_math_functions(run, rng):
    @jit
    def kernel(x_ptr, out_ptr, N: tl.constexpr):
        lanes = tl.arange(0, N)
        x = tl.load(x_ptr + lanes)
        results = (
            tl.exp(x), tl.exp2(x), tl.log(x), tl.log2(x), tl.sqrt(x), tl.rsqrt(x), tl.sin(x), tl.cos(x), tl.tanh(x),
            tl.math.floor(x), tl.ceil(x), tl.abs(-x), tl.sigmoid(x), tl.fma(x, x, 1.0), tl.clamp(x, 0.5, 1.5),
            tl.minimum(x, 1), tl.maximum(1.0, x), tl.fdiv(x, x + x), x.exp(), max(x, 0.75), min(x, 0.75, 0.5),
        )  # fmt: skip
        for i in tl.static_range(len(results)):
            tl.store(out_ptr + i * N + lanes, results[i])

    x = rng.uniform(0.1, 3, 16).astype(np.float32)
    out = np.zeros((21, 16), np.float32)
    run(kernel, (1,), x, out, 16)
    d = x.astype(np.float64)
    expected = [
        np.exp(d), np.exp2(d), np.log(d), np.log2(d), np.sqrt(d), 1 / np.sqrt(d), np.sin(d), np.cos(d), np.tanh(d),
        np.floor(d), np.ceil(d), d, 1 / (1 + np.exp(-d)), d * d + 1, np.clip(d, 0.5, 1.5), np.minimum(d, 1),
        np.maximum(d, 1), np.full(16, 0.5), np.exp(d), np.maximum(d, 0.75), np.full(16, 0.5),
    ]  # fmt: skip
    expected[20] = np.minimum(d, 0.5)
    np.testing.assert_allclose(out, np.array(expected), rtol=1e-6, atol=1e-6)  # a few fp32 roundings


def test_nan_propagation(run):
    @jit
    def kernel(x_ptr, out_ptr):
        x = tl.load(x_ptr)
        tl.store(out_ptr, tl.maximum(x, 1.0))
        tl.store(out_ptr + 1, tl.maximum(x, 1.0, propagate_nan=tl.PropagateNan.ALL))

    out = np.zeros(2, np.float32)
    run(kernel, (1,), np.array([np.nan], np.float32), out)
    assert out[0] == 1 and np.isnan(out[1])


def test_casts_and_bitcasts(run, rng):
    @jit
    def kernel(x_ptr, half_ptr, int_ptr, bits_ptr, back_ptr, N: tl.constexpr):
        lanes = tl.arange(0, N)
        x = tl.load(x_ptr + lanes)
        tl.store(half_ptr + lanes, x.to(tl.float16))
        tl.store(int_ptr + lanes, tl.cast(x, tl.int8))
        bits = x.to(tl.uint32, bitcast=True)
        tl.store(bits_ptr + lanes, bits)
        tl.store(back_ptr + lanes, bits.to(tl.float32, bitcast=True))

    x = rng.uniform(-100, 100, 32).astype(np.float32)
    half, whole = np.zeros(32, np.float16), np.zeros(32, np.int8)
    bits, back = np.zeros(32, np.uint32), np.zeros(32, np.float32)
    run(kernel, (1,), x, half, whole, bits, back, 32)
    assert np.array_equal(half, x.astype(np.float16)) and np.array_equal(whole, np.trunc(x).astype(np.int8))
    assert np.array_equal(bits, x.view(np.uint32)) and np.array_equal(back, x)


def test_bfloat16(run, rng):
    ml_dtypes = pytest.importorskip("ml_dtypes")

    @jit
    def kernel(x_ptr, out_ptr, N: tl.constexpr):
        lanes = tl.arange(0, N)
        x = tl.load(x_ptr + lanes)
        tl.static_assert(x.dtype == tl.bfloat16)
        tl.store(out_ptr + lanes, x.to(tl.float32) * 3)

    x = rng.random(16).astype(ml_dtypes.bfloat16)
    out = np.zeros(16, ml_dtypes.bfloat16)
    run(kernel, (1,), x, out, 16)
    assert np.array_equal(out, (x.astype(np.float32) * 3).astype(ml_dtypes.bfloat16))


def test_reductions(run, rng):
    @jit
    def kernel(x_ptr, rows_ptr, columns_ptr, scalars_ptr, M: tl.constexpr, N: tl.constexpr):
        m, n = tl.arange(0, M), tl.arange(0, N)
        x = tl.load(x_ptr + m[:, None] * N + n[None, :])
        tl.store(rows_ptr + m, tl.sum(x, axis=1))
        tl.store(rows_ptr + M + m, x.max(1))
        tl.store(rows_ptr + 2 * M + m, tl.min(x, 1))
        tl.store(rows_ptr + 3 * M + m, tl.argmax(x, axis=1))
        tl.store(rows_ptr + 4 * M + m, tl.argmin(x, -1))
        value, index = tl.max(x, 1, return_indices=True)
        tl.store(rows_ptr + 5 * M + m, value + index)
        kept = tl.sum(x, axis=0, keep_dims=True)
        tl.static_assert(kept.shape == (1, N))
        tl.store(columns_ptr + n[None, :], kept)
        tl.store(scalars_ptr, tl.sum(x))
        tl.store(scalars_ptr + 1, tl.max(x))
        whole = tl.sum(x, keep_dims=True)
        tl.static_assert(whole.shape[0] == 1 and whole.shape[1] == 1 and len(whole.shape) == 2)

    x = rng.integers(-9, 9, (8, 16)).astype(np.float32)  # small integers: sums are exact, ties are likely
    rows, columns, scalars = np.zeros((6, 8), np.float32), np.zeros(16, np.float32), np.zeros(2, np.float32)
    run(kernel, (1,), x, rows, columns, scalars, 8, 16)
    expected = [x.sum(1), x.max(1), x.min(1), x.argmax(1), x.argmin(1), x.max(1) + x.argmax(1)]
    assert np.array_equal(rows, np.array(expected, np.float32))
    assert np.array_equal(columns, x.sum(0)) and scalars.tolist() == [x.sum(), x.max()]


@jit
def longest(a_value, a_count, b_value, b_count):
    better = a_value >= b_value
    return tl.where(better, a_value, b_value), a_count + b_count


@jit
def product(a, b):
    return a * b


@pytest.mark.parametrize("dtype", ["f4", pytest.param("f8", marks=pytest.mark.float64)])
def test_custom_reduce_and_scan(run, rng, dtype):
    @jit
    def kernel(x_ptr, out_ptr, scans_ptr, N: tl.constexpr):
        lanes = tl.arange(0, N)
        x = tl.load(x_ptr + lanes)
        value, count = tl.reduce((x, tl.full((N,), 1, tl.int32)), 0, longest)
        tl.store(out_ptr, value)
        tl.store(out_ptr + 1, count)
        tl.store(out_ptr + 2, tl.reduce(x, 0, product))
        tl.store(scans_ptr + lanes, tl.associative_scan(x, 0, product))
        tl.store(scans_ptr + N + lanes, tl.associative_scan(x, 0, product, reverse=True))
        tl.store(scans_ptr + 2 * N + lanes, tl.cumsum(x, 0))
        tl.store(scans_ptr + 3 * N + lanes, x.cumprod())

    x = rng.choice([-2.0, -1.0, 0.5, 1.0, 2.0], 16).astype(dtype)  # powers of two: products are exact in any order
    out, scans = np.zeros(3, dtype), np.zeros((4, 16), dtype)
    run(kernel, (1,), x, out, scans, 16)
    assert out.tolist() == [x.max(), 16, x.prod()]
    expected = [np.cumprod(x), np.cumprod(x[::-1])[::-1], np.cumsum(x), np.cumprod(x)]
    assert np.array_equal(scans, np.array(expected))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
def test_dot(run, rng, dtype):
    @jit
    def kernel(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
        m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
        a = tl.load(a_ptr + m[:, None] * K + k[None, :])
        b = tl.load(b_ptr + k[:, None] * N + n[None, :])
        c = tl.dot(a, b, input_precision="ieee")
        tl.static_assert(c.dtype == (tl.int32 if a.dtype == tl.int8 else tl.float32))
        c = tl.dot(a, b, acc=c)
        c += tl.dot(tl.trans(b), a.T).T
        tl.store(c_ptr + m[:, None] * N + n[None, :], c)

    m, n, k = (int(rng.choice([1, 2, 4, 8])) for _ in range(3))
    a, b = (rng.integers(-9, 9, shape).astype(dtype) for shape in ((m, k), (k, n)))
    c = np.zeros((m, n), np.int32 if dtype is np.int8 else np.float32)
    run(kernel, (1,), a, b, c, m, n, k)
    assert np.array_equal(c, 3 * (a.astype(np.int64) @ b.astype(np.int64)))


def test_dot_beyond_triton(run, rng):
    """uint8 with int8 operands, a batch, and fp16 results."""

    @jit
    def kernel(a_ptr, b_ptr, c_ptr, h_ptr, N: tl.constexpr):
        i = tl.arange(0, 2)[:, None, None] * N * N + tl.arange(0, N)[None, :, None] * N + tl.arange(0, N)[None, None, :]
        a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
        tl.store(c_ptr + i, tl.dot(a, b))
        half = tl.dot(a.to(tl.float16), b.to(tl.float16), out_dtype=tl.float16)
        tl.static_assert(half.dtype == tl.float16)
        tl.store(h_ptr + i, half)

    a, b = rng.integers(0, 256, (2, 4, 4)).astype(np.uint8), rng.integers(-9, 9, (2, 4, 4)).astype(np.int8)
    c, half = np.zeros((2, 4, 4), np.int32), np.zeros((2, 4, 4), np.float16)
    run(kernel, (1,), a, b, c, half, 4)
    expected = a.astype(np.int32) @ b.astype(np.int32)
    assert np.array_equal(c, expected) and np.array_equal(half, expected.astype(np.float16))


def test_shapes(run, rng):
    @jit
    def kernel(x_ptr, out_ptr, N: tl.constexpr):
        lanes = tl.arange(0, N)
        x = tl.load(x_ptr + lanes)
        y = tl.load(x_ptr + N + lanes)
        tl.store(out_ptr + tl.arange(0, 2 * N), tl.cat(x, y))
        out_ptr += 2 * N
        tl.store(out_ptr + tl.arange(0, 2 * N), tl.reshape(tl.join(x, y), (2 * N,)))
        out_ptr += 2 * N
        tl.store(out_ptr + tl.arange(0, 2 * N), tl.interleave(y, x))
        out_ptr += 2 * N
        even, odd = tl.split(x.reshape(N // 2, 2))
        tl.store(out_ptr + tl.arange(0, N // 2), even)
        tl.store(out_ptr + N // 2 + tl.arange(0, N // 2), odd)
        out_ptr += N
        square = x.reshape((2, N // 2)).trans()
        tl.static_assert(square.shape == (N // 2, 2), f"found {square.shape}")
        tl.store(out_ptr + lanes, tl.ravel(square))
        out_ptr += N
        cube = tl.permute(tl.view(x, [2, 2, N // 4]), (2, 0, 1)) + tl.zeros((N // 4, 2, 2), x.dtype)
        tl.store(out_ptr + lanes, tl.reshape(cube, N))
        out_ptr += N
        column = tl.expand_dims(x, 1)
        grown = tl.broadcast_to(column, N, 2)
        tl.store(out_ptr + tl.arange(0, 2 * N), tl.reshape(grown, 2 * N))
        out_ptr += 2 * N
        tl.store(out_ptr + lanes, tl.gather(x, N - 1 - lanes, 0) + tl.zeros_like(x) + tl.full([N], 0, x.dtype))
        out_ptr += N
        a, b = tl.broadcast(column, x[None, :])
        tl.static_assert(a.shape == b.shape and b.shape == (N, N))
        tl.store(out_ptr + lanes, tl.sort(x))
        tl.store(out_ptr + N + lanes, tl.sort(x, descending=True))
        tl.store(out_ptr + 2 * N + lanes, tl.flip(x))

    n = 8
    x = rng.permutation(2 * n).astype(np.int32)
    a, b = x[:n], x[n:]
    expected = np.concatenate([
        x, np.stack([a, b], 1).ravel(), np.stack([b, a], 1).ravel(), a[::2], a[1::2], a.reshape(2, n // 2).T.ravel(),
        a.reshape(2, 2, n // 4).transpose(2, 0, 1).ravel(), np.repeat(a, 2), a[::-1], np.sort(a), np.sort(a)[::-1],
        a[::-1],
    ])  # fmt: skip
    out = np.zeros(len(expected), np.int32)
    run(kernel, (1,), x, out, n)
    assert out.tolist() == expected.tolist()


def test_sort_along_the_first_axis(run, rng):
    @jit
    def kernel(x_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr):
        i = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
        tl.store(out_ptr + i, tl.sort(tl.load(x_ptr + i), 0, DESCENDING))

    x, out = rng.random((16, 4), np.float32), np.zeros((16, 4), np.float32)
    for descending in (False, True):
        DESCENDING = tl.constexpr(descending)
        kernel = jit(kernel.fn)
        run(kernel, (1,), x, out, 16, 4)
        assert np.array_equal(out, np.sort(x, 0)[::-1] if descending else np.sort(x, 0))


def test_block_pointers(run, rng):
    """A matrix product of ragged shapes: block pointers advanced in a loop, and the same with descriptors."""

    @jit
    def kernel(a_ptr, b_ptr, c_ptr, M, N, K, B: tl.constexpr, DESCRIPTOR: tl.constexpr):
        row, column = tl.program_id(0) * B, tl.program_id(1) * B
        c = tl.zeros((B, B), tl.float32)
        if DESCRIPTOR:
            a_desc = tl.make_tensor_descriptor(a_ptr, [M, K], [K, 1], [B, B])
            b_desc = tl.make_tensor_descriptor(b_ptr, shape=[K, N], strides=[1, K], block_shape=[B, B])
            c_desc = tl.make_tensor_descriptor(c_ptr, [M, N], [N, 1], [B, B])
            for k in range(0, K, B):
                c = tl.dot(a_desc.load([row, k]), b_desc.load([k, column]), c)
            c_desc.store([row, column], c)
        else:
            a_block = tl.make_block_ptr(a_ptr, (M, K), (K, 1), (row, 0), (B, B), (1, 0))
            b_block = tl.make_block_ptr(
                base=b_ptr, shape=(K, N), strides=(1, K), offsets=(0, column), block_shape=(B, B), order=(0, 1)
            )
            for _ in range(0, K, B):
                a = tl.load(a_block, boundary_check=(0, 1), padding_option="zero")
                b = tl.load(b_block, boundary_check=(0, 1))
                c = tl.dot(a, b, c)
                a_block = tl.advance(a_block, (0, B))
                b_block = tl.advance(b_block, [B, 0])
            c_block = tl.make_block_ptr(c_ptr, (M, N), (N, 1), (row, column), (B, B), (1, 0))
            tl.store(c_block, c, boundary_check=(0, 1))

    m, n, k = (int(v) for v in rng.integers(5, 12, 3))
    a, b = rng.integers(-9, 9, (m, k)).astype(np.float32), rng.integers(-9, 9, (n, k)).astype(np.float32)
    for descriptor in (False, True):
        c = np.full((m, n), np.nan, np.float32)
        run(kernel, (-(-m // 4), -(-n // 4)), a, b, c, m, n, k, 4, descriptor)
        assert np.array_equal(c, a @ b.T)


def test_what_is_for_programmatic_dependent_launch_changes_nothing(run, rng):
    @jit
    def kernel(x_ptr, out, N: tl.constexpr):
        lanes = tl.arange(0, N)
        x = tl.load(x_ptr + lanes)
        tl.extra.cuda.gdc_wait()
        y = tl.load(out + lanes)
        if tl.program_id(0) == 0:
            tl.extra.cuda.gdc_launch_dependents()
        tl.store(out + lanes, x + y)

    x, out = rng.standard_normal((2, 16)).astype(np.float32)
    expected = x + out
    run(kernel, (1,), x, out, 16)
    assert np.array_equal(out, expected)


def test_atomics(run, rng):
    @jit
    def kernel(counters, old, x_ptr, N: tl.constexpr):
        pid = tl.program_id(0)
        lanes = tl.arange(0, N)
        x = tl.load(x_ptr + pid * N + lanes)
        tl.atomic_add(counters + lanes % 2, x, mask=x > 0)
        tl.atomic_max(counters + 2, tl.max(x))
        tl.atomic_min(counters + 3, tl.min(x, 0))
        tl.atomic_xchg(counters + 4, pid)
        tl.store(old + pid, tl.atomic_cas(counters + 5, pid, pid + 1))
        tl.atomic_or(counters + 6 + lanes * 0, x)
        tl.atomic_and(counters + 7 + lanes * 0, x)
        tl.atomic_xor(counters + 8 + lanes * 0, x)

    x = rng.integers(-99, 99, (4, 8)).astype(np.int32)
    counters, old = np.array([0, 0, -200, 200, -1, 0, 0, -1, 0], np.int32), np.zeros(4, np.int32)
    run(kernel, (4,), counters, old, x, 8)
    positive = np.where(x > 0, x, 0)
    expected = [
        positive[:, ::2].sum(), positive[:, 1::2].sum(), x.max(), x.min(),
        np.bitwise_or.reduce(x, None), np.bitwise_and.reduce(x, None), np.bitwise_xor.reduce(x, None),
    ]  # fmt: skip
    last, count = counters[4:6].tolist()  # programs come in any order: the last exchange, the swaps that found theirs
    assert [*counters[:4], *counters[6:]] == expected and 0 <= last < 4 and 1 <= count <= 4
    assert old[:count].tolist() == list(range(count))
    assert all(0 <= found <= count and found != wanted for wanted, found in enumerate(old[count:], count))


def test_philox_known_answers(run, rng):
    """The vectors of the Random123 distribution (kat_vectors, philox4x32 10)."""

    @jit
    def kernel(out_ptr, seed, c0, c1, c2, c3):
        words = tl.philox(seed, c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32))
        for i in tl.static_range(4):
            tl.store(out_ptr + i, words[i])

    for seed, counter, expected in (
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (2**64 - 1, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        out = np.zeros(4, np.uint32)
        run(kernel, (1,), out, seed, *counter)
        assert tuple(out.tolist()) == expected


def test_random_floats(run):
    @jit
    def kernel(out_ptr, normal_ptr, seed, N: tl.constexpr):
        lanes = tl.arange(0, N)
        tl.store(out_ptr + lanes, tl.rand(seed, lanes))
        tl.store(normal_ptr + lanes, tl.randn(seed, lanes))

    n = 4096
    uniform, normal = np.zeros(n, np.float32), np.zeros(n, np.float32)
    run(kernel, (1,), uniform, normal, 1234, n)
    assert uniform.min() >= 0 and uniform.max() < 1 and len(np.unique(uniform)) > 0.99 * n
    # Means of 4096 values: 5 standard deviations are 0.023 and 0.08.
    assert abs(uniform.mean() - 0.5) < 0.023 and abs(normal.mean()) < 0.08 and abs(normal.std() - 1) < 0.06


# ------------------------------------------------------------------------------------------------------ control flow


def test_loops_and_conditions(run, rng):
    """Collatz steps: a `while` with a run-time `if` inside, over a `for` with run-time bounds."""

    @jit
    def kernel(out_ptr, first, last):
        for n in range(first, last):
            value = n
            steps = 0
            while value != 1:
                if value % 2 == 0:
                    value = value // 2
                else:
                    value = 3 * value + 1
                steps += 1
            tl.store(out_ptr + n, steps)

    def collatz(n):
        return 0 if n == 1 else 1 + collatz(n // 2 if n % 2 == 0 else 3 * n + 1)

    first, last = 2, int(rng.integers(20, 40))
    out = np.zeros(last, np.int32)
    run(kernel, (1,), out, first, last)
    assert out[first:].tolist() == [collatz(n) for n in range(first, last)]


@pytest.mark.parametrize("bounds", [(0, 10, 1), (3, 17, 4), (10, 0, -1), (9, -5, -3), (5, 5, 1)])
def test_for_range_forms(run, bounds):
    @jit
    def kernel(out_ptr, start, end, STEP: tl.constexpr):
        count = 0
        for i in tl.range(start, end, STEP, num_stages=2):
            tl.store(out_ptr + count, i)
            count += 1
        tl.store(out_ptr + 31, count)

    out = np.full(32, -1, np.int32)
    run(kernel, (1,), out, *bounds)
    expected = list(range(*bounds))
    assert out[: len(expected)].tolist() == expected and out[31] == len(expected)


def test_unchanged_variables_are_not_carried(run):
    @jit
    def kernel(out_ptr, n, FLAG: tl.constexpr):
        scale = tl.load(out_ptr)
        acc = 0.0
        for i in range(n):
            acc += scale * i
            if FLAG:
                scale = scale * 2
        tl.store(out_ptr, acc)

    out = np.array([3.0], np.float32)
    function, _ = build(kernel, out, 5, False)
    loop = next(op for op in ir.walk(function.body) if op.kind == "for")
    assert [v.name for v in loop.regions[0].arguments] == ["i", "acc"]
    run(kernel, (1,), out, 5, False)
    assert out[0] == 30
    run(kernel, (1,), out, 5, True)
    assert out[0] == 30 * (0 + 2 + 8 + 24 + 64)


def test_known_numbers_become_carried_only_when_changed(run):
    @jit
    def kernel(out_ptr, n, START: tl.constexpr, BLOCK: tl.constexpr):
        position = helper(START, BLOCK, n)
        tl.store(out_ptr, position)

    @jit
    def helper(position, BLOCK: tl.constexpr, n):
        for _ in range(n):
            if BLOCK > 4:
                position += BLOCK
                x = tl.arange(0, BLOCK)
                position += tl.sum(x) * 0
        return position

    out = np.zeros(1, np.int32)
    run(kernel, (1,), out, 3, 7, 8)
    assert out[0] == 31
    run(kernel, (1,), out, 3, 7, 4)
    assert out[0] == 7


def test_tuples_and_lists_in_loops(run):
    @jit
    def pair(a, b):
        return b, a + b

    @jit
    def kernel(out_ptr, n):
        state = (0, 1)
        table = [0, 10, 20]
        for i in range(n):
            state = pair(state[0], state[1])
            table[1] += i
        tl.store(out_ptr, state[0])
        for j, value in enumerate(table):
            tl.store(out_ptr + 1 + j, value)

    out = np.zeros(4, np.int32)
    run(kernel, (1,), out, 10)
    assert out.tolist() == [55, 0, 55, 20]


def test_early_returns(run):
    @jit
    def sign(x):
        if x > 0:
            return 1
        if x < 0:
            return -1
        return 0

    @jit
    def kernel(x_ptr, out_ptr, n):
        pid = tl.program_id(0)
        if pid >= n:
            return
        x = tl.load(x_ptr + pid)
        result = sign(x)
        if result == 0:
            tl.store(out_ptr + pid, 7)
            return
        else:
            result *= 2
        tl.store(out_ptr + pid, result)

    x, out = np.array([5, -3, 0, 9], np.int32), np.zeros(4, np.int32)
    run(kernel, (6,), x, out, 3)
    assert out.tolist() == [2, -2, 7, 0]


def test_return_from_an_unrolled_loop(run):
    @jit
    def first_above(x_ptr, limit, N: tl.constexpr):
        for i in tl.static_range(N):
            if tl.load(x_ptr + i) > limit:
                return i
        return -1

    @jit
    def kernel(x_ptr, out_ptr, N: tl.constexpr):
        limit = tl.program_id(0) * 10
        tl.store(out_ptr + tl.program_id(0), first_above(x_ptr, limit, N))

    x, out = np.array([5, 15, 7, 25], np.int32), np.zeros(4, np.int32)
    run(kernel, (4,), x, out, 4)
    assert out.tolist() == [0, 1, 3, -1]


def test_if_merges_values_from_both_sides(run, rng):
    @jit
    def kernel(x_ptr, out_ptr, N: tl.constexpr):
        pid = tl.program_id(0)
        lanes = tl.arange(0, N)
        x = tl.load(x_ptr + lanes)
        if pid == 0:
            x = x * 2
            extra = 1
        elif pid == 1:
            extra = 2
            unused = tl.zeros((2,), tl.int8)
        else:
            x, extra = -x, 3
            unused = 1.5  # noqa: F841
        tl.store(out_ptr + pid * N + lanes, x + extra)

    x, out = rng.integers(-9, 9, 4).astype(np.int32), np.zeros((3, 4), np.int32)
    run(kernel, (3,), x, out, 4)
    assert np.array_equal(out, [x * 2 + 1, x + 2, -x + 3])


def test_boolean_operators_and_ternaries(run):
    @jit
    def kernel(out_ptr, a, b, NONE: tl.constexpr, FLAG: tl.constexpr):
        tl.store(out_ptr, a > 1 and b > 1)
        tl.store(out_ptr + 1, a > 1 or b > 1)
        tl.store(out_ptr + 2, not (a > 1))
        tl.store(out_ptr + 3, 1 < a < 5)
        tl.store(out_ptr + 4, 1 if a > b else 2)
        tl.store(out_ptr + 5, a if FLAG and NONE is None else out_ptr + "never evaluated")
        tl.store(out_ptr + 6, (FLAG or undefined) and a > 2)  # noqa: F821
        tl.store(out_ptr + 7, a if NONE is not None else b)

    out = np.zeros(8, np.int32)
    run(kernel, (1,), out, 3, 7, None, True)
    assert out.tolist() == [1, 1, 0, 1, 2, 3, 1, 7]


SCALE = tl.constexpr(3)


@jit
def scaled(x, factor: tl.constexpr = SCALE, offset=0):
    """Default arguments, keyword arguments, and a constexpr global."""
    return x * factor + offset


def test_calls_closures_and_defaults(run):
    shift = tl.constexpr(5)

    @jit
    def kernel(out_ptr, x):
        local: tl.constexpr = SCALE * 2
        lanes = tl.arange(0, local + 2)
        tl.store(out_ptr + lanes, scaled(lanes) + scaled(x, factor=local, offset=shift))

    out = np.zeros(8, np.int32)
    run(kernel, (1,), out, 11)
    assert out.tolist() == [3 * i + 71 for i in range(8)]


def test_functions_and_types_as_constexpr(run):
    @jit
    def negate(x):
        return -x

    @jit
    def kernel(out_ptr, x, FN: tl.constexpr, T: tl.constexpr):
        y = FN(x.to(T))
        tl.static_assert(y.dtype == T)
        tl.static_assert(out_ptr.dtype.element_ty == tl.float32 and out_ptr.dtype.is_ptr())
        tl.static_assert(y.type.scalar.primitive_bitwidth == 16 and y.dtype.is_floating() and not y.dtype.is_int())
        tl.store(out_ptr, y)

    out = np.zeros(1, np.float32)
    run(kernel, (1,), out, 9, negate, tl.float16)
    assert out[0] == -9
    run(kernel, (1,), out, 9, FN=tl.abs, T=tl.bfloat16)
    assert out[0] == 9


def test_triton_text_with_swapped_imports(run, rng):
    """Annotations, numbered constants and helper names as they stand in Triton kernels."""
    triton = tl

    @triton.jit
    def kernel(x_ptr: tl.tensor, out_ptr, n_elements: int, BLOCK_SIZE: tl.constexpr, num_warps: tl.constexpr = 4):
        """A docstring."""
        pid = tl.program_id(axis=0)
        block_start = pid * BLOCK_SIZE
        offsets = block_start + tl.arange(0, BLOCK_SIZE)
        offsets = tl.max_contiguous(tl.multiple_of(offsets, BLOCK_SIZE), BLOCK_SIZE)
        tl.assume(n_elements > 0)
        mask = offsets < n_elements
        x = tl.load(x_ptr + offsets, mask=mask, other=-float("inf"), cache_modifier=".cg", volatile=True)
        tl.device_assert(n_elements > 0, "empty")
        assert tl.num_programs(0) > 0, f"no programs {BLOCK_SIZE}"
        tl.debug_barrier()
        tl.store(out_ptr + offsets, x, mask=mask, cache_modifier=".wb")

    x, out = rng.random(50, np.float32), np.zeros(50, np.float32)
    run(kernel, (triton.cdiv(50, 16),), x, out, 50, BLOCK_SIZE=16)
    assert np.array_equal(x, out)
    assert triton.next_power_of_2(17) == 32 and triton.next_power_of_2(1) == 1 and triton.cdiv(7, 2) == 4


def test_static_print_and_static_assert(capsys):
    @jit
    def kernel(n, N: tl.constexpr):
        tl.static_assert(N == 8, f"N is {N}")
        tl.static_print("N", N, n)

    build(kernel, 5, 8)
    assert capsys.readouterr().out == "N 8 n (int32)\n"


# ---------------------------------------------------------------------------------------------------- specialisation


@jit(do_not_specialize=["plain"])
def specialised(x_ptr, n, plain, y, flag, EPS: tl.constexpr = 1e-5):
    tl.store(x_ptr, n + plain + y + EPS + flag)


def tags(*arguments, **keywords):
    return specialise(specialised, specialised.bind(arguments, keywords))[0].tags


def test_specialisation_follows_triton():
    aligned = np.zeros(64, np.float32)
    aligned = aligned[(-aligned.ctypes.data // 4) % 4 :]
    assert tags(aligned, 1, 1, 1.0, True) == ("*fp32:16", "=1", "int32:1", "fp32:1", "int1:1", "=1e-05")
    assert tags(aligned[1:], 32, 32, 2, False, EPS=0) == ("*fp32:1", "int32:16", "int32:1", "int32:1", "int1:1", "=0")
    assert tags(aligned, 2**31, 2**63, None, 0)[1:5] == ("int64:16", "uint64:1", "=None", "int32:16")
    assert tags(aligned, np.int64(7), np.float32(0.5), 1, 1)[1:5] == ("int32:1", "fp32:1", "=1", "=1")
    with pytest.raises(ValueError, match="64 bits"):
        tags(aligned, 2**64, 1, 1, 1)


def test_signatures_tell_equal_values_of_different_types_apart():
    @jit
    def kernel(A: tl.constexpr):
        tl.static_assert(A == 1)

    found = {specialise(kernel, [v])[0] for v in (1, True, 1.0, -0.0, 0.0, 0, False, "1", None, (1,), tl.int8, "int8")}
    assert len(found) == 12
    assert str(specialise(kernel, ["x"])[0]) == "A='x'"


def test_arrays_of_other_libraries():
    torch = pytest.importorskip("torch")

    class View:
        __nitinol_pointer__ = (4096, tl.uint8)

    signature, values = specialise(specialised, [torch.zeros(4, dtype=torch.bfloat16), View(), 3, 4, 5, 6])
    assert signature.tags[:2] == ("*bf16:16", "*uint8:16") and values[1:] == [4096, 3, 4, 5]
    with pytest.raises(TypeError, match="complex64"):
        specialise(specialised, [np.zeros(3, np.complex64), 1, 1, 1, 1, 1])
    with pytest.raises(TypeError, match=">f4"):  # another byte order
        specialise(specialised, [np.zeros(3, ">f4"), 1, 1, 1, 1, 1])
    with pytest.raises(TypeError, match="expected an array"):
        specialise(specialised, [object(), 1, 1, 1, 1, 1])


def test_binding_arguments():
    assert specialised.bind((1, 2, 3, 4), {"flag": 5, "num_warps": 8}) == {
        "x_ptr": 1, "n": 2, "plain": 3, "y": 4, "flag": 5, "EPS": 1e-5,
    }  # fmt: skip
    for arguments, keywords, message in (
        ((1, 2, 3), {}, "needs an argument for 'y'"),
        ((1, 2, 3, 4, 5, 6, 7), {}, "takes 6 arguments, found 7"),
        ((1, 2, 3, 4, 5), {"x_ptr": 1}, "twice"),
        ((1, 2, 3, 4, 5), {"nn": 1}, "no parameter 'nn'"),
    ):
        with pytest.raises(TypeError, match=message):
            specialised.bind(arguments, keywords)
    with pytest.raises(RuntimeError, match=r"specialised\[grid\]"):
        specialised(1, 2, 3, 4, 5)
    with pytest.raises(RuntimeError, match="outside a kernel"):
        tl.program_id(0)


@pytest.mark.parametrize("grid", [(2.0,), 2.5, (1, None), lambda _: (3 / 2,)])
def test_a_grid_of_fractions_is_refused(grid):
    """(n / BLOCK,) would leave out the last program."""
    from nitinol import InPlace, array, launch

    @jit
    def kernel(x):
        tl.store(x, 1.0)

    with pytest.raises(TypeError, match="whole numbers"):
        kernel[grid](np.zeros(1, np.float32))
    with pytest.raises(TypeError, match="whole numbers"):
        launch(kernel, grid({}) if callable(grid) else grid, x=InPlace(array([0.0])))


def test_cache_key_sees_what_the_kernel_uses():
    def make(factor, source):
        namespace = {"tl": tl, "jit": jit, "FACTOR": tl.constexpr(factor)}
        import linecache

        name = f"<kernel {factor} {source}>"
        text = f"@jit\ndef helper(x):\n    return x * FACTOR + {source}\n\n"
        text += "@jit\ndef kernel(p):\n    tl.store(p, helper(2))\n"
        linecache.cache[name] = (len(text), None, text.splitlines(True), name)
        exec(compile(text, name, "exec"), namespace)
        return namespace["kernel"].cache_key

    assert make(1, "1") == make(1, "1")
    assert len({make(1, "1"), make(2, "1"), make(1, "2")}) == 3


CHANGING = tl.constexpr(1)


@jit
def reads_a_global(p):
    tl.store(p, CHANGING)


def test_a_changed_global_is_noticed(run):
    """From the moment that the key of compiled code has been taken."""
    global CHANGING
    assert reads_a_global.cache_key
    out = np.zeros(1, np.int32)
    run(reads_a_global, (1,), out)
    CHANGING = tl.constexpr(1)  # another object, the same value
    run(reads_a_global, (1,), out)
    CHANGING = tl.constexpr(2)
    with pytest.raises(RuntimeError, match="CHANGING was 1 when reads_a_global was compiled and is now 2"):
        run(reads_a_global, (1,), out)
    CHANGING = tl.constexpr(1)


def test_heuristics_and_autotune():
    launched = []

    class Recorder:
        """Stands for the launcher."""

        jit_function = specialised

        def __getitem__(self, grid):
            return lambda *arguments, **keywords: launched.append((grid, arguments, keywords))

    kernel = tl.autotune([tl.Config({"plain": 5}), tl.Config({"plain": 6})], key=["n"])(
        tl.heuristics({"EPS": lambda arguments: arguments["n"] * 2, "y": lambda arguments: arguments["EPS"] + 1})(
            Recorder()
        )
    )
    kernel[(1,)]("x", 3, flag=True)
    chosen = {"plain": 5, "num_warps": 4, "num_stages": 3, "EPS": 6, "y": 7}
    assert launched == [((1,), ("x", 3), {"flag": True, **chosen})]

"""Lazy arrays against NumPy: fresh random inputs, odd sizes, views of every kind; and how much work was submitted."""

from __future__ import annotations

import gc
import itertools
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from random_arrays import Program

import nitinol
import nitinol as nn
from nitinol.compiler.semantics import numpy_dtype
from nitinol.graph.nodes import Value
from nitinol.graph.plan import Outside, make_plan
from nitinol.graph.schedule import needed
from nitinol.language import semantic
from nitinol.language.types import DTYPES, bfloat16, float16, float32, float64, int1, int32
from nitinol.runtime import get_device
from nitinol.runtime.device import DeviceError

random = np.random.default_rng()
F32 = {"rtol": 1e-5, "atol": 1e-6}  # a few roundings of float32


def floats(*shape: int) -> np.ndarray:
    return np.asarray(random.standard_normal(shape), np.float32)


class Count:
    """What the device does inside a `with`."""

    def __enter__(self) -> Count:
        self.counters = get_device().counters
        self.before = vars(self.counters).copy()
        return self

    def __exit__(self, *_: Any) -> None:
        self.after = vars(self.counters).copy()

    def __getattr__(self, name: str) -> int:
        return self.after[name] - self.before[name]


# ------------------------------------------------------------------------------------------------- random programs


@pytest.mark.parametrize("number", range(5))
def test_random_programs(number: int) -> None:
    for seed in random.integers(0, 2**31, 6):
        try:
            Program(int(seed)).run()
        except Exception as error:
            raise AssertionError(f"random_arrays.Program({seed}).run()") from error


@pytest.mark.parametrize("number", range(2))
def test_random_programs_interpreted(number: int) -> None:
    with nitinol.interpret(), Count() as count:
        for seed in random.integers(0, 2**31, 10):
            try:
                Program(int(seed)).run()
            except Exception as error:
                raise AssertionError(f"interpreted random_arrays.Program({seed}).run()") from error
    assert count.submits == 0


# ----------------------------------------------------------------------------------------- elements in and out


FLOAT64 = pytest.mark.float64


@pytest.mark.parametrize("name", [pytest.param(n, marks=[FLOAT64] * (n == "fp64")) for n in DTYPES if n != "bf16"])
def test_round_trip_of_every_dtype(name: str) -> None:
    dtype = DTYPES[name]
    a = random.integers(0, 100, (7, 5)).astype(np.bool_ if dtype == int1 else numpy_dtype(dtype))
    x = nn.array(a)
    assert x.dtype == dtype and x.numpy().dtype == a.dtype
    np.testing.assert_array_equal(x.numpy(), a)
    np.testing.assert_array_equal((x[::-2] if dtype == int1 else x[::-2] + x[::-2]).numpy(),
                                  a[::-2] if dtype == int1 else a[::-2] + a[::-2])  # fmt: skip


def test_bfloat16_goes_to_numpy_as_float32() -> None:
    a = floats(33)
    x = nn.array(a, dtype="bf16")
    assert x.dtype == bfloat16 and x.numpy().dtype == np.float32
    expected = torch.from_numpy(a).to(torch.bfloat16)
    np.testing.assert_array_equal(x.numpy(), expected.float().numpy())
    np.testing.assert_array_equal((x * x).numpy(), (expected * expected).float().numpy())


def test_one_bfloat16_has_no_axes() -> None:
    x = nn.array(1.5, "bfloat16")
    assert x.shape == () and x.item() == 1.5


def test_python_values() -> None:
    assert nn.array([1, 2]).dtype == int32 and nn.array([1.5]).dtype == float32 and nn.array(True).dtype == int1
    assert nn.array(2**40).dtype.name == "int64"
    assert nn.array([[1, 2], [3, 4]]).tolist() == [[1, 2], [3, 4]]
    assert nn.array(3).item() == 3 and int(nn.array(3)) == 3 and float(nn.array(1.5)) == 1.5
    assert list(range(5))[nn.array(2)] == 2
    assert [int(row.sum()) for row in nn.array([[1, 2], [3, 4]])] == [3, 7]
    assert "1." in repr(nn.array([1.0, 2.0]) * 1)


@pytest.mark.cpu
def test_numpy_memory_is_shared_without_a_copy() -> None:
    a = floats(5, 3)
    x = nn.from_numpy(a)
    with Count() as count:
        view = x.numpy(copy=False)
        assert np.shares_memory(view, a) and not view.flags.writeable
    assert count.submits == 0
    x.assign(x * 2)
    before = a.copy()
    x.evaluate()
    np.testing.assert_array_equal(a, before * 2)
    a.flags.writeable = False
    with pytest.raises(DeviceError, match="read-only"):
        nn.from_numpy(a).assign(1.0).evaluate()


def test_results_are_copies_unless_asked() -> None:
    x = nn.array(floats(4))
    first = x.numpy()
    first[:] = 7
    assert not (x.numpy() == 7).any()


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "int8", "uint8", "int64", "bool"])
def test_dlpack_shares_memory_with_torch(dtype: str) -> None:
    tensor = torch.randint(0, 2, (6, 5)).to(getattr(torch, dtype))[::2, 1:].T
    x = nn.from_dlpack(tensor)
    assert x.shape == tuple(tensor.shape) and x.strides == tensor.stride()
    np.testing.assert_array_equal(x.numpy(), tensor.float().numpy() if dtype == "bfloat16" else tensor.numpy())
    back = torch.from_dlpack(x)
    assert torch.equal(back, tensor) and back.data_ptr() == tensor.data_ptr()
    x.assign(x.astype("fp32") + 1).evaluate() if dtype not in ("bool",) else None
    assert torch.equal(back, tensor)


def to_torch(x: Any) -> torch.Tensor:
    if get_device().name == "cuda" and not torch.cuda.is_available():
        pytest.skip("this torch was built without CUDA")
    return torch.from_dlpack(x)


def test_dlpack_copies_what_others_cannot_view() -> None:
    """torch aborts the process at a negative stride."""
    x = nn.array(floats(4, 3)) + 0
    for view in (x[::-1], x[:, ::-2], x.T[::-1, ::-1]):
        np.testing.assert_array_equal(to_torch(view).cpu().numpy(), view.numpy())
        with pytest.raises(BufferError, match="strides"):
            view.__dlpack__(copy=False)
    before = x.numpy()
    copies = get_device().host_memory and np.lib.NumpyVersion(np.__version__) >= "2.1.0"
    own = np.from_dlpack(x, copy=True) if copies else x.numpy()
    x.assign(7.0).evaluate()
    np.testing.assert_array_equal(own, before)


def test_sums_of_booleans_are_booleans() -> None:
    x, y = np.array([[False], [True]]), np.array([False, True])
    np.testing.assert_array_equal((nn.array(x) + nn.array(y)).numpy(), x + y)
    np.testing.assert_array_equal((nn.array(x) + True).numpy(), x + True)
    assert (nn.array(x) + 1).dtype != nn.array(x).dtype


def test_types_are_found_at_the_top() -> None:
    import nitinol

    x = nitinol.asarray(floats(3)).astype(nitinol.bfloat16)
    assert x.dtype == nitinol.bfloat16 and x.astype(nitinol.int64).numpy().dtype == np.int64


def test_dlpack_keeps_memory_alive_and_lets_go() -> None:
    x = nn.array(floats(1000)) + 0
    tensor = to_torch(x)
    expected = x.numpy()
    del x
    gc.collect()
    nn.array(floats(1000)).evaluate()
    np.testing.assert_array_equal(tensor.cpu().numpy(), expected)
    from nitinol.graph import dlpack

    before = len(dlpack._exported)
    del tensor
    gc.collect()
    assert len(dlpack._exported) == before - 1
    capsule = nn.array(floats(3)).__dlpack__()  # never taken
    del capsule
    assert len(dlpack._exported) == before - 1
    if get_device().host_memory:
        np.testing.assert_array_equal(np.from_dlpack(nn.array([1.0, 2.0])), [1.0, 2.0])


# ------------------------------------------------------------------------------------------------------ elementwise


UNARY = {
    "exp": np.exp, "exp2": np.exp2, "sin": np.sin, "cos": np.cos, "tanh": np.tanh, "floor": np.floor, "ceil": np.ceil,
    "abs": np.abs, "negative": np.negative, "square": np.square, "sign": np.sign, "isnan": np.isnan,
    "sigmoid": lambda a: 1 / (1 + np.exp(-a)), "silu": lambda a: a / (1 + np.exp(-a)),
    "relu": lambda a: np.maximum(a, 0), "reciprocal": lambda a: 1 / a,
    "gelu": lambda a: a / 2 * (1 + np.vectorize(math.erf)(a / math.sqrt(2))), "erf": np.vectorize(math.erf),
}  # fmt: skip
POSITIVE = {"log": np.log, "log2": np.log2, "sqrt": np.sqrt, "rsqrt": lambda a: 1 / np.sqrt(a)}


@pytest.mark.parametrize("name", [*UNARY, *POSITIVE])
def test_functions_of_one_array(name: str) -> None:
    a = floats(3, 349) * 2
    a = np.abs(a) + 0.01 if name in POSITIVE else a
    expected = (UNARY | POSITIVE)[name](a.astype(np.float64))
    np.testing.assert_allclose(getattr(nn, name)(nn.array(a)).numpy(), expected, **F32)
    half = getattr(nn, name)(nn.array(a.astype(np.float16)))
    expected = (UNARY | POSITIVE)[name](a.astype(np.float16).astype(np.float64))
    assert half.dtype in (float16, int1)
    np.testing.assert_allclose(half.numpy(), expected, rtol=1e-3, atol=1e-4)  # one rounding to 11 bits


def test_gelu_by_tanh() -> None:
    a = floats(100)
    expected = torch.nn.functional.gelu(torch.from_numpy(a), approximate="tanh").numpy()
    np.testing.assert_allclose(nn.gelu(nn.array(a), approximate="tanh").numpy(), expected, **F32)


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.uint8])
def test_integer_arithmetic(dtype: Any) -> None:
    low = 0 if np.dtype(dtype).kind == "u" else -100
    a, b = random.integers(low, 100, (2, 515)).astype(dtype)
    a[0], b[:3] = np.iinfo(dtype).min, [-1 if low else 1, 0, 1]
    x, y = nn.array(a), nn.array(b)
    with np.errstate(all="ignore"):
        for symbol, function in {
            "+": np.add, "-": np.subtract, "*": np.multiply, "//": np.floor_divide, "%": np.remainder,
            "&": np.bitwise_and, "|": np.bitwise_or, "^": np.bitwise_xor,
        }.items():  # fmt: skip
            np.testing.assert_array_equal(eval(f"x {symbol} y").numpy(), function(a, b), err_msg=symbol)
        np.testing.assert_allclose((x / y).numpy()[3:], (a.astype(np.float32) / b)[3:], **F32)
    np.testing.assert_array_equal((x >> 1).numpy(), a >> 1)
    np.testing.assert_array_equal((~x).numpy(), ~a)
    for symbol in ("==", "!=", "<", "<=", ">", ">="):
        np.testing.assert_array_equal(eval(f"x {symbol} y").numpy(), eval(f"a {symbol} b"))


def test_float_division_and_power() -> None:
    a, b = floats(2, 300)
    x, y = nn.array(a), nn.array(b)
    np.testing.assert_allclose((x // y).numpy(), np.floor(a / b), **F32)
    np.testing.assert_allclose((x % 0.25).numpy(), a % np.float32(0.25), atol=1e-6)
    for exponent in (2, 3, 5, 0.5, 0, -1, -2.5, 2.0):
        with np.errstate(all="ignore"):
            expected = a.astype(np.float64) ** exponent
        np.testing.assert_allclose((x**exponent).numpy(), expected, rtol=2e-5)
    np.testing.assert_allclose((2.0**x).numpy(), 2.0 ** a.astype(np.float64), rtol=1e-5)
    assert (nn.array([2, -3]) ** 3).tolist() == [8, -27]
    np.testing.assert_allclose(x.clip(-0.5, 0.5).numpy(), a.clip(-0.5, 0.5))
    assert nn.maximum(nn.array([1.0, math.nan]), 0.5).tolist()[0] == 1 and math.isnan(nn.minimum(math.nan, x)[0].item())


@FLOAT64
def test_numbers_keep_64_bits() -> None:
    wide = nn.array(np.array([1.0, 2.0]))
    np.testing.assert_array_equal((wide * 0.1 + 1e-300).numpy(), np.array([1.0, 2.0]) * 0.1 + 1e-300)


def test_numbers_keep_their_value() -> None:
    """Numbers are run-time arguments of the kernels: nothing may be lost on the way."""
    assert (nn.array(np.int64(1)) + 2**62).item() == 2**62 + 1
    assert (nn.array(np.uint64(1)) + 2**63).item() == 2**63 + 1
    assert (nn.array(np.uint32(1)) + (2**32 - 2)).item() == 2**32 - 1
    assert (nn.array(np.int8(1)) + -128).item() == -127
    one = nn.array(1.0)
    assert math.copysign(1, (one * -0.0).item()) == -1 and math.copysign(1, (one * 0.0 * (one * -0.0)).item()) == -1
    assert nn.where(one > 0, math.inf, one).item() == math.inf and math.isnan((one * math.nan).item())


def test_promotion_is_the_tile_languages() -> None:
    arrays = {t: nn.zeros((2,), t) for t in DTYPES.values()}
    for a, b in itertools.product(DTYPES.values(), repeat=2):
        assert (arrays[a] + arrays[b]).dtype == semantic.promote(a, b, "+"), (a, b)
    for a in DTYPES.values():
        assert (arrays[a] + True).dtype == a
        assert (arrays[a] * 2).dtype == (int32 if a == int1 else a)
        assert (arrays[a] * 2.0).dtype == (a if a.is_float else float32)
        division = (arrays[a] / 2).dtype
        assert division == (float64 if a == float64 else float32)
        assert nn.where(arrays[int1], arrays[a], 0).dtype == (int32 if a == int1 else a)


@pytest.mark.parametrize("shapes", [
    [(5, 1, 7), (3, 1)], [(1,), (4, 3)], [(), (3,)], [(2, 0, 3), (3,)], [(1, 1), (1,)], [(33, 1), (1, 65)],
    [(0,), (1,)],
])  # fmt: skip
def test_broadcasting(shapes: Any) -> None:
    a, b = (floats(*shape) for shape in shapes)
    result = nn.array(a) * nn.array(b) + nn.array(a)
    assert result.shape == (a * b).shape
    np.testing.assert_allclose(result.numpy(), a * b + a, **F32)


def test_large_and_unusual_layouts() -> None:
    """Rows of every length around the tile's, strides that no axis merges, many short rows."""
    for rows, columns in [(3, 1023), (2, 1025), (700, 3), (5, 2049), (129, 64)]:
        a = floats(rows, columns, 2)
        x = nn.array(a)
        np.testing.assert_allclose((x[:, ::-1, 0] + x[:, :, 1]).numpy(), a[:, ::-1, 0] + a[:, :, 1], **F32)
        np.testing.assert_allclose((x.T * 2 + x.T[:, :, :1]).numpy(), a.T * 2 + a.T[:, :, :1], **F32)


@pytest.mark.parametrize(
    "dtype", ["int8", "int32", "uint8", "fp16", pytest.param("fp64", marks=FLOAT64), "bool", "int64"]
)
def test_astype(dtype: str) -> None:
    a = (floats(100) * 50).clip(-120, 120)  # what does not fit an integer type is undefined in NumPy
    with np.errstate(all="ignore"):
        source = np.abs(a) if dtype == "uint8" else a
        expected = source.astype({"fp16": "float16", "fp64": "float64"}.get(dtype, dtype))
    np.testing.assert_array_equal(nn.array(source).astype(dtype).numpy(), expected)


# --------------------------------------------------------------------------------------------------------- reductions


@pytest.mark.parametrize("shape, axis", [
    ((7, 5), None), ((7, 5), 0), ((7, 5), -1), ((3, 4, 5), (0, 2)), ((2, 3001), 1), ((3001, 2), 0), ((3, 2050, 3), 1),
    ((1 << 17,), None), ((5, 1, 7), 1), ((300, 3, 3), (1, 2)), ((70, 257), 0), ((4,), 0), ((2, 1 << 16), 1), ((), None),
])  # fmt: skip
def test_reductions(shape: Any, axis: Any) -> None:
    a = floats(*shape)
    x = nn.array(a)
    for name in ("sum", "mean", "max", "min", "var", "std", "argmax", "argmin", "any", "all", "prod"):
        if name.startswith("arg") and isinstance(axis, tuple):
            continue
        source, values = (x, a) if name != "prod" else (x * 0.01 + 1, a.astype(np.float64) * 0.01 + 1)
        expected = getattr(np, name)(values.astype(np.float64) if name in ("sum", "mean", "var") else values, axis=axis)
        result = getattr(nn, name)(source, axis)
        assert result.shape == expected.shape
        count = max(1, a.size // max(1, np.size(expected)))
        bound = 1e-6 * count if name == "prod" else 1e-5  # every factor is rounded
        np.testing.assert_allclose(result.numpy(), expected, rtol=bound, atol=1e-4 if name == "sum" else 1e-6,
                                   err_msg=name)  # fmt: skip
    if axis is not None:
        assert nn.sum(x, axis, keepdims=True).shape == a.sum(axis, keepdims=True).shape


def test_reductions_of_other_types() -> None:
    a = random.integers(-100, 100, (9, 77)).astype(np.int8)
    assert nn.sum(nn.array(a)).dtype.name == "int64"
    np.testing.assert_array_equal(nn.array(a).sum(1).numpy(), a.sum(1))
    np.testing.assert_array_equal(nn.array(a).max(0).numpy(), a.max(0))
    np.testing.assert_array_equal(nn.array(a).argmin(1).numpy(), a.argmin(1))
    assert nn.array(np.full(70000, 1, np.float16)).mean().item() == 1  # the sum would be infinite
    truth = a > 50
    np.testing.assert_array_equal(nn.array(truth).any(1).numpy(), truth.any(1))
    assert nn.array(truth).sum().item() == truth.sum()
    nan = nn.array([1.0, math.nan, 3.0, math.nan])
    assert math.isnan(nan.max().item()) and math.isnan(nan.min().item()) and nan.argmax().item() == 1
    assert nn.array([-math.inf, -math.inf]).argmax().item() == 0
    assert nn.array([[3.0, 3.0], [1.0, 3.0]]).argmax(1).tolist() == [0, 1]
    assert nn.sum(nn.zeros((3, 0)), 1).tolist() == [0, 0, 0] and nn.prod(nn.zeros((0,))).item() == 1
    with pytest.raises(ValueError, match=r"max: .*\(3, 0\)"):
        nn.max(nn.zeros((3, 0)), 1)


def test_softmax_and_norms() -> None:
    a = floats(6, 129) * 5
    x, t = nn.array(a), torch.from_numpy(a)
    weight, bias = floats(129), floats(129)
    functional = torch.nn.functional
    pairs = [
        (nn.softmax(x), torch.softmax(t, -1)), (nn.softmax(x, 0), torch.softmax(t, 0)),
        (nn.log_softmax(x), torch.log_softmax(t, -1)), (nn.logsumexp(x, 1), torch.logsumexp(t, 1)),
        (nn.rms_norm(x, weight, 1e-5), functional.rms_norm(t, (129,), torch.from_numpy(weight), 1e-5)),
        (nn.layer_norm(x, weight, bias),
         functional.layer_norm(t, (129,), torch.from_numpy(weight), torch.from_numpy(bias))),
        (nn.cumsum(x, 1), torch.cumsum(t, 1)), (nn.cumsum(x, 0), torch.cumsum(t, 0)),
    ]  # fmt: skip
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=2e-5, atol=2e-5)
    assert nn.softmax(nn.array([1000.0, 0.0])).tolist() == [1, 0]
    long = random.integers(-5, 5, (2, 3000))
    np.testing.assert_array_equal(nn.cumsum(nn.array(long), 1).numpy(), np.cumsum(long, 1))


# ------------------------------------------------------------------------------------------------ matrix products


@pytest.mark.parametrize("a, b", [
    ((5, 7), (7, 3)), ((2, 3, 5, 7), (3, 7, 4)), ((64, 64), (64, 128)), ((7,), (7,)), ((7,), (7, 2)), ((3, 7), (7,)),
    ((1, 300), (300, 129)), ((4, 1, 33, 65), (1, 3, 65, 17)), ((0, 4), (4, 3)), ((3, 0), (0, 4)), ((2, 0, 3), (3, 4)),
])  # fmt: skip
def test_matmul(a: Any, b: Any) -> None:
    m, n = floats(*a), floats(*b)
    result = nn.array(m) @ nn.array(n)
    assert result.shape == (m @ n).shape
    np.testing.assert_allclose(result.numpy(), m @ n, rtol=1e-4, atol=1e-4)
    if len(a) > 1 and len(b) > 1:
        x, y = nn.array(m.swapaxes(-1, -2).copy()).mT, nn.array(n.swapaxes(-1, -2).copy()).mT
        np.testing.assert_allclose((x @ y).numpy(), m @ n, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, bound", [("fp16", 2e-3), ("bf16", 1e-2), pytest.param("fp64", 1e-12, marks=FLOAT64)])
def test_matmul_of_floats(name: str, bound: float) -> None:
    x, y = nn.array(floats(17, 40), dtype=name), nn.array(floats(40, 9), dtype=name)
    result = x @ y
    assert result.dtype.name == name
    expected = x.numpy().astype(np.float64) @ y.numpy().astype(np.float64)
    np.testing.assert_allclose(result.numpy(), expected, rtol=bound, atol=bound)  # one rounding of the result


def test_matmul_of_integers() -> None:
    a, b = random.integers(-128, 128, (33, 70)).astype(np.int8), random.integers(-128, 128, (70, 20)).astype(np.int8)
    result = nn.array(a) @ nn.array(b)
    assert result.dtype == int32
    np.testing.assert_array_equal(result.numpy(), a.astype(np.int32) @ b)
    with pytest.raises(TypeError, match="matmul of int32 and int32"):
        nn.zeros((2, 2), "int32") @ nn.zeros((2, 2), "int32")


# ------------------------------------------------------------------------------------------- indexing and creation


def test_take_and_gather() -> None:
    a = floats(11, 5, 3)
    x = nn.array(a)
    for index in ([0, 3, -1], np.array([[1, 2], [0, 4]]), nn.array([4, 4])):
        plain = np.asarray(index)
        np.testing.assert_array_equal(nn.take(x, index, 1).numpy(), np.take(a, plain, 1))
        np.testing.assert_array_equal(x[:, index].numpy(), a[:, plain])
        np.testing.assert_array_equal(x[2:9, index, ::2].numpy(), a[2:9, plain, ::2])
    np.testing.assert_array_equal(nn.embedding(x, np.array([[10], [0]])).numpy(), a[[[10], [0]]])
    with pytest.raises(DeviceError, match="take: an index is out of range"):
        nn.take(x, [11]).evaluate()
    np.testing.assert_array_equal((x + 1).numpy(), a + 1)  # the device goes on


def test_joining_and_splitting() -> None:
    a, b = floats(3, 4), floats(3, 2)
    joined = nn.concatenate([nn.array(a), nn.array(b).astype("fp16")], 1)
    assert joined.dtype == float32
    np.testing.assert_array_equal(joined.numpy(), np.concatenate([a, b.astype(np.float16)], 1))
    np.testing.assert_array_equal(nn.stack([a, -a], 1).numpy(), np.stack([a, -a], 1))
    parts = nn.split(joined, [4], 1)
    np.testing.assert_array_equal(parts[0].numpy(), a)
    assert [p.shape for p in nn.split(nn.zeros((6, 2)), 3)] == [(2, 2)] * 3
    np.testing.assert_array_equal(nn.repeat(nn.array(a), 3, 1).numpy(), np.repeat(a, 3, 1))
    np.testing.assert_allclose(nn.outer(nn.array(a[0]), nn.array(b[0])).numpy(), np.outer(a[0], b[0]))


def test_creation() -> None:
    for arguments in [(5,), (2, 9), (9, 2, -3), (0,), (1, 7, 2.5), (0.0, 1.0, 0.1)]:
        expected = np.arange(*arguments)
        np.testing.assert_allclose(nn.arange(*arguments).numpy(), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(nn.eye(3, 5).numpy(), np.eye(3, 5))
    a = floats(2, 4, 6)
    for k in (-2, 0, 1):
        np.testing.assert_array_equal(nn.tril(nn.array(a), k).numpy(), np.tril(a, k))
        np.testing.assert_array_equal(nn.triu(nn.array(a), k).numpy(), np.triu(a, k))
    assert nn.full((2, 2), 7).dtype == int32 and nn.ones(3).tolist() == [1, 1, 1]
    assert nn.zeros((0, 3)).numpy().shape == (0, 3)


def test_random_numbers() -> None:
    seed = int(random.integers(2**40))
    u = nn.uniform((1000, 33), -1, 3, seed=seed).numpy()
    assert u.min() >= -1 and u.max() < 3 and abs(u.mean() - 1) < 0.05  # 7 standard errors of 33000 values
    n = nn.normal((33000,), 2, 3, seed=seed).numpy()
    assert abs(n.mean() - 2) < 0.12 and abs(n.std() - 3) < 0.09
    assert (nn.uniform((50,), seed=seed).numpy() != nn.uniform((50,), seed=seed + 1).numpy()).all()
    later = nn.uniform((9,), seed=seed, offset=5).numpy()
    np.testing.assert_array_equal(later, nn.uniform((14,), seed=seed).numpy()[5:])
    key = nn.array(np.int64(seed))
    np.testing.assert_array_equal(nn.uniform((9,), seed=key).numpy(), nn.uniform((9,), seed=seed).numpy())
    # Philox 4x32-10 of counter 0 and key 0: the first known answer of Random123's kat_vectors
    assert nn.random_bits((1,), seed=0).item() == 0x6627E8D5


# ----------------------------------------------------------------------------------------------- fusion and memory


def test_a_chain_is_one_dispatch() -> None:
    a, b = floats(65, 33), floats(33)
    x, y = nn.array(a), nn.array(b)
    result = nn.tanh((x * 2 + y) / 3 - x.T[:, ::-1].T.flip(0)[::-1])
    with Count() as count:
        result.evaluate()
    assert (count.dispatches, count.submits, count.waits) == (1, 1, 1)
    expected = np.tanh((a * 2 + b) / 3 - a.T[:, ::-1].T[::-1][::-1])
    np.testing.assert_allclose(result.numpy(), expected, **F32)


def test_reductions_take_their_operand_in() -> None:
    a = floats(20, 40)
    with Count() as count:
        total = (nn.array(a) * 2 + 1).sum(1).numpy()
    assert count.dispatches == 1
    np.testing.assert_allclose(total, (a * 2 + 1).sum(1), rtol=1e-5, atol=1e-4)


def test_arrays_without_elements_are_kept() -> None:
    """Also where what needed them has left them out."""
    x = nn.ones((8, 4))
    y = nn.tanh(x[:, 4:])
    z = nn.concatenate([y, y], 1)
    z.evaluate()
    assert (nn.tanh(z) + 1.0).sum().item() == 0
    assert (y * 1.0).numpy().shape == (8, 0)


def test_shared_subexpressions_are_computed_once() -> None:
    x = nn.array(floats(40, 40))
    shared = nn.exp(x) * 2
    with Count() as count:
        result = nn.matmul(shared, shared + 1) + shared
        result.evaluate()
    assert count.dispatches == 4  # shared, shared + 1, product, sum
    y = x
    for _ in range(40):  # 2 ** 40 leaves if nothing were shared
        y = (y + y.T) * 0.5
    assert y.numpy().shape == (40, 40)


def test_long_chains() -> None:
    """No recursion over the graph; kernels of bounded size."""
    x = nn.array(floats(3))
    y = x
    for _ in range(3000):
        y = y * 0.5 + 1
    np.testing.assert_allclose(y.numpy(), [2, 2, 2], **F32)
    for _ in range(50_000):
        x = x + 1
    del x


def test_memory_of_intermediates_is_reused() -> None:
    def arena(n: int) -> int:
        y = nn.array(floats(100, 100))
        for _ in range(n):
            y = nn.matmul(y, nn.eye(100))
        calls = needed([y.value])
        outside = list(dict.fromkeys(o for c in calls for o in c.operands if isinstance(o, Value) and o.buffer))
        facts = [Outside(0, i) for i in range(len(outside))]
        return make_plan(calls, outside, facts, {y.value}, set(), get_device().target).memory[1]

    assert 0 < arena(3) == arena(9)


def test_memory_goes_with_the_last_array() -> None:
    def use() -> None:
        x = nn.array(floats(100_000))
        y = nn.exp(x) + 1
        z = y * 2
        z.sum().evaluate()
        nn.matmul(z.reshape(100, 1000), z.reshape(1000, 100))  # never evaluated

    use()
    gc.disable()
    try:
        before = get_device().counters.bytes_in_use
        use()
        assert get_device().counters.bytes_in_use == before
    finally:
        gc.enable()


def test_views_share_memory() -> None:
    x = nn.array(floats(6, 8))
    with Count() as count:
        views = [x[1:, ::-2], x.T, x.reshape(3, 16), x[2], x.broadcast_to(2, 6, 8), x.expand_dims(1), x[None, ..., 3]]
        assert all(v.evaluated and v.buffer is x.buffer for v in views)
    assert count.submits == count.pool_hits == count.allocations == 0
    assert not x.T.is_contiguous and x[2].is_contiguous and x.T.contiguous().is_contiguous


def test_several_values_are_one_submission() -> None:
    x = nn.array(floats(9))
    values = [x + 1, x * 2, (x - 1).sum()]
    with Count() as count:
        nn.evaluate(*values)
    assert (count.submits, count.waits) == (1, 1)
    with Count() as count:
        nn.evaluate(*values)
    assert count.submits == 0


# ------------------------------------------------------------------------------------------------------------- state


def test_updates_in_place_in_program_order() -> None:
    a = floats(10)
    state = nn.array(a)
    before = state + 1
    state.assign(state * 2)
    middle = state[::-1] + 0
    state[2:4] = 7
    state[::2] += 1
    expected = a * 2
    np.testing.assert_allclose(middle.numpy(), expected[::-1])
    expected[2:4] = 7
    expected[::2] += 1
    np.testing.assert_allclose(state.numpy(), expected)
    np.testing.assert_allclose(before.numpy(), a + 1)
    state.assign(state[::-1])
    np.testing.assert_allclose(state.numpy(), expected[::-1])


def test_update_slice() -> None:
    a, b = floats(3, 10, 4), floats(3, 2, 4)
    for start in (0, 3, 8):
        expected = a.copy()
        expected[:, start : start + 2] = b
        np.testing.assert_array_equal(nn.array(a).update_slice(nn.array(b), start, 1).numpy(), expected)
        place = nn.array(np.array([start], np.int32))
        np.testing.assert_array_equal(nn.update_slice(nn.array(a), nn.array(b), place, 1).numpy(), expected)
    with pytest.raises(DeviceError, match="does not fit"):
        nn.update_slice(nn.array(a), nn.array(b), nn.array([9]), 1).evaluate()
    with pytest.raises(IndexError, match=r"update_slice: 9\.\.11"):
        nn.update_slice(nn.array(a), nn.array(b), 9, 1)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("function, error, text", [
    (lambda x: x + nn.zeros((4,)), ValueError, r"add: shapes \(3, 5\) and \(4,\)"),
    (lambda x: x @ x, ValueError, r"matmul: shapes \(3, 5\) and \(3, 5\)"),
    (lambda x: x.reshape(4, 4), ValueError, r"reshape of an array of shape \(3, 5\) to \(4, 4\)"),
    (lambda x: x << 1, TypeError, "left_shift of fp32 and fp32"),
    (lambda x: nn.zeros((2,), "uint8") + 300, ValueError, "add: the number 300 is out of range for uint8"),
    (lambda x: nn.exp("text"), TypeError, "exp: expected an array or a number, found 'text'"),
    (lambda x: x + "text", TypeError, "unsupported operand"),
    (lambda x: x.sum(2), ValueError, r"sum: axis 2 .* \(3, 5\)"),
    (lambda x: x[3], IndexError, r"index 3 is out of range for axis 0 .*\(3, 5\)"),
    (lambda x: x[1, 2, 3], IndexError, "given 3 indices"),
    (lambda x: x[[0], [1]], IndexError, "more than one integer array"),
    (lambda x: bool(x), ValueError, "no one truth value"),
    (lambda x: x.item(), ValueError, "expected one"),
    (lambda x: nn.concatenate([x, x.T]), ValueError, r"concatenate: shapes \(3, 5\) and \(5, 3\)"),
    (lambda x: x.broadcast_to(3, 4), ValueError, r"\(3, 5\) cannot be broadcast to \(3, 4\)"),
    (lambda x: x.broadcast_to(2, 3, 5).assign(0), ValueError, "several elements share one place"),
    (lambda x: x.assign(nn.zeros((5, 3))), ValueError, r"assign: an array of shape \(5, 3\)|assign: shapes"),
    (lambda x: x.astype("float8"), TypeError, "float8"),
    (lambda x: nn.array(np.array(["a"])), TypeError, "element type"),
    (lambda x: nn.take(x, [0.5]), TypeError, "take: the indices are of type fp32"),
    (lambda x: nn.split(x, 2, 1), ValueError, r"axis 1 of an array of shape \(3, 5\)"),
    (lambda x: x.permute(0, 0), ValueError, "permute"),
    (lambda x: nn.zeros((-1,)), ValueError, "extents must be 0 or more"),
    (lambda x: x.bitcast("int64"), ValueError, "bitcast"),
])  # fmt: skip
def test_errors(function: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        function(nn.array(floats(3, 5)))


def test_bitcast() -> None:
    a = floats(3, 4)
    np.testing.assert_array_equal(nn.array(a).bitcast("int32").numpy(), a.view(np.int32))
    np.testing.assert_array_equal((nn.array(a).bitcast("uint8") + 0).numpy(), a.view(np.uint8))
    np.testing.assert_array_equal(((nn.array(a) * 2).bitcast("int64")).numpy(), (a * 2).view(np.int64))


def test_import_is_light() -> None:
    code = ("import sys, nitinol; heavy = {'llvmlite', 'tokenizers', 'jinja2', 'typer', 'rich', 'torch'}; "
            "print(sorted(heavy & set(sys.modules)), 'nitinol.graph' in sys.modules); nitinol.Array; "
            "print(sorted(heavy & set(sys.modules)))")  # fmt: skip
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split("\n")[:2] == ["[] False", "[]"]


def test_no_kernel_has_more_than_65535_programs_along_the_second_extent() -> None:
    """CUDA has no more there; rows then come first."""
    a = floats(70_000, 131)
    x = nn.array(a)[:, :129]  # rows that are not one, and of more values than a tile of several rows has
    line = nitinol.compile(lambda x: x * 2.0 + 1.0)
    np.testing.assert_array_equal(line(x).numpy(), a[:, :129] * np.float32(2) + np.float32(1))
    assert line.records[0].grid == (70_000, 1, 1)
    np.testing.assert_array_equal(x.max(1).numpy(), a[:, :129].max(1))


@pytest.mark.cpu
def test_what_starts_from_nothing_lands_where_it_was_asked_for() -> None:
    """Memory decides where there is some; calls without any take the device that was current when they were made."""
    here, other = nn.get_device(), nn.CpuDevice(threads=1)
    x = nn.array([1.0, 2.0])
    with nn.using_device(other):
        made = [nn.zeros(3), nn.arange(4) + 1, nn.uniform((3,), seed=3), nn.eye(3), nn.full((2,), 3) * 2]
        with_memory, beside = nn.ones(2) + x, nn.ones(2)
    for array in made:
        assert array.buffer.device is other
    assert with_memory.buffer.device is here and with_memory.tolist() == [2, 3]
    later, sums = nn.ones(2) * 2, x + 5
    nn.evaluate(beside, later, sums)
    assert [array.buffer.device for array in (beside, later, sums)] == [other, here, here]
    assert (beside.tolist(), later.tolist(), sums.tolist()) == ([1, 1], [2, 2], [6, 7])


@pytest.mark.parametrize("updated", [False, True])
def test_what_only_an_empty_result_reads_is_not_lost(updated: bool) -> None:
    """A lowering reads nothing of operands without elements: what they depend on has not run then."""
    for order in itertools.permutations("tsyz"):
        t = nitinol.tanh(nitinol.array(np.full((1, 1), 0.5, np.float32)))
        s = nitinol.sum(t)
        y = t[0:0] * s
        z = nitinol.concatenate([y, -y, y], 1)
        if updated:
            s.assign(nitinol.sum(t) + 1)
        found = {"t": t, "s": s, "y": y, "z": z}
        expected = {"t": [[np.tanh(0.5)]], "s": np.tanh(0.5) + updated, "y": np.empty((0, 1)), "z": np.empty((0, 3))}
        for name in order:
            np.testing.assert_allclose(found[name].numpy(), expected[name], rtol=1e-6, err_msg=f"{name} of {order}")

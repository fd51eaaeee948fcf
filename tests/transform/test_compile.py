"""`nitinol.compile`, library kernels in the graph, and their state: results against NumPy, work by the counters."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nitinol
import nitinol as nn
import nitinol.language as tl
from nitinol.graph.launch import InPlace, Output, Strided, launch
from nitinol.ops.quantized import stored_array
from nitinol.runtime import get_device
from nitinol.runtime.kernel import jit

random = np.random.default_rng()
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # a few roundings of float32


def floats(*shape: int) -> np.ndarray:
    return np.asarray(random.standard_normal(shape), np.float32)


def work() -> tuple[int, ...]:
    """Allocations of any kind, submissions and waits so far."""
    counters = get_device().counters
    return counters.allocations + counters.pool_hits, counters.submits, counters.waits


@jit
def add_kernel(x, y, out, total, n, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    value = tl.load(x + at, mask=inside) + tl.load(y + at, mask=inside) * SCALE
    tl.store(out + at, value, mask=inside)
    tl.store(total + at, value * 2, mask=inside)


@jit
def column_kernel(x, out, stride, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at * stride, mask=at < n), mask=at < n)


@jit
def count_kernel(state, steps, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(state + at, tl.load(state + at) + 1)
    tl.store(steps, tl.load(steps) + 1)


def add(x: Any, y: Any) -> Any:
    n = x.size
    return launch(add_kernel, (-(-n // 32),), x=x, y=y, out=Output(x.shape, "float32"), total=Output(x.shape, "fp32"),
                  n=n, SCALE=3, BLOCK=32)  # fmt: skip


# ------------------------------------------------------------------------------------------------- library kernels


@pytest.mark.parametrize("interpreted", [False, True])
def test_launch(interpreted: bool) -> None:
    a, b = floats(7, 11), floats(11, 7)
    with nitinol.interpret() if interpreted else nullcontext():
        first, second = add(nn.array(a), nn.array(b).T)  # contiguous for the kernel
        np.testing.assert_allclose((first + 1).numpy(), a + 3 * b.T + 1, **TOLERANCE)
        np.testing.assert_allclose(second[::-1].numpy(), 2 * (a + 3 * b.T)[::-1], **TOLERANCE)
        x = nn.array(a)
        column = Output((7,), "fp32")
        out = launch(column_kernel, (1,), x=Strided(x[:, 4]), out=column, stride=x.strides[0], n=7, BLOCK=8)
        np.testing.assert_array_equal(out.numpy(), a[:, 4])


def test_launch_is_part_of_the_list() -> None:
    x, y = nn.array(floats(100)), nn.array(floats(100))
    before = work(), get_device().counters.dispatches
    first, _ = add(x * 2, y)
    (first - 1).evaluate()
    assert get_device().counters.dispatches == before[1] + 3
    assert work()[1:] == (before[0][1] + 1, before[0][2] + 1)


def test_state_in_kernels() -> None:
    state, steps = nn.array(np.arange(8, dtype=np.float32)), nn.array([0])
    old = state * 1
    for _ in range(3):
        assert launch(count_kernel, (1,), state=InPlace(state), steps=InPlace(steps), BLOCK=8) is None
    new = state * 1
    launch(count_kernel, (1,), state=InPlace(state), steps=InPlace(steps), BLOCK=8)
    np.testing.assert_array_equal(new.numpy(), np.arange(8) + 3)
    np.testing.assert_array_equal(old.numpy(), np.arange(8))
    np.testing.assert_array_equal(state.numpy(), np.arange(8) + 4)
    assert steps.item() == 4


def test_launch_errors() -> None:
    with pytest.raises(TypeError, match="needs an argument for 'y'"):
        launch(add_kernel, (1,), x=nn.zeros((3,)))
    with pytest.raises(TypeError, match="no parameter 'z'"):
        launch(count_kernel, (1,), state=InPlace(nn.zeros((8,))), steps=InPlace(nn.array([0])), BLOCK=8, z=1)
    with pytest.raises(ValueError, match="one to three extents"):
        launch(count_kernel, (1, 1, 1, 1), state=InPlace(nn.zeros((8,))), steps=InPlace(nn.array([0])), BLOCK=8)


def test_quantized_array() -> None:
    device = get_device()
    blocks = device.wrap(random.integers(0, 255, 4 * 68, dtype=np.uint8))
    weights = stored_array(blocks, "Q8_0", (4, 64))
    assert weights.shape == (4, 64) and weights.format == "Q8_0" and weights.nbytes == 4 * 68
    assert "stored as Q8_0" in repr(weights)
    out = launch(column_kernel, (1,), x=weights, out=Output((5,), "uint8"), stride=68, n=5, BLOCK=8)
    np.testing.assert_array_equal(out.numpy()[:4], blocks.read()[::68])
    plain = stored_array(device.wrap(floats(6)), "F32", (2, 3))
    assert plain.dtype.name == "fp32" and plain.format == "F32"
    with pytest.raises(ValueError, match="in 24 bytes, expected 12 bytes"):
        stored_array(device.wrap(floats(6)), "F16", (2, 3))


# ------------------------------------------------------------------------------------------------------- compiling


def test_a_call_is_one_submission_without_allocation() -> None:
    weights, state = nn.array(floats(40, 64)), nn.array(np.zeros(64, np.float32))
    expected_state = np.zeros(64, np.float32)

    @nitinol.compile
    def step(x: Any) -> Any:
        state.assign(state + x)
        hidden, _ = add(nn.softmax(x), state)
        return nn.matmul(weights, hidden), hidden.sum()

    for number in range(6):
        a = floats(64)
        before = work()
        y, total = step(a)
        if number >= 2:  # traced, and both sets of output buffers made
            assert work() == (before[0], before[1] + 1, before[2] + 1)
        expected_state += a
        hidden = np.exp(a - a.max()) / np.exp(a - a.max()).sum() + 3 * expected_state
        np.testing.assert_allclose(y.numpy(), weights.numpy() @ hidden, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(total.item(), hidden.sum(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(state.numpy(), expected_state, **TOLERANCE)


def test_dependencies_only_where_needed() -> None:
    x = nn.array(floats(64))

    @nitinol.compile
    def function(x: Any) -> Any:
        a, b, c = add(x, x)[0], add(x, x)[1], nn.exp(x).sum()
        return a + b, c

    function(x)
    after = [entry.after for entry in function.program.commands.entries]
    assert after == [(), (), (), (0, 1)]  # two launches and a reduction side by side; then a + b


def test_earlier_results_stay() -> None:
    double = nitinol.compile(lambda x: x * 2)
    inputs = [floats(5) for _ in range(5)]
    results = [double(a) for a in inputs]
    for a, result in zip(inputs, results):
        np.testing.assert_array_equal(result.numpy(), a * 2)


def test_each_shape_and_type_has_its_own_trace() -> None:
    traced = []

    @nitinol.compile
    def function(x: Any, scale: int, *, flag: bool = False) -> Any:
        traced.append(x.shape)
        return {"value": [x * scale, flag], "nothing": None}

    for a, scale in [(floats(3), 2), (floats(4), 2), (floats(3), 2), (floats(3), 3), (floats(3).astype(np.float16), 3)]:
        result = function(a, scale, flag=True)
        np.testing.assert_allclose(result["value"][0].numpy(), a * scale, rtol=1e-3)
        assert result["value"][1] is True and result["nothing"] is None
    assert traced == [(3,), (4,), (3,), (3,)]


def test_arrays_as_arguments_are_used_in_place_or_copied() -> None:
    traced = []

    @nitinol.compile
    def function(weights: Any, x: Any) -> Any:
        traced.append(1)
        return weights["w"] @ x

    w = {"w": nn.array(floats(3, 4))}
    for _ in range(4):  # x differs from call to call: one more trace, then copies
        x = nn.array(floats(4))
        kept = x.numpy()
        np.testing.assert_allclose(function(w, x).numpy(), w["w"].numpy() @ kept, **TOLERANCE)
        np.testing.assert_array_equal(x.numpy(), kept)
    assert len(traced) == 2


def test_state_as_an_argument() -> None:
    @nitinol.compile
    def push(state: Any, x: Any) -> Any:
        old = state + 0
        state.update_slice(x, 0)
        return old, state

    a, b = nn.array(floats(4)), nn.array(floats(4))
    for state in (a, b, a, b):
        before, x = state.numpy(), floats(2)
        old, new = push(state, x)
        np.testing.assert_array_equal(old.numpy(), before)
        np.testing.assert_array_equal(state.numpy(), np.concatenate([x, before[2:]]))
        np.testing.assert_array_equal(new.numpy(), state.numpy())


def test_what_was_asked_before_a_call_keeps_its_meaning() -> None:
    state = nn.array(np.zeros(3, np.float32))
    lazy = nn.array(np.ones(3, np.float32)) * 5

    @nitinol.compile
    def step() -> Any:
        state.assign(state + lazy)
        return state * 1

    old = state + 100
    np.testing.assert_array_equal(step().numpy(), [5, 5, 5])
    np.testing.assert_array_equal(old.numpy(), [100, 100, 100])
    middle = state * 2
    state.assign(state + 1)
    np.testing.assert_array_equal(step().numpy(), [11, 11, 11])
    np.testing.assert_array_equal(middle.numpy(), [10, 10, 10])


def test_other_libraries_arguments() -> None:
    import torch

    function = nitinol.compile(lambda x, y, n: x * y + n)
    for _ in range(4):
        x, n = torch.randn(5), np.float32(random.standard_normal())
        np.testing.assert_allclose(function(x, [2, nn.array(x)][1], n).numpy(), (x * x + float(n)).numpy(), **TOLERANCE)


def test_state_that_was_only_asked_for() -> None:
    state = nn.concatenate([nn.zeros((2,)), nn.ones((2,))])  # not evaluated before the first call

    @nitinol.compile
    def step() -> None:
        state.assign(state * 2)

    for _ in range(3):
        assert step() is None
    np.testing.assert_array_equal(state.numpy(), [0, 0, 8, 8])


def test_arrays_stay_on_their_device() -> None:
    device = nitinol.CpuDevice(threads=1)
    try:
        x = nn.array(floats(7), device=device)
        before = get_device().counters.submits
        y = (x + 1).evaluate()
        assert y.buffer.device is device and get_device().counters.submits == before
        with pytest.raises(nitinol.runtime.device.DeviceError, match="several devices"):
            (x + nn.array(floats(7))).evaluate()
    finally:
        device.close()


def test_interpreted_and_native_agree() -> None:
    weights = nn.array(floats(9, 33))

    @nitinol.compile
    def function(x: Any) -> Any:
        y = nn.rms_norm(x, weights[0]) @ weights.T
        return nn.where(y > 0, y, nn.cumsum(y, 1)), y.argmax(1), nn.concatenate([x[:, ::-2], x], 1)

    a = floats(5, 33)
    native = [r.numpy() for r in function(a)]
    with nitinol.interpret():
        for ours, theirs in zip(native, function(a)):
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.cpu
def test_numbers_of_threads_do_not_matter() -> None:
    a = floats(300, 257)

    def results() -> list[np.ndarray]:
        x = nn.array(a)
        return [r.numpy() for r in (nn.softmax(x), x @ x.T, x.sum(), nn.tanh(x).mean(0))]

    first = results()
    device = nitinol.CpuDevice(threads=3)
    try:
        with nitinol.using_device(device):
            for ours, theirs in zip(results(), first):
                np.testing.assert_array_equal(ours, theirs)
    finally:
        device.close()


def test_records_name_the_line_that_asked() -> None:
    @nitinol.compile
    def function(x: Any) -> Any:
        y = x * 2 + 1
        return nn.matmul(y, y)

    a = floats(8, 8)
    result, profile = function.profile(a)
    np.testing.assert_allclose(result.numpy(), (a * 2 + 1) @ (a * 2 + 1), **TOLERANCE)
    first, second = function.records
    assert [r.name for r in (first, second)] == ["multiply_add", "matmul_kernel"]
    assert Path(first.place[0]) == Path(__file__) and first.place[2] == "function"
    assert second.place[1] == first.place[1] + 1
    assert first.shapes == ((8, 8), (8, 8)) and first.dtypes == ("fp32", "fp32")
    assert first.nbytes == 2 * 8 * 8 * 4 and first.operations == 2 * 64 and second.operations == 2 * 8**3
    assert [r for r, _ in profile] == function.records and all(t.end >= t.start > 0 for _, t in profile)


def test_errors() -> None:
    with pytest.raises(RuntimeError, match="asks for the elements of an array of shape"):
        nitinol.compile(lambda x: x * float(x.sum()))(floats(3))
    with pytest.raises(RuntimeError, match="asks for the elements"):
        nitinol.compile(lambda x: x * x.numpy())(floats(3))
    leaked: list[Any] = []

    def leak(x: Any) -> Any:
        leaked.append(x + 1)
        return x * 2

    nitinol.compile(leak)(floats(3))
    with pytest.raises(ValueError, match="inside a compiled function"):
        leaked[0].numpy()
    assert (nn.array([1.0]) + 1).item() == 2

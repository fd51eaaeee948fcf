"""`kernel[grid](...)` as a graph of one call: what was asked for before it, aliases, read-only memory, its cache."""

from __future__ import annotations

import mmap
import threading
from pathlib import Path

import numpy as np
import pytest

import nitinol
import nitinol.language as tl
from nitinol.runtime.device import DeviceError
from nitinol.runtime.launch import alias_classes, interpret

pytestmark = pytest.mark.cpu


@nitinol.jit
def add_in_place(x, by, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at, at < n) + by, at < n)


@nitinol.jit
def add_kernel(a, b, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(a + at, at < n) + tl.load(b + at, at < n), at < n)


def fresh(n: int = 11) -> np.ndarray:
    return np.random.default_rng().standard_normal(n).astype(np.float32)


def test_what_was_asked_of_the_old_contents_is_computed_before() -> None:
    a = fresh()
    x = nitinol.array(a)
    y, z = x + 1, x[3:7] * 2
    add_in_place[(1,)](x, 100.0, 11, 16)
    assert np.array_equal(x.numpy(), a + np.float32(100))
    assert np.array_equal(y.numpy(), a + 1) and np.array_equal(z.numpy(), a[3:7] * 2)
    assert np.array_equal((x + 1).numpy(), (a + np.float32(100)) + 1)


def test_arguments_are_evaluated_first() -> None:
    a = fresh()
    x = nitinol.array(a)
    out = nitinol.zeros(11)
    x[2] = 5  # has not run either
    add_kernel[(1,)](x + 1, x, out, 11, 16)
    a[2] = 5
    assert np.array_equal(out.numpy(), (a + 1) + a)


def test_views_are_written_where_they_lie() -> None:
    a = fresh()
    x = nitinol.array(a)
    total = x.sum()
    add_in_place[(1,)](x[5:], 1.0, 3, 16)
    expected = a.copy()
    expected[5:8] += 1
    assert np.array_equal(x.numpy(), expected)
    np.testing.assert_allclose(total.numpy(), a.sum(), rtol=1e-5, atol=1e-5)  # the sum of the old contents


def test_names_that_only_gradients_tell_apart() -> None:
    a = fresh()
    x = nitinol.array(a)
    pending = nitinol.stop_gradient(x * 2)
    read = pending + 1
    out = nitinol.zeros(11)
    add_kernel[(1,)](pending, x, out, 11, 16)
    add_in_place[(1,)](pending, 10.0, 11, 16)
    assert np.array_equal(out.numpy(), a * 2 + a)
    assert np.array_equal(read.numpy(), a * 2 + 1)
    assert np.array_equal(pending.numpy(), a * 2 + 10)


@pytest.mark.parametrize("interpreted", [False, True])
def test_read_only_memory_is_not_written(tmp_path: Path, interpreted: bool) -> None:
    content = fresh(16)
    (tmp_path / "file").write_bytes(content.tobytes())
    with open(tmp_path / "file", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        cases = {
            "bytes": np.frombuffer(content.tobytes(), np.float32),
            "mmap": np.frombuffer(mapping, np.float32),
            "memmap": np.memmap(tmp_path / "file", np.float32, "r"),
            "broadcast": np.broadcast_to(np.float32(1), (16,)),
            "ours": nitinol.asarray(np.frombuffer(content.tobytes(), np.float32)),
        }
        for name, array in cases.items():
            before = np.array(array)
            out = np.zeros(16, np.float32)
            if interpreted:
                with interpret(), pytest.raises(DeviceError, match="stores to x, whose memory is read-only"):
                    add_in_place[(1,)](array, 1.0, 16, 16)
            else:
                with pytest.raises(DeviceError, match="stores to x, whose memory is read-only"):
                    add_in_place[(1,)](array, 1.0, 16, 16)
                if name != "broadcast":  # reading is fine
                    add_kernel[(1,)](array, array, out, 16, 16)
                    assert np.array_equal(out, before + before), name
            assert np.array_equal(np.array(array), before), name
        del cases, array


def test_a_read_only_array_is_refused_also_after_a_writable_one_of_the_kind() -> None:
    a = fresh(16)
    add_in_place[(1,)](a, 1.0, 16, 16)
    a.flags.writeable = False
    with pytest.raises(DeviceError, match="read-only"):
        add_in_place[(1,)](a, 1.0, 16, 16)


def test_kinds_of_launches_are_told_apart() -> None:
    """One after the other, as the cache sees them: sizes, alignment, numbers of every sort, aliases, grids."""
    rng = np.random.default_rng()
    for _ in range(200):
        n = int(rng.integers(1, 40))
        memory = rng.standard_normal(256).astype(rng.choice([np.float32, np.float64]))
        starts = rng.integers(0, 64, 3) if rng.random() < 0.3 else (0, 64, 128 + int(rng.integers(0, 20)))
        a, b, out = (memory[s : s + n] for s in starts)
        if rng.random() < 0.3:
            b = a
        overlap = any(abs(int(starts[2]) - int(s)) < n for s in starts[:2])
        if rng.random() < 0.2 and b is a:
            out = a
        elif overlap:  # another order of programs would give something else
            out = np.zeros_like(a)
        expected = a + b
        wrapped = [nitinol.asarray(v) if rng.random() < 0.3 else v for v in (a, b, out)]
        block = int(rng.choice([8, 16, 32]))
        add_kernel[(-(-n // block),) if rng.random() < 0.5 else lambda p: (nitinol.cdiv(p["n"], p["BLOCK"]), 1)](
            *wrapped, n, block
        )
        assert np.array_equal(out, expected)


def test_overlapping_arguments_share_a_class() -> None:
    assert alias_classes((0, 1, 3), [(0, 10, 3), (20, 30, 0), (30, 40, 1)]) == (0, 1, 2)
    assert alias_classes((0, 1, 3), [(0, 10, 3), (9, 30, 0), (30, 40, 1)]) == (0, 1, 0)
    assert alias_classes((0, 1, 2), [(0, 100, 2), (5, 6, 0), (50, 60, 1)]) == (0, 0, 0)


def test_memory_is_let_go_after_a_launch() -> None:
    import weakref

    arrays = [nitinol.array(fresh()) for _ in range(3)]
    add_kernel[(1,)](*arrays, 11, 16)
    gone = [weakref.ref(array.buffer) for array in arrays]
    del arrays
    assert [reference() for reference in gone] == [None] * 3


def test_threads_launch_the_same_kernel() -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        for i in range(300):
            a = np.full(16, number, np.float32)
            b = np.full(16, i, np.float32)
            out = np.zeros(16, np.float32)
            add_kernel[(1,)](a, b, out, 16, 16)
            if not (out == number + i).all():
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inside_a_compiled_function_a_launch_that_writes_is_refused() -> None:
    state = nitinol.array(fresh())

    @nitinol.compile
    def step(x):
        add_in_place[(1,)](state, 1.0, 11, 16)
        return x + 1

    before = state.numpy()
    with pytest.raises(RuntimeError, match=r"nitinol.launch"):
        step(nitinol.array(fresh()))
    assert np.array_equal(state.numpy(), before)


def test_a_gradient_does_not_flow_through_a_launch_that_writes() -> None:
    def changed(x):
        y = x * 2
        add_in_place[(1,)](y, 100.0, 11, 16)
        return y.sum()

    def argument(x):
        add_in_place[(1,)](x, 100.0, 11, 16)
        return x.sum()

    for function in (changed, argument):
        with pytest.raises(nitinol.GradientError, match=r"add_in_place \(.*test_launch.py:\d+\) updates an array in"):
            nitinol.grad(function)(nitinol.array(fresh()))

    @nitinol.custom_gradient
    def doubled(x):
        out = nitinol.empty(x.shape)
        add_kernel[(1,)](x, x, out, 11, 16)
        return out, lambda g: g * 2

    a = fresh()
    value, gradient = nitinol.value_and_grad(lambda x: (doubled(x) * 3).sum())(nitinol.array(a))
    np.testing.assert_allclose(value.numpy(), (a * 6).sum(), rtol=1e-5, atol=1e-5)  # another order of the sum
    assert np.array_equal(gradient.numpy(), np.full(11, 6, np.float32))

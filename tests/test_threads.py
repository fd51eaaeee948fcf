"""Many threads at once: arrays that one makes and others evaluate, one compiled function, gradients, updates in place,
kernels; 10^5 operations in all."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import nitinol
import nitinol.language as tl
from nitinol.graph.nodes import state
from nitinol.runtime import get_device, using_device

pytestmark = pytest.mark.cpu
THREADS = 8


@pytest.fixture(autouse=True)
def often() -> Iterator[None]:
    """Threads take turns a hundred times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(before)


def in_threads(work: Callable[[int, np.random.Generator], None], count: int = THREADS) -> None:
    """work(number, random numbers) in each of several threads that start at once; the first error is raised."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def body(number: int) -> None:
        rng = np.random.default_rng()
        try:
            barrier.wait()
            work(number, rng)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "threads wait for each other"


def integers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Small whole numbers as floats: sums and products are exact, in any order."""
    return rng.integers(-8, 9, shape).astype(np.float32)


def test_everything_at_once() -> None:
    """Eight threads, each doing all of it in random order; 12500 operations each."""
    step = nitinol.compile(lambda x, w: (x @ w + x, (x * 2).sum()))
    weight_values = np.random.default_rng().integers(-2, 3, (6, 6)).astype(np.float32)
    weight = nitinol.array(weight_values)
    offered: queue.SimpleQueue[tuple[Any, np.ndarray]] = queue.SimpleQueue()
    gradient = nitinol.grad(lambda x: (x * x * 3).sum())

    def work(number: int, rng: np.random.Generator) -> None:
        mine = nitinol.array(np.zeros(5, np.float32))
        expected = np.zeros(5, np.float32)
        held: list[tuple[Any, np.ndarray]] = []  # results of the compiled function, looked at later
        operations = 0
        while operations < 12500:
            kind = int(rng.integers(0, 6))
            if kind == 0:  # made here, evaluated elsewhere
                values = integers(rng, 3, 6)
                x = nitinol.array(values)
                offered.put(((x * 2 + weight[0]).T, (values * 2 + weight_values[0]).T))
                operations += 5
            elif kind == 1:
                try:
                    array, wanted = offered.get_nowait()
                except queue.Empty:
                    continue
                more = array + array  # several readers, some of which never run
                assert np.array_equal((array - 1).numpy(), wanted - 1)
                assert np.array_equal(array.numpy(), wanted)
                if rng.random() < 0.5:
                    assert np.array_equal(more.numpy(), wanted * 2)
                operations += 4
            elif kind == 2:  # updates of its own state, among what reads the old contents
                old = mine * 3
                at = int(rng.integers(0, 5))
                mine[at] = mine[at] + 1
                assert np.array_equal(old.numpy(), expected * 3)
                expected[at] += 1
                if rng.random() < 0.3:
                    assert np.array_equal(mine.numpy(), expected)
                operations += 6
            elif kind == 3:  # one compiled function for all, of a few shapes; results are kept for a while
                values = integers(rng, int(rng.integers(1, 4)), 6)
                given = nitinol.array(values) if rng.random() < 0.5 else values
                result, total = step(given, weight)
                held.append((result, values @ weight_values + values))
                held.append((total, np.float32(values.sum() * 2)))
                operations += 8
            elif kind == 4 and held:
                array, wanted = held.pop(int(rng.integers(0, len(held))))
                assert np.array_equal((array + 1).numpy(), wanted + 1)
                assert np.array_equal(array.numpy(), wanted)
                del held[6:]
                operations += 2
            else:
                values = integers(rng, 4)
                found = gradient(nitinol.array(values))
                assert np.array_equal(found.numpy(), values * 6)
                operations += 8
        assert np.array_equal(mine.numpy(), expected)
        for array, wanted in held:
            assert np.array_equal(array.numpy(), wanted)

    start = time.monotonic()
    in_threads(work)
    print(f"{time.monotonic() - start:.1f} s")


def test_one_array_with_readers_of_all_threads() -> None:
    """Its list of readers is cleared while others add to it; none may be lost when it is updated."""
    for _ in range(30):
        values = integers(np.random.default_rng(), 4)
        shared = nitinol.array(values)
        kept: list[tuple[Any, int]] = []

        def work(number: int, rng: np.random.Generator, shared: Any = shared, kept: Any = kept) -> None:
            for i in range(60):
                shared + i
                if i % 7 == 0:
                    kept.append((shared * number, number))
                if i % 20 == 0:
                    kept[-1][0].evaluate()

        in_threads(work)
        shared[:] = 100
        shared.evaluate()
        for array, number in kept:
            assert np.array_equal(array.numpy(), values * number)


def test_a_result_evaluated_by_all_at_once_is_computed_once() -> None:
    for _ in range(100):
        counter = nitinol.array(np.zeros(3, np.float32))
        counter[:] = counter + 1
        later = counter * 2
        in_threads(lambda number, rng, later=later: np.testing.assert_array_equal(later.numpy(), 2), 4)
        assert np.array_equal(counter.numpy(), [1, 1, 1])


def test_a_trace_and_eager_work_do_not_meet() -> None:
    """While one thread traces, others record, evaluate and differentiate; nothing of theirs becomes part of it."""
    tracing, done = threading.Event(), threading.Event()
    state_array = nitinol.array(np.zeros(2, np.float32))

    def traced(x: Any) -> Any:
        y = x + 1
        tracing.set()
        assert done.wait(30)
        state_array[:] = state_array + x[:2]
        return y * 2

    step = nitinol.compile(traced)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(step(nitinol.array([1.0, 2.0, 3.0]))))
    thread.start()
    assert tracing.wait(30)
    assert state.tracing is None and not state.recorders and state.target is None
    reader = state_array * 10 + 7  # of what the traced function is about to update
    eager = nitinol.array([5.0]) + 1
    assert eager.item() == 6
    other = nitinol.array(np.zeros(3, np.float32))
    other[1] = 4
    assert nitinol.grad(lambda x: (x * x).sum())(other).tolist() == [0, 8, 0]
    done.set()
    thread.join(30)
    assert reader.tolist() == [7, 7]
    assert found[0].tolist() == [4, 6, 8] and state_array.tolist() == [1, 2]
    assert step(nitinol.array([0.0, 0.0, 1.0])).tolist() == [2, 2, 4] and state_array.tolist() == [1, 2]
    assert other.tolist() == [0, 4, 0]


def test_a_thread_chooses_its_own_device() -> None:
    chosen = nitinol.CpuDevice(threads=1)
    before = get_device()
    inside, out = threading.Event(), threading.Event()
    found: list[Any] = []

    def work() -> None:
        with using_device(chosen):
            found.append(get_device())
            found.append(nitinol.zeros(3))
            inside.set()
            assert out.wait(30)
        found.append(get_device())

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(30)
    assert get_device() is before and nitinol.zeros(2).buffer.device is before
    out.set()
    thread.join(30)
    assert found[0] is chosen and found[2] is before
    assert found[1].buffer.device is chosen, "an array lands on the device that was current when it was asked for"


@nitinol.jit
def accumulate(state, x, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(state + at, tl.load(state + at) + tl.load(x + at))


def test_kernels_of_all_threads() -> None:
    def work(number: int, rng: np.random.Generator) -> None:
        mine, expected = nitinol.array(np.zeros(8, np.float32)), np.zeros(8, np.float32)
        for _ in range(150):
            values = integers(rng, 8)
            old = mine + 1
            accumulate[(1,)](mine, nitinol.array(values) * 2, 8)
            assert np.array_equal(old.numpy(), expected + 1)
            expected += values * 2
        assert np.array_equal(mine.numpy(), expected)

    in_threads(work)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_fork_beside_busy_threads_can_compute() -> None:
    """The locks of evaluation and of compiled functions may be held by threads that the child does not have."""
    script = """
import os, threading, numpy as np, nitinol
x = nitinol.array(np.arange(1000, dtype=np.float32))
double = nitinol.compile(lambda x: x * 2)
double(x)
stop = False

def work():
    while not stop:
        (x + 1).evaluate()
        double(x)

threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads:
    thread.start()
bad = 0
for _ in range(20):
    child = os.fork()
    if not child:
        try:
            right = (x * 3 + 1).numpy()[7] == 22 and double(x).numpy()[5] == 10
        except BaseException as error:
            print(repr(error), flush=True)
            right = False
        os._exit(0 if right else 1)
    bad += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
stop = True
for thread in threads:
    thread.join()
print("bad", bad)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "bad 0\n", done.stdout + done.stderr

"""The device protocol and the CPU device, with small kernels written as LLVM IR."""

from __future__ import annotations

import asyncio
import gc
import mmap
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from llvmlite import ir

from nitinol.runtime import memory
from nitinol.runtime.bandwidth import BLOCK, measure_read_bandwidth
from nitinol.runtime.cpu import CpuDevice
from nitinol.runtime.device import DeviceError, slot
from nitinol.runtime.native import I64, PREFIX, Body, compile_module, constant

pytestmark = pytest.mark.cpu

THREADS = [1, 2, 3, 7]


def index_from(f: Body, base, index):
    return f.b.add(base, f.b.shl(index, constant(3)))


def over_programs(f: Body, body) -> None:
    """for (p = first; p < last; p++) body(p)"""
    program = f.variable(f.parameters[3])
    with f.loop() as (_, end):
        f.jump_if(f.test(f.read(program), ">=", f.parameters[4]), end)
        body(f.read(program))
        f.step(program)
    f.finish()


def build_kernels() -> ir.Module:
    module = ir.Module("test_kernels")

    def kernel(name: str) -> Body:
        return Body(module, name, "args scratch grid first last")

    f = kernel("mark")  # a[p] += 1, atomically, so that every run is counted; b[p] = x + 1000 y + 1000000 z
    args, _, grid, _, _ = f.parameters
    counts, places = f.get(args, 0), f.get(args, 1)
    extents = [f.b.zext(f.b.load(f.b.inttoptr(f.b.add(grid, constant(4 * axis)), ir.IntType(32).as_pointer())), I64)
               for axis in (0, 1)]

    def mark(p):
        f.increment(index_from(f, counts, p), 0, 1)
        x, rest = f.b.urem(p, extents[0]), f.b.udiv(p, extents[0])
        y, z = f.b.urem(rest, extents[1]), f.b.udiv(rest, extents[1])
        value = f.b.add(x, f.b.add(f.b.mul(y, constant(1000)), f.b.mul(z, constant(1000000))))
        f.put(index_from(f, places, p), 0, value)
    over_programs(f, mark)

    g = kernel("step")  # to[p] = from[p] + from[n - 1 - p] + add: needs all of the entry before
    args = g.parameters[0]
    to, source, n, add = (g.get(args, i) for i in range(4))

    def step(p):
        mirror = g.b.sub(g.b.sub(n, constant(1)), p)
        total = g.b.add(g.get(index_from(g, source, p), 0), g.get(index_from(g, source, mirror), 0))
        g.put(index_from(g, to, p), 0, g.b.add(total, add))
    over_programs(g, step)

    h = kernel("spin")  # until *flag is nonzero; then out[p] = 1
    args = h.parameters[0]
    flag, out = h.get(args, 0), h.get(args, 1)

    def spin(p):
        with h.loop() as (_, ready):
            h.jump_if(h.test(h.get(flag, 0), "!=", 0), ready)
            h.call("usleep", 100)
        h.put(index_from(h, out, p), 0, 1)
    over_programs(h, spin)

    k = kernel("scratch")  # scratch filled with p and summed up again: wrong if two threads share it
    args, scratch = k.parameters[0], k.parameters[1]
    out, words = k.get(args, 0), k.get(args, 1)

    def use_scratch(p):
        i, total = k.variable(0), k.variable(0)
        with k.loop() as (_, filled):
            k.jump_if(k.test(k.read(i), ">=", words), filled)
            k.put(index_from(k, scratch, k.read(i)), 0, p)
            k.step(i)
        k.b.store(constant(0), i)
        with k.loop() as (_, summed):
            k.jump_if(k.test(k.read(i), ">=", words), summed)
            k.b.store(k.b.add(k.read(total), k.get(index_from(k, scratch, k.read(i)), 0)), total)
            k.step(i)
        k.put(index_from(k, out, p), 0, k.b.add(k.read(total), k.b.and_(scratch, constant(63))))
    over_programs(k, use_scratch)

    m = kernel("fail")  # *status = code; the list adds the status word's address to the arguments
    args = m.parameters[0]
    code, status = m.get(args, 0), m.get(args, 1)
    over_programs(m, lambda p: m.put(status, 0, code))

    n = kernel("nap")  # usleep(args[0])
    over_programs(n, lambda p: n.call("usleep", n.get(n.parameters[0], 0)))
    return module


ENGINE = compile_module(build_kernels())


def executable(name: str, scratch_bytes: int = 0) -> SimpleNamespace:
    return SimpleNamespace(name=name, address=ENGINE.get_function_address(PREFIX + name), scratch_bytes=scratch_bytes)


MARK, STEP, SPIN, FAIL, NAP = (executable(name) for name in ("mark", "step", "spin", "fail", "nap"))


@pytest.fixture(params=THREADS)
def device(request):
    device = CpuDevice(request.param)
    yield device
    device.close()


@pytest.fixture
def pair():
    device = CpuDevice(2)
    yield device
    device.close()


def integers(device: CpuDevice, count: int, value: int = 0):
    buffer = device.allocate(8 * count)
    buffer.as_numpy(np.int64)[:] = value
    return buffer


# Running


def test_every_program_runs_exactly_once(device):
    grids = [(1,), (2, 3), (5, 1, 7), (1, 13, 2), (97,), (1000, 3), (31, 33, 3), (0, 5), (4099,)]
    random.shuffle(grids)
    for grid in grids:
        x, y, z = (*grid, 1, 1)[:3]
        counts, places = integers(device, max(x * y * z, 1)), integers(device, max(x * y * z, 1), -1)
        commands = device.command_list()
        commands.launch(MARK, grid, [counts, places])
        for runs in (1, 2, 3):
            device.run(commands)
            assert (counts.as_numpy(np.int64)[:x * y * z] == runs).all(), grid
        expected = [i + 1000 * j + 1000000 * k for k in range(z) for j in range(y) for i in range(x)]
        assert places.as_numpy(np.int64)[:x * y * z].tolist() == expected
        if not expected:
            assert counts.as_numpy(np.int64)[0] == 0


def chain(device: CpuDevice, steps: list[tuple[int, int]], values: np.ndarray) -> np.ndarray:
    """Steps (programs are always all values, added constant), each reading what all programs of the last wrote."""
    n = len(values)
    a, b = integers(device, n), integers(device, n, -1)
    a.as_numpy(np.int64)[:] = values
    commands = device.command_list()
    for _, add in steps:
        commands.launch(STEP, (n,), [b, a, n, add])
        a, b = b, a
    device.run(commands)
    return a.as_numpy(np.int64).copy()


def test_dependent_entries_run_in_order(device):
    rng = np.random.default_rng()
    for n in (1, 2, 37, 500):
        values, additions = rng.integers(-100, 100, n), rng.integers(-5, 5, 300)
        expected = values.copy()
        with np.errstate(over="ignore"):
            for add in additions:
                expected = expected + expected[::-1] + add
        for _ in range(3):
            assert (chain(device, [(n, int(add)) for add in additions], values) == expected).all()


def test_independent_entries_overlap():
    """The test above could fail: an entry that depends on none does begin before the one ahead of it has ended."""
    device = CpuDevice(2)
    flag, first, second = integers(device, 1), integers(device, 1), integers(device, 1)
    commands = device.command_list()
    commands.launch(SPIN, (1,), [flag, first])
    commands.fill(second, 1)
    event = device.submit(commands)
    while second.as_numpy(np.uint8)[0] == 0:
        time.sleep(0.001)
    assert not event.done and first.as_numpy(np.int64)[0] == 0
    flag.as_numpy(np.int64)[0] = 1
    event.wait()
    commands = device.command_list()
    flag.as_numpy(np.int64)[0] = 0
    second.as_numpy(np.int64)[0] = 0
    commands.launch(SPIN, (1,), [flag, first])
    commands.copy(second, first)
    event = device.submit(commands)
    time.sleep(0.05)
    assert second.as_numpy(np.int64)[0] == 0
    flag.as_numpy(np.int64)[0] = 1
    event.wait()
    assert second.as_numpy(np.uint8)[0] == 1
    device.close()


def test_what_a_launch_touches_decides_what_it_comes_after(pair):
    a, b = integers(pair, 64), integers(pair, 64)
    commands = pair.command_list()
    commands.launch(STEP, (4,), [a, b, 4, 0], writes={0: (0, 32)}, reads={1: (0, 32)})
    commands.launch(STEP, (4,), [a.view(32), b, 4, 0], writes={0: (0, 32)}, reads={1: (0, 32)})  # beside the first
    commands.launch(STEP, (4,), [a.view(32), b, 4, 0], writes={0: (-8, 0)}, reads={1: (0, 32)})  # what the first wrote
    commands.launch(STEP, (4,), [a, b, 4, 0], reads={1: (0, 32)})  # of argument 0 nothing is said: all of it
    commands.launch(STEP, (0,), [a, b, 4, 0])  # no programs
    commands.fill(b.view(0, 0), 1)
    commands.fill(b.view(40, 8), 1)  # read by nobody
    commands.launch(STEP, (4,), [int(a.address), int(b.address), 4, 0], writes={1: (40, 41)})  # addresses as numbers
    commands.copy(b.view(0, 8), b.view(40, 8))
    assert [entry.after for entry in commands.entries] == [(), (), (0,), (1, 2), (), (), (), (6,), (3, 7)]
    for given in ({"reads": {4: (0, 1)}}, {"writes": {-1: (0, 1)}}):
        with pytest.raises(DeviceError, match="through arguments"):
            commands.launch(STEP, (4,), [a, b, 4, 0], **given)


def test_a_waiting_thread_helps_and_a_late_worker_changes_nothing(device):
    """The same lists over and over, alternating between run and submit, so that workers arrive at any moment."""
    n = 64
    a, b, c = integers(device, n, 1), integers(device, n), integers(device, n)
    short, long = device.command_list(), device.command_list()
    short.launch(MARK, (n,), [b, c])
    for _ in range(4):
        long.launch(STEP, (n,), [c, a, n, 0])
        long.launch(MARK, (n,), [b, c])
    expected = 0
    for i in range(300):
        commands, marks = (short, 1) if random.random() < 0.5 else (long, 4)
        expected += marks
        if i % 3 == 0:
            device.submit(commands)
        elif i % 3 == 1:
            device.submit(commands).wait()
            assert (b.as_numpy(np.int64) == expected).all()
        else:
            device.run(commands)
            assert (b.as_numpy(np.int64) == expected).all()
    device.synchronize()
    assert (b.as_numpy(np.int64) == expected).all()


def test_scratch_is_each_workers_own_and_aligned(device):
    out = integers(device, 200)
    for words in (8, 100, 700, 30):
        commands = device.command_list()
        commands.launch(executable("scratch", 8 * words), (200,), [out, words])
        device.run(commands)
        assert out.as_numpy(np.int64).tolist() == [words * p for p in range(200)]


def test_copy_and_fill(device):
    rng = np.random.default_rng()
    for nbytes in (0, 1, 63, 4097, (1 << 18) + 5, (1 << 20) + 1):
        data = rng.integers(0, 256, nbytes, np.uint8)
        source, target = device.wrap(data), device.allocate(nbytes + 7)
        commands = device.command_list()
        commands.fill(target, 255)
        commands.copy(target.view(3, nbytes), source)
        device.run(commands)
        result = target.as_numpy()
        assert (result[3:3 + nbytes] == data).all()
        assert (result[:3] == 255).all() and (result[3 + nbytes:] == 255).all()


def test_submissions_run_in_order_and_the_ring_may_fill_up(device):
    a, b = integers(device, 8, 1), integers(device, 8)
    events, expected = [], 1
    for i in range(150):  # more than the ring has places; x becomes 4 x + 2 i, so the order matters
        commands = device.command_list()
        commands.launch(STEP, (8,), [b, a, 8, i])
        commands.launch(STEP, (8,), [a, b, 8, 0])
        events.append(device.submit(commands))
        expected = (4 * expected + 2 * i) % 2**64
    events[-1].wait()
    assert all(event.done for event in events)
    assert (a.as_numpy(np.uint64) == expected).all()


def test_an_empty_list_is_done_at_once(device):
    device.run(device.command_list())
    event = device.submit(device.command_list())
    event.wait(1)
    assert event.done


def test_arguments():
    assert slot(-1, "i") == b"\xff" * 8 and slot(2**64 - 1, "i") == b"\xff" * 8
    assert slot(1.0, "f") == np.float32(1).tobytes() + bytes(4)
    assert slot(1.0, "d") == np.float64(1).tobytes()
    device = CpuDevice(1)
    out, ones = integers(device, 4), integers(device, 4, 1)
    for add in (5, -5, 2**63 + 5, np.int64(7), slot(-9, "i")):
        commands = device.command_list()
        commands.launch(STEP, (4,), [out, ones, 4, add])
        device.run(commands)
        number = int.from_bytes(add, "little") if isinstance(add, bytes) else int(add)
        assert (int(out.as_numpy(np.int64)[0]) - number - 2) % 2**64 == 0
    with pytest.raises(DeviceError, match="argument 1"):
        commands.launch(STEP, (4,), [out, 1.5])
    for grid in ((), (1, 2, 3, 4), (-1,), (2**31,)):
        with pytest.raises(DeviceError, match="grid"):
            commands.launch(STEP, grid, [])
    commands.launch(STEP, (1,), [2**64])
    with pytest.raises(DeviceError, match="64 bits"):
        device.run(commands)


def test_timestamps(device):
    commands = device.command_list()
    with pytest.raises(DeviceError, match="profile"):
        commands.timestamps()
    commands.profile = True
    commands.launch(NAP, (4,), [2000], label="first", writes={0: (0, 8)})  # a nap takes its time for an address
    commands.launch(NAP, (1,), [3000], label="second", reads={0: (-1000, -999)})
    for _ in range(2):
        before = time.monotonic_ns()
        device.run(commands)
        first, second = commands.timestamps()
        assert [first.label, second.label] == ["first", "second"]
        assert first.end - first.start >= 2_000_000 and second.end - second.start >= 3_000_000
        assert first.end <= second.start
        assert sys.platform != "linux" or before <= first.start < second.end <= time.monotonic_ns()


def test_counters(pair):
    before = pair.counters.submits, pair.counters.waits, pair.counters.dispatches
    a = pair.allocate(100_000)
    commands = pair.command_list()
    commands.fill(a)
    commands.fill(a, 1)
    reserved = pair.counters.allocations, pair.counters.pool_hits, pair.counters.bytes_reserved
    for _ in range(5):
        pair.run(commands)
    pair.submit(commands).wait()
    after = pair.counters.submits, pair.counters.waits, pair.counters.dispatches
    assert [y - x for x, y in zip(before, after)] == [6, 6, 12]
    assert reserved == (pair.counters.allocations, pair.counters.pool_hits, pair.counters.bytes_reserved)


# Events


def blocked(device: CpuDevice):
    """A list in flight that ends when the flag is set."""
    flag, out = integers(device, 1), integers(device, 3)
    commands = device.command_list()
    commands.launch(SPIN, (3,), [flag, out])
    return device.submit(commands), flag.as_numpy(np.int64), out.as_numpy(np.int64)


def test_event(device):
    event, flag, out = blocked(device)
    assert not event.done
    flag[0] = 1
    event.wait()
    assert event.done and out.tolist() == [1, 1, 1]
    event.wait()


def test_a_timeout_leaves_the_work_running(device):
    event, flag, out = blocked(device)
    with pytest.raises(TimeoutError, match=r"0\.02 s"):
        event.wait(0.02)
    assert not event.done
    flag[0] = 1
    event.wait(30)
    assert out.tolist() == [1, 1, 1]


def test_await_does_not_block_the_loop(device):
    async def main():
        event, flag, out = blocked(device)
        ticks = 0

        async def ticker():
            nonlocal ticks
            while ticks < 5:
                await asyncio.sleep(0.001)
                ticks += 1
            flag[0] = 1

        other = asyncio.create_task(ticker())
        await event
        await event
        await other
        return ticks, out.tolist()

    assert asyncio.run(main()) == (5, [1, 1, 1])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("how", ["run", "wait"])
def test_ctrl_c_while_waiting(threads, how):
    device = CpuDevice(threads)
    out = integers(device, 64)
    commands = device.command_list()
    commands.launch(NAP, (64 * threads,), [10_000, out])
    commands.fill(out, 1)
    timer = threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        if how == "run":
            device.run(commands)
        else:
            device.submit(commands).wait()
    assert out.as_numpy()[0] == 0, "the interrupt came only when all work was done"
    device.synchronize()  # what was in flight still ends, with nobody but the pool at work
    assert (out.as_numpy() == 1).all()
    timer.join()
    again = device.command_list()
    again.fill(out, 3)
    device.run(again)
    assert (out.as_numpy() == 3).all()
    device.close()


def test_a_kernel_reports_an_error(device):
    commands = device.command_list()
    commands.launch(FAIL, (5,), [42])
    with pytest.raises(DeviceError, match="error 42"):
        device.run(commands)
    device.run(device.command_list())  # reported once
    with pytest.raises(DeviceError, match="error 42"):
        device.submit(commands).wait()


def test_a_failure_is_told_by_the_wait_for_its_submission_and_by_no_other(device):
    """One thread's lists fail, by chance some twice in a row and in the same list; two others' do not."""
    failing = device.command_list()
    failing.launch(FAIL, (3,), [7])
    wrong: list[object] = []

    def fail(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(300):
            try:
                if rng.random() < 0.5:
                    device.run(failing)
                else:
                    events = [device.submit(failing) for _ in range(rng.integers(1, 4))]
                    for event in events[:-1]:
                        with pytest.raises(DeviceError, match="error 7"):
                            event.wait()
                    events[-1].wait()
                wrong.append("a failure was lost")
            except DeviceError as error:
                if "error 7" not in str(error):
                    wrong.append(error)

    def succeed(seed: int) -> None:
        try:
            out = integers(device, 8)
            commands = device.command_list()
            commands.fill(out, seed)
            for number in range(300):
                if number % 3 == 0:
                    device.submit(commands).wait()
                elif number % 3 == 1:
                    device.run(commands)
                else:
                    device.submit(commands)
                    assert (out.read() == seed).all()
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=fail, args=(1,)), *(threading.Thread(target=succeed, args=(n,)) for n in (2, 3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_failures_are_kept_until_somebody_asks(device):
    """More than the ring has places for; and whoever has submitted and not waited hears of it from `synchronize`."""
    failing, fine = device.command_list(), device.command_list()
    failing.launch(FAIL, (1,), [9])
    events = [device.submit(failing if number % 2 else fine) for number in range(200)]
    for number in np.random.default_rng().permutation(200):
        for _ in range(2):  # also when asked again
            if number % 2:
                with pytest.raises(DeviceError, match="error 9"):
                    events[number].wait()
            else:
                events[number].wait()
    device.submit(failing)
    other = threading.Thread(target=device.synchronize)  # would print the exception, which pytest reports
    other.start()
    other.join()
    with pytest.raises(DeviceError, match="error 9"):
        device.synchronize()
    device.synchronize()


def test_many_python_threads_share_a_device(device):
    n, rounds, mistakes = 33, 40, []

    def work(seed: int) -> None:
        try:
            rng = np.random.default_rng(seed)
            for _ in range(rounds):
                values, additions = rng.integers(-9, 9, n), rng.integers(-9, 9, 5)
                expected = values
                for add in additions:
                    expected = expected + expected[::-1] + add
                if (chain(device, [(n, int(add)) for add in additions], values) != expected).any():
                    mistakes.append(seed)
        except BaseException as error:
            mistakes.append(error)
            raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not mistakes
    assert device.counters.submits >= 5 * rounds


def test_a_list_dropped_in_flight_lives_until_it_has_run(pair):
    event, flag, _ = blocked(pair)
    out = integers(pair, 1000)
    view = out.as_numpy()
    commands = pair.command_list()
    commands.fill(out, 9)
    pair.submit(commands)
    del commands, out, event
    gc.collect()
    flag[0] = 1
    pair.synchronize()
    assert (view == 9).all()


class Witness(np.ndarray):
    """An array that tells when it goes."""


def witness(values: np.ndarray) -> tuple[np.ndarray, list[bool]]:
    array, gone = values.view(Witness), []
    weakref.finalize(array, gone.append, True)
    return array, gone


@pytest.mark.parametrize("how", ["free", "forget"])
def test_wrapped_memory_outlives_the_work_on_it(pair, how):
    event, flag, _ = blocked(pair)
    array, gone = witness(np.zeros(1000, np.uint8))
    buffer, commands = pair.wrap(array), pair.command_list()
    commands.fill(buffer, 3)
    last = pair.submit(commands)
    if how == "free":
        buffer.free()
    del array, buffer, commands
    gc.collect()
    assert not gone and not event.done
    flag[0] = 1
    last.wait()
    pair.run(pair.command_list())
    del last
    gc.collect()
    assert gone


def test_freed_wrapped_memory_goes_at_once_if_nothing_runs(pair):
    array, gone = witness(np.zeros(1000, np.uint8))
    buffer = pair.wrap(array)
    del array
    assert not gone
    buffer.free()
    assert gone


@pytest.mark.parametrize("how", ["run", "wait"])
def test_ctrl_c_frees_nothing_that_is_in_use(pair, how):
    array, gone = witness(np.zeros(64, np.int64))
    flag = integers(pair, 1)
    commands = pair.command_list()
    commands.kept.append(array)
    commands.launch(SPIN, (3,), [flag, int(array.ctypes.data)])
    timer = threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    release = threading.Timer(0.4, lambda: flag.as_numpy(np.int64).__setitem__(0, 1))  # the waiting thread is a worker
    release.start()
    with pytest.raises(KeyboardInterrupt):
        if how == "run":
            pair.run(commands)
        else:
            pair.submit(commands).wait(30)
    timer.join()
    del array
    if how == "wait":  # with `run` the interrupt came when the piece that this thread had taken was done
        with pytest.raises(DeviceError, match="in flight"):
            commands.rebind({(0, 0): flag})
    else:
        pair.synchronize()
        commands.rebind({(0, 0): flag})
    del commands
    gc.collect()
    assert how == "run" or not gone
    release.join()
    pair.synchronize()
    pair.run(pair.command_list())
    gc.collect()
    assert gone


# Rebinding


def test_rebinding_is_like_recording_again(device):
    rng = np.random.default_rng()
    buffers = [integers(device, 16) for _ in range(4)]
    commands = device.command_list()
    commands.launch(STEP, (16,), [buffers[1], buffers[0], 16, 5])
    commands.launch(STEP, (16,), [buffers[2], buffers[1], 16, 7])
    for number in range(60):
        for buffer in buffers:
            buffer.as_numpy(np.int64)[:] = rng.integers(-9, 9, 16)
        # Sometimes a chain, sometimes side by side, sometimes the second overwrites what the first reads.
        to, source, second_to, second_source = (buffers[i] for i in rng.integers(0, 4, 4))
        if to is source or second_to is second_source:
            continue
        add, second_add = (int(x) for x in rng.integers(-9, 9, 2))
        commands.rebind({(0, 0): to, (0, 1): source, (0, 3): add, (1, 0): second_to, (1, 1): second_source,
                         (1, 3): slot(second_add, "i")})
        fresh = device.command_list()
        fresh.launch(STEP, (16,), [to, source, 16, add])
        fresh.launch(STEP, (16,), [second_to, second_source, 16, second_add])
        assert [entry.after for entry in commands.entries] == [entry.after for entry in fresh.entries]
        expected = [buffer.as_numpy(np.int64).copy() for buffer in buffers]
        for a, b, c in ((to, source, add), (second_to, second_source, second_add)):
            values = expected[buffers.index(b)]
            expected[buffers.index(a)] = values + values[::-1] + c
        if number % 2:
            device.run(commands)
        else:
            device.submit(commands).wait()
        for buffer, values in zip(buffers, expected):
            assert (buffer.as_numpy(np.int64) == values).all()


def test_a_list_of_one_launch_is_not_encoded_again(pair):
    a, b, c = integers(pair, 8, 1), integers(pair, 8), integers(pair, 8)
    commands = pair.command_list()
    commands.launch(STEP, (4,), [b, a, 4, 1])
    pair.run(commands)
    encoded = commands.encoded
    commands.rebind({(0, 0): c.view(8), (0, 3): 2**64 - 3})
    commands.rebind({})
    pair.run(commands)
    assert commands.encoded is encoded and c.as_numpy(np.int64).tolist() == [0, -1, -1, -1, -1, 0, 0, 0]


def test_what_cannot_be_bound_changes_nothing(pair):
    other = CpuDevice(1)
    a, b, gone = integers(pair, 8, 1), integers(pair, 8), integers(pair, 8)
    gone.free()
    commands = pair.command_list()
    commands.launch(STEP, (8,), [b, a, 8, 1])
    pair.run(commands)
    for change, text in (({(0, 1): gone}, "freed"), ({(0, 1): other.allocate(64)}, "device"), ({(0, 1): 5}, "become"),
                         ({(0, 3): a}, "become"), ({(0, 2): 1.5}, "expected a Buffer"), ({(0, 2): 2**64}, "64 bits"),
                         ({(1, 0): a}, "argument 0 of entry 1"), ({(-1, 0): a}, "of entry -1"),
                         ({(0, 4): 1}, "argument 4"), ({(0, -1): 1}, "argument -1")):
        with pytest.raises(DeviceError, match=text):
            commands.rebind({(0, 0): a, (0, 3): 7, **change})
        b.as_numpy(np.int64)[:] = 0
        pair.run(commands)
        assert (b.as_numpy(np.int64) == 3).all()
    event, flag, _ = blocked(pair)
    pair.submit(commands)
    with pytest.raises(DeviceError, match="in flight"):
        commands.rebind({(0, 3): 3})
    flag[0] = 1
    pair.synchronize()
    commands.rebind({(0, 3): 2})
    pair.run(commands)
    assert (b.as_numpy(np.int64) == 4).all() and event.done
    a.free()
    with pytest.raises(DeviceError, match="freed"):
        pair.run(commands)
    commands.rebind({(0, 1): b, (0, 0): integers(pair, 8)})
    pair.run(commands)
    other.close()


def test_replaced_buffers_are_let_go(pair):
    array, gone = witness(np.ones(8, np.int64))
    b, commands = integers(pair, 8), pair.command_list()
    commands.launch(STEP, (8,), [b, pair.wrap(array), 8, 1])
    pair.run(commands)
    del array
    gc.collect()
    assert not gone
    commands.rebind({(0, 1): integers(pair, 8)})
    gc.collect()
    assert gone


def test_close(device):
    event, flag, _ = blocked(device)
    closer = threading.Timer(0.05, device.close)
    closer.start()
    release = threading.Timer(0.1, lambda: flag.__setitem__(0, 1))
    release.start()
    if device.threads < 3:  # one of the programs is left when the device closes; with more workers all have begun
        with pytest.raises(DeviceError, match="closed"):
            event.wait()
    closer.join()
    release.join()
    with pytest.raises(DeviceError, match="closed"):
        device.submit(device.command_list())
    device.close()


def run_python(text: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(text)], capture_output=True, text=True, timeout=60)


def test_exit_with_a_list_in_flight():
    done = run_python("""
        import numpy as np
        from nitinol.runtime.cpu import CpuDevice
        device = CpuDevice(2)
        memory = device.allocate(64 << 20)
        commands = device.command_list()
        for i in range(2000):
            commands.fill(memory, i % 256)
        event = device.submit(commands)
        assert not event.done
        print("end", flush=True)
        """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork():
    done = run_python("""
        import os, sys, warnings
        warnings.simplefilter("ignore")
        import numpy as np
        from nitinol.runtime.cpu import CpuDevice
        from nitinol.runtime.device import DeviceError
        device = CpuDevice(2)
        small, large = device.allocate(1000), device.allocate(64 << 20)
        commands, slow = device.command_list(), device.command_list()
        commands.fill(small, 5)
        for _ in range(50):
            slow.fill(large, 1)
        device.run(commands)
        finished = device.submit(commands)
        finished.wait()
        event = device.submit(slow)
        child = os.fork()
        if child == 0:
            small.as_numpy()[:] = 0
            device.run(commands)
            device.submit(commands).wait()
            assert (small.as_numpy() == 5).all() and finished.done
            try:
                event.wait()
                lost = False
            except DeviceError as error:
                lost = "fork" in str(error)
            grandchild = os.fork()
            if grandchild == 0:
                try:
                    event.wait()
                    lost = False
                except DeviceError as error:
                    lost = lost and "fork" in str(error)
                print("grandchild", lost, flush=True)
                sys.exit(0)
            assert os.waitpid(grandchild, 0)[1] == 0
            print("child", lost, flush=True)
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        event.wait()
        device.run(commands)
        print("parent")
        """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "grandchild True\nchild True\nparent\n", "")


def test_an_idle_device_uses_no_processor_time(device):
    device.run(device.command_list())
    event, flag, _ = blocked(device)
    flag[0] = 1
    event.wait()
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1  # one spinning thread would have used 0.3 s


# Memory


def test_buffers_are_aligned_and_views_share_memory(pair):
    for nbytes in (0, 1, 64, 65, 5000, 1 << 16, (1 << 16) + 1, 3 << 20):
        buffer = pair.allocate(nbytes)
        assert buffer.address % (mmap.PAGESIZE if nbytes > 1 << 16 else 64) == 0
        assert buffer.as_numpy().nbytes == nbytes
        buffer.as_numpy()[:] = 1
    view = buffer.view(100, 24)
    view.as_numpy(np.int64, (3, 1))[:] = -1
    assert (buffer.as_numpy()[96:128] == [1] * 4 + [255] * 24 + [1] * 4).all()
    assert view.view(8).nbytes == 16
    for offset, size in ((-1, 2), (0, 25), (25, None), (8, -1)):
        with pytest.raises(DeviceError, match="does not fit"):
            view.view(offset, size)
    with pytest.raises(DeviceError, match="needs 32 bytes"):
        view.as_numpy(np.int64, (4,))
    with pytest.raises(DeviceError, match="whole number"):
        pair.allocate(7).as_numpy(np.int16)
    with pytest.raises(DeviceError, match="-1 bytes"):
        pair.allocate(-1)


def test_size_classes_waste_little():
    for nbytes in [*range(70), *(random.randrange(1, 1 << random.randrange(1, 34)) for _ in range(500))]:
        size = memory.size_class(nbytes)
        assert size >= max(nbytes, 64) and size % 64 == 0
        assert size <= max(64, 2 * nbytes) and (nbytes <= memory.SMALL or size <= 1.125 * nbytes + mmap.PAGESIZE)


def test_use_after_free(pair):
    buffer = pair.allocate(100)
    view, commands = buffer.view(10), pair.command_list()
    commands.fill(view)
    pair.run(commands)
    with pytest.raises(DeviceError, match="view"):
        view.free()
    buffer.free()
    buffer.free()
    for use in (buffer.as_numpy, view.as_numpy, lambda: buffer.view(0), lambda: pair.command_list().fill(view),
                lambda: pair.run(commands), lambda: pair.submit(commands)):
        with pytest.raises(DeviceError, match="freed"):
            use()


def test_another_devices_buffer_and_list(pair):
    other = CpuDevice(1)
    with pytest.raises(DeviceError, match="device"):
        pair.command_list().fill(other.allocate(1))
    with pytest.raises(DeviceError, match="another device"):
        pair.run(other.command_list())


def test_freed_memory_is_used_again(pair):
    for nbytes in (100, 300_000):
        first = pair.allocate(nbytes)
        address, use = first.address, pair.counters.bytes_in_use
        first.free()
        assert pair.counters.bytes_in_use < use
        hits, allocations = pair.counters.pool_hits, pair.counters.allocations
        second = pair.allocate(nbytes)
        assert second.address == address and pair.counters.bytes_in_use == use
        assert (pair.counters.pool_hits, pair.counters.allocations) == (hits + 1, allocations)
        array = second.as_numpy()
        del second  # the array still looks at it
        assert pair.allocate(nbytes).address != address
        del array
        assert pair.allocate(nbytes).address == address


def test_memory_freed_under_work_in_flight_is_not_used_until_it_is_done(pair):
    _, flag, _ = blocked(pair)
    buffer = pair.allocate(1000)
    address = buffer.address
    commands = pair.command_list()
    commands.fill(buffer, 7)
    last = pair.submit(commands)
    buffer.free()
    assert pair.allocate(1000).address != address
    flag[0] = 1
    last.wait()
    kept = [pair.allocate(1000) for _ in range(3)]
    assert address in [other.address for other in kept]


def test_too_much_memory_is_refused_with_figures(pair, monkeypatch):
    with pytest.raises(DeviceError, match=r"MB are needed, but only \d+ MB"):
        pair.allocate(1 << 50)
    monkeypatch.setattr(memory, "available_memory", lambda: 0)  # a system that does not say
    with pytest.raises(DeviceError, match="refused"):
        pair.allocate(1 << 60)


def test_pooled_memory_is_given_back_before_a_refusal(pair, monkeypatch):
    pair.allocate(10 << 20).free()
    reserved = pair.counters.bytes_reserved
    monkeypatch.setattr(memory, "available_memory", lambda: 1)
    with pytest.raises(DeviceError, match="needed"):
        pair.allocate(20 << 20)
    assert pair.counters.bytes_reserved == reserved - (10 << 20)


def test_wrapped_memory_stays_in_place(pair, tmp_path):
    path = tmp_path / "weights"
    data = np.random.default_rng().integers(0, 256, 10_000, np.uint8)
    path.write_bytes(data.tobytes())
    with open(path, "rb") as file:
        mapped = pair.wrap(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    gc.collect()
    assert mapped.read_only and mapped.nbytes == 10_000 and (mapped.as_numpy() == data).all()
    assert not mapped.as_numpy().flags.writeable
    copy = pair.allocate(4000)
    commands = pair.command_list()
    commands.copy(copy, mapped.view(3, 4000))
    pair.run(commands)
    assert (copy.as_numpy() == data[3:4003]).all()
    with pytest.raises(DeviceError, match="allocate"):
        commands.fill(mapped)
    array = np.zeros((3, 5), np.float32)
    buffer = pair.wrap(array)
    commands = pair.command_list()
    commands.fill(buffer, 255)
    pair.run(commands)
    assert np.isnan(array).all() and buffer.address == array.ctypes.data
    assert pair.wrap(b"abc").read_only and pair.wrap(b"").nbytes == 0 and pair.wrap(np.empty((0, 3))).nbytes == 0
    with pytest.raises(DeviceError, match="strides"):
        pair.wrap(array[:, ::2])


def test_copy_errors(pair):
    a, commands = pair.allocate(100), pair.command_list()
    with pytest.raises(DeviceError, match="one size"):
        commands.copy(a, pair.allocate(99))
    with pytest.raises(DeviceError, match="overlaps"):
        commands.copy(a.view(0, 60), a.view(40, 60))
    with pytest.raises(DeviceError, match="byte"):
        commands.fill(a, 256)


# The machine


def test_a_wrong_number_of_threads_is_refused():
    for threads in (0, -1, 5000):
        with pytest.raises(DeviceError, match=f"{threads} threads"):
            CpuDevice(threads)


def test_read_bandwidth(pair):
    assert 0.1 < measure_read_bandwidth(pair, threads=1, nbytes=3 * BLOCK + 5, repetitions=2) < 10_000
    with pytest.raises(DeviceError, match="too small"):
        measure_read_bandwidth(pair, nbytes=10)

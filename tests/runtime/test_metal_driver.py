"""The Metal driver on the software Metal device, with small kernels written in Metal's own language."""

from __future__ import annotations

import asyncio
import gc
import mmap
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ziglang", reason="softmetal needs clang: pip install ziglang")

import nitinol.language as tl
import softmetal
from nitinol.compiler.driver import tile_ir
from nitinol.compiler.gpu import Executable, compile_function
from nitinol.language.jit import specialise
from nitinol.language.types import int64
from nitinol.runtime import metal
from nitinol.runtime.device import DeviceError, slot
from nitinol.runtime.kernel import jit
from nitinol.runtime.metal import MetalDevice

PAGE = mmap.PAGESIZE


@pytest.fixture(autouse=True)
def plain_mode():
    yield
    softmetal.set_validation(False)
    softmetal.set_seed(0)
    softmetal.configure()


@pytest.fixture
def device():
    opened = MetalDevice()
    yield opened
    opened.close()


@pytest.fixture(params=["indirect", "direct", "no residency set"])
def any_device(request, monkeypatch):
    """M3 and newer; M1 and M2; and before macOS 15."""
    if request.param == "direct":
        softmetal.configure(family=8)
    if request.param == "no residency set":
        monkeypatch.delattr("softmetal.device.Device.newResidencySetWithDescriptor_error_")
    opened = MetalDevice()
    assert opened._indirect == (request.param != "direct")
    assert (opened._heap.residency is None) == (request.param == "no residency set")
    yield opened
    opened.close()


def kernel(name: str, parameters: str, body: str, *, integers=0, threads=32, shared=0) -> Executable:
    """A kernel with pointer parameters ("int *to, int *from"), then int64 parameters n0, n1, ...; `p` is the program,
    `t` the thread."""
    pointers = parameters.split(",")
    fields = "".join(f"long n{i}; " for i in range(integers))
    heads = "".join(f"device {what} [[buffer({i})]], " for i, what in enumerate(pointers))
    source = f"""#include <metal_stdlib>
using namespace metal;
struct {name}_arguments {{ {fields}int grid[3]; }};
[[kernel]] void {name}({heads}constant {name}_arguments &a [[buffer({len(pointers)})]],
    uint3 p [[threadgroup_position_in_grid]], uint t [[thread_index_in_threadgroup]]) {{ {body} }}
"""
    count = len(pointers)
    return Executable(name, source, threads // 32, shared, 0, tuple(range(count)),
                      tuple((count + i, int64) for i in range(integers)))


# to[p] = from[p] + from[n - 1 - p] + add: needs all of what was written before
STEP = kernel("step", "long *to, long *from", "if (t == 0) to[p.x] = from[p.x] + from[a.n0 - 1 - p.x] + a.n1;",
              integers=2)  # fmt: skip
# Until the host says so: the memory is shared.
SPIN = kernel("spin", "atomic_int *flag, int *done",
              "while (atomic_load_explicit(flag, memory_order_relaxed) == 0) { } done[t] = 1;")
WRITE = kernel("write", "int *to", "to[32 * p.x + t] = a.n0 + p.x;", integers=1)


def spinning(device):
    """A list that runs until `flag` is set."""
    flag, done = device.allocate(4), device.allocate(128)
    flag.as_numpy(np.int32)[:] = 0
    commands = device.command_list()
    commands.launch(SPIN, (1,), [flag, done])
    return commands, flag.as_numpy(np.int32)


# ------------------------------------------------------------------------------------------------------------- work


@pytest.mark.parametrize("nbytes", [1, 3, 4, 60, 64, 5000, 4096 * 17 + 8])
def test_copy_and_fill(device, nbytes):
    rng = np.random.default_rng()
    for shift in (0, 1, 4, 16):
        data = rng.integers(0, 255, nbytes + 32, np.uint8)
        source, target, filled = (device.allocate(nbytes + 32) for _ in range(3))
        for buffer in (source, target, filled):
            buffer.write(data)
        commands = device.command_list()
        commands.copy(target.view(16, nbytes), source.view(shift, nbytes))
        commands.fill(filled.view(shift, nbytes), 0xA5)
        device.run(commands)
        expected = data.copy()
        expected[16:16 + nbytes] = data[shift:shift + nbytes]
        np.testing.assert_array_equal(target.read(), expected)
        expected = data.copy()
        expected[shift:shift + nbytes] = 0xA5
        np.testing.assert_array_equal(filled.read(), expected)


def record_steps(device, n, steps, honest=True):
    """A list in which each step needs the one before; the arrays at its start and the expected end. honest: else the
    list is told that the steps touch nothing."""
    rng = np.random.default_rng()
    start = rng.integers(-9, 9, n)
    pair = [device.allocate(8 * n) for _ in range(2)]
    nothing = device.allocate(0)
    touched = {} if honest else {"reads": {1: (0, 0)}, "writes": {0: (0, 0)}}
    commands = device.command_list()
    expected = start.copy()
    for number in range(steps):
        to, source = pair[(number + 1) % 2], pair[number % 2]
        if number % 3 == 2:  # entries that do nothing, between one and the next that waits for it
            commands.launch(STEP, (0,), [to, source, n, number], **touched)
            commands.fill(nothing, 1)
        commands.launch(STEP, (n,), [to, source, n, number], **touched)
        expected = expected + expected[::-1] + number
    return commands, pair[0], pair[steps % 2], start, expected


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_dependent_entries_run_in_order(any_device, seed):
    softmetal.set_seed(seed)
    softmetal.set_validation(True)
    commands, first, last, start, expected = record_steps(any_device, 33, 7)
    for _ in range(3):  # directly, then indirectly where that is possible
        first.write(start)
        any_device.run(commands)
        np.testing.assert_array_equal(last.read(np.int64), expected)
    assert (commands.encoded.indirect is not None) == any_device._indirect


def test_a_dependency_that_is_not_told_is_a_race(device):
    softmetal.set_validation(True)
    commands, first, _, start, _ = record_steps(device, 33, 3, honest=False)
    first.write(start)
    for _ in range(2):
        with pytest.raises(DeviceError, match=r"kernel step.*data race"):
            device.run(commands)


def test_a_list_too_long_for_an_indirect_command_buffer_is_encoded_directly(device, monkeypatch):
    monkeypatch.setattr(metal, "MOST_INDIRECT", 4)
    commands, first, last, start, expected = record_steps(device, 8, 5)
    for _ in range(3):
        first.write(start)
        device.run(commands)
        np.testing.assert_array_equal(last.read(np.int64), expected)
    assert commands.encoded.indirect is None


def test_a_submission_is_one_command_buffer_and_one_wait_and_allocates_nothing(any_device):
    device = any_device
    commands, first, _, start, _ = record_steps(device, 64, 30)
    for _ in range(2):
        device.run(commands)
    first.write(start)
    gc.collect()
    softmetal.reset_counters()
    before = vars(device.counters).copy()
    encoded = commands.encoded
    for _ in range(5):
        device.run(commands)
    after, theirs = vars(device.counters), softmetal.counters()
    changed = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert changed == {"submits": 5, "waits": 5, "dispatches": 150}
    assert (theirs["submits"], theirs["waits"], theirs["allocations"], theirs["dispatches"]) == (5, 5, 0, 150)
    assert commands.encoded is encoded


def test_submissions_run_in_order_without_waits_between(device):
    total, commands = device.allocate(8 * 16), device.command_list()
    add = kernel("add", "long *x", "if (t == 0) x[p.x] = 3 * x[p.x] + a.n0;", integers=1)
    other = device.command_list()
    commands.launch(add, (16,), [total, 1])
    other.launch(add, (16,), [total, 2])
    total.write(np.zeros(16, np.int64))
    events = [device.submit(item) for _ in range(9) for item in (commands, other)]
    events[-1].wait()
    assert all(event.done for event in events)
    expected = 0
    for _ in range(9):
        expected = 3 * (3 * expected + 1) + 2
    assert set(total.read(np.int64)) == {expected}


def test_a_recorded_list_can_go_on(device):
    x, commands = device.allocate(128), device.command_list()
    commands.launch(WRITE, (1,), [x, 1])
    for _ in range(3):
        device.run(commands)
    commands.launch(WRITE, (1,), [x, 7])
    device.run(commands)
    assert set(x.read(np.int32)) == {7}


def test_an_empty_list_is_done_at_once(device):
    event = device.submit(device.command_list())
    assert event.done
    event.wait()
    commands = device.command_list()
    commands.launch(WRITE, (3, 0, 2), [device.allocate(4), 5])
    device.run(commands)
    assert device.counters.submits == 0


@jit
def arguments(out, x, i, j, f, N: tl.constexpr):
    at = tl.arange(0, N)
    program = tl.program_id(0) + 10 * tl.program_id(1) + 100 * tl.num_programs(2)
    tl.store(out + at, tl.load(x + at).to(tl.float32) * f + (i + j + program).to(tl.float32))


def compiled(function, **given):
    bound = function.bind((), given)
    signature, _ = specialise(function, bound)
    return compile_function(tile_ir(function, signature))


def test_arguments_as_numbers_and_as_slots(device):
    host = np.random.default_rng().integers(-50, 50, 16, np.int8)
    made = compiled(arguments, out=np.zeros(16, np.float32), x=host, i=-3, j=1 << 40, f=0.5, N=16)
    x, out = device.allocate(16 + 64).view(3, 16), device.allocate(64)
    x.write(host)
    for i, j, f in ((-3, 1 << 40, 0.5), (slot(-3, "i"), slot(1 << 40, "i"), slot(0.5, "f"))):
        out.write(np.full(16, np.nan, np.float32))
        commands = device.command_list()
        commands.launch(made, (1, 1, 1), [out, x, i, j, f] if not isinstance(f, float) else
                        [out, x, i, j, slot(f, "f")])
        device.run(commands)
        np.testing.assert_array_equal(out.read(np.float32), host * np.float32(0.5) + np.float32(-3 + (1 << 40) + 100))


def test_events(device):
    commands, flag = spinning(device)
    event = device.submit(commands)
    assert not event.done
    with pytest.raises(TimeoutError, match=r"not done after 0\.01 s"):
        event.wait(timeout=0.01)
    flag[:] = 1
    event.wait()
    assert event.done
    flag[:] = 0
    event = device.submit(commands)
    ticks = []

    async def main():
        async def tick():
            for _ in range(3):
                ticks.append(event.done)
                await asyncio.sleep(0)
            flag[:] = 1

        await asyncio.gather(tick(), wait())

    async def wait():
        await event

    asyncio.run(main())
    assert ticks == [False] * 3 and event.done


def test_ctrl_c_while_waiting(device):
    commands, flag = spinning(device)
    event = device.submit(commands)
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    release = threading.Timer(20, flag.fill, (1,))
    release.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        event.wait()
    assert time.monotonic() - start < 10  # not when the kernel ended
    flag[:] = 1
    release.cancel()
    event.wait()
    device.run(commands)


def test_python_threads_share_a_device(device):
    wrong = []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(10):
            n = int(rng.integers(1, 2000))
            x, y, value = device.allocate(128 * n), device.allocate(128 * n), int(rng.integers(1000))
            commands = device.command_list()
            commands.launch(WRITE, (n,), [x, value])
            commands.copy(y, x)
            for _ in range(3):
                device.run(commands)
            if not (y.read(np.int32) == np.repeat(np.arange(n), 32) + value).all():
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and device.counters.submits == 120


def test_a_list_dropped_in_flight_lives_until_it_has_run(device):
    commands, flag = spinning(device)
    x = device.allocate(128)
    more = device.command_list()
    more.launch(WRITE, (1,), [x, 11])
    device.submit(commands)
    device.submit(more)
    del commands, more
    gc.collect()
    flag[:] = 1
    device.synchronize()
    assert set(x.read(np.int32)) == {11}


def test_timestamps(device):
    x, commands = device.allocate(128), device.command_list()
    commands.launch(WRITE, (1,), [x, 1], label="first")
    commands.launch(WRITE, (0,), [x, 1], label="nothing")
    commands.launch(WRITE, (1,), [x, 2], label="last")
    with pytest.raises(DeviceError, match="profile=True"):
        commands.timestamps()
    commands.profile = True
    for _ in range(2):
        device.run(commands)
        first, nothing, last = commands.timestamps()
        assert [t.label for t in (first, nothing, last)] == ["first", "nothing", "last"]
        assert first.start <= first.end == nothing.start == nothing.end <= last.start <= last.end
        assert last.end > first.start
    assert set(x.read(np.int32)) == {2}


# ----------------------------------------------------------------------------------------------------------- memory


def test_memory_freed_under_work_in_flight_is_not_used_until_it_is_done(device):
    commands, flag = spinning(device)
    held = device.allocate(5000)
    address = held.address
    event = device.submit(commands)
    held.free()
    other = device.allocate(5000)
    assert other.address != address
    flag[:] = 1
    event.wait()
    hits = device.counters.pool_hits
    assert device.allocate(4990).address == address and device.counters.pool_hits == hits + 1


def test_memory_has_exactly_the_length_asked_for(device):
    """So that validation sees an access behind it."""
    softmetal.set_validation(True)
    x, commands = device.allocate(125), device.command_list()
    commands.launch(WRITE, (1,), [x, 1])
    for number in range(2):
        event = device.submit(commands)
        with pytest.raises(DeviceError, match=r"error of kernel write .*out of bounds: kernel 'write'.* 125 bytes"):
            event.wait()
        with pytest.raises(DeviceError, match="out of bounds"):  # who waits again hears it again
            event.wait()
        assert device._done == number + 1
    device.synchronize()  # but it is no news any more


def test_memory_of_a_cycle_of_garbage_is_resident_when_it_is_used_again(device):
    softmetal.set_validation(True)
    cycle = [device.allocate(128)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    x, commands, hits = device.allocate(128), device.command_list(), device.counters.pool_hits
    assert hits > 0
    commands.launch(WRITE, (1,), [x, 7])
    for _ in range(2):  # the second time by an indirect command buffer, which needs it in the residency set
        device.run(commands)
    np.testing.assert_array_equal(x.read(np.int32), 7 + np.arange(32) * 0)


def test_an_error_that_nobody_waited_for_is_raised_at_the_next_occasion(device):
    softmetal.set_validation(True)
    x, commands = device.allocate(12), device.command_list()
    commands.launch(WRITE, (1,), [x, 1], label="mine")
    commands.launch(STEP, (1,), [device.allocate(8), device.allocate(8), 1, 1])
    device.submit(commands)
    with pytest.raises(DeviceError, match=r"one of the kernels mine, step .run with profile=True"):
        device.synchronize()
    device.synchronize()
    commands.profile = True
    with pytest.raises(DeviceError, match="error of kernel mine "):
        device.run(commands)


def test_a_kernel_that_does_not_end(device):
    softmetal.configure(timeout_seconds=0.2)
    commands, _ = spinning(device)
    with pytest.raises(DeviceError, match=r"kernel spin .it took too long: time-out"):
        device.run(commands)


def test_the_pool_gives_back_what_is_too_short_and_everything_before_it_refuses():
    gc.collect()
    others = metal.framework().MTLCreateSystemDefaultDevice().currentAllocatedSize()  # devices of other tests
    softmetal.configure(working_set_bytes=others + 1_000_000, buffer_bytes=600_000)
    device = MetalDevice()
    assert device.largest_buffer == 600_000
    available = device.available_memory()
    assert 990_000 < available <= 1_000_000
    first = device.allocate(500_000)
    first.free()
    assert device.available_memory() == available
    second = device.allocate(510_000)  # of the same class, but longer: the first went
    assert device.counters.bytes_reserved == 510_000
    with pytest.raises(DeviceError, match=r"0\.5 MB are needed, but of the .* 0\.5 MB are left"):
        device.allocate(500_000)
    second.free()
    device.allocate(300_000)  # the second went back to the system
    assert device.counters.bytes_reserved == 510_000 + 300_000
    device.allocate(550_000)
    assert device.counters.bytes_reserved == 550_000
    with pytest.raises(DeviceError, match=r"a buffer of 0\.6 MB is longer than softmetal allows"):
        device.allocate(600_001)
    with pytest.raises(DeviceError, match="a buffer of -1 bytes"):
        device.allocate(-1)


@pytest.fixture
def file(tmp_path):
    data = np.random.default_rng().integers(0, 255, 5 * PAGE + 123, np.uint8)
    path = tmp_path / "data"
    path.write_bytes(data.tobytes())
    return path, data


def fetch(device, buffer):
    """What the GPU sees of a buffer."""
    copy, commands = device.allocate(buffer.nbytes), device.command_list()
    commands.copy(copy, buffer)
    for _ in range(2):
        device.run(commands)
    return copy.read()


def test_mapped_memory_is_used_in_place(device, file):
    path, data = file
    softmetal.set_validation(True)
    with open(path, "rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    shifted = np.memmap(path, np.uint8, "r", offset=PAGE + 5)
    for memory, expected in ((mapped, data), (memoryview(mapped)[3:], data[3:]), (shifted, data[PAGE + 5:]),
                             (np.frombuffer(mapped, np.uint8)[77:20000], data[77:20000])):
        buffer = device.wrap(memory)
        assert buffer.address == np.frombuffer(memory, np.uint8).ctypes.data and buffer.read_only
        np.testing.assert_array_equal(fetch(device, buffer), expected)
        part = buffer.view(4097, 1000)
        np.testing.assert_array_equal(fetch(device, part), expected[4097:5097])
    anonymous = mmap.mmap(-1, PAGE)
    buffer, commands = device.wrap(anonymous), device.command_list()
    assert not buffer.read_only
    commands.fill(buffer, 9)
    device.run(commands)
    assert set(anonymous[:]) == {9}


def test_wrapped_memory_is_let_go(device):
    before = device.available_memory()
    mapped = mmap.mmap(-1, 64 * PAGE)
    buffer = device.wrap(mapped)
    commands = device.command_list()
    commands.fill(buffer, 1)
    for _ in range(2):
        device.run(commands)
    assert device.available_memory() <= before - 64 * PAGE
    buffer.free()
    commands.entries.clear()
    gc.collect()
    assert device.available_memory() > before - PAGE
    mapped.close()  # raises BufferError while somebody looks at it


def test_other_memory_is_copied(device):
    data = np.random.default_rng().standard_normal((33, 7)).astype(np.float32)
    buffer = device.wrap(data)
    np.testing.assert_array_equal(fetch(device, buffer).view(np.float32).reshape(33, 7), data)
    assert device.wrap(b"abc").read_only and device.wrap(b"abc").read().tobytes() == b"abc"
    assert device.wrap(np.empty(0)).nbytes == 0
    with pytest.raises(DeviceError, match="make it C-contiguous"):
        device.wrap(data[:, ::2])


def test_a_file_longer_than_a_buffer_can_be_has_several():
    softmetal.configure(buffer_bytes=4 * PAGE)
    device = MetalDevice()
    mapped = mmap.mmap(-1, 11 * PAGE)
    data = np.random.default_rng().integers(0, 255, 11 * PAGE, np.uint8)
    mapped[:] = data.tobytes()
    whole = device.wrap(mapped)
    for start, length in ((0, 4), (3, 2), (6, 3), (10, 0), (10, 1), (0, 1)):
        start, length = start * PAGE + start % 5, length * PAGE - start % 5 if length else 9
        np.testing.assert_array_equal(fetch(device, whole.view(start, length)), data[start:start + length])
    commands = device.command_list()
    commands.copy(device.allocate(4 * PAGE), whole.view(PAGE + 1, 4 * PAGE))
    with pytest.raises(DeviceError, match="use smaller tensors"):
        device.run(commands)


# -------------------------------------------------------------------------------------------------- what can go wrong


def test_launches_that_do_not_fit(device):
    x = device.allocate(128)

    def refused(match, executable, arguments):
        commands = device.command_list()
        commands.launch(executable, (1,), arguments)
        with pytest.raises(DeviceError, match=match):
            device.run(commands)

    refused("'write' was given 1 arguments; it takes 2", WRITE, [x])
    refused("argument 0 of kernel 'write' is 5; it takes a Buffer", WRITE, [5, 5])
    refused("argument 1 of kernel 'write' is Buffer.*; it takes a number", WRITE, [x, x])
    many = kernel("many", ", ".join(f"int *x{i}" for i in range(31)), "x0[t] = x30[t];")
    refused("'many' needs 32 buffers, and this GPU has 31", many, [x] * 31)
    wide = kernel("wide", "int *x", "", threads=2048)
    refused("needs 2048 threads in a threadgroup, and this GPU has 1024", wide, [x])
    shared = kernel("shared", "int *x", "", shared=40000)
    refused("needs 40000 bytes of threadgroup memory, and this GPU has 32768; use smaller tiles", shared, [x])
    capped = kernel("capped", "int *x", "x[t] = 1;", threads=64)
    capped.source = capped.source.replace("[[kernel]]", "[[kernel, max_total_threads_per_threadgroup(32)]]")
    refused("'capped' needs 64 threads in a threadgroup, and with its registers this GPU runs 32", capped, [x])
    refused("kernel 'broken' does not compile on softmetal.*undeclared", kernel("broken", "int *x", "x[t] = y;"), [x])
    half = kernel("narrow", "bfloat *x", "x[t] = y;")
    refused(r"'narrow' does not compile on .*\(bfloat needs macOS 14; on an older system use float16\)", half, [x])
    other = kernel("native", "int *x", "")
    other.language = "cuda"
    refused("'native' was compiled for another target", other, [x])
    device.synchronize()


def test_use_after_free_and_other_devices(device):
    x, y, commands = device.allocate(128), device.allocate(128), device.command_list()
    commands.launch(WRITE, (1,), [x, 1])
    for _ in range(2):
        device.run(commands)
    x.free()
    with pytest.raises(DeviceError, match="in this command list was freed"):
        device.run(commands)
    with pytest.raises(DeviceError, match="used after it was freed"):
        device.command_list().launch(WRITE, (1,), [x, 1])
    other = MetalDevice()
    with pytest.raises(DeviceError, match="copy it to that device first"):
        other.command_list().launch(WRITE, (1,), [y, 1])
    commands = device.command_list()
    with pytest.raises(DeviceError, match="record it on this one"):
        other.run(commands)


@jit
def checked(x, n, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.device_assert(at < n, "too far")
    tl.device_print("at", at)


def test_assertions_and_prints(device, capsys):
    made = compiled(checked, x=np.zeros(4, np.int32), n=6, N=4)
    x, commands = device.allocate(16), device.command_list()
    commands.launch(made, (1,), [x, 6])
    for _ in range(3):
        device.run(commands)
        assert sorted(capsys.readouterr().out.split("\n")) == sorted(
            ["", *(f"pid (0, 0, 0) idx ({i})at: {i}" for i in range(4))])
    commands.launch(made, (2,), [x, 6])
    for _ in range(2):
        with pytest.raises(DeviceError, match=r"kernel checked, .*too far; the results are not valid"):
            device.run(commands)
        assert len(capsys.readouterr().out.splitlines()) == 12
    device.synchronize()


def test_a_failed_assertion_is_told_by_the_wait_for_its_submission(device):
    made = compiled(checked, x=np.zeros(4, np.int32), n=6, N=4)
    x, failing, fine = device.allocate(16), device.command_list(), device.command_list()
    failing.launch(made, (2,), [x, 6])
    fine.launch(made, (1,), [x, 6])  # the same kernel
    events = [device.submit(commands) for commands in (failing, fine, failing, fine)]
    for number in (3, 1, 2, 0, 2):
        if number % 2:
            events[number].wait()
        else:
            with pytest.raises(DeviceError, match="too far"):
                events[number].wait()
    device.submit(failing)
    other = threading.Thread(target=device.synchronize)  # pytest reports an exception there
    other.start()
    other.join()
    with pytest.raises(DeviceError, match="too far"):
        device.synchronize()


def test_another_list_of_arguments(device):
    x, y, commands = device.allocate(128), device.allocate(128), device.command_list()
    commands.launch(WRITE, (1,), [x, 3])
    device.run(commands)
    commands.rebind({(0, 0): y, (0, 1): 5})
    x.write(np.zeros(32, np.int32))
    for _ in range(3):
        device.run(commands)
        assert set(x.read(np.int32)) == {0} and set(y.read(np.int32)) == {5}
        y.write(np.zeros(32, np.int32))


def test_close_waits_for_work_in_flight():
    device = MetalDevice()
    commands, flag = spinning(device)
    event = device.submit(commands)
    threading.Timer(0.1, flag.fill, (1,)).start()
    device.close()
    assert flag[0] == 1 and event.done
    event.wait()
    device.close()
    for attempt in (lambda: device.allocate(4), lambda: device.run(commands), lambda: device.wrap(b"abc")):
        with pytest.raises(DeviceError, match="is closed; open another"):
            attempt()


def script(text: str, **environment: str) -> subprocess.Popen[str]:
    head = "import numpy as np\nfrom nitinol.runtime.metal import MetalDevice\nfrom nitinol.runtime.device import *\n"
    return subprocess.Popen([sys.executable, "-c", head + textwrap.dedent(text)], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, **environment}, cwd=Path(__file__).parents[2])


def test_exit_with_work_in_flight_and_a_forked_child():
    process = script("""
        import os
        device = MetalDevice()
        x, commands = device.allocate(1 << 24), device.command_list()
        for value in range(20):
            commands.fill(x, value)
        device.run(commands)
        event = device.submit(commands)
        if not (child := os.fork()):
            for attempt in (event.wait, device.synchronize, lambda: device.allocate(4), lambda: device.run(commands),
                            lambda: device.available_memory()):
                try:
                    attempt()
                    print("no error")
                except DeviceError as error:
                    print("forked" in str(error))
            x.free()
            raise SystemExit(5)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
        event.wait()
        print(set(x.read()) == {19})
        device.submit(commands)
    """)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert out.split() == ["True"] * 6 and not errors


def test_two_processes_at_once(tmp_path):
    text = """
        device = MetalDevice()
        x, y, commands = device.allocate(1 << 16), device.allocate(1 << 16), device.command_list()
        commands.fill(x, 7)
        commands.copy(y, x)
        for _ in range(20):
            device.run(commands)
        print(set(y.read()) == {7})
    """
    processes = [script(text, SOFTMETAL_CACHE=str(tmp_path)) for _ in range(2)]  # a cold cache, which they share
    for process in processes:
        out, errors = process.communicate(timeout=120)
        assert out == "True\n", errors


def test_without_a_device(monkeypatch):
    module = sys.modules["Metal"]
    monkeypatch.setattr(module, "MTLCreateSystemDefaultDevice", lambda: None)
    with pytest.raises(DeviceError, match="finds no GPU"):
        MetalDevice()
    monkeypatch.undo()
    softmetal.configure(family=6)
    with pytest.raises(DeviceError, match="family 7"):
        MetalDevice()
    monkeypatch.setitem(sys.modules, "Metal", None)

    def missing():
        raise softmetal.CompilerMissing("no ziglang")

    monkeypatch.setattr(softmetal, "install", missing)
    with pytest.raises(DeviceError, match=re.escape("pip install 'nitinol[softmetal]'")):
        MetalDevice()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(DeviceError, match="pip install pyobjc-framework-Metal"):
        MetalDevice()

"""The CUDA driver: over a stand-in for cuda-bindings everywhere, and on a GPU where there is one."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import os
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import fake_cuda
import numpy as np
import pytest
from fake_cuda import open_fake, use_fake
from model_files import random_file

from nitinol import runtime
from nitinol.cli import main, sentence
from nitinol.commands.output import Progress
from nitinol.compiler.gpu import Executable
from nitinol.compiler.gpu.effects import Print
from nitinol.formats import gguf
from nitinol.formats.gguf import open_gguf
from nitinol.formats.gguf_writer import TensorSource, write_gguf
from nitinol.generate.model import load
from nitinol.generate.options import Options
from nitinol.language.types import float32, int32
from nitinol.runtime import cuda_driver, cuda_transfer
from nitinol.runtime.cuda import CudaDevice
from nitinol.runtime.device import DeviceError, slot

ADD = r"""struct add_arguments { float scale; int n; int grid[3]; };
extern "C" __global__ void add(float *x, float *out, const add_arguments arguments) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < arguments.n) out[i] += arguments.scale * x[i];
}
"""
CHECK = r"""struct check_arguments { int n; int grid[3]; };
extern "C" __global__ void check(const check_arguments arguments, unsigned *status) {
    if (arguments.n > 3) *status = 77;
}
"""
SAY = r"""struct say_arguments { int grid[3]; };
extern "C" __global__ void say(const say_arguments arguments, unsigned *log) {
    if (threadIdx.x) return;
    unsigned record = atomicAdd(log, 1);
    unsigned *words = log + 1 + 7 * record;
    words[0] = 0; words[1] = blockIdx.x; words[2] = words[3] = words[4] = 0;
    words[5] = 41 + blockIdx.x; words[6] = 0;
}
"""
WILD = r"""struct wild_arguments { int grid[3]; };
extern "C" __global__ void wild(float *x, const wild_arguments arguments) { x[1ll << 42] = 1; }
"""


def executable(name: str, source: str, pointers: tuple[int, ...] = (), scalars: Any = (), **more: Any) -> Executable:
    return Executable(name, source, 1, more.pop("shared", 0), 0, pointers, scalars, language="cuda", **more)


def adding() -> Executable:
    return executable("add", ADD, (0, 1), ((2, float32), (3, int32)))


# ------------------------------------------------------------------------------------------------- what may be missing


@pytest.mark.parametrize(
    ("driver", "nvrtc", "message"),
    [
        (fake_cuda.Missing(), None, "no NVIDIA driver is installed"),
        (fake_cuda.Driver(version=11040), None, "is of CUDA 11.4, but at least 12.0"),
        (fake_cuda.Driver(gpus=0), None, "finds no GPU"),
        (fake_cuda.Driver(capability=(7, 5)), None, "capability 7.5, but at least 8.0"),
        (None, fake_cuda.Missing(), "NVRTC is not installed; pip install 'nitinol[cuda]'"),
        (fake_cuda.Driver(version=12040), fake_cuda.Nvrtc((13, 2)), "pip install nvidia-cuda-nvrtc-cu12"),
        (fake_cuda.Driver(capability=(12, 0)), None, "NVRTC 13.0 does not know NVIDIA Imaginary"),
    ],
)
def test_what_is_missing_is_said(monkeypatch: Any, capsys: Any, driver: Any, nvrtc: Any, message: str) -> None:
    """By the driver, and in one line by the command line."""
    with pytest.raises(DeviceError) as caught:
        open_fake(monkeypatch, driver, nvrtc)
    assert message in str(caught.value)
    use_fake(monkeypatch, driver, nvrtc)
    for command in (["run", "demo", "x"], ["trace", "demo", "x"], ["bench", "demo"]):
        assert main([*command, "--device", "cuda"]) == 2
        assert capsys.readouterr() == ("", f"nitinol: {caught.value}\n")
    assert main(["devices", "--json"]) == 0
    facts = {device["name"]: device for device in json.loads(capsys.readouterr().out)}
    assert facts["cuda"]["missing"] == str(caught.value) and facts["cpu"]["default"]


def test_a_driver_without_a_function(monkeypatch: Any) -> None:
    """A driver of CUDA 12.0 under cuda-bindings for a later one."""
    device, driver = open_fake(monkeypatch)

    def cuEventElapsedTime(*_: Any) -> Any:
        raise RuntimeError('Function "cuEventElapsedTime_v2" not found')

    driver.cuEventElapsedTime = cuEventElapsedTime
    commands = device.command_list()
    commands.fill(device.allocate(64), 1)
    commands.profile = True
    device.run(commands)
    with pytest.raises(DeviceError, match="no function cuEventElapsedTime; install a newer driver"):
        commands.timestamps()


def test_no_package(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(DeviceError, match=r"pip install 'nitinol\[cuda\]'"):
        CudaDevice()


def test_no_such_gpu(monkeypatch: Any) -> None:
    open_fake(monkeypatch)
    with pytest.raises(DeviceError, match="no GPU number 3, there are 1"):
        CudaDevice(3)


def test_architecture(monkeypatch: Any) -> None:
    assert open_fake(monkeypatch)[0].architecture == "sm_90a"
    assert open_fake(monkeypatch, fake_cuda.Driver(capability=(8, 0)))[0].architecture == "sm_80"


# ----------------------------------------------------------------------------------------------------------- memory


def test_transfers_of_all_sizes(monkeypatch: Any) -> None:
    device, _ = open_fake(monkeypatch)
    seen: list[tuple[int, int]] = []
    for size in (0, 1, 4095, (4 << 20) - 1, (4 << 20) + 1, (61 << 20) + 777, 150 << 20):
        data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
        buffer = device.wrap(data, lambda done, total: seen.append((done, total)))
        np.testing.assert_array_equal(buffer.read(), data)
    assert seen[-1] == (150 << 20, 150 << 20)
    assert all(0 <= done <= total for done, total in seen)
    with pytest.raises(DeviceError, match="cannot see memory"):
        buffer.as_numpy()


def test_a_large_upload_goes_through_pinned_memory_in_pieces_and_waits_once(monkeypatch: Any) -> None:
    device, driver = open_fake(monkeypatch)
    data = np.random.default_rng().integers(0, 256, 10 << 20, np.uint8)
    before, pinned = driver.calls.copy(), len(driver.pinned)
    assert np.array_equal(device.wrap(data).read(), data)
    device.wrap(np.zeros(150 << 20, np.uint8))
    calls = driver.calls - before
    assert calls["cuMemcpyHtoDAsync"] == 3 + 38 and calls["cuMemcpyDtoHAsync"] == 3
    assert calls["cuStreamSynchronize"] == 3 and calls["cuMemAlloc"] == 2  # the first from the pool
    stages = list(driver.pinned.values())[pinned:]
    assert 1 <= len(stages) <= 20 and {stage.nbytes for stage in stages} == {4 << 20}
    device.wrap(np.zeros(150 << 20, np.uint8))
    assert len(driver.pinned) <= pinned + 20


def test_a_buffer_is_filled_again_only_after_its_copy(monkeypatch: Any) -> None:
    """One thread, one buffer, and a GPU that copies only when somebody waits for it: who does not wait sends the last
    piece again and again."""
    monkeypatch.setattr(cuda_transfer, "STAGES", 1)
    device, driver = open_fake(monkeypatch)
    pinned = len(driver.pinned)
    data = np.random.default_rng().integers(0, 256, (21 << 20) + 5, np.uint8)
    assert np.array_equal(device.wrap(data).read(), data)
    assert len(driver.pinned) == pinned + 1


def test_memory_that_cannot_be_pinned(monkeypatch: Any) -> None:
    device, driver = open_fake(monkeypatch)
    driver.pinnable = 1 << 20
    with pytest.raises(DeviceError, match=r"4\.2 MB of the host's memory cannot be pinned"):
        device.wrap(np.zeros(20 << 20, np.uint8))
    driver.pinnable = 1 << 30
    assert device.wrap(np.ones(20 << 20, np.uint8)).read().all()


def test_memory_of_the_hosts_own_that_cannot_be_pinned(monkeypatch: Any) -> None:
    """Then the driver's is used."""
    device, driver = open_fake(monkeypatch)
    monkeypatch.setattr(driver, "cuMemHostRegister", lambda *_: (fake_cuda.CUresult.CUDA_ERROR_NOT_SUPPORTED,))
    data = np.random.default_rng().integers(0, 256, 20 << 20, np.uint8)
    before = driver.calls["cuMemHostAlloc"]
    assert np.array_equal(device.wrap(data).read(), data)
    assert 1 <= driver.calls["cuMemHostAlloc"] - before <= 5  # the five pieces may be gone before all have a buffer


def file_of(path: Path, size: int) -> np.ndarray:
    """Random bytes in a file of that name."""
    data = np.random.default_rng().integers(0, 256, size, np.uint8)
    path.write_bytes(data)
    return data


@pytest.fixture
def reads(monkeypatch: Any) -> list[int]:
    """The offsets of reads; every second one is cut short, as a system call may be."""
    offsets: list[int] = []
    real = os.preadv

    def preadv(descriptor: int, buffers: Any, offset: int) -> int:
        offsets.append(offset)
        (buffer,) = buffers
        return real(descriptor, [buffer[:1000] if len(offsets) % 2 and len(buffer) > 1000 else buffer], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    return offsets


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="this system has no preadv")
def test_a_mapped_file_is_read_not_copied(monkeypatch: Any, tmp_path: Path, reads: list[int]) -> None:
    """The view begins in the middle of the file. Memory without a file is copied, and so are small files."""
    device, _ = open_fake(monkeypatch)
    data = file_of(tmp_path / "file", (23 << 20) + 77)
    whole = np.frombuffer(gguf._map(tmp_path / "file"), np.uint8)
    for view, expected in ((whole, data), (whole[12345:-9].reshape(-1, 1), data[12345:-9])):
        pieces = -(-expected.nbytes // (4 << 20))
        reads.clear()
        assert np.array_equal(device.wrap(view).read(), expected)
        assert len(reads) > pieces and min(reads) == 12345 * (expected is not data)
    reads.clear()
    for memory in (whole[: 1 << 20], data, np.memmap(tmp_path / "file", mode="c")):
        assert np.array_equal(device.wrap(memory).read(), np.asarray(memory))
    assert not reads


def test_a_split_model_is_read_from_each_of_its_files(monkeypatch: Any, tmp_path: Path, reads: list[int]) -> None:
    monkeypatch.setattr(cuda_transfer, "PIECE", 1000)
    device, _ = open_fake(monkeypatch)
    for number in range(2):
        values = np.random.default_rng().standard_normal(7001).astype(np.float32)
        metadata = {"split.no": np.uint16(number), "split.count": np.uint16(2), "split.tensors.count": np.int32(2)}
        write_gguf(tmp_path / f"m-{number + 1:05}-of-00002.gguf", metadata,
                   [TensorSource(f"t{number}", values.shape, "F32", values)])  # fmt: skip
    file = open_gguf(tmp_path / "m-00001-of-00002.gguf")
    for number, part in enumerate(file.parts):
        path = tmp_path / f"m-{number + 1:05}-of-00002.gguf"
        assert device.wrap(part).read().tobytes() == path.read_bytes()
    assert len(reads) > 56 or not hasattr(os, "preadv")


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="this system has no preadv")
def test_a_file_that_was_cut_short_or_cannot_be_read(monkeypatch: Any, tmp_path: Path) -> None:
    """Through the mapping, both would end the process. The device and its staging buffers stay usable."""
    device, driver = open_fake(monkeypatch)
    path = tmp_path / "file"
    data = file_of(path, 150 << 20)
    whole = np.frombuffer(gguf._map(path), np.uint8)
    os.truncate(path, 149 << 20)
    before = driver.used
    for _ in range(2):
        with pytest.raises(OSError, match=rf"{path} has {149 << 20} bytes now, but had {150 << 20} when it was opened"):
            device.wrap(whole)
    path.write_bytes(data)
    with monkeypatch.context() as patch:
        def fail(descriptor: int, buffers: Any, offset: int) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        patch.setattr(os, "preadv", fail)
        with pytest.raises(OSError) as raised:
            device.wrap(whole)
    assert sentence(raised.value) == f"cannot use {str(path)!r}: {os.strerror(errno.EIO)}"
    del raised
    gc.collect()
    assert driver.used == before
    assert np.array_equal(device.wrap(whole).read(), data)


def test_threads_begin_with_the_first_pinned_buffer(monkeypatch: Any) -> None:
    """Pinning goes on only when the buffers that are there have been used: so it would never end if threads waited
    until all are there. Then it ends, because nothing is left to be copied."""
    device, driver = open_fake(monkeypatch)
    pin, copied = driver.cuMemHostRegister, threading.Event()
    allocated: list[int] = []

    def slow(address: int, nbytes: int, flags: int) -> Any:
        allocated.append(nbytes)
        assert len(allocated) < 3 or copied.wait(60)
        return pin(address, nbytes, flags)

    copy = driver.cuMemcpyHtoDAsync
    copies: list[int] = []

    def copying(*arguments: Any) -> Any:
        copies.append(arguments[0])
        if len(copies) == 30:
            copied.set()
        return copy(*arguments)

    monkeypatch.setattr(driver, "cuMemHostRegister", slow)
    monkeypatch.setattr(driver, "cuMemcpyHtoDAsync", copying)
    data = np.random.default_rng().integers(0, 256, 120 << 20, np.uint8)
    buffer = device.wrap(data)
    assert len(allocated) == 3 and len(set(copies)) == 30
    assert np.array_equal(buffer.read(), data)


def test_an_upload_that_is_stopped_leaves_the_device_usable(monkeypatch: Any) -> None:
    device, driver = open_fake(monkeypatch)
    real = driver.cuMemcpyHtoDAsync
    monkeypatch.setattr(driver, "cuMemcpyHtoDAsync", lambda *arguments: time.sleep(0.05) or real(*arguments))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        device.wrap(np.zeros(500 << 20, np.uint8), stop)
    assert driver.calls["cuMemcpyHtoDAsync"] < 125
    data = np.random.default_rng().integers(0, 256, 30 << 20, np.uint8)
    assert np.array_equal(device.wrap(data).read(), data)


def test_shared_memory_is_read_and_written_without_transfers(monkeypatch: Any) -> None:
    device, driver = open_fake(monkeypatch)
    buffer, other = device.allocate(64, shared=True), device.allocate(64)
    buffer.write(np.arange(64, dtype=np.uint8))
    commands = device.command_list()
    commands.copy(other, buffer)
    commands.fill(buffer.view(8, 4), 9)
    before = driver.calls.copy()
    device.submit(commands)
    assert buffer.read(np.uint8)[:12].tolist() == [*range(8), 9, 9, 9, 9]  # after what was submitted
    buffer.view(4).write(np.array([77], np.uint8))
    assert buffer.read()[3:6].tolist() == [3, 77, 5]
    assert not {name for name in driver.calls - before if "Memcpy" in name and "Graph" not in name}
    assert other.read().tolist() == list(range(64))


def test_shared_memory_outlives_what_uses_it(monkeypatch: Any) -> None:
    device, driver = open_fake(monkeypatch)
    buffer = device.allocate(64, shared=True)
    commands = device.command_list()
    commands.fill(buffer, 1)
    event = device.submit(commands)
    pinned = len(driver.pinned)
    buffer.free()
    assert len(driver.pinned) == pinned
    event.wait()
    assert len(driver.pinned) == pinned - 1


def test_wrapped_memory_that_is_read_only_stays_so(monkeypatch: Any) -> None:
    device, _ = open_fake(monkeypatch)
    buffer = device.wrap(b"abc")
    assert buffer.read().tobytes() == b"abc"
    with pytest.raises(DeviceError, match="cannot be written"):
        buffer.write(np.zeros(3, np.uint8))
    with pytest.raises(DeviceError, match="C-contiguous"):
        device.wrap(np.zeros((4, 4))[:, ::2])


def test_freed_memory_is_used_again_while_work_is_in_flight(monkeypatch: Any) -> None:
    device, driver = open_fake(monkeypatch)
    driver.late = 1 << 60
    first = device.allocate(100_000)
    address = first.address
    commands = device.command_list()
    commands.fill(first, 7)
    event = device.submit(commands)
    first.free()
    assert device.allocate(100_000).address == address  # in stream order
    assert not event.done
    assert device.counters.pool_hits == 1
    with pytest.raises(DeviceError, match="was freed"):
        device.submit(commands)


def test_out_of_memory_says_what_there_is(monkeypatch: Any) -> None:
    device, driver = open_fake(monkeypatch, fake_cuda.Driver(total=200_000_000))
    held = device.allocate(50_000_000)
    device.allocate(100_000_000).free()  # the pool keeps it, and gives it back when somebody needs the room
    kept = device.allocate(120_000_000)
    with pytest.raises(DeviceError, match=r"300 MB are needed on NVIDIA Imaginary, but \d+ MB of its 200 MB are free"):
        device.allocate(300_000_000)
    assert device.available_memory() < 40_000_000
    with pytest.raises(DeviceError, match="MB are needed"):
        device.wrap(np.zeros(80_000_000, np.uint8))
    kept.free()
    assert device.available_memory() > 120_000_000
    wrapped = device.wrap(np.zeros(90_000_000, np.uint8))
    before = driver.used
    wrapped.free()
    assert driver.used <= before - 90_000_000
    held.free()
    assert device.counters.bytes_in_use == 0


def test_memory_of_the_gpu_is_wrapped_in_place(monkeypatch: Any) -> None:
    device, driver = open_fake(monkeypatch)
    driver.cuPointerGetAttribute = lambda which, address: (0, 0)

    class Tensor:
        def __init__(self, **more: Any):
            self.__cuda_array_interface__ = {"data": (4096, False), "shape": (3, 5), "typestr": "<f4", **more}

    buffer = device.wrap(Tensor())
    assert (buffer.address, buffer.nbytes) == (4096, 60)
    with pytest.raises(DeviceError, match="make it contiguous"):
        device.wrap(Tensor(strides=(4, 16)))
    driver.cuPointerGetAttribute = lambda which, address: (0, 1)
    with pytest.raises(DeviceError, match="memory of GPU 1"):
        device.wrap(Tensor())


# ------------------------------------------------------------------------------------------------------------- work


def test_a_kernel_gets_its_parameters(monkeypatch: Any) -> None:
    device, driver = open_fake(monkeypatch)
    seen: list[tuple[bytes, ...]] = []
    driver.kernels["add"] = (8, 8, 20), lambda *values: seen.append(values)
    x, y = device.allocate(64), device.allocate(64)
    commands = device.command_list()
    commands.launch(adding(), (5, 3), (x, y.view(16), slot(2.5, "f"), -7))
    device.run(commands)
    device.run(commands)
    assert driver.calls["cuModuleLoadData"] == 1 and device.counters.submits == 2 and len(seen) == 2
    addresses = [int.from_bytes(word, "little") for word in seen[0][:2]]
    assert addresses == [x.address, y.address + 16]
    assert seen[0][2] == np.float32(2.5).tobytes() + np.array([-7, 5, 3, 1], np.int32).tobytes()


def test_copies_fills_and_empty_entries_run_in_order(monkeypatch: Any) -> None:
    device, driver = open_fake(monkeypatch)
    driver.kernels["add"] = (8, 8, 20), lambda *values: pytest.fail("a grid of no programs was launched")
    a, b = device.allocate(1003), device.allocate(1003)
    commands = device.command_list()
    commands.fill(a, 5)
    commands.fill(a.view(4, 400), 9)
    commands.copy(b, a)
    commands.fill(a.view(0, 0), 1)
    commands.copy(a.view(8, 0), b.view(8, 0))
    commands.launch(adding(), (0,), (a, b, slot(1.0, "f"), 1))
    device.run(commands)
    expected = np.full(1003, 5, np.uint8)
    expected[4:404] = 9
    np.testing.assert_array_equal(b.read(), expected)
    assert [node.kind for node in driver.graphs[-1]] == ["fill", "fill", "copy", "empty", "empty", "empty"]


def test_every_entry_comes_after_those_it_meets_and_after_no_others(monkeypatch: Any) -> None:
    random = np.random.default_rng()
    device, driver = open_fake(monkeypatch)
    for _ in range(20):
        buffers = [device.allocate(64) for _ in range(6)]
        commands = device.command_list()
        for source, target in random.integers(0, 6, (30, 2)):
            if source == target:
                commands.fill(buffers[target], 1)
            else:
                commands.copy(buffers[target], buffers[source])
        device.run(commands)
        nodes = [node for node in driver.graphs[-1] if node.kind in ("fill", "copy")]
        assert len(nodes) == len(driver.graphs[-1]) == 30
        assert [[nodes.index(other) for other in node.before] for node in nodes] == [
            list(entry.after) for entry in commands.entries]


@pytest.mark.parametrize("capability, version", [((9, 0), 13000), ((8, 0), 13000), ((9, 0), 12020)])
def test_kernels_start_before_those_they_wait_for_have_ended(
    monkeypatch: Any, capability: tuple[int, int], version: int
) -> None:
    """Kernels that wait for themselves, on GPUs and drivers that can; beside all others every edge is a plain one."""
    gpu = fake_cuda.Driver(version=version, capability=capability)
    device, driver = open_fake(monkeypatch, gpu, fake_cuda.Nvrtc((12, 0)))
    waiting = executable("late", ADD.replace("{", '{ asm volatile("griddepcontrol.wait;");', 1), (0, 1), ())
    buffer = device.allocate(64)
    commands = device.command_list()
    for made in (waiting, waiting, executable("plain", ADD, (0, 1), ()), waiting):
        commands.launch(made, (1,), [buffer, buffer])
    commands.fill(buffer, 0)
    for part in range(3):  # side by side: each writes a part of its own
        commands.launch(waiting, (1,), [buffer, buffer], writes={1: (16 * part, 16 * part + 16)}, reads={0: (48, 64)})
    commands.launch(waiting, (1,), [buffer, buffer])
    device.run(commands)
    nodes = driver.graphs[-1]
    assert [len(node.before) for node in nodes] == [0, 1, 1, 1, 1, 1, 1, 1, 3]
    can = capability >= (9, 0) and version >= 12030
    assert [len(node.early) for node in nodes] == ([0, 1, 0, 0, 0, 0, 0, 0, 3] if can else [0] * 9)


def test_who_loads_before_it_waits_starts_late_where_that_is_written(monkeypatch: Any) -> None:
    """By any entry before it in the list, whether through the buffer itself or a view; not by those after it."""
    device, driver = open_fake(monkeypatch)
    text = ADD.replace("{", '{ asm volatile("griddepcontrol.wait;");', 1)
    writer = executable("writer", text, (0, 1), (), stores=frozenset((1,)))
    reader = executable("reader", text, (0, 1), (), stores=frozenset((1,)), early=(0,))
    weights, other, x = (device.allocate(1 << 20) for _ in range(3))

    def early(*launches: Any) -> list[bool]:
        commands = device.command_list()
        for made, source, target in launches:
            commands.launch(made, (1,), [source, target])
        device.run(commands)
        return [bool(node.early) for node in driver.graphs[-1]]

    assert early((writer, other, x), (reader, weights, x), (reader, weights, x)) == [False, True, True]
    assert early((writer, other, weights.view(64)), (writer, other, x), (reader, weights, x)) == [False, True, False]
    assert early((writer, other, x), (reader, weights, x), (writer, other, weights)) == [False, True, True]
    assert early((writer, other, x), (reader, x, other), (writer, other, x)) == [False, False, True]
    commands = device.command_list()
    commands.fill(weights, 0)
    commands.launch(writer, (1,), [other, x])
    commands.launch(reader, (1,), [weights, x])
    device.run(commands)
    assert not driver.graphs[-1][-1].early


def test_events_happen_in_order_and_out_of_order_waits_work(monkeypatch: Any) -> None:
    device, driver = open_fake(monkeypatch)
    driver.late = 3
    buffer = device.allocate(64)
    commands = device.command_list()
    commands.fill(buffer, 1)
    events = [device.submit(commands) for _ in range(200)]
    assert not events[-1].done
    events[150].wait()
    assert all(event.done for event in events[:151])
    events[-1].wait()
    device.synchronize()
    assert device.counters.submits == device.counters.dispatches == 200
    events[3].wait()
    with pytest.raises(TimeoutError):
        driver.late = 1 << 60
        device.submit(commands).wait(timeout=0.05)


def test_an_awaited_event_lets_the_loop_go_on(monkeypatch: Any) -> None:
    device, driver = open_fake(monkeypatch)
    driver.late = 1 << 60
    buffer = device.allocate(64)
    commands = device.command_list()
    commands.fill(buffer, 7)

    async def wait() -> None:
        await device.submit(commands)

    async def both() -> None:
        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0.02)
        assert not waiting.done()
        driver.events = [0 for _ in driver.events]  # this runs while the other waits
        await waiting

    asyncio.run(both())
    driver.late = 0
    assert buffer.read().tolist() == [7] * 64


def test_profiled_lists_run_one_entry_after_another(monkeypatch: Any) -> None:
    device, driver = open_fake(monkeypatch)
    buffer = device.allocate(64)
    commands = device.command_list()
    commands.fill(buffer, 1, label="first")
    commands.fill(buffer, 2, label="second")
    commands.profile = True
    device.run(commands)
    assert [node.kind for node in driver.graphs[-1]] == ["event", "fill", "event", "fill", "event"]
    first, second = commands.timestamps()
    assert (first.label, second.label) == ("first", "second")
    assert first.end - first.start == second.end - second.start == 500_000 and first.end == second.start


def test_a_failed_assertion_is_raised_by_the_wait(monkeypatch: Any) -> None:
    device, driver = open_fake(monkeypatch)

    def check(arguments: bytes, status: bytes) -> None:
        fake_cuda.view(int.from_bytes(status, "little"), 4).view(np.uint32)[0] = 77

    driver.kernels["check"] = (16, 8), check
    commands = device.command_list()
    commands.launch(executable("check", CHECK, (), ((0, int32),), asserts={77: "kernel check, line 3: n"}), (1,), (4,))
    event = device.submit(commands)
    with pytest.raises(DeviceError, match="kernel check, line 3: n; the results are not valid"):
        event.wait()
    device.synchronize()  # the report is cleared
    with pytest.raises(DeviceError, match="line 3"):  # but not forgotten
        event.wait()
    fine = device.command_list()
    fine.fill(device.allocate(4), 1)
    driver.late = 3
    events = [device.submit(each) for each in (commands, fine, commands, fine)]
    for number in (3, 1, 2, 0):
        if number % 2:
            events[number].wait()
        else:
            with pytest.raises(DeviceError, match="line 3"):
                events[number].wait()
    device.submit(commands)
    other = threading.Thread(target=device.synchronize)  # pytest reports an exception there
    other.start()
    other.join()
    with pytest.raises(DeviceError, match="line 3"):
        device.synchronize()


@pytest.mark.parametrize("blocking", [False, True])
def test_a_fault_names_the_kernels_and_ends_the_device(monkeypatch: Any, blocking: bool) -> None:
    device, driver = open_fake(monkeypatch)
    if blocking:
        monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")

    def fail(*values: bytes) -> None:
        driver.fault = fake_cuda.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS

    driver.kernels = {"good": ((8, 12), lambda *_: None), "wild": ((8, 12), fail)}
    buffer = device.allocate(64)
    commands = device.command_list()
    commands.launch(executable("good", "good", (0,)), (1,), (buffer,))
    commands.launch(executable("wild", "wild", (0,)), (1,), (buffer,))
    who = "kernel 'wild' accessed" if blocking else "one of the kernels good, wild .*BLOCKING.* accessed"
    with pytest.raises(DeviceError, match=f"{who} an illegal address on NVIDIA Imaginary .*start it again"):
        device.submit(commands).wait()
    for function in (device.synchronize, lambda: device.allocate(10**6), lambda: device.submit(commands)):
        with pytest.raises(DeviceError, match="wild"):
            function()
    buffer.free()
    device.close()


def test_a_fault_is_blamed_on_the_list_that_ran_not_on_the_one_that_hears_of_it(monkeypatch: Any) -> None:
    device, driver = open_fake(monkeypatch)

    def fail(*values: bytes) -> None:
        driver.fault = fake_cuda.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS

    driver.kernels["wild"] = (8, 12), fail
    buffer = device.allocate(64)
    lists = [device.command_list() for _ in range(2)]
    for name, commands in zip(("wild", "good"), lists):
        commands.launch(executable(name, name, (0,)), (1,), (buffer,))
    device.submit(lists[0])
    driver.cuStreamSynchronize("stream")  # it has run, and nobody was told
    with pytest.raises(DeviceError, match=r"^kernel 'wild' accessed an illegal address"):
        device.submit(lists[1])


def test_other_errors_name_the_kernel_and_leave_the_device_usable(monkeypatch: Any) -> None:
    device, driver = open_fake(monkeypatch)
    real = driver.cuGraphAddKernelNode
    driver.cuGraphAddKernelNode = lambda *_: (fake_cuda.CUresult.CUDA_ERROR_INVALID_VALUE, None)
    commands = device.command_list()
    commands.launch(executable("odd", "odd"), (1,))
    with pytest.raises(DeviceError, match=r"INVALID_VALUE to .* of kernel 'odd'"):
        device.run(commands)
    driver.cuGraphAddKernelNode = real
    driver.cuGraphInstantiate = lambda *_: (fake_cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY, None)
    with pytest.raises(DeviceError, match=r"OUT_OF_MEMORY .* use a smaller model, context or batch"):
        device.run(commands)
    del driver.cuGraphInstantiate
    device.run(commands)


def test_a_forked_child_is_told(monkeypatch: Any) -> None:
    device, _ = open_fake(monkeypatch)
    buffer = device.allocate(64)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(DeviceError, match="does not outlive a fork"):
        buffer.read()
    buffer.free()


def test_closed_devices_and_foreign_lists_are_refused(monkeypatch: Any) -> None:
    device, _ = open_fake(monkeypatch)
    other = CudaDevice()
    commands = other.command_list()
    with pytest.raises(DeviceError, match="record it on this one"):
        device.submit(commands)
    device.close()
    device.close()
    with pytest.raises(DeviceError, match="is closed"):
        device.allocate(1)


def test_grids_and_shared_memory_beyond_the_limits(monkeypatch: Any) -> None:
    device, driver = open_fake(monkeypatch)
    driver.kernels["add"] = (8, 8, 20), lambda *_: None
    buffer = device.allocate(64)
    arguments = (buffer, buffer, slot(1.0, "f"), 1)
    commands = device.command_list()
    commands.launch(adding(), (1, 70000), arguments)
    with pytest.raises(DeviceError, match="65535 in y and z"):
        device.run(commands)
    commands = device.command_list()
    commands.launch(executable("add", ADD + " ", (0, 1), ((2, float32), (3, int32)), shared=300_000), (1,), arguments)
    with pytest.raises(DeviceError, match="needs 300000 bytes of shared memory and NVIDIA Imaginary has 232448"):
        device.run(commands)


def test_ctrl_c_while_waiting(monkeypatch: Any) -> None:
    import _thread
    import threading

    device, driver = open_fake(monkeypatch)
    driver.late = 1 << 60
    commands = device.command_list()
    commands.fill(device.allocate(64), 1)
    event = device.submit(commands)
    threading.Timer(0.1, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt):
        event.wait()
    driver.events = [0 for _ in driver.events]
    driver.late = 0
    device.run(commands)


# ---------------------------------------------------------------------------------------------- models, command line


class Sampling:
    """Stands in for the kernel that chooses tokens: 11, 12, 13, ... after a prompt. The other kernels of a model do
    nothing."""

    def __init__(self, driver: Any):
        self.chosen = 10
        driver.kernels["sample_kernel"] = (*(8,) * 7, 12), self

    def __call__(self, *parameters: bytes) -> None:
        self.chosen += 1
        position, history = (int.from_bytes(parameters[number], "little") for number in (3, 4))
        _, tokens, context = struct.unpack("<3i", parameters[7])  # behind the vocabulary's size
        at = fake_cuda.view(position, 4).view(np.int32)
        at += tokens
        if at[0] < context:
            fake_cuda.view(history, 4 * context).view(np.int32)[at] = self.chosen


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(random_file(tmp_path_factory.mktemp("models") / "m.gguf", ffn=256, heads=2, kv_heads=1))


def test_a_token_is_one_launch_and_one_wait_and_allocates_nothing(monkeypatch: Any, path: str) -> None:
    driver = use_fake(monkeypatch)
    Sampling(driver)
    model = load(path, device="cuda")
    model.session.prefill([1, 2, 3], Options())
    model.session.step()
    driver.late = 3  # the GPU takes its time: who does not wait reads the token before
    before, counted = driver.calls.copy(), vars(model.device.counters).copy()
    tokens = []
    for _ in range(5):
        model.session.step()
        tokens.append(model.session.next_token)
    assert tokens == [13, 14, 15, 16, 17]
    calls = driver.calls - before
    assert calls.pop("cuEventQuery") == 5 * (3 + 1) and calls.pop("cuCtxSetCurrent") > 0
    assert calls == {"cuGraphLaunch": 5, "cuEventRecord": 5}
    after = vars(model.device.counters)
    changed = {name: after[name] - counted[name] for name in after if after[name] != counted[name]}
    assert changed == {"submits": 5, "waits": 5, "dispatches": 5 * len(model.session.decode_list.records)}


def test_the_gpu_need_not_wait_for_the_host_between_two_tokens(monkeypatch: Any, path: str) -> None:
    """Each step but the first submits the one after it before it waits, and reads its own token, however far the GPU
    is; who stops or begins anew loses nothing."""
    driver = use_fake(monkeypatch)
    sampling = Sampling(driver)
    model = load(path, device="cuda", context=12)
    model.session.prefill([1, 2, 3], Options())
    model.session.step()
    counters, driver.late = model.device.counters, 3
    wanted = [(True, 2), (True, 1), (False, 0), (False, 1), (True, 2), (True, 1), (True, 0)]
    for number, (more, submits) in enumerate(wanted):
        before = vars(counters).copy()
        model.session.step(more)
        if number == 1:
            driver.late = 0
            model.device.synchronize()  # the step ahead has ended, too, and has chosen the next token
        assert model.session.next_token == 13 + number
        assert (counters.submits - before["submits"], counters.waits - before["waits"]) == (submits, 1)
    assert len(model.session.cache.tokens) == 11 and sampling.chosen == 19  # no room for another: nothing was begun
    model.session.begin(None)
    model.session.prefill([1, 2, 3, 4], Options())
    model.session.step(more=True)
    assert model.session.next_token == 21 and len(model.session.cache.tokens) == 5
    model.session.begin(None)
    model.session.cache.move(4)
    model.session.step()
    assert model.session.next_token == 23  # the step ahead made 22


def test_loading_tells_its_progress(monkeypatch: Any, path: str) -> None:
    driver = use_fake(monkeypatch)
    monkeypatch.setattr(cuda_transfer, "PIECE", 1 << 16)
    seen: list[tuple[int, int]] = []
    before = driver.calls.copy()
    load(path, device="cuda", progress=lambda done, total: seen.append((done, total)))
    size = Path(path).stat().st_size
    assert seen[-1] == (size, size) and seen == sorted(seen) and {total for _, total in seen} == {size}
    # One transfer for the whole file, whatever its tensors; RoPE's factors are read, its frequencies written.
    calls = driver.calls - before
    assert calls["cuMemcpyHtoDAsync"] == -(-size // (1 << 16)) + 1
    assert calls["cuStreamSynchronize"] == 3 and calls["cuMemAlloc"] == 2


def test_a_bar_is_for_people(monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "stderr", type("Terminal", (), {"isatty": lambda self: True})())
    for quiet, running in ((False, True), (True, False)):
        with Progress("loading", quiet) as progress:
            assert progress._timer.is_alive() is running
    monkeypatch.setattr(sys, "stderr", type("Pipe", (), {"isatty": lambda self: False})())
    with Progress("loading") as progress:
        assert not progress._timer.is_alive()


def test_the_command_line(monkeypatch: Any, capsys: Any, path: str) -> None:
    driver = use_fake(monkeypatch)
    Sampling(driver)

    def result(*arguments: str) -> Any:
        assert main(arguments) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    found = result("run", path, "hello", "--max-tokens", "4", "--device", "cuda", "--json")
    assert found["device"] == "cuda" and found["tokens"] == 4
    assert main(["run", path, "hello", "--max-tokens", "2", "--device", "cuda"]) == 0
    assert "on NVIDIA Imaginary" in capsys.readouterr().err
    decode = result("trace", path, "hello", "--device", "cuda", "--json")["phases"][-1]
    assert decode["counters"] == {"submits": 1, "waits": 1, "allocations": 0, "dispatches": len(decode["rows"])}
    assert all(row["time_us"] == pytest.approx(500) for row in decode["rows"])
    found = result("bench", path, "--prompt", "6", "--gen", "3", "--reps", "1", "--device", "cuda", "--json")
    assert found["description"] == "NVIDIA Imaginary" and "threads" not in found
    assert main(["run", path, "x", "--device", "cuda", "--threads", "2"]) == 2
    assert "only the CPU has a number of threads" in capsys.readouterr().err


def test_the_default_is_metal_then_cuda_then_the_cpu(monkeypatch: Any, capsys: Any) -> None:
    default = runtime.default_device.__wrapped__
    there = {"metal", "cuda"}

    def opened(name: str) -> Any:
        if name in there or name == "cpu":
            return name
        raise DeviceError("not here")

    monkeypatch.setattr(runtime, "_opened", opened)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert default() == "metal"
    monkeypatch.setattr(sys, "platform", "linux")  # where Metal is software
    assert default() == "cuda"
    there.clear()
    assert default() == "cpu"
    monkeypatch.undo()
    use_fake(monkeypatch)
    monkeypatch.setattr(runtime, "default_device", default)
    assert main(["devices"]) == 0
    text = capsys.readouterr().out
    assert "NVIDIA Imaginary" in text and "without --device: cuda\n" in text


def test_a_model_that_does_not_fit_is_refused_with_what_would(monkeypatch: Any, capsys: Any) -> None:
    driver = use_fake(monkeypatch, fake_cuda.Driver(total=40_000_000))
    assert main(["run", "demo", "x", "--context", "1024", "--device", "cuda"]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and "40.0 MB are available; a context of " in text
    assert not driver.calls["cuMemAlloc"]
    fits = text.split("; a context of ")[1].split()[0]
    load("demo", device="cuda", context=int(fits)).session.cache  # noqa: B018


def test_a_fault_ends_the_command(monkeypatch: Any, capsys: Any, path: str) -> None:
    driver = use_fake(monkeypatch)

    def fail(*pointers: bytes) -> None:
        driver.fault = fake_cuda.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS

    driver.kernels["sample_kernel"] = (8,), fail
    assert main(["run", path, "hello", "--device", "cuda"]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and "sample_kernel" in text and "start it again" in text


def test_the_suite_is_skipped_with_the_reason_where_there_is_no_gpu() -> None:
    command = [sys.executable, "-m", "pytest", "-n0", "--device", "cuda", f"{__file__}::test_architecture"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2],
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})  # fmt: skip
    assert done.returncode == 0 and "1 skipped" in done.stdout, done.stdout
    assert done.stdout.count("no test has run") == 1
    assert "use device 'cpu'" in done.stdout or "nitinol[cuda]" in done.stdout, done.stdout  # why


# ------------------------------------------------------------------------------------------------------------ NVRTC


def nvrtc_or_skip() -> Any:
    try:
        nvrtc = cuda_driver.bindings()[1]
        nvrtc.nvrtcVersion()
    except RuntimeError as error:
        pytest.skip(str(error))
    return nvrtc


def test_nvrtc_compiles_once(monkeypatch: Any, tmp_path: Any) -> None:
    nvrtc = nvrtc_or_skip()
    monkeypatch.setenv("NITINOL_CACHE_DIR", str(tmp_path))
    cubin = cuda_driver.compile_cubin("add", ADD, "sm_90a", ("--std=c++17",))
    assert cubin[:4] == b"\x7fELF"
    monkeypatch.setattr(nvrtc, "nvrtcCompileProgram", lambda *_: pytest.fail("compiled again"))
    assert cuda_driver.compile_cubin("add", ADD, "sm_90a", ("--std=c++17",)) == cubin


def test_source_that_does_not_compile_names_the_kernel(monkeypatch: Any) -> None:
    nvrtc_or_skip()
    monkeypatch.setenv("NITINOL_CACHE_DIR", "")
    with pytest.raises(DeviceError, match=r"does not compile kernel 'broken' for sm_80 .*broken.cu\(1\): error"):
        cuda_driver.compile_cubin("broken", "void broken( {", "sm_80")


# --------------------------------------------------------------------------------------------------------- on a GPU


@pytest.fixture(scope="module")
def gpu() -> CudaDevice:
    try:
        return CudaDevice()
    except DeviceError as error:
        pytest.skip(str(error))


def test_gpu_runs_kernels_in_order(gpu: CudaDevice) -> None:
    n, random = 100_003, np.random.default_rng()
    x, y = random.standard_normal((2, n), np.float32)
    buffers = gpu.wrap(x), gpu.wrap(y)
    commands = gpu.command_list()
    for step in range(3):
        commands.launch(adding(), (-(-n // 32),), (*buffers, slot(0.5 + step, "f"), n))
    before = gpu.counters.allocations
    gpu.run(commands)
    events = [gpu.submit(commands) for _ in range(5)]
    events[-1].wait()
    assert gpu.counters.allocations == before
    expected = y.astype(np.float64) + 6 * 4.5 * x
    # 18 additions, each rounded: at most 18 * 2^-24 of the largest intermediate value
    np.testing.assert_allclose(buffers[1].read(np.float32), expected, rtol=2e-6, atol=2e-6 * abs(expected).max())


def test_gpu_transfers(gpu: CudaDevice) -> None:
    for size in (1, 65537, (4 << 20) + 3, (200 << 20) + 12345):
        data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
        buffer = gpu.wrap(data)
        assert np.array_equal(buffer.read(), data)
        copy = gpu.allocate(size)
        commands = gpu.command_list()
        commands.fill(copy, 171)
        commands.copy(copy.view(1), buffer.view(1))
        gpu.run(commands)
        data[0] = 171
        assert np.array_equal(copy.read(), data)


def test_gpu_asserts_and_prints(gpu: CudaDevice, capsys: Any) -> None:
    commands = gpu.command_list()
    commands.launch(executable("check", CHECK, (), ((0, int32),), asserts={77: "kernel check: n"}), (1,), (4,))
    with pytest.raises(DeviceError, match="kernel check: n"):
        gpu.run(commands)
    commands = gpu.command_list()
    commands.launch(executable("say", SAY, prints=(Print("n", False, int32, ()),)), (3,))
    for _ in range(2):
        gpu.run(commands)
        lines = capsys.readouterr().out.splitlines()
        assert sorted(lines) == [f"pid ({i}, 0, 0) idx ()n: {41 + i}" for i in range(3)]


def test_gpu_timestamps(gpu: CudaDevice) -> None:
    buffer = gpu.allocate(64 << 20)
    commands = gpu.command_list()
    commands.fill(buffer, 1, label="large")
    commands.fill(buffer.view(0, 4096), 2, label="small")
    commands.profile = True
    gpu.run(commands)
    large, small = commands.timestamps()
    assert 0 < small.end - small.start < large.end - large.start < 10**9


def test_gpu_out_of_memory(gpu: CudaDevice) -> None:
    with pytest.raises(DeviceError, match="MB are needed on NVIDIA"):
        gpu.allocate(gpu.largest_buffer)
    assert gpu.allocate(1000).nbytes == 1000


def test_gpu_shared_memory(gpu: CudaDevice) -> None:
    """A kernel writes it, the host reads it after the wait, a kernel reads what the host wrote."""
    n = 4096
    x, out = gpu.allocate(4 * n), gpu.allocate(4 * n, shared=True)
    commands = gpu.command_list()
    commands.launch(adding(), (-(-n // 32),), (x, out, slot(2.0, "f"), n))
    for _ in range(3):
        a, b = np.random.default_rng().integers(-99, 99, (2, n)).astype(np.float32)
        x.write(a)
        out.write(b)
        gpu.run(commands)
        assert np.array_equal(out.read(np.float32), b + 2 * a)


def test_gpu_command_line(gpu: CudaDevice, capsys: Any) -> None:
    def result(*arguments: str) -> Any:
        assert main(arguments) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    run = ("run", "demo", "def fib(n):\n", "--max-tokens", "8", "--json")
    assert result(*run, "--device", "cuda")["text"] == result(*run, "--device", "cpu")["text"]
    decode = result("trace", "demo", "def fib(n):\n", "--device", "cuda", "--json")["phases"][-1]
    assert decode["counters"] == {"submits": 1, "waits": 1, "allocations": 0, "dispatches": len(decode["rows"])}


@pytest.mark.parametrize("blocking", ["0", "1"])
def test_gpu_fault(gpu: CudaDevice, blocking: str) -> None:
    program = f"""
        import sys
        sys.path[:0] = [{os.path.dirname(__file__)!r}, {os.path.dirname(fake_cuda.__file__)!r}]
        from test_cuda_driver import ADD, WILD, CudaDevice, DeviceError, adding, executable, slot
        device = CudaDevice()
        buffer = device.allocate(64)
        commands = device.command_list()
        commands.launch(adding(), (1,), (buffer, buffer, slot(1.0, 'f'), 1))
        commands.launch(executable("wild", WILD, (0,)), (1,), (buffer,))
        for _ in range(2):
            try:
                device.run(commands)
            except DeviceError as error:
                print(error)
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "CUDA_LAUNCH_BLOCKING": blocking})  # fmt: skip
    first, second = done.stdout.splitlines()
    who = "kernel 'wild' accessed an illegal" if blocking == "1" else "one of the kernels add, wild"
    assert first == second and first.startswith(who) and done.returncode == 0, done

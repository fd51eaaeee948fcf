"""The CUDA driver: over a stand-in for cuda-bindings everywhere, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import Any

import fake_cuda
import numpy as np
import pytest

from nitinol.compiler.gpu import Executable
from nitinol.compiler.gpu.effects import Print
from nitinol.language.types import float32, int32
from nitinol.runtime import cuda, cuda_driver
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


def open_fake(monkeypatch: pytest.MonkeyPatch, driver: Any = None, nvrtc: Any = None) -> tuple[CudaDevice, Any]:
    driver = driver or fake_cuda.Driver()
    for module in (cuda, cuda_driver):
        monkeypatch.setattr(module, "bindings", lambda: (driver, nvrtc or fake_cuda.Nvrtc()))
    monkeypatch.setattr(cuda, "compile_cubin", lambda name, *_: name.encode())
    return CudaDevice(), driver


# ------------------------------------------------------------------------------------------------- what may be missing


@pytest.mark.parametrize(
    ("driver", "nvrtc", "message"),
    [
        (fake_cuda.Missing(), None, "no NVIDIA driver is installed"),
        (fake_cuda.Driver(version=11040), None, "is of CUDA 11.4, but at least 12.0"),
        (fake_cuda.Driver(gpus=0), None, "finds no GPU"),
        (fake_cuda.Driver(capability=(7, 5)), None, "capability 7.5, but at least 8.0"),
        (None, fake_cuda.Missing(), r"NVRTC is not installed; pip install 'nitinol\[cuda\]'"),
        (fake_cuda.Driver(version=12040), fake_cuda.Nvrtc((13, 2)), "pip install nvidia-cuda-nvrtc-cu12"),
        (fake_cuda.Driver(capability=(12, 0)), None, "NVRTC 13.0 does not know NVIDIA Imaginary"),
    ],
)
def test_what_is_missing_is_said(monkeypatch: Any, driver: Any, nvrtc: Any, message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        open_fake(monkeypatch, driver, nvrtc)


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
    device.progress = lambda done, total: seen.append((done, total))
    for size in (0, 1, 4095, (8 << 20) - 1, (8 << 20) + 1, (61 << 20) + 777, 150 << 20):
        data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
        buffer = device.wrap(data)
        np.testing.assert_array_equal(buffer.read(), data)
    assert seen[-1] == (150 << 20, 150 << 20)
    assert all(0 <= done <= total for done, total in seen)
    with pytest.raises(DeviceError, match="cannot see memory"):
        buffer.as_numpy()


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
    assert driver.loads == 1 and device.counters.submits == 2 and len(seen) == 2
    addresses = [int.from_bytes(word, "little") for word in seen[0][:2]]
    assert addresses == [x.address, y.address + 16]
    assert seen[0][2] == np.float32(2.5).tobytes() + np.array([-7, 5, 3, 1], np.int32).tobytes()


def test_copies_fills_and_empty_entries_run_in_order(monkeypatch: Any) -> None:
    device, driver = open_fake(monkeypatch)
    driver.kernels["add"] = (8, 8, 20), lambda *values: pytest.fail("a grid of no programs was launched")
    a, b = device.allocate(1003), device.allocate(1003)
    commands = device.command_list()
    commands.fill(a, 5)
    commands.fill(a.view(4, 400), 9, barrier=True)
    commands.copy(b, a, barrier=True)
    commands.fill(a.view(0, 0), 1, barrier=True)
    commands.copy(a.view(8, 0), b.view(8, 0))
    commands.launch(adding(), (0,), (a, b, slot(1.0, "f"), 1), barrier=True)
    device.run(commands)
    expected = np.full(1003, 5, np.uint8)
    expected[4:404] = 9
    np.testing.assert_array_equal(b.read(), expected)
    assert [node.kind for node in driver.graphs[-1]] == ["fill", "fill", "copy", "empty", "empty", "empty"]


def test_every_entry_waits_for_all_before_its_barrier_and_overlaps_its_neighbour(monkeypatch: Any) -> None:
    random = np.random.default_rng()
    device, driver = open_fake(monkeypatch)
    for _ in range(20):
        barriers = random.random(30) < 0.3
        buffers = [device.allocate(64) for _ in barriers]
        commands = device.command_list()
        for buffer, barrier in zip(buffers, barriers):
            commands.fill(buffer, 1, barrier=bool(barrier))
        device.run(commands)
        nodes = driver.graphs[-1]
        reach: dict[Any, set[Any]] = {}
        for node in nodes:
            reach[node] = set().union(*({other} | reach[other] for other in node.before))
        fills = [node for node in nodes if node.kind == "fill"]
        last = 0
        for i, barrier in enumerate(barriers):
            last = i if barrier else last
            before = reach[fills[i]]
            assert before >= set(fills[:last]) and (i == 0 or before != set(fills[:i]) or i == last)
        assert len(nodes) == len(fills)


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
    commands.launch(executable("wild", "wild", (0,)), (1,), (buffer,), barrier=True)
    who = "kernel 'wild' accessed" if blocking else "one of the kernels good, wild .*BLOCKING.* accessed"
    with pytest.raises(DeviceError, match=f"{who} an illegal address on NVIDIA Imaginary .*start it again"):
        device.submit(commands).wait()
    for function in (device.synchronize, lambda: device.allocate(10**6), lambda: device.submit(commands)):
        with pytest.raises(DeviceError, match="wild"):
            function()
    buffer.free()
    device.close()


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
    driver.pending[0] = 0
    driver.late = 0
    device.run(commands)


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
        commands.launch(adding(), (-(-n // 32),), (*buffers, slot(0.5 + step, "f"), n), barrier=True)
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
        commands.copy(copy.view(1), buffer.view(1), barrier=True)
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


@pytest.mark.parametrize("blocking", ["0", "1"])
def test_gpu_fault(gpu: CudaDevice, blocking: str) -> None:
    program = f"""
        import sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_cuda_driver import ADD, WILD, CudaDevice, DeviceError, adding, executable, slot
        device = CudaDevice()
        buffer = device.allocate(64)
        commands = device.command_list()
        commands.launch(adding(), (1,), (buffer, buffer, slot(1.0, 'f'), 1))
        commands.launch(executable("wild", WILD, (0,)), (1,), (buffer,), barrier=True)
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

"""A stand-in for the modules of cuda-bindings: the calls that the driver makes, over host memory, without a GPU.

The stream is a queue. What is put there (graphs, copies from and to pinned memory, events) happens when somebody waits
or asks for an event behind it, so whoever does not wait sees that. `late`: how often an event is asked before it
happens. Graphs are kept as nodes with their dependencies. `kernels`: by name, the sizes of the parameters and a
function of their bytes; others do nothing. `calls`: how often each function was called.
"""

from __future__ import annotations

import ctypes
import enum
import threading
from collections import Counter, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nitinol import runtime
from nitinol.runtime import cuda, cuda_driver


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_NOT_READY = 600
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_NOT_SUPPORTED = 801
    CUDA_ERROR_UNKNOWN = 999


class _Names:
    """Every attribute is its own name."""

    def __getattr__(self, name: str) -> str:
        return name


def view(address: int, nbytes: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), np.uint8)


class Node:
    def __init__(self, kind: str, before: list[Node], run: Callable[[], None] = lambda: None):
        self.kind, self.before, self.run = kind, list(before), run
        self.early: list[Node] = []  # those of `before` that it waits for itself


class Driver:
    """`cuda.bindings.driver` for one GPU."""

    CUresult = CUresult
    CUdevice_attribute = CUfunction_attribute = CUpointer_attribute = CUmemorytype = _Names()
    CUevent_flags = SimpleNamespace(CU_EVENT_DISABLE_TIMING=2, CU_EVENT_BLOCKING_SYNC=1)
    CUgraphDependencyType = SimpleNamespace(CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC=1)
    CUgraphEdgeData = SimpleNamespace
    CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC = 1
    CU_MEMHOSTALLOC_PORTABLE, CU_MEMHOSTALLOC_DEVICEMAP = 1, 2
    CUDA_KERNEL_NODE_PARAMS = CUDA_MEMCPY3D = CUDA_MEMSET_NODE_PARAMS = SimpleNamespace

    def __init__(self, version: int = 13000, capability: tuple[int, int] = (9, 0), gpus: int = 1, total: int = 1 << 30):
        self.version, self.capability, self.gpus, self.total = version, capability, gpus, total
        self.pinnable = 1 << 30  # bytes of the host's memory in one piece
        self.memory: dict[int, np.ndarray] = {}
        self.kernels: dict[str, tuple[tuple[int, ...], Callable[..., None]]] = {}
        self.graphs: list[list[Node]] = []
        self.late = 0
        self.fault = CUresult.CUDA_SUCCESS  # what every call answers from the end of the kernel that sets it on
        self.events: list[int] = []  # how often each must still be asked
        self.pinned: dict[int, np.ndarray] = {}
        self.calls: Counter[str] = Counter()
        self._queue: deque[Callable[[], Any]] = deque()
        self._placed = self._done = 0  # how much was put there so far, how much of it has happened
        self._behind: dict[int, int] = {}  # by event: how much must have happened
        self._lock = threading.RLock()

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cu"):
            calls = object.__getattribute__(self, "calls")
            with object.__getattribute__(self, "_lock"):
                calls[name] += 1
        return object.__getattribute__(self, name)

    def _place(self, work: Callable[[], Any]) -> None:
        with self._lock:
            self._queue.append(work)
            self._placed += 1

    def _catch_up(self, count: int | None = None) -> CUresult:
        with self._lock:
            while self._done < (self._placed if count is None else count):
                self._done += 1
                work = self._queue.popleft()
                if not self.fault:
                    work()
        return self.fault

    @property
    def used(self) -> int:
        return sum(block.nbytes for block in self.memory.values())

    def cuInit(self, flags: int) -> Any:
        return (CUresult.CUDA_SUCCESS if self.gpus else CUresult.CUDA_ERROR_NO_DEVICE,)

    def cuDriverGetVersion(self) -> Any:
        return 0, self.version

    def cuDeviceGetCount(self) -> Any:
        return 0, self.gpus

    def cuDeviceGet(self, index: int) -> Any:
        return 0, index

    def cuDeviceGetName(self, length: int, device: int) -> Any:
        return 0, b"NVIDIA Imaginary".ljust(length, b"\0")

    def cuDeviceGetAttribute(self, name: str, device: int) -> Any:
        values = {"COMPUTE_CAPABILITY_MAJOR": self.capability[0], "COMPUTE_CAPABILITY_MINOR": self.capability[1],
                  "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": 232448}
        return 0, values[name.removeprefix("CU_DEVICE_ATTRIBUTE_")]

    def cuDevicePrimaryCtxRetain(self, device: int) -> Any:
        return 0, "context"

    def cuDevicePrimaryCtxRelease(self, device: int) -> Any:
        return (0,)

    def cuCtxSetCurrent(self, context: str) -> Any:
        return (0,)

    def cuStreamCreate(self, flags: int) -> Any:
        return 0, "stream"

    def cuStreamSynchronize(self, stream: str) -> Any:
        assert stream == "stream"
        return (self._catch_up(),)

    def cuEventCreate(self, flags: int) -> Any:
        with self._lock:
            self.events.append(0)
            return 0, len(self.events) - 1

    def cuEventDestroy(self, event: int) -> Any:
        return (0,)

    def cuEventRecord(self, event: int, stream: str) -> Any:
        assert stream == "stream"
        with self._lock:
            self.events[event] = self.late
            self._behind[event] = self._placed
        return (self.fault,)

    def cuEventQuery(self, event: int) -> Any:
        self.events[event] -= 1
        return (CUresult.CUDA_ERROR_NOT_READY if self.events[event] >= 0 else self._catch_up(self._behind[event]),)

    def cuEventSynchronize(self, event: int) -> Any:
        return (self._catch_up(self._behind.get(event, 0)),)

    def cuEventElapsedTime(self, first: int, second: int) -> Any:
        return 0, 0.5 * (second - first)

    def cuMemGetInfo(self) -> Any:
        return 0, self.total - self.used, self.total

    def cuMemAlloc(self, nbytes: int) -> Any:
        if nbytes > self.total - self.used:
            return CUresult.CUDA_ERROR_OUT_OF_MEMORY, None
        block = np.empty(nbytes + 512, np.uint8)
        address = -(-block.ctypes.data // 512) * 512
        self.memory[address] = block
        return 0, address

    def cuMemFree(self, address: int) -> Any:
        self._catch_up()
        del self.memory[address]
        return (0,)

    def cuMemHostAlloc(self, nbytes: int, flags: int) -> Any:
        if nbytes > self.pinnable:
            return CUresult.CUDA_ERROR_OUT_OF_MEMORY, None
        memory = np.empty(nbytes, np.uint8)
        with self._lock:
            self.pinned[memory.ctypes.data] = memory
        return 0, memory.ctypes.data

    def cuMemFreeHost(self, address: int) -> Any:
        with self._lock:
            del self.pinned[address]
        return (0,)

    def cuMemHostRegister(self, address: int, nbytes: int, flags: int) -> Any:
        if nbytes > self.pinnable:
            return (CUresult.CUDA_ERROR_OUT_OF_MEMORY,)
        with self._lock:
            self.pinned[address] = np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), np.uint8)
        return (0,)

    cuMemHostUnregister = cuMemFreeHost  # pinned no more, either way

    def _is_pinned(self, host: int) -> bool:
        with self._lock:
            return any(start <= host < start + memory.nbytes for start, memory in self.pinned.items())

    def cuMemcpyHtoDAsync(self, address: int, host: int, nbytes: int, stream: str) -> Any:
        if self._is_pinned(host):
            self._place(lambda: ctypes.memmove(address, host, nbytes))
        else:  # ordinary memory may change as soon as the call returns
            kept = ctypes.string_at(host, nbytes)
            self._place(lambda: ctypes.memmove(address, kept, nbytes))
        return (self.fault,)

    def cuMemcpyDtoHAsync(self, host: int, address: int, nbytes: int, stream: str) -> Any:
        self._place(lambda: ctypes.memmove(host, address, nbytes))
        return (self.fault if self._is_pinned(host) else self._catch_up(),)

    def cuModuleLoadData(self, image: bytes) -> Any:
        return 0, image

    def cuModuleGetFunction(self, module: bytes, name: bytes) -> Any:
        return 0, name.decode()

    def cuFuncSetAttribute(self, function: str, attribute: str, value: int) -> Any:
        return (0,)

    def cuGraphCreate(self, flags: int) -> Any:
        return 0, []

    def _add(self, graph: list[Node], node: Node) -> Any:
        assert all(other in graph for other in node.before) and len(set(node.before)) == len(node.before)
        graph.append(node)
        return 0, node

    def cuGraphAddDependencies(
        self, graph: list[Node], before: list[Node], after: list[Node], edges: list[Any], count: int
    ) -> Any:
        assert len(before) == len(after) == len(edges) == count and all((e.from_port, e.type) == (1, 1) for e in edges)
        for one, other in zip(before, after):
            assert one in graph and one not in other.before
            assert one.kind.startswith("kernel ") and other.kind.startswith("kernel ")
            other.before.append(one)
            other.early.append(one)
        return (0,)

    def cuGraphAddEmptyNode(self, graph: list[Node], before: list[Node], count: int) -> Any:
        return self._add(graph, Node("empty", before))

    def cuGraphAddEventRecordNode(self, graph: list[Node], before: list[Node], count: int, event: int) -> Any:
        return self._add(graph, Node("event", before))

    def cuGraphAddMemcpyNode(self, graph: list[Node], before: list[Node], count: int, copy: Any, context: str) -> Any:
        arguments = copy.dstDevice, copy.srcDevice, copy.WidthInBytes * copy.Height * copy.Depth
        return self._add(graph, Node("copy", before, lambda: ctypes.memmove(*arguments) and None))

    def cuGraphAddMemsetNode(self, graph: list[Node], before: list[Node], count: int, fill: Any, context: str) -> Any:
        def run() -> None:
            pattern = np.frombuffer(fill.value.to_bytes(fill.elementSize, "little"), np.uint8)
            view(fill.dst, fill.width * fill.elementSize).reshape(-1, fill.elementSize)[:] = pattern

        return self._add(graph, Node("fill", before, run))

    def cuGraphAddKernelNode(self, graph: list[Node], before: list[Node], count: int, kernel: Any) -> Any:
        sizes, function = self.kernels.get(kernel.func, ((), lambda *_: None))
        pointers = (ctypes.c_void_p * len(sizes)).from_address(kernel.kernelParams)
        values = [ctypes.string_at(pointer, size) for pointer, size in zip(pointers, sizes)]
        return self._add(graph, Node(f"kernel {kernel.func}", before, lambda: function(*values)))

    def cuGraphInstantiate(self, graph: list[Node], flags: int) -> Any:
        self.graphs.append(list(graph))
        return 0, self.graphs[-1]

    def cuGraphDestroy(self, graph: list[Node]) -> Any:
        return (0,)

    def cuGraphExecDestroy(self, graph: list[Node]) -> Any:
        return (0,)

    def cuGraphLaunch(self, graph: list[Node], stream: str) -> Any:
        assert stream == "stream"
        for node in graph:
            self._place(node.run)
        return (self.fault,)


class Nvrtc:
    """`cuda.bindings.nvrtc`, as far as opening a device asks it."""

    def __init__(self, version: tuple[int, int] = (13, 0), known: tuple[int, ...] = (80, 90, 100)):
        self.version, self.known = version, known

    def nvrtcVersion(self) -> Any:
        return 0, *self.version

    def nvrtcGetSupportedArchs(self) -> Any:
        return 0, list(self.known)


class Missing:
    """A library that is not there: cuda-bindings raises RuntimeError at the first call."""

    CUresult = CUresult

    def __getattr__(self, name: str) -> Any:
        def function(*arguments: Any) -> Any:
            raise RuntimeError(f"{name} was not found")

        return function


def open_fake(monkeypatch: pytest.MonkeyPatch, driver: Any = None, nvrtc: Any = None) -> tuple[cuda.CudaDevice, Any]:
    driver = driver or Driver()
    for module in (cuda, cuda_driver):
        monkeypatch.setattr(module, "bindings", lambda: (driver, nvrtc or Nvrtc()))
    monkeypatch.setattr(cuda, "compile_cubin", lambda name, *_: name.encode())
    return cuda.CudaDevice(), driver


def use_fake(monkeypatch: pytest.MonkeyPatch, driver: Any = None, nvrtc: Any = None) -> Any:
    """From now on "cuda" is the stand-in, as `open_device` sees it."""
    opened: list[cuda.CudaDevice] = []
    real = runtime._opened

    def open_device(name: str) -> Any:
        if name != "cuda":
            return real(name)
        if not opened:
            opened.append(open_fake(monkeypatch, driver, nvrtc)[0])
        return opened[0]

    driver = driver or Driver()
    monkeypatch.setattr(runtime, "_opened", open_device)
    return driver

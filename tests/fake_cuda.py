"""A stand-in for the modules of cuda-bindings: the calls that the driver makes, over host memory, without a GPU.

Graphs are kept as nodes with their dependencies, and run at launch. `late`: how often an event is asked before it
happens. `kernels`: by name, the sizes of the parameters and a function of their bytes.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_NOT_READY = 600
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
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


class Driver:
    """`cuda.bindings.driver` for one GPU."""

    CUresult = CUresult
    CUdevice_attribute = CUfunction_attribute = CUpointer_attribute = CUmemorytype = _Names()
    CUevent_flags = SimpleNamespace(CU_EVENT_DISABLE_TIMING=2, CU_EVENT_BLOCKING_SYNC=1)
    CU_MEMHOSTALLOC_PORTABLE, CU_MEMHOSTALLOC_DEVICEMAP = 1, 2
    CUDA_KERNEL_NODE_PARAMS = CUDA_MEMCPY3D = CUDA_MEMSET_NODE_PARAMS = SimpleNamespace

    def __init__(self, version: int = 13000, capability: tuple[int, int] = (9, 0), gpus: int = 1, total: int = 1 << 30):
        self.version, self.capability, self.gpus, self.total = version, capability, gpus, total
        self.memory: dict[int, np.ndarray] = {}
        self.kernels: dict[str, tuple[tuple[int, ...], Callable[..., None]]] = {}
        self.graphs: list[list[Node]] = []
        self.late = self.launches = self.loads = 0
        self.fault = CUresult.CUDA_SUCCESS  # what every call answers from the next launch's end on
        self.pending: dict[int, int] = {}

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
        return (self.fault,)

    def cuEventCreate(self, flags: int) -> Any:
        self.pending[len(self.pending)] = 0
        return 0, len(self.pending) - 1

    def cuEventDestroy(self, event: int) -> Any:
        return (0,)

    def cuEventRecord(self, event: int, stream: str) -> Any:
        self.pending[event] = self.late
        return (0,)

    def cuEventQuery(self, event: int) -> Any:
        self.pending[event] -= 1
        return (CUresult.CUDA_ERROR_NOT_READY if self.pending[event] >= 0 else self.fault,)

    def cuEventSynchronize(self, event: int) -> Any:
        return (self.fault,)

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
        del self.memory[address]
        return (0,)

    def cuMemHostAlloc(self, nbytes: int, flags: int) -> Any:
        self.pinned = [*getattr(self, "pinned", []), np.empty(nbytes, np.uint8)]
        return 0, self.pinned[-1].ctypes.data

    def cuMemFreeHost(self, address: int) -> Any:
        return (0,)

    def cuMemcpyHtoDAsync(self, address: int, host: int, nbytes: int, stream: str) -> Any:
        ctypes.memmove(address, host, nbytes)
        return (self.fault,)

    def cuMemcpyDtoHAsync(self, host: int, address: int, nbytes: int, stream: str) -> Any:
        ctypes.memmove(host, address, nbytes)
        return (self.fault,)

    def cuModuleLoadData(self, image: bytes) -> Any:
        self.loads += 1
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
        sizes, function = self.kernels[kernel.func]
        pointers = (ctypes.c_void_p * len(sizes)).from_address(kernel.kernelParams)
        values = [ctypes.string_at(pointer, size) for pointer, size in zip(pointers, sizes)]
        return self._add(graph, Node(kernel.func, before, lambda: function(*values)))

    def cuGraphInstantiate(self, graph: list[Node], flags: int) -> Any:
        self.graphs.append(list(graph))
        return 0, self.graphs[-1]

    def cuGraphDestroy(self, graph: list[Node]) -> Any:
        return (0,)

    def cuGraphExecDestroy(self, graph: list[Node]) -> Any:
        return (0,)

    def cuGraphLaunch(self, graph: list[Node], stream: str) -> Any:
        if self.fault:
            return (self.fault,)
        self.launches += 1
        for node in graph:
            node.run()
        return (0,)


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

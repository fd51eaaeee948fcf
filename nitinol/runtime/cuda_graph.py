"""A command list as a CUDA graph: one node an entry, one launch for the whole."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nitinol.runtime.cuda_driver import Pinned
from nitinol.runtime.device import Buffer, Copy, DeviceError, Fill, Launch

if TYPE_CHECKING:
    from nitinol.runtime.cuda import CudaDevice

Entry = Launch | Copy | Fill
MOST_BLOCKS_YZ = 65535


class Node(NamedTuple):
    """A node of a graph. early: a kernel that lets those after it start before it has ended, and waits itself for those
    before it, so that every edge between two of them may be a programmatic one (CUDA programming guide, "Programmatic
    dependent launch"). All of them wait, so that none ends before what it comes after: that the one before the one
    before has ended follows, and needs no edge."""

    handle: Any
    early: bool = False


class Encoded:
    """Graphs ready to launch. One for all entries; with CUDA_LAUNCH_BLOCKING=1 one for each, so that the driver can
    wait after every launch and knows which kernel failed."""

    def __init__(self, device: CudaDevice, entries: Sequence[Entry], profile: bool):
        self.device = device
        self.entries = tuple(entries)  # keeps buffers and executables
        self.blocking = os.environ.get("CUDA_LAUNCH_BLOCKING", "") not in ("", "0")
        self.graphs: list[Any] = []
        self.names: list[list[str]] = []  # of each graph's kernels
        self.events = [device.event() for _ in range(len(entries) + 1)] if profile else []
        self.logs: list[tuple[Any, Pinned]] = []  # of the kernels that print
        self.submitted = self.sequence = 0  # when it was last, by time.monotonic_ns, and as which submission
        self.status: Pinned | None = None  # where kernels with assertions report; 0 between runs
        self._asserts: dict[int, str] = {}  # what the numbers mean that they leave there
        device.prepare(entry.executable for entry in entries if isinstance(entry, Launch))
        for first in range(0, len(entries), 1 if self.blocking else max(1, len(entries))):
            part = self.entries[first:first + 1] if self.blocking else self.entries
            graph = device.call(device.cu.cuGraphCreate, 0)
            try:
                self._fill(graph, first, part)
                self.graphs.append(device.call(device.cu.cuGraphInstantiate, graph, 0))
            finally:
                device.cu.cuGraphDestroy(graph)
            kernels = [entry for entry in part if isinstance(entry, Launch)]
            self.names.append(list(dict.fromkeys(entry.executable.name for entry in kernels)))

    def flush(self) -> None:
        """Print what the kernels have printed since the last time."""
        for executable, memory in self.logs:
            if memory.bytes[:4].any():
                lines = executable.printed(memory.bytes.tobytes())
                memory.bytes[:4] = 0
                print(*lines, sep="\n", flush=True)

    def report(self) -> str:
        """Which assertion has failed since the last time, as a sentence."""
        code = 0 if self.status is None else int(self.status.bytes[:4].view(np.uint32)[0])
        if self.status is None or not code:
            return ""
        self.status.bytes[:] = 0
        what = self._asserts.get(code, f"a kernel on device {self.device.name!r} reported error {code}")
        return f"{what}; the results are not valid"

    def __del__(self) -> None:
        if self.device.usable:
            for graph in self.graphs:
                self.device.cu.cuGraphExecDestroy(graph)  # takes effect when it has run
            for event in self.events:
                self.device.cu.cuEventDestroy(event)

    def _fill(self, graph: Any, first: int, entries: Sequence[Entry]) -> None:
        """A node for each of the entries, the list's from number `first` on, behind those that it comes after. With
        events: one entry after another, an event after each."""
        nodes: list[Node] = []
        written: set[Any] = set()  # memory, by the entries so far
        events = self.events[first:first + len(entries) + 1]
        last = [self._add_event(graph, [], events[0])] if events and first == 0 else []
        for number, entry in enumerate(entries):
            before = last if events else [nodes[other - first] for other in entry.after if other >= first]
            node = self._add(graph, before, entry, written)
            nodes.append(node)
            written |= _written(entry)
            if events:
                last = [self._add_event(graph, [node.handle], events[number + 1])]

    def _add_event(self, graph: Any, before: list[Any], event: Any) -> Node:
        return Node(self.device.call(self.device.cu.cuGraphAddEventRecordNode, graph, before, len(before), event))

    def _add(self, graph: Any, nodes: list[Node], entry: Entry, written: set[Any]) -> Node:
        """written: the memory that entries before this one write."""
        if isinstance(entry, Launch) and 0 not in entry.grid:
            executable: Any = entry.executable
            able = self.device.early_start and "griddepcontrol.wait" in executable.source
            loaded = {_memory(entry.arguments[number]) for number in executable.early}  # before it waits
            early = able and not (loaded and (None in loaded | written or loaded & written))
            behind = [node.handle for node in nodes if early and node.early]
            made = self._add_kernel(graph, [node.handle for node in nodes if not (early and node.early)], entry)
            if behind:
                self._add_early_edges(graph, behind, made)
            return Node(made, able)
        return Node(self._add_other(graph, [node.handle for node in nodes], entry))

    def _add_other(self, graph: Any, before: list[Any], entry: Entry) -> Any:
        cu = self.device.cu
        if isinstance(entry, Copy) and entry.source.nbytes:
            copy = cu.CUDA_MEMCPY3D()
            copy.srcMemoryType = copy.dstMemoryType = cu.CUmemorytype.CU_MEMORYTYPE_DEVICE
            copy.srcDevice, copy.dstDevice = entry.source.address, entry.destination.address
            copy.WidthInBytes, copy.Height, copy.Depth = entry.source.nbytes, 1, 1
            return self.device.call(cu.cuGraphAddMemcpyNode, graph, before, len(before), copy, self.device.context)
        elif isinstance(entry, Fill) and entry.destination.nbytes:
            fill, size, address = cu.CUDA_MEMSET_NODE_PARAMS(), entry.destination.nbytes, entry.destination.address
            fill.elementSize = 1 if (size | address) % 4 else 4
            fill.value = entry.value if fill.elementSize == 1 else entry.value * 0x01010101
            fill.dst, fill.width, fill.height = address, size // fill.elementSize, 1
            return self.device.call(cu.cuGraphAddMemsetNode, graph, before, len(before), fill, self.device.context)
        return self.device.call(cu.cuGraphAddEmptyNode, graph, before, len(before))

    def _add_kernel(self, graph: Any, before: list[Any], entry: Launch) -> Any:
        """The convention of parameters is told in nitinol.compiler.gpu.Executable."""
        executable: Any = entry.executable
        cu, (x, y, z) = self.device.cu, entry.grid
        if max(y, z) > MOST_BLOCKS_YZ:
            raise DeviceError(f"grid {entry.grid} of kernel {executable.name!r} is too large for CUDA, which has at "
                              f"most {MOST_BLOCKS_YZ} in y and z; put the largest extent first")
        words = [_address(entry.arguments[position]).to_bytes(8, "little") for position in executable.pointers]
        words.append(executable.arguments(entry.arguments, entry.grid))
        if executable.asserts:
            self._asserts.update(executable.asserts)
            if self.status is None:
                self.status = Pinned(self.device, 8)
                self.status.bytes[:] = 0
            words.append(self.status.address.to_bytes(8, "little"))
        if executable.prints:
            words.append(self._log(executable).to_bytes(8, "little"))
        storage = [(ctypes.c_uint64 * -(-len(word) // 8)).from_buffer_copy(word.ljust(-(-len(word) // 8) * 8, b"\0"))
                   for word in words]
        pointers = (ctypes.c_void_p * len(words))(*(ctypes.addressof(word) for word in storage))
        kernel = cu.CUDA_KERNEL_NODE_PARAMS()
        kernel.func = self.device.functions[executable.source]
        kernel.gridDimX, kernel.gridDimY, kernel.gridDimZ = x, y, z
        kernel.blockDimX, kernel.blockDimY, kernel.blockDimZ = executable.threads, 1, 1
        kernel.sharedMemBytes = executable.threadgroup_bytes
        kernel.kernelParams = ctypes.addressof(pointers)  # the call copies what they point to
        what = f"kernel {executable.name!r}"
        return self.device.call(cu.cuGraphAddKernelNode, graph, before, len(before), kernel, what=what)

    def _add_early_edges(self, graph: Any, before: list[Any], node: Any) -> None:
        cu = self.device.cu
        add = getattr(cu, "cuGraphAddDependencies_v2", cu.cuGraphAddDependencies)  # CUDA 13 has it by the old name
        edges = [cu.CUgraphEdgeData() for _ in before]
        for edge in edges:
            edge.from_port = int(cu.CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC)
            edge.type = int(cu.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC)
        self.device.call(add, graph, before, [node] * len(before), edges, len(before))

    def _log(self, executable: Any) -> int:
        """Memory for what one launch prints."""
        from nitinol.compiler.gpu import LOG_BYTES

        memory = Pinned(self.device, LOG_BYTES)
        memory.bytes[:4] = 0
        self.logs.append((executable, memory))
        return memory.address


def _memory(argument: Buffer | int | bytes) -> Any:
    """The buffer that an argument is or is a view of, None for an address."""
    return (argument._root or argument) if isinstance(argument, Buffer) else None


def _written(entry: Entry) -> set[Any]:
    if not isinstance(entry, Launch):
        return {_memory(entry.destination)}
    executable: Any = entry.executable
    return {_memory(entry.arguments[number]) for number in executable.stores}


def _address(argument: Buffer | int | bytes) -> int:
    if isinstance(argument, Buffer):
        return argument.address
    return int.from_bytes(argument, "little") if isinstance(argument, bytes) else int(argument)

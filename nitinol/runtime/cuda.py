"""The CUDA driver: one NVIDIA GPU as a device.

One stream runs everything in order of submission (cuda_stream.py), so memory that was freed can be used again at once:
what still reads it was submitted earlier. A command list is a CUDA graph (cuda_graph.py), large transfers go through
pinned memory (cuda_transfer.py), NVRTC compiles the kernels (cuda_driver.py).
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from nitinol.runtime.cuda_driver import (
    OUT_OF_MEMORY,
    Allocation,
    CudaError,
    Pinned,
    architecture,
    bindings,
    call,
    compile_cubin,
    find_gpu,
)
from nitinol.runtime.cuda_graph import Encoded
from nitinol.runtime.cuda_stream import Stream
from nitinol.runtime.cuda_transfer import Transfers
from nitinol.runtime.device import (
    WAIT_SLICE_NS,
    Buffer,
    CommandList,
    Counters,
    DeviceError,
    Event,
    Progress,
    Timestamp,
)
from nitinol.runtime.memory import Block, Pool

EXACT_BYTES = 64 << 20  # wrapped memory of at least that size does not get a larger block of the pool
EARLY_CAPABILITY, EARLY_DRIVER = (9, 0), 12030  # what programmatic edges of graphs need: Hopper, CUDA 12.3
# Errors after which the context is lost, and what they say of a kernel.
FAULTS = {
    214: "met an uncorrectable memory error", 700: "accessed an illegal address", 702: "ran into the time limit",
    710: "failed a device-side assertion", 714: "overran its stack", 715: "ran an illegal instruction",
    716: "accessed a misaligned address", 717: "accessed the wrong address space", 718: "jumped to an illegal address",
    719: "failed in an unspecified way",
}  # fmt: skip


class CudaDevice:
    """One NVIDIA GPU. index: its number among those that CUDA_VISIBLE_DEVICES lets through."""

    name = "cuda"
    host_memory = False

    def __init__(self, index: int = 0):
        self.closed, self._lost = True, ""
        self.index = index
        self.cu, nvrtc = bindings()
        self._handle = find_gpu(self.cu, index)
        self.description = call(self.cu.cuDeviceGetName, 128, self._handle).split(b"\0")[0].decode()
        capability = self._ask("COMPUTE_CAPABILITY_MAJOR"), self._ask("COMPUTE_CAPABILITY_MINOR")
        self.architecture = architecture(self.cu, nvrtc, self.description, capability)
        self.target = "cuda:{}{}".format(*capability)
        self.early_start = capability >= EARLY_CAPABILITY and call(self.cu.cuDriverGetVersion) >= EARLY_DRIVER
        self.context = call(self.cu.cuDevicePrimaryCtxRetain, self._handle)
        self._process, self.closed = os.getpid(), False
        self.enter()
        self.stream = Stream(self)
        self.largest_buffer = call(self.cu.cuMemGetInfo)[1]
        self.counters = Counters()
        self._pool = _Pool(self)
        self._transfers = Transfers(self)
        self.functions: dict[str, Any] = {}  # by source
        self._printing: weakref.WeakSet[Encoded] = weakref.WeakSet()

    # Memory

    def allocate(self, nbytes: int, shared: bool = False) -> Buffer:
        """Uninitialised memory of `nbytes`, 64-byte aligned, from the pool; shared: pinned memory of the host."""
        if nbytes < 0:
            raise DeviceError(f"a buffer of {nbytes} bytes cannot be allocated; ask for 0 or more")
        if shared:
            self.enter()
            pinned = Pinned(self, max(nbytes, 1))
            self.counters.allocations += 1
            return Buffer(self, pinned.address, nbytes, owner=pinned, shared=True)
        block = self._fit(nbytes, lambda: self._pool.allocate(nbytes, self.stream.submitted))
        return Buffer(self, block.address, nbytes, owner=block)

    def wrap(self, memory: Any, progress: Progress | None = None) -> Buffer:
        """A copy of host memory (anything contiguous with the buffer protocol). Memory of this GPU that offers
        `__cuda_array_interface__` (a torch tensor) is used in place."""
        if hasattr(memory, "__cuda_array_interface__"):
            return self._adopt(memory)
        if isinstance(memory, np.ndarray):
            if not memory.flags.c_contiguous:
                raise DeviceError(f"an array with strides {memory.strides} cannot be wrapped; make it C-contiguous")
            view = memory.reshape(-1).view(np.uint8)
        else:
            view = np.frombuffer(memory, np.uint8) if memoryview(memory).nbytes else np.empty(0, np.uint8)
        if view.nbytes >= EXACT_BYTES:
            allocation = self._fit(view.nbytes, lambda: Allocation(self, view.nbytes))
            buffer = Buffer(self, allocation.address, view.nbytes, owner=allocation)
            self.counters.bytes_in_use += view.nbytes
            self.counters.bytes_reserved += view.nbytes
        else:
            buffer = self.allocate(view.nbytes)
        self._transfers.copy(buffer.address, view, True, progress)
        buffer.read_only = not view.flags.writeable
        return buffer

    def release(self, buffer: Buffer) -> None:
        """Called by Buffer: back to the pool, or to the GPU."""
        owner, buffer._owner = buffer._owner, None
        if isinstance(owner, Block):
            self._pool.release(owner, self.stream.submitted)
        elif isinstance(owner, Allocation):
            self.counters.bytes_in_use -= owner.nbytes
            self.counters.bytes_reserved -= owner.nbytes
        else:
            self.stream.keep(owner)  # pinned memory, or another library's, must outlive what may use it

    def read(self, buffer: Buffer, destination: np.ndarray) -> None:
        """All bytes of the buffer to a uint8 array of that length, after everything submitted so far."""
        if buffer.shared:
            self.synchronize()
            destination[:] = buffer.as_numpy()
        else:
            self._transfers.copy(buffer.address, destination, upload=False)

    def write(self, buffer: Buffer, source: np.ndarray) -> None:
        """A uint8 array of the buffer's length to the buffer, after everything submitted so far."""
        if buffer.shared:
            self.synchronize()
            buffer.as_numpy()[:] = source
        else:
            self._transfers.copy(buffer.address, source, upload=True)

    def available_memory(self) -> int:
        """Bytes that can still be allocated: what the GPU has free, and what the pool holds unused."""
        self.enter()
        return self.call(self.cu.cuMemGetInfo)[0] + self.counters.bytes_reserved - self.counters.bytes_in_use

    # Work

    def command_list(self) -> CommandList:
        return CommandList(self)

    def submit(self, commands: CommandList) -> Event:
        """Start a list after everything submitted before it; returns at once."""
        self.enter()
        commands.check(self)
        encoded = commands.encoded
        if encoded is None:
            encoded = commands.encoded = Encoded(self, commands.entries, commands.profile)
            if encoded.logs:
                self._printing.add(encoded)
        while encoded.status is not None and not self.poll(encoded.sequence):
            self.wait_slice(encoded.sequence, WAIT_SLICE_NS)  # what it reports belongs to one submission
        sequence = self.stream.submit(encoded)
        self.counters.submits += 1
        self.counters.dispatches += len(encoded.entries)
        return Event(self, sequence, commands)

    def run(self, commands: CommandList) -> None:
        """Submit and wait."""
        self.submit(commands).wait()

    def submission(self, commands: CommandList) -> int:
        return commands.sequence

    def busy(self, commands: CommandList) -> bool:
        return not self.poll(commands.sequence)

    def rebind(self, commands: CommandList, changes: Mapping[tuple[int, int], Buffer | int | bytes]) -> bool:
        return False

    def poll(self, sequence: int) -> bool:
        return self.stream.poll(sequence)

    def wait_slice(self, sequence: int, nanoseconds: int, work: bool = True) -> None:
        self.stream.wait_slice(sequence, nanoseconds)

    def synchronize(self) -> None:
        """Wait for everything submitted so far."""
        self.enter()
        submitted = self.stream.submitted
        while not self.poll(submitted):
            self.wait_slice(submitted, WAIT_SLICE_NS)
        mine, failed = threading.get_ident(), self.stream.failed
        failures = [self.failure(number) for number, (_, thread) in list(failed.items()) if thread == mine]
        self._print()
        if failures:
            raise DeviceError(failures[0])

    def failure(self, sequence: int) -> str:
        self._print()
        return self.stream.failed.pop(sequence, ("", 0))[0]

    def timestamps(self, commands: CommandList) -> list[Timestamp]:
        """A profiled list runs one entry after another; each starts when the one before has ended."""
        self.enter()
        encoded: Encoded = commands.encoded
        begin, ask = encoded.events[0], self.cu.cuEventElapsedTime
        elapsed = [int(1e6 * self.call(ask, begin, event)) for event in encoded.events]
        return [Timestamp(entry.label, encoded.submitted + start, encoded.submitted + end)
                for entry, start, end in zip(encoded.entries, elapsed, elapsed[1:])]

    def close(self) -> None:
        """Wait for what was submitted, then let go of the GPU; memory that buffers still hold becomes invalid."""
        if self.usable:
            with contextlib.suppress(DeviceError):
                self.synchronize()
            self.closed = True
            self.cu.cuDevicePrimaryCtxRelease(self._handle)
        self.closed = True

    # For the files beside this one

    @property
    def usable(self) -> bool:
        return not self.closed and not self._lost and self._process == os.getpid()

    def enter(self) -> None:
        """Before other calls of the driver API: the calling thread needs the context."""
        if not self.usable:
            if not self.closed and self._process != os.getpid():
                raise DeviceError("a CUDA device does not outlive a fork; open it in the child process only, or start "
                                  "processes with multiprocessing's 'spawn' method")
            raise DeviceError(self._lost or f"device {self.name!r} is closed; open another")
        self.cu.cuCtxSetCurrent(self.context)

    def call(self, function: Callable[..., Any], *arguments: Any, names: Sequence[str] = (), what: str = "") -> Any:
        """`cuda_driver.call` once the device is open: any call may be the first to hear of a kernel's fault. names: of
        the kernels that it can be, by default all that are in flight; what: what other errors are about."""
        try:
            return call(function, *arguments, what=what)
        except CudaError as error:
            raise self.explained(error, names) from None

    def explained(self, error: CudaError, names: Sequence[str] = ()) -> DeviceError:
        """The error; if it is a kernel's fault, a sentence that names the kernel and is all that the device says from
        now on."""
        if error.code not in FAULTS:
            return error
        names = names or self.stream.kernels()
        who = f"kernel {names[0]!r}" if len(names) == 1 else "a kernel"
        if len(names) > 1:
            some = ", ".join(names[:12]) + (f" and {len(names) - 12} others" if len(names) > 12 else "")
            who = f"one of the kernels {some} (with CUDA_LAUNCH_BLOCKING=1 in the environment this message says which)"
        self._lost = (f"{who} {FAULTS[error.code]} on {self.description} ({error.status.name}); the results are lost "
                      "and CUDA serves this process no longer, start it again")
        return DeviceError(self._lost)

    def event(self, *flags: str) -> Any:
        """A new event; flags: "DISABLE_TIMING" (quicker to record), "BLOCKING_SYNC" (cuEventSynchronize sleeps)."""
        bits = sum(int(getattr(self.cu.CUevent_flags, f"CU_EVENT_{flag}")) for flag in flags)
        return self.call(self.cu.cuEventCreate, bits)

    def prepare(self, executables: Iterable[Any]) -> None:
        """Compile and load kernels, side by side: NVRTC takes 0.1 to 5 s for one, on one core."""
        new = {executable.source: executable for executable in executables if executable.source not in self.functions}
        most = self._ask("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
        for executable in new.values():
            if executable.threadgroup_bytes > most:
                raise DeviceError(f"kernel {executable.name!r} needs {executable.threadgroup_bytes} bytes of shared "
                                  f"memory and {self.description} has {most}; use smaller tiles or fewer stages")
        with ThreadPoolExecutor(max(1, min(len(new), os.cpu_count() or 1))) as threads:
            cubins = threads.map(lambda e: compile_cubin(e.name, e.source, self.architecture, e.options), new.values())
            for executable, cubin in zip(new.values(), cubins):
                module = self.call(self.cu.cuModuleLoadData, cubin, what=f"kernel {executable.name!r}")
                function = self.call(self.cu.cuModuleGetFunction, module, executable.name.encode())
                if executable.threadgroup_bytes > 48 << 10:
                    attribute = self.cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                    self.call(self.cu.cuFuncSetAttribute, function, attribute, executable.threadgroup_bytes)
                self.functions[executable.source] = function

    # Inside

    def _print(self) -> None:
        """What kernels have printed, if nothing is running."""
        if self._printing and self.stream.done == self.stream.submitted:
            for encoded in list(self._printing):
                encoded.flush()

    def _ask(self, name: str) -> int:
        attribute = getattr(self.cu.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self.call(self.cu.cuDeviceGetAttribute, attribute, self._handle))

    def _fit(self, nbytes: int, take: Callable[[], Any]) -> Any:
        """Takes memory; where there is too little, once more after the pool has given back what it does not use."""
        self.enter()
        for _ in range(2):
            try:
                return take()
            except CudaError as error:
                if error.code != OUT_OF_MEMORY:
                    raise
            self._pool.trim(self.stream.submitted)
        free, total = self.call(self.cu.cuMemGetInfo)
        raise DeviceError(
            f"{nbytes / 1e6:.0f} MB are needed on {self.description}, but {free / 1e6:.0f} MB of its {total / 1e6:.0f} "
            f"MB are free ({self.counters.bytes_in_use / 1e6:.0f} MB are in use here); use a model, context or batch "
            "that fits, or end other programs that nvidia-smi lists")  # fmt: skip

    def _adopt(self, memory: Any) -> Buffer:
        interface = memory.__cuda_array_interface__
        address, read_only = interface["data"]
        nbytes = int(np.prod(interface["shape"], dtype=np.int64)) * np.dtype(interface["typestr"]).itemsize
        if nbytes and interface.get("strides") is not None:
            raise DeviceError(f"GPU memory with strides {interface['strides']} cannot be wrapped; make it contiguous")
        if nbytes:
            which = self.cu.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
            where = int(self.call(self.cu.cuPointerGetAttribute, which, address))
            if where != int(self._handle):
                raise DeviceError(f"memory of GPU {where} cannot be used on GPU {int(self._handle)}; copy it first")
        return Buffer(self, int(address), nbytes, read_only=bool(read_only), owner=memory)


class _Pool(Pool):
    """The CPU's pool, over the GPU's memory."""

    def __init__(self, device: CudaDevice):
        super().__init__(device.counters)
        self._device = device

    def _map(self, size: int) -> Block:
        allocation = Allocation(self._device, size)
        self.counters.bytes_reserved += size
        return Block(allocation.address, size, allocation)

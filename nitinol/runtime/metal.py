"""The Metal driver: one Apple GPU through pyobjc's `Metal`, or on Linux the software device that stands in for it.

A fence holds command buffers in order; within one, a barrier stands where the list asks for it. A list that is
submitted again becomes an indirect command buffer: a submission is then one command buffer with one command.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from nitinol.compiler.gpu import LOG_BYTES
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
from nitinol.runtime.hazards import meetings
from nitinol.runtime.metal_commands import Command, Encoded, check, dispatch, failure, lower, make_indirect
from nitinol.runtime.metal_memory import Heap, is_mapped
from nitinol.runtime.metal_pipelines import autorelease, framework, make_pipeline

MOST_INDIRECT = 16384  # commands of an indirect command buffer
ALIGNMENT = 256  # of a struct of scalar arguments in its buffer: what Metal asks for on any Mac


class _Submission(NamedTuple):
    sequence: int
    encoded: Encoded
    buffers: list[Any]  # MTLCommandBuffer
    thread: int  # that submitted it


class MetalDevice:
    """The system's default GPU. Threads may share a device; a forked child may not use it."""

    name = target = "metal"
    host_memory = True

    def __init__(self) -> None:
        self._closed, self._process = True, os.getpid()
        metal = self._metal = framework()
        device = self._device = metal.MTLCreateSystemDefaultDevice()
        if device is None:
            raise DeviceError("Metal finds no GPU here (virtual machines often have none); use device 'cpu'")
        self.description = str(device.name())
        if self.description == "softmetal":
            self.description += ", Metal in software"
        if not device.supportsFamily_(metal.MTLGPUFamilyApple7):
            raise DeviceError(f"{self.description} cannot run the kernels, which need an Apple GPU of family 7 (M1) or "
                              "newer; use device 'cpu'")
        # On M1 and M2 (families 7 and 8), kernels in indirect command buffers have been seen to crash or to compute
        # wrongly: tinygrad, runtime/graph/metal.py and extra/metal_icb_repro.py. There lists are encoded each time.
        self._indirect = bool(device.supportsFamily_(metal.MTLGPUFamilyApple9))
        self.largest_buffer = int(device.maxBufferLength())
        self.counters = Counters()
        self._queue, self._fence, self._event = device.newCommandQueue(), device.newFence(), device.newSharedEvent()
        self._lock = threading.RLock()  # re-entrant: the collector may free a buffer anywhere
        self._heap = Heap(metal, device, self._queue, self._lock, self.counters)
        self._pipelines: dict[tuple[str, str], Any] = {}  # by name and source
        self._in_flight: deque[_Submission] = deque()
        self._submitted = self._done = 0
        self._failed: dict[int, tuple[str, int]] = {}  # submission: why it failed, the thread that submitted it
        self._asserts: dict[int, str] = {}
        self._printing: weakref.WeakSet[Encoded] = weakref.WeakSet()
        self._lists: weakref.WeakSet[CommandList] = weakref.WeakSet()  # that were encoded
        self._closed = False
        _devices.add(self)

    # Memory

    def allocate(self, nbytes: int, shared: bool = False) -> Buffer:
        """Uninitialised memory of `nbytes`, page-aligned, from the pool."""
        if nbytes < 0:
            raise DeviceError(f"a buffer of {nbytes} bytes cannot be allocated; ask for 0 or more")
        with self._lock:
            self._check_usable()
            self._retire()
            memory = self._heap.allocate(nbytes, self._done)
            return Buffer(self, memory.address, nbytes, owner=memory)

    def wrap(self, memory: Any, progress: Progress | None = None) -> Buffer:
        """Anything contiguous with the buffer protocol. Mapped memory (an mmap, or an array on one) is used in place
        and kept alive; other memory is copied, so that later changes of it do not show."""
        if isinstance(memory, np.ndarray):
            if not memory.flags.c_contiguous:
                raise DeviceError(f"an array with strides {memory.strides} cannot be wrapped; make it C-contiguous")
            view = memory.reshape(-1).view(np.uint8)
        else:
            view = np.frombuffer(memory, np.uint8) if memoryview(memory).nbytes else np.empty(0, np.uint8)
        if not view.nbytes or not is_mapped(memory):
            buffer = self.allocate(view.nbytes)
            buffer.as_numpy()[:] = view
            buffer.read_only = not view.flags.writeable
            return buffer
        with self._lock:
            self._check_usable()
            mapped = self._heap.wrap(view, self._done)
        return Buffer(self, mapped.address, mapped.nbytes, read_only=not view.flags.writeable, owner=mapped)

    def release(self, buffer: Buffer) -> None:
        """Called by Buffer: back to the pool, for use after the last submission so far."""
        memory, buffer._owner = buffer._owner, None
        if memory is None or os.getpid() != self._process:
            return
        with self._lock:
            if memory.host is not None:
                for commands in list(self._lists):  # which cannot be submitted any more
                    if commands.encoded is not None and memory in commands.encoded.kept:
                        commands.encoded = None
            elif not self._closed:
                self._heap.release(memory, self._submitted)

    def read(self, buffer: Buffer, destination: np.ndarray) -> None:
        self.synchronize()
        destination[:] = buffer.as_numpy()

    def write(self, buffer: Buffer, source: np.ndarray) -> None:
        self.synchronize()
        buffer.as_numpy()[:] = source

    def available_memory(self) -> int:
        """What is left of the working set that the system recommends, the pool's free memory included."""
        self._check_process()
        with self._lock:
            self._retire()
            return max(0, self._heap.left() + self._heap.pooled(self._done))

    # Work

    def command_list(self) -> CommandList:
        return CommandList(self)

    def submit(self, commands: CommandList) -> Event:
        """Start a list after everything submitted before it; returns at once."""
        self._check_usable()
        commands.check(self)
        with autorelease():
            encoded = commands.encoded or self._encode(commands)
            while encoded.status is not None and not self.poll(encoded.sequence):
                self.wait_slice(encoded.sequence, WAIT_SLICE_NS)  # what it reports belongs to one submission
            with self._lock:
                commands.encoded = encoded
                self._retire()
                if encoded.commands:
                    buffers = self._commit(encoded, self._submitted + 1)
                    self._submitted += 1
                    encoded.sequence = self._submitted
                    self._in_flight.append(_Submission(self._submitted, encoded, buffers, threading.get_ident()))
                    self.counters.submits += 1
                    self.counters.dispatches += len(encoded.commands)
                return Event(self, self._submitted, commands)

    def run(self, commands: CommandList) -> None:
        self.submit(commands).wait()

    def poll(self, sequence: int) -> bool:
        self._check_process()
        with self._lock:
            self._retire()
            return self._done >= sequence

    def submission(self, commands: CommandList) -> int:
        return commands.sequence

    def busy(self, commands: CommandList) -> bool:
        return not self.poll(commands.sequence)

    def rebind(self, commands: CommandList, changes: Mapping[tuple[int, int], Buffer | int | bytes]) -> bool:
        return False  # the scalars are in a buffer that a submission may still read

    def wait_slice(self, sequence: int, nanoseconds: int, work: bool = True) -> None:
        """A wait of Metal's own would not let Ctrl-C through until it ends, so it has a time."""
        with self._lock:
            found = next((s for s in self._in_flight if s.sequence == sequence), None)
        milliseconds = max(1, nanoseconds // 1_000_000)
        if found is not None and self._event.waitUntilSignaledValue_timeoutMS_(sequence, milliseconds):
            found.buffers[-1].waitUntilCompleted()  # at once, and its error is known then

    def synchronize(self) -> None:
        self._check_process()
        submitted = self._submitted
        while self._done < submitted:
            self.wait_slice(submitted, WAIT_SLICE_NS)
            with self._lock:
                self._retire()
        with self._lock:
            mine = threading.get_ident()
            failures = [self.failure(number) for number, (_, thread) in list(self._failed.items()) if thread == mine]
            self._print()
        if failures:
            raise DeviceError(failures[0])

    def failure(self, sequence: int) -> str:
        with self._lock:
            self._retire()
            self._print()
            return self._failed.pop(sequence, ("", 0))[0]

    def timestamps(self, commands: CommandList) -> list[Timestamp]:
        """By the GPU's clock: in a profiled run each entry is a command buffer. An entry with nothing to do takes 0."""
        times = {command.entry: (int(buffer.GPUStartTime() * 1e9), int(buffer.GPUEndTime() * 1e9))
                 for command, buffer in zip(commands.encoded.commands, commands.encoded.latest)}
        result, end = [], min((start for start, _ in times.values()), default=0)
        for number, entry in enumerate(commands.entries):
            start, end = times.get(number, (end, end))
            result.append(Timestamp(entry.label, start, end))
        return result

    def close(self) -> None:
        """Wait for what was submitted, which the GPU cannot abandon, then give the pool's memory back."""
        if self._closed or os.getpid() != self._process:
            return
        with contextlib.suppress(DeviceError):
            self.synchronize()
        self._closed = True
        self._heap.free.clear()
        self._heap.used.clear()

    def __del__(self) -> None:
        self.close()

    # Inside: encoding

    def _encode(self, commands: CommandList) -> Encoded:
        """Resolves a list: pipelines, MTLBuffers and offsets, and all scalar arguments in one buffer."""
        launches = [(number, lower(entry)) for number, entry in enumerate(commands.entries)]
        launches = [(number, launch) for number, launch in launches if 0 not in launch.grid]
        for _, launch in launches:
            check(launch, self._device)
        kernels: list[Any] = [launch.executable for _, launch in launches]
        self._compile(dict.fromkeys((kernel.name, kernel.source) for kernel in kernels))
        encoded = Encoded(commands)
        self._lists.add(commands)
        scalars = [kernel.arguments(launch.arguments, launch.grid) for kernel, (_, launch) in zip(kernels, launches)]
        arguments = self.allocate(ALIGNMENT * sum(-(-len(data) // ALIGNMENT) for data in scalars))
        offset, meets = 0, meetings(entry.after for entry in commands.entries)
        for (number, launch), kernel, data in zip(launches, kernels, scalars):
            used = [argument for argument in launch.arguments if isinstance(argument, Buffer)]
            place = arguments.view(offset, len(data))
            place.as_numpy()[:] = np.frombuffer(data, np.uint8)
            offset += -(-len(data) // ALIGNMENT) * ALIGNMENT
            used.append(place)
            if kernel.asserts:
                self._asserts.update(kernel.asserts)
                if encoded.status is None:
                    encoded.status = self.allocate(4)
                    encoded.status.as_numpy()[:] = 0
                used.append(encoded.status)
            if kernel.prints:
                log = self.allocate(LOG_BYTES)
                log.as_numpy()[:4] = 0
                encoded.logs.append((kernel, log))
                self._printing.add(encoded)
                used.append(log)
            pipeline = self._pipelines[kernel.name, kernel.source]
            if kernel.threads > (most := pipeline.maxTotalThreadsPerThreadgroup()):
                raise DeviceError(f"kernel {kernel.name!r} needs {kernel.threads} threads in a threadgroup, and with "
                                  f"its registers this GPU runs {most}; use fewer warps")
            bound = []
            with self._lock:
                for buffer in used:
                    root = buffer._root or buffer
                    address = buffer.address if buffer.nbytes else root.address  # no offset may be at the end
                    bound.append(self._heap.window(root._owner, address, buffer.nbytes))
            size = self._metal.MTLSizeMake
            encoded.commands.append(Command(pipeline, bound, size(*launch.grid), size(kernel.threads, 1, 1),
                                             meets[number], number))
            encoded.kept += [(buffer._root or buffer)._owner for buffer in used]
        encoded.kept.append(arguments)
        return encoded

    def _compile(self, kernels: Iterable[tuple[str, str]]) -> None:
        """Pipelines for the kernels (name, source) that have none yet. The system itself keeps machine code on disk."""
        make = functools.partial(make_pipeline, self._metal, self._device, self._indirect)
        missing = [kernel for kernel in kernels if kernel not in self._pipelines]
        if len(missing) > 1:
            with ThreadPoolExecutor(min(len(missing), os.cpu_count() or 1, 8)) as pool:
                self._pipelines.update(zip(missing, pool.map(make, missing)))
        elif missing:
            self._pipelines[missing[0]] = make(missing[0])

    # Inside: submission

    def _commit(self, encoded: Encoded, sequence: int) -> list[Any]:
        """One command buffer; of a profiled list one for each command, so that each has its time. The lock is held."""
        metal, commands = self._metal, encoded.commands
        encoded.submits += 1
        # Directly the first time: many lists run once, and an indirect command buffer costs an allocation.
        if encoded.submits == 2 and self._indirect and not encoded.profile and len(commands) <= MOST_INDIRECT:
            encoded.indirect = make_indirect(metal, self._device, commands)
        self._heap.commit()
        buffers: list[Any] = []
        for part in [[command] for command in commands] if encoded.profile else [commands]:
            # Memory is kept by _Submission. In a serial encoder an indirect command buffer minds its own barriers.
            buffer = self._queue.commandBufferWithUnretainedReferences()
            concurrent = metal.MTLDispatchTypeConcurrent if encoded.indirect is None else metal.MTLDispatchTypeSerial
            encoder = buffer.computeCommandEncoderWithDispatchType_(concurrent)
            encoder.waitForFence_(self._fence)
            if self._heap.residency is None:
                used = list({id(b): b for command in part for b, _ in command.buffers}.values())
                usage = metal.MTLResourceUsageRead | metal.MTLResourceUsageWrite
                encoder.useResources_count_usage_(used, len(used), usage)
            if encoded.indirect is None:
                dispatch(metal, encoder, part)
            else:
                encoder.executeCommandsInBuffer_withRange_(encoded.indirect, metal.NSMakeRange(0, len(commands)))
            encoder.updateFence_(self._fence)
            encoder.endEncoding()
            if part[-1] is commands[-1]:
                buffer.encodeSignalEvent_value_(self._event, sequence)
            buffer.commit()
            buffers.append(buffer)
        encoded.latest = buffers
        return buffers

    def _retire(self) -> None:
        """Notes which submissions have finished and how. The lock is held."""
        finished = (self._metal.MTLCommandBufferStatusCompleted, self._metal.MTLCommandBufferStatusError)
        while self._in_flight and self._in_flight[0].buffers[-1].status() in finished:
            sequence, encoded, buffers, thread = self._in_flight.popleft()
            self._done = sequence
            if encoded.status is not None and (code := int(encoded.status.as_numpy(np.uint32)[0])):
                encoded.status.as_numpy()[:] = 0
                what = self._asserts.get(code, f"a kernel on device {self.name!r} reported error {code}")
                self._failed[sequence] = f"{what}; the results are not valid", thread
            for number, buffer in enumerate(buffers):
                if buffer.error() is not None and sequence not in self._failed:
                    ran = encoded.commands[number:number + 1] if encoded.profile else encoded.commands
                    names = [encoded.labels[command.entry] for command in ran]
                    self._failed[sequence] = failure(names, buffer.error()), thread

    def _print(self) -> None:
        """What kernels printed, of lists that are not running. The lock is held."""
        running = {id(submission.encoded) for submission in self._in_flight}
        for encoded in self._printing:
            for executable, log in encoded.logs if id(encoded) not in running else ():
                for line in executable.printed(ctypes.string_at(log.address, LOG_BYTES)):
                    print(line)
                log.as_numpy()[:4] = 0

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise DeviceError("the Metal device was opened before this process was forked and does not work in the "
                              "child; start processes with multiprocessing's 'spawn'")

    def _check_usable(self) -> None:
        self._check_process()
        if self._closed:
            raise DeviceError(f"device {self.name!r} is closed; open another")


_devices: weakref.WeakSet[MetalDevice] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Work in flight must not outlive the memory that it uses."""
    for device in list(_devices):
        device.close()

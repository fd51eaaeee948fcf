"""The CPU device: memory from a pool, command lists run by native worker threads (cpu_executor.py)."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from nitinol.runtime import cpu_executor, host
from nitinol.runtime.device import (
    WAIT_SLICE_NS,
    Buffer,
    CommandList,
    Copy,
    Counters,
    DeviceError,
    Event,
    Fill,
    Launch,
    Progress,
    Timestamp,
)
from nitinol.runtime.hazards import meetings
from nitinol.runtime.memory import Block, Pool, available_memory

# Units of work an entry is cut into, for each worker: the last, smallest piece is 1/32 of a worker's share.
UNITS_PER_WORKER = 32
NEVER = 2**63 - 1


class CpuDevice:
    """The processors of this machine as one device. threads: workers, the waiting thread among them."""

    def __init__(self, threads: int | None = None):
        threads = host.default_threads() if threads is None else threads
        if not 1 <= threads <= 1024:
            raise DeviceError(f"{threads} threads are not possible; use 1 to 1024 "
                              f"(this machine has {host.default_threads()} cores to use)")
        self.name = self.target = "cpu"
        self.host_memory = True
        self.largest_buffer = 2**63 - 1
        self.threads = threads
        self.counters = Counters()
        self._executor = cpu_executor.executor()
        self._pool = Pool(self.counters)
        self._scratch: list[Block] = []  # the last one serves new lists; older lists may use older ones
        self._lost = range(0)  # submissions that a fork has lost
        self._words = _aligned_words(cpu_executor.WORKERS + cpu_executor.WORKER_WORDS * threads)
        self._state = self._words.ctypes.data
        self._done, self._submitted, self._status = (
            ctypes.c_int64.from_buffer(self._words, 8 * index)
            for index in (cpu_executor.DONE, cpu_executor.SUBMITTED, cpu_executor.STATUS))
        self._open(0)
        _devices.add(self)

    # Memory

    def allocate(self, nbytes: int, shared: bool = False) -> Buffer:
        """Uninitialised memory of `nbytes`, 64-byte aligned (page-aligned above 64 KiB), from the pool."""
        if nbytes < 0:
            raise DeviceError(f"a buffer of {nbytes} bytes cannot be allocated; ask for 0 or more")
        done = self._done.value
        try:
            block = self._pool.allocate(nbytes, done)
        except DeviceError:
            self._pool.trim(done)
            block = self._pool.allocate(nbytes, done)
        return Buffer(self, block.address, nbytes, owner=block)

    def wrap(self, memory: Any, progress: Progress | None = None) -> Buffer:
        """An array, an mmap, bytes (anything contiguous with the buffer protocol) in place; it is kept alive."""
        if isinstance(memory, np.ndarray):
            if not memory.flags.c_contiguous:
                raise DeviceError(f"an array with strides {memory.strides} cannot be wrapped; make it C-contiguous")
            view = memory.reshape(-1).view(np.uint8)
        else:
            view = np.frombuffer(memory, np.uint8) if memoryview(memory).nbytes else np.empty(0, np.uint8)
        return Buffer(self, view.ctypes.data, view.nbytes, read_only=not view.flags.writeable, owner=view)

    def release(self, buffer: Buffer) -> None:
        """Called by Buffer: back to the pool, for use after the last submission so far."""
        if isinstance(buffer._owner, Block):
            self._pool.release(buffer._owner, self._submitted.value)
        buffer._owner = None

    def read(self, buffer: Buffer, destination: np.ndarray) -> None:
        self.synchronize()
        destination[:] = buffer.as_numpy()

    def write(self, buffer: Buffer, source: np.ndarray) -> None:
        self.synchronize()
        buffer.as_numpy()[:] = source

    def available_memory(self) -> int:
        return available_memory()

    @property
    def description(self) -> str:
        return f"{host.processor_name()}, {self.threads} threads"

    # Work

    def command_list(self) -> CommandList:
        return CommandList(self)

    def submit(self, commands: CommandList) -> Event:
        """Start a list after everything submitted before it; returns at once."""
        encoded = self._ready(commands)
        while not (sequence := self._start(encoded, 0)):
            self.wait_slice(self._done.value + 1, WAIT_SLICE_NS)  # the ring is full: wait for its oldest
        return Event(self, sequence, commands)

    def run(self, commands: CommandList) -> None:
        """Submit and wait in one call: this thread works along, so that a short list needs no other thread."""
        encoded = self._ready(commands)
        while not (sequence := self._start(encoded, WAIT_SLICE_NS)):
            self.wait_slice(self._done.value + 1, WAIT_SLICE_NS)
        if sequence < 0:
            Event(self, -sequence, commands).wait()
        else:
            self.counters.waits += 1
            self.check_status()

    def poll(self, sequence: int) -> bool:
        if sequence in self._lost:
            raise DeviceError("work that was submitted before a fork does not run in the child; submit it again")
        return self._done.value >= sequence

    def wait_slice(self, sequence: int, nanoseconds: int, work: bool = True) -> None:
        self._executor.wait(self._state, sequence, nanoseconds, work)
        if self.closed and not self.poll(sequence):
            raise DeviceError(f"device {self.name!r} was closed with work in flight; the results are incomplete")

    def synchronize(self) -> None:
        """Wait for everything submitted so far."""
        while not self.poll(submitted := self._submitted.value):
            self.wait_slice(submitted, WAIT_SLICE_NS)
        self.check_status()

    @property
    def status_address(self) -> int:
        """Where a kernel stores a nonzero int64 to report an error; the next wait raises it."""
        return self._state + 8 * cpu_executor.STATUS

    def check_status(self) -> None:
        code = self._status.value
        if code:
            self._status.value = 0
            from nitinol.compiler.cpu import assertions

            what = assertions.get(code, f"a kernel on device {self.name!r} reported error {code}")
            raise DeviceError(f"{what}; the results are not valid")

    def timestamps(self, commands: CommandList) -> list[Timestamp]:
        entries = commands.encoded.entries
        return [Timestamp(entry.label, int(row[cpu_executor.START]), int(row[cpu_executor.END]))
                for entry, row in zip(commands.entries, entries)]

    def close(self) -> None:
        """Stop the workers; work in flight is abandoned between two pieces of a kernel."""
        self._stop()

    @property
    def closed(self) -> bool:
        return not self._stop.alive

    # Inside

    def _open(self, sequence: int) -> None:
        """Initialise the executor's state, whose submissions so far number `sequence`."""
        self._words[:] = 0
        self._words[[cpu_executor.CURRENT, cpu_executor.DONE, cpu_executor.SUBMITTED, cpu_executor.STARTED]] = sequence
        self._executor.start(self._state)
        self._lock = threading.Lock()
        self._in_flight: deque[list[Any]] = deque()  # [encoded list, sequence number]: what must be kept alive
        self._retired: dict[int, np.ndarray] = {}  # lists that are gone, but that a worker may still look at
        self._pool_threads: list[threading.Thread] = []
        self._stop = weakref.finalize(self, _stop, self._executor, self._words, self._pool_threads)

    def _reopen(self) -> None:
        """In a forked child, which has inherited no threads: start over; what was in flight is lost."""
        if not self.closed:
            self._stop.detach()
            done, submitted = self._done.value, self._submitted.value
            self._lost = range(done + 1, submitted + 1)
            self._pool.after_fork()
            self._open(submitted)

    def _ready(self, commands: CommandList) -> _Encoded:
        if self.closed:
            raise DeviceError(f"device {self.name!r} is closed; open another")
        if commands.invalid:
            raise DeviceError(commands.invalid)
        if commands.device is not self:
            raise DeviceError(f"a command list of device {commands.device.name!r} was submitted to another device; "
                              "record it on this one")
        if commands.encoded is None:
            commands.encoded = self._encode(commands)
        if not self._pool_threads:
            with self._lock:
                self._start_threads()
        return commands.encoded

    def _start_threads(self) -> None:
        if not self._pool_threads:
            for index in range(self.threads):
                # The thread must not keep the device alive; it keeps the words that it looks at.
                thread = threading.Thread(target=_work, args=(self._executor, self._words, index), daemon=True,
                                          name=f"nitinol-cpu-{index}")
                thread.start()
                self._pool_threads.append(thread)

    def _start(self, encoded: _Encoded, nanoseconds: int) -> int:
        """Submit, or with a time run; the sequence number, negative if not done yet, or 0 if the ring is full."""
        record = [encoded, NEVER]
        with self._lock:
            self._in_flight.append(record)
        if nanoseconds:
            sequence = self._executor.run(self._state, encoded.address, nanoseconds)
        else:
            sequence = self._executor.submit(self._state, encoded.address)
        with self._lock:
            record[1] = abs(sequence)
            done = self._done.value
            while self._in_flight and self._in_flight[0][1] <= done:
                self._in_flight.popleft()
            if len(self._in_flight) > 2 * cpu_executor.RING_SIZE:  # a call that Ctrl-C ended blocks the front
                self._in_flight = deque(item for item in self._in_flight if item[1] > done)
            if sequence:
                self.counters.submits += 1
                self.counters.dispatches += encoded.count
        return sequence

    def _encode(self, commands: CommandList) -> _Encoded:
        """The list in one piece of memory: header, entries, argument slots (layouts: see cpu_executor.py)."""
        launches = [self._lower(entry) for entry in commands.entries]
        count, first_slot = len(launches), cpu_executor.LIST_WORDS + cpu_executor.ENTRY_WORDS * len(launches)
        memory = _aligned_words(first_slot + sum(len(slots) for _, _, slots in launches))
        entries = memory[cpu_executor.LIST_WORDS:first_slot].reshape(count, cpu_executor.ENTRY_WORDS)
        address, slot = memory.ctypes.data, first_slot
        total = required = parallel = 0
        meets = meetings(entry.after for entry in commands.entries)
        for row, meeting, (function, (x, y, z), slots) in zip(entries, meets, launches):
            programs = x * y * z
            unit = max(1, -(-programs // (UNITS_PER_WORKER * self.threads)))
            units = -(-programs // unit)
            required = total if meeting else required
            parallel |= units > 1 or (total > required)
            row[cpu_executor.FUNCTION:cpu_executor.TICKET] = (
                function, address + 8 * slot, x | y << 32, z, programs, unit, units, required)
            memory[slot:slot + len(slots)] = slots
            slot += len(slots)
            total += units
        if total >= 1 << cpu_executor.COUNT_BITS:
            raise DeviceError(f"a command list of {count} entries is too long; split it into several lists")
        kernels: list[Any] = [entry.executable for entry in commands.entries if isinstance(entry, Launch)]
        scratch, stride = self._scratch_for(max((kernel.scratch_bytes for kernel in kernels), default=0))
        memory[cpu_executor.LIST_ENTRIES:cpu_executor.LIST_COMPLETED] = (
            address + 8 * cpu_executor.LIST_WORDS, count, total, parallel and self.threads > 1, commands.profile,
            scratch, stride, 2 * self.threads)
        return _Encoded(self, memory, entries, tuple(commands.entries))

    def _lower(self, entry: Launch | Copy | Fill) -> tuple[int, tuple[int, int, int], Sequence[int]]:
        """Function address, grid and argument slots; copies and fills are launches of the executor's own kernels."""
        if isinstance(entry, Launch):
            slots = [_slot(argument) for argument in entry.arguments]
            kernel: Any = entry.executable
            return kernel.address, entry.grid, [*slots, self.status_address]
        grid = (-(-entry.destination.nbytes // cpu_executor.COPY_CHUNK), 1, 1)
        if isinstance(entry, Copy):
            return self._executor.copy, grid, [entry.destination.address, entry.source.address,
                                               entry.destination.nbytes]
        return self._executor.fill, grid, [entry.destination.address, entry.value, entry.destination.nbytes]

    def _scratch_for(self, nbytes: int) -> tuple[int, int]:
        """Address and stride of per-worker scratch of at least `nbytes`; grows twofold, the old stays for old lists."""
        with self._lock:
            stride = self._scratch[-1].nbytes // self.threads // 64 * 64 if self._scratch else 0
            if nbytes > stride:
                stride = max(-(-nbytes // 4096) * 4096, 2 * stride)
                self._scratch.append(self._pool.allocate(stride * self.threads, self._done.value))
            return (self._scratch[-1].address if self._scratch else 0), stride


class _Encoded:
    """A command list as the executor reads it: header, entries, argument slots, in one piece of memory."""

    def __init__(self, device: CpuDevice, memory: np.ndarray, entries: np.ndarray, kept: tuple[Any, ...]):
        self.device = device
        self.memory = memory
        self.address = memory.ctypes.data
        self.entries = entries
        self.count = len(entries)
        self.kept = kept  # the executables and buffers that it names

    def __del__(self) -> None:
        # Not in flight any more, but a worker that came late may still be looking at it.
        device = self.device
        if device.closed:
            return
        device._retired[self.address] = self.memory
        for address in list(device._retired):
            if not device._executor.inside(device._state, address, device.threads):
                device._retired.pop(address, None)


def _slot(argument: Buffer | int | bytes) -> int:
    """An argument as a signed 64-bit integer with the same bits."""
    if isinstance(argument, Buffer):
        return argument.address
    if isinstance(argument, bytes):
        return int.from_bytes(argument, "little", signed=True)
    value = int(argument)
    if not -(2**63) <= value < 2**64:
        raise DeviceError(f"argument {value} does not fit 64 bits")
    return value - 2**64 if value >= 2**63 else value


def _aligned_words(count: int) -> np.ndarray:
    """Zeroed int64 words that start on a 128-byte boundary."""
    raw = np.zeros(count + 16, np.int64)
    start = -raw.ctypes.data % 128 // 8
    return raw[start:start + count]


def _work(executor: cpu_executor.Executor, words: np.ndarray, index: int) -> None:
    executor.worker(words.ctypes.data, index)


def _stop(executor: cpu_executor.Executor, words: np.ndarray, threads: list[threading.Thread]) -> None:
    """Runs when the device is closed or collected, and at interpreter exit."""
    executor.stop(words.ctypes.data)
    for thread in threads:
        thread.join(timeout=5)  # as long as one piece of a kernel may take; then the process ends anyway


_devices: weakref.WeakSet[CpuDevice] = weakref.WeakSet()


def _after_fork() -> None:
    for device in list(_devices):
        device._reopen()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

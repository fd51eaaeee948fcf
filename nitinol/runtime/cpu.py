"""The CPU device: memory from a pool, command lists run by native worker threads (cpu_executor.py)."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from array import array
from collections import deque
from collections.abc import Mapping
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
# A list with an entry of more programs than this is left to the pool's threads, and so is a single launch of a kernel
# that may not end: the thread that waits would hear of Ctrl-C only when its piece of the kernel is finished. Longer
# lists are not, whatever their kernels: sampling has a while loop, and a token should not wait for a thread to wake up.
MOST_ALONG = 1 << 20
UNSET = (0,) * 8  # the second half of a list's header and of an entry: what a run writes
MOST_FAILED = 4096  # failures that are kept for a wait


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
        self._lost: set[int] = set()  # submissions that forks have lost
        words, self._state = _aligned_words(cpu_executor.WORKERS + cpu_executor.WORKER_WORDS * threads)
        self._words = np.asarray(words)
        self._done, self._submitted, self._failures = (
            ctypes.c_int64.from_buffer(self._words, 8 * index)
            for index in (cpu_executor.DONE, cpu_executor.SUBMITTED, cpu_executor.FAILURES))
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
        """Called by Buffer: back to the pool, for use after the last submission so far. Wrapped memory that work in
        flight may use goes with the Buffer, which the work keeps."""
        owner = buffer._owner
        if type(owner) is Block:
            self._pool.release(owner, self._submitted.value)
        elif self._in_flight:
            self._retire()
            if self._in_flight:
                return
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
        return Event(self, self._start(commands, 0), commands)

    def run(self, commands: CommandList) -> None:
        """Submit and wait in one call: this thread works along, so that a short list needs no other thread."""
        sequence = self._start(commands, WAIT_SLICE_NS)
        if sequence < 0:
            Event(self, -sequence, commands).wait()
        else:
            self.counters.waits += 1
            if self._failed and (failure := self.failure(sequence)):
                raise DeviceError(failure)

    def submission(self, commands: CommandList) -> int:
        encoded: _Encoded | None = commands.encoded
        sequence = 0 if encoded is None else encoded.words[cpu_executor.LIST_SEQUENCE]  # the executor writes it
        return 0 if sequence == NEVER else sequence

    def busy(self, commands: CommandList) -> bool:
        if commands.sequence != NEVER:
            return not self.poll(commands.sequence)
        self._retire()  # Ctrl-C ended the call that submitted it
        return any(flight.commands is commands for flight in self._in_flight)

    def rebind(self, commands: CommandList, changes: Mapping[tuple[int, int], Buffer | int | bytes]) -> bool:
        encoded: _Encoded = commands.encoded
        words, places = encoded.words, encoded.places
        slots = [argument.address if type(argument) is Buffer else _slot(argument) for argument in changes.values()]
        for (number, position), slot in zip(changes, slots):
            words[places[number] + position] = slot
        return True

    def poll(self, sequence: int) -> bool:
        if self._lost and sequence in self._lost:
            raise DeviceError("work that was submitted before a fork does not run in the child; submit it again")
        return self._done.value >= sequence

    def wait_slice(self, sequence: int, nanoseconds: int, work: bool = True) -> None:
        self._executor.wait(self._state, sequence, nanoseconds, work and not self._long_work())
        if self.closed and not self.poll(sequence):
            raise DeviceError(f"device {self.name!r} was closed with work in flight; the results are incomplete")

    def synchronize(self) -> None:
        """Wait for everything submitted so far."""
        while not self.poll(submitted := self._submitted.value):
            self.wait_slice(submitted, WAIT_SLICE_NS)
        self._retire()
        if self._failed:
            mine = threading.get_ident()
            failures = [self.failure(number) for number, (_, thread) in list(self._failed.items()) if thread == mine]
            if failures:
                raise DeviceError(failures[0])

    def failure(self, sequence: int) -> str:
        self._retire()
        code, _ = self._failed.pop(sequence, (0, 0))
        if not code:
            return ""
        from nitinol.compiler.cpu import assertions

        what = assertions.get(code, f"a kernel on device {self.name!r} reported error {code}")
        return f"{what}; the results are not valid"

    def timestamps(self, commands: CommandList) -> list[Timestamp]:
        rows = [commands.encoded.row(number) for number in range(len(commands.entries))]
        return [Timestamp(entry.label, row[cpu_executor.START], row[cpu_executor.END])
                for entry, row in zip(commands.entries, rows)]

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
        self._lock = threading.RLock()  # re-entrant: the collector may free a buffer anywhere
        self._in_flight: deque[_Flight] = deque()
        self._failed: dict[int, tuple[int, int]] = {}  # submission: what it reported, the thread that submitted it
        self._taken = 0  # how many of the reports these and the ones before are
        self._retired: dict[int, memoryview] = {}  # lists that are gone, but that a worker may still look at
        self._pool_threads: list[threading.Thread] = []
        self._stop = weakref.finalize(self, _stop, self._executor, self._words, self._pool_threads)

    def _reopen(self) -> None:
        """In a forked child, which has inherited no threads: start over; what was in flight is lost."""
        if not self.closed:
            self._stop.detach()
            done, submitted = self._done.value, self._submitted.value
            self._lost.update(range(done + 1, submitted + 1))
            self._pool.after_fork()
            self._open(submitted)

    def _start(self, commands: CommandList, nanoseconds: int) -> int:
        """Submit, or with a time run; the sequence number, negative if not done yet."""
        if not self._stop.alive:
            raise DeviceError(f"device {self.name!r} is closed; open another")
        commands.check(self)
        encoded = commands.encoded
        if encoded is None:
            encoded = commands.encoded = self._encode(commands)
        if not self._pool_threads:
            with self._lock:
                self._start_threads()
        # Noted before it starts: Ctrl-C may end this function at any point after.
        flight = _Flight(commands, encoded)
        commands.sequence = encoded.words[cpu_executor.LIST_SEQUENCE] = NEVER
        try:
            self._in_flight.append(flight)
            along = nanoseconds and not self._long_work()
            while True:
                if along:
                    sequence = self._executor.run(self._state, encoded.address, nanoseconds)
                else:
                    sequence = self._executor.submit(self._state, encoded.address)
                    sequence = -sequence if nanoseconds else sequence
                if sequence:
                    break
                self._retire()  # a report was in the way, or the ring is full: then wait for its oldest
                if self._submitted.value - (done := self._done.value) >= cpu_executor.RING_SIZE - 1:
                    self.wait_slice(done + 1, WAIT_SLICE_NS)
        except BaseException:
            with self._lock:
                if self.submission(commands) == 0 and flight in self._in_flight:  # it will never run
                    self._in_flight.remove(flight)
            raise
        commands.sequence = flight.sequence = abs(sequence)
        self._retire()
        if self._failed and flight.sequence in self._failed:  # taken by a thread that did not know whose it is
            self._failed[flight.sequence] = self._failed[flight.sequence][0], flight.thread
        self.counters.submits += 1
        self.counters.dispatches += encoded.count
        return sequence

    def _long_work(self) -> bool:
        """Whether something is in flight that a waiting thread should not work on."""
        return any(flight.encoded.long for flight in list(self._in_flight))

    def _retire(self) -> None:
        """Take the reports of failures, and let go of what has run."""
        done = self._done.value
        with self._lock:
            if self._taken != self._failures.value:
                self._take_reports()
            flights = self._in_flight
            while flights:
                if flights[0].sequence == NEVER:  # another thread is about to know it, or Ctrl-C ended its call
                    flights[0].sequence = flights[0].encoded.words[cpu_executor.LIST_SEQUENCE]
                if flights[0].sequence > done:
                    break
                flights.popleft()

    def _take_reports(self) -> None:
        """Notes what failed, and makes room for the next reports. The lock is held."""
        self._taken = self._failures.value
        reports = self._words[cpu_executor.FAILED:cpu_executor.FAILED + cpu_executor.RING_SIZE]
        places = np.flatnonzero(reports).tolist()
        submitted = self._submitted.value  # read after the places: the latest submission with each of them has failed
        threads = {flight.sequence: flight.thread for flight in self._in_flight}
        for place in places:
            sequence = submitted - (submitted - place) % cpu_executor.RING_SIZE
            self._failed[sequence] = int(reports[place]), threads.get(sequence, 0)
            reports[place] = 0
        for sequence in list(self._failed)[:-MOST_FAILED]:  # nobody has asked for so long
            del self._failed[sequence]

    def _start_threads(self) -> None:
        if not self._pool_threads:
            for index in range(self.threads):
                # The thread must not keep the device alive; it keeps the words that it looks at.
                thread = threading.Thread(target=_work, args=(self._executor, self._words, index), daemon=True,
                                          name=f"nitinol-cpu-{index}")
                thread.start()
                self._pool_threads.append(thread)

    def _encode(self, commands: CommandList) -> _Encoded:
        """The list in one piece of memory: header, entries, argument slots (layouts: see cpu_executor.py)."""
        lowered = [self._lower(entry) for entry in commands.entries]
        count = len(lowered)
        slot = cpu_executor.LIST_WORDS + cpu_executor.ENTRY_WORDS * count
        words, address = _aligned_words(slot + sum(len(slots) + 1 for _, _, slots in lowered))
        status, places = address + 8 * cpu_executor.LIST_STATUS, []
        rows: list[int] = []
        values: list[int] = []
        total = required = parallel = largest = 0
        for meeting, (function, (x, y, z), slots) in zip(meetings(e.after for e in commands.entries), lowered):
            programs = x * y * z
            largest = max(largest, programs)
            unit = max(1, -(-programs // (UNITS_PER_WORKER * self.threads)))
            units = -(-programs // unit)
            required = total if meeting else required
            parallel |= units > 1 or (total > required)
            rows += (function, address + 8 * slot, x | y << 32, z, programs, unit, units, required, *UNSET)
            values += slots
            values.append(status)
            places.append(slot)
            slot += len(slots) + 1
            total += units
        if total >= 1 << cpu_executor.COUNT_BITS:
            raise DeviceError(f"a command list of {count} entries is too long; split it into several lists")
        kernels: list[Any] = [entry.executable for entry in commands.entries if isinstance(entry, Launch)]
        scratch, stride = self._scratch_for(max((kernel.scratch_bytes for kernel in kernels), default=0))
        head = (address + 8 * cpu_executor.LIST_WORDS, count, total, parallel and self.threads > 1, commands.profile,
                scratch, stride, 2 * self.threads)
        words[:] = array("q", [*head, *UNSET, *rows, *values])
        long = largest > MOST_ALONG or (count == 1 and any(getattr(kernel, "may_not_end", False) for kernel in kernels))
        return _Encoded(self, words, address, places, long, tuple(commands.entries))

    def _lower(self, entry: Launch | Copy | Fill) -> tuple[int, tuple[int, int, int], list[int]]:
        """Function address, grid and argument slots; copies and fills are launches of the executor's own kernels."""
        if isinstance(entry, Launch):
            kernel: Any = entry.executable
            return kernel.address, entry.grid, [_slot(argument) for argument in entry.arguments]
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


class _Flight:
    """A submission that may be running, and so what must be kept alive."""

    __slots__ = ("commands", "encoded", "sequence", "thread")

    def __init__(self, commands: CommandList, encoded: _Encoded):
        self.commands = commands
        self.encoded = encoded
        self.sequence = NEVER  # until it is known
        self.thread = threading.get_ident()  # that submits it


class _Encoded:
    """A command list as the executor reads it: header, entries, argument slots, in one piece of memory."""

    def __init__(self, device: CpuDevice, words: memoryview, address: int, places: list[int], long: bool,
                 kept: tuple[Any, ...]):
        self.device = device
        self.words = words
        self.address = address
        self.places = places  # where each entry's slots begin
        self.count = len(places)
        self.long = long  # see MOST_ALONG
        self.kept = kept  # the entries, with the executables and buffers that they name

    def row(self, entry: int) -> memoryview:
        """The words of an entry."""
        first = cpu_executor.LIST_WORDS + cpu_executor.ENTRY_WORDS * entry
        return self.words[first:first + cpu_executor.ENTRY_WORDS]

    def __del__(self) -> None:
        # Not in flight any more, but a worker that came late may still be looking at it.
        device = getattr(self, "device", None)  # not there if Ctrl-C ended the constructor
        if device is None or device.closed:
            return
        device._retired[self.address] = self.words
        for address in list(device._retired):
            if not device._executor.inside(device._state, address, device.threads):
                device._retired.pop(address, None)


def _slot(argument: Buffer | int | bytes) -> int:
    """An argument as a signed 64-bit integer with the same bits."""
    if type(argument) is int and -(2**63) <= argument < 2**63:
        return argument
    if isinstance(argument, Buffer):
        return argument.address
    if isinstance(argument, bytes):
        return int.from_bytes(argument, "little", signed=True)
    value = int(argument)
    if not -(2**63) <= value < 2**64:
        raise DeviceError(f"argument {value} does not fit 64 bits")
    return value - 2**64 if value >= 2**63 else value


def _aligned_words(count: int) -> tuple[memoryview, int]:
    """Zeroed int64 words that start on a 128-byte boundary, and their address. (A NumPy array takes ten times as long
    to make.)"""
    raw = array("q", bytes(8 * (count + 16)))
    address = raw.buffer_info()[0]
    skip = -address % 128 // 8
    return memoryview(raw)[skip:skip + count], address + 8 * skip


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

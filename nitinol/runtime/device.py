"""The device protocol: buffers, command lists, events and counters, the same for every driver.

A driver (cpu.py, metal.py, cuda.py) is one class with the methods of `Device`. Everything else in this file is shared:
a `CommandList` is recorded once, encoded once by the driver, and submitted many times. Submissions to one device run in
order, one after another; a device has one queue. Within a list, entries may overlap but for those that touch the same
bytes, one of them writing: hazards.py derives from what each reads and writes which entries it comes after.
"""

from __future__ import annotations

import asyncio
import math
import struct
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from nitinol.runtime.hazards import Hazards, Span

_NUMBERS = (int, np.integer)
Progress = Callable[[int, int], None]  # told how much is done, of how much

# A blocking wait returns to Python this often, so that Ctrl-C is noticed.
WAIT_SLICE_NS = 50_000_000


class DeviceError(RuntimeError):
    """Something was asked of a device that it cannot do; the message says what was found and what to do."""


@dataclass
class Counters:
    """What a device has done since it was opened. Bytes count size classes, not requested sizes."""

    submits: int = 0
    waits: int = 0
    dispatches: int = 0  # launches, copies and fills submitted
    allocations: int = 0  # blocks taken from the operating system
    pool_hits: int = 0  # allocations served from memory that the pool already had
    bytes_in_use: int = 0
    bytes_reserved: int = 0  # in use and pooled


class Executable(Protocol):
    """A compiled kernel, for the drivers of one target: machine code (compiler/cpu) or source (compiler/gpu)."""

    @property
    def name(self) -> str: ...


class Buffer:
    """A range of device memory. `address` is in bytes: an ordinary pointer where the device has `host_memory`, else
    the device's own."""

    __slots__ = ("__weakref__", "_freed", "_owner", "_root", "address", "device", "nbytes", "read_only", "shared")
    frees = 0  # how often memory was freed explicitly: a list looks at its buffers again only if that has changed

    def __init__(self, device: Device, address: int, nbytes: int, *, read_only: bool = False,
                 owner: Any = None, root: Buffer | None = None, shared: bool = False):
        self.device = device
        self.address = address
        self.nbytes = nbytes
        self.read_only = read_only
        self.shared = shared or device.host_memory  # whether the host can address it
        self._owner = owner  # what keeps the memory alive: a pool block, or the wrapped host object
        self._root = root  # the buffer that this one is a view of
        self._freed = False

    @property
    def span(self) -> Span:
        """The addresses of the memory."""
        return self.address, self.address + self.nbytes

    @property
    def freed(self) -> bool:
        return (self._root or self)._freed

    def check(self, device: Device | None = None) -> None:
        """Raise DeviceError if the memory was freed or belongs to a device other than `device`."""
        if self.freed:
            raise DeviceError(f"a buffer of {self.nbytes} bytes is used after it was freed; allocate a new one")
        if device is not None and self.device is not device:
            raise DeviceError(f"a buffer of device {self.device.name!r} is used on device {device.name!r}; "
                              "copy it to that device first")

    def view(self, offset: int, nbytes: int | None = None) -> Buffer:
        """The bytes from `offset` on (`nbytes` of them, or all that follow) as a buffer on the same memory."""
        self.check()
        nbytes = self.nbytes - offset if nbytes is None else nbytes
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise DeviceError(f"a view of bytes {offset}..{offset + nbytes} does not fit a buffer of "
                              f"{self.nbytes} bytes")
        return Buffer(self.device, self.address + offset, nbytes, read_only=self.read_only,
                      root=self._root or self, shared=self.shared)

    def as_numpy(self, dtype: Any = np.uint8, shape: Sequence[int] | None = None) -> np.ndarray:
        """The memory as a C-contiguous array of `dtype`, without a copy; needs memory that the host can address.

        The array keeps the buffer from being reclaimed, but not from an explicit `free`. It sees what the device
        has written so far: wait for the event of the work that writes it first.
        """
        if not self.shared:
            raise DeviceError(f"the host cannot see memory of device {self.device.name!r}; use read() and write()")
        dtype, shape, needed = self._layout(dtype, shape)
        window = np.asarray(_Window(self, needed))
        return window.view(dtype).reshape(shape)

    def read(self, dtype: Any = np.uint8, shape: Sequence[int] | None = None) -> np.ndarray:
        """A copy of the memory as a C-contiguous array of `dtype`, after everything submitted so far."""
        dtype, shape, needed = self._layout(dtype, shape)
        result = np.empty(shape, dtype)
        self.device.read(self.view(0, needed), result.reshape(-1).view(np.uint8))
        return result

    def write(self, values: np.ndarray) -> None:
        """Copies an array's bytes, in C order, to the beginning of the memory, after everything submitted so far."""
        self.check()
        values = np.ascontiguousarray(values)
        if values.nbytes > self.nbytes:
            raise DeviceError(f"{values.nbytes} bytes do not fit a buffer of {self.nbytes}")
        if self.read_only:
            raise DeviceError(f"{self!r} cannot be written; allocate a buffer for it instead")
        self.device.write(self.view(0, values.nbytes), values.reshape(-1).view(np.uint8))

    def _layout(self, dtype: Any, shape: Sequence[int] | None) -> tuple[np.dtype, tuple[int, ...], int]:
        """Type, shape and bytes of an array at the beginning of the memory, checked."""
        self.check()
        dtype = np.dtype(dtype)
        if shape is None:
            if self.nbytes % dtype.itemsize:
                raise DeviceError(f"a buffer of {self.nbytes} bytes is not a whole number of {dtype} items")
            shape = (self.nbytes // dtype.itemsize,)
        needed = math.prod(shape) * dtype.itemsize
        if needed > self.nbytes or min(shape, default=0) < 0:
            raise DeviceError(f"an array of shape {tuple(shape)} and type {dtype} needs {needed} bytes, but the "
                              f"buffer has {self.nbytes}")
        return dtype, tuple(shape), needed

    def free(self) -> None:
        """Give the memory back now instead of when the last reference goes. Lists that use it become unusable."""
        if self._root is not None:
            raise DeviceError("a view cannot be freed; free the buffer that it was made from")
        if not self._freed:
            self._freed = True
            Buffer.frees += 1
            self.device.release(self)

    def __del__(self) -> None:
        if getattr(self, "_root", self) is None and not self._freed:
            self._freed = True
            self.device.release(self)

    def __repr__(self) -> str:
        state = ", freed" if self.freed else ", read only" if self.read_only else ""
        return f"Buffer({self.device.name!r}, {self.nbytes} bytes at {self.address:#x}{state})"


class _Window:
    """Lets NumPy see a buffer's memory and keeps the buffer alive for as long as an array looks at it."""

    def __init__(self, buffer: Buffer, nbytes: int):
        self.buffer = buffer
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (nbytes,),
                                    "data": (buffer.address, buffer.read_only)}


def slot(value: float, kind: str) -> bytes:
    """The 8 bytes of a kernel argument. kind: 'i' integers, 'f' float32 in the low 4 bytes, 'd' float64."""
    if kind == "i":
        return (int(value) & (2**64 - 1)).to_bytes(8, "little")
    return struct.pack("<fxxxx" if kind == "f" else "<d", value)


@dataclass
class Launch:
    """One kernel over a grid. Arguments, one for each run-time parameter: a Buffer for a pointer (the CPU also takes an
    address), an int, or the 8 bytes of a slot. reads, writes: see CommandList.launch. after: the entries of the list,
    by number, that must have ended before."""

    executable: Executable
    grid: tuple[int, int, int]
    arguments: list[Buffer | int | bytes]
    label: str
    reads: Mapping[int, Span] = field(default_factory=dict)
    writes: Mapping[int, Span] = field(default_factory=dict)
    after: tuple[int, ...] = ()

    def touched(self) -> tuple[list[Span], list[Span]]:
        """The addresses that it reads, and those that it writes."""
        reads: list[Span] = []
        writes: list[Span] = []
        if 0 in self.grid:
            return reads, writes
        for position, argument in enumerate(self.arguments):
            if position in self.reads or position in self.writes:
                address = argument.address if isinstance(argument, Buffer) else _number(argument)
                for given, found in ((self.reads, reads), (self.writes, writes)):
                    if position in given:
                        low, high = given[position]
                        found.append((address + low, address + high))
            elif isinstance(argument, Buffer):
                reads.append(argument.span)
                writes.append(argument.span)
        return reads, writes


@dataclass
class Copy:
    """Bytes from one buffer to another of the same size, which must not overlap it."""

    destination: Buffer
    source: Buffer
    label: str
    after: tuple[int, ...] = ()

    def touched(self) -> tuple[list[Span], list[Span]]:
        return [self.source.span], [self.destination.span]


@dataclass
class Fill:
    """One byte value over a whole buffer."""

    destination: Buffer
    value: int
    label: str
    after: tuple[int, ...] = ()

    def touched(self) -> tuple[list[Span], list[Span]]:
        return [], [self.destination.span]


@dataclass(frozen=True)
class Timestamp:
    """When an entry of a profiled list ran, in nanoseconds of the device's clock: first start to last end."""

    label: str
    start: int
    end: int


class CommandList:
    """Launches and copies, recorded once and submitted many times. It keeps the buffers that it names alive.

    `profile=True` makes each run note when every entry started and ended (`timestamps()`); off, it costs nothing.
    """

    def __init__(self, device: Device):
        self.device = device
        self.entries: list[Launch | Copy | Fill] = []
        self.encoded: Any = None  # the driver's form; made at the first submit, dropped when the list changes
        self.kept: list[Any] = []  # what else must live until it has run: owners of memory given by address
        self.sequence = 0  # of the latest submission
        self._profile = False
        self._hazards: Hazards | None = None  # of the entries, once there are two
        self._frees = Buffer.frees  # when this was its value, no buffer of the list had been freed

    @property
    def profile(self) -> bool:
        return self._profile

    @profile.setter
    def profile(self, on: bool) -> None:
        if on != self._profile:
            self._profile, self.encoded = on, None

    def launch(self, executable: Executable, grid: Sequence[int], arguments: Sequence[Buffer | int | bytes] = (), *,
               reads: Mapping[int, Span] | None = None, writes: Mapping[int, Span] | None = None,
               label: str = "") -> None:
        """Record a kernel launch. grid: one to three extents; missing ones are 1.

        reads, writes: for an argument, by position, the bytes that the kernel reads or writes through it, as first byte
        and one past the last, counted from where the argument points. A buffer of which neither says anything is read
        and written as a whole. An address that is given as a number is memory to the list only if they name it.
        """
        if not 1 <= len(grid) <= 3 or any(not 0 <= int(extent) < 2**31 for extent in grid):
            raise DeviceError(f"grid {tuple(grid)} of kernel {executable.name!r} must have one to three extents, "
                              "each from 0 to 2**31 - 1")
        for position, argument in enumerate(arguments):
            self._check_argument(executable, position, argument)
        for given in (reads or {}, writes or {}):
            if given and not 0 <= min(given) <= max(given) < len(arguments):
                raise DeviceError(f"kernel {executable.name!r} is said to touch memory through arguments "
                                  f"{sorted(given)}; it was given {len(arguments)}, counted from 0")
        x, y, z = (*(int(extent) for extent in grid), 1, 1)[:3]
        self._add(Launch(executable, (x, y, z), list(arguments), label or executable.name, reads or {}, writes or {}))

    def copy(self, destination: Buffer, source: Buffer, *, label: str = "copy") -> None:
        """Record a copy of all bytes of `source` to `destination`."""
        self._use(source)
        self._use(destination, writes=True)
        if source.nbytes != destination.nbytes:
            raise DeviceError(f"a copy from {source.nbytes} bytes to {destination.nbytes} bytes; take views of one "
                              "size")
        if abs(source.address - destination.address) < source.nbytes:
            raise DeviceError(f"a copy of {source.nbytes} bytes overlaps itself; copy through a third buffer")
        self._add(Copy(destination, source, label))

    def fill(self, destination: Buffer, value: int = 0, *, label: str = "fill") -> None:
        """Record setting every byte of `destination` to `value` (0 to 255)."""
        self._use(destination, writes=True)
        if not 0 <= value <= 255:
            raise DeviceError(f"a fill with {value}; expected a byte, 0 to 255")
        self._add(Fill(destination, value, label))

    def timestamps(self) -> list[Timestamp]:
        """Start and end of every entry in the latest run of a profiled list, in the order of recording."""
        if not self._profile or self.encoded is None:
            raise DeviceError("a command list has timestamps after a run with profile=True; set it and run again")
        return self.device.timestamps(self)

    def rebind(self, changes: Mapping[tuple[int, int], Buffer | int | bytes]) -> None:
        """Give launches other arguments: (number of the entry, position) -> a Buffer for a Buffer, a number for a
        number. Everything else stays, also what was said of reads and writes, which counts from the argument.

        The list must not be in flight. On the CPU an encoded list is changed in place; on other devices it is encoded
        again when it is next submitted. If several entries now meet in other places, their dependencies are derived
        anew. Buffers that were replaced are no longer kept. What the kernel was compiled for must be true of the new
        arguments too: divisors of addresses and numbers, which pointers may overlap.

        Raises DeviceError, and changes nothing, for an argument that the device cannot use.
        """
        if self.device.busy(self):
            raise DeviceError("a command list was to get other arguments while it is in flight; wait for its event "
                              "first, or record another list")
        entries: list[Any] = self.entries
        for (number, position), argument in changes.items():
            entry = entries[number] if 0 <= number < len(entries) else None
            if type(entry) is not Launch or not 0 <= position < len(entry.arguments):
                raise DeviceError(f"argument {position} of entry {number} cannot be changed: a list of {len(entries)} "
                                  "entries has no launch with such an argument there")
            before = type(entry.arguments[position])
            if type(argument) is Buffer and before is Buffer:
                if argument.device is not self.device or (argument._root or argument)._freed:
                    argument.check(self.device)
            elif type(argument) is not int or before is Buffer:
                self._check_argument(entry.executable, position, argument)
                if isinstance(argument, Buffer) or before is Buffer:
                    raise DeviceError(f"argument {position} of entry {number} was {entry.arguments[position]!r} and "
                                      f"cannot become {argument!r}; record another list")
        if self.encoded is not None and not self.device.rebind(self, changes):
            self.encoded = None
        for (number, position), argument in changes.items():
            entries[number].arguments[position] = argument
        if self._hazards is not None:
            old, self._hazards = [entry.after for entry in self.entries], Hazards()
            self._derive()
            if [entry.after for entry in self.entries] != old:
                self.encoded = None

    def forget(self, places: Sequence[tuple[Any, ...]], instead: Buffer) -> None:
        """Keep the buffers of these arguments, as (number of the entry, position, ...), no longer; `rebind` must give
        them others before the list is submitted again."""
        entries: list[Any] = self.entries
        for number, position, *_ in places:
            entries[number].arguments[position] = instead
        if not self.device.host_memory:  # an encoded list may hold them too
            self.encoded = None

    def check(self, device: Device) -> None:
        """Raise DeviceError unless the list can be submitted to this device."""
        if self.device is not device:
            raise DeviceError(f"a command list of device {self.device.name!r} was submitted to another device; "
                              "record it on this one")
        if self._frees != (frees := Buffer.frees):
            for entry in self.entries:
                for argument in entry.arguments if isinstance(entry, Launch) else _ends(entry):
                    if isinstance(argument, Buffer) and argument.freed:
                        self.encoded = None  # it may hold the memory
                        raise DeviceError(f"a buffer of {argument.nbytes} bytes in this command list was freed; "
                                          "record it again")
            self._frees = frees

    def _use(self, buffer: Buffer, writes: bool = False) -> None:
        buffer.check(self.device)
        if writes and buffer.read_only:
            raise DeviceError(f"a copy or fill writes to {buffer!r}; allocate a buffer for it instead")

    def _check_argument(self, executable: Executable, position: int, argument: Any) -> None:
        if isinstance(argument, Buffer):
            self._use(argument)
        elif not isinstance(argument, _NUMBERS) and not (isinstance(argument, bytes) and len(argument) == 8):
            raise DeviceError(f"argument {position} of kernel {executable.name!r} is {argument!r}; expected a Buffer, "
                              "an int, or the 8 bytes of a slot")

    def _add(self, entry: Launch | Copy | Fill) -> None:
        self.entries.append(entry)
        self.encoded = None
        if len(self.entries) > 1:
            self._hazards = self._hazards or Hazards()
            self._derive()

    def _derive(self) -> None:
        """What the entries come after that the analysis does not know yet."""
        assert self._hazards is not None
        for entry in self.entries[len(self._hazards):]:
            entry.after = self._hazards.add(*entry.touched())


def _ends(entry: Copy | Fill) -> tuple[Buffer, ...]:
    return (entry.destination, entry.source) if isinstance(entry, Copy) else (entry.destination,)


def _number(argument: int | bytes) -> int:
    return int.from_bytes(argument, "little") if isinstance(argument, bytes) else int(argument)


class Event:
    """The completion of one submission: poll `done`, block in `wait`, or `await` it."""

    def __init__(self, device: Device, sequence: int, commands: CommandList):
        self.device = device
        self.sequence = sequence
        self._commands: CommandList | None = commands  # its buffers live at least until it has run
        self._failure: str | None = None  # "" once it is known that there is none
        commands.sequence = max(commands.sequence, sequence)

    @property
    def done(self) -> bool:
        if self._commands is not None and self.device.poll(self.sequence):
            self._commands = None
        return self._commands is None

    def wait(self, timeout: float | None = None) -> None:
        """Block, with the interpreter lock released, until the submission has run.

        timeout: seconds; without one, this thread works along. Raises TimeoutError when it passes (the work goes on),
        DeviceError when a kernel of this submission reported an error or the device was closed. Ctrl-C surfaces within
        about 50 ms, or when the piece of a kernel that this thread has taken is finished, and leaves the device usable.
        """
        deadline = None if timeout is None else time.monotonic_ns() + int(timeout * 1e9)
        self.device.counters.waits += 1
        while not self.done:
            left = WAIT_SLICE_NS if deadline is None else min(WAIT_SLICE_NS, deadline - time.monotonic_ns())
            if left <= 0:
                raise TimeoutError(f"submission {self.sequence} on {self.device.name!r} is not done after {timeout} s")
            self.device.wait_slice(self.sequence, left, work=deadline is None)
        if self._failure is None:
            self._failure = self.device.failure(self.sequence)
        if self._failure:
            raise DeviceError(self._failure)

    def __await__(self) -> Generator[Any, None, None]:
        if not self.done:  # a thread of the loop's pool waits, the loop goes on
            yield from asyncio.get_running_loop().run_in_executor(None, self.wait).__await__()
        else:
            self.wait()


class Device(Protocol):
    """What a driver provides. `CpuDevice` in cpu.py is the reference."""

    name: str
    target: str  # what kernels are compiled for: see nitinol.compiler.driver
    host_memory: bool  # whether the host sees the memory, at the buffers' addresses
    largest_buffer: int  # bytes
    counters: Counters

    def allocate(self, nbytes: int, shared: bool = False) -> Buffer:
        """Uninitialised memory, 64-byte aligned. Raises DeviceError when not enough memory is available.

        shared: for a few bytes that the host reads again and again. Where host and device have memories of their own
        this is the host's: reading and writing it needs no transfer, but kernels are slow at it.
        """

    def wrap(self, memory: Any, progress: Progress | None = None) -> Buffer:
        """Host memory (anything with the buffer protocol: an array, an mmap) as a buffer: in place if the device can,
        else as a copy. progress: told of a large copy, bytes done and bytes in all."""

    def release(self, buffer: Buffer) -> None:
        """Called by Buffer when it is freed or collected."""

    def read(self, buffer: Buffer, destination: np.ndarray) -> None:
        """All bytes of the buffer to a uint8 array of that length, after everything submitted so far."""

    def write(self, buffer: Buffer, source: np.ndarray) -> None:
        """A uint8 array of the buffer's length to the buffer, after everything submitted so far."""

    @property
    def description(self) -> str:
        """For people: the processor's name, and what it works with."""

    def available_memory(self) -> int:
        """Bytes that can still be allocated; 0 when nobody knows."""

    def command_list(self) -> CommandList:
        """An empty command list."""

    def submit(self, commands: CommandList) -> Event:
        """Start a list, after everything submitted before; returns at once."""

    def run(self, commands: CommandList) -> None:
        """Submit and wait, by the quickest route."""

    def poll(self, sequence: int) -> bool:
        """Whether that submission has finished."""

    def wait_slice(self, sequence: int, nanoseconds: int, work: bool) -> None:
        """Block until that submission has finished, about so long at most.

        work: the calling thread may run pieces of kernels meanwhile, each of which can take it past the time.
        """

    def submission(self, commands: CommandList) -> int:
        """The number of the list's latest submission that has reached the device, also if an exception from outside
        (Ctrl-C) has ended the call that submitted it; 0 if there is none, or if the latest call has submitted nothing.
        """

    def busy(self, commands: CommandList) -> bool:
        """Whether a submission of that list has not ended."""

    def rebind(self, commands: CommandList, changes: Mapping[tuple[int, int], Buffer | int | bytes]) -> bool:
        """Write checked arguments (see CommandList.rebind) into the encoded list; False if it must be encoded again."""

    def synchronize(self) -> None:
        """Wait for everything submitted so far. Raises DeviceError for a failed submission of the calling thread that
        nobody has been told of; another thread's failure is told by that thread's wait."""

    def failure(self, sequence: int) -> str:
        """What went wrong in a submission that has ended, as a sentence, "" if nothing did; told once."""

    def timestamps(self, commands: CommandList) -> list[Timestamp]:
        """See CommandList.timestamps."""

    def close(self) -> None:
        """Stop; work in flight is abandoned between two chunks of a kernel."""

"""Memory of the Metal driver: MTLBuffers in shared storage, pooled, or over pages of mapped files."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections import defaultdict
from typing import Any

import numpy as np

from nitinol.runtime.device import Counters, DeviceError
from nitinol.runtime.memory import size_class


class Memory:
    """Host memory that the GPU sees, as one MTLBuffer; if that would be too long, as several that overlap."""

    def __init__(self, heap: Heap, address: int, nbytes: int, host: Any = None):
        self.heap, self.address, self.nbytes = heap, address, nbytes
        self.host = host  # what is wrapped; None: memory of the pool
        self.sequence = 0  # the last submission that may still use it when it was freed
        self.windows: list[tuple[int, int, Any]] = []  # first byte, last + 1, MTLBuffer

    def add(self, address: int, nbytes: int, buffer: Any) -> None:
        self.windows.append((address, address + nbytes, buffer))
        self.heap.counters.allocations += 1
        self.heap.change(buffer, nbytes)

    def __del__(self) -> None:
        for start, end, buffer in self.windows:
            self.heap.change(buffer, start - end)
        if self.host is not None:
            self.heap.commit()  # until then the set holds what may be unmapped soon


class Heap:
    """The pool, and the residency set (macOS 15 and newer): what the GPU may touch, named once for all submissions."""

    def __init__(self, metal: Any, device: Any, queue: Any, lock: threading.RLock, counters: Counters):
        self.device, self.counters, self.lock = device, counters, lock
        self.name, self.largest = str(device.name()), int(device.maxBufferLength())
        # Untracked: Metal looks for no dependencies between commands; the driver has barriers and a fence.
        self.options = metal.MTLResourceStorageModeShared | metal.MTLResourceHazardTrackingModeUntracked
        self.free: defaultdict[int, list[Memory]] = defaultdict(list)  # by size class
        # The pool's memory that is not free. Without this reference, memory in a cycle of garbage would be finalised,
        # so leave the residency set, before the finaliser of its Buffer puts it back into the pool.
        self.used: set[Memory] = set()
        self.process = os.getpid()
        self.residency: Any = None
        self.changed = False
        if hasattr(device, "newResidencySetWithDescriptor_error_"):
            descriptor = metal.MTLResidencySetDescriptor.alloc().init()
            self.residency, _ = device.newResidencySetWithDescriptor_error_(descriptor, None)
        if self.residency is not None:
            queue.addResidencySet_(self.residency)

    def change(self, buffer: Any, nbytes: int) -> None:
        """An MTLBuffer comes, or with negative `nbytes` goes."""
        if os.getpid() != self.process:
            return
        with self.lock:
            self.counters.bytes_reserved += nbytes
            if self.residency is not None:
                self.changed = True
                change = self.residency.addAllocation_ if nbytes > 0 else self.residency.removeAllocation_
                change(buffer)

    def commit(self) -> None:
        """Makes the residency set's changes valid, for what is submitted from now on."""
        if self.changed and os.getpid() == self.process:
            with self.lock:
                self.changed = False
                self.residency.commit()
                self.residency.requestResidency()

    def allocate(self, nbytes: int, done: int) -> Memory:
        """Memory of the pool of at least `nbytes`; `done` is the last finished submission."""
        free = self.free[size_class(nbytes)]
        memory = next((m for m in reversed(free) if m.nbytes >= nbytes and m.sequence <= done), None)
        if memory is not None:
            free.remove(memory)
            self.counters.pool_hits += 1
        else:
            # New memory has exactly this length, so that checks of bounds are exact. Free memory that is too short
            # for its class would pile up: it goes.
            free[:] = [m for m in free if m.sequence > done]
            memory = self._new(max(nbytes, 1), done)
        self.used.add(memory)
        self.counters.bytes_in_use += memory.nbytes
        return memory

    def release(self, memory: Memory, submitted: int) -> None:
        """Back to the pool, for use after the last submission so far."""
        self.counters.bytes_in_use -= memory.nbytes
        memory.sequence = submitted
        self.used.discard(memory)
        self.free[size_class(memory.nbytes)].append(memory)

    def wrap(self, view: np.ndarray, done: int) -> Memory:
        """Mapped memory in place."""
        self._check_room(view.nbytes, done)
        memory = Memory(self, view.ctypes.data, view.nbytes, view)
        if view.nbytes + 2 * mmap.PAGESIZE <= self.largest:
            self.window(memory, memory.address, memory.nbytes)
        return memory

    def window(self, memory: Memory, address: int, nbytes: int) -> tuple[Any, int]:
        """The MTLBuffer that holds these bytes, and where; of wrapped memory it is made here if there is none yet."""
        for first, last, buffer in memory.windows:
            if first <= address and address + nbytes <= last:
                return buffer, address - first
        start, end = _page(address), _page(memory.address + memory.nbytes + mmap.PAGESIZE - 1)
        length = min(end - start, _page(self.largest))
        if address + nbytes > start + length:
            raise DeviceError(f"an array uses {nbytes / 1e6:.1f} MB of wrapped memory, and {self.name} allows "
                              f"{self.largest / 1e6:.1f} MB; use smaller tensors")
        pages = (ctypes.c_char * length).from_address(start)
        buffer = self.device.newBufferWithBytesNoCopy_length_options_deallocator_(pages, length, self.options, None)
        if buffer is None:
            raise DeviceError(f"Metal cannot use {length / 1e6:.1f} MB of mapped memory in place; read the file into "
                              "an array instead")
        memory.add(start, length, buffer)
        return buffer, address - start

    def left(self) -> int:
        """Bytes of the working set that the system recommends which are not allocated."""
        self.commit()
        return int(self.device.recommendedMaxWorkingSetSize()) - int(self.device.currentAllocatedSize())

    def pooled(self, done: int) -> int:
        """Bytes of free memory of the pool."""
        return sum(memory.nbytes for free in self.free.values() for memory in free if memory.sequence <= done)

    def _check_room(self, nbytes: int, done: int) -> None:
        """Raise DeviceError if the memory is not there, even after the pool has given back what it has."""
        if nbytes > self.left():
            for free in self.free.values():
                free[:] = [memory for memory in free if memory.sequence > done]
        if nbytes > (left := self.left()):
            limit = int(self.device.recommendedMaxWorkingSetSize())
            raise DeviceError(f"{nbytes / 1e6:.1f} MB are needed, but of the {limit / 1e6:.1f} MB that {self.name} "
                              f"should use at most, {max(0, left) / 1e6:.1f} MB are left; use a smaller model, context "
                              "or batch")

    def _new(self, nbytes: int, done: int) -> Memory:
        if nbytes > self.largest:
            raise DeviceError(f"a buffer of {nbytes / 1e6:.1f} MB is longer than {self.name} allows "
                              f"({self.largest / 1e6:.1f} MB); use several smaller ones")
        self._check_room(nbytes, done)
        buffer = self.device.newBufferWithLength_options_(nbytes, self.options)
        if buffer is None:
            raise DeviceError(f"Metal refused a buffer of {nbytes / 1e6:.1f} MB, with {self.left() / 1e6:.1f} MB left "
                              "of what it should use at most; close other programs, or use a smaller model")
        memory = Memory(self, np.frombuffer(buffer.contents().as_buffer(nbytes), np.uint8).ctypes.data, nbytes)
        memory.add(memory.address, nbytes, buffer)
        return memory


def is_mapped(memory: Any) -> bool:
    """Whether memory lies in an mmap: then the pages that it begins and ends in are there, and in one piece."""
    while memory is not None and not isinstance(memory, mmap.mmap):
        memory = memory.obj if isinstance(memory, memoryview) else getattr(memory, "base", None)
    return memory is not None


def _page(address: int) -> int:
    return address // mmap.PAGESIZE * mmap.PAGESIZE

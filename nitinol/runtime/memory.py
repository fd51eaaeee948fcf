"""Host memory for the CPU device: a pool of size classes over anonymous mappings, and what the machine has left."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nitinol.runtime.device import Counters, DeviceError

SMALL = 1 << 16  # up to here blocks are powers of two, cut from slabs; above, each has a mapping of its own
SLAB = 1 << 20
HUGE_PAGE = 1 << 21


@dataclass(eq=False, slots=True)
class Block:
    """Memory of one size class. `sequence`: the last submission that may still touch it when it was freed."""

    address: int
    nbytes: int
    mapping: Any  # keeps the memory alive; it goes when the last reference does
    sequence: int = 0


def size_class(nbytes: int) -> int:
    """The size that is really allocated: a power of two up to 64 KiB, then eight steps an octave (≤ 14% waste)."""
    if nbytes <= SMALL:
        return max(64, 1 << max(nbytes - 1, 0).bit_length())
    step = max(mmap.PAGESIZE, 1 << ((nbytes - 1).bit_length() - 4))
    return -(-nbytes // step) * step


def available_memory() -> int:
    """Bytes that can be allocated without swapping: MemAvailable on Linux, else free or physical memory."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return total_memory("SC_AVPHYS_PAGES")


def total_memory(pages: str = "SC_PHYS_PAGES") -> int:
    """Bytes of physical memory; 0 when the system does not say."""
    for name in (pages, "SC_PHYS_PAGES"):
        try:
            return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError, AttributeError):  # macOS has no SC_AVPHYS_PAGES
            continue
    return 0


def map_memory(nbytes: int) -> np.ndarray:
    """A fresh anonymous mapping as bytes, page-aligned, on huge pages where large and possible."""
    available = available_memory()
    if available and nbytes > available:
        raise DeviceError(f"{nbytes / 1e6:.0f} MB are needed, but only {available / 1e6:.0f} MB of memory are "
                          "available; use a smaller model, context or batch, or close other programs")
    try:
        # Private: Python's default would share it with forked children, who would write into each other's arrays.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        mapping = mmap.mmap(-1, nbytes, **private)
    except (OSError, OverflowError) as error:
        raise DeviceError(f"the operating system refused {nbytes / 1e6:.0f} MB of memory ({error})") from None
    if nbytes >= 2 * HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapping, np.uint8)


class Pool:
    """Blocks by size class. Freed blocks are used again once the submissions that may touch them are done."""

    def __init__(self, counters: Counters):
        self.counters = counters
        self._free: dict[int, list[Block]] = defaultdict(list)
        # Without this reference, a mapping in a cycle of garbage would be finalised (given back to the GPU) before the
        # finaliser of its Buffer puts the block back into the pool.
        self._used: set[Block] = set()
        self._lock = threading.RLock()  # re-entrant: the collector may free a buffer in the middle of allocate

    def allocate(self, nbytes: int, done: int) -> Block:
        """A block of at least `nbytes`; `done` is the last finished submission."""
        size = size_class(nbytes)
        with self._lock:
            free = self._free[size]
            if free and free[-1].sequence <= done:  # nearly always
                index = len(free) - 1
            else:
                index = next((i for i in reversed(range(len(free))) if free[i].sequence <= done), -1)
            if index >= 0:
                block = free.pop(index)
                self.counters.pool_hits += 1
            elif size <= SMALL:
                block = self._cut(size)
            else:
                block = self._map(size)
            self._used.add(block)
            self.counters.bytes_in_use += size
            return block

    def release(self, block: Block, submitted: int) -> None:
        """Take a block back; `submitted` is the last submission so far."""
        with self._lock:
            block.sequence = submitted
            self._used.discard(block)
            self._free[block.nbytes].append(block)
            self.counters.bytes_in_use -= block.nbytes

    def trim(self, done: int) -> None:
        """Give large free blocks back to the operating system."""
        with self._lock:
            for size in [size for size in self._free if size > SMALL]:
                blocks = self._free.pop(size)
                kept = [block for block in blocks if block.sequence > done]
                self.counters.bytes_reserved -= size * (len(blocks) - len(kept))
                self._free[size].extend(kept)

    def _map(self, size: int) -> Block:
        mapping = map_memory(size)
        self.counters.allocations += 1
        self.counters.bytes_reserved += size
        return Block(mapping.ctypes.data, size, mapping)

    def _cut(self, size: int) -> Block:
        slab = self._map(SLAB)
        first, *rest = (Block(slab.address + offset, size, slab.mapping) for offset in range(0, SLAB, size))
        self._free[size].extend(reversed(rest))
        return first

    def after_fork(self) -> None:
        """A new lock: another thread may have held it when the process was forked."""
        self._lock = threading.RLock()

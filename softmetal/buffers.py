"""Memory: buffers, heaps, residency sets."""

from __future__ import annotations

import ctypes
import mmap
import weakref
from typing import TYPE_CHECKING, Any

from softmetal.objects import Labelled, Named, UsageError

if TYPE_CHECKING:
    from softmetal.device import Device
PAGE = mmap.PAGESIZE


class PyBuffer(ctypes.Structure):
    """CPython's Py_buffer: the only way to the address of read-only memory without NumPy."""

    _fields_ = [
        ("buf", ctypes.c_void_p), ("obj", ctypes.c_void_p), ("len", ctypes.c_ssize_t), ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int), ("ndim", ctypes.c_int), ("format", ctypes.c_char_p), ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p), ("suboffsets", ctypes.c_void_p), ("internal", ctypes.c_void_p),
    ]  # fmt: skip


def export(memory: Any) -> tuple[int, int, Any]:
    """Address and length of an object's memory, and what releases it again."""
    if isinstance(memory, int):
        return memory, -1, None
    view = PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(memory), ctypes.byref(view), 0)
    return int(view.buf or 0), int(view.len), lambda: ctypes.pythonapi.PyBuffer_Release(ctypes.byref(view))


class Memory:
    """What `contents()` returns, like pyobjc's varlist."""

    def __init__(self, view: memoryview) -> None:
        self._view = view

    def as_buffer(self, count: int) -> memoryview:
        """The first `count` bytes, writable."""
        if count > len(self._view):
            raise UsageError(f"as_buffer({count}) of a buffer with {len(self._view)} bytes")
        return self._view[:count]

    def as_tuple(self, count: int) -> tuple[bytes, ...]:
        return tuple(bytes(self._view[i : i + 1]) for i in range(count))

    def __getitem__(self, at: Any) -> Any:
        return self._view[at]


class Resource(Labelled):
    _options = 0

    def storageMode(self) -> int:
        return self._options >> 4 & 15

    def cpuCacheMode(self) -> int:
        return self._options & 15

    def hazardTrackingMode(self) -> int:
        return self._options >> 8 & 3

    def resourceOptions(self) -> int:
        return self._options

    def setPurgeableState_(self, state: int) -> int:
        return 2

    def heap(self) -> Any:
        return None

    def heapOffset(self) -> int:
        return 0


class Buffer(Resource):
    """An MTLBuffer: host memory, followed by a page that faults."""

    _protocol = "MTLBuffer"

    def __init__(self, device: Device, length: int, options: int, memory: tuple[int, Any] | None = None) -> None:
        self._device, self._length, self._options = device, length, options
        self._map: Any = None
        if memory is None:
            size = (length + PAGE - 1) // PAGE * PAGE
            self._map = mmap.mmap(-1, size + PAGE)
            self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
            ctypes.CDLL(None).mprotect(ctypes.c_void_p(self.address + size), ctypes.c_size_t(PAGE), 0)
        else:
            self.address, self._map = memory
        device._allocated += length
        device._buffers[self.address] = self
        weakref.finalize(self, device._forget, length)

    def contents(self) -> Memory | None:
        if self.storageMode() == 2:
            return None
        return Memory(self._view())

    def _view(self) -> memoryview:
        if isinstance(self._map, mmap.mmap):
            return memoryview(self._map)[: self._length]
        array: Any = (ctypes.c_ubyte * self._length).from_address(self.address)
        array._keep = self
        return memoryview(array).cast("B")

    def length(self) -> int:
        return self._length

    def allocatedSize(self) -> int:
        return (self._length + PAGE - 1) // PAGE * PAGE

    def gpuAddress(self) -> int:
        return self.address

    def didModifyRange_(self, range: Any) -> None:
        pass

    def addDebugMarker_range_(self, marker: str, range: Any) -> None:
        pass

    def removeAllDebugMarkers(self) -> None:
        pass


class Heap(Labelled):
    """An MTLHeap; its buffers are ordinary ones, counted against its size."""

    _protocol = "MTLHeap"

    def __init__(self, device: Device, size: int, options: int) -> None:
        self._device, self._size, self._options, self._used = device, size, options, 0

    def newBufferWithLength_options_(self, length: int, options: int) -> Buffer | None:
        if length < 1 or self._used + length > self._size:
            return None
        self._used += (length + PAGE - 1) // PAGE * PAGE
        return Buffer(self._device, length, options)

    def maxAvailableSizeWithAlignment_(self, alignment: int) -> int:
        return max(0, self._size - self._used)

    def size(self) -> int:
        return self._size

    def usedSize(self) -> int:
        return self._used

    def currentAllocatedSize(self) -> int:
        return self._size

    def allocatedSize(self) -> int:
        return self._size

    def storageMode(self) -> int:
        return self._options >> 4 & 15

    def resourceOptions(self) -> int:
        return self._options


class ResidencySet(Named):
    _protocol = "MTLResidencySet"

    def __init__(self, device: Device, label: str | None) -> None:
        self._device, self._label = device, label
        self._pending: dict[int, Any] = {}
        self._members: dict[int, Any] = {}

    def addAllocation_(self, allocation: Any) -> None:
        self._pending[id(allocation)] = allocation

    def addAllocations_count_(self, allocations: Any, count: int) -> None:
        for a in list(allocations)[:count]:
            self.addAllocation_(a)

    def removeAllocation_(self, allocation: Any) -> None:
        self._pending.pop(id(allocation), None)

    def removeAllocations_count_(self, allocations: Any, count: int) -> None:
        for a in list(allocations)[:count]:
            self.removeAllocation_(a)

    def removeAllAllocations(self) -> None:
        self._pending.clear()

    def containsAllocation_(self, allocation: Any) -> bool:
        return id(allocation) in self._pending

    def commit(self) -> None:
        self._members = dict(self._pending)

    def requestResidency(self) -> None:
        pass

    def endResidency(self) -> None:
        pass

    def allAllocations(self) -> tuple[Any, ...]:
        return tuple(self._pending.values())

    def allocationCount(self) -> int:
        return len(self._pending)

    def allocatedSize(self) -> int:
        return sum(a.allocatedSize() for a in self._pending.values())

"""The device and what it makes: buffers, libraries, functions, pipelines, events, residency sets, heaps."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from softmetal import compile, modes, native, objects
from softmetal.objects import Labelled, MTLSizeAndAlign, Named, NSError, UsageError
from softmetal.source import Kernel, MetalError

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
        array = (ctypes.c_ubyte * self._length).from_address(self.address)
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


class Library(Labelled):
    _protocol = "MTLLibrary"

    def __init__(self, device: Device, compiled: compile.Compiled) -> None:
        self._device, self._compiled = device, compiled
        self._kernels = {k.name: n for n, k in enumerate(compiled.kernels)}

    def functionNames(self) -> tuple[str, ...]:
        return tuple(self._kernels)

    def newFunctionWithName_(self, name: str) -> Function | None:
        return Function(self, self._kernels[name], {}) if name in self._kernels else None

    def newFunctionWithName_constantValues_error_(self, name: str, values: Any, error: Any) -> tuple[Any, Any]:
        if name not in self._kernels:
            return None, NSError("MTLLibraryErrorDomain", 5, f"the library has no function '{name}'; it has "
                                 f"{', '.join(self._kernels) or 'none'}")  # fmt: skip
        by_index = {c.index: c.name for c in self._compiled.constants}
        known = set(by_index.values())
        given = {(by_index.get(k, "") if isinstance(k, int) else k): v for k, v in (values._given if values else {}).items()}
        return Function(self, self._kernels[name], {k: v for k, v in given.items() if k in known}), None

    def newFunctionWithDescriptor_error_(self, descriptor: Any, error: Any) -> tuple[Any, Any]:
        return self.newFunctionWithName_constantValues_error_(descriptor.name(), descriptor.constantValues(), error)

    def type(self) -> int:
        return 0

    def installName(self) -> None:
        return None


class Function(Labelled):
    _protocol = "MTLFunction"

    def __init__(self, library: Library, number: int, values: dict[str, str]) -> None:
        self._library, self._device = library, library._device
        self._number, self._values = number, values
        self._kernel: Kernel = library._compiled.kernels[number]

    def name(self) -> str:
        return self._kernel.name

    def functionType(self) -> int:
        return 3

    def functionConstantsDictionary(self) -> dict[str, Any]:
        return {c.name: c for c in self._library._compiled.constants}


class Pipeline(Named):
    """An MTLComputePipelineState; machine code for plain and for instrumented execution, made when needed."""

    _protocol = "MTLComputePipelineState"
    _all: weakref.WeakValueDictionary[int, Pipeline] = weakref.WeakValueDictionary()

    def __init__(self, function: Function, label: str | None = None, limit: int = 0) -> None:
        self._device, self._function, self._label = function._device, function, label
        self.kernel, self.number = function._kernel, function._number
        self.limit = min(self.kernel.max_threads, limit or 1024)
        self.serial = len(Pipeline._all) + 1
        while self.serial in Pipeline._all:
            self.serial += 1
        Pipeline._all[self.serial] = self
        self._codes: dict[bool, native.Code] = {}
        self.buffers = [a for a in self.kernel.arguments if a.kind == "buffer"]
        self.memories = [a for a in self.kernel.arguments if a.kind == "threadgroup"]
        self.static_bytes = self.code(modes.instrumented()).threadgroup_bytes(self.number)

    def code(self, instrumented: bool) -> native.Code:
        if instrumented not in self._codes:
            library = self._function._library._compiled
            self._codes[instrumented] = loaded(str(library.library(self.number, self._function._values, instrumented)))
        return self._codes[instrumented]

    def maxTotalThreadsPerThreadgroup(self) -> int:
        return self.limit

    def threadExecutionWidth(self) -> int:
        return 32

    def staticThreadgroupMemoryLength(self) -> int:
        return self.static_bytes

    def supportIndirectCommandBuffers(self) -> bool:
        return True

    def allocatedSize(self) -> int:
        return 0


_codes: dict[str, native.Code] = {}


def loaded(path: str) -> native.Code:
    if path not in _codes:
        _codes[path] = native.Code(path)
    return _codes[path]


class Event(Labelled):
    _protocol = "MTLEvent"

    def __init__(self, device: Device) -> None:
        self._device, self._value = device, 0
        self._changed = threading.Condition()
        self._listeners: list[tuple[int, Callable[..., None]]] = []

    def _signal(self, value: int) -> None:
        with self._changed:
            self._value = max(self._value, value)
            self._changed.notify_all()
            due = [x for x in self._listeners if x[0] <= self._value]
            self._listeners = [x for x in self._listeners if x[0] > self._value]
        for at, block in due:
            block(self, at)

    def _wait(self, value: int, seconds: float | None = None) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._value >= value, seconds)


class SharedEvent(Event):
    _protocol = "MTLSharedEvent"

    def signaledValue(self) -> int:
        return self._value

    def setSignaledValue_(self, value: int) -> None:
        with self._changed:
            self._value = 0
        self._signal(int(value))

    def waitUntilSignaledValue_timeoutMS_(self, value: int, milliseconds: int) -> bool:
        return self._wait(int(value), min(int(milliseconds) / 1000, 1e6))

    def notifyListener_atValue_block_(self, listener: Any, value: int, block: Callable[..., None]) -> None:
        with self._changed:
            if self._value < value:
                self._listeners.append((int(value), block))
                return
        block(self, value)

    def newSharedEventHandle(self) -> SharedEvent:
        return self


class SharedEventListener(objects.Descriptor):
    """An MTLSharedEventListener; blocks run on the thread that signals."""

    def initWithDispatchQueue_(self, queue: Any) -> SharedEventListener:
        return self

    @classmethod
    def sharedListener(cls) -> SharedEventListener:
        return cls()


class Fence(Labelled):
    _protocol = "MTLFence"

    def __init__(self, device: Device) -> None:
        self._device = device


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


class Device:
    """The software MTLDevice."""

    _protocol = "MTLDevice"

    def __init__(self) -> None:
        self._allocated = 0
        self._buffers: weakref.WeakValueDictionary[int, Buffer] = weakref.WeakValueDictionary()
        native.runtime()

    def _forget(self, length: int) -> None:
        self._allocated -= length

    # ---- what it is
    def name(self) -> str:
        return "softmetal"

    def registryID(self) -> int:
        return 1

    def hasUnifiedMemory(self) -> bool:
        return True

    def isLowPower(self) -> bool:
        return False

    def isHeadless(self) -> bool:
        return True

    def isRemovable(self) -> bool:
        return False

    def recommendedMaxWorkingSetSize(self) -> int:
        return objects.limits.get("working_set_bytes") or objects.memory_bytes() * 3 // 4

    def maxBufferLength(self) -> int:
        return objects.limits.get("buffer_bytes") or objects.memory_bytes() // 2

    def currentAllocatedSize(self) -> int:
        return self._allocated

    def maxThreadsPerThreadgroup(self) -> objects.MTLSize:
        return objects.MTLSize(1024, 1024, 1024)

    def maxThreadgroupMemoryLength(self) -> int:
        return 32768

    def supportsFamily_(self, family: int) -> bool:
        newest = objects.limits.get("family") or int(os.environ.get("SOFTMETAL_FAMILY", "9"))
        return 1001 <= family <= 1000 + newest or family in (2002, 3001, 3002, 3003, 5001)

    def argumentBuffersSupport(self) -> int:
        return 1

    def supportsDynamicLibraries(self) -> bool:
        return False

    def supportsFunctionPointers(self) -> bool:
        return False

    def supportsRaytracing(self) -> bool:
        return False

    def sampleTimestamps_gpuTimestamp_(self, cpu: Any, gpu: Any) -> tuple[int, int]:
        now = time.monotonic_ns()
        return now, now

    # ---- memory
    def newBufferWithLength_options_(self, length: int, options: int) -> Buffer | None:
        if length < 1 or length > self.maxBufferLength():
            return None
        modes.count("allocations")
        with contextlib.suppress(OSError, OverflowError, ValueError):
            return Buffer(self, int(length), int(options))
        return None

    def newBufferWithBytes_length_options_(self, data: Any, length: int, options: int) -> Buffer | None:
        buffer = self.newBufferWithLength_options_(length, options)
        if buffer is not None:
            address, available, release = export(data)
            if available >= 0 and available < length:
                raise UsageError(f"newBufferWithBytes: length is {length}, but there are {available} bytes")
            ctypes.memmove(buffer.address, address, length)
            if release:
                release()
        return buffer

    def newBufferWithBytesNoCopy_length_options_deallocator_(
        self, memory: Any, length: int, options: int, deallocator: Callable[..., None] | None
    ) -> Buffer | None:
        address, available, release = export(memory)
        if address % PAGE or length % PAGE or length < 1 or 0 <= available < length:
            if release:
                release()
            raise UsageError(f"newBufferWithBytesNoCopy: address {address:#x} and length {length} must be multiples of the page size "
                             f"({PAGE}), and the memory must be that long ({available} bytes given)")  # fmt: skip
        if length > self.maxBufferLength():
            return None
        modes.count("allocations")
        buffer = Buffer(self, int(length), int(options), (address, memory))
        if release:
            weakref.finalize(buffer, release).atexit = False
        if deallocator:
            weakref.finalize(buffer, deallocator, memory, length).atexit = False
        return buffer

    def heapBufferSizeAndAlignWithLength_options_(self, length: int, options: int) -> MTLSizeAndAlign:
        return MTLSizeAndAlign((length + PAGE - 1) // PAGE * PAGE, PAGE)

    def newHeapWithDescriptor_(self, descriptor: Any) -> Heap:
        return Heap(self, descriptor.size(), descriptor.storageMode() << 4 | descriptor.resourceOptions())

    def newResidencySetWithDescriptor_error_(self, descriptor: Any, error: Any) -> tuple[ResidencySet, None]:
        return ResidencySet(self, descriptor.label()), None

    # ---- code
    def newLibraryWithSource_options_error_(self, source: str, options: Any, error: Any) -> tuple[Any, Any]:
        macros = {str(k): str(v) for k, v in ((options.preprocessorMacros() if options else None) or {}).items()}
        try:
            return Library(self, compile.Compiled(str(source), macros)), None
        except MetalError as e:
            return None, NSError("MTLLibraryErrorDomain", 3, str(e))

    def newComputePipelineStateWithFunction_error_(self, function: Any, error: Any) -> tuple[Any, Any]:
        if function is None:
            raise UsageError("newComputePipelineStateWithFunction: the function is None (was its name in the library?)")
        return self._pipeline(function, None, 0)

    def newComputePipelineStateWithFunction_options_reflection_error_(
        self, function: Any, options: int, reflection: Any, error: Any
    ) -> tuple[Any, Any, Any]:
        pipeline, problem = self.newComputePipelineStateWithFunction_error_(function, error)
        return pipeline, None, problem

    def newComputePipelineStateWithDescriptor_options_reflection_error_(
        self, descriptor: Any, options: int, reflection: Any, error: Any
    ) -> tuple[Any, Any, Any]:
        if descriptor.computeFunction() is None:
            raise UsageError("newComputePipelineStateWithDescriptor: computeFunction is not set")
        pipeline, problem = self._pipeline(
            descriptor.computeFunction(), descriptor.label(), descriptor.maxTotalThreadsPerThreadgroup()
        )
        return pipeline, None, problem

    def _pipeline(self, function: Function, label: str | None, limit: int) -> tuple[Any, Any]:
        try:
            pipeline = Pipeline(function, label, limit)
        except MetalError as e:
            return None, NSError("AGXMetalSoft", 3, f"the kernel '{function.name()}' does not compile: {e}")
        if pipeline.static_bytes > 32768:
            return None, NSError("AGXMetalSoft", 3, f"the kernel '{function.name()}' declares {pipeline.static_bytes} bytes of "
                                 "threadgroup memory; the limit is 32768")  # fmt: skip
        return pipeline, None

    # ---- work
    def newCommandQueue(self) -> Any:
        from softmetal.commands import CommandQueue

        return CommandQueue(self)

    def newCommandQueueWithMaxCommandBufferCount_(self, count: int) -> Any:
        return self.newCommandQueue()

    def newCommandQueueWithDescriptor_(self, descriptor: Any) -> Any:
        return self.newCommandQueue()

    def newIndirectCommandBufferWithDescriptor_maxCommandCount_options_(self, descriptor: Any, count: int, options: int) -> Any:
        from softmetal.commands import IndirectCommandBuffer

        return IndirectCommandBuffer(self, descriptor, count, options)

    def newEvent(self) -> Event:
        return Event(self)

    def newSharedEvent(self) -> SharedEvent:
        return SharedEvent(self)

    def newSharedEventWithHandle_(self, handle: SharedEvent) -> SharedEvent:
        return handle

    def newFence(self) -> Fence:
        return Fence(self)

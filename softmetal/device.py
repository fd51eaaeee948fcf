"""The device: what it says of itself, and what it makes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
import weakref
from collections.abc import Callable
from typing import Any

from softmetal import archive, compile, modes, native, objects
from softmetal.buffers import PAGE, Buffer, Heap, ResidencySet, export
from softmetal.commands import CommandQueue
from softmetal.events import Event, Fence, SharedEvent
from softmetal.indirect import IndirectCommandBuffer
from softmetal.library import Function, Library, Pipeline
from softmetal.objects import MTLSizeAndAlign, NSError, UsageError
from softmetal.parse import MetalError


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
        return int(objects.limits.get("working_set_bytes") or 0) or objects.memory_bytes() * 3 // 4

    def maxBufferLength(self) -> int:
        return int(objects.limits.get("buffer_bytes") or 0) or objects.memory_bytes() // 2

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
            raise UsageError(f"newBufferWithBytesNoCopy: address {address:#x} and length {length} must be multiples "
                             f"of the page size ({PAGE}), and the memory that long ({available} given)")  # fmt: skip
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
        version = options.languageVersion() if options else 0x30002
        try:
            return Library(self, compile.Compiled(str(source), {**compile.language(version), **macros})), None
        except MetalError as e:
            return None, NSError("MTLLibraryErrorDomain", 3, str(e))

    def newComputePipelineStateWithFunction_error_(self, function: Any, error: Any) -> tuple[Any, Any]:
        if function is None:
            raise UsageError("newComputePipelineStateWithFunction: the function is None (was its name in the library?)")
        return self._pipeline(function, None, 0)

    def newComputePipelineStateWithFunction_options_reflection_error_(
        self, function: Any, options: int, reflection: Any, error: Any
    ) -> tuple[Any, Any]:
        return self.newComputePipelineStateWithFunction_error_(function, error)

    def newComputePipelineStateWithDescriptor_options_reflection_error_(
        self, descriptor: Any, options: int, reflection: Any, error: Any
    ) -> tuple[Any, Any]:
        if descriptor.computeFunction() is None:
            raise UsageError("newComputePipelineStateWithDescriptor: computeFunction is not set")
        function = descriptor.computeFunction()
        path = function._library._compiled.library_path(function._number, function._values, modes.instrumented())
        found = [a._unpack(path) for a in descriptor.binaryArchives() or ()]
        if options & 4 and not any(found):  # MTLPipelineOptionFailOnBinaryArchiveMiss
            text = f"the kernel '{function.name()}' is in none of the binary archives"
            return None, NSError(archive.DOMAIN, archive.UNEXPECTED, text)
        return self._pipeline(
            function, descriptor.label(), descriptor.maxTotalThreadsPerThreadgroup(),
            bool(descriptor.supportIndirectCommandBuffers()),
        )  # fmt: skip

    def newBinaryArchiveWithDescriptor_error_(self, descriptor: Any, error: Any) -> tuple[Any, Any]:
        return archive.read(self, descriptor.url())

    def _pipeline(self, function: Function, label: str | None, limit: int, indirect: bool = False) -> tuple[Any, Any]:
        try:
            pipeline = Pipeline(function, label, limit, indirect)
        except MetalError as e:
            return None, NSError("AGXMetalSoft", 3, f"the kernel '{function.name()}' does not compile: {e}")
        if pipeline.static_bytes > 32768:
            return None, NSError("AGXMetalSoft", 3, f"the kernel '{function.name()}' declares {pipeline.static_bytes} "
                                 "bytes of threadgroup memory; the limit is 32768")  # fmt: skip
        return pipeline, None

    # ---- work
    def newCommandQueue(self) -> Any:
        return CommandQueue(self)

    def newCommandQueueWithMaxCommandBufferCount_(self, count: int) -> Any:
        return self.newCommandQueue()

    def newCommandQueueWithDescriptor_(self, descriptor: Any) -> Any:
        return self.newCommandQueue()

    def newIndirectCommandBufferWithDescriptor_maxCommandCount_options_(
        self, descriptor: Any, count: int, options: int
    ) -> Any:
        return IndirectCommandBuffer(self, descriptor, count, options)

    def newEvent(self) -> Event:
        return Event(self)

    def newSharedEvent(self) -> SharedEvent:
        return SharedEvent(self)

    def newSharedEventWithHandle_(self, handle: SharedEvent) -> SharedEvent:
        return handle

    def newFence(self) -> Fence:
        return Fence(self)

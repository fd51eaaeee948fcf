"""Queues, command buffers, encoders, indirect command buffers.

Encoding makes `native.Dispatch` structs; a commit hands the list to the queue's thread, which runs it in the
runtime without the interpreter lock, stopping only where an event has to be waited for or signalled."""

from __future__ import annotations

import ctypes
import queue
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from softmetal import modes, native, validation
from softmetal.device import Buffer, Device, Event, Pipeline, ResidencySet, export
from softmetal.objects import Labelled, NSError, UsageError, size3

ENQUEUED, COMMITTED, SCHEDULED, COMPLETED, FAILED = range(1, 6)
SPACE = {"device": 0, "constant": 1}


class Launch:
    """One dispatch, encoded: the struct for the runtime, and what it keeps alive."""

    def __init__(self, pipeline: Pipeline, bound: dict[int, tuple[Any, int]], tg: dict[int, int], groups: Any, size: Any,
                 threads: Any, indirect: tuple[Buffer, int] | None = None) -> None:  # fmt: skip
        kernel = pipeline.kernel
        self.pipeline, self.bound, self.mode = pipeline, {}, None
        count = size[0] * size[1] * size[2]
        if count > pipeline.limit:
            raise UsageError(f"'{kernel.name}': a threadgroup of {size} has {count} threads; at most {pipeline.limit} are possible")
        d = self.struct = native.Dispatch()
        d.kernel, d.width = pipeline.serial, 32
        d.size[:], d.groups[:], d.threads[:] = size, groups, threads
        for a in pipeline.buffers:
            if a.index not in bound:
                raise UsageError(f"'{kernel.name}': nothing is bound to [[buffer({a.index})]], its argument '{a.name}'")
            memory, offset = bound[a.index]
            self.bound[a.index] = memory
            if memory is None:
                continue
            d.spaces[a.index] = SPACE[a.space]
            if isinstance(memory, Buffer):
                d.buffers[a.index], d.lengths[a.index] = memory.address + offset, memory._length - offset
            else:
                d.buffers[a.index], d.lengths[a.index] = ctypes.addressof(memory), len(memory)
        used = pipeline.static_bytes
        for a in pipeline.memories:
            if not tg.get(a.index):
                raise UsageError(f"'{kernel.name}': setThreadgroupMemoryLength was not called for index {a.index}, its argument '{a.name}'")
            d.tg_lengths[a.index] = tg[a.index]
            used += tg[a.index]
        if used > 32768:
            raise UsageError(f"'{kernel.name}' needs {used} bytes of threadgroup memory; the limit is 32768")
        if indirect:
            self.bound[-1] = indirect[0]
            d.indirect = indirect[0].address + indirect[1]

    def prepare(self, resident: Iterable[Any]) -> int:
        """Chooses plain or instrumented machine code; returns the struct's address."""
        mode, d = modes.instrumented(), self.struct
        if mode != self.mode:
            code = self.pipeline.code(mode)
            d.entry = code.address(f"sm_entry_{self.pipeline.number}")
            d.fibers = int(mode or self.pipeline.kernel.fibers)
            d.code_start, d.code_end = code.start, code.end
            self.mode = mode
        if mode:
            self.ranges = validation.ranges(self.bound.values(), resident)
            d.ranges, d.range_count = ctypes.addressof(self.ranges), validation.count(self.ranges)
        return ctypes.addressof(d)


class Bindings:
    """Pipeline, buffers and threadgroup memory as set so far; shared by encoders and indirect commands."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._pipeline: Pipeline | None = None
        self._bound: dict[int, tuple[Any, int]] = {}
        self._tg: dict[int, int] = {}

    def setComputePipelineState_(self, pipeline: Pipeline) -> None:
        if not isinstance(pipeline, Pipeline):
            raise UsageError(f"setComputePipelineState: this is {pipeline!r}, not a pipeline (did its creation fail?)")
        self._pipeline = pipeline

    def setThreadgroupMemoryLength_atIndex_(self, length: int, index: int) -> None:
        if length % 16 or length > 32768:
            raise UsageError(f"setThreadgroupMemoryLength: {length} must be a multiple of 16, at most 32768")
        self._tg[index_of(index)] = int(length)

    def _bind(self, buffer: Any, offset: int, index: int) -> None:
        if buffer is not None and not isinstance(buffer, Buffer):
            raise UsageError(f"setBuffer at index {index}: this is {type(buffer).__name__}, not a buffer")
        if buffer is not None and buffer._device is not self._device:
            raise UsageError(f"setBuffer at index {index}: the buffer belongs to another device")
        if buffer is not None and not 0 <= offset < buffer._length:
            raise UsageError(f"setBuffer at index {index}: offset {offset} is outside the buffer of {buffer._length} bytes")
        self._bound[index_of(index)] = (buffer, int(offset))

    def _launch(self, groups: Any, size: Any, threads: Any, indirect: Any = None) -> Launch:
        if self._pipeline is None:
            raise UsageError("a dispatch without setComputePipelineState")
        return Launch(self._pipeline, self._bound, self._tg, groups, size, threads, indirect)

    def _by_groups(self, groups: Any, size: Any) -> Launch:
        groups, size = size3(groups, "threadgroups per grid"), size3(size, "threads per threadgroup")
        return self._launch(groups, size, [g * s for g, s in zip(groups, size)])

    def _by_threads(self, threads: Any, size: Any) -> Launch:
        threads, size = size3(threads, "threads per grid"), size3(size, "threads per threadgroup")
        return self._launch([(t + s - 1) // s for t, s in zip(threads, size)], size, threads)


def index_of(index: int) -> int:
    if not 0 <= index <= 30:
        raise UsageError(f"index {index}: a kernel has 31 of them, 0 to 30")
    return int(index)


class Encoder(Labelled):
    """What all encoders do. `_items` of the command buffer: see CommandBuffer._execute."""

    def __init__(self, commands: CommandBuffer) -> None:
        if commands._encoder is not None:
            raise UsageError("a command buffer has one encoder at a time: call endEncoding on the one before")
        if commands._status:
            raise UsageError("the command buffer was committed; it takes no more encoders")
        self._device, self._commands, self._open = commands._device, commands, True
        commands._encoder = self
        self._add(("epoch",))

    def _add(self, item: tuple[Any, ...]) -> None:
        if not self._open:
            raise UsageError("the encoder has ended; make a new one")
        self._commands._items.append(item)

    def endEncoding(self) -> None:
        self._add(("epoch",))
        self._open = False
        self._commands._encoder = None

    def pushDebugGroup_(self, name: str) -> None:
        pass

    def popDebugGroup(self) -> None:
        pass

    def insertDebugSignpost_(self, name: str) -> None:
        pass

    def updateFence_(self, fence: Any) -> None:
        pass

    def waitForFence_(self, fence: Any) -> None:
        self._add(("epoch",))


class ComputeEncoder(Bindings, Encoder):
    _protocol = "MTLComputeCommandEncoder"

    def __init__(self, commands: CommandBuffer, kind: int) -> None:
        Encoder.__init__(self, commands)
        Bindings.__init__(self, commands._device)
        self._kind = kind
        self._resident: dict[int, Any] = {}

    def dispatchType(self) -> int:
        return self._kind

    def setBuffer_offset_atIndex_(self, buffer: Any, offset: int, index: int) -> None:
        self._bind(buffer, offset, index)

    def setBufferOffset_atIndex_(self, offset: int, index: int) -> None:
        if index not in self._bound:
            raise UsageError(f"setBufferOffset at index {index}, where no buffer is set")
        self._bind(self._bound[index][0], offset, index)

    def setBuffers_offsets_withRange_(self, buffers: Any, offsets: Any, range: Any) -> None:
        start, count = (int(x) for x in range)
        for i, (b, o) in enumerate(zip(list(buffers)[:count], list(offsets)[:count])):
            self._bind(b, o, start + i)

    def setBytes_length_atIndex_(self, data: Any, length: int, index: int) -> None:
        if not 0 < length <= 4096:
            raise UsageError(f"setBytes at index {index}: {length} bytes; 1 to 4096 are possible, use a buffer for more")
        address, available, release = export(data)
        if 0 <= available < length:
            raise UsageError(f"setBytes at index {index}: length is {length}, but there are {available} bytes")
        copy = (ctypes.c_ubyte * length)()
        ctypes.memmove(copy, address, length)
        if release:
            release()
        self._bound[index_of(index)] = (copy, 0)

    def _dispatch(self, launch: Launch) -> None:
        self._add(("launch", launch, self._resident))
        if self._kind == 0:
            self._add(("epoch",))

    def dispatchThreadgroups_threadsPerThreadgroup_(self, groups: Any, size: Any) -> None:
        self._dispatch(self._by_groups(groups, size))

    def dispatchThreads_threadsPerThreadgroup_(self, threads: Any, size: Any) -> None:
        self._dispatch(self._by_threads(threads, size))

    def dispatchThreadgroupsWithIndirectBuffer_indirectBufferOffset_threadsPerThreadgroup_(
        self, buffer: Buffer, offset: int, size: Any
    ) -> None:
        if offset % 4 or offset + 12 > buffer._length:
            raise UsageError(f"the indirect dispatch reads 12 bytes at offset {offset} of a buffer of {buffer._length} bytes")
        size = size3(size, "threads per threadgroup")
        self._dispatch(self._launch((1, 1, 1), size, size, (buffer, offset)))

    def memoryBarrierWithScope_(self, scope: int) -> None:
        self._add(("epoch",))

    def memoryBarrierWithResources_count_(self, resources: Any, count: int) -> None:
        self._add(("epoch",))

    def useResource_usage_(self, resource: Any, usage: int) -> None:
        self._resident[id(resource)] = resource

    def useResources_count_usage_(self, resources: Any, count: int, usage: int) -> None:
        for r in list(resources)[:count]:
            self.useResource_usage_(r, usage)

    def useHeap_(self, heap: Any) -> None:
        self._resident[id(heap)] = heap

    def useHeaps_count_(self, heaps: Any, count: int) -> None:
        for h in list(heaps)[:count]:
            self.useHeap_(h)

    def executeCommandsInBuffer_withRange_(self, commands: IndirectCommandBuffer, range: Any) -> None:
        start, count = (int(x) for x in range)
        if start < 0 or count < 0 or start + count > len(commands._commands):
            raise UsageError(f"executeCommandsInBuffer: commands {start} to {start + count} of {len(commands._commands)}")
        self._add(("indirect", commands, start, count, self._resident, dict(self._bound), self._pipeline))
        if self._kind == 0:
            self._add(("epoch",))

    def setImageblockWidth_height_(self, width: int, height: int) -> None:
        pass


class BlitEncoder(Encoder):
    _protocol = "MTLBlitCommandEncoder"

    def copyFromBuffer_sourceOffset_toBuffer_destinationOffset_size_(
        self, source: Buffer, source_offset: int, target: Buffer, target_offset: int, size: int
    ) -> None:
        for b, offset, what in ((source, source_offset, "source"), (target, target_offset, "destination")):
            if not 0 <= offset <= offset + size <= b._length:
                raise UsageError(f"copyFromBuffer: {size} bytes at offset {offset} of a {what} of {b._length} bytes")
        self._add(("op", native.COPY, 0, target.address + target_offset, source.address + source_offset, size, (source, target)))

    def fillBuffer_range_value_(self, buffer: Buffer, range: Any, value: int) -> None:
        start, count = (int(x) for x in range)
        if not 0 <= start <= start + count <= buffer._length:
            raise UsageError(f"fillBuffer: {count} bytes at offset {start} of a buffer of {buffer._length} bytes")
        self._add(("op", native.FILL, int(value) & 255, buffer.address + start, None, count, buffer))

    def synchronizeResource_(self, resource: Any) -> None:
        pass

    def optimizeContentsForGPUAccess_(self, resource: Any) -> None:
        pass

    def optimizeContentsForCPUAccess_(self, resource: Any) -> None:
        pass

    def optimizeIndirectCommandBuffer_withRange_(self, commands: Any, range: Any) -> None:
        pass

    def resetCommandsInBuffer_withRange_(self, commands: IndirectCommandBuffer, range: Any) -> None:
        commands.resetWithRange_(range)


class IndirectComputeCommand(Bindings):
    _protocol = "MTLIndirectComputeCommand"

    def __init__(self, owner: IndirectCommandBuffer) -> None:
        super().__init__(owner._device)
        self._owner = weakref.proxy(owner)
        self.reset()

    def reset(self) -> None:
        self._pipeline, self._bound, self._tg = None, {}, {}
        self._barrier, self._sizes, self._made = False, None, None

    def setKernelBuffer_offset_atIndex_(self, buffer: Any, offset: int, index: int) -> None:
        if index >= self._owner._descriptor.maxKernelBufferBindCount():
            raise UsageError(f"setKernelBuffer at index {index}: the descriptor's maxKernelBufferBindCount is "
                             f"{self._owner._descriptor.maxKernelBufferBindCount()}")  # fmt: skip
        self._bind(buffer, offset, index)
        self._made = None

    def concurrentDispatchThreadgroups_threadsPerThreadgroup_(self, groups: Any, size: Any) -> None:
        self._sizes, self._made = (self._by_groups, size3(groups, "threadgroups per grid"), size3(size, "threads per threadgroup")), None

    def concurrentDispatchThreads_threadsPerThreadgroup_(self, threads: Any, size: Any) -> None:
        self._sizes, self._made = (self._by_threads, size3(threads, "threads per grid"), size3(size, "threads per threadgroup")), None

    def setBarrier(self) -> None:
        self._barrier = True

    def clearBarrier(self) -> None:
        self._barrier = False

    def setImageblockWidth_height_(self, width: int, height: int) -> None:
        pass

    def _encoded(self, bound: dict[int, Any], pipeline: Pipeline | None) -> Launch | None:
        """The launch, made once; with what is inherited from the encoder if the descriptor says so."""
        if self._sizes is None:
            return None
        inherits = self._owner._descriptor.inheritBuffers(), self._owner._descriptor.inheritPipelineState()
        if self._made is None or any(inherits):
            own = self._pipeline, self._bound
            if inherits[0]:
                self._bound = bound
            if inherits[1]:
                self._pipeline = pipeline
            self._made = self._sizes[0](*self._sizes[1:])
            self._pipeline, self._bound = own
        return self._made


class IndirectCommandBuffer(Labelled):
    _protocol = "MTLIndirectCommandBuffer"

    def __init__(self, device: Device, descriptor: Any, count: int, options: int) -> None:
        if not 0 < count <= 16384:
            raise UsageError(f"an indirect command buffer of {count} commands; 1 to 16384 are possible")
        self._device, self._descriptor = device, descriptor
        self._commands = [IndirectComputeCommand(self) for _ in range(count)]

    def indirectComputeCommandAtIndex_(self, index: int) -> IndirectComputeCommand:
        return self._commands[index]

    def resetWithRange_(self, range: Any) -> None:
        start, count = (int(x) for x in range)
        for c in self._commands[start : start + count]:
            c.reset()

    def size(self) -> int:
        return len(self._commands)

    def allocatedSize(self) -> int:
        return 0


class CommandBuffer(Labelled):
    _protocol = "MTLCommandBuffer"

    def __init__(self, owner: CommandQueue) -> None:
        self._queue, self._device = owner, owner._device
        self._items: list[tuple[Any, ...]] = []
        self._encoder: Encoder | None = None
        self._status, self._error = 0, None
        self._done, self._scheduled = threading.Event(), threading.Event()
        self._handlers: list[Callable[[Any], None]] = []
        self._scheduled_handlers: list[Callable[[Any], None]] = []
        self._sets: list[ResidencySet] = []
        self._start = self._end = 0.0

    def commandQueue(self) -> CommandQueue:
        return self._queue

    def retainedReferences(self) -> bool:
        return True

    def computeCommandEncoder(self) -> ComputeEncoder:
        return ComputeEncoder(self, 0)

    def computeCommandEncoderWithDispatchType_(self, kind: int) -> ComputeEncoder:
        return ComputeEncoder(self, int(kind))

    def computeCommandEncoderWithDescriptor_(self, descriptor: Any) -> ComputeEncoder:
        return ComputeEncoder(self, int(descriptor.dispatchType()))

    def blitCommandEncoder(self) -> BlitEncoder:
        return BlitEncoder(self)

    def encodeSignalEvent_value_(self, event: Event, value: int) -> None:
        self._items.append(("signal", event, int(value)))

    def encodeWaitForEvent_value_(self, event: Event, value: int) -> None:
        self._items.append(("wait", event, int(value)))

    def useResidencySet_(self, residency: ResidencySet) -> None:
        self._sets.append(residency)

    def addCompletedHandler_(self, block: Callable[[Any], None]) -> None:
        if self._status >= COMMITTED:
            raise UsageError("addCompletedHandler after commit")
        self._handlers.append(block)

    def addScheduledHandler_(self, block: Callable[[Any], None]) -> None:
        self._scheduled_handlers.append(block)

    def pushDebugGroup_(self, name: str) -> None:
        pass

    def popDebugGroup(self) -> None:
        pass

    def enqueue(self) -> None:
        self._status = max(self._status, ENQUEUED)

    def commit(self) -> None:
        if self._encoder is not None:
            raise UsageError("commit before endEncoding")
        if self._status >= COMMITTED:
            raise UsageError("the command buffer was committed already")
        self._status = COMMITTED
        modes.count("submits")
        self._queue._submit(self)

    def waitUntilScheduled(self) -> None:
        self._wait(self._scheduled)

    def waitUntilCompleted(self) -> None:
        modes.count("waits")
        self._wait(self._done)

    def _wait(self, event: threading.Event) -> None:
        if self._status < COMMITTED:
            raise UsageError("waiting for a command buffer that was not committed would never end")
        event.wait()

    def status(self) -> int:
        return self._status

    def error(self) -> NSError | None:
        return self._error

    def GPUStartTime(self) -> float:
        return self._start

    def GPUEndTime(self) -> float:
        return self._end

    kernelStartTime, kernelEndTime = GPUStartTime, GPUEndTime

    def errorOptions(self) -> int:
        return 0

    # ---- execution, on the queue's thread
    def _execute(self) -> None:
        self._status = SCHEDULED
        self._scheduled.set()
        for block in self._scheduled_handlers:
            block(self)
        self._start = time.monotonic()
        try:
            self._run()
        except Exception as e:  # a fault of ours must not hang whoever waits
            self._error = NSError("MTLCommandBufferErrorDomain", 1, f"softmetal failed: {e!r}")
        self._end = time.monotonic()
        self._items.clear()
        self._status = FAILED if self._error else COMPLETED
        for block in self._handlers:
            block(self)
        self._done.set()

    def _run(self) -> None:
        pending: list[tuple[Any, ...]] = []
        for item in self._items:
            if item[0] == "signal":
                if self._flush(pending):
                    return
                item[1]._signal(item[2])
            elif item[0] == "wait":
                if self._flush(pending):
                    return
                item[1]._wait(item[2])
            elif item[0] == "indirect":
                _, commands, start, count, resident, bound, pipeline = item
                for c in commands._commands[start : start + count]:
                    if c._barrier:
                        pending.append(("epoch",))
                    if launch := c._encoded(bound, pipeline):
                        if modes.validating():
                            self._check_resident(launch, resident)
                        pending.append(("launch", launch, resident))
            else:
                pending.append(item)
        self._flush(pending)

    def _check_resident(self, launch: Launch, resident: dict[int, Any]) -> None:
        members = set(resident)
        for s in [*self._sets, *self._queue._sets]:
            members |= set(s._members)
        for index, memory in launch.bound.items():
            if isinstance(memory, Buffer) and id(memory) not in members:
                self._fail(3, [f"validation: '{launch.pipeline.kernel.name}' in an indirect command buffer uses the buffer at index "
                               f"{index}, which is neither in a residency set nor passed to useResource"])  # fmt: skip
                return

    def _fail(self, code: int, texts: list[str]) -> None:
        text = "\n".join(([self._error.localizedDescription()] if self._error else []) + texts)
        self._error = NSError("MTLCommandBufferErrorDomain", code, text)
        with modes._lock:
            modes.found.extend(texts)

    def _flush(self, pending: list[tuple[Any, ...]]) -> bool:
        """Runs what has gathered; whether it failed."""
        if not pending:
            return False
        if modes.seed():
            shuffle(pending, modes.seed())
        ops, launches = (native.Op * len(pending))(), []
        for op, item in zip(ops, pending):
            if item[0] == "launch":
                op.kind, op.a = native.DISPATCH, item[1].prepare(item[2].values())
                launches.append(item[1])
            elif item[0] == "epoch":
                op.kind = native.EPOCH
            else:
                op.kind, op.value, op.a, op.b, op.size = item[1:6]
        modes.apply()
        done = native.execute(ops, len(pending), modes.seed())
        texts = [validation.describe(r) for r in native.take_reports()]
        failed = done < len(pending)
        if texts or failed:
            name = pending[done][1].pipeline.kernel.name if failed else ""
            self._fail(3 if failed else 1, texts or [f"the kernel '{name}' failed"])
        pending.clear()
        return failed


def shuffle(pending: list[tuple[Any, ...]], seed: int) -> None:
    """Permutes dispatches that no barrier separates: a missing barrier then shows."""
    generator, start = random.Random(seed), 0
    for i in range(len(pending) + 1):
        if i == len(pending) or pending[i][0] != "launch":
            part = pending[start:i]
            generator.shuffle(part)
            pending[start:i] = part
            start = i + 1


class CommandQueue(Labelled):
    """A queue; its thread starts with the first commit and ends with the queue."""

    _protocol = "MTLCommandQueue"

    def __init__(self, device: Device) -> None:
        self._device = device
        self._inbox: queue.SimpleQueue[CommandBuffer | None] = queue.SimpleQueue()
        self._started = threading.Lock()
        self._thread: threading.Thread | None = None
        self._sets: list[ResidencySet] = []
        weakref.finalize(self, self._inbox.put, None).atexit = False

    def commandBuffer(self) -> CommandBuffer:
        return CommandBuffer(self)

    def commandBufferWithUnretainedReferences(self) -> CommandBuffer:
        return CommandBuffer(self)

    def commandBufferWithDescriptor_(self, descriptor: Any) -> CommandBuffer:
        return CommandBuffer(self)

    def addResidencySet_(self, residency: ResidencySet) -> None:
        self._sets.append(residency)

    def addResidencySets_count_(self, sets: Any, count: int) -> None:
        self._sets.extend(list(sets)[:count])

    def removeResidencySet_(self, residency: ResidencySet) -> None:
        self._sets.remove(residency)

    def insertDebugCaptureBoundary(self) -> None:
        pass

    def _submit(self, commands: CommandBuffer) -> None:
        with self._started:
            if self._thread is None:
                self._thread = threading.Thread(target=serve, args=(self._inbox,), daemon=True, name="softmetal queue")
                self._thread.start()
        self._inbox.put(commands)


def serve(inbox: queue.SimpleQueue[CommandBuffer | None]) -> None:
    while (commands := inbox.get()) is not None:
        commands._execute()
        del commands

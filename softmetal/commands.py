"""Command buffers and queues.

A commit hands the encoded list to the queue's thread, which runs it in the runtime without the interpreter lock,
stopping only where an event has to be waited for or signalled."""

from __future__ import annotations

import queue
import random
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from softmetal import modes, native, validation
from softmetal.buffers import Buffer, ResidencySet
from softmetal.encoders import BlitEncoder, ComputeEncoder, Encoder
from softmetal.events import Event
from softmetal.launch import Launch
from softmetal.objects import Labelled, NSError, UsageError

if TYPE_CHECKING:
    from softmetal.device import Device
ENQUEUED, COMMITTED, SCHEDULED, COMPLETED, FAILED = range(1, 6)


class CommandBuffer(Labelled):
    _protocol = "MTLCommandBuffer"

    def __init__(self, owner: CommandQueue) -> None:
        self._queue, self._device = owner, owner._device
        self._items: list[tuple[Any, ...]] = []
        self._encoder: Encoder | None = None
        self._status = 0
        self._error: NSError | None = None
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
                name = launch.pipeline.kernel.name
                self._fail(3, [f"validation: '{name}' in an indirect command buffer uses the buffer at index {index}, "
                               "which is neither in a residency set nor passed to useResource"])  # fmt: skip
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
        reports = native.take_reports()
        texts = [validation.describe(r, modes.instrumented()) for r in reports]
        failed = done < len(pending)
        if texts or failed:
            name = pending[done][1].pipeline.kernel.name if failed else ""
            timeout = any(r.kind == validation.TIMEOUT for r in reports)
            self._fail(2 if timeout else 3 if failed else 1, texts or [f"the kernel '{name}' failed"])
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

"""Compute and blit encoders: they append to the items of their command buffer."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from softmetal import native
from softmetal.buffers import Buffer, export
from softmetal.indirect import IndirectCommandBuffer
from softmetal.launch import Bindings, Launch, index_of
from softmetal.objects import Labelled, UsageError, size3

if TYPE_CHECKING:
    from softmetal.commands import CommandBuffer


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
            raise UsageError(
                f"setBytes at index {index}: {length} bytes; 1 to 4096 are possible, use a buffer for more"
            )
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
            raise UsageError(
                f"the indirect dispatch reads 12 bytes at offset {offset} of a buffer of {buffer._length} bytes"
            )
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
            raise UsageError(
                f"executeCommandsInBuffer: commands {start} to {start + count} of {len(commands._commands)}"
            )
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
        self._add(
            (
                "op",
                native.COPY,
                0,
                target.address + target_offset,
                source.address + source_offset,
                size,
                (source, target),
            )
        )

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

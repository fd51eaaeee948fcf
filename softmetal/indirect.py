"""Indirect command buffers: commands encoded once and run many times."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from softmetal.launch import Bindings, Launch
from softmetal.library import Pipeline
from softmetal.objects import Labelled, UsageError, size3

if TYPE_CHECKING:
    from softmetal.device import Device


class IndirectComputeCommand(Bindings):
    _protocol = "MTLIndirectComputeCommand"

    def __init__(self, owner: IndirectCommandBuffer) -> None:
        super().__init__(owner._device)
        self._owner = weakref.proxy(owner)
        self.reset()

    def reset(self) -> None:
        self._pipeline, self._bound, self._tg = None, {}, {}
        self._barrier = False
        self._sizes: tuple[Any, ...] | None = None
        self._made: Launch | None = None

    def setComputePipelineState_(self, pipeline: Pipeline) -> None:
        super().setComputePipelineState_(pipeline)
        if not pipeline.indirect:
            raise UsageError(f"'{pipeline.kernel.name}' in an indirect command buffer: its pipeline must be made with "
                             "a descriptor that has setSupportIndirectCommandBuffers_(True)")  # fmt: skip
        self._made = None

    def setKernelBuffer_offset_atIndex_(self, buffer: Any, offset: int, index: int) -> None:
        if index >= self._owner._descriptor.maxKernelBufferBindCount():
            raise UsageError(f"setKernelBuffer at index {index}: the descriptor's maxKernelBufferBindCount is "
                             f"{self._owner._descriptor.maxKernelBufferBindCount()}")  # fmt: skip
        self._bind(buffer, offset, index)
        self._made = None

    def concurrentDispatchThreadgroups_threadsPerThreadgroup_(self, groups: Any, size: Any) -> None:
        size = size3(size, "threads per threadgroup")
        self._sizes, self._made = (self._by_groups, size3(groups, "threadgroups per grid"), size), None

    def concurrentDispatchThreads_threadsPerThreadgroup_(self, threads: Any, size: Any) -> None:
        size = size3(size, "threads per threadgroup")
        self._sizes, self._made = (self._by_threads, size3(threads, "threads per grid"), size), None

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

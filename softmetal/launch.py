"""One dispatch, encoded; and the bindings that it is made from."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from softmetal import modes, native, validation
from softmetal.buffers import Buffer
from softmetal.library import Pipeline
from softmetal.objects import UsageError, size3

if TYPE_CHECKING:
    from softmetal.device import Device
SPACE = {"device": 0, "constant": 1}


class Launch:
    """One dispatch, encoded: the struct for the runtime, and what it keeps alive."""

    def __init__(self, pipeline: Pipeline, bound: dict[int, tuple[Any, int]], tg: dict[int, int], groups: Any,
                 size: Any, threads: Any, indirect: tuple[Buffer, int] | None = None) -> None:  # fmt: skip
        kernel = pipeline.kernel
        self.pipeline = pipeline
        self.bound: dict[int, Any] = {}
        self.mode: bool | None = None
        count = size[0] * size[1] * size[2]
        if count > pipeline.limit:
            raise UsageError(f"'{kernel.name}': a threadgroup of {size} has {count} threads; at most {pipeline.limit} "
                             "are possible")  # fmt: skip
        d = self.struct = native.Dispatch()
        d.kernel, d.width = pipeline.serial, 32
        d.size[:], d.groups[:], d.threads[:] = size, groups, threads
        for a in pipeline.buffers:
            if a.index not in bound and a.optional:
                continue
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
                raise UsageError(f"'{kernel.name}': setThreadgroupMemoryLength was not called for index {a.index}, "
                                 f"its argument '{a.name}'")  # fmt: skip
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
            raise UsageError(f"setBuffer at index {index}: offset {offset} is outside the buffer of "
                             f"{buffer._length} bytes")  # fmt: skip
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

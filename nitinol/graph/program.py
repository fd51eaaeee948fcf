"""A plan with memory: a command list for a device, and the same for the interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from nitinol.compiler import interpreter
from nitinol.compiler.driver import tile_ir
from nitinol.compiler.semantics import memory_dtype
from nitinol.graph.nodes import Number, Value, View
from nitinol.graph.plan import Plan, Record, first_byte, resolve, span_bytes
from nitinol.runtime.device import Buffer, CommandList, DeviceError, Event
from nitinol.runtime.launch import encode, interpreting


class Program:
    """The steps of a plan with bound buffers. `outside`: the buffers of what is there already; `numbers`: the plan's.

    The results' buffers are `results`, in the order of `plan.kept`.
    """

    def __init__(
        self, plan: Plan, device: Any, outside: Sequence[Buffer], numbers: Sequence[Any] = (),
        arena: Buffer | None = None,
    ) -> None:  # fmt: skip
        self.plan, self.device, self.numbers = plan, device, numbers
        offsets, size = plan.memory
        self.arena = device.allocate(size) if size and arena is None else arena
        self.buffers: dict[Value, Buffer] = dict(zip(plan.outside, outside))
        for position in plan.updated:
            if outside[position].read_only:
                self._refuse(plan.outside[position])
        for value, offset in offsets.items():
            assert self.arena is not None
            self.buffers[value] = self.arena.view(offset, value.nbytes)
        for value in plan.kept:
            self.buffers[value] = device.allocate(value.nbytes)

    @property
    def results(self) -> list[Buffer]:
        return [self.buffers[value] for value in self.plan.kept]

    @property
    def records(self) -> list[Record]:
        return self.plan.records

    def _refuse(self, value: Value) -> None:
        step = next(s for s in self.plan.steps for i, a in enumerate(s.arguments)
                    if i in s.writes and isinstance(a, View) and a.value is value)  # fmt: skip
        raise DeviceError(
            f"{step.call.name} updates an array of shape {value.shape} in place whose memory is read-only; "
            "make a copy with .copy() first"
        )

    def run(self) -> None:
        """All steps, finished when this returns: one submission and one wait (none if there is nothing to do)."""
        if interpreting():
            self._interpret()
        elif self.plan.steps:
            self.device.run(self.commands)

    def submit(self) -> Event | None:
        """All steps, started; None if they have run already: because they are interpreted, or there are none."""
        if interpreting():
            self._interpret()
        elif self.plan.steps:
            return self.device.submit(self.commands)
        return None

    def address(self, view: View) -> int:
        return self.buffers[view.value].address + first_byte(view)

    @cached_property
    def commands(self) -> CommandList:
        """The command list of the steps; a barrier stands only where one touches what an earlier one writes."""
        self.plan.compile()
        commands = self.device.command_list()
        reads: list[tuple[int, int]] = []
        writes: list[tuple[int, int]] = []
        for step, (executable, arguments, _) in zip(self.plan.steps, self.plan.executables):
            ours = [(self._range(a), i in step.writes) for i, a in enumerate(step.arguments) if isinstance(a, View)]
            barrier = any(
                low < end and start < high
                for (low, high), written in ours
                for start, end in (reads + writes if written else writes)
            )
            if barrier:
                reads, writes = [], []
            for span, written in ours:
                (writes if written else reads).append(span)
            slots = [self._argument(value, type) for value, type in arguments]
            commands.launch(executable, step.grid, slots, barrier=barrier, label=step.name)
        return commands

    def _argument(self, value: Any, type: Any) -> Buffer | int | bytes:
        if isinstance(value, View):
            return self.buffers[value.value].view(first_byte(value))
        return encode(self.numbers[value.index] if isinstance(value, Number) else value, type)

    def _range(self, view: View) -> tuple[int, int]:
        low, high = span_bytes(view)
        start = self.buffers[view.value].address
        return start + low, start + high

    def _interpret(self) -> None:
        for step in self.plan.steps:
            function, signature, values, positions = resolve(step, self.address)
            if function is None:
                function = tile_ir(step.call.form.operation.kernel, signature)
            values = [self.numbers[v.index] if isinstance(v, Number) else v for v in values]
            views = [(i, a) for i, a in enumerate(step.arguments) if isinstance(a, View)]
            host = {view.value: self._host_memory(view.value) for _, view in views}
            for position, (_, view) in zip(positions, views):
                values[position] = elements(host[view.value], view)
            interpreter.run(function, step.grid, values)
            if not self.device.host_memory:
                for value in {view.value for i, view in views if i in step.writes}:
                    self.buffers[value].write(host[value])

    def _host_memory(self, value: Value) -> np.ndarray:
        """A value's bytes, in place where the host sees them."""
        buffer = self.buffers[value]
        return buffer.as_numpy() if self.device.host_memory else buffer.read()


def as_numpy(buffer: Buffer, view: View) -> np.ndarray:
    """The elements of a view, in place where the host sees the device's memory; bf16 as uint16, int1 as uint8."""
    if buffer.device.host_memory or not view.size:
        return elements(buffer.as_numpy() if view.size else np.empty(0, np.uint8), view)
    low, high = span_bytes(view)
    return elements(buffer.view(low, high - low).read(), view, low)


def elements(memory: np.ndarray, view: View, start: int = 0) -> np.ndarray:
    """A view's elements in a value's bytes, of which those from `start` on are given; of a block format the bytes."""
    layout = view.layout
    if layout.dtype.kind == "block":
        low, high = span_bytes(view)
        return memory[low - start : high - start]
    dtype = memory_dtype(layout.dtype)
    if not layout.size:
        return np.empty(layout.shape, dtype)
    strides = tuple(s * dtype.itemsize for s in layout.strides)
    return np.ndarray(layout.shape, dtype, memory, layout.offset * dtype.itemsize - start, strides)

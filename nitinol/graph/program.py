"""A plan with memory: a command list for a device, and the same for the interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nitinol.compiler import interpreter
from nitinol.compiler.driver import tile_ir
from nitinol.compiler.semantics import memory_dtype
from nitinol.graph.nodes import Number, Value, View
from nitinol.graph.plan import ALIGNMENT, Plan, Record, first_byte, resolve, span_bytes
from nitinol.runtime.device import Buffer, CommandList, DeviceError, Event
from nitinol.runtime.hazards import Span
from nitinol.runtime.launch import encode, interpreting


class Program:
    """The steps of a plan with buffers, on a device. It is bound anew for other memory and numbers; what it has been
    bound to it keeps until then, or until `release`."""

    def __init__(self, plan: Plan, device: Any) -> None:
        self.plan, self.device = plan, device
        self.buffers: dict[Value, Buffer] = {}
        self.numbers: Sequence[Any] = ()
        self.arena: Buffer | None = None
        self.commands: CommandList | None = None
        self._places: list[tuple[int, int, Value, int]] = []  # entry, argument, whose memory, from which byte
        self._number_places: list[tuple[int, int, int, Any]] = []  # entry, argument, which number, its type
        self._encoded: Sequence[Any] = ()  # the numbers that the command list has
        self._nothing: Buffer | None = None

    def bind(self, outside: Sequence[Buffer], numbers: Sequence[Any] = (), arena: Buffer | None = None) -> None:
        """Memory for a run: `outside`, of what is there already, in the order of the plan; the plan's numbers; the
        arena of intermediate results, if there is one already. Results get memory of their own."""
        plan, device = self.plan, self.device
        offsets, size = plan.memory
        self.numbers = numbers
        buffers = self.buffers = dict(zip(plan.outside, outside))
        for position in plan.updated:
            if outside[position].read_only:
                self._refuse(plan.outside[position])
        if size:
            self.arena = arena or device.allocate(size)
            for value, offset in offsets.items():
                buffers[value] = self.arena.view(offset, value.nbytes)
        for value in plan.kept:
            buffers[value] = device.allocate(value.nbytes)
        if self.commands is not None:
            changes: dict[tuple[int, int], Any] = {}
            for entry, argument, value, start in self._places:
                buffer = buffers[value]
                changes[entry, argument] = buffer.view(start) if start else buffer
            for entry, argument, index, type in self._number_places:
                if numbers[index] is not self._encoded[index]:
                    changes[entry, argument] = encode(numbers[index], type)
            self.commands.rebind(changes)
            self._encoded = numbers
        elif plan.steps and not interpreting():
            self.commands = self._record()

    def release(self) -> None:
        """Lets go of the memory; the program must be bound again before it runs."""
        self.buffers, self.numbers, self.arena = {}, (), None
        if self.commands is not None:
            if self._nothing is None:
                self._nothing = self.device.allocate(ALIGNMENT)
            self.commands.forget(self._places, self._nothing)

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
            self.device.run(self._commands())

    def submit(self) -> Event | None:
        """All steps, started; None if they have run already: because they are interpreted, or there are none."""
        if interpreting():
            self._interpret()
        elif self.plan.steps:
            return self.device.submit(self._commands())
        return None

    @property
    def submission(self) -> int:
        """The number of the latest submission that has reached the device; 0 before the first."""
        return 0 if self.commands is None else self.device.submission(self.commands)

    def address(self, view: View) -> int:
        return self.buffers[view.value].address + first_byte(view)

    def _commands(self) -> CommandList:
        if self.commands is None:  # bound while kernels were interpreted
            self.commands = self._record()
        return self.commands

    def _record(self) -> CommandList:
        """The command list of the steps, which says of each array what a step may touch of it."""
        self.plan.compile()
        commands = self.device.command_list()
        self._encoded = self.numbers
        for number, (step, made) in enumerate(zip(self.plan.steps, self.plan.executables)):
            executable, arguments, positions = made
            spans: tuple[dict[int, Span], dict[int, Span]] = ({}, {})  # reads, writes
            views = ((i, a) for i, a in enumerate(step.arguments) if isinstance(a, View))
            for position, (i, view) in zip(positions, views):
                (low, high), start = span_bytes(view), first_byte(view)
                spans[i in step.writes][position] = low - start, high - start
                self._places.append((number, position, view.value, start))
            slots: list[Buffer | int | bytes] = []
            for position, (value, type) in enumerate(arguments):
                if isinstance(value, View):
                    slots.append(self.buffers[value.value].view(first_byte(value)))
                elif isinstance(value, Number):
                    slots.append(encode(self.numbers[value.index], type))
                    self._number_places.append((number, position, value.index, type))
                else:
                    slots.append(encode(value, type))
            commands.launch(executable, step.grid, slots, reads=spans[0], writes=spans[1], label=step.name)
        return commands

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

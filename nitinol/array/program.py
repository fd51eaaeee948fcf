"""Launches with bound buffers, as one command list; memory for intermediate results, planned by their lives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from nitinol.array.graph import Launch, Value, View
from nitinol.array.schedule import Step
from nitinol.compiler.semantics import memory_dtype
from nitinol.language.jit import specialise
from nitinol.language.types import DType
from nitinol.runtime.device import Buffer, CommandList, DeviceError, Event
from nitinol.runtime.hazards import Span

ALIGNMENT = 64  # of every buffer, also of those inside the arena


@dataclass(frozen=True)
class Record:
    """One entry of a command list, for people: `nitinol trace` prints these.

    shapes and dtypes: of the array arguments in order. nbytes: what the arguments hold. operations: arithmetic, if
    the kernel's author or the fusion knows. place: file, line, function of the program that asked for it.
    """

    name: str
    place: tuple[str, int, str]
    grid: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    nbytes: int
    operations: int | None


# ---------------------------------------------------------------------------------------------------------- memory


def plan_memory(steps: list[Step], kept: set[Value]) -> tuple[dict[Value, int], int]:
    """Offsets of the intermediate values in one arena, and its size: largest first, at the lowest offset that is free
    during the value's life. Lives are counted in phases, so that sharing memory needs no further barrier."""
    lives: dict[Value, tuple[int, int]] = {}
    for step, phase in zip(steps, phases(steps)):
        for argument in step.arguments:
            if isinstance(argument, View) and argument.value.buffer is None and argument.value not in kept:
                first, _ = lives.get(argument.value, (phase, phase))
                lives[argument.value] = (first, phase)
    placed: list[tuple[int, int, int, int]] = []  # offset, end, first, last
    offsets: dict[Value, int] = {}
    for value in sorted(lives, key=lambda v: -v.nbytes):
        first, last = lives[value]
        size = -(-max(value.nbytes, 1) // ALIGNMENT) * ALIGNMENT
        offset = 0
        for begin, end, other_first, other_last in sorted(placed):
            if other_first <= last and first <= other_last:
                if begin - offset >= size:
                    break
                offset = max(offset, end)
        placed.append((offset, offset + size, first, last))
        offsets[value] = offset
    return offsets, max((end for _, end, _, _ in placed), default=0)


def phases(steps: list[Step]) -> list[int]:
    """A number per step; steps of one phase do not wait for each other."""
    found, phase = [], 0
    reads: set[Value] = set()
    writes: set[Value] = set()
    for step in steps:
        read = {a.value for i, a in enumerate(step.arguments) if isinstance(a, View) and i not in step.writes}
        written = {a.value for i, a in enumerate(step.arguments) if isinstance(a, View) and i in step.writes}
        if writes & (read | written) or reads & written:
            phase, reads, writes = phase + 1, set(), set()
        reads |= read
        writes |= written
        found.append(phase)
    return found


# ---------------------------------------------------------------------------------------------------------- programs


class Program:
    """Steps with bound buffers: a command list for a device, and the same for the interpreter."""

    def __init__(self, steps: list[Step], kept: Iterable[Value], device: Any, arena: Buffer | None = None) -> None:
        self.device = device
        kept = set(kept)
        for step in steps:
            for position in step.writes:
                view = step.arguments[position]
                assert isinstance(view, View)
                if view.value.buffer is not None and view.value.buffer.read_only:
                    raise DeviceError(
                        f"{step.node.name} updates an array of shape {view.shape} in place whose memory is read-only; "
                        "make a copy with .copy() first"
                    )
        offsets, size = plan_memory(steps, kept)
        self.arena = device.allocate(size) if size and arena is None else arena
        self.buffers: dict[Value, Buffer] = {}
        for step in steps:
            for argument in step.arguments:
                if isinstance(argument, View) and argument.value not in self.buffers:
                    value = argument.value
                    if value.buffer is not None:
                        buffer = value.buffer
                    elif value in offsets:
                        assert self.arena is not None
                        buffer = self.arena.view(offsets[value], value.nbytes)
                    else:
                        buffer = device.allocate(value.nbytes)
                    self.buffers[value] = buffer
        for value in kept:
            if value.buffer is None and value not in self.buffers:
                self.buffers[value] = device.allocate(value.nbytes)
        self.steps = steps
        self.records: list[Record] = [_record(step) for step in steps]

    def run(self) -> None:
        """All steps, finished when this returns: one submission and one wait (none if there is nothing to do)."""
        from nitinol.runtime.launch import interpreting

        if interpreting():
            self._interpret()
        elif self.steps:
            self.device.run(self.commands)

    def submit(self) -> Event | None:
        """All steps, started; None if they have run already: because they are interpreted, or there are none."""
        from nitinol.runtime.launch import interpreting

        if interpreting():
            self._interpret()
        elif self.steps:
            return self.device.submit(self.commands)
        return None

    def address(self, view: View) -> int:
        return self.buffers[view.value].address + view.offset * view.dtype.nbytes

    @cached_property
    def commands(self) -> CommandList:
        """The command list of the steps, which says of each array what a step may touch of it."""
        commands = self.device.command_list()
        for step, record in zip(self.steps, self.records):
            executable, arguments, positions = self._compile(step)
            spans: tuple[dict[int, Span], dict[int, Span]] = ({}, {})  # reads, writes
            views = ((i, a) for i, a in enumerate(step.arguments) if isinstance(a, View))
            for position, (i, view) in zip(positions, views):
                (low, high), start = self._range(view), self.address(view)
                spans[i in step.writes][position] = low - start, high - start
            commands.launch(executable, step.grid, arguments, reads=spans[0], writes=spans[1], label=record.name)
        return commands

    def _range(self, view: View) -> tuple[int, int]:
        low, high = view.span()
        start = self.buffers[view.value].address
        return start + low * view.dtype.nbytes, start + high * view.dtype.nbytes

    def _compile(self, step: Step) -> tuple[Any, list[Buffer | int | bytes], list[int]]:
        """The executable, its arguments, and which of these are the arrays."""
        from nitinol.compiler.driver import compile_function, compile_kernel
        from nitinol.runtime.launch import encode

        function, signature, values, positions = self._resolve(step)
        aliases = self._aliases(step, len(values), positions)
        target = self.device.target
        if signature is not None:
            types = [type for _, type, _ in signature.parameters]
            executable = compile_kernel(step.node.kernel, signature, aliases, target)  # type: ignore[attr-defined]
        else:
            types = [parameter.type for parameter in function.parameters]
            executable = _executables.get((function, aliases, target))
            if executable is None:
                executable = compile_function(function, aliases, str(function), target)
                _executables[function, aliases, target] = executable
        arguments: list[Buffer | int | bytes] = [encode(value, type) for value, type in zip(values, types)]
        for position, view in zip(positions, (a for a in step.arguments if isinstance(a, View))):
            arguments[position] = self.buffers[view.value].view(view.offset * view.dtype.nbytes)
        return executable, arguments, positions

    def _resolve(self, step: Step) -> tuple[Any, Any, list[Any], list[int]]:
        """The generated function, or the kernel's signature; the values of the run-time parameters; which of these
        are the arrays."""
        if step.function is not None:
            values = [self.address(a) if isinstance(a, View) else a[0] for a in step.arguments]
            return step.function, None, values, [i for i, a in enumerate(step.arguments) if isinstance(a, View)]
        node = step.node
        assert isinstance(node, Launch)
        bound = dict(step.constants)
        for name, view in zip(step.names, step.arguments):
            assert isinstance(view, View)
            bound[name] = _Pointer(self.address(view), view.dtype)
        signature, values = specialise(node.kernel, bound, node.warps, node.stages)
        order = [name for name, _, _ in signature.parameters]
        return None, signature, values, [order.index(name) for name in step.names]

    def _aliases(self, step: Step, count: int, positions: list[int]) -> tuple[int, ...]:
        """A number per run-time parameter; equal where one array is written and another overlaps it."""
        classes = list(range(count))
        seen: list[tuple[int, int, bool, int]] = []
        views = ((i, a) for i, a in enumerate(step.arguments) if isinstance(a, View))
        for position, (i, view) in zip(positions, views):
            low, high = self._range(view)
            written = i in step.writes
            for start, end, other_written, other in seen:
                if (written or other_written) and low < end and start < high:
                    mine, theirs = classes[position], classes[other]
                    classes = [theirs if c == mine else c for c in classes]
            seen.append((low, high, written, position))
        return tuple(classes)

    def _interpret(self) -> None:
        from nitinol.compiler import interpreter
        from nitinol.compiler.driver import tile_ir

        for step in self.steps:
            function, signature, values, positions = self._resolve(step)
            if function is None:
                function = tile_ir(step.node.kernel, signature)  # type: ignore[attr-defined]
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


_executables: dict[Any, Any] = {}


class _Pointer:
    """An array argument as `specialise` wants it."""

    def __init__(self, address: int, dtype: DType) -> None:
        self.__nitinol_pointer__ = (address, dtype)


def as_numpy(buffer: Buffer, view: View) -> np.ndarray:
    """The elements of a view, in place where the host sees the device's memory; bf16 as uint16, int1 as uint8."""
    if buffer.device.host_memory or not view.size:
        return elements(buffer.as_numpy() if view.size else np.empty(0, np.uint8), view)
    low, high = (place * view.dtype.nbytes for place in view.span())
    return elements(buffer.view(low, high - low).read(), view, low)


def elements(memory: np.ndarray, view: View, start: int = 0) -> np.ndarray:
    """A view's elements in a value's bytes, of which those from `start` on are given."""
    dtype = memory_dtype(view.dtype)
    if not view.size:
        return np.empty(view.shape, dtype)
    strides = tuple(s * dtype.itemsize for s in view.strides)
    return np.ndarray(view.shape, dtype, memory, view.offset * dtype.itemsize - start, strides)


def _record(step: Step) -> Record:
    views = [a for a in step.arguments if isinstance(a, View)]
    name = step.function.name if step.function is not None else step.node.name
    nbytes = step.nbytes
    if nbytes is None:
        nbytes = sum((high - low) * view.dtype.nbytes for view in views for low, high in [view.span()])
    return Record(
        name, step.node.place, step.grid, tuple(v.shape for v in views), tuple(v.dtype.name for v in views), nbytes,
        step.operations,
    )  # fmt: skip

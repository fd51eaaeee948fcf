"""What a piece of the graph becomes: operations taken apart into tile kernels for one target, fused, placed in memory.

A plan depends on the structure alone (operations, attributes, layouts, who shares what), not on which memory or which
numbers it is run with, so that the next piece of the same structure uses it again. It is worked out on stand-ins: the
calls are recorded once more on values that have no memory, and what is not elementwise is lowered there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, cast

from nitinol.compiler.driver import compile_function, compile_kernel
from nitinol.graph.array import Array
from nitinol.graph.dtypes import BlockType, bytes_of
from nitinol.graph.nodes import INDEX, Call, Number, Place, Value, View, lowering, record, recording, state
from nitinol.graph.operation import Launch
from nitinol.graph.schedule import Step, is_map, make_steps, needed
from nitinol.language.jit import specialise
from nitinol.language.types import uint8
from nitinol.runtime.device import Buffer

ALIGNMENT = 64  # of every buffer, also of those inside the arena
THERE = cast(Buffer, object())  # the buffer of stand-ins for memory that is there already


class Outside(NamedTuple):
    """What a plan must know of memory that is there already: its address modulo 16, and a number that is the same for
    pieces of memory that overlap where one of them is written."""

    misalignment: int
    overlaps: int


@dataclass(frozen=True)
class Record:
    """One entry of a command list, for people: `nitinol trace` prints these.

    shapes and dtypes: of the array arguments in order. nbytes: what the arguments hold. operations: arithmetic, if
    the kernel's author or the fusion knows. place: file, line, function of the program that asked for it.
    """

    name: str
    place: Place
    grid: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    nbytes: int
    operations: int | None


@dataclass(eq=False)
class Plan:
    """Steps on stand-ins. outside: the stand-ins of memory that is there, in the order in which it is given; kept: of
    results that get memory of their own; done: which of the calls have run when the steps have."""

    steps: list[Step]
    outside: list[Value]
    facts: list[Outside]
    kept: list[Value]
    results: dict[tuple[int, int], Value]  # (call, result) to stand-in, of what is kept
    done: list[bool]
    target: str
    executables: list[tuple[Any, list[Any], list[int]]] = field(default_factory=list)
    idle: list[Any] = field(default_factory=list)  # programs of this plan that no thread is using

    @cached_property
    def memory(self) -> tuple[dict[Value, int], int]:
        """Offsets of the intermediate values in one arena, and its size."""
        return plan_memory(self.steps, {*self.kept, *self.outside})

    @cached_property
    def updated(self) -> list[int]:
        """Which of the outside memory is written."""
        written = {a.value for step in self.steps for i, a in enumerate(step.arguments) if i in step.writes}  # type: ignore[union-attr]
        return [i for i, value in enumerate(self.outside) if value in written]

    @cached_property
    def records(self) -> list[Record]:
        return [_record(step) for step in self.steps]

    def compile(self) -> None:
        """Makes the steps' executables: for each the executable, its arguments (numbers, Numbers, views), and which of
        them are views."""
        if len(self.executables) != len(self.steps):
            self.executables = [self._compile(step) for step in self.steps]

    def _compile(self, step: Step) -> tuple[Any, list[Any], list[int]]:
        function, signature, values, positions = resolve(step, self._address)
        aliases = self._aliases(step, len(values), positions)
        views = [a for a in step.arguments if isinstance(a, View)]
        if signature is not None:
            types = [type for _, type, _ in signature.parameters]
            kernel = cast(Launch, step.call.form.operation).kernel
            executable = compile_kernel(kernel, signature, aliases, self.target)
        else:
            types = [parameter.type for parameter in function.parameters]
            executable = _executables.get((function, aliases, self.target))
            if executable is None:
                executable = compile_function(function, aliases, str(function), self.target)
                _executables[function, aliases, self.target] = executable
        for position, view in zip(positions, views):
            values[position] = view
        return executable, [(value, type) for value, type in zip(values, types)], positions

    def _address(self, view: View) -> int:
        """An address with the divisors of the true one."""
        place = self._places.get(view.value)
        return first_byte(view) + (0 if place is None else self.facts[place].misalignment)

    @cached_property
    def _places(self) -> dict[Value, int]:
        return {value: i for i, value in enumerate(self.outside)}

    def _aliases(self, step: Step, count: int, positions: list[int]) -> tuple[int, ...]:
        """A number per run-time parameter; equal where one array is written and another overlaps it."""
        classes = list(range(count))
        seen: list[tuple[View, bool, int]] = []
        views = ((i, a) for i, a in enumerate(step.arguments) if isinstance(a, View))
        for position, (i, view) in zip(positions, views):
            written = i in step.writes
            for other, other_written, theirs in seen:
                if (written or other_written) and self._overlap(view, other):
                    mine, its = classes[position], classes[theirs]
                    classes = [its if c == mine else c for c in classes]
            seen.append((view, written, position))
        return tuple(classes)

    def _overlap(self, a: View, b: View) -> bool:
        if a.value is b.value:
            (low, high), (start, end) = span_bytes(a), span_bytes(b)
            return low < end and start < high
        if a.value in self._places and b.value in self._places:
            return self.facts[self._places[a.value]].overlaps == self.facts[self._places[b.value]].overlaps
        return False


_executables: dict[Any, Any] = {}


def make_plan(
    calls: Sequence[Call], outside: Sequence[Value], facts: Sequence[Outside], targets: set[Value],
    lasting: set[Value], target: str,
) -> Plan:  # fmt: skip
    """The plan of these calls, in order. outside: values that are there already; targets: which results must be
    stored; lasting: which are to be kept if they are stored anyway."""
    stand_ins: dict[Value, Value] = {INDEX: INDEX}
    for value in outside:
        stand_ins[value] = Value(value.shape, value.dtype, None, THERE)
    numbers = itertools.count()
    origins: list[list[Call]] = []
    family = target.partition(":")[0]  # "cuda" of "cuda:90": what it is lowered for
    with lowering(family), recording() as recorded:
        for call in calls:
            before = len(recorded)
            state.place = call.place
            for value, stand_in in zip(call.outputs, _again(call, stand_ins, numbers, family)):
                stand_ins[value] = stand_in
            origins.append(recorded[before:])
    wanted = {stand_ins[v] for v in targets if v in stand_ins}
    kept_ways = {stand_ins[v] for v in lasting if v in stand_ins}
    # What is not elementwise runs once, now: all of its results that somebody holds are stored, also those that a
    # lowering which reads them has left out because it has no elements.
    once = [call for call in calls if not is_map(call)]
    stored = wanted | {stand_ins[v] for call in once for v in call.outputs if v in lasting}
    effects = [c for c in recorded if any(v.value.buffer is THERE or v.value in stored for v in c.updates)]
    run = needed([v for v in stored if v.pending], effects)
    alive = [call.outputs for call in run]  # so that they are the same objects throughout
    steps, fused = make_steps(run, stored)
    computed = {a.value for step in steps for a in step.arguments if isinstance(a, View) and a.value.buffer is None}
    # Nothing computes what has no elements, and a lowering may leave it out: it is there as it is.
    kept = [v for v in stand_ins.values() if v in stored or (v in kept_ways and (v in computed or not v.size))]
    kept = [v for v in dict.fromkeys(kept) if v.buffer is None]
    results = {
        (i, j): stand_ins[value]
        for i, call in enumerate(calls) for j, value in enumerate(call.outputs) if stand_ins[value] in kept
    }  # fmt: skip
    later = {call for call in recorded if is_map(call) and not call.form.updates} - (set(run) - fused)
    done = [call.form.operation.lower is not None or later.isdisjoint(made) for call, made in zip(calls, origins)]
    del alive
    return Plan(steps, [stand_ins[v] for v in outside], list(facts), kept, results, done, target)


def _again(call: Call, stand_ins: dict[Value, Value], numbers: Any, target: str) -> Sequence[Value]:
    """Records the call on stand-ins, or what it is lowered to; its results."""
    form = call.form
    operands = tuple([stand_ins[o] if type(o) is Value else Number(next(numbers)) for o in call.operands])
    operation = form.operation
    if operation.lower is None:
        return record(form, operands)
    arrays = [Array(cast(Value, o), layout) for o, layout in zip(operands, form.layouts)]
    try:
        results = operation.lower(target, *form.spread(arrays), **form.attributes)
    except (ValueError, TypeError) as error:  # long after the line that asked for it
        raise type(error)(f"{error} ({operation.name} in {call.place.file}:{call.place.line})") from error
    results = () if results is None else (results,) if isinstance(results, Array) else tuple(results)
    found = []
    for result, wanted in zip(results, form.outputs):
        if result.layout.shape != wanted.shape or result.dtype != wanted.dtype:
            raise TypeError(
                f"{operation.name}: its lowering gives shape {result.shape} and type {result.dtype}, but its rule says "
                f"{wanted.shape} and {wanted.dtype}"
            )
        value, layout = result.value, result.layout
        own = value.buffer is None and layout.contiguous and layout.size == value.size and layout.dtype == value.dtype
        if not own or result.value in operands or result.value in found:
            result = result.copy()
        found.append(result.value)
    return found


def resolve(step: Step, address: Any) -> tuple[Any, Any, list[Any], list[int]]:
    """The generated function, or the kernel's signature; the values of the run-time parameters; which of these are the
    arrays. address(view) gives an address."""
    if step.function is not None:
        values = [address(a) if isinstance(a, View) else a[0] for a in step.arguments]
        return step.function, None, values, [i for i, a in enumerate(step.arguments) if isinstance(a, View)]
    operation = cast(Launch, step.call.form.operation)
    bound = dict(step.constants)
    for name, view in zip(step.names, step.arguments):
        assert isinstance(view, View)
        bound[name] = Pointer(address(view), uint8 if _is_block(view) else view.dtype)
    signature, values = specialise(operation.kernel, bound, operation.warps, operation.stages)
    order = [name for name, _, _ in signature.parameters]
    return None, signature, values, [order.index(name) for name in step.names]


class Pointer:
    """An array argument as `specialise` wants it."""

    def __init__(self, address: int, dtype: Any) -> None:
        self.__nitinol_pointer__ = (address, dtype)


def _is_block(view: View) -> bool:
    return isinstance(view.layout.dtype, BlockType)


def span_bytes(view: View) -> tuple[int, int]:
    """First and last + 1 byte of a view in its value's memory."""
    low, high = view.layout.span()
    if _is_block(view):
        return bytes_of(view.layout.dtype, low), bytes_of(view.layout.dtype, high)
    return low * view.dtype.nbytes, high * view.dtype.nbytes


def first_byte(view: View) -> int:
    """Where the first element lies in the value's memory."""
    return bytes_of(view.layout.dtype, view.layout.offset)


# ---------------------------------------------------------------------------------------------------------- memory


def plan_memory(steps: list[Step], elsewhere: set[Value]) -> tuple[dict[Value, int], int]:
    """Offsets of the intermediate values in one arena, and its size: largest first, at the lowest offset that is free
    during the value's life. Lives are counted in phases, so that sharing memory needs no further barrier."""
    lives: dict[Value, tuple[int, int]] = {}
    for step, phase in zip(steps, phases(steps)):
        for argument in step.arguments:
            if isinstance(argument, View) and argument.value not in elsewhere:
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


def phases(steps: Iterable[Step]) -> list[int]:
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


def _record(step: Step) -> Record:
    views = [a for a in step.arguments if isinstance(a, View)]
    nbytes = step.nbytes
    if nbytes is None:
        nbytes = sum(high - low for view in views for low, high in [span_bytes(view)])
    return Record(
        step.name, step.call.place, step.grid, tuple(v.shape for v in views), tuple(v.dtype.name for v in views),
        nbytes, step.operations,
    )  # fmt: skip

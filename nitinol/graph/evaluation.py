"""Evaluating arrays: the run of everything that some values need, and the methods of `Array` that ask for elements."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np

from nitinol.graph.array import Array, attribute, method, tracing
from nitinol.graph.dtypes import BlockType, from_bfloat16_bits
from nitinol.graph.nodes import INDEX, Call, Value, root, state, unwritten
from nitinol.graph.plan import Outside, Plan, make_plan
from nitinol.graph.program import Program, as_numpy
from nitinol.graph.schedule import is_map, needed
from nitinol.language.types import DType, bfloat16, int1, uint8
from nitinol.runtime import get_device
from nitinol.runtime.device import Buffer, DeviceError

MOST_PLANS = 1 << 12  # structures that are remembered
_plans: dict[Any, Plan] = {}
# Whoever evaluates looks at calls, runs them and notes it: one thread at a time, or an update could run twice.
_lock = threading.RLock()


def evaluate(*arrays: Array) -> None:
    """Computes several arrays in one command list: one submission, one wait."""
    evaluate_values([array.value for array in arrays])


def evaluate_values(values: Iterable[Value], calls: Sequence[Call] = (), before: int = 1 << 62) -> None:
    """Computes values (and runs calls), as the program had them at number `before`."""
    values = [root(value) for value in values]
    if state.tracing is not None:
        state.tracing.refuse(values)
    if not calls and not any(value.pending for value in values):
        return
    with _lock:
        values = [value for value in values if value.pending]
        if values or calls:
            _evaluate(values, calls, before)


def _evaluate(values: list[Value], calls: Sequence[Call], before: int) -> None:
    run = needed(values, calls, before)
    results = [call.outputs for call in run]  # so that they are the same objects throughout
    lost = [v for v in values if v.buffer is None and v.size and not v.writes and (v.call is None or v.call.done)]
    if lost:
        raise ValueError(
            f"an array of shape {lost[0].shape} was computed inside a compiled function and is not one of its "
            "results; return it from the function"
        )
    lasting = _lasting(run, results)
    targets = set(values)
    for call in run:
        for position in call.form.updates:
            value = call.operands[position]
            assert isinstance(value, Value)
            if value in lasting or value.buffer is not None or _lasts(value, set(run), lasting):
                targets.add(value)
            # What reads the old contents of something that is updated cannot be computed again later.
            stale = [r for r in value.pending_readers() if r.number < call.number]
            targets.update(v for r in stale for v in r.outputs if v in lasting)
    if calls:
        targets.update(v for call in calls for v in call.outputs if v in lasting)
    outside, key, numbers, device = structure(run, results, targets, lasting)
    facts = outside_facts(outside, any(call.form.updates for call in run))
    key += [tuple(facts), device.target]
    plan = _plans.get(tuple(key))
    if plan is None:
        plan = make_plan(run, outside, facts, targets, lasting, device.target)
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        _plans[tuple(key)] = plan
    program = plan.idle.pop() if plan.idle else None
    if program is None or program.device is not device:
        program = Program(plan, device)
    program.bind([cast(Buffer, value.buffer) for value in outside], numbers)
    program.run()
    for (i, j), stand_in in plan.results.items():
        value = results[i][j]
        value.buffer, value.call = program.buffers[stand_in], None
    finish([call for call, done in zip(run, plan.done) if done])
    program.release()
    plan.idle.append(program)


def structure(
    run: Sequence[Call], results: Sequence[tuple[Value, ...]], targets: set[Value], lasting: set[Value]
) -> tuple[list[Value], list[Any], list[Any], Any]:
    """What is there already, the key of the plan, the numbers, and the device."""
    places: dict[Value, int] = {INDEX: -1}
    outside: list[Value] = []
    numbers: list[Any] = []
    key: list[Any] = []
    device: Any = None
    for call, fresh in zip(run, results):
        key.append(call.form)
        for operand in call.operands:
            if type(operand) is not Value:
                numbers.append(operand)
                continue
            place = places.get(operand)
            if place is None:
                place = places[operand] = len(places)
                outside.append(operand)
                if operand.buffer is None:
                    raise AssertionError(f"a value of shape {operand.shape} has neither memory nor a call")
                if device is not operand.buffer.device:
                    if device is not None:
                        names = f"{device.name} and {operand.buffer.device.name}"
                        raise DeviceError(
                            f"{call.name} ({call.place.file}:{call.place.line}) takes arrays of several devices "
                            f"({names}); copy them to one device first"
                        )
                    device = operand.buffer.device
            key.append(place)
        for value in fresh:
            places[value] = len(places)
            key.append((value in targets, value in lasting))
    return outside, key, numbers, get_device() if device is None else device


def outside_facts(outside: Sequence[Value], updates: bool) -> list[Outside]:
    """What a plan must know of each piece of memory."""
    buffers: list[Buffer] = [value.buffer for value in outside]  # type: ignore[misc]
    if not updates or (len({id(b._root or b) for b in buffers}) == len(buffers) and not any(
        b._root is None and isinstance(b._owner, np.ndarray) for b in buffers
    )):
        return [Outside(b.address % 16, i) for i, b in enumerate(buffers)]
    facts: list[Outside] = []
    for i, b in enumerate(buffers):
        shared = next((j for j, a in enumerate(buffers[:i])
                       if a.address < b.address + b.nbytes and b.address < a.address + a.nbytes), None)  # fmt: skip
        facts.append(Outside(b.address % 16, i if shared is None else facts[shared].overlaps))
    return facts


def evaluate_readers(value: Value) -> None:
    """Computes what was asked of a value's present contents, which are about to change."""
    readers = value.pending_readers()
    evaluate_values([output for call in readers for output in call.outputs], [c for c in readers if c.form.updates])


def _lasting(run: Sequence[Call], results: Sequence[tuple[Value, ...]]) -> set[Value]:
    """Which results may be asked for after a run of these calls: by the program, or by a call that has not run then."""
    inside = set(run)
    found: set[Value] = set()
    for fresh in reversed(results):  # readers first
        for value in fresh:
            if value.handles or _lasts(value, inside, found):
                found.add(value)
    return found


def _lasts(value: Value, inside: set[Call], lasting: set[Value]) -> bool:
    """Whether something that has not run after the calls `inside` wants the value."""
    if value.handles:
        return True
    for reader in value.pending_readers():
        # A fused call has not run, and may be asked for later.
        if reader not in inside or (is_map(reader) and not reader.form.updates and reader.outputs[0] in lasting):
            return True
    return False


def finish(calls: Iterable[Call]) -> None:
    """Notes that these calls have run."""
    for call in calls:
        call.done = True
        for position in call.form.updates:
            value = call.operands[position]
            assert isinstance(value, Value)
            if call in value.writes:
                value.writes.remove(call)
                if not value.writes:
                    unwritten.discard(value)


# ------------------------------------------------------------------------------------------------------ of Array


def _evaluate_array(self: Array) -> Array:
    """Computes the elements now: one submission, one wait. Returns the array itself."""
    evaluate_values([self.value])
    return self


def _buffer(self: Array) -> Buffer:
    """The device memory of the whole value that this array is a view of; evaluates first."""
    evaluate_values([self.value])
    buffer = root(self.value).buffer
    assert buffer is not None
    return buffer


def _pointer(self: Array) -> tuple[int, DType]:
    """Address of the first element and its type, for `kernel[grid](array)`."""
    layout = self.layout
    if isinstance(layout.dtype, BlockType):
        return self.buffer.address, uint8
    return self.buffer.address + layout.offset * layout.dtype.nbytes, layout.dtype


attribute("evaluate", _evaluate_array)
attribute("buffer", property(_buffer))
attribute("__nitinol_pointer__", property(_pointer))


@method
def numpy(self: Array, copy: bool = True) -> np.ndarray:
    """The elements as a NumPy array (bfloat16 as float32, which holds every value of it; blocks as their bytes).

    copy=False: a read-only window on the memory where the type allows, for reading at once: a compiled function's
    next call overwrites its results, and in-place updates show.
    """
    raw = as_numpy(self.buffer, self.view)
    if self.dtype == bfloat16:
        return from_bfloat16_bits(raw)
    raw = raw.view(np.bool_) if self.dtype == int1 else raw
    if copy:
        return raw.copy()
    raw.flags.writeable = False
    return raw


@method
def __array__(self: Array, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    result = self.numpy(copy=copy is not False)
    return result if dtype is None else result.astype(dtype, copy=False)


@method
def item(self: Array) -> Any:
    """The only element as a Python number."""
    if self.size != 1:
        raise ValueError(f"item() of an array of shape {self.shape}, which has {self.size} elements; expected one")
    return self.numpy(copy=False).item()


@method
def tolist(self: Array) -> Any:
    """The elements as nested lists of Python numbers."""
    return self.numpy(copy=False).tolist()


@method
def __repr__(self: Array) -> str:
    if self.is_quantized:
        return f"Array(shape={self.shape}, stored as {self.dtype})"
    if tracing():
        return f"Array(shape={self.shape}, dtype={self.dtype}, not evaluated)"
    text = np.array2string(self.numpy(), separator=", ", prefix="Array(", threshold=200)
    return f"Array({text}, shape={self.shape}, dtype={self.dtype})"

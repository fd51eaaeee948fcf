"""Evaluating: the run of everything that some values need, also if an exception comes in between."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np

from nitinol.graph.array import Array
from nitinol.graph.nodes import INDEX, Call, Value, root, state, unwritten
from nitinol.graph.plan import Outside, Plan, make_plan
from nitinol.graph.program import Program
from nitinol.graph.schedule import is_map, needed
from nitinol.runtime import get_device
from nitinol.runtime.device import Buffer, DeviceError

MOST_PLANS, MOST_STEPS = 1 << 12, 1 << 15  # structures that are remembered, and launches in all of them: some 4 KB each
_plans: dict[Any, Plan] = {}
# Whoever evaluates looks at calls, runs them and notes it: one thread at a time, or an update could run twice.
_lock = threading.RLock()


def _after_fork() -> None:
    """In a forked child: whoever held the lock is not here, and what it ran has not happened here."""
    global _lock
    _lock = threading.RLock()
    _runs.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def evaluate(*arrays: Array) -> None:
    """Computes several arrays in one command list: one submission, one wait."""
    evaluate_values([array.value for array in arrays])


def evaluate_values(values: Iterable[Value], calls: Sequence[Call] = (), before: int = 1 << 62) -> None:
    """Computes values (and runs calls), as the program had them at number `before`."""
    values = [root(value) for value in values]
    if state.tracing is not None:
        state.tracing.refuse(values)
    if not calls and not any([value.pending for value in values]):
        return
    with _lock:
        if _runs:
            _finish_runs()
        values = [value for value in values if value.pending]
        if values or calls:
            _evaluate(values, calls, before)


def _evaluate(values: list[Value], calls: Sequence[Call], before: int) -> None:
    run = needed(values, calls, before)
    if len(values) > 1 and not calls and _several_devices(run):
        for one in values:  # each where it belongs
            evaluate_values([one], before=before)
        return
    results = [call.outputs for call in run]  # so that they are the same objects throughout
    lost = [v for v in values if v.buffer is None and (v.call is None or v.call.done) and v.size and not v.writes]
    if lost:
        raise ValueError(
            f"an array of shape {lost[0].shape} was computed inside a compiled function and is not one of its "
            "results; return it from the function"
        )
    inside = set(run)
    lasting, again = _lasting(run, inside, results)
    targets = set(values)
    updating = False
    for call in run:
        if not call.form.updates:
            continue
        updating = True
        for position in call.form.updates:
            value = call.operands[position]
            assert isinstance(value, Value)
            if value in lasting or value.buffer is not None or _lasts(value, inside, again):
                targets.add(value)
            # What reads the old contents of something that is updated cannot be computed again later.
            stale = [r for r in value.pending_readers() if r.number < call.number]
            targets.update(v for r in stale for v in r.outputs if v in lasting)
    if calls:
        targets.update(v for call in calls for v in call.outputs if v in lasting)
    outside, parts, numbers, device = structure(run, results, targets, lasting)
    facts = outside_facts(outside, updating)
    key = (*parts, facts, device.target)
    plan = _plans.get(key)
    if plan is None:
        plan = make_plan(run, outside, facts, targets, lasting, device.target)
        if len(_plans) >= MOST_PLANS or sum([len(p.steps) for p in _plans.values()]) >= MOST_STEPS:
            _plans.clear()
        _plans[key] = plan
    program = plan.idle.pop() if plan.idle else None
    if program is None or program.device is not device:
        program = Program(plan, device)
    program.bind([cast(Buffer, value.buffer) for value in outside], numbers)
    this = _Run(program, run, results)
    _runs.append(this)
    try:
        program.run()
    except DeviceError:
        this.note(failed=True)
        _runs.remove(this)
        raise
    this.note()
    _runs.remove(this)
    program.release()
    plan.idle.append(program)


def _several_devices(run: Sequence[Call]) -> bool:
    """Whether calls that start from nothing are among the others and belong to another device."""
    devices = {id(call.device) for call in run if call.device is not None}
    if devices:
        operands = [operand for call in run for operand in call.operands if isinstance(operand, Value)]
        devices.update([id(operand.buffer.device) for operand in operands if operand.buffer is not None])
    return len(devices) > 1


class _Run:
    """A run from just before it is submitted until what it did is noted. An exception from outside (Ctrl-C) may come
    between any two steps; then it stays in `_runs`, and whoever evaluates next finishes it: an update that has been
    submitted is never submitted again."""

    def __init__(self, program: Program, calls: Sequence[Call], results: Sequence[tuple[Value, ...]]) -> None:
        self.program, self.calls, self.results = program, calls, results
        self.earlier = program.submission  # the number of the program's latest submission so far

    @property
    def submitted(self) -> bool:
        return self.program.submission > self.earlier

    def note(self, failed: bool = False) -> None:
        """Enters into the graph what has run; once more does no harm. Of a run that failed only the updates: other
        results are computed again, and fail again, when somebody asks for them."""
        if failed and not self.submitted:
            return
        plan = self.program.plan
        for (i, j), stand_in in plan.results.items():
            if not failed or self.calls[i].form.updates:
                value = self.results[i][j]
                value.buffer, value.call = self.program.buffers[stand_in], None
        finish([call for call, done in zip(self.calls, plan.done) if done and (not failed or call.form.updates)])


_runs: list[_Run] = []


def _finish_runs() -> None:
    """Waits for what an exception has left running, and notes it."""
    for this in list(_runs):
        if this.submitted:
            failed = False
            try:
                this.program.device.synchronize()
            except DeviceError:  # whoever asks for the results is told
                failed = True
            this.note(failed)
        _runs.remove(this)


def structure(
    run: Sequence[Call], results: Sequence[tuple[Value, ...]], targets: set[Value], lasting: set[Value]
) -> tuple[list[Value], list[Any], list[Any], Any]:
    """What is there already, the key of the plan, the numbers, and the device: where the memory is, or without any the
    one that was current when the first call was recorded."""
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
            if (place := places.get(operand)) is None:
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
            key.append(2 * (value in targets) + (value in lasting))
    if device is None:
        device = next((call.device for call in run if call.device is not None), None) or get_device()
    return outside, key, numbers, device


def outside_facts(outside: Sequence[Value], updates: bool) -> tuple[Outside, ...]:
    """What a plan must know of each piece of memory."""
    buffers: list[Buffer] = [value.buffer for value in outside]  # type: ignore[misc]
    if not updates or (len({id(b._root or b) for b in buffers}) == len(buffers) and not any(
        b._root is None and isinstance(b._owner, np.ndarray) for b in buffers
    )):
        return tuple([_apart(b.address % 16, i) for i, b in enumerate(buffers)])
    facts: list[Outside] = []
    for i, b in enumerate(buffers):
        shared = next((j for j, a in enumerate(buffers[:i])
                       if a.address < b.address + b.nbytes and b.address < a.address + a.nbytes), None)  # fmt: skip
        facts.append(Outside(b.address % 16, i if shared is None else facts[shared].overlaps))
    return tuple(facts)


_apart = functools.cache(Outside)  # the same few again and again


def evaluate_readers(value: Value) -> None:
    """Computes what was asked of a value's present contents, which are about to change."""
    readers = value.pending_readers()
    evaluate_values([output for call in readers for output in call.outputs], [c for c in readers if c.form.updates])


def _lasting(
    run: Sequence[Call], inside: set[Call], results: Sequence[tuple[Value, ...]]
) -> tuple[set[Value], set[Call]]:
    """Which results may be asked for after a run of these calls, by the program or by a call that has not run then;
    and which calls that may happen to: a fused one has not run, and may be asked for later."""
    found: set[Value] = set()
    again: set[Call] = set()
    for call, fresh in zip(reversed(run), reversed(results)):  # readers first
        for value in fresh:
            if value.handles or _lasts(value, inside, again):
                found.add(value)
                if is_map(call) and not call.form.updates:
                    again.add(call)
    return found, again


def _lasts(value: Value, inside: set[Call], again: set[Call]) -> bool:
    """Whether something that has not run after the calls `inside` wants the value."""
    if value.handles:
        return True
    for reference in tuple(value.readers):
        reader = reference()
        if reader is not None and not reader.done and (reader not in inside or reader in again):
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

"""`compile(function)`: trace once, keep the command list, submit it again."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nitinol.compiler.semantics import memory_dtype
from nitinol.graph import evaluation
from nitinol.graph.array import Array, whole_array
from nitinol.graph.conversion import as_operand
from nitinol.graph.dlpack import from_dlpack
from nitinol.graph.dtypes import as_dtype
from nitinol.graph.nodes import (
    Call,
    Value,
    View,
    forget_readers,
    numbers,
    recording,
    root,
    source_line,
    state,
    unwritten,
)
from nitinol.graph.plan import Record, make_plan
from nitinol.graph.program import Program, as_numpy
from nitinol.graph.schedule import needed
from nitinol.runtime import get_device
from nitinol.runtime.device import Buffer, Event, Timestamp

SPARE = 2  # sets of output buffers that are kept: in `y = step(x)` the last y is there while the next is computed
MOST_TRACES = 256  # the oldest goes then: a constant argument that always changes must not fill the memory


_all: weakref.WeakSet[Compiled] = weakref.WeakSet()


def _after_fork() -> None:
    """In a forked child: whoever held a function's lock is not here."""
    for compiled in list(_all):
        compiled._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Compiled:
    """A function of arrays that runs as one command list: one submission, one wait, no allocation.

    Arguments may be Arrays, NumPy arrays, constants (numbers, texts, None: another value traces anew), other objects
    (by identity), and tuples, lists and dicts of these. The function is traced for each combination of shapes and
    types. Arrays that it finds elsewhere are captured: their memory is used at every call, also for updates in place.
    NumPy arguments, and Arrays that differ from call to call, are copied into the list's own input buffers.

    Results go to sets of buffers that nobody looks at any more: in a loop these are two, and nothing is allocated. The
    function must not need elements while it is traced (`numpy()`, `item()`, `if array:`). Called while another is
    traced, or under `grad`, it becomes a part of that. Threads may call it at the same time; their calls run one after
    another.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self._traces: dict[Any, list[_Trace]] = {}
        self._latest: _Trace | None = None
        self._lock = threading.RLock()
        _all.add(self)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        if state.recorders:  # somebody else traces it, or takes its gradient: then its calls are a part of that
            found: list[Any] = []
            _flatten((arguments, keywords), found, [])
            given = [as_operand(leaf) if isinstance(leaf, np.ndarray) else leaf for leaf in found]
            arguments, keywords = _rebuild((arguments, keywords), iter(given))
            return self.function(*arguments, **keywords)
        with self._lock:
            trace, leaves = self._trace(arguments, keywords)
            return trace.run(leaves)

    def submit(self) -> Event | None:
        """Starts a function that takes nothing and gives nothing; None if it has run already. Submitted again before it
        has ended, it runs once more behind itself."""
        with self._lock:
            return self._trace((), {})[0].submit()

    def _trace(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[_Trace, list[Any]]:
        """The trace for such arguments, made if there is none, and the arguments' leaves."""
        leaves: list[Any] = []
        key: list[Any] = []
        for argument in arguments:
            _flatten(argument, leaves, key)
        for name, argument in keywords.items():
            key.append(name)
            _flatten(argument, leaves, key)
        traces = self._traces.setdefault(tuple(key), [])
        if len(self._traces) > MOST_TRACES:
            del self._traces[next(iter(self._traces))]
        for trace in traces:
            if trace.accepts(leaves):
                break
        else:
            copied = {i for trace in traces for i in trace.differing(leaves)}
            traces[:] = [trace for trace in traces if not trace.differing(leaves)]
            trace = _Trace(self.function, arguments, keywords, leaves, copied)
            traces.append(trace)
        self._latest = trace
        return trace, leaves

    @property
    def records(self) -> list[Record]:
        """The entries of the command list that ran last."""
        return self._latest.program.records if self._latest is not None else []

    @property
    def program(self) -> Program | None:
        """The program that ran last."""
        return self._latest.program if self._latest is not None else None

    def profile(self, *arguments: Any, **keywords: Any) -> tuple[Any, list[tuple[Record, Timestamp]]]:
        """Calls the function with time stamps: its result, and when each entry started and ended."""
        with self._lock:
            self(*arguments, **keywords)
            trace = self._latest
            assert trace is not None
            lists = [commands for v in trace.variants if (commands := v.program.commands) is not None]
            for commands in lists:
                commands.profile = True
            try:
                result = self(*arguments, **keywords)
                assert trace.program.commands is not None
                return result, list(zip(trace.program.records, trace.program.commands.timestamps()))
            finally:
                for commands in lists:
                    commands.profile = False


def compile(function: Callable[..., Any]) -> Compiled:
    """The function as one command list, traced at the first call for each combination of shapes (see `Compiled`)."""
    return Compiled(function)


class _Tracing:
    """While a function is traced: the number it began at, and its parameters."""

    def __init__(self, start: int, parameters: set[Value]) -> None:
        self.start, self.parameters = start, parameters

    def refuse(self, values: Sequence[Value]) -> None:
        """RuntimeError where the elements are not there until the trace has run."""
        for value in values:
            made = value.call is not None and value.call.number > self.start
            written = any(w.number > self.start for w in value.writes)
            if value in self.parameters or (value.pending and (made or written)):
                place = source_line()
                raise RuntimeError(
                    f"a compiled function asks for the elements of an array of shape {value.shape} while it is traced "
                    f"({place.file}:{place.line}); return the array and look at it outside"
                )


class _Trace:
    """One traced call: the plan, where its arguments go, and what it returns."""

    def __init__(self, function: Any, arguments: Any, keywords: Any, leaves: list[Any], copied: set[int]) -> None:
        device = get_device()
        self.inputs: list[tuple[int, Buffer, np.dtype]] = []  # which leaf is copied into which memory, of which type
        self.fixed: list[tuple[int, View]] = []  # which leaf is used where it lies
        self.constants = [leaf for leaf in leaves if not isinstance(leaf, (Array, np.ndarray))]  # keeps identities
        mine: list[Any] = []
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, np.ndarray) or (isinstance(leaf, Array) and i in copied):
                dtype = leaf.dtype if isinstance(leaf, Array) else as_dtype(leaf.dtype)
                value = Value(tuple(leaf.shape), dtype)
                value.buffer = device.allocate(value.nbytes)
                self.inputs.append((i, value.buffer, memory_dtype(dtype)))
                mine.append(whole_array(value))
            elif isinstance(leaf, Array):
                leaf.evaluate()
                self.fixed.append((i, View(root(leaf.value), leaf.layout)))
                mine.append(Array(leaf.value, leaf.layout))
            else:
                mine.append(leaf)
        given = iter(mine)
        positional = [_rebuild(argument, given) for argument in arguments]
        named = {name: _rebuild(argument, given) for name, argument in keywords.items()}
        parameters = {root(leaf.value) for leaf in mine if isinstance(leaf, Array)}
        self._record(lambda: function(*positional, **named), parameters)

    def _record(self, call: Callable[[], Any], parameters: set[Value]) -> None:
        start = next(numbers)
        state.tracing = _Tracing(start, parameters)
        try:
            with recording() as calls:
                result = call()
        finally:
            state.tracing = None
        leaves: list[Any] = []
        _flatten(result, leaves, [])
        self.views = [View(root(leaf.value), leaf.layout) for leaf in leaves if isinstance(leaf, Array)]
        self.result = _template(result)
        effects = [c for c in calls if any(_existed(view.value, start) for view in c.updates)]
        targets = list(dict.fromkeys(view.value for view in self.views))
        run = needed([t for t in targets if t.pending], effects)
        alive = [c.outputs for c in run]
        mine = set(calls)
        earlier = [c for c in run if c not in mine]
        if earlier:  # what was asked for before the call, or meanwhile by other threads, is computed once, now
            needs = {v.value for c in run for v in (*c.inputs, *c.updates) if isinstance(v, View)}
            outside = [v for v in (*needs, *targets) if v.call in earlier or any(w in earlier for w in v.writes)]
            evaluation.evaluate_values(outside, earlier, start)
            run = [c for c in run if c in mine]
        self._plan(run, {value for value in targets if value.buffer is None})
        evaluation.finish(calls)
        for value in self.updated:
            forget_readers(value)
        del alive

    def _plan(self, run: list[Call], fresh: set[Value]) -> None:
        results = [c.outputs for c in run]
        self.touched, _, self.numbers, self.device = evaluation.structure(run, results, fresh, set())
        facts = evaluation.outside_facts(self.touched, any(c.form.updates for c in run))
        self.plan = make_plan(run, self.touched, facts, fresh, set(), self.device.target)
        self.fresh = {results[i][j]: stand_in for (i, j), stand_in in self.plan.results.items()}
        self.updated = [self.touched[i] for i in self.plan.updated]
        self.variants = [_Variant(self)]
        self.program = self.variants[0].program

    def accepts(self, leaves: list[Any]) -> bool:
        """Whether the arrays that this trace uses in place are those of the call."""
        return all(root(leaves[i].value) is view.value and leaves[i].layout == view.layout for i, view in self.fixed)

    def differing(self, leaves: list[Any]) -> set[int]:
        """Which of these arrays are others; none if one of them is updated (then it needs a trace of its own)."""
        found = {i for i, view in self.fixed if View(root(leaves[i].value), leaves[i].layout) != view}
        if any(view.value in self.updated for i, view in self.fixed if i in found):
            return set()
        return found | {i for i, _, _ in self.inputs}

    def _next(self, leaves: list[Any]) -> _Variant:
        """The program that is to run, with its inputs in place."""
        for i, buffer, dtype in self.inputs:
            leaf = leaves[i]
            if not isinstance(leaf, np.ndarray):
                buffer.write(as_numpy(leaf.buffer, leaf.view))
            elif leaf.dtype.byteorder == ">":
                buffer.write(leaf.astype(dtype))
            else:
                buffer.write(leaf)
        if unwritten:
            evaluation.evaluate_values([value for value in self.touched if value.writes])
        for value in self.updated:
            if value.readers:
                evaluation.evaluate_readers(value)
        variant = next((v for v in self.variants if not v.held()), None)
        if variant is None:
            variant = _Variant(self, self.program.arena)
        # The one that ran last goes to the end; of those that the program holds, none is needed for a further run.
        # (In one step: Ctrl-C must not leave a list without it.)
        self.variants = [*[v for v in self.variants if v is not variant][-SPARE + 1 :], variant]
        self.program = variant.program
        return variant

    def submit(self) -> Event | None:
        return self._next([]).program.submit()

    def run(self, leaves: list[Any]) -> Any:
        variant = self._next(leaves)
        variant.program.run()
        if not self.views:  # a step of a model: what stands here is time between two tokens
            return _fill(self.result, iter(()))
        fresh = variant.results(self)
        return _fill(self.result, iter([Array(fresh.get(value, value), layout) for value, layout in self.views]))


def _existed(value: Value, start: int) -> bool:
    """Whether a value was there (or asked for) before number `start`."""
    makers = value.writes if value.call is None else [value.call]
    return value.buffer is not None or any(call.number < start for call in makers)


class _Variant:
    """The program with one set of output buffers, and who still looks at these."""

    def __init__(self, trace: _Trace, arena: Buffer | None = None) -> None:
        outside: list[Any] = [value.buffer for value in trace.touched]
        self.program = Program(trace.plan, trace.device)
        self.program.bind(outside, trace.numbers, arena)
        self.latest: list[weakref.ref[Buffer]] = []

    def held(self) -> bool:
        return any(reference() is not None for reference in self.latest)

    def results(self, trace: _Trace) -> dict[Value, Value]:
        """A value for each output of the run that has just ended, on a view of the buffer: who has it, holds that."""
        fresh: dict[Value, Value] = {}
        for value, stand_in in trace.fresh.items():
            buffer = self.program.buffers[stand_in].view(0)
            fresh[value] = Value(value.shape, value.dtype, None, buffer)
            self.latest.append(weakref.ref(buffer))
        self.latest = self.latest[-len(fresh) :] if fresh else []
        return fresh


# ---------------------------------------------------------------------------------------- arguments and results


def _flatten(value: Any, leaves: list[Any], key: list[Any]) -> None:
    """The leaves of nested tuples, lists and dicts, and a key of what a trace depends on."""
    kind = type(value)
    if kind is Array:
        leaves.append(value)
        key.append((value.layout.shape, value.layout.dtype))
    elif kind is np.ndarray:
        leaves.append(value)
        key.append((value.shape, value.dtype))
    elif kind is tuple or kind is list:
        key.append((kind, len(value)))
        for item in value:
            _flatten(item, leaves, key)
    elif kind is dict:
        key.append((kind, tuple(value)))
        for item in value.values():
            _flatten(item, leaves, key)
    elif isinstance(value, np.generic):
        _flatten(np.asarray(value), leaves, key)
    elif hasattr(value, "__dlpack__"):
        _flatten(from_dlpack(value), leaves, key)
    else:
        leaves.append(value)
        key.append((kind, value) if kind in (int, float, str, bool, type(None)) else (kind, id(value)))


def _rebuild(value: Any, leaves: Any) -> Any:
    """The same nesting with other leaves."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind(_rebuild(item, leaves) for item in value)
    if kind is dict:
        return {name: _rebuild(item, leaves) for name, item in value.items()}
    return next(leaves)


_ARRAY = object()  # where a result has an array


def _template(value: Any) -> Any:
    kind = type(value)
    if kind is Array:
        return _ARRAY
    if kind is tuple or kind is list:
        return kind(_template(item) for item in value)
    if kind is dict:
        return {name: _template(item) for name, item in value.items()}
    return value


def _fill(template: Any, arrays: Any) -> Any:
    kind = type(template)
    if template is _ARRAY:
        return next(arrays)
    if kind is tuple or kind is list:
        return kind(_fill(item, arrays) for item in template)
    if kind is dict:
        return {name: _fill(item, arrays) for name, item in template.items()}
    return template

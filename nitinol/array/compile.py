"""`compile(function)`: trace once, keep the command list, submit it again."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from nitinol.array import evaluation, graph, schedule
from nitinol.array.array import Array
from nitinol.array.dlpack import from_dlpack
from nitinol.array.dtypes import as_dtype
from nitinol.array.graph import Node, Value, View, whole
from nitinol.array.program import Program, Record, as_numpy
from nitinol.compiler.semantics import memory_dtype
from nitinol.runtime import get_device
from nitinol.runtime.device import Buffer, Event, Timestamp

# Sets of output buffers: in `y = step(x)` the last y is still there while the next is computed.
VARIANTS = 2
MOST_TRACES = 256  # the oldest goes then: a constant argument that always changes must not fill the memory


class Compiled:
    """A function of arrays that runs as one command list: one submission, one wait, no allocation.

    Arguments may be Arrays, NumPy arrays, constants (numbers, texts, None: another value traces anew), other objects
    (by identity), and tuples, lists and dicts of these. The function is traced for each combination of shapes and
    types. Arrays that it finds elsewhere are captured: their memory is used at every call, also for updates in place.
    NumPy arguments, and Arrays that differ from call to call, are copied into the list's own input buffers.

    Results go to two sets of buffers in turn; the results of the call before the last one, if the program still holds
    them, are moved away first (which allocates: drop them to avoid that). The function must not need elements while it
    is traced (`numpy()`, `item()`, `if array:`).
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self._traces: dict[Any, list[_Trace]] = {}
        self._latest: _Trace | None = None

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        trace, leaves = self._trace(arguments, keywords)
        return trace.run(leaves)

    def submit(self) -> Event | None:
        """Starts a function that takes nothing and gives nothing; None if it has run already. Submitted again before it
        has ended, it runs once more behind itself."""
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
        self(*arguments, **keywords)
        variants = [variant.program.commands for variant in self._latest.variants]  # type: ignore[union-attr]
        for commands in variants:
            commands.profile = True
        try:
            result = self(*arguments, **keywords)
            program = self._latest.program  # type: ignore[union-attr]
            return result, list(zip(program.records, program.commands.timestamps()))
        finally:
            for commands in variants:
                commands.profile = False


def compile(function: Callable[..., Any]) -> Compiled:
    """The function as one command list, traced at the first call for each combination of shapes (see `Compiled`)."""
    return Compiled(function)


class _Trace:
    """One traced call: the program, where its arguments go, and what it returns."""

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
                mine.append(Array(whole(value)))
            elif isinstance(leaf, Array):
                leaf.evaluate()
                self.fixed.append((i, leaf.view))
                mine.append(Array(leaf.view))
            else:
                mine.append(leaf)
        given = iter(mine)
        self.device = device
        positional = [_rebuild(argument, given) for argument in arguments]
        named = {name: _rebuild(argument, given) for name, argument in keywords.items()}
        parameters = {leaf.view.value for leaf in mine if isinstance(leaf, Array)}
        self._record(lambda: function(*positional, **named), parameters)

    def _record(self, call: Callable[[], Any], parameters: set[Value]) -> None:
        nodes: list[Node] = []
        start = next(graph.numbers)
        before = evaluation.tracing
        evaluation.tracing = (start, parameters)
        graph.hooks.append(nodes.append)
        try:
            self.result = call()
        finally:
            graph.hooks.remove(nodes.append)
            evaluation.tracing = before
        leaves: list[Any] = []
        _flatten(self.result, leaves, [])
        views = [leaf.view for leaf in leaves if isinstance(leaf, Array)]
        effects = [node for node in nodes if any(_existed(view.value, start) for view in node.updates)]
        targets = list(dict.fromkeys(view.value for view in views))
        run = schedule.needed([t for t in targets if t.pending], effects)
        alive = [node.outputs for node in run]
        earlier = [node for node in run if node.number < start]
        if earlier:  # what was asked for before the call is computed once, now
            needs = {v.value for node in run for v in (*node.inputs, *node.updates) if isinstance(v, View)}
            outside = [v for v in (*needs, *targets) if v.node in earlier or any(w in earlier for w in v.writes)]
            evaluation.evaluate(outside, earlier, start)
            run = [node for node in run if node.number >= start]
        fresh = {value for value in targets if value.buffer is None}
        self.steps, _ = schedule.make_steps(run, fresh)
        self.fresh = fresh
        self.variants = [_Variant(self.steps, fresh, self.device)]
        self.updated = {view.value for node in run for view in node.updates if view.value.buffer is not None}
        self.touched = {v.value for s in self.steps for v in s.arguments if isinstance(v, View) and v.value.buffer}
        evaluation.finish(nodes)
        for value in self.updated:
            value.readers = weakref.WeakSet(r for r in value.readers if not r.done)
        self.views = views
        self.result = _template(self.result)
        del alive

    def accepts(self, leaves: list[Any]) -> bool:
        """Whether the arrays that this trace uses in place are those of the call."""
        return all(leaves[i].view == view for i, view in self.fixed)

    def differing(self, leaves: list[Any]) -> set[int]:
        """Which of these arrays are others; none if one of them is updated (then it needs a trace of its own)."""
        found = {i for i, view in self.fixed if leaves[i].view != view}
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
        if graph.unwritten:
            evaluation.evaluate([value for value in self.touched if value.writes])
        for value in self.updated:
            if len(value.readers):
                evaluation.evaluate_readers(value)
        variant = next((v for v in self.variants if not v.held()), None)
        if variant is None and len(self.variants) < VARIANTS:
            variant = _Variant(self.steps, self.fresh, self.device, self.variants[0].program.arena)
            self.variants.append(variant)
        elif variant is None:
            self.variants.append(variant := self.variants.pop(0))  # the one that ran longest ago
            variant.release()
        self.program = variant.program
        return variant

    def submit(self) -> Event | None:
        return self._next([]).program.submit()

    def run(self, leaves: list[Any]) -> Any:
        variant = self._next(leaves)
        variant.program.run()
        if not self.views and not self.fresh:  # a step of a model: what stands here is time between two tokens
            return _fill(self.result, iter(()))
        fresh = variant.results()
        arrays = iter([
            Array(View(fresh.get(v.value, v.value), v.dtype, v.shape, v.strides, v.offset)) for v in self.views
        ])  # fmt: skip
        return _fill(self.result, arrays)


def _existed(value: Value, start: int) -> bool:
    """Whether a value was there (or asked for) before number `start`."""
    makers = value.writes if value.node is None else [value.node]
    return value.buffer is not None or any(node.number < start for node in makers)


class _Variant:
    """The program with one set of output buffers, and who still looks at these."""

    def __init__(self, steps: Any, fresh: set[Value], device: Any, arena: Any = None) -> None:
        self.program = Program(steps, fresh, device, arena)
        self.outputs = [(value, self.program.buffers[value]) for value in fresh]
        self.latest: list[weakref.ref[Value]] = []

    def held(self) -> bool:
        return any(reference() is not None for reference in self.latest)

    def results(self) -> dict[Value, Value]:
        """A value for each output of the run that has just ended."""
        fresh = {value: Value(value.shape, value.dtype, None, buffer) for value, buffer in self.outputs}
        self.latest = [weakref.ref(value) for value in fresh.values()]
        return fresh

    def release(self) -> None:
        """Earlier results that are still in use get memory of their own."""
        for reference in self.latest:
            held = reference()
            if held is not None and held.buffer is not None:
                own = self.program.device.allocate(held.nbytes)
                copy = own.device.command_list()
                copy.copy(own, held.buffer)
                own.device.run(copy)
                held.buffer = own


# ---------------------------------------------------------------------------------------- arguments and results


def _flatten(value: Any, leaves: list[Any], key: list[Any]) -> None:
    """The leaves of nested tuples, lists and dicts, and a key of what a trace depends on."""
    kind = type(value)
    if kind is Array:
        leaves.append(value)
        key.append((value.view.shape, value.view.dtype))
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


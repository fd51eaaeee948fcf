"""Evaluating arrays: the run of everything that some values need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from nitinol.array.graph import Map, Node, Value, View, unwritten
from nitinol.array.program import Program
from nitinol.array.schedule import Step, make_steps, needed
from nitinol.runtime import get_device
from nitinol.runtime.device import DeviceError

tracing: tuple[int, set[Value]] | None = None  # while `compile` traces: the number it began at, the parameters


def evaluate(values: Iterable[Value], nodes: Sequence[Node] = (), before: int = 1 << 62) -> None:
    """Computes values (and runs nodes): one command list, one submission, one wait."""
    values = list(values)
    if tracing is not None:
        _refuse(values)
    values = [value for value in values if value.pending]
    if not values and not nodes:
        return
    run = needed(values, nodes, before)
    alive = [node.outputs for node in run]  # so that they are the same objects throughout
    lost = [v for v in values if v.buffer is None and v.size and not v.writes and (v.node is None or v.node.done)]
    if lost:
        raise ValueError(
            f"an array of shape {lost[0].shape} was computed inside a compiled function and is not one of its "
            "results; return it from the function"
        )
    lasting = Lasting(run)
    targets = set(values) | {view.value for node in run for view in node.updates if view.value in lasting}
    for node in run:  # what reads the old contents of something that is updated cannot be computed again later
        readers = [reader for view in node.updates for reader in list(view.value.readers) if reader in lasting.run]
        stale = [reader for reader in readers if reader.number < node.number]
        targets.update(output for reader in stale for output in reader.outputs if output in lasting)
    targets.update(output for node in nodes for output in node.outputs if output in lasting)
    steps, fused = make_steps(run, targets)
    computed = {a.value for step in steps for a in step.arguments if isinstance(a, View) and a.value.buffer is None}
    kept = targets | {value for value in computed if value in lasting}
    program = Program(steps, kept, _device_of(steps))
    program.run()
    for value in kept:
        if value.buffer is None:
            value.buffer, value.node = program.buffers[value], None
    finish(node for node in run if node not in fused)
    del alive


def evaluate_readers(value: Value) -> None:
    """Computes what was asked of a value's present contents, which are about to change."""
    readers = [node for node in value.readers if not node.done]
    evaluate([output for node in readers for output in node.outputs], [node for node in readers if node.updates])


def _refuse(values: Sequence[Value]) -> None:
    assert tracing is not None
    start, parameters = tracing
    for value in values:
        made = value.node is not None and value.node.number > start
        if value in parameters or (value.pending and (made or any(w.number > start for w in value.writes))):
            raise RuntimeError(
                f"a compiled function asks for the elements of an array of shape {value.shape} while it is traced; "
                "return the array and look at it outside"
            )


def _device_of(steps: Sequence[Step]) -> Any:
    """Where the arrays are that the steps start from; without any the default device."""
    views = [argument for step in steps for argument in step.arguments if isinstance(argument, View)]
    devices = {id(v.value.buffer.device): v.value.buffer.device for v in views if v.value.buffer is not None}
    if len(devices) > 1:
        names = " and ".join(device.name for device in devices.values())
        raise DeviceError(f"an operation on arrays of several devices ({names}); copy them to one device first")
    return next(iter(devices.values())) if devices else get_device()


class Lasting:
    """Which values may be asked for after a run of these nodes: by the program, or by a node that has not run then."""

    def __init__(self, run: Iterable[Node]) -> None:
        self.run = set(run)
        self._known: dict[Value, bool] = {}
        for node in sorted(self.run, key=lambda node: -node.number):  # readers first: no deep recursion
            for output in node.outputs:
                self.__contains__(output)

    def __contains__(self, value: Value) -> bool:
        found = self._known.get(value)
        if found is None:
            readers = [reader for reader in list(value.readers) if not reader.done]
            found = self._known[value] = value.handles > 0 or any(
                reader not in self.run
                or (isinstance(reader, Map) and not reader.updates and reader.outputs[0] in self)  # perhaps fused
                for reader in readers
            )
        return found


def finish(nodes: Iterable[Node]) -> None:
    """Notes that these nodes have run."""
    for node in nodes:
        node.done = True
        for view in node.updates:
            if node in view.value.writes:
                view.value.writes.remove(node)
                if not view.value.writes:
                    unwritten.discard(view.value)

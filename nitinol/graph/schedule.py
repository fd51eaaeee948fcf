"""From the graph to kernel launches: what must run, and which calls share a kernel."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from nitinol.compiler.ir import Function
from nitinol.graph.emit import Element, Reference, scalar_type
from nitinol.graph.fusion import Group, lower
from nitinol.graph.nodes import Call, Scalar, Value, View, whole
from nitinol.graph.operation import Launch, Slot
from nitinol.graph.views import pull_back, without_idle_strides
from nitinol.language.types import Type

MOST_STEPS = 64  # operations in one kernel; more would only make it long to compile


@dataclass
class Step:
    """One launch. `arguments`: views of values, or (number, type); `writes`: which positions the kernel writes."""

    call: Call
    arguments: list[View | tuple[Any, Type]]
    writes: frozenset[int]
    grid: tuple[int, ...]
    function: Function | None = None  # of a generated kernel
    names: tuple[str, ...] = ()  # of a library kernel: the arrays' parameters,
    constants: dict[str, Any] = field(default_factory=dict)  # and everything that is not an array
    operations: int | None = None
    nbytes: int | None = None

    @property
    def name(self) -> str:
        return self.function.name if self.function is not None else self.call.name


# --------------------------------------------------------------------------------------------------- what must run


def needed(targets: Iterable[Value], calls: Iterable[Call] = (), before: int = 1 << 62) -> list[Call]:
    """All calls that must run so that the targets hold their values (as the program had them at number `before`) and
    the given calls have run, in order."""
    found: set[Call] = set()
    stack: list[Call] = [call for call in calls if not call.done]

    def demand(value: Value, number: int) -> None:
        """What fills the value and updates it, as the program had it at that number."""
        if value.buffer is None and value.call is not None:
            stack.append(value.call)
        if value.writes:
            stack.extend([call for call in value.writes if call.number < number])

    for value in targets:
        demand(value, before)
    while stack:
        call = stack.pop()
        if call in found or call.done:
            continue
        found.add(call)
        form, operands = call.form, call.operands
        for position in form.reads:
            operand = operands[position]
            if type(operand) is Value:
                if operand.writes:
                    demand(operand, call.number)
                elif operand.buffer is None and operand.call is not None:
                    stack.append(operand.call)
        for position in form.updates:  # earlier updates, and those who still want the old contents
            updated = operands[position]
            assert type(updated) is Value
            demand(updated, call.number)
            stack.extend([r for r in updated.pending_readers() if r.number < call.number])
    return sorted(found, key=_number)


_number = operator.attrgetter("number")


# ------------------------------------------------------------------------------------------------------- which fuse


def is_map(call: Call) -> bool:
    return call.form.operation.tile is not None


def is_reduction(call: Call) -> bool:
    return call.form.operation.reduction is not None


def _shape(call: Call) -> tuple[int, ...]:
    """The shape over which an elementwise call computes."""
    form = call.form
    return form.outputs[0].shape if form.outputs else form.layouts[form.updates[0]].shape


def group_calls(calls: list[Call], targets: set[Value]) -> dict[Call, tuple[Call, View]]:
    """For each elementwise call that is computed inside another call's kernel: that call, and the view of its elements
    over that kernel's shape."""
    consumers: dict[Value, list[Call]] = {}
    for call in calls:
        for view in call.inputs:
            if isinstance(view, View):
                consumers.setdefault(view.value, []).append(call)
    fused: dict[Call, tuple[Call, View]] = {}
    sizes: dict[Call, int] = {}
    for call in reversed(calls):
        if not is_map(call) or call.form.updates or (output := call.outputs[0]) in targets or output.writes:
            continue
        seen = {place for consumer in consumers.get(output, ()) for place in _seen(consumer, call, output, fused)}
        place = seen.pop() if seen else None
        if place is None or seen:
            continue
        root, view = place
        pulled = _pulled(view, call)
        if pulled is None or sizes.get(root, 0) >= MOST_STEPS or _overwritten(pulled, call, root):
            continue
        sizes[root] = sizes.get(root, 0) + 1
        fused[call] = (root, view)
    return fused


def _pulled(view: View, call: Call) -> list[View] | None:
    """The array operands of an elementwise call as `view` sees them through it."""
    operands = [v for v in call.inputs if isinstance(v, View)]
    layouts = pull_back(view.layout, _shape(call), [v.layout for v in operands])
    return None if layouts is None else [View(v.value, layout) for v, layout in zip(operands, layouts)]


def _seen(
    consumer: Call, call: Call, value: Value, fused: dict[Call, tuple[Call, View]]
) -> list[tuple[Call, View] | None]:
    """How a consumer looks at the call's value: in which kernel, over that kernel's shape. None: it cannot fuse."""
    views = [v for v in consumer.inputs if isinstance(v, View) and v.value is value]
    if any(v.dtype != value.dtype for v in views):
        return [None]
    if consumer in fused:
        root, over = fused[consumer]
        pulled = _pulled(over, consumer)
        assert pulled is not None
        return [(root, _plain(v)) for v in pulled if v.value is value]
    if is_map(consumer) or is_reduction(consumer):
        return [(consumer, _plain(v)) for v in views]
    return [None]


def _plain(view: View) -> View:
    return View(view.value, without_idle_strides(view.layout))


def _overwritten(operands: list[View], call: Call, root: Call) -> bool:
    """Whether one of the operands is updated between the call and the kernel that would compute it."""
    return any(
        write is not root and call.number < write.number < root.number
        for view in operands
        for write in view.value.writes
    ) or any(
        # The kernel itself updates what it reads: right only where every element is read and written in place.
        update.value is view.value and _plain(update) != _plain(view)
        for update in root.updates
        for view in operands
    )


def build_group(root: Call, fused: dict[Call, tuple[Call, View]], output: View) -> Group:
    """The kernel of a root with everything that is fused into it."""
    builder = _GroupBuilder(root, fused)
    if is_reduction(root):
        (source,) = root.inputs
        result = builder.refer(source)
        return Group(
            source.shape, builder.leaves, builder.steps, result, output, root.form.operation,
            root.form.attributes["axes"],
        )  # fmt: skip
    result = ("step", builder.emit(root, None))
    return Group(_shape(root), builder.leaves, builder.steps, result, output)


class _GroupBuilder:
    """Collects leaves and steps. (Nested functions that call each other would keep the values alive in a cycle.)"""

    def __init__(self, root: Call, fused: dict[Call, tuple[Call, View]]) -> None:
        self.root, self.fused = root, fused
        self.leaves: list[View | Scalar] = []
        self.places: dict[Any, int] = {}
        self.steps: list[tuple[Element, tuple[Reference, ...]]] = []
        self.at: dict[Call, int] = {}

    def refer(self, operand: View | Scalar) -> Reference:
        if isinstance(operand, View):
            call = operand.value.call
            operand = _plain(operand)
            if call is not None and call in self.fused and self.fused[call][0] is self.root:
                return "step", self.emit(call, operand)
        key = operand if isinstance(operand, View) else operand.key  # a placeholder of a plan, or 0.0 that is not -0.0
        if key not in self.places:
            self.places[key] = len(self.leaves)
            self.leaves.append(operand)
        return "leaf", self.places[key]

    def emit(self, call: Call, view: View | None) -> int:
        """The step that computes a call, as `view` sees it (None: as it is)."""
        if call not in self.at:
            views = [v for v in call.inputs if isinstance(v, View)]
            pulled = iter(views if view is None else _pulled(view, call) or ())
            refs = tuple(self.refer(next(pulled) if isinstance(v, View) else v) for v in call.inputs)
            self.at[call] = len(self.steps)
            self.steps.append((Element(call.form.operation, call.form.attributes), refs))
        return self.at[call]


# --------------------------------------------------------------------------------------------------------- the steps


def make_steps(calls: list[Call], targets: set[Value]) -> tuple[list[Step], set[Call]]:
    """One step per kernel, in order; and the calls that are computed inside another's kernel."""
    fused = group_calls(calls, targets)
    steps: list[Step] = []
    for call in calls:
        if call in fused:
            continue
        operation = call.form.operation
        if isinstance(operation, Launch):
            if all(operation.grid):
                steps.append(_launch_step(call, operation))
            continue
        output = call.updates[0] if call.form.updates else whole(call.outputs[0])
        if not output.size:
            continue
        group = build_group(call, fused, output)
        function, grid, operands, integers = lower(group)
        arguments: list[Any] = [
            (operand.value, scalar_type(operand.dtype)) if isinstance(operand, Scalar) else operand
            for operand in operands
        ]
        types = [p.type for p in function.parameters[len(arguments) :]]
        arguments += zip(integers, types)
        cost = sum(element.operation.cost for element, _ in group.steps) + (group.reduce is not None)
        work = math.prod(group.shape) * cost
        steps.append(Step(call, arguments, frozenset([len(operands) - 1]), grid, function, operations=work))
    return steps, set(fused)


def _launch_step(call: Call, operation: Launch) -> Step:
    names: list[str] = []
    views: list[Any] = []
    constants: dict[str, Any] = {}
    writes = set()
    results = call.outputs
    for name, argument in operation.arguments:
        if not isinstance(argument, Slot):
            constants[name] = argument
            continue
        if argument.kind == "results" or argument.index in call.form.updates:
            writes.add(len(views))
        names.append(name)
        if argument.kind == "results":
            views.append(whole(results[argument.index]))
        else:
            views.append(View(call.operands[argument.index], call.form.layouts[argument.index]))  # type: ignore[arg-type]
    return Step(
        call, views, frozenset(writes), operation.grid, None, tuple(names), constants, operation.operations,
        operation.nbytes,
    )  # fmt: skip

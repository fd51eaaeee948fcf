"""From the graph to kernel launches: what must run, and which nodes share a kernel."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from nitinol.array.emit import Reference, scalar_type
from nitinol.array.fusion import Group, lower
from nitinol.array.graph import Launch, Map, Node, Operation, Reduce, Scalar, Slot, Value, View, pull_back, whole
from nitinol.compiler.ir import Function
from nitinol.language.types import Type

MOST_STEPS = 64  # operations in one kernel; more would only make it long to compile


@dataclass
class Step:
    """One launch. `arguments`: views of values, or (number, type); `writes`: which positions the kernel writes."""

    node: Node
    arguments: list[View | tuple[Any, Type]]
    writes: frozenset[int]
    grid: tuple[int, ...]
    function: Function | None = None  # of a generated kernel
    names: tuple[str, ...] = ()  # of a library kernel: the arrays' parameters,
    constants: dict[str, Any] = field(default_factory=dict)  # and everything that is not an array
    operations: int | None = None
    nbytes: int | None = None


# --------------------------------------------------------------------------------------------------- what must run


def needed(targets: Iterable[Value], nodes: Iterable[Node] = (), before: int = 1 << 62) -> list[Node]:
    """All nodes that must run so that the targets hold their values (as the program had them at number `before`) and
    the given nodes have run, in order."""
    found: set[Node] = set()
    stack: list[Node] = [node for node in nodes if not node.done]

    def demand(value: Value, number: int) -> None:
        """What fills the value and updates it, as the program had it at that number."""
        if value.buffer is None and value.node is not None:
            stack.append(value.node)
        stack.extend(node for node in value.writes if node.number < number)

    for value in targets:
        demand(value, before)
    while stack:
        node = stack.pop()
        if node in found or node.done:
            continue
        found.add(node)
        for view in node.inputs:
            if isinstance(view, View):
                demand(view.value, node.number)
        for view in node.updates:  # earlier updates, and those who still want the old contents
            demand(view.value, node.number)
            stack.extend(reader for reader in view.value.readers if reader.number < node.number)
    return sorted(found, key=lambda node: node.number)


# ------------------------------------------------------------------------------------------------------- which fuse


def group_nodes(nodes: list[Node], targets: set[Value]) -> dict[Node, tuple[Node, View]]:
    """For each Map that is computed inside another node's kernel: that node, and the view of the Map's elements over
    that kernel's shape."""
    consumers: dict[Value, list[Node]] = {}
    for node in nodes:
        for view in node.inputs:
            if isinstance(view, View):
                consumers.setdefault(view.value, []).append(node)
    fused: dict[Node, tuple[Node, View]] = {}
    sizes: dict[Node, int] = {}
    for node in reversed(nodes):
        if not isinstance(node, Map) or node.updates or node.outputs[0] in targets or node.outputs[0].writes:
            continue
        seen = {place for consumer in consumers.get(node.outputs[0], ()) for place in _seen(consumer, node, fused)}
        place = seen.pop() if seen else None
        if place is None or seen:
            continue
        root, view = place
        operands = [v for v in node.inputs if isinstance(v, View)]
        pulled = pull_back(view, node.shape, operands)
        if pulled is None or sizes.get(root, 0) >= MOST_STEPS or _overwritten(pulled, node, root):
            continue
        sizes[root] = sizes.get(root, 0) + 1
        fused[node] = (root, view)
    return fused


def _seen(consumer: Node, node: Map, fused: dict[Node, tuple[Node, View]]) -> list[tuple[Node, View] | None]:
    """How a consumer looks at the node's value: in which kernel, over that kernel's shape. None: it cannot fuse."""
    value = node.outputs[0]
    views = [v for v in consumer.inputs if isinstance(v, View) and v.value is value]
    if any(v.dtype != value.dtype for v in views):
        return [None]
    if consumer in fused:
        root, over = fused[consumer]
        assert isinstance(consumer, Map)
        pulled = pull_back(over, consumer.shape, [v for v in consumer.inputs if isinstance(v, View)])
        assert pulled is not None
        return [(root, _plain(v)) for v in pulled if v.value is value]
    if isinstance(consumer, Map | Reduce):
        return [(consumer, _plain(v)) for v in views]
    return [None]


def _plain(view: View) -> View:
    """The view with strides of 0 where they do not matter, so that equal ones compare equal."""
    strides = tuple(0 if n == 1 else s for n, s in zip(view.shape, view.strides))
    return View(view.value, view.dtype, view.shape, strides, view.offset)


def _overwritten(operands: list[View], node: Node, root: Node) -> bool:
    """Whether one of the operands is updated between the node and the kernel that would compute it."""
    return any(
        write is not root and node.number < write.number < root.number
        for view in operands
        for write in view.value.writes
    ) or any(
        # The kernel itself updates what it reads: right only where every element is read and written in place.
        update.value is view.value and _plain(update) != _plain(view)
        for update in root.updates
        for view in operands
    )


def build_group(root: Map | Reduce, fused: dict[Node, tuple[Node, View]], output: View) -> Group:
    """The kernel of a root with everything that is fused into it."""
    builder = _GroupBuilder(root, fused)
    if isinstance(root, Reduce):
        (source,) = root.inputs
        result = builder.refer(source)
        return Group(source.shape, builder.leaves, builder.steps, result, output, root)
    result = ("step", builder.emit(root, None))
    return Group(root.shape, builder.leaves, builder.steps, result, output)


class _GroupBuilder:
    """Collects leaves and steps. (Nested functions that call each other would keep the values alive in a cycle.)"""

    def __init__(self, root: Node, fused: dict[Node, tuple[Node, View]]) -> None:
        self.root, self.fused = root, fused
        self.leaves: list[View | Scalar] = []
        self.places: dict[Any, int] = {}
        self.steps: list[tuple[Operation, tuple[Reference, ...]]] = []
        self.at: dict[Node, int] = {}

    def refer(self, operand: View | Scalar) -> Reference:
        if isinstance(operand, View):
            node = operand.value.node
            operand = _plain(operand)
            if isinstance(node, Map) and node in self.fused and self.fused[node][0] is self.root:
                return "step", self.emit(node, operand)
        key = operand if isinstance(operand, View) else (operand.dtype, repr(operand.value))  # 0.0 is not -0.0
        if key not in self.places:
            self.places[key] = len(self.leaves)
            self.leaves.append(operand)
        return "leaf", self.places[key]

    def emit(self, node: Map, view: View | None) -> int:
        """The step that computes a node, as `view` sees it (None: as it is)."""
        if node not in self.at:
            views = [v for v in node.inputs if isinstance(v, View)]
            pulled = iter(views if view is None else pull_back(view, node.shape, views) or ())
            refs = tuple(self.refer(next(pulled) if isinstance(v, View) else v) for v in node.inputs)
            self.at[node] = len(self.steps)
            self.steps.append((node.operation, refs))
        return self.at[node]


# --------------------------------------------------------------------------------------------------------- the steps


def make_steps(nodes: list[Node], targets: set[Value]) -> tuple[list[Step], dict[Node, tuple[Node, View]]]:
    """One step per kernel, in order; and the nodes that are computed inside another's kernel."""
    fused = group_nodes(nodes, targets)
    steps: list[Step] = []
    for node in nodes:
        if node in fused:
            continue
        if isinstance(node, Launch):
            if all(node.grid):
                steps.append(_launch_step(node))
            continue
        assert isinstance(node, Map | Reduce)
        output = node.updates[0] if node.updates else whole(node.outputs[0])
        if not output.size:
            continue
        group = build_group(node, fused, output)
        function, grid, operands, integers = lower(group)
        arguments: list[Any] = [
            (operand.value, scalar_type(operand.dtype)) if isinstance(operand, Scalar) else operand
            for operand in operands
        ]
        types = [p.type for p in function.parameters[len(arguments) :]]
        arguments += zip(integers, types)
        work = math.prod(group.shape) * (sum(op.cost for op, _ in group.steps) + (group.reduce is not None))
        steps.append(Step(node, arguments, frozenset([len(operands) - 1]), grid, function, operations=work))
    return steps, fused


def _launch_step(node: Launch) -> Step:
    names: list[str] = []
    views: list[Any] = []
    constants: dict[str, Any] = {}
    writes = set()
    for name, argument in node.arguments.items():
        if isinstance(argument, Slot):
            found = getattr(node, argument.kind)[argument.index]
            if argument.kind != "inputs":
                writes.add(len(views))
            names.append(name)
            views.append(whole(found) if isinstance(found, Value) else found)
        else:
            constants[name] = argument
    return Step(
        node, views, frozenset(writes), node.grid, None, tuple(names), constants, node.operations, node.nbytes
    )

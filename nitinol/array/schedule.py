"""From the graph to one command list: what must run, which nodes share a kernel, where intermediate results lie.

`Program` is the result: steps (kernel, grid, arguments) with bound buffers. `evaluate` makes one and runs it once;
`nitinol.compile` keeps it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from nitinol.array.fusion import Group, lower, scalar_type
from nitinol.array.graph import (
    Launch,
    Map,
    Node,
    Reduce,
    Scalar,
    Slot,
    Value,
    View,
    pull_back,
    unwritten,
    whole,
)
from nitinol.compiler.ir import Function
from nitinol.compiler.semantics import memory_dtype
from nitinol.language.jit import specialise
from nitinol.language.types import DType, Type
from nitinol.runtime.device import Buffer, CommandList, DeviceError

ALIGNMENT = 64  # of every buffer, also of those inside the arena

_device: Any = None


def set_device(device: Any) -> None:
    """Evaluate on this device from now on (None: the default CPU device)."""
    global _device
    _device = device


def get_device() -> Any:
    """The device that arrays are made and evaluated on."""
    from nitinol.runtime import default_device

    return default_device() if _device is None else _device


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
    for node in reversed(nodes):
        if not isinstance(node, Map) or node.updates or node.outputs[0] in targets or node.outputs[0].writes:
            continue
        seen = {place for consumer in consumers.get(node.outputs[0], ()) for place in _seen(consumer, node, fused)}
        if len(seen) != 1 or None in seen:
            continue
        root, view = next(iter(seen))
        operands = [v for v in node.inputs if isinstance(v, View)]
        pulled = pull_back(view, node.shape, operands)
        if pulled is None or _overwritten(pulled, node, root):
            continue
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
    leaves: dict[View | Scalar, int] = {}
    steps: list[Any] = []
    at: dict[Node, int] = {}

    def leaf(operand: View | Scalar) -> tuple[str, int]:
        operand = _plain(operand) if isinstance(operand, View) else operand
        return "leaf", leaves.setdefault(operand, len(leaves))

    def refer(operand: View | Scalar) -> tuple[str, int]:
        if isinstance(operand, View) and operand.value.node in fused and operand.value.buffer is None:
            inner = operand.value.node
            if fused[inner][0] is root:
                return "step", emit(inner, _plain(operand))
        return leaf(operand)

    def emit(node: Any, view: View | None) -> int:
        if node not in at:
            views = [v for v in node.inputs if isinstance(v, View)]
            pulled = iter(views if view is None else pull_back(view, node.shape, views) or ())
            refs = tuple(refer(next(pulled) if isinstance(v, View) else v) for v in node.inputs)
            at[node] = len(steps)
            steps.append((node.operation, refs))
        return at[node]

    if isinstance(root, Reduce):
        (source,) = root.inputs
        result = refer(source)
        return Group(source.shape, list(leaves), steps, result, output, root)
    result = ("step", emit(root, None))
    return Group(root.shape, list(leaves), steps, result, output)


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


# ---------------------------------------------------------------------------------------------------------- memory


def plan_memory(steps: list[Step], kept: set[Value]) -> tuple[dict[Value, int], int]:
    """Offsets of the intermediate values in one arena, and its size: largest first, at the lowest offset that is free
    during the value's life."""
    lives: dict[Value, tuple[int, int]] = {}
    for index, step in enumerate(steps):
        for argument in step.arguments:
            if isinstance(argument, View) and argument.value.buffer is None and argument.value not in kept:
                first, _ = lives.get(argument.value, (index, index))
                lives[argument.value] = (first, index)
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

    def address(self, view: View) -> int:
        return self.buffers[view.value].address + view.offset * view.dtype.nbytes

    @cached_property
    def commands(self) -> CommandList:
        """The command list of the steps; a barrier stands only where one touches what an earlier one writes."""
        commands = self.device.command_list()
        reads: list[tuple[int, int]] = []
        writes: list[tuple[int, int]] = []
        for step, record in zip(self.steps, self.records):
            executable, slots = self._compile(step)
            ours = [(self._range(a), i in step.writes) for i, a in enumerate(step.arguments) if isinstance(a, View)]
            barrier = any(
                low < end and start < high
                for (low, high), written in ours
                for start, end in (reads + writes if written else writes)
            )
            if barrier:
                reads, writes = [], []
            for span, written in ours:
                (writes if written else reads).append(span)
            commands.launch(executable, step.grid, (*slots, self.device.status_address), barrier=barrier,
                            label=record.name)  # fmt: skip
            for value in {a.value for a in step.arguments if isinstance(a, View)}:
                commands._use(self.buffers[value])
        return commands

    def _range(self, view: View) -> tuple[int, int]:
        low, high = view.span()
        start = self.buffers[view.value].address
        return start + low * view.dtype.nbytes, start + high * view.dtype.nbytes

    def _compile(self, step: Step) -> tuple[Any, list[int | bytes]]:
        """The executable and the slots of its arguments."""
        from nitinol.compiler.driver import compile_function, compile_kernel
        from nitinol.runtime.launch import encode

        function, signature, values, positions = self._resolve(step)
        aliases = self._aliases(step, len(values), positions)
        if signature is not None:
            slots = [encode(value, type) for value, (_, type, _) in zip(values, signature.parameters)]
            return compile_kernel(step.node.kernel, signature, aliases), slots  # type: ignore[attr-defined]
        executable = _executables.get((function, aliases))
        if executable is None:
            executable = _executables[function, aliases] = compile_function(function, aliases, str(function))
        return executable, [encode(value, parameter.type) for value, parameter in zip(values, function.parameters)]

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
        signature, values = specialise(node.kernel, bound)
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
            views = [a for a in step.arguments if isinstance(a, View)]
            for position, view in zip(positions, views):
                values[position] = self.memory(view)
            interpreter.run(function, step.grid, values)

    def memory(self, view: View) -> np.ndarray:
        """The elements of a view in place, in the dtype that holds them in memory."""
        return as_numpy(self.buffers[view.value], view)


_executables: dict[Any, Any] = {}


class _Pointer:
    """An array argument as `specialise` wants it."""

    def __init__(self, address: int, dtype: DType) -> None:
        self.__nitinol_pointer__ = (address, dtype)


def as_numpy(buffer: Buffer, view: View) -> np.ndarray:
    """The elements of a view in place; bf16 as uint16, int1 as uint8."""
    dtype = memory_dtype(view.dtype)
    raw = buffer.as_numpy()
    strides = tuple(s * dtype.itemsize for s in view.strides)
    if not view.size:
        return np.empty(view.shape, dtype)
    return np.ndarray(view.shape, dtype, raw, view.offset * dtype.itemsize, strides)


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


# -------------------------------------------------------------------------------------------------------- evaluation


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
    lost = [v for v in values if v.buffer is None and not v.writes and (v.node is None or v.node.done)]
    if lost:
        raise ValueError(
            f"an array of shape {lost[0].shape} was computed inside a compiled function and is not one of its "
            "results; return it from the function"
        )
    targets = set(values) | {view.value for node in run for view in node.updates if _lasting(view.value, run, {})}
    steps, fused = make_steps(run, targets)
    computed = {a.value for step in steps for a in step.arguments if isinstance(a, View) and a.value.buffer is None}
    kept = targets | {value for value in computed if _lasting(value, run, fused)}
    program = Program(steps, kept, get_device())
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


def _lasting(value: Value, run: Sequence[Node], fused: Any) -> bool:
    """Whether a value may be asked for after this run: by the program, or by a node that has not run then."""
    if value.handles:
        return True
    return any(
        not reader.done and (reader not in run or (reader in fused and _lasting(reader.outputs[0], run, fused)))
        for reader in list(value.readers)
    )


def finish(nodes: Iterable[Node]) -> None:
    """Notes that these nodes have run."""
    for node in nodes:
        node.done = True
        for view in node.updates:
            if node in view.value.writes:
                view.value.writes.remove(node)
                if not view.value.writes:
                    unwritten.discard(view.value)

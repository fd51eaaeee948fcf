"""The way back through a kernel: the layouts in which each tile is wanted by those that use it.

What has no home, and what would otherwise be moved, goes where it is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nitinol.compiler.gpu import convert, pipeline
from nitinol.compiler.gpu.flow import operand_layouts
from nitinol.compiler.gpu.layout import Layout, bits_of
from nitinol.compiler.gpu.loads import place_load
from nitinol.compiler.gpu.preferred import plain_layout
from nitinol.compiler.ir import ELEMENTWISE, VIEWS, Block, Op, Value

if TYPE_CHECKING:
    from nitinol.compiler.gpu.assign import Assignment


def backward(a: Assignment, block: Block) -> None:
    for op in reversed(block.ops):
        demand(a, op)


def want(a: Assignment, value: Value, layout: Layout) -> None:
    layouts = a.wanted.setdefault(value, [])
    if layout not in layouts:
        layouts.append(layout)


def demand(a: Assignment, op: Op) -> None:
    """Wants the operands in the layouts that the operation needs them in."""
    kind = op.kind
    if kind in ELEMENTWISE or kind in VIEWS:
        move_up(a, op)
        for result in op.results:
            for layout in a.versions(result):
                for operand, needed in zip(op.operands, operand_layouts(op, layout)):
                    want(a, operand, needed)
    elif kind in ("load", "store", "atomic_rmw", "atomic_cas", "reduce", "scan", "assert"):
        if kind == "load" and op.result.shape:
            place_load(a, op)
        for operand in op.operands:
            want(a, operand, a.chosen[op] if operand.shape else a.scalar)
    elif kind == "device_print":
        for operand in op.operands:
            want(a, operand, a.first([operand]) if operand.shape else a.scalar)
    elif kind == "gather":
        want(a, op.operands[0], a.first(op.operands[:1]))
        want(a, op.operands[1], a.chosen[op])
    elif kind == "dot":
        fragments = a.fragments[op]
        first, second = (a.first([v]) for v in op.operands[:2])
        for number, operand in enumerate(op.operands):
            where = (fragments or (first, second, a.home[op.result]))[number]
            assert where is not None
            if number == 2 or pipeline.staged(operand) is None:
                want(a, operand, operand_of_matrices(a, op, number, where))
    elif kind in ("stage_copy", "stage_read"):
        for operand in op.operands:
            want(a, operand, a.chosen[op] if operand.shape else a.scalar)
    elif kind == "for":
        block = op.regions[0]
        for value in op.operands[:3]:
            want(a, value, a.scalar)
        pass_on(a, block.terminator.operands, block.arguments[1:])
        backward(a, block)
        pass_on(a, op.operands[3:], block.arguments[1:])
    elif kind == "while":
        before, after = op.regions
        pass_on(a, after.terminator.operands, before.arguments)
        backward(a, after)
        want(a, before.terminator.operands[0], a.scalar)
        pass_on(a, before.terminator.operands[1:], after.arguments)
        backward(a, before)
        pass_on(a, op.operands, before.arguments)
    elif kind == "if":
        for region in op.regions:
            pass_on(a, region.terminator.operands, op.results)
            backward(a, region)
        want(a, op.operands[0], a.scalar)


def operand_of_matrices(a: Assignment, op: Op, number: int, fragment: Layout) -> Layout:
    """Where an operand of a dot is wanted: as a fragment, or where it is, from where it goes to shared memory."""
    value = op.operands[number]
    home = a.home_of(value)
    if number == 2 or not op.attributes.get("from_memory"):
        return fragment
    if number == 1 and op.attributes.get("warpgroups"):
        home = home or plain_layout(value.shape, a.warp_bits)
    elif home is None:
        return fragment
    else:
        shuffle = convert.find_shuffle(home, fragment)
        if shuffle is not None and not shuffle.moves and len(shuffle.choices) == 1:
            return fragment
    a.spilled[value] = a.spilled.get(value, False) or bool(op.attributes.get("warpgroups"))
    a.in_memory.add((op, number))
    a.spilled_from[value] = home = a.spilled_from.get(value, home)
    return home


def move_up(a: Assignment, op: Op) -> None:
    """A result that is wanted in one other layout only is computed there if just one operand has to move, or no more
    bytes: the conversion may then end at a load, or at fewer bytes."""
    result = op.results[0]
    wanted, home = a.wanted.get(result, []), a.home[result]
    settled = {v for v in op.operands if v.shape and a.home.get(v) is not None}
    if len(op.results) == 1 and home is not None and len(wanted) == 1:
        nbytes = sum(v.element.nbytes << bits_of(v.shape) for v in settled)
        if len(settled) <= 1 or nbytes <= result.element.nbytes << bits_of(result.shape):
            a.home[result] = wanted[0]


def pass_on(a: Assignment, values: Sequence[Value], variables: Sequence[Value]) -> None:
    """Values that variables take are wanted where these are."""
    for value, variable in zip(values, variables):
        layout = a.home[variable]
        assert layout is not None
        want(a, value, layout)

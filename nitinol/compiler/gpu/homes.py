"""The way forward through a kernel: each tile's home, from where its operands are and what its operation prefers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nitinol.compiler.gpu import staging
from nitinol.compiler.gpu.flow import result_layout
from nitinol.compiler.gpu.layout import Layout, bits_of, without_axis
from nitinol.compiler.gpu.loads import load_layout
from nitinol.compiler.gpu.outer import outer_layout
from nitinol.compiler.gpu.preferred import plain_layout, scan_layout, store_layout
from nitinol.compiler.ir import ELEMENTWISE, VIEWS, Block, Op, Value

if TYPE_CHECKING:
    from nitinol.compiler.gpu.assign import Assignment


def forward(a: Assignment, block: Block) -> None:
    for op in block.ops:
        layouts = results(a, op)
        for result, layout in zip(op.results, layouts):
            a.home[result] = layout if result.shape else a.scalar
            if layout is None and result.shape:
                suggest(a, op, result)


def suggest(a: Assignment, op: Op, result: Value) -> None:
    """For a tile without a home: where it would be if its largest source with a home stayed where it is.

    Anchors that have nothing else to go by take this: in sum(weights[:, :, None] * x) the weights do not move.
    """
    a.weak.pop(result, None)
    found = [w for v in op.operands if v.shape and (w := weight(a, v)) is not None]
    if not found or (op.kind not in ELEMENTWISE and op.kind not in ("broadcast", "reshape", "trans")):
        return
    size, layout = max(found, key=lambda pair: pair[0])
    a.weak[result] = size, layout if op.kind in ELEMENTWISE else result_layout(op, layout)


def weight(a: Assignment, value: Value) -> tuple[int, Layout] | None:
    home = a.home.get(value)
    return a.weak.get(value) if home is None else (home.bits, home)


def results(a: Assignment, op: Op) -> Sequence[Layout | None]:
    """Homes of an operation's results; chooses the layouts that the operation works in."""
    kind = op.kind
    if kind in CONTROL:
        return CONTROL[kind](a, op)
    if kind in ELEMENTWISE:
        found = [(v.element.nbytes, h) for v in op.operands if (h := a.home_of(v)) is not None]
        return [max(found, key=lambda pair: pair[0])[1] if found else None]
    if kind in VIEWS:
        source = a.home_of(op.operands[0])
        if source is None or kind in ("splat", "broadcast"):
            return [None] * len(op.results)
        return [result_layout(op, source)] * len(op.results)
    if kind in ("load", "atomic_rmw", "atomic_cas"):
        pointer = op.operands[0]
        if not pointer.shape:
            a.chosen[op] = a.scalar
        elif kind == "load":
            return [load_layout(a, op)]
        else:
            a.chosen[op] = a.first(op.operands)
        return [a.chosen[op]]
    if kind == "store":
        a.chosen[op] = store_layout(a, op) if op.operands[0].shape else a.scalar
    elif kind == "reduce":
        shape, axis = op.operands[0].shape, op.attributes["axis"]
        layout = a.chosen[op] = a.first(op.operands)
        return [layout.through(without_axis(shape, axis), bits_of(op.results[0].shape))] * len(op.results)
    elif kind == "scan":
        a.chosen[op] = scan_layout(op.operands[0].shape, op.attributes["axis"], a.warp_bits)
        return [a.chosen[op]] * len(op.results)
    elif kind == "gather":
        a.chosen[op] = a.first(op.operands[1:])
        return [a.chosen[op]]
    elif kind == "dot":
        fragments = a.fragments[op] = a.fragments_of(op, a.warp_bits)
        if fragments is None and op.attributes.get("outer"):
            return [outer_layout(op.result.shape, a.warp_bits)]
        return [fragments[2] if fragments else plain_layout(op.result.shape, a.warp_bits)]
    elif kind == "assert":
        a.chosen[op] = a.first(op.operands) if op.operands[0].shape else a.scalar
    elif kind == "stage_copy":
        a.chosen[op] = staging.copy_layout(op.attributes["stage"], a.warp_bits)
    return [None] * len(op.results)


# ---------------------------------------------------------------------------------------------------- control flow


def settle(
    a: Assignment, variables: Sequence[Value], starts: Sequence[Value], nexts: Sequence[Value], body: Callable[[], None]
) -> None:
    """Homes of carried values: what the loop makes of them if it has a preference, else what they come in."""
    for variable, start in zip(variables, starts):
        a.home[variable] = a.home_of(start)
    for _ in range(3):
        body()
        changed = False
        for variable, following in zip(variables, nexts):
            layout = a.home_of(following)
            if layout is not None and layout != a.home[variable]:
                a.home[variable], changed = layout, True
        if not changed:
            break
    for variable, following in zip(variables, nexts):
        if a.home[variable] is None:
            a.home[variable] = a.first([following])
    body()


def for_loop(a: Assignment, op: Op) -> Sequence[Layout | None]:
    block = op.regions[0]
    variable, *carried = block.arguments
    a.home[variable] = a.scalar
    settle(a, carried, op.operands[3:], block.terminator.operands, lambda: forward(a, block))
    return [a.home[v] for v in carried]


def while_loop(a: Assignment, op: Op) -> Sequence[Layout | None]:
    before, after = op.regions

    def body() -> None:
        forward(a, before)
        for argument, value in zip(after.arguments, before.terminator.operands[1:]):
            a.home[argument] = a.home_of(value) or plain_layout(argument.shape, a.warp_bits)
        forward(a, after)

    settle(a, before.arguments, op.operands, after.terminator.operands, body)
    return [a.home[v] for v in after.arguments]


def branch(a: Assignment, op: Op) -> Sequence[Layout | None]:
    layouts = []
    for region in op.regions:
        forward(a, region)
    for result, *values in zip(op.results, *(r.terminator.operands for r in op.regions)):
        found = [h for v in values if (h := a.home_of(v)) is not None]
        layouts.append(found[0] if found else plain_layout(result.shape, a.warp_bits))
    return layouts


CONTROL = {"for": for_loop, "while": while_loop, "if": branch}

"""Sums that stay spread over threads: lanes and simdgroups are added up once, when the sum is wanted, not in a loop.

In `for ...: total = total + sum(tile)` each thread adds the part of the sum that it has, and the parts meet after the
loop; so too in `total = total * factor + sum(tile)`, as in an online softmax, and from one loop to the next. A sum
of a sum is one sum over more threads. The order of additions is not promised by a reduction; this is a
loop's too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nitinol.compiler.analysis import replace_uses, uses_of
from nitinol.compiler.gpu.forms import Form
from nitinol.compiler.gpu.layout import Layout, axis_bits
from nitinol.compiler.gpu.threads import first_of
from nitinol.compiler.ir import Block, Function, Op, Value, combine_kind, constant_of, create, walk
from nitinol.language.types import DType, float32

if TYPE_CHECKING:
    from nitinol.compiler.gpu.emit import Emitter

Threads = tuple[int, int]  # masks of the lane and warp bits between which parts of a sum lie


def spread_sums(
    function: Function, uses: dict[Value, list[Op]], home: dict[Value, Layout | None],
    wanted: dict[Value, list[Layout]], chosen: dict[Op, Layout],
) -> tuple[set[Op], dict[Op, dict[int, Op]]]:  # fmt: skip
    """Which reductions leave their parts in the threads; per loop, which carried values (by number) are such sums, and
    of which reduction."""
    spread: set[Op] = set()
    loops: dict[Op, dict[int, Op]] = {}

    def only_use(value: Value) -> Op | None:
        users = uses.get(value, [])
        alone = len(users) == 1 and not any(layout != home[value] for layout in wanted.get(value, []))
        return users[0] if alone else None

    def visit(block: Block, loop: Op | None) -> None:
        for op in block.ops:
            for region in op.regions:
                if op.kind in ("for", "while", "if"):
                    visit(region, op if op.kind == "for" else None)
            if not is_sum(op) or (user := only_use(op.result)) is None:
                continue
            if is_sum(user) and user in block.ops and chosen[user] == home[op.result]:
                spread.add(op)
            elif loop is not None and user.kind == "add" and user in block.ops:
                other = user.operands[user.operands[0] is op.result]
                same = [other, user.result]
                scaling = other.op
                if scaling is not None and scaling.kind == "mul" and only_use(other) is user:
                    other = next((v for v in scaling.operands if v in block.arguments), other)
                    same.append(other)
                else:
                    scaling = user
                number = block.arguments.index(other) if other in block.arguments else 0
                last = block.terminator
                if (
                    number and only_use(other) is scaling and only_use(user.result) is last
                    and last.operands.index(user.result) == number - 1
                    and all(home[value] == home[op.result] for value in same)
                ):  # fmt: skip
                    spread.add(op)
                    loops.setdefault(loop, {})[number - 1] = op

    visit(function.body, None)
    return spread, loops


def is_sum(op: Op) -> bool:
    """Whether the parts may be added in any order without a loss worth the name."""
    if op.kind != "reduce" or combine_kind(op) != "add":
        return False
    element = op.operands[0].element
    return isinstance(element, DType) and (element == float32 or element.is_int)


def first_part(e: Emitter, value: Value, form: Form, threads: Threads) -> Form:
    """The start of a sum as one thread's part, 0 in the others."""
    conditions = first_of(threads, e.warp_bits)
    if not conditions or constant_of(value) == 0:
        return form
    zero = f"{e.type(value.element)}(0)"
    return Form(lambda i: f"{' && '.join(conditions)} ? {form.operand(i)} : {zero}", form.names, False)


def sum_threads(e: Emitter, op: Op) -> Threads:
    """Where the parts of a sum lie."""
    layout, value = e.assignment.chosen[op], op.operands[0]
    along = sum(1 << bit for bit in axis_bits(value.shape)[op.attributes["axis"]])
    lanes, warps = (
        sum(1 << bit for bit, column in enumerate(columns) if column & along)
        for columns in (layout.lanes, layout.warps)
    )
    made = value.op
    if made is not None and made.kind == "for":
        made = e.spread_loops.get(made, {}).get(made.results.index(value)) if goes_on(e, value) else None
    if made is not None and made in e.spread:
        inner = sum_threads(e, made)
        return lanes | inner[0], warps | inner[1]
    return lanes, warps


def goes_on(e: Emitter, value: Value) -> bool:
    """Whether a loop's sum goes into one other sum, which adds up the parts of both, or on in another loop."""
    users = e.uses.get(value, [])
    others = any(layout != e.home(value) for layout in e.assignment.wanted.get(value, []))
    if len(users) != 1 or others:
        return False
    user, made = users[0], value.op
    if user.kind != "for" or made is None:
        return is_sum(user) and e.assignment.chosen[user] == e.home(value)
    number, sums = user.operands.index(value) - 3, e.spread_loops
    if number not in sums.get(user, {}) or e.home(user.results[number]) != e.home(value):
        return False
    return sum_threads(e, sums[user][number]) == sum_threads(e, sums[made][made.results.index(value)])



# ------------------------------------------------------------------------------------------- before layouts are chosen


def narrow_sums(function: Function) -> None:
    """In place: where a loop adds up tiles of which only the sum along an axis is wanted, it adds up those sums.

        for ...: total = total + tile                for ...: short = short + sum(tile, axis)
        whole = sum(total, axis)                     whole = short

    A thread then carries one number for the registers that it has along the axis.
    """
    uses = uses_of(function)
    for block in [function.body, *(region for op in walk(function.body) for region in op.regions)]:
        for loop in [op for op in block.ops if op.kind == "for"]:
            for number in range(len(loop.results)):
                while _narrow(block, loop, number, uses):
                    uses = uses_of(function)


def _narrow(block: Block, loop: Op, number: int, uses: dict[Value, list[Op]]) -> bool:
    body, result, start = loop.regions[0], loop.results[number], loop.operands[3 + number]
    argument, following = body.arguments[1 + number], body.terminator.operands[number]
    (whole, *more), step = uses.get(result, [None]), following.op
    if more or whole is None or whole not in block.ops or not is_sum(whole) or constant_of(start) != 0:
        return False
    alone = uses.get(argument) == [step] and uses.get(following) == [body.terminator]
    if step is None or step.kind != "add" or step not in body.ops or not alone:
        return False
    tile = step.operands[step.operands[0] is argument]

    def make(kind: str, operands: list[Value], **attributes: object) -> Op:
        return create(kind, operands, [whole.result.type], step.location, **attributes)  # type: ignore[arg-type]

    short = copy_sum(whole, tile)
    zero = create("constant", [], [start.element], step.location, value=0)
    first = [zero] if not whole.result.shape else [zero, make("splat", [zero.result])]
    at = block.ops.index(loop)
    block.ops[at:at] = first
    loop.operands[3 + number] = first[-1].result
    argument.type = result.type = whole.result.type
    added = make("add", [argument, short.result])
    place = body.ops.index(step)
    body.ops[place : place + 1] = [short, added]
    added.result.name = following.name
    body.terminator.operands[number] = added.result
    block.ops.remove(whole)
    replace_uses(block, whole.result, result)
    return True


def copy_sum(op: Op, tile: Value) -> Op:
    """The same reduction of another tile."""
    element = tile.element
    region = Block([Value(element), Value(element)])
    region.ops.append(create("add", region.arguments, [element], op.location))
    region.ops.append(create("yield", [region.ops[0].result], [], op.location))
    return create("reduce", [tile], [op.result.type], op.location, regions=[region], axis=op.attributes["axis"])

"""Tiles in shared memory for matrix instructions: copies started ahead of time, and tiles that are put there at once.

Where an element lies is a linear map from its place to bytes (`pipeline.swizzled`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nitinol.compiler.gpu import memory
from nitinol.compiler.gpu.forms import Form, Index, Stepped, fixed
from nitinol.compiler.gpu.layout import LANE_BITS, Layout, axis_bits, blocked
from nitinol.compiler.gpu.pipeline import COPY_BYTES, Stage
from nitinol.compiler.gpu.threads import guard_of, place_of
from nitinol.compiler.gpu.tree import Access, Statement
from nitinol.compiler.ir import Op, Value

if TYPE_CHECKING:
    from nitinol.compiler.gpu.emit import Emitter

ALIGNMENT = 1024  # of a tile: the swizzles are patterns of the address


def copy_layout(stage: Stage, warp_bits: int) -> Layout:
    """One copy's elements in each thread, neighbouring lanes along rows."""
    bits = axis_bits(stage.shape)
    order = [*bits[stage.inner], *bits[1 - stage.inner]]
    return blocked(order, warp_bits, (COPY_BYTES // stage.element.nbytes).bit_length() - 1)


def opened(e: Emitter, stage: Stage) -> None:
    """Shared memory for a stage, and variables for its address and a pointer to it."""
    name, piece = e.scratch(stage.element, stage.count * stage.nbytes // stage.element.nbytes)
    piece.align = ALIGNMENT
    stage.piece, stage.name = piece, e.name("tiles")
    e.say(f"const uint {stage.name} = shared_address({name});")


def stage_open(e: Emitter, op: Op) -> None:
    for stage in op.attributes["stages"]:
        opened(e, stage)
        e.say(accesses=[Access("write", stage.piece)])


def stage_copy(e: Emitter, op: Op) -> None:
    stage, layout = op.attributes["stage"], e.assignment.chosen[op]
    pointer, slot = e.form(op.operands[0], layout), e.form(op.operands[1])
    mask = e.form(op.operands[2], layout) if len(op.operands) > 2 else None
    width = (COPY_BYTES // stage.element.nbytes).bit_length() - 1
    base = f"{stage.name} + {slot.operand(fixed(0))} * {stage.nbytes}"
    guard = guard_of(layout)
    accesses = [memory.touched(e, op, "read", layout), Access("hold", stage.piece)]

    def lines(i: Index) -> list[str]:
        to = f"{base} + ({place_of(layout, i, stage.columns)})"
        return [f"{guard}cp_async({to}, {pointer.text(i)}{f', {mask.text(i)}' if mask is not None else ''});"]

    if layout.count == 1 << width:
        e.say(*lines(Index((), 0)), accesses=accesses)
    else:
        index = Stepped(tuple(0 if bit < width else 1 << bit for bit in range(len(layout.registers))))
        reads = [pointer] if mask is None else [pointer, mask]
        e.each(layout.count, lambda _: lines(index), reads, accesses, step=1 << width)


def stage_commit(e: Emitter, op: Op) -> None:
    e.say("cp_async_commit();")


def stage_wait(e: Emitter, op: Op) -> None:
    lines = [f"cp_async_wait<{op.attributes['pending']}>();", "__syncthreads();"]
    if op.attributes["fence"]:
        lines.insert(1, "fence_shared();")
    e.nodes.append(Statement(lines, e.line, clears=True))


def stage_read(e: Emitter, op: Op) -> None:
    """Nothing: products read what they need."""


def finish(e: Emitter, loop: Op, variables: list[Form]) -> None:
    """Behind a loop whose loads were made ahead: nothing is on its way any more, and the memory may be used again."""
    lines = ["cp_async_wait<0>();"]
    if (number := loop.attributes.get("unfinished")) is not None:
        lines += ["wgmma_wait<0>();", f"settle({variables[number].variable});"]
    e.say(*lines, accesses=[Access("write", stage.piece) for stage in loop.attributes["stages"]])


def put(e: Emitter, value: Value) -> Stage:
    """An operand of products from registers, in vectors of up to 16 bytes."""
    layout = e.assignment.spilled_from[value]
    form, fence = e.form(value, layout), e.assignment.spilled[value]
    element = value.element
    bits = axis_bits(value.shape)
    first = layout.registers[0] if layout.registers else 1
    inner = next((axis for axis in (0, 1) if first.bit_length() - 1 in bits[axis]), 1)
    if fence and value.shape[inner] * value.element.nbytes < 32:  # rows too short for a swizzle
        inner = 1 - inner
    stage = Stage(value.shape, element, inner)  # type: ignore[arg-type]
    opened(e, stage)
    width, most = 0, (COPY_BYTES // stage.element.nbytes).bit_length() - 1
    along = [1 << bit for bit in bits[inner]]
    while width < min(most, len(layout.registers), len(along)) and layout.registers[width] == along[width]:
        width += 1
    guard = guard_of(layout)
    access = Access("write", stage.piece)

    def lines(i: Index) -> list[str]:
        address = f"{stage.name} + ({place_of(layout, i, stage.columns)})"
        values = ", ".join(form.text(i.at(n)) for n in range(1 << width))
        kind = f"Vector<{e.type(stage.element)}, {1 << width}>"
        return [f"{guard}shared_store({address}, {kind}{{{{{values}}}}});"]

    if layout.count == 1 << width:
        e.say(*lines(Index((), 0)), accesses=[access])
    elif width:
        index = Stepped(tuple(0 if bit < width else 1 << bit for bit in range(len(layout.registers))))
        e.each(layout.count, lambda _: lines(index), [form], [access], step=1 << width)
    else:
        e.each(layout.count, lines, [form], [access])
    if fence:
        e.say("fence_shared();", accesses=[access])
    return stage


HANDLERS = {
    "stage_open": stage_open, "stage_copy": stage_copy, "stage_commit": stage_commit, "stage_wait": stage_wait,
    "stage_read": stage_read,
}  # fmt: skip

assert LANE_BITS == 5

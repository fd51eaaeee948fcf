"""Views and ranges: nothing is moved, a thread's own elements or their places are read under another index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nitinol.compiler.gpu import words
from nitinol.compiler.gpu.flow import operand_layouts, source_registers
from nitinol.compiler.gpu.forms import Form, Index, fixed, shifted
from nitinol.compiler.gpu.layout import Layout, part_bit, view_map
from nitinol.compiler.gpu.threads import place_of
from nitinol.compiler.ir import Op, Value

if TYPE_CHECKING:
    from nitinol.compiler.gpu.emit import Emitter


def view(e: Emitter, op: Op) -> None:
    for result in op.results:
        for layout in e.assignment.versions(result):
            e.forms[result, layout] = viewed(e, op, result, layout)


def viewed(e: Emitter, op: Op, result: Value, layout: Layout) -> Form:
    """One result in one layout."""
    source = op.operands[0]
    needed = operand_layouts(op, layout)
    if op.kind == "split":
        number = op.results.index(result)
        form = e.form(source, needed[0])
        shift = source_registers(needed[0], layout, tuple(1 << (b + 1) for b in range(layout.bits)))
        return shifted(form, shift, number)
    map_ = source_registers(needed[0], layout, view_map(op.kind, source.shape, result.shape, op.attributes))
    parts = [e.form(v, l if v.shape else None).through(map_) for v, l in zip(op.operands, needed)]
    if op.kind not in ("join", "cat"):
        return parts[0]
    cut = part_bit(op.kind, result.shape, op.attributes)
    pick = tuple(int(bit == cut) for bit in range(layout.bits))

    def text(index: Index, parts: Sequence[Form] = parts) -> str:
        which = place_of(layout, index, pick)
        if which in ("0", "1"):
            return parts[int(which)].operand(index)
        return f"{f'({which})' if ' ' in which else which} ? {parts[1].operand(index)} : {parts[0].operand(index)}"

    packed = words.chosen(parts, layout, cut, text)
    if packed is not None:
        return words.single_bytes(packed, result.element, e.dialect)
    return Form(text, lambda i: parts[0].names(i) | parts[1].names(i), False)


def arange(e: Emitter, op: Op) -> None:
    for layout in e.assignment.versions(op.result):
        e.forms[op.result, layout] = numbered(layout, op.attributes["start"])


def numbered(layout: Layout, start: int) -> Form:
    """The places of a tile's elements, from `start` on."""

    def text(index: Index) -> str:
        place = place_of(layout, index)
        if place.isidentifier():  # Metal's lane and warp are ushort: alone they would choose another overload
            place = f"int({place})"
        if not start:
            return place
        return f"{start} + {place if place.isdigit() or place.startswith('int(') else f'({place})'}"

    alone = not start and not layout.registers and place_of(layout, fixed(0)).isalnum()
    return Form(text, lambda i: set(), alone)

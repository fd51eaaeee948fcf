"""Loads, stores and atomics: neighbouring registers go in one wide access where addresses and masks allow it.

An element that several threads hold is stored by one of them. Accesses are noted with the class of memory that their
pointer comes from, so that barriers come between threads that meet there, and only there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from nitinol.compiler.analysis import base_pointer
from nitinol.compiler.gpu import convert, words
from nitinol.compiler.gpu.forms import Form, Index, Stepped, bare, expression, literal, variable
from nitinol.compiler.gpu.layout import Layout
from nitinol.compiler.gpu.threads import owner_of
from nitinol.compiler.gpu.tree import Access
from nitinol.compiler.ir import Op, constant_of
from nitinol.language.types import DType, PointerType, int1, uint32

if TYPE_CHECKING:
    from nitinol.compiler.gpu.emit import Emitter

Lines = Callable[[Index], list[str]]
Text = Callable[[Index], str]


def touched(e: Emitter, op: Op, how: str, layout: Layout) -> Access:
    """The access for barriers."""
    pointer = op.operands[0]
    base = base_pointer(pointer, e.aliases)
    where = None if base is None else e.aliases[base]
    own = layout.copies == (0, 0) and e.depth.get(pointer, 0) == 0
    return Access(how, where, (pointer, layout) if own else None)


def element_of(op: Op) -> DType:
    element = op.operands[0].element
    assert isinstance(element, PointerType)
    return element.element


def cell(pointer: Form, index: Index) -> str:
    """The element that a pointer points to."""
    if pointer.parts is None:
        return f"*{pointer.operand(index)}"
    base, offset = pointer.parts
    if base.parts is not None and not base.simple:
        return f"({base.text(index)})[{offset.text(index)}]"
    return f"{base.operand(index)}[{offset.text(index)}]"


def load(e: Emitter, op: Op) -> None:
    layout, element, result = e.assignment.chosen[op], element_of(op), op.result
    pointer = e.form(op.operands[0], layout)
    mask = e.form(op.operands[1], layout) if len(op.operands) > 1 else None
    other = e.form(op.operands[2], layout) if len(op.operands) > 2 else None
    access = touched(e, op, "read", layout)
    kind = e.type(element)
    name = e.name(result.name or "loaded")
    form = variable(name, layout.count)
    reads = [f for f in (pointer, mask, other) if f is not None]
    width = e.assignment.widths.contiguous_bits(op, layout) if result.shape else 0
    declaration = f"{kind} {name}[{layout.count}];" if layout.count > 1 else ""
    if layout.sparse:  # the owner's lane alone
        lanes = owner_of(replace(layout, warps=()))[0]
        mask = literal(lanes) if mask is None else expression(lambda m: f"{lanes} && {m}", mask)

    def default(i: Index) -> str:
        return bare(other.operand(i)) if other is not None else "false" if element == int1 else e.dialect.zero(element)

    def single(i: Index) -> list[str]:
        read = cell(pointer, i)
        read = f"{read} != 0" if element == int1 else read
        if mask is not None:
            read = f"{mask.operand(i)} ? {read} : {default(i)}"
        return [f"{kind} {name} = {read};" if layout.count == 1 else f"{name}[{i}] = {read};"]

    def wide(i: Index) -> list[str]:
        size = 1 << width
        type_, read, parts = e.dialect.wide_load(element, size, pointer.text(i))
        parts = [f"{p} != 0" for p in parts] if element == int1 else parts
        if mask is None:
            lines = [f"{type_} wide = {read};"]
            return [*lines, " ".join(f"{name}[{i.at(n)}] = {parts[n]};" for n in range(size))]
        if e.dialect.PREDICATES:  # one load under a predicate into registers that have the other values
            others = e.dialect.wide_value(element, [default(i.at(n)) for n in range(size)])
            lines = [f"{type_} wide = {others};", f"if ({mask.text(i)}) wide = {read};"]
            return [*lines, " ".join(f"{name}[{i.at(n)}] = {parts[n]};" for n in range(size))]
        lines = [f"if ({mask.text(i)}) {{", f"    {type_} wide = {read};"]
        lines.append("    " + " ".join(f"{name}[{i.at(n)}] = {parts[n]};" for n in range(size)))
        lines.append("} else {")
        lines.append("    " + " ".join(f"{name}[{i.at(n)}] = {default(i.at(n))};" for n in range(size)))
        return [*lines, "}"]

    def word(i: Index) -> str:
        constant = 0 if other is None else constant_of(op.operands[2])
        if constant is not None:
            return words.repeated(constant)
        assert other is not None
        return words.together(other, (0, 1), e.dialect).operand(i.mapped(lambda n: n >> 2))

    if words.loads_words(element, layout, width):
        target, form = words.loaded(e, name, element, layout.count)
        declaration = e.type(uint32) + (f" {name}[{layout.count >> 2}];" if layout.count > 4 else f" {name};")
        loose = words.loose_run(e, op, layout, width)
        width = loose or width
        past = words.remainder(e, op.operands[0], layout) if loose else None
        reads += [past] if past is not None else []
        lines = words.load_lines(e, target, pointer, mask, word, width, past)
        vectors(e, layout, max(2, width), lines, reads, access, name, declaration)
    elif width:
        vectors(e, layout, width, wide, reads, access, name, declaration)
    else:
        e.each(layout.count, single, reads, [access], defines=[name], declaration=declaration)
    e.forms[result, layout] = form


def vectors(
    e: Emitter, layout: Layout, width: int, lines: Lines, reads: list[Form], access: Access, name: str = "",
    declaration: str = "",
) -> None:  # fmt: skip
    """One access for each group of 2**width registers."""
    if declaration:
        e.say(declaration)
    if layout.count == 1 << width:
        made = lines(Index((), 0))
        block = len(made) > 1 and not made[0].startswith("if")  # declares a variable
        e.say(*(["{", *("    " + text for text in made), "}"] if block else made), accesses=[access])
        return
    index = Stepped(tuple(0 if bit < width else 1 << bit for bit in range(len(layout.registers))))
    e.each(layout.count, lambda _: lines(index), reads, [access], step=1 << width, defines=[name])


def store(e: Emitter, op: Op) -> None:
    layout, element = e.assignment.chosen[op], element_of(op)
    pointer, value = e.form(op.operands[0], layout), e.form(op.operands[1], layout)
    mask = e.form(op.operands[2], layout) if len(op.operands) > 2 else None
    access = touched(e, op, "write", layout)
    reads = [f for f in (pointer, value, mask) if f is not None]
    owner = owner_of(layout)
    width = e.assignment.widths.contiguous_bits(op, layout) if op.operands[0].shape else 0

    def condition(i: Index) -> str:
        if not owner and mask is not None:
            return mask.text(i)
        return " && ".join(owner + ([mask.operand(i)] if mask is not None else []))

    def text(i: Index) -> str:
        return f"{e.dialect.memory_type(int1)}({value.text(i)})" if element == int1 else value.text(i)

    def single(i: Index) -> list[str]:
        guard = f"if ({condition(i)}) " if condition(i) else ""
        return [f"{guard}{cell(pointer, i)} = {text(i)};"]

    def wide(i: Index) -> list[str]:
        if width > 2 and value.words is not None and value.words.bits == (0, 1):
            first = i.mapped(lambda n: n >> 2)
            parts = [value.words.form.text(first.at(n)) for n in range(1 << width - 2)]
            return [e.dialect.wide_store(uint32, pointer.text(i), parts, condition(i))]
        values = [text(i.at(n)) for n in range(1 << width)]
        return [e.dialect.wide_store(element, pointer.text(i), values, condition(i))]

    if width:
        vectors(e, layout, width, wide, reads, access)
    else:
        e.each(layout.count, single, reads, [access])


def atomic_rmw(e: Emitter, op: Op) -> None:
    layout, element = e.assignment.chosen[op], element_of(op)
    forms = [e.form(v, layout) for v in op.operands]
    pointer, value = forms[:2]
    mask = forms[2] if len(forms) > 2 else None
    atomic(e, op, layout, forms, mask,
           lambda i: e.dialect.atomic(op.attributes["kind"], element, pointer.text(i), value.text(i)))  # fmt: skip


def atomic_cas(e: Emitter, op: Op) -> None:
    layout, element = e.assignment.chosen[op], element_of(op)
    forms = [e.form(v, layout) for v in op.operands]
    pointer, expected, desired = forms
    atomic(e, op, layout, forms, None, lambda i: e.dialect.atomic_cas(
        element, pointer.text(i), expected.text(i), desired.text(i), e.helpers))  # fmt: skip


def atomic(e: Emitter, op: Op, layout: Layout, forms: list[Form], mask: Form | None, text: Text) -> None:
    """One thread acts for each element; the old value is handed on to those that hold copies."""
    access = touched(e, op, "atomic", layout)
    owner = owner_of(layout)
    used = op.result in e.uses
    kind = e.type(op.result.element)
    name = e.name(op.result.name or "old")
    declaration = (f"{kind} {name}[{layout.count}];" if layout.count > 1 else f"{kind} {name};") if used else ""

    def lines(i: Index) -> list[str]:
        conditions = owner + ([mask.operand(i)] if mask is not None else [])
        guard = f"if ({' && '.join(conditions)}) " if conditions else ""
        if not used:
            return [f"{guard}{text(i)};"]
        target = name if layout.count == 1 else f"{name}[{i}]"
        return ([f"{target} = 0;"] if guard else []) + [f"{guard}{target} = {text(i)};"]

    e.each(layout.count, lines, forms, [access], defines=[name], declaration=declaration)
    form = variable(name, layout.count)
    if used and owner:
        form = convert.by_memory(e, op.result, form, layout, layout)
    e.forms[op.result, layout] = form

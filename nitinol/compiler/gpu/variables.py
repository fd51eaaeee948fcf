"""Which values become variables: what is used once, and has no name in the kernel, stands where it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nitinol.compiler.gpu import words
from nitinol.compiler.gpu.forms import Form
from nitinol.compiler.gpu.layout import Layout
from nitinol.compiler.ir import ELEMENTWISE, VIEWS, Block, Op, Value
from nitinol.language.types import PointerType

if TYPE_CHECKING:
    from nitinol.compiler.gpu.emit import Emitter


def define(e: Emitter, value: Value, layout: Layout, form: Form) -> None:
    """Notes how a value is written; computes it into a variable unless it can stand where it is used."""
    if needs_variable(e, value):
        name = e.name(value.name or "v")
        if form.words is not None:
            form = words.store(e, name, value.element, layout.count, form.words)
        else:
            form = e.store_in(name, value.element, layout.count, form)
    e.forms[value, layout] = form


def needs_variable(e: Emitter, value: Value) -> bool:
    op = value.op
    assert op is not None
    if value in e.byte_products.values():
        return False
    if isinstance(value.element, PointerType) and op.kind == "addptr":
        return final_uses(e, value, e.block_of[op]) != 1
    return bool(value.name) or final_uses(e, value, e.block_of[op]) != 1


def final_uses(e: Emitter, value: Value, block: Block) -> int:
    """How often the value's text would be written, views being transparent; 2 and more: too often to repeat."""
    total = 0
    for user in e.uses.get(value, []):
        if user.kind in VIEWS and e.block_of[user] is block:
            if user.kind == "broadcast" and not is_index(e, value):
                return 2
            total += sum(final_uses(e, r, block) for r in user.results)
        elif e.block_of[user] is not block or user.kind in ("scan", "dot", "reduce", "atomic_cas"):
            return 2
        else:
            total += 1
    return total


def is_index(e: Emitter, value: Value) -> bool:
    """Whether a value is made of program ids, lane numbers, parameters and constants only."""
    if value not in e.index:
        op = value.op
        if op is None:
            e.index[value] = value in e.aliases
        elif op.kind in ("constant", "program_id", "num_programs", "arange"):
            e.index[value] = True
        else:
            plain = op.kind in ELEMENTWISE or op.kind in VIEWS
            e.index[value] = plain and all(is_index(e, v) for v in op.operands)
    return e.index[value]


def block_of(block: Block) -> dict[Op, Block]:
    """The block that each operation in this one, or below it, is in."""
    found = {}
    for op in block.ops:
        found[op] = block
        for region in op.regions:
            found |= block_of(region)
    return found

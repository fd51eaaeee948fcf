"""Loops and branches of the CPU target. Carried scalars are LLVM phis; carried tiles live in one buffer each.

A tile's next value is computed over its old one where every element needs only itself; where two carried tiles need
each other's old values, or elements of elsewhere, the new value goes through a second buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import TYPE_CHECKING

from llvmlite import ir

from nitinol.compiler import ir as tile_ir
from nitinol.compiler.cpu import memory, prefetch
from nitinol.compiler.cpu.lanes import Uniform, multiple_of
from nitinol.compiler.cpu.packing import packing_key
from nitinol.compiler.ir import Block, Op, Value
from nitinol.language.types import DType

if TYPE_CHECKING:
    from nitinol.compiler.cpu.generator import Generator, Stored


def emit_for(g: Generator, op: Op) -> None:
    b = g.b
    region = op.regions[0]
    lower, upper, step = (g.scalars[v] for v in op.operands[:3])
    element = op.operands[0].element
    buffers = _carry_in(g, op.operands[3:], region.arguments[1:])
    initial = [g.scalar(g.scalars[v], v.element) for v in op.operands[3:] if not v.shape]
    low, high, by = (g.scalar(x, element) for x in (lower, upper, step))
    before = b.block
    head, body, done = (b.append_basic_block(name) for name in ("for", "body", "done"))
    b.branch(head)
    b.position_at_end(head)
    counter = b.phi(low.type)
    counter.add_incoming(low, before)
    phis = [b.phi(v.type) for v in initial]
    for phi, value in zip(phis, initial):
        phi.add_incoming(value, before)
    signed = isinstance(element, DType) and element.is_signed
    compare = b.icmp_signed if signed else b.icmp_unsigned
    b.cbranch(compare("<", counter, high), body, done)
    b.position_at_end(body)
    multiple = gcd(lower.multiple, step.multiple)  # type: ignore[union-attr]
    with g.scope():
        g.scalars[region.arguments[0]] = Uniform(counter, multiple)
        scalars = [a for a in region.arguments[1:] if not a.shape]
        for argument, phi, value in zip(scalars, phis, [v for v in op.operands[3:] if not v.shape]):
            known = _carried_multiple(g, argument, value, region)
            g.scalars[argument] = Uniform(phi, known)
        prefetch.emit(g, region)
        g.block(region)
        following = _carry_on(g, region.arguments[1:], region.terminator.operands, buffers)
        counter.add_incoming(b.add(counter, by), b.block)
        for phi, new in zip(phis, following):
            phi.add_incoming(new, b.block)
    b.branch(head)
    b.position_at_end(done)
    _carry_out(g, op.results, buffers, phis)


def _carried_multiple(g: Generator, argument: Value, initial: Value, region: Block) -> int:
    """What a carried integer is always a multiple of, for `x += step`; 1 if it is not of that form."""
    position = region.arguments.index(argument) - 1
    following = region.terminator.operands[position]
    start = g.scalars[initial]
    if following.op is None or following.op.kind != "add" or argument not in following.op.operands:
        return 1
    step = next((v for v in following.op.operands if v is not argument), None)
    while step is not None and step.op is not None and step.op.kind == "cast":
        step = step.op.operands[0]
    known = g.scalars.get(step) if step is not None else None
    if isinstance(known, Uniform) and isinstance(start, Uniform):
        return gcd(known.multiple, start.multiple)
    if step is not None and step.op is not None and step.op.kind == "constant" and isinstance(start, Uniform):
        return gcd(multiple_of(step.op.attributes["value"]), start.multiple)
    return 1


def emit_while(g: Generator, op: Op) -> None:
    b = g.b
    before_region, after_region = op.regions
    buffers = _carry_in(g, op.operands, before_region.arguments)
    initial = [g.scalar(g.scalars[v], v.element) for v in op.operands if not v.shape]
    passed = [g.allocate(r.shape, r.element) if r.shape else None for r in op.results]
    before = b.block
    head, body, done = (b.append_basic_block(name) for name in ("while", "body", "done"))
    b.branch(head)
    b.position_at_end(head)
    phis = [b.phi(v.type) for v in initial]
    for phi, value in zip(phis, initial):
        phi.add_incoming(value, before)
    with g.scope():
        for argument, phi in zip([a for a in before_region.arguments if not a.shape], phis):
            g.scalars[argument] = Uniform(phi)
        g.block(before_region)
        go, *values = before_region.terminator.operands
        scalars = []
        for value, place in zip(values, passed):
            if place is None:
                scalars.append(g.scalar(g.request(value, (), 0, 1), value.element))
            else:
                g.materialise(value, place)
        b.cbranch(g.scalar(g.scalars[go], go.element), body, done)
        b.position_at_end(body)
        with g.scope():
            available = iter(scalars)
            for argument, place in zip(after_region.arguments, passed):
                if place is None:
                    g.scalars[argument] = Uniform(next(available))
                else:
                    g.tiles[argument] = place
            g.block(after_region)
            following = _carry_on(g, before_region.arguments, after_region.terminator.operands, buffers)
            for phi, new in zip(phis, following):
                phi.add_incoming(new, b.block)
        b.branch(head)
    b.position_at_end(done)
    _carry_out(g, op.results, passed, scalars)


def emit_if(g: Generator, op: Op) -> None:
    b = g.b
    places = [g.allocate(r.shape, r.element) if r.shape else None for r in op.results]
    names = ("then", "else", "joined")
    then, otherwise, joined = (b.append_basic_block(name) for name in names)
    b.cbranch(g.scalar(g.scalars[op.operands[0]], op.operands[0].element), then, otherwise)
    ends: list[tuple[ir.Block, list[ir.Value]]] = []
    for start, region in zip((then, otherwise), op.regions):
        b.position_at_end(start)
        with g.scope():
            g.block(region)
            scalars = []
            for value, place in zip(region.terminator.operands, places):
                if place is None:
                    scalars.append(g.scalar(g.scalars[value], value.element))
                else:
                    g.materialise(value, place)
            ends.append((b.block, scalars))
        b.branch(joined)
    b.position_at_end(joined)
    phis = []
    for position in range(len(ends[0][1])):
        phi = b.phi(ends[0][1][position].type)
        for block, values in ends:
            phi.add_incoming(values[position], block)
        phis.append(phi)
    _carry_out(g, op.results, places, phis)


def _carry_in(g: Generator, initial: Sequence[Value], arguments: Sequence[Value]) -> list[Stored | None]:
    buffers: list[Stored | None] = []
    for value, argument in zip(initial, arguments):
        buffers.append(g.materialise(value, g.allocate(value.shape, value.element)) if value.shape else None)
        if buffers[-1] is not None:
            g.tiles[argument] = buffers[-1]
    return buffers


def _carry_on(
    g: Generator, arguments: Sequence[Value], following: Sequence[Value], buffers: Sequence[Stored | None]
) -> list[ir.Value]:
    """Writes the next values of carried tiles over the old ones; returns those of carried scalars."""
    scalars = [g.scalar(g.scalars[v], v.element) for v in following if not v.shape]
    pending = [i for i, v in enumerate(following) if v.shape and v is not arguments[i]]
    needs = {i: lazy_leaves(g, following[i]) for i in pending}
    copies: list[tuple[Stored, Stored]] = []
    while pending:
        free = [i for i in pending if not any(arguments[i] in needs[j] for j in pending if j != i)]
        i = (free or pending)[0]
        pending.remove(i)
        place = buffers[i]
        assert place is not None
        if free and (arguments[i] not in needs[i] or _same_element(g, following[i], arguments[i])):
            g.materialise(following[i], place)
        else:
            copies.append((g.materialise(following[i]), place))
    for source, place in copies:
        memory.copy_stored(g, source, place)
    return scalars


def lazy_leaves(g: Generator, value: Value) -> set[Value]:
    """The stored tiles that computing a value on demand reads."""
    if value in g.tiles:
        return {value}
    found: set[Value] = set()
    if value.op is not None:
        for operand in value.op.operands:
            if operand.shape and (value.op.kind != "dot" or operand is value.op.operands[2]):
                found |= lazy_leaves(g, operand)
            elif operand.shape:
                found |= _operand_leaves(g, value.op, operand)
    return found


def _same_element(g: Generator, value: Value, leaf: Value) -> bool:
    """Whether every element of `value` needs only the same element of `leaf`."""
    if value is leaf or value in g.tiles or value.op is None:
        return True
    if leaf not in lazy_leaves(g, value):
        return True
    if value.op.kind == "dot":
        others = _operand_leaves(g, value.op, value.op.operands[0])
        others |= _operand_leaves(g, value.op, value.op.operands[1])
        return leaf not in others and _same_element(g, value.op.operands[2], leaf)
    if value.op.kind not in tile_ir.ELEMENTWISE:
        return False
    return all(_same_element(g, v, leaf) for v in value.op.operands if v.shape)


def _carry_out(
    g: Generator, results: Sequence[Value], buffers: Sequence[Stored | None], scalars: Sequence[ir.Value]
) -> None:
    available = iter(scalars)
    for result, buffer in zip(results, buffers):
        if buffer is None:
            g.scalars[result] = Uniform(next(available))
        else:
            g.tiles[result] = buffer


def _operand_leaves(g: Generator, op: Op, operand: Value) -> set[Value]:
    """Stored tiles read while a dot runs: none of a packed operand's."""
    side = 0 if op.operands[0] is operand else 1
    return set() if packing_key(g, op, side) in g.packed else lazy_leaves(g, operand)

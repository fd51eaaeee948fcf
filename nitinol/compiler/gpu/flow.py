"""How layouts pass through elementwise operations and views: on to the result, back to the operands.

Nothing moves: where an operand's elements stay, each thread makes the result's elements of those that it has.
"""

from __future__ import annotations

from nitinol.compiler.gpu.layout import Layout, Map, bits_of, compose, part_bit, solve, view_map
from nitinol.compiler.ir import ELEMENTWISE, Op


def operand_layouts(op: Op, layout: Layout) -> list[Layout]:
    """Where the operands of an elementwise operation or view must be so that each thread has what it needs."""
    if op.kind in ELEMENTWISE:
        return [layout] * len(op.operands)
    source = op.operands[0]
    bits = bits_of(source.shape)
    if op.kind == "split":  # both parts' elements side by side
        shift = tuple(1 << (bit + 1) for bit in range(layout.bits))
        columns = [compose(shift, c) for c in (layout.registers, layout.lanes, layout.warps)]
        return [Layout(bits, (1, *columns[0]), columns[1], columns[2], layout.sparse)]
    if op.kind not in ("reshape", "trans"):
        layout = layout.dense  # copies of the operand are other elements of the result
    view = view_map(op.kind, source.shape, op.result.shape, op.attributes)
    return [layout.through(view, bits)] * len(op.operands)


def result_layout(op: Op, source: Layout) -> Layout:
    """The layout of the results of a view whose source stays where it is."""
    if op.kind == "broadcast":
        return repeated(op, source)
    if op.kind in ("reshape", "trans"):
        return turned(op, source)
    if op.kind == "split":
        drop = tuple(0 if bit == 0 else 1 << (bit - 1) for bit in range(source.bits))
        return source.through(drop, source.bits - 1)
    cut = part_bit(op.kind, op.result.shape, op.attributes)  # join, cat: the parts side by side in each thread
    insert = tuple(1 << (bit if bit < cut else bit + 1) for bit in range(source.bits))
    columns = [compose(insert, c) for c in (source.registers, source.lanes, source.warps)]
    front = sum(1 for c in source.registers if c < 1 << cut) if cut else 0
    registers = (*columns[0][:front], 1 << cut, *columns[0][front:])
    return Layout(source.bits + 1, registers, columns[1], columns[2], source.sparse)


def repeated(op: Op, source: Layout) -> Layout:
    """Of a broadcast: what is new is in registers."""
    view = view_map("broadcast", op.operands[0].shape, op.result.shape, {})
    back = [0] * source.bits
    for bit, column in enumerate(view):
        if column:
            back[column.bit_length() - 1] = 1 << bit
    grown = source.through(tuple(back), len(view))
    new = tuple(1 << bit for bit, column in enumerate(view) if not column)
    return Layout(len(view), grown.registers + new, grown.lanes, grown.warps)


def turned(op: Op, source: Layout) -> Layout:
    """Of a reshape or transpose."""
    inverse = [0] * source.bits
    for bit, column in enumerate(view_map(op.kind, op.operands[0].shape, op.result.shape, op.attributes)):
        inverse[column.bit_length() - 1] = 1 << bit
    return source.through(tuple(inverse), source.bits)


def source_registers(source: Layout, result: Layout, view: Map) -> Map:
    """Which register of a view's source each register of its result is."""
    columns = [solve(source.registers, c) for c in compose(view, result.registers)]
    assert None not in columns
    return tuple(columns)  # type: ignore[arg-type]

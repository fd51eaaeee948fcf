"""Where loads go: what a simdgroup wants is asked of memory once, and handed on by shuffles.

The largest loads of a kernel are coalesced and the rest follows them. A small tile that is read with them, such as the
scales of the blocks whose bytes they read, may be addressed by the same pointers: then it is spread over the lanes of
the simdgroup that has its blocks (`beside`). Or it has nothing to go by: then it waits for what its users want, which
may be many copies, and each element is loaded by one lane (`spread`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from nitinol.compiler.gpu.access import memory_order, segments
from nitinol.compiler.gpu.flow import operand_layouts
from nitinol.compiler.gpu.layout import LANE_BITS, Layout, Map, bits_of, view_map
from nitinol.compiler.gpu.preferred import coalesced
from nitinol.compiler.ir import ELEMENTWISE, Function, Op, Value, walk
from nitinol.language.types import PointerType

if TYPE_CHECKING:
    from nitinol.compiler.gpu.assign import Assignment

Near = dict[Value, Layout]  # where the pointers are that loads with a layout start from


def large_loads(function: Function) -> set[Op]:
    """Loads of at least half as many elements as the largest."""
    found = [op for op in walk(function.body) if op.kind == "load" and op.operands[0].shape]
    most = max((bits_of(op.operands[0].shape) for op in found), default=0)
    return {op for op in found if bits_of(op.operands[0].shape) >= most - 1}


def load_layout(a: Assignment, op: Op) -> Layout | None:
    """On the way forward: a large load is coalesced, a small one goes beside others of the same pointers, or follows
    its users (None)."""
    pointer, best = op.operands[0], coalesced(a, op)
    if op in a.large or not index_only(a, op):
        a.chosen[op] = best
    else:
        order = memory_order(a.widths.strides.of(pointer), pointer.shape)
        vector = a.vectors.get(pointer.shape, 0)
        found = None if a.style.direct else beside(a.near, pointer, order, vector)
        if found is None:
            a.weak[op.result] = best.bits, best
            return None
        a.chosen[op] = found
    note(a.near, pointer, a.chosen[op])
    return a.chosen[op]


def place_load(a: Assignment, op: Op) -> None:
    """On the way back: a load without a home goes where it is wanted with the fewest registers. One with a home does so
    too if that is the only place and costs memory little more: several simdgroups then load the same elements, from the
    cache, and save a trip through threadgroup memory with its barriers."""
    wanted, home = a.wanted.get(op.result, []), a.home[op.result]
    pointer = op.operands[0]
    assert isinstance(pointer.element, PointerType)
    order = memory_order(a.widths.strides.of(pointer), pointer.shape)
    nbytes = pointer.element.element.nbytes
    if home is None:
        layout = min(wanted, key=lambda w: w.count, default=coalesced(a, op))
        a.chosen[op] = a.home[op.result] = spread(layout, order, nbytes, a.style.direct)
    elif len(wanted) == 1 and wanted[0] != home and index_only(a, op):
        layout = spread(wanted[0], order, nbytes, a.style.direct)
        if segments(a.widths, op, layout) <= 4 * segments(a.widths, op, home):
            a.chosen[op] = a.home[op.result] = layout
            a.moved |= {op} & a.large


def index_only(a: Assignment, op: Op) -> bool:
    """Whether address, mask and other value are computed wherever they are wanted."""
    return all(a.home.get(v) is None or not v.shape for v in op.operands)


def spread(layout: Layout, order: Sequence[int], nbytes: int, direct: bool) -> Layout:
    """A layout for loading what is wanted in `layout`: the same simdgroups have the same elements, but of lanes that
    want the same ones each loads a part, or with `direct` all do, which takes no more loads than shuffles. `order`: the
    bits of the place, those that move the address least first.

    What is left of copies is masked off. Registers stay together up to 32 bits, which a shuffle moves at once.
    """
    rank = {1 << bit: number for number, bit in enumerate(order)}
    registers = sorted(layout.registers, key=lambda column: rank[column & -column])
    if direct:
        return replace(layout, registers=tuple(registers))
    lanes = list(layout.lanes)
    copies = Layout(layout.bits, layout.registers, layout.lanes, ()).copies[0]
    word = 0  # registers in one 32-bit word
    while word < len(registers) and registers[word] == 1 << order[word] and nbytes << (word + 1) <= 4:
        word += 1
    for bit in range(LANE_BITS):
        if copies >> bit & 1 and len(registers) > word:
            lanes[bit] = registers.pop()
    made = replace(layout, registers=tuple(registers), lanes=tuple(lanes))
    return replace(made, sparse=made.copies[0] != 0)


def note(near: Near, value: Value, layout: Layout) -> None:
    """Where the pointers that an address is computed from are for an access in this layout. Numbers are not noted: the
    same range of them may count rows here and tokens there."""
    op = value.op
    if not value.shape or value in near or not isinstance(value.element, PointerType):
        return
    near[value] = layout.dense
    if op is not None and (op.kind in ELEMENTWISE or op.kind in ("broadcast", "reshape", "trans")):
        for operand, needed in zip(op.operands, operand_layouts(op, layout)):
            note(near, operand, needed)


def beside(near: Near, pointer: Value, order: Sequence[int], vector: int) -> Layout | None:
    """A layout in which every simdgroup has the elements whose pointers it has already; None if the address shares none
    with earlier ones."""
    warps = warps_near(near, pointer, {})
    if warps is None or not any(warps):
        return None
    columns = [column for column in warps if column]
    if any(column & (column - 1) for column in columns) or len(set(columns)) < len(columns):
        return None
    rest = [1 << bit for bit in order if 1 << bit not in columns]
    vector = min(vector, max(0, len(rest) - LANE_BITS))
    lanes = rest[vector : vector + LANE_BITS]
    lanes += [0] * (LANE_BITS - len(lanes))
    registers = (*rest[:vector], *rest[vector + LANE_BITS :])
    return Layout(len(order), registers, tuple(lanes), warps, 0 in lanes)


def warps_near(near: Near, value: Value, known: dict[Value, Map | None]) -> Map | None:
    """The columns of the warps for a value that is computed from others, at least one of which has a layout."""
    if value not in known:
        known[value] = near[value].warps if value in near else _computed(near, value, known)
    return known[value]


def _computed(near: Near, value: Value, known: dict[Value, Map | None]) -> Map | None:
    op = value.op
    if op is None or not value.shape:
        return None
    if op.kind in ELEMENTWISE:
        found = [w for v in op.operands if v.shape and (w := warps_near(near, v, known)) is not None]
        return max(found, key=lambda warps: sum(1 for column in warps if column), default=None)
    if op.kind not in ("broadcast", "reshape", "trans"):
        return None
    source = op.operands[0]
    warps = warps_near(near, source, known)
    if warps is None:
        return None
    back = [0] * bits_of(source.shape)
    for bit, column in enumerate(view_map(op.kind, source.shape, value.shape, op.attributes)):
        if column:
            back[column.bit_length() - 1] = 1 << bit
    return tuple(sum(back[bit] for bit in range(len(back)) if column >> bit & 1) for column in warps)

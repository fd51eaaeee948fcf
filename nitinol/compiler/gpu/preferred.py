"""Layouts that operations prefer by themselves: those in which memory is read and written with wide, coalesced
accesses, those in which a scan runs along registers and lanes, and a plain one for what prefers none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nitinol.compiler.gpu.access import Widths, memory_order, segments
from nitinol.compiler.gpu.layout import LANE_BITS, Layout, axis_bits, bits_of, blocked
from nitinol.compiler.ir import Function, Op, walk
from nitinol.language.types import PointerType

if TYPE_CHECKING:
    from nitinol.compiler.gpu.assign import Assignment


def plain_layout(shape: Sequence[int], warp_bits: int) -> Layout:
    bits = bits_of(shape)
    return blocked(range(bits), warp_bits, min(2, max(0, bits - LANE_BITS - warp_bits)))


def vector_bits(function: Function, widths: Widths) -> dict[tuple[int, ...], int]:
    """How many neighbours a thread has of the tiles of each shape: what the narrowest vector access takes."""
    vectors: dict[tuple[int, ...], int] = {}
    for op in walk(function.body):
        if op.kind in ("load", "store") and op.operands[0].shape:
            shape = op.operands[0].shape
            width = widths.vector_bits(op, memory_order(widths.strides.of(op.operands[0]), shape))
            if width:  # one that cannot be wide must not narrow the others
                vectors[shape] = min(vectors.get(shape, 4), width)
    return vectors


def coalesced(a: Assignment, op: Op) -> Layout:
    """For a load or store: lanes along the smallest stride, each with one vector."""
    pointer = op.operands[0]
    order = memory_order(a.widths.strides.of(pointer), pointer.shape)
    vector = a.vectors.get(pointer.shape, 0)
    assert isinstance(pointer.element, PointerType)
    if op.kind == "load" and pointer.element.element.nbytes < 4:
        most = a.style.run // pointer.element.element.nbytes
        vector = max(min(vector, most.bit_length() - 1), run_bits(a, op, order))
    vector = min(vector, max(0, len(order) - LANE_BITS - a.warp_bits))
    return blocked(order, a.warp_bits, vector, a.style.joined)


def run_bits(a: Assignment, op: Op, order: Sequence[int]) -> int:
    """How many neighbours a thread shall have, be the access as narrow as it may: bytes are worked on in words."""
    pointer = op.operands[0]
    assert isinstance(pointer.element, PointerType)
    most = (a.style.run // pointer.element.element.nbytes).bit_length() - 1
    for width in range(min(most, len(order)), 0, -1):
        neighbours = list(order[:width]) == list(range(order[0], order[0] + width))
        if neighbours and a.widths.step(pointer, order[0], width) == 1:
            return width
    return 0


def store_layout(a: Assignment, op: Op) -> Layout:
    """The value's home if memory likes it about as well as the coalesced layout, else that."""
    best, home = coalesced(a, op), a.home_of(op.operands[1])
    if home is None or home == best:
        return best
    near = 1.5 * segments(a.widths, op, best) + 4  # 4 more cost less than a barrier
    return home if segments(a.widths, op, home) <= near else best


def scan_layout(shape: Sequence[int], axis: int, warp_bits: int) -> Layout:
    """The axis' upper bits in lanes, its lower ones in registers, nothing of it across warps."""
    along = axis_bits(shape)[axis]
    split = max(0, len(along) - LANE_BITS)
    others = [bit for bit in range(bits_of(shape)) if bit not in along]
    lanes = along[split:]
    while others and len(lanes) < LANE_BITS:
        lanes.append(others.pop(0))
    warps = [others.pop() for _ in range(min(warp_bits, len(others)))]
    return Layout(
        bits_of(shape),
        tuple(1 << bit for bit in along[:split] + others),
        tuple([1 << bit for bit in lanes] + [0] * (LANE_BITS - len(lanes))),
        tuple([1 << bit for bit in warps] + [0] * (warp_bits - len(warps))),
    )

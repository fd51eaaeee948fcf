"""Where the elements of a tile live: linear maps over bits, from (register, lane, warp) to the place in the tile.

The place is the row-major number of the element; all extents are powers of two, so a number of n bits names an element
of a tile of 2**n. A map is linear over GF(2): bit i of the register number contributes `registers[i]`, and the
contributions of all bits are combined with xor. Blocked layouts, their transposes and slices and the fragments of
matrix instructions are all such maps, a reshape changes nothing and every other view is a linear map itself; so what
must be done between two layouts can be read off their columns ("linear layouts").

Lane and warp bits with the column 0 hold copies: the tile is smaller than the threads, or was broadcast. In a sparse
layout only one lane, the owner, has each element, and what the others have in its place is of no meaning: so a load
asks memory once for what a simdgroup wants.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

Map = tuple[int, ...]  # a linear map: the image of each bit

LANE_BITS = 5  # 32 lanes, in Apple's simdgroups and NVIDIA's warps


def apply(columns: Map, number: int) -> int:
    """The image of a number."""
    image = 0
    for bit, column in enumerate(columns):
        if number >> bit & 1:
            image ^= column
    return image


@functools.lru_cache(65536)
def compose(outer: Map, inner: Map) -> Map:
    """First `inner`, then `outer`."""
    return tuple(apply(outer, column) for column in inner)


def identity(bits: int) -> Map:
    return tuple(1 << i for i in range(bits))


@functools.lru_cache(65536)
def solve(columns: Map, image: int) -> int | None:
    """A number with that image, with as few high bits as possible; None if there is none."""
    basis: list[tuple[int, int]] = []  # (image, number), each with a leading bit of its own
    for bit, column in enumerate(columns):
        number = 1 << bit
        for other, made in basis:
            if column ^ other < column:
                column, number = column ^ other, number ^ made
        if column:
            basis.append((column, number))
            basis.sort(reverse=True)
    number = 0
    for other, made in basis:
        if image ^ other < image:
            image, number = image ^ other, number ^ made
    return None if image else number


@dataclass(frozen=True)
class Layout:
    """The columns of register, lane and warp bits, for a tile of 2**bits elements."""

    bits: int
    registers: Map
    lanes: Map
    warps: Map
    sparse: bool = False

    @property
    def dense(self) -> Layout:
        """The same with every copy."""
        return replace(self, sparse=False) if self.sparse else self

    @property
    def count(self) -> int:
        """Registers of each thread."""
        return 1 << len(self.registers)

    @property
    def columns(self) -> Map:
        return self.registers + self.lanes + self.warps

    def place(self, register: int, lane: int, warp: int) -> int:
        return apply(self.registers, register) ^ apply(self.lanes, lane) ^ apply(self.warps, warp)

    def through(self, view: Map, bits: int) -> Layout:
        """The layout of a view's source such that every thread finds what it needs for this one in itself."""
        registers = independent(compose(view, self.registers))
        return Layout(bits, registers, compose(view, self.lanes), compose(view, self.warps), self.sparse)

    def locate(self, place: int) -> tuple[int, int, int]:
        """A (register, lane, warp) that holds the element; of copies the one in the lowest lane and warp."""
        number = solve(self.columns, place)
        if number is None:
            raise ValueError(f"{self} does not hold element {place}")
        registers = len(self.registers)
        return (
            number & (self.count - 1),
            number >> registers & ((1 << len(self.lanes)) - 1),
            number >> (registers + len(self.lanes)),
        )

    @property
    def copies(self) -> tuple[int, int]:
        """Masks of lane and warp bits that only make copies: an element's owner has zeros there."""
        masks = [0, 0]
        seen: list[int] = list(self.registers)
        for kind, columns in enumerate((self.lanes, self.warps)):
            for bit, column in enumerate(columns):
                if solve(tuple(seen), column) is not None:
                    masks[kind] |= 1 << bit
                else:
                    seen.append(column)
        return masks[0], masks[1]


def independent(columns: Sequence[int]) -> Map:
    """The columns that are not combinations of earlier ones."""
    kept: list[int] = []
    for column in columns:
        if solve(tuple(kept), column) is None:
            kept.append(column)
    return tuple(kept)


def blocked(order: Sequence[int], warp_bits: int, vector_bits: int, joined: bool = False) -> Layout:
    """A layout for memory: `order` lists the bits of the place from the one that moves the address least.

    The first `vector_bits` go to registers (one vector access), the next five to lanes, the last to warps, so that a
    warp has whole rows, and what is left in the middle to registers again. `joined`: warps go on where lanes end, so
    that all share a row.
    """
    rest = list(order)
    columns = [[1 << rest.pop(0) for _ in range(min(vector_bits, len(rest)))]]
    columns.append([1 << rest.pop(0) for _ in range(min(LANE_BITS, len(rest)))])
    if joined:
        columns.append([1 << rest.pop(0) for _ in range(min(warp_bits, len(rest)))])
    else:
        columns.append([1 << rest.pop() for _ in range(min(warp_bits, len(rest)))][::-1])
    registers, lanes, warps = columns
    return Layout(
        len(order),
        tuple(registers) + tuple(1 << bit for bit in rest),
        tuple(lanes + [0] * (LANE_BITS - len(lanes))),
        tuple(warps + [0] * (warp_bits - len(warps))),
    )


# --------------------------------------------------------------------------------------------------- shapes and views


def axis_bits(shape: Sequence[int]) -> list[list[int]]:
    """Per axis the bits of the place that are its coordinate, the lowest first."""
    result: list[list[int]] = []
    position = 0
    for extent in reversed(shape):
        width = extent.bit_length() - 1
        result.append(list(range(position, position + width)))
        position += width
    return result[::-1]


def bits_of(shape: Sequence[int]) -> int:
    return sum(extent.bit_length() - 1 for extent in shape)


def without_axis(shape: Sequence[int], axis: int) -> Map:
    """The map from places in a tile to places in the tile without that axis."""
    dropped = axis_bits(shape)[axis]
    columns, position = [], 0
    for bit in range(bits_of(shape)):
        columns.append(0 if bit in dropped else 1 << position)
        position += bit not in dropped
    return tuple(columns)


def view_map(kind: str, source: Sequence[int], result: Sequence[int], attributes: dict) -> Map:
    """For splat, broadcast, reshape, trans: places of the result to those of the source.

    For join, split and cat: places of the joined tile to those of either part; its one bit that tells the parts
    apart, `part_bit`, becomes 0.
    """
    if kind == "reshape":
        return identity(bits_of(result))
    if kind == "splat":
        return (0,) * bits_of(result)
    columns = [0] * bits_of(result)
    if kind in ("broadcast", "trans"):
        bits = axis_bits(source)
        for axis, mine in enumerate(axis_bits(result)):
            theirs = bits[axis if kind == "broadcast" else attributes["perm"][axis]]
            for bit, other in zip(mine, theirs):
                columns[bit] = 1 << other
        return tuple(columns)
    cut, position = part_bit(kind, result, attributes), 0
    for bit in range(len(columns)):
        columns[bit] = 0 if bit == cut else 1 << position
        position += bit != cut
    return tuple(columns)


def part_bit(kind: str, joined: Sequence[int], attributes: dict) -> int:
    """The bit of a joined tile's place that tells which part an element is from: join and split: the last axis'."""
    return axis_bits(joined)[attributes["axis"]][-1] if kind == "cat" else 0

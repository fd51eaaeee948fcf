"""Requests for tiles that only rearrange other tiles: where each lane comes from."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from llvmlite import ir

from nitinol.compiler.analysis import axis_groups
from nitinol.compiler.cpu.arithmetic import I32, I64, llvm_type
from nitinol.compiler.cpu.lanes import Lanes, Uniform, Vector
from nitinol.compiler.ir import Op, Value
from nitinol.language.types import DType, PointerType

if TYPE_CHECKING:
    from nitinol.compiler.cpu.generator import Generator, Index


def linear_index(g: Generator, shape: tuple[int, ...], index: Index) -> Any:
    """The number of an element in row-major order."""
    total: Any = 0
    for extent, position in zip(shape, index):
        total = g.add(g.mul(total, extent), position)
    return total


def request(g: Generator, op: Op, value: Value, index: Index, axis: int, width: int) -> Lanes:
    runs_over = width > 1 and width > value.shape[axis]  # the run goes on in the next row
    if op.kind == "reshape":
        return _reshape(g, op.operands[0], value, index, axis, width)
    if op.kind == "join":
        return _join(g, op, value, index, axis, width)
    if op.kind == "broadcast" and runs_over:
        return _broadcast_run(g, op.operands[0], value, index, width)
    if runs_over:
        return pieces(g, value, index, width)
    if op.kind == "broadcast":
        source = op.operands[0]
        grown = source.shape[axis] != value.shape[axis]
        return g.request(source, _narrowed(source, value, index), axis, 1 if grown else width)
    if op.kind == "trans":
        perm = op.attributes["perm"]
        moved: list[Any] = [0] * len(perm)
        for i, p in enumerate(perm):
            moved[p] = index[i]
        return g.request(op.operands[0], tuple(moved), perm[axis], width)
    if op.kind == "split":
        return _split(g, op, value, index, axis, width)
    if op.kind == "cat":
        return _cat(g, op, index, axis, width)
    raise NotImplementedError(op.kind)


def _broadcast_run(g: Generator, source: Value, value: Value, index: Index, width: int) -> Lanes:
    """A run over several rows of a broadcast tile."""
    place = _narrowed(source, value, index)
    last = len(source.shape) - 1
    if source.shape[-1] == value.shape[-1]:
        if _covers(source.shape, value.shape, width):
            return g.request(source, place, last, width)
        return pieces(g, value, index, width)
    repeats = value.shape[-1]
    count = width // repeats
    inner = source.op.operands[0] if source.op is not None and source.op.kind == "reshape" else None
    if inner is None or inner.shape != source.shape[:-1] or not _covers(inner.shape, value.shape[:-1], count):
        return pieces(g, value, index, width)
    lanes = g.request(inner, place[:-1], last - 1, count)  # each value once, then repeated by one shuffle
    if isinstance(lanes, Uniform):
        return lanes
    once = g.vector(lanes, inner.element, count)
    order = ir.Constant(ir.VectorType(I32, width), [i // repeats for i in range(width)])
    return Vector(g.b.shuffle_vector(once, ir.Constant(once.type, ir.Undefined), order))


def _covers(source: tuple[int, ...], result: tuple[int, ...], width: int) -> bool:
    """Whether the trailing axes that a run of `width` spans are the same on both sides."""
    covered = 1
    for a, b in zip(reversed(source), reversed(result)):
        if covered >= width:
            break
        if a != b:
            return False
        covered *= b
    return covered >= width


def _narrowed(source: Value, value: Value, index: Index) -> Index:
    return tuple(i if a == b else 0 for i, a, b in zip(index, source.shape, value.shape))


def _unravel(g: Generator, linear: Any, shape: tuple[int, ...]) -> list[Any]:
    """Row-major position to index; extents are powers of two."""
    out: list[Any] = []
    for number, extent in enumerate(reversed(shape)):
        outermost = number == len(shape) - 1
        out.append(linear if outermost else g.low_bits(linear, extent))
        linear = g.shift_right(linear, extent.bit_length() - 1)
    return out[::-1]


def pieces(g: Generator, value: Value, index: Index, width: int) -> Lanes:
    """A run along the last axis that spans several rows, row by row."""
    row_length = value.shape[-1]
    parts = []
    row = linear_index(g, value.shape[:-1], index[:-1])
    for number in range(width // row_length):
        position = _unravel(g, g.add(row, number), value.shape[:-1])
        parts.append(g.request(value, (*position, 0), len(value.shape) - 1, row_length))
    return concatenate(g, parts, value.element, row_length)


def concatenate(g: Generator, parts: list[Lanes], element: DType | PointerType, width: int) -> Lanes:
    if width == 1:
        vector = ir.Constant(ir.VectorType(llvm_type(element), len(parts)), ir.Undefined)
        for number, part in enumerate(parts):
            vector = g.b.insert_element(vector, g.scalar(part, element), ir.Constant(I32, number))
        return Vector(vector)
    vectors = [g.vector(p, element, width) for p in parts]
    while len(vectors) > 1:
        count = vectors[0].type.count
        order = ir.Constant(ir.VectorType(I32, 2 * count), list(range(2 * count)))
        vectors = [g.b.shuffle_vector(a, b, order) for a, b in zip(vectors[::2], vectors[1::2])]
    return Vector(vectors[0])


def one_by_one(g: Generator, value: Value, index: Index, axis: int, width: int) -> Lanes:
    """The slow way that always works: each lane on its own."""
    parts = []
    for lane in range(width):
        moved = list(index)
        moved[axis] = g.add(index[axis], lane)
        parts.append(g.request(value, tuple(moved), axis, 1))
    return concatenate(g, parts, value.element, 1)


def _reshape(g: Generator, source: Value, value: Value, index: Index, axis: int, width: int) -> Lanes:
    if not source.shape:
        return g.request(source, (), 0, 1)
    if width > 1 and width > value.shape[axis]:  # row-major order is the same on both sides
        linear = linear_index(g, value.shape, index)
        return g.request(source, tuple(_unravel(g, linear, source.shape)), len(source.shape) - 1, width)
    moved: list[Any] = [0] * len(source.shape)
    lane_axis, lane_width = 0, width
    groups = axis_groups(source.shape, value.shape)
    for left, right in groups:
        linear = linear_index(g, tuple(value.shape[i] for i in right), tuple(index[i] for i in right))
        for i, position in zip(left, _unravel(g, linear, tuple(source.shape[i] for i in left))):
            moved[i] = position
        if width > 1 and axis in right:
            if axis != right[-1]:
                return one_by_one(g, value, index, axis, width)
            lane_axis = left[-1]
            if width > source.shape[lane_axis]:
                inner = prod(source.shape[lane_axis + 1 :])
                if inner != 1:
                    return one_by_one(g, value, index, axis, width)
                linear = linear_index(g, source.shape, tuple(moved))
                lane_axis = len(source.shape) - 1
                if lane_axis != left[-1]:  # trailing extents of 1: run along the flattened tile
                    return one_by_one(g, value, index, axis, width)
    if width == 1:
        return g.request(source, tuple(moved), len(source.shape) - 1, 1)
    return g.request(source, tuple(moved), lane_axis, lane_width)


def _join(g: Generator, op: Op, value: Value, index: Index, axis: int, width: int) -> Lanes:
    """[..., 2] of two tiles: lane 2i of the flattened run is a's, lane 2i + 1 is b's."""
    a, b = op.operands
    last = len(value.shape) - 1
    if axis == last and width > 1:
        half = width // 2
        start = index[:-1]
        parts = [g.vector(g.request(v, start, last - 1, half), v.element, half) for v in (a, b)]
        if half == 1:
            return concatenate(g, [Uniform(p) for p in parts], a.element, 1)
        order = [i // 2 + (half if i % 2 else 0) for i in range(width)]
        return Vector(g.b.shuffle_vector(*parts, ir.Constant(ir.VectorType(I32, width), order)))
    if isinstance(index[-1], int):
        return g.request(op.operands[index[-1]], index[:-1], axis, width)
    parts = [g.vector(g.request(v, index[:-1], min(axis, last - 1), width), v.element, width) for v in (a, b)]
    first = g.b.icmp_signed("==", g.i64(index[-1]), ir.Constant(I64, 0))
    return g.wrap(g.b.select(first, *parts), width)


def _split(g: Generator, op: Op, value: Value, index: Index, axis: int, width: int) -> Lanes:
    source = op.operands[0]
    which = op.results.index(value)
    if width == 1 or axis != len(value.shape) - 1:
        return g.request(source, (*index, which), axis, width)
    run = g.vector(g.request(source, (*index, 0), len(source.shape) - 1, 2 * width), source.element, 2 * width)
    order = ir.Constant(ir.VectorType(I32, width), [2 * i + which for i in range(width)])
    return Vector(g.b.shuffle_vector(run, ir.Constant(run.type, ir.Undefined), order))


def _cat(g: Generator, op: Op, index: Index, axis: int, width: int) -> Lanes:
    """Both parts have the same extent: their sum is a power of two."""
    along = op.attributes["axis"]
    extent = op.operands[0].shape[along]
    position = index[along]
    if width > 1 and axis == along and width > extent:
        return one_by_one(g, op.result, index, axis, width)
    inside = (*index[:along], g.low_bits(position, extent), *index[along + 1 :])
    if isinstance(position, int):
        return g.request(op.operands[0 if position < extent else 1], inside, axis, width)
    parts = [g.vector(g.request(v, inside, axis, width), v.element, width) for v in op.operands]
    first = g.b.icmp_signed("<", position, ir.Constant(I64, extent))
    return g.wrap(g.b.select(first, *parts), width)

"""Operands of `dot` in the order that the micro-kernels want.

An operand is read where it lies if that is cheap (rows contiguous, nothing to compute); otherwise it is packed once,
where it is defined: A row-major, B as [K/g][N][g] with g values in each 32-bit lane (see `Stored.group`). B from memory
that is contiguous along K, a transposed view, goes through transpositions in registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from llvmlite import ir

from nitinol.compiler import ir as tile_ir
from nitinol.compiler.cpu import memory
from nitinol.compiler.cpu.arithmetic import I32, llvm_type, mangle
from nitinol.compiler.cpu.lanes import Lanes, Uniform
from nitinol.compiler.cpu.reduction import byte_dot, byte_dot_instruction, call_byte_dot
from nitinol.compiler.ir import Op, Value
from nitinol.language.types import DType, bfloat16, float32, float64, int8, int32, uint8

if TYPE_CHECKING:
    from nitinol.compiler.cpu.generator import Generator, Index, Stored


@dataclass(eq=False)
class Packed:
    """What is kept of a dot operand in scratch: the operand itself, unless it is read where it lies, and for A of
    signed × signed bytes -128 × the sum of each row (int32). The instruction wants one unsigned factor, so B is packed
    as b + 128; a · (b + 128) - 128 · sum(a) is the product, and the second term is what accumulators start from."""

    stored: Stored | None
    row_sums: Stored | None = None


def mode(g: Generator, op: Op) -> str:
    """Which micro-kernel a dot gets: "bytes", "bfloat16" or "plain"."""
    a, b, acc = op.operands
    k = a.shape[-1]
    width = _width(g, op)
    if {a.element, b.element} <= {int8, uint8} and acc.element == int32 and k % 4 == 0:
        both_unsigned = a.element == b.element == uint8
        if width > 1 and byte_dot_instruction(g, width) and not both_unsigned:
            return "bytes"
    pairs = a.element == b.element == bfloat16 and acc.element == float32 and k % 2 == 0
    if pairs and width == 16 and g.target.has("avx512bf16"):
        return "bfloat16"
    return "plain"


def _width(g: Generator, op: Op) -> int:
    return min(op.result.shape[-1], g.target.vector_bytes // 4)


def compute_type(op: Op) -> DType:
    """What the plain micro-kernel multiplies and adds in."""
    element = op.result.element
    return element if element in (float64, int32) else float32  # type: ignore[return-value]


def prepare_operand(g: Generator, op: Op, value: Value) -> None:
    """Packs a dot's operand, if it must be, right where the operand is defined."""
    for side in (0, 1):
        if op.operands[side] is value:
            _pack(g, op, side)


def prepare(g: Generator, op: Op) -> None:
    """Packs operands that were not defined by an operation (loop-carried tiles), and adds up rows of A."""
    for side in (0, 1):
        if op.operands[side].op is None or op.operands[side].op.kind in tile_ir.CONTROL:  # type: ignore[union-attr]
            g.packed.pop(packing_key(g, op, side), None)
            _pack(g, op, side)


def packing_key(g: Generator, op: Op, side: int) -> tuple[Value, str]:
    return op.operands[side], f"{side}/{mode(g, op)}/{compute_type(op)}/{_needs_row_sums(g, op)}"


def _needs_row_sums(g: Generator, op: Op) -> bool:
    return mode(g, op) == "bytes" and op.operands[0].element == int8 and op.operands[1].element == int8


def _direct(g: Generator, op: Op, side: int) -> bool:
    """Whether an operand is read where it lies."""
    value = op.operands[side]
    how = mode(g, op)
    if side == 1 and how != "plain":
        return False
    convert = value.element not in (float32, float64)
    few = op.result.shape[-2] <= 16 if side == 1 else op.result.shape[-1] <= 4 * _width(g, op)
    if value in g.tiles:
        return how != "plain" or not convert or few
    if value.op is None or value.op.kind != "load" or len(value.op.operands) > 1:
        return False
    strides = g.plan.strides.of(value.op.operands[0])
    if side == 1:  # reused rows are packed: in memory they are far apart and compete for the same cache sets
        return strides[-1] == 1 and few
    return strides[-1] == 1 and (how != "plain" or not convert or few)


def _pack(g: Generator, op: Op, side: int) -> None:
    key = packing_key(g, op, side)
    if key in g.packed:
        return
    value = op.operands[side]
    sums = side == 0 and _needs_row_sums(g, op)
    if _direct(g, op, side):
        if sums:
            g.packed[key] = Packed(None, _row_sums(g, value, None))
        return
    how = mode(g, op)
    element = value.element if how != "plain" else compute_type(op)
    group = {"bytes": 4, "bfloat16": 2, "plain": 1}[how] if side == 1 else 1
    stored = g.allocate(value.shape, element, group)
    if side == 1 and (group > 1 or _runs_down(g, value)):
        _pack_columns(g, value, stored, biased=_needs_row_sums(g, op))
    else:

        def body(index: Index, axis: int, width: int) -> None:
            lanes = g.request(value, index, axis, width)
            lanes = g.elementwise("cast", [lanes], [value.element], element, {}, width)
            memory.store_stored(g, stored, index, axis, width, lanes)

        g.element_walk([value], value.shape, body)
    g.packed[key] = Packed(stored, _row_sums(g, value, stored) if sums else None)


def _runs_down(g: Generator, value: Value) -> bool:
    """Whether memory is contiguous along K rather than N: B is a transposed view."""
    return g.plan.lane_axis([value]) == len(value.shape) - 2 and value.shape[-1] > 1


def _row_sums(g: Generator, value: Value, packed: Stored | None) -> Stored:
    """-128 × the sum of each row of bytes."""
    shape = value.shape[:-1]
    sums = g.allocate(shape, int32)
    k = value.shape[-1]
    lanes = min(k // 4, g.target.vector_bytes // 4)
    name = byte_dot_instruction(g, lanes)

    def row(index: Index) -> None:
        total: ir.Value = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
        for start in range(0, k, 4 * lanes):
            run = g.vector(run_of(g, value, packed, (*index, start), 4 * lanes), int8, 4 * lanes)
            if name is not None:
                total = call_byte_dot(g, name, total, ir.Constant(run.type, [0x80] * (4 * lanes)), run)
            else:
                ones = ir.Constant(run.type, [1] * (4 * lanes))
                part = byte_dot(g, ir.Constant(total.type, [0] * lanes), [ones, run], [False, False])
                total = g.b.add(total, g.b.shl(part, ir.Constant(part.type, [7] * lanes)))
        one = g.intrinsic(f"llvm.vector.reduce.add.{mangle(total.type)}", I32, [total])
        memory.store_stored(g, sums, index, 0, 1, Uniform(g.b.neg(one)))

    g.walk(shape, [1] * len(shape), row, prod(shape))
    return sums


def run_of(g: Generator, value: Value, packed: Stored | None, index: Index, width: int) -> Lanes:
    """Neighbours along the last axis of an operand, packed row-major or where it lies."""
    if packed is not None:
        return memory.load_stored(g, packed, index, len(index) - 1, width)
    return g.request(value, index, len(index) - 1, width)


def _pack_columns(g: Generator, value: Value, stored: Stored, biased: bool) -> None:
    """Packs B from memory that is contiguous along K: blocks of rows of 32-bit cells are transposed in registers."""
    group = stored.group
    *outer, k, n = value.shape
    element = stored.element
    if not _runs_down(g, value):
        _interleave_rows(g, value, stored, biased)
        return
    cell_bytes = group * element.nbytes
    columns = min(n, g.target.vector_bytes // 4)
    cells = min(k // group, g.target.vector_bytes // cell_bytes)
    run = cells * group
    cell_type = ir.IntType(8 * cell_bytes)

    def block(index: Index) -> None:
        *prefix, k0, n0 = index
        rows = []
        for column in range(columns):
            place = (*prefix, k0, g.add(n0, column))
            lanes = g.request(value, place, len(place) - 2, run)
            lanes = g.elementwise("cast", [lanes], [value.element], element, {}, run)
            vector = _lifted(g, g.vector(lanes, element, run), biased)
            rows.append(g.b.bitcast(vector, ir.VectorType(cell_type, cells) if cells > 1 else cell_type))
        for cell, vector in enumerate(transpose(g, rows, cells)):
            place = (*prefix, g.add(k0, cell * group), n0)
            address = memory.stored_address(g, stored, place, len(place) - 1, 1)
            g.b.store(vector, address.value, align=cell_bytes)  # type: ignore[union-attr]

    g.walk(value.shape, [*[1] * len(outer), run, columns], block, 1 + prod(value.shape) // (run * columns) * 16)


def _interleave_rows(g: Generator, value: Value, stored: Stored, biased: bool) -> None:
    """Packs B from rows contiguous along N: `group` rows are zipped element by element."""
    group = stored.group
    *outer, _, n = value.shape
    columns = min(n, g.target.vector_bytes // 4)

    def block(index: Index) -> None:
        *prefix, k0, n0 = index
        rows = []
        for row in range(group):
            place = (*prefix, g.add(k0, row), n0)
            lanes = g.request(value, place, len(place) - 1, columns)
            rows.append(g.vector(lanes, value.element, columns))
        flat = rows
        if columns == 1:
            vector: ir.Value = ir.Constant(ir.VectorType(llvm_type(stored.element), group), ir.Undefined)
            for number, part in enumerate(rows):
                vector = g.b.insert_element(vector, part, ir.Constant(I32, number))
        else:
            while len(flat) > 1:
                flat = [_concatenated(g, x, y) for x, y in zip(flat[::2], flat[1::2])]
            order = [(i % group) * columns + i // group for i in range(group * columns)]
            mask = ir.Constant(ir.VectorType(I32, len(order)), order)
            vector = g.b.shuffle_vector(flat[0], ir.Constant(flat[0].type, ir.Undefined), mask)
        vector = _lifted(g, vector, biased)
        address = memory.stored_address(g, stored, (*prefix, k0, n0), len(index) - 1, 1)
        g.b.store(vector, address.value, align=stored.element.nbytes)  # type: ignore[union-attr]

    g.walk(value.shape, [*[1] * len(outer), group, columns], block, 1 + prod(value.shape) // (group * columns))


def _lifted(g: Generator, run: ir.Value, biased: bool) -> ir.Value:
    """Signed bytes + 128 as unsigned ones."""
    return g.b.xor(run, ir.Constant(run.type, [0x80] * run.type.count)) if biased else run


def _concatenated(g: Generator, a: ir.Value, b: ir.Value) -> ir.Value:
    count = a.type.count
    return g.b.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, 2 * count), list(range(2 * count))))


def transpose(g: Generator, rows: list[ir.Value], cells: int) -> list[ir.Value]:
    """R vectors of C cells to C vectors of R cells, by log2(R) perfect shuffles of the R × C cells."""
    count = len(rows)
    if cells == 1:
        vector: ir.Value = ir.Constant(ir.VectorType(rows[0].type, count), ir.Undefined)
        for number, row in enumerate(rows):
            vector = g.b.insert_element(vector, row, ir.Constant(I32, number))
        return [vector]
    if count == 1:
        return [_single(g, rows[0], i) for i in range(cells)]
    # all vectors get R lanes, so that halves of the flat array are whole vectors at every step
    flat = rows
    while flat[0].type.count < count and len(flat) > 1:
        flat = [_concatenated(g, a, b) for a, b in zip(flat[::2], flat[1::2])]
    lanes = flat[0].type.count
    steps = count.bit_length() - 1
    for _ in range(steps):
        half = len(flat) // 2
        if half == 0:
            order = [lanes // 2 * (i % 2) + i // 2 for i in range(lanes)]
            mask = ir.Constant(ir.VectorType(I32, lanes), order)
            flat = [g.b.shuffle_vector(flat[0], ir.Constant(flat[0].type, ir.Undefined), mask)]
            continue
        out = []
        for a, b in zip(flat[:half], flat[half:]):
            for start in (0, lanes // 2):
                order = [start + i // 2 + (lanes if i % 2 else 0) for i in range(lanes)]
                out.append(g.b.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, lanes), order)))
        flat = out
    if lanes == count:
        return flat
    out = []
    for vector in flat:  # more cells than rows: each vector holds several results
        for start in range(0, lanes, count):
            mask = ir.Constant(ir.VectorType(I32, count), list(range(start, start + count)))
            out.append(g.b.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask))
    return out


def _single(g: Generator, vector: ir.Value, lane: int) -> ir.Value:
    return g.b.extract_element(vector, ir.Constant(I32, lane))

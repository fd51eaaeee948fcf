"""`dot` on the CPU: a micro-kernel of rows × vectors of accumulators that stay in registers while k runs.

Lanes run along N. Each step of k loads the row of B once for all rows and broadcasts one element of A per row:
fp32 FMA; `vdpbf16ps` on pairs of bfloat16; `vpdpbusd` on groups of four bytes. The walk of the one user of the result
is cut into the same blocks, so scales, bias and activation are applied while the block is in registers.

Operands are read where they lie if that is cheap (rows of B contiguous, nothing to compute); otherwise they are
packed once, where they are defined: A row-major, B as [K/g][N][g] with g = 4 bytes per lane (see `Stored.group`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from llvmlite import ir

from nitinol.compiler import ir as tile_ir
from nitinol.compiler.cpu import math as vector_math
from nitinol.compiler.cpu import memory
from nitinol.compiler.cpu.lanes import I8, I32, Lanes, Uniform, llvm_type, mangle
from nitinol.compiler.cpu.reduction import byte_dot, byte_dot_instruction, call_byte_dot
from nitinol.compiler.ir import Op, Value, constant_of
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


def _compute_type(op: Op) -> DType:
    """What the plain micro-kernel multiplies and adds in."""
    element = op.result.element
    return element if element in (float64, int32) else float32  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------------- operands


def prepare_operand(g: Generator, op: Op, value: Value) -> None:
    """Packs a dot's operand, if it must be, right where the operand is defined."""
    for side in (0, 1):
        if op.operands[side] is value:
            _pack(g, op, side)


def prepare(g: Generator, op: Op) -> None:
    """Packs operands that were not defined by an operation (loop-carried tiles), and adds up rows of A."""
    for side in (0, 1):
        if op.operands[side].op is None or op.operands[side].op.kind in tile_ir.CONTROL:  # type: ignore[union-attr]
            g.packed.pop(_key(g, op, side), None)
            _pack(g, op, side)


def _key(g: Generator, op: Op, side: int) -> tuple[Value, str]:
    return op.operands[side], f"{side}/{mode(g, op)}/{_compute_type(op)}/{_needs_row_sums(g, op)}"


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
    key = _key(g, op, side)
    if key in g.packed:
        return
    value = op.operands[side]
    sums = side == 0 and _needs_row_sums(g, op)
    if _direct(g, op, side):
        if sums:
            g.packed[key] = Packed(None, _row_sums(g, value, None))
        return
    how = mode(g, op)
    element = value.element if how != "plain" else _compute_type(op)
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
            run = g.vector(_run_of(g, value, packed, (*index, start), 4 * lanes), int8, 4 * lanes)
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


def _run_of(g: Generator, value: Value, packed: Stored | None, index: Index, width: int) -> Lanes:
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
            address = memory._stored_address(g, stored, place, len(place) - 1, 1)
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
        address = memory._stored_address(g, stored, (*prefix, k0, n0), len(index) - 1, 1)
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


def operand_leaves(g: Generator, op: Op, operand: Value) -> set[Value]:
    """Stored tiles read while a dot runs: none of a packed operand's."""
    side = 0 if op.operands[0] is operand else 1
    return set() if _key(g, op, side) in g.packed else g._lazy_leaves(operand)


# ------------------------------------------------------------------------------------------------- the micro-kernel


def chain(g: Generator, values: Sequence[Value]) -> list[Op]:
    """The fused dots that computing these values on demand runs, and all that depends on them, in program order."""
    depends: dict[Value, bool] = {}
    found: list[Op] = []

    def visit(value: Value) -> bool:
        if value in depends:
            return depends[value]
        depends[value] = False
        op = value.op
        if op is None or value in g.tiles or not value.shape:
            return False
        if op.kind == "dot":
            visit(op.operands[2])
            found.append(op)
            depends[value] = True
        elif op.kind in tile_ir.ELEMENTWISE and any([visit(v) for v in op.operands]):
            found.append(op)
            depends[value] = True
        return depends[value]

    for value in values:
        visit(value)
    return sorted(set(found), key=lambda op: g.plan.order[op]) if any(op.kind == "dot" for op in found) else []


def block_shape(g: Generator, ops: list[Op], shape: tuple[int, ...], width: int) -> tuple[int, int]:
    """(rows, vectors) of accumulators: half the registers for one dot, a quarter where several are chained."""
    dots = [op for op in ops if op.kind == "dot"]
    budget = g.target.vector_registers // 2
    if len(dots) > 1 or len(ops) > len(dots):
        budget = g.target.vector_registers // 4
    rows_there = shape[-2]
    vectors_there = max(1, shape[-1] // width)
    vectors = min(vectors_there, 2 if rows_there >= 4 else max(2, budget // rows_there))
    rows = min(rows_there, max(1, budget // vectors))
    rows = 1 << (rows.bit_length() - 1)
    return rows, 1 << (vectors.bit_length() - 1)


def evaluate(g: Generator, ops: list[Op], parts: list[Index], rows: int, vectors: int, width: int) -> None:
    """Computes a register block of every operation of a chain; later requests find it in the memo."""
    axis = len(parts[0]) - 1
    for op in ops:
        if op.kind == "dot":
            for part, total in zip(parts, _micro_kernel(g, op, parts, rows, vectors, width)):
                g.memo[-1][(op.result, part, axis, width)] = g.wrap(total, width)
        else:
            for part in parts:
                g.request(op.result, part, axis, width)


def _micro_kernel(
    g: Generator, op: Op, parts: list[Index], rows: int, vectors: int, width: int
) -> list[ir.Value]:
    a, b, acc = op.operands
    how = mode(g, op)
    k = a.shape[-1]
    prefix = parts[0][:-2]
    row_index = [parts[r * vectors][-2] for r in range(rows)]
    column_index = [parts[v][-1] for v in range(vectors)]
    element = _compute_type(op)
    axis = len(parts[0]) - 1
    packed_a, packed_b = (g.packed.get(_key(g, op, side)) for side in (0, 1))

    totals: list[ir.Value] = []
    for part in parts:
        lanes = g.request(acc, part, axis, width)
        totals.append(g.vector(g.elementwise("cast", [lanes], [acc.element], element, {}, width), element, width))
    if packed_a is not None and packed_a.row_sums is not None:
        for r in range(rows):
            excess = memory.load_stored(g, packed_a.row_sums, (*prefix, row_index[r]), 0, 1)
            splat = g.vector(excess, int32, width)
            for v in range(vectors):
                there = totals[r * vectors + v]
                totals[r * vectors + v] = splat if constant_of(acc) == 0 else g.b.add(there, splat)
    group = {"bytes": 4, "bfloat16": 2, "plain": 1}[how]

    def a_element(row: Any, position: Any) -> ir.Value:
        """One element (or group) of A in all lanes."""
        stored = packed_a.stored if packed_a is not None else None
        lanes = _run_of(g, a, stored, (*prefix, row, position), group)
        if how == "plain":
            source = stored.element if stored is not None else a.element
            lanes = g.elementwise("cast", [lanes], [source], element, {}, 1)
            return g.vector(lanes, element, width)
        cell = g.b.bitcast(g.vector(lanes, a.element, group), I32)
        return g.vector(Uniform(cell), int32, width)

    def b_row(position: Any, column: Any) -> ir.Value:
        place = (*prefix, position, column)
        if how == "plain":
            if packed_b is not None and packed_b.stored is not None:
                lanes = memory.load_stored(g, packed_b.stored, place, axis, width)
                source = packed_b.stored.element
            else:
                lanes, source = g.request(b, place, axis, width), b.element
            return g.vector(g.elementwise("cast", [lanes], [source], element, {}, width), element, width)
        assert packed_b is not None and packed_b.stored is not None
        address = memory._stored_address(g, packed_b.stored, place, axis, 1)
        return g.b.load(address.value, align=4, typ=ir.VectorType(I32, width))  # type: ignore[union-attr]

    def step(position: Any, carried: list[ir.Value]) -> list[ir.Value]:
        columns = [b_row(position, c) for c in column_index]
        out = list(carried)
        for r in range(rows):
            value = a_element(row_index[r], position)
            for v in range(vectors):
                out[r * vectors + v] = _multiply_add(g, op, how, value, columns[v], out[r * vectors + v], element)
        return out

    unroll = k if k // group <= 16 else 4 * group

    def steps(position: Any, carried: list[ir.Value]) -> list[ir.Value]:
        for offset in range(0, unroll, group):
            carried = step(g.add(position, offset), carried)
        return carried

    totals = g.loop(k, unroll, steps, totals)
    out = []
    for total in totals:
        finished = g.elementwise("cast", [g.wrap(total, width)], [element], acc.element, {}, width)
        out.append(g.vector(finished, acc.element, width))
    return out


def _multiply_add(
    g: Generator, op: Op, how: str, a: ir.Value, b: ir.Value, total: ir.Value, element: DType
) -> ir.Value:
    if how == "bytes":
        width = total.type.count
        name = byte_dot_instruction(g, width)
        assert name is not None
        run = ir.VectorType(I8, 4 * width)
        first, second = g.b.bitcast(b, run), g.b.bitcast(a, run)
        if op.operands[0].element == uint8:  # the unsigned operand comes first
            first, second = second, first
        return call_byte_dot(g, name, total, first, second)
    if how == "bfloat16":
        return _bfloat16_dot(g, total, b, a)
    if element == int32:
        return g.b.add(total, g.b.mul(a, b))
    return vector_math.emit_math(g.b, "fma", [a, b, total])


class BFloat16Vector(ir.VectorType):
    """LLVM's vector of bfloat, which llvmlite's builder has no type for."""

    def __init__(self, count: int) -> None:
        super().__init__(ir.IntType(16), count)

    def _to_string(self) -> str:
        return f"<{self.count} x bfloat>"

    def __str__(self) -> str:
        return self._to_string()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat16Vector) and other.count == self.count

    def __hash__(self) -> int:
        return hash(("bfloat", self.count))


def _bfloat16_dot(g: Generator, total: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    pairs = BFloat16Vector(2 * total.type.count)
    args = [total, g.b.bitcast(a, pairs), g.b.bitcast(b, pairs)]
    return g.intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", total.type, args)

"""`dot` on the CPU: a micro-kernel of rows × vectors of accumulators that stay in registers while k runs.

Lanes run along N. Each step of k loads the row of B once for all rows and broadcasts one element of A per row:
fp32 FMA; `vdpbf16ps` on pairs of bfloat16; `vpdpbusd` on groups of four bytes. The walk of the one user of the result
is cut into the same blocks, so scales, bias and activation are applied while the block is in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llvmlite import ir

from nitinol.compiler import ir as tile_ir
from nitinol.compiler.cpu import math as vector_math
from nitinol.compiler.cpu import memory
from nitinol.compiler.cpu.arithmetic import I8, I32
from nitinol.compiler.cpu.lanes import Uniform
from nitinol.compiler.cpu.packing import compute_type, mode, packing_key, run_of
from nitinol.compiler.cpu.reduction import byte_dot_instruction, call_byte_dot
from nitinol.compiler.ir import Op, Value, constant_of
from nitinol.language.types import DType, int32, uint8

if TYPE_CHECKING:
    from nitinol.compiler.cpu.generator import Generator, Index


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
    element = compute_type(op)
    axis = len(parts[0]) - 1
    packed_a, packed_b = (g.packed.get(packing_key(g, op, side)) for side in (0, 1))

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
        lanes = run_of(g, a, stored, (*prefix, row, position), group)
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
        address = memory.stored_address(g, packed_b.stored, place, axis, 1)
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

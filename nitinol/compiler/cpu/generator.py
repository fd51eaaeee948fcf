"""Tile IR to LLVM IR: one native function that runs a range of a kernel's program instances.

    void kernel(const u64 *arguments, u8 *scratch, const i32 *grid, i64 first, i64 last)

Tiles are computed on demand (see `plan.py` for the exceptions): `request(value, index, axis, width)` emits code for
`width` neighbouring values of a tile along one axis and returns them as lanes. Stores, reductions and loop-carried
tiles walk their shape in register blocks and request what they need. Every request's position along its axis is a
multiple of its width, so a run of lanes never straddles a power-of-two boundary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from math import gcd, prod
from typing import Any

from llvmlite import ir

from nitinol.compiler import ir as tile_ir
from nitinol.compiler.cpu import control, dot, effects, memory, packing, prefetch, reduction, streaming, views
from nitinol.compiler.cpu.arithmetic import I8, I32, I64, POINTER, llvm_type
from nitinol.compiler.cpu.lanes import Affine, LaneBuilder, Lanes, Uniform, constant, multiple_of
from nitinol.compiler.cpu.plan import Plan
from nitinol.compiler.cpu.target import Target
from nitinol.compiler.ir import Block, Function, Op, Value
from nitinol.language.types import DType, PointerType

UNROLLED_VECTORS = 16  # walks over at most this many vectors are written out; small tiles then live in registers
Index = tuple[Any, ...]  # per axis a Python int or an LLVM i64


@dataclass(eq=False)
class Stored:
    """A tile in memory, row-major. With `group` g > 1, g neighbouring rows are interleaved: element (k, n) of a
    K × N tile lies at ((k // g) * N + n) * g + k % g, as integer and bfloat16 dot instructions want it."""

    pointer: ir.Value
    shape: tuple[int, ...]
    element: DType | PointerType
    group: int = 1


class Generator(LaneBuilder):
    def __init__(self, function: Function, plan: Plan, target: Target) -> None:
        super().__init__(ir.Module(name=function.name))
        self.module.triple = target.triple
        self.function, self.plan, self.target = function, plan, target
        self.scalars: dict[Value, Lanes] = {}
        self.tiles: dict[Value, Stored] = {}
        self.packed: dict[tuple[Value, str], packing.Packed] = {}
        self.memo: list[dict[Any, Lanes]] = [{}]
        self.scratch_top = 0
        self.scratch_bytes = 0
        self.asserts: list[str] = []

    # ------------------------------------------------------------------------------------------------- the function

    def build(self) -> ir.Module:
        kernel_type = ir.FunctionType(ir.VoidType(), [POINTER, POINTER, POINTER, I64, I64])
        self.native = ir.Function(self.module, kernel_type, "kernel")
        self.native.attributes.add("nounwind")
        self.native.args[1].attributes.add("noalias")
        entry = self.native.append_basic_block("entry")
        self.entry = entry
        self.b = ir.IRBuilder(entry)
        self.allocas = entry  # stack slots go to the front of the entry block
        arguments, self.scratch, grid, first, last = self.native.args
        for number, (parameter, known) in enumerate(zip(self.function.parameters, self.function.divisible)):
            slot = self.advance(arguments, number, I64)
            self.scalars[parameter] = Uniform(self.b.load(slot, typ=llvm_type(parameter.element)), known)
        self.status = self.b.load(self.advance(arguments, len(self.function.parameters), I64), typ=POINTER)
        self.grid = [self.b.load(self.advance(grid, axis, I32), typ=I32) for axis in range(3)]
        self.streamed = streaming.flags(self)
        body = self.b.append_basic_block("program")
        finish = self.b.append_basic_block("finish")
        self.b.cbranch(self.b.icmp_signed("<", first, last), body, finish)
        self.b.position_at_end(body)
        program = self.b.phi(I64, "program")
        program.add_incoming(first, entry)
        gx, gy = (self.b.zext(g, I64) for g in self.grid[:2])
        rest = self.b.udiv(program, gx)
        position = [self.b.urem(program, gx), self.b.urem(rest, gy), self.b.udiv(rest, gy)]
        self.program = [self.b.trunc(p, I32) for p in position]
        self.rows = prefetch.rows(self, self.function.body)
        self.block(self.function.body)
        following = self.b.add(program, ir.Constant(I64, 1))
        program.add_incoming(following, self.b.block)
        self.b.cbranch(self.b.icmp_signed("<", following, last), body, finish)
        self.b.position_at_end(finish)
        streaming.fence(self, self.streamed)
        self.b.ret_void()
        return self.module

    def block(self, block: Block) -> None:
        """All operations of a block except its terminator, in program order."""
        for op in block.ops:
            if op.kind not in tile_ir.TERMINATORS | tile_ir.EARLY_STARTS:
                self.visit(op)

    def visit(self, op: Op) -> None:
        kind = op.kind
        if kind in tile_ir.CONTROL:
            {"for": control.emit_for, "while": control.emit_while, "if": control.emit_if}[kind](self, op)
        elif kind == "store":
            self.emit_store(op)
        elif kind in ("atomic_rmw", "atomic_cas"):
            effects.emit_atomic(self, op)
        elif kind == "device_print":
            effects.emit_print(self, op)
        elif kind == "assert":
            effects.emit_assert(self, op)
        elif kind == "reduce" and (op.result in self.plan.stored or not op.result.shape):
            reduction.emit_reduce(self, op)
        elif kind == "scan":
            reduction.emit_scan(self, op)
        elif not op.results[0].shape:
            self.scalars[op.result] = self.scalar_op(op)
        else:
            if kind == "dot":
                packing.prepare(self, op)
            for result in op.results:
                if result in self.plan.stored:
                    self.tiles[result] = self.materialise(result)
        for result in op.results:
            for user in self.plan.uses.get(result, ()):
                if user.kind == "dot" and result.shape:
                    packing.prepare_operand(self, user, result)

    def scalar_op(self, op: Op) -> Lanes:
        kind = op.kind
        if kind == "constant":
            value = op.attributes["value"]
            element = op.result.element
            if isinstance(element, DType) and element.kind in ("int", "uint"):
                return constant(int(value))
            return Uniform(self.float_constant(value, element))
        if kind == "program_id":
            return Uniform(self.program[op.attributes["axis"]])
        if kind == "num_programs":
            return Uniform(self.grid[op.attributes["axis"]])
        if kind == "load":
            return memory.load(self, op, (), 0, 1)
        if kind in tile_ir.ELEMENTWISE:
            args = [self.scalars[v] for v in op.operands]
            return self.elementwise(kind, args, [v.element for v in op.operands], op.result.element, op.attributes, 1)
        if kind in ("reshape", "trans"):
            return self.request(op.operands[0], (0,) * len(op.operands[0].shape), 0, 1)
        raise NotImplementedError(f"{kind} giving a scalar")

    def float_constant(self, value: Any, element: DType | PointerType) -> ir.Constant:
        assert isinstance(element, DType)
        if element.name == "bf16":
            import struct

            bits = struct.unpack("<I", struct.pack("<f", float(value)))[0]
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return ir.Constant(ir.IntType(16), rounded if value == value else 0x7FC0)
        if element.kind == "bool":
            return ir.Constant(ir.IntType(1), bool(value))
        return ir.Constant(llvm_type(element), float(value))

    # ---------------------------------------------------------------------------------------------------- on demand

    def request(self, value: Value, index: Index, axis: int, width: int) -> Lanes:
        """Lanes index[axis] .. index[axis] + width of a tile. Past the end of the last axis, the run goes on in the
        next row (width may exceed the last extent, never another one)."""
        if not value.shape:
            return self.scalars[value]
        key = (value, index, axis, width)
        for scope in reversed(self.memo):
            if key in scope:
                return scope[key]
        lanes = self._request(value, index, axis, width)
        self.memo[-1][key] = lanes
        return lanes

    def _request(self, value: Value, index: Index, axis: int, width: int) -> Lanes:
        stored = self.tiles.get(value)
        if stored is not None:
            return memory.load_stored(self, stored, index, axis, width)
        op = value.op
        assert op is not None, f"{value} is not available on demand"
        kind = op.kind
        if kind == "splat":
            return self.scalars[op.operands[0]]
        if kind == "arange":
            return self._arange(op, index[0], width)
        if kind in tile_ir.ELEMENTWISE:
            args = [self.request(v, index, axis, width) for v in op.operands]
            types = [v.element for v in op.operands]
            return self.elementwise(kind, args, types, value.element, op.attributes, width)
        if kind == "load":
            return memory.load(self, op, index, axis, width)
        if kind == "reduce":
            return reduction.inline(self, op, index, axis, width)
        if kind == "gather":
            return memory.gather(self, op, index, axis, width)
        return views.request(self, op, value, index, axis, width)

    def _arange(self, op: Op, position: Any, width: int) -> Lanes:
        start = op.attributes["start"]
        stride = 1 if width > 1 else 0
        if isinstance(position, int):
            base: Any = start + position
            multiple, offset = multiple_of(base), 0
        else:
            base, offset = self.b.trunc(position, I32), start
            multiple = gcd(multiple_of(start), width)
        return Affine(base, stride, multiple, offset) if stride else Uniform(base, multiple, offset)

    # ------------------------------------------------------------------------------------------------ loops and walks

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Code emitted inside may not run, or runs often: what it computes is not known outside."""
        self.memo.append({})
        yield
        self.memo.pop()

    def loop(
        self,
        count: int,
        step: int,
        body: Callable[[Any, list[ir.Value]], list[ir.Value]],
        carried: Sequence[ir.Value] = (),
        start: int = 0,
    ) -> list[ir.Value]:
        """for i in range(start, count, step) with a constant, non-zero trip count and carried LLVM values."""
        if count - start <= step:
            return body(start, list(carried))
        before = self.b.block
        block = self.b.append_basic_block("loop")
        after = self.b.append_basic_block("done")
        self.b.branch(block)
        self.b.position_at_end(block)
        counter = self.b.phi(I64, "i")
        counter.add_incoming(ir.Constant(I64, start), before)
        phis = []
        for value in carried:
            phi = self.b.phi(value.type)
            phi.add_incoming(value, before)
            phis.append(phi)
        with self.scope():
            results = body(counter, list(phis))
        following = self.b.add(counter, ir.Constant(I64, step), flags=["nsw", "nuw"])
        counter.add_incoming(following, self.b.block)
        for phi, result in zip(phis, results):
            phi.add_incoming(result, self.b.block)
        self.b.cbranch(self.b.icmp_signed("<", following, ir.Constant(I64, count)), block, after)
        self.b.position_at_end(after)
        return results

    def walk(self, shape: tuple[int, ...], steps: Sequence[int], body: Callable[[Index], None], vectors: int) -> None:
        """Runs body at every multiple of `steps` in the shape: written out if `vectors` (all in all) is small."""
        if vectors <= UNROLLED_VECTORS:
            for index in product(*(range(0, n, s) for n, s in zip(shape, steps))):
                body(index)
            return

        def nest(index: Index) -> None:
            if len(index) == len(shape):
                body(index)
                return

            def inner(i: Any, _: list[ir.Value]) -> list[ir.Value]:
                nest((*index, i))
                return []

            self.loop(shape[len(index)], steps[len(index)], inner)

        nest(())

    def lane_width(self, values: Sequence[Value], extent: int) -> int:
        """Lanes per vector for a walk that computes these values."""
        widest = max((self._widest(v, set()) for v in values), default=4)
        return min(extent, max(1, self.target.vector_bytes // widest))

    def _widest(self, value: Value, seen: set[Value]) -> int:
        """Bytes of the widest data element on the way to a value; addresses and indices do not count."""
        if value in seen or isinstance(value.element, PointerType):
            return 1
        seen.add(value)
        own = value.element.nbytes
        op = value.op
        if op is None or value in self.tiles or not value.shape or op.kind in ("load", "dot", "for", "if", "while"):
            return own
        if op.kind in ("arange", "splat"):
            return 1 if value.element.is_int and own > 4 else own
        floats = [v for v in op.operands if v.shape]
        return max([own, *(self._widest(v, seen) for v in floats)])

    def element_walk(
        self, values: Sequence[Value], shape: tuple[int, ...], body: Callable[[Index, int, int], None]
    ) -> None:
        """Computes values of one shape block by block; body(index, axis, width) uses one vector of each."""
        chain = dot.chain(self, values)
        if chain:
            axis = len(shape) - 1
            width = min(shape[axis], self.target.vector_bytes // 4)
            rows, vectors = dot.block_shape(self, chain, shape, width)
        else:
            axis = self.plan.lane_axis(list(values))
            width = self.lane_width(values, shape[axis])
            rows, vectors = 1, min(4, shape[axis] // width)
        steps = [1] * len(shape)
        steps[axis] = width * vectors
        if rows > 1:
            steps[-2] = rows

        def block(index: Index) -> None:
            parts = []
            for row in range(rows):
                for vector in range(vectors):
                    moved = list(index)
                    moved[axis] = self.add(index[axis], vector * width)
                    if row:
                        moved[-2] = self.add(index[-2], row)
                    parts.append(tuple(moved))
            if chain:
                dot.evaluate(self, chain, parts, rows, vectors, width)
            for part in parts:
                body(part, axis, width)

        self.walk(shape, steps, block, prod(shape) // width)

    # -------------------------------------------------------------------------------------------------- tiles in memory

    def allocate(self, shape: tuple[int, ...], element: DType | PointerType, group: int = 1) -> Stored:
        """Room for a tile: small ones on the stack, where LLVM turns them into registers; others in scratch."""
        nbytes = prod(shape) * element.nbytes
        if nbytes <= UNROLLED_VECTORS * self.target.vector_bytes:
            builder = ir.IRBuilder(self.entry)
            builder.position_at_start(self.entry)
            pointer = builder.alloca(ir.ArrayType(I8, nbytes))
            pointer.align = 64
            pointer.type = POINTER  # llvmlite gives a typed pointer
        else:
            pointer = self.gep(self.scratch, ir.Constant(I64, self.scratch_top), I8)
            self.scratch_top += (nbytes + 63) // 64 * 64
            self.scratch_bytes = max(self.scratch_bytes, self.scratch_top)
        return Stored(pointer, shape, element, group)

    def materialise(self, value: Value, into: Stored | None = None) -> Stored:
        """Computes a tile into memory."""
        stored = into or self.allocate(value.shape, value.element)

        def body(index: Index, axis: int, width: int) -> None:
            lanes = self.request(value, index, axis, width)
            memory.store_stored(self, stored, index, axis, width, lanes)

        self.element_walk([value], value.shape, body)
        return stored

    def emit_store(self, op: Op) -> None:
        pointer, value = op.operands[:2]
        if not pointer.shape:
            memory.store(self, op, (), 0, 1)
            return

        def body(index: Index, axis: int, width: int) -> None:
            prefetch.next_row(self, op, index)
            memory.store(self, op, index, axis, width)

        self.element_walk([value], pointer.shape, body)

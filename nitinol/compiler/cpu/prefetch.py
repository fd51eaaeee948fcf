"""Software prefetch: while a program instance streams through memory, it fetches what the next ones will read.

A matrix-vector product walks a few rows at a time with hundreds of instructions per cache line of some formats: more
than the processor looks ahead, and with several fields per block the hardware's stream detectors give up as well (Q6_K
on a Zen 5 read 4.6 of 40 GB/s). The next instance's rows are what comes next in memory, so each iteration of a loop
asks for the lines at its own place in them: the addresses are those of the loads, computed for a later program_id.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

from llvmlite import ir

from nitinol.compiler import ir as tile_ir
from nitinol.compiler.cpu.arithmetic import I32
from nitinol.compiler.cpu.lanes import LaneBuilder, Lanes, Uniform
from nitinol.compiler.ir import Block, Op, Value

if TYPE_CHECKING:
    from nitinol.compiler.cpu.generator import Generator, Index

LINE = 64  # bytes in a cache line
# How many instances ahead. One row of a matrix-vector product (some 2 KB) takes half a microsecond of a memory that two
# threads share, four rows are well beyond its latency: Q8_0 reads 40 of 42 GB/s, with one row ahead 34.
AHEAD = 4
ROW, LARGEST_ROW = 2048, 65536  # bytes of a row worth fetching whole, and that leave room in a 1 MB cache
# Prefetches per iteration: beyond that the loop is not a stream. An iteration with a dot is far longer, and reads some
# bytes of each of 64 rows: more streams than the processor follows. Prefill of Q8_0 gained 20% by this, of Q4_0 8%.
MOST, MOST_FOR_DOT = 48, 128


def emit(g: Generator, body: Block) -> None:
    """Prefetches for the loads of a loop's body."""
    for op in body.ops:
        if op.kind == "load" and op.result.shape and _depends_on_program(op.operands[0], set()):
            for_dot = _feeds_dot(g, op.result, set())
            places = _lines(g, op.operands[0])
            if len(places) <= (MOST_FOR_DOT if for_dot else MOST):
                for index in places:
                    _prefetch(g, op.operands[0], index, 1 if for_dot else AHEAD)


def rows(g: Generator, body: Block) -> dict[Op, list[Value]]:
    """The same for a kernel's rows outside of loops: a program that goes over its row several times (a norm, a
    softmax) leaves the memory idle meanwhile, unless the next program's row is on its way. It is fetched by the store
    that goes over the row last, line by line (all at once, 8192 × 2048 take 15% longer): that store, with the pointers
    of the rows."""
    stores = [op for op in body.ops if op.kind == "store" and len(op.operands[0].shape) == 1]
    if not stores or not any(op.kind == "reduce" for op in body.ops):
        return {}

    def is_row(op: Op) -> bool:
        if op.kind != "load" or op.result.shape != stores[-1].operands[0].shape:
            return False
        pointer = op.operands[0]
        nbytes = op.result.shape[0] * op.result.element.nbytes
        contiguous = g.plan.strides.of(pointer) == (1,) and ROW <= nbytes <= LARGEST_ROW
        return contiguous and _depends_on_program(pointer, set()) and not _feeds_dot(g, op.result, set())

    return {stores[-1]: [op.operands[0] for op in body.ops if is_row(op)]}


def next_row(g: Generator, op: Op, index: Index) -> None:
    """Asks for the lines at this place of the rows that the next program reads."""
    for pointer in g.rows.get(op, ()):
        _prefetch(g, pointer, index, 1)


def _feeds_dot(g: Generator, value: Value, seen: set[Value]) -> bool:
    if value in seen:
        return False
    seen.add(value)
    for user in g.plan.uses.get(value, ()):
        if user.kind == "dot" and value in user.operands[:2]:
            return True
        if any(_feeds_dot(g, result, seen) for result in user.results if user.kind not in tile_ir.CONTROL):
            return True
    return False


def _lines(g: Generator, pointer: Value) -> list[tuple[int, ...]]:
    """Indices into a pointer tile, about one per cache line it covers; none if it is no stream of runs."""
    strides, shape = g.plan.strides.of(pointer), pointer.shape
    size = pointer.element.element.nbytes  # type: ignore[union-attr]
    if strides[-1] != 1 or shape[-1] * size < 16:
        return []
    steps = [1] * len(shape)
    steps[-1] = max(1, min(shape[-1], LINE // size))
    for axis in range(len(shape) - 1):  # neighbouring runs may share lines
        stride = strides[axis]
        if stride and 0 < stride * size < LINE:
            steps[axis] = max(1, min(shape[axis], LINE // (stride * size)))
    return list(product(*(range(0, n, s) for n, s in zip(shape, steps))))


def _depends_on_program(value: Value, seen: set[Value]) -> bool:
    if value in seen or value.op is None:
        return False
    seen.add(value)
    if value.op.kind == "program_id":
        return value.op.attributes["axis"] == 0
    return any(_depends_on_program(v, seen) for v in value.op.operands)


def _prefetch(g: Generator, pointer: Value, index: tuple[Any, ...], ahead: int) -> None:
    scalars, memo = g.scalars, g.memo
    g.scalars, g.memo = _LaterProgram(g, ahead), [{}]
    try:
        address = g.scalar(g.request(pointer, index, len(index) - 1, 1), pointer.element)
    except _Unknown:
        return
    finally:
        g.scalars, g.memo = scalars, memo
    arguments = [address, *(ir.Constant(I32, n) for n in (0, 3, 1))]  # read, keep in all caches, data
    g.intrinsic("llvm.prefetch.p0", ir.VoidType(), arguments)


class _Unknown(Exception):
    """The next instance's address cannot be told without reading memory."""


class _LaterProgram(dict[Value, Lanes]):
    """The scalars of the instance that comes `ahead` after this one, computed when they are asked for."""

    def __init__(self, g: Generator, ahead: int) -> None:
        super().__init__()
        self.g, self.known, self.ahead = g, g.scalars, ahead

    def __missing__(self, value: Value) -> Lanes:
        op = value.op
        if value in self.known and not _depends_on_program(value, set()):
            return self.known[value]
        if op is None:
            raise _Unknown
        self[value] = lanes = self._compute(op)
        return lanes

    def _compute(self, op: Op) -> Lanes:
        g: LaneBuilder = self.g
        if op.kind == "program_id":
            axis = op.attributes["axis"]
            return Uniform(g.b.add(self.g.program[axis], ir.Constant(I32, self.ahead if axis == 0 else 0)))
        if op.kind == "constant":
            return self.g.scalar_op(op)
        if op.kind == "num_programs":
            return self.g.scalar_op(op)
        if op.kind not in tile_ir.ELEMENTWISE:
            raise _Unknown
        args = [self[v] for v in op.operands]
        return g.elementwise(op.kind, args, [v.element for v in op.operands], op.result.element, op.attributes, 1)

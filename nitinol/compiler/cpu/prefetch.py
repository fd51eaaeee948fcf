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
    from nitinol.compiler.cpu.generator import Generator

LINE = 64  # bytes in a cache line
# How many instances ahead. One row of a matrix-vector product (some 2 KB) takes half a microsecond of a memory that two
# threads share, four rows are well beyond its latency: Q8_0 reads 40 of 42 GB/s, with one row ahead 34.
AHEAD = 4
ROW, LARGEST_ROW = 2048, 65536  # bytes of a row worth fetching whole, and that leave room in a 1 MB cache
MOST = 48  # prefetches per iteration: beyond that the loop is not a stream


def emit(g: Generator, body: Block) -> None:
    """Prefetches for the loads of a loop's body that only feed arithmetic (a dot reuses what it reads)."""
    for op in body.ops:
        if op.kind == "load" and op.result.shape and not _feeds_dot(g, op.result, set()):
            places = _lines(g, op.operands[0])
            if places and _depends_on_program(op.operands[0], set()):
                for index in places:
                    _prefetch(g, op.operands[0], index, AHEAD)


def emit_rows(g: Generator, body: Block) -> None:
    """The same for a kernel's rows outside of loops: a program that goes over its row several times (a norm, a
    softmax) leaves the memory idle meanwhile, unless the next program's row is on its way."""
    several = any(op.kind == "reduce" for op in body.ops)
    for op in body.ops:
        if not several or op.kind != "load" or len(op.result.shape) != 1 or _feeds_dot(g, op.result, set()):
            continue
        pointer = op.operands[0]
        size = pointer.element.element.nbytes  # type: ignore[union-attr]
        extent, step = op.result.shape[0], LINE // size
        if g.plan.strides.of(pointer) != (1,) or not ROW <= extent * size <= LARGEST_ROW:
            continue
        if _depends_on_program(pointer, set()):

            def line(i: Any, _: list[ir.Value], pointer: Value = pointer) -> list[ir.Value]:
                _prefetch(g, pointer, (i,), 1)
                return []

            g.loop(extent, step, line)


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
    places = list(product(*(range(0, n, s) for n, s in zip(shape, steps))))
    return places if len(places) <= MOST else []


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

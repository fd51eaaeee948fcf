"""Reductions and scans of the CPU target.

A reduction whose lanes run along the reduced axis keeps up to four vector accumulators and folds the last vector by
halves; one whose lanes run along another axis keeps a vector of independent results and steps through the reduced
axis. Which of the two: whichever reads memory in order. The order of combination depends on the kernel alone, so
results never depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from llvmlite import ir

from nitinol.compiler import ir as tile_ir
from nitinol.compiler.cpu import memory
from nitinol.compiler.cpu.arithmetic import I32
from nitinol.compiler.cpu.lanes import Lanes, Uniform, Vector
from nitinol.compiler.cpu.plan import dot4_operands
from nitinol.compiler.ir import Op, Value
from nitinol.language.types import uint8

if TYPE_CHECKING:
    from nitinol.compiler.cpu.generator import Generator, Index

ACCUMULATORS = 4


def combine(g: Generator, op: Op, left: Sequence[Lanes], right: Sequence[Lanes], width: int) -> list[Lanes]:
    """The region of a reduce or scan applied to lanes."""
    region = op.regions[0]
    known: dict[Value, Lanes] = dict(zip(region.arguments, [*left, *right]))

    def lookup(value: Value) -> Lanes:
        return known[value] if value in known else g.scalars[value]

    for inner in region.ops[:-1]:
        if inner.kind == "constant":
            known[inner.result] = g.scalar_op(inner)
        elif inner.kind in tile_ir.ELEMENTWISE:
            args = [lookup(v) for v in inner.operands]
            types = [v.element for v in inner.operands]
            result = inner.result.element
            known[inner.result] = g.elementwise(inner.kind, args, types, result, inner.attributes, width)
        else:
            raise NotImplementedError(
                f"{op.location}: a combine function may hold arithmetic only, found {inner.kind}; "
                "use tl.where in place of if"
            )
    return [lookup(v) for v in region.terminator.operands]


def inline(g: Generator, op: Op, index: Index, axis: int, width: int) -> Lanes:
    """A short reduction inside its user's walk: the plan has made sure that it is not along the lanes."""
    pair = dot4_operands(op)
    if pair is not None and (width == 1 or axis == len(index) - 1):
        return _dot4(g, pair, index, width)
    along = op.attributes["axis"]
    source = op.operands[0]
    runs_over = width > 1 and width > op.result.shape[axis]
    if runs_over:
        from nitinol.compiler.cpu.views import pieces

        return pieces(g, op.result, index, width)
    operand_axis = axis + 1 if axis >= along else axis
    total: list[Lanes] | None = None
    for position in range(source.shape[along]):
        place = (*index[:along], position, *index[along:])
        lanes = [g.request(source, place, operand_axis, width)]
        total = lanes if total is None else combine(g, op, total, lanes, width)
    assert total is not None
    return total[0]


def _dot4(g: Generator, pair: tuple[Value, Value], index: Index, width: int) -> Lanes:
    """Sums of four neighbouring byte products: one instruction per vector where the CPU has it."""
    last = len(pair[0].shape) - 1
    place = (*index, 0)
    runs = [g.vector(g.request(v, place, last, 4 * width), v.element, 4 * width) for v in pair]
    unsigned = [v.element == uint8 for v in pair]
    zero = ir.Constant(ir.VectorType(I32, width), [0] * width)
    return g.wrap(_first_if_scalar(g, byte_dot(g, zero, runs, unsigned), width), width)


def _first_if_scalar(g: Generator, value: ir.Value, width: int) -> ir.Value:
    return g.b.extract_element(value, ir.Constant(I32, 0)) if width == 1 else value


def byte_dot(g: Generator, total: ir.Value, runs: list[ir.Value], unsigned: list[bool]) -> ir.Value:
    """total[i] + the dot product of bytes 4i .. 4i + 3 of both runs."""
    width = total.type.count
    name = byte_dot_instruction(g, width)
    if name is not None and unsigned != [True, True]:
        if unsigned == [False, False]:  # (a + 128) * b - 128 * b, with a + 128 unsigned
            bias = ir.Constant(runs[0].type, [0x80] * (4 * width))
            lifted = g.b.xor(runs[0], bias)
            excess = call_byte_dot(g, name, ir.Constant(total.type, [0] * width), bias, runs[1])
            return call_byte_dot(g, name, g.b.sub(total, excess), lifted, runs[1])
        first, second = runs if unsigned[0] else reversed(runs)
        return call_byte_dot(g, name, total, first, second)
    wide = ir.VectorType(I32, 4 * width)
    products = g.b.mul(*(g.b.zext(r, wide) if u else g.b.sext(r, wide) for r, u in zip(runs, unsigned)))
    for part in range(4):
        order = ir.Constant(ir.VectorType(I32, width), [4 * i + part for i in range(width)])
        total = g.b.add(total, g.b.shuffle_vector(products, ir.Constant(wide, ir.Undefined), order))
    return total


def byte_dot_instruction(g: Generator, width: int) -> str | None:
    """The x86 intrinsic for unsigned × signed byte dots of `width` 32-bit lanes, if this CPU has it."""
    has = g.target.has
    if width == 16 and has("avx512vnni"):
        return "llvm.x86.avx512.vpdpbusd.512"
    if width in (4, 8) and (has("avx512vnni", "avx512vl") or has("avxvnni")):
        return f"llvm.x86.avx512.vpdpbusd.{32 * width}"
    return None


def call_byte_dot(g: Generator, name: str, total: ir.Value, first: ir.Value, second: ir.Value) -> ir.Value:
    from llvmlite.binding import llvm_version_info

    if llvm_version_info[0] < 22:  # before LLVM 22 the bytes were passed as 32-bit lanes
        first, second = (g.b.bitcast(v, total.type) for v in (first, second))
    return g.intrinsic(name, total.type, [total, first, second])


# ------------------------------------------------------------------------------------------- reductions as walks


def emit_reduce(g: Generator, op: Op) -> None:
    along = op.attributes["axis"]
    shape = op.operands[0].shape
    outer = shape[:along] + shape[along + 1 :]
    results = [g.allocate(outer, r.element) if outer else None for r in op.results]
    axis = g.plan.lane_axis(list(op.operands))
    width = g.lane_width(op.operands, shape[axis])
    elements = [v.element for v in op.operands]

    def keep(index: Index, out_axis: int, lanes: list[Lanes], lane_count: int) -> None:
        for result, place, value in zip(op.results, results, lanes):
            if place is None:
                g.scalars[result] = Uniform(g.scalar(value, result.element))
            else:
                memory.store_stored(g, place, index, out_axis, lane_count, value)

    def request(index: Index, position: Any) -> list[Lanes]:
        place = (*index[:along], position, *index[along:])
        return [g.request(v, place, axis, width) for v in op.operands]

    if axis == along:

        def row(index: Index) -> None:
            total = _accumulate(g, op, lambda i: request(index, i), shape[along], width, width)
            keep(index, 0, _fold(g, op, total, elements, width), 1)

        if outer:
            g.walk(outer, [1] * len(outer), row, prod(shape) // width)
        else:
            row(())
    else:
        out_axis = axis if axis < along else axis - 1
        steps = [1] * len(outer)
        steps[out_axis] = width

        def column(index: Index) -> None:
            total = _accumulate(g, op, lambda i: request(index, i), shape[along], 1, width)
            keep(index, out_axis, total, width)

        g.walk(outer, steps, column, prod(shape) // width)
    for result, place in zip(op.results, results):
        if place is not None:
            g.tiles[result] = place


def _accumulate(
    g: Generator, op: Op, request: Callable[[Any], list[Lanes]], extent: int, step: int, width: int
) -> list[Lanes]:
    """Combines the lanes at 0, step, 2 step, .. below extent, in up to four independent chains."""
    chains = min(ACCUMULATORS, extent // step)
    elements = [v.element for v in op.operands]
    starts = [request(k * step) for k in range(chains)]
    flat = [g.vector(x, e, width) for start in starts for x, e in zip(start, elements)]
    count = len(elements)

    def body(i: Any, carried: list[ir.Value]) -> list[ir.Value]:
        out = []
        for chain in range(chains):
            old = [g.wrap(v, width) for v in carried[chain * count : (chain + 1) * count]]
            new = combine(g, op, old, request(g.add(i, chain * step)), width)
            out += [g.vector(x, e, width) for x, e in zip(new, elements)]
        return out

    if extent > chains * step:
        rounds = extent // (chains * step)
        if rounds <= 4:  # short: written out
            for number in range(1, rounds):
                flat = body(number * chains * step, flat)
        else:
            flat = g.loop(extent, chains * step, body, flat, start=chains * step)
    totals = [[g.wrap(v, width) for v in flat[k * count : (k + 1) * count]] for k in range(chains)]
    while len(totals) > 1:
        totals = [combine(g, op, a, b, width) for a, b in zip(totals[::2], totals[1::2])]
    return totals[0]


def _fold(
    g: Generator, op: Op, total: list[Lanes], elements: Sequence[Any], width: int
) -> list[Lanes]:
    """All lanes of a vector combined: by halves."""
    vectors = [g.vector(x, e, width) for x, e in zip(total, elements)]
    while width > 1:
        half = width // 2
        low = ir.Constant(ir.VectorType(I32, half), list(range(half)))
        high = ir.Constant(ir.VectorType(I32, half), list(range(half, width)))
        if half == 1:
            parts: list[list[Lanes]] = []
            for i in (0, 1):
                parts.append([Uniform(g.b.extract_element(v, ir.Constant(I32, i))) for v in vectors])
        else:
            undefined = [ir.Constant(v.type, ir.Undefined) for v in vectors]
            parts = [[Vector(g.b.shuffle_vector(v, u, m)) for v, u in zip(vectors, undefined)] for m in (low, high)]
        merged = combine(g, op, parts[0], parts[1], half)
        vectors = [g.vector(x, e, half) for x, e in zip(merged, elements)]
        width = half
    return [Uniform(v) for v in vectors]


# ----------------------------------------------------------------------------------------------------------- scans


def emit_scan(g: Generator, op: Op) -> None:
    """Running combination along an axis: step by step, with lanes along another axis where there is one."""
    along, reverse = op.attributes["axis"], bool(op.attributes.get("reverse"))
    shape = op.operands[0].shape
    places = [g.allocate(shape, r.element) for r in op.results]
    others = [i for i in range(len(shape)) if i != along and shape[i] > 1]
    axis = others[-1] if others else along
    width = g.lane_width(op.operands, shape[axis]) if others else 1
    outer = tuple(1 if i == along else n for i, n in enumerate(shape))
    steps = [1] * len(shape)
    if others:
        steps[axis] = width
    elements = [v.element for v in op.operands]
    extent = shape[along]

    def at(index: Index, position: Any) -> Index:
        return (*index[:along], position, *index[along + 1 :])

    def run(index: Index) -> None:
        def step(position: Any, carried: list[ir.Value] | None) -> list[ir.Value]:
            place = at(index, position)
            lanes: list[Lanes] = [g.request(v, place, axis, width) for v in op.operands]
            if carried is not None:
                lanes = combine(g, op, [g.wrap(v, width) for v in carried], lanes, width)
            for stored, value in zip(places, lanes):
                memory.store_stored(g, stored, place, axis, width, value)
            return [g.vector(x, e, width) for x, e in zip(lanes, elements)]

        first = step(extent - 1 if reverse else 0, None)
        if extent > 1:

            def body(i: Any, carried: list[ir.Value]) -> list[ir.Value]:
                position = i
                if reverse:
                    position = extent - 1 - i if isinstance(i, int) else g.add(g.mul(i, -1), extent - 1)
                return step(position, carried)

            g.loop(extent, 1, body, first, start=1)

    g.walk(outer, steps, run, prod(shape) // width)
    for result, stored in zip(op.results, places):
        g.tiles[result] = stored



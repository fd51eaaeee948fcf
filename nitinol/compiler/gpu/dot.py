"""Matrix products: through the dialect's matrix instructions, or element by element from threadgroup memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

from nitinol.compiler.gpu import convert, outer
from nitinol.compiler.gpu.forms import Form, Index, Stepped, fixed, variable
from nitinol.compiler.gpu.layout import Layout, Map, axis_bits, bits_of
from nitinol.compiler.gpu.threads import place_of
from nitinol.compiler.gpu.tree import Access, Each, Statement
from nitinol.compiler.ir import Op, constant_of
from nitinol.language.types import DType

if TYPE_CHECKING:
    from nitinol.compiler.gpu.emit import Emitter


@dataclass(frozen=True)
class Fragment:
    """How one matrix of an instruction lies in a simdgroup: the bit of the row (0) or column (1) number that each bit
    of the register and of the lane number is."""

    registers: tuple[tuple[int, int], ...]
    lanes: tuple[tuple[int, int], ...]

    def bits(self, axis: int) -> int:
        """How many bits of the row or column number are inside a matrix."""
        return sum(1 for own, _ in self.registers + self.lanes if own == axis)


@dataclass(frozen=True)
class Instruction:
    """A matrix instruction c += a b of a dialect, by the fragments of its operands."""

    a: Fragment
    b: Fragment
    c: Fragment


def fragments(
    op: Op, warp_bits: int, dialect: ModuleType, by_rows: bool = False
) -> tuple[Layout, Layout, Layout] | None:
    """Layouts of a, b and the accumulator in matrix instructions; None if the dialect has none for these tiles.

    `by_rows`: warps have rows of their own as long as there are enough."""
    instruction = dialect.matrix_instruction(op)
    if instruction is None:
        return None
    a, b, acc = (v.shape for v in op.operands)
    m, n = (axis_bits(acc)[axis] for axis in (-2, -1))
    rows, columns = m[instruction.c.bits(0) :], n[instruction.c.bits(1) :]  # bits that number the matrices
    warps: list[tuple[str, int]] = []  # which matrices are whose: an upper bit of m or n for each warp bit
    if op.attributes.get("warpgroups"):  # four warps have 16 rows each of 64
        warps, by_rows = [("m", 4), ("m", 5)], True
        rows = rows[2:]
    while len(warps) < warp_bits and (rows or columns):
        by_m = len(rows) >= len(columns) or (by_rows and bool(rows))
        axis, bits, every = ("m", rows, m) if by_m else ("n", columns, n)
        warps.append((axis, every.index(bits.pop())))
    return (
        _layout(a, "mk", instruction.a, warps, warp_bits),
        _layout(b, "kn", instruction.b, warps, warp_bits),
        _layout(acc, "mn", instruction.c, warps, warp_bits),
    )


def _layout(
    shape: tuple[int, ...], axes: str, fragment: Fragment, warps: list[tuple[str, int]], warp_bits: int
) -> Layout:
    """An operand's tile: inside a matrix as the fragment says, then columns, rows and batches of matrices."""
    places = [axis_bits(shape)[-2], axis_bits(shape)[-1]]
    own = [1 << places[axes.index(axis)][number] if axis in axes else 0 for axis, number in warps]
    outer = [*places[1][fragment.bits(1) :], *places[0][fragment.bits(0) :]]
    batches = range(len(places[0]) + len(places[1]), bits_of(shape))
    rest = [1 << bit for bit in (*outer, *batches) if 1 << bit not in own]
    return Layout(
        bits_of(shape),
        (*(1 << places[axis][bit] for axis, bit in fragment.registers), *rest),
        tuple(1 << places[axis][bit] for axis, bit in fragment.lanes),
        (*own, *(0,) * (warp_bits - len(own))),
    )


def dot(e: Emitter, op: Op) -> None:
    layouts = e.assignment.fragments[op]
    if layouts is None:
        return outer.outer_products(e, op) if op.attributes.get("outer") else by_elements(e, op)
    instruction: Instruction = e.dialect.matrix_instruction(op)
    parts = (instruction.a, instruction.b, instruction.c)
    name = op.result.name or "product"
    names = [e.name(f"{name}_{part}") for part in "abc"]
    for value, matrix, layout, fragment in zip(op.operands, names, layouts, parts):
        assert isinstance(value.element, DType)
        width = len(fragment.registers)
        zero = matrix == names[2] and constant_of(value) == 0
        e.say(e.dialect.matrix_declare(value.element, matrix, layout.count >> width, 1 << width))
        fill(e, layout, width, setter(e, matrix, e.form(value, layout), width, value.element, zero))
    e.say(*product(e, op, layouts, parts, names))
    acc, width = layouts[2], len(instruction.c.registers)
    result = e.declare(e.name(op.result.name or "product"), op.result.element, acc.count)

    def out(i: Index) -> list[str]:
        cell = f"{names[2]}[{_matrix(i, width)}]"
        return [f"{result.text(i.at(n))} = {e.dialect.matrix_get(cell, n)};" for n in range(1 << width)]

    fill(e, acc, width, out)
    e.forms[op.result, acc] = variable(result.variable, acc.count)


def setter(e: Emitter, matrix: str, form: Form, width: int, element: DType, zero: bool) -> Callable[[Index], list[str]]:
    """Lines that put a thread's registers into a matrix."""

    def lines(i: Index) -> list[str]:
        values = [e.dialect.zero(element) if zero else form.text(i.at(n)) for n in range(1 << width)]
        return e.dialect.matrix_set(f"{matrix}[{_matrix(i, width)}]", values, element)

    return lines


def _matrix(i: Index, width: int) -> str:
    """The number of the matrix that a register belongs to."""
    return f"r >> {width}" if i.columns else "0"


def fill(e: Emitter, layout: Layout, width: int, lines: Callable[[Index], list[str]]) -> None:
    """Lines for each matrix: registers in steps of those of one matrix."""
    if layout.count == 1 << width:
        e.say(*lines(fixed(0)))
        return
    index = Stepped(tuple(0 if bit < width else 1 << bit for bit in range(len(layout.registers))))
    e.nodes.append(Each(layout.count, 1 << width, [Statement(lines(index), e.line)]))


def product(
    e: Emitter, op: Op, layouts: tuple[Layout, Layout, Layout], parts: tuple[Fragment, ...], names: list[str]
) -> list[str]:
    """Loops over the matrices: one instruction for each of the accumulator's and each step along k."""

    def counted(which: int, axis: int) -> int:
        """Bits that number an operand's matrices along an axis, within a warp."""
        layout, fragment = layouts[which], parts[which]
        along = {1 << bit for bit in axis_bits(op.operands[which].shape)[axis - 2]}
        return sum(1 for column in layout.registers[len(fragment.registers) :] if column in along)

    bits = {"m": counted(2, 0), "n": counted(2, 1), "k": counted(0, 1)}
    bits["i"] = len(layouts[2].registers) - len(parts[2].registers) - bits["m"] - bits["n"]

    def cell(name: str, axes: str) -> str:
        shift, terms = 0, []
        for axis in axes:
            if bits[axis]:
                terms.append(f"{axis} << {shift}" if shift else axis)
            shift += bits[axis]
        return f"{name}[{' | '.join(reversed(terms)) or '0'}]"

    lines, pad = [], ""
    for axis in "ikmn":
        if bits[axis]:
            lines += [pad + e.dialect.UNROLL, f"{pad}for (int {axis} = 0; {axis} < {1 << bits[axis]}; {axis}++)"]
            pad += "    "
    a, b, c = cell(names[0], "kmi"), cell(names[1], "nki"), cell(names[2], "nmi")
    elements, instruction = [v.element for v in op.operands[:2]], e.dialect.matrix_instruction(op)
    return [*lines, pad + e.dialect.matrix_product(c, a, b, elements, instruction)]


def by_elements(e: Emitter, op: Op) -> None:
    """Both operands go to threadgroup memory; each thread sums for its own elements of the result."""
    a, b, acc = op.operands
    layout = e.assignment.home[op.result]
    assert layout is not None
    shared = []
    for value in (a, b):
        theirs = e.assignment.first([value])
        name, piece = e.scratch(value.element, 1 << theirs.bits)
        convert.write_tile(e, e.form(value, theirs), theirs, value, name, Access("write", piece))
        shared.append((name, piece))
    m, n, k = (len(axis_bits(v.shape)[axis]) for v, axis in ((acc, -2), (acc, -1), (a, -1)))
    batch = range(m + n, layout.bits)
    # the places of a[.., m, 0] and b[.., 0, n] for the place of acc[.., m, n]
    left: Map = (*(0,) * n, *(1 << (bit + k) for bit in range(m)), *(1 << (bit - n + k) for bit in batch))
    right: Map = (*(1 << bit for bit in range(n)), *(0,) * m, *(1 << (bit - m + k) for bit in batch))
    element = op.result.element
    assert isinstance(element, DType)
    kind = e.type(element)
    form = e.store_in(e.name(op.result.name or "product"), element, layout.count, e.form(acc, layout))

    def lines(i: Index) -> list[str]:
        x = f"{kind}({shared[0][0]}[({place_of(layout, i, left)}) + k])"
        y = f"{kind}({shared[1][0]}[({place_of(layout, i, right)}) + (k << {n})])"
        total = form.text(i)
        value = f"fma({x}, {y}, {total})" if element.is_float else f"{total} + {x} * {y}"
        return [f"for (int k = 0; k < {1 << k}; k++) {total} = {value};"]

    reads = [Access("read", piece) for _, piece in shared]
    e.each(layout.count, lines, [form], reads, defines=[form.variable])
    e.forms[op.result, layout] = form

"""Matrix products: through the dialect's matrix instructions, or element by element from threadgroup memory."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from nitinol.compiler.gpu import convert
from nitinol.compiler.gpu.forms import Index, fixed
from nitinol.compiler.gpu.layout import Layout, axis_bits, bits_of
from nitinol.compiler.gpu.tree import Access
from nitinol.compiler.ir import Op, constant_of
from nitinol.language.types import DType

if TYPE_CHECKING:
    from nitinol.compiler.gpu.emit import Emitter


def fragments(op: Op, warp_bits: int, dialect: ModuleType) -> tuple[Layout, Layout, Layout] | None:
    """Layouts of a, b and the accumulator in matrix instructions; None if the dialect has none for these types."""
    if not dialect.matrix_supported(op):
        return None
    a, b, acc = op.operands
    side = dialect.MATRIX_SIDE_BITS
    m, n = (axis_bits(acc.shape)[axis] for axis in (-2, -1))
    rows, columns = m[side:], n[side:]  # bits that number the matrices
    warps: list[tuple[str, int]] = []
    while len(warps) < warp_bits and (rows or columns):
        kind, bits, all_bits = ("row", rows, m) if len(rows) >= len(columns) else ("column", columns, n)
        warps.append((kind, all_bits.index(bits.pop())))
    batch = range(len(m) + len(n), bits_of(acc.shape))
    batches = len(batch)

    def layout(shape: tuple[int, ...], row: str, column: str) -> Layout:
        """`row` and `column` say which of the accumulator's axes ("row", "column") the tile's are, "" for k."""
        first, second = (axis_bits(shape)[axis] for axis in (-2, -1))
        inner = {"row": first, "column": second}
        outer = {row: first, column: second}

        def cell(item: tuple[str, int]) -> int:
            return 1 << inner[item[0]][item[1]]

        taken = {1 << outer[kind][number] for kind, number in warps if kind in outer}
        rest = [1 << bit for bit in (*second[side:], *first[side:]) if 1 << bit not in taken]
        top = bits_of(shape) - batches
        registers = [cell(dialect.MATRIX_REGISTER), *rest, *(1 << (top + i) for i in range(batches))]
        own = [1 << outer[kind][number] if kind in outer else 0 for kind, number in warps]
        own += [0] * (warp_bits - len(own))
        return Layout(bits_of(shape), tuple(registers), tuple(map(cell, dialect.MATRIX_LANES)), tuple(own))

    return layout(a.shape, "row", ""), layout(b.shape, "", "column"), layout(acc.shape, "row", "column")


def dot(e: Emitter, op: Op) -> None:
    layouts = e.assignment.fragments[op]
    if layouts is None:
        return by_elements(e, op)
    a, b, acc = layouts
    forms = [e.form(v, layout) for v, layout in zip(op.operands, layouts)]
    elements = [v.element for v in op.operands]
    name = op.result.name or "product"
    names = [e.name(f"{name}_{part}") for part in ("a", "b", "c")]
    counts = [layout.count // 2 for layout in layouts]
    pair = Index((2,) * 0)
    del pair
    for element, matrix, count, form, layout in zip(elements, names, counts, forms, layouts):
        assert isinstance(element, DType)
        e.say(e.dialect.matrix_declare(element, matrix, count))
        zero = matrix == names[2] and constant_of(op.operands[2]) == 0

        def lines(i: Index, matrix=matrix, form=form, zero=zero, element=element) -> list[str]:
            values = [e.type(element) + "(0)"] * 2 if zero else [form.text(i), form.text(i.at(1))]
            return e.dialect.matrix_set(matrix, half(i), (values[0], values[1]))

        pairs(e, layout.count, lines)
    tiles(e, op, layouts, names)
    result = e.name(op.result.name or "product")
    count = acc.count
    e.say(f"{e.type(op.result.element)} {result}[{count}];")

    def out(i: Index) -> list[str]:
        return [f"{result}[{i.at(n)}] = {e.dialect.matrix_get(names[2], half(i), n)};" for n in (0, 1)]

    pairs(e, count, out)
    from nitinol.compiler.gpu.forms import variable

    e.forms[op.result, acc] = variable(result, count)


def half(i: Index) -> str:
    """The number of the matrix that a pair of registers belongs to."""
    return "0" if not i.columns else "r >> 1"


def pairs(e: Emitter, count: int, lines) -> None:
    """Lines for each matrix, in a loop over every second register."""
    from nitinol.compiler.gpu.memory import Stepped
    from nitinol.compiler.gpu.tree import Each, Statement

    if count == 2:
        e.say(*lines(fixed(0)))
        return
    index = Stepped(tuple(0 if bit == 0 else 1 << bit for bit in range(count.bit_length() - 1)))
    e.nodes.append(Each(count, 2, [Statement(lines(index), e.line)]))


def tiles(e: Emitter, op: Op, layouts: tuple[Layout, Layout, Layout], names: list[str]) -> None:
    """One product for each matrix of the accumulator and each step along k."""
    a, b, acc = layouts
    k = axis_bits(op.operands[0].shape)[-1][3:]
    m, n = (len([c for c in layout.registers[1:] if c in {1 << bit for bit in axis_bits(v.shape)[axis]}])
            for layout, v, axis in ((acc, op.operands[2], -2), (acc, op.operands[2], -1)))  # fmt: skip
    batch = 1 << (len(acc.registers) - 1 - m - n)
    for_batch = f"for (int i = 0; i < {batch}; i++) " if batch > 1 else ""
    where = {True: "i", False: "0"}[batch > 1]
    ks = len(k)

    def number(*parts: tuple[str, int]) -> str:
        """Numbers of bits side by side, the first lowest."""
        shift, out = 0, []
        for name, bits in parts:
            if bits:
                out.append(f"{name} << {shift}" if shift else name)
            shift += bits
        return " | ".join(reversed(out)) or "0"

    bits = batch.bit_length() - 1
    product = e.dialect.matrix_product(
        f"{names[2]}[{number(('n', n), ('m', m), (where, bits))}]",
        f"{names[0]}[{number(('k', ks), ('m', m), (where, bits))}]",
        f"{names[1]}[{number(('n', n), ('k', ks), (where, bits))}]",
    )
    loops = [("k", ks), ("m", m), ("n", n)]
    lines, pad = [], ""
    if for_batch:
        lines.append(for_batch.rstrip())
        pad = "    "
    for name, count in loops:
        if count:
            lines.append(f"{pad}for (int {name} = 0; {name} < {1 << count}; {name}++)")
            pad += "    "
    e.say(*lines, pad + product)


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
    k = a.shape[-1]
    n_bits, k_bits = (len(axis_bits(b.shape)[-1]), len(axis_bits(a.shape)[-1]))
    m_bits = len(axis_bits(a.shape)[-2])
    rest = range(m_bits + n_bits, layout.bits)
    # places of a[.., m, 0] and b[.., 0, n] for the place of acc[.., m, n]
    left = [0] * n_bits + [1 << (bit + k_bits) for bit in range(m_bits)]
    left += [1 << (bit - n_bits + k_bits) for bit in rest]
    right = [1 << bit for bit in range(n_bits)] + [0] * m_bits + [1 << (bit - m_bits + k_bits) for bit in rest]
    kind = e.type(op.result.element)
    name = e.name(op.result.name or "product")
    form = e.store_in(name, op.result.element, layout.count, e.form(acc, layout))

    def lines(i: Index) -> list[str]:
        first, second = e.place(layout, i, tuple(left)), e.place(layout, i, tuple(right))
        x = f"{kind}({shared[0][0]}[({first}) + k])"
        y = f"{kind}({shared[1][0]}[({second}) + (k << {n_bits})])"
        total = form.text(i)
        value = f"fma({x}, {y}, {total})" if op.result.element.is_float else f"{total} + {x} * {y}"  # type: ignore[union-attr]
        return [f"for (int k = 0; k < {k}; k++) {total} = {value};"]

    e.each(layout.count, lines, [form], [Access("read", piece) for _, piece in shared],
           defines=[name])  # fmt: skip
    e.forms[op.result, layout] = form

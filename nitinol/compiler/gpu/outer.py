"""Matrix products without matrix instructions: both operands in shared memory, and for each step along k a thread
multiplies a few values of a column of a by a few of a row of b."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nitinol.compiler.gpu import convert
from nitinol.compiler.gpu.elementwise import cast
from nitinol.compiler.gpu.forms import Index
from nitinol.compiler.gpu.layout import LANE_BITS, Layout, Map, axis_bits, bits_of, compose, independent, solve
from nitinol.compiler.gpu.threads import place_of
from nitinol.compiler.gpu.tree import Access
from nitinol.compiler.ir import Op
from nitinol.language.types import DType

if TYPE_CHECKING:
    from nitinol.compiler.gpu.emit import Emitter


def outer_layout(shape: tuple[int, ...], warp_bits: int) -> Layout:
    """4 x 4 neighbours in each thread, lanes and warps as square as possible, what is left in registers."""
    *_, m, n = (list(bits) for bits in axis_bits(shape))
    batch = list(range(len(m) + len(n), bits_of(shape)))
    registers = [n.pop(0) for _ in range(min(2, len(n)))] + [m.pop(0) for _ in range(min(2, len(m)))]
    lanes: list[int] = []
    warps: list[int] = []
    while len(lanes) < LANE_BITS and (m or n):
        lanes.append((n if len(n) >= len(m) else m).pop(0))
    while len(warps) < warp_bits and (batch or m or n):
        warps.append((batch or (m if len(m) >= len(n) else n)).pop())
    return Layout(
        bits_of(shape),
        tuple(1 << bit for bit in registers + n + m + batch),
        tuple([1 << bit for bit in lanes] + [0] * (LANE_BITS - len(lanes))),
        tuple([1 << bit for bit in warps] + [0] * (warp_bits - len(warps))),
    )


def outer_products(e: Emitter, op: Op) -> None:
    """c += a b, as sums in the accumulator's type."""
    a, b, acc = op.operands
    layout, element = e.assignment.home[op.result], op.result.element
    assert layout is not None and isinstance(element, DType)
    kind = e.type(element)
    m, n, k = (len(axis_bits(v.shape)[axis]) for v, axis in ((acc, -2), (acc, -1), (a, -1)))
    batch = bits_of(acc.shape) - m - n
    # Both lie in memory as [batch][k][m or n]: from places in a tile, and from those in acc where k is 0.
    turned: Map = (*(1 << (m + i) for i in range(k)), *(1 << i for i in range(m + k + batch) if not m <= i < m + k))
    left: Map = (*(0,) * n, *(1 << i for i in range(m)), *(1 << (m + k + i) for i in range(batch)))
    right: Map = (*(1 << i for i in range(n)), *(0,) * m, *(1 << (n + k + i) for i in range(batch)))
    form = e.store_in(e.name(op.result.name or "product"), element, layout.count, e.form(acc, layout))
    lines, reads, texts = [], [], []
    for value, map_, place, width in ((a, turned, left, m), (b, None, right, n)):
        theirs = e.assignment.first([value])
        shared, piece = e.scratch(value.element, 1 << theirs.bits)
        convert.write_tile(e, e.form(value, theirs), theirs, value, shared, Access("write", piece), map_)
        reads.append(Access("read", piece))
        registers = compose(place, layout.registers)
        own = independent(registers)
        name, count = e.name("x" if value is a else "y"), 1 << len(own)
        base = place_of(Layout(layout.bits, (), layout.lanes, layout.warps), Index(()), place)
        column = Index(own)
        lines.append(f"{kind} {name}[{count}];")
        text = f"{shared}[(({base}) | ({column})) + (k << {width})]"
        lines += _loop(e, count, f"{name}[r] = {cast(text, value.element, element, e.dialect)};")
        back = tuple(solve(own, c) or 0 for c in registers)
        texts.append(f"{name}[{Index(tuple(1 << i for i in range(len(registers)))).through(back)}]")
    total = form.text(Index(tuple(1 << i for i in range(len(layout.registers)))))
    x, y = texts
    value_text = f"fma({x}, {y}, {total})" if element.is_float else f"{total} + {x} * {y}"
    lines += _loop(e, layout.count, f"{total} = {value_text};")
    head = ["#pragma unroll 4", f"for (int k = 0; k < {1 << k}; k++) {{"]
    e.say(*head, *("    " + text for text in lines), "}", accesses=reads)
    e.forms[op.result, layout] = form


def _loop(e: Emitter, count: int, line: str) -> list[str]:
    return [e.dialect.UNROLL, f"for (int r = 0; r < {count}; r++)", f"    {line}"]

"""What a choice of layouts costs: instructions of one thread, roughly, so that choices can be compared.

Loads count by the bytes that a thread asks for and by the pieces of memory that a simdgroup touches, moves between
threads by their shuffles or by a trip through threadgroup memory with its barriers, arithmetic by registers. What is in
a loop counts eight times.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from nitinol.compiler.analysis import uses_of
from nitinol.compiler.gpu import convert
from nitinol.compiler.gpu.access import segments
from nitinol.compiler.gpu.assign import Assignment, Fragments, Style
from nitinol.compiler.gpu.layout import axis_bits, bits_of
from nitinol.compiler.gpu.sums import spread_sums
from nitinol.compiler.ir import ELEMENTWISE, Block, Function, Op, Value, walk
from nitinol.language.types import PointerType

LOOP = 8


def best_assignment(function: Function, warp_bits: int, fragments: Fragments, dialect: ModuleType) -> Assignment:
    """The cheapest of the styles; of equals the first."""
    narrow = any(op.kind == "load" and op.result.shape and op.result.element.nbytes < 4 for op in walk(function.body))
    runs = dialect.RUNS if narrow else dialect.RUNS[:1]
    styles = [Style(joined, run, dialect.DIRECT) for run in runs for joined in (False, True)[: 2 if warp_bits else 1]]
    made = [Assignment(function, warp_bits, fragments, style) for style in styles]
    made += [Assignment(function, warp_bits, fragments, a.style, frozenset(a.moved)) for a in made if a.moved]
    return min(made, key=lambda assignment: cost(function, assignment, dialect.PIECES))


def enough_simdgroups(function: Function) -> int:
    """How many simdgroups run a program if nobody says: one for each KB of its largest tile (of those that are loaded,
    stored, multiplied, scanned or gathered), 1 to 4; more, up to 16, where a thread would have over 64 elements."""
    kinds = ("load", "store", "dot", "scan", "gather", "atomic_rmw", "atomic_cas")
    tiles = [v for op in walk(function.body) if op.kind in kinds for v in (*op.operands, *op.results) if v.shape]
    places = [v for v in tiles if not isinstance(v.element, PointerType)]
    nbytes = max((v.element.nbytes << bits_of(v.shape) for v in places), default=0)
    elements = max((1 << bits_of(v.shape) for v in places), default=0)
    return max(min(4, max(1, nbytes // 1024)), min(16, elements // 2048))


def cost(function: Function, assignment: Assignment, pieces: tuple[float, float]) -> float:
    a = assignment
    spread, _ = spread_sums(function, uses_of(function), a.home, a.wanted, a.chosen)

    def block(nodes: Sequence[Op]) -> float:
        total = 0.0
        for op in nodes:
            inner = sum(region_cost(region) for region in op.regions if op.kind in ("for", "while", "if"))
            total += inner * (1 if op.kind == "if" else LOOP)
            total += operation(a, op, op in spread, pieces) + sum(moves(a, value) for value in op.results)
        return total

    def region_cost(region: Block) -> float:
        return block(region.ops) + sum(moves(a, value) for value in region.arguments)

    return block(function.body.ops)


def operation(a: Assignment, op: Op, spread: bool, pieces: tuple[float, float]) -> float:
    """Of the operation itself. `pieces`: prices of 64 bytes that a simdgroup touches, and where others do too."""
    if op.kind in ELEMENTWISE and op.result.shape:
        price = 0.25 if a.home.get(op.result) is None else 1.0
        return price * sum(layout.count for layout in a.versions(op.result))
    if op.kind in ("load", "store") and op.operands[0].shape:
        layout = a.chosen[op]
        touched = segments(a.widths, op, layout)
        if layout.sparse:
            touched /= 1 << bin(layout.copies[0]).count("1")
        shared = layout.copies[1] != 0 and op.kind == "load"
        return pieces[shared] * touched + 2 * (layout.count >> a.widths.contiguous_bits(op, layout))
    if op.kind == "reduce":
        layout = a.chosen[op]
        along = sum(1 << bit for bit in axis_bits(op.operands[0].shape)[op.attributes["axis"]])
        left = 1 << sum(1 for column in layout.registers if not column & along)
        total = float(layout.count)
        if not spread:
            total += convert.SHUFFLE * left * sum(1 for column in layout.lanes if column & along)
            total += convert.BARRIER * any(column & along for column in layout.warps)
        return total
    return 0.0


def moves(a: Assignment, value: Value) -> float:
    """Of the value's conversions."""
    home = a.home.get(value)
    if home is None:
        return 0.0
    wanted = [layout for layout in a.wanted.get(value, []) if layout != home]
    return sum(convert.price(home, layout, convert.find_shuffle(home, layout), value.element) for layout in wanted)

"""Which layout each tile gets.

Loads and stores want coalesced layouts, dots want fragments, reductions keep what their operand has; from these
anchors layouts flow forward to what is computed from them (`homes.py`). Tiles that no anchor reaches, such as index
arithmetic and broadcasts, have no home: they are computed anew in whatever layout their users want, instead of being
moved. A backward walk collects the wanted layouts (`demands.py`); a tile that is wanted in another layout than its home
is converted once, where it is defined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nitinol.compiler.gpu import demands, homes, loads
from nitinol.compiler.gpu.access import Widths
from nitinol.compiler.gpu.layout import Layout, blocked
from nitinol.compiler.gpu.preferred import coalesced, plain_layout, vector_bits
from nitinol.compiler.ir import Function, Op, Value, walk


@dataclass(frozen=True)
class Style:
    """`joined`: simdgroups share the rows of a tile. `run`: bytes that a thread loads side by side where elements are
    smaller than 4 bytes. `direct`: threads that want the same elements of a small tile load them each, from the cache,
    where else one loads them and hands them on."""

    joined: bool = False
    run: int = 16
    direct: bool = False


Fragments = Callable[[Op, int], "tuple[Layout, Layout, Layout] | None"]


class Assignment:
    """`home[v]`: the layout that a tile is computed in (None: in each of `wanted[v]`); `chosen[op]`: that of the
    operands of an access, reduction, scan or gather; `fragments[op]`: those of a dot's operands."""

    def __init__(
        self, function: Function, warp_bits: int, fragments: Fragments, style: Style = Style(),
        follow: frozenset[Op] = frozenset(),
    ) -> None:  # fmt: skip
        """`follow`: large loads that are placed like small ones."""
        self.warp_bits = warp_bits
        self.style = style
        self.fragments_of = fragments
        self.widths = Widths(function)
        self.vectors = vector_bits(function, self.widths)
        self.home: dict[Value, Layout | None] = {}
        self.weak: dict[Value, tuple[int, Layout]] = {}  # where tiles without a home would be, and its size in bits
        self.wanted: dict[Value, list[Layout]] = {}
        self.chosen: dict[Op, Layout] = {}
        self.fragments: dict[Op, tuple[Layout, Layout, Layout] | None] = {}
        self.spilled: dict[Value, bool] = {}  # operands of dots that go to shared memory; whether for warp groups
        self.spilled_from: dict[Value, Layout] = {}
        self.in_memory: set[tuple[Op, int]] = set()  # operands of dots that are read from there
        self.scalar = blocked((), warp_bits, 0)
        self.large = loads.large_loads(function) - follow
        self.moved: set[Op] = set()  # large loads that went where they are wanted
        self.near: loads.Near = {}
        for op in walk(function.body):
            if op in self.large:
                loads.note(self.near, op.operands[0], coalesced(self, op))
        for parameter in function.parameters:
            self.home[parameter] = self.scalar
        homes.forward(self, function.body)
        demands.backward(self, function.body)

    def home_of(self, value: Value) -> Layout | None:
        return self.home.get(value) if value.shape else self.scalar

    def first(self, values: Sequence[Value]) -> Layout:
        """The first home among the values, or a plain layout; with every copy."""
        found = [h for v in values if (h := self.home_of(v)) is not None]
        weak = [self.weak[v] for v in values if v in self.weak]
        if not found and weak:
            found = [max(weak, key=lambda pair: pair[0])[1]]
        return found[0].dense if found else plain_layout(values[0].shape, self.warp_bits)

    def versions(self, value: Value) -> list[Layout]:
        """The layouts in which a tile's operation computes it."""
        home = self.home[value]
        return self.wanted.get(value, []) if home is None else [home]

"""Which layout each tile gets.

Loads and stores want coalesced layouts, dots want fragments, reductions keep what their operand has; from these
anchors layouts flow forward to what is computed from them (`home`). Tiles that no anchor reaches, such as index
arithmetic and broadcasts, have no home: they are computed anew in whatever layout their users want, instead of being
moved. A backward walk collects the wanted layouts; a tile that is wanted in another layout than its home is converted
once, where it is defined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nitinol.compiler.gpu import convert, loads, pipeline, staging
from nitinol.compiler.gpu.access import Widths, memory_order
from nitinol.compiler.gpu.layout import (
    LANE_BITS,
    Layout,
    axis_bits,
    bits_of,
    blocked,
    compose,
    part_bit,
    view_map,
    without_axis,
)
from nitinol.compiler.gpu.outer import outer_layout
from nitinol.compiler.ir import ELEMENTWISE, VIEWS, Block, Function, Op, Value, walk
from nitinol.language.types import PointerType


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
        self.strides = self.widths.strides
        self.home: dict[Value, Layout | None] = {}
        self.weak: dict[Value, tuple[int, Layout]] = {}
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
        self.vectors: dict[tuple[int, ...], int] = {}
        for op in walk(function.body):
            if op.kind in ("load", "store") and op.operands[0].shape:
                shape = op.operands[0].shape
                width = self.widths.vector_bits(op, memory_order(self.strides.of(op.operands[0]), shape))
                if width:  # one that cannot be wide must not narrow the others
                    self.vectors[shape] = min(self.vectors.get(shape, 4), width)
        for op in walk(function.body):
            if op in self.large:
                loads.note(self.near, op.operands[0], self.coalesced(op), operand_layouts)
        for parameter in function.parameters:
            self.home[parameter] = self.scalar
        self.forward(function.body)
        self.backward(function.body)

    # ------------------------------------------------------------------------------------------------- forward

    def default(self, shape: Sequence[int]) -> Layout:
        bits = bits_of(shape)
        return blocked(range(bits), self.warp_bits, min(2, max(0, bits - LANE_BITS - self.warp_bits)))

    def coalesced(self, op: Op) -> Layout:
        pointer = op.operands[0]
        order = memory_order(self.strides.of(pointer), pointer.shape)
        vector = self.vectors.get(pointer.shape, 0)
        assert isinstance(pointer.element, PointerType)
        if op.kind == "load" and pointer.element.element.nbytes < 4:
            most = self.style.run // pointer.element.element.nbytes
            vector = max(min(vector, most.bit_length() - 1), self.run_bits(op, order))
        vector = min(vector, max(0, len(order) - LANE_BITS - self.warp_bits))
        return blocked(order, self.warp_bits, vector, self.style.joined)

    def run_bits(self, op: Op, order: Sequence[int]) -> int:
        """How many neighbours a thread shall have, be the access as narrow as it may: bytes are worked on in words."""
        pointer = op.operands[0]
        assert isinstance(pointer.element, PointerType)
        most = (self.style.run // pointer.element.element.nbytes).bit_length() - 1
        for width in range(min(most, len(order)), 0, -1):
            neighbours = list(order[:width]) == list(range(order[0], order[0] + width))
            if neighbours and self.widths.step(pointer, order[0], width) == 1:
                return width
        return 0

    def home_of(self, value: Value) -> Layout | None:
        return self.home.get(value) if value.shape else self.scalar

    def forward(self, block: Block) -> None:
        for op in block.ops:
            layouts = self.results(op)
            for result, layout in zip(op.results, layouts):
                self.home[result] = layout if result.shape else self.scalar
                if layout is None and result.shape:
                    self.suggest(op, result)

    def suggest(self, op: Op, result: Value) -> None:
        """For a tile without a home: where it would be if its largest source with a home stayed where it is.

        Anchors that have nothing else to go by take this: in sum(weights[:, :, None] * x) the weights do not move.
        """
        self.weak.pop(result, None)
        found = [(w, v) for v in op.operands if v.shape and (w := self.weight(v)) is not None]
        if not found or (op.kind not in ELEMENTWISE and op.kind not in ("broadcast", "reshape", "trans")):
            return
        (size, layout), source = max(found, key=lambda pair: pair[0][0])
        if op.kind == "broadcast":
            view = view_map("broadcast", source.shape, result.shape, {})
            back = [0] * layout.bits
            for bit, column in enumerate(view):
                if column:
                    back[column.bit_length() - 1] = 1 << bit
            grown = layout.through(tuple(back), len(view))
            new = tuple(1 << bit for bit, column in enumerate(view) if not column)
            layout = Layout(len(view), grown.registers + new, grown.lanes, grown.warps)
        elif op.kind in ("reshape", "trans"):
            layout = self.turned(op, layout)
        self.weak[result] = size, layout

    def weight(self, value: Value) -> tuple[int, Layout] | None:
        home = self.home.get(value)
        return self.weak.get(value) if home is None else (home.bits, home)

    def results(self, op: Op) -> Sequence[Layout | None]:
        """Homes of an operation's results; chooses the layouts that the operation works in."""
        kind = op.kind
        if kind in ("for", "while", "if"):
            return getattr(self, f"results_{kind}")(op)
        if kind in ELEMENTWISE:
            found = [(v.element.nbytes, h) for v in op.operands if (h := self.home_of(v)) is not None]
            return [max(found, key=lambda pair: pair[0])[1] if found else None]
        if kind in VIEWS:
            return self.view_homes(op)
        if kind in ("load", "atomic_rmw", "atomic_cas"):
            pointer = op.operands[0]
            if not pointer.shape:
                self.chosen[op] = self.scalar
            elif kind == "load":
                return [self.load_layout(op)]
            else:
                self.chosen[op] = self.first(op.operands)
            return [self.chosen[op]]
        if kind == "store":
            self.chosen[op] = self.store_layout(op) if op.operands[0].shape else self.scalar
        elif kind == "reduce":
            shape, axis = op.operands[0].shape, op.attributes["axis"]
            layout = self.chosen[op] = self.first(op.operands)
            return [layout.through(without_axis(shape, axis), bits_of(op.results[0].shape))] * len(op.results)
        elif kind == "scan":
            self.chosen[op] = self.scan_layout(op.operands[0].shape, op.attributes["axis"])
            return [self.chosen[op]] * len(op.results)
        elif kind == "gather":
            self.chosen[op] = self.first(op.operands[1:])
            return [self.chosen[op]]
        elif kind == "dot":
            fragments = self.fragments[op] = self.fragments_of(op, self.warp_bits)
            if fragments is None and op.attributes.get("outer"):
                return [outer_layout(op.result.shape, self.warp_bits)]
            return [fragments[2] if fragments else self.default(op.result.shape)]
        elif kind == "assert":
            self.chosen[op] = self.first(op.operands) if op.operands[0].shape else self.scalar
        elif kind == "stage_copy":
            self.chosen[op] = staging.copy_layout(op.attributes["stage"], self.warp_bits)
        return [None] * len(op.results)

    def load_layout(self, op: Op) -> Layout | None:
        """A large load is coalesced, a small one goes beside others of the same pointers, or follows its users."""
        pointer, coalesced = op.operands[0], self.coalesced(op)
        if op in self.large or not self.index_only(op):
            self.chosen[op] = coalesced
        else:
            order = memory_order(self.strides.of(pointer), pointer.shape)
            vector = self.vectors.get(pointer.shape, 0)
            found = None if self.style.direct else loads.beside(self.near, pointer, order, vector)
            if found is None:
                self.weak[op.result] = coalesced.bits, coalesced
                return None
            self.chosen[op] = found
        loads.note(self.near, pointer, self.chosen[op], operand_layouts)
        return self.chosen[op]

    def index_only(self, op: Op) -> bool:
        return all(self.home.get(v) is None or not v.shape for v in op.operands)

    def first(self, values: Sequence[Value]) -> Layout:
        """The first home among the values, or a plain layout; with every copy."""
        found = [h for v in values if (h := self.home_of(v)) is not None]
        weak = [self.weak[v] for v in values if v in self.weak]
        if not found and weak:
            found = [max(weak, key=lambda pair: pair[0])[1]]
        return found[0].dense if found else self.default(values[0].shape)

    def view_homes(self, op: Op) -> list[Layout | None]:
        source = self.home_of(op.operands[0])
        if op.kind in ("splat", "broadcast") or source is None:
            return [None] * len(op.results)
        if op.kind in ("reshape", "trans"):
            return [self.turned(op, source)]
        if op.kind == "split":
            drop = tuple(0 if bit == 0 else 1 << (bit - 1) for bit in range(source.bits))
            return [source.through(drop, source.bits - 1)] * 2
        cut = part_bit(op.kind, op.result.shape, op.attributes)  # join, cat: the parts side by side in each thread
        insert = tuple(1 << (bit if bit < cut else bit + 1) for bit in range(source.bits))
        columns = [compose(insert, c) for c in (source.registers, source.lanes, source.warps)]
        front = sum(1 for c in source.registers if c < 1 << cut) if cut else 0
        registers = (*columns[0][:front], 1 << cut, *columns[0][front:])
        return [Layout(source.bits + 1, registers, columns[1], columns[2], source.sparse)]

    def turned(self, op: Op, source: Layout) -> Layout:
        """The layout of a reshaped or transposed tile whose source stays where it is."""
        inverse = [0] * source.bits
        for bit, column in enumerate(view_map(op.kind, op.operands[0].shape, op.result.shape, op.attributes)):
            inverse[column.bit_length() - 1] = 1 << bit
        return source.through(tuple(inverse), source.bits)

    def store_layout(self, op: Op) -> Layout:
        """The value's home if memory likes it about as well as the coalesced layout, else that."""
        best, home = self.coalesced(op), self.home_of(op.operands[1])
        if home is None or home == best:
            return best
        near = 1.5 * self.segments(op, best) + 4  # 4 more cost less than a barrier
        return home if self.segments(op, home) <= near else best

    def segments(self, op: Op, layout: Layout) -> float:
        """64-byte pieces of memory that one warp touches, over all its registers, each access on its own."""
        pointer = op.operands[0]
        assert isinstance(pointer.element, PointerType)
        strides, nbytes = self.strides.of(pointer), pointer.element.element.nbytes
        weight = [0] * layout.bits
        for axis, bits in enumerate(axis_bits(pointer.shape)):
            stride = strides[axis]
            for i, bit in enumerate(bits):
                weight[bit] = ((1 << 20) + 64 * axis if stride is None else stride) << i

        def address(place: int) -> int:
            return nbytes * sum(w for bit, w in enumerate(weight) if place >> bit & 1)

        width = min(self.widths.contiguous_bits(op, layout), 4)
        touched = {address(layout.place(r, lane, 0)) // 64 for lane in range(32) for r in range(1 << width)}
        return len(touched) * (layout.count >> width)

    def scan_layout(self, shape: Sequence[int], axis: int) -> Layout:
        """The axis' upper bits in lanes, its lower ones in registers, nothing of it across warps."""
        along = axis_bits(shape)[axis]
        split = max(0, len(along) - LANE_BITS)
        others = [bit for bit in range(bits_of(shape)) if bit not in along]
        lanes = along[split:]
        while others and len(lanes) < LANE_BITS:
            lanes.append(others.pop(0))
        warps = [others.pop() for _ in range(min(self.warp_bits, len(others)))]
        return Layout(
            bits_of(shape),
            tuple(1 << bit for bit in along[:split] + others),
            tuple([1 << bit for bit in lanes] + [0] * (LANE_BITS - len(lanes))),
            tuple([1 << bit for bit in warps] + [0] * (self.warp_bits - len(warps))),
        )

    def settle(
        self, variables: Sequence[Value], starts: Sequence[Value], nexts: Sequence[Value], body: Callable[[], None]
    ) -> None:
        """Homes of carried values: what the loop makes of them if it has a preference, else what they come in."""
        for variable, start in zip(variables, starts):
            self.home[variable] = self.home_of(start)
        for _ in range(3):
            body()
            changed = False
            for variable, following in zip(variables, nexts):
                layout = self.home_of(following)
                if layout is not None and layout != self.home[variable]:
                    self.home[variable], changed = layout, True
            if not changed:
                break
        for variable, following in zip(variables, nexts):
            if self.home[variable] is None:
                self.home[variable] = self.first([following])
        body()

    def results_for(self, op: Op) -> Sequence[Layout | None]:
        block = op.regions[0]
        variable, *carried = block.arguments
        self.home[variable] = self.scalar
        self.settle(carried, op.operands[3:], block.terminator.operands, lambda: self.forward(block))
        return [self.home[v] for v in carried]

    def results_while(self, op: Op) -> Sequence[Layout | None]:
        before, after = op.regions

        def body() -> None:
            self.forward(before)
            for argument, value in zip(after.arguments, before.terminator.operands[1:]):
                self.home[argument] = self.home_of(value) or self.default(argument.shape)
            self.forward(after)

        self.settle(before.arguments, op.operands, after.terminator.operands, body)
        return [self.home[v] for v in after.arguments]

    def results_if(self, op: Op) -> Sequence[Layout | None]:
        layouts = []
        for region in op.regions:
            self.forward(region)
        for result, *values in zip(op.results, *(r.terminator.operands for r in op.regions)):
            found = [h for v in values if (h := self.home_of(v)) is not None]
            layouts.append(found[0] if found else self.default(result.shape))
        return layouts

    # ------------------------------------------------------------------------------------------------ backward

    def want(self, value: Value, layout: Layout) -> None:
        layouts = self.wanted.setdefault(value, [])
        if layout not in layouts:
            layouts.append(layout)

    def backward(self, block: Block) -> None:
        for op in reversed(block.ops):
            self.demand(op)

    def versions(self, value: Value) -> list[Layout]:
        """The layouts in which a tile's operation computes it."""
        home = self.home[value]
        return self.wanted.get(value, []) if home is None else [home]

    def demand(self, op: Op) -> None:
        """Wants the operands in the layouts that the operation needs them in."""
        kind = op.kind
        if kind in ELEMENTWISE or kind in VIEWS:
            self.move_up(op)
            for result in op.results:
                for layout in self.versions(result):
                    for operand, needed in zip(op.operands, operand_layouts(op, layout)):
                        self.want(operand, needed)
        elif kind in ("load", "store", "atomic_rmw", "atomic_cas", "reduce", "scan", "assert"):
            if kind == "load" and op.result.shape:
                self.place_load(op)
            for operand in op.operands:
                self.want(operand, self.chosen[op] if operand.shape else self.scalar)
        elif kind == "device_print":
            for operand in op.operands:
                self.want(operand, self.first([operand]) if operand.shape else self.scalar)
        elif kind == "gather":
            self.want(op.operands[0], self.first(op.operands[:1]))
            self.want(op.operands[1], self.chosen[op])
        elif kind == "dot":
            fragments = self.fragments[op]
            first, second = (self.first([v]) for v in op.operands[:2])
            for number, operand in enumerate(op.operands):
                where = (fragments or (first, second, self.home[op.result]))[number]
                assert where is not None
                if number == 2 or pipeline.staged(operand) is None:
                    self.want(operand, self.operand_of_matrices(op, number, where))
        elif kind in ("stage_copy", "stage_read"):
            for operand in op.operands:
                self.want(operand, self.chosen[op] if operand.shape else self.scalar)
        elif kind == "for":
            block = op.regions[0]
            for value in op.operands[:3]:
                self.want(value, self.scalar)
            self.pass_on(block.terminator.operands, block.arguments[1:])
            self.backward(block)
            self.pass_on(op.operands[3:], block.arguments[1:])
        elif kind == "while":
            before, after = op.regions
            self.pass_on(after.terminator.operands, before.arguments)
            self.backward(after)
            self.want(before.terminator.operands[0], self.scalar)
            self.pass_on(before.terminator.operands[1:], after.arguments)
            self.backward(before)
            self.pass_on(op.operands, before.arguments)
        elif kind == "if":
            for region in op.regions:
                self.pass_on(region.terminator.operands, op.results)
                self.backward(region)
            self.want(op.operands[0], self.scalar)

    def operand_of_matrices(self, op: Op, number: int, fragment: Layout) -> Layout:
        """Where an operand of a dot is wanted: as a fragment, or where it is, from where it goes to shared memory."""
        value = op.operands[number]
        home = self.home_of(value)
        if number == 2 or not op.attributes.get("from_memory"):
            return fragment
        if number == 1 and op.attributes.get("warpgroups"):
            home = home or self.default(value.shape)
        elif home is None:
            return fragment
        else:
            shuffle = convert.find_shuffle(home, fragment)
            if shuffle is not None and not shuffle.moves and len(shuffle.choices) == 1:
                return fragment
        self.spilled[value] = self.spilled.get(value, False) or bool(op.attributes.get("warpgroups"))
        self.in_memory.add((op, number))
        self.spilled_from[value] = home = self.spilled_from.get(value, home)
        return home

    def move_up(self, op: Op) -> None:
        """A result that is wanted in one other layout only is computed there if just one operand has to move, or no
        more bytes: the conversion may then end at a load, or at fewer bytes."""
        result = op.results[0]
        wanted, home = self.wanted.get(result, []), self.home[result]
        settled = {v for v in op.operands if v.shape and self.home.get(v) is not None}
        if len(op.results) == 1 and home is not None and len(wanted) == 1:
            nbytes = sum(v.element.nbytes << bits_of(v.shape) for v in settled)
            if len(settled) <= 1 or nbytes <= result.element.nbytes << bits_of(result.shape):
                self.home[result] = wanted[0]

    def place_load(self, op: Op) -> None:
        """A load without a home goes where it is wanted with the fewest registers. One with a home does so too if that
        is the only place and costs memory little more: several simdgroups then load the same elements, from the cache,
        and save a trip through threadgroup memory with its barriers."""
        wanted, home = self.wanted.get(op.result, []), self.home[op.result]
        pointer = op.operands[0]
        assert isinstance(pointer.element, PointerType)
        order = memory_order(self.strides.of(pointer), pointer.shape)
        nbytes = pointer.element.element.nbytes
        if home is None:
            layout = min(wanted, key=lambda w: w.count, default=self.coalesced(op))
            self.chosen[op] = self.home[op.result] = loads.spread(layout, order, nbytes, self.style.direct)
        elif len(wanted) == 1 and wanted[0] != home and self.index_only(op):
            layout = loads.spread(wanted[0], order, nbytes, self.style.direct)
            if self.segments(op, layout) <= 4 * self.segments(op, home):
                self.chosen[op] = self.home[op.result] = layout
                self.moved |= {op} & self.large

    def pass_on(self, values: Sequence[Value], variables: Sequence[Value]) -> None:
        for value, variable in zip(values, variables):
            layout = self.home[variable]
            assert layout is not None
            self.want(value, layout)


def operand_layouts(op: Op, layout: Layout) -> list[Layout]:
    """Where the operands of an elementwise operation or view must be so that each thread has what it needs."""
    if op.kind in ELEMENTWISE:
        return [layout] * len(op.operands)
    source = op.operands[0]
    bits = bits_of(source.shape)
    if op.kind == "split":  # both parts' elements side by side
        shift = tuple(1 << (bit + 1) for bit in range(layout.bits))
        columns = [compose(shift, c) for c in (layout.registers, layout.lanes, layout.warps)]
        return [Layout(bits, (1, *columns[0]), columns[1], columns[2], layout.sparse)]
    if op.kind not in ("reshape", "trans"):
        layout = layout.dense  # copies of the operand are other elements of the result
    view = view_map(op.kind, source.shape, op.result.shape, op.attributes)
    return [layout.through(view, bits)] * len(op.operands)


def is_pointer(value: Value) -> bool:
    return isinstance(value.element, PointerType)

"""How a tile of pointers walks through memory: which elements are neighbours, how wide an access may be, and how much
memory it touches."""

from __future__ import annotations

from collections.abc import Sequence

from nitinol.compiler.analysis import AxisStrides, Strides
from nitinol.compiler.gpu.layout import Layout, Map, apply, axis_bits, bits_of, view_map
from nitinol.compiler.ir import COMPARISONS, Function, Op, Value, walk
from nitinol.language.types import PointerType

VECTOR_BYTES = 16  # of the widest load and store
LARGEST = 1 << 40  # stands for the divisibility of 0


def memory_order(strides: Strides, shape: Sequence[int]) -> list[int]:
    """The bits of a place, those that move the address least first; broadcast axes last."""

    def weight(axis: int) -> tuple[int, int, int]:
        stride = strides[axis]
        return (1 if stride is None else 2 if stride == 0 else 0, abs(stride or 0), -axis)

    bits = axis_bits(shape)
    return [bit for axis in sorted(range(len(shape)), key=weight) for bit in bits[axis]]


def neighbours(layout: Layout) -> tuple[int, int]:
    """The bit of the place that a layout's first register has, and how many registers go on from there."""
    first = layout.registers[0].bit_length() - 1 if layout.registers else 0
    width = 0
    while width < len(layout.registers) and layout.registers[width] == 1 << (first + width):
        width += 1
    return first, width


def segments(widths: Widths, op: Op, layout: Layout) -> float:
    """64-byte pieces of memory that one warp touches, over all its registers, each access on its own."""
    pointer = op.operands[0]
    assert isinstance(pointer.element, PointerType)
    strides, nbytes = widths.strides.of(pointer), pointer.element.element.nbytes
    weight = [0] * layout.bits
    for axis, bits in enumerate(axis_bits(pointer.shape)):
        stride = strides[axis]
        for i, bit in enumerate(bits):
            weight[bit] = ((1 << 20) + 64 * axis if stride is None else stride) << i

    def address(place: int) -> int:
        return nbytes * sum(w for bit, w in enumerate(weight) if place >> bit & 1)

    width = min(widths.contiguous_bits(op, layout), 4)
    touched = {address(layout.place(r, lane, 0)) // 64 for lane in range(32) for r in range(1 << width)}
    return len(touched) * (layout.count >> width)


RUN = 16  # elements of the widest access, of bytes


class RunStrides(AxisStrides):
    """Strides that hold within aligned runs of RUN elements: x % n goes on by ones there if n is a multiple of it."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.widths = widths

    def _compute(self, value: Value) -> Strides:
        op = value.op
        if op is not None and op.kind == "bitcast" and isinstance(value.element, PointerType):
            source = op.operands[0].element
            assert isinstance(source, PointerType)
            old, new = source.element.nbytes, value.element.element.nbytes
            return tuple(None if s is None or s * old % new else s * old // new for s in self.of(op.operands[0]))
        if op is None or op.kind != "rem" or not value.shape:
            return super()._compute(value)
        x, n = op.operands
        out: list[int | None] = []
        for axis, (stride, other) in enumerate(zip(self.of(x), self.of(n))):
            run, bits = min(RUN, value.shape[axis]), axis_bits(value.shape)[axis]
            places = (run - 1) << bits[0] if bits else 0
            whole = other == 0 and all(self.widths.multiple(v, places) % run == 0 for v in (x, n))
            out.append(stride if stride == 0 == other or (stride == 1 and whole) else None)
        return tuple(out)


class Widths:
    """How many neighbouring elements an access may take at once: contiguous, aligned, under one mask."""

    def __init__(self, function: Function) -> None:
        self.strides = RunStrides(self)
        self.divisible = dict(zip(function.parameters, function.divisible))
        self.known: dict[tuple[Value, int], int] = {}
        self.sums: dict[Value, tuple[Value, Value]] = {}  # in loops: start and step of what grows by a fixed step
        for op in walk(function.body):
            if op.kind == "for":
                self.note_sums(op)

    def note_sums(self, loop: Op) -> None:
        block = loop.regions[0]
        counter, *carried = block.arguments
        self.sums[counter] = loop.operands[0], loop.operands[2]
        for variable, start, following in zip(carried, loop.operands[3:], block.terminator.operands):
            if following.op is not None and following.op.kind == "add" and following.op.operands[0] is variable:
                self.sums[variable] = start, following.op.operands[1]

    def vector_bits(self, op: Op, order: Sequence[int]) -> int:
        """For the first bits of an order."""
        pointer = op.operands[0]
        element = pointer.element
        assert isinstance(element, PointerType)
        most = (VECTOR_BYTES // element.element.nbytes).bit_length() - 1
        for width in range(min(most, len(order)), 0, -1):
            if list(order[:width]) == list(range(order[0], order[0] + width)) and self.allows(op, order[0], width):
                return width
        return 0

    def contiguous_bits(self, op: Op, layout: Layout) -> int:
        """For the first registers of a layout."""
        first, width = neighbours(layout)
        return min(width, self.vector_bits(op, list(range(first, first + width)))) if width else 0

    def equal_bits(self, mask: Value, layout: Layout) -> int:
        """For how many of the first registers of a layout a mask is the same."""
        first, most = neighbours(layout)
        return next((width for width in range(most, 0, -1) if self.uniform(mask, first, width)), 0)

    def allows(self, op: Op, first: int, width: int) -> bool:
        """Whether 2**width elements whose places differ in bits first .. first + width - 1 are one access."""
        pointer = op.operands[0]
        element = pointer.element
        assert isinstance(element, PointerType)
        if self.step(pointer, first, width) != 1:
            return False
        places = ((1 << width) - 1) << first
        mask = op.operands[1 if op.kind == "load" else 2 :][:1]
        return self.multiple(pointer, places) % (element.element.nbytes << width) == 0 and all(
            self.uniform(m, first, width) for m in mask
        )

    def step(self, value: Value, first: int, width: int) -> int | None:
        """By how much a value grows from one element to the next along these bits, which must be of one axis."""
        for axis, bits in enumerate(axis_bits(value.shape)):
            if first in bits:
                return self.strides.of(value)[axis] if first == bits[0] and width <= len(bits) else None
        return None

    def steps(self, value: Value, columns: Map) -> list[int | None]:
        """By how much a value grows from place 0 to each of these, as far as that is known."""
        weights: dict[int, int | None] = {}
        for stride, bits in zip(self.strides.of(value), axis_bits(value.shape)):
            weights |= {bit: None if stride is None else stride << i for i, bit in enumerate(bits)}
        found = [[weights[bit] for bit in range(column.bit_length()) if column >> bit & 1] for column in columns]
        return [None if None in parts else sum(parts) for parts in found]  # type: ignore[arg-type]

    def uniform(self, mask: Value, first: int, width: int) -> bool:
        """Whether a mask is the same in each aligned run of 2**width elements along these bits."""
        if self.step(mask, first, width) == 0:
            return True
        op = mask.op
        if op is None:
            return False
        if op.kind in ("and", "or", "xor", "not"):
            return all(self.uniform(v, first, width) for v in op.operands)
        run = ((1 << width) - 1) << first
        if op.kind in ("broadcast", "reshape") and len(bits := self.image(op, run)) == width:
            return bits == list(range(bits[0], bits[0] + width)) and self.uniform(op.operands[0], bits[0], width)
        if op.kind in COMPARISONS and not isinstance(op.operands[0].element, PointerType):
            a, b = op.operands
            steps = self.step(a, first, width), self.step(b, first, width)
            if op.kind in ("gt", "le"):
                a, b, steps = b, a, steps[::-1]
            if op.kind in ("eq", "ne") or steps != (1, 0):  # lt, ge of a run against a bound that it cannot straddle
                return steps == (0, 0)
            return all(self.multiple(v, run) % (1 << width) == 0 for v in (a, b))
        return False

    def image(self, op: Op, places: int) -> list[int]:
        """Bits of the source's place that bits of a view's place come from."""
        view = view_map(op.kind, op.operands[0].shape, op.result.shape, op.attributes)
        return [view[bit].bit_length() - 1 for bit in range(len(view)) if places >> bit & 1 and view[bit]]

    def multiple(self, value: Value, places: int) -> int:
        """A power of two that divides the value (a pointer's address in bytes) wherever these bits of the place are
        zero."""
        key = (value, places)
        if key not in self.known:
            self.known[key] = 1  # for values that depend on themselves
            self.known[key] = self._multiple(value, places)
        return self.known[key]

    def _multiple(self, value: Value, places: int) -> int:
        op = value.op
        if value in self.divisible:
            return self.divisible[value] & -self.divisible[value]
        if value in self.sums:
            return min(self.multiple(v, places) for v in self.sums[value])
        if op is None or (not isinstance(value.element, PointerType) and not value.element.is_int):
            return 1
        kind = op.kind
        if kind == "constant":
            number = int(op.attributes["value"])
            return number & -number if number else LARGEST
        if kind == "arange":
            rest = places + 1 if places & (places + 1) == 0 else 1
            start = op.attributes["start"]
            return min(rest, start & -start if start else LARGEST)
        if kind in ("splat", "broadcast", "reshape", "trans"):
            source = op.operands[0]
            view = view_map(kind, source.shape, value.shape, op.attributes)
            assert len(view) == bits_of(value.shape)
            return self.multiple(source, apply(view, places))
        if kind in ("add", "sub", "max", "min", "rem", "select"):
            return min(self.multiple(v, places) for v in op.operands[-2:])
        if kind == "mul":
            a, b = (self.multiple(v, places) for v in op.operands)
            return min(a * b, LARGEST)
        if kind in ("cast", "bitcast") and value.element.nbytes >= op.operands[0].element.nbytes:
            return self.multiple(op.operands[0], places)
        if kind == "addptr":
            assert isinstance(value.element, PointerType)
            base, offset = (self.multiple(v, places) for v in op.operands)
            return min(base, offset * value.element.element.nbytes)
        return 1

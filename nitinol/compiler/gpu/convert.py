"""From one layout to another by the cheapest means, read off the two maps.

Nothing, or a renaming of registers, where every thread already has what it needs; shuffles within a simdgroup where
every simdgroup has; else a trip through threadgroup memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nitinol.compiler.gpu.forms import Form, Index, Words, linear, shifted, variable
from nitinol.compiler.gpu.layout import Layout, Map, apply, axis_bits, independent, solve
from nitinol.compiler.gpu.threads import guard_of, place_of
from nitinol.compiler.gpu.tree import Access
from nitinol.compiler.gpu.words import single_bytes
from nitinol.compiler.ir import Op, Value
from nitinol.language.types import DType, PointerType, int1, int8, uint8, uint16, uint32

if TYPE_CHECKING:
    from nitinol.compiler.gpu.emit import Emitter


BARRIER = 40  # what the barriers of one trip through threadgroup memory cost, and a shuffle, in plain instructions
SHUFFLE = 2


@dataclass(frozen=True)
class Shuffle:
    """Linear maps to the source's register and lane: from the bits of the result's register, of lane and of warp."""

    registers: tuple[Map, Map, Map]
    lanes: tuple[Map, Map, Map]

    @property
    def choices(self) -> list[int]:
        """What the source's register may differ by between threads that ask at the same time."""
        basis = independent(self.registers[1] + self.registers[2])
        return [apply(basis, i) for i in range(1 << len(basis))]

    @property
    def moves(self) -> bool:
        """Whether any value changes its lane."""
        own = tuple(1 << i for i in range(len(self.lanes[1])))
        return self.lanes != ((0,) * len(self.lanes[0]), own, (0,) * len(self.lanes[2]))


@functools.lru_cache(65536)
def find_shuffle(source: Layout, result: Layout) -> Shuffle | None:
    """How each thread gets its elements of `result` from `source` within its simdgroup; None if it cannot."""
    count = len(source.registers)
    absent = source.copies[0] if source.sparse else 0  # lanes that have nothing
    parts: list[tuple[Map, Map]] = []
    for kind, columns in enumerate((result.registers, result.lanes, result.warps)):
        registers, lanes = [], []
        for bit, column in enumerate(columns):
            number, own = None, 0
            if kind == 1 and not absent >> bit & 1:  # from the same lane if possible
                number = solve(source.registers, column ^ source.lanes[bit])
                own = 1 << bit
            wanted = column ^ source.warps[bit] if kind == 2 else column
            if number is None:
                own, number = 0, solve(source.registers + source.lanes, wanted)
            if number is None:
                return None
            registers.append(number & ((1 << count) - 1))
            lanes.append(number >> count | own)
        parts.append((tuple(registers), tuple(lanes)))
    (a, b), (c, d), (e, f) = parts
    return Shuffle((a, c, e), (b, d, f))


def price(source: Layout, result: Layout, shuffle: Shuffle | None, element: DType | PointerType) -> float:
    """What a conversion costs, in instructions of one thread; without `shuffle` through threadgroup memory."""
    memory = BARRIER + 2.0 * (source.count + result.count)
    if shuffle is None:
        return memory
    choices = len(shuffle.choices)
    if choices == 1 and not shuffle.moves:
        return 0.0
    if choices > 4:
        return memory
    words = result.count >> len(packed := packing(shuffle, element))
    return min(memory, words * (SHUFFLE * choices + choices - 1.0) + result.count * bool(packed))


def convert(e: Emitter, value: Value, form: Form, source: Layout, result: Layout) -> Form:
    """The value in another layout."""
    shuffle = find_shuffle(source, result)
    if shuffle is not None:
        choices = len(shuffle.choices)
        if choices == 1 and not shuffle.moves:
            return form.through(shuffle.registers[0])
        name, element = value.name or "v", value.element
        if price(source, result, shuffle, element) < price(source, result, None, element):
            packed = packing(shuffle, element)
            if packed:
                return by_words(e, name, element, form, source.count, shuffle, result.count, packed)
            return by_shuffles(e, name, element, form, source.count, shuffle, result.count)
    return by_memory(e, value, form, source, result)


def packing(shuffle: Shuffle, element: DType | PointerType) -> list[int]:
    """The bits of the result's register number that tell apart what one 32-bit word of the source's holds, the lowest
    first; none if words do not move as a whole."""
    own, moved = shuffle.registers[0], shuffle.lanes[0]
    bits: list[int] = []
    while shuffle.moves and isinstance(element, DType) and element != int1 and element.nbytes << len(bits) < 4:
        number = 1 << len(bits)
        found = [bit for bit, column in enumerate(own) if column == number and not moved[bit]]
        others = [c for columns in shuffle.registers for c in columns if c != number]
        if len(found) != 1 or any(column & number for column in others):
            break
        bits.append(found[0])
    return bits


def by_words(
    e: Emitter, name: str, element: DType | PointerType, form: Form, count: int, shuffle: Shuffle, result: int,
    bits: list[int],
) -> Form:  # fmt: skip
    """Bytes and 16-bit numbers are packed, shuffled as 32-bit words, and unpacked."""
    assert isinstance(element, DType)
    width = len(bits)
    plain = uint8 if element.nbytes == 1 else uint16
    kind, word = e.type(plain), e.type(uint32)

    def pack(i: Index) -> str:
        wide = i.through(tuple(1 << bit for bit in range(width, count.bit_length() - 1)))
        parts = []
        for number in range(1 << width):
            text = form.text(wide.at(number))
            text = e.dialect.bit_cast(kind, text) if element.is_float else f"{kind}({text})"
            shift = 8 * element.nbytes * number
            parts.append(f"{word}({text}) << {shift}" if shift else f"{word}({text})")
        return " | ".join(parts)

    names = lambda i: {(n, False) for n, _ in form.names(i)}  # noqa: E731
    if width == 2 and form.words is not None and form.words.bits == (0, 1):
        words = form.words.form
    else:
        words = e.store_in(e.name(f"{name}_words"), uint32, count >> width, Form(pack, names, False))
    kept = [bit for bit in range(len(shuffle.registers[0])) if bit not in bits]
    less = Shuffle(
        (tuple(shuffle.registers[0][bit] >> width for bit in kept),
         *(tuple(column >> width for column in columns) for columns in shuffle.registers[1:])),  # type: ignore[arg-type]
        (tuple(shuffle.lanes[0][bit] for bit in kept), *shuffle.lanes[1:]),
    )  # fmt: skip
    moved = by_shuffles(e, name, uint32, words, count >> width, less, result >> width)
    if element in (int8, uint8) and width == 2:
        return single_bytes(Words((bits[0], bits[1]), moved), element, e.dialect)
    places = len(shuffle.registers[0])
    to_word = tuple(1 << kept.index(bit) if bit in kept else 0 for bit in range(places))
    to_shift = tuple(8 * element.nbytes << bits.index(bit) if bit in bits else 0 for bit in range(places))

    def unpack(i: Index) -> str:
        read, shift = moved.text(i.through(to_word)), str(i.through(to_shift))
        text = f"{kind}({read})" if shift == "0" else f"{kind}({read} >> ({shift}))"
        return text if element == plain else e.dialect.bit_cast(e.type(element), text)

    return e.store_in(e.name(f"{name}_moved"), element, result, Form(unpack, lambda i: moved.names(i.through(to_word))))


def by_shuffles(
    e: Emitter, name: str, element: DType | PointerType, form: Form, count: int, shuffle: Shuffle, result: int
) -> Form:
    """One shuffle for each register that another lane may ask for, then a choice among what came.

    Every shuffle has a statement of its own: all lanes must take part in it.
    """
    if shuffle.moves and not form.stored:  # computed once, before other lanes ask for it
        form = e.store_in(e.name(name), element, count, form)
    others = [linear(shuffle.lanes[1], "lane"), linear(shuffle.lanes[2], "warp")]

    def taken(number: int) -> Form:
        def text(index: Index) -> str:
            read = form.text(index.through(shuffle.registers[0]).at(number))
            if not shuffle.moves:
                return read
            lane = xor([*others, str(index.through(shuffle.lanes[0]))])
            return e.dialect.shuffle(element, read, lane)

        return Form(text, lambda i: {(n, False) for n, _ in form.names(i)}, form.simple)

    parts = [taken(number) for number in shuffle.choices]
    if len(parts) > 1 and shuffle.moves:
        parts = [e.store_in(e.name(f"{name}_part"), element, result, part) for part in parts]
    which = xor([linear(shuffle.registers[1], "lane"), linear(shuffle.registers[2], "warp")])

    def pick(index: Index) -> str:
        out = parts[-1].text(index)
        for number, part in reversed(list(zip(shuffle.choices[:-1], parts))):
            out = f"({which}) == {number} ? {part.operand(index)} : ({out})"
        return out

    def names(index: Index) -> set[tuple[str, bool]]:
        return set().union(*(part.names(index) for part in parts))

    return e.store_in(e.name(f"{name}_moved"), element, result, Form(pick, names, False))


def xor(terms: list[str]) -> str:
    terms = [t for t in terms if t != "0"]
    return " ^ ".join(f"({t})" if " " in t else t for t in terms) or "0"


def by_memory(e: Emitter, value: Value, form: Form, source: Layout, result: Layout) -> Form:
    """All elements to threadgroup memory and back, in several rounds if it is too small for all at once."""
    name = e.name(f"{value.name or 'v'}_moved")
    target = variable(name, result.count)
    rounds = common_registers(source, result, max(1, value.element.nbytes), e.dialect.SHARED_ROOMY)
    if rounds:
        e.declare(name, value.element, result.count)
    whole, keep, kept = source.bits - len(rounds), [], 0  # a round's elements are numbered without the rounds' bits
    for bit in range(source.bits):
        keep.append(0 if 1 << bit in rounds else 1 << kept)
        kept += 1 << bit not in rounds
    shared, piece = e.scratch(value.element, 1 << whole)
    for number in range(1 << len(rounds)):
        parts = []
        for layout in (source, result):
            own = [layout.registers.index(column) for column in rounds]
            rest = tuple(1 << bit for bit in range(len(layout.registers)) if bit not in own)
            constant = sum(1 << bit for i, bit in enumerate(own) if number >> i & 1)
            registers = tuple(c for c in layout.registers if c not in rounds)
            parts.append((replace(layout, registers=registers), rest, constant))
        (writer, rest, constant), (reader, back, offset) = parts
        view = shifted(form, rest, constant)
        write_tile(e, view if rounds else form, writer, value, shared, Access("write", piece), tuple(keep))
        kind = e.type(value.element)
        cast = f"({kind})" if kind.endswith("*") else ""

        def text(i: Index, layout: Layout = reader, cast: str = cast) -> str:
            return f"{cast}{shared}[{place_of(layout, i, tuple(keep))}]"

        if not rounds:
            return fetch(e, name, value, result, text, Access("read", piece))
        e.each(
            reader.count,
            lambda i, m=back, c=offset, text=text: [f"{target.text(i.through(m).at(c))} = {text(i)};"],  # type: ignore[misc]
            [], [Access("read", piece)], defines=[name],
        )  # fmt: skip
    return target


def common_registers(source: Layout, result: Layout, nbytes: int, limit: int) -> list[int]:
    """Columns of registers of both layouts, as many as make one round's elements fit in `limit` bytes."""
    common = [c for c in source.registers if c in result.registers and c & (c - 1) == 0]
    rounds: list[int] = []
    while common and nbytes << (source.bits - len(rounds)) > limit:
        rounds.append(common.pop())
    return rounds


def write_tile(
    e: Emitter, form: Form, layout: Layout, value: Value, shared: str, access: Access, map_: Map | None = None
) -> None:
    """Every element once, at its place (mapped on)."""
    guard = guard_of(layout)
    pointer = isinstance(value.element, PointerType)

    def lines(i: Index) -> list[str]:
        text = e.dialect.to_number(form.text(i)) if pointer else form.text(i)
        return [f"{guard}{shared}[{place_of(layout, i, map_)}] = {text};"]

    e.each(layout.count, lines, [form], [access])


def fetch(e: Emitter, name: str, value: Value, layout: Layout, text: Callable[[Index], str], access: Access) -> Form:
    """Reads threadgroup memory into a new variable."""
    kind = e.type(value.element)
    space = "" if kind.endswith("*") else " "
    if layout.count == 1:
        e.each(1, lambda i: [f"{kind}{space}{name} = {text(i)};"], [], [access])
    else:
        e.each(layout.count, lambda i: [f"{name}[{i}] = {text(i)};"], [], [access], defines=[name],
               declaration=f"{kind}{space}{name}[{layout.count}];")  # fmt: skip
    return variable(name, layout.count)


def gather(e: Emitter, op: Op) -> None:
    """The source goes to threadgroup memory; every thread reads what its indices say."""
    source, index = op.operands
    axis = op.attributes["axis"]
    layout, theirs = e.assignment.chosen[op], e.assignment.first(op.operands[:1])
    shared, piece = e.scratch(source.element, 1 << theirs.bits)
    write_tile(e, e.form(source, theirs), theirs, source, shared, Access("write", piece))
    along = axis_bits(source.shape)
    columns = [0] * layout.bits  # the place in the source but for its coordinate along the axis
    for number, bits in enumerate(axis_bits(op.result.shape)):
        if number != axis:
            for bit, other in zip(bits, along[number]):
                columns[bit] = 1 << other
    shift = along[axis][0] if along[axis] else 0
    indices = e.form(index, layout)

    def text(i: Index) -> str:
        rest = place_of(layout, i, tuple(columns))
        own = f"{indices.operand(i)} << {shift}" if shift else indices.operand(i)
        return f"{shared}[{own if rest == '0' else f'({own}) + ({rest})'}]"

    form = fetch(e, e.name(op.result.name or "gathered"), op.result, layout, text, Access("read", piece))
    e.forms[op.result, layout] = form

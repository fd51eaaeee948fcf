"""Bytes that lie in registers four to a 32-bit word: what is done to each of them is done to the word.

A form may have `words` (forms.py): two bits of its register number tell the four bytes of a word apart, the others
number the words. Wide loads make words, views and shuffles of whole words keep them, bitwise operations, shifts by
constants, sums and differences compute on them, and sums of four products take them as they are. Everything else reads
single bytes, by a shift: words save instructions and change no result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nitinol.compiler.gpu.access import neighbours
from nitinol.compiler.gpu.flow import operand_layouts, source_registers
from nitinol.compiler.gpu.forms import Form, Index, Words, bare, expression, fixed, literal, squeeze, variable
from nitinol.compiler.gpu.layout import Layout, Map, compose, identity, view_map
from nitinol.compiler.ir import Function, Op, Value, combine_kind, constant_of, walk
from nitinol.language.types import DType, PointerType, int8, int32, uint8, uint16, uint32

if TYPE_CHECKING:
    from nitinol.compiler.gpu.emit import Emitter

_BITWISE = {"and": "&", "or": "|", "xor": "^"}
_BYTES = (int8, uint8)


def repeated(value: int) -> str:
    """A word of four equal bytes."""
    return f"0x{(value & 255) * 0x01010101:08x}u"


def single_bytes(words: Words, element: DType | PointerType, dialect: ModuleType) -> Form:
    """The bytes one by one, as int8 or uint8."""
    byte = dialect.type_name(uint8)

    def text(i: Index) -> str:
        shift = str(i.mapped(lambda n: (n >> words.bits[0] & 1) * 8 | (n >> words.bits[1] & 1) * 16))
        word = words.form.operand(words.number(i))
        text = f"{byte}({word})" if shift == "0" else f"{byte}({word} >> {f'({shift})' if ' ' in shift else shift})"
        return text if element == uint8 else dialect.bit_cast(dialect.type_name(int8), text)

    return Form(text, lambda i: words.form.names(words.number(i)), stored=words.form.stored, words=words)


def together(form: Form, bits: tuple[int, int], dialect: ModuleType) -> Form:
    """The words of a form, put together from single bytes if it has no such words."""
    if form.words is not None and form.words.bits == bits:
        return form.words.form
    kind, byte = dialect.type_name(uint32), dialect.type_name(uint8)

    def text(i: Index) -> str:
        first, parts = Words(bits, form).first(i), []
        for number in range(4):
            one = form.text(first.at((number & 1) << bits[0] | (number >> 1) << bits[1]))
            parts.append(f"{kind}({byte}({one}))" + (f" << {8 * number}" if number else ""))
        return " | ".join(parts)

    def names(i: Index) -> set[tuple[str, bool]]:
        return {(name, False) for name, _ in form.names(Words(bits, form).first(i))}

    return Form(text, names, False)


def computed(op: Op, operands: Sequence[Form], dialect: ModuleType, helpers: set[str]) -> Words | None:
    """The words of an elementwise operation's result; None if it goes by single bytes."""
    kind, element = op.kind, op.result.element
    found = next((form.words for form in operands if form.words is not None), None)
    if found is None or element not in _BYTES or any(v.element not in _BYTES for v in op.operands):
        return None
    if kind in ("cast", "bitcast"):
        return Words(found.bits, found.form)
    bits = found.bits
    constants: list[Any] = [constant_of(v) for v in op.operands]
    if kind in ("shl", "shr"):
        number = constants[1]
        if not isinstance(number, int) or not 0 <= number < 8 or operands[0].words is None:
            return None
        source, count, mask = field_of(operands[0].words)
        if kind == "shl":
            kept = repeated(mask << number)
            return Words(bits, expression(lambda x, c: f"{moved(x, c)} << {number} & {kept}", source, count))
        if element == int8:
            return None
        more = literal(str(int(count.text(fixed(0))) + number)) if count.simple else expression(
            lambda c: f"{c} + {number}", count)  # fmt: skip
        return field_words(bits, source, more, mask >> number)
    if kind == "sub" and constants[1] is not None:
        kind, constants[1] = "add", -constants[1]
    words = [
        together(form, bits, dialect) if constant is None else literal(repeated(int(constant)))
        for form, constant in zip(operands, constants)
    ]
    if kind in _BITWISE:
        if kind == "and" and constants[1] is not None and operands[0].words is not None:
            source, count, mask = field_of(operands[0].words)
            return field_words(bits, source, count, mask & int(constants[1]))
        return Words(bits, expression(lambda x, y: f"{x} {_BITWISE[kind]} {y}", *words))
    if kind == "not":
        return Words(bits, expression(lambda x: f"~{x}", *words))
    if kind in ("add", "sub"):
        helpers.add(f"{kind}_bytes")
        return Words(bits, expression(lambda x, y: f"{kind}_bytes({x}, {y})", *words, simple=True))
    return None


def field_of(words: Words) -> tuple[Form, Form, int]:
    return words.field or (words.form, literal("0"), 255)


def field_words(bits: tuple[int, int], source: Form, count: Form, mask: int) -> Words:
    """Words whose bytes are (source >> count) & mask."""
    form = expression(lambda x, c: f"{moved(x, c)} & {repeated(mask)}", source, count)
    return Words(bits, form, (source, count, mask))


def moved(word: str, count: str) -> str:
    return word if count == "0" else f"{word} >> {count}"


def chosen(
    parts: Sequence[Form], layout: Layout, cut: int, text: Callable[[Index, Sequence[Form]], str]
) -> Words | None:
    """The words of two joined tiles, told apart by the bit `cut` of the place; `text`: of the one that is chosen."""
    first, second = (part.words for part in parts)
    if first is None or second is None or first.bits != second.bits:
        return None
    if any(layout.registers[bit] >> cut & 1 for bit in first.bits):
        return None

    def choice(forms: Sequence[Form]) -> Form:
        by_byte = [Form(lambda i, f=f: f.text(first.number(i)), lambda i: set(), f.simple) for f in forms]  # type: ignore[misc]

        def names(i: Index) -> set[tuple[str, bool]]:
            return set().union(*(f.names(i) for f in forms))

        return Form(lambda i: text(first.first(i), by_byte), names, False)

    one, two = field_of(first), field_of(second)
    numbers = [fixed(number) for number in range(layout.count >> 2)]
    if one[2] == two[2] < 255 and all(one[0].text(n) == two[0].text(n) for n in numbers):
        return field_words(first.bits, one[0], choice([one[1], two[1]]), one[2])
    return Words(first.bits, choice([first.form, second.form]))


def store(e: Emitter, name: str, element: DType | PointerType, count: int, words: Words) -> Form:
    """Declares a variable of words and computes it."""
    return single_bytes(Words(words.bits, e.store_in(name, uint32, count >> 2, words.form)), element, e.dialect)


# ----------------------------------------------------------------------------------------------------------- loads


def loads_words(element: DType, layout: Layout, width: int) -> bool:
    """Whether a load of 2**width neighbours at a time makes words, of two halves if it must."""
    return element in _BYTES and width > 0 and len(layout.registers) >= 2


def loose_run(e: Emitter, op: Op, layout: Layout, width: int) -> int:
    """How many bits of neighbours a thread loads from an even address as whole words, 0 if it does not: without a mask,
    up to 32 bytes that it has side by side.

    Whole words reach over the ends of a run, never over those of an aligned word that has bytes of it: where these
    words are mapped at all, as on a GPU, whose memory begins and ends at multiples of 16 bytes, they are so as a whole.
    """
    if not e.dialect.LOOSE or width != 1 or len(op.operands) > 1:
        return 0
    first, neighbours_ = neighbours(layout)
    run = min(neighbours_, 5)
    while run >= 2 and e.assignment.widths.step(op.operands[0], first, run) != 1:
        run -= 1
    return run if run >= 2 else 0


def remainder(e: Emitter, pointer: Value, layout: Layout) -> Form:
    """A number congruent to an address modulo 4: the sum of those of its terms that are not multiples of 4, which in a
    loop of whole blocks does not change."""
    terms: list[Form] = []

    def collect(value: Value, layout: Layout, map_: Map) -> None:
        op = value.op
        if e.assignment.widths.multiple(value, 0) % 4 == 0:
            return
        if op is not None and op.kind in ("addptr", "add"):
            for operand in op.operands:
                collect(operand, layout, map_)
        elif op is not None and op.kind in ("broadcast", "reshape", "trans"):
            (source,), (needed,) = op.operands, operand_layouts(op, layout)
            view = view_map(op.kind, source.shape, value.shape, op.attributes)
            collect(source, needed, compose(source_registers(needed, layout, view), map_))
        else:
            steps = e.assignment.widths.steps(value, layout.registers) if value.shape else ()
            kept = sum(1 << bit for bit, step in enumerate(steps) if step is None or step % 4)
            map_ = tuple(column & kept for column in map_)  # one number for registers that are multiples of 4 apart
            form = e.form(value, layout if value.shape else None).through(map_)
            address, word = isinstance(value.element, PointerType), e.type(uint32)
            number = e.dialect.to_number if address else bare
            terms.append(expression(lambda x: f"{word}({number(x)})", form, simple=True))

    collect(pointer, layout, identity(len(layout.registers)))
    return expression(lambda *parts: " + ".join(parts) or "0", *terms)


def load_lines(
    e: Emitter, target: Form, pointer: Form, mask: Form | None, default: Callable[[Index], str], width: int,
    past: Form | None = None,
) -> Callable[[Index], list[str]]:  # fmt: skip
    """Lines that load into the variable `target` of words, 2**max(2, width) bytes; `default`: a word where the mask is
    not set. `past`: a number congruent to the address modulo 4, if that is even (loose_run)."""
    size = 1 << max(0, width - 2)
    half, word = e.type(PointerType(uint16)), e.type(PointerType(uint32))

    def cells(i: Index) -> list[str]:
        return [target.text(i.mapped(lambda n: n >> 2).at(number)) for number in range(size)]

    def defaults(i: Index) -> list[str]:
        return [default(i.at(number << 2)) for number in range(size)]

    def whole(i: Index) -> list[str]:
        if past is not None:
            kind, read, parts = e.dialect.loose_load(size, pointer.text(i), past.operand(i))
        elif size == 1:
            kind, read, parts = e.type(uint32), f"*({word})({pointer.text(i)})", ["wide"]
        else:
            kind, read, parts = e.dialect.wide_load(uint32, size, pointer.text(i))
        made = [f"{kind} wide = {read};", " ".join(f"{c} = {p};" for c, p in zip(cells(i), parts))]
        if size == 1 and past is None:
            made = [f"{cells(i)[0]} = {read};"]
        if mask is None:
            return made
        other = " ".join(f"{c} = {d};" for c, d in zip(cells(i), defaults(i)))
        return [f"if ({mask.text(i)}) {{", *("    " + line for line in made), "} else {", "    " + other, "}"]

    def halves(i: Index) -> list[str]:
        parts = []
        for number in (0, 2):
            read = f"{e.type(uint32)}(*({half})({pointer.text(i.at(number))}))"
            if mask is not None:
                other = f"{default(i)} {'>> 16' if number else '& 0xffff'}"
                read = f"({mask.operand(i.at(number))} ? {read} : {other})"
            parts.append(read)
        return [f"{cells(i)[0]} = {parts[0]} | {parts[1]} << 16;"]

    return halves if width == 1 else whole


def loaded(e: Emitter, name: str, element: DType, count: int) -> tuple[Form, Form]:
    """The variable of words, and the bytes in it."""
    target = variable(name, count >> 2)
    return target, single_bytes(Words((0, 1), target), element, e.dialect)


# ------------------------------------------------------------------------------------------------- sums of products


def byte_products(function: Function, uses: dict[Value, list[Op]]) -> dict[Op, Value]:
    """Sums of products of bytes in int32, and those products where nothing else is done with them."""
    found = {}
    for op in walk(function.body):
        if op.kind == "reduce" and combine_kind(op) == "add" and op.operands[0].element == int32:
            product, user = op.operands[0], op
            while (made := product.op) is not None and made.kind == "reshape" and uses[product] == [user]:
                product, user = made.operands[0], made
            if made is not None and made.kind == "mul" and uses[product] == [user]:
                casts = [v.op for v in made.operands]
                if all(c is not None and c.kind == "cast" and c.operands[0].element in _BYTES for c in casts):
                    found[op] = product
    return found


def four_products(
    e: Emitter, op: Op, layout: Layout, along: int
) -> tuple[tuple[int, int], list[Form], Callable[[Index, str], str]] | None:
    """For a sum of products of bytes: the bits of its operands' words, those words, and the text of four products
    added to a sum; None if the bytes of words lie across the sum. `along`: the registers' bits that are summed."""
    made = e.byte_products[op].op
    assert made is not None
    values = [cast.op.operands[0] for cast in made.operands]  # type: ignore[union-attr]
    if any((value, layout) not in e.forms for value in values):
        return None  # the product is moved
    forms = [e.form(value, layout) for value in values]
    found = [f.words.bits for f in forms if f.words is not None and all(along >> bit & 1 for bit in f.words.bits)]
    if not found:
        return None
    name = f"dot4_{''.join('s' if value.element == int8 else 'u' for value in values)}"
    e.helpers.add(name)
    words = [together(form, found[0], e.dialect) for form in forms]
    within = squeeze(along, found[0])
    count = None
    exact = values[0].element == uint8 and bin(along).count("1") <= 8  # sums of 256 products, times 128 at most
    if exact and forms[0].words is not None and forms[0].words.bits == found[0]:
        source, count, mask = field_of(forms[0].words)
        texts = [count.text(fixed(number)) for number in range(layout.count >> 2)]
        if any(text != texts[n & ~within] for n, text in enumerate(texts)) or set(texts) == {"0"}:
            count = None
        else:  # the sum is shifted, once, not each word
            words[0] = expression(lambda x, c: f"{x} & ({repeated(mask)} << {c})", source, count)

    def onto(i: Index, start: str) -> str:
        text = f"{name}({words[0].text(i)}, {words[1].text(i)}, {start})"
        if count is None:
            return text
        shifted = f"{text} >> {count.operand(i)}"
        return f"(r & {within}) == {within} ? {shifted} : {text}" if within else shifted

    return found[0], words, onto

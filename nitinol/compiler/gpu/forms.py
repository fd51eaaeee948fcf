"""How a value is written in the source: a variable, an array with one element per register, or an expression.

The text of a tile depends on the register that is asked for. A register number is a linear map of the loop variable
`r`, so a view is nothing but another map, and reading through it costs an index such as `r >> 2`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nitinol.compiler.gpu.layout import Map, apply, compose, identity


@dataclass(frozen=True)
class Index:
    """A register number in the text: a linear map of the bits of the loop variable `r`, and a constant part."""

    columns: Map
    constant: int = 0

    def through(self, map_: Map) -> Index:
        return Index(compose(map_, self.columns), apply(map_, self.constant))

    def at(self, number: int) -> Index:
        """The same with the constant part changed by xor."""
        return Index(self.columns, self.constant ^ number)

    def mapped(self, map_: Callable[[int], int]) -> Index:
        """The same with a linear function's images."""
        return Index(tuple(map_(column) for column in self.columns), map_(self.constant))

    @property
    def plain(self) -> bool:
        return self.constant == 0 and self.columns == identity(len(self.columns))

    def __str__(self) -> str:
        text = linear(self.columns, "r")
        if text == "0":
            return str(self.constant)
        if not self.constant:
            return text
        covered = 0
        for column in self.columns:
            covered |= column
        return f"({text}) ^ {self.constant}" if covered & self.constant else joined([text, str(self.constant)])


class Stepped(Index):
    """`r` in a loop that goes in steps: its low bits are zero."""

    def __str__(self) -> str:
        if self.columns and all(column in (0, 1 << bit) for bit, column in enumerate(self.columns)):
            return f"r + {self.constant}" if self.constant else "r"
        return super().__str__()

    def at(self, number: int) -> Index:
        return Stepped(self.columns, self.constant ^ number)


def fixed(number: int) -> Index:
    return Index((), number)


def linear(columns: Map, name: str, first: int = 0) -> str:
    """C for a linear map of the bits of `name` (bit `first` is the first): shifted and masked runs, added.

    Bits above the last column are zero in the variable, so the mask of the topmost run is left out.
    """
    runs: list[tuple[int, int, int]] = []  # first bit, count, shift to the left
    odd: list[str] = []
    for bit, column in enumerate(columns):
        if not column:
            continue
        if column & (column - 1) or any(column & other for i, other in enumerate(columns) if i != bit):
            odd.append(f"({name} >> {bit + first} & 1) * {column}")
            continue
        shift = column.bit_length() - 1 - bit - first
        if runs and runs[-1][0] + runs[-1][1] == bit + first and runs[-1][2] == shift:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, shift)
        else:
            runs.append((bit + first, 1, shift))
    parts = []
    for start, count, shift in runs:
        top = start + count == len(columns) + first
        if shift < 0:
            text = f"{name} >> {-shift}"
        elif shift:
            text = f"{name} << {shift}"
        else:
            text = name
        low = max(0, start + shift)
        if not top or (start and not (shift < 0 and start == -shift)):
            text = f"{text} & {((1 << count) - 1) << low}"
        parts.append(text)
    return (" ^ ".join(parts + odd) if odd else joined(parts)) or "0"


def joined(parts: list[str]) -> str:
    """Numbers that have no bits in common, together: as a sum, which compilers take apart for addresses."""
    return " + ".join(f"({part})" if " " in part and len(parts) > 1 else part for part in parts)


@dataclass(frozen=True)
class Form:
    """`text(index)`: the value in that register. `names(index)`: the arrays it reads and whether plainly at r.

    `simple`: needs no parentheses as an operand. `parts`: base and offset of a pointer expression. `variable`: the
    name if it is a variable, which may be assigned to. `stored`: is or reads a variable, so that its text may be
    repeated. `words`: the 32-bit words in which bytes lie four together.
    """

    text: Callable[[Index], str]
    names: Callable[[Index], set[tuple[str, bool]]]
    simple: bool = True
    parts: tuple[Form, Form] | None = None
    variable: str = ""
    stored: bool = False
    words: Words | None = None

    def operand(self, index: Index) -> str:
        text = self.text(index)
        return text if self.simple else f"({text})"

    def through(self, map_: Map) -> Form:
        """The value whose register i is this one's register map_(i)."""
        if map_ == identity(len(map_)):
            return self
        parts = None if self.parts is None else (self.parts[0].through(map_), self.parts[1].through(map_))
        return Form(
            lambda i: self.text(i.through(map_)), lambda i: self.names(i.through(map_)), self.simple, parts,
            stored=self.stored, words=self.words and self.words.through(map_),
        )  # fmt: skip


def shifted(form: Form, map_: Map, constant: int) -> Form:
    """Register i is the form's register map_(i) ^ constant."""

    def index(i: Index) -> Index:
        return i.through(map_).at(constant)

    parts = None if form.parts is None else tuple(shifted(p, map_, constant) for p in form.parts)
    words = form.words and form.words.through(map_, constant)
    return Form(lambda i: form.text(index(i)), lambda i: form.names(index(i)), form.simple, parts, words=words)  # type: ignore[arg-type]


def squeeze(number: int, bits: tuple[int, int]) -> int:
    """A number without two of its bits."""
    for bit in sorted(bits, reverse=True):
        number = number >> (bit + 1) << bit | number & ((1 << bit) - 1)
    return number


def unsqueeze(number: int, bits: tuple[int, int]) -> int:
    """A number with two more bits, of 0."""
    for bit in sorted(bits):
        number = number >> bit << (bit + 1) | number & ((1 << bit) - 1)
    return number


@dataclass(frozen=True)
class Words:
    """`form`'s registers are 32-bit words of four bytes each, numbered as the bytes' registers without the two `bits`,
    which number the bytes of a word, the lower one first. `field`: words, a count and a mask, if each byte is (byte >>
    count) & mask of the same byte of these words."""

    bits: tuple[int, int]
    form: Form
    field: tuple[Form, Form, int] | None = None

    def number(self, index: Index) -> Index:
        """The word of a byte."""
        return index.mapped(lambda number: squeeze(number, self.bits))

    def first(self, index: Index) -> Index:
        """The first byte of a word."""
        return index.mapped(lambda number: unsqueeze(number, self.bits))

    def through(self, map_: Map, constant: int = 0) -> Words | None:
        """The words of a view whose register i is the register map_(i) ^ constant; None if it takes words apart."""
        wanted = [1 << bit for bit in self.bits]
        bits = tuple(map_.index(column) for column in wanted if map_.count(column) == 1)
        others = [constant, *(column for column in map_ if column not in wanted)]
        if len(bits) < 2 or any(column & sum(wanted) for column in others):
            return None
        view = tuple(squeeze(column, self.bits) for column in map_ if column not in wanted)
        number = squeeze(constant, self.bits)

        def viewed(form: Form) -> Form:
            return shifted(form, view, number) if constant else form.through(view)

        field = self.field and (viewed(self.field[0]), viewed(self.field[1]), self.field[2])
        return Words((bits[0], bits[1]), viewed(self.form), field)


def variable(name: str, count: int) -> Form:
    """A declared variable, an array if there is more than one register."""
    if count == 1:
        return Form(lambda i: name, lambda i: {(name, True)}, variable=name, stored=True)
    return Form(lambda i: f"{name}[{i}]", lambda i: {(name, i.plain)}, variable=name, stored=True)


def expression(make: Callable[..., str], *operands: Form, simple: bool = False) -> Form:
    """An expression of other forms in the same registers; `make` gets their texts."""

    def names(index: Index) -> set[tuple[str, bool]]:
        return set().union(*(o.names(index) for o in operands)) if operands else set()

    return Form(lambda i: make(*(o.operand(i) for o in operands)), names, simple)


def literal(text: str) -> Form:
    return Form(lambda i: text, lambda i: set())


def bare(text: str) -> str:
    """Without parentheses around the whole."""
    return text[1:-1] if text.startswith("(") and _closing(text, 0) == len(text) - 1 else text


def lean(left: str, operator: str, right: str) -> str:
    """A sum or product without parentheses that precedence makes superfluous."""
    if operator in "+-":
        left = bare(left) if _operators(bare(left)) <= set("*/%+-") else left
        right = bare(right) if _operators(bare(right)) <= set("*/%") else right
    return f"{left} {operator} {right}"


def _operators(text: str) -> set[str]:
    """The operators outside of brackets; what is not between spaces is none."""
    depth, out = 0, ""
    for character in text:
        depth -= character in ")]"
        out += character if depth == 0 else "."
        depth += character in "(["
    words = out.split()
    return {"?"} if text.startswith(("-", "(")) and not closed(text) else set(words[1::2])


def closed(text: str) -> bool:
    """Whether a text can be an operand as it is: a name, number, call or index, or something in parentheses."""
    at = 0
    while at < len(text) and (text[at].isalnum() or text[at] in "_.:"):
        at += 1
    if at < len(text) and text[at] == "<" and at and (end := text.find(">", at)) > 0 and text[end + 1 : end + 2] == "(":
        at = end + 1  # as_type<int>(...)
    while at < len(text) and text[at] in "([":
        at = _closing(text, at) + 1
    return at == len(text)


def _closing(text: str, start: int) -> int:
    """Where the bracket at `start` is closed."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] in "([") - (text[at] in ")]")
        if depth == 0:
            return at
    return len(text)

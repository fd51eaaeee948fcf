"""Metal source as tokens, brackets matched, and the declarations they make up.

The text has been preprocessed: macros are expanded, line markers kept."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

TOKEN = re.compile(
    r"""(?P<line>^[ \t]*\#[^\n]*)|(?P<space>\s+)|(?P<word>[A-Za-z_]\w*)
    |(?P<number>\.?[0-9](?:[eEpP][+-]|[\w.'])*)|(?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')
    |(?P<mark>::|->\*?|\+\+|--|<<=|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|\.\.\.|.)""",
    re.X | re.M,
)
SCALARS = ("char", "uchar", "short", "ushort", "int", "uint", "long", "ulong", "half", "float", "bfloat", "bool")
VECTORS = {f"{s}{n}" for s in SCALARS for n in (2, 3, 4)}
MATRICES = {f"{s}{c}x{r}" for s in ("half", "float", "bfloat") for c in (2, 3, 4) for r in (2, 3, 4)}
SPACES = {"device", "constant", "threadgroup", "thread"}


class MetalError(Exception):
    """The source is not valid Metal; the message names the line."""


def error(line: int, message: str) -> MetalError:
    return MetalError(f"program_source:{line}: error: {message}")


@dataclass
class Token:
    kind: str
    text: str
    line: int


def tokenize(text: str) -> list[Token]:
    tokens, line = [], 1
    for m in TOKEN.finditer(text):
        kind, word = str(m.lastgroup), m.group()
        tokens.append(Token(kind, word, line))
        line += word.count("\n")
        if kind == "line" and (marker := re.match(r"#\s*(?:line\s+)?(\d+)\s", word.strip())):
            line = int(marker.group(1)) - 1
    return tokens


class Code:
    """The significant tokens of a text; edits go into the tokens, spaces and line breaks stay."""

    def __init__(self, text: str) -> None:
        self.all = tokenize(text)
        self.t = [t for t in self.all if t.kind not in ("space", "line")]
        self.plain = [t.text for t in self.t]  # as it was before any edit
        self.match: dict[int, int] = {}
        stack: list[int] = []
        pairs = {")": "(", "]": "[", "}": "{"}
        for i, w in enumerate(self.plain):
            if w in ("(", "[", "{"):
                stack.append(i)
            elif w in pairs:
                if not stack or self.plain[stack[-1]] != pairs[w]:
                    raise error(self.t[i].line, f"unmatched '{w}'")
                j = stack.pop()
                self.match[i], self.match[j] = j, i
        if stack:
            raise error(self.t[stack[-1]].line, f"unmatched '{self.plain[stack[-1]]}'")

    def text(self) -> str:
        return "".join(t.text for t in self.all)

    def angle(self, i: int, conditions: bool = False) -> int:
        """The index of the `>` that closes the `<` at i, or -1; `conditions`: with && and || between."""
        depth = 0
        while i < len(self.plain):
            w = self.plain[i]
            if w in ("(", "[", "{"):
                i = self.match[i]
            elif w == "<" and (self.t[i - 1].kind == "word" or not depth):  # else a comparison: `sizeof(T) < 8`
                depth += 1
            elif w == ">":
                depth -= 1
                if depth == 0:
                    return i
            elif w in (";", ")", "}") or (w in ("&&", "||") and not conditions):
                return -1
            i += 1
        return -1

    def spell(self, a: int, b: int) -> str:
        return " ".join(self.plain[a:b])

    def blank(self, a: int, b: int) -> None:
        for i in range(a, b):
            self.t[i].text = ""


@dataclass
class Chunk:
    """One declaration at namespace scope: tokens [start, end), its name, and the parts that matter."""

    start: int
    end: int
    scope: str
    template: tuple[int, int] | None = None  # of `<...>` after `template`, without the brackets
    instantiation: bool = False
    name: str = ""
    name_at: int = -1
    parameters: tuple[int, int] | None = None  # inside the parentheses
    body: tuple[int, int] | None = None  # inside the braces of a function
    kernel: bool = False
    kind: str = ""  # function, type, variable, alias, other


def chunks(code: Code, start: int = 0, end: int | None = None, scope: str = "") -> Iterator[Chunk]:
    """The declarations of a range, namespaces entered."""
    p = code.plain
    end = len(p) if end is None else end
    i = start
    while i < end:
        if p[i] == ";":
            i += 1
        elif p[i] in ("public", "private", "protected") and p[i + 1] == ":":
            i += 2
        elif p[i] == "namespace" or (p[i] == "inline" and p[i + 1] == "namespace"):
            brace = p.index("{", i)
            inner = "::".join(w for w in p[i:brace] if w not in ("namespace", "inline", "::"))
            yield from chunks(code, brace + 1, code.match[brace], f"{scope}{inner}::" if inner else scope)
            i = code.match[brace] + 1
        elif p[i] == "extern" and i + 2 < end and p[i + 2] == "{":
            yield from chunks(code, i + 3, code.match[i + 2], scope)
            i = code.match[i + 2] + 1
        else:
            chunk = declaration(code, i, end, scope)
            yield chunk
            i = chunk.end


def declaration(code: Code, i: int, end: int, scope: str) -> Chunk:
    p, c = code.plain, Chunk(i, end, scope)
    while i < end and p[i] == "template":
        if p[i + 1] == "<":
            close = code.angle(i + 1, conditions=True)
            if close < 0:
                raise error(code.t[i].line, "a template parameter list without its end")
            c.template = (i + 2, close)
            i = close + 1
        else:
            c.instantiation, i = True, i + 1
    is_type = assigned = False
    while i < end:
        w = p[i]
        if w == "[" and i + 1 < end and p[i + 1] == "[":
            if p[i + 2] == "kernel":
                c.kernel = True
            i = code.match[i] + 1
            continue
        if w == "kernel":
            c.kernel = True
        elif w in ("struct", "class", "union", "enum") and not c.parameters:
            is_type = True
        elif w in ("using", "typedef"):
            c.kind = "alias"
        elif w == "=" and p[i + 1] not in ("default", "delete"):
            assigned = True
        elif w == "<" and not assigned and (close := code.angle(i)) > 0:
            i = close + 1
            continue
        elif w == "(" and p[i - 1 : i + 2] == ["operator", "(", ")"]:
            i += 2
            continue
        elif w == "(":
            before = i - 1
            if p[before] == ">" and c.name_at < 0:
                before = next((k for k in range(i - 2, c.start, -1) if p[k] == "<" and code.angle(k) == i - 1), i) - 1
            skip = p[before] in ("decltype", "alignas", "__attribute__", "noexcept", "static_assert", "requires")
            if not c.parameters and not assigned and not skip and not is_type:
                c.parameters = (i + 1, code.match[i])
                operator = next((k for k in range(before, max(before - 3, c.start), -1) if p[k] == "operator"), None)
                c.name_at, c.name = operator or before, "operator" if operator else p[before]
            i = code.match[i] + 1
            continue
        elif w == "{":
            close = code.match[i]
            if c.parameters and not assigned:
                c.body, c.kind, c.end = (i + 1, close), "function", close + 1
                return c
            if is_type and not c.name:
                c.name = next((x for x in reversed(p[c.start : i]) if x.isidentifier() and x not in ("final",)), "")
                if ":" in p[c.start : i]:
                    colon = p.index(":", c.start, i)
                    c.name = p[colon - 1]
                c.body = (i + 1, close)
            i = close + 1
            continue
        elif w == ";":
            c.end = i + 1
            break
        i += 1
    if c.kind == "alias":
        c.name = p[c.end - 2] if "typedef" in p[c.start : c.end] else p[p.index("using", c.start) + 1]
    if not c.kind:
        c.kind = "type" if is_type and c.body else "function" if c.parameters and not assigned else "variable"
        if is_type and not c.body:
            c.kind = "type" if len([x for x in p[c.start : c.end] if x.isidentifier()]) <= 2 else c.kind
    return c


def classes(code: Code, found: list[Chunk]) -> Iterator[tuple[Chunk, list[Chunk]]]:
    """Every class with its members, inner classes first."""
    for c in found:
        if c.kind == "type" and c.body:
            members = list(chunks(code, *c.body))
            yield from classes(code, members)
            yield c, members


def split(code: Code, start: int, end: int) -> list[tuple[int, int]]:
    """The parts of a comma-separated list."""
    parts, i, at = [], start, start
    while i < end:
        w = code.plain[i]
        if w in ("(", "[", "{"):
            i = code.match[i]
        elif w == "<" and (close := code.angle(i)) > 0 and close < end:
            i = close
        elif w == ",":
            parts.append((at, i))
            at = i + 1
        i += 1
    return [*parts, (at, end)] if at < end else parts

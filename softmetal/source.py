"""Metal source to what clang compiles: finds the kernels, and rewrites the few things that clang lacks.

The text has been preprocessed (macros expanded, line markers kept), so what is left is tokens. Every rewrite
keeps line breaks where they were: clang's messages and the debug information speak of the user's lines.

- `kernel void f(...)` becomes `template <int sm_id> inline void f(...)`: a kernel exists only where an entry
  point asks for it, and knows which one it is.
- Explicit instantiations (`template [[host_name("f_float")]] kernel void f<float>(...)`) become entry points.
- Threadgroup variables of a kernel become references into the threadgroup's memory.
- `float4(...)`, `(float4)x` and `static_cast<float4>(x)` become calls that clang's vectors lack.
- Function constants get the values they are specialised with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

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
# Words that C++ for OpenCL reserves and Metal does not.
RESERVED = {
    "local", "global", "generic", "pipe", "kernel_", "read_only", "write_only", "read_write", "event_t",
    "sampler_t", "queue_t", "clk_event_t", "reserve_id_t", "image2d_t", "image1d_t", "image3d_t", "vec_step", "addrspace_cast",
}  # fmt: skip
SYNCHRONISES = re.compile(
    r"^(simd_\w+|quad_\w+|simdgroup_(barrier|matrix|load|store|multiply\w*|make_\w+|\w+8x8)|threadgroup_barrier"
    r"|make_filled_simdgroup_matrix|make_diagonal_simdgroup_matrix|threadgroup)$"
)
FLOATING = re.compile(r"^(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][+-]?\d+)?$|^0[xX][\da-fA-F.]+[pP][+-]?\d+$")
POSITIONS = {
    "thread_position_in_grid": "sm_position{g->position[0] * d->size[0] + X, g->position[1] * d->size[1] + Y, "
    "g->position[2] * d->size[2] + Z}",
    "thread_position_in_threadgroup": "sm_position{X, Y, Z}",
    "thread_index_in_threadgroup": "sm_scalar_position{I}",
    "threadgroup_position_in_grid": "sm_position{g->position[0], g->position[1], g->position[2]}",
    "threadgroups_per_grid": "sm_position{d->groups[0], d->groups[1], d->groups[2]}",
    "threads_per_grid": "sm_position{d->threads[0], d->threads[1], d->threads[2]}",
    "threads_per_threadgroup": "sm_position{g->size[0], g->size[1], g->size[2]}",
    "dispatch_threads_per_threadgroup": "sm_position{d->size[0], d->size[1], d->size[2]}",
    "thread_index_in_simdgroup": "sm_scalar_position{I % 32}",
    "simdgroup_index_in_threadgroup": "sm_scalar_position{I / 32}",
    "simdgroups_per_threadgroup": "sm_scalar_position{(g->count + 31) / 32}",
    "dispatch_simdgroups_per_threadgroup": "sm_scalar_position{(d->size[0] * d->size[1] * d->size[2] + 31) / 32}",
    "threads_per_simdgroup": "sm_scalar_position{32}",
    "thread_execution_width": "sm_scalar_position{32}",
    "thread_index_in_quadgroup": "sm_scalar_position{I % 4}",
    "quadgroup_index_in_threadgroup": "sm_scalar_position{I / 4}",
    "quadgroups_per_threadgroup": "sm_scalar_position{(g->count + 3) / 4}",
    "dispatch_quadgroups_per_threadgroup": "sm_scalar_position{(d->size[0] * d->size[1] * d->size[2] + 3) / 4}",
    "grid_origin": "sm_position{0, 0, 0}",
    "grid_size": "sm_position{d->threads[0], d->threads[1], d->threads[2]}",
}


class MetalError(Exception):
    """The source is not valid Metal; the message names the line."""


@dataclass
class Argument:
    """A parameter of a kernel. `kind`: buffer, threadgroup, position. `space`: device, constant, threadgroup."""

    kind: str
    index: int
    space: str
    name: str
    reference: bool = False
    attribute: str = ""


@dataclass
class Kernel:
    """An entry point: the name a host asks for, and what to call."""

    name: str
    call: str
    arguments: list[Argument]
    fibers: bool
    max_threads: int = 1024
    threadgroup_bytes: int = 0

    def json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Token:
    kind: str
    text: str
    line: int


@dataclass
class Constant:
    """A function constant: its index, type and name."""

    index: int
    type: str
    name: str


@dataclass
class Program:
    """What `rewrite` returns: the text for clang, and what the text contains."""

    text: str
    kernels: list[Kernel]
    constants: list[Constant]
    suspects: list[str] = field(default_factory=list)  # functions that may call themselves


def error(line: int, message: str) -> MetalError:
    return MetalError(f"program_source:{line}: error: {message}")


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
            elif w == "<":
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
    returns_thread: bool = False  # of a method: a reference or pointer to memory of the thread
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
        elif w == "=":
            assigned = True
        elif w == "<" and not assigned and (close := code.angle(i)) > 0:
            i = close + 1
            continue
        elif w == "(":
            before = i - 1
            if p[before] == ">" and c.name_at < 0:
                before = next((k for k in range(i - 2, c.start, -1) if p[k] == "<" and code.angle(k) == i - 1), i) - 1
            skip = p[before] in ("decltype", "alignas", "__attribute__", "noexcept", "static_assert", "requires")
            if not c.parameters and not assigned and not skip and not is_type:
                c.parameters = (i + 1, code.match[i])
                operator = next((k for k in range(before, max(before - 3, c.start), -1) if p[k] == "operator"), None)
                c.name_at, c.name = before, "operator" if operator else p[before]
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
    return parts + [(at, end)] if at < end else parts


def arguments(code: Code, chunk: Chunk) -> list[Argument]:
    """What the parameters of a kernel are; a buffer without an index takes the first free one."""
    result: list[Argument] = []
    assert chunk.parameters
    for a, b in split(code, *chunk.parameters):
        line = code.t[a].line
        attributes: dict[str, str] = {}
        words: list[str] = []
        i = a
        while i < b:
            if code.plain[i] == "[" and code.plain[i + 1] == "[":
                for x, y in split(code, i + 2, code.match[i + 1]):
                    value = code.spell(x + 2, y - 1) if y - x > 2 else ""
                    attributes[code.plain[x]] = value
                i = code.match[i] + 1
                continue
            words.append(code.plain[i])
            i += 1
        if words == ["void"]:
            continue
        name = next((w for w in reversed(words) if w.isidentifier()), "")
        space = next((w for w in words if w in SPACES), "")
        by_address = "*" in words or "&" in words or words[-1] == "]"
        position = next((k for k in attributes if k in POSITIONS), "")
        if position:
            result.append(Argument("position", -1, "", name, attribute=position))
            continue
        if any(w.startswith(("texture", "depth", "sampler", "imageblock", "visible_function")) for w in words):
            raise error(line, f"the kernel's parameter '{name}' is a texture, sampler or function table, "
                        "which softmetal does not have; use buffers")  # fmt: skip
        if not by_address:
            raise error(line, f"the kernel's parameter '{name}' has no attribute that says where it comes from, "
                        "such as [[thread_position_in_grid]] or [[buffer(0)]]")  # fmt: skip
        if space not in ("device", "constant", "threadgroup"):
            raise error(line, f"the kernel's parameter '{name}' is a pointer or reference without an address space: "
                        "write device, constant or threadgroup")  # fmt: skip
        kind = "threadgroup" if space == "threadgroup" else "buffer"
        try:
            index = int(eval(attributes[kind], {"__builtins__": {}})) if kind in attributes else -1
        except Exception:
            raise error(line, f"the index of [[{kind}({attributes[kind]})]] is not a constant number") from None
        if index > 30:
            raise error(line, f"[[{kind}({index})]] of '{name}': a kernel has at most 31 of them, 0 to 30")
        result.append(Argument(kind, index, space, name, "&" in words))
    for kind in ("buffer", "threadgroup"):
        used = {x.index for x in result if x.kind == kind}
        if len([x for x in result if x.kind == kind and x.index >= 0]) > len(used - {-1}):
            raise error(code.t[chunk.start].line, f"two parameters of '{chunk.name}' have the same {kind} index")
        for x in result:
            if x.kind == kind and x.index < 0:
                x.index = next(n for n in range(99) if n not in used)
                used.add(x.index)
                if x.index > 30:
                    raise error(code.t[chunk.start].line, f"'{chunk.name}' has more than 31 {kind} parameters")
    return result


def reaches_others(code: Code, all_chunks: list[Chunk], chunk: Chunk) -> bool:
    """Whether a kernel, or something whose name it mentions, meets other threads; if not, it is a plain loop."""
    by_name: dict[str, list[Chunk]] = {}
    for c in all_chunks:
        by_name.setdefault(c.name, []).append(c)
    seen, todo = {id(chunk)}, [chunk]
    while todo:
        c = todo.pop()
        start = c.parameters[0] if c.kernel and c.parameters else c.start
        for k in range(start, c.end):
            w = code.plain[k]
            if SYNCHRONISES.match(w):
                return True
            if code.t[k].kind == "word":
                for other in by_name.get(w, ()):
                    if id(other) not in seen:
                        seen.add(id(other))
                        todo.append(other)
    return False


def template_names(code: Code, span: tuple[int, int]) -> list[str]:
    names = []
    for a, b in split(code, *span):
        b = next((k for k in range(a, b) if code.plain[k] == "="), b)
        names += [w for w in code.plain[a:b] if w.isidentifier()][-1:]
    return names


def type_names(code: Code) -> set[str]:
    """Names that may stand for a vector: template type parameters and aliases."""
    p, names = code.plain, set(VECTORS | MATRICES)
    for i, w in enumerate(p[:-2]):
        if w in ("typename", "class") and p[i + 1].isidentifier() and p[i + 2] in (",", ">", "="):
            names.add(p[i + 1])
        elif w == "using" and p[i + 1].isidentifier() and p[i + 2] == "=":
            names.add(p[i + 1])
        elif w == "typedef" and ";" in p[i : i + 60]:
            names.add(p[p.index(";", i) - 1])
    return {n for n in names if n.isidentifier()}


def rewrite_vectors(code: Code) -> None:
    """Constructors and casts of types that are, or may be, vectors."""
    p, t, names = code.plain, code.t, type_names(code)
    declarators = SPACES | {"const", "typename", "struct", "class", "enum", "using", "new", "operator", "~", "goto"}
    for i, w in enumerate(p):
        nxt = p[i + 1] if i + 1 < len(p) else ""
        before = p[i - 1] if i else ""
        if w in ("vec", "matrix") and nxt == "<" and (close := code.angle(i + 1)) > 0:
            if p[close + 1] == "(" and before not in ("using", "operator"):
                start = i - 2 if before == "::" else i
                t[start].text = "sm_make<" + t[start].text
                t[close].text += ">"
            elif before == "(" and p[close + 1] == ")" and is_cast(code, i - 1, close + 1):
                t[i - 1].text, t[close + 1].text = "sm_caster<", ">{} ->* "
        elif w in names and nxt == "(" and before not in declarators:
            follows_type = (t[i - 1].kind == "word" and before not in ("return", "else", "case", "do")) if i else False
            if not follows_type and before not in ("::", "<", ">") or (before in ("<", ">") and not follows_type):
                t[i].text = f"sm_make<{t[i].text}>"
            elif before == "::" and p[i - 2] == "metal":
                t[i - 2].text, t[i].text = "sm_make<metal", t[i].text + ">"
        elif w == "{" and before in ("(", ",") and p[enclosing(code, i)] == "(" and p[code.match[i] + 1] in (",", ")"):
            t[i].text, t[code.match[i]].text = "sm_list(", ")"  # an argument `{x, y}`
        elif w in VECTORS and nxt.isidentifier() and p[i + 2 : i + 4] == ["=", "{"] and before in (";", "{", "}", ")"):
            close = code.match[i + 3]
            if p[close + 1] == ";" and "{" not in p[i + 4 : close]:
                t[i + 3].text, t[close].text = f"sm_fill<{t[i].text}>(", ")"  # the rest is zero
        elif w in VECTORS and nxt.isidentifier() and p[i + 2] == "(" and constructs(code, i + 2):
            t[i + 1].text += f" = sm_make<{t[i].text}>"  # `short2 at(x, y);`
        elif w in names and before == "(" and nxt == ")" and is_cast(code, i - 1, i + 1):
            t[i - 1].text, t[i + 1].text = "sm_caster<", ">{} ->* "
        elif w == "static_cast" and nxt == "<" and (p[i + 2] in names or p[i + 2] == "vec"):
            close = code.angle(i + 1)
            if close == i + 3 or p[i + 2] == "vec":
                t[i].text = "sm_make"


def enclosing(code: Code, i: int) -> int:
    """The opening bracket around token i, or 0."""
    i -= 1
    while i > 0 and not (code.plain[i] in ("(", "[", "{") and i in code.match):
        i = code.match[i] if code.plain[i] in (")", "]", "}") else i
        i -= 1
    return max(i, 0)


def constructs(code: Code, opening: int) -> bool:
    """Whether `T name(...)` makes a variable: the parentheses hold values, not parameters, and end the statement."""
    p, first = code.plain, code.plain[opening + 1]
    types = VECTORS | MATRICES | SPACES | {*SCALARS, "const", "void", ")", "unsigned", "size_t", "thread"}
    return p[code.match[opening] + 1] == ";" and (first not in types or p[opening + 2] == "(")


def is_cast(code: Code, opening: int, closing: int) -> bool:
    """Whether `(T)` is a cast: nothing before it that it could be the argument of, an operand after it."""
    p = code.plain
    before, after = (p[opening - 1] if opening else ""), (p[closing + 1] if closing + 1 < len(p) else "")
    if before == ">" or (before.isidentifier() and before not in ("return", "else", "case")):
        return False
    kind = code.t[closing + 1].kind if closing + 1 < len(p) else ""
    return kind in ("word", "number", "string") or after in ("(", "-", "+", "!", "~", "*", "&", "::", "{", "++", "--")


def rewrite_threadgroup_variables(code: Code, chunk: Chunk) -> None:
    """`threadgroup float x[32];` in a kernel's body becomes a reference to memory of the threadgroup."""
    assert chunk.body
    p, t, count = code.plain, code.t, 0
    i, end = chunk.body
    while i < end:
        if p[i] != "threadgroup":
            i += 1
            continue
        start = i
        while p[start - 1] not in (";", "{", "}", ":"):
            start -= 1
            if p[start] in (")", "]"):
                start = code.match[start]
        if any(w in ("(", "<", "using", "typedef") for w in p[start:i]) and "alignas" not in p[start:i]:
            i += 1
            continue
        stop, declarators, pointer = i + 1, [i + 1], False
        while p[stop] != ";":
            if p[stop] in ("(", "[", "{"):
                stop = code.match[stop]
            elif p[stop] == "<" and (close := code.angle(stop)) > 0:
                stop = close
            elif p[stop : stop + 2] == ["=", "{"]:  # Metal ignores it
                code.blank(stop, code.match[stop + 1] + 1)
                stop = code.match[stop + 1]
            elif p[stop] in ("*", "&", "=") or p[stop] in (")", "}"):
                pointer = True
                break
            elif p[stop] == ",":
                declarators.append(stop + 1)
            stop += 1
        if pointer:
            i += 1
            continue
        declarators.append(stop + 1)
        names = []
        for a, b in zip(declarators, declarators[1:]):
            bracket = next((k for k in range(a, b) if p[k] == "["), b - 1)
            names.append(t[bracket - 1].text)
        t[start].text = f"struct sm_tg{count} {{ " + ("" if start == i else t[start].text)
        if start != i:
            t[i].text = ""
        references = " ".join(f"threadgroup auto& {n} = sm_tg_at{count}->{n};" for n in names)
        t[stop].text = (
            f"; }}; threadgroup sm_tg{count} *sm_tg_at{count} = sm_declare<sm_id, {count}, sm_tg{count}>(); {references}"
        )
        count += 1
        if count > 64:
            raise error(t[i].line, f"the kernel '{chunk.name}' declares more than 64 threadgroup variables")
        i = stop


def rewrite_constants(code: Code, values: dict[str, str] | None) -> list[Constant]:
    """`constant int n [[function_constant(0)]];` gets its value; without values, zero."""
    p, t, found = code.plain, code.t, []
    for i, w in enumerate(p):
        if w != "function_constant" or p[i - 2 : i] != ["[", "["] or i < 4:
            continue
        opening, name = i - 2, p[i - 3]
        closing = code.match[opening]
        start = i
        while start and p[start - 1] not in (";", "}", "{", ",", "("):
            start -= 1
        if p[start - 1] in (",", "(") or p[closing + 1] != ";":
            continue  # the attribute of an argument
        type_ = " ".join(x for x in p[start : i - 3] if x not in ("constant", "const", "static", "constexpr"))
        found.append(Constant(int(p[i + 2]), type_, name))
        code.blank(opening, closing + 1)
        value = (values or {}).get(name)
        t[closing].text = f"= {value}" if value is not None else "= {}"
    for i, w in enumerate(p):
        if w == "is_function_constant_defined" and p[i + 1] == "(":
            t[i].text = "true" if p[i + 2] in (values or {}) else "false"
            code.blank(i + 1, code.match[i + 1] + 1)
    return found


def rewrite_classes(code: Code, found: list[Chunk]) -> None:
    """Address spaces of methods. A method without one serves any object here; in Metal, those of a thread.

    In a class whose methods hand out references to their thread's memory, all methods become the thread's;
    constructors of objects in other memory go, since nothing constructs there; device methods are found through
    the space that includes device."""
    p, t = code.plain, code.t
    for c in found:
        if c.kind != "type" or not c.body:
            continue
        start, end = c.body
        members = list(chunks(code, start, end))
        rewrite_classes(code, members)
        functions = [m for m in members if m.kind == "function" and m.parameters]
        for m in functions:
            head = m.name_at if m.name != "operator" else next(k for k in range(m.start, m.end) if p[k] == "operator")
            m.returns_thread = "thread" in p[m.start : head] and bool({"&", "*"} & set(p[m.start : head]))
        handing_out = any(m.returns_thread for m in functions)
        for m in functions:
            assert m.parameters
            close = m.parameters[1]
            at = close + 1
            while p[at] in ("const", "volatile", "noexcept"):
                at += 1
            if m.name == c.name and p[at] in SPACES - {"thread"}:
                code.blank(m.start, m.end)
            elif p[at] in SPACES:
                t[at].text = {"device": "__global", "constant": "__constant", "thread": ""}.get(p[at], t[at].text)
            if handing_out and m.name != c.name and p[at] not in SPACES - {"thread"}:
                if not {"static", "friend", "~"} & set(p[m.start : m.name_at]):
                    t[close].text += " thread" if at == close + 1 else ""
                    if at > close + 1:
                        t[at - 1].text += " thread"


def entry(kernel: Kernel, number: int) -> str:
    """The function that the runtime calls for one thread (fibers) or for a whole threadgroup (plain loop)."""
    parts = []
    for a in kernel.arguments:
        if a.kind == "position":
            parts.append(re.sub(r"\b[XYZI]\b", lambda m: m[0].lower(), POSITIONS[a.attribute]))
        else:
            at = f"d->buffers[{a.index}]" if a.kind == "buffer" else f"(ulong)g->tg_dynamic[{a.index}]"
            parts.append(f"{'sm_reference' if a.reference else 'sm_pointer'}{{{at}}}")
    call = f"{kernel.call.replace('<NUMBER', f'<{number}')}({', '.join(parts)});"
    if kernel.fibers:
        return (
            f'extern "C" void sm_entry_{number}(sm_lane *l, sm_group *g) {{ sm_dispatch *d = g->dispatch; '
            f"uint x = l->tid[0], y = l->tid[1], z = l->tid[2], i = l->index; {call} }}\n"
        )
    return (
        f'extern "C" void sm_entry_{number}(sm_group *g) {{ sm_dispatch *d = g->dispatch; uint i = 0; '
        f"for (uint z = 0; z < g->size[2]; z++) for (uint y = 0; y < g->size[1]; y++) "
        f"for (uint x = 0; x < g->size[0]; x++, i++) {call} }}\n"
    )


def rewrite(text: str, values: dict[str, str] | None = None, all_fibers: bool = False) -> Program:
    """Preprocessed Metal source to text for clang, without entry points.

    `values` gives function constants by name as literals. Raises MetalError."""
    from softmetal import check

    code = Code(text)
    found = list(chunks(code))
    check.check(code, found)
    for token in code.t:
        if token.text in RESERVED:
            token.text += "_"
        elif token.kind == "number" and FLOATING.match(token.text):
            token.text += "f"  # clang's option for this fails inside templates
    constants = rewrite_constants(code, values)
    rewrite_vectors(code)
    rewrite_classes(code, found)
    kernels: list[Kernel] = []
    templates: dict[str, Chunk] = {}
    facts: dict[int, tuple[list[Argument], bool, int]] = {}
    for c in found:
        if c.kernel and c.body and not c.instantiation:
            templates[c.scope + c.name] = templates[c.name] = c
            fibers = all_fibers or reaches_others(code, found, c)
            facts[id(c)] = (arguments(code, c), fibers, attribute_number(code, c, "max_total_threads_per_threadgroup"))
    for c in found:
        if c.kernel and c.body and not c.instantiation:
            rewrite_threadgroup_variables(code, c)
            for k in range(c.start, c.name_at):
                if code.plain[k] == "kernel" and code.plain[k - 1] != "[":
                    code.t[k].text = ""
            head = (c.template[1] + 1) if c.template else c.start
            blank_attributes(code, head, c.body[0])
            code.t[head].text = "__attribute__((always_inline)) inline " + code.t[head].text
            if c.template:
                code.t[c.template[0]].text = "int sm_id, " + code.t[c.template[0]].text
            else:
                code.t[head].text = "template <int sm_id> " + code.t[head].text
                args, fibers, limit = facts[id(c)]
                name = attribute_string(code, c, "host_name") or c.name
                kernels.append(Kernel(name, f"{c.scope}{c.name}<NUMBER>", args, fibers, limit))
        elif c.instantiation:
            words = code.plain[c.start : c.end]
            at = next((k for k in range(c.end - 1, c.start, -1) if is_template_id(code, k, templates)), -1)
            if at < 0 and "kernel" not in words:
                continue
            target = templates.get(code.plain[at] if at >= 0 else c.name)
            if target is None or not target.template:
                raise error(code.t[c.start].line, "an explicit instantiation of a kernel that is not a template")
            args, fibers, limit = facts[id(target)]
            if at >= 0:
                inside = code.spell(at + 2, code.angle(at + 1))
                call, name = f"{target.scope}{target.name}<NUMBER, {inside}>", f"{target.name}<{inside}>"
            else:  # the template arguments follow from the parameters' types
                assert c.parameters
                blank_attributes(code, *c.parameters)
                types = "".join(t.text + " " for t in code.t[c.parameters[0] : c.parameters[1]])
                call, name = f"((void (*)({types})){target.scope}{target.name}<NUMBER>)", target.name
            kernels.append(Kernel(attribute_string(code, c, "host_name") or name, call, args, fibers, limit))
            code.blank(c.start, c.end)
    for i, w in enumerate(code.plain[:-1]):  # what is left: `decltype(f<float>)`
        if w in templates and code.t[i].text and code.plain[i + 1] == "<" and templates[w].template:
            code.t[i + 1].text += "0, "
    seen: set[str] = set()
    for k in kernels:
        if k.name in seen:
            raise MetalError(f"program_source: error: two kernels are named '{k.name}'")
        seen.add(k.name)
    return Program(code.text(), kernels, constants, check.suspects(code, found))


def blank_attributes(code: Code, start: int, end: int) -> None:
    for k in range(start, end):
        if code.plain[k] == "[" and code.plain[k + 1] == "[":
            code.blank(k, code.match[k] + 1)


def is_template_id(code: Code, k: int, templates: dict[str, Chunk]) -> bool:
    return code.plain[k] in templates and code.plain[k + 1] == "<" and templates[code.plain[k]].template is not None


def attribute_string(code: Code, c: Chunk, name: str) -> str:
    for k in range(c.start, c.end - 2):
        if code.plain[k] == name and code.plain[k + 1] == "(" and code.t[k + 2].kind == "string":
            parts = code.plain[k + 2 : code.match[k + 1]]
            return "".join(x[1:-1] for x in parts)
    return ""


def attribute_number(code: Code, c: Chunk, name: str) -> int:
    for k in range(c.start, c.body[0] if c.body else c.end):
        if code.plain[k] == name and code.plain[k + 1] == "(":
            try:
                return min(1024, int(eval(code.spell(k + 2, code.match[k + 1]), {"__builtins__": {}})))
            except Exception:
                return 1024
    return 1024

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
from collections.abc import Container
from dataclasses import dataclass, field

from softmetal import check
from softmetal.convergence import rewrite_branches
from softmetal.functions import rewrite_function_parameters
from softmetal.kernels import Argument, Kernel, arguments, attribute_number, attribute_string, reaches_others
from softmetal.methods import rewrite_classes, rewrite_constant_references
from softmetal.parse import Chunk, Code, MetalError, chunks, classes, error
from softmetal.vectors import rewrite_choices, rewrite_vectors, rewrite_vectors_of_bool

# Words that C++ for OpenCL reserves and Metal does not.
RESERVED = {
    "local", "global", "generic", "pipe", "kernel_", "read_only", "write_only", "read_write", "event_t",
    "sampler_t", "queue_t", "clk_event_t", "reserve_id_t", "image2d_t", "image1d_t", "image3d_t",
    "vec_step", "addrspace_cast",
}  # fmt: skip
FLOATING = re.compile(r"^(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][+-]?\d+)?$|^0[xX][\da-fA-F.]+[pP][+-]?\d+$")


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
        for a, b in zip(declarators, declarators[1:]):  # noqa: RUF007
            bracket = next((k for k in range(a, b) if p[k] == "["), b - 1)
            names.append(t[bracket - 1].text)
        t[start].text = f"struct sm_tg{count} {{ " + ("" if start == i else t[start].text)
        if start != i:
            t[i].text = ""
        references = " ".join(f"threadgroup auto& {n} = sm_tg_at{count}->{n};" for n in names)
        declaration = f"threadgroup sm_tg{count} *sm_tg_at{count} = sm_declare<sm_id, {count}, sm_tg{count}>();"
        t[stop].text = f"; }}; {declaration} {references}"
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
        index = code.spell(i + 2, code.match[i + 1])
        try:
            found.append(Constant(int(eval(index, {"__builtins__": {}})), type_, name))  # `600 + 1`
        except Exception:
            raise error(t[i].line, f"the index of the function constant '{name}' is '{index}', not a number") from None
        code.blank(opening, closing + 1)
        value = (values or {}).get(name)
        t[closing].text = f"= {value}" if value is not None else "= {}"
    for i, w in enumerate(p):
        if w == "is_function_constant_defined" and p[i + 1] == "(":
            t[i].text = "true" if p[i + 2] in (values or {}) else "false"
            code.blank(i + 1, code.match[i + 1] + 1)
    return found


def blank_attributes(code: Code, start: int, end: int) -> None:
    for k in range(start, end):
        if code.plain[k] == "[" and code.plain[k + 1] == "[":
            code.blank(k, code.match[k] + 1)


def is_template_id(code: Code, k: int, templates: dict[str, Chunk]) -> bool:
    return code.plain[k] in templates and code.plain[k + 1] == "<" and templates[code.plain[k]].template is not None


def rewrite(
    text: str, values: dict[str, str] | None = None, all_fibers: bool = False, choices: Container[int] = ()
) -> Program:
    """Preprocessed Metal source to text for clang, without entry points.

    `values` gives function constants by name as literals; `choices` are the lines whose `?:` takes values, not
    objects. Raises MetalError."""
    code = Code(text)
    found = list(chunks(code))
    check.check(code, found)
    for token in code.t:
        if token.text in RESERVED:
            token.text += "_"
        elif token.kind == "number" and FLOATING.match(token.text):
            token.text += "f"  # clang's option for this fails inside templates
    constants = rewrite_constants(code, values)
    rewrite_vectors_of_bool(code)
    rewrite_vectors(code)
    rewrite_choices(code, choices)
    rewrite_function_parameters(code, found)
    rewrite_classes(code, found)
    rewrite_constant_references(code)
    methods = [m for _, members in classes(code, found) for m in members if m.kind == "function"]
    rewrite_branches(code, [*(c for c in found if c.kind == "function"), *methods])
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
                inside = " ".join(t.text for t in code.t[at + 2 : code.angle(at + 1)])
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
    names = [k.name for k in kernels]
    if twice := next((n for n in names if names.count(n) > 1), ""):
        raise MetalError(f"program_source: error: two kernels are named '{twice}'")
    return Program(code.text(), kernels, constants, check.suspects(code, found))

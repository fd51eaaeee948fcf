"""Functions as arguments of templates: by reference, since clang's OpenCL rules give pointers to functions another
address space than functions have, and then no function fits such a parameter."""

from __future__ import annotations

from softmetal.parse import Chunk, Code


def rewrite_function_parameters(code: Code, found: list[Chunk]) -> None:
    """`template <void (*f)(int)>` takes a reference, so do names for such types, and `call<&g>` becomes `call<g>`."""
    p, t = code.plain, code.t
    functions = {c.name for c in found if c.kind == "function"}
    for i, w in enumerate(p):
        if w in ("using", "typedef"):
            refer(code, i, p.index(";", i))
        elif w == "<" and p[i - 1] == "template":
            refer(code, i, code.angle(i, conditions=True))
        elif w == "&" and p[i - 1] in ("<", ",") and p[i + 1] in functions and p[i + 2] in (",", ">"):
            k = i - 1
            while p[k] not in ("<", "(", "{", ";"):
                k = (code.match[k] if p[k] in (")", "]", "}") else k) - 1
            if p[k] == "<" and code.angle(k) > i:
                t[i].text = ""


def refer(code: Code, start: int, end: int) -> None:
    """Pointers to functions between two tokens become references."""
    p = code.plain
    for k in range(start, end):
        if p[k : k + 2] == ["(", "*"] and p[code.match[k] + 1] == "(":
            code.t[k + 1].text = "&"

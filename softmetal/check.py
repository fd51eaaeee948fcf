"""What Metal refuses and clang, reading the source as C++ for OpenCL, would let pass."""

from __future__ import annotations

from softmetal.parse import SCALARS, SPACES, VECTORS, Chunk, Code, error, split, tokenize

REFUSED = {
    "double": "'double' is not supported in Metal; use float",
    "goto": "goto is not supported in Metal",
    "virtual": "virtual functions are not supported in Metal",
    "try": "exceptions are not supported in Metal",
    "catch": "exceptions are not supported in Metal",
    "throw": "exceptions are not supported in Metal",
    "new": "the new operator is not supported in Metal",
    "delete": "the delete operator is not supported in Metal",
    "typeid": "run-time type information is not supported in Metal",
    "dynamic_cast": "run-time type information is not supported in Metal",
    "thread_local": "thread_local is not supported in Metal",
    "asm": "inline assembly is not supported in Metal",
}


def check(code: Code, found: list[Chunk]) -> None:
    """Raises MetalError at the first thing that Metal refuses."""
    p = code.plain
    for i, w in enumerate(p):
        if w in REFUSED and code.t[i].kind == "word":
            if w == "delete" and p[i - 1] == "=":
                continue
            raise error(code.t[i].line, REFUSED[w])
    kernels = {c.name for c in found if c.kernel and c.body}
    for c in found:
        if c.kind == "function" and c.parameters and not c.instantiation:
            check_parameters(code, c)
            if c.body:
                check_body(code, c, kernels)
            if c.kernel and c.body and "void" not in p[c.start : c.name_at]:
                raise error(code.t[c.start].line, f"the kernel '{c.name}' must return void")
        elif c.kind == "variable":
            check_variable(code, c)


def check_parameters(code: Code, c: Chunk) -> None:
    assert c.parameters
    for a, b in split(code, *c.parameters):
        words = code.plain[a : next((k for k in range(a, b) if code.plain[k] == "="), b)]
        if ("*" in words or "&" in words) and not SPACES & set(words):
            if "auto" in words or "(" in words:
                continue
            name = next((w for w in reversed(words) if w.isidentifier()), "?")
            raise error(code.t[a].line, f"the parameter '{name}' of '{c.name}' is a pointer or reference without an "
                        "address space: write device, constant, threadgroup or thread")  # fmt: skip


def check_body(code: Code, c: Chunk, kernels: set[str]) -> None:
    assert c.body
    p, (start, end) = code.plain, c.body
    for i in range(start, end):
        w = p[i]
        if w == "static" and not {"constant", "constexpr"} & set(p[i : i + 4]) and p[i - 1] != "constant":
            raise error(code.t[i].line, "static variables in a function are not supported in Metal")
        if w == "threadgroup" and not c.kernel and p[i - 1] in (";", "{", "}"):
            stop = p.index(";", i)
            if not {"*", "&", "="} & set(p[i:stop]):
                raise error(code.t[i].line, "threadgroup variables can only be declared in a kernel")
        if p[i - 1] in (";", "{", "}") and (w in VECTORS or w in SCALARS or w == "const"):
            k = i + 1 if w == "const" else i
            pointer = p[k + 1] in ("*", "&") and p[k + 2].isidentifier() and p[k + 3] in ("=", ";", ",")
            if pointer and (p[k] in VECTORS or p[k] in SCALARS):
                raise error(code.t[i].line, f"the variable '{p[k + 2]}' is a pointer or reference without an "
                            "address space: write device, constant, threadgroup or thread")  # fmt: skip
        if w in kernels and p[i + 1] == "(" and p[i - 1] not in (".", "->", "::"):
            raise error(code.t[i].line, f"'{w}' is a kernel; a kernel cannot be called from other functions")


def check_variable(code: Code, c: Chunk) -> None:
    words = code.plain[c.start : c.end]
    if (
        c.template
        or c.instantiation
        or not words
        or words[0] in (";", "friend", "static_assert", "extern")
        or "sampler" in words
    ):
        return
    if "constant" not in words and len([w for w in words if w.isidentifier()]) >= 2:
        raise error(code.t[c.start].line, "a variable outside a function must be in the constant address space")


def suspects(code: Code, found: list[Chunk]) -> list[str]:
    """Names of functions that, by name alone, reach themselves: to be settled by clang's syntax tree."""
    bodies: dict[str, set[str]] = {}
    names = {c.name for c in found if c.kind == "function" and c.body}
    for c in found:
        if c.kind == "function" and c.body:
            words = code.plain[c.body[0] : c.body[1]]
            calls = {w for w, n in zip(words, words[1:]) if w in names and n in ("(", "<")}  # noqa: RUF007
            bodies.setdefault(c.name, set()).update(calls)
    result = []
    for name in bodies:
        reached: set[str] = set()
        todo = [name]
        while todo:
            new = bodies.get(todo.pop(), set()) - reached
            reached |= new
            todo += new
        if name in reached:
            result.append(name)
    return sorted(result)


def no_bfloat(text: str) -> None:
    """Raise MetalError where a text uses bfloat, which came with language version 3.1."""
    for token in tokenize(text):
        if token.kind == "word" and token.text.startswith(("bfloat", "packed_bfloat", "simdgroup_bfloat")):
            raise error(token.line, f"'{token.text}' needs language version 3.1 (macOS 14)")

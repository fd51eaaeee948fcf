"""Address spaces of methods."""

from __future__ import annotations

from softmetal.parse import SPACES, Chunk, Code, classes


def rewrite_classes(code: Code, found: list[Chunk]) -> None:
    """Address spaces of methods. A method without one serves any object here; in Metal, those of a thread.

    In a class whose methods hand out references to their thread's memory, or that has such an object, all methods
    become the thread's; constructors of objects in other memory go, since nothing constructs there; device methods
    are found through the space that includes device."""
    p, t = code.plain, code.t
    every = list(classes(code, found))
    handing = {c.name for c, members in every if any(m.kind == "function" and returns_thread(code, m) for m in members)}
    handing |= {"simdgroup_matrix", *(f"simdgroup_{kind}8x8" for kind in ("float", "half", "bfloat"))}
    while more := {c.name for c, members in every if c.name not in handing
                   for m in members if m.kind == "variable" and handing & set(p[m.start : m.end])}:  # fmt: skip
        handing |= more
    outside = [(m, p[class_at(code, m)]) for m in found if m.kind == "function" and m.parameters and class_at(code, m)]
    inside = [(m, c.name) for c, members in every for m in members if m.kind == "function" and m.parameters]
    for m, name in inside + outside:
        assert m.parameters
        at = after = m.parameters[1] + 1
        while p[at] in ("const", "volatile", "noexcept"):
            at += 1
        if m.name == name and p[at] in SPACES - {"thread"}:
            code.blank(m.start, m.end)
        elif p[at] in SPACES:
            t[at].text = {"device": "__global", "constant": "__constant", "thread": ""}.get(p[at], t[at].text)
        of_thread = p[at] not in SPACES - {"thread"} and not {"static", "friend", "~"} & set(p[m.start : m.name_at])
        if name in handing and m.name != name and of_thread:
            t[max(at, after) - 1].text += " thread"


def rewrite_constant_references(code: Code) -> None:
    """`const thread T&` binds to a temporary in Metal; clang's references do so only without an address space."""
    p = code.plain
    for i, w in enumerate(p):
        if w != "thread" or "const" not in (p[i - 1], p[i + 1]):
            continue
        k = i + 1 + (p[i + 1] == "const")
        while p[k].isidentifier() or p[k] == "::":
            k += 1
            if p[k] == "<" and code.angle(k) > 0:
                k = code.angle(k) + 1
        if p[k] == "&":
            code.t[i].text = ""


def returns_thread(code: Code, m: Chunk) -> bool:
    words = code.plain[m.start : m.name_at]
    return "thread" in words and bool({"&", "*"} & set(words))


def class_at(code: Code, m: Chunk) -> int:
    """Where the class of a method that is defined outside of it is named, or 0."""
    p, k = code.plain, m.name_at - 1
    if k < m.start or p[k] != "::":
        return 0
    k -= 1
    if p[k] == ">":
        k = next((j for j in range(k, m.start, -1) if p[j] == "<" and code.angle(j) == k), 0) - 1
    return max(k, 0)

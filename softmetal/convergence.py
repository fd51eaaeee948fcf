"""Where lanes of a simdgroup that took different paths come together again.

The hardware brings lanes together after a branch. The runtime knows only where each lane waits, and lets those at
the earliest place go first; a lane that skipped a branch in a loop would run ahead into the next round. So lanes meet
(`sm_join`) after every `if` and `switch` with an operation of the simdgroup inside, and, in loops with such an
operation and a `continue`, at the end of each round."""

from __future__ import annotations

import re

from softmetal.parse import Chunk, Code

MEETING = re.compile(r"^(simd_(?!vote)\w+|quad_(?!vote)\w+|simdgroup_(barrier|multiply\w*))$")


def meeting_functions(code: Code, found: list[Chunk]) -> set[str]:
    """Names of functions in which lanes meet, directly or through others."""
    bodies = [(c.name, set(code.plain[c.body[0] : c.body[1]])) for c in found if c.body and c.kind == "function"]
    names: set[str] = set()
    while more := {n for n, words in bodies if n not in names and (words & names or any(map(MEETING.match, words)))}:
        names |= more
    return names


def rewrite_branches(code: Code, functions: list[Chunk]) -> None:
    """Puts the meeting points into the bodies of `functions`, methods among them."""
    names, p, labels = meeting_functions(code, functions), code.plain, 0

    def meets(start: int, end: int) -> bool:
        return any(w in names or MEETING.match(w) for w in p[start:end])

    for c in functions:
        if not c.body or not meets(*c.body):
            continue
        for i in range(*c.body):
            if p[i] in ("if", "switch") and p[i - 1] != "else" and p[i + 1] == "(":
                end = statement_end(code, i)
                if meets(code.match[i + 1], end):
                    code.t[i].text = "{ " + code.t[i].text
                    code.t[end - 1].text += " sm_join(); }"
            elif p[i] in ("for", "while", "do") and code.t[i].kind == "word":
                start = code.match[i + 1] + 1 if p[i + 1] == "(" else i + 1
                if p[start] != "{" or not meets(start, code.match[start]):
                    continue
                own = continues(code, start + 1, code.match[start])
                if own:
                    labels += 1
                    for k in own:
                        code.t[k].text = f"goto sm_round{labels}"
                    code.t[start].text += " {"
                    code.t[code.match[start]].text = f"}} sm_round{labels}: sm_join(); }}"


def continues(code: Code, start: int, end: int) -> list[int]:
    """The `continue`s of a loop's body, not those of loops inside it."""
    found, i = [], start
    while i < end:
        if code.plain[i] in ("for", "while", "do"):
            i = statement_end(code, i)
            continue
        if code.plain[i] == "continue":
            found.append(i)
        i += 1
    return found


def statement_end(code: Code, i: int) -> int:
    """The index after the statement that begins at i."""
    p = code.plain
    while p[i] == "[" and p[i + 1] == "[":
        i = code.match[i] + 1
    if p[i] == "{":
        return code.match[i] + 1
    if p[i] == "do":
        i = statement_end(code, i + 1)
    elif p[i] in ("if", "for", "while", "switch"):
        i += 2 if p[i + 1] == "constexpr" else 1
        end = statement_end(code, code.match[i] + 1)
        return statement_end(code, end + 1) if end < len(p) and p[end] == "else" else end
    while p[i] != ";":
        i = code.match[i] + 1 if i in code.match and p[i] in ("(", "[", "{") else i + 1
    return i + 1

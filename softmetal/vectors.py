"""Vectors: constructors, casts and lists that clang's vectors lack become calls of the header's templates."""

from __future__ import annotations

from collections.abc import Container

from softmetal.parse import MATRICES, SCALARS, SPACES, VECTORS, Code

STARTS = (";", "{", "}", ")", "const", "thread")  # what a declaration may follow


def type_names(code: Code) -> set[str]:
    """Names that may stand for a vector: template type parameters and aliases."""
    p, names = code.plain, set(VECTORS | MATRICES)
    for i, w in enumerate(p[:-2]):
        if not p[i + 1].isidentifier():
            continue
        if (w in ("typename", "class") and p[i + 2] in (",", ">", "=")) or (w == "using" and p[i + 2] == "="):
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
            elif w == "vec" and p[i - 2 if before == "::" else i - 1] in (*STARTS, "metal"):
                fill(code, close + 1, code.spell(i - 2 if before == "::" else i, close + 1))
        elif w in names and nxt == "(" and before not in declarators:
            follows_type = (t[i - 1].kind == "word" and before not in ("return", "else", "case", "do")) if i else False
            if (not follows_type and before not in ("::", "<", ">")) or (before in ("<", ">") and not follows_type):
                t[i].text = f"sm_make<{t[i].text}>"
                mask(code, i + 1)
            elif before == "::" and p[i - 2] == "metal":
                t[i - 2].text, t[i].text = "sm_make<metal", t[i].text + ">"
        elif w == "{" and before in ("(", ",") and p[enclosing(code, i)] == "(" and p[code.match[i] + 1] in (",", ")"):
            t[i].text, t[code.match[i]].text = "sm_list(", ")"  # an argument `{x, y}`
        elif w in VECTORS and nxt.isidentifier() and before in STARTS and fill(code, i + 1, t[i].text):
            pass
        elif w in VECTORS and nxt.isidentifier() and p[i + 2] == "(" and constructs(code, i + 2):
            t[i + 1].text += f" = sm_make<{t[i].text}>"  # `short2 at(x, y);`
        elif w in names and before == "(" and nxt == ")" and is_cast(code, i - 1, i + 1):
            t[i - 1].text, t[i + 1].text = "sm_caster<", ">{} ->* "
            if p[i + 2] == "(":
                mask(code, i + 2)
        elif w == "static_cast" and nxt == "<" and (p[i + 2] in names or p[i + 2] == "vec"):
            close = code.angle(i + 1)
            if close == i + 3 or p[i + 2] == "vec":
                t[i].text = "sm_make"


def rewrite_vectors_of_bool(code: Code) -> None:
    """`vec<bool, 2>`, and `typedef vec<T, 2> pair;` where T may be bool: clang has no vectors of bool. Elsewhere `vec`
    stays: a template's argument is deduced from it."""
    p, named = code.plain, False
    for i, w in enumerate(p):
        if w in ("typedef", "using"):
            named = w == "typedef" or (p[i + 2] == "=" and p[i - 1] != ">")
        elif w == ";":
            named = False
        elif w == "vec" and p[i + 1] == "<" and (named or p[i + 2] == "bool"):
            code.t[i].text = "sm_vector"


def fill(code: Code, i: int, type_: str) -> bool:
    """`float4 a = {x, y}, b {};`: the rest is zero. `i`: behind the type. Whether there was such a variable."""
    p, t, k, found = code.plain, code.t, i, False
    while p[k].isidentifier() and p[k + 1] in ("=", "{", ",", ";", "["):
        k += 1
        brace = k + 1 if p[k : k + 2] == ["=", "{"] else k
        if p[brace] == "{" and "{" not in p[brace + 1 : code.match[brace]]:
            t[brace].text = ("= " if brace == k else "") + f"sm_fill<{type_}>("
            t[code.match[brace]].text = ")"
            found = True
        while p[k] not in (",", ";", ")", "}", ":"):
            k = code.match.get(k, k) + 1
        if p[k] != ",":
            break
        k += 1
    return found


def mask(code: Code, opening: int) -> None:
    """`float4(a < b)` is 1 where true; clang's comparison of vectors is -1 there."""
    p, closing, i = code.plain, code.match[opening], opening + 1
    compares = False
    while i < closing:
        if p[i] == ",":
            return
        if p[i] == "<" and code.angle(i) > 0:
            i = code.angle(i)
        else:
            compares |= p[i] in ("<", ">", "<=", ">=", "==", "!=")
            i = code.match.get(i, i)
        i += 1
    if compares:
        code.t[opening].text += "sm_mask("
        code.t[closing].text = ")" + code.t[closing].text


def rewrite_choices(code: Code, lines: Container[int]) -> None:
    """`c ? x : y` between objects in different address spaces, where clang cannot choose a type: between copies."""
    p, t = code.plain, code.t
    for i, w in enumerate(p):
        if w != "?" or t[i].line not in lines:
            continue
        middle, end = i + 1, 0
        depth = 0
        while p[middle] != ":" or depth:
            depth += (p[middle] == "?") - (p[middle] == ":")
            middle = code.match.get(middle, middle) + 1
        end = middle + 1
        while p[end] not in (";", ",", ")", "]", "}", ":"):
            end = code.match.get(end, end) + 1
        t[i].text += " sm_copy("
        t[middle].text = ") : sm_copy("
        t[end].text = ")" + t[end].text


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

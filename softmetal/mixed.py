"""A half vector times a float scalar: Metal converts the scalar, clang's OpenCL rules refuse it. So they do with
`pointer += object` where the object converts to an integer.

Only the type checker knows where that happens, so its messages, which give the ranges of both operands, are taken
as the list of places to put the conversion; then the text is checked again."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import accumulate
from typing import TypeVar

from softmetal.parse import MetalError

RANGE = r"\{(\d+):(\d+)-(\d+):(\d+)\}"
RANK = re.compile(
    rf"^program_source:\d+:\d+:{RANGE}{RANGE}: error: scalar operand type has greater rank .*\('([^']+)'", re.M
)
STEP = re.compile(
    rf"^program_source:\d+:\d+:{RANGE}{RANGE}: error: invalid operands to binary expression \('[^']*\*[^']*' and", re.M
)
RANGES = ["-fdiagnostics-print-source-range-info", "-ferror-limit=0"]
Result = TypeVar("Result")


def settled(text: str, act: Callable[[str], Result]) -> Result:
    """`act(text)`, with the conversions put in that its messages ask for."""
    for _ in range(16):  # an expression inside another is found only after it
        try:
            return act(text)
        except MetalError as e:
            changed = fit(text, str(e))
            if changed == text:
                raise
            text = changed
    return act(text)


def fit(text: str, messages: str) -> str:
    starts = [0, *accumulate(len(line) for line in text.splitlines(keepends=True))]

    def operands(m: re.Match[str]) -> list[tuple[int, int]]:
        a, b, c, d = (tuple(map(int, m.group(i, i + 1))) for i in (1, 3, 5, 7))
        if max(a[0], b[0], c[0], d[0]) >= len(starts):
            return []
        return [(starts[p[0] - 1] + p[1] - 1, starts[q[0] - 1] + q[1] - 1) for p, q in ((a, b), (c, d))]

    steps = {found[1] for m in STEP.finditer(messages) if (found := operands(m))}
    if steps:
        for start, end in sorted(steps, reverse=True):
            text = f"{text[:start]}(long)({text[start:end]}){text[end:]}"
        return text
    places = set()
    for m in RANK.finditer(messages):
        if not (found := operands(m)):
            continue
        left, right = found
        scalar_first = not re.search(r"vec<|\d$|ext_vector|\d'?$", m.group(9))
        places.add((left, right) if scalar_first else (right, left))
    done_from = len(text) + 1
    for scalar, vector in sorted(places, key=lambda p: max(p[0][1], p[1][1]), reverse=True):
        if max(scalar[1], vector[1]) > done_from:
            continue  # overlaps one that is done: the next round finds it
        like, value = text[slice(*vector)], text[slice(*scalar)]
        text = f"{text[: scalar[0]]}sm_fit<decltype(({like}) + ({like}))>({value}){text[scalar[1] :]}"
        done_from = min(scalar[0], vector[0])
    return text

#!/usr/bin/env python
"""What small things cost: one operation, a chain, a compiled call, a kernel launch, and the first call of a new kind.

    python benchmarks/small.py [--calls N] [--json FILE]

Arrays of ten elements on the CPU device, so that everything is overhead. Each figure is the median and the minimum over
single calls, timed one by one; the same in PyTorch (where it is installed) and NumPy stands beside it. First calls are
of fresh processes: cold with an empty cache of machine code, from disk with what the cold one has left; each is the
median over some kinds of elementwise expressions, after a first evaluation that loads the compiler.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import LOAD, NOT_MEASURED, describe, machine, median, parser, table, write_json

import nitinol
import nitinol.language as tl

N, CHAIN = 10, 40
FIRST = """
import time
import numpy as np
import nitinol as nn
x = nn.array(np.arange(10, dtype=np.float32))
(x + 1).evaluate()
kinds = [lambda: x * 3 - x, lambda: x / 2 + 1, lambda: (x * x).sum(), lambda: nn.maximum(x, 2) * x, lambda: -x - 3]
for kind in kinds:
    begun = time.perf_counter()
    kind().evaluate()
    print(time.perf_counter() - begun)
"""


@nitinol.jit
def add_kernel(a, b, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(a + at, at < n) + tl.load(b + at, at < n), at < n)


def chain(x: Any) -> Any:
    for _ in range(CHAIN):
        x = x + 1
    return x


def both(x: Any) -> Any:
    return x * 2 + 1


def cases() -> dict[str, dict[str, Callable[[], Any]]]:
    """What is measured, of each side that has it."""
    values = np.arange(N, dtype=np.float32)
    x = nitinol.array(values)
    compiled = nitinol.compile(both)
    host = [values.copy() for _ in range(3)]
    ours = [nitinol.array(values) for _ in range(3)]
    found: dict[str, dict[str, Callable[[], Any]]] = {
        "x + 1, recorded only": {"nitinol": lambda: x + 1},
        "x + 1": {"nitinol": lambda: (x + 1).evaluate(), "numpy": lambda: values + 1},
        f"a chain of {CHAIN} times + 1": {"nitinol": lambda: chain(x).evaluate(), "numpy": lambda: chain(values)},
        "a compiled call, x * 2 + 1": {"nitinol": lambda: compiled(x), "numpy": lambda: both(values)},
        "kernel[grid], three NumPy arrays": {"nitinol": lambda: add_kernel[(1,)](*host, N, 16)},
        "kernel[grid], three own arrays": {"nitinol": lambda: add_kernel[(1,)](*ours, N, 16)},
    }
    if importlib.util.find_spec("torch"):
        import torch

        tensor = torch.from_numpy(values)
        found["x + 1"]["torch"] = lambda: tensor + 1
        found[f"a chain of {CHAIN} times + 1"]["torch"] = lambda: chain(tensor)
        found["a compiled call, x * 2 + 1"]["torch"] = lambda: both(tensor)
    return found


def seconds(function: Callable[[], Any], calls: int) -> list[float]:
    """Of single calls, after some that are not counted."""
    times = []
    for _ in range(calls + 50):
        begun = time.perf_counter_ns()
        function()
        times.append((time.perf_counter_ns() - begun) / 1e9)
    return times[50:]


def first_calls() -> dict[str, list[float]]:
    """Seconds of the first call of each kind, cold and from disk."""
    cache = tempfile.mkdtemp(prefix="nitinol-small-")
    try:
        return {
            name: [float(line) for line in subprocess.run(
                [sys.executable, "-c", FIRST], stdout=subprocess.PIPE, text=True, check=True,
                env={**os.environ, "NITINOL_CACHE_DIR": cache}).stdout.split()]
            for name in ("cold", "from disk")
        }  # fmt: skip
    finally:
        shutil.rmtree(cache)


def main() -> None:
    options = parser(str(__doc__).partition("\n")[0], threads=False)
    options.add_argument("--calls", type=int, default=3000, help="of each side (default: 3000)")
    given = options.parse_args()
    nitinol.set_device("cpu")
    print(describe(machine()))
    print(f"Load before: {NOT_MEASURED if LOAD is None else f'{LOAD:.1f}'}\n")
    figures = {
        name: {side: seconds(function, given.calls) for side, function in sides.items()}
        for name, sides in cases().items()
    }
    sides = ("nitinol", "torch", "numpy")
    rows = [
        [name, *(f"{median(t) * 1e6:.1f} ({min(t) * 1e6:.1f})" if (t := found.get(side)) else NOT_MEASURED
                 for side in sides)]
        for name, found in figures.items()
    ]  # fmt: skip
    print(table(["Microseconds, median (minimum)", *sides], rows))
    first = first_calls()
    rows = [[name, f"{median(times) * 1e3:.1f} ({min(times) * 1e3:.1f})"] for name, times in first.items()]
    print("\n" + table(["First call of a kind, milliseconds, median (minimum)", "nitinol"], rows))
    write_json(given.json, {
        "microseconds": {name: {side: [median(t) * 1e6, min(t) * 1e6] for side, t in found.items()}
                         for name, found in figures.items()},
        "first_call_milliseconds": {name: [median(t) * 1e3, min(t) * 1e3] for name, t in first.items()},
    })  # fmt: skip


if __name__ == "__main__":
    main()

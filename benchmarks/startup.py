#!/usr/bin/env python
"""How long until something happens: importing the package, and from a command to its first word.

    python benchmarks/startup.py [--reps N] [--json FILE]

Every figure is from fresh processes, the median of several. Import times are taken inside the process, so that they are
without the start of Python itself, which is listed by its own. `nitinol run demo` is timed from outside, from the start
of the process to the first letter behind the prompt on its standard output, and to its end: with an empty cache of
machine code (the first start on a machine) and with what the first start has left there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

from common import describe, machine, median, parser, table, write_json

PROMPT = "def fibonacci(n):"
IMPORTS = {
    "import nitinol": "import nitinol",
    "the same, and a first use of arrays": "import nitinol; nitinol.compile",
    "import numpy, for comparison": "import numpy",
}


def import_seconds(statement: str) -> float:
    """What a statement takes in a fresh Python."""
    program = f"import time; begun = time.perf_counter(); {statement}; print(time.perf_counter() - begun)"
    return float(subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True).stdout)


def python_seconds() -> float:
    """Start and end of a Python that does nothing."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    return time.perf_counter() - begun


def run_seconds(cache: str, max_tokens: int) -> tuple[float, float]:
    """`nitinol run demo`: seconds to the first letter of the answer, and to the end."""
    command = [sys.executable, "-m", "nitinol", "run", "demo", PROMPT, "--max-tokens", str(max_tokens)]
    begun = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env={**os.environ, "NITINOL_CACHE_DIR": cache}) as process:
        assert process.stdout is not None and process.stderr is not None
        text, first = b"", 0.0
        while piece := os.read(process.stdout.fileno(), 1 << 16):
            text += piece
            if not first and len(text) > len(PROMPT):
                first = time.perf_counter() - begun
        end = time.perf_counter() - begun
        said = process.stderr.read().decode(errors="replace").strip()
    if process.returncode or not first:
        raise SystemExit(f"`nitinol run demo` ended with exit code {process.returncode} and said: {said}")
    return first, end


def measure(reps: int, max_tokens: int) -> dict[str, Any]:
    imports = {name: [import_seconds(statement) for _ in range(reps + 1)][1:] for name, statement in IMPORTS.items()}
    first, second = [], []
    for _ in range(max(1, reps // 3)):
        cache = tempfile.mkdtemp(prefix="nitinol-startup-")
        try:
            first.append(run_seconds(cache, max_tokens))
            second += [run_seconds(cache, max_tokens) for _ in range(3)]
        finally:
            shutil.rmtree(cache)
    return {"python": [python_seconds() for _ in range(reps)], "imports": imports, "first_start": first,
            "second_start": second, "max_tokens": max_tokens}  # fmt: skip


HEAD = ["what", "median", "smallest", "largest"]


def render(document: dict[str, Any]) -> str:
    """The table for docs/performance.md."""
    r = document["results"]
    command = "`nitinol run demo`"
    lines = {"python -c pass": r["python"], **r["imports"]}
    for key, name in (("first_start", "empty cache"), ("second_start", "second start")):
        lines[f"{command} to the first letter, {name}"] = [first for first, _ in r[key]]
        lines[f"{command} to the end ({r['max_tokens']} tokens), {name}"] = [end for _, end in r[key]]
    return table(HEAD, [[name, *(f"{x:.3f} s" for x in (median(times), min(times), max(times)))]
                        for name, times in lines.items()])  # fmt: skip


def main() -> None:
    options = parser("How long until something happens.", threads=False)
    options.add_argument("--reps", type=int, default=9, help="processes for each figure (default: 9)")
    options.add_argument("--max-tokens", type=int, default=96, help="of the demonstration (default: 96)")
    given = options.parse_args()
    print(describe(machine()), file=sys.stderr)
    document = {"benchmark": "startup", "results": measure(given.reps, given.max_tokens)}
    print(render(document))
    write_json(given.json, document)


if __name__ == "__main__":
    main()

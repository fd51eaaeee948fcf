#!/usr/bin/env python
"""All benchmarks, each in a process of its own, as docs/performance.md shows them.

    python benchmarks/run.py [--json FILE] [--threads N] [--quick] [kernels] [llama_cpp] [memory] [startup]

Takes about a quarter of an hour and, at first, 3 GB of disk for the random models. Let the machine do nothing else:
with another program on a core, the figures say more about that program. Other options of the single benchmarks:
`python benchmarks/NAME.py --help`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import LOAD, describe, machine, parser

HERE = Path(__file__).resolve().parent
# Script, heading, and options of --quick: everything once at a tiny size, to see that it runs.
BENCHMARKS = {
    "kernels": ("kernels.py", "Kernels and PyTorch", ["--quick", "--rounds", "1"]),
    "llama_cpp": ("against_llama_cpp.py", "Language models and llama.cpp",
                  ["--preset", "tiny", "--models", "{folder}", "--formats", "Q8_0", "--prompts", "4", "16", "--gen",
                   "2", "--rounds", "1"]),
    "memory": ("memory.py", "Memory, and a token's overhead", ["demo", "--prompt", "8", "--gen", "4"]),
    "startup": ("startup.py", "Start", ["--reps", "1", "--max-tokens", "2"]),
}  # fmt: skip


def run(name: str, options: list[str], folder: Path) -> tuple[str, dict[str, Any]]:
    """One benchmark's tables and figures; SystemExit where it fails, as it has said why."""
    results = folder / f"{name}.json"
    command = [sys.executable, str(HERE / BENCHMARKS[name][0]), *options, "--json", str(results)]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if child.returncode:
        raise SystemExit(f"benchmarks/{BENCHMARKS[name][0]} ended with exit code {child.returncode}")
    return child.stdout, json.loads(results.read_text())


def fill(page: Path, name: str, tables: str) -> None:
    """Puts a benchmark's tables between `<!-- name -->` and the `<!-- end -->` after it."""
    before, mark, rest = page.read_text().partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not mark or not end:
        raise SystemExit(f"{page} has no place for the tables of {name}: <!-- {name} --> and <!-- end -->")
    page.write_text(f"{before}{mark}{tables.strip()}\n{end}{after}")


def main() -> None:
    options = parser("All benchmarks, each in a process of its own, as docs/performance.md shows them.")
    options.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)} (default: all)")
    options.add_argument("--llama-cpp", metavar="FOLDER", help="where llama_cpp lies, if it is not installed")
    options.add_argument("--fill", metavar="PAGE", type=Path, help="put the tables into it: docs/performance.md")
    options.add_argument("--quick", action="store_true", help="tiny sizes: shows that all of it runs")
    given = options.parse_args()
    unknown = [name for name in given.names if name not in BENCHMARKS]
    if unknown:
        options.error(f"there is no benchmark {unknown[0]!r}; choose from {', '.join(BENCHMARKS)}")
    if LOAD is not None and LOAD > 0.5 and not given.quick:
        print(f"warning: this machine is not idle (load {LOAD:.1f}); the figures will be worse than it can do",
              file=sys.stderr)
    facts = machine()
    print(f"{describe(facts)}\n")
    documents: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in given.names or BENCHMARKS:
            script_options = [text.format(folder=temporary) for text in BENCHMARKS[name][2]] if given.quick else []
            if given.threads and name != "startup":
                script_options += ["--threads", str(given.threads)]
            if given.llama_cpp and name == "llama_cpp":
                script_options += ["--llama-cpp", given.llama_cpp]
            tables, documents[name] = run(name, script_options, Path(temporary))
            print(f"### {BENCHMARKS[name][1]}\n\n`{documents[name]['command']}`\n\n{tables}", flush=True)
            if given.fill is not None:
                fill(given.fill, name, tables)
    if given.json is not None:
        given.json.write_text(json.dumps({"machine": facts, "load_before": LOAD, "quick": given.quick,
                                          "benchmarks": documents}, indent=1) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()

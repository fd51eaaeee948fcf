"""What the benchmarks share: the machine, timing of two sides in turn, tables, and files of results."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAUSE_S = 0.02  # between two sides: threads of the one that has just run spin for some milliseconds before they sleep
NOT_MEASURED = "–"
MOST_SPREAD = 1.3  # largest over smallest of the rounds of one measurement
LOAD = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # before we add to it


def parser(description: str, threads: bool = True) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    found = argparse.ArgumentParser(description=description)
    if threads:
        found.add_argument("--threads", type=int, help="of both sides (default: one per core)")
    found.add_argument("--json", metavar="FILE", type=Path, help="write all figures there, with the machine's")
    return found


def machine() -> dict[str, Any]:
    """The processor and memory of this machine and the versions in use."""
    from nitinol.runtime import host
    from nitinol.runtime.memory import total_memory

    packages = ("nitinol", "numpy", "llvmlite", "torch", "llama_cpp_python")
    return {
        "processor": host.processor_name(), "simd": host.simd_level(), "cores": host.default_threads(),
        "memory_bytes": total_memory(), "system": platform.platform(), "python": platform.python_version(),
        "versions": {name: version for name in packages if (version := package_version(name))},
    }  # fmt: skip


def package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe(facts: dict[str, Any]) -> str:
    """The machine in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (f"{facts['processor']} ({facts['simd']}), {facts['cores']} cores, {facts['memory_bytes'] / 2**30:.0f} GiB; "
            f"Python {facts['python']}, {versions}")  # fmt: skip


def calls_for(function: Callable[[], Any], seconds: float) -> int:
    """How many calls take about so long, after a first one that may compile."""
    function()
    begun = time.perf_counter()
    function()
    return max(1, round(seconds / max(time.perf_counter() - begun, 1e-7)))


def seconds_per_call(function: Callable[[], Any], calls: int) -> float:
    """One measurement: an untimed call brings the caches and threads into their usual state."""
    time.sleep(PAUSE_S)
    function()
    begun = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begun) / calls


def alternate(sides: dict[str, Callable[[], Any]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds per call of every side, one number a round. In each round all sides are measured one after another, for
    about `seconds` each; the first becomes the last in the next round."""
    calls = {name: calls_for(function, seconds) for name, function in sides.items()}
    found: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for _ in range(rounds):
        for name in order:
            found[name].append(seconds_per_call(sides[name], calls[name]))
        order.append(order.pop(0))
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: first column to the left, numbers to the right, padded so that it reads well as it is."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for row in (head, rule, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def unsteady(times: dict[str, list[float]]) -> str:
    """A line for the measurements whose rounds differ too much to be believed, most often because the machine was
    busy; empty if there are none."""
    found = [name for name, seconds in times.items() if max(seconds) > MOST_SPREAD * min(seconds)]
    return f"Unsteady (rounds differ by more than {MOST_SPREAD - 1:.0%}): {'; '.join(found)}." if found else ""


def percent(part: float | None, whole: float | None) -> str:
    return f"{part / whole:.0%}" if part and whole else NOT_MEASURED


def command() -> str:
    """How this program was called, without what concerns only this machine."""
    words = iter(sys.argv[1:])
    kept = [word for word in words if word not in ("--json", "--llama-cpp") or not next(words, "")]
    return shlex.join(["python", "benchmarks/" + Path(sys.argv[0]).name, *kept])


def write_json(path: Path | None, results: dict[str, Any]) -> None:
    """The figures, the machine, and the command that made them."""
    if path is not None:
        document = {"machine": machine(), "command": command(), "date": time.strftime("%Y-%m-%d"),
                    "load_before": LOAD, **results}
        path.write_text(json.dumps(document, indent=1) + "\n")


median = statistics.median

"""`nitinol trace`: every kernel launch of the prefill and of one decode step, with what it moved and how fast."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nitinol.commands.output import Progress, print_json, print_table
from nitinol.commands.rows import Limits, Phase, rows_of, shorten
from nitinol.commands.run import Settings
from nitinol.commands.svg import draw
from nitinol.generate.profile import profile
from nitinol.models.memory import gigabytes
from nitinol.runtime.bandwidth import measure_read_bandwidth
from nitinol.runtime.peak import measure_peak_rates


def trace_model(path: str, prompt: str, settings: Settings, chrome: Path | None, svg: Path | None,
                as_json: bool) -> None:
    for target in (chrome, svg):
        if target is not None and not target.resolve().parent.is_dir():
            raise ValueError(f"{str(target)!r} cannot be written, because its folder does not exist")
    model = settings.load(path, as_json)
    ids = model.encode(prompt)
    with Progress("measuring", as_json) as progress:
        device = model.device
        rates = measure_peak_rates(device)
        limits = Limits(measure_read_bandwidth(device), rates["float32"], rates["int8"])
        phases = [Phase(run.name, run.tokens, rows_of(run, limits), run.wall_ns / 1e3, run.counters)
                  for run in profile(model, ids, progress)]
    if chrome is not None:
        chrome.write_text(json.dumps(chrome_trace(phases)))
    if svg is not None:
        svg.write_text(draw(phases[-1], limits, model.config.name, device.description))
    if as_json:
        print_json({"model": model.config.name, "device": device.name, "description": device.description,
                    "limits": asdict(limits),
                    "phases": [asdict(phase) | {"bytes": phase.bytes, "operations": phase.operations}
                               for phase in phases]})
        return
    for phase in phases:
        print_phase(phase, limits, device.description)


def print_phase(phase: Phase, limits: Limits, description: str) -> None:
    print(f"{phase.name}: {phase.tokens} token{'s' if phase.tokens != 1 else ''}, {len(phase.rows)} kernel launches on "
          f"{description}")
    print_table(
        ("line", "kernel", "time us", "bytes", "ops", "GB/s", "GFLOP/s", "%", "operation", "shapes", "dtypes"),
        [(row.line, row.kernel.removesuffix("_kernel"), f"{row.time_us:.1f}", count(row.bytes), count(row.operations),
          f"{row.gb_s:.1f}", f"{row.gflop_s:.1f}", f"{row.percent:.0f}", shorten(row.operation, 50),
          shapes(row.shapes), " ".join(row.dtypes)) for row in phase.rows],
        numbers=(2, 3, 4, 5, 6, 7))
    busy = sum(row.time_us for row in phase.rows)
    counters = phase.counters
    print(f"total: {phase.wall_us:.0f} us ({busy:.0f} us in kernels), {gigabytes(phase.bytes)}, "
          f"{count(phase.operations)} operations, "
          f"{phase.bytes / phase.wall_us / 1e3:.1f} GB/s of {limits.bandwidth_gb_s:.1f}, "
          f"{phase.operations / phase.wall_us / 1e3:.1f} GFLOP/s of {limits.float32_gop_s:.0f} (float32) or "
          f"{limits.int8_gop_s:.0f} (int8); submits {counters['submits']}, waits {counters['waits']}, allocations "
          f"{counters['allocations']}")
    print()


def shapes(found: Sequence[tuple[int, ...]]) -> str:
    return " ".join("x".join(map(str, shape)) or "1" for shape in found)


def count(number: float) -> str:
    """'843', '12.5k', '1.31M', '2.05G'."""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g}{letter}"
    return f"{number:.0f}"


def chrome_trace(phases: Sequence[Phase]) -> dict[str, Any]:
    """The Trace Event Format of Chrome's tracing, which Perfetto opens: one process, a phase after the other."""
    events: list[dict[str, Any]] = [{"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "nitinol"}}]
    offset = 0.0
    for phase in phases:
        length = max((row.start_us + row.time_us for row in phase.rows), default=0.0)
        events.append({"ph": "X", "pid": 1, "tid": 1, "name": phase.name, "cat": "phase", "ts": offset, "dur": length,
                       "args": {"tokens": phase.tokens, **phase.counters}})
        events += [{"ph": "X", "pid": 1, "tid": 2, "name": row.kernel, "cat": "kernel", "ts": offset + row.start_us,
                    "dur": row.time_us,
                    "args": {"line": row.line, "source": row.operation, "shapes": shapes(row.shapes),
                             "dtypes": " ".join(row.dtypes), "grid": list(row.grid), "bytes": row.bytes,
                             "operations": row.operations, "GB/s": round(row.gb_s, 2),
                             "GFLOP/s": round(row.gflop_s, 2), "% of limit": round(row.percent, 1)}}
                   for row in phase.rows]
        offset += length + 50
    names = {1: "phases", 2: "kernels"}
    events += [{"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": name}}
               for tid, name in names.items()]
    return {"traceEvents": events, "displayTimeUnit": "ms"}

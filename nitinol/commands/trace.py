"""`nitinol trace`: every kernel launch of the prefill and of one decode step, with what it moved and how fast."""

from __future__ import annotations

import json
import linecache
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nitinol.commands.output import Progress, print_json, print_table
from nitinol.commands.run import Settings
from nitinol.generate.profile import Run, profile
from nitinol.models.memory import gigabytes
from nitinol.runtime.bandwidth import measure_read_bandwidth
from nitinol.runtime.peak import measure_peak_rates


@dataclass(frozen=True)
class Limits:
    """What the device was measured to do: bytes read a second, operations a second on float32 and int8 (10⁹)."""

    bandwidth_gb_s: float
    float32_gop_s: float
    int8_gop_s: float


@dataclass(frozen=True)
class Row:
    """One kernel launch. `line` is the model's source line, `operation` its text; times in microseconds, `start_us`
    from the start of the list; `percent`: of the device's limit, bandwidth or arithmetic, whichever is nearer."""

    line: str
    operation: str
    kernel: str
    grid: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    bytes: int
    operations: int
    start_us: float
    time_us: float
    gb_s: float
    gflop_s: float
    percent: float


@dataclass(frozen=True)
class Phase:
    """The launches of one command list, and what the device's counters say about running it."""

    name: str
    tokens: int
    rows: list[Row]
    wall_us: float  # from the submission to the end of the wait
    counters: dict[str, int]  # submits, waits, allocations, dispatches

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    @property
    def operations(self) -> int:
        return sum(row.operations for row in self.rows)


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
        from nitinol.commands.svg import draw

        svg.write_text(draw(phases[-1], limits, model.config.name, device.description))
    if as_json:
        print_json({"model": model.config.name, "device": device.name, "description": device.description,
                    "limits": asdict(limits),
                    "phases": [asdict(phase) | {"bytes": phase.bytes, "operations": phase.operations}
                               for phase in phases]})
        return
    for phase in phases:
        print_phase(phase, limits, device.description)


def rows_of(run: Run, limits: Limits) -> list[Row]:
    """A row for each entry of a command list."""
    start = min((stamp.start for stamp in run.timestamps), default=0)
    rows = []
    for record, nbytes, stamp in zip(run.records, run.nbytes, run.timestamps):
        file, number, _ = record.place
        seconds = max(stamp.end - stamp.start, 1) / 1e9
        operations = record.operations or 0
        gb_s, gop_s = nbytes / seconds / 1e9, operations / seconds / 1e9
        peak = limits.int8_gop_s if "int8" in record.dtypes else limits.float32_gop_s
        rows.append(Row(
            f"{Path(file).name}:{number}", linecache.getline(file, number).strip(), record.name, tuple(record.grid),
            tuple(record.shapes), tuple(record.dtypes), nbytes, operations, (stamp.start - start) / 1e3,
            seconds * 1e6, gb_s, gop_s, 100 * max(gb_s / limits.bandwidth_gb_s, gop_s / peak)))
    return rows


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


def shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[:width - 1] + "…"


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

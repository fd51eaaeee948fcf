"""What a trace is about: a row for each kernel launch, the phases that they belong to, and the device's limits."""

from __future__ import annotations

import linecache
from dataclasses import dataclass
from pathlib import Path

from nitinol.generate.profile import Run


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


def shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[:width - 1] + "…"

"""How the commands print: JSON, tables, and a progress bar for what takes longer than two seconds."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Sequence
from typing import Any

PATIENCE_S = 2.0


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], numbers: Sequence[int] = ()) -> None:
    """Plain columns, as wide as their contents; those in `numbers` are aligned to the right. A terminal that is too
    narrow gets the beginnings of the lines."""
    width_of_terminal = shutil.get_terminal_size().columns if sys.stdout.isatty() else 1 << 20
    cells = [[str(cell) for cell in row] for row in [columns, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        line = "  ".join(cell.rjust(width) if i in numbers else cell.ljust(width)
                         for i, (cell, width) in enumerate(zip(row, widths)))
        print(line.rstrip()[:width_of_terminal])


class Progress:
    """A bar on stderr that appears after two seconds, if somebody is there to see it, and leaves nothing behind.
    quiet: no bar, as with --json.

        with Progress("reading the prompt") as progress:
            progress(done, total)
    """

    def __init__(self, what: str, quiet: bool = False) -> None:
        self._what, self._done, self._total, self._quiet = what, 0, 0, quiet
        self._bar: Any = None
        self._lock = threading.Lock()
        self._closed = False
        self._timer = threading.Timer(PATIENCE_S, self._show)
        self._timer.daemon = True

    def __enter__(self) -> Progress:
        if sys.stderr.isatty() and not self._quiet:
            self._timer.start()
        return self

    def __call__(self, done: int, total: int) -> None:
        self._done, self._total = done, total
        with self._lock:
            if self._bar is not None:
                self._bar.update(0, completed=done, total=total or None)

    def __exit__(self, *exception: object) -> None:
        self._timer.cancel()
        with self._lock:
            self._closed = True
            if self._bar is not None:
                self._bar.stop()

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        with self._lock:
            if not self._closed:
                self._bar = Bar(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), transient=True,
                                console=Console(file=sys.stderr))
                self._bar.add_task(self._what, completed=self._done, total=self._total or None)
                self._bar.start()

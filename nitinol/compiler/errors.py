"""Errors of a kernel's author: one sentence, the place in the source, and the way there through inlined calls."""

from __future__ import annotations

from nitinol.compiler.ir import Location


class CompilationError(Exception):
    """A kernel cannot be compiled. `str()` gives file and line, the message, the source line and a caret.

    Attributes: `message` (one sentence), `location`, `source_line`, `calls` (locations and source lines of the calls
    of inlined @jit functions that led there, innermost first).
    """

    def __init__(
        self,
        message: str,
        location: Location,
        source_line: str = "",
        calls: list[tuple[Location, str]] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.location = location
        self.source_line = source_line
        self.calls = calls or []

    def __str__(self) -> str:
        lines = [f"{self.location}: {self.message}", *_excerpt(self.location, self.source_line)]
        for location, source_line in self.calls:
            lines += [f"called from {location}", *_excerpt(location, source_line)]
        return "\n".join(lines)


def _excerpt(location: Location, source_line: str) -> list[str]:
    """The source line and a caret below the part in question, indented by four."""
    text = source_line.rstrip("\n")
    if not text.strip():
        return []
    indent = len(text) - len(text.lstrip())
    start = max(location.column - 1, indent)
    end = min(max(location.end_column - 1, start + 1), len(text)) if location.end_column > 1 else len(text)
    return ["    " + text[indent:], "    " + " " * (start - indent) + "^" * max(1, end - start)]

#!/usr/bin/env python
"""Point the documentation's links to source lines at the lines where their names are defined now.

    python tools/update_links.py

A link like [`name`](../path/file.py#L12) names a function or class of that file; without a name in backticks it leads
to the top of the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[(`?)([^]`]+)`?\]\((\.\./[^)#]+)#L(\d+)\)")


def line_of(path: Path, name: str) -> int:
    """Where a function or class is defined; ValueError where it is not."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if re.match(rf"\s*(def|class) {re.escape(name)}\b", line):
            return number
    raise ValueError(f"{path.relative_to(ROOT)} defines no {name!r}, to which the documentation links")


def links(page: Path) -> Iterator[tuple[re.Match[str], int]]:
    """Each link of a page to a source line, and the line where it should lead."""
    for match in LINK.finditer(page.read_text()):
        path = (page.parent / match[3]).resolve()
        yield match, line_of(path, match[2]) if match[1] else 1


def main() -> None:
    for page in sorted((ROOT / "docs").glob("*.md")):
        text = page.read_text()
        for match, line in links(page):
            text = text.replace(match[0], match[0].replace(f"#L{match[4]})", f"#L{line})"))
        page.write_text(text)


if __name__ == "__main__":
    main()

"""The documentation's links lead somewhere: files exist, and lines are near what the link names."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import update_links  # noqa: E402

PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])
NEAR = 40  # lines: what still lands on the same screen


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    for match, line in update_links.links(page):
        assert abs(int(match[4]) - line) <= NEAR, f"{match[0]}: now line {line}; run python tools/update_links.py"
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"

"""The documentation's links lead somewhere: files exist, and lines are near what the link names."""

from __future__ import annotations

import os
import re
import subprocess
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


@pytest.mark.parametrize("page", ["README.md", "docs/tile-language.md"])
def test_examples_run(page: str, tmp_path: Path) -> None:
    """As a reader would: copied into a file, one after the other."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    assert blocks
    given = 'import numpy as np\nn = 3000\nx, y, out = np.ones(n, "f4"), np.ones(n, "f4"), np.zeros(n, "f4")\n'
    for number, block in enumerate(blocks):
        path = tmp_path / f"block{number}.py"
        path.write_text(given + block + ("\nassert (out == 2).all()\n" if "add[" in block else ""))
        done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=120,
                              env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr


def test_the_readme_lists_every_command() -> None:
    from nitinol.cli import app

    listed = re.findall(r"^nitinol (\w+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(command.callback.__name__ for command in app.registered_commands)

"""docs/extending.md, followed as a newcomer would: its files and changes go into a copy of the package, then its tests
run there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "extending.md"
SECTIONS = {
    match[1]: match[2]
    for match in re.finditer(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE)
}
BLOCK = re.compile(r"^`([\w./]+)`\n\n```(python|diff)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def changed(text: str, change: str) -> str:
    """A text after a change: lines with a space or - before them are there, those with a space or + afterwards."""
    lines = change.splitlines(keepends=True)
    before = "".join(line[1:] or "\n" for line in lines if line[0] != "+")
    after = "".join(line[1:] or "\n" for line in lines if line[0] != "-")
    assert text.count(before) == 1, f"{before!r} is there {text.count(before)} times; the page has to be changed"
    return text.replace(before, after)


def followed(section: str, folder: Path) -> list[Path]:
    """A copy of the package with a section's code; the tests among it."""
    shutil.copytree(ROOT / "nitinol", folder / "nitinol", ignore=shutil.ignore_patterns("__pycache__", "*.gguf"))
    shutil.copytree(ROOT / "tools", folder / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    blocks = BLOCK.findall(SECTIONS[section])
    assert len(blocks) == SECTIONS[section].count("```") // 2, "a block has no file's name above it"
    for name, kind, code in blocks:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "diff":
            path.write_text(changed(path.read_text(), code))
        else:
            assert not path.exists(), f"{name} is there already; the page adds it"
            path.write_text(code)
    return [folder / name for name, _, _ in blocks if name.startswith("tests/")]


@pytest.mark.parametrize("section", [name for name, text in SECTIONS.items() if "```" in text])
def test_a_section(section: str, tmp_path: Path) -> None:
    tests = followed(section, tmp_path)
    assert len(tests) == 1
    pytest_here = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir=."]
    done = subprocess.run(
        [*pytest_here, "-W", "ignore::pytest.PytestWarning", *map(str, tests)], capture_output=True, text=True,
        timeout=300, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_kind_of_addition_is_told() -> None:
    assert [name for name, text in SECTIONS.items() if "```" in text] == [
        "An elementwise operation", "An operation with a kernel of its own", "A device", "An architecture"
    ]  # fmt: skip

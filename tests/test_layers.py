"""The layers: no import runs upwards, also inside functions, and none in a circle."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nitinol

PACKAGE = Path(nitinol.__file__).parent
# What each folder (or file) of the package may import: those before it. `Array` lives in graph/, because operations
# need it; generate/ stands for text/ and serve/.
ORDER = (
    "language formats data compiler runtime graph ops transform nn models text generate serve train interop ane "
    "parallel commands cli __main__"
).split()
# (importing module, imported module): why it has to stay. Nothing has to.
UPWARDS: dict[tuple[str, str], str] = {}
# The modules of a circle: why it has to stay. None may be in graph/, ops/, models/ or transform/.
CIRCLES = {
    ("nitinol.language.combine", "nitinol.language.shapes"): "a tile of one value becomes a scalar by `reduce`, and "
    "`reduce` over all axes begins with a `reshape`: two operations of the language defined by each other",
    ("nitinol.language.block_pointer", "nitinol.language.memory"): "`load` and `store` of a block pointer are those of "
    "its pointers: one name of the language for both",
}


def modules() -> dict[str, Path]:
    """Every module of the package, by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def room(module: str) -> str:
    """The folder of a module, or the file that stands beside the folders."""
    return module.split(".")[1]


def where(name: str) -> str:
    """The module behind a name of `nitinol` itself; of `__version__`, which belongs to nobody, the lowest."""
    return f"nitinol.{ORDER[0]}" if name == "__version__" else nitinol._PLACE.get(name, f"nitinol.{name}")


def imports(module: str, text: str) -> Iterator[tuple[int, str]]:
    """Line and module of each import inside the package, outside of blocks for type checkers alone."""
    tree = ast.parse(text)
    skipped = {
        id(inner)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for statement in block.body
        for inner in ast.walk(statement)
    }
    facade = set()  # what `nitinol` itself is called
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "nitinol":
                    facade.add(alias.asname or alias.name)
                elif alias.name.startswith("nitinol."):
                    yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} imports relatively; write the whole name"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if node.module == "nitinol":
                    yield node.lineno, where(alias.name)
                elif inner in MODULES:
                    yield node.lineno, inner
                elif node.module and node.module.startswith("nitinol."):
                    yield node.lineno, node.module
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in facade:
            yield node.lineno, where(node.attr)


@functools.cache
def edges() -> dict[str, list[tuple[int, str]]]:
    """What each module imports. `nitinol` itself, which imports at first use, is left out."""
    return {
        module: list(imports(module, path.read_text())) for module, path in MODULES.items() if module != "nitinol"
    }


def upwards(module: str, found: list[tuple[int, str]]) -> list[str]:
    return [
        f"{module}, line {line}: imports {other}, and {room(other)}/ comes after {room(module)}/"
        for line, other in found
        if ORDER.index(room(other)) > ORDER.index(room(module)) and (module, other) not in UPWARDS
    ]


def circles(graph: dict[str, list[str]]) -> list[tuple[str, ...]]:
    """The strongly connected components with more than one member (Tarjan, 1972)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        number[node] = low[node] = len(number)
        stack.append(node)
        for other in graph[node]:
            if other not in number:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], number[other])
        if low[node] == number[node]:
            at = stack.index(node)
            members, stack[at:] = stack[at:], []
            if len(members) > 1:
                found.append(tuple(sorted(members)))

    for node in graph:
        if node not in number:
            visit(node)
    return found


def test_no_import_runs_upwards() -> None:
    unknown = {room(module) for module in edges()} - set(ORDER)
    assert not unknown, f"no layer is given for {unknown}; put them into ORDER where DESIGN's table has them"
    wrong = [sentence for module, found in edges().items() for sentence in upwards(module, found)]
    assert not wrong, "\n".join(wrong)


def test_no_circles() -> None:
    graph = {module: [other for _, other in found if other in edges()] for module, found in edges().items()}
    assert sorted(circles(graph)) == sorted(CIRCLES)
    strict = {"graph", "ops", "models", "transform"}
    assert not any(room(member) in strict for circle in CIRCLES for member in circle)


def test_exceptions_are_needed() -> None:
    there = {(module, other) for module, found in edges().items() for _, other in found}
    assert set(UPWARDS) <= there


@pytest.mark.parametrize(("module", "text", "line"), [
    ("nitinol.graph.nodes", "from nitinol.ops import softmax", 1),
    ("nitinol.runtime.cpu", "import nitinol.graph.array", 1),
    ("nitinol.compiler.driver", "def f():\n    from nitinol.runtime import launch", 2),
    ("nitinol.ops.norm", "from nitinol import grad", 1),
    ("nitinol.models.llama", "import nitinol as op\n\ndef f():\n    return op.load", 4),
])  # fmt: skip
def test_what_is_wrong_is_found(module: str, text: str, line: int) -> None:
    assert [f"line {line}:" in sentence for sentence in upwards(module, list(imports(module, text)))] == [True]


def test_what_is_right_is_not() -> None:
    text = "if TYPE_CHECKING:\n    from nitinol.generate import model\nimport nitinol as op\nop.rms_norm, op.grad"
    assert not upwards("nitinol.models.llama", list(imports("nitinol.models.llama", text)))
    assert circles({"a": ["b"], "b": ["c"], "c": ["b"]}) == [("b", "c")]


def test_dir_is_the_public_names() -> None:
    """No module, no name of typing; each name is there, and listing them imports nothing."""
    code = (
        "import sys, types, nitinol; names = dir(nitinol); assert 'nitinol.graph' not in sys.modules; "
        "found = {name: getattr(nitinol, name) for name in names}; "
        "print([n for n, value in found.items() if isinstance(value, types.ModuleType) or n.startswith('_') or "
        "getattr(value, '__module__', '') in ('typing', '__future__')], dir(nitinol) == names, len(names) > 100)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] True True\n"


def test_type_checkers_see_public_names() -> None:
    """Those that are imported for them are the ones that are public, from the same places."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nitinol."):
            for alias in node.names:
                assert nitinol._PLACE[alias.name] == node.module

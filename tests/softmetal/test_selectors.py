"""Every selector that softmetal has exists in Metal with as many arguments, and every constant has its value.

selectors.json was read from the metadata in the source distribution of pyobjc-framework-Metal (its "source")."""

from __future__ import annotations

import ast
import inspect
import json
import re
from pathlib import Path

import pytest
from metal_runner import Metal

from softmetal import archive, buffers, commands, device, encoders, events, indirect, library, objects

FACTS = json.loads((Path(__file__).parent / "selectors.json").read_text())
OURS = {
    **{
        c._protocol: c
        for m in (archive, buffers, commands, device, encoders, events, indirect, library)
        for c in vars(m).values()
        if hasattr(c, "_protocol")
    },
    **{n: c for n, c in vars(Metal).items() if inspect.isclass(c) and issubclass(c, objects.Descriptor)},
}
# Of NSObject, and what the runtime's own classes have besides (lower case and not in Metal's form).
INHERITED = {"alloc", "new", "init"}


def selectors(cls):
    for name in dir(cls):
        if not name.startswith("_") and callable(getattr(cls, name)) and name not in INHERITED:
            yield name, inspect.signature(getattr(cls, name))


def known(name):
    if name in FACTS["classes"]:
        return set(FACTS["classes"][name])
    facts = FACTS["protocols"][name]
    return set(facts["methods"]).union(*(known(parent) for parent in facts["implements"]))


@pytest.mark.parametrize("name", sorted(OURS))
def test_selectors_and_argument_counts(name):
    theirs = known(name)
    for method, signature in selectors(OURS[name]):
        if method == "code":
            continue  # ours
        selector = method.replace("_", ":")
        assert selector in theirs, f"{name} has no {selector}"
        count = len([p for p in signature.parameters if p != "self"])
        assert count == selector.count(":"), f"{name} {selector}: {count} arguments"


def test_enough_classes_were_looked_at():
    assert len(OURS) >= 24 and sum(len(list(selectors(c))) for c in OURS.values()) > 250


def test_constants_and_functions():
    for name, value in FACTS["enumerators"].items():
        assert getattr(Metal, name) == value, name
    ours = [n for n in vars(Metal) if n.startswith("MTL") and isinstance(getattr(Metal, n), int)]
    assert set(ours) == set(FACTS["enumerators"])
    for name, count in FACTS["functions"].items():
        assert len(inspect.signature(getattr(Metal, name)).parameters) == count


def test_what_is_returned_besides_an_error():
    """pyobjc returns a pair for `error:`; a `reflection:` gives nothing (its _metadata.py marks it as no result)."""
    for cls in OURS.values():
        for method, signature in selectors(cls):
            if method.endswith("error_"):
                assert signature.return_annotation.count(",") == 1, f"{cls.__name__} {method}"


# ------------------------------------------------------------------------------------------------ the driver's calls

DRIVER = sorted((Path(__file__).parents[2] / "nitinol" / "runtime").glob("metal*.py"))
ALL = set().union(*map(known, [*FACTS["classes"], *FACTS["protocols"]]))
# Of NSError. Names of one word (status, commit, ...) look like any of Python's and are not checked.
ELSEWHERE = {"localizedDescription"}


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node, node.func.attr


def test_the_drivers_selectors_and_argument_counts():
    seen = set()
    for path in DRIVER:
        tree = ast.parse(path.read_text())
        pairs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Assign)
                 and isinstance(n.targets[0], ast.Tuple) and len(n.targets[0].elts) == 2}  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and re.search(r"_$|^[a-z]+[A-Z]", node.attr) and node.attr[:3] != "MTL":
                selector = node.attr.replace("_", ":")
                assert selector in ALL | ELSEWHERE, f"{path.name}, line {node.lineno}: {selector}"
                seen.add(selector)
            if isinstance(node, ast.Attribute) and re.match("MTL|NS", node.attr):
                name, facts = node.attr, {**FACTS["enumerators"], **FACTS["functions"], **FACTS["classes"]}
                assert name in facts or name == "NSMakeRange", f"{path.name}, line {node.lineno}: {name}"
        for node, name in calls(tree):
            selector = name.replace("_", ":")
            if selector in seen:
                where = f"{path.name}, line {node.lineno}: {selector}"
                assert len(node.args) == selector.count(":") and not node.keywords, where
                assert (id(node) in pairs) == selector.endswith("error:"), f"{where} gives a pair if it ends in error:"
    assert len(seen) > 40

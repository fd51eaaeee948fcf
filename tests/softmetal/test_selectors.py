"""Every selector that softmetal has exists in Metal with as many arguments, and every constant has its value.

selectors.json was read from the metadata in the source distribution of pyobjc-framework-Metal (its "source")."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
from metal_runner import Metal

from softmetal import buffers, commands, device, encoders, events, indirect, library, objects

FACTS = json.loads((Path(__file__).parent / "selectors.json").read_text())
OURS = {
    **{
        c._protocol: c
        for m in (buffers, commands, device, encoders, events, indirect, library)
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

"""What tests of operations share: memory that shows what was not written, and Metal's validation where it is there."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from nitinol.runtime import get_device


@pytest.fixture
def rng():
    return np.random.default_rng()


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Every allocation is full of 0xFF bytes, NaN in all float types and -1 in integers: a kernel that leaves out a
    place of its result shows it."""
    device = get_device()
    allocate = device.allocate

    def poisoned(nbytes, *arguments, **keywords):
        buffer = allocate(nbytes, *arguments, **keywords)
        buffer.write(np.full(buffer.nbytes, 0xFF, np.uint8))
        return buffer

    monkeypatch.setattr(device, "allocate", poisoned)


@pytest.fixture(autouse=True)
def validation(device_name):
    """On the software Metal device: bounds, races, barriers and uninitialised memory are checked, in a random order of
    threads."""
    if device_name != "metal" or sys.platform == "darwin":
        yield
        return
    import softmetal

    softmetal.set_validation(True)
    softmetal.set_seed(int(np.random.default_rng().integers(1, 1 << 20)))
    yield
    softmetal.set_validation(False)
    softmetal.set_seed(0)

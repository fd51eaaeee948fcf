"""What tests of transforms share: fresh random numbers, whose seed a failure shows."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture
def seed(record_property):
    """A fresh seed; it stands in the report of a test that fails."""
    found = int(np.random.SeedSequence().generate_state(1)[0])
    record_property("seed", found)
    print(f"seed {found}")  # pytest shows what a failing test has printed
    return found


@pytest.fixture
def rng(seed):
    return np.random.default_rng(seed)

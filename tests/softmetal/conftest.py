"""Every test starts and ends in plain mode; random inputs are fresh."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("ziglang", reason="softmetal needs clang: pip install ziglang")

import softmetal


@pytest.fixture(autouse=True)
def _plain_mode() -> Any:
    yield
    softmetal.set_validation(False)
    softmetal.set_counting(False)
    softmetal.set_seed(0)
    softmetal.configure()
    softmetal.reports()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()

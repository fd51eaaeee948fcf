"""Fresh device memory that shows what a kernel did not write, and arrays of any float type from NumPy values."""

from __future__ import annotations

import numpy as np
import pytest

import nitinol
import nitinol as na


@pytest.fixture
def poison(monkeypatch):
    """Every buffer that the device allocates starts as bytes 0xFF: NaN in each float type, -1 in each integer."""
    device = type(nitinol.get_device())
    allocate = device.allocate

    def poisoned(self, nbytes, *arguments, **keywords):
        buffer = allocate(self, nbytes, *arguments, **keywords)
        if nbytes:
            buffer.write(np.full(nbytes, 0xFF, np.uint8))
        return buffer

    monkeypatch.setattr(device, "allocate", poisoned)
    assert np.isnan(na.empty((3,)).numpy()).all(), "the poison did not reach an uninitialised array"


def typed(values, dtype="float32"):
    """The values as an Array of that type, and as the float32 values that they are after rounding."""
    array = na.array(np.asarray(values, np.float32)).astype(dtype).evaluate()
    return array, array.numpy().astype(np.float32)

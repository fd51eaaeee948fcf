"""Softmax against float64, of rows that fit a tile and of longer ones."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_runner import ENGINES, padded, poisoned, run

import nitinol as na
from nitinol.ops import softmax


@pytest.fixture
def rng():
    return np.random.default_rng()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("columns", [1, 5, 64, 100, 513])
@pytest.mark.parametrize("long", [False, True])
def test_softmax(rng, engine, columns, long):
    rows = 3
    x = (rng.normal(size=(rows, columns)) * 20 - 1000).astype(np.float32)  # exp without the shift would be 0 / 0
    if columns > 2:
        x[0, 1:] = -np.inf
    out = poisoned((rows + 1, columns))
    block = 1 << (columns - 1).bit_length()
    if long:
        run(engine, softmax.long_softmax_kernel, (rows,), x=padded(x), out=out, columns=columns, BLOCK=64)
    else:
        run(engine, softmax.softmax_kernel, (rows,), x=padded(x), out=out, columns=columns, BLOCK=block,
            EVEN=block == columns)  # fmt: skip
    # exp and the sum in fp32: a few units in the last place
    np.testing.assert_allclose(out[:rows], softmax.softmax_reference(x), rtol=2e-6, atol=1e-12)
    assert np.isnan(out[rows]).all()


@pytest.mark.parametrize("shape", [(2, 3, 40), (7,), (2, softmax.blocks("cpu")["LARGEST"] + 5)])
def test_arrays(rng, shape):
    x = rng.normal(size=shape).astype(np.float32)
    found = softmax.softmax(na.array(x)).numpy()
    np.testing.assert_allclose(found, softmax.softmax_reference(x), rtol=3e-6, atol=1e-12)

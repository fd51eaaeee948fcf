"""RMSNorm, layer norm and softmax against float64."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_runner import ENGINES, padded, poisoned, run

from nitinol.ops import norm, norm_kernels

# fp32 sums of n values in vector chains are good to a few units in the last place, 1.2e-7 each.
CLOSE = {"rtol": 2e-6, "atol": 2e-6}


@pytest.fixture
def rng():
    return np.random.default_rng()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("columns", [1, 7, 64, 96, 257, 1024])
def test_rms_norm(rng, engine, columns):
    rows = 3
    x = rng.normal(size=(rows, columns)).astype(np.float32) * 3
    weight = rng.normal(size=columns).astype(np.float32)
    out, total = poisoned((rows + 1, columns)), poisoned((rows + 1, columns))
    common = {"columns": columns, "epsilon": 1e-5, **norm._block(columns)}
    run(engine, norm.rms_norm_kernel, (rows,), x=padded(x), weight=padded(weight), residual=None, total=None, out=out,
        ADD=False, **common)  # fmt: skip
    np.testing.assert_allclose(out[:rows], norm.rms_norm_reference(x, weight, epsilon=1e-5), **CLOSE)
    assert np.isnan(out[rows]).all()

    residual = rng.normal(size=(rows, columns)).astype(np.float32)
    run(engine, norm.rms_norm_kernel, (rows,), x=padded(x), weight=padded(weight), residual=padded(residual),
        total=total, out=out, ADD=True, **common)  # fmt: skip
    np.testing.assert_array_equal(total[:rows], x + residual)
    np.testing.assert_allclose(out[:rows], norm.rms_norm_reference(x + residual, weight, epsilon=1e-5), **CLOSE)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("columns", [64, 70, 1024])
def test_programs_share_a_row(rng, engine, columns):
    """Of 70 columns in parts of 32 the last is empty."""
    rows, parts = 2, 4
    x, residual = rng.normal(size=(2, rows, columns)).astype(np.float32) * 3
    weight = rng.normal(size=columns).astype(np.float32)
    out, total = poisoned((rows + 1, columns)), poisoned((rows + 1, columns))
    common = {"columns": columns, "epsilon": 1e-5, "PARTS": parts, **norm._block(columns)}
    run(engine, norm.rms_norm_kernel, (rows, parts), x=padded(x), weight=padded(weight), residual=padded(residual),
        total=total, out=out, ADD=True, **common)  # fmt: skip
    np.testing.assert_array_equal(total[:rows], x + residual)
    np.testing.assert_allclose(out[:rows], norm.rms_norm_reference(x + residual, weight, epsilon=1e-5), **CLOSE)
    assert np.isnan(out[rows]).all() and np.isnan(total[rows]).all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("columns", [1, 48, 128, 1000])
def test_layer_norm(rng, engine, columns):
    rows = 4
    x = rng.normal(size=(rows, columns)).astype(np.float32) * 2 + 5  # a mean that a one-pass variance would feel
    weight, bias = rng.normal(size=(2, columns)).astype(np.float32)
    out = poisoned((rows + 1, columns))
    run(engine, norm_kernels.norm_kernel, (rows,), x=padded(x), weight=padded(weight), bias=padded(bias), out=out,
        residual=None, total=None, means=None, scales=None, columns=columns, epsilon=1e-5, LAYER=True,
        **norm._block(columns))  # fmt: skip
    expected = norm.layer_norm_reference(x, weight, bias)
    np.testing.assert_allclose(out[:rows], expected, rtol=1e-5, atol=1e-5)
    assert np.isnan(out[rows]).all()

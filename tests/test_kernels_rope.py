"""Rotary embedding, QK-norm and the write to the cache against float64."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_runner import padded, poisoned, run

from nitinol.ops import rope, rope_and_cache
from nitinol.ops.norm import rms_norm_reference
from nitinol.ops.rope_and_cache import head_arguments, rope_reference


@pytest.fixture
def rng():
    return np.random.default_rng()


CASES = [
    ("native", 64, 2, True, False, np.float16),
    ("native", 20, 3, True, True, np.float32),
    ("native", 96, 1, False, True, np.float16),
    ("native", 128, 4, False, False, np.float32),
    ("interpreter", 12, 2, True, True, np.float16),
    ("interpreter", 16, 2, False, False, np.float32),
]


@pytest.mark.parametrize(("engine", "head_dim", "group", "interleaved", "norm", "cache"), CASES)
def test_rope_and_cache(rng, engine, head_dim, group, interleaved, norm, cache):
    tokens, kv_heads, context, start = 3, 2, 11, 9  # the last token is outside the cache
    q = rng.normal(size=(tokens, kv_heads * group, head_dim)).astype(np.float32)
    k, v = rng.normal(size=(2, tokens, kv_heads, head_dim)).astype(np.float32)
    weights = rng.uniform(0.5, 2, size=(2, head_dim)).astype(np.float32)
    frequencies = rope.rope_frequencies(head_dim, 10000.0)
    q_out = poisoned((tokens + 1, kv_heads * group, head_dim))
    k_cache, v_cache = (poisoned((kv_heads, context, head_dim), cache) for _ in range(2))
    run(engine, rope_and_cache.rope_kernel, (tokens, kv_heads), q=padded(q), k=padded(k), v=padded(v),
        frequencies=padded(frequencies), position=np.array([start], np.int32),
        q_norm=padded(weights[0]) if norm else None, k_norm=padded(weights[1]) if norm else None, q_out=q_out,
        k_cache=k_cache, v_cache=v_cache, context=context, epsilon=1e-6,
        **head_arguments(group, head_dim, interleaved, norm))  # fmt: skip
    positions = start + np.arange(tokens)
    if norm:
        q, k = (rms_norm_reference(x, w, epsilon=1e-6) for x, w in zip((q, k), weights))
    close = {"rtol": 2e-6, "atol": 3e-6}  # two products and a sum in fp32; sine and cosine to a few ulp
    np.testing.assert_allclose(q_out[:-1], rope_reference(q, positions, frequencies, interleaved), **close)
    assert np.isnan(q_out[-1]).all()
    turned = rope_reference(k, positions, frequencies, interleaved).transpose(1, 0, 2)
    if cache == np.float16:
        close = {"rtol": 1e-3, "atol": 1e-6}  # one rounding to 11 bits
    np.testing.assert_allclose(k_cache[:, start:].astype(np.float64), turned[:, :2], **close)
    np.testing.assert_array_equal(v_cache[:, start:], v.transpose(1, 0, 2)[:, :2].astype(cache))
    assert np.isnan(k_cache[:, :start]).all() and np.isnan(v_cache[:, :start]).all()


@pytest.mark.parametrize(("engine", "interleaved"), [("native", True), ("native", False), ("interpreter", False)])
def test_several_sequences(rng, engine, interleaved):
    """Of the third nothing is written: its position is below 0."""
    positions, tokens, kv_heads, group, head_dim, context = (4, 0, -9), 3, 2, 3, 24, 8
    count = len(positions)
    q = rng.normal(size=(count, tokens, kv_heads * group, head_dim)).astype(np.float32)
    k, v = rng.normal(size=(2, count, tokens, kv_heads, head_dim)).astype(np.float32)
    frequencies = rope.rope_frequencies(head_dim)
    q_out = poisoned((count * tokens + 1, kv_heads * group, head_dim))
    caches = poisoned((2, count, kv_heads, context, head_dim))
    run(engine, rope_and_cache.rope_kernel, (tokens, kv_heads, count), q=padded(q), k=padded(k), v=padded(v),
        frequencies=padded(frequencies), position=np.array(positions, np.int32), q_norm=None, k_norm=None, q_out=q_out,
        k_cache=caches[0], v_cache=caches[1], context=context, epsilon=1e-6,
        **head_arguments(group, head_dim, interleaved, False))  # fmt: skip
    close = {"rtol": 2e-6, "atol": 3e-6}
    assert np.isnan(q_out[-1]).all()
    for i, position in enumerate(positions):
        places = position + np.arange(tokens)
        expected = rope_reference(q[i], places, frequencies, interleaved)
        np.testing.assert_allclose(q_out[i * tokens : (i + 1) * tokens], expected, **close)
        keys, values = caches[:, i]
        if position >= 0:
            turned = rope_reference(k[i], places, frequencies, interleaved)
            np.testing.assert_allclose(keys[:, places].swapaxes(0, 1), turned, **close)
            np.testing.assert_array_equal(values[:, places].swapaxes(0, 1), v[i])
        others = np.setdiff1d(np.arange(context), places)
        assert np.isnan(keys[:, others]).all() and np.isnan(values[:, others]).all()


def test_large_positions(rng):
    head_dim, tokens, start = 64, 2, 131000
    frequencies = rope.rope_frequencies(head_dim, 500000.0, rope.llama3_factors(head_dim, 500000.0))
    q, k, v = rng.normal(size=(3, tokens, 1, head_dim)).astype(np.float32)
    q_out = poisoned(q.shape)
    caches = poisoned((2, 1, 4, head_dim))
    run("native", rope_and_cache.rope_kernel, (tokens, 1), q=q, k=k, v=v, frequencies=frequencies,
        position=np.array([start], np.int32), q_norm=None, k_norm=None, q_out=q_out, k_cache=caches[0],
        v_cache=caches[1], context=4, epsilon=1e-6, **head_arguments(1, head_dim, True, False))  # fmt: skip
    expected = rope_reference(q, start + np.arange(tokens), frequencies, True)
    np.testing.assert_allclose(q_out, expected, rtol=2e-6, atol=3e-6)
    assert np.isnan(caches).all()  # positions outside the cache are not written


def test_llama3_factors_keep_short_waves_and_stretch_long_ones():
    factors = rope.llama3_factors(128, 500000.0)
    assert factors[0] == 1 and factors[-1] == 8 and (np.diff(factors) >= 0).all()
    # From the published inv_freq of Llama 3.1: pair 32 lies in the interpolated range.
    wavelength = 2 * np.pi * 500000.0 ** (64 / 128)
    smooth = (8192 / wavelength - 1) / 3
    np.testing.assert_allclose(1 / factors[32], (1 - smooth) / 8 + smooth, rtol=1e-6)

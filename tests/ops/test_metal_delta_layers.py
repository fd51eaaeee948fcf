"""The kernels of a gated delta layer as Metal source, checked access by access (bounds, races, barriers, uninitialised
threadgroup memory) under several orders of their threads, which must not show in the result."""

from __future__ import annotations

import sys

import numpy as np
import pytest

if sys.platform == "darwin":
    pytest.skip("about the software Metal device; `import Metal` is the real one here", allow_module_level=True)
pytest.importorskip("ziglang", reason="softmetal needs clang: pip install ziglang")

from validated_metal import validated_metal

import nitinol as na
import softmetal
from nitinol.ops.delta_rule import delta_rule_forward, delta_rule_recurrent, delta_rule_reference
from nitinol.ops.delta_rule_backward import delta_rule_backward
from nitinol.ops.gated_norm import gated_norm_backward, gated_norm_forward, gated_norm_reference
from nitinol.ops.short_convolution import (
    short_convolution_forward,
    short_convolution_reference,
    short_convolution_step,
)
from nitinol.ops.short_convolution_backward import short_convolution_backward

SEEDS = range(1, 4)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # fp32 sums of up to some hundred products, in any order


@pytest.fixture(autouse=True)
def device():
    with validated_metal() as opened:
        yield opened


def under_all_seeds(function):
    """The arrays that the function makes, as NumPy's; the same under every seed. DeviceError if validation finds
    something."""
    first = None
    for seed in SEEDS:
        softmetal.set_seed(seed)
        found = [array.numpy() for array in function()]
        first = first or found
        for one, other in zip(found, first):
            np.testing.assert_array_equal(one, other, err_msg=f"seed {seed}")
    return first


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("lengths", [None, [5, 0, 31, 1]])
def test_delta_rule(rng, lengths):
    tokens, v_heads, dim_k, dim_v = 37, 2, 20, 12
    sequences = 1 if lengths is None else len(lengths)
    starts = None if lengths is None else na.array(np.cumsum([0, *lengths]).astype(np.int32))
    values = [*normal(rng, 2, 1, tokens, 1, dim_k), normal(rng, 1, tokens, v_heads, dim_v)]
    values += [-rng.exponential(size=(1, tokens, v_heads)), rng.uniform(size=(1, tokens, v_heads))]
    arrays = [na.array(x.astype(np.float32)) for x in values]
    initial, d_final = normal(rng, 2, sequences, v_heads, dim_k, dim_v)
    d_out = normal(rng, *values[2].shape)

    def both():
        state = na.array(initial).evaluate()
        forward = delta_rule_forward("metal", *arrays, na.array(initial), normalise=True, starts=starts)
        backward = delta_rule_backward(
            "metal", na.array(d_out), na.array(d_final), *arrays, na.array(initial), normalise=True, starts=starts
        )
        if lengths is None:
            return *forward, *backward, delta_rule_recurrent("metal", *arrays, state, normalise=True), state
        return *forward, *backward

    out, last, *rest = under_all_seeds(both)
    if lengths is None:
        expected = delta_rule_reference(*(x.astype(np.float32) for x in values), initial, normalise=True)
        for found, other in zip((out, last, *rest[-2:]), (*expected, *expected)):
            np.testing.assert_allclose(found, other, **CLOSE)


@pytest.mark.parametrize("lengths", [None, [5, 0, 13, 1]])
def test_short_convolution(rng, lengths):
    tokens, channels, width = 19, 21, 4
    sequences = 1 if lengths is None else len(lengths)
    starts = None if lengths is None else na.array(np.cumsum([0, *lengths]).astype(np.int32))
    x, weight, bias = normal(rng, 1, tokens, channels), normal(rng, channels, width), normal(rng, channels)
    before, d_final = normal(rng, 2, sequences, width - 1, channels)
    d_out = normal(rng, *x.shape)

    def both():
        state = na.array(before).evaluate()
        given = na.array(x), na.array(weight), na.array(bias)
        forward = short_convolution_forward("metal", *given, na.array(before), starts)
        backward = short_convolution_backward(
            "metal", na.array(d_out), na.array(d_final), *given, na.array(before), starts
        )
        if lengths is None:
            return *forward, *backward, short_convolution_step("metal", *given, state), state
        return *forward, *backward

    out, last, *rest = under_all_seeds(both)
    if lengths is None:
        expected = short_convolution_reference(x, weight, bias, before)
        for found, other in zip((out, last, *rest[-2:]), (*expected, *expected)):
            np.testing.assert_allclose(found, other, **CLOSE)


def test_gated_norm(rng):
    x, gate, d_out, weight = normal(rng, 11, 40), normal(rng, 11, 40), normal(rng, 11, 40), normal(rng, 40)
    arrays = [na.array(a) for a in (x, gate, weight)]
    out, *_ = under_all_seeds(
        lambda: (gated_norm_forward("metal", *arrays), *gated_norm_backward("metal", na.array(d_out), *arrays))
    )
    np.testing.assert_allclose(out, gated_norm_reference(x, gate, weight), **CLOSE)

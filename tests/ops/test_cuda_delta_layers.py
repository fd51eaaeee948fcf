"""The kernels of a gated delta layer as CUDA source, which runs on the CPU here, through Nitinol's own driver: they
give what the CPU target gives, which other tests compare with float64."""

from __future__ import annotations

import numpy as np
import pytest
from software_cuda import Gpu, open_gpu

import nitinol as na
from nitinol.ops.delta_rule import delta_rule_forward, delta_rule_recurrent
from nitinol.ops.delta_rule_backward import delta_rule_backward
from nitinol.ops.gated_norm import gated_norm_backward, gated_norm_forward
from nitinol.ops.short_convolution import short_convolution_forward, short_convolution_step
from nitinol.ops.short_convolution_backward import short_convolution_backward
from nitinol.runtime import get_device, using_device

CLOSE = 5e-6  # fp32 sums of some hundred products, in another order


@pytest.fixture
def gpu(monkeypatch):
    device = open_gpu(monkeypatch, Gpu())
    yield device
    device.close()


def agree(gpu, function, values, dtype="float32", tolerance=CLOSE):
    """function(target, *arrays of the values) gives the same arrays on the GPU as here."""

    def on(device):
        with using_device(device):
            return [x.numpy() for x in function(device.name, *(na.array(v).astype(dtype) for v in values))]

    for number, (found, expected) in enumerate(zip(on(gpu), on(get_device()))):
        size = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * size, err_msg=f"result {number}")


def delta_rule(target, q, k, v, g, beta, initial):
    initial = initial.astype("float32")
    state = (initial * 1.0).evaluate()
    forward = delta_rule_forward(target, q, k, v, g, beta, initial, normalise=True)
    backward = delta_rule_backward(target, v, initial, q, k, v, g, beta, initial, normalise=True)
    return *forward, *backward, delta_rule_recurrent(target, q, k, v, g, beta, state, normalise=True), state


# With halves results have 11 or 8 bits, and products on CUDA 11.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", CLOSE), ("float16", 3e-3), ("bfloat16", 8e-3)])
def test_delta_rule(rng, gpu, dtype, tolerance):
    tokens, v_heads, dim_k, dim_v = 70, 2, 20, 24
    values = [*rng.normal(size=(2, 1, tokens, 1, dim_k)), rng.normal(size=(1, tokens, v_heads, dim_v))]
    values += [-rng.exponential(size=(1, tokens, v_heads)), rng.uniform(size=(1, tokens, v_heads))]
    values.append(rng.normal(size=(1, v_heads, dim_k, dim_v)))
    agree(gpu, delta_rule, [x.astype(np.float32) for x in values], dtype, tolerance)


def short_convolution(target, x, weight, bias, state):
    forward = short_convolution_forward(target, x, weight, bias, state)
    backward = short_convolution_backward(target, x, state, x, weight, bias, state)
    carried = (state * 1.0).evaluate()
    return *forward, *backward, short_convolution_step(target, x, weight, bias, carried), carried


def test_short_convolution(rng, gpu):
    shapes = (2, 37, 150), (150, 4), (150,), (2, 3, 150)
    agree(gpu, short_convolution, [rng.normal(size=shape).astype(np.float32) for shape in shapes])


def gated_norm(target, x, gate, weight):
    return gated_norm_forward(target, x, gate, weight), *gated_norm_backward(target, gate, x, gate, weight)


def test_gated_norm(rng, gpu):
    agree(gpu, gated_norm, [rng.normal(size=shape).astype(np.float32) for shape in ((33, 100), (33, 100), (100,))])

"""Adapters, experts and AdamW as CUDA source that runs on the CPU (software_cuda.py), in the blocks for CUDA."""

from __future__ import annotations

import numpy as np
import pytest
from software_cuda import Gpu, open_gpu
from stored_weights import weights_of

import nitinol as na
from nitinol.ops import adamw, experts, lora, lora_gradients, routing
from nitinol.runtime import using_device


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    device = open_gpu(monkeypatch, Gpu())
    with using_device(device):
        yield device
    device.close()


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def close(found, expected, tolerance=1e-5):
    """fp32 sums of some hundred products are good to 1e-5 of the largest result."""
    expected = np.asarray(expected, np.float64)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=tolerance * max(1e-30, np.abs(expected).max()))


@pytest.mark.parametrize(("format", "tokens", "rank", "adapter", "dtype"), [
    ("F32", 3, 5, "first", "float32"), ("F32", 4, 128, "beside", "float32"), ("Q4_K", 2, 16, "first", "float32"),
    ("BF16", 20, 16, "first", "bfloat16"), ("Q4_K", 20, 128, "beside", "bfloat16"), ("F16", 70, 8, "beside", "float16"),
])  # fmt: skip
def test_adapters(rng, format, tokens, rank, adapter, dtype):
    rows, columns = 19, 256 if format == "Q4_K" else 70
    weights, values = weights_of(normal(rng, rows, columns), format)
    x, down, up, gain, dy = (
        na.array(normal(rng, *s)).astype(dtype)
        for s in ((tokens, columns), (rank, columns), (rows, rank), (columns,), (tokens, rows))
    )
    wide = [a.numpy() for a in (x, down, up, gain, dy)]
    tolerance = {"float32": 1e-5, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]  # a unit in the last place
    forward = lora.lora_forward("cuda", x, weights, down, up, 0.5, gain, adapter=adapter)
    close(forward.y, lora.lora_reference(wide[0], values, *wide[1:3], 0.5, wide[3]), tolerance)
    found = lora_gradients.lora_backward("cuda", dy, x, weights, down, up, 0.5, forward, gain)
    expected = lora_gradients.lora_gradients_reference(wide[4], wide[0], values, *wide[1:3], 0.5, wide[3])
    for gradient, wanted in zip(found[:4], expected):
        close(gradient, wanted, tolerance)


@pytest.mark.parametrize(("tokens", "count"), [(3, 7), (150, 5)])
def test_experts(rng, tokens, count):
    rows, columns, chosen = 10, 33, 2
    logits, weights, x = normal(rng, tokens, count), normal(rng, count, rows, columns), normal(rng, tokens, columns)
    dy = normal(rng, tokens * chosen, rows)
    mixing, places = routing.route_reference(logits, chosen)
    offsets, source, place = routing.dispatch_reference(places, count)
    routed = routing.route_forward("cuda", na.array(logits), chosen)
    order = routing.dispatch_forward("cuda", routed.experts, count)
    for found, wanted in zip(order, (offsets, source, place)):
        np.testing.assert_array_equal(found.numpy(), wanted)
    operands = na.array(x), na.array(weights), order, True
    y = experts.expert_linear_forward("cuda", *operands)
    expected = experts.expert_linear_reference(x, weights, places, source, True)
    close(y, expected)
    close(experts.combine_forward("cuda", y, routed.weights, order), experts.combine_reference(expected, mixing, place))
    gradients = experts.expert_linear_backward("cuda", na.array(dy), *operands)
    for found, wanted in zip(
        gradients, experts.expert_linear_gradients_reference(dy, x, weights, places, source, True)
    ):
        close(found, wanted)


@pytest.mark.parametrize("eight_bit", [False, True])
def test_adamw(rng, eight_bit):
    size = 5 * 256
    start, given, zeros = normal(rng, size), normal(rng, size), np.zeros(size)
    parameters, gradients = na.array(start).evaluate(), na.array(given)
    state = adamw.adamw_state(size, eight_bit)
    rate, decay = (na.array(np.full(n, 0.01, np.float32)).evaluate() for n in (1, 5))
    adamw.adamw_step("cuda", parameters, gradients, state, rate, decay,
                     squares=adamw.gradient_squares("cuda", gradients), limit=1.0)  # fmt: skip
    after, _, _ = adamw.adamw_reference(
        start.astype(np.float64), given, zeros, zeros, 1, 0.01, zeros + 0.01, limit=1.0
    )
    close(parameters, after, 1e-6)

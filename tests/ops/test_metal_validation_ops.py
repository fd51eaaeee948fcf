"""Adapters, experts and AdamW as Metal source, checked access by access (bounds, races, barriers, uninitialised
threadgroup memory) under several orders of threads, which must not show in the result."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("ziglang", reason="softmetal needs clang: pip install ziglang")

from stored_weights import weights_of
from validated_metal import validated_metal

import nitinol as na
import softmetal
from nitinol.ops import adamw, experts, lora, lora_gradients, routing

SEEDS = range(1, 4)


@pytest.fixture(autouse=True)
def device():
    with validated_metal() as opened:
        yield opened


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def check(compute, expected, tolerance=1e-5):
    """`compute` gives Arrays; fp32 sums of some hundred products are good to 1e-5 of the largest result."""
    first = None
    for seed in SEEDS:
        softmetal.set_seed(seed)
        found = [array.numpy() for array in compute()]
        first = first or found
        for one, other in zip(found, first):
            np.testing.assert_array_equal(one, other, err_msg=f"seed {seed}")
    for one, wanted in zip(first, expected, strict=True):
        np.testing.assert_allclose(one, wanted, rtol=0, atol=tolerance * max(1e-30, np.abs(wanted).max()))


@pytest.mark.parametrize(("format", "tokens", "rank", "adapter", "with_norm"), [
    ("F32", 2, 5, "first", True), ("F32", 4, 16, "beside", True), ("F32", 4, 128, "beside", False),
    ("F32", 11, 5, "first", False), ("F32", 40, 9, "beside", True), ("F32", 70, 128, "first", True),
    ("Q8_0", 3, 5, "first", True), ("Q4_0", 11, 5, "first", False), ("Q4_K", 4, 6, "beside", False),
    ("Q4_K", 40, 128, "beside", True),
])  # fmt: skip
def test_adapters(rng, format, tokens, rank, adapter, with_norm):
    rows, columns = 19, {"F32": 70, "Q4_K": 256}.get(format, 64)
    weights, values = weights_of(normal(rng, rows, columns), format)
    x, down, up, dy = (normal(rng, *s) for s in ((tokens, columns), (rank, columns), (rows, rank), (tokens, rows)))
    gain = normal(rng, columns) if with_norm else None

    def compute():
        arrays = [None if a is None else na.array(a) for a in (x, down, up, gain, dy)]
        forward = lora.lora_forward("metal", *(arrays[0], weights, *arrays[1:3]), 0.5, arrays[3], adapter=adapter)
        gradients = lora_gradients.lora_backward(
            "metal", arrays[4], arrays[0], weights, *arrays[1:3], 0.5, forward, arrays[3]
        )
        return [forward.y, *(gradient for gradient in gradients if gradient is not None)]

    gradients = lora_gradients.lora_gradients_reference(dy, x, values, down, up, 0.5, gain)[:4]
    check(compute, [lora.lora_reference(x, values, down, up, 0.5, gain), *(g for g in gradients if g is not None)])


@pytest.mark.parametrize(("tokens", "count"), [(3, 7), (150, 5)])
def test_experts(rng, tokens, count):
    rows, columns, chosen = 10, 33, 2
    logits, weights, x = normal(rng, tokens, count), normal(rng, count, rows, columns), normal(rng, tokens, columns)
    dy, d_out = normal(rng, tokens * chosen, rows), normal(rng, tokens, rows)
    mixing, places = routing.route_reference(logits, chosen)
    offsets, source, place = routing.dispatch_reference(places, count)
    y = experts.expert_linear_reference(x, weights, places, source, True)
    dx, d_weights = experts.expert_linear_gradients_reference(dy, x, weights, places, source, True)
    expected = [
        offsets, source, place, y, experts.combine_reference(y, mixing, place), dx, d_weights,
        *experts.combine_gradients_reference(d_out, y, mixing, place),
        routing.route_gradient_reference(mixing * 0 + 1, logits, places, normalise=False),
    ]  # fmt: skip

    def compute():
        array = na.array(logits)
        routed = routing.route_forward("metal", array, chosen)
        order = routing.dispatch_forward("metal", routed.experts, count)
        operands = na.array(x), na.array(weights), order, True
        y = experts.expert_linear_forward("metal", *operands)
        return [
            *order[:3], y, experts.combine_forward("metal", y, routed.weights, order),
            *experts.expert_linear_backward("metal", na.array(dy), *operands),
            *experts.combine_backward("metal", na.array(d_out), y, routed.weights, order),
            routing.route_backward("metal", na.array(np.ones((tokens, chosen), np.float32)), array, routed,
                                   normalise=False),
        ]  # fmt: skip

    check(compute, expected)


@pytest.mark.parametrize("eight_bit", [False, True])
def test_adamw(rng, eight_bit):
    size = 5 * 256
    parameters, given, decay = normal(rng, size), normal(rng, size), rng.random(5).astype(np.float32)
    zeros = np.zeros(size)
    rate = float(np.float32(0.01))
    after, _, _ = adamw.adamw_reference(
        parameters.astype(np.float64), given, zeros, zeros, 1, rate, np.repeat(decay, 256), limit=1.0
    )

    def compute():
        array, gradients = na.array(parameters).evaluate(), na.array(given)
        state = adamw.adamw_state(size, eight_bit)
        norm = adamw.adamw_step(
            "metal", array, gradients, state, na.array(np.array([0.01], np.float32)), na.array(decay),
            squares=adamw.gradient_squares("metal", gradients), limit=1.0,
        )  # fmt: skip
        return [array, norm, state.steps]

    check(compute, [after, np.array([np.linalg.norm(given.astype(np.float64))]), np.ones(5)], 1e-6)

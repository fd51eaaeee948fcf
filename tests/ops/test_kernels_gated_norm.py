"""RMSNorm with a gate against float64, and its gradients against PyTorch's and finite differences."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
from kernel_runner import ENGINES
from poisoned_memory import poison, typed  # noqa: F401

import nitinol
import nitinol as na
from nitinol.ops import gated_norm
from nitinol.ops.gated_norm import gated_norm_backward, gated_norm_forward, gated_norm_reference

pytestmark = pytest.mark.usefixtures("poison")
CLOSE = {"rtol": 2e-6, "atol": 5e-6}  # an fp32 sum of a row's squares, rsqrt, exp and products of values up to 10
SHAPES = [(1, 1), (3, 5, 7), (2, 9, 128), (5, 100), (3, 1500)]


def problem(rng, *shape):
    return [rng.normal(size=size).astype(np.float32) for size in (shape, shape, shape[-1:])]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(rng, device_name, engine, shape):
    values = problem(rng, *shape)
    with nitinol.interpret() if engine == "interpreter" else nullcontext():
        found = gated_norm_forward(device_name, *(na.array(x) for x in values), epsilon=1e-5).evaluate()
    np.testing.assert_allclose(found.numpy(), gated_norm_reference(*values, epsilon=1e-5), **CLOSE)


# The result is rounded once to 11 (8) bits.
@pytest.mark.parametrize(("dtype", "rounding"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_halves(rng, device_name, dtype, rounding):
    arrays, rounded = zip(*(typed(x, dtype) for x in problem(rng, 6, 40)))
    found = gated_norm_forward(device_name, *arrays)
    assert found.dtype == arrays[0].dtype
    np.testing.assert_allclose(found.numpy(), gated_norm_reference(*rounded), rtol=rounding, atol=1e-6)
    gradients = gated_norm_backward(device_name, arrays[0], *arrays)
    for one, other, like in zip(gradients, torch_gradients(rounded, rounded[0], 1e-6), arrays):
        assert one.dtype == like.dtype
        np.testing.assert_allclose(one.numpy(), other, rtol=rounding, atol=2e-5)


def torch_gradients(values, d_out, epsilon):
    torch = pytest.importorskip("torch")
    leaves = [torch.tensor(x.astype(np.float64), requires_grad=True) for x in values]
    x, gate, weight = leaves
    y = torch.nn.functional.rms_norm(x, weight.shape, weight, epsilon) * torch.nn.functional.silu(gate)
    return [one.numpy() for one in torch.autograd.grad((y * torch.tensor(d_out.astype(np.float64))).sum(), leaves)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("parts", [1, 3])
def test_gradients(rng, monkeypatch, device_name, engine, shape, parts):
    before = gated_norm.blocks
    monkeypatch.setattr(gated_norm, "blocks", lambda *a: {**before(*a), "parts": parts})
    values, d_out = problem(rng, *shape), rng.normal(size=shape).astype(np.float32)
    with nitinol.interpret() if engine == "interpreter" else nullcontext():
        found = gated_norm_backward(device_name, na.array(d_out), *(na.array(x) for x in values), epsilon=1e-5)
        na.evaluate(*found)
    for name, one, other in zip(("x", "gate", "weight"), found, torch_gradients(values, d_out, 1e-5)):
        # A row of one value has a gradient by x of what remains of a difference of two equal terms.
        size = max(1.0, np.abs(other).max(), np.abs(1 / values[0]).max() if shape[-1] == 1 else 0)
        np.testing.assert_allclose(one.numpy(), other, rtol=1e-5, atol=1e-5 * size, err_msg=name)


def test_gradients_are_slopes_of_the_reference(rng, device_name):
    """Along a random direction, by central differences in float64."""
    values, d_out = problem(rng, 7, 33), rng.normal(size=(7, 33)).astype(np.float32)
    gradients = gated_norm_backward(device_name, na.array(d_out), *(na.array(x) for x in values))
    for i, (name, gradient) in enumerate(zip(("x", "gate", "weight"), gradients)):
        step = 1e-4 * rng.normal(size=gradient.shape)
        above, below = (
            (gated_norm_reference(*(x + sign * step if i == j else x for j, x in enumerate(values))) * d_out).sum()
            for sign in (1, -1)
        )
        found = (gradient.numpy().astype(np.float64) * step).sum()
        size = np.linalg.norm(gradient.numpy()) * np.linalg.norm(step)
        np.testing.assert_allclose(found, (above - below) / 2, atol=2e-6 * size, err_msg=name)


def test_shapes_that_do_not_fit_are_refused_in_a_sentence(rng, device_name):
    x, gate, weight = (na.array(a) for a in problem(rng, 3, 8))
    with pytest.raises(ValueError, match=r"gate has shape \(2, 8\), expected \(3, 8\)"):
        gated_norm_forward(device_name, x, gate[:2], weight)
    with pytest.raises(ValueError, match=r"weight has shape \(4,\), expected \(8,\)"):
        gated_norm_forward(device_name, x, gate, weight[:4])
    with pytest.raises(ValueError, match=r"d_out has shape \(2, 8\), expected x's \(3, 8\)"):
        gated_norm_backward(device_name, gate[:2], x, gate, weight)
    with pytest.raises(ValueError, match=r"expected \[..., columns\] with 1 to 16384 columns"):
        gated_norm_forward(device_name, *(na.zeros((1, 1 << 15)),) * 2, na.zeros((1 << 15,)))

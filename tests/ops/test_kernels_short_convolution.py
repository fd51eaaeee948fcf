"""The causal short convolution against float64, with states, packed sequences, and gradients."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import pytest
from kernel_runner import ENGINES
from poisoned_memory import poison, typed  # noqa: F401

import nitinol
import nitinol as na
from nitinol.ops import short_convolution
from nitinol.ops.short_convolution import (
    short_convolution_forward,
    short_convolution_reference,
    short_convolution_step,
)
from nitinol.ops.short_convolution_backward import short_convolution_backward

pytestmark = pytest.mark.usefixtures("poison")
CLOSE = {"rtol": 2e-6, "atol": 2e-6}  # five fp32 products of size 1 and SiLU
SUMS = {"rtol": 1e-5, "atol": 1e-5}  # over some hundred tokens


def problem(rng, batch, tokens, channels, width):
    """x, weight, bias, state."""
    shapes = (batch, tokens, channels), (channels, width), (channels,), (batch, width - 1, channels)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def optional(array):
    return None if array is None else na.array(array)


# One value; fewer tokens than the state has; more channels and tokens than a block; several sequences in one block.
SHAPES = [(1, 1, 1, 4), (2, 2, 5, 4), (1, 37, 130, 4), (3, 7, 20, 3), (2, 18, 64, 2)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("plain", [False, True])  # without bias, state and SiLU
def test_forward_and_step(rng, device_name, engine, shape, plain):
    x, weight, bias, state = problem(rng, *shape)
    if plain:
        bias, state = None, None
    out, window = short_convolution_reference(x, weight, bias, state, not plain)
    arrays = na.array(x), na.array(weight), optional(bias)
    carried = na.array(np.zeros_like(window, np.float32) if plain else state).evaluate()
    with nitinol.interpret() if engine == "interpreter" else nullcontext():
        found, final = short_convolution_forward(device_name, *arrays, optional(state), activation=not plain)
        na.evaluate(found, final)
        stepped = short_convolution_step(device_name, *arrays, carried, activation=not plain).evaluate()
    np.testing.assert_allclose(found.numpy(), out, **CLOSE)
    np.testing.assert_allclose(stepped.numpy(), out, **CLOSE)
    np.testing.assert_array_equal(final.numpy(), window.astype(np.float32))
    np.testing.assert_array_equal(carried.numpy(), window.astype(np.float32))


@pytest.mark.parametrize("width", [2, 3, 4])
def test_a_prompt_and_then_tokens(rng, device_name, width):
    x, weight, bias, _ = problem(rng, 2, 23, 40, width)
    out, window = short_convolution_reference(x, weight, bias)
    arrays = na.array(weight), na.array(bias)
    _, state = short_convolution_forward(device_name, na.array(x[:, :17]), *arrays)
    state.evaluate()
    for start, stop in ((17, 18), (18, 19), (19, 21), (21, 23)):
        found = short_convolution_step(device_name, na.array(x[:, start:stop]), *arrays, state)
        np.testing.assert_allclose(found.numpy(), out[:, start:stop], **CLOSE)
    np.testing.assert_array_equal(state.numpy(), window.astype(np.float32))


# A result is rounded once to 11 (8) bits.
@pytest.mark.parametrize(("dtype", "rounding"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_halves(rng, device_name, dtype, rounding):
    values = problem(rng, 2, 19, 24, 4)
    arrays, rounded = zip(*(typed(x, dtype) for x in values))
    out, window = short_convolution_reference(*rounded)
    found, final = short_convolution_forward(device_name, *arrays)
    assert found.dtype == final.dtype == arrays[0].dtype
    np.testing.assert_allclose(found.numpy(), out, rtol=rounding, atol=2e-6)
    np.testing.assert_array_equal(final.numpy(), window)
    stepped = short_convolution_step(device_name, *arrays)
    np.testing.assert_array_equal(stepped.numpy(), found.numpy())
    np.testing.assert_array_equal(arrays[3].numpy(), window)


def torch_gradients(values, d_out, d_final, activation):
    torch = pytest.importorskip("torch")
    leaves = [torch.tensor(x.astype(np.float64), requires_grad=True) for x in values]
    x, weight, bias, state = leaves
    line = torch.cat([state, x], 1)
    z = torch.nn.functional.conv1d(line.mT, weight[:, None], bias, groups=weight.shape[0]).mT
    y = torch.nn.functional.silu(z) if activation else z
    loss = (y * torch.tensor(d_out)).sum() + (line[:, x.shape[1] :] * torch.tensor(d_final)).sum()
    return [one.numpy() for one in torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", [False, True])
def test_gradients(rng, device_name, engine, shape, activation):
    values = problem(rng, *shape)
    d_out, d_final = rng.normal(size=values[0].shape), rng.normal(size=values[3].shape)
    d_out, d_final = d_out.astype(np.float32), d_final.astype(np.float32)
    with nitinol.interpret() if engine == "interpreter" else nullcontext():
        found = short_convolution_backward(
            device_name, *(na.array(x) for x in (d_out, d_final, *values)), activation=activation
        )
        na.evaluate(*found)
    expected = torch_gradients(values, d_out.astype(np.float64), d_final.astype(np.float64), activation)
    for name, one, other in zip(("x", "weight", "bias", "state"), found, expected):
        np.testing.assert_allclose(one.numpy(), other, **SUMS, err_msg=name)


def test_parts_of_several_blocks_of_tokens(rng, monkeypatch, device_name):
    """Of 130 tokens in 3 parts; the last has fewer."""
    before = short_convolution.blocks
    monkeypatch.setattr(short_convolution, "blocks", lambda *a: {**before(*a), "BLOCK_T": 8, "parts": 3})
    values = problem(rng, 1, 130, 8, 4)
    d_out, d_final = (rng.normal(size=values[i].shape).astype(np.float32) for i in (0, 3))
    found = short_convolution_backward(device_name, *(na.array(x) for x in (d_out, d_final, *values)))
    again = short_convolution_backward(device_name, *(na.array(x) for x in (d_out, d_final, *values)))
    expected = torch_gradients(values, d_out.astype(np.float64), d_final.astype(np.float64), True)
    for name, one, same, other in zip(("x", "weight", "bias", "state"), found, again, expected):
        np.testing.assert_allclose(one.numpy(), other, **SUMS, err_msg=name)
        np.testing.assert_array_equal(one.numpy(), same.numpy(), err_msg=name)


def test_gradients_are_slopes_of_the_reference(rng, device_name):
    """Along a random direction, by central differences in float64, without bias, state and final gradient."""
    x, weight, _, _ = problem(rng, 2, 21, 12, 3)
    d_out = rng.normal(size=x.shape).astype(np.float32)
    d_x, d_weight, d_bias, d_state = short_convolution_backward(
        device_name, na.array(d_out), None, na.array(x), na.array(weight)
    )
    assert d_bias is None and d_state is None
    along_x, along_weight = 1e-4 * rng.normal(size=x.shape), 1e-4 * rng.normal(size=weight.shape)

    def loss(sign_x, sign_weight):
        return (short_convolution_reference(x + sign_x * along_x, weight + sign_weight * along_weight)[0] * d_out).sum()

    # Differences of 1e-4 with an error of 1e-8 of them, gradients in fp32.
    slope_x, slope_weight = (loss(1, 0) - loss(-1, 0)) / 2, (loss(0, 1) - loss(0, -1)) / 2
    np.testing.assert_allclose((d_x.numpy() * along_x).sum(), slope_x, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose((d_weight.numpy() * along_weight).sum(), slope_weight, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("lengths", [[7], [1, 2, 40, 1, 3], [16, 0, 20]])
def test_sequences_of_different_lengths(rng, device_name, lengths):
    """Each as if it were alone."""
    channels, width = 9, 4
    x, weight, bias, _ = problem(rng, 1, sum(lengths), channels, width)
    state = rng.normal(size=(len(lengths), width - 1, channels)).astype(np.float32)
    edges = np.cumsum([0, *lengths])
    d_out, d_final = rng.normal(size=x.shape).astype(np.float32), rng.normal(size=state.shape).astype(np.float32)
    arrays = [na.array(a) for a in (x, weight, bias, state, edges.astype(np.int32))]
    found, final = (a.numpy() for a in short_convolution_forward(device_name, *arrays))
    gradients = short_convolution_backward(device_name, na.array(d_out), na.array(d_final), *arrays)
    d_x, d_weight, d_bias, d_state = (a.numpy() for a in gradients)
    sum_weight, sum_bias = np.zeros(weight.shape), np.zeros(bias.shape)
    for n, (begin, end) in enumerate(pairwise(edges)):
        one = x[:, begin:end], weight, bias, state[n : n + 1]
        out, window = short_convolution_reference(*one)
        np.testing.assert_allclose(found[:, begin:end], out, **CLOSE)
        np.testing.assert_array_equal(final[n : n + 1], window.astype(np.float32))
        if begin == end:
            np.testing.assert_array_equal(d_state[n], d_final[n])
            continue
        given = d_out[:, begin:end].astype(np.float64), d_final[n : n + 1].astype(np.float64)
        expected = torch_gradients(one, *given, True)
        np.testing.assert_allclose(d_x[:, begin:end], expected[0], **SUMS)
        np.testing.assert_allclose(d_state[n : n + 1], expected[3], **SUMS)
        sum_weight, sum_bias = sum_weight + expected[1], sum_bias + expected[2]
    np.testing.assert_allclose(d_weight, sum_weight, **SUMS)
    np.testing.assert_allclose(d_bias, sum_bias, **SUMS)


def test_shapes_that_do_not_fit_are_refused_in_a_sentence(rng, device_name):
    x, weight, bias, state = (na.array(a) for a in problem(rng, 2, 70, 8, 4))
    with pytest.raises(ValueError, match=r"weight has shape \(4, 8\), expected \(8, width\) with a width of 2 to 4"):
        short_convolution_forward(device_name, x, weight.T)
    with pytest.raises(ValueError, match=r"state has shape \(1, 3, 8\), expected \(2, 3, 8\)"):
        short_convolution_forward(device_name, x, weight, bias, state[:1])
    with pytest.raises(ValueError, match=r"x has shape \(70, 8\), expected \[batch, T, channels\]"):
        short_convolution_forward(device_name, x[0], weight)
    with pytest.raises(ValueError, match="found 70 tokens, expected 64 at most"):
        short_convolution_step(device_name, x, weight, bias, state)
    with pytest.raises(ValueError, match=r"d_final has shape \(2, 70, 8\), expected \(2, 3, 8\)"):
        short_convolution_backward(device_name, x, x, x, weight)

"""The gated delta rule in both forms against the recurrence in float64; its gradients against PyTorch's and against
finite differences."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
from kernel_runner import ENGINES
from poisoned_memory import poison, typed  # noqa: F401

import nitinol
import nitinol as na
from nitinol.ops import delta_rule
from nitinol.ops.delta_rule import delta_rule_forward, delta_rule_recurrent, delta_rule_reference
from nitinol.ops.delta_rule_backward import delta_rule_backward

pytestmark = pytest.mark.usefixtures("poison")
NAMES = ("q", "k", "v", "g", "beta", "initial")
# Some hundred products of fp32 values of size 1, each rounded by 2 ** -24 = 6e-8, of which the solution of a chunk's
# triangular system makes a few times more.
CLOSE = 5e-6


def problem(rng, batch, tokens, heads, v_heads, dim_k, dim_v, decay=0.3):
    """q, k, v, g, beta and the initial state; keys of length 1 without normalisation."""
    q, k = rng.normal(size=(2, batch, tokens, heads, dim_k))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v, initial = rng.normal(size=(batch, tokens, v_heads, dim_v)), rng.normal(size=(batch, v_heads, dim_k, dim_v))
    g, beta = -decay * rng.exponential(size=(batch, tokens, v_heads)), rng.uniform(size=(batch, tokens, v_heads))
    return [x.astype(np.float32) for x in (q, k, v, g, beta, initial)]


def close_of_halves(device_name):
    """CUDA multiplies fp32 values cut to 11 bits where the inputs are halves: each product is off by 2 ** -11."""
    return 2e-3 if device_name == "cuda" else CLOSE


def in_engine(engine):
    return nitinol.interpret() if engine == "interpreter" else nullcontext()


def assert_close(found, expected, tolerance, what=""):
    """Within the tolerance of the largest value: sums of terms of both signs have errors of the terms' size."""
    expected = np.asarray(expected)
    size = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * size, err_msg=what)


SHAPES = [(1, 1, 1, 1, 1, 1), (2, 5, 1, 3, 8, 5), (1, 70, 2, 4, 20, 24), (2, 33, 1, 1, 33, 70), (1, 130, 1, 2, 64, 64)]


@pytest.mark.sampled(8)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalise", [False, True])
def test_both_forms(rng, device_name, engine, shape, normalise):
    values = problem(rng, *shape)
    out, last = delta_rule_reference(*values, normalise=normalise)
    arrays = [na.array(x) for x in values]
    state = na.array(values[-1]).evaluate()
    with in_engine(engine):
        found, final = delta_rule_forward(device_name, *arrays, normalise=normalise)
        na.evaluate(found, final)
        stepped = delta_rule_recurrent(device_name, *arrays[:-1], state, normalise=normalise).evaluate()
    assert_close(found.numpy(), out, CLOSE, "chunked results")
    assert_close(final.numpy(), last, CLOSE, "chunked state")
    assert_close(stepped.numpy(), out, CLOSE, "recurrent results")
    assert_close(state.numpy(), last, CLOSE, "recurrent state")


@pytest.mark.parametrize("chunk", [16, 32, 64])
def test_chunks_of_any_size_agree(rng, monkeypatch, device_name, chunk):
    before = delta_rule.blocks
    monkeypatch.setattr(delta_rule, "blocks", lambda *a: {**before(*a), "CHUNK": chunk, "BLOCK_V": 16})
    values = problem(rng, 1, 150, 1, 2, 32, 40)
    out, last = delta_rule_reference(*values, scale=0.7)
    found, final = delta_rule_forward(device_name, *(na.array(x) for x in values), scale=0.7)
    assert_close(found.numpy(), out, CLOSE)
    assert_close(final.numpy(), last, CLOSE)


def test_without_an_initial_state(rng, device_name):
    values = problem(rng, 2, 40, 2, 2, 16, 16)[:-1]
    out, last = delta_rule_reference(*values)
    found, final = delta_rule_forward(device_name, *(na.array(x) for x in values))
    assert_close(found.numpy(), out, CLOSE)
    assert_close(final.numpy(), last, CLOSE)


# A result is rounded once to 11 (8) bits; the state is kept in float32.
@pytest.mark.parametrize(("dtype", "rounding"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_halves(rng, device_name, dtype, rounding):
    *values, initial = problem(rng, 1, 45, 1, 2, 16, 24)
    arrays, rounded = zip(*(typed(x, dtype) for x in values))
    out, last = delta_rule_reference(*rounded, initial, normalise=True)
    state = na.array(initial).evaluate()
    found, final = delta_rule_forward(device_name, *arrays, na.array(initial), normalise=True)
    stepped = delta_rule_recurrent(device_name, *arrays, state, normalise=True)
    assert found.dtype == stepped.dtype == arrays[2].dtype and str(final.dtype) == "fp32"
    close = close_of_halves(device_name)
    np.testing.assert_allclose(found.numpy(), out, rtol=rounding, atol=close)
    np.testing.assert_allclose(stepped.numpy(), out, rtol=rounding, atol=CLOSE)
    assert_close(final.numpy(), last, close)
    assert_close(state.numpy(), last, CLOSE)


def test_equal_keys_that_replace_the_whole_value(rng, device_name):
    """Powers of the triangular matrix are then binomial coefficients up to 1e18, its inverse has nothing above 1."""
    q, k, v, g, beta, initial = problem(rng, 1, 64, 1, 1, 32, 8, decay=0)
    k[:], beta[:] = k[:, :1], 1
    out, last = delta_rule_reference(q, k, v, g, beta, initial)
    found, final = delta_rule_forward(device_name, *(na.array(x) for x in (q, k, v, g, beta, initial)))
    assert_close(found.numpy(), out, CLOSE)
    assert_close(final.numpy(), last, CLOSE)


@pytest.mark.parametrize("strong", [-50.0, -1e4, -np.inf])
def test_a_token_that_clears_the_state_does_not_blur_the_decays_after_it(rng, device_name, strong):
    values = problem(rng, 1, 64, 1, 1, 16, 16, decay=0.1)
    values[3][:, 7:20] = strong
    out, last = delta_rule_reference(*values)
    found, final = delta_rule_forward(device_name, *(na.array(x) for x in values))
    assert_close(found.numpy(), out, CLOSE)
    assert_close(final.numpy(), last, CLOSE)
    gradients = delta_rule_backward(device_name, na.array(values[2]), None, *(na.array(x) for x in values))
    for name, gradient in zip(NAMES, gradients):
        assert np.isfinite(gradient.numpy()).all(), name


def test_a_prompt_in_chunks_and_then_tokens(rng, device_name):
    """Decoding goes on from the prompt's last state, one token a launch."""
    *values, initial = problem(rng, 2, 40, 1, 2, 16, 24)
    out, last = delta_rule_reference(*values, initial)
    _, state = delta_rule_forward(device_name, *(na.array(x[:, :37]) for x in values), na.array(initial))
    state.evaluate()
    for token in range(37, 40):
        one = [na.array(x[:, token : token + 1]) for x in values]
        found = delta_rule_recurrent(device_name, *one, state).numpy()
        assert_close(found[:, 0], out[:, token], CLOSE)
    assert_close(state.numpy(), last, CLOSE)


def packed(rng, lengths, *sizes):
    """Sequences one after the other, where they begin, and each by itself."""
    each = [problem(rng, 1, length, *sizes) for length in lengths]
    inputs = [np.concatenate([x[i] for x in each], axis=1) for i in range(5)]
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    return each, [na.array(x) for x in inputs], na.array(np.concatenate([x[5] for x in each])), na.array(starts)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("lengths", [[7], [1, 64, 3, 33], [16, 16, 47, 1, 1]])
def test_sequences_of_different_lengths(rng, device_name, lengths):
    each, arrays, initial, starts = packed(rng, lengths, 1, 2, 12, 20)
    found, final = delta_rule_forward(device_name, *arrays, initial, starts=starts)
    expected = [delta_rule_reference(*x) for x in each]
    assert_close(found.numpy(), np.concatenate([out for out, _ in expected], axis=1), CLOSE)
    assert_close(final.numpy(), np.concatenate([last for _, last in expected]), CLOSE)

    d_out, d_final = rng.normal(size=found.shape).astype(np.float32), rng.normal(size=final.shape).astype(np.float32)
    gradients = delta_rule_backward(
        device_name, na.array(d_out), na.array(d_final), *arrays, initial, starts=starts
    )
    begin = 0
    for number, (length, values) in enumerate(zip(lengths, each)):
        part = [na.array(d_out[:, begin : begin + length]), na.array(d_final[number : number + 1])]
        alone = delta_rule_backward(device_name, *part, *(na.array(x) for x in values))
        for name, gradient, one in zip(NAMES, gradients, alone):
            gradient = gradient.numpy()
            own = gradient[number : number + 1] if name == "initial" else gradient[:, begin : begin + length]
            assert_close(own, one.numpy(), CLOSE, name)
        begin += length


def test_an_empty_sequence_hands_its_state_on(rng, device_name):
    each, arrays, initial, starts = packed(rng, [5, 0, 20], 1, 1, 8, 8)
    found, final = delta_rule_forward(device_name, *arrays, initial, starts=starts)
    expected = [delta_rule_reference(*x) for x in each]
    assert_close(found.numpy(), np.concatenate([out for out, _ in expected], axis=1), CLOSE)
    assert_close(final.numpy(), np.concatenate([last for _, last in expected]), CLOSE)
    d_final = rng.normal(size=final.shape).astype(np.float32)
    *_, d_initial = delta_rule_backward(device_name, found, na.array(d_final), *arrays, initial, starts=starts)
    np.testing.assert_array_equal(d_initial.numpy()[1], d_final[1])


def torch_gradients(values, d_out, d_final, normalise, scale):
    """Of the recurrence written in PyTorch, in float64."""
    torch = pytest.importorskip("torch")
    leaves = [torch.tensor(x.astype(np.float64), requires_grad=True) for x in values]
    q, k, v, g, beta, state = leaves
    if normalise:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    out = []
    for t in range(v.shape[1]):
        state = state * g[:, t].exp()[..., None, None]
        correction = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], correction)
        out.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * scale)
    loss = (torch.stack(out, 1) * torch.tensor(d_out)).sum()
    if d_final is not None:
        loss = loss + (state * torch.tensor(d_final)).sum()
    return [x.numpy() for x in torch.autograd.grad(loss, leaves)]


@pytest.mark.sampled(6)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalise", [False, True])
def test_gradients(rng, device_name, engine, shape, normalise):
    values = problem(rng, *shape)
    d_out, d_final = rng.normal(size=values[2].shape), rng.normal(size=values[5].shape)
    given = [na.array(x.astype(np.float32)) for x in (d_out, d_final, *values)]
    with in_engine(engine):
        found = delta_rule_backward(device_name, *given, scale=0.4, normalise=normalise)
        na.evaluate(*found)
    expected = torch_gradients(values, *(x.numpy().astype(np.float64) for x in given[:2]), normalise, 0.4)
    for name, one, other in zip(NAMES, found, expected):
        assert one.shape == other.shape
        assert_close(one.numpy(), other, CLOSE, name)


def test_gradients_without_states(rng, device_name):
    values = problem(rng, 1, 50, 1, 2, 16, 24)
    values[5][:] = 0
    d_out = rng.normal(size=values[2].shape).astype(np.float32)
    found = delta_rule_backward(device_name, na.array(d_out), None, *(na.array(x) for x in values[:5]))
    assert found[5] is None
    expected = torch_gradients(values, d_out.astype(np.float64), None, False, 0.25)
    for name, one, other in zip(NAMES, found[:5], expected):
        assert_close(one.numpy(), other, CLOSE, name)


def test_gradients_are_slopes_of_the_reference(rng, device_name):
    """Along a random direction, by central differences in float64: exact to step ** 2 = 1e-8 of the third derivative,
    and to 1e-16 / step; what remains is the fp32 of the gradient."""
    values = problem(rng, 1, 40, 1, 2, 8, 12)
    out, last = delta_rule_reference(*values, normalise=True)
    d_out, d_final = rng.normal(size=out.shape).astype(np.float32), rng.normal(size=last.shape).astype(np.float32)
    gradients = delta_rule_backward(
        device_name, *(na.array(x) for x in (d_out, d_final, *values)), normalise=True
    )

    def loss(i, change):
        changed = [x.astype(np.float64) + change if i == j else x for j, x in enumerate(values)]
        out, last = delta_rule_reference(*changed, normalise=True)
        return (out * d_out).sum() + (last * d_final).sum()

    for i, (name, gradient) in enumerate(zip(NAMES, gradients)):
        direction = rng.normal(size=gradient.shape)
        slope = (loss(i, 1e-4 * direction) - loss(i, -1e-4 * direction)) / 2e-4
        gradient = gradient.numpy().astype(np.float64)
        size = np.linalg.norm(gradient) * np.linalg.norm(direction)  # a random slope is 1 / sqrt(n) of it
        np.testing.assert_allclose((gradient * direction).sum(), slope, atol=1e-6 * size, err_msg=name)


# Each gradient is rounded once, after sums in float32.
@pytest.mark.parametrize(("dtype", "rounding"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_gradients_of_halves(rng, device_name, dtype, rounding):
    *values, initial = problem(rng, 1, 40, 1, 2, 16, 24)
    arrays, rounded = zip(*(typed(x, dtype) for x in values))
    d_out, d_out_rounded = typed(rng.normal(size=values[2].shape), dtype)
    d_final = rng.normal(size=initial.shape).astype(np.float32)
    found = delta_rule_backward(device_name, d_out, na.array(d_final), *arrays, na.array(initial))
    expected = torch_gradients(
        [*rounded, initial], d_out_rounded.astype(np.float64), d_final.astype(np.float64), False, 0.25
    )
    for name, one, other, like in zip(NAMES, found, expected, (*arrays, na.array(initial))):
        assert one.dtype == like.dtype
        close = close_of_halves(device_name) * max(1, np.abs(other).max())
        np.testing.assert_allclose(one.numpy(), other, rtol=rounding, atol=close, err_msg=name)


def test_results_are_the_same_every_time(rng, device_name):
    arrays = [na.array(x) for x in problem(rng, 2, 100, 2, 4, 32, 32)]

    def once():
        return [x.numpy() for x in delta_rule_backward(device_name, arrays[2], arrays[5], *arrays)]

    for one, other in zip(once(), once()):
        np.testing.assert_array_equal(one, other)


def test_shapes_that_do_not_fit_are_refused_in_a_sentence(rng, device_name):
    q, k, v, g, beta, initial = (na.array(x) for x in problem(rng, 2, 5, 2, 4, 8, 8))
    with pytest.raises(ValueError, match=r"delta_rule_forward: found q \(2, 5, 2, 8\).* expected q and k \[batch"):
        delta_rule_forward(device_name, q, k[:, :4], v, g, beta)
    with pytest.raises(ValueError, match="v_heads a multiple of heads"):
        delta_rule_forward(device_name, q, k, v[:, :, :3], g[:, :, :3], beta[:, :, :3])
    with pytest.raises(ValueError, match=r"the state is fp32 \(1, 4, 8, 8\), expected fp32 \(2, 4, 8, 8\)"):
        delta_rule_recurrent(device_name, q, k, v, g, beta, initial[:1])
    with pytest.raises(ValueError, match=r"starts has shape \(3,\) and q \(2, 5, 2, 8\)"):
        delta_rule_forward(device_name, q, k, v, g, beta, starts=na.array(np.array([0, 2, 5], np.int32)))
    with pytest.raises(ValueError, match="keys have 512 values, expected 256 at most"):
        delta_rule_forward(device_name, *(na.zeros((1, 2, 1, 512)),) * 3, *(na.zeros((1, 2, 1)),) * 2)
    with pytest.raises(ValueError, match=r"delta_rule_backward: d_out has shape \(2, 5, 2, 8\)"):
        delta_rule_backward(device_name, q, None, q, k, v, g, beta)

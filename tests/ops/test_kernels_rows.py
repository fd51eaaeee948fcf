"""Softmax, norms, gated units, RoPE and the gradient of an embedding, with their gradients, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_runner import ENGINES
from operands import DTYPES, assert_close, engine_of, numerical_gradient, operand

import nitinol as na
from nitinol.ops import embedding, glu, norm_backward, rope, softmax
from nitinol.ops import norm_kernels as norm
from nitinol.runtime.device import DeviceError

# fp32 sums of some thousand values of size 1 in vector chains, and exp, erf, tanh: tens of units in the last place.
ERROR = 5e-6
MODULES = {"softmax": softmax, "norm": norm}


@pytest.fixture(params=["one tile", "blocks"])
def long_rows(request, monkeypatch):
    """Rows of more than 48 values are read block by block; else they are one tile."""
    if request.param == "blocks":
        for module in MODULES.values():
            monkeypatch.setattr(module, "blocks", lambda target: {"LARGEST": 48, "BLOCK": 64})


# ----------------------------------------------------------------------------------------------------------- softmax


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("columns", [1, 64, 201])
def test_softmax(rng, device_name, engine, dtype, log, columns, long_rows):
    shape = (2, int(rng.integers(1, 4)), columns)
    x, values = operand(rng.normal(size=shape) * 5 - 100, dtype)  # exp without the shift would be 0 / 0
    with engine_of(engine):
        y = softmax.softmax_forward(device_name, x, log)
        # A difference of x from its maximum, at 100, is exact; the log-sum and exp are good to units of the last place.
        assert_close(y, softmax.softmax_reference(values, log=log), 2e-6, dtype)
        d_y, slopes = operand(rng.normal(size=shape), dtype)
        found = softmax.softmax_backward(device_name, d_y, y, log)
        expected = softmax.softmax_gradient_reference(slopes, y.numpy(), log)
        # exp(y) of log-softmax, and a sum that may cancel
        assert_close(found, expected, ERROR, dtype, of=np.abs(slopes).sum(axis=-1, keepdims=True))


def test_softmax_of_rows_longer_than_a_tile(rng, device_name):
    columns = softmax.blocks(device_name)["LARGEST"] + 5
    x, values = operand(rng.normal(size=(2, columns)))
    y = softmax.softmax_forward(device_name, x)
    assert_close(y, softmax.softmax_reference(values), ERROR)
    assert_close(softmax.softmax_backward(device_name, x, y), softmax.softmax_gradient_reference(values, y.numpy()),
                 ERROR)  # fmt: skip


def test_softmax_of_masked_rows(rng, device_name, long_rows):
    """-inf in a whole first block; of nothing but -inf there is no softmax."""
    values = np.full((2, 150), -np.inf, np.float32)
    values[0, 100:] = rng.normal(size=50)
    found = softmax.softmax_forward(device_name, na.array(values))
    assert_close(found[:1], softmax.softmax_reference(values[:1]), ERROR)
    assert np.isnan(found.numpy()[1]).all()


@pytest.mark.parametrize("log", [False, True])
def test_the_reference_gradient_of_softmax(rng, log):
    x, d_y = rng.normal(size=(2, 2, 5))
    expected = numerical_gradient(lambda x: (softmax.softmax_reference(x, log=log) * d_y).sum(), x)
    found = softmax.softmax_gradient_reference(d_y, softmax.softmax_reference(x, log=log), log)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


# ------------------------------------------------------------------------------------------------------------- norms


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("columns", [1, 64, 201])
def test_norms(rng, device_name, engine, dtype, layer, columns, long_rows):
    """With and without weight, bias, residual, and gradients from elsewhere; more and fewer rows than programs."""
    shape = (2, int(rng.integers(1, 30 if engine == "native" else 12)), columns)
    with_weight, with_bias, with_residual = (bool(rng.integers(2)) for _ in range(3))
    told = f"{shape}, weight {with_weight}, bias {with_bias}, residual {with_residual}"
    x, values = operand(rng.normal(size=shape) * 2 + 3, dtype)  # a mean that a one-pass variance would feel
    weight, gains = operand(rng.normal(size=columns), dtype) if with_weight else (None, None)
    bias, shifts = operand(rng.normal(size=columns), dtype) if with_bias else (None, None)
    residual = operand(rng.normal(size=shape), dtype)[0] if with_residual else None
    with engine_of(engine):
        y, mean, scale, total = norm.norm_forward(device_name, x, weight, bias, 1e-3, layer=layer, residual=residual)
        if residual is None:
            assert total is x
        else:
            np.testing.assert_array_equal(total.numpy(), (x + residual).numpy())
            values = total.numpy().astype(np.float64)
        expected, means, scales = norm.norm_reference(values, gains, shifts, 1e-3, layer=layer)
        # epsilon 1e-3: distances of one value from itself are rounded to 1e-7 of 3, times 1 / sqrt(epsilon) at most
        assert_close(y, expected, 1e-5, dtype, told)
        assert_close(scale, scales.reshape(-1), 2e-6, told=told)
        assert (mean is None) != layer
        if layer:
            assert_close(mean, means.reshape(-1), 1e-6, told=told)
        d_y, slopes = operand(rng.normal(size=shape), dtype)
        d_total, added = operand(rng.normal(size=shape), dtype) if with_residual else (None, 0.0)
        d_x, d_weight, d_bias = norm_backward.norm_backward(
            device_name, d_y, total, scale, mean, weight, layer=layer, bias=with_bias, d_total=d_total
        )
        to_x, to_weight, to_bias = norm_backward.norm_gradient_reference(slopes, values, gains, 1e-3, layer=layer)
        terms = scales[..., None] * np.abs(slopes if gains is None else slopes * gains).max() + np.abs(added)
        assert_close(d_x, to_x + added, 1e-5, dtype, told, of=terms)
        for found, wanted, gradient in ((d_weight, with_weight, to_weight), (d_bias, with_bias, to_bias)):
            assert (found is not None) == wanted, told
            if found is not None:
                assert_close(found, gradient, 1e-5, dtype, told, of=np.abs(slopes).sum(axis=(0, 1)).max() * 2)


def test_norms_of_rows_longer_than_a_tile(rng, device_name):
    shape = (3, norm.blocks(device_name)["LARGEST"] + 7)
    (x, values), (d_y, slopes) = operand(rng.normal(size=shape)), operand(rng.normal(size=shape))
    weight, gains = operand(rng.normal(size=shape[1]))
    y, mean, scale, _ = norm.norm_forward(device_name, x, weight, layer=True)
    assert_close(y, norm.norm_reference(values, gains, layer=True)[0], 1e-5)
    found = norm_backward.norm_backward(device_name, d_y, x, scale, mean, weight, layer=True, bias=True)
    for one, other in zip(found, norm_backward.norm_gradient_reference(slopes, values, gains, layer=True)):
        assert_close(one, other, 1e-5)


@pytest.mark.parametrize("layer", [False, True])
def test_the_reference_gradients_of_norms(rng, layer):
    (x, d_y), weight = rng.normal(size=(2, 3, 5)), rng.normal(size=5)
    bias = np.zeros(5)

    def loss():
        return (norm.norm_reference(x, weight, bias, 1e-3, layer=layer)[0] * d_y).sum()

    found = norm_backward.norm_gradient_reference(d_y, x, weight, 1e-3, layer=layer)
    for gradient, varied in zip(found, (x, weight, bias)):
        np.testing.assert_allclose(gradient, numerical_gradient(lambda _: loss(), varied), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("layer", [False, True])
def test_norms_are_pytorchs(rng, device_name, layer):
    torch = pytest.importorskip("torch")
    x, d_y = rng.normal(size=(2, 40, 96)).astype(np.float32)
    weight = rng.normal(size=96).astype(np.float32)
    tensors = [torch.tensor(a, requires_grad=True) for a in (x, weight)]
    function = torch.nn.functional.layer_norm if layer else torch.nn.functional.rms_norm
    y = function(tensors[0], (96,), tensors[1], eps=1e-5)
    y.backward(torch.tensor(d_y))
    found, mean, scale, _ = norm.norm_forward(device_name, na.array(x), na.array(weight), layer=layer)
    assert_close(found, y.detach().double().numpy(), ERROR)
    gradients = norm_backward.norm_backward(device_name, na.array(d_y), na.array(x), scale, mean, na.array(weight),
                                            layer=layer)  # fmt: skip
    for gradient, tensor in zip(gradients, tensors):
        assert_close(gradient, tensor.grad.double().numpy(), 2 * ERROR)


# ------------------------------------------------------------------------------------------------------- gated units


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", glu.ACTIVATIONS)
@pytest.mark.parametrize("form", ["apart", "packed", "views"])
def test_gated_units(rng, device_name, engine, dtype, activation, form):
    rows, columns = int(rng.integers(1, 5)), int(rng.choice([1, 70, 257]))
    both, values = operand(rng.normal(size=(2, rows, 2 * columns)) * 3, dtype)
    x, y = values[..., :columns], values[..., columns:]
    d_out, slopes = operand(rng.normal(size=x.shape), dtype)
    gate, up = both[..., :columns], both[..., columns:]
    operands = {"apart": (gate.copy(), up.copy()), "packed": (both, None), "views": (gate, up)}[form]
    with engine_of(engine):
        found = glu.glu_forward(device_name, *operands, activation)
        # The tail of gelu is 1 + erf with erf near -1: an absolute error of 1e-7 of x times up, and times d_out.
        assert_close(found, glu.glu_reference(x, y, activation), 1e-6, dtype, of=np.abs(x * y))
        d_gate, d_up = glu.glu_backward(device_name, d_out, *operands, activation)
    expected = glu.glu_gradient_reference(slopes, x, y, activation)
    terms = np.abs(slopes * y) * (1 + np.abs(x)), np.abs(slopes * x)
    if form == "packed":
        assert d_up is None
        assert_close(d_gate, np.concatenate(expected, axis=-1), 1e-6, dtype, of=np.concatenate(terms, axis=-1))
    else:
        assert_close(d_gate, expected[0], 1e-6, dtype, of=terms[0])
        assert_close(d_up, expected[1], 1e-6, dtype, of=terms[1])


@pytest.mark.parametrize("activation", glu.ACTIVATIONS)
def test_gated_units_are_pytorchs(rng, device_name, activation):
    torch = pytest.importorskip("torch")
    x, y, d_out = rng.normal(size=(3, 20, 33)).astype(np.float32) * 2
    tensors = [torch.tensor(a, requires_grad=True) for a in (x, y)]
    functional = torch.nn.functional
    gate = functional.silu(tensors[0]) if activation == "silu" else functional.gelu(
        tensors[0], approximate="tanh" if activation == "gelu_tanh" else "none")  # fmt: skip
    (gate * tensors[1]).backward(torch.tensor(d_out))
    for found, tensor in zip(glu.glu_backward(device_name, *map(na.array, (d_out, x, y)), activation), tensors):
        assert_close(found, tensor.grad.double().numpy(), ERROR)


# -------------------------------------------------------------------------------------------------------------- rope


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotated"), [(64, 64), (20, 20), (40, 12), (2, 2)])
def test_rope(rng, device_name, engine, dtype, interleaved, head_dim, rotated):
    """Queries and keys together, keys transposed, or queries alone; positions of each kind."""
    batch, tokens, heads, kv_heads = 2, int(rng.integers(1, 6)), int(rng.integers(1, 7)), int(rng.integers(1, 3))
    frequencies = (1e4 ** (-np.arange(0, rotated, 2) / rotated)).astype(np.float32)
    shape = [None, (tokens,), (batch, tokens)][rng.integers(3)]
    positions = None if shape is None else rng.integers(0, 100_000, shape).astype(np.int32)
    told = f"{tokens} tokens, {heads} and {kv_heads} heads, positions {shape}"
    q, queries = operand(rng.normal(size=(batch, tokens, heads, head_dim)), dtype)
    k, keys = operand(rng.normal(size=(batch, kv_heads, tokens, head_dim)), dtype)
    k, keys = (k.swapaxes(1, 2), keys.swapaxes(1, 2)) if rng.random() < 0.8 else (None, None)
    at = None if positions is None else na.array(positions)
    with engine_of(engine):
        for function, back in ((rope.rope_forward, False), (rope.rope_backward, True)):
            found = function(device_name, q, k, na.array(frequencies), at, interleaved=interleaved)
            for one, values in zip(found, (queries, keys)):
                if values is None:
                    assert one is None
                    continue
                expected = rope.rope_reference(values, frequencies, positions, interleaved=interleaved, back=back)
                # Sine and cosine of angles up to 1e5 in fp32: units of 2 ** -24 after the reduction.
                assert_close(one, expected, 2e-6, dtype, told)
                np.testing.assert_array_equal(one.numpy()[..., rotated:], values[..., rotated:])


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_gradient_of_a_rotation_is_the_rotation_back(rng, interleaved):
    x, d_out = rng.normal(size=(2, 1, 3, 2, 6))
    frequencies = np.array([1.0, 0.1], np.float32)
    expected = numerical_gradient(
        lambda x: (rope.rope_reference(x, frequencies, interleaved=interleaved) * d_out).sum(), x
    )
    found = rope.rope_reference(d_out, frequencies, interleaved=interleaved, back=True)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


# --------------------------------------------------------------------------------------------------------- embedding


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_an_embedding(rng, device_name, engine, dtype):
    """Ids that come often (as in text), once and never; blocks of ids, rows and columns that end early."""
    tokens, words, columns = int(rng.integers(1, 300)), int(rng.integers(1, 90)), int(rng.integers(1, 300))
    if engine == "interpreter":
        tokens, words, columns = min(tokens, 150), min(words, 40), min(columns, 40)
    ids = np.minimum(rng.zipf(1.3, tokens) - 1, words - 1).astype(rng.choice([np.int32, np.int64]))
    d_out, slopes = operand(rng.normal(size=(tokens, columns)), dtype)
    with engine_of(engine):
        found = embedding.embedding_backward(device_name, d_out, na.array(ids), words)
        expected = embedding.embedding_gradient_reference(slopes, ids, words)
        # The most frequent id may have most tokens: a sum one by one of n terms is off by n / 2 units at most.
        assert_close(found, expected, 1e-5, dtype, f"{tokens} tokens, {words} words, {columns} columns")
        assert_close(embedding.embedding_backward(device_name, d_out, na.array(ids), words, "float32"), expected, 1e-5)


def test_ids_outside_the_vocabulary_are_reported(rng, device_name):
    ids = rng.integers(0, 30, 200)
    ids[150] = rng.choice([-1, 30])
    with pytest.raises(DeviceError, match="embedding: an id is outside the vocabulary"):
        embedding.embedding_backward(device_name, na.zeros((200, 4)), na.array(ids), 30).numpy()


# ------------------------------------------------------------------------------------------------------------ errors


def test_what_does_not_fit_is_refused_in_a_sentence(device_name):
    x, ints = na.zeros((3, 8)), na.zeros((3, 8), "int32")
    with pytest.raises(TypeError, match="softmax of an array of int32, expected floats"):
        softmax.softmax_forward(device_name, ints)
    with pytest.raises(ValueError, match=r"d_y has shape \(8,\), expected y's \(3, 8\)"):
        softmax.softmax_backward(device_name, x[0], x)
    with pytest.raises(ValueError, match=r"weight has shape \(3,\), expected \(8,\)"):
        norm.norm_forward(device_name, x, na.zeros((3,)), layer=False)
    with pytest.raises(ValueError, match=r"residual has shape \(8,\)"):
        norm.norm_forward(device_name, x, residual=x[0], layer=False)
    with pytest.raises(ValueError, match="needs the mean of each row"):
        norm_backward.norm_backward(device_name, x, x, na.zeros((3,)), layer=True)
    with pytest.raises(ValueError, match="the activation is 'relu', expected one of silu, gelu, gelu_tanh"):
        glu.glu_forward(device_name, x, x, "relu")
    with pytest.raises(ValueError, match=r"\(3, 7\): expected gate and up side by side"):
        glu.glu_forward(device_name, x[:, :7])
    q = na.zeros((1, 2, 3, 8))
    with pytest.raises(ValueError, match=r"frequencies have shape \(5,\); expected .* at most \(4,\)"):
        rope.rope_forward(device_name, q, None, na.zeros((5,)), interleaved=False)
    with pytest.raises(ValueError, match=r"positions have shape \(3,\), expected \(2,\) or \(1, 2\)"):
        rope.rope_forward(device_name, q, None, na.zeros((4,)), na.zeros((3,), "int32"), interleaved=False)
    with pytest.raises(ValueError, match=r"expected \[\.\.\., D\] and \[\.\.\.\]"):
        embedding.embedding_backward(device_name, x, ints, 5)
    with pytest.raises(TypeError, match="the ids are of type fp32"):
        embedding.embedding_backward(device_name, x, na.zeros((3,)), 5)

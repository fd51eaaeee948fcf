"""Low-rank adapters: the product with weights of every format and its gradients, with and without a norm in front,
against float64; the references themselves against finite differences and PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_runner import ENGINES, padded, poisoned, run
from stored_weights import weights_of

import nitinol as na
from nitinol.formats.blocks import FORMATS
from nitinol.ops import lora, lora_gradients
from nitinol.ops.activations import quantize_activations_reference


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def close(found, expected, tolerance=5e-6):
    """fp32 sums of a few hundred products, each rounded to 6e-8 of the partial sum: their errors add up like the root
    of their number, and so does the sum itself, so that the largest result is the measure."""
    tolerance = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=0, atol=tolerance)


def check(target, x, weights, values, down, up, scale, gain, adapter, dy, tolerance=5e-6):
    """Forward and backward against float64. Operands are Arrays and the numbers that they hold."""
    arrays = [na.array(a) if isinstance(a, np.ndarray) else a for a in (x, down, up, gain, dy)]
    x_array, down_array, up_array, gain_array, dy_array = arrays
    x, down, up, gain, dy = (None if a is None else a.numpy() for a in arrays)
    found = lora.lora_forward(
        target, x_array, weights, down_array, up_array, scale, gain_array, 1e-5, adapter
    )
    assert found.y.dtype == x_array.dtype
    close(found.y.numpy(), lora.lora_reference(x, values, down, up, scale, gain, 1e-5), tolerance)
    with_weights = gain is None and weights.format in ("F32", "F16", "BF16")
    gradients = lora_gradients.lora_backward(
        target, dy_array, x_array, weights, down_array, up_array, scale, found, gain_array, with_weights
    )
    expected = lora_gradients.lora_gradients_reference(dy, x, values, down, up, scale, gain, 1e-5)
    assert (gradients.gain is None) == (gain is None) and (gradients.weights is None) == (not with_weights)
    for name, gradient, wanted in zip(lora_gradients.LoraGradients._fields, gradients, expected):
        if gradient is not None:
            assert gradient.shape == wanted.shape, name
            close(gradient.numpy(), wanted, tolerance)


@pytest.mark.parametrize("adapter", ["first", "beside"])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 37])
def test_adapter_and_gradients(rng, device_name, tokens, with_norm, adapter):
    """Of columns, rows and ranks that no block divides."""
    rows, columns, rank = int(rng.integers(1, 90)), int(rng.integers(1, 300)), int(rng.integers(1, 40))
    weights, values = weights_of(normal(rng, rows, columns), "F32")
    gain = normal(rng, columns) if with_norm else None
    check(device_name, normal(rng, tokens, columns), weights, values, normal(rng, rank, columns),
          normal(rng, rows, rank), float(rng.normal()), gain, adapter, normal(rng, tokens, rows))  # fmt: skip


@pytest.mark.sampled(4)
@pytest.mark.parametrize("format", [name for name in FORMATS if name != "F32"])
def test_weights_of_every_format(rng, device_name, format):
    rows, columns, rank = 21, 256, 4
    weights, values = weights_of(normal(rng, rows, columns), format)
    for tokens, gain in ((2, normal(rng, columns)), (19, None)):
        check(device_name, normal(rng, tokens, columns), weights, values, normal(rng, rank, columns),
              normal(rng, rows, rank), 0.5, gain, None, normal(rng, tokens, rows))  # fmt: skip


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("format", ["same", "Q4_0"])
def test_half_types(rng, device_name, dtype, format):
    """A half has 8 or 11 bits. A result is rounded once, by half a unit in the last place; a normalised x and decoded
    weights are rounded before they are multiplied, errors that add up to no more than another half."""
    rows, columns, rank, tokens = 33, 96, 8, 18
    format = {"float16": "F16", "bfloat16": "BF16"}[dtype] if format == "same" else format
    weights, values = weights_of(normal(rng, rows, columns), format)
    x, down, up, gain, dy = (
        na.array(normal(rng, *shape)).astype(dtype)
        for shape in ((tokens, columns), (rank, columns), (rows, rank), (columns,), (tokens, rows))
    )
    tolerance = 2.0**-10 if dtype == "float16" else 2.0**-7
    for given in (None, gain):
        check(device_name, x, weights, values, down, up, 1.5, given, None, dy, tolerance)


def test_adapters_in_float32_beside_halves(rng, device_name):
    rows, columns, rank, tokens = 20, 64, 16, 9
    weights, values = weights_of(normal(rng, rows, columns), "BF16")
    x, dy = (na.array(normal(rng, tokens, n)).astype("bfloat16") for n in (columns, rows))
    check(device_name, x, weights, values, normal(rng, rank, columns), normal(rng, rows, rank), 2.0,
          normal(rng, columns), None, dy, 2.0**-7)  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dot", [False, True])
def test_kernels_stay_in_their_memory(rng, engine, dot):
    """What lies behind operands is NaN, and behind results stays what it was."""
    tokens, rows, columns, rank = 3, 7, 21, 5
    x, down, up, gain = (normal(rng, *s) for s in ((tokens, columns), (rank, columns), (rows, rank), (columns,)))
    values = normal(rng, rows, columns)
    hidden, inverse, out = poisoned((tokens + 1, rank)), poisoned(tokens + 1), poisoned((tokens + 1, rows))
    n = poisoned((tokens + 1, columns))
    common = {"tokens": tokens, "columns": columns, "rank": rank, "scale": 0.5, "epsilon": 1e-5, "VALUES": 16,
              "EVEN": False, "TOKENS": 4, "DOT": dot}  # fmt: skip
    given = {"x": padded(x), "gain": padded(gain), "down": padded(down)}
    run(engine, lora.hidden_kernel, (2, 1), hidden=hidden, inverse=inverse, normal=n, RANK=4, FORMAT="F32", **given,
        **common)  # fmt: skip
    product = {"weights": padded(values), "up": padded(up), "rows": rows, "row_bytes": 0, "FORMAT": "F32", "BLOCKS": 1,
               "DOWN": "F32", "ROWS": 4, "RANK": 8, **common}  # fmt: skip
    expected = lora.lora_reference(x, values, down, up, 0.5, gain, 1e-5)
    run(engine, lora.lora_kernel, (2, 1), x=padded(n[:tokens]), gain=None, down=None, hidden=padded(hidden[:tokens]),
        inverse=None, out=out, BESIDE=False, **product)  # fmt: skip
    close(out[:tokens], expected)
    close(n[:tokens], lora.normal_reference(x, gain, 1e-5)[0])
    again, root, other = poisoned(hidden.shape), poisoned(inverse.shape), poisoned(out.shape)
    run(engine, lora.lora_kernel, (2, 1), hidden=again, inverse=root, out=other, BESIDE=True, **given, **product)
    close(other[:tokens], expected)
    close(again[:tokens], hidden[:tokens])
    for array in (n, hidden, inverse, out, again, root, other):
        assert np.isnan(array[tokens]).all()


@pytest.mark.parametrize("format", [name for name in FORMATS if FORMATS[name].values > 1])
def test_a_few_tokens_as_integers(rng, device_name, format):
    """The base product is that of x, or of its norm, in int8; the adapter's is not rounded."""
    rows, columns, rank = 21, int(rng.choice([256, 2048])), 4
    weights, values = weights_of(normal(rng, rows, columns), format)
    down, up, gain = normal(rng, rank, columns), normal(rng, rows, rank), normal(rng, columns)
    for tokens, given in ((1, None), (3, gain)):
        x = normal(rng, tokens, columns)
        found = lora.lora_forward(device_name, na.array(x), weights, na.array(down), na.array(up), 0.5,
                                  None if given is None else na.array(given), integers=True)  # fmt: skip
        n = lora.normal_reference(x, given, 1e-6)[0]
        parts = quantize_activations_reference(n.astype(np.float32))
        rounded = parts.values * np.repeat(parts.scales.astype(np.float64), 32, axis=1)
        expected = rounded @ values.T.astype(np.float64) + 0.5 * (n @ down.T) @ up.T
        # The norm is rounded otherwise in float64: a value halfway between two integers may go to the other, a step of
        # 1/127 of a few of `columns` products.
        close(found.y.numpy(), expected, 5e-6 if given is None else 1e-3)


def test_reference_is_the_derivative(rng):
    """Central differences in float64: an error of their step squared and of 1e-16 over it."""
    tokens, rows, columns, rank, step = 3, 4, 6, 2, 1e-5
    operands = [rng.normal(size=s) for s in ((tokens, columns), (rows, columns), (rank, columns), (rows, rank))]
    gain, dy = rng.normal(size=columns), rng.normal(size=(tokens, rows))
    for given in (None, gain):
        def loss(x, weights, down, up, gain):
            return np.sum(dy * lora.lora_reference(x, weights, down, up, 0.7, gain, 1e-5))

        everything = [*operands, given]
        gradients = lora_gradients.lora_gradients_reference(dy, *operands, 0.7, given, 1e-5)
        for place, expected in ((0, gradients.x), (1, gradients.weights), (2, gradients.down), (3, gradients.up),
                                (4, gradients.gain)):  # fmt: skip
            if everything[place] is None:
                continue
            for at in np.ndindex(everything[place].shape):
                high, low = (everything[place].copy() for _ in range(2))
                high[at] += step
                low[at] -= step
                rise = loss(*everything[:place], high, *everything[place + 1 :])
                fall = loss(*everything[:place], low, *everything[place + 1 :])
                np.testing.assert_allclose((rise - fall) / (2 * step), expected[at], rtol=1e-6, atol=1e-7)


def test_against_pytorch(rng, device_name):
    torch = pytest.importorskip("torch")
    tokens, rows, columns, rank = 24, 40, 72, 16
    values = normal(rng, rows, columns)
    leaves = [torch.tensor(normal(rng, *s), requires_grad=True)
              for s in ((tokens, columns), (rank, columns), (rows, rank), (columns,))]  # fmt: skip
    x, down, up, gain = leaves
    dy = normal(rng, tokens, rows)
    n = torch.nn.functional.rms_norm(x, (columns,), gain, 1e-6)
    y = n @ torch.tensor(values).T + 0.25 * (n @ down.T) @ up.T
    y.backward(torch.tensor(dy))
    x_array, down_array, up_array, gain_array = (na.array(leaf.detach().numpy()) for leaf in leaves)
    forward = lora.lora_forward(device_name, x_array, na.array(values), down_array, up_array, 0.25, gain_array)
    close(forward.y.numpy(), y.detach().numpy())
    found = lora_gradients.lora_backward(
        device_name, na.array(dy), x_array, na.array(values), down_array, up_array, 0.25, forward, gain_array
    )
    for gradient, leaf in zip(found, leaves):
        close(gradient.numpy(), leaf.grad.numpy())


def test_runs_give_the_same_bits(rng, device_name):
    x, dy, down, up, gain = (normal(rng, *s) for s in ((70, 40), (70, 30), (8, 40), (30, 8), (40,)))
    arrays = [na.array(a) for a in (x, dy, down, up, gain, normal(rng, 30, 40))]

    def once():
        x, dy, down, up, gain, weights = arrays
        forward = lora.lora_forward(device_name, x, weights, down, up, 0.5, gain)
        gradients = lora_gradients.lora_backward(device_name, dy, x, weights, down, up, 0.5, forward, gain)
        return [a.numpy() for a in (forward.y, *gradients[:4])]

    for first, second in zip(once(), once()):
        np.testing.assert_array_equal(first, second)


def test_refusals(rng):
    x, weights, down, up = (na.array(normal(rng, *s)) for s in ((2, 8), (4, 8), (3, 8), (4, 3)))
    with pytest.raises(ValueError, match=r"lora: x, weights, A and B have shapes .*expected \[N, K\]"):
        lora.lora_forward("cpu", x, weights, up, down, 1.0)
    with pytest.raises(ValueError, match="gain has shape"):
        lora.lora_forward("cpu", x, weights, down, up, 1.0, na.array(normal(rng, 4)))
    with pytest.raises(ValueError, match="the rank is 129"):
        lora.lora_forward("cpu", x, weights, na.empty((129, 8)), na.empty((4, 129)), 1.0)
    with pytest.raises(ValueError, match="adapter is 'last'"):
        lora.lora_forward("cpu", x, weights, down, up, 1.0, adapter="last")
    forward = lora.Lora(None, na.empty((2, 3)), None)
    with pytest.raises(ValueError, match="dy has shape"):
        lora_gradients.lora_backward("cpu", x, x, weights, down, up, 1.0, forward)
    with pytest.raises(ValueError, match="float weights without a norm"):
        lora_gradients.lora_backward("cpu", na.empty((2, 4)), x, weights, down, up, 1.0, forward, na.empty((8,)), True)
    with pytest.raises(TypeError, match="expected float32, float16, bfloat16 or a block format"):
        lora.lora_forward("cpu", x, na.empty((4, 8), "int32"), down, up, 1.0)

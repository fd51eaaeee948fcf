"""Cross entropy, of logits and fused with the product that makes them, against float64 and PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_runner import ENGINES
from operands import DTYPES, assert_close, engine_of, numerical_gradient, operand

import nitinol as na
from nitinol.ops import cross_entropy as ce
from nitinol.ops import linear_cross_entropy as lce
from nitinol.runtime.device import DeviceError

# fp32: lse is good to a few units of the largest logits, about 20 here, of which exp makes a relative error.
ERROR = 2e-5
IGNORED = -7


def targets_of(rng, tokens, words, dtype=np.int32):
    """Random targets, some of them ignored, but never all."""
    targets = rng.integers(0, words, tokens).astype(dtype)
    targets[rng.random(tokens) < 0.3] = IGNORED
    targets[rng.integers(tokens)] = words - 1
    return targets


def options_of(rng):
    """None, or both smoothing and z-loss."""
    smoothing, z_loss = (0.0, 0.0) if rng.random() < 0.3 else (float(rng.uniform(0, 0.5)), float(rng.uniform(0, 0.01)))
    return {"smoothing": smoothing, "z_loss": z_loss, "ignore_index": IGNORED}


def d_loss_of(rng, loss):
    return operand(rng.normal(size=loss.shape))


@pytest.mark.parametrize("reduction", ce.REDUCTIONS)
def test_the_reference_gradient_is_that_of_the_reference(rng, reduction):
    tokens, words = 4, 7
    targets, options = targets_of(rng, tokens, words), options_of(rng)
    logits, d_loss = rng.normal(size=(tokens, words)), rng.normal(size=tokens if reduction == "none" else ())

    def loss(z):
        return (ce.cross_entropy_reference(z, targets, reduction=reduction, **options)[0] * d_loss).sum()

    found = ce.cross_entropy_gradient_reference(d_loss, logits, targets, reduction=reduction, **options)
    np.testing.assert_allclose(found, numerical_gradient(loss, logits), rtol=1e-6, atol=1e-8)


def test_the_reference_is_pytorchs(rng):
    torch = pytest.importorskip("torch")
    tokens, words, smoothing = 9, 31, 0.2
    targets = targets_of(rng, tokens, words, np.int64)
    logits = torch.tensor(rng.normal(size=(tokens, words)), requires_grad=True)
    for reduction in ce.REDUCTIONS:
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(targets), ignore_index=IGNORED,
                                                 reduction=reduction, label_smoothing=smoothing)  # fmt: skip
        options = {"smoothing": smoothing, "ignore_index": IGNORED, "reduction": reduction}
        expected, _ = ce.cross_entropy_reference(logits.detach().numpy(), targets, **options)
        np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-12)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        expected = ce.cross_entropy_gradient_reference(np.ones(loss.shape), logits.detach().numpy(), targets, **options)
        np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ce.REDUCTIONS)
@pytest.mark.parametrize("words", [1, 129, 5000])
def test_cross_entropy(rng, device_name, engine, dtype, reduction, words):
    tokens = int(rng.integers(1, 9))
    options, targets = options_of(rng), targets_of(rng, tokens, words, rng.choice([np.int32, np.int64]))
    told = f"{tokens} tokens, {words} words, targets {targets.tolist()}, {options}"
    # exp without the shift would be 0 / 0 in float32
    logits, values = operand(rng.normal(size=(tokens, words)) * 4 - 200, dtype)
    with engine_of(engine):
        loss, lse, scale = ce.cross_entropy_forward(device_name, logits, na.array(targets), reduction=reduction,
                                                    **options)  # fmt: skip
        expected, expected_lse = ce.cross_entropy_reference(values, targets, reduction=reduction, **options)
        assert_close(lse, expected_lse, 1e-6, told=told)
        # lse and logits of size 200 are subtracted: a few units of 2 ** -24 of these; lse ** 2 has them twice.
        assert_close(loss, expected, 1e-6 + 200 * 1e-6 / max(np.abs(expected).max(), 1e-3), told=told)
        d_loss, d_values = d_loss_of(rng, loss)
        expected = ce.cross_entropy_gradient_reference(d_values, values, targets, reduction=reduction, **options)
        arguments = (device_name, d_loss, logits, na.array(targets), lse, scale)
        found = ce.cross_entropy_backward(*arguments, **options).evaluate()
        # exp(z - lse) inherits the absolute error of lse, 1e-5 at 200; what is subtracted from it may cancel.
        share = np.abs(d_values) / ((targets != IGNORED).sum() if reduction == "mean" else 1)
        subtracted = (np.arange(words) == targets[:, None]) + options["smoothing"] / words
        terms = np.abs(expected) + np.broadcast_to(share, tokens)[:, None] * subtracted
        assert_close(found, expected, 1e-4, dtype, told, of=terms)
        before = found.numpy()
        over = ce.cross_entropy_backward(*arguments, in_place=True, **options)
        assert over is logits
        np.testing.assert_array_equal(logits.numpy(), before)


def test_words_that_are_masked_with_minus_infinity(rng, device_name):
    """Whole blocks of them, also the first."""
    words, first = 9001, 8500
    values = np.full((2, words), -np.inf, np.float32)
    values[:, first:] = rng.normal(size=(2, words - first))
    targets = np.array([first, words - 1], np.int32)
    logits = na.array(values)
    loss, lse, scale = ce.cross_entropy_forward(device_name, logits, na.array(targets))
    expected, _ = ce.cross_entropy_reference(values, targets)
    assert_close(loss, expected, 1e-6)
    d_logits = ce.cross_entropy_backward(device_name, na.array(np.float32(1)), logits, na.array(targets), lse, scale)
    assert_close(d_logits, ce.cross_entropy_gradient_reference(np.ones(()), values, targets), ERROR)
    assert (d_logits.numpy()[:, :first] == 0).all()


def test_a_row_that_does_not_count_may_hold_anything(rng, device_name):
    values = rng.normal(size=(3, 50)).astype(np.float32)
    values[1] = np.nan
    targets = np.array([4, ce.IGNORE_INDEX, 49])
    logits = na.array(values)
    loss, lse, scale = ce.cross_entropy_forward(device_name, logits, na.array(targets))
    expected, _ = ce.cross_entropy_reference(values[::2], targets[::2])
    assert_close(loss, expected, 1e-6)
    found = ce.cross_entropy_backward(device_name, na.array(np.float32(1)), logits, na.array(targets), lse, scale)
    expected = np.zeros((3, 50))
    expected[::2] = ce.cross_entropy_gradient_reference(np.ones(()), values[::2], targets[::2])
    assert_close(found, expected, ERROR)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32")])
@pytest.mark.parametrize("reduction", ce.REDUCTIONS)
def test_linear_cross_entropy(rng, device_name, engine, dtypes, reduction):
    """Several shares of the vocabulary, the last one ragged; blocks of tokens, words and columns that end early."""
    tokens, words, columns = int(rng.integers(1, 140)), int(rng.integers(520, 800)), int(rng.choice([40, 128, 170]))
    if engine == "interpreter" or device_name == "metal":
        tokens, columns = min(tokens, 70), 40
    options, targets = options_of(rng), targets_of(rng, tokens, words, rng.choice([np.int32, np.int64]))
    told = f"{tokens} tokens, {words} words, {columns} columns, {options}"
    hidden, hidden_values = operand(rng.normal(size=(tokens, columns)), dtypes[0])
    weight, weight_values = operand(rng.normal(size=(words, columns)) * 3 / np.sqrt(columns), dtypes[1])
    with engine_of(engine):
        arguments = hidden, weight, na.array(targets)
        loss, lse, scale = lce.linear_cross_entropy_forward(device_name, *arguments, reduction=reduction, **options)
        expected, expected_lse = lce.linear_cross_entropy_reference(
            hidden_values, weight_values, targets, reduction=reduction, **options
        )
        # Logits are sums of up to 170 products of size 1 in fp32.
        assert_close(lse, expected_lse, 1e-5, told=told)
        assert_close(loss, expected, 2e-5, told=told)
        d_loss, d_values = d_loss_of(rng, loss)
        found = lce.linear_cross_entropy_backward(device_name, d_loss, *arguments, lse, scale, **options)
        expected = lce.linear_cross_entropy_gradient_reference(
            d_values, hidden_values, weight_values, targets, reduction=reduction, **options
        )
        # Blocks of d_logits are rounded to hidden's type, so that a sum is off by that share of its largest terms.
        error = {"float32": 5e-5, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtypes[0]]
        for array, values, dtype in zip(found, expected, dtypes):
            assert_close(array, values, error, dtype, told)


def test_linear_cross_entropy_is_pytorchs(rng, device_name):
    torch = pytest.importorskip("torch")
    tokens, words, columns = 33, 700, 48
    hidden, weight = (rng.normal(size=s).astype(np.float32) / 2 for s in ((tokens, columns), (words, columns)))
    targets = targets_of(rng, tokens, words, np.int64)
    h, w = torch.tensor(hidden, requires_grad=True), torch.tensor(weight, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(h @ w.T, torch.tensor(targets), ignore_index=IGNORED)
    expected.backward()
    arguments = na.array(hidden), na.array(weight), na.array(targets)
    loss, lse, scale = lce.linear_cross_entropy_forward(device_name, *arguments, ignore_index=IGNORED)
    np.testing.assert_allclose(loss.numpy(), expected.item(), rtol=1e-5)
    found = lce.linear_cross_entropy_backward(device_name, na.array(np.float32(1)), *arguments, lse, scale,
                                              ignore_index=IGNORED)  # fmt: skip
    for array, tensor in zip(found, (h, w)):
        assert_close(array, tensor.grad.double().numpy(), 5e-5)


@pytest.mark.cpu  # memory is planned for all devices alike; software devices take long for so many words
def test_the_logits_never_exist(rng, device_name):
    """What is neither operand nor result is at most a tenth of the logits in fp32."""
    tokens, words, columns = 16, 32_000, 16
    hidden, weight = operand(rng.normal(size=(tokens, columns)))[0], operand(rng.normal(size=(words, columns)))[0]
    targets = na.array(rng.integers(0, words, tokens).astype(np.int32))

    @na.compile
    def step(hidden, weight, targets, d_loss):
        loss, lse, scale = lce.linear_cross_entropy_forward(device_name, hidden, weight, targets)
        return loss, *lce.linear_cross_entropy_backward(device_name, d_loss, hidden, weight, targets, lse, scale)

    step(hidden, weight, targets, na.array(np.float32(1)))
    assert 0 < step.program.arena.nbytes <= tokens * words * 4 / 10


def test_results_are_the_same_again(rng, device_name):
    tokens, words, columns = 100, 600, 40
    arguments = (na.array(rng.normal(size=(tokens, columns)).astype(np.float32)),
                 na.array(rng.normal(size=(words, columns)).astype(np.float32)),
                 na.array(targets_of(rng, tokens, words)))  # fmt: skip
    first = None
    for _ in range(3):
        loss, lse, scale = lce.linear_cross_entropy_forward(device_name, *arguments, ignore_index=IGNORED)
        found = lce.linear_cross_entropy_backward(device_name, na.array(np.float32(1)), *arguments, lse, scale,
                                                  ignore_index=IGNORED)  # fmt: skip
        bits = [array.numpy().tobytes() for array in (loss, *found)]
        assert bits == (first := first or bits)


@pytest.mark.parametrize("wrong", [-1, 40])
def test_targets_outside_the_vocabulary_are_reported(rng, device_name, wrong):
    targets = rng.integers(0, 40, 5)
    targets[3] = wrong
    logits = na.array(rng.normal(size=(5, 40)).astype(np.float32))
    with pytest.raises(DeviceError, match="a target is neither in the vocabulary nor ignore_index"):
        ce.cross_entropy_forward(device_name, logits, na.array(targets))[0].numpy()
    weight = na.array(rng.normal(size=(40, 40)).astype(np.float32))
    with pytest.raises(DeviceError, match="a target is neither in the vocabulary nor ignore_index"):
        lce.linear_cross_entropy_forward(device_name, logits, weight, na.array(targets))[0].numpy()


def test_what_does_not_fit_is_refused_in_a_sentence(device_name):
    logits, targets = na.zeros((3, 8)), na.zeros((3,), "int32")
    with pytest.raises(ValueError, match=r"found shapes \(2, 3, 8\) and \(3,\) of the targets"):
        ce.cross_entropy_forward(device_name, na.zeros((2, 3, 8)), targets)
    with pytest.raises(TypeError, match="the targets are of type fp32"):
        ce.cross_entropy_forward(device_name, logits, na.zeros((3,)))
    with pytest.raises(ValueError, match="the reduction is 'average', expected one of none, sum, mean"):
        ce.cross_entropy_forward(device_name, logits, targets, reduction="average")
    with pytest.raises(ValueError, match=r"label smoothing is 1\.5"):
        ce.cross_entropy_forward(device_name, logits, targets, smoothing=1.5)
    lse = na.zeros((3,))
    with pytest.raises(ValueError, match=r"d_loss has shape \(2,\), expected \(\) or \(3,\)"):
        ce.cross_entropy_backward(device_name, na.zeros((2,)), logits, targets, lse)
    with pytest.raises(ValueError, match="expected contiguous ones, or in_place=False"):
        ce.cross_entropy_backward(device_name, lse, na.zeros((8, 3)).T, targets, lse, in_place=True)
    with pytest.raises(ValueError, match=r"hidden has shape \(3, 8\) and the weights \(5, 7\)"):
        lce.linear_cross_entropy_forward(device_name, logits, na.zeros((5, 7)), targets)

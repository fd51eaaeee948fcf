"""The gradient of every elementwise operation, reduction, norm and view, against differences and PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gradient_cases import Case, compare_with_differences, compare_with_torch

import nitinol as na

BOTH = [(3, 5)]
UNARY = {
    "exp": "any", "exp2": "any", "log": "positive", "log2": "positive", "sqrt": "positive", "rsqrt": "positive",
    "sin": "any", "cos": "any", "tanh": "any", "erf": "any", "sigmoid": "any", "reciprocal": "off zero",
    "abs": "off zero", "negative": "any", "square": "any",
}  # fmt: skip
CONDITION = np.arange(15).reshape(3, 5) % 3 == 0
CASES: dict[str, Case] = {
    **{name: Case(getattr(na, name), getattr(torch, name), BOTH, values) for name, values in UNARY.items()},
    "silu": Case(na.silu, torch.nn.functional.silu, BOTH),
    "relu": Case(na.relu, torch.relu, BOTH, "off zero"),
    "gelu": Case(na.gelu, torch.nn.functional.gelu, BOTH),
    "gelu by tanh": Case(
        lambda x: na.gelu(x, approximate="tanh"), lambda x: torch.nn.functional.gelu(x, approximate="tanh"), BOTH
    ),
    "of pieces": Case(
        lambda x: na.floor(x) + na.ceil(x) + na.sign(x) * x, lambda x: x.floor() + x.ceil() + x.sign() * x,
        BOTH, "off zero", False,
    ),
    "copy": Case(lambda x: x.copy() * 2.0, lambda x: x.clone() * 2, BOTH),
    # ------------------------------------------------------------------ two operands, broadcast either way
    "add": Case(lambda x, y: x + y, lambda x, y: x + y, [(3, 1, 5), (4, 1)]),
    "subtract": Case(lambda x, y: x - y, lambda x, y: x - y, [(5,), (3, 5)]),
    "multiply": Case(lambda x, y: x * y, lambda x, y: x * y, [(3, 5), ()]),
    "divide": Case(lambda x, y: x / y, lambda x, y: x / y, [(1, 5), (3, 1)], ("any", "off zero")),
    "power": Case(lambda x, y: x**y, lambda x, y: x**y, [(3, 5), (3, 1)], ("positive", "any")),
    "maximum": Case(na.maximum, torch.maximum, [(3, 5), (5,)]),
    "minimum": Case(na.minimum, torch.minimum, [(5,), (3, 5)]),
    "mod": Case(
        lambda x, y: x % y * x, lambda x, y: torch.remainder(x, y) * x, [(3, 5), (5,)], ("small", "positive"), False
    ),
    "where": Case(
        lambda x, y: na.where(na.array(CONDITION), x, y), lambda x, y: torch.where(torch.tensor(CONDITION), x, y),
        [(5,), (3, 1)],
    ),
    "the same twice": Case(lambda x: x * x + x / (x * x + 1.0) - x, lambda x: x * x + x / (x * x + 1) - x, BOTH),
    # ----------------------------------------------------------------------------- numbers as operands
    "numbers": Case(
        lambda x: 2.0 - (1 + x) * 3 / 2.5 - x / 4, lambda x: 2.0 - (1 + x) * 3 / 2.5 - x / 4, BOTH
    ),
    "number over": Case(lambda x: 3 / x - 2.5 / x, lambda x: 3 / x - 2.5 / x, BOTH, "off zero"),
    "number to the": Case(lambda x: 2.5**x + 2**x, lambda x: 2.5**x + 2**x, BOTH),
    "to whole numbers": Case(lambda x: x**1 + x**2 + x**5, lambda x: x + x**2 + x**5, BOTH),
    "to other numbers": Case(
        lambda x: x**0.5 + x**-2 + x**1.7 + x**0, lambda x: x**0.5 + x**-2 + x**1.7 + x**0, BOTH, "positive"
    ),
    "clip": Case(lambda x: x.clip(-0.2, 0.7), lambda x: x.clamp(-0.2, 0.7), BOTH, "any", False),
    "numbers elsewhere": Case(
        lambda x: na.maximum(x, 0.1) + na.minimum(0.2, x) + na.where(x > 0, x, 1.0) + na.where(x > 0, 2, x) + x % 0.7,
        lambda x: (x.clamp(min=0.1) + x.clamp(max=0.2) + torch.where(x > 0, x, 1.0) + torch.where(x > 0, 2.0, x)
                   + torch.remainder(x, 0.7)),
        BOTH, "any", False,
    ),
    # ----------------------------------------------------------------------------------------- reductions
    "sum": Case(lambda x: x.sum(), lambda x: x.sum(), [(3, 4, 5)]),
    "sum of axes": Case(lambda x: x.sum((0, -1)), lambda x: x.sum((0, -1)), [(3, 4, 5)]),
    "sum, kept": Case(lambda x: x * x.sum(1, True), lambda x: x * x.sum(1, True), [(3, 4, 5)]),
    "sum of no axes": Case(lambda x: x.sum(()), lambda x: x * 1, BOTH),
    "mean": Case(lambda x: x.mean(0), lambda x: x.mean(0), BOTH),
    "prod": Case(lambda x: na.prod(x, 1), lambda x: x.prod(1), BOTH),
    "max": Case(lambda x: x.max((0, 2)), lambda x: x.amax((0, 2)), [(3, 4, 5)], "apart"),
    "min": Case(lambda x: x.min(1, True), lambda x: x.amin(1, True), [(3, 4, 5)], "apart"),
    "var": Case(lambda x: na.var(x, 1), lambda x: x.var(1, correction=0), BOTH),
    "var, corrected": Case(lambda x: na.var(x, (0, 1), True, 1), lambda x: x.var((0, 1), keepdim=True), BOTH),
    "std": Case(lambda x: na.std(x, 0, correction=1), lambda x: x.std(0), BOTH),
    "logsumexp": Case(lambda x: na.logsumexp(x, 1), lambda x: x.logsumexp(1), BOTH),
    "logsumexp of all": Case(lambda x: na.logsumexp(x, None, True), lambda x: x.logsumexp((0, 1), True), BOTH),
    "softmax": Case(na.softmax, lambda x: x.softmax(-1), BOTH),
    "softmax of columns": Case(lambda x: na.softmax(x, 0), lambda x: x.softmax(0), [(4, 3, 2)]),
    "log_softmax": Case(lambda x: na.log_softmax(x, 1), lambda x: x.log_softmax(1), [(4, 3, 2)]),
    "cumsum": Case(lambda x: na.cumsum(x, 1), lambda x: x.cumsum(1), [(3, 7, 2)]),
    "cumsum from the back": Case(lambda x: na.cumsum(x.flip(0), -2), lambda x: x.flip(0).cumsum(-2), [(3, 7, 2)]),
}  # fmt: skip


@pytest.mark.float64
@pytest.mark.parametrize("name", CASES)
def test_against_differences(rng, name):
    compare_with_differences(CASES[name], rng)


@pytest.mark.parametrize("name", CASES)
def test_against_torch(rng, name):
    compare_with_torch(CASES[name], rng, "float32")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].halves])
def test_halves_against_torch(rng, name, dtype):
    compare_with_torch(CASES[name], rng, dtype)


# -------------------------------------------------------------------------------------------- kinks and edges


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_ties_share(dtype):
    x = na.array([[2.0, 5.0, 5.0, 1.0], [3.0, 3.0, 3.0, 3.0]]).astype(dtype)
    assert na.grad(lambda a: a.max(1).sum())(x).tolist() == [[0, 0.5, 0.5, 0], [0.25] * 4]
    assert na.grad(lambda a: a.min().sum())(x).tolist() == [[0, 0, 0, 1], [0] * 4]
    y = na.array([2.0, 1.0, 4.0]).astype(dtype)
    left, right = na.grad(lambda a, b: na.maximum(a, b).sum(), argnums=(0, 1))(y, na.array([2.0, 3.0, 1.0]))
    assert left.tolist() == [0.5, 0, 1] and right.tolist() == [0.5, 1, 0]


def test_more_ties_than_a_half_can_count():
    x = na.array(np.zeros((1, 70_001)), "float16")
    found = na.grad(lambda a: a.max(1).sum() * 1024.0)(x).numpy().astype(np.float64)
    np.testing.assert_allclose(found, 1024 / 70_001, rtol=2**-10)


def test_products_with_zeros():
    x = na.array([[2.0, 0.0, 3.0], [0.0, 0.0, 5.0], [1.0, 2.0, 4.0]])
    assert na.grad(lambda a: na.prod(a, 1).sum())(x).tolist() == [[0, 6, 0], [0, 0, 0], [8, 4, 2]]


def test_edges_as_torchs():
    """Where a derivative is infinite or a rule: as PyTorch says."""

    def compare(ours, theirs, *values):
        a = np.asarray(values, np.float32)
        t = torch.tensor(a, requires_grad=True)
        theirs(t).sum().backward()
        np.testing.assert_array_equal(na.grad(lambda x: ours(x).sum())(na.array(a)).numpy(), t.grad.numpy())

    compare(na.abs, torch.abs, 0.0, -0.0)
    compare(na.relu, torch.relu, 0.0, -1.0, 1.0)
    compare(na.sqrt, torch.sqrt, 0.0, 4.0)
    compare(lambda x: x**2.0, lambda x: x**2.0, 0.0, -1.0)
    compare(lambda x: x**0, lambda x: x**0, 0.0, 2.0)
    compare(lambda x: na.where(x > 0, na.log(na.where(x > 0, x, 1.0)), 0.0),
            lambda x: torch.where(x > 0, torch.log(torch.where(x > 0, x, 1.0)), 0.0), 0.0, -1.0, 2.0)  # fmt: skip
    compare(na.std, lambda x: x.std(correction=0), 2.0, 2.0)
    masked = np.array([0.0, -np.inf], np.float32)
    ours, theirs = na.array(masked), torch.tensor(masked)
    compare(lambda x: na.softmax(x + ours), lambda x: (x + theirs).softmax(0), 1.0, 2.0)
    compare(lambda x: na.logsumexp(x + ours), lambda x: (x + theirs).logsumexp(0), 1.0, 2.0)


def test_logsumexp_of_infinities():
    x = na.array([[-np.inf, -np.inf], [np.inf, 1.0], [-np.inf, 2.0]])
    assert na.logsumexp(x, 1).tolist() == [-np.inf, np.inf, 2.0]


def test_empty_arrays():
    x = na.zeros((0, 3))
    assert na.grad(lambda a: (a * 2.0).sum() + na.concatenate([a, na.ones((1, 3))]).sum())(x).shape == (0, 3)
    y = na.ones((2, 3))
    assert (na.grad(lambda a: a[1:1].sum() + a[:, 3:].sum())(y).numpy() == 0).all()

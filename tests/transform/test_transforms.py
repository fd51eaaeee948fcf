"""grad, value_and_grad, vjp, jvp, checkpoint, stop_gradient, custom_gradient and compile, one inside another."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import nitinol as na

# A chain of a few float32 operations, each rounded once, on values near 1.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def both(rng, *shape):
    """An Array and a torch tensor of the same float32 elements."""
    a = rng.standard_normal(shape).astype(np.float32)
    return na.array(a), torch.tensor(a)


def same(found, expected):
    assert found.shape == tuple(expected.shape)
    np.testing.assert_allclose(found.numpy(), expected.detach().numpy(), **CLOSE)


# ------------------------------------------------------------------------------------------ arguments and results


def test_value_and_grad_of_nested_arguments(rng):
    (w, tw), (b, tb), (x, tx) = both(rng, 4, 3), both(rng, 3), both(rng, 5, 4)

    def loss(parameters, x):
        return na.tanh(x @ parameters["layer"][0] + parameters["layer"][1]).sum()

    parameters = {"layer": (w, b), "none": None}
    value, (found, d_x) = na.value_and_grad(loss, argnums=(0, 1))(parameters, x)
    for t in (tw, tb, tx):
        t.requires_grad_()
    expected = torch.tanh(tx @ tw + tb).sum()
    expected.backward()
    same(value, expected)
    assert set(found) == {"layer", "none"} and found["none"] is None and type(found["layer"]) is tuple
    same(found["layer"][0], tw.grad)
    same(found["layer"][1], tb.grad)
    same(d_x, tx.grad)


def test_argnums_from_the_end_and_keywords(rng):
    (x, _), (y, _) = both(rng, 3), both(rng, 3)
    found = na.grad(lambda a, b, scale: (a * b * scale).sum(), argnums=-1)(x, y, scale=3.0)
    np.testing.assert_allclose(found.numpy(), 3 * x.numpy(), **CLOSE)


def test_has_aux(rng):
    x, _ = both(rng, 4)
    (value, aux), found = na.value_and_grad(lambda a: ((a * a).sum(), {"twice": a * 2.0}), has_aux=True)(x)
    np.testing.assert_allclose(float(value), (x.numpy() ** 2).sum(), **CLOSE)
    np.testing.assert_allclose(aux["twice"].numpy(), 2 * x.numpy())
    np.testing.assert_allclose(found.numpy(), 2 * x.numpy())
    found, aux = na.grad(lambda a: (a.sum(), "text"), has_aux=True)(x)
    assert aux == "text" and (found.numpy() == 1).all()


def test_arguments_without_influence_have_zeros(rng):
    (x, _), (y, _) = both(rng, 4), both(rng, 2, 3)
    d_x, d_y = na.grad(lambda a, b: a.sum(), argnums=(0, 1))(x, y)
    assert (d_x.numpy() == 1).all() and d_y.shape == (2, 3) and (d_y.numpy() == 0).all()
    # ... and what depends on them in whole numbers only
    assert (na.grad(lambda a: na.argmax(a).astype("float32") + na.floor(a).sum())(x).numpy() == 0).all()
    assert (na.grad(lambda a: a.astype("int32").astype("float32").sum())(x).numpy() == 0).all()


def test_the_same_array_given_twice(rng):
    x, _ = both(rng, 4)
    left, right = na.grad(lambda a, b: (a * b * b).sum(), argnums=(0, 1))(x, x)
    np.testing.assert_allclose(left.numpy(), x.numpy() ** 2, **CLOSE)
    np.testing.assert_allclose(right.numpy(), 2 * x.numpy() ** 2, **CLOSE)


def test_an_array_that_the_function_also_finds_elsewhere_is_a_constant_there(rng):
    x, _ = both(rng, 4)
    found = na.grad(lambda a: (a * x).sum())(x)
    np.testing.assert_allclose(found.numpy(), x.numpy())


def test_results_that_are_the_argument_or_constants(rng):
    x, _ = both(rng, 4)
    result, pull = na.vjp(lambda a: {"same": a, "view": a[1:3], "constant": na.ones(2)}, x)
    np.testing.assert_array_equal(result["same"].numpy(), x.numpy())
    (found,) = pull({"same": na.ones(4), "view": na.array([2.0, 3.0]), "constant": na.ones(2)})
    np.testing.assert_array_equal(found.numpy(), [1, 3, 4, 1])
    one = na.array([2.5])
    assert na.grad(lambda a: a)(one).tolist() == [1.0]


def test_numbers_and_numpy_arrays_as_arguments(rng):
    assert na.grad(lambda a: a * a)(3.0).item() == 6.0
    a = rng.standard_normal(3).astype(np.float32)
    np.testing.assert_allclose(na.grad(lambda x: (x * x).sum())(a).numpy(), 2 * a)


@pytest.mark.parametrize("view", [
    lambda x: x.T, lambda x: x[::-2, 1:], lambda x: x[1], lambda x: x.flip(1)[:, :2], lambda x: x[:, 2].expand_dims(0),
    lambda x: x[:1].broadcast_to(3, 4), lambda x: x[0, 0].broadcast_to(2, 3), lambda x: x.expand_dims(1),
], ids=range(8))  # fmt: skip
def test_arguments_that_are_views(rng, view):
    """Of a view of repeated elements, each has its own gradient, as if it had been copied."""
    x, _ = both(rng, 5, 4)
    argument = view(x)
    weight, _ = both(rng, *argument.shape)
    found = na.grad(lambda a: (a * a * weight).sum() + a[0].sum())(argument)
    expected = 2 * argument.numpy() * weight.numpy()
    expected[0] += 1
    np.testing.assert_allclose(found.numpy(), expected, **CLOSE)


@pytest.mark.cpu
def test_arguments_whose_elements_overlap():
    windows = na.from_dlpack(torch.arange(6, dtype=torch.float32).unfold(0, 4, 1))  # 3 windows, one step apart
    found = na.grad(lambda a: (a * a).sum() + a[1, 2])(windows)
    expected = 2 * windows.numpy()
    expected[1, 2] += 1
    np.testing.assert_array_equal(found.numpy(), expected)


def test_functions_that_look_at_elements_in_between(rng):
    x, t = both(rng, 6)
    t.requires_grad_()

    def function(a):
        inner = ((a.exp() + 1.0) * (a.sin() * 2.0)).sum()
        if inner.item() > 0:  # evaluates, and `exp` is needed once more
            return inner * (a.numpy() > 0).sum().item()
        return inner * inner

    inner = ((t.exp() + 1) * (t.sin() * 2)).sum()
    (inner * (t > 0).sum() if inner > 0 else inner * inner).backward()
    same(na.grad(function)(x), t.grad)


def test_what_is_needed_backwards_outlives_a_look(rng):
    """tanh is computed for the product, which is looked at; then nobody has it but its own gradient."""
    x, t = both(rng, 3, 3)
    t.requires_grad_()

    def function(a):
        product = na.tanh(a) @ a
        product.evaluate()
        return (product * product).sum()

    ((torch.tanh(t) @ t) ** 2).sum().backward()
    same(na.grad(function)(x), t.grad)


# -------------------------------------------------------------------------------------------- higher derivatives

CHAINS = {
    "exp of sin": lambda m, x: m.exp(m.sin(x)),
    "tanh": lambda m, x: m.tanh(x * x),
    "quotient": lambda m, x: (x + 3.0) / (x * x + 1.0),
    "power": lambda m, x: (x * x + 1.0) ** 1.5 + x**3,
    "log": lambda m, x: m.log(x * x + 1.0) * m.sqrt(x * x + 2.0),
    "sigmoid": lambda m, x: m.sigmoid(x) * m.erf(x),
    "rsqrt": lambda m, x: m.rsqrt(x * x + 1.0) - m.cos(x) * m.exp2(x),
    "maximum": lambda m, x: m.where(x > 0.1, x**3, m.sin(x)),
}


@pytest.mark.float64
@pytest.mark.parametrize("name", CHAINS)
def test_first_to_third_derivatives(rng, name):
    a = rng.standard_normal(5)
    ours, theirs = (lambda x: CHAINS[name](na, x).sum()), torch.tensor(a, requires_grad=True)
    value = CHAINS[name](torch, theirs).sum()
    for _ in range(3):
        previous = ours
        ours = lambda x, previous=previous: na.grad(previous)(x).sum()  # noqa: E731
        (slope,) = torch.autograd.grad(value, theirs, create_graph=True)
        value = slope.sum()
        # each derivative multiplies terms; float64 keeps 1e-16 of each
        np.testing.assert_allclose(na.grad(previous)(na.array(a)).numpy(), slope.detach().numpy(), 1e-10, 1e-10)


@pytest.mark.float64
def test_a_hessian_by_products(rng):
    """grad of (grad . v), jvp of grad and torch's Hessian agree."""
    a, v = rng.standard_normal((2, 4))
    w = rng.standard_normal((4, 4))

    def f(x):
        return (na.softmax(x @ na.array(w)) * x * x).sum()

    def g(x):
        return (torch.softmax(x @ torch.tensor(w), -1) * x * x).sum()

    expected = torch.autograd.functional.hessian(g, torch.tensor(a)).numpy() @ v
    x, direction = na.array(a), na.array(v)
    twice = na.grad(lambda x: (na.grad(f)(x) * direction).sum())(x)
    _, forward = na.jvp(na.grad(f), (x,), (direction,))
    np.testing.assert_allclose(twice.numpy(), expected, 1e-9, 1e-9)
    np.testing.assert_allclose(forward.numpy(), expected, 1e-9, 1e-9)


def test_jvp_is_torchs(rng):
    (x, tx), (y, ty), (u, tu), (v, tv) = (both(rng, *s) for s in ((3, 4), (4,), (3, 4), (4,)))
    value, slope = na.jvp(
        lambda a, b: {"p": (a * b).tanh() @ b, "m": a.max(1), "i": a > 0, "c": na.ones(2)}, (x, y), (u, v)
    )
    expected = torch.func.jvp(lambda a, b: (torch.tanh(a * b) @ b, a.amax(1)), (tx, ty), (tu, tv))
    same(value["p"], expected[0][0])
    same(slope["p"], expected[1][0])
    same(slope["m"], expected[1][1])
    assert not slope["i"].numpy().any() and (slope["c"].numpy() == 0).all()

"""Functions with gradients of their own: checkpoint, custom_gradient, stop_gradient; and compile with grad."""

from __future__ import annotations

import numpy as np
import pytest

import nitinol as na

CLOSE = {"rtol": 2e-5, "atol": 2e-5}  # a few float32 operations, each rounded once, on values near 1


def fresh(rng, *shape, scale=1.0):
    return na.array((rng.standard_normal(shape) * scale).astype(np.float32))


# ----------------------------------------------------------------------------------------------------- checkpoint


def test_checkpoint_has_the_same_gradients(rng):
    """Of arguments, of arrays that it closes over, of keywords; with integers, None and nested arguments."""
    w, v, x, bias = fresh(rng, 4, 4), fresh(rng, 4), fresh(rng, 3, 4), fresh(rng, 4)
    rows = na.array([2, 0])

    def loss(w, v, bias, wrap):
        def block(inputs, rows, nothing, shift):
            h = na.tanh(inputs["x"] @ w + shift)
            return {"rows": h.take(rows) * v, "all": (h, h.sum())}

        found = wrap(block)({"x": x}, rows, None, shift=bias)
        return found["rows"].sum() + (found["all"][0] * found["all"][1]).sum()

    plain = na.grad(lambda *a: loss(*a, lambda f: f), argnums=(0, 1, 2))(w, v, bias)
    kept = na.grad(lambda *a: loss(*a, na.checkpoint), argnums=(0, 1, 2))(w, v, bias)
    nested = na.grad(lambda *a: loss(*a, lambda f: na.checkpoint(na.checkpoint(f))), argnums=(0, 1, 2))(w, v, bias)
    for a, b, c in zip(plain, kept, nested):
        assert np.abs(a.numpy()).max() > 0
        np.testing.assert_array_equal(a.numpy(), b.numpy())
        np.testing.assert_array_equal(a.numpy(), c.numpy())


def test_checkpoint_of_a_view_or_of_nothing_new(rng):
    x = fresh(rng, 3, 4)
    found = na.grad(lambda a: (na.checkpoint(lambda b: b[1:, ::-2])(a) * 2.0).sum())(x)
    expected = np.zeros((3, 4))
    expected[1:, ::-2] = 2
    np.testing.assert_array_equal(found.numpy(), expected)
    assert (na.grad(lambda a: na.checkpoint(lambda: na.ones(3))().sum() + a.sum())(x).numpy() == 1).all()


@pytest.mark.float64
def test_second_derivatives_through_a_checkpoint(rng):
    x = na.array(rng.standard_normal(4))

    def slope(wrap):
        f = wrap(lambda a: (na.exp(na.sin(a)) * x).sum())
        return na.grad(lambda a: (na.grad(f)(a) ** 2).sum())(x).numpy()

    np.testing.assert_allclose(slope(na.checkpoint), slope(lambda f: f), 1e-12)


def test_checkpoint_computes_again_and_needs_less_memory(rng):
    """A chain of 12 products in 4 blocks: without checkpoints all inner results wait for their gradient."""

    def block(h):
        for _ in range(3):
            h = na.tanh(h @ h)
        return h

    def loss(h, f):
        for _ in range(4):
            h = f(h)
        return h.sum()

    w = fresh(rng, 64, 64, scale=0.1)
    steps = []
    for f in (block, na.checkpoint(block)):
        step = na.compile(lambda h, f=f: na.grad(lambda a: loss(a, f))(h))
        result = step(w).numpy()
        steps.append((result, len(step.records), step.program.arena.nbytes))
    (plain, launches, memory), (again, more_launches, less_memory) = steps
    np.testing.assert_array_equal(again, plain)
    assert more_launches >= launches + 3 * 3  # all blocks but the last, whose inner results are there anyway
    assert less_memory < 0.75 * memory


# ------------------------------------------------------------------------------- gradients of one's own, and none


def test_custom_gradient(rng):
    x, y, index = fresh(rng, 3), fresh(rng, 3), na.array([0, 2, 2])

    @na.custom_gradient
    def odd(a, b, i):
        return (a * b, b.take(i)), lambda g: (g[0] * 10.0, g[1] * 100.0, None)

    def loss(a, b):
        product, taken = odd(a, b, index)
        return product.sum() + 2.0 * taken.sum()

    d_x, d_y = na.grad(loss, argnums=(0, 1))(x, y)
    assert (d_x.numpy() == 10).all() and (d_y.numpy() == 200).all()


def test_custom_gradient_may_work_in_place(rng):
    x = fresh(rng, 4)

    @na.custom_gradient
    def doubled(a):
        result = na.zeros(4).copy()
        result.assign(a)
        result.assign(result + a)
        return result, lambda g: g * 2.0

    assert (na.grad(lambda a: doubled(a).sum())(x).numpy() == 2).all()


@pytest.mark.float64
def test_second_derivatives_through_a_custom_gradient(rng):
    x = na.array(rng.standard_normal(4))
    cube = na.custom_gradient(lambda a: (a * a * a, lambda g: g * 3.0 * a * a))
    second = na.grad(lambda a: na.grad(lambda b: cube(b).sum())(a).sum())(x)
    np.testing.assert_allclose(second.numpy(), 6 * x.numpy(), 1e-14)


def test_stop_gradient(rng):
    x = fresh(rng, 4)
    assert (na.grad(lambda a: (a * na.stop_gradient(a)).sum())(x).numpy() == x.numpy()).all()
    assert (na.grad(lambda a: na.stop_gradient(a * a).sum())(x).numpy() == 0).all()


def test_state_beside_the_gradient(rng):
    """A running mean is updated in place, from an array that has a gradient: no gradient flows into it, and none is
    wanted of it."""
    x, state = fresh(rng, 4), na.array(np.ones(4, np.float32))
    before, scale = x.numpy(), state.numpy()

    def loss(a):
        result = (a * state.copy()).sum()  # the copy is what the gradient needs
        state.assign(state * 0.5 + a * 0.5)
        return result

    np.testing.assert_array_equal(na.grad(loss)(x).numpy(), scale)
    np.testing.assert_allclose(state.numpy(), 0.5 * scale + 0.5 * before, **CLOSE)


# ------------------------------------------------------------------------------------------------------- compile


def test_grad_inside_compile(rng):
    """A step that updates its weights in place gives what the same steps in NumPy give."""
    w, x = fresh(rng, 4), fresh(rng, 8, 4)
    expected = w.numpy().astype(np.float64)

    @na.compile
    def step(x):
        value, slope = na.value_and_grad(lambda w: na.square(x @ w - 1.0).mean())(w)
        w.assign(w - 0.1 * slope)
        return value

    for _ in range(4):
        value = step(x)
        residual = x.numpy() @ expected - 1
        np.testing.assert_allclose(float(value), (residual**2).mean(), **CLOSE)
        expected -= 0.1 * 2 * x.numpy().T @ residual / 8
        np.testing.assert_allclose(w.numpy(), expected, **CLOSE)


def test_compile_inside_grad(rng):
    """Its calls are a part of what the gradient is taken of, whatever ran before; NumPy arguments are arrays there."""
    x, w = fresh(rng, 4), fresh(rng, 4)
    f = na.compile(lambda a, b: {"y": na.sin(a) * w * b.sum()})
    b = np.ones(3, np.float32)
    f(x, b)
    expected = np.cos(x.numpy()) * w.numpy() * 3
    np.testing.assert_allclose(na.grad(lambda a: f(a, b)["y"].sum())(x).numpy(), expected, **CLOSE)
    both = na.compile(lambda a: na.grad(lambda c: f(c, b)["y"].sum())(a))
    for _ in range(2):
        np.testing.assert_allclose(both(x).numpy(), expected, **CLOSE)


def test_vjp_and_checkpoint_inside_compile(rng):
    x, w = fresh(rng, 3, 4), fresh(rng, 4, 4)

    def gradients(x, seed):
        result, pull = na.vjp(lambda a, b: na.checkpoint(lambda c: na.tanh(c @ b))(a), x, w)
        return result, pull(seed)

    seed = fresh(rng, 3, 4)
    eager, compiled = gradients(x, seed), na.compile(gradients)(x, seed)
    for a, b in zip((eager[0], *eager[1]), (compiled[0], *compiled[1])):
        np.testing.assert_allclose(a.numpy(), b.numpy(), **CLOSE)

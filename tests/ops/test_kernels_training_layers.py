"""Low-rank adapters, mixture of experts, the gated delta rule and its neighbours as operations: results against their
references, gradients at float64 against finite differences and those of the kernels against the float64 ones."""

from __future__ import annotations

import numpy as np
import pytest
from operands import numerical_gradient

import nitinol as na
from nitinol.ops import delta_rule, gated_norm, lora, routing, short_convolution

CLOSE = 2e-5  # float32 sums of up to a few hundred products, and a chain of a few of them, of the largest value


def normal(rng, *shape):
    return rng.normal(size=shape)


def delta_problem(rng, batch=2, tokens=9, heads=1, v_heads=2, dim_k=5, dim_v=4):
    q, k = normal(rng, 2, batch, tokens, heads, dim_k)
    v, g = normal(rng, batch, tokens, v_heads, dim_v), -0.3 * rng.exponential(size=(batch, tokens, v_heads))
    return {"q": q, "k": k, "v": v, "g": g, "beta": rng.uniform(size=g.shape),
            "initial": normal(rng, batch, v_heads, dim_k, dim_v)}  # fmt: skip


def delta(normalise):
    return lambda q, k, v, g, beta, initial: na.gated_delta_rule(
        q, k, v, g, beta, initial, 0.4, normalise
    )


def expert_problem(rng, tokens=7, count=4, width=6, inner=5):
    """Logits without near ties: the choice must not change with the steps of the differences."""
    logits = rng.permuted(np.tile(np.arange(count) * 0.7, (tokens, 1)), axis=1) + rng.uniform(0, 0.3, (tokens, count))
    return {"x": normal(rng, tokens, width), "logits": logits, "gate": normal(rng, count, inner, width),
            "up": normal(rng, count, inner, width), "down": normal(rng, count, width, inner)}  # fmt: skip


def mixture(**attributes):
    return lambda x, logits, gate, up, down: na.mixture_of_experts(x, logits, gate, up, down, 2, **attributes)


def cases(rng):
    """Name to operands and a function of them."""
    adapted = {"x": normal(rng, 5, 12), "weights": normal(rng, 7, 12), "down": normal(rng, 3, 12),
               "up": normal(rng, 7, 3)}  # fmt: skip
    convolved = {"x": normal(rng, 2, 6, 5), "weight": normal(rng, 5, 3)}
    state = {"bias": normal(rng, 5), "state": normal(rng, 2, 2, 5)}
    normed = {"x": normal(rng, 2, 3, 7), "gate": normal(rng, 2, 3, 7), "weight": normal(rng, 7)}
    return {
        "lora": (adapted, lambda x, weights, down, up: na.lora_linear(x, weights, down, up, 0.7)),
        "lora with a norm": (
            {**adapted, "gain": normal(rng, 12)},
            lambda x, weights, down, up, gain: na.lora_linear(x, weights, down, up, 0.7, gain, 1e-3),
        ),
        "route": ({"logits": expert_problem(rng)["logits"]}, lambda logits: na.route(logits, 2).weights),
        "route by sigmoids": (
            {"logits": expert_problem(rng)["logits"]},
            lambda logits: na.route(logits, 3, "sigmoid", False).weights,
        ),
        "mixture of experts": (expert_problem(rng), mixture()),
        "mixture with gelu": (expert_problem(rng, 3, 6), mixture(scores="sigmoid", gelu=True)),
        "delta rule": (delta_problem(rng), delta(False)),
        "delta rule of unit keys": (delta_problem(rng, heads=2), delta(True)),
        "convolution": (convolved, lambda x, weight: na.short_convolution(x, weight, activation=False)),
        "convolution with a state": ({**convolved, **state}, lambda x, weight, bias, state: na.short_convolution(
            x, weight, bias, state
        )),
        "gated norm": (normed, lambda x, gate, weight: na.gated_norm(x, gate, weight, 1e-3)),
    }  # fmt: skip


NAMES = sorted(cases(np.random.default_rng(0)))


def results_of(found):
    return list(found) if isinstance(found, tuple) else [found]


def loss_of(function, seeds):
    return lambda operands: sum((r * s).sum() for r, s in zip(results_of(function(**operands)), seeds))


def seeds_of(rng, function, operands):
    shapes = [r.shape for r in results_of(function(**{n: na.array(x) for n, x in operands.items()}))]
    return [normal(rng, *shape) for shape in shapes]


@pytest.mark.float64
@pytest.mark.parametrize("name", NAMES)
def test_gradients_at_float64(rng, name):
    """Of the composed form, against central differences: exact to step ** 2 = 1e-10 and 1e-16 / step."""
    operands, function = cases(rng)[name]
    loss = loss_of(function, [na.array(s) for s in seeds_of(rng, function, operands)])
    gradients = na.grad(loss)({n: na.array(x) for n, x in operands.items()})
    for what, x in operands.items():
        def value(changed, what=what):
            return loss({n: na.array((changed if n == what else o).copy()) for n, o in operands.items()}).item()

        some = rng.choice(x.size, min(x.size, 6), replace=False)  # each costs two evaluations
        for place in some:
            at = np.unravel_index(place, x.shape)
            slope = numerical_gradient(lambda one, x=x, at=at: value(_with(x, at, one)), x[at].reshape(1).copy(), 1e-5)
            np.testing.assert_allclose(gradients[what].numpy()[at], slope[0], rtol=1e-6, atol=1e-7, err_msg=what)


def _with(x, at, one):
    changed = x.copy()
    changed[at] = one[0]
    return changed


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_kernels(rng, name, compiled):
    """Results and gradients of the kernels against the composed form at float64, of the same numbers."""
    operands, function = cases(rng)[name]
    operands = {n: x.astype(np.float32) for n, x in operands.items()}
    wide = {n: x.astype(np.float64) for n, x in operands.items()}
    seeds = [s.astype(np.float32) for s in seeds_of(rng, function, operands)]

    def both(seeds):
        def run(operands):
            results = function(**operands)
            loss = na.value_and_grad(loss_of(function, [na.array(s) for s in seeds]))
            return results_of(results), loss(operands)[1]

        return run

    found = both(seeds)
    found = na.compile(found) if compiled else found
    results, gradients = found({n: na.array(x) for n, x in operands.items()})
    with na.using_device("cpu"):  # which has float64, also where the device under test has not
        wanted, slopes = both([s.astype(np.float64) for s in seeds])({n: na.array(x) for n, x in wide.items()})
        na.evaluate(*wanted, *slopes.values())
    pairs = [*zip(results, wanted), *((gradients[n], slopes[n]) for n in operands)]
    for (one, other), what in zip(pairs, [*(f"result {i}" for i in range(len(results))), *operands]):
        expected = other.numpy()
        assert one.dtype == na.float32 and one.shape == expected.shape
        size = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(one.numpy(), expected, rtol=0, atol=CLOSE * size, err_msg=what)


@pytest.mark.float64
def test_references(rng):
    """The composed forms against the families' references in NumPy."""
    every = cases(rng)
    arrays = {name: {n: na.array(x) for n, x in operands.items()} for name, (operands, _) in every.items()}
    expected = {
        "lora": lambda x, weights, down, up: lora.lora_reference(x, weights, down, up, 0.7),
        "lora with a norm": lambda x, weights, down, up, gain: lora.lora_reference(
            x, weights, down, up, 0.7, gain, 1e-3
        ),
        "route": lambda logits: routing.route_reference(logits, 2)[0],
        "delta rule": lambda **o: delta_rule.delta_rule_reference(**o, scale=0.4),
        "delta rule of unit keys": lambda **o: delta_rule.delta_rule_reference(**o, scale=0.4, normalise=True),
        "convolution": lambda **o: short_convolution.short_convolution_reference(**o, activation=False),
        "convolution with a state": short_convolution.short_convolution_reference,
        "gated norm": lambda **o: gated_norm.gated_norm_reference(**o, epsilon=1e-3),
    }  # fmt: skip
    for name, reference in expected.items():
        operands, function = every[name]
        for one, other in zip(results_of(function(**arrays[name])), results_of(reference(**operands))):
            np.testing.assert_allclose(one.numpy(), other, rtol=1e-10, atol=1e-10, err_msg=name)


def test_mixture_against_each_token(rng):
    """A whole layer in NumPy, token by token."""
    p = expert_problem(rng, tokens=11, count=5)
    found = mixture()(**{n: na.array(x.astype(np.float32)) for n, x in p.items()}).numpy()
    weights, places = routing.route_reference(p["logits"], 2)
    for t in range(11):
        expected = np.zeros(6)
        for w, i in zip(weights[t], places[t]):
            opened = p["gate"][i] @ p["x"][t]
            expected += w * (p["down"][i] @ (opened / (1 + np.exp(-opened)) * (p["up"][i] @ p["x"][t])))
        np.testing.assert_allclose(found[t], expected, rtol=0, atol=CLOSE * max(1, np.abs(expected).max()))


def test_weights_in_blocks(rng):
    """Base weights in blocks: the results and the other gradients are those of what they decode to."""
    p = {n: na.array(x.astype(np.float32)) for n, x in {
        "x": normal(rng, 9, 64), "down": normal(rng, 4, 64), "up": normal(rng, 21, 4), "gain": normal(rng, 64),
    }.items()}  # fmt: skip
    blocks, seed = na.quantize(normal(rng, 21, 64), "Q4_0"), na.array(normal(rng, 9, 21).astype(np.float32))

    def loss(p, weights):
        return (na.lora_linear(p["x"], weights, p["down"], p["up"], 2.0, p["gain"]) * seed).sum()

    found, expected = (na.value_and_grad(loss)(p, w) for w in (blocks, na.dequantize(blocks)))
    for one, other in [(found[0], expected[0]), *((found[1][n], expected[1][n]) for n in p)]:
        size = np.abs(other.numpy()).max()
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=0, atol=CLOSE * size)
    experts, x = na.quantize(normal(rng, 3, 5, 64), "Q8_0"), p["x"]
    order = na.dispatch(na.route(na.array(normal(rng, 9, 3).astype(np.float32)), 2).experts, 3)
    found, expected = (
        na.grad(lambda x, w=w: (na.expert_linear(x, w, order, gather=True) ** 2).sum())(x).numpy()
        for w in (experts, na.dequantize(experts))
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE * np.abs(expected).max())


def test_expert_rows_without_weights(rng):
    """combine without weights, and its gradient: every row of a token gets the token's."""
    order = na.dispatch(na.array(rng.integers(0, 3, (8, 2)).astype(np.int32)), 3)
    y, seed = (na.array(normal(rng, n, 5).astype(np.float32)) for n in (16, 8))
    total = na.combine(y, None, order).numpy()
    place = order.place.numpy()
    np.testing.assert_allclose(total, y.numpy()[place].reshape(8, 2, 5).sum(1), rtol=1e-6, atol=1e-6)
    gradient = na.grad(lambda y: (na.combine(y, None, order) * seed).sum())(y).numpy()
    np.testing.assert_array_equal(gradient[place], np.repeat(seed.numpy(), 2, axis=0))


def test_results_that_are_looked_at_later(rng):
    """Each result of a call is computed with the first, also by a launch of its own, as long as somebody holds it."""
    x, weight = (na.array(normal(rng, *s).astype(np.float32)) for s in ((1, 6, 5), (5, 3)))
    out, final = na.short_convolution(x, weight, activation=False)
    expected = short_convolution.short_convolution_reference(x.numpy(), weight.numpy(), activation=False)
    np.testing.assert_allclose(out.numpy(), expected[0], rtol=0, atol=CLOSE)
    np.testing.assert_array_equal(final.numpy(), expected[1])


def test_what_is_frozen_costs_nothing(rng):
    """In a compiled step with adapters the gradient of the base weights does not run."""
    x, weights, down, up = (na.array(normal(rng, *s).astype(np.float32)) for s in ((6, 8), (5, 8), (2, 8), (5, 2)))
    step = na.compile(lambda: na.grad(lambda a: na.lora_linear(x, weights, a[0], a[1], 0.5).sum())((down, up)))
    step()
    assert "matmul_kernel" not in [r.name for r in step.records]
    names = [r.name for r in step.records]
    assert "ranks_kernel" in names and "input_gradient_kernel" not in names  # nor that of x
    order, experts = na.dispatch(na.array(rng.integers(0, 3, (6, 2)).astype(np.int32)), 3), na.ones((3, 5, 8)).copy()
    step = na.compile(lambda: na.grad(lambda x: na.expert_linear(x, experts, order, True).sum())(x))
    step()
    assert "grouped_weight_gradient_kernel" not in [r.name for r in step.records]


def test_states_in_place(rng):
    """Token by token the results and states are those of the whole sequence, also in a compiled step."""
    p = {n: na.array(x.astype(np.float32)) for n, x in delta_problem(rng).items()}
    out, final = na.gated_delta_rule(**p)
    state = p.pop("initial").copy().evaluate()
    step = na.compile(lambda q, k, v, g, beta: na.gated_delta_rule_step(q, k, v, g, beta, state))
    for t in range(9):
        one = step(*(np.ascontiguousarray(x.numpy()[:, t : t + 1]) for x in p.values()))
        np.testing.assert_allclose(one.numpy()[:, 0], out.numpy()[:, t], rtol=0, atol=CLOSE * 10)
    np.testing.assert_allclose(state.numpy(), final.numpy(), rtol=0, atol=CLOSE * 10)

    x, weight, bias = (na.array(normal(rng, *s).astype(np.float32)) for s in ((2, 7, 5), (5, 4), (5,)))
    window = na.array(normal(rng, 2, 3, 5).astype(np.float32)).evaluate()
    out, final = (a.numpy() for a in na.short_convolution(x, weight, bias, window))
    parts = [na.short_convolution_step(x[:, a:b], weight, bias, window) for a, b in ((0, 1), (1, 5), (5, 7))]
    np.testing.assert_allclose(na.concatenate(parts, 1).numpy(), out, rtol=0, atol=CLOSE)
    np.testing.assert_array_equal(window.numpy(), final)
    with pytest.raises(na.GradientError, match="in place"):
        na.grad(lambda x: na.short_convolution_step(x, weight, bias, window).sum())(x)


def test_packed_sequences(rng):
    """Sequences one after the other are each for themselves, results and gradients."""
    lengths, starts = [3, 8], na.array(np.array([0, 3, 11], np.int32))
    p = {n: na.array(x.astype(np.float32)) for n, x in delta_problem(rng, 1, 11).items() if n != "initial"}
    seed = na.array(normal(rng, 1, 11, 2, 4).astype(np.float32))

    def loss(p, seed, starts=None):
        return (na.gated_delta_rule(**p, starts=starts)[0] * seed).sum()

    found = na.grad(loss)(p, seed, starts)
    begin = 0
    for n in lengths:
        part = slice(begin, begin + n)
        alone = na.grad(loss)({name: x[:, part].copy() for name, x in p.items()}, seed[:, part].copy())
        for name, gradient in alone.items():
            np.testing.assert_allclose(found[name].numpy()[:, part], gradient.numpy(), rtol=0, atol=CLOSE * 10)
        begin += n


def test_errors(rng):
    x, w, a, b = (na.array(normal(rng, *s).astype(np.float32)) for s in ((6, 8), (5, 8), (2, 8), (5, 2)))
    with pytest.raises(ValueError, match=r"expected \[N, K\], \[M, K\], \[r, K\] and \[M, r\]"):
        na.lora_linear(x, w, a, b.T, 1.0)
    with pytest.raises(ValueError, match="scores are 'tanh'"):
        na.route(x, 2, "tanh")
    with pytest.raises(ValueError, match="9 of 8 experts"):
        na.route(x, 9)
    order = na.dispatch(na.array(np.zeros((6, 2), np.int32)), 3)
    with pytest.raises(ValueError, match=r"weights have shape \(5, 8\), expected \[3, M, K\]"):
        na.expert_linear(x, w, order, gather=True)
    with pytest.raises(ValueError, match=r"x has shape \(6, 8\), expected \(12, 8\)"):
        na.expert_linear(x, na.zeros((3, 4, 8)), order)
    with pytest.raises(ValueError, match=r"combine: y has shape \(6, 8\)"):
        na.combine(x, None, order)
    with pytest.raises(ValueError, match="there are 3 experts"):
        na.mixture_of_experts(x, x, na.zeros((3, 4, 8)), na.zeros((3, 4, 8)), na.zeros((3, 8, 4)), 2)
    with pytest.raises(ValueError, match="dispatch: chosen has shape"):
        na.dispatch(na.array(np.zeros(6, np.int32)), 3)
    p = {n: na.array(v.astype(np.float32)) for n, v in delta_problem(rng).items()}
    with pytest.raises(ValueError, match="gated_delta_rule: found q"):
        na.gated_delta_rule(**{**p, "k": p["k"][:, :4]})
    state = na.zeros((2, 2, 4, 5)).copy().swapaxes(2, 3)
    with pytest.raises(ValueError, match=r"gated_delta_rule_step: the state has shape .* contiguous"):
        na.gated_delta_rule_step(*(p[n] for n in ("q", "k", "v", "g", "beta")), state)
    with pytest.raises(ValueError, match="found 65 tokens, expected 64 at most"):
        na.short_convolution_step(na.zeros((1, 65, 3)), na.zeros((3, 2)), None, na.zeros((1, 1, 3)).copy())
    with pytest.raises(ValueError, match=r"gated_norm: gate has shape \(5, 8\)"):
        na.gated_norm(x, w, na.ones((8,)))
    with pytest.raises(na.GradientError, match="a second derivative needs float64"):
        na.grad(lambda x: na.grad(lambda x: na.gated_norm(x, x, na.ones((8,))).sum())(x).sum())(x)

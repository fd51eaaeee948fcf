"""Mixture of experts: routing, the order of pairs, grouped products with weights of every format, combination, and
all their gradients, against float64; a whole layer against PyTorch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from kernel_runner import ENGINES, padded, poisoned, run
from stored_weights import weights_of

import nitinol as na
from nitinol.formats.blocks import FORMATS
from nitinol.ops import experts, routing
from nitinol.ops.quantized import stored_array


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def close(found, expected, tolerance=5e-6):
    """fp32 sums of a few hundred products, each rounded to 6e-8 of the partial sum: their errors add up like the root
    of their number, and so does the sum itself, so that the largest result is the measure."""
    expected = np.asarray(expected, np.float64)
    scale = np.abs(expected).max(initial=1e-30)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=0, atol=tolerance * scale)


def choice(rng, tokens, count, chosen):
    """Different experts for each token, int32 [tokens, chosen]; some experts are asked for much more than others."""
    favour = np.argsort(rng.gumbel(size=(tokens, count)) + 3 * rng.random(count), axis=1)
    return np.ascontiguousarray(favour[:, :chosen]).astype(np.int32)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("tokens", "count", "chosen"), [(1, 8, 2), (19, 60, 6), (5, 256, 8), (3, 1, 1), (9, 5, 5)])
def test_routing(rng, device_name, tokens, count, chosen, scores, normalise):
    logits = normal(rng, tokens, count) * 2
    found = routing.route_forward(device_name, na.array(logits), chosen, scores, normalise)
    weights, places = routing.route_reference(logits, chosen, scores, normalise)
    np.testing.assert_array_equal(found.experts.numpy(), places)
    np.testing.assert_allclose(found.weights.numpy(), weights, rtol=5e-6)  # exp and a sum in fp32
    d_weights = normal(rng, tokens, chosen)
    gradient = routing.route_backward(device_name, na.array(d_weights), na.array(logits), found, scores, normalise)
    # Differences of products with scores: good to a few roundings of the largest term, about 1.
    expected = routing.route_gradient_reference(d_weights, logits, places, scores, normalise)
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=0, atol=2e-6 * (1 + np.abs(d_weights).max()))


def test_equal_scores_and_nothing_to_divide_by(rng, device_name):
    """The first of equals, and 0 instead of 0 / 0 where all sigmoids are 0; of NaN experts that exist."""
    logits = np.zeros((3, 5), np.float32)
    logits[1] = -1e4
    logits[2] = np.nan
    found = routing.route_forward(device_name, na.array(logits), 2, "sigmoid")
    np.testing.assert_array_equal(found.experts.numpy()[:2], [[0, 1], [0, 1]])
    np.testing.assert_array_equal(found.weights.numpy()[:2], [[0.5, 0.5], [0, 0]])
    assert ((found.experts.numpy()[2] >= 0) & (found.experts.numpy()[2] < 5)).all()
    gradient = routing.route_backward(device_name, na.array(normal(rng, 3, 2)), na.array(logits), found, "sigmoid")
    assert np.isfinite(gradient.numpy()[:2]).all()


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalise", [False, True])
def test_routing_reference_is_the_derivative(rng, scores, normalise):
    """Central differences in float64 where no step changes the choice: an error of the step squared."""
    logits, d_weights, step = rng.normal(size=(4, 6)), rng.normal(size=(4, 3)), 1e-6
    _, places = routing.route_reference(logits, 3, scores, normalise)
    expected = routing.route_gradient_reference(d_weights, logits, places, scores, normalise)
    for at in np.ndindex(logits.shape):
        ends = []
        for sign in (1, -1):
            moved = logits.copy()
            moved[at] += sign * step
            values = routing.scores_reference(moved, scores)
            ends.append(np.sum(d_weights * routing.weights_reference(values, places, normalise)))
        np.testing.assert_allclose((ends[0] - ends[1]) / (2 * step), expected[at], rtol=1e-5, atol=1e-8)


def check_table(dispatch, offsets, count):
    """Every row of every expert is in one tile, of no more than `block` rows."""
    table, block = dispatch.table.numpy(), dispatch.block
    found = [[] for _ in range(count)]
    for expert, first, stop in table.T:
        assert -1 <= expert < count
        if expert >= 0:
            assert stop == offsets[expert + 1] and first < stop
            found[expert].extend(range(first, min(first + block, stop)))
    assert found == [list(range(a, b)) for a, b in itertools.pairwise(offsets)]


@pytest.mark.parametrize(("tokens", "count", "chosen"),
                         [(1, 8, 2), (3, 256, 8), (70, 7, 3), (700, 40, 2), (1, 1, 1), (1300, 3, 1)])  # fmt: skip
def test_dispatch(rng, device_name, tokens, count, chosen):
    """One chunk of pairs and several, experts without a token."""
    given = choice(rng, tokens, count, chosen)
    found = routing.dispatch_forward(device_name, na.array(given), count)
    expected = routing.dispatch_reference(given, count)
    for name, array, wanted in zip(("offsets", "source", "place"), found, expected):
        np.testing.assert_array_equal(array.numpy(), wanted, err_msg=name)
    check_table(found, expected[0], count)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_sort_stays_in_its_memory(rng, engine):
    tokens, count, chosen, block = 9, 6, 3, 2
    given = choice(rng, tokens, count, chosen)
    pairs, chunks = given.size, 4
    tiles = (pairs + (block - 1) * count) // block
    constants = {"CHUNK": 8, "EXPERTS": 8, "STEP": 4, "pairs": pairs, "experts": count, "chosen": padded(given)}
    counts = poisoned((chunks + 1, count), np.int32)
    run(engine, routing.count_kernel, (chunks,), counts=counts, **constants)
    expected = [np.bincount(part, minlength=count) for part in np.split(given.reshape(-1), [8, 16, 24])]
    np.testing.assert_array_equal(counts[:chunks], expected)
    outputs = {"offsets": poisoned(count + 2, np.int32), "source": poisoned(pairs + 1, np.int32),
               "place": poisoned(pairs + 1, np.int32), "table": poisoned(3 * tiles + 1, np.int32)}  # fmt: skip
    run(engine, routing.place_kernel, (chunks,), counts=padded(counts[:chunks]), chunks=chunks, tiles=tiles,
        block=block, **outputs, **constants)  # fmt: skip
    for (name, array), wanted in zip(outputs.items(), routing.dispatch_reference(given, count)):
        np.testing.assert_array_equal(array[:-1], wanted, err_msg=name)
    for array in (*outputs.values(), counts[chunks:]):
        np.testing.assert_array_equal(array.reshape(-1)[-1:], poisoned(1, np.int32))


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize(("tokens", "count", "chosen"), [(1, 6, 2), (5, 4, 3), (70, 5, 2)])
def test_products(rng, device_name, tokens, count, chosen, gather):
    rows, columns = int(rng.integers(1, 80)), int(rng.integers(1, 150))
    given = choice(rng, tokens, count, chosen)
    dispatch = routing.dispatch_forward(device_name, na.array(given), count)
    _, source, _ = routing.dispatch_reference(given, count)
    x = normal(rng, tokens if gather else source.size, columns)
    weights, dy = normal(rng, count, rows, columns), normal(rng, source.size, rows)
    found = experts.expert_linear_forward(device_name, na.array(x), na.array(weights), dispatch, gather)
    close(found.numpy(), experts.expert_linear_reference(x, weights, given, source, gather))
    gradients = experts.expert_linear_backward(
        device_name, na.array(dy), na.array(x), na.array(weights), dispatch, gather
    )
    expected = experts.expert_linear_gradients_reference(dy, x, weights, given, source, gather)
    for gradient, wanted in zip(gradients, expected):
        close(gradient.numpy(), wanted)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("format", [name for name in FORMATS if name != "F32"])
def test_weights_of_every_format(rng, device_name, format):
    rows, columns, count = 11, 256, 3
    weights, values = weights_of(normal(rng, count, rows, columns), format)
    for tokens in (2, 40):
        given = choice(rng, tokens, count, 2)
        dispatch = routing.dispatch_forward(device_name, na.array(given), count)
        _, source, _ = routing.dispatch_reference(given, count)
        x, dy = normal(rng, tokens, columns), normal(rng, source.size, rows)
        found = experts.expert_linear_forward(device_name, na.array(x), weights, dispatch, True)
        close(found.numpy(), experts.expert_linear_reference(x, values, given, source, True))
        dx, _ = experts.expert_linear_backward(device_name, na.array(dy), na.array(x), weights, dispatch, True, False)
        close(dx.numpy(), experts.expert_linear_gradients_reference(dy, x, values, given, source, True)[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types(rng, device_name, dtype):
    tokens, count, rows, columns = 30, 4, 20, 50
    given = choice(rng, tokens, count, 2)
    dispatch = routing.dispatch_forward(device_name, na.array(given), count)
    _, source, place = routing.dispatch_reference(given, count)
    x, weights, dy = (
        na.array(normal(rng, *s)).astype(dtype) for s in ((tokens, columns), (count, rows, columns), (2 * tokens, rows))
    )
    rounding = 1.01 * (2.0**-11 if dtype == "float16" else 2.0**-8)  # results are rounded once, sums nearly exact
    found = experts.expert_linear_forward(device_name, x, weights, dispatch, True)
    assert found.dtype == x.dtype
    wide = [a.numpy() for a in (x, weights, dy)]
    close(found.numpy(), experts.expert_linear_reference(*wide[:2], given, source, True), rounding)
    dx, d_weights = experts.expert_linear_backward(device_name, dy, x, weights, dispatch, True)
    expected = experts.expert_linear_gradients_reference(wide[2], *wide[:2], given, source, True)
    close(dx.numpy(), expected[0], rounding)
    close(d_weights.numpy(), expected[1], rounding)
    mixing = normal(rng, tokens, 2)
    out = experts.combine_forward(device_name, found, na.array(mixing), dispatch)
    close(out.numpy(), experts.combine_reference(found.numpy(), mixing, place), rounding)


@pytest.mark.parametrize("columns", [1, 70, 1500])
def test_combination(rng, device_name, columns):
    tokens, count, chosen = 6, 9, 4
    given = choice(rng, tokens, count, chosen)
    dispatch = routing.dispatch_forward(device_name, na.array(given), count)
    _, _, place = routing.dispatch_reference(given, count)
    y, weights, d_out = normal(rng, tokens * chosen, columns), normal(rng, tokens, chosen), normal(rng, tokens, columns)
    out = experts.combine_forward(device_name, na.array(y), na.array(weights), dispatch)
    close(out.numpy(), experts.combine_reference(y, weights, place))
    found = experts.combine_backward(device_name, na.array(d_out), na.array(y), na.array(weights), dispatch)
    for gradient, wanted in zip(found, experts.combine_gradients_reference(d_out, y, weights, place)):
        close(gradient.numpy(), wanted)


def test_a_layer_against_pytorch(rng, device_name):
    """Router, two products with a ReLU between them and the combination: the result and every gradient."""
    torch = pytest.importorskip("torch")
    tokens, count, chosen, width, inner = 20, 6, 2, 24, 40
    shapes = ((tokens, width), (count, width), (count, inner, width), (count, width, inner))
    leaves = [torch.tensor(normal(rng, *s) * 0.5, requires_grad=True) for s in shapes]
    x, gate, first, second = leaves
    d_out = normal(rng, tokens, width)
    weights, places = torch.topk(torch.softmax(x @ gate.T, -1), chosen)
    weights = weights / weights.sum(-1, keepdim=True)
    hidden = torch.relu(torch.einsum("tk,tjmk->tjm", x, first[places]))
    out = torch.einsum("tj,tjm->tm", weights, torch.einsum("tjk,tjmk->tjm", hidden, second[places]))
    out.backward(torch.tensor(d_out))

    ax, _, afirst, asecond = (na.array(leaf.detach().numpy()) for leaf in leaves)
    logits = na.array(x.detach().numpy() @ gate.detach().numpy().T)
    routed = routing.route_forward(device_name, logits, chosen)
    dispatch = routing.dispatch_forward(device_name, routed.experts, count)
    before = experts.expert_linear_forward(device_name, ax, afirst, dispatch, True)
    kept = (before > 0.0).astype("float32")
    after = experts.expert_linear_forward(device_name, before * kept, asecond, dispatch, False)
    found = experts.combine_forward(device_name, after, routed.weights, dispatch)
    close(found.numpy(), out.detach().numpy())

    d_after, d_weights = experts.combine_backward(device_name, na.array(d_out), after, routed.weights, dispatch)
    d_hidden, d_second = experts.expert_linear_backward(
        device_name, d_after, before * kept, asecond, dispatch, False
    )
    dx, d_first = experts.expert_linear_backward(device_name, d_hidden * kept, ax, afirst, dispatch, True)
    d_logits = routing.route_backward(device_name, d_weights, logits, routed).numpy()
    close(d_second.numpy(), second.grad.numpy())
    close(d_first.numpy(), first.grad.numpy())
    close(dx.numpy() + d_logits @ gate.detach().numpy(), x.grad.numpy(), 2e-5)  # two parts that may cancel
    close(d_logits.T @ x.detach().numpy(), gate.grad.numpy(), 2e-5)


def test_no_host_between_the_steps(rng, device_name):
    """Routing, order, products and combination are one command list, which serves other choices unchanged."""
    tokens, count, chosen, width = 12, 5, 2, 16
    weights = normal(rng, count, width, width)
    array = na.array(weights).evaluate()

    @na.compile
    def layer(x, logits):
        routed = routing.route_forward(device_name, logits, chosen)
        dispatch = routing.dispatch_forward(device_name, routed.experts, count)
        y = experts.expert_linear_forward(device_name, x, array, dispatch, True)
        return experts.combine_forward(device_name, y, routed.weights, dispatch)

    for _ in range(3):
        x, logits = normal(rng, tokens, width), normal(rng, tokens, count) * 3
        mixing, places = routing.route_reference(logits, chosen)
        _, source, place = routing.dispatch_reference(places, count)
        y = experts.expert_linear_reference(x, weights, places, source, True)
        close(layer(x, logits).numpy(), experts.combine_reference(y, mixing, place))
    assert len(layer.records) == 4


def test_refusals(rng):
    logits = na.array(normal(rng, 4, 6))
    with pytest.raises(ValueError, match=r"route: 7 of 6 experts for a token, expected 1 to 6"):
        routing.route_forward("cpu", logits, 7)
    with pytest.raises(ValueError, match="scores are 'max'"):
        routing.route_forward("cpu", logits, 2, "max")
    with pytest.raises(ValueError, match="E from 1 to 256"):
        routing.route_forward("cpu", na.empty((2, 300)), 2)
    routed = routing.route_forward("cpu", logits, 2)
    dispatch = routing.dispatch_forward("cpu", routed.experts, 6)
    x, weights = na.array(normal(rng, 4, 8)), na.array(normal(rng, 6, 3, 8))
    with pytest.raises(ValueError, match=r"x has shape \(4, 8\), expected \(8, 8\)"):
        experts.expert_linear_forward("cpu", x, weights, dispatch, False)
    with pytest.raises(ValueError, match=r"weights have shape \(3, 8\)"):
        experts.expert_linear_forward("cpu", x, weights[0], dispatch, True)
    with pytest.raises(ValueError, match="dy has shape"):
        experts.expert_linear_backward("cpu", x, x, weights, dispatch, True)
    with pytest.raises(ValueError, match="combine: y has shape"):
        experts.combine_forward("cpu", x, routed.weights, dispatch)
    blocks = stored_array(na.empty((6 * 3 * 34,), "uint8").buffer, "Q8_0", (6, 3, 32))
    with pytest.raises(ValueError, match="blocks of Q8_0 have no gradient"):
        experts.expert_linear_backward("cpu", na.empty((8, 3)), na.empty((4, 32)), blocks, dispatch, True)

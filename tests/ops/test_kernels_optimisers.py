"""The optimiser AdamW over a tree of parameters: what is its own, beyond the kernel (test_kernels_adamw.py)."""

from __future__ import annotations

import numpy as np
import pytest

import nitinol as na
from nitinol.nn.optimisers import AdamW
from nitinol.ops.adamw import adamw_reference

SHAPES = {"a": (7, 37), "b": (300,), "c": (1,)}


def tree(rng, dtype="float32"):
    return {name: na.array(rng.normal(size=s).astype(np.float32)).astype(dtype) for name, s in SHAPES.items()}


def values(arrays):
    return {name: a.astype("float32").numpy().astype(np.float64) for name, a in arrays.items()}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("eight_bit", [False, True])
def test_steps(rng, compiled, eight_bit):
    """Five steps with another rate each, a decay for each parameter, and a clipped norm, against float64."""
    given, decay = tree(rng), {"a": 0.1, "b": 0.0, "c": 0.3}
    optimiser = AdamW(given, 0.5, (0.8, 0.95), 1e-6, decay, eight_bit, clip_norm=2.0)
    step = na.compile(optimiser.update) if compiled else optimiser.update
    expected = values(given)
    moments = {name: [np.zeros(s), np.zeros(s)] for name, s in SHAPES.items()}
    for t in range(1, 6):
        optimiser.learning_rate = rate = 0.1 / t
        gradients = {name: rng.normal(size=s).astype(np.float32) for name, s in SHAPES.items()}
        norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in gradients.values()))
        # float32 sums of 600 squares
        np.testing.assert_allclose(step({n: na.array(g) for n, g in gradients.items()}).numpy(), [norm], rtol=1e-5)
        for name, gradient in gradients.items():
            clipped = gradient.astype(np.float64) * min(1, 2 / norm)
            expected[name], *moments[name] = adamw_reference(
                expected[name], clipped, *moments[name], t, np.float32(rate), decay[name], (0.8, 0.95), 1e-6
            )
    assert optimiser.steps == 5
    assert optimiser.learning_rate == pytest.approx(0.02)
    for name, found in values(optimiser.parameters).items():
        # Bytes keep a moment to about 1 in 16 where it is large in its block; changes are about 0.1 in all
        np.testing.assert_allclose(found, expected[name], rtol=1e-5, atol=0.15 if eight_bit else 1e-5)
        assert (found != values(given)[name]).all()


def test_types(rng):
    """Halves beside float32: each type has a buffer of its own; small steps are kept in the float32 copies."""
    given = {"half": tree(rng, "float16"), "full": [tree(rng)["a"]]}
    optimiser = AdamW(given, 1e-5, weight_decay=0.0)
    before = values(optimiser.parameters["half"])
    for _ in range(300):
        optimiser.update({"half": {n: na.ones(s, "float16") for n, s in SHAPES.items()}, "full": [na.ones((7, 37))]})
    for name, after in values(optimiser.parameters["half"]).items():
        # 300 steps of 1e-5, each far below half a unit of float16; then one rounding
        np.testing.assert_allclose(after, before[name] - 3e-3, rtol=2.0**-11, atol=1e-5)
    np.testing.assert_allclose(optimiser.parameters["full"][0].numpy(), given["full"][0].numpy() - 3e-3, atol=1e-5)


def test_gradients_of_views(rng):
    """The gradient by a view of a larger buffer is that of the view alone, also through views of it."""
    given = tree(rng)
    parameters = AdamW(given).parameters

    def loss(p):
        return (p["a"][1:5, ::2] ** 2).sum() + (p["a"].T[3] * p["b"][:7]).sum() + (p["b"].reshape(20, 15) ** 3).sum()

    found, expected = na.grad(loss)(parameters), na.grad(loss)(given)
    for name in SHAPES:
        assert found[name].value.shape == SHAPES[name]
        np.testing.assert_array_equal(found[name].numpy(), expected[name].numpy())


def test_errors(rng):
    optimiser = AdamW(tree(rng))
    with pytest.raises(ValueError, match="another structure"):
        optimiser.update([na.ones((3,))])
    with pytest.raises(ValueError, match=r"a gradient has shape \(3,\), but its parameter \(7, 37\)"):
        optimiser.update({"a": na.ones((3,)), "b": na.ones((300,)), "c": na.ones((1,))})
    with pytest.raises(ValueError, match="betas are"):
        AdamW(tree(rng), betas=(0.9, 1.0))
    with pytest.raises(TypeError, match="int32, expected float32, float16 or bfloat16"):
        AdamW([na.array(np.arange(4, dtype=np.int32))])
    with pytest.raises(ValueError, match="no parameters"):
        AdamW({})
    with pytest.raises(ValueError, match="weight_decay is neither"):
        AdamW(tree(rng), weight_decay=[0.1])

"""What differentiates, done with Nitinol and with PyTorch, and the comparisons of their gradients.

A case is a function of both libraries' arrays, and its operands: shapes, and where the values lie (away from kinks).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

import nitinol as na

RANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "any": lambda a: a,
    "positive": lambda a: np.abs(a) + 0.5,
    "off zero": lambda a: a + 0.3 * np.sign(a),  # also off the kink of abs and relu
    # All values differ by 0.1 or more, so that a step changes no order: of 1, 1.1, 1.2 ... in a random order.
    "apart": lambda a: (1 + 0.1 * np.argsort(np.argsort(a, axis=None)).reshape(a.shape)) * 0.5,
    "small": lambda a: a * 0.5,
}
# Of the largest gradient. PyTorch computes in float64, from the same rounded operands. Chains round in their own type:
# an operand's rounding comes back through every derivative, and cancels where terms are subtracted.
TOLERANCE = {"float32": 3e-5, "float16": 2e-2, "bfloat16": 1.2e-1}


class Case(NamedTuple):
    """ours(*Arrays) and theirs(*tensors): an array each. shapes: of the operands; values: where they lie, one for
    each or one for all. halves: whether it is compared in half types too."""

    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    shapes: Sequence[tuple[int, ...]]
    values: str | Sequence[str] = "any"
    halves: bool = True


def operands(case: Case, rng: np.random.Generator) -> list[np.ndarray]:
    """Fresh operands at float64."""
    kinds = [case.values] * len(case.shapes) if isinstance(case.values, str) else case.values
    return [RANGES[kind](np.asarray(rng.standard_normal(shape))) for kind, shape in zip(kinds, case.shapes)]


def compare_with_differences(case: Case, rng: np.random.Generator) -> None:
    """The slope in random directions by central differences at float64.

    With a step of 1e-5 and third derivatives up to 1e3 the differences are off by 1e-8, rounding (1e-16 / 1e-5) by
    1e-11 of the sum of what is added up.
    """
    given = operands(case, rng)
    weight: list[np.ndarray] = []

    def weighted(*arrays: Any) -> Any:
        result = case.ours(*arrays)
        if not weight:
            weight.append(np.asarray(rng.standard_normal(result.shape)))
        return (result * na.array(weight[0])).sum()

    def value(values: list[np.ndarray]) -> float:
        return weighted(*[na.array(v) for v in values]).item()

    found = na.grad(weighted, argnums=tuple(range(len(given))))(*[na.array(v) for v in given])
    for gradient, operand in zip(found, given):
        assert gradient.shape == operand.shape and gradient.dtype.name == "fp64"
    for _ in range(3):
        direction = [np.asarray(rng.standard_normal(v.shape)) for v in given]
        step = 1e-5
        above = value([v + step * d for v, d in zip(given, direction)])
        below = value([v - step * d for v, d in zip(given, direction)])
        slope = sum((g.numpy() * d).sum() for g, d in zip(found, direction))
        size = sum((np.abs(g.numpy()) * np.abs(d)).sum() for g, d in zip(found, direction))
        np.testing.assert_allclose(slope, (above - below) / (2 * step), rtol=1e-6, atol=1e-6 * max(size, 1e-2))


def compare_with_torch(case: Case, rng: np.random.Generator, dtype: str) -> None:
    """All gradients, of a random weighted sum of the result, against PyTorch's at float64."""
    given = [na.array(v, dtype) for v in operands(case, rng)]
    tensors = [torch.tensor(a.numpy().astype(np.float64), requires_grad=True) for a in given]
    expected = case.theirs(*tensors)
    result, pull = na.vjp(case.ours, *given)
    assert result.shape == tuple(expected.shape)
    assert result.dtype.name in {given[0].dtype.name, "fp32"}  # quotients and powers of halves are float32
    seed = na.array(np.asarray(rng.standard_normal(result.shape)), result.dtype)
    expected.backward(torch.tensor(seed.numpy().astype(np.float64)))
    for found, array, tensor in zip(pull(seed), given, tensors):
        assert found.shape == array.shape and found.dtype == array.dtype
        values = tensor.grad.numpy() if tensor.grad is not None else np.zeros(array.shape)
        error = TOLERANCE[dtype] * max(np.abs(values).max(initial=0), 1e-2)
        np.testing.assert_allclose(found.numpy().astype(np.float64), values, rtol=0, atol=error)

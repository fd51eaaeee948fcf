"""Operands of operations under test: Arrays of a type, and the float64 values that they really hold."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np

import nitinol as na
from nitinol.graph.dtypes import as_dtype
from nitinol.runtime.launch import interpret

DTYPES = ("float32", "float16", "bfloat16")
# Half a unit in the last place: what one rounding of a result costs, relative to it.
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def operand(values: Any, dtype: str = "float32") -> tuple[na.Array, np.ndarray]:
    """An evaluated Array and its elements in float64."""
    array = na.array(np.asarray(values, np.float32)).astype(dtype).evaluate()
    return array, array.numpy().astype(np.float64)


def engine_of(engine: str) -> Any:
    """A context in which arrays are computed natively or by the interpreter."""
    return interpret() if engine == "interpreter" else nullcontext()


def assert_close(
    found: na.Array, expected: np.ndarray, error: float, dtype: str = "float32", told: str = "", of: Any = None
) -> None:
    """Type, shape and values: `error` relative to `of` (the largest value expected), and one rounding to dtype."""
    assert found.dtype.name == as_dtype(dtype).name, told
    assert found.shape == expected.shape, told
    values = found.numpy().astype(np.float64)
    of = np.abs(expected[np.isfinite(expected)]).max(initial=0.0) if of is None else of
    allowed = error * of + 1.01 * ROUNDING[dtype] * np.abs(expected) + (2.0**-25 if dtype == "float16" else 0.0)
    wrong = ~(np.abs(values - expected) <= allowed) & (values != expected)  # the second: infinities
    assert not wrong.any(), (
        f"{told}: {wrong.sum()} of {wrong.size} values are wrong, first at {np.argwhere(wrong)[0]}: found "
        f"{values[wrong][0]}, expected {expected[wrong][0]} +- {np.broadcast_to(allowed, wrong.shape)[wrong][0]:.2g}"
    )


def numerical_gradient(function: Any, x: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """Central differences of a scalar function of x (float64), one value at a time."""
    gradient = np.zeros_like(x)
    for place in np.ndindex(*x.shape):
        kept = x[place]
        x[place] = kept + step
        above = function(x)
        x[place] = kept - step
        gradient[place] = (above - function(x)) / (2 * step)
        x[place] = kept
    return gradient

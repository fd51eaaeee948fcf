"""The names under which Triton kernels reach the GPU vendors' mathematics, `libdevice.tanh` and its kin."""

# ruff: noqa: F401
from __future__ import annotations

from typing import Any

from nitinol.language.core import tensor
from nitinol.language.math import (
    abs,
    ceil,
    cos,
    div_rn,
    erf,
    exp,
    exp2,
    floor,
    fma,
    log,
    log2,
    rsqrt,
    sin,
    sqrt,
    sqrt_rn,
    tanh,
)
from nitinol.language.math import abs as fabs
from nitinol.language.math import exp as fast_expf
from nitinol.language.math import log as fast_logf
from nitinol.language.operations import where
from nitinol.language.semantic import compare, to_tensor


def isnan(x: Any) -> tensor:
    """Whether each value is NaN."""
    return compare("ne", to_tensor(x), x)


def isinf(x: Any) -> tensor:
    """Whether each value is an infinity."""
    return compare("eq", abs(x), float("inf"))


def trunc(x: Any) -> tensor:
    """The value without its fraction."""
    x = to_tensor(x)
    return where(x < 0, ceil(x), floor(x))

"""breakpoint() in a kernel: the interpreter stops there with the kernel's variables, compiled code goes on."""

from __future__ import annotations

import sys

import numpy as np

import nitinol.language as tl
from nitinol.runtime.kernel import jit
from nitinol.runtime.launch import interpret


@jit
def doubled(x, y, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + offsets) * 2
    if tl.program_id(0) == 1:
        breakpoint()
    tl.store(y + offsets, value)


def test_the_interpreter_stops_with_the_variables_in_reach(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "breakpointhook", lambda: seen.append(dict(sys._getframe(1).f_globals)))
    x, y = np.random.default_rng().standard_normal(24).astype(np.float32), np.full(24, np.nan, np.float32)
    with interpret():
        doubled[(3,)](x, y, BLOCK=8)
    (variables,) = seen
    np.testing.assert_array_equal(variables["value"], 2 * x[8:16])
    np.testing.assert_array_equal(variables["offsets"], np.arange(8, 16))
    assert variables["program"] == (1, 0, 0)
    np.testing.assert_array_equal(y, 2 * x)


def test_compiled_kernels_go_on(monkeypatch):
    monkeypatch.setattr(sys, "breakpointhook", lambda: 1 / 0)
    x, y = np.random.default_rng().standard_normal(24).astype(np.float32), np.full(24, np.nan, np.float32)
    doubled[(3,)](x, y, BLOCK=8)
    np.testing.assert_array_equal(y, 2 * x)

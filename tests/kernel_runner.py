"""Runs a kernel of the library on NumPy arrays, natively or in the interpreter, below arrays and devices."""

from __future__ import annotations

from typing import Any

import native
import numpy as np

from nitinol.compiler import interpreter
from nitinol.compiler.frontend import build_ir
from nitinol.language.jit import specialise

ENGINES = ("native", "interpreter")


def run(engine: str, kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Every program instance of the kernel; results are written to the arrays among the arguments."""
    bound = kernel.bind((), arguments)
    signature, _ = specialise(kernel, bound)
    function = build_ir(kernel, signature)
    values = [bound[name] for name, _, _ in signature.parameters]
    extents = (*grid, 1, 1)[:3]
    if engine == "native":
        native.run(function, extents, values)
    else:
        interpreter.run(function, extents, values)


def poisoned(shape: Any, dtype: Any = np.float32) -> np.ndarray:
    """An output that shows what a kernel did not write: NaN, or 0x5A bytes for integers."""
    out = np.full(shape, 0x5A, dtype)
    if out.dtype.kind == "f":
        out.fill(np.nan)
    return out

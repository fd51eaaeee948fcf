"""Runs a kernel of the library on NumPy arrays, natively or in the interpreter, below arrays and devices."""

from __future__ import annotations

from typing import Any

import native
import numpy as np

from nitinol.compiler import interpreter
from nitinol.compiler.byte_casts import sink_byte_casts
from nitinol.compiler.driver import tile_ir
from nitinol.language.jit import specialise
from nitinol.language.types import bfloat16

ENGINES = ("native", "interpreter")


class BFloat16:
    """uint16 memory that kernels see as bfloat16."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.__nitinol_pointer__ = (array.ctypes.data, bfloat16)


def run(engine: str, kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Every program instance of the kernel; results are written to the arrays among the arguments."""
    bound = kernel.bind((), arguments)
    signature, _ = specialise(kernel, bound)
    function = tile_ir(kernel, signature)
    sink_byte_casts(function)
    values = [getattr(bound[name], "array", bound[name]) for name, _, _ in signature.parameters]
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


def padded(array: np.ndarray) -> np.ndarray:
    """The array at the front of a buffer that goes on with NaN or 0x5A: what is read beyond the end shows."""
    buffer = poisoned(array.size + 64, array.dtype)
    buffer[: array.size] = array.reshape(-1)
    return buffer

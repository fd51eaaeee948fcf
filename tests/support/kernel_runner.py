"""Runs a kernel of the library on NumPy arrays, natively or in the interpreter, and poisons what it may not touch."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np

from nitinol.language.types import bfloat16
from nitinol.runtime.kernel import jit
from nitinol.runtime.launch import interpret

ENGINES = ("native", "interpreter")


class BFloat16:
    """uint16 memory that kernels see as bfloat16."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.nbytes = array.nbytes
        self.__nitinol_pointer__ = (array.ctypes.data, bfloat16)


def run(engine: str, kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Every program instance of the kernel; results are written to the arrays among the arguments."""
    with interpret() if engine == "interpreter" else nullcontext():
        jit(kernel)[grid](**arguments)


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

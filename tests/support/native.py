"""Runs a tile IR function as native code on NumPy arguments, with no runtime in between."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import numpy as np

from nitinol.compiler import ir
from nitinol.compiler.cpu import assertions
from nitinol.compiler.driver import compile_function, prepare

SIGNATURE = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64
)


def run(function: ir.Function, grid: tuple[int, int, int], arguments: list[Any], aliases: tuple[int, ...] = ()) -> None:
    """Writes go to the arrays, as with the interpreter's `run`."""
    prepare(function)
    executable = compile_function(function, aliases)
    slots = np.zeros(len(arguments) + 1, np.uint64)
    for i, (parameter, argument) in enumerate(zip(function.parameters, arguments)):
        if isinstance(argument, np.ndarray):
            slots[i] = argument.ctypes.data
        else:
            slots[i] = slot(argument, parameter.element)
    status = np.zeros(1, np.int64)
    slots[-1] = status.ctypes.data
    scratch = np.zeros(executable.scratch_bytes + 64, np.uint8)
    scratch_address = (scratch.ctypes.data + 63) // 64 * 64
    extents = np.array(grid, np.int32)
    programs = int(np.prod(grid))
    kernel = SIGNATURE(executable.address)
    kernel(slots.ctypes.data, scratch_address, extents.ctypes.data, 0, programs)
    if status[0]:
        raise AssertionError(assertions[int(status[0])])


def slot(value: Any, element: Any) -> int:
    """A number as the 8 bytes of its argument slot."""
    if element.is_float:
        form = {"fp16": "<e", "fp32": "<f", "fp64": "<d"}[element.name]
        return int.from_bytes(struct.pack(form, float(value)).ljust(8, b"\0"), "little")
    return int(value) & 0xFFFFFFFFFFFFFFFF

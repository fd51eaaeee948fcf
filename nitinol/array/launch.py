"""Library kernels in the graph: `launch(kernel, grid, **arguments)` records one, to run when its results are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nitinol.array.array import Array
from nitinol.array.conversion import as_operand
from nitinol.array.dtypes import as_dtype
from nitinol.array.graph import Launch, Slot, View, record, whole
from nitinol.language.jit import JITFunction


@dataclass(frozen=True)
class Output:
    """A fresh, contiguous, uninitialised array that the kernel writes; `launch` returns it."""

    shape: Sequence[int]
    dtype: Any


@dataclass(frozen=True)
class InPlace:
    """State that the kernel reads and updates. Operations recorded later see the update, earlier ones do not."""

    array: Array


@dataclass(frozen=True)
class Strided:
    """An array that the kernel addresses by its strides; without this a kernel gets contiguous elements."""

    array: Array


def launch(
    kernel: JITFunction, grid: Sequence[int], /, _operations: int | None = None, _bytes: int | None = None,
    _warps: int = 0, _stages: int = 0, **arguments: Any,
) -> Any:  # fmt: skip
    """Records one launch of a tile kernel; returns its Output as an Array, several as a tuple in the order of the
    kernel's parameters, None without any.

    grid: one to three extents. arguments: by the kernel's parameter names; an Array (read; a contiguous copy of it if
    need be), Strided(array), Output(shape, dtype), InPlace(array), an object with `launch_argument()` giving one of
    these (a quantised array), or numbers, dtypes and other constants. Parameters left out take their defaults.
    _operations, _bytes: what `nitinol trace` should count for it (default bytes: those of the arrays). _warps, _stages:
    Triton's num_warps and num_stages, for GPUs (0: the compiler chooses).

    Raises TypeError for missing and unknown parameters.
    """
    from nitinol.array.elementwise import contiguous
    from nitinol.runtime.launch import grid_extents

    bound = kernel.bind((), arguments)
    inputs: list[View] = []
    updates: list[View] = []
    outputs: list[tuple[tuple[int, ...], Any]] = []
    described: dict[str, Any] = {}
    for name, argument in bound.items():
        if hasattr(argument, "launch_argument"):
            argument = argument.launch_argument()
        if isinstance(argument, Output):
            described[name] = Slot("outputs", len(outputs))
            outputs.append((tuple(int(n) for n in argument.shape), as_dtype(argument.dtype)))
        elif isinstance(argument, InPlace):
            described[name] = Slot("updates", len(updates))
            updates.append(argument.array.view)
        elif isinstance(argument, Strided):
            described[name] = Slot("inputs", len(inputs))
            inputs.append(argument.array.view)
        elif isinstance(argument, Array) or hasattr(argument, "__array_interface__"):
            described[name] = Slot("inputs", len(inputs))
            operand = as_operand(argument)
            assert operand is not None
            inputs.append(contiguous(operand).view)
        else:
            described[name] = argument
    extents = grid_extents(kernel, grid, {})
    node = Launch(tuple(inputs), kernel, extents, described, _operations, _bytes, _warps, _stages)
    results = tuple(Array(whole(value)) for value in record(node, outputs, updates))
    return results[0] if len(results) == 1 else results or None

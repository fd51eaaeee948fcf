"""Library kernels in the graph: `launch(kernel, grid, **arguments)` records one, to run when its results are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from nitinol.graph.array import Array, whole_array
from nitinol.graph.conversion import as_operand
from nitinol.graph.dtypes import as_dtype
from nitinol.graph.nodes import record
from nitinol.graph.operation import Form, Launch, Slot, frozen, known_form, remember
from nitinol.graph.views import whole_layout
from nitinol.language.jit import JITFunction
from nitinol.runtime.launch import grid_extents


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
    need be), Strided(array), Output(shape, dtype), InPlace(array), or numbers, dtypes and other constants. Parameters
    left out take their defaults.
    _operations, _bytes: what `nitinol trace` should count for it (default bytes: those of the arrays). _warps, _stages:
    Triton's num_warps and num_stages, for GPUs (0: the compiler chooses).

    Raises TypeError for missing and unknown parameters.
    """
    bound = kernel.bind((), arguments)
    operands: list[Array] = []
    updates: list[int] = []
    outputs: list[tuple[tuple[int, ...], Any]] = []
    described: list[tuple[str, Any]] = []
    for name, argument in bound.items():
        if isinstance(argument, Output):
            described.append((name, Slot("results", len(outputs))))
            outputs.append((tuple(int(n) for n in argument.shape), as_dtype(argument.dtype)))
        elif isinstance(argument, (InPlace, Strided, Array)) or hasattr(argument, "__array_interface__"):
            described.append((name, Slot("operands", len(operands))))
            if isinstance(argument, InPlace):
                updates.append(len(operands))
                operands.append(argument.array)
            elif isinstance(argument, Strided):
                operands.append(argument.array)
            else:
                operands.append(as_operand(argument).contiguous())
        else:
            described.append((name, argument))
    extents = grid_extents(kernel, grid, {})
    operation = Launch(kernel, extents, tuple(described), _operations, _bytes, _warps, _stages)
    layouts, results = tuple([a.layout for a in operands]), tuple([whole_layout(d, shape) for shape, d in outputs])
    key = (frozen(dict(described)), replace(operation, arguments=()), layouts, results)
    form = known_form(key) or remember(key, Form(operation, {}, layouts, results, updates))
    arrays = tuple([whole_array(value) for value in record(form, tuple([a.value for a in operands]))])
    return arrays[0] if len(arrays) == 1 else arrays or None

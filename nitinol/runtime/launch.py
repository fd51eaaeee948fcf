"""`kernel[grid](...)`: one kernel on NumPy arrays, torch tensors or our own arrays, finished when the call returns."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from nitinol.compiler.driver import compile_kernel, tile_ir
from nitinol.language.jit import JITFunction, specialise
from nitinol.language.types import PointerType
from nitinol.runtime.device import CommandList, slot

_interpreting = os.environ.get("NITINOL_INTERPRET", "") not in ("", "0")


@contextmanager
def interpret() -> Iterator[None]:
    """Kernels launched inside run in NumPy, one program instance after another, with bounds checks.

    The environment variable NITINOL_INTERPRET=1 does the same for a whole process.
    """
    global _interpreting
    before, _interpreting = _interpreting, True
    try:
        yield
    finally:
        _interpreting = before


def interpreting() -> bool:
    return _interpreting


def warmup(kernel: JITFunction, bound: Mapping[str, Any]) -> Any:
    """Compiles a kernel for these arguments; the executable."""
    return compile_kernel(kernel, specialise(kernel, bound)[0])


def launch(kernel: JITFunction, grid: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    """Compiles the kernel for these arguments, runs it over the grid, waits; returns the executable."""
    bound = kernel.bind(arguments, keywords)
    extents = grid_extents(kernel, grid, bound)
    signature, values = specialise(kernel, bound)
    if _interpreting:
        _interpret(kernel, signature, extents, bound, values)
        return None
    aliases = alias_classes([bound[name] for name, _, _ in signature.parameters], signature)
    executable = compile_kernel(kernel, signature, aliases)
    from nitinol.runtime import default_device

    device = default_device()
    commands = CommandList(device)
    slots = [encode(value, type) for value, (_, type, _) in zip(values, signature.parameters)]
    commands.launch(executable, extents, (*slots, device.status_address))
    device.run(commands)
    return executable


def grid_extents(kernel: JITFunction, grid: Any, bound: Mapping[str, Any]) -> tuple[int, int, int]:
    """A grid of one to three extents, or a function of the arguments by name, as three integers."""
    extents = grid(bound) if callable(grid) else grid
    extents = (extents,) if isinstance(extents, int) else tuple(int(x) for x in extents)
    if not 1 <= len(extents) <= 3 or min(extents) < 0:
        raise ValueError(f"{kernel.__name__}: the grid is {extents}, expected one to three extents of 0 or more")
    return (*extents, 1, 1)[:3]  # type: ignore[return-value]


def encode(value: Any, type: Any) -> int | bytes:
    """A run-time argument as its 8-byte slot."""
    if isinstance(type, PointerType) or not type.is_float:
        return int(value)
    return slot(value, "d" if type.bits == 64 else "f")


def alias_classes(arguments: Sequence[Any], signature: Any) -> tuple[int, ...]:
    """A number per run-time parameter; arrays whose memory overlaps share one."""
    ranges: list[tuple[int, int, int]] = []
    classes = []
    for number, argument in enumerate(arguments):
        extent = _extent(argument)
        mine = number
        if extent is not None:
            for start, end, other in ranges:
                if extent[0] < end and start < extent[1]:
                    mine = other
            ranges.append((*extent, mine))
        classes.append(mine)
    return tuple(classes)


def _extent(argument: Any) -> tuple[int, int] | None:
    """First and last + 1 byte address of an array's memory."""
    if hasattr(argument, "__array_interface__") and hasattr(argument, "ctypes"):
        from numpy.lib.array_utils import byte_bounds

        return byte_bounds(argument)
    if hasattr(argument, "untyped_storage"):
        storage = argument.untyped_storage()
        return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    buffer = getattr(argument, "buffer", None)
    return None if buffer is None else (buffer.address, buffer.address + buffer.nbytes)


def _interpret(
    kernel: JITFunction, signature: Any, grid: tuple[int, int, int], bound: Mapping[str, Any], values: list[Any]
) -> None:
    from nitinol.compiler import interpreter

    arguments = []
    for (name, type, _), value in zip(signature.parameters, values):
        extent = _extent(bound[name]) if isinstance(type, PointerType) else None
        arguments.append(value if extent is None else interpreter.Region(extent[0], extent[1] - extent[0], value))
    interpreter.run(tile_ir(kernel, signature), grid, arguments)

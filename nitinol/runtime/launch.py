"""`kernel[grid](...)`: one kernel on NumPy arrays, torch tensors or our own arrays, finished when the call returns."""

from __future__ import annotations

import ctypes
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from nitinol.compiler.driver import compile_kernel, tile_ir
from nitinol.language.jit import JITFunction, specialise
from nitinol.language.types import PointerType
from nitinol.runtime import get_device
from nitinol.runtime.device import Buffer, CommandList, DeviceError, slot

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


def warmup(kernel: JITFunction, bound: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """Compiles a kernel for these arguments and the current device; the executable."""
    return compile_kernel(kernel, specialise(kernel, bound, *schedule(kernel, options))[0], target=get_device().target)


def launch(kernel: JITFunction, grid: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    """Compiles the kernel for these arguments, runs it over the grid, waits; returns the executable.

    On a device other than the CPU, the memory of NumPy's and torch's arrays is copied there and back.
    """
    bound = kernel.bind(arguments, keywords)
    extents = grid_extents(kernel, grid, bound)
    signature, values = specialise(kernel, bound, *schedule(kernel, keywords))
    if _interpreting:
        _interpret(kernel, signature, extents, bound, values)
        return None
    given = [bound[name] for name, _, _ in signature.parameters]
    aliases = alias_classes(given, signature)
    device = device_of(given)
    executable = compile_kernel(kernel, signature, aliases, device.target)
    commands = CommandList(device)
    slots = [encode(value, type) for value, (_, type, _) in zip(values, signature.parameters)]
    if device.target == "cpu":
        commands.kept = given  # Ctrl-C ends the wait, not the kernel
        commands.launch(executable, extents, slots)
        device.run(commands)
        return executable
    pointers = [isinstance(type, PointerType) for _, type, _ in signature.parameters]
    copies = HostMemory(device, [argument for argument, pointer in zip(given, pointers) if pointer])
    commands.launch(executable, extents, [
        copies.buffer(argument, address) if pointer else slot
        for argument, address, slot, pointer in zip(given, values, slots, pointers)
    ])  # fmt: skip
    device.run(commands)
    copies.fetch()
    return executable


def schedule(kernel: JITFunction, keywords: Mapping[str, Any]) -> tuple[int, int]:
    """`num_warps` and `num_stages` of a launch, 0 where they are not given or are the kernel's own parameters."""
    return tuple(0 if name in kernel.arg_names else int(keywords.get(name) or 0)
                 for name in ("num_warps", "num_stages"))  # type: ignore[return-value]  # fmt: skip


def device_of(arguments: Sequence[Any]) -> Any:
    """The device of our own arrays among the arguments; without any the current one."""
    devices = {id(d): d for d in (getattr(getattr(a, "buffer", None), "device", None) for a in arguments) if d}
    if len(devices) > 1:
        names = " and ".join(device.name for device in devices.values())
        raise DeviceError(f"a kernel's arrays are on several devices ({names}); copy them to one device first")
    return next(iter(devices.values())) if devices else get_device()


class HostMemory:
    """The memory of host arrays on another device: each piece once, also if several arrays look at it."""

    def __init__(self, device: Any, arrays: Sequence[Any]) -> None:
        self.pieces: list[list[Any]] = []  # first byte, last + 1, whether the host may write it, buffer
        hosts = [array for array in arrays if getattr(array, "buffer", None) is None]
        for array in hosts:
            if _extent(array) is None:
                raise DeviceError(f"the size of {array!r:.40} is not known, so that it cannot be copied to device "
                                  f"{device.name!r}; give a NumPy array")  # fmt: skip
        for start, end, writable in sorted((*_extent(array), _writable(array)) for array in hosts):  # type: ignore[misc]
            if self.pieces and start < self.pieces[-1][1]:
                last = self.pieces[-1]
                last[1], last[2] = max(last[1], end), last[2] or writable
            else:
                self.pieces.append([start, end, writable])
        for piece in self.pieces:
            start, end, _ = piece
            shift = start % 64  # so that what is known of the address's divisors stays true
            buffer = device.allocate(shift + end - start).view(shift)
            buffer.write(_bytes(start, end))
            piece.append(buffer)

    def buffer(self, array: Any, address: int) -> Buffer:
        """Where the device finds the array's first element, which the host has at this address."""
        own = getattr(array, "buffer", None)
        if own is not None:
            return own.view(address - own.address)
        start, _, _, buffer = next(p for p in self.pieces if p[0] <= address < max(p[1], p[0] + 1))
        return buffer.view(address - start)

    def fetch(self) -> None:
        """Brings back what a kernel may have written."""
        for start, end, writable, buffer in self.pieces:
            if writable:
                _bytes(start, end)[:] = buffer.read()


def _bytes(start: int, end: int) -> np.ndarray:
    """The host's memory from one address to another."""
    return np.frombuffer((ctypes.c_uint8 * (end - start)).from_address(start), np.uint8)


def _writable(array: Any) -> bool:
    flags = getattr(array, "flags", None)
    return flags is None or flags.writeable


def grid_extents(kernel: JITFunction, grid: Any, bound: Mapping[str, Any]) -> tuple[int, int, int]:
    """A grid of one to three extents, or a function of the arguments by name, as three integers."""
    extents = grid(bound) if callable(grid) else grid
    extents = (extents,) if isinstance(extents, (int, float)) else tuple(extents)
    try:
        extents = tuple(map(operator.index, extents))
    except TypeError:
        raise TypeError(f"{kernel.__name__}: the grid is {extents}, expected whole numbers; nitinol.cdiv(n, BLOCK) "
                        "divides and rounds up") from None
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
    """First and last + 1 byte address of an array's memory; None if its size is not known."""
    if hasattr(argument, "__array_interface__") and hasattr(argument, "ctypes"):
        from numpy.lib.array_utils import byte_bounds

        return byte_bounds(argument)
    if hasattr(argument, "untyped_storage"):
        storage = argument.untyped_storage()
        return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    buffer = getattr(argument, "buffer", None)
    if buffer is not None:
        return buffer.address, buffer.address + buffer.nbytes
    if hasattr(argument, "__nitinol_pointer__") and hasattr(argument, "nbytes"):
        return argument.__nitinol_pointer__[0], argument.__nitinol_pointer__[0] + argument.nbytes
    return None


def _interpret(
    kernel: JITFunction, signature: Any, grid: tuple[int, int, int], bound: Mapping[str, Any], values: list[Any]
) -> None:
    from nitinol.compiler import interpreter

    arguments = []
    for (name, type, _), value in zip(signature.parameters, values):
        extent = _extent(bound[name]) if isinstance(type, PointerType) else None
        arguments.append(value if extent is None else interpreter.Region(extent[0], extent[1] - extent[0], value))
    interpreter.run(tile_ir(kernel, signature), grid, arguments)

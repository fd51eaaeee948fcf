"""`kernel[grid](...)`: one kernel on NumPy arrays, torch tensors or our own arrays, finished when the call returns.

It is a graph of one call: what our arrays still have to be computed from runs before, and so does what was asked of the
present contents of those that the kernel stores to. This folder knows nothing of the graph; an array of ours offers
`__nitinol_memory__()`, (address of its first element, element type, Buffer of all its memory), and
`__nitinol_written__(name of the kernel)`, which is called before a kernel stores to it.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from nitinol.compiler.driver import compile_kernel, tile_ir
from nitinol.compiler.stores import stores
from nitinol.language.core import unwrap
from nitinol.language.jit import JITFunction, constant_tag, describe, specialise
from nitinol.language.types import PointerType
from nitinol.runtime import get_device
from nitinol.runtime.device import Buffer, CommandList, DeviceError, slot
from nitinol.runtime.host_arrays import HostMemory, host_span, known_span

MOST_PREPARED = 1 << 12  # kinds of launches that are remembered
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


class Prepared:
    """What all launches of one kind share. types: of the run-time parameters; places: where these stand among all;
    numbers: which of them are no pointers, with their types; stored: which of all the kernel may store to; idle:
    command lists of one entry that nobody is using."""

    def __init__(
        self, kernel: JITFunction, extents: tuple[int, int, int], given: Sequence[Any], options: tuple[int, int],
        spans: Sequence[tuple[int, int, int]], device: Any,
    ) -> None:  # fmt: skip
        self.signature = specialise(kernel, given, *options)[0]
        self.extents = extents
        names = [name for name, _, _ in self.signature.parameters]
        self.types = [type for _, type, _ in self.signature.parameters]
        self.places = [place for place, p in enumerate(kernel.parameters) if p.name in names]
        if device is None:
            self.executable = None
            written = stores(tile_ir(kernel, self.signature))
        else:
            aliases = alias_classes(self.places, spans)
            self.executable = compile_kernel(kernel, self.signature, aliases, device.target)
            written = self.executable.stores
        self.stored = frozenset([self.places[position] for position in written])
        self.numbers = [(i, type) for i, type in enumerate(self.types) if not isinstance(type, PointerType)]
        self.idle: list[CommandList] = []

    def commands(self, device: Any, slots: list[Any]) -> CommandList:
        """A command list of the launch, which nobody else uses."""
        try:
            commands = self.idle.pop()
        except IndexError:
            commands = device.command_list()
            commands.launch(self.executable, self.extents, slots)
        else:
            commands.rebind({(0, position): argument for position, argument in enumerate(slots)})
        return commands


_prepared: dict[Any, Prepared] = {}


def launch(kernel: JITFunction, grid: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    """Compiles the kernel for these arguments, runs it over the grid, waits; returns the executable.

    On a device other than the CPU, the memory of NumPy's and torch's arrays is copied there and back. DeviceError for
    arrays of several devices, and for read-only memory that the kernel stores to.
    """
    parameters = kernel.parameters
    if keywords or len(arguments) != len(parameters) or (parameters and parameters[-1].name[0] == "*"):
        bound = kernel.bind(arguments, keywords)
        arguments = tuple(bound.values())
        options = schedule(kernel, keywords)
    else:
        bound = kernel.bind(arguments, keywords) if callable(grid) else {}
        options = 0, 0
    extents = grid_extents(kernel, grid, bound)
    # What the kernel is compiled for, quickly: finer than needed is fine.
    key: list[Any] = [kernel.cache_key, kernel.__name__, extents, options]
    values: list[Any] = []  # of all parameters: numbers and addresses
    spans: list[tuple[int, int, int]] = []  # first and last + 1 byte of an array's memory, and its place
    read_only: list[int] = []
    buffers: dict[int, Buffer] = {}  # of our own arrays, by place
    for place, (parameter, value) in enumerate(zip(parameters, arguments)):
        kind = type(value)
        if parameter.is_constexpr:
            key.append(constant_tag(kernel, parameter.name, unwrap(value)))
            address = None
        elif isinstance(value, np.ndarray):
            address, fixed = value.__array_interface__["data"]
            if fixed:
                read_only.append(place)
            key.append(value.dtype)
            key.append(address % 16 == 0)
            low, high = (address, address + value.nbytes) if value.flags.c_contiguous else host_span(value)  # type: ignore[misc]
            spans.append((low, high, place))
        elif kind is int or kind is float or kind is bool:
            tag, address = describe(kernel, parameter, value)
            key.append(tag)
        elif (memory := getattr(value, "__nitinol_memory__", None)) is not None:
            address, dtype, buffer = memory()
            if buffer.read_only:
                read_only.append(place)
            key.append(dtype)
            key.append(address % 16 == 0)
            spans.append((buffer.address, buffer.address + buffer.nbytes, place))
            buffers[place] = buffer
        else:
            tag, address = describe(kernel, parameter, unwrap(value))
            key.append(tag)
            if tag[0] == "*" and (span := host_span(value)) is not None:
                spans.append((*span, place))
        values.append(address)
    if len(spans) > 1:
        spans.sort()
        end = 0
        for low, high, _ in spans:
            if low < end:  # pairs of pieces of memory that overlap, whatever their order
                key.append(alias_classes(range(len(parameters)), spans))
                break
            end = max(end, high)
    device = device_of(buffers) if buffers else get_device()
    key.append(None if _interpreting else device.target)
    prepared = _prepared.get(tuple(key))
    if prepared is None:
        prepared = Prepared(kernel, extents, arguments, options, spans, None if _interpreting else device)
        if len(_prepared) >= MOST_PREPARED:
            _prepared.clear()
        _prepared[tuple(key)] = prepared
    for place in read_only:
        if place in prepared.stored:
            raise DeviceError(f"{kernel.__name__} stores to {parameters[place].name}, whose memory is read-only; "
                              "give it a copy of the array")  # fmt: skip
    for place in buffers:
        if place in prepared.stored:
            arguments[place].__nitinol_written__(kernel.__name__)
    if _interpreting:
        _interpret(kernel, prepared, values, spans)
        return None
    if device.target == "cpu":
        _run_on_host(prepared, device, arguments, values)
    else:
        _run_on_copies(prepared, device, arguments, values, buffers)
    return prepared.executable


def _run_on_host(prepared: Prepared, device: Any, arguments: Sequence[Any], values: Sequence[Any]) -> None:
    """Runs the kernel on the memory of the arguments."""
    slots = [values[place] for place in prepared.places]
    for position, type in prepared.numbers:
        slots[position] = encode(slots[position], type)
    commands = prepared.commands(device, slots)
    commands.kept = list(arguments)  # Ctrl-C ends the wait, not the kernel
    device.run(commands)
    commands.kept = []
    prepared.idle.append(commands)


def _run_on_copies(
    prepared: Prepared, device: Any, arguments: Sequence[Any], values: Sequence[Any], buffers: Mapping[int, Buffer]
) -> None:
    """Runs the kernel on the arguments' memory where it is the device's own, else on copies, which come back."""
    pointers = [p for p, type in zip(prepared.places, prepared.types) if isinstance(type, PointerType)]
    copies = HostMemory(device, [
        (*known_span(arguments[place], device), place in prepared.stored) for place in pointers if place not in buffers
    ])  # fmt: skip
    slots: list[Any] = []
    for place, type in zip(prepared.places, prepared.types):
        if place in buffers:
            slots.append(buffers[place].view(values[place] - buffers[place].address))
        elif isinstance(type, PointerType):
            slots.append(copies.buffer(values[place]))
        else:
            slots.append(encode(values[place], type))
    device.run(prepared.commands(device, slots))  # which is not kept: it would hold the memory
    copies.fetch()


def schedule(kernel: JITFunction, keywords: Mapping[str, Any]) -> tuple[int, int]:
    """`num_warps` and `num_stages` of a launch, 0 where they are not given or are the kernel's own parameters."""
    return tuple(0 if name in kernel.arg_names else int(keywords.get(name) or 0)
                 for name in ("num_warps", "num_stages"))  # type: ignore[return-value]  # fmt: skip


def device_of(buffers: Mapping[int, Buffer]) -> Any:
    """The device of these buffers."""
    found, *others = dict.fromkeys([buffer.device for buffer in buffers.values()])
    if others:
        names = " and ".join(device.name for device in (found, *others))
        raise DeviceError(f"a kernel's arrays are on several devices ({names}); copy them to one device first")
    return found


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


def alias_classes(places: Sequence[int], spans: Sequence[tuple[int, int, int]]) -> tuple[int, ...]:
    """A number per run-time parameter, which stand at these places; arrays whose memory overlaps share one.

    spans: first and last + 1 byte of arrays, and their places.
    """
    classes = {place: number for number, place in enumerate(places)}
    group: list[int] = []
    end = 0
    for low, high, place in sorted(spans):  # so that what overlaps follows each other
        group = [*group, place] if low < end else [place]
        classes.update(dict.fromkeys(group, min([classes[other] for other in group])))
        end = max(end, high)
    return tuple([classes[place] for place in places])


def _interpret(
    kernel: JITFunction, prepared: Prepared, values: Sequence[Any], spans: Sequence[tuple[int, int, int]]
) -> None:
    from nitinol.compiler import interpreter

    regions = {place: interpreter.Region(low, high - low, values[place]) for low, high, place in spans}
    arguments = [regions.get(place, values[place]) for place in prepared.places]
    interpreter.run(tile_ir(kernel, prepared.signature), prepared.extents, arguments)

"""What a GPU can do at most, measured with two tile kernels: bytes read a second, operations a second."""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,misc"

from __future__ import annotations

from typing import Any

import nitinol.language as tl
from nitinol.compiler.driver import compile_kernel
from nitinol.language.jit import jit, specialise
from nitinol.language.types import float16, int8, int32

READ_BLOCK, READ_STEPS = 4096, 4  # 64 KiB a program
TILE, PRODUCTS = 64, 256  # a program multiplies 64 x 64 x 64 so often
# A first, small run says how much work fits about so many seconds: a GPU gets all of it, a device in software less.
PROBE_BYTES, READ_SECONDS = 64 << 20, 0.05
SIZES = (4, 4), (64, 32), (1024, PRODUCTS)  # programs and products of each: the next if one takes less than
ENOUGH_SECONDS = 0.02


@jit
def read_kernel(source, sums, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    program = tl.program_id(0)
    at = program.to(tl.int64) * (BLOCK * STEPS) + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for step in tl.static_range(STEPS):
        total = total ^ tl.load(source + at + step * BLOCK)
    tl.store(sums + program, tl.sum(total, axis=0))


@jit
def multiply_kernel(out, products, TILE: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr):
    row, column = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    a = ((row + column) % 3).to(DTYPE)
    b = ((row * 2 + column) % 3).to(DTYPE)
    total = tl.zeros((TILE, TILE), ACC)
    for _ in range(products):
        total = tl.dot(a, b, total)
    tl.store(out + tl.program_id(0) * TILE + tl.arange(0, TILE), tl.max(total, axis=0).to(tl.float32))


def read_bandwidth(device: Any, nbytes: int, repetitions: int) -> float:
    """GB/s (10⁹ bytes) of reading `nbytes`, the best of `repetitions`; less is read of a device in software."""
    program_bytes = 4 * READ_BLOCK * READ_STEPS
    probe = min(nbytes, PROBE_BYTES) // program_bytes * program_bytes
    nbytes = min(nbytes, int(probe * max(1.0, READ_SECONDS / _read_seconds(device, probe, 1))))
    nbytes = nbytes // program_bytes * program_bytes
    return nbytes / _read_seconds(device, nbytes, repetitions) / 1e9


def _read_seconds(device: Any, nbytes: int, repetitions: int) -> float:
    programs = nbytes // (4 * READ_BLOCK * READ_STEPS)
    source, sums = device.allocate(nbytes), device.allocate(4 * programs)
    commands = device.command_list()
    commands.fill(source, 1)
    device.run(commands)
    arguments = {"source": (source, int32), "sums": (sums, int32)}
    return _seconds(device, read_kernel, programs, arguments, repetitions, BLOCK=READ_BLOCK, STEPS=READ_STEPS)


def peak_rates(device: Any, repetitions: int) -> dict[str, float]:
    """10⁹ operations a second of `tl.dot`, a product and its sum counting as two: "float32" names what models compute
    in, which is half here, with float32 sums; "int8" bytes with int32 sums."""
    rates = {}
    for name, dtype, total in (("float32", float16, tl.float32), ("int8", int8, tl.int32)):
        out = device.allocate(4 * TILE * 1024)
        constants = {"TILE": TILE, "DTYPE": dtype, "ACC": total}
        arguments = {"out": (out, tl.float32)}
        for programs, products in SIZES:
            given = {"products": products, **constants}
            seconds = _seconds(device, multiply_kernel, programs, arguments, 1, **given)
            if seconds > ENOUGH_SECONDS:
                break
        seconds = _seconds(device, multiply_kernel, programs, arguments, repetitions, **given)
        rates[name] = 2 * TILE**3 * programs * products / seconds / 1e9
    return rates


def _seconds(
    device: Any, kernel: Any, programs: int, buffers: dict[str, Any], repetitions: int, **others: Any
) -> float:
    """The best time of a launch by the device's own clock."""
    pointers = {name: _Pointer(buffer, dtype) for name, (buffer, dtype) in buffers.items()}
    signature, values = specialise(kernel, kernel.bind((), {**pointers, **others}))
    executable = compile_kernel(kernel, signature, target=device.target)
    arguments = [buffers[name][0] if name in buffers else value
                 for (name, _, _), value in zip(signature.parameters, values)]  # fmt: skip
    commands = device.command_list()
    commands.launch(executable, (programs,), arguments)
    commands.profile = True
    times = []
    for _ in range(repetitions + 1):
        device.run(commands)
        (stamp,) = commands.timestamps()
        times.append((stamp.end - stamp.start) / 1e9)
    return max(min(times), 1e-9)


class _Pointer:
    def __init__(self, buffer: Any, dtype: Any) -> None:
        self.__nitinol_pointer__ = (buffer.address, dtype)

"""The GPU target: tile IR to the source text of a kernel, in the dialect of one GPU language."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from nitinol.compiler.gpu import metal
from nitinol.compiler.gpu.effects import LOG_BYTES, Print, read_log
from nitinol.compiler.ir import Function
from nitinol.compiler.stores import stores
from nitinol.language.types import DType, PointerType

__all__ = ["LOG_BYTES", "Executable", "compile_function"]


@dataclass
class Executable:
    """The source of one kernel and what its launch needs.

    One threadgroup (CUDA: block) of `threads` threads per program instance, on a grid of three extents. Buffers 0, 1,
    ... are the pointer parameters in order; the next holds `arguments(values, grid)`. If there are `asserts`, one more
    holds a uint32, 0 at first, that becomes the number of a failed assertion; if there are `prints`, one more holds
    LOG_BYTES, the first four 0, from which `printed` reads lines.

    Metal: `threadgroup_bytes` are declared in the kernel itself. CUDA: the kernel is `extern "C"`; its parameters are
    what the buffers are on Metal, in the same order: an 8-byte device address each, but for `arguments(...)`, which is
    one parameter passed by value (its bytes, aligned to 8). The launch must pass `threadgroup_bytes` as dynamic shared
    memory; above 48 KB the function's attribute MAX_DYNAMIC_SHARED_SIZE_BYTES must be raised to it first. NVRTC needs
    no headers; its options are `options` and `--gpu-architecture` of the device (`sm_90a` for 9.0).
    """

    name: str
    source: str
    simdgroups: int
    threadgroup_bytes: int
    barriers: int
    pointers: tuple[int, ...]  # which parameters are buffers
    scalars: tuple[tuple[int, DType], ...]  # parameters in the struct of arguments, and their types
    asserts: dict[int, str] = field(default_factory=dict)
    prints: tuple[Print, ...] = ()
    stores: frozenset[int] = frozenset()  # the positions of the parameters whose memory it writes
    early: tuple[int, ...] = ()  # CUDA: parameters from which it loads before it waits for the kernels before it
    language: str = "msl"
    function: Function | None = field(default=None, repr=False)
    options: tuple[str, ...] = ()  # for the compiler of the source

    @property
    def asm(self) -> dict[str, str]:
        """What was made, as text: "ir" (tile IR) and the source, "msl" for Metal."""
        return {"ir": str(self.function), self.language: self.source}

    @property
    def threads(self) -> int:
        return 32 * self.simdgroups

    def printed(self, log: bytes) -> list[str]:
        """The lines that a launch printed."""
        return list(read_log(self.prints, log))

    def arguments(self, values: Sequence[Any], grid: Sequence[int]) -> bytes:
        """The struct of scalar arguments: `values` has one entry per parameter of the kernel, numbers or the 8 bytes of
        `nitinol.runtime.device.slot` (for a float: float32, or float64 for parameters of that type)."""
        out = b""
        for index, element in self.scalars:
            out += bytes(-len(out) % element.nbytes) + _pack(values[index], element)
        out += bytes(-len(out) % 4) + struct.pack("<3i", *grid)
        widest = max([4, *(element.nbytes for _, element in self.scalars)])
        return out + bytes(-len(out) % widest)


def _pack(value: Any, element: DType) -> bytes:
    if isinstance(value, bytes):
        if not element.is_float or element.nbytes == 8:
            return value[: element.nbytes]
        value = struct.unpack("<f", value[:4])[0]
    if element.is_float:
        if element.name == "bf16":
            bits = struct.unpack("<I", struct.pack("<f", float(value)))[0]
            return struct.pack("<H", (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
        return struct.pack({"fp16": "<e", "fp32": "<f", "fp64": "<d"}[element.name], float(value))
    return (int(value) & ((1 << 8 * element.nbytes) - 1)).to_bytes(element.nbytes, "little")


def compile_function(
    function: Function, aliases: tuple[int, ...] = (), simdgroups: int = 0, dialect: ModuleType = metal, name: str = "",
    stages: int = 0,
) -> Executable:  # fmt: skip
    """The kernel's source for a prepared tile IR function, which is changed in place.

    `aliases`: a number per parameter; pointers with equal numbers may point into the same memory (the default: all
    differ). `simdgroups`: a power of two, how many simdgroups of 32 threads run one program instance; 0: as many as its
    tiles are large enough for. `name`: of the kernel, if not the function's. `stages`: how many tiles of each load that
    feeds products in a loop are in shared memory at a time (1: none is loaded ahead; 0: as many as pay), where the
    dialect loads asynchronously.

    Raises CompilationError with the Python line for what the dialect's devices cannot do.
    """
    from nitinol.compiler.gpu.cost import enough_simdgroups
    from nitinol.compiler.gpu.emit import Emitter, SharedPointer
    from nitinol.compiler.gpu.forms import literal
    from nitinol.compiler.gpu.pipeline import pipeline
    from nitinol.compiler.gpu.quotients import share_inverses
    from nitinol.compiler.gpu.small_dots import expand_small_dots
    from nitinol.compiler.gpu.sums import narrow_sums
    from nitinol.compiler.gpu.tree import allocate, leaves, place_barriers, render

    if simdgroups < 0 or simdgroups & (simdgroups - 1) or 32 * simdgroups > dialect.MOST_THREADS:
        most = dialect.MOST_THREADS // 32
        raise ValueError(f"{function.name}: {simdgroups} simdgroups; expected a power of two up to {most}")
    aliases = aliases or tuple(range(len(function.parameters)))
    expand_small_dots(function, dialect.MATRIX_SIDES, dialect.BYTES_AS_HALVES)
    narrow_sums(function)
    simdgroups = simdgroups or enough_simdgroups(function)
    if dialect.ASYNCHRONOUS:
        share_inverses(function)
        pipeline(function, dialect, simdgroups, stages, aliases)
    e = Emitter(function, dialect, simdgroups.bit_length() - 1, aliases)
    name = re.sub(r"\W", "_", name or function.name)
    name = f"{name}_kernel" if name in dialect.RESERVED else name
    pointers, scalars, buffers, fields = [], [], [], []
    for index, parameter in enumerate(function.parameters):
        written = e.name(parameter.name or f"argument{index}")
        element = parameter.element
        try:
            if isinstance(element, PointerType):
                pointers.append(index)
                buffers.append((dialect.memory_type(element.element), written))
                e.forms[parameter, e.assignment.scalar] = literal(written)
            else:
                scalars.append((index, element))
                fields.append((dialect.memory_type(element), written))
                text = f"arguments.{written}" + (" != 0" if element.kind == "bool" else "")
                e.forms[parameter, e.assignment.scalar] = literal(f"({text})" if " " in text else text)
        except dialect.Unsupported as problem:
            e.location = function.location
            raise e.error(f"parameter {parameter.name} of {problem}") from None
    most = dialect.MOST_BUFFERS - 3  # for scalar arguments, assertions and prints
    if len(pointers) > most:
        e.location = function.location
        raise e.error(f"{function.name} has {len(pointers)} pointer parameters and {dialect.NAME} kernels at most "
                      f"{most}; put arrays together")  # fmt: skip
    e.run(function.body)
    e.wait()
    nbytes = allocate(e.body, dialect.SHARED_ROOMY)
    if nbytes > dialect.SHARED_LIMIT:
        e.location = function.location
        raise e.error(f"{function.name} needs {nbytes} bytes of threadgroup memory and {dialect.NAME} devices have "
                      f"{dialect.SHARED_LIMIT}; use smaller tiles")  # fmt: skip
    barriers = place_barriers(e.body, dialect.barrier)
    for statement in leaves(e.body):
        if isinstance(statement, SharedPointer):
            statement.settle()
    groups = [aliases[index] for index in pointers]
    meeting = [groups.count(group) > 1 for group in groups]
    threads = 32 * simdgroups
    resident = dialect.RESIDENT // threads if e.byte_products else 0
    head = dialect.kernel(name, buffers, fields, threads, bool(e.asserts), bool(e.prints), meeting, resident)
    lines = ["    " + dialect.LET_NEXT_START] if dialect.EARLY_START and not e.says_when else []
    lines += ["    " + dialect.shared_memory(nbytes)] if nbytes else []
    text = "\n".join([*head, *lines, *render(e.body, dialect.UNROLL), "}", ""])
    return Executable(
        name, "\n".join([*dialect.prelude(text, e.helpers), text]), simdgroups, nbytes, barriers, tuple(pointers),
        tuple(scalars), dict(e.asserts), tuple(e.prints), stores(function), tuple(sorted(e.early)),
        dialect.LANGUAGE, function, dialect.OPTIONS,
    )  # fmt: skip

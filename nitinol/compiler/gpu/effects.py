"""Assertions and prints: what a kernel tells the host besides its results, by way of two small buffers."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nitinol.compiler.gpu.forms import Index
from nitinol.compiler.gpu.threads import guard_of, place_of
from nitinol.compiler.ir import Op
from nitinol.language.types import DType, PointerType

if TYPE_CHECKING:
    from nitinol.compiler.gpu.emit import Emitter

LOG_RECORDS = 16384  # elements that one launch can print
RECORD_WORDS = 7  # site, program (3), place, value (2)
LOG_BYTES = 4 + 4 * RECORD_WORDS * LOG_RECORDS


@dataclass(frozen=True)
class Print:
    """One operand of a device_print."""

    prefix: str
    as_hex: bool
    element: DType | PointerType
    shape: tuple[int, ...]


def fail(e: Emitter, op: Op) -> None:
    """assert: the first failure's number goes to the status word."""
    condition, layout = op.operands[0], e.assignment.chosen[op]
    message = op.attributes.get("message", "") or "assertion failed"
    text = f"kernel {e.function.name}, {op.location or 'no source line'}: {message}"
    number = zlib.crc32(text.encode()) | 1  # not zero, and told apart across kernels
    e.asserts[number] = text
    form = e.form(condition, layout)
    e.each(layout.count, lambda i: [f"if (!{form.operand(i)}) {e.dialect.fail(number)}"], [form])


def print_values(e: Emitter, op: Op) -> None:
    """Every element once, as a record in the log."""
    for value in op.operands:
        layout = e.assignment.first([value]) if value.shape else e.assignment.scalar
        form, guard, site = e.form(value, layout), guard_of(layout), len(e.prints)
        prefix, as_hex = op.attributes.get("prefix", ""), bool(op.attributes.get("hex"))
        e.prints.append(Print(prefix, as_hex, value.element, value.shape))
        e.helpers.add("log_value")
        bits = e.dialect.log_bits

        def lines(i: Index) -> list[str]:
            text = bits(value.element, form.text(i))  # noqa: B023
            return [f"{guard}log_value(log, {site}, group, {place_of(layout, i)}, {text});"]  # noqa: B023

        e.each(layout.count, lines, [form])


def read_log(prints: Sequence[Print], log: bytes) -> Iterator[str]:
    """The lines that a launch printed, in the order in which its threads came."""
    count = struct.unpack_from("<I", log)[0]
    for number in range(min(count, LOG_RECORDS)):
        site, x, y, z, place, low, high = struct.unpack_from("<7I", log, 4 + 4 * RECORD_WORDS * number)
        what = prints[site]
        index = ", ".join(str(int(i)) for i in np.unravel_index(place, what.shape)) if what.shape else ""
        yield f"pid ({x}, {y}, {z}) idx ({index}){what.prefix}: {_text(what, low | high << 32)}"
    if count > LOG_RECORDS:
        yield f"{count - LOG_RECORDS} more lines are lost: one launch prints at most {LOG_RECORDS}"


def _text(what: Print, bits: int) -> str:
    element = what.element
    if isinstance(element, PointerType) or what.as_hex:
        return hex(bits & ((1 << 8 * element.nbytes) - 1))
    if element.is_float:
        return f"{struct.unpack('<f', struct.pack('<I', bits & 0xFFFFFFFF))[0]:f}"
    return str(bits - (1 << 64) if element.is_signed and bits >> 63 else bits)

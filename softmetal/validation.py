"""What the runtime may touch, for validation, and its findings as sentences."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

from softmetal import lines, native
from softmetal.device import Buffer, Pipeline

BOUNDS, RACE, RACE_ACROSS, DIVERGENT, UNINITIALISED, FAULT, TOO_LARGE = range(1, 8)
SPARE = 128  # entries that the runtime adds for a threadgroup's own memory


def ranges(bound: Iterable[Any], resident: Iterable[Any]) -> ctypes.Array[ctypes.c_uint64]:
    """Start, length and space of the memory a dispatch may touch besides its arguments."""
    found = [(m.address, m._length) for m in resident if isinstance(m, Buffer)]
    array = (ctypes.c_uint64 * (2 * (len(found) + SPARE) + 1))()
    for i, (address, length) in enumerate(found):
        array[2 * i], array[2 * i + 1] = address, length
    array[2 * (len(found) + SPARE)] = len(found)
    return array


def count(array: ctypes.Array[ctypes.c_uint64]) -> int:
    return int(array[len(array) - 1])


def describe(r: native.Report) -> str:
    """A finding of the runtime as a sentence with kernel, thread and source line."""
    pipeline = Pipeline._all.get(r.kernel)
    name = pipeline.kernel.name if pipeline else "?"
    code = pipeline._codes.get(True) or pipeline._codes.get(False) if pipeline else None
    line = lines.find(code.path, r.pc - 1) if code and r.pc else ""
    other = lines.find(code.path, r.other_pc - 1) if code and r.other_pc else ""
    thread, group = tuple(r.thread), tuple(r.group)
    where = f"kernel '{name}', thread {thread} of threadgroup {group}" + (f", line {line}" if line else "")
    space = "threadgroup" if r.space == 2 else "device"
    access = f"{'writes' if r.write else 'reads'} {r.size} bytes"
    before = f"{'written' if r.other_write else 'read'} by thread {r.other_thread}" + (f" in line {other}" if other else "")
    if r.kind == BOUNDS:
        place = (f"{r.offset} bytes after the start of memory of {r.length} bytes" if r.length else f"at address {r.address:#x}, "
                 "where no argument of the kernel lies")  # fmt: skip
        return f"validation: out of bounds: {where}: {access} {place}"
    if r.kind == RACE:
        return f"validation: data race: {where}: {access} of {space} memory, {before} of the same threadgroup with no barrier between"
    if r.kind == RACE_ACROSS:
        what = f"{'written' if r.other_write else 'read'} by another threadgroup or dispatch" + (f" in line {other}" if other else "")
        return f"validation: data race: {where}: {access} of device memory, {what} with nothing that orders them"
    if r.kind == DIVERGENT:
        return (f"validation: divergent barrier: {where}: waits at a barrier that other threads of the threadgroup do not reach"
                + (f" (one waits in line {other})" if other else " (they have ended)"))  # fmt: skip
    if r.kind == UNINITIALISED:
        return f"validation: uninitialised: {where}: {access} of threadgroup memory that nobody has written"
    if r.kind == TOO_LARGE:
        return f"{where}: threadgroup memory exceeds 32768 bytes"
    return f"page fault: {where}: touches address {r.address:#x}, which is no memory of the process (run with validation to see why)"

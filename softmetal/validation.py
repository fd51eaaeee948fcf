"""What the runtime may touch, for validation, and its findings as sentences."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

from softmetal import lines, native
from softmetal.buffers import Buffer
from softmetal.library import Pipeline

BOUNDS, RACE, RACE_ACROSS, DIVERGENT, UNINITIALISED, FAULT, TOO_LARGE, TIMEOUT, MISALIGNED, STACK = range(1, 11)
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


def describe(r: native.Report, instrumented: bool) -> str:
    """A finding of the runtime as a sentence with kernel, thread and (in instrumented code) source line."""
    pipeline = Pipeline._all.get(r.kernel)
    name = pipeline.kernel.name if pipeline else "?"
    path = pipeline.code(True).path if pipeline and instrumented else ""
    line = lines.find(path, r.pc - 1) if path and r.pc else ""
    other = lines.find(path, r.other_pc - 1) if path and r.other_pc else ""
    at_other = f" in line {other}" if other else ""
    where = f"kernel '{name}', thread {tuple(r.thread)} of threadgroup {tuple(r.group)}" + (
        f", line {line}" if line else ""
    )
    space = "threadgroup" if r.space == 2 else "device"
    access = f"{where}: {'writes' if r.write else 'reads'} {r.size} bytes"
    done = "written" if r.other_write else "read"
    who = f"thread {r.other_thread}" if r.other_thread < 1024 else "several threads"
    if r.kind == BOUNDS:
        place = f"{r.offset} bytes after the start of memory of {r.length} bytes"
        nowhere = f"at address {r.address:#x}, where no argument of the kernel lies"
        return f"validation: out of bounds: {access} {place if r.length else nowhere}"
    if r.kind == RACE:
        before = f"{done} by {who}{at_other} of the same threadgroup with no barrier between"
        return f"validation: data race: {access} of {space} memory, {before}"
    if r.kind == RACE_ACROSS:
        before = f"{done} by another threadgroup or dispatch{at_other} with nothing that orders them"
        return f"validation: data race: {access} of device memory, {before}"
    if r.kind == DIVERGENT:
        others = f"one waits{at_other}" if other else "they have ended"
        return f"validation: divergent barrier: {where}: waits at a barrier that not all threads reach ({others})"
    if r.kind == UNINITIALISED:
        return f"validation: uninitialised: {access} of threadgroup memory that nobody has written"
    if r.kind == MISALIGNED:
        place = f"{'writes' if r.write else 'reads'} {r.size} bytes at address {r.address:#x}, " if r.size else ""
        return f"validation: misaligned: {where}: {place}which is not aligned for the type of the access"
    if r.kind == STACK:
        return f"stack overflow: {where} needs more than 60 KB of memory of its own"
    if r.kind == TIMEOUT:
        return f"time-out: {where} was still running when the dispatch's time was over"
    if r.kind == TOO_LARGE:
        return f"{where}: threadgroup memory exceeds 32768 bytes"
    hint = "" if instrumented else " (run with validation to see why)"
    return f"page fault: {where}: touches address {r.address:#x}, which is no memory of the process{hint}"

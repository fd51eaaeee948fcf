"""The runtime library, seen from Python."""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import Structure, c_uint32, c_uint64, c_void_p

from softmetal import compile

MAX_BUFFERS = 31


class Dispatch(Structure):
    """One launch of a kernel; native/abi.h has the same layout."""

    _fields_ = [
        ("entry", c_void_p), ("fibers", c_uint32), ("kernel", c_uint32), ("groups", c_uint32 * 3),
        ("size", c_uint32 * 3), ("threads", c_uint32 * 3), ("width", c_uint32), ("indirect", c_void_p),
        ("buffers", c_uint64 * MAX_BUFFERS), ("lengths", c_uint64 * MAX_BUFFERS), ("spaces", c_uint32 * MAX_BUFFERS),
        ("tg_lengths", c_uint32 * MAX_BUFFERS), ("ranges", c_void_p), ("range_count", c_uint64),
        ("code_start", c_uint64), ("code_end", c_uint64),
    ]  # fmt: skip


class Op(Structure):
    _fields_ = [("kind", c_uint32), ("value", c_uint32), ("a", c_void_p), ("b", c_void_p), ("size", c_uint64)]


DISPATCH, EPOCH, COPY, FILL = range(4)


class Report(Structure):
    _fields_ = [
        ("kind", c_uint32), ("kernel", c_uint32), ("space", c_uint32), ("size", c_uint32), ("write", c_uint32),
        ("other_write", c_uint32), ("address", c_uint64), ("pc", c_uint64), ("other_pc", c_uint64),
        ("offset", c_uint64), ("length", c_uint64), ("group", c_uint32 * 3), ("thread", c_uint32 * 3),
        ("other_thread", c_uint32), ("index", c_uint32),
    ]  # fmt: skip


class Counters(Structure):
    _fields_ = [
        ("dispatches", c_uint64), ("groups", c_uint64), ("threads", c_uint64), ("barriers", c_uint64),
        ("simd_ops", c_uint64), ("matrix_ops", c_uint64), ("loaded", c_uint64 * 3), ("stored", c_uint64 * 3),
        ("atomics", c_uint64),
    ]  # fmt: skip


def threads() -> int:
    chosen = os.environ.get("SOFTMETAL_THREADS", "")
    return int(chosen) if chosen.isdigit() and int(chosen) > 0 else len(os.sched_getaffinity(0))


@functools.cache
def runtime() -> ctypes.CDLL:
    """The runtime, compiled on first use and started with one OS thread per core (`$SOFTMETAL_THREADS`)."""
    ctypes.CDLL("libm.so.6", ctypes.RTLD_GLOBAL)  # kernels call its exp, sin, ...
    library = ctypes.CDLL(str(compile.runtime()), ctypes.RTLD_GLOBAL)
    library.sm_execute.argtypes = [c_void_p, c_uint32, c_uint32]
    library.sm_execute.restype = c_uint32
    library.sm_take_reports.argtypes = [c_void_p]
    library.sm_take_reports.restype = c_uint32
    library.sm_read_counters.argtypes = [c_void_p, ctypes.c_int]
    library.sm_set_mode.argtypes = [c_uint32, c_uint32, c_uint64]
    library.sm_start(c_uint32(threads()))
    return library


def execute(ops: ctypes.Array[Op], count: int, seed: int) -> int:
    """Runs operations in order, without the interpreter lock; the number that ran."""
    return int(runtime().sm_execute(ops, count, seed))


def take_reports() -> list[Report]:
    buffer = (Report * 64)()
    return list(buffer[: runtime().sm_take_reports(buffer)])


def read_counters(reset: bool = False) -> Counters:
    result = Counters()
    runtime().sm_read_counters(ctypes.byref(result), int(reset))
    return result


class Code:
    """A loaded library of kernels."""

    def __init__(self, path: str) -> None:
        runtime()
        self.path = path
        self.handle = ctypes.CDLL(path)
        info = (c_uint64 * 4).in_dll(self.handle, "sm_info")
        self.records, self.start, self.end = (info[0], info[1]), int(info[2]), int(info[3])

    def address(self, symbol: str) -> int:
        return int(ctypes.cast(getattr(self.handle, symbol), c_void_p).value or 0)

    def threadgroup_bytes(self, number: int) -> int:
        """Bytes of the threadgroup variables that kernel `number` declares."""
        start, end = self.records
        words = (c_uint64 * ((end - start) // 8)).from_address(start)
        found = {words[i + 1]: words[i + 2] for i in range(0, len(words), 3) if words[i] == number}
        return sum((size + 15) // 16 * 16 for size in found.values())

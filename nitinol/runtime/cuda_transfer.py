"""Bytes between host memory and the GPU, at the speed of the link.

Ordinary memory (a mapped file) cannot be read by the GPU's copy engines, which need pinned pages. Many threads
therefore take pieces in turn, each with a pinned buffer that it fills while the GPU copies those of the others. One
thread copies 4 to 6 GB/s out of a mapped file, the mapping of its pages included; a PCIe 5 link takes 55.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nitinol.runtime.cuda_driver import Pinned
from nitinol.runtime.device import Progress

if TYPE_CHECKING:
    from nitinol.runtime.cuda import CudaDevice

MADV_POPULATE_READ = 22  # Linux 5.14
# A piece takes the link 75 us, the interpreter some 20 us, and a thread 0.7 to 1.1 ms. So the link always has work:
# while a thread fills its buffer, it copies up to fifteen others (1.1 ms). A thread whose buffer is under way sleeps.
PIECE = 4 << 20  # bytes; up to here the driver's own staging is quicker
THREADS = 16


class Stage(NamedTuple):
    """A pinned buffer and the event of the copy that last used it."""

    memory: Pinned
    event: Any


class Transfers:
    """The staging buffers of a device, at most 64 MB; one large transfer at a time."""

    def __init__(self, device: CudaDevice):
        self._device = device
        # One a thread, made by the thread when it first takes a piece: pinning is slow (some 3 GB/s), so the link has
        # work after the first 4 MB, and a thread that has its buffer waits for nobody else's.
        self._stages: list[Stage | None] = [None] * THREADS
        self._lock = threading.Lock()

    def copy(self, address: int, host: np.ndarray, upload: bool, progress: Progress | None = None) -> None:
        """All of `host` (uint8, contiguous) to or from device memory, after what was submitted; waits for the end.
        progress: told every 0.1 s, in this thread, of what goes in pieces."""
        device = self._device
        device.enter()
        if host.nbytes > PIECE:
            with self._lock:
                self._staged(address, host, upload, progress)
        elif host.nbytes:
            self._enqueue(address, host.ctypes.data, host.nbytes, upload)
        device.call(device.cu.cuStreamSynchronize, device.stream)

    def _enqueue(self, address: int, host: int, nbytes: int, upload: bool) -> None:
        cu, stream = self._device.cu, self._device.stream
        if upload:
            self._device.call(cu.cuMemcpyHtoDAsync, address, host, nbytes, stream)
        else:
            self._device.call(cu.cuMemcpyDtoHAsync, host, address, nbytes, stream)

    def _staged(self, address: int, host: np.ndarray, upload: bool, progress: Progress | None) -> None:
        device, size = self._device, host.nbytes
        starts, taking, stopped = iter(range(0, size, PIECE)), threading.Lock(), threading.Event()
        moved = [0] * THREADS  # bytes, by each thread

        def work(number: int) -> None:
            device.enter()
            while not stopped.is_set():
                with taking:
                    start = next(starts, None)
                if start is None:
                    break
                part = host[start:start + PIECE]
                stage = self._stages[number] = self._stages[number] or self._stage()
                staged = stage.memory.bytes[:part.nbytes]
                if upload:
                    _map_pages(part)  # meanwhile the GPU copies the piece before
                    device.call(device.cu.cuEventSynchronize, stage.event)
                    np.copyto(staged, part)  # other threads run meanwhile
                self._enqueue(address + start, stage.memory.address, part.nbytes, upload)
                device.call(device.cu.cuEventRecord, stage.event, device.stream)
                if not upload:
                    device.call(device.cu.cuEventSynchronize, stage.event)
                    np.copyto(part, staged)
                moved[number] += part.nbytes

        count = min(THREADS, -(-size // PIECE))
        with ThreadPoolExecutor(count, "nitinol-transfer") as threads:
            running = [threads.submit(work, number) for number in range(count)]
            try:
                while (found := wait(running, 0.1, FIRST_EXCEPTION)).not_done:
                    if any(each.exception() for each in found.done):
                        break
                    if progress is not None:
                        progress(sum(moved), size)
            finally:
                stopped.set()  # after an error or Ctrl-C too
        for each in running:
            each.result()
        if progress is not None:
            progress(size, size)

    def _stage(self) -> Stage:
        return Stage(Pinned(self._device, PIECE), self._device.event("DISABLE_TIMING", "BLOCKING_SYNC"))


def _map_pages(part: np.ndarray) -> None:
    """Map the pages of a file at once, not by a fault for every 16 of them; where that is not possible, nothing."""
    if madvise := _madvise():
        start = part.ctypes.data & -mmap.PAGESIZE
        madvise(start, part.ctypes.data + part.nbytes - start, MADV_POPULATE_READ)


@functools.cache
def _madvise() -> Any:
    """The C library's function, on Linux."""
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function

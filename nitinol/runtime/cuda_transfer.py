"""Bytes between host memory and the GPU, at the speed of the link.

The GPU's copy engines read and write pinned pages only. Threads therefore take pieces in turn, and fill pinned buffers
while the GPU copies others. A mapped file is read into them, not copied out of its mapping, which would have to map the
pages first: 45 GB/s instead of 38, of the 55 that a PCIe 5 link takes. The buffers lie on huge pages, which take half
the time to pin: 47 GB/s.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nitinol.formats.gguf import FileMapping
from nitinol.runtime.cuda_driver import CudaError, Pinned, Registered
from nitinol.runtime.device import Progress
from nitinol.runtime.memory import HUGE_PAGE, map_memory

if TYPE_CHECKING:
    from nitinol.runtime.cuda import CudaDevice

# H200, 16 cores, 16 GB: 47 GB/s of the link's 55 with 14 threads, 46 with 12 and less evenly. Pieces of 4 MB take the
# link 76 us each, a thread 0.9 ms; with 8 MB caches were the limit, with 2 MB the interpreter.
PIECE = 4 << 20  # bytes; up to here the driver's own staging is quicker
THREADS = 14
STAGES = 20  # all threads fill one, and the link has six pieces (0.5 ms) waiting; pinning takes 0.75 ms each


class Stage(NamedTuple):
    """A pinned buffer and the event of the copy that last used it."""

    memory: Registered | Pinned
    event: Any


class Transfers:
    """The staging buffers of a device, at most 84 MB; one large transfer at a time."""

    def __init__(self, device: CudaDevice):
        self._device = device
        self._free: deque[Stage] = deque()  # the one first whose copy began first
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
        device.call(device.cu.cuStreamSynchronize, device.stream.handle)

    def _enqueue(self, address: int, host: int, nbytes: int, upload: bool) -> None:
        cu, stream = self._device.cu, self._device.stream.handle
        if upload:
            self._device.call(cu.cuMemcpyHtoDAsync, address, host, nbytes, stream)
        else:
            self._device.call(cu.cuMemcpyDtoHAsync, host, address, nbytes, stream)

    def _staged(self, address: int, host: np.ndarray, upload: bool, progress: Progress | None) -> None:
        device, size = self._device, host.nbytes
        read = _reader(host)
        starts, stopped = deque(range(0, size, PIECE)), threading.Event()
        stages, made = min(STAGES, len(starts)), len(self._free)
        moved = [0] * min(THREADS, stages)  # bytes, by each thread

        def move(start: int, stage: Stage) -> int:
            staged = stage.memory.bytes[:min(PIECE, size - start)]
            if upload:
                device.call(device.cu.cuEventSynchronize, stage.event)
                if read is not None:  # either way, other threads run meanwhile
                    read(start, staged)
                else:
                    np.copyto(staged, host[start:start + staged.nbytes])
            self._enqueue(address + start, stage.memory.address, staged.nbytes, upload)
            device.call(device.cu.cuEventRecord, stage.event, device.stream.handle)
            if not upload:
                device.call(device.cu.cuEventSynchronize, stage.event)
                np.copyto(host[start:start + staged.nbytes], staged)
            return staged.nbytes

        def work(number: int) -> None:
            device.enter()
            while starts and not stopped.is_set():
                try:
                    start = starts.popleft()
                except IndexError:  # another thread was quicker
                    break
                stage = self._free.popleft()  # there are at least as many as threads that run
                try:
                    moved[number] += move(start, stage)
                finally:
                    self._free.append(stage)

        with ThreadPoolExecutor(len(moved), "nitinol-transfer") as threads:
            running: list[Future[None]] = []
            try:
                # Pinning is slow (5.6 GB/s, by however many threads): one buffer after another, so that each is of use
                # at once. If threads pin their own, all of them get there last, and the link is idle until then.
                for number in range(stages):
                    if not starts:
                        break
                    if number >= made:
                        self._free.appendleft(self._stage())
                    if number < len(moved):
                        running.append(threads.submit(work, number))
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
        return Stage(self._pinned(), self._device.event("DISABLE_TIMING", "BLOCKING_SYNC"))

    def _pinned(self) -> Registered | Pinned:
        """Memory of one piece, on huge pages if the host's own can be pinned."""
        mapping = map_memory(PIECE + HUGE_PAGE)  # what is never touched takes no memory
        begin = -mapping.ctypes.data % HUGE_PAGE
        try:
            return Registered(self._device, mapping[begin:begin + PIECE])
        except CudaError:
            return Pinned(self._device, PIECE)


def _reader(view: np.ndarray) -> Callable[[int, np.ndarray], None] | None:
    """If `view` (uint8) lies in a mapping that keeps its file open: a function that fills an array with what the view
    has from byte `start` on. It raises OSError, with the file's name, if the file cannot be read or has become too
    short; through the mapping, this would end the process."""
    owner: Any = view
    while isinstance(owner, (np.ndarray, memoryview)):
        owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
    if not isinstance(owner, FileMapping) or not hasattr(os, "preadv"):
        return None
    offset = view.ctypes.data - np.frombuffer(owner, np.uint8).ctypes.data
    descriptor, path, size = owner.descriptor, str(owner.path), len(owner)

    def read(start: int, target: np.ndarray) -> None:
        done = 0
        while done < target.nbytes:
            try:
                count = os.preadv(descriptor, [target[done:]], offset + start + done)
            except OSError as error:
                raise OSError(error.errno, error.strerror, path) from None
            if not count:
                left = os.fstat(descriptor).st_size
                raise OSError(f"{path} has {left} bytes now, but had {size} when it was opened; another program has "
                              "cut it short, load it again when it is whole")
            done += count

    return read

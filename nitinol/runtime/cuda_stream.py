"""The stream that a CUDA device's work goes through, in order of submission."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any, NamedTuple

from nitinol.runtime.cuda_driver import CudaError, call
from nitinol.runtime.cuda_graph import Encoded

SPIN_NS = 20_000_000  # a wait spins that long after the submission, then sleeps for 1/64 of the time since
NOT_READY = 600
MOST_IN_FLIGHT = 64


class Stream:
    """submitted, done: the number of the latest submission, and of the latest that is known to have run."""

    def __init__(self, device: Any):
        self._device, self._lock = device, threading.RLock()
        self.handle = call(device.cu.cuStreamCreate, 0)
        self.submitted = self.done = 0
        self.failed: dict[int, tuple[str, int]] = {}  # submission: what it reported, the thread that submitted it
        self._in_flight: deque[_Submission] = deque()
        self._idle_events: list[Any] = []

    def submit(self, encoded: Encoded) -> int:
        """Starts the graphs of a list after all before; its number."""
        device, cu = self._device, self._device.cu
        with self._lock:
            if len(self._in_flight) > MOST_IN_FLIGHT:  # nobody waits: notice what is done
                self.poll(self._in_flight[0].sequence)
            event = self._idle_events.pop() if self._idle_events else device.event("DISABLE_TIMING")
            sequence, encoded.submitted = self.submitted + 1, time.monotonic_ns()
            for graph, names in zip(encoded.graphs, encoded.names):
                device.call(cu.cuGraphLaunch, graph, self.handle, what="kernels " + ", ".join(names[:6]),
                            names=names if encoded.blocking else ())
                if encoded.blocking:
                    device.call(cu.cuStreamSynchronize, self.handle, names=names)
            device.call(cu.cuEventRecord, event, self.handle)
            self._in_flight.append(_Submission(sequence, event, encoded, encoded.submitted, [], threading.get_ident()))
            self.submitted = encoded.sequence = sequence
        return sequence

    def poll(self, sequence: int) -> bool:
        """Whether a submission has run."""
        if sequence > self.done:
            device = self._device
            device.enter()
            with self._lock:
                while self._in_flight and self._in_flight[0].sequence <= sequence:
                    asked = next(s for s in self._in_flight if s.sequence >= sequence)
                    status = device.cu.cuEventQuery(asked.event)[0]
                    if status == NOT_READY:
                        return False
                    if status:
                        raise device.explained(CudaError(device.cu.cuEventQuery, status))
                    while self.done < sequence:
                        ended = self._in_flight[0]
                        if report := ended.encoded.report():
                            self.failed[ended.sequence] = report, ended.thread
                        self.done = ended.sequence
                        self._idle_events.append(self._in_flight.popleft().event)
        return True

    def wait_slice(self, sequence: int, nanoseconds: int) -> None:
        """Polls: CUDA's own wait is deaf to Ctrl-C, and a sleep takes 60 µs at least, too much for short lists."""
        end = time.monotonic_ns() + nanoseconds
        begun = next((s.time for s in tuple(self._in_flight) if s.sequence >= sequence), 0)
        while not self.poll(sequence) and (now := time.monotonic_ns()) < end:
            if now - begun > SPIN_NS:
                time.sleep(min((now - begun) / 64e9, (end - now) / 1e9, 0.01))

    def keep(self, owner: Any) -> None:
        """Something must not go before the latest submission has run."""
        for submission in tuple(self._in_flight)[-1:]:
            submission.kept.append(owner)

    def kernels(self) -> list[str]:
        """The names of those in flight."""
        return list(dict.fromkeys(name for s in self._in_flight for names in s.encoded.names for name in names))


class _Submission(NamedTuple):
    sequence: int
    event: Any
    encoded: Encoded
    time: int  # of the submission, by time.monotonic_ns
    kept: list[Any]
    thread: int  # that submitted it

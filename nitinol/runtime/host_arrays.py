"""Arrays of other libraries as a kernel's arguments: where their memory lies, and a copy of it on a device that does
not see the host's."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from nitinol.runtime.device import Buffer, DeviceError
from nitinol.runtime.hazards import Span


def host_span(array: Any) -> Span | None:
    """First and last + 1 byte address of a host array's memory; None if its size is not known."""
    if isinstance(array, np.ndarray):
        from numpy.lib.array_utils import byte_bounds

        return byte_bounds(array)
    if hasattr(array, "untyped_storage"):  # torch
        storage = array.untyped_storage()
        return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    if hasattr(array, "__nitinol_pointer__") and hasattr(array, "nbytes"):
        start = array.__nitinol_pointer__[0]
        return start, start + array.nbytes
    return None


class HostMemory:
    """The memory of host arrays on another device: each piece once, also if several arrays look at it."""

    def __init__(self, device: Any, spans: Sequence[tuple[int, int, bool]]) -> None:
        """spans: of each array first byte, last + 1, and whether the kernel stores to it."""
        self.pieces: list[list[Any]] = []  # the same of each piece, and its buffer
        for start, end, stored in sorted(spans):
            if self.pieces and start < self.pieces[-1][1]:
                last = self.pieces[-1]
                last[1], last[2] = max(last[1], end), last[2] or stored
            else:
                self.pieces.append([start, end, stored])
        for piece in self.pieces:
            start, end, _ = piece
            shift = start % 64  # so that what is known of the address's divisors stays true
            buffer = device.allocate(shift + end - start).view(shift)
            buffer.write(_bytes(start, end))
            piece.append(buffer)

    def buffer(self, address: int) -> Buffer:
        """Where the device finds what the host has at this address."""
        start, _, _, buffer = next(p for p in self.pieces if p[0] <= address < max(p[1], p[0] + 1))
        return buffer.view(address - start)

    def fetch(self) -> None:
        """Brings back what the kernel may have written."""
        for start, end, stored, buffer in self.pieces:
            if stored:
                _bytes(start, end)[:] = buffer.read()


def known_span(array: Any, device: Any) -> Span:
    """host_span, or DeviceError because the array cannot be copied to the device."""
    span = host_span(array)
    if span is None:
        raise DeviceError(f"the size of {array!r:.40} is not known, so that it cannot be copied to device "
                          f"{device.name!r}; give a NumPy array")  # fmt: skip
    return span


def _bytes(start: int, end: int) -> np.ndarray:
    """The host's memory from one address to another."""
    return np.frombuffer((ctypes.c_uint8 * (end - start)).from_address(start), np.uint8)

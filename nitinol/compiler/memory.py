"""The memory that an interpreted kernel sees: the caller's buffers, with every access checked.

A pointer is an int64 that carries the number of its buffer in the 16 bits above the address (user space ends below
2**47), so that it cannot stray into a neighbouring buffer unnoticed. Number 0 means that the pointer was made from an
integer; its buffer is then searched for by address.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from nitinol.compiler.semantics import Array, from_memory, memory_dtype, to_memory
from nitinol.language.types import DType

_ADDRESS_BITS = 48
_ADDRESS = np.int64((1 << _ADDRESS_BITS) - 1)


@dataclass(frozen=True)
class Region:
    """Raw memory that a kernel may touch: [address, address + nbytes).

    As a pointer argument it points to `pointer`, or to `address` if that is None.
    """

    address: int
    nbytes: int
    pointer: int | None = None
    writable: bool = True


class Fault(Exception):
    """An access that is not allowed: `position` among the pointers of the access, and what is wrong with it."""

    def __init__(self, position: int, problem: str) -> None:
        super().__init__(problem)
        self.position = position


class _Buffer:
    def __init__(self, name: str, region: Region, owner: Any = None) -> None:
        self.name, self.writable = name, region.writable
        self.start, self.stop = region.address, region.address + region.nbytes
        self.pointer = region.address if region.pointer is None else region.pointer  # to element 0
        self.owner = owner  # the memory lives as long as this
        raw = (ctypes.c_ubyte * region.nbytes).from_address(region.address) if region.nbytes else b""
        self.bytes = np.frombuffer(raw, np.uint8)

    def elements(self, dtype: np.dtype) -> np.ndarray:
        return self.bytes[: len(self.bytes) // dtype.itemsize * dtype.itemsize].view(dtype)


def plain_address(pointers: Array) -> Array:
    """The address without the buffer's number."""
    return np.bitwise_and(pointers, _ADDRESS)


class Memory:
    """The buffers of one run."""

    def __init__(self) -> None:
        self.buffers: list[_Buffer] = []

    def bind(self, name: str, argument: Any) -> Array:
        """Makes a buffer known and gives the pointer to its first element.

        `argument` is a NumPy array (of any strides), an object with a buffer or `__array_interface__`, or one with
        `address` and `nbytes` (maybe `pointer`, `writable`), as `Region`. Raises TypeError for anything else.
        """
        if hasattr(argument, "address") and hasattr(argument, "nbytes"):
            options = {name: getattr(argument, name) for name in ("pointer", "writable") if hasattr(argument, name)}
            buffer = _Buffer(name, Region(argument.address, argument.nbytes, **options), argument)
        else:
            array = _as_array(argument)
            if array is None or array.dtype.hasobject:
                raise TypeError(f"{name} is a pointer: expected an array or a buffer, got {type(argument).__name__}")
            spans = [(extent - 1) * stride for extent, stride in zip(array.shape, array.strides)]
            start = array.ctypes.data + sum(span for span in spans if span < 0)
            nbytes = sum(map(abs, spans)) + array.itemsize if array.size else 0
            buffer = _Buffer(name, Region(start, nbytes, array.ctypes.data, array.flags.writeable), array)
        self.buffers.append(buffer)
        return np.asarray(buffer.pointer + (len(self.buffers) << _ADDRESS_BITS), np.int64)

    def read(self, pointers: np.ndarray, element: DType) -> Array:
        """The values at flat pointers. Raises Fault."""
        dtype = memory_dtype(element)
        raw = np.empty(len(pointers), dtype)
        for chosen, buffer, offset in self._accesses(pointers, element):
            if offset.size and (offset & (dtype.itemsize - 1)).any():  # not aligned: byte by byte
                raw[chosen] = buffer.bytes[offset[:, None] + np.arange(dtype.itemsize)].view(dtype)[:, 0]
            else:
                raw[chosen] = buffer.elements(dtype)[offset // dtype.itemsize]
        return from_memory(raw, element)

    def write(self, pointers: np.ndarray, values: np.ndarray, element: DType) -> None:
        """Stores as many values as pointers; nothing if one of them is not allowed. Raises Fault."""
        raw = to_memory(values, element)
        for chosen, buffer, offset in list(self._accesses(pointers, element)):
            if not buffer.writable:
                position = int(np.arange(len(pointers))[chosen][0])
                raise Fault(position, f"{buffer.name or 'a buffer'}, which is read-only")
            if (offset & (raw.itemsize - 1)).any():
                parts = np.ascontiguousarray(raw[chosen])[:, None].view(np.uint8)
                buffer.bytes[offset[:, None] + np.arange(raw.itemsize)] = parts
            else:
                buffer.elements(raw.dtype)[offset // raw.itemsize] = raw[chosen]

    def _accesses(self, pointers: np.ndarray, element: DType) -> Iterator[tuple[Any, _Buffer, np.ndarray]]:
        """Which pointers, their buffer, their offsets in bytes: checked."""
        if not len(pointers):
            return
        addresses, numbers = pointers & _ADDRESS, pointers >> _ADDRESS_BITS
        if not numbers.all():
            for number, buffer in enumerate(self.buffers, 1):
                numbers[(numbers == 0) & (addresses >= buffer.start) & (addresses < buffer.stop)] = number
        one = (numbers == numbers[0]).all()
        for number in numbers[:1] if one else np.unique(numbers):
            chosen = slice(None) if one else np.flatnonzero(numbers == number)
            address = addresses[chosen]
            if not 0 < number <= len(self.buffers):
                position = int(np.argmax(numbers == number))
                raise Fault(position, f"address {int(address[0]):#x}, which is in no buffer of this kernel")
            buffer = self.buffers[number - 1]
            bad = (address < buffer.start) | (address + element.nbytes > buffer.stop)
            if bad.any():
                first = int(np.argmax(bad))
                place = f"{(int(address[first]) - buffer.pointer) / element.nbytes:.12g}"
                length = (buffer.stop - buffer.start) // element.nbytes
                problem = f"element {place} of {buffer.name or 'a buffer'}, which has {length} elements of {element}"
                raise Fault(int(np.arange(len(pointers))[chosen][first]), problem)
            yield chosen, buffer, address - buffer.start


def _as_array(argument: Any) -> np.ndarray | None:
    if isinstance(argument, np.ndarray):
        return argument
    if hasattr(argument, "__array_interface__"):
        return np.asarray(argument)
    try:
        return np.asarray(memoryview(argument))
    except TypeError:
        return None

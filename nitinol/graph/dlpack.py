"""DLPack, the exchange of tensors in memory between libraries: the structures of its version 0.8, by way of ctypes.

NumPy's own functions would do, but for bfloat16, which NumPy does not have and torch does.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np

from nitinol.graph.array import Array, method
from nitinol.graph.nodes import Value
from nitinol.graph.views import layout_of
from nitinol.language.types import DTYPES, DType, bfloat16
from nitinol.runtime import get_device, open_device
from nitinol.runtime.device import Buffer

CPU, CUDA = 1, 2  # kDLCPU, kDLCUDA
_CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4, "bool": 6}
_NAME, _USED = b"dltensor", b"used_dltensor"


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))

_capsule_new = ctypes.pythonapi.PyCapsule_New
_capsule_new.restype, _capsule_new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_capsule_rename = ctypes.pythonapi.PyCapsule_SetName
_capsule_rename.restype, _capsule_rename.argtypes = ctypes.c_int, [ctypes.py_object, ctypes.c_char_p]

_exported: dict[int, Any] = {}  # what the receivers of our tensors still use, by the address of the structure


@_Deleter
def _delete(managed: Any) -> None:
    _exported.pop(ctypes.addressof(managed.contents), None)


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _delete_unused(capsule: int) -> None:
    """Runs when a capsule goes; if nobody took the tensor, its memory is ours to give up."""
    found = ctypes.pythonapi.PyCapsule_IsValid
    found.restype, found.argtypes = ctypes.c_int, [ctypes.c_void_p, ctypes.c_char_p]
    if found(capsule, _NAME):
        pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
            ("PyCapsule_GetPointer", ctypes.pythonapi)
        )(capsule, _NAME)
        _exported.pop(pointer, None)


def to_dlpack(array: Array, copy: bool | None = None) -> Any:
    """A capsule that shares the array's memory; evaluates first.

    copy: True asks for memory of its own. None allows it, and a view with a negative stride needs it, which torch takes
    for a huge one and ends the process; False makes that a BufferError.
    """
    backwards = any(stride < 0 for stride in array.strides)
    if backwards and copy is False:
        raise BufferError(f"an array with strides {array.strides} cannot be exported by DLPack without a copy, because "
                          "receivers expect none that are negative")  # fmt: skip
    if copy or backwards:
        array = array.copy()
    buffer, view = array.buffer, array.layout
    if buffer.read_only:
        raise BufferError("an array on read-only memory cannot be exported by DLPack, which promises writable memory; "
                          "export a copy: array.copy()")  # fmt: skip
    managed = _Managed()
    shape = (ctypes.c_int64 * len(view.shape))(*view.shape)
    strides = (ctypes.c_int64 * len(view.shape))(*view.strides)
    kind = "bfloat" if view.dtype == bfloat16 else view.dtype.kind
    tensor = managed.tensor
    tensor.data = buffer.address + view.offset * view.dtype.nbytes
    tensor.device_type, tensor.device_id = dlpack_device(array)
    tensor.ndim = len(view.shape)
    tensor.code, tensor.bits, tensor.lanes = _CODES[kind], 8 * view.dtype.nbytes, 1
    tensor.shape, tensor.strides, tensor.byte_offset = shape, strides, 0
    managed.deleter = _delete
    address = ctypes.addressof(managed)
    _exported[address] = (managed, shape, strides, array)
    return _capsule_new(address, _NAME, ctypes.cast(_delete_unused, ctypes.c_void_p))


def dlpack_device(array: Array) -> tuple[int, int]:
    """What DLPack calls the place of an array: memory that the host sees is the CPU's."""
    device = array.buffer.device
    return (CPU, 0) if device.host_memory else (CUDA, getattr(device, "index", 0))


class _Owner:
    """Calls the producer's deleter when the last array that uses its memory goes."""

    def __init__(self, address: int) -> None:
        self.managed = _Managed.from_address(address)

    def __del__(self) -> None:
        if self.managed.deleter:
            self.managed.deleter(ctypes.pointer(self.managed))


def from_dlpack(tensor: Any) -> Array:
    """An Array on the memory of a tensor of another library (torch, NumPy, JAX, ...), without a copy where that is
    memory of an NVIDIA GPU, or of the CPU and the current device is the CPU."""
    if isinstance(tensor, Array):
        return tensor
    if not hasattr(tensor, "__dlpack__"):
        raise TypeError(f"from_dlpack: {type(tensor).__name__} has no __dlpack__ method; expected a tensor")
    place = tensor.__dlpack_device__()
    if int(place[0]) not in (CPU, CUDA):
        raise ValueError(f"from_dlpack: the tensor is on device {tuple(map(int, place))}, expected the CPU, (1, 0), or "
                         "CUDA, (2, ...)")  # fmt: skip
    capsule = tensor.__dlpack__()
    address = _capsule_pointer(capsule, _NAME)
    found = _Managed.from_address(address).tensor
    dtype = _dtype(found.code, found.bits, found.lanes)
    shape = tuple(found.shape[i] for i in range(found.ndim))
    size = math.prod(shape)
    if found.strides:
        strides = tuple(found.strides[i] for i in range(found.ndim))
    else:
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(found.ndim))
    _capsule_rename(capsule, _USED)
    owner = _Owner(address)
    reach = [(n - 1) * s for n, s in zip(shape, strides)] if size else []
    low, high = sum(r for r in reach if r < 0), sum(r for r in reach if r > 0) + 1 if size else 0
    start = (found.data or 0) + found.byte_offset + low * dtype.nbytes
    buffer = _foreign(start, (high - low) * dtype.nbytes, owner, int(place[0]))
    value = Value((high - low,), dtype, None, buffer)
    return Array(value, layout_of(dtype, shape, strides, -low))


def _foreign(address: int, nbytes: int, owner: _Owner, place: int) -> Buffer:
    """Another library's memory: as it is on its own device, else a copy on the current one."""
    device = open_device("cuda") if place == CUDA else get_device()
    if place == CUDA or device.target == "cpu":
        return Buffer(device, address, nbytes, owner=owner)
    buffer = device.allocate(nbytes)
    if nbytes:
        buffer.write(np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), np.uint8))
    return buffer


def _dtype(code: int, bits: int, lanes: int) -> DType:
    for dtype in DTYPES.values():
        kind = "bfloat" if dtype == bfloat16 else dtype.kind
        if lanes == 1 and _CODES[kind] == code and 8 * dtype.nbytes == bits:
            return dtype
    raise TypeError(f"from_dlpack: element type (code {code}, {bits} bits, {lanes} lanes) is not one that kernels know")


@method
def __dlpack__(self: Array, stream: Any = None, copy: bool | None = None, **options: Any) -> Any:
    """The memory for another library, without a copy (see `to_dlpack`); in-place updates show on both sides."""
    return to_dlpack(self, copy)


@method
def __dlpack_device__(self: Array) -> tuple[int, int]:
    return dlpack_device(self)

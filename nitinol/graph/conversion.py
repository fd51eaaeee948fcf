"""Arrays from the data of others: NumPy, Python's lists and numbers, libraries with DLPack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nitinol.graph.array import Array, whole_array
from nitinol.graph.dlpack import from_dlpack
from nitinol.graph.dtypes import as_dtype, numpy_dtype, to_bfloat16_bits
from nitinol.graph.nodes import Value
from nitinol.language.types import bfloat16
from nitinol.runtime import get_device


def from_numpy(values: np.ndarray, device: Any = None) -> Array:
    """A NumPy array as an Array on the same memory, without a copy where it is contiguous, native and (for writing in
    place) writable, and the device can use the host's memory; else a copy. Without one, later changes of the NumPy
    array show."""
    dtype = as_dtype(values.dtype)
    device = get_device() if device is None else device
    if dtype == bfloat16:
        values = values.view(np.uint16)
    values = np.ascontiguousarray(values).reshape(values.shape)
    if values.dtype.byteorder == ">":
        values = values.astype(values.dtype.newbyteorder("="))
    return whole_array(Value(values.shape, dtype, None, device.wrap(values)))


def array(values: Any, dtype: Any = None, device: Any = None) -> Array:
    """A new array with a copy of NumPy data, nested lists, numbers, or another array.

    Without `dtype`: NumPy's and torch's types stay; Python floats are float32, integers int32 (int64 if needed).
    """
    if isinstance(values, Array):
        return values.astype(dtype) if dtype is not None else values.copy()
    if hasattr(values, "__dlpack__") and not isinstance(values, np.ndarray):
        found = from_dlpack(values)
        return found.astype(dtype) if dtype is not None and as_dtype(dtype) != found.dtype else found.copy()
    python = not isinstance(values, (np.ndarray, np.generic))
    data = np.asarray(values)
    if python and data.dtype == np.float64:
        data = data.astype(np.float32) if dtype is None else data
    if python and data.dtype == np.int64 and dtype is None and (not data.size or abs(data).max() < 2**31):
        data = data.astype(np.int32)
    target = as_dtype(data.dtype if dtype is None else dtype)
    if target == bfloat16 and data.dtype.name != "bfloat16":
        data = to_bfloat16_bits(data.astype(np.float32))
    elif target != bfloat16:
        data = data.astype(numpy_dtype(target))
    else:
        data = data.view(np.uint16)
    buffer = (get_device() if device is None else device).allocate(data.nbytes)
    buffer.write(data)
    return whole_array(Value(data.shape, target, None, buffer))


def empty(shape: Sequence[int], dtype: Any = "fp32", device: Any = None, shared: bool = False) -> Array:
    """Uninitialised memory as an evaluated array: state to be written in place. shared: see `Device.allocate`."""
    target = as_dtype(dtype)
    value = Value(tuple(int(n) for n in shape), target)
    value.buffer = (get_device() if device is None else device).allocate(value.nbytes, shared)
    return whole_array(value)


def as_operand(value: Any) -> Any:
    """What an operation takes: an Array of whatever holds elements, a plain Python number of numbers, None of None."""
    if value is None or isinstance(value, Array):
        return value
    for kind in (bool, int, float):  # subclasses too: enumerations, NumPy's float64
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, (np.ndarray, np.generic, list, tuple)) or hasattr(value, "__dlpack__"):
        return array(value)
    raise TypeError(f"expected an array or a number, found {value!r} of type {type(value).__name__}")


def asarray(values: Any, dtype: Any = None) -> Array:
    """An Array on the memory of NumPy's or another library's array where possible (no copy), else a new one."""
    if isinstance(values, np.ndarray):
        found = from_numpy(values)
    elif isinstance(values, Array) or hasattr(values, "__dlpack__"):
        found = from_dlpack(values)
    else:
        return array(values, dtype)
    return found if dtype is None else found.astype(dtype)

"""Lazy arrays: a graph of operations, evaluated as one command list of fused and library kernels."""

from nitinol.array import array as _array
from nitinol.array.array import Array, array, empty, evaluate, from_numpy
from nitinol.array.compile import Compiled, compile
from nitinol.array.dtypes import as_dtype
from nitinol.array.launch import InPlace, Output, Strided, launch
from nitinol.array.quantized import QuantizedArray
from nitinol.array.schedule import Record, get_device, set_device

_array._install()

__all__ = [
    "Array", "Compiled", "InPlace", "Output", "QuantizedArray", "Record", "Strided", "array", "as_dtype", "compile",
    "empty", "evaluate", "from_numpy",
    "get_device", "launch", "set_device",
]  # fmt: skip

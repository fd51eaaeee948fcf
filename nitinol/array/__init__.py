"""Lazy arrays: a graph of operations, evaluated as one command list of fused and library kernels."""

# ruff: noqa: F401
from nitinol.array.array import Array
from nitinol.array.compile import Compiled, compile
from nitinol.array.conversion import array, asarray, empty, evaluate, from_numpy
from nitinol.array.dtypes import as_dtype
from nitinol.array.launch import InPlace, Output, Strided, launch
from nitinol.array.operations import *  # noqa: F403
from nitinol.array.program import Record
from nitinol.array.quantized import QuantizedArray
from nitinol.runtime import get_device, set_device

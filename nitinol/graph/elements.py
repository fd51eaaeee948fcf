"""The methods of `Array` that ask for its elements, and what an array tells a kernel that is launched at once."""

from __future__ import annotations

from typing import Any

import numpy as np

from nitinol.graph.array import Array, attribute, method, tracing
from nitinol.graph.dtypes import BlockType, from_bfloat16_bits
from nitinol.graph.evaluation import evaluate_readers, evaluate_values
from nitinol.graph.nodes import Call, root, source_line, state
from nitinol.graph.operation import Form, Operation
from nitinol.graph.program import as_numpy
from nitinol.language.types import DType, bfloat16, int1, uint8
from nitinol.runtime.device import Buffer


def _evaluate_array(self: Array) -> Array:
    """Computes the elements now: one submission, one wait. Returns the array itself."""
    evaluate_values([self.value])
    return self


def _buffer(self: Array) -> Buffer:
    """The device memory of the whole value that this array is a view of; evaluates first."""
    evaluate_values([self.value])
    buffer = root(self.value).buffer
    assert buffer is not None
    return buffer


def _memory(self: Array) -> tuple[int, DType, Buffer]:
    """Address of the first element, its type, and all the memory, for `kernel[grid](array)`; evaluates first."""
    value = root(self.value)
    if value.buffer is None or value.writes or state.tracing is not None:
        evaluate_values([value])
    buffer = value.buffer
    assert buffer is not None
    layout = self.layout
    if isinstance(layout.dtype, BlockType):
        return buffer.address, uint8, buffer
    return buffer.address + layout.offset * layout.dtype.nbytes, layout.dtype, buffer


def _written(self: Array, kernel: str) -> None:
    """Called before a kernel of that name, which runs at once, stores to the memory: computes what was asked of the
    present contents, and tells those who record (gradients). RuntimeError inside a function that `compile` traces,
    which would not repeat it."""
    if state.tracing is not None:
        place = source_line()
        raise RuntimeError(
            f"kernel[grid](...) runs once, while a compiled function is traced ({place.file}:{place.line}); launch "
            "the kernel with nitinol.launch(kernel, grid, ...) there, which becomes a part of the function"
        )
    value = root(self.value)
    if value.readers:
        evaluate_readers(value)
    if state.recorders:
        call = Call(Form(Operation(kernel), {}, [self.layout], [], [0]), (self.value,))
        call.done, call._code = True, source_line()
        for calls in state.recorders:
            calls.append(call)


attribute("evaluate", _evaluate_array)
attribute("buffer", property(_buffer))
attribute("__nitinol_pointer__", property(lambda self: _memory(self)[:2]))
attribute("__nitinol_memory__", _memory)
attribute("__nitinol_written__", _written)


@method
def numpy(self: Array, copy: bool = True) -> np.ndarray:
    """The elements as a NumPy array (bfloat16 as float32, which holds every value of it; blocks as their bytes).

    copy=False: a read-only window on the memory where the type allows, for reading at once: a compiled function's
    next call overwrites its results, and in-place updates show.
    """
    raw = as_numpy(self.buffer, self.view)
    if self.dtype == bfloat16:
        return from_bfloat16_bits(raw)
    raw = raw.view(np.bool_) if self.dtype == int1 else raw
    if copy:
        return raw.copy()
    raw.flags.writeable = False
    return raw


@method
def __array__(self: Array, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    result = self.numpy(copy=copy is not False)
    return result if dtype is None else result.astype(dtype, copy=False)


@method
def item(self: Array) -> Any:
    """The only element as a Python number."""
    if self.size != 1:
        raise ValueError(f"item() of an array of shape {self.shape}, which has {self.size} elements; expected one")
    return self.numpy(copy=False).item()


@method
def tolist(self: Array) -> Any:
    """The elements as nested lists of Python numbers."""
    return self.numpy(copy=False).tolist()


@method
def __repr__(self: Array) -> str:
    if self.is_quantized:
        return f"Array(shape={self.shape}, stored as {self.dtype})"
    if tracing():
        return f"Array(shape={self.shape}, dtype={self.dtype}, not evaluated)"
    text = np.array2string(self.numpy(), separator=", ", prefix="Array(", threshold=200)
    return f"Array({text}, shape={self.shape}, dtype={self.dtype})"

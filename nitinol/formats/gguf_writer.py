"""GGUF files, version 3: the writer. The layout is described in `gguf.py`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nitinol.formats.blocks import lookup
from nitinol.formats.gguf import (
    ARRAY,
    BOOL,
    DEFAULT_ALIGNMENT,
    FLOAT32,
    INT32,
    INT64,
    NUMBERS,
    STRING,
    UINT32,
    UINT64,
)

_TYPE_OF_DTYPE = {dtype: type for type, dtype in NUMBERS.items()}


class TensorSource(NamedTuple):
    """A tensor to be written: `data` is its encoded bytes (an array of any dtype, for F32 the values), or a
    function that yields them in pieces, called when the tensor's turn comes."""

    name: str
    shape: Sequence[int]
    format: str
    data: NDArray[Any] | Callable[[], Iterable[NDArray[Any]]]


def _number(type: int, value: Any) -> bytes:
    return np.array(value, dtype=NUMBERS[type]).tobytes()


def _string(text: str) -> bytes:
    encoded = text.encode()
    return _number(UINT64, len(encoded)) + encoded


def _number_type(values: Sequence[Any], scalar: bool) -> int:
    """llama.cpp's convention: single integers are u32 where they fit, elements of arrays i32."""
    if all(isinstance(v, bool) for v in values):
        return BOOL
    if not all(isinstance(v, int) for v in values):
        return FLOAT32
    low, high = min(values), max(values)
    if scalar and low >= 0 and high < 1 << 32:
        return UINT32
    if low >= -(1 << 31) and high < 1 << 31:
        return INT32
    return UINT64 if low >= 0 and high >= 1 << 63 else INT64


def _typed(value: Any, key: str) -> tuple[int, bytes]:
    """The GGUF type of a Python or NumPy value, and its bytes."""
    if isinstance(value, str):
        return STRING, _string(value)
    if isinstance(value, np.generic) and value.dtype in _TYPE_OF_DTYPE:  # first: np.float64 is a float, too
        return _TYPE_OF_DTYPE[value.dtype], value.tobytes()
    if isinstance(value, (bool, int, float)):
        type = _number_type([value], scalar=True)
        return type, _number(type, value)
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype in _TYPE_OF_DTYPE:
        type, elements = _TYPE_OF_DTYPE[value.dtype], value.tobytes()
    elif isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
        type, elements = STRING, b"".join(map(_string, value))
    elif isinstance(value, (list, tuple)) and all(isinstance(v, (bool, int, float)) for v in value):
        type = _number_type(value, scalar=False)
        elements = np.array(value, dtype=NUMBERS[type]).tobytes()
    elif isinstance(value, (list, tuple)):
        parts = [_typed(v, key) for v in value]
        if any(type != ARRAY for type, _ in parts):
            raise TypeError(f"metadata {key!r} is a list of unlike things, which GGUF cannot hold")
        type, elements = ARRAY, b"".join(part for _, part in parts)
    else:
        raise TypeError(f"metadata {key!r} is a {value.__class__.__name__}, which GGUF cannot hold")
    return ARRAY, _number(UINT32, type) + _number(UINT64, len(value)) + elements


def _pieces(source: TensorSource) -> Iterator[NDArray[np.uint8]]:
    for piece in [source.data] if isinstance(source.data, np.ndarray) else source.data():
        yield np.ascontiguousarray(piece).reshape(-1).view(np.uint8)


def _write(file: BinaryIO, metadata: Mapping[str, Any], tensors: Sequence[TensorSource], alignment: int) -> None:
    header = [b"GGUF", _number(UINT32, 3), _number(UINT64, len(tensors)), _number(UINT64, len(metadata))]
    for key, value in metadata.items():
        type, encoded = _typed(value, key)
        header += [_string(key), _number(UINT32, type), encoded]
    offset = 0
    sizes = []
    for source in tensors:
        layout, shape = lookup(source.format), tuple(source.shape)
        if shape and shape[-1] % layout.values:
            raise ValueError(
                f"tensor {source.name!r} has shape {shape}, but rows of {layout.name} need a multiple of "
                f"{layout.values} values"
            )
        sizes.append(layout.nbytes(math.prod(shape)))
        header += [_string(source.name), _number(UINT32, len(shape))]
        header += [_number(UINT64, n) for n in reversed(shape)]
        header += [_number(UINT32, layout.id), _number(UINT64, offset)]
        offset += -(-sizes[-1] // alignment) * alignment
    file.write(b"".join(header))
    file.write(bytes(-file.tell() % alignment))
    for source, size in zip(tensors, sizes):
        written = 0
        for piece in _pieces(source):
            file.write(piece.data)
            written += piece.size
        if written != size:
            raise ValueError(
                f"tensor {source.name!r} gave {written} bytes, but shape {tuple(source.shape)} in "
                f"{source.format} has {size}"
            )
        file.write(bytes(-size % alignment))


def write_gguf(path: str | os.PathLike[str], metadata: Mapping[str, Any], tensors: Sequence[TensorSource]) -> None:
    """Write a GGUF file (version 3, little-endian), complete or not at all.

    Metadata values: str, bool, int (u32, or the smallest of i32, i64, u64 that fits), float (f32), NumPy
    scalars and one-dimensional arrays (of their own type), and lists of these (integers as i32). Tensors are
    aligned to `metadata["general.alignment"]` (32 without it) and written piece by piece, so that a file may
    be larger than memory. ValueError or TypeError when something does not fit the format.
    """
    path = Path(path)
    alignment = int(metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    if alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment}, expected a power of two")
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            _write(file, metadata, tensors, alignment)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)

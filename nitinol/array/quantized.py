"""Weights that stay as they lie in a file: rows of whole blocks, which kernels decode in registers."""

from __future__ import annotations

import math

from nitinol.array.array import Array
from nitinol.array.graph import Value, whole
from nitinol.language.types import bfloat16, float16, float32, uint8
from nitinol.runtime.device import Buffer

_PLAIN = {"F32": float32, "F16": float16, "BF16": bfloat16}


class QuantizedArray:
    """A matrix (or a stack of them) of `shape` whose elements are encoded in `format`, on a buffer without a copy.

    `data` is what kernels get: an Array of `shape` for F32, F16 and BF16, of bytes [rows..., bytes of a row] for block
    formats. Not a lazy array: kernels and `nitinol.kernels` functions take it.
    """

    def __init__(self, buffer: Buffer, format: str, shape: tuple[int, ...]) -> None:
        self.format = format
        self.shape = tuple(shape)
        rows = math.prod(self.shape[:-1])
        plain = _PLAIN.get(format)
        wanted = math.prod(self.shape) * plain.nbytes if plain is not None else None
        if (wanted is not None and wanted != buffer.nbytes) or (rows and buffer.nbytes % rows):
            expected = f"{wanted} bytes" if wanted is not None else f"a multiple of {rows} bytes"
            raise ValueError(
                f"weights of format {format} and shape {self.shape} lie in {buffer.nbytes} bytes, expected {expected}"
            )
        if plain is not None:
            value = Value(self.shape, plain, None, buffer)
        else:
            value = Value((*self.shape[:-1], buffer.nbytes // rows if rows else 0), uint8, None, buffer)
        self.data = Array(whole(value))

    @property
    def dtype(self) -> str:
        return self.format

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def launch_argument(self) -> Array:
        return self.data

    def __repr__(self) -> str:
        return f"QuantizedArray(shape={self.shape}, format={self.format})"

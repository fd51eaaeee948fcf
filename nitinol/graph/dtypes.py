"""Element types: which NumPy dtype means which type of the tile language, and block formats as storage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nitinol.formats.blocks import FORMATS
from nitinol.language.jit import Dtypes
from nitinol.language.types import DTYPES, DType, bfloat16, float16, float32, int1

_BY_NAME = {**DTYPES, **{name: DTYPES[ours] for name, ours in Dtypes.items()}}
_NUMPY = {DTYPES[ours]: name for name, ours in Dtypes.items()}


def as_dtype(dtype: Any) -> DType:
    """A DType of anything that names one: itself, a NumPy dtype or scalar type, float/int/bool, a text such as
    "float32" or "fp32". Python's int is int32 and float is float32, as in the tile language."""
    if isinstance(dtype, DType):
        return dtype
    if dtype is bool or dtype is int or dtype is float:
        return {bool: int1, int: DTYPES["int32"], float: float32}[dtype]
    name = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.") if "torch" in str(dtype) else None
    if name is None:
        try:
            name = np.dtype(dtype).name
        except TypeError:
            name = str(dtype)
    if name not in _BY_NAME:
        raise TypeError(f"{dtype!r} is not an element type that kernels know; expected one of {', '.join(DTYPES)}")
    return _BY_NAME[name]


def numpy_dtype(dtype: DType) -> np.dtype:
    """The NumPy dtype that `numpy()` gives: the same type; float32 for bfloat16, which NumPy does not have."""
    return np.dtype(np.float32) if dtype == bfloat16 else np.dtype(_NUMPY[dtype])


def to_bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 values rounded to bfloat16 (to nearest, ties to even), as uint16."""
    bits = np.ascontiguousarray(values, np.float32).reshape(np.shape(values)).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def from_bfloat16_bits(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bits (uint16)."""
    return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)


@dataclass(frozen=True)
class BlockType:
    """The storage type of an array whose elements are encoded in blocks (formats/blocks.py): `bytes` hold `values`
    neighbours of a row. Kernels get the bytes and decode them in registers."""

    name: str
    values: int
    bytes: int

    kind = "block"
    is_float = is_int = is_signed = False

    def __repr__(self) -> str:
        return self.name


BLOCK_TYPES = {
    name: BlockType(name, format.values, format.bytes) for name, format in FORMATS.items() if format.values > 1
}
PLAIN_FORMATS = {"F32": float32, "F16": float16, "BF16": bfloat16}  # GGUF's names of plain types
FORMAT_OF = {dtype: name for name, dtype in PLAIN_FORMATS.items()}


def bytes_of(dtype: DType | BlockType, elements: int) -> int:
    """Bytes of so many neighbouring elements."""
    if isinstance(dtype, BlockType):
        return elements // dtype.values * dtype.bytes
    return elements * dtype.nbytes

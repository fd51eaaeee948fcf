"""The types of the tile language: element types, pointers to them, and tiles of either.

Names and promotion order are Triton's (`triton.language.core.dtype`): `int1` is the boolean, `fp16` prints for
`float16`. A type is a value: equal types compare equal and can be dictionary keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class DType:
    """An element type: `kind` is "bool", "int" (signed), "uint" or "float"; `bits` its width."""

    name: str
    kind: str
    bits: int

    @property
    def nbytes(self) -> int:
        return max(1, self.bits // 8)

    @property
    def is_float(self) -> bool:
        return self.kind == "float"

    @property
    def is_int(self) -> bool:
        """True for signed, unsigned and boolean integers."""
        return self.kind != "float"

    @property
    def is_signed(self) -> bool:
        return self.kind == "int"

    def __repr__(self) -> str:
        return self.name


int1 = DType("int1", "bool", 1)
int8, int16, int32, int64 = (DType(f"int{n}", "int", n) for n in (8, 16, 32, 64))
uint8, uint16, uint32, uint64 = (DType(f"uint{n}", "uint", n) for n in (8, 16, 32, 64))
float16 = DType("fp16", "float", 16)
bfloat16 = DType("bf16", "float", 16)
float32 = DType("fp32", "float", 32)
float64 = DType("fp64", "float", 64)

DTYPES = {
    t.name: t
    for t in (int1, int8, int16, int32, int64, uint8, uint16, uint32, uint64, float16, bfloat16, float32, float64)
}


@dataclass(frozen=True)
class PointerType:
    """The address of one element."""

    element: DType

    @property
    def nbytes(self) -> int:
        return 8

    def __repr__(self) -> str:
        return f"*{self.element}"


@dataclass(frozen=True)
class TileType:
    """A block of values; every extent of `shape` is a power of two and there is at least one."""

    element: DType | PointerType
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)

    def __repr__(self) -> str:
        return f"<{'x'.join(map(str, self.shape))}x{self.element}>"


Type = DType | PointerType | TileType


def element_type(type: Type) -> DType | PointerType:
    """The type of one element: of a tile its element's, of a scalar its own."""
    return type.element if isinstance(type, TileType) else type


def shape_of(type: Type) -> tuple[int, ...]:
    """The shape; a scalar's is ()."""
    return type.shape if isinstance(type, TileType) else ()


def with_shape(element: DType | PointerType, shape: tuple[int, ...]) -> Type:
    """A tile of `element`, or the scalar itself when `shape` is ()."""
    return TileType(element, tuple(shape)) if shape else element


def with_element(type: Type, element: DType | PointerType) -> Type:
    """The type of the same shape with another element type."""
    return with_shape(element, shape_of(type))

"""Where a kernel's values come from, and how they change type: program ids, new tiles, casts, selection."""

from __future__ import annotations

from typing import Any

from nitinol.language.core import (
    emit,
    known,
    known_int,
    known_shape,
    member,
    tensor,
    unwrap,
)
from nitinol.language.semantic import bitcast as bitcast_of
from nitinol.language.semantic import (
    cast,
    to_tensor,
)
from nitinol.language.semantic import full as full_of
from nitinol.language.semantic import where as where_of
from nitinol.language.types import (
    DType,
    PointerType,
    TileType,
    int32,
)


def tile(x: Any, what: str) -> tensor:
    """The operand as a tensor; numbers become scalar constants."""
    return to_tensor(x, f"the operand of {what}")


def program_id(axis: int) -> tensor:
    """The index of this program along a grid axis (0, 1 or 2), int32."""
    return emit("program_id", (), int32, axis=_grid_axis(axis, "program_id"))


def num_programs(axis: int) -> tensor:
    """The extent of the grid along an axis, int32."""
    return emit("num_programs", (), int32, axis=_grid_axis(axis, "num_programs"))


def _grid_axis(axis: Any, what: str) -> int:
    axis = known_int(axis, f"the axis of {what}")
    if axis not in (0, 1, 2):
        raise ValueError(f"{what}: the axis must be 0, 1 or 2, found {axis}")
    return axis


def arange(start: int, end: int) -> tensor:
    """The int32 tile start, start + 1, ..., end - 1; end - start must be a power of two."""
    start, end = known_int(start, "the start of arange"), known_int(end, "the end of arange")
    count = end - start
    if count <= 0 or count & (count - 1):
        raise ValueError(f"arange({start}, {end}): end - start must be a power of two, found {count}")
    if start < -(2**31) or end > 2**31:
        raise ValueError(f"arange({start}, {end}) does not fit into int32")
    known_shape((count,), "arange")
    return emit("arange", (), TileType(int32, (count,)), start=start, end=end)


def full(shape: Any, value: Any, dtype: Any) -> tensor:
    """A tile filled with one number or run-time scalar."""
    return full_of(known_shape(shape, "full"), unwrap(value), known_dtype(dtype, "full"))


def zeros(shape: Any, dtype: Any) -> tensor:
    """A tile of zeros."""
    return full_of(known_shape(shape, "zeros"), 0, known_dtype(dtype, "zeros"))


def known_dtype(dtype: Any, what: str) -> DType | PointerType:
    """An element type given as such (also as a constexpr), else TypeError."""
    dtype = known(dtype, f"the dtype of {what}")
    if not isinstance(dtype, (DType, PointerType)):
        raise TypeError(f"{what}: expected a type such as tl.float32, found {dtype!r}")
    return dtype


@member
def to(x: tensor, dtype: Any, fp_downcast_rounding: Any = None, bitcast: bool = False) -> tensor:
    """The values converted to `dtype`, or with `bitcast` their bits read as that type of the same width."""
    target = known_dtype(dtype, "to")
    if known(fp_downcast_rounding, "fp_downcast_rounding") not in (None, "rtne"):
        raise ValueError(f"to: only rounding to nearest ('rtne') is supported, found {fp_downcast_rounding!r}")
    return bitcast_of(x, target) if known(bitcast, "bitcast") else cast(x, target)


def cast_to(input: Any, dtype: Any, fp_downcast_rounding: Any = None, bitcast: bool = False) -> tensor:
    """`tl.cast(x, dtype)`: `x.to(dtype)`, also of a number."""
    return to(tile(input, "cast"), dtype, fp_downcast_rounding, bitcast)


setattr(tensor, "cast", cast_to)  # noqa: B010


def where(condition: Any, x: Any, y: Any) -> tensor:
    """x where the condition is true, else y; the three broadcast, x and y promote. Both are computed."""
    return where_of(condition, x, y)

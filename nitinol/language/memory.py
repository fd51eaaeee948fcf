"""Loads, stores and atomic operations on tiles of pointers."""

from __future__ import annotations

from typing import Any

from nitinol.language.core import (
    emit,
    emit_many,
    member,
    tensor,
)
from nitinol.language.operations import tile
from nitinol.language.semantic import (
    broadcast,
    broadcast_shapes,
    cast,
    is_number,
    to_tensor,
    truth,
)
from nitinol.language.semantic import broadcast_to as broadcast_to_shape
from nitinol.language.types import (
    DType,
    PointerType,
    int1,
    with_element,
    with_shape,
)


def load(
    pointer: Any,
    mask: Any = None,
    other: Any = None,
    boundary_check: Any = (),
    padding_option: str = "",
    cache_modifier: str = "",
    eviction_policy: str = "",
    volatile: bool = False,
) -> tensor:
    """The values at a tile of pointers (or at one pointer), where `mask` is true; elsewhere `other`.

    Without `other` masked-off lanes are unspecified. The caching hints of Triton are accepted and ignored.
    """
    if isinstance(pointer, tuple):  # a block pointer, a layer above
        from nitinol.language.block_pointer import load_block

        if mask is not None or other is not None:
            raise ValueError("load: a block pointer takes boundary_check, not mask and other")
        return load_block(pointer, boundary_check, padding_option)  # type: ignore[arg-type]
    p = _pointers(pointer, "load")
    if boundary_check or padding_option:
        raise ValueError("load: boundary_check and padding_option belong to block pointers (tl.make_block_ptr)")
    if mask is None and other is not None:
        raise ValueError("load: `other` was given without `mask`")
    if mask is None:
        return emit("load", (p,), with_element(p.type, p.dtype.element))  # type: ignore[union-attr]
    p, m = _masked(p, mask, "load")
    operands = [p, m]
    element = p.dtype.element  # type: ignore[union-attr]
    if other is not None:
        operands.append(_fill(other, element, p.shape, "load"))
    return emit("load", operands, with_element(p.type, element))


def store(
    pointer: Any,
    value: Any,
    mask: Any = None,
    boundary_check: Any = (),
    cache_modifier: str = "",
    eviction_policy: str = "",
) -> None:
    """Writes values, cast to the pointers' element type, where `mask` is true."""
    if isinstance(pointer, tuple):
        from nitinol.language.block_pointer import store_block

        if mask is not None:
            raise ValueError("store: a block pointer takes boundary_check, not mask")
        return store_block(pointer, value, boundary_check)  # type: ignore[arg-type]
    p = _pointers(pointer, "store")
    if boundary_check:
        raise ValueError("store: boundary_check belongs to block pointers (tl.make_block_ptr)")
    operands = [p, _fill(value, p.dtype.element, p.shape, "store")]  # type: ignore[union-attr]
    if mask is not None:
        operands.append(_mask(mask, p.shape, "store"))
    emit_many("store", operands, ())


def _pointers(pointer: Any, what: str) -> tensor:
    if not isinstance(pointer, tensor) or not isinstance(pointer.dtype, PointerType):
        raise TypeError(f"{what} takes a pointer or a tile of pointers, found {pointer!r}")
    return pointer


def _masked(p: tensor, mask: Any, what: str) -> tuple[tensor, tensor]:
    """A load's pointers and mask in one shape: either may be the one that grows."""
    m = truth(tile(mask, f"{what} (mask)"))
    if m.shape and not p.shape:
        raise ValueError(f"{what}: the mask has shape {m.shape}, but the pointer is a scalar")
    return broadcast(p, m, f"{what} (pointer and mask)")


def _mask(mask: Any, shape: tuple[int, ...], what: str) -> tensor:
    m = truth(tile(mask, f"{what} (mask)"))
    return _fit(m, shape, f"the mask of {what}")


def _fill(value: Any, element: DType | PointerType, shape: tuple[int, ...], what: str) -> tensor:
    """A number or tensor as a tile of that element type and shape."""
    if is_number(value) and isinstance(element, DType):
        value = _number(value, element)
    return _fit(cast(tile(value, what), element), shape, f"the value of {what}")


def _number(value: int | float, element: DType) -> tensor:
    """A number in the element type; one that does not fit is cast at run time, as in Triton."""
    if element.is_float or (isinstance(value, int) and element != int1 and _in_range(value, element)):
        return emit("constant", (), element, value=float(value) if element.is_float else int(value))
    return to_tensor(value)


def _in_range(value: int | float, element: DType) -> bool:
    low = -(1 << (element.bits - 1)) if element.is_signed else 0
    return low <= value < low + (1 << element.bits)


def _fit(x: tensor, shape: tuple[int, ...], what: str) -> tensor:
    if x.shape == shape:
        return x
    if len(x.shape) > len(shape) or broadcast_shapes(x.shape, shape, what) != shape:
        raise ValueError(f"{what} has shape {x.shape}, but the pointers have shape {shape}")
    if x.shape and len(x.shape) < len(shape):
        x = emit("reshape", (x,), with_shape(x.dtype, (1,) * (len(shape) - len(x.shape)) + x.shape))
    return broadcast_to_shape(x, shape, what)


def _atomic(kind: str, pointer: Any, value: Any, mask: Any) -> tensor:
    what = f"atomic_{kind}"
    p = _pointers(pointer, what)
    element = p.dtype.element  # type: ignore[union-attr]
    if element.bits < 32 and not (kind == "add" and element.is_float):
        raise TypeError(f"{what} does not support {element}")
    if element.is_float and kind in ("and", "or", "xor"):
        raise TypeError(f"{what} takes integers, found {element}")
    operands = [p, _fill(value, element, p.shape, what)]
    if mask is not None:
        operands.append(_mask(mask, p.shape, what))
    return emit("atomic_rmw", operands, with_element(p.type, element), kind=kind)


@member
def atomic_add(pointer: Any, val: Any, mask: Any = None, sem: Any = None, scope: Any = None) -> tensor:
    """Adds to memory atomically where `mask` is true; returns what was there before."""
    return _atomic("add", pointer, val, mask)


@member
def atomic_max(pointer: Any, val: Any, mask: Any = None, sem: Any = None, scope: Any = None) -> tensor:
    """Stores the maximum of memory and `val` atomically; returns what was there before."""
    return _atomic("max", pointer, val, mask)


@member
def atomic_min(pointer: Any, val: Any, mask: Any = None, sem: Any = None, scope: Any = None) -> tensor:
    """Stores the minimum of memory and `val` atomically; returns what was there before."""
    return _atomic("min", pointer, val, mask)


@member
def atomic_and(pointer: Any, val: Any, mask: Any = None, sem: Any = None, scope: Any = None) -> tensor:
    """Bitwise and with memory, atomically; returns what was there before."""
    return _atomic("and", pointer, val, mask)


@member
def atomic_or(pointer: Any, val: Any, mask: Any = None, sem: Any = None, scope: Any = None) -> tensor:
    """Bitwise or with memory, atomically; returns what was there before."""
    return _atomic("or", pointer, val, mask)


@member
def atomic_xor(pointer: Any, val: Any, mask: Any = None, sem: Any = None, scope: Any = None) -> tensor:
    """Bitwise exclusive or with memory, atomically; returns what was there before."""
    return _atomic("xor", pointer, val, mask)


@member
def atomic_xchg(pointer: Any, val: Any, mask: Any = None, sem: Any = None, scope: Any = None) -> tensor:
    """Stores `val` atomically; returns what was there before."""
    return _atomic("xchg", pointer, val, mask)


@member
def atomic_cas(pointer: Any, cmp: Any, val: Any, sem: Any = None, scope: Any = None) -> tensor:
    """Stores `val` where memory equals `cmp`, atomically; returns what was there before."""
    p = _pointers(pointer, "atomic_cas")
    element = p.dtype.element  # type: ignore[union-attr]
    if element.bits < 16:
        raise TypeError(f"atomic_cas takes elements of 16, 32 or 64 bits, found {element}")
    expected, desired = (_fill(v, element, p.shape, "atomic_cas") for v in (cmp, val))
    return emit("atomic_cas", (p, expected, desired), with_element(p.type, element))

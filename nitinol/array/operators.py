"""The operators and methods of `Array` that are functions of other modules, by the same names."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from nitinol.array.array import Array


@functools.cache
def _functions() -> ModuleType:
    from nitinol.array import operations  # these modules need `Array` themselves

    return operations


def _fits(value: Any) -> bool:
    """Whether an operator takes it; else Python tries the other operand's method."""
    known = (Operators, bool, int, float, np.ndarray, np.generic, list)
    return isinstance(value, known) or hasattr(value, "__dlpack__")


class Operators:
    """Base class of Array."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __add__(self, other: Any) -> Array:
        return _functions().add(self, other) if _fits(other) else NotImplemented

    def __radd__(self, other: Any) -> Array:
        return _functions().add(other, self) if _fits(other) else NotImplemented

    def __sub__(self, other: Any) -> Array:
        return _functions().subtract(self, other) if _fits(other) else NotImplemented

    def __rsub__(self, other: Any) -> Array:
        return _functions().subtract(other, self) if _fits(other) else NotImplemented

    def __mul__(self, other: Any) -> Array:
        return _functions().multiply(self, other) if _fits(other) else NotImplemented

    def __rmul__(self, other: Any) -> Array:
        return _functions().multiply(other, self) if _fits(other) else NotImplemented

    def __truediv__(self, other: Any) -> Array:
        return _functions().divide(self, other) if _fits(other) else NotImplemented

    def __rtruediv__(self, other: Any) -> Array:
        return _functions().divide(other, self) if _fits(other) else NotImplemented

    def __floordiv__(self, other: Any) -> Array:
        return _functions().floor_divide(self, other) if _fits(other) else NotImplemented

    def __rfloordiv__(self, other: Any) -> Array:
        return _functions().floor_divide(other, self) if _fits(other) else NotImplemented

    def __mod__(self, other: Any) -> Array:
        return _functions().mod(self, other) if _fits(other) else NotImplemented

    def __rmod__(self, other: Any) -> Array:
        return _functions().mod(other, self) if _fits(other) else NotImplemented

    def __pow__(self, other: Any) -> Array:
        return _functions().power(self, other) if _fits(other) else NotImplemented

    def __rpow__(self, other: Any) -> Array:
        return _functions().power(other, self) if _fits(other) else NotImplemented

    def __and__(self, other: Any) -> Array:
        return _functions().bitwise_and(self, other) if _fits(other) else NotImplemented

    def __rand__(self, other: Any) -> Array:
        return _functions().bitwise_and(other, self) if _fits(other) else NotImplemented

    def __or__(self, other: Any) -> Array:
        return _functions().bitwise_or(self, other) if _fits(other) else NotImplemented

    def __ror__(self, other: Any) -> Array:
        return _functions().bitwise_or(other, self) if _fits(other) else NotImplemented

    def __xor__(self, other: Any) -> Array:
        return _functions().bitwise_xor(self, other) if _fits(other) else NotImplemented

    def __rxor__(self, other: Any) -> Array:
        return _functions().bitwise_xor(other, self) if _fits(other) else NotImplemented

    def __lshift__(self, other: Any) -> Array:
        return _functions().left_shift(self, other) if _fits(other) else NotImplemented

    def __rlshift__(self, other: Any) -> Array:
        return _functions().left_shift(other, self) if _fits(other) else NotImplemented

    def __rshift__(self, other: Any) -> Array:
        return _functions().right_shift(self, other) if _fits(other) else NotImplemented

    def __rrshift__(self, other: Any) -> Array:
        return _functions().right_shift(other, self) if _fits(other) else NotImplemented

    def __matmul__(self, other: Any) -> Array:
        return _functions().matmul(self, other) if _fits(other) else NotImplemented

    def __rmatmul__(self, other: Any) -> Array:
        return _functions().matmul(other, self) if _fits(other) else NotImplemented

    def __eq__(self, other: Any) -> Array:  # type: ignore[override]
        return _functions().equal(self, other) if _fits(other) else NotImplemented

    def __ne__(self, other: Any) -> Array:  # type: ignore[override]
        return _functions().not_equal(self, other) if _fits(other) else NotImplemented

    def __lt__(self, other: Any) -> Array:
        return _functions().less(self, other) if _fits(other) else NotImplemented

    def __le__(self, other: Any) -> Array:
        return _functions().less_equal(self, other) if _fits(other) else NotImplemented

    def __gt__(self, other: Any) -> Array:
        return _functions().greater(self, other) if _fits(other) else NotImplemented

    def __ge__(self, other: Any) -> Array:
        return _functions().greater_equal(self, other) if _fits(other) else NotImplemented

    def __neg__(self) -> Array:
        return _functions().negative(self)

    def __abs__(self) -> Array:
        return _functions().abs(self)

    def __invert__(self) -> Array:
        return _functions().invert(self)

    def exp(self) -> Array:
        return _functions().exp(self)

    def log(self) -> Array:
        return _functions().log(self)

    def sqrt(self) -> Array:
        return _functions().sqrt(self)

    def rsqrt(self) -> Array:
        return _functions().rsqrt(self)

    def sin(self) -> Array:
        return _functions().sin(self)

    def cos(self) -> Array:
        return _functions().cos(self)

    def tanh(self) -> Array:
        return _functions().tanh(self)

    def sigmoid(self) -> Array:
        return _functions().sigmoid(self)

    def square(self) -> Array:
        return _functions().square(self)

    def copy(self) -> Array:
        return _functions().copy(self)

    def contiguous(self) -> Array:
        return _functions().contiguous(self)

    def clip(self, low: Any = None, high: Any = None) -> Array:
        return _functions().clip(self, low, high)

    def astype(self, dtype: Any) -> Array:
        """The elements converted to another type."""
        return _functions().astype(self, dtype)

    def sum(self, axis: Any = None, keepdims: bool = False) -> Array:
        return _functions().sum(self, axis, keepdims)

    def mean(self, axis: Any = None, keepdims: bool = False) -> Array:
        return _functions().mean(self, axis, keepdims)

    def max(self, axis: Any = None, keepdims: bool = False) -> Array:
        return _functions().max(self, axis, keepdims)

    def min(self, axis: Any = None, keepdims: bool = False) -> Array:
        return _functions().min(self, axis, keepdims)

    def prod(self, axis: Any = None, keepdims: bool = False) -> Array:
        return _functions().prod(self, axis, keepdims)

    def any(self, axis: Any = None, keepdims: bool = False) -> Array:
        return _functions().any(self, axis, keepdims)

    def all(self, axis: Any = None, keepdims: bool = False) -> Array:
        return _functions().all(self, axis, keepdims)

    def var(self, axis: Any = None, keepdims: bool = False) -> Array:
        return _functions().var(self, axis, keepdims)

    def std(self, axis: Any = None, keepdims: bool = False) -> Array:
        return _functions().std(self, axis, keepdims)

    def argmax(self, axis: int | None = None, keepdims: bool = False) -> Array:
        return _functions().argmax(self, axis, keepdims)

    def argmin(self, axis: int | None = None, keepdims: bool = False) -> Array:
        return _functions().argmin(self, axis, keepdims)

    def take(self, indices: Any, axis: int = 0) -> Array:
        return _functions().take(self, indices, axis)

    def update_slice(self, value: Array, start: Any, axis: int = 0) -> Array:
        """Replaces a slice along an axis in place (see `update_slice`); returns the array."""
        return _functions().update_slice(self, value, start, axis)

    def __dlpack__(self, stream: Any = None, copy: bool | None = None, **options: Any) -> Any:
        """The memory for another library, without a copy (see dlpack.py); in-place updates show on both sides."""
        return _functions().to_dlpack(self, copy)

    def __dlpack_device__(self) -> tuple[int, int]:
        return _functions().dlpack_device(self)

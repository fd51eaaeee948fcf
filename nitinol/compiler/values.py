"""Values of a kernel during compilation: tensors, plain objects, and tuples of both; taken apart and put together."""

from __future__ import annotations

from typing import Any

from nitinol.language.core import tensor
from nitinol.language.semantic import constant, is_number, to_tensor
from nitinol.language.types import int32


def as_run_time(value: Any) -> Any:
    """Numbers become run-time scalars, also inside tuples: what assignment and `return` do in Triton."""
    if isinstance(value, (tuple, list)):
        parts = [as_run_time(v) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return constant_like(value) if is_number(value) else value


def constant_like(value: Any) -> tensor:
    return to_tensor(value) if type(value) is not int or not -(2**31) <= value < 2**31 else constant(value, int32)


def run_time(value: Any) -> bool:
    """Whether a value can pass through a run-time loop: it has tensors, and no number that could change."""
    return bool(flatten(value)) and not has_numbers(value)


def has_numbers(value: Any) -> bool:
    return any(map(has_numbers, value)) if isinstance(value, tuple) else is_number(value)


def flatten(value: Any) -> list[tensor]:
    """The tensors of a value, in order."""
    if isinstance(value, tuple):
        return [t for v in value for t in flatten(v)]
    return [value] if isinstance(value, tensor) else []


def unflatten(template: Any, tensors: Any) -> Any:
    """A value of the template's form with other tensors."""
    if isinstance(template, tuple):
        parts = [unflatten(v, tensors) for v in template]
        return type(template)(*parts) if hasattr(template, "_fields") else tuple(parts)
    return next(tensors) if isinstance(template, tensor) else template


def structure(value: Any) -> Any:
    """What two values must share to be exchangeable at run time: types of tensors, known values themselves."""
    if isinstance(value, tuple):
        return tuple(map(structure, value))
    return value.type if isinstance(value, tensor) else ("known", type(value), value)


def same_constant(a: Any, b: Any) -> bool:
    return not isinstance(a, (tensor, tuple)) and type(a) is type(b) and bool(a == b)


def describe_value(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(describe_value, value))})"
    return str(value.type) if isinstance(value, tensor) else repr(value)


def named(name: str, value: Any) -> Any:
    for part in flatten(value):
        if not part.handle.name:
            part.handle.name = name
    return value

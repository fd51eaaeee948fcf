"""Assertions and printing, at compile time and at run time, and the hints of Triton that need no action here."""

from __future__ import annotations

from typing import Any

from nitinol.language.core import (
    emit_many,
    known,
    unwrap,
)
from nitinol.language.operations import tile
from nitinol.language.semantic import (
    truth,
)


def static_assert(cond: Any, msg: Any = "") -> None:
    """Stops the compilation with `msg` unless a condition known at compile time holds."""
    if not known(cond, "the condition of static_assert"):
        raise AssertionError(f"static_assert failed: {unwrap(msg)}" if msg else "static_assert failed")


def static_print(*values: Any, sep: str = " ", end: str = "\n", file: Any = None, flush: bool = False) -> None:
    """Prints while the kernel is compiled."""
    print(*values, sep=sep, end=end, file=file, flush=flush)


def device_print(prefix: Any, *args: Any, hex: Any = False) -> None:
    """Prints values while the kernel runs, after a text known at compile time."""
    if not isinstance(prefix, str):
        prefix, args = "", (prefix, *args)
    operands = [tile(a, "device_print") for a in args]
    emit_many("device_print", operands, (), prefix=prefix, hex=bool(known(hex, "hex")))


def device_assert(cond: Any, msg: Any = "", mask: Any = None) -> None:
    """Stops the run with `msg` if a condition does not hold in some lane where `mask` is true."""
    condition = truth(cond)
    if mask is not None:
        condition = condition | ~truth(mask)
    emit_many("assert", (condition,), (), message=str(known(msg, "the message of device_assert")))


def assume(cond: Any) -> None:
    """A promise to the compiler; nothing is checked."""


def multiple_of(input: Any, values: Any) -> Any:
    """A promise that values are multiples; the compiler's own analysis is used instead."""
    return input


def max_contiguous(input: Any, values: Any) -> Any:
    """A promise about contiguous runs; the compiler's own analysis is used instead."""
    return input


def max_constancy(input: Any, values: Any) -> Any:
    """A promise about constant runs; the compiler's own analysis is used instead."""
    return input


def debug_barrier() -> None:
    """Nothing to do: tiles have no threads that could be out of step."""

"""A tile program with arguments and what is known of its results: what tests of targets compare on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nitinol.compiler import ir
from nitinol.compiler.semantics import from_memory
from nitinol.language.types import PointerType


@dataclass(repr=False)
class Program:
    """A kernel with arguments: arrays for pointers (bf16 as uint16) and Python numbers for scalars.

    `outputs` are the indices of the arrays that are written; `exact[i]`, `tolerance[i]` (absolute) and `relative[i]`
    (a fraction of the expected value) belong to `outputs[i]`. An exact output has tolerance 0. NaN equals NaN, -0.0
    equals 0.0.
    """

    function: ir.Function
    grid: tuple[int, int, int]
    arguments: list[Any]
    outputs: list[int]
    exact: list[bool]
    tolerance: list[float]
    relative: list[float] = field(default_factory=list)  # [] stands for zeros
    aliases: tuple[int, ...] = ()  # per parameter the first one with the same memory; () if all differ

    def __repr__(self) -> str:
        return f"grid {self.grid}\n{self.function}"

    def copies(self) -> list[Any]:
        """Fresh arguments, so that every run starts from the same memory; no more aligned than the function says."""
        divisible = self.function.divisible
        result = [_copy(a, d) if isinstance(a, np.ndarray) else a for a, d in zip(self.arguments, divisible)]
        return [result[i] for i in self.aliases] if self.aliases else result

    def compare(self, actual: Sequence[Any], expected: Sequence[Any]) -> None:
        """Raises AssertionError with the program's text unless every array agrees; inputs must be untouched."""
        for index, parameter in enumerate(self.function.parameters):
            alias = self.aliases and self.aliases[index] != index
            if alias or not isinstance(expected[index], np.ndarray):
                continue
            assert isinstance(parameter.type, PointerType)
            if index not in self.outputs:
                same = actual[index].tobytes() == expected[index].tobytes()
                assert same, f"input {parameter} changed\n{self.function}"
                continue
            tolerance = self.tolerance[self.outputs.index(index)]
            relative = self.relative[self.outputs.index(index)] if self.relative else 0.0
            got, want = (from_memory(a[index], parameter.type.element) for a in (actual, expected))
            if parameter.type.element.is_float:
                got, want = got.astype(np.float64), want.astype(np.float64)
                with np.errstate(invalid="ignore"):  # inf - inf
                    near = np.abs(got - want) <= tolerance + (relative * np.abs(want) if relative else 0.0)
                bad = ~((near & np.isfinite(want)) | (got == want) | (np.isnan(got) & np.isnan(want)))
            else:
                bad = got != want
            if bad.any():
                at = np.flatnonzero(bad)[:5]
                values = f"got {got[at].tolist()}, expected {want[at].tolist()}"
                raise AssertionError(
                    f"{parameter} differs in {int(bad.sum())} of {len(got)} at {at.tolist()}: {values}, tolerance "
                    f"{tolerance:.3g} and {relative:.3g} of the value\n{self}"
                )


def _copy(array: np.ndarray, divisible: int) -> np.ndarray:
    """A copy at a multiple of 64 bytes, or one element behind that."""
    memory = np.empty(array.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + (0 if divisible > 1 else array.itemsize)
    copy = memory[start : start + array.nbytes].view(array.dtype)
    copy[:] = array
    return copy

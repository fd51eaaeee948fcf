"""Random programs, part 1 of 4: values of a wanted type, with bounds of their magnitude and of their error."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nitinol.compiler import ir
from nitinol.compiler.semantics import memory_dtype, to_memory
from nitinol.language.types import (
    DType,
    PointerType,
    TileType,
    Type,
    bfloat16,
    float16,
    float32,
    float64,
    int1,
    int8,
    int16,
    int32,
    int64,
    uint8,
    uint16,
    uint32,
    uint64,
    with_shape,
)

INTEGERS = (int8, int16, int32, int64, uint8, uint16, uint32, uint64)
FLOATS = (float16, bfloat16, float32, float64)
ULP = {float16: 2.0**-10, bfloat16: 2.0**-7, float32: 2.0**-23, float64: 2.0**-52}
LIMIT = 64.0  # float magnitudes above are clamped

Shape = tuple[int, ...]


@dataclass(eq=False)
class Buffer:
    """A pointer parameter. `span` elements belong to each program instance if it is written."""

    parameter: ir.Value
    element: DType
    data: np.ndarray
    span: int = 0
    bound: float = LIMIT
    error: float = 0.0
    names: list[ir.Value] = field(default_factory=list)  # all parameters for this memory


@dataclass
class Values:
    """A function under construction."""

    rng: np.random.Generator
    limit: int  # elements of a tile
    length: int  # statements at the top level
    features: set[str]
    dtypes: tuple[DType, ...]
    parameters: list[ir.Value] = field(default_factory=list)
    arguments: list[Any] = field(default_factory=list)
    outputs: list[Buffer] = field(default_factory=list)
    blocks: list[ir.Block] = field(default_factory=list)
    pools: list[list[ir.Value]] = field(default_factory=list)  # values in scope, innermost block last
    # Of floats: the largest magnitude, and how far two targets may differ.
    bounds: defaultdict[ir.Value, float] = field(default_factory=lambda: defaultdict(lambda: LIMIT))
    errors: defaultdict[ir.Value, float] = field(default_factory=lambda: defaultdict(float))
    line: int = 0
    in_loop: int = 0
    programs: int = 1  # instances in the grid

    # ------------------------------------------------------------------------------------------------ chance

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def choose(self, options: Sequence[Any]) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def dtype(self) -> DType:
        """Floats as often as integers, though there are fewer."""
        floats = [t for t in self.dtypes if t.is_float]
        return self.choose(floats if floats and self.chance(0.5) else self.dtypes)

    def between(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def shape(self, rank: int | None = None, limit: int | None = None) -> Shape:
        """Powers of two, 1 included, of at most `limit` elements."""
        rank = rank or self.choose([1, 1, 1, 2, 2, 2, 3])
        left = int(math.log2(limit or self.limit))
        extents = []
        for _ in range(rank):
            bits = self.between(0, left) if self.chance(0.7) else 0
            extents.append(1 << bits)
            left -= bits
        return tuple(extents[i] for i in self.rng.permutation(rank))

    # -------------------------------------------------------------------------------------------- operations

    def emit(self, kind: str, /, operands: Sequence[ir.Value], *types: Type, **attributes: Any) -> ir.Value:
        self.line += 1
        location = ir.Location("random.py", self.line)
        op = ir.create(kind, operands, types, location, attributes.pop("regions", ()), **attributes)
        self.blocks[-1].ops.append(op)
        return op.results[0] if op.results else None  # type: ignore[return-value]

    def keep(self, value: ir.Value, bound: float | None = None, error: float = 0.0) -> ir.Value:
        """Notes bound and error and puts the value where later statements find it; floats are clamped.

        A value that may be far off would make every comparison pass: it is left out.
        """
        if is_float(value):
            self.bounds[value], self.errors[value] = LIMIT if bound is None else bound, error
            if self.bounds[value] > LIMIT:
                value = self.clamp(value)
        if self.errors[value] < 0.1:
            self.pools[-1].append(value)
        return value

    def clamp(self, value: ir.Value) -> ir.Value:
        error = self.errors[value]
        for kind, edge in (("min", LIMIT), ("max", -LIMIT)):
            value = self.emit(kind, [value, self.fill(edge, value.type)], value.type)
        self.bounds[value], self.errors[value] = LIMIT, error
        return value

    def fill(self, number: Any, type: Type) -> ir.Value:
        """A constant scalar or tile."""
        element = type.element if isinstance(type, TileType) else type
        assert isinstance(element, DType)
        value = self.emit("constant", [], element, value=number)
        if isinstance(type, TileType):
            value = self.emit("splat", [value], type)
        if element.is_float:
            self.bounds[value] = abs(number)
        return value

    def constant(self, type: Type) -> ir.Value:
        element = type.element if isinstance(type, TileType) else type
        assert isinstance(element, DType)
        if element == int1:
            return self.fill(self.chance(0.5), type)
        if element.is_float:
            return self.fill(float(self.between(-16, 16)) / 4, type)
        return self.fill(self.between(0 if element.kind == "uint" else -9, 100), type)

    def argument(self, element: DType, number: Any) -> ir.Value:
        """A scalar parameter."""
        value = ir.Value(element, None, f"s{len(self.parameters)}")
        self.parameters.append(value)
        self.arguments.append(number)
        self.bounds[value], self.errors[value] = abs(float(number)), 0.0
        return value

    def integer(self, number: int, element: DType = int32) -> ir.Value:
        """A number that the compiler may or may not know."""
        return self.argument(element, number) if self.chance(0.3) else self.fill(number, element)

    def data(self, element: DType, count: int) -> np.ndarray:
        """Random memory. Half of the float arrays are coarse, so that ties occur; |x| <= 4."""
        count = max(count, 1)
        if element.is_float:
            values = np.clip(self.rng.normal(size=count), -4, 4)
            if self.chance(0.5):
                values = np.round(values * 4) / 4
            narrow = values.astype(np.float32) if element == bfloat16 else values
            return (
                to_memory(narrow, element) if element != bfloat16 else (narrow.view(np.uint32) >> 16).astype(np.uint16)
            )
        limits = np.iinfo(memory_dtype(element))
        if self.chance(0.5):
            return self.rng.integers(max(limits.min, -9), 10, count, dtype=memory_dtype(element))
        return self.rng.integers(limits.min, limits.max, count, dtype=memory_dtype(element), endpoint=True)

    def buffer(self, element: DType, data: np.ndarray, span: int = 0) -> Buffer:
        name = f"{'out' if span else 'in'}{len(self.parameters)}"
        parameter = ir.Value(PointerType(element), None, name)
        self.parameters.append(parameter)
        self.arguments.append(data)
        buffer = Buffer(parameter, element, data, span, 4.0, names=[parameter])
        if span:
            self.outputs.append(buffer)
        return buffer

    def parameter(self, buffer: Buffer) -> ir.Value:
        """One of the parameters for the buffer; another one now and then, if the program may have aliases."""
        if buffer.span and "alias" in self.features and len(buffer.names) < 3 and self.chance(0.5):
            parameter = ir.Value(buffer.parameter.type, None, f"alias{len(self.parameters)}")
            self.parameters.append(parameter)
            self.arguments.append(buffer.data)
            buffer.names.append(parameter)
        return self.choose(buffer.names)

    # ---------------------------------------------------------------------------------------- values of a type

    def exact(self, value: ir.Value) -> bool:
        return not is_float(value) or self.errors[value] == 0

    def find(self, accept: Callable[[ir.Value], bool]) -> ir.Value | None:
        found = [v for pool in self.pools for v in pool if accept(v)]
        return self.choose(found[-12:] if self.chance(0.7) else found) if found else None

    def value(self, element: DType, shape: Shape, exact: bool = False) -> ir.Value:
        """Something of that type: in scope, broadcast, cast, loaded or constant."""
        type = with_shape(element, shape)

        def fits(v: ir.Value) -> bool:
            return not exact or self.exact(v)

        roll = self.rng.random()
        if roll < 0.6 and (found := self.find(lambda v: v.type == type and fits(v))):
            return found
        if roll < 0.75:

            def grows(v: ir.Value) -> bool:
                same = v.element == element and fits(v)
                return (
                    same and len(v.shape) <= len(shape) and all(a in (1, b) for a, b in zip(v.shape[::-1], shape[::-1]))
                )

            if found := self.find(grows):
                return self.grow(found, shape)
        if roll < 0.85 and element != int1:
            found = self.find(lambda v: v.shape == shape and isinstance(v.element, DType) and v.element != element)
            if found and fits(found):
                return self.cast(found, element)
        if element == int1:
            return self.condition(shape)
        if roll > 0.97:
            return self.constant(type)
        return self.load(element, shape)

    def grow(self, value: ir.Value, shape: Shape) -> ir.Value:
        """Broadcasts by the rules of the language: leading axes appear, extents of 1 grow."""
        bound, error = self.bounds[value], self.errors[value]
        if value.shape == () and shape:
            value = self.emit("splat", [value], TileType(value.element, shape))
        elif value.shape != shape:
            ones = (1,) * (len(shape) - len(value.shape)) + value.shape
            if ones != value.shape:
                value = self.emit("reshape", [value], TileType(value.element, ones))
            if ones != shape:
                value = self.emit("broadcast", [value], TileType(value.element, shape))
        self.bounds[value], self.errors[value] = bound, error
        return value

    def cast(self, value: ir.Value, target: DType) -> ir.Value:
        source, bound, error = value.element, self.bounds[value], self.errors[value]
        assert isinstance(source, DType)
        if source == target:
            return value
        type = with_shape(target, value.shape)
        if source.is_float:
            if target == int1 or not target.is_float:
                if error > 0:  # not continuous: use something exact instead
                    return self.constant(type)
                if target.kind == "uint":
                    value = self.emit("abs", [value], value.type)
                return self.emit("cast", [value], type)
            result = self.emit("cast", [value], type)
            self.bounds[result] = bound
            self.errors[result] = error + bound * ULP[target] if error else 0.0
            return result
        if target.is_float:
            if source != int1:
                value = self.emit("and", [value, self.fill(31, value.type)], value.type)
            result = self.emit("cast", [value], type)
            self.bounds[result] = 31.0
            return result
        return self.emit("cast", [value], type)

    def condition(self, shape: Shape) -> ir.Value:
        """A new int1 value, of exact operands."""
        element = self.dtype()
        a = self.value(element, shape, exact=True)
        b = self.constant(a.type) if self.chance(0.5) else self.value(element, shape, exact=True)
        return self.emit(self.choose(("eq", "ne", "lt", "le", "gt", "ge")), [a, b], with_shape(int1, shape))

    def load(self, element: DType, shape: Shape) -> ir.Value:
        raise NotImplementedError  # part 2


def is_float(value: ir.Value) -> bool:
    return isinstance(value.element, DType) and value.element.is_float

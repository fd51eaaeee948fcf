"""Random tile programs that are well-typed, in bounds, free of races between program instances and comparable.

Used by the tests of every target::

    program = random_program(numpy.random.default_rng(seed), "small")
    expected, actual = program.copies(), program.copies()
    interpreter.run(program.function, program.grid, expected)
    target(program.function, program.grid, actual)
    program.compare(actual, expected)   # AssertionError with the program's text

What is comparable. Integers, booleans and floats that are only moved, compared, rounded or cast are exact. For all other
floats the generator carries, beside each value, a bound of its magnitude and a bound of how far two correct targets may
differ: one unit in the last place of the bound for each rounding (targets may keep 16-bit intermediates in float32 and
may contract a product and a sum), eight for exp and its kin, log2(n) + 2 for a sum of n terms in any order, passed
through each operation by its largest slope. A buffer's tolerance is twice the largest such bound stored to it.
Whatever is not continuous (comparisons, floor, casts to int, argmax) only sees exact values. Magnitudes are clamped.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nitinol.compiler import ir
from nitinol.compiler.semantics import from_memory, memory_dtype, to_memory
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
FEATURES = frozenset("math views gather reduce scan dot for while if atomic inplace".split())
LIMIT = 64.0  # float magnitudes above are clamped

Shape = tuple[int, ...]


@dataclass
class Program:
    """A kernel with arguments: arrays for pointers (bf16 as uint16) and Python numbers for scalars.

    `outputs` are the indices of the arrays that are written; `exact[i]` and `tolerance[i]` (absolute) belong to
    `outputs[i]`. An exact output has tolerance 0.
    """

    function: ir.Function
    grid: tuple[int, int, int]
    arguments: list[Any]
    outputs: list[int]
    exact: list[bool]
    tolerance: list[float]

    def copies(self) -> list[Any]:
        """Fresh arguments, so that every run starts from the same memory; no more aligned than the function says."""
        divisible = self.function.divisible
        return [_copy(a, d) if isinstance(a, np.ndarray) else a for a, d in zip(self.arguments, divisible)]

    def compare(self, actual: Sequence[Any], expected: Sequence[Any]) -> None:
        """Raises AssertionError with the program's text unless every array agrees; inputs must be untouched."""
        for index, parameter in enumerate(self.function.parameters):
            if not isinstance(expected[index], np.ndarray):
                continue
            assert isinstance(parameter.type, PointerType)
            if index not in self.outputs:
                assert actual[index].tobytes() == expected[index].tobytes(), (
                    f"input {parameter} changed\n{self.function}"
                )
                continue
            tolerance = self.tolerance[self.outputs.index(index)]
            got, want = (from_memory(a[index], parameter.type.element) for a in (actual, expected))
            if parameter.type.element.is_float:
                got, want = got.astype(np.float64), want.astype(np.float64)
                bad = ~((np.abs(got - want) <= tolerance) | (got == want))
            else:
                bad = got != want
            if bad.any():
                at = np.flatnonzero(bad)[:5]
                raise AssertionError(
                    f"{parameter} differs in {int(bad.sum())} of {len(got)}, tolerance {tolerance:.3g}: at {at.tolist()} "
                    f"got {got[at].tolist()}, expected {want[at].tolist()}\ngrid {self.grid}\n{self.function}"
                )


def random_program(
    rng: np.random.Generator,
    size: str = "small",
    features: frozenset[str] | set[str] = FEATURES,
    dtypes: Sequence[DType] = (*INTEGERS, *FLOATS),
) -> Program:
    """One random kernel: "small" (tiles of up to 64 elements, about 40 operations) or "medium" (512, about 120).

    `features` and `dtypes` narrow what it may contain; int32 is always used for indices, int1 for masks.
    """
    return _Builder(rng, *((64, 12) if size == "small" else (512, 30)), set(features), tuple(dtypes)).build()


@dataclass
class _Buffer:
    """A pointer parameter. `span` elements belong to each program instance if it is written."""

    parameter: ir.Value
    element: DType
    data: np.ndarray
    span: int = 0
    bound: float = LIMIT
    error: float = 0.0


@dataclass
class _Builder:
    rng: np.random.Generator
    limit: int  # elements of a tile
    length: int  # statements at the top level
    features: set[str]
    dtypes: tuple[DType, ...]
    parameters: list[ir.Value] = field(default_factory=list)
    arguments: list[Any] = field(default_factory=list)
    outputs: list[_Buffer] = field(default_factory=list)
    blocks: list[ir.Block] = field(default_factory=list)
    pools: list[list[ir.Value]] = field(default_factory=list)  # values in scope, innermost block last
    # Of floats: the largest magnitude, and how far two targets may differ.
    bounds: defaultdict[ir.Value, float] = field(default_factory=lambda: defaultdict(lambda: LIMIT))
    errors: defaultdict[ir.Value, float] = field(default_factory=lambda: defaultdict(float))
    line: int = 0
    in_loop: int = 0

    # ------------------------------------------------------------------------------------------------ chance

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def choose(self, options: Sequence[Any]) -> Any:
        return options[int(self.rng.integers(len(options)))]

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
        if _float(value):
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

    def buffer(self, element: DType, data: np.ndarray, span: int = 0) -> _Buffer:
        name = f"{'out' if span else 'in'}{len(self.parameters)}"
        parameter = ir.Value(PointerType(element), None, name)
        self.parameters.append(parameter)
        self.arguments.append(data)
        buffer = _Buffer(parameter, element, data, span, 4.0)
        if span:
            self.outputs.append(buffer)
        return buffer

    # ---------------------------------------------------------------------------------------- values of a type

    def exact(self, value: ir.Value) -> bool:
        return not _float(value) or self.errors[value] == 0

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
        element = self.choose(self.dtypes)
        a = self.value(element, shape, exact=True)
        b = self.constant(a.type) if self.chance(0.5) else self.value(element, shape, exact=True)
        return self.emit(self.choose(("eq", "ne", "lt", "le", "gt", "ge")), [a, b], with_shape(int1, shape))

    # ------------------------------------------------------------------------------------------------- memory

    def axes(self, shape: Shape, injective: bool) -> tuple[list[ir.Value], int]:
        """One tile of offsets per axis, of extent 1 elsewhere, and how many elements the sums span."""
        strides, step = [0] * len(shape), 1
        natural = self.chance(0.5)
        for axis in range(len(shape))[::-1] if natural else self.rng.permutation(len(shape)):
            strides[axis] = step
            step = step * shape[axis] + (0 if self.chance(0.7) else self.between(0, 3))
        scale = 1 if self.chance(0.7) else self.between(2, 3)
        element = self.choose([int32, int32, int64])
        tiles, extent = [], 1
        for axis, n in enumerate(shape):
            stride = strides[axis] * scale
            if not injective and self.chance(0.1):
                stride = 0
            start = 0 if self.chance(0.9) else self.between(1, 5)
            tile = self.emit("arange", [], TileType(int32, (n,)), start=start, end=start + n)
            if self.chance(0.1):
                tile = self.emit("sub", [self.fill(start + n - 1, tile.type), tile], tile.type)
                start = 0
            ones = tuple(n if i == axis else 1 for i in range(len(shape)))
            if ones != tile.shape:
                tile = self.emit("reshape", [tile], TileType(int32, ones))
            if element != int32:
                tile = self.emit("cast", [tile], TileType(element, ones))
            if stride != 1 or self.chance(0.1):
                factor = self.emit("splat", [self.integer(stride, element)], tile.type)
                tile = self.emit("mul", [tile, factor], tile.type)
            tiles.append(tile)
            extent += (start + n - 1) * stride
        return tiles, extent

    def sum(self, tiles: Sequence[ir.Value], shape: Shape) -> ir.Value:
        total = self.grow(tiles[0], shape)
        for tile in tiles[1:]:
            total = self.emit("add", [total, self.grow(tile, shape)], total.type)
        return total

    def program(self) -> ir.Value:
        """The number of the program instance, in order."""
        x, y = (self.emit("program_id", [], int32, axis=a) for a in (0, 1))
        width = self.emit("num_programs", [], int32, axis=0)
        return self.emit("add", [x, self.emit("mul", [y, width], int32)], int32)

    def base(self, buffer: _Buffer, step: int, start: int = 0) -> ir.Value:
        """The scalar pointer to the part of this program instance."""
        pointer = buffer.parameter
        if step:
            offset = self.emit("mul", [self.program(), self.integer(step)], int32)
            pointer = self.emit("addptr", [pointer, offset], pointer.type)
        if start:
            pointer = self.emit("addptr", [pointer, self.integer(start, int64)], pointer.type)
        return pointer

    def pointers(self, base: ir.Value, tiles: Sequence[ir.Value], shape: Shape) -> ir.Value:
        """Tile of pointers: one sum of offsets, or axis after axis as in `ptr + rows[:, None] + columns`."""
        if self.chance(0.5):
            return self.emit("addptr", [self.grow(base, shape), self.sum(tiles, shape)], TileType(base.element, shape))
        pointer = self.emit(
            "addptr", [self.grow(base, tiles[0].shape), tiles[0]], TileType(base.element, tiles[0].shape)
        )
        pointer = self.grow(pointer, shape)
        for tile in tiles[1:]:
            pointer = self.emit("addptr", [pointer, self.grow(tile, shape)], pointer.type)
        return pointer

    def mask(self, tiles: Sequence[ir.Value], shape: Shape, extent: int) -> tuple[ir.Value | None, int]:
        """A mask or None, and how many elements of the extent it leaves in reach."""
        roll = self.rng.random()
        if roll < 0.5:
            return None, extent
        if roll < 0.8:
            reach = self.between(0, extent)
            offset = self.sum(tiles, shape)
            edge = self.emit("splat", [self.integer(reach, offset.element)], offset.type)  # type: ignore[arg-type]
            return self.emit("lt", [offset, edge], TileType(int1, shape)), reach
        if roll < 0.9:
            axis = self.between(0, len(shape) - 1)
            edge = self.constant(tiles[axis].type)
            mask = self.emit(self.choose(["lt", "ge"]), [tiles[axis], edge], TileType(int1, tiles[axis].shape))
            return self.grow(mask, shape), extent
        return self.find(lambda v: v.type == TileType(int1, shape)), extent

    def load(self, element: DType, shape: Shape) -> ir.Value:
        if shape == ():
            start = self.between(0, 5)
            step = self.choose([0, 1])
            buffer = self.buffer(element, self.data(element, self.programs * step + start + 1))
            return self.loaded(self.emit("load", [self.base(buffer, step, start)], element), buffer)
        if self.chance(0.1):
            return self.load_gathered(element, shape)
        tiles, extent = self.axes(shape, injective=False)
        mask, reach = self.mask(tiles, shape, extent)
        step = self.choose([0, 0, 1, extent]) if reach else 0
        buffer = self.buffer(element, self.data(element, (self.programs - 1) * step + reach))
        return self.masked_load(buffer, self.pointers(self.base(buffer, step), tiles, shape), mask)

    def masked_load(self, buffer: _Buffer, pointers: ir.Value, mask: ir.Value | None) -> ir.Value:
        type = with_shape(buffer.element, pointers.shape)
        if mask is None:
            return self.loaded(self.emit("load", [pointers], type), buffer)
        if self.chance(0.6):
            return self.loaded(self.emit("load", [pointers, mask, self.constant(type)], type), buffer)
        value = self.emit("load", [pointers, mask], type)  # the unspecified lanes are replaced at once
        return self.loaded(self.emit("select", [mask, value, self.constant(type)], type), buffer)

    def loaded(self, value: ir.Value, buffer: _Buffer) -> ir.Value:
        self.bounds[value], self.errors[value] = max(buffer.bound, 4.0), buffer.error
        return value

    def index(self, shape: Shape, extent: int) -> ir.Value:
        """A tile of int32 in [0, extent); `extent` is a power of two."""
        some = self.find(lambda v: v.shape == shape and v.element in (int32, int64, uint8, int16))
        if some is None or self.chance(0.5):
            tiles, count = self.axes(shape, injective=False)
            buffer = self.buffer(int32, self.rng.integers(0, extent, count, dtype=np.int32))
            return self.emit("load", [self.pointers(buffer.parameter, tiles, shape)], TileType(int32, shape))
        if some.element != int32:
            some = self.emit("cast", [some], TileType(int32, shape))
        return self.emit("and", [some, self.fill(extent - 1, some.type)], some.type)

    def load_gathered(self, element: DType, shape: Shape) -> ir.Value:
        extent = 1 << self.between(0, 6)
        index = self.index(shape, extent)
        buffer = self.buffer(element, self.data(element, extent))
        pointers = self.emit(
            "addptr", [self.grow(buffer.parameter, shape), index], TileType(PointerType(element), shape)
        )
        mask = self.find(lambda v: v.type == TileType(int1, shape)) if self.chance(0.3) else None
        return self.masked_load(buffer, pointers, mask)

    def store(self, value: ir.Value) -> None:
        """To the program's own part of a new or known buffer."""
        if value.element == int1:
            value = self.cast(value, self.choose([t for t in self.dtypes if not t.is_float] or [int32]))
        element = value.element
        assert isinstance(element, DType)
        if value.shape == ():
            tiles, extent = [], 1
        else:
            tiles, extent = self.axes(value.shape, injective=True)
        known = [b for b in self.outputs if b.element == element and b.span >= extent]
        buffer = self.choose(known) if known and self.chance(0.4) else None
        if buffer is None:
            span = extent + self.between(0, 3)
            buffer = self.buffer(element, self.data(element, span * self.programs), span)
        base = self.base(buffer, buffer.span, self.between(0, buffer.span - extent))
        pointers = self.pointers(base, tiles, value.shape) if tiles else base
        mask, _ = self.mask(tiles, value.shape, extent) if tiles else (None, 0)
        update = tiles and mask is not None and "inplace" in self.features and self.chance(0.3)
        if update and not (self.in_loop and _float(value)):  # x[mask] += value
            old = self.loaded(self.emit("load", [pointers, mask], value.type), buffer)
            bound, error = self.bounds[old] + self.bounds[value], self.errors[old] + self.errors[value]
            value = self.emit("add", [old, value], value.type)
            if _float(value):
                self.bounds[value], self.errors[value] = bound, error + bound * ULP[element]
                value = self.clamp(value)
        buffer.bound = max(buffer.bound, self.bounds[value])
        buffer.error = max(buffer.error, self.errors[value])
        self.emit("store", [pointers, value] + ([mask] if mask is not None else []))

    def reload(self) -> None:
        """Reads back what this program instance stored."""
        known = [b for b in self.outputs if b.span and not (self.in_loop and b.element.is_float)]
        if known:
            buffer = self.choose(known)
            tiles, extent = self.axes(self.shape(limit=max(1, buffer.span // 2)), injective=False)
            if extent <= buffer.span:
                shape = tuple(max(s) for s in zip(*(t.shape for t in tiles)))
                base = self.base(buffer, buffer.span, self.between(0, buffer.span - extent))
                value = self.masked_load(buffer, self.pointers(base, tiles, shape), None)
                self.keep(value, self.bounds[value], self.errors[value])

    def atomic(self) -> None:
        """On cells that all program instances share; integers, one kind a buffer: the order does not matter."""
        element, shape, extent = self.choose([int32, uint32, int64]), self.shape(), 1 << self.between(0, 4)
        kind = self.choose(["add", "max", "min", "and", "or", "xor"])
        value, index = self.value(element, shape), self.index(shape, extent)
        buffer = self.buffer(element, self.data(element, extent), 1)
        buffer.span = 0  # nobody else reads or writes it
        pointers = self.emit(
            "addptr", [self.grow(buffer.parameter, shape), index], TileType(PointerType(element), shape)
        )
        mask = [self.condition(shape)] if self.chance(0.5) else []
        self.emit("atomic_rmw", [pointers, value, *mask], value.type, kind=kind)

    # -------------------------------------------------------------------------------------------- statements

    def typed(self) -> tuple[DType, Shape]:
        """A type for the next statement: mostly one that is in use."""
        found = self.find(lambda v: isinstance(v.element, DType) and v.element in self.dtypes)
        if found is None or self.chance(0.3):
            return self.choose(self.dtypes), self.shape()
        return found.element, found.shape  # type: ignore[return-value]

    def elementwise(self) -> None:
        element, shape = self.typed()
        (self.float_operation if element.is_float else self.integer_operation)(element, shape)

    def integer_operation(self, element: DType, shape: Shape) -> None:
        type = with_shape(element, shape)
        x, y = self.value(element, shape), self.value(element, shape)
        kind = self.choose(
            "add sub mul div rem and or xor shl shr mulhi min max neg not abs select logic bitcast".split()
        )
        if kind in ("div", "rem"):  # divisors of 2..16 and -2..-16: neither 0 nor -1
            y = self.emit("and", [y, self.fill(14, type)], type)
            y = self.emit("add", [y, self.fill(2, type)], type)
            if element.is_signed and self.chance(0.5):
                y = self.emit("neg", [y], type)
        elif kind in ("shl", "shr"):
            y = self.emit("and", [y, self.fill(element.bits - 1, type)], type)
        if kind in ("neg", "not", "abs"):
            self.keep(self.emit(kind, [x], type))
        elif kind == "select":
            self.keep(self.emit("select", [self.value(int1, shape), x, y], type))
        elif kind == "logic":
            a, b = self.value(int1, shape), self.value(int1, shape)
            a = self.emit(self.choose(["and", "or", "xor"]), [a, b], a.type)
            self.keep(self.emit("not", [a], a.type) if self.chance(0.5) else a)
        elif kind == "bitcast":
            same = [t for t in INTEGERS if t.bits == element.bits and t in self.dtypes]
            self.keep(self.emit("bitcast", [x], with_shape(self.choose(same), shape)))
        else:
            self.keep(self.emit(kind, [x, y], type))

    def float_operation(self, element: DType, shape: Shape) -> None:
        type, ulp = with_shape(element, shape), ULP[element]
        x = self.value(element, shape)
        kinds = "add sub mul div min max neg abs fma select rem floor ceil bitcast".split()
        if "math" in self.features:
            kinds += "exp exp2 log log2 sqrt rsqrt sin cos tanh erf exp sqrt tanh".split()
        kind = self.choose(kinds)
        b, e = self.bounds[x], self.errors[x]
        if kind in ("add", "sub", "mul", "div", "min", "max"):
            y = self.value(element, shape)
            if kind == "div":  # by at least 1
                y = self.tame(y, "positive")
            c, f = self.bounds[y], self.errors[y]
            options = {"propagate_nan": self.chance(0.5)} if kind in ("min", "max") else {}
            result = self.emit(kind, [x, y], type, **options)
            if kind in ("min", "max"):
                self.keep(result, max(b, c), max(e, f))
            elif kind == "mul":
                self.keep(result, b * c, b * f + c * e + e * f + b * c * ulp)
            elif kind == "div":
                self.keep(result, b, e + b * f + b * ulp * (2 if element == float32 else 1))
            else:
                self.keep(result, b + c, e + f + (b + c) * ulp)
        elif kind in ("neg", "abs"):
            self.keep(self.emit(kind, [x], type), b, e)
        elif kind == "fma":
            y, z = self.value(element, shape), self.value(element, shape)
            c, d = self.bounds[y], self.bounds[z]
            error = b * self.errors[y] + c * e + e * self.errors[y] + self.errors[z] + (b * c + d) * ulp
            self.keep(self.emit("fma", [x, y, z], type), b * c + d, error)
        elif kind == "select":
            y = self.value(element, shape)
            result = self.emit("select", [self.value(int1, shape), x, y], type)
            self.keep(result, max(b, self.bounds[y]), max(e, self.errors[y]))
        elif kind in ("rem", "floor", "ceil", "bitcast"):  # not continuous
            x = self.value(element, shape, exact=True)
            if kind == "rem":
                divisor = self.fill(self.choose([0.75, 1.5, 3.0, -2.0]), type)
                self.keep(self.emit("rem", [x, divisor], type), self.bounds[x])
            elif kind != "bitcast":
                self.keep(self.emit(kind, [x], type), self.bounds[x] + 1)
            else:
                same = [t for t in INTEGERS if t.bits == element.bits and t in self.dtypes]
                if same:
                    zero = self.fill(0.0, type)  # the sign of a zero is open after min and max
                    x = self.emit("select", [self.emit("eq", [x, zero], with_shape(int1, shape)), zero, x], type)
                    self.keep(self.emit("bitcast", [x], with_shape(self.choose(same), shape)))
        else:
            positive = {name: "positive" for name in ("log", "log2", "sqrt", "rsqrt")}
            x = self.tame(x, ({"exp": "small", "exp2": "small"} | positive).get(kind, ""))
            b, e = self.bounds[x], self.errors[x]
            top = {"exp": math.exp(min(b, 5)), "exp2": 2.0 ** min(b, 5), "sqrt": math.sqrt(b), "log2": b, "log": b}
            bound = top.get(kind, 1.0)
            slope = {"exp": bound, "exp2": bound, "log2": 1.5, "erf": 1.2}.get(kind, 1.0)
            self.keep(self.emit(kind, [x], type), bound, slope * e + 8 * ulp * max(bound, 1.0))

    def tame(self, x: ir.Value, how: str) -> ir.Value:
        """ "positive": |x| + 1; "small": clamped to |x| <= 4."""
        b, e = self.bounds[x], self.errors[x]
        assert isinstance(x.element, DType)
        if how == "positive":
            x = self.emit("abs", [x], x.type)
            x = self.emit("add", [x, self.fill(1.0, x.type)], x.type)
            self.bounds[x], self.errors[x] = b + 1, e + (b + 1) * ULP[x.element]
        elif how == "small" and b > 4:
            for kind, edge in (("min", 4.0), ("max", -4.0)):
                x = self.emit(kind, [x, self.fill(edge, x.type)], x.type)
            self.bounds[x], self.errors[x] = 4.0, e
        return x

    def convert(self) -> None:
        source = self.find(lambda v: isinstance(v.element, DType))
        if source is None:
            return self.elementwise()
        result = self.cast(source, self.choose(self.dtypes))
        self.keep(result, self.bounds[result], self.errors[result])

    def view(self) -> None:
        x = self.find(lambda v: v.shape != () and isinstance(v.element, DType))
        if x is None:
            return self.elementwise()
        shape, element = x.shape, x.element
        assert isinstance(element, DType)
        b, e = self.bounds[x], self.errors[x]
        kind = self.choose(["reshape", "trans", "join", "split", "cat", "broadcast", "splat", "flip"])
        size = math.prod(shape)
        if kind == "reshape":
            new = self.shape(limit=size)
            new = (*new, size // math.prod(new))
            self.keep(self.emit("reshape", [x], TileType(element, new)), b, e)
        elif kind == "trans":
            perm = tuple(int(p) for p in self.rng.permutation(len(shape)))
            self.keep(self.emit("trans", [x], TileType(element, tuple(shape[p] for p in perm)), perm=perm), b, e)
        elif kind in ("join", "cat") and 2 * size <= self.limit:
            y = self.value(element, shape)
            b, e = max(b, self.bounds[y]), max(e, self.errors[y])
            if kind == "join":
                self.keep(self.emit("join", [x, y], TileType(element, (*shape, 2))), b, e)
            else:
                axis = self.between(0, len(shape) - 1)
                double = (*shape[:axis], 2 * shape[axis], *shape[axis + 1 :])
                self.keep(self.emit("cat", [x, y], TileType(element, double), axis=axis), b, e)
        elif kind == "split":
            if shape[-1] != 2 and size >= 2:
                shape = (size // 2, 2)
                x = self.emit("reshape", [x], TileType(element, shape))
            if len(shape) > 1 and shape[-1] == 2:
                half = TileType(element, shape[:-1])
                for result in self.emit("split", [x], half, half).op.results:  # type: ignore[union-attr]
                    self.keep(result, b, e)
        elif kind == "broadcast" and 1 in shape:
            axis = shape.index(1)
            extent = 1 << self.between(0, int(math.log2(max(1, self.limit // size))))
            self.keep(self.grow(x, (*shape[:axis], extent, *shape[axis + 1 :])), b, e)
        elif kind == "splat":
            scalar = self.value(element, ())
            b, e = self.bounds[scalar], self.errors[scalar]
            self.keep(self.emit("splat", [scalar], TileType(element, self.shape())), b, e)
        elif "gather" in self.features:
            axis = self.between(0, len(shape) - 1)
            new = self.choose([shape[axis], 1, min(2 * shape[axis], max(shape[axis], self.limit // size))])
            index = self.index((*shape[:axis], new, *shape[axis + 1 :]), shape[axis])
            self.keep(self.emit("gather", [x, index], TileType(element, index.shape), axis=axis), b, e)

    def region(self, elements: Sequence[DType], body: Callable[..., Sequence[ir.Value]]) -> ir.Block:
        """The combining block of a reduction or scan: body(left..., right...) -> results."""
        block = ir.Block([ir.Value(e) for e in (*elements, *elements)])
        self.blocks.append(block)
        self.emit("yield", body(*block.arguments))
        self.blocks.pop()
        return block

    def reduce(self, kind: str = "reduce") -> None:
        element, shape = self.typed()
        if shape == ():
            shape = self.shape()
        axis = self.between(0, len(shape) - 1)
        n, left = shape[axis], (shape if kind == "scan" else shape[:axis] + shape[axis + 1 :])
        options: dict[str, Any] = {"axis": axis} | ({"reverse": self.chance(0.4)} if kind == "scan" else {})
        how = self.choose(["add", "add", "min", "max", "arg", "pair", "mul", "custom"])
        result_type = with_shape(element, left)
        if how == "arg":
            best = self.choose(["lt", "gt"])
            x = self.value(element, shape, exact=True)
            index = self.emit("arange", [], TileType(int32, (n,)), start=0, end=n)
            ones = tuple(n if i == axis else 1 for i in range(len(shape)))
            if ones != (n,):
                index = self.emit("reshape", [index], TileType(int32, ones))
            index = self.grow(index, shape)

            def better(a: ir.Value, i: ir.Value, b: ir.Value, j: ir.Value) -> list[ir.Value]:
                first = self.emit("and", [self.emit("eq", [a, b], int1), self.emit("lt", [i, j], int1)], int1)
                first = self.emit("or", [self.emit(best, [a, b], int1), first], int1)
                return [self.emit("select", [first, a, b], element), self.emit("select", [first, i, j], int32)]

            regions = [self.region([element, int32], better)]
            value = self.emit(kind, [x, index], result_type, with_shape(int32, left), regions=regions, **options)
            self.keep(value, self.bounds[x])
            self.keep(value.op.results[1])  # type: ignore[union-attr]
            return
        if how == "pair" and kind == "scan" and element in (float32, float64):
            return self.recurrence(element, shape, options)
        x = self.value(element, shape)
        if how == "pair":  # two sums at once
            y = self.value(int32, shape)
            if not element.is_float:
                regions = [self.region([element, int32], lambda a, i, b, j: [self.plus(a, b), self.plus(i, j)])]
                value = self.emit(kind, [x, y], result_type, with_shape(int32, left), regions=regions, **options)
                self.keep(value)
                self.keep(value.op.results[1])  # type: ignore[union-attr]
                return
        b, e = self.bounds[x], self.errors[x]
        if element.is_float:
            if how == "mul":  # factors of 1 + x / (2 n b): a product below 2
                scale = 0.5 / (n * max(b, 1.0))
                x = self.emit("mul", [x, self.fill(2.0 ** math.floor(math.log2(scale)), x.type)], x.type)
                x = self.emit("add", [x, self.fill(1.0, x.type)], x.type)
                e = 2 * (n * (e * scale + 3 * ULP[element]) + 4 * ULP[element])
                b = 2.0
            elif how not in ("min", "max"):
                how = "add"
                if b * n > LIMIT:
                    x = self.emit("mul", [x, self.fill(1 / 64 if b * n < 64 * LIMIT else 2.0**-16, x.type)], x.type)
                    b, e = b / 64, e / 64 + b / 64 * ULP[element]
                b, e = n * b, n * e + n * b * ULP[element] * (2 + math.log2(n))
        elif how == "custom":
            how = self.choose(["and", "or", "xor", "blend"])
        if how == "blend":  # the or of the ands with two masks: associative and commutative, but two operations deep

            def blend(a: ir.Value, c: ir.Value) -> list[ir.Value]:
                low, high = self.fill(85, element), self.fill(42, element)
                both = self.emit("and", [self.emit("and", [a, c], element), low], element)
                either = self.emit("and", [self.emit("or", [a, c], element), high], element)
                return [self.emit("or", [both, either], element)]

            x = self.emit("and", [x, self.fill(127, x.type)], x.type)
            regions = [self.region([element], blend)]
        else:
            attributes = {"propagate_nan": self.chance(0.5)} if element.is_float and how in ("min", "max") else {}
            regions = [self.region([element], lambda a, c: [self.emit(how, [a, c], element, **attributes)])]
        self.keep(self.emit(kind, [x], result_type, regions=regions, **options), b, e)

    def plus(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.emit("add", [a, b], a.type)

    def recurrence(self, element: DType, shape: Shape, options: dict[str, Any]) -> None:
        """h[i] = a[i] h[i-1] + b[i], |a| <= 1/2, as a scan of pairs: order matters."""
        type = TileType(element, shape)
        n = shape[options["axis"]]
        a = self.emit("sin", [self.value(element, shape, exact=True)], type)
        a = self.emit("mul", [a, self.fill(0.5, type)], type)
        b = self.value(element, shape)
        bound, error = self.bounds[b], self.errors[b]

        def combine(a: ir.Value, b: ir.Value, c: ir.Value, d: ir.Value) -> list[ir.Value]:
            return [self.emit("mul", [a, c], element), self.plus(self.emit("mul", [c, b], element), d)]

        regions = [self.region([element, element], combine)]
        value = self.emit("scan", [a, b], type, type, regions=regions, **options)
        small = 32 * ULP[element] * (1 + math.log2(n))
        self.keep(value, 1.0, small)
        self.keep(value.op.results[1], 2 * bound, 2 * error + small * (bound + 1))  # type: ignore[union-attr]

    def dot_types(self) -> list[tuple[DType, DType]]:
        pairs = [(float32, float32), (float16, float32), (bfloat16, float32), (int8, int32), (uint8, int32)]
        pairs += [(float64, float64)]
        return [(a, c) for a, c in pairs if a in self.dtypes]

    def dot(self, acc: ir.Value | None = None, element: DType | None = None) -> ir.Value | None:
        """A product; with `acc` given one that is accumulated in it (not clamped then)."""
        if not (types := self.dot_types()):
            return None
        element, wide = (element, acc.element) if acc is not None else self.choose(types)
        assert isinstance(element, DType) and isinstance(wide, DType)
        side = int(math.log2(self.limit)) // 2 + 1
        k = 1 << self.between(0, side)
        m, n = (1 << self.between(0, side) for _ in range(2)) if acc is None else acc.shape[-2:]
        batch: Shape = ((1 << self.between(0, 1),) if self.chance(0.15) else ()) if acc is None else acc.shape[:-2]
        a, b = self.value(element, (*batch, m, k)), self.value(element, (*batch, k, n))
        if self.chance(0.2) and m == k:
            perm = (*range(len(batch)), len(batch) + 1, len(batch))
            turned = self.emit("trans", [a], a.type, perm=perm)
            self.bounds[turned], self.errors[turned] = self.bounds[a], self.errors[a]
            a = turned
        if element.is_float:
            a, b = (self.tame_operand(v) for v in (a, b))
        type = TileType(wide, (*batch, m, n))
        inner = acc is not None
        if acc is None:
            acc = self.fill(0 if wide == int32 else 0.0, type) if self.chance(0.5) else self.value(wide, type.shape)
        result = self.emit("dot", [a, b, acc], type)
        if element.is_float:
            p, q = self.bounds[a], self.bounds[b]
            bound = k * p * q + self.bounds[acc]
            error = k * (p * self.errors[b] + q * self.errors[a]) + self.errors[acc]
            self.bounds[result], self.errors[result] = bound, error + bound * ULP[wide] * (2 + math.log2(k))
        return result if inner else self.keep(result, self.bounds[result], self.errors[result])

    def tame_operand(self, value: ir.Value) -> ir.Value:
        bound, error = self.bounds[value], self.errors[value]
        result = self.tame(value, "small")
        self.bounds[result], self.errors[result] = min(bound, 4.0), error
        return result

    # ------------------------------------------------------------------------------------------ control flow

    def inside(self, block: ir.Block, statements: int) -> None:
        """Random statements at the end of the block; `leave` closes it."""
        self.blocks.append(block)
        self.pools.append([v for v in block.arguments if isinstance(v.element, DType)])
        for _ in range(statements):
            self.statement(depth=len(self.blocks))

    def leave(self) -> None:
        self.blocks.pop()
        self.pools.pop()

    def carried(self) -> list[tuple[str, ir.Value]]:
        """Values to carry round a loop, each with the rule by which it changes."""
        result: list[tuple[str, ir.Value]] = []
        for _ in range(self.between(0, 3)):
            element, shape = self.typed()
            if self.chance(0.3):
                shape = ()
            if not element.is_float:
                result.append(("integer", self.value(element, shape)))
            elif self.chance(0.3):
                a = self.value(element, shape, exact=True)
                result += [("swap", a), ("swapped", self.value(element, shape, exact=True))]
            else:
                result.append((self.choose(["sum", "max", "decay", "same"]), self.value(element, shape)))
        if "dot" in self.features and self.dot_types() and self.chance(0.5):
            element, wide = self.choose(self.dot_types())
            side = int(math.log2(self.limit)) // 2
            type = TileType(wide, (1 << self.between(0, side), 1 << self.between(0, side)))
            result.append((f"dot {element}", self.fill(0 if wide == int32 else 0.0, type)))
        return result

    def assume(self, rules: Sequence[tuple[str, ir.Value]], arguments: Sequence[ir.Value]) -> list[ir.Value]:
        """Bounds of the carried values in the body; gives those that any statement of the body may use."""
        usable = []
        for (rule, start), argument in zip(rules, arguments):
            self.bounds[argument], self.errors[argument] = LIMIT, 0.0
            if rule in ("integer", "swap", "swapped"):
                usable.append(argument)
            elif rule == "same":
                self.bounds[argument], self.errors[argument] = self.bounds[start], self.errors[start]
                usable.append(argument)
        return usable

    def advance(self, rules: Sequence[tuple[str, ir.Value]], state: Sequence[ir.Value], trips: int) -> list[ir.Value]:
        """The next values; notes bound and error of the final ones under the argument."""
        following = []
        for i, ((rule, start), value) in enumerate(zip(rules, state)):
            element, shape = value.element, value.shape
            assert isinstance(element, DType)
            bound, error = self.bounds[start], self.errors[start]
            new = value
            if rule == "integer":
                new = self.value(element, shape) if self.chance(0.3) else value
                if new is value or self.chance(0.5):
                    new = self.emit(
                        self.choose(["add", "xor", "mul", "max"]), [value, self.value(element, shape)], value.type
                    )
            elif rule in ("swap", "swapped"):
                new = state[i + 1] if rule == "swap" else state[i - 1]
            elif rule.startswith("dot"):
                name = rule.split()[1]
                self.bounds[value], self.errors[value] = 0.0, 0.0
                new = self.dot(value, next(t for t in self.dtypes if t.name == name))  # type: ignore[assignment]
                total = trips * self.bounds[new]
                bound, error = (
                    total,
                    trips * self.errors[new] + trips * total * (ULP[element] if element.is_float else 0),
                )
            elif rule in ("sum", "max", "decay"):
                x = self.value(element, shape)
                b, e, ulp = self.bounds[x], self.errors[x], ULP[element]
                if rule == "max":
                    new = self.emit("max", [value, x], value.type)
                    bound, error = max(bound, b), max(error, e)
                else:
                    if rule == "decay":
                        value = self.emit("mul", [value, self.fill(0.5, value.type)], value.type)
                    new = self.emit("add", [value, x], value.type)
                    bound += trips * b
                    error += trips * (e + 2 * ulp * bound)
            self.bounds[state[i]], self.errors[state[i]] = bound, error
            following.append(new)
        return following

    def finish(self, op: ir.Op, rules: Sequence[tuple[str, ir.Value]], final: Sequence[ir.Value]) -> None:
        results = op.results[len(op.results) - len(rules) :]
        for (rule, start), result, state in zip(rules, results, final):
            bound, error = self.bounds[state], self.errors[state]
            if rule in ("swap", "swapped"):
                bound, error = LIMIT, 0.0
            self.keep(result, max(bound, self.bounds[start]), max(error, self.errors[start]))

    def loop(self) -> None:
        rules = self.carried()
        element = self.choose([int32, int32, int64])
        trips, step, lower = self.between(0, 4), self.between(1, 3), self.between(-2, 3)
        upper = lower + trips * step - (self.between(0, step - 1) if trips else self.between(0, 3))
        bounds = [self.integer(n, element) for n in (lower, upper, step)]
        starts = [v for _, v in rules]
        walker = self.walking_pointer(trips) if self.chance(0.4) else None
        if walker:
            starts.append(walker[0])
        block = ir.Block([ir.Value(element, None, "i")] + [ir.Value(v.type) for v in starts])
        variable, *state = block.arguments
        usable = self.assume(rules, state)
        self.in_loop += 1
        self.inside(block, 0)
        self.pools[-1] = [variable, *usable]
        extra = []
        if walker:
            _, buffer, stride = walker
            self.keep(self.masked_load(buffer, state[-1], None), buffer.bound)
            move = self.emit("splat", [self.integer(stride)], TileType(int32, state[-1].shape))
            extra.append(self.emit("addptr", [state[-1], move], state[-1].type))
        for _ in range(self.between(1, 4)):
            self.statement(depth=len(self.blocks))
        following = self.advance(rules, state, max(trips, 1))
        self.emit("yield", [*following, *extra])
        self.leave()
        self.in_loop -= 1
        op_results = [v.type for v in starts]
        self.emit("for", [*bounds, *starts], *op_results, regions=[block])
        op = self.blocks[-1].ops[-1]
        if walker:
            op_results.pop()
        self.finish(ir.Op("for", [], op.results[: len(rules)]), rules, state)

    def walking_pointer(self, trips: int) -> tuple[ir.Value, _Buffer, int]:
        """A tile of pointers that moves by a stride in each iteration; backwards too."""
        element, shape = self.choose(self.dtypes), self.shape()
        tiles, extent = self.axes(shape, injective=False)
        stride = self.choose([extent, 1, -1, shape[-1]])
        reach = extent + abs(stride) * max(trips - 1, 0)
        buffer = self.buffer(element, self.data(element, reach))
        base = self.base(buffer, 0, reach - extent if stride < 0 else 0)
        return self.pointers(base, tiles, shape), buffer, stride

    def while_loop(self) -> None:
        """Counts down from a number in memory; the condition may look at the carried integers too."""
        rules = self.carried()
        trips = self.between(0, 4)
        count = self.integer(trips)
        if self.chance(0.5):
            buffer = self.buffer(int32, np.array([trips], np.int32))
            count = self.emit("load", [buffer.parameter], int32)
        starts = [count, *(v for _, v in rules)]
        before, after = (ir.Block([ir.Value(v.type) for v in starts]) for _ in range(2))
        for block in (before, after):
            self.assume(rules, block.arguments[1:])
        self.in_loop += 1
        self.blocks.append(before)
        go = self.emit("gt", [before.arguments[0], self.fill(0, int32)], int1)
        self.emit("condition", [go, *before.arguments])
        self.blocks.pop()
        usable = self.assume(rules, after.arguments[1:])
        self.inside(after, 0)
        self.pools[-1] = [after.arguments[0], *usable]
        for _ in range(self.between(1, 3)):
            self.statement(depth=len(self.blocks))
        less = self.emit("sub", [after.arguments[0], self.fill(1, int32)], int32)
        following = self.advance(rules, after.arguments[1:], max(trips, 1))
        self.emit("yield", [less, *following])
        self.leave()
        self.in_loop -= 1
        self.emit("while", starts, *[v.type for v in starts], regions=[before, after])
        self.finish(self.blocks[-1].ops[-1], rules, after.arguments[1:])

    def branch(self) -> None:
        condition = self.value(int1, ()) if self.chance(0.5) else self.condition(())
        if self.chance(0.3):
            parity = self.emit("and", [self.program(), self.fill(1, int32)], int32)
            condition = self.emit("eq", [parity, self.fill(0, int32)], int1)
        types = []
        for _ in range(self.between(0, 2)):
            element, shape = self.typed()
            types.append(with_shape(int1 if self.chance(0.1) else element, () if self.chance(0.3) else shape))
        blocks, yields = [ir.Block(), ir.Block()], []
        for block in blocks:
            self.inside(block, self.between(0, 2))
            results = [self.value(t.element if isinstance(t, TileType) else t, getattr(t, "shape", ())) for t in types]  # type: ignore[arg-type]
            self.emit("yield", results)
            yields.append([(self.bounds[v], self.errors[v]) for v in results])
            self.leave()
        self.emit("if", [condition], *types, regions=blocks)
        for result, then, other in zip(self.blocks[-1].ops[-1].results, *yields):
            self.keep(result, max(then[0], other[0]), max(then[1], other[1]))

    def statement(self, depth: int) -> None:
        choices: list[tuple[float, Callable[[], Any]]] = [
            (8, self.elementwise),
            (1.5, self.convert),
            (1.5, self.some_store),
        ]
        options = {"views": (3, self.view), "reduce": (2.5, self.reduce), "scan": (1, lambda: self.reduce("scan"))}
        options |= {"dot": (1.5, self.dot), "atomic": (0.4, self.atomic), "inplace": (0.7, self.reload)}
        if depth < 3:
            options |= {"for": (1.5, self.loop), "while": (0.7, self.while_loop), "if": (1.2, self.branch)}
        choices += [option for name, option in options.items() if name in self.features]
        weights = np.array([weight for weight, _ in choices])
        choices[int(self.rng.choice(len(choices), p=weights / weights.sum()))][1]()

    def some_store(self) -> None:
        value = self.find(lambda v: isinstance(v.element, DType))
        if value is not None:
            self.store(value)

    def build(self) -> Program:
        grid = self.choose([(1, 1, 1), (2, 1, 1), (3, 1, 1), (2, 2, 1)])
        self.programs = math.prod(grid)
        body = ir.Block()
        self.inside(body, 0)
        for _ in range(self.between(1, 3)):
            value = self.load(self.choose(self.dtypes), self.shape())
            self.keep(value, self.bounds[value])
        for _ in range(self.between(self.length // 2, self.length)):
            self.statement(depth=1)
        for value in self.pools[0][-self.between(1, 4) :]:
            self.store(value)
        aligned = [isinstance(a, np.ndarray) or a % 16 == 0 for a in self.arguments]
        divisible = [16 if possible and self.chance(0.5) else 1 for possible in aligned]
        function = ir.Function("random", self.parameters, body, divisible)
        ir.verify(function)
        outputs = [self.parameters.index(b.parameter) for b in self.outputs]
        exact = [b.error == 0 for b in self.outputs]
        return Program(function, grid, self.arguments, outputs, exact, [2 * b.error for b in self.outputs])


def _float(value: ir.Value) -> bool:
    return isinstance(value.element, DType) and value.element.is_float


def _copy(array: np.ndarray, divisible: int) -> np.ndarray:
    """A copy at a multiple of 64 bytes, or one element behind that."""
    memory = np.empty(array.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + (0 if divisible > 1 else array.itemsize)
    copy = memory[start : start + array.nbytes].view(array.dtype)
    copy[:] = array
    return copy

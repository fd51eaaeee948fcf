"""Random programs, part 2 of 4: loads, stores and atomics, with affine, permuted, reversed and gathered pointers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from random_values import ULP, Buffer, Shape, Values, is_float

from nitinol.compiler import ir
from nitinol.language.types import (
    DType,
    PointerType,
    TileType,
    int1,
    int16,
    int32,
    int64,
    uint8,
    uint32,
    with_shape,
)


@dataclass
class Memory(Values):
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

    def base(self, buffer: Buffer, step: int, start: int = 0) -> ir.Value:
        """The scalar pointer to the part of this program instance."""
        pointer = self.parameter(buffer)
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

    def at(self, buffer: Buffer, index: ir.Value) -> ir.Value:
        """One pointer per index."""
        type = TileType(PointerType(buffer.element), index.shape)
        return self.emit("addptr", [self.grow(buffer.parameter, index.shape), index], type)

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

    def masked_load(self, buffer: Buffer, pointers: ir.Value, mask: ir.Value | None) -> ir.Value:
        type = with_shape(buffer.element, pointers.shape)
        if mask is None:
            return self.loaded(self.emit("load", [pointers], type), buffer)
        if self.chance(0.6):
            return self.loaded(self.emit("load", [pointers, mask, self.constant(type)], type), buffer)
        value = self.emit("load", [pointers, mask], type)  # the unspecified lanes are replaced at once
        return self.loaded(self.emit("select", [mask, value, self.constant(type)], type), buffer)

    def loaded(self, value: ir.Value, buffer: Buffer) -> ir.Value:
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
        pointers = self.at(buffer, index)
        mask = self.find(lambda v: v.type == TileType(int1, shape)) if self.chance(0.3) else None
        return self.masked_load(buffer, pointers, mask)

    def store(self, value: ir.Value, into: Buffer | None = None) -> None:
        """To the program's own part of a new or known buffer, `into` if the value fits there."""
        if value.element == int1:
            value = self.cast(value, self.choose([t for t in self.dtypes if not t.is_float] or [int32]))
        element = value.element
        assert isinstance(element, DType)
        tiles: list[ir.Value] = []
        extent = 1
        if value.shape:
            tiles, extent = self.axes(value.shape, injective=True)
        known = [b for b in self.outputs if b.element == element and b.span >= extent]
        buffer = into if into in known else self.choose(known) if known and self.chance(0.4) else None
        if buffer is None:
            span = extent + self.between(0, 3)
            buffer = self.buffer(element, self.data(element, span * self.programs), span)
        base = self.base(buffer, buffer.span, self.between(0, buffer.span - extent))
        pointers = self.pointers(base, tiles, value.shape) if tiles else base
        mask, _ = self.mask(tiles, value.shape, extent) if tiles else (None, 0)
        update = tiles and mask is not None and "inplace" in self.features and self.chance(0.3)
        if update and mask is not None and not (self.in_loop and is_float(value)):  # x[mask] += value
            old = self.loaded(self.emit("load", [pointers, mask], value.type), buffer)
            bound, error = self.bounds[old] + self.bounds[value], self.errors[old] + self.errors[value]
            value = self.emit("add", [old, value], value.type)
            if is_float(value):
                self.bounds[value], self.errors[value] = bound, error + bound * ULP[element]
                value = self.clamp(value)
        buffer.bound = max(buffer.bound, self.bounds[value])
        buffer.error = max(buffer.error, self.errors[value])
        self.emit("store", [pointers, value] + ([mask] if mask is not None else []))

    def reload(self) -> None:
        """Reads back what this program instance stored; often writes there before the value is used."""
        if "alias" in self.features and not self.outputs:
            self.store(self.value(self.dtype(), self.shape()))
        known = [b for b in self.outputs if b.span and not (self.in_loop and b.element.is_float)]
        if not known:
            return
        buffer, overwrite = self.choose(known), self.chance(0.6)
        shape = self.shape(limit=max(1, buffer.span))
        tiles, extent = self.axes(shape, injective=overwrite)
        if extent > buffer.span:
            return
        start = self.between(0, buffer.span - extent)
        pointers = self.pointers(self.base(buffer, buffer.span, start), tiles, shape)
        value = self.masked_load(buffer, pointers, None)
        value = self.keep(value, self.bounds[value], self.errors[value])
        if overwrite:
            new = self.value(buffer.element, shape)
            buffer.bound, buffer.error = max(buffer.bound, self.bounds[new]), max(buffer.error, self.errors[new])
            self.emit("store", [self.pointers(self.base(buffer, buffer.span, start), tiles, shape), new])
            if self.chance(0.5):
                self.store(value)

    def atomic(self) -> None:
        """On cells that all program instances share; integers, one kind a buffer: the order does not matter."""
        element, shape, extent = self.choose([int32, uint32, int64]), self.shape(), 1 << self.between(0, 4)
        kind = self.choose(["add", "max", "min", "and", "or", "xor"])
        value, index = self.value(element, shape), self.index(shape, extent)
        buffer = self.buffer(element, self.data(element, extent), 1)
        buffer.span = 0  # nobody else reads or writes it
        pointers = self.at(buffer, index)
        mask = [self.condition(shape)] if self.chance(0.5) else []
        self.emit("atomic_rmw", [pointers, value, *mask], value.type, kind=kind)

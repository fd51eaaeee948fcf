"""Tile IR for generated kernels, by calling the tile language's own functions on a builder of our own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nitinol.language as tl
from nitinol.compiler.ir import Function, Value
from nitinol.compiler.passes import simplify
from nitinol.graph.builder import Builder
from nitinol.graph.operation import Operation, frozen
from nitinol.language import semantic
from nitinol.language.core import set_builder, tensor
from nitinol.language.math import minimum
from nitinol.language.types import DType, PointerType, Type, float32, float64, int32, int64

Reference = tuple[str, int]  # ("leaf", i) or ("step", i)


@dataclass(frozen=True, eq=False)
class Element:
    """An elementwise operation with its attributes: what a step of a generated kernel computes. Its identity is the
    operation itself and the attributes' values."""

    operation: Operation
    attributes: Mapping[str, Any]

    @property
    def key(self) -> tuple[Any, ...]:
        return self.operation, frozen(self.attributes)

    def __call__(self, *operands: tensor) -> tensor:
        assert self.operation.tile is not None
        return self.operation.tile(*operands, **self.attributes)


# ---------------------------------------------------------------------------------------------- a kernel's structure


@dataclass(frozen=True)
class Leaf:
    """What the kernel's structure knows of an operand: which row, loop and tile strides are not 0.

    kind: "load", "index" or "scalar". inner: the stride along the tile, 0, 1, or 2 for any other.
    """

    kind: str
    dtype: DType
    rows: tuple[bool, ...] = ()
    loops: tuple[bool, ...] = ()
    inner: int = 0


@dataclass(frozen=True)
class Plan:
    """A kernel's structure, which is its key in the cache."""

    leaves: tuple[Leaf, ...]
    steps: tuple[tuple[Any, tuple[Reference, ...]], ...]  # keys of Elements, and their operands
    result: Reference
    output: Leaf
    rows: int  # how many row axes
    loops: int  # how many reduced axes besides the tile's
    tile: int  # extent of the tile along the last axis; 0: no such axis
    tile_rows: int  # rows in a tile
    index: DType  # of row and loop arithmetic
    reduce: Operation | None = None
    over_tile: bool = False  # the tile's axis is reduced
    blocks: bool = False  # ... in several steps
    rows_first: bool = False  # the first extent of the grid is that of rows, else that of tiles of a row


# -------------------------------------------------------------------------------------------------- making a kernel


def build(plan: Plan, operations: list[Element]) -> Function:
    """The tile IR. Parameters: what is loaded or scalar, the output's pointer, then the integers that `lower` lists."""
    emitter = Builder()
    previous = set_builder(emitter)
    try:
        parameters = _Kernel(plan, operations, emitter).build()
    finally:
        set_builder(previous)
    name = "_".join(dict.fromkeys([step.operation.name for step in operations])) or "copy"
    if plan.reduce is not None:
        name = f"{plan.reduce.name}_{name}" if operations else plan.reduce.name
    function = Function(name[:60], parameters, emitter.block, [1] * len(parameters))
    simplify(function)
    return function


class _Kernel:
    def __init__(self, plan: Plan, operations: list[Element], emitter: Builder) -> None:
        self.plan, self.operations, self.emitter = plan, operations, emitter
        self.parameters: list[Value] = []
        self.pointers: dict[Leaf | int, tensor] = {}

    def parameter(self, type: Type, name: str) -> tensor:
        self.parameters.append(Value(type, None, name))
        return tensor(self.parameters[-1])

    def integer(self, name: str) -> tensor:
        return self.parameter(self.plan.index, name)

    def build(self) -> list[Value]:
        plan = self.plan
        arguments: list[tensor | None] = []
        for i, leaf in enumerate(plan.leaves):
            if leaf.kind == "load":
                arguments.append(self.parameter(PointerType(leaf.dtype), f"x{i}"))
            elif leaf.kind == "scalar":
                arguments.append(semantic.cast(self.parameter(scalar_type(leaf.dtype), f"s{i}"), leaf.dtype))
            else:
                arguments.append(None)
        out = self.parameter(PointerType(plan.output.dtype), "out")
        row_count = self.integer("rows")
        rows = [self.integer(f"n{a}") for a in range(plan.rows)]
        loop_count = self.integer("loop")
        loops = [self.integer(f"m{a}") for a in range(plan.loops)]
        inner = self.integer("n")

        # Where this program is: row coordinates (a scalar or [R, 1] each), lanes ([B] or [1, B]).
        row = semantic.cast(tl.program_id(0 if plan.rows_first else 1), plan.index)
        row_mask = None
        if plan.tile_rows > 1:
            row = (row * plan.tile_rows + tl.arange(0, plan.tile_rows))[:, None]
            row_mask = row < row_count
        row_at = take_apart(semantic.cast(row, plan.index), rows)
        lanes = semantic.cast(tl.arange(0, plan.tile), plan.index) if plan.tile else None
        if lanes is not None and plan.tile_rows > 1:
            lanes = lanes[None, :]
        lane_mask = None
        if lanes is not None and not plan.over_tile:
            lanes = semantic.cast(tl.program_id(1 if plan.rows_first else 0), plan.index) * plan.tile + lanes
            lane_mask = lanes < inner

        # Offsets: the part that depends on the row and the strides of the rest.
        places: list[Any] = []
        for leaf, base in zip((*plan.leaves, plan.output), (*arguments, out)):
            if leaf.kind == "scalar":
                places.append(None)
                continue
            offset: Any = self.integer("offset") if leaf.kind == "index" else None
            for at, used in zip(row_at, leaf.rows):
                if used:
                    offset = plus(offset, at * self.integer("stride"))
            loop_strides = [self.integer("stride") if used else None for used in leaf.loops]
            step = self.integer("step") if leaf.inner == 2 else leaf.inner
            places.append((base, offset, loop_strides, step))

        def fetch(leaf: Leaf, place: Any, argument: tensor | None, loop_at: list[tensor], lanes: Any, mask: Any) -> Any:
            if place is None:
                return argument
            pointer, mask_here = address(leaf, place, loop_at, lanes, mask)
            if leaf.kind == "index":
                return semantic.cast(pointer, leaf.dtype)
            return tl.load(pointer, mask=mask_here)

        def address(leaf: Leaf, place: Any, loop_at: list[tensor], lanes: Any, mask: Any) -> tuple[Any, Any]:
            """Pointer (or index), and the part of the masks that applies to it."""
            base, offset, loop_strides, step = place
            for at, stride in zip(loop_at, loop_strides):
                if stride is not None:
                    offset = plus(offset, at * stride)
            if base is not None and offset is not None:
                offset = base + offset
            else:
                offset = base if offset is None else offset
            masks = [row_mask] if row_mask is not None and any(leaf.rows) else []
            if leaf.inner and lanes is not None:
                offset = offset + (lanes if leaf.inner == 1 else lanes * step)
                masks += [mask] if mask is not None else []
            return offset, both(masks) if masks and offset.shape else None

        def value(loop_at: list[tensor], lanes: Any, mask: Any) -> tensor:
            """The result of the last step at these coordinates."""
            leaves: dict[int, Any] = {}
            steps: list[Any] = []

            def look(ref: tuple[str, int]) -> Any:
                kind, i = ref
                if kind == "step":
                    return steps[i]
                if i not in leaves:
                    leaves[i] = fetch(plan.leaves[i], places[i], arguments[i], loop_at, lanes, mask)
                return leaves[i]

            for operation, (_, refs) in zip(self.operations, plan.steps):
                steps.append(operation(*map(look, refs)))
            return look(plan.result)

        if plan.reduce is not None:
            found = self.reduced(value, row_mask, lanes, lane_mask, inner, loop_count, loops)
            if plan.over_tile:
                lanes = lane_mask = None
        else:
            found = value([], lanes, lane_mask)
        pointer, mask = address(plan.output, places[-1], [], lanes, lane_mask)
        if mask is None and row_mask is not None and pointer.shape:
            mask = row_mask
        tl.store(pointer, semantic.cast(found, plan.output.dtype), mask=mask)
        return self.parameters

    def reduced(
        self, value: Any, row_mask: Any, lanes: Any, lane_mask: Any, inner: tensor, loop_count: tensor,
        loops: list[tensor],
    ) -> tensor:  # fmt: skip
        """The reduction of value(...) over the loop axes and, if `over_tile`, over the tile's axis."""
        plan = self.plan
        assert plan.reduce is not None and plan.reduce.reduction is not None
        reduction = plan.reduce.reduction
        shape = () if not plan.tile else (plan.tile,) if plan.tile_rows == 1 else (plan.tile_rows, plan.tile)

        def at(j: tensor | None, start: tensor | None) -> tuple[tensor, tensor]:
            """Elements in the accumulator's dtype (the identity where there are none), and their indices."""
            loop_at = take_apart(j, loops) if j is not None else [semantic.constant(0, plan.index)] * plan.loops
            here, mask = lanes, lane_mask
            if plan.over_tile:
                here = lanes if start is None else lanes + start
                mask = here < inner
            x = value(loop_at, here, mask)
            dtype = reduction.accumulator(x.dtype)
            x = semantic.cast(x, dtype)
            if shape and not x.shape and plan.tile_rows > 1:
                x = semantic.splat(x, (1, 1))
            x = semantic.broadcast_to(x, shape, "a reduction") if shape else x
            if plan.over_tile:
                x = tl.where(semantic.broadcast_to(mask, shape, "a reduction"), x, neutral(dtype))
            index = semantic.constant(0, int64) if j is None else semantic.cast(j, int64)
            if plan.over_tile:
                index = index * semantic.cast(inner, int64) + here
            index = semantic.broadcast_to(index, shape, "a reduction") if shape else index
            return x, semantic.cast(index, int32)

        def neutral(dtype: DType) -> tensor:
            return semantic.constant(reduction.identity(dtype), dtype)

        def step(state: Sequence[tensor], new: tuple[tensor, tensor]) -> list[tensor]:
            if not reduction.with_index:
                return [reduction.combine(state[0], new[0])]
            better = semantic.compare(reduction.better, new[0], state[0])
            if new[0].dtype.is_float:  # type: ignore[union-attr]
                better = better | (unordered(new[0]) & ~unordered(state[0]))  # the first NaN wins
            return [tl.where(better, new[0], state[0]), tl.where(better, new[1], state[1])]

        width = 2 if reduction.with_index else 1
        state: list[tensor] = list(at(None, None)[:width]) if not (plan.loops or plan.blocks) else []
        if not state:
            probe = set_builder(Builder())  # only to learn the accumulator's dtype
            dtype = at(None, None)[0].dtype
            set_builder(probe)
            state = [neutral(dtype), semantic.constant(0, int32)][:width]  # type: ignore[arg-type]
            state = [semantic.splat(s, shape) for s in state]

            def blocks(j: tensor | None, state: Sequence[tensor]) -> list[tensor]:
                if not plan.blocks:
                    return step(state, at(j, None))
                return self.emitter.loop(
                    inner, plan.tile, state, lambda start, *carried: step(carried, at(j, start))
                )

            if plan.loops:
                state = self.emitter.loop(loop_count, 1, state, lambda j, *carried: blocks(j, carried))
            else:
                state = blocks(None, state)
        if plan.over_tile:
            axis = len(shape) - 1
            keep = plan.tile_rows > 1
            best = tl.reduce(state[0], axis, reduction.combine, keep_dims=keep)
            if reduction.with_index:
                spread = semantic.broadcast_to(best, shape, "a reduction") if keep else best
                equal = semantic.compare("eq", state[0], spread)
                if best.dtype.is_float:
                    equal = equal | (unordered(state[0]) & unordered(spread))
                last = semantic.constant(2**31 - 1, int32)
                return tl.reduce(tl.where(equal, state[1], last), axis, minimum, keep_dims=keep)
            return best
        return state[-1]


def unordered(x: tensor) -> tensor:
    """Which elements are NaN."""
    return semantic.compare("ne", x, x)


def plus(a: tensor | None, b: tensor) -> tensor:
    return b if a is None else a + b


def both(masks: Sequence[tensor]) -> tensor:
    return masks[0] if len(masks) == 1 else masks[0] & masks[1]


def take_apart(index: tensor, extents: Sequence[tensor]) -> list[tensor]:
    """The coordinates of a row-major index."""
    found: list[tensor] = []
    for extent in reversed(extents[1:]):
        found.append(semantic.mod(index, extent))
        index = semantic.floordiv(index, extent)
    return [index, *reversed(found)] if extents else []


def scalar_type(dtype: DType) -> DType:
    """The type of the kernel parameter that carries a number of this dtype."""
    if dtype.is_float:
        return float64 if dtype == float64 else float32
    return int64 if dtype.bits > 32 or dtype.name == "uint32" else int32

"""Fused kernels: a group of elementwise operations, and perhaps a reduction of their result, as one tile kernel.

All leaves of a group are views of one shape. The kernel walks that shape as rows (any number of axes, taken apart
from one program index) and a last axis in tiles; a leaf that does not vary along an axis is loaded once for it, and
what only depends on such leaves is computed once. Kernels are cached by structure: shapes, strides and numbers are
arguments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nitinol.compiler.ir import Function
from nitinol.graph.emit import Element, Leaf, Plan, Reference, build
from nitinol.graph.nodes import INDEX, Scalar, View
from nitinol.graph.operation import Operation
from nitinol.graph.views import Shape, Strides, collapse
from nitinol.language.types import int32, int64

TILE = 1024  # elements of one tile: 4 KiB of float32, a few tiles fit the first-level cache
MOST_SECOND = 65535  # programs along the second and third extent of a grid, on CUDA
CROSSED = 16  # lanes of a tile when an operand runs across it: whole cache lines of what it reads and of what it writes


@dataclass
class Group:
    """What one generated kernel computes: `steps` in order, each an operation on leaves and earlier steps.

    `result` is stored to `output`, reduced over `axes` if `reduce` is an operation.
    """

    shape: Shape
    leaves: list[View | Scalar]
    steps: list[tuple[Element, tuple[Reference, ...]]]
    result: Reference
    output: View
    reduce: Operation | None = None
    axes: tuple[int, ...] = ()


_kernels: dict[Plan, Function] = {}


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def lower(group: Group) -> tuple[Function, tuple[int, ...], list[View | Scalar], list[int]]:
    """The kernel of a group, its grid, the operands that are its arguments (the output last), then integers."""
    views = [leaf for leaf in group.leaves if isinstance(leaf, View)]
    strides = [view.layout.strides for view in views]
    if group.reduce is None:
        rows, walked = collapse(group.shape, [*strides, group.output.layout.strides])
        loops: Shape = ()
        row_strides: list[Strides] = walked
        loop_strides: list[Strides] = [()] * len(walked)
        over_tile = False
    else:
        axes = group.axes
        kept = [axis for axis in range(len(group.shape)) if axis not in axes]
        rows, row_strides = collapse(
            tuple(group.shape[a] for a in kept),
            [*(tuple(s[a] for a in kept) for s in strides), group.output.layout.strides],
        )
        loops, loop_strides = collapse(
            tuple(group.shape[a] for a in axes), [tuple(s[a] for a in axes) for s in strides]
        )
        loop_strides = [*loop_strides, (0,) * len(loops)]
        # The tile runs along the axis in which the operands are contiguous: reduced, unless only a kept one is.
        inner_kept = any(s[-1:] == (1,) for s in row_strides[:-1])
        inner_reduced = any(s[-1:] == (1,) for s in loop_strides)
        over_tile = bool(loops) and (inner_reduced or not inner_kept or not rows)
    extents = loops if over_tile else rows
    inner, inner_strides = 0, [0] * len(row_strides)
    if extents:
        inner = extents[-1]
        inner_strides = [s[-1] for s in (loop_strides if over_tile else row_strides)]
        if over_tile:
            loops, loop_strides = loops[:-1], [s[:-1] for s in loop_strides]
        else:
            rows, row_strides = rows[:-1], [s[:-1] for s in row_strides]
    row_count, loop_count = math.prod(rows), math.prod(loops)
    tile = min(TILE, max(power_of_two(inner), 8)) if inner else 0
    tile_rows = 1
    crossed = group.reduce is None and any(s not in (0, 1) for s in inner_strides) and len(rows) > 0
    if crossed and tile > CROSSED:  # an operand runs across the tile: cover whole cache lines of it
        tile, tile_rows = CROSSED, min(TILE // CROSSED, power_of_two(row_count))
    elif tile and tile <= TILE // 8 and row_count > 1 and (over_tile or group.reduce is None):
        tile_rows = min(TILE // tile, power_of_two(row_count))
    all_views = [*views, group.output]
    wide = any(max(abs(low), abs(high)) + TILE >= 2**31 for low, high in (view.layout.span() for view in all_views))
    wide = wide or math.prod(group.shape) + TILE >= 2**31

    row_programs = -(-row_count // tile_rows)
    described: dict[int, Leaf] = {}
    for i, view in enumerate(all_views):
        kind = "index" if view.value is INDEX else "load"
        step = inner_strides[i]
        described[i] = Leaf(
            kind, view.dtype, tuple(s != 0 for s in row_strides[i]), tuple(s != 0 for s in loop_strides[i]),
            step if step in (0, 1) else 2,
        )  # fmt: skip
    position = iter(range(len(views)))
    leaves = tuple(
        described[next(position)] if isinstance(leaf, View) else Leaf("scalar", leaf.dtype) for leaf in group.leaves
    )
    plan = Plan(
        leaves, tuple((element.key, refs) for element, refs in group.steps), group.result, described[len(views)],
        len(rows), len(loops), tile, tile_rows, int64 if wide else int32,
        group.reduce, over_tile, over_tile and inner > tile, row_programs > MOST_SECOND,
    )  # fmt: skip
    function = _kernels.get(plan)
    if function is None:
        function = _kernels[plan] = build(plan, [element for element, _ in group.steps])

    operands = [leaf for leaf in group.leaves if not (isinstance(leaf, View) and leaf.value is INDEX)]
    integers = [row_count, *rows, loop_count, *loops, inner]
    for i, view in enumerate(all_views):
        if view.value is INDEX:
            integers.append(view.layout.offset)
        integers += [stride for stride in (*row_strides[i], *loop_strides[i]) if stride]
        if described[i].inner == 2:
            integers.append(inner_strides[i])
    tiles = -(-inner // tile) if tile and not over_tile else 1
    grid = (row_programs, tiles, 1) if plan.rows_first else (tiles, row_programs, 1)
    return function, grid, [*operands, group.output], integers

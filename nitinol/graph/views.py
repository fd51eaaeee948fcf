"""Layouts: which elements of a piece of memory an array looks at; arithmetic of slices, reshapes and broadcasts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from nitinol.language.types import DType

Shape = tuple[int, ...]
Strides = tuple[int, ...]

MOST_LAYOUTS = 1 << 16  # interned ones; beyond that they are made anew, which only costs time


class Layout:
    """Element [i, j, ...] lies at offset + i * strides[0] + j * strides[1] + ... in elements of `dtype`.

    Equal layouts are one object as a rule (`layout_of`), so that comparing them and finding them in tables is quick.
    """

    __slots__ = ("_hash", "contiguous", "dtype", "number", "offset", "shape", "size", "strides")

    def __init__(self, dtype: DType, shape: Shape, strides: Strides, offset: int) -> None:
        self.dtype = dtype
        self.shape = shape
        self.strides = strides
        self.offset = offset
        self.size = math.prod(shape)
        self.contiguous = is_contiguous(shape, strides)
        self._hash = hash((dtype, shape, strides, offset))
        self.number = next(_numbers)  # of the object, for keys that are looked up with every call: no other has had it

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Layout)
            and self._hash == other._hash
            and (self.shape, self.strides, self.offset, self.dtype)
            == (other.shape, other.strides, other.offset, other.dtype)
        )

    def __repr__(self) -> str:
        return f"Layout({self.dtype}, {self.shape}, strides {self.strides}, offset {self.offset})"

    def span(self) -> tuple[int, int]:
        """First and last + 1 element of the memory that is looked at."""
        if not self.size:
            return self.offset, self.offset
        reach = [(n - 1) * s for n, s in zip(self.shape, self.strides)]
        return self.offset + sum(r for r in reach if r < 0), self.offset + sum(r for r in reach if r > 0) + 1


_numbers = itertools.count()
_layouts: dict[tuple[DType, Shape, Strides, int], Layout] = {}
_whole: dict[tuple[DType, Shape], Layout] = {}


def layout_of(dtype: DType, shape: Shape, strides: Strides, offset: int = 0) -> Layout:
    """The layout with these numbers."""
    key = (dtype, shape, strides, offset)
    found = _layouts.get(key)
    if found is None:
        if len(_layouts) >= MOST_LAYOUTS:
            _layouts.clear()
        found = _layouts[key] = Layout(dtype, shape, strides, offset)
    return found


def whole_layout(dtype: DType, shape: Shape) -> Layout:
    """The layout of elements that follow each other in row-major order."""
    key = (dtype, shape)
    found = _whole.get(key)
    if found is None:
        if len(_whole) >= MOST_LAYOUTS:
            _whole.clear()
        found = _whole[key] = layout_of(dtype, shape, row_major(shape))
    return found


def row_major(shape: Sequence[int]) -> Strides:
    """Strides of contiguous memory."""
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))


def is_contiguous(shape: Shape, strides: Strides) -> bool:
    """Whether the elements follow each other in order; strides of extents below 2 do not matter."""
    step = 1
    for extent, stride in zip(reversed(shape), reversed(strides)):
        if extent == 0:
            return True
        if extent != 1:
            if stride != step:
                return False
            step *= extent
    return True


def repeats(layout: Layout) -> bool:
    """Whether two elements may lie in one place: a stride that does not step over all that the smaller ones reach."""
    reach = 0
    for stride, extent in sorted((abs(s), n) for s, n in zip(layout.strides, layout.shape) if n > 1):
        if stride <= reach:
            return True
        reach += stride * (extent - 1)
    return False


def broadcast_layout(layout: Layout, shape: Shape) -> Layout:
    """Missing axes added and extents of 1 repeated; the caller has checked that the shapes fit."""
    if layout.shape == shape:
        return layout
    missing = len(shape) - len(layout.shape)
    extents = zip(layout.shape, shape[missing:], layout.strides)
    strides = tuple(0 if have == 1 and want != 1 else stride for have, want, stride in extents)
    return layout_of(layout.dtype, shape, (0,) * missing + strides, layout.offset)


def reshape_layout(layout: Layout, shape: Shape) -> Layout | None:
    """The same elements in row-major order under another shape, or None if that needs a copy."""
    if layout.contiguous or not layout.size:
        return layout_of(layout.dtype, shape, row_major(shape), layout.offset)
    old_shape, (old_strides,) = collapse(layout.shape, [layout.strides])
    strides: list[int] = []
    old = len(old_shape) - 1
    left = old_shape[old] if old >= 0 else 1
    step = old_strides[old] if old >= 0 else 0
    for extent in reversed(shape):
        if extent == 1:
            strides.append(0)
            continue
        while left == 1:
            old -= 1
            left, step = old_shape[old], old_strides[old]
        if left % extent:
            return None
        strides.append(step)
        step *= extent
        left //= extent
    return layout_of(layout.dtype, shape, tuple(reversed(strides)), layout.offset)


def collapse(shape: Shape, operands: Sequence[Strides]) -> tuple[Shape, list[Strides]]:
    """Merges neighbouring axes that all operands walk through as one; drops extents of 1."""
    new_shape: list[int] = []
    new: list[list[int]] = [[] for _ in operands]
    for axis, extent in enumerate(shape):
        if extent == 1:
            continue
        mergeable = bool(new_shape) and all(s[-1] == strides[axis] * extent for s, strides in zip(new, operands))
        if mergeable:
            new_shape[-1] *= extent
            for s, strides in zip(new, operands):
                s[-1] = strides[axis]
        else:
            new_shape.append(extent)
            for s, strides in zip(new, operands):
                s.append(strides[axis])
    return tuple(new_shape), [tuple(s) for s in new]


def pull_back(layout: Layout, shape: Shape, operands: Sequence[Layout]) -> list[Layout] | None:
    """If `layout` looks at the row-major elements of `shape`, and each operand gives one element for each element of
    `shape`: the operands as `layout` sees them. None where it cuts across axes."""
    if layout.shape == shape and layout.contiguous and layout.offset == 0:
        return list(operands)
    axes, strides = collapse(shape, [operand.strides for operand in operands])
    steps = row_major(axes)
    start, rest = [], layout.offset
    for step in steps:
        start.append(rest // step)
        rest -= start[-1] * step
    moved = [[0] * len(layout.shape) for _ in axes]  # how far axis a of the value moves per step of the view's axis
    low, high = list(start), list(start)
    for position, (extent, stride) in enumerate(zip(layout.shape, layout.strides)):
        if extent <= 1 or stride == 0:
            continue
        for axis, (length, step) in enumerate(zip(axes, steps)):
            if stride % step == 0 and abs(stride // step) * (extent - 1) < length:
                factor = stride // step
                moved[axis][position] = factor
                if factor > 0:
                    high[axis] += factor * (extent - 1)
                else:
                    low[axis] += factor * (extent - 1)
                break
        else:
            return None
    if any(l < 0 or h >= n for l, h, n in zip(low, high, axes)):
        return None
    result = []
    for operand, walked in zip(operands, strides):
        seen = tuple(sum(m[p] * s for m, s in zip(moved, walked)) for p in range(len(layout.shape)))
        offset = operand.offset + sum(o * s for o, s in zip(start, walked))
        result.append(layout_of(operand.dtype, layout.shape, seen, offset))
    return result


def without_idle_strides(layout: Layout) -> Layout:
    """Strides of 0 where they do not matter, so that layouts of the same elements compare equal."""
    if 1 not in layout.shape:
        return layout
    strides = tuple(0 if n == 1 else s for n, s in zip(layout.shape, layout.strides))
    return layout_of(layout.dtype, layout.shape, strides, layout.offset)


def broadcast_shapes(name: str, *shapes: Shape) -> Shape:
    """The common shape; ValueError naming the operation and the shapes."""
    if len(set(shapes)) == 1:
        return shapes[0]
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(s)) + s for s in shapes]
    result = []
    for extents in zip(*padded):
        wide = {n for n in extents if n != 1}
        if len(wide) > 1:
            text = " and ".join(map(str, shapes))
            raise ValueError(f"{name}: shapes {text} do not fit together; extents must be equal or 1")
        result.append(wide.pop() if wide else 1)
    return tuple(result)

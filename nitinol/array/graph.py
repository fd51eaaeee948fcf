"""The lazy graph: values (memory to be), views of them, and the nodes that compute them.

A `Value` is one piece of memory that holds a shape's elements contiguously, once its node has run. Everything that
only renames elements (slices, transposes, broadcasts) is a `View`: a shape, strides and an offset into one value.
Nodes are numbered in the order in which the program asked for them; running them in that order is always right,
also with state that is updated in place.
"""

from __future__ import annotations

import itertools
import math
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nitinol.language.jit import JITFunction
from nitinol.language.types import DType, int32, int64
from nitinol.runtime.device import Buffer

_LIBRARY = tuple(str(Path(__file__).resolve().parent.parent / part) for part in ("array", "kernels"))
numbers = itertools.count(1)
unwritten: weakref.WeakSet[Value] = weakref.WeakSet()  # values with updates that have not run yet

Strides = tuple[int, ...]
Shape = tuple[int, ...]


class Value:
    """Memory for the elements of `shape`: computed by `node`, or there already in `buffer` (or both still missing:
    uninitialised memory that the nodes in `writes` fill)."""

    __slots__ = ("__weakref__", "buffer", "dtype", "handles", "node", "readers", "shape", "writes")

    def __init__(self, shape: Shape, dtype: DType, node: Node | None = None, buffer: Buffer | None = None) -> None:
        self.shape = shape
        self.dtype = dtype
        self.node = node
        self.buffer = buffer
        self.writes: list[Node] = []  # updates in place that have not run yet
        self.readers: weakref.WeakSet[Node] = weakref.WeakSet()  # nodes recorded since the last update
        self.handles = 0  # how many Arrays of the program look at it

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.nbytes

    @property
    def pending(self) -> bool:
        """Whether something must run before the memory holds what was asked for."""
        return self.buffer is None or bool(self.writes)


@dataclass(frozen=True, slots=True)
class View:
    """Elements of a value: element [i, j, ...] lies at offset + i * strides[0] + j * strides[1] + ... (in elements of
    `dtype`, which differs from the value's after a bitcast). A view of `INDEX` has these numbers as its elements."""

    value: Value
    dtype: DType
    shape: Shape
    strides: Strides
    offset: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def contiguous(self) -> bool:
        return self.strides == row_major(self.shape) or is_contiguous(self.shape, self.strides)

    def span(self) -> tuple[int, int]:
        """First and last + 1 element of the memory that is looked at."""
        if not self.size:
            return self.offset, self.offset
        reach = [(n - 1) * s for n, s in zip(self.shape, self.strides)]
        return self.offset + sum(r for r in reach if r < 0), self.offset + sum(r for r in reach if r > 0) + 1


INDEX = Value((), int64)


def index_view(shape: Shape, strides: Strides, offset: int = 0) -> View:
    """Elements that are computed: offset + i * strides[0] + ..."""
    view = View(INDEX, int64, shape, strides, offset)
    low, high = view.span()
    return View(INDEX, int32, shape, strides, offset) if low >= -(2**31) and high <= 2**31 else view


@dataclass(frozen=True, slots=True)
class Scalar:
    """A Python number as an operand: an argument of the kernel, so that another number needs no other kernel."""

    value: int | float | bool
    dtype: DType

    shape = ()


@dataclass(frozen=True, slots=True)
class Operation:
    """An elementwise operation: a function of the tile language, on tensors. Equal names mean equal functions."""

    name: str
    function: Callable[..., Any]
    cost: int = 1  # operations per element, roughly


@dataclass(eq=False)
class Node:
    """Something to compute."""

    inputs: tuple[View | Scalar, ...]
    number: int = field(default_factory=lambda: next(numbers), init=False)
    place: tuple[str, int, str] = field(default_factory=lambda: source_line(), init=False)  # file, line, function
    updates: tuple[View, ...] = field(default=(), init=False)  # of values that exist already
    done: bool = field(default=False, init=False)
    # Values keep their nodes alive, not the other way round: memory goes when the last Array goes, without a cycle.
    _fresh: list[Any] = field(default_factory=list, init=False)  # (weak reference, shape, dtype) of each output

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    @property
    def outputs(self) -> tuple[Value, ...]:
        """The fresh values; one that nobody holds any more is made anew."""
        found = []
        for index, (reference, shape, dtype) in enumerate(self._fresh):
            value = reference()
            if value is None:
                value = Value(shape, dtype, self)
                self._fresh[index] = (weakref.ref(value), shape, dtype)
            found.append(value)
        return tuple(found)


@dataclass(eq=False)
class Map(Node):
    """operation(inputs), element by element over `shape`; the inputs have that shape, or are scalars."""

    operation: Operation
    shape: Shape
    dtype: DType

    @property
    def name(self) -> str:
        return self.operation.name


@dataclass(eq=False)
class Reduce(Node):
    """One of REDUCTIONS (fusion.py) over the axes of the only input; the output keeps the other axes."""

    kind: str
    axes: tuple[int, ...]
    dtype: DType

    @property
    def name(self) -> str:
        return self.kind


@dataclass(eq=False)
class Launch(Node):
    """A kernel of the tile language. `arguments` by parameter: an index into inputs, outputs or updates, or a value."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    operations: int | None = None
    nbytes: int | None = None
    warps: int = 0
    stages: int = 0

    @property
    def name(self) -> str:
        return self.kernel.__name__


@dataclass(frozen=True, slots=True)
class Slot:
    """Stands for an array among the arguments of a Launch: kind is "inputs", "outputs" or "updates"."""

    kind: str
    index: int


def record(node: Node, outputs: Sequence[tuple[Shape, DType]] = (), updates: Sequence[View] = ()) -> tuple[Value, ...]:
    """Enters a node into the graph; returns its fresh values."""
    values = tuple(Value(tuple(shape), dtype, node) for shape, dtype in outputs)
    node._fresh = [(weakref.ref(value), value.shape, value.dtype) for value in values]
    node.updates = tuple(updates)
    for view in node.inputs:
        if isinstance(view, View) and view.value is not INDEX:
            view.value.readers.add(node)
    for view in updates:
        view.value.writes.append(node)
        unwritten.add(view.value)
    for hook in hooks:
        hook(node)
    return values


hooks: list[Callable[[Node], None]] = []  # what `compile` adds while it traces


def source_line() -> tuple[str, int, str]:
    """File, line and function of the innermost frame outside the array and kernel libraries."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename.startswith(_LIBRARY) or frame.f_code.co_filename == "<string>"
    ):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name


# ------------------------------------------------------------------------------------------------- view arithmetic


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


def whole(value: Value) -> View:
    """The view of all of a value."""
    return View(value, value.dtype, value.shape, row_major(value.shape))


def broadcast_view(view: View, shape: Shape) -> View:
    """A view in which missing axes and extents of 1 are repeated; the caller has checked that the shapes fit."""
    missing = len(shape) - len(view.shape)
    extents = zip(view.shape, shape[missing:], view.strides)
    strides = tuple(0 if have == 1 and want != 1 else stride for have, want, stride in extents)
    return View(view.value, view.dtype, shape, (0,) * missing + strides, view.offset)


def reshape_view(view: View, shape: Shape) -> View | None:
    """The same elements in row-major order under another shape, or None if that needs a copy."""
    if view.contiguous:
        return View(view.value, view.dtype, shape, row_major(shape), view.offset)
    if view.size == 0:
        return View(view.value, view.dtype, shape, row_major(shape), view.offset)
    old_shape, (old_strides,) = collapse(view.shape, [view.strides])
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
    return View(view.value, view.dtype, shape, tuple(reversed(strides)), view.offset)


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


def pull_back(view: View, shape: Shape, operands: Sequence[View]) -> list[View] | None:
    """If `view` looks at the row-major elements of `shape`, and each operand gives one element for each element of
    `shape`: the operands as `view` sees them. None where the view cuts across axes."""
    if view.shape == shape and view.contiguous and view.offset == 0:
        return list(operands)
    axes, strides = collapse(shape, [operand.strides for operand in operands])
    steps = row_major(axes)
    start, rest = [], view.offset
    for step in steps:
        start.append(rest // step)
        rest -= start[-1] * step
    moved = [[0] * len(view.shape) for _ in axes]  # how far axis a of the value moves per step of the view's axis
    low, high = list(start), list(start)
    for position, (extent, stride) in enumerate(zip(view.shape, view.strides)):
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
        seen = tuple(sum(m[p] * s for m, s in zip(moved, walked)) for p in range(len(view.shape)))
        offset = operand.offset + sum(o * s for o, s in zip(start, walked))
        result.append(View(operand.value, operand.dtype, view.shape, seen, offset))
    return result

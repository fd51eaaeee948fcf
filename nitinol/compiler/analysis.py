"""What a target wants to know of a tile before it chooses an order or a layout: how values change along each axis.

Used by every target: the CPU's choice of the axis that its vector lanes run along, the GPU's of coalesced layouts.
"""

from __future__ import annotations

from collections.abc import Container

from nitinol.compiler.ir import Block, Function, Op, Value, constant_of, walk
from nitinol.language.types import PointerType

Strides = tuple["int | None", ...]


class AxisStrides:
    """Strides of integer and pointer tiles, in elements, per axis: an int if constant, None if unknown."""

    def __init__(self) -> None:
        self.known: dict[Value, Strides] = {}

    def of(self, value: Value) -> Strides:
        if value not in self.known:
            self.known[value] = self._compute(value)
        return self.known[value]

    def _compute(self, value: Value) -> Strides:
        rank = len(value.shape)
        op = value.op
        unknown: Strides = (None,) * rank
        if op is None or rank == 0:
            return unknown
        kind = op.kind
        if kind == "arange":
            return (1,)
        if kind == "splat":
            return (0,) * rank
        if kind == "broadcast":
            source = op.operands[0]
            return tuple(s if a == b else 0 for s, a, b in zip(self.of(source), source.shape, value.shape))
        if kind == "trans":
            source_strides = self.of(op.operands[0])
            return tuple(source_strides[p] for p in op.attributes["perm"])
        if kind == "reshape":
            return reshape_strides(self.of(op.operands[0]), op.operands[0].shape, value.shape)
        if kind == "cast":
            return self.of(op.operands[0]) if value.element.nbytes >= op.operands[0].element.nbytes else unknown
        if kind in ("add", "addptr", "sub"):
            a, b = (self.of(v) for v in op.operands)
            sign = -1 if kind == "sub" else 1
            return tuple(None if x is None or y is None else x + sign * y for x, y in zip(a, b))
        if kind == "mul":
            for x, y in (op.operands, op.operands[::-1]):
                factor = constant_of(y)
                if factor is not None:
                    return tuple(None if s is None else s * factor for s in self.of(x))
        if kind not in ("load", "for", "while", "if", "reduce", "scan", "dot"):  # uniform operands: a uniform result
            strides = [self.of(v) for v in op.operands if v.shape == value.shape]
            if strides:
                return tuple(0 if all(s[i] == 0 for s in strides) else None for i in range(rank))
        return unknown


def axis_groups(source: tuple[int, ...], result: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Pairs (source axes, result axes) of a reshape with equal products, the finest; extents 1 are left out."""
    left = [i for i, n in enumerate(source) if n > 1]
    right = [i for i, n in enumerate(result) if n > 1]
    groups = []
    i = j = 0
    while i < len(left):
        a, b = [left[i]], [right[j]]
        size_a, size_b = source[left[i]], result[right[j]]
        i, j = i + 1, j + 1
        while size_a != size_b:
            if size_a < size_b:
                a.append(left[i])
                size_a *= source[left[i]]
                i += 1
            else:
                b.append(right[j])
                size_b *= result[right[j]]
                j += 1
        groups.append((a, b))
    return groups


def reshape_strides(strides: Strides, source: tuple[int, ...], result: tuple[int, ...]) -> Strides:
    out: list[int | None] = [0] * len(result)
    for left, right in axis_groups(source, result):
        inner = strides[left[-1]]
        run, expected = source[left[-1]], inner
        for axis in reversed(left[:-1]):  # the group is one run if every outer stride continues the inner one
            expected = None if inner is None else inner * run
            if strides[axis] != expected:
                inner = None
            run *= source[axis]
        step = inner
        for axis in reversed(right):
            out[axis] = step
            step = None if step is None else step * result[axis]
        if inner is None and strides[left[-1]] is not None and result[right[-1]] <= source[left[-1]]:
            out[right[-1]] = strides[left[-1]]  # the innermost part lies within one row of the source
    return tuple(out)


def base_pointer(value: Value, parameters: Container[Value]) -> Value | None:
    """The one of the kernel's parameters that a pointer is derived from, None if it cannot be told."""
    while value.op is not None:
        if value.op.kind in ("addptr", "splat", "broadcast", "reshape", "trans", "bitcast", "cast"):
            value = value.op.operands[0]
            if not isinstance(value.element, PointerType):
                return None
        else:
            return None
    return value if value in parameters else None  # a loop's argument may be any pointer


def uses_of(function: Function) -> dict[Value, list[Op]]:
    """Every value's users, in program order, an operation once per operand."""
    uses: dict[Value, list[Op]] = {}
    for op in walk(function.body):
        for operand in op.operands:
            uses.setdefault(operand, []).append(op)
    return uses


def replace_uses(block: Block, old: Value, new: Value) -> None:
    for op in walk(block):
        op.operands = [new if v is old else v for v in op.operands]

"""Folding: operations whose result is known, or is an operand, or is a cheaper operation, at compile time.

Every rule keeps each bit of the result (the payload of a NaN aside): `x + 0.0` stays, since it turns -0.0 into 0.0.
What a target may decide (division by zero, shifts by the width or more, floats that fit no int) is not folded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nitinol.compiler.ir import (
    BINARY,
    COMPARISONS,
    ELEMENTWISE,
    Block,
    Function,
    Location,
    Op,
    Value,
    constant_of,
    create,
)
from nitinol.compiler.semantics import constant, elementwise
from nitinol.language.types import (
    DType,
    PointerType,
    TileType,
    Type,
    bfloat16,
    element_type,
    float16,
    float32,
    float64,
    int1,
)

_COMMUTATIVE = frozenset("add mul and or xor mulhi eq ne".split())  # min and max tell -0.0 from 0.0
_NEVER_FOLDED = frozenset(("bitcast", "addptr"))


def fold(function: Function) -> bool:
    """Folds what it can in one walk in program order; tells whether anything changed."""
    folder = _Folder()
    folder.block(function.body)
    return folder.changed


class _Folder:
    def __init__(self) -> None:
        self.replaced: dict[Value, Value] = {}
        self.changed = False
        self.ops: list[Op] = []  # the new contents of the block in hand
        self.location: Location | None = None

    # ------------------------------------------------------------------------------------------------ the walk

    def block(self, block: Block) -> None:
        outer, self.ops = self.ops, []
        self.inline(block.ops)
        block.ops, self.ops = self.ops, outer

    def inline(self, ops: Sequence[Op]) -> None:
        """Folds operations one after the other into the block in hand."""
        for op in ops:
            op.operands = [self.resolve(v) for v in op.operands]
            self.location = op.location
            values = self.control(op)
            if values is None:
                for region in op.regions:
                    self.block(region)
                values = self.simpler(op)
            if values is None:
                self.ops.append(op)
                continue
            self.changed = True
            for old, new in zip(op.results, values):
                self.replaced[old] = new
                if new.op is not None and not new.name and new.shape == old.shape:
                    new.name = old.name

    def resolve(self, value: Value) -> Value:
        while value in self.replaced:
            value = self.replaced[value]
        return value

    def make(self, kind: str, /, operands: Sequence[Value], type: Type, **attributes: Any) -> Value:
        """A new operation of one result, folded itself."""
        op = create(kind, operands, [type], self.location, **attributes)
        values = self.simpler(op)
        if values is not None:
            return values[0]
        self.ops.append(op)
        return op.result

    def known(self, number: Any, type: Type) -> Value:
        """A constant scalar or tile."""
        value = self.make("constant", [], element_type(type), value=number)
        return self.make("splat", [value], type) if isinstance(type, TileType) else value

    # -------------------------------------------------------------------------------------------- control flow

    def control(self, op: Op) -> Sequence[Value] | None:
        """The results of control flow that is decided; its operations move into the block in hand."""
        if op.kind == "if" and (condition := constant_of(op.operands[0])) is not None:
            return self.splice(op.regions[0 if condition else 1], ())
        if op.kind == "for":
            bounds = [constant_of(v) for v in op.operands[:3]]
            if None not in bounds:
                trips = len(range(*bounds))  # type: ignore[arg-type]
                if trips == 0:
                    return op.operands[3:]
                if trips == 1:
                    return self.splice(op.regions[0], [op.operands[0], *op.operands[3:]])
            body = op.regions[0]
            for i, (argument, following) in enumerate(zip(body.arguments[1:], body.terminator.operands)):
                if following is argument and argument not in self.replaced:  # carried, but never changed
                    self.replaced[argument] = self.replaced[op.results[i]] = op.operands[3 + i]
                    self.changed = True
        return None

    def splice(self, region: Block, arguments: Sequence[Value]) -> Sequence[Value]:
        self.replaced.update(zip(region.arguments, arguments))
        self.inline(region.ops[:-1])
        return [self.resolve(v) for v in region.terminator.operands]

    # --------------------------------------------------------------------------------------------------- rules

    def simpler(self, op: Op) -> Sequence[Value] | None:
        """Values to use instead of the results, None to keep the operation."""
        kind = op.kind
        value: Value | None
        if kind == "if":
            then, other = (r.terminator.operands for r in op.regions)
            if op.results and all(a is b for a, b in zip(then, other)):
                self.replaced.update(zip(op.results, then))  # the branches stay for what they write
                self.changed = True
                for region in op.regions:
                    region.terminator.operands = []
                op.results = []
            return None
        if kind in ELEMENTWISE:
            if kind in _COMMUTATIVE and constant_of(op.operands[0]) is not None and constant_of(op.operands[1]) is None:
                op.operands.reverse()
            value = self.evaluated(op) or self.decided(op) or self.identity(op) or self.uniform(op)
            return None if value is None else [value]
        if kind in ("broadcast", "reshape", "trans"):
            value = self.view(op)
            return None if value is None else [value]
        if kind == "splat" or not op.results:
            return None if kind != "assert" or constant_of(op.operands[0]) is not True else []
        if kind == "split" and (inner := op.operands[0].op) is not None and inner.kind == "join":
            return inner.operands
        if kind == "arange" and op.result.shape == (1,):
            return [self.known(op.attributes["start"], op.result.type)]
        if kind == "load":
            return self.load(op)
        return None

    def evaluated(self, op: Op) -> Value | None:
        """The constant result of constant operands."""
        numbers = [constant_of(v) for v in op.operands]
        element = op.result.element
        if None in numbers or op.kind in _NEVER_FOLDED:
            return None
        source = op.operands[0].element
        if isinstance(element, PointerType) or isinstance(source, PointerType):
            return None
        if element.is_int and op.kind in ("div", "rem", "shl", "shr"):
            undecided = numbers[1] == 0 if op.kind in ("div", "rem") else not 0 <= numbers[1] < element.bits  # type: ignore[operator]
            if undecided:
                return None
        if op.kind == "cast" and source.is_float and element.is_int and element != int1:
            limit = 2 ** (element.bits - 1)
            if not math.isfinite(numbers[0]) or not -limit <= numbers[0] < limit:  # type: ignore[operator, arg-type]
                return None
        scalars = [constant(n, v.element) for n, v in zip(numbers, op.operands)]
        with np.errstate(all="ignore"):
            return self.known(np.asarray(elementwise(op)(*scalars)).item(), op.result.type)

    def decided(self, op: Op) -> Value | None:
        """The result of an integer comparison that the ranges of both sides decide: `arange(0, 64) < 64`."""
        if op.kind not in ("lt", "le", "gt", "ge") or (left := _range(op.operands[0])) is None:
            return None
        if (right := _range(op.operands[1])) is None:
            return None
        if op.kind in ("gt", "ge"):
            left, right = right, left
        strict = op.kind in ("lt", "gt")
        if left[1] < right[0] or (left[1] == right[0] and not strict):
            return self.known(True, op.result.type)
        if left[0] > right[1] or (left[0] == right[1] and strict):
            return self.known(False, op.result.type)
        return None

    def uniform(self, op: Op) -> Value | None:
        """One scalar operation instead of one on tiles that hold the same value in each lane."""
        sources = [_splatted(v) for v in op.operands]
        type = op.results[0].type
        if not isinstance(type, TileType) or None in sources:
            return None
        scalar = self.make(op.kind, sources, type.element, **op.attributes)  # type: ignore[arg-type]
        return self.make("splat", [scalar], type)

    def load(self, op: Op) -> Sequence[Value] | None:
        pointer, *rest = op.operands
        mask = constant_of(rest[0]) if rest else None
        if mask is True:
            return [self.make("load", [pointer], op.result.type, **op.attributes)]
        if mask is False and len(rest) == 2:
            return [rest[1]]
        value = self.uniform(op)
        return None if value is None else [value]

    def view(self, op: Op) -> Value | None:
        source, type = op.operands[0], op.result.type
        if (scalar := _splatted(source)) is not None:
            return self.make("splat", [scalar], type)
        inner = source.op
        if op.kind == "trans":
            perm = op.attributes["perm"]
            if inner is not None and inner.kind == "trans":
                first = inner.attributes["perm"]
                return self.make("trans", inner.operands, type, perm=tuple(first[p] for p in perm))
            return source if list(perm) == list(range(len(perm))) else None
        if source.type == type:
            return source
        if inner is not None and inner.kind == op.kind:
            return self.make(op.kind, inner.operands, type)
        return None

    def identity(self, op: Op) -> Value | None:
        """x + 0, x * 1, x & x and their kin."""
        kind, operands, type = op.kind, op.operands, op.result.type
        x = operands[0]
        element = element_type(type)
        if kind == "select":
            condition = constant_of(x)
            if condition is not None:
                return operands[1 if condition else 2]
            if operands[1] is operands[2]:
                return operands[1]
            arms = constant_of(operands[1]), constant_of(operands[2])
            return x if element == int1 and arms == (True, False) else None
        if kind in ("cast", "bitcast"):
            if x.type == type:
                return x
            inner = x.op
            round_trip = inner is not None and inner.kind == kind and inner.operands[0].type == type
            lossless = kind == "bitcast" or (round_trip and _holds(x.element, inner.operands[0].element))  # type: ignore[union-attr]
            return inner.operands[0] if inner is not None and round_trip and lossless else None
        if kind in ("not", "neg"):
            inner = x.op
            return inner.operands[0] if inner is not None and inner.kind == kind else None
        if kind not in BINARY | COMPARISONS | {"addptr"}:
            return None
        y = operands[1]
        number, same = constant_of(y), x is y
        if kind == "addptr":
            return x if number == 0 else None
        if isinstance(element, DType) and element.is_float:
            return self.float_identity(op, number)
        if kind in COMPARISONS:
            exact = isinstance(x.element, PointerType) or x.element.is_int
            return self.known(kind in ("eq", "le", "ge"), type) if same and exact else None
        assert isinstance(element, DType)
        ones = True if element == int1 else -1 if element.is_signed else 2**element.bits - 1
        neutral = {"add": 0, "sub": 0, "mul": 1, "div": 1, "and": ones, "or": 0, "xor": 0, "shl": 0, "shr": 0}
        absorbing = {"mul": 0, "and": 0, "or": ones}
        if element == int1 and kind in ("add", "sub", "mul", "div", "shl", "shr"):
            return None
        if number is not None and number == neutral.get(kind):
            return x
        if number is not None and number == absorbing.get(kind):
            return y
        if same and kind in ("and", "or", "min", "max"):
            return x
        if (same and kind in ("sub", "xor")) or (kind == "rem" and number == 1):
            return self.known(False if element == int1 else 0, type)
        return None

    def float_identity(self, op: Op, number: Any) -> Value | None:
        kind, (x, y) = op.kind, op.operands
        if number is None:
            return x if kind in ("min", "max") and x is y else None
        zero = number == 0 and math.copysign(1.0, number)
        if (kind in ("mul", "div") and number == 1) or (kind == "add" and zero == -1) or (kind == "sub" and zero == 1):
            return x
        if kind == "div" and number and math.isfinite(number) and math.frexp(number)[0] in (0.5, -0.5):
            reciprocal = 1.0 / number  # of a power of two: exact
            if 2.0**-14 <= abs(reciprocal) <= 2.0**14:  # normal in every format
                return self.make("mul", [x, self.known(reciprocal, y.type)], x.type)
        return None


def _splatted(value: Value) -> Value | None:
    return value.op.operands[0] if value.op is not None and value.op.kind == "splat" else None


def _holds(wide: DType | PointerType, narrow: DType | PointerType) -> bool:
    """Whether every value of `narrow` is one of `wide`."""
    if isinstance(wide, PointerType) or isinstance(narrow, PointerType) or int1 in (wide, narrow):
        return False
    if narrow.is_float:
        return wide in {float16: (float32, float64), bfloat16: (float32, float64), float32: (float64,)}.get(narrow, ())
    if wide.is_float:
        return narrow.bits < {float16: 11, bfloat16: 8, float32: 24, float64: 53}[wide]
    return wide.bits > narrow.bits and (wide.is_signed or not narrow.is_signed)


def _range(value: Value) -> tuple[int, int] | None:
    """The least and the greatest integer a tile of indices holds, if it is plain to see."""
    number = constant_of(value)
    if isinstance(number, int) and not isinstance(number, bool):
        return number, number
    op = value.op
    if op is None:
        return None
    if op.kind == "arange":
        return op.attributes["start"], op.attributes["end"] - 1
    widens = op.kind == "cast" and op.result.element.nbytes >= op.operands[0].element.nbytes
    return _range(op.operands[0]) if widens or op.kind in ("broadcast", "reshape", "trans") else None

"""The passes that all targets share: folding (in folding.py), common subexpressions, loop-invariant motion, dead code.

Each changes the function in place, tells whether it changed anything, and keeps the function valid (`ir.verify`) and
every result that the interpreter would give.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

from nitinol.compiler.folding import fold
from nitinol.compiler.ir import (
    EFFECTS,
    ELEMENTWISE,
    TERMINATORS,
    VIEWS,
    WRITES,
    Block,
    Function,
    Op,
    Value,
    constant_of,
    walk,
)
from nitinol.language.types import DType

_PURE = ELEMENTWISE | VIEWS | frozenset("constant program_id num_programs arange gather dot".split())
_MOVABLE = (_PURE | {"reduce", "scan"}) - {"gather"}  # gather may be out of bounds where the loop does not run


def simplify(function: Function) -> None:
    """Runs the passes until nothing changes (at most 8 rounds: each later one has little left to do)."""
    passes: tuple[Callable[[Function], bool], ...] = (fold, merge, hoist, remove_dead)
    for _ in range(8):
        if not any([run(function) for run in passes]):
            return


# ------------------------------------------------------------------------------------------- common subexpressions


def merge(function: Function) -> bool:
    """Equal pure operations become one, where the first is visible. Equal loads too, if nothing is written between."""
    replaced: dict[Value, Value] = {}
    memory = [0]  # the number of the state that memory is in, and of states so far
    counter = 0

    def changed_memory() -> None:
        nonlocal counter
        counter += 1
        memory[0] = counter

    def visit(block: Block, outer: dict[Hashable, Op]) -> None:
        seen = dict(outer)
        kept = []
        for op in block.ops:
            op.operands = [replaced.get(v, v) for v in op.operands]
            key = _key(op, memory[0])
            if key is not None and key in seen:
                replaced.update(zip(op.results, seen[key].results))
                continue
            kept.append(op)
            if key is not None:
                seen[key] = op
            writes = op.kind in WRITES or any(o.kind in WRITES for region in op.regions for o in walk(region))
            if writes and op.kind != "if":  # an iteration sees what the one before wrote
                changed_memory()
            before = memory[0]
            for region in op.regions:
                memory[0] = before
                visit(region, seen)
            if writes:
                changed_memory()
        block.ops = kept

    visit(function.body, {})
    return bool(replaced)


def _key(op: Op, memory: int) -> Hashable:
    """Equal for operations of equal results; None for what is never merged."""
    if op.kind not in _PURE and op.kind != "load":
        return None
    attributes = tuple(sorted((name, repr(value)) for name, value in op.attributes.items()))
    version = memory if op.kind == "load" else -1
    return op.kind, tuple(map(id, op.operands)), tuple(r.type for r in op.results), attributes, version


# ------------------------------------------------------------------------------------------- loop-invariant motion


def hoist(function: Function) -> bool:
    """Moves out of loops what they compute anew each time. Only what cannot fail: the loop might not run at all."""
    changed = False

    def visit(block: Block) -> None:
        nonlocal changed
        kept: list[Op] = []
        for op in block.ops:
            for region in op.regions:
                visit(region)
            if op.kind in ("for", "while"):
                inside = {v for region in op.regions for v in _defined(region)}
                for region in op.regions:
                    stay = []
                    for inner in region.ops:
                        if _movable(inner) and inside.isdisjoint(_uses(inner)):
                            kept.append(inner)
                            inside.difference_update(inner.results)
                        else:
                            stay.append(inner)
                    changed |= len(stay) < len(region.ops)
                    region.ops = stay
            kept.append(op)
        block.ops = kept

    visit(function.body)
    return changed


def _movable(op: Op) -> bool:
    element = op.results[0].element if op.results else None
    if op.kind in ("div", "rem") and isinstance(element, DType) and element.is_int:
        return bool(constant_of(op.operands[1])) and constant_of(op.operands[1]) != -1
    return op.kind in _MOVABLE


def _defined(block: Block) -> set[Value]:
    """All values that come to be in a block or below."""
    values = set(block.arguments)
    for op in walk(block):
        values.update(op.results)
        for region in op.regions:
            values.update(region.arguments)
    return values


def _uses(op: Op) -> set[Value]:
    """The values from outside that an operation with its regions needs."""
    used, own = set(op.operands), set()
    for region in op.regions:
        own |= _defined(region)
        used.update(v for o in walk(region) for v in o.operands)
    return used - own


# ------------------------------------------------------------------------------------------------------- dead code


def remove_dead(function: Function) -> bool:
    """Removes what no effect depends on: operations, results of `if`, and values that loops only carry."""
    live = _Liveness(function)
    changed = False

    def keep(values: list[Value], wanted: list[bool]) -> list[Value]:
        return [v for v, w in zip(values, wanted, strict=True) if w]

    def visit(block: Block) -> None:
        nonlocal changed
        kept = [op for op in block.ops if op in live.ops or op.kind in TERMINATORS]
        changed |= len(kept) < len(block.ops)
        block.ops = kept
        for op in kept:
            for region in op.regions:
                visit(region)
            if op.kind not in ("for", "if", "while"):
                continue
            first, last = op.regions[0], op.regions[-1]
            wanted = [v in live.values for v in op.results]
            if op.kind == "if":
                for region in op.regions:
                    region.terminator.operands = keep(region.terminator.operands, wanted)
            elif op.kind == "for":
                wanted = [w or v in live.values for w, v in zip(wanted, first.arguments[1:])]
                op.operands[3:] = keep(op.operands[3:], wanted)
                first.arguments[1:] = keep(first.arguments[1:], wanted)
                last.terminator.operands = keep(last.terminator.operands, wanted)
            else:
                carried = [v in live.values for v in first.arguments]
                wanted = [w or v in live.values for w, v in zip(wanted, last.arguments)]
                op.operands, first.arguments = keep(op.operands, carried), keep(first.arguments, carried)
                last.terminator.operands = keep(last.terminator.operands, carried)
                first.terminator.operands[1:] = keep(first.terminator.operands[1:], wanted)
                last.arguments = keep(last.arguments, wanted)
                changed |= not all(carried)
            op.results = keep(op.results, wanted)
            changed |= not all(wanted)

    visit(function.body)
    return changed


class _Liveness:
    """The operations and values that effects depend on, found from the effects backwards."""

    def __init__(self, function: Function) -> None:
        self.ops: set[Op] = set()
        self.values: set[Value] = set()
        self.parents: dict[Op, Op] = {}  # an operation -> the one whose region it is in
        self.arguments: dict[Value, tuple[Op, int, int]] = {}  # -> the operation, number of the region, position
        self.pending: list[Value] = []
        for op in walk(function.body):
            for number, region in enumerate(op.regions):
                self.parents.update((inner, op) for inner in region.ops)
                self.arguments.update((v, (op, number, i)) for i, v in enumerate(region.arguments))
        for op in walk(function.body):
            if op.kind in EFFECTS:
                self.need_op(op)
        while self.pending:
            self.follow(self.pending.pop())

    def need(self, *values: Value) -> None:
        for value in values:
            if value not in self.values:
                self.values.add(value)
                self.pending.append(value)

    def need_op(self, op: Op) -> None:
        """The operation runs: what it needs for any result, and the control flow around it."""
        if op in self.ops:
            return
        self.ops.add(op)
        if op.kind == "for":
            self.need(*op.operands[:3])
        elif op.kind == "if":
            self.need(op.operands[0])
        elif op.kind == "while":
            self.need(op.regions[0].terminator.operands[0])
        else:
            self.need(*op.operands)
            for region in op.regions:  # of a reduction or scan
                self.need(*region.terminator.operands)
        if op in self.parents:
            self.need_op(self.parents[op])

    def follow(self, value: Value) -> None:
        if value.op is not None and value in value.op.results:
            op, position = value.op, value.op.results.index(value)
            self.need_op(op)
            if op.kind == "if":
                self.need(*(region.terminator.operands[position] for region in op.regions))
            elif op.kind == "for":
                self.need(op.operands[3 + position], op.regions[0].terminator.operands[position])
            elif op.kind == "while":
                self.need(op.regions[0].terminator.operands[1 + position])
        elif value in self.arguments:
            op, number, position = self.arguments[value]
            self.need_op(op)
            if op.kind == "for" and position > 0:
                self.need(op.operands[2 + position], op.regions[0].terminator.operands[position - 1])
            elif op.kind == "while" and number == 0:
                self.need(op.operands[position], op.regions[1].terminator.operands[position])
            elif op.kind == "while":
                self.need(op.regions[0].terminator.operands[1 + position])


__all__ = ["fold", "hoist", "merge", "remove_dead", "simplify"]

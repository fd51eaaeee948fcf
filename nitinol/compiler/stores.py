"""Which parameters' memory a kernel writes: what the addresses of its stores and atomics are computed from."""

from __future__ import annotations

from nitinol.compiler.ir import WRITES, Block, Function, Op, Value, walk
from nitinol.language.types import PointerType

_ANYWHERE = -1  # an address that was loaded from memory, or made of nothing that is known
_Origins = frozenset[int]


def stores(function: Function) -> frozenset[int]:
    """The positions of the run-time parameters through which a store or an atomic operation may write.

    Followed are pointer arithmetic, views, selects, branches, loops, and pointers that are numbers for a while; a
    number that becomes an address counts as a parameter like a pointer. A store to an address that was loaded from
    memory may go anywhere: then all pointers count.
    """
    pointers = frozenset(i for i, p in enumerate(function.parameters) if isinstance(p.element, PointerType))
    origins: dict[Value, _Origins] = {p: frozenset((i,)) for i, p in enumerate(function.parameters)}
    while any([_flow(op, origins, pointers) for op in walk(function.body)]):  # until a pass over all adds nothing
        pass
    reached = frozenset[int]().union(
        *(origins.get(op.operands[0], frozenset()) for op in walk(function.body) if op.kind in WRITES))  # fmt: skip
    return reached - {_ANYWHERE} | pointers if _ANYWHERE in reached else reached


def _flow(op: Op, origins: dict[Value, _Origins], pointers: _Origins) -> bool:
    """Passes on, through one operation, which parameters values come from; whether that added anything."""
    changed = False

    def into(targets: list[Value], *sources: list[Value]) -> None:
        """From the n-th of each of the sources into the n-th target."""
        for number, target in enumerate(targets):
            add(target, frozenset[int]().union(*(origins.get(values[number], frozenset()) for values in sources)))

    def add(target: Value, found: _Origins) -> None:
        nonlocal changed
        before = origins.get(target, frozenset())
        if not found <= before:
            origins[target] = before | found
            changed = True

    def ending(block: Block) -> list[Value]:
        return block.terminator.operands

    if op.kind == "for":
        (body,) = op.regions
        into(body.arguments[1:], op.operands[3:], ending(body))
        into(op.results, op.operands[3:], ending(body))
        into(body.arguments[:1], op.operands[:1])
    elif op.kind == "while":
        before, after = op.regions
        into(before.arguments, op.operands, ending(after))
        into(after.arguments, ending(before)[1:])
        into(op.results, ending(before)[1:])
    elif op.kind == "if":
        into(op.results, *(ending(region) for region in op.regions))
    elif op.kind in ("load", "atomic_rmw", "atomic_cas"):
        add(op.result, frozenset((_ANYWHERE,)))
    elif op.kind in ("reduce", "scan"):
        (body,) = op.regions
        into(body.arguments, op.operands * 2, (ending(body) * 2))
        into(op.results, op.operands, ending(body))
    else:
        found = [origins.get(value, frozenset()) for value in op.operands]
        if op.kind == "addptr":  # an offset is a number, unless pointers were subtracted
            found[1] &= pointers
        elif op.kind == "select":
            found[0] = frozenset()
        together = frozenset[int]().union(*found)
        for result in op.results:
            made = op.kind == "cast" and isinstance(result.element, PointerType) and not together
            add(result, frozenset((_ANYWHERE,)) if made else together)
    return changed

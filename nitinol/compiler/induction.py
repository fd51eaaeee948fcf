"""Loop-carried pointer and index tiles that advance by one scalar per iteration carry the scalar instead.

`a_pointers += BLOCK_K` makes a tile of pointers live around the loop. Rewritten as `a_pointers + offset` with a scalar
`offset` that is carried, the tile is again an affine function of lane numbers, which every target can address cheaply.
"""

from __future__ import annotations

from nitinol.compiler.analysis import replace_uses
from nitinol.compiler.ir import Block, Function, Op, Value, create
from nitinol.language.types import DType, PointerType, int64, with_shape


def scalarise_induction(function: Function) -> None:
    _block(function.body, function.body)


def _block(block: Block, body: Block) -> None:
    index = 0
    while index < len(block.ops):
        op = block.ops[index]
        for region in op.regions:
            _block(region, body)
        if op.kind == "for":
            index += _loop(block, index, op, body)
        index += 1


def _loop(block: Block, index: int, loop: Op, body: Block) -> int:
    """Rewrites what it can of one loop; returns how many operations it added before the loop."""
    region = loop.regions[0]
    ending = region.terminator
    added = 0
    for position in range(len(loop.results)):
        carried, initial, result = region.arguments[1 + position], loop.operands[3 + position], loop.results[position]
        step = _scalar_step(carried, ending.operands[position])
        if step is None:
            continue
        pointer = isinstance(carried.element, PointerType)
        element: DType = int64 if pointer else step.type  # type: ignore[assignment]
        zero = create("constant", [], [element], loop.location, value=0)
        block.ops.insert(index + added, zero)
        added += 1

        offset = Value(element, None, carried.name and f"{carried.name}_offset")
        first = _advanced(initial, offset, carried, loop)
        for operation in reversed(first):
            region.ops.insert(0, operation)
        replace_uses(region, carried, first[-1].result)
        for operation in first:  # replace_uses must not have touched the new operations' own operands
            operation.operands = [initial if v is first[-1].result else v for v in operation.operands]
        wide = [] if step.type == element else [create("cast", [step], [element], loop.location)]
        following = create("add", [offset, wide[0].result if wide else step], [element], loop.location)
        region.ops[-1:-1] = [*wide, following]

        final = Value(element, loop, offset.name)
        region.arguments[1 + position] = offset
        loop.operands[3 + position] = zero.result
        ending.operands[position] = following.result
        loop.results[position] = final
        after = _advanced(initial, final, result, loop)
        place = block.ops.index(loop) + 1
        block.ops[place:place] = after
        replace_uses(body, result, after[-1].result)
    return added


def _scalar_step(carried: Value, following: Value) -> Value | None:
    """The scalar s of `following = carried + splat(s)`, None if it is not of that form."""
    if not carried.shape or following.op is None or following.op.kind not in ("add", "addptr"):
        return None
    if isinstance(carried.element, DType) and not carried.element.is_int:
        return None
    a, b = following.op.operands
    if following.op.kind == "add" and b is carried:
        a, b = b, a
    if a is not carried:
        return None
    while b.op is not None and b.op.kind in ("splat", "broadcast", "reshape"):
        b = b.op.operands[0]
    return b if b.shape == () else None


def _advanced(start: Value, offset: Value, like: Value, loop: Op) -> list[Op]:
    """Operations for start + splat(offset)."""
    splat = create("splat", [offset], [with_shape(offset.element, like.shape)], loop.location)
    kind = "addptr" if isinstance(like.element, PointerType) else "add"
    total = create(kind, [start, splat.result], [like.type], loop.location)
    total.result.name = like.name
    return [splat, total]

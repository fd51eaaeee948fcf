"""Widening casts of bytes move behind the views of them: broadcast(cast(x)) becomes cast(broadcast(x)).

Kernels write `w.to(tl.int32) * x[None, :].to(tl.int32)`; with the casts next to the product every target can see
that it multiplies bytes, and use its integer dot instructions.
"""

from __future__ import annotations

from nitinol.compiler.analysis import replace_uses
from nitinol.compiler.ir import Block, Function, Value, create
from nitinol.language.types import int8, int32, uint8, with_element

MOVED = ("broadcast", "reshape", "trans", "splat")


def sink_byte_casts(function: Function) -> None:
    _block(function.body, function.body)


def _block(block: Block, body: Block) -> None:
    index = 0
    while index < len(block.ops):
        op = block.ops[index]
        for region in op.regions:
            _block(region, body)
        narrow = _widened_bytes(op.operands[0]) if op.kind in MOVED else None
        if narrow is not None:
            result = with_element(op.result.type, narrow.element)
            view = create(op.kind, [narrow], [result], op.location, **op.attributes)
            wide = create("cast", [view.result], [op.result.type], op.location)
            wide.result.name = op.result.name
            block.ops[index : index + 1] = [view, wide]
            replace_uses(body, op.result, wide.result)
            index += 1
        index += 1


def _widened_bytes(value: Value) -> Value | None:
    """The bytes that a cast to int32 made this value of."""
    op = value.op
    if op is None or op.kind != "cast" or value.element != int32:
        return None
    return op.operands[0] if op.operands[0].element in (int8, uint8) else None

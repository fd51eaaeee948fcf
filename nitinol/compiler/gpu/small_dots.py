"""Products with few rows become sums of products: the large operand stays where it was loaded, nothing is staged.

Matrix instructions take 8 rows. With fewer, as in decoding, a dot is bound by the memory that b comes from; as
sum(a[:, :, None] * b[None, :, :], axis=1) each thread multiplies what it has of b by the few values of a that it needs.
"""

from __future__ import annotations

from nitinol.compiler.analysis import replace_uses
from nitinol.compiler.ir import Block, Function, Op, Value, create
from nitinol.language.types import Type, with_element, with_shape

ROWS = 8  # from here on a dot stays one


def expand_small_dots(function: Function) -> None:
    """Rewrites dots with fewer than 8 rows, in place."""
    _block(function.body, function.body)


def _block(block: Block, body: Block) -> None:
    index = 0
    while index < len(block.ops):
        op = block.ops[index]
        for region in op.regions:
            _block(region, body)
        if op.kind == "dot" and op.operands[0].shape[-2] < ROWS:
            made = _products(op)
            block.ops[index : index + 1] = made
            made[-1].result.name = op.result.name
            replace_uses(body, op.result, made[-1].result)
            index += len(made) - 1
        index += 1


def _products(op: Op) -> list[Op]:
    a, b, acc = op.operands
    element = acc.element
    *batch, m, k = a.shape
    n = b.shape[-1]
    ops: list[Op] = []

    def add(kind: str, operands: list[Value], type: Type, **attributes: object) -> Value:
        ops.append(create(kind, operands, [type], op.location, **attributes))  # type: ignore[arg-type]
        return ops[-1].result

    def spread(value: Value, ones: tuple[int, ...]) -> Value:
        value = add("reshape", [value], with_shape(value.element, ones))
        value = add("broadcast", [value], with_shape(value.element, (*batch, m, k, n)))
        return add("cast", [value], with_element(value.type, element))

    product = add(
        "mul", [spread(a, (*batch, m, k, 1)), spread(b, (*batch, 1, k, n))], with_shape(element, (*batch, m, k, n))
    )
    region = Block([Value(element), Value(element)])
    total = create("add", region.arguments, [element], op.location)
    region.ops = [total, create("yield", [total.result], [], op.location)]
    summed = add("reduce", [product], acc.type, regions=[region], axis=len(batch) + 1)
    add("add", [summed, acc], acc.type)
    return ops

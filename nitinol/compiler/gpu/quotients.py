"""Many numbers divided by few: x / d with 1 / d at hand is a product and two fused ones, correctly rounded.

q = x (1/d), then q + (x - q d)(1/d): with 1/d rounded to nearest, that is the quotient rounded to nearest (Markstein,
"Computation of elementary functions on the IBM RISC System/6000 processor", 1990), unless numbers are so large or
small that a step over- or underflows: then a thread divides all its elements anew. A division takes about 14
instructions, this 6, which tells in a softmax whose memory traffic allows 30 per element.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nitinol.compiler.gpu.forms import Index
from nitinol.compiler.gpu.layout import bits_of
from nitinol.compiler.ir import Block, Function, Op, create
from nitinol.language.types import float32

if TYPE_CHECKING:
    from nitinol.compiler.gpu.emit import Emitter

FEWER = 2  # divisors at least by this power of two


def share_inverses(function: Function) -> None:
    """Divisions by values that are spread over a tile get a third operand, the inverse (div of one operand)."""
    _block(function.body)


def _block(block: Block) -> None:
    index = 0
    while index < len(block.ops):
        op = block.ops[index]
        for region in op.regions if op.kind in ("for", "while", "if") else ():
            _block(region)
        if op.kind == "div" and op.result.element == float32 and op.result.shape:
            before = _inverse(op)
            block.ops[index:index] = before
            index += len(before)
        index += 1


def _inverse(op: Op) -> list[Op]:
    divisor, views = op.operands[1], []
    while divisor.op is not None and divisor.op.kind in ("splat", "broadcast", "reshape"):
        views.append(divisor.op)
        divisor = divisor.op.operands[0]
    if bits_of(divisor.shape) + FEWER > bits_of(op.result.shape) or divisor.op is None or divisor.op.kind == "constant":
        return []
    ops = [create("div", [divisor], [divisor.type], op.location)]
    ops[0].result.name = "inverse"  # a variable of its own
    for view in reversed(views):
        ops.append(create(view.kind, [ops[-1].result], [view.result.type], op.location, **view.attributes))
    op.operands.append(ops[-1].result)
    return ops


def divide(e: Emitter, op: Op) -> None:
    for layout in e.assignment.versions(op.result):
        x, d, inverse = (e.form(v, layout) for v in op.operands)
        if not x.stored:
            x = e.store_in(e.name("dividend"), float32, layout.count, x)
        plain = e.name("plain")
        e.say(f"bool {plain} = true;")
        out = e.declare(e.name(op.result.name or "quotient"), float32, layout.count)
        check = f"{plain} &= ordinary({{}}, {{}});"
        e.each(layout.count, lambda i, x=x, n=inverse, check=check: [check.format(x.text(i), n.text(i))],  # type: ignore[misc]
               [x, inverse], defines=[plain])  # fmt: skip
        index = Index(tuple(1 << bit for bit in range(len(layout.registers))))
        a, b, c = (form.text(index) for form in (x, d, inverse))
        loop = [e.dialect.UNROLL, f"for (int r = 0; r < {layout.count}; r++)"] if layout.count > 1 else []
        e.say(
            f"if ({plain}) {{", *loop, f"    {out.text(index)} = quotient_by({a}, {b}, {c});",
            "} else {", *loop, f"    {out.text(index)} = {x.operand(index)} / {d.operand(index)};", "}",
        )  # fmt: skip
        e.forms[op.result, layout] = out

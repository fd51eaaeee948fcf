"""The builder that tile operations append to where the graph makes a kernel; kernels in Python have the front end's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nitinol.compiler.ir import Block, Op, Value, create
from nitinol.language import semantic
from nitinol.language.core import tensor
from nitinol.language.types import Type


class Builder:
    """Makes tile IR, block by block."""

    def __init__(self) -> None:
        self.block = Block()

    def create(
        self, kind: str, /, operands: Sequence[Value], results: Sequence[Type], regions: Sequence[Block] = (),
        **attributes: Any,
    ) -> Op:  # fmt: skip
        op = create(kind, operands, results, None, regions, **attributes)
        self.block.ops.append(op)
        return op

    def region(self, types: Sequence[Type], function: Callable[..., Sequence[tensor]]) -> Block:
        block = Block([Value(t) for t in types])
        outer, self.block = self.block, block
        results = function(*map(tensor, block.arguments))
        self.create("yield", [r.handle for r in results], ())
        self.block = outer
        return block

    def call(self, function: Any, arguments: Sequence[Any], keywords: dict[str, Any] | None = None) -> Any:
        return function(*arguments, **(keywords or {}))

    def loop(self, count: tensor, step: int, carried: Sequence[tensor], body: Callable[..., Any]) -> list[tensor]:
        """`for i in range(0, count, step)`; body(i, *carried) gives the next carried values."""
        bounds = [semantic.constant(n, count.dtype) for n in (0, step)]
        region = self.region([count.dtype, *(c.type for c in carried)], body)
        operands = [bounds[0].handle, count.handle, bounds[1].handle, *(c.handle for c in carried)]
        return [tensor(r) for r in self.create("for", operands, [c.type for c in carried], [region]).results]

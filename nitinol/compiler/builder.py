"""Where the front end's operations go: the current block, the current place in the source, regions."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from nitinol.compiler.errors import CompilationError
from nitinol.compiler.ir import Block, Location, Op, Value, create
from nitinol.language.core import tensor, unwrap
from nitinol.language.jit import JITFunction
from nitinol.language.types import Type

Call = Callable[["Builder", Any, Sequence[Any], dict[str, Any]], Any]


class Builder:
    """Appends operations to `block`, at the location of the syntax node `node` of `function`.

    `stack` holds (function, node) of the calls being inlined, outermost first.
    """

    def __init__(self, function: JITFunction, call: Call) -> None:
        self.block = Block()
        self.function = function
        self.node: ast.AST = function.tree
        self.stack: list[tuple[JITFunction, ast.AST]] = []
        self._call = call
        self._located: tuple[ast.AST | None, Location] = (None, self.location_of(function, function.tree))

    def create(
        self,
        kind: str,
        /,
        operands: Sequence[Value],
        results: Sequence[Type],
        regions: Sequence[Block] = (),
        **attributes: Any,
    ) -> Op:
        """A new operation at the end of the current block."""
        op = create(kind, operands, results, self.location, regions, **attributes)
        self.block.ops.append(op)
        return op

    def call(self, function: Any, arguments: Sequence[Any], keywords: dict[str, Any] | None = None) -> Any:
        """Calls a @jit function (inlined) or a tile operation."""
        return self._call(self, unwrap(function), arguments, keywords or {})

    def region(self, argument_types: Sequence[Type], function: Callable[..., Sequence[tensor]]) -> Block:
        """A block with arguments of these types that yields what `function` makes of them."""
        block = Block([Value(t) for t in argument_types])
        with self.inside(block):
            results = function(*map(tensor, block.arguments))
            self.create("yield", [r.handle for r in results], ())
        return block

    @contextmanager
    def inside(self, block: Block) -> Iterator[Block]:
        """Operations go to `block` meanwhile."""
        outer, self.block = self.block, block
        try:
            yield block
        finally:
            self.block = outer

    @property
    def location(self) -> Location:
        """The place of the current node."""
        node, location = self._located
        if node is not self.node:
            location = self.location_of(self.function, self.node)
            self._located = (self.node, location)
        return location

    @staticmethod
    def location_of(function: JITFunction, node: Any) -> Location:
        """The place of a node in the user's file. A node of several lines is marked on its first."""
        line, shift = function.line_offset + node.lineno, function.column_offset + 1
        end = node.end_col_offset + shift if node.end_lineno == node.lineno else 1
        return Location(function.file, line, node.col_offset + shift, end)

    def error(self, message: str, node: ast.AST | None = None) -> CompilationError:
        """The error for the current place, with the calls that led there."""
        location = self.location_of(self.function, node or self.node)
        calls = []
        for function, call in reversed(self.stack):
            place = self.location_of(function, call)
            calls.append((place, function.source_line(place.line)))
        return CompilationError(message, location, self.function.source_line(location.line), calls)

"""Builds tile IR by hand, for the tests below the front end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from nitinol.compiler import ir
from nitinol.language.types import DType, PointerType, TileType, Type, int1, int32, with_element, with_shape


class Build:
    """`b = Build(pointer(int32), int32)`; `b.parameters`; `v = b("add", x, y)`; `b.function`, verified.

    The result's type is the first operand's, int1 of its shape for comparisons, the pointer's element for loads, or
    what `type` says.
    """

    def __init__(self, *types: Type, names: Sequence[str] = "xyzuvw") -> None:
        self.parameters = [ir.Value(t, None, n) for t, n in zip(types, names, strict=False)]
        self.blocks = [ir.Block()]
        self.line = 0

    def __call__(self, kind: str, /, *operands: ir.Value, type: Any = None, **attributes: Any) -> Any:
        self.line += 1
        if type is None and kind in ir.EFFECTS | ir.TERMINATORS and not kind.startswith("atomic"):
            type = ()
        elif type is None:
            type = operands[-1 if kind.startswith("atomic") else 0].type
            if kind in ir.COMPARISONS:
                type = with_element(type, int1)
            elif kind == "load":
                type = with_element(type, operands[0].element.element)  # type: ignore[union-attr]
            elif kind == "dot":
                type = operands[2].type
        types = type if isinstance(type, (tuple, list)) else [type]
        regions = attributes.pop("regions", ())
        op = ir.create(kind, operands, types, ir.Location("test.py", self.line), regions, **attributes)
        self.blocks[-1].ops.append(op)
        return op.results[0] if len(op.results) == 1 else op.results

    def constant(self, number: Any, type: Type) -> ir.Value:
        element = type.element if isinstance(type, TileType) else type
        value = self("constant", type=element, value=number)
        return self("splat", value, type=type) if isinstance(type, TileType) else value

    def arange(self, n: int, start: int = 0) -> ir.Value:
        return self("arange", type=TileType(int32, (n,)), start=start, end=start + n)

    def at(self, parameter: int, shape: tuple[int, ...], offset: ir.Value | None = None) -> ir.Value:
        """A tile of pointers to consecutive elements, or to those at `offset`."""
        n = TileType(int1, shape).size
        index = self("reshape", self.arange(n), type=TileType(int32, shape)) if offset is None else offset
        pointer = self.parameters[parameter]
        return self("addptr", self("splat", pointer, type=TileType(pointer.element, shape)), index)

    def load(self, parameter: int, shape: tuple[int, ...]) -> ir.Value:
        return self("load", self.at(parameter, shape) if shape else self.parameters[parameter])

    def store(self, parameter: int, value: ir.Value) -> None:
        self("store", self.at(parameter, value.shape) if value.shape else self.parameters[parameter], value)

    @contextmanager
    def block(self, *types: Type) -> Iterator[ir.Block]:
        """A region: what is built inside goes into it."""
        block = ir.Block([ir.Value(t) for t in types])
        self.blocks.append(block)
        yield block
        self.blocks.pop()

    @property
    def function(self) -> ir.Function:
        function = ir.Function("test", self.parameters, self.blocks[0], [1] * len(self.parameters))
        ir.verify(function)
        return function


def pointer(element: DType) -> PointerType:
    return PointerType(element)


def tile_of(element: Any, shape: tuple[int, ...]) -> Type:
    return with_shape(element, shape)

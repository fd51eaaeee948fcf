"""Products that are smaller than a matrix instruction, rewritten before layouts are chosen.

With too few rows, as in decoding, a dot is bound by the memory that b comes from: as
sum(a[:, :, None] * b[None, :, :], axis=1) each thread multiplies what it has of b by the few values of a that it needs,
and nothing is staged. With enough rows but too few columns or too short a sum, floats are padded: columns are repeated,
the sum goes on with zeros.

Where matrix instructions take no bytes, they take them as halves, which hold -2048 to 2048 exactly, and add up floats,
which are exact as long as every partial sum stays below 2**24: 1024 products of int8 (128 * 128 each), 512 of int8 and
uint8 (128 * 255), 256 of uint8 (255 * 255). Longer sums are cut into such pieces, whose sums are added as integers.
"""

from __future__ import annotations

from nitinol.compiler.analysis import replace_uses
from nitinol.compiler.ir import Block, Function, Op, Value, create
from nitinol.language.types import DType, TileType, Type, float16, float32, int1, int8, int32, with_element, with_shape


def expand_small_dots(function: Function, sides: tuple[int, int, int], bytes_as_halves: bool) -> None:
    """Rewrites dots with less than `sides` rows, columns or products in a sum, in place, and with `bytes_as_halves`
    those of bytes."""
    _block(function.body, function.body, sides, bytes_as_halves)


def _block(block: Block, body: Block, sides: tuple[int, int, int], bytes_as_halves: bool) -> None:
    index = 0
    while index < len(block.ops):
        op = block.ops[index]
        for region in op.regions:
            _block(region, body, sides, bytes_as_halves)
        if op.kind == "dot":
            made = _Rewrite(op, sides, bytes_as_halves).ops
            if made:
                block.ops[index : index + 1] = made
                made[-1].result.name = op.result.name
                replace_uses(body, op.result, made[-1].result)
                index += len(made) - 1
        index += 1


class _Rewrite:
    """`ops`: what one dot becomes, the last of them its result; none if it stays."""

    def __init__(self, op: Op, sides: tuple[int, int, int], bytes_as_halves: bool) -> None:
        self.ops: list[Op] = []
        self.location, self.sides = op.location, sides
        a, b, acc = op.operands
        m, n, k = a.shape[-2], b.shape[-1], a.shape[-1]
        if m < sides[0]:
            self.products(a, b, acc)
        elif bytes_as_halves and acc.element == int32:
            self.halves(a, b, acc)
        elif (n < sides[1] or k < sides[2]) and acc.element == float32 and a.element == b.element:
            self.padded(a, b, acc, max(n, sides[1]), max(k, sides[2]))

    def add(self, kind: str, operands: list[Value], type: Type, **attributes: object) -> Value:
        self.ops.append(create(kind, operands, [type], self.location, **attributes))  # type: ignore[arg-type]
        return self.ops[-1].result

    def spread(self, value: Value, ones: tuple[int, ...], shape: tuple[int, ...]) -> Value:
        """A reshape and a broadcast."""
        value = self.add("reshape", [value], with_shape(value.element, ones))
        return self.add("broadcast", [value], with_shape(value.element, shape))

    def fill(self, number: float, type: Type) -> Value:
        element = type.element if isinstance(type, TileType) else type
        return self.add("splat", [self.add("constant", [], element, value=number)], type)

    def reduce(self, value: Value, axis: int, kind: str) -> Value:
        """By an operation; "" takes any of the equal elements."""
        element = value.element
        region = Block([Value(element), Value(element)])
        if kind:
            region.ops.append(create(kind, region.arguments, [element], self.location))
        kept = region.ops[0].result if kind else region.arguments[0]
        region.ops.append(create("yield", [kept], [], self.location))
        shape = value.shape[:axis] + value.shape[axis + 1 :]
        return self.add("reduce", [value], with_shape(element, shape), regions=[region], axis=axis)

    def products(self, a: Value, b: Value, acc: Value) -> None:
        *batch, m, k = a.shape
        shape = (*batch, m, k, b.shape[-1])
        wide = []
        for value, ones in ((a, (*batch, m, k, 1)), (b, (*batch, 1, k, b.shape[-1]))):
            spread = self.spread(value, ones, shape)
            wide.append(self.add("cast", [spread], with_element(spread.type, acc.element)))
        total = self.reduce(self.add("mul", wide, with_shape(acc.element, shape)), len(batch) + 1, "add")
        self.add("add", [total, acc], acc.type)

    def halves(self, a: Value, b: Value, acc: Value) -> None:
        *batch, m, k = a.shape
        n = b.shape[-1]
        largest = [128 if v.element == int8 else 255 for v in (a, b)]
        piece = min(k, 1 << ((1 << 24) // (largest[0] * largest[1])).bit_length() - 1)
        a, b = (self.add("cast", [v], with_element(v.type, float16)) for v in (a, b))
        if piece < k:  # [..., k / piece, m, piece] @ [..., k / piece, piece, n]
            a = self.add("reshape", [a], with_shape(float16, (*batch, m, k // piece, piece)))
            order = (*range(len(batch)), len(batch) + 1, len(batch), len(batch) + 2)
            a = self.add("trans", [a], with_shape(float16, (*batch, k // piece, m, piece)), perm=order)
            b = self.add("reshape", [b], with_shape(float16, (*batch, k // piece, piece, n)))
        zero = self.fill(0.0, with_shape(float32, (*a.shape[:-1], n)))
        if n < self.sides[1] or piece < self.sides[2]:
            total = self.padded(a, b, zero, max(n, self.sides[1]), max(piece, self.sides[2]))
        else:
            total = self.add("dot", [a, b, zero], zero.type)
        total = self.add("cast", [total], with_element(total.type, int32))
        if piece < k:
            total = self.reduce(total, len(batch), "add")
        self.add("add", [acc, total], acc.type)

    def padded(self, a: Value, b: Value, acc: Value, columns: int, depth: int) -> Value:
        *batch, m, k = a.shape
        n = b.shape[-1]
        if k < depth:
            a, b = self.lengthen(a, len(batch) + 1, depth), self.lengthen(b, len(batch), depth)
        if n < columns:
            shape = (*batch, depth, columns // n, n)
            b = self.spread(b, (*batch, depth, 1, n), shape)
            b = self.add("reshape", [b], with_shape(b.element, (*batch, depth, columns)))
        zero = acc if n == columns else self.fill(0.0, with_shape(float32, (*batch, m, columns)))
        total = self.add("dot", [a, b, zero], zero.type)
        if n < columns:
            total = self.add("reshape", [total], with_shape(float32, (*batch, m, columns // n, n)))
            total = self.add("add", [self.reduce(total, len(batch) + 1, ""), acc], acc.type)
        return total

    def lengthen(self, value: Value, axis: int, extent: int) -> Value:
        """Zeros behind a tile."""
        shape, element = value.shape, value.element
        assert isinstance(element, DType)
        before, n, after = shape[:axis], shape[axis], shape[axis + 1 :]
        longer = (*before, extent, *after)
        value = self.spread(value, (*before, 1, n, *after), (*before, extent // n, n, *after))
        value = self.add("reshape", [value], with_shape(element, longer))
        place = self.add("arange", [], TileType(int32, (extent,)), start=0, end=extent)
        edge = self.fill(n, place.type)
        inside = self.add("lt", [place, edge], TileType(int1, (extent,)))
        inside = self.spread(inside, (*(1,) * axis, extent, *(1,) * len(after)), longer)
        return self.add("select", [inside, value, self.fill(0.0, value.type)], value.type)

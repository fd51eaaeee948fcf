"""Random programs, part 3 of 4: elementwise operations, casts, views, reductions, scans and dots."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from random_memory import Memory
from random_values import INTEGERS, LIMIT, ULP, Shape

from nitinol.compiler import ir
from nitinol.language.types import (
    DType,
    TileType,
    bfloat16,
    float16,
    float32,
    float64,
    int1,
    int8,
    int32,
    uint8,
    with_shape,
)


@dataclass
class Operations(Memory):
    def typed(self) -> tuple[DType, Shape]:
        """A type for the next statement: mostly one that is in use."""
        found = self.find(lambda v: isinstance(v.element, DType) and v.element in self.dtypes)
        if found is None or self.chance(0.3):
            return self.dtype(), self.shape()
        return found.element, found.shape  # type: ignore[return-value]

    def elementwise(self) -> None:
        element, shape = self.typed()
        (self.float_operation if element.is_float else self.integer_operation)(element, shape)

    def integer_operation(self, element: DType, shape: Shape) -> None:
        type = with_shape(element, shape)
        x, y = self.value(element, shape), self.value(element, shape)
        kind = self.choose(
            "add sub mul div rem and or xor shl shr mulhi min max neg not abs select logic bitcast".split()
        )
        if kind in ("div", "rem"):  # divisors of 2..16 and -2..-16: neither 0 nor -1
            y = self.emit("and", [y, self.fill(14, type)], type)
            y = self.emit("add", [y, self.fill(2, type)], type)
            if element.is_signed and self.chance(0.5):
                y = self.emit("neg", [y], type)
        elif kind in ("shl", "shr"):
            y = self.emit("and", [y, self.fill(element.bits - 1, type)], type)
        if kind in ("neg", "not", "abs"):
            self.keep(self.emit(kind, [x], type))
        elif kind == "select":
            self.keep(self.emit("select", [self.value(int1, shape), x, y], type))
        elif kind == "logic":
            a, b = self.value(int1, shape), self.value(int1, shape)
            a = self.emit(self.choose(["and", "or", "xor"]), [a, b], a.type)
            self.keep(self.emit("not", [a], a.type) if self.chance(0.5) else a)
        elif kind == "bitcast":
            same = [t for t in INTEGERS if t.bits == element.bits and t in self.dtypes]
            self.keep(self.emit("bitcast", [x], with_shape(self.choose(same), shape)))
        else:
            self.keep(self.emit(kind, [x, y], type))

    def float_operation(self, element: DType, shape: Shape) -> None:
        type, ulp = with_shape(element, shape), ULP[element]
        x = self.value(element, shape)
        kinds = "add sub mul div min max neg abs fma select rem floor ceil bitcast".split()
        if "math" in self.features:
            kinds += "exp exp2 log log2 sqrt rsqrt sin cos tanh erf exp sqrt tanh".split()
        kind = self.choose(kinds)
        b, e = self.bounds[x], self.errors[x]
        if kind in ("add", "sub", "mul", "div", "min", "max"):
            y = self.value(element, shape)
            if kind == "div":  # by at least 1
                y = self.tame(y, "positive")
            c, f = self.bounds[y], self.errors[y]
            options = {"propagate_nan": self.chance(0.5)} if kind in ("min", "max") else {}
            result = self.emit(kind, [x, y], type, **options)
            if kind in ("min", "max"):
                self.keep(result, max(b, c), max(e, f))
            elif kind == "mul":
                self.keep(result, b * c, b * f + c * e + e * f + b * c * ulp)
            elif kind == "div":
                self.keep(result, b, e + b * f + b * ulp * (2 if element == float32 else 1))
            else:
                self.keep(result, b + c, e + f + (b + c) * ulp)
        elif kind in ("neg", "abs"):
            self.keep(self.emit(kind, [x], type), b, e)
        elif kind == "fma":
            y, z = self.value(element, shape), self.value(element, shape)
            c, d = self.bounds[y], self.bounds[z]
            error = b * self.errors[y] + c * e + e * self.errors[y] + self.errors[z] + (b * c + d) * ulp
            self.keep(self.emit("fma", [x, y, z], type), b * c + d, error)
        elif kind == "select":
            y = self.value(element, shape)
            result = self.emit("select", [self.value(int1, shape), x, y], type)
            self.keep(result, max(b, self.bounds[y]), max(e, self.errors[y]))
        elif kind in ("rem", "floor", "ceil", "bitcast"):  # not continuous
            x = self.value(element, shape, exact=True)
            if kind == "rem":
                divisor = self.fill(self.choose([0.75, 1.5, 3.0, -2.0]), type)
                self.keep(self.emit("rem", [x, divisor], type), self.bounds[x])
            elif kind != "bitcast":
                self.keep(self.emit(kind, [x], type), self.bounds[x] + 1)
            else:
                same = [t for t in INTEGERS if t.bits == element.bits and t in self.dtypes]
                if same:
                    zero = self.fill(0.0, type)  # the sign of a zero is open after min and max
                    x = self.emit("select", [self.emit("eq", [x, zero], with_shape(int1, shape)), zero, x], type)
                    self.keep(self.emit("bitcast", [x], with_shape(self.choose(same), shape)))
        else:
            positive = {name: "positive" for name in ("log", "log2", "sqrt", "rsqrt")}
            x = self.tame(x, ({"exp": "small", "exp2": "small"} | positive).get(kind, ""))
            b, e = self.bounds[x], self.errors[x]
            top = {"exp": math.exp(min(b, 5)), "exp2": 2.0 ** min(b, 5), "sqrt": math.sqrt(b), "log2": b, "log": b}
            bound = top.get(kind, 1.0)
            slope = {"exp": bound, "exp2": bound, "log2": 1.5, "erf": 1.2}.get(kind, 1.0)
            self.keep(self.emit(kind, [x], type), bound, slope * e + 8 * ulp * max(bound, 1.0))

    def tame(self, x: ir.Value, how: str) -> ir.Value:
        """As "positive": |x| + 1; as "small": clamped to |x| <= 4."""
        b, e = self.bounds[x], self.errors[x]
        assert isinstance(x.element, DType)
        if how == "positive":
            x = self.emit("abs", [x], x.type)
            x = self.emit("add", [x, self.fill(1.0, x.type)], x.type)
            self.bounds[x], self.errors[x] = b + 1, e + (b + 1) * ULP[x.element]
        elif how == "small" and b > 4:
            for kind, edge in (("min", 4.0), ("max", -4.0)):
                x = self.emit(kind, [x, self.fill(edge, x.type)], x.type)
            self.bounds[x], self.errors[x] = 4.0, e
        return x

    def convert(self) -> None:
        source = self.find(lambda v: isinstance(v.element, DType))
        if source is None:
            return self.elementwise()
        result = self.cast(source, self.dtype())
        self.keep(result, self.bounds[result], self.errors[result])

    def view(self) -> None:
        x = self.find(lambda v: v.shape != () and isinstance(v.element, DType))
        if x is None:
            return self.elementwise()
        shape, element = x.shape, x.element
        assert isinstance(element, DType)
        b, e = self.bounds[x], self.errors[x]
        kind = self.choose(["reshape", "trans", "join", "split", "cat", "broadcast", "splat", "flip"])
        size = math.prod(shape)
        if kind == "reshape":
            new = self.shape(limit=size)
            new = (*new, size // math.prod(new))
            self.keep(self.emit("reshape", [x], TileType(element, new)), b, e)
        elif kind == "trans":
            perm = tuple(int(p) for p in self.rng.permutation(len(shape)))
            self.keep(self.emit("trans", [x], TileType(element, tuple(shape[p] for p in perm)), perm=perm), b, e)
        elif kind in ("join", "cat") and 2 * size <= self.limit:
            y = self.value(element, shape)
            b, e = max(b, self.bounds[y]), max(e, self.errors[y])
            if kind == "join":
                self.keep(self.emit("join", [x, y], TileType(element, (*shape, 2))), b, e)
            else:
                axis = self.between(0, len(shape) - 1)
                double = (*shape[:axis], 2 * shape[axis], *shape[axis + 1 :])
                self.keep(self.emit("cat", [x, y], TileType(element, double), axis=axis), b, e)
        elif kind == "split":
            if shape[-1] != 2 and size >= 2:
                shape = (size // 2, 2)
                x = self.emit("reshape", [x], TileType(element, shape))
            if len(shape) > 1 and shape[-1] == 2:
                half = TileType(element, shape[:-1])
                for result in self.emit("split", [x], half, half).op.results:  # type: ignore[union-attr]
                    self.keep(result, b, e)
        elif kind == "broadcast" and 1 in shape:
            axis = shape.index(1)
            extent = 1 << self.between(0, int(math.log2(max(1, self.limit // size))))
            self.keep(self.grow(x, (*shape[:axis], extent, *shape[axis + 1 :])), b, e)
        elif kind == "splat":
            scalar = self.value(element, ())
            b, e = self.bounds[scalar], self.errors[scalar]
            self.keep(self.emit("splat", [scalar], TileType(element, self.shape())), b, e)
        elif "gather" in self.features:
            axis = self.between(0, len(shape) - 1)
            new = self.choose([shape[axis], 1, min(2 * shape[axis], max(shape[axis], self.limit // size))])
            index = self.index((*shape[:axis], new, *shape[axis + 1 :]), shape[axis])
            self.keep(self.emit("gather", [x, index], TileType(element, index.shape), axis=axis), b, e)

    def region(self, elements: Sequence[DType], body: Callable[..., Sequence[ir.Value]]) -> ir.Block:
        """The combining block of a reduction or scan: body(left..., right...) -> results."""
        block = ir.Block([ir.Value(e) for e in (*elements, *elements)])
        self.blocks.append(block)
        self.emit("yield", body(*block.arguments))
        self.blocks.pop()
        return block

    def reduce(self, kind: str = "reduce") -> None:
        element, shape = self.typed()
        if shape == ():
            shape = self.shape()
        axis = self.between(0, len(shape) - 1)
        n, left = shape[axis], (shape if kind == "scan" else shape[:axis] + shape[axis + 1 :])
        options: dict[str, Any] = {"axis": axis} | ({"reverse": self.chance(0.4)} if kind == "scan" else {})
        how = self.choose(["add", "add", "min", "max", "arg", "pair", "mul", "custom"])
        result_type = with_shape(element, left)
        if how == "arg":
            best = self.choose(["lt", "gt"])
            x = self.value(element, shape, exact=True)
            index = self.emit("arange", [], TileType(int32, (n,)), start=0, end=n)
            ones = tuple(n if i == axis else 1 for i in range(len(shape)))
            if ones != (n,):
                index = self.emit("reshape", [index], TileType(int32, ones))
            index = self.grow(index, shape)

            def better(a: ir.Value, i: ir.Value, b: ir.Value, j: ir.Value) -> list[ir.Value]:
                first = self.emit("and", [self.emit("eq", [a, b], int1), self.emit("lt", [i, j], int1)], int1)
                first = self.emit("or", [self.emit(best, [a, b], int1), first], int1)
                return [self.emit("select", [first, a, b], element), self.emit("select", [first, i, j], int32)]

            regions = [self.region([element, int32], better)]
            value = self.emit(kind, [x, index], result_type, with_shape(int32, left), regions=regions, **options)
            self.keep(value, self.bounds[x])
            self.keep(value.op.results[1])  # type: ignore[union-attr]
            return
        if how == "pair" and kind == "scan" and element in (float32, float64):
            return self.recurrence(element, shape, options)
        x = self.value(element, shape)
        if how == "pair":  # two sums at once
            y = self.value(int32, shape)
            if not element.is_float:
                regions = [self.region([element, int32], lambda a, i, b, j: [self.plus(a, b), self.plus(i, j)])]
                value = self.emit(kind, [x, y], result_type, with_shape(int32, left), regions=regions, **options)
                self.keep(value)
                self.keep(value.op.results[1])  # type: ignore[union-attr]
                return
        b, e = self.bounds[x], self.errors[x]
        if element.is_float:
            if how == "mul":  # factors of 1 + x / (2 n b): a product below 2
                scale = 0.5 / (n * max(b, 1.0))
                x = self.emit("mul", [x, self.fill(2.0 ** math.floor(math.log2(scale)), x.type)], x.type)
                x = self.emit("add", [x, self.fill(1.0, x.type)], x.type)
                e = 2 * (n * (e * scale + 3 * ULP[element]) + 4 * ULP[element])
                b = 2.0
            elif how not in ("min", "max"):
                how = "add"
                if b * n > LIMIT:
                    x = self.emit("mul", [x, self.fill(1 / 64 if b * n < 64 * LIMIT else 2.0**-16, x.type)], x.type)
                    b, e = b / 64, e / 64 + b / 64 * ULP[element]
                b, e = n * b, n * e + n * b * ULP[element] * (2 + math.log2(n))
        elif how == "custom":
            how = self.choose(["and", "or", "xor", "blend"])
        if how == "blend":  # the or of the ands with two masks: associative and commutative, but two operations deep

            def blend(a: ir.Value, c: ir.Value) -> list[ir.Value]:
                low, high = self.fill(85, element), self.fill(42, element)
                both = self.emit("and", [self.emit("and", [a, c], element), low], element)
                either = self.emit("and", [self.emit("or", [a, c], element), high], element)
                return [self.emit("or", [both, either], element)]

            x = self.emit("and", [x, self.fill(127, x.type)], x.type)
            regions = [self.region([element], blend)]
        else:
            attributes = {"propagate_nan": self.chance(0.5)} if element.is_float and how in ("min", "max") else {}
            regions = [self.region([element], lambda a, c: [self.emit(how, [a, c], element, **attributes)])]
        self.keep(self.emit(kind, [x], result_type, regions=regions, **options), b, e)

    def plus(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.emit("add", [a, b], a.type)

    def recurrence(self, element: DType, shape: Shape, options: dict[str, Any]) -> None:
        """h[i] = a[i] h[i-1] + b[i], |a| <= 1/2, as a scan of pairs: order matters."""
        type = TileType(element, shape)
        n = shape[options["axis"]]
        a = self.emit("sin", [self.value(element, shape, exact=True)], type)
        a = self.emit("mul", [a, self.fill(0.5, type)], type)
        b = self.value(element, shape)
        bound, error = self.bounds[b], self.errors[b]

        def combine(a: ir.Value, b: ir.Value, c: ir.Value, d: ir.Value) -> list[ir.Value]:
            return [self.emit("mul", [a, c], element), self.plus(self.emit("mul", [c, b], element), d)]

        regions = [self.region([element, element], combine)]
        value = self.emit("scan", [a, b], type, type, regions=regions, **options)
        small = 32 * ULP[element] * (1 + math.log2(n))
        self.keep(value, 1.0, small)
        self.keep(value.op.results[1], 2 * bound, 2 * error + small * (bound + 1))  # type: ignore[union-attr]

    def dot_types(self) -> list[tuple[DType, DType]]:
        pairs = [(float32, float32), (float16, float32), (bfloat16, float32), (int8, int32), (uint8, int32)]
        pairs += [(float64, float64)]
        return [(a, c) for a, c in pairs if a in self.dtypes]

    def dot(self, acc: ir.Value | None = None, element: DType | None = None) -> ir.Value | None:
        """A product; with `acc` given one that is accumulated in it (not clamped then)."""
        if not (types := self.dot_types()):
            return None
        element, wide = (element, acc.element) if acc is not None else self.choose(types)
        assert isinstance(element, DType) and isinstance(wide, DType)
        side = int(math.log2(self.limit)) // 2 + 1
        k = 1 << self.between(0, side)
        m, n = (1 << self.between(0, side) for _ in range(2)) if acc is None else acc.shape[-2:]
        batch: Shape = ((1 << self.between(0, 1),) if self.chance(0.15) else ()) if acc is None else acc.shape[:-2]
        a, b = self.value(element, (*batch, m, k)), self.value(element, (*batch, k, n))
        if self.chance(0.2) and m == k:
            perm = (*range(len(batch)), len(batch) + 1, len(batch))
            turned = self.emit("trans", [a], a.type, perm=perm)
            self.bounds[turned], self.errors[turned] = self.bounds[a], self.errors[a]
            a = turned
        if element.is_float:
            a, b = (self.tame_operand(v) for v in (a, b))
        type = TileType(wide, (*batch, m, n))
        inner = acc is not None
        if acc is None:
            acc = self.fill(0 if wide == int32 else 0.0, type) if self.chance(0.5) else self.value(wide, type.shape)
        result = self.emit("dot", [a, b, acc], type)
        if element.is_float:
            p, q = self.bounds[a], self.bounds[b]
            bound = k * p * q + self.bounds[acc]
            error = k * (p * self.errors[b] + q * self.errors[a]) + self.errors[acc]
            self.bounds[result], self.errors[result] = bound, error + bound * ULP[wide] * (2 + math.log2(k))
        return result if inner else self.keep(result, self.bounds[result], self.errors[result])

    def tame_operand(self, value: ir.Value) -> ir.Value:
        bound, error = self.bounds[value], self.errors[value]
        result = self.tame(value, "small")
        self.bounds[result], self.errors[result] = min(bound, 4.0), error
        return result

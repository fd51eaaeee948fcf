"""Lanes: what the CPU code generator knows of a few neighbouring values of a tile, and arithmetic on them.

A request for `width` neighbouring values of a tile gives one of three things, and arithmetic keeps the cheapest:
- `Uniform`: all lanes are the same; one LLVM scalar (or a Python int). Block scales, row addresses and loop bounds
  stay scalar however wide the tile is.
- `Affine`: integers or pointers that grow by a constant from lane to lane. Addresses stay in this form, so that a
  load can see that its lanes are neighbours in memory.
- `Vector`: an LLVM vector.
`multiple` is a number that the (first) value is known to be a multiple of; it lets `offsets // 32` of a run of 32
lanes stay uniform. `offset` keeps a constant apart from what it is added to, down to the address: neighbouring
blocks of a walk then share their address arithmetic and differ in an instruction's displacement.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from math import gcd
from typing import Any

from llvmlite import ir

from nitinol.compiler.cpu.arithmetic import I1, I8, I32, I64, Arithmetic, llvm_type, memory_type
from nitinol.language.types import DType, PointerType, int1

LARGE = 1 << 30  # `multiple` of zero


@dataclass(slots=True)
class Uniform:
    value: Any  # a Python int, or an LLVM scalar
    multiple: int = 1
    offset: int = 0  # integers: added to the value; pointers: bytes further on


@dataclass(slots=True)
class Affine:
    base: Any  # a Python int, an LLVM integer, or an LLVM pointer
    stride: int  # elements for integers, bytes for pointers
    multiple: int = 1
    offset: int = 0  # as for Uniform


@dataclass(slots=True)
class Vector:
    """Of masks, two scalar bits may be known: `full`, all lanes are set; `some`, there may be a lane that is."""

    value: Any
    full: Any = None
    some: Any = None


Lanes = Uniform | Affine | Vector


def multiple_of(value: int) -> int:
    """The largest power of two that divides a constant."""
    return LARGE if value == 0 else value & -value


def constant(value: int) -> Uniform:
    return Uniform(value, multiple_of(value))


class LaneBuilder(Arithmetic):
    """Arithmetic on lanes."""

    # ------------------------------------------------------------------------------------ scalars of index arithmetic

    def i64(self, value: Any) -> ir.Value:
        if isinstance(value, int):
            return ir.Constant(I64, value)
        return value if value.type == I64 else self.b.sext(value, I64)

    def add(self, a: Any, b: Any) -> Any:
        """Sum of two 64-bit index scalars, either of which may be a Python int."""
        if isinstance(a, int) and isinstance(b, int):
            return a + b
        if isinstance(a, int) and a == 0:
            return self.i64(b)
        if isinstance(b, int) and b == 0:
            return self.i64(a)
        return self.b.add(self.i64(a), self.i64(b), flags=["nsw"])

    def mul(self, a: Any, b: Any) -> Any:
        if isinstance(a, int) and isinstance(b, int):
            return a * b
        for x, y in ((a, b), (b, a)):
            if isinstance(x, int) and x in (0, 1):
                return 0 if x == 0 else self.i64(y)
        return self.b.mul(self.i64(a), self.i64(b), flags=["nsw"])

    def shift_right(self, a: Any, bits: int) -> Any:
        if isinstance(a, int):
            return a >> bits
        return a if bits == 0 else self.b.lshr(self.i64(a), ir.Constant(I64, bits))

    def low_bits(self, a: Any, size: int) -> Any:
        """a modulo a power of two."""
        if size == 1:
            return 0
        if isinstance(a, int):
            return a & (size - 1)
        return self.b.and_(self.i64(a), ir.Constant(I64, size - 1))

    def advance(self, pointer: ir.Value, count: Any, type: ir.Type) -> ir.Value:
        """The address `count` elements of `type` further on."""
        if isinstance(count, int) and count == 0:
            return pointer
        return self.gep(pointer, self.i64(count), type)

    # ----------------------------------------------------------------------------------------- from lanes to registers

    def scalar(self, lanes: Lanes, element: DType | PointerType) -> ir.Value:
        """The LLVM scalar of uniform lanes (of the first lane otherwise)."""
        if isinstance(lanes, Vector):
            return self.b.extract_element(lanes.value, ir.Constant(I32, 0))
        value = lanes.value if isinstance(lanes, Uniform) else lanes.base
        if isinstance(value, int):
            return ir.Constant(llvm_type(element), value)
        return self.displaced(value, lanes.offset, element)

    def displaced(self, value: ir.Value, offset: int, element: DType | PointerType) -> ir.Value:
        """value + offset: of an integer, or bytes of a pointer."""
        if offset == 0:
            return value
        if isinstance(element, PointerType):
            return self.gep(value, ir.Constant(I64, offset), I8)
        return self.b.add(value, ir.Constant(value.type, offset & ((1 << value.type.width) - 1)))

    def splat(self, value: ir.Value, width: int) -> ir.Value:
        if isinstance(value, ir.Constant) and not isinstance(value.type, ir.PointerType):
            return ir.Constant(ir.VectorType(value.type, width), [value] * width)
        one = self.b.insert_element(
            ir.Constant(ir.VectorType(value.type, width), ir.Undefined), value, ir.Constant(I32, 0)
        )
        zeros = ir.Constant(ir.VectorType(I32, width), [0] * width)
        return self.b.shuffle_vector(one, ir.Constant(one.type, ir.Undefined), zeros)

    def vector(self, lanes: Lanes, element: DType | PointerType, width: int) -> ir.Value:
        """An LLVM vector of `width` lanes (for width 1: the scalar)."""
        if width == 1:
            return self.scalar(lanes, element)
        if isinstance(lanes, Vector):
            return lanes.value
        if isinstance(lanes, Uniform):
            return self.splat(self.scalar(lanes, element), width)
        steps = [lanes.offset + i * lanes.stride for i in range(width)]
        if isinstance(element, PointerType):
            offsets = ir.Constant(ir.VectorType(I64, width), steps)
            return self.gep(lanes.base, offsets, I8)
        type = llvm_type(element)
        mask = (1 << type.width) - 1
        offsets = ir.Constant(ir.VectorType(type, width), [s & mask for s in steps])
        if isinstance(lanes.base, int):
            return ir.Constant(ir.VectorType(type, width), [(lanes.base + s) & mask for s in steps])
        return self.b.add(self.splat(lanes.base, width), offsets)

    def wrap(self, value: ir.Value, width: int) -> Lanes:
        return Uniform(value) if width == 1 else Vector(value)

    # ---------------------------------------------------------------------------------------------------- elementwise

    def elementwise(
        self,
        kind: str,
        args: list[Lanes],
        types: list[DType | PointerType],
        result: DType | PointerType,
        attributes: dict[str, Any],
        width: int,
    ) -> Lanes:
        """One elementwise operation of the tile IR on lanes of the given element types."""
        cheap = self._mask(kind, args, types, width) if result == int1 else None
        cheap = cheap or self._index_arithmetic(kind, args, types, result, width)
        if cheap is not None:
            return cheap
        if all(isinstance(a, Uniform) for a in args):
            values = [self.scalar(a, t) for a, t in zip(args, types)]
            return Uniform(self.compute(kind, values, types, result, attributes))
        if kind == "select" and isinstance(args[0], Uniform):  # one condition for all lanes
            values = [self.scalar(args[0], int1)]
            values += [self.vector(a, t, width) for a, t in zip(args[1:], types[1:])]
        elif kind == "addptr":
            base, offset = args
            if isinstance(base, Uniform):
                pointers = self.scalar(base, types[0])
            else:
                pointers = self.vector(base, types[0], width)
            values = [pointers, self.vector(offset, types[1], width)]
        else:
            values = [self.vector(a, t, width) for a, t in zip(args, types)]
        return self.wrap(self.compute(kind, values, types, result, attributes), width)

    def _mask(self, kind: str, args: list[Lanes], types: list[DType | PointerType], width: int) -> Lanes | None:
        """Comparisons of indices and their conjunctions. A row's mask stays one bit for all lanes; a mask that runs
        out somewhere (`offsets < n`) knows whether it is full, so that whole vectors are not moved under a mask."""
        if kind == "and":
            for mask, other in (args, args[::-1]):
                if isinstance(mask, Uniform) and isinstance(mask.value, ir.Constant):
                    return other if mask.value.constant else mask
            bits = [_bits(a) for a in args]
            if width == 1 or None in bits or all(isinstance(a, Uniform) for a in args):
                return None
            both = self.b.and_(*(self.vector(a, int1, width) for a in args))
            full, some = (self.b.and_(x, y) for x, y in zip(*bits))  # type: ignore[arg-type]
            return Vector(both, full, some)
        if kind not in _COMPARE or any(isinstance(a, Vector) for a in args) or not _is_index(types[0]):
            return None
        lanes = [_constant_lanes(a, width) for a in args]
        if None not in lanes:
            known = [_COMPARE[kind](x, y) for x, y in zip(*lanes)]  # type: ignore[arg-type]
            return Uniform(ir.Constant(I1, int(known[0]))) if len(set(known)) == 1 else None
        return self._running_out(kind, args, types, width)

    def _running_out(
        self, kind: str, args: list[Lanes], types: list[DType | PointerType], width: int
    ) -> Lanes | None:
        """Growing lanes compared with one bound."""
        if kind not in _MIRRORED or width == 1:
            return None
        if isinstance(args[0], Uniform):
            kind, args = _MIRRORED[kind], args[::-1]
        lanes, bound = args
        if not isinstance(lanes, Affine) or not isinstance(bound, Uniform) or lanes.stride <= 0:
            return None
        limit = self.scalar(bound, types[0])
        first = self.scalar(lanes, types[0])
        last = self.displaced(first, lanes.stride * (width - 1), types[0])
        ends = [self.integer(kind, [end, limit], types[0]) for end in (first, last)]  # type: ignore[arg-type]
        every = [self.vector(x, types[0], width) for x in args]
        some, full = ends if kind in ("lt", "le") else reversed(ends)
        return Vector(self.integer(kind, every, types[0]), full, some)  # type: ignore[arg-type]

    def _index_arithmetic(
        self, kind: str, args: list[Lanes], types: list[DType | PointerType], result: DType | PointerType, width: int
    ) -> Lanes | None:
        """Integer and pointer arithmetic that stays uniform or affine; None if it does not."""
        if any(isinstance(a, Vector) for a in args):
            return None
        if isinstance(types[0], DType) and (not types[0].is_int or types[0] == int1):
            return None
        a = args[0]
        b = args[1] if len(args) == 2 else constant(0)
        assert not isinstance(a, Vector) and not isinstance(b, Vector)
        stride_a, base_a, constant_a = _parts(a)
        stride_b, base_b, constant_b = _parts(b)

        def build(base: Any, offset: int, stride: int, multiple: int) -> Lanes:
            if isinstance(base, int):
                base, offset = _wrap(base + offset, result), 0
            return Affine(base, stride, multiple, offset) if stride else Uniform(base, multiple, offset)

        if kind == "addptr":
            size = types[0].element.nbytes  # type: ignore[union-attr]
            pointer = base_a
            if not isinstance(base_b, int):
                pointer = self.gep(base_a, self._offset(base_b, types[1]), memory_type(types[0].element))  # type: ignore[union-attr]
            shift = constant_a + size * (constant_b + (base_b if isinstance(base_b, int) else 0))
            return build(pointer, shift, stride_a + stride_b * size, gcd(a.multiple, b.multiple * size))
        if isinstance(types[0], PointerType):
            to_pointer = kind in ("cast", "bitcast") and isinstance(result, PointerType)
            return a if to_pointer else None
        if kind in ("add", "sub"):
            sign = 1 if kind == "add" else -1
            base = self._binary(kind, base_a, base_b, types[0])
            offset, stride = constant_a + sign * constant_b, stride_a + sign * stride_b
            return build(base, offset, stride, gcd(a.multiple, b.multiple))
        if kind == "mul":
            for x, factor in ((a, b), (b, a)):  # by a constant: also of the constant part and the stride
                if isinstance(factor, Uniform) and isinstance(factor.value, int):
                    stride, base, offset = _parts(x)
                    by = factor.value
                    multiple = min(LARGE, x.multiple * factor.multiple)
                    return build(self._binary("mul", base, by, types[0]), offset * by, stride * by, multiple)
            if stride_a or stride_b:
                return None
            values = [self.scalar(x, t) for x, t in zip(args, types)]
            return Uniform(self.b.mul(*values), min(LARGE, a.multiple * b.multiple))
        if kind == "shl" and isinstance(base_b, int) and not stride_b and 0 <= base_b < types[0].bits:
            return self._index_arithmetic("mul", [a, constant(1 << base_b)], types, result, width)
        if kind in ("div", "rem", "shr", "and") and isinstance(base_b, int) and not stride_b and base_b > 0:
            return self._split_by_power(kind, a, base_b, types[0], width)
        if kind == "cast" and isinstance(result, DType) and result.is_int and result.bits >= types[0].bits > 1:
            base = base_a if isinstance(base_a, int) else self._extend(base_a, types[0], result)
            return build(base, constant_a, stride_a, a.multiple)
        return None

    def _split_by_power(
        self, kind: str, a: Uniform | Affine, divisor: int, type: DType, width: int
    ) -> Lanes | None:
        """x // 2^k and x % 2^k of affine lanes that all fall into one multiple of 2^k."""
        stride, base, _ = _parts(a)
        if kind == "shr":
            divisor = 1 << divisor if divisor < type.bits else 0
        if kind == "and":
            divisor += 1
        if divisor <= 0 or divisor & (divisor - 1) or (isinstance(base, int) and base < 0):
            return None
        if stride == 0:
            if isinstance(base, int):
                return constant(base // divisor if kind in ("div", "shr") else base % divisor)
            return None
        aligned = a.multiple % divisor == 0
        if not aligned or stride < 0 or stride * (width - 1) >= divisor:
            return None
        if kind in ("rem", "and"):
            return Affine(0, stride, LARGE)  # the base is a multiple of the divisor: nothing of it is left
        bits = divisor.bit_length() - 1
        first = self.scalar(a, type)
        value = base >> bits if isinstance(base, int) else self.b.ashr(first, ir.Constant(first.type, bits))
        return Uniform(value, max(1, a.multiple // divisor))

    def _offset(self, value: Any, type: DType | PointerType) -> ir.Value:
        """An element offset as a 64-bit integer."""
        if isinstance(value, int):
            return ir.Constant(I64, value)
        assert isinstance(type, DType)
        if value.type.width == 64:
            return value
        return self.b.sext(value, I64) if type.is_signed else self.b.zext(value, I64)

    def _binary(self, kind: str, a: Any, b: Any, type: DType) -> Any:
        if isinstance(a, int) and isinstance(b, int):
            return {"add": a + b, "sub": a - b, "mul": a * b, "shl": a << b if b >= 0 else 0}[kind]
        if isinstance(b, int) and ((b == 0 and kind in ("add", "sub", "shl")) or (b == 1 and kind == "mul")):
            return a
        if isinstance(a, int) and ((a == 0 and kind == "add") or (a == 1 and kind == "mul")):
            return b
        if kind == "mul" and 0 in (a if isinstance(a, int) else None, b if isinstance(b, int) else None):
            return 0
        llvm = llvm_type(type)
        a, b = (ir.Constant(llvm, v) if isinstance(v, int) else v for v in (a, b))
        return getattr(self.b, kind)(a, b)

    def _extend(self, value: ir.Value, source: DType, result: DType) -> ir.Value:
        if source.bits == result.bits:
            return value
        return self.b.sext(value, llvm_type(result)) if source.is_signed else self.b.zext(value, llvm_type(result))


_COMPARE: dict[str, Any] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip


_MIRRORED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}


def _bits(mask: Lanes) -> tuple[Any, Any] | None:
    """(full, some) of a mask, if they are known."""
    if isinstance(mask, Vector):
        return None if mask.full is None else (mask.full, mask.some)
    return (mask.value, mask.value) if isinstance(mask, Uniform) else None


def _is_index(type: DType | PointerType) -> bool:
    return isinstance(type, DType) and type.is_int and type != int1


def _constant_lanes(lanes: Lanes, width: int) -> list[int] | None:
    """The values of lanes that are known now, else None."""
    assert not isinstance(lanes, Vector)
    stride, base, _ = _parts(lanes)
    return [base + stride * i for i in range(width)] if isinstance(base, int) else None


def _parts(lanes: Uniform | Affine) -> tuple[int, Any, int]:
    """(stride, base, constant part)."""
    return (lanes.stride, lanes.base, lanes.offset) if isinstance(lanes, Affine) else (0, lanes.value, lanes.offset)


def _wrap(value: int, type: DType | PointerType) -> int:
    """A Python int reduced to the range of an integer type."""
    if isinstance(type, PointerType) or type == int1:
        return value
    value &= (1 << type.bits) - 1
    return value - (1 << type.bits) if type.is_signed and value >> (type.bits - 1) else value

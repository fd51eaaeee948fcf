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

from nitinol.compiler import ir as tile_ir
from nitinol.compiler.cpu import math as vector_math
from nitinol.language.types import DType, PointerType, bfloat16, float16, float32, float64, int1

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
POINTER = ir.PointerType()
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


def llvm_type(element: DType | PointerType) -> ir.Type:
    """How a value of this type is held in a register; bfloat16 is held as its 16 bits."""
    if isinstance(element, PointerType):
        return POINTER
    if element == bfloat16:
        return I16
    if element.is_float:
        return {16: ir.HalfType(), 32: ir.FloatType(), 64: ir.DoubleType()}[element.bits]
    return ir.IntType(element.bits)


def memory_type(element: DType | PointerType) -> ir.Type:
    """How it lies in memory: a boolean takes a byte."""
    return I8 if element == int1 else llvm_type(element)


class LaneBuilder:
    """Arithmetic on lanes; `b` is the llvmlite builder, positioned by the code generator."""

    def __init__(self, module: ir.Module) -> None:
        self.module = module
        self.b: ir.IRBuilder = None  # type: ignore[assignment]

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

    def gep(self, pointers: ir.Value, offset: ir.Value, type: ir.Type) -> ir.Value:
        """Addresses `offset` elements of `type` further on; either may be a vector."""
        address = self.b.gep(pointers, [offset], source_etype=type)
        for value in (pointers, offset):
            if isinstance(value.type, ir.VectorType):
                address.type = ir.VectorType(POINTER, value.type.count)  # llvmlite types it as one pointer
        return address

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
            return Uniform(self._compute(kind, values, types, result, attributes))
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
        return self.wrap(self._compute(kind, values, types, result, attributes), width)

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
        ends = [self._integer(kind, [end, limit], types[0]) for end in (first, last)]  # type: ignore[arg-type]
        every = [self.vector(x, types[0], width) for x in args]
        some, full = ends if kind in ("lt", "le") else reversed(ends)
        return Vector(self._integer(kind, every, types[0]), full, some)  # type: ignore[arg-type]

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

    # --------------------------------------------------------------------------- registers: scalars or whole vectors

    def _compute(
        self,
        kind: str,
        values: list[ir.Value],
        types: list[DType | PointerType],
        result: DType | PointerType,
        attributes: dict[str, Any],
    ) -> ir.Value:
        b, type = self.b, types[0]
        if kind == "addptr":
            offset = self._offset_vector(values[1], types[1])
            return self.gep(values[0], offset, memory_type(type.element))  # type: ignore[union-attr]
        if kind == "select":
            return b.select(*values)
        if kind == "cast":
            return self.cast(values[0], type, result)
        if kind == "bitcast":
            if isinstance(type, PointerType) or isinstance(result, PointerType):
                return values[0]
            return b.bitcast(values[0], _like(values[0], llvm_type(result)))
        if isinstance(type, PointerType):  # comparisons only
            values = [b.ptrtoint(v, _like(v, I64)) for v in values]
            type = DType("uint64", "uint", 64)
        if type == bfloat16:
            if kind in tile_ir.COMPARISONS:
                return self._compute(kind, [self.to_float32(v) for v in values], [float32] * 2, int1, attributes)
            if kind == "neg":
                return b.xor(values[0], _splat_constant(values[0].type, 0x8000))
            values = [self.to_float32(v) for v in values]
            wide = self._compute(kind, values, [float32] * len(types), float32, attributes)
            return vector_math.float_to_bfloat16_bits(b, wide)
        if type.is_float:
            return self._float(kind, values, type, attributes)
        return self._integer(kind, values, type)

    def to_float32(self, value: ir.Value) -> ir.Value:
        return vector_math.bfloat16_bits_to_float(self.b, value)

    def _offset_vector(self, value: ir.Value, type: DType | PointerType) -> ir.Value:
        wide = _like(value, I64)
        if value.type == wide:
            return value
        return self.b.sext(value, wide) if type.is_signed else self.b.zext(value, wide)  # type: ignore[union-attr]

    def _float(self, kind: str, values: list[ir.Value], type: DType, attributes: dict[str, Any]) -> ir.Value:
        b = self.b
        simple = {"add": b.fadd, "sub": b.fsub, "mul": b.fmul, "div": b.fdiv, "rem": b.frem, "neg": b.fneg}
        if kind in simple:
            # a product and a sum may become one fused operation, as on GPUs
            return simple[kind](*values, flags=["contract"]) if kind in ("add", "sub", "mul") else simple[kind](*values)
        if kind in tile_ir.COMPARISONS:
            symbol = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}[kind]
            compare = b.fcmp_unordered if kind == "ne" else b.fcmp_ordered
            return compare(symbol, *values)
        if kind in ("min", "max"):
            kind += "_nan" if attributes.get("propagate_nan") else ""
        if type.bits == 16:  # half: evaluated in single precision and rounded once
            wide = [b.fpext(v, _like(v, ir.FloatType())) for v in values]
            return b.fptrunc(vector_math.emit_math(b, kind, wide), values[0].type)
        return vector_math.emit_math(b, kind, values)

    def _integer(self, kind: str, values: list[ir.Value], type: DType) -> ir.Value:
        b, signed = self.b, type.is_signed
        if kind in ("add", "sub", "mul", "xor", "shl"):
            return getattr(b, kind)(*values)
        if kind in ("and", "or"):
            return getattr(b, kind + "_")(*values)
        if kind in ("div", "rem"):
            return self._divide(kind, values[0], values[1], signed)
        if kind == "shr":
            return b.ashr(*values) if signed else b.lshr(*values)
        if kind in tile_ir.COMPARISONS:
            symbol = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}[kind]
            return b.icmp_signed(symbol, *values) if signed else b.icmp_unsigned(symbol, *values)
        if kind in ("min", "max"):
            less = b.icmp_signed("<", *values) if signed else b.icmp_unsigned("<", *values)
            first, second = values if kind == "min" else reversed(values)
            return b.select(less, first, second)
        if kind == "neg":
            return b.sub(_splat_constant(values[0].type, 0), values[0])
        if kind == "not":
            return b.not_(values[0])
        if kind == "abs":
            if not signed:
                return values[0]
            zero = _splat_constant(values[0].type, 0)
            return b.select(b.icmp_signed("<", values[0], zero), b.sub(zero, values[0]), values[0])
        if kind == "mulhi":
            wide = _like(values[0], ir.IntType(2 * type.bits))
            extend = b.sext if signed else b.zext
            product = b.mul(*(extend(v, wide) for v in values))
            return b.trunc(b.lshr(product, _splat_constant(wide, type.bits)), values[0].type)
        raise NotImplementedError(f"{kind} of {type}")

    def _divide(self, kind: str, a: ir.Value, b: ir.Value, signed: bool) -> ir.Value:
        """Integer division for every operand, as the interpreter has it: x / 0 is 0 and x % 0 is x (the instruction
        would end the process, also in a masked-off lane), the least integer / -1 is itself."""
        builder = self.b
        if isinstance(b, ir.Constant):
            numbers = b.constant if isinstance(b.constant, list) else [b.constant]
            numbers = [n.constant if isinstance(n, ir.Constant) else n for n in numbers]
            if all(isinstance(n, int) and n > 0 for n in numbers):
                return {"div": builder.sdiv if signed else builder.udiv,
                        "rem": builder.srem if signed else builder.urem}[kind](a, b)  # fmt: skip
        zero, one = _splat_constant(b.type, 0), _splat_constant(b.type, 1)
        undefined = is_zero = builder.icmp_signed("==", b, zero)
        if signed:
            minus = builder.icmp_signed("==", b, _splat_constant(b.type, -1))
            undefined = builder.or_(is_zero, minus)
        safe = builder.select(undefined, one, b)
        if kind == "div":
            value = builder.sdiv(a, safe) if signed else builder.udiv(a, safe)
            if signed:
                value = builder.select(minus, builder.sub(zero, a), value)
            return builder.select(is_zero, zero, value)
        value = builder.srem(a, safe) if signed else builder.urem(a, safe)
        return builder.select(is_zero, a, value)

    def cast(self, value: ir.Value, source: DType | PointerType, result: DType | PointerType) -> ir.Value:
        """Value conversion of a scalar or a vector, by the rules of `cast` in the tile IR."""
        b = self.b
        if source == result:
            return value
        target = _like(value, llvm_type(result))
        if isinstance(source, PointerType) or isinstance(result, PointerType):
            if isinstance(source, PointerType) and isinstance(result, PointerType):
                return value
            return b.ptrtoint(value, target) if isinstance(source, PointerType) else b.inttoptr(value, target)
        if source == bfloat16:
            return self.cast(self.to_float32(value), float32, result)
        if result == bfloat16:
            narrow = self._round_to_odd(value) if source == float64 else self.cast(value, source, float32)
            return vector_math.float_to_bfloat16_bits(b, narrow)
        if result == int1:
            zero = _splat_constant(value.type, 0)
            return b.fcmp_unordered("!=", value, zero) if source.is_float else b.icmp_signed("!=", value, zero)
        if source.is_float and result.is_float:
            if {source, result} == {float16, float64}:  # LLVM would call a library function that may not be there
                if result == float16:
                    return b.fptrunc(self._round_to_odd(value), target)
                value = b.fpext(value, _like(value, ir.FloatType()))
            return b.fpext(value, target) if result.bits > source.bits else b.fptrunc(value, target)
        if source.is_float:
            name = "fptosi" if result.is_signed else "fptoui"
            return self.intrinsic(f"llvm.{name}.sat.{mangle(target)}.{mangle(value.type)}", target, [value])
        if result.is_float:
            if result == float16:  # integers that half can hold are exact in single precision
                return b.fptrunc(self.cast(value, source, float32), target)
            return b.sitofp(value, target) if source.is_signed else b.uitofp(value, target)
        if source.bits == result.bits:
            return value
        if result.bits < source.bits:
            return b.trunc(value, target)
        return b.sext(value, target) if source.is_signed else b.zext(value, target)

    def _round_to_odd(self, value: ir.Value) -> ir.Value:
        """Double to single precision such that rounding once more, to fewer bits, equals rounding once in all:
        an inexact result is truncated and its last bit set (Boldo and Melquiond, "Emulation of FMA and correctly
        rounded sums: proved algorithms using rounding to odd", 2008)."""
        b = self.b
        single = b.fptrunc(value, _like(value, ir.FloatType()))
        back = b.fpext(single, value.type)
        bits = b.bitcast(single, _like(value, I32))
        one = _splat_constant(bits.type, 1)
        magnitude = [vector_math.emit_math(b, "abs", [v]) for v in (back, value)]
        truncated = b.sub(bits, b.zext(b.fcmp_ordered(">", *magnitude), bits.type))
        odd = b.bitcast(b.or_(truncated, one), single.type)
        return b.select(b.fcmp_ordered("!=", back, value), odd, single)

    def intrinsic(self, name: str, result: ir.Type, args: list[ir.Value]) -> ir.Value:
        function = self.module.globals.get(name)
        if function is None:
            function = ir.Function(self.module, ir.FunctionType(result, [a.type for a in args]), name)
        return self.b.call(function, args)


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


def mangle(type: ir.Type) -> str:
    """A type's part in the name of an overloaded LLVM intrinsic."""
    if isinstance(type, ir.VectorType):
        return f"v{type.count}{mangle(type.element)}"
    if isinstance(type, ir.PointerType):
        return "p0"
    if isinstance(type, ir.IntType):
        return f"i{type.width}"
    return {"half": "f16", "float": "f32", "double": "f64"}[str(type)]


def _like(value: ir.Value, element: ir.Type) -> ir.Type:
    """`element`, or a vector of it with as many lanes as the value has."""
    return ir.VectorType(element, value.type.count) if isinstance(value.type, ir.VectorType) else element


def _splat_constant(type: ir.Type, value: float) -> ir.Constant:
    if isinstance(type, ir.VectorType):
        return ir.Constant(type, [value] * type.count)
    return ir.Constant(type, value)


def _wrap(value: int, type: DType | PointerType) -> int:
    """A Python int reduced to the range of an integer type."""
    if isinstance(type, PointerType) or type == int1:
        return value
    value &= (1 << type.bits) - 1
    return value - (1 << type.bits) if type.is_signed and value >> (type.bits - 1) else value

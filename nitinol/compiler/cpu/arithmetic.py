"""Arithmetic on LLVM scalars and vectors of the tile language's element types: one instruction sequence per operation.

bfloat16 is held as its 16 bits and computed in single precision; half likewise where the hardware has no half unit.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from nitinol.compiler import ir as tile_ir
from nitinol.compiler.cpu import math as vector_math
from nitinol.language.types import DType, PointerType, bfloat16, float16, float32, float64, int1

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
POINTER = ir.PointerType()


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


class Arithmetic:
    """`b` is the llvmlite builder, positioned by the code generator."""

    def __init__(self, module: ir.Module) -> None:
        self.module = module
        self.b: ir.IRBuilder = None  # type: ignore[assignment]

    def gep(self, pointers: ir.Value, offset: ir.Value, type: ir.Type) -> ir.Value:
        """Addresses `offset` elements of `type` further on; either may be a vector."""
        address = self.b.gep(pointers, [offset], source_etype=type)
        for value in (pointers, offset):
            if isinstance(value.type, ir.VectorType):
                address.type = ir.VectorType(POINTER, value.type.count)  # llvmlite types it as one pointer
        return address


    def compute(
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
                return self.compute(kind, [self.to_float32(v) for v in values], [float32] * 2, int1, attributes)
            if kind == "neg":
                return b.xor(values[0], _splat_constant(values[0].type, 0x8000))
            values = [self.to_float32(v) for v in values]
            wide = self.compute(kind, values, [float32] * len(types), float32, attributes)
            return vector_math.float_to_bfloat16_bits(b, wide)
        if type.is_float:
            return self._float(kind, values, type, attributes)
        return self.integer(kind, values, type)

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

    def integer(self, kind: str, values: list[ir.Value], type: DType) -> ir.Value:
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
            return self._saturate(self.cast(value, source, float32) if source == float16 else value, result)
        if result.is_float:
            if result == float16:  # integers that half can hold are exact in single precision
                return b.fptrunc(self.cast(value, source, float32), target)
            return b.sitofp(value, target) if source.is_signed else b.uitofp(value, target)
        if source.bits == result.bits:
            return value
        if result.bits < source.bits:
            return b.trunc(value, target)
        return b.sext(value, target) if source.is_signed else b.zext(value, target)

    def _saturate(self, value: ir.Value, result: DType) -> ir.Value:
        """Float to integer: the nearest bound where it does not fit, 0 for NaN. LLVM's own `fptosi.sat` goes lane by
        lane on x86, 136 cycles for 16 of them; both bounds as powers of two are exact in any float type."""
        b, target = self.b, _like(value, llvm_type(result))
        low, high = (-(1 << result.bits - 1), 1 << result.bits - 1) if result.is_signed else (0, 1 << result.bits)
        whole = b.fptosi(value, target) if result.is_signed else b.fptoui(value, target)
        for compare, symbol, bound, instead in (
            (b.fcmp_ordered, ">=", high, high - 1), (b.fcmp_ordered, "<=", low, low), (b.fcmp_unordered, "uno", 0, 0)
        ):  # fmt: skip
            outside = compare(symbol, value, _splat_constant(value.type, float(bound)))
            whole = b.select(outside, _splat_constant(target, instead), whole)
        return whole

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

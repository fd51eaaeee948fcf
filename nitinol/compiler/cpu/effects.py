"""Operations that act on the world one element at a time: atomics, prints, assertions."""

from __future__ import annotations

import hashlib
from math import prod
from typing import TYPE_CHECKING, Any

from llvmlite import ir

from nitinol.compiler.cpu.arithmetic import I8, I32, I64, POINTER
from nitinol.compiler.cpu.lanes import Uniform
from nitinol.compiler.cpu.memory import store_stored
from nitinol.compiler.ir import Op, Value
from nitinol.language.types import DType, PointerType, int1

if TYPE_CHECKING:
    from nitinol.compiler.cpu.generator import Generator, Index


def _each_element(g: Generator, shape: tuple[int, ...], body: Any) -> None:
    """body(index) for every element, one at a time, in row-major order."""
    if not shape:
        body(())
    else:
        g.walk(shape, [1] * len(shape), body, prod(shape))


def emit_atomic(g: Generator, op: Op) -> None:
    """Atomic operations go element by element; the old values are kept if somebody uses them."""
    b = g.b
    value = op.operands[1]
    element = value.element
    mask = op.operands[2] if op.kind == "atomic_rmw" and len(op.operands) > 2 else None
    wanted = bool(g.plan.uses.get(op.result))
    place = g.allocate(value.shape, element) if value.shape and wanted else None
    result: list[ir.Value] = []

    def one(index: Index) -> None:
        pointer = g.scalar(g.request(op.operands[0], index, 0, 1), op.operands[0].element)
        new = g.scalar(g.request(value, index, 0, 1), element)
        if op.kind == "atomic_cas":
            desired = g.scalar(g.request(op.operands[2], index, 0, 1), element)
            old = _compare_and_swap(g, pointer, new, desired)
        elif mask is None:
            old = _read_modify_write(g, op.attributes["kind"], pointer, new, element)
        else:
            flag = g.scalar(g.request(mask, index, 0, 1), int1)
            before = b.block
            inside, after = b.append_basic_block("atomic"), b.append_basic_block("next")
            b.cbranch(flag, inside, after)
            b.position_at_end(inside)
            done = _read_modify_write(g, op.attributes["kind"], pointer, new, element)
            end = b.block
            b.branch(after)
            b.position_at_end(after)
            old = b.phi(done.type)
            old.add_incoming(ir.Constant(done.type, 0), before)
            old.add_incoming(done, end)
        if place is not None:
            store_stored(g, place, index, 0, 1, Uniform(old))
        result.append(old)

    _each_element(g, value.shape, one)
    if place is not None:
        g.tiles[op.result] = place
    elif not value.shape:
        g.scalars[op.result] = Uniform(result[0])


def _compare_and_swap(g: Generator, pointer: ir.Value, expected: ir.Value, desired: ir.Value) -> ir.Value:
    b, type = g.b, expected.type
    if isinstance(type, ir.IntType):
        return b.extract_value(b.cmpxchg(pointer, expected, desired, "seq_cst", "seq_cst"), 0)
    bits = ir.IntType({"half": 16, "float": 32, "double": 64}[str(type)])
    pair = b.cmpxchg(pointer, b.bitcast(expected, bits), b.bitcast(desired, bits), "seq_cst", "seq_cst")
    return b.bitcast(b.extract_value(pair, 0), type)


def _read_modify_write(
    g: Generator, kind: str, pointer: ir.Value, value: ir.Value, element: DType | PointerType
) -> ir.Value:
    assert isinstance(element, DType)
    if element.is_float and kind != "xchg":
        return _float_update(g, kind, pointer, value, element)
    if element.is_float:
        bits = ir.IntType(element.bits)
        return g.b.bitcast(g.b.atomic_rmw("xchg", pointer, g.b.bitcast(value, bits), "seq_cst"), value.type)
    if kind in ("min", "max") and not element.is_signed:
        kind = "u" + kind
    return g.b.atomic_rmw(kind, pointer, value, "seq_cst")


def _float_update(g: Generator, kind: str, pointer: ir.Value, value: ir.Value, element: DType) -> ir.Value:
    """A compare-and-swap loop: x86 and Arm have no atomic float arithmetic."""
    b = g.b
    bits = ir.IntType(element.bits)
    first = b.load_atomic(pointer, "seq_cst", element.nbytes, typ=bits)
    before = b.block
    again, done = b.append_basic_block("retry"), b.append_basic_block("updated")
    b.branch(again)
    b.position_at_end(again)
    seen = b.phi(bits)
    seen.add_incoming(first, before)
    old = b.bitcast(seen, value.type) if value.type != bits else seen
    new = g.compute(kind, [old, value], [element, element], element, {})
    new_bits = b.bitcast(new, bits) if new.type != bits else new
    pair = b.cmpxchg(pointer, seen, new_bits, "seq_cst", "seq_cst")
    seen.add_incoming(b.extract_value(pair, 0), b.block)
    b.cbranch(b.extract_value(pair, 1), done, again)
    b.position_at_end(done)
    return old


def _c_string(g: Generator, text: str) -> ir.Value:
    data = bytearray(text.encode() + b"\0")
    constant = ir.Constant(ir.ArrayType(I8, len(data)), data)
    variable = ir.GlobalVariable(g.module, constant.type, g.module.get_unique_name("text"))
    variable.initializer, variable.global_constant, variable.linkage = constant, True, "private"
    return variable


def emit_print(g: Generator, op: Op) -> None:
    """One line per element: program instance, index, prefix, value; written by the C library's printf."""
    b = g.b
    name = "printf"
    printf = g.module.globals.get(name)
    if printf is None:
        printf = ir.Function(g.module, ir.FunctionType(I32, [POINTER], var_arg=True), name)
    prefix = op.attributes.get("prefix", "").replace("%", "%%")
    head = "pid (%d, %d, %d) "
    if not op.operands:
        b.call(printf, [_c_string(g, f"{head}{prefix}\n"), *g.program])
    for value in op.operands:
        _print_tile(g, printf, value, head, prefix, bool(op.attributes.get("hex")))


def _print_tile(g: Generator, printf: ir.Function, value: Value, head: str, prefix: str, as_hex: bool) -> None:
    element = value.element
    is_float = isinstance(element, DType) and element.is_float

    def one(index: Index) -> None:
        scalar = g.scalar(g.request(value, index, 0, 1), element)
        if is_float:
            scalar = g.cast(scalar, element, DType("fp64", "float", 64))
        elif isinstance(element, PointerType):
            scalar = g.b.ptrtoint(scalar, I64)
        elif scalar.type.width < 64:
            scalar = g.b.sext(scalar, I64) if element.is_signed else g.b.zext(scalar, I64)
        form = "%f" if is_float else "0x%llx" if as_hex or isinstance(element, PointerType) else "%lld"
        places = ", ".join("%lld" for _ in index)
        text = f"{head}idx ({places}){prefix}: {form}\n"
        g.b.call(printf, [_c_string(g, text), *g.program, *(g.i64(i) for i in index), scalar])

    _each_element(g, value.shape, one)


def assertion_number(message: str) -> int:
    """What a failed assertion writes to the status word: positive, and told apart across kernels."""
    return int.from_bytes(hashlib.sha256(message.encode()).digest()[:6], "little") + 1


def emit_assert(g: Generator, op: Op) -> None:
    """A failed assertion leaves its number in the device's status word; the host raises when it waits."""
    where = f" ({op.location})" if op.location else ""
    g.asserts.append(f"device_assert failed in {g.function.name}{where}: {op.attributes.get('message', '')}")
    number = ir.Constant(I64, assertion_number(g.asserts[-1]))
    condition = op.operands[0]

    def one(index: Index) -> None:
        b = g.b
        failed, after = b.append_basic_block("failed"), b.append_basic_block("asserted")
        b.cbranch(g.scalar(g.request(condition, index, 0, 1), int1), after, failed)
        b.position_at_end(failed)
        b.store(number, g.status)
        b.branch(after)
        b.position_at_end(after)

    _each_element(g, condition.shape, one)

"""Elementwise operations, as expressions in C.

Integers wrap in the tile language, but signed overflow is undefined in C: sums and products of ints are written on
unsigned numbers, except in index arithmetic (`index`: made of program ids, lane numbers, parameters and constants
only), which cannot overflow where it addresses memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from nitinol.compiler.gpu import forms, words
from nitinol.compiler.gpu.forms import Form, bare, closed, fixed, lean
from nitinol.compiler.gpu.layout import Layout
from nitinol.compiler.gpu.variables import define, is_index
from nitinol.compiler.ir import COMPARISONS, Op, constant_of
from nitinol.compiler.semantics import round_to
from nitinol.language.types import (
    DType,
    PointerType,
    bfloat16,
    float16,
    float32,
    float64,
    int1,
    int8,
    uint8,
    uint16,
    uint32,
    uint64,
)

if TYPE_CHECKING:
    from nitinol.compiler.gpu.emit import Emitter

_OPERATORS = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "rem": "%", "and": "&", "or": "|", "xor": "^", "shl": "<<",
    "shr": ">>", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
}  # fmt: skip
_BOOLEAN = {
    "add": "{} != {}", "sub": "{} != {}", "mul": "{} && {}", "div": "{} && {}", "and": "{} && {}", "or": "{} || {}",
    "xor": "{} != {}", "min": "{} && {}", "max": "{} || {}", "rem": "{} && !{}", "shl": "{} && !{}",
    "shr": "{} && !{}", "mulhi": "false", "not": "!{}", "neg": "{}", "abs": "{}",
}  # fmt: skip
_UNSIGNED = {8: uint8, 16: uint16, 32: uint32, 64: uint64}
_NARROW = (float16, bfloat16)


def compute(e: Emitter, op: Op) -> None:
    for layout in e.assignment.versions(op.result):
        operands = [e.form(v, layout if v.shape else None) for v in op.operands]
        define(e, op.result, layout, in_runs(e, op, layout, written(e, op, operands)))


def in_runs(e: Emitter, op: Op, layout: Layout, form: Form) -> Form:
    """A comparison whose result is the same in aligned runs of registers is computed for the first of each."""
    if op.kind not in COMPARISONS or not op.result.shape:
        return form
    width = e.assignment.widths.equal_bits(op.result, layout)
    return form.through(tuple(0 if bit < width else 1 << bit for bit in range(len(layout.registers))))


def written(e: Emitter, op: Op, operands: Sequence[Form]) -> Form:
    """The operation on what its operands are written as; on whole words of bytes where that is possible."""
    index = is_index(e, op.result)

    def make(*texts: str) -> str:
        return expression(op, list(texts), e.dialect, index, e.helpers)

    packed = words.computed(op, operands, e.dialect, e.helpers)
    if packed is not None:
        return words.single_bytes(packed, op.result.element, e.dialect)
    form = forms.expression(make, *operands)
    form = Form(form.text, form.names, closed(form.text(fixed(0))))
    if op.kind == "addptr":
        form = Form(form.text, form.names, False, (operands[0], operands[1]))
    return form


def number(value: Any, element: DType | PointerType, dialect: ModuleType) -> str:
    """A constant."""
    if isinstance(element, PointerType):
        return f"({dialect.type_name(element)}){int(value)}{dialect.SUFFIXES['uint64']}"
    name = dialect.type_name(element)
    if element == int1:
        return "true" if value else "false"
    if element.is_float:
        value = float(round_to(np.asarray(value, np.float64), element))
        if math.isnan(value) or math.isinf(value):
            text = "NAN" if math.isnan(value) else "INFINITY" if value > 0 else "(-INFINITY)"
        else:
            text = f"{value!r}" if element == float64 else f"{np.float32(value)!s}f"
            text = text if value >= 0 and not text.startswith("-") else f"({text})"
        return text if element in (float32, float64) else dialect.narrow_number(element, value, text)
    value = int(value) & ((1 << element.bits) - 1)
    if element.is_signed and value >> (element.bits - 1):
        value -= 1 << element.bits
    if element.bits < 32:
        return f"{name}({value})"
    suffix = dialect.SUFFIXES[element.name]
    if value == -(1 << (element.bits - 1)):
        return f"({value + 1}{suffix} - 1)"
    return f"({value}{suffix})" if value < 0 else f"{value}{suffix}"


def expression(op: Op, a: list[str], dialect: ModuleType, index: bool, helpers: set[str]) -> str:
    """C for the operation on operands that are already written, in parentheses where they need it.

    `helpers` collects functions of the dialect that the source must define. May raise the dialect's Unsupported.
    """
    kind, element, target = op.kind, op.operands[0].element, op.result.element if op.results else None
    if kind == "select":
        return f"{a[0]} ? {a[1]} : {a[2]}"
    if kind == "cast":
        return cast(a[0], element, target, dialect)
    if kind == "bitcast":
        return bitcast(a[0], element, target, dialect)
    if kind in COMPARISONS:
        return f"{a[0]} {_OPERATORS[kind]} {a[1]}"
    if kind == "addptr":
        return lean(a[0], "+", a[1])
    assert isinstance(element, DType)
    name = dialect.type_name(element)
    if element == int1:
        return _BOOLEAN[kind].format(*a)
    if element.is_float:
        return _float(op, element, name, a, dialect, helpers)
    if kind in ("div", "rem") and constant_of(op.operands[1]) in (None, 0, -1):
        helpers.add("quotient" if kind == "div" else "modulo")  # no trap and no undefined result
        return f"{'quotient' if kind == 'div' else 'modulo'}<{name}>({bare(a[0])}, {bare(a[1])})"
    return _integer(kind, element, name, a, dialect, index)


def _float(op: Op, element: DType, name: str, a: list[str], dialect: ModuleType, helpers: set[str]) -> str:
    kind = op.kind
    if kind == "div" and len(a) == 1:
        return f"inverse({bare(a[0])})"
    if kind in ("add", "sub", "mul", "div"):
        return lean(a[0], _OPERATORS[kind], a[1])
    if kind == "neg":
        return f"-{a[0]}"
    narrow = element in _NARROW
    wide = [f"float({bare(x)})" if narrow else bare(x) for x in a]
    if kind in ("min", "max"):
        function = f"f{kind}"
        if op.attributes.get("propagate_nan", False):
            function = f"nan_{kind}"
            helpers.add(function)
    elif kind == "rem":
        function = "fmod"
    elif kind in ("abs", "fma"):
        function = "fabs" if kind == "abs" else kind
    else:
        function = dialect.FUNCTIONS[kind]
        if kind in dialect.HELPERS:
            helpers.add(kind)
    text = f"{function}({', '.join(wide)})"
    return f"{name}({text})" if narrow else text


def _integer(kind: str, element: DType, name: str, a: list[str], dialect: ModuleType, index: bool) -> str:
    narrow = element.bits < 32
    if kind in ("add", "sub", "mul", "shl"):
        if index and not narrow:
            return lean(a[0], _OPERATORS[kind], a[1])
        unsigned = dialect.type_name(uint32 if narrow else _UNSIGNED[element.bits])
        if narrow or element.is_signed:
            return f"{name}({unsigned}({bare(a[0])}) {_OPERATORS[kind]} {unsigned}({bare(a[1])}))"
        return f"{a[0]} {_OPERATORS[kind]} {a[1]}"
    if kind in ("div", "rem") or kind in ("and", "or", "xor", "shr"):
        text = f"{a[0]} {_OPERATORS[kind]} {a[1]}"
    elif kind in ("min", "max"):  # of narrow integers, CUDA's are ints
        text = f"{kind}({bare(a[0])}, {bare(a[1])})"
    elif kind == "mulhi":
        if not narrow:
            return f"{dialect.FUNCTIONS[kind]}({bare(a[0])}, {bare(a[1])})"
        wide = "int" if element.is_signed else "uint"
        return f"{name}({wide}({bare(a[0])}) * {wide}({bare(a[1])}) >> {element.bits})"
    elif kind == "not":
        text = f"~{a[0]}"
    elif kind == "neg":
        unsigned = dialect.type_name(uint32 if narrow else _UNSIGNED[element.bits])
        return f"{name}(-{unsigned}({bare(a[0])}))"
    elif kind == "abs":
        if not element.is_signed:
            return a[0]
        unsigned = dialect.type_name(uint32 if narrow else _UNSIGNED[element.bits])
        return f"{a[0]} < 0 ? {name}(-{unsigned}({bare(a[0])})) : {a[0]}"
    else:
        raise AssertionError(kind)
    return f"{name}({text})" if narrow else text


def cast(x: str, source: Any, target: Any, dialect: ModuleType) -> str:
    if source == target:
        return x
    if isinstance(target, PointerType):
        return f"({dialect.type_name(target)}){x}"
    if isinstance(source, PointerType):
        return f"{x} != 0" if target == int1 else f"{dialect.type_name(target)}({dialect.to_number(bare(x))})"
    if float64 in (source, target):
        dialect.type_name(float64)
    name = dialect.type_name(target)
    if target == int1:
        return f"{x} != 0"
    if source in _NARROW and target in _NARROW:
        x = f"float({bare(x)})"  # holds both
    if source in (int8, uint8) and not target.is_float and target.bits > 8:
        x = dialect.wide_byte(bare(x))
    return f"{name}({bare(x)})"


def bitcast(x: str, source: Any, target: Any, dialect: ModuleType) -> str:
    if source == target:
        return x
    if isinstance(source, PointerType) or isinstance(target, PointerType):
        if isinstance(source, PointerType) and isinstance(target, PointerType):
            return f"({dialect.type_name(target)}){x}"
        return cast(x, source, target, dialect)
    if int1 in (source, target):
        return f"{x} != 0" if target == int1 else f"{dialect.type_name(target)}({bare(x)})"
    return dialect.bit_cast(dialect.type_name(target), bare(x))

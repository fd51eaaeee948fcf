"""One program per element type with every elementwise operation, every cast, every reduction: on special values too.

Beside the random programs, which keep values tame: here are NaN, infinities, zeros of both signs, subnormals, the
largest and smallest numbers and integers, for tiles and for scalars. What the IR leaves open is left out: division by
zero, the smallest integer by -1, shifts by the width, floats that fit no int. Tolerances: arithmetic is exact (one
rounding, IEEE), with one unit in the last place granted to fp16 and bf16; functions like exp get 8 units in the last
place, and the smallest normal number where a result may be flushed to zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from helpers import Build, pointer, tile_of
from program import Program
from random_values import FLOATS, INTEGERS, ULP

from nitinol.compiler import ir
from nitinol.compiler.semantics import from_memory, memory_dtype, round_to, to_memory
from nitinol.language.types import DType, bfloat16, float16, float32, float64, int1, int8, int32

COUNT = 64
SMALLEST_NORMAL = {float16: 2.0**-14, float64: 2.0**-1022}  # of the others: 2**-126
_FUNCTIONS = "exp exp2 log log2 sqrt rsqrt sin cos tanh erf".split()


def operation_programs(
    rng: np.random.Generator, dtypes: Sequence[DType] = (*INTEGERS, *FLOATS), exp_units: int = 8
) -> Iterator[tuple[str, Program]]:
    """Pairs of a name for the test and the program. exp_units: how many units in the last place exp of fp32 is granted.
    CUDA's, 2**(x log2 e), is off by |x| / 3 more than others, 40 where its result is finite."""
    for element in dtypes:
        for shape in ((), (COUNT,)):
            kind = "tile" if shape else "scalar"
            yield f"{element}-arithmetic-{kind}", _arithmetic(rng, element, shape)
            yield f"{element}-casts-{kind}", _casts(rng, element, shape, dtypes)
            if element.is_float:
                yield f"{element}-functions-{kind}", _functions(rng, element, shape, exp_units)
        for axis in range(3):
            yield f"{element}-reductions-{axis}", _reductions(rng, element, axis)


def values(rng: np.random.Generator, element: DType, count: int = COUNT) -> np.ndarray:
    """Special and random values in memory form, shuffled."""
    if not element.is_float:
        limits = np.iinfo(memory_dtype(element))
        result = rng.integers(limits.min, limits.max, count, dtype=memory_dtype(element), endpoint=True)
        whole = [limits.min, limits.min + 1, limits.max, limits.max - 1, 0, 1, 2, limits.max // 2]
        result[: len(whole)] = whole[:count]
        result[len(whole) : count // 2] %= 10
    else:
        numbers = rng.normal(size=count) * 10.0 ** rng.integers(-3, 3, count)
        tiny, huge = SMALLEST_NORMAL.get(element, 2.0**-126), 60000.0 if element == float16 else 3e38
        special = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, tiny, -tiny, huge, -huge, 0.5, 2.0, -2.5, 100.0]
        special += [tiny / 4] * (element != bfloat16)  # some CPUs' bf16 instructions flush subnormals
        numbers[: len(special)] = special[:count]
        result = to_memory(round_to(numbers, element), element)
    return rng.permutation(result)


class _Outputs:
    """Collects the arrays of a program; each elementwise result gets its own buffer of COUNT elements."""

    def __init__(self, shape: tuple[int, ...], arrays: Sequence[np.ndarray], elements: Sequence[DType]) -> None:
        self.b = Build(*map(pointer, elements), names=[f"in{i}" for i in range(len(elements))])
        self.shape = shape
        self.arguments = list(arrays)
        self.outputs: list[int] = []
        self.tolerance: list[float] = []
        self.relative: list[float] = []

    def address(self, parameter: ir.Value) -> ir.Value:
        """All elements at once, or the one that belongs to this program instance."""
        number = self.b.parameters.index(parameter)
        if self.shape:
            return self.b.at(number, self.shape)
        return self.b("addptr", parameter, self.b("program_id", type=int32, axis=0))

    def load(self, number: int) -> ir.Value:
        return self.b("load", self.address(self.b.parameters[number]))

    def store(self, name: str, value: ir.Value, absolute: float = 0.0, relative: float = 0.0) -> None:
        element = value.element
        assert isinstance(element, DType)
        if element == int1:
            element = int8
            value = self.b("cast", value, type=tile_of(int8, value.shape))
        parameter = ir.Value(pointer(element), None, name)
        self.b.parameters.append(parameter)
        self.outputs.append(len(self.arguments))
        self.arguments.append(np.full(COUNT, 77, memory_dtype(element)))
        self.tolerance.append(absolute)
        self.relative.append(relative)
        self.b("store", self.address(parameter), value)

    def program(self) -> Program:
        exact = [a == r == 0 for a, r in zip(self.tolerance, self.relative)]
        grid = (1 if self.shape else COUNT, 1, 1)
        return Program(self.b.function, grid, self.arguments, self.outputs, exact, self.tolerance, self.relative)


def _arithmetic(rng: np.random.Generator, element: DType, shape: tuple[int, ...]) -> Program:
    x, y, z = (values(rng, element) for _ in range(3))
    out = _Outputs(shape, [x, y, z], [element] * 3)
    b = out.b
    u, v, w = (out.load(i) for i in range(3))
    type = u.type
    for kind in sorted(ir.COMPARISONS):
        out.store(kind, b(kind, u, v))
    out.store("select", b("select", b("lt", u, v), v, w, type=type))
    one = ULP[element] if element in (float16, bfloat16) else 0.0
    tiny = SMALLEST_NORMAL.get(element, 2.0**-126) if element in (float16, bfloat16) else 0.0
    if element.is_float:
        for kind in ("add", "sub", "mul", "div"):
            out.store(kind, b(kind, u, v), tiny, one)
        for kind in ("min", "max"):
            out.store(kind, b(kind, u, v, propagate_nan=False))
            out.store(f"{kind}_nan", b(kind, u, v, propagate_nan=True))
        out.store("rem", b("rem", u, b.constant(3.0, type)))
        out.store("fma", b("fma", u, v, w), 2.0**-1070 if element == float64 else tiny, one)  # the oracle's own limit
        for kind in ("neg", "abs", "floor", "ceil"):
            out.store(kind, b(kind, u))
    else:
        for kind in ("add", "sub", "mul", "mulhi", "and", "or", "xor", "min", "max"):
            out.store(kind, b(kind, u, v))
        divisor = b("add", b("and", v, b.constant(30, type)), b.constant(2, type))  # 2..32
        shift = b("and", v, b.constant(element.bits - 1, type))
        for kind, right in (("div", divisor), ("rem", divisor), ("shl", shift), ("shr", shift)):
            out.store(kind, b(kind, u, right))
        if element.is_signed:
            for kind in ("div", "rem"):
                out.store(f"{kind}_negative", b(kind, u, b("neg", divisor)))
        for kind in ("neg", "not", "abs"):
            out.store(kind, b(kind, u))
        same = [t for t in (*INTEGERS, *FLOATS) if t.bits == element.bits]
        for target in same:
            bits = b("bitcast", u, type=tile_of(target, shape))
            out.store(f"as_{target}", b("bitcast", bits, type=type))
    truth, other = b("lt", u, v), b("ge", v, w)
    for kind in ("and", "or", "xor", "eq", "ne"):
        out.store(f"bool_{kind}", b(kind, truth, other))
    out.store("bool_not", b("not", truth))
    return out.program()


def _functions(rng: np.random.Generator, element: DType, shape: tuple[int, ...], exp_units: int) -> Program:
    """The same function of the same type is compared on |x| < 1000: beyond, sin needs more than a target must give."""
    x = values(rng, element)
    numbers = from_memory(x, element).astype(np.float64)
    x[np.isfinite(numbers) & (np.abs(numbers) > 1000)] = x[int(np.argmax(numbers == 1.0))]
    out = _Outputs(shape, [x], [element])
    u = out.load(0)
    for kind in _FUNCTIONS:
        units = exp_units if kind == "exp" and element == float32 else 8
        out.store(kind, out.b(kind, u), 2 * SMALLEST_NORMAL.get(element, 2.0**-126), units * ULP[element])
    return out.program()


def _casts(rng: np.random.Generator, element: DType, shape: tuple[int, ...], dtypes: Sequence[DType]) -> Program:
    """To every type. Floats to ints: of values that fit; integers of 64 bits to 16-bit floats may round twice."""
    x = values(rng, element)
    whole = x.copy()
    if element.is_float:
        numbers = from_memory(x, element).astype(np.float64)
        whole[~(np.abs(numbers) < 127)] = 0
    out = _Outputs(shape, [x, whole], [element] * 2)
    u, small = out.load(0), out.load(1)
    for target in (int1, *dtypes):
        source = small if element.is_float and not target.is_float and target != int1 else u
        if element.is_float and target.kind == "uint":
            source = out.b("abs", source)
        twice = element.bits == 64 and target in (float16, bfloat16)
        type = tile_of(target, shape)
        out.store(f"to_{target}", out.b("cast", source, type=type), 0.0, ULP[target] if twice else 0.0)
    truth = out.b("cast", out.b("gt", small, out.b.constant(0, small.type)), type=tile_of(element, shape))
    out.store("from_bool", truth)
    return out.program()


def _reductions(rng: np.random.Generator, element: DType, axis: int) -> Program:
    """Reductions and scans of a tile of 4 x 8 x 2. Sums of floats: of numbers from 1 to 2, so relative errors add."""
    shape = (4, 8, 2)
    x = values(rng, element)
    ordinary = x
    if element.is_float:
        ordinary = to_memory(round_to(rng.uniform(1, 2, COUNT), element), element)
        special = from_memory(x, element)
        x = np.where(np.isnan(special), ordinary, x)  # NaN is for the pair below
    out = _Outputs(shape, [x, ordinary], [element] * 2)
    b = out.b
    u, v = out.load(0), out.load(1)
    left = tile_of(element, shape[:axis] + shape[axis + 1 :])
    kinds = ["add", "mul", "min", "max"] + ([] if element.is_float else ["and", "or", "xor"])
    for kind in kinds:
        sums = element.is_float and kind in ("add", "mul")
        relative = 2 * shape[axis] * ULP[element] if sums else 0.0
        attributes = {"propagate_nan": False} if element.is_float and not sums else {}
        for how, type, options in (
            ("reduce", left, {}),
            ("scan", u.type, {"reverse": False}),
            ("scan", u.type, {"reverse": True}),
        ):
            with b.block(element, element) as region:
                b("yield", b(kind, *region.arguments, **attributes))
            result = b(how, v if sums else u, type=type, regions=[region], axis=axis, **options)
            if result.shape != shape:  # one buffer for all shapes: the rest is repeated
                ones = (*shape[:axis], 1, *shape[axis + 1 :])
                result = b("broadcast", b("reshape", result, type=tile_of(element, ones)), type=u.type)
            out.store(f"{how}_{kind}", result, 0.0, relative)
    index = b("reshape", b.arange(COUNT), type=tile_of(int32, shape))
    for better in ("lt", "gt"):  # the extreme and where it is, the first of equals
        with b.block(element, int32, element, int32) as region:
            p, i, q, j = region.arguments
            first = b("or", b(better, p, q), b("and", b("eq", p, q), b("lt", i, j)))
            b("yield", b("select", first, p, q, type=element), b("select", first, i, j, type=int32))
        types = [left, tile_of(int32, left.shape)]  # type: ignore[union-attr]
        for result in b("reduce", u, index, type=types, regions=[region], axis=axis):
            ones = (*shape[:axis], 1, *shape[axis + 1 :])
            result = b("reshape", result, type=tile_of(result.element, ones))
            out.store(f"arg_{better}", b("broadcast", result, type=tile_of(result.element, shape)))
    return out.program()

"""The tile IR: typed SSA with structured control flow. `docs/tile-language.md` lists the operations for readers.

A `Function` holds one `Block`; an `Op` has operands, attributes, results and, for control flow and reductions,
regions (one `Block` each). Blocks end with a `yield` (or `condition`, first region of `while`). Values of enclosing
blocks are visible inside. Scalars are values whose type is a bare element type; a tile's shape is never ().

    op              operands -> results                        attributes / regions
    constant        -> s                                       value (Python int, float or bool)
    program_id      -> int32                                   axis 0..2
    num_programs    -> int32                                   axis
    arange          -> <n x int32>                             start, end
    splat           s -> tile                                  (result type tells the shape)
    broadcast       tile -> tile                               extents 1 grow; same rank
    reshape         tile -> tile                               row-major order kept (expand_dims is one of these)
    trans           tile -> tile                               perm: result axis i is operand axis perm[i]
    join            a, b -> tile                               new last axis of extent 2
    split           tile[..., 2] -> a, b
    cat             a, b -> tile                               axis
    gather          src, index -> tile                         axis (index: int32/int64 tile, as numpy.take_along_axis)
    add sub mul     a, a -> a                                  ints wrap
    div             a, a -> a                                  floats; ints truncate toward zero as in C
    rem             a, a -> a                                  sign of the dividend, as in C (floats: fmod)
    and or xor      a, a -> a                                  ints and bool
    shl shr         a, a -> a                                  shr is arithmetic on signed types
    mulhi           a, a -> a                                  high half of the product
    min max         a, a -> a                                  propagate_nan (bool; floats only; default False)
    eq ne lt le gt ge  a, a -> int1                            floats: ordered, except ne
    neg not         a -> a                                     not: bitwise; logical on int1
    exp exp2 log log2 sqrt rsqrt sin cos tanh erf floor ceil  a -> a      floats
    abs             a -> a
    fma             a, a, a -> a                               floats; one rounding
    select          int1, a, a -> a
    cast            a -> b                                     floats round to nearest even; float->int
                                                               truncates; ->int1 is `!= 0`; pointers <-> int64
    bitcast         a -> b                                     same width
    addptr          ptr, int -> ptr                            offset in elements
    load            ptr[, mask[, other]] -> value              masked-off lanes: other, or unspecified without it
    store           ptr, value[, mask]
    atomic_rmw      ptr, value[, mask] -> old                  kind: add, max, min, and, or, xor, xchg
    atomic_cas      ptr, expected, desired -> old
    dot             a[..M,K], b[..K,N], acc[..M,N] -> acc      acc: fp32 (fp64 of fp64), int32 of int8/uint8
    reduce          n tiles -> n values without the axis       axis; region: 2n scalars (left..., right...) -> yield n
    scan            n tiles -> n tiles                         axis, reverse; region as for reduce
    for             lower, upper, step, *init -> *final        region: (iv, *carried) -> yield *next; step > 0
    while           *init -> *final                            regions: (*carried) -> condition(go, *values);
                                                               (*values) -> yield *next; results are `values`
    if              int1 -> *results                           regions: then, else; both yield results
    gdc_wait                                                   CUDA: until the kernels before this one have ended
    gdc_launch_dependents                                      CUDA: those after this one may start
    device_print    values                                     prefix, hex
    assert          int1 (scalar or tile)                      message
    breakpoint      values                                     names; the interpreter stops here, targets never see it

Elementwise operands have one type: no implicit broadcast or promotion at this level.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from nitinol.language.types import (
    DType,
    PointerType,
    TileType,
    Type,
    element_type,
    int1,
    int32,
    shape_of,
    with_element,
    with_shape,
)

BINARY = frozenset("add sub mul div rem and or xor shl shr mulhi min max".split())
COMPARISONS = frozenset("eq ne lt le gt ge".split())
FLOAT_UNARY = frozenset("exp exp2 log log2 sqrt rsqrt sin cos tanh erf floor ceil".split())
UNARY = FLOAT_UNARY | {"neg", "not", "abs"}
ELEMENTWISE = BINARY | COMPARISONS | UNARY | {"fma", "select", "cast", "bitcast", "addptr"}
VIEWS = frozenset("splat broadcast reshape trans join split cat".split())  # compute nothing
WRITES = frozenset("store atomic_rmw atomic_cas".split())
EARLY_STARTS = frozenset(("gdc_wait", "gdc_launch_dependents"))  # nothing but on CUDA
EFFECTS = WRITES | EARLY_STARTS | {"device_print", "assert", "breakpoint"}
TERMINATORS = frozenset(("yield", "condition"))
CONTROL = frozenset(("for", "while", "if"))


@dataclass(frozen=True)
class Location:
    """Where in the user's Python an operation comes from; lines and columns count from 1."""

    file: str
    line: int
    column: int = 1
    end_column: int = 1

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(eq=False)
class Value:
    """One SSA value. `name` is the Python variable it was assigned to, for readable output ("" if none)."""

    type: Type
    op: Op | None = None  # None: a block or function argument
    name: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.type)

    @property
    def element(self) -> DType | PointerType:
        return element_type(self.type)

    def __repr__(self) -> str:
        return f"%{self.name or hex(id(self))[-4:]}: {self.type}"


@dataclass(eq=False)
class Block:
    arguments: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)

    @property
    def terminator(self) -> Op:
        return self.ops[-1]


@dataclass(eq=False)
class Op:
    kind: str
    operands: list[Value]
    results: list[Value]
    attributes: dict[str, Any] = field(default_factory=dict)
    regions: list[Block] = field(default_factory=list)
    location: Location | None = None

    @property
    def result(self) -> Value:
        return self.results[0]


@dataclass(eq=False)
class Function:
    """A kernel: run-time parameters (scalars and pointers), body, and what specialisation knows of each parameter.

    `divisible[i]` is a number that the i-th parameter (an integer's value or a pointer's address in bytes) is known
    to be a multiple of, 1 if nothing is known.
    """

    name: str
    parameters: list[Value]
    body: Block
    divisible: list[int]
    location: Location | None = None
    source: str = ""

    def __str__(self) -> str:
        return print_function(self)


def create(
    kind: str,
    /,  # an attribute may be called kind too
    operands: Sequence[Value],
    result_types: Sequence[Type],
    location: Location | None = None,
    regions: Sequence[Block] = (),
    **attributes: Any,
) -> Op:
    """A new operation that is in no block yet."""
    op = Op(kind, list(operands), [], attributes, list(regions), location)
    op.results = [Value(type, op) for type in result_types]
    return op


def walk(block: Block) -> Iterator[Op]:
    """All operations in the block and in the regions below it, in program order."""
    for op in block.ops:
        yield op
        for region in op.regions:
            yield from walk(region)


def constant_of(value: Value) -> Any | None:
    """The Python value of a constant (also of a splat or view of one), else None."""
    op = value.op
    while op is not None and op.kind in ("splat", "broadcast", "reshape", "trans"):
        op = op.operands[0].op
    return op.attributes["value"] if op is not None and op.kind == "constant" else None


def combine_kind(op: Op) -> str | None:
    """The operation ("add", "max", ...) when a reduce or scan is just that on one operand, else None."""
    block = op.regions[0]
    if len(op.operands) != 1 or len(block.ops) != 2:
        return None
    first, last = block.ops
    associative = first.kind in ("add", "mul", "min", "max", "and", "or", "xor")
    if associative and set(first.operands) == set(block.arguments) and last.operands == first.results:
        return first.kind
    return None


# ---------------------------------------------------------------------------------------------------- the printer


def print_function(function: Function) -> str:
    """The function as text: one operation a line, values named after the user's variables, source lines behind."""
    names: dict[Value, str] = {}
    taken: dict[str, int] = {}

    def name(value: Value) -> str:
        if value not in names:
            base = value.name or "v"
            count = taken.get(base, 0)
            taken[base] = count + 1
            names[value] = f"%{base}" if value.name and count == 0 else f"%{base}.{count}"
        return names[value]

    lines: list[str] = []

    def arguments(values: Sequence[Value]) -> str:
        return ", ".join(f"{name(v)}: {v.type}" for v in values)

    def emit(block: Block, indent: str) -> None:
        for op in block.ops:
            left = ", ".join(name(r) for r in op.results)
            text = f"{indent}{left} = {op.kind}" if left else f"{indent}{op.kind}"
            if op.operands:
                text += " " + ", ".join(name(v) for v in op.operands)
            if op.attributes:
                text += " {" + ", ".join(f"{k}={v!r}" for k, v in op.attributes.items()) + "}"
            if op.results:
                text += " : " + ", ".join(str(r.type) for r in op.results)
            if op.location is not None:
                text = f"{text:<96} // line {op.location.line}"
            lines.append(text)
            for region in op.regions:
                lines.append(f"{indent}({arguments(region.arguments)}) {{")
                emit(region, indent + "  ")
                lines.append(indent + "}")

    hints = ", ".join(
        f"{name(p)}: {p.type}" + (f" /* multiple of {d} */" if d > 1 else "")
        for p, d in zip(function.parameters, function.divisible)
    )
    lines.append(f"kernel {function.name}({hints}) {{")
    emit(function.body, "  ")
    lines.append("}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------- the verifier


class VerifyError(AssertionError):
    """The IR breaks its own rules: a defect of the compiler, never of the user's kernel."""


def verify(function: Function) -> None:
    """Raises VerifyError unless every value is defined before use and every operation's types fit."""

    def check_block(block: Block, defined: set[Value], terminator: str | None) -> None:
        defined = defined | set(block.arguments)
        for index, op in enumerate(block.ops):
            for operand in op.operands:
                if operand not in defined:
                    raise VerifyError(f"{op.kind} at {op.location} uses {operand} before its definition")
            if (op.kind in TERMINATORS) != (terminator is not None and index == len(block.ops) - 1):
                raise VerifyError(f"{op.kind} at {op.location} is misplaced in its block")
            problem = _check(op)
            if problem:
                types = ", ".join(str(v.type) for v in op.operands)
                raise VerifyError(f"{op.kind}({types}) -> {[r.type for r in op.results]} at {op.location}: {problem}")
            for number, region in enumerate(op.regions):
                ending = "condition" if op.kind == "while" and number == 0 else "yield"
                if not region.ops or region.terminator.kind != ending:
                    raise VerifyError(f"{op.kind} at {op.location}: region {number} does not end with {ending}")
                check_block(region, defined, ending)
            defined.update(op.results)

    check_block(function.body, set(function.parameters), None)


def _types(values: Sequence[Value]) -> list[Type]:
    return [v.type for v in values]


def _check(op: Op) -> str | None:
    """What is wrong with one operation's types, or None."""
    kind, attributes = op.kind, op.attributes
    operands, results = _types(op.operands), _types(op.results)
    first = operands[0] if operands else None

    def element(i: int) -> DType | PointerType:
        return element_type(operands[i])

    def shape(i: int) -> tuple[int, ...]:
        return shape_of(operands[i])

    if kind in BINARY:
        if len(operands) != 2 or operands != [results[0]] * 2:
            return "needs two operands and a result of one type"
        if kind in ("and", "or", "xor", "shl", "shr", "mulhi") and not _is_int(element(0)):
            return "needs integers"
    elif kind in COMPARISONS:
        if len(operands) != 2 or operands[0] != operands[1] or results != [with_element(operands[0], int1)]:
            return "needs two operands of one type and gives int1"
    elif kind in UNARY:
        if operands != results or len(operands) != 1:
            return "keeps its operand's type"
        if kind in FLOAT_UNARY and not _is_float(element(0)):
            return "needs floats"
    elif kind == "fma":
        if operands != [results[0]] * 3 or not _is_float(element(0)):
            return "needs three floats of one type"
    elif kind == "select":
        if len(operands) != 3 or operands[1:] != [results[0]] * 2 or operands[0] != with_element(results[0], int1):
            return "needs an int1 of the shape of two values of one type"
    elif kind in ("cast", "bitcast"):
        if shape(0) != shape_of(results[0]):
            return "keeps the shape"
        if kind == "bitcast" and element(0).nbytes != element_type(results[0]).nbytes:
            return "keeps the width"
    elif kind == "addptr":
        fits = results == [first] and isinstance(element(0), PointerType) and _is_int(element(1))
        if not fits or shape(0) != shape(1):
            return "needs pointers and integers of one shape"
    elif kind == "constant":
        if operands or isinstance(results[0], TileType):
            return "is a scalar without operands"
    elif kind in ("program_id", "num_programs"):
        if attributes["axis"] not in (0, 1, 2) or results != [int32]:
            return "has an axis 0..2 and gives int32"
    elif kind == "arange":
        if results != [TileType(int32, (attributes["end"] - attributes["start"],))]:
            return "gives end - start int32"
    elif kind in VIEWS:
        return _check_view(op)
    elif kind == "gather":
        if results != [with_shape(element(0), shape(1))] or len(shape(0)) != len(shape(1)):
            return "gives the source's elements in the index's shape"
    elif kind in ("load", "store"):
        pointer = element(0)
        value = results[0] if kind == "load" else operands[1]
        if not isinstance(pointer, PointerType) or value != with_shape(pointer.element, shape(0)):
            return "the value does not fit the pointer"
        rest = operands[1:] if kind == "load" else operands[2:]
        if rest and rest[0] != with_shape(int1, shape(0)):
            return "the mask is not int1 of the pointer's shape"
        if kind == "load" and len(rest) == 2 and rest[1] != value:
            return "`other` is not of the loaded type"
    elif kind in ("atomic_rmw", "atomic_cas"):
        pointer = element(0)
        if not isinstance(pointer, PointerType) or operands[1] != results[0] != with_shape(pointer.element, shape(0)):
            return "the value does not fit the pointer"
    elif kind == "dot":
        a, b, acc = (shape(i) for i in range(3))
        if a[:-2] != b[:-2] or a[-1] != b[-2] or acc != (*a[:-1], b[-1]) or results != operands[2:]:
            return "shapes are not [..M,K] [..K,N] [..M,N]"
    elif kind in ("reduce", "scan"):
        axis = attributes["axis"]
        if len({s for s in map(shape_of, operands)}) != 1 or not 0 <= axis < len(shape(0)):
            return "needs tiles of one shape and an axis of it"
        left = shape(0)[:axis] + shape(0)[axis + 1 :] if kind == "reduce" else shape(0)
        if results != [with_shape(element_type(t), left) for t in operands]:
            return "results do not fit"
        if _types(op.regions[0].arguments) != [element_type(t) for t in operands] * 2:
            return "the region's arguments do not fit"
    elif kind == "for":
        carried = operands[3:]
        block = op.regions[0]
        if not operands[0] == operands[1] == operands[2] == block.arguments[0].type:
            return "bounds, step and induction variable have one type"
        if not carried == _types(block.arguments[1:]) == results == _types(block.terminator.operands):
            return "carried values differ between start, body, yield and results"
    elif kind == "while":
        before, after = op.regions
        if operands != _types(before.arguments) or _types(after.terminator.operands) != operands:
            return "carried values differ"
        if _types(before.terminator.operands) != [int1, *results] or _types(after.arguments) != results:
            return "condition does not pass on what the body and the results need"
    elif kind == "if":
        if operands != [int1] or any(_types(r.terminator.operands) != results for r in op.regions):
            return "needs a scalar int1 and both regions to yield the results"
    elif kind not in EARLY_STARTS | {"yield", "condition", "device_print", "assert", "breakpoint"}:
        return "no such operation"
    return None


def _check_view(op: Op) -> str | None:
    source, result = op.operands[0], op.results[0]
    if any(r.element != source.element for r in op.results):
        return "keeps the element type"
    if op.kind == "splat":
        return None if source.shape == () and result.shape else "makes a tile of a scalar"
    if op.kind == "broadcast":
        fits = len(source.shape) == len(result.shape) and all(s in (1, r) for s, r in zip(source.shape, result.shape))
        return None if fits else "only extents of 1 grow"
    if op.kind == "reshape":
        same = TileType(int1, source.shape).size == TileType(int1, result.shape).size
        return None if same else "keeps the number of elements"
    if op.kind == "trans":
        perm = op.attributes["perm"]
        fits = sorted(perm) == list(range(len(source.shape))) and result.shape == tuple(source.shape[p] for p in perm)
        return None if fits else "perm does not give the result's shape"
    if op.kind == "join":
        fits = op.operands[1].type == source.type and result.shape == (*source.shape, 2)
        return None if fits else "needs two equal types"
    if op.kind == "split":
        fits = source.shape[-1] == 2 and all(r.shape == source.shape[:-1] for r in op.results)
        return None if fits else "needs a last extent of 2"
    axis = op.attributes["axis"]  # cat
    other = op.operands[1].shape
    joined = (*source.shape[:axis], source.shape[axis] + other[axis], *source.shape[axis + 1 :])
    return None if result.shape == joined else "extents do not add up"


def _is_int(element: DType | PointerType) -> bool:
    return isinstance(element, DType) and element.is_int


def _is_float(element: DType | PointerType) -> bool:
    return isinstance(element, DType) and element.is_float

"""From tile IR to the source of a kernel: walks the operations and writes statements; one emitter for all dialects.

All threads of a threadgroup (simdgroups of 32 lanes) run one program instance. Control flow depends on scalars only,
which every thread computes alike, so barriers and lane operations are always reached by all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from nitinol.compiler.analysis import base_pointer, uses_of
from nitinol.compiler.errors import CompilationError
from nitinol.compiler.gpu import (
    control,
    convert,
    dot,
    effects,
    elementwise,
    memory,
    mma,
    quotients,
    reduction,
    staging,
    variables,
    views,
    words,
)
from nitinol.compiler.gpu.cost import best_assignment
from nitinol.compiler.gpu.forms import Form, Index, fixed, literal, variable
from nitinol.compiler.gpu.layout import Layout, identity
from nitinol.compiler.gpu.pipeline import Stage
from nitinol.compiler.gpu.sums import spread_sums
from nitinol.compiler.gpu.tree import Access, Each, Scratch, Statement, accesses
from nitinol.compiler.ir import ELEMENTWISE, VIEWS, Block, Function, Location, Op, Value
from nitinol.language.types import DType, PointerType

Lines = Callable[[Index], Sequence[str]]

# What a kernel may do while those before it still run: it touches no memory, or the threadgroup's.
EARLY = ELEMENTWISE | VIEWS | {"constant", "program_id", "num_programs", "arange", "reduce", "scan", "gather"}


class Emitter:
    """State of one kernel: the statements so far, and how each value is written in each of its layouts."""

    def __init__(self, function: Function, dialect: ModuleType, warp_bits: int, aliases: tuple[int, ...]) -> None:
        self.function, self.dialect, self.warp_bits = function, dialect, warp_bits
        self.chained = mma.chained(function) if dialect.ASYNCHRONOUS else set()
        self.assignment = best_assignment(
            function, warp_bits, lambda op, bits: dot.fragments(op, bits, dialect, op in self.chained),
            dialect,
        )
        self.uses = uses_of(function)
        self.stages: dict[Value, Stage] = {}  # tiles that products find in shared memory
        self.forms: dict[tuple[Value, Layout], Form] = {}
        self.body: list[Any] = []
        self.nodes = self.body
        self.names: dict[str, int] = {}
        self.taken: set[str] = set()
        self.location: Location | None = function.location
        self.helpers: set[str] = set()
        self.asserts: dict[int, str] = {}
        self.prints: list[effects.Print] = []
        self.loops = 0  # how many loops we are in
        self.depth: dict[Value, int] = {}  # and were at a value's definition
        self.block_of = variables.block_of(function.body)
        self.index: dict[Value, bool] = {}
        self.aliases = dict(zip(function.parameters, aliases))
        found = self.assignment
        self.spread, self.spread_loops = spread_sums(function, self.uses, found.home, found.wanted, found.chosen)
        self.parts: set[Value] = set()  # sums of loops whose parts still lie in several threads
        self.byte_products = words.byte_products(function, self.uses)
        self.waits = not dialect.EARLY_START  # whether the kernel has waited for those before it
        self.early: set[int] = set()  # parameters from which it loads before that
        self.says_when = any(op.kind == "gdc_wait" for op in function.body.ops)

    # ------------------------------------------------------------------------------------- names and statements

    def error(self, message: str) -> CompilationError:
        return CompilationError(message, self.location or Location(self.function.name, 1))

    def name(self, base: str) -> str:
        """A name that no other variable of the kernel has."""
        base = re.sub(r"\W", "_", base).strip("_") or "v"
        base = f"v{base}" if base[0].isdigit() else base
        if base in self.dialect.RESERVED or base in self.dialect.HELPERS:
            base = f"{base}_"
        name = base
        while name in self.taken:
            self.names[base] = self.names.get(base, 1) + 1
            name = f"{base}_{self.names[base]}"
        self.taken.add(name)
        return name

    @property
    def line(self) -> int | None:
        return self.location.line if self.location else None

    def say(self, *lines: str, accesses: Sequence[Access] = ()) -> None:
        self.nodes.append(Statement(list(lines), self.line, list(accesses)))

    def each(
        self, count: int, lines: Lines, reads: Sequence[Form] = (), touched: Sequence[Access] = (), step: int = 1,
        defines: Sequence[str] = (), declaration: str = "",
    ) -> None:  # fmt: skip
        """Lines for every register: plain if there is one, else in a loop, if possible in the one before."""
        if count == 1:
            if declaration:
                self.say(declaration)
            self.say(*lines(fixed(0)), accesses=touched)
            return
        index = Index(identity(count.bit_length() - 1))
        last = self.nodes[-1] if self.nodes else None
        names = set().union(*(f.names(index) for f in reads)) if reads else set()
        fits = (
            isinstance(last, Each)
            and (last.count, last.step) == (count, step)
            and not any(name in last.defined and not plain for name, plain in names)
            and not last.elsewhere & set(defines)
            and not any(name in last.partial for name, _ in names)
            and not any(a.conflicts(b) for a in touched for b in accesses(last))
            and not any(isinstance(a.where, Scratch) for a in touched)
        )
        if not fits:
            last = Each(count, step, [])
            self.nodes.append(last)
        assert isinstance(last, Each)
        if declaration:
            self.nodes.insert(-1, Statement([declaration], self.line))
        last.statements.append(Statement(list(lines(index)), self.line, list(touched)))
        last.defined.update(defines)
        last.elsewhere.update(name for name, plain in names if not plain)

    def type(self, element: DType | PointerType) -> str:
        return self.dialect.type_name(element)

    def store_in(self, name: str, element: DType | PointerType, count: int, form: Form) -> Form:
        """Declares a variable and computes it."""
        kind = self.type(element)
        space = "" if kind.endswith("*") else " "
        if count == 1:
            self.each(1, lambda i: [f"{kind}{space}{name} = {form.text(i)};"], [form])
        else:
            self.each(count, lambda i: [f"{name}[{i}] = {form.text(i)};"], [form], defines=[name],
                      declaration=f"{kind}{space}{name}[{count}];")  # fmt: skip
        return variable(name, count)

    def declare(self, name: str, element: DType | PointerType, count: int) -> Form:
        """A variable without a value yet."""
        kind = self.type(element)
        space = "" if kind.endswith("*") else " "
        self.say(f"{kind}{space}{name}{f'[{count}]' if count > 1 else ''};")
        return variable(name, count)

    def home(self, value: Value) -> Layout:
        layout = self.assignment.home[value]
        assert layout is not None
        return layout

    def form(self, value: Value, layout: Layout | None = None) -> Form:
        return self.forms[value, layout or self.assignment.scalar]

    def scratch(self, element: DType | PointerType, count: int) -> tuple[str, Scratch]:
        """Threadgroup memory for that many elements, and the name of a pointer to it."""
        nbytes = max(1, element.nbytes) * count
        if nbytes > self.dialect.SHARED_LIMIT:
            raise self.error(
                f"this needs {nbytes} bytes of threadgroup memory to move a tile between threads and "
                f"{self.dialect.NAME} devices have {self.dialect.SHARED_LIMIT}; use smaller tiles"
            )
        piece = Scratch(nbytes)
        name = self.name("shared")
        self.nodes.append(SharedPointer(piece, element, name, self.dialect))
        return name, piece

    # ------------------------------------------------------------------------------------------------ operations

    def run(self, block: Block) -> None:
        for op in block.ops:
            self.location = op.location or self.location
            if op.kind not in EARLY and not self.loads_early(op):
                self.wait()
            try:
                self.operation(op)
            except self.dialect.Unsupported as problem:
                raise self.error(f"{op.kind} of {problem}") from None
            self.convert_results(op.results)

    def convert_results(self, values: Sequence[Value]) -> None:
        """Moves values into the other layouts that they are wanted in."""
        for value in values:
            home = self.assignment.home.get(value)
            self.depth[value] = self.loops
            for layout in self.assignment.wanted.get(value, []):
                if home is not None and layout != home and (value, layout) not in self.forms:
                    self.forms[value, layout] = convert.convert(self, value, self.forms[value, home], home, layout)
            if value in self.assignment.spilled:
                self.stages[value] = staging.put(self, value)

    def loads_early(self, op: Op) -> bool:
        """Whether an operation loads before the kernel waits, because the kernel says when it does."""
        if op.kind != "load" or not self.says_when or self.waits:
            return False
        base = base_pointer(op.operands[0], self.aliases)
        if base is None:
            return False
        self.early.add(self.function.parameters.index(base))
        return True

    def wait(self) -> None:
        """The kernel waits for the results of those before it, once: before all that touches memory or may end it."""
        if not self.waits:
            self.waits = True
            pointers = [v for v in self.function.parameters if isinstance(v.element, PointerType)]
            self.say(*self.dialect.wait_for_previous([self.form(v).text(fixed(0)) for v in pointers]))

    def operation(self, op: Op) -> None:
        kind = op.kind
        if kind == "div" and len(op.operands) == 3:
            quotients.divide(self, op)
        elif kind in ELEMENTWISE:
            elementwise.compute(self, op)
        elif kind in VIEWS:
            views.view(self, op)
        elif kind == "constant":
            text = elementwise.number(op.attributes["value"], op.result.element, self.dialect)
            self.forms[op.result, self.assignment.scalar] = literal(text)
        elif kind == "program_id":
            text = self.dialect.program_id(op.attributes["axis"])
            variables.define(self, op.result, self.assignment.scalar, literal(text))
        elif kind == "num_programs":
            text = f"arguments.grid[{op.attributes['axis']}]"
            variables.define(self, op.result, self.assignment.scalar, literal(text))
        elif kind == "gdc_launch_dependents":
            if self.dialect.EARLY_START:
                self.say(self.dialect.LET_NEXT_START)
        elif kind in ("yield", "condition", "breakpoint", "gdc_wait"):
            pass
        else:
            HANDLERS[kind](self, op)


class SharedPointer(Statement):
    """The declaration of a pointer into threadgroup memory; its offset is known once memory is allocated."""

    def __init__(self, piece: Scratch, element: DType | PointerType, name: str, dialect: ModuleType) -> None:
        super().__init__([], None, [])
        self.piece, self.element, self.name, self.dialect = piece, element, name, dialect

    def settle(self) -> None:
        self.lines = [self.dialect.shared_pointer(self.element, self.name, self.piece.offset)]


def _dot(e: Emitter, op: Op) -> None:
    """A product goes through mma.sync where the dialect has it and fragments were chosen; batches do not."""
    by_mma = e.dialect.ASYNCHRONOUS and e.assignment.fragments[op] is not None and len(op.result.shape) == 2
    (mma.product if by_mma else dot.dot)(e, op)


HANDLERS: dict[str, Callable[[Emitter, Op], None]] = {
    "arange": views.arange,
    "load": memory.load,
    "store": memory.store,
    "atomic_rmw": memory.atomic_rmw,
    "atomic_cas": memory.atomic_cas,
    "reduce": reduction.reduce,
    "scan": reduction.scan,
    "gather": convert.gather,
    "dot": _dot,
    "for": control.for_loop,
    "while": control.while_loop,
    "if": control.branch,
    "assert": effects.fail,
    "device_print": effects.print_values,
    **staging.HANDLERS,
}

"""Random tile programs that are well-typed, in bounds, free of races between program instances and comparable.

Used by the tests of every target::

    program = random_program(numpy.random.default_rng(seed), "small")
    expected, actual = program.copies(), program.copies()
    interpreter.run(program.function, program.grid, expected)
    target(program.function, program.grid, actual)
    program.compare(actual, expected)   # AssertionError with the program's text

or, with hypothesis, `@given(programs("small"))`.

What is comparable. Integers, booleans and floats that are only moved, compared, rounded or cast are exact. For all
other floats the generator carries, beside each value, a bound of its magnitude and a bound of how far two correct
targets may differ: one unit in the last place of the bound for each rounding (targets may keep 16-bit intermediates in
float32 and may contract a product and a sum), eight for exp and its kin, log2(n) + 2 for a sum of n terms in any
order, passed through each operation by its largest slope. A buffer's tolerance is twice the largest such bound stored
to it. Whatever is not continuous (comparisons, floor, casts to int, argmax) only sees exact values. Magnitudes are
clamped. Lanes that a load leaves unspecified are replaced at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies
from program import Program
from random_operations import Operations
from random_values import FLOATS, INTEGERS, LIMIT, ULP, Buffer

from nitinol.compiler import ir
from nitinol.language.types import (
    DType,
    TileType,
    int1,
    int32,
    int64,
    with_shape,
)

FEATURES = frozenset("math views gather reduce scan dot for while if atomic inplace".split())


def programs(size: str = "small", **options: Any) -> strategies.SearchStrategy[Program]:
    """For `hypothesis.given`: programs by their seed. `minimise.py` makes a failing one small."""
    seeds = strategies.integers(0, 2**32 - 1)
    return seeds.map(lambda seed: random_program(np.random.default_rng(seed), size, **options))


def random_program(
    rng: np.random.Generator,
    size: str = "small",
    features: frozenset[str] | set[str] = FEATURES,
    dtypes: Sequence[DType] = (*INTEGERS, *FLOATS),
) -> Program:
    """One random kernel: "small" (tiles of up to 64 elements, about 300 operations) or "medium" (512, about 600).

    `features` and `dtypes` narrow what it may contain; int32 is always used for indices, int1 for masks. With the
    further feature "alias" several parameters may be one memory, as `Program.aliases` tells.
    """
    return _Builder(rng, *((64, 12) if size == "small" else (512, 30)), set(features), tuple(dtypes)).build()


@dataclass
class _Builder(Operations):
    def inside(self, block: ir.Block, statements: int) -> None:
        """Random statements at the end of the block; `leave` closes it."""
        self.blocks.append(block)
        self.pools.append([v for v in block.arguments if isinstance(v.element, DType)])
        for _ in range(statements):
            self.statement(depth=len(self.blocks))

    def leave(self) -> None:
        self.blocks.pop()
        self.pools.pop()

    def carried(self) -> list[tuple[str, ir.Value]]:
        """Values to carry round a loop, each with the rule by which it changes."""
        result: list[tuple[str, ir.Value]] = []
        for _ in range(self.between(0, 3)):
            element, shape = self.typed()
            if self.chance(0.3):
                shape = ()
            if not element.is_float:
                result.append(("integer", self.value(element, shape)))
            elif self.chance(0.3):
                a = self.value(element, shape, exact=True)
                result += [("swap", a), ("swapped", self.value(element, shape, exact=True))]
            else:
                result.append((self.choose(["sum", "max", "decay", "same"]), self.value(element, shape)))
        if "dot" in self.features and self.dot_types() and self.chance(0.5):
            element, wide = self.choose(self.dot_types())
            side = int(math.log2(self.limit)) // 2
            type = TileType(wide, (1 << self.between(0, side), 1 << self.between(0, side)))
            result.append((f"dot {element}", self.fill(0 if wide == int32 else 0.0, type)))
        return result

    def assume(self, rules: Sequence[tuple[str, ir.Value]], arguments: Sequence[ir.Value]) -> list[ir.Value]:
        """Bounds of the carried values in the body; gives those that any statement of the body may use."""
        usable = []
        for (rule, start), argument in zip(rules, arguments):
            self.bounds[argument], self.errors[argument] = LIMIT, 0.0
            if rule in ("integer", "swap", "swapped"):
                usable.append(argument)
            elif rule == "same":
                self.bounds[argument], self.errors[argument] = self.bounds[start], self.errors[start]
                usable.append(argument)
        return usable

    def advance(self, rules: Sequence[tuple[str, ir.Value]], state: Sequence[ir.Value], trips: int) -> list[ir.Value]:
        """The next values; notes bound and error of the final ones under the argument."""
        following = []
        for i, ((rule, start), value) in enumerate(zip(rules, state)):
            element, shape = value.element, value.shape
            assert isinstance(element, DType)
            bound, error = self.bounds[start], self.errors[start]
            new = value
            if rule == "integer":
                new = self.value(element, shape) if self.chance(0.3) else value
                if new is value or self.chance(0.5):
                    new = self.emit(
                        self.choose(["add", "xor", "mul", "max"]), [value, self.value(element, shape)], value.type
                    )
            elif rule in ("swap", "swapped"):
                new = state[i + 1] if rule == "swap" else state[i - 1]
            elif rule.startswith("dot"):
                name = rule.split()[1]
                self.bounds[value], self.errors[value] = 0.0, 0.0
                new = self.dot(value, next(t for t in self.dtypes if t.name == name))  # type: ignore[assignment]
                total = trips * self.bounds[new]
                bound, error = total, trips * self.errors[new] + trips * total * ULP.get(element, 0.0)
            elif rule in ("sum", "max", "decay"):
                x = self.value(element, shape)
                b, e, ulp = self.bounds[x], self.errors[x], ULP[element]
                if rule == "max":
                    new = self.emit("max", [value, x], value.type)
                    bound, error = max(bound, b), max(error, e)
                else:
                    if rule == "decay":
                        value = self.emit("mul", [value, self.fill(0.5, value.type)], value.type)
                    new = self.emit("add", [value, x], value.type)
                    bound += trips * b
                    error += trips * (e + 2 * ulp * bound)
            self.bounds[state[i]], self.errors[state[i]] = bound, error
            following.append(new)
        return following

    def finish(self, op: ir.Op, rules: Sequence[tuple[str, ir.Value]], final: Sequence[ir.Value]) -> None:
        results = op.results[len(op.results) - len(rules) :]
        for (rule, start), result, state in zip(rules, results, final):
            bound, error = self.bounds[state], self.errors[state]
            if rule in ("swap", "swapped"):
                bound, error = LIMIT, 0.0
            self.keep(result, max(bound, self.bounds[start]), max(error, self.errors[start]))

    def loop(self) -> None:
        rules = self.carried()
        element = self.choose([int32, int32, int64])
        trips, step, lower = self.between(0, 4), self.between(1, 3), self.between(-2, 3)
        upper = lower + trips * step - (self.between(0, step - 1) if trips else self.between(0, 3))
        bounds = [self.integer(n, element) for n in (lower, upper, step)]
        starts = [v for _, v in rules]
        walker = self.walking_pointer(trips) if self.chance(0.4) else None
        if walker:
            starts.append(walker[0])
        block = ir.Block([ir.Value(element, None, "i")] + [ir.Value(v.type) for v in starts])
        variable, *state = block.arguments
        usable = self.assume(rules, state)
        self.in_loop += 1
        self.inside(block, 0)
        self.pools[-1] = [variable, *usable]
        extra = []
        if walker:
            _, buffer, stride = walker
            self.keep(self.masked_load(buffer, state[-1], None), buffer.bound)
            move = self.emit("splat", [self.integer(stride)], TileType(int32, state[-1].shape))
            extra.append(self.emit("addptr", [state[-1], move], state[-1].type))
        for _ in range(self.between(1, 4)):
            self.statement(depth=len(self.blocks))
        following = self.advance(rules, state, max(trips, 1))
        self.emit("yield", [*following, *extra])
        self.leave()
        self.in_loop -= 1
        op_results = [v.type for v in starts]
        self.emit("for", [*bounds, *starts], *op_results, regions=[block])
        op = self.blocks[-1].ops[-1]
        if walker:
            op_results.pop()
        self.finish(ir.Op("for", [], op.results[: len(rules)]), rules, state)

    def walking_pointer(self, trips: int) -> tuple[ir.Value, Buffer, int]:
        """A tile of pointers that moves by a stride in each iteration; backwards too."""
        element, shape = self.dtype(), self.shape()
        tiles, extent = self.axes(shape, injective=False)
        stride = self.choose([extent, 1, -1, shape[-1]])
        reach = extent + abs(stride) * max(trips - 1, 0)
        buffer = self.buffer(element, self.data(element, reach))
        base = self.base(buffer, 0, reach - extent if stride < 0 else 0)
        return self.pointers(base, tiles, shape), buffer, stride

    def while_loop(self) -> None:
        """Counts down from a number in memory; the condition may look at the carried integers too."""
        rules = self.carried()
        trips = self.between(0, 4)
        count = self.integer(trips)
        if self.chance(0.5):
            buffer = self.buffer(int32, np.array([trips], np.int32))
            count = self.emit("load", [buffer.parameter], int32)
        starts = [count, *(v for _, v in rules)]
        before, after = (ir.Block([ir.Value(v.type) for v in starts]) for _ in range(2))
        for block in (before, after):
            self.assume(rules, block.arguments[1:])
        self.in_loop += 1
        self.blocks.append(before)
        go = self.emit("gt", [before.arguments[0], self.fill(0, int32)], int1)
        self.emit("condition", [go, *before.arguments])
        self.blocks.pop()
        usable = self.assume(rules, after.arguments[1:])
        self.inside(after, 0)
        self.pools[-1] = [after.arguments[0], *usable]
        for _ in range(self.between(1, 3)):
            self.statement(depth=len(self.blocks))
        less = self.emit("sub", [after.arguments[0], self.fill(1, int32)], int32)
        following = self.advance(rules, after.arguments[1:], max(trips, 1))
        self.emit("yield", [less, *following])
        self.leave()
        self.in_loop -= 1
        self.emit("while", starts, *[v.type for v in starts], regions=[before, after])
        self.finish(self.blocks[-1].ops[-1], rules, after.arguments[1:])

    def branch(self) -> None:
        condition = self.value(int1, ()) if self.chance(0.5) else self.condition(())
        if self.chance(0.3):
            parity = self.emit("and", [self.program(), self.fill(1, int32)], int32)
            condition = self.emit("eq", [parity, self.fill(0, int32)], int1)
        types = []
        for _ in range(self.between(0, 2)):
            element, shape = self.typed()
            types.append(with_shape(int1 if self.chance(0.1) else element, () if self.chance(0.3) else shape))
        blocks, yields = [ir.Block(), ir.Block()], []
        for block in blocks:
            self.inside(block, self.between(0, 2))
            results = [self.value(t.element if isinstance(t, TileType) else t, getattr(t, "shape", ())) for t in types]  # type: ignore[arg-type]
            self.emit("yield", results)
            yields.append([(self.bounds[v], self.errors[v]) for v in results])
            self.leave()
        self.emit("if", [condition], *types, regions=blocks)
        for result, then, other in zip(self.blocks[-1].ops[-1].results, *yields):
            self.keep(result, max(then[0], other[0]), max(then[1], other[1]))

    def statement(self, depth: int) -> None:
        choices: list[tuple[float, Callable[[], Any]]] = [
            (8, self.elementwise),
            (1.5, self.convert),
            (1.5, self.some_store),
        ]
        options = {"views": (3, self.view), "reduce": (2.5, self.reduce), "scan": (1, lambda: self.reduce("scan"))}
        options |= {
            "dot": (1.5, self.dot),
            "atomic": (0.4, self.atomic),
            "inplace": (3 if "alias" in self.features else 1.5, self.reload),
        }
        if depth < 3:
            options |= {"for": (1.5, self.loop), "while": (0.7, self.while_loop), "if": (1.2, self.branch)}
        choices += [option for name, option in options.items() if name in self.features]
        weights = np.array([weight for weight, _ in choices])
        choices[int(self.rng.choice(len(choices), p=weights / weights.sum()))][1]()

    def some_store(self) -> None:
        value = self.find(lambda v: isinstance(v.element, DType))
        if value is not None:
            self.store(value)

    def build(self) -> Program:
        grid = self.choose([(1, 1, 1), (2, 1, 1), (3, 1, 1), (2, 2, 1)])
        self.programs = math.prod(grid)
        body = ir.Block()
        self.inside(body, 0)
        for _ in range(self.between(1, 3)):
            value = self.load(self.dtype(), self.shape())
            self.keep(value, self.bounds[value])
        for _ in range(self.between(self.length // 2, self.length)):
            self.statement(depth=1)
        for value in self.pools[0][-self.between(1, 4) :]:
            self.store(value)
        aligned = [isinstance(a, np.ndarray) or a % 16 == 0 for a in self.arguments]
        divisible = [16 if possible and self.chance(0.5) else 1 for possible in aligned]
        first = {name: self.parameters.index(b.parameter) for b in self.outputs for name in b.names}
        aliases = tuple(first.get(p, i) for i, p in enumerate(self.parameters))
        divisible = [divisible[i] for i in aliases]
        function = ir.Function("random", self.parameters, body, divisible)
        ir.verify(function)
        outputs = [self.parameters.index(b.parameter) for b in self.outputs]
        exact = [b.error == 0 for b in self.outputs]
        return Program(
            function, grid, self.arguments, outputs, exact, [2 * b.error for b in self.outputs], aliases=aliases
        )

"""Control flow of a kernel: run-time `if`, `for` and `while` with the variables that pass through them.

As in Triton a variable keeps its type through a loop, and one that is assigned on one side of an `if` only, or first
inside a loop, has no value afterwards. An `if` that may return takes what follows it into its branches.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from nitinol.compiler.builder import Builder
from nitinol.compiler.expressions import Expressions
from nitinol.compiler.ir import Block, Value, walk
from nitinol.compiler.values import (
    as_run_time,
    describe_value,
    flatten,
    named,
    run_time,
    same_constant,
    structure,
    unflatten,
)
from nitinol.language import core
from nitinol.language.core import known_int, tensor
from nitinol.language.jit import JITFunction
from nitinol.language.semantic import cast, is_number, promote_integers, to_tensor, truth
from nitinol.language.types import DType, int1

Statement = ast.stmt | Callable[[], None]  # a callable: the next value of an unrolled loop's variable
RUNNING = object()  # `ControlFlow.result` while the function has not returned


class Loop(NamedTuple):
    """The names that a loop carries, their values before it, which of the values change, and the regions."""

    carried: list[str]
    init: list[tensor]
    kept: list[bool]
    blocks: list[Block]


class ControlFlow(Expressions):
    """Executes branches and loops; `run` (frontend.py) executes a list of statements."""

    def __init__(self, builder: Builder, function: JITFunction, local: dict[str, Any]) -> None:
        super().__init__(builder, function, local)
        self.result: Any = RUNNING
        self.loops = 0  # run-time loops around the current statement

    def run(self, statements: Sequence[Statement]) -> None:
        raise NotImplementedError

    def assign(self, target: ast.expr, value: Any) -> None:
        raise NotImplementedError

    # ----------------------------------------------------------------------------------------------- conditions

    def run_if(self, node: ast.If, pending: list[Statement]) -> None:
        condition = self.evaluate(node.test)
        self.builder.node = node.test
        if not isinstance(condition, tensor):
            if not isinstance(condition, (bool, int, type(None))):
                raise TypeError(f"an `if` takes a scalar or a number known at compile time, found {condition!r}")
            pending.extend(reversed(node.body if condition else node.orelse))
            return
        if condition.shape:
            raise ValueError(
                f"an `if` takes a scalar, found a tile of shape {condition.shape}; use tl.where or a reduction"
            )
        condition = truth(condition)
        if contains(node, ast.Return):
            if self.loops:
                raise self.builder.error("`return` inside a run-time loop: keep the result in a variable", node)
            rest = pending[::-1]
            pending.clear()
            self.branch_and_return(node, condition, rest)
        else:
            self.branch(node, condition)

    def branch_and_return(self, node: ast.If, condition: tensor, rest: list[Statement]) -> None:
        """A branch that may return: what follows the `if` continues inside the branches, which yield the result."""
        before, results, blocks = self.local, [], []
        for body in (node.body, node.orelse):
            self.local, self.result = dict(before), RUNNING
            with self.builder.inside(Block()) as block:
                self.run([*body, *rest])
            blocks.append(block)
            results.append(None if self.result is RUNNING else self.result)
        parts = [flatten(r) for r in results]
        if structure(results[0]) != structure(results[1]):
            found = " and ".join(describe_value(r) for r in results)
            raise self.builder.error(f"the function returns different types on different paths: {found}", node)
        for block, values in zip(blocks, parts):
            with self.builder.inside(block):
                self.builder.create("yield", [v.handle for v in values], ())
        self.builder.node = node
        op = self.builder.create("if", [condition.handle], [v.type for v in parts[0]], blocks)
        self.result = unflatten(results[0], iter(map(tensor, op.results)))

    def branch(self, node: ast.If, condition: tensor) -> None:
        """A branch whose variables meet again after it."""
        before, scopes, blocks = self.local, [], []
        for body in (node.body, node.orelse):
            self.local = dict(before)
            with self.builder.inside(Block()) as block:
                self.run(body)
            scopes.append(self.local)
            blocks.append(block)
        then, otherwise = scopes
        self.local = dict(before)
        line = self.builder.location_of(self.function, node).line
        names: list[str] = []
        for name in {**then, **otherwise}:
            if name not in then or name not in otherwise:
                side = "true" if name in then else "false"
                self.missing[name] = (
                    f"{name} has a value only if the condition at line {line} is {side}: assign it before"
                )
                continue
            a, b = then[name], otherwise[name]
            if a is b or same_constant(a, b):
                self.local[name] = a
                continue
            for scope, block in zip(scopes, blocks):  # numbers become run-time values, inside their branch
                with self.builder.inside(block):
                    scope[name] = as_run_time(scope[name])
            a, b = then[name], otherwise[name]
            if structure(a) != structure(b) or not run_time(a):
                self.local.pop(name, None)
                self.missing[name] = (
                    f"{name} is {describe_value(a)} if the condition at line {line} is true and {describe_value(b)} "
                    "if it is false: make both the same type"
                )
                continue
            names.append(name)
        for scope, block in zip(scopes, blocks):
            with self.builder.inside(block):
                self.builder.create("yield", [v.handle for n in names for v in flatten(scope[n])], ())
        self.builder.node = node.test
        types = [v.type for n in names for v in flatten(then[n])]
        op = self.builder.create("if", [condition.handle], types, blocks)
        results = iter(map(tensor, op.results))
        for name in names:
            self.local[name] = named(name, unflatten(then[name], results))

    # ---------------------------------------------------------------------------------------------------- loops

    def run_for(self, node: ast.For, pending: list[Statement]) -> None:
        if node.orelse:
            raise self.builder.error("kernels do not support `else` after a loop", node)
        iterable = self.evaluate(node.iter)
        self.builder.node = node.iter
        if isinstance(iterable, core.static_range):
            bounds = (iterable.start, iterable.end, iterable.step)
            iterable = tuple(range(*(known_int(v, "a bound of static_range") for v in bounds)))
        if isinstance(iterable, (tuple, list, range)):
            for item in reversed(iterable):
                pending += [*reversed(node.body), partial(self.assign, node.target, item)]
        elif isinstance(iterable, core.range) and isinstance(node.target, ast.Name):
            self.for_range(node, node.target.id, iterable)
        else:
            raise self.builder.error("a `for` runs over range, tl.range, tl.static_range or a tuple", node.iter)

    def for_range(self, node: ast.For, index: str, bounds: core.range) -> None:
        start, end, step = bounds.start, bounds.end, bounds.step
        backwards = is_number(step) and step < 0
        if is_number(step) and step == 0:
            raise ValueError("the step of a loop must not be zero")
        if backwards:
            start, end, step = end, start, -step
        lower, upper, stride = (to_tensor(v, "a loop bound") for v in (start, end, step))
        for value in (lower, upper, stride):
            if value.shape or not isinstance(value.dtype, DType) or not value.dtype.is_int or value.dtype == int1:
                raise TypeError(f"loop bounds and step must be integer scalars, found {value.type}")
        dtype = promote_integers(promote_integers(lower.dtype, upper.dtype), stride.dtype)  # type: ignore[arg-type]
        lower, upper, stride = (cast(v, dtype) for v in (lower, upper, stride))

        def body(carried: list[Value]) -> Block:
            block = Block([Value(dtype, None, index), *carried])
            counter = tensor(block.arguments[0])
            with self.builder.inside(block):
                self.local[index] = upper - (counter - lower) if backwards else counter
                self.run(node.body)
            return block

        before = self.local
        loop = self.loop(node, {index}, [body])
        self.finish_loop(node, "for", [lower, upper, stride], loop, before)
        self.local.pop(index, None)
        self.missing[index] = f"{index} is the variable of the loop at line {self.line(node)} and has no value after it"

    def run_While(self, node: ast.While) -> None:
        if node.orelse:
            raise self.builder.error("kernels do not support `else` after a loop", node)

        def test(arguments: list[Value]) -> Block:
            block = Block(arguments)
            with self.builder.inside(block):
                condition = to_tensor(self.evaluate(node.test), "the condition of `while`")
                self.builder.node = node.test
                if condition.shape:
                    raise ValueError(f"a `while` takes a scalar, found a tile of shape {condition.shape}")
                self.builder.create("condition", [truth(condition).handle, *arguments], ())
            return block

        def body(arguments: list[Value]) -> Block:
            block = Block(arguments)
            with self.builder.inside(block):
                self.run(node.body)
            return block

        before = self.local
        loop = self.loop(node, set(), [test, body])
        self.finish_loop(node, "while", [], loop, before)

    def loop(self, node: ast.For | ast.While, own: set[str], regions: list[Callable[[list[Value]], Block]]) -> Loop:
        """Builds a loop's regions, the last of which ends with `yield`.

        Carried is what the body assigns and the code before the loop has defined. A number known at compile time is
        carried only if the body really changes it, which shows at the end: then the body is built once more.
        """
        before = self.local
        assigned = [n for n in assigned_names(node) if n in before and n not in own]
        carried = [n for n in assigned if run_time(before[n])]
        while True:
            blocks: list[Block] = []
            arguments: list[list[Value]] = []
            self.loops += 1
            for region in regions:
                self.local = dict(before)
                values: list[Value] = []
                for name in carried:
                    fresh = [tensor(Value(v.type)) for v in flatten(before[name])]
                    self.local[name] = named(name, unflatten(before[name], iter(fresh)))
                    values += [v.handle for v in fresh]
                blocks.append(region(values))
                arguments.append(values)
            self.loops -= 1
            changed = [n for n in assigned if n not in carried and self.local.get(n) is not before[n]]
            if not changed:
                break
            self.builder.node = node
            for name in changed:
                before[name] = self.carriable(name, before[name], self.local.get(name))
            carried = [n for n in assigned if n in carried or n in changed]
        after = self.local
        with self.builder.inside(blocks[-1]):
            results: list[Value] = []
            for name in carried:
                start, end = before[name], as_run_time(after.get(name))
                if structure(start) != structure(end):
                    raise self.builder.error(
                        f"the loop variable {name} is {describe_value(start)} before the loop and "
                        f"{describe_value(end)} after its body: keep one type, with .to() or from the start",
                        last_assignment(node, name),
                    )
                results += [v.handle for v in flatten(end)]
            self.builder.create("yield", results, ())
        init = [v for n in carried for v in flatten(before[n])]
        return Loop(carried, init, self.prune(init, blocks, arguments), blocks)

    def carriable(self, name: str, start: Any, end: Any) -> Any:
        """A number from before a loop as a run-time value; other known values cannot change in a loop."""
        value = as_run_time(start)
        if not run_time(value):
            raise self.builder.error(
                f"{name} is {describe_value(start)} before the loop and {describe_value(end)} after its body: values "
                "known only at compile time cannot change in a run-time loop"
            )
        return named(name, value)

    def prune(self, init: list[tensor], blocks: list[Block], arguments: list[list[Value]]) -> list[bool]:
        """Drops carried values that the body leaves as they are, so that they stay visibly loop-invariant.

        Returns for each value whether it is still carried.
        """
        yielded = blocks[-1].terminator.operands
        kept = [value is not argument for value, argument in zip(yielded, arguments[-1])]
        if not all(kept):
            replace: dict[Value, Value] = {}
            for block, values in zip(blocks, arguments):
                replace.update({v: i.handle for v, i, keep in zip(values, init, kept) if not keep})
                first = len(block.arguments) - len(values)  # 1 in `for`: the induction variable
                block.arguments[first:] = [v for v, keep in zip(values, kept) if keep]
                end = block.terminator
                first = len(end.operands) - len(values)  # 1 in `condition`
                end.operands[first:] = [v for v, keep in zip(end.operands[first:], kept) if keep]
            for block in blocks:
                for op in walk(block):
                    op.operands = [replace.get(v, v) for v in op.operands]
        return kept

    def finish_loop(
        self, node: ast.For | ast.While, kind: str, bounds: list[tensor], loop: Loop, before: dict[str, Any]
    ) -> None:
        """Appends the loop and gives the variables their values after it."""
        values = [v.handle for v, keep in zip(loop.init, loop.kept) if keep]
        self.builder.node = node.iter if isinstance(node, ast.For) else node.test
        op = self.builder.create(kind, [v.handle for v in bounds] + values, [v.type for v in values], loop.blocks)
        line = self.line(node)
        for name in self.local:
            if name not in before:
                self.missing[name] = (
                    f"{name} is first assigned inside the loop at line {line}: assign it before the loop"
                )
        self.local = dict(before)
        results = iter(map(tensor, op.results))
        final = iter([next(results) if keep else v for v, keep in zip(loop.init, loop.kept)])
        for name in loop.carried:
            self.local[name] = named(name, unflatten(before[name], final))

    def line(self, node: ast.AST) -> int:
        return self.builder.location_of(self.function, node).line


# ------------------------------------------------------------------------------------------------ looking at syntax


def contains(node: ast.AST, kind: type[ast.AST]) -> bool:
    return any(isinstance(child, kind) for child in ast.walk(node))


def assigned_names(node: ast.AST) -> list[str]:
    """The names that a statement assigns, in order of first appearance."""
    found: dict[str, None] = {}
    for child in ast.walk(node):
        if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            found[child.id] = None
        elif (
            isinstance(child, ast.Subscript) and isinstance(child.ctx, ast.Store) and isinstance(child.value, ast.Name)
        ):
            found[child.value.id] = None
    return list(found)


def last_assignment(node: ast.AST, name: str) -> ast.AST:
    """The last statement in `node` that assigns the name."""
    found = node
    for child in ast.walk(node):
        if isinstance(child, (ast.Assign, ast.AugAssign, ast.AnnAssign)) and name in assigned_names(child):
            found = child
    return found

"""The front end: a kernel's Python becomes tile IR by abstract execution of its syntax tree.

Values known at compile time are plain Python objects, run-time values are `tensor`s. This file has the statements and
calls; expressions.py has the expressions.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from typing import Any

from nitinol.compiler.builder import Builder
from nitinol.compiler.errors import CompilationError
from nitinol.compiler.expressions import Expressions
from nitinol.compiler.ir import Block, Function, Value, verify, walk
from nitinol.language import core
from nitinol.language.core import known, tensor
from nitinol.language.debug import device_assert, static_assert
from nitinol.language.jit import JITFunction, Signature
from nitinol.language.semantic import cast, constant, is_number, promote_integers, to_tensor, truth
from nitinol.language.types import DType, int1, int32

RUNNING = object()  # `Frame.result` while the function has not returned


def build_ir(kernel: JITFunction, signature: Signature) -> Function:
    """The verified IR of a kernel for one signature; CompilationError at the user's line if it is wrong."""
    builder = Builder(kernel, inline)
    parameters: list[Value] = []
    divisible: list[int] = []
    local: dict[str, Any] = dict(signature.constants)
    for name, type, divisor in signature.parameters:
        parameters.append(Value(type, None, name))
        divisible.append(divisor)
        local[name] = tensor(parameters[-1])
    previous = core.set_builder(builder)
    try:
        frame = Frame(builder, kernel, local)
        if frame.run_body() is not None:
            raise builder.error(
                f"the kernel {kernel.__name__} returns a value: results of a kernel go through tl.store"
            )
    finally:
        core.set_builder(previous)
    location = builder.location_of(kernel, kernel.tree)
    function = Function(kernel.__name__, parameters, builder.block, divisible, location, kernel.source)
    verify(function)
    return function


def inline(builder: Builder, function: Any, arguments: Sequence[Any], keywords: dict[str, Any]) -> Any:
    """The value of a call: a @jit function's body is executed here, anything else is a tile operation."""
    function = getattr(function, "jit_function", function)
    if not isinstance(function, JITFunction):
        return function(*arguments, **keywords)
    if function is builder.function or any(f is function for f, _ in builder.stack):
        raise RecursionError(f"{function.__name__} calls itself: a kernel cannot be recursive, use a loop")
    local = {name.lstrip("*"): value for name, value in function.bind(arguments, keywords).items()}
    for parameter in function.parameters:
        value = local[parameter.name.lstrip("*")]
        if parameter.is_constexpr and isinstance(value, tensor):
            local[parameter.name] = known(value, f"the argument {parameter.name!r} of {function.__name__}")
    builder.stack.append((builder.function, builder.node))
    caller, builder.function = builder.function, function
    try:
        result = Frame(builder, function, local).run_body()
    except CompilationError:
        raise
    except Exception as error:
        raise builder.error(describe(error)) from error
    builder.function = caller
    builder.node = builder.stack.pop()[1]
    return result


def describe(error: Exception) -> str:
    """The sentence of an exception that a tile operation or Python raised."""
    return str(error) or type(error).__name__


class Frame(Expressions):
    """The execution of one function: its local variables and how far it got."""

    def __init__(self, builder: Builder, function: JITFunction, local: dict[str, Any]) -> None:
        super().__init__(builder, function, local)
        self.result: Any = RUNNING
        self.loops = 0  # run-time loops around the current statement

    def run_body(self) -> Any:
        """The returned value, None if there is none."""
        self.run(self.function.tree.body)
        return None if self.result is RUNNING else self.result

    def run(self, statements: Sequence[ast.stmt]) -> None:
        """Executes statements until one returns."""
        pending = list(reversed(statements))
        while pending and self.result is RUNNING:
            statement = pending.pop()
            self.builder.node = statement
            try:
                if isinstance(statement, ast.If):
                    self.run_if(statement, pending)
                else:
                    method = getattr(self, "run_" + type(statement).__name__, None)
                    if method is None:
                        raise self.unsupported(statement)
                    method(statement)
            except CompilationError:
                raise
            except Exception as error:
                raise self.builder.error(describe(error)) from error

    def unsupported(self, node: ast.AST) -> CompilationError:
        advice = {
            "Break": "; put the condition into a `while` loop",
            "Continue": "; put the rest of the body under an `if`",
            "FunctionDef": "; define @jit functions outside the kernel",
            "Lambda": "; define a @jit function outside the kernel",
        }.get(type(node).__name__, "")
        return self.builder.error(f"kernels do not support {describe_syntax(node)}{advice}", node)

    # ---------------------------------------------------------------------------------------- simple statements

    def run_Pass(self, node: ast.Pass) -> None:
        pass

    def run_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # a docstring
            self.evaluate(node.value)

    def run_Return(self, node: ast.Return) -> None:
        if self.loops:
            raise self.builder.error("`return` inside a run-time loop: keep the result in a variable", node)
        value = self.evaluate(node.value) if node.value is not None else None
        self.result = as_run_time(value)

    def run_Assert(self, node: ast.Assert) -> None:
        condition = self.evaluate(node.test)
        message = self.evaluate(node.msg) if node.msg is not None else ast.unparse(node.test)
        self.builder.node = node
        (device_assert if isinstance(condition, tensor) else static_assert)(condition, message)

    def run_Assign(self, node: ast.Assign) -> None:
        value = as_run_time(self.evaluate(node.value))
        for target in node.targets:
            self.assign(target, value)

    def run_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is None:
            return
        value = self.evaluate(node.value)
        note = node.annotation
        text = note.value if isinstance(note, ast.Constant) else ast.unparse(note)
        if "constexpr" in str(text):
            self.builder.node = node
            self.assign(node.target, known(value, f"the constexpr {ast.unparse(node.target)}"))
        else:
            self.assign(node.target, as_run_time(value))

    def run_AugAssign(self, node: ast.AugAssign) -> None:
        left = self.evaluate(node.target)
        right = self.evaluate(node.value)
        self.builder.node = node
        self.assign(node.target, as_run_time(self.binary(node.op, left, right)))

    def assign(self, target: ast.expr, value: Any) -> None:
        """Binds names; a tuple target takes a tuple apart, `name[i] = value` makes a new tuple."""
        if isinstance(target, ast.Name):
            self.local[target.id] = value
            if isinstance(value, tensor) and not value.handle.name:
                value.handle.name = target.id
        elif isinstance(target, (ast.Tuple, ast.List)):
            if not isinstance(value, tuple):
                raise self.builder.error(f"expected a tuple of {len(target.elts)} values, found {value!r}")
            if len(value) != len(target.elts):
                raise self.builder.error(f"expected {len(target.elts)} values, found {len(value)}")
            for element, part in zip(target.elts, value):
                self.assign(element, part)
        elif isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name):
            items = self.name(target.value)
            index = known(self.evaluate(target.slice), "the index of a tuple")
            if not isinstance(items, tuple):
                raise self.builder.error(
                    f"only elements of tuples and lists can be assigned, found {items!r}; use tl.where"
                )
            changed = list(items)
            changed[index] = value
            self.local[target.value.id] = tuple(changed)
        else:
            raise self.builder.error(f"cannot assign to {ast.unparse(target)!r} in a kernel", target)

    # ----------------------------------------------------------------------------------------------- conditions

    def run_if(self, node: ast.If, pending: list[ast.stmt]) -> None:
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

    def branch_and_return(self, node: ast.If, condition: tensor, rest: list[ast.stmt]) -> None:
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

    def run_For(self, node: ast.For) -> None:
        if node.orelse:
            raise self.builder.error("kernels do not support `else` after a loop", node)
        iterable = self.evaluate(node.iter)
        self.builder.node = node.iter
        if isinstance(iterable, core.static_range):
            start, end, step = (
                known(v, "a bound of static_range") for v in (iterable.start, iterable.end, iterable.step)
            )
            iterable = tuple(range(start, end, step))
        if isinstance(iterable, (tuple, list, range)):
            for item in iterable:
                self.assign(node.target, item)
                self.run(node.body)
            return
        if not isinstance(iterable, core.range) or not isinstance(node.target, ast.Name):
            raise self.builder.error("a `for` runs over range, tl.range, tl.static_range or a tuple", node.iter)
        self.for_range(node, node.target.id, iterable)

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
        carried, blocks = self.loop(node, {index}, [body])
        init = [v for n in carried for v in flatten(before[n])]
        self.builder.node = node.iter
        op = self.builder.create(
            "for", [v.handle for v in (lower, upper, stride, *init)], [v.type for v in init], blocks
        )
        self.after_loop(node, before, carried, op.results)
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
        carried, blocks = self.loop(node, set(), [test, body])
        init = [v for n in carried for v in flatten(before[n])]
        self.builder.node = node.test
        op = self.builder.create("while", [v.handle for v in init], [v.type for v in init], blocks)
        self.after_loop(node, before, carried, op.results)

    def loop(
        self, node: ast.For | ast.While, own: set[str], regions: list[Callable[[list[Value]], Block]]
    ) -> tuple[list[str], list[Block]]:
        """Builds a loop's regions; returns the names that it carries, and the blocks, the last ending with `yield`.

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
        return self.prune(before, carried, blocks, arguments), blocks

    def carriable(self, name: str, start: Any, end: Any) -> Any:
        """A number from before a loop as a run-time value; other known values cannot change in a loop."""
        value = as_run_time(start)
        if not run_time(value):
            raise self.builder.error(
                f"{name} is {describe_value(start)} before the loop and {describe_value(end)} after its body: values "
                "known only at compile time cannot change in a run-time loop"
            )
        return named(name, value)

    def prune(
        self, before: dict[str, Any], carried: list[str], blocks: list[Block], arguments: list[list[Value]]
    ) -> list[str]:
        """Drops carried variables that the body leaves as they are, so that they stay visibly loop-invariant."""
        kept: list[str] = []
        replace: dict[Value, Value] = {}
        keep_at: list[int] = []
        position = 0
        last = blocks[-1].terminator
        for name in carried:
            init = flatten(before[name])
            places = range(position, position + len(init))
            position += len(init)
            if all(last.operands[i] is arguments[-1][i] for i in places):
                for i, value in zip(places, init):
                    replace.update({block_arguments[i]: value.handle for block_arguments in arguments})
            else:
                kept.append(name)
                keep_at += places
        if replace:
            for block, block_arguments in zip(blocks, arguments):
                extra = len(block.arguments) - len(block_arguments)  # the induction variable
                block.arguments = block.arguments[:extra] + [block_arguments[i] for i in keep_at]
                head = 1 if block.terminator.kind == "condition" else 0
                operands = block.terminator.operands
                block.terminator.operands = operands[:head] + [operands[head + i] for i in keep_at]
                for op in walk(block):
                    op.operands = [replace.get(v, v) for v in op.operands]
        return kept

    def after_loop(
        self, node: ast.For | ast.While, before: dict[str, Any], carried: list[str], results: list[Value]
    ) -> None:
        line = self.line(node)
        for name in self.local:
            if name not in before:
                self.missing[name] = (
                    f"{name} is first assigned inside the loop at line {line}: assign it before the loop"
                )
        self.local = dict(before)
        values = iter(map(tensor, results))
        for name in carried:
            self.local[name] = named(name, unflatten(before[name], values))

    def line(self, node: ast.AST) -> int:
        return self.builder.location_of(self.function, node).line


# ------------------------------------------------------------------------------------- values, flat and structured


def as_run_time(value: Any) -> Any:
    """Numbers become run-time scalars, also inside tuples: what assignment and `return` do in Triton."""
    if isinstance(value, (tuple, list)):
        parts = [as_run_time(v) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return constant_like(value) if is_number(value) else value


def constant_like(value: Any) -> tensor:
    return to_tensor(value) if type(value) is not int or not -(2**31) <= value < 2**31 else constant(value, int32)


def run_time(value: Any) -> bool:
    """Whether a value consists of tensors alone."""
    return all(map(run_time, value)) and bool(value) if isinstance(value, tuple) else isinstance(value, tensor)


def flatten(value: Any) -> list[tensor]:
    """The tensors of a value, in order."""
    if isinstance(value, tuple):
        return [t for v in value for t in flatten(v)]
    return [value] if isinstance(value, tensor) else []


def unflatten(template: Any, tensors: Any) -> Any:
    """A value of the template's form with other tensors."""
    if isinstance(template, tuple):
        parts = [unflatten(v, tensors) for v in template]
        return type(template)(*parts) if hasattr(template, "_fields") else tuple(parts)
    return next(tensors) if isinstance(template, tensor) else template


def structure(value: Any) -> Any:
    """What two values must share to be exchangeable at run time: types of tensors, known values themselves."""
    if isinstance(value, tuple):
        return tuple(map(structure, value))
    return value.type if isinstance(value, tensor) else ("known", type(value), value)


def same_constant(a: Any, b: Any) -> bool:
    return not isinstance(a, (tensor, tuple)) and type(a) is type(b) and bool(a == b)


def describe_value(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(describe_value, value))})"
    return str(value.type) if isinstance(value, tensor) else repr(value)


def named(name: str, value: Any) -> Any:
    for part in flatten(value):
        if not part.handle.name:
            part.handle.name = name
    return value


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


def describe_syntax(node: ast.AST) -> str:
    return f"`{type(node).__name__.lower()}`"

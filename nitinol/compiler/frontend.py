"""The front end: a kernel's Python becomes tile IR by abstract execution of its syntax tree.

Values known at compile time are plain Python objects, run-time values are `tensor`s. This file has the statements and
calls; expressions.py has the expressions.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from nitinol.compiler.builder import Builder
from nitinol.compiler.control import RUNNING, ControlFlow, Statement
from nitinol.compiler.errors import CompilationError
from nitinol.compiler.ir import Function, Value, verify
from nitinol.compiler.values import as_run_time
from nitinol.language import core
from nitinol.language.core import known, tensor
from nitinol.language.debug import device_assert, static_assert
from nitinol.language.jit import JITFunction, Signature


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


class Frame(ControlFlow):
    """The execution of one function: its local variables and how far it got."""

    def run_body(self) -> Any:
        """The returned value, None if there is none."""
        self.run(self.function.tree.body)
        return None if self.result is RUNNING else self.result

    def run(self, statements: Sequence[Statement]) -> None:
        """Executes statements until one returns."""
        pending = list(reversed(statements))
        while pending and self.result is RUNNING:
            statement = pending.pop()
            if not isinstance(statement, ast.stmt):
                statement()
                continue
            self.builder.node = statement
            try:
                if isinstance(statement, ast.If):
                    self.run_if(statement, pending)
                elif isinstance(statement, ast.For):
                    self.run_for(statement, pending)
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


def describe_syntax(node: ast.AST) -> str:
    return f"`{type(node).__name__.lower()}`"

"""Expressions of a kernel: evaluated with plain Python objects where everything is known, else with tile operations."""

from __future__ import annotations

import ast
import builtins
import operator
from collections.abc import Callable
from types import ModuleType
from typing import Any

from nitinol.compiler.builder import Builder
from nitinol.compiler.errors import CompilationError
from nitinol.compiler.ir import Block
from nitinol.language import core, math
from nitinol.language.core import dtype_attribute, known, tensor, unwrap
from nitinol.language.debug import device_print
from nitinol.language.jit import JITFunction
from nitinol.language.semantic import invert, to_tensor, truth
from nitinol.language.types import DType, PointerType, TileType

OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.LShift: operator.lshift,
    ast.RShift: operator.rshift, ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.BitXor: operator.xor,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: lambda a, b: a is b, ast.IsNot: lambda a, b: a is not b,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
SYMBOLS = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%", ast.Pow: "**",
    ast.LShift: "<<", ast.RShift: ">>", ast.BitAnd: "&", ast.BitOr: "|", ast.BitXor: "^", ast.MatMult: "@",
}  # fmt: skip
UNARY: dict[type, Callable[[Any], Any]] = {
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Invert: operator.invert, ast.Not: operator.not_,
}  # fmt: skip


def _extremum(tile_function: Callable[[Any, Any], Any], python_function: Any) -> Callable[..., Any]:
    def function(*values: Any) -> Any:
        if not any(isinstance(v, tensor) for v in values):
            return python_function(*values)
        result = values[0]
        for value in values[1:]:
            result = tile_function(result, value)
        return result

    return function


def _isinstance(value: Any, kinds: Any) -> bool:
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if core.constexpr in kinds and not isinstance(value, tensor):
        return True
    return isinstance(value, tuple(k for k in kinds if k is not core.constexpr))


# Python's builtins as kernels see them.
BUILTINS: dict[Any, Any] = {
    "range": core.range, "print": device_print, "isinstance": _isinstance, "breakpoint": breakpoint,
    "min": _extremum(math.minimum, min), "max": _extremum(math.maximum, max),
    "abs": lambda x: math.abs(x) if isinstance(x, tensor) else abs(x),
    **{f.__name__: f for f in (len, int, float, bool, str, tuple, list, type, getattr, hasattr, zip, enumerate, sum,
                               reversed, sorted, all, any, round, repr, divmod, map)},
    **{e.__name__: e for e in (ValueError, TypeError)},
}  # fmt: skip
ABSENT = object()


class Expressions:
    """Evaluates expressions in one function's scope. `missing` says why a name has no value."""

    def __init__(self, builder: Builder, function: JITFunction, local: dict[str, Any]) -> None:
        self.builder = builder
        self.function = function
        self.local = local
        self.missing: dict[str, str] = {}

    def unsupported(self, node: ast.AST) -> CompilationError:
        raise NotImplementedError

    def evaluate(self, node: ast.expr) -> Any:
        """The value of an expression: a tensor, or a plain object if known now."""
        kind = type(node)
        if kind is ast.Name:
            return self.name(node)  # type: ignore[arg-type]
        if kind is ast.Constant:
            return node.value  # type: ignore[attr-defined]
        method = getattr(self, "eval_" + kind.__name__, None)
        if method is None:
            raise self.unsupported(node)
        return method(node)

    # ---------------------------------------------------------------------------------------------------- names

    def name(self, node: ast.Name) -> Any:
        name = node.id
        if name in self.local:
            return self.local[name]
        if name in self.missing:
            raise self.builder.error(self.missing[name], node)
        value = self.function.lookup(name, ABSENT)
        if value is ABSENT:
            if name in BUILTINS:
                return BUILTINS[name]
            raise self.builder.error(f"the name {name} is not defined", node)
        if isinstance(value, (core.constexpr, JITFunction, DType, PointerType, ModuleType)) or value is None:
            return unwrap(value)
        if callable(value):  # tile operations, @jit wrappers, plain functions and classes
            return value
        raise self.builder.error(
            f"the global {name} is a plain {type(value).__name__}: a kernel reads only globals made with "
            f"tl.constexpr, as in {name} = tl.constexpr({value!r})"[:300],
            node,
        )

    def eval_Attribute(self, node: ast.Attribute) -> Any:
        owner = self.evaluate(node.value)
        self.builder.node = node
        name = node.attr
        if isinstance(owner, (DType, PointerType, TileType)):
            return dtype_attribute(owner, name)
        if isinstance(owner, tensor):
            if name in ("handle",) or name.startswith("_") or not hasattr(tensor, name):
                raise AttributeError(f"a tensor has no attribute {name!r}")
            return getattr(owner, name)
        if name == "value" and (owner is None or isinstance(owner, (int, float, str, tuple))):
            return owner  # constexpr.value
        if isinstance(owner, (int, float)) and not hasattr(owner, name) and hasattr(tensor, name):
            return getattr(to_tensor(owner), name)  # an argument that specialisation made a constant: n.to(tl.int64)
        try:
            return unwrap(getattr(owner, name))
        except AttributeError:
            label = getattr(owner, "__name__", None) or repr(owner)
            raise AttributeError(f"{label} has no attribute {name!r}") from None

    # ------------------------------------------------------------------------------------------------ operators

    def eval_BinOp(self, node: ast.BinOp) -> Any:
        left, right = self.evaluate(node.left), self.evaluate(node.right)
        self.builder.node = node
        return self.binary(node.op, left, right)

    def binary(self, op: ast.operator, left: Any, right: Any) -> Any:
        function = OPERATORS.get(type(op))
        if function is None or (type(op) is ast.Pow and (isinstance(left, tensor) or isinstance(right, tensor))):
            advice = "use tl.exp2(y * tl.log2(x)), or a product" if type(op) is ast.Pow else "use tl.dot"
            raise TypeError(f"'{SYMBOLS[type(op)]}' is not defined for tensors; {advice}")
        return function(left, right)

    def eval_UnaryOp(self, node: ast.UnaryOp) -> Any:
        value = self.evaluate(node.operand)
        self.builder.node = node
        if isinstance(node.op, ast.Not) and isinstance(value, tensor):
            return invert(truth(value))
        return UNARY[type(node.op)](value)

    def eval_Compare(self, node: ast.Compare) -> Any:
        left = self.evaluate(node.left)
        result: Any = None
        for index, (op, comparator) in enumerate(zip(node.ops, node.comparators)):
            right = self.evaluate(comparator)
            self.builder.node = node
            if isinstance(op, (ast.In, ast.NotIn)) and isinstance(left, tensor):
                raise TypeError("'in' is not defined for tensors")
            outcome = OPERATORS[type(op)](left, right)
            result = outcome if index == 0 else self.both(result, outcome)
            if result is False:
                return False
            left = right
        return result

    @staticmethod
    def both(a: Any, b: Any) -> Any:
        """a and b, each a bool or an int1 tensor."""
        if isinstance(a, tensor) and isinstance(b, tensor):
            return a & b
        return (b if a else False) if not isinstance(a, tensor) else (a if b else False)

    def eval_BoolOp(self, node: ast.BoolOp) -> Any:
        """As in Triton: known operands decide or drop out, tensors are combined (both sides are computed)."""
        is_and = isinstance(node.op, ast.And)
        kept: list[tensor] = []
        value: Any = None
        for operand in node.values:
            value = self.evaluate(operand)
            if isinstance(value, tensor):
                kept.append(value)
            elif bool(value) != is_and:
                return value
        self.builder.node = node
        if not kept:
            return value
        result = kept[-1]
        for other in reversed(kept[:-1]):
            result = truth(other) & truth(result) if is_and else truth(other) | truth(result)
        return result

    def eval_IfExp(self, node: ast.IfExp) -> Any:
        condition = self.evaluate(node.test)
        if not isinstance(condition, tensor):
            return self.evaluate(node.body if condition else node.orelse)
        self.builder.node = node.test
        if condition.shape:
            raise ValueError(f"`a if c else b` takes a scalar condition, found shape {condition.shape}; use tl.where")
        condition = truth(condition)
        blocks, values = [], []
        for branch in (node.body, node.orelse):
            with self.builder.inside(Block()) as block:
                value = to_tensor(self.evaluate(branch), "a branch of `a if c else b`")
                self.builder.create("yield", [value.handle], ())
            blocks.append(block)
            values.append(value)
        self.builder.node = node
        if values[0].type != values[1].type:
            raise TypeError(f"the branches of `a if c else b` have types {values[0].type} and {values[1].type}")
        return tensor(self.builder.create("if", [condition.handle], [values[0].type], blocks).results[0])

    # ------------------------------------------------------------------------------------------------ containers

    def eval_Tuple(self, node: ast.Tuple) -> Any:
        return self.elements(node.elts)

    def eval_List(self, node: ast.List) -> Any:
        return self.elements(node.elts)

    def elements(self, nodes: list[ast.expr]) -> tuple[Any, ...]:
        values: list[Any] = []
        for node in nodes:
            if isinstance(node, ast.Starred):
                values += self.evaluate(node.value)
            else:
                values.append(self.evaluate(node))
        return tuple(values)

    def eval_ListComp(self, node: ast.ListComp) -> Any:
        if len(node.generators) != 1 or not isinstance(node.generators[0].target, ast.Name):
            raise self.unsupported(node)
        generator = node.generators[0]
        assert isinstance(generator.target, ast.Name)
        items = self.evaluate(generator.iter)
        if isinstance(items, core.range):
            items = range(*(known(v, "a bound of range") for v in (items.start, items.end, items.step)))
        outer, values = self.local, []
        for item in items:
            self.local = {**outer, generator.target.id: item}
            if all(self.evaluate(condition) for condition in generator.ifs):
                values.append(self.evaluate(node.elt))
        self.local = outer
        return tuple(values)

    def eval_Subscript(self, node: ast.Subscript) -> Any:
        owner, index = self.evaluate(node.value), self.evaluate(node.slice)
        self.builder.node = node
        if isinstance(owner, tensor):
            return owner[index]  # type: ignore[index]
        return unwrap(owner[known(index, "the index of a tuple")])

    def eval_Slice(self, node: ast.Slice) -> slice:
        return slice(*(None if part is None else self.evaluate(part) for part in (node.lower, node.upper, node.step)))

    def eval_JoinedStr(self, node: ast.JoinedStr) -> str:
        return "".join(str(self.evaluate(part)) for part in node.values)

    def eval_FormattedValue(self, node: ast.FormattedValue) -> str:
        value = self.evaluate(node.value)
        if node.conversion != -1:
            value = str(value) if node.conversion == ord("s") else repr(value)
        specification = self.evaluate(node.format_spec) if node.format_spec is not None else ""
        return format(repr(value) if isinstance(value, tensor) else value, specification)

    # ----------------------------------------------------------------------------------------------------- calls

    def breakpoint(self) -> None:
        """Where the interpreter stops, with the run-time variables that are visible here; compiled code goes on."""
        visible = {name: value for name, value in self.local.items() if isinstance(value, tensor)}
        core.emit_many("breakpoint", tuple(visible.values()), (), names=tuple(visible))

    def eval_Call(self, node: ast.Call) -> Any:
        function = self.evaluate(node.func)
        arguments = self.elements(node.args)
        keywords: dict[str, Any] = {}
        for keyword in node.keywords:
            value = self.evaluate(keyword.value)
            keywords.update(value if keyword.arg is None else {keyword.arg: value})
        self.builder.node = node
        function = getattr(function, "jit_function", function)
        if isinstance(function, JITFunction):
            return self.builder.call(function, arguments, keywords)
        if function is breakpoint:
            return self.breakpoint()
        if function is core.constexpr:
            return known(arguments[0], "the value of constexpr")
        if not callable(function):
            raise TypeError(f"{ast.unparse(node.func)} is not a function: found {function!r}")
        module = getattr(function, "__module__", None) or ""
        if not module.startswith("nitinol.") and module != builtins.__name__ and not isinstance(function, type):
            values = (*arguments, *keywords.values())
            if any(isinstance(v, tensor) for v in values):
                label = getattr(function, "__name__", ast.unparse(node.func))
                raise TypeError(f"{label} is a plain Python function: decorate it with @jit to call it with tensors")
        result = unwrap(function(*arguments, **keywords))
        return tuple(result) if isinstance(result, (list, map, zip, enumerate, reversed)) else result

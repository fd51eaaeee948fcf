"""An operation is one object: its name, and everything that depends on what it is.

    rule        shapes and dtypes of the results from operands and attributes, with the error sentences
    tile        an elementwise operation's function of the tile language (the rule follows from it)
    reduction   how a reduction combines elements
    lower       of any other operation: launches of tile kernels, made when the device is known
    reference   the same in NumPy at float64
    vjp         gradients of the operands from those of the results, or a sentence why there are none
    cost        arithmetic operations per element of an elementwise operation, roughly

Calling an operation records it. Nothing in this folder knows an operation by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nitinol.compiler.ir import Value
from nitinol.graph.array import Array
from nitinol.graph.builder import Builder
from nitinol.graph.conversion import as_operand
from nitinol.graph.nodes import Scalar, View, record, state
from nitinol.graph.views import Layout, Shape, broadcast_layout, broadcast_shapes, whole_layout
from nitinol.language import semantic
from nitinol.language.core import set_builder, tensor
from nitinol.language.types import DType, int1

MOST_FORMS = 1 << 14  # kinds of calls that are remembered; beyond that they are worked out anew


@dataclass(frozen=True)
class Reduction:
    """How to combine elements: in `accumulator(dtype)`, from `identity(dtype)` on. better: "gt" or "lt" where the
    result is the index of the first element that no other is greater or less than."""

    combine: Callable[[tensor, tensor], tensor]
    identity: Callable[[DType], Any]
    accumulator: Callable[[DType], DType]
    better: str = ""

    @property
    def with_index(self) -> bool:
        return bool(self.better)


@dataclass(frozen=True, eq=False)
class Operation:
    """See above. A rule gets the operands (Arrays, numbers, None) and attributes; it gives (shape, dtype), or a list of
    these for several results. lower(target, operands..., attributes...) gives Arrays. vjp(gradient, result,
    operands..., attributes...) gives a gradient, or None, for each operand; of several results, gradients and results
    come as tuples.

    updates: operands that are changed in place. free: how many leading operands of an elementwise operation take no
    part in promotion. symbol: its operator, for promotion and error sentences.
    """

    name: str
    rule: Callable[..., Any] | None = None
    tile: Callable[..., Any] | None = None
    reduction: Reduction | None = None
    lower: Callable[..., Any] | None = None
    reference: Callable[..., Any] | None = None
    vjp: Callable[..., Any] | str = "nobody has written one"
    cost: int = 1
    updates: tuple[int, ...] = ()
    free: int = 0
    symbol: str = "+"

    def __call__(self, *operands: Any, **attributes: Any) -> Any:
        """Records a call: an Array, or a tuple of them for several results (None for none)."""
        parts: list[Any] = [self]
        values: list[Any] = []
        for operand in operands:
            kind = type(operand)
            if kind is Array:
                parts.append(operand.layout.number)
                values.append(operand.value)
            elif (kind is float and (-1e38 < operand < -1e-37 or 1e-37 < operand < 1e38 or operand == 0)) or (
                kind is int and -(2**31) <= operand < 2**31
            ):
                parts.append(kind)
                values.append(operand)
            elif kind is int or kind is float or kind is bool:
                parts.append((kind, semantic.number_type(operand)))
                values.append(operand)
            elif operand is None:
                parts.append(None)
            else:
                return self(*[self._checked(as_operand, o) for o in operands], **attributes)
        if attributes:
            parts.append(frozen(attributes))
        key = tuple(parts)
        form = _forms.get(key)
        if form is None:
            form = remember(key, self._form(operands, attributes))
        if form.limits:
            for position, low, high in form.limits:
                if not low <= values[position] <= high:
                    dtype = form.layouts[position]
                    raise ValueError(
                        f"{self.name}: the number {values[position]} is out of range for {dtype} ({low} to {high})"
                    )
        if self.lower is not None and state.target is not None:
            return self.lower(state.target, *operands, **attributes)
        fresh = record(form, tuple(values))
        if len(fresh) == 1:
            return Array(fresh[0], form.outputs[0])
        return tuple([Array(value, layout) for value, layout in zip(fresh, form.outputs)]) or None

    def on(self, shape: Shape, dtype: DType, inputs: Sequence[View | Scalar], /, **attributes: Any) -> Array:
        """Records a call of an elementwise operation whose operands have its shape already, such as indices."""
        layouts = [i.layout if isinstance(i, View) else i.dtype for i in inputs]
        key = (self, shape, dtype, *layouts, frozen(attributes))
        form = _forms.get(key)
        if form is None:
            form = remember(key, Form(self, attributes, layouts, [whole_layout(dtype, shape)]))
        (value,) = record(form, tuple([i.value for i in inputs]))
        return Array(value, form.outputs[0])

    def _form(self, operands: Sequence[Any], attributes: Mapping[str, Any]) -> Form:
        if self.tile is not None:
            return self._elementwise_form(operands, attributes)
        assert self.rule is not None
        results = self.rule(*operands, **attributes)
        if isinstance(results, tuple):
            results = [results]
        given = tuple([o is not None for o in operands])
        layouts = [o.layout if isinstance(o, Array) else semantic.number_type(o) for o in operands if o is not None]
        updates = [sum(given[:position]) for position in self.updates if given[position]]
        outputs = [whole_layout(dtype, tuple(shape)) for shape, dtype in results]
        return Form(self, attributes, layouts, outputs, updates, () if all(given) else given)

    def _elementwise_form(self, operands: Sequence[Any], attributes: Mapping[str, Any]) -> Form:
        arrays = [o if isinstance(o, Array) else None for o in operands]
        for a in arrays:
            if a is not None and a.is_quantized:
                raise TypeError(
                    f"{self.name}: an array of shape {a.shape} is stored as {a.dtype}, whose blocks only products and "
                    "embeddings decode; use nitinol.dequantize(x) first"
                )
        dtypes = [a.dtype for a in arrays[self.free :] if a is not None]
        if not dtypes:
            numbers = [semantic.number_type(value) for value in operands[self.free :]]
            dtypes = [max(numbers, key=lambda t: (semantic.KIND[t.kind], t.bits))]
        common = dtypes[0]
        for dtype in dtypes[1:]:
            common = self._checked(semantic.promote, common, dtype, self.symbol, found=dtypes)
        shapes = [a.shape for a in arrays if a is not None]
        shape = broadcast_shapes(self.name, *shapes) if shapes else ()
        layouts: list[Layout | DType] = []
        limits = []
        for position, (a, value) in enumerate(zip(arrays, operands)):
            if a is not None:
                layouts.append(broadcast_layout(a.layout, shape))
                continue
            dtype = int1
            if position >= self.free:
                dtype = semantic.promote(semantic.number_type(value), common, self.symbol, True, False)
                if dtype.kind in ("int", "uint"):
                    limits.append((position, *semantic.integer_limits(dtype)))
            layouts.append(dtype)
        types = [l.dtype if isinstance(l, Layout) else l for l in layouts]
        dtype = self._checked(infer, self, types, attributes, found=types)
        return Form(self, attributes, layouts, [whole_layout(dtype, shape)], limits=limits)

    def _checked(self, function: Callable[..., Any], *arguments: Any, found: Sequence[DType] = ()) -> Any:
        """function(*arguments), whose TypeError names the operation and the types that it found."""
        try:
            return function(*arguments)
        except TypeError as error:
            of = f" of {' and '.join(map(str, found))}" if found else ""
            raise TypeError(f"{self.name}{of}: {error}") from None

    def __repr__(self) -> str:
        return f"Operation({self.name})"


class Form:
    """What all calls of one kind share: operation, attributes, layouts of operands (of a number its dtype) and results.

    updates: which operands are changed in place. given: where the program left operands out, which of them are there.
    limits: what integers may be, as (operand, lowest, highest).
    """

    __slots__ = ("attributes", "given", "layouts", "limits", "operation", "outputs", "reads", "updates")

    def __init__(
        self, operation: Any, attributes: Mapping[str, Any], layouts: Sequence[Any], outputs: Sequence[Layout],
        updates: Sequence[int] = (), given: tuple[bool, ...] = (), limits: Sequence[tuple[int, int, int]] = (),
    ) -> None:  # fmt: skip
        self.operation = operation
        self.attributes = attributes
        self.layouts = tuple(layouts)
        self.outputs = tuple(outputs)
        self.updates = tuple(updates)
        self.reads = tuple([i for i in range(len(self.layouts)) if i not in self.updates])
        self.given = given
        self.limits = tuple(limits)

    def spread(self, operands: Sequence[Any]) -> list[Any]:
        """Operands with None where the program left one out."""
        if not self.given:
            return list(operands)
        there = iter(operands)
        return [next(there) if present else None for present in self.given]


_forms: dict[Any, Form] = {}


def remember(key: Any, form: Form) -> Form:
    """Keeps a form for the next call of its kind."""
    if len(_forms) >= MOST_FORMS:
        _forms.clear()
    _forms[key] = form
    return form


def known_form(key: Any) -> Form | None:
    return _forms.get(key)


def frozen(attributes: Mapping[str, Any]) -> tuple[Any, ...]:
    """Attributes as a key: 1, 1.0 and True differ, and so do 0.0 and -0.0."""
    return tuple([
        (name, type(value), repr(value) if isinstance(value, float) else value) for name, value in attributes.items()
    ])  # fmt: skip


def infer(operation: Operation, dtypes: Sequence[DType], attributes: Mapping[str, Any]) -> DType:
    """The dtype that an elementwise operation gives, by the typing rules of the tile language; TypeError where they
    refuse."""
    assert operation.tile is not None
    previous = set_builder(Builder())
    try:
        return operation.tile(*(tensor(Value(t)) for t in dtypes), **attributes).dtype
    finally:
        set_builder(previous)


@dataclass(frozen=True)
class Slot:
    """Stands for an array among the arguments of a Launch: one of its operands, or of its results."""

    kind: str  # "operands" or "results"
    index: int


@dataclass(frozen=True)
class Launch:
    """The operation of a call that is one launch of a tile kernel. arguments, by parameter: a Slot for an array, else
    the value. warps and stages: for GPUs, 0 where the compiler chooses. operations, nbytes: what it should count for.
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: tuple[tuple[str, Any], ...]
    operations: int | None = None
    nbytes: int | None = None
    warps: int = 0
    stages: int = 0

    tile = reduction = lower = None
    vjp = "it is a launch of a kernel; give the function around it one with nitinol.custom_gradient"

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def argument(self, name: str) -> Any:
        """A constant argument."""
        return dict(self.arguments)[name]

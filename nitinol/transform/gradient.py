"""Gradients, taken on the graph: `vjp`, `grad`, `value_and_grad`, and functions with gradients of their own.

A function is called once and leaves its calls in a recorder. Backwards from the results, each call's operation says
what its operands' gradients are in terms of other operations (reverse mode: Linnainmaa, 1970; Griewank and Walther,
"Evaluating Derivatives", 2008). Operands are views of values, and all views have one adjoint: what a view repeats is
summed, and the rest is put where the view took it from. As everything that is recorded can be differentiated again,
second derivatives need nothing more. What a result does not need is never computed: arrays are lazy.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from nitinol.graph.array import Array, whole_array
from nitinol.graph.nodes import Call, Override, Value, View, alias_of, recording, whole
from nitinol.graph.views import Layout, layout_of, row_major
from nitinol.ops.creation import as_array, ones, zeros
from nitinol.ops.indexing import SCATTER_VIEW
from nitinol.transform.trees import flatten, rebuild


class GradientError(TypeError):
    """Something has no gradient; the message says what, where, and what to do."""


# ---------------------------------------------------------------------------------------------------- the transforms


def vjp(function: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[[Any], tuple[Any, ...]]]:
    """function(*primals), and a function from a gradient of the result (of its structure) to those of the primals.

    primals: Arrays, or tuples, lists and dicts of Arrays. The vector-Jacobian product.
    """
    leaves, structure = flatten(primals)
    given = [as_array(leaf) for leaf in leaves]
    named = [_named(leaf) for leaf in given]
    with recording() as calls:
        result = function(*rebuild(structure, named))
    results, shape_of_result = flatten(result)
    for leaf in results:
        if not isinstance(leaf, Array):
            raise GradientError(f"vjp: the function gives {leaf!r:.40}, expected arrays")
    kept = [whole_array(value) for call in calls for value in call.outputs]  # a look at elements must not lose them

    def pull(gradient: Any) -> tuple[Any, ...]:
        gradients, structure_given = flatten(gradient)
        if structure_given != shape_of_result:
            raise ValueError("vjp: the gradient has another structure than the function's result")
        return rebuild(structure, backward(results, [as_array(g) for g in gradients], named, calls))

    pull.kept = kept  # type: ignore[attr-defined]
    return result, pull


def value_and_grad(
    function: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False
) -> Callable[..., Any]:
    """A function that gives (value, gradient) of a function whose result is one number.

    argnums: which positional arguments (Arrays, or tuples, lists and dicts of them) to differentiate by; the gradient
    has their structure, and is a tuple if argnums is one. has_aux: the function gives (number, anything else), and the
    value is that pair.
    """
    places = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    @functools.wraps(function)
    def both(*arguments: Any, **keywords: Any) -> Any:
        aux: list[Any] = []

        def loss(*chosen: Any) -> Any:
            full = list(arguments)
            for place, value in zip(places, chosen):
                full[place] = value
            found = function(*full, **keywords)
            if has_aux:
                found, extra = found
                aux.append(extra)
            if not isinstance(found, Array) or found.size != 1 or not found.dtype.is_float:
                what = f"an array of shape {found.shape} and type {found.dtype}" if isinstance(found, Array) else found
                raise GradientError(f"grad: the function gives {what!r:.60}, expected one number; sum it, or use vjp")
            return found

        for place in places:
            if not -len(arguments) <= place < len(arguments):
                raise ValueError(f"grad: argnums is {argnums}, but the call has {len(arguments)} positional arguments")
        value, pull = vjp(loss, *(arguments[place] for place in places))
        gradients = pull(ones(value.shape, value.dtype))
        return ((value, aux[0]) if has_aux else value), gradients[0] if isinstance(argnums, int) else gradients

    return both


def grad(function: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False) -> Callable[..., Any]:
    """The gradient of a function whose result is one number: see `value_and_grad`; with has_aux, (gradient, aux)."""
    both = value_and_grad(function, argnums, has_aux)

    @functools.wraps(function)
    def gradient(*arguments: Any, **keywords: Any) -> Any:
        value, found = both(*arguments, **keywords)
        return (found, value[1]) if has_aux else found

    return gradient


def jvp(function: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    """function(*primals), and its derivative in the direction of the tangents (the Jacobian-vector product).

    The product with the transposed Jacobian is linear in the gradient that it is given, so that its own transpose is
    the Jacobian: every operation whose gradient consists of operations with gradients has this.
    """
    result, pull = vjp(function, *primals)
    results, structure = flatten(result)
    directions, _ = flatten(tuple(tangents))
    dummies = [zeros(leaf.shape, leaf.dtype) for leaf in results]  # linear: their values do not matter
    _, push = vjp(lambda *gradients: flatten(pull(rebuild(structure, list(gradients))))[0], *dummies)
    found = push([as_array(t).astype(p.dtype) for t, p in zip(directions, map(as_array, flatten(tuple(primals))[0]))])
    return result, rebuild(structure, list(found))


def stop_gradient(x: Any) -> Array:
    """The same elements, for which no gradient flows: no copy."""
    x = as_array(x)
    return Array(alias_of(x.value, Override([], lambda gradients: [])), x.layout)


def custom_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function with a gradient of its own: function(*arrays) gives (result, backward), and backward(gradient of the
    result) gives the gradients of the arrays (one, or a tuple with None where there is none)."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        given = [as_array(a) for a in arguments]
        result, backward_of = function(*given)

        def pull(gradients: list[Array]) -> list[Array | None]:
            found = backward_of(rebuild(structure, gradients))
            return list(found) if isinstance(found, (tuple, list)) else [found]

        results, structure = flatten(result)
        return rebuild(structure, _overridden(given, [as_array(r) for r in results], pull))

    return call


def checkpoint(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, whose inner results are computed once more for its gradient instead of being kept (Chen et
    al., "Training deep nets with sublinear memory cost", 2016)."""

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        leaves, structure = flatten(arguments)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Array)]
        given = [leaves[i] for i in places]
        results, result_structure = flatten(function(*arguments, **keywords))

        def again(*arrays: Array) -> list[Any]:
            full = list(leaves)
            for i, array in zip(places, arrays):
                full[i] = array
            return flatten(function(*rebuild(structure, full), **keywords))[0]

        def pull(gradients: list[Array]) -> Sequence[Array | None]:
            return vjp(again, *given)[1](gradients)

        return rebuild(result_structure, _overridden(given, results, pull))

    return call


def _named(x: Array) -> Array:
    """The same memory under a name of its own, so that an array that the function also finds elsewhere is a constant
    there."""
    if not x.dtype.is_float:
        raise GradientError(
            f"a gradient by an array of shape {x.shape} and type {x.dtype}: only floats have small changes; leave it "
            "out of argnums, or convert it"
        )
    return Array(alias_of(x.value, Override([whole(x.value)], list)), x.layout)


def _overridden(
    given: list[Array], results: list[Array], backward_of: Callable[[list[Array]], Sequence[Array | None]]
) -> list[Array]:
    """Names for the results, whose gradients the function turns into those of what was given."""
    plain = [r if r.layout == whole(r.value).layout else r.copy() for r in results]
    override = Override([a.view for a in given], backward_of)
    return [whole_array(alias_of(r.value, override)) for r in plain]


# ------------------------------------------------------------------------------------------------------- backwards


def backward(
    results: Sequence[Array], gradients: Sequence[Array], wanted: Sequence[Array], calls: Sequence[Call]
) -> list[Array]:
    """The gradients of the arrays `wanted` from those of the results, which the calls have computed."""
    makers: dict[Value, Call] = {value: call for call in calls for value in call.outputs}
    # Of an argument that is a part of a larger piece of memory, such as one of all parameters, only that part counts.
    ends = {a.value: a.layout for a in wanted if a.layout.contiguous}
    ends |= {a.value: whole(a.value).layout for a in wanted if not a.layout.contiguous}
    active = _depending(ends, calls, makers)
    sums: dict[Value, Array] = {}  # gradients of whole values, or of the arguments' parts, so far
    due: list[tuple[int, Any]] = []  # a heap by descending number, so that all users of a value come first
    found: set[Call | Override] = set()

    def add(view: View, gradient: Array | None) -> None:
        """Adds the gradient of a view to that of its value."""
        value = view.value
        if gradient is None or not view.dtype.is_float or not _is_active(value, active, makers):
            return
        total = _adjoint(view, gradient, ends.get(value) or whole(value).layout)
        sums[value] = total if value not in sums else sums[value] + total
        producer = value.gradient or makers.get(value)
        if value not in ends and producer is not None and producer not in found:
            found.add(producer)
            heapq.heappush(due, (-producer.number, producer))

    for result, seed in zip(results, gradients):
        if seed.shape != result.shape:
            raise ValueError(f"vjp: a gradient has shape {seed.shape}, but its result {result.shape}")
        add(result.view, seed)
    while due:
        _, producer = heapq.heappop(due)
        values = producer.results if isinstance(producer, Override) else producer.outputs
        given = [sums.pop(v) if v in sums else zeros(v.shape, v.dtype) for v in values]
        if isinstance(producer, Override):
            for view, gradient in zip(producer.inputs, producer.backward(given)):
                add(view, gradient)
        else:
            for operand, gradient in zip(producer.form.spread(producer.traced_inputs), _pull(producer, given)):
                if isinstance(operand, View):
                    add(operand, gradient)
    return [_of_argument(sums.get(a.value), a) for a in wanted]


def _pull(call: Call, gradients: list[Array]) -> Sequence[Array | None]:
    """What the call's operation makes of the gradients of its results."""
    form, operation = call.form, call.form.operation
    if isinstance(operation.vjp, str):
        place = call.place
        raise GradientError(f"{operation.name} ({place.file}:{place.line}) has no gradient: {operation.vjp}")
    inputs = [Array(*v) if isinstance(v, View) else v.value for v in call.traced_inputs]
    results = tuple(whole_array(v) for v in call.outputs)
    several = len(results) > 1
    return operation.vjp(
        tuple(gradients) if several else gradients[0], results if several else results[0], *form.spread(inputs),
        **form.attributes,
    )  # fmt: skip


def _depending(ends: Iterable[Value], calls: Sequence[Call], makers: dict[Value, Call]) -> dict[Value, bool]:
    """Which values depend on those in `ends`. GradientError where such a value is updated in place."""
    active = dict.fromkeys(ends, True)
    for call in calls:
        views = [v for v in call.traced_inputs if isinstance(v, View)]
        depends = any(_is_active(v.value, active, makers) for v in views)
        active.update(dict.fromkeys(call.outputs, depends))
        if call.form.updates and (depends or any(active.get(v.value) for v in call.updates)):
            place = call.place
            raise GradientError(
                f"{call.name} ({place.file}:{place.line}) updates an array in place, through which no gradient flows; "
                "make a new array instead (where, concatenate), or keep it from the gradient with stop_gradient"
            )
    return active


def _is_active(value: Value, active: dict[Value, bool], makers: dict[Value, Call]) -> bool:
    known = active.get(value)
    if known is None:
        inputs = value.gradient.inputs if value.gradient is not None else ()
        known = active[value] = any(_is_active(view.value, active, makers) for view in inputs)
    return known


def _adjoint(view: View, gradient: Array, part: Layout) -> Array:
    """The gradient of a contiguous part of a view's value: what the view repeats is summed, the rest is put in its
    place."""
    value, layout = view
    if layout.dtype != value.dtype:
        raise GradientError(f"a bitcast from {value.dtype} to {layout.dtype} has no gradient; convert with astype")
    if gradient.shape != layout.shape:
        raise AssertionError(f"a gradient of shape {gradient.shape} for an operand of shape {layout.shape}")
    gradient = gradient.astype(value.dtype)
    repeated = tuple([a for a, (n, s) in enumerate(zip(layout.shape, layout.strides)) if s == 0 and n > 1])
    if repeated:
        gradient = gradient.sum(repeated)
        kept = [a for a in range(len(layout.shape)) if a not in repeated]
        layout = layout_of(
            layout.dtype, tuple([layout.shape[a] for a in kept]), tuple([layout.strides[a] for a in kept]),
            layout.offset,
        )  # fmt: skip
    layout = layout_of(layout.dtype, layout.shape, layout.strides, layout.offset - part.offset)
    if layout.size == part.size and layout.offset == 0:  # all elements, perhaps in another order of axes
        order = sorted(range(len(layout.shape)), key=lambda a: (-layout.strides[a], layout.shape[a]))
        shape = tuple([layout.shape[a] for a in order])
        strides = [layout.strides[a] for a in order]
        if all(n == 1 or s == t for n, s, t in zip(shape, strides, row_major(shape))):
            return gradient.permute(order).reshape(part.shape)
    return SCATTER_VIEW(gradient, shape=part.shape, layout=layout)


def _of_argument(total: Array | None, argument: Array) -> Array:
    """An argument's part of the gradient of its value."""
    layout = argument.layout
    if total is None:
        return zeros(layout.shape, layout.dtype)
    if layout.contiguous:
        return total
    return total.contiguous().looking(layout.shape, layout.strides, layout.offset)

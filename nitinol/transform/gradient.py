"""Gradients, taken on the graph: `vjp`, `grad`, `value_and_grad`, and functions with gradients of their own.

A function is called once and leaves its calls in a recorder. Backwards from the results, each call's operation says
what its operands' gradients are in terms of other operations (reverse mode: Linnainmaa, 1970; Griewank and Walther,
"Evaluating Derivatives", 2008). Operands are views of values, and all views have one adjoint: what a view repeats is
summed, and the rest is put where the view took it from. As everything that is recorded can be differentiated again,
second derivatives need nothing more. What a result does not need is never computed: arrays are lazy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from nitinol.graph.array import Array, whole_array
from nitinol.graph.dtypes import BlockType
from nitinol.graph.nodes import Call, Override, Value, View, alias_of, numbers, recording, root, source_line, whole
from nitinol.graph.views import repeats
from nitinol.ops.creation import as_array, ones, zeros
from nitinol.transform.backward import GradientError, backward
from nitinol.transform.trees import flatten, rebuild

# ---------------------------------------------------------------------------------------------------- the transforms


def vjp(function: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[[Any], tuple[Any, ...]]]:
    """function(*primals), and a function from a gradient of the result (of its structure) to those of the primals.

    primals: Arrays, or tuples, lists and dicts of Arrays. The vector-Jacobian product.
    """
    leaves, structure = flatten(primals)
    named = [_named(as_array(leaf)) for leaf in leaves]
    run = _Run(lambda: function(*rebuild(structure, named)))
    for leaf in run.results or [None]:
        if not isinstance(leaf, Array):
            raise GradientError(f"vjp ({_here()}): the function gives {leaf!r:.40}, expected arrays; return them")

    def pull(gradient: Any) -> tuple[Any, ...]:
        gradients, structure_given = flatten(gradient)
        if structure_given != run.structure:
            raise ValueError(f"vjp ({_here()}): the gradient has another structure than the function's result")
        return rebuild(structure, run.backward([as_array(g) for g in gradients], named))

    return run.result, pull


class _Keeper(list[Call]):
    """Calls whose results are held as soon as they are recorded: gradients may need them, and what nobody holds is gone
    once the function has looked at elements that were made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Array] = []

    def append(self, call: Call) -> None:
        super().append(call)
        self.kept.extend(map(whole_array, call.outputs))


class _Run:
    """One call of a function, with what it has recorded."""

    def __init__(self, function: Callable[[], Any]) -> None:
        with recording(_Keeper()) as self.calls:
            self.result = function()
        self.results, self.structure = flatten(self.result)

    def backward(self, gradients: Sequence[Array], wanted: Sequence[Array]) -> list[Array]:
        return backward(self.results, gradients, wanted, self.calls)


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
                if not isinstance(found, tuple) or len(found) != 2:
                    raise GradientError(
                        f"grad ({_here()}): the function gives {_named_kind(found)}, expected a pair (number, anything "
                        "else); return one, or leave has_aux out"
                    )
                found, extra = found
                aux.append(extra)
            if not isinstance(found, Array) or found.size != 1 or not found.dtype.is_float:
                raise GradientError(
                    f"grad ({_here()}): the function gives {_named_kind(found)}, expected an array of one float; sum "
                    "it, or use vjp"
                )
            return found

        if any(not -len(arguments) <= place < len(arguments) for place in places):
            raise ValueError(
                f"grad ({_here()}): argnums is {argnums}, but the call has {len(arguments)} positional arguments"
            )
        if len({place % len(arguments) for place in places}) < len(places):
            raise ValueError(f"grad ({_here()}): argnums is {argnums}, which names an argument twice")
        value, pull = vjp(loss, *(arguments[place] for place in places))
        gradients = pull(ones(value.shape, value.dtype))
        return ((value, aux[0]) if has_aux else value), gradients[0] if isinstance(argnums, int) else gradients

    return both


def _named_kind(found: Any) -> str:
    if isinstance(found, Array):
        return f"an array of shape {found.shape} and type {found.dtype}"
    return f"{found!r:.60}"


def _here() -> str:
    """The line of the program that is running."""
    place = source_line()
    return f"{place.file}:{place.line}"


def grad(function: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False) -> Callable[..., Any]:
    """The gradient of a function whose result is one number: see `value_and_grad`; with has_aux, (gradient, aux)."""
    both = value_and_grad(function, argnums, has_aux)

    @functools.wraps(function)
    def gradient(*arguments: Any, **keywords: Any) -> Any:
        value, found = both(*arguments, **keywords)
        return (found, value[1]) if has_aux else found

    return gradient


def jvp(function: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    """function(*primals), and its derivative in the direction of the tangents (the Jacobian-vector product), of the
    result's structure; that of integers is 0.

    The product with the transposed Jacobian is linear in the gradient that it is given, so that its own transpose is
    the Jacobian: every operation whose gradient consists of operations with gradients has this.
    """
    leaves, structure = flatten(tuple(primals))
    directions, structure_given = flatten(tuple(tangents))
    directions = [as_array(t) for t in directions]
    shapes, given = [as_array(leaf).shape for leaf in leaves], [t.shape for t in directions]
    if structure != structure_given or shapes != given:
        raise ValueError(
            f"jvp ({_here()}): the primals have shapes {shapes} and the tangents {given}, expected the same shapes and "
            "structure"
        )
    result, pull = vjp(function, *primals)
    results, structure = flatten(result)
    # Linear: the values that it is given do not matter.
    zero = [zeros(leaf.shape, leaf.dtype) for leaf in results]
    floats = [i for i, leaf in enumerate(results) if leaf.dtype.is_float]

    def pull_floats(*gradients: Array) -> list[Array]:
        full = list(zero)
        for i, gradient in zip(floats, gradients):
            full[i] = gradient
        return flatten(pull(rebuild(structure, full)))[0]

    slopes, push = vjp(pull_floats, *[zero[i] for i in floats])
    for i, found in zip(floats, push([t.astype(slope.dtype) for t, slope in zip(directions, slopes)])):
        zero[i] = found
    return result, rebuild(structure, zero)


def stop_gradient(x: Any) -> Array:
    """The same elements, for which no gradient flows: no copy."""
    x = as_array(x)
    return Array(alias_of(x.value, Override([], lambda gradients: [], "stop_gradient")), x.layout)


def custom_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function with a gradient of its own: function(*arrays) gives (result, backward), and backward(gradient of the
    result) gives the gradients of the arrays (one, or a tuple with None where there is none)."""
    name = getattr(function, "__name__", "custom_gradient")

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        given = [as_array(a) for a in arguments]
        result, backward_of = function(*given)

        def pull(gradients: list[Array]) -> list[Array | None]:
            found = backward_of(rebuild(structure, gradients))
            found = list(found) if isinstance(found, (tuple, list)) else [found]
            if len(found) != len(given):
                raise GradientError(
                    f"{name} ({place.file}:{place.line}) takes {len(given)} arrays, but its backward gives "
                    f"{len(found)} gradients; give one for each, None where there is none"
                )
            return [None if g is None else as_array(g) for g in found]

        results, structure = flatten(result)
        override = Override([a.view for a in given], pull, name)
        place = override.place
        return rebuild(structure, _overridden(override, [as_array(r) for r in results]))

    return call


def checkpoint(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, whose inner results are computed once more for its gradient instead of being kept (Chen et
    al., "Training deep nets with sublinear memory cost", 2016). Arrays that it finds elsewhere have gradients too."""
    name = f"checkpoint of {getattr(function, '__name__', 'a function')}"

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        start = next(numbers)
        with recording() as calls:
            results, structure = flatten(function(*arguments, **keywords))
        if not all(isinstance(r, Array) for r in results):
            raise GradientError(f"{name} ({_here()}): the function gives {results!r:.60}, expected arrays; return them")
        outside = [whole_array(value) for value in _from_outside(calls, results, start)]

        def pull(gradients: list[Array]) -> Sequence[Array | None]:
            run = _Run(lambda: function(*arguments, **keywords))
            for again in run.calls:
                if any(_is_older(view.value, start) for view in again.updates):
                    raise GradientError(
                        f"{again.name} ({again.place.file}:{again.place.line}) updates an array in place inside a "
                        f"checkpoint, which would happen twice; return what is new from the {name}"
                    )
            return run.backward(gradients, outside)

        return rebuild(structure, _overridden(Override([a.view for a in outside], pull, name), results))

    return call


def _from_outside(calls: Sequence[Call], results: Sequence[Array], start: int) -> list[Value]:
    """The floats that calls (and results) look at and that were there before number `start`."""
    views = [v for call in calls for v in call.traced_inputs if isinstance(v, View)] + [r.view for r in results]
    inside = {value for call in calls for value in call.outputs}
    return [
        value for value in dict.fromkeys(v.value for v in views)
        if root(value) not in inside and (value.gradient is None or value.gradient.number < start)
        and not isinstance(value.dtype, BlockType) and value.dtype.is_float
    ]  # fmt: skip


def _is_older(value: Value, start: int) -> bool:
    """Whether memory was there, or asked for, before number `start`."""
    makers = value.writes if value.call is None else [value.call]
    return value.buffer is not None or any(call.number < start for call in makers)


def _named(x: Array) -> Array:
    """The same memory under a name of its own, so that an array that the function also finds elsewhere is a constant
    there. Elements that share a place are copied: each has a gradient of its own."""
    if not x.dtype.is_float:
        raise GradientError(
            f"grad ({_here()}): a gradient by an array of shape {x.shape} and type {x.dtype}: only floats have small "
            "changes; leave it out of argnums, or convert it"
        )
    x = x.copy() if repeats(x.layout) else x
    return Array(alias_of(x.value, Override([whole(x.value)], list)), x.layout)


def _overridden(override: Override, results: list[Array]) -> list[Array]:
    """Names for the results, whose gradients the override turns into those of what it was given."""
    plain = [r if r.layout == whole(r.value).layout else r.copy() for r in results]
    return [whole_array(alias_of(r.value, override)) for r in plain]

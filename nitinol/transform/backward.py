"""The walk backwards over recorded calls: from the gradients of results to those of what they were computed from."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from nitinol.graph.array import Array, whole_array
from nitinol.graph.nodes import Call, Override, Place, Value, View, recording, root, whole
from nitinol.graph.views import Layout, layout_of, row_major
from nitinol.ops.creation import zeros
from nitinol.ops.indexing import SCATTER_VIEW


class GradientError(TypeError):
    """Something has no gradient; the message says what, where, and what to do."""


class _Reader(NamedTuple):
    """Who a gradient comes from."""

    number: int  # its place among the calls
    name: str
    place: Place | None  # None of the function's results


RESULT = _Reader(1 << 62, "the function's result", None)


def backward(
    results: Sequence[Array], gradients: Sequence[Array], wanted: Sequence[Array], calls: Sequence[Call]
) -> list[Array]:
    """The gradients of the arrays `wanted` from those of the results, which the calls have computed."""
    makers: dict[Value, Call] = {value: call for call in calls for value in call.outputs}
    # Of an argument that is a part of a larger piece of memory, such as one of all parameters, only that part counts.
    ends = {a.value: a.layout if a.layout.contiguous else whole(a.value).layout for a in wanted}
    active, broken = _depending(ends, calls, makers)
    writes = [call for call in calls if call.form.updates]
    sums: dict[Value, Array] = {}  # gradients of whole values so far
    due: list[tuple[int, Any]] = []  # a heap by descending number, so that all users of a value come first
    found: set[Call | Override] = set()

    def add(view: View, gradient: Array | None, reader: _Reader) -> None:
        """Adds the gradient of a view to that of its value."""
        value = view.value
        if gradient is None or not view.dtype.is_float:
            return
        update = _update_before(value, reader.number, broken)
        if update is not None:
            raise GradientError(
                f"{update.name} ({_at(update.place)}) updates an array in place, through which no gradient flows, and "
                f"{_said(reader)} reads it; make a new array instead (where, concatenate), or keep it from the "
                "gradient with stop_gradient"
            )
        if not _is_active(value, active, makers):
            return
        total = _adjoint(view, gradient, ends.get(value) or whole(value).layout, reader)
        sums[value] = total if value not in sums else sums[value] + total
        producer = value.gradient or makers.get(value)
        if value not in ends and producer is not None and producer not in found:
            found.add(producer)
            heapq.heappush(due, (-producer.number, producer))

    for result, seed in zip(results, gradients):
        if seed.shape != result.shape:
            raise ValueError(f"vjp: a gradient has shape {seed.shape}, but its result {result.shape}")
        add(result.view, seed, RESULT)
    while due:
        _, producer = heapq.heappop(due)
        values = producer.results if isinstance(producer, Override) else producer.outputs
        given = [sums.pop(v) if v in sums else zeros(v.shape, v.dtype) for v in values]
        with recording() as made:
            if isinstance(producer, Override):
                operands: Sequence[Any] = producer.inputs
                reader = _Reader(producer.number, producer.name, producer.place)
                pulled = producer.backward(given)
            else:
                operands = producer.form.spread(producer.traced_inputs)
                reader = _Reader(producer.number, producer.name, producer.place)
                pulled = _pull(producer, given)
        _check_unchanged(reader, made, writes)
        for operand, gradient in zip(operands, pulled):
            if isinstance(operand, View):
                add(operand, gradient, reader)
    return [_of_argument(sums.get(a.value), a) for a in wanted]


def _at(place: Place) -> str:
    return f"{place.file}:{place.line}"


def _said(reader: _Reader) -> str:
    return reader.name if reader.place is None else f"{reader.name} ({_at(reader.place)})"


def _pull(call: Call, gradients: list[Array]) -> Sequence[Array | None]:
    """What the call's operation makes of the gradients of its results."""
    form, operation = call.form, call.form.operation
    if isinstance(operation.vjp, str):
        raise GradientError(f"{operation.name} ({_at(call.place)}) has no gradient: {operation.vjp}")
    inputs = [Array(*v) if isinstance(v, View) else v.value for v in call.traced_inputs]
    results = tuple(whole_array(v) for v in call.outputs)
    several = len(results) > 1
    return operation.vjp(
        tuple(gradients) if several else gradients[0], results if several else results[0], *form.spread(inputs),
        **form.attributes,
    )  # fmt: skip


def _check_unchanged(reader: _Reader, made: Sequence[Call], writes: Sequence[Call]) -> None:
    """GradientError where a gradient reads what the function has updated since: it would be that of other values."""
    later = {view.value: call for call in writes if call.number > reader.number for view in call.updates}
    if not later:
        return
    for call in made:
        for view in call.inputs:
            update = later.get(view.value) if isinstance(view, View) else None
            if update is not None:
                raise GradientError(
                    f"the gradient of {_said(reader)} needs an array of shape {view.shape} as it was, but "
                    f"{update.name} ({_at(update.place)}) updates it in place; copy it before, or update it after the "
                    "gradient"
                )


def _depending(
    ends: Iterable[Value], calls: Sequence[Call], makers: dict[Value, Call]
) -> tuple[dict[Value, bool], dict[Value, list[Call]]]:
    """Which values depend on those in `ends`; and the memory that is updated in place although it depends on them, or
    from what does, with these updates."""
    active = dict.fromkeys(ends, True)
    broken: dict[Value, list[Call]] = {}
    for call in calls:
        views = [v for v in call.traced_inputs if isinstance(v, View)]
        depends = any(
            _is_active(v.value, active, makers) or _update_before(v.value, call.number, broken) for v in views
        )
        active.update(dict.fromkeys(call.outputs, depends))
        for view in call.traced_updates:
            if depends or _is_active(view.value, active, makers):
                broken.setdefault(root(view.value), []).append(call)
    return active, broken


def _update_before(value: Value, number: int, broken: dict[Value, list[Call]]) -> Call | None:
    """The update through which no gradient flows that a reader with this number sees under this name; a name that was
    made after it has a gradient of its own."""
    since = 0 if value.gradient is None else value.gradient.number
    return next((c for c in broken.get(root(value), ()) if since < c.number < number), None)


def _is_active(value: Value, active: dict[Value, bool], makers: dict[Value, Call]) -> bool:
    known = active.get(value)
    if known is None:
        inputs = value.gradient.inputs if value.gradient is not None else ()
        known = active[value] = any(_is_active(view.value, active, makers) for view in inputs)
    return known


def _adjoint(view: View, gradient: Array, part: Layout, reader: _Reader) -> Array:
    """The gradient of a contiguous part of a view's value: what the view repeats is summed, the rest is put in its
    place."""
    value, layout = view
    if layout.dtype != value.dtype:
        raise GradientError(
            f"{_said(reader)} reads a bitcast from {value.dtype} to {layout.dtype}, which has no gradient; convert "
            "with astype, or keep it from the gradient with stop_gradient"
        )
    if gradient.shape != layout.shape:
        raise GradientError(
            f"the gradient of {_said(reader)} has shape {gradient.shape} for an operand of shape {layout.shape}; "
            "expected the operand's"
        )
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

"""The lazy graph: values (memory to be), views of them, and the calls that compute them.

A `Value` is one piece of memory that holds a shape's elements contiguously, once its call has run. Everything that
only renames elements (slices, transposes, broadcasts) is a `View`: a layout of one value. Calls are numbered in the
order in which the program asked for them; running them in that order is always right, also with state that is updated
in place. What a thread is recording is that thread's alone (`state`); values may be shared.
"""

from __future__ import annotations

import itertools
import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any, NamedTuple

from nitinol.graph.dtypes import BlockType, bytes_of
from nitinol.graph.views import Layout, Shape, layout_of, whole_layout
from nitinol.language.types import DType, int32, int64
from nitinol.runtime import get_device
from nitinol.runtime.device import Buffer

if TYPE_CHECKING:
    from nitinol.graph.operation import Form

numbers = itertools.count(1)
MANY_READERS = 64  # from here on a value's list of readers is cleared of those that are gone, whenever it has doubled


class Value:
    """Memory for the elements of `shape`: computed by `call`, or there already in `buffer` (or both still missing:
    uninitialised memory that the calls in `writes` fill). An alias is the same memory as another value under a name
    of its own, which only gradients tell apart (see transform/gradient.py)."""

    __slots__ = ("__weakref__", "alias", "buffer", "call", "dtype", "gradient", "handles", "readers", "shape", "writes")

    def __init__(
        self, shape: Shape, dtype: DType | BlockType, call: Call | None = None, buffer: Buffer | None = None
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.call = call
        self.buffer = buffer
        self.writes: list[Call] = []  # updates in place that have not run yet
        self.readers: list[weakref.ref[Call]] = []  # calls recorded since the last update
        self.handles: list[None] = []  # one entry for each Array that looks at it: append and pop are atomic
        self.alias: Value | None = None
        self.gradient: Override | None = None  # of an alias

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return bytes_of(self.dtype, math.prod(self.shape))

    @property
    def pending(self) -> bool:
        """Whether something must run before the memory holds what was asked for."""
        return self.buffer is None or bool(self.writes)

    def pending_readers(self) -> list[Call]:
        """The calls that look at the present contents and have not run."""
        found = [reference() for reference in list(self.readers)]
        return [call for call in found if call is not None and not call.done]


class Override:
    """How gradients flow through names for the results of something that is not one call: `backward(gradients of the
    results)` gives those of `inputs`. number: its place among the calls. name: for error sentences."""

    __slots__ = ("backward", "inputs", "name", "number", "place", "results")

    def __init__(
        self, inputs: Sequence[View], backward: Callable[[list[Any]], Sequence[Any]], name: str = "an argument"
    ) -> None:
        self.inputs, self.backward = inputs, backward
        self.name, self.place = name, source_line()
        self.results: list[Value] = []
        self.number = next(numbers)


def alias_of(value: Value, gradient: Override) -> Value:
    """The same memory under another name."""
    alias = Value(value.shape, value.dtype)
    alias.alias, alias.gradient = value, gradient
    gradient.results.append(alias)
    return alias


def root(value: Value) -> Value:
    """The value whose memory it is."""
    while value.alias is not None:
        value = value.alias
    return value


class View(NamedTuple):
    """Elements of a value, whose dtype differs from the layout's after a bitcast. A view of `INDEX` has the places
    themselves as its elements."""

    value: Value
    layout: Layout

    @property
    def dtype(self) -> DType:
        return self.layout.dtype

    @property
    def shape(self) -> Shape:
        return self.layout.shape

    @property
    def size(self) -> int:
        return self.layout.size


INDEX = Value((), int64)


def index_layout(shape: Shape, strides: Sequence[int], offset: int = 0) -> Layout:
    """Elements that are computed: offset + i * strides[0] + ..., as int32 where they fit."""
    layout = layout_of(int64, shape, tuple(strides), offset)
    low, high = layout.span()
    return layout_of(int32, shape, tuple(strides), offset) if low >= -(2**31) and high <= 2**31 else layout


def whole(value: Value) -> View:
    """The view of all of a value."""
    return View(value, whole_layout(value.dtype, value.shape))  # type: ignore[arg-type]


class Scalar(NamedTuple):
    """A Python number as an operand: an argument of the kernel, so that another number needs no other kernel."""

    value: int | float | bool
    dtype: DType

    @property
    def shape(self) -> Shape:
        return ()

    @property
    def key(self) -> Any:
        """What tells it from other numbers: 0.0 is not -0.0."""
        return self.dtype, repr(self.value)


class Number:
    """Stands for a number in a plan, which is the same for all numbers."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index

    def __repr__(self) -> str:
        return f"number {self.index}"


class Place(NamedTuple):
    """A line of the program."""

    file: str
    line: int
    function: str


class Call:
    """Something to compute: an operation on values. `form` is what all calls of the kind share (operation, attributes,
    layouts); `operands` are the values and numbers of this one."""

    __slots__ = (
        "__weakref__", "_code", "_instruction", "_results", "_traced", "device", "done", "form", "number", "operands",
    )  # fmt: skip

    def __init__(self, form: Form, operands: tuple[Value | int | float | bool, ...]) -> None:
        self.form = form
        self.operands = operands
        self.number = next(numbers)
        self.done = False
        self._code: CodeType | Place | None = None
        self._instruction = 0
        # Values keep their calls alive, not the other way round: memory goes when the last Array goes, without a cycle.
        self._results: list[weakref.ref[Value]] = []
        self._traced: tuple[Any, ...] | None = None  # the operands before aliases were looked through, if there are any
        self.device: Any = None  # of a call that starts from nothing: the one that was current

    @property
    def inputs(self) -> tuple[View | Scalar, ...]:
        """What it reads: the operands that it does not update, with their layouts."""
        return self._views(self.operands)

    @property
    def traced_inputs(self) -> tuple[View | Scalar, ...]:
        """The same under the names by which the program gave them."""
        return self._views(self.operands if self._traced is None else self._traced)

    def _views(self, operands: tuple[Any, ...]) -> tuple[View | Scalar, ...]:
        layouts = self.form.layouts
        return tuple([
            View(operands[i], layouts[i]) if type(operands[i]) is Value else Scalar(operands[i], layouts[i])
            for i in self.form.reads
        ])  # fmt: skip

    @property
    def updates(self) -> tuple[View, ...]:
        """What it changes in place."""
        return tuple(View(self.operands[i], self.form.layouts[i]) for i in self.form.updates)  # type: ignore[arg-type]

    @property
    def traced_updates(self) -> tuple[View, ...]:
        """The same under the names by which the program gave them."""
        operands = self.operands if self._traced is None else self._traced
        return tuple(View(operands[i], self.form.layouts[i]) for i in self.form.updates)  # type: ignore[arg-type]

    @property
    def outputs(self) -> tuple[Value, ...]:
        """The fresh values; one that nobody holds any more is made anew."""
        if len(self._results) == 1 and (only := self._results[0]()) is not None:
            return (only,)
        found = []
        for index, layout in enumerate(self.form.outputs):
            value = self._results[index]()
            if value is None:
                value = Value(layout.shape, layout.dtype, self)
                self._results[index] = weakref.ref(value)
            found.append(value)
        return tuple(found)

    @property
    def name(self) -> str:
        return self.form.operation.name

    @property
    def place(self) -> Place:
        """The line of the program that asked for it."""
        if isinstance(self._code, CodeType):
            self._code = Place(self._code.co_filename, _line(self._code, self._instruction), self._code.co_name)
        return self._code or Place("?", 0, "?")


# ------------------------------------------------------------------------------------------------------- recording


class State(threading.local):
    """What this thread is doing with the graph."""

    def __init__(self) -> None:
        self.recorders: list[list[Call]] = []  # lists that every recorded call is added to
        self.place: Place | None = None  # what recorded calls are said to come from, while one is taken apart
        self.tracing: Any = None  # what `compile` is tracing
        self.target: str | None = None  # what operations are being lowered for


state = State()
unwritten: weakref.WeakSet[Value] = weakref.WeakSet()  # values with updates that have not run yet


@contextmanager
def recording(recorder: list[Call] | None = None) -> Iterator[list[Call]]:
    """The calls that this thread records inside, in a new list or the one given."""
    calls: list[Call] = [] if recorder is None else recorder
    state.recorders.append(calls)
    try:
        yield calls
    finally:
        state.recorders = [recorder for recorder in state.recorders if recorder is not calls]


@contextmanager
def lowering(target: str) -> Iterator[None]:
    """Inside, operations that this thread calls are lowered for the target at once, and nothing that it records reaches
    its recorders or counts as part of what it traces."""
    before = state.recorders, state.place, state.tracing, state.target
    state.recorders, state.place, state.tracing, state.target = [], None, None, target
    try:
        yield
    finally:
        state.recorders, state.place, state.tracing, state.target = before


def record(form: Form, operands: tuple[Any, ...]) -> tuple[Value, ...]:
    """Enters a call into the graph; returns its fresh values."""
    call = Call(form, operands)
    if state.place is not None:
        call._code = state.place
    else:
        frame = sys._getframe(2)
        while (ours := _ours.get(id(code := frame.f_code))) or (ours is None and _is_ours(code)):
            if frame.f_back is None:
                break
            frame = frame.f_back
        call._code, call._instruction = code, frame.f_lasti
    for operand in operands:
        if type(operand) is Value and operand.alias is not None:
            call._traced = operands
            call.operands = operands = tuple([root(o) if type(o) is Value else o for o in operands])
            break
    values = tuple([Value(layout.shape, layout.dtype, call) for layout in form.outputs])
    call._results = [weakref.ref(value) for value in values]  # before another thread can find the call
    reference = None
    for position in form.reads:
        operand = operands[position]
        if type(operand) is Value and operand is not INDEX:
            readers = operand.readers
            if reference is None:
                reference = weakref.ref(call)
            readers.append(reference)
            if (count := len(readers)) >= MANY_READERS and not count & (count - 1):
                forget_readers(operand)
    if form.updates:
        for position in form.updates:
            value = operands[position]
            value.writes.append(call)
            unwritten.add(value)
    elif reference is None:
        call.device = get_device()
    for calls in state.recorders:
        calls.append(call)
    return values


def forget_readers(value: Value) -> None:
    """Clears a value's list of readers of those that have run or are gone. Other threads may append meanwhile."""
    if _forgetting.acquire(blocking=False):
        try:
            readers = value.readers
            count = len(readers)
            readers[:count] = [r for r in readers[:count] if (c := r()) is not None and not c.done]
        finally:
            _forgetting.release()


_forgetting = threading.Lock()
_ROOT = Path(__file__).resolve().parent.parent
_LIBRARY = tuple(str(_ROOT / part) for part in ("graph", "ops", "runtime", "transform", "nn"))
_ours: dict[int, bool] = {}  # by the code object's id, as its hash takes long
_known: list[CodeType] = []  # so that their ids stay theirs


def _is_ours(code: CodeType) -> bool:
    """Whether the code is of the array library, which is never where the program asked for something."""
    found = _ours.get(id(code))
    if found is not None:
        return found
    if len(_known) > 1 << 14:
        _ours.clear()
        _known.clear()
    _known.append(code)
    ours = _ours[id(code)] = code.co_filename.startswith(_LIBRARY) or code.co_filename == "<string>"
    return ours


def _line(code: CodeType, instruction: int) -> int:
    """The source line of an instruction."""
    for start, end, line in code.co_lines():
        if start <= instruction < end and line is not None:
            return line
    return code.co_firstlineno


def source_line() -> Place:
    """File, line and function of the innermost frame outside the array library."""
    if state.place is not None:
        return state.place
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame.f_code):
        frame = frame.f_back
    return Place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)



"""Runs the tile IR in NumPy, one program instance after the other: the oracle that every target is compared with.

Every access is checked against the buffer that its pointer came from. Memory outside a mask is never touched.
The float results are the most exact ones at hand, so that a comparison measures the target's error alone: exp, sin and
their kin, `dot` and the sums of `reduce` and `scan` are computed in float64 and rounded once to the result's type.
A reduction with any other region combines neighbours, then neighbours of those, in order.

To stop inside a kernel, hand `run` a function that is called after each operation::

    def stop(op, values):
        if op.location and op.location.line == 12:
            breakpoint()  # op.operands, op.results, and `values`: the results as NumPy arrays

    run(function, grid, arguments, trace=stop)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from nitinol.compiler import ir
from nitinol.compiler.memory import Fault, Memory, Region, plain_address
from nitinol.compiler.semantics import Array, constant, elementwise, numpy_dtype, poison, round_to
from nitinol.language.types import DType, PointerType

Trace = Callable[[ir.Op, tuple[Array, ...]], None]
Step = Callable[..., Any]
_ALL: Any = slice(None)  # every lane


class OutOfBounds(IndexError):
    """A load or store outside the buffer of its pointer, or a store to a read-only one."""


class KernelAssertion(AssertionError):
    """A `device_assert` of the kernel failed."""


def run(
    function: ir.Function,
    grid: Sequence[int],
    arguments: Sequence[Any],
    trace: Trace | None = None,
    regions: Iterable[Region] = (),
) -> None:
    """Runs every program instance of `grid` (up to three extents) in order, axis 0 fastest.

    `arguments` has one entry per parameter: for a pointer a NumPy array, anything with a buffer, or anything with
    `address` and `nbytes` (a `Region`); for a scalar a number. Kernels write to the caller's memory. `regions`
    is further memory that pointers made from integers may touch. `trace(op, values)` is called after each operation.

    Raises OutOfBounds, KernelAssertion, and TypeError for arguments that do not fit the parameters.
    """
    if len(arguments) != len(function.parameters):
        raise TypeError(f"{function.name} takes {len(function.parameters)} arguments, got {len(arguments)}")
    machine = _Machine(function, (*grid, 1, 1, 1)[:3], trace)
    for parameter, argument in zip(function.parameters, arguments):
        machine.values[parameter] = machine.bind(parameter, argument)
    for region in regions:
        machine.memory.bind("a region", region)
    with np.errstate(all="ignore"):
        for z, y, x in product(*(range(extent) for extent in reversed(machine.grid))):
            machine.program = (x, y, z)
            machine.block(function.body)


@dataclass
class _Machine:
    """The state of one run: buffers, the values of the running program, prepared operations."""

    function: ir.Function
    grid: tuple[int, ...]
    trace: Trace | None
    memory: Memory = field(default_factory=Memory)
    values: dict[ir.Value, Array] = field(default_factory=dict)
    steps: dict[ir.Block, list[tuple[ir.Op, Step]]] = field(default_factory=dict)
    program: tuple[int, int, int] = (0, 0, 0)

    def bind(self, parameter: ir.Value, argument: Any) -> Array:
        """The value of a parameter; a pointer's buffer is registered."""
        element = parameter.element
        if isinstance(element, PointerType):
            return self.memory.bind(parameter.name, argument)
        if not np.isscalar(argument) and np.shape(argument) != ():
            raise TypeError(f"{parameter.name} is {element}: expected a number, got {type(argument).__name__}")
        if element.is_float:
            return round_to(np.asarray(argument, np.float64), element)
        return np.asarray(argument, numpy_dtype(element))

    # ------------------------------------------------------------------------------------------- control flow

    def block(self, block: ir.Block) -> list[Array]:
        """Runs the operations; gives the operands of the terminator (none for a kernel's body)."""
        steps = self.steps.get(block)
        if steps is None:
            steps = self.steps[block] = [(op, self.prepare(op)) for op in block.ops if op.kind not in ir.TERMINATORS]
        values, trace = self.values, self.trace
        for op, step in steps:
            result = step(*[values[v] for v in op.operands])
            if len(op.results) == 1:
                values[op.results[0]] = result
            else:
                values.update(zip(op.results, result or ()))
            if trace is not None:
                trace(op, tuple(values[r] for r in op.results))
        if block.ops and block.ops[-1].kind in ir.TERMINATORS:
            return [values[v] for v in block.ops[-1].operands]
        return []

    def prepare(self, op: ir.Op) -> Step:
        """The function from the operands' values to the result (a tuple of several, None for none)."""
        if op.kind in ir.ELEMENTWISE:
            return self.pointer_step(op) if _touches_pointers(op) else elementwise(op)
        if op.kind == "constant":
            value = constant(op.attributes["value"], op.result.element)
            return lambda: value
        return getattr(self, f"step_{op.kind}")(op)

    def single(self, op: ir.Op, results: list[Array]) -> Any:
        return results[0] if len(op.results) == 1 else tuple(results)

    def step_for(self, op: ir.Op) -> Step:
        body = op.regions[0]
        variable, *carried = body.arguments
        dtype = numpy_dtype(variable.element)

        def step(lower: Array, upper: Array, by: Array, *state: Array) -> Any:
            current = list(state)
            for i in range(int(lower), int(upper), int(by)):
                self.values[variable] = np.asarray(i, dtype)
                self.values.update(zip(carried, current))
                current = self.block(body)
            return self.single(op, current)

        return step

    def step_while(self, op: ir.Op) -> Step:
        before, after = op.regions

        def step(*state: Array) -> Any:
            current = list(state)
            while True:
                self.values.update(zip(before.arguments, current))
                go, *current = self.block(before)
                if not go:
                    return self.single(op, current)
                self.values.update(zip(after.arguments, current))
                current = self.block(after)

        return step

    def step_if(self, op: ir.Op) -> Step:
        return lambda condition: self.single(op, self.block(op.regions[0 if condition else 1]))

    # -------------------------------------------------------------------------------------- making and moving

    def step_program_id(self, op: ir.Op) -> Step:
        return lambda: np.asarray(self.program[op.attributes["axis"]], np.int32)

    def step_num_programs(self, op: ir.Op) -> Step:
        return lambda: np.asarray(self.grid[op.attributes["axis"]], np.int32)

    def step_arange(self, op: ir.Op) -> Step:
        value = np.arange(op.attributes["start"], op.attributes["end"], dtype=np.int32)
        return lambda: value

    def step_splat(self, op: ir.Op) -> Step:
        return lambda x: np.broadcast_to(x, op.result.shape)

    step_broadcast = step_splat

    def step_reshape(self, op: ir.Op) -> Step:
        return lambda x: x.reshape(op.result.shape)

    def step_trans(self, op: ir.Op) -> Step:
        return lambda x: x.transpose(op.attributes["perm"])

    def step_join(self, op: ir.Op) -> Step:
        return lambda a, b: np.stack([a, b], axis=-1)

    def step_split(self, op: ir.Op) -> Step:
        return lambda x: (x[..., 0], x[..., 1])

    def step_cat(self, op: ir.Op) -> Step:
        return lambda a, b: np.concatenate([a, b], axis=op.attributes["axis"])

    def step_gather(self, op: ir.Op) -> Step:
        axis = op.attributes["axis"]

        def step(source: Array, index: Array) -> Array:
            extent = source.shape[axis]
            bad = (index < 0) | (index >= extent)
            if bad.any():
                lane = tuple(int(i) for i in np.argwhere(bad)[0])
                raise OutOfBounds(f"{self.where(op)}: gather in lane {lane} of index {index[lane]}, extent {extent}")
            return np.take_along_axis(source, index.astype(np.int64), axis)

        return step

    def pointer_step(self, op: ir.Op) -> Step:
        """Comparisons and casts of pointers see the address without the buffer's number."""
        function = elementwise(op)
        if op.kind in ir.COMPARISONS:
            return lambda a, b: function(plain_address(a), plain_address(b))
        if op.kind in ("cast", "bitcast") and not isinstance(op.result.element, PointerType):
            return lambda x: function(plain_address(x))
        if op.kind in ("cast", "bitcast") and not isinstance(op.operands[0].element, PointerType):
            return lambda x: plain_address(function(x))
        return function

    # ------------------------------------------------------------------------------------------------- memory

    def where(self, op: ir.Op) -> str:
        return f"kernel {self.function.name}, {op.location or 'no source line'}, program {self.program}"

    def read(self, op: ir.Op, pointers: Array, active: np.ndarray, element: DType) -> Array:
        try:
            return self.memory.read(pointers[active], element)
        except Fault as fault:
            raise self.out_of_bounds(op, active, fault) from None

    def write(self, op: ir.Op, pointers: Array, active: np.ndarray, values: Array, element: DType) -> None:
        try:
            self.memory.write(pointers[active], values, element)
        except Fault as fault:
            raise self.out_of_bounds(op, active, fault) from None

    def out_of_bounds(self, op: ir.Op, active: np.ndarray, fault: Fault) -> OutOfBounds:
        flat = int(np.arange(int(np.prod(op.operands[0].shape)))[active][fault.position])
        lane = tuple(int(i) for i in np.unravel_index(flat, op.operands[0].shape))
        return OutOfBounds(f"{self.where(op)}: {op.kind} in lane {lane} of {fault}")

    def step_load(self, op: ir.Op) -> Step:
        element = op.result.element
        assert isinstance(element, DType)

        def step(pointer: Array, mask: Array | None = None, other: Array | None = None) -> Array:
            flat = np.ravel(pointer)
            if mask is None or mask.all():
                return self.read(op, flat, _ALL, element).reshape(op.result.shape)
            active = np.flatnonzero(mask)
            result = np.empty(flat.shape, numpy_dtype(element))
            result[:] = poison(element) if other is None else np.ravel(other)
            result[active] = self.read(op, flat, active, element)
            return result.reshape(op.result.shape)

        return step

    def step_store(self, op: ir.Op) -> Step:
        element = op.operands[1].element
        assert isinstance(element, DType)

        def step(pointer: Array, value: Array, mask: Array | None = None) -> None:
            active = _ALL if mask is None else np.flatnonzero(mask)
            self.write(op, np.ravel(pointer), active, np.ravel(value)[active], element)

        return step

    def atomic(self, op: ir.Op, combine: Step, pointer: Array, mask: Array | None, *values: Array) -> Array:
        """Lane after lane: old values; memory becomes combine(old, *values). At once where no two addresses meet."""
        element = op.result.element
        assert isinstance(element, DType)
        flat = np.ravel(pointer)
        active = np.arange(len(flat)) if mask is None else np.flatnonzero(mask)
        old = np.full(flat.shape, poison(element), numpy_dtype(element))
        once = len(np.unique(flat[active])) == len(active)
        for group in [active] if once else active.reshape(-1, 1):
            old[group] = self.read(op, flat, group, element)
            self.write(op, flat, group, combine(old[group], *(np.ravel(v)[group] for v in values)), element)
        return old.reshape(op.result.shape)

    def step_atomic_rmw(self, op: ir.Op) -> Step:
        kind = op.attributes["kind"]
        combine = _take_new if kind == "xchg" else elementwise(ir.Op(kind, [op.operands[1]] * 2, [op.result]))
        return lambda pointer, value, mask=None: self.atomic(op, combine, pointer, mask, value)

    def step_atomic_cas(self, op: ir.Op) -> Step:
        def combine(old: Array, expected: Array, desired: Array) -> Array:
            return np.where(old == expected, desired, old)

        return lambda pointer, expected, desired: self.atomic(op, combine, pointer, None, expected, desired)

    # -------------------------------------------------------------------------------------- dots and reductions

    def step_dot(self, op: ir.Op) -> Step:
        element = op.result.element

        def step(a: Array, b: Array, acc: Array) -> Array:  # products of int8 sum exactly in float64
            total = a.astype(np.float64) @ b.astype(np.float64)
            if acc.dtype.kind in "iu":
                return (acc.astype(np.int64) + total.astype(np.int64)).astype(acc.dtype)
            return round_to(total + acc, element)

        return step

    def combine(self, op: ir.Op, left: Sequence[Array], right: Sequence[Array]) -> list[Array]:
        """The region on arrays of one shape: at once, or lane by lane when it branches."""
        region = op.regions[0]
        shape = np.shape(left[0])
        if all(o.kind in ir.ELEMENTWISE or o.kind in ("constant", "yield") for o in region.ops):
            self.values.update(zip(region.arguments, (*left, *right)))
            return [np.broadcast_to(v, shape) for v in self.block(region)]
        results = [np.empty(shape, numpy_dtype(r.element)) for r in op.results]
        for lane in np.ndindex(shape):
            self.values.update(zip(region.arguments, (np.asarray(v[lane]) for v in (*left, *right))))
            for result, value in zip(results, self.block(region)):
                result[lane] = value
        return results

    def step_reduce(self, op: ir.Op) -> Step:
        axis, kind, element = op.attributes["axis"], ir.combine_kind(op), op.results[0].element
        whole = _ufunc(op, kind)
        if whole is not None and isinstance(element, DType):
            wide = np.dtype(np.float64) if element.is_float else numpy_dtype(element)
            return lambda x: round_to(whole.reduce(x, axis=axis, dtype=wide), element)

        def step(*tiles: Array) -> Any:
            tiles = tuple(np.moveaxis(t, axis, 0) for t in tiles)
            while len(tiles[0]) > 1:
                tiles = tuple(self.combine(op, [t[0::2] for t in tiles], [t[1::2] for t in tiles]))
            return self.single(op, [t[0] for t in tiles])

        return step

    def step_scan(self, op: ir.Op) -> Step:
        axis, kind, element = op.attributes["axis"], ir.combine_kind(op), op.results[0].element
        flip: Step = (lambda t: t[::-1]) if op.attributes.get("reverse") else (lambda t: t)
        whole = _ufunc(op, kind)

        def step(*tiles: Array) -> Any:
            tiles = tuple(flip(np.moveaxis(t, axis, 0)) for t in tiles)
            if whole is not None and isinstance(element, DType):
                wide = np.dtype(np.float64) if element.is_float else numpy_dtype(element)
                results = [round_to(whole.accumulate(tiles[0], axis=0, dtype=wide), element)]
            else:
                results = [np.array(t) for t in tiles]
                for i in range(1, len(tiles[0])):
                    after = self.combine(op, [r[i - 1] for r in results], [t[i] for t in tiles])
                    for result, value in zip(results, after):
                        result[i] = value
            return self.single(op, [np.moveaxis(flip(r), 0, axis) for r in results])

        return step

    # --------------------------------------------------------------------------------------- prints and asserts

    def step_device_print(self, op: ir.Op) -> Step:
        prefix, as_hex = op.attributes.get("prefix", ""), op.attributes.get("hex", False)

        def step(*values: Array) -> None:
            texts = []
            for value, operand in zip(values, op.operands):
                bits = operand.element.nbytes * 8
                formatter: Any = {"int": lambda v, bits=bits: hex(int(v) & ((1 << bits) - 1))} if as_hex else None
                value = plain_address(value) if isinstance(operand.element, PointerType) else value
                texts.append(np.array2string(np.asarray(value), formatter=formatter))
            print(f"pid {self.program} {prefix}", *texts, flush=True)

        return step

    def step_gdc_wait(self, op: ir.Op) -> Step:
        return lambda: None

    step_gdc_launch_dependents = step_gdc_wait

    def step_breakpoint(self, op: ir.Op) -> Step:
        code = compile("breakpoint()", str(op.location or "kernel"), "exec")

        def step(*values: Array) -> None:
            exec(code, dict(zip(op.attributes["names"], values)) | {"program": self.program})

        return step

    def step_assert(self, op: ir.Op) -> Step:
        def step(condition: Array, *rest: Array) -> None:
            holds = np.asarray(condition)
            if not holds.all():
                lane = tuple(int(i) for i in np.argwhere(~holds)[0])
                text = op.attributes.get("message", "") or "assertion failed"
                raise KernelAssertion(f"{self.where(op)}: {text}" + (f" (lane {lane})" if lane else ""))

        return step


def _take_new(old: Array, new: Array) -> Array:
    return new


def _touches_pointers(op: ir.Op) -> bool:
    return any(isinstance(v.element, PointerType) for v in (*op.operands[-1:], op.result))


def _ufunc(op: ir.Op, kind: str | None) -> np.ufunc | None:
    """NumPy's function for a region that is a single operation, if it has the same meaning."""
    element = op.results[0].element
    if kind is None or not isinstance(element, DType) or (element.kind == "bool" and kind in ("add", "mul")):
        return None
    if kind in ("min", "max") and not op.regions[0].ops[0].attributes.get("propagate_nan", False):
        return np.fmin if kind == "min" else np.fmax
    names = {"add": np.add, "mul": np.multiply, "min": np.minimum, "max": np.maximum}
    return (names | {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor})[kind]

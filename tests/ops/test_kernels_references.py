"""Every Operation in nitinol.ops that has a reference, against it, on fresh random operands (see OPERANDS)."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from operands import ROUNDING

import nitinol as na
import nitinol.ops
from nitinol.formats.quantization import dequantize
from nitinol.graph.operation import Operation
from nitinol.language import types

Random = np.random.Generator


def found_operations() -> dict[str, Operation]:
    """All operations with a reference, by the names under which modules have them."""
    found: dict[str, Operation] = {}
    for module in pkgutil.iter_modules(nitinol.ops.__path__):
        for name, value in vars(importlib.import_module(f"nitinol.ops.{module.name}")).items():
            operation = getattr(value, "operation", value)
            if isinstance(operation, Operation) and operation.reference and operation not in found.values():
                found[name] = operation
    return found


OPERATIONS = found_operations()


def floats(*shapes: tuple[int, ...]) -> Callable[[Random], list[Any]]:
    return lambda r: [r.standard_normal(shape).astype(np.float32) for shape in shapes]


def positive(*shapes: tuple[int, ...]) -> Callable[[Random], list[Any]]:
    return lambda r: [(r.random(shape) + 0.1).astype(np.float32) for shape in shapes]


def integers(*shapes: tuple[int, ...], low: int = -99, high: int = 100) -> Callable[[Random], list[Any]]:
    return lambda r: [r.integers(low, high, shape).astype(np.int32) for shape in shapes]


def both(*makers: Callable[[Random], list[Any]]) -> Callable[[Random], list[Any]]:
    return lambda r: [operand for make in makers for operand in make(r)]


ONE, TWO = [(7, 13)], [(7, 1), (3, 1, 13)]
AXES = {"axes": (0, 2), "dtype": types.float32}
# By the operation's name in its module: a maker of operands, and attributes.
OPERANDS: dict[str, tuple[Callable[[Random], list[Any]], dict[str, Any]]] = {
    **{name: (floats(*ONE), {}) for name in
       "exp exp2 sin cos tanh erf floor ceil sigmoid silu abs negative sign square isnan relu _gelu_exact _gelu_fast "
       "COPY".split()},
    **{name: (positive(*ONE), {}) for name in "log log2 sqrt rsqrt reciprocal".split()},
    **{name: (floats(*TWO), {}) for name in
       "ADD SUBTRACT MULTIPLY MAXIMUM MINIMUM equal not_equal less less_equal greater greater_equal".split()},
    **{name: (positive(*TWO), {}) for name in "DIVIDE MOD POWER FLOOR_DIVIDE FLOOR_DIVIDE_FLOATS".split()},
    **{name: (integers(*TWO), {}) for name in "bitwise_and bitwise_or bitwise_xor".split()},
    **{name: (integers(*TWO, low=0, high=15), {}) for name in "left_shift right_shift".split()},
    "invert": (integers(*ONE), {}),
    "ASTYPE": (floats(*ONE), {"dtype": types.int32}),
    "WHOLE_POWER": (floats(*ONE), {"exponent": 5}),
    "WHERE": (both(integers((13,), low=0, high=2), floats((7, 1), (7, 13))), {}),
    **{name: (floats((5, 7, 9)), AXES) for name in "SUM PROD MAX MIN".split()},
    **{name: (integers((5, 7, 3), low=0, high=2), AXES | {"dtype": types.int1}) for name in ("ANY", "ALL")},
    **{name: (integers((7, 19)), {"axes": (1,), "dtype": types.int32}) for name in ("ARGMAX", "ARGMIN")},
    "CUMSUM": (floats((5, 1300, 2)), {"axis": 1}),
    "TAKE": (both(floats((3, 6, 5)), integers((2, 4), low=-6, high=6)), {"axis": 1}),
    "SCATTER_SUM": (both(floats((3, 2, 70, 5)), integers((2, 70), low=0, high=6)), {"axis": 1, "extent": 6}),
    "CONCATENATE": (floats((3, 2), (3, 5), (3, 1)), {"axis": 1, "dtype": types.float32}),
    "LINEAR": (floats((9, 33), (17, 33), (17,), (9, 17), (9, 17)), {"gelu": False}),
    "SWIGLU": (floats((9, 33), (17, 33), (17, 33)), {"gelu": False}),
    "GEGLU": (floats((3, 33), (17, 33), (17, 33)), {"gelu": True}),
    "MATMUL": (floats((3, 1, 9, 17), (2, 17, 5)), {}),
    "RMS_NORM": (floats((7, 33), (11,), (7, 33)), {"epsilon": 1e-5}),
    "LAYER_NORM": (floats((3, 7, 33), (33,), (33,)), {"epsilon": 1e-5}),
    "DEQUANTIZE": (floats((5, 64)), {"dtype": types.float32}),  # of blocks: see `arrays`
    "EMBEDDING": (both(floats((9, 33)), integers((3, 4), low=-2, high=12)), {"dtype": types.float32}),
    "SOFTMAX": (floats((7, 33, 2)), {"axis": 1}),
}  # fmt: skip
# Relative to the largest value, beside one rounding: sums of up to 100 float32 values in another order; exponents.
ERROR = 2e-6


def arrays(name: str, operands: list[Any], dtype: str) -> tuple[list[na.Array], list[np.ndarray]]:
    """What the operation and what its reference get."""
    if name == "DEQUANTIZE":
        blocks = na.quantize(operands[0], "Q8_0")
        return [blocks], [dequantize(blocks.numpy(), "Q8_0", blocks.shape).astype(np.float64)]
    given = [na.array(o) for o in operands]
    given = [a.astype(dtype).evaluate() if a.dtype.is_float else a for a in given]
    exact = [a.numpy() for a in given]
    return given, [o.astype(np.float64) if o.dtype.kind == "f" else o for o in exact]


def compare(name: str, rng: Random, dtype: str) -> None:
    make, attributes = OPERANDS[name]
    operation = OPERATIONS[name]
    if "dtype" in attributes and attributes["dtype"].is_float:
        attributes = attributes | {"dtype": getattr(types, dtype)}
    given, exact = arrays(name, make(rng), dtype)
    found, expected = operation(*given, **attributes), operation.reference(*exact, **attributes)
    pairs = zip(found, expected) if isinstance(found, tuple) else [(found, expected)]
    for result, values in pairs:
        values = np.asarray(values)
        assert result.shape == values.shape
        if not result.dtype.is_float:
            np.testing.assert_array_equal(result.numpy(), values)
            continue
        rounding = ROUNDING.get({"fp16": "float16", "bf16": "bfloat16"}.get(result.dtype.name, "float32"), 0)
        allowed = ERROR * np.abs(values).max() + 1.01 * rounding * np.abs(values) + (dtype == "float16") * 2.0**-24
        wrong = np.abs(result.numpy().astype(np.float64) - values) > allowed
        assert not wrong.any(), f"{name}: {result.numpy()[wrong][:4]}, expected {values[wrong][:4]}"


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_is_its_reference(rng, name):
    if name not in OPERANDS:
        pytest.skip(f"{OPERATIONS[name].name} has operands that this file's table does not know")
    compare(name, rng, "float32")


def test_the_table_names_operations():
    assert not OPERANDS.keys() - OPERATIONS.keys()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", "sigmoid silu tanh exp SUM MAX PROD WHERE TAKE CONCATENATE SOFTMAX LAYER_NORM".split())
def test_halves_round_once(rng, name, dtype):
    """Computed in float32, rounded at the end."""
    compare(name, rng, dtype)

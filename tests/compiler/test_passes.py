"""The passes keep what the interpreter computes, and do what they are for."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from helpers import Build, pointer, tile_of
from operation_programs import operation_programs
from random_programs import random_program

from nitinol.compiler import ir, passes
from nitinol.compiler.folding import fold
from nitinol.compiler.interpreter import run
from nitinol.language.types import bfloat16, float16, float32, float64, int1, int8, int16, int32, int64, uint32

PASSES = (fold, passes.merge, passes.hoist, passes.remove_dead)


def kinds(block: ir.Block) -> list[str]:
    return [op.kind for op in ir.walk(block)]


def simplified(b: Build) -> list[str]:
    """The operations that are left, without the terminators."""
    function = b.function
    passes.simplify(function)
    ir.verify(function)
    return [k for k in kinds(function.body) if k not in ir.TERMINATORS]


@pytest.mark.parametrize("size", ("small", "medium"))
def test_random_programs_keep_their_results(size):
    """Each pass alone, then all together: valid, and the same result bit for bit (but for the sign of zeros)."""
    rng = np.random.default_rng()
    for _ in range(40 if size == "small" else 10):
        program = random_program(rng, size)
        before = str(program.function)
        expected = program.copies()
        run(program.function, program.grid, expected)
        for transform in [PASSES[int(i)] for i in rng.permutation(4)] + [passes.simplify]:
            transform(program.function)
            ir.verify(program.function)
            actual = program.copies()
            run(program.function, program.grid, actual)
            for index in program.outputs:
                same = np.array_equal(actual[index], expected[index])
                assert same, f"{transform.__name__}\n{before}\nbecame\n{program.function}"


@pytest.mark.parametrize("element", (int8, uint32, int64, float16, bfloat16, float32), ids=str)
def test_special_values_keep_their_results(element):
    """NaN, infinities, signs of zero, the ends of the integers: bit for bit, NaN payloads aside."""
    for _, program in operation_programs(np.random.default_rng(), [element]):
        expected, actual = program.copies(), program.copies()
        run(program.function, program.grid, expected)
        passes.simplify(program.function)
        ir.verify(program.function)
        run(program.function, program.grid, actual)
        exact = replace(program, tolerance=[0.0] * len(program.outputs), relative=[])
        exact.compare(actual, expected)


def test_simplify_settles():
    """A second run finds nothing to do."""
    rng = np.random.default_rng()
    for _ in range(20):
        function = random_program(rng, "small").function
        passes.simplify(function)
        text = str(function)
        for transform in PASSES:
            assert not transform(function), f"{transform.__name__} on\n{text}"


# --------------------------------------------------------------------------------------------------------- folding


@pytest.mark.parametrize("element", (int8, int32, int64, uint32), ids=str)
@pytest.mark.parametrize("shape", ((), (4,)), ids=("scalar", "tile"))
def test_integer_identities(element, shape):
    type = tile_of(element, shape)
    ones = 2**32 - 1 if element == uint32 else -1
    rules = [
        lambda b, x: b("add", x, b.constant(0, type)),
        lambda b, x: b("add", b.constant(0, type), x),
        lambda b, x: b("sub", x, b.constant(0, type)),
        lambda b, x: b("mul", b.constant(1, type), x),
        lambda b, x: b("div", x, b.constant(1, type)),
        lambda b, x: b("and", x, b.constant(ones, type)),
        lambda b, x: b("or", x, b.constant(0, type)),
        lambda b, x: b("xor", x, b("sub", x, x)),
        lambda b, x: b("shl", x, b.constant(0, type)),
        lambda b, x: b("min", x, x),
        lambda b, x: b("or", x, b("mul", x, b.constant(0, type))),
        lambda b, x: b("neg", b("neg", x)),
        lambda b, x: b("not", b("not", x)),
        lambda b, x: b("add", x, b("rem", x, b.constant(1, type))),
        lambda b, x: b("select", b("le", x, x), x, b("neg", x), type=type),
        lambda b, x: b("select", b("lt", x, x), b("neg", x), x, type=type),
        lambda b, x: b("cast", b("cast", x, type=tile_of(float64, shape)), type=type) if element != int64 else x,
        lambda b, x: b("bitcast", b("bitcast", x, type=tile_of(_same_width(element), shape)), type=type),
    ]
    for number, rule in enumerate(rules):
        b = Build(pointer(element), pointer(element))
        b.store(1, rule(b, b.load(0, shape)))
        left = [k for k in simplified(b) if k not in ("arange", "splat", "addptr", "reshape")]
        assert left == ["load", "store"], number


def _same_width(element):
    return {8: int8, 32: float32, 64: float64}[element.bits]


def test_float_identities_keep_nan_and_negative_zero():
    type = tile_of(float32, (8,))
    x = np.array([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45, -3.5, 7.0], np.float32)
    rules = {
        "gone": [
            lambda b, v: b("mul", v, b.constant(1.0, type)),
            lambda b, v: b("div", v, b.constant(1.0, type)),
            lambda b, v: b("add", v, b.constant(-0.0, type)),
            lambda b, v: b("sub", v, b.constant(0.0, type)),
        ],
        "add": [lambda b, v: b("add", v, b.constant(0.0, type))],
        "sub": [lambda b, v: b("sub", v, b.constant(-0.0, type)), lambda b, v: b("sub", v, v)],
        "mul": [lambda b, v: b("mul", v, b.constant(0.0, type)), lambda b, v: b("div", v, b.constant(-4.0, type))],
        "div": [lambda b, v: b("div", v, b.constant(3.0, type)), lambda b, v: b("div", v, b.constant(0.0, type))],
        "eq": [lambda b, v: b("cast", b("eq", v, v), type=type)],
    }
    for kind, makers in rules.items():
        for make in makers:
            b = Build(pointer(float32), pointer(float32))
            b.store(1, make(b, b.load(0, (8,))))
            function = b.function
            expected, actual = np.zeros(8, np.float32), np.zeros(8, np.float32)
            run(function, (1,), [x, expected])
            left = simplified(b)
            run(function, (1,), [x, actual])
            assert (kind in left) == (kind != "gone") and not (kind == "mul" and "div" in left)
            np.testing.assert_array_equal(actual, expected)
            assert (np.signbit(actual) == np.signbit(expected))[~np.isnan(expected)].all()


def test_constants_are_computed():
    b = Build(pointer(int32), pointer(float32))
    three, four = b.constant(3, int32), b.constant(4, int32)
    total = b("sub", b("mul", three, four), b.constant(2**31 - 1, int32))
    b.store(0, b("select", b("lt", three, four), total, three, type=int32))
    b.store(1, b("sqrt", b("cast", four, type=float32)))
    function = b.function
    assert simplified(b) == ["constant", "store", "constant", "store"]
    values = [op.attributes["value"] for op in function.body.ops if op.kind == "constant"]
    assert values == [12 - (2**31 - 1), 2.0]


def test_what_targets_decide_is_not_folded():
    for kind, left, right in (("div", 1, 0), ("rem", 1, 0), ("shl", 1, 32), ("shr", 1, -1)):
        b = Build(pointer(int32))
        b.store(0, b(kind, b.constant(left, int32), b.constant(right, int32)))
        assert kind in simplified(b)
    b = Build(pointer(int8))
    b.store(0, b("cast", b.constant(128.0, float32), type=int8))
    assert "cast" in simplified(b)


def test_lossy_round_trips_stay():
    for source, middle in (
        (int32, float32),
        (float32, float16),
        (bfloat16, float16),
        (int32, int16),
        (float32, bfloat16),
    ):
        b = Build(pointer(source), pointer(source))
        b.store(1, b("cast", b("cast", b.load(0, ()), type=middle), type=source))
        assert simplified(b).count("cast") == 2, (source, middle)


def test_uniform_tiles_become_scalars():
    b = Build(pointer(float32), float32)
    x = b.parameters[1]
    type = tile_of(float32, (2, 8))
    tile = b("splat", x, type=tile_of(float32, (8,)))
    tile = b("broadcast", b("reshape", b("exp", tile), type=tile_of(float32, (1, 8))), type=type)
    tile = b("fma", tile, tile, b.constant(2.0, type))
    b.store(0, tile)
    function = b.function
    passes.simplify(function)
    ir.verify(function)
    shapes = {op.kind: op.result.shape for op in function.body.ops if op.kind in ("exp", "fma", "splat")}
    assert shapes["exp"] == shapes["fma"] == ()
    assert "broadcast" not in kinds(function.body)
    out = np.zeros(16, np.float32)
    run(function, (1,), [out, 1.5])
    np.testing.assert_allclose(out, math.exp(1.5) ** 2 + 2, rtol=1e-6)


def test_a_load_of_one_address_is_a_scalar_load():
    b = Build(pointer(int32), pointer(int32))
    b.store(1, b("load", b("splat", b.parameters[0], type=tile_of(pointer(int32), (8,)))))
    function = b.function
    passes.simplify(function)
    ir.verify(function)
    assert next(op for op in function.body.ops if op.kind == "load").result.type == int32


def test_constant_masks():
    for value, expected in ((True, 0), (False, 1)):
        b = Build(pointer(int32), pointer(int32))
        mask = b.constant(value, tile_of(int1, (4,)))
        other = b.constant(7, tile_of(int32, (4,)))
        b.store(1, b("load", b.at(0, (4,)), mask, other, type=other.type))
        function = b.function
        passes.simplify(function)
        loads = [op for op in function.body.ops if op.kind == "load"]
        assert len(loads) == 1 - expected
        assert all(len(op.operands) == 1 for op in loads)


def test_views_collapse():
    b = Build(pointer(int32), pointer(int32))
    x = b.load(0, (2, 4, 8))
    x = b("trans", x, type=tile_of(int32, (4, 8, 2)), perm=(1, 2, 0))
    x = b("trans", x, type=tile_of(int32, (2, 4, 8)), perm=(2, 0, 1))
    x = b("reshape", b("reshape", x, type=tile_of(int32, (64,))), type=tile_of(int32, (2, 4, 8)))
    u, v = b("split", b("join", x, x, type=tile_of(int32, (2, 4, 8, 2))), type=[x.type, x.type])
    b.store(1, b("add", u, v))
    left = simplified(b)
    assert not {"trans", "join", "split"} & set(left)


# ---------------------------------------------------------------------------------------------------- control flow


def test_decided_control_flow_disappears():
    b = Build(pointer(int32))
    with b.block() as then:
        b.store(0, b.constant(1, int32))
        b("yield", b.constant(5, int32))
    with b.block() as other:
        b.store(0, b.constant(2, int32))
        b("yield", b.constant(6, int32))
    value = b("if", b.constant(False, int1), type=int32, regions=[then, other])
    for lower, upper, step in ((3, 3, 1), (5, 2, 1), (0, 2, 2), (-3, -2, 5)):
        with b.block(int32, int32) as body:
            i, carried = body.arguments
            b("yield", b("add", carried, b("add", i, b.constant(100, int32))))
        bounds = [b.constant(v, int32) for v in (lower, upper, step)]
        value = b("for", *bounds, value, type=int32, regions=[body])
    b.store(0, value)
    function = b.function
    out = np.zeros(1, np.int32)
    assert simplified(b) == ["constant", "store", "constant", "store"]
    run(function, (1,), [out])
    assert out[0] == 6 + 100 + 97


def test_carried_values_that_do_not_matter():
    b = Build(pointer(int32), int32)
    zero, one = b.constant(0, int32), b.constant(1, int32)
    with b.block(int32, int32, int32, int32, int32) as body:
        i, used, constant, dead, swapped = body.arguments
        total = b("add", b("add", used, constant), i)
        b("yield", total, constant, b("mul", swapped, i), b("add", dead, total))
    results = b("for", zero, b.parameters[1], one, zero, one, one, one, type=[int32] * 4, regions=[body])
    b.store(0, b("add", results[0], results[1]))
    function = b.function
    expected, actual = np.zeros(1, np.int32), np.zeros(1, np.int32)
    run(function, (1,), [expected, 7])
    simplified(b)
    loop = next(op for op in function.body.ops if op.kind == "for")
    assert len(loop.results) == 1 and len(loop.operands) == 4
    run(function, (1,), [actual, 7])
    assert actual[0] == expected[0] == sum(range(7)) + 7 + 1


def test_dead_results_of_while_and_if():
    b = Build(pointer(int32), int32)
    zero, one = b.constant(0, int32), b.constant(1, int32)
    with b.block(int32, int32, int32) as before:
        left, useful, useless = before.arguments
        b("condition", b("gt", left, zero), useless, left, useful)  # in another order
    with b.block(int32, int32, int32) as after:
        useless, left, useful = after.arguments
        b("yield", b("sub", left, one), b("add", useful, left), b("add", useless, useful))
    _, _, total = b("while", b.parameters[1], zero, zero, type=[int32] * 3, regions=[before, after])
    with b.block() as then:
        b("yield", b("mul", total, total), one)
    with b.block() as other:
        b("yield", total, zero)
    squared, _ = b("if", b("gt", b.parameters[1], one), type=[int32] * 2, regions=[then, other])
    b.store(0, squared)
    function = b.function
    simplified(b)
    loop, branch = (next(op for op in function.body.ops if op.kind == k) for k in ("while", "if"))
    assert (len(loop.operands), len(loop.results), len(branch.results)) == (2, 2, 1)
    out = np.zeros(1, np.int32)
    run(function, (1,), [out, 4])
    assert out[0] == 100


def test_effects_stay():
    b = Build(pointer(int32), int32)
    with b.block(int32) as body:
        b("device_print", body.arguments[0], prefix="i", hex=False)
        b("yield")
    b("for", b.constant(0, int32), b.parameters[1], b.constant(1, int32), type=(), regions=[body])
    b("assert", b("lt", b.parameters[1], b.constant(9, int32)), message="")
    b("atomic_rmw", b.parameters[0], b.parameters[1], type=int32, kind="add")
    left = simplified(b)
    assert {"for", "device_print", "assert", "atomic_rmw"} <= set(left)


# ------------------------------------------------------------------------------------- common subexpressions, motion


def test_common_subexpressions():
    b = Build(pointer(int32), int32)
    x = b.parameters[1]
    first = b("mul", x, b.constant(5, int32))
    with b.block() as then:
        b.store(0, b("add", b("mul", x, b.constant(5, int32)), b("mul", x, x)))
        b("yield")
    with b.block() as other:
        b.store(0, b("mul", x, x))  # not visible from the other branch: stays
        b("yield")
    b("if", b("gt", first, x), type=(), regions=[then, other])
    assert simplified(b).count("mul") == 3


def test_loads_are_merged_until_something_is_written():
    def loads(write):
        b = Build(pointer(int32), pointer(int32), pointer(int32))
        u = b("load", b.parameters[0])
        v = b("load", b.parameters[0])
        write(b, u)
        w = b("load", b.parameters[0])
        b.store(2, b("add", b("add", u, v), w))
        return simplified(b).count("load")

    def branch(b, u):
        with b.block() as then:
            b.store(1, u)
            b("yield")
        with b.block() as other:
            b.store(1, b("add", u, b("load", b.parameters[0])))  # as nothing is written on this way
            b("yield")
        b("if", b("gt", u, b.constant(0, int32)), type=(), regions=[then, other])

    def loop(b, u):
        with b.block(int32) as body:
            b.store(1, b("load", b.parameters[0]))  # sees what the last iteration wrote
            b("yield")
        b("for", b.constant(0, int32), u, b.constant(1, int32), type=(), regions=[body])

    assert loads(lambda b, u: None) == 1
    assert loads(lambda b, u: b.store(1, u)) == 2
    assert loads(lambda b, u: b("atomic_rmw", b.parameters[1], u, type=int32, kind="add")) == 2
    assert loads(branch) == 2
    assert loads(loop) == 3


def test_zeros_of_different_sign_are_different_constants():
    b = Build(pointer(float32), pointer(float32))
    b.store(0, b.constant(0.0, float32))
    b.store(1, b.constant(-0.0, float32))
    assert simplified(b).count("constant") == 2


def test_invariants_leave_loops():
    b = Build(pointer(int32), int32, int32)
    x, n = b.parameters[1:]
    zero, one = b.constant(0, int32), b.constant(1, int32)
    with b.block(int32, int32) as outer:
        i, total = outer.arguments
        with b.block(int32, int32) as inner:
            j, part = inner.arguments
            invariant = b("mul", x, x)
            row = b("mul", i, x)
            risky = b("div", x, n)  # n may be zero, and the loop empty
            loaded = b("load", b.parameters[0])
            terms = b("add", b("add", invariant, row), b("add", b("add", risky, loaded), j))
            b("yield", b("add", part, terms))
        b("yield", b("for", zero, n, one, total, type=int32, regions=[inner]))
    b.store(0, b("for", zero, n, one, zero, type=int32, regions=[outer]))
    function = b.function
    simplified(b)
    loop = next(op for op in function.body.ops if op.kind == "for")
    nested = next(op for op in loop.regions[0].ops if op.kind == "for")
    assert [op.kind for op in function.body.ops].count("mul") == 1
    assert [op.kind for op in loop.regions[0].ops].count("mul") == 1
    assert {"div", "load"} <= {op.kind for op in nested.regions[0].ops}
    out = np.full(1, 3, np.int32)
    run(function, (1,), [out, 5, 0])  # nothing is divided, nothing fails
    assert out[0] == 0
    out[0] = 3
    run(function, (1,), [out, 5, 2])
    assert out[0] == sum(25 + 5 * i + 2 + 3 + j for i in range(2) for j in range(2))


def test_comparisons_that_ranges_decide_are_folded():
    from nitinol.language.types import PointerType, TileType

    for kind, bound, expected in [("lt", 8, True), ("lt", 7, None), ("le", 7, True), ("ge", 0, True), ("gt", 7, False)]:
        index = ir.create("arange", [], [TileType(int32, (8,))], start=0, end=8)
        limit = ir.create("constant", [], [int32], value=bound)
        tile = ir.create("splat", [limit.result], [TileType(int32, (8,))])
        compare = ir.create(kind, [index.result, tile.result], [TileType(int1, (8,))])
        pointer = ir.Value(PointerType(int1), None, "out")
        pointers = ir.create("splat", [pointer], [TileType(PointerType(int1), (8,))])
        store = ir.create("store", [pointers.result, compare.result], [])
        block = ir.Block([], [index, limit, tile, compare, pointers, store])
        function = ir.Function("kernel", [pointer], block, [1])
        passes.simplify(function)
        assert ir.constant_of(function.body.ops[-1].operands[1]) is expected, (kind, bound)

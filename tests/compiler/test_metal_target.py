"""Kernels as Metal source on the software Metal device, against the interpreter and against NumPy."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from operation_programs import operation_programs
from random_programs import FLOATS, INTEGERS, random_program
from software_metal import Library, executable
from target_kernels import BFloat16, exchange, exchange_reference, reverse_in_place

import nitinol.language as tl
import softmetal
from nitinol.compiler import interpreter, ir, passes
from nitinol.compiler.driver import tile_ir
from nitinol.compiler.errors import CompilationError
from nitinol.compiler.gpu import compile_function
from nitinol.formats.blocks import FORMATS
from nitinol.formats.quantization import quantize
from nitinol.language.jit import specialise
from nitinol.language.types import PointerType, bfloat16, float32, float64
from nitinol.ops import attention, matvec
from nitinol.ops.activations import quantize_activations_reference
from nitinol.ops.quantized import run_arguments
from nitinol.runtime.kernel import jit
from nitinol.runtime.launch import interpret

DTYPES = (*INTEGERS, *(t for t in FLOATS if t != float64))
SIMDGROUPS = (1, 2, 4)


@pytest.fixture(autouse=True)
def plain_mode():
    yield
    softmetal.set_validation(False)
    softmetal.set_seed(0)


def compiled(kernel, name="", simdgroups=4, **arguments):
    """The kernel's executable for these arguments, and the values of its run-time parameters."""
    bound = kernel.bind((), arguments)
    signature, _ = specialise(kernel, bound)
    made = compile_function(tile_ir(kernel, signature), simdgroups=simdgroups, name=name)
    return made, [bound[parameter] for parameter, _, _ in signature.parameters]


def launch(kernel, grid=(1, 1, 1), simdgroups=4, **arguments):
    made, values = compiled(kernel, "", simdgroups, **arguments)
    Library([made]).run(made, grid, values)
    return made


@pytest.mark.parametrize("block", [8, 256])
@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_a_carried_pointer_may_be_any(block, rounds):
    rng = np.random.default_rng()
    a, b = rng.integers(-9, 9, (2, block)).astype(np.int32)
    expected, out = exchange_reference(a, b, rounds), np.full(block, 77, np.int32)
    launch(exchange, a=a, b=b, out=out, n=rounds, BLOCK=block)
    for found, wanted in zip((out, a, b), expected):
        np.testing.assert_array_equal(found, wanted)


# -------------------------------------------------------------------------------------------------- random programs


def runnable(program):
    """Whether Apple GPUs have what a random program uses: 31 buffers, atomics of 32 bits."""
    wide = any(op.kind == "atomic_rmw" and op.result.element.bits == 64 for op in ir.walk(program.function.body))
    return not wide and sum(isinstance(p.element, PointerType) for p in program.function.parameters) <= 28


def prepared(count, size, **options):
    """Random programs with their expected results and their source, each for another number of simdgroups."""
    cases = []
    while len(cases) < count:
        program = random_program(np.random.default_rng(), size, dtypes=DTYPES, **options)
        if runnable(program):
            expected = program.copies()
            interpreter.run(program.function, program.grid, expected)
            number = len(cases)
            made = executable(program.function, f"random_{number}", SIMDGROUPS[number % 3], program.aliases)
            cases.append((program, expected, made))
    return cases


def check(cases):
    library = Library([made for _, _, made in cases])
    for program, expected, made in cases:
        actual = program.copies()
        try:
            library.run(made, program.grid, actual)
            program.compare(actual, expected)
        except AssertionError as problem:
            raise AssertionError(f"{problem}\n{made.source}") from None


def test_random_programs_agree_with_the_interpreter():
    check(prepared(40, "small"))


def test_larger_random_programs_agree_with_the_interpreter():
    check(prepared(10, "medium"))


def test_random_programs_are_clean_in_validation_mode():
    cases = prepared(16, "small")
    softmetal.set_validation(True)
    softmetal.set_seed(int(np.random.default_rng().integers(1, 1000)))
    check(cases)


def parts(program, most=28):
    """The program for some of its outputs at a time, so that the buffers are enough."""
    inputs = [i for i in range(len(program.arguments)) if i not in program.outputs]
    step = most - len(inputs)
    for start in range(0, len(program.outputs), step):
        chosen = program.outputs[start : start + step]
        kept = sorted(inputs + chosen)
        dropped = {p for i, p in enumerate(program.function.parameters) if i not in kept}
        body = ir.Block(
            [], [op for op in program.function.body.ops
                 if op.kind != "store" or not dropped & {root(op.operands[0])}])  # fmt: skip
        function = ir.Function("part", [program.function.parameters[i] for i in kept], body, [1] * len(kept))
        passes.remove_dead(function)
        index = slice(start, start + step)
        yield type(program)(
            function, program.grid, [program.arguments[i] for i in kept], [kept.index(i) for i in chosen],
            program.exact[index], program.tolerance[index], program.relative[index],
        )  # fmt: skip


def root(pointer):
    while pointer.op is not None:
        pointer = pointer.op.operands[0]
    return pointer


@pytest.mark.parametrize("element", DTYPES, ids=str)
def test_every_operation_on_special_values(element):
    cases = []
    for name, whole in operation_programs(np.random.default_rng(), [element]):
        for program in parts(whole):
            if element.is_float:  # the software device's CPU, and Apple's GPUs, may flush subnormal bfloats
                tiny = [2.0**-126 if p.element.element == bfloat16 else 0.0 for p in
                        (program.function.parameters[i] for i in program.outputs)]  # fmt: skip
                program.tolerance = [max(t, least) for t, least in zip(program.tolerance, tiny)]
            expected = program.copies()
            interpreter.run(program.function, program.grid, expected)
            made = executable(program.function, re.sub(r"\W", "_", f"{name}_{len(cases)}"), SIMDGROUPS[len(cases) % 3])
            cases.append((program, expected, made))
    check(cases)


# -------------------------------------------------------------------------------------------------- single mechanisms


@jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    a = tl.load(x + offsets, mask=mask)
    b = tl.load(y + offsets, mask=mask)
    tl.store(out + offsets, a + b, mask=mask)


def test_vector_add():
    rng = np.random.default_rng()
    cases = []
    for n, block, simdgroups in [(1, 1024, 4), (992, 256, 1), (999, 256, 2), (4096, 1024, 4), (100, 16, 4)]:
        x, y = rng.standard_normal((2, n)).astype(np.float32)
        out = np.full(n, np.nan, np.float32)
        made, values = compiled(add, f"add_{n}", simdgroups, x=x, y=y, out=out, n=n, BLOCK=block)
        cases.append((made, values, (-(-n // block), 1, 1)))
    library = Library([made for made, _, _ in cases])
    for made, values, grid in cases:
        library.run(made, grid, values)
        x, y, out = values[:3]
        np.testing.assert_array_equal(out, x + y)


def test_the_source_is_named_after_the_python_and_wide_where_it_may_be():
    x = np.zeros(64, np.float32)
    aligned, _ = compiled(add, x=x, y=x, out=x, n=32, BLOCK=1024)
    ragged, _ = compiled(add, x=x, y=x, out=x, n=33, BLOCK=1024)
    assert "float4" in aligned.source and "float4" not in ragged.source  # a mask of 33 elements cuts through a vector
    lines = Path(__file__).read_text().splitlines()
    line = 1 + next(i for i, text in enumerate(lines) if text.startswith("    offsets = tl.program_id(0) * BLOCK"))
    for text in (aligned.source, ragged.source):
        assert re.search(r"int offsets\[8\]", text) and re.search(r"bool mask\[8\]", text)
        assert f"// line {line}" in text
        assert "device float *x [[buffer(0)]]" in text and "add_arguments &arguments [[buffer(3)]]" in text
    assert aligned.barriers == ragged.barriers == 0 and aligned.threadgroup_bytes == 0
    assert aligned.threads == 128


@pytest.mark.parametrize("n", [7, 128])
def test_a_store_waits_for_the_loads_of_other_threads(n):
    x = np.random.default_rng().standard_normal(n).astype(np.float32)
    expected = x[::-1].copy()
    softmetal.set_validation(True)
    made = launch(reverse_in_place, x=x, n=n, BLOCK=128)
    np.testing.assert_array_equal(x, expected)
    assert made.barriers == 1 and "mem_flags::mem_device" in made.source


@jit
def row_sums(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    tile = tl.load(x + rows[:, None] * COLUMNS + columns[None, :])
    tl.store(out + rows, tl.sum(tile, axis=1))


@pytest.mark.parametrize(
    "rows, columns, simdgroups, barriers", [(4, 128, 4, 0), (8, 64, 2, 0), (1, 1024, 1, 0), (1, 1024, 4, 1)]
)
def test_reductions_stay_in_a_simdgroup_if_rows_do(rows, columns, simdgroups, barriers):
    x = np.random.default_rng().standard_normal((rows, columns)).astype(np.float32)
    out = np.full(rows, np.nan, np.float32)
    made = launch(row_sums, x=x, out=out, ROWS=rows, COLUMNS=columns, simdgroups=simdgroups)
    # n - 1 roundings at most, of partial sums below columns * 5
    np.testing.assert_allclose(out, x.astype(np.float64).sum(axis=1), atol=5 * columns * np.log2(columns) * 2e-7)
    assert made.barriers == barriers


@jit
def loop_sums(x, out, rows, scale, start, N: tl.constexpr, SCALED: tl.constexpr, TWICE: tl.constexpr):
    columns = tl.arange(0, N)
    total = tl.zeros((2,), tl.float32) + start
    for row in range(0, rows):
        tile = tl.load(x + row * 2 * N + tl.arange(0, 2)[:, None] * N + columns[None, :])
        if SCALED:
            total = total * scale + tl.sum(tile, axis=1)
        else:
            total += tl.sum(tile, axis=1)
    if TWICE:
        for row in range(0, rows):
            total += tl.sum(tl.load(x + row * 2 * N + tl.arange(0, 2)[:, None] * N + columns[None, :]), axis=1)
    tl.store(out + tl.arange(0, 2), total)


@pytest.mark.parametrize("scaled, twice", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_sums_in_loops_meet_after_the_loop(rows, scaled, twice):
    n, scale, start = 256, 0.75, 10.0
    x = np.random.default_rng().integers(-50, 50, (max(rows, 1), 2, n)).astype(np.float32)  # sums are exact
    out = np.full(2, np.nan, np.float32)
    softmetal.set_validation(True)
    made = launch(loop_sums, simdgroups=4, x=x, out=out, rows=rows, scale=scale, start=start, N=n, SCALED=scaled,
                  TWICE=twice)  # fmt: skip
    expected = np.full(2, start)
    for row in range(rows):
        expected = expected * (scale if scaled else 1) + x[row].sum(axis=1, dtype=np.float64)
    if twice:
        expected += x[:rows].sum(axis=(0, 2), dtype=np.float64)
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-3)
    loops = re.findall(r"^    for \(int row.*?^    }$", made.source, re.M | re.S)  # none where rows is 1
    assert len(loops) == (0 if rows == 1 else 1 + twice)
    assert not any("simd_" in text or "barrier" in text for text in loops)
    if twice and loops:
        assert "simd_" not in made.source[: made.source.index(loops[1])]  # nor between them
    assert made.barriers <= 2


@jit
def sums_of_tiles(x, out, rows, N: tl.constexpr):
    at = tl.arange(0, N)
    total = tl.zeros((N,), tl.float32)
    for row in range(0, rows):
        total += tl.load(x + row * N + at)
    tl.store(out, tl.sum(total, axis=0))


def test_tiles_of_which_the_sum_is_wanted_are_summed_at_once():
    x = np.random.default_rng().integers(-50, 50, (7, 1024)).astype(np.float32)
    out = np.full(1, np.nan, np.float32)
    made = launch(sums_of_tiles, simdgroups=1, x=x, out=out, rows=7, N=1024)
    assert out[0] == x.sum(dtype=np.float64)
    assert not re.search(r"float total\w*\[", made.source)  # one number per thread, not 32


@pytest.mark.parametrize("block, dtype, simdgroups", [
    (16, "f4", 1), (256, "f4", 1), (512, "f4", 2), (1024, "f4", 4), (8192, "f4", 4), (32768, "f4", 16), (1024, "i1", 1),
])  # fmt: skip
def test_the_largest_tile_chooses_the_number_of_simdgroups(block, dtype, simdgroups):
    x = np.zeros(block, dtype)
    made = launch(copy, x=x, out=x.copy(), N=block, simdgroups=0)
    assert made.simdgroups == simdgroups


@jit
def transpose(x, out, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    tile = tl.load(x + m[:, None] * N + n[None, :])
    tl.store(out + n[:, None] * M + m[None, :], tile.trans())


@pytest.mark.parametrize("dtype", ["f4", "f2", "i1", "i8"])
@pytest.mark.parametrize("m, n", [(32, 64), (8, 8), (128, 2)])
def test_a_transposition_stores_coalesced(m, n, dtype):
    x = np.random.default_rng().integers(-99, 99, (m, n)).astype(dtype)
    out = np.zeros((n, m), dtype)
    softmetal.set_validation(True)
    launch(transpose, x=x, out=out, M=m, N=n)
    np.testing.assert_array_equal(out, x.T)


@jit
def product(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TRANSPOSED: tl.constexpr, STEP: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, STEP)
    total = tl.zeros((M, N), c.dtype.element_ty)
    for start in range(0, K, STEP):
        x = tl.load(a + m[:, None] * K + (start + k)[None, :])
        if TRANSPOSED:
            y = tl.load(b + n[:, None] * K + (start + k)[None, :]).trans()
        else:
            y = tl.load(b + (start + k)[:, None] * N + n[None, :])
        total = tl.dot(x, y, total)
    tl.store(c + m[:, None] * N + n[None, :], total)


PRODUCTS = [(8, 8, 8), (16, 64, 32), (64, 32, 16), (32, 32, 64)]
PRODUCTS += [(1, 64, 32), (4, 16, 128), (2, 2, 2), (16, 4, 16), (32, 1, 2)]


@pytest.mark.parametrize("dtypes", ["f4 f4", "f2 f2", "bf bf", "i1 i1", "u1 i1"])
def test_products_of_every_kind(dtypes):
    rng = np.random.default_rng()
    cases = []
    for number, (m, n, k) in enumerate(PRODUCTS):
        one, two = dtypes.split()

        def operand(shape, kind):
            if kind == "bf":
                bits = rng.standard_normal(shape).astype(np.float32).view(np.uint32) & 0xFFFF0000
                return bits.view(np.float32)
            if kind[0] == "f":
                return rng.standard_normal(shape).astype(kind)
            info = np.iinfo(kind)
            return rng.integers(info.min, info.max + 1, shape).astype(kind)

        a, b = operand((m, k), one), operand((k, n), two)
        c = np.full((m, n), 77, np.int32 if one[0] in "iu" else np.float32)
        transposed = bool(rng.random() < 0.5)
        memory = [a, np.ascontiguousarray(b.T) if transposed else b]
        if one == "bf":
            memory = [BFloat16((x.view(np.uint32) >> 16).astype(np.uint16)) for x in memory]
        made, values = compiled(
            product, f"product_{number}", SIMDGROUPS[number % 3], a=memory[0], b=memory[1], c=c, M=m, N=n, K=k,
            TRANSPOSED=transposed, STEP=min(k, 32),
        )  # fmt: skip
        assert ("simdgroup_multiply_accumulate" in made.source) == (m >= 8)
        cases.append((made, [getattr(v, "array", v) for v in values], a, b, c))
    library = Library([made for made, *_ in cases])
    softmetal.set_validation(True)
    for made, values, a, b, c in cases:
        library.run(made, (1, 1, 1), values)
        if c.dtype == np.int32:
            np.testing.assert_array_equal(c, a.astype(np.int64) @ b.astype(np.int64))
        else:  # k roundings of partial sums of products of standard normals
            k = a.shape[1]
            np.testing.assert_allclose(c, a.astype(np.float64) @ b.astype(np.float64), rtol=0, atol=8 * k * 2.0**-23)


@pytest.mark.parametrize("one, two, k", [("i1", "i1", 2048), ("u1", "i1", 1024), ("i1", "u1", 512), ("u1", "u1", 512)])
def test_sums_of_bytes_are_exact_at_the_extremes(one, two, k):
    """Matrices of halves add up floats: long sums must be cut before 2**24."""
    a, b = (np.full(shape, np.iinfo(kind).min or 255, kind) for shape, kind in (((8, k), one), ((k, 8), two)))
    c = np.full((8, 8), 77, np.int32)
    made = launch(product, a=a, b=b, c=c, M=8, N=8, K=k, TRANSPOSED=False, STEP=k)
    assert "simdgroup_multiply_accumulate" in made.source
    np.testing.assert_array_equal(c, a.astype(np.int64) @ b.astype(np.int64))
    a[0, 0] = b[0, 0] = 1  # odd sums: the next float would be one off
    launch(product, a=a, b=b, c=c, M=8, N=8, K=k, TRANSPOSED=False, STEP=k)
    np.testing.assert_array_equal(c, a.astype(np.int64) @ b.astype(np.int64))


@jit
def softmax(x, out, n, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    inside = columns < n
    value = tl.load(x + row * n + columns, mask=inside, other=-float("inf"))
    weight = tl.exp(value - tl.max(value, axis=0))
    tl.store(out + row * n + columns, weight / tl.sum(weight, axis=0), mask=inside)


@pytest.mark.parametrize("n", [1, 100, 1000])
def test_softmax(n):
    x = np.random.default_rng().standard_normal((3, n)).astype(np.float32)
    out = np.full((3, n), np.nan, np.float32)
    softmetal.set_validation(True)
    launch(softmax, (3, 1, 1), x=x, out=out, n=n, BLOCK=1024)
    weight = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
    np.testing.assert_allclose(out, weight / weight.sum(axis=1, keepdims=True), rtol=1e-5)  # 1e3 terms, exp to 4 ulp


@jit
def running(x, out, N: tl.constexpr, REVERSE: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.cumsum(tl.load(x + at), axis=0, reverse=REVERSE))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("n", [1, 16, 32, 1024])
def test_scans_longer_and_shorter_than_a_simdgroup(n, reverse):
    x = np.random.default_rng().integers(-100, 100, n).astype(np.int32)
    out = np.zeros(n, np.int32)
    launch(running, x=x, out=out, N=n, REVERSE=reverse)
    np.testing.assert_array_equal(out, np.cumsum(x[::-1])[::-1] if reverse else np.cumsum(x))


@jit
def tickets(counter, out, swapped, N: tl.constexpr):
    at = tl.arange(0, N)
    mine = tl.atomic_add(counter + at * 0, 1)
    tl.store(out + mine, at)
    first = tl.atomic_cas(swapped, 5, tl.program_id(0) + 10)
    tl.store(swapped + 1 + tl.program_id(0), first)


@pytest.mark.parametrize("n", [4, 256])
def test_each_element_has_one_atomic(n):
    counter, out = np.zeros(1, np.int32), np.full(n, -1, np.int32)
    swapped = np.array([5, 0, 0, 0], np.int32)
    launch(tickets, (1, 1, 1), counter=counter, out=out, swapped=swapped, N=n)
    assert counter[0] == n and sorted(out) == list(range(n))
    assert list(swapped) == [10, 5, 0, 0]


@jit
def checked(x, n, BLOCK: tl.constexpr):
    value = tl.load(x + tl.arange(0, BLOCK))
    tl.device_assert(value < n, "value too large")


def test_a_failed_device_assert_is_reported():
    x = np.arange(16, dtype=np.int32)
    launch(checked, x=x, n=16, BLOCK=16)
    with pytest.raises(AssertionError, match=r"kernel checked, .*value too large"):
        launch(checked, x=x, n=15, BLOCK=16)


@jit
def divide(x, y, quotient, remainder, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(quotient + at, tl.load(x + at) // tl.load(y + at))
    tl.store(remainder + at, tl.load(x + at) % tl.load(y + at))


def test_integer_division_is_total():
    cases = []
    for kind in ("i1", "i2", "i4", "i8", "u1", "u4", "u8"):
        info = np.iinfo(kind)
        values = np.array([0, 1, 2, 7, info.max, info.min, info.min + 1, info.max if info.min == 0 else -1], kind)
        x, y = (a.reshape(-1).copy() for a in np.meshgrid(values, values))
        results = [np.full(64, 77, kind) for _ in range(4)]
        made, values = compiled(divide, f"divide_{kind}", x=x, y=y, quotient=results[0], remainder=results[1], N=64)
        cases.append((made, values, results))
    library = Library([made for made, _, _ in cases])
    for made, values, results in cases:
        library.run(made, (1, 1, 1), values)
        with interpret():
            divide[(1,)](*values[:2], *results[2:], N=64)
        np.testing.assert_array_equal(results[0], results[2])
        np.testing.assert_array_equal(results[1], results[3])


@jit
def prints(x, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.device_print(" x", tl.load(x + at))
    tl.device_print(" first", tl.program_id(1) - 1, hex=True)


def test_prints_have_program_place_and_value(capsys):
    launch(prints, (1, 2, 1), x=np.arange(4, dtype=np.float32) - 1.5, N=4)
    found = capsys.readouterr().out.splitlines()
    tile = [f"pid (0, {y}, 0) idx ({i}) x: {i - 1.5:f}" for y in range(2) for i in range(4)]
    assert sorted(found) == sorted([*tile, "pid (0, 0, 0) idx () first: 0xffffffff", "pid (0, 1, 0) idx () first: 0x0"])


# ---------------------------------------------------------------------------------------------- kernels of the library


def test_weights_of_every_format_are_multiplied_without_a_race():
    rng = np.random.default_rng()
    rows, columns, tokens, cases = 5, 512, 1, []
    x = rng.normal(size=(tokens, columns)).astype(np.float32)
    for format in (name for name, f in FORMATS.items() if f.values > 1):
        data = quantize(rng.normal(size=(rows, columns)).astype(np.float32), format).reshape(-1).view(np.uint8)
        given = quantize_activations_reference(x)
        out = np.full((tokens, rows), np.nan, np.float32)
        made, values = compiled(
            matvec.matvec_kernel, f"matvec_{format}", SIMDGROUPS[len(cases) % 3], x=given.values, x_scales=given.scales,
            x_sums=given.sums, weights=data.copy(), up=None, bias=None, residual=None, out=out, tokens=tokens,
            rows=rows, columns=columns, row_bytes=FORMATS[format].nbytes(columns), ROWS=4, TOKENS=1, EVEN=False,
            **run_arguments(format, columns),
        )  # fmt: skip
        expected = matvec.matvec_reference(given, data, format, (rows, columns), None, None, None)
        cases.append((made, values, out, expected))
    library = Library([made for made, *_ in cases])
    softmetal.set_validation(True)
    for made, values, out, expected in cases:
        library.run(made, (2, 1, 1), values)
        # fp32 sums of `columns` products of size about 1
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5 * np.sqrt(columns))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_attention_of_a_prompt_goes_through_matrices(dtype):
    rng = np.random.default_rng()
    tokens, head_dim, heads = 40, 64, 2
    q = rng.normal(size=(tokens, heads, head_dim)).astype(np.float32)
    k, v = rng.normal(size=(2, 1, 64, head_dim)).astype(dtype)
    out = np.full((tokens, heads, head_dim), np.nan, np.float32)
    constants = attention.prefill_constants(heads, head_dim, tokens)
    made, values = compiled(
        attention.prefill_attention_kernel, q=q, k=k, v=v, position=None, out=out, tokens=tokens, context=64,
        q_token=heads * head_dim, q_head=head_dim, scale=head_dim**-0.5, **constants,
    )  # fmt: skip
    assert "simdgroup_multiply_accumulate" in made.source
    softmetal.set_validation(True)
    Library([made]).run(made, (-(-tokens // constants["BLOCK_M"]), heads, 1), values)
    expected = attention.attention_reference(q.transpose(1, 0, 2), k, v, 0, head_dim**-0.5)
    np.testing.assert_allclose(out.transpose(1, 0, 2), expected, rtol=2e-5, atol=2e-5)  # as on the CPU target


# ------------------------------------------------------------------------------------------------------------ errors


@jit
def copy(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at))


@jit
def to_double(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.sqrt(tl.load(x + at).to(tl.float64)).to(tl.float32))


@jit
def wide_atomic(x):
    tl.atomic_add(x, 1)


@jit
def gathers(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.gather(tl.load(x + at), N - 1 - at, 0))


@pytest.mark.parametrize(
    "kernel, dtype, size, message",
    [
        (copy, np.float64, 16, "no 64-bit floats"),
        (to_double, np.float32, 16, "no 64-bit floats"),
        (wide_atomic, np.int64, None, "atomic_rmw of add of int64"),
        (gathers, np.float32, 16384, "65536 bytes of threadgroup memory"),
    ],
)
def test_what_metal_lacks_is_an_error_with_the_line(kernel, dtype, size, message):
    arguments = {"x": np.zeros(16, dtype)}
    if size is not None:
        arguments |= {"out": np.zeros(16, dtype), "N": size}
    with pytest.raises(CompilationError, match=message) as caught:
        compiled(kernel, **arguments)
    assert caught.value.location.line > 0


def test_too_many_buffers_are_refused():
    parameters = [ir.Value(PointerType(float32), None, f"p{i}") for i in range(29)]
    function = ir.Function("many", parameters, ir.Block(), [1] * 29)
    with pytest.raises(CompilationError, match="29 pointer parameters and Metal kernels at most 28"):
        compile_function(function)


@pytest.mark.parametrize("simdgroups", [-1, 3, 64])
def test_a_number_of_simdgroups_that_no_device_has_is_refused(simdgroups):
    with pytest.raises(ValueError, match="power of two up to 32"):
        compile_function(ir.Function("f", [], ir.Block(), []), simdgroups=simdgroups)


def test_the_struct_of_arguments_is_laid_out_as_in_c():
    @jit
    def several(out, a: tl.int8, b: tl.int64, c: tl.float16, d, e: tl.bfloat16):
        tl.store(out, a + b + d)
        tl.store(out + 1, (c + e.to(tl.float32)).to(tl.int64))
        tl.store(out + 2, tl.num_programs(1).to(tl.int64))

    out = np.zeros(3, np.int64)
    made, values = compiled(several, out=out, a=-3, b=1 << 40, c=2.0, d=77, e=5.0)
    Library([made]).run(made, (1, 4, 1), values)
    assert list(out) == [-3 + (1 << 40) + 77, 7, 4]

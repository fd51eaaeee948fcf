"""Kernels as CUDA source: what NVRTC makes of them, and on a GPU against the interpreter and against NumPy."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from cuda_runner import Device, compile_source, compiled, compiler_missing, executable, gpu_missing
from operation_programs import operation_programs
from random_programs import FLOATS, INTEGERS, random_program
from target_kernels import BFloat16, product, reverse_in_place

import nitinol.language as tl
from nitinol.compiler import interpreter
from nitinol.compiler.gpu import cuda
from nitinol.formats.blocks import FORMATS
from nitinol.formats.quantization import quantize
from nitinol.ops import attention, matvec
from nitinol.ops.activations import quantize_activations_reference
from nitinol.ops.quantized import run_arguments
from nitinol.runtime.kernel import jit
from nitinol.runtime.launch import interpret

DTYPES = (*INTEGERS, *FLOATS)
WARPS = (1, 2, 4, 8)

needs_compiler = pytest.mark.skipif(bool(compiler_missing()), reason=compiler_missing() or "-")
needs_gpu = pytest.mark.skipif(bool(gpu_missing()), reason=gpu_missing() or "-")


@pytest.fixture(scope="module")
def device():
    return Device()


def launch(device, kernel, grid=(1, 1, 1), warps=4, **arguments):
    made, values = compiled(kernel, "", warps, **arguments)
    device.run(made, grid, values)
    return made


# -------------------------------------------------------------------------------------------------- random programs


def prepared(count, size, **options):
    """Random programs with their expected results and their source, each for another number of warps."""
    for number in range(count):
        program = random_program(np.random.default_rng(), size, dtypes=DTYPES, **options)
        expected = program.copies()
        interpreter.run(program.function, program.grid, expected)
        made = executable(program.function, f"random_{number}", WARPS[number % 4], program.aliases)
        yield program, expected, made


def check(device, cases):
    for program, expected, made in cases:
        actual = program.copies()
        try:
            device.run(made, program.grid, actual)
            program.compare(actual, expected)
        except AssertionError as problem:
            raise AssertionError(f"{problem}\n{made.source}") from None


@needs_compiler
def test_the_compiler_takes_random_programs():
    for size, count in (("small", 12), ("medium", 3)):
        for _, _, made in prepared(count, size):
            compile_source(made)


@needs_compiler
@pytest.mark.parametrize("element", DTYPES, ids=str)
def test_the_compiler_takes_every_operation(element):
    for number, (name, program) in enumerate(operation_programs(np.random.default_rng(), [element], exp_units=40)):
        compile_source(executable(program.function, re.sub(r"\W", "_", name), WARPS[number % 4]))


@needs_gpu
def test_random_programs_agree_with_the_interpreter(device):
    check(device, prepared(60, "small"))


@needs_gpu
def test_larger_random_programs_agree_with_the_interpreter(device):
    check(device, prepared(20, "medium"))


@needs_gpu
@pytest.mark.parametrize("element", DTYPES, ids=str)
def test_every_operation_on_special_values(device, element):
    for number, (name, program) in enumerate(operation_programs(np.random.default_rng(), [element], exp_units=40)):
        expected = program.copies()
        interpreter.run(program.function, program.grid, expected)
        made = executable(program.function, re.sub(r"\W", "_", name), WARPS[number % 4])
        check(device, [(program, expected, made)])


# -------------------------------------------------------------------------------------------------- single mechanisms


@jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(out + offsets, tl.load(x + offsets, mask=mask) + tl.load(y + offsets, mask=mask), mask=mask)


def test_accesses_are_wide_where_they_may_be():
    x = np.zeros(64, np.float16)
    aligned, _ = compiled(add, x=x, y=x, out=x, n=32, BLOCK=1024)
    ragged, _ = compiled(add, x=x, y=x, out=x, n=33, BLOCK=1024)
    assert "Vector<uint, 4>" in aligned.source and "*(Vector<" not in ragged.source
    assert "half *__restrict__ x" in aligned.source and "add_arguments arguments" in aligned.source
    assert aligned.barriers == 0 and aligned.threadgroup_bytes == 0 and aligned.threads == 128
    assert aligned.asm["cuda"] == aligned.source


@needs_gpu
def test_vector_add(device):
    rng = np.random.default_rng()
    for n, block, warps in [(1, 1024, 4), (992, 256, 1), (999, 256, 2), (4096, 1024, 4), (100, 16, 8)]:
        for dtype in ("f2", "f4", "f8"):
            x, y = rng.standard_normal((2, n)).astype(dtype)
            out = np.full(n, np.nan, dtype)
            launch(device, add, (-(-n // block), 1, 1), warps, x=x, y=y, out=out, n=n, BLOCK=block)
            np.testing.assert_array_equal(out, x + y)


@jit
def layer_norm(x, weight, bias, out, columns, BLOCK: tl.constexpr):
    row, j = tl.program_id(0) * columns, tl.arange(0, BLOCK)
    mask = j < columns
    values = tl.load(x + row + j, mask=mask, other=0.0).to(tl.float32)
    centred = tl.where(mask, values - tl.sum(values, axis=0) / columns, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=0) / columns + 1e-5)
    weights = tl.load(weight + j, mask=mask, other=0.0).to(tl.float32)
    biases = tl.load(bias + j, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row + j, (centred * scale * weights + biases).to(tl.bfloat16), mask=mask)


@needs_compiler
def test_rows_of_halves_take_few_registers():
    """40 or fewer with NVRTC 12.9, with which 6 blocks fit a multiprocessor of an H200. It was 54 when NVRTC kept each
    number of a vector under a condition in a register of its own; 48 leaves room for other versions."""
    pointers = {name: BFloat16(np.zeros(64, np.uint16)) for name in ("x", "weight", "bias", "out")}
    made, _ = compiled(layer_norm, "", 8, **pointers, columns=4096, BLOCK=4096)
    code = compile_source(made)
    (registers,) = re.findall(rb"\x04\x2f\x08\x00.{4}(.{4})", code, re.DOTALL)  # EIATTR_REGCOUNT: symbol, number
    assert int.from_bytes(registers, "little") <= 48


@needs_gpu
@pytest.mark.parametrize("n", [7, 128])
def test_a_store_waits_for_the_loads_of_other_threads(device, n):
    x = np.random.default_rng().standard_normal(n).astype(np.float32)
    expected = x[::-1].copy()
    made = launch(device, reverse_in_place, x=x, n=n, BLOCK=128)
    np.testing.assert_array_equal(x, expected)
    assert made.barriers == 1 and "__syncthreads();" in made.source


@jit
def transpose(x, out, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    tile = tl.load(x + m[:, None] * N + n[None, :])
    tl.store(out + n[:, None] * M + m[None, :], tile.trans())


@needs_gpu
@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", "i1", "i8"])
@pytest.mark.parametrize("m, n", [(32, 64), (8, 8), (128, 2), (128, 256)])
def test_transpositions(device, m, n, dtype):
    x = np.random.default_rng().integers(-99, 99, (m, n)).astype(dtype)
    out = np.zeros((n, m), dtype)
    launch(device, transpose, x=x, out=out, M=m, N=n)
    np.testing.assert_array_equal(out, x.T)


PRODUCTS = [(8, 8, 8), (16, 64, 32), (64, 32, 16), (32, 32, 64), (128, 128, 256), (64, 128, 384), (128, 64, 64)]
PRODUCTS += [(1, 64, 32), (4, 16, 128), (2, 2, 2), (16, 4, 16), (32, 1, 2), (256, 16, 128), (16, 256, 64)]
PRODUCTS += [(64, 64, 128), (64, 256, 64), (256, 128, 192)]


def operands(rng, m, n, k, dtypes):
    def operand(shape, kind):
        if kind == "bf":
            bits = rng.standard_normal(shape).astype(np.float32).view(np.uint32) & 0xFFFF0000
            return bits.view(np.float32)
        if kind[0] == "f":
            return rng.standard_normal(shape).astype(kind)
        info = np.iinfo(kind)
        return rng.integers(info.min, info.max + 1, shape).astype(kind)

    one, two = dtypes.split()[:2]
    return operand((m, k), one), operand((k, n), two)


def product_case(rng, m, n, k, dtypes, warps, step):
    """Executable, values of its parameters, a, b, c."""
    a, b = operands(rng, m, n, k, dtypes)
    c = np.full((m, n), 77, {"i": np.int32, "u": np.int32}.get(dtypes[0], np.float64 if "8" in dtypes else np.float32))
    turned = [bool(rng.random() < 0.5) for _ in range(2)]
    memory = [np.ascontiguousarray(x.T) if t else x for x, t in zip((a, b), turned)]
    if dtypes.startswith("bf"):
        memory = [BFloat16((x.view(np.uint32) >> 16).astype(np.uint16)) for x in memory]
    made, values = compiled(
        product, "product", warps, a=memory[0], b=memory[1], c=c, K=k, M=m, N=n, A_TURNED=turned[0],
        B_TURNED=turned[1], STEP=step, PRECISION="tf32" if dtypes.endswith("tf") else "ieee",
    )  # fmt: skip
    return made, [getattr(v, "array", v) for v in values], a, b, c


KINDS = ["f4 f4", "f4 f4 tf", "f2 f2", "bf bf", "i1 i1", "u1 i1", "f8 f8"]


@needs_compiler
@pytest.mark.parametrize("dtypes", KINDS)
def test_the_compiler_takes_products(dtypes):
    rng = np.random.default_rng()
    for m, n, k in PRODUCTS[3:6]:
        compile_source(product_case(rng, m, n, k, dtypes, int(rng.choice(WARPS)), min(k, 64))[0])


def large_product(**options):
    a, c = np.zeros(128 * 128 + 8, np.float16)[:16384].reshape(128, 128), np.zeros((128, 128), np.float32)
    while a.ctypes.data % 16:  # copies go 16 bytes at a time
        a = np.zeros((128, 128), np.float16)
    return compiled(
        product, "product", 4, a=a, b=a, c=c, K=128, M=128, N=128, A_TURNED=False, B_TURNED=False, STEP=64,
        PRECISION=None, **options,
    )[0]  # fmt: skip


def test_products_go_through_the_instructions_that_a_gpu_has():
    hopper, ampere = large_product(), large_product(dialect=cuda.for_capability(86))
    assert "wgmma_fp16_128_memory<0, 1>" in hopper.source and "ldmatrix" not in hopper.source
    assert "mma_fp16_16(" in ampere.source and "ldmatrix_x4_trans(" in ampere.source and "wgmma" not in ampere.source
    assert ampere.threadgroup_bytes <= 99 * 1024 and hopper.threadgroup_bytes <= 227 * 1024
    for made in (hopper, ampere):
        assert "cp_async(" in made.source
    assert "cp_async(" not in large_product(stages=1).source
    with pytest.raises(ValueError, match=r"7\.5 is too old"):
        cuda.for_capability(75)


@needs_compiler
def test_the_compiler_takes_older_architectures():
    assert b"product" in compile_source(large_product(dialect=cuda.for_capability(80)), "sm_80")


@needs_compiler
def test_products_by_warp_groups_are_not_serialised():
    log: list[str] = []
    compile_source(large_product(), "sm_90a", log)
    assert "serialized" not in log[0]


@needs_gpu
@pytest.mark.parametrize("dtypes", KINDS)
def test_products_of_every_kind(device, dtypes):
    rng = np.random.default_rng()
    for m, n, k in PRODUCTS * 3:
        steps = [s for s in (16, 32, 64, 128) if k % s == 0 or k < s]
        warps, step = int(rng.choice(WARPS)), min(k, int(rng.choice(steps)))
        # A layout may send the result, or both operands, through shared memory.
        if dtypes == "f8 f8" and 8 * max(m * n, (m + n) * step) > cuda.SHARED_LIMIT:
            continue
        made, values, a, b, c = product_case(rng, m, n, k, dtypes, warps, step)
        device.run(made, (1, 1, 1), values)
        told = f"{dtypes} {m}x{n}x{k}, {warps} warps, step {step}\n{made.source}"
        if c.dtype == np.int32:
            np.testing.assert_array_equal(c, a.astype(np.int64) @ b.astype(np.int64), told)
        else:  # k roundings of partial sums of products of standard normals; of operands to 10 bits
            atol = 8 * k * 2.0**-23 + (2.0**-9 * 8 * np.sqrt(k) if dtypes.endswith("tf") else 0.0)
            exact = a.astype(np.float64) @ b.astype(np.float64)
            np.testing.assert_allclose(c, exact, rtol=0, atol=atol, err_msg=told)


# ------------------------------------------------------------------------------------------------ products of bytes

PLACES = [(0, 2), (1, 3), (2, 0), (0, 1), (3, 0)]


@jit
def two_products(a, b, out, N: tl.constexpr, PLACES: tl.constexpr):
    """out[p, q, i] = a[i, p[0]] * b[i, q[0]] + a[i, p[1]] * b[i, q[1]], and with a shifted, for places p and q."""
    at = tl.arange(0, N)
    left, right = four_bytes(a, at, N), four_bytes(b, at, N)
    for p in tl.static_range(len(PLACES)):
        for q in tl.static_range(len(PLACES)):
            for shift in tl.static_range(2):
                one, two = left[PLACES[p][0]] >> (4 * shift), left[PLACES[p][1]] >> (4 * shift)
                total = one.to(tl.int32) * right[PLACES[q][0]].to(tl.int32)
                total += two.to(tl.int32) * right[PLACES[q][1]].to(tl.int32)
                tl.store(out + ((p * len(PLACES) + q) * 2 + shift) * N + at, total)


@jit
def four_bytes(pointer, at, N: tl.constexpr):
    values = tl.load(pointer + at[:, None] * 4 + tl.arange(0, 4)[None, :])
    even, odd = tl.split(tl.reshape(values, (N, 2, 2)))
    (first, third), (second, fourth) = tl.split(even), tl.split(odd)
    return first, second, third, fourth


def bytes_case(rng, kind, n=128):
    low, high = np.iinfo(kind).min, np.iinfo(kind).max
    a, b = rng.integers(low, high, (2, n, 4), kind, endpoint=True)
    out = np.full((len(PLACES), len(PLACES), 2, n), 77, np.int32)
    return a, b, out, compiled(two_products, "", 1, a=a, b=b, out=out, N=n, PLACES=tuple(PLACES))


@needs_compiler
@pytest.mark.parametrize("kind", [np.int8, np.uint8])
def test_the_compiler_makes_no_sums_of_products_of_bytes_itself(kind):
    """It does it wrongly for a[0] * b[0] + a[2] * b[2] of signed bytes, where it takes words for halves."""
    text = compile_source(bytes_case(np.random.default_rng(), kind)[3][0], "compute_90a").decode()
    assert "mad.lo" in text and "dp2a" not in text and "dp4a" not in text


@needs_gpu
@pytest.mark.parametrize("kind", [np.int8, np.uint8])
def test_sums_of_two_products_of_bytes(device, kind):
    a, b, out, (made, values) = bytes_case(np.random.default_rng(), kind)
    device.run(made, (1, 1, 1), values)
    wide = a.astype(np.int32), (a >> 4).astype(np.int32), b.astype(np.int32)
    for (p, left), (q, right) in itertools.product(enumerate(PLACES), repeat=2):
        for shift in (0, 1):
            expected = (wide[shift][:, left] * wide[2][:, right]).sum(axis=1)
            np.testing.assert_array_equal(out[p, q, shift], expected, f"{left} {right} {shift}\n{made.source}")


@needs_gpu
@pytest.mark.parametrize("m, n, k", [(16, 2, 2), (4, 4, 2), (8, 2, 4), (2, 16, 2)])
def test_small_products_of_bytes(device, m, n, k):
    """Without matrix instructions: too few rows or columns for them."""
    rng = np.random.default_rng()
    for _ in range(4):
        made, values, a, b, c = product_case(rng, m, n, k, "i1 i1", int(rng.choice(WARPS)), k)
        device.run(made, (1, 1, 1), values)
        np.testing.assert_array_equal(c, a.astype(np.int64) @ b.astype(np.int64), made.source)


@jit
def quotients(x, divisors, out, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + at, tl.load(x + at) / tl.load(divisors + tl.program_id(0)))


@needs_gpu
def test_many_numbers_divided_by_one_are_rounded_once(device):
    rng, n = np.random.default_rng(), 256
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3e38, -1e-38, 2.0**60, 2.0**-60, 2.0**-61, 1.0]
    divisors = (rng.standard_normal(64) * 2.0 ** rng.integers(-50, 50, 64)).astype(np.float32)
    divisors = np.concatenate([divisors, np.array(special, np.float32)])
    x = (rng.standard_normal((len(divisors), n)) * 2.0 ** rng.integers(-80, 80, (len(divisors), n))).astype(np.float32)
    x[::2, : len(special)] = special
    x[1::4] = rng.standard_normal(x[1::4].shape)
    out = np.full_like(x, 77)
    launch(device, quotients, (len(divisors), 1, 1), x=x, divisors=divisors, out=out, N=n)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(out, x / divisors[:, None])


@jit
def softmax(x, out, n, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    inside = columns < n
    value = tl.load(x + row * n + columns, mask=inside, other=-float("inf"))
    weight = tl.exp(value - tl.max(value, axis=0))
    tl.store(out + row * n + columns, weight / tl.sum(weight, axis=0), mask=inside)


@needs_gpu
@pytest.mark.parametrize("n", [1, 100, 1000])
def test_softmax(device, n):
    x = np.random.default_rng().standard_normal((3, n)).astype(np.float32)
    out = np.full((3, n), np.nan, np.float32)
    launch(device, softmax, (3, 1, 1), x=x, out=out, n=n, BLOCK=1024)
    weight = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
    np.testing.assert_allclose(out, weight / weight.sum(axis=1, keepdims=True), rtol=1e-5)  # 1e3 terms, exp to 4 ulp


@jit
def running(x, out, N: tl.constexpr, REVERSE: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.cumsum(tl.load(x + at), axis=0, reverse=REVERSE))


@needs_gpu
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("n", [1, 16, 32, 1024])
def test_scans_longer_and_shorter_than_a_warp(device, n, reverse):
    x = np.random.default_rng().integers(-100, 100, n).astype(np.int32)
    out = np.zeros(n, np.int32)
    launch(device, running, x=x, out=out, N=n, REVERSE=reverse)
    np.testing.assert_array_equal(out, np.cumsum(x[::-1])[::-1] if reverse else np.cumsum(x))


@jit
def tickets(counter, out, swapped, N: tl.constexpr):
    at = tl.arange(0, N)
    mine = tl.atomic_add(counter + at * 0, 1)
    tl.store(out + mine, at.to(out.dtype.element_ty))
    first = tl.atomic_cas(swapped, 5, tl.program_id(0) + 10)
    tl.store(swapped + 1 + tl.program_id(0), first)


@needs_gpu
@pytest.mark.parametrize("kind", ["i4", "i8", "u4", "u8"])
@pytest.mark.parametrize("n", [4, 256])
def test_each_element_has_one_atomic(device, n, kind):
    counter, out = np.zeros(1, kind), np.full(n, 99, np.int32)
    swapped = np.array([5, 0, 0, 0], kind)
    launch(device, tickets, counter=counter, out=out, swapped=swapped, N=n)
    assert counter[0] == n and sorted(out) == list(range(n))
    assert list(swapped) == [10, 5, 0, 0]


@jit
def atomics(x, sums, highest, lowest, replaced, N: tl.constexpr):
    value = tl.load(x + tl.arange(0, N))
    zero = tl.arange(0, N) * 0
    tl.atomic_add(sums + zero, value)
    if highest is not None:
        tl.atomic_max(highest + zero, value)
        tl.atomic_min(lowest + zero, value)
        tl.atomic_xchg(replaced + zero, value)


@needs_gpu
@pytest.mark.parametrize("kind", ["f2", "f4", "f8", "i4", "u4", "i8", "u8", "bf"])
def test_atomics_of_every_type(device, kind):
    x = np.random.default_rng().permutation(16).astype("f4" if kind == "bf" else kind)
    arrays = [x, *(np.array([start], x.dtype) for start in (0, 0, 99, 99))]
    if kind == "bf":
        arrays = [(a.view(np.uint32) >> 16).astype(np.uint16) for a in arrays]
    given = [BFloat16(a) for a in arrays] if kind == "bf" else list(arrays)
    if kind in ("bf", "f2"):
        given[2:] = [None, None, None]
    made, values = compiled(atomics, **dict(zip(("x", "sums", "highest", "lowest", "replaced"), given)), N=16)
    device.run(made, (1, 1, 1), [getattr(v, "array", v) for v in values])
    if kind == "bf":
        assert (arrays[1].astype(np.uint32) << 16).view(np.float32)[0] == 120
    else:
        assert arrays[1][0] == 120  # exact in every type
    if kind not in ("bf", "f2"):
        assert [a[0] for a in arrays[2:4]] == [15, 0] and arrays[4][0] in x


@jit
def asserted(x, n, BLOCK: tl.constexpr):
    value = tl.load(x + tl.arange(0, BLOCK))
    tl.device_assert(value < n, "value too large")


@needs_gpu
def test_a_failed_device_assert_is_reported(device):
    x = np.arange(16, dtype=np.int32)
    launch(device, asserted, x=x, n=16, BLOCK=16)
    with pytest.raises(AssertionError, match=r"kernel asserted, .*value too large"):
        launch(device, asserted, x=x, n=15, BLOCK=16)


@jit
def divide(x, y, quotient, remainder, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(quotient + at, tl.load(x + at) // tl.load(y + at))
    tl.store(remainder + at, tl.load(x + at) % tl.load(y + at))


@needs_gpu
@pytest.mark.parametrize("kind", ["i1", "i2", "i4", "i8", "u1", "u4", "u8"])
def test_integer_division_is_total(device, kind):
    info = np.iinfo(kind)
    values = np.array([0, 1, 2, 7, info.max, info.min, info.min + 1, info.max if info.min == 0 else -1], kind)
    x, y = (a.reshape(-1).copy() for a in np.meshgrid(values, values))
    results = [np.full(64, 77, kind) for _ in range(4)]
    launch(device, divide, x=x, y=y, quotient=results[0], remainder=results[1], N=64)
    with interpret():
        divide[(1,)](x, y, *results[2:], N=64)
    np.testing.assert_array_equal(results[0], results[2])
    np.testing.assert_array_equal(results[1], results[3])


@jit
def prints(x, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.device_print(" x", tl.load(x + at))
    tl.device_print(" first", tl.program_id(1) - 1, hex=True)


@needs_gpu
def test_prints_have_program_place_and_value(device, capsys):
    launch(device, prints, (1, 2, 1), x=np.arange(4, dtype=np.float32) - 1.5, N=4)
    found = capsys.readouterr().out.splitlines()
    tile = [f"pid (0, {y}, 0) idx ({i}) x: {i - 1.5:f}" for y in range(2) for i in range(4)]
    assert sorted(found) == sorted([*tile, "pid (0, 0, 0) idx () first: 0xffffffff", "pid (0, 1, 0) idx () first: 0x0"])


@needs_gpu
def test_the_struct_of_arguments_is_laid_out_as_in_c(device):
    @jit
    def several(out, a: tl.int8, b: tl.int64, c: tl.float16, d, e: tl.bfloat16, f: tl.float64):
        tl.store(out, a + b + d)
        tl.store(out + 1, (c + e.to(tl.float32) + f).to(tl.int64))
        tl.store(out + 2, tl.num_programs(1).to(tl.int64))

    out = np.zeros(3, np.int64)
    made, values = compiled(several, out=out, a=-3, b=1 << 40, c=2.0, d=77, e=5.0, f=9.0)
    device.run(made, (1, 4, 1), values)
    assert list(out) == [-3 + (1 << 40) + 77, 16, 4]


# ---------------------------------------------------------------------------------------------- kernels of the library


def matvec_cases(rng):
    rows, columns, tokens = 5, 512, 1
    x = rng.normal(size=(tokens, columns)).astype(np.float32)
    for number, format in enumerate(name for name, f in FORMATS.items() if f.values > 1):
        data = quantize(rng.normal(size=(rows, columns)).astype(np.float32), format).reshape(-1).view(np.uint8)
        given = quantize_activations_reference(x)
        out = np.full((tokens, rows), np.nan, np.float32)
        made, values = compiled(
            matvec.matvec_kernel, f"matvec_{format}", WARPS[number % 4], x=given.values, x_scales=given.scales,
            x_sums=given.sums, weights=data.copy(), up=None, bias=None, residual=None, out=out, tokens=tokens,
            rows=rows, columns=columns, row_bytes=FORMATS[format].nbytes(columns), ROWS=4, TOKENS=1, EVEN=False,
            **run_arguments(format, columns),
        )  # fmt: skip
        expected = matvec.matvec_reference(given, data, format, (rows, columns), None, None, None)
        yield made, values, out, expected


@needs_compiler
def test_the_compiler_takes_products_with_weights_of_every_format():
    for made, *_ in matvec_cases(np.random.default_rng()):
        compile_source(made)


@needs_gpu
def test_weights_of_every_format_are_multiplied(device):
    for made, values, out, expected in matvec_cases(np.random.default_rng()):
        device.run(made, (2, 1, 1), values)
        atol = 1e-5 * np.sqrt(512)  # fp32 sums of 512 products
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=atol, err_msg=f"{made.name}\n{made.source}")


def attention_case(rng, dtype, warps):
    tokens, head_dim, heads = 40, 64, 2
    q = rng.normal(size=(tokens, heads, head_dim)).astype(np.float32)
    k, v = rng.normal(size=(2, 1, 64, head_dim)).astype(dtype)
    out = np.full((tokens, heads, head_dim), np.nan, np.float32)
    constants = attention.prefill_constants(heads, head_dim, tokens)
    made, values = compiled(
        attention.prefill_attention_kernel, "", warps, q=q, k=k, v=v, position=None, out=out, tokens=tokens, context=64,
        q_token=heads * head_dim, q_head=head_dim, scale=head_dim**-0.5, **constants,
    )  # fmt: skip
    expected = attention.attention_reference(q.transpose(1, 0, 2), k, v, 0, head_dim**-0.5)
    return made, values, (-(-tokens // constants["BLOCK_M"]), heads, 1), out, expected


@needs_compiler
def test_the_compiler_takes_attention():
    compile_source(attention_case(np.random.default_rng(), np.float16, 4)[0])


@needs_gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("warps", WARPS)
def test_attention_of_a_prompt(device, dtype, warps):
    made, values, grid, out, expected = attention_case(np.random.default_rng(), dtype, warps)
    device.run(made, grid, values)
    np.testing.assert_allclose(out.transpose(1, 0, 2), expected, rtol=2e-5, atol=2e-5)  # as on the CPU target

"""The CPU target against the interpreter, on random tile programs and on kernels aimed at single mechanisms."""

from __future__ import annotations

import os
import subprocess
import sys

import native
import numpy as np
import pytest
from random_programs import random_program
from target_kernels import exchange, exchange_reference, reverse_in_place

import nitinol
import nitinol.language as tl
from nitinol import Output, launch
from nitinol.compiler import interpreter
from nitinol.compiler.cpu import streaming
from nitinol.runtime.kernel import jit
from nitinol.runtime.launch import interpret

pytestmark = pytest.mark.cpu


def fresh_program(size):
    """A random program of a seed that is new at every run; pytest shows what is printed if the test fails."""
    seed = np.random.SeedSequence().generate_state(1)[0]
    print(f"random_program(np.random.default_rng({seed}), {size!r})")
    return random_program(np.random.default_rng(seed), size)


@pytest.mark.parametrize("number", range(60))
def test_random_programs_agree_with_the_interpreter(number, monkeypatch):
    if number % 2:  # results of any size go around the caches
        monkeypatch.setattr(streaming, "RESULT_BYTES", 1)
    program = fresh_program("small")
    expected, actual = program.copies(), program.copies()
    interpreter.run(program.function, program.grid, expected)
    native.run(program.function, program.grid, actual)
    program.compare(actual, expected)


@pytest.mark.parametrize("number", range(8))
def test_larger_random_programs_agree_with_the_interpreter(number):
    program = fresh_program("medium")
    expected, actual = program.copies(), program.copies()
    interpreter.run(program.function, program.grid, expected)
    native.run(program.function, program.grid, actual)
    program.compare(actual, expected)


@pytest.mark.parametrize("n", [1, 7, 63, 64, 100, 128])
def test_loads_come_before_the_store_that_overwrites_them(n):
    x = np.random.default_rng().standard_normal(n).astype(np.float32)
    expected = x[::-1].copy()
    reverse_in_place[(1,)](x, n, BLOCK=128)
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("block", [8, 64, 1024])
@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_a_carried_pointer_may_be_any(block, rounds):
    rng = np.random.default_rng()
    a, b = rng.integers(-9, 9, (2, block)).astype(np.int32)
    expected, out = exchange_reference(a, b, rounds), np.full(block, 77, np.int32)
    exchange[(1,)](a, b, out, rounds, BLOCK=block)
    for found, wanted in zip((out, a, b), expected):
        np.testing.assert_array_equal(found, wanted)


@jit
def shift(source, target, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(target + offsets, tl.load(source + offsets, mask=offsets < n), mask=offsets < n)


def test_overlapping_arguments_are_not_taken_for_distinct():
    memory = np.arange(512, dtype=np.float32)
    expected = memory[:500].copy()
    shift[(1,)](memory[:500], memory[3:503], 500, BLOCK=512)
    np.testing.assert_array_equal(memory[3:503], expected)


@jit
def product(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TRANSPOSED: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + m[:, None] * K + k[None, :])
    if TRANSPOSED:
        y = tl.load(b + n[:, None] * K + k[None, :]).trans()
    else:
        y = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(c + m[:, None] * N + n[None, :], tl.dot(x, y))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("m, n, k", [(16, 16, 16), (1, 32, 64), (64, 1, 8), (32, 64, 32), (2, 8, 128), (128, 32, 4)])
@pytest.mark.parametrize("dtypes", ["i1 i1", "u1 i1", "i1 u1", "u1 u1", "f4 f4", "f2 f2", "f8 f8"])
def test_products_of_every_kind(dtypes, m, n, k, transposed):
    rng = np.random.default_rng()
    one, two = (np.dtype(d) for d in dtypes.split())

    def operand(shape, dtype):
        if dtype.kind == "f":
            return rng.standard_normal(shape).astype(dtype)
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max + 1, shape).astype(dtype)

    a, b = operand((m, k), one), operand((k, n), two)
    kind = np.int32 if one.kind in "iu" else np.float64 if one.itemsize == 8 else np.float32
    c = np.full((m, n), 77, kind)
    product[(1,)](a, np.ascontiguousarray(b.T) if transposed else b, c, M=m, N=n, K=k, TRANSPOSED=transposed)
    wide = np.int64 if one.kind in "iu" else np.float64
    expected = a.astype(wide) @ b.astype(wide)
    if wide is np.int64:
        np.testing.assert_array_equal(c, expected)
    else:  # k roundings of products of two standard normals, in c's precision
        np.testing.assert_allclose(c, expected, rtol=0, atol=8 * k * np.finfo(kind).eps)


@jit
def accumulate(x, y, out, steps, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    pointers = x + offsets
    total = tl.zeros([BLOCK], tl.float32)
    other = tl.full([BLOCK], 1.0, tl.float32)
    for _ in range(steps):
        value = tl.load(pointers)
        total, other = other + value, total * 0.5  # each needs the other's old value
        pointers += BLOCK
    tl.store(out + offsets, total)
    tl.store(y + offsets, other)


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("block", [4, 64, 2048])
def test_carried_tiles_may_exchange_values(block, steps):
    rng = np.random.default_rng()
    x = rng.standard_normal((max(steps, 1), block)).astype(np.float32)
    total, other = np.zeros(block, np.float32), np.ones(block, np.float32)
    for i in range(steps):
        total, other = other + x[i], total * np.float32(0.5)
    out, y = np.full(block, np.nan, np.float32), np.full(block, np.nan, np.float32)
    accumulate[(1,)](x, y, out, steps, BLOCK=block)
    np.testing.assert_array_equal(out, total)
    np.testing.assert_array_equal(y, other)


@jit
def checked(x, n, BLOCK: tl.constexpr):
    value = tl.load(x + tl.arange(0, BLOCK))
    tl.device_assert(value < n, "value too large")


def test_a_failed_device_assert_raises():
    x = np.arange(16, dtype=np.int32)
    checked[(1,)](x, 16, BLOCK=16)
    with pytest.raises(Exception, match="value too large"):
        checked[(1,)](x, 15, BLOCK=16)
    checked[(1,)](x, 16, BLOCK=16)  # the device goes on


def test_what_was_made_can_be_read():
    compiled = product.warmup(tl.float32, tl.float32, tl.float32, M=16, N=16, K=16, TRANSPOSED=False)
    assert "dot" in compiled.asm["ir"]
    assert "define void @" in compiled.asm["llvm"]
    assert "ret" in compiled.asm["asm"]


def test_interpreted_and_compiled_launches_give_the_same():
    x = np.random.default_rng().standard_normal(100).astype(np.float32)
    one, two = x.copy(), x.copy()
    reverse_in_place[(1,)](one, 100, BLOCK=128)
    with interpret():
        reverse_in_place[(1,)](two, 100, BLOCK=128)
    np.testing.assert_array_equal(one, two)


ENDLESS = """
import os, signal, sys, threading, time
import numpy as np
import nitinol.language as tl
from nitinol.runtime.cpu import CpuDevice
from nitinol.runtime import set_device
from nitinol.runtime.kernel import jit

@jit
def endless(x):
    while tl.load(x) == 0.0:
        tl.atomic_add(x + 1, 1.0)

@jit
def many(x):
    tl.store(x + tl.program_id(0) % 2, tl.program_id(1).to(tl.float32))

set_device(CpuDevice(int(sys.argv[1])))
x = np.ones(2, np.float32)
endless[(1,)](x)  # compiled
many[(1, 1)](x)
x[:] = 0
def interrupt():
    time.sleep(0.3)
    global sent
    sent = time.monotonic()
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    endless[(1,)](x) if sys.argv[2] == "while" else many[(2**16, 2**14 - 1, 2)](x)
except KeyboardInterrupt:
    print(time.monotonic() - sent, flush=True)
    os._exit(0)
print("ended")
"""


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("what", ["while", "grid"])
def test_ctrl_c_ends_the_wait_for_what_takes_forever(tmp_path, what, threads):
    path = tmp_path / "endless.py"
    path.write_text(ENDLESS)
    done = subprocess.run([sys.executable, str(path), str(threads), what], capture_output=True, text=True, timeout=60)
    # 50 ms for the slice of the wait, and as much again until this process gets a processor: cores are shared.
    assert done.stderr == "" and float(done.stdout) < 0.2, done.stderr


@jit
def first_lanes(x, out, N: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    value = tl.load(x + offsets).to(out.dtype.element_ty)
    tl.store(out + offsets, value, mask=offsets < N)


@pytest.mark.parametrize("kind", [np.int8, np.int16, np.int32, np.float16])
@pytest.mark.parametrize("block", [4, 8, 16, 32, 64])
@pytest.mark.parametrize("n", [1, 3])
def test_a_masked_store_of_narrowed_lanes_leaves_the_others_alone(kind, block, n):
    x = np.random.default_rng().integers(-1000, 1000, block).astype(np.int32)
    out = np.full(block, 77, kind)
    first_lanes[(1,)](x, out, N=n, BLOCK=block)
    np.testing.assert_array_equal(out, np.concatenate([x[:n].astype(kind), np.full(block - n, 77, kind)]))


@jit
def divide(x, y, quotient, remainder, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(quotient + i, tl.load(x + i) // tl.load(y + i))
    tl.store(remainder + i, tl.load(x + i) % tl.load(y + i))


@pytest.mark.parametrize("kind", [np.int8, np.int32, np.int64, np.uint8, np.uint32])
def test_integer_division_is_total(kind):
    info = np.iinfo(kind)
    minus_one = info.max if info.min == 0 else -1
    values = np.array([0, 1, 2, 7, info.max, info.min, info.min + 1, minus_one], kind)
    x, y = (a.reshape(-1).copy() for a in np.meshgrid(values, values))
    results = [np.full(64, 77, kind) for _ in range(4)]
    divide[(1,)](x, y, *results[:2], BLOCK=64)
    with interpret():
        divide[(1,)](x, y, *results[2:], BLOCK=64)
    np.testing.assert_array_equal(results[0], results[2])
    np.testing.assert_array_equal(results[1], results[3])
    np.testing.assert_array_equal(results[0][y == 0], 0)


@jit
def convert(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@pytest.mark.parametrize("source", ["f2", "f4", "f8"])
@pytest.mark.parametrize("result", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"])
def test_floats_become_integers_by_saturating(source, result):
    rng = np.random.default_rng()
    bounds = [s * 2.0**b for s in (1, -1) for b in (7, 8, 15, 16, 31, 32, 63, 64)]
    special = [np.nan, np.inf, -np.inf, 0.0, -0.0, 0.5, -0.5, -1.0, 254.5, -128.5, *bounds]
    with np.errstate(over="ignore"):
        exact = np.array(special, source)
        near = [np.nextafter(exact, np.array(s, source)) for s in (np.inf, -np.inf)]
        others = (rng.standard_normal(256) * 2.0 ** rng.integers(0, 70, 256)).astype(source)
    x = np.concatenate([exact, *near, others])[:256]
    x = np.concatenate([x, others[: 256 - len(x)]])
    one, two = np.full(256, 77, result), np.full(256, 77, result)
    convert[(1,)](x, one, BLOCK=256)
    with interpret():
        convert[(1,)](x, two, BLOCK=256)
    np.testing.assert_array_equal(one, two)
    assert one[0] == 0 and one[1] == np.iinfo(result).max and one[2] == np.iinfo(result).min


@jit
def scaled(x, out, n, BLOCK: tl.constexpr, UPDATE: tl.constexpr = False, COUNT: tl.constexpr = False):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = 2 * tl.load(x + i, mask=i < n)
    if UPDATE:
        value += tl.load(out + i, mask=i < n)
    if COUNT:
        tl.atomic_add(x + n, 1)
    tl.store(out + i, value, mask=i < n)


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_large_results_go_around_the_caches_wherever_they_begin(kind):
    rng = np.random.default_rng()
    n = streaming.RESULT_BYTES // np.dtype(kind).itemsize + 1234
    x = rng.integers(-60, 60, n).astype(kind)
    for elements in (0, int(rng.integers(1, 32))):  # from the beginning of a line on
        out = np.full(n + 128, 77, kind)
        offset = -out.ctypes.data % 64 // out.itemsize + elements
        scaled[(-(-n // 4096),)](x, out[offset:], n, BLOCK=4096)
        np.testing.assert_array_equal(out[offset : offset + n], 2 * x)
        assert (out[:offset] == 77).all() and (out[offset + n :] == 77).all()


@pytest.mark.parametrize("what, streams", [({}, True), ({"UPDATE": True}, False), ({"COUNT": True}, False)])
def test_only_what_a_kernel_does_not_read_goes_around_the_caches(what, streams):
    assert ("nontemporal" in scaled.warmup(tl.int32, tl.int32, 5, BLOCK=64, **what).asm["llvm"]) == streams


def test_the_next_kernel_reads_what_went_around_the_caches():
    x = np.random.default_rng().integers(0, 1000, streaming.RESULT_BYTES // 4).astype(np.float32)
    array = nitinol.from_numpy(x)

    def twice(array):
        once = softened(array)
        return softened(once.reshape(-1, 64).T.reshape(-1))

    def softened(array):
        out = Output(array.shape, "float32")
        return launch(scaled, (x.size // 4096,), x=array, out=out, n=x.size, BLOCK=4096)

    np.testing.assert_array_equal(nitinol.compile(twice)(array).numpy(), 4 * x.reshape(-1, 64).T.reshape(-1))


@jit
def gathered_pairs(x, at, out, N: tl.constexpr):
    i = tl.arange(0, N)[:, None]
    found = tl.gather(tl.load(x + i), tl.load(at + i), axis=1)
    tl.store(out + tl.arange(0, N // 2), tl.split(tl.reshape(found, (N // 2, 2)))[1])


def test_a_run_of_gathered_lanes_goes_on_in_the_next_rows():
    x = np.random.default_rng().standard_normal(64).astype(np.float32)
    out = np.full(32, np.nan, np.float32)
    gathered_pairs[(1,)](x, np.zeros(64, np.int32), out, N=64)
    np.testing.assert_array_equal(out, x[1::2])

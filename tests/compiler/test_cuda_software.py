"""CUDA source that runs: on the CPU (software_cuda.py), kernels alone, and the library through Nitinol's own driver."""

from __future__ import annotations

import gc
import itertools
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import test_kernels_arrays as library
from model_files import random_file
from operation_programs import operation_programs
from random_programs import FLOATS, INTEGERS, random_program
from software_cuda import Gpu, compiled, executable, launch, open_gpu, run
from target_kernels import BFloat16, exchange, exchange_reference, product, reverse_in_place

import nitinol as na
import nitinol.language as tl
from nitinol.compiler import interpreter
from nitinol.formats.blocks import FORMATS
from nitinol.generate.model import load
from nitinol.generate.options import Options
from nitinol.language.types import float16
from nitinol.ops import attention, linear, norm
from nitinol.ops.activations import quantize_activations
from nitinol.ops.quantized import stored_array
from nitinol.runtime import using_device
from nitinol.runtime.kernel import jit

DTYPES = (*INTEGERS, *FLOATS)
WARPS = (1, 2, 4, 8)


@pytest.fixture
def rng():
    return np.random.default_rng()


@pytest.fixture
def gpu(monkeypatch):
    device = open_gpu(monkeypatch, Gpu())
    with using_device(device):
        yield device
    device.close()


@jit
def fields(x, out, row_bytes, ROWS: tl.constexpr, BLOCKS: tl.constexpr, STEP: tl.constexpr, AT: tl.constexpr,
           COUNT: tl.constexpr):  # fmt: skip
    block = tl.arange(0, ROWS)[:, None] * row_bytes + tl.arange(0, BLOCKS)[None, :] * STEP
    at = tl.arange(0, COUNT)[None, None, :]
    place = (tl.arange(0, ROWS)[:, None] * BLOCKS + tl.arange(0, BLOCKS)[None, :])[:, :, None] * COUNT
    tl.store(out + place + at, tl.load(x + (block[:, :, None] + (AT + at))))


@pytest.mark.parametrize("rows, blocks, step, at, count, warps", [
    (2, 32, 34, 2, 32, 1), (4, 8, 210, 128, 64, 2), (1, 16, 18, 2, 16, 2), (8, 8, 22, 6, 16, 1), (2, 16, 110, 96, 8, 1),
])  # fmt: skip
def test_bytes_at_even_addresses(rng, rows, blocks, step, at, count, warps):
    """They come as whole words, of which the last may be the last of the array."""
    kind = rng.choice([np.uint8, np.int8])
    x = rng.integers(0, 256, (rows, blocks * step), np.uint8).view(kind)
    out = np.zeros((rows, blocks, count), kind)
    made = launch(fields, (1,), warps, x=x.reshape(-1), out=out, row_bytes=blocks * step, ROWS=rows, BLOCKS=blocks,
                  STEP=step, AT=at, COUNT=count)  # fmt: skip
    np.testing.assert_array_equal(out, x.reshape(rows, blocks, step)[:, :, at : at + count])
    assert "loose_load<" in made.source.split("fields(")[1]


@jit
def larger_bits(x, y, out, N: tl.constexpr, WIDE: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.maximum(tl.load(x + at), tl.load(y + at)).to(WIDE, bitcast=True))


@pytest.mark.parametrize("kind, bits", [(np.int16, "uint16"), (np.int8, "uint8"), (np.uint8, "int8")])
def test_the_larger_of_two_narrow_integers_is_narrow(rng, kind, bits):
    x, y = rng.integers(-100 if kind != np.uint8 else 0, 100, (2, 64)).astype(kind)
    out = np.zeros(64, bits)
    made = launch(larger_bits, (1,), 1, x=x, y=y, out=out, N=64, WIDE=getattr(tl, bits))
    np.testing.assert_array_equal(out, np.maximum(x, y).view(bits))
    assert re.search(r"(short|schar|uchar)\(max\(", made.source)  # CUDA's max of these is an int


@jit
def sums_where(x, y, out, n, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    j = tl.arange(0, BLOCK)
    one = tl.load(x + j, mask=j < n, other=OTHER)
    tl.store(out + j, one + tl.load(y + j))
    tl.store(out + BLOCK + j, one, mask=j < n)


@pytest.mark.parametrize("dtype", ["f2", "i2", "u2"])
@pytest.mark.parametrize("n, block, warps", [(48, 64, 1), (1008, 1024, 4), (999, 1024, 2), (16, 256, 1)])
def test_halves_of_words(rng, dtype, n, block, warps):
    """16-bit elements go as words: what a mask leaves out is the other value, and is not stored."""
    x, y = (rng.integers(0, 100, (2, block))).astype(dtype)
    out = np.full(2 * block, 7, dtype)
    made = launch(sums_where, (1,), warps, x=x, y=y, out=out, n=n, OTHER=3, BLOCK=block)
    one = np.where(np.arange(block) < n, x, np.asarray(3, dtype))
    np.testing.assert_array_equal(out, np.concatenate([one + y, np.where(np.arange(block) < n, one, 7)]))
    assert ("store_if(" in made.source.split("sums_where(")[1]) == (n % 16 == 0)


# ------------------------------------------------------------------------------------------- what must be noticed


@jit
def block_sums(x, out, steps, COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr):
    block, row, column = tl.arange(0, COUNT), tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    at = (block[:, None, None] * ROWS + row[None, :, None]) * COLUMNS + column[None, None, :]
    if KIND == "max":
        found = tl.max(tl.load(x + at).to(out.dtype.element_ty), axis=1)
    elif KIND == "sum":
        found = tl.sum(tl.load(x + at).to(out.dtype.element_ty), axis=1)
    else:
        found = tl.zeros((COUNT, COLUMNS), out.dtype.element_ty)
        for step in range(steps):
            tile = tl.load(x + step * (COUNT * ROWS * COLUMNS) + at)
            found += tl.sum(tile.to(out.dtype.element_ty), axis=1)
    tl.store(out + block[:, None] * COLUMNS + column[None, :], found)


@pytest.mark.parametrize("kind", ["max", "sum", "loop"])
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
@pytest.mark.parametrize(
    ("warps", "count", "rows", "columns"), [(1, 4, 16, 64), (4, 4, 64, 128), (2, 8, 16, 128), (8, 2, 64, 256)]
)
def test_reductions_that_are_wanted_elsewhere(rng, kind, dtype, warps, count, rows, columns):
    """Lanes take a part of the result each, and simdgroups read what the others have where it is wanted: it is not put
    into shared memory a second time."""
    steps = 3 if kind == "loop" else 1
    x = rng.integers(-9, 9, (steps, count, rows, columns)).astype(np.float16 if dtype == np.float32 else np.int8)
    out = np.full((count, columns), 0x5A, dtype)
    made = launch(block_sums, (1, 1, 1), warps, x=x, out=out, steps=steps, COUNT=count, ROWS=rows, COLUMNS=columns,
                  KIND=kind)  # fmt: skip
    expected = x[0].max(axis=1) if kind == "max" else x.sum(axis=(0, 2), dtype=dtype)
    np.testing.assert_array_equal(out, expected)
    assert made.barriers <= 1


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_a_carried_pointer_may_be_any(rng, rounds):
    block = 256
    a, b = rng.integers(-9, 9, (2, block)).astype(np.int32)
    expected, out = exchange_reference(a, b, rounds), np.full(block, 77, np.int32)
    launch(exchange, (1,), 4, a=a, b=b, out=out, n=rounds, BLOCK=block)
    for found, wanted in zip((out, a, b), expected):
        np.testing.assert_array_equal(found, wanted)


def changed(made, old, new):
    assert old in made.source
    return replace(made, source=made.source.replace(old, new))


def test_accesses_outside_of_a_buffer_are_faults(rng):
    x = rng.standard_normal(100).astype(np.float32)
    made, values = compiled(reverse_in_place, warps=4, x=x, n=100, BLOCK=128)
    expected = x[::-1].copy()
    run(made, (1,), values)
    np.testing.assert_array_equal(x, expected)
    values[1] = 104
    with pytest.raises(AssertionError, match="kernel reverse_in_place: an access outside of memory, at 0x"):
        run(made, (1,), values)


def test_who_does_not_wait_for_the_kernel_before_shows(rng):
    x = rng.standard_normal(100).astype(np.float32)
    made, values = compiled(reverse_in_place, warps=4, x=x, n=100, BLOCK=128)
    assert made.source.count("griddepcontrol.wait;") == 1
    with pytest.raises(AssertionError, match="does not wait for those before it"):
        run(changed(made, '"griddepcontrol.wait;"', '"" /* griddepcontrol.wait */'), (1,), values)
    wait = next(line for line in made.source.splitlines() if "griddepcontrol.wait;" in line)
    start, _, end = made.source.rpartition("}")
    expected = x[::-1].copy()
    run(replace(made, source=start.replace(wait, "") + wait + "\n}" + end), (1,), values)  # too late
    assert not np.array_equal(x, expected)


@jit
def weigh(x, weights, out, N: tl.constexpr):
    offsets = tl.arange(0, N)
    weight = tl.load(weights + offsets)
    tl.extra.cuda.gdc_wait()
    tl.store(out + offsets, tl.load(x + offsets) * weight)


def test_a_kernel_that_says_when_it_waits(rng):
    """What it loads before is noted, and must not be what a kernel before it writes: the emulator gives NaN."""
    x, weights = rng.standard_normal((2, 128)).astype(np.float32)
    out = np.zeros_like(x)
    made, values = compiled(weigh, 4, x=x, weights=weights, out=out, N=128)
    names = [value.name for value in made.function.parameters]
    assert [names[i] for i in made.early] == ["weights"] and [names[i] for i in made.stores] == ["out"]
    run(made, (1,), values)
    np.testing.assert_array_equal(out, x * weights)
    run(replace(made, early=()), (1,), values)
    assert np.isnan(out).any()  # of the warp that came first


def test_older_gpus_have_no_early_start(rng):
    x = rng.standard_normal(100).astype(np.float32)
    expected = x[::-1].copy()
    made = launch(reverse_in_place, (1,), 4, 80, x=x, n=100, BLOCK=128)
    np.testing.assert_array_equal(x, expected)
    assert "griddepcontrol" not in made.source


def test_a_missing_barrier_shows(rng):
    x = rng.standard_normal(128).astype(np.float32)
    made, values = compiled(reverse_in_place, warps=4, x=x, n=128, BLOCK=128)
    expected = x[::-1].copy()
    run(changed(made, "__syncthreads();", ""), (1,), values)
    assert (x != expected).any()
    with pytest.raises(AssertionError, match="threads wait for others"):
        run(changed(made, "__syncthreads();", "if (lane < 7) __syncthreads();"), (1,), values)


def test_instructions_that_are_not_known_are_errors():
    made, values = compiled(reverse_in_place, x=np.zeros(8, np.float32), n=8, BLOCK=8)
    with pytest.raises(AssertionError, match="no member named 'bar_arrive' in namespace 'ptx'"):
        run(changed(made, "__syncthreads();", 'asm volatile("bar.arrive 0, 32;");'), (1,), values)


# -------------------------------------------------------------------------------------------------------- programs


def check(program, number):
    expected, actual = program.copies(), program.copies()
    interpreter.run(program.function, program.grid, expected)
    made = executable(program.function, "program", WARPS[number % 4], program.aliases)
    try:
        run(made, program.grid, actual)
        program.compare(actual, expected)
    except AssertionError as problem:
        raise AssertionError(f"{problem}\n{made.source}") from None


@pytest.mark.parametrize("number", range(6))
def test_random_programs(rng, number):
    check(random_program(rng, "medium" if number == 0 else "small", dtypes=DTYPES), number)


def test_every_operation_of_some_type_on_special_values(rng):
    element = DTYPES[int(rng.integers(len(DTYPES)))]
    for number, (_, program) in enumerate(operation_programs(rng, [element], exp_units=40)):
        check(program, number)


def aligned(values):
    """A copy that begins at a multiple of 64 bytes: copies to shared memory go 16 bytes at a time."""
    memory = np.zeros(values.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    out = memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    out[...] = values
    return out


# m, n, k, step, warps, stages, compute capability, which operands are transposed in memory, and the instruction
PRODUCTS = [
    ("f2", 128, 64, 256, 32, 4, 0, 90, (False, False), "wgmma_fp16_64_memory"),
    ("f2", 64, 128, 192, 64, 8, 2, 90, (True, True), "wgmma_fp16"),
    ("bf", 128, 32, 128, 16, 4, 3, 90, (True, False), "wgmma_bf16_32_memory"),
    ("f2", 32, 64, 192, 64, 2, 4, 80, (False, True), "mma_fp16_16"),
    ("bf", 16, 16, 96, 32, 1, 2, 80, (True, False), "mma_bf16_16"),
    ("f2", 64, 64, 64, 16, 4, 1, 80, (True, True), "mma_fp16_16"),
    ("i1", 32, 64, 256, 64, 4, 3, 90, (False, True), "mma_int8_32"),
    ("u1 i1", 64, 16, 64, 16, 2, 0, 90, (False, True), "mma_uint8_int8_16"),
    ("f4 tf", 32, 32, 64, 32, 4, 0, 90, (False, False), "mma_fp32_8"),
    ("f4", 16, 32, 64, 16, 2, 0, 90, (False, True), "fma("),
]


@pytest.mark.parametrize("dtypes, m, n, k, step, warps, stages, capability, turned, text", PRODUCTS)
def test_products(rng, dtypes, m, n, k, step, warps, stages, capability, turned, text):
    kinds = [kind for kind in dtypes.split() if kind != "tf"] * 2

    def operand(kind, shape):
        if kind[0] in "iu":
            info = np.iinfo(kind)
            return rng.integers(info.min, info.max + 1, shape).astype(kind)
        if kind == "bf":
            return (rng.standard_normal(shape).astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
        return rng.standard_normal(shape).astype(kind)

    a, b = operand(kinds[0], (m, k)), operand(kinds[1], (k, n))
    memory = [aligned(x.T if flip else x) for x, flip in zip((a, b), turned)]
    if dtypes == "bf":
        memory = [BFloat16(aligned((x.view(np.uint32) >> 16).astype(np.uint16))) for x in memory]
    c = aligned(np.full((m, n), 77, np.int32 if kinds[0][0] in "iu" else np.float32))
    made = launch(
        product, (1,), warps, capability, stages, a=memory[0], b=memory[1], c=c, K=k, M=m, N=n, A_TURNED=turned[0],
        B_TURNED=turned[1], STEP=step, PRECISION="tf32" if dtypes.endswith("tf") else "ieee",
    )  # fmt: skip
    assert text in made.source and ("cp_async(" in made.source) == (stages != 1 and dtypes != "f4")
    if c.dtype == np.int32:
        np.testing.assert_array_equal(c, a.astype(np.int64) @ b.astype(np.int64))
        return
    # k roundings of partial sums of products of standard normals; of operands to 10 bits
    atol = 8 * k * 2.0**-23 + (2.0**-9 * 8 * np.sqrt(k) if dtypes.endswith("tf") else 0.0)
    np.testing.assert_allclose(c, a.astype(np.float64) @ b.astype(np.float64), rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("group", "head_dim", "position", "splits"),
    [(4, 128, 140, 1), (4, 128, 255, 4), (7, 64, 200, 2), (1, 80, 5, 4), (16, 128, 130, 2)],
)
def test_attention_of_one_token_goes_through_matrices(rng, group, head_dim, position, splits):
    kv_heads, context = 2, 256
    heads = kv_heads * group
    q = rng.normal(size=(heads, 1, head_dim)).astype(np.float32)
    k, v = rng.normal(size=(2, kv_heads, context, head_dim)).astype(np.float16)
    expected = attention.attention_reference(q, k, v, position, 0.1)[:, 0]
    k[:, position + 1 :] = v[:, position + 1 :] = np.nan  # are not read
    part, out = np.full((heads, splits, head_dim), np.nan, np.float32), np.full((heads, head_dim), np.nan, np.float32)
    tops, totals = np.full((2, heads, splits), np.nan, np.float32)
    constants = attention.decode_constants(group, head_dim, kv_heads)
    made = launch(
        attention.decode_attention_kernel, (kv_heads, splits, 1), 4, q=q, k=k, v=v,
        position=np.array([position], np.int32), out=out, part=part, tops=tops, totals=totals, context=context,
        scale=0.1, **constants | {"SPLITS": splits, "ROWS": 16, "DOT": float16},
    )  # fmt: skip
    assert "mma_fp16_16(" in made.source
    if splits > 1:
        width = constants["BLOCK_D"] // 2
        launch(attention.combine_kernel, (heads, 2, 1), part=part, tops=tops, totals=totals, out=out, SPLITS=splits,
               HEAD_DIM=head_dim, BLOCK_D=width)  # fmt: skip
    # queries, of up to 4, and weights are rounded to 11 bits; sums of weighted values of size 1
    np.testing.assert_allclose(out, expected, rtol=2e-3, atol=2e-3)


def test_copies_that_are_not_waited_for_show(rng):
    a, c = aligned(rng.standard_normal((64, 64)).astype(np.float16)), np.zeros((64, 64), np.float32)
    made, values = compiled(product, 4, a=a, b=a, c=c, K=64, M=64, N=64, A_TURNED=False, B_TURNED=False, STEP=16,
                            PRECISION=None)  # fmt: skip
    run(made, (1,), values)
    np.testing.assert_allclose(c, a.astype(np.float64) @ a.astype(np.float64), rtol=0, atol=1e-3)
    pending = int(re.findall(r"cp_async_wait<(\d)>\(\);", made.source)[0])
    c[:] = 0
    run(changed(made, f"cp_async_wait<{pending}>();", f"cp_async_wait<{pending + 1}>();"), (1,), values)
    assert not np.allclose(c, a.astype(np.float64) @ a.astype(np.float64), rtol=0, atol=1e-3)


# ----------------------------------------------------------------------------------------- the library, by its driver


@pytest.mark.usefixtures("gpu")
class TestLibrary:
    """The tests of the library on arrays, with the blocks that it chooses for CUDA."""

    test_norms = staticmethod(library.test_norms)
    test_dequantize_and_embedding = staticmethod(library.test_dequantize_and_embedding)
    test_a_norm_before = staticmethod(library.test_a_norm_before_a_product_of_bytes_is_one_kernel_with_the_rounding)
    test_matmul = staticmethod(library.test_matmul)
    test_a_prompt_and_then_a_token = staticmethod(library.test_a_prompt_and_then_a_token)
    test_causal_attention = staticmethod(library.test_causal_attention)


@pytest.mark.parametrize(
    "format, tokens", [("Q8_0", 20), ("Q4_K", 130), ("BF16", 20), ("Q8_0", 1), ("Q4_K", 1), ("F16", 3)]
)
def test_products_with_weights(gpu, rng, format, tokens):
    library.test_linear_and_swiglu(rng, format, tokens, "cuda")


def test_a_model_says_what_it_says_on_the_cpu(gpu, rng, tmp_path):
    """In chunks of odd lengths, then a token at a time; twice, the second model in memory that the first one had."""
    path = random_file(tmp_path / "model.gguf", "Q8_0", seed=int(rng.integers(1 << 30)))
    ids = rng.integers(0, 512, 37).tolist()
    expected = load(path, device="cpu").logits(ids)
    for context in (41, 43):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nitinol.generate.model.get_device", lambda: gpu)
            model = load(path, context=context)
        model.session.chunk = 24
        # Activations are rounded to bytes after sums in another order: a tie moves one by a step, and all after it.
        error = 0.1 * expected.std()
        np.testing.assert_allclose(model.logits(ids), expected, rtol=0, atol=error)
        model.session.begin(None)
        model.session.cache.move(0)
        model.session.prefill(ids[:30], Options())
        for position in range(30, len(ids)):
            assert expected[position - 1].max() - expected[position - 1, model.session.next_token] <= 2 * error
            model.session.state.token.buffer.write(np.array(ids[position : position + 1], np.int32))
            model.session.step()
        del model
        gc.collect()


# -------------------------------------------------------------------------------------------------------- large arrays


class Corners(Gpu):
    """Runs the programs at the corners of every grid only. Memory that nobody touches costs nothing, so arrays may be
    as large as those of a model of 8 G weights."""

    def start(self, made, grid, node, words):
        made(grid, node.blockDimX, node.sharedMemBytes, words, itertools.product(*({0, extent - 1} for extent in grid)))


@pytest.fixture
def corners(monkeypatch):
    device = open_gpu(monkeypatch, Corners())
    with using_device(device):
        yield device
    device.close()


def weights(device, format, rows, columns):
    return stored_array(device.allocate(rows * FORMATS[format].nbytes(columns)), format, (rows, columns))


@pytest.mark.parametrize("tokens", [100, 2048])  # by bytes; decoded first
def test_products_of_a_large_model_stay_inside(corners, tokens, format="Q8_0"):
    hidden, ffn = 4096, 14336
    x, h = (na.empty((tokens, width), "float32", corners) for width in (hidden, ffn))
    linear.linear(h, weights(corners, format, hidden, ffn), residual=x).evaluate()
    linear.linear(x, weights(corners, format, ffn, hidden), gate=h).evaluate()
    linear.linear(x[-1:], weights(corners, format, 128256, hidden)).evaluate()


def test_the_other_steps_of_a_large_model_stay_inside(corners):
    tokens, heads, kv_heads, head_dim, context = 2048, 32, 8, 128, 2184
    hidden = heads * head_dim
    ids = na.array(np.full(tokens, 128255, np.int32), device=corners)
    x = na.embedding(weights(corners, "Q8_0", 128256, hidden), ids).evaluate()
    quantize_activations("cuda", norm.rms_norm(x, na.empty((hidden,), "float32", corners))).sums.evaluate()
    position = na.array(np.array([context - tokens], np.int32), device=corners)
    keys, values = (na.empty((1, kv_heads, context, head_dim), "float16", corners) for _ in range(2))
    k = na.empty((tokens, kv_heads * head_dim), "float32", corners)
    frequencies = na.empty((head_dim // 2,), "float32", corners)
    q = na.rope_and_cache(x, k, k, frequencies, position, keys, values, interleaved=True).evaluate()
    attention.cached_attention(q, keys, values, position).evaluate()
    attention.cached_attention(q[-1:], keys, values, position).evaluate()


# -------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("nbytes", [1 << 10, 1 << 20])
def test_memory_in_a_cycle_of_garbage_stays_allocated(gpu, nbytes):
    """The pool gets such memory back when the collector runs; the GPU must not."""
    owner = SimpleNamespace(buffer=gpu.allocate(nbytes))
    owner.me = owner
    address = owner.buffer.address
    del owner
    gc.collect()
    assert gpu.allocate(nbytes).address == address
    assert any(start <= address < start + memory.nbytes for start, memory in gpu.cu.memory.items())

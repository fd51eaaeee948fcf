"""Bytes that kernels move, by the software Metal device's counters.

The device counts what every thread asks for, as if there were no caches: what two threads of a simdgroup, two
simdgroups or two programs ask for counts twice. So a program's traffic shows whether anything is loaded twice in it;
what programs share, such as the activations of a matrix-vector product, counts once per program.
"""

from __future__ import annotations

import numpy as np
import pytest
from software_metal import Library

import nitinol.language as tl
import softmetal
from nitinol.compiler.driver import tile_ir
from nitinol.compiler.gpu import compile_function
from nitinol.formats.blocks import FORMATS
from nitinol.formats.quantization import quantize
from nitinol.language.jit import specialise
from nitinol.language.types import bfloat16
from nitinol.ops import attention, linear, matvec
from nitinol.ops.activations import quantize_activations_reference
from nitinol.runtime.kernel import jit


@pytest.fixture(autouse=True)
def counting():
    softmetal.set_counting(True)
    yield
    softmetal.set_counting(False)


def traffic(kernel, grid, warps=0, **arguments):
    """What a launch loads and stores of device memory, in bytes."""
    bound = kernel.bind((), arguments)
    signature, _ = specialise(kernel, bound)
    made = compile_function(tile_ir(kernel, signature), simdgroups=warps)
    library, values = Library([made]), [bound[parameter] for parameter, _, _ in signature.parameters]
    softmetal.reset_counters()
    library.run(made, grid, [getattr(value, "array", value) for value in values])
    counted = softmetal.counters()
    return counted["loaded_device"], counted["stored_device"]


class BFloat16:
    """uint16 memory that kernels see as bfloat16."""

    def __init__(self, array):
        self.array, self.__nitinol_pointer__ = array, (array.ctypes.data, bfloat16)


def product(format, rows, columns, block_rows=0):
    """Loaded, stored, bytes of the weights, bytes of the activations that the format uses, number of programs."""
    rng = np.random.default_rng()
    x = rng.normal(size=(1, columns)).astype(np.float32)
    data = quantize(rng.normal(size=(rows, columns)).astype(np.float32), format)
    weights, given = data.reshape(-1).view(np.uint8).copy(), x
    inputs, used = {"x": x, "x_scales": None, "x_sums": None}, [x]
    if FORMATS[format].values == 1:
        kind = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[format]
        weights = weights.view(kind)
    else:
        given = quantize_activations_reference(x)
        inputs = {"x": given.values, "x_scales": given.scales, "x_sums": given.sums}
        minimum = format in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")  # needs the activations' sums
        used = list(given if minimum else given[:2])
    chosen, run, warps = linear.matvec_blocks("metal", format, columns)
    block_rows = block_rows or chosen
    out = np.full((1, rows), np.nan, np.float32)
    programs = -(-rows // block_rows)
    loaded, stored = traffic(
        matvec.matvec_kernel, (programs, 1, 1), warps, weights=BFloat16(weights) if format == "BF16" else weights,
        up=None, bias=None, residual=None, out=out, tokens=1, rows=rows, columns=columns,
        row_bytes=FORMATS[format].nbytes(columns), ROWS=block_rows, TOKENS=1, EVEN=rows % block_rows == 0, **inputs,
        **run,
    )  # fmt: skip
    expected = matvec.matvec_reference(given, data, format, (rows, columns), None, None, None)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5 * np.sqrt(columns))  # fp32 sums, as on the CPU
    return loaded, stored, weights.nbytes, sum(a.nbytes for a in used), programs


@pytest.mark.parametrize("format", FORMATS)
def test_a_matrix_vector_product_loads_weights_once_and_activations_once_per_program(format):
    loaded, stored, weights, activations, programs = product(format, rows=32, columns=2048)
    assert loaded <= 1.02 * (weights + programs * activations)
    assert stored == 32 * 4


@pytest.mark.parametrize("format", ["Q8_0", "Q4_0"])
def test_one_program_loads_weights_and_activations_once(format):
    loaded, stored, weights, activations, _ = product(format, rows=64, columns=2048, block_rows=64)
    assert loaded <= 1.02 * (weights + activations)
    assert stored == 64 * 4


@pytest.mark.parametrize("format", ["Q8_0", "Q5_1", "F16"])
def test_rows_of_odd_length_and_number_load_little_more(format):
    """12 blocks: runs of 4, in one simdgroup. 19 rows: the last program reads its last row once for each it lacks."""
    loaded, stored, weights, activations, programs = product(format, rows=19, columns=384)
    row = weights // 19
    assert loaded <= 1.02 * (weights + programs * activations + (16 * programs - 19) * row)
    assert stored == 19 * 4


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("group", [1, 4])
def test_decode_attention_loads_keys_and_values_once_for_all_heads_that_share_them(group, dtype):
    rng = np.random.default_rng()
    kv_heads, head_dim, context = 2, 64, 512
    heads = kv_heads * group
    q = rng.normal(size=(1, heads * head_dim)).astype(np.float32)
    k, v = rng.normal(size=(2, kv_heads, context, head_dim)).astype(dtype)
    constants = attention.decode_constants(group, head_dim, kv_heads, "metal") | {"SPLITS": 2}
    loads = []
    for length in (192, 512):
        part = np.zeros((heads, 2, head_dim), np.float32)
        tops, totals = np.zeros((2, heads, 2), np.float32)
        loads.append(traffic(
            attention.decode_attention_kernel, (kv_heads, 2, 1), q=q, k=k, v=v, out=None, part=part, tops=tops,
            totals=totals, position=np.array([length - 1], np.int32), context=context, scale=0.125, **constants,
        )[0])  # fmt: skip
    assert loads[1] - loads[0] == 2 * kv_heads * (512 - 192) * head_dim * k.itemsize  # linear, and each byte once


def test_attention_of_a_prompt_reads_the_cache_linearly():
    """For one block of queries, over caches of three lengths: twice the cache at most, as simdgroups share values."""
    rng = np.random.default_rng()
    head_dim, tokens = 64, 16
    constants = attention.prefill_constants(1, head_dim, tokens)
    q = rng.normal(size=(tokens, 1, head_dim)).astype(np.float32)
    k, v = rng.normal(size=(2, 1, 512, head_dim)).astype(np.float16)
    loads = []
    for length in (128, 256, 512):
        position = np.array([length - tokens], np.int32)
        loads.append(traffic(
            attention.prefill_attention_kernel, (1, 1, 1), q=q, k=k, v=v, out=np.zeros_like(q), position=position,
            tokens=tokens, context=512, q_token=head_dim, q_head=head_dim, scale=0.125, **constants,
        )[0])  # fmt: skip
    first, second = loads[1] - loads[0], loads[2] - loads[1]
    assert second == 2 * first
    assert first <= 2 * 2 * 128 * head_dim * k.itemsize


@jit
def outer(x, y, out, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    tile = tl.load(x + m)[:, None] * tl.load(y + n)[None, :]
    tl.store(out + m[:, None] * N + n[None, :], tile)


def test_a_small_tile_is_loaded_once_per_simdgroup():
    x, y = np.random.default_rng().normal(size=(2, 64)).astype(np.float32)
    out = np.full((64, 64), np.nan, np.float32)
    loaded, stored = traffic(outer, (1, 1, 1), 4, x=x, y=y, out=out, M=64, N=64)
    np.testing.assert_array_equal(out, np.outer(x, y))
    assert stored == out.nbytes
    assert loaded <= 4 * (x.nbytes + y.nbytes)

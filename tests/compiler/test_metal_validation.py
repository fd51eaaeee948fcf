"""Every kernel of the library as Metal source, checked access by access (bounds, races, barriers, uninitialised
threadgroup memory) under 5 orders of its threads, which must not show in the result."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("ziglang", reason="softmetal needs clang: pip install ziglang")

from kernel_runner import BFloat16, poisoned
from validated_metal import validated_metal

import nitinol as na
import nitinol.language as tl
import softmetal
from nitinol.formats.blocks import FORMATS
from nitinol.formats.quantization import dequantize, quantize
from nitinol.ops import (
    activations,
    attention,
    embedding,
    matmul_kernels,
    matvec,
    norm,
    norm_kernels,
    quantized,
    rope,
    rope_and_cache,
    sampling,
    softmax,
)
from nitinol.runtime.device import DeviceError
from nitinol.runtime.kernel import jit

SEEDS = range(1, 6)
BLOCK_FORMATS = [name for name, format in FORMATS.items() if format.values > 1]
FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
CLOSE = 2e-5  # fp32 sums of up to some hundred products, in any order


@pytest.fixture
def rng():
    return np.random.default_rng()


@pytest.fixture(autouse=True)
def device():
    with validated_metal() as opened:
        yield opened


def check(kernel, grid, expected, tolerance=CLOSE, **arguments):
    """Runs the kernel under each seed. `expected`: what the output arguments must hold, by name. DeviceError if
    validation finds something."""
    first = None
    for seed in SEEDS:
        softmetal.set_seed(seed)
        outputs = {name: arguments[name].copy() if name in arguments else poisoned(value.shape, dtype_of(value))
                   for name, value in expected.items()}  # fmt: skip
        jit(kernel)[grid](**{**arguments, **outputs})
        if first is None:
            first = outputs
            for name, value in expected.items():
                np.testing.assert_allclose(outputs[name], value, rtol=tolerance, atol=tolerance, err_msg=name)
        for name, output in outputs.items():
            np.testing.assert_array_equal(output, first[name], err_msg=f"{name} under seed {seed}")


def dtype_of(expected):
    """Of an output; references are in float64."""
    return np.float32 if expected.dtype.kind == "f" else expected.dtype


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def weights_of(rng, format, rows, columns):
    """Bytes (or elements of a float format), as an argument; and the plain data for references."""
    data = np.ascontiguousarray(quantize(normal(rng, rows, columns), format)).reshape(-1).view(np.uint8)
    data = data.view(FLOATS.get(format, np.uint8))
    return BFloat16(data) if format == "BF16" else data, data


def activations_of(x):
    quants = activations.quantize_activations_reference(x)
    return dict(zip(("x", "x_scales", "x_sums"), quants)), quants


@pytest.mark.parametrize("columns", [96, 1024])
def test_quantize_activations(rng, columns):
    x = normal(rng, 2, columns)
    groups = activations.groups_per_program(columns)
    check(activations.quantize_activations_kernel, (2, columns // (32 * groups)),
          activations.quantize_activations_reference(x)._asdict(), 0, x=x, columns=columns, GROUPS=groups)  # fmt: skip


@pytest.mark.parametrize("parts", [1, 2])
def test_norm_and_quantize(rng, parts):
    """On inputs of which no rounding to int8 is near a tie, which the order of a sum would decide."""
    columns, near = 96, np.array(0.0)
    while near.min() < 1e-3:
        x, weight = normal(rng, 2, columns), normal(rng, columns)
        normal_form = norm.rms_norm_reference(x, weight, epsilon=1e-5).astype(np.float32)
        expected = activations.quantize_activations_reference(normal_form)
        near = np.abs(normal_form.reshape(-1, 32) / expected.scales.reshape(-1, 1) % 1 - 0.5)
    check(activations.rms_norm_quantize_kernel, (2, parts), expected._asdict(), x=x, weight=weight, columns=columns,
          epsilon=1e-5, BLOCK=128, PARTS=parts)  # fmt: skip


def test_fused_chains_of_arrays(rng):
    """Kernels that arrays make: elementwise chains, broadcasts, views, reductions, gathers, written parts."""
    x, y = normal(rng, 7, 33), normal(rng, 33)
    first = None
    for seed in SEEDS:
        softmetal.set_seed(seed)
        a, b = na.array(x), na.array(y)
        c = (a * b + a.T[3:4, :].reshape(7, 1)).exp().sum(axis=1)
        d = (a[::2, 5:] - a.max(axis=1).reshape(7, 1)[::2]).astype("float16")
        found = [c.numpy(), d.numpy(), a.mean(axis=0).numpy(), (a > 0).sum().numpy()]
        first = first or found
        for one, other in zip(found, first):
            np.testing.assert_array_equal(one, other, err_msg=f"seed {seed}")
    wide = x.astype(np.float64)
    expected = [np.exp(wide * y + wide.T[3][:, None]).sum(axis=1), (wide[::2, 5:] - wide.max(axis=1)[::2, None]),
                wide.mean(axis=0), (x > 0).sum()]  # fmt: skip
    for one, other, tolerance in zip(first, expected, (CLOSE, 2e-3, CLOSE, 0)):  # a half has 11 bits
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("format", FORMATS)
def test_matvec(rng, format):
    rows, columns, tokens = 5, 256, 1
    x, residual = normal(rng, tokens, columns), normal(rng, tokens, rows)
    (weights, data), (up, up_data) = (weights_of(rng, format, rows, columns) for _ in range(2))
    given, source = ({"x": x, "x_scales": None, "x_sums": None}, x) if format in FLOATS else activations_of(x)
    block_rows = 4 if format in FLOATS else 1
    common = {
        **given, "weights": weights, "tokens": tokens, "rows": rows, "columns": columns,
        "row_bytes": FORMATS[format].nbytes(columns), "ROWS": block_rows, "TOKENS": 1, "EVEN": rows % block_rows == 0,
        **quantized.run_arguments(format, columns, 64 if format in FLOATS else 512),
    }  # fmt: skip
    for up_argument, up_array, add in ((None, None, residual), (up, up_data, None)):
        expected = matvec.matvec_reference(source, data, format, (rows, columns), None, add, up_array)
        check(matvec.matvec_kernel, (-(-rows // block_rows),), {"out": expected}, CLOSE * 10, up=up_argument, bias=None,
              residual=add, **common)  # fmt: skip


@pytest.mark.parametrize("format", ["Q8_0", "Q4_K", "Q6_K"])
def test_quantized_matmul(rng, format):
    rows, columns, tokens = 20, 256, 19
    x, bias = normal(rng, tokens, columns), normal(rng, rows)
    weights, data = weights_of(rng, format, rows, columns)
    given, source = activations_of(x)
    expected = matvec.matvec_reference(source, data, format, (rows, columns), bias)
    check(matmul_kernels.quantized_matmul_kernel, (2, 2), {"out": expected}, CLOSE * 10, **given, weights=weights,
          bias=bias, residual=None, gate=None, tokens=tokens, rows=rows, columns=columns,
          row_bytes=FORMATS[format].nbytes(columns), BLOCK_T=16, BLOCK_N=16, EVEN_N=False,
          **quantized.run_arguments(format, columns, 64))  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_matmul(rng, dtype):
    m, n, k = 19, 33, 40
    a, b = normal(rng, m, k).astype(dtype), normal(rng, k, n).astype(dtype)
    gate = normal(rng, m, n)
    expected = gate / (1 + np.exp(-gate.astype(np.float64))) * (a.astype(np.float64) @ b.astype(np.float64))
    check(matmul_kernels.matmul_kernel, (2, 1, 1), {"out": expected}, CLOSE * 10, a=a, b=b, bias=None, residual=None,
          gate=gate, m=m, n=n, k=k, a_batch=0, a_m=k, a_k=1, b_batch=0, b_k=n, b_n=1, BLOCK_M=32, BLOCK_N=32,
          BLOCK_K=32, EVEN=False, EVEN_K=False, out=poisoned((m, n)))  # fmt: skip


@pytest.mark.parametrize("columns", [100, 1024])
def test_norms(rng, columns):
    x, residual, weight, bias = normal(rng, 2, columns), normal(rng, 2, columns), *normal(rng, 2, columns)
    common = {"x": x, "weight": weight, "columns": columns, "epsilon": 1e-5, **norm._block(columns)}
    expected = {"out": norm.rms_norm_reference(x + residual, weight, epsilon=1e-5), "total": x + residual}
    check(norm.rms_norm_kernel, (2,), expected, residual=residual, ADD=True, **common)
    expected = {"out": norm.layer_norm_reference(x, weight, bias)}
    check(norm_kernels.norm_kernel, (2,), expected, bias=bias, residual=None, total=None, means=None, scales=None,
          LAYER=True, **common)  # fmt: skip


def test_softmax(rng):
    x = normal(rng, 2, 100) * 10
    expected = {"out": softmax.softmax_reference(x)}
    check(softmax.softmax_kernel, (2,), expected, x=x, columns=100, BLOCK=128, EVEN=False)
    check(softmax.long_softmax_kernel, (2,), expected, x=x, columns=100, BLOCK=64)


@pytest.mark.parametrize(("interleaved", "with_norm"), [(True, False), (False, True)])
def test_rope(rng, interleaved, with_norm):
    tokens, kv_heads, group, head_dim, context, start = 2, 2, 3, 20, 7, 4
    q, (k, v) = normal(rng, tokens, kv_heads * group, head_dim), normal(rng, 2, tokens, kv_heads, head_dim)
    weights, frequencies = rng.uniform(0.5, 2, (2, head_dim)).astype(np.float32), rope.rope_frequencies(head_dim, 1e4)
    positions = start + np.arange(tokens)
    q_used, k_used = (norm.rms_norm_reference(x, w, epsilon=1e-6) if with_norm else x for x, w in zip((q, k), weights))
    caches = np.zeros((2, kv_heads, context, head_dim), np.float32)
    expected = {"q_out": rope_and_cache.rope_reference(q_used, positions, frequencies, interleaved),
                "k_cache": caches[0].copy(), "v_cache": caches[1].copy()}  # fmt: skip
    turned = rope_and_cache.rope_reference(k_used, positions, frequencies, interleaved)
    expected["k_cache"][:, positions] = turned.transpose(1, 0, 2)
    expected["v_cache"][:, positions] = v.transpose(1, 0, 2)
    check(rope_and_cache.rope_kernel, (tokens, kv_heads), expected, q=q, k=k, v=v, frequencies=frequencies,
          position=np.array([start], np.int32), q_norm=weights[0] if with_norm else None,
          k_norm=weights[1] if with_norm else None, k_cache=caches[0], v_cache=caches[1], context=context,
          epsilon=1e-6, **rope_and_cache.head_arguments(group, head_dim, interleaved, with_norm))  # fmt: skip


def test_prefill_attention(rng):
    kv_heads, group, head_dim, tokens, position = 1, 2, 40, 5, 66
    heads, context = kv_heads * group, position + tokens
    q = normal(rng, tokens, heads, head_dim)
    k, v = normal(rng, 2, kv_heads, context, head_dim).astype(np.float16)
    expected = attention.attention_reference(q.transpose(1, 0, 2), k, v, position, 0.2).transpose(1, 0, 2)
    check(attention.prefill_attention_kernel, (1, heads), {"out": expected}, CLOSE * 2, q=q, k=k, v=v,
          position=np.array([position], np.int32), tokens=tokens, context=context, q_token=heads * head_dim,
          q_head=head_dim, scale=0.2, **attention.prefill_constants(group, head_dim, tokens))  # fmt: skip


def test_decode_attention(rng):
    kv_heads, group, head_dim, position, splits = 2, 3, 40, 100, 2
    heads, context = kv_heads * group, 110
    q = normal(rng, heads, 1, head_dim)
    k, v = normal(rng, 2, kv_heads, context, head_dim).astype(np.float16)
    constants = attention.decode_constants(group, head_dim, kv_heads)
    common = {"q": q, "k": k, "v": v, "position": np.array([position], np.int32), "context": context, "scale": 0.2}
    expected = attention.attention_reference(q, k, v, position, 0.2)[:, 0]
    check(attention.decode_attention_kernel, (kv_heads, 1), {"out": expected}, CLOSE * 2, part=None, tops=None,
          totals=None, **common, **{**constants, "SPLITS": 1})  # fmt: skip
    part, tops, totals = poisoned((heads, splits, head_dim)), poisoned((heads, splits)), poisoned((heads, splits))
    softmetal.set_seed(1)
    jit(attention.decode_attention_kernel)[kv_heads, splits](
        out=None, part=part, tops=tops, totals=totals, **common, **{**constants, "SPLITS": splits})  # fmt: skip
    check(attention.combine_kernel, (heads, 2), {"out": expected}, CLOSE * 2, part=part, tops=tops, totals=totals,
          SPLITS=splits, HEAD_DIM=head_dim, BLOCK_D=32)  # fmt: skip


@pytest.mark.parametrize("format", ["F16", "BF16", "Q5_0", "Q3_K"])
def test_dequantize_and_embedding(rng, format):
    rows, columns = 5, 70 if format in FLOATS else 256
    weights, data = weights_of(rng, format, rows, columns)
    values = dequantize(data, format, (rows, columns))
    common = {"weights": weights, "columns": columns, "row_bytes": FORMATS[format].nbytes(columns),
              **quantized.run_arguments(format, columns)}  # fmt: skip
    check(quantized.dequantize_kernel, (rows,), {"out": values}, 1e-6, **common)
    tokens = np.array([4, 0, 99], np.int32)
    check(embedding.embedding_kernel, (3,), {"out": values[[4, 0, 4]]}, 1e-6, tokens=tokens, vocabulary=rows, **common)


def test_attention_of_two_sequences_with_a_window(rng):
    """A prompt's queries and a token's, at positions of their own."""
    kv_heads, group, head_dim, context, window = 2, 2, 32, 160, 40
    heads, positions = kv_heads * group, np.array([5, 130], np.int32)
    k, v = rng.normal(size=(2, 2, kv_heads, context, head_dim)).astype(np.float32)
    for tokens in (9, 1):
        q = rng.normal(size=(2, tokens, heads, head_dim)).astype(np.float32)
        expected = np.stack([
            attention.attention_reference(q[i].swapaxes(0, 1), k[i], v[i], positions[i], 0.2, window).swapaxes(0, 1)
            for i in range(2)])  # fmt: skip
        shared = {"q": q, "k": k, "v": v, "position": positions, "context": context, "scale": 0.2, "WINDOW": window}
        if tokens > 1:
            check(attention.prefill_attention_kernel, (1, heads, 2), {"out": expected}, CLOSE * 2, tokens=tokens,
                  q_token=heads * head_dim, q_head=head_dim, **shared,
                  **attention.prefill_constants(group, head_dim, tokens))  # fmt: skip
        else:
            constants = attention.decode_constants(group, head_dim, kv_heads) | {"SPLITS": 1}
            check(attention.decode_attention_kernel, (kv_heads, 1, 2), {"out": expected}, CLOSE * 2, part=None,
                  tops=None, totals=None, **shared, **constants)  # fmt: skip


def test_sampling(rng):
    vocabulary, context, place = 333, 32, 11
    logits = normal(rng, vocabulary) * 3
    history = poisoned(context, np.int32)
    history[: place + 1] = rng.integers(0, vocabulary, place + 1)
    history[place - 3] = history[place - 1]  # two threads have the same token
    seen, results = logits.copy(), history.copy()
    recent = np.unique(history[place + 1 - 8 : place + 1])
    seen[recent] = np.where(logits[recent] > 0, logits[recent] / np.float32(1.3), logits[recent] * np.float32(1.3))
    results[place + 1] = seen.argmax()
    state = {"position": np.array([place], np.int32), "history": history}
    common = {"logits": logits, "vocabulary": vocabulary, "tokens": 1, "context": context, "BLOCK": 128}
    expected = {"token": np.array([seen.argmax()], np.int32), "position": np.array([place + 1], np.int32),
                "history": results}  # fmt: skip
    for temperature in (0, 0.8):  # the second keeps one token: also the highest
        options = np.array([temperature, 0.9, 0.02, 1.3], np.float32)
        limits = np.array([5, 1, 8], np.int64)
        check(sampling.sample_kernel, (1,), expected, 0, options=options, limits=limits, weights=poisoned(vocabulary),
              **state, **common)  # fmt: skip


@jit
def reads_beyond(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at + 1))


@jit
def programs_collide(out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), tl.program_id(0) + tl.zeros((BLOCK,), tl.int32))


def test_wrong_kernels_are_caught(rng):
    x = normal(rng, 64)
    with pytest.raises(DeviceError, match=r"out of bounds.*'reads_beyond'"):
        check(reads_beyond, (1,), {"out": x}, x=x, BLOCK=64)
    with pytest.raises(DeviceError, match=r"data race.*'programs_collide'"):
        check(programs_collide, (2,), {"out": np.zeros(64, np.int32)}, BLOCK=64)

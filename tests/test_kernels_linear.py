"""Products with weights of every format, for one token and for many, against float64 on the same bytes."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_runner import ENGINES, BFloat16, padded, poisoned, run

from nitinol.formats.blocks import FORMATS
from nitinol.formats.quantization import quantize
from nitinol.ops import activations, matmul_kernels, matvec
from nitinol.ops.quantized import run_arguments

BLOCK_FORMATS = [name for name, format in FORMATS.items() if format.values > 1]
K_FORMATS = [name for name, format in FORMATS.items() if format.values == 256]
FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


@pytest.fixture
def rng():
    return np.random.default_rng()


def weights_of(rng, format, rows, columns):
    """Quantised normal values, as bytes (or the elements of a float format)."""
    data = quantize(rng.normal(size=(rows, columns)).astype(np.float32), format)
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8).view(FLOATS.get(format, np.uint8))


def as_argument(data, format):
    return BFloat16(data) if format == "BF16" else data


def operands(x, format):
    """x as the kernels take it: (activations or x, arguments)."""
    if format in FLOATS:
        return x, {"x": padded(x), "x_scales": None, "x_sums": None}
    quantized = activations.quantize_activations_reference(x)
    return quantized, dict(zip(("x", "x_scales", "x_sums"), map(padded, quantized)))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("columns", [32, 96, 2048])
def test_quantize_activations(rng, engine, columns):
    tokens = 3
    x = (rng.normal(size=(tokens, columns)) * rng.choice([1e-3, 1, 50], size=(tokens, columns))).astype(np.float32)
    x[0, :32] = 0  # a group of zeros has scale 0
    out = activations.Activations(
        poisoned((tokens + 1, columns), np.int8), poisoned((tokens + 1, columns // 32)),
        poisoned((tokens + 1, columns // 16), np.int32),
    )  # fmt: skip
    groups = activations.groups_per_program(columns)
    run(engine, activations.quantize_activations_kernel, (tokens, columns // (32 * groups)), x=padded(x),
        columns=columns, GROUPS=groups, **out._asdict())  # fmt: skip
    for found, expected in zip(out, activations.quantize_activations_reference(x)):
        np.testing.assert_array_equal(found[:tokens], expected)
        np.testing.assert_array_equal(found[tokens], poisoned(found.shape[1:], found.dtype))
    back = out.values[:tokens].reshape(-1, 32) * out.scales[:tokens].reshape(-1, 1)
    error = np.abs(back - x.reshape(-1, 32)).max(axis=1)
    assert (error <= np.abs(x.reshape(-1, 32)).max(axis=1) / 254 * 1.001).all()


MATVEC_CASES = [
    ("native", format, rows, columns, tokens)
    for format in FORMATS
    for rows, columns, tokens in [(5, 512, 1), (8, 256, 2)]
] + [
    ("native", "Q8_0", 7, 96, 3), ("native", "Q5_0", 4, 32 * 7, 1), ("native", "F16", 3, 100, 3),
    ("native", "F32", 9, 33, 1), ("interpreter", "Q4_K", 3, 256, 2), ("interpreter", "Q2_K", 4, 256, 1),
    ("interpreter", "F16", 3, 70, 1),
]  # fmt: skip


@pytest.mark.parametrize(("engine", "format", "rows", "columns", "tokens"), MATVEC_CASES)
def test_matvec(rng, engine, format, rows, columns, tokens):
    x = rng.normal(size=(tokens, columns)).astype(np.float32)
    data, up = (weights_of(rng, format, rows, columns) for _ in range(2))
    bias = rng.normal(size=rows).astype(np.float32)
    residual = rng.normal(size=(tokens, rows)).astype(np.float32)
    given, arguments = operands(x, format)
    block_tokens = 1 if tokens == 1 else 2
    block_rows = 4
    grid = (-(-rows // block_rows), -(-tokens // block_tokens))
    arguments |= {
        "tokens": tokens, "rows": rows, "columns": columns, "row_bytes": FORMATS[format].nbytes(columns),
        "ROWS": block_rows, "TOKENS": block_tokens, "EVEN": rows % block_rows == 0 and tokens % block_tokens == 0,
        **run_arguments(format, columns, 64 if format in FLOATS else 256),
    }  # fmt: skip
    shape = (rows, columns)
    # fp32 sums of `columns` products of size about 1; scales and integer dots are exact to one rounding each.
    close = {"rtol": 1e-5, "atol": 1e-5 * np.sqrt(columns)}
    for use_bias, use_residual, use_up in ((False, False, False), (True, True, False), (False, False, True)):
        out = poisoned((tokens + 1, rows))
        run(engine, matvec.matvec_kernel, grid, weights=as_argument(data, format),
            up=as_argument(up, format) if use_up else None, bias=padded(bias) if use_bias else None,
            residual=padded(residual) if use_residual else None, out=out, **arguments)  # fmt: skip
        expected = matvec.matvec_reference(
            given, data, format, shape, bias if use_bias else None, residual if use_residual else None,
            up if use_up else None,
        )  # fmt: skip
        tolerance = dict(close)
        if use_up:  # each factor's error is multiplied by the other factor
            factors = (matvec.matvec_reference(given, matrix, format, shape) for matrix in (data, up))
            tolerance["atol"] *= sum(np.abs(factor).max() for factor in factors)
        np.testing.assert_allclose(out[:tokens], expected, **tolerance)
        assert np.isnan(out[tokens]).all()


MATMUL_CASES = [
    ("native", format, *((16, 512, 9) if format in K_FORMATS else (37, 96, 21))) for format in BLOCK_FORMATS
] + [
    ("native", "Q8_0", 64, 256, 64), ("native", "Q4_K", 21, 256, 32), ("interpreter", "Q5_1", 9, 64, 5),
    ("interpreter", "Q6_K", 16, 256, 5),
]  # fmt: skip


@pytest.mark.sampled(10)
@pytest.mark.parametrize(("engine", "format", "rows", "columns", "tokens"), MATMUL_CASES)
def test_quantized_matmul(rng, engine, format, rows, columns, tokens):
    x = rng.normal(size=(tokens, columns)).astype(np.float32)
    data = weights_of(rng, format, rows, columns)
    bias = rng.normal(size=rows).astype(np.float32)
    residual, gate = rng.normal(size=(2, tokens, rows)).astype(np.float32)
    given, arguments = operands(x, format)
    block_t, block_n = 16, 16 if rows == 16 else 32
    expected = matvec.matvec_reference(given, data, format, (rows, columns))
    for use in (False, True) if format == "Q8_0" else (True,):  # each compiles a kernel
        out = poisoned((tokens + 1, rows))
        run(engine, matmul_kernels.quantized_matmul_kernel, (-(-rows // block_n), -(-tokens // block_t)), weights=data,
            bias=padded(bias) if use else None, residual=padded(residual) if use else None,
            gate=padded(gate) if use else None, out=out, tokens=tokens, rows=rows, columns=columns,
            row_bytes=FORMATS[format].nbytes(columns), BLOCK_T=block_t, BLOCK_N=block_n,
            EVEN_N=rows % block_n == 0, **arguments,
            **run_arguments(format, columns, 64))  # fmt: skip
        if use:
            expected = gate / (1 + np.exp(-gate.astype(np.float64))) * expected + bias + residual
        np.testing.assert_allclose(out[:tokens], expected, rtol=1e-5, atol=1e-5 * np.sqrt(columns))
        assert np.isnan(out[tokens]).all()


@pytest.mark.parametrize(
    ("engine", "m", "n", "k", "transposed", "a_type", "b_type"),
    [
        ("native", 64, 64, 128, False, np.float32, np.float32),
        ("native", 33, 47, 70, False, np.float32, np.float32),
        ("native", 33, 47, 70, True, np.float32, np.float32),
        ("native", 64, 32, 40, True, np.float32, np.float16),
        ("native", 5, 100, 64, False, np.float16, np.float16),
        ("native", 1, 1, 1, False, np.float32, np.float32),
        ("interpreter", 18, 33, 20, True, np.float32, np.float16),
        ("interpreter", 16, 20, 33, False, np.float32, np.float32),
    ],
)
def test_matmul(rng, engine, m, n, k, transposed, a_type, b_type):
    batches = 2
    a = rng.normal(size=(batches, m, k)).astype(a_type)
    b = rng.normal(size=(n, k) if transposed else (k, n)).astype(b_type)  # shared by the batches
    bias = rng.normal(size=n).astype(np.float32)
    out = poisoned((batches * m + 1, n))
    block_m, block_n, block_k = 16, 32, 32
    run(engine, matmul_kernels.matmul_kernel, (-(-n // block_n), -(-m // block_m), batches), a=padded(a), b=padded(b),
        bias=padded(bias), residual=None, gate=None, out=out, m=m, n=n, k=k, a_batch=m * k, a_m=k, a_k=1, b_batch=0,
        b_k=1 if transposed else n, b_n=k if transposed else 1, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        EVEN=m % block_m == 0 and n % block_n == 0, EVEN_K=k % block_k == 0)  # fmt: skip
    expected = a.astype(np.float64) @ (b.T if transposed else b).astype(np.float64) + bias
    # k fp32 products summed in fp32: random errors of 6e-8 each, added up
    np.testing.assert_allclose(out[:-1].reshape(batches, m, n), expected, rtol=1e-5, atol=2e-6 * np.sqrt(k))
    assert np.isnan(out[-1]).all()

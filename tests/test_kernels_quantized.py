"""Decoding of block formats inside kernels: bit for bit the reference, on random bytes."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_runner import poisoned, run

from nitinol.formats.blocks import FORMATS
from nitinol.formats.quantization import dequantize
from nitinol.ops import embedding, quantized

STORED_AS = {"F32": np.float32, "F16": np.float16}  # BF16 has no NumPy type; the array layer brings its own


def random_weights(rng, format: str, rows: int, columns: int) -> np.ndarray:
    """Rows of random bytes, with finite scales: any byte pattern is a valid block, but infinite and NaN values could
    not be told apart bit by bit (a sum of two NaN may keep either)."""
    layout = FORMATS[format]
    blocks = np.frombuffer(rng.bytes(layout.nbytes(rows * columns)), layout.layout).copy()
    for name in blocks.dtype.names:
        field = blocks[name]
        if field.dtype.kind == "f":
            blocks[name] = (rng.normal(size=field.shape) * rng.choice([1e-7, 1e-2, 1.0, 100.0], field.shape)).astype(
                field.dtype
            )
    return blocks.view(np.uint8).reshape(rows, -1).view(STORED_AS.get(format, np.uint8))


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


@pytest.fixture
def rng():
    return np.random.default_rng()


KERNEL_FORMATS = [name for name in FORMATS if name != "BF16"]
CASES = [("native", f) for f in KERNEL_FORMATS] + [("interpreter", f) for f in ("F16", "Q8_0", "Q5_1", "Q3_K", "Q4_K")]


@pytest.mark.parametrize(("engine", "format"), CASES)
def test_dequantize(rng, engine, format):
    rows, columns = 3, {1: 137, 32: 32 * 12, 256: 512}[FORMATS[format].values]
    data = random_weights(rng, format, rows, columns)
    out = poisoned((rows + 1, columns))
    run(engine, quantized.dequantize_kernel, (rows,), weights=data, out=out, columns=columns,
        row_bytes=FORMATS[format].nbytes(columns), **quantized.run_arguments(format, columns))  # fmt: skip
    np.testing.assert_array_equal(bits(out[:rows]), bits(dequantize(data, format, (rows, columns))))
    assert np.isnan(out[rows]).all()


@pytest.mark.parametrize("format", ["F32", "Q8_0", "Q6_K"])
def test_embedding(rng, format):
    vocabulary, columns = 11, 256
    data = random_weights(rng, format, vocabulary, columns)
    tokens = np.array([3, 10, 0, 3, -5, 400], np.int32)  # the last two are no tokens and must not read elsewhere
    out = poisoned((7, columns))
    run("native", embedding.embedding_kernel, (6,), weights=data, tokens=tokens, out=out, columns=columns,
        row_bytes=FORMATS[format].nbytes(columns), vocabulary=vocabulary,
        **quantized.run_arguments(format, columns))  # fmt: skip
    expected = embedding.embedding_reference(data, format, (vocabulary, columns), tokens)
    np.testing.assert_array_equal(bits(out[:6]), bits(expected))
    assert np.isnan(out[6]).all()

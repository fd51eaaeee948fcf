"""Whole tensors of quantised weights to float32, and rows of them by token: the embedding."""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

from typing import Any

import numpy as np

import nitinol.language as tl
from nitinol.array import Output, launch
from nitinol.formats.blocks import FORMATS
from nitinol.formats.quantization import dequantize as dequantize_reference
from nitinol.kernels.decode import blocks_per_run, decode_values
from nitinol.language.jit import jit


@jit
def dequantize_kernel(
    weights, out, columns, row_bytes, FORMAT: tl.constexpr, BLOCKS: tl.constexpr, VALUES: tl.constexpr
):
    """One program per row. VALUES: how many values BLOCKS blocks have."""
    row = tl.program_id(0).to(tl.int64)
    decode_row(weights, out, row, row, columns, row_bytes, FORMAT, BLOCKS, VALUES)


@jit
def embedding_kernel(
    weights, tokens, out, columns, row_bytes, vocabulary,
    FORMAT: tl.constexpr, BLOCKS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """One program per token; token ids outside the vocabulary read its first or last row."""
    place = tl.program_id(0)
    token = tl.minimum(tl.maximum(tl.load(tokens + place), 0), vocabulary - 1)
    decode_row(weights, out, token.to(tl.int64), place.to(tl.int64), columns, row_bytes, FORMAT, BLOCKS, VALUES)


@jit
def decode_row(
    weights, out, source, target, columns, row_bytes,
    FORMAT: tl.constexpr, BLOCKS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Row `target` of out = row `source` of the weights."""
    if FORMAT == "F32" or FORMAT == "F16" or FORMAT == "BF16":
        for start in range(0, columns, VALUES):
            at = start + tl.arange(0, VALUES)
            inside = at < columns
            value = tl.load(weights + source * columns + at, mask=inside).to(tl.float32)
            tl.store(out + target * columns + at, value, mask=inside)
    else:
        rows = weights + source * row_bytes + tl.zeros((1,), tl.int64)
        at = tl.arange(0, VALUES // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
        for start in range(0, columns // VALUES):
            values = decode_values(rows, start * BLOCKS, FORMAT, BLOCKS)
            tl.store(out + target * columns + start * VALUES + at, tl.reshape(values, (VALUES // 32, 32)))


def run_arguments(format: str, columns: int, values: int = 256) -> dict[str, Any]:
    """The constexpr arguments of kernels that decode runs of a row: about `values` values at a time."""
    if FORMATS[format].values == 1:
        return {"FORMAT": format, "BLOCKS": 1, "VALUES": min(values, tl.next_power_of_2(columns))}
    blocks = blocks_per_run(format, columns, values)
    return {"FORMAT": format, "BLOCKS": blocks, "VALUES": blocks * FORMATS[format].values}


def dequantize(weights: Any, dtype: str = "float32") -> Any:
    """Weights [rows, columns] of any supported format as an Array of float32, exactly as ggml's reference decodes
    them: one product and one sum per value, rounded each; or of another float type, rounded once more."""
    rows, columns = weights.shape
    return launch(
        dequantize_kernel, (rows,), weights=weights, out=Output(weights.shape, dtype), columns=columns,
        row_bytes=FORMATS[weights.format].nbytes(columns), **run_arguments(weights.format, columns),
    )  # fmt: skip


def embedding(weights: Any, tokens: Any) -> Any:
    """Rows `tokens` (int32 [T]) of weights [vocabulary, columns] as an Array of float32 [T, columns]."""
    vocabulary, columns = weights.shape
    return launch(
        embedding_kernel, (tokens.shape[0],), weights=weights, tokens=tokens,
        out=Output((tokens.shape[0], columns), "float32"), columns=columns,
        row_bytes=FORMATS[weights.format].nbytes(columns), vocabulary=vocabulary,
        **run_arguments(weights.format, columns),
    )  # fmt: skip


def embedding_reference(data: np.ndarray, format: str, shape: tuple[int, int], tokens: np.ndarray) -> np.ndarray:
    """All rows decoded in NumPy, those of the tokens kept."""
    return dequantize_reference(data, format, shape)[np.clip(tokens, 0, shape[0] - 1)]

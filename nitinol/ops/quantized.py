"""Arrays stored in blocks of a format: made, and decoded."""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

import math
from typing import Any

import numpy as np

import nitinol.language as tl
from nitinol.formats.blocks import FORMATS
from nitinol.formats.quantization import quantize as encode_in_numpy
from nitinol.graph.array import Array, whole_array
from nitinol.graph.dtypes import BLOCK_TYPES, PLAIN_FORMATS, BlockType, as_dtype
from nitinol.graph.launch import Output, launch
from nitinol.graph.nodes import Value
from nitinol.graph.operation import Operation
from nitinol.language.jit import jit
from nitinol.language.types import DType
from nitinol.ops.decode import blocks_per_run, decode_values
from nitinol.runtime import get_device
from nitinol.runtime.device import Buffer


@jit
def dequantize_kernel(
    weights, out, columns, row_bytes, FORMAT: tl.constexpr, BLOCKS: tl.constexpr, VALUES: tl.constexpr
):
    """One program per row. VALUES: how many values BLOCKS blocks have."""
    row = tl.program_id(0).to(tl.int64)
    decode_row(weights, out, row, row, columns, row_bytes, FORMAT, BLOCKS, VALUES)


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


def _dequantize_lower(target: str, weights: Array, dtype: DType) -> Array:
    columns = weights.shape[-1]
    return launch(
        dequantize_kernel, (math.prod(weights.shape[:-1]),), weights=weights, out=Output(weights.shape, dtype),
        columns=columns, row_bytes=FORMATS[weights.format].nbytes(columns), **run_arguments(weights.format, columns),
    )  # fmt: skip


DEQUANTIZE = Operation(
    "dequantize", rule=lambda weights, dtype: (weights.shape, dtype), lower=_dequantize_lower,
    reference=lambda weights, dtype: weights, vjp="its operand is stored in blocks, which have no small changes",
)  # fmt: skip
def dequantize(weights: Array, dtype: Any = "float32") -> Array:
    """An array that is stored in blocks as one of float32, exactly as ggml's reference decodes them: one product and
    one sum per value, rounded each; or of another float type, rounded once more. A plain array is converted."""
    return DEQUANTIZE(weights, dtype=as_dtype(dtype)) if weights.is_quantized else weights.astype(dtype)


def quantize(x: Any, format: str) -> Array:
    """An array that is stored in blocks of a format ("Q4_0", "Q8_0", "Q4_K", ...): shape [..., columns], columns a
    whole number of blocks. The blocks are made on the host; x is evaluated."""
    if format not in BLOCK_TYPES:
        raise ValueError(f"quantize: there is no block format {format!r:.40}; expected one of {', '.join(BLOCK_TYPES)}")
    device = x.buffer.device if isinstance(x, Array) else get_device()
    values = np.asarray(x.numpy() if isinstance(x, Array) else x, np.float32)
    block = BLOCK_TYPES[format]
    if not values.ndim or values.shape[-1] % block.values:
        raise ValueError(
            f"quantize: an array of shape {values.shape} has rows that are no whole number of {format}'s blocks of "
            f"{block.values} values"
        )
    data = np.ascontiguousarray(encode_in_numpy(values, format)).reshape(-1).view(np.uint8)
    buffer = device.allocate(data.nbytes)
    buffer.write(data)
    return stored_array(buffer, format, values.shape)


def stored_array(buffer: Buffer, format: str, shape: tuple[int, ...]) -> Array:
    """An array on memory that holds its elements in a format of GGUF, plain or of blocks; no copy.

    ValueError where the buffer has another length.
    """
    dtype: DType | BlockType = PLAIN_FORMATS[format] if format in PLAIN_FORMATS else BLOCK_TYPES[format]
    value = Value(tuple(shape), dtype, None, buffer)
    if (isinstance(dtype, BlockType) and shape[-1] % dtype.values) or value.nbytes != buffer.nbytes:
        raise ValueError(
            f"weights of format {format} and shape {tuple(shape)} lie in {buffer.nbytes} bytes, expected "
            f"{value.nbytes} bytes and rows of whole blocks"
        )
    return whole_array(value)

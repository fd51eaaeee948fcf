"""Activations as 8-bit integers, so that products with quantised weights are integer dot products.

Every 32 values share a scale, amax / 127, as llama.cpp's Q8_0 and Q8_1 blocks do for their side of the product:
relative to the largest of 32 values the rounding error is at most 1 / 254.
"""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

import nitinol.language as tl
from nitinol.array import Array, Output, launch
from nitinol.array.graph import Launch, whole
from nitinol.language.jit import jit


class Activations(NamedTuple):
    """Quantised activations of T tokens: `values` int8 [T, columns], `scales` float32 [T, columns / 32], and `sums`
    int32 [T, columns / 16], the sums of every 16 integers (what a weight's minimum or offset is multiplied by)."""

    values: Any
    scales: Any
    sums: Any


@jit
def quantize_activations_kernel(x, values, scales, sums, columns, GROUPS: tl.constexpr):
    """Program (t, c): 32 * GROUPS values of token t."""
    group = tl.program_id(0).to(tl.int64) * (columns // 32) + tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None, None] * 32 + (tl.arange(0, 2) * 16)[None, :, None] + tl.arange(0, 16)[None, None, :]
    value = tl.load(x + at)
    largest = tl.max(tl.max(tl.abs(value), axis=2), axis=1)
    inverse = tl.where(largest > 0, 127.0 / largest, 0.0)
    quant = tl.floor(value * inverse[:, None, None] + 0.5).to(tl.int32)
    tl.store(values + at, quant.to(tl.int8))
    tl.store(scales + group, largest / 127.0)
    tl.store(sums + group[:, None] * 2 + tl.arange(0, 2)[None, :], tl.sum(quant, axis=2))


def quantize_activations(x: Array) -> Activations:
    """x float32 [T, columns], columns a multiple of 32, as int8 with a scale per 32 values.

    Asked again for the same pending array, as by the projections to queries, keys and values, it gives the result
    that is recorded already.
    """
    tokens, columns = x.shape
    if columns % 32:
        raise ValueError(f"quantize_activations: rows have {columns} values, expected a multiple of 32")
    for node in list(x.view.value.readers):
        same = isinstance(node, Launch) and node.kernel is quantize_activations_kernel and node.inputs == (x.view,)
        if same and not node.done and all(write.number < node.number for write in x.view.value.writes):
            return Activations(*(Array(whole(value)) for value in node.outputs))
    groups = groups_per_program(columns)
    return Activations(
        *launch(
            quantize_activations_kernel, (tokens, columns // (32 * groups)), x=x, columns=columns, GROUPS=groups,
            values=Output((tokens, columns), "int8"), scales=Output((tokens, columns // 32), "float32"),
            sums=Output((tokens, columns // 16), "int32"),
        )
    )  # fmt: skip


def groups_per_program(columns: int) -> int:
    """Groups of 32 for one program: a power of two that divides the row, at most 32 (1024 values)."""
    groups = 32
    while columns // 32 % groups:
        groups //= 2
    return groups


def quantize_activations_reference(x: np.ndarray) -> Activations:
    """The same in NumPy float32, operation by operation."""
    groups = x.reshape(-1, 2, 16)
    largest = np.abs(groups).max(axis=(1, 2), keepdims=True)
    with np.errstate(divide="ignore"):
        inverse = np.where(largest > 0, np.float32(127) / largest, np.float32(0))
    quants = np.floor(groups * inverse + np.float32(0.5)).astype(np.int32)
    scales = largest / np.float32(127)
    tokens, columns = x.shape
    return Activations(
        quants.astype(np.int8).reshape(tokens, columns),
        scales.reshape(tokens, columns // 32),
        quants.sum(axis=2, dtype=np.int32).reshape(tokens, columns // 16),
    )

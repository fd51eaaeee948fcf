"""Rows of weights by token ids, of weights in any storage, and the gradient: row v of d_weight is the sum of d_out over
the tokens with id v.

The gradient has no atomic additions, whose order would show in the result. The first kernel links the tokens of each
word, the last one first: every program owns ROWS words, compares all ids with them, IDS at a time, and looks closer
where one is its own. The second follows each word's links and adds up in fp32.

Cost: N V / ROWS comparisons in vector registers (8192 tokens, 128,256 words: 16 million), N IDS single ones, then N D
values read and V D written. A word's sum is one chain: the most frequent word takes longest, and only blocks of columns
share it.
"""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

from typing import Any

import numpy as np

import nitinol.language as tl
from nitinol.formats.blocks import FORMATS
from nitinol.formats.quantization import dequantize as decode_in_numpy
from nitinol.graph.array import Array
from nitinol.graph.conversion import as_operand
from nitinol.graph.dtypes import as_dtype
from nitinol.graph.launch import Output, launch
from nitinol.graph.operation import Operation
from nitinol.language.jit import jit
from nitinol.language.types import DType, float32
from nitinol.ops.elementwise import maximum, minimum
from nitinol.ops.indexing import SCATTER_SUM
from nitinol.ops.quantized import decode_row, run_arguments
from nitinol.ops.tiles import load_row, store_row


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
def link_tokens_kernel(ids, heads, links, tokens, words, ROWS: tl.constexpr, IDS: tl.constexpr):
    """Program p: words ROWS * p .. ROWS * (p + 1) - 1. heads[word] is the last token with that id, links[token] the one
    before it with the same id, -1 where there is none."""
    first = tl.program_id(0) * ROWS
    row = tl.arange(0, ROWS)
    lane = tl.arange(0, IDS)
    head = tl.full((ROWS,), -1, tl.int32)
    for start in range(0, tokens, IDS):
        inside = lane < tokens - start
        word = tl.load(ids + start + lane, mask=inside, other=-1)
        if tl.program_id(0) == 0:
            known = (word >= 0) & (word < words)
            tl.device_assert(known | (inside == 0), "embedding: an id is outside the vocabulary")
        if tl.max(((word >= first) & (word < first + ROWS)).to(tl.int32)) > 0:
            for token in range(start, tl.minimum(start + IDS, tokens)):
                mine = tl.load(ids + token) - first
                if (mine >= 0) & (mine < ROWS):
                    tl.store(links + token, tl.max(tl.where(row == mine, head, -1)))
                    head = tl.where(row == mine, token, head)
    tl.store(heads + first + row, head, mask=first + row < words)


@jit
def embedding_gradient_kernel(d_out, heads, links, d_weight, columns, BLOCK: tl.constexpr):
    """Program (v, c): a block of columns of row v."""
    word = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    token = tl.load(heads + word)
    while token >= 0:
        total += load_row(d_out + token.to(tl.int64) * columns, at, columns, False)
        token = tl.load(links + token)
    store_row(d_weight + word.to(tl.int64) * columns, at, columns, total, False)


def blocks(target: str) -> dict[str, int]:
    """IDS: a few vector registers of a CPU, two values a thread of a GPU. BLOCK: columns of a program."""
    rows, ids, block = {"cpu": (64, 128, 1024), "metal": (32, 256, 256), "cuda": (64, 256, 512)}[target]
    return {"ROWS": rows, "IDS": ids, "BLOCK": block}


def embedding_backward(target: str, d_out: Array, ids: Array, words: int, dtype: Any = None) -> Array:
    """d_weight [words, D] of dtype (d_out's unless given), from d_out [..., D] and ids int32 or int64 of [...].

    An id outside 0 .. words - 1 fails an assertion when the kernel runs. Raises ValueError for shapes that do not fit,
    TypeError for ids that are no integers.
    """
    if not d_out.shape or tuple(ids.shape) != tuple(d_out.shape[:-1]):
        raise ValueError(
            f"embedding: d_out has shape {tuple(d_out.shape)} and the ids {tuple(ids.shape)}; expected [..., D] and "
            "[...]"
        )
    if not ids.dtype.is_int:
        raise TypeError(f"embedding: the ids are of type {ids.dtype}, expected int32 or int64")
    columns, sizes = d_out.shape[-1], blocks(target)
    block = min(sizes.pop("BLOCK"), tl.next_power_of_2(columns))
    heads, links = launch(
        link_tokens_kernel, (tl.cdiv(words, sizes["ROWS"]),), ids=ids, heads=Output((words,), "int32"),
        links=Output((ids.size,), "int32"), tokens=ids.size, words=words, **sizes,
    )  # fmt: skip
    return launch(embedding_gradient_kernel, (words, tl.cdiv(columns, block)), d_out=d_out, heads=heads, links=links,
                  d_weight=Output((words, columns), dtype or d_out.dtype), columns=columns, BLOCK=block)  # fmt: skip


def embedding_gradient_reference(d_out: np.ndarray, ids: np.ndarray, words: int) -> np.ndarray:
    """The same in float64."""
    result = np.zeros((words, d_out.shape[-1]))
    np.add.at(result, ids.reshape(-1), d_out.reshape(-1, d_out.shape[-1]).astype(np.float64))
    return result


# -------------------------------------------------------------------------------------------------- the operations


def _embedding_rule(weights: Array, tokens: Array, dtype: DType) -> tuple[tuple[int, ...], DType]:
    if weights.ndim != 2 or not (weights.is_quantized or weights.dtype.is_float):
        raise ValueError(
            f"embedding: the weights have shape {weights.shape} and type {weights.dtype}, expected [vocabulary, "
            "columns] of floats or blocks"
        )
    if not tokens.dtype.is_int or tokens.dtype.kind == "bool":
        raise TypeError(f"embedding: the tokens are of type {tokens.dtype}, expected integers")
    return (*tokens.shape, weights.shape[1]), dtype


def _embedding_lower(target: str, weights: Array, tokens: Array, dtype: DType) -> Array:
    vocabulary, columns = weights.shape
    if weights.format not in FORMATS:
        return weights.take(_in_vocabulary(weights, tokens), 0).astype(dtype)
    return launch(
        embedding_kernel, (tokens.size,), weights=weights, tokens=tokens,
        out=Output((*tokens.shape, columns), dtype), columns=columns,
        row_bytes=FORMATS[weights.format].nbytes(columns), vocabulary=vocabulary,
        **run_arguments(weights.format, columns),
    )  # fmt: skip


def _embedding_vjp(g: Array, out: Array, weights: Array, tokens: Array, dtype: DType) -> tuple[Array | None, None]:
    if weights.is_quantized:
        return None, None
    rows = _in_vocabulary(weights, tokens)
    if tl.float64 in (g.dtype, weights.dtype):  # the kernels add up in float32
        return SCATTER_SUM(g, rows, axis=0, extent=weights.shape[0]).astype(weights.dtype), None
    return EMBEDDING_GRADIENT(g, rows, words=weights.shape[0], dtype=weights.dtype), None


def _in_vocabulary(weights: Array, tokens: Array) -> Array:
    """Token ids, those outside the vocabulary moved to its first or last row."""
    return minimum(maximum(tokens, 0), weights.shape[0] - 1)


EMBEDDING = Operation(
    "embedding", rule=_embedding_rule, lower=_embedding_lower,
    reference=lambda weights, tokens, dtype: weights[np.clip(tokens, 0, len(weights) - 1)],
    vjp=_embedding_vjp,
)  # fmt: skip
EMBEDDING_GRADIENT = Operation(
    "embedding_gradient", lower=embedding_backward,
    rule=lambda d_out, tokens, words, dtype: ((words, d_out.shape[-1]), dtype),
    reference=lambda d_out, tokens, words, dtype: embedding_gradient_reference(d_out, tokens, words),
    vjp=lambda g, out, d_out, tokens, words, dtype: (EMBEDDING(g, tokens, dtype=d_out.dtype), None),
)  # fmt: skip


def embedding(weights: Any, tokens: Any, dtype: Any = None) -> Array:
    """Rows of weights [vocabulary, columns] by token ids of any shape: [*tokens.shape, columns], of type `dtype`, by
    default the weights', or float32 where they are stored in blocks. Ids outside the vocabulary give its first or last
    row, and so do their gradients."""
    weights = as_operand(weights)
    if weights.ndim != 2:
        return weights.take(tokens, 0)
    target = float32 if weights.is_quantized else weights.dtype
    return EMBEDDING(weights, tokens, dtype=target if dtype is None else as_dtype(dtype))


def embedding_reference(data: np.ndarray, format: str, shape: tuple[int, int], tokens: np.ndarray) -> np.ndarray:
    """All rows decoded in NumPy, those of the tokens kept."""
    return decode_in_numpy(data, format, shape)[np.clip(tokens, 0, shape[0] - 1)]

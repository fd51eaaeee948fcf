"""The gradient of an embedding: row v of d_weight is the sum of d_out over the tokens with id v.

No atomic additions, whose order would show in the result: every program owns some rows of d_weight, looks for their
tokens among all ids, and adds them up in order, in fp32. Cost: N D values read and V D written, and N V / ROWS
comparisons of ids in vector registers (8192 tokens, 128,256 words and 16 rows: 66 million, 2 ms of a core with 16
lanes); a program whose rows have tokens compares once more for each row.
"""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

from typing import Any

import numpy as np

import nitinol.language as tl
from nitinol.array import Array, Output, launch
from nitinol.kernels.tiles import load_row, store_row
from nitinol.language.jit import jit


@jit
def embedding_gradient_kernel(
    d_out, ids, d_weight, tokens, words, columns, ROWS: tl.constexpr, IDS: tl.constexpr, BLOCK: tl.constexpr
):
    """Program (w, c): ROWS rows of d_weight, BLOCK columns of them. IDS ids are compared at a time."""
    first = tl.program_id(0) * ROWS
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, IDS)
    found = tl.zeros((IDS,), tl.int32)
    for start in range(0, tokens, IDS):
        inside = lane < tokens - start
        word = tl.load(ids + start + lane, mask=inside, other=0)
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.device_assert((word >= 0) & (word < words), "embedding: an id is outside the vocabulary")
        found += (inside & (word >= first) & (word < first + ROWS)).to(tl.int32)
    some = tl.max(found) > 0
    for row in range(first, tl.minimum(first + ROWS, words)):
        total = tl.zeros((BLOCK,), tl.float32)
        if some:
            for start in range(0, tokens, IDS):
                inside = lane < tokens - start
                hit = inside & (tl.load(ids + start + lane, mask=inside, other=0) == row)
                if tl.max(hit.to(tl.int32)) > 0:
                    for token in range(start, tl.minimum(start + IDS, tokens)):
                        if tl.load(ids + token) == row:
                            total += load_row(d_out + token.to(tl.int64) * columns, at, columns, False)
        store_row(d_weight + row.to(tl.int64) * columns, at, columns, total, False)


def blocks(target: str, columns: int) -> dict[str, int]:
    """ROWS trades comparisons for programs; the program of the most frequent word takes longest, which more blocks of
    columns share. CPU: IDS of a few vector registers; GPUs: a value or two a thread."""
    rows, ids, block = {"cpu": (16, 128, 1024), "metal": (16, 128, 256), "cuda": (16, 256, 512)}[target]
    return {"ROWS": rows, "IDS": ids, "BLOCK": min(block, tl.next_power_of_2(columns))}


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
    columns = d_out.shape[-1]
    sizes = blocks(target, columns)
    return launch(
        embedding_gradient_kernel, (tl.cdiv(words, sizes["ROWS"]), tl.cdiv(columns, sizes["BLOCK"])), d_out=d_out,
        ids=ids, d_weight=Output((words, columns), dtype or d_out.dtype), tokens=ids.size, words=words,
        columns=columns, **sizes,
    )  # fmt: skip


def embedding_gradient_reference(d_out: np.ndarray, ids: np.ndarray, words: int) -> np.ndarray:
    """The same in float64."""
    result = np.zeros((words, d_out.shape[-1]))
    np.add.at(result, ids.reshape(-1), d_out.reshape(-1, d_out.shape[-1]).astype(np.float64))
    return result

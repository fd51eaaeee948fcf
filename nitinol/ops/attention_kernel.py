"""The forward kernel of attention whose scores never reach memory (Dao, "FlashAttention-2", 2023).

A program has a block of queries of one head and goes over the keys that they see, with the online softmax of Milakov
and Gimelshein (2018). What the backward pass needs of it is the log-sum-exp of each query's scores.
"""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

import nitinol.language as tl
from nitinol.language.jit import jit
from nitinol.ops.attention_tiles import (
    LOG2_E,
    converted,
    extent,
    load_rows,
    logits,
    operand,
    own_block,
    products,
    rows_at,
    scaled,
    store_rows,
    visible,
    visible_keys,
    weighted,
    zeros,
)


@jit(do_not_specialize=["tokens", "context", "sequences", "window"])
def attention_kernel(
    q, k, v, out, lse, starts_q, starts_k, tokens, context, sequences, window, factor, cap,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTHS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Program (m, h, b): a block of BLOCK_M queries of query head h of batch entry b; GROUP query heads share a head
    of keys and values. `tokens` and `context` are the rows of q and k in a batch entry."""
    head = tl.program_id(1)
    # the longest rows first: threads finish together
    batch, sequence, block = own_block(starts_q, tl.num_programs(0) - 1 - tl.program_id(0), sequences, BLOCK_M)
    begin, rows = extent(starts_q, sequence, tokens)
    k_begin, keys = extent(starts_k, sequence, context)
    first = block * BLOCK_M
    if first >= rows:
        return
    q = rows_at(q, batch, head, begin, q_batch, q_head, q_row)
    k = rows_at(k, batch, head // GROUP, k_begin, k_batch, k_head, k_row)
    v = rows_at(v, batch, head // GROUP, k_begin, v_batch, v_head, v_row)
    row = first + tl.arange(0, BLOCK_M)
    query = operand(load_rows(q, row, rows, q_row, HEAD_DIM, WIDTHS, True), factor, DOT)
    place = row + (keys - rows)  # the last query stands at the last key
    low, whole_low, whole_high, high = visible_keys(first, rows, keys, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = zeros(BLOCK_M, WIDTHS)
    for start in range(whole_low, whole_high, BLOCK_N):
        top, total, acc = attend(
            query, k, v, start, place, keys, window, factor, cap, k_row, v_row, top, total, acc,
            HEAD_DIM, WIDTHS, BLOCK_N, CAUSAL, WINDOW, CAP, DOT, False,
        )  # fmt: skip
    before, after = whole_low - low, tl.maximum(whole_low, whole_high)
    for step in range(0, before + tl.maximum(high - after, 0), BLOCK_N):
        start = tl.where(step < before, low + step, after + step - before)
        top, total, acc = attend(
            query, k, v, start, place, keys, window, factor, cap, k_row, v_row, top, total, acc,
            HEAD_DIM, WIDTHS, BLOCK_N, CAUSAL, WINDOW, CAP, DOT, True,
        )  # fmt: skip
    blind = total == 0.0  # sees no key: zeros, and the logarithm of zero
    out = rows_at(out, batch, head, begin, out_batch, out_head, out_row)
    store_rows(out, row, rows, out_row, acc, (1.0 / tl.where(blind, 1.0, total))[:, None], HEAD_DIM)
    lse = rows_at(lse, batch, head, begin, tl.num_programs(1) * tokens, tokens, 1)
    value = tl.where(blind, float("-inf"), (top + tl.log2(total)) * (1.0 / LOG2_E))
    tl.store(lse + row, value, mask=row < rows)


@jit
def attend(
    query, k, v, start, place, keys, window, factor, cap, k_row, v_row, top, total, acc,
    HEAD_DIM: tl.constexpr, WIDTHS: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, DOT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys and values: the new maximum, sum of weights and weighted values."""
    at = start + tl.arange(0, BLOCK_N)
    key = converted(load_rows(k, at, keys, k_row, HEAD_DIM, WIDTHS, MASKED), DOT)
    score = logits(products(query, key), factor, cap, CAP, DOT)
    if MASKED:
        seen = visible(place[:, None], at[None, :], keys, window, CAUSAL, WINDOW)
        score = tl.where(seen, score, float("-inf"))
    highest = tl.maximum(top, tl.max(score, axis=1))
    origin = tl.where(highest == float("-inf"), 0.0, highest) if MASKED else highest  # a query may have seen nothing
    weight = tl.exp2(score - origin[:, None])
    shrink = tl.exp2(top - origin)
    value = converted(load_rows(v, at, keys, v_row, HEAD_DIM, WIDTHS, MASKED), DOT)
    acc = weighted(weight.to(DOT), value, scaled(acc, shrink[:, None]))
    return highest, total * shrink + tl.sum(weight, axis=1), acc

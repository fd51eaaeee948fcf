"""The kernels of attention's backward pass (Dao, "FlashAttention-2", 2023, algorithm 2): weights are computed again
from the log-sum-exp of the forward pass. With w the weights, s the scores and * elementwise:

    dv = w^T d_out,   ds = w * (d_out v^T - rowsum(d_out * out)),   dk = scale ds^T q,   dq = scale ds k

Nothing is added atomically, so results do not depend on the order in which programs run.
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
    store_rows,
    visible,
    visible_keys,
    weighted,
    zeros,
)


@jit(do_not_specialize=["tokens"])
def row_products_kernel(
    out, d_out, delta, tokens, out_batch, out_head, out_row, d_batch, d_head, d_row,
    HEAD_DIM: tl.constexpr, WIDTHS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Program (m, h, b): delta = rowsum(d_out * out), float32 [batch, heads, tokens], of BLOCK_M rows."""
    head, batch = tl.program_id(1), tl.program_id(2)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    out = rows_at(out, batch, head, 0, out_batch, out_head, out_row)
    d_out = rows_at(d_out, batch, head, 0, d_batch, d_head, d_row)
    value = converted(load_rows(out, row, tokens, out_row, HEAD_DIM, WIDTHS, True), tl.float32)
    gradient = converted(load_rows(d_out, row, tokens, d_row, HEAD_DIM, WIDTHS, True), tl.float32)
    total = tl.sum(value[0] * gradient[0], axis=1)
    if len(value) == 2:
        total += tl.sum(value[1] * gradient[1], axis=1)
    delta = rows_at(delta, batch, head, 0, tl.num_programs(1) * tokens, tokens, 1)
    tl.store(delta + row, total, mask=row < tokens)


@jit(do_not_specialize=["tokens", "context", "sequences", "blocks", "window"])
def key_gradients_kernel(
    q, k, v, d_out, lse, delta, dk, dv, dq, starts_q, starts_k, tokens, context, sequences, blocks, window, factor, cap,
    scale, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, d_batch, d_head, d_row,
    dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTHS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Program (p, h, b): the gradients of blocks p, p + num_programs(0), ... below `blocks` of BLOCK_N keys and values
    of head h, of batch entry b; each over the queries of the GROUP heads that share them.

    With `dq`, float32 [num_programs(0), batch, heads, tokens, HEAD_DIM], the program adds there what its keys
    contribute to ds k: five products for each pair of blocks, where a kernel of its own for dq repeats two of them.
    """
    head = tl.program_id(1)
    heads = tl.num_programs(1) * GROUP
    if dq is not None:
        dq = dq + tl.program_id(0).to(tl.int64) * tl.num_programs(2) * heads * tokens * HEAD_DIM
        clear(rows_at(dq, tl.program_id(2), head * GROUP, 0, heads * tokens * HEAD_DIM, tokens * HEAD_DIM, HEAD_DIM),
              GROUP * tokens, HEAD_DIM, WIDTHS, BLOCK_M)  # fmt: skip
    for numbered in range(tl.program_id(0), blocks, tl.num_programs(0)):
        batch, sequence, block = own_block(starts_k, numbered, sequences, BLOCK_N)
        begin, rows = extent(starts_q, sequence, tokens)
        k_begin, keys = extent(starts_k, sequence, context)
        first = block * BLOCK_N
        last = tl.minimum(first + BLOCK_N, keys) - 1
        shift = keys - rows  # the last query stands at the last key
        at = first + tl.arange(0, BLOCK_N)
        key = rows_at(k, batch, head, k_begin, k_batch, k_head, k_row)
        key = operand(load_rows(key, at, keys, k_row, HEAD_DIM, WIDTHS, True), factor, DOT)
        value = rows_at(v, batch, head, k_begin, v_batch, v_head, v_row)
        value = converted(load_rows(value, at, keys, v_row, HEAD_DIM, WIDTHS, True), DOT)
        # Queries from `low` to `high` see some of these keys, those from `whole_low` to `whole_high` all of them.
        low, whole_low, high, whole_high = 0, 0, rows, rows // BLOCK_M * BLOCK_M
        if WINDOW:
            high = tl.maximum(tl.minimum(last - shift + window, rows), 0)
            whole_high = tl.maximum(tl.minimum(first - shift + window, rows), 0) // BLOCK_M * BLOCK_M
        if CAUSAL:
            low = tl.maximum(first - shift, 0) // BLOCK_M * BLOCK_M
            whole_low = tl.cdiv(tl.minimum(tl.maximum(last - shift, 0), high), BLOCK_M) * BLOCK_M
        if first + BLOCK_N > keys:  # keys that are not there have no weight, so the whole block goes under masks
            whole_high = 0
        if first >= keys:
            high = 0
        d_key = zeros(BLOCK_N, WIDTHS)
        d_value = zeros(BLOCK_N, WIDTHS)
        count = tl.maximum(whole_high - whole_low, 0) // BLOCK_M
        for step in range(0, GROUP * count):
            member = head * GROUP + step // count
            start = whole_low + step % count * BLOCK_M
            d_key, d_value = query_block(
                q, d_out, lse, delta, dq, key, value, batch, member, heads, begin, start, at, rows, keys, tokens,
                window, factor, cap, q_batch, q_head, q_row, d_batch, d_head, d_row, d_key, d_value,
                HEAD_DIM, WIDTHS, BLOCK_M, CAUSAL, WINDOW, CAP, DOT, False,
            )  # fmt: skip
        before, after = tl.maximum(whole_low - low, 0), tl.maximum(whole_low, whole_high)
        count = (before + tl.maximum(high - after, 0) + BLOCK_M - 1) // BLOCK_M
        for step in range(0, GROUP * count):
            member = head * GROUP + step // count
            passed = step % count * BLOCK_M
            start = tl.where(passed < before, low + passed, after + passed - before)
            d_key, d_value = query_block(
                q, d_out, lse, delta, dq, key, value, batch, member, heads, begin, start, at, rows, keys, tokens,
                window, factor, cap, q_batch, q_head, q_row, d_batch, d_head, d_row, d_key, d_value,
                HEAD_DIM, WIDTHS, BLOCK_M, CAUSAL, WINDOW, CAP, DOT, True,
            )  # fmt: skip
        d_keys = rows_at(dk, batch, head, k_begin, dk_batch, dk_head, dk_row)
        store_rows(d_keys, at, keys, dk_row, d_key, scale, HEAD_DIM)
        d_values = rows_at(dv, batch, head, k_begin, dv_batch, dv_head, dv_row)
        store_rows(d_values, at, keys, dv_row, d_value, 1.0, HEAD_DIM)


@jit
def query_block(
    q, d_out, lse, delta, dq, key, value, batch, head, heads, begin, start, at, rows, keys, tokens, window, factor, cap,
    q_batch, q_head, q_row, d_batch, d_head, d_row, d_key, d_value,
    HEAD_DIM: tl.constexpr, WIDTHS: tl.constexpr, BLOCK_M: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, DOT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What a block of queries adds to the gradients of keys and values. Tiles of scores are transposed, [keys,
    queries]: they are the left operands of both gradients."""
    row = start + tl.arange(0, BLOCK_M)
    queries = rows_at(q, batch, head, begin, q_batch, q_head, q_row)
    query = converted(load_rows(queries, row, rows, q_row, HEAD_DIM, WIDTHS, MASKED), DOT)
    gradients = rows_at(d_out, batch, head, begin, d_batch, d_head, d_row)
    gradient = converted(load_rows(gradients, row, rows, d_row, HEAD_DIM, WIDTHS, MASKED), DOT)
    of_row = rows_at(0, batch, head, begin, heads * tokens, tokens, 1) + row
    inside = row < rows
    if MASKED:
        level = tl.load(lse + of_row, mask=inside, other=0.0) * LOG2_E
        product = tl.load(delta + of_row, mask=inside, other=0.0)
    else:
        level, product = tl.load(lse + of_row) * LOG2_E, tl.load(delta + of_row)
    score = logits(products(key, query), factor, cap, CAP, DOT)
    weight = tl.exp2(score - level[None, :])
    if MASKED:
        seen = visible((row + (keys - rows))[None, :], at[:, None], keys, window, CAUSAL, WINDOW)
        weight = tl.where(seen & inside[None, :], weight, 0.0)
    d_score = weight * (products(value, gradient) - product[None, :])
    if CAP:
        d_score = d_score * (1.0 - (score / cap) * (score / cap))
    d_value = weighted(weight.to(DOT), gradient, d_value)
    d_key = weighted(d_score.to(DOT), query, d_key)
    if dq is not None:
        add_rows(rows_at(dq, batch, head, begin, heads * tokens * HEAD_DIM, tokens * HEAD_DIM, HEAD_DIM), row, rows,
                 tl.trans(d_score).to(DOT), key, HEAD_DIM, WIDTHS, MASKED)  # fmt: skip
    return d_key, d_value


@jit
def add_rows(base, at, length, weights, tiles, HEAD_DIM: tl.constexpr, WIDTHS: tl.constexpr, RAGGED: tl.constexpr):
    """Adds weights tiles to contiguous rows in memory; it is one program that does so to each."""
    for number in tl.static_range(len(tiles)):
        lane = (WIDTHS[0] if number else 0) + tl.arange(0, WIDTHS[number])
        pointers = base + at[:, None].to(tl.int64) * HEAD_DIM + lane[None, :]
        if RAGGED or (WIDTHS[0] if number else 0) + WIDTHS[number] > HEAD_DIM:
            mask = (at < length)[:, None] & (lane < HEAD_DIM)[None, :]
            tl.store(pointers, tl.dot(weights, tiles[number], tl.load(pointers, mask=mask, other=0.0)), mask=mask)
        else:
            tl.store(pointers, tl.dot(weights, tiles[number], tl.load(pointers)))


@jit
def clear(base, rows, HEAD_DIM: tl.constexpr, WIDTHS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Zeros in contiguous rows."""
    for start in range(0, rows, BLOCK_M):
        store_rows(base, start + tl.arange(0, BLOCK_M), rows, HEAD_DIM, zeros(BLOCK_M, WIDTHS), 1.0, HEAD_DIM)


@jit(do_not_specialize=["tokens", "parts"])
def add_parts_kernel(
    part, dq, parts, tokens, scale, dq_batch, dq_head, dq_row,
    HEAD_DIM: tl.constexpr, WIDTHS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Program (m, h, b): dq = scale times the sum of part [parts, batch, heads, tokens, HEAD_DIM], BLOCK_M rows."""
    head, batch = tl.program_id(1), tl.program_id(2)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    heads = tl.num_programs(1)
    part = rows_at(part, batch, head, 0, heads * tokens * HEAD_DIM, tokens * HEAD_DIM, HEAD_DIM)
    total = zeros(BLOCK_M, WIDTHS)
    for number in range(0, parts):
        one = rows_at(part, number, 0, 0, tl.num_programs(2) * heads * tokens * HEAD_DIM, 0, 0)
        more = load_rows(one, row, tokens, HEAD_DIM, HEAD_DIM, WIDTHS, True)
        total = (total[0] + more[0],) if len(more) == 1 else (total[0] + more[0], total[1] + more[1])
    dq = rows_at(dq, batch, head, 0, dq_batch, dq_head, dq_row)
    store_rows(dq, row, tokens, dq_row, total, scale, HEAD_DIM)


@jit(do_not_specialize=["tokens", "context", "sequences", "window"])
def query_gradients_kernel(
    q, k, v, d_out, lse, delta, dq, starts_q, starts_k, tokens, context, sequences, window, factor, cap, scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, d_batch, d_head, d_row,
    dq_batch, dq_head, dq_row,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTHS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Program (m, h, b): the gradient of a block of BLOCK_M queries of head h of batch entry b, over its keys."""
    head = tl.program_id(1)
    batch, sequence, block = own_block(starts_q, tl.num_programs(0) - 1 - tl.program_id(0), sequences, BLOCK_M)
    begin, rows = extent(starts_q, sequence, tokens)
    k_begin, keys = extent(starts_k, sequence, context)
    first = block * BLOCK_M
    if first >= rows:
        return
    q = rows_at(q, batch, head, begin, q_batch, q_head, q_row)
    d_out = rows_at(d_out, batch, head, begin, d_batch, d_head, d_row)
    k = rows_at(k, batch, head // GROUP, k_begin, k_batch, k_head, k_row)
    v = rows_at(v, batch, head // GROUP, k_begin, v_batch, v_head, v_row)
    row = first + tl.arange(0, BLOCK_M)
    query = operand(load_rows(q, row, rows, q_row, HEAD_DIM, WIDTHS, True), factor, DOT)
    gradient = converted(load_rows(d_out, row, rows, d_row, HEAD_DIM, WIDTHS, True), DOT)
    of_row = rows_at(0, batch, head, begin, tl.num_programs(1) * tokens, tokens, 1) + row
    level = tl.load(lse + of_row, mask=row < rows, other=0.0) * LOG2_E
    product = tl.load(delta + of_row, mask=row < rows, other=0.0)
    place = row + (keys - rows)
    low, whole_low, whole_high, high = visible_keys(first, rows, keys, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
    acc = zeros(BLOCK_M, WIDTHS)
    for start in range(whole_low, whole_high, BLOCK_N):
        acc = key_block(
            query, gradient, level, product, k, v, start, place, keys, window, factor, cap, k_row, v_row, acc,
            HEAD_DIM, WIDTHS, BLOCK_N, CAUSAL, WINDOW, CAP, DOT, False,
        )  # fmt: skip
    before, after = whole_low - low, tl.maximum(whole_low, whole_high)
    for step in range(0, before + tl.maximum(high - after, 0), BLOCK_N):
        start = tl.where(step < before, low + step, after + step - before)
        acc = key_block(
            query, gradient, level, product, k, v, start, place, keys, window, factor, cap, k_row, v_row, acc,
            HEAD_DIM, WIDTHS, BLOCK_N, CAUSAL, WINDOW, CAP, DOT, True,
        )  # fmt: skip
    dq = rows_at(dq, batch, head, begin, dq_batch, dq_head, dq_row)
    store_rows(dq, row, rows, dq_row, acc, scale, HEAD_DIM)


@jit
def key_block(
    query, gradient, level, product, k, v, start, place, keys, window, factor, cap, k_row, v_row, acc,
    HEAD_DIM: tl.constexpr, WIDTHS: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, DOT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What a block of keys and values adds to the gradient of queries."""
    at = start + tl.arange(0, BLOCK_N)
    key = converted(load_rows(k, at, keys, k_row, HEAD_DIM, WIDTHS, MASKED), DOT)
    value = converted(load_rows(v, at, keys, v_row, HEAD_DIM, WIDTHS, MASKED), DOT)
    score = logits(products(query, key), factor, cap, CAP, DOT)
    weight = tl.exp2(score - level[:, None])
    if MASKED:
        weight = tl.where(visible(place[:, None], at[None, :], keys, window, CAUSAL, WINDOW), weight, 0.0)
    d_score = weight * (products(gradient, value) - product[:, None])
    if CAP:
        d_score = d_score * (1.0 - (score / cap) * (score / cap))
    return weighted(d_score.to(DOT), key, acc)

"""Gradients of the gated delta rule in its chunked form; `delta_rule.py` has the notation and the forward pass.

Nothing of the forward pass is kept but its inputs: T, M, the states and U are made again. A bar is a loss's gradient by
a value. From the last chunk to the first, with S' the state after the chunk,

    U_bar = M^T O_bar + diag(e_C) K S'_bar,   X_bar = T^T U_bar,
    S_bar = G_C S'_bar + scale (diag(G) Q)^T O_bar - (diag(beta G) K)^T X_bar,

and then for all chunks at once what follows for q, k, g and beta, with A_bar = -X_bar U^T (of the solution of
(I + A) U = X, so that no gradient of the inverse itself is needed) and M_bar = O_bar U^T.
"""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

from typing import Any

import nitinol.language as tl
from nitinol.graph.launch import Output
from nitinol.language.jit import jit
from nitinol.ops.arguments import launch_on
from nitinol.ops.delta_rule import chunk_states, describe
from nitinol.ops.delta_rule_tiles import (
    EPSILON,
    chunk_span,
    decays_between,
    decays_from_start,
    decays_to_end,
    load_rows,
    load_unit_rows,
    sequence_span,
    store_rows,
)  # fmt: skip


@jit(do_not_specialize=["tokens", "chunks"])
def state_gradient_kernel(
    q, k, g, beta, starts, inverse, scores, d_out, d_final, d_states, d_wanted, d_v, d_initial, tokens, chunks, scale,
    GROUP: tl.constexpr, DIM_K: tl.constexpr, DIM_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, NORMALISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (b, h, n): block b of the columns of head h's state, from the last chunk of sequence n to the first.

    Leaves the gradient by the state after each chunk in d_states [slots, v_heads, D_k, D_v], X_bar in d_wanted [tokens,
    v_heads, D_v] and the gradients by v and by the initial state; d_final is None for zeros.
    """
    first_column = tl.program_id(0) * BLOCK_V
    head = tl.program_id(1)
    v_heads = tl.num_programs(1)
    heads = v_heads // GROUP
    sequence = tl.program_id(2)
    begin, end, first_slot = sequence_span(sequence, starts, tokens, chunks, CHUNK)
    row = tl.arange(0, CHUNK)
    state_row = tl.arange(0, BLOCK_K)
    state_inside = state_row < DIM_K
    own = (sequence * v_heads + head).to(tl.int64) * (DIM_K * DIM_V)
    if d_final is None:
        d_state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    else:
        d_state = load_rows(d_final + own, state_row, state_inside, DIM_V, DIM_V, BLOCK_V, first_column)
    count = tl.cdiv(end - begin, CHUNK)
    for step in range(count):
        chunk = count - 1 - step
        at = begin + chunk * CHUNK + row
        inside = at < end
        place = ((first_slot + chunk) * v_heads + head).to(tl.int64)
        store_rows(d_states + place * (DIM_K * DIM_V), state_row, state_inside, DIM_V, d_state, DIM_V, first_column)
        source = (head // GROUP) * DIM_K
        key = load_unit_rows(k + source, at, inside, heads * DIM_K, DIM_K, BLOCK_K, NORMALISE)
        query = load_unit_rows(q + source, at, inside, heads * DIM_K, DIM_K, BLOCK_K, NORMALISE)
        d_result = load_rows(d_out + head * DIM_V, at, inside, v_heads * DIM_V, DIM_V, BLOCK_V, first_column)
        share = tl.load(beta + head + at.to(tl.int64) * v_heads, mask=inside, other=0.0).to(tl.float32)
        gain = decays_from_start(g + head, at, inside, v_heads)
        rest = decays_to_end(g + head, at, end, v_heads)
        total = tl.sum(tl.where(row == CHUNK - 1, gain, 0.0))
        square = place * (CHUNK * CHUNK) + row[:, None] * CHUNK + row[None, :]
        d_correction = tl.dot(key * rest[:, None], d_state, input_precision=PRECISION)
        score = tl.load(scores + square)
        d_correction = tl.dot(tl.trans(score), d_result, d_correction, input_precision=PRECISION)
        solver = tl.load(inverse + square)
        d_x = tl.dot(tl.trans(solver), d_correction, input_precision=PRECISION)
        store_rows(d_wanted + head * DIM_V, at, inside, v_heads * DIM_V, d_x, DIM_V, first_column)
        store_rows(d_v + head * DIM_V, at, inside, v_heads * DIM_V, d_x * share[:, None], DIM_V, first_column)
        query *= (scale * gain)[:, None]
        d_state = tl.dot(tl.trans(query), d_result, d_state * total, input_precision=PRECISION)
        key *= (share * gain)[:, None]
        d_state -= tl.dot(tl.trans(key), d_x, input_precision=PRECISION)
    if d_initial is not None:
        store_rows(d_initial + own, state_row, state_inside, DIM_V, d_state, DIM_V, first_column)


@jit(do_not_specialize=["tokens", "chunks", "sequences"])
def input_gradient_kernel(
    q, k, v, g, beta, starts, states, corrections, d_out, d_states, d_wanted, d_q, d_k, d_g, d_beta,
    tokens, chunks, sequences, scale,
    GROUP: tl.constexpr, DIM_K: tl.constexpr, DIM_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, SEQUENCES: tl.constexpr, NORMALISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (slot, h): the gradients by q and k of head h in one chunk, and by g and beta of the GROUP heads of v
    that share it; one after the other, so that sums always have the same order."""
    slot = tl.program_id(0)
    v_heads = tl.num_programs(1) * GROUP
    first, end = chunk_span(slot, starts, tokens, chunks, sequences, CHUNK, SEQUENCES)
    row = tl.arange(0, CHUNK)
    state_row = tl.arange(0, BLOCK_K)
    state_inside = state_row < DIM_K
    at = first + row
    inside = at < end
    stride = tl.num_programs(1) * DIM_K
    source = tl.program_id(1) * DIM_K
    if first < end:  # nothing was written for a slot that no chunk has
        key = load_unit_rows(k + source, at, inside, stride, DIM_K, BLOCK_K, NORMALISE)
        query = load_unit_rows(q + source, at, inside, stride, DIM_K, BLOCK_K, NORMALISE)
        similar = tl.dot(key, tl.trans(key))
        asked = tl.dot(query, tl.trans(key))
        d_query = tl.zeros((CHUNK, BLOCK_K), tl.float32)
        d_key = tl.zeros((CHUNK, BLOCK_K), tl.float32)
        for member in range(GROUP):
            head = tl.program_id(1) * GROUP + member
            share = tl.load(beta + head + at.to(tl.int64) * v_heads, mask=inside, other=0.0).to(tl.float32)
            gain = decays_from_start(g + head, at, inside, v_heads)
            rest = decays_to_end(g + head, at, end, v_heads)
            decay = decays_between(g + head, at, inside, v_heads)
            d_scores = tl.zeros((CHUNK, CHUNK), tl.float32)
            d_known = tl.zeros((CHUNK, CHUNK), tl.float32)
            d_share = tl.zeros((CHUNK,), tl.float32)
            by_gain = tl.zeros((CHUNK,), tl.float32)  # times the gain: the gradient by its logarithm
            by_rest = tl.zeros((CHUNK,), tl.float32)  # the same of the rest
            by_total = tl.zeros((BLOCK_V,), tl.float32)
            matrix = (slot * v_heads + head).to(tl.int64) * (DIM_K * DIM_V)
            width = v_heads * DIM_V
            for column in range(0, DIM_V, BLOCK_V):
                d_result = load_rows(d_out + head * DIM_V, at, inside, width, DIM_V, BLOCK_V, column)
                d_x = load_rows(d_wanted + head * DIM_V, at, inside, width, DIM_V, BLOCK_V, column)
                correction = load_rows(corrections + head * DIM_V, at, inside, width, DIM_V, BLOCK_V, column)
                value = load_rows(v + head * DIM_V, at, inside, width, DIM_V, BLOCK_V, column)
                state = load_rows(states + matrix, state_row, state_inside, DIM_V, DIM_V, BLOCK_V, column)
                d_state = load_rows(d_states + matrix, state_row, state_inside, DIM_V, DIM_V, BLOCK_V, column)
                by_total += tl.sum(state * d_state, axis=0)
                d_scores = tl.dot(d_result, tl.trans(correction), d_scores, input_precision=PRECISION)
                d_known = tl.dot(d_x, tl.trans(correction), d_known, input_precision=PRECISION)
                from_result = tl.dot(d_result, tl.trans(state), input_precision=PRECISION) * (scale * gain)[:, None]
                from_x = tl.dot(d_x, tl.trans(state), input_precision=PRECISION) * gain[:, None]
                from_state = tl.dot(correction, tl.trans(d_state), input_precision=PRECISION) * rest[:, None]
                along = tl.sum(key * from_x, axis=1)
                d_share += tl.sum(d_x * value, axis=1) - along
                by_gain += tl.sum(query * from_result, axis=1) - share * along
                by_rest += tl.sum(key * from_state, axis=1)
                d_query += from_result
                d_key += from_state - share[:, None] * from_x
            d_asked = scale * decay * d_scores
            d_similar = tl.where(row[:, None] > row[None, :], -decay * d_known, 0.0)
            d_share += tl.sum(d_similar * similar, axis=1)
            d_similar *= share[:, None]
            d_query = tl.dot(d_asked, key, d_query, input_precision=PRECISION)
            d_key = tl.dot(tl.trans(d_asked), query, d_key, input_precision=PRECISION)
            d_key = tl.dot(d_similar + tl.trans(d_similar), key, d_key, input_precision=PRECISION)
            # g_m is in the exponent of every decay from j < m to i >= m.
            across = tl.cumsum(d_asked * asked + d_similar * similar, axis=0, reverse=True)
            d_log = tl.sum(tl.where(row[None, :] < row[:, None], across, 0.0), axis=1)
            total = tl.sum(tl.where(row == CHUNK - 1, gain, 0.0)) * tl.sum(by_total)
            d_log += tl.cumsum(by_gain, reverse=True) + (tl.cumsum(by_rest) - by_rest) + total
            tl.store(d_g + head + at.to(tl.int64) * v_heads, d_log, mask=inside)
            tl.store(d_beta + head + at.to(tl.int64) * v_heads, d_share, mask=inside)
        if NORMALISE:
            d_query = unit_gradient(q + source, at, inside, stride, d_query, DIM_K)
            d_key = unit_gradient(k + source, at, inside, stride, d_key, DIM_K)
        store_rows(d_q + source, at, inside, stride, d_query, DIM_K)
        store_rows(d_k + source, at, inside, stride, d_key, DIM_K)


@jit
def unit_gradient(base, row, inside, stride, gradient, DIM: tl.constexpr):
    """The gradient by rows x of a matrix, of that by x / |x|: what lies along x does not count."""
    value = load_rows(base, row, inside, stride, DIM, gradient.shape[1])
    scale = tl.rsqrt(tl.sum(value * value, axis=1) + EPSILON)[:, None]
    unit = value * scale
    return scale * (gradient - unit * tl.sum(unit * gradient, axis=1)[:, None])


def delta_rule_backward(
    target: str, d_out: Any, d_final: Any, q: Any, k: Any, v: Any, g: Any, beta: Any, initial: Any = None,
    scale: float | None = None, normalise: bool = False, starts: Any = None,
) -> tuple[Any, ...]:  # fmt: skip
    """The gradients by q, k, v, g, beta, in their dtypes, and by the initial state, float32 (None if that is None).

    d_out: the gradient by the results, of v's shape; d_final: by the last states, or None if the loss does not look at
    them. The others as in `delta_rule_forward`.
    """
    problem = describe("delta_rule_backward", target, q, k, v, g, beta, initial, scale, normalise, starts)
    slots, sequences, dim_k = (problem[name] for name in ("slots", "sequences", "DIM_K"))
    v_heads, dim_v = v.shape[2:]
    last = (sequences, v_heads, dim_k, dim_v)
    for what, found, expected in (("d_out", d_out, tuple(v.shape)), ("d_final", d_final, last)):
        if found is not None and tuple(found.shape) != expected:
            raise ValueError(f"delta_rule_backward: {what} has shape {tuple(found.shape)}, expected {expected}")
    inverse, scores, states, corrections, _ = chunk_states(problem)
    problem |= {"d_out": d_out, "d_final": d_final}
    matrices = Output((slots, v_heads, dim_k, dim_v), "float32")
    d_states, d_wanted, d_v, d_initial = launch_on(
        problem, state_gradient_kernel, (tl.cdiv(dim_v, problem["BLOCK_V"]), v_heads, sequences),
        {"d_states": matrices, "d_wanted": Output(v.shape, "float32"), "d_v": Output(v.shape, v.dtype),
         "d_initial": None if initial is None else Output(last, "float32")}, inverse=inverse, scores=scores,
    )  # fmt: skip
    d_q, d_k, d_g, d_beta = launch_on(
        problem, input_gradient_kernel, (slots, q.shape[2]),
        {"d_q": Output(q.shape, q.dtype), "d_k": Output(k.shape, k.dtype), "d_g": Output(g.shape, g.dtype),
         "d_beta": Output(beta.shape, beta.dtype)},
        states=states, corrections=corrections, d_states=d_states, d_wanted=d_wanted,
    )  # fmt: skip
    return d_q, d_k, d_v, d_g, d_beta, d_initial

"""The gated delta rule (Yang, Kautz and Hatamizadeh, "Gated Delta Networks", 2024), the layer of Qwen3-Next.

A head keeps a matrix S [D_k, D_v] that maps keys to values. Each token lets it decay, and then moves what it answers to
the key k by the share beta towards the value v:

    S_t = a_t S_(t-1) + beta_t k_t u_t^T,   u_t = v_t - (a_t S_(t-1))^T k_t,   a_t = exp(g_t),   o_t = scale S_t^T q_t

Two forms. The recurrent one goes token by token, for decoding. The chunked one takes CHUNK tokens at a time: with S the
state before the chunk, decays e_ij = exp(g_(j+1) + ... + g_i), and G_i = exp(g_1 + ... + g_i), the corrections
U = (beta_i u_i) of a chunk solve

    (I + A) U = X,   A_ij = beta_i e_ij k_i . k_j for j < i,   X_i = beta_i (v_i - G_i S^T k_i)

(the WY representation; section 3.3 of the paper), and then, with M_ij = scale e_ij q_i . k_j for j <= i,

    o_i = scale G_i S^T q_i + (M U)_i,   S' = G_C S + sum_j e_Cj k_j U_j^T.

`solve_kernel` finds M and T = (I + A)^-1 of all chunks at once, `state_kernel` goes from chunk to chunk and leaves the
states and U, `output_kernel` does the rest for all chunks at once. e_ij is the exponential of a sum of the decays
between j and i and never a quotient or a difference of sums from the start of the chunk: that is exact after a strong
decay, also after g = -inf.

Sequences lie one after the other in q [tokens, heads, D_k] and v [tokens, v_heads, D_v]; group = v_heads / heads
neighbouring heads of v share one of q and k. With `starts` (int32 [sequences + 1], where each begins, as cu_seqlens)
they have lengths of their own, and chunk c of sequence n has the slot starts[n] // CHUNK + n + c, so that no table is
needed; without, all have one length and slots have no gaps.
"""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

from typing import Any

import numpy as np

import nitinol.language as tl
from nitinol.graph.launch import InPlace, Output
from nitinol.language.jit import jit
from nitinol.ops.arguments import launch_on
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
    unit_triangular_inverse,
)  # fmt: skip

LARGEST_KEY = 256  # a program keeps the keys of a chunk whole


@jit(do_not_specialize=["tokens", "chunks", "sequences"])
def solve_kernel(
    q, k, g, beta, starts, inverse, scores, tokens, chunks, sequences, scale,
    GROUP: tl.constexpr, DIM_K: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, SEQUENCES: tl.constexpr,
    NORMALISE: tl.constexpr,
):  # fmt: skip
    """Program (slot, h): T and M of one chunk of head h of v, to inverse and scores [slots, v_heads, CHUNK, CHUNK]."""
    slot = tl.program_id(0)
    head = tl.program_id(1)
    v_heads = tl.num_programs(1)
    heads = v_heads // GROUP
    first, end = chunk_span(slot, starts, tokens, chunks, sequences, CHUNK, SEQUENCES)
    row = tl.arange(0, CHUNK)
    at = first + row
    inside = at < end
    decay = decays_between(g + head, at, inside, v_heads)
    source = (head // GROUP) * DIM_K
    key = load_unit_rows(k + source, at, inside, heads * DIM_K, DIM_K, BLOCK_K, NORMALISE)
    query = load_unit_rows(q + source, at, inside, heads * DIM_K, DIM_K, BLOCK_K, NORMALISE)
    share = tl.load(beta + head + at.to(tl.int64) * v_heads, mask=inside, other=0.0).to(tl.float32)
    known = tl.where(row[:, None] > row[None, :], share[:, None] * decay * tl.dot(key, tl.trans(key)), 0.0)
    place = (slot * v_heads + head).to(tl.int64) * (CHUNK * CHUNK) + row[:, None] * CHUNK + row[None, :]
    tl.store(inverse + place, unit_triangular_inverse(known))
    tl.store(scores + place, scale * decay * tl.dot(query, tl.trans(key)))


@jit(do_not_specialize=["tokens", "chunks"])
def state_kernel(
    k, v, g, beta, starts, initial, inverse, states, corrections, final, tokens, chunks,
    GROUP: tl.constexpr, DIM_K: tl.constexpr, DIM_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, NORMALISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (b, h, n): block b of the columns of head h's state, through all chunks of sequence n.

    Leaves the state before each chunk in states [slots, v_heads, D_k, D_v], U in corrections [tokens, v_heads, D_v] and
    the last state in final [sequences, v_heads, D_k, D_v]; `initial`, like final, is None for zeros.
    """
    first_column = tl.program_id(0) * BLOCK_V
    head = tl.program_id(1)
    v_heads = tl.num_programs(1)
    heads = v_heads // GROUP
    sequence = tl.program_id(2)
    begin, end, slot = sequence_span(sequence, starts, tokens, chunks, CHUNK)
    row = tl.arange(0, CHUNK)
    state_row = tl.arange(0, BLOCK_K)
    state_inside = state_row < DIM_K
    own = (sequence * v_heads + head).to(tl.int64) * (DIM_K * DIM_V)
    if initial is None:
        state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    else:
        state = load_rows(initial + own, state_row, state_inside, DIM_V, DIM_V, BLOCK_V, first_column)
    for start in range(begin, end, CHUNK):
        at = start + row
        inside = at < end
        place = (slot * v_heads + head).to(tl.int64)
        store_rows(states + place * (DIM_K * DIM_V), state_row, state_inside, DIM_V, state, DIM_V, first_column)
        source = k + (head // GROUP) * DIM_K
        key = load_unit_rows(source, at, inside, heads * DIM_K, DIM_K, BLOCK_K, NORMALISE)
        value = load_rows(v + head * DIM_V, at, inside, v_heads * DIM_V, DIM_V, BLOCK_V, first_column)
        share = tl.load(beta + head + at.to(tl.int64) * v_heads, mask=inside, other=0.0).to(tl.float32)
        gain = decays_from_start(g + head, at, inside, v_heads)
        wanted = share[:, None] * (value - gain[:, None] * tl.dot(key, state, input_precision=PRECISION))
        solver = tl.load(inverse + place * (CHUNK * CHUNK) + row[:, None] * CHUNK + row[None, :])
        correction = tl.dot(solver, wanted, input_precision=PRECISION)
        store_rows(corrections + head * DIM_V, at, inside, v_heads * DIM_V, correction, DIM_V, first_column)
        rest = decays_to_end(g + head, at, end, v_heads)
        total = tl.sum(tl.where(row == CHUNK - 1, gain, 0.0))
        state = tl.dot(tl.trans(key * rest[:, None]), correction, state * total, input_precision=PRECISION)
        slot += 1
    store_rows(final + own, state_row, state_inside, DIM_V, state, DIM_V, first_column)


@jit(do_not_specialize=["tokens", "chunks", "sequences"])
def output_kernel(
    q, g, starts, scores, states, corrections, out, tokens, chunks, sequences, scale,
    GROUP: tl.constexpr, DIM_K: tl.constexpr, DIM_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, SEQUENCES: tl.constexpr, NORMALISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (slot, h, b): block b of the columns of head h's results in one chunk."""
    slot = tl.program_id(0)
    head = tl.program_id(1)
    v_heads = tl.num_programs(1)
    heads = v_heads // GROUP
    first_column = tl.program_id(2) * BLOCK_V
    first, end = chunk_span(slot, starts, tokens, chunks, sequences, CHUNK, SEQUENCES)
    row = tl.arange(0, CHUNK)
    at = first + row
    inside = at < end
    if first < end:  # nothing was written for a slot that no chunk has
        state_row = tl.arange(0, BLOCK_K)
        place = (slot * v_heads + head).to(tl.int64)
        source = q + (head // GROUP) * DIM_K
        query = load_unit_rows(source, at, inside, heads * DIM_K, DIM_K, BLOCK_K, NORMALISE)
        state = load_rows(
            states + place * (DIM_K * DIM_V), state_row, state_row < DIM_K, DIM_V, DIM_V, BLOCK_V, first_column
        )
        gain = decays_from_start(g + head, at, inside, v_heads)
        score = tl.load(scores + place * (CHUNK * CHUNK) + row[:, None] * CHUNK + row[None, :])
        correction = load_rows(
            corrections + head * DIM_V, at, inside, v_heads * DIM_V, DIM_V, BLOCK_V, first_column
        )
        result = (scale * gain)[:, None] * tl.dot(query, state, input_precision=PRECISION)
        result = tl.dot(score, correction, result, input_precision=PRECISION)
        store_rows(out + head * DIM_V, at, inside, v_heads * DIM_V, result, DIM_V, first_column)


@jit(do_not_specialize=["tokens"])
def recurrent_kernel(
    q, k, v, g, beta, state, out, tokens, scale,
    GROUP: tl.constexpr, DIM_K: tl.constexpr, DIM_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    NORMALISE: tl.constexpr,
):  # fmt: skip
    """Program (b, h, n): block b of the columns of head h's state, through `tokens` tokens of sequence n; in place."""
    first_column = tl.program_id(0) * BLOCK_V
    head = tl.program_id(1)
    v_heads = tl.num_programs(1)
    heads = v_heads // GROUP
    sequence = tl.program_id(2)
    state_row = tl.arange(0, BLOCK_K)
    state_inside = state_row < DIM_K
    column = first_column + tl.arange(0, BLOCK_V)
    own = state + (sequence * v_heads + head).to(tl.int64) * (DIM_K * DIM_V)
    memory = load_rows(own, state_row, state_inside, DIM_V, DIM_V, BLOCK_V, first_column)
    for token in range(sequence * tokens, (sequence + 1) * tokens):
        at = token.to(tl.int64) * v_heads + head
        source = (token.to(tl.int64) * heads + head // GROUP) * DIM_K + state_row
        key = tl.load(k + source, mask=state_inside, other=0.0).to(tl.float32)
        query = tl.load(q + source, mask=state_inside, other=0.0).to(tl.float32)
        if NORMALISE:
            key *= tl.rsqrt(tl.sum(key * key) + EPSILON)
            query *= tl.rsqrt(tl.sum(query * query) + EPSILON)
        value = tl.load(v + at * DIM_V + column, mask=column < DIM_V, other=0.0).to(tl.float32)
        memory *= tl.exp(tl.load(g + at).to(tl.float32))
        share = tl.load(beta + at).to(tl.float32)
        correction = share * (value - tl.sum(memory * key[:, None], axis=0))
        memory += key[:, None] * correction[None, :]
        result = tl.sum(memory * (query * scale)[:, None], axis=0)
        tl.store(out + at * DIM_V + column, result, mask=column < DIM_V)
    store_rows(own, state_row, state_inside, DIM_V, memory, DIM_V, first_column)


def blocks(target: str, dim_k: int, dim_v: int, halves: bool) -> dict[str, Any]:
    """CHUNK tokens at a time, BLOCK_V columns of the state in a program of the chunked form, DECODE_V of the other.

    PRECISION of the products with states and with results of 11 bits or fewer (halves): there matrix instructions for
    fp32 cut to 11 bits do. The triangular system is always solved in fp32.
    """
    table = {"cpu": (32, 64, 64), "metal": (32, 32, 32), "cuda": (64 if dim_k <= 128 else 32, 32, 32)}
    chunk, columns, decode = table[target]
    most = tl.next_power_of_2(dim_v)
    return {
        "CHUNK": chunk, "BLOCK_V": min(columns, most), "DECODE_V": min(decode, most),
        "PRECISION": "tf32" if halves else "ieee",
    }  # fmt: skip


def delta_rule_recurrent(
    target: str, q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any, scale: float | None = None,
    normalise: bool = False,
) -> Any:  # fmt: skip
    """The results o [batch, T, v_heads, D_v] of T tokens, one after the other, in v's dtype; `state`, float32
    [batch, v_heads, D_k, D_v], is updated in place. The other arguments as in `delta_rule_forward`."""
    problem = describe("delta_rule_recurrent", target, q, k, v, g, beta, state, scale, normalise, None)
    problem |= {"BLOCK_V": problem["DECODE_V"], "state": InPlace(state)}
    grid = (tl.cdiv(v.shape[3], problem["BLOCK_V"]), v.shape[2], problem["sequences"])
    (out,) = launch_on(problem, recurrent_kernel, grid, {"out": Output(v.shape, v.dtype)})
    return out


def delta_rule_forward(
    target: str, q: Any, k: Any, v: Any, g: Any, beta: Any, initial: Any = None, scale: float | None = None,
    normalise: bool = False, starts: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    """The results o [batch, T, v_heads, D_v] in v's dtype, and the last state, float32 [batch, v_heads, D_k, D_v].

    q, k [batch, T, heads, D_k], v [batch, T, v_heads, D_v] with v_heads a multiple of heads, g (the logarithm of the
    decay) and beta [batch, T, v_heads]: float32, float16 or bfloat16. initial: the state before the first token, zeros
    unless given. scale: D_k ** -0.5 unless given. normalise: q and k are divided by their lengths first. starts: int32
    [sequences + 1], ascending from 0 to T, with batch 1: where sequences of their own begin in T; states are then
    [sequences, v_heads, D_k, D_v].

    Raises ValueError for shapes that do not fit together.
    """
    problem = describe("delta_rule_forward", target, q, k, v, g, beta, initial, scale, normalise, starts)
    _, scores, states, corrections, final = chunk_states(problem)
    (out,) = launch_on(
        problem, output_kernel, (problem["slots"], v.shape[2], tl.cdiv(v.shape[3], problem["BLOCK_V"])),
        {"out": Output(v.shape, v.dtype)}, scores=scores, states=states, corrections=corrections,
    )  # fmt: skip
    return out, final


def chunk_states(problem: dict[str, Any]) -> list[Any]:
    """T, M, the states before the chunks, U and the last states, as the kernels describe them."""
    slots, sequences, chunk = (problem[name] for name in ("slots", "sequences", "CHUNK"))
    (v_heads, dim_v), dim_k = problem["v"].shape[2:], problem["DIM_K"]
    square = Output((slots, v_heads, chunk, chunk), "float32")
    inverse, scores = launch_on(problem, solve_kernel, (slots, v_heads), {"inverse": square, "scores": square})
    return [inverse, scores, *launch_on(
        problem, state_kernel, (tl.cdiv(dim_v, problem["BLOCK_V"]), v_heads, sequences),
        {"states": Output((slots, v_heads, dim_k, dim_v), "float32"),
         "corrections": Output(problem["v"].shape, "float32"),
         "final": Output((sequences, v_heads, dim_k, dim_v), "float32")}, inverse=inverse,
    )]  # fmt: skip


def describe(
    name: str, target: str, q: Any, k: Any, v: Any, g: Any, beta: Any, initial: Any, scale: float | None,
    normalise: bool, starts: Any,
) -> dict[str, Any]:  # fmt: skip
    """What the kernels take of these arguments, by the names of their parameters; ValueError if they do not fit."""
    sequences, v_heads, dim_k, dim_v = check(name, q, k, v, g, beta, initial, starts)
    batch, tokens, heads, _ = q.shape
    constants = blocks(target, dim_k, dim_v, v.dtype.nbytes == 2)
    constants["CHUNK"] = min(constants["CHUNK"], max(16, tl.next_power_of_2(tokens)))
    chunks = tl.cdiv(tokens, constants["CHUNK"])
    return constants | {
        "q": q, "k": k, "v": v, "g": g, "beta": beta,
        "initial": initial, "starts": starts, "tokens": tokens, "chunks": chunks, "sequences": sequences,
        "slots": batch * chunks if starts is None else tokens // constants["CHUNK"] + sequences,
        "scale": float(dim_k**-0.5 if scale is None else scale), "GROUP": v_heads // heads, "DIM_K": dim_k,
        "DIM_V": dim_v, "BLOCK_K": tl.next_power_of_2(dim_k), "NORMALISE": normalise,
        "SEQUENCES": 1 if starts is None else tl.next_power_of_2(sequences),
    }  # fmt: skip


def check(
    name: str, q: Any, k: Any, v: Any, g: Any, beta: Any, initial: Any, starts: Any
) -> tuple[int, int, int, int]:
    """The shape of a state [sequences, v_heads, D_k, D_v]; ValueError for operands that do not fit together."""
    inputs = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    fits = len(q.shape) == len(v.shape) == 4 and tuple(q.shape) == tuple(k.shape) and 0 not in (*q.shape, *v.shape)
    fits = fits and tuple(q.shape[:2]) == tuple(v.shape[:2]) and v.shape[2] % q.shape[2] == 0
    if not fits or not tuple(g.shape) == tuple(beta.shape) == tuple(v.shape[:3]):
        found = ", ".join(f"{what} {tuple(x.shape)}" for what, x in inputs.items())
        raise ValueError(
            f"{name}: found {found}; expected q and k [batch, T, heads, D_k], v [batch, T, v_heads, D_v] with v_heads "
            "a multiple of heads, g and beta [batch, T, v_heads], and no extent of 0"
        )
    batch, _, _, dim_k = q.shape
    v_heads, dim_v = v.shape[2:]
    if dim_k > LARGEST_KEY:
        raise ValueError(f"{name}: keys have {dim_k} values, expected {LARGEST_KEY} at most; use more heads")
    if starts is not None and (batch != 1 or len(starts.shape) != 1 or starts.shape[0] < 2):
        raise ValueError(
            f"{name}: starts has shape {tuple(starts.shape)} and q {tuple(q.shape)}; expected [sequences + 1], and the "
            "sequences one after the other in a batch of 1"
        )
    sequences = batch if starts is None else starts.shape[0] - 1
    expected = (sequences, v_heads, dim_k, dim_v)
    if initial is not None and (tuple(initial.shape) != expected or str(initial.dtype) != "fp32"):
        raise ValueError(f"{name}: the state is {initial.dtype} {tuple(initial.shape)}, expected fp32 {expected}")
    return expected


def delta_rule_reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray, beta: np.ndarray, initial: np.ndarray | None = None,
    scale: float | None = None, normalise: bool = False,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The recurrence in float64: results and last states of sequences of one length."""
    q, k, v, g, beta = (x.astype(np.float64) for x in (q, k, v, g, beta))
    if normalise:
        q, k = (x / np.sqrt((x * x).sum(axis=-1, keepdims=True) + EPSILON.value) for x in (q, k))
    q, k = (np.repeat(x, v.shape[2] // x.shape[2], axis=2) for x in (q, k))
    (batch, tokens, heads, dim_v), dim_k = v.shape, q.shape[3]
    state = np.zeros((batch, heads, dim_k, dim_v)) if initial is None else initial.astype(np.float64)
    out = np.empty(v.shape)
    for t in range(tokens):
        state = state * np.exp(g[:, t])[..., None, None]
        correction = v[:, t] - np.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + np.einsum("bhk,bhv->bhkv", k[:, t] * beta[:, t, :, None], correction)
        out[:, t] = np.einsum("bhkv,bhk->bhv", state, q[:, t]) * (dim_k**-0.5 if scale is None else scale)
    return out, state

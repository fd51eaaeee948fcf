"""Causal attention with an online softmax (Dao et al., "FlashAttention", 2022): scores never reach memory.

Keys and values are [sequences, kv_heads, context, head_dim], float32 or float16; GROUP neighbouring query heads share
one of them (grouped-query attention, Ainslie et al., 2023). All sequences have as many queries; query t of one stands
at position[sequence] + t and sees the positions up to its own, with a window (Beltagy et al., "Longformer", 2020) only
the last WINDOW of them. Two kernels: many queries at once (a prompt), and one query (a token) whose work is split over
the sequence into a fixed number of parts, so that the result does not depend on how many threads share them.

Scores are kept in units of log2(e), which spares exp2 a product per value.
"""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

from typing import Any

import numpy as np

import nitinol.language as tl
from nitinol.graph.array import Array
from nitinol.graph.launch import Output, launch
from nitinol.graph.operation import Operation
from nitinol.language.jit import jit

LOG2_E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(-1e38)  # below any score
SMALLEST = tl.constexpr(1e-30)  # below any sum of weights, of which one is 1


@jit(do_not_specialize=["tokens"])
def prefill_attention_kernel(
    q, k, v, position, out, tokens, context, q_token, q_head, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr = 0, DOT: tl.constexpr = tl.float32,
):  # fmt: skip
    """Program (m, h, s): tokens BLOCK_M * m ... of the `tokens` of sequence s, query head h. Query t of all sequences'
    starts at t * q_token + h * q_head in q and out; `position` is int32 [sequences], or None for 0. WINDOW: 0 for none.
    DOT: what queries, keys, values and weights are multiplied in."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the longest rows first: threads finish together
    head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2)
    row = first + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_D)
    offset = 0 if position is None else tl.load(position + sequence)
    rows = (sequence * tokens + row)[:, None].to(tl.int64) * q_token + head * q_head + lane[None, :]
    inside = (row < tokens)[:, None] & (lane < HEAD_DIM)[None, :]
    query = (tl.load(q + rows, mask=inside, other=0.0).to(tl.float32) * (scale * LOG2_E)).to(DOT)
    base = (sequence * (tl.num_programs(1) // GROUP) + head // GROUP) * context * HEAD_DIM
    keys = k + base
    values = v + base
    place = offset + row
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    length = tl.minimum(tl.minimum(first + BLOCK_M, tokens) + offset, context)
    whole = tl.minimum(first + offset + 1, length) // BLOCK_N * BLOCK_N  # keys that every query of the block sees
    begin = 0
    if WINDOW:  # and those before `begin` none does, those before `seen` not all
        begin = tl.maximum(first + offset - (WINDOW - 1), 0) // BLOCK_N * BLOCK_N
        seen = tl.cdiv(tl.maximum(first + offset + BLOCK_M - WINDOW, 0), BLOCK_N) * BLOCK_N
        seen = tl.maximum(tl.minimum(seen, whole), begin)
        for start in range(begin, seen, BLOCK_N):
            top, total, acc = attend(
                query, keys, values, start, place, length, top, total, acc, HEAD_DIM, BLOCK_D, BLOCK_N, True, WINDOW
            )
        begin = seen
    for start in range(begin, whole, BLOCK_N):
        top, total, acc = attend(
            query, keys, values, start, place, length, top, total, acc, HEAD_DIM, BLOCK_D, BLOCK_N, False
        )
    for start in range(tl.maximum(begin, whole) if WINDOW else whole, length, BLOCK_N):
        top, total, acc = attend(
            query, keys, values, start, place, length, top, total, acc, HEAD_DIM, BLOCK_D, BLOCK_N, True, WINDOW
        )
    tl.store(out + rows, acc / total[:, None], mask=inside)


@jit
def attend(
    query, keys, values, start, place, length, top, total, acc,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    WINDOW: tl.constexpr = 0,
):  # fmt: skip
    """One block of keys and values: the new maximum, sum of weights and weighted values. Keys and values are multiplied
    in the query's type.

    MASKED: only keys below `length` are read, and only those up to its `place` (with WINDOW: the last WINDOW of these)
    count for a query.
    """
    at = start + tl.arange(0, BLOCK_N)
    key = load_block(keys, at, length, HEAD_DIM, BLOCK_D, MASKED).to(query.dtype)
    scores = tl.dot(query, tl.trans(key))
    if MASKED:
        visible = at[None, :] <= place[:, None]
        if WINDOW:
            visible = visible & (at[None, :] > place[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
    highest = tl.maximum(top, tl.max(scores, axis=1))
    if WINDOW:  # a query may see no key of its first blocks: -inf - -inf would be NaN
        highest = tl.maximum(highest, LEAST)
    weights = tl.exp2(scores - highest[:, None])
    shrink = tl.exp2(top - highest)
    total = total * shrink + tl.sum(weights, axis=1)
    value = load_block(values, at, length, HEAD_DIM, BLOCK_D, MASKED).to(query.dtype)
    return highest, total, tl.dot(weights.to(query.dtype), value, acc * shrink[:, None])


@jit
def load_block(base, at, length, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows `at` of keys or values [BLOCK_N, BLOCK_D], zeros where there are none."""
    lane = tl.arange(0, BLOCK_D)
    pointers = base + at[:, None].to(tl.int64) * HEAD_DIM + lane[None, :]
    if MASKED:
        return tl.load(pointers, mask=(at < length)[:, None] & (lane < HEAD_DIM)[None, :], other=0.0)
    if HEAD_DIM != BLOCK_D:
        return tl.load(pointers, mask=(lane < HEAD_DIM)[None, :], other=0.0)
    return tl.load(pointers)


@jit
def decode_attention_kernel(
    q, k, v, position, out, part, tops, totals, context, scale,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr, WINDOW: tl.constexpr = 0, DOT: tl.constexpr = tl.float32,
):  # fmt: skip
    """Program (h, p, s): the GROUP query heads of key and value head h of sequence s, on part p of the positions that
    its token sees.

    ROWS is GROUP rounded up to a power of two, or more; WINDOW and DOT as above. With one part the result goes to
    `out`; with more, each leaves its weighted values (part [sequences, heads, SPLITS, head_dim]), maximum and sum of
    weights (tops, totals [sequences, heads, SPLITS]) to `combine_kernel`. A part without positions leaves maximum -inf.
    """
    sequence = tl.program_id(2)
    head = sequence * tl.num_programs(0) + tl.program_id(0)
    split = tl.program_id(1)
    length = tl.minimum(tl.load(position + sequence) + 1, context)  # first: all else waits for it
    member = tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK_D)
    row = head * GROUP + member
    inside = (member < GROUP)[:, None] & (lane < HEAD_DIM)[None, :]
    query = tl.load(q + row[:, None] * HEAD_DIM + lane[None, :], mask=inside, other=0.0) * (scale * LOG2_E)
    query = query.to(DOT)
    base = head.to(tl.int64) * context * HEAD_DIM
    begin = tl.maximum(length - WINDOW, 0) if WINDOW else 0
    share = tl.cdiv(tl.cdiv(length - begin, SPLITS), BLOCK_N) * BLOCK_N
    begin += split * share
    end = tl.minimum(begin + share, length)
    place = tl.zeros((ROWS,), tl.int32) + (length - 1)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    rest = begin
    if tl.float32 == DOT:  # whole blocks without masks; with matrix instructions masks cost less than a second loop
        rest += tl.maximum(end - begin, 0) // BLOCK_N * BLOCK_N
        for start in range(begin, rest, BLOCK_N):
            top, total, acc = attend(
                query, k + base, v + base, start, place, length, top, total, acc, HEAD_DIM, BLOCK_D, BLOCK_N, False
            )
    for start in range(rest, end, BLOCK_N):
        top, total, acc = attend(
            query, k + base, v + base, start, place, length, top, total, acc, HEAD_DIM, BLOCK_D, BLOCK_N, True
        )
    if SPLITS == 1:
        acc /= tl.maximum(total, SMALLEST)[:, None]
        tl.store(out + row[:, None] * HEAD_DIM + lane[None, :], acc, mask=inside)
    else:
        slot = row * SPLITS + split
        tl.store(part + slot[:, None] * HEAD_DIM + lane[None, :], acc, mask=inside)
        tl.store(tops + slot, top, mask=member < GROUP)
        tl.store(totals + slot, total, mask=member < GROUP)


@jit
def combine_kernel(part, tops, totals, out, SPLITS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Program (h, c): the parts of query head h (of all sequences'), brought to a common maximum and added; BLOCK_D of
    its values."""
    head = tl.program_id(0)
    lane = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    value = combined(part, tops, totals, head, lane, SPLITS, HEAD_DIM)
    tl.store(out + head * HEAD_DIM + lane, value, mask=None if HEAD_DIM % BLOCK_D == 0 else lane < HEAD_DIM)


@jit
def combined(part, tops, totals, head, lane, SPLITS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Values `lane` of a head, of its parts."""
    split = head * SPLITS + tl.arange(0, SPLITS)
    top = tl.load(tops + split)
    total = tl.load(totals + split)
    at = split[:, None] * HEAD_DIM + lane[None, :]
    if HEAD_DIM % lane.shape[0] == 0:
        acc = tl.load(part + at)
    else:
        acc = tl.load(part + at, mask=(lane < HEAD_DIM)[None, :], other=0.0)
    weight = tl.exp2(top - tl.maximum(tl.max(top), LEAST))
    return tl.sum(acc * weight[:, None], axis=0) * (1.0 / tl.maximum(tl.sum(total * weight), SMALLEST))


def _cached_lower(
    target: str, q: Array, k_cache: Array, v_cache: Array, position: Array, scale: float, window: int
) -> Array:
    sequences, kv_heads, context, head_dim = k_cache.shape
    rows, width = q.shape
    tokens, heads = rows // sequences, width // head_dim
    window = 0 if window >= context else window
    constants = blocks(target, heads // kv_heads, head_dim, tokens, sequences * kv_heads, k_cache)
    arguments = {"q": q, "k": k_cache, "v": v_cache, "position": position, "context": context, "scale": scale,
                 "WINDOW": window}  # fmt: skip
    out = Output(q.shape, q.dtype)
    if tokens > 1:
        return launch(
            prefill_attention_kernel, (tl.cdiv(tokens, constants["BLOCK_M"]), heads, sequences), out=out,
            tokens=tokens, q_token=width, q_head=head_dim, **arguments, **constants,
        )  # fmt: skip
    most = tl.next_power_of_2(tl.cdiv(window or context, constants["BLOCK_N"]))
    splits = constants["SPLITS"] = min(constants["SPLITS"], most)  # others were empty
    if splits == 1:
        return launch(
            decode_attention_kernel, (kv_heads, 1, sequences), out=out, part=None, tops=None, totals=None, **arguments,
            **constants,
        )  # fmt: skip
    part, tops, totals = launch(
        decode_attention_kernel, (kv_heads, splits, sequences), out=None,
        part=Output((sequences, heads, splits, head_dim), "float32"),
        tops=Output((sequences, heads, splits), "float32"), totals=Output((sequences, heads, splits), "float32"),
        **arguments, **constants,
    )  # fmt: skip
    columns = constants["BLOCK_D"] if target == "cpu" else 32  # on GPUs many programs with short sums
    return launch(
        combine_kernel, (sequences * heads, tl.cdiv(head_dim, columns)), part=part, tops=tops, totals=totals, out=out,
        SPLITS=splits, HEAD_DIM=head_dim, BLOCK_D=columns,
    )  # fmt: skip


def _causal_lower(target: str, q: Array, k: Array, v: Array, scale: float, window: int) -> Array:
    heads, tokens, head_dim = q.shape
    prefill = max(tokens, 2)  # the kernel of many tokens, also for one
    constants = blocks(target, heads // k.shape[0], head_dim, prefill, k.shape[0], k)
    return launch(
        prefill_attention_kernel, (tl.cdiv(tokens, constants["BLOCK_M"]), heads), q=q, k=k, v=v, position=None,
        out=Output(q.shape, q.dtype), tokens=tokens, context=tokens, q_token=head_dim, q_head=tokens * head_dim,
        scale=scale, WINDOW=0 if window >= tokens else window, **constants,
    )  # fmt: skip


def blocks(target: str, group: int, head_dim: int, tokens: int, kv_heads: int, keys: Any) -> dict[str, Any]:
    """Constexpr arguments and warps of either kernel, by whether there is more than one token a sequence; kv_heads:
    those of all sequences. CUDA's matrix instructions take halves as they are. For one token most of their 16 rows are
    empty, but a fifth of the instructions that single products need is left, and keys and values come at the same
    time."""
    halves = target == "cuda" and keys.dtype.nbytes == 2
    if tokens > 1:
        constants: dict[str, Any] = prefill_constants(group, head_dim, tokens)
        if halves:
            constants |= {"DOT": keys.dtype, "_warps": 4 if tokens <= 16 else 8, "BLOCK_M": 16 if tokens <= 16 else 128}
        return constants
    constants = decode_constants(group, head_dim, kv_heads, target)
    if halves:
        constants |= {"DOT": keys.dtype, "_warps": 4, "ROWS": max(16, constants["ROWS"])}
    return constants


def prefill_constants(group: int, head_dim: int, tokens: int) -> dict[str, int]:
    """Of every target: queries, keys and values of a block, in fp32, fit a 32 to 64 KB cache together."""
    check_head(head_dim)
    return {
        "GROUP": group, "HEAD_DIM": head_dim, "BLOCK_D": tl.next_power_of_2(head_dim),
        "BLOCK_M": 16 if tokens <= 16 else 64, "BLOCK_N": 64,
    }  # fmt: skip


def decode_constants(group: int, head_dim: int, kv_heads: int, target: str = "cpu") -> dict[str, int]:
    """About 16 programs on a CPU, whatever the number of threads; more on a GPU."""
    check_head(head_dim)
    programs = {"cpu": 16, "metal": 32, "cuda": 256}[target]
    return {
        "GROUP": group, "ROWS": tl.next_power_of_2(group), "HEAD_DIM": head_dim,
        "BLOCK_D": tl.next_power_of_2(head_dim), "BLOCK_N": 64,
        "SPLITS": tl.next_power_of_2(max(1, programs // kv_heads)),
    }  # fmt: skip


def check_head(head_dim: int) -> None:
    """ValueError for heads that do not fit a block."""
    if not 0 < head_dim <= 1024:
        raise ValueError(f"attention with a head_dim of {head_dim}: expected 1 to 1024")


def attention_reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, position: int, scale: float, window: int = 0
) -> np.ndarray:
    """q [heads, T, head_dim] at positions position + t over k, v [kv_heads, context, head_dim], in float64."""
    heads, tokens, _ = q.shape
    group = heads // k.shape[0]
    length = position + tokens
    key, value = (np.repeat(x[:, :length].astype(np.float64), group, axis=0) for x in (k, v))
    scores = np.einsum("htd,hnd->htn", q.astype(np.float64), key) * scale
    distance = position + np.arange(tokens)[:, None] - np.arange(length)[None, :]
    seen = (distance >= 0) & (distance < (window or length))
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("htn,hnd->htd", weights / weights.sum(axis=-1, keepdims=True), value)


# -------------------------------------------------------------------------------------------------- the operations


def _cached_rule(q: Array, k_cache: Array, v_cache: Array, position: Array, scale: float, window: int) -> Any:
    sequences, kv_heads, _, head_dim = k_cache.shape
    if q.shape[1] % (kv_heads * head_dim):
        raise ValueError(
            f"cached_attention: q has rows of {q.shape[1]} values, expected a multiple of the cache's {kv_heads} heads "
            f"of {head_dim}"
        )
    tokens_of_each("cached_attention", q.shape[0], sequences, position)
    check_head(head_dim)
    return q.shape, q.dtype


def _causal_rule(q: Array, k: Array, v: Array, scale: float, window: int) -> Any:
    heads, tokens, head_dim = q.shape
    if heads % k.shape[0] or k.shape[1:] != (tokens, head_dim) or v.shape != k.shape:
        raise ValueError(
            f"causal_attention: q, k, v have shapes {q.shape}, {k.shape}, {v.shape}; expected [heads, T, head_dim] and "
            "twice [kv_heads, T, head_dim], heads a multiple of kv_heads"
        )
    check_head(head_dim)
    return q.shape, q.dtype


CACHED_ATTENTION = Operation(
    "cached_attention", rule=_cached_rule, lower=_cached_lower,
    vjp="it reads a cache, which is for inference; train with nitinol.attention",
)  # fmt: skip
CAUSAL_ATTENTION = Operation(
    "causal_attention", rule=_causal_rule, lower=_causal_lower,
    vjp="it is the kernel of inference; train with nitinol.attention",
)  # fmt: skip


def cached_attention(
    q: Any, k_cache: Any, v_cache: Any, position: Any, scale: float | None = None, window: int = 0
) -> Array:
    """Attention of each sequence's tokens, at its position, position + 1, ..., over a cache that already holds their
    keys and values.

    q float32 [sequences * T, heads * head_dim], one sequence's rows after the other's; caches [sequences, kv_heads,
    context, head_dim], position int32 [sequences]; of q's shape and type. `scale` is 1 / sqrt(head_dim) unless given;
    window: how many positions, its own among them, a token sees (0: all). With T = 1 a sequence that has nothing to say
    in this step is at position -1 and its row zeros.
    """
    if len(k_cache.shape) != 4 or len(q.shape) != 2:
        raise ValueError(
            f"cached_attention: q has shape {tuple(q.shape)} and the cache {tuple(k_cache.shape)}, expected "
            "[sequences * T, heads * head_dim] and [sequences, kv_heads, context, head_dim]"
        )
    scale = float(k_cache.shape[3] ** -0.5 if scale is None else scale)
    return CACHED_ATTENTION(q, k_cache, v_cache, position, scale=scale, window=window)


def tokens_of_each(name: str, rows: int, sequences: int, position: Any) -> int:
    """How many of `rows` belong to each sequence; ValueError where they do not divide, or positions do not fit."""
    if tuple(position.shape) != (sequences,) or rows % sequences:
        raise ValueError(
            f"{name}: {rows} rows of queries and positions of shape {tuple(position.shape)} for a cache of {sequences} "
            f"sequences, expected a multiple of {sequences} rows and shape ({sequences},)"
        )
    return rows // sequences


def causal_attention(q: Any, k: Any, v: Any, scale: float | None = None, window: int = 0) -> Array:
    """softmax(q k^T * scale, causal) v for q float32 [heads, T, head_dim] and k, v [kv_heads, T, head_dim]; of q's
    shape and type. window: how many positions, its own among them, a token sees (0: all)."""
    return CAUSAL_ATTENTION(q, k, v, scale=float(q.shape[2] ** -0.5 if scale is None else scale), window=window)

"""Which expert takes which token (Shazeer et al., "Outrageously large neural networks: the sparsely-gated
mixture-of-experts layer", 2017), and the order of the work that follows from it.

`route`: scores of E experts for each token, the k highest, and their weights. `dispatch`: the N * k pairs of a token
and an expert sorted by expert, by counting and without atomics: pairs of one expert stay in the order of their tokens,
so that every run gives the same order. Beside the order it makes a table of tiles on the device, which tells each
program of a grouped product (experts.py) its expert and its rows: the host never learns how many tokens an expert has.
"""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

import nitinol.language as tl
from nitinol.graph.array import Array
from nitinol.graph.launch import Output, launch
from nitinol.language.jit import jit

MOST_EXPERTS = 256  # one tile of scores
MOST_CHOSEN = 8  # each is a round of its own
SMALLEST = tl.constexpr(1e-20)  # sum of chosen scores: sigmoids that are all 0 get the weights 0


class Routing(NamedTuple):
    """weights float32 [N, k] and experts int32 [N, k], by descending score."""

    weights: Any
    experts: Any


class Dispatch(NamedTuple):
    """The order of N * k pairs by expert; pair p is choice p % k of token p // k.

    offsets int32 [E + 1]: expert e has the rows offsets[e] .. offsets[e + 1]; source int32 [N * k]: the pair of a row;
    place int32 [N * k]: the row of a pair; table int32 [3, tiles]: expert (-1: nothing to do), first row and the
    expert's last row + 1 of a tile of up to `block` rows; chosen: k.
    """

    offsets: Any
    source: Any
    place: Any
    table: Any
    block: int
    chosen: int


@jit
def route_kernel(
    logits, weights, chosen, tokens, experts,
    TOKENS: tl.constexpr, EXPERTS: tl.constexpr, COUNT: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """Program t: the COUNT highest scores of TOKENS tokens; of equal ones the first. A token with NaN gets experts that
    exist and weights NaN."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = token < tokens
    lane = tl.arange(0, EXPERTS)[None, :]
    scores = expert_scores(logits, token, inside, tokens, experts, EXPERTS, SIGMOID)
    left = tl.where(lane < experts, scores, -1.0)
    KEPT: tl.constexpr = tl.next_power_of_2(COUNT)
    rank = tl.arange(0, KEPT)[None, :]
    picks = tl.zeros((TOKENS, KEPT), tl.float32)
    places = tl.zeros((TOKENS, KEPT), tl.int32)
    for choice in tl.static_range(COUNT):
        best, at = tl.max(left, axis=1, return_indices=True)
        picks = tl.where(rank == choice, best[:, None], picks)
        places = tl.where(rank == choice, tl.minimum(at, experts - 1)[:, None], places)
        left = tl.where(lane == at[:, None], -1.0, left)
    if NORMALISE:
        picks = picks / tl.maximum(tl.sum(picks, axis=1), SMALLEST)[:, None]
    to = token[:, None] * COUNT + rank
    kept = inside[:, None] & (rank < COUNT)
    tl.store(weights + to, picks, mask=kept)
    tl.store(chosen + to, places, mask=kept)


@jit
def expert_scores(logits, token, inside, tokens, experts, EXPERTS: tl.constexpr, SIGMOID: tl.constexpr):
    """Softmax over the experts or a sigmoid of each: float32 [tokens, EXPERTS]."""
    lane = tl.arange(0, EXPERTS)[None, :]
    row = tl.minimum(token, tokens - 1).to(tl.int64)[:, None] * experts
    value = tl.load(logits + row + lane, mask=lane < experts, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        return 1.0 / (1.0 + tl.exp(-value))
    exponential = tl.exp(value - tl.max(value, axis=1)[:, None])
    return exponential / tl.sum(exponential, axis=1)[:, None]


@jit
def route_gradient_kernel(
    logits, chosen, d_weights, d_logits, tokens, experts,
    TOKENS: tl.constexpr, EXPERTS: tl.constexpr, COUNT: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """Program t: d_logits of TOKENS tokens; scores are computed again, the choice is taken as constant.

    With s the chosen scores, S their sum and w = s / S: ds = (dw - sum(dw * w)) / S, or ds = dw without NORMALISE; then
    softmax: s * (ds - sum(ds * s)), sigmoid: ds * s * (1 - s).
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = token < tokens
    lane = tl.arange(0, EXPERTS)[None, :]
    scores = expert_scores(logits, token, inside, tokens, experts, EXPERTS, SIGMOID)
    source = tl.minimum(token, tokens - 1) * COUNT
    given = tl.zeros((TOKENS, EXPERTS), tl.float32)
    picked = tl.zeros((TOKENS, EXPERTS), tl.float32)
    for choice in tl.static_range(COUNT):
        here = lane == tl.load(chosen + source + choice)[:, None]
        given = tl.where(here, tl.load(d_weights + source + choice).to(tl.float32)[:, None], given)
        picked = tl.where(here, scores, picked)
    if NORMALISE:
        total = tl.maximum(tl.sum(picked, axis=1), SMALLEST)[:, None]
        mean = tl.sum(given * picked, axis=1)[:, None] / total
        given = tl.where(picked > 0, (given - mean) / total, 0.0)
    if SIGMOID:
        gradient = given * scores * (1.0 - scores)
    else:
        gradient = scores * (given - tl.sum(given * scores, axis=1)[:, None])
    at = token.to(tl.int64)[:, None] * experts + lane
    tl.store(d_logits + at, gradient, mask=inside[:, None] & (lane < experts))


@jit
def count_kernel(chosen, counts, pairs, experts, CHUNK: tl.constexpr, EXPERTS: tl.constexpr, STEP: tl.constexpr):
    """Program c: counts [c, experts], how many of CHUNK pairs go to each expert."""
    lane = tl.arange(0, EXPERTS)
    total = histogram(chosen, tl.program_id(0) * CHUNK, pairs, CHUNK, EXPERTS, STEP)
    tl.store(counts + tl.program_id(0) * experts + lane, total, mask=lane < experts)


@jit
def histogram(chosen, first, pairs, CHUNK: tl.constexpr, EXPERTS: tl.constexpr, STEP: tl.constexpr):
    """How many of the pairs first .. first + CHUNK go to each expert: int32 [EXPERTS]."""
    total = tl.zeros((EXPERTS,), tl.int32)
    for start in range(first, tl.minimum(first + CHUNK, pairs), STEP):
        total += tl.sum(choices(chosen, start, pairs, EXPERTS, STEP), axis=0)
    return total


@jit
def choices(chosen, start, pairs, EXPERTS: tl.constexpr, STEP: tl.constexpr):
    """1 where a pair (axis 0) goes to an expert (axis 1), else 0: int32 [STEP, EXPERTS]."""
    pair = start + tl.arange(0, STEP)
    expert = tl.load(chosen + pair, mask=pair < pairs, other=-1)
    return (expert[:, None] == tl.arange(0, EXPERTS)[None, :]).to(tl.int32)


@jit
def place_kernel(
    chosen, counts, offsets, source, place, table, pairs, chunks, experts, tiles, block,
    CHUNK: tl.constexpr, EXPERTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Program c: the rows of CHUNK pairs, and its share of the table. The first also stores the offsets.

    counts is None where one chunk is all: then the program counts itself.
    """
    chunk = tl.program_id(0)
    lane = tl.arange(0, EXPERTS)
    before = tl.zeros((EXPERTS,), tl.int32)
    if counts is None:
        total = histogram(chosen, 0, pairs, CHUNK, EXPERTS, STEP)
    else:
        total = tl.zeros((EXPERTS,), tl.int32)
        for other in range(0, chunks):
            count = tl.load(counts + other * experts + lane, mask=lane < experts, other=0)
            before += tl.where(other < chunk, count, 0)
            total += count
    stop = tl.cumsum(total)
    first = stop - total
    if chunk == 0:
        tl.store(offsets + lane, first, mask=lane < experts)
        tl.store(offsets + experts, pairs)
    following = first + before
    for start in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, pairs), STEP):
        pair = start + tl.arange(0, STEP)
        chose = choices(chosen, start, pairs, EXPERTS, STEP)
        earlier = tl.cumsum(chose, axis=0) - chose
        row = tl.sum(chose * (following[None, :] + earlier), axis=1)
        tl.store(place + pair, row, mask=pair < pairs)
        tl.store(source + row, pair, mask=pair < pairs)
        following += tl.sum(chose, axis=0)
    last_tile = tl.cumsum((total + (block - 1)) // block)
    first_tile = last_tile - (total + (block - 1)) // block
    for start in range(chunk * STEP, tiles, tl.num_programs(0) * STEP):
        tile = start + tl.arange(0, STEP)
        mine = (first_tile[None, :] <= tile[:, None]) & (tile[:, None] < last_tile[None, :])
        begin = first[None, :] + (tile[:, None] - first_tile[None, :]) * block
        to = table + tile
        tl.store(to, tl.sum(tl.where(mine, lane[None, :] + 1, 0), axis=1) - 1, mask=tile < tiles)
        tl.store(to + tiles, tl.sum(tl.where(mine, begin, 0), axis=1), mask=tile < tiles)
        tl.store(to + 2 * tiles, tl.sum(tl.where(mine, stop[None, :], 0), axis=1), mask=tile < tiles)


def blocks(target: str, pairs: int, experts: int) -> dict[str, int]:
    """Tokens of a program that routes; pairs of a chunk and of a step of the sort."""
    lanes = tl.next_power_of_2(experts)
    step = max(1, min(16, 4096 // lanes))  # 4096 comparisons at a time: 32 registers of 128 threads
    return {
        "tokens": 1 if target != "cpu" else 8, "chunk": 1024 if target == "cpu" else 256, "step": step,
    }  # fmt: skip


def tile_rows(pairs: int, experts: int) -> int:
    """Rows of a tile of the products."""
    mean = max(1, pairs // experts)
    return tl.next_power_of_2(mean) if mean <= 4 else min(64, max(16, tl.next_power_of_2(mean)))


def route_forward(target: str, logits: Array, chosen: int, scores: str = "softmax", normalise: bool = True) -> Routing:
    """The `chosen` experts with the highest scores for each token, and their weights.

    logits [N, E] float32, float16 or bfloat16, E up to 256; scores: "softmax" over the experts, or "sigmoid" of each;
    normalise: the weights of a token are divided by their sum. ValueError for other scores and sizes.
    """
    tokens, experts = extents(logits, chosen, scores)
    size = blocks(target, tokens * chosen, experts)["tokens"]
    weights, places = launch(
        route_kernel, (tl.cdiv(tokens, size),), logits=logits, weights=Output((tokens, chosen), "float32"),
        chosen=Output((tokens, chosen), "int32"), tokens=tokens, experts=experts, TOKENS=size,
        EXPERTS=tl.next_power_of_2(experts), COUNT=chosen, SIGMOID=scores == "sigmoid", NORMALISE=normalise,
    )  # fmt: skip
    return Routing(weights, places)


def route_backward(
    target: str, d_weights: Array, logits: Array, routing: Routing, scores: str = "softmax", normalise: bool = True
) -> Array:
    """The gradient to logits, of their shape and type, from d_weights [N, k]; the other arguments as forwards."""
    chosen = routing.experts.shape[1]
    tokens, experts = extents(logits, chosen, scores)
    if tuple(d_weights.shape) != (tokens, chosen):
        raise ValueError(f"route: d_weights has shape {d_weights.shape}, expected {(tokens, chosen)}")
    size = blocks(target, tokens * chosen, experts)["tokens"]
    return launch(
        route_gradient_kernel, (tl.cdiv(tokens, size),), logits=logits, chosen=routing.experts, d_weights=d_weights,
        d_logits=Output(logits.shape, logits.dtype), tokens=tokens, experts=experts, TOKENS=size,
        EXPERTS=tl.next_power_of_2(experts), COUNT=chosen, SIGMOID=scores == "sigmoid", NORMALISE=normalise,
    )  # fmt: skip


def dispatch_forward(target: str, chosen: Array, experts: int) -> Dispatch:
    """The pairs of `chosen` int32 [N, k] in the order of their experts (each 0 .. experts - 1), and the tiles of the
    products; see Dispatch. One launch for up to 256 pairs (1024 on a CPU), else two."""
    tiles = dispatch_results(chosen, experts)[3][0][1]
    pairs = chosen.size
    sizes = blocks(target, pairs, experts)
    block = tile_rows(pairs, experts)
    chunks = tl.cdiv(pairs, sizes["chunk"])
    constants = {"CHUNK": sizes["chunk"], "EXPERTS": tl.next_power_of_2(experts), "STEP": sizes["step"]}
    counts = None
    if chunks > 1:
        counts = launch(
            count_kernel, (chunks,), chosen=chosen, counts=Output((chunks, experts), "int32"), pairs=pairs,
            experts=experts, **constants,
        )  # fmt: skip
    offsets, source, place, table = launch(
        place_kernel, (chunks,), chosen=chosen, counts=counts, offsets=Output((experts + 1,), "int32"),
        source=Output((pairs,), "int32"), place=Output((pairs,), "int32"), table=Output((3, tiles), "int32"),
        pairs=pairs, chunks=chunks, experts=experts, tiles=tiles, block=block, **constants,
    )  # fmt: skip
    return Dispatch(offsets, source, place, table, block, chosen.shape[1])


def dispatch_results(chosen: Array, experts: int) -> list[tuple[tuple[int, ...], Any]]:
    """Shapes and types of offsets, source, place and table; ValueError for a choice that does not fit."""
    if chosen.ndim != 2 or not 1 <= experts <= MOST_EXPERTS:
        raise ValueError(f"dispatch: chosen has shape {chosen.shape} of {experts} experts, expected [N, k] of 1 to 256")
    pairs = chosen.size
    block = tile_rows(pairs, experts)
    tiles = (pairs + (block - 1) * min(experts, pairs)) // block  # every expert's last tile may be short
    return [(shape, tl.int32) for shape in ((experts + 1,), (pairs,), (pairs,), (3, tiles))]


def extents(logits: Array, chosen: int, scores: str) -> tuple[int, int]:
    """N and E, or ValueError."""
    if scores not in ("softmax", "sigmoid"):
        raise ValueError(f'route: scores are {scores!r}, expected "softmax" or "sigmoid"')
    if logits.ndim != 2 or not 1 <= logits.shape[1] <= MOST_EXPERTS:
        raise ValueError(f"route: logits have shape {logits.shape}, expected [N, E] with E from 1 to {MOST_EXPERTS}")
    if not 1 <= chosen <= min(MOST_CHOSEN, logits.shape[1]):
        raise ValueError(
            f"route: {chosen} of {logits.shape[1]} experts for a token, expected 1 to "
            f"{min(MOST_CHOSEN, logits.shape[1])}"
        )
    return logits.shape[0], logits.shape[1]


def route_reference(
    logits: np.ndarray, chosen: int, scores: str = "softmax", normalise: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Weights in float64 and experts."""
    values = scores_reference(logits, scores)
    places = np.argsort(-values, axis=1, kind="stable")[:, :chosen]
    return weights_reference(values, places, normalise), places


def scores_reference(logits: np.ndarray, scores: str) -> np.ndarray:
    """All scores in float64."""
    wide = logits.astype(np.float64)
    if scores == "sigmoid":
        return 1 / (1 + np.exp(-wide))
    exponentials = np.exp(wide - wide.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def weights_reference(values: np.ndarray, places: np.ndarray, normalise: bool) -> np.ndarray:
    """The weights of chosen experts from all scores."""
    picks = np.take_along_axis(values, places, axis=1)
    return picks / picks.sum(axis=1, keepdims=True) if normalise else picks


def route_gradient_reference(
    d_weights: np.ndarray, logits: np.ndarray, places: np.ndarray, scores: str = "softmax", normalise: bool = True
) -> np.ndarray:
    """The gradient to logits in float64."""
    values = scores_reference(logits, scores)
    given = d_weights.astype(np.float64)
    if normalise:
        picks = np.take_along_axis(values, places, axis=1)
        total = picks.sum(axis=1, keepdims=True)
        given = (given - np.sum(given * picks / total, axis=1, keepdims=True)) / total
    d_values = np.zeros_like(values)
    np.put_along_axis(d_values, places, given, axis=1)
    if scores == "sigmoid":
        return d_values * values * (1 - values)
    return values * (d_values - np.sum(d_values * values, axis=1, keepdims=True))


def dispatch_reference(chosen: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """offsets, source and place."""
    flat = chosen.reshape(-1)
    source = np.argsort(flat, kind="stable")
    place = np.empty_like(source)
    place[source] = np.arange(flat.size)
    return np.concatenate([[0], np.cumsum(np.bincount(flat, minlength=experts))]), source, place

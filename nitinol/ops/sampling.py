"""The next token, chosen on the device: a decode step leaves the token and its position where the next step reads
them, so a recorded list of kernels can be submitted again and again with no work on the host in between.

The distribution, in this order:
1. Repetition penalty r (Keskar et al., "CTRL", 2019): a logit of a token that occurs among the last `window` tokens is
   divided by r if it is positive and multiplied by r otherwise; once, however often the token occurs.
2. Weights w = exp((logit - highest logit) / temperature), so the highest is 1. Temperature 0: the token of the highest
   logit, the first of several, and the rest does not apply.
3. top-k: w is kept if fewer than k weights are larger.
4. top-p (Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020), of what is left: w is kept if the
   larger weights sum to less than p of the total; the highest always.
5. min-p: w is kept if it is at least min_p (times the highest, which is 1).
6. A kept token is chosen with probability w / sum of kept weights, by one uniform number of Philox(seed, position).

Each of 3 to 5 keeps "all weights from a threshold on", so equal weights stand or fall together: more than k tokens
stay if several tie at rank k. The thresholds are exact: floats from 0 to 1 are ordered as their bits, and bisection
over the 2^30 bit patterns ends in 30 passes. Sums are fp32 in a fixed order.

With neither top-k nor top-p nor penalty there are three passes: the highest, the weights with their sum, and the draw.
"""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

import nitinol.language as tl
from nitinol.graph.array import Array
from nitinol.graph.launch import InPlace, Output, launch
from nitinol.graph.operation import Operation
from nitinol.language.jit import jit
from nitinol.ops.tiles import load_row, store_row

BITS_OF_ONE = tl.constexpr(0x3F800000)
LARGEST_INT = tl.constexpr(2**31 - 1)


class SamplingState(NamedTuple):
    """What steps hand on, all on the device, of S sequences (of one, arrays of two axes may lack the first).

    token int32 [S]: the latest token. position int32 [S]: where the next token to be processed stands. history int32
    [S, context]: every token at its position. options float32 [S, 4]: temperature, top_p (1: off), min_p (0: off),
    repetition penalty (1: off). limits int64 [S, 3]: seed, top_k (0: off), window (0: off).
    """

    token: Any
    position: Any
    history: Any
    options: Any
    limits: Any


@jit(do_not_specialize=["tokens"])
def sample_kernel(
    logits, weights, token, position, history, options, limits, vocabulary, tokens, context, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr = 1,
):  # fmt: skip
    """One program a sequence. logits float32 [sequences, vocabulary] are those of the last of the `tokens` of each that
    this step processed; weights is scratch of the same size. A pass loads CHUNK blocks at once and waits for them
    together. A sequence at a position below 0 stays as it is."""
    sequence = tl.program_id(0)
    logits += sequence.to(tl.int64) * vocabulary
    weights += sequence.to(tl.int64) * vocabulary
    history += sequence.to(tl.int64) * context
    token += sequence
    position += sequence
    options += sequence * 4
    limits += sequence * 3
    temperature = tl.load(options)
    place = tl.load(position) + tokens
    penalty = tl.load(options + 3)
    if penalty == 1.0:
        highest, choice = greedy(logits, vocabulary, CHUNK, BLOCK)
    else:
        at = tile_places(CHUNK, BLOCK)
        for start in range(0, vocabulary, CHUNK * BLOCK):
            value = load_row(logits + start, at, vocabulary - start, False)
            store_row(weights + start, at, vocabulary - start, value, False)
        penalise(logits, weights, history, place, tl.load(limits + 2), penalty, vocabulary, context, BLOCK)
        highest, choice = greedy(weights, vocabulary, CHUNK, BLOCK)
    if temperature > 0:
        seed, top_k = tl.load(limits), tl.load(limits + 1)
        top_p, lowest = tl.load(options + 1), tl.maximum(tl.minimum(tl.load(options + 2), 1.0), 0.0)
        if penalty == 1.0:
            total = exponentials(logits, weights, highest, temperature, lowest, vocabulary, CHUNK, BLOCK)
        else:
            total = exponentials(weights, weights, highest, temperature, lowest, vocabulary, CHUNK, BLOCK)
        if ((top_k > 0) & (top_k < vocabulary)) | (top_p < 1.0):
            lowest = tl.maximum(lowest, lowest_kept(weights, top_k, top_p, vocabulary, CHUNK, BLOCK))
            total = kept(weights, lowest, vocabulary, True, CHUNK, BLOCK)
        choice = draw(weights, tl.rand(seed, place) * total, lowest, vocabulary, CHUNK, BLOCK)
    if place >= tokens:
        tl.store(token, choice)
        if place < context:
            tl.store(history + place, choice)
        tl.store(position, place)


@jit
def tile_places(CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """0 .. CHUNK * BLOCK - 1 as [CHUNK, BLOCK]."""
    return tl.arange(0, CHUNK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]


@jit
def penalise(logits, weights, history, place, window, penalty, vocabulary, context, BLOCK: tl.constexpr):
    """weights[t] = penalised logits[t] for tokens t at positions place - window .. place - 1. Written from the
    untouched logits, so a token that occurs twice is penalised once; atomically, because two threads may do it."""
    last = tl.minimum(place, context)
    first = tl.maximum(place.to(tl.int64) - window, 0).to(tl.int32)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        seen = tl.load(history + at, mask=at < last, other=-1)
        known = (seen >= 0) & (seen < vocabulary)
        value = tl.load(logits + seen, mask=known, other=0.0)
        tl.atomic_xchg(weights + seen, tl.where(value > 0, value / penalty, value * penalty), known, sem="relaxed")


@jit
def greedy(values, count, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """The highest value and the first place where it stands (0 if all are NaN)."""
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    place = tl.zeros((BLOCK,), tl.int32)
    for tile in range(0, count, CHUNK * BLOCK):
        for block in tl.static_range(CHUNK):  # one after the other: 5 instructions a value on CUDA, 6 for a whole tile
            start = tile + block * BLOCK
            value = load_row(values + start, lane, count - start, False, float("-inf"))
            higher = value > best
            best = tl.where(higher, value, best)
            place = tl.where(higher, start + lane, place)
    highest = tl.max(best)
    return highest, tl.minimum(tl.min(tl.where(best == highest, place, LARGEST_INT)), count - 1)


@jit
def exponentials(values, weights, highest, temperature, lowest, count, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """weights = exp((values - highest) / temperature), 0 for NaN; gives the sum of those that are at least `lowest`."""
    at = tile_places(CHUNK, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, CHUNK * BLOCK):
        value = load_row(values + start, at, count - start, False)  # not with -inf: its division is slow
        value = tl.exp((value - highest) / temperature)
        value = tl.where((value >= 0) & (at < count - start), value, 0.0)
        store_row(weights + start, at, count - start, value, False)
        total += tl.sum(tl.where(value >= lowest, value, 0.0), axis=0)
    return tl.sum(total)


@jit
def kept(weights, lowest, count, MASS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """How many weights are at least `lowest`, or with MASS their sum; float32 (a count is exact up to 2^24 a lane)."""
    at = tile_places(CHUNK, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, CHUNK * BLOCK):
        value = load_row(weights + start, at, count - start, False, -1.0)
        total += tl.sum(tl.where(value >= lowest, value if MASS else 1.0, 0.0), axis=0)
    return tl.sum(total)


@jit
def threshold(weights, wanted, floor, count, MASS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """The highest threshold from `floor` to 1 that keeps at least `wanted`; `floor` must keep as much."""
    low = floor.to(tl.int32, bitcast=True)
    high = low * 0 + (BITS_OF_ONE + 1)
    while high - low > 1:
        middle = low + (high - low) // 2
        enough = kept(weights, middle.to(tl.float32, bitcast=True), count, MASS, CHUNK, BLOCK) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low.to(tl.float32, bitcast=True)


@jit
def lowest_kept(weights, top_k, top_p, count, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """The lowest weight that top-k and top-p both keep."""
    lowest = top_p * 0.0
    if (top_k > 0) & (top_k < count):
        lowest = threshold(weights, top_k.to(tl.float32), lowest, count, False, CHUNK, BLOCK)
    if top_p < 1.0:
        total = kept(weights, lowest, count, True, CHUNK, BLOCK)
        lowest = threshold(weights, tl.maximum(top_p, 0.0) * total, lowest, count, True, CHUNK, BLOCK)
    return lowest


@jit
def draw(weights, target, lowest, count, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """The first token at which the running sum of kept weights exceeds `target`: in blocks, then in the block.

    Where rounding leaves none, the last kept token of the last block that has any.
    """
    at = tile_places(CHUNK, BLOCK)
    row = tl.arange(0, CHUNK)
    before = target * 0.0
    passed = target * 0.0
    block = count * 0
    for start in range(0, count, CHUNK * BLOCK):
        value = load_row(weights + start, at, count - start, False, -1.0)
        mass = tl.sum(tl.where(value >= lowest, value, 0.0), axis=1)  # of every block, and of those before it:
        running = passed + tl.sum(tl.where(row[None, :] < row[:, None], mass[None, :], 0.0), axis=1)
        last = tl.max(tl.where((mass > 0) & (running <= target), row, -1))
        block = tl.where(last >= 0, start + last * BLOCK, block)
        before = tl.where(last >= 0, tl.sum(tl.where(row == last, running, 0.0)), before)
        passed += tl.sum(mass)
    lane = tl.arange(0, BLOCK)
    value = load_row(weights + block, lane, count - block, False, -1.0)
    chosen = (value >= lowest) & (value > 0)
    running = before + tl.cumsum(tl.where(chosen, value, 0.0))
    first = tl.min(tl.where(chosen & (running > target), lane, LARGEST_INT))
    last = tl.max(tl.where(chosen, lane, 0))
    return block + tl.minimum(first, last)


def _sample_rule(logits: Array, token: Array, *others: Array, tokens: int) -> list[Any]:
    vocabulary, sequences = logits.shape[-1], token.shape[0]
    if logits.size != sequences * vocabulary:
        raise ValueError(
            f"sample: logits have shape {logits.shape}, expected {(sequences, vocabulary)}: the state is of "
            f"{sequences} sequences"
        )
    return []


def _sample_lower(
    target: str, logits: Array, token: Array, position: Array, history: Array, options: Array, limits: Array,
    tokens: int,
) -> None:  # fmt: skip
    vocabulary, sequences = logits.shape[-1], token.shape[0]
    launch(
        sample_kernel, (sequences,), logits=logits, weights=Output((sequences, vocabulary), "float32"),
        token=InPlace(token), position=InPlace(position), history=InPlace(history), options=options, limits=limits,
        vocabulary=vocabulary, tokens=tokens, context=history.shape[-1], **blocks(target, vocabulary),
    )  # fmt: skip


SAMPLE = Operation(
    "sample", rule=_sample_rule, lower=_sample_lower, updates=(1, 2, 3), vjp="a choice has no small changes"
)


def sample(logits: Any, state: SamplingState, tokens: int = 1) -> None:
    """Chooses each sequence's token after the `tokens` tokens that a step has processed, from the last one's logits
    (float32 [sequences, vocabulary], of one also [vocabulary]): state.token, state.position (by `tokens`) and
    state.history change in place. ValueError for logits of another number of sequences."""
    SAMPLE(logits, state.token, state.position, state.history, state.options, state.limits, tokens=tokens)


def blocks(target: str, vocabulary: int) -> dict[str, int]:
    """Logits at a time, and warps: one program must be quick on all of them."""
    if target == "cuda":  # 128,256 logits: 4 iterations a pass, each with 16 loads of 16 bytes a thread at once
        return {"BLOCK": 4096, "CHUNK": 8, "_warps": 16}
    if target == "cpu":
        return {"BLOCK": 128, "CHUNK": 1}
    return {"BLOCK": 1024, "CHUNK": 4, "_warps": 4 if vocabulary < 1 << 15 else 16}


def sampling_reference(
    logits: np.ndarray, recent: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> np.ndarray:
    """The probabilities of all tokens, float64, for temperature > 0; `recent` are the last `window` tokens."""
    values = logits.astype(np.float64).copy()
    repeated = np.unique(recent)
    values[repeated] = np.where(values[repeated] > 0, values[repeated] / penalty, values[repeated] * penalty)
    weights = np.exp((values - values.max()) / temperature)
    if 0 < top_k < len(weights):
        weights = np.where(weights >= np.sort(weights)[-top_k], weights, 0)
    if top_p < 1:
        larger = np.array([weights[weights > w].sum() for w in weights])
        weights = np.where((larger < top_p * weights.sum()) | (larger == 0), weights, 0)
    weights = np.where(weights >= min_p, weights, 0)
    return weights / weights.sum()

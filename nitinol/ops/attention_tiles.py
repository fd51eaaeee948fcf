"""What the forward and backward kernels of attention share: which rows a program has, which keys a query sees.

Sequences lie one after another in a batch [batch, heads, rows, head_dim] of equal lengths, or packed into one batch
entry with `starts` int32 [sequences + 1], the first row of each and the end (the variable-length interface of the
flash-attn package).
"""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

import nitinol.language as tl
from nitinol.language.jit import jit

LOG2_E = tl.constexpr(1.4426950408889634)
SEARCHED = tl.constexpr(32)  # sequences whose starts are looked at together


@jit
def own_block(starts, block, sequences, BLOCK: tl.constexpr):
    """(batch entry, sequence, block of its rows) of a program, the block-th of a batch entry.

    Packed, sequence s owns the blocks from starts[s] // BLOCK + s on: between two such numbers there are at least
    ceil(length / BLOCK), and they grow with s. So no program needs to know the longest sequence, and total / BLOCK +
    sequences programs suffice; those left over get blocks beyond their sequence's end.
    """
    if starts is None:
        return tl.program_id(2), tl.program_id(2), block
    passed = 0
    for base in range(0, sequences, SEARCHED):
        sequence = base + tl.arange(0, SEARCHED)
        first = tl.load(starts + sequence, mask=sequence < sequences, other=0) // BLOCK + sequence
        passed += tl.sum(((first <= block) & (sequence < sequences)).to(tl.int32))
    own = passed - 1
    return 0, own, block - (tl.load(starts + own) // BLOCK + own)


@jit
def extent(starts, sequence, length):
    """(first row, number of rows) of a sequence; without starts each has `length` rows."""
    if starts is None:
        return 0, length
    begin = tl.load(starts + sequence)
    return begin, tl.load(starts + sequence + 1) - begin


@jit
def rows_at(base, batch, head, row, batch_stride, head_stride, row_stride):
    """A pointer to a row of a head."""
    return base + (tl.cast(batch, tl.int64) * batch_stride + tl.cast(head, tl.int64) * head_stride
                   + tl.cast(row, tl.int64) * row_stride)  # fmt: skip


def widths(head_dim: int) -> tuple[int, ...]:
    """The tiles that rows of head_dim values are held in: one, or two where that spares lanes without values (64 and 16
    for 80, where one tile has 128). 16 is what matrix instructions take at least."""
    first = 1 << (head_dim.bit_length() - 1)
    if first == head_dim:
        return (first,)
    rest = max(16, tl.next_power_of_2(head_dim - first))
    return (first, rest) if rest < first else (2 * first,)


@jit
def load_lanes(
    base, at, length, stride, START: tl.constexpr, END: tl.constexpr, WIDTH: tl.constexpr, RAGGED: tl.constexpr
):  # fmt: skip
    """Values START to START + WIDTH of rows, zeros beyond END."""
    lane = START + tl.arange(0, WIDTH)
    pointers = base + at[:, None].to(tl.int64) * stride + lane[None, :]
    if RAGGED:
        return tl.load(pointers, mask=(at < length)[:, None] & (lane < END)[None, :], other=0.0)
    if START + WIDTH > END:
        return tl.load(pointers, mask=(lane < END)[None, :], other=0.0)
    return tl.load(pointers)


@jit
def load_rows(base, at, length, stride, HEAD_DIM: tl.constexpr, WIDTHS: tl.constexpr, RAGGED: tl.constexpr):
    """Rows `at` as a tuple of tiles [rows, width], zeros in lanes beyond HEAD_DIM and, if RAGGED, in rows not below
    `length`."""
    first = load_lanes(base, at, length, stride, 0, HEAD_DIM, WIDTHS[0], RAGGED)
    if len(WIDTHS) == 1:
        return (first,)
    return first, load_lanes(base, at, length, stride, WIDTHS[0], HEAD_DIM, WIDTHS[1], RAGGED)


@jit
def store_rows(base, at, length, stride, tiles, factors, HEAD_DIM: tl.constexpr):
    """Writes tiles [rows, width], times `factors`, to the rows `at` that are below `length`."""
    for number in tl.static_range(len(tiles)):
        lane = (tiles[0].shape[1] if number else 0) + tl.arange(0, tiles[number].shape[1])
        pointers = base + at[:, None].to(tl.int64) * stride + lane[None, :]
        tl.store(pointers, tiles[number] * factors, mask=(at < length)[:, None] & (lane < HEAD_DIM)[None, :])


@jit
def zeros(ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    first = tl.zeros((ROWS, WIDTHS[0]), tl.float32)
    if len(WIDTHS) == 1:
        return (first,)
    return first, tl.zeros((ROWS, WIDTHS[1]), tl.float32)


@jit
def converted(tiles, DOT: tl.constexpr):
    """Tiles in the type that they are multiplied in."""
    if len(tiles) == 1:
        return (tiles[0].to(DOT),)
    return tiles[0].to(DOT), tiles[1].to(DOT)


@jit
def scaled(tiles, factors):
    """Tiles times a number, or one for each row [rows, 1]."""
    if len(tiles) == 1:
        return (tiles[0] * factors,)
    return tiles[0] * factors, tiles[1] * factors


@jit
def products(x, y):
    """x y^T of rows of both: [rows, rows], float32."""
    result = tl.dot(x[0], tl.trans(y[0]))
    if len(x) == 2:
        result = tl.dot(x[1], tl.trans(y[1]), result)
    return result


@jit
def weighted(weights, rows, sums):
    """sums + weights rows."""
    first = tl.dot(weights, rows[0], sums[0])
    if len(rows) == 1:
        return (first,)
    return first, tl.dot(weights, rows[1], sums[1])


@jit
def operand(tiles, factor, DOT: tl.constexpr):
    """A factor of scores in the type that they are multiplied in; fp32 takes the scores' scale in, halves would lose
    bits by it."""
    if tl.float32 == DOT:
        return scaled(converted(tiles, tl.float32), factor)
    return converted(tiles, DOT)


@jit
def logits(product, factor, cap, CAP: tl.constexpr, DOT: tl.constexpr):
    """Scores in units of log2(e), which spares exp2 a product per value; `cap` is in these units, too."""
    if tl.float32 != DOT:
        product = product * factor
    if CAP:
        return tl.tanh(product) * cap
    return product


@jit
def visible(place, key, keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Which keys a query sees that stands at `place` among them: all, those up to its place, the last `window`."""
    seen = key < keys
    if CAUSAL:
        seen = seen & (key <= place)
    if WINDOW:
        seen = seen & (key > place - window)
    return seen


@jit
def visible_keys(
    first, rows, keys, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """(low, whole_low, whole_high, high): some query of the block sees keys from `low` to `high`, and all of them see
    those from `whole_low` to `whole_high`; all but `high` are multiples of BLOCK_N."""
    shift = keys - rows  # the last query stands at the last key
    last = tl.minimum(first + BLOCK_M, rows) - 1
    low, whole_low, whole_high, high = 0, 0, keys // BLOCK_N * BLOCK_N, keys
    if CAUSAL:
        high = tl.maximum(tl.minimum(last + shift + 1, keys), 0)
        whole_high = tl.minimum(tl.maximum(first + shift + 1, 0), keys) // BLOCK_N * BLOCK_N
    if WINDOW:
        low = tl.maximum(first + shift - window + 1, 0) // BLOCK_N * BLOCK_N
        whole_low = tl.cdiv(tl.minimum(tl.maximum(last + shift - window + 1, 0), high), BLOCK_N) * BLOCK_N
    return low, whole_low, whole_high, high

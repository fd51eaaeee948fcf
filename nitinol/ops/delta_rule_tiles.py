"""Tiles of the gated delta rule (`delta_rule.py` has the notation): rows, spans of chunks, decays, the inverse."""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

import nitinol.language as tl
from nitinol.language.jit import jit

EPSILON = tl.constexpr(1e-6)  # below the square root of the L2 norms, as in the published models' code


@jit
def load_rows(base, row, inside, stride, DIM: tl.constexpr, BLOCK: tl.constexpr, first=0):
    """Columns first ... first + BLOCK of the rows of a matrix with DIM columns, fp32; zeros outside."""
    lane = first + tl.arange(0, BLOCK)
    pointers = base + row[:, None].to(tl.int64) * stride + lane[None, :]
    return tl.load(pointers, mask=inside[:, None] & (lane < DIM)[None, :], other=0.0).to(tl.float32)


@jit
def store_rows(base, row, inside, stride, value, DIM: tl.constexpr, first=0):
    """The counterpart of `load_rows`."""
    lane = first + tl.arange(0, value.shape[1])
    pointers = base + row[:, None].to(tl.int64) * stride + lane[None, :]
    tl.store(pointers, value, mask=inside[:, None] & (lane < DIM)[None, :])


@jit
def load_unit_rows(base, row, inside, stride, DIM: tl.constexpr, BLOCK: tl.constexpr, NORMALISE: tl.constexpr):
    """Rows of q or k, with NORMALISE divided by their lengths."""
    value = load_rows(base, row, inside, stride, DIM, BLOCK)
    if NORMALISE:
        value *= tl.rsqrt(tl.sum(value * value, axis=1) + EPSILON)[:, None]
    return value


@jit
def sequence_span(sequence, starts, tokens, chunks, CHUNK: tl.constexpr):
    """First token of a sequence, the token after its last, and the slot of its first chunk."""
    if starts is None:
        begin = sequence * tokens
        return begin, begin + tokens, sequence * chunks
    begin = tl.load(starts + sequence)
    return begin, tl.load(starts + sequence + 1), begin // CHUNK + sequence


@jit
def chunk_span(slot, starts, tokens, chunks, sequences, CHUNK: tl.constexpr, SEQUENCES: tl.constexpr):
    """First token of the chunk of a slot, and the token after the last of its sequence; SEQUENCES is a power of two,
    not below `sequences`. A slot that no chunk has begins behind the end."""
    if starts is None:
        sequence = slot // chunks
    else:
        number = tl.arange(0, SEQUENCES)
        begins = tl.load(starts + number, mask=number < sequences, other=0)
        sequence = tl.sum(tl.where((begins // CHUNK + number <= slot) & (number < sequences), 1, 0)) - 1
    begin, end, first_slot = sequence_span(sequence, starts, tokens, chunks, CHUNK)
    return begin + (slot - first_slot) * CHUNK, end


@jit
def decays_from_start(g, at, inside, v_heads):
    """exp(g_1 + ... + g_i) of a chunk's tokens `at`."""
    return tl.exp(tl.cumsum(tl.load(g + at.to(tl.int64) * v_heads, mask=inside, other=0.0).to(tl.float32)))


@jit
def decays_to_end(g, at, end, v_heads):
    """exp(g_(j+1) + ... + g_C) of a chunk's tokens `at`."""
    CHUNK: tl.constexpr = at.shape[0]
    follows = (tl.arange(0, CHUNK) < CHUNK - 1) & (at + 1 < end)
    after = tl.load(g + (at + 1).to(tl.int64) * v_heads, mask=follows, other=0.0).to(tl.float32)
    return tl.exp(tl.cumsum(after, reverse=True))


@jit
def decays_between(g, at, inside, v_heads):
    """exp(g_(j+1) + ... + g_i) for j <= i of a chunk's tokens `at`, and 0 above the diagonal: [CHUNK, CHUNK]."""
    row = tl.arange(0, at.shape[0])
    decay = tl.load(g + at.to(tl.int64) * v_heads, mask=inside, other=0.0).to(tl.float32)
    later = tl.where(row[:, None] > row[None, :], decay[:, None], 0.0)
    return tl.where(row[:, None] >= row[None, :], tl.exp(tl.cumsum(later, axis=0)), 0.0)


@jit
def unit_triangular_inverse(a):
    """(I + a)^-1 of a strictly lower triangular tile, by doubling: with the inverses P and R of the diagonal blocks and
    the block L below the first, [[P^-1, 0], [L, R^-1]]^-1 = [[P, 0], [-R L P, R]].

    As stable as forward substitution. The shorter (I - a)(I + a^2)(I + a^4) ... is not: for equal keys with beta 1 the
    powers reach 1e18 while the inverse stays below 1.
    """
    SIZE: tl.constexpr = a.shape[0]
    row = tl.arange(0, SIZE)[:, None]
    column = tl.arange(0, SIZE)[None, :]
    inverse = tl.where(row == column, 1.0, tl.where((row ^ 1 == column) & (row > column), -a, 0.0))
    for level in range(1, SIZE.bit_length() - 1):
        below = tl.where(((row >> level) ^ 1 == column >> level) & (row > column), a, 0.0)
        inverse -= tl.dot(inverse, tl.dot(below, inverse))
    return inverse

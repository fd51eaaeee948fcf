"""Which entries of a command list must wait for which: read after write, write after read, write after write.

The memory that a list has touched so far is kept as disjoint pieces, sorted by address; each knows the entry that wrote
it last and the entries that have read it since. What a new entry finds in the pieces that it touches is what it must
wait for, less what those already wait for themselves.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple

Span = tuple[int, int]  # of bytes: the first address and one past the last

# A read of more pieces than this, or of a piece with more readers, waits for all of them and stands for them from then
# on, as a write would. Without this bound, n readers of n pieces are n² edges; with it each access costs so many steps
# at most, and only the readers after such a one lose: they wait for it.
MOST_PIECES, MOST_READERS = 64, 128
NOBODY = -1


class _Readers(NamedTuple):
    """The latest reader of a piece and those before it: a linked list, which pieces share when one is cut in two."""

    entry: int
    before: _Readers | None
    number: int  # of them


class _Piece(NamedTuple):
    end: int
    writer: int
    readers: _Readers | None


class Hazards:
    """The analysis of one list, entry by entry."""

    def __init__(self) -> None:
        self._starts: list[int] = []  # of the pieces
        self._pieces: list[_Piece] = []
        # All that an entry waits for, directly or not: every entry below `floor`, and bit i for entry floor + i.
        self._waits: list[tuple[int, int]] = []

    def __len__(self) -> int:
        """How many entries there are."""
        return len(self._waits)

    def add(self, reads: Iterable[Span], writes: Iterable[Span]) -> tuple[int, ...]:
        """The next entry, which touches these bytes. Returns the numbers of the entries that it must wait for, in
        order; none of them is waited for by another of them."""
        number, found = len(self._waits), set[int]()
        for start, end in reads:
            if start < end:
                self._touch(start, end, number, False, found)
        for start, end in writes:
            if start < end:
                self._touch(start, end, number, True, found)
        found.discard(number)
        found.discard(NOBODY)
        after, floor, bits = [], 0, 0
        for entry in sorted(found, reverse=True):  # who waits for another has the larger number
            if entry >= floor and not bits >> (entry - floor) & 1:
                after.append(entry)
                floor, bits = _union((floor, bits), self._waits[entry], entry)
        self._waits.append((floor, bits))
        return tuple(reversed(after))

    def _touch(self, start: int, end: int, number: int, writes: bool, found: set[int]) -> None:
        """Adds to `found` whom entry `number` must wait for, and notes it."""
        first = self._cut(start)
        last = self._cut(end)
        starts, pieces = self._starts[first:last], self._pieces[first:last]
        whole = writes or len(pieces) > MOST_PIECES or any(
            piece.readers is not None and piece.readers.number >= MOST_READERS for piece in pieces)
        for piece in pieces:
            found.add(piece.writer)
            readers = piece.readers if whole else None
            while readers is not None:
                found.add(readers.entry)
                readers = readers.before
        if whole:
            self._starts[first:last], self._pieces[first:last] = [start], [_Piece(end, number, None)]
            return
        new_starts, new_pieces, place = list[int](), list[_Piece](), start
        for begin, piece in zip(starts, pieces):
            if place < begin:  # nobody has touched these bytes yet
                new_starts.append(place)
                new_pieces.append(_Piece(begin, NOBODY, _Readers(number, None, 1)))
            before, place = piece.readers, piece.end
            count = 1 if before is None else before.number + 1
            new_starts.append(begin)
            new_pieces.append(_Piece(piece.end, piece.writer, _Readers(number, before, count)))
        if place < end:
            new_starts.append(place)
            new_pieces.append(_Piece(end, NOBODY, _Readers(number, None, 1)))
        self._starts[first:last], self._pieces[first:last] = new_starts, new_pieces

    def _cut(self, address: int) -> int:
        """The number of pieces below an address, which no piece contains afterwards except as its beginning."""
        below = bisect_left(self._starts, address)
        if below and self._pieces[below - 1].end > address:
            piece = self._pieces[below - 1]
            self._pieces[below - 1] = piece._replace(end=address)
            self._starts.insert(below, address)
            self._pieces.insert(below, piece)
        return below


def _union(a: tuple[int, int], b: tuple[int, int], entry: int) -> tuple[int, int]:
    """All that is in either set of entries (see `Hazards._waits`), and one entry more."""
    floor = max(a[0], b[0])
    bits = a[1] >> (floor - a[0]) | b[1] >> (floor - b[0])
    if entry >= floor:
        bits |= 1 << (entry - floor)
    full = (~bits & (bits + 1)).bit_length() - 1  # ones at the lower end: the floor rises above them
    return floor + full, bits >> full


def meetings(after: Iterable[Sequence[int]]) -> list[bool]:
    """Where all entries so far must have ended before any goes on, for devices that know nothing finer: before an entry
    that waits for one since the last such place. No choice of places needs fewer."""
    places, start = list[bool](), 0
    for number, entries in enumerate(after):
        meets = bool(entries) and max(entries) >= start
        start = number if meets else start
        places.append(meets)
    return places

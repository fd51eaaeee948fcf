"""Dependencies of command lists: against a quadratic comparison of all entries, byte by byte."""

from __future__ import annotations

import time

import numpy as np
import pytest

from nitinol.runtime import hazards
from nitinol.runtime.hazards import Hazards, Span, meetings

pytestmark = pytest.mark.cpu
Entry = tuple[list[Span], list[Span]]


def random_entries(rng: np.random.Generator, count: int, size: int) -> list[Entry]:
    def spans(most: int) -> list[Span]:
        found = []
        for _ in range(rng.integers(0, most + 1)):
            start = int(rng.integers(0, size))
            found.append((start, int(rng.integers(start, min(size, start + size // 3) + 1))))  # also empty ones
        return found

    return [(spans(3), spans(2)) for _ in range(count)]


def conflicts(entries: list[Entry], size: int) -> np.ndarray:
    """[i, j]: whether entry i must wait for entry j, j < i."""
    read, written = np.zeros((2, len(entries), size), bool)
    for number, (reads, writes) in enumerate(entries):
        for start, end in reads:
            read[number, start:end] = True
        for start, end in writes:
            written[number, start:end] = True
    meet = (written.astype(int) @ (read | written).T.astype(int)) > 0
    return np.tril(meet | meet.T, -1)


def closure(edges: np.ndarray) -> np.ndarray:
    reach = edges.copy()
    for i in range(len(edges)):
        for j in np.flatnonzero(edges[i]):
            reach[i] |= reach[j]
    return reach


def derive(entries: list[Entry]) -> list[tuple[int, ...]]:
    analysis = Hazards()
    return [analysis.add(reads, writes) for reads, writes in entries]


def matrix(after: list[tuple[int, ...]]) -> np.ndarray:
    edges = np.zeros((len(after), len(after)), bool)
    for i, entries in enumerate(after):
        edges[i, list(entries)] = True
    return edges


@pytest.mark.parametrize("size", [3, 30, 400])
def test_the_same_order_as_comparing_every_pair_with_the_fewest_edges(size):
    rng = np.random.default_rng()
    for _ in range(30):
        entries = random_entries(rng, int(rng.integers(1, 60)), size)
        after = derive(entries)
        wanted = closure(conflicts(entries, size))
        edges = matrix(after)
        assert (closure(edges) == wanted).all()
        two_steps = (edges.astype(int) @ wanted.astype(int)) > 0
        assert not (edges & two_steps).any(), "an edge that others imply"
        assert all(list(entries) == sorted(set(entries)) for entries in after)


def test_bounded_pieces_and_readers_lose_no_order(monkeypatch):
    """With small bounds, so that they matter: more order than needed, never less."""
    rng = np.random.default_rng()
    monkeypatch.setattr(hazards, "MOST_PIECES", 2)
    monkeypatch.setattr(hazards, "MOST_READERS", 2)
    more = 0
    for _ in range(50):
        entries = random_entries(rng, 40, 60)
        wanted, found = closure(conflicts(entries, 60)), closure(matrix(derive(entries)))
        assert not (wanted & ~found).any()
        more += int((found & ~wanted).sum())
    assert more, "the bounds were never met: this test shows nothing"


def test_meetings():
    assert meetings([(), (), (0,), (1,), (2,), (), (3, 4)]) == [False, False, True, False, True, False, True]
    rng = np.random.default_rng()
    for _ in range(50):
        after = derive(random_entries(rng, 40, 50))
        places = meetings(after)
        passed = np.cumsum(places)
        for number, entries in enumerate(after):  # a meeting lies between any two that must not overlap
            assert all(passed[number] > passed[entry] for entry in entries)
            if places[number]:  # and no meeting is idle: without it, two that must not overlap would
                last = max((i for i in range(number) if places[i]), default=0)
                assert any(entry >= last for entry in entries)


KINDS = {
    "independent": lambda n: [([], [(64 * i, 64 * i + 64)]) for i in np.random.default_rng().permutation(n).tolist()],
    "chain": lambda n: [([(64 * i, 64 * i + 64)], [(64 * i + 64, 64 * i + 128)]) for i in range(n)],
    "one input": lambda n: [([(0, 64)], [(64 * i + 64, 64 * i + 128)]) for i in range(n)],
    "one input, written first": lambda n: [([], [(0, 64)])] + [
        ([(0, 64), (64 * i, 64 * i + 64)], [(64 * i + 64, 64 * i + 128)]) for i in range(1, n)],
    "fan out and in": lambda n: [
        ([(0, 64 * n)], [(0, 64 * n)]) if i % 100 == 0 else ([], [(64 * i, 64 * i + 64)]) for i in range(n)],
    "pieces, then readers of all": lambda n: [
        ([], [(64 * i, 64 * i + 64)]) if i < n // 2 else ([(0, 32 * n)], []) for i in range(n)],
    "readers of all, then pieces": lambda n: [
        ([(0, 32 * n)], []) if i < n // 2 else ([], [(64 * (i - n // 2), 64 * (i - n // 2) + 64)]) for i in range(n)],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_time_is_near_linear(kind):
    """Five times as many entries take five times as long; quadratic time would take 25 times as long. Between the two
    lies a factor of 15 (timings on a shared machine vary: the best of three counts)."""
    def seconds(count: int) -> float:
        entries, best = KINDS[kind](count), float("inf")
        for _ in range(3):
            start = time.perf_counter()
            derive(entries)
            best = min(best, time.perf_counter() - start)
        return best

    small, large = seconds(2000), seconds(10000)
    assert large < 15 * small, f"{small:.3f} s, then {large:.3f} s"

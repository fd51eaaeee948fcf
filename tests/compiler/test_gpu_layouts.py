"""Layouts as linear maps, conversions between them, barriers and threadgroup memory: without any GPU."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from nitinol.compiler.gpu import dot, layout, metal
from nitinol.compiler.gpu.convert import find_shuffle
from nitinol.compiler.gpu.forms import Index, linear
from nitinol.compiler.gpu.layout import Layout, axis_bits, blocked, compose, independent, solve, view_map
from nitinol.compiler.gpu.loads import spread
from nitinol.compiler.gpu.tree import Access, Each, Nest, Scratch, Statement, allocate, place_barriers
from nitinol.compiler.ir import create
from nitinol.language.types import TileType, float16, float32


@pytest.fixture
def rng():
    return np.random.default_rng()


def shape_of(rng, limit=10):
    bits = int(rng.integers(1, limit + 1))
    cuts = np.sort(rng.integers(0, bits + 1, int(rng.integers(0, 3))))
    return tuple(1 << int(b) for b in np.diff([0, *cuts, bits]))


def random_layout(rng, bits, warp_bits=2):
    """All places, in a random order of bits, some combined with xor, some threads with copies."""
    columns = [1 << int(b) for b in rng.permutation(bits)]
    for _ in range(3):  # still independent
        if bits > 1 and rng.random() < 0.5:
            a, b = rng.choice(bits, 2, replace=False)
            columns[a] ^= columns[b]
    slots = ["lane"] * 5 + ["warp"] * warp_bits
    kinds = [slots[int(i)] for i in rng.permutation(len(slots))[: int(rng.integers(0, len(slots) + 1))]]
    kinds = (kinds + ["register"] * bits)[:bits]
    by = {kind: [c for c, k in zip(columns, kinds) if k == kind] for kind in ("register", "lane", "warp")}
    lanes = by["lane"] + [0] * (5 - len(by["lane"]))
    warps = by["warp"] + [0] * (warp_bits - len(by["warp"]))
    order = rng.permutation(5)
    return Layout(bits, tuple(by["register"]), tuple(lanes[i] for i in order), tuple(warps))


def threads(warp_bits=2):
    return [(lane, warp) for lane in range(32) for warp in range(1 << warp_bits)]


def test_solve_finds_a_preimage_or_tells_that_there_is_none(rng):
    for _ in range(200):
        columns = tuple(int(c) for c in rng.integers(0, 64, int(rng.integers(0, 7))))
        reachable = {layout.apply(columns, n) for n in range(1 << len(columns))}
        for image in range(64):
            number = solve(columns, image)
            assert (number is not None) == (image in reachable)
            assert number is None or layout.apply(columns, number) == image
        assert len(reachable) == 1 << len(independent(columns))


def test_blocked_layouts_hold_every_element_and_follow_memory(rng):
    for _ in range(100):
        bits, warp_bits, vector = int(rng.integers(0, 13)), int(rng.integers(0, 3)), int(rng.integers(0, 4))
        order = [int(b) for b in rng.permutation(bits)]
        made = blocked(order, warp_bits, vector)
        held = {made.place(r, lane, w) for r in range(made.count) for lane, w in threads(warp_bits)}
        assert held == set(range(1 << bits))
        for i in range(min(vector, bits)):  # a vector's elements are neighbours in memory
            assert made.place(1 << i, 0, 0) == 1 << order[i]
        if bits > vector:  # and neighbouring lanes go on where it ends
            assert made.place(0, 1, 0) == 1 << order[vector]


def test_owners_act_once_for_every_element(rng):
    for _ in range(100):
        made = random_layout(rng, int(rng.integers(0, 9)))
        lanes, warps = made.copies
        acting = [(lane, w) for lane, w in threads() if not lane & lanes and not w & warps]
        owned = [made.place(r, lane, w) for r in range(made.count) for lane, w in acting]
        assert sorted(owned) == list(range(1 << made.bits))
        for place in owned:
            register, lane, warp = made.locate(place)
            assert made.place(register, lane, warp) == place


@pytest.mark.parametrize("kind", ["reshape", "trans", "broadcast", "splat", "join", "cat"])
def test_views_are_linear_maps(rng, kind):
    for _ in range(20):
        source = shape_of(rng)
        attributes, result = {}, source
        values = np.arange(math.prod(source)).reshape(source)
        if kind == "reshape":
            result = (math.prod(source),)
            expected = values.reshape(result)
        elif kind == "trans":
            attributes["perm"] = tuple(int(p) for p in rng.permutation(len(source)))
            expected = values.transpose(attributes["perm"])
        elif kind == "broadcast":
            source = tuple(1 if rng.random() < 0.5 else n for n in source)
            values = np.arange(math.prod(source)).reshape(source)
            expected = np.broadcast_to(values, result)
        elif kind == "splat":
            expected = np.zeros(result, int)
        elif kind == "join":
            expected = np.stack([values, values], axis=-1)
        else:
            attributes["axis"] = int(rng.integers(0, len(source)))
            expected = np.concatenate([values, values], axis=attributes["axis"])
        view = view_map(kind, () if kind == "splat" else source, expected.shape, attributes)
        got = [layout.apply(view, place) for place in range(expected.size)]
        np.testing.assert_array_equal(got, expected.reshape(-1))
        # a thread that holds the result's elements in some layout finds their sources in its own registers
        mine = random_layout(rng, layout.bits_of(expected.shape))
        theirs = mine.through(view, layout.bits_of(() if kind == "splat" else source))
        registers = [solve(theirs.registers, c) for c in compose(view, mine.registers)]
        for register in range(mine.count):
            for lane, warp in threads()[:: 7]:
                there = theirs.place(layout.apply(tuple(registers), register), lane, warp)
                assert there == layout.apply(view, mine.place(register, lane, warp))


def test_shuffles_bring_every_element(rng):
    found = 0
    for _ in range(300):
        bits = int(rng.integers(0, 8))
        source, result = random_layout(rng, bits), random_layout(rng, bits)
        if rng.random() < 0.7:
            result = Layout(bits, *independent_parts(rng, source))
        source = replace(source, sparse=bool(source.copies[0]) and rng.random() < 0.5)
        shuffle = find_shuffle(source, result)
        reach = [independent((*source.registers, *source.lanes, w ^ v)) for v, w in zip(source.warps, result.warps)]
        if shuffle is None:  # then some simdgroup lacks an element
            assert any(len(r) > len(independent(source.registers + source.lanes)) for r in reach) or any(
                solve(source.registers + source.lanes, c) is None for c in result.registers + result.lanes
            )
            continue
        found += 1
        for register in range(result.count):
            for lane, warp in threads():
                at, who = 0, 0
                for maps, target in ((shuffle.registers, "at"), (shuffle.lanes, "who")):
                    value = (
                        layout.apply(maps[0], register) ^ layout.apply(maps[1], lane) ^ layout.apply(maps[2], warp)
                    )
                    at, who = (value, who) if target == "at" else (at, value)
                assert source.place(at, who, warp) == result.place(register, lane, warp)
                assert not (source.sparse and who & source.copies[0])  # only owners have anything
                base = layout.apply(shuffle.registers[0], register)
                assert base ^ at in shuffle.choices
    assert found > 50


def test_a_spread_load_asks_once_and_reaches_all_lanes(rng):
    for _ in range(300):
        wanted = random_layout(rng, int(rng.integers(0, 9)))
        order = [int(bit) for bit in rng.permutation(wanted.bits)]
        made = spread(wanted, order, int(rng.choice([1, 2, 4])), False)
        copies = made.copies[0]
        assert made.sparse == (copies != 0) and made.count <= wanted.count
        for warp in range(4):
            asked = [made.place(r, lane, warp) for r in range(made.count) for lane in range(32) if not lane & copies]
            assert len(asked) == len(set(asked))
            assert set(asked) == {wanted.place(r, lane, warp) for r in range(wanted.count) for lane in range(32)}
        assert find_shuffle(made, wanted) is not None
        direct = spread(wanted, order, 1, True)  # the same elements in each lane, in the order of memory
        assert (direct.lanes, direct.warps, direct.sparse) == (wanted.lanes, wanted.warps, wanted.sparse)
        assert sorted(direct.registers) == sorted(wanted.registers)
        ranks = [order.index((column & -column).bit_length() - 1) for column in direct.registers if column]
        assert ranks == sorted(ranks)


def independent_parts(rng, source):
    """The same columns, those of registers and lanes exchanged at random."""
    inner = list(source.registers) + list(source.lanes)
    order = rng.permutation(len(inner))
    inner = [inner[i] for i in order]
    registers = [c for c in inner[: len(source.registers)] if c]
    return tuple(registers), tuple(inner[len(source.registers) :]), source.warps


def test_layouts_written_as_c_compute_the_same(rng):
    for _ in range(300):
        columns = tuple(int(c) for c in rng.integers(0, 64, int(rng.integers(0, 7))))
        if rng.random() < 0.7:
            columns = tuple(1 << int(b) for b in rng.permutation(6)[: len(columns)])
        text = linear(columns, "r")
        index = Index(columns, int(rng.integers(0, 64)))
        for r in range(1 << len(columns)):
            assert eval(text, {"r": r}) == layout.apply(columns, r), text
            assert eval(str(index), {"r": r}) == layout.apply(columns, r) ^ index.constant, str(index)


@pytest.mark.parametrize("m, n, k", [(8, 8, 8), (64, 32, 16), (16, 128, 8), (32, 32, 64)])
@pytest.mark.parametrize("warp_bits", [0, 1, 2, 3])
def test_fragments_agree_with_each_other(m, n, k, warp_bits):
    """The simdgroup that multiplies for an element of the result has the row of a and the column of b."""
    types = [TileType(float16, (m, k)), TileType(float16, (k, n)), TileType(float32, (m, n))]
    values = [create("constant", [], [t], value=0).result for t in types]
    op = create("dot", values, [types[2]])
    a, b, acc = dot.fragments(op, warp_bits, metal)
    for warp in range(1 << warp_bits):
        held = {"a": set(), "b": set(), "acc": set()}
        for name, made in (("a", a), ("b", b), ("acc", acc)):
            for register in range(made.count):
                held[name] |= {made.place(register, lane, warp) for lane in range(32)}
        rows, columns = {p // n for p in held["acc"]}, {p % n for p in held["acc"]}
        assert held["a"] == {row * k + i for row in rows for i in range(k)}
        assert held["b"] == {i * n + column for column in columns for i in range(k)}
    for made, bits in ((a, a.bits), (b, b.bits), (acc, acc.bits)):
        assert {made.locate(p) is not None for p in range(1 << bits)} == {True}


def statement(*accesses):
    return Statement(["x"], None, list(accesses))


def text(nodes):
    out = []
    for node in nodes:
        if isinstance(node, Nest):
            out += ["(", *text(node.body), "|", *text(node.otherwise or []), ")"]
        elif isinstance(node, Statement) and node.lines[0].startswith("barrier"):
            out.append(node.lines[0][8:])
        else:
            out.append(".")
    return "".join(out)


def test_barriers_stand_at_hazards_only():
    read, write = Access("read", 1), Access("write", 1)
    other, unknown = Access("write", 2), Access("write", None)
    add = Access("atomic", 1)
    mine, also_mine = Access("write", 1, "pointer"), Access("read", 1, "pointer")

    def placed(*nodes):
        nodes = list(nodes)
        place_barriers(nodes, lambda spaces: "barrier " + "".join(sorted(s[0] for s in spaces)))
        return text(nodes)

    assert placed(statement(read), statement(read)) == ".."
    assert placed(statement(write), statement(read), statement(read)) == ".d.."
    assert placed(statement(read), statement(write)) == ".d."
    assert placed(statement(write), statement(other)) == ".."
    assert placed(statement(other), statement(unknown)) == ".d."
    assert placed(statement(add), statement(add), statement(read)) == "..d."
    assert placed(statement(mine), statement(also_mine), statement(mine)) == "..."
    assert placed(statement(mine), statement(read)) == ".d."
    assert placed(Each(4, 1, [statement(write)]), statement(read)) == ".d."
    # what ends a loop's body meets what begins it
    assert placed(Nest("for", [statement(read), statement(write)], "}", True)) == "(d.d.|)"
    assert placed(Nest("for", [statement(write)], "}", True), statement(read)) == "(d.|)d."
    # either branch may have been taken
    branch = Nest("if", [statement(write)], "}", False, None, [statement(read)])
    assert placed(branch, statement(read)) == "(.|.)d."
    assert placed(statement(write), Nest("if", [statement(read)], "}", False), statement(read)) == ".(d.|)d."
    piece, more = Scratch(64), Scratch(64, 32)
    shared = placed(statement(Access("write", piece), read), statement(Access("read", piece)), statement(write))
    assert shared == ".t.d."
    assert placed(statement(Access("read", piece)), statement(Access("write", more))) == ".t."


def test_memory_is_shared_by_pieces_that_are_never_alive_together(rng):
    for _ in range(50):
        pieces = [Scratch(int(rng.integers(1, 300))) for _ in range(8)]
        nodes, alive = [], []
        spans = {}
        for piece in pieces:
            first = int(rng.integers(0, 20))
            spans[piece] = (first, first + int(rng.integers(0, 6)))
        for number in range(26):
            alive = [Access("read", p) for p, (first, last) in spans.items() if first <= number <= last]
            nodes.append(statement(*alive))
        size = allocate(nodes, int(rng.integers(0, 2000)))
        for p in pieces:
            assert p.offset % 16 == 0 and p.offset + p.nbytes <= size
            for q in pieces:
                together = spans[p][0] <= spans[q][1] and spans[q][0] <= spans[p][1]
                apart = p.offset + p.nbytes <= q.offset or q.offset + q.nbytes <= p.offset
                assert p is q or apart or not together


def test_axis_bits_are_the_bits_of_row_major_places():
    assert axis_bits((4, 1, 8)) == [[3, 4], [], [0, 1, 2]]

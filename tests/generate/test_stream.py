"""TextStream against plain decoding and plain searching, however the bytes are cut."""

from __future__ import annotations

import contextlib
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitinol.generate.stream import TextStream

PARTS = st.lists(st.sampled_from([b"\xf0\x9f", b"\x91\x8d", b"\xe4\xbd\xa0", b"\xe4\xbd", b"a", b"\xff"]), max_size=12)
ANYTHING = st.one_of(st.binary(max_size=24), st.text(max_size=12).map(str.encode), PARTS.map(b"".join))


def cut(data: bytes, lengths: list[int]) -> list[bytes]:
    """`data` in pieces of these lengths (the last of what remains), like tokens; empty ones among them."""
    pieces = []
    for length in lengths:
        pieces.append(data[:length])
        data = data[length:]
    return [*pieces, data]


CUTS = st.lists(st.integers(0, 4), max_size=20)


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The text before the stop string that is complete first (the longest of those), and that string."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[:end - len(stop)], stop
    return text, None


@given(ANYTHING, CUTS)
@settings(deadline=None, max_examples=300)
def test_characters_are_never_split(data, lengths):
    stream, shown = TextStream(), ""
    for i, piece in enumerate(pieces := cut(data, lengths)):
        shown += stream.feed(piece)
        so_far = b"".join(pieces[:i + 1])
        # All is shown but the bytes (three at most) that may still become a character.
        assert any(shown == so_far[:len(so_far) - n].decode(errors="replace") for n in range(4))
        with contextlib.suppress(UnicodeDecodeError):
            assert shown == so_far.decode()
    assert shown + stream.flush() == data.decode(errors="replace")
    assert stream.stopped is None


@given(st.text("ab你", max_size=30), st.lists(st.text("ab你", min_size=1, max_size=5), max_size=3), CUTS)
@settings(deadline=None, max_examples=500)
def test_stop_strings(text, stops, lengths):
    expected, stop = first_stop(text, stops)
    stream, shown, data = TextStream(stops), "", b""
    for piece in cut(text.encode(), lengths):
        shown += stream.feed(piece)
        data += piece
        assert expected.startswith(shown)
        if stream.stopped is None:  # only the beginning of a stop string is held back
            held = data.decode(errors="ignore")[len(shown):]
            assert not held or any(s.startswith(held) and s != held for s in stops)
        else:
            assert shown == expected
    assert shown + stream.flush() == expected
    assert stream.stopped == stop
    assert stream.feed(b"more") == "" if stop else True


def test_all_short_stop_strings():
    # Random strings seldom repeat themselves in the way that a search can get wrong; short ones can all be tried.
    strings = {n: ["".join(letters) for letters in itertools.product("ab", repeat=n)] for n in range(1, 9)}
    short = strings[1] + strings[2] + strings[3]
    cases = [([stop], text) for stop in short + strings[4] for text in strings[8]]
    cases += [(list(pair), text) for pair in itertools.permutations(short, 2) for text in strings[5]]
    cases += [([stop], stop[:n] + stop) for stop in strings[7] for n in range(1, 7)]
    for stops, text in cases:
        stream = TextStream(stops)
        shown = "".join(stream.feed(letter.encode()) for letter in text) + stream.flush()
        assert (shown, stream.stopped) == first_stop(text, stops), (stops, text)


def test_invalid_bytes_when_they_are_certain():
    stream = TextStream()
    assert stream.feed(b"a\xe4") == "a"
    assert stream.feed(b"\xbd") == ""
    assert stream.feed(b"b") == "\ufffdb"  # now \xe4\xbd cannot become a character any more
    assert stream.feed(b"\xff") == "\ufffd"
    assert stream.feed(b"\xf0\x9f") == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_stop_string_over_tokens():
    stream = TextStream(["\nUser:", "<|im_end|>"])
    assert [stream.feed(piece) for piece in (b"Hi\n", b"Us", b"ing ", b"it\nUse", b"r: you")] == [
        "Hi", "", "\nUsing ", "it", ""]
    assert stream.stopped == "\nUser:"
    assert (stream.feed(b"x"), stream.flush()) == ("", "")


def test_stop_string_that_is_incomplete_at_the_end():
    stream = TextStream("STOP")
    assert stream.feed(b"a STO") == "a "
    assert stream.flush() == "STO"
    assert stream.stopped is None


def test_stop_string_completed_by_the_flush():
    stream = TextStream(["\ufffd"])
    assert stream.feed(b"ab\xe4") == "ab"
    assert stream.flush() == "" and stream.stopped == "\ufffd"


def test_empty_stop_string():
    for stop in ("", ["a", ""]):
        with pytest.raises(ValueError, match="stop string is empty"):
            TextStream(stop)

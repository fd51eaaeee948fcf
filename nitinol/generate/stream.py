"""Token bytes to text as it can be shown: whole characters only, and nothing that may belong to a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Turns the bytes of successive tokens into pieces of text.

    A character whose bytes are not complete waits for the next token; bytes that can no longer become a
    character are U+FFFD. Text that may be the beginning of one of the `stop` strings is held back; when one
    is complete, the text before it is released, `stopped` is that string, and nothing follows. Of several,
    the one that is complete first counts, and of those that end together the longest. What comes out
    does not depend on how the bytes are cut into tokens. Amortised cost per character: O(1) per stop string.

    Raises ValueError for an empty stop string.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stops = [stop] if isinstance(stop, str) else sorted(stop, key=len, reverse=True)
        if not all(self._stops):
            raise ValueError("a stop string is empty, so that generation would end before it began; leave it out")
        self.stopped: str | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._borders = [_borders(text) for text in self._stops]
        self._matched = [0] * len(self._stops)  # how much of each stop string the text so far ends with
        self._held = ""

    def feed(self, data: bytes) -> str:
        """The text that can be shown after these bytes; often empty."""
        return self._push(self._decoder.decode(data))

    def flush(self) -> str:
        """The rest, at the end of generation: what was held back, and U+FFFD for an incomplete character."""
        text = self._push(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return text + rest

    def _push(self, new: str) -> str:
        if self.stopped is not None or not new:
            return ""
        text = self._held + new
        for end, character in enumerate(new, len(self._held) + 1):
            for i, stop in enumerate(self._stops):  # longest first
                matched = self._matched[i]
                while matched and stop[matched] != character:  # Knuth, Morris and Pratt's search
                    matched = self._borders[i][matched]
                matched += stop[matched] == character
                self._matched[i] = matched
                if matched == len(stop):
                    self.stopped, self._held = stop, ""
                    return text[:end - len(stop)]
        cut = len(text) - max(self._matched, default=0)
        self._held = text[cut:]
        return text[:cut]


def _borders(text: str) -> list[int]:
    """borders[n]: the length of the longest proper prefix of text[:n] that is also its suffix."""
    borders, matched = [0, 0], 0
    for character in text[1:]:
        while matched and text[matched] != character:
            matched = borders[matched]
        matched += text[matched] == character
        borders.append(matched)
    return borders

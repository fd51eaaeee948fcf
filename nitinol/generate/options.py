"""What a caller may ask of a generation, checked before any work starts."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

MOST_TOP_K = 1 << 20


@dataclass(frozen=True)
class Options:
    """How tokens are chosen and when to stop.

    max_tokens: at most so many new tokens; None: until the context is full.
    temperature: logits are divided by it before the softmax; 0 takes the most likely token (greedy).
    top_k, top_p, min_p: keep the k most likely tokens; the fewest whose probabilities reach p; those at least min_p
        times as likely as the most likely one. 0, 1 and 0 keep all.
    repeat_penalty: logits of tokens that the context holds already are divided by it where positive, multiplied
        where negative (Keskar et al., CTRL, 2019); 1 changes nothing.
    seed: equal seeds give equal texts; None draws one.
    stop: texts at which generation ends; they are not part of the result.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        _integer("max_tokens", self.max_tokens, 1, 1 << 40, optional=True)
        _number("temperature", self.temperature, 0, 100)
        _integer("top_k", self.top_k, 0, MOST_TOP_K)
        _number("top_p", self.top_p, 0, 1, open_below=True)
        _number("min_p", self.min_p, 0, 1)
        _number("repeat_penalty", self.repeat_penalty, 0, 100, open_below=True)
        _integer("seed", self.seed, 0, (1 << 64) - 1, optional=True)
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(text, str) and text for text in stops):
            raise ValueError(f"stop is {self.stop!r:.60}, expected texts that are not empty")
        object.__setattr__(self, "stop", stops)
        object.__setattr__(self, "seed", secrets.randbits(32) if self.seed is None else self.seed)


def _integer(name: str, value: object, low: int, high: int, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r:.40}, expected a whole number from {low} to {high}")


def _number(name: str, value: object, low: float, high: float, open_below: bool = False) -> None:
    if (not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value)
            or not low <= value <= high or (open_below and value == low)):
        raise ValueError(f"{name} is {value!r:.40}, expected a number {'above' if open_below else 'from'} {low} "
                         f"{'and at most' if open_below else 'to'} {high}")

"""The generation loop: one prompt's way to text, token by token."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from nitinol.generate.options import Options
from nitinol.generate.session import ReadProgress, Session
from nitinol.generate.stream import TextStream

if TYPE_CHECKING:
    from nitinol.generate.model import Model


class Generation:
    """An iterator of pieces of text (whole characters), with figures.

    tokens: ids of the new tokens so far, without the one that ended the turn. stop_reason: None while it runs, then
    "length" (max_tokens), "stop" (a stop text), "end_of_turn" (the model ended) or "context" (no room is left).
    prompt_tokens: length of the prompt; prefilled_tokens: how many of these had to be read, because the cache did not
    hold them from before. prefill_s: their time, with the first token's choice; ttft_s: that and what came before it,
    such as the prompt's tokenization; decode_s: the time of all later tokens.

    ValueError at once, before any work, for a prompt that is empty, that has ids outside the vocabulary, or that
    leaves no room in the context.
    """

    def __init__(self, model: Model, session: Session, prompt: Sequence[int], options: Options,
                 progress: ReadProgress | None = None, started: float | None = None) -> None:
        self.model, self.session, self.options = model, session, options
        self.prompt = list(prompt)
        session.check_tokens(self.prompt)
        if len(self.prompt) >= session.context:
            longest = model.config.context
            raise ValueError(
                f"the prompt has {len(self.prompt)} tokens, but the context has {session.context}, prompt and answer "
                "together; shorten the prompt" + (f" or ask for a context of up to {longest}"
                                                  if session.context < longest else ""))
        self.tokens: list[int] = []
        self.stop_reason: str | None = None
        self.prefilled_tokens = 0
        self.prefill_s = self.decode_s = self.ttft_s = 0.0
        self._prepared = 0.0 if started is None else time.perf_counter() - started
        self._pieces = self._run(progress)

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def _run(self, progress: ReadProgress | None) -> Iterator[str]:
        options, tokenizer, session = self.options, self.model.tokenizer, self.session
        stream = TextStream(options.stop)
        room = session.context - len(self.prompt)
        limit = room if options.max_tokens is None else min(room, options.max_tokens)
        begun = time.perf_counter()  # not in __init__: the first piece may be asked for long after the call
        session.begin(self)
        self.prefilled_tokens = session.prefill(self.prompt, options, progress)
        token = session.next_token
        self.prefill_s = time.perf_counter() - begun
        self.ttft_s = self._prepared + self.prefill_s
        while True:
            if token in tokenizer.stop_ids:
                self.stop_reason = "end_of_turn"
                break
            self.tokens.append(token)
            if piece := stream.feed(tokenizer.token_bytes(token)):
                yield piece
            if stream.stopped is not None:
                self.stop_reason = "stop"
                return
            if len(self.tokens) == limit:
                self.stop_reason = "length" if limit == options.max_tokens else "context"
                break
            begun = time.perf_counter()
            session.check_owner(self)
            session.step(more=len(self.tokens) + 1 < limit)
            token = session.next_token
            self.decode_s += time.perf_counter() - begun
        if piece := stream.flush():
            yield piece

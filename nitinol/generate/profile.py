"""A prompt's way through the model with time stamps, for `nitinol trace`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nitinol.generate.model import Model
from nitinol.generate.options import Options

COUNTED = ("submits", "waits", "allocations", "dispatches")
REPETITIONS = 3


@dataclass(frozen=True)
class Run:
    """One run of a command list: its entries' records and time stamps (transform/compile.py), the bytes that each
    moves, the time from the submission to the end of the wait, and what it added to the device's counters."""

    name: str
    tokens: int
    records: Sequence[Any]
    nbytes: Sequence[int]
    timestamps: Sequence[Any]
    wall_ns: int
    counters: dict[str, int]


def profile(model: Model, ids: Sequence[int], progress: Callable[[int, int], None] | None = None) -> list[Run]:
    """The prefill of `ids` (of its last chunk, where it is longer than one) and one decode step after it.

    Each is run a few times, so that what is compiled, mapped and cached at first use does not count; the quickest run
    is returned.
    """
    session = model.session
    if len(ids) >= session.context:
        raise ValueError(f"the prompt has {len(ids)} tokens, but the context has {session.context}, with the answer")
    options, total = Options(), 2 * REPETITIONS + 1
    session.begin(None)
    session.cache.move(0)
    session.prefill(ids, options)  # all of it: from now on only the last chunk
    start = (len(ids) - 1) // session.chunk * session.chunk
    runs: list[list[Run]] = [[], []]

    def measured(name: str, position: int, tokens: int, work: Callable[[], Any], compiled: Any) -> Run:
        commands = compiled.program.commands
        commands.profile = True
        work()  # encodes the list anew, with time stamps
        before = {key: getattr(model.device.counters, key) for key in COUNTED}
        begun = time.perf_counter_ns()
        work()
        wall = time.perf_counter_ns() - begun
        spent = {key: getattr(model.device.counters, key) - before[key] for key in COUNTED}
        stamps = commands.timestamps()
        commands.profile = False
        nbytes = moved(compiled.records, model, position, tokens)
        return Run(name, tokens, compiled.records, nbytes, stamps, wall, spent)

    def prefill() -> None:
        session.cache.move(start)
        session.prefill(ids, options)

    def step() -> None:
        session.cache.move(len(ids))
        session.step()

    step()
    for i in range(REPETITIONS):
        count = len(ids) - start
        runs[0].append(measured("prefill", start, count, prefill, session.prefill_list(count, True)))
        runs[1].append(measured("decode", len(ids), 1, step, session.decode_list))
        if progress is not None:
            progress(2 * i + 2, total)
    return [min(found, key=lambda run: run.wall_ns) for found in runs]


def moved(records: Sequence[Any], model: Model, position: int, tokens: int) -> list[int]:
    """The bytes that each launch of a list moves: those of its arrays, but of the embedding only the tokens' rows, and
    of the cache only what the tokens at `position` see or, where keys and values are written, these tokens' places."""
    keys, context = model.session.cache.layers[0][0], model.session.context
    layer, found = 0, []
    for record in records:
        nbytes, places = record.nbytes, tokens
        if "attention" in record.name:  # one a layer, in their order
            window = model.config.window_of(layer) or position + tokens
            layer, places = layer + 1, min(position + tokens, window + tokens - 1)
        for shape in record.shapes:
            if shape == keys.shape:
                nbytes -= keys.nbytes * (context - places) // context
        if record.name.startswith("embedding"):
            table = model.file.tensors["token_embd.weight"]
            nbytes -= table.nbytes * (model.config.vocab - tokens) // model.config.vocab
        found.append(max(nbytes, 0))
    return found

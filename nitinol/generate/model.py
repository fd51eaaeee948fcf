"""A model ready to run: its file, its network on a device, its tokenizer, and a session that generates."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from nitinol.formats.gguf import GGUF, FormatError
from nitinol.generate.cache import DTYPES
from nitinol.generate.generation import Generation
from nitinol.generate.options import Options
from nitinol.generate.session import ReadProgress, Session
from nitinol.generate.tokenizer import Tokenizer
from nitinol.models import make_network, open_model
from nitinol.models.base import Config
from nitinol.models.memory import check_memory
from nitinol.runtime import get_device, open_device
from nitinol.runtime.device import Progress

DEFAULT_CONTEXT = 4096


def load(path: str | os.PathLike[str], device: str | None = None, threads: int | None = None,
         context: int | None = None, cache_dtype: str = "fp16", progress: Progress | None = None) -> Model:
    """Open a GGUF model ("demo": the one that comes with the package) for use.

    device: "metal", "cuda", "cpu"; by default the first of these that is there. threads: workers of the CPU, by default
    one per core. context: how many tokens, prompt and answer together, the attention cache has room for; by default the
    model's own limit, at most 4096. cache_dtype: "fp16" or "fp32".
    The weights stay in the file, which must not be changed meanwhile; CUDA copies them to the GPU's memory. progress:
    told of such a copy, bytes done and bytes in all.

    Raises FormatError (a ValueError) for a file that is not a supported model, OSError, ValueError for other
    arguments, DeviceError for a device that is not there, MemoryError with figures where the model does not fit.
    """
    if cache_dtype not in DTYPES:
        raise ValueError(f"the cache's type is {cache_dtype!r}, expected {' or '.join(DTYPES)}")
    file, config = open_model(path)
    if context is None:
        context = min(config.context, DEFAULT_CONTEXT)
    if not isinstance(context, int) or not 1 <= context <= config.context:
        raise ValueError(f"the context is {context!r:.40} tokens, but {config.name} was made for 1 to {config.context}")
    weights = sum(tensor.nbytes for tensor in file.tensors.values())
    if device is None and threads is None:
        opened = get_device()
    else:
        opened = open_device("cpu" if device is None else device, threads)
    check_memory(config, weights, context, cache_dtype, opened.available_memory(), opened.name)
    return Model(file, config, opened, context, cache_dtype, progress)


class Model:
    """Made by `load`. Attributes: `config`, `context` (the session's room in tokens), `device`, `tokenizer`, `network`
    (the model as a function of its weights), `session` (where it generates).

    A session does one thing at a time. Several conversations over the same weights have one each, see `new_session`.
    """

    def __init__(self, file: GGUF, config: Config, device: Any, context: int, cache_dtype: str,
                 progress: Progress | None = None) -> None:
        self.file, self.config, self.device, self.context = file, config, device, context
        self.network = make_network(file, config, device, progress)
        self.session = Session(self.network, context, cache_dtype)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The file's tokenizer; FormatError where it has none that can be used, or one of another size."""
        tokenizer = Tokenizer.from_gguf(self.file.metadata)
        if tokenizer.vocab_size != self.config.vocab:
            raise FormatError(f"{self.file.path}: the tokenizer has {tokenizer.vocab_size} tokens, but "
                              f"token_embd.weight has {self.config.vocab} rows; the file was converted wrongly")
        return tokenizer

    def new_session(self, context: int | None = None) -> Session:
        """Another sequence over the same weights, with a cache of its own; context: by default this model's.

        MemoryError with figures where its cache does not fit.
        """
        context = self.context if context is None else context
        if not isinstance(context, int) or not 1 <= context <= self.config.context:
            raise ValueError(f"the context is {context!r:.40} tokens, but {self.config.name} was made for 1 to "
                             f"{self.config.context}")
        check_memory(self.config, 0, context, self.session.cache_dtype, self.device.available_memory(),
                     self.device.name)
        return Session(self.network, context, self.session.cache_dtype)

    def generate(self, prompt: str | Sequence[int], options: Options | None = None,
                 progress: ReadProgress | None = None, session: Session | None = None, **keywords: Any) -> Generation:
        """Continue a text or token ids: an iterator of pieces of text, see `Generation`.

        Options by keyword (`max_tokens=100, temperature=0.7, seed=1`, see `Options`) or as an object. session: by
        default the model's own.
        """
        started = time.perf_counter()
        ids = self.encode(prompt) if isinstance(prompt, str) else [int(id) for id in prompt]
        return Generation(self, session or self.session, ids, options or Options(**keywords), progress, started)

    def chat(self, messages: Sequence[Mapping[str, Any]], options: Options | None = None,
             progress: ReadProgress | None = None, session: Session | None = None, **keywords: Any) -> Generation:
        """Answer the last of `messages` (mappings with `role` and `content`) by way of the model's chat template.

        What a conversation shares with the session's previous call is still in the cache and is not read again.
        """
        from nitinol.generate.chat import render_chat

        started = time.perf_counter()
        tokenizer = self.tokenizer

        def text(id: int | None) -> str | None:
            return None if id is None else tokenizer.tokens[id]

        prompt = render_chat(tokenizer.chat_template, messages, bos_token=text(tokenizer.bos_id),
                             eos_token=text(tokenizer.eos_id))
        ids = tokenizer.encode(prompt, add_special=False, parse_special=True)
        return Generation(self, session or self.session, ids, options or Options(**keywords), progress, started)

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a text to be continued; ValueError where it is empty."""
        if not prompt:
            raise ValueError("the prompt is empty; give a text to continue")
        return self.tokenizer.encode(prompt)

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """The scores of every token as the next one after each of `token_ids`: float32 [T, vocabulary].

        ValueError for ids outside the vocabulary, or more than the context holds.
        """
        return self.session.logits([int(id) for id in token_ids])

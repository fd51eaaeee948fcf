"""A model ready to run: its weights in place, its cache, and its steps as command lists."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from nitinol.formats.gguf import GGUF, FormatError
from nitinol.generate.cache import DTYPES, KVCache
from nitinol.generate.generation import Generation, ReadProgress
from nitinol.generate.options import Options
from nitinol.generate.tokenizer import Tokenizer
from nitinol.models import open_model
from nitinol.models.config import PREFILL_CHUNK, Config, check_memory
from nitinol.runtime import get_device, open_device, using_device
from nitinol.runtime.device import Progress

if TYPE_CHECKING:
    from nitinol.transform.compile import Compiled

DEFAULT_CONTEXT = 4096
REPEAT_WINDOW = 64  # how many of the latest tokens the repetition penalty looks at
KEPT_PREFILLS = 2  # command lists that are kept: of a long prompt's chunks, and of the last, shorter one


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
    """Made by `load`. Attributes: `config`, `context` (the cache's room in tokens), `device`, `tokenizer`.

    One model does one thing at a time: a new generation ends the previous one's use of the cache.
    """

    def __init__(self, file: GGUF, config: Config, device: Any, context: int, cache_dtype: str,
                 progress: Progress | None = None) -> None:
        from importlib import import_module

        from nitinol.models.weights import wrap_weights

        self.file, self.config, self.device, self.context = file, config, device, context
        self._attend = import_module(f"nitinol.models.{config.arch}").attend
        self._weights = wrap_weights(file, config, device, progress)
        self.cache_dtype = cache_dtype
        self.chunk = PREFILL_CHUNK[device.name]
        self.next_token = -1  # what was chosen last
        self._owner: Any = None
        self._ahead: Any = None  # the event of a step that has begun already
        self._prefills: dict[tuple[int, bool], Compiled] = {}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The file's tokenizer; FormatError where it has none that can be used, or one of another size."""
        tokenizer = Tokenizer.from_gguf(self.file.metadata)
        if tokenizer.vocab_size != self.config.vocab:
            raise FormatError(f"{self.file.path}: the tokenizer has {tokenizer.vocab_size} tokens, but "
                              f"token_embd.weight has {self.config.vocab} rows; the file was converted wrongly")
        return tokenizer

    @cached_property
    def cache(self) -> KVCache:
        """Allocated when it is first needed."""
        return KVCache(self.config, self.context, self.cache_dtype, self.device)

    # ------------------------------------------------------------------------------------------------ for callers

    def generate(self, prompt: str | Sequence[int], options: Options | None = None,
                 progress: ReadProgress | None = None, **keywords: Any) -> Generation:
        """Continue a text or token ids: an iterator of pieces of text, see `Generation`.

        Options by keyword (`max_tokens=100, temperature=0.7, seed=1`, see `Options`) or as an object.
        """
        started = time.perf_counter()
        ids = self.encode(prompt) if isinstance(prompt, str) else [int(id) for id in prompt]
        return Generation(self, ids, options or Options(**keywords), progress, started)

    def chat(self, messages: Sequence[Mapping[str, Any]], options: Options | None = None,
             progress: ReadProgress | None = None, **keywords: Any) -> Generation:
        """Answer the last of `messages` (mappings with `role` and `content`) by way of the model's chat template.

        What a conversation shares with the previous call is still in the cache and is not read again.
        """
        from nitinol.generate.chat import render_chat

        started = time.perf_counter()
        tokenizer = self.tokenizer

        def text(id: int | None) -> str | None:
            return None if id is None else tokenizer.tokens[id]

        prompt = render_chat(tokenizer.chat_template, messages, bos_token=text(tokenizer.bos_id),
                             eos_token=text(tokenizer.eos_id))
        ids = tokenizer.encode(prompt, add_special=False, parse_special=True)
        return Generation(self, ids, options or Options(**keywords), progress, started)

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a text to be continued; ValueError where it is empty."""
        if not prompt:
            raise ValueError("the prompt is empty; give a text to continue")
        return self.tokenizer.encode(prompt)

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """The scores of every token as the next one after each of `token_ids`: float32 [T, vocabulary].

        ValueError for ids outside the vocabulary, or more than the context holds.
        """
        ids = [int(id) for id in token_ids]
        self.check_tokens(ids)
        if len(ids) > self.context:
            raise ValueError(f"{len(ids)} tokens do not fit the context of {self.context}")
        self.begin(None)
        self.cache.move(0)
        rows = []
        with using_device(self.device):
            for start in range(0, len(ids), self.chunk):
                chunk = ids[start:start + self.chunk]
                self.cache.move(start)
                rows.append(self._logits(self._forward(self._tokens(chunk))).numpy())
                self.cache.tokens += chunk
        return np.concatenate(rows)

    # -------------------------------------------------------------------------------------- for a generation's loop

    def check_tokens(self, ids: Sequence[int]) -> None:
        """ValueError unless there is at least one id and all are in the vocabulary."""
        if not ids:
            raise ValueError("there are no tokens to continue from; give a prompt")
        wrong = next((id for id in ids if not 0 <= id < self.config.vocab), None)
        if wrong is not None:
            raise ValueError(f"token id {wrong} is outside the vocabulary, which has ids 0 to {self.config.vocab - 1}")

    def begin(self, owner: Any) -> None:
        """From now on the cache is `owner`'s; whatever an interrupted one left running is waited for."""
        self.device.synchronize()
        self._owner, self._ahead = owner, None

    def check_owner(self, owner: Any) -> None:
        if self._owner is not owner:
            raise RuntimeError("another generation has begun on this model, whose cache this one needed; finish one "
                               "before you begin the next, or load the model twice")

    def prefill(self, ids: Sequence[int], options: Options, progress: ReadProgress | None = None) -> int:
        """Put a prompt into the cache and choose the next token; how many tokens had to be read."""
        cache, state = self.cache, self._state
        start = cache.reuse(ids)
        reused = start
        state.history.buffer.write(np.array(ids, np.int32))
        state.options.buffer.write(np.array([options.temperature, options.top_p, options.min_p, options.repeat_penalty],
                                            np.float32))
        state.limits.buffer.write(np.array([options.seed, options.top_k, REPEAT_WINDOW], np.uint64))
        with using_device(self.device):
            while start < len(ids):
                chunk = ids[start:start + self.chunk]
                start += len(chunk)
                self.prefill_list(len(chunk), last=start == len(ids))(np.array(chunk, np.int32))
                cache.tokens += chunk
                if progress is not None:
                    progress(start - reused, len(ids) - reused)
        self.next_token = self._token_at(len(ids))
        return len(ids) - reused

    def step(self, more: bool = False) -> None:
        """Put the latest token into the cache and choose the next one: one submission, one wait.

        more: another step is likely to follow. A GPU then begins it at once, so that it does not wait for the host
        between two tokens; if it does not follow, what the GPU has done is overwritten later.
        """
        token, count = self.next_token, len(self.cache.tokens)
        with using_device(self.device):
            if self.device.name != "cuda":
                self.decode_list()
            else:
                event, self._ahead = self._ahead or self.decode_list.submit(), None
                if more and count + 2 < self.context:
                    self._ahead = self.decode_list.submit()
                if event is not None:
                    event.wait()
        self.cache.tokens.append(token)
        self.next_token = self._token_at(count + 1)

    def _token_at(self, place: int) -> int:
        """A token that the device has chosen, from memory that the host sees; later steps write other places."""
        return int(self._chosen[place])

    @cached_property
    def _chosen(self) -> np.ndarray:
        return self._state.history.buffer.as_numpy(np.int32)

    # ------------------------------------------------------------------------------------------------ command lists

    @cached_property
    def _state(self) -> Any:
        """What the sampling kernel reads and updates."""
        from nitinol.graph.conversion import array, empty
        from nitinol.ops.sampling import SamplingState

        def zeros(count: int, dtype: Any) -> Any:
            return array(np.zeros(count, dtype), device=self.device)

        # The host reads the latest token there after every step; the one after the last of a full context is the last.
        history = empty((self.context + 1,), "int32", self.device, shared=True)
        history.buffer.write(np.zeros(self.context + 1, np.int32))
        return SamplingState(zeros(1, np.int32), self.cache.position, history, zeros(4, np.float32), zeros(3, np.int64))

    @cached_property
    def decode_list(self) -> Compiled:
        """The command list of one step."""
        from nitinol.ops.sampling import sample
        from nitinol.transform.compile import compile

        def decode() -> None:
            logits = self._logits(self._forward(self._state.token))
            sample(logits, self._state)

        return compile(decode)

    def prefill_list(self, count: int, last: bool) -> Compiled:
        """The command list for `count` tokens of a prompt; only the last chunk's last token needs logits."""
        from nitinol.ops.sampling import sample
        from nitinol.transform.compile import compile

        def prefill(tokens: Any) -> None:
            x = self._forward(tokens)
            if last:
                sample(self._logits(x[-1:]), self._state, tokens=count)
            else:
                position = self._state.position
                position.assign(position + count)

        found = self._prefills.pop((count, last), None) or compile(prefill)
        self._prefills[count, last] = found  # the latest at the end
        if len(self._prefills) > KEPT_PREFILLS:
            del self._prefills[next(iter(self._prefills))]
        return found

    def _forward(self, tokens: Any) -> Any:
        from nitinol.models.transformer import forward

        return forward(self._attend, self._weights, self.config, tokens, self.cache.position, self.cache.layers)

    def _logits(self, x: Any) -> Any:
        from nitinol.models.transformer import logits

        return logits(self._weights, x)

    def _tokens(self, ids: Sequence[int]) -> Any:
        from nitinol.graph.conversion import array

        return array(np.array(ids, np.int32), device=self.device)

"""One sequence in the making: its cache, its tokens, how the next one is chosen, and its steps as command lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from nitinol.generate.cache import KVCache
from nitinol.generate.options import Options
from nitinol.models.base import PREFILL_CHUNK, Network
from nitinol.runtime import using_device

if TYPE_CHECKING:
    from nitinol.transform.compile import Compiled

REPEAT_WINDOW = 64  # how many of the latest tokens the repetition penalty looks at
KEPT_PREFILLS = 2  # command lists that are kept: of a long prompt's chunks, and of the last, shorter one

ReadProgress = Callable[[int, int], None]  # tokens of the prompt that are read, of how many


class Session:
    """Attributes: `context` (the cache's room in tokens), `cache_dtype` ("fp16" or "fp32"), `chunk` (tokens of a prompt
    that go through the layers together), `next_token` (what was chosen last).

    It does one thing at a time: a new generation ends the previous one's use of the cache. Memory is allocated when it
    is first needed.
    """

    def __init__(self, network: Network, context: int, cache_dtype: str) -> None:
        self.network, self.device = network, network.device
        self.context, self.cache_dtype = context, cache_dtype
        self.chunk = PREFILL_CHUNK[self.device.name]
        self.next_token = -1
        self._owner: Any = None
        self._ahead: Any = None  # the event of a step that has begun already
        self._prefills: dict[tuple[int, bool], Compiled] = {}

    @cached_property
    def cache(self) -> KVCache:
        return KVCache(self.network.config, self.context, self.cache_dtype, self.device)

    @cached_property
    def state(self) -> Any:
        """What the sampling kernel reads and updates."""
        from nitinol.graph.conversion import array, empty
        from nitinol.ops.sampling import SamplingState

        def zeros(shape: tuple[int, ...], dtype: Any) -> Any:
            return array(np.zeros(shape, dtype), device=self.device)

        # The host reads the latest token there after every step; the one after the last of a full context is the last.
        history = empty((1, self.context + 1), "int32", self.device, shared=True)
        history.buffer.write(np.zeros(self.context + 1, np.int32))
        return SamplingState(zeros((1,), np.int32), self.cache.position, history, zeros((1, 4), np.float32),
                             zeros((1, 3), np.int64))

    def check_tokens(self, ids: Sequence[int]) -> None:
        """ValueError unless there is at least one id and all are in the vocabulary."""
        vocab = self.network.config.vocab
        if not ids:
            raise ValueError("there are no tokens to continue from; give a prompt")
        wrong = next((id for id in ids if not 0 <= id < vocab), None)
        if wrong is not None:
            raise ValueError(f"token id {wrong} is outside the vocabulary, which has ids 0 to {vocab - 1}")

    def begin(self, owner: Any) -> None:
        """From now on the cache is `owner`'s; whatever an interrupted one left running is waited for."""
        self.device.synchronize()
        self._owner, self._ahead = owner, None

    def check_owner(self, owner: Any) -> None:
        if self._owner is not owner:
            raise RuntimeError("another generation has begun on this model, whose cache this one needed; finish one "
                               "before you begin the next, or load the model twice")

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """The scores of every token as the next one after each of `ids`, which replace what the cache holds: float32
        [T, vocabulary]. ValueError for ids outside the vocabulary, or more than the context holds."""
        self.check_tokens(ids)
        if len(ids) > self.context:
            raise ValueError(f"{len(ids)} tokens do not fit the context of {self.context}")
        self.begin(None)
        self.cache.move(0)
        return np.concatenate([self.read(ids[start:start + self.chunk]) for start in range(0, len(ids), self.chunk)])

    def read(self, ids: Sequence[int]) -> np.ndarray:
        """Adds tokens to the cache, all at once; their logits, float32 [T, vocabulary]."""
        from nitinol.graph.conversion import array

        self.cache.move(len(self.cache.tokens))
        with using_device(self.device):
            tokens = array(np.array(ids, np.int32), device=self.device)
            logits = self.network.logits(self._forward(tokens)).numpy()
        self.cache.tokens += ids
        return logits  # type: ignore[no-any-return]

    def prefill(self, ids: Sequence[int], options: Options, progress: ReadProgress | None = None) -> int:
        """Put a prompt into the cache and choose the next token; how many tokens had to be read."""
        cache, state = self.cache, self.state
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

    @cached_property
    def decode_list(self) -> Compiled:
        """The command list of one step."""
        from nitinol.ops.sampling import sample
        from nitinol.transform.compile import compile

        def decode() -> None:
            sample(self.network.logits(self._forward(self.state.token)), self.state)

        return compile(decode)

    def prefill_list(self, count: int, last: bool) -> Compiled:
        """The command list for `count` tokens of a prompt; only the last chunk's last token needs logits."""
        from nitinol.ops.sampling import sample
        from nitinol.transform.compile import compile

        def prefill(tokens: Any) -> None:
            x = self._forward(tokens)
            if last:
                sample(self.network.logits(x[-1:]), self.state, tokens=count)
            else:
                position = self.state.position
                position.assign(position + count)

        found = self._prefills.pop((count, last), None) or compile(prefill)
        self._prefills[count, last] = found  # the latest at the end
        if len(self._prefills) > KEPT_PREFILLS:
            del self._prefills[next(iter(self._prefills))]
        return found

    def _forward(self, tokens: Any) -> Any:
        return self.network.forward(tokens, self.cache.position, self.cache.layers)

    def _token_at(self, place: int) -> int:
        """A token that the device has chosen, from memory that the host sees; later steps write other places."""
        return int(self._chosen[place])

    @cached_property
    def _chosen(self) -> np.ndarray:
        return self.state.history.buffer.as_numpy(np.int32)  # type: ignore[no-any-return]

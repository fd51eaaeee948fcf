"""Text to token ids and back, from the tokenizer that a GGUF file carries in its metadata.

Two kinds exist in the files of this project's architectures. `gpt2` is byte-level BPE (GPT-2, Llama 3,
Qwen, SmolLM, Mistral Nemo): a regular expression cuts the text into words, then merges are applied in rank
order; Hugging Face `tokenizers` does both. `llama` is SentencePiece BPE (Llama 2, Mistral, TinyLlama):
no words, and of all adjacent pairs that form a token the one with the best score is merged first.
"""

from __future__ import annotations

import heapq
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from nitinol.formats.gguf import FormatError

# Values of `tokenizer.ggml.token_type` (GGUF specification).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# The word-splitting expressions, as the models' own tokenizer.json files give them (Llama 3, Qwen 2,
# Mistral Nemo) or, for GPT-2, OpenAI's encoder.py. Each expression of a list splits what the previous left.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
           r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
           r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

# Which `tokenizer.ggml.pre` means which expressions, after llama.cpp, src/llama-vocab.cpp.
_SPLITS = {name: expressions for names, expressions in {
    "default": _DEFAULT,
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": (_LLAMA3,),
    "dbrx smaug-bpe glm4 chatglm-bpe": (_LLAMA3,),
    "qwen2 deepseek-r1-qwen kormo stablelm2 hunyuan megrez grok-2": (_QWEN2,),
    "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 mellum": (_GPT2,),
    "mpt olmo jais trillion granite-docling exaone4": (_GPT2,),
    "starcoder refact command-r smollm codeshell exaone minerva-7b": (r"\p{N}", _GPT2),
    "tekken": (_TEKKEN,),
}.items() for name in names.split()}
# For these llama.cpp takes a word that is itself a token whole, without merging, and adds BOS by default.
_WHOLE_WORDS = frozenset("llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano "
                         "tekken".split())

# Tokens that end a turn, known by their text because files seldom name them all (llama.cpp's list).
_STOP_TEXTS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>",
               "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>", "<｜end▁of▁sentence｜>",
               "<end_of_utterance>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")


class Tokenizer:
    """A tokenizer read from GGUF metadata; make one with `Tokenizer.from_gguf`.

    `tokens` are the vocabulary's entries as the file spells them, `types` their kinds (uint8, as in GGUF);
    `bos_id`, `eos_id`, `eot_id`, `unk_id`, `pad_id` are ids or None; `stop_ids` is the set of ids after
    which generation ends; `chat_template` is the file's Jinja text or None.
    """

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build the tokenizer of a GGUF file from its metadata (keys to Python values, lists, arrays).

        Raises FormatError where the metadata is missing or contradicts itself. Warns, and splits words as
        llama.cpp's `default` does, where `tokenizer.ggml.pre` is missing or unknown.
        """
        return cls(metadata)

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        def field(name: str) -> Any:
            return metadata.get(f"tokenizer.ggml.{name}")

        model = field("model")
        if not isinstance(model, str) or model not in ("gpt2", "llama"):
            raise FormatError(f"tokenizer.ggml.model is {_brief(model)}, but only 'gpt2' (byte-level BPE) and 'llama' "
                              "(SentencePiece) are supported; convert the model with one of these tokenizers")
        self._byte_level = model == "gpt2"
        self.tokens: list[str] = _check_tokens(field("tokens"))
        self._ids = {token: i for i, token in enumerate(self.tokens) if token}
        if len(self._ids) + self.tokens.count("") != len(self.tokens):
            twice = next(i for i, token in enumerate(self.tokens) if token and self._ids[token] != i)
            raise FormatError(f"tokenizer.ggml.tokens holds {self.tokens[twice]!r:.60} at {twice} and again at "
                              f"{self._ids[self.tokens[twice]]}, but tokens must differ; the file is damaged")
        self.types = _check_types(field("token_type"), len(self.tokens))

        default = (None, None, None) if self._byte_level else (1, 2, 0)  # SentencePiece's own ids
        self.bos_id = self._special_id(field, "bos", default[0])
        self.eos_id = self._special_id(field, "eos", default[1])
        self.unk_id = self._special_id(field, "unknown", default[2])
        self.pad_id = self._special_id(field, "padding")
        self.eot_id = self._special_id(field, "eot")
        stops = {self.eos_id, self.eot_id, *(self._special_id(field, name)
                                             for name in ("eom", "fim_pad", "fim_rep", "fim_sep"))}
        self.stop_ids: frozenset[int] = frozenset(
            {i for i in stops if i is not None} | {self._ids[text] for text in _STOP_TEXTS if text in self._ids})
        # Whatever ends generation must not be producible by a user's text, even where the file calls it
        # normal; and a file without types still says that these ids are special.
        special = [i for i in (self.bos_id, self.unk_id, *self.stop_ids) if i is not None]
        if field("token_type") is None:
            self.types[special] = CONTROL
            if not self._byte_level:
                self.types[[i for text, i in self._ids.items() if _byte_of(text) is not None]] = BYTE
        else:
            self.types[[self._ids[text] for text in _STOP_TEXTS if text in self._ids]] = CONTROL

        pre = field("pre")
        if self._byte_level and (not isinstance(pre, str) or pre not in _SPLITS):
            warnings.warn(f"tokenizer.ggml.pre is {_brief(pre)}, which is not known here; words are split as "
                          "'default', so that the text may come out slightly worse", stacklevel=3)
            pre = "default"
        self._add_bos = self._flag(field, "add_bos_token", "bos", not self._byte_level or pre in _WHOLE_WORDS)
        self._add_eos = self._flag(field, "add_eos_token", "eos", False)
        self._space_prefix = not self._byte_level and self._flag(field, "add_space_prefix", None, True)
        template = metadata.get("tokenizer.chat_template")
        self.chat_template: str | None = template if isinstance(template, str) and template else None

        self._encode_words: Callable[[str], list[int]]
        if self._byte_level:
            ordinary = dict(self._ids)
            for i in np.flatnonzero((self.types == CONTROL) | (self.types == UNKNOWN)):
                ordinary.pop(self.tokens[i], None)  # no merge may lead to a control token
            self._encode_words = _byte_level_encoder(ordinary, field("merges"), pre)
        else:
            self._encode_words = _sentencepiece_encoder(self.tokens, self.types, field("scores"), self.unk_id)

    def _special_id(self, field: Callable[[str], Any], name: str, default: int | None = None) -> int | None:
        value = field(f"{name}_token_id")
        if value is None:
            return default if default is not None and default < len(self.tokens) else None
        if not isinstance(value, (int, np.integer)) or not 0 <= value < len(self.tokens):
            raise FormatError(f"tokenizer.ggml.{name}_token_id is {_brief(value)}, but the vocabulary has ids 0 to "
                              f"{len(self.tokens) - 1}; the file is damaged")
        return int(value)

    def _flag(self, field: Callable[[str], Any], name: str, end: str | None, default: bool) -> bool:
        value, has_id = field(name), end is None or getattr(self, f"{end}_id") is not None
        if value is not None and not isinstance(value, (bool, int, np.bool_, np.integer)):
            raise FormatError(f"tokenizer.ggml.{name} is {_brief(value)}, but must be true or false; the file is "
                              "damaged")
        if value and not has_id:
            raise FormatError(f"tokenizer.ggml.{name} is true, but the file has no {end}_token_id; the file is "
                              "damaged or was converted wrongly")
        return has_id and (default if value is None else bool(value))

    @property
    def vocab_size(self) -> int:
        """How many tokens the vocabulary has."""
        return len(self.tokens)

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of `text`.

        With `add_special`, BOS and EOS are added as the model wants them. Text that looks like a control
        token stays text unless `parse_special` (for rendered chat templates); user-defined tokens are
        always recognised. Raises ValueError for text that has no UTF-8 form (lone surrogates).
        """
        _check_text(text)
        ids = [self.bos_id] if add_special and self._add_bos and self.bos_id is not None else []
        pattern = self._all_special if parse_special else self._user_defined
        for i, piece in enumerate(pattern.split(text) if pattern else [text]):
            if i % 2:  # what the pattern's one group matched
                ids.append(self._ids[piece])
            elif piece:  # as in llama.cpp, the space prefix follows the start and every special token
                ids += self._encode_words(" " + piece if self._space_prefix else piece)
        if add_special and self._add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, control tokens nothing (if `skip_special`).

        The space that SentencePiece's space prefix put before the text is taken away again.
        """
        data = b"".join(self.token_bytes(i, skip_special) for i in ids)
        if self._space_prefix:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", errors="replace")

    def token_bytes(self, id: int, skip_special: bool = True) -> bytes:
        """The exact bytes of a token, which need not be whole characters; for streaming.

        Control, unknown and unused tokens have no bytes if `skip_special`, otherwise those of their text.
        """
        if not 0 <= id < len(self.tokens):
            raise ValueError(f"token id {id} is outside the vocabulary, which has ids 0 to {len(self.tokens) - 1}")
        token, kind = self.tokens[id], self.types[id]
        if kind in (CONTROL, UNKNOWN, UNUSED):
            return b"" if skip_special else token.encode()
        if kind == BYTE and (byte := _byte_of(token)) is not None:
            return bytes([byte])
        if kind == USER_DEFINED:
            return token.encode()
        if self._byte_level:
            try:
                return bytes(map(_character_bytes().__getitem__, token))
            except KeyError:  # not in byte-level spelling: the token can only stand for its own text
                return token.encode()
        return token.replace("▁", " ").encode()

    @cached_property
    def _user_defined(self) -> re.Pattern[str] | None:
        return self._special_pattern(USER_DEFINED)

    @cached_property
    def _all_special(self) -> re.Pattern[str] | None:
        return self._special_pattern(USER_DEFINED, CONTROL, UNKNOWN)

    def _special_pattern(self, *kinds: int) -> re.Pattern[str] | None:
        texts = [self.tokens[i] for i in np.flatnonzero(np.isin(self.types, kinds)) if self.tokens[i]]
        texts.sort(key=len, reverse=True)  # where one token begins with another, the longer wins
        return re.compile(f"({'|'.join(map(re.escape, texts))})") if texts else None


def _byte_level_encoder(vocabulary: dict[str, int], merges: Any, pre: str) -> Callable[[str], list[int]]:
    """A function from text to ids by byte-level BPE. No Unicode normalisation, as in llama.cpp: lossless."""
    import tokenizers
    from tokenizers import Regex, models, pre_tokenizers

    if not _is_strings(merges):
        found = "missing" if merges is None else "not a list of strings"
        raise FormatError(f"tokenizer.ggml.merges is {found}, but a 'gpt2' tokenizer needs its merges; convert "
                          "the model again")
    try:
        model = models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges],
                           ignore_merges=pre in _WHOLE_WORDS)
    except Exception as error:  # the library raises bare Exception
        raise FormatError(_bad_merge(merges, vocabulary) or f"the vocabulary is refused: {error}") from None
    bpe = tokenizers.Tokenizer(model)
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(expression), behavior="isolated") for expression in _SPLITS[pre]]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    # The library drops what the vocabulary cannot spell without a word; complete vocabularies have none.
    missing = [byte for character, byte in _character_bytes().items() if character not in vocabulary]

    def encode(text: str) -> list[int]:
        if missing:
            data = text.encode()
            for byte in missing:
                if byte in data:
                    raise ValueError(f"the text holds the byte 0x{byte:02X}, for which this model's vocabulary "
                                     "has no token; leave that character out")
        return bpe.encode(text, add_special_tokens=False).ids

    return encode


def _bad_merge(merges: list[str], vocabulary: dict[str, int]) -> str | None:
    for i, merge in enumerate(merges):
        parts = merge.split(" ")
        if len(parts) != 2:
            return f"tokenizer.ggml.merges[{i}] is {merge!r:.60}, but a merge is two tokens with one space between"
        for token in (*parts, "".join(parts)):
            if token not in vocabulary:
                return (f"tokenizer.ggml.merges[{i}] is {merge!r:.60}, but {token!r:.60} is not an ordinary token of "
                        "the vocabulary; the file is damaged")
    return None


def _sentencepiece_encoder(tokens: list[str], types: np.ndarray, scores: Any,
                           unk_id: int | None) -> Callable[[str], list[int]]:
    """A function from text to ids by SentencePiece's BPE with byte fallback.

    Not by way of `tokenizers`: its merges have ranks, so it cannot say that equal scores go from left to
    right, nor that a character outside the vocabulary may still be part of a token (sentencepiece,
    src/bpe_model.cc; llama.cpp's SPM tokenizer). Nor is there a list of merges to build at load time.
    """
    values = _check_numbers(scores, len(tokens), "scores", "fiu").astype(np.float64)
    if np.isnan(values).any():
        raise FormatError("tokenizer.ggml.scores holds values that are not numbers; the file is damaged")
    cost: list[float] = (-values).tolist()
    mergeable = np.flatnonzero(np.isin(types, (NORMAL, USER_DEFINED, UNUSED))).tolist()
    ids = {tokens[i]: i for i in mergeable if tokens[i]}
    byte_ids: dict[int, int] = {}
    for i in np.flatnonzero(types == BYTE).tolist():
        byte = _byte_of(tokens[i])
        if byte is None:
            raise FormatError(f"token {i} is {tokens[i]!r:.60} and marked as a byte, but bytes are spelt <0x00> to "
                              "<0xFF>; the file is damaged")
        byte_ids[byte] = i

    def encode(text: str) -> list[int]:
        out: list[int] = []
        for piece in _merge_by_score(text.replace(" ", "▁"), ids, cost):
            if piece in ids:
                out.append(ids[piece])
                continue
            fallback = [byte_ids.get(byte, unk_id) for byte in piece.encode()]
            if None in fallback:
                raise ValueError(f"the text holds {piece!r}, for which this model's vocabulary has no token; "
                                 "leave that character out")
            if unk_id in fallback:  # one unknown token for a run of unknown characters
                fallback = [] if out and out[-1] == unk_id else [unk_id]
            out += fallback  # type: ignore[arg-type]
        return out

    return encode


def _merge_by_score(text: str, ids: Mapping[str, int], cost: list[float]) -> list[str]:
    """Pieces of `text` after merging, again and again, the adjacent pair with the lowest cost, leftmost first.

    A heap of candidate pairs makes it O(n log n). A merged-away piece is left as "" in its place; a candidate
    is stale where one of its pieces is gone or has grown.
    """
    pieces = list(text)
    before, after = list(range(-1, len(pieces) - 1)), list(range(1, len(pieces) + 1))
    candidates: list[tuple[float, int, int, int]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right < len(pieces):
            both = pieces[left] + pieces[right]
            token = ids.get(both)
            if token is not None:
                heapq.heappush(candidates, (cost[token], left, right, len(both)))

    for left in range(len(pieces) - 1):
        offer(left, left + 1)
    while candidates:
        _, left, right, length = heapq.heappop(candidates)
        if not pieces[left] or not pieces[right] or len(pieces[left]) + len(pieces[right]) != length:
            continue
        pieces[left] += pieces[right]
        pieces[right] = ""
        after[left] = after[right]
        if after[right] < len(pieces):
            before[after[right]] = left
        offer(before[left], left)
        offer(left, after[left])
    return [piece for piece in pieces if piece]


def _byte_of(token: str) -> int | None:
    return int(token[3:5], 16) if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token) else None


@lru_cache(maxsize=1)
def _character_bytes() -> dict[str, int]:
    """Which byte a character stands for in byte-level BPE: printable Latin-1 for itself, the others for the
    characters from U+0100 on, in order (GPT-2, encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _brief(value: Any) -> str:
    return " ".join(repr(value).split())[:60]  # an array's repr has many lines


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) <= {str}  # 5 times as fast as all(isinstance(...))


def _check_tokens(tokens: Any) -> list[str]:
    if not _is_strings(tokens) or not tokens:
        found = "missing" if tokens is None else "not a list of strings" if not _is_strings(tokens) else "empty"
        raise FormatError(f"tokenizer.ggml.tokens is {found}, so that the file has no vocabulary; use a file that "
                          "was converted with its tokenizer")
    try:
        "".join(tokens).encode()
    except UnicodeEncodeError:
        raise FormatError("tokenizer.ggml.tokens holds text that is not valid UTF-8; the file is damaged") from None
    return tokens


def _check_types(types: Any, count: int) -> np.ndarray:
    if types is None:
        return np.full(count, NORMAL, np.uint8)
    values = _check_numbers(types, count, "token_type", "iu")
    return np.where((values >= NORMAL) & (values <= BYTE), values, NORMAL).astype(np.uint8)


def _check_numbers(value: Any, count: int, name: str, kinds: str) -> np.ndarray:
    array = value if isinstance(value, np.ndarray) else np.empty(0)
    if array.shape != (count,) or array.dtype.kind not in kinds:
        found = f"shape {array.shape} and dtype {array.dtype}" if array is value else f"a {type(value).__name__}"
        raise FormatError(f"tokenizer.ggml.{name} must be an array with a number for each of the {count} tokens, "
                          f"but is {found}; convert the model again")
    return array


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"text to encode must be a str, but is a {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text holds the lone surrogate U+{ord(text[error.start]):04X} at position "
                         f"{error.start}, which is no character; the input is not valid UTF-8") from None

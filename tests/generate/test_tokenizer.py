"""The tokenizer against `tokenizers`, `transformers`, a plain SentencePiece reference and hand-made splits."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from nitinol.formats.gguf import FormatError
from nitinol.generate.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Tokenizer

ROOT = Path(__file__).parents[2]
CORPUS = [path.read_text() for path in [ROOT / "LICENSE", *sorted((ROOT / "nitinol/generate").glob("*.py"))]]
CORPUS += ["Straße, naïve café; 你好，世界！ 12345 67 890 👍🏽 we'll DON'T I'M\r\n\r\n\tx  =  y   \n"] * 3

# Text in which the kinds of characters that the expressions tell apart are close together.
TEXT = st.text(st.one_of(st.sampled_from("aeZs'd tTlL019½\n\r\t  _.,!<|>{}é你́👍🏽\u3000\u2028\x00"),
                         st.characters(exclude_categories=["Cs"])), max_size=40)


def gguf(kind: str, texts: list[str], types: list[int] | None = None, **fields: object) -> dict[str, object]:
    types = [NORMAL] * len(texts) if types is None else types
    fields = {"model": kind, "tokens": texts, "token_type": np.array(types, np.int32), **fields}
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


# Byte-level BPE

SPECIAL = ["<|begin_of_text|>", "<|eot_id|>", "<|user|>", "<|user|>s"]


def train(pre: pre_tokenizers.PreTokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    library = Library(models.BPE())
    library.pre_tokenizer = pre
    library.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=900, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    model = json.loads(library.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


@pytest.fixture(scope="module")
def trained() -> tuple[dict[str, int], list[tuple[str, str]]]:
    return train(pre_tokenizers.ByteLevel(add_prefix_space=False))


def bpe(trained: tuple[dict[str, int], list[tuple[str, str]]], pre: str = "gpt-2", **fields: object) -> Tokenizer:
    tokens = sorted(trained[0], key=trained[0].__getitem__)
    types = [NORMAL] * len(tokens) + [CONTROL, CONTROL, CONTROL, USER_DEFINED]
    first = len(tokens)
    return Tokenizer.from_gguf(gguf(
        "gpt2", tokens + SPECIAL, types, pre=pre, merges=[" ".join(merge) for merge in trained[1]],
        **{"bos_token_id": first, "eos_token_id": first + 1, **fields}))


@pytest.fixture(scope="module")
def ours(trained) -> dict[str, Tokenizer]:
    return {pre: bpe(trained, pre) for pre in ("gpt-2", "llama-bpe", "qwen2", "default", "smollm", "tekken")}


@given(TEXT)
@settings(deadline=None, max_examples=150)
def test_byte_level_is_lossless(ours, text):
    for tokenizer in ours.values():
        ids = tokenizer.encode(text, add_special=False)
        assert tokenizer.decode(ids, skip_special=False) == text
        assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text


@given(TEXT)
@settings(deadline=None, max_examples=150)
def test_same_ids_as_transformers(ours, references, text):
    # transformers brings its own expressions for GPT-2 and Qwen 2. Its Qwen tokenizer normalises to NFC first,
    # which GGUF does not record and llama.cpp does not do.
    text = unicodedata.normalize("NFC", text)
    for pre, reference in references.items():
        assert ours[pre].encode(text, add_special=False) == reference.encode(text, add_special_tokens=False), pre


@pytest.fixture(scope="module")
def references(trained) -> dict[str, object]:
    vocabulary, merges = trained
    return {"gpt-2": transformers.GPT2Tokenizer(vocab=vocabulary, merges=merges),
            "qwen2": transformers.Qwen2Tokenizer(vocab=vocabulary, merges=merges)}


@pytest.fixture(scope="module")
def llama3_library(trained) -> Library:
    # As llama.cpp spells the expression, without (?i:), to be independent of the spelling under test.
    expression = (r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    library = Library(models.BPE(vocab=trained[0], merges=trained[1], ignore_merges=True))
    library.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(expression), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return library


@given(TEXT)
@settings(deadline=None, max_examples=150)
def test_same_ids_as_the_library(ours, llama3_library, text):
    text = text.replace("\u017f", "s")  # the long s, which (?i:'s) matches too, is the known difference
    assert ours["llama-bpe"].encode(text, add_special=False) == llama3_library.encode(text).ids


def words(pre: str, text: str) -> list[str]:
    """How `pre` splits text: with a vocabulary of all substrings and all merges, each word is one token."""
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]
    parts = {spelling[i:j] for i in range(len(spelling)) for j in range(i + 1, len(spelling) + 1)}
    tokens = sorted(parts | set(pre_tokenizers.ByteLevel.alphabet()), key=lambda part: (len(part), part))
    merges = [f"{part[:k]} {part[k:]}" for part in tokens for k in range(1, len(part))]
    tokenizer = Tokenizer.from_gguf(gguf("gpt2", tokens, pre=pre, merges=merges))
    return [tokenizer.token_bytes(i).decode() for i in tokenizer.encode(text, add_special=False)]


@pytest.mark.parametrize("pre, text, expected", [
    ("llama-bpe", "It's 12345 items", ["It", "'s", " ", "123", "45", " items"]),
    ("qwen2", "It's 12345 items", ["It", "'s", " ", "1", "2", "3", "4", "5", " items"]),
    ("gpt-2", "It's 12345 items", ["It", "'s", " 12345", " items"]),
    ("llama3", "I'LL we'Re DON'T", ["I", "'LL", " we", "'Re", " DON", "'T"]),
    ("deepseek-r1-qwen", "I'LL we'Re DON'T", ["I", "'LL", " we", "'Re", " DON", "'T"]),
    ("gpt-2", "I'LL we're", ["I", "'", "LL", " we", "'re"]),
    ("llama-bpe", "a\n\n  b\n", ["a", "\n\n", " ", " b", "\n"]),
    ("qwen2", "a\n\n  b\n", ["a", "\n\n", " ", " b", "\n"]),
    ("gpt-2", "a\n\n  b\n", ["a", "\n\n ", " b", "\n"]),
    ("llama-bpe", "end.\r\n\nNew", ["end", ".\r\n\n", "New"]),
    ("gpt-2", "end.\n\nNew", ["end", ".", "\n", "\n", "New"]),
    ("qwen2", "你好，world！👍🏽", ["你好", "，world", "！👍🏽"]),
    ("llama-bpe", "你好，world！👍🏽", ["你好", "，world", "！👍🏽"]),
    ("gpt-2", "你好，world！👍🏽", ["你好", "，", "world", "！👍🏽"]),
    ("qwen2", "x  y   ", ["x", " ", " y", "   "]),
    ("llama-bpe", "x  y   ", ["x", " ", " y", "   "]),
    ("llama-bpe", "\tif(x) ½²³4", ["\tif", "(x", ")", " ", "½²³", "4"]),
    ("gpt-2", "\tif(x)", ["\t", "if", "(", "x", ")"]),
    ("default", "Hello, 12345 $x+1", ["Hello", ",", " ", "123", "45", " ", "$", "x", "+", "1"]),
    ("smollm", "a 123 b", ["a", " ", "1", "2", "3", " b"]),
    ("tekken", "HelloGPUs 42/\n", ["Hello", "GPUs", " ", "4", "2", "/\n"]),
])
def test_splits(pre, text, expected):
    assert words(pre, text) == expected


def test_whole_word_without_merge():
    # "abc" is a token to which no merge leads: Llama 3 takes it, Qwen merges as far as it can.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    llama, qwen = (Tokenizer.from_gguf(gguf("gpt2", [*alphabet, "ab", "abc"], pre=pre, merges=["a b"]))
                   for pre in ("llama-bpe", "qwen2"))
    assert llama.encode("abc") == [257]
    assert qwen.encode("abc") == [256, alphabet.index("c")]


def test_special_tokens(trained):
    tokenizer = bpe(trained, "llama-bpe", eot_token_id=np.uint32(len(trained[0]) + 2))
    bos, eot, user, users = range(len(trained[0]), len(trained[0]) + 4)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eot_id, tokenizer.pad_id) == (bos, eot, user, None)
    assert tokenizer.stop_ids == {eot, user}
    assert tokenizer.vocab_size == users + 1

    text = "<|user|>Hi<|eot_id|>"
    plain = tokenizer.encode(text)
    assert plain[0] == bos and not {bos, eot, user} & set(plain[1:])
    assert tokenizer.decode(plain) == text
    parsed = tokenizer.encode(text, add_special=False, parse_special=True)
    assert parsed == [user, *tokenizer.encode("Hi", add_special=False), eot]
    assert tokenizer.decode(parsed) == "Hi"
    assert tokenizer.decode(parsed, skip_special=False) == text
    assert tokenizer.token_bytes(eot) == b"" and tokenizer.token_bytes(eot, False) == b"<|eot_id|>"
    # User-defined tokens are always recognised, and the longer of two wins.
    for parse in (False, True):
        assert tokenizer.encode("a<|user|>s", parse_special=parse)[-1] == users
    assert tokenizer.token_bytes(users) == b"<|user|>s"
    assert tokenizer.encode("") == [bos] and tokenizer.encode("", add_special=False) == []


def test_control_token_that_is_a_plain_word():
    # With whole words taken first, "STOP" would become the control token if it were in the vocabulary.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer.from_gguf(gguf("gpt2", [*alphabet, "STOP"], [NORMAL] * 256 + [CONTROL], pre="llama-bpe",
                                         merges=[], eos_token_id=256))
    assert tokenizer.encode("STOP") == [alphabet.index(letter) for letter in "STOP"]
    assert tokenizer.encode("STOP", parse_special=True) == [256]


def test_bos_and_eos(trained):
    bos, eos = len(trained[0]), len(trained[0]) + 1

    def ends(pre: str, **fields: object) -> tuple[bool, bool]:
        ids = bpe(trained, pre, **fields).encode("x")
        return ids[0] == bos, ids[-1] == eos

    assert ends("llama-bpe") == (True, False)
    assert ends("qwen2") == (False, False)
    assert ends("llama-bpe", add_bos_token=False) == (False, False)
    assert ends("qwen2", add_bos_token=True, add_eos_token=True) == (True, True)
    assert ends("llama-bpe", bos_token_id=None) == (False, False)


def test_types_may_be_missing():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer.from_gguf(gguf("gpt2", [*alphabet, "<|im_end|>", "<s>"], token_type=None, pre="qwen2",
                                         merges=[], bos_token_id=257))
    assert tokenizer.types.tolist() == [NORMAL] * 256 + [CONTROL] * 2
    assert tokenizer.stop_ids == {256}
    assert 256 not in tokenizer.encode("<|im_end|>")


def test_incomplete_alphabet_is_an_error_not_a_loss():
    tokenizer = Tokenizer.from_gguf(gguf("gpt2", ["a", "b", "ab"], pre="gpt-2", merges=["a b"]))
    assert tokenizer.encode("aba") == [2, 0]
    with pytest.raises(ValueError, match="0x63"):
        tokenizer.encode("abc")


def test_unknown_pre_warns_and_is_default(trained):
    with pytest.warns(UserWarning, match=r"tokenizer\.ggml\.pre is 'no-such-model'"):
        tokenizer = bpe(trained, "no-such-model")
    assert tokenizer.encode("Hello, 12345!") == bpe(trained, "default").encode("Hello, 12345!")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bpe(trained, "llama-bpe")


# SentencePiece

def spm_vocabulary(seed: int, equal_scores: bool) -> tuple[list[str], list[int], list[float]]:
    """Control tokens, bytes, most letters of a small alphabet, and random strings over it (so that many are
    reachable in several ways, and some not at all)."""
    rng = random.Random(seed)
    letters = "▁ab你é<s>"
    pieces = set(letters) - {rng.choice("ab"), "é"}
    while len(pieces) < 60:
        pieces.add("".join(rng.choice(letters) for _ in range(rng.choice([2, 2, 2, 3, 4]))))
    pieces.discard("<s>")
    normal = sorted(pieces)
    tokens = ["<unk>", "<s>", "</s>", *map("<0x{:02X}>".format, range(256)), *normal]
    scores = [0.0] * 259 + [float(rng.randrange(-4, 0)) if equal_scores else -rng.random() for _ in normal]
    return tokens, [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(normal), scores


def spm(tokens, types, scores, **fields: object) -> Tokenizer:
    return Tokenizer.from_gguf(gguf("llama", tokens, types, scores=np.array(scores, np.float32), **fields))


def greedy_reference(text: str, tokens: list[str], types: list[int], scores: list[float]) -> list[int]:
    """SentencePiece's rule, without a heap: look at all adjacent pairs, merge the best, begin again."""
    ids = {token: i for i, token in enumerate(tokens) if types[i] == NORMAL}
    pieces = list((" " + text).replace(" ", "▁"))
    while True:
        pairs = [(-np.float32(scores[ids[a + b]]), i) for i, (a, b) in enumerate(itertools.pairwise(pieces))
                 if a + b in ids]
        if not pairs:
            break
        i = min(pairs)[1]
        pieces[i:i + 2] = [pieces[i] + pieces[i + 1]]
    out = []
    for piece in pieces:
        out += [ids[piece]] if piece in ids else [tokens.index(f"<0x{byte:02X}>") for byte in piece.encode()]
    return out


@given(st.integers(0, 2**32), st.booleans(), st.text("  ab你é<s>x👍", min_size=1, max_size=40))
@settings(deadline=None, max_examples=400)
def test_sentencepiece_merges_by_score(seed, equal_scores, text):
    tokens, types, scores = spm_vocabulary(seed, equal_scores)
    tokenizer = spm(tokens, types, scores)
    ids = tokenizer.encode(text, add_special=False)
    assert ids == greedy_reference(text, tokens, types, scores)
    assert tokenizer.encode(text) == [1, *ids]  # BOS by default, no EOS
    assert tokenizer.decode([1, *ids, 2]) == text


def test_same_ids_as_transformers_sentencepiece():
    # LlamaTokenizer turns scores into ranks, so this holds only for different scores and a whole alphabet; and
    # unlike sentencepiece it gives no prefix to text that begins with a space.
    rng = random.Random(0)
    letters = ["▁", "a", "b", "c", "你"]
    pieces = list(letters)
    while len(pieces) < 80:  # only what a merge of two earlier pieces can give, as training does
        both = rng.choice(pieces) + rng.choice(pieces)
        if both not in pieces and len(both) < 7:
            pieces.append(both)
    tokens = ["<unk>", "<s>", "</s>", *map("<0x{:02X}>".format, range(256)), *pieces]
    merges = [(piece[:k], piece[k:]) for piece in pieces for k in range(1, len(piece))
              if piece[:k] in pieces and piece[k:] in pieces]
    reference = transformers.LlamaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    tokenizer = spm(tokens, [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces),
                    [0.0] * 259 + [-float(i) for i in range(len(pieces))])
    for _ in range(200):
        text = "".join(rng.choice("aabbc 你é👍\n") for _ in range(rng.randrange(1, 30))).lstrip(" ")
        assert tokenizer.encode(text, add_special=False) == reference.encode(text, add_special_tokens=False), text


SMALL = (["<unk>", "<s>", "</s>", *map("<0x{:02X}>".format, range(256)), "▁", "a", "b", "▁a", "<U>", "[PAD]"],
         [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * 4 + [USER_DEFINED, UNUSED], [0.0] * 261 + [-1.0] * 4)


def test_sentencepiece_special_tokens():
    tokenizer = spm(*SMALL)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.stop_ids) == (1, 2, 0, {2})
    space, a, b, space_a, user, pad = range(259, 265)
    assert tokenizer.encode("a b") == [1, space_a, space, b]
    assert 2 not in tokenizer.encode("a</s>")
    # A space prefix follows every special token, as in llama.cpp.
    assert tokenizer.encode("a</s>a", parse_special=True) == [1, space_a, 2, space_a]
    assert tokenizer.encode("<U>b", add_special=False) == [user, space, b]
    assert spm(*SMALL, add_space_prefix=False).encode("ab", add_special=False) == [a, b]
    assert spm(*SMALL, add_space_prefix=False).decode([space_a]) == " a"
    assert tokenizer.decode([1, space_a, user, pad]) == "a<U>"
    assert [tokenizer.token_bytes(i) for i in (1, 3 + 0xE4, space_a, user)] == [b"", b"\xe4", b" a", b"<U>"]
    assert tokenizer.decode([3 + 0xE4]) == "�"
    assert tokenizer.encode("") == [1]


def test_sentencepiece_without_types_or_bytes():
    tokenizer = spm(SMALL[0], None, SMALL[2], token_type=None)
    assert tokenizer.encode("é", add_special=False) == [259, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.token_bytes(3 + 0xC3) == b"\xc3"
    few = spm(["<unk>", "<s>", "</s>", "▁", "a"], [UNKNOWN, CONTROL, CONTROL, NORMAL, NORMAL], [0.0] * 5)
    assert few.encode("aéöa", add_special=False) == [3, 4, 0, 4]


def test_long_text():  # one word of 60 k characters: minutes, if merging were quadratic
    tokenizer = spm(*SMALL)
    assert len(tokenizer.encode("ab" * 30_000)) == 60_001


# Bad input

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def bpe_fields(**fields: object) -> dict[str, object]:
    return gguf("gpt2", [*ALPHABET, "ab"], **{"pre": "gpt-2", "merges": ["a b"], **fields})


@pytest.mark.parametrize("metadata, message", [
    ({}, "tokenizer.ggml.model is None"),
    (bpe_fields(model="bert"), "model is 'bert'"),
    (bpe_fields(model=["gpt2"]), r"model is \['gpt2'\]"),
    (bpe_fields(tokens=None), "tokens is missing"),
    (bpe_fields(tokens=[]), "tokens is empty"),
    (bpe_fields(tokens=np.arange(3)), "tokens is not a list of strings"),
    (bpe_fields(tokens=[*ALPHABET, "a"]), "holds 'a' at .* and again at 256"),
    (bpe_fields(tokens=[*ALPHABET, "\udcff"]), "not valid UTF-8"),
    (bpe_fields(token_type=np.ones(256, np.int32)), "for each of the 257 tokens, but is shape"),
    (bpe_fields(token_type=np.ones(257, np.float32)), "dtype float32"),
    (bpe_fields(merges=None), "merges is missing"),
    (bpe_fields(merges=[3]), "merges is not a list of strings"),
    (bpe_fields(merges=["a b", "a q"]), r"merges\[1\] is 'a q', but 'aq'"),
    (bpe_fields(merges=["ab"]), r"merges\[0\] is 'ab'"),
    (bpe_fields(merges=["a b c"]), r"merges\[0\] is 'a b c'"),
    (bpe_fields(bos_token_id=257), "bos_token_id is 257"),
    (bpe_fields(eos_token_id=-1), "eos_token_id is -1"),
    (bpe_fields(eos_token_id="ab"), "eos_token_id is 'ab'"),
    (bpe_fields(eot_token_id=2**32 - 1), "eot_token_id is 4294967295"),
    (bpe_fields(add_bos_token=True), "add_bos_token is true, but the file has no bos_token_id"),
    (bpe_fields(add_eos_token="yes"), "add_eos_token is 'yes'"),
    (gguf("llama", *SMALL[:2], add_space_prefix=np.ones(2)), "add_space_prefix is array"),
    (gguf("llama", *SMALL[:2]), "scores must be an array .* for each of the 265 tokens, but is a NoneType"),
    (gguf("llama", *SMALL[:2], scores=np.zeros(264)), r"shape \(264,\)"),
    (gguf("llama", *SMALL[:2], scores=np.full(265, np.nan)), "not numbers"),
    (gguf("llama", ["a", "<0xZZ>"], [NORMAL, BYTE], scores=np.zeros(2)), "token 1 is '<0xZZ>'"),
])
def test_bad_metadata(metadata, message):
    with pytest.raises(FormatError, match=message) as caught:
        Tokenizer.from_gguf(metadata)
    assert "\n" not in str(caught.value)


JUNK = st.sampled_from([None, 0, 3, -1, 2**70, 1.5, float("nan"), True, "", "x" * 9999, [], ["a"], ["a b", ""], [["a"]],
                        np.zeros(0), np.arange(265), np.full(265, 9), np.full(257, np.inf), np.ones(257, np.uint8),
                        np.zeros((2, 3)), [np.zeros(2), np.zeros(3)], np.array(["a"] * 265), b"x", {}])


@given(st.booleans(), st.data())
@settings(deadline=None, max_examples=300)
def test_junk_in_the_metadata(byte_level, data):
    metadata = bpe_fields() if byte_level else gguf("llama", *SMALL[:2], scores=np.zeros(265, np.float32))
    names = ["bos_token_id", "eot_token_id", "unknown_token_id", "add_bos_token", "add_space_prefix"]
    keys = sorted(metadata.keys() | {f"tokenizer.ggml.{name}" for name in names} | {"tokenizer.chat_template"})
    for key in data.draw(st.lists(st.sampled_from(keys), max_size=2)):
        metadata[key] = data.draw(JUNK)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tokenizer = Tokenizer.from_gguf(metadata)
        except FormatError as error:
            assert len(str(error)) < 300 and "\n" not in str(error)
            return
    assert tokenizer.decode(tokenizer.encode("ab", add_special=False)) == "ab"


def test_bad_text_and_ids(trained):
    for tokenizer in (bpe(trained), spm(*SMALL)):
        with pytest.raises(ValueError, match=r"lone surrogate U\+D83D at position 2"):
            tokenizer.encode("ab\ud83d")
        with pytest.raises(TypeError, match="must be a str, but is a bytes"):
            tokenizer.encode(b"ab")
        for bad in (-1, tokenizer.vocab_size):
            with pytest.raises(ValueError, match=f"token id {bad} is outside"):
                tokenizer.decode([bad])


@given(st.binary(max_size=12))
@settings(deadline=None)
def test_any_bytes_decode(ours, data):
    tokenizer = ours["gpt-2"]
    characters = {tokenizer.token_bytes(i): i for i in range(256)}
    ids = [characters[bytes([byte])] for byte in data]
    assert tokenizer.decode(ids) == data.decode("utf-8", errors="replace")


def test_library_is_imported_late():
    code = "import sys, nitinol.generate.tokenizer; print('tokenizers' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"

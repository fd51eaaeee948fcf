"""Generation: how tokens are chosen, when it stops, what the cache keeps, and what a step costs the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_files import random_file

from nitinol.generate.model import Model, load
from nitinol.generate.options import Options

SMALL = {"ffn": 256, "heads": 2, "kv_heads": 1, "tied": False}  # tied, a random model repeats its last token


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = random_file(tmp_path_factory.mktemp("models") / "m.gguf", "F32", chat=True, **SMALL)
    return load(path, threads=2, cache_dtype="fp32")


def tokens(model: Model, prompt: Any = "once upon", **options: Any) -> list[int]:
    generation = model.generate(prompt, **options)
    list(generation)
    return generation.tokens


# ------------------------------------------------------------------------------------------------ choosing


def test_greedy_takes_the_highest_logit(model: Model) -> None:
    ids = model.encode("once upon")
    found = tokens(model, max_tokens=8)
    assert len(found) == 8  # a prompt at which this model goes on for a while
    assert found == model.logits(ids + found)[len(ids) - 1:-1].argmax(axis=1).tolist()


def test_equal_seeds_give_equal_tokens_and_others_do_not(model: Model) -> None:
    runs = [tokens(model, max_tokens=20, temperature=5.0, seed=seed) for seed in (7, 7, 8)]
    assert runs[0] == runs[1] != runs[2]
    assert tokens(model, max_tokens=20, temperature=5.0) != tokens(model, max_tokens=20, temperature=5.0)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_narrowest_choice_is_greedy(model: Model, options: dict[str, Any]) -> None:
    assert tokens(model, max_tokens=8, temperature=1.0, **options) == tokens(model, max_tokens=8)


def test_top_k_and_top_p_and_min_p_bound_the_choice(model: Model) -> None:
    ids = model.encode("once upon")
    logits = model.logits(ids)[-1].astype(np.float64)
    order = np.argsort(-logits)
    weights = np.exp((logits - logits.max()) / 3.0)
    nucleus = order[:1 + int(np.searchsorted(np.cumsum(weights[order]) / weights.sum(), 0.3))]
    allowed = {"top_k": set(order[:5]), "top_p": set(nucleus), "min_p": set(np.flatnonzero(weights >= 0.4))}
    for (name, value), expected in zip((("top_k", 5), ("top_p", 0.3), ("min_p", 0.4)), allowed.values()):
        drawn = {tokens(model, max_tokens=1, temperature=3.0, seed=seed, **{name: value})[0] for seed in range(40)
                 if tokens(model, max_tokens=1, temperature=3.0, seed=seed, **{name: value})}
        assert drawn <= expected and len(drawn) > 1, name


def test_repetition_penalty_counts_prompt_and_answer(model: Model) -> None:
    prompt = model.encode("once upon") * 3
    plain = tokens(model, prompt, max_tokens=30)
    penalised = tokens(model, prompt, max_tokens=30, repeat_penalty=50.0)
    seen = list(prompt)
    logits = model.logits(prompt + penalised)
    for place, token in enumerate(penalised):  # what it chose is the highest after the penalty
        row = logits[len(prompt) - 1 + place].copy()
        recent = sorted(set(seen[-64:]))
        row[recent] = np.where(row[recent] > 0, row[recent] / 50, row[recent] * 50)
        assert token == row.argmax()
        seen.append(token)
    assert penalised != plain


# ------------------------------------------------------------------------------------------------ stopping


def test_reasons_to_stop(model: Model) -> None:
    generation = model.generate("once upon", max_tokens=3)
    assert generation.stop_reason is None
    text = "".join(generation)
    assert generation.stop_reason == "length" and len(generation.tokens) == 3
    whole = model.tokenizer.decode(tokens(model, max_tokens=12))
    assert text == model.tokenizer.decode(generation.tokens)
    stop = whole[5:7]
    generation = model.generate("once upon", max_tokens=12, stop=[stop, "never seen"])
    assert "".join(generation) == whole[:whole.index(stop)] and generation.stop_reason == "stop"


def test_end_of_turn_is_not_part_of_the_text(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tokens(model, max_tokens=6)
    last = next(i for i, token in enumerate(found) if i and token not in found[:i])
    monkeypatch.setattr(model.tokenizer, "stop_ids", frozenset([found[last]]))
    generation = model.generate("once upon", max_tokens=6)
    list(generation)
    assert generation.stop_reason == "end_of_turn" and generation.tokens == found[:last]


def test_context_ends_generation(tmp_path: Path) -> None:
    model = load(random_file(tmp_path / "m.gguf", "F32", **SMALL), context=12, threads=1)
    model.tokenizer.stop_ids = frozenset()
    generation = model.generate(list(range(5)))
    list(generation)
    assert generation.stop_reason == "context" and len(generation.tokens) == 12 - 5
    assert len(model.session.cache.tokens) <= 12
    for prompt in (list(range(12)), list(range(13))):
        with pytest.raises(ValueError, match=r"the context has 12.*up to 256"):
            model.generate(prompt)
    generation = model.generate(list(range(11)))
    list(generation)
    assert len(generation.tokens) == 1


def test_streamed_text_is_whole_characters(model: Model) -> None:
    pieces = list(model.generate("once upon", max_tokens=60, temperature=8.0, seed=3))
    generation = model.generate("once upon", max_tokens=60, temperature=8.0, seed=3)
    assert "".join(pieces) == "".join(generation) == model.tokenizer.decode(generation.tokens)
    assert all(pieces)


# ---------------------------------------------------------------------------------------------- cache and chat


def test_chat_reads_only_what_is_new(model: Model) -> None:
    messages = [{"role": "user", "content": "tell me a story"}]
    first = model.chat(messages, max_tokens=6)
    answer = "".join(first)
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "more"}]
    second = model.chat(messages, max_tokens=6)
    list(second)
    # At least the first prompt is there already; the answer's text may cut into other tokens than were generated.
    assert second.prefilled_tokens <= second.prompt_tokens - first.prompt_tokens
    model.session.begin(None)
    model.session.cache.move(0)
    fresh = model.chat(messages, max_tokens=6)
    list(fresh)
    assert fresh.prefilled_tokens == fresh.prompt_tokens and fresh.tokens == second.tokens


def test_same_prompt_again_reads_one_token(model: Model) -> None:
    first = model.generate("hello there", max_tokens=4)
    list(first)
    again = model.generate("hello there", max_tokens=4)
    list(again)
    assert again.prefilled_tokens == 1 and again.tokens == first.tokens


def test_interleaved_generations_are_refused(model: Model) -> None:
    one = model.generate("hello", max_tokens=10, temperature=9.0, seed=1)
    next(one)
    next(model.generate("other", max_tokens=10, temperature=9.0, seed=1))
    with pytest.raises(RuntimeError, match="another generation"):
        list(one)


def test_abandoned_generation_does_not_spoil_the_next(model: Model) -> None:
    expected = tokens(model, "hello there", max_tokens=6)
    abandoned = model.generate("something else", max_tokens=20, temperature=9.0, seed=2)
    next(abandoned)
    del abandoned
    assert tokens(model, "hello there", max_tokens=6) == expected


def test_fp16_cache_is_close(tmp_path: Path) -> None:
    """Keys and values rounded to 11 bits: logits within 1% of their deviation (seen: 0.1%)."""
    path = random_file(tmp_path / "m.gguf", "F32", **SMALL)
    wide, narrow = (load(path, cache_dtype=dtype, threads=1).logits(list(range(40))) for dtype in ("fp32", "fp16"))
    assert 0 < np.abs(wide - narrow).max() < 0.01 * wide.std()


# -------------------------------------------------------------------------------------------------- the host's part


def test_a_step_is_one_submission_without_allocations(model: Model) -> None:
    tokens(model, max_tokens=4)  # the command list of a step is made at the first one
    counters = model.device.counters
    generation = model.generate(list(range(3, 20)), max_tokens=40, temperature=0.8, top_k=40, top_p=0.9, seed=5,
                                repeat_penalty=1.1)
    model.tokenizer.stop_ids, kept = frozenset(), model.tokenizer.stop_ids
    pieces = iter(generation)
    next(pieces)
    before = (counters.submits, counters.waits, len(generation.tokens))
    allocations = (counters.allocations, counters.pool_hits)
    list(pieces)
    model.tokenizer.stop_ids = kept
    steps = len(generation.tokens) - before[2]
    assert steps > 20
    assert (counters.submits - before[0], counters.waits - before[1]) == (steps, steps)
    assert (counters.allocations, counters.pool_hits) == allocations


def test_options_are_checked() -> None:
    for wrong in ({"max_tokens": 0}, {"temperature": -1}, {"temperature": float("inf")}, {"top_k": 1.5}, {"top_p": 0},
                  {"top_p": 1.1}, {"min_p": -0.1}, {"repeat_penalty": 0}, {"seed": -1}, {"stop": [""]}, {"stop": [3]}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Options(**wrong)
    assert Options(stop="end").stop == ("end",) and Options(seed=3).seed == 3


def test_load_checks_its_arguments() -> None:
    for wrong, words in (({"context": 0}, "context"), ({"context": 2000}, "1024"), ({"cache_dtype": "int8"}, "fp16"),
                         ({"device": "abacus"}, "abacus"), ({"threads": 0}, "threads")):
        with pytest.raises((ValueError, RuntimeError), match=words):
            load("demo", **wrong)


def test_demo_completes_a_definition() -> None:
    """The bundled model writes Python: a docstring or a body, indented."""
    text = "".join(load("demo", threads=2).generate("def fibonacci(n):\n", max_tokens=24))
    assert text.startswith("    ")

"""Every architecture against transformers, and quantised models against their dequantised weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_files import (
    LINEAR_ROPE,
    LLAMA3_ROPE,
    dequantized_copy,
    mixed_file,
    random_file,
    random_model,
    transformers_model,
    write_transformers_model,
)

from nitinol.formats.blocks import FORMATS
from nitinol.formats.gguf import FormatError, open_gguf
from nitinol.formats.gguf_writer import TensorSource, write_gguf
from nitinol.formats.quantization import dequantize
from nitinol.generate.model import Model, load
from nitinol.models import ARCHITECTURES, open_model
from nitinol.models.base import PREFILL_CHUNK
from nitinol.models.memory import check_memory, memory_needed, parameters

SEED = np.random.SeedSequence().entropy  # fresh inputs at every run; a failure prints it
CASES = [
    ("llama", {"tied": True}),
    ("llama", {"rope": LLAMA3_ROPE}),
    ("llama", {"rope": LINEAR_ROPE, "num_attention_heads": 6, "num_key_value_heads": 1, "hidden_size": 72,
               "intermediate_size": 50, "vocab_size": 301}),
    ("llama", {"num_key_value_heads": 4, "head_dim": 24}),
    ("qwen2", {"tied": True}),
    ("qwen2", {"num_key_value_heads": 1}),
    ("qwen3", {"tied": True}),
    ("qwen3", {"head_dim": 16, "num_key_value_heads": 4}),
    ("mistral", {"sliding_window": 11}),
    ("gemma3", {"tied": True}),
    ("gemma3", {"tied": True, "rope": LINEAR_ROPE, "sliding_window": 64, "head_dim": 64, "num_key_value_heads": 1}),
]


def load_f32(path: Path, **options: Any) -> Model:
    return load(path, threads=2, cache_dtype="fp32", **options)


@pytest.mark.parametrize("arch, sizes", CASES)
def test_transformers_agrees(arch: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    """Everything is float32 on both sides, so they differ by rounding alone: sums of up to 100 products of order 1
    in another order, through two layers. 1e-4 on logits of order 5 is some 20 times what is seen (5e-6); a wrong
    rotation, scale or norm changes them by 0.1 and more."""
    import torch

    rng = np.random.default_rng(SEED)
    theirs = transformers_model(arch, int(rng.integers(1 << 31)), **sizes)
    write_transformers_model(tmp_path / "model.gguf", theirs, arch)
    ours = load_f32(tmp_path / "model.gguf")
    ids = rng.integers(0, theirs.config.vocab_size, 90).tolist()  # longer than any window, and than a block of keys
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
        found = ours.logits(ids)
        assert found.shape == expected.shape and found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0, err_msg=f"seed {SEED}")
        mine = greedy(ours, ids, 16)
        text = theirs(torch.tensor([ids + mine[:-1]])).logits[0, len(ids) - 1:].argmax(-1).tolist()
    assert mine == text, f"seed {SEED}"


def greedy(model: Model, ids: list[int], count: int) -> list[int]:
    """The first tokens after a prompt, also past those that end a turn."""
    from nitinol.generate.options import Options

    model.session.begin(None)
    model.session.prefill(ids, Options())
    tokens = [model.session.next_token]
    while len(tokens) < count:
        model.session.step()
        tokens.append(model.session.next_token)
    return tokens


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "F32", 0, 6])
def test_quantised_model_against_its_dequantised_weights(kind: str | int, tmp_path: Path) -> None:
    """The float32 path with the very same weights; a number is a model with all formats in turn from there on.

    The quantised path rounds activations to 8 bits, 1/254 of the largest of 32 at most, in every product of two
    layers: measured errors are 1.1% of the logits' deviation (root mean square), where a wrong scale, minimum or nibble
    gives 10% and more. F32 keeps activations as they are."""
    rng = np.random.default_rng(SEED)
    seed = int(rng.integers(1 << 31))
    if isinstance(kind, int):
        source = mixed_file(tmp_path / "q.gguf", kind, seed)
    else:
        source = random_file(tmp_path / "q.gguf", kind, seed=seed, ffn=768)
    ids = rng.integers(0, 512, 21).tolist()
    expected = load_f32(dequantized_copy(source, tmp_path / "f.gguf")).logits(ids)
    model = load_f32(source)
    tolerance = (1e-5 if kind == "F32" else 0.02) * expected.std()
    found = model.logits(ids)
    assert np.sqrt(np.mean((found - expected) ** 2)) < tolerance, f"seed {SEED}"
    for position in (0, 1, 20):  # one token at a time: the decode kernels
        error = step_logits(model, ids, position) - expected[position]
        assert np.sqrt(np.mean(error**2)) < 1.5 * tolerance, f"seed {SEED}, position {position}"


def step_logits(model: Model, ids: list[int], position: int) -> np.ndarray:
    """The logits of one token whose predecessors are in the cache."""
    model.session.cache.tokens[:] = ids[:position]
    return model.session.read(ids[position:position + 1])[0]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tokens_one_by_one_or_together(arch: str, tmp_path: Path) -> None:
    """Both ways compute the same sums in another order: see above for the tolerance; fp16 keys and values are rounded
    alike on both ways, but where the value before rounding differs in its last bit the rounded one may by 1/2048."""
    rng = np.random.default_rng(SEED)
    window = {f"{arch}.attention.sliding_window": 30} if arch in ("llama", "gemma3") else {}
    source = random_file(tmp_path / "m.gguf", "F32", arch, seed=int(rng.integers(1 << 31)), change=window)
    ids = rng.integers(0, 512, 70).tolist()
    for cache, tolerance in (("fp32", 1e-4), ("fp16", 1e-2)):
        model = load(source, threads=2, cache_dtype=cache)
        together = model.logits(ids)
        for position in (1, 2, 40, 69):
            one = step_logits(model, ids, position)
            assert np.abs(one - together[position]).max() < tolerance * together.std(), f"seed {SEED}, {position}"


def test_threads_do_not_change_a_bit(tmp_path: Path) -> None:
    source = random_file(tmp_path / "m.gguf", "Q4_K")
    ids = list(range(20))
    one, three = (load(source, threads=threads).logits(ids) for threads in (1, 3))
    np.testing.assert_array_equal(one, three)


def test_long_prompts_go_through_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(SEED)
    source = random_file(tmp_path / "m.gguf", "F32")
    ids = rng.integers(0, 512, 50).tolist()
    whole = load_f32(source).logits(ids)
    monkeypatch.setitem(PREFILL_CHUNK, "cpu", 16)
    model = load_f32(source)
    np.testing.assert_allclose(model.logits(ids), whole, atol=1e-4 * whole.std(), rtol=0)
    assert greedy(model, ids, 3)[0] == int(whole[-1].argmax())
    assert model.session.cache.tokens[:50] == ids


def test_weights_stay_in_the_file() -> None:
    """Nothing is copied: the device allocates no more than the cache, activations and small state."""
    model = load("demo", context=256, threads=1)
    model.logits([1, 2, 3])
    weights = sum(tensor.nbytes for tensor in model.file.tensors.values())
    assert weights > 15_000_000 and model.device.counters.bytes_in_use < 6_000_000


def test_split_file_gives_the_same_logits(tmp_path: Path) -> None:
    source = random_file(tmp_path / "whole.gguf", "Q8_0")
    with open_gguf(source) as file:
        tensors = [TensorSource(t.name, t.shape, t.format, t.data) for t in file.tensors.values()]
        for part in range(2):
            mine = tensors[part::2]
            keys = {"split.no": np.uint16(part), "split.count": np.uint16(2),
                    "split.tensors.count": np.int32(len(tensors))}
            write_gguf(tmp_path / f"m-{part + 1:05}-of-00002.gguf", (file.metadata if part == 0 else {}) | keys, mine)
    ids = [5, 17, 300]
    np.testing.assert_array_equal(load(tmp_path / "m-00001-of-00002.gguf").logits(ids), load(source).logits(ids))
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(FormatError, match="part 2 of 2"):
        load(tmp_path / "m-00001-of-00002.gguf")


# ---------------------------------------------------------------------------------------------- before the weights


@pytest.mark.parametrize("name, change, words", [
    ("blk.1.ffn_up.weight", None, "is missing"),
    ("output_norm.weight", None, "is missing"),
    ("blk.0.attn_q.weight", ((128, 256), "F32"), r"has shape \(128, 256\)"),
    ("blk.0.attn_norm.weight", ((256,), "Q8_0"), "vector"),
    ("blk.0.attn_q.bias", ((256,), "F32"), "does not belong"),
    ("blk.2.attn_q.weight", ((256, 256), "F32"), "does not belong"),
    ("rope_freqs.weight", ((32,), "F32"), "not above 0"),
])
def test_tensors_that_do_not_fit(name: str, change: Any, words: str, tmp_path: Path) -> None:
    shape = random_model.PRESETS["tiny"]._replace(vocab=512)
    tensors = {t.name: t for t in random_model.tensors(shape, "Q8_0", 0)}
    tensors.pop(name, None)
    if change is not None:
        layout = FORMATS[change[1]]
        nbytes = int(np.prod(change[0])) // layout.values * layout.bytes
        tensors[name] = TensorSource(name, *change, np.zeros(nbytes, np.uint8))
    write_gguf(tmp_path / "m.gguf", random_model.metadata(shape, "Q8_0", "m"), list(tensors.values()))
    with pytest.raises(FormatError, match=words) as caught:
        load(tmp_path / "m.gguf")
    assert "m.gguf" in str(caught.value) and name in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*nothing here knows", "ignore:.*is not known here")
def test_damaged_files_are_refused_or_run(tmp_path: Path) -> None:
    """Bytes of the header changed at random: what is not refused in a sentence must compute without a crash."""
    rng = np.random.default_rng(SEED)
    path = random_file(tmp_path / "m.gguf", "Q8_0", ffn=256, heads=2, kv_heads=1)
    whole = path.read_bytes()
    interesting = [whole.index(key) for key in (b"llama.", b"general.", b"tokenizer.ggml.b", b"token_embd", b"blk.0")]
    ran = refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for place in rng.choice(interesting, 1 + rng.integers(2)) + rng.integers(0, 600):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            model = load(path, threads=1)
            model.tokenizer.encode("hello")
            ran += 1
            if ran % 20 == 1:  # most of what is left differs in a name or a number that does not matter
                assert model.logits([1, 2]).shape == (2, model.config.vocab)
        except (ValueError, MemoryError) as error:
            assert "\n" not in str(error) and str(error), f"seed {SEED}"
            refused += 1
    assert ran and refused, f"seed {SEED}"


@pytest.mark.parametrize("arch, context", [("llama", 256), ("gemma3", 256), ("qwen2", 100), ("qwen3", 100)])
def test_a_sliding_window_limits_the_context_only_where_its_layers_are_not_known(
        arch: str, context: int, tmp_path: Path) -> None:
    source = random_file(tmp_path / "m.gguf", arch=arch, change={f"{arch}.attention.sliding_window": 100})
    assert load(source).context == context


def test_memory_is_refused_with_what_would_fit(tmp_path: Path) -> None:
    file, config = open_model("demo")
    weights = sum(tensor.nbytes for tensor in file.tensors.values())
    assert parameters(config) == sum(int(np.prod(t.shape)) for t in file.tensors.values() if len(t.shape) == 2)
    need = memory_needed(config, weights, 1024)
    assert check_memory(config, weights, 1024, "fp16", need.total) == need
    with pytest.raises(MemoryError, match=r"a context of \d+ tokens would fit") as caught:
        check_memory(config, weights, 1024, "fp16", need.total - 1_000_000)
    fits = int(str(caught.value).split("a context of ")[-1].split()[0])
    check_memory(config, weights, fits, "fp16", need.total - 1_000_000)
    for context in (fits + 64, 1024):  # the most that fits, whatever a prompt's chunk takes
        with pytest.raises(MemoryError, match=f"a context of {fits} tokens"):
            check_memory(config, weights, context, "fp16", need.total - 1_000_000)
    with pytest.raises(MemoryError, match="bits a weight"):
        check_memory(config, weights, 1024, "fp16", weights // 2 + need.activations)
    with pytest.raises(MemoryError, match="smaller model"):
        check_memory(config, weights, 1024, "fp16", weights // 20)
    assert memory_needed(config, weights, 1024, "fp32").cache == 2 * need.cache


def test_activation_estimate_is_near_what_is_allocated() -> None:
    model = load("demo", context=600, threads=1)
    before = model.device.counters.bytes_in_use
    cache_bytes = memory_needed(model.config, 0, 600).cache
    model.logits(list(range(512)))
    estimate = memory_needed(model.config, 0, 600)
    logits = 512 * model.config.vocab * 4  # `logits` keeps all rows, a generation only the last
    used = model.device.counters.bytes_reserved - before - cache_bytes - logits
    assert used < 3 * estimate.activations + 8_000_000


def test_dequantised_copy_is_what_it_says(tmp_path: Path) -> None:
    source = random_file(tmp_path / "q.gguf", "Q6_K")
    with open_gguf(source) as a, open_gguf(dequantized_copy(source, tmp_path / "f.gguf")) as b:
        name = "blk.1.ffn_down.weight"
        values = b.tensors[name].data.view(np.float32).reshape(b.tensors[name].shape)
        np.testing.assert_array_equal(values, dequantize(a.tensors[name].data, "Q6_K", a.tensors[name].shape))


def test_logits_check_their_input() -> None:
    model = load("demo", context=8, threads=1)
    for ids, words in (([], "no tokens"), ([-1], "outside"), ([model.config.vocab], "outside"), (range(9), "fit")):
        with pytest.raises(ValueError, match=words):
            model.logits(list(ids))
    assert model.logits([0]).shape == (1, model.config.vocab)

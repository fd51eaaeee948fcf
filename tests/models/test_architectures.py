"""What architectures share: metadata is used or named, tensors keep their formats, and a network has no state."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_files import LINEAR_ROPE, random_file, transformers_model, write_transformers_model

from nitinol import Array, array, compile, empty
from nitinol.cli import main
from nitinol.formats.blocks import FORMATS
from nitinol.formats.gguf import FormatError, open_gguf
from nitinol.formats.gguf_writer import TensorSource, write_gguf
from nitinol.generate.model import Model, load
from nitinol.generate.profile import profile
from nitinol.models import ARCHITECTURES, open_model
from nitinol.models.memory import cache_bytes_per_token, cache_bytes_read
from nitinol.models.weights import wrap_weights
from nitinol.ops.sampling import SamplingState, sample
from nitinol.runtime import get_device

Change = dict[str, Any]
FileOf = Callable[..., Path]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


@pytest.fixture
def file_of(tmp_path: Path) -> FileOf:
    """A small random model with metadata changed under the architecture's prefix."""
    def make(arch: str = "llama", **change: Any) -> Path:
        keys = {f"{arch}.{key}": value for key, value in change.items()}
        return random_file(tmp_path / "m.gguf", "F32", arch, ffn=64, heads=2, kv_heads=1, change=keys)

    return make


# ---------------------------------------------------------------------------------------------------------- metadata


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_metadata_of_a_good_file_is_used(arch: str, file_of: FileOf) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_model(file_of(arch))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_nobody_reads_is_named(arch: str, file_of: FileOf) -> None:
    with pytest.warns(UserWarning, match=f"'{arch}.attention.spin'.*'{arch}.rope.scaling.yarn_beta_fast'"):
        open_model(file_of(arch, **{"attention.spin": 0.5, "rope.scaling.yarn_beta_fast": 32.0}))
    many = {f"new.{number:02}": np.arange(3) for number in range(40)}
    with pytest.warns(UserWarning, match=r"new\.04', \.\.\.") as caught:
        open_model(file_of(arch, **many))
    assert "new.05" not in str(caught[0].message)


@pytest.mark.parametrize("change, words", [
    ({"rope.scaling.attn_factor": 1.2}, r"attn_factor is 1\.2\d*, but only 1.0"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ({"attn_logit_softcapping": np.ones(2, np.float32)}, "is of type ndarray"),
    ({"attention.causal": False}, "causal is False, but only True"),
    ({"expert_count": 8}, "a mixture of 8 experts"),
    ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "type is 'yarn'"),
    ({"rope.scaling.type": "linear"}, "rope.scaling.factor is missing"),
    ({"rope.scaling.factor": -1.0}, r"rope.scaling.factor is -1.0, expected a number above 0"),
    ({"rope.dimension_count": 32}, "partial rotation"),
    ({"attention.value_length": 32}, "64 components but values 32"),
    ({"attention.head_count_kv": 3}, "evenly"),
    ({"attention.sliding_window": -3}, "sliding_window is -3"),
])
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_what_is_not_supported_is_refused(arch: str, change: Change, words: str, file_of: FileOf) -> None:
    with pytest.raises(FormatError, match=words) as caught:
        open_model(file_of(arch, **change))
    assert "m.gguf" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [
    {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope.scaling.factor": 4.0},
    {"rope.scale_linear": 4.0}, {"rope.scale_linear": 2.0, "rope.scaling.factor": 4.0},
])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_spelling_of_linear_scaling_counts(arch: str, change: Change, file_of: FileOf) -> None:
    _, config = open_model(file_of(arch, **change))
    assert config.rope.divisor == 4.0
    assert open_model(file_of(arch, **change | {"rope.scaling.type": "none"}))[1].rope.divisor == 1.0


def test_a_factor_without_a_type_computes_what_transformers_does(rng: np.random.Generator, tmp_path: Path) -> None:
    """See test_models.test_transformers_agrees for the tolerance."""
    import torch

    theirs = transformers_model("llama", int(rng.integers(1 << 31)), rope=LINEAR_ROPE)
    write_transformers_model(tmp_path / "typed.gguf", theirs, "llama")
    with open_gguf(tmp_path / "typed.gguf") as file:
        metadata = {key: value for key, value in file.metadata.items() if key != "llama.rope.scaling.type"}
        write_gguf(tmp_path / "m.gguf", metadata,
                   [TensorSource(t.name, t.shape, t.format, t.data) for t in file.tensors.values()])
    ids = rng.integers(0, theirs.config.vocab_size, 40).tolist()
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
    found = load(tmp_path / "m.gguf", threads=1, cache_dtype="fp32").logits(ids)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_gemma_3_says_which_layers_see_everything(file_of: FileOf) -> None:
    _, config = open_model(file_of("gemma3", block_count=2, **{"attention.sliding_window": 9}))
    assert [config.window_of(layer) for layer in range(7)] == [9, 9, 9, 9, 9, 0, 9]
    changed = {"attention.sliding_window": 9, "attention.sliding_window_pattern": 2, "rope.freq_base_swa": 500.0}
    _, config = open_model(file_of("gemma3", **changed))
    assert [config.window_of(layer) for layer in range(4)] == [9, 0, 9, 0] and config.local_rope.base == 500.0
    # Of two layers one sees 9 positions: at position 100 they read 109 of 200.
    assert cache_bytes_read(config, 100.0) == 109 / 2 * cache_bytes_per_token(config)


def test_inspecting_shows_windows(file_of: FileOf, capsys: pytest.CaptureFixture[str]) -> None:
    path = file_of("gemma3", **{"attention.sliding_window": 9, "attention.sliding_window_pattern": 2})
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "Gemma 3 (gemma3)" in text and "1 of 2 layers see the last 9 tokens" in text


def test_inspecting_imports_neither_arrays_nor_the_compiler() -> None:
    code = ("import sys, nitinol.cli; nitinol.cli.main(['inspect', 'demo']); "
            "print([m for m in sys.modules if m.startswith(('nitinol.graph', 'nitinol.ops', 'nitinol.compiler', "
            "'llvmlite'))])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


# ----------------------------------------------------------------------------------------------------------- weights


def test_a_stack_of_matrices_keeps_its_format(tmp_path: Path, rng: np.random.Generator) -> None:
    """Weights of experts are three-dimensional; their bytes and their format stay what they are in the file."""
    layout = FORMATS["Q8_0"]
    data = rng.integers(0, 256, 3 * 4 * 64 // layout.values * layout.bytes).astype(np.uint8)
    write_gguf(tmp_path / "m.gguf", {"general.architecture": "none"}, [
        TensorSource("token_embd.weight", (5, 64), "F32", np.zeros((5, 64), np.float32)),
        TensorSource("blk.1.ffn_gate_exps.weight", (3, 4, 64), "Q8_0", data),
        TensorSource("blk.0.attn_norm.weight", (64,), "F32", np.arange(64, dtype=np.float32)),
    ])
    weights = wrap_weights(open_gguf(tmp_path / "m.gguf"), 2, get_device())
    experts = weights.blocks[1].ffn_gate_exps
    assert (experts.format, experts.shape) == ("Q8_0", (3, 4, 64))
    np.testing.assert_array_equal(experts.numpy(), data)
    np.testing.assert_array_equal(weights.blocks[0].attn_norm.numpy(), np.arange(64))
    assert weights.output.format == "F32" and isinstance(weights.blocks[0].attn_norm, Array)


# --------------------------------------------------------------------------------------------------------- sequences


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_several_sequences_at_once_are_each_as_if_alone(arch: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """A prompt of equal lengths, then steps at different positions in which one sequence has nothing to say. Tokens
    of 3 sequences go through other blocks than those of one, which adds in another order: see test_models."""
    change = {f"{arch}.attention.sliding_window": 20} if arch in ("llama", "gemma3") else {}
    path = random_file(tmp_path / "m.gguf", "F32", arch, seed=int(rng.integers(1 << 31)), change=change)
    model = load(path, cache_dtype="fp32", context=96)
    config, count = model.config, 3
    prompts, answers = rng.integers(0, 512, (count, 33)), rng.integers(0, 512, (count, 40))
    shape = config.cache_shape(96, count)
    cache = [(empty(shape, "float32"), empty(shape, "float32")) for _ in range(config.layers)]
    found = run(model, prompts, np.zeros(count), cache).reshape(count, 33, -1)
    alone = [model.logits([*prompts[i], *answers[i]]) for i in range(count)]
    tolerance = 1e-4 * np.std(alone)
    for i in range(count):
        np.testing.assert_allclose(found[i], alone[i][:33], atol=tolerance, rtol=0)
    lengths = np.zeros(count, int)
    for _ in range(25):
        speaks = rng.random(count) < 0.7
        tokens = answers[np.arange(count), lengths]
        row = run(model, tokens[:, None], np.where(speaks, 33 + lengths, -1), cache)
        for i in np.flatnonzero(speaks):
            np.testing.assert_allclose(row[i], alone[i][33 + lengths[i]], atol=tolerance, rtol=0)
        lengths += speaks
    assert lengths.min() > 3


def run(model: Model, tokens: np.ndarray, positions: np.ndarray, cache: Any) -> np.ndarray:
    hidden = model.network.forward(array(tokens.reshape(-1).astype(np.int32)), array(positions.astype(np.int32)), cache)
    logits: np.ndarray = model.network.logits(hidden).numpy()
    return logits


def test_a_prompt_goes_into_one_of_several_caches(tmp_path: Path, rng: np.random.Generator) -> None:
    """Of a cache for three sequences the middle one alone is read and written."""
    model = load(random_file(tmp_path / "m.gguf", "F32"), cache_dtype="fp32", context=32)
    shape = model.config.cache_shape(32, 3)
    poison = np.full(shape, np.nan, np.float32)
    cache = [(array(poison).evaluate(), array(poison).evaluate()) for _ in range(model.config.layers)]
    middle = [(keys[1:2], values[1:2]) for keys, values in cache]
    ids = rng.integers(0, 512, (1, 20))
    np.testing.assert_array_equal(run(model, ids, np.zeros(1), middle), model.logits(ids[0]))
    for keys, values in cache:
        for side in (keys.numpy(), values.numpy()):
            assert np.isnan(side[[0, 2]]).all() and np.isfinite(side[1, :, :20]).all()


def test_a_step_of_several_sequences_is_one_submission_without_allocations(file_of: FileOf) -> None:
    """Forward, logits and choice of three sequences as one command list; each chooses what it would alone."""
    model = load(file_of("gemma3", **{"attention.sliding_window": 8}), cache_dtype="fp32", context=32)
    config, count, counters = model.config, 3, model.device.counters
    prompts = [[1, 2, 3], [7, 8, 9], [300, 2, 5]]
    shape = config.cache_shape(32, count)
    cache = [(empty(shape, "float32"), empty(shape, "float32")) for _ in range(config.layers)]
    first = run(model, np.array(prompts), np.zeros(count), cache).reshape(count, 3, -1)[:, -1].argmax(axis=1)
    state = SamplingState(
        array(first.astype(np.int32)).evaluate(), array(np.full(count, 3, np.int32)).evaluate(),
        array(np.zeros((count, 32), np.int32)).evaluate(), array(np.tile(np.float32([0, 1, 0, 1]), (count, 1))),
        array(np.zeros((count, 3), np.int64)),
    )  # fmt: skip

    @compile
    def step() -> None:
        sample(model.network.logits(model.network.forward(state.token, state.position, cache)), state)

    found = [first.tolist()]
    for number in range(12):
        before = vars(counters).copy()
        step()
        if number > 1:
            after = vars(counters)
            changed = {name: after[name] - before[name] for name in after if after[name] != before[name]}
            assert changed == {"submits": 1, "waits": 1, "dispatches": len(step.records)}
        found.append(state.token.numpy().tolist())
    model.tokenizer.stop_ids = frozenset()
    for prompt, tokens in zip(prompts, np.transpose(found).tolist()):
        generation = model.generate(prompt, max_tokens=13)
        list(generation)
        assert generation.tokens == tokens


def test_a_trace_counts_what_a_window_leaves(file_of: FileOf) -> None:
    """Of two layers one reads 8 positions of 21, the other all."""
    change = {"attention.sliding_window": 8, "attention.sliding_window_pattern": 2}
    model = load(file_of("gemma3", **change), context=64)  # one block of keys, so neither is split
    decode = profile(model, list(range(20)))[-1]
    read = [nbytes for record, nbytes in zip(decode.records, decode.nbytes) if "decode_attention" in record.name]
    position = 2 * model.config.kv_width * 2  # bytes of keys and values of one, in fp16
    assert len(read) == 2 and read[1] - read[0] == (21 - 8) * position


def test_two_sessions_share_a_model(tmp_path: Path) -> None:
    """Their texts, token by token in turn, are those of each alone."""
    model = load(random_file(tmp_path / "m.gguf", "F32", tied=False), threads=1)
    model.tokenizer.stop_ids = frozenset()
    alone = []
    for prompt in ("once upon", "hello there"):
        generation = model.generate(prompt, max_tokens=12)
        list(generation)
        alone.append(generation.tokens)
    other = model.new_session(context=64)
    both = [model.generate("once upon", max_tokens=12), model.generate("hello there", max_tokens=12, session=other)]
    pieces = [iter(generation) for generation in both]
    while any([next(piece, None) is not None for piece in pieces]):
        pass
    assert [generation.tokens for generation in both] == alone and alone[0] != alone[1]
    with pytest.raises(ValueError, match="context has 64"):
        model.generate(list(range(64)), session=other)
    with pytest.raises(ValueError, match="made for 1 to 256"):
        model.new_session(context=257)


def test_a_network_keeps_nothing(tmp_path: Path) -> None:
    """Whatever it was asked before, the same tokens give the same bits."""
    model = load(random_file(tmp_path / "m.gguf", "Q8_0"), threads=1)
    before = dict(vars(model.network))
    first = model.logits([1, 2, 3])
    list(model.generate([7, 8, 9], max_tokens=4))
    np.testing.assert_array_equal(model.logits([1, 2, 3]), first)
    assert vars(model.network) == before

"""Whole models on CUDA: the same greedy tokens as the CPU (`pytest --device cuda`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from model_files import SMALL_WINDOW, dequantized_copy, mixed_file, random_file
from same_tokens import check_same_tokens

from nitinol.formats.blocks import FORMATS
from nitinol.generate.model import load
from nitinol.models import ARCHITECTURES
from nitinol.ops.linear import MANY_TOKENS

# Errors of logits in parts of their deviation (how close, and at most), where CUDA rounds what the CPU does not.
# Attention over a cache of fp16: queries and weights become fp16 too, 2^-12 of them on average. 1e-3 seen.
HALVES = 4e-3, 1e-2
# After that, or after activations in fp16 or bf16, each device rounds numbers of its own to int8. A step is 1/127 of
# the largest of 32, which is 2.1 deviations, so its error is 0.5% and the difference of two is 0.7%. Nine such products
# follow each other in two layers, which makes 2%, and 6% in the worst of 512 logits. 6% seen.
ROUNDED = 0.08, 0.15


@pytest.fixture(autouse=True)
def device(device_name: str) -> None:
    if device_name != "cuda":
        pytest.skip("whole models run on an NVIDIA GPU with --device cuda")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_the_tokens_of_the_cpu(format: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """From one token on, so through the kernels of decoding alone, whose rows of 4096 values are two warps' work. With
    a cache of fp32 nothing is rounded that the CPU does not round."""
    path = random_file(tmp_path / f"{format}.gguf", format, seed=int(rng.integers(1 << 31)), layers=1, ffn=4096,
                       tied=False)
    check_same_tokens(path, "cuda", rng, 1, cache="fp32")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_gives_the_tokens_of_the_cpu(arch: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """With products in int8, and with attention in fp16: the two would hide each other's errors."""
    for format, cache, limits in (("Q8_0", "fp32", ()), ("F32", "fp16", HALVES)):
        path = random_file(tmp_path / f"{format}.gguf", format, arch, seed=int(rng.integers(1 << 31)), ffn=256,
                           tied=False, change=SMALL_WINDOW if arch == "gemma3" else None)
        check_same_tokens(path, "cuda", rng, 9, *limits, cache=cache)


def test_a_prompt_through_all_formats_gives_the_tokens_of_the_cpu(rng: np.random.Generator, tmp_path: Path) -> None:
    """12 formats in one model, each in a matrix product and a matrix-vector product; F16 and BF16 as halves."""
    path = mixed_file(tmp_path / "mixed.gguf", int(rng.integers(12)), int(rng.integers(1 << 31)))
    check_same_tokens(path, "cuda", rng, 9, *ROUNDED)


def test_a_long_prompt_gives_the_tokens_of_the_cpu(rng: np.random.Generator, tmp_path: Path) -> None:
    """With so many tokens weights are decoded to bfloat16 and activations rounded to it, neither to int8.

    bf16 has 8 bits of mantissa: an error of 2^-8 at most, 0.16% on average, 0.23% in a product of two, and at most 0.7%
    in nine products one after the other. The worst of the prompt's logits have 0.5 to 0.65%; in int8 it were 1.1 to
    1.3%."""
    path = random_file(tmp_path / "long.gguf", "Q4_K", seed=int(rng.integers(1 << 31)), ffn=256, tied=False)
    count = MANY_TOKENS + 5
    check_same_tokens(path, "cuda", rng, count, *ROUNDED, context=256)
    models = (load(path, device="cuda", context=256),
              load(dequantized_copy(path, tmp_path / "exact.gguf"), device="cpu", context=256))
    prompt = rng.integers(0, models[0].config.vocab, count).tolist()
    logits, expected = (model.logits(prompt) for model in models)
    error = np.sqrt(np.square(logits - expected).mean(axis=1)) / expected.std()
    assert error.max() < 0.0085

#!/usr/bin/env python
"""Make a GGUF model with random weights: for benchmarks against other programs, and for tests.

    python tools/make_random_model.py --preset llama-3.2-1b --format Q4_K llama-1b-q4_k.gguf

Names of tensors and metadata are llama.cpp's, so that it loads the files, too. Weights are near N(0, 0.02),
made block by block as random integers with fitting scales; norms are F32 around 1. All matrices have the one
format (what llama.cpp calls "pure"), except that the one that makes the logits (token_embd.weight when the
embeddings are tied, output.weight otherwise) is Q6_K in formats below 8 bits, as in llama.cpp's own files;
Q8_0, F16, BF16 and F32 keep it in their format. The same arguments give the same file.

The tokenizer is a byte-level BPE with made-up merges: bytes, then letters joined one by one, then the special
tokens of the family. It tokenizes any text, and means nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nitinol.formats.blocks import FORMATS
from nitinol.formats.gguf_writer import TensorSource, write_gguf
from nitinol.formats.quantization import dequantize, quantize


class Shape(NamedTuple):
    arch: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    rope_base: float
    epsilon: float
    tied: bool


PRESETS = {
    "tiny": Shape("llama", 2, 256, 512, 4, 2, 64, 2048, 2048, 5e5, 1e-5, True),
    "llama-3.2-1b": Shape("llama", 16, 2048, 8192, 32, 8, 64, 128256, 131072, 5e5, 1e-5, True),
    "llama-3-8b": Shape("llama", 32, 4096, 14336, 32, 8, 128, 128256, 8192, 5e5, 1e-5, False),
    "qwen2.5-1.5b": Shape("qwen2", 28, 1536, 8960, 12, 2, 128, 151936, 32768, 1e6, 1e-6, True),
    "gemma3-270m": Shape("gemma3", 18, 640, 2048, 4, 1, 256, 262144, 32768, 1e6, 1e-6, True),
    "qwen3-0.6b": Shape("qwen3", 28, 1024, 3072, 16, 8, 128, 151936, 40960, 1e6, 1e-6, True),
}
SPECIAL = {
    "llama": ("llama-bpe", ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]),
    "qwen2": ("qwen2", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
    "qwen3": ("qwen2", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
    "gemma3": ("qwen2", ["<bos>", "<eos>", "<end_of_turn>"]),
}
WINDOW = 512  # of Gemma 3's layers that have one
# llama.cpp's numbers for "mostly this format" (general.file_type).
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10,
              "Q3_K": 12, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "BF16": 32}  # fmt: skip
DEVIATION = 0.02
PIECE_VALUES = 1 << 24


def random_blocks(rng: np.random.Generator, format: str, count: int) -> NDArray[np.uint8]:
    """`count` blocks of values with mean 0 and standard deviation DEVIATION, as bytes."""
    layout = FORMATS[format]
    if layout.values == 1:
        return quantize(rng.standard_normal(count, dtype=np.float32) * np.float32(DEVIATION), format)
    words = rng.integers(0, 1 << 64, -(-count * layout.bytes // 8), dtype=np.uint64)
    blocks = words.view(np.uint8)[: count * layout.bytes].view(layout.layout)
    middle = 0.0  # of the integers, where they are not symmetric: the minimum has to take it away
    match format:
        case "Q8_0":
            blocks["quants"] = np.maximum(blocks["quants"], -127)  # real files never have -128
        case "Q4_1" | "Q4_K":
            middle = 7.5
        case "Q5_1" | "Q5_K":
            middle = 15.5
        case "Q2_K":
            middle = 1.5
            scale = blocks["scales"] & 15 | 8
            blocks["scales"] = scale | scale << 4
    if format in ("Q4_K", "Q5_K"):  # a group's minimum is its scale; both are 6 bits, of which the top is set
        low, high = blocks["scales"][:, :4] | 0xA0, blocks["scales"][:, 8:] & 15
        blocks["scales"] = np.concatenate([low, low, high | high << 4], axis=1)

    def set_scales(d: Any) -> None:
        blocks["d"] = d
        if middle:
            name = "dmin" if format.endswith("_K") else "m"
            blocks[name] = np.float32(middle if name == "dmin" else -middle) * d

    set_scales(np.float32(1))
    sample = blocks[:256]
    unit = dequantize(sample.view(np.uint8), format, (len(sample) * layout.values,)).std()
    d = rng.uniform(0.8, 1.2, count).astype(np.float32) * np.float32(DEVIATION / unit)
    if not middle:  # -8..7 and the like have mean -0.5; signs at random, as real files have them, cancel it
        d *= rng.choice(np.array([-1, 1], dtype=np.float32), count)
    set_scales(d)
    return blocks.view(np.uint8)


def matrix(seed: list[int], name: str, shape: tuple[int, int], format: str) -> TensorSource:
    def pieces() -> Iterator[NDArray[np.uint8]]:
        rng = np.random.default_rng(seed)
        blocks, step = shape[0] * shape[1] // FORMATS[format].values, PIECE_VALUES // FORMATS[format].values
        for start in range(0, blocks, step):
            yield random_blocks(rng, format, min(step, blocks - start))

    return TensorSource(name, shape, format, pieces)


def vector(seed: list[int], name: str, size: int, mean: float) -> TensorSource:
    noise = np.random.default_rng(seed).standard_normal(size, dtype=np.float32)
    return TensorSource(name, (size,), "F32", np.float32(mean) + np.float32(0.1) * noise)


def llama3_rope_factors(head_dim: int, base: float, factor: float = 32.0) -> NDArray[np.float32]:
    """Llama 3's RoPE scaling, as the divisor of each frequency (Llama 3.2 1B: factor 32, low 1, high 4, trained
    on 8192 tokens): long wavelengths are stretched by `factor`, short ones kept, a ramp between."""
    low, high, original = 1.0, 4.0, 8192
    wavelength = 2 * np.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (original / wavelength - low) / (high - low)
    ramp = 1 / ((1 - smooth) / factor + smooth)
    kept = np.where(wavelength < original / high, 1.0, ramp)
    return np.where(wavelength > original / low, factor, kept).astype(np.float32)


def tensors(shape: Shape, format: str, seed: int) -> list[TensorSource]:
    narrow = FORMATS[format].bytes / FORMATS[format].values < 1
    logits_format = "Q6_K" if narrow else format
    count = iter(range(1 << 20))
    weights: Callable[..., TensorSource] = lambda *args: matrix([seed, next(count)], *args)  # noqa: E731
    vectors: Callable[..., TensorSource] = lambda *args: vector([seed, next(count)], *args)  # noqa: E731
    hidden, ffn = shape.hidden, shape.ffn
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    embedding = (shape.vocab, hidden)
    found = [weights("token_embd.weight", embedding, logits_format if shape.tied else format)]
    found.append(vectors("output_norm.weight", hidden, 1.0))
    if not shape.tied:
        found.append(weights("output.weight", embedding, logits_format))
    if shape.arch == "llama":
        factors = llama3_rope_factors(shape.head_dim, shape.rope_base)
        found.append(TensorSource("rope_freqs.weight", factors.shape, "F32", factors))
    for layer in range(shape.layers):
        block = f"blk.{layer}."
        found.append(vectors(block + "attn_norm.weight", hidden, 1.0))
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            found.append(weights(f"{block}attn_{name}.weight", (rows, hidden), format))
            if shape.arch == "qwen2":
                found.append(vectors(f"{block}attn_{name}.bias", rows, 0.0))
            if shape.arch in ("qwen3", "gemma3") and name != "v":
                found.append(vectors(f"{block}attn_{name}_norm.weight", shape.head_dim, 1.0))
        found.append(weights(block + "attn_output.weight", (hidden, q), format))
        found.append(vectors(block + "ffn_norm.weight", hidden, 1.0))
        found.append(weights(block + "ffn_gate.weight", (ffn, hidden), format))
        found.append(weights(block + "ffn_up.weight", (ffn, hidden), format))
        found.append(weights(block + "ffn_down.weight", (hidden, ffn), format))
        if shape.arch == "gemma3":
            found.append(vectors(block + "post_attention_norm.weight", hidden, 1.0))
            found.append(vectors(block + "post_ffw_norm.weight", hidden, 1.0))
    return found


def byte_characters() -> list[str]:
    """GPT-2's printable character for each byte: itself, or for the unprintable ones U+0100 and up."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    moved = {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [moved.get(byte, chr(byte)) for byte in range(256)]


def tokenizer(shape: Shape) -> dict[str, Any]:
    pre, special = SPECIAL[shape.arch]
    ordinary = max(shape.vocab - 256, 256 + (shape.vocab - 256) * 3 // 4)  # like Llama 3: the last 256 are special
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens, merges = byte_characters(), []
    stems = ["Ġ", *letters]
    pairs = ((stem, letter) for stem in stems for letter in letters)  # stems grows as it is walked
    while len(tokens) < ordinary:
        stem, letter = next(pairs)
        stems.append(stem + letter)
        tokens.append(stem + letter)
        merges.append(f"{stem} {letter}")
    names = special + [f"<|reserved_special_token_{i}|>" for i in range(shape.vocab - ordinary - len(special))]
    types = np.array([1] * ordinary + [3] * len(names), dtype=np.int32)  # 1 is normal, 3 is control
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens + names,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": ordinary,
        "tokenizer.ggml.eos_token_id": ordinary + (1 if shape.arch == "llama" else 2),
    }
    if shape.arch != "llama":
        found["tokenizer.ggml.add_bos_token"] = False
    return found


def metadata(shape: Shape, format: str, name: str) -> dict[str, Any]:
    arch = shape.arch
    return {
        "general.architecture": arch,
        "general.name": name,
        "general.file_type": FILE_TYPES[format],
        "general.quantization_version": 2,
        f"{arch}.block_count": shape.layers,
        f"{arch}.context_length": shape.context,
        f"{arch}.embedding_length": shape.hidden,
        f"{arch}.feed_forward_length": shape.ffn,
        f"{arch}.attention.head_count": shape.heads,
        f"{arch}.attention.head_count_kv": shape.kv_heads,
        f"{arch}.attention.key_length": shape.head_dim,
        f"{arch}.attention.value_length": shape.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": float(shape.epsilon),
        f"{arch}.rope.freq_base": float(shape.rope_base),
        f"{arch}.rope.dimension_count": shape.head_dim,
        f"{arch}.vocab_size": shape.vocab,
        **({f"{arch}.attention.sliding_window": WINDOW} if arch == "gemma3" else {}),
        **tokenizer(shape),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a GGUF model with random weights.")
    parser.add_argument("path", help="the file to write")
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="the sizes (default: tiny)")
    parser.add_argument("--arch", choices=SPECIAL, help="the architecture (default: the preset's own)")
    parser.add_argument("--format", choices=FORMATS, default="Q8_0", help="of the matrices (default: Q8_0)")
    parser.add_argument("--layers", type=int, help="another number of layers")
    parser.add_argument("--untied", action="store_true", help="give the output its own matrix")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    options = parser.parse_args()
    shape = PRESETS[options.preset]
    shape = shape._replace(
        arch=options.arch or shape.arch,
        layers=options.layers or shape.layers,
        tied=shape.tied and not options.untied,
    )
    name = f"random {options.preset} {options.format}, seed {options.seed}"
    write_gguf(options.path, metadata(shape, options.format, name), tensors(shape, options.format, options.seed))


if __name__ == "__main__":
    main()

"""A model's hyper-parameters from GGUF metadata, each checked before use, and the memory that the model needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nitinol.formats.gguf import GGUF, FormatError

ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Tokens of a prompt that go through the layers together, by device. CPU: 512 are no faster and take twice the memory. A
# GPU computes blocks of 64 to 128 tokens and 128 to 256 rows at a time: 256 tokens by 4096 rows are 32 blocks, not
# enough for 132 multiprocessors.
PREFILL_CHUNK = {"cpu": 256, "metal": 512, "cuda": 2048}
CACHE_BYTES = {"fp16": 2, "fp32": 4}  # of one cached key or value

# Far above any model of these families; what is larger is a damaged file.
_MOST = 1 << 24


@dataclass(frozen=True)
class Config:
    """Hyper-parameters under short names."""

    arch: str
    name: str
    layers: int
    hidden: int  # width of the residual stream
    ffn: int  # width of the feed-forward's inner layer
    heads: int
    kv_heads: int
    head_dim: int
    rope_base: float
    rope_divisor: float  # linear scaling: all frequencies are divided by it
    epsilon: float
    vocab: int
    context: int  # the longest context that the model was made for
    tied: bool  # the output matrix is the embedding

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim


def read_config(file: GGUF) -> Config:
    """The hyper-parameters of a file; FormatError in one sentence where one is missing, wrong or not supported."""
    metadata = file.metadata

    def fail(sentence: str) -> FormatError:
        return FormatError(f"{file.path}: {sentence}")

    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        found = f"the architecture is {arch!r:.40}" if arch is not None else "general.architecture is missing"
        raise fail(f"{found}, but only {', '.join(ARCHITECTURES)} are supported; use a model of these families")

    def integer(key: str, default: int | None = None, least: int = 1) -> int:
        value = metadata.get(f"{arch}.{key}", default)
        if type(value) is not int or not least <= value <= _MOST:
            found = "missing" if value is None else _show(value)
            raise fail(f"{arch}.{key} is {found}, expected a whole number from {least} to {_MOST}; "
                       "the file is damaged or was converted wrongly")
        return value

    def number(key: str, default: float | None = None) -> float:
        value = metadata.get(f"{arch}.{key}", default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type,operator]
            found = "missing" if value is None else _show(value)
            raise fail(f"{arch}.{key} is {found}, expected a number above 0; the file is damaged or was converted "
                       "wrongly")
        return float(value)  # type: ignore[arg-type]

    if metadata.get(f"{arch}.expert_count"):
        raise fail(f"the model is a mixture of {_show(metadata[f'{arch}.expert_count'])} experts, which is not "
                   "supported; use a dense model")
    scaling = metadata.get(f"{arch}.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise fail(f"{arch}.rope.scaling.type is {_show(scaling)}, but only 'linear' and Llama 3's scaling are "
                   "supported; use the model without context extension")
    hidden, heads = integer("embedding_length"), integer("attention.head_count")
    kv_heads = integer("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise fail(f"{heads} attention heads cannot share {kv_heads} key-value heads evenly; the file is damaged")
    if hidden % heads and f"{arch}.attention.key_length" not in metadata:
        raise fail(f"an embedding of {hidden} does not divide into {heads} heads, and {arch}.attention.key_length "
                   "is missing; the file is damaged")
    head_dim = integer("attention.key_length", hidden // heads)
    if integer("attention.value_length", head_dim) != head_dim:
        raise fail(f"keys have {head_dim} components but values {integer('attention.value_length')}, expected as many")
    rotated = integer("rope.dimension_count", head_dim)
    if rotated != head_dim or head_dim % 2:
        raise fail(f"{arch}.rope.dimension_count is {rotated} for heads of {head_dim}, expected as many, and an even "
                   "number; partial rotation is not supported")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        found = "is missing" if embedding is None else f"has shape {embedding.shape}"
        raise fail(f"tensor 'token_embd.weight' {found}, expected [vocabulary, {hidden}]")
    vocab = integer("vocab_size", embedding.shape[0])
    if vocab != embedding.shape[0]:
        raise fail(f"{arch}.vocab_size is {vocab}, but token_embd.weight has {embedding.shape[0]} rows")
    context = integer("context_length")
    window = metadata.get(f"{arch}.attention.sliding_window", 0)
    if type(window) is int and window > 0:  # within its window a model with one is a model without
        context = min(context, window)
    name = metadata.get("general.name")
    return Config(
        arch=arch, name=name if isinstance(name, str) and name else file.path.stem, layers=integer("block_count"),
        hidden=hidden, ffn=integer("feed_forward_length"), heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        rope_base=number("rope.freq_base", 10000.0),
        rope_divisor=number("rope.scaling.factor") if scaling == "linear" else 1.0,
        epsilon=number("attention.layer_norm_rms_epsilon"), vocab=vocab, context=context,
        tied="output.weight" not in file.tensors)


@dataclass(frozen=True)
class Memory:
    """What a model needs, in bytes."""

    weights: int  # the mapped file
    cache: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.activations


def memory_needed(config: Config, weights: int, context: int, cache_dtype: str = "fp16",
                  device: str = "cpu") -> Memory:
    """An estimate for a context of `context` tokens; `weights` are the bytes of the tensors.

    Activations: the float32 rows that are alive together in a prefill chunk (residual and its norm, queries,
    keys, values, attention's result, the feed-forward's two inner products and their product), and logits; on CUDA
    the two largest matrices of a layer in bfloat16 as well (`kernels.linear` decodes blocks for many tokens).
    """
    rows = min(context, PREFILL_CHUNK[device])
    row = 4 * config.hidden + 2 * config.q_width + 2 * config.kv_width + 3 * config.ffn
    decoded = 2 * 2 * config.hidden * config.ffn if device == "cuda" else 0
    activations = 4 * (rows * row + 2 * config.vocab) + decoded
    return Memory(weights, context * cache_bytes_per_token(config, cache_dtype), activations)


def cache_bytes_per_token(config: Config, cache_dtype: str = "fp16") -> int:
    """Keys and values of one token in all layers."""
    return 2 * config.layers * config.kv_width * CACHE_BYTES[cache_dtype]


def check_memory(config: Config, weights: int, context: int, cache_dtype: str, available: int,
                 device: str = "cpu") -> Memory:
    """The estimate; MemoryError, with figures and what would fit, when it is above `available` bytes (0: unknown)."""
    need = memory_needed(config, weights, context, cache_dtype, device)
    if available and need.total > available:
        figures = (f"{config.name} needs {gigabytes(need.total)} at a context of {context} tokens (weights "
                   f"{gigabytes(need.weights)}, cache {gigabytes(need.cache)}, activations "
                   f"{gigabytes(need.activations)}), but {gigabytes(available)} are available")
        smaller = range((context - 1) // 64 * 64, 0, -64)
        fits = next((n for n in smaller
                     if memory_needed(config, weights, n, cache_dtype, device).total <= available), 0)
        if fits:
            raise MemoryError(f"{figures}; a context of {fits} tokens would fit")
        least = memory_needed(config, 0, min(context, 512), cache_dtype, device)
        bits = 8 * (available - least.total) / parameters(config)
        raise MemoryError(f"{figures}; use " + (f"a file with at most {bits:.1f} bits a weight" if bits >= 2.6 else
                                                "a smaller model, or close other programs"))
    return need


def parameters(config: Config) -> int:
    """How many weights the matrices have."""
    attention = 2 * config.hidden * (config.q_width + config.kv_width)
    layers = config.layers * (attention + 3 * config.hidden * config.ffn)
    return layers + config.vocab * config.hidden * (1 if config.tied else 2)


def gigabytes(nbytes: float) -> str:
    """Bytes for people: '1.31 GB', '48.0 MB'."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def _show(value: Any) -> str:
    return f"{value!r:.40}" if isinstance(value, (int, float, str)) else f"of type {type(value).__name__}"

"""What architectures share: metadata read with checked types, RoPE's parameters, the cache's layout, a network's form,
and the memory that a model needs. No arrays here: `nitinol inspect` needs none."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import numpy as np

import nitinol as op
from nitinol.formats.gguf import GGUF, FormatError

# Tokens of a prompt that go through the layers together, by device. CPU: 512 are no faster and take twice the memory. A
# GPU computes blocks of 64 to 128 tokens and 128 to 256 rows at a time: 256 tokens by 4096 rows are 32 blocks, not
# enough for 132 multiprocessors.
PREFILL_CHUNK = {"cpu": 256, "metal": 512, "cuda": 2048}
CACHE_BYTES = {"fp16": 2, "fp32": 4}  # of one cached key or value

# Far above any model of these families; what is larger is a damaged file.
_MOST = 1 << 24
# Keys by which a model computes something else than what is written here, and the values at which it does not.
_NEUTRAL: dict[str, Sequence[Any]] = {
    "rope.scaling.attn_factor": (1.0,), "rope.scaling.yarn_log_multiplier": (0.0,), "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,), "attention.max_alibi_bias": (0.0,), "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,), "logit_scale": (1.0, 0.0), "embedding_scale": (1.0, 0.0),
    "residual_scale": (1.0, 0.0), "use_parallel_residual": (False,),
}  # fmt: skip
# Keys that say nothing about the arithmetic of a supported model.
_INFORMATIVE = ("rope.scaling.finetuned", "rope.scaling.original_context_length", "tensor_data_layout",
                "expert_count", "expert_used_count")  # fmt: skip


class Metadata:
    """The metadata under an architecture's prefix, each value checked as it is read."""

    def __init__(self, file: GGUF, arch: str) -> None:
        self.file, self.arch = file, arch
        self._read: set[str] = set()

    def fail(self, sentence: str) -> FormatError:
        return FormatError(f"{self.file.path}: {sentence}")

    def get(self, key: str, default: Any = None) -> Any:
        """A value of any type."""
        self._read.add(key)
        return self.file.metadata.get(f"{self.arch}.{key}", default)

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.get(key, default)
        if type(value) is not int or not least <= value <= _MOST:
            raise self.fail(f"{self.arch}.{key} is {_found(value)}, expected a whole number from {least} to {_MOST}; "
                            "the file is damaged or was converted wrongly")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise self.fail(f"{self.arch}.{key} is {_found(value)}, expected a number above 0; the file is damaged or "
                            "was converted wrongly")
        return float(value)

    def finish(self) -> None:
        """FormatError for a key that asks for arithmetic which is not here, a warning that names those that nothing
        has read."""
        experts = self.get("expert_count", 0)
        if type(experts) is not int or experts != 0:
            raise self.fail(f"the model is a mixture of {_show(experts)} experts, which is not supported; use a dense "
                            "model")
        for key, neutral in _NEUTRAL.items():
            value = self.get(key)
            if value is not None and (not isinstance(value, (bool, int, float)) or value not in neutral):
                raise self.fail(f"{self.arch}.{key} is {_show(value)}, but only {neutral[0]} is supported; use a model "
                                "without it")
        prefix = f"{self.arch}."
        known = {prefix + key for key in (*self._read, *_INFORMATIVE)}
        unknown = sorted(key for key in self.file.metadata if key.startswith(prefix) and key not in known)
        if unknown:
            shown = ", ".join(f"{key!r:.60}" for key in unknown[:5]) + (", ..." if len(unknown) > 5 else "")
            warnings.warn(f"{self.file.path}: nothing here knows the metadata {shown}; they are ignored, and if they "
                          "change what the model computes, its answers will be worse", stacklevel=2)


@dataclass(frozen=True)
class RoPE:
    """Rotary positions: the base of the frequencies, and by what all of them are divided (linear scaling)."""

    base: float
    divisor: float = 1.0

    def frequencies(self, head_dim: int, device: Any, factors: Any = 1.0) -> Any:
        """Radians a position, an Array float32 [head_dim / 2]; factors: by what else each is divided."""
        divisors = np.broadcast_to(np.multiply(factors, self.divisor), head_dim // 2)
        return op.array(op.rope_frequencies(head_dim, self.base, divisors), device=device)


def read_rope(metadata: Metadata, head_dim: int) -> RoPE:
    """All of a head's values turn. Scaling: `linear` or none; as in llama.cpp a factor without a type is linear."""
    arch = metadata.arch
    rotated = metadata.integer("rope.dimension_count", head_dim)
    if rotated != head_dim or head_dim % 2:
        raise metadata.fail(f"{arch}.rope.dimension_count is {rotated} for heads of {head_dim}, expected as many, and "
                            "an even number; partial rotation is not supported")
    old = metadata.get("rope.scale_linear")  # the name before there were other kinds
    factor = metadata.get("rope.scaling.factor")
    scaling = metadata.get("rope.scaling.type", "none" if factor is None and old is None else "linear")
    if scaling not in ("none", "linear"):
        raise metadata.fail(f"{arch}.rope.scaling.type is {_show(scaling)}, but only 'linear' and Llama 3's scaling "
                            "are supported; use the model without context extension")
    key = "rope.scale_linear" if factor is None and old is not None else "rope.scaling.factor"
    return RoPE(metadata.number("rope.freq_base", 10000.0), metadata.number(key) if scaling == "linear" else 1.0)


@dataclass(frozen=True)
class Config:
    """Hyper-parameters that every decoder has; an architecture adds its own."""

    arch: str
    name: str
    layers: int
    hidden: int  # width of the residual stream
    ffn: int  # width of the feed-forward's inner layer
    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    vocab: int
    context: int  # the longest context that the model was made for
    tied: bool  # the output matrix is the embedding
    rope: RoPE

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    def window_of(self, layer: int) -> int:
        """How many positions a token sees in a layer, its own among them; 0: all before it."""
        return 0

    def cache_shape(self, context: int, sequences: int = 1) -> tuple[int, int, int, int]:
        """Of a layer's keys, and of its values."""
        return sequences, self.kv_heads, context, self.head_dim


def read_decoder(metadata: Metadata) -> dict[str, Any]:
    """The arguments of `Config`."""
    file, arch = metadata.file, metadata.arch
    hidden, heads = metadata.integer("embedding_length"), metadata.integer("attention.head_count")
    kv_heads = metadata.integer("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise metadata.fail(f"{heads} attention heads cannot share {kv_heads} key-value heads evenly; the file is "
                            "damaged")
    if hidden % heads and metadata.get("attention.key_length") is None:
        raise metadata.fail(f"an embedding of {hidden} does not divide into {heads} heads, and "
                            f"{arch}.attention.key_length is missing; the file is damaged")
    head_dim = metadata.integer("attention.key_length", hidden // heads)
    if (values := metadata.integer("attention.value_length", head_dim)) != head_dim:
        raise metadata.fail(f"keys have {head_dim} components but values {values}, expected as many")
    rope = read_rope(metadata, head_dim)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        found = "is missing" if embedding is None else f"has shape {embedding.shape}"
        raise metadata.fail(f"tensor 'token_embd.weight' {found}, expected [vocabulary, {hidden}]")
    vocab = metadata.integer("vocab_size", embedding.shape[0])
    if vocab != embedding.shape[0]:
        raise metadata.fail(f"{arch}.vocab_size is {vocab}, but token_embd.weight has {embedding.shape[0]} rows")
    name = file.metadata.get("general.name")
    return {
        "arch": arch, "name": name if isinstance(name, str) and name else file.path.stem,
        "layers": metadata.integer("block_count"), "hidden": hidden, "ffn": metadata.integer("feed_forward_length"),
        "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "rope": rope,
        "epsilon": metadata.number("attention.layer_norm_rms_epsilon"), "vocab": vocab,
        "context": metadata.integer("context_length"), "tied": "output.weight" not in file.tensors,
    }  # fmt: skip


class Tensor(NamedTuple):
    """A tensor that a file must have, or may have."""

    name: str
    shape: tuple[int, ...]
    required: bool = True


def outer_tensors(config: Config) -> Iterator[Tensor]:
    """Those outside the blocks, under llama.cpp's names."""
    yield Tensor("token_embd.weight", (config.vocab, config.hidden))
    yield Tensor("output_norm.weight", (config.hidden,))
    yield Tensor("output.weight", (config.vocab, config.hidden), required=False)


def block_tensors(config: Config, layer: int) -> Iterator[Tensor]:
    """The matrices of attention and of a gated feed-forward layer, and the norms before them."""
    block, hidden = f"blk.{layer}.", config.hidden
    yield Tensor(block + "attn_norm.weight", (hidden,))
    yield Tensor(block + "attn_q.weight", (config.q_width, hidden))
    yield Tensor(block + "attn_k.weight", (config.kv_width, hidden))
    yield Tensor(block + "attn_v.weight", (config.kv_width, hidden))
    yield Tensor(block + "attn_output.weight", (hidden, config.q_width))
    yield Tensor(block + "ffn_norm.weight", (hidden,))
    yield Tensor(block + "ffn_gate.weight", (config.ffn, hidden))
    yield Tensor(block + "ffn_up.weight", (config.ffn, hidden))
    yield Tensor(block + "ffn_down.weight", (hidden, config.ffn))


class Network:
    """A model as a function of its weights: no state, so several sessions may share one.

    weights: what `weights.wrap_weights` makes. An architecture adds `forward`.
    """

    family: ClassVar[str]

    def __init__(self, config: Any, weights: SimpleNamespace, device: Any) -> None:
        self.config, self.weights, self.device = config, weights, device

    def forward(self, tokens: Any, positions: Any, cache: Sequence[tuple[Any, Any]]) -> Any:
        """The normed output of the last block for each token, float32 [sequences * T, hidden].

        tokens: int32 [sequences * T], one sequence's after the other's; positions: int32 [sequences], that of each
        one's first token; cache: keys and values of each block, both of `config.cache_shape`, which the tokens read
        from and are added to.
        """
        raise NotImplementedError

    def logits(self, hidden: Any) -> Any:
        """Scores of all tokens of the vocabulary, float32 [T, vocabulary], from `forward`'s result."""
        return op.linear(hidden, self.weights.output)


def _found(value: Any) -> str:
    return "missing" if value is None else _show(value)


def _show(value: Any) -> str:
    return f"{value!r:.40}" if isinstance(value, (int, float, str)) else f"of type {type(value).__name__}"

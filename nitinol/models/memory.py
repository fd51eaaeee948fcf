"""The memory that a model needs, before any is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from nitinol.models.base import CACHE_BYTES, PREFILL_CHUNK, Config


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


def cache_bytes_read(config: Config, position: float, cache_dtype: str = "fp16") -> float:
    """Keys and values that the token at a position sees."""
    seen = sum(min(position, config.window_of(layer) or position) for layer in range(config.layers))
    return seen * cache_bytes_per_token(config, cache_dtype) / config.layers


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



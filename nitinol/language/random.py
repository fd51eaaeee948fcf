"""Random numbers as a function of (seed, offset): Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011), with Triton's conventions for seeds, offsets and the mapping to floats."""

from __future__ import annotations

import builtins
from typing import Any

from nitinol.language.core import known_int, tensor
from nitinol.language.math import cos, log, maximum, sin, sqrt, umulhi
from nitinol.language.operations import where
from nitinol.language.semantic import bitcast, cast, constant, to_tensor, unify
from nitinol.language.types import DType, int32, int64, uint32, uint64

ROUNDS = 10
# Per word size: the two multipliers and the two key increments of Philox, and 2 ** -(bits - 1) for floats in [0, 1).
CONSTANTS = {
    uint32: (0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 4.6566127342e-10),
    uint64: (0xD2E7470EE14C6C93, 0xCA5A826395121157, 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B, 1.0842020432385337e-19),
}
Four = tuple[tensor, tensor, tensor, tensor]


def philox(seed: Any, c0: Any, c1: Any, c2: Any, c3: Any, n_rounds: Any = ROUNDS) -> Four:
    """Four random words for a 64-bit seed and a counter of four words (all of 32, or all of 64 bits)."""
    counters = [to_tensor(c, "a counter of philox") for c in (c0, c1, c2, c3)]
    dtype = counters[0].dtype
    if not isinstance(dtype, DType) or not dtype.is_int or dtype.bits not in (32, 64):
        raise TypeError(f"philox takes counters of 32 or 64 bits, found {dtype}")
    word = uint32 if dtype.bits == 32 else uint64
    a, b, key_a, key_b, _ = CONSTANTS[word]
    multipliers = [constant(v, word) for v in (a, b)]
    steps = [constant(v, word) for v in (key_a, key_b)]
    seed = cast(to_tensor(seed, "the seed of philox"), uint64)
    key0, key1 = (cast(seed, uint32), cast(seed >> 32, uint32)) if word == uint32 else (seed, constant(0, uint64))
    x0, x1, x2, x3 = (cast(c, word) for c in counters)
    for _ in builtins.range(known_int(n_rounds, "n_rounds of philox")):
        y0, y2 = x0, x2
        x0, x2 = umulhi(multipliers[1], y2) ^ x1 ^ key0, umulhi(multipliers[0], y0) ^ x3 ^ key1
        x1, x3 = multipliers[1] * y2, multipliers[0] * y0
        key0, key1 = key0 + steps[0], key1 + steps[1]
    return x0, x1, x2, x3


def randint4x(seed: Any, offset: Any, n_rounds: Any = ROUNDS) -> Four:
    """Four tiles of random uint32 words for one offset each."""
    offset = to_tensor(offset, "the offset of a random function")
    low = cast(offset, uint32)
    zero = low * 0
    wide = isinstance(offset.dtype, DType) and offset.dtype.bits > 32
    return philox(seed, low, cast(offset >> 32, uint32) if wide else zero, zero, zero, n_rounds)


def randint(seed: Any, offset: Any, n_rounds: Any = ROUNDS) -> tensor:
    """Random uint32 words."""
    return randint4x(seed, offset, n_rounds)[0]


def uint_to_uniform_float(x: Any) -> tensor:
    """Random words as fp32 uniform in [0, 1)."""
    x = to_tensor(x)
    word = uint32 if x.dtype in (int32, uint32) else uint64
    signed = bitcast(x, int32 if word == uint32 else int64)
    return where(signed < 0, -signed - 1, signed) * CONSTANTS[word][4]


def rand(seed: Any, offset: Any, n_rounds: Any = ROUNDS) -> tensor:
    """fp32 uniform in [0, 1)."""
    return uint_to_uniform_float(randint(seed, offset, n_rounds))


def rand4x(seed: Any, offset: Any, n_rounds: Any = ROUNDS) -> Four:
    """Four tiles of fp32 uniform in [0, 1)."""
    a, b, c, d = randint4x(seed, offset, n_rounds)
    return uint_to_uniform_float(a), uint_to_uniform_float(b), uint_to_uniform_float(c), uint_to_uniform_float(d)


def pair_uniform_to_normal(u1: Any, u2: Any) -> tuple[tensor, tensor]:
    """Two independent standard normal values of two uniform ones (Box and Muller)."""
    u1, u2 = unify(maximum(1e-7, u1), u2, "pair_uniform_to_normal")
    angle = u2 * 6.283185307179586
    radius = sqrt(log(u1) * -2.0)
    return radius * cos(angle), radius * sin(angle)


def randn(seed: Any, offset: Any, n_rounds: Any = ROUNDS) -> tensor:
    """fp32 of the standard normal distribution."""
    a, b, _, _ = randint4x(seed, offset, n_rounds)
    return pair_uniform_to_normal(uint_to_uniform_float(a), uint_to_uniform_float(b))[0]


def randn4x(seed: Any, offset: Any, n_rounds: Any = ROUNDS) -> Four:
    """Four tiles of fp32 of the standard normal distribution."""
    a, b, c, d = rand4x(seed, offset, n_rounds)
    return (*pair_uniform_to_normal(a, b), *pair_uniform_to_normal(c, d))

"""AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019) for all parameters in one launch.

The parameters of a model are views of one flat buffer, each from a multiple of 256 on, and so are their gradients and
states: then one grid covers them all. A table of addresses would serve too, since int64 casts to a pointer, but what
is reached by an address is seen neither by the hazard analysis, nor by bounds checks, nor by Metal, which wants to
know a buffer to keep it resident. What differs between parameters is a number per block of 256 values; blocks of 256
are also what 8-bit states (dynamic_bytes.py) share a scale in.

With gradients g, first and second moments m and v, step t = 1, 2, ...:

    m = b1 m + (1 - b1) g     v = b2 v + (1 - b2) g^2
    p = p - rate * decay * p - rate * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + epsilon)

The rate is read from device memory, and steps are counted there, so that a compiled step can be submitted again. Every
block counts its own steps: no program reads what another one writes. Gradients may be clipped to a global norm: one
more launch adds up squares to a few hundred parts, and every program of the update adds those in the same order.
"""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

import nitinol.language as tl
from nitinol.graph.array import Array
from nitinol.graph.conversion import array
from nitinol.graph.launch import InPlace, Output, launch
from nitinol.graph.operation import Operation
from nitinol.language.jit import jit
from nitinol.ops.dynamic_bytes import (
    BLOCK,
    dequantize_reference,
    load_dynamic,
    quantize_reference,
    store_dynamic,
)

PARTS = 256  # of the sum of squares: enough programs for any GPU, few enough to add up in every program


class AdamWState(NamedTuple):
    """State of `size` values in blocks of 256. mean and variance: float32 [size], or uint8 [size] with scales float32
    [blocks]; steps int32 [blocks]; master float32 [size], from which parameters of a half type are rounded, or None."""

    mean: Array
    variance: Array
    mean_scales: Array | None
    variance_scales: Array | None
    steps: Array
    master: Array | None


@jit
def squares_kernel(gradients, partial, size, BLOCK: tl.constexpr):
    """Program p of P: partial [p] = the sum of squares of blocks p, p + P, ... of `gradients` [size]."""
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        value = tl.load(gradients + start + at, mask=start + at < size, other=0.0).to(tl.float32)
        total += value * value
    tl.store(partial + tl.program_id(0), tl.sum(total))


@jit
def adamw_kernel(
    parameters, gradients, mean, variance, mean_scales, variance_scales, steps, master, decay, rate, partial, norm,
    blocks, parts, limit, beta1, beta2, rest1, rest2, log_beta1, log_beta2, epsilon,
    GROUPS: tl.constexpr, PARTS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Program i: GROUPS blocks of 256 values. partial [parts] and norm [1] may be None: no clipping. rest = 1 - beta,
    which the host knows to all bits: 1 - 0.999 in float32 is wrong by 1.3e-5."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    inside = group < blocks
    at = group.to(tl.int64)[:, None] * 256 + tl.arange(0, 256)[None, :]
    here = inside[:, None]
    gradient = tl.load(gradients + at, mask=here, other=0.0).to(tl.float32)
    if partial is not None:
        lane = tl.arange(0, PARTS)
        length = tl.sqrt(tl.sum(tl.load(partial + lane, mask=lane < parts, other=0.0)))
        if tl.program_id(0) == 0:
            tl.store(norm, length)
        gradient *= tl.minimum(limit / (length + 1e-6), 1.0)
    step = tl.load(steps + tl.program_id(0) * GROUPS) + 1
    tl.store(steps + group, step, mask=inside)
    if BYTES:
        first = load_dynamic(mean, mean_scales, group, inside, True)
        second = load_dynamic(variance, variance_scales, group, inside, False)
    else:
        first = tl.load(mean + at, mask=here, other=0.0)
        second = tl.load(variance + at, mask=here, other=0.0)
    first = beta1 * first + rest1 * gradient
    second = beta2 * second + rest2 * (gradient * gradient)
    if BYTES:
        store_dynamic(mean, mean_scales, group, inside, first, True)
        store_dynamic(variance, variance_scales, group, inside, second, False)
    else:
        tl.store(mean + at, first, mask=here)
        tl.store(variance + at, second, mask=here)
    speed = tl.load(rate)
    root = tl.sqrt(1.0 / one_minus_exp(log_beta2 * step))
    change = speed / one_minus_exp(log_beta1 * step) * first / (tl.sqrt(second) * root + epsilon)
    value = tl.load((parameters if master is None else master) + at, mask=here, other=0.0).to(tl.float32)
    # One small sum, then one rounding of the parameter: 1 - speed * decay would be rounded the same way at every step.
    value -= value * (speed * tl.load(decay + group, mask=inside, other=0.0))[:, None] + change
    if master is not None:
        tl.store(master + at, value, mask=here)
    tl.store(parameters + at, value, mask=here)


@jit
def one_minus_exp(x):
    """1 - exp(x) of a scalar x < 0, to a few roundings: the first terms of the series for a small x, where the
    difference would lose all but a few bits (b2 = 0.999: 10 of 24)."""
    series = 1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5 * (1.0 + x / 6 * (1.0 + x / 7)))))
    return tl.where(x > -0.25, -x * series, 1.0 - tl.exp(x))


def blocks(target: str, eight_bit: bool) -> dict[str, int]:
    """Blocks of 256 values of a program, and values of a step of the sum of squares.

    On a CPU the moments are tiles in memory, used twice: for 8M parameters on two cores a step takes 6 ms with 2 blocks
    and 14 ms or more with 16, which no longer fit the first cache beside the streams.
    """
    groups = {"cpu": 1 if eight_bit else 2, "metal": 4, "cuda": 4}
    return {"groups": groups[target], "squares": 4096 if target == "cpu" else 1024}


def flat_offsets(shapes: Sequence[Sequence[int]]) -> tuple[list[int], int]:
    """Where each parameter starts in a flat buffer, multiples of 256, and the buffer's size."""
    offsets, size = [], 0
    for shape in shapes:
        offsets.append(size)
        size += tl.cdiv(math.prod(shape), BLOCK) * BLOCK
    return offsets, size


def decay_table(shapes: Sequence[Sequence[int]], decays: Sequence[float]) -> Array:
    """The weight decay of each block of 256 values, float32 [blocks], from that of each parameter (0: none)."""
    lengths = [tl.cdiv(math.prod(shape), BLOCK) for shape in shapes]
    return array(np.repeat(np.asarray(decays, np.float32), lengths)).evaluate()


def adamw_state(size: int, eight_bit: bool = False, master: Array | None = None) -> AdamWState:
    """State before the first step, of a flat buffer of `size` values; master: float32 copies of half parameters.

    ValueError if the size is not a multiple of 256.
    """
    if size % BLOCK or size < BLOCK:
        raise ValueError(f"adamw: a flat buffer of {size} values, expected a multiple of {BLOCK} (see flat_offsets)")

    def zeros(count: int, dtype: Any) -> Array:
        return array(np.zeros(count, dtype)).evaluate()

    groups = size // BLOCK
    moments = [zeros(size, np.uint8 if eight_bit else np.float32) for _ in range(2)]
    scales = [zeros(groups, np.float32) if eight_bit else None for _ in range(2)]
    return AdamWState(moments[0], moments[1], scales[0], scales[1], zeros(groups, np.int32), master)


def gradient_squares(target: str, gradients: Array) -> Array:
    """The sum of squares of a flat buffer in up to 256 parts, float32; parts of several buffers may be concatenated."""
    parts = square_parts(gradients)
    return launch(
        squares_kernel, (parts,), gradients=gradients, partial=Output((parts,), "float32"), size=gradients.size,
        BLOCK=blocks(target, False)["squares"],
    )  # fmt: skip


def square_parts(gradients: Array) -> int:
    """Into how many parts their sum of squares is split, on all targets."""
    return min(PARTS, tl.cdiv(gradients.size, 1024))


def adamw_step(
    target: str, parameters: Array, gradients: Array, state: AdamWState, rate: Array, decay: Array,
    betas: tuple[float, float] = (0.9, 0.999), epsilon: float = 1e-8, squares: Array | None = None,
    limit: float | None = None,
) -> Array | None:  # fmt: skip
    """One step in place: of parameters [size] (float32, float16 or bfloat16), of the state and of its count of steps.

    gradients [size] of any float type; rate float32 [1] and decay float32 [blocks] are read on the device. With squares
    (of gradient_squares, also of other buffers) and limit the gradients are multiplied by min(1, limit / (norm +
    1e-6)), and the norm float32 [1] is returned. ValueError for sizes that do not fit and betas outside 0 < beta < 1.
    """
    size = state.mean.size
    groups = size // BLOCK
    for name, operand, wanted in (("parameters", parameters, size), ("gradients", gradients, size),
                                  ("decay", decay, groups), ("rate", rate, 1)):  # fmt: skip
        if tuple(operand.shape) != (wanted,):
            raise ValueError(f"adamw: {name} have shape {tuple(operand.shape)}, expected {(wanted,)}")
    if not all(0 < beta < 1 for beta in betas):
        raise ValueError(f"adamw: betas are {betas}, expected two numbers between 0 and 1")
    if (squares is None) != (limit is None):
        raise ValueError("adamw: squares and limit are for clipping, which takes both; give both or none")
    held = {name: None if value is None else InPlace(value) for name, value in state._asdict().items()}
    programs = blocks(target, state.mean_scales is not None)["groups"]
    parts = 0 if squares is None else squares.size
    return launch(
        adamw_kernel, (tl.cdiv(groups, programs),), parameters=InPlace(parameters), gradients=gradients, decay=decay,
        rate=rate, partial=squares, norm=None if squares is None else Output((1,), "float32"), blocks=groups,
        parts=parts, limit=float(limit or 0), epsilon=float(epsilon), GROUPS=programs,
        PARTS=tl.next_power_of_2(max(1, parts)), BYTES=state.mean_scales is not None, **_constants(betas), **held,
    )  # fmt: skip


def _adamw_lower(
    target: str, parameters: Array, gradients: Array, mean: Array, variance: Array, mean_scales: Array | None,
    variance_scales: Array | None, steps: Array, master: Array | None, rate: Array, decay: Array,
    squares: Array | None, betas: tuple[float, float], epsilon: float, limit: float | None,
) -> Array | None:  # fmt: skip
    state = AdamWState(mean, variance, mean_scales, variance_scales, steps, master)
    return adamw_step(target, parameters, gradients, state, rate, decay, betas, epsilon, squares, limit)


SQUARES = Operation(
    "gradient_squares", lower=gradient_squares, vjp="a step of an optimiser is no part of a loss",
    rule=lambda gradients: ((square_parts(gradients),), tl.float32),
)  # fmt: skip
# Operands: parameters, gradients, the fields of AdamWState, rate, decay, squares; see adamw_step.
ADAMW = Operation(
    "adamw", lower=_adamw_lower, updates=(0, 2, 3, 4, 5, 6, 7), vjp="a step of an optimiser is no part of a loss",
    rule=lambda *operands, **attributes: [] if operands[-1] is None else [((1,), tl.float32)],
)  # fmt: skip


def _constants(betas: tuple[float, float]) -> dict[str, float]:
    """What kernels need of the betas, rounded from float64 once each."""
    first, second = betas
    return {
        "beta1": first, "beta2": second, "rest1": 1 - first, "rest2": 1 - second, "log_beta1": math.log(first),
        "log_beta2": math.log(second),
    }  # fmt: skip


def adamw_reference(
    parameters: np.ndarray, gradients: np.ndarray, mean: np.ndarray, variance: np.ndarray, step: int, rate: float,
    decay: np.ndarray, betas: tuple[float, float] = (0.9, 0.999), epsilon: float = 1e-8, limit: float | None = None,
    eight_bit: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Parameters, mean and variance after step 1, 2, ..., in float64; decay per value. With eight_bit the moments that
    are returned have been to bytes and back."""
    given = gradients.astype(np.float64)
    if limit is not None:
        given = given * min(1.0, limit / (np.sqrt(np.sum(given**2)) + 1e-6))
    mean = betas[0] * mean + (1 - betas[0]) * given
    variance = betas[1] * variance + (1 - betas[1]) * given**2
    root = np.sqrt(variance / (1 - betas[1] ** step)) + epsilon
    after = parameters * (1 - rate * decay) - rate * mean / (1 - betas[0] ** step) / root
    if eight_bit:
        mean, variance = (
            dequantize_reference(*quantize_reference(moment.reshape(-1, BLOCK), signed), signed).reshape(moment.shape)
            for moment, signed in ((mean, True), (variance, False))
        )
    return after, mean, variance

"""The causal short convolution before the gated delta rule: every channel by itself, over a token and the one to three
tokens before it, and then SiLU if wanted.

    z[t, c] = bias[c] + sum_w weight[c, w] x[t - (width - 1) + w, c],   y = silu(z) = z sigmoid(z)

Tokens lie in x [tokens, channels], sequences one after the other: all of one length, or with `starts` (int32
[sequences + 1]) each from starts[n] to starts[n + 1]. What stands before a sequence's first token is zero, or the state
[sequences, width - 1, channels], oldest first, which is what decoding carries from token to token.
"""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

from typing import Any

import numpy as np

import nitinol.language as tl
from nitinol.graph.launch import InPlace, Output
from nitinol.language.jit import jit
from nitinol.ops.arguments import launch_on
from nitinol.ops.epilogue import silu


@jit
def token_sequences(at, inside, starts, tokens, sequences, SEQUENCES: tl.constexpr):
    """The sequence that each token is in, its first token, and the one after its last; SEQUENCES is a power of two, not
    below `sequences`."""
    if starts is None:
        sequence = at // tokens
        return sequence, sequence * tokens, (sequence + 1) * tokens
    number = tl.arange(0, SEQUENCES)
    ends = tl.load(starts + 1 + number, mask=number < sequences, other=2**31 - 1)
    sequence = tl.sum(tl.where(ends[None, :] <= at[:, None], 1, 0), axis=1)
    begin = tl.load(starts + sequence, mask=inside, other=0)
    return sequence, begin, tl.load(starts + 1 + sequence, mask=inside, other=0)


@jit
def load_past(x, state, at, inside, sequence, begin, column, channels, WIDTH: tl.constexpr):
    """Rows `at` of x, fp32; those before their sequence's `begin` come from its state."""
    here = inside[:, None] & (column < channels)[None, :]
    value = tl.load(
        x + at[:, None].to(tl.int64) * channels + column[None, :], mask=here & (at >= begin)[:, None], other=0.0
    ).to(tl.float32)
    if state is None:
        return value
    row = sequence * (WIDTH - 1) + (at - begin + WIDTH - 1)
    before = tl.load(
        state + row[:, None].to(tl.int64) * channels + column[None, :], mask=here & (at < begin)[:, None], other=0.0
    )
    return value + before.to(tl.float32)


@jit
def convolve(x, weight, bias, state, at, inside, sequence, begin, column, channels, WIDTH: tl.constexpr):
    """z of tokens and channels."""
    z = tl.zeros((at.shape[0], column.shape[0]), tl.float32)
    if bias is not None:
        z += tl.load(bias + column, mask=column < channels, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(WIDTH):
        factor = tl.load(weight + column * WIDTH + tap, mask=column < channels, other=0.0).to(tl.float32)
        past = at - (WIDTH - 1 - tap)
        z += factor[None, :] * load_past(x, state, past, inside, sequence, begin, column, channels, WIDTH)
    return z


@jit(do_not_specialize=["total", "tokens", "sequences"])
def convolution_kernel(
    x, weight, bias, state, starts, out, total, tokens, sequences, channels,
    WIDTH: tl.constexpr, SILU: tl.constexpr, UPDATE: tl.constexpr, SEQUENCES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (c, b): BLOCK_C channels of BLOCK_T of the `total` tokens. With UPDATE a program has a sequence of up to
    BLOCK_T tokens, and leaves its state."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(1) * (tokens if UPDATE else BLOCK_T)
    at = first + tl.arange(0, BLOCK_T)
    inside = at < (tl.minimum(first + tokens, total) if UPDATE else total)
    sequence, begin, _ = token_sequences(at, inside, starts, tokens, sequences, SEQUENCES)
    z = convolve(x, weight, bias, state, at, inside, sequence, begin, column, channels, WIDTH)
    place = at[:, None].to(tl.int64) * channels + column[None, :]
    tl.store(out + place, silu(z) if SILU else z, mask=inside[:, None] & (column < channels)[None, :])
    if UPDATE:
        store_window(x, state, state, tl.program_id(1), first, first + tokens, column, channels, WIDTH)


@jit
def store_window(x, state, final, sequence, begin, end, column, channels, WIDTH: tl.constexpr):
    """The state after a sequence: its last WIDTH - 1 tokens, or what came before them. `final` may be `state`: all is
    read before the first is written."""
    row = tl.arange(0, 2 if WIDTH == 2 else 4)
    kept = row < WIDTH - 1
    window = load_past(x, state, end - (WIDTH - 1) + row, kept, sequence, begin, column, channels, WIDTH)
    place = (sequence * (WIDTH - 1) + row)[:, None].to(tl.int64) * channels + column[None, :]
    tl.store(final + place, window, mask=kept[:, None] & (column < channels)[None, :])


@jit(do_not_specialize=["tokens"])
def window_kernel(x, state, starts, final, tokens, channels, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr):
    """Program (c, n): the state after sequence n, for BLOCK_C channels."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sequence = tl.program_id(1)
    begin = sequence * tokens if starts is None else tl.load(starts + sequence)
    end = begin + tokens if starts is None else tl.load(starts + sequence + 1)
    store_window(x, state, final, sequence, begin, end, column, channels, WIDTH)


MOST_TOKENS = 64  # of a sequence that one program has whole


def blocks(target: str, channels: int) -> dict[str, int]:
    """Tokens and channels of a program, and into how many parts the tokens are split for the weight's gradient.

    On a CPU a row of channels is a run of memory that is read once and a loop; more tokens are only more code (the
    sums over 16 of them take 5 s to compile, over 8 half of that).
    """
    tokens, columns, parts = {"cpu": (8, 512, 16), "metal": (16, 128, 64), "cuda": (16, 128, 128)}[target]
    return {"BLOCK_T": tokens, "BLOCK_C": min(columns, tl.next_power_of_2(channels)), "parts": parts}


def short_convolution_forward(
    target: str, x: Any, weight: Any, bias: Any = None, state: Any = None, starts: Any = None, activation: bool = True,
) -> tuple[Any, Any]:  # fmt: skip
    """The results, of x's shape and dtype, and the state after them [sequences, width - 1, channels] in x's dtype.

    x [batch, T, channels] float32, float16 or bfloat16; weight [channels, width] with width 2 to 4; bias [channels] or
    None; state [sequences, width - 1, channels] what came before, None for zeros; starts int32 [sequences + 1],
    ascending from 0 to T, with batch 1: where sequences of their own begin in T; activation: SiLU at the end.

    Raises ValueError for shapes that do not fit together.
    """
    problem = describe("short_convolution_forward", target, x, weight, bias, state, starts, activation)
    (out,) = launch_on(
        problem, convolution_kernel, (problem["columns"], problem["rows"]), {"out": Output(x.shape, x.dtype)},
        UPDATE=False,
    )  # fmt: skip
    window = {"final": Output(problem["window"], x.dtype)}
    (final,) = launch_on(problem, window_kernel, (problem["columns"], problem["sequences"]), window)
    return out, final


def short_convolution_step(
    target: str, x: Any, weight: Any, bias: Any, state: Any, activation: bool = True
) -> Any:  # fmt: skip
    """The results for up to 64 tokens [batch, T, channels] that follow `state` [batch, width - 1, channels], which is
    updated in place; one launch. The other arguments as in `short_convolution_forward`."""
    problem = describe("short_convolution_step", target, x, weight, bias, state, None, activation)
    check_step(x)
    problem |= {"state": InPlace(state), "BLOCK_T": tl.next_power_of_2(problem["tokens"])}
    (out,) = launch_on(
        problem, convolution_kernel, (problem["columns"], problem["sequences"]), {"out": Output(x.shape, x.dtype)},
        UPDATE=True,
    )  # fmt: skip
    return out


def check_step(x: Any) -> None:
    """ValueError for more tokens than one program has whole."""
    if x.shape[1] > MOST_TOKENS:
        raise ValueError(
            f"short_convolution_step: found {x.shape[1]} tokens, expected {MOST_TOKENS} at most; short_convolution "
            "takes any number"
        )


def describe(
    name: str, target: str, x: Any, weight: Any, bias: Any, state: Any, starts: Any, activation: bool
) -> dict[str, Any]:
    """What the kernels take of these arguments, by the names of their parameters, and the extents of grids (columns of
    programs for the channels, rows for the tokens) and of a state; ValueError if they do not fit."""
    (batch, tokens, channels), window = x.shape, check(name, x, weight, bias, state, starts)
    sequences = window[0]
    constants = blocks(target, channels)
    return constants | {
        "x": x, "weight": weight, "bias": bias, "state": state, "starts": starts, "total": batch * tokens,
        "tokens": tokens, "sequences": sequences, "channels": channels, "WIDTH": weight.shape[1], "SILU": activation,
        "SEQUENCES": 1 if starts is None else tl.next_power_of_2(sequences), "window": window,
        "columns": tl.cdiv(channels, constants["BLOCK_C"]), "rows": tl.cdiv(batch * tokens, constants["BLOCK_T"]),
    }  # fmt: skip


def check(name: str, x: Any, weight: Any, bias: Any, state: Any, starts: Any) -> tuple[int, int, int]:
    """The shape of a state; ValueError for shapes that do not fit together."""
    if len(x.shape) != 3 or 0 in x.shape:
        raise ValueError(f"{name}: x has shape {tuple(x.shape)}, expected [batch, T, channels] and no extent of 0")
    batch, _, channels = x.shape
    if len(weight.shape) != 2 or weight.shape[0] != channels or not 2 <= weight.shape[1] <= 4:
        raise ValueError(
            f"{name}: weight has shape {tuple(weight.shape)}, expected ({channels}, width) with a width of 2 to 4"
        )
    if starts is not None and (batch != 1 or len(starts.shape) != 1 or starts.shape[0] < 2):
        raise ValueError(
            f"{name}: starts has shape {tuple(starts.shape)} and x {tuple(x.shape)}; expected [sequences + 1], and the "
            "sequences one after the other in a batch of 1"
        )
    sequences = batch if starts is None else starts.shape[0] - 1
    window = (sequences, weight.shape[1] - 1, channels)
    for what, found, expected in (("bias", bias, (channels,)), ("state", state, window)):
        if found is not None and tuple(found.shape) != expected:
            raise ValueError(f"{name}: {what} has shape {tuple(found.shape)}, expected {expected}")
    return window


def short_convolution_reference(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None, state: np.ndarray | None = None,
    activation: bool = True,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The same in float64, of sequences of one length."""
    (batch, tokens, channels), width = x.shape, weight.shape[1]
    past = np.zeros((batch, width - 1, channels)) if state is None else state.astype(np.float64)
    line = np.concatenate([past, x.astype(np.float64)], axis=1)
    z = np.zeros(x.shape) if bias is None else np.zeros(x.shape) + bias
    for tap in range(width):
        z += line[:, tap : tap + tokens] * weight[:, tap]
    return z / (1 + np.exp(-z)) if activation else z, line[:, tokens:]

"""Gradients of the causal short convolution; `short_convolution.py` has the notation and the forward pass.

First, in float32, the gradient by z, which is computed again. Then sums over tokens for weight and bias: each of a
fixed number of parts of the tokens leaves its own, and a second kernel adds them in order, so that the result is the
same every time. The gradients by x and by the state are the convolution turned round.
"""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

from typing import Any

import nitinol.language as tl
from nitinol.graph.launch import Output
from nitinol.language.jit import jit
from nitinol.ops.arguments import launch_on
from nitinol.ops.short_convolution import convolve, describe, load_past, token_sequences


@jit(do_not_specialize=["total", "tokens", "sequences"])
def activation_gradient_kernel(
    x, weight, bias, state, starts, d_out, d_z, total, tokens, sequences, channels,
    WIDTH: tl.constexpr, SEQUENCES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (c, b): the gradient by z of BLOCK_C channels of BLOCK_T tokens."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    at = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = at < total
    sequence, begin, _ = token_sequences(at, inside, starts, tokens, sequences, SEQUENCES)
    z = convolve(x, weight, bias, state, at, inside, sequence, begin, column, channels, WIDTH)
    place = at[:, None].to(tl.int64) * channels + column[None, :]
    here = inside[:, None] & (column < channels)[None, :]
    gate = tl.sigmoid(z)
    gradient = tl.load(d_out + place, mask=here, other=0.0).to(tl.float32) * (gate * (1.0 + z * (1.0 - gate)))
    tl.store(d_z + place, gradient, mask=here)


@jit(do_not_specialize=["total", "tokens", "sequences"])
def part_gradient_kernel(
    x, state, starts, d_z, sums, total, tokens, sequences, channels,
    WIDTH: tl.constexpr, SEQUENCES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (c, p): the share that part p of the tokens has in the gradients by weight and bias, for BLOCK_C
    channels, in sums [parts, 5, channels]: rows 0 .. WIDTH - 1 and 4."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(1)
    share = tl.cdiv(tl.cdiv(total, BLOCK_T), tl.num_programs(1)) * BLOCK_T
    taps = tl.arange(0, 4)
    d_weight = tl.zeros((4, BLOCK_C), tl.float32)
    d_bias = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(part * share, tl.minimum((part + 1) * share, total), BLOCK_T):
        at = first + tl.arange(0, BLOCK_T)
        inside = at < total
        sequence, begin, _ = token_sequences(at, inside, starts, tokens, sequences, SEQUENCES)
        place = at[:, None].to(tl.int64) * channels + column[None, :]
        here = inside[:, None] & (column < channels)[None, :]
        gradient = tl.load(d_z + place, mask=here, other=0.0).to(tl.float32)
        for tap in tl.static_range(WIDTH):
            past = at - (WIDTH - 1 - tap)
            value = load_past(x, state, past, inside, sequence, begin, column, channels, WIDTH)
            d_weight += tl.where(taps[:, None] == tap, tl.sum(gradient * value, axis=0)[None, :], 0.0)
        d_bias += tl.sum(gradient, axis=0)
    at_sums = sums + part.to(tl.int64) * (5 * channels) + column
    inside = (taps < WIDTH)[:, None] & (column < channels)[None, :]
    tl.store(at_sums[None, :] + taps[:, None] * channels, d_weight, mask=inside)
    tl.store(at_sums + 4 * channels, d_bias, mask=column < channels)


@jit
def weight_gradient_kernel(sums, d_weight, d_bias, parts, channels, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr):
    """Program c: the parts' shares added, in their order."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    tap = tl.arange(0, 4)
    inside = (tap < WIDTH)[:, None] & (column < channels)[None, :]
    total = tl.zeros((4, BLOCK_C), tl.float32)
    total_bias = tl.zeros((BLOCK_C,), tl.float32)
    for part in range(parts):
        at = sums + part.to(tl.int64) * (5 * channels) + column
        total += tl.load(at[None, :] + tap[:, None] * channels, mask=inside, other=0.0)
        total_bias += tl.load(at + 4 * channels, mask=column < channels, other=0.0)
    tl.store(d_weight + column[None, :] * WIDTH + tap[:, None], total, mask=inside)
    if d_bias is not None:
        tl.store(d_bias + column, total_bias, mask=column < channels)


@jit
def spread(d_z, weight, at, inside, begin, end, column, channels, WIDTH: tl.constexpr):
    """The gradient by the values that stand `at` tokens, or before their sequence's first."""
    result = tl.zeros((at.shape[0], column.shape[0]), tl.float32)
    for distance in tl.static_range(WIDTH):
        later = at + distance
        use = (inside & (later >= begin) & (later < end))[:, None] & (column < channels)[None, :]
        gradient = tl.load(d_z + later[:, None].to(tl.int64) * channels + column[None, :], mask=use, other=0.0)
        tap = weight + column * WIDTH + (WIDTH - 1 - distance)
        factor = tl.load(tap, mask=column < channels, other=0.0).to(tl.float32)
        result += factor[None, :] * gradient.to(tl.float32)
    return result


@jit
def load_final_gradient(d_final, at, inside, sequence, end, column, channels, WIDTH: tl.constexpr):
    """What the state after a sequence hands to the values `at` tokens: its last WIDTH - 1."""
    row = at - (end - (WIDTH - 1))
    use = (inside & (row >= 0))[:, None] & (column < channels)[None, :]
    place = (sequence * (WIDTH - 1) + row)[:, None].to(tl.int64) * channels + column[None, :]
    return tl.load(d_final + place, mask=use, other=0.0).to(tl.float32)


@jit(do_not_specialize=["total", "tokens", "sequences"])
def input_gradient_kernel(
    d_z, weight, starts, d_final, d_x, total, tokens, sequences, channels,
    WIDTH: tl.constexpr, SEQUENCES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (c, b): the gradient by BLOCK_C channels of BLOCK_T tokens."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    at = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = at < total
    sequence, begin, end = token_sequences(at, inside, starts, tokens, sequences, SEQUENCES)
    result = spread(d_z, weight, at, inside, begin, end, column, channels, WIDTH)
    if d_final is not None:
        result += load_final_gradient(d_final, at, inside, sequence, end, column, channels, WIDTH)
    place = at[:, None].to(tl.int64) * channels + column[None, :]
    tl.store(d_x + place, result, mask=inside[:, None] & (column < channels)[None, :])


@jit(do_not_specialize=["tokens"])
def state_gradient_kernel(
    d_z, weight, starts, d_final, d_state, tokens, channels, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Program (c, n): the gradient by the state before sequence n, for BLOCK_C channels."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sequence = tl.program_id(1)
    begin = sequence * tokens if starts is None else tl.load(starts + sequence)
    end = begin + tokens if starts is None else tl.load(starts + sequence + 1)
    row = tl.arange(0, 4)
    kept = row < WIDTH - 1
    at = begin - (WIDTH - 1) + row
    result = spread(d_z, weight, at, kept, begin, end, column, channels, WIDTH)
    if d_final is not None:
        result += load_final_gradient(d_final, at, kept, sequence, end, column, channels, WIDTH)
    place = (sequence * (WIDTH - 1) + row)[:, None].to(tl.int64) * channels + column[None, :]
    tl.store(d_state + place, result, mask=kept[:, None] & (column < channels)[None, :])


def short_convolution_backward(
    target: str, d_out: Any, d_final: Any, x: Any, weight: Any, bias: Any = None, state: Any = None, starts: Any = None,
    activation: bool = True,
) -> tuple[Any, Any, Any, Any]:  # fmt: skip
    """The gradients by x, weight, bias and state, in their dtypes; None for what is None.

    d_out: the gradient by the results, of x's shape; d_final: by the state after them, or None if the loss does not
    look at it. The others as in `short_convolution_forward`.
    """
    problem = describe("short_convolution_backward", target, x, weight, bias, state, starts, activation)
    for what, found, expected in (("d_out", d_out, tuple(x.shape)), ("d_final", d_final, problem["window"])):
        if found is not None and tuple(found.shape) != expected:
            raise ValueError(f"short_convolution_backward: {what} has shape {tuple(found.shape)}, expected {expected}")
    columns, rows, parts = problem["columns"], problem["rows"], min(problem["parts"], problem["rows"])
    problem |= {"d_out": d_out, "d_z": d_out, "d_final": d_final, "parts": parts}
    if activation:
        (problem["d_z"],) = launch_on(
            problem, activation_gradient_kernel, (columns, rows), {"d_z": Output(x.shape, "float32")}
        )
    sums = {"sums": Output((parts, 5, problem["channels"]), "float32")}
    (problem["sums"],) = launch_on(problem, part_gradient_kernel, (columns, parts), sums)
    d_weight, d_bias = launch_on(
        problem, weight_gradient_kernel, (columns,),
        {"d_weight": Output(weight.shape, weight.dtype),
         "d_bias": None if bias is None else Output(bias.shape, bias.dtype)},
    )  # fmt: skip
    (d_x,) = launch_on(problem, input_gradient_kernel, (columns, rows), {"d_x": Output(x.shape, x.dtype)})
    if state is None:
        return d_x, d_weight, d_bias, None
    (d_state,) = launch_on(
        problem, state_gradient_kernel, (columns, problem["sequences"]), {"d_state": Output(state.shape, state.dtype)}
    )
    return d_x, d_weight, d_bias, d_state

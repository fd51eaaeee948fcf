"""The gated delta rule and the causal short convolution before it as operations with gradients, for training and for
decoding; `delta_rule.py` and `short_convolution.py` have the formulas and the kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

import nitinol.language as tl
from nitinol.graph.array import Array
from nitinol.graph.operation import Operation
from nitinol.ops import delta_rule
from nitinol.ops import elementwise as e
from nitinol.ops import short_convolution as convolution
from nitinol.ops.creation import zeros
from nitinol.ops.delta_rule_backward import delta_rule_backward
from nitinol.ops.delta_rule_tiles import EPSILON
from nitinol.ops.indexing import concatenate, repeat, stack
from nitinol.ops.reductions import floats
from nitinol.ops.short_convolution_backward import short_convolution_backward

NOT_TWICE = "a second derivative needs float64 operands"
IN_PLACE = "it updates its state in place; use the form that returns the state"


def _like(*operands: Array | None) -> list[Any]:
    """Results of the operands' shapes and types."""
    return [(operand.shape, operand.dtype) for operand in operands if operand is not None]


def _present(results: Any) -> list[Array]:
    return [result for result in results if result is not None]


def _spread(gradients: Any, *operands: Array | None) -> list[Array | None]:
    """For each operand its gradient, None for those that are None."""
    there = iter(gradients)
    return [None if operand is None else next(there) for operand in operands]


def _floats(*operands: Any) -> list[Any]:
    return [None if operand is None else floats(operand) for operand in operands]


def _is_wide(*operands: Array | None) -> bool:
    """Whether one of them is float64, in which kernels do not compute."""
    return any(operand is not None and operand.dtype == tl.float64 for operand in operands)


def _check_state(name: str, state: Array, shape: tuple[int, ...]) -> None:
    if state.shape != shape or not state.is_contiguous:
        raise ValueError(
            f"{name}: the state has shape {state.shape} and strides {state.strides}, expected {shape}, contiguous"
        )


# ------------------------------------------------------------------------------------------------- the gated delta rule


def _delta_rule_rule(
    q: Array, k: Array, v: Array, g: Array, beta: Array, initial: Array | None, starts: Array | None,
    scale: float | None, normalise: bool,
) -> list[Any]:  # fmt: skip
    state = delta_rule.check("gated_delta_rule", q, k, v, g, beta, initial, starts)
    return [(v.shape, v.dtype), (state, tl.float32)]


def _delta_rule_vjp(gradients: Any, results: Any, *operands: Any, scale: float | None, normalise: bool) -> Any:
    found = DELTA_RULE_GRADIENTS(*gradients, *operands, scale=scale, normalise=normalise)
    return [*_spread(found, *operands[:-1]), None]


def _delta_rule_reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray, beta: np.ndarray, initial: Any, starts: Any,
    scale: float | None, normalise: bool,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Of sequences of one length."""
    return delta_rule.delta_rule_reference(q, k, v, g, beta, initial, scale, normalise)


DELTA_RULE = Operation(
    "gated_delta_rule", rule=_delta_rule_rule, vjp=_delta_rule_vjp, reference=_delta_rule_reference,
    lower=lambda target, q, k, v, g, beta, initial, starts, scale, normalise: delta_rule.delta_rule_forward(
        target, q, k, v, g, beta, initial, scale, normalise, starts
    ),
)  # fmt: skip
DELTA_RULE_GRADIENTS = Operation(
    "gated_delta_rule_gradients", vjp=NOT_TWICE,
    rule=lambda d_out, d_final, *operands, scale, normalise: _like(*operands[:-1]),
    lower=lambda target, d_out, d_final, q, k, v, g, beta, initial, starts, scale, normalise: _present(
        delta_rule_backward(target, d_out, d_final, q, k, v, g, beta, initial, scale, normalise, starts)
    ),
)  # fmt: skip


def _delta_step_rule(
    q: Array, k: Array, v: Array, g: Array, beta: Array, state: Array, scale: float | None, normalise: bool
) -> Any:
    name = "gated_delta_rule_step"
    _check_state(name, state, delta_rule.check(name, q, k, v, g, beta, state, None))
    return v.shape, v.dtype


DELTA_RULE_STEP = Operation(
    "gated_delta_rule_step", rule=_delta_step_rule, lower=delta_rule.delta_rule_recurrent, updates=(5,), vjp=IN_PLACE
)


def gated_delta_rule(
    q: Any, k: Any, v: Any, g: Any, beta: Any, initial: Any = None, scale: float | None = None, normalise: bool = False,
    starts: Any = None,
) -> tuple[Array, Array]:  # fmt: skip
    """The gated delta rule (Yang, Kautz and Hatamizadeh, 2024) by chunks of tokens: the results [batch, T, v_heads,
    D_v] of v's type, and the last state, float32 [batch, v_heads, D_k, D_v].

    q, k [batch, T, heads, D_k] with D_k up to 256, v [batch, T, v_heads, D_v] with v_heads a multiple of heads, g (the
    logarithm of the decay) and beta [batch, T, v_heads]: float16, bfloat16 or float32. initial: the state before the
    first token, zeros unless given. scale: D_k ** -0.5 unless given. normalise: q and k are divided by their lengths
    first. starts: int32 [sequences + 1], ascending from 0 to T, with batch 1: where sequences of their own begin in T;
    states are then [sequences, v_heads, D_k, D_v]. With float64 operands it is composed of elementwise operations,
    token by token, which takes long, and states are float64. ValueError for shapes that do not fit.
    """
    q, k, v, g, beta, initial = _floats(q, k, v, g, beta, initial)
    scale = None if scale is None else float(scale)
    if _is_wide(q, k, v, g, beta, initial):
        return _composed_delta_rule(q, k, v, g, beta, initial, scale, normalise, starts)
    return DELTA_RULE(q, k, v, g, beta, initial, starts, scale=scale, normalise=bool(normalise))


def gated_delta_rule_step(
    q: Any, k: Any, v: Any, g: Any, beta: Any, state: Array, scale: float | None = None, normalise: bool = False
) -> Array:
    """The same token by token, for decoding: the results; `state`, float32 [batch, v_heads, D_k, D_v] and contiguous,
    is updated in place. No gradient flows. ValueError for shapes that do not fit."""
    scale = None if scale is None else float(scale)
    return DELTA_RULE_STEP(*_floats(q, k, v, g, beta), state, scale=scale, normalise=bool(normalise))


def _composed_delta_rule(
    q: Array, k: Array, v: Array, g: Array, beta: Array, initial: Array | None, scale: float | None, normalise: bool,
    starts: Any,
) -> tuple[Array, Array]:  # fmt: skip
    name = "gated_delta_rule"
    if starts is not None:
        raise ValueError(f"{name}: starts with float64 operands; call it for each sequence, or convert to float32")
    shape = delta_rule.check(name, q, k, v, g, beta, None, None)
    state = zeros(shape, tl.float64) if initial is None else initial
    if state.shape != shape:
        raise ValueError(f"{name}: the state has shape {state.shape}, expected {shape}")
    if normalise:
        q, k = (x * e.rsqrt(e.square(x).sum(-1, True) + EPSILON.value) for x in (q, k))
    q, k = (repeat(x, v.shape[2] // x.shape[2], 2) for x in (q, k))
    factor = shape[2] ** -0.5 if scale is None else scale
    results = []
    for t in range(v.shape[1]):
        key, query = (x[:, t].expand_dims(-1) for x in (k, q))
        state = state * e.exp(g[:, t]).expand_dims(-1).expand_dims(-1)
        correction = beta[:, t].expand_dims(-1) * (v[:, t] - (state * key).sum(-2))
        state = state + key * correction.expand_dims(-2)
        results.append((state * query).sum(-2) * factor)
    return stack(results, 1).astype(v.dtype), state


# ---------------------------------------------------------------------------------------------- the short convolution


def _convolution_rule(
    x: Array, weight: Array, bias: Array | None, state: Array | None, starts: Array | None, activation: bool
) -> list[Any]:
    return [(x.shape, x.dtype), (convolution.check("short_convolution", x, weight, bias, state, starts), x.dtype)]


def _convolution_vjp(gradients: Any, results: Any, *operands: Any, activation: bool) -> Any:
    found = CONVOLUTION_GRADIENTS(*gradients, *operands, activation=activation)
    return [*_spread(found, *operands[:-1]), None]


CONVOLUTION = Operation(
    "short_convolution", rule=_convolution_rule, lower=convolution.short_convolution_forward, vjp=_convolution_vjp,
    reference=lambda x, weight, bias, state, starts, activation: convolution.short_convolution_reference(
        x, weight, bias, state, activation
    ),
)  # fmt: skip
CONVOLUTION_GRADIENTS = Operation(
    "short_convolution_gradients", vjp=NOT_TWICE,
    rule=lambda d_out, d_final, *operands, activation: _like(*operands[:-1]),
    lower=lambda target, d_out, d_final, x, weight, bias, state, starts, activation: _present(
        short_convolution_backward(target, d_out, d_final, x, weight, bias, state, starts, activation)
    ),
)  # fmt: skip


def _convolution_step_rule(x: Array, weight: Array, bias: Array | None, state: Array, activation: bool) -> Any:
    name = "short_convolution_step"
    _check_state(name, state, convolution.check(name, x, weight, bias, state, None))
    convolution.check_step(x)
    return x.shape, x.dtype


CONVOLUTION_STEP = Operation(
    "short_convolution_step", rule=_convolution_step_rule, lower=convolution.short_convolution_step, updates=(3,),
    vjp=IN_PLACE,
)  # fmt: skip


def short_convolution(
    x: Any, weight: Any, bias: Any = None, state: Any = None, starts: Any = None, activation: bool = True
) -> tuple[Array, Array]:
    """A causal convolution of each channel over 2 to 4 tokens, then SiLU if wanted: the results, of x's shape and type,
    and the state after them [sequences, width - 1, channels], of x's type.

    x [batch, T, channels] float16, bfloat16 or float32; weight [channels, width]; bias [channels] or None; state
    [sequences, width - 1, channels]: what came before, None for zeros; starts int32 [sequences + 1], ascending from 0
    to T, with batch 1: where sequences of their own begin in T. With float64 operands it is composed of elementwise
    operations. ValueError for shapes that do not fit.
    """
    x, weight, bias, state = _floats(x, weight, bias, state)
    if not _is_wide(x, weight, bias, state):
        return CONVOLUTION(x, weight, bias, state, starts, activation=bool(activation))
    name = "short_convolution"
    if starts is not None:
        raise ValueError(f"{name}: starts with float64 operands; call it for each sequence, or convert to float32")
    past = convolution.check(name, x, weight, bias, state, None)
    line = concatenate([zeros(past, x.dtype) if state is None else state.astype(x.dtype), x], 1)
    tokens, width = x.shape[1], weight.shape[1]
    taps = [line[:, tap : tap + tokens] * weight[:, tap] for tap in range(width)]
    z = sum(taps[1:], start=taps[0] if bias is None else taps[0] + bias)
    return (e.silu(z) if activation else z).astype(x.dtype), line[:, tokens:]


def short_convolution_step(x: Any, weight: Any, bias: Any, state: Array, activation: bool = True) -> Array:
    """The results for up to 64 tokens [batch, T, channels] that follow `state` [batch, width - 1, channels], which is
    contiguous and updated in place; one launch, for decoding. No gradient flows. ValueError for shapes that do not fit.
    """
    x, weight, bias = _floats(x, weight, bias)
    return CONVOLUTION_STEP(x, weight, bias, state, activation=bool(activation))

"""Products with weights under a low-rank adapter, as an operation with gradients; the formulas stand in lora.py."""

from __future__ import annotations

from typing import Any

import numpy as np

import nitinol.language as tl
from nitinol.graph.array import Array
from nitinol.graph.operation import Operation
from nitinol.ops.lora import Lora, extents, lora_forward, lora_reference, normal_reference
from nitinol.ops.lora_gradients import lora_backward
from nitinol.ops.norm import rms_norm
from nitinol.ops.quantized import dequantize
from nitinol.ops.reductions import floats


def _rule(
    x: Array, weights: Array, down: Array, up: Array, gain: Array | None, scale: float, epsilon: float
) -> list[Any]:
    """y, hidden and, with a gain, the reciprocals of the rows' root mean squares: what the gradients need."""
    rows, _, rank = extents(x, weights, down, up, gain)
    tokens = x.shape[0]
    results = [((tokens, rows), x.dtype), ((tokens, rank), tl.float32)]
    return results if gain is None else [*results, ((tokens,), tl.float32)]


def _lower(
    target: str, x: Array, weights: Array, down: Array, up: Array, gain: Array | None, scale: float, epsilon: float
) -> list[Array]:
    found = lora_forward(target, x, weights, down, up, scale, gain, epsilon)
    return [result for result in found if result is not None]


def _vjp(
    gradients: Any, results: Any, x: Array, weights: Array, down: Array, up: Array, gain: Array | None, scale: float,
    epsilon: float,
) -> list[Array | None]:  # fmt: skip
    """Of weights in blocks there is none; that of others is a product that is only computed if somebody wants it."""
    dy, hidden, inverse = gradients[0], results[1], results[2] if gain is not None else None
    found = LORA_GRADIENTS(dy, hidden, inverse, x, weights, down, up, gain, scale=scale)
    d_weights = None
    if not weights.is_quantized:
        normal = x if gain is None else rms_norm(x, gain, epsilon)
        d_weights = (dy.T @ normal).astype(weights.dtype)
    return [found[0], d_weights, found[1], found[2], None if gain is None else found[3]]


def _gradients_lower(
    target: str, dy: Array, hidden: Array, inverse: Array | None, x: Array, weights: Array, down: Array, up: Array,
    gain: Array | None, scale: float,
) -> list[Array]:  # fmt: skip
    found = lora_backward(target, dy, x, weights, down, up, scale, Lora(None, hidden, inverse), gain)
    return [gradient for gradient in found if gradient is not None]


def _reference(
    x: np.ndarray, weights: np.ndarray, down: np.ndarray, up: np.ndarray, gain: np.ndarray | None, scale: float,
    epsilon: float,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    normal, inverse = normal_reference(x, gain, epsilon)
    results = lora_reference(x, weights, down, up, scale, gain, epsilon), scale * normal @ down.astype(np.float64).T
    return results if gain is None else (*results, inverse[:, 0])


LORA = Operation("lora_linear", rule=_rule, lower=_lower, reference=_reference, vjp=_vjp)
LORA_GRADIENTS = Operation(
    "lora_gradients", lower=_gradients_lower, vjp="a second derivative needs float64 operands",
    rule=lambda dy, hidden, inverse, x, weights, down, up, gain, scale: [
        (operand.shape, operand.dtype) for operand in (x, down, up, gain) if operand is not None
    ],
)  # fmt: skip


def lora_linear(
    x: Any, weights: Any, down: Any, up: Any, scale: float, gain: Any = None, epsilon: float = 1e-6
) -> Array:
    """n @ weights^T + scale * (n @ down^T) @ up^T of x's type [N, M] (Hu et al., "LoRA: low-rank adaptation of large
    language models", 2021), with n = x, or with a gain [K] RMSNorm(x) * gain, in one product.

    x [N, K], weights [M, K] of float16, bfloat16, float32 or in blocks of any format, down [r, K] and up [M, r] with r
    up to 128. Gradients flow to x, down, up, gain and float weights; of weights in blocks there is none. Computed in
    float32; with float64 operands composed of products, which takes any rank. ValueError for shapes that do not fit.
    """
    x, down, up = floats(x), floats(down), floats(up)
    gain = None if gain is None else floats(gain)
    given = [a for a in (x, weights, down, up, gain) if a is not None]
    if not any(a.dtype == tl.float64 for a in given):
        return LORA(x, weights, down, up, gain, scale=float(scale), epsilon=float(epsilon))[0]
    extents(x, weights, down, up, gain)
    normal = x if gain is None else rms_norm(x, gain, epsilon)
    plain = dequantize(weights, tl.float64)
    return (normal @ plain.T + (normal @ down.T) @ up.T * float(scale)).astype(x.dtype)

"""Mixture of experts as operations with gradients: routing, the order of the work, grouped products, and their sum;
routing.py and experts.py have the kernels.

    weights, experts = route(logits, k)
    order = dispatch(experts, E)
    hidden = silu(expert_linear(x, gate, order, gather=True)) * expert_linear(x, up, order, gather=True)
    y = combine(expert_linear(hidden, down, order), weights, order)
"""

from __future__ import annotations

from typing import Any

import nitinol.language as tl
from nitinol.graph.array import Array
from nitinol.graph.operation import Operation
from nitinol.ops import elementwise as e
from nitinol.ops import experts as grouped
from nitinol.ops import routing
from nitinol.ops.creation import arange, zeros
from nitinol.ops.indexing import take
from nitinol.ops.quantized import dequantize
from nitinol.ops.reductions import floats
from nitinol.ops.routing import SMALLEST, Dispatch, Routing
from nitinol.ops.softmax import softmax

NOT_TWICE = "a second derivative needs float64 operands"

# ------------------------------------------------------------------------------------------------------------ routing


def _route_rule(logits: Array, chosen: int, scores: str, normalise: bool) -> list[Any]:
    shape = (routing.extents(logits, chosen, scores)[0], chosen)
    return [(shape, tl.float32), (shape, tl.int32)]


def _route_vjp(gradients: Any, results: Any, logits: Array, **attributes: Any) -> list[Array]:
    return [ROUTE_GRADIENT(gradients[0], logits, results[1], **attributes)]


ROUTE = Operation(
    "route", rule=_route_rule, lower=routing.route_forward, reference=routing.route_reference, vjp=_route_vjp
)
ROUTE_GRADIENT = Operation(
    "route_gradient", vjp=NOT_TWICE, rule=lambda d_weights, logits, *others, **attributes: (logits.shape, logits.dtype),
    lower=lambda target, d_weights, logits, experts, chosen, scores, normalise: routing.route_backward(
        target, d_weights, logits, Routing(None, experts), scores, normalise
    ),
)  # fmt: skip


def route(logits: Any, chosen: int, scores: str = "softmax", normalise: bool = True) -> Routing:
    """The `chosen` experts with the highest scores for each token: weights float32 [N, chosen] and experts int32
    [N, chosen], by descending score, of equal ones the first. Gradients flow through the weights.

    logits [N, E] of floats, E up to 256, chosen up to 8; scores: "softmax" over the experts, or "sigmoid" of each;
    normalise: the weights of a token are divided by their sum. Of float64 logits the weights are float64; the choice
    is that of the logits rounded to float32. ValueError for other scores and sizes.
    """
    logits = floats(logits)
    attributes = {"chosen": int(chosen), "scores": scores, "normalise": bool(normalise)}
    if logits.dtype != tl.float64:
        return Routing(*ROUTE(logits, **attributes))
    _, places = ROUTE(logits.astype(tl.float32), **attributes)
    values = softmax(logits) if scores == "softmax" else e.sigmoid(logits)
    hit = e.equal(arange(logits.shape[1]), places.expand_dims(-1))
    picks = e.where(hit, values.expand_dims(1), 0.0).sum(-1)
    return Routing(picks / e.maximum(picks.sum(-1, True), SMALLEST.value) if normalise else picks, places)


DISPATCH = Operation(
    "dispatch", lower=lambda target, chosen, experts: routing.dispatch_forward(target, chosen, experts)[:4],
    rule=lambda chosen, experts: routing.dispatch_results(chosen, experts), vjp="its results are integers",
)  # fmt: skip


def _order(arrays: Any, block: int, chosen: int) -> Dispatch:
    offsets, source, place, table = arrays
    return Dispatch(offsets, source, place, table, block, chosen)


def dispatch(experts: Array, count: int) -> Dispatch:
    """The pairs of a token and an expert in the order of the experts, by which `expert_linear` and `combine` go.

    experts int32 [N, k], each from 0 to count - 1, as `route` gives them; count up to 256. ValueError for other shapes.
    """
    arrays = DISPATCH(experts.astype(tl.int32), experts=int(count))
    return _order(arrays, routing.tile_rows(experts.size, count), experts.shape[1])


# ------------------------------------------------------------------------------------------------- grouped products


def _linear_rule(x: Array, weights: Array, *arrays: Array, block: int, chosen: int, gather: bool) -> Any:
    rows, _, pairs = grouped.extents(x, weights, _order(arrays, block, chosen), gather)
    return (pairs, rows), x.dtype


def _linear_vjp(g: Array, out: Array, x: Array, weights: Array, *arrays: Array, **attributes: Any) -> list[Any]:
    found = EXPERT_LINEAR_GRADIENTS(g, x, weights, *arrays, **attributes)
    pair = (found, None) if weights.is_quantized else found
    return [*pair, None, None, None, None]


def _gradients_rule(dy: Array, x: Array, weights: Array, *arrays: Array, **attributes: Any) -> list[Any]:
    wanted = [x] if weights.is_quantized else [x, weights]
    return [(operand.shape, operand.dtype) for operand in wanted]


def _gradients_lower(
    target: str, dy: Array, x: Array, weights: Array, *arrays: Array, block: int, chosen: int, gather: bool
) -> list[Array]:
    order, plain = _order(arrays, block, chosen), not weights.is_quantized
    found = grouped.expert_linear_backward(target, dy, x, weights, order, gather, plain)
    return [gradient for gradient in found if gradient is not None]


EXPERT_LINEAR = Operation(
    "expert_linear", rule=_linear_rule, vjp=_linear_vjp,
    lower=lambda target, x, weights, *arrays, block, chosen, gather: grouped.expert_linear_forward(
        target, x, weights, _order(arrays, block, chosen), gather
    ),
)  # fmt: skip
EXPERT_LINEAR_GRADIENTS = Operation(
    "expert_linear_gradients", rule=_gradients_rule, lower=_gradients_lower, vjp=NOT_TWICE
)


def expert_linear(x: Any, weights: Array, order: Dispatch, gather: bool = False) -> Array:
    """x @ weights[expert]^T for every pair of a token and an expert: [N * k, M] in the order of experts, of x's type.

    weights [E, M, K] of float16, bfloat16, float32 or in blocks of any format, of which there is no gradient. With
    gather x [N, K] are tokens, each read by its k pairs; else x [N * k, K] are rows in the order of experts. With
    float64 operands composed of a product for each expert. ValueError for shapes that do not fit.
    """
    x = floats(x)
    if tl.float64 not in (x.dtype, weights.dtype):
        return EXPERT_LINEAR(x, weights, *order[:4], block=order.block, chosen=order.chosen, gather=bool(gather))
    grouped.extents(x, weights, order, gather)
    rows = take(x, order.source // order.chosen) if gather else x
    expert = e.greater_equal(arange(rows.shape[0]).expand_dims(1), order.offsets[1:]).astype(tl.int32).sum(1, True)
    plain = dequantize(weights, tl.float64)
    total = zeros((rows.shape[0], weights.shape[1]), tl.float64)
    for i in range(weights.shape[0]):
        total = total + e.where(e.equal(expert, i), rows @ plain[i].T, 0.0)
    return total.astype(x.dtype)


# ---------------------------------------------------------------------------------------------------------- their sum


def _combine_rule(y: Array, weights: Array | None, *arrays: Array, block: int, chosen: int) -> Any:
    return grouped.combined_extents(y, weights, _order(arrays, block, chosen)), y.dtype


def _combine_vjp(
    g: Array, out: Array, y: Array, weights: Array | None, *arrays: Array, block: int, chosen: int
) -> list[Any]:
    order = _order(arrays, block, chosen)
    if weights is None:
        pair = take(g, order.source // chosen), None
    else:
        pair = COMBINE_GRADIENTS(g, y, weights, *arrays, block=block, chosen=chosen)
    return [*pair, None, None, None, None]


COMBINE = Operation(
    "combine", rule=_combine_rule, vjp=_combine_vjp,
    lower=lambda target, y, weights, *arrays, block, chosen: grouped.combine_forward(
        target, y, weights, _order(arrays, block, chosen)
    ),
)  # fmt: skip
COMBINE_GRADIENTS = Operation(
    "combine_gradients", vjp=NOT_TWICE,
    rule=lambda d_out, y, weights, *arrays, block, chosen: [(y.shape, y.dtype), (weights.shape, tl.float32)],
    lower=lambda target, d_out, y, weights, *arrays, block, chosen: grouped.combine_backward(
        target, d_out, y, weights, _order(arrays, block, chosen)
    ),
)  # fmt: skip


def combine(y: Any, weights: Any, order: Dispatch) -> Array:
    """The rows of each token added up, times weights [N, k] (None: as they are): [N, M] of y's type.

    y [N * k, M] of floats in the order of experts. ValueError for shapes that do not fit.
    """
    y = floats(y)
    wide = y.dtype == tl.float64 or (weights is not None and weights.dtype == tl.float64)
    if not wide:
        weights = None if weights is None else weights.astype(tl.float32)
        return COMBINE(y, weights, *order[:4], block=order.block, chosen=order.chosen)
    grouped.combined_extents(y, weights, order)
    rows = take(y, order.place).reshape(-1, order.chosen, y.shape[1])
    return (rows if weights is None else rows * weights.expand_dims(-1)).sum(1).astype(y.dtype)


# ------------------------------------------------------------------------------------------------------- a whole layer


def mixture_of_experts(
    x: Any, logits: Any, gate: Array, up: Array, down: Array, chosen: int, scores: str = "softmax",
    normalise: bool = True, gelu: bool = False,
) -> Array:  # fmt: skip
    """The weighted sum over each token's `chosen` experts of (silu(x @ gate^T) * (x @ up^T)) @ down^T: [N, K] of x's
    type (Shazeer et al., "Outrageously large neural networks", 2017; with gates as in Mixtral and Qwen3).

    x [N, K], logits [N, E] of the router, gate and up [E, M, K] and down [E, K, M] of any storage; scores and normalise
    as in `route`; gelu: its tanh approximation instead of silu. ValueError for shapes that do not fit.
    """
    if logits.shape[1] != gate.shape[0]:
        raise ValueError(
            f"mixture_of_experts: the router's logits have shape {logits.shape}, but there are {gate.shape[0]} experts"
        )
    weights, places = route(logits, chosen, scores, normalise)
    order = dispatch(places, gate.shape[0])
    opened = expert_linear(x, gate, order, gather=True)
    opened = e.gelu(opened, approximate="tanh") if gelu else e.silu(opened)
    return combine(expert_linear(opened * expert_linear(x, up, order, gather=True), down, order), weights, order)

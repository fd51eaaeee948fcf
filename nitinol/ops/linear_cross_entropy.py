"""Cross entropy of hidden states and output weights, whose logits never exist as a whole.

Logits z = hidden @ weight^T of N tokens and V words are by far the largest array of training a small model: 1 GB in
fp32 for 8192 tokens and 32,000 words. Here they are computed twice, in blocks (as Wijmans et al., "Cut Your Losses in
Large-Vocabulary Language Models", 2024):

- Forward, a block of logits leaves its program only as a maximum, a sum of exponentials and, of the words that are
  targets, the logit.
- Backward, lse is known, so any block of d_logits can be had by itself. They are made for a share of the vocabulary
  at a time, for all tokens: each share's rows of d_weight are then complete, and what is summed up over the shares is
  d_hidden [N, D], the smaller of the two gradients.

Two products forward and backward are the same as with logits; a third one, for the second time, is the price: 4
products of N V D multiplications instead of 3.
"""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

from typing import Any

import numpy as np

import nitinol.language as tl
from nitinol.graph.array import Array
from nitinol.graph.conversion import as_operand
from nitinol.graph.launch import InPlace, Output, Strided, launch
from nitinol.graph.operation import Operation
from nitinol.language.jit import jit
from nitinol.ops.cross_entropy import (
    IGNORE_INDEX,
    check_d_loss,
    check_targets,
    check_tokens,
    composed_cross_entropy,
    cross_entropy_gradient_reference,
    cross_entropy_reference,
    d_loss_of,
    gradient_of,
    load_targets,
    loss_of,
    loss_results,
    reduce_losses,
)
from nitinol.ops.matmul import matmul
from nitinol.ops.matmul_kernels import matmul_kernel
from nitinol.ops.tiles import add_exponentials

SHARES = 32  # of the vocabulary, backward: memory for two of them is in use at a time
SMALLEST_SHARE = 512  # words: fewer make products too thin to be fast


@jit
def logits_block(
    hidden, weight, token, word, tokens, words, columns,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """hidden[token] @ weight[word]^T in fp32. Past the ends the last token and word stand in: loads without masks."""
    lane = tl.arange(0, BLOCK_D)
    left = hidden + tl.minimum(token, tokens - 1)[:, None].to(tl.int64) * columns + lane[None, :]
    right = weight + tl.minimum(word, words - 1)[:, None].to(tl.int64) * columns + lane[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    whole = columns if EVEN_D else columns // BLOCK_D * BLOCK_D
    for start in range(0, whole, BLOCK_D):
        acc = add_product(tl.load(left + start), tl.load(right + start), acc)
    if not EVEN_D:
        inside = (whole + lane < columns)[None, :]
        x = tl.load(left + whole, mask=inside, other=0.0)
        acc = add_product(x, tl.load(right + whole, mask=inside, other=0.0), acc)
    return acc


@jit
def add_product(x, y, acc):
    """acc + x @ y^T"""
    if x.dtype != y.dtype:
        return tl.dot(x.to(tl.float32), tl.trans(y.to(tl.float32)), acc)
    return tl.dot(x, tl.trans(y), acc)


@jit
def statistics_kernel(
    hidden, weight, targets, tops, totals, means, picks, tokens, words, columns, share, ignore_index,
    SMOOTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """Program (t, s): BLOCK_T tokens and words share * s .. share * (s + 1) - 1. Maximum, sum of exp(x - maximum),
    share of the mean logit, and the target's logit (0 from programs that do not have it), each [splits, tokens]."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    target, _ = load_targets(targets + token, token < tokens, words, ignore_index)
    top = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    mean = tl.zeros((BLOCK_T,), tl.float32)
    picked = tl.zeros((BLOCK_T,), tl.float32)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, words)
    for start in range(first, last, BLOCK_V):
        word = start + tl.arange(0, BLOCK_V)
        z = logits_block(hidden, weight, token, word, tokens, words, columns, BLOCK_T, BLOCK_V, BLOCK_D, EVEN_D)
        picked += tl.sum(tl.where(word[None, :] == target[:, None], z, 0.0), axis=1)
        if SMOOTH:
            mean += tl.sum(tl.where((word < last)[None, :], z, 0.0), axis=1) / words
        z = tl.where((word < last)[None, :], z, float("-inf"))
        top, total = add_exponentials(z, top, total, 1)
    at = tl.program_id(1).to(tl.int64) * tokens + token
    inside = token < tokens
    tl.store(tops + at, top, mask=inside)
    tl.store(totals + at, total, mask=inside)
    tl.store(picks + at, picked, mask=inside)
    if SMOOTH:
        tl.store(means + at, mean, mask=inside)


@jit
def combine_statistics_kernel(
    tops, totals, means, picks, targets, losses, lses, tokens, words, splits, ignore_index, smoothing, z_loss,
    SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program t: loss and lse of BLOCK tokens, from those of all splits of the vocabulary."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    _, counts = load_targets(targets + token, inside, words, ignore_index)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    for split in range(splits):
        top = tl.maximum(top, tl.load(tops + split.to(tl.int64) * tokens + token, mask=inside, other=0.0))
    total = tl.zeros((BLOCK,), tl.float32)
    mean = tl.zeros((BLOCK,), tl.float32)
    picked = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        at = split.to(tl.int64) * tokens + token
        shrink = tl.exp(tl.load(tops + at, mask=inside, other=0.0) - top)
        total += tl.load(totals + at, mask=inside, other=1.0) * shrink
        picked += tl.load(picks + at, mask=inside, other=0.0)
        if SMOOTH:
            mean += tl.load(means + at, mask=inside, other=0.0)
    lse = tl.log(total) + top
    tl.store(lses + token, lse, mask=inside)
    tl.store(losses + token, loss_of(lse, picked, mean, counts, smoothing, z_loss, SMOOTH), mask=inside)


@jit
def logits_gradient_kernel(
    hidden, weight, targets, lses, d_loss, scale, out, tokens, words, all_words, first_word, columns, ignore_index,
    smoothing, z_loss, SMOOTH: tl.constexpr, EACH: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """Program (t, v): a block of d_logits [tokens, words], of `words` rows of the weights from `first_word` on, of
    which `weight` is the first. EACH as in cross_entropy_gradient_kernel."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    word = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = token < tokens
    target, counts = load_targets(targets + token, inside, all_words, ignore_index)
    reader = tl.minimum(token, tokens - 1)
    slope = d_loss_of(d_loss + reader if EACH else d_loss, scale, counts)
    lse = tl.load(lses + reader)
    z = logits_block(hidden, weight, token, word, tokens, words, columns, BLOCK_T, BLOCK_V, BLOCK_D, EVEN_D)
    is_target = (first_word + word)[None, :] == target[:, None]
    gradient = gradient_of(z, lse[:, None], is_target, all_words, smoothing, z_loss, SMOOTH)
    gradient = tl.where(counts[:, None], gradient * slope[:, None], 0.0)
    at = token[:, None].to(tl.int64) * words + word[None, :]
    tl.store(out + at, gradient, mask=inside[:, None] & (word < words)[None, :])


def blocks(target: str, tokens: int, columns: int) -> dict[str, Any]:
    """A block of logits and of the columns that it is summed over, as those of a matrix product: the epilogue is short
    beside `columns` multiplications a logit."""
    block_t, block_v, block_d = {"cpu": (128, 128, 128), "metal": (64, 64, 32), "cuda": (128, 128, 64)}[target]
    block_t = min(block_t, max(16, tl.next_power_of_2(tokens)))
    block_d = min(block_d, max(16, tl.next_power_of_2(columns)))
    return {"BLOCK_T": block_t, "BLOCK_V": block_v, "BLOCK_D": block_d, "EVEN_D": columns % block_d == 0}


def programs(target: str) -> int:
    """How many programs forward should have, by splitting the vocabulary: enough for every core of a large machine.
    Fixed, so that results do not depend on the machine."""
    return {"cpu": 32, "metal": 64, "cuda": 256}[target]


def linear_cross_entropy_forward(
    target: str, hidden: Array, weight: Array, targets: Array, *, smoothing: float = 0.0, z_loss: float = 0.0,
    ignore_index: int = IGNORE_INDEX, reduction: str = "mean",
) -> tuple[Array, Array, Array | None]:  # fmt: skip
    """loss, lse, scale of hidden [N, D], weight [V, D] (float32, float16, bfloat16) and targets int32 or int64 [N]:
    what cross_entropy_forward gives of hidden @ weight^T, in fp32. Errors are the same."""
    tokens, words = check_operands(hidden, weight, targets, smoothing, reduction)
    columns = hidden.shape[1]
    constants = blocks(target, tokens, columns)
    programs_t = tl.cdiv(tokens, constants["BLOCK_T"])
    blocks_v = tl.cdiv(words, constants["BLOCK_V"])
    share = tl.cdiv(blocks_v, min(blocks_v, tl.cdiv(programs(target), programs_t))) * constants["BLOCK_V"]
    splits = tl.cdiv(words, share)
    part = Output((splits, tokens), "float32")
    found = launch(
        statistics_kernel, (programs_t, splits), hidden=hidden, weight=weight, targets=targets, tops=part, totals=part,
        means=part if smoothing else None, picks=part, tokens=tokens, words=words, columns=columns, share=share,
        ignore_index=ignore_index, SMOOTH=smoothing != 0, _operations=2 * tokens * words * columns, **constants,
    )  # fmt: skip
    tops, totals, *means, picks = found
    losses, lses = launch(
        combine_statistics_kernel, (tl.cdiv(tokens, 256),), tops=tops, totals=totals, picks=picks,
        means=means[0] if means else None, targets=targets, losses=Output((tokens,), "float32"),
        lses=Output((tokens,), "float32"), tokens=tokens, words=words, splits=splits, ignore_index=ignore_index,
        smoothing=float(smoothing), z_loss=float(z_loss), SMOOTH=smoothing != 0, BLOCK=256,
    )  # fmt: skip
    loss, scale = reduce_losses(losses, targets, ignore_index, reduction)
    return loss, lses, scale


def linear_cross_entropy_backward(
    target: str, d_loss: Array, hidden: Array, weight: Array, targets: Array, lse: Array, scale: Array | None = None,
    *, smoothing: float = 0.0, z_loss: float = 0.0, ignore_index: int = IGNORE_INDEX,
) -> tuple[Array, Array]:  # fmt: skip
    """d_hidden [N, D] and d_weight [V, D], of the operands' dtypes, from d_loss ([N], or [] of a sum or mean) and what
    forward gave. Blocks of d_logits are rounded to hidden's dtype; sums are fp32."""
    tokens, words = check_operands(hidden, weight, targets, smoothing, "none")
    check_d_loss("linear_cross_entropy", d_loss, tokens)
    columns = hidden.shape[1]
    constants = blocks(target, tokens, columns)
    share = max(SMALLEST_SHARE, tl.cdiv(tl.cdiv(words, SHARES), 128) * 128)
    d_weight: Any = None
    d_hidden: Any = None
    for first in range(0, words, share):
        rows = weight[first : first + share]
        count = rows.shape[0]
        d_logits = launch(
            logits_gradient_kernel, (tl.cdiv(tokens, constants["BLOCK_T"]), tl.cdiv(count, constants["BLOCK_V"])),
            hidden=hidden, weight=rows, targets=targets, lses=lse, d_loss=d_loss, scale=scale,
            out=Output((tokens, count), hidden.dtype), tokens=tokens, words=count, all_words=words, first_word=first,
            columns=columns, ignore_index=ignore_index, smoothing=float(smoothing), z_loss=float(z_loss),
            SMOOTH=smoothing != 0, EACH=d_loss.size > 1,
            _operations=2 * tokens * count * columns, **constants,
        )  # fmt: skip
        # The first product makes memory for all rows and fills its own.
        out = InPlace(d_weight[first : first + share]) if first else Output(weight.shape, weight.dtype)
        product = add_matmul(target, d_logits.T, hidden, None, out)
        d_weight = d_weight if first else product
        d_hidden = add_matmul(target, d_logits, rows, d_hidden, Output(hidden.shape, "float32"))
    return d_hidden.astype(hidden.dtype), d_weight


def add_matmul(target: str, a: Array, b: Array, residual: Array | None, out: Any) -> Any:
    """a [m, k] @ b [k, n] + residual [m, n], by their strides, as `out`: an Output, or state to write in place.

    Sums over the shares of the vocabulary are residuals: were they elementwise additions, every partial sum would be
    kept until the last had run, in case that one were fused with it.
    """
    (m, k), n = a.shape, b.shape[1]
    block_m, block_n, block_k = {"cpu": (64, 128, 128), "metal": (64, 64, 32), "cuda": (128, 128, 64)}[target]
    block_k = min(block_k, max(16, tl.next_power_of_2(k)))
    return launch(
        matmul_kernel, (tl.cdiv(n, block_n), tl.cdiv(m, block_m), 1), a=Strided(a), b=Strided(b), bias=None,
        residual=residual, gate=None, out=out, m=m, n=n, k=k, a_batch=0, a_m=a.strides[0], a_k=a.strides[1], b_batch=0,
        b_k=b.strides[0], b_n=b.strides[1], BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        EVEN=m % block_m == 0 and n % block_n == 0, EVEN_K=k % block_k == 0, _operations=2 * m * n * k,
    )  # fmt: skip


def check_operands(hidden: Any, weight: Any, targets: Any, smoothing: float, reduction: str) -> tuple[int, int]:
    """Tokens and words; ValueError or TypeError if something does not fit."""
    tokens, columns = check_targets("linear_cross_entropy", hidden, targets, smoothing, reduction)
    if len(weight.shape) != 2 or weight.shape[1] != columns or not weight.shape[0]:
        raise ValueError(
            f"linear_cross_entropy: hidden has shape {tuple(hidden.shape)} and the weights {tuple(weight.shape)}; "
            "expected [N, D] and [V, D]"
        )
    return tokens, weight.shape[0]


def linear_cross_entropy_reference(
    hidden: np.ndarray, weight: np.ndarray, targets: np.ndarray, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """loss and lse in float64; options as cross_entropy_reference has them."""
    return cross_entropy_reference(hidden.astype(np.float64) @ weight.astype(np.float64).T, targets, **options)


def linear_cross_entropy_gradient_reference(
    d_loss: np.ndarray, hidden: np.ndarray, weight: np.ndarray, targets: np.ndarray, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """d_hidden and d_weight in float64."""
    hidden, weight = hidden.astype(np.float64), weight.astype(np.float64)
    d_logits = cross_entropy_gradient_reference(d_loss, hidden @ weight.T, targets, **options)
    return d_logits @ weight, d_logits.T @ hidden


# -------------------------------------------------------------------------------------------------- the operations


def _rule(hidden: Array, weight: Array, targets: Array, **options: Any) -> list[tuple[tuple[int, ...], Any]]:
    tokens, _ = check_operands(hidden, weight, targets, options["smoothing"], options["reduction"])
    return loss_results(tokens, options["reduction"])


def _lower(target: str, hidden: Array, weight: Array, targets: Array, **options: Any) -> list[Array]:
    return [x for x in linear_cross_entropy_forward(target, hidden, weight, targets, **options) if x is not None]


def _vjp(g: Any, results: Any, hidden: Array, weight: Array, targets: Array, reduction: str, **options: Any) -> Any:
    """Of the loss; nobody sees the rest."""
    _, lse, *scale = results
    found = LINEAR_CROSS_ENTROPY_GRADIENT(
        g[0], hidden, weight, targets, lse, scale[0] if scale else None, **options
    )
    return *found, None


LINEAR_CROSS_ENTROPY = Operation("linear_cross_entropy", rule=_rule, lower=_lower, vjp=_vjp)
LINEAR_CROSS_ENTROPY_GRADIENT = Operation(
    "linear_cross_entropy_gradient", lower=linear_cross_entropy_backward,
    rule=lambda d_loss, hidden, weight, *others, **options: [(x.shape, x.dtype) for x in (hidden, weight)],
    vjp="a second derivative of the fused loss; float64 operands take a form that has one",
)  # fmt: skip


def linear_cross_entropy(
    hidden: Any, weight: Any, targets: Any, *, label_smoothing: float = 0.0, z_loss: float = 0.0,
    ignore_index: int = IGNORE_INDEX, reduction: str = "mean",
) -> Array:  # fmt: skip
    """cross_entropy(hidden @ weight^T, targets), see there, without the logits in memory: they are computed in blocks,
    forward and once more backward (Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024).

    hidden [..., D] and weight [V, D] of floats, targets [...] of int32 or int64. Where one of the operands is float64,
    the logits are in memory.
    """
    hidden, weight, targets = as_operand(hidden), as_operand(weight), as_operand(targets)
    shape = check_tokens("linear_cross_entropy", hidden, targets)
    options = {
        "smoothing": float(label_smoothing), "z_loss": float(z_loss), "ignore_index": int(ignore_index),
        "reduction": reduction,
    }  # fmt: skip
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if tl.float64 in (hidden.dtype, weight.dtype):
        check_operands(rows, weight, targets, options["smoothing"], reduction)
        loss = composed_cross_entropy(matmul(rows, weight.T), targets, **options)
    else:
        loss = LINEAR_CROSS_ENTROPY(rows, weight, targets, **options)[0]
    return loss.reshape(shape) if reduction == "none" else loss

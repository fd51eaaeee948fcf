"""Cross entropy of logits with integer targets: one pass over the logits forward, one backward.

Of a row z of V logits with target t, and lse = log(sum(exp(z))):

    loss = lse - (1 - smoothing) z[t] - smoothing mean(z) + z_loss lse^2
    d loss / d z = (1 + 2 z_loss lse) exp(z - lse) - (1 - smoothing) [v = t] - smoothing / V

Label smoothing (Szegedy et al., "Rethinking the Inception architecture", 2016) mixes the target with the uniform
distribution; the z-loss (Chowdhery et al., "PaLM", 2022) keeps lse near 0. Forward keeps lse, from which backward has
the probabilities without a sum. The sum of exponentials is online (Milakov and Gimelshein, 2018): whenever a block
raises the maximum, what was summed before shrinks by exp(old - new), so a row is read from memory once.
"""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

from typing import Any

import numpy as np

import nitinol.language as tl
from nitinol.graph.array import Array
from nitinol.graph.conversion import as_operand
from nitinol.graph.launch import InPlace, Output, launch
from nitinol.graph.operation import Operation
from nitinol.language.jit import jit
from nitinol.ops import elementwise as e
from nitinol.ops.creation import arange
from nitinol.ops.reductions import logsumexp
from nitinol.ops.tiles import add_exponentials, load_row, store_row

REDUCTIONS = ("none", "sum", "mean")
IGNORE_INDEX = -100  # PyTorch's and Hugging Face's mark of tokens without a target


@jit
def cross_entropy_kernel(
    logits, targets, losses, lses, columns, ignore_index, smoothing, z_loss, SMOOTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Program r: loss and lse of row r, BLOCK logits at a time."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    at = tl.arange(0, BLOCK)
    top, total, mean = float("-inf"), 0.0, 0.0
    for start in range(0, columns, BLOCK):
        value = load_row(logits + start, at, columns - start, False, float("-inf"))
        top, total = add_exponentials(value, top, total, 0)
        if SMOOTH:
            mean += tl.sum(tl.where(at < columns - start, value, 0.0)) / columns
    target, counts = load_targets(targets + row, True, columns, ignore_index)
    picked = tl.load(logits + target).to(tl.float32)
    lse = tl.log(total) + top
    tl.store(lses + row, lse)
    tl.store(losses + row, loss_of(lse, picked, mean, counts, smoothing, z_loss, SMOOTH))


@jit
def load_targets(pointers, inside, columns, ignore_index):
    """Targets, 0 where there is none; and where they count."""
    target = tl.load(pointers, mask=inside, other=ignore_index)
    counts = target != ignore_index
    known = (target >= 0) & (target < columns)
    tl.device_assert(known | (counts == 0), "cross entropy: a target is neither in the vocabulary nor ignore_index")
    return tl.where(known & counts, target, 0).to(tl.int32), counts


@jit
def loss_of(lse, picked, mean, counts, smoothing, z_loss, SMOOTH: tl.constexpr):
    """The losses of tokens with these lse, target's logits and mean logits; 0 for those that do not count."""
    loss = lse + z_loss * lse * lse
    if SMOOTH:
        loss -= (1.0 - smoothing) * picked + smoothing * mean
    else:
        loss -= picked
    return tl.where(counts, loss, 0.0)


@jit
def gradient_of(value, lse, is_target, columns, smoothing, z_loss, SMOOTH: tl.constexpr):
    """d loss / d logits; the arguments broadcast."""
    slope = tl.exp(value - lse) * (1.0 + 2.0 * z_loss * lse)
    if SMOOTH:
        return slope - tl.where(is_target, 1.0 - smoothing, 0.0) - smoothing / columns
    return slope - tl.where(is_target, 1.0, 0.0)


@jit
def reduce_losses_kernel(losses, targets, out, scale, tokens, ignore_index, BLOCK: tl.constexpr):
    """One program: the sum of the losses; with `scale`, the mean over the tokens that count, and scale = 1 / those."""
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, tokens, BLOCK):
        inside = at < tokens - start
        total += tl.load(losses + start + at, mask=inside, other=0.0)
        if scale is not None:
            count += (tl.load(targets + start + at, mask=inside, other=ignore_index) != ignore_index).to(tl.int32)
    loss = tl.sum(total)
    if scale is not None:
        one = 1.0 / tl.sum(count).to(tl.float32)
        tl.store(scale, one)
        loss *= one
    tl.store(out, loss)


@jit
def cross_entropy_gradient_kernel(
    logits, targets, lses, d_loss, scale, out, columns, ignore_index, smoothing, z_loss,
    SMOOTH: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program r * cdiv(columns, BLOCK) + c: BLOCK gradients of row r, to `out`, or over the logits where that is None.
    EACH: every token has its own d_loss; else there is one."""
    per_row = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // per_row).to(tl.int64)
    at = (tl.program_id(0) % per_row) * BLOCK + tl.arange(0, BLOCK)
    target, counts = load_targets(targets + row, True, columns, ignore_index)
    slope = d_loss_of(d_loss + row if EACH else d_loss, scale, counts)
    value = load_row(logits + row * columns, at, columns, False)
    gradient = gradient_of(value, tl.load(lses + row), at == target, columns, smoothing, z_loss, SMOOTH)
    # A row that does not count may hold anything, also logits whose gradient is NaN.
    gradient = tl.where(counts, gradient * slope, 0.0)
    store_row((logits if out is None else out) + row * columns, at, columns, gradient, False)


@jit
def d_loss_of(pointer, scale, counts):
    """What a token's gradient is multiplied by: d_loss, times 1 / tokens of a mean; 0 where it does not count."""
    slope = tl.load(pointer).to(tl.float32)
    if scale is not None:
        slope *= tl.load(scale)
    return tl.where(counts, slope, 0.0)


def blocks(target: str) -> dict[str, Any]:
    """Logits at a time. CPU: 8 KB of fp32, which the first cache keeps between the maximum and the exponentials; with
    16 KB and more, memory waits for the exponentials (1024 × 32,000 forward, one thread: 19 to 26 ms, with 4096 logits
    24 to 27). GPUs: 8 to 16 values a thread, loads of 16 bytes."""
    return {"BLOCK": {"cpu": 2048, "metal": 1024, "cuda": 4096}[target]}


def cross_entropy_forward(
    target: str, logits: Array, targets: Array, *, smoothing: float = 0.0, z_loss: float = 0.0,
    ignore_index: int = IGNORE_INDEX, reduction: str = "mean",
) -> tuple[Array, Array, Array | None]:  # fmt: skip
    """loss, lse, scale of logits [N, V] (float32, float16, bfloat16) and targets int32 or int64 [N].

    loss: float32 [N] ("none"), or [] ("sum"; "mean" over the tokens whose target is not ignore_index, NaN without
    any). lse float32 [N] and scale (float32 [1], 1 / tokens that count; None unless "mean") are for backward. A target
    that is neither in 0 .. V - 1 nor ignore_index fails an assertion when the kernel runs.

    Raises ValueError for shapes, options and TypeError for types that do not fit.
    """
    tokens, columns = check_targets("cross_entropy", logits, targets, smoothing, reduction)
    losses, lses = launch(
        cross_entropy_kernel, (tokens,), logits=logits, targets=targets, losses=Output((tokens,), "float32"),
        lses=Output((tokens,), "float32"), columns=columns, ignore_index=ignore_index, smoothing=float(smoothing),
        z_loss=float(z_loss), SMOOTH=smoothing != 0, **blocks(target),
    )  # fmt: skip
    loss, scale = reduce_losses(losses, targets, ignore_index, reduction)
    return loss, lses, scale


def reduce_losses(losses: Array, targets: Array, ignore_index: int, reduction: str) -> tuple[Array, Array | None]:
    """The losses [N], their sum [] or their mean [] over the tokens that count; and for the mean 1 / those, [1]."""
    if reduction == "none":
        return losses, None
    arguments = {"losses": losses, "targets": targets, "tokens": losses.shape[0], "ignore_index": ignore_index,
                 "BLOCK": 1024}  # fmt: skip
    if reduction == "sum":
        return launch(reduce_losses_kernel, (1,), out=Output((), "float32"), scale=None, **arguments), None
    outputs = {"out": Output((), "float32"), "scale": Output((1,), "float32")}
    loss, scale = launch(reduce_losses_kernel, (1,), **outputs, **arguments)
    return loss, scale


def cross_entropy_backward(
    target: str, d_loss: Array, logits: Array, targets: Array, lse: Array, scale: Array | None = None, *,
    smoothing: float = 0.0, z_loss: float = 0.0, ignore_index: int = IGNORE_INDEX, in_place: bool = False,
) -> Array:  # fmt: skip
    """d_logits [N, V] of the logits' dtype, from d_loss ([N], or [] of a sum or mean), and what forward gave.

    in_place: written over the logits, which nothing may need afterwards; they must be contiguous then.
    """
    tokens, columns = check_targets("cross_entropy", logits, targets, smoothing, "none")
    check_d_loss("cross_entropy", d_loss, tokens)
    arguments = {
        "targets": targets, "lses": lse, "d_loss": d_loss, "scale": scale, "columns": columns,
        "ignore_index": ignore_index, "smoothing": float(smoothing), "z_loss": float(z_loss), "SMOOTH": smoothing != 0,
        "EACH": d_loss.size > 1, **blocks(target),
    }  # fmt: skip
    grid = (tokens * tl.cdiv(columns, arguments["BLOCK"]),)
    if not in_place:
        return launch(cross_entropy_gradient_kernel, grid, logits=logits, out=Output(logits.shape, logits.dtype),
                      **arguments)  # fmt: skip
    if not logits.is_contiguous:
        raise ValueError(
            f"cross_entropy: the gradient is to be written over logits of shape {logits.shape} with strides "
            f"{logits.strides}; expected contiguous ones, or in_place=False"
        )
    launch(cross_entropy_gradient_kernel, grid, logits=InPlace(logits), out=None, **arguments)
    return logits


def check_targets(name: str, logits: Any, targets: Any, smoothing: float, reduction: str) -> tuple[int, int]:
    """Tokens N and columns of logits (or hidden states) [N, columns]; ValueError or TypeError if something is off."""
    if len(logits.shape) != 2 or tuple(targets.shape) != tuple(logits.shape[:1]) or not logits.shape[1]:
        raise ValueError(
            f"{name}: found shapes {tuple(logits.shape)} and {tuple(targets.shape)} of the targets; expected two axes "
            "[N, columns], not empty, and targets [N]; reshape leading axes to one"
        )
    if not targets.dtype.is_int:
        raise TypeError(f"{name}: the targets are of type {targets.dtype}, expected int32 or int64")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: the reduction is {reduction!r}, expected one of {', '.join(REDUCTIONS)}")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"{name}: label smoothing is {smoothing}, expected 0 to 1")
    return logits.shape[0], logits.shape[1]


def check_d_loss(name: str, d_loss: Any, tokens: int) -> None:
    """ValueError unless there is one d_loss, or one per token."""
    if tuple(d_loss.shape) not in ((), (1,), (tokens,)):
        raise ValueError(f"{name}: d_loss has shape {tuple(d_loss.shape)}, expected () or ({tokens},)")


def cross_entropy_reference(
    logits: np.ndarray, targets: np.ndarray, smoothing: float = 0.0, z_loss: float = 0.0,
    ignore_index: int = IGNORE_INDEX, reduction: str = "mean",
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """loss and lse in float64."""
    z = logits.astype(np.float64)
    top = z.max(axis=-1)
    lse = np.log(np.exp(z - top[:, None]).sum(axis=-1)) + top
    counts = targets != ignore_index
    loss = lse - (1 - smoothing) * z[np.arange(len(z)), np.where(counts, targets, 0)] + z_loss * lse**2
    if smoothing:
        loss -= smoothing * z.mean(axis=-1)
    loss = np.where(counts, loss, 0.0)
    return {"none": lambda: loss, "sum": loss.sum, "mean": lambda: loss.sum() / counts.sum()}[reduction](), lse


def cross_entropy_gradient_reference(
    d_loss: np.ndarray, logits: np.ndarray, targets: np.ndarray, smoothing: float = 0.0, z_loss: float = 0.0,
    ignore_index: int = IGNORE_INDEX, reduction: str = "mean",
) -> np.ndarray:  # fmt: skip
    """d_logits in float64."""
    z = logits.astype(np.float64)
    _, lse = cross_entropy_reference(logits, targets, ignore_index=ignore_index, reduction="none")
    counts = targets != ignore_index
    gradient = np.exp(z - lse[:, None]) * (1 + 2 * z_loss * lse[:, None]) - smoothing / z.shape[1]
    gradient[np.arange(len(z)), np.where(counts, targets, 0)] -= 1 - smoothing
    scale = np.where(counts, d_loss, 0.0) / (counts.sum() if reduction == "mean" else 1)
    return np.where(counts[:, None], gradient * scale[:, None], 0.0)


# -------------------------------------------------------------------------------------------------- the operations


def loss_results(tokens: int, reduction: str) -> list[tuple[tuple[int, ...], Any]]:
    """Shapes and dtypes of loss, lse and, of a mean, scale."""
    losses: list[Any] = [((tokens,) if reduction == "none" else (), tl.float32), ((tokens,), tl.float32)]
    return [*losses, ((1,), tl.float32)] if reduction == "mean" else losses


def _cross_entropy_rule(logits: Array, targets: Array, **options: Any) -> list[tuple[tuple[int, ...], Any]]:
    check_targets("cross_entropy", logits, targets, options["smoothing"], options["reduction"])
    return loss_results(logits.shape[0], options["reduction"])


def _cross_entropy_lower(target: str, logits: Array, targets: Array, **options: Any) -> list[Array]:
    return [x for x in cross_entropy_forward(target, logits, targets, **options) if x is not None]


def _cross_entropy_vjp(g: Any, results: Any, logits: Array, targets: Array, reduction: str, **options: Any) -> Any:
    """Of the loss; nobody sees the rest."""
    _, lse, *scale = results
    return CROSS_ENTROPY_GRADIENT(g[0], logits, targets, lse, scale[0] if scale else None, **options), None


CROSS_ENTROPY = Operation(
    "cross_entropy", rule=_cross_entropy_rule, lower=_cross_entropy_lower, vjp=_cross_entropy_vjp
)
CROSS_ENTROPY_GRADIENT = Operation(
    "cross_entropy_gradient", lower=cross_entropy_backward,
    rule=lambda d_loss, logits, *others, **options: (logits.shape, logits.dtype),
    vjp="a second derivative of the fused loss; float64 logits take a form that has one",
)  # fmt: skip


def cross_entropy(
    logits: Any, targets: Any, *, label_smoothing: float = 0.0, z_loss: float = 0.0, ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
) -> Array:  # fmt: skip
    """-log softmax(logits)[target] for each target: loss = lse - (1 - s) logits[target] - s mean(logits) + z lse^2,
    with lse = log(sum(exp(logits))), s the label smoothing (Szegedy et al., 2016) and z the z-loss (Chowdhery et al.,
    "PaLM", 2022).

    logits [..., V] of floats, targets [...] of int32 or int64. Tokens whose target is ignore_index do not count; any
    other target that is not in 0 .. V - 1 is an error when the operation runs. reduction: "mean" (over the tokens that
    count; NaN without any), "sum", or "none" for the shape of the targets. The result is float32, float64 of float64.

    Raises ValueError for shapes and options, TypeError for types that do not fit.
    """
    logits, targets = as_operand(logits), as_operand(targets)
    shape = check_tokens("cross_entropy", logits, targets)
    options = {
        "smoothing": float(label_smoothing), "z_loss": float(z_loss), "ignore_index": int(ignore_index),
        "reduction": reduction,
    }  # fmt: skip
    rows, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    if logits.dtype == tl.float64:
        check_targets("cross_entropy", rows, targets, options["smoothing"], reduction)
        loss = composed_cross_entropy(rows, targets, **options)
    else:
        loss = CROSS_ENTROPY(rows, targets, **options)[0]
    return loss.reshape(shape) if reduction == "none" else loss


def composed_cross_entropy(
    logits: Array, targets: Array, smoothing: float, z_loss: float, ignore_index: int, reduction: str
) -> Array:
    """The loss of logits [N, V] in elementwise operations and reductions."""
    counts = e.not_equal(targets, ignore_index)
    lse = logsumexp(logits, -1)
    hit = e.equal(arange(logits.shape[1]).reshape(1, -1), targets.reshape(-1, 1))
    loss = lse + lse * lse * z_loss - e.where(hit, logits, 0.0).sum(1) * (1.0 - smoothing)
    loss = loss - logits.mean(1) * smoothing if smoothing else loss
    loss = e.where(counts, loss, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counts.astype(loss.dtype).sum()


def check_tokens(name: str, logits: Array, targets: Array) -> tuple[int, ...]:
    """The targets' shape; ValueError or TypeError unless logits (or hidden states) are floats [..., columns] for it."""
    if not logits.ndim or not logits.shape[-1] or logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"{name}: found shapes {logits.shape} and {targets.shape} of the targets; expected [..., columns], not "
            "empty, and targets [...]"
        )
    if not logits.dtype.is_float:
        raise TypeError(f"{name} of an array of {logits.dtype}, expected floats; cast with .astype()")
    return targets.shape

"""Attention for training, forward and backward, in memory that grows with the sequence and not with its square (Dao,
"FlashAttention-2", 2023): softmax(scale q k^T, masked) v, whose scores and weights never leave a program.

Every query head has T queries, every head of keys and values S keys; `heads` is a multiple of `kv_heads`, and
neighbouring query heads share keys and values (Ainslie et al., 2023). The last query stands at the last key, so query i
stands at place i + S - T.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import nitinol.language as tl
from nitinol.graph.array import Array
from nitinol.graph.conversion import as_operand
from nitinol.graph.launch import Output, Strided, launch
from nitinol.graph.operation import Operation
from nitinol.language.types import DType, bfloat16, float16, float32, float64
from nitinol.ops.attention_composed import composed_attention
from nitinol.ops.attention_gradients import (
    add_parts_kernel,
    key_gradients_kernel,
    query_gradients_kernel,
    row_products_kernel,
)
from nitinol.ops.attention_kernel import attention_kernel
from nitinol.ops.attention_tiles import widths

LOG2_E = math.log2(math.e)
PROGRAMS = 16  # that a backward pass which adds up dq in parts has at least, whatever the number of threads


@dataclass(frozen=True)
class Problem:
    """Operands as [batch, heads, rows, head_dim] views, and what the kernels are told of them."""

    q: Array
    k: Array
    v: Array
    packed: bool
    starts_q: Array | None
    starts_k: Array | None
    window: int | None
    causal: bool
    scale: float
    softcap: float | None
    blocks: dict[str, Any]

    @property
    def sequences(self) -> int:
        return self.starts_q.shape[0] - 1 if self.starts_q is not None else 0

    def row_blocks(self, rows: int, block: int) -> int:
        """Programs that blocks of so many rows take: see `own_block`."""
        return tl.cdiv(rows, block) if not self.packed else rows // block + self.sequences

    def arguments(self) -> dict[str, Any]:
        """What all kernels but the sums take."""
        dot = self.blocks["DOT"]
        factor = self.scale * LOG2_E if self.softcap is None else self.scale / self.softcap
        return {
            "q": Strided(self.q), "k": Strided(self.k), "v": Strided(self.v), **strides("q", self.q),
            **strides("k", self.k), **strides("v", self.v), "starts_q": self.starts_q, "starts_k": self.starts_k,
            "tokens": self.q.shape[2], "context": self.k.shape[2], "sequences": self.sequences,
            "window": self.window or 0, "factor": factor, "cap": (self.softcap or 0.0) * LOG2_E,
            "GROUP": self.q.shape[1] // self.k.shape[1], "CAUSAL": self.causal, "WINDOW": self.window is not None,
            "CAP": self.softcap is not None, "DOT": dot, **head_constants(self.q),
        }  # fmt: skip


def attention_forward(
    target: str, q: Array, k: Array, v: Array, *, scale: float | None = None, causal: bool = False,
    window: int | None = None, softcap: float | None = None, cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """(out, lse): attention in q's shape and dtype, and float32 [batch, heads, T], the log-sum-exp of each query's
    scores, which the backward pass needs.

    q [batch, heads, T, head_dim], k and v [batch, kv_heads, S, head_dim], all float32, float16 or bfloat16, in any
    order of the first three axes without a copy. With `cu_seqlens_q` int32 [n + 1], the first rows of n sequences and
    the end of the last, the operands are packed: q [total_q, heads, head_dim], k and v [total_k, kv_heads, head_dim],
    lse [heads, total_q]; `cu_seqlens_k` is the same for keys, equal to `cu_seqlens_q` unless given.

    scale: of the scores, 1 / sqrt(head_dim) unless given. causal: queries see keys up to their place. window: they see
    the last `window` keys up to theirs, with causal; otherwise those and all later ones. softcap: scores x become
    softcap * tanh(x / softcap) (Gemma 2, 2024). A query without a key gives zeros, and an lse of -inf.

    target: "cpu", "metal" or "cuda", for the sizes of blocks. Raises ValueError for operands that do not fit.
    """
    problem = checked(target, q, k, v, scale, causal, window, softcap, cu_seqlens_q, cu_seqlens_k)
    out, lse = forward(problem)
    return restored(out, problem.q, problem.packed), lse[0] if problem.packed else lse


def forward(problem: Problem) -> tuple[Array, Array]:
    """out, its axes in the order of `result_shape(q)`, and lse [batch, heads, T]."""
    batch, heads, tokens, _ = problem.q.shape
    block_m, block_n, warps = problem.blocks["forward"]
    out, out_strides = result_like("out", problem.q)
    return launch(
        attention_kernel, (problem.row_blocks(tokens, block_m), heads, batch), out=out, **out_strides,
        lse=Output((batch, heads, tokens), "float32"), BLOCK_M=block_m, BLOCK_N=block_n, _warps=warps,
        _operations=operations(problem, 2), **problem.arguments(),
    )  # fmt: skip


def attention_backward(
    target: str, q: Array, k: Array, v: Array, out: Array, lse: Array, d_out: Array, *, scale: float | None = None,
    causal: bool = False, window: int | None = None, softcap: float | None = None, cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """(dq, dk, dv), in the shapes and dtypes of q, k and v: the gradients of sum(out * d_out), where `out` and `lse`
    are what `attention_forward` gave for the same arguments. Raises ValueError for operands that do not fit."""
    problem = checked(target, q, k, v, scale, causal, window, softcap, cu_seqlens_q, cu_seqlens_k)
    for name, given, like in (("out", out, q), ("d_out", d_out, q)):
        if tuple(given.shape) != tuple(like.shape):
            raise ValueError(f"attention_backward: {name} has shape {given.shape}, expected q's {like.shape}")
    batch, heads, tokens, _ = problem.q.shape
    if tuple(lse.shape) != ((heads, tokens) if problem.packed else (batch, heads, tokens)):
        raise ValueError(f"attention_backward: lse has shape {lse.shape}, expected what attention_forward gave for q "
                         f"of shape {q.shape}: one number for each query of each head")  # fmt: skip
    out, d_out = (as_heads(x, problem.packed) for x in (out, d_out))
    found = backward(problem, out, lse[None] if problem.packed else lse, d_out)
    dq, dk, dv = (restored(x, like, problem.packed) for x, like in zip(found, (problem.q, problem.k, problem.v)))
    return dq, dk, dv


def backward(problem: Problem, out: Array, lse: Array, d_out: Array) -> tuple[Array, Array, Array]:
    """dq, dk, dv, their axes in the order of `result_shape`, from [batch, heads, T, head_dim] views and lse [batch,
    heads, T]."""
    batch, heads, tokens, head_dim = problem.q.shape
    _, kv_heads, context, _ = problem.k.shape
    rows = problem.blocks["rows"]
    delta = launch(
        row_products_kernel, (tl.cdiv(tokens, rows), heads, batch), out=Strided(out), d_out=Strided(d_out),
        delta=Output((batch, heads, tokens), "float32"), tokens=tokens, BLOCK_M=rows, **strides("out", out),
        **strides("d", d_out), **head_constants(problem.q),
    )  # fmt: skip
    shared = {"d_out": Strided(d_out), **strides("d", d_out), "lse": lse, "delta": delta, **problem.arguments()}
    block_m, block_n, warps = problem.blocks["keys"]
    blocks = problem.row_blocks(context, block_n)
    programs = blocks
    partial = None
    if problem.blocks["dq in parts"]:
        programs = max(1, min(blocks, tl.cdiv(PROGRAMS, batch * kv_heads)))
        partial = Output((programs, batch, heads, tokens, head_dim), "float32")
    (dk, dk_strides), (dv, dv_strides) = (result_like(name, x) for name, x in (("dk", problem.k), ("dv", problem.v)))
    dk, dv, *parts = launch(
        key_gradients_kernel, (programs, kv_heads, batch), dk=dk, dv=dv, dq=partial, blocks=blocks, BLOCK_M=block_m,
        BLOCK_N=block_n, scale=problem.scale, _warps=warps, _operations=operations(problem, 5 if partial else 4),
        **dk_strides, **dv_strides, **shared,
    )  # fmt: skip
    dq, dq_strides = result_like("dq", problem.q)
    if parts:
        # with fp32 products the keys that ds was multiplied by had the factor in them
        scale = problem.scale / shared["factor"] if problem.blocks["DOT"] == float32 else problem.scale
        dq = launch(
            add_parts_kernel, (tl.cdiv(tokens, rows), heads, batch), part=parts[0], dq=dq, parts=programs,
            tokens=tokens, scale=scale, BLOCK_M=rows, **dq_strides, **head_constants(problem.q),
        )  # fmt: skip
    else:
        block_m, block_n, warps = problem.blocks["queries"]
        dq = launch(
            query_gradients_kernel, (problem.row_blocks(tokens, block_m), heads, batch), dq=dq, scale=problem.scale,
            BLOCK_M=block_m, BLOCK_N=block_n, _warps=warps, _operations=operations(problem, 3), **dq_strides, **shared,
        )  # fmt: skip
    return dq, dk, dv


def blocks(target: str, head_dim: int, dtype: Any) -> dict[str, Any]:
    """For each kernel (BLOCK_M queries, BLOCK_N keys, warps; 0: the compiler chooses), the rows of the row sums,
    whether dq is added up in parts by the programs of keys, and DOT, what is multiplied in."""
    if target == "cuda":
        half = dtype.nbytes == 2
        return {
            "forward": (128 if half else 64, 64 if head_dim <= 128 else 32, 8 if half else 4),
            "keys": (32, 64, 4), "queries": (64, 32, 4), "rows": 32, "dq in parts": False, "DOT": dtype,
        }  # fmt: skip
    if target == "metal":  # 32 KB of threadgroup memory
        size = 32 if head_dim <= 64 else 16
        return {"forward": (32, 32, 4), "keys": (size, size, 4), "queries": (size, size, 4), "rows": 32,
                "dq in parts": False, "DOT": dtype}  # fmt: skip
    # Halves: AVX-512 multiplies pairs of bfloat16 at twice the rate of fp32, and nothing of float16.
    return {"forward": (128, 128, 0), "keys": (64, 128, 0), "queries": (64, 64, 0), "rows": 16, "dq in parts": True,
            "DOT": float32 if dtype == float16 else dtype}  # fmt: skip


def checked(
    target: str, q: Array, k: Array, v: Array, scale: float | None, causal: bool, window: int | None,
    softcap: float | None, starts_q: Array | None, starts_k: Array | None,
) -> Problem:  # fmt: skip
    """The operands as the kernels take them, or a ValueError."""
    starts_k = starts_q if starts_k is None else starts_k
    check(q, k, v, window, softcap, starts_q, starts_k)
    packed = starts_q is not None
    q, k, v = (as_heads(x, packed) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return Problem(q, k, v, packed, starts_q, starts_k, window, causal, scale, softcap,
                   blocks(target, q.shape[-1], q.dtype))  # fmt: skip


def check(
    q: Array, k: Array, v: Array, window: int | None, softcap: float | None, starts_q: Array | None,
    starts_k: Array | None,
) -> None:  # fmt: skip
    """ValueError for operands that do not fit."""
    packed = starts_q is not None
    shape = "q [total_q, heads, head_dim] and k, v [total_k, kv_heads, head_dim]"
    if not packed:
        shape = "q [batch, heads, T, head_dim] and k, v [batch, kv_heads, S, head_dim]"
    found = f"attention: q, k, v have shapes {q.shape}, {k.shape}, {v.shape}; expected {shape}"
    if q.ndim != (3 if packed else 4) or k.ndim != q.ndim or tuple(k.shape) != tuple(v.shape):
        raise ValueError(found)
    head_dim = q.shape[-1]
    heads, kv_heads = q.shape[1], k.shape[1]
    batches = q.shape[:-3] == k.shape[:-3]
    if not batches or head_dim != k.shape[-1] or kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{found}, heads a multiple of kv_heads")
    if not 0 < head_dim <= 256:
        raise ValueError(f"attention with a head_dim of {head_dim}: expected 1 to 256")
    if q.dtype not in (float32, float16, bfloat16, float64) or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; expected one of float32, "
                         "float16 and bfloat16 for all three, or float64, which is not fused")  # fmt: skip
    for name, value, least in (("window", window, 1), ("softcap", softcap, 0)):
        if value is not None and (value < least or value == 0):
            raise ValueError(f"attention: {name} is {value}, expected a positive number, or None for no {name}")
    if starts_q is None and starts_k is not None:
        raise ValueError("attention: cu_seqlens_k without cu_seqlens_q; give both, or the latter if they are equal")
    for name, starts in (("cu_seqlens_q", starts_q), ("cu_seqlens_k", starts_k)):
        wanted = None if starts is None else (max(2, starts_q.shape[0]),)  # type: ignore[union-attr]
        if starts is not None and (tuple(starts.shape) != wanted or starts.dtype != tl.int32):
            raise ValueError(f"attention: {name} is {starts.dtype} of shape {starts.shape}; expected int32 [n + 1], "
                             "the first rows of n sequences and the end of the last, the same n for both")  # fmt: skip


def as_heads(x: Array, packed: bool) -> Array:
    """A view [batch, heads, rows, head_dim] whose last axis is contiguous; a copy if that is not."""
    if x.strides[-1] != 1 and x.shape[-1] != 1:
        x = x.contiguous()
    return x[None].swapaxes(1, 2) if packed else x


def turned(x: Array) -> bool:
    """Whether an operand's heads lie next to each other, as projections give them; its results' heads then do too."""
    return x.strides[1] < x.strides[2]


def result_shape(x: Array) -> tuple[int, ...]:
    """Of what has an operand's shape [batch, heads, rows, head_dim]: that, or [batch, rows, heads, head_dim]."""
    batch, heads, rows, head_dim = x.shape
    return (batch, rows, heads, head_dim) if turned(x) else x.shape


def result_like(name: str, x: Array) -> tuple[Output, dict[str, int]]:
    """A contiguous result for the output or an operand's gradient, and its strides as arguments."""
    _, heads, rows, head_dim = x.shape
    steps = (head_dim, heads * head_dim) if turned(x) else (rows * head_dim, head_dim)
    return Output(result_shape(x), x.dtype), _named(name, (heads * rows * head_dim, *steps))


def heads_first(result: Array, like: Array) -> Array:
    """A result of shape `result_shape(like)` as [batch, heads, rows, head_dim]."""
    return result.swapaxes(1, 2) if turned(like) else result


def restored(result: Array, like: Array, packed: bool) -> Array:
    """A result in the order of axes that the operands came in."""
    result = heads_first(result, like)
    return result[0].swapaxes(0, 1) if packed else result


def strides(name: str, x: Array) -> dict[str, int]:
    return _named(name, x.strides[:3])


def _named(name: str, steps: tuple[int, ...]) -> dict[str, int]:
    return {f"{name}_{axis}": step for axis, step in zip(("batch", "head", "row"), steps)}


def head_constants(x: Array) -> dict[str, Any]:
    return {"HEAD_DIM": x.shape[-1], "WIDTHS": widths(x.shape[-1])}


def operations(problem: Problem, products: int) -> int:
    """Operations of so many products of every query with every key, about half of them where it is causal."""
    batch, heads, tokens, head_dim = problem.q.shape
    every = 2 * products * batch * heads * tokens * problem.k.shape[2] * head_dim
    return every // 2 if problem.causal else every


# -------------------------------------------------------------------------------------------------- the operations


def _problem(
    target: str, q: Array, k: Array, v: Array, starts_q: Array | None, starts_k: Array | None, options: dict[str, Any]
) -> Problem:
    """Of the operations' operands, [batch, heads, rows, head_dim] views whose last axis is contiguous."""
    return Problem(q, k, v, starts_q is not None, starts_q, starts_k, **options,
                   blocks=blocks(target, q.shape[-1], q.dtype))  # fmt: skip


def _attention_lower(
    target: str, q: Array, k: Array, v: Array, starts_q: Array | None, starts_k: Array | None, **options: Any
) -> tuple[Array, Array]:
    return forward(_problem(target, q, k, v, starts_q, starts_k, options))


def _attention_vjp(
    g: tuple[Array, Array], results: tuple[Array, Array], q: Array, k: Array, v: Array, starts_q: Array | None,
    starts_k: Array | None, **options: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """Of `out`; nobody sees lse."""
    found = ATTENTION_GRADIENT(q, k, v, starts_q, starts_k, *results, g[0], **options)
    return *[heads_first(x, like) for x, like in zip(found, (q, k, v))], None, None


def _gradient_lower(
    target: str, q: Array, k: Array, v: Array, starts_q: Array | None, starts_k: Array | None, out: Array, lse: Array,
    d_out: Array, **options: Any,
) -> tuple[Array, Array, Array]:  # fmt: skip
    out, d_out = (as_heads(heads_first(x, q), False) for x in (out, d_out))
    return backward(_problem(target, q, k, v, starts_q, starts_k, options), out, lse, d_out)


def _attention_rule(q: Array, *others: Any, **options: Any) -> list[tuple[tuple[int, ...], DType]]:
    return [(result_shape(q), q.dtype), (q.shape[:3], float32)]


ATTENTION = Operation("attention", rule=_attention_rule, lower=_attention_lower, vjp=_attention_vjp)
ATTENTION_GRADIENT = Operation(
    "attention_gradient", lower=_gradient_lower,
    rule=lambda q, k, v, *others, **options: [(result_shape(x), x.dtype) for x in (q, k, v)],
    vjp="a second derivative of fused attention; float64 operands take a form that has one",
)  # fmt: skip


def attention(
    q: Any, k: Any, v: Any, *, scale: float | None = None, causal: bool = False, window: int | None = None,
    softcap: float | None = None, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
) -> Array:  # fmt: skip
    """softmax(scale q k^T, masked) v, in q's shape and dtype, without the scores in memory (Dao, "FlashAttention-2",
    2023); of float64 with them.

    q [batch, heads, T, head_dim], k and v [batch, kv_heads, S, head_dim], heads a multiple of kv_heads, of one dtype;
    they may be views with any order of the first three axes. The last query stands at the last key.
    scale: 1 / sqrt(head_dim) unless given. causal: queries see keys up to their place. window: no more than the last
    `window` of these; without `causal` also all later ones. softcap: scores x become softcap * tanh(x / softcap).
    cu_seqlens_q: int32 [n + 1], where n packed sequences start and the last one ends: then q is [total_q, heads,
    head_dim], k and v [total_k, kv_heads, head_dim]. cu_seqlens_k: the same for keys where it differs.

    A query that sees no key gives zeros. Raises ValueError for operands that do not fit.
    """
    q, k, v, starts_q, starts_k = map(as_operand, (q, k, v, cu_seqlens_q, cu_seqlens_k))
    starts_k = starts_q if starts_k is None else starts_k
    check(q, k, v, window, softcap, starts_q, starts_k)
    packed = starts_q is not None
    q, k, v = (as_heads(x, packed) for x in (q, k, v))
    options: dict[str, Any] = {
        "scale": q.shape[-1] ** -0.5 if scale is None else float(scale), "causal": bool(causal), "window": window,
        "softcap": None if softcap is None else float(softcap),
    }  # fmt: skip
    if q.dtype == float64:
        out = composed_attention(q, k, v, starts_q, starts_k, **options)
        return out[0].swapaxes(0, 1) if packed else out
    out, _ = ATTENTION(q, k, v, starts_q, starts_k, **options)
    return restored(out, q, packed)

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
from nitinol.graph.launch import Output, Strided, launch
from nitinol.language.types import bfloat16, float16, float32
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
    batch, heads, tokens, _ = problem.q.shape
    block_m, block_n, warps = problem.blocks["forward"]
    out, turned, out_strides = result_like("out", problem.q)
    out, lse = launch(
        attention_kernel, (problem.row_blocks(tokens, block_m), heads, batch), out=out, **out_strides,
        lse=Output((batch, heads, tokens), "float32"), BLOCK_M=block_m, BLOCK_N=block_n, _warps=warps,
        _operations=operations(problem, 2), **problem.arguments(),
    )  # fmt: skip
    return restored(problem, out, turned), lse[0] if problem.packed else lse


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
    batch, heads, tokens, head_dim = problem.q.shape
    _, kv_heads, context, _ = problem.k.shape
    if tuple(lse.shape) != ((heads, tokens) if problem.packed else (batch, heads, tokens)):
        raise ValueError(f"attention_backward: lse has shape {lse.shape}, expected what attention_forward gave for q "
                         f"of shape {q.shape}: one number for each query of each head")  # fmt: skip
    out, d_out = (as_heads(x, problem.packed) for x in (out, d_out))
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
    (dk, k_turned, dk_strides), (dv, v_turned, dv_strides) = (
        result_like(name, x) for name, x in (("dk", problem.k), ("dv", problem.v))
    )
    dk, dv, *parts = launch(
        key_gradients_kernel, (programs, kv_heads, batch), dk=dk, dv=dv, dq=partial, blocks=blocks, BLOCK_M=block_m,
        BLOCK_N=block_n, scale=problem.scale, _warps=warps, _operations=operations(problem, 5 if partial else 4),
        **dk_strides, **dv_strides, **shared,
    )  # fmt: skip
    dq, q_turned, dq_strides = result_like("dq", problem.q)
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
    return restored(problem, dq, q_turned), restored(problem, dk, k_turned), restored(problem, dv, v_turned)


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
    packed = starts_q is not None
    shape = "q [total_q, heads, head_dim] and k, v [total_k, kv_heads, head_dim]"
    if not packed:
        shape = "q [batch, heads, T, head_dim] and k, v [batch, kv_heads, S, head_dim]"
    if q.ndim != (3 if packed else 4) or k.ndim != q.ndim or tuple(k.shape) != tuple(v.shape):
        raise ValueError(f"attention: q, k, v have shapes {q.shape}, {k.shape}, {v.shape}; expected {shape}")
    heads_first = as_heads(q, packed), as_heads(k, packed), as_heads(v, packed)
    (batch, heads, _, head_dim), (k_batch, kv_heads, _, k_head_dim) = (x.shape for x in heads_first[:2])
    if (batch, head_dim) != (k_batch, k_head_dim) or kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"attention: q, k, v have shapes {q.shape}, {k.shape}, {v.shape}; expected {shape}, "
                         "heads a multiple of kv_heads")  # fmt: skip
    if not 0 < head_dim <= 256:
        raise ValueError(f"attention with a head_dim of {head_dim}: expected 1 to 256")
    if q.dtype not in (float32, float16, bfloat16) or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; expected one of float32, "
                         "float16 and bfloat16 for all three")  # fmt: skip
    for name, value, least in (("window", window, 1), ("softcap", softcap, 0)):
        if value is not None and (value < least or value == 0):
            raise ValueError(f"attention: {name} is {value}, expected a positive number, or None for no {name}")
    if starts_k is None:
        starts_k = starts_q
    if starts_q is None and starts_k is not None:
        raise ValueError("attention: cu_seqlens_k without cu_seqlens_q; give both, or the latter if they are equal")
    for name, starts in (("cu_seqlens_q", starts_q), ("cu_seqlens_k", starts_k)):
        wanted = None if starts is None else (max(2, starts_q.shape[0]),)  # type: ignore[union-attr]
        if starts is not None and (tuple(starts.shape) != wanted or starts.dtype != tl.int32):
            raise ValueError(f"attention: {name} is {starts.dtype} of shape {starts.shape}; expected int32 [n + 1], "
                             "the first rows of n sequences and the end of the last, the same n for both")  # fmt: skip
    scale = head_dim**-0.5 if scale is None else float(scale)
    return Problem(*heads_first, packed, starts_q, starts_k, window, causal, scale, softcap,
                   blocks(target, head_dim, q.dtype))  # fmt: skip


def as_heads(x: Array, packed: bool) -> Array:
    """A view [batch, heads, rows, head_dim] whose last axis is contiguous; a copy if that is not."""
    if x.strides[-1] != 1 and x.shape[-1] != 1:
        x = x.contiguous()
    return x[None].swapaxes(1, 2) if packed else x


def result_like(name: str, x: Array) -> tuple[Output, bool, dict[str, int]]:
    """A contiguous result for an operand's gradient or the output, whether its axes are [batch, rows, heads, head_dim],
    as they are where the operand's heads lie next to each other, and its strides as arguments."""
    batch, heads, rows, head_dim = x.shape
    if x.strides[1] < x.strides[2]:
        steps = (rows * heads * head_dim, head_dim, heads * head_dim)
        return Output((batch, rows, heads, head_dim), x.dtype), True, _named(name, steps)
    return Output(x.shape, x.dtype), False, _named(name, (heads * rows * head_dim, rows * head_dim, head_dim))


def restored(problem: Problem, result: Array, turned: bool) -> Array:
    """A result in the order of axes that the operands came in."""
    heads_first = result.swapaxes(1, 2) if turned else result
    return heads_first[0].swapaxes(0, 1) if problem.packed else heads_first


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

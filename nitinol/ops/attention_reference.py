"""Attention and its gradients in NumPy at float64, with all scores in memory: what the kernels are compared with."""

from __future__ import annotations

import numpy as np


def attention_reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, *, scale: float | None = None, causal: bool = False,
    window: int | None = None, softcap: float | None = None, cu_seqlens_q: np.ndarray | None = None,
    cu_seqlens_k: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(out, lse), as `attention_forward`."""
    found = _gradients(q, k, v, None, scale, causal, window, softcap, cu_seqlens_q, cu_seqlens_k)
    return found[0], found[1]


def attention_gradients_reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, d_out: np.ndarray, *, scale: float | None = None,
    causal: bool = False, window: int | None = None, softcap: float | None = None,
    cu_seqlens_q: np.ndarray | None = None, cu_seqlens_k: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """(dq, dk, dv), as `attention_backward`: by the chain rule from the weights, without the kernels' shortcuts."""
    found = _gradients(q, k, v, d_out, scale, causal, window, softcap, cu_seqlens_q, cu_seqlens_k)
    return found[2], found[3], found[4]


def _gradients(q, k, v, d_out, scale, causal, window, softcap, cu_seqlens_q, cu_seqlens_k):  # type: ignore[no-untyped-def]
    """(out, lse, dq, dk, dv); without d_out the gradients of zeros."""
    q, k, v, d_out = (x.astype(np.float64) for x in (q, k, v, np.zeros(q.shape) if d_out is None else d_out))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if cu_seqlens_q is None:
        return _dense(q, k, v, d_out, scale, causal, window, softcap)
    starts = cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    out, dq, dk, dv = (np.zeros(x.shape) for x in (q, q, k, v))
    lse = np.full((q.shape[1], q.shape[0]), -np.inf)
    for number in range(len(starts[0]) - 1):
        queries, keys = (slice(s[number], s[number + 1]) for s in starts)
        of_q, of_d_out = (x[queries].swapaxes(0, 1)[None] for x in (q, d_out))
        of_k, of_v = (x[keys].swapaxes(0, 1)[None] for x in (k, v))
        found = _dense(of_q, of_k, of_v, of_d_out, scale, causal, window, softcap)
        lse[:, queries] = found[1][0]
        for whole, rows, part in zip((out, dq, dk, dv), (queries, queries, keys, keys), (found[0], *found[2:])):
            whole[rows] = part[0].swapaxes(0, 1)
    return out, lse, dq, dk, dv


def _dense(q, k, v, d_out, scale, causal, window, softcap):  # type: ignore[no-untyped-def]
    group = q.shape[1] // k.shape[1]
    keys, values = (np.repeat(x, group, axis=1) for x in (k, v))
    tokens, context = q.shape[2], k.shape[2]
    place, key = np.arange(tokens)[:, None] + context - tokens, np.arange(context)[None, :]
    seen = np.ones((tokens, context), bool)
    if causal:
        seen &= key <= place
    if window is not None:
        seen &= key > place - window
    raw = np.einsum("bhtd,bhsd->bhts", q, keys) * scale
    capped = raw if softcap is None else softcap * np.tanh(raw / softcap)
    scores = np.where(seen, capped, -np.inf)
    top = np.max(scores, axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isinf(top), 0.0, top))
    total = weights.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    weights /= np.where(total == 0, 1.0, total)
    d_weights = np.einsum("bhtd,bhsd->bhts", d_out, values)
    d_scores = weights * (d_weights - np.sum(weights * d_weights, axis=-1, keepdims=True))
    d_raw = d_scores if softcap is None else d_scores * (1 - np.tanh(raw / softcap) ** 2)
    dk = np.einsum("bhts,bhtd->bhsd", d_raw, q) * scale
    dv = np.einsum("bhts,bhtd->bhsd", weights, d_out)
    dk, dv = (x.reshape(*k.shape[:2], group, *k.shape[2:]).sum(axis=2) for x in (dk, dv))
    out, dq = np.einsum("bhts,bhsd->bhtd", weights, values), np.einsum("bhts,bhsd->bhtd", d_raw, keys) * scale
    return out, lse, dq, dk, dv

"""Kernels in the style of Triton's tutorials, interpreted and compiled for the CPU, against plain NumPy in float64.

Tolerances: fp32 sums of n terms of magnitude about 1 err by less than n * 2**-24; fp16 results by 2**-11 relative.
"""

from __future__ import annotations

import numpy as np
import pytest
from test_frontend import ENGINES, runner

import nitinol.language as tl
from nitinol.runtime.kernel import jit


@pytest.fixture(params=ENGINES)
def run(request):
    return runner(request.param)


@pytest.fixture
def rng():
    return np.random.default_rng()


@jit
def fused_softmax(out_ptr, in_ptr, in_stride, out_stride, n_rows, n_cols, BLOCK: tl.constexpr):
    row_start = tl.program_id(0)
    row_step = tl.num_programs(0)
    for row in tl.range(row_start, n_rows, row_step, num_stages=2):
        columns = tl.arange(0, BLOCK)
        mask = columns < n_cols
        values = tl.load(in_ptr + row * in_stride + columns, mask=mask, other=-float("inf"))
        shifted = values - tl.max(values, axis=0)
        numerator = tl.exp(shifted)
        tl.store(out_ptr + row * out_stride + columns, numerator / tl.sum(numerator, axis=0), mask=mask)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_fused_softmax(run, rng):
    rows, columns = int(rng.integers(3, 9)), int(rng.integers(20, 33))
    x = rng.normal(size=(rows, columns)).astype(np.float32)
    out = np.full_like(x, np.nan)
    run(fused_softmax, (2,), out, x, columns, columns, rows, columns, BLOCK=32)
    np.testing.assert_allclose(out, softmax(x.astype(np.float64)), rtol=1e-5)


@jit
def softmax_by_name(out_ptr, in_ptr, N: tl.constexpr):
    lanes = tl.arange(0, N)
    tl.store(out_ptr + lanes, tl.softmax(tl.load(in_ptr + lanes)))


def test_softmax_of_the_library(run, rng):
    x, out = rng.normal(size=16).astype(np.float32), np.zeros(16, np.float32)
    run(softmax_by_name, (1,), out, x, 16)
    np.testing.assert_allclose(out, softmax(x.astype(np.float64)), rtol=1e-5)


@jit
def leaky_relu(x):
    return tl.where(x >= 0, x, 0.01 * x)


@jit
def matmul(
    a_ptr, b_ptr, c_ptr, M, N, K,
    stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_cn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(axis=0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group_size = GROUP_M * tiles_n
    first_m = pid // group_size * GROUP_M
    rows_in_group = min(tiles_m - first_m, GROUP_M)
    tile_m = first_m + (pid % group_size) % rows_in_group
    tile_n = (pid % group_size) // rows_in_group

    m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)) % M
    n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)) % N
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + (m[:, None] * stride_am + k[None, :] * stride_ak)
    b_ptrs = b_ptr + (k[:, None] * stride_bk + n[None, :] * stride_bn)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, tl.cdiv(K, BLOCK_K)):
        a = tl.load(a_ptrs, mask=k[None, :] < K - step * BLOCK_K, other=0.0)
        b = tl.load(b_ptrs, mask=k[:, None] < K - step * BLOCK_K, other=0.0)
        accumulator = tl.dot(a, b, accumulator)
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk
    if ACTIVATION == "leaky_relu":
        accumulator = leaky_relu(accumulator)
    c = accumulator.to(tl.float16)

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    c_ptrs = c_ptr + stride_cm * m[:, None] + stride_cn * n[None, :]
    tl.store(c_ptrs, c, mask=(m[:, None] < M) & (n[None, :] < N))


@pytest.mark.parametrize("activation", ["", "leaky_relu"])
def test_matmul_with_grouped_ordering(run, rng, activation):
    m, n, k = (int(v) for v in rng.integers(17, 50, 3))
    a, b = rng.normal(size=(m, k)).astype(np.float16), rng.normal(size=(n, k)).astype(np.float16).T
    c = np.full((m, n), np.nan, np.float16)
    grid = (-(-m // 16) * -(-n // 16),)
    run(matmul, grid, a, b, c, m, n, k, k, 1, 1, k, n, 1, 16, 16, 16, 2, activation)
    expected = a.astype(np.float64) @ b.astype(np.float64)
    if activation:
        expected = np.where(expected >= 0, expected, 0.01 * expected)
    np.testing.assert_allclose(c, expected, rtol=1e-3, atol=1e-3)


@jit
def dropout(x_ptr, out_ptr, n, p, seed, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask)
    keep = tl.rand(seed, offsets) > p
    tl.store(out_ptr + offsets, tl.where(keep, x / (1 - p), 0.0), mask=mask)


def test_dropout(run, rng):
    n, p = 3000, 0.25
    x = rng.uniform(1, 2, n).astype(np.float32)
    first, second, other = (np.full(n, np.nan, np.float32) for _ in range(3))
    for out, seed in ((first, 17), (second, 17), (other, 18)):
        run(dropout, (3,), x, out, n, p, seed, BLOCK=1024)
    assert np.array_equal(first, second) and not np.array_equal(first, other)
    kept = first != 0
    np.testing.assert_allclose(first[kept], x[kept] / 0.75, rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 0.04  # five standard deviations


@jit
def layer_norm_forward(
    x_ptr, y_ptr, w_ptr, b_ptr, mean_ptr, rstd_ptr, stride, N, eps, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    y_ptr += row * stride
    x_ptr += row * stride
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for offset in range(0, N, BLOCK):
        columns = offset + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / N
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for offset in range(0, N, BLOCK):
        columns = offset + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
        x = tl.where(columns < N, x - mean, 0.0)
        total += x * x
    rstd = 1 / tl.sqrt(tl.sum(total, axis=0) / N + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    for offset in range(0, N, BLOCK):
        columns = offset + tl.arange(0, BLOCK)
        mask = columns < N
        w = tl.load(w_ptr + columns, mask=mask)
        b = tl.load(b_ptr + columns, mask=mask)
        x = tl.load(x_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + columns, (x - mean) * rstd * w + b, mask=mask)


@jit
def layer_norm_backward(
    dx_ptr, dy_ptr, dw_ptr, db_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, lock_ptr, stride, N,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of a row, and partial sums of dw and db in GROUPS buffers, each guarded by a lock and a count."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < N
    x_ptr += row * stride
    dy_ptr += row * stride
    dx_ptr += row * stride
    group = row % GROUPS
    lock_ptr += group
    count_ptr = lock_ptr + GROUPS
    dw_ptrs = dw_ptr + group * N + columns
    db_ptrs = db_ptr + group * N + columns
    x = tl.load(x_ptr + columns, mask=mask, other=0).to(tl.float32)
    dy = tl.load(dy_ptr + columns, mask=mask, other=0).to(tl.float32)
    w = tl.load(w_ptr + columns, mask=mask).to(tl.float32)
    mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    normal = tl.where(mask, (x - mean) * rstd, 0.0)
    wdy = tl.where(mask, w * dy, 0.0)
    c1 = tl.sum(normal * wdy, axis=0) / N
    c2 = tl.sum(wdy, axis=0) / N
    tl.store(dx_ptr + columns, (wdy - (normal * c1 + c2)) * rstd, mask=mask)
    partial_dw = (dy * normal).to(w.dtype)
    partial_db = dy.to(w.dtype)
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    count = tl.load(count_ptr)
    if count == 0:
        tl.atomic_xchg(count_ptr, 1)
    else:
        partial_dw += tl.load(dw_ptrs, mask=mask)
        partial_db += tl.load(db_ptrs, mask=mask)
    tl.store(dw_ptrs, partial_dw, mask=mask)
    tl.store(db_ptrs, partial_db, mask=mask)
    tl.debug_barrier()
    tl.atomic_xchg(lock_ptr, 0)


def test_layer_norm_forward_and_backward(run, rng):
    rows, columns, groups, eps = 7, 27, 2, 1e-5
    x, dy = (rng.normal(size=(rows, columns)).astype(np.float32) for _ in range(2))
    w, b = (rng.normal(size=columns).astype(np.float32) for _ in range(2))
    y, dx = np.full_like(x, np.nan), np.full_like(x, np.nan)
    mean, rstd = np.zeros(rows, np.float32), np.zeros(rows, np.float32)
    run(layer_norm_forward, (rows,), x, y, w, b, mean, rstd, columns, columns, eps, BLOCK=16)
    d = x.astype(np.float64)
    scale = 1 / np.sqrt(d.var(1, keepdims=True) + eps)
    normal = (d - d.mean(1, keepdims=True)) * scale
    np.testing.assert_allclose(y, normal * w + b, rtol=1e-4, atol=1e-5)

    dw, db = (np.full((groups, columns), np.nan, np.float32) for _ in range(2))
    locks = np.zeros(2 * groups, np.int32)
    run(layer_norm_backward, (rows,), dx, dy, dw, db, x, w, mean, rstd, locks, columns, columns, groups, BLOCK=32)
    wdy = w * dy.astype(np.float64)
    c1, c2 = (normal * wdy).mean(1, keepdims=True), wdy.mean(1, keepdims=True)
    np.testing.assert_allclose(dx, (wdy - normal * c1 - c2) * scale, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dw.sum(0), (dy * normal).sum(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(db.sum(0), dy.sum(0), rtol=1e-4, atol=1e-5)
    assert locks.tolist() == [0] * groups + [1] * groups


@jit
def attention_block(
    acc, l_i, m_i, q, k_ptr, v_ptr, start_m, scale, n_ctx,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD: tl.constexpr, STAGE: tl.constexpr,
    offs_m: tl.constexpr, offs_n: tl.constexpr,
):  # fmt: skip
    """One sweep over keys: STAGE 1 the blocks left of the diagonal, 2 the one on it, 3 all (no mask)."""
    if STAGE == 1:
        low, high = 0, start_m * BLOCK_M
    elif STAGE == 2:
        low, high = start_m * BLOCK_M, (start_m + 1) * BLOCK_M
        low = tl.multiple_of(low, BLOCK_M)
    else:
        low, high = 0, n_ctx
    d = tl.arange(0, HEAD)
    for start_n in range(low, high, BLOCK_N):
        start_n = tl.multiple_of(start_n, BLOCK_N)
        n = start_n + tl.arange(0, BLOCK_N)
        k = tl.load(k_ptr + d[:, None] + n[None, :] * HEAD, mask=n[None, :] < n_ctx, other=0.0)
        qk = tl.dot(q, k) * scale
        if STAGE == 2:
            m = start_m * BLOCK_M + tl.arange(0, BLOCK_M)
            qk = qk + tl.where(m[:, None] >= n[None, :], 0, -1.0e6)
        else:
            qk = tl.where(n[None, :] < n_ctx, qk, -1.0e6)
        m_ij = tl.maximum(m_i, tl.max(qk, 1))
        p = tl.math.exp2(qk - m_ij[:, None])
        alpha = tl.math.exp2(m_i - m_ij)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        v = tl.load(v_ptr + n[:, None] * HEAD + d[None, :], mask=n[:, None] < n_ctx, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc)
        m_i = m_ij
    return acc, l_i, m_i


@jit
def flash_attention(
    q_ptr, k_ptr, v_ptr, out_ptr, stride_head, n_ctx, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    tl.static_assert(BLOCK_N <= BLOCK_M)
    start_m = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    q_ptr += head * stride_head
    k_ptr += head * stride_head
    v_ptr += head * stride_head
    out_ptr += head * stride_head
    m = start_m * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, HEAD)
    rows = m[:, None] * HEAD + d[None, :]
    m_i = tl.zeros([BLOCK_M], dtype=tl.float32) - float("inf")
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32) + 1.0 * 0
    acc = tl.zeros([BLOCK_M, HEAD], dtype=tl.float32)
    q = tl.load(q_ptr + rows, mask=m[:, None] < n_ctx, other=0.0)
    if CAUSAL:
        acc, l_i, m_i = attention_block(
            acc, l_i, m_i, q, k_ptr, v_ptr, start_m, scale * 1.44269504, n_ctx, BLOCK_M, BLOCK_N, HEAD, 1, 0, 0
        )
        acc, l_i, m_i = attention_block(
            acc, l_i, m_i, q, k_ptr, v_ptr, start_m, scale * 1.44269504, n_ctx, BLOCK_M, BLOCK_N, HEAD, 2, 0, 0
        )
    else:
        acc, l_i, m_i = attention_block(
            acc, l_i, m_i, q, k_ptr, v_ptr, start_m, scale * 1.44269504, n_ctx, BLOCK_M, BLOCK_N, HEAD, 3, 0, 0
        )
    acc = acc / l_i[:, None]
    tl.store(out_ptr + rows, acc.to(out_ptr.type.element_ty), mask=m[:, None] < n_ctx)


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention(run, rng, causal):
    heads, tokens, width = 2, int(rng.integers(33, 60)), 16
    q, k, v = (rng.normal(size=(heads, tokens, width)).astype(np.float32) for _ in range(3))
    out = np.full_like(q, np.nan)
    scale = width**-0.5
    grid = (-(-tokens // 16), heads)
    run(flash_attention, grid, q, k, v, out, tokens * width, tokens, scale, 16, 8, width, causal)
    scores = np.einsum("hmd,hnd->hmn", q.astype(np.float64), k) * scale
    if causal:
        scores = np.where(np.tri(tokens, dtype=bool), scores, -np.inf)
    np.testing.assert_allclose(out, softmax(scores) @ v, rtol=1e-4, atol=1e-5)


@jit
def grouped_order(out_ptr, M: tl.constexpr, N: tl.constexpr, G: tl.constexpr):
    pid = tl.program_id(0)
    i, j = tl.swizzle2d(pid // N, pid % N, M, N, G)
    tl.store(out_ptr + i * N + j, pid)


def test_swizzle2d(run):
    out = np.full((4, 4), -1, np.int32)
    run(grouped_order, (16,), out, 4, 4, 2)
    assert out.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]]
    out = np.full((5, 4), -1, np.int32)
    run(grouped_order, (20,), out, 5, 4, 2)
    assert sorted(out.ravel().tolist()) == list(range(20)) and out[4].tolist() == [16, 17, 18, 19]


@jit
def cross_entropy(loss_ptr, logits_ptr, labels_ptr, n_cols, ignored, BLOCK: tl.constexpr):
    """Log-sum-exp over blocks with a running maximum; rows with the ignored label give zero."""
    row = tl.program_id(0)
    label = tl.load(labels_ptr + row)
    if label == ignored:
        tl.store(loss_ptr + row, 0.0)
        return
    logits_ptr += row * n_cols
    top = float("-inf")
    total = 0.0
    for start in range(0, n_cols, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + offsets, mask=offsets < n_cols, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(x))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(x - new_top))
        top = new_top
    tl.store(loss_ptr + row, top + tl.log(total) - tl.load(logits_ptr + label))


def test_cross_entropy(run, rng):
    rows, columns = 5, 45
    logits = rng.normal(size=(rows, columns)).astype(np.float32)
    labels = rng.integers(0, columns, rows)
    labels[2] = -100
    loss = np.full(rows, np.nan, np.float32)
    run(cross_entropy, (rows,), loss, logits, labels, columns, -100, BLOCK=16)
    d = logits.astype(np.float64)
    expected = np.log(np.exp(d).sum(1)) - d[np.arange(rows), np.maximum(labels, 0)]
    np.testing.assert_allclose(loss, np.where(labels >= 0, expected, 0), rtol=1e-5, atol=1e-5)


@jit
def places_kernel(out, x, n, rows: tl.constexpr, columns: tl.constexpr):
    row = tl.arange(0, rows)
    inside = tl.minimum(row, n)
    values = tl.load(x + inside[:, None] * columns + tl.arange(0, columns)[None, :])
    tl.store(out + row, tl.sum(values, axis=1) + tl.abs(row) + tl.maximum(n, row))


@pytest.mark.parametrize("rows", [2, 4, 8, 32])
@pytest.mark.parametrize("warps", [1, 4, 8])
def test_a_place_that_is_a_threads_own_number_is_an_int32_like_any_other(rows, warps):
    """Metal's thread numbers are 16 bits wide: `min(lane, n)` of one and an int names no function."""
    x, out = np.random.default_rng().normal(size=(rows, 128)).astype(np.float32), np.full(rows, np.nan, np.float32)
    places_kernel[1,](out, x, 3, rows=rows, columns=128, num_warps=warps)
    row = np.arange(rows)
    expected = x[np.minimum(row, 3)].sum(axis=1, dtype=np.float64) + row + np.maximum(row, 3)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-4)

"""Kernels that benchmarks/nvidia.py runs through official Triton as they stand here, and through Nitinol with
`nitinol` in place of `triton` in the imports: one text for both.

Written plainly, in the style of Triton's tutorials; block sizes are the caller's. Rows fit one block, except where a
loop is written; matrices and sequences are whole numbers of tiles.
"""

import triton
import triton.language as tl


@triton.jit
def add(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """out[n] = x[n] + y[n]"""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=mask) + tl.load(y_ptr + i, mask=mask), mask=mask)


@triton.jit
def softmax(x_ptr, out_ptr, columns, BLOCK: tl.constexpr):
    """Softmax of each row of x[rows, columns]."""
    row = tl.program_id(0).to(tl.int64) * columns
    j = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row + j, mask=j < columns, other=-float("inf")).to(tl.float32)
    power = tl.exp(x - tl.max(x, axis=0))
    tl.store(out_ptr + row + j, power / tl.sum(power, axis=0), mask=j < columns)


@triton.jit
def rms_norm(x_ptr, weight_ptr, out_ptr, columns, epsilon, BLOCK: tl.constexpr):
    """x / sqrt(mean(x²) + epsilon) * weight, for each row of x[rows, columns]."""
    row = tl.program_id(0).to(tl.int64) * columns
    j = tl.arange(0, BLOCK)
    mask = j < columns
    x = tl.load(x_ptr + row + j, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / columns + epsilon)
    weight = tl.load(weight_ptr + j, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row + j, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def layer_norm(x_ptr, weight_ptr, bias_ptr, out_ptr, columns, epsilon, BLOCK: tl.constexpr):
    """(x - mean) / sqrt(variance + epsilon) * weight + bias, for each row of x[rows, columns]."""
    row = tl.program_id(0).to(tl.int64) * columns
    j = tl.arange(0, BLOCK)
    mask = j < columns
    x = tl.load(x_ptr + row + j, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / columns
    centred = tl.where(mask, x - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=0) / columns + epsilon)
    weight = tl.load(weight_ptr + j, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + j, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row + j, (centred * scale * weight + bias).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def cross_entropy(logits_ptr, target_ptr, loss_ptr, columns, BLOCK: tl.constexpr):
    """loss[rows] = log(sum(exp(logits))) - logits[target], in one pass over logits[rows, columns]."""
    row = tl.program_id(0).to(tl.int64) * columns
    j = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        x = tl.load(logits_ptr + row + start + j, mask=start + j < columns, other=-float("inf")).to(tl.float32)
        new = tl.maximum(largest, x)
        total = total * tl.exp(largest - new) + tl.exp(x - new)
        largest = new
    most = tl.max(largest, axis=0)
    total_all = tl.sum(total * tl.exp(largest - most), axis=0)
    target = tl.load(target_ptr + tl.program_id(0))
    chosen = tl.load(logits_ptr + row + target).to(tl.float32)
    tl.store(loss_ptr + tl.program_id(0), tl.log(total_all) + most - chosen)


@triton.jit
def swiglu(gate_ptr, up_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """out[n] = gate * sigmoid(gate) * up"""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    gate = tl.load(gate_ptr + i, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, (gate / (1.0 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rope(x_ptr, cos_ptr, sin_ptr, out_ptr, heads, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Turns each pair (x[i], x[i + HALF]) of x[tokens, heads, 2 * HALF] by the angle i of cos, sin [tokens, HALF]."""
    token = tl.program_id(0)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i = tl.arange(0, HALF)
    cos = tl.load(cos_ptr + token * HALF + i)[None, :]
    sin = tl.load(sin_ptr + token * HALF + i)[None, :]
    place = (token * heads + h[:, None]) * (2 * HALF) + i[None, :]
    mask = (h < heads)[:, None]
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(x_ptr + place + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, (x * cos - y * sin).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + place + HALF, (y * cos + x * sin).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def matmul(a_ptr, b_ptr, out_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
           GROUP: tl.constexpr):  # fmt: skip
    """out[M, N] = a[M, K] @ b[K, N]; programs in groups of GROUP rows of tiles, whose operands stay in the L2 cache."""
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = program // (GROUP * tiles_n)
    rows = min(tiles_m - group * GROUP, GROUP)
    tile_m = group * GROUP + program % (GROUP * tiles_n) % rows
    tile_n = program % (GROUP * tiles_n) // rows
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_tile = a_ptr + m[:, None] * K + k[None, :]
    b_tile = b_ptr + k[:, None] * N + n[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(0, K, BLOCK_K):
        total = tl.dot(tl.load(a_tile), tl.load(b_tile), total)
        a_tile += BLOCK_K
        b_tile += BLOCK_K * N
    tl.store(out_ptr + m[:, None] * N + n[None, :], total.to(out_ptr.dtype.element_ty))


@triton.jit
def attention(q_ptr, k_ptr, v_ptr, out_ptr, scale, tokens, D: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_N: tl.constexpr):  # fmt: skip
    """Causal attention over q, k, v, out [heads, tokens, D], with the running softmax; the longest rows first."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64) * tokens * D
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, D)
    q = tl.load(q_ptr + head + m[:, None] * D + d[None, :])
    k_tile = k_ptr + head + n[None, :] * D + d[:, None]
    v_tile = v_ptr + head + n[:, None] * D + d[None, :]
    largest = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, D], tl.float32)
    scale *= 1.4426950408889634  # exp(x) = exp2(x / log(2))
    for _ in range(0, tile * BLOCK_M, BLOCK_N):  # what every row of the tile sees
        s = tl.dot(q, tl.load(k_tile)) * scale
        new = tl.maximum(largest, tl.max(s, axis=1))
        p = tl.exp2(s - new[:, None])
        shrink = tl.exp2(largest - new)
        total = total * shrink + tl.sum(p, axis=1)
        out = tl.dot(p.to(v_ptr.dtype.element_ty), tl.load(v_tile), out * shrink[:, None])
        largest = new
        k_tile += BLOCK_N * D
        v_tile += BLOCK_N * D
    for start in range(tile * BLOCK_M, tile * BLOCK_M + BLOCK_M, BLOCK_N):  # the diagonal
        s = tl.dot(q, tl.load(k_tile)) * scale
        s = tl.where(m[:, None] >= start + n[None, :], s, -1e30)
        new = tl.maximum(largest, tl.max(s, axis=1))
        p = tl.exp2(s - new[:, None])
        shrink = tl.exp2(largest - new)
        total = total * shrink + tl.sum(p, axis=1)
        out = tl.dot(p.to(v_ptr.dtype.element_ty), tl.load(v_tile), out * shrink[:, None])
        largest = new
        k_tile += BLOCK_N * D
        v_tile += BLOCK_N * D
    out = out / total[:, None]
    tl.store(out_ptr + head + m[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty))

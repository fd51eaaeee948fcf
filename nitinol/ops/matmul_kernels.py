"""Products of matrices: with quantised weights for a prompt of many tokens, and of plain matrices.

Quantised: every 32 values of a row have their scales, so each step is an integer dot product over 32 values of a block
of tokens and a block of rows, times both scales. A block of weights is decoded once for all tokens of the block. The
products take unsigned weights and signed activations, which is what the dot instructions of CPUs multiply: signed
weights are moved up by 128 and the sum starts at -128 times the sum of the activations, exactly.
"""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

import nitinol.language as tl
from nitinol.language.jit import jit
from nitinol.ops.decode import decode, side_by_side
from nitinol.ops.epilogue import finish
from nitinol.ops.tiles import part


@jit(do_not_specialize=["tokens"])
def quantized_matmul_kernel(
    x, x_scales, x_sums, weights, bias, residual, gate, out, tokens, rows, columns, row_bytes,
    FORMAT: tl.constexpr, BLOCKS: tl.constexpr, VALUES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN_N: tl.constexpr, GELU: tl.constexpr = False,
):  # fmt: skip
    """Program (n, t): BLOCK_N rows of the weights for BLOCK_T tokens. out [tokens, rows] = x @ weights^T, finished as
    epilogue.finish says. EVEN_N: rows is a multiple of BLOCK_N. Of tokens nothing is known, so that prompts of all
    lengths share the compiled kernels."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    source = row if EVEN_N else tl.minimum(row, rows - 1)
    reader = tl.minimum(token, tokens - 1)
    pointers = weights + source.to(tl.int64) * row_bytes
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for run in range(0, columns // VALUES):
        slices, scale, minimum = decode(pointers, run * BLOCKS, FORMAT, BLOCKS)
        quants = side_by_side(slices)
        for group in tl.static_range(VALUES // 32):
            place = run * (VALUES // 32) + group
            x_scale = tl.load(x_scales + reader * (columns // 32) + place)
            for half in tl.static_range(scale.shape[2]):
                length: tl.constexpr = 32 // scale.shape[2]
                index: tl.constexpr = group * scale.shape[2] + half
                at = place * 32 + half * length + tl.arange(0, length)
                value = tl.load(x + reader[:, None] * columns + at[None, :])
                total = integer_sum(x_sums + reader * (columns // 16) + place * 2, half, length)
                weight = part(tl.reshape(quants, (BLOCK_N, VALUES // length, length)), index)
                w_scale = tl.reshape(part(tl.reshape(scale, (BLOCK_N, VALUES // length, 1)), index), (1, BLOCK_N))
                dots = byte_products(value, weight, total)
                acc += dots.to(tl.float32) * (x_scale[:, None] * w_scale)
                if minimum is not None:
                    low = tl.reshape(part(tl.reshape(minimum, (BLOCK_N, VALUES // length, 1)), index), (1, BLOCK_N))
                    acc += (total.to(tl.float32) * x_scale)[:, None] * low
    finish(acc, out, token, row, tokens, rows, bias, residual, gate, False, GELU)


@jit
def integer_sum(sums, half: tl.constexpr, length: tl.constexpr):
    """The sum of the 16 integers of a half of a group, or of all 32."""
    if length == 16:
        return tl.load(sums + half)
    return tl.load(sums) + tl.load(sums + 1)


@jit
def byte_products(value, weight, total):
    """int32 value [tokens, n] @ weight [rows, n]^T; `total` are the rows' sums of value."""
    if weight.dtype == tl.uint8:
        return tl.dot(value, tl.trans(weight))
    lifted = weight.to(tl.uint8, bitcast=True) ^ 0x80
    start = tl.broadcast_to((total * -128)[:, None], (value.shape[0], weight.shape[0]))
    return tl.dot(value, tl.trans(lifted), start)


@jit
def matmul_kernel(
    a, b, bias, residual, gate, out, m, n, k, a_batch, a_m, a_k, b_batch, b_k, b_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, EVEN_K: tl.constexpr,
    M_FIRST: tl.constexpr = False, GELU: tl.constexpr = False,
):  # fmt: skip
    """Program (n, m, batch): a block of out [batch, m, n] = a @ b, finished as epilogue.finish says. M_FIRST: program
    (m, n, batch), so that programs that run at a time share blocks of b.

    The names with an underscore are strides in elements, 0 for an operand that all batches share. Operands of one
    half type are multiplied as such, others in float32; sums are float32. EVEN: m and n are multiples of the blocks.
    """
    row = tl.program_id(0 if M_FIRST else 1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1 if M_FIRST else 0) * BLOCK_N + tl.arange(0, BLOCK_N)
    batch = tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, BLOCK_K)
    rows = row if EVEN else tl.minimum(row, m - 1)
    left = a + batch * a_batch + rows[:, None].to(tl.int64) * a_m + lane[None, :] * a_k
    if EVEN:
        right = b + batch * b_batch + lane[:, None].to(tl.int64) * b_k + column[None, :].to(tl.int64) * b_n
    elif b_n == 1:  # clamping would hide that columns are neighbours
        right = b + batch * b_batch + lane[:, None].to(tl.int64) * b_k + column[None, :]
    else:
        right = b + batch * b_batch + lane[:, None] * b_k + tl.minimum(column, n - 1)[None, :].to(tl.int64) * b_n
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    whole = k // BLOCK_K * BLOCK_K
    inside = (column < n)[None, :]
    for start in range(0, whole, BLOCK_K):
        y = right + start * b_k
        if EVEN or b_n != 1:
            acc = multiply(tl.load(left + start * a_k), tl.load(y), acc)
        else:
            acc = multiply(tl.load(left + start * a_k), tl.load(y, mask=inside, other=0.0), acc)
    if not EVEN_K:
        valid = whole + lane < k
        x = tl.load(left + whole * a_k, mask=valid[None, :], other=0.0)
        y = tl.load(right + whole * b_k, mask=valid[:, None] & inside, other=0.0)
        acc = multiply(x, y, acc)
    finish(acc, out + batch * m * n, row, column, m, n, bias, residual, gate, EVEN, GELU)


@jit
def multiply(x, y, acc):
    """acc + x @ y"""
    if x.dtype != y.dtype:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), acc)
    return tl.dot(x, y, acc)

"""What products with weights do to a block of results before it leaves the registers."""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

import nitinol.language as tl
from nitinol.language.jit import jit


@jit
def silu(x):
    """x * sigmoid(x)"""
    return x / (1.0 + tl.exp(-x))


@jit
def finish(y, out, token, row, tokens, rows, bias, residual, gate, EVEN: tl.constexpr):
    """out[token, row] = silu(gate) * y + bias + residual of the same place; those that are None are left out.

    y [tokens, rows] of a block, token and row its indices, out [tokens, rows] of the whole; bias [rows], gate and
    residual like out. EVEN: no index is outside.
    """
    at = token[:, None].to(tl.int64) * rows + row[None, :]
    if EVEN:
        if gate is not None:
            y = silu(tl.load(gate + at)) * y
        if bias is not None:
            y += tl.load(bias + row).to(tl.float32)[None, :]
        if residual is not None:
            y += tl.load(residual + at)
        tl.store(out + at, y)
    else:
        inside = (token < tokens)[:, None] & (row < rows)[None, :]
        if gate is not None:
            y = silu(tl.load(gate + at, mask=inside, other=0.0)) * y
        if bias is not None:
            y += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
        if residual is not None:
            y += tl.load(residual + at, mask=inside, other=0.0)
        tl.store(out + at, y, mask=inside)

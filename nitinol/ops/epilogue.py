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
def gelu(x):
    """x * Phi(x) by its approximation 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) (Hendrycks and Gimpel, 2016),
    as x * sigmoid(2 ...)."""
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@jit
def activate(x, GELU: tl.constexpr):
    """The activation of a gate: SiLU, or GELU."""
    return gelu(x) if GELU else silu(x)


@jit
def finish(
    y, out, token, row, tokens, rows, bias, residual, gate, EVEN: tl.constexpr, GELU: tl.constexpr = False
):  # fmt: skip
    """out[token, row] = silu(gate) * y + bias + residual of the same place; those that are None are left out.

    y [tokens, rows] of a block, token and row its indices, out [tokens, rows] of the whole; bias [rows], gate and
    residual like out. EVEN: no index is outside. GELU: gelu(gate) instead.
    """
    at = token[:, None].to(tl.int64) * rows + row[None, :]
    if EVEN:
        if gate is not None:
            y = activate(tl.load(gate + at), GELU) * y
        if bias is not None:
            y += tl.load(bias + row).to(tl.float32)[None, :]
        if residual is not None:
            y += tl.load(residual + at)
        tl.store(out + at, y)
    else:
        inside = (token < tokens)[:, None] & (row < rows)[None, :]
        if gate is not None:
            y = activate(tl.load(gate + at, mask=inside, other=0.0), GELU) * y
        if bias is not None:
            y += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
        if residual is not None:
            y += tl.load(residual + at, mask=inside, other=0.0)
        tl.store(out + at, y, mask=inside)

"""The gradient of products, norms, rows by index, what puts arrays together, and views."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gradient_cases import Case, compare_with_differences, compare_with_torch

import nitinol as na

functional = torch.nn.functional
ROWS = np.array([[2, -1, 0], [2, 2, 1]])  # some twice, one from the end, one never


def gated(x, gate, up):
    return functional.silu(x @ gate.T) * (x @ up.T)


def gated_by_gelu(x, gate, up):
    return functional.gelu(x @ gate.T, approximate="tanh") * (x @ up.T)


def all_of_linear(x, w, b, r, g):
    return functional.silu(g) * (x @ w.T) + b + r


def rms_norm(x, w=None, runs=None):
    rows = x if runs is None else x.reshape(*x.shape[:-1], -1, runs)
    normal = rows * torch.rsqrt((rows * rows).mean(-1, True) + 1e-6)
    return (normal if w is None else normal * w).reshape(x.shape)


def pair_of_rms_norm(x, w, r):
    return torch.stack([rms_norm(x + r, w), (x + r) * 2])


SQUARE = [(4, 4)]
CUBE = [(3, 4, 5)]
CASES: dict[str, Case] = {
    "matmul": Case(na.matmul, torch.matmul, [(5, 3), (3, 7)]),
    "batches": Case(na.matmul, torch.matmul, [(2, 5, 3), (2, 3, 4)]),
    "broadcast batches": Case(na.matmul, torch.matmul, [(2, 1, 5, 3), (4, 3, 2)]),
    "one for all": Case(na.matmul, torch.matmul, [(5, 3), (4, 3, 2)]),
    "vector first": Case(na.matmul, torch.matmul, [(3,), (4, 3, 2)]),
    "vector last": Case(na.matmul, torch.matmul, [(4, 5, 3), (3,)]),
    "two vectors": Case(na.matmul, torch.matmul, [(7,), (7,)]),
    "transposed": Case(lambda a, b: a.T @ b.mT, lambda a, b: a.T @ b.mT, [(3, 5), (7, 3)]),
    "views": Case(lambda a, b: a[::2, ::-1] @ b[:, 1], lambda a, b: a[::2].flip(1) @ b[:, 1], [(6, 3), (3, 2)]),
    "with itself": Case(lambda a: a @ a @ a.T, lambda a: a @ a @ a.T, SQUARE, "small"),
    "no inner extent": Case(lambda a, b: a @ b, lambda a, b: a @ b, [(3, 0), (0, 2)]),
    "outer": Case(na.outer, torch.outer, [(3,), (4,)]),
    "linear of few": Case(na.linear, functional.linear, [(2, 17), (9, 17)]),
    "linear of many": Case(na.linear, functional.linear, [(21, 17), (9, 17), (9,)]),
    "linear with all": Case(na.linear, all_of_linear, [(6, 8), (5, 8), (5,), (6, 5), (6, 5)]),
    "linear, residual": Case(lambda x, w, r: na.linear(x, w, residual=r), lambda x, w, r: x @ w.T + r,
                             [(3, 8), (5, 8), (3, 5)]),
    "linear by gelu": Case(
        lambda x, w, g: na.linear(x, w, gate=g, gelu=True),
        lambda x, w, g: functional.gelu(g, approximate="tanh") * (x @ w.T), [(3, 8), (5, 8), (3, 5)],
    ),
    "swiglu of few": Case(na.swiglu, gated, [(3, 8), (5, 8), (5, 8)]),
    "swiglu of many": Case(na.swiglu, gated, [(9, 8), (5, 8), (5, 8)]),
    "geglu": Case(na.geglu, gated_by_gelu, [(3, 8), (5, 8), (5, 8)]),
    "rms_norm": Case(na.rms_norm, rms_norm, [(3, 4, 9)]),
    "rms_norm, weighted": Case(na.rms_norm, rms_norm, [(5, 9), (9,)]),
    "rms_norm of heads": Case(na.rms_norm, lambda x, w: rms_norm(x, w, 4), [(5, 12), (4,)]),
    "rms_norm of a sum": Case(
        lambda x, w, r: na.stack([(pair := na.rms_norm(x, w, residual=r))[0], pair[1] * 2.0]), pair_of_rms_norm,
        [(5, 9), (9,), (5, 9)],
    ),
    "rms_norm's other result": Case(
        lambda x, w, r: na.rms_norm(x, w, residual=r)[1] * w, lambda x, w, r: (x + r) * w, [(5, 9), (9,), (5, 9)]
    ),
    "layer_norm": Case(na.layer_norm, lambda x: functional.layer_norm(x, (9,)), [(3, 4, 9)]),
    "layer_norm, weighted": Case(
        na.layer_norm, lambda x, w, b: functional.layer_norm(x, (9,), w, b), [(5, 9), (9,), (9,)]
    ),
    # --------------------------------------------------------------------------------- rows, parts, wholes
    "take": Case(lambda x: x.take(ROWS), lambda x: x[torch.tensor(ROWS)], [(4, 5)]),
    "take within": Case(lambda x: na.take(x, ROWS, 1), lambda x: x[:, torch.tensor(ROWS)], CUBE),
    "index": Case(lambda x: x[1:, [0, -1, 0]], lambda x: x[1:, [0, -1, 0]], CUBE),
    "embedding": Case(
        lambda w: na.embedding(w, na.array(abs(ROWS))), lambda w: w[torch.tensor(abs(ROWS))], [(4, 5)]
    ),
    "embedding, outside": Case(
        lambda w: na.embedding(w, na.array([-7, 1, 99, 4])), lambda w: w[[0, 1, 3, 3]], [(4, 5)]
    ),
    "concatenate": Case(
        lambda x, y: na.concatenate([x, y, x], 1), lambda x, y: torch.cat([x, y, x], 1), [(3, 2), (3, 4)]
    ),
    "stack": Case(lambda x, y: na.stack([x, y, x], -1), lambda x, y: torch.stack([x, y, x], -1), [(3, 2), (3, 2)]),
    "repeat": Case(lambda x: na.repeat(x, 3, 1), lambda x: x.repeat_interleave(3, 1), CUBE),
    "split": Case(
        lambda x: (parts := na.split(x, [1, 3], 1))[0] * parts[2], lambda x: x[:, :1] * x[:, 3:], [(3, 6)]
    ),
    "triangles": Case(lambda x: na.tril(x) * 2.0 - na.triu(x, 1), lambda x: x.tril() * 2 - x.triu(1), SQUARE),
    # ------------------------------------------------------------------------------------------------ views
    "slices": Case(lambda x: x[1, ::2, 3:0:-2] * 2.0, lambda x: x[1, ::2].flip(1)[:, 1:4:2] * 2, CUBE),
    "flip": Case(lambda x: x.flip(1) * x, lambda x: x.flip(1) * x, CUBE),
    "permute": Case(lambda x: x.permute(2, 0, 1), lambda x: x.permute(2, 0, 1), CUBE),
    "reshape": Case(lambda x: x.reshape(2, -1).T.reshape(3, 20), lambda x: x.reshape(2, -1).T.reshape(3, 20), CUBE),
    "reshape of a view": Case(lambda x: x[:, ::-1].reshape(-1)[7:50:3], lambda x: x.flip(1).reshape(-1)[7:50:3], CUBE),
    "broadcast_to": Case(
        lambda x: x.expand_dims(1).broadcast_to(3, 4, 5) * x[0], lambda x: x[:, None].expand(3, 4, 5) * x[0], [(3, 5)]
    ),
    "of a broadcast": Case(
        lambda x: x.broadcast_to(6, 3, 5)[::2, 1:, ::-1].reshape(-1),
        lambda x: x.expand(6, 3, 5)[::2, 1:].flip(2).reshape(-1), [(3, 5)],
    ),
    "squeeze": Case(lambda x: x[:, 1:2].squeeze(1) + x[:, 0], lambda x: x[:, 1] + x[:, 0], CUBE),
    "parts that overlap": Case(
        lambda x: x[:-1] * x[1:] + x[::-1][1:], lambda x: x[:-1] * x[1:] + x.flip(0)[1:], [(7,)]
    ),
    "the whole, turned": Case(lambda x: x[::-1, ::-1] * x.T, lambda x: x.flip(0, 1) * x.T, SQUARE),
}  # fmt: skip


@pytest.mark.float64
@pytest.mark.parametrize("name", CASES)
def test_against_differences(rng, name):
    compare_with_differences(CASES[name], rng)


@pytest.mark.parametrize("name", CASES)
def test_against_torch(rng, name):
    compare_with_torch(CASES[name], rng, "float32")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_halves_against_torch(rng, name, dtype):
    compare_with_torch(CASES[name], rng, dtype)


@pytest.mark.parametrize("format", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("dtype", [
    "float32", "bfloat16", pytest.param("float64", marks=pytest.mark.float64),
])  # fmt: skip
def test_weights_in_blocks(rng, format, dtype):
    """They stay as they are; the gradient of x is that of a product with the decoded values."""
    values = [rng.standard_normal((12, 64)).astype(np.float32) for _ in range(2)]
    blocks = [na.quantize(v, format) for v in values]
    first, second = (torch.tensor(na.dequantize(b).numpy().astype(np.float64)) for b in blocks)
    x = na.array(rng.standard_normal((6, 64)), dtype)
    t = torch.tensor(x.numpy().astype(np.float64), requires_grad=True)
    bias = na.array(rng.standard_normal(12), dtype)

    def loss(x, bias):
        return (na.linear(x, blocks[0], bias) + na.swiglu(x, *blocks)).astype("float32").sum()

    (t @ first.T + gated(t, first, second)).sum().backward()
    d_x, d_bias = na.grad(loss, argnums=(0, 1))(x, bias)
    # Inside swiglu's gradient the products are rounded to int8 activations, a part in 127 of the largest of 32.
    error = 2e-2 if dtype != "float64" else 1e-6
    np.testing.assert_allclose(d_x.numpy(), t.grad.numpy(), rtol=0, atol=error * np.abs(t.grad.numpy()).max())
    np.testing.assert_allclose(d_bias.numpy(), 6)


def test_an_embedding_in_blocks_has_no_gradient_and_takes_part():
    weights = na.quantize(np.ones((4, 32), np.float32), "Q8_0")
    found = na.grad(lambda a: (na.embedding(weights, na.array([0, 3])) * a).sum())(na.ones((2, 32)))
    np.testing.assert_allclose(found.numpy(), 1, rtol=1e-2)


def test_mixed_types(rng):
    """Each gradient has its operand's type."""
    x, w = na.array(rng.standard_normal((3, 4)), "bfloat16"), na.array(rng.standard_normal((5, 4)), "float32")
    for function in (lambda a, b: a @ b.T, na.linear, lambda a, b: na.concatenate([a, b]), lambda a, b: a[0] * b):
        found = na.grad(lambda a, b, f=function: f(a, b).astype("float32").sum(), argnums=(0, 1))(x, w)
        assert [g.dtype.name for g in found] == ["bf16", "fp32"]
        assert [g.shape for g in found] == [x.shape, w.shape]

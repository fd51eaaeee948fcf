"""Training end to end: a transformer of two layers, its loss and gradients, and 200 steps of AdamW, against PyTorch.

The model is written in public operations. What stands in its own functions (attention, rope, cross entropy) is composed
of elementwise operations, products and reductions.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

import nitinol as na
from nitinol.nn.optimisers import AdamW
from nitinol.runtime import get_device
from nitinol.transform.trees import flatten

VOCABULARY, WIDTH, HEADS, INNER, LAYERS = 61, 24, 3, 40, 2
BATCH, LENGTH = 3, 13
EPSILON = 1e-6


@pytest.fixture
def rng():
    return np.random.default_rng()


# ----------------------------------------------------------------------------------------------- the model, for both


def parameters(rng) -> dict:
    def matrix(rows, columns):
        return rng.normal(0, 1 / math.sqrt(columns), (rows, columns)).astype(np.float32)

    def gain():
        return rng.uniform(0.5, 1.5, WIDTH).astype(np.float32)

    layers = [
        {
            "attention_norm": gain(), "q": matrix(WIDTH, WIDTH), "k": matrix(WIDTH, WIDTH), "v": matrix(WIDTH, WIDTH),
            "o": matrix(WIDTH, WIDTH), "norm": gain(), "gate": matrix(INNER, WIDTH), "up": matrix(INNER, WIDTH),
            "down": matrix(WIDTH, INNER),
        }
        for _ in range(LAYERS)
    ]  # fmt: skip
    embedding = rng.normal(0, 0.5, (VOCABULARY, WIDTH)).astype(np.float32)
    return {"embedding": embedding, "layers": layers, "norm": gain()}


def angles() -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of RoPE [LENGTH, head / 2]."""
    half = WIDTH // HEADS // 2
    turns = np.arange(LENGTH)[:, None] * 10000.0 ** (-np.arange(half) / half)
    return np.cos(turns).astype(np.float32), np.sin(turns).astype(np.float32)


def rope(x):
    """x [BATCH, HEADS, LENGTH, head]."""
    return na.rope(x.swapaxes(1, 2), na.rope_frequencies(WIDTH // HEADS)).swapaxes(1, 2)


def attention(q, k, v):
    """All [BATCH, HEADS, LENGTH, head]."""
    return na.attention(q, k, v, causal=True)


def cross_entropy(logits, targets):
    """The mean over tokens."""
    return na.cross_entropy(logits, targets.reshape(-1))


def heads(x):
    return x.reshape(BATCH, LENGTH, HEADS, -1).swapaxes(1, 2)


def loss_of(parameters, tokens, targets):
    x = na.embedding(parameters["embedding"], tokens.reshape(-1))
    for layer in parameters["layers"]:
        n = na.rms_norm(x, layer["attention_norm"], EPSILON)
        q, k, v = (heads(na.linear(n, layer[name])) for name in "qkv")
        mixed = attention(rope(q), rope(k), v).swapaxes(1, 2).reshape(-1, WIDTH)
        x = na.linear(mixed, layer["o"], residual=x)
        n = na.rms_norm(x, layer["norm"], EPSILON)
        x = na.linear(na.swiglu(n, layer["gate"], layer["up"]), layer["down"], residual=x)
    return cross_entropy(na.linear(na.rms_norm(x, parameters["norm"], EPSILON), parameters["embedding"]), targets)


def torch_loss_of(parameters, tokens, targets):
    import torch
    from torch.nn import functional as f

    dtype = parameters["embedding"].dtype
    cosine, sine = (torch.from_numpy(a).to(dtype) for a in angles())

    def turned(x):
        left, right = x.chunk(2, -1)
        return torch.cat([left * cosine - right * sine, right * cosine + left * sine], -1)

    def split(x):
        return x.reshape(BATCH, LENGTH, HEADS, -1).transpose(1, 2)

    x = parameters["embedding"][tokens.reshape(-1)]
    for layer in parameters["layers"]:
        n = f.rms_norm(x, (WIDTH,), layer["attention_norm"], EPSILON)
        q, k, v = (split(n @ layer[name].T) for name in "qkv")
        mixed = f.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True)
        x = x + mixed.transpose(1, 2).reshape(-1, WIDTH) @ layer["o"].T
        n = f.rms_norm(x, (WIDTH,), layer["norm"], EPSILON)
        x = x + (f.silu(n @ layer["gate"].T) * (n @ layer["up"].T)) @ layer["down"].T
    logits = f.rms_norm(x, (WIDTH,), parameters["norm"], EPSILON) @ parameters["embedding"].T
    return f.cross_entropy(logits, targets.reshape(-1))


def mapped(tree, function):
    if isinstance(tree, dict):
        return {name: mapped(item, function) for name, item in tree.items()}
    if isinstance(tree, list):
        return [mapped(item, function) for item in tree]
    return function(tree)


def arrays(tree):
    return mapped(tree, lambda a: na.array(a.copy()))


def tensors(tree, dtype=None):
    import torch

    return mapped(tree, lambda a: torch.from_numpy(a.copy()).to(dtype or torch.float32).requires_grad_())


def batch(rng):
    """Sequences that count up in steps of their own: something to learn."""
    start, step = rng.integers(0, VOCABULARY, (BATCH, 1)), rng.integers(1, 4, (BATCH, 1))
    line = (start + step * np.arange(LENGTH + 1)) % VOCABULARY
    return line[:, :-1].astype(np.int32), line[:, 1:].astype(np.int32)


def distance(found, expected) -> float:
    """||found - expected|| / ||expected||."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# --------------------------------------------------------------------------------------------------------- the tests


def test_gradients(rng):
    """Loss and all gradients in float32. 1e-5 is about 100 roundings, of which errors of both sides consist: PyTorch's
    own float32 gradients are as far from its float64 ones."""
    torch = pytest.importorskip("torch")
    weights, (tokens, targets) = parameters(rng), batch(rng)
    loss, gradients = na.value_and_grad(loss_of)(arrays(weights), na.array(tokens), na.array(targets))
    given = tensors(weights)
    expected = torch_loss_of(given, torch.from_numpy(tokens).long(), torch.from_numpy(targets).long())
    expected.backward()
    assert abs(loss.item() - expected.item()) <= 1e-5 * abs(expected.item())
    for found, wanted in zip(flatten(gradients)[0], flatten(given)[0]):
        assert distance(found.numpy(), wanted.grad.numpy()) <= 1e-5


def test_two_hundred_steps(rng):
    """A compiled step against PyTorch's AdamW, and what it does to the device.

    Both curves are float32 and part slowly: an error of one rounding grows with each step. PyTorch's own float32 curve
    against its float64 one shows by how much; the tolerance is ten times that, and at least 1e-4, of losses from 8 on.
    """
    torch = pytest.importorskip("torch")
    weights, data = parameters(rng), [batch(rng) for _ in range(4)]
    optimiser = AdamW(arrays(weights), 3e-3, weight_decay=0.1, clip_norm=1.0)

    @na.compile
    def step(tokens, targets):
        loss, gradients = na.value_and_grad(loss_of)(optimiser.parameters, tokens, targets)
        optimiser.update(gradients)
        return loss

    def torch_curve(dtype):
        given = tensors(weights, dtype)
        leaves = flatten(given)[0]
        other = torch.optim.AdamW(leaves, 3e-3, weight_decay=0.1)
        losses = []
        for i in range(200):
            other.zero_grad()
            loss = torch_loss_of(given, *(torch.from_numpy(a).long() for a in data[i % len(data)]))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(leaves, 1.0)
            other.step()
            losses.append(loss.item())
        return np.array(losses), [leaf.detach().numpy() for leaf in leaves]

    losses, counters = [], get_device().counters
    for i in range(200):
        before = dataclasses.replace(counters)
        loss = step(*data[i % len(data)])
        if i >= 4:  # by then there are two sets of outputs
            assert counters.submits - before.submits == counters.waits - before.waits == 1
            assert (counters.allocations, counters.pool_hits) == (before.allocations, before.pool_hits)
        losses.append(loss.item())
    assert optimiser.steps == 200
    plain, weights_32 = torch_curve(torch.float32)
    wide, weights_64 = torch_curve(torch.float64)
    assert plain[-1] < 0.5 * plain[0], "nothing was learned"
    allowed = max(1e-4, 10 * np.abs(plain - wide).max())
    assert allowed < 1e-2, "the curves of PyTorch part so far that nothing is compared"
    found = np.array(losses)
    print(f"loss {found[0]:.4f} to {found[-1]:.4f}; from float64: {np.abs(found - wide).max():.1e}, "
          f"PyTorch's float32: {np.abs(plain - wide).max():.1e}")  # fmt: skip
    np.testing.assert_allclose(found, wide, rtol=0, atol=allowed)
    for mine, theirs, wanted in zip(flatten(optimiser.parameters)[0], weights_32, weights_64):
        assert distance(mine.numpy(), wanted) <= max(1e-4, 10 * distance(theirs, wanted))

"""Attention of a prompt and of a token, over a cache whose unused part is NaN, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_runner import padded, poisoned, run

from nitinol.ops import attention

# fp32 dots of head_dim products and fp32 sums of weights, exp2 to 1 ulp; scores of size 10 carry 1e-6 into weights.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture
def rng():
    return np.random.default_rng()


def cache_of(rng, kv_heads, context, head_dim, used, dtype):
    cache = poisoned((2, kv_heads, context, head_dim), dtype)
    cache[:, :, :used] = rng.normal(size=(2, kv_heads, used, head_dim))
    return cache


PREFILL = [  # engine, kv_heads, group, head_dim, tokens, position, context, cache
    ("native", 2, 2, 64, 130, 0, 130, np.float32),
    ("native", 1, 3, 128, 70, 37, 128, np.float16),
    ("native", 2, 1, 80, 9, 100, 111, np.float16),
    ("native", 1, 1, 256, 20, 3, 64, np.float32),
    ("native", 1, 2, 16, 3, 0, 3, np.float32),
    ("interpreter", 1, 2, 12, 11, 60, 80, np.float16),
]


@pytest.mark.parametrize(("engine", "kv_heads", "group", "head_dim", "tokens", "position", "context", "dtype"), PREFILL)
def test_prefill(rng, engine, kv_heads, group, head_dim, tokens, position, context, dtype):
    heads = kv_heads * group
    q = rng.normal(size=(tokens, heads, head_dim)).astype(np.float32) * 2
    k, v = cache_of(rng, kv_heads, context, head_dim, position + tokens, dtype)
    out = poisoned((tokens + 1, heads, head_dim))
    scale = head_dim**-0.5
    constants = attention.prefill_constants(group, head_dim, tokens)
    run(engine, attention.prefill_attention_kernel, (-(-tokens // constants["BLOCK_M"]), heads), q=padded(q), k=k, v=v,
        position=np.array([position], np.int32), out=out, tokens=tokens, context=context, q_token=heads * head_dim,
        q_head=head_dim, scale=scale, **constants)  # fmt: skip
    expected = attention.attention_reference(q.transpose(1, 0, 2), k, v, position, scale)
    np.testing.assert_allclose(out[:tokens].transpose(1, 0, 2), expected, **CLOSE)
    assert np.isnan(out[tokens]).all()


WINDOWS = [  # engine, kv_heads, group, head_dim, tokens of each sequence, positions, context, cache, window
    ("native", 2, 2, 64, 130, (0,), 130, np.float32, 50),
    ("native", 1, 3, 128, 70, (137, 3), 256, np.float16, 64),
    ("native", 2, 1, 32, 200, (200, 0, 311), 512, np.float32, 129),
    ("native", 1, 2, 256, 5, (9, 40), 64, np.float16, 1),
    ("native", 2, 1, 16, 33, (7, 0), 64, np.float32, 0),
    ("interpreter", 1, 2, 12, 11, (90, 60), 128, np.float16, 70),
]


@pytest.mark.parametrize(
    ("engine", "kv_heads", "group", "head_dim", "tokens", "positions", "context", "dtype", "window"), WINDOWS
)
def test_prefill_of_several_sequences_with_a_window(
    rng, engine, kv_heads, group, head_dim, tokens, positions, context, dtype, window
):
    """What no query sees is NaN, also before the windows."""
    heads, count = kv_heads * group, len(positions)
    q = rng.normal(size=(count, tokens, heads, head_dim)).astype(np.float32) * 2
    caches = poisoned((2, count, kv_heads, context, head_dim), dtype)
    for sequence, position in enumerate(positions):
        caches[:, sequence] = cache_of(rng, kv_heads, context, head_dim, position + tokens, dtype)
        hide(caches[:, sequence], position, window)
    out = poisoned((count * tokens + 1, heads, head_dim))
    constants = attention.prefill_constants(group, head_dim, tokens)
    run(engine, attention.prefill_attention_kernel, (-(-tokens // constants["BLOCK_M"]), heads, count), q=padded(q),
        k=caches[0], v=caches[1], position=np.array(positions, np.int32), out=out, tokens=tokens, context=context,
        q_token=heads * head_dim, q_head=head_dim, scale=0.2, WINDOW=window, **constants)  # fmt: skip
    for sequence, position in enumerate(positions):
        k, v = np.nan_to_num(caches[:, sequence])
        expected = attention.attention_reference(q[sequence].swapaxes(0, 1), k, v, position, 0.2, window)
        found = out[sequence * tokens : (sequence + 1) * tokens]
        np.testing.assert_allclose(found.swapaxes(0, 1), expected, **CLOSE)
    assert np.isnan(out[-1]).all()


def hide(caches, position, window):
    """NaN in the places before the window of the query at `position`, but for those in a block of 64 with it: these are
    read, and multiplied by a weight of 0."""
    if window:
        caches[:, :, : max(position - window + 1, 0) // 64 * 64] = np.nan


def test_heads_first_without_position(rng):
    heads, tokens, head_dim = 3, 100, 32
    q, k, v = rng.normal(size=(3, heads, tokens, head_dim)).astype(np.float32)
    out = poisoned((heads, tokens, head_dim))
    run("native", attention.prefill_attention_kernel, (2, heads), q=q, k=k, v=v, position=None, out=out, tokens=tokens,
        context=tokens, q_token=head_dim, q_head=tokens * head_dim, scale=0.3,
        **attention.prefill_constants(1, head_dim, tokens))  # fmt: skip
    np.testing.assert_allclose(out, attention.attention_reference(q, k, v, 0, 0.3), **CLOSE)


DECODE = [  # engine, kv_heads, group, head_dim, position, context, cache, splits
    ("native", 2, 4, 64, 200, 300, np.float16, 1),
    ("native", 2, 4, 64, 255, 256, np.float16, 2),
    ("native", 1, 7, 128, 0, 64, np.float32, 4),  # three parts have no positions
    ("native", 3, 1, 80, 129, 130, np.float16, 4),
    ("native", 1, 2, 256, 70, 100, np.float32, 2),
    ("interpreter", 1, 3, 12, 130, 200, np.float16, 2),
]


@pytest.mark.parametrize(("engine", "kv_heads", "group", "head_dim", "position", "context", "dtype", "splits"), DECODE)
def test_decode(rng, engine, kv_heads, group, head_dim, position, context, dtype, splits):
    heads = kv_heads * group
    q = rng.normal(size=(heads, 1, head_dim)).astype(np.float32) * 2
    k, v = cache_of(rng, kv_heads, context, head_dim, position + 1, dtype)
    out = poisoned((heads + 1, head_dim))
    part, tops, totals = poisoned((heads, splits, head_dim)), poisoned((heads, splits)), poisoned((heads, splits))
    scale = head_dim**-0.5
    constants = attention.decode_constants(group, head_dim, kv_heads) | {"SPLITS": splits}
    run(engine, attention.decode_attention_kernel, (kv_heads, splits), q=padded(q), k=k, v=v,
        position=np.array([position], np.int32), out=out, part=part, tops=tops, totals=totals, context=context,
        scale=scale, **constants)  # fmt: skip
    if splits > 1:
        run(engine, attention.combine_kernel, (heads,), part=part, tops=tops, totals=totals, out=out, SPLITS=splits,
            HEAD_DIM=head_dim, BLOCK_D=constants["BLOCK_D"])  # fmt: skip
    expected = attention.attention_reference(q, k, v, position, scale)[:, 0]
    np.testing.assert_allclose(out[:heads], expected, **CLOSE)
    assert np.isnan(out[heads]).all()


WINDOWED_DECODE = [  # engine, kv_heads, group, head_dim, positions, context, cache, splits, window
    ("native", 2, 4, 64, (200, 0, 77), 300, np.float16, 1, 0),
    ("native", 1, 2, 64, (255, 99), 256, np.float32, 4, 100),
    ("native", 3, 1, 80, (129, -1, 5), 130, np.float16, 2, 64),
    ("native", 1, 2, 16, (-1, 3), 64, np.float16, 1, 0),
    ("native", 1, 4, 256, (90,), 100, np.float32, 2, 1),
    ("interpreter", 1, 3, 12, (130, 3), 200, np.float16, 2, 70),
]


@pytest.mark.parametrize(
    ("engine", "kv_heads", "group", "head_dim", "positions", "context", "dtype", "splits", "window"), WINDOWED_DECODE
)
def test_decode_of_several_sequences_with_a_window(
    rng, engine, kv_heads, group, head_dim, positions, context, dtype, splits, window
):
    heads, count = kv_heads * group, len(positions)
    q = rng.normal(size=(count, heads, 1, head_dim)).astype(np.float32) * 2
    caches = poisoned((2, count, kv_heads, context, head_dim), dtype)
    for sequence, position in enumerate(positions):
        caches[:, sequence] = cache_of(rng, kv_heads, context, head_dim, position + 1, dtype)
        if window:  # here not even a block's beginning is read
            caches[:, sequence, :, : max(position - window + 1, 0)] = np.nan
    rows = count * heads
    out = poisoned((rows + 1, head_dim))
    part, tops, totals = poisoned((rows, splits, head_dim)), poisoned((rows, splits)), poisoned((rows, splits))
    constants = attention.decode_constants(group, head_dim, kv_heads) | {"SPLITS": splits, "WINDOW": window}
    run(engine, attention.decode_attention_kernel, (kv_heads, splits, count), q=padded(q), k=caches[0], v=caches[1],
        position=np.array(positions, np.int32), out=out, part=part, tops=tops, totals=totals, context=context,
        scale=0.2, **constants)  # fmt: skip
    if splits > 1:
        run(engine, attention.combine_kernel, (rows,), part=part, tops=tops, totals=totals, out=out, SPLITS=splits,
            HEAD_DIM=head_dim, BLOCK_D=constants["BLOCK_D"])  # fmt: skip
    for sequence, position in enumerate(positions):
        k, v = np.nan_to_num(caches[:, sequence])
        expected = np.zeros((heads, head_dim))  # of a sequence without a token in this step
        if position >= 0:
            expected = attention.attention_reference(q[sequence], k, v, position, 0.2, window)[:, 0]
        np.testing.assert_allclose(out[sequence * heads : (sequence + 1) * heads], expected, **CLOSE)
    assert np.isnan(out[rows]).all()

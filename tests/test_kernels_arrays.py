"""The library's functions on arrays: shapes, the choice of kernels and blocks, one decoder layer's worth of steps."""

from __future__ import annotations

import numpy as np
import pytest
from stored_weights import weights_of

import nitinol as na
from nitinol.formats.blocks import FORMATS
from nitinol.ops import activations, attention, linear, norm, quantized, rope, rope_and_cache, sampling
from nitinol.ops.rope_and_cache import rope_reference


@pytest.fixture
def rng():
    return np.random.default_rng()


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def test_norms(rng):
    x, weight, bias, residual = normal(rng, 3, 96), normal(rng, 96), normal(rng, 96), normal(rng, 3, 96)
    found = norm.rms_norm(na.array(x), na.array(weight), 1e-5).numpy()
    np.testing.assert_allclose(found, norm.rms_norm_reference(x, weight, epsilon=1e-5), rtol=1e-5, atol=1e-5)
    normed, total = norm.rms_norm(na.array(x), na.array(weight), 1e-5, na.array(residual))
    np.testing.assert_array_equal(total.numpy(), x + residual)
    expected = norm.rms_norm_reference(x + residual, weight, epsilon=1e-5)
    np.testing.assert_allclose(normed.numpy(), expected, rtol=1e-5, atol=1e-5)
    heads = norm.rms_norm(na.array(x), na.array(weight[:24])).numpy()
    np.testing.assert_allclose(heads, norm.rms_norm_reference(x, weight[:24]), rtol=1e-5, atol=1e-5)
    found = norm.layer_norm(na.array(x), na.array(weight), na.array(bias)).numpy()
    np.testing.assert_allclose(found, norm.layer_norm_reference(x, weight, bias), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="weight has shape"):
        norm.rms_norm(na.array(x), na.array(weight[:7]))
    with pytest.raises(ValueError, match="residual has shape"):
        norm.rms_norm(na.array(x), na.array(weight), residual=na.array(bias))


@pytest.mark.parametrize("format", ["F32", "F16", "BF16", "Q4_0", "Q6_K"])
def test_dequantize_and_embedding(rng, format):
    columns = 70 if FORMATS[format].values == 1 else 256
    weights, values = weights_of(normal(rng, 9, columns), format)
    np.testing.assert_array_equal(quantized.dequantize(weights).numpy(), values)
    tokens = np.array([8, 0, 3, 3], np.int32)
    np.testing.assert_array_equal(na.embedding(weights, na.array(tokens)).numpy(), values[tokens])


@pytest.mark.parametrize("format", ["F32", "F16", "BF16", "Q8_0", "Q4_K"])
@pytest.mark.parametrize("tokens", [1, 3, 20, 130])
def test_linear_and_swiglu(rng, format, tokens, device_name):
    rows, columns = 40, 256
    x, bias, residual = normal(rng, tokens, columns), normal(rng, rows), normal(rng, tokens, rows)
    weights, values = weights_of(normal(rng, rows, columns), format)
    up, up_values = weights_of(normal(rng, rows, columns), format)
    given = x.astype(np.float64)

    def rounded(a, dtype):
        return na.array(np.asarray(a, np.float32)).astype(dtype).numpy().astype(np.float64)

    if device_name == "cuda" and FORMATS[format].values > 1 and tokens >= linear.MANY_TOKENS:
        given, values, up_values = (rounded(a, "bf16") for a in (x, values, up_values))
    elif FORMATS[format].values > 1:
        parts = activations.quantize_activations_reference(x)
        given = parts.values * np.repeat(parts.scales.astype(np.float64), 32, axis=1)
    elif device_name == "cuda" and tokens > linear.FEW_TOKENS:  # whose matrix instructions take halves
        given = rounded(x, {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}[format])
    y = given @ values.T.astype(np.float64)
    close = {"rtol": 2e-5, "atol": 2e-4}  # 256 products of size 1, in fp32
    found = linear.linear(na.array(x), weights, na.array(bias), na.array(residual)).numpy()
    np.testing.assert_allclose(found, y + bias + residual, **close)
    found = linear.swiglu(na.array(x), weights, up).numpy()
    np.testing.assert_allclose(found, y / (1 + np.exp(-y)) * (given @ up_values.T.astype(np.float64)), rtol=1e-4,
                               atol=1e-3)  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_linear_and_swiglu_of_a_few_tokens_in_the_blocks_of_the_device(rng, format):
    """Rows of whole and of many runs, unrolled or not, shared by warps or not."""
    rows, columns = int(rng.integers(1, 12)), int(rng.choice([2048, 2304, 4096, 5120, 6144, 8192]))
    tokens = int(rng.integers(1, linear.FEW_TOKENS + 1))
    told = f"{format}: {tokens} tokens, {rows} rows of {columns}"
    x, residual = normal(rng, tokens, columns), normal(rng, tokens, rows)
    weights, values = weights_of(normal(rng, rows, columns), format)
    up, up_values = weights_of(normal(rng, rows, columns), format)
    given = x.astype(np.float64)
    if FORMATS[format].values > 1:
        parts = activations.quantize_activations_reference(x)
        given = parts.values * np.repeat(parts.scales.astype(np.float64), 32, axis=1)
    y, right = (given @ matrix.T.astype(np.float64) for matrix in (values, up_values))
    found = linear.linear(na.array(x), weights, residual=na.array(residual)).numpy()
    # Sums of `columns` products of size 1 grow like the root of their number, 90; fp32 rounds each step by 2 ** -24.
    np.testing.assert_allclose(found, y + residual, rtol=2e-5, atol=1e-3, err_msg=told)
    gate = y / (1 + np.exp(-y))
    found = linear.swiglu(na.array(x), weights, up).numpy()
    np.testing.assert_allclose(found, gate * right, rtol=1e-4, atol=1e-3 * (1 + np.abs(right).max()), err_msg=told)


@pytest.mark.parametrize(("format", "tokens"), [("F32", 2), ("Q5_0", 1), ("BF16", 9), ("Q8_0", 20), ("Q4_K", 130)])
def test_geglu(rng, format, tokens, device_name):
    """With gates from -30, where GELU is 0 and its exponential overflows, to 30."""
    rows, columns = 24, 256
    x = normal(rng, tokens, columns)
    gate, _ = weights_of(2 * normal(rng, rows, columns) / np.sqrt(columns), format)
    up, _ = weights_of(normal(rng, rows, columns) / np.sqrt(columns), format)
    x[0] *= 8
    y, right = (linear.linear(na.array(x), w).numpy().astype(np.float64) for w in (gate, up))  # tested above
    expected = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))) * right
    assert y.min() < -5 and y.max() > 5
    found = linear.geglu(na.array(x), gate, up).numpy()
    # Products may add in another order in the other kernel: 1e-6 of sums of size 10, times a factor of size 10.
    tolerance = 1e-4 * (1 + np.abs(right).max())
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=tolerance)
    with pytest.raises(ValueError, match="geglu: gate has shape"):
        linear.geglu(na.array(x), gate, weights_of(normal(rng, rows + 1, columns), format)[0])


def test_linear_refuses_shapes_that_do_not_fit(rng):
    weights, _ = weights_of(normal(rng, 8, 64), "Q8_0")
    with pytest.raises(ValueError, match=r"linear: x has shape \(2, 32\) and the weights \(8, 64\)"):
        linear.linear(na.array(normal(rng, 2, 32)), weights)
    with pytest.raises(ValueError, match="bias has shape"):
        linear.linear(na.array(normal(rng, 2, 64)), weights, bias=na.array(normal(rng, 4)))


@pytest.mark.parametrize("columns", [96, 1536])
def test_a_norm_before_a_product_of_bytes_is_one_kernel_with_the_rounding(rng, columns):
    x, scale = normal(rng, 3, columns), normal(rng, columns)
    weights, values = weights_of(normal(rng, 8, columns), "Q8_0")

    @na.compile
    def step(x):
        h = norm.rms_norm(x, na.array(scale))
        return linear.linear(h, weights), linear.linear(h, weights)

    found, again = step(na.array(x))
    names = [record.name for record in step.records]
    assert names.count("rms_norm_quantize_kernel") == 1 and "rms_norm_kernel" not in names
    parts = activations.quantize_activations_reference(norm.rms_norm_reference(x, scale).astype(np.float32))
    given = parts.values * np.repeat(parts.scales.astype(np.float64), 32, axis=1)
    # The norm is rounded otherwise in float64, so that a value between two integers may go to the other: each of
    # `columns` products moves by a step of 1/127 of its largest neighbour at most; few do.
    np.testing.assert_allclose(found.numpy(), given @ values.T.astype(np.float64), atol=0.1)
    np.testing.assert_array_equal(found.numpy(), again.numpy())


@pytest.mark.parametrize("head_dim", [64, 96])
def test_the_last_step_of_attention_is_one_kernel_with_the_rounding(rng, head_dim):
    kv_heads, group, context, position = 2, 2, 192, 150
    width = kv_heads * group * head_dim
    q, (k, v) = normal(rng, 1, width), normal(rng, 2, 1, kv_heads, context, head_dim)
    weights, values = weights_of(normal(rng, 8, width), "Q4_0")
    arrays = [na.array(a) for a in (q, k, v, np.array([position], np.int32))]

    @na.compile
    def step(*arrays):
        h = attention.cached_attention(*arrays)
        return linear.linear(h, weights), linear.linear(h, weights)

    found, again = step(*arrays)
    names = [record.name for record in step.records]
    assert names.count("combine_quantize_kernel") == 1 and "combine_kernel" not in names
    parts = activations.quantize_activations_reference(attention.cached_attention(*arrays).numpy())
    given = parts.values * np.repeat(parts.scales.astype(np.float64), 32, axis=1)
    np.testing.assert_allclose(found.numpy(), given @ values.T.astype(np.float64), rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(found.numpy(), again.numpy())


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("window", [0, 40])
def test_attention_of_several_sequences_and_a_product(rng, tokens, window):
    """The layer's steps around the cache, each sequence at a position of its own, against float64."""
    count, kv_heads, group, head_dim, context = 3, 2, 2, 64, 256
    positions, heads = np.array([0, 197, 70]), kv_heads * group
    q = normal(rng, count, tokens, heads, head_dim)
    k, v = normal(rng, 2, count, tokens, kv_heads, head_dim)
    keys, values = normal(rng, 2, count, kv_heads, context, head_dim)
    caches = [na.array(x).evaluate() for x in (keys, values)]
    frequencies = rope.rope_frequencies(head_dim)
    weights, matrix = weights_of(normal(rng, 16, heads * head_dim), "F32")
    position = na.array(positions.astype(np.int32))

    def flat(x):
        return na.array(x.reshape(count * tokens, -1))

    turned = na.rope_and_cache(flat(q), flat(k), flat(v), na.array(frequencies), position, *caches, interleaved=False)
    found = linear.linear(attention.cached_attention(turned, *caches, position, window=window), weights).numpy()
    for i in range(count):
        places = positions[i] + np.arange(tokens)
        q_turned, k_turned = (rope_reference(x[i], places, frequencies, False).swapaxes(0, 1) for x in (q, k))
        keys[i][:, places], values[i][:, places] = k_turned, v[i].swapaxes(0, 1)
        out = attention.attention_reference(q_turned, keys[i], values[i], positions[i], head_dim**-0.5, window)
        expected = out.swapaxes(0, 1).reshape(tokens, -1) @ matrix.T.astype(np.float64)
        # sums of 256 products of values to 2e-5
        np.testing.assert_allclose(found.reshape(count, tokens, -1)[i], expected, rtol=1e-4, atol=1e-3)


def test_several_tokens_through_one_rounding_of_attention(rng):
    """The parts of two sequences' heads are combined and rounded in one kernel, as one sequence's are."""
    kv_heads, head_dim, context = 2, 64, 192
    q, caches = normal(rng, 2, 2 * kv_heads * head_dim), normal(rng, 2, 2, kv_heads, context, head_dim)
    weights, values = weights_of(normal(rng, 8, q.shape[1]), "Q8_0")
    arrays = [na.array(a) for a in (q, *caches, np.array([150, 20], np.int32))]

    @na.compile
    def step(*arrays):
        return linear.linear(attention.cached_attention(*arrays), weights)

    found = step(*arrays).numpy()
    assert "combine_quantize_kernel" in [record.name for record in step.records]
    parts = activations.quantize_activations_reference(attention.cached_attention(*arrays).numpy())
    given = parts.values * np.repeat(parts.scales.astype(np.float64), 32, axis=1)
    np.testing.assert_allclose(found, given @ values.T.astype(np.float64), rtol=1e-5, atol=1e-4)


def test_caches_and_rows_that_do_not_fit_are_refused(rng):
    cache, position = na.array(normal(rng, 2, 1, 8, 16)), na.array(np.zeros(2, np.int32))
    frequencies = na.array(rope.rope_frequencies(16))
    with pytest.raises(ValueError, match=r"3 rows of queries .* a cache of 2 sequences, expected a multiple of 2"):
        attention.cached_attention(na.array(normal(rng, 3, 16)), cache, cache, position)
    with pytest.raises(ValueError, match=r"positions of shape \(1,\)"):
        attention.cached_attention(na.array(normal(rng, 2, 16)), cache, cache, position[:1])
    with pytest.raises(ValueError, match=r"the cache \(1, 8, 16\), expected"):
        attention.cached_attention(na.array(normal(rng, 2, 16)), cache[0], cache[0], position)
    row = na.array(normal(rng, 3, 16))
    with pytest.raises(ValueError, match="rope_and_cache: 3 rows"):
        rope_and_cache.rope_and_cache(row, row, row, frequencies, position, cache, cache, interleaved=True)
    with pytest.raises(ValueError, match=r"rope_and_cache: the cache has shape \(1, 8, 16\)"):
        rope_and_cache.rope_and_cache(row, row, row, frequencies, position, cache[0], cache[0], interleaved=True)
    state = sampling.SamplingState(position, position, na.array(np.zeros((2, 8), np.int32)), None, None)
    with pytest.raises(ValueError, match=r"sample: logits have shape \(1, 9\), expected \(2, 9\)"):
        sampling.sample(na.array(normal(rng, 1, 9)), state)


def test_activations_are_quantised_once_for_several_products(rng):
    x = na.array(normal(rng, 1, 64)) * 2.0
    target = na.get_device().target
    first = activations.quantize_activations(target, x)
    assert activations.quantize_activations(target, x).values.value is first.values.value
    state = na.array(normal(rng, 1, 64)).evaluate()
    before = activations.quantize_activations(target, state)
    state.assign(state * 3.0)
    after = activations.quantize_activations(target, state)
    np.testing.assert_allclose(after.scales.numpy(), before.scales.numpy() * 3, rtol=1e-6)


@pytest.mark.parametrize("shapes", [((40, 50), (50, 30)), ((3, 20, 16), (16, 24)), ((2, 7, 5), (2, 5, 9))])
def test_matmul(rng, shapes):
    a, b = (normal(rng, *s) for s in shapes)
    np.testing.assert_allclose(na.matmul(na.array(a), na.array(b)).numpy(), a @ b, rtol=1e-4, atol=1e-4)
    turned = na.array(np.ascontiguousarray(b.swapaxes(-1, -2))).swapaxes(-1, -2)
    np.testing.assert_allclose(na.matmul(na.array(a), turned).numpy(), a @ b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kv_heads", "cache"), [(2, np.float16), (16, np.float32)])
def test_a_prompt_and_then_a_token(rng, kv_heads, cache):
    """Prefill of 5 tokens and decode of the sixth give what attention over all six gives."""
    group, head_dim, context = 2, 32, 16
    heads = kv_heads * group
    q = normal(rng, 6, heads * head_dim)
    k, v = normal(rng, 2, 6, kv_heads * head_dim)
    frequencies = rope.rope_frequencies(head_dim)
    caches = [na.array(np.zeros((1, kv_heads, context, head_dim), cache)).evaluate() for _ in range(2)]
    results = []
    for start, stop in ((0, 5), (5, 6)):
        position = na.array(np.array([start], np.int32))
        parts = (na.array(np.ascontiguousarray(x[start:stop])) for x in (q, k, v))
        turned = rope_and_cache.rope_and_cache(*parts, na.array(frequencies), position, *caches, interleaved=False)
        results.append(attention.cached_attention(turned, *caches, position).numpy())
    places = np.arange(6)
    q_turned, k_turned = (
        rope_reference(x.reshape(6, -1, head_dim), places, frequencies, False).transpose(1, 0, 2) for x in (q, k)
    )
    values = v.reshape(6, kv_heads, head_dim).transpose(1, 0, 2)
    expected = attention.attention_reference(q_turned, k_turned, values, 0, head_dim**-0.5)
    found = np.concatenate(results).reshape(6, heads, head_dim).transpose(1, 0, 2)
    tolerance = 2e-3 if cache == np.float16 else 1e-5  # keys and values rounded to 11 bits
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_causal_attention(rng):
    q, k, v = normal(rng, 4, 70, 32), normal(rng, 2, 70, 32), normal(rng, 2, 70, 32)
    found = attention.causal_attention(na.array(q), na.array(k), na.array(v)).numpy()
    np.testing.assert_allclose(found, attention.attention_reference(q, k, v, 0, 32**-0.5), rtol=1e-4, atol=1e-5)


def test_sampling_steps_hand_on_token_and_position(rng):
    context = 8
    state = sampling.SamplingState(
        *(na.array(np.zeros(n, np.int32)).evaluate() for n in (1, 1, context)),
        na.array(np.array([0, 1, 0, 1], np.float32)), na.array(np.array([1, 0, 0], np.int64)),
    )  # fmt: skip
    chosen = []
    for tokens in (3, 1, 1):
        logits = normal(rng, 1, 300)
        sampling.sample(na.array(logits), state, tokens)
        chosen.append(int(logits.argmax()))
        assert state.token.numpy()[0] == chosen[-1]
    assert state.position.numpy()[0] == 5
    np.testing.assert_array_equal(state.history.numpy(), [0, 0, 0, *chosen, 0, 0])


def test_sampling_of_several_sequences(rng):
    """Each with options and a position of its own; the one below 0 stays as it is."""
    context, vocabulary = 8, 300
    history = rng.integers(0, vocabulary, (4, context)).astype(np.int32)
    options = np.array([[0, 1, 0, 1], [0, 1, 0, 50], [0.7, 1, 1, 1], [0, 1, 0, 1]], np.float32)
    limits = np.array([[1, 0, 0], [1, 0, 3], [9, 0, 0], [1, 0, 0]], np.int64)
    start = np.array([2, 4, 6, -1], np.int32)
    state = sampling.SamplingState(
        na.array(np.full(4, 7, np.int32)).evaluate(), na.array(start).evaluate(), na.array(history).evaluate(),
        na.array(options), na.array(limits),
    )  # fmt: skip
    logits = normal(rng, 4, vocabulary)
    recent = history[1, 2:5]  # of the second, the last 3 up to its position
    logits[1, recent[0]] = 9  # would be chosen but for the penalty
    expected = logits.copy()
    expected[1, recent] = np.where(logits[1, recent] > 0, logits[1, recent] / 50, logits[1, recent] * 50)
    sampling.sample(na.array(logits), state)
    chosen = [*expected.argmax(axis=1)[:3], 7]  # min-p of 1 keeps the highest
    np.testing.assert_array_equal(state.token.numpy(), chosen)
    np.testing.assert_array_equal(state.position.numpy(), [3, 5, 7, -1])
    history[[0, 1, 2], [3, 5, 7]] = chosen[:3]
    np.testing.assert_array_equal(state.history.numpy(), history)


def test_absurd_sizes_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match="a norm over 2097152 values"):
        norm.rms_norm(na.empty((1, 1 << 21)), na.empty((1 << 21,)))
    with pytest.raises(ValueError, match="head_dim is 7"):
        rope_and_cache.head_arguments(1, 7, True, False)
    with pytest.raises(ValueError, match="a head_dim of 4096"):
        attention.causal_attention(na.empty((1, 2, 4096)), na.empty((1, 2, 4096)), na.empty((1, 2, 4096)))

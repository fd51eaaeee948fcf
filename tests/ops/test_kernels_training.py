"""The public operations of training: values and gradients against PyTorch, gradients at float64 against differences,
and steps that `nitinol.compile` makes one submission of.

What the kernels compute is compared with float64 in the files test_kernels_*.py; here is what they are called by.
"""

from __future__ import annotations

import numpy as np
import pytest
from operands import DTYPES, numerical_gradient

import nitinol as na
from nitinol.ops import norm, norm_backward, norm_kernels
from nitinol.runtime import get_device

torch = pytest.importorskip("torch")
functional = torch.nn.functional

# Of the largest value: fp32 sums of some hundred terms; a few roundings to 11 or 8 bits of results and intermediate
# values, of which PyTorch, here in float64, has none.
ERROR = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 6e-2, "float64": 1e-11}


@pytest.fixture(autouse=True)
def one_thread():
    """PyTorch's results are those of one thread, and the tests' processes share the cores."""
    torch.set_num_threads(1)


def compare(ours, theirs, shapes, dtype, rng, weighted=True):
    """ours(*arrays) with theirs(*tensors) at float64, and the gradients of the sum of the result times random numbers
    by all arrays of those shapes."""
    arrays = [na.array(rng.normal(size=shape), dtype).evaluate() for shape in shapes]
    tensors = [torch.tensor(a.numpy().astype(np.float64), requires_grad=True) for a in arrays]
    expected = theirs(*tensors)
    weights = rng.normal(size=expected.shape) if weighted else np.ones(expected.shape)
    factors = na.array(weights, "float64" if dtype == "float64" else "float32")

    def loss(*arrays):
        result = ours(*arrays)
        return (result.astype(factors.dtype) * factors).sum(), result

    places = tuple(range(len(arrays)))
    (_, result), gradients = na.value_and_grad(loss, places, has_aux=True)(*arrays)
    wanted = torch.autograd.grad((expected * torch.tensor(factors.numpy().astype(np.float64))).sum(), tensors)
    for name, found, value, kind in [("value", result, expected, None), *(
        (f"gradient {i}", g, w, a.dtype) for i, (g, w, a) in enumerate(zip(gradients, wanted, arrays))
    )]:  # fmt: skip
        assert found.shape == tuple(value.shape), name
        assert kind is None or found.dtype == kind, name
        difference = np.abs(found.numpy().astype(np.float64) - value.detach().numpy()).max(initial=0.0)
        assert difference <= ERROR[dtype] * max(1.0, value.detach().abs().max().item()), f"{name}: off by {difference}"


def differences(function, shapes, rng, tolerance=1e-6):
    """Gradients of a sum of function(*arrays) at float64, against central differences (whose error is that of squares
    of a step of 1e-6, and of rounding over the step: 1e-9 of the values)."""
    values = [rng.normal(size=shape) for shape in shapes]
    weights = rng.normal(size=function(*(na.array(v, "float64") for v in values)).shape)

    def loss(*arrays):
        return (function(*arrays) * na.array(weights, "float64")).sum()

    found = na.grad(loss, tuple(range(len(values))))(*(na.array(v, "float64") for v in values))
    for i, value in enumerate(values):
        def of_one(x, i=i):
            return loss(*(na.array(x if j == i else v, "float64") for j, v in enumerate(values))).item()

        np.testing.assert_allclose(found[i].numpy(), numerical_gradient(of_one, value.copy()), rtol=tolerance,
                                   atol=1e-7)  # fmt: skip


def one_submission(function, *arguments):
    """Compiled, the function gives the same as without, in one submission."""
    compiled = na.compile(function)
    expected = function(*arguments)
    compiled(*arguments), compiled(*arguments)
    counters = get_device().counters
    before = counters.submits, counters.allocations, counters.waits
    value, gradients = compiled(*arguments)
    assert (counters.submits, counters.allocations, counters.waits) == (before[0] + 1, before[1], before[2] + 1)
    for found, wanted in zip((value, *gradients), (expected[0], *expected[1])):
        np.testing.assert_allclose(found.numpy(), wanted.numpy(), rtol=1e-5, atol=1e-6)
    return compiled


# --------------------------------------------------------------------------------------------------------- attention


def seen(tokens, context, causal=False, window=None):
    place, key = np.arange(tokens)[:, None] + context - tokens, np.arange(context)[None]
    return torch.tensor(((key <= place) | (not causal)) & (window is None or key > place - (window or 0)))


@pytest.mark.parametrize("dtype", [*DTYPES, pytest.param("float64", marks=pytest.mark.float64)])
@pytest.mark.parametrize("turned", [False, True])
def test_attention(rng, dtype, turned):
    """Grouped heads; heads that lie next to each other, as projections give them, are views."""
    tokens, head_dim = int(rng.integers(1, 40)), int(rng.choice([8, 20]))
    context, options = tokens + int(rng.integers(0, 20)), [{}, {"causal": True}, {"causal": True, "window": 5}]
    chosen = options[rng.integers(3)]
    mask = seen(tokens, context, **chosen)
    shapes = [(2, 4, tokens, head_dim), *[(2, 2, context, head_dim)] * 2]
    shapes = [(b, n, h, d) for b, h, n, d in shapes] if turned else shapes

    def ours(*arrays):
        out = na.attention(*(x.swapaxes(1, 2) if turned else x for x in arrays), **chosen)
        return out.swapaxes(1, 2) if turned else out

    def theirs(*tensors):
        q, k, v = (x.transpose(1, 2) if turned else x for x in tensors)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2) if turned else out

    compare(ours, theirs, shapes, dtype, rng)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.float64)])
def test_attention_of_packed_sequences(rng, dtype):
    """One array of several sequences is each by itself; with scale and softcap."""
    starts, starts_k = np.array([0, 7, 8, 20], np.int32), np.array([0, 9, 12, 30], np.int32)
    options = {"causal": True, "scale": 0.3, "softcap": 2.0}

    def ours(q, k, v):
        return na.attention(q, k, v, cu_seqlens_q=na.array(starts), cu_seqlens_k=na.array(starts_k), **options)

    def theirs(q, k, v):
        parts = []
        for a, b, c, d in zip(starts, starts[1:], starts_k, starts_k[1:]):
            keys, values = (x[c:d].repeat_interleave(2, 1) for x in (k, v))
            scores = torch.einsum("thd,shd->hts", q[a:b], keys) * 0.3
            scores = (2 * torch.tanh(scores / 2)).masked_fill(~seen(int(b - a), int(d - c), True), -torch.inf)
            parts.append(torch.einsum("hts,shd->thd", torch.softmax(scores, -1), values))
        return torch.cat(parts)

    compare(ours, theirs, [(20, 4, 8), (30, 2, 8), (30, 2, 8)], dtype, rng)


@pytest.mark.float64
def test_a_query_without_keys_gives_zeros_and_no_nan(rng):
    """The first three of five queries stand before both keys, in the fused and in the composed form."""
    for dtype in ("float32", "float64"):
        q, k, v = (na.array(rng.normal(size=(1, 1, n, 8)), dtype) for n in (5, 2, 2))
        out, gradients = na.value_and_grad(
            lambda q, k, v: ((out := na.attention(q, k, v, causal=True)).sum(), out), (0, 1, 2), has_aux=True
        )(q, k, v)
        assert not out[1].numpy()[0, 0, :3].any() and out[1].numpy()[0, 0, 3:].all()
        assert not gradients[0].numpy()[0, 0, :3].any()
        assert all(np.isfinite(g.numpy()).all() for g in gradients)


def test_attention_never_has_all_scores(rng):
    """Value and gradient of 1024 tokens, as one submission: what is neither operand nor result is less than a quarter
    of the scores of one head."""
    tokens, head_dim = 1024, 16
    arrays = [na.array(rng.normal(size=(1, 1, tokens, head_dim)), "float32").evaluate() for _ in range(3)]
    compiled = one_submission(
        na.value_and_grad(lambda q, k, v: na.attention(q, k, v, causal=True).sum(), (0, 1, 2)), *arrays
    )
    assert 0 < compiled.program.arena.nbytes + sum(3 * a.nbytes for a in arrays) < tokens * tokens * 4


# ------------------------------------------------------------------------------------------------------------- losses


def loss_of_torch(z, targets, label_smoothing, z_loss, reduction):
    targets = torch.tensor(targets, dtype=torch.int64)
    rows, flat = z.reshape(-1, z.shape[-1]), targets.reshape(-1)
    counts = flat != -100
    loss = functional.cross_entropy(rows, flat, label_smoothing=label_smoothing, reduction="none")
    loss = loss + z_loss * torch.logsumexp(rows, -1) ** 2 * counts
    if reduction == "none":
        return loss.reshape(targets.shape)
    return loss.sum() if reduction == "sum" else loss.sum() / counts.sum()


@pytest.mark.parametrize("dtype", [*DTYPES, pytest.param("float64", marks=pytest.mark.float64)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("linear", [False, True])
def test_cross_entropy(rng, dtype, reduction, linear):
    words, columns = int(rng.choice([11, 700])), 33
    targets = rng.integers(0, words, (2, 9)).astype(rng.choice([np.int32, np.int64]))
    targets[rng.random((2, 9)) < 0.3] = -100
    targets[0, 0] = 1
    options = {"label_smoothing": float(rng.choice([0.0, 0.1])), "z_loss": float(rng.choice([0.0, 1e-3])),
               "reduction": reduction}  # fmt: skip
    if linear:
        compare(lambda h, w: na.linear_cross_entropy(h, w * 0.3, na.array(targets), **options),
                lambda h, w: loss_of_torch(h @ (w * 0.3).T, targets, **options),
                [(2, 9, columns), (words, columns)], dtype, rng)  # fmt: skip
    else:
        compare(lambda z: na.cross_entropy(z, na.array(targets), **options),
                lambda z: loss_of_torch(z, targets, **options), [(2, 9, words)], dtype, rng)  # fmt: skip


def test_losses_compile(rng):
    hidden, weight = (na.array(rng.normal(size=s), "float32").evaluate() for s in ((40, 24), (1500, 24)))
    targets = na.array(rng.integers(0, 1500, 40).astype(np.int32)).evaluate()
    one_submission(na.value_and_grad(lambda h, w, t: na.linear_cross_entropy(h, w, t), (0, 1)), hidden, weight, targets)
    one_submission(
        na.value_and_grad(lambda h, w, t: na.cross_entropy(h @ w.T, t), (0, 1)), hidden, weight, targets
    )


def test_both_gradients_of_a_loss_are_there_when_one_was_asked_for_first(rng):
    """They come from one operation with several kernels: looking at one must not lose the other."""
    hidden, weight = (na.array(rng.normal(size=s), "float32") for s in ((6, 8), (600, 8)))
    targets = na.array(rng.integers(0, 600, 6))
    by_hidden, by_weight = na.grad(lambda h, w: na.linear_cross_entropy(h, w, targets), (0, 1))(hidden, weight)
    expected = na.grad(lambda w: na.cross_entropy(hidden @ w.T, targets))(weight).numpy()
    by_hidden.numpy()
    np.testing.assert_allclose(by_weight.numpy(), expected, rtol=1e-4, atol=1e-6)


# -------------------------------------------------------------------------------------------- rotations, gates, rows


@pytest.mark.parametrize("dtype", [*DTYPES, pytest.param("float64", marks=pytest.mark.float64)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(rng, dtype, interleaved):
    batch, tokens, head_dim = 2, int(rng.integers(1, 9)), int(rng.choice([16, 22]))
    frequencies = na.rope_frequencies(16)
    positions = [None, rng.integers(0, 99, tokens), rng.integers(0, 99, (batch, tokens))][rng.integers(3)]
    at = None if positions is None else na.array(positions.astype(np.int32))
    place = np.broadcast_to(np.arange(tokens) if positions is None else positions, (batch, tokens))
    angle = torch.tensor((place.astype(np.float32)[..., None] * frequencies).astype(np.float64))[:, :, None]

    def theirs(x):
        one, other = (x[..., 0:16:2], x[..., 1:16:2]) if interleaved else (x[..., :8], x[..., 8:16])
        first, second = one * angle.cos() - other * angle.sin(), other * angle.cos() + one * angle.sin()
        turned = torch.stack([first, second], -1).flatten(-2) if interleaved else torch.cat([first, second], -1)
        return torch.cat([turned, x[..., 16:]], -1)

    compare(lambda x: na.rope(x, frequencies, at, interleaved=interleaved), theirs, [(batch, tokens, 3, head_dim)],
            dtype, rng)  # fmt: skip

    def ours_of_both(q, k):
        q, k = na.rope((q, k.swapaxes(1, 2)), frequencies, at, interleaved=interleaved)
        return na.concatenate([q, k], 2)

    compare(ours_of_both, lambda q, k: torch.cat([theirs(q), theirs(k.transpose(1, 2))], 2),
            [(batch, tokens, 3, head_dim), (batch, 2, tokens, head_dim)], dtype, rng)  # fmt: skip


@pytest.mark.parametrize("dtype", [*DTYPES, pytest.param("float64", marks=pytest.mark.float64)])
@pytest.mark.parametrize("activation", ["silu", "tanh", "none"])
def test_gates(rng, dtype, activation):
    """Apart, and as halves of one array."""
    shape = (int(rng.integers(1, 5)), int(rng.choice([1, 70, 257])))

    def ours(gate, up):
        return na.swiglu_gate(gate, up) if activation == "silu" else na.geglu_gate(gate, up, activation)

    def theirs(gate, up):
        return (functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate=activation)) * up

    compare(ours, theirs, [shape, shape], dtype, rng)
    wide = (shape[0], 2 * shape[1])
    n = shape[1]
    compare(lambda x: ours(x[:, :n], x[:, n:]), lambda x: theirs(x[:, :n], x[:, n:]), [wide], dtype, rng)


def norms(columns, epsilon=1e-3):
    """Ours and PyTorch's, and the shapes of what they take, for x [.., columns]."""
    size = (columns,)
    return {
        "rms": (lambda x, w: na.rms_norm(x, w, epsilon), lambda x, w: functional.rms_norm(x, size, w, epsilon), 1),
        "rms, no weight": (lambda x: na.rms_norm(x, None, epsilon), lambda x: functional.rms_norm(x, size, None,
                                                                                                  epsilon), 0),
        "layer": (lambda x, w, b: na.layer_norm(x, w, b, epsilon),
                  lambda x, w, b: functional.layer_norm(x, size, w, b, epsilon), 2),
        "layer, no bias": (lambda x, w: na.layer_norm(x, w, None, epsilon),
                           lambda x, w: functional.layer_norm(x, size, w, None, epsilon), 1),
        "layer, only bias": (lambda x, b: na.layer_norm(x, None, b, epsilon),
                             lambda x, b: functional.layer_norm(x, size, None, b, epsilon), 1),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [*DTYPES, pytest.param("float64", marks=pytest.mark.float64)])
@pytest.mark.parametrize("kind", list(norms(1)))
@pytest.mark.parametrize("form", ["one tile", "blocks"])
def test_norms(rng, monkeypatch, dtype, kind, form):
    if form == "blocks":
        monkeypatch.setattr(norm_kernels, "blocks", lambda target: {"LARGEST": 8, "BLOCK": 16})
        monkeypatch.setattr(norm_backward, "blocks", norm_kernels.blocks)
        monkeypatch.setattr(norm, "LARGEST_TILE", 8)
    # more than in the other form, whose plans are remembered
    columns = int(rng.integers(150, 250) if form == "blocks" else rng.integers(2, 150))
    ours, theirs, vectors = norms(columns)[kind]
    shape = (2, int(rng.integers(1, 30)), columns)
    compare(ours, theirs, [shape, *[(columns,)] * vectors], dtype, rng)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.float64)])
def test_rms_norm_of_heads_and_of_sums(rng, dtype):
    """A weight that is a part of the last axis; and both results with a residual, whose gradients meet."""

    def theirs_of_heads(x, w):
        return functional.rms_norm(x.reshape(3, 4, 5), (5,), w, 1e-3).reshape(3, 20)

    compare(lambda x, w: na.rms_norm(x, w, 1e-3), theirs_of_heads, [(3, 20), (5,)], dtype, rng)

    def ours(x, w, residual):
        y, total = na.rms_norm(x, w, 1e-3, residual)
        return y * total

    def theirs(x, w, residual):
        return functional.rms_norm(x + residual, (20,), w, 1e-3) * (x + residual)

    compare(ours, theirs, [(3, 20), (20,), (3, 20)], dtype, rng)
    one_submission(na.value_and_grad(lambda *arrays: ours(*arrays).sum(), (0, 1, 2)), *(
        na.array(rng.normal(size=s), "float32").evaluate() for s in ((3, 20), (20,), (3, 20))))  # fmt: skip


@pytest.mark.parametrize("layer", [False, True])
def test_second_derivatives_of_norms(rng, layer):
    """Through the fused gradient, whose own is a composed one: by x, weight and bias of a function of all first
    gradients."""
    arrays = [rng.normal(size=s).astype(np.float32) for s in ((4, 9), (9,), (9,))][: 3 if layer else 2]
    weights = [rng.normal(size=a.shape).astype(np.float32) for a in arrays]
    factors = rng.normal(size=(4, 9)).astype(np.float32)
    places = tuple(range(len(arrays)))

    def theirs(*tensors):
        y = functional.layer_norm(tensors[0], (9,), *tensors[1:], 1e-2) if layer else functional.rms_norm(
            tensors[0], (9,), tensors[1], 1e-2)  # fmt: skip
        return (y * y * torch.tensor(factors)).sum()

    tensors = [torch.tensor(a.astype(np.float64), requires_grad=True) for a in arrays]
    slopes = torch.autograd.grad(theirs(*tensors), tensors, create_graph=True)
    expected = torch.autograd.grad(sum((s * torch.tensor(w)).sum() for s, w in zip(slopes, weights)), tensors)

    def ours(*arrays):
        y = na.layer_norm(*arrays, 1e-2) if layer else na.rms_norm(*arrays, 1e-2)
        return (y * y * factors).sum()

    def of_slopes(*arrays):
        return sum((s * w).sum() for s, w in zip(na.grad(ours, places)(*arrays), weights))

    for found, wanted in zip(na.grad(of_slopes, places)(*(na.array(a) for a in arrays)), expected):
        largest = wanted.abs().max().item()
        np.testing.assert_allclose(found.numpy(), wanted.numpy(), rtol=1e-4, atol=2e-5 * max(1.0, largest))


@pytest.mark.parametrize("dtype", [*DTYPES, pytest.param("float64", marks=pytest.mark.float64)])
def test_embedding(rng, dtype):
    """Ids that come often, once and never."""
    words = int(rng.integers(1, 90))
    ids = np.minimum(rng.zipf(1.3, (3, 20)) - 1, words - 1).astype(rng.choice([np.int32, np.int64]))
    compare(lambda w: na.embedding(w, na.array(ids)), lambda w: functional.embedding(torch.tensor(ids).long(), w),
            [(words, int(rng.integers(1, 70)))], dtype, rng)  # fmt: skip


@pytest.mark.parametrize("dtype", [*DTYPES, pytest.param("float64", marks=pytest.mark.float64)])
@pytest.mark.parametrize("axis", [-1, 1])
def test_softmax(rng, dtype, axis):
    shape = tuple(int(n) for n in rng.integers(1, 70, 3))
    compare(lambda x: na.softmax(x, axis), lambda x: torch.softmax(x, axis), [shape], dtype, rng)
    compare(lambda x: na.log_softmax(x, axis), lambda x: torch.log_softmax(x, axis), [shape], dtype, rng)


@pytest.mark.parametrize("function", ["softmax", "log_softmax"])
def test_second_derivatives_and_directions_of_softmax(rng, function):
    """Through the fused gradient, whose own is a composed one."""
    ours, theirs = getattr(na, function), getattr(torch, function)
    x, v, w = rng.normal(size=(3, 4, 9)).astype(np.float32)
    tensor = torch.tensor(x.astype(np.float64), requires_grad=True)
    (slope,) = torch.autograd.grad((theirs(tensor, -1) * torch.tensor(w)).sum(), tensor, create_graph=True)
    (expected,) = torch.autograd.grad((slope * torch.tensor(v)).sum(), tensor)
    found = na.grad(lambda x: (na.grad(lambda x: (ours(x) * w).sum())(x) * v).sum())(na.array(x))
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-4, atol=1e-5)
    _, direction = na.jvp(ours, [na.array(x)], [na.array(v)])
    _, expected = torch.autograd.functional.jvp(lambda x: theirs(x, -1), torch.tensor(x), torch.tensor(v))
    np.testing.assert_allclose(direction.numpy(), expected.numpy(), rtol=1e-4, atol=1e-5)


def test_the_gradient_of_ids_outside_the_vocabulary_goes_to_the_rows_that_they_gave(rng):
    weights = na.array(rng.normal(size=(5, 4)), "float32")
    d_out = rng.normal(size=(3, 4)).astype(np.float32)
    gradient = na.grad(lambda w: (na.embedding(w, na.array([1, 7, -2])) * na.array(d_out)).sum())(weights).numpy()
    expected = np.zeros((5, 4), np.float32)
    expected[[1, 4, 0]] = d_out
    np.testing.assert_array_equal(gradient, expected)


def test_a_block_of_a_decoder_compiles(rng):
    """Embedding, rotation, attention, gate: one submission."""
    words, heads, head_dim, tokens = 40, 2, 8, 12
    width = heads * head_dim
    weights = [na.array(rng.normal(size=s) / 4, "float32").evaluate() for s in (
        (words, width), (width, 3 * width), (width, 2 * width))]  # fmt: skip
    ids = na.array(rng.integers(0, words, (1, tokens)).astype(np.int32)).evaluate()
    frequencies = na.array(na.rope_frequencies(head_dim)).evaluate()

    def loss(table, inward, outward):
        x = na.embedding(table, ids)
        q, k, v = ((x @ inward)[..., i * width : (i + 1) * width].reshape(1, tokens, heads, head_dim) for i in range(3))
        q, k = na.rope((q, k), frequencies)
        x = x + na.attention(*(y.swapaxes(1, 2) for y in (q, k, v)), causal=True).swapaxes(1, 2).reshape(x.shape)
        both = x @ outward
        x = na.swiglu_gate(both[..., :width], both[..., width:])
        return na.linear_cross_entropy(x[:, :-1], table, ids[:, 1:])

    one_submission(na.value_and_grad(loss, (0, 1, 2)), *weights)


# ------------------------------------------------------------------------------------------ float64, and what is not


@pytest.mark.float64
def test_gradients_are_differences_at_float64(rng):
    targets = na.array(rng.integers(0, 5, 3))
    frequencies = na.rope_frequencies(4)
    differences(lambda q, k, v: na.attention(q, k, v, causal=True, window=2, softcap=3.0), [(1, 2, 3, 4),
                *[(1, 1, 4, 4)] * 2], rng)  # fmt: skip
    differences(lambda z: na.cross_entropy(z, targets, label_smoothing=0.2, z_loss=0.1), [(3, 5)], rng)
    differences(lambda h, w: na.linear_cross_entropy(h, w, targets, reduction="none"), [(3, 4), (5, 4)], rng)
    differences(lambda x: na.rope(x, frequencies), [(1, 3, 2, 5)], rng)
    differences(na.swiglu_gate, [(2, 3)] * 2, rng)
    differences(na.geglu_gate, [(2, 3)] * 2, rng)
    differences(lambda w: na.embedding(w, targets), [(5, 2)], rng)


def test_a_second_derivative_of_a_fused_kernel_says_what_to_do(rng):
    q = na.array(rng.normal(size=(1, 1, 3, 8)), "float32")

    def slope(q):
        return na.grad(lambda q: na.attention(q, q, q).sum())(q).sum()

    with pytest.raises(na.GradientError, match="float64 operands take a form that has one"):
        na.grad(slope)(q)


def test_what_does_not_fit_is_refused_in_a_sentence():
    x = na.zeros((3, 8))
    with pytest.raises(ValueError, match=r"found shapes \(3, 8\) and \(4,\) of the targets"):
        na.cross_entropy(x, na.zeros((4,), "int32"))
    with pytest.raises(TypeError, match="cross_entropy of an array of int32, expected floats"):
        na.cross_entropy(x.astype("int32"), na.zeros((3,), "int32"))
    with pytest.raises(ValueError, match="the reduction is 'average'"):
        na.linear_cross_entropy(x, x, na.zeros((3,), "int32"), reduction="average")
    with pytest.raises(ValueError, match=r"hidden has shape \(3, 8\) and the weights \(5, 7\)"):
        na.linear_cross_entropy(x, na.zeros((5, 7)), na.zeros((3,), "int32"))
    with pytest.raises(ValueError, match=r"expected q \[batch, heads, T, head_dim\]"):
        na.attention(x, x, x)
    with pytest.raises(ValueError, match=r"a gate of shape \(3, 8\) for values of shape \(3, 7\)"):
        na.swiglu_gate(x, x[:, :7])
    with pytest.raises(ValueError, match="approximate is 'erf', expected 'tanh' or 'none'"):
        na.geglu_gate(x, x, "erf")
    with pytest.raises(TypeError, match="frequencies is of type int32"):
        na.rope(na.zeros((1, 2, 3, 8)), na.zeros((4,), "int32"))

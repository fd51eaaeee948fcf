"""FlashAttention and its gradients against float64: shapes, masks, packed sequences, strides, types, memory."""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import pytest
from kernel_runner import ENGINES

import nitinol as na
from nitinol.graph.launch import InPlace, Output, launch
from nitinol.ops import flash_attention as flash
from nitinol.ops.attention_reference import attention_gradients_reference, attention_reference
from nitinol.runtime.launch import interpret

EPSILON = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # half a unit in the last place of 1
NAMES = ("out", "lse", "dq", "dk", "dv")


@pytest.fixture(params=["cpu", "metal", "cuda"])
def target(request, device_name):
    """The blocks of each target: the CPU runs those of all."""
    if device_name not in ("cpu", request.param):
        pytest.skip(f"the blocks of {request.param}, on {device_name}")
    return request.param


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Every result and intermediate array of a launch is full of NaN before: what a kernel does not write shows."""

    def poisoning(kernel, grid, /, **arguments):
        made = {}
        for name, argument in arguments.items():
            if isinstance(argument, Output):
                made[name] = na.array(np.full(argument.shape, np.nan, np.float32)).astype(argument.dtype).evaluate()
                arguments[name] = InPlace(made[name])
        launch(kernel, grid, **arguments)
        found = tuple(made[name] for name in kernel.arg_names if name in made)
        return found[0] if len(found) == 1 else found

    monkeypatch.setattr(flash, "launch", poisoning)


def given(rng, shape, dtype="float32"):
    """Random values of a type, as an Array and as the float64 array of the same values."""
    array = na.array(rng.normal(size=shape).astype(np.float32)).astype(dtype).evaluate()
    return array, array.astype("float32").numpy().astype(np.float64)


def operands(rng, q_shape, k_shape, dtype="float32"):
    """q, k, v, d_out: four Arrays, and four in float64."""
    pairs = [given(rng, shape, dtype) for shape in (q_shape, k_shape, k_shape, q_shape)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def both_passes(target, arrays, **options):
    """out, lse, dq, dk, dv."""
    q, k, v, d_out = arrays
    out, lse = flash.attention_forward(target, q, k, v, **options)
    return out, lse, *flash.attention_backward(target, q, k, v, out, lse, d_out, **options)


def expected_of(values, **options):
    q, k, v, d_out = values
    options = {name: value.numpy() if isinstance(value, na.Array) else value for name, value in options.items()}
    return *attention_reference(q, k, v, **options), *attention_gradients_reference(q, k, v, d_out, **options)


def compare(found, expected, dtype, told=""):
    """Every number is a sum of products with weights that add up to 1, or of T such sums. fp32 rounds each step, and
    the scores' errors (up to some tens of units, scores being sums over head_dim) go into the weights by exp. Halves
    round weights and ds (2 units of the largest, with targets that multiply halves), `out`, from which delta is
    computed, and the result."""
    for name, result, value in zip(NAMES, found, expected):
        result = result.astype("float32").numpy()
        assert result.shape == value.shape
        finite = np.isfinite(value)
        np.testing.assert_array_equal(result[~finite], value[~finite], err_msg=f"{name} {told}")
        units = 100 if dtype == "float32" else 8
        largest = max(1.0, np.abs(value[finite]).max(initial=0.0))
        np.testing.assert_allclose(result[finite], value[finite], rtol=0, atol=units * EPSILON[dtype] * largest,
                                   err_msg=f"{name} {told}")  # fmt: skip


CASES = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 9},
    "window to the left, later keys seen": {"window": 21},
    "capped": {"causal": True, "softcap": 1.5},
    "scaled": {"scale": 0.7},
}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize(("tokens", "context"), [(1, 1), (37, 37), (70, 133), (133, 70)])
def test_masks(rng, options, tokens, context, device_name):
    arrays, values = operands(rng, (2, 4, tokens, 16), (2, 2, context, 16))
    compare(both_passes(device_name, arrays, **options), expected_of(values, **options), "float32")


@pytest.mark.sampled(5)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
def test_head_dims_and_types(rng, head_dim, dtype, device_name):
    """With the blocks of this device, or on the CPU those of some other."""
    if device_name != "cpu" and head_dim > 96:
        pytest.skip("minutes on a software device; the same code as smaller heads")
    target = device_name if device_name != "cpu" else str(rng.choice(["cpu", "metal", "cuda"]))
    tokens, context = (int(n) for n in rng.integers(65, 140, 2))
    arrays, values = operands(rng, (1, 2, tokens, head_dim), (1, 1, context, head_dim), dtype)
    options = {"causal": True, "window": int(rng.integers(40, 200))}
    told = f"{tokens} tokens, {context} keys, {options}, blocks of {target}"
    found = both_passes(target, arrays, **options)
    assert [str(x.dtype) for x in found] == [str(arrays[0].dtype), "fp32", *[str(arrays[0].dtype)] * 3]
    compare(found, expected_of(values, **options), dtype, told)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("parts", [False, True])
def test_engines(rng, engine, parts, monkeypatch):
    """Both ways of dq, in small blocks, natively and in the interpreter."""
    sizes = {"forward": (16, 8, 0), "keys": (8, 16, 0), "queries": (8, 16, 0), "rows": 8, "dq in parts": parts,
             "DOT": na.array(np.zeros(1, np.float32)).dtype}  # fmt: skip
    monkeypatch.setattr(flash, "blocks", lambda target, head_dim, dtype: sizes)
    arrays, values = operands(rng, (2, 4, 21, 12), (2, 2, 30, 12))
    for options in ({"causal": True, "softcap": 2.0}, {"window": 7, "causal": True}, {}):
        with interpret() if engine == "interpreter" else nullcontext():
            found = [x.evaluate() for x in both_passes("cpu", arrays, **options)]
        compare(found, expected_of(values, **options), "float32", str(options))


@pytest.mark.sampled(1)
def test_any_lengths_and_windows(rng, target, device_name):
    """Which blocks are skipped, which go under masks and which without: lengths and windows about the block sizes."""
    for _ in range(40 if device_name == "cpu" else 4):
        tokens, context = (int(n) for n in rng.integers(1, 300, 2))
        causal = target != "cpu" or bool(rng.integers(2))  # half of the kernels for the blocks of other targets
        options = {"causal": causal, "window": int(rng.integers(1, 300)) if rng.integers(2) else None}
        arrays, values = operands(rng, (1, 2, tokens, 16), (1, 1, context, 16))
        told = f"{tokens} tokens, {context} keys, {options}"
        compare(both_passes(target, arrays, **options), expected_of(values, **options), "float32", told)


@pytest.mark.sampled(2)
def test_packed_sequences(rng, target):
    """Lengths of none, one and several blocks, more sequences than are searched at once, T and S apart."""
    causal = bool(rng.integers(2))
    for count in (1, 5, 40):
        lengths = rng.integers(0, 9, (2, count))
        lengths[:, rng.integers(count)] = rng.integers(100, 200, 2)
        lengths[rng.integers(2), rng.integers(count)] = 0
        starts = np.concatenate([np.zeros((2, 1)), np.cumsum(lengths, axis=1)], axis=1).astype(np.int32)
        arrays, values = operands(rng, (starts[0, -1], 4, 16), (starts[1, -1], 2, 16))
        if 0 in (starts[0, -1], starts[1, -1]):
            continue
        options = {"causal": causal, "cu_seqlens_q": na.array(starts[0]), "cu_seqlens_k": na.array(starts[1])}
        compare(both_passes(target, arrays, **options), expected_of(values, **options), "float32", f"{starts}")
    same = {"causal": causal, "cu_seqlens_q": na.array(starts[0])}
    arrays, values = operands(rng, (starts[0, -1], 4, 16), (starts[0, -1], 2, 16))
    compare(both_passes(target, arrays, **same), expected_of(values, **same), "float32", f"{starts}")


def test_views_are_read_where_they_lie(rng, device_name, monkeypatch):
    """[batch, T, heads, head_dim] seen as heads first: no copy, and results in the same order of axes in memory; so
    with q, k and v in one array."""
    both = given(rng, (2, 45, 4 + 2 + 2, 16))
    parts = [x[:, :, rows].swapaxes(1, 2) for x in both for rows in (slice(0, 4), slice(4, 6), slice(6, 8))]
    d_out = given(rng, (2, 45, 4, 16))
    arrays, values = [*parts[:3], d_out[0].swapaxes(1, 2)], [*parts[3:], d_out[1].swapaxes(1, 2)]
    found = both_passes(device_name, arrays, causal=True)
    compare(found, expected_of(values, causal=True), "float32")
    assert [x.strides[1] for x in found if x.ndim == 4] == [16] * 4
    monkeypatch.setattr(na.Array, "contiguous", lambda self: pytest.fail("a copy"))
    flash.attention_forward(device_name, *arrays[:3])
    monkeypatch.undo()
    turned = [na.array(np.ascontiguousarray(x.swapaxes(2, 3), dtype=np.float32)).swapaxes(2, 3) for x in values]
    compare(both_passes(device_name, turned), expected_of(values), "float32")


def test_scores_that_exp_alone_could_not_take(rng, device_name):
    """Scores of some thousands, and log-sum-exps far below zero, next to keys that are not there."""
    arrays, values = operands(rng, (1, 1, 70, 16), (1, 1, 70, 16))
    arrays[0], values[0] = (arrays[0] * 64.0).evaluate(), values[0] * 64.0
    arrays[1] = na.array(np.asarray(values[1] - 40.0, np.float32))
    values[1] = arrays[1].numpy().astype(np.float64)
    out, lse = flash.attention_forward(device_name, *arrays[:3], scale=1.0)
    expected, expected_lse = attention_reference(*values[:3], scale=1.0)
    # 16 products of some thousands: fp32 knows their sum to 16 * 2^12 * 2^-24, and weights as well
    np.testing.assert_allclose(lse.numpy(), expected_lse, rtol=1e-6, atol=4e-3)
    np.testing.assert_allclose(out.numpy(), expected, atol=4e-2)
    for gradient in flash.attention_backward(device_name, *arrays[:3], out, lse, arrays[3], scale=1.0):
        assert np.isfinite(gradient.numpy()).all()


def test_gradients_of_the_reference_are_its_differences(rng):
    """Central differences along a random direction: an error of h^2 and of rounding over h, each about 1e-10."""
    q, k, v, d_out = (rng.normal(size=shape) for shape in ((2, 4, 7, 8), (2, 2, 9, 8), (2, 2, 9, 8), (2, 4, 7, 8)))
    for options in CASES.values():
        found = attention_gradients_reference(q, k, v, d_out, **options)
        for position, gradient in enumerate(found):
            direction, step = rng.normal(size=gradient.shape), 1e-5
            moved = []
            for sign in (step, -step):
                inputs = [x + sign * direction if i == position else x for i, x in enumerate((q, k, v))]
                moved.append(np.sum(attention_reference(*inputs, **options)[0] * d_out))
            slope = (moved[0] - moved[1]) / (2 * step)
            np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_pytorch_agrees(rng, device_name, causal):
    torch = pytest.importorskip("torch")
    arrays, values = operands(rng, (2, 4, 77, 40), (2, 2, 77, 40))
    tensors = [torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in values[:3]]
    out = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=causal, enable_gqa=True)
    out.backward(torch.tensor(values[3], dtype=torch.float32))
    found = both_passes(device_name, arrays, causal=causal)
    expected = [out.detach(), *(x.grad for x in tensors)]
    for result, value in zip((found[0], *found[2:]), expected):  # both in fp32: twice the error of one
        np.testing.assert_allclose(result.numpy(), value.numpy(), rtol=1e-4, atol=2e-5)


def test_memory_grows_with_the_sequence(monkeypatch, target):
    """What both passes allocate at 2^20 tokens, recorded and not run: results, and some numbers a query."""
    made = []

    def recording(kernel, grid, /, **arguments):
        outputs = [argument for argument in arguments.values() if isinstance(argument, Output)]
        made.extend(4 * math.prod(output.shape) for output in outputs)
        return launch(kernel, grid, **arguments)

    monkeypatch.setattr(flash, "launch", recording)
    tokens = 1 << 20
    q = na.array(np.zeros((1, 1, 1, 32), np.float32)).looking((1, 1, tokens, 32), (0, 0, 0, 1))
    flash.attention_backward(target, q, q, q, *flash.attention_forward(target, q, q, q), q)
    assert sum(made) < 24 * 4 * tokens * 32


def test_results_do_not_depend_on_the_order_of_programs(rng, device_name):
    arrays, _ = operands(rng, (1, 4, 200, 16), (1, 1, 200, 16))
    first, second = ([x.numpy() for x in both_passes(device_name, arrays, causal=True)] for _ in range(2))
    for a, b in zip(first, second):
        np.testing.assert_array_equal(a, b)


def test_what_does_not_fit_is_refused_in_a_sentence(rng):
    def attention(*shapes, dtype="float32", **options):
        return flash.attention_forward("cpu", *(na.empty(shape, dtype) for shape in shapes), **options)

    fine = (1, 2, 5, 16), (1, 2, 5, 16), (1, 2, 5, 16)
    with pytest.raises(ValueError, match="expected q \\[batch, heads, T, head_dim\\]"):
        attention((2, 5, 16), *fine[1:])
    with pytest.raises(ValueError, match="heads a multiple of kv_heads"):
        attention((1, 3, 5, 16), *fine[1:])
    with pytest.raises(ValueError, match="a head_dim of 512: expected 1 to 256"):
        attention(*[(1, 2, 5, 512)] * 3)
    with pytest.raises(ValueError, match="expected one of float32, float16 and bfloat16"):
        attention(*fine, dtype="int32")
    with pytest.raises(ValueError, match="window is 0, expected a positive number"):
        attention(*fine, window=0)
    with pytest.raises(ValueError, match="softcap is -1"):
        attention(*fine, softcap=-1.0)
    with pytest.raises(ValueError, match="cu_seqlens_k without cu_seqlens_q"):
        attention(*fine, cu_seqlens_k=na.empty((3,), "int32"))
    with pytest.raises(ValueError, match=r"cu_seqlens_q is int64 of shape \(3,\)"):
        attention(*[(5, 2, 16)] * 3, cu_seqlens_q=na.empty((3,), "int64"))
    q, k, v = (na.empty(shape) for shape in fine)
    with pytest.raises(ValueError, match="d_out has shape"):
        flash.attention_backward("cpu", q, k, v, q, na.empty((1, 2, 5)), na.empty((1, 2, 4, 16)))
    with pytest.raises(ValueError, match="lse has shape"):
        flash.attention_backward("cpu", q, k, v, q, na.empty((1, 2, 4)), q)

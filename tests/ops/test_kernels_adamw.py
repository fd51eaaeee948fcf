"""AdamW over a flat buffer: one step and many against float64 and PyTorch, states of 32 bits and of 8, clipping,
parameters of half types, and a compiled step that is submitted again."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_runner import ENGINES, padded, poisoned, run

import nitinol as na
import nitinol.language as tl
from nitinol.language.jit import jit
from nitinol.ops import adamw, dynamic_bytes


@jit
def bytes_kernel(values, codes, scales, out, back, GROUPS: tl.constexpr, SIGNED: tl.constexpr):
    """Values to bytes, and those bytes back."""
    group = tl.arange(0, GROUPS)
    at = group[:, None] * 256 + tl.arange(0, 256)[None, :]
    dynamic_bytes.store_dynamic(codes, scales, group, group < GROUPS, tl.load(values + at), SIGNED)
    all = tl.arange(0, 256)
    tl.store(out + all, dynamic_bytes.from_dynamic(tl.load(back + all), SIGNED))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("signed", [False, True])
def test_bytes(rng, engine, signed):
    """Every byte is its number, and values over many decades go to the nearest."""
    groups = 8
    values = 10 ** rng.uniform(-9, 0, (groups, 256)) * 10 ** rng.uniform(-8, 8, (groups, 1))
    if signed:
        values *= rng.choice([-1, 1], values.shape)
    values[0, :200] = 0
    values[1] = 0
    values = values.astype(np.float32)
    codes, scales, out = poisoned(values.shape, np.uint8), poisoned(groups), poisoned(256)
    run(engine, bytes_kernel, (1,), values=values, codes=codes, scales=scales, out=out,
        back=np.arange(256, dtype=np.uint8), GROUPS=groups, SIGNED=signed)  # fmt: skip
    numbers = dynamic_bytes.dynamic_numbers(signed)
    assert len(np.unique(numbers)) == 256
    # 0.1 + 0.9 x with x rounded twice: up to five units in the last place
    np.testing.assert_allclose(out, numbers, rtol=4e-7)
    expected, expected_scales = dynamic_bytes.quantize_reference(values.astype(np.float64), signed)
    np.testing.assert_array_equal(scales, expected_scales)
    fractions = values.astype(np.float64) / np.maximum(expected_scales, 1e-300)[:, None]
    error, least = (np.abs(numbers[c] - fractions) for c in (codes, expected))
    assert (error <= least + 1e-6 * np.abs(fractions)).all()  # a value halfway may go either way
    assert (codes == expected).mean() > 0.99
    if not signed:
        assert ((codes == 0) == (values == 0)).all()


def model(rng, shapes, dtype=np.float32):
    """Flat parameters and gradients with zeros between them, and which values belong to a parameter."""
    offsets, size = adamw.flat_offsets(shapes)
    flat, gradients, used = np.zeros(size, dtype), np.zeros(size, dtype), np.zeros(size, bool)
    for offset, shape in zip(offsets, shapes):
        part = slice(offset, offset + int(np.prod(shape)))
        flat[part], gradients[part] = rng.normal(size=(2, int(np.prod(shape))))
        used[part] = True
    return flat, gradients, used


SHAPES = [(3, 100), (7,), (257,), (40, 33), (1,), (256,)]
DECAYS = [0.1, 0.0, 0.1, 0.3, 0.0, 0.01]


def per_value(decay):
    return np.repeat(decay.numpy().astype(np.float64), 256)


@pytest.mark.parametrize("limit", [None, 0.5, 1e6])
@pytest.mark.parametrize("eight_bit", [False, True])
def test_steps_against_float64(rng, device_name, eight_bit, limit):
    """Each step from the state that the kernel itself left, so that a rounding to another byte does not add up."""
    flat, _, used = model(rng, SHAPES)
    parameters, decay = na.array(flat).evaluate(), adamw.decay_table(SHAPES, DECAYS)
    state, rate = adamw.adamw_state(flat.size, eight_bit), na.array(np.array([0.01], np.float32)).evaluate()
    mean, variance, before = np.zeros(flat.size), np.zeros(flat.size), flat.astype(np.float64)
    for step in (1, 2, 3):
        _, given, _ = model(rng, SHAPES)
        gradients = na.array(given)
        squares = None if limit is None else adamw.gradient_squares(device_name, gradients)
        norm = adamw.adamw_step(device_name, parameters, gradients, state, rate, decay, squares=squares, limit=limit)
        if limit is None:
            assert norm is None
        else:
            np.testing.assert_allclose(norm.numpy(), [np.linalg.norm(given.astype(np.float64))], rtol=1e-6)
        after, mean, variance = adamw.adamw_reference(
            before, given, mean, variance, step, float(np.float32(0.01)), per_value(decay), limit=limit
        )
        # A value of size 1 is rounded by 6e-8; a change of up to 0.01 is good to some roundings of its factors.
        np.testing.assert_allclose(parameters.numpy(), after, rtol=2e-7, atol=2e-7)
        np.testing.assert_array_equal(state.steps.numpy(), step)
        found = [state.mean.numpy(), state.variance.numpy()]
        if eight_bit:
            for place, (codes, scales, signed) in enumerate(((found[0], state.mean_scales, True),
                                                             (found[1], state.variance_scales, False))):  # fmt: skip
                wanted = (mean, variance)[place].reshape(-1, 256)
                back = dynamic_bytes.dequantize_reference(codes.reshape(-1, 256), scales.numpy(), signed)
                nearest = dynamic_bytes.dequantize_reference(*dynamic_bytes.quantize_reference(wanted, signed), signed)
                error, least = np.abs(back - wanted), np.abs(nearest - wanted)
                # A mean is a sum of two terms of up to 0.4, rounded by 6e-8, that may all but cancel.
                rounding = 1e-6 * np.abs(wanted).max(axis=1, keepdims=True) + (3e-8 if signed else 0)
                assert (error <= least * (1 + 1e-4) + rounding).all()
                found[place] = back.reshape(-1)
            mean, variance = found
        else:
            np.testing.assert_allclose(found[0], mean, rtol=1e-6, atol=1e-7)
            np.testing.assert_allclose(found[1], variance, rtol=1e-6, atol=1e-9)
        assert (parameters.numpy()[~used] == 0).all()
        before = parameters.numpy().astype(np.float64)


def test_200_steps_beside_pytorch(rng, device_name):
    """The same gradients, decay on for some parameters, clipping and a rate that changes. Each step rounds a parameter
    by up to 6e-8 of it, and PyTorch's factor 1 - rate * decay by 3e-8 in one direction: 6e-6 in 200 steps."""
    torch = pytest.importorskip("torch")
    flat, _, _ = model(rng, SHAPES)
    offsets, _ = adamw.flat_offsets(SHAPES)
    parts = [slice(o, o + int(np.prod(s))) for o, s in zip(offsets, SHAPES)]
    leaves = [torch.nn.Parameter(torch.tensor(flat[part].copy())) for part in parts]
    optimizer = torch.optim.AdamW(
        [{"params": [leaf], "weight_decay": decay} for leaf, decay in zip(leaves, DECAYS)], lr=0.01, betas=(0.9, 0.99)
    )
    parameters, decay = na.array(flat).evaluate(), adamw.decay_table(SHAPES, DECAYS)
    state, rate = adamw.adamw_state(flat.size), na.array(np.array([0.01], np.float32)).evaluate()
    gradients = na.array(np.zeros_like(flat)).evaluate()

    @na.compile
    def step():
        squares = adamw.gradient_squares(device_name, gradients)
        return adamw.adamw_step(
            device_name, parameters, gradients, state, rate, decay, (0.9, 0.99), squares=squares, limit=20.0
        )

    for number in range(200):
        _, given, _ = model(rng, SHAPES)
        gradients.assign(na.array(given)).evaluate()
        learning = 0.01 * (1 - number / 400)
        rate.assign(na.array(np.array([learning], np.float32))).evaluate()
        norm = step()
        for leaf, part in zip(leaves, parts):
            leaf.grad = torch.tensor(given[part].copy())
        for group in optimizer.param_groups:
            group["lr"] = learning
        expected = torch.nn.utils.clip_grad_norm_(leaves, 20.0)
        np.testing.assert_allclose(norm.numpy(), [expected.item()], rtol=1e-6)
        optimizer.step()
    assert len(step.records) == 2 and state.steps.numpy()[0] == 200
    found = parameters.numpy()
    for leaf, part in zip(leaves, parts):
        np.testing.assert_allclose(found[part], leaf.detach().numpy(), rtol=1e-5, atol=1e-5)


def minimise(device_name, rng, eight_bit, steps=300):
    """The distance from the minimum of a quadratic with curvatures over three decades, after so many steps."""
    size = 1024
    curvature, target = 10 ** rng.uniform(-2, 1, size), rng.normal(size=size)
    parameters = na.array(np.zeros(size, np.float32)).evaluate()
    state, decay = adamw.adamw_state(size, eight_bit), na.array(np.zeros(4, np.float32)).evaluate()
    rate = na.array(np.array([0.02], np.float32)).evaluate()
    for _ in range(steps):
        given = (curvature * (parameters.numpy() - target) + rng.normal(size=size) * 0.01).astype(np.float32)
        adamw.adamw_step(device_name, parameters, na.array(given), state, rate, decay)
        state.steps.evaluate()
    return np.sqrt(np.mean((parameters.numpy() - target) ** 2))


def test_states_in_bytes_find_the_minimum(rng, device_name):
    """From a distance of 1 both come to within a few steps of 0.02 of the minimum: 0.033 to 0.038 with moments in
    float32, 0.043 to 0.051 in bytes."""
    assert minimise(device_name, rng, False) < 0.06
    assert minimise(device_name, rng, True) < 0.08


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("with_master", [False, True])
def test_half_parameters(rng, device_name, dtype, with_master):
    """Many small steps reach a half parameter only by way of a float32 copy; the last rounding is the only one then."""
    flat, given, _ = model(rng, SHAPES)
    parameters, gradients = (na.array(a).astype(dtype).evaluate() for a in (flat, given))
    start = parameters.numpy().astype(np.float64)
    master = na.array(parameters.numpy().astype(np.float32)).evaluate() if with_master else None
    state, rate = adamw.adamw_state(flat.size, master=master), na.array(np.array([1e-4], np.float32)).evaluate()
    decay = adamw.decay_table(SHAPES, [0.0] * len(SHAPES))
    steps = 20 if with_master else 1
    for _ in range(steps):
        adamw.adamw_step(device_name, parameters, gradients, state, rate, decay)
    same = gradients.numpy().astype(np.float64)  # at every step, so that corrected moments are g and g ** 2
    expected = start - steps * 1e-4 * same / (np.abs(same) + 1e-8)
    if with_master:  # each step rounds a value of up to 4 by 2.4e-7
        np.testing.assert_allclose(master.numpy(), expected, rtol=0, atol=steps * 2.4e-7)
    half_unit = 2.0**-11 if dtype == "float16" else 2.0**-8
    np.testing.assert_allclose(parameters.numpy(), expected, rtol=half_unit, atol=steps * 2.4e-7)


@pytest.mark.parametrize("engine", ENGINES)
def test_kernels_stay_in_their_memory(rng, engine):
    groups = 3
    flat, given, decay = rng.normal(size=groups * 256), rng.normal(size=groups * 256), np.full(groups, 0.1)
    parameters, gradients = padded(flat.astype(np.float32)), padded(given.astype(np.float32))
    mean, variance = (padded(np.zeros(groups * 256, np.float32)) for _ in range(2))
    steps, partial, norm = padded(np.full(groups, 4, np.int32)), poisoned(3), poisoned(2)
    run(engine, adamw.squares_kernel, (2,), gradients=gradients, partial=partial, size=groups * 256, BLOCK=128)
    assert np.isnan(partial[2])
    run(engine, adamw.adamw_kernel, (2,), parameters=parameters, gradients=gradients, mean=mean, variance=variance,
        mean_scales=None, variance_scales=None, steps=steps, master=None, decay=padded(decay.astype(np.float32)),
        rate=np.array([0.1], np.float32), partial=partial, norm=norm, blocks=groups, parts=2, limit=1.0, epsilon=1e-8,
        GROUPS=2, PARTS=2, BYTES=False, **adamw._constants((0.9, 0.999)))  # fmt: skip
    zeros = np.zeros(flat.size)
    expected = adamw.adamw_reference(
        flat.astype(np.float32).astype(np.float64), given.astype(np.float32), zeros, zeros, 5, 0.1, zeros + 0.1,
        limit=1.0,
    )  # fmt: skip
    for found, wanted in zip((parameters, mean, variance), expected):
        np.testing.assert_allclose(found[: flat.size], wanted, rtol=2e-6, atol=1e-7)
        assert np.isnan(found[flat.size :]).all()
    np.testing.assert_array_equal(steps, [5] * groups + [0x5A] * 64)
    assert np.isnan(norm[1])


def test_refusals():
    with pytest.raises(ValueError, match="a flat buffer of 100 values, expected a multiple of 256"):
        adamw.adamw_state(100)
    state, flat, rate = adamw.adamw_state(512), na.empty((512,)), na.empty((1,))
    with pytest.raises(ValueError, match=r"decay have shape \(3,\), expected \(2,\)"):
        adamw.adamw_step("cpu", flat, flat, state, rate, na.empty((3,)))
    with pytest.raises(ValueError, match="betas are"):
        adamw.adamw_step("cpu", flat, flat, state, rate, na.empty((2,)), (1.0, 0.9))
    with pytest.raises(ValueError, match="give both or none"):
        adamw.adamw_step("cpu", flat, flat, state, rate, na.empty((2,)), limit=1.0)

"""What has no gradient, or cannot be traced: one sentence with the operation, what was found, the program's line, and
what to do."""

from __future__ import annotations

import numpy as np
import pytest

import nitinol as na
from nitinol import GradientError

HERE = "test_refusals.py:"


def fresh(*shape):
    return na.array(np.random.default_rng().standard_normal(shape).astype(np.float32))


def assigned(a):
    state = na.zeros(3).copy()
    state.assign(a * 2.0)
    return state.sum()


def assigned_slice(a):
    y = a * 2.0
    y[1:] = 0.0
    return y.sum()


def assigned_argument(a):
    a.assign(1.0)
    return (a * 3.0).sum()


def read_before_an_update(a):
    state = na.array([1.0, 2.0, 3.0])
    product = a * state
    state.assign(0.0)
    return product.sum()


def result_before_an_update(a):
    state = na.ones(3).copy()
    result = na.exp(state * a)
    state.assign(state + 1.0)
    return result.sum()


def bad_count(a, b):
    return a * b, lambda g: g


def bad_shape(a):
    return a * 2.0, lambda g: g.sum()


def checkpointed_update(a):
    state = na.zeros(3).copy()

    def inner(b):
        state.assign(na.ones(3))
        return (b * 2.0).sum()

    return na.checkpoint(inner)(a)


REFUSED = {
    "an update": (assigned, "copy ({here}) updates an array in place, through which no gradient flows, and sum"),
    "a slice": (assigned_slice, "copy ({here}) updates an array in place"),
    "the argument": (assigned_argument, "copy ({here}) updates an array in place"),
    "a factor updated later": (read_before_an_update, "the gradient of multiply ({here}) needs an array of shape (3,)"),
    "an operand updated later": (result_before_an_update, "the gradient of multiply ({here}) needs an array"),
    "a bitcast": (lambda a: a.bitcast("int32").bitcast("float16").sum(), "sum ({here}) reads a bitcast from fp32"),
    "a bitcast result": (lambda a: a.bitcast("float16")[0], "the function's result reads a bitcast from fp32 to fp16"),
    "an integer": (lambda a: na.argmax(a), "grad ({here}): the function gives an array of shape () and type int32"),
    "a vector": (lambda a: a, "grad ({here}): the function gives an array of shape (3,) and type fp32, expected an"),
    "no array": (lambda a: 3.0, "grad ({here}): the function gives 3.0, expected an array of one float"),
    "nothing": (lambda a: None, "grad ({here}): the function gives None"),
    "too few gradients": (
        lambda a: na.custom_gradient(bad_count)(a, a).sum(),
        "bad_count ({here}) takes 2 arrays, but its backward gives 1 gradients",
    ),
    "a gradient's shape": (
        lambda a: na.custom_gradient(bad_shape)(a).sum(), "the gradient of bad_shape ({here}) has shape () for an",
    ),
    "an update in a checkpoint": (checkpointed_update, "copy ({here}) updates an array in place inside a checkpoint"),
    "a checkpoint of no array": (lambda a: na.checkpoint(lambda b: 2.0)(a), "checkpoint of <lambda> ({here}): the"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_gradient(name):
    function, text = REFUSED[name]
    with pytest.raises(GradientError) as caught:
        na.grad(function)(fresh(3)).evaluate()
    message = str(caught.value)
    start, _, rest = text.partition("{here}")
    assert message.startswith(start) and rest in message
    assert ("{here}" not in text or HERE in message) and message.count(";") == 1 and "\n" not in message


@pytest.mark.parametrize("argument", [
    lambda: na.array([1, 2]), lambda: na.array([True]), lambda: na.quantize(np.ones((2, 32), np.float32), "Q8_0"),
], ids=["int", "bool", "blocks"])  # fmt: skip
def test_arguments_that_are_no_floats(argument):
    with pytest.raises(GradientError, match=r"test_refusals.py:\d+\): a gradient by an array of shape .* leave it out"):
        na.grad(lambda a: a.sum())(argument())


def test_a_kernel_has_none_unless_it_is_given_one():
    @na.jit
    def twice(x, out, BLOCK: na.language.constexpr):
        at = na.language.arange(0, BLOCK)
        na.language.store(out + at, na.language.load(x + at) * 2.0)

    def launched(a):
        return na.launch(twice, (1,), x=a, out=na.Output((4,), "float32"), BLOCK=4)

    with pytest.raises(GradientError, match=r"twice \(.*test_refusals.py:\d+\) has no gradient: .*custom_gradient"):
        na.grad(lambda a: launched(a).sum())(fresh(4))
    given = na.custom_gradient(lambda a: (launched(a), lambda g: g * 2.0))
    assert (na.grad(lambda a: given(a).sum())(fresh(4)).numpy() == 2).all()


def test_numbers_and_shapes_of_arguments():
    x = fresh(3)
    with pytest.raises(ValueError, match=r"test_refusals.py:\d+\): argnums is 1, but the call has 1 positional"):
        na.grad(lambda a: a.sum(), argnums=1)(x)
    with pytest.raises(ValueError, match="names an argument twice"):
        na.grad(lambda a, b: a.sum(), argnums=(0, -2))(x, x)
    with pytest.raises(GradientError, match="expected a pair"):
        na.grad(lambda a: a.sum(), has_aux=True)(x)
    with pytest.raises(ValueError, match=r"jvp .*primals have shapes \[\(3,\)\] and the tangents \[\(2,\)\]"):
        na.jvp(lambda a: a * 2.0, (x,), (fresh(2),))
    with pytest.raises(ValueError, match=r"jvp .*same shapes and structure"):
        na.jvp(lambda a, b: a * b, (x, x), (x,))
    _, pull = na.vjp(lambda a: (a * 2.0, a), x)
    with pytest.raises(ValueError, match="another structure"):
        pull(x)
    with pytest.raises(ValueError, match=r"a gradient has shape \(2,\), but its result \(3,\)"):
        pull((x, fresh(2)))
    with pytest.raises(GradientError, match="the function gives 'text', expected arrays"):
        na.vjp(lambda a: (a, "text"), x)
    with pytest.raises(GradientError, match="the function gives None"):
        na.vjp(lambda a: None, x)


# ------------------------------------------------------------------------------------------------------- compile


@pytest.mark.parametrize("look", [
    lambda a: a.numpy(), lambda a: a.sum().item(), lambda a: bool(a.sum() > 0), lambda a: float((a * 2.0).sum()),
    lambda a: [0.0] * na.argmax(a).item(), lambda a: na.grad(lambda b: b * b.item())(a.sum()),
], ids=range(6))  # fmt: skip
def test_values_read_inside_a_trace(look):
    def traced(a):
        look(a)
        return a

    with pytest.raises(RuntimeError, match=r"asks for the elements .*test_refusals.py:\d+\); return the array"):
        na.compile(traced)(fresh(3))
    assert na.compile(lambda a: a * 2.0)(fresh(3)).shape == (3,)  # the refused trace leaves nothing behind


def test_branches_on_data_are_refused_and_those_on_constants_taken():
    def branch(a, flag, n):
        for _ in range(n):
            a = a * 2.0 if flag else a + 1.0
        return a

    compiled = na.compile(branch)
    x = fresh(3)
    np.testing.assert_allclose(compiled(x, True, 2).numpy(), x.numpy() * 4)
    np.testing.assert_allclose(compiled(x, False, 3).numpy(), x.numpy() + 3, rtol=1e-6)
    with pytest.raises(RuntimeError, match="while it is traced"):
        compiled(x, x.sum() > 0, 1)


@pytest.mark.cpu
def test_arrays_of_several_devices():
    other = na.CpuDevice()
    with na.using_device(other):
        y = fresh(3).evaluate()
    with pytest.raises(Exception, match=r"add \(.*test_refusals.py:\d+\) takes arrays of several devices .*copy them"):
        (fresh(3) + y).evaluate()

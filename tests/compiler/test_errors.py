"""Errors of kernel authors: the right line, the right columns, what was found and what was expected."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest
from test_frontend import build

import nitinol.language as tl
from nitinol.compiler.errors import CompilationError
from nitinol.runtime.kernel import jit

X = np.zeros(64, np.float32)
PLAIN = 3


def failure(kernel, *arguments):
    with pytest.raises(CompilationError) as caught:
        build(kernel, *arguments)
    return caught.value


def marked(error):
    """The part of the source line above the carets."""
    lines = str(error).splitlines()
    carets = next(i for i, line in enumerate(lines) if line.strip() and set(line.strip()) == {"^"})
    start = lines[carets].index("^")
    return lines[carets - 1][start : start + lines[carets].count("^")]


@jit
def shapes(p):
    x = tl.zeros((16,), tl.float32)
    y = tl.zeros((32,), tl.float32)
    tl.store(p, x + y)


@jit
def tile_shapes(p):
    a = tl.zeros((8, 16), tl.float32)
    b = tl.zeros((8, 4), tl.float32)
    tl.dot(a, b)


@jit
def ranks(p):
    tl.broadcast_to(tl.zeros((4, 2), tl.int8), (4, 4))


@jit
def store_value(p):
    tl.store(p + tl.arange(0, 16), tl.zeros((32,), tl.float32))


@jit
def store_tile_at_scalar(p):
    tl.store(p, tl.zeros((32,), tl.float32))


@jit
def odd_arange(p):
    tl.arange(0, 12)


@jit
def run_time_shape(p, n):
    tl.arange(0, n)


@jit
def odd_shape(p):
    tl.zeros((3, 4), tl.float32)


@jit
def huge(p):
    tl.zeros((4096, 4096), tl.float32)


@jit
def reshaped(p):
    tl.zeros((4, 4), tl.float32).reshape(8)


@jit
def not_a_pointer(p, n):
    tl.load(n)


@jit
def other_without_mask(p):
    tl.load(p, other=0)


@jit
def float_pointer(p):
    tl.load(p + 1.5)


@jit
def two_pointers(p):
    tl.load(p + p)


@jit
def signedness(p):
    tl.zeros((4,), tl.int32) // tl.zeros((4,), tl.uint32)


@jit
def negative_unsigned(p):
    tl.zeros((4,), tl.uint32) + -1


@jit
def out_of_range(p):
    tl.zeros((4,), tl.int8) + 300


@jit
def integer_exp(p, n):
    tl.exp(n)


@jit
def float_floor_division(p, n):
    tl.load(p) // 2


@jit
def bitwise_float(p):
    tl.load(p) & 1


@jit
def power(p):
    tl.load(p) ** 2


@jit
def bit_widths(p):
    tl.load(p).to(tl.int16, bitcast=True)


@jit
def bad_axis(p):
    tl.sum(tl.zeros((4, 4), tl.float32), axis=2)


@jit
def bad_permutation(p):
    tl.permute(tl.zeros((4, 4), tl.float32), (0, 0))


@jit
def indexed(p):
    tl.zeros((4,), tl.float32)[0]


@jit
def undefined(p):
    tl.store(p, nowhere)  # noqa: F821


@jit
def plain_global(p):
    tl.store(p, PLAIN)


def undecorated(x):
    return x


@jit
def plain_function(p):
    undecorated(tl.load(p))


@jit
def no_attribute(p):
    tl.load(p).squeeze()


@jit
def no_operation(p):
    tl.loud(p)


@jit
def missing_argument(p):
    tl.load()


@jit
def unknown_keyword(p):
    tl.load(p, masks=None)


@jit
def tile_condition(p):
    if tl.arange(0, 4) > 2:
        tl.store(p, 1)


@jit
def condition_as_number(p, n):
    int(n)


@jit
def broken_loop(p, n):
    for i in range(n):
        if i > 3:
            break


@jit
def nested_function(p):
    def inner():
        pass


@jit
def with_statement(p):
    with p:
        pass


@jit
def float_bounds(p, n):
    for _ in range(n * 0.5):
        pass


@jit
def returned_value(p):
    return 3


@jit
def failed_assert(p):
    tl.static_assert(1 > 2, f"one is {1}")


@jit
def unpacking(p):
    _a, _b = (1, 2, 3)


@jit
def wrong_mask(p):
    tl.load(p + tl.arange(0, 4), mask=tl.arange(0, 8) < 3)


@jit
def half_dot(p):
    tl.dot(tl.zeros((4, 4), tl.float32), tl.zeros((4, 4), tl.float16))


@jit
def small_atomic(p):
    tl.atomic_max(p.to(tl.pointer_type(tl.int8)), 1)


@jit
def wrong_constexpr(p, n):
    takes_constexpr(n)


@jit
def takes_constexpr(N: tl.constexpr):
    tl.arange(0, N)


CASES = [
    (shapes, "x + y", r"'\+' of shapes \(16,\) and \(32,\): the extents 16 and 32 at axis 0 differ"),
    (tile_shapes, "tl.dot(a, b)", r"dot of shapes \(8, 16\) and \(8, 4\): the inner extents are 16 and 8"),
    (ranks, "tl.broadcast_to(tl.zeros((4, 2), tl.int8), (4, 4))", r"\(4, 2\) cannot be broadcast to shape \(4, 4\)"),
    (store_value, "tl.store(p + tl.arange(0, 16), tl.zeros((32,), tl.float32))", r"\(32,\) and \(16,\)"),
    (store_tile_at_scalar, "tl.store(p, tl.zeros((32,), tl.float32))", r"shape \(32,\), .* pointers have shape \(\)"),
    (odd_arange, "tl.arange(0, 12)", "power of two, found 12"),
    (run_time_shape, "tl.arange(0, n)", r"end of arange must be known at compile time .* found n \(int32\)"),
    (odd_shape, "tl.zeros((3, 4), tl.float32)", r"power of two, found shape \(3, 4\)"),
    (huge, "tl.zeros((4096, 4096), tl.float32)", "16777216 elements, the limit is 1048576"),
    (reshaped, "tl.zeros((4, 4), tl.float32).reshape(8)", r"\(4, 4\) has 16 elements, the shape \(8,\) asks for 8"),
    (not_a_pointer, "tl.load(n)", r"load takes a pointer or a tile of pointers, found n \(int32\)"),
    (other_without_mask, "tl.load(p, other=0)", "`other` was given without `mask`"),
    (float_pointer, "p + 1.5", r"'\+' of a pointer takes an integer, found \*fp32 and fp32"),
    (two_pointers, "p + p", "cannot add two pointers"),
    (signedness, "tl.zeros((4,), tl.int32) // tl.zeros((4,), tl.uint32)", "'//' of int32 and uint32: the signedness"),
    (negative_unsigned, "tl.zeros((4,), tl.uint32) + -1", "unsigned type uint32 and a negative number"),
    (out_of_range, "tl.zeros((4,), tl.int8) + 300", r"300 is out of range for int8 \(-128 to 127\)"),
    (integer_exp, "tl.exp(n)", r"exp takes floats, found int32; cast"),
    (float_floor_division, "tl.load(p) // 2", r"'//' takes integers, found fp32; use tl.floor"),
    (bitwise_float, "tl.load(p) & 1", "'&' takes integers, found fp32"),
    (power, "tl.load(p) ** 2", r"'\*\*' is not defined for tensors"),
    (bit_widths, "tl.load(p).to(tl.int16, bitcast=True)", r"cannot bitcast fp32 \(32 bits\) to int16 \(16 bits\)"),
    (bad_axis, "tl.sum(tl.zeros((4, 4), tl.float32), axis=2)", "axis 2 is out of range for a tile of rank 2"),
    (bad_permutation, "tl.permute(tl.zeros((4, 4), tl.float32), (0, 0))", r"permutation of 0\.\.1 .* found \(0, 0\)"),
    (indexed, "tl.zeros((4,), tl.float32)[0]", "indexed only with ':' and None, found 0"),
    (undefined, "nowhere", "the name nowhere is not defined"),
    (plain_global, "PLAIN", r"global PLAIN is a plain int: .* PLAIN = tl.constexpr\(3\)"),
    (plain_function, "undecorated(tl.load(p))", "undecorated is a plain Python function: decorate it"),
    (no_attribute, "tl.load(p).squeeze", "tensor has no attribute 'squeeze'"),
    (no_operation, "tl.loud", "nitinol.language has no attribute 'loud'"),
    (missing_argument, "tl.load()", "missing 1 required positional argument: 'pointer'"),
    (unknown_keyword, "tl.load(p, masks=None)", "unexpected keyword argument 'masks'"),
    (tile_condition, "tl.arange(0, 4) > 2", r"an `if` takes a scalar, found a tile of shape \(4,\)"),
    (condition_as_number, "int(n)", r"n \(int32\) is known only at run time"),
    (broken_loop, "break", "kernels do not support `break`; put the condition into a `while` loop"),
    (nested_function, "def inner():", "do not support `functiondef`; define @jit functions outside"),
    (with_statement, "with p:", "kernels do not support `with`"),
    (float_bounds, "range(n * 0.5)", "loop bounds and step must be integer scalars, found fp32"),
    (returned_value, "return 3", "the kernel returned_value returns a value"),
    (failed_assert, 'tl.static_assert(1 > 2, f"one is {1}")', "static_assert failed: one is 1"),
    (unpacking, "_a, _b = (1, 2, 3)", "expected 2 values, found 3"),
    (wrong_mask, "tl.load(p + tl.arange(0, 4), mask=tl.arange(0, 8) < 3)", r"pointer and mask.*\(4,\) and \(8,\)"),
    (half_dot, "tl.dot(tl.zeros((4, 4), tl.float32), tl.zeros((4, 4), tl.float16))", "found fp32, fp16"),
    (small_atomic, "tl.atomic_max(p.to(tl.pointer_type(tl.int8)), 1)", "atomic_max does not support int8"),
    (wrong_constexpr, "takes_constexpr(n)", "argument 'N' of takes_constexpr must be known at compile time"),
]


@pytest.mark.parametrize("kernel, source, message", CASES, ids=lambda v: getattr(v, "__name__", ""))
def test_message_and_place(kernel, source, message):
    names = kernel.arg_names
    error = failure(kernel, *[X, 5][: len(names)])
    assert re.search(message, error.message), error.message
    assert marked(error) == source
    lines, first = inspect.getsourcelines(kernel.fn)
    assert error.location.file == __file__ and source in lines[error.location.line - first]
    assert str(error).startswith(f"{__file__}:{error.location.line}: ")


def test_calls_are_traced():
    @jit
    def inner(x):
        return x + tl.zeros((4,), tl.float32)

    @jit
    def middle(x):
        return inner(x * 2)

    @jit
    def outer(p):
        x = tl.load(p + tl.arange(0, 8))
        tl.store(p, middle(x))

    error = failure(outer, X)
    assert marked(error) == "x + tl.zeros((4,), tl.float32)"
    text = str(error)
    assert text.index("return x + tl.zeros") < text.index("return inner(x * 2)") < text.index("tl.store(p, middle(x))")
    assert text.count("called from") == 2
    build(inner_user, X)  # the builder is left clean


@jit
def inner_user(p):
    tl.store(p, 1)


def test_recursion():
    error = failure(recursive, X)
    assert "recursive calls itself" in error.message and marked(error) == "recursive(p)"


@jit
def recursive(p):
    recursive(p)


def test_loop_variables_keep_their_type():
    @jit
    def kernel(p, n):
        acc = 0
        for i in range(n):
            acc += tl.load(p + i)
        tl.store(p, acc)

    error = failure(kernel, X, 5)
    assert "the loop variable acc is int32 before the loop and fp32 after its body" in error.message
    assert marked(error) == "acc += tl.load(p + i)"

    @jit
    def growing(p, n):
        x = 0.0
        while n > 0:
            x = x + tl.load(p + tl.arange(0, 4))
            n -= 1
        tl.store(p, x)

    error = failure(growing, X, 5)
    assert "x is fp32 before the loop and <4xfp32> after its body" in error.message


@pytest.mark.parametrize("place", ["loop", "index", "then", "else", "types"])
def test_names_without_a_value(place):
    @jit
    def kernel(p, n, PLACE: tl.constexpr):
        if PLACE == "loop":
            for _ in range(n):
                value = 1
        elif PLACE == "index":
            for value in range(n):  # noqa: B007
                pass
        elif PLACE == "then":
            if n > 3:
                value = 1
        elif PLACE == "else":
            if n > 3:
                pass
            else:
                value = 1
        else:
            if n > 3:
                value = 1
            else:
                value = tl.zeros((4,), tl.float32)
        tl.store(p, value)

    error = failure(kernel, X, 5, place)
    expected = {
        "loop": "value is first assigned inside the loop",
        "index": "value is the variable of the loop",
        "then": "only if the condition at line .* is true",
        "else": "only if the condition at line .* is false",
        "types": "value is int32 if the condition at line .* is true and <4xfp32> if it is false",
    }[place]
    assert re.search(expected, error.message) and marked(error) == "value"


def test_returns_differ():
    @jit
    def half(x):
        if x > 2:
            return x
        return x * 0.5

    @jit
    def kernel(p, n):
        tl.store(p, half(n))

    assert "returns different types on different paths: int32 and fp32" in failure(kernel, X, 5).message


def test_return_in_a_loop():
    @jit
    def kernel(p, n):
        for i in range(n):
            if i == 3:
                return

    error = failure(kernel, X, 5)
    assert "`return` inside a run-time loop" in error.message


def test_kernel_without_source():
    namespace = {"tl": tl}
    exec("def kernel(p):\n    tl.store(p, 1)\n", namespace)
    with pytest.raises(ValueError, match="define kernels in a file"):
        build(jit(namespace["kernel"]), X)


def test_errors_of_several_lines_mark_the_first():
    @jit
    def kernel(p):
        tl.store(
            p,
            tl.zeros((4,), tl.float32),
        )

    assert marked(failure(kernel, X)) == "tl.store("

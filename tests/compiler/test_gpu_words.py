"""Bytes that lie in registers four to a word: what is computed on them, and where the text does so."""

from __future__ import annotations

import re

import numpy as np
import pytest
from software_metal import Library

import nitinol.language as tl
from nitinol.compiler.driver import tile_ir
from nitinol.compiler.gpu import compile_function, cuda, metal
from nitinol.formats.blocks import FORMATS
from nitinol.language.jit import specialise
from nitinol.ops.decode import BLOCK_FORMATS
from nitinol.ops.matvec import matvec_kernel
from nitinol.ops.quantized import run_arguments
from nitinol.ops.tiles import beside
from nitinol.runtime.kernel import jit


def compiled(kernel, dialect, simdgroups=1, **arguments):
    bound = kernel.bind((), arguments)
    signature, _ = specialise(kernel, bound)
    made = compile_function(tile_ir(kernel, signature), simdgroups=simdgroups, dialect=dialect)
    return made, [bound[parameter] for parameter, _, _ in signature.parameters]


def run(kernel, simdgroups=1, **arguments):
    made, values = compiled(kernel, metal, simdgroups, **arguments)
    Library([made]).run(made, (1, 1, 1), values)
    return made


def random_bytes(rng, shape, dtype=np.uint8):
    """Any bytes, with many at the ends of the range."""
    values = rng.integers(0, 256, shape, np.uint8)
    ends = rng.choice(np.array([0, 1, 127, 128, 255], np.uint8), shape)
    return np.where(rng.random(shape) < 0.3, ends, values).view(dtype)


@jit
def bytewise(x, y, out, n, SIZE: tl.constexpr, SHIFT: tl.constexpr, NUMBER: tl.constexpr):
    at = tl.arange(0, SIZE)
    inside = at < n
    a = tl.load(x + at, mask=inside, other=NUMBER)
    b = tl.load(y + at, mask=inside, other=0)
    results = (
        a & b, a | NUMBER, a ^ b, ~a, a << SHIFT, a >> SHIFT, a + b, a - b, a - NUMBER, NUMBER - a, a * b,
        tl.minimum(a, b), (a.to(tl.int8, bitcast=True) >> SHIFT).to(tl.uint8, bitcast=True), tl.where(a < b, a, b & 15),
        (a >> 4) - (b & 15) + (a.to(tl.float32) / 2).to(tl.uint8),
    )  # fmt: skip
    for number in tl.static_range(len(results)):
        tl.store(out + number * SIZE + at, results[number], mask=inside)


def bytewise_expected(x, y, shift, number):
    def low(values):
        return (values & 255).astype(np.uint8)

    a, b = x.astype(np.int64), y.astype(np.int64)
    return np.stack([low(values) for values in (
        a & b, a | number, a ^ b, ~a, a << shift, a >> shift, a + b, a - b, a - number, number - a, a * b,
        np.minimum(a, b), x.view(np.int8).astype(np.int64) >> shift, np.where(a < b, a, b & 15),
        (a >> 4) - (b & 15) + a // 2,
    )])  # fmt: skip


@pytest.mark.parametrize("size, offset", [(128, 0), (512, 0), (512, 2), (1024, 3), (64, 0)])
def test_operations_on_bytes(size, offset):
    """At offset 2 words are loaded as two halves, at offset 3 by bytes; 64: two bytes a thread."""
    rng = np.random.default_rng()
    x, y = (random_bytes(rng, size + 16) for _ in range(2))
    shift, number, n = int(rng.integers(0, 8)), int(rng.integers(0, 256)), size - 16 * int(rng.integers(0, 2))
    out = np.full((15, size), 9, np.uint8)
    views = [v[offset : offset + size] for v in (x, y)]
    made = run(bytewise, x=views[0], y=views[1], out=out, n=n, SIZE=size, SHIFT=shift, NUMBER=number)
    np.testing.assert_array_equal(out[:, :n], bytewise_expected(*views, shift, number)[:, :n])
    assert (out[:, n:] == 9).all()
    if size >= 128 and offset == 0:
        assert "add_bytes(" in made.source and "sub_bytes(" in made.source


@jit
def sums_of_products(x, y, out, ROWS: tl.constexpr, COUNT: tl.constexpr, SUM: tl.constexpr):
    """Of nibbles, side by side, and signed or unsigned bytes."""
    row, at = tl.arange(0, ROWS), tl.arange(0, COUNT)
    bytes = tl.load(x + row[:, None] * COUNT + at[None, :])
    left = beside(bytes & 15, bytes >> 4) if x.dtype.element_ty == tl.uint8 else beside(bytes, bytes - 100)
    right = tl.load(y + tl.arange(0, 2 * COUNT))[None, :]
    products = left.to(tl.int32) * right.to(tl.int32)
    sums = tl.sum(tl.reshape(products, (ROWS, 2 * COUNT // SUM, SUM)), axis=2)
    lanes = tl.arange(0, 2 * COUNT // SUM)
    tl.store(out + row[:, None] * (2 * COUNT // SUM) + lanes[None, :], sums)


@pytest.mark.parametrize("left", [np.int8, np.uint8])
@pytest.mark.parametrize("right", [np.int8, np.uint8])
@pytest.mark.parametrize("rows, count, sum, simdgroups", [(1, 128, 4, 1), (4, 64, 8, 1), (2, 512, 4, 2), (4, 64, 2, 1)])
def test_sums_of_products_of_bytes(left, right, rows, count, sum, simdgroups):
    rng = np.random.default_rng()
    x, y = random_bytes(rng, (rows, count), left), random_bytes(rng, 2 * count, right)
    out = np.zeros((rows, 2 * count // sum), np.int32)
    made = run(sums_of_products, simdgroups, x=x, y=y, out=out, ROWS=rows, COUNT=count, SUM=sum)
    wide = np.concatenate([x & 15, x >> 4] if left == np.uint8 else [x, x - np.int8(100)], 1).astype(np.int32)
    expected = (wide * y.astype(np.int32)).reshape(rows, -1, sum).sum(2)
    np.testing.assert_array_equal(out, expected)
    if sum == 4:
        assert f"dot4_{'us'[left == np.int8]}{'us'[right == np.int8]}(" in made.source


def matvec_source(format, dialect, columns=2048, rows=4):
    data = np.zeros(rows * FORMATS[format].nbytes(columns), np.uint8)
    floats = np.zeros((1, columns), np.float32)
    made, _ = compiled(
        matvec_kernel, dialect, 4, x=np.zeros((1, columns), np.int8), x_scales=floats, x_sums=floats.astype(np.int32),
        weights=data, up=None, bias=None, residual=None, out=floats, tokens=1, rows=rows, columns=columns,
        row_bytes=FORMATS[format].nbytes(columns), ROWS=rows, TOKENS=1, EVEN=True,
        **run_arguments(format, columns, columns),
    )  # fmt: skip
    return made.source


@pytest.mark.parametrize("format", BLOCK_FORMATS)
def test_products_with_block_formats_take_bytes_in_fours(format):
    """Every product, so that NVRTC finds no sums of four products of bytes, which it may take for dp4a wrongly."""
    for dialect in (cuda, metal):
        body = matvec_source(format, dialect).split("matvec_kernel(")[1]
        assert re.search(r"dot4_[us]s\(", body)
        assert not re.search(r"int\((schar|uchar|char|bits_as<schar>|as_type<char>)\([^;]*\* uint\(int\(", body)


def test_nibbles_are_taken_out_of_words():
    source = matvec_source("Q4_0", cuda)
    assert "& 0x0f0f0f0fu" in source and ">> 4 & 0x0f0f0f0fu" in source and "add_bytes(" in source
    assert "& uchar(15)" not in source and "opaque(" not in source
    source = matvec_source("Q4_K", cuda)
    assert "& (0x0f0f0f0fu << " in source and ">> 4 & 0x0f0f0f0fu" not in source  # sums are shifted, not nibbles

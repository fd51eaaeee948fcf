"""Kernels as Metal source on the software Metal device, against the interpreter."""

from __future__ import annotations

import numpy as np
import software_metal

import nitinol.language as tl
from nitinol.compiler.driver import tile_ir
from nitinol.compiler.gpu import compile_function
from nitinol.language.jit import jit, specialise


def compiled(kernel, name, simdgroups=4, **arguments):
    """The kernel's executable for these arguments, and the values of its run-time parameters."""
    bound = kernel.bind((), arguments)
    signature, _ = specialise(kernel, bound)
    executable = compile_function(tile_ir(kernel, signature), simdgroups=simdgroups, name=name)
    return executable, [bound[parameter] for parameter, _, _ in signature.parameters]


@jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    a = tl.load(x + offsets, mask=mask)
    b = tl.load(y + offsets, mask=mask)
    tl.store(out + offsets, a + b, mask=mask)


def test_vector_add():
    rng = np.random.default_rng()
    cases = []
    for n, block, simdgroups in [(1, 1024, 4), (992, 256, 1), (999, 256, 2), (4096, 1024, 4), (100, 16, 4)]:
        x, y = rng.standard_normal((2, n)).astype(np.float32)
        out = np.full(n, np.nan, np.float32)
        made, values = compiled(add, f"add_{n}", simdgroups, x=x, y=y, out=out, n=n, BLOCK=block)
        cases.append((made, values, (-(-n // block), 1, 1)))
    library = software_metal.Library([made for made, _, _ in cases])
    for made, values, grid in cases:
        library.run(made, grid, values)
        x, y, out = values[:3]
        np.testing.assert_array_equal(out, x + y)

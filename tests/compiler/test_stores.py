"""Which parameters a kernel stores to, as executables say it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from random_programs import random_program

import nitinol.language as tl
from nitinol.compiler.driver import compile_kernel, tile_ir
from nitinol.compiler.gpu import compile_function
from nitinol.compiler.interpreter import run
from nitinol.compiler.stores import stores
from nitinol.language.jit import specialise
from nitinol.runtime.kernel import jit

pytestmark = pytest.mark.cpu


@jit
def plain(a, b, c, n, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(b + at, tl.load(a + at, at < n) + tl.load(c + tl.load(c + at).to(tl.int32)), at < n)


@jit
def atomics(a, b, c, N: tl.constexpr):
    tl.atomic_add(a + tl.arange(0, N), tl.load(b + tl.arange(0, N)))
    tl.atomic_cas(c, 0.0, 1.0)


@jit
def described(a, b, c, n, N: tl.constexpr):
    source = tl.make_tensor_descriptor(a, [n], [1], [N])
    target = tl.make_tensor_descriptor(b, [n], [1], [N])
    target.store([0], source.load([0]))
    block = tl.make_block_ptr(c, (n,), (1,), (0,), (N,), (0,))
    tl.store(tl.advance(block, (N,)), source.load([0]), boundary_check=(0,))


@jit
def carried(a, b, c, d, n, N: tl.constexpr):
    at, p, q = tl.arange(0, N), a, b
    for _ in range(n):  # p is a, then b, then c
        tl.load(p + at)
        p = q
        q = c
        tl.store(p + at, tl.load(d + at))


@jit
def chosen(a, b, c, d, e, n, N: tl.constexpr):
    at = tl.arange(0, N)
    if n > 2:
        p = a
    else:
        p = b + 3
    i = 0
    q = p
    while i < n:
        q = q + 1
        i += 1
    tl.store(q + at, tl.load(d + at))
    tl.store(tl.where(at < n, (c + at), (e + at)), 1.0)


@jit
def as_numbers(a, b, c, address, N: tl.constexpr):
    there = (a.to(tl.int64) + 4 * tl.arange(0, N)).to(tl.pointer_type(tl.float32))
    tl.store(there, tl.load(b + tl.arange(0, N)))
    tl.store(address.to(tl.pointer_type(tl.float32)), 1.0)
    last = tl.max(c.to(tl.int64) + 4 * tl.arange(0, N), axis=0)
    tl.store(last.to(tl.pointer_type(tl.float32)), 2.0)


@jit
def from_a_table(table, a, n, N: tl.constexpr):
    p = tl.load(table).to(tl.pointer_type(tl.float32))
    tl.store(p + tl.arange(0, N), tl.load(a + tl.arange(0, N)))


@jit
def nothing(a, b, N: tl.constexpr):
    tl.load(a + tl.arange(0, N))
    tl.device_print("b", tl.load(b))


CASES = [(plain, "b"), (atomics, "a c"), (described, "b c"), (carried, "b c"), (chosen, "a b c e"),
         (as_numbers, "a c address"), (from_a_table, "table a"), (nothing, "")]  # fmt: skip


def arguments(kernel):
    """A signature with every parameter a run-time one: n and addresses as large, odd numbers."""
    array, table = np.zeros(4096, np.float32), np.zeros(4, np.int64)
    special = {"n": 3, "address": 2**40 + 4, "table": table, "N": 8}
    return specialise(kernel, {name: special.get(name, array) for name in kernel.arg_names})[0]


@pytest.mark.parametrize("kernel, expected", CASES, ids=[kernel.__name__ for kernel, _ in CASES])
def test_kernels(kernel, expected):
    function = tile_ir(kernel, arguments(kernel))
    names = [parameter.name for parameter in function.parameters]
    assert sorted(names[i] for i in stores(function)) == sorted(expected.split())
    made = [compile_kernel(kernel, arguments(kernel))]
    if kernel not in (as_numbers, from_a_table):
        made.append(compile_function(tile_ir(kernel, arguments(kernel))))
    for executable in made:
        assert isinstance(executable.stores, frozenset)
        assert sorted(names[i] for i in executable.stores) == sorted(expected.split())


def test_random_programs_write_no_other_memory():
    """What the interpreter changes is among what the analysis says, and that is what the program has for outputs."""
    rng = np.random.default_rng()
    for _ in range(30):
        program = random_program(rng)
        before, after = program.copies(), program.copies()
        run(program.function, program.grid, after)
        changed = {i for i, (x, y) in enumerate(zip(before, after))
                   if isinstance(x, np.ndarray) and x.tobytes() != y.tobytes()}  # fmt: skip
        assert changed <= stores(program.function) <= set(program.outputs), str(program.function)


def test_they_are_kept_on_disk(tmp_path, monkeypatch):
    script = """
import sys
import test_stores as t
from nitinol.compiler import cpu
from nitinol.compiler.driver import compile_kernel
if sys.argv[1] == "warm":
    cpu.generate = None  # what is compiled fails
print(sorted(compile_kernel(t.described, t.arguments(t.described)).stores))
"""
    monkeypatch.setenv("NITINOL_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{__file__.rpartition('/')[0]}:{':'.join(sys.path)}")
    for state in ("cold", "warm"):
        done = subprocess.run([sys.executable, "-c", script, state], capture_output=True, text=True, timeout=60)
        assert (done.stdout, done.stderr) == ("[1, 2]\n", "")

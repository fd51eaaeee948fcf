"""Random differentiable programs of views, arithmetic, products and reductions, each step done with PyTorch beside it.

`python tests/transform/test_random_programs.py SEED ...` repeats programs; a failing test shows its seed.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from random_arrays import broadcasts

import nitinol as na

EXTENTS = (1, 2, 3, 5, 8, 11)
LARGEST = 4000  # elements of an array
# Programs grow their values slowly (see `bounded`), so that 20 steps in float32 lose at most a few hundred roundings of
# the largest gradient.
TOLERANCE = 2e-4


class Program:
    """A list of steps, each a function of both libraries' arrays and the places of its operands in the pool."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.leaves: list[np.ndarray] = []
        self.shapes: list[tuple[int, ...]] = []
        self.steps: list[tuple[Any, Any, list[int]]] = []
        for _ in range(3):
            shape = tuple(int(n) for n in self.random.choice(EXTENTS, self.random.integers(0, 4)))
            self.leaves.append(np.asarray(self.random.standard_normal(shape), np.float32))
            self.shapes.append(shape)
        kinds = (self.unary, self.unary, self.binary, self.binary, self.number, self.view, self.view, self.view,
                 self.reduce, self.concatenate, self.take, self.product, self.looked_at, self.norm)  # fmt: skip
        wanted = int(self.random.integers(5, 21))
        while len(self.steps) < wanted:
            kinds[self.random.integers(len(kinds))]()

    # ------------------------------------------------------------------------------------------------ making

    def pick(self) -> int:
        """Rather something recent, so that programs become deep."""
        n = len(self.shapes)
        return int(self.random.integers(n)) if self.random.integers(2) else max(n - 1 - int(self.random.integers(3)), 0)

    def add(self, ours: Any, theirs: Any, *places: int) -> None:
        """A step, if its result is not too large; its shape is PyTorch's."""
        with torch.no_grad():
            shape = tuple(theirs(*[torch.zeros(self.shapes[p]) for p in places]).shape)
        if np.prod(shape) <= LARGEST and len(shape) <= 5:
            self.steps.append((ours, theirs, list(places)))
            self.shapes.append(shape)

    def unary(self) -> None:
        name = str(self.random.choice(["tanh", "sin", "cos", "sigmoid", "square", "negative", "erf", "abs", "exp"]))
        before = (lambda m, x: m.tanh(x)) if name in ("exp", "square") else (lambda m, x: x)  # bounded
        self.add(
            lambda x: getattr(na, name)(before(na, x)), lambda x: getattr(torch, name)(before(torch, x)), self.pick()
        )

    def binary(self) -> None:
        a = self.pick()
        fitting = [p for p, shape in enumerate(self.shapes) if broadcasts(shape, self.shapes[a])]
        b = int(self.random.choice(fitting))
        kind = self.random.integers(6)
        if kind == 0:
            self.add(lambda x, y: x + y, lambda x, y: x + y, a, b)
        elif kind == 1:
            self.add(lambda x, y: y - x, lambda x, y: y - x, a, b)
        elif kind == 2:
            self.add(lambda x, y: na.tanh(x) * y, lambda x, y: torch.tanh(x) * y, a, b)
        elif kind == 3:
            self.add(lambda x, y: x / (y * y + 1.0), lambda x, y: x / (y * y + 1.0), a, b)
        elif kind == 4:
            self.add(na.maximum, torch.maximum, a, b)
        else:
            self.add(lambda x, y: na.where(x > y, x, y * 0.5), lambda x, y: torch.where(x > y, x, y * 0.5), a, b)

    def number(self) -> None:
        c = float(np.float32(self.random.uniform(-2, 2)))
        kind = self.random.integers(4)
        step = (lambda x: x + c, lambda x: c - x, lambda x: x * c, lambda x: c / (x * x + 1.0))[kind]
        self.add(step, step, self.pick())

    def view(self) -> None:
        a = self.pick()
        shape, random = self.shapes[a], self.random
        rank = len(shape)
        kind = random.integers(7)
        if kind == 0:
            order = [int(i) for i in random.permutation(rank)]
            self.add(lambda x: x.permute(order), lambda x: x.permute(order), a)
        elif kind == 1 and np.prod(shape):
            size = int(np.prod(shape))
            rows = int(random.choice([n for n in range(1, size + 1) if size % n == 0]))
            self.add(lambda x: x.reshape(rows, -1), lambda x: x.reshape(rows, -1), a)
        elif kind == 2:
            axis = int(random.integers(0, rank + 1))
            self.add(lambda x: x.expand_dims(axis), lambda x: x.unsqueeze(axis), a)
        elif kind == 3:
            wide = (int(random.integers(1, 4)), *shape)
            self.add(lambda x: x.broadcast_to(wide), lambda x: x.expand(wide), a)
        elif rank:
            axis, extent = int(random.integers(rank)), 0
            extent = shape[axis]
            start, stop = sorted(int(n) for n in random.integers(0, extent + 1, 2))
            step, before = int(random.integers(1, 4)), (slice(None),) * axis
            if kind == 4 and extent:
                self.add(lambda x: x[(*before, start % extent)], lambda x: x[(*before, start % extent)], a)
            elif kind == 5:
                self.add(lambda x: x[(*before, slice(None, None, -step))],
                         lambda x: x.flip(axis)[(*before, slice(None, None, step))], a)  # fmt: skip
            else:
                self.add(lambda x: x[(*before, slice(start, stop, step))],
                         lambda x: x[(*before, slice(start, stop, step))], a)  # fmt: skip

    def reduce(self) -> None:
        a = self.pick()
        shape = self.shapes[a]
        if not shape or not np.prod(shape):
            return
        axes = tuple(int(i) for i in self.random.permutation(len(shape))[: self.random.integers(1, len(shape) + 1)])
        keep, kind = bool(self.random.integers(2)), self.random.integers(4)
        if kind == 0:
            self.add(lambda x: na.tanh(x).sum(axes, keep), lambda x: torch.tanh(x).sum(axes, keep), a)
        elif kind == 1:
            self.add(lambda x: x.mean(axes, keep), lambda x: x.mean(axes, keep), a)
        elif kind == 2:
            self.add(lambda x: x.max(axes, keep), lambda x: x.amax(axes, keep), a)
        else:
            self.add(lambda x: na.logsumexp(x, axes, keep), lambda x: x.logsumexp(axes, keep), a)

    def norm(self) -> None:
        a = self.pick()
        if self.shapes[a] and np.prod(self.shapes[a]) and self.shapes[a][-1] > 1:
            self.add(na.softmax, lambda x: x.softmax(-1), a)

    def concatenate(self) -> None:
        a = self.pick()
        if self.shapes[a]:
            axis = int(self.random.integers(len(self.shapes[a])))
            self.add(lambda x: na.concatenate([x, -x, x], axis), lambda x: torch.cat([x, -x, x], axis), a)

    def take(self) -> None:
        a = self.pick()
        if self.shapes[a] and np.prod(self.shapes[a]):
            axis = int(self.random.integers(len(self.shapes[a])))
            index = self.random.integers(0, self.shapes[a][axis], 4)
            self.add(lambda x: na.take(x, index, axis), lambda x: x.index_select(axis, torch.tensor(index)), a)

    def product(self) -> None:
        a = self.pick()
        if len(self.shapes[a]) >= 2:
            self.add(lambda x: na.tanh(x) @ x.mT * 0.1, lambda x: torch.tanh(x) @ x.mT * 0.1, a)

    def looked_at(self) -> None:
        """The elements are needed in between, and a checkpoint or a copy stands in the way."""

        def ours(x: Any) -> Any:
            x.evaluate()
            return na.checkpoint(lambda y: na.sin(y) * y)(x)

        self.add(ours, lambda x: torch.sin(x) * x, self.pick())

    # ----------------------------------------------------------------------------------------------- running

    def result(self, leaves: list[Any], theirs: bool) -> Any:
        """The sum of all results that nobody has read, so that every step has a part in it."""
        pool = list(leaves)
        for step in self.steps:
            pool.append(step[theirs](*[pool[p] for p in step[2]]))
        read = {p for _, _, places in self.steps for p in places}
        ends = [x.sum() for i, x in enumerate(pool) if i not in read]
        total = ends[0]
        for end in ends[1:]:
            total = total + end
        return total

    def check(self) -> None:
        tensors = [torch.tensor(a.astype(np.float64), requires_grad=True) for a in self.leaves]
        expected = self.result(tensors, True)
        slopes = torch.autograd.grad(expected, tensors, allow_unused=True)
        function = na.value_and_grad(lambda *a: self.result(list(a), False), argnums=tuple(range(len(self.leaves))))
        value, found = function(*[na.array(a) for a in self.leaves])
        top = max(1.0, *[s.abs().max().item() if s is not None and s.numel() else 0.0 for s in slopes])
        np.testing.assert_allclose(value.item(), expected.item(), rtol=1e-4, atol=TOLERANCE * top)
        for a, gradient, slope in zip(self.leaves, found, slopes):
            assert gradient.shape == a.shape
            values = np.zeros(a.shape) if slope is None else slope.numpy()
            np.testing.assert_allclose(gradient.numpy(), values, rtol=1e-3, atol=TOLERANCE * top)


@pytest.mark.parametrize("number", range(12))
def test_random_programs(seed, number):
    Program(seed).check()


if __name__ == "__main__":
    for text in sys.argv[1:]:
        Program(int(text)).check()

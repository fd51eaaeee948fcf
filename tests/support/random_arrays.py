"""Random programs on arrays, each step done with NumPy beside it: views, arithmetic, reductions, updates in place."""

from __future__ import annotations

from typing import Any

import numpy as np

import nitinol as nn

EXTENTS = (1, 2, 3, 5, 8, 17, 33)
LARGEST = 50_000  # elements; and values stay below 1e4, so that float32 keeps 1e-4
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


class Program:
    """A pool of (Array, NumPy array) pairs that must stay equal."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.pool: list[tuple[Any, np.ndarray]] = []
        self.new()
        self.new()

    def run(self) -> None:
        steps = (self.new, self.binary, self.binary, self.unary, self.view, self.view, self.view, self.reduce,
                 self.assign, self.concatenate, self.take, self.check_one, self.drop)  # fmt: skip
        for _ in range(int(self.random.integers(3, 25))):
            steps[self.random.integers(len(steps))]()
        if self.random.integers(2):
            nn.evaluate(*(x for x, _ in self.pool))
        for i in self.random.permutation(len(self.pool)):
            check(*self.pool[i])

    def pick(self, shape: tuple[int, ...] | None = None) -> tuple[Any, np.ndarray]:
        """A pair; with `shape` one that broadcasts with it."""
        fitting = [pair for pair in self.pool if shape is None or broadcasts(pair[1].shape, shape)]
        return fitting[self.random.integers(len(fitting))]

    def add(self, x: Any, a: Any) -> None:
        a = np.asarray(a)
        if a.size <= LARGEST and (not a.size or np.abs(a).max() < 1e4):
            self.pool.append((x, a))

    def computed(self, x: Any, a: Any) -> None:
        """A fresh result: in order of its indices, as ours are, where NumPy keeps that of its operands; what shares
        memory with it by `reshape` follows from that."""
        self.add(x, np.asarray(a, order="C"))

    def new(self) -> None:
        shape = tuple(int(n) for n in self.random.choice(EXTENTS, self.random.integers(0, 4)))
        a = np.asarray(self.random.standard_normal(shape), np.float32)
        self.add(nn.array(a), a.copy())

    def drop(self) -> None:
        if len(self.pool) > 2:
            self.pool.pop(int(self.random.integers(len(self.pool))))

    def binary(self) -> None:
        x, a = self.pick()
        y, b = self.pick(a.shape)
        if np.broadcast(a, b).size > LARGEST:
            return
        kind = self.random.integers(6)
        if kind == 0:
            self.computed(x + y, a + b)
        elif kind == 1:
            self.computed(x * y * 0.5, a * b * np.float32(0.5))
        elif kind == 2:
            self.computed(y - x, b - a)
        elif kind == 3:
            self.computed(nn.maximum(x, y), np.maximum(a, b))
        elif kind == 4:
            # Where x and y are equal but for their rounding, both choices are.
            self.computed(nn.where(x > y, x - y, 0.0), np.where(a > b, a - b, np.float32(0)))
        else:
            self.computed(x * 2.0 - 1, a * np.float32(2) - np.float32(1))

    def unary(self) -> None:
        x, a = self.pick()
        kind = self.random.integers(4)
        if kind == 0:
            self.computed(nn.tanh(x), np.tanh(a))
        elif kind == 1:
            self.computed(-x, -a)
        elif kind == 2:
            self.computed(abs(x), np.abs(a))
        else:
            self.computed(x.copy(), a.copy())

    def view(self) -> None:
        x, a = self.pick()
        kind = self.random.integers(7)
        random = self.random
        if kind == 0:
            order = [int(i) for i in random.permutation(a.ndim)]
            self.add(x.permute(order), a.transpose(order))
        elif kind == 1 and a.size:
            rows = int(random.choice([n for n in range(1, a.size + 1) if a.size % n == 0]))
            self.add(x.reshape(rows, -1), a.reshape(rows, -1))
        elif kind == 2:
            axis = int(random.integers(0, a.ndim + 1))
            self.add(x.expand_dims(axis), np.expand_dims(a, axis))
        elif kind == 3 and a.size < 2000:
            shape = (int(random.integers(1, 4)), *a.shape)
            self.add(x.broadcast_to(shape), np.broadcast_to(a, shape))
        elif kind == 4:
            self.add(x.squeeze(), np.squeeze(a))
        elif a.ndim:
            index = tuple(self.index(n) for n in a.shape[: random.integers(1, a.ndim + 1)])
            self.add(x[index], a[(*index, ...)])

    def index(self, extent: int) -> Any:
        """An integer or a slice, often with a negative step, sometimes empty."""
        if extent and self.random.integers(4) == 0:
            return int(self.random.integers(-extent, extent))
        start, stop = sorted(int(n) for n in self.random.integers(0, extent + 1, 2))
        step = int(self.random.integers(1, 4))
        return (slice(None), slice(start, stop, step), slice(None, None, -step))[self.random.integers(3)]

    def reduce(self) -> None:
        x, a = self.pick()
        if a.ndim and a.size:
            axes = tuple(int(i) for i in self.random.permutation(a.ndim)[: self.random.integers(1, a.ndim + 1)])
            name = ("sum", "max", "min", "mean")[self.random.integers(4)]
            keep = bool(self.random.integers(2))
            self.computed(getattr(nn, name)(x, axes, keep), getattr(np, name)(a, axis=axes, keepdims=keep))

    def assign(self) -> None:
        x, a = self.pick()
        y, b = self.pick(a.shape)
        shared = any(stride == 0 and n > 1 for stride, n in zip(a.strides, a.shape))
        if shared or not a.flags.writeable or np.broadcast_shapes(a.shape, b.shape) != a.shape:
            return
        kind = self.random.integers(3)
        if kind == 0:
            x.assign(1.5)
            a[...] = 1.5
        elif kind == 1:
            x.assign(y + 1)
            a[...] = b + 1
        else:
            x.assign(y)
            a[...] = b.copy()

    def concatenate(self) -> None:
        x, a = self.pick()
        if a.ndim:
            axis = int(self.random.integers(a.ndim))
            self.computed(nn.concatenate([x, -x, x], axis), np.concatenate([a, -a, a], axis))

    def take(self) -> None:
        x, a = self.pick()
        if a.ndim and a.size:
            axis = int(self.random.integers(a.ndim))
            index = self.random.integers(-a.shape[axis], a.shape[axis], 3)
            self.computed(nn.take(x, index, axis), np.take(a, index, axis))

    def check_one(self) -> None:
        check(*self.pick())


def check(x: Any, a: np.ndarray) -> None:
    assert x.shape == a.shape
    np.testing.assert_allclose(x.numpy(), a, **TOLERANCE)


def broadcasts(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    try:
        np.broadcast_shapes(a, b)
    except ValueError:
        return False
    return True

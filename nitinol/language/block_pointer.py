"""Block pointers and tensor descriptors: a tile's place in a strided array, with bounds that loads can check.

Both are tuples of ordinary tensors, so that they pass through loops and branches; a load or store makes the tile of
pointers and the mask. Index arithmetic is in 64 bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from nitinol.language.core import known, known_shape, tensor
from nitinol.language.memory import load, store
from nitinol.language.operations import arange
from nitinol.language.semantic import cast, compare, constant, to_tensor
from nitinol.language.shapes import broadcast_to, expand_dims
from nitinol.language.types import DType, PointerType, int32, int64


class Extents(NamedTuple):
    """The shape of a block, which is no run-time value: `text` keeps it out of the conversions of numbers."""

    text: str

    @property
    def values(self) -> tuple[int, ...]:
        return tuple(map(int, self.text.split("x")))


class block_pointer(NamedTuple):
    """`tl.make_block_ptr`: the block at `offsets` (int32) of an array of `shape` and `strides` (int64, in elements)."""

    base: tensor
    shape: tuple[tensor, ...]
    strides: tuple[tensor, ...]
    offsets: tuple[tensor, ...]
    extents: Extents

    @property
    def dtype(self) -> DType | PointerType:
        assert isinstance(self.base.dtype, PointerType)
        return self.base.dtype.element


class tensor_descriptor(NamedTuple):
    """`tl.make_tensor_descriptor`: an array read and written in blocks; outside of it reads give 0, writes vanish."""

    base: tensor
    shape: tuple[tensor, ...]
    strides: tuple[tensor, ...]
    extents: Extents

    def at(self, offsets: Any) -> block_pointer:
        places = tuple(cast(to_tensor(o, "an offset"), int32) for o in offsets)
        if len(places) != len(self.shape):
            raise ValueError(f"the descriptor has rank {len(self.shape)}, found {len(places)} offsets")
        return block_pointer(self.base, self.shape, self.strides, places, self.extents)

    def load(self, offsets: Any, cache_modifier: str = "", eviction_policy: str = "") -> tensor:
        """The block at the given offsets."""
        return load_block(self.at(offsets), tuple(range(len(self.shape))), "zero")

    def store(self, offsets: Any, value: Any) -> None:
        """Writes a block at the given offsets."""
        store_block(self.at(offsets), value, tuple(range(len(self.shape))))

    @property
    def block_shape(self) -> tuple[int, ...]:
        return self.extents.values

    @property
    def dtype(self) -> DType | PointerType:
        assert isinstance(self.base.dtype, PointerType)
        return self.base.dtype.element


def _array(base: Any, shape: Any, strides: Any, block_shape: Any, what: str) -> tuple[Any, ...]:
    if not isinstance(base, tensor) or not isinstance(base.dtype, PointerType) or base.shape:
        raise TypeError(f"{what} takes one pointer, found {base!r}")
    extents = known_shape(block_shape, what)
    if not len(shape) == len(strides) == len(extents):
        raise ValueError(f"{what}: {len(shape)} extents, {len(strides)} strides and a block of rank {len(extents)}")
    sizes, steps = (tuple(_wide(v) for v in values) for values in (shape, strides))
    return base, sizes, steps, Extents("x".join(map(str, extents)))


def _wide(value: Any) -> tensor:
    return cast(value, int64) if isinstance(value, tensor) else constant(value, int64)


def make_block_ptr(
    base: Any, shape: Any, strides: Any, offsets: Any, block_shape: Any, order: Any = ()
) -> block_pointer:
    """A pointer to the block of `block_shape` at `offsets` in an array at `base`; `order` is a hint and ignored."""
    base, sizes, steps, extents = _array(base, shape, strides, block_shape, "make_block_ptr")
    return block_pointer(
        base, sizes, steps, tensor_descriptor(base, sizes, steps, extents).at(offsets).offsets, extents
    )


def make_tensor_descriptor(
    base: Any, shape: Any, strides: Any, block_shape: Any, padding_option: Any = "zero"
) -> tensor_descriptor:
    """A descriptor of an array at `base` that is read and written in blocks of `block_shape`."""
    return tensor_descriptor(*_array(base, shape, strides, block_shape, "make_tensor_descriptor"))


def advance(base: Any, offsets: Any) -> block_pointer:
    """The block pointer moved by some elements along each axis."""
    if not isinstance(base, block_pointer):
        raise TypeError(f"advance takes a block pointer (tl.make_block_ptr), found {base!r}")
    if len(offsets) != len(base.offsets):
        raise ValueError(f"advance: the block pointer has rank {len(base.offsets)}, found {len(offsets)} offsets")
    moved = tuple(cast(to_tensor(o) + d, int32) for o, d in zip(base.offsets, offsets))
    return base._replace(offsets=moved)


def _pointers(block: block_pointer, checked: Any, what: str) -> tuple[tensor, tensor | None]:
    """The tile of pointers, and the mask of the axes that are to be checked (None: no axis)."""
    extents = block.extents.values
    axes = known(checked, f"boundary_check of {what}")
    axes = set(axes) if isinstance(axes, tuple) else {axes}
    if not axes <= set(range(len(extents))):
        raise ValueError(
            f"{what}: boundary_check {sorted(axes)} names an axis that a block of rank {len(extents)} lacks"
        )
    start = block.base
    for offset, stride in zip(block.offsets, block.strides):
        start = start + cast(offset, int64) * stride
    pointers, mask = broadcast_to(start, extents), None
    for axis, extent in enumerate(extents):
        others = tuple(i for i in range(len(extents)) if i != axis)
        lanes = arange(0, extent)
        step = lanes if known_one(block.strides[axis]) else cast(lanes, int64) * block.strides[axis]
        pointers = pointers + (expand_dims(step, others) if others else step)
        if axis in axes:
            index = cast(lanes + block.offsets[axis], int64)
            inside = compare("ge", index, 0) & compare("lt", index, block.shape[axis])
            inside = expand_dims(inside, others) if others else inside
            mask = inside if mask is None else mask & inside
    return pointers, mask


def known_one(x: tensor) -> bool:
    """Whether a scalar is the constant 1."""
    return x.handle.op is not None and x.handle.op.kind == "constant" and x.handle.op.attributes["value"] == 1


def load_block(block: block_pointer, boundary_check: Any, padding_option: Any) -> tensor:
    """The values of a block; along checked axes, elements outside the array are 0 (or NaN)."""
    if padding_option not in ("", "zero", "nan", None):
        raise ValueError(f"load: padding_option is {padding_option!r}, expected 'zero' or 'nan'")
    pointers, mask = _pointers(block, boundary_check, "load")
    if mask is None:
        return load(pointers)
    return load(pointers, mask, float("nan") if padding_option == "nan" else 0)


def store_block(block: block_pointer, value: Any, boundary_check: Any) -> None:
    """Writes a block; along checked axes, elements outside the array are left out."""
    pointers, mask = _pointers(block, boundary_check, "store")
    store(pointers, value, mask)

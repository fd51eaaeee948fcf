"""Operations that rearrange a tile: reshape, transpose, broadcast, join and split, gather."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nitinol.language.core import (
    emit,
    emit_many,
    known,
    known_axis,
    known_shape,
    member,
    tensor,
    unwrap,
)
from nitinol.language.operations import tile
from nitinol.language.semantic import (
    broadcast,
    cast,
    splat,
)
from nitinol.language.semantic import broadcast_to as broadcast_to_shape
from nitinol.language.types import (
    DType,
    int32,
    int64,
    with_shape,
)


def _shape_arguments(shape: Sequence[Any]) -> Any:
    """Shapes may be given as one tuple or as separate integers."""
    return shape[0] if len(shape) == 1 and not isinstance(unwrap(shape[0]), int) else tuple(shape)


@member
def reshape(input: Any, *shape: Any, can_reorder: bool = False) -> tensor:
    """The elements in row-major order under another shape."""
    x, target = tile(input, "reshape"), known_shape(_shape_arguments(shape), "reshape")
    if x.numel != with_size(target):
        raise ValueError(f"reshape: {x.shape} has {x.numel} elements, the shape {target} asks for {with_size(target)}")
    if not x.shape:
        return splat(x, target)
    if not target:
        from nitinol.language.combine import reduce

        return reduce(reshape(x, (1,)), 0, lambda a, b: a)  # the one element as a scalar
    return x if x.shape == target else emit("reshape", (x,), with_shape(x.dtype, target))


def with_size(shape: tuple[int, ...]) -> int:
    """The number of elements."""
    size = 1
    for extent in shape:
        size *= extent
    return size


@member
def view(input: Any, *shape: Any) -> tensor:
    """`reshape` under its older name."""
    return reshape(input, *shape)


@member
def expand_dims(input: Any, axis: Any) -> tensor:
    """New axes of extent 1 at the given place or places of the result."""
    x = tile(input, "expand_dims")
    axis = known(axis, "the axis of expand_dims")
    axes = list(axis) if isinstance(axis, tuple) else [axis]
    rank = len(x.shape) + len(axes)
    places = sorted(known_axis(a, rank, "expand_dims") for a in axes)
    if len(set(places)) != len(places):
        raise ValueError(f"expand_dims: an axis occurs twice in {axes}")
    shape = list(x.shape)
    for place in places:
        shape.insert(place, 1)
    return reshape(x, tuple(shape))


@member
def permute(input: Any, *dims: Any) -> tensor:
    """Axes in another order: result axis i is operand axis dims[i]."""
    x = tile(input, "permute")
    order = known(_shape_arguments(dims), "the order of permute")
    rank = len(x.shape)
    if not isinstance(order, tuple) or sorted(order) != list(range(rank)):
        raise ValueError(f"permute: expected a permutation of 0..{rank - 1} for shape {x.shape}, found {order}")
    if order == tuple(range(rank)):
        return x
    return emit("trans", (x,), with_shape(x.dtype, tuple(x.shape[d] for d in order)), perm=order)


@member
def trans(input: Any, *dims: Any) -> tensor:
    """The last two axes swapped, or `permute` with an explicit order."""
    x = tile(input, "trans")
    rank = len(x.shape)
    if not dims and rank < 2:
        raise ValueError(f"trans: needs a tile of rank 2 or more, found shape {x.shape}")
    return permute(x, *(dims or (*range(rank - 2), rank - 1, rank - 2)))


tensor.T = property(lambda x: trans(x))  # type: ignore[attr-defined]


@member
def broadcast_to(input: Any, *shape: Any) -> tensor:
    """The tile grown to a shape of the same rank; a scalar fits every shape."""
    target = known_shape(_shape_arguments(shape), "broadcast_to")
    return broadcast_to_shape(tile(input, "broadcast_to"), target, "broadcast_to")


def broadcast_both(input: Any, other: Any) -> tuple[tensor, tensor]:
    """Both operands in their common shape; dtypes stay."""
    return broadcast(tile(input, "broadcast"), tile(other, "broadcast"), "broadcast")


def join(a: Any, b: Any) -> tensor:
    """Two tiles side by side along a new last axis of extent 2."""
    x, y = broadcast_both(a, b)
    if x.dtype != y.dtype:
        raise TypeError(f"join takes two tiles of one type, found {x.dtype} and {y.dtype}")
    if not x.shape:
        return reshape(join(reshape(x, (1,)), reshape(y, (1,))), (2,))
    return emit("join", (x, y), with_shape(x.dtype, (*x.shape, 2)))


@member
def split(a: Any) -> tuple[tensor, tensor]:
    """The two halves of a tile whose last extent is 2: the inverse of join."""
    x = tile(a, "split")
    if not x.shape or x.shape[-1] != 2:
        raise ValueError(f"split: the last extent must be 2, found shape {x.shape}")
    if len(x.shape) == 1:
        left, right = split(reshape(x, (1, 2)))
        return reshape(left, ()), reshape(right, ())
    half = with_shape(x.dtype, x.shape[:-1])
    left, right = emit_many("split", (x,), (half, half))
    return left, right


def cat(input: Any, other: Any, can_reorder: bool = False, dim: int = 0) -> tensor:
    """Two tiles after each other along an axis; the order is always kept. The extents must be equal."""
    x, y = tile(input, "cat"), tile(other, "cat")
    if x.type != y.type or not x.shape:
        raise TypeError(f"cat takes two tiles of one type, found {x.type} and {y.type}")
    axis = known_axis(dim, len(x.shape), "cat")
    shape = known_shape((*x.shape[:axis], 2 * x.shape[axis], *x.shape[axis + 1 :]), "cat")
    return emit("cat", (x, y), with_shape(x.dtype, shape), axis=axis)


@member
def gather(src: Any, index: Any, axis: Any) -> tensor:
    """src at the places `index` along an axis, as numpy.take_along_axis."""
    x, places = tile(src, "gather"), tile(index, "gather")
    if places.dtype not in (int32, int64):
        if not isinstance(places.dtype, DType) or not places.dtype.is_int:
            raise TypeError(f"gather: the index must be integers, found {places.dtype}")
        places = cast(places, int64 if places.dtype.bits >= 32 else int32)
    axis = known_axis(axis, len(x.shape), "gather")
    rest = [s[:axis] + s[axis + 1 :] for s in (x.shape, places.shape)]
    if len(x.shape) != len(places.shape) or rest[0] != rest[1]:
        raise ValueError(f"gather: source {x.shape} and index {places.shape} may differ only along axis {axis}")
    return emit("gather", (x, places), with_shape(x.dtype, places.shape), axis=axis)

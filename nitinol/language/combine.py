"""Operations that combine elements: matrix products, reductions, scans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nitinol.language.core import (
    builder,
    emit,
    emit_many,
    known,
    known_axis,
    member,
    tensor,
)
from nitinol.language.operations import known_dtype, tile
from nitinol.language.semantic import (
    cast,
    to_tensor,
)
from nitinol.language.semantic import full as full_of
from nitinol.language.shapes import reshape
from nitinol.language.types import (
    DType,
    bfloat16,
    float16,
    float32,
    float64,
    int8,
    int32,
    uint8,
    with_shape,
)

Tensors = tuple[tensor, ...]


def dot(
    input: Any,
    other: Any,
    acc: Any = None,
    input_precision: Any = None,
    allow_tf32: Any = None,
    max_num_imprecise_acc: Any = None,
    out_dtype: Any = float32,
) -> tensor:
    """The matrix product of [..., M, K] and [..., K, N], added to `acc` [..., M, N] if given.

    fp32, fp16 and bf16 operands accumulate in fp32, fp64 in fp64, int8 and uint8 in int32; every extent from 1
    upwards is allowed, and int8 may meet uint8 (both beyond Triton). fp32 operands are multiplied as such, unless
    `input_precision` is "tf32": then a target may drop all but 10 bits of their mantissas. `out_dtype` fp16 rounds the
    fp32 result.
    """
    a, b = tile(input, "dot"), tile(other, "dot")
    floats = (float16, bfloat16, float32, float64)
    integers = (int8, uint8)
    same = a.dtype == b.dtype and a.dtype in floats
    if not same and not (a.dtype in integers and b.dtype in integers):
        raise TypeError(
            f"dot takes two operands of one type (fp16, bf16, fp32, fp64, int8), found {a.dtype}, {b.dtype}"
        )
    if len(a.shape) != len(b.shape) or len(a.shape) < 2:
        raise ValueError(f"dot takes two tiles of one rank, 2 or more, found shapes {a.shape} and {b.shape}")
    if a.shape[-1] != b.shape[-2] or a.shape[:-2] != b.shape[:-2]:
        raise ValueError(
            f"dot of shapes {a.shape} and {b.shape}: the inner extents are {a.shape[-1]} and {b.shape[-2]}, "
            "expected [..., M, K] and [..., K, N]"
        )
    out = known_dtype(out_dtype, "dot")
    if out == bfloat16:
        raise TypeError("dot: out_dtype bf16 is not supported; use float32 and cast with .to(tl.bfloat16)")
    internal = int32 if a.dtype in integers else float64 if a.dtype == float64 else float32
    result = float16 if a.dtype == float16 and out == float16 else internal
    shape = (*a.shape[:-1], b.shape[-1])
    if acc is None:
        c = full_of(shape, 0, internal)
    else:
        c = tile(acc, "dot (acc)")
        if c.shape != shape or c.dtype not in (internal, result):
            raise TypeError(f"dot: acc must be {with_shape(result, shape)}, found {c.type}")
        result = c.dtype if acc is not None and isinstance(c.dtype, DType) else result
        c = cast(c, internal)
    hint = {"tf32": True} if a.dtype == float32 and getattr(input_precision, "value", input_precision) == "tf32" else {}
    return cast(emit("dot", (a, b, c), c.type, **hint), result)


def _operands(input: Any, what: str) -> tuple[tensor, ...]:
    values = tuple(input) if isinstance(input, (tuple, list)) else (input,)
    tiles = tuple(tile(v, what) for v in values)
    if any(t.shape != tiles[0].shape for t in tiles):
        raise ValueError(f"{what}: all operands must have one shape, found {[t.shape for t in tiles]}")
    return tiles


def _combine_region(tiles: Sequence[tensor], combine_fn: Any, what: str) -> Any:
    types = [t.dtype for t in tiles]

    def body(*arguments: tensor) -> Tensors:
        values = builder().call(combine_fn, arguments)
        values = values if isinstance(values, tuple) else (values,)
        if len(values) != len(types):
            raise TypeError(f"{what}: the combine function must return {len(types)} values, found {len(values)}")
        results = tuple(map(to_tensor, values))
        if any(r.shape for r in results):
            raise TypeError(f"{what}: the combine function must return scalars, found {[r.type for r in results]}")
        return tuple(cast(r, t) for r, t in zip(results, types))

    return builder().region([*types, *types], body)


@member
def reduce(input: Any, axis: Any, combine_fn: Callable[..., Any], keep_dims: Any = False) -> Any:
    """Combines the elements along an axis (None: all) with an associative function of two scalars or groups of them.

    `input` is a tile or a tuple of tiles of one shape; the result is of the same form.
    """
    tiles = _operands(input, "reduce")
    shape = tiles[0].shape
    axis = known(axis, "the axis of reduce")
    if not shape:
        raise ValueError("reduce: the operand is a scalar; there is no axis to reduce")
    flat = axis is None
    if flat:
        tiles, place = tuple(reshape(t, (t.numel,)) for t in tiles), 0
    else:
        place = known_axis(axis, len(shape), "reduce")
    left = tiles[0].shape[:place] + tiles[0].shape[place + 1 :]
    region = _combine_region(tiles, combine_fn, "reduce")
    results = emit_many("reduce", tiles, [with_shape(t.dtype, left) for t in tiles], regions=[region], axis=place)
    if known(keep_dims, "keep_dims"):
        kept = (1,) * len(shape) if flat else (*shape[:place], 1, *shape[place + 1 :])
        results = tuple(reshape(r, kept) for r in results)
    return results if isinstance(input, (tuple, list)) else results[0]


@member
def associative_scan(input: Any, axis: Any, combine_fn: Callable[..., Any], reverse: Any = False) -> Any:
    """All prefixes along an axis (with `reverse` suffixes), combined with an associative function; same shape."""
    tiles = _operands(input, "associative_scan")
    axis = known_axis(axis, len(tiles[0].shape), "associative_scan")
    region = _combine_region(tiles, combine_fn, "associative_scan")
    backwards = bool(known(reverse, "reverse"))
    results = emit_many("scan", tiles, [t.type for t in tiles], regions=[region], axis=axis, reverse=backwards)
    return results if isinstance(input, (tuple, list)) else results[0]

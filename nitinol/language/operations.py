"""The tile operations: what a kernel calls as `tl.load`, `tl.dot`, `tl.reduce`, ...; each appends to the IR."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nitinol.language.core import (
    builder,
    emit,
    emit_many,
    known,
    known_axis,
    known_int,
    known_shape,
    member,
    tensor,
    unwrap,
)
from nitinol.language.semantic import (
    bitcast,
    broadcast,
    broadcast_shapes,
    cast,
    is_number,
    splat,
    to_tensor,
    truth,
    unify,
)
from nitinol.language.semantic import broadcast_to as broadcast_to_shape
from nitinol.language.semantic import (
    full as full_of,
)
from nitinol.language.semantic import where as where_of
from nitinol.language.types import (
    DType,
    PointerType,
    TileType,
    bfloat16,
    float16,
    float32,
    float64,
    int1,
    int8,
    int32,
    int64,
    uint8,
    with_element,
    with_shape,
)

Tensors = tuple[tensor, ...]


def tile(x: Any, what: str) -> tensor:
    """The operand as a tensor; numbers become scalar constants."""
    return to_tensor(x, f"the operand of {what}")


# -------------------------------------------------------------------------------------------- programs and creation


def program_id(axis: int) -> tensor:
    """The index of this program along a grid axis (0, 1 or 2), int32."""
    return emit("program_id", (), int32, axis=_grid_axis(axis, "program_id"))


def num_programs(axis: int) -> tensor:
    """The extent of the grid along an axis, int32."""
    return emit("num_programs", (), int32, axis=_grid_axis(axis, "num_programs"))


def _grid_axis(axis: Any, what: str) -> int:
    axis = known_int(axis, f"the axis of {what}")
    if axis not in (0, 1, 2):
        raise ValueError(f"{what}: the axis must be 0, 1 or 2, found {axis}")
    return axis


def arange(start: int, end: int) -> tensor:
    """The int32 tile start, start + 1, ..., end - 1; end - start must be a power of two."""
    start, end = known_int(start, "the start of arange"), known_int(end, "the end of arange")
    count = end - start
    if count <= 0 or count & (count - 1):
        raise ValueError(f"arange({start}, {end}): end - start must be a power of two, found {count}")
    if start < -(2**31) or end > 2**31:
        raise ValueError(f"arange({start}, {end}) does not fit into int32")
    known_shape((count,), "arange")
    return emit("arange", (), TileType(int32, (count,)), start=start, end=end)


def full(shape: Any, value: Any, dtype: Any) -> tensor:
    """A tile filled with one number or run-time scalar."""
    return full_of(known_shape(shape, "full"), unwrap(value), known_dtype(dtype, "full"))


def zeros(shape: Any, dtype: Any) -> tensor:
    """A tile of zeros."""
    return full_of(known_shape(shape, "zeros"), 0, known_dtype(dtype, "zeros"))


def known_dtype(dtype: Any, what: str) -> DType | PointerType:
    """An element type given as such (also as a constexpr), else TypeError."""
    dtype = known(dtype, f"the dtype of {what}")
    if not isinstance(dtype, (DType, PointerType)):
        raise TypeError(f"{what}: expected a type such as tl.float32, found {dtype!r}")
    return dtype


# -------------------------------------------------------------------------------------------------- memory, atomics


def load(
    pointer: Any,
    mask: Any = None,
    other: Any = None,
    boundary_check: Any = (),
    padding_option: str = "",
    cache_modifier: str = "",
    eviction_policy: str = "",
    volatile: bool = False,
) -> tensor:
    """The values at a tile of pointers (or at one pointer), where `mask` is true; elsewhere `other`.

    Without `other` masked-off lanes are unspecified. The caching hints of Triton are accepted and ignored.
    """
    p = _pointers(pointer, "load")
    if boundary_check or padding_option:
        raise ValueError("load: boundary_check and padding_option belong to block pointers, which are not supported")
    if mask is None and other is not None:
        raise ValueError("load: `other` was given without `mask`")
    if mask is None:
        return emit("load", (p,), with_element(p.type, p.dtype.element))  # type: ignore[union-attr]
    p, m = _masked(p, mask, "load")
    operands = [p, m]
    element = p.dtype.element  # type: ignore[union-attr]
    if other is not None:
        operands.append(_fill(other, element, p.shape, "load"))
    return emit("load", operands, with_element(p.type, element))


def store(
    pointer: Any,
    value: Any,
    mask: Any = None,
    boundary_check: Any = (),
    cache_modifier: str = "",
    eviction_policy: str = "",
) -> None:
    """Writes values, cast to the pointers' element type, where `mask` is true."""
    p = _pointers(pointer, "store")
    if boundary_check:
        raise ValueError("store: boundary_check belongs to block pointers, which are not supported")
    operands = [p, _fill(value, p.dtype.element, p.shape, "store")]  # type: ignore[union-attr]
    if mask is not None:
        operands.append(_mask(mask, p.shape, "store"))
    emit_many("store", operands, ())


def _pointers(pointer: Any, what: str) -> tensor:
    if not isinstance(pointer, tensor) or not isinstance(pointer.dtype, PointerType):
        raise TypeError(f"{what} takes a pointer or a tile of pointers, found {pointer!r}")
    return pointer


def _masked(p: tensor, mask: Any, what: str) -> tuple[tensor, tensor]:
    """A load's pointers and mask in one shape: either may be the one that grows."""
    m = truth(tile(mask, f"{what} (mask)"))
    if m.shape and not p.shape:
        raise ValueError(f"{what}: the mask has shape {m.shape}, but the pointer is a scalar")
    return broadcast(p, m, f"{what} (pointer and mask)")


def _mask(mask: Any, shape: tuple[int, ...], what: str) -> tensor:
    m = truth(tile(mask, f"{what} (mask)"))
    return _fit(m, shape, f"the mask of {what}")


def _fill(value: Any, element: DType | PointerType, shape: tuple[int, ...], what: str) -> tensor:
    """A number or tensor as a tile of that element type and shape."""
    if is_number(value) and isinstance(element, DType):
        value = _number(value, element)
    return _fit(cast(tile(value, what), element), shape, f"the value of {what}")


def _number(value: int | float, element: DType) -> tensor:
    """A number in the element type; one that does not fit is cast at run time, as in Triton."""
    if element.is_float or (isinstance(value, int) and element != int1 and _in_range(value, element)):
        return emit("constant", (), element, value=float(value) if element.is_float else int(value))
    return to_tensor(value)


def _in_range(value: int | float, element: DType) -> bool:
    low = -(1 << (element.bits - 1)) if element.is_signed else 0
    return low <= value < low + (1 << element.bits)


def _fit(x: tensor, shape: tuple[int, ...], what: str) -> tensor:
    if x.shape == shape:
        return x
    if len(x.shape) > len(shape) or broadcast_shapes(x.shape, shape, what) != shape:
        raise ValueError(f"{what} has shape {x.shape}, but the pointers have shape {shape}")
    if x.shape and len(x.shape) < len(shape):
        x = emit("reshape", (x,), with_shape(x.dtype, (1,) * (len(shape) - len(x.shape)) + x.shape))
    return broadcast_to_shape(x, shape, what)


def _atomic(kind: str, pointer: Any, value: Any, mask: Any) -> tensor:
    what = f"atomic_{kind}"
    p = _pointers(pointer, what)
    element = p.dtype.element  # type: ignore[union-attr]
    if element.bits < 32 and not (kind == "add" and element.is_float):
        raise TypeError(f"{what} does not support {element}")
    if element.is_float and kind in ("and", "or", "xor"):
        raise TypeError(f"{what} takes integers, found {element}")
    operands = [p, _fill(value, element, p.shape, what)]
    if mask is not None:
        operands.append(_mask(mask, p.shape, what))
    return emit("atomic_rmw", operands, with_element(p.type, element), kind=kind)


@member
def atomic_add(pointer: Any, val: Any, mask: Any = None, sem: Any = None, scope: Any = None) -> tensor:
    """Adds to memory atomically where `mask` is true; returns what was there before."""
    return _atomic("add", pointer, val, mask)


@member
def atomic_max(pointer: Any, val: Any, mask: Any = None, sem: Any = None, scope: Any = None) -> tensor:
    """Stores the maximum of memory and `val` atomically; returns what was there before."""
    return _atomic("max", pointer, val, mask)


@member
def atomic_min(pointer: Any, val: Any, mask: Any = None, sem: Any = None, scope: Any = None) -> tensor:
    """Stores the minimum of memory and `val` atomically; returns what was there before."""
    return _atomic("min", pointer, val, mask)


@member
def atomic_and(pointer: Any, val: Any, mask: Any = None, sem: Any = None, scope: Any = None) -> tensor:
    """Bitwise and with memory, atomically; returns what was there before."""
    return _atomic("and", pointer, val, mask)


@member
def atomic_or(pointer: Any, val: Any, mask: Any = None, sem: Any = None, scope: Any = None) -> tensor:
    """Bitwise or with memory, atomically; returns what was there before."""
    return _atomic("or", pointer, val, mask)


@member
def atomic_xor(pointer: Any, val: Any, mask: Any = None, sem: Any = None, scope: Any = None) -> tensor:
    """Bitwise exclusive or with memory, atomically; returns what was there before."""
    return _atomic("xor", pointer, val, mask)


@member
def atomic_xchg(pointer: Any, val: Any, mask: Any = None, sem: Any = None, scope: Any = None) -> tensor:
    """Stores `val` atomically; returns what was there before."""
    return _atomic("xchg", pointer, val, mask)


@member
def atomic_cas(pointer: Any, cmp: Any, val: Any, sem: Any = None, scope: Any = None) -> tensor:
    """Stores `val` where memory equals `cmp`, atomically; returns what was there before."""
    p = _pointers(pointer, "atomic_cas")
    element = p.dtype.element  # type: ignore[union-attr]
    if element.bits < 16:
        raise TypeError(f"atomic_cas takes elements of 16, 32 or 64 bits, found {element}")
    expected, desired = (_fill(v, element, p.shape, "atomic_cas") for v in (cmp, val))
    return emit("atomic_cas", (p, expected, desired), with_element(p.type, element))


# ----------------------------------------------------------------------------------------------- casts and selection


@member
def to(x: tensor, dtype: Any, fp_downcast_rounding: Any = None, bitcast: bool = False) -> tensor:
    """The values converted to `dtype`, or with `bitcast` their bits read as that type of the same width."""
    target = known_dtype(dtype, "to")
    if known(fp_downcast_rounding, "fp_downcast_rounding") not in (None, "rtne"):
        raise ValueError(f"to: only rounding to nearest ('rtne') is supported, found {fp_downcast_rounding!r}")
    return _bitcast(x, target) if known(bitcast, "bitcast") else cast(x, target)


_bitcast = bitcast


def cast_to(input: Any, dtype: Any, fp_downcast_rounding: Any = None, bitcast: bool = False) -> tensor:
    """`tl.cast(x, dtype)`: `x.to(dtype)`, also of a number."""
    return to(tile(input, "cast"), dtype, fp_downcast_rounding, bitcast)


def where(condition: Any, x: Any, y: Any) -> tensor:
    """x where the condition is true, else y; the three broadcast, x and y promote. Both are computed."""
    return where_of(condition, x, y)


# ------------------------------------------------------------------------------------------------------------ shapes


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


# ------------------------------------------------------------------------------------------------- matrix products


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
    upwards is allowed, and int8 may meet uint8 (both beyond Triton). Precision hints are accepted: sums of fp32
    products are never computed in less than fp32. `out_dtype` fp16 rounds the fp32 result.
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
    return cast(emit("dot", (a, b, c), c.type), result)


# --------------------------------------------------------------------------------------------- reductions and scans


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


# --------------------------------------------------------------------------------------------- debugging and hints


def static_assert(cond: Any, msg: Any = "") -> None:
    """Stops the compilation with `msg` unless a condition known at compile time holds."""
    if not known(cond, "the condition of static_assert"):
        raise AssertionError(f"static_assert failed: {unwrap(msg)}" if msg else "static_assert failed")


def static_print(*values: Any, sep: str = " ", end: str = "\n", file: Any = None, flush: bool = False) -> None:
    """Prints while the kernel is compiled."""
    print(*values, sep=sep, end=end, file=file, flush=flush)


def device_print(prefix: Any, *args: Any, hex: Any = False) -> None:
    """Prints values while the kernel runs, after a text known at compile time."""
    if not isinstance(prefix, str):
        prefix, args = "", (prefix, *args)
    operands = [tile(a, "device_print") for a in args]
    emit_many("device_print", operands, (), prefix=prefix, hex=bool(known(hex, "hex")))


def device_assert(cond: Any, msg: Any = "", mask: Any = None) -> None:
    """Stops the run with `msg` if a condition does not hold in some lane where `mask` is true."""
    condition = truth(cond)
    if mask is not None:
        condition = condition | ~truth(mask)
    emit_many("assert", (condition,), (), message=str(known(msg, "the message of device_assert")))


def assume(cond: Any) -> None:
    """A promise to the compiler; nothing is checked."""


def multiple_of(input: Any, values: Any) -> Any:
    """A promise that values are multiples; the compiler's own analysis is used instead."""
    return input


def max_contiguous(input: Any, values: Any) -> Any:
    """A promise about contiguous runs; the compiler's own analysis is used instead."""
    return input


def max_constancy(input: Any, values: Any) -> Any:
    """A promise about constant runs; the compiler's own analysis is used instead."""
    return input


def debug_barrier() -> None:
    """Nothing to do: tiles have no threads that could be out of step."""


def unify_operands(x: Any, y: Any, what: str) -> tuple[tensor, tensor]:
    """Promotion and broadcasting for functions of two numbers."""
    return unify(x, y, what)

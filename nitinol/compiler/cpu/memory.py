"""Loads, stores and gathers of the CPU target, and access to tiles kept in scratch memory."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

from llvmlite import ir

from nitinol.compiler.cpu import streaming
from nitinol.compiler.cpu.arithmetic import I1, I8, I32, I64, llvm_type, mangle, memory_type
from nitinol.compiler.cpu.lanes import Affine, Lanes, Uniform, Vector
from nitinol.compiler.cpu.views import linear_index, pieces
from nitinol.compiler.ir import Op
from nitinol.language.types import DType, PointerType, float32, int1

if TYPE_CHECKING:
    from nitinol.compiler.cpu.generator import Generator, Index, Stored


def load(g: Generator, op: Op, index: Index, axis: int, width: int) -> Lanes:
    """The lanes of a `load` operation."""
    pointer = op.operands[0]
    element = op.result.element
    if width > 1 and width > pointer.shape[axis]:  # the run goes on in the next row
        strides = g.plan.strides.of(pointer)
        if len(op.operands) > 1 or not _one_run(strides, pointer.shape, width):
            return pieces(g, op.result, index, width)
        first = g.request(pointer, index, axis, 1)
        address: Lanes = Affine(g.scalar(first, pointer.element), element.nbytes, 1)
    else:
        address = g.request(pointer, index, axis, width)
    mask = g.request(op.operands[1], index, axis, width) if len(op.operands) > 1 else None
    other = g.request(op.operands[2], index, axis, width) if len(op.operands) > 2 else None
    if isinstance(address, Uniform) and isinstance(mask, (Vector, Affine)):
        address = Vector(g.vector(address, pointer.element, width))
    return load_lanes(g, address, element, width, mask, other)


def _one_run(strides: tuple[int | None, ...], shape: tuple[int, ...], width: int) -> bool:
    """Whether `width` row-major neighbours of a pointer tile are neighbours in memory."""
    expected, covered = 1, 1
    for stride, extent in zip(reversed(strides), reversed(shape)):
        if covered >= width:
            return True
        if extent > 1 and stride != expected:
            return False
        expected *= extent
        covered *= extent
    return covered >= width


def _always(mask: Lanes | None) -> bool:
    """Whether a mask is known to be set in all lanes."""
    return isinstance(mask, Uniform) and isinstance(mask.value, ir.Constant) and bool(mask.value.constant)


def load_lanes(
    g: Generator,
    address: Lanes,
    element: DType | PointerType,
    width: int,
    mask: Lanes | None = None,
    other: Lanes | None = None,
) -> Lanes:
    b, type = g.b, memory_type(element)
    size = element.nbytes
    mask = None if _always(mask) else mask
    if isinstance(address, Uniform):
        pointer = g.scalar(address, PointerType(float32))
        if mask is None:
            return Uniform(_from_memory(g, b.load(pointer, align=size, typ=type), element))
        filling = g.scalar(other, element) if other is not None else None
        return Uniform(_guarded(g, g.scalar(mask, int1), llvm_type(element), 1, filling,
                                lambda: load_lanes(g, address, element, 1)))
    vector = ir.VectorType(type, width)
    if isinstance(mask, Uniform) and isinstance(address, Affine):  # masked-off lanes on absent pages are slow
        filling = g.vector(other, element, width) if other is not None else None
        return Vector(_guarded(g, g.scalar(mask, int1), llvm_type(element), width, filling,
                               lambda: load_lanes(g, address, element, width)))
    fill = None
    if mask is not None:
        fill = ir.Constant(vector, ir.Undefined)
        if other is not None:
            fill = _to_memory(g, g.vector(other, element, width), element)
    first = g.scalar(address, PointerType(float32)) if isinstance(address, Affine) else None
    if isinstance(address, Affine) and address.stride == size:
        if mask is None:
            return Vector(_from_memory(g, b.load(first, align=size, typ=vector), element))
        args = [first, g.vector(mask, int1, width), fill]
        if isinstance(mask, Vector) and mask.full is not None:
            loads = (lambda: b.load(first, align=size, typ=vector), lambda: _masked_load(g, vector, args, size))
            return Vector(_from_memory(g, _whole_or_part(g, mask, *loads, fill), element))
        return Vector(_from_memory(g, _masked_load(g, vector, args, size), element))
    if isinstance(address, Affine) and address.stride == -size and mask is None:
        start = g.gep(first, ir.Constant(I64, -(width - 1) * size), I8)
        run = b.load(start, align=size, typ=vector)
        order = ir.Constant(ir.VectorType(I32, width), list(reversed(range(width))))
        return Vector(_from_memory(g, b.shuffle_vector(run, ir.Constant(vector, ir.Undefined), order), element))
    if isinstance(address, Affine) and mask is None:  # a constant stride: scalar loads at constant offsets
        lanes = ir.Constant(vector, ir.Undefined)
        for lane in range(width):
            pointer = g.gep(first, ir.Constant(I64, lane * address.stride), I8)
            lanes = b.insert_element(lanes, b.load(pointer, align=size, typ=type), ir.Constant(I32, lane))
        return Vector(_from_memory(g, lanes, element))
    pointers = g.vector(address, PointerType(float32), width)
    flags = g.vector(mask, int1, width) if mask is not None else _all(width)
    passed = fill if fill is not None else ir.Constant(vector, ir.Undefined)
    name = f"llvm.masked.gather.{mangle(vector)}.v{width}p0"
    return Vector(_from_memory(g, _masked_call(g, name, vector, [pointers, flags, passed], 0, size), element))


def _masked_load(g: Generator, vector: ir.VectorType, args: list[ir.Value], align: int) -> ir.Value:
    if vector.element == ir.HalfType():  # as bits: LLVM takes masked loads of half apart, lane by lane
        bits = ir.VectorType(ir.IntType(16), vector.count)
        args = [*args[:2], g.b.bitcast(args[2], bits)]
        return g.b.bitcast(_masked_load(g, bits, args, align), vector)
    return _masked_call(g, f"llvm.masked.load.{mangle(vector)}.p0", vector, args, 0, align)


def _masked_call(
    g: Generator, name: str, result: ir.Type, args: list[ir.Value], pointer: int, align: int
) -> ir.Value:
    """A masked memory intrinsic; its alignment is a parameter attribute of the pointer since LLVM 22 and an operand
    before, which is why the text is chosen by version."""
    from llvmlite.binding import llvm_version_info

    if llvm_version_info[0] < 22:
        args = [*args[: pointer + 1], ir.Constant(I32, align), *args[pointer + 1 :]]
    return g.intrinsic(name, result, args)


def _guarded(
    g: Generator, flag: ir.Value, type: ir.Type, width: int, instead: ir.Value | None, load: Callable[[], Lanes]
) -> ir.Value:
    """A load that happens only if the flag is set; `instead`, or zeros, if not."""
    b = g.b
    result = ir.VectorType(type, width) if width > 1 else type
    before = b.block
    inside, after = b.append_basic_block("guarded"), b.append_basic_block("loaded")
    b.cbranch(flag, inside, after)
    b.position_at_end(inside)
    lanes = load()
    value = lanes.value  # type: ignore[union-attr]
    end = b.block
    b.branch(after)
    b.position_at_end(after)
    phi = b.phi(result)
    phi.add_incoming(instead if instead is not None else ir.Constant(result, None), before)
    phi.add_incoming(value, end)
    return phi


def _whole_or_part(
    g: Generator, mask: Vector, whole: Callable[[], Any], part: Callable[[], Any], instead: ir.Value | None = None
) -> ir.Value | None:
    """Access to memory without a mask where all lanes are set, and none at all where no lane is. (A masked store to a
    line that is not in the cache costs a Zen 5 several times a plain one.) The phi of both results, or `instead`."""
    b = g.b
    names = ("whole", "rest", "part", "accessed")
    on_whole, rest, on_part, after = (b.append_basic_block(name) for name in names)
    b.cbranch(mask.full, on_whole, rest)
    b.position_at_end(rest)
    b.cbranch(mask.some, on_part, after)
    incoming = [(instead, rest)]
    for start, access in ((on_whole, whole), (on_part, part)):
        b.position_at_end(start)
        incoming.append((access(), b.block))
        b.branch(after)
    b.position_at_end(after)
    if instead is None:
        return None
    phi = b.phi(instead.type)
    for value, block in incoming:
        phi.add_incoming(value, block)
    return phi


def _from_memory(g: Generator, value: ir.Value, element: DType | PointerType) -> ir.Value:
    if element != int1:
        return value
    zero = ir.Constant(value.type, [0] * value.type.count if isinstance(value.type, ir.VectorType) else 0)
    return g.b.icmp_unsigned("!=", value, zero)


def _to_memory(g: Generator, value: ir.Value, element: DType | PointerType) -> ir.Value:
    if element != int1:
        return value
    vector = isinstance(value.type, ir.VectorType)
    return g.b.zext(value, ir.VectorType(I8, value.type.count) if vector else I8)


def _all(width: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(I1, width), [1] * width)


def store(g: Generator, op: Op, index: Index, axis: int, width: int) -> None:
    pointer, value = op.operands[:2]
    address = g.request(pointer, index, axis, width)
    lanes = g.request(value, index, axis, width)
    mask = g.request(op.operands[2], index, axis, width) if len(op.operands) > 2 else None
    store_lanes(g, address, lanes, value.element, width, mask, g.streamed.get(op))


def store_lanes(
    g: Generator,
    address: Lanes,
    lanes: Lanes,
    element: DType | PointerType,
    width: int,
    mask: Lanes | None = None,
    streamed: Any = None,
) -> None:
    b, size = g.b, element.nbytes
    mask = None if _always(mask) else mask
    if width == 1:
        value = _to_memory(g, g.scalar(lanes, element), element)
        pointer = g.scalar(address, PointerType(float32))
        if mask is None:
            b.store(value, pointer, align=size)
            return
        inside, after = b.append_basic_block("guarded"), b.append_basic_block("stored")
        b.cbranch(g.scalar(mask, int1), inside, after)
        b.position_at_end(inside)
        b.store(value, pointer, align=size)
        b.branch(after)
        b.position_at_end(after)
        return
    value = _to_memory(g, g.vector(lanes, element, width), element)
    if mask is not None and value.type.element == ir.HalfType():  # as for loads
        value = b.bitcast(value, ir.VectorType(ir.IntType(16), width))
    if isinstance(address, Affine) and address.stride == size:
        first = g.scalar(address, PointerType(float32))
        if mask is None:
            streaming.store(g, value, first, size, streamed)
            return
        flags = g.vector(mask, int1, width)

        def part() -> None:
            args = [_opaque(g, value), first, flags]
            _masked_call(g, f"llvm.masked.store.{mangle(value.type)}.p0", ir.VoidType(), args, 1, size)

        if isinstance(mask, Vector) and mask.full is not None:
            _whole_or_part(g, mask, lambda: streaming.store(g, value, first, size, streamed), part)
        else:
            part()
        return
    pointers = g.vector(address, PointerType(float32), width)
    flags = g.vector(mask, int1, width) if mask is not None else _all(width)
    name = f"llvm.masked.scatter.{mangle(value.type)}.v{width}p0"
    _masked_call(g, name, ir.VoidType(), [value, pointers, flags], 1, size)


def _opaque(g: Generator, value: ir.Value) -> ir.Value:
    """The value, of which LLVM knows nothing, at no cost. LLVM 22 for x86 turns a masked store of truncated lanes with
    one constant lane set into a scalar store of the lane before truncation: it overwrites the neighbour in memory."""
    if value.type.element not in (I8, ir.IntType(16)) or "x86" not in g.target.triple:
        return value
    bits = value.type.count * value.type.element.width
    if bits not in (128, 256, 512):  # no register of that size: widened by undefined lanes
        lanes = 128 // value.type.element.width
        if value.type.count > lanes:
            return value
        order = ir.Constant(ir.VectorType(I32, lanes), [min(i, value.type.count) for i in range(lanes)])
        wide = g.b.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), order)
        narrow = ir.Constant(ir.VectorType(I32, value.type.count), list(range(value.type.count)))
        return g.b.shuffle_vector(_opaque(g, wide), ir.Constant(wide.type, ir.Undefined), narrow)
    barrier = ir.InlineAsm(ir.FunctionType(value.type, [value.type]), "", "=x,0", side_effect=False)
    return g.b.call(barrier, [value])


# ------------------------------------------------------------------------------------------------- tiles in scratch


def stored_address(g: Generator, stored: Stored, index: Index, axis: int, width: int) -> Lanes:
    size = stored.element.nbytes
    if stored.group > 1:
        *outer, row, column = index
        groups = g.shift_right(row, stored.group.bit_length() - 1)
        position = g.add(
            g.mul(linear_index(g, (*stored.shape[:-2], stored.shape[-2] // stored.group, stored.shape[-1]),
                               (*outer, groups, column)), stored.group),
            g.low_bits(row, stored.group),
        )
        stride = stored.group * size if axis == len(stored.shape) - 1 else None
        assert stride is not None or width == 1, "an interleaved tile is read along its columns"
    else:
        position = linear_index(g, stored.shape, index)
        stride = size
        for extent in stored.shape[axis + 1 :]:
            stride *= extent
    base = g.advance(stored.pointer, position, memory_type(stored.element))
    return Uniform(base) if width == 1 else Affine(base, stride or size, 1)


def load_stored(g: Generator, stored: Stored, index: Index, axis: int, width: int) -> Lanes:
    return load_lanes(g, stored_address(g, stored, index, axis, width), stored.element, width)


def store_stored(g: Generator, stored: Stored, index: Index, axis: int, width: int, lanes: Lanes) -> None:
    store_lanes(g, stored_address(g, stored, index, axis, width), lanes, stored.element, width)


def copy_stored(g: Generator, source: Stored, place: Stored) -> None:
    lanes = min(prod(source.shape), g.target.vector_bytes // source.element.nbytes)
    vector = ir.VectorType(memory_type(source.element), lanes)
    total = prod(source.shape)

    def body(index: Index) -> None:
        from_, to = (g.advance(s.pointer, index[0], memory_type(s.element)) for s in (source, place))
        g.b.store(g.b.load(from_, align=1, typ=vector), to, align=1)

    g.walk((total,), [lanes], body, total // lanes)


def gather(g: Generator, op: Op, index: Index, axis: int, width: int) -> Lanes:
    """Elements of a stored tile at positions that another tile holds, along one axis."""
    if width > op.result.shape[axis]:  # the run goes on in the next row
        return pieces(g, op.result, index, width)
    source, positions = op.operands
    stored = g.tiles[source]
    along = op.attributes["axis"]
    selected = g.request(positions, index, axis, width)
    element = positions.element
    assert isinstance(element, DType)
    wide = ir.VectorType(I64, width) if width > 1 else I64
    offset = g.vector(selected, element, width)
    if offset.type != wide:
        offset = g.b.sext(offset, wide) if element.is_signed else g.b.zext(offset, wide)
    stride = 1
    total = None
    for i in reversed(range(len(source.shape))):
        if i == along:
            part = offset
        else:
            lanes: Lanes = Affine(index[i], 1) if i == axis and width > 1 else Uniform(index[i])
            if isinstance(lanes, Affine):
                steps = ir.Constant(ir.VectorType(I64, width), list(range(width)))
                part = g.b.add(g.splat(g.i64(index[i]), width), steps)
            else:
                part = g.vector(Uniform(g.i64(index[i])), DType("int64", "int", 64), width)
        factor = ir.Constant(wide, [stride] * width if width > 1 else stride)
        part = g.b.mul(part, factor)
        total = part if total is None else g.b.add(total, part)
        stride *= source.shape[i]
    base = stored.pointer
    pointers = g.gep(base, total, memory_type(source.element))
    return load_lanes(g, Uniform(pointers) if width == 1 else Vector(pointers), source.element, width)

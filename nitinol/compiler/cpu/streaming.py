"""Non-temporal stores: results larger than the caches go to memory around them.

An ordinary store to a line that is not in the cache first reads the line: a kernel that reads two arrays and writes one
moves four. A non-temporal store of a whole vector does without, but what it wrote has to come back from memory, so it
pays only where a result could not stay in the cache anyway. How much a launch writes is known when it begins: the bytes
of a tile, times the programs of the grid. Each vector tests that and its alignment (x86 demands that of a vector;
what starts in the middle of a line would fill no line), so that one machine code serves all sizes and all pointers.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from llvmlite import ir

from nitinol.compiler.cpu.arithmetic import I32, I64
from nitinol.compiler.ir import Op, Value

if TYPE_CHECKING:
    from nitinol.compiler.cpu.generator import Generator
    from nitinol.compiler.cpu.plan import Plan

RESULT_BYTES = 32 << 20  # at least: the last-level cache that a few cores share on most processors


def flags(g: Generator) -> dict[Op, Any]:
    """For each store that may go around the caches: whether this launch's is large enough."""
    programs: Any = None
    found: dict[Op, Any] = {}
    for op in _candidates(g.plan):
        for extent in g.grid if programs is None else ():
            wide = g.b.zext(extent, I64)
            programs = wide if programs is None else g.b.mul(programs, wide)
        needed = -(-RESULT_BYTES // _tile_bytes(op.operands[1]))
        found[op] = g.b.icmp_unsigned(">=", programs, ir.Constant(I64, needed))
    return found


def _candidates(plan: Plan) -> list[Op]:
    """Stores that every program does once, of memory that the kernel neither reads nor updates. None in a kernel with
    atomics: by them programs may tell each other what they wrote, and non-temporal stores come in no order."""
    ops = list(plan.order)
    if any(op.kind.startswith("atomic") for op in ops):
        return []
    loads = [op.operands[0] for op in ops if op.kind == "load"]
    return [op for op in plan.function.body.ops if op.kind == "store" and op.operands[0].shape
            and not any(plan.may_alias(op.operands[0], pointer) for pointer in loads)]  # fmt: skip


def _tile_bytes(value: Value) -> int:
    return prod(value.shape) * value.element.nbytes


def store(g: Generator, value: ir.Value, pointer: ir.Value, align: int, flag: Any) -> None:
    """A vector to memory: around the caches if the flag (None: never) is set and the address allows it."""
    b, nbytes = g.b, g.target.vector_bytes
    if flag is None or value.type.count * align != nbytes:
        b.store(value, pointer, align=align)
        return
    rest = b.and_(b.ptrtoint(pointer, I64), ir.Constant(I64, nbytes - 1))
    around, through, after = (b.append_basic_block(name) for name in ("around", "through", "written"))
    b.cbranch(b.and_(flag, b.icmp_unsigned("==", rest, ir.Constant(I64, 0))), around, through)
    b.position_at_end(around)
    written = b.store(value, pointer, align=nbytes)
    written.set_metadata("nontemporal", g.module.add_metadata([ir.Constant(I32, 1)]))
    b.branch(after)
    b.position_at_end(through)
    b.store(value, pointer, align=align)
    b.branch(after)
    b.position_at_end(after)


def fence(g: Generator, stores: dict[Op, Any]) -> None:
    """What was stored is seen by whoever learns that this function has returned."""
    b = g.b
    for flag in list(stores.values()):
        fenced, after = b.append_basic_block("fence"), b.append_basic_block("fenced")
        b.cbranch(flag, fenced, after)
        b.position_at_end(fenced)
        if "x86" in g.target.triple:
            g.intrinsic("llvm.x86.sse.sfence", ir.VoidType(), [])
        else:
            b.fence("seq_cst")
        b.branch(after)
        b.position_at_end(after)

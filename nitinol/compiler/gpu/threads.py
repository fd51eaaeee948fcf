"""What lane and warp say, as text: where a thread's elements are in their tile, and whether it acts for them."""

from __future__ import annotations

from nitinol.compiler.gpu.forms import Index, joined, linear
from nitinol.compiler.gpu.layout import LANE_BITS, Layout, Map, compose


def place_of(layout: Layout, index: Index, map_: Map | None = None) -> str:
    """The place of a register's element in the tile, mapped on."""
    through = (lambda c: compose(map_, c)) if map_ is not None else (lambda c: c)
    registers, lanes, warps = (through(c) for c in (layout.registers, layout.lanes, layout.warps))
    whole = Index(compose(registers, index.columns), index.through(registers).constant)
    parts = [str(whole), linear(lanes, "lane"), linear(warps, "warp")]
    overlap = any(a & b for i, a in enumerate((*registers, *lanes, *warps))
                  for b in (*registers, *lanes, *warps)[i + 1 :])  # fmt: skip
    parts = [p for p in parts if p != "0"]
    if overlap:
        parts = [f"({p})" for p in parts]
    return (" ^ ".join(parts[::-1]) if overlap else joined(parts[::-1])) or "0"


def owner_of(layout: Layout) -> list[str]:
    """Conditions under which a thread is the one that acts for an element that several hold."""
    return first_of(layout.copies, len(layout.warps))


def first_of(masks: tuple[int, int], warp_bits: int) -> list[str]:
    """Conditions that hold for one of the threads that differ in these bits of lane and warp only."""
    conditions = []
    for name, mask, bits in zip(("lane", "warp"), masks, (LANE_BITS, warp_bits)):
        if mask:
            conditions.append(f"{name} == 0" if mask == (1 << bits) - 1 else f"({name} & {mask}) == 0")
    return conditions


def guard_of(layout: Layout) -> str:
    """What stands before a statement that only the owner of an element executes."""
    owner = owner_of(layout)
    return f"if ({' && '.join(owner)}) " if owner else ""

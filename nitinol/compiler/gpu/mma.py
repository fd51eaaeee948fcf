"""Matrix products by mma.sync: operands from swizzled shared memory by ldmatrix, or from registers where they are.

A fragment's lanes and registers tell which lane gives which address: a matrix of 8 rows of 16 bytes is read whole, and
what arrives is what the fragment wants if those 16 bytes are two 16-bit elements of each of four lanes, or, transposed,
one element of each of eight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nitinol.compiler.gpu import dot
from nitinol.compiler.gpu.forms import fixed, linear
from nitinol.compiler.gpu.layout import Layout, Map, apply, axis_bits, compose, view_map
from nitinol.compiler.gpu.pipeline import PANEL_BYTES, Stage, staged
from nitinol.compiler.gpu.tree import Access
from nitinol.compiler.ir import ELEMENTWISE, VIEWS, Function, Op, constant_of, walk
from nitinol.language.types import DType

if TYPE_CHECKING:
    from nitinol.compiler.gpu.emit import Emitter


def chained(function: Function) -> set[Op]:
    """Products whose result is the left operand of another, and those others: their rows stay within a warp."""
    found: set[Op] = set()
    for op in walk(function.body):
        if op.kind == "dot":
            pending, seen = [op.operands[0]], set()
            while pending:
                value = pending.pop()
                if value.op is None or value in seen:
                    continue
                seen.add(value)
                if value.op.kind == "dot":
                    found |= {op, value.op}
                elif value.op.kind in ELEMENTWISE or value.op.kind in VIEWS:
                    pending += value.op.operands
    return found


@dataclass
class Source:
    """An operand of a product: in words of registers (`array`), or in shared memory (`stage`)."""

    layout: Layout
    fragment: dot.Fragment
    element: DType
    array: str = ""
    stage: Stage | None = None
    base: str = ""  # the address of the tile
    columns: Map = ()  # from places in the operand to bytes

    @property
    def pack(self) -> int:
        """Registers' bits within a 32-bit word."""
        return (4 // self.element.nbytes).bit_length() - 1

    def bytes_of(self, columns: Map) -> Map:
        return compose(self.columns, columns)


def source(e: Emitter, op: Op, number: int, name: str) -> tuple[Source, list[Access]]:
    """Where an operand is when the product begins; puts it there if need be."""
    value, layout = op.operands[number], e.assignment.fragments[op][number]  # type: ignore[index]
    instruction = e.dialect.matrix_instruction(op)
    fragment = (instruction.a, instruction.b)[number]
    assert isinstance(value.element, DType)
    made = Source(layout, fragment, value.element)
    found = staged(value)
    if found is not None:
        read, turned = found
        made.stage = read.attributes["stage"]
        slot = e.form(read.operands[0]).operand(fixed(0))
        made.base = f"{made.stage.name} + {slot} * {made.stage.nbytes}"
        view = view_map("trans", made.stage.shape, value.shape, {"perm": (1, 0)}) if turned else None
        made.columns = compose(made.stage.columns, view) if view else made.stage.columns
        return made, []
    if (op, number) in e.assignment.in_memory:
        made.stage = e.stages[value]
        made.base, made.columns = made.stage.name, made.stage.columns
        return made, [Access("read", made.stage.piece)]
    width = len(fragment.registers)
    made.array = e.name(f"{name}_{'ab'[number]}")
    e.say(e.dialect.matrix_declare(value.element, made.array, layout.count >> width, 1 << width))
    dot.fill(e, layout, width, dot.setter(e, made.array, e.form(value, layout), width, value.element, False))
    return made, []


def product(e: Emitter, op: Op) -> None:
    """c += a b for tiles of rank 2."""
    layouts = e.assignment.fragments[op]
    assert layouts is not None
    instruction, acc, name = e.dialect.matrix_instruction(op), op.operands[2], op.result.name or "product"
    (a, reads), (b, more) = source(e, op, 0, name), source(e, op, 1, name)
    c, width = e.name(f"{name}_c"), len(instruction.c.registers)
    layout = layouts[2]
    assert isinstance(acc.element, DType)
    e.say(e.dialect.matrix_declare(acc.element, c, layout.count >> width, 1 << width))
    dot.fill(e, layout, width, dot.setter(e, c, e.form(acc, layout), width, acc.element, constant_of(acc) == 0))
    if op.attributes.get("warpgroups"):
        lines = warp_groups(e, op, a, b, c)
    else:
        lines = loops(e, op, a, b, c)
    e.say(*lines, accesses=[*reads, *more])
    result = e.declare(e.name(name), op.result.element, layout.count)

    def out(i):
        cell = f"{c}[{dot._matrix(i, width)}]"
        return [f"{result.text(i.at(n))} = {e.dialect.matrix_get(cell, n)};" for n in range(1 << width)]

    dot.fill(e, layout, width, out)
    e.forms[op.result, layout] = result


def loops(e: Emitter, op: Op, a: Source, b: Source, c: str) -> list[str]:
    """For each step along k: fragments from shared memory, then an instruction for each matrix of the accumulator."""
    rows, columns = (axis_bits(op.operands[0].shape), axis_bits(op.operands[1].shape))
    m = outer(a, rows[0])
    n = outer(b, columns[1])
    k = outer(a, rows[1])
    bits = {"m": len(m), "n": len(n), "k": len(k)}
    lines: list[str] = []
    inside: list[str] = []
    for which, (operand, letter, steps, along) in enumerate(
        ((a, "m", m, outer(a, rows[1])), (b, "n", n, outer(b, columns[0])))
    ):
        if operand.stage is not None:
            operand.array = e.name(f"{c}_{'ab'[which]}")
            more, fetch = fragments_from_shared(e, operand, letter, steps, along)
            lines += more
            inside += fetch

    def cell(name: str, first: str, second: str) -> str:
        terms = [first] if bits[first] else []
        terms += [f"{second} << {bits[first]}" if bits[first] else second] if bits[second] else []
        return f"{name}[{' | '.join(reversed(terms)) or '0'}]"

    left = cell(a.array, "k", "m") if a.stage is None else _one(a.array, "m", bits)
    right = cell(b.array, "n", "k") if b.stage is None else _one(b.array, "n", bits)
    instruction = e.dialect.matrix_product(cell(c, "n", "m"), left, right, [v.element for v in op.operands[:2]],
                                           e.dialect.matrix_instruction(op))  # fmt: skip
    inside += [*loop(e, "m", bits["m"]), *(["    " * bool(bits["m"]) + t for t in loop(e, "n", bits["n"])])]
    inside.append("    " * (bool(bits["m"]) + bool(bits["n"])) + instruction)
    head = loop(e, "k", bits["k"])
    return ["{", *("    " + t for t in lines), *("    " + t for t in head), "    {", *("        " + t for t in inside),
            "    }", "}"]  # fmt: skip


def _one(name: str, letter: str, bits: dict[str, int]) -> str:
    return f"{name}[{letter if bits[letter] else '0'}]"


def loop(e: Emitter, name: str, bits: int, step: int = 1) -> list[str]:
    if not bits:
        return []
    advance = f"{name}++" if step == 1 else f"{name} += {step}"
    return [e.dialect.UNROLL, f"for (int {name} = 0; {name} < {1 << bits}; {advance})"]


def outer(operand: Source, places: list[int]) -> list[int]:
    """Columns of registers that number the matrices along an axis, within a warp."""
    own = {1 << bit for bit in places}
    return [c for c in operand.layout.registers[len(operand.fragment.registers) :] if c in own]


def fragments_from_shared(
    e: Emitter, operand: Source, letter: str, steps: list[int], along: list[int]
) -> tuple[list[str], list[str]]:
    """Lines to put before the loop along k, and lines in it that fill `array` with the fragments of one step."""
    layout, pack = operand.layout, operand.pack
    own = operand.bytes_of(layout.registers[: len(operand.fragment.registers)])
    lanes, warps = operand.bytes_of(layout.lanes), operand.bytes_of(layout.warps)
    parts = {letter: operand.bytes_of(tuple(steps)), "k": operand.bytes_of(tuple(along))}
    words = own[pack:]
    nbytes = operand.element.nbytes
    straight = (*own[:pack], *lanes[:2]) == tuple(nbytes << i for i in range(pack + 2))
    turned = nbytes == 2 and lanes[2:] == (2, 4, 8)
    name, count, base = operand.array, 1 << len(steps), e.name("at")
    declare = f"uint {name}[{count}][{1 << len(words)}];"
    if not straight and not turned:
        return element_by_element(e, operand, letter, parts, own, lanes, warps, declare)
    rows = lanes[2:] if straight else (own[0], lanes[0], lanes[1])
    pairs = len(words) == 1 and bool(steps)  # two matrices at once
    addresses = (*rows, *words, *(parts[letter][:1] if pairs else ()))
    used = 0
    for column in (*addresses, *warps):
        used |= column
    thread = [linear(addresses, "lane"), linear(warps, "warp")]
    hoisted = " ^ ".join(f"({t})" for t in thread if t != "0") or "0"
    added, mixed = [], []
    for step, columns in parts.items():
        plain = linear(tuple(c if not c & used else 0 for c in columns), step)
        crossed = linear(tuple(c if c & used else 0 for c in columns), step)
        added += [plain] * (plain != "0")
        mixed += [crossed] * (crossed != "0")
    at = base if not mixed else f"({' ^ '.join([base, *(f'({t})' for t in mixed)])})"
    address = " + ".join([f"{base}_tile", at, *(f"({t})" for t in added)])
    function = f"ldmatrix_x{1 << (len(words) + pairs)}" + ("" if straight else "_trans")
    target = f"{name}[{letter}]" if steps else f"{name}[0]"
    targets = f"{target}, {name}[{letter} + 1]" if pairs else target
    fetch = loop(e, letter, len(steps), 2 if pairs else 1)
    fetch.append("    " * bool(steps) + f"{function}({targets}, {address});")
    return [f"const uint {base}_tile = {operand.base}, {base} = {hoisted};"], [declare, *fetch]


def element_by_element(
    e: Emitter, operand: Source, letter: str, parts: dict[str, Map], own: Map, lanes: Map, warps: Map, declare: str
) -> tuple[list[str], list[str]]:
    """Where no ldmatrix gives what is wanted: bytes whose rows are the other way round."""
    pack, kind, base = operand.pack, e.type(operand.element), e.name("at")
    thread = [linear(lanes, "lane"), linear(warps, "warp"), *(linear(c, step) for step, c in parts.items())]
    place = " ^ ".join(f"({t})" for t in thread if t != "0") or "0"
    lines = []
    for word in range(1 << (len(own) - pack)):
        cells = [f"shared_load<{kind}>({base} + ({place} ^ {apply(own, word << pack | i)}))" for i in range(1 << pack)]
        target = f"{operand.array}[{letter if parts[letter] else '0'}]"
        lines.append(f"{target}[{word}] = pack({', '.join(cells)});")
    head = loop(e, letter, len(parts[letter]))
    body = [*head, "{", *("    " + t for t in lines), "}"]
    return [f"const uint {base} = {operand.base};"], [declare, *body]


# ------------------------------------------------------------------------------------------------- four warps at once

MOST_COLUMNS = 256  # of one instruction


def warp_groups(e: Emitter, op: Op, a: Source, b: Source, c: str) -> list[str]:
    """wgmma: each group of four warps multiplies 64 rows at a time, b (and a, if it is there) from shared memory."""
    rows, columns = axis_bits(op.operands[0].shape), axis_bits(op.operands[1].shape)
    m, n, k = outer(a, rows[0][6:]), outer(b, columns[1]), outer(a, rows[1])
    width = min(8 << len(n), MOST_COLUMNS)
    across = n[(width // 8).bit_length() - 1 :]  # more columns than one instruction takes
    lines, texts, turned = [], [], []
    numbers = ({"m": m, "k": k}, {"n": across, "k": outer(b, columns[0])})
    for operand, steps in zip((a, b), numbers):
        if operand.stage is None:
            bits = len(k)
            texts.append(f"{operand.array}[{'k' if bits else '0'}{f' | m << {bits}' if m else ''}]")
            continue
        name = e.name("matrix")
        offsets = {step: linear(operand.bytes_of(tuple(bits)), step) for step, bits in steps.items()}
        group = linear(operand.bytes_of(operand.layout.warps[2:]), "group")
        start = operand.base if group == "0" else f"{operand.base} + ({group})"
        leading, stride, swizzle, along_k = shape_of_memory(operand)
        lines.append(f"const ulong64 {name} = descriptor(uniform({start}), {leading}, {stride}, {swizzle});")
        texts.append(" + ".join([name, *(f"(({text}) >> 4)" for text in offsets.values() if text != "0")]))
        turned.append("0" if along_k else "1")
    if any("(group" in line or "group " in line for line in lines):
        lines.insert(0, "const int group = warp >> 2;")
    kind = a.element.name
    where = "registers" if a.stage is None else "memory"
    at = " + ".join([*([f"(m << {len(n)})"] if m else []), *([f"n * {width // 8}"] if across else [])]) or "0"
    call = f"wgmma_{kind}_{width}_{where}<{', '.join(turned)}>({c}, {at}, {', '.join(texts)});"
    pending = int(op.attributes.get("unfinished", False))
    body, pad = [], ""
    for step, own in (("k", k), ("m", m), ("n", across)):
        if own:
            body += [pad + text for text in loop(e, step, len(own))]
            pad += "    "
    return [
        "{", *("    " + t for t in lines), f"    settle({c});", "    wgmma_fence();", *("    " + t for t in body),
        f"    {pad}{call}", "    wgmma_commit();", f"    wgmma_wait<{pending}>();", f"    settle({c});", "}",
    ]  # fmt: skip


def shape_of_memory(operand: Source) -> tuple[int, int, int, bool]:
    """For a matrix descriptor: bytes from panel to panel, bytes from 8 rows to the next 8, the number of the swizzle;
    and whether neighbours in memory are neighbours along k."""
    assert operand.stage is not None
    stage = operand.stage
    row = min(stage.element.nbytes * stage.shape[stage.inner], PANEL_BYTES)
    fragment = operand.bytes_of(operand.layout.registers[:1])[0]  # the bit that fragments pack is one of k
    return row * stage.shape[1 - stage.inner], 8 * row, {128: 1, 64: 2, 32: 3}[row], fragment == stage.element.nbytes

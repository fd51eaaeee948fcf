"""Reductions and scans: first the registers of each thread, then the lanes of a simdgroup, then threadgroup memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from nitinol.compiler.gpu import convert, elementwise, sums, words
from nitinol.compiler.gpu.forms import Form, Index, closed, fixed, squeeze, variable
from nitinol.compiler.gpu.layout import Layout, axis_bits
from nitinol.compiler.gpu.threads import place_of
from nitinol.compiler.gpu.tree import Access
from nitinol.compiler.ir import ELEMENTWISE, Op, Value, combine_kind
from nitinol.language.types import DType, PointerType

if TYPE_CHECKING:
    from nitinol.compiler.gpu.emit import Emitter


def combine(e: Emitter, op: Op, left: Sequence[str], right: Sequence[str]) -> tuple[list[str], list[str]]:
    """The region on operands that are already written: lines to put before, and the results' texts."""
    region = op.regions[0]
    texts = dict(zip(region.arguments, (*left, *right)))
    lines: list[str] = []
    single = combine_kind(op) is not None

    def text(value) -> str:
        return texts[value] if value in texts else e.form(value).operand(fixed(0))

    for inner in region.ops[:-1]:
        if inner.kind == "constant":
            texts[inner.result] = elementwise.number(inner.attributes["value"], inner.result.element, e.dialect)
            continue
        if inner.kind not in ELEMENTWISE:
            raise e.error(f"{op.kind} with {inner.kind} in its combining function is not available in "
                          f"{e.dialect.NAME} kernels; use tl.where")  # fmt: skip
        made = elementwise.expression(inner, [text(v) for v in inner.operands], e.dialect, False, e.helpers)
        if single:
            texts[inner.result] = made
        else:
            name = e.name(inner.result.name or "t")
            lines.append(f"{e.type(inner.result.element)} {name} = {made};")
            texts[inner.result] = name
    return lines, [text(v) for v in region.ops[-1].operands]


class Running:
    """The variables of a reduction or scan: one form for each of its operands, changed as it proceeds."""

    def __init__(self, e: Emitter, op: Op, forms: list[Form], count: int) -> None:
        self.e, self.op, self.forms, self.count = e, op, forms, count
        self.kinds = [e.type(v.element) for v in op.operands]
        self.owned = False  # whether the forms are variables of ours, which may be changed

    def names(self) -> list[str]:
        return [self.e.name(r.name or "part") for r in self.op.results]

    def declare(self, names: Sequence[str], count: int) -> None:
        for kind, name in zip(self.kinds, names):
            self.e.say(f"{kind} {name}{f'[{count}]' if count > 1 else ''};")

    def own(self) -> None:
        """Makes sure that the forms are variables that may be changed."""
        if self.owned:
            return
        self.owned, names = True, self.names()
        self.forms = [
            self.e.store_in(name, v.element, self.count, f) for name, v, f in zip(names, self.op.operands, self.forms)
        ]

    def fold(self, bits: int, onto: Callable[[Index, str], str] | None = None) -> None:
        """Combines all registers that differ in bits of this mask, in order; `onto`: a register added to a sum."""
        kept = [bit for bit in range(self.count.bit_length() - 1) if not bits >> bit & 1]
        into = tuple(0 if bits >> bit & 1 else 1 << kept.index(bit) for bit in range(self.count.bit_length() - 1))
        names, count = self.names(), 1 << len(kept)
        self.declare(names, count)
        results = [variable(name, count) for name in names]
        forms = self.forms

        def lines(i: Index) -> list[str]:
            targets = [r.text(i.through(into)) for r in results]
            if onto is not None:
                so_far = "0" if not bits else f"(r & {bits}) == 0 ? 0 : {targets[0]}"
                return [f"{targets[0]} = {onto(i, so_far)};"]
            before, texts = combine(self.e, self.op, targets, [f.operand(i) for f in forms])
            first = "r == 0" if not kept else f"(r & {bits}) == 0"
            if len(targets) == 1 and not before:
                return [f"{targets[0]} = {first} ? {forms[0].operand(i)} : {texts[0]};"]
            start = assign(targets, [f.text(i) for f in forms])
            inner = before + assign(targets, texts)
            return [f"if ({first}) {{", *_indent(start), "} else {", *_indent(inner), "}"]

        self.e.each(self.count, lines, forms, defines=names)
        if bits:
            self.e.nodes[-1].partial.update(names)
        self.forms, self.count, self.owned = results, count, True

    def across(self, mask: int) -> None:
        """Combines with the lane whose number differs by `mask`; the lower lane's value is always on the left."""
        e, op = self.e, self.op
        whole = combine_kind(op)
        forms = self.forms

        def lines(i: Index) -> list[str]:
            other = [e.dialect.shuffle(v.element, f.text(i), str(mask), "xor") for v, f in zip(op.operands, forms)]
            if whole is not None:
                _, texts = combine(e, op, [forms[0].text(i)], other)
                return [f"{forms[0].text(i)} = {texts[0]};"]
            out, left, right = [], [], []
            for kind, form, text in zip(self.kinds, forms, other):
                far, a, b = e.name("far"), e.name("left"), e.name("right")
                out.append(f"{kind} {far} = {text};")
                out.append(f"{kind} {a} = lane & {mask} ? {far} : {form.text(i)};")
                out.append(f"{kind} {b} = lane & {mask} ? {form.text(i)} : {far};")
                left.append(a)
                right.append(b)
            before, texts = combine(e, op, left, right)
            return out + before + assign([f.text(i) for f in forms], texts)

        e.each(self.count, scoped(lines) if self.count == 1 else lines, forms, defines=[f.variable for f in forms])

    def halve(self, mask: int, number: int) -> None:
        """The same, but of registers that differ in bit `number` the lower goes to the lane without the mask's bit and
        the other one to the lane with it: half as many shuffles, and half as many registers are left."""
        e, op, form = self.e, self.op, self.forms[0]
        kept = tuple(1 << bit for bit in range(self.count.bit_length() - 1) if bit != number)

        def text(i: Index) -> str:
            low = i.through(kept)
            pair = [form.operand(low), form.operand(low.at(1 << number))]
            own, other = (f"lane & {mask} ? {b} : {a}" for a, b in (pair, pair[::-1]))
            far = e.dialect.shuffle(op.operands[0].element, other, str(mask), "xor")
            return combine(e, op, [f"({own})"], [far])[1][0]

        made = Form(text, lambda i: {(n, False) for n, _ in form.names(i.through(kept))}, False)
        self.count >>= 1
        self.forms = [e.store_in(self.names()[0], op.operands[0].element, self.count, made)]
        self.owned = True


def assign(targets: Sequence[str], texts: Sequence[str]) -> list[str]:
    return [f"{target} = {text};" for target, text in zip(targets, texts)]


def _indent(lines: Sequence[str]) -> list[str]:
    return ["    " + text for text in lines]


def scoped(lines):
    """Lines in a block of their own, if they declare anything."""

    def inner(i: Index) -> list[str]:
        made = lines(i)
        return made if len(made) == 1 else ["{", *("    " + text for text in made), "}"]

    return inner


def reduce(e: Emitter, op: Op) -> None:
    layout, axis, shape = e.assignment.chosen[op], op.attributes["axis"], op.operands[0].shape
    along = sum(1 << bit for bit in axis_bits(shape)[axis])
    running = Running(e, op, [e.form(v, layout) for v in op.operands], layout.count)
    result_layout = e.assignment.home[op.results[0]]
    assert result_layout is not None
    own = sum(1 << bit for bit, column in enumerate(layout.registers) if column & along)
    fours = words.four_products(e, op, layout, own) if op in e.byte_products else None
    if fours is not None:
        bits, reads, onto = fours
        running.forms, running.count = reads, layout.count >> 2
        running.fold(squeeze(own, bits), onto)
    elif op in e.byte_products:
        running.own()
    if fours is None and own:
        running.fold(own)
    threads = sums.sum_threads(e, op)
    if op not in e.spread:
        result_layout = between_threads(e, op, running, op.results[0], threads)
    for result, form in zip(op.results, running.forms):
        e.forms[result, result_layout] = form


def between_threads(e: Emitter, op: Op, running: Running, result: Value, threads: sums.Threads) -> Layout:
    """Combines what lanes and simdgroups have; then each has the whole, in the layout that is returned: the result's
    home, or the only one in which it is wanted."""
    layout = e.home(result)
    kind, element = combine_kind(op), op.operands[0].element
    assert isinstance(element, DType)
    target = only_wanted(e, result) if kind is not None else None
    lanes = [bit for bit in range(len(layout.lanes)) if threads[0] >> bit & 1]
    whole = None
    if len(lanes) == len(layout.lanes) and kind is not None and not (element.is_float and kind in ("min", "max")):
        whole = e.dialect.reduce_lanes(kind, element, "x")
    if whole is not None:
        form = running.forms[0]
        name = e.name(result.name or "part")
        reduced = Form(lambda i: e.dialect.reduce_lanes(kind, element, form.text(i)) or "", form.names)
        running.forms = [e.store_in(name, element, running.count, reduced)]
    elif lanes:
        spread = layout if target is None else halved(layout, target, lanes)
        if target is not None and not threads[1] and price(spread, target, element) > price(layout, target, element):
            spread = layout
        for bit in lanes:
            if layout.lanes[bit] == spread.lanes[bit]:
                running.own()
                running.across(1 << bit)
            else:
                number = layout.registers.index(spread.lanes[bit])
                running.halve(1 << bit, number)
                layout = replace(
                    layout, registers=(*layout.registers[:number], *layout.registers[number + 1 :]),
                    lanes=(*layout.lanes[:bit], spread.lanes[bit], *layout.lanes[bit + 1 :]),
                )  # fmt: skip
    if threads[1]:
        between_warps(e, op, running, layout, target or layout, threads[1])
        return target or layout
    if layout != e.home(result):  # spread over lanes
        assert target is not None
        running.forms = [convert.convert(e, op.operands[0], running.forms[0], layout, target)]
        return target
    return layout


def only_wanted(e: Emitter, value: Value) -> Layout | None:
    """The layout of a value that is wanted in one only, not its home, and has to be moved to."""
    home, wanted = e.home(value), e.assignment.wanted.get(value, [])
    if len(wanted) != 1 or wanted[0] == home or value in e.assignment.spilled or home.sparse or wanted[0].sparse:
        return None
    return wanted[0] if price(home, wanted[0], value.element) else None


def price(source: Layout, result: Layout, element: DType | PointerType) -> float:
    return convert.price(source, result, convert.find_shuffle(source, result), element)


def halved(layout: Layout, target: Layout, lanes: Sequence[int]) -> Layout:
    """Registers in the place of copies in these lanes: those that the target has in the same lane, in lanes, or not in
    registers first, of these the ones that are nearest in memory."""
    for bit in lanes:
        if not layout.registers or layout.lanes[bit]:
            continue
        column = min(
            layout.registers,
            key=lambda c: (c != target.lanes[bit], c not in target.lanes, c in target.registers, c),
        )
        registers = tuple(c for c in layout.registers if c != column)
        layout = replace(layout, registers=registers, lanes=(*layout.lanes[:bit], column, *layout.lanes[bit + 1 :]))
    return layout


def between_warps(e: Emitter, op: Op, running: Running, source: Layout, result: Layout, mask: int) -> None:
    """Each simdgroup puts down its part, which it has in the layout `source`; all threads take all parts of what they
    have in `result`, in one order."""
    parts = [bit for bit in range(len(source.warps)) if mask >> bit & 1]
    warps = list(source.warps)
    for number, bit in enumerate(parts):
        warps[bit] ^= 1 << (source.bits + number)
    partial = Layout(source.bits + len(parts), source.registers, source.lanes, tuple(warps))
    assert running.count == source.count
    pieces = []

    def at(shared: str, number: int, place: str) -> str:
        """A simdgroup's part for an element of the result."""
        offset = number << result.bits
        return f"{shared}[{offset if place == '0' else place if not offset else f'({place}) + {offset}'}]"

    for value, form in zip(op.operands, running.forms):
        shared, piece = e.scratch(value.element, 1 << partial.bits)
        convert.write_tile(e, form, partial, value, shared, Access("write", piece))
        pieces.append((shared, piece))
    names = [e.name(r.name or "whole") for r in op.results]
    if combine_kind(op) is not None:

        def whole(i: Index) -> str:
            cells = [at(pieces[0][0], number, place_of(result, i)) for number in range(1 << len(parts))]
            text = cells[0]
            for other in cells[1:]:
                text = combine(e, op, [text if closed(text) else f"({text})"], [other])[1][0]
            return text

        read = Access("read", pieces[0][1])
        running.forms = [convert.fetch(e, names[0], op.operands[0], result, whole, read)]
        return
    running.declare(names, result.count)
    results = [variable(name, result.count) for name in names]

    def lines(i: Index) -> list[str]:
        out: list[str] = []
        place = place_of(result, i)
        current = [at(shared, 0, place) for shared, _ in pieces]
        for number in range(1, 1 << len(parts)):
            before, texts = combine(e, op, current, [at(shared, number, place) for shared, _ in pieces])
            out += before
            current = [t if " " not in t else f"({t})" for t in texts]
        return out + [f"{r.text(i)} = {t};" for r, t in zip(results, current)]

    e.each(result.count, scoped(lines) if result.count == 1 else lines, [], [Access("read", p) for _, p in pieces],
           defines=names)  # fmt: skip
    running.forms = results


def scan(e: Emitter, op: Op) -> None:
    """Along registers one after the other, then the sums of the lanes, then those to the elements of later lanes."""
    layout, axis, reverse = e.assignment.chosen[op], op.attributes["axis"], op.attributes.get("reverse", False)
    along = axis_bits(op.operands[0].shape)[axis]
    split = sum(1 for bit in along if 1 << bit in layout.registers)  # the axis' bits in registers: the first ones
    width = 1 << (len(along) - split)  # lanes
    count, run = layout.count, 1 << split
    running = Running(e, op, [e.form(v, layout) for v in op.operands], count)
    running.own()
    forms = running.forms
    flip = run - 1 if reverse else 0
    if run > 1:

        def step(i: Index) -> list[str]:
            here, before = f"r ^ {flip}" if flip else "r", f"(r - 1) ^ {flip}" if flip else "r - 1"
            names = [f.variable for f in forms]
            lines, texts = combine(e, op, [f"{n}[{before}]" for n in names], [f"{n}[{here}]" for n in names])
            inner = lines + assign([f"{n}[{here}]" for n in names], texts)
            return [f"if ((r & {run - 1}) != 0) {{", *("    " + text for text in inner), "}"]

        reads = [Form(f.text, lambda i, f=f: {(n, False) for n, _ in f.names(i)}) for f in forms]  # type: ignore[misc]
        e.each(count, step, reads, defines=[f.variable for f in forms])
    if width > 1:
        lanes_scan(e, op, running, split, run, width, reverse)
    names = {r: v for r, v in zip(op.results, running.forms)}
    for result, form in names.items():
        e.forms[result, layout] = form


def neighbour(e: Emitter, value: Value, form: Form, how: str) -> Form:
    """The value that the lane before (or behind) has."""
    return Form(lambda i: e.dialect.shuffle(value.element, form.text(i), "1", how), form.names)


def lanes_scan(e: Emitter, op: Op, running: Running, split: int, run: int, width: int, reverse: bool) -> None:
    forms, count = running.forms, running.count
    outer = count // run
    last = 0 if reverse else run - 1
    up = tuple(1 << (bit + split) for bit in range(outer.bit_length() - 1))
    totals = [
        e.store_in(e.name("total"), v.element, outer, Form(
            lambda i, f=f: f.text(i.through(up).at(last)), lambda i, f=f: {(n, False) for n, _ in f.names(i)}))  # type: ignore[misc]
        for v, f in zip(op.operands, forms)
    ]  # fmt: skip
    position = f"(lane & {width - 1})" if width < 32 else "lane"
    how = "down" if reverse else "up"

    def inside(distance: int) -> str:
        return f"{position} < {width - distance}" if reverse else f"{position} >= {distance}"

    def far(distance: int, source: Sequence[Form], i: Index, out: list[str]) -> list[str]:
        names = []
        for value, kind, form in zip(op.operands, running.kinds, source):
            names.append(e.name("far"))
            text = e.dialect.shuffle(value.element, form.text(i), str(distance), how)
            out.append(f"{kind} {names[-1]} = {text};")
        return names

    distance = 1
    while distance < width:

        def lines(i: Index, distance: int = distance) -> list[str]:
            out: list[str] = []
            others = far(distance, totals, i, out)
            before, texts = combine(e, op, others, [t.text(i) for t in totals])
            inner = before + assign([t.text(i) for t in totals], texts)
            return [*out, f"if ({inside(distance)}) {{", *("    " + text for text in inner), "}"]

        e.each(outer, scoped(lines) if outer == 1 else lines, totals, defines=[t.variable for t in totals])
        distance *= 2
    if run == 1:
        running.forms = totals
        return
    prefixes = []
    for value, form in zip(op.operands, totals):
        prefixes.append(e.store_in(e.name("prefix"), value.element, outer, neighbour(e, value, form, how)))
    down = tuple(0 if bit < split else 1 << (bit - split) for bit in range(count.bit_length() - 1))

    def spread(i: Index) -> list[str]:
        before, texts = combine(e, op, [p.text(i.through(down)) for p in prefixes], [f.text(i) for f in forms])
        inner = before + assign([f.text(i) for f in forms], texts)
        return [f"if ({inside(1)}) {{", *("    " + text for text in inner), "}"]

    e.each(count, spread, [*forms, *(p.through(down) for p in prefixes)], defines=[f.variable for f in forms])

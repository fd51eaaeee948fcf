"""Loads that feed matrix products in a loop are made some iterations ahead, asynchronously, to shared memory.

A pass over the tile IR. Of each loop, the loads whose tiles only products take and whose addresses the loop's counter
(or a scalar that grows by a fixed step) tells become operations of their own:

    stage_open                       before the loop: shared memory for `count` tiles of each load
    stage_copy ptr, slot[, mask]     starts the copy of a tile into a slot; masked-off elements become 0
    stage_commit                     what was started since the last one is one group
    stage_wait                       until all but `pending` groups are there, for all threads
    stage_read slot -> tile          the tile, in shared memory: only `dot` takes it

The loop itself has the attribute `stages`. Where a product by warp groups only adds to an accumulator that the loop
carries, it need not be over when the next iteration begins (`unfinished`): the tensor cores go on through the barrier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from nitinol.compiler.analysis import base_pointer, uses_of
from nitinol.compiler.gpu.access import Widths, memory_order
from nitinol.compiler.gpu.layout import Map, axis_bits
from nitinol.compiler.ir import ELEMENTWISE, VIEWS, WRITES, Block, Function, Op, Value, constant_of, create, walk
from nitinol.language.types import DType, Type, int1, int32

COPY_BYTES = 16  # of one asynchronous copy of one thread
PANEL_BYTES = 128  # of a row of shared memory: all 32 banks once
PURE = ELEMENTWISE | VIEWS | {"constant", "arange", "program_id", "num_programs"}


@dataclass(eq=False)
class Stage:
    """Shared memory for tiles of one load: where each element lies, and how many tiles there are room for."""

    shape: tuple[int, ...]
    element: DType
    inner: int  # the axis whose elements are neighbours
    count: int = 1
    name: str = ""  # of the address in the source
    piece: object = None  # the Scratch

    @property
    def nbytes(self) -> int:
        """Of one tile."""
        return self.element.nbytes * self.shape[0] * self.shape[1]

    @property
    def columns(self) -> Map:
        return swizzled(self.shape, self.element.nbytes, self.inner)

    def __repr__(self) -> str:
        return f"{self.count} x {self.shape[0]}x{self.shape[1]}x{self.element}"


def swizzled(shape: Sequence[int], nbytes: int, inner: int) -> Map:
    """From places in a tile to bytes of shared memory, such that 8 neighbouring rows' 16 bytes lie in different banks.

    The tile is cut into panels of up to 128 bytes of each row, one behind the other. Within a panel the number of a
    row's 16-byte part is xored with the row's lowest bits: the 128-, 64- and 32-byte swizzles of the PTX manual.
    """
    bits = axis_bits(shape)
    along, across = bits[inner], bits[1 - inner]
    row = min(nbytes << len(along), PANEL_BYTES)
    rows = 1 << len(across)
    columns = [0] * (len(along) + len(across))
    for number, bit in enumerate(along):
        weight = nbytes << number
        columns[bit] = weight if weight < row else weight * rows
    skip = (PANEL_BYTES // row).bit_length() - 1  # so many neighbouring rows share the banks' width
    for number, bit in enumerate(across):
        part = COPY_BYTES << (number - skip) if number >= skip else 0
        columns[bit] = row << number ^ (part if part < row else 0)
    return tuple(columns)


def staged(value: Value) -> tuple[Op, bool] | None:
    """The stage_read that a value comes from, and whether it is transposed."""
    op, turned = value.op, False
    while op is not None and op.kind == "trans":
        value, turned = op.operands[0], not turned
        op = value.op
    return (op, turned) if op is not None and op.kind == "stage_read" else None


def pipeline(function: Function, dialect: ModuleType, warps: int, count: int, aliases: Sequence[int]) -> None:
    """Rewrites all loops, in place; notes for each product by what it is to be made (attributes `from_memory`, `outer`,
    `warpgroups`). `count`: tiles of each load in shared memory; 0: as many as pay, 1: no loads ahead."""
    for op in walk(function.body):
        if op.kind == "dot":
            matrices = dialect.matrix_instruction(op) is not None
            op.attributes["from_memory" if matrices and len(op.result.shape) == 2 else "outer"] = True
            if matrices and dialect.WARP_GROUPS and dialect.by_warp_groups(op, warps):
                op.attributes["warpgroups"] = True
    if count == 1:
        return
    groups = dict(zip(function.parameters, aliases))
    _block(function, function.body, dialect, warps, count, groups)


def _block(
    function: Function, block: Block, dialect: ModuleType, warps: int, count: int, groups: dict[Value, int]
) -> None:
    index = 0
    while index < len(block.ops):
        op = block.ops[index]
        for region in op.regions:
            _block(function, region, dialect, warps, count, groups)
        if op.kind == "for":
            before = _Loop(function, op, dialect, warps, count, groups).rewrite()
            block.ops[index:index] = before
            index += len(before)
        index += 1


class _Impossible(Exception):
    pass


class _Loop:
    def __init__(
        self, function: Function, loop: Op, dialect: ModuleType, warps: int, count: int, groups: dict[Value, int]
    ) -> None:
        self.loop, self.dialect, self.warps, self.count, self.groups = loop, dialect, warps, count, groups
        self.body = loop.regions[0]
        self.uses = uses_of(function)
        self.widths = Widths(function)
        self.inside = {*self.body.arguments, *(r for op in self.body.ops for r in op.results)}
        self.steps: dict[Value, Value] = {}  # of what grows by a fixed step
        for variable, following in zip(self.body.arguments[1:], self.body.terminator.operands):
            if following.op is not None and following.op.kind == "add" and following.op.operands[0] is variable:
                step = following.op.operands[1]
                if not variable.shape and (step not in self.inside or constant_of(step) is not None):
                    self.steps[variable] = step

    def rewrite(self) -> list[Op]:
        """Operations to put before the loop."""
        stages = {op: stage for op in self.body.ops if (stage := self.stage(op)) is not None}
        going = self.unfinished(stages)
        count = self.affordable(list(stages.values()), going is not None)
        if not stages or count < 2:
            return []
        loop, body, self.location = self.loop, self.body, self.loop.location
        for stage in stages.values():
            stage.count = count
        everything = loop.attributes["stages"] = list(stages.values())
        before = [create("stage_open", [], [], self.location, stages=everything)]
        distance = count - 1  # iterations ahead
        if going is not None and count > 3:
            going.attributes["unfinished"] = True
            loop.attributes["unfinished"] = body.arguments.index(going.operands[2]) - 1
            distance -= 1  # the product before the last may still read its tiles
        for number in range(distance):
            slot = self.constant(before, number, int32)
            before += self.copies(stages, number, self.starts(), slot)
        zero = self.constant(before, 0, int32)
        slot = Value(int32, None, "slot")
        body.arguments.append(slot)
        loop.operands.append(zero)
        loop.results.append(Value(int32, loop, "slot"))

        fence = any(op.attributes.get("warpgroups") for op in body.ops)
        top = [create("stage_wait", [], [], self.location, pending=distance - 1, fence=fence)]
        top += self.copies(stages, distance, {v: v for v in body.arguments}, self.turned(top, slot, distance, count))
        ending = body.ops.pop()
        rest: list[Op] = []
        for op in body.ops:
            if op in stages:
                read = create("stage_read", [slot], [op.result.type], op.location, stage=stages[op])
                read.result.name = op.result.name
                for user in self.uses[op.result]:
                    user.operands = [read.result if v is op.result else v for v in user.operands]
                op = read
            rest.append(op)
        ending.operands.append(self.turned(rest, slot, 1, count))
        body.ops = [*top, *rest, ending]
        return before

    def turned(self, ops: list[Op], slot: Value, distance: int, count: int) -> Value:
        """The slot that comes `distance` later in the round of `count`."""
        later = self.add(ops, "add", [slot, self.constant(ops, distance, int32)], int32)
        back = self.add(ops, "sub", [later, self.constant(ops, count, int32)], int32)
        inside = self.add(ops, "lt", [later, self.constant(ops, count, int32)], int1)
        return self.add(ops, "select", [inside, later, back], int32)

    def unfinished(self, stages: dict[Op, Stage]) -> Op | None:
        """A product of nothing but tiles that are loaded ahead, whose result only the next iteration takes."""
        products = [op for op in self.body.ops if op.kind == "dot"]
        if len(products) != 1 or not products[0].attributes.get("warpgroups"):
            return None
        a, b, acc = products[0].operands
        for value in (a, b):
            while value.op is not None and value.op.kind == "trans":
                value = value.op.operands[0]
            if value.op not in stages:
                return None
        carried, following = self.body.arguments[1:], self.body.terminator.operands
        fits = acc in carried and following[carried.index(acc)] is products[0].result
        alone = len(self.uses.get(acc, [])) == len(self.uses.get(products[0].result, [])) == 1
        return products[0] if fits and alone else None

    def affordable(self, stages: list[Stage], going: bool) -> int:
        """How many tiles of each load fit.

        By default 3, or 2 where with 3 no two blocks share a multiprocessor. Products that go on into the next
        iteration (`going`) want 4, unless two small blocks hide each other's waits.
        """
        each = sum(stage.nbytes for stage in stages)
        room = self.dialect.SHARED_LIMIT - self.dialect.SHARED_ROOMY
        shared = 3 * each <= room // 2
        count = self.count or (4 if going and (self.warps > 4 or not shared) else 3 if shared else 2)
        while count > 1 and each * count > room:
            count -= 1
        return count

    def stage(self, op: Op) -> Stage | None:
        """For a load that can be made ahead."""
        if op.kind != "load" or len(op.result.shape) != 2 or not isinstance(op.result.element, DType):
            return None
        element, pointer = op.result.element, op.operands[0]
        if len(op.operands) > 2 and constant_of(op.operands[2]) != 0:
            return None
        order = memory_order(self.widths.strides.of(pointer), pointer.shape)
        wide = (COPY_BYTES // element.nbytes).bit_length() - 1
        if not order or self.widths.vector_bits(op, order) < wide:
            return None
        inner = next(axis for axis, bits in enumerate(axis_bits(pointer.shape)) if order[0] in bits)
        if not self.only_products(op.result, inner, element) or self.written(pointer):
            return None
        try:
            ahead = _Ahead({v: v for v in (self.body.arguments[0], *self.steps)}, self.inside)
            for operand in op.operands[:2]:
                ahead.value(operand)
        except _Impossible:
            return None
        return Stage(op.result.shape, element, inner)

    def only_products(self, value: Value, inner: int, element: DType) -> bool:
        """Whether all users are matrix instructions that can take the tile from shared memory."""
        for user in self.uses.get(value, []):
            if user not in self.body.ops:
                return False
            if user.kind == "trans" and user.attributes["perm"] in ([1, 0], (1, 0)):
                if not self.only_products(user.result, 1 - inner, element):
                    return False
            elif user.kind != "dot" or user.operands[2] is value or self.dialect.matrix_instruction(user) is None:
                return False
            elif element.nbytes == 1 and inner != (1 if user.operands[0] is value else 0):
                return False  # bytes cannot be transposed on the way to registers
        return value in self.uses

    def written(self, pointer: Value) -> bool:
        """Whether the loop writes where the load may read."""
        base = base_pointer(pointer, self.groups)
        for op in walk(self.body):
            if op.kind in WRITES:
                other = base_pointer(op.operands[0], self.groups)
                if base is None or other is None or self.groups[base] == self.groups[other]:
                    return True
        return False

    # --------------------------------------------------------------------------------------------- new operations

    def add(self, ops: list[Op], kind: str, operands: list[Value], type: Type) -> Value:
        ops.append(create(kind, operands, [type], self.location))
        return ops[-1].result

    def constant(self, ops: list[Op], number: int, type: Type) -> Value:
        ops.append(create("constant", [], [type], self.location, value=number))
        return ops[-1].result

    def starts(self) -> dict[Value, Value]:
        """What the counter and all carried values are at first."""
        return dict(zip(self.body.arguments, [self.loop.operands[0], *self.loop.operands[3:]]))

    def copies(self, stages: dict[Op, Stage], distance: int, now: dict[Value, Value], slot: Value) -> list[Op]:
        """The copies for the iteration that comes `distance` iterations later, if it comes."""
        ops: list[Op] = []
        mapping = {}
        for variable, step in [(self.body.arguments[0], self.loop.operands[2]), *self.steps.items()]:
            mapping[variable] = self.later(ops, now[variable], step, distance)
        go = self.add(ops, "lt", [mapping[self.body.arguments[0]], self.loop.operands[1]], int1)
        ahead = _Ahead(mapping, self.inside)
        made: list[Op] = []
        for load, stage in stages.items():
            pointer, *mask = (ahead.value(v) for v in load.operands[:2])
            made.append(create("stage_copy", [pointer, slot, *mask], [], load.location, stage=stage))
        then = Block([], [*ahead.ops, *made, create("yield", [], [], self.location)])
        otherwise = Block([], [create("yield", [], [], self.location)])
        ops.append(create("if", [go], [], self.location, [then, otherwise]))
        ops.append(create("stage_commit", [], [], self.location))
        return ops

    def later(self, ops: list[Op], value: Value, step: Value, distance: int) -> Value:
        if distance == 0:
            return value
        number = constant_of(step)
        if number is not None:
            total = self.constant(ops, int(number) * distance, value.type)
        else:
            total = self.add(ops, "mul", [step, self.constant(ops, distance, value.type)], value.type)
        return self.add(ops, "add", [value, total], value.type)


class _Ahead:
    """Copies of the operations of a loop's body that compute a value, for other values of its arguments."""

    def __init__(self, mapping: dict[Value, Value], inside: set[Value]) -> None:
        self.mapping, self.inside = dict(mapping), inside
        self.ops: list[Op] = []

    def value(self, value: Value) -> Value:
        if value not in self.mapping:
            op = value.op
            if value not in self.inside:
                return value
            if op is None or op.kind not in PURE:
                raise _Impossible
            copy = create(op.kind, [self.value(v) for v in op.operands], [r.type for r in op.results], op.location,
                          **op.attributes)  # fmt: skip
            self.ops.append(copy)
            for old, new in zip(op.results, copy.results):
                new.name = old.name
                self.mapping[old] = new
        return self.mapping[value]



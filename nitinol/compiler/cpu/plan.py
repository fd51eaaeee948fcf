"""Which tiles of a kernel are computed into memory, and which on demand where they are used.

By default a tile is an expression: each store, reduction or loop-carried tile walks its own elements block by block
and computes what feeds it inside that walk. A tile is *stored* (computed once into scratch, where it is defined) when
computing it on demand would cost more or be wrong:
- reductions, scans, atomics, and results of control flow always;
- a value that costs a transcendental function or a gather and that several walks use, or that is repeated along a
  broadcast axis, or that is defined outside the loop that uses it;
- a `dot` unless exactly one walk uses it element by element (then it is its register block's micro-kernel);
- a load that a later write to the same memory could overtake.
"""

from __future__ import annotations

from nitinol.compiler import ir
from nitinol.compiler.analysis import AxisStrides, axis_groups, base_pointer, uses_of
from nitinol.compiler.ir import Block, Op, Value
from nitinol.language.types import PointerType, int8, int32, uint8

EXPENSIVE = 8  # in units of one vector instruction
REPEATED = 4  # what it may cost to compute a value again for each place that a broadcast brings it to
INLINE_REDUCE = 16  # reductions over at most this many values, not along the lanes, are done where they are used
COST = {
    **dict.fromkeys(("exp", "exp2", "log", "log2", "sin", "cos", "tanh", "erf"), 12),
    **dict.fromkeys(("div", "rem", "sqrt", "rsqrt"), 4),
    "dot": 100,
    "gather": 10,
}


class Plan:
    """`stored`: values computed into memory. `fused_dots`: dots evaluated inside their one user's walk."""

    def __init__(self, function: ir.Function, alias_classes: list[int]) -> None:
        self.function = function
        self.uses = uses_of(function)
        self.strides = AxisStrides()
        self.stored: set[Value] = set()
        self.fused_dots: set[Value] = set()
        self.order: dict[Op, int] = {}
        self.block_of: dict[Op, Block] = {}
        self.parents: dict[Block, Op | None] = {function.body: None}
        self._classes = dict(zip(function.parameters, alias_classes))
        self._costs: dict[Value, int] = {}
        self._roots: dict[Value, set[Op]] = {}
        self._number(function.body)
        self._writes = [op for op in self.order if op.kind in ir.WRITES]
        ops = list(self.order)
        for op in ops:
            for value in op.results:
                if value.shape and self._must_store(op):
                    self.stored.add(value)
            if op.kind == "gather":
                self.stored.add(op.operands[0])
        for op in ops:
            for value in op.results:
                if value.shape and value not in self.stored and self._should_store(op, value):
                    self.stored.add(value)
        self._roots.clear()
        for op in ops:
            if op.kind == "dot":
                (self.fused_dots if self._fusable(op.result) else self.stored).add(op.result)
                self._roots.clear()

    def _number(self, block: Block) -> None:
        for op in block.ops:
            self.order[op] = len(self.order)
            self.block_of[op] = block
            for region in op.regions:
                self.parents[region] = op
                if op.kind in ir.CONTROL:
                    self._number(region)

    # --------------------------------------------------------------------------------------------------- decisions

    def _must_store(self, op: Op) -> bool:
        if op.kind in ("scan", "atomic_rmw", "atomic_cas", *ir.CONTROL):
            return True
        return op.kind == "reduce" and not self.inline_reduce(op)

    def _should_store(self, op: Op, value: Value) -> bool:
        if op.kind == "dot" or isinstance(value.element, PointerType):
            return False
        if op.kind == "load" and self._overtaken(op):
            return True
        cost = self.cost(value)
        users = self.uses.get(value, [])
        if cost >= 3 and any(self._deeper(op, user) for user in users):
            return True
        if cost >= REPEATED and self._repeated(value):
            return True
        if cost < EXPENSIVE:
            return False
        return len(users) > 1 and len(self.roots(value)) > 1

    def _repeated(self, value: Value) -> bool:
        """Whether elements are used again along an axis that a broadcast grows."""
        for user in self.uses.get(value, []):
            if user.kind == "broadcast" and user.result.shape != value.shape:
                return True
            if user.kind in ("reshape", "trans") and self._repeated(user.result):
                return True
        return False

    def inline_reduce(self, op: Op) -> bool:
        """Whether a reduction is done inside its user's walk: few values, and not along that walk's lanes."""
        axis = op.attributes["axis"]
        source = op.operands[0]
        if len(op.operands) != 1 or len(source.shape) == 1:
            return False
        if dot4_operands(op) is not None:
            return True
        if source.shape[axis] > INLINE_REDUCE or axis == len(source.shape) - 1:
            return False
        return self.lane_axis([source]) != axis

    def _fusable(self, value: Value) -> bool:
        if value in self.stored or len(self.roots(value)) != 1:
            return False
        (root,) = self.roots(value)
        if root.kind not in ("store", "yield", *ir.ELEMENTWISE):
            return False
        definition = value.op
        assert definition is not None
        if self.block_of[definition] is not self.block_of[root]:
            return False
        return self._elementwise_path(value)

    def _elementwise_path(self, value: Value) -> bool:
        """Every use leads to the root element by element."""
        for user in self.uses.get(value, []):
            if user.kind in ("store", "yield"):
                continue
            if user.kind not in ir.ELEMENTWISE and not (user.kind == "dot" and user.operands[2] is value):
                return False
            if user.operands[:2] and user.kind == "dot" and value in user.operands[:2]:
                return False
            if user.result not in self.stored and not self._elementwise_path(user.result):
                return False
        return True

    def roots(self, value: Value) -> set[Op]:
        """The operations whose walks compute this value on demand."""
        if value not in self._roots:
            found: set[Op] = set()
            for user in self.uses.get(value, []):
                lazy = user.results and not user.regions and user.result not in self.stored
                lazy = lazy or (user.kind == "reduce" and user.result not in self.stored and user.result.shape != ())
                if lazy and user.kind not in ir.EFFECTS:
                    for result in user.results:
                        found |= self.roots(result)
                else:
                    found.add(user)
            self._roots[value] = found
        return self._roots[value]

    def cost(self, value: Value) -> int:
        """Vector instructions per element to compute the value on demand, down to loads and stored tiles."""
        if value in self.stored or not value.shape:
            return 0
        if value not in self._costs:
            self._costs[value] = 0  # of a value in a cycle; there are none
            op = value.op
            total = 0
            if op is not None:
                total = sum(self.cost(v) for v in op.operands)
                if op.kind == "load":
                    contiguous = any(s == 1 for s in self.strides.of(op.operands[0]))
                    total = (2 if len(op.operands) > 1 else 1) if contiguous else EXPENSIVE
                elif op.kind == "reduce":
                    total = total * op.operands[0].shape[op.attributes["axis"]] + EXPENSIVE
                elif op.kind not in ir.VIEWS and op.kind not in ("arange", "addptr"):
                    loaded = total > 0  # arithmetic on indices is nearly free: it stays scalar
                    total += COST.get(op.kind, 1 if loaded else 0)
            self._costs[value] = total
        return self._costs[value]

    def _deeper(self, op: Op, user: Op) -> bool:
        """Whether the user stands in a loop that the definition is outside of."""
        block = self.block_of.get(user)
        while block is not None and block is not self.block_of[op]:
            parent = self.parents[block]
            if parent is None:
                return False
            if parent.kind in ("for", "while"):
                return True
            block = self.block_of[parent]
        return False

    # ----------------------------------------------------------------------------------------------- memory hazards

    def may_alias(self, a: Value, b: Value) -> bool:
        first, second = (base_pointer(pointer, self._classes) for pointer in (a, b))
        if first is None or second is None:
            return True
        return first is second or self._classes[first] == self._classes[second]

    def _overtaken(self, load: Op) -> bool:
        """Whether a write that may touch the same memory comes before the last walk that would do this load."""
        pointer = load.operands[0]
        writes = [w for w in self._writes if self.may_alias(w.operands[0], pointer)]
        if not writes:
            return False
        start = self.order[load]
        for root in self.roots(load.result):
            end = self.order.get(root, start)
            first_loop = self._loop_around(load, root)
            for write in writes:
                position = self.order[write]
                if write is root:
                    same = write.kind == "store" and write.operands[0] is pointer
                    if not (same and self._elementwise_path(load.result)):
                        return True
                elif start < position < end or (first_loop is not None and self._inside(write, first_loop)):
                    return True
        return False

    def _loop_around(self, op: Op, user: Op) -> Op | None:
        """The outermost loop around the user that the definition is outside of."""
        found, block = None, self.block_of.get(user)
        while block is not None and block is not self.block_of[op]:
            parent = self.parents[block]
            if parent is None:
                return None
            if parent.kind in ("for", "while"):
                found = parent
            block = self.block_of[parent]
        return found

    def _inside(self, op: Op, loop: Op) -> bool:
        block: Block | None = self.block_of[op]
        while block is not None:
            parent = self.parents[block]
            if parent is loop:
                return True
            block = self.block_of[parent] if parent is not None else None
        return False

    # ------------------------------------------------------------------------------------------- the axis of the lanes

    def lane_axis(self, values: list[Value]) -> int:
        """The axis of tiles of one shape along which most of the memory that feeds them is contiguous."""
        shape = values[0].shape
        votes = [0.0] * len(shape)
        seen: set[Value] = set()
        for value in values:
            for axis, vote in enumerate(self._votes(value, seen)):
                votes[axis] += vote
        for axis, extent in enumerate(shape):
            if extent == 1:
                votes[axis] = -1.0
        best = len(shape) - 1
        for axis in reversed(range(len(shape))):
            if votes[axis] > votes[best]:
                best = axis
        return best

    def _votes(self, value: Value, seen: set[Value]) -> list[float]:
        rank = len(value.shape)
        op = value.op
        none = [0.0] * rank
        if rank == 0 or value in seen:
            return none
        seen.add(value)
        if value in self.stored:
            return [0.5 if i == rank - 1 else 0.0 for i in range(rank)]
        if op is None:
            return [0.5 if i == rank - 1 else 0.0 for i in range(rank)]
        if op.kind == "load":
            strides = self.strides.of(op.operands[0])
            weight = 4.0 if value.element.nbytes >= 4 else 2.0
            return [weight if s == 1 and n > 1 else 0.0 for s, n in zip(strides, value.shape)]
        if op.kind == "dot":
            return [8.0 if i == rank - 1 else 0.0 for i in range(rank)]
        if op.kind == "broadcast":
            source = op.operands[0]
            return [
                v if a == b else 0.0 for v, a, b in zip(self._votes(source, seen), source.shape, value.shape)
            ]
        if op.kind == "trans":
            votes = self._votes(op.operands[0], seen)
            return [votes[p] for p in op.attributes["perm"]]
        if op.kind == "reshape":
            source = op.operands[0]
            votes, out = self._votes(source, seen), none
            for left, right in axis_groups(source.shape, value.shape):
                out[right[-1]] = votes[left[-1]]
            return out
        if op.kind == "join":
            return [x + y for x, y in zip(*(self._votes(v, seen) for v in op.operands))] + [0.0]
        if op.kind == "split":
            return self._votes(op.operands[0], seen)[:-1]
        if op.kind == "gather":
            return self._votes(op.operands[1], seen)
        if op.kind == "reduce":
            votes = self._votes(op.operands[0], seen)
            axis = op.attributes["axis"]
            if axis == len(votes) - 1 and votes:
                votes[-2] += votes[-1]
            return votes[:axis] + votes[axis + 1 :]
        out = none
        for operand in op.operands:
            if operand.shape == value.shape:
                out = [x + y for x, y in zip(out, self._votes(operand, seen))]
        return out


def dot4_operands(op: Op) -> tuple[Value, Value] | None:
    """The two 8-bit tiles of `sum(a.to(int32) * b.to(int32), axis=-1)` over an extent of 4, else None.

    That is what the integer dot instructions (x86 VNNI, Arm dot product) do in each 32-bit lane.
    """
    source = op.operands[0]
    if ir.combine_kind(op) != "add" or source.element != int32 or source.shape[-1] != 4:
        return None
    if op.attributes["axis"] != len(source.shape) - 1 or source.op is None or source.op.kind != "mul":
        return None
    bytes_of = [_narrow(v) for v in source.op.operands]
    if None in bytes_of:
        return None
    return bytes_of[0], bytes_of[1]  # type: ignore[return-value]


def _narrow(value: Value) -> Value | None:
    """The 8-bit tile that a 32-bit one was extended from, looked for through no more than the cast itself."""
    op = value.op
    if op is not None and op.kind == "cast" and op.operands[0].element in (int8, uint8):
        return op.operands[0]
    return None

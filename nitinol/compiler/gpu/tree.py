"""The kernel's body as statements before it is text: where barriers go, and what shares threadgroup memory.

Every statement says what it touches. A walk over the tree keeps the accesses since the last barrier and puts a barrier
before a statement that conflicts with one of them, following loops round and branches both ways; nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Scratch:
    """A piece of threadgroup memory of one conversion, reduction or dot; it lives from first to last access."""

    nbytes: int
    align: int = 16
    offset: int = 0
    first: int = -1
    last: int = -1


@dataclass(frozen=True)
class Access:
    """A read, write or atomic of memory, or a "hold": somebody else sees to its barriers. `where`: a Scratch, or a
    class of pointers that may meet (None: any).

    Accesses with one `thread` go to the same element in the same thread, and need no barrier between them.
    """

    how: str
    where: Any
    thread: Any = None

    @property
    def space(self) -> str:
        return "threadgroup" if isinstance(self.where, Scratch) else "device"

    def conflicts(self, other: Access) -> bool:
        if self.how == other.how != "write" or "hold" in (self.how, other.how) or self.space != other.space:
            return False
        if self.thread is not None and self.thread == other.thread:
            return False
        a, b = self.where, other.where
        if isinstance(a, Scratch):
            return a.offset < b.offset + b.nbytes and b.offset < a.offset + a.nbytes
        return a is None or b is None or a == b


@dataclass
class Statement:
    """Lines of text, and what they touch."""

    lines: list[str]
    line: int | None = None
    accesses: list[Access] = field(default_factory=list)
    clears: bool = False  # it ends with a barrier


@dataclass
class Each:
    """A loop over registers; statements whose registers do not depend on each other's share one."""

    count: int
    step: int
    statements: list[Statement]
    defined: set[str] = field(default_factory=set)
    elsewhere: set[str] = field(default_factory=set)  # arrays read at other registers than r
    partial: set[str] = field(default_factory=set)  # variables that have their values only after the loop


@dataclass
class Nest:
    """Control flow: head, body and tail, `loop` if the body may run again after itself."""

    head: str
    body: list[Any]
    tail: str
    loop: bool
    line: int | None = None
    otherwise: list[Any] | None = None


Node = Statement | Each | Nest


def accesses(node: Statement | Each) -> list[Access]:
    return node.accesses if isinstance(node, Statement) else [a for s in node.statements for a in s.accesses]


# ------------------------------------------------------------------------------------------------ threadgroup memory


def leaves(nodes: Sequence[Node]) -> Iterator[Statement | Each]:
    for node in nodes:
        if isinstance(node, Nest):
            yield from leaves(node.body)
            yield from leaves(node.otherwise or [])
        else:
            yield node


def allocate(nodes: Sequence[Node], roomy: int) -> int:
    """Places pieces that are never alive together in the same bytes; gives the bytes needed.

    Pieces are laid behind each other as long as that fits in `roomy` bytes, so that the next one's writes need not
    wait for the last one's reads; the first fit beyond that.
    """
    pieces: dict[Scratch, None] = {}
    for number, node in enumerate(leaves(nodes)):
        for access in accesses(node):
            if isinstance(piece := access.where, Scratch):
                piece.first = number if piece.first < 0 else piece.first
                piece.last = number
                pieces[piece] = None
    for first, last in _loops(nodes, 0)[1]:  # what a loop finds written before it, it finds again next time
        for piece in pieces:
            if piece.first < first <= piece.last < last:
                piece.last = last
    top = cursor = 0
    placed: list[Scratch] = []
    for piece in pieces:
        alive = [p for p in placed if p.last >= piece.first]
        cursor = 0 if cursor + piece.nbytes > roomy else cursor
        candidates = [_aligned(x, piece.align) for x in (cursor, 0, *(p.offset + p.nbytes for p in alive))]
        for offset in candidates:
            if all(offset + piece.nbytes <= p.offset or p.offset + p.nbytes <= offset for p in alive):
                piece.offset = offset
                break
        cursor = _aligned(piece.offset + piece.nbytes)
        top = max(top, cursor)
        placed.append(piece)
    return top


def _loops(nodes: Sequence[Node], number: int) -> tuple[int, list[tuple[int, int]]]:
    """The number of the leaf behind the nodes, and those of the first and last leaf of each loop, inner loops first."""
    found: list[tuple[int, int]] = []
    for node in nodes:
        if not isinstance(node, Nest):
            number += 1
            continue
        start = number
        for part in (node.body, node.otherwise or []):
            number, inner = _loops(part, number)
            found += inner
        if node.loop:
            found.append((start, number - 1))
    return number, found


def _aligned(offset: int, to: int = 16) -> int:
    return (offset + to - 1) // to * to


# ---------------------------------------------------------------------------------------------------------- barriers

Pending = frozenset[Access]
Barrier = Callable[[set[str]], str]


def place_barriers(nodes: list[Node], barrier: Barrier) -> int:
    """Puts barriers into the tree, where two accesses conflict; gives their number."""
    return _walk(nodes, frozenset(), barrier)[1]


def _walk(nodes: list[Node], pending: Pending, barrier: Barrier | None) -> tuple[Pending, int]:
    """The accesses that no barrier has followed at the end. Without `barrier` nothing is inserted."""
    placed, index = 0, 0
    while index < len(nodes):
        node = nodes[index]
        if isinstance(node, Nest):
            if node.loop:
                while (after := pending | _walk(node.body, pending, None)[0]) != pending:
                    pending = after
            out, more = _walk(node.body, pending, barrier)
            placed += more
            if node.otherwise is not None:
                other, more = _walk(node.otherwise, pending, barrier)
                pending, placed = out | other, placed + more
            else:
                pending = pending | out
        else:
            mine = accesses(node)
            spaces = {a.space for a in mine for b in pending if a.conflicts(b)}
            if spaces:
                pending = frozenset(a for a in pending if a.space not in spaces)
                if barrier is not None:
                    nodes.insert(index, Statement([barrier(spaces)]))
                    index, placed = index + 1, placed + 1
            pending = pending | frozenset(mine)
            if isinstance(node, Statement) and node.clears:
                pending = frozenset()
        index += 1
    return pending, placed


# -------------------------------------------------------------------------------------------------------------- text


def render(nodes: Sequence[Node], unroll: str, indent: str = "    ", width: int = 88) -> list[str]:
    """Lines of source, the Python line behind the first of each run from it."""
    out: list[str] = []
    last: list[int | None] = [None]

    def add(text: str, pad: str, line: int | None) -> None:
        text = pad + text
        if line is not None and line != last[0]:
            text = f"{text:<{width}}  // line {line}"
            last[0] = line
        out.append(text)

    def body(nodes: Sequence[Node], pad: str) -> None:
        for node in nodes:
            if isinstance(node, Statement):
                for text in node.lines:
                    add(text, pad, node.line)
            elif isinstance(node, Each):
                step = "r++" if node.step == 1 else f"r += {node.step}"
                add(unroll, "", None)
                out.append(f"{pad}for (int r = 0; r < {node.count}; {step}) {{")
                for statement in node.statements:
                    for text in statement.lines:
                        add(text, pad + "    ", statement.line)
                out.append(pad + "}")
            else:
                add(node.head, pad, node.line)
                body(node.body, pad + "    ")
                if node.otherwise is not None:
                    out.append(pad + "} else {")
                    body(node.otherwise, pad + "    ")
                out.append(pad + node.tail)

    body(nodes, indent)
    return out

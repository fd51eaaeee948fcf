"""Makes a failing random program small: a tool for people, used by no test.

    from minimise import minimise
    small = minimise(program, run_target)     # run_target(function, grid, arguments), as interpreter.run
    print(small.function)

A program fails if the interpreter runs it and the target raises or gives something else. Each step removes an effect,
replaces a value by a constant, an operand of the same type or a zero-trip loop, and is kept if the result still fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from random_programs import Program

from nitinol.compiler import interpreter, ir, passes
from nitinol.language.types import DType, TileType

Run = Callable[[ir.Function, Sequence[int], list[Any]], Any]


def minimise(program: Program, run_target: Run, rounds: int = 10) -> Program:
    """A smaller program that fails as well; the program itself if it does not fail."""
    if not fails(program, run_target):
        return program
    for _ in range(rounds):
        before = sum(1 for _ in ir.walk(program.function.body))
        for change in (drop_effect, use_operand, use_constant, never_loop):
            number = 0
            while True:
                function = clone(program.function)
                if not change(function, number):
                    break
                passes.remove_dead(function)
                smaller = replace(program, function=function)
                if _valid(function) and fails(smaller, run_target):
                    program = smaller
                else:
                    number += 1
        if sum(1 for _ in ir.walk(program.function.body)) == before:
            break
    return program


def fails(program: Program, run_target: Run) -> bool:
    expected, actual = program.copies(), program.copies()
    try:
        interpreter.run(program.function, program.grid, expected)
    except IndexError:  # a change made an address wild
        return False
    try:
        run_target(program.function, program.grid, actual)
        program.compare(actual, expected)
    except Exception:
        return True
    return False


def clone(function: ir.Function) -> ir.Function:
    """A copy that shares nothing but the parameters."""
    values: dict[ir.Value, ir.Value] = {}

    def copy_value(value: ir.Value, op: ir.Op | None) -> ir.Value:
        values[value] = ir.Value(value.type, op, value.name)
        return values[value]

    def copy_block(block: ir.Block) -> ir.Block:
        result = ir.Block([copy_value(v, None) for v in block.arguments])
        for op in block.ops:
            new = ir.Op(op.kind, [values.get(v, v) for v in op.operands], [], dict(op.attributes), [], op.location)
            new.regions = [copy_block(region) for region in op.regions]
            new.results = [copy_value(v, new) for v in op.results]
            result.ops.append(new)
        return result

    return replace(function, body=copy_block(function.body))


def _valid(function: ir.Function) -> bool:
    try:
        ir.verify(function)
    except ir.VerifyError:
        return False
    return True


def _places(block: ir.Block) -> Iterator[tuple[ir.Block, int]]:
    """Block and position of every operation, last first."""
    for position in range(len(block.ops) - 1, -1, -1):
        yield block, position
        for region in block.ops[position].regions:
            yield from _places(region)


def _nth(function: ir.Function, number: int, wanted: Callable[[ir.Op], bool]) -> tuple[ir.Block, int, ir.Op] | None:
    for block, position in _places(function.body):
        if wanted(block.ops[position]):
            if number == 0:
                return block, position, block.ops[position]
            number -= 1
    return None


def _substitute(function: ir.Function, old: ir.Value, new: ir.Value) -> None:
    for op in ir.walk(function.body):
        op.operands = [new if v is old else v for v in op.operands]


def drop_effect(function: ir.Function, number: int) -> bool:
    found = _nth(function, number, lambda op: op.kind in ir.EFFECTS and not op.results)
    if found:
        del found[0].ops[found[1]]
    return found is not None


def use_operand(function: ir.Function, number: int) -> bool:
    def wanted(op: ir.Op) -> bool:
        return bool(op.results) and any(v.type == op.results[0].type for v in op.operands)

    found = _nth(function, number, wanted)
    if found:
        op = found[2]
        _substitute(function, op.results[0], next(v for v in op.operands if v.type == op.results[0].type))
    return found is not None


def use_constant(function: ir.Function, number: int) -> bool:
    """A one of the type, exact and in reach of every index that has room for it."""

    def wanted(op: ir.Op) -> bool:
        plain = bool(op.results) and isinstance(op.results[0].element, DType)
        return plain and ir.constant_of(op.results[0]) is None

    found = _nth(function, number, wanted)
    if found:
        block, position, op = found
        type = op.results[0].type
        element = op.results[0].element
        assert isinstance(element, DType)
        one: Any = 1.0 if element.is_float else True if element.kind == "bool" else 1
        new = [ir.create("constant", [], [element], op.location, value=one)]
        if isinstance(type, TileType):
            new.append(ir.create("splat", [new[0].result], [type], op.location))
        block.ops[position:position] = new
        _substitute(function, op.results[0], new[-1].result)
    return found is not None


def never_loop(function: ir.Function, number: int) -> bool:
    """The results of a loop are what it starts with."""
    found = _nth(function, number, lambda op: op.kind == "for" and bool(op.results))
    if found:
        for result, start in zip(found[2].results, found[2].operands[3:]):
            _substitute(function, result, start)
    return found is not None

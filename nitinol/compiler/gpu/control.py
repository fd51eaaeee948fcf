"""Loops and branches: carried tiles are variables that are assigned at the end of the body."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from nitinol.compiler.gpu import staging
from nitinol.compiler.gpu.forms import Form, Index, fixed, variable
from nitinol.compiler.gpu.layout import Layout, identity
from nitinol.compiler.gpu.reduction import Running, between_threads
from nitinol.compiler.gpu.sums import Threads, first_part, goes_on, sum_threads
from nitinol.compiler.gpu.tree import Nest
from nitinol.compiler.ir import Block, Op, Value

if TYPE_CHECKING:
    from nitinol.compiler.gpu.emit import Emitter


def carry(e: Emitter, variables: Sequence[Value], values: Sequence[Value], sums: dict[int, Threads]) -> list[Form]:
    """Declares the variables of a loop with their first values; `sums`: those whose parts lie in several threads."""
    forms = []
    for number, (argument, value) in enumerate(zip(variables, values)):
        layout = e.home(argument)
        form = e.form(value, layout)
        if number in sums and value not in e.parts:
            form = first_part(e, value, form, sums[number])
        base = argument.name or value.name or "carried"
        forms.append(e.store_in(e.name(base), argument.element, layout.count, form))
        e.forms[argument, layout] = forms[-1]
    return forms


def update(e: Emitter, variables: Sequence[Form], values: Sequence[Value], like: Sequence[Value]) -> None:
    """Assigns all variables at once: through new variables where one is read after its assignment."""
    layouts = [e.home(v) for v in like]
    forms = [e.form(v, layout) for v, layout in zip(values, layouts)]
    indices = [Index(identity(len(layout.registers))) for layout in layouts]
    own = [v.variable for v in variables]
    for i, (form, index) in enumerate(zip(forms, indices)):
        reads = form.names(index)
        early = {name for name, _ in reads} & set(own[:i])
        if early or any(name == own[i] and not plain for name, plain in reads):
            forms = [
                e.store_in(e.name(f"next_{name}"), value.element, layout.count, form)
                for name, value, layout, form in zip(own, like, layouts, forms)
            ]
            break
    for target, form, layout, index in zip(variables, forms, layouts, indices):
        if target.text(index) != form.text(index):
            lines = assignment(target, form)
            e.each(layout.count, lines, [form, target], defines=[target.variable])


def assignment(target: Form, form: Form) -> Callable[[Index], list[str]]:
    return lambda i: [f"{target.text(i)} = {form.text(i)};"]


def nested(e: Emitter, block: Block, loop: bool, work: Callable[[], None]) -> list[Any]:
    """The statements of a region."""
    outer, e.nodes = e.nodes, []
    e.loops += loop
    e.convert_results(block.arguments)
    work()
    e.loops -= loop
    inner, e.nodes = e.nodes, outer
    return inner


def for_loop(e: Emitter, op: Op) -> None:
    block = op.regions[0]
    counter, *carried = block.arguments
    lower, upper, step = (e.form(v).text(fixed(0)) for v in op.operands[:3])
    bound = e.form(op.operands[1])
    if not bound.simple:
        upper = e.store_in(e.name("end"), op.operands[1].element, 1, bound).text(fixed(0))
    loop_sums = e.spread_loops.get(op, {})
    sums = {number: sum_threads(e, made) for number, made in loop_sums.items()}
    variables = carry(e, carried, op.operands[3:], sums)
    name = e.name(counter.name or "i")
    e.forms[counter, e.assignment.scalar] = variable(name, 1)
    e.index[counter] = True
    location = e.location

    def work() -> None:
        e.run(block)
        update(e, variables, block.terminator.operands, carried)

    body = nested(e, block, True, work)
    advance = f"{name}++" if step == "1" else f"{name} += {step}"
    kind = e.type(counter.element)
    head = f"for ({kind} {name} = {lower}; {name} < {upper}; {advance}) {{"
    loop = Nest(head, body, "}", True, location.line if location else None)
    if "unfinished" in op.attributes:  # what waits for the products stands where there is no way round the loop
        outer, e.nodes = e.nodes, [loop]
        staging.finish(e, op, variables)
        outer.append(Nest(f"if ({lower} < {upper}) {{", e.nodes, "}", False, loop.line))
        e.nodes = outer
    else:
        e.nodes.append(loop)
        if "stages" in op.attributes:
            staging.finish(e, op, variables)
    for number, (result, form, argument) in enumerate(zip(op.results, variables, carried)):
        layout = e.home(argument)
        if number in sums:
            form, layout = loop_sum(e, loop_sums[number], result, form, layout, sums[number])
        e.forms[result, layout] = form


def loop_sum(
    e: Emitter, op: Op, result: Value, form: Form, layout: Layout, threads: Threads
) -> tuple[Form, Layout]:  # fmt: skip
    """The whole of a sum after its loop and its layout, or still its parts if another sum is all that wants it."""
    if goes_on(e, result):
        e.parts.add(result)
        return form, layout
    running = Running(e, op, [form], layout.count)
    layout = between_threads(e, op, running, result, threads)
    return running.forms[0], layout


def while_loop(e: Emitter, op: Op) -> None:
    before, after = op.regions
    variables = carry(e, before.arguments, op.operands, {})
    passed = []
    for argument, value in zip(after.arguments, op.results):
        layout = e.home(argument)
        form = e.declare(e.name(argument.name or value.name or "passed"), argument.element, layout.count)
        e.forms[argument, layout] = e.forms[value, layout] = form
        passed.append(form)
    location = e.location

    def work() -> None:
        e.run(before)
        go, *values = before.terminator.operands
        condition = e.form(go)
        if not condition.simple:
            condition = e.store_in(e.name("go"), go.element, 1, condition)
        update(e, passed, values, after.arguments)
        e.say(f"if (!{condition.operand(fixed(0))}) break;")
        e.convert_results(after.arguments)
        e.run(after)
        update(e, variables, after.terminator.operands, before.arguments)

    body = nested(e, before, True, work)
    e.nodes.append(Nest("while (true) {", body, "}", True, location.line if location else None))


def branch(e: Emitter, op: Op) -> None:
    condition = e.form(op.operands[0]).text(fixed(0))
    variables = []
    for result in op.results:
        layout = e.home(result)
        form = e.declare(e.name(result.name or "chosen"), result.element, layout.count)
        e.forms[result, layout] = form
        variables.append(form)
    location = e.location
    bodies = []
    for region in op.regions:

        def work(region: Block = region) -> None:
            e.run(region)
            update(e, variables, region.terminator.operands, op.results)

        bodies.append(nested(e, region, False, work))
    line = location.line if location else None
    if bodies[0] or bodies[1]:
        e.nodes.append(Nest(f"if ({condition}) {{", bodies[0], "}", False, line, bodies[1] or None))

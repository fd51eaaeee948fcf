"""Kernels: their arguments, whether their threads meet, and the function that runs one of them."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from softmetal.parse import SPACES, Chunk, Code, error, split

SYNCHRONISES = re.compile(
    r"^(simd_\w+|quad_\w+|simdgroup_(barrier|matrix|load|store|multiply\w*|make_\w+|\w+8x8)|threadgroup_barrier"
    r"|make_filled_simdgroup_matrix|make_diagonal_simdgroup_matrix|threadgroup)$"
)
POSITIONS = {
    "thread_position_in_grid": "sm_position{g->position[0] * d->size[0] + X, g->position[1] * d->size[1] + Y, "
    "g->position[2] * d->size[2] + Z}",
    "thread_position_in_threadgroup": "sm_position{X, Y, Z}",
    "thread_index_in_threadgroup": "sm_scalar_position{I}",
    "threadgroup_position_in_grid": "sm_position{g->position[0], g->position[1], g->position[2]}",
    "threadgroups_per_grid": "sm_position{d->groups[0], d->groups[1], d->groups[2]}",
    "threads_per_grid": "sm_position{d->threads[0], d->threads[1], d->threads[2]}",
    "threads_per_threadgroup": "sm_position{g->size[0], g->size[1], g->size[2]}",
    "dispatch_threads_per_threadgroup": "sm_position{d->size[0], d->size[1], d->size[2]}",
    "thread_index_in_simdgroup": "sm_scalar_position{I % 32}",
    "simdgroup_index_in_threadgroup": "sm_scalar_position{I / 32}",
    "simdgroups_per_threadgroup": "sm_scalar_position{(g->count + 31) / 32}",
    "dispatch_simdgroups_per_threadgroup": "sm_scalar_position{(d->size[0] * d->size[1] * d->size[2] + 31) / 32}",
    "threads_per_simdgroup": "sm_scalar_position{32}",
    "thread_execution_width": "sm_scalar_position{32}",
    "thread_index_in_quadgroup": "sm_scalar_position{I % 4}",
    "quadgroup_index_in_threadgroup": "sm_scalar_position{I / 4}",
    "quadgroups_per_threadgroup": "sm_scalar_position{(g->count + 3) / 4}",
    "dispatch_quadgroups_per_threadgroup": "sm_scalar_position{(d->size[0] * d->size[1] * d->size[2] + 3) / 4}",
    "grid_origin": "sm_position{0, 0, 0}",
    "grid_size": "sm_position{d->threads[0], d->threads[1], d->threads[2]}",
}


@dataclass
class Argument:
    """A parameter of a kernel. `kind`: buffer, threadgroup, position. `space`: device, constant, threadgroup."""

    kind: str
    index: int
    space: str
    name: str
    reference: bool = False
    attribute: str = ""
    optional: bool = False  # there only where a function constant says so


@dataclass
class Kernel:
    """An entry point: the name a host asks for, and what to call."""

    name: str
    call: str
    arguments: list[Argument]
    fibers: bool
    max_threads: int = 1024
    threadgroup_bytes: int = 0

    def json(self) -> dict[str, Any]:
        return asdict(self)


def arguments(code: Code, chunk: Chunk) -> list[Argument]:
    """What the parameters of a kernel are; a buffer without an index takes the first free one."""
    result: list[Argument] = []
    assert chunk.parameters
    for a, b in split(code, *chunk.parameters):
        line = code.t[a].line
        attributes: dict[str, str] = {}
        words: list[str] = []
        i = a
        while i < b:
            if code.plain[i] == "[" and code.plain[i + 1] == "[":
                for x, y in split(code, i + 2, code.match[i + 1]):
                    value = code.spell(x + 2, y - 1) if y - x > 2 else ""
                    attributes[code.plain[x]] = value
                i = code.match[i] + 1
                continue
            words.append(code.plain[i])
            i += 1
        if words == ["void"]:
            continue
        name = next((w for w in reversed(words) if w.isidentifier()), "")
        space = next((w for w in words if w in SPACES), "")
        by_address = "*" in words or "&" in words or words[-1] == "]"
        position = next((k for k in attributes if k in POSITIONS), "")
        if position:
            result.append(Argument("position", -1, "", name, attribute=position))
            continue
        if any(w.startswith(("texture", "depth", "sampler", "imageblock", "visible_function")) for w in words):
            raise error(line, f"the kernel's parameter '{name}' is a texture, sampler or function table, "
                        "which softmetal does not have; use buffers")  # fmt: skip
        if not by_address:
            raise error(line, f"the kernel's parameter '{name}' has no attribute that says where it comes from, "
                        "such as [[thread_position_in_grid]] or [[buffer(0)]]")  # fmt: skip
        if space not in ("device", "constant", "threadgroup"):
            raise error(line, f"the kernel's parameter '{name}' is a pointer or reference without an address space: "
                        "write device, constant or threadgroup")  # fmt: skip
        kind = "threadgroup" if space == "threadgroup" else "buffer"
        try:
            index = int(eval(attributes[kind], {"__builtins__": {}})) if kind in attributes else -1
        except Exception:
            raise error(line, f"the index of [[{kind}({attributes[kind]})]] is not a constant number") from None
        if index > 30:
            raise error(line, f"[[{kind}({index})]] of '{name}': a kernel has at most 31 of them, 0 to 30")
        result.append(Argument(kind, index, space, name, "&" in words, optional="function_constant" in attributes))
    for kind in ("buffer", "threadgroup"):
        used = {x.index for x in result if x.kind == kind}
        if len([x for x in result if x.kind == kind and x.index >= 0]) > len(used - {-1}):
            raise error(code.t[chunk.start].line, f"two parameters of '{chunk.name}' have the same {kind} index")
        for argument in result:
            if argument.kind == kind and argument.index < 0:
                argument.index = next(n for n in range(99) if n not in used)
                used.add(argument.index)
                if argument.index > 30:
                    raise error(code.t[chunk.start].line, f"'{chunk.name}' has more than 31 {kind} parameters")
    return result


def reaches_others(code: Code, all_chunks: list[Chunk], chunk: Chunk) -> bool:
    """Whether a kernel, or something whose name it mentions, meets other threads; if not, it is a plain loop."""
    by_name: dict[str, list[Chunk]] = {}
    for c in all_chunks:
        by_name.setdefault(c.name, []).append(c)
    seen, todo = {id(chunk)}, [chunk]
    while todo:
        c = todo.pop()
        start = c.parameters[0] if c.kernel and c.parameters else c.start
        for k in range(start, c.end):
            w = code.plain[k]
            if SYNCHRONISES.match(w):
                return True
            if code.t[k].kind == "word":
                for other in by_name.get(w, ()):
                    if id(other) not in seen:
                        seen.add(id(other))
                        todo.append(other)
    return False


def attribute_string(code: Code, c: Chunk, name: str) -> str:
    for k in range(c.start, c.end - 2):
        if code.plain[k] == name and code.plain[k + 1] == "(" and code.t[k + 2].kind == "string":
            parts = code.plain[k + 2 : code.match[k + 1]]
            return "".join(x[1:-1] for x in parts)
    return ""


def attribute_number(code: Code, c: Chunk, name: str) -> int:
    for k in range(c.start, c.body[0] if c.body else c.end):
        if code.plain[k] == name and code.plain[k + 1] == "(":
            try:
                return min(1024, int(eval(code.spell(k + 2, code.match[k + 1]), {"__builtins__": {}})))
            except Exception:
                return 1024
    return 1024


def entry(kernel: Kernel, number: int) -> str:
    """The function that the runtime calls for one thread (fibers) or for a whole threadgroup (plain loop)."""
    parts = []
    for a in kernel.arguments:
        if a.kind == "position":  # names that no kernel has
            parts.append(re.sub(r"\b[gdXYZI]\b", lambda m: f"sm_{m[0].lower()}", POSITIONS[a.attribute]))
        else:
            at = f"sm_d->buffers[{a.index}]" if a.kind == "buffer" else f"(ulong)sm_g->tg_dynamic[{a.index}]"
            parts.append(f"{'sm_reference' if a.reference else 'sm_pointer'}{{{at}}}")
    call = f"{kernel.call.replace('<NUMBER', f'<{number}')}({', '.join(parts)});"
    if kernel.fibers:
        return (
            f'extern "C" void sm_entry_{number}(sm_lane *sm_l, sm_group *sm_g) {{ sm_dispatch *sm_d = sm_g->dispatch; '
            f"uint sm_x = sm_l->tid[0], sm_y = sm_l->tid[1], sm_z = sm_l->tid[2], sm_i = sm_l->index; {call} }}\n"
        )
    return (
        f'extern "C" void sm_entry_{number}(sm_group *sm_g) {{ sm_dispatch *sm_d = sm_g->dispatch; uint sm_i = 0; '
        f"for (uint sm_z = 0; sm_z < sm_g->size[2]; sm_z++) for (uint sm_y = 0; sm_y < sm_g->size[1]; sm_y++) "
        f"for (uint sm_x = 0; sm_x < sm_g->size[0]; sm_x++, sm_i++) {call} }}\n"
    )

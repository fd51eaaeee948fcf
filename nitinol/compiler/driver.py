"""From a kernel and what it is specialised for to something that a device can run."""

from __future__ import annotations

import functools
from typing import Any

from nitinol.language.jit import JITFunction, Signature

_compiled: dict[tuple[Any, ...], Any] = {}


def tile_ir(kernel: JITFunction, signature: Signature) -> Any:
    """The kernel's tile IR after the passes that all targets share."""
    from nitinol.compiler.frontend import build_ir

    return prepare(build_ir(kernel, signature))


def prepare(function: Any) -> Any:
    """The passes that all targets share, in place."""
    from nitinol.compiler.byte_casts import sink_byte_casts
    from nitinol.compiler.induction import scalarise_induction
    from nitinol.compiler.passes import simplify

    simplify(function)
    scalarise_induction(function)
    sink_byte_casts(function)
    simplify(function)
    return function


def compile_kernel(
    kernel: JITFunction, signature: Signature, aliases: tuple[int, ...] = (), target: str = "cpu"
) -> Any:
    """The kernel's executable for a target ("cpu", "metal" or "cuda"): from memory, from disk, or compiled now.

    `aliases`: one number per run-time parameter; pointers with equal numbers may point into the same memory.
    """
    identity = kernel.cache_key  # not the kernel: one that is defined again, in a loop, is compiled once
    key = (identity, kernel.__name__, signature, aliases, target)
    found = _compiled.get(key)
    if found is None:
        source = functools.cache(lambda: _without_breakpoints(tile_ir(kernel, signature)))
        aliases = aliases or tuple(range(len(signature.parameters)))
        found = _compile(target, kernel.__name__, source, aliases, f"{identity}/{signature}", signature.warps,
                         signature.stages)
        _compiled[key] = found
    return found


def compile_function(function: Any, aliases: tuple[int, ...] = (), key: str = "", target: str = "cpu") -> Any:
    """The executable of a tile IR function; `key` names it in the cache on disk ("": not cached)."""
    aliases = aliases or tuple(range(len(function.parameters)))
    return _compile(target, function.name, lambda: function, aliases, key)


def _without_breakpoints(function: Any) -> Any:
    """What is compiled: stops, and what only they look at, are for the interpreter."""
    from nitinol.compiler.ir import walk
    from nitinol.compiler.passes import simplify

    if not any(op.kind == "breakpoint" for op in walk(function.body)):
        return function

    def clean(block: Any) -> None:
        block.ops = [op for op in block.ops if op.kind != "breakpoint"]
        for op in block.ops:
            for region in op.regions:
                clean(region)

    clean(function.body)
    simplify(function)
    return function


def _compile(
    target: str, name: str, source: Any, aliases: tuple[int, ...], key: str, warps: int = 0, stages: int = 0
) -> Any:
    if target == "cpu":
        from nitinol.compiler import cpu

        return cpu.compile_function(name, source, aliases, key)
    if target.partition(":")[0] in ("metal", "cuda"):
        from nitinol.compiler.gpu.target import compile_for

        return compile_for(target, name, source, aliases, key, warps, stages)
    raise ValueError(f"there is no target {target!r}; expected 'cpu', 'metal' or 'cuda'")

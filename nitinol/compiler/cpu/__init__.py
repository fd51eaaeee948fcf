"""The CPU target: tile IR to machine code of this machine's CPU by way of LLVM."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from nitinol.compiler import cache, ir
from nitinol.compiler.stores import stores

assertions: dict[int, str] = {}  # what a failed assertion of any loaded kernel leaves in the status word -> its message


@dataclass
class Executable:
    """Native code of one kernel: `address` of the function, `scratch_bytes` it needs per thread.

    The function's C type: void (const u64 *arguments, u8 *scratch, const i32 *grid, i64 first, i64 last); one 8-byte
    slot per parameter and one more with the address of the status word that failed assertions write their number to.
    """

    name: str
    address: int
    scratch_bytes: int
    aliases: tuple[int, ...]
    source: Callable[[], ir.Function] = field(repr=False)
    stores: frozenset[int] = frozenset()  # the positions of the parameters whose memory it writes
    may_not_end: bool = False  # whether it has a while loop

    @cached_property
    def asm(self) -> dict[str, str]:
        """What was made, as text: "ir" (tile IR), "llvm" (after LLVM's passes), "asm" (this CPU's assembly)."""
        from nitinol.compiler.cpu.target import assembly, optimise

        function = self.source()
        module = optimise(generate(function, self.aliases)[0])
        return {"ir": str(function), "llvm": str(module), "asm": assembly(module)}


def compile_function(
    name: str, source: Callable[[], ir.Function], aliases: tuple[int, ...], key: str = ""
) -> Executable:
    """Machine code for a kernel.

    `source` gives its tile IR; it is not asked if the machine code is in the cache on disk under `key`, which must
    identify the kernel and its specialisation ("": not cached). `aliases`: a number per parameter; pointer parameters
    with equal numbers may point into the same memory.
    """
    from nitinol.compiler.cpu.effects import assertion_number
    from nitinol.compiler.cpu.target import assemble, host_target, load_object, optimise

    stored, facts = None, dict[str, Any]()
    if key:
        identity = [key, aliases, host_target().key, cache.compiler_version()]
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        stored = cache.get(key)
    if stored is None:
        function = source()
        facts["stores"] = sorted(stores(function))
        facts["may_not_end"] = any(op.kind == "while" for op in ir.walk(function.body))
        text, facts["scratch_bytes"], facts["asserts"] = generate(function, aliases)
        code = assemble(optimise(text))
        if key:
            head = json.dumps(facts).encode()
            cache.put(key, len(head).to_bytes(4, "little") + head + code)
    else:
        size = int.from_bytes(stored[:4], "little")
        facts = json.loads(stored[4 : 4 + size])
        code = stored[4 + size :]
    assertions.update({assertion_number(message): message for message in facts["asserts"]})
    return Executable(name, load_object(code, "kernel"), facts["scratch_bytes"], aliases, source,
                      frozenset(facts["stores"]), facts["may_not_end"])


def generate(function: ir.Function, aliases: tuple[int, ...]) -> tuple[str, int, list[str]]:
    """LLVM IR text, scratch bytes per thread, messages of the kernel's assertions."""
    from nitinol.compiler.cpu.generator import Generator
    from nitinol.compiler.cpu.plan import Plan
    from nitinol.compiler.cpu.target import host_target

    generator = Generator(function, Plan(function, list(aliases)), host_target())
    text = str(generator.build())
    return text, generator.scratch_bytes, generator.asserts

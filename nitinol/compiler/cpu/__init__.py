"""The CPU target: tile IR to machine code of this machine's CPU by way of LLVM."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property

from nitinol import __version__
from nitinol.compiler import cache, ir


@dataclass
class Executable:
    """Native code of one kernel: `address` of the function, `scratch_bytes` it needs per thread.

    The function's C type: void (const u64 *arguments, u8 *scratch, const i32 *grid, i64 first, i64 last); one 8-byte
    slot per parameter and one more with the address of the status word that failed assertions write their number to.
    """

    name: str
    address: int
    scratch_bytes: int
    asserts: list[str]
    function: ir.Function = field(repr=False)
    aliases: tuple[int, ...] = ()

    @cached_property
    def asm(self) -> dict[str, str]:
        """What was made, as text: "ir" (tile IR), "llvm" (after LLVM's passes), "asm" (this CPU's assembly)."""
        from nitinol.compiler.cpu.target import assembly, optimise

        module = optimise(generate(self.function, self.aliases)[0])
        return {"ir": str(self.function), "llvm": str(module), "asm": assembly(module)}


def compile_function(function: ir.Function, aliases: tuple[int, ...] = (), key: str = "") -> Executable:
    """Machine code for a kernel.

    `aliases`: a number per parameter; pointer parameters with equal numbers may point into the same memory (the
    default: all differ). `key`: what identifies the kernel and its specialisation in the cache on disk; "" to keep
    nothing there.
    """
    from nitinol.compiler.cpu.target import assemble, host_target, load_object, optimise

    aliases = aliases or tuple(range(len(function.parameters)))
    stored = None
    if key:
        key = hashlib.sha256(json.dumps([key, aliases, host_target().key, _compiler_version()]).encode()).hexdigest()
        stored = cache.get(key)
    if stored is None:
        text, scratch_bytes, asserts = generate(function, aliases)
        code = assemble(optimise(text))
        if key:
            head = json.dumps({"scratch_bytes": scratch_bytes, "asserts": asserts}).encode()
            cache.put(key, len(head).to_bytes(4, "little") + head + code)
    else:
        size = int.from_bytes(stored[:4], "little")
        facts = json.loads(stored[4 : 4 + size])
        scratch_bytes, asserts, code = facts["scratch_bytes"], facts["asserts"], stored[4 + size :]
    return Executable(function.name, load_object(code, "kernel"), scratch_bytes, asserts, function, aliases)


def generate(function: ir.Function, aliases: tuple[int, ...]) -> tuple[str, int, list[str]]:
    """LLVM IR text, scratch bytes per thread, messages of the kernel's assertions."""
    from nitinol.compiler.cpu.generator import Generator
    from nitinol.compiler.cpu.plan import Plan
    from nitinol.compiler.cpu.target import host_target

    generator = Generator(function, Plan(function, list(aliases)), host_target())
    text = str(generator.build())
    return text, generator.scratch_bytes, generator.asserts


def _compiler_version() -> str:
    """Changes whenever the compiler's own source does."""
    global _version
    if not _version:
        from pathlib import Path

        digest = hashlib.sha256(__version__.encode())
        for path in sorted(Path(__file__).parent.glob("*.py")):
            digest.update(path.read_bytes())
        _version = digest.hexdigest()
    return _version


_version = ""

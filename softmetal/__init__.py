"""A software Metal device: on Linux, what a program that uses Metal through pyobjc sees on a Mac.

    import softmetal
    softmetal.install()          # from here on `import Metal` gives softmetal.metal
    import Metal
    device = Metal.MTLCreateSystemDefaultDevice()

Kernels in the Metal Shading Language are compiled by clang (`pip install ziglang`) and run on the CPU. With
`set_validation(True)` wrong kernels are caught, with `set_counting(True)` their memory traffic is measured."""

from __future__ import annotations

import sys

from softmetal.compile import CompilerMissing
from softmetal.modes import counters, reports, reset_counters, set_counting, set_seed, set_validation
from softmetal.objects import UsageError, limits

__all__ = [
    "CompilerMissing", "UsageError", "configure", "counters", "install", "reports", "reset_counters", "set_counting",
    "set_seed", "set_validation",
]  # fmt: skip


def install() -> None:
    """Makes `import Metal` give the software device. CompilerMissing if there is no ziglang."""
    from softmetal import compile, metal

    compile.zig()
    sys.modules["Metal"] = metal


def configure(
    *, working_set_bytes: int = 0, buffer_bytes: int = 0, family: int = 0, timeout_seconds: float = 0
) -> None:
    """Sets what the device says of itself: limits in bytes, the newest Apple GPU family; and after how many seconds
    a dispatch is ended (600). 0: the default."""
    limits.update(
        working_set_bytes=working_set_bytes, buffer_bytes=buffer_bytes, family=family, timeout_seconds=timeout_seconds
    )

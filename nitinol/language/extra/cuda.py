"""What Triton kernels say to NVIDIA GPUs alone; nothing elsewhere (CUDA programming guide, "Programmatic dependent
launch")."""

from __future__ import annotations

from nitinol.language.core import emit_many


def gdc_wait() -> None:
    """Here the kernel waits until those launched before it have ended. Without this it waits before it first touches
    memory. What is loaded earlier must not be what they write: where a command list has them write it, the kernel
    starts after they have ended."""
    emit_many("gdc_wait", (), ())


def gdc_launch_dependents() -> None:
    """Once all programs have come here or ended, the kernels after this one may start, and wait where they wait. A
    kernel without `gdc_wait` says it at its start."""
    emit_many("gdc_launch_dependents", (), ())

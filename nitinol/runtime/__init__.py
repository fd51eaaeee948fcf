"""Devices. The protocol is in device.py, the CPU driver in cpu.py; this module only says which device is meant."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nitinol.runtime.cpu import CpuDevice


@functools.cache
def default_device() -> CpuDevice:
    """The CPU with one worker a core, opened at first use: what runs when nobody names a device."""
    from nitinol.runtime.cpu import CpuDevice  # imports LLVM, which `import nitinol` should not pay for

    return CpuDevice()

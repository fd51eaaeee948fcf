"""Devices: the protocol is in device.py, the drivers in cpu.py, metal.py and cuda.py; here is said which is meant."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nitinol.runtime.device import Device, DeviceError

NAMES = ("cpu", "metal", "cuda")

_current: Device | None = None  # of all threads,


class _Local(threading.local):
    device: Device | None = None  # and what `using_device` makes of it in one


_local = _Local()


def open_device(name: str, threads: int | None = None) -> Any:
    """The device of that name ("cpu", "metal", "cuda"), opened at first use.

    threads: workers of the CPU, by default one a core. Raises DeviceError, in one sentence, where there is no such
    device or it cannot be used.
    """
    if name not in NAMES:
        raise DeviceError(f"there is no device {name!r:.40}; `nitinol devices` lists what there is: {', '.join(NAMES)}")
    if threads is None:
        return _opened(name)
    if name != "cpu":
        raise DeviceError(f"{threads} threads were asked for on device {name!r}; only the CPU has a number of threads")
    from nitinol.runtime.cpu import CpuDevice

    return CpuDevice(threads)


@functools.cache
def _opened(name: str) -> Any:
    if name == "metal":
        from nitinol.runtime.metal import MetalDevice

        return MetalDevice()
    if name == "cuda":
        from nitinol.runtime.cuda import CudaDevice

        return CudaDevice()
    from nitinol.runtime.cpu import CpuDevice  # imports LLVM, which `import nitinol` should not pay for

    return CpuDevice()


@functools.cache
def default_device() -> Any:
    """What runs when nobody names a device: on a Mac Metal, else CUDA where there is a GPU, else the CPU."""
    for name in ("metal",) * (sys.platform == "darwin") + ("cuda",):
        try:
            return open_device(name)
        except DeviceError:  # `nitinol devices` says why
            continue
    return open_device("cpu")


def set_device(device: Device | str | None) -> None:
    """Make arrays and run kernels on this device, or the one of this name, from now on (None: the default device), in
    all threads; inside `using_device` what that says counts."""
    global _current
    _current = open_device(device) if isinstance(device, str) else device


@contextmanager
def using_device(device: Device | str) -> Iterator[None]:
    """Inside, and in this thread, this device is the current one."""
    before = _local.device
    _local.device = open_device(device) if isinstance(device, str) else device
    try:
        yield
    finally:
        _local.device = before


def get_device() -> Any:
    """The device that arrays are made on and that kernels run on."""
    return _local.device or _current or default_device()

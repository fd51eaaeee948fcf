"""The module that stands in for pyobjc's `Metal`."""

from __future__ import annotations

import functools

from softmetal.archive import NSURL
from softmetal.device import Device
from softmetal.events import SharedEventListener as MTLSharedEventListener
from softmetal.objects import (
    CONSTANTS,
    MTLBinaryArchiveDescriptor,
    MTLCommandBufferDescriptor,
    MTLCommandQueueDescriptor,
    MTLCompileOptions,
    MTLComputePassDescriptor,
    MTLComputePipelineDescriptor,
    MTLFunctionConstantValues,
    MTLFunctionDescriptor,
    MTLHeapDescriptor,
    MTLIndirectCommandBufferDescriptor,
    MTLOrigin,
    MTLResidencySetDescriptor,
    MTLSize,
    MTLSizeMake,
    NSMakeRange,
    NSRange,
)

__all__ = [
    "NSURL", "MTLBinaryArchiveDescriptor", "MTLCommandBufferDescriptor", "MTLCommandQueueDescriptor",
    "MTLCompileOptions", "MTLComputePassDescriptor",
    "MTLComputePipelineDescriptor", "MTLCopyAllDevices", "MTLCreateSystemDefaultDevice", "MTLFunctionConstantValues",
    "MTLFunctionDescriptor", "MTLHeapDescriptor", "MTLIndirectCommandBufferDescriptor", "MTLOrigin",
    "MTLResidencySetDescriptor", "MTLSharedEventListener", "MTLSize", "MTLSizeMake", "NSMakeRange", "NSRange",
]  # fmt: skip

globals().update({f"MTL{name}": value for name, value in CONSTANTS.items()})


@functools.cache
def MTLCreateSystemDefaultDevice() -> Device:
    """The device; there is one."""
    return Device()


def MTLCopyAllDevices() -> tuple[Device, ...]:
    return (MTLCreateSystemDefaultDevice(),)

"""A device, and a way to run a kernel in a line."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ziglang", reason="softmetal needs clang: pip install ziglang")

import softmetal

softmetal.install()
Metal = sys.modules["Metal"]


class Runner:
    """A compiled library; `run` dispatches one kernel over NumPy arrays, which it changes in place."""

    def __init__(self, source: str, options: Any = None) -> None:
        self.device = Metal.MTLCreateSystemDefaultDevice()
        self.library, error = self.device.newLibraryWithSource_options_error_(source, options, None)
        assert self.library is not None, error.localizedDescription()
        self.queue = self.device.newCommandQueue()

    def pipeline(self, name: str, constants: Any = None) -> Any:
        if constants is None:
            function = self.library.newFunctionWithName_(name)
        else:
            function, error = self.library.newFunctionWithName_constantValues_error_(name, constants, None)
            assert function is not None, error
        assert function is not None, name
        pipeline, error = self.device.newComputePipelineStateWithFunction_error_(function, None)
        assert pipeline is not None, error.localizedDescription()
        return pipeline

    def run(self, name: str, arrays: list[Any], groups: Any = None, size: Any = 32, threads: Any = None,
            memory: Any = (), constants: Any = None, check: bool = True) -> Any:  # fmt: skip
        """Dispatches `groups` threadgroups, or `threads` threads, of `size`. Scalars and bytes go by setBytes."""
        commands = self.queue.commandBuffer()
        encoder = commands.computeCommandEncoder()
        encoder.setComputePipelineState_(self.pipeline(name, constants))
        buffers = []
        for i, a in enumerate(arrays):
            if isinstance(a, np.ndarray) and a.ndim:
                b = self.device.newBufferWithBytes_length_options_(a, a.nbytes, 0)
                encoder.setBuffer_offset_atIndex_(b, 0, i)
                buffers.append((a, b))
            else:
                data = a if isinstance(a, bytes) else np.asarray(a).tobytes()
                encoder.setBytes_length_atIndex_(data, len(data), i)
        for i, length in enumerate(memory):
            encoder.setThreadgroupMemoryLength_atIndex_(length, i)
        if threads is not None:
            encoder.dispatchThreads_threadsPerThreadgroup_(
                Metal.MTLSizeMake(*three(threads)), Metal.MTLSizeMake(*three(size))
            )
        else:
            encoder.dispatchThreadgroups_threadsPerThreadgroup_(
                Metal.MTLSizeMake(*three(groups)), Metal.MTLSizeMake(*three(size))
            )
        encoder.endEncoding()
        commands.commit()
        commands.waitUntilCompleted()
        for a, b in buffers:
            ctypes.memmove(a.ctypes.data, b.address, a.nbytes)
        if check:
            assert commands.status() == Metal.MTLCommandBufferStatusCompleted, commands.error().localizedDescription()
        return commands


def three(x: Any) -> tuple[int, int, int]:
    x = (x,) if isinstance(x, int) else tuple(x)
    return (*x, *(1,) * (3 - len(x)))

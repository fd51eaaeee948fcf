"""Runs tile IR functions as Metal source on the software Metal device, many kernels in one library."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ziglang", reason="softmetal needs clang: pip install ziglang")

import softmetal
from nitinol.compiler import ir
from nitinol.compiler.driver import prepare
from nitinol.compiler.gpu import LOG_BYTES, Executable, compile_function

softmetal.install()
Metal: Any = sys.modules["Metal"]


class Library:
    """Kernels compiled together; `run` launches one on NumPy arrays, which are changed in place."""

    def __init__(self, executables: Sequence[Executable]) -> None:
        self.device = Metal.MTLCreateSystemDefaultDevice()
        self.queue = self.device.newCommandQueue()
        text = join([e.source for e in executables])
        self.library, error = self.device.newLibraryWithSource_options_error_(text, None, None)
        if self.library is None:
            raise AssertionError(f"{error.localizedDescription()}")

    def run(self, executable: Executable, grid: tuple[int, int, int], values: Sequence[Any]) -> None:
        """Raises AssertionError with the message of an assertion of the kernel that fails."""
        function = self.library.newFunctionWithName_(executable.name)
        pipeline, error = self.device.newComputePipelineStateWithFunction_error_(function, None)
        assert pipeline is not None, error.localizedDescription()
        commands = self.queue.commandBuffer()
        encoder = commands.computeCommandEncoder()
        encoder.setComputePipelineState_(pipeline)
        buffers: dict[int, tuple[np.ndarray, Any, int]] = {}
        for number, index in enumerate(executable.pointers):
            array = values[index]
            if id(array) not in buffers:
                shift = array.ctypes.data % 64
                buffer = self.device.newBufferWithLength_options_(array.nbytes + shift, 0)
                ctypes.memmove(buffer.address + shift, array.ctypes.data, array.nbytes)
                buffers[id(array)] = (array, buffer, shift)
            encoder.setBuffer_offset_atIndex_(buffers[id(array)][1], buffers[id(array)][2], number)
        data = executable.arguments(values, grid)
        encoder.setBytes_length_atIndex_(data, len(data), len(executable.pointers))
        status = self.device.newBufferWithLength_options_(4, 0)
        if executable.asserts:
            ctypes.memset(status.address, 0, 4)
            encoder.setBuffer_offset_atIndex_(status, 0, len(executable.pointers) + 1)
        log = self.device.newBufferWithLength_options_(LOG_BYTES, 0)
        if executable.prints:
            ctypes.memset(log.address, 0, 4)
            encoder.setBuffer_offset_atIndex_(log, 0, len(executable.pointers) + 1 + bool(executable.asserts))
        encoder.dispatchThreadgroups_threadsPerThreadgroup_(
            Metal.MTLSizeMake(*grid), Metal.MTLSizeMake(executable.threads, 1, 1)
        )
        encoder.endEncoding()
        commands.commit()
        commands.waitUntilCompleted()
        if commands.status() != Metal.MTLCommandBufferStatusCompleted:
            raise AssertionError(f"{commands.error().localizedDescription()}\n{executable.source}")
        for array, buffer, shift in buffers.values():
            ctypes.memmove(array.ctypes.data, buffer.address + shift, array.nbytes)
        if executable.prints:
            print(*executable.printed(ctypes.string_at(log.address, LOG_BYTES)), sep="\n")
        failed = ctypes.c_uint32.from_address(status.address).value
        if executable.asserts and failed:
            raise AssertionError(executable.asserts[failed])


def join(sources: Sequence[str]) -> str:
    """Kernels in one text: what they share (the header, helper functions) stands in it once."""
    seen: set[str] = set()
    parts = []
    for source in sources:
        head, kernel = re.split(r"(?=^struct )", source, maxsplit=1, flags=re.M)
        for block in head.split("\n\n"):
            if block.strip() and block not in seen:
                seen.add(block)
                parts.append(block)
        parts.append(kernel)
    return "\n\n".join(parts)


def executable(
    function: ir.Function, name: str, simdgroups: int = 4, aliases: tuple[int, ...] = ()
) -> Executable:
    return compile_function(prepare(function), aliases, simdgroups, name=name)

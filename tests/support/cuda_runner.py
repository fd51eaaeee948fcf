"""Runs tile IR functions as CUDA source on an NVIDIA GPU; `compile_source` needs only NVRTC, no GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from nitinol.compiler import ir
from nitinol.compiler.driver import prepare, tile_ir
from nitinol.compiler.gpu import LOG_BYTES, Executable, compile_function, cuda
from nitinol.language.jit import specialise

driver = pytest.importorskip("cuda.bindings.driver", reason="CUDA needs its bindings: pip install cuda-bindings")
nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="CUDA needs its bindings: pip install cuda-bindings")


def checked(result: tuple[Any, ...]) -> Any:
    """The results of a call of the bindings; AssertionError with the name of an error."""
    error, *values = result
    assert int(error) == 0, str(error)
    return values[0] if len(values) == 1 else values


def compiler_missing() -> str:
    """Why NVRTC cannot be used, "" if it can."""
    try:
        checked(nvrtc.nvrtcVersion())
    except Exception as problem:  # the bindings raise various kinds if the library is not there
        return f"NVRTC is not installed: {problem}"
    return ""


def gpu_missing() -> str:
    """Why there is no GPU, "" if there is one."""
    if problem := compiler_missing():
        return problem
    try:
        checked(driver.cuInit(0))
        return "" if checked(driver.cuDeviceGetCount()) else "there is no NVIDIA GPU"
    except Exception as problem:
        return f"there is no NVIDIA GPU: {problem}"


def compile_source(executable: Executable, architecture: str = "sm_90a", words: list[str] | None = None) -> bytes:
    """Machine code of a kernel, or PTX for "compute_90a"; AssertionError with the compiler's words and the source.
    `words` takes them too."""
    program = checked(nvrtc.nvrtcCreateProgram(executable.source.encode(), b"kernel.cu", 0, [], []))
    options = [f"--gpu-architecture={architecture}".encode(), *(o.encode() for o in executable.options)]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    log = bytearray(checked(nvrtc.nvrtcGetProgramLogSize(program)))  # a bytes object of one byte is Python's own b" "
    checked(nvrtc.nvrtcGetProgramLog(program, log))
    if words is not None:
        words.append(log.decode())
    assert int(error) == 0, f"{log.decode()}\n{executable.source}"
    kind = "PTX" if architecture.startswith("compute") else "CUBIN"
    code = bytearray(checked(getattr(nvrtc, f"nvrtcGet{kind}Size")(program)))
    checked(getattr(nvrtc, f"nvrtcGet{kind}")(program, code))
    checked(nvrtc.nvrtcDestroyProgram(program))
    return bytes(code)


class Device:
    """The first GPU; `run` launches a kernel on NumPy arrays, which are changed in place."""

    def __init__(self) -> None:
        checked(driver.cuInit(0))
        self.device = checked(driver.cuDeviceGet(0))
        self.context = checked(driver.cuDevicePrimaryCtxRetain(self.device))
        checked(driver.cuCtxSetCurrent(self.context))
        major, minor = (
            checked(driver.cuDeviceGetAttribute(getattr(driver.CUdevice_attribute, f"{name}"), self.device))
            for name in (
                "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR",
                "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR",
            )
        )
        self.architecture = f"sm_{major}{minor}" + "a" * (major >= 9)
        self.functions: dict[int, Any] = {}

    def function(self, executable: Executable) -> Any:
        if id(executable) not in self.functions:
            module = checked(driver.cuModuleLoadData(compile_source(executable, self.architecture)))
            function = checked(driver.cuModuleGetFunction(module, executable.name.encode()))
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            checked(driver.cuFuncSetAttribute(function, attribute, executable.threadgroup_bytes))
            self.functions[id(executable)] = (function, module, executable)
        return self.functions[id(executable)][0]

    def launch(
        self, executable: Executable, grid: Sequence[int], addresses: Sequence[int], values: Sequence[Any]
    ) -> None:
        """Without waiting: `addresses` of all buffers, status and log included; `values` for the scalars."""
        data = executable.arguments(values, grid)
        count = len(executable.pointers)
        parts = [ctypes.c_uint64(a) for a in addresses[:count]]
        parts += [(ctypes.c_uint64 * (len(data) // 8 + 1)).from_buffer_copy(data + bytes(16 - len(data) % 8))]
        parts += [ctypes.c_uint64(a) for a in addresses[count:]]
        pointers = (ctypes.c_void_p * len(parts))(*(ctypes.addressof(part) for part in parts))
        function, threads = self.function(executable), executable.threads
        shared = executable.threadgroup_bytes
        checked(driver.cuLaunchKernel(function, *grid, threads, 1, 1, shared, 0, ctypes.addressof(pointers), 0))

    def run(self, executable: Executable, grid: Sequence[int], values: Sequence[Any]) -> None:
        """Raises AssertionError with the message of an assertion of the kernel that fails."""
        buffers: dict[int, tuple[np.ndarray, int, int]] = {}
        addresses = []
        for index in executable.pointers:
            array = values[index]
            if id(array) not in buffers:
                shift = array.ctypes.data % 64
                memory = checked(driver.cuMemAlloc(array.nbytes + 256))
                checked(driver.cuMemcpyHtoD(int(memory) + shift, array.ctypes.data, array.nbytes))
                buffers[id(array)] = (array, memory, shift)
            addresses.append(int(buffers[id(array)][1]) + buffers[id(array)][2])
        sizes = [4] * bool(executable.asserts) + [LOG_BYTES] * bool(executable.prints)
        extra = [checked(driver.cuMemAlloc(nbytes)) for nbytes in sizes]
        for memory in extra:
            checked(driver.cuMemsetD8(memory, 0, 4))
        self.launch(executable, grid, [*addresses, *(int(m) for m in extra)], values)
        try:
            checked(driver.cuCtxSynchronize())
        except AssertionError as problem:
            raise AssertionError(f"{problem}\n{executable.source}") from None
        for array, memory, shift in buffers.values():
            checked(driver.cuMemcpyDtoH(array.ctypes.data, int(memory) + shift, array.nbytes))
            checked(driver.cuMemFree(memory))
        told = []
        for memory, nbytes in zip(extra, sizes):
            told.append(np.empty(nbytes, np.uint8))
            checked(driver.cuMemcpyDtoH(told[-1].ctypes.data, memory, nbytes))
            checked(driver.cuMemFree(memory))
        if executable.prints:
            print(*executable.printed(told[-1].tobytes()), sep="\n")
        if executable.asserts and (failed := int(told[0].view(np.uint32)[0])):
            raise AssertionError(executable.asserts[failed])


def executable(function: ir.Function, name: str, warps: int = 4, aliases: tuple[int, ...] = ()) -> Executable:
    return compile_function(prepare(function), aliases, warps, cuda, name)


def compiled(
    kernel: Any, name: str = "", warps: int = 4, dialect: ModuleType = cuda, stages: int = 0, **arguments: Any
) -> tuple[Executable, list[Any]]:
    """The kernel's executable for these arguments, and the values of its run-time parameters."""
    bound = kernel.bind((), arguments)
    signature, _ = specialise(kernel, bound)
    made = compile_function(tile_ir(kernel, signature), (), warps, dialect, name, stages)
    return made, [bound[parameter] for parameter, _, _ in signature.parameters]

"""Calls to NVIDIA's driver and compiler (`cuda-bindings`): finding a GPU, compiling for it, memory that frees itself.

Whatever is missing on the way (package, driver, GPU, compiler) is a DeviceError that says what to install.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from nitinol.compiler import cache
from nitinol.runtime.device import DeviceError

if TYPE_CHECKING:
    from nitinol.runtime.cuda import CudaDevice

OLDEST_DRIVER = 12000  # CUDA 12.0, driver 525
OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
OLDEST_CAPABILITY = (8, 0)  # Ampere: bf16 matrix instructions, asynchronous copies to shared memory


class CudaError(DeviceError):
    """An answer of the CUDA driver other than success; `code` is its number."""

    def __init__(self, function: Callable[..., Any], status: Any, what: str = ""):
        self.function, self.status, self.code = function, status, int(status)
        hint = "; use a smaller model, context or batch" if self.code == OUT_OF_MEMORY else ""
        super().__init__(f"the CUDA driver answered {status.name} to {function.__name__}{what and f' of {what}'}{hint}")


def bindings() -> tuple[Any, Any]:
    """The modules of cuda-bindings for the driver and for NVRTC."""
    try:
        from cuda.bindings import driver, nvrtc
    except ImportError:
        raise DeviceError("device 'cuda' needs the package cuda-bindings, which is not installed; "
                          "pip install 'nitinol[cuda]'") from None
    return driver, nvrtc


def call(function: Callable[..., Any], *arguments: Any, what: str = "") -> Any:
    """What a function of the driver API or of NVRTC returns besides success; raises CudaError. what: it is about."""
    try:
        status, *results = function(*arguments)
    except DeviceError:
        raise
    except RuntimeError:  # what cuda-bindings raises if the library that it has loaded is older than itself
        raise DeviceError(f"the NVIDIA driver has no function {function.__name__}; install a newer driver") from None
    if status:
        raise CudaError(function, status, what)
    return results[0] if len(results) == 1 else tuple(results)


def find_gpu(cu: Any, index: int) -> Any:
    """The handle of GPU number `index` among those that CUDA_VISIBLE_DEVICES lets through."""
    try:
        version = call(cu.cuDriverGetVersion)
        status = cu.cuInit(0)[0]
    except CudaError:
        raise
    except RuntimeError:
        raise DeviceError("no NVIDIA driver is installed here (its library libcuda was not found); install NVIDIA's "
                          "driver, or use device 'cpu'") from None
    if version < OLDEST_DRIVER:
        raise DeviceError(f"the NVIDIA driver is of CUDA {_dotted(version)}, but at least {_dotted(OLDEST_DRIVER)} is "
                          "needed; install a newer driver")
    if status and status != cu.CUresult.CUDA_ERROR_NO_DEVICE:
        raise DeviceError(f"the NVIDIA driver does not start ({status.name}); see whether nvidia-smi runs, and "
                          "restart the machine if the driver was just updated")
    count = 0 if status else call(cu.cuDeviceGetCount)
    if not 0 <= index < count:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        visible = "" if hidden is None else f" (CUDA_VISIBLE_DEVICES is {hidden!r})"
        what = f"no GPU number {index}, there are {count}" if count else "no GPU"
        raise DeviceError(f"the NVIDIA driver finds {what}{visible}; see what nvidia-smi lists, or use device 'cpu'")
    return call(cu.cuDeviceGet, index)


def architecture(cu: Any, nvrtc: Any, name: str, capability: tuple[int, int]) -> str:
    """What NVRTC calls a GPU: from Hopper on, with the instructions that only this generation has ("sm_90a")."""
    dotted = ".".join(map(str, capability))
    if capability < OLDEST_CAPABILITY:
        raise DeviceError(f"{name} has compute capability {dotted}, but at least {OLDEST_CAPABILITY[0]}."
                          f"{OLDEST_CAPABILITY[1]} (Ampere, 2020) is needed; use device 'cpu'")
    try:
        major, minor = call(nvrtc.nvrtcVersion)
        known = call(nvrtc.nvrtcGetSupportedArchs)
    except CudaError:
        raise
    except RuntimeError:
        raise DeviceError("NVIDIA's compiler NVRTC is not installed; pip install 'nitinol[cuda]'") from None
    version = call(cu.cuDriverGetVersion)
    if major > version // 1000:
        raise DeviceError(f"NVRTC {major}.{minor} makes code that the driver of CUDA {_dotted(version)} does not load; "
                          f"install a newer driver, or pip install nvidia-cuda-nvrtc-cu{version // 1000}")
    number = 10 * capability[0] + capability[1]
    if number not in known:
        raise DeviceError(f"NVRTC {major}.{minor} does not know {name} (compute capability {dotted}); "
                          "pip install --upgrade 'nitinol[cuda]'")
    return f"sm_{number}" + ("a" if number >= 90 else "")


def compile_cubin(name: str, source: str, architecture: str, options: tuple[str, ...] = ()) -> bytes:
    """Machine code of the CUDA C++ source of a kernel, from the cache on disk or from NVRTC."""
    nvrtc = bindings()[1]
    version = ".".join(map(str, call(nvrtc.nvrtcVersion)))
    options = (f"--gpu-architecture={architecture}", "--generate-line-info", *options)
    key = "\n".join(["cubin", version, *options, source])
    if (found := cache.get(key)) is not None:
        return found
    program = call(nvrtc.nvrtcCreateProgram, source.encode(), f"{name}.cu".encode(), 0, [], [])
    try:
        if nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])[0]:
            log = bytearray(call(nvrtc.nvrtcGetProgramLogSize, program))
            call(nvrtc.nvrtcGetProgramLog, program, log)
            problem = next((line for line in log.decode(errors="replace").splitlines() if "error" in line), "no reason")
            raise DeviceError(f"NVRTC {version} does not compile kernel {name!r} for {architecture} ({problem}); this "
                              "is a mistake of Nitinol's, please report it with the kernel")
        cubin = bytearray(call(nvrtc.nvrtcGetCUBINSize, program))
        call(nvrtc.nvrtcGetCUBIN, program, cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    cache.put(key, bytes(cubin))
    return bytes(cubin)


class _Held:
    """What a function of the driver gives back with the last reference to it, if there still is a context."""

    device: CudaDevice
    address = 0  # of nothing yet
    give_back = ""

    def __del__(self) -> None:
        if self.address and self.device.usable:
            self.device.cu.cuCtxSetCurrent(self.device.context)
            getattr(self.device.cu, self.give_back)(self.address)


class Allocation(_Held):
    """Device memory."""

    give_back = "cuMemFree"  # first waits for what uses it

    def __init__(self, device: CudaDevice, nbytes: int):
        self.device, self.nbytes = device, nbytes
        self.address = int(device.call(device.cu.cuMemAlloc, nbytes))
        device.counters.allocations += 1


class Pinned(_Held):
    """Host memory that the GPU sees at the same address; `bytes` is the host's view."""

    give_back = "cuMemFreeHost"

    def __init__(self, device: CudaDevice, nbytes: int):
        self.device = device
        flags = int(device.cu.CU_MEMHOSTALLOC_PORTABLE) | int(device.cu.CU_MEMHOSTALLOC_DEVICEMAP)
        try:
            self.address = int(device.call(device.cu.cuMemHostAlloc, nbytes, flags))
        except CudaError as error:
            raise DeviceError(f"{nbytes / 1e6:.1f} MB of the host's memory cannot be pinned for the GPU "
                              f"({error.status.name}); close other programs, or allow more memory") from None
        self.bytes = np.frombuffer((ctypes.c_uint8 * nbytes).from_address(self.address), np.uint8)


class Registered(_Held):
    """Memory that the host has already (uint8, contiguous), pinned so that the GPU's copy engines can use it. CudaError
    where that cannot be done."""

    give_back = "cuMemHostUnregister"

    def __init__(self, device: CudaDevice, memory: np.ndarray):
        self.device, self.bytes = device, memory
        device.call(device.cu.cuMemHostRegister, memory.ctypes.data, memory.nbytes, 0)
        self.address = memory.ctypes.data


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"

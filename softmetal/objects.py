"""What all Metal objects share: structs, errors, descriptors, constants."""

from __future__ import annotations

import collections
import math
import os
from typing import Any


class UsageError(ValueError):
    """The program used the interface wrongly, where Metal on a Mac would stop it with a failed assertion."""


MTLSize = collections.namedtuple("MTLSize", "width height depth")
MTLOrigin = collections.namedtuple("MTLOrigin", "x y z")
NSRange = collections.namedtuple("NSRange", "location length")
MTLSizeAndAlign = collections.namedtuple("MTLSizeAndAlign", "size align")


def MTLSizeMake(width: int, height: int, depth: int) -> MTLSize:
    return MTLSize(width, height, depth)


def NSMakeRange(location: int, length: int) -> NSRange:
    return NSRange(location, length)


def size3(value: Any, what: str) -> tuple[int, int, int]:
    """An MTLSize, or a tuple of three numbers as pyobjc takes it, each at least 1."""
    size = tuple(int(x) for x in value)
    if len(size) != 3 or min(size) < 1:
        raise UsageError(f"{what} is {size}; it needs three numbers, each at least 1")
    return size


class NSError:
    """An error as pyobjc hands it out: `localizedDescription()`, `code()`, `domain()`."""

    def __init__(self, domain: str, code: int, text: str) -> None:
        self._domain, self._code, self._text = domain, code, text

    def localizedDescription(self) -> str:
        return self._text

    def code(self) -> int:
        return self._code

    def domain(self) -> str:
        return self._domain

    def userInfo(self) -> dict[str, str]:
        return {"NSLocalizedDescription": self._text}

    def __repr__(self) -> str:
        return f"Error Domain={self._domain} Code={self._code} {self._text!r}"


class Named:
    """An object with a label, given when it was made, and a device."""

    _label: str | None = None
    _device: Any = None

    def label(self) -> str | None:
        return self._label

    def device(self) -> Any:
        return self._device


class Labelled(Named):
    def setLabel_(self, text: str | None) -> None:
        self._label = text


class Descriptor:
    """A class of plain properties: `x()` and `setX_(value)` for each of its `_defaults`."""

    _defaults: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self) -> None:
        self._values = dict(self._defaults)

    @classmethod
    def alloc(cls) -> Any:
        return cls()

    @classmethod
    def new(cls) -> Any:
        return cls()

    def init(self) -> Any:
        return self

    def __init_subclass__(cls) -> None:
        for name in cls._defaults:
            setattr(cls, name, getter(name))
            setattr(cls, f"set{name[0].upper()}{name[1:]}_", setter(name))


def getter(name: str) -> Any:
    return lambda self: self._values[name]


def setter(name: str) -> Any:
    return lambda self, value: self._values.__setitem__(name, value)


class MTLCompileOptions(Descriptor):
    _defaults = {  # noqa: RUF012
        "preprocessorMacros": None, "fastMathEnabled": True, "mathMode": 2, "mathFloatingPointFunctions": 0,
        "languageVersion": 0x30002, "libraryType": 0, "installName": None, "libraries": None,
        "preserveInvariance": False, "optimizationLevel": 0, "maxTotalThreadsPerThreadgroup": 0, "enableLogging": False,
    }  # fmt: skip


class MTLComputePipelineDescriptor(Descriptor):
    _defaults = {  # noqa: RUF012
        "label": None, "computeFunction": None, "threadGroupSizeIsMultipleOfThreadExecutionWidth": False,
        "maxTotalThreadsPerThreadgroup": 0, "supportIndirectCommandBuffers": False, "binaryArchives": None,
        "shaderValidation": 0,
    }  # fmt: skip


class MTLBinaryArchiveDescriptor(Descriptor):
    _defaults = {"url": None}  # noqa: RUF012


class MTLIndirectCommandBufferDescriptor(Descriptor):
    _defaults = {  # noqa: RUF012
        "commandTypes": 0, "inheritPipelineState": False, "inheritBuffers": False, "maxKernelBufferBindCount": 0,
        "maxKernelThreadgroupMemoryBindCount": 0, "maxVertexBufferBindCount": 0, "maxFragmentBufferBindCount": 0,
    }  # fmt: skip


class MTLResidencySetDescriptor(Descriptor):
    _defaults = {"label": None, "initialCapacity": 0}  # noqa: RUF012


class MTLCommandBufferDescriptor(Descriptor):
    _defaults = {"retainedReferences": True, "errorOptions": 0, "logState": None}  # noqa: RUF012


class MTLCommandQueueDescriptor(Descriptor):
    _defaults = {"maxCommandBufferCount": 64, "logState": None}  # noqa: RUF012


class MTLComputePassDescriptor(Descriptor):
    _defaults = {"dispatchType": 0}  # noqa: RUF012

    @classmethod
    def computePassDescriptor(cls) -> MTLComputePassDescriptor:
        return cls()


class MTLHeapDescriptor(Descriptor):
    _defaults = {  # noqa: RUF012
        "size": 0, "storageMode": 2, "cpuCacheMode": 0, "hazardTrackingMode": 0, "resourceOptions": 0, "type": 0,
    }  # fmt: skip


class MTLFunctionDescriptor(Descriptor):
    _defaults = {"name": None, "specializedName": None, "constantValues": None, "options": 0}  # noqa: RUF012

    @classmethod
    def functionDescriptor(cls) -> MTLFunctionDescriptor:
        return cls()


class MTLFunctionConstantValues(Descriptor):
    """Values of function constants: a buffer with the value's bytes, or a plain number."""

    def __init__(self) -> None:
        super().__init__()
        self._given: dict[int | str, str] = {}

    def setConstantValue_type_atIndex_(self, value: Any, type: int, index: int) -> None:
        self._given[int(index)] = literal(value, type)

    def setConstantValue_type_withName_(self, value: Any, type: int, name: str) -> None:
        self._given[str(name)] = literal(value, type)

    def setConstantValues_type_withRange_(self, values: Any, type: int, range: Any) -> None:
        _, _, size, _ = data_type(type)
        start, count = (int(x) for x in range)
        data = memoryview(values).cast("B") if not isinstance(values, list | tuple) else values
        for i in builtins_range(count):
            part = data[i] if isinstance(data, list | tuple) else data[i * size : (i + 1) * size]
            self._given[start + i] = literal(part, type)

    def reset(self) -> None:
        self._given.clear()


builtins_range = range

# MTLDataType of a scalar: Metal's name, struct format, bytes; vectors of 2, 3, 4 follow it.
SCALAR_TYPES = {
    3: ("float", "f", 4), 16: ("half", "e", 2), 29: ("int", "i", 4), 33: ("uint", "I", 4), 37: ("short", "h", 2),
    41: ("ushort", "H", 2), 45: ("char", "b", 1), 49: ("uchar", "B", 1), 53: ("bool", "?", 1), 81: ("long", "q", 8),
    85: ("ulong", "Q", 8), 121: ("bfloat", "", 2),
}  # fmt: skip


def data_type(code: int) -> tuple[str, str, int, int]:
    """Name, struct format, bytes in memory and element count of an MTLDataType."""
    for first, (name, form, size) in SCALAR_TYPES.items():
        if first <= code < first + 4:
            n = code - first + 1
            return name, form, size * (4 if n == 3 else n), n
    raise UsageError(f"a function constant of MTLDataType {code}; scalars and vectors are possible")


def literal(value: Any, code: int) -> str:
    """A function constant as source text."""
    import struct

    name, form, _, n = data_type(code)
    if isinstance(value, bool | int | float):
        values = [value] * n
    elif isinstance(value, list | tuple):
        values = list(value)[:n]
    else:
        data = bytes(memoryview(value).cast("B"))
        if name == "bfloat":
            values = [struct.unpack("f", b"\0\0" + data[2 * i : 2 * i + 2])[0] for i in range(n)]
        else:
            values = list(struct.unpack_from(f"{n}{form}", data))
    texts = [number(v, name) for v in values]
    return texts[0] if n == 1 else f"{name}{n}{{{', '.join(texts)}}}"


def number(value: Any, name: str) -> str:
    if name == "bool":
        return "true" if value else "false"
    if name in ("float", "half", "bfloat"):
        v = float(value)
        if math.isnan(v) or math.isinf(v):
            return f"({name})NAN" if math.isnan(v) else f"({name})({'-' if v < 0 else ''}INFINITY)"
        return f"({name}){v.hex()}f" if v >= 0 else f"({name})(-{abs(v).hex()}f)"
    v = int(value)
    if name in ("long", "ulong"):
        return f"{v}ul" if name == "ulong" else f"(long){v & (1 << 64) - 1}ul"
    return f"({name}){v}u" if v >= 0 else f"({name})({v})"


limits: dict[str, float] = {}


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# Values of the enumerations of the framework, by name without the prefix MTL.
CONSTANTS = {
    "ResourceCPUCacheModeDefaultCache": 0, "ResourceCPUCacheModeWriteCombined": 1,
    "ResourceHazardTrackingModeDefault": 0, "ResourceHazardTrackingModeTracked": 512,
    "ResourceHazardTrackingModeUntracked": 256, "ResourceStorageModeShared": 0, "ResourceStorageModeManaged": 16,
    "ResourceStorageModePrivate": 32, "ResourceStorageModeMemoryless": 48, "StorageModeShared": 0,
    "StorageModeManaged": 1, "StorageModePrivate": 2, "StorageModeMemoryless": 3, "CPUCacheModeDefaultCache": 0,
    "CPUCacheModeWriteCombined": 1, "HazardTrackingModeDefault": 0, "HazardTrackingModeUntracked": 1,
    "HazardTrackingModeTracked": 2, "DispatchTypeSerial": 0, "DispatchTypeConcurrent": 1, "BarrierScopeBuffers": 1,
    "BarrierScopeTextures": 2, "ResourceUsageRead": 1, "ResourceUsageWrite": 2, "ResourceUsageSample": 4,
    "CommandBufferStatusNotEnqueued": 0, "CommandBufferStatusEnqueued": 1, "CommandBufferStatusCommitted": 2,
    "CommandBufferStatusScheduled": 3, "CommandBufferStatusCompleted": 4, "CommandBufferStatusError": 5,
    "CommandBufferErrorNone": 0, "CommandBufferErrorInternal": 1, "CommandBufferErrorTimeout": 2,
    "CommandBufferErrorPageFault": 3, "CommandBufferErrorOutOfMemory": 8, "CommandBufferErrorInvalidResource": 9,
    "CommandBufferErrorOptionNone": 0, "CommandBufferErrorOptionEncoderExecutionStatus": 1,
    "LanguageVersion2_4": 0x20004, "LanguageVersion3_0": 0x30000, "LanguageVersion3_1": 0x30001,
    "LanguageVersion3_2": 0x30002, "LanguageVersion4_0": 0x40000, "MathModeSafe": 0, "MathModeRelaxed": 1,
    "MathModeFast": 2, "MathFloatingPointFunctionsFast": 0, "MathFloatingPointFunctionsPrecise": 1,
    "PipelineOptionNone": 0, "PipelineOptionBindingInfo": 1, "PipelineOptionBufferTypeInfo": 2,
    "PipelineOptionFailOnBinaryArchiveMiss": 4, "BinaryArchiveErrorNone": 0, "BinaryArchiveErrorInvalidFile": 1,
    "BinaryArchiveErrorUnexpectedElement": 2, "BinaryArchiveErrorCompilationFailure": 3,
    "BinaryArchiveErrorInternalError": 4,
    "LibraryErrorUnsupported": 1, "LibraryErrorInternal": 2, "LibraryErrorCompileFailure": 3,
    "LibraryErrorFunctionNotFound": 5, "FunctionTypeKernel": 3, "PurgeableStateKeepCurrent": 1,
    "PurgeableStateNonVolatile": 2, "PurgeableStateVolatile": 3, "PurgeableStateEmpty": 4,
    "IndirectCommandTypeConcurrentDispatch": 32, "IndirectCommandTypeConcurrentDispatchThreads": 64,
    **{f"GPUFamilyApple{n}": 1000 + n for n in range(1, 11)}, "GPUFamilyMac1": 2001, "GPUFamilyMac2": 2002,
    "GPUFamilyCommon1": 3001, "GPUFamilyCommon2": 3002, "GPUFamilyCommon3": 3003, "GPUFamilyMetal3": 5001,
    "GPUFamilyMetal4": 5002, "HeapTypeAutomatic": 0, "HeapTypePlacement": 1,
    **{f"DataType{n}": c for n, c in (("Float", 3), ("Float2", 4), ("Float3", 5), ("Float4", 6), ("Half", 16),
       ("Half2", 17), ("Half3", 18), ("Half4", 19), ("Int", 29), ("Int2", 30), ("Int3", 31), ("Int4", 32),
       ("UInt", 33), ("UInt2", 34), ("UInt3", 35), ("UInt4", 36), ("Short", 37), ("UShort", 41), ("Char", 45),
       ("UChar", 49), ("Bool", 53), ("Long", 81), ("ULong", 85), ("BFloat", 121))},
}  # fmt: skip

"""Code: libraries, functions, pipelines."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from softmetal import compile, modes, native
from softmetal.kernels import Kernel
from softmetal.objects import Labelled, Named, NSError

if TYPE_CHECKING:
    from softmetal.device import Device


class Library(Labelled):
    _protocol = "MTLLibrary"

    def __init__(self, device: Device, compiled: compile.Compiled) -> None:
        self._device, self._compiled = device, compiled
        self._kernels = {k.name: n for n, k in enumerate(compiled.kernels)}

    def functionNames(self) -> tuple[str, ...]:
        return tuple(self._kernels)

    def newFunctionWithName_(self, name: str) -> Function | None:
        return Function(self, self._kernels[name], {}) if name in self._kernels else None

    def newFunctionWithName_constantValues_error_(self, name: str, values: Any, error: Any) -> tuple[Any, Any]:
        if name not in self._kernels:
            return None, NSError("MTLLibraryErrorDomain", 5, f"the library has no function '{name}'; it has "
                                 f"{', '.join(self._kernels) or 'none'}")  # fmt: skip
        by_index = {c.index: c.name for c in self._compiled.constants}
        known = set(by_index.values())
        pairs = (values._given if values else {}).items()
        given = {(by_index.get(k, "") if isinstance(k, int) else k): v for k, v in pairs}
        return Function(self, self._kernels[name], {k: v for k, v in given.items() if k in known}), None

    def newFunctionWithDescriptor_error_(self, descriptor: Any, error: Any) -> tuple[Any, Any]:
        return self.newFunctionWithName_constantValues_error_(descriptor.name(), descriptor.constantValues(), error)

    def type(self) -> int:
        return 0

    def installName(self) -> None:
        return None


class Function(Labelled):
    _protocol = "MTLFunction"

    def __init__(self, library: Library, number: int, values: dict[str, str]) -> None:
        self._library, self._device = library, library._device
        self._number, self._values = number, values
        self._kernel: Kernel = library._compiled.kernels[number]

    def name(self) -> str:
        return self._kernel.name

    def functionType(self) -> int:
        return 3

    def functionConstantsDictionary(self) -> dict[str, Any]:
        return {c.name: c for c in self._library._compiled.constants}


class Pipeline(Named):
    """An MTLComputePipelineState; machine code for plain and for instrumented execution, made when needed."""

    _protocol = "MTLComputePipelineState"
    _all: ClassVar[weakref.WeakValueDictionary[int, Pipeline]] = weakref.WeakValueDictionary()
    _serials: ClassVar[Iterator[int]] = itertools.count(1)

    def __init__(self, function: Function, label: str | None = None, limit: int = 0, indirect: bool = False) -> None:
        self._device, self._function, self._label = function._device, function, label
        self.kernel, self.number = function._kernel, function._number
        self.limit = min(self.kernel.max_threads, limit or 1024)
        self.indirect = indirect
        self.serial = next(Pipeline._serials)
        Pipeline._all[self.serial] = self
        self._codes: dict[bool, native.Code] = {}
        self.buffers = [a for a in self.kernel.arguments if a.kind == "buffer"]
        self.memories = [a for a in self.kernel.arguments if a.kind == "threadgroup"]
        self.static_bytes = self.code(modes.instrumented()).threadgroup_bytes(self.number)

    def code(self, instrumented: bool) -> native.Code:
        if instrumented not in self._codes:
            library = self._function._library._compiled
            self._codes[instrumented] = loaded(str(library.library(self.number, self._function._values, instrumented)))
        return self._codes[instrumented]

    def maxTotalThreadsPerThreadgroup(self) -> int:
        return self.limit

    def threadExecutionWidth(self) -> int:
        return 32

    def staticThreadgroupMemoryLength(self) -> int:
        return self.static_bytes

    def supportIndirectCommandBuffers(self) -> bool:
        return self.indirect

    def allocatedSize(self) -> int:
        return 0


_codes: dict[str, native.Code] = {}


def loaded(path: str) -> native.Code:
    if path not in _codes:
        _codes[path] = native.Code(path)
    return _codes[path]

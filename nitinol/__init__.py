"""Nitinol: a Metal runtime for machine learning.

Everything here is imported at first use, so that `import nitinol` costs next to nothing. `nitinol.array` is the package
of array functions, most of which are also found here (`nitinol.matmul`); the function that makes an array of nested
lists is `nitinol.asarray`, or `nitinol.array.array` for a copy.
"""

# ruff: noqa: F401, F403
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nitinol.array import *
    from nitinol.generate.model import Model, load
    from nitinol.generate.options import Options
    from nitinol.language import (
        bfloat16,
        float16,
        float32,
        float64,
        int1,
        int8,
        int16,
        int32,
        int64,
        uint8,
        uint16,
        uint32,
        uint64,
    )
    from nitinol.runtime import get_device, open_device, set_device, using_device
    from nitinol.runtime.cpu import CpuDevice
    from nitinol.runtime.kernel import jit
    from nitinol.runtime.launch import interpret

__version__ = "0.1.0"

_PLACES = {
    "jit": "nitinol.runtime.kernel",
    "interpret": "nitinol.runtime.launch",
    "CpuDevice": "nitinol.runtime.cpu",
    **dict.fromkeys(("get_device", "open_device", "set_device", "using_device"), "nitinol.runtime"),
    "load": "nitinol.generate.model",
    "Model": "nitinol.generate.model",
    "Options": "nitinol.generate.options",
    # so that a Triton kernel runs with `import nitinol as triton`
    **dict.fromkeys(("cdiv", "next_power_of_2", "autotune", "Config", "heuristics"), "nitinol.language"),
    "JITFunction": "nitinol.language.jit",
    **dict.fromkeys(("int1", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16",
                     "bfloat16", "float32", "float64"), "nitinol.language"),
}


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module 'nitinol' has no attribute {name!r}")
    if name in ("language", "array", "runtime", "kernels", "models", "formats", "generate"):
        return importlib.import_module(f"nitinol.{name}")
    value = getattr(importlib.import_module(_PLACES.get(name, "nitinol.array")), name, None)
    if value is None:
        raise AttributeError(f"module 'nitinol' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from nitinol import array

    return sorted({*globals(), *_PLACES, *(name for name in dir(array) if not name.startswith("_"))})

"""The operations that networks are written in, each imported when it is first named: reading a model's configuration
needs neither arrays nor the compiler (`nitinol inspect`)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PLACES = {
    "array": "nitinol.array",
    "cached_attention": "nitinol.kernels.attention",
    "embedding": "nitinol.kernels.quantized",
    "geglu": "nitinol.kernels.linear",
    "linear": "nitinol.kernels.linear",
    "rms_norm": "nitinol.kernels.norm",
    "rope_and_cache": "nitinol.kernels.rope",
    "rope_frequencies": "nitinol.kernels.rope",
    "swiglu": "nitinol.kernels.linear",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no operation {name!r}")
    globals()[name] = operation = getattr(import_module(_PLACES[name]), name)
    return operation

"""Nitinol: a Metal runtime for machine learning.

Everything here is imported at first use, so that `import nitinol` costs next to nothing.
"""

from __future__ import annotations

import importlib as _importlib
import typing as _typing

if _typing.TYPE_CHECKING:
    from nitinol.generate.model import Model as Model
    from nitinol.generate.model import load as load
    from nitinol.generate.options import Options as Options
    from nitinol.graph.array import Array as Array
    from nitinol.graph.conversion import array as array
    from nitinol.graph.conversion import asarray as asarray
    from nitinol.runtime import get_device as get_device
    from nitinol.runtime import open_device as open_device
    from nitinol.runtime import set_device as set_device
    from nitinol.runtime import using_device as using_device
    from nitinol.runtime.cpu import CpuDevice as CpuDevice
    from nitinol.runtime.kernel import jit as jit
    from nitinol.runtime.launch import interpret as interpret

__version__ = "0.1.0"

_PLACES = {
    "nitinol.language": (
        "cdiv next_power_of_2 autotune Config heuristics int1 int8 int16 int32 int64 uint8 uint16 uint32 uint64 "
        "float16 bfloat16 float32 float64"  # so that a Triton kernel runs with `import nitinol as triton`
    ),
    "nitinol.language.jit": "JITFunction",
    "nitinol.runtime.kernel": "jit",
    "nitinol.runtime": "get_device open_device set_device using_device",
    "nitinol.runtime.launch": "interpret",
    "nitinol.runtime.cpu": "CpuDevice",
    "nitinol.generate.model": "load Model",
    "nitinol.generate.options": "Options",
    "nitinol.graph.array": "Array",
    "nitinol.graph.conversion": "array asarray empty from_numpy",
    "nitinol.graph.dlpack": "from_dlpack",
    "nitinol.graph.evaluation": "evaluate",
    "nitinol.graph.launch": "Output InPlace Strided launch",
    "nitinol.ops.creation": "arange eye full normal ones random_bits tril triu uniform zeros",
    "nitinol.ops.elementwise": (
        "abs add bitwise_and bitwise_or bitwise_xor ceil clip cos divide equal erf exp exp2 floor floor_divide gelu "
        "greater greater_equal invert isnan left_shift less less_equal log log2 maximum minimum mod multiply negative "
        "not_equal power reciprocal relu right_shift rsqrt sigmoid sign silu sin sqrt square subtract tanh where"
    ),
    "nitinol.ops.indexing": "concatenate outer repeat stack take update_slice",
    "nitinol.ops.adapters": "lora_linear",
    "nitinol.ops.attention": "cached_attention causal_attention",
    "nitinol.ops.cross_entropy": "cross_entropy",
    "nitinol.ops.embedding": "embedding",
    "nitinol.ops.flash_attention": "attention",
    "nitinol.ops.glu": "geglu_gate swiglu_gate",
    "nitinol.ops.delta_layer": (
        "gated_delta_rule gated_delta_rule_step short_convolution short_convolution_step"
    ),
    "nitinol.ops.gated_norm": "gated_norm",
    "nitinol.ops.linear": "geglu linear swiglu",
    "nitinol.ops.linear_cross_entropy": "linear_cross_entropy",
    "nitinol.ops.rope": "rope rope_frequencies",
    "nitinol.ops.rope_and_cache": "rope_and_cache",
    "nitinol.ops.matmul": "matmul",
    "nitinol.ops.mixture": "combine dispatch expert_linear mixture_of_experts route",
    "nitinol.ops.norm": "layer_norm rms_norm",
    "nitinol.ops.quantized": "dequantize quantize",
    "nitinol.ops.reductions": "all any argmax argmin cumsum logsumexp max mean min prod std sum var",
    "nitinol.ops.softmax": "log_softmax softmax",
    "nitinol.ops.views": "split",
    "nitinol.transform.compile": "compile",
    "nitinol.transform.gradient": (
        "GradientError checkpoint custom_gradient grad jvp stop_gradient value_and_grad vjp"
    ),
}  # fmt: skip
_PLACE = {name: place for place, names in _PLACES.items() for name in names.split()}
_ROOMS = frozenset("language formats compiler runtime graph ops transform nn models generate".split())


def __getattr__(name: str) -> _typing.Any:
    if name in _ROOMS:
        return _importlib.import_module(f"nitinol.{name}")
    if name not in _PLACE:
        raise AttributeError(f"module 'nitinol' has no attribute {name!r}")
    place = _PLACE[name]
    if place.startswith("nitinol.graph"):
        _importlib.import_module("nitinol.ops")  # installs the methods of Array
    value = getattr(_importlib.import_module(place), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_PLACE)

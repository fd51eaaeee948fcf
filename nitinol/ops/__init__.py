"""The operations on arrays, one file a family. Importing this package installs the methods of `Array`."""

from nitinol.graph import dlpack, elements  # noqa: F401  the methods that give elements
from nitinol.ops import (
    attention,
    creation,
    elementwise,
    indexing,
    linear,
    matmul,
    norm,
    quantized,
    reductions,
    rope,
    sampling,
    softmax,
    views,
)

__all__ = [
    "attention", "creation", "elementwise", "indexing", "linear", "matmul", "norm", "quantized", "reductions", "rope",
    "sampling", "softmax", "views",
]  # fmt: skip

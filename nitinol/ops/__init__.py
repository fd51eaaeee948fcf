"""The operations on arrays, one file a family. Importing this package installs the methods of `Array`."""

from nitinol.graph import dlpack, elements  # noqa: F401  the methods that give elements
from nitinol.ops import (
    attention,
    creation,
    cross_entropy,
    elementwise,
    embedding,
    flash_attention,
    glu,
    indexing,
    linear,
    linear_cross_entropy,
    matmul,
    norm,
    quantized,
    reductions,
    rope,
    rope_and_cache,
    sampling,
    softmax,
    views,
)

__all__ = [
    "attention", "creation", "cross_entropy", "elementwise", "embedding", "flash_attention", "glu", "indexing",
    "linear", "linear_cross_entropy", "matmul", "norm", "quantized", "reductions", "rope", "rope_and_cache",
    "sampling", "softmax", "views",
]  # fmt: skip

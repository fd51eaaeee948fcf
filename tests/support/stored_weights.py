"""Weights in a block format, as operations take them."""

from __future__ import annotations

import numpy as np

import nitinol as na
from nitinol.formats.quantization import dequantize, quantize
from nitinol.ops.quantized import stored_array


def weights_of(values: np.ndarray, format: str) -> tuple[na.Array, np.ndarray]:
    """An Array and the float32 values that it stands for."""
    data = np.ascontiguousarray(quantize(values, format)).reshape(-1).view(np.uint8)
    return stored_array(na.get_device().wrap(data), format, values.shape), dequantize(data, format, values.shape)

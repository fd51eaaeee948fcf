"""Products with weights [rows, columns] of any storage: which kernel, which blocks, which operands."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

import nitinol.language as tl
from nitinol.formats.blocks import FORMATS
from nitinol.graph.array import Array
from nitinol.graph.launch import Output, launch
from nitinol.graph.operation import Operation
from nitinol.language.types import DType
from nitinol.ops import elementwise as e
from nitinol.ops.activations import quantize_activations
from nitinol.ops.decode import FLOAT_FORMATS, lanes_of
from nitinol.ops.matmul import product
from nitinol.ops.matmul_kernels import quantized_matmul_kernel
from nitinol.ops.matvec import matvec_kernel
from nitinol.ops.quantized import dequantize, run_arguments

FEW_TOKENS = 4  # up to here the weights' bytes are what takes time, not the products
MANY_TOKENS = 128  # from here on CUDA's bf16 products take so much less time than int8 ones that decoding first pays
MOST_UNROLLED = 8  # runs of a row, each with code of its own
DECODE_COST = 12  # decoding and packing a block of weights takes as long as its products with about so many tokens


def _linear_lower(
    target: str, x: Array, weights: Array, bias: Array | None, residual: Array | None, gate: Array | None, gelu: bool
) -> Array:
    if tl.float64 in (x.dtype, weights.dtype):
        plain = dequantize(weights, x.dtype) if weights.is_quantized else weights
        return _epilogue(x @ plain.T, bias, residual, gate, gelu)
    tokens, columns = x.shape
    rows = weights.shape[0]
    epilogue: dict[str, Any] = {"bias": bias, "residual": residual, "out": Output((tokens, rows), x.dtype)}
    if tokens <= FEW_TOKENS and gate is None:
        return _matvec(target, x, weights, None, epilogue)
    epilogue |= {"gate": gate, "GELU": gelu}
    if weights.format in FLOAT_FORMATS:
        if target == "cuda":  # whose matrix instructions take halves, or float32 at a reduced precision
            x = x.astype(weights.dtype)
        return _product(target, x, weights, epilogue)
    if target == "cuda" and tokens >= MANY_TOKENS:
        # 2048 tokens by 14336 rows of 4096 on an H200: 4.8 ms by int8 mma.sync, blocks decoded by each program; 0.5 ms
        # by wgmma in bf16, and decoding moves 190 MB once, 0.05 ms.
        return _product(target, x.astype("bfloat16"), dequantize(weights, "bfloat16"), epilogue)
    parts = quantize_activations(target, x)
    block_t = min((16, 64), key=lambda block: tl.cdiv(tokens, block) * (block + DECODE_COST))
    block_n = max(16, math.gcd(rows, 64))
    return launch(
        quantized_matmul_kernel, (tl.cdiv(rows, block_n), tl.cdiv(tokens, block_t)), x=parts.values,
        x_scales=parts.scales, x_sums=parts.sums, weights=weights, tokens=tokens, rows=rows, columns=columns,
        row_bytes=FORMATS[weights.format].nbytes(columns), BLOCK_T=block_t, BLOCK_N=block_n,
        EVEN_N=rows % block_n == 0, _operations=2 * tokens * rows * columns,
        **epilogue, **run_arguments(weights.format, columns, 64),
    )  # fmt: skip


def _product(target: str, x: Array, weights: Array, epilogue: dict[str, Any]) -> Array:
    return product(target, x, 0, weights.T, 0, 1, epilogue)


def _gated_lower(target: str, x: Array, gate: Array, up: Array, gelu: bool) -> Array:
    if x.shape[0] <= FEW_TOKENS and gate.format == up.format and gate.format in FORMATS and x.dtype != tl.float64:
        epilogue = {"bias": None, "residual": None, "out": Output((x.shape[0], gate.shape[0]), x.dtype), "GELU": gelu}
        return _matvec(target, x, gate, up, epilogue)
    return linear(x, up, gate=linear(x, gate), gelu=gelu)


def _matvec(target: str, x: Array, weights: Array, up: Array | None, epilogue: dict[str, Any]) -> Array:
    tokens, columns = x.shape
    rows = weights.shape[0]
    values, scales, sums = (x, None, None) if weights.format in FLOAT_FORMATS else quantize_activations(target, x)
    block_rows, run, warps = matvec_blocks(target, weights.format, columns)
    block_tokens = tl.next_power_of_2(tokens)
    return launch(
        matvec_kernel, (tl.cdiv(rows, block_rows),), x=values, x_scales=scales, x_sums=sums, weights=weights, up=up,
        tokens=tokens, rows=rows, columns=columns, row_bytes=FORMATS[weights.format].nbytes(columns),
        ROWS=block_rows, TOKENS=block_tokens, EVEN=rows % block_rows == 0 and tokens == block_tokens,
        _operations=(2 if up is None else 4) * tokens * rows * columns,
        _warps=warps, **epilogue, **run,
    )  # fmt: skip


def matvec_blocks(target: str, format: str, columns: int) -> tuple[int, dict[str, Any], int]:
    """Rows of a program, the constexpr arguments of its runs along a row, and warps."""
    plain = format in FLOAT_FORMATS
    if target == "cpu":  # one row of blocks: each thread reads one long stream
        rows, values, warps = (4, 64, 0) if plain else (1, 512, 0)
    elif target == "metal":  # the rows of a program share its activations
        rows, values, warps = (16, 512, 0) if plain else (16, 2048, 0)
    elif plain or format == "Q8_0":  # 4 KB on their way to each warp; these sizes as swept on an H200
        rows, values, warps = (2, 1024, 1) if plain else (2, 2048, 2)
    elif columns % 4096 == 0:  # two warps have a half of each row: activations are loaded once for four rows
        rows, values, warps = 4, 4096, 2
    else:
        rows, values, warps = 2, 1024 if format == "Q6_K" else 2048, 1
    run = run_arguments(format, columns, values)
    if target == "cuda":
        run["EARLY"] = columns % run["VALUES"] == 0
    if target == "cuda" and not plain:
        count = columns // run["VALUES"]
        run["COUNT"] = count if count <= MOST_UNROLLED else 0
        # Threads hold 16 bytes of a group or all: one sum for half of its values or all.
        run["LANES"] = 1 if format in ("Q4_K", "Q5_K") else lanes_of(format) // 4
    if target == "metal":  # as many simdgroups as share a row with 16 bytes in each lane: none repeats activations
        warps = min(4, max(1, run["VALUES"] // (128 if plain else 512)))
    return rows, run, warps


# -------------------------------------------------------------------------------------------------- the operations


def _check_weights(name: str, x: Array, weights: Array) -> None:
    if x.ndim != 2 or weights.ndim != 2 or x.shape[1] != weights.shape[1]:
        raise ValueError(
            f"{name}: x has shape {x.shape} and the weights {weights.shape}, expected [T, columns] and [rows, columns]"
        )
    if not x.dtype.is_float or not (weights.dtype.is_float or weights.is_quantized):
        raise TypeError(f"{name} of {x.dtype} and {weights.dtype}: expected floats, or weights in blocks")


def _linear_rule(
    x: Array, weights: Array, bias: Array | None, residual: Array | None, gate: Array | None, gelu: bool
) -> tuple[tuple[int, ...], DType]:
    _check_weights("linear", x, weights)
    shape = (x.shape[0], weights.shape[0])
    for what, operand, wanted in (("bias", bias, shape[1:]), ("residual", residual, shape), ("gate", gate, shape)):
        if operand is not None and operand.shape != wanted:
            raise ValueError(f"linear: {what} has shape {operand.shape}, expected {wanted}")
    return shape, x.dtype


def _activation(x: Array, gelu: bool) -> Array:
    return e.gelu(x, approximate="tanh") if gelu else e.silu(x)


def _slope(x: Array, gelu: bool) -> Array:
    """The derivative of the activation."""
    if not gelu:
        s = e.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    factor = math.sqrt(2 / math.pi)
    bent = e.tanh((x * x * x * 0.044715 + x) * factor)
    return (bent + 1.0) * 0.5 + x * 0.5 * (1.0 - bent * bent) * (x * x * (3 * 0.044715) + 1.0) * factor


def _epilogue(y: Array, bias: Array | None, residual: Array | None, gate: Array | None, gelu: bool) -> Array:
    """activation(gate) * y + bias + residual."""
    y = y if gate is None else _activation(gate, gelu) * y
    y = y if bias is None else y + bias
    return y if residual is None else y + residual


def _linear_vjp(
    g: Array, out: Array, x: Array, weights: Array, bias: Array | None, residual: Array | None, gate: Array | None,
    gelu: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    """Of weights in blocks there is none: they stay as they are, and x's comes from their values."""
    plain = dequantize(weights, x.dtype) if weights.is_quantized else weights
    inner = g if gate is None else g * _activation(gate, gelu)
    return (
        (inner @ plain).astype(x.dtype),
        None if weights.is_quantized else (inner.T @ x).astype(weights.dtype),
        None if bias is None else g.sum(0).astype(bias.dtype),
        None if residual is None else g.astype(residual.dtype),
        None if gate is None else g * (x @ plain.T) * _slope(gate, gelu),
    )


def _gated_rule(x: Array, gate: Array, up: Array, gelu: bool) -> tuple[tuple[int, ...], DType]:
    name = "geglu" if gelu else "swiglu"
    _check_weights(name, x, gate)
    if gate.shape != up.shape:
        raise ValueError(f"{name}: gate has shape {gate.shape} and up {up.shape}, expected the same")
    return (x.shape[0], gate.shape[0]), x.dtype


def _gated_vjp(g: Array, out: Array, x: Array, gate: Array, up: Array, gelu: bool) -> tuple[Any, ...]:
    left, right = linear(x, gate), linear(x, up)
    x_left, d_gate, *_ = _linear_vjp(g * right * _slope(left, gelu), left, x, gate, None, None, None)
    x_right, d_up, *_ = _linear_vjp(g * _activation(left, gelu), right, x, up, None, None, None)
    return x_left + x_right, d_gate, d_up


def linear_reference(
    x: np.ndarray, weights: np.ndarray, bias: Any = None, residual: Any = None, gate: Any = None, gelu: bool = False
) -> np.ndarray:
    """The same in float64, of weights that are decoded."""
    y = x.astype(np.float64) @ weights.astype(np.float64).T
    y = y if gate is None else y * _np_activation(gate.astype(np.float64), gelu)
    y = y if bias is None else y + bias
    return y if residual is None else y + residual


def _np_activation(x: np.ndarray, gelu: bool) -> np.ndarray:
    if gelu:
        return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x / (1 + np.exp(-x))


def gated_reference(x: np.ndarray, gate: np.ndarray, up: np.ndarray, gelu: bool = False) -> np.ndarray:
    """The same in float64, of weights that are decoded."""
    return linear_reference(x, up, gate=linear_reference(x, gate), gelu=gelu)


LINEAR = Operation("linear", rule=_linear_rule, lower=_linear_lower, reference=linear_reference, vjp=_linear_vjp)
SWIGLU = Operation("swiglu", rule=_gated_rule, lower=_gated_lower, reference=gated_reference, vjp=_gated_vjp)
GEGLU = Operation("geglu", rule=_gated_rule, lower=_gated_lower, reference=gated_reference, vjp=_gated_vjp)


def linear(
    x: Any, weights: Any, bias: Any = None, residual: Any = None, gate: Any = None, gelu: bool = False
) -> Array:
    """silu(gate) * (x @ weights^T) + bias + residual, of x's type [T, rows]; what is None is left out.

    x [T, columns], weights of shape [rows, columns] in any storage, bias [rows], residual and gate [T, rows].
    gelu: gelu(gate), by its tanh approximation, instead of silu(gate).
    With weights of a block format x is rounded to int8, with a scale per 32 values; on CUDA, for many tokens, x and the
    weights are rounded to bfloat16 instead.
    """
    return LINEAR(x, weights, bias, residual, gate, gelu=gelu)


def swiglu(x: Any, gate: Any, up: Any) -> Array:
    """silu(x @ gate^T) * (x @ up^T), the gate of a feed-forward layer (Shazeer, "GLU variants improve transformer",
    2020): of x's type [T, rows]. gate and up are weights of one shape [rows, columns]."""
    return SWIGLU(x, gate, up, gelu=False)


def geglu(x: Any, gate: Any, up: Any) -> Array:
    """gelu(x @ gate^T) * (x @ up^T) with GELU's tanh approximation, otherwise as `swiglu`."""
    return GEGLU(x, gate, up, gelu=True)

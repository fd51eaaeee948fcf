"""Products with weights [rows, columns] of any format, for arrays: which kernel, which blocks, which operands."""

from __future__ import annotations

import math
from typing import Any

import nitinol.language as tl
from nitinol.array import Array, Output, Strided, launch
from nitinol.formats.blocks import FORMATS
from nitinol.kernels.activations import quantize_activations
from nitinol.kernels.decode import FLOAT_FORMATS, lanes_of
from nitinol.kernels.matmul import matmul_kernel, quantized_matmul_kernel
from nitinol.kernels.matvec import matvec_kernel
from nitinol.kernels.quantized import dequantize, run_arguments
from nitinol.runtime import get_device

FEW_TOKENS = 4  # up to here the weights' bytes are what takes time, not the products
MULTIPROCESSORS = 128  # of a GPU, about (A100 108, H100 and H200 132): fewer programs leave some without work
MANY_TOKENS = 128  # from here on CUDA's bf16 products take so much less time than int8 ones that decoding first pays
MOST_UNROLLED = 8  # runs of a row, each with code of its own
DECODE_COST = 12  # decoding and packing a block of weights takes as long as its products with about so many tokens


def linear(
    x: Array, weights: Any, bias: Any = None, residual: Any = None, gate: Any = None, gelu: bool = False
) -> Array:
    """silu(gate) * (x @ weights^T) + bias + residual, float32 [T, rows]; what is None is left out.

    x float32 [T, columns], weights of shape [rows, columns] in any format, bias [rows], residual and gate [T, rows].
    gelu: gelu(gate), by its tanh approximation, instead of silu(gate).
    With weights of a block format x is rounded to int8, with a scale per 32 values; on CUDA, for many tokens, x and the
    weights are rounded to bfloat16 instead.
    """
    tokens, columns = x.shape
    rows = _rows("linear", x, weights)
    _like("linear", "bias", bias, (rows,))
    _like("linear", "residual", residual, (tokens, rows))
    _like("linear", "gate", gate, (tokens, rows))
    epilogue = {"bias": bias, "residual": residual, "out": Output((tokens, rows), "float32")}
    if tokens <= FEW_TOKENS and gate is None:
        return _matvec(x, weights, None, epilogue)
    epilogue |= {"gate": gate, "GELU": gelu}
    if weights.format in FLOAT_FORMATS:
        if get_device().name == "cuda":  # whose matrix instructions take halves, or float32 at a reduced precision
            x = x.astype(weights.data.dtype)
        return _matmul(x[None], weights.data.T[None], epilogue)
    if get_device().name == "cuda" and tokens >= MANY_TOKENS:
        # 2048 tokens by 14336 rows of 4096 on an H200: 4.8 ms by int8 mma.sync, blocks decoded by each program; 0.5 ms
        # by wgmma in bf16, and decoding moves 190 MB once, 0.05 ms.
        decoded = dequantize(weights, "bfloat16")
        return _matmul(x.astype("bfloat16")[None], decoded.T[None], epilogue)
    parts = quantize_activations(x)
    block_t = min((16, 64), key=lambda block: tl.cdiv(tokens, block) * (block + DECODE_COST))
    block_n = max(16, math.gcd(rows, 64))
    return launch(
        quantized_matmul_kernel, (tl.cdiv(rows, block_n), tl.cdiv(tokens, block_t)), x=parts.values,
        x_scales=parts.scales, x_sums=parts.sums, weights=weights, tokens=tokens, rows=rows, columns=columns,
        row_bytes=FORMATS[weights.format].nbytes(columns), BLOCK_T=block_t, BLOCK_N=block_n,
        EVEN_N=rows % block_n == 0, _operations=2 * tokens * rows * columns,
        **epilogue, **run_arguments(weights.format, columns, 64),
    )  # fmt: skip


def swiglu(x: Array, gate: Any, up: Any) -> Array:
    """silu(x @ gate^T) * (x @ up^T), the gate of a feed-forward layer (Shazeer, "GLU variants improve transformer",
    2020): float32 [T, rows]. gate and up are weights of one shape [rows, columns]."""
    return _gated("swiglu", x, gate, up, False)


def geglu(x: Array, gate: Any, up: Any) -> Array:
    """gelu(x @ gate^T) * (x @ up^T) with GELU's tanh approximation, otherwise as `swiglu`."""
    return _gated("geglu", x, gate, up, True)


def _gated(name: str, x: Array, gate: Any, up: Any, gelu: bool) -> Array:
    if tuple(gate.shape) != tuple(up.shape):
        raise ValueError(f"{name}: gate has shape {tuple(gate.shape)} and up {tuple(up.shape)}, expected the same")
    if x.shape[0] <= FEW_TOKENS and gate.format == up.format:
        rows = _rows(name, x, gate)
        epilogue = {"bias": None, "residual": None, "out": Output((x.shape[0], rows), "float32"), "GELU": gelu}
        return _matvec(x, gate, up, epilogue)
    return linear(x, up, gate=linear(x, gate), gelu=gelu)


def matmul(a: Array, b: Array) -> Array:
    """a @ b, float32 [..., m, n] of [..., m, k] and [..., k, n]: float32, float16 or bfloat16, transposed views as they
    are. Leading axes are equal, or missing from one operand."""
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
        raise ValueError(f"matmul takes [..., m, k] and [..., k, n], found shapes {a.shape} and {b.shape}")
    if a.ndim > 2 and b.ndim > 2 and a.shape[:-2] != b.shape[:-2]:
        raise ValueError(f"matmul: the leading axes differ, found shapes {a.shape} and {b.shape}")
    leading = a.shape[:-2] or b.shape[:-2]
    left, right = (x.reshape(-1, *x.shape[-2:]) for x in (a, b))
    out = _matmul(left, right, {"bias": None, "residual": None, "gate": None, "out": None})
    return out.reshape(*leading, a.shape[-2], b.shape[-1])


def _matvec(x: Array, weights: Any, up: Any, epilogue: dict[str, Any]) -> Array:
    tokens, columns = x.shape
    rows = weights.shape[0]
    values, scales, sums = (x, None, None) if weights.format in FLOAT_FORMATS else quantize_activations(x)
    block_rows, run, warps = matvec_blocks(weights.format, columns)
    block_tokens = tl.next_power_of_2(tokens)
    return launch(
        matvec_kernel, (tl.cdiv(rows, block_rows),), x=values, x_scales=scales, x_sums=sums, weights=weights, up=up,
        tokens=tokens, rows=rows, columns=columns, row_bytes=FORMATS[weights.format].nbytes(columns),
        ROWS=block_rows, TOKENS=block_tokens, EVEN=rows % block_rows == 0 and tokens == block_tokens,
        _operations=(2 if up is None else 4) * tokens * rows * columns,
        _warps=warps, **epilogue, **run,
    )  # fmt: skip


def matvec_blocks(format: str, columns: int) -> tuple[int, dict[str, Any], int]:
    """Rows of a program, the constexpr arguments of its runs along a row, and warps, on the current device."""
    plain, target = format in FLOAT_FORMATS, get_device().name
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


def _matmul(a: Array, b: Array, epilogue: dict[str, Any]) -> Array:
    """[batch, m, k] @ [batch, k, n], either batch may be 1 for all."""
    (a_batch, m, k), (b_batch, _, n) = a.shape, b.shape
    batch = max(a_batch, b_batch)
    if epilogue["out"] is None:
        epilogue = {**epilogue, "out": Output((batch, m, n), "float32")}
    halves = a.dtype.nbytes == 2 and b.dtype.nbytes == 2 and m >= 128
    most_m, most_n, most_k, warps = matmul_blocks(halves, batch * m, n)
    block_m, block_n = min(most_m, tl.next_power_of_2(m)), min(most_n, max(16, tl.next_power_of_2(n)))
    block_k = min(most_k, max(4, tl.next_power_of_2(k)))
    blocks = tl.cdiv(n, block_n), tl.cdiv(m, block_m)
    m_first = get_device().name == "cuda"  # the weights of a layer exceed its L2 cache, a prompt's activations do not
    return launch(
        matmul_kernel, (*(blocks[::-1] if m_first else blocks), batch), a=Strided(a), b=Strided(b), m=m, n=n, k=k,
        a_batch=a.strides[0] if a_batch > 1 else 0, a_m=a.strides[1], a_k=a.strides[2],
        b_batch=b.strides[0] if b_batch > 1 else 0, b_k=b.strides[1], b_n=b.strides[2],
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, EVEN=m % block_m == 0 and n % block_n == 0,
        EVEN_K=k % block_k == 0, M_FIRST=m_first, _operations=2 * batch * m * n * k, _warps=warps, **epilogue,
    )  # fmt: skip


def matmul_blocks(halves: bool, m: int, n: int) -> tuple[int, int, int, int]:
    """The largest blocks of m, n and k, and warps: of two half operands with 128 rows or more, or of others."""
    target = get_device().name
    if target == "cpu":
        return 64, 64, 128, 0
    if target != "cuda" or not halves:
        return 64, 64, 32, 4
    sizes = (128, 256, 8), (128, 128, 4), (64, 128, 4), (64, 64, 4)
    enough = (size for size in sizes if tl.cdiv(m, size[0]) * tl.cdiv(n, size[1]) >= MULTIPROCESSORS)
    block_m, block_n, warps = next(enough, sizes[-1])
    return block_m, block_n, 64, warps


def _rows(name: str, x: Array, weights: Any) -> int:
    if x.ndim != 2 or len(weights.shape) != 2 or x.shape[1] != weights.shape[1]:
        raise ValueError(
            f"{name}: x has shape {x.shape} and the weights {tuple(weights.shape)}, expected [T, columns] and "
            "[rows, columns]"
        )
    return int(weights.shape[0])


def _like(name: str, what: str, operand: Any, shape: tuple[int, ...]) -> None:
    if operand is not None and tuple(operand.shape) != shape:
        raise ValueError(f"{name}: {what} has shape {tuple(operand.shape)}, expected {shape}")

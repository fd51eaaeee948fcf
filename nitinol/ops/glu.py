"""Gated units (Shazeer, "GLU variants improve transformer", 2020): activation(gate) * up, and both gradients in one
kernel, which recomputes the activation: reading gate again costs less than keeping its activation.

Activations: silu x sigmoid(x) (SwiGLU), gelu x Phi(x) with the normal distribution's Phi, and gelu_tanh, its
approximation by tanh (both GeGLU; Hendrycks and Gimpel, "Gaussian error linear units", 2016).
"""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

import math
from typing import Any

import numpy as np

import nitinol.language as tl
from nitinol.graph.array import Array
from nitinol.graph.conversion import as_operand
from nitinol.graph.launch import Output, Strided, launch
from nitinol.graph.operation import Operation
from nitinol.language.jit import jit
from nitinol.ops import elementwise as e
from nitinol.ops.reductions import floats
from nitinol.ops.tiles import store_row

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
ROOT_HALF = tl.constexpr(math.sqrt(0.5))
DENSITY_AT_0 = tl.constexpr(1 / math.sqrt(2 * math.pi))
TANH_SCALE_2 = tl.constexpr(2 * math.sqrt(2 / math.pi))
TANH_CUBE = tl.constexpr(0.044715)


@jit
def activation_of(x, ACTIVATION: tl.constexpr):
    """The activation and its derivative."""
    if ACTIVATION == "silu":
        share = tl.sigmoid(x)
        return x * share, share * (1.0 + x * (1.0 - share))
    if ACTIVATION == "gelu":
        share = 0.5 + 0.5 * tl.erf(x * ROOT_HALF)
        return x * share, share + x * (DENSITY_AT_0 * tl.exp(-0.5 * x * x))
    share = tl.sigmoid(TANH_SCALE_2 * (x + TANH_CUBE * x * x * x))  # (1 + tanh(u)) / 2, without the loss near tanh -1
    inner = TANH_SCALE_2 * (1.0 + 3.0 * TANH_CUBE * x * x)
    return x * share, share + x * share * (1.0 - share) * inner


@jit
def load_operands(gate, up, columns, gate_row, up_row, BLOCK: tl.constexpr):
    """Of program r * cdiv(columns, BLOCK) + c: row, places in it, and both operands there, in fp32."""
    per_row = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // per_row).to(tl.int64)
    at = (tl.program_id(0) % per_row).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    x = tl.load(gate + row * gate_row + at, mask=inside, other=0.0).to(tl.float32)
    return row, at, x, tl.load(up + row * up_row + at, mask=inside, other=0.0).to(tl.float32)


@jit
def glu_kernel(gate, up, out, columns, gate_row, up_row, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """Program r * cdiv(columns, BLOCK) + c: BLOCK columns of row r. gate_row and up_row are strides."""
    row, at, x, y = load_operands(gate, up, columns, gate_row, up_row, BLOCK)
    activation, _ = activation_of(x, ACTIVATION)
    store_row(out + row * columns, at, columns, activation * y, False)


@jit
def glu_gradient_kernel(
    d_out, gate, up, d_gate, d_up, columns, gate_row, up_row, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    """The same program's gradients. Without d_up both go to the rows of d_gate [rows, 2 columns], side by side."""
    row, at, x, y = load_operands(gate, up, columns, gate_row, up_row, BLOCK)
    slope = tl.load(d_out + row * columns + at, mask=at < columns, other=0.0).to(tl.float32)
    activation, derivative = activation_of(x, ACTIVATION)
    d_gate += row * (columns if d_up is not None else 2 * columns)
    d_up = d_gate + columns if d_up is None else d_up + row * columns
    store_row(d_gate, at, columns, slope * y * derivative, False)
    store_row(d_up, at, columns, slope * activation, False)


def blocks(target: str) -> dict[str, int]:
    """Values of a program: on CPUs enough that starting one does not count, on GPUs 8 a thread of 128."""
    return {"BLOCK": {"cpu": 8192, "metal": 1024, "cuda": 1024}[target]}


def glu_forward(target: str, gate: Array, up: Array | None = None, activation: str = "silu") -> Array:
    """activation(gate) * up, of gate's shape and dtype (float32, float16, bfloat16). Without `up`, gate is both side by
    side [..., 2 n], and the result [..., n].

    activation: "silu", "gelu" or "gelu_tanh". Raises ValueError for another one and for shapes that differ.
    """
    gate, up, shape, arguments = operands(target, gate, up, activation)
    rows, columns = gate.shape
    return launch(glu_kernel, (rows * tl.cdiv(columns, arguments["BLOCK"]),), gate=Strided(gate), up=Strided(up),
                  out=Output(shape, gate.dtype), columns=columns, **arguments)  # fmt: skip


def glu_backward(
    target: str, d_out: Array, gate: Array, up: Array | None = None, activation: str = "silu"
) -> tuple[Array, Array | None]:
    """d_gate and d_up of the operands' dtypes; without `up`, the gradient of both side by side [..., 2 n], and None."""
    packed = gate.shape if up is None else None
    gate, up, shape, arguments = operands(target, gate, up, activation)
    if tuple(d_out.shape) != shape:
        raise ValueError(f"glu: d_out has shape {tuple(d_out.shape)}, expected {shape}")
    rows, columns = gate.shape
    found = launch(
        glu_gradient_kernel, (rows * tl.cdiv(columns, arguments["BLOCK"]),), d_out=d_out, gate=Strided(gate),
        up=Strided(up), d_gate=Output(packed or shape, gate.dtype),
        d_up=None if packed else Output(shape, up.dtype), columns=columns, **arguments,
    )  # fmt: skip
    return (found, None) if packed else found


def operands(
    target: str, gate: Array, up: Array | None, activation: str
) -> tuple[Array, Array, tuple[int, ...], dict[str, Any]]:
    """gate and up as rows, the result's shape, and the kernels' arguments. Whole arrays are one long row."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"glu: the activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    if up is None:
        if not gate.ndim or gate.shape[-1] % 2:
            raise ValueError(f"glu of an array of shape {gate.shape}: expected gate and up side by side, [..., 2 n]")
        half = gate.shape[-1] // 2
        gate, up = gate[..., :half], gate[..., half:]
    elif gate.shape != up.shape:
        raise ValueError(f"glu: gate has shape {gate.shape} and up {up.shape}, expected the same")
    shape = gate.shape
    rows = 1 if gate.is_contiguous and up.is_contiguous else math.prod(shape[:-1])
    gate, up = (x.reshape(rows, gate.size // rows if rows else 0) for x in (gate, up))
    gate, up = (x if x.strides[-1] == 1 else x.contiguous() for x in (gate, up))
    return gate, up, shape, {
        "gate_row": gate.strides[0], "up_row": up.strides[0], "ACTIVATION": activation, **blocks(target),
    }  # fmt: skip


def activation_reference(x: np.ndarray, activation: str) -> np.ndarray:
    """The activation in float64."""
    x = x.astype(np.float64)
    if activation == "silu":
        return x / (1 + np.exp(-x))
    if activation == "gelu":
        return x * (0.5 + 0.5 * np.vectorize(math.erf)(x * math.sqrt(0.5)))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def glu_reference(gate: np.ndarray, up: np.ndarray, activation: str = "silu") -> np.ndarray:
    """The result in float64."""
    return activation_reference(gate, activation) * up


def glu_gradient_reference(
    d_out: np.ndarray, gate: np.ndarray, up: np.ndarray, activation: str = "silu"
) -> tuple[np.ndarray, np.ndarray]:
    """d_gate and d_up in float64; the derivative as a central difference, good to 1e-9."""
    step = 1e-5
    wide = gate.astype(np.float64)
    derivative = (activation_reference(wide + step, activation) - activation_reference(wide - step, activation)) / (
        2 * step
    )
    return d_out * up * derivative, d_out * activation_reference(gate, activation)


# -------------------------------------------------------------------------------------------------- the operations


def _gate_vjp(g: Array, out: Array, gate: Array, up: Array, activation: str) -> Any:
    return GATE_GRADIENT(g, gate, up, activation=activation)


GATE = Operation(
    "gate", rule=lambda gate, up, activation: (gate.shape, gate.dtype), lower=glu_forward, reference=glu_reference,
    vjp=_gate_vjp,
)  # fmt: skip
GATE_GRADIENT = Operation(
    "gate_gradient", rule=lambda d_out, gate, up, activation: [(x.shape, x.dtype) for x in (gate, up)],
    lower=glu_backward, reference=glu_gradient_reference,
    vjp="a second derivative of a fused gate; nitinol.silu(gate) * up (or gelu) has one, and so have float64 operands",
)  # fmt: skip


def swiglu_gate(gate: Any, up: Any) -> Array:
    """silu(gate) * up of two arrays of one shape, in gate's type, computed in fp32 (Shazeer, "GLU variants improve
    transformer", 2020). They may be the halves of one product's rows. ValueError for shapes that differ."""
    return _gated(gate, up, "silu")


def geglu_gate(gate: Any, up: Any, approximate: str = "tanh") -> Array:
    """gelu(gate) * up, otherwise as `swiglu_gate`. approximate: "tanh", or "none" for the error function's GELU."""
    if approximate not in ("tanh", "none"):
        raise ValueError(f"geglu_gate: approximate is {approximate!r:.40}, expected 'tanh' or 'none'")
    return _gated(gate, up, "gelu_tanh" if approximate == "tanh" else "gelu")


def _gated(gate: Any, up: Any, activation: str) -> Array:
    gate, up = floats(as_operand(gate)), floats(as_operand(up))
    if gate.shape != up.shape:
        raise ValueError(f"a gate of shape {gate.shape} for values of shape {up.shape}, expected the same")
    if tl.float64 not in (gate.dtype, up.dtype):
        return GATE(gate, up, activation=activation)
    if activation == "silu":
        return (e.silu(gate) * up).astype(gate.dtype)
    return (e.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up).astype(gate.dtype)

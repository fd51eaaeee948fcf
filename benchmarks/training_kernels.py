#!/usr/bin/env python
"""The fused kernels of training, forward and backward, beside the same written as operations of arrays, and PyTorch.

    python benchmarks/training_kernels.py [--device NAME] [--threads N] [--rounds N] [--quick] [--json FILE] [CASE ...]

All three take turns, with the same inputs, in float32. The first two are compiled functions of arrays, so the second is
fused as far as elementwise chains and reductions go; "memory" is what their command lists hold beside operands and
results. PyTorch runs in eager mode with autograd, on the CPU only. Results are compared with each other first.

The rate counts the bytes that must move: operands once and results once, and operands a second time where backward
follows forward with all rows in between. Only the fused side has a rate; ratios are of the others' time to its time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from common import NOT_MEASURED, alternate, describe, machine, median, parser, table, unsteady, write_json

import nitinol
import nitinol as na
from nitinol.ops import cross_entropy as ce
from nitinol.ops import embedding, glu, norm_backward, rope, softmax
from nitinol.ops import linear_cross_entropy as lce
from nitinol.ops import norm_kernels as norm

TOLERANCE = 1e-4  # of the largest error relative to the largest value, between any two sides


@dataclass
class Case:
    """One step of training. fused and unfused take the inputs as Arrays, torch as tensors; all return the same results.

    nbytes: that must move; operations: of products, 0 for what only streams."""

    name: str
    inputs: list[np.ndarray]
    fused: Callable[..., Any]
    unfused: Callable[..., Any] | None
    torch: Callable[..., Any]
    nbytes: int
    operations: int = 0


def cases(quick: bool, target: str) -> dict[str, Callable[[np.random.Generator], Case]]:
    """By name; quick: sizes that take no time, for trying out."""
    few = 64 if quick else 1
    return {
        "cross_entropy": lambda rng: cross_entropy_case(rng, target, 1024 // few, 32_000),
        "linear_cross_entropy": lambda rng: linear_cross_entropy_case(rng, target, 512 // few, 32_000 // few, 512),
        "rope": lambda rng: rope_case(rng, target, 2048 // few, 32, 8, 128),
        "rms_norm": lambda rng: norm_case(rng, target, 4096 // few, 2048, False),
        "layer_norm": lambda rng: norm_case(rng, target, 4096 // few, 2048, True),
        "softmax": lambda rng: softmax_case(rng, target, 4096 // few, 2000),
        "swiglu": lambda rng: glu_case(rng, target, (2048 // few, 5632), "silu"),
        "geglu": lambda rng: glu_case(rng, target, (2048 // few, 5632), "gelu_tanh"),
        "embedding": lambda rng: embedding_case(rng, target, 4096 // few, 32_000, 512),
    }


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def gradients(y: Any, d_y: Any, *inputs: Any) -> tuple[Any, ...]:
    """PyTorch's, after its result."""
    import torch

    return y.detach(), *torch.autograd.grad(y, inputs, d_y)


# ------------------------------------------------------------------------------------------------------------- cases


def cross_entropy_case(rng: np.random.Generator, target: str, tokens: int, words: int) -> Case:
    logits, targets = normal(rng, tokens, words), rng.integers(0, words, tokens).astype(np.int32)

    def fused(z: Any, t: Any, one: Any) -> Any:
        loss, lse, scale = ce.cross_entropy_forward(target, z, t)
        return loss, ce.cross_entropy_backward(target, one, z, t, lse, scale)

    def unfused(z: Any, t: Any, one: Any) -> Any:
        loss, lse, hit = loss_of(z, t)
        return loss, ((z - lse).exp() - hit) * (one / tokens)

    def torch(z: Any, t: Any, one: Any) -> Any:
        return gradients(functional().cross_entropy(z, t.long()), one, z)

    return Case(f"cross entropy, {tokens} × {words}", [logits, targets, np.float32(1)], fused, unfused, torch,
                12 * logits.size)  # fmt: skip


def loss_of(z: Any, t: Any) -> tuple[Any, Any, Any]:
    """Mean loss, lse and one-hot targets as operations of arrays."""
    lse = na.logsumexp(z, -1, True)
    hit = (na.arange(z.shape[1]).reshape(1, -1) == t.reshape(-1, 1)).astype("fp32")
    return (lse.reshape(-1) - (z * hit).sum(axis=1)).mean(), lse, hit


def linear_cross_entropy_case(rng: np.random.Generator, target: str, tokens: int, words: int, columns: int) -> Case:
    hidden, weight = normal(rng, tokens, columns), normal(rng, words, columns) / columns**0.5
    targets = rng.integers(0, words, tokens).astype(np.int32)

    def fused(h: Any, w: Any, t: Any, one: Any) -> Any:
        loss, lse, scale = lce.linear_cross_entropy_forward(target, h, w, t)
        return loss, *lce.linear_cross_entropy_backward(target, one, h, w, t, lse, scale)

    def unfused(h: Any, w: Any, t: Any, one: Any) -> Any:
        z = na.matmul(h, w.T)
        loss, lse, hit = loss_of(z, t)
        d_z = ((z - lse).exp() - hit) * (one / tokens)
        return loss, na.matmul(d_z, w), na.matmul(d_z.T, h)

    def torch(h: Any, w: Any, t: Any, one: Any) -> Any:
        return gradients(functional().cross_entropy(h @ w.T, t.long()), one, h, w)

    inputs = [hidden, weight, targets, np.float32(1)]
    return Case(f"linear cross entropy, {tokens} × {columns} × {words}", inputs, fused, unfused, torch, 0,
                6 * tokens * words * columns)  # fmt: skip


def rope_case(rng: np.random.Generator, target: str, tokens: int, heads: int, kv_heads: int, head_dim: int) -> Case:
    q, k = normal(rng, 1, tokens, heads, head_dim), normal(rng, 1, tokens, kv_heads, head_dim)
    frequencies = (1e4 ** (-np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)

    def fused(q: Any, k: Any, f: Any) -> Any:
        return rope.rope_forward(target, q, k, f, interleaved=False)

    def turned(x: Any, cosine: Any, sine: Any) -> Any:
        one, other = x[..., : head_dim // 2], x[..., head_dim // 2 :]
        return na.concatenate([one * cosine - other * sine, other * cosine + one * sine], -1)

    def unfused(q: Any, k: Any, f: Any) -> Any:
        angle = (na.arange(tokens).astype("fp32").reshape(-1, 1) * f).reshape(1, tokens, 1, -1)
        return tuple(turned(x, angle.cos(), angle.sin()) for x in (q, k))

    def torch(q: Any, k: Any, f: Any) -> Any:
        import torch

        angle = (torch.arange(tokens)[:, None] * f.detach()).reshape(1, tokens, 1, -1)
        cosine, sine = angle.cos(), angle.sin()
        halves = (x.chunk(2, -1) for x in (q.detach(), k.detach()))
        return tuple(torch.cat((a * cosine - b * sine, b * cosine + a * sine), -1) for a, b in halves)

    return Case(f"RoPE, {tokens} tokens, {heads} + {kv_heads} heads of {head_dim}", [q, k, frequencies], fused, unfused,
                torch, 8 * (q.size + k.size))  # fmt: skip


def norm_case(rng: np.random.Generator, target: str, rows: int, columns: int, layer: bool) -> Case:
    x, d_y, weight = normal(rng, rows, columns), normal(rng, rows, columns), normal(rng, columns)

    def fused(x: Any, d_y: Any, w: Any) -> Any:
        y, mean, scale, _ = norm.norm_forward(target, x, w, layer=layer)
        return y, *norm_backward.norm_backward(target, d_y, x, scale, mean, w, layer=layer)[:2]

    def unfused(x: Any, d_y: Any, w: Any) -> Any:
        distance = x - x.mean(-1, True) if layer else x
        scale = ((distance * distance).mean(-1, True) + 1e-5).rsqrt()
        normal = distance * scale
        g = d_y * w
        d_x = g - normal * (g * normal).mean(-1, True)
        d_x = d_x - g.mean(-1, True) if layer else d_x
        return normal * w, d_x * scale, (d_y * normal).sum(0)

    def torch(x: Any, d_y: Any, w: Any) -> Any:
        function = functional().layer_norm if layer else functional().rms_norm
        return gradients(function(x, (columns,), w, eps=1e-5), d_y.detach(), x, w)

    return Case(f"{'layer norm' if layer else 'RMSNorm'}, {rows} × {columns}", [x, d_y, weight], fused, unfused, torch,
                20 * x.size)  # fmt: skip


def softmax_case(rng: np.random.Generator, target: str, rows: int, columns: int) -> Case:
    x, d_y = normal(rng, rows, columns), normal(rng, rows, columns)

    def fused(x: Any, d_y: Any) -> Any:
        y = softmax.softmax_forward(target, x)
        return y, softmax.softmax_backward(target, d_y, y)

    def unfused(x: Any, d_y: Any) -> Any:
        y = na.softmax(x)
        return y, y * (d_y - (y * d_y).sum(-1, True))

    def torch(x: Any, d_y: Any) -> Any:
        return gradients(functional().softmax(x, -1), d_y.detach(), x)

    return Case(f"softmax, {rows} × {columns}", [x, d_y], fused, unfused, torch, 20 * x.size)


def glu_case(rng: np.random.Generator, target: str, shape: tuple[int, int], activation: str) -> Case:
    gate, up, d_out = (normal(rng, *shape) for _ in range(3))

    def fused(gate: Any, up: Any, d_out: Any) -> Any:
        out = glu.glu_forward(target, gate, up, activation)
        return out, *glu.glu_backward(target, d_out, gate, up, activation)

    def unfused(gate: Any, up: Any, d_out: Any) -> Any:
        if activation == "silu":
            share = 1.0 / (1.0 + (-gate).exp())
            slope = share * (1.0 + gate * (1.0 - share))
        else:
            root = 2 * (2 / np.pi) ** 0.5
            share = 1.0 / (1.0 + (gate * (gate * gate * 0.044715 + 1.0) * -root).exp())
            slope = share + gate * share * (1.0 - share) * (gate * gate * (3 * 0.044715) + 1.0) * root
        return gate * share * up, d_out * up * slope, d_out * gate * share

    def torch(gate: Any, up: Any, d_out: Any) -> Any:
        silu = activation == "silu"
        y = functional().silu(gate) if silu else functional().gelu(gate, approximate="tanh")
        return gradients(y * up, d_out.detach(), gate, up)

    name = {"silu": "SwiGLU", "gelu_tanh": "GeGLU (tanh)"}[activation]
    return Case(f"{name}, {shape[0]} × {shape[1]}", [gate, up, d_out], fused, unfused, torch, 32 * gate.size)


def embedding_case(rng: np.random.Generator, target: str, tokens: int, words: int, columns: int) -> Case:
    d_out = normal(rng, tokens, columns)
    ids = np.minimum(rng.zipf(1.2, tokens) - 1, words - 1).astype(np.int32)

    def fused(d_out: Any, ids: Any) -> Any:
        return (embedding.embedding_backward(target, d_out, ids, words),)

    def torch(d_out: Any, ids: Any) -> Any:
        import torch

        return (torch.ops.aten.embedding_dense_backward(d_out.detach(), ids.long(), words, -1, False),)

    return Case(f"embedding's gradient, {tokens} × {columns} to {words}", [d_out, ids], fused, None, torch,
                4 * columns * (tokens + words))  # fmt: skip


def functional() -> Any:
    import torch

    return torch.nn.functional


# --------------------------------------------------------------------------------------------------------- measuring


def measure(case: Case, rounds: int, seconds: float, with_torch: bool) -> dict[str, Any]:
    """All sides in turn, after they have agreed."""
    arrays = [na.array(x).evaluate() for x in case.inputs]
    compiled = {"fused": na.compile(case.fused)}
    if case.unfused is not None:
        compiled["unfused"] = na.compile(case.unfused)
    sides: dict[str, Callable[[], Any]] = {
        name: lambda step=step: step(*arrays) for name, step in compiled.items()
    }  # fmt: skip
    if with_torch:
        import torch

        tensors = [torch.tensor(x, requires_grad=np.asarray(x).dtype == np.float32 and np.ndim(x) > 0)
                   for x in case.inputs]  # fmt: skip
        sides["torch"] = lambda: case.torch(*tensors)
    results = {name: [np.asarray(x) for x in side()] for name, side in sides.items()}
    for name, found in results.items():
        for one, other in zip(found, results["fused"]):
            error = np.abs(one - other).max() / np.abs(other).max()
            if not error <= TOLERANCE:
                raise SystemExit(f"{case.name}: {name} and fused differ by {error:.1e}, expected {TOLERANCE:.0e}")
    del results
    memory = {name: step.program.arena.nbytes if step.program.arena else 0 for name, step in compiled.items()}
    times = alternate(sides, rounds, seconds)
    return {"name": case.name, "nbytes": case.nbytes, "operations": case.operations, "memory_bytes": memory,
            "seconds": times, "median_s": {name: median(found) for name, found in times.items()}}  # fmt: skip


HEAD = ["case", "fused", "rate", "unfused", "ratio", "memory", "unfused", "PyTorch", "ratio"]


def row(result: dict[str, Any]) -> list[str]:
    times, memory = result["median_s"], result["memory_bytes"]
    rate, unit = (result["operations"], "GFLOP/s") if result["operations"] else (result["nbytes"], "GB/s")

    def beside(name: str) -> list[str]:
        if name not in times:
            return [NOT_MEASURED] * 2
        return [f"{times[name] * 1e3:.2f} ms", f"{times[name] / times['fused']:.2f}×"]

    kept = [f"{memory[name] / 1e6:.1f} MB" if name in memory else NOT_MEASURED for name in ("fused", "unfused")]
    return [result["name"], f"{times['fused'] * 1e3:.2f} ms", f"{rate / times['fused'] / 1e9:.0f} {unit}",
            *beside("unfused"), *kept, *beside("torch")]  # fmt: skip


def main() -> None:
    options = parser("The fused kernels of training beside unfused ones and PyTorch's.")
    options.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(cases(True, 'cpu'))} (default: all)")
    options.add_argument("--device", default="cpu", help="default: cpu")
    options.add_argument("--rounds", type=int, default=7, help="default: 7")
    options.add_argument("--seconds", type=float, default=0.2, help="for one side in one round (default: 0.2)")
    options.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    given = options.parse_args()
    on_cpu = given.device == "cpu"
    nitinol.set_device(nitinol.CpuDevice(given.threads) if on_cpu else given.device)
    if on_cpu:
        import torch

        torch.set_num_threads(nitinol.get_device().threads)
    makers = cases(given.quick, given.device)
    unknown = [name for name in given.cases if name not in makers]
    if unknown:
        options.error(f"there is no case {unknown[0]!r}; choose from {', '.join(makers)}")
    print(describe(machine()), file=sys.stderr)
    rng, results = np.random.default_rng(), []
    for name in given.cases or makers:
        results.append(measure(makers[name](rng), given.rounds, 0.001 if given.quick else given.seconds, on_cpu))
        print(f"{results[-1]['name']}: {results[-1]['median_s']}", file=sys.stderr)
    print(table(HEAD, [row(result) for result in results]))
    print(unsteady({f"{result['name']}, {side}": times for result in results
                    for side, times in result["seconds"].items()}))  # fmt: skip
    write_json(given.json, {"benchmark": "training_kernels", "device": given.device, "results": results})


if __name__ == "__main__":
    main()

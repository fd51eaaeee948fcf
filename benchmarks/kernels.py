#!/usr/bin/env python
"""The library's kernels beside PyTorch's: the same inputs, threads and machine, in turn, medians of several rounds.

    python benchmarks/kernels.py [--threads N] [--rounds N] [--quick] [--json FILE] [CASE ...]

Each side runs as its users run it: Nitinol as a compiled function of arrays, whose outputs have their buffers;
PyTorch in eager mode, with `out=` where it has that, and where it has several ways, the fastest here; where it has no
`out=`, its results reuse memory of earlier ones. With --compile also as `torch.compile` has it, which needs a C++
compiler. All results are compared with float64 first. A time includes everything from the call to its return.

The floor of a case is what the machine needs at least: bytes read and written over the measured speed of a hand-written
loop (limits.py), or operations over the measured peak of the multiply-add units (nitinol.runtime.peak). Cases that fit
the caches have no floor of the first kind. The loop runs before and after its case, on as many bytes: the memory of a
virtual machine may become twice as fast from one minute to the next.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from common import (
    NOT_MEASURED,
    alternate,
    describe,
    machine,
    median,
    parser,
    percent,
    seconds_per_call,
    table,
    unsteady,
    write_json,
)
from limits import stream_bandwidth

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt
IN_CACHE = 24 << 20  # bytes: less than the last cache of most servers, more than that of a small machine


@dataclass
class Case:
    """One operation on one size. nbytes: read and written; operations: multiplications and additions.

    tolerance: of the largest error against float64, relative to the largest value of the result."""

    name: str
    function: Callable[..., Any]  # of nitinol Arrays
    inputs: list[np.ndarray]
    reference: Callable[..., np.ndarray]  # in float64
    peers: dict[str, Callable[[], Any]]  # PyTorch's ways; the last is what torch.compile gets
    nbytes: int
    operations: int
    reads: int  # streams that are read
    tolerance: float


def cases(quick: bool) -> dict[str, Callable[[np.random.Generator], Case]]:
    """By name; quick: sizes that take no time, for trying out."""
    shrink = 64 if quick else 1
    return {
        "add": lambda rng: add(rng, 1 << (16 if quick else 25)),
        "softmax": lambda rng: softmax(rng, 8192 // shrink, 2000),
        "softmax-cache": lambda rng: softmax(rng, 512 // shrink, 2000),
        "rms_norm": lambda rng: rms_norm(rng, 8192 // shrink, 2048),
        "rms_norm-cache": lambda rng: rms_norm(rng, 512 // shrink, 2048),
        "layer_norm": lambda rng: layer_norm(rng, 8192 // shrink, 2048),
        "layer_norm-cache": lambda rng: layer_norm(rng, 512 // shrink, 2048),
        "matmul-1024": lambda rng: matmul(rng, 64 if quick else 1024),
        "matmul-2048": lambda rng: matmul(rng, 128 if quick else 2048),
        "attention": lambda rng: attention(rng, 8, 64 if quick else 2048, 64),
    }


# ------------------------------------------------------------------------------------------------------------- cases


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def add(rng: np.random.Generator, n: int) -> Case:
    import torch

    x, y = normal(rng, n), normal(rng, n)
    a, b, out = tensors(x, y, np.empty_like(x))
    return Case(f"vector add, {n / 2**20:g} Mi", lambda x, y: x + y, [x, y], lambda x, y: x + y,
                {"add(out=)": lambda: torch.add(a, b, out=out)}, 12 * n, n, 2, 1e-6)


def softmax(rng: np.random.Generator, rows: int, columns: int) -> Case:
    import torch

    from nitinol.ops.softmax import softmax

    x = normal(rng, rows, columns)
    a, out = tensors(x, np.empty_like(x))

    def reference(x: np.ndarray) -> np.ndarray:
        power = np.exp(x - x.max(axis=-1, keepdims=True))
        return power / power.sum(axis=-1, keepdims=True)

    return Case(f"softmax, {rows} × {columns}", softmax, [x], reference,
                {"softmax(out=)": lambda: torch.softmax(a, -1, out=out), "softmax": lambda: torch.softmax(a, -1)},
                8 * x.size, 5 * x.size, 1, 1e-5)


def rms_norm(rng: np.random.Generator, rows: int, columns: int) -> Case:
    import torch

    from nitinol.ops.norm import rms_norm, rms_norm_reference

    x, weight = normal(rng, rows, columns), normal(rng, columns)
    a, w = tensors(x, weight)
    return Case(f"RMSNorm, {rows} × {columns}", lambda x, weight: rms_norm(x, weight, 1e-5), [x, weight],
                lambda x, weight: rms_norm_reference(x, weight, epsilon=1e-5),
                {"rms_norm": lambda: torch.nn.functional.rms_norm(a, (columns,), w, 1e-5)},
                8 * x.size, 4 * x.size, 1, 1e-5)


def layer_norm(rng: np.random.Generator, rows: int, columns: int) -> Case:
    import torch

    from nitinol.ops.norm import layer_norm, layer_norm_reference

    x, weight, bias = normal(rng, rows, columns), normal(rng, columns), normal(rng, columns)
    a, w, b, out = tensors(x, weight, bias, np.empty_like(x))
    mean, scale = torch.empty(rows, 1), torch.empty(rows, 1)
    native = torch.ops.aten.native_layer_norm.out
    return Case(f"layer norm, {rows} × {columns}", lambda x, w, b: layer_norm(x, w, b, 1e-5), [x, weight, bias],
                lambda x, w, b: layer_norm_reference(x, w, b, epsilon=1e-5),
                {"native_layer_norm(out=)": lambda: native(a, [columns], w, b, 1e-5, out0=out, out1=mean, out2=scale),
                 "layer_norm": lambda: torch.nn.functional.layer_norm(a, (columns,), w, b, 1e-5)},
                8 * x.size, 8 * x.size, 1, 1e-5)


def matmul(rng: np.random.Generator, n: int) -> Case:
    import torch

    import nitinol

    x, y = normal(rng, n, n), normal(rng, n, n)
    a, b, out = tensors(x, y, np.empty_like(x))
    # Sums of n products, in fp32: errors grow about as √n · 6e-8, values as √n.
    return Case(f"matmul, {n}³", nitinol.matmul, [x, y], lambda x, y: x @ y,
                {"matmul(out=)": lambda: torch.matmul(a, b, out=out)}, 12 * n * n, 2 * n**3, 2, 1e-5)


def attention(rng: np.random.Generator, heads: int, tokens: int, head_dim: int) -> Case:
    import torch

    from nitinol.ops.attention import attention_reference, causal_attention

    q, k, v = (normal(rng, heads, tokens, head_dim) for _ in range(3))
    a, b, c = (x[None] for x in tensors(q, k, v))
    # Half of all pairs of positions, with the diagonal: a product each for scores and values.
    operations = 4 * heads * head_dim * tokens * (tokens + 1) // 2
    attend = torch.nn.functional.scaled_dot_product_attention
    return Case(f"causal attention, {heads} × {tokens} × {head_dim}", causal_attention, [q, k, v],
                lambda q, k, v: attention_reference(q, k, v, 0, head_dim**-0.5),
                {"scaled_dot_product_attention": lambda: attend(a, b, c, is_causal=True)},
                16 * q.size, operations, 3, 1e-5)


def keep_freed_memory() -> None:
    """Lets PyTorch's results reuse memory that it had before, on huge pages; before PyTorch is imported.

    glibc gives blocks above 32 MiB back to the system at once, so that every call without `out=` pays for fresh pages:
    most of the time of its norms on large arrays (layer norm of 8192 × 2048: 24 ms instead of less than 10). Ours are
    compiled with their results' buffers, so PyTorch shall not pay for that either."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def tensors(*arrays: np.ndarray) -> list[Any]:
    """The same memory for PyTorch: NumPy puts large arrays on huge pages, as Nitinol does."""
    import torch

    return [torch.from_numpy(array) for array in arrays]


# ---------------------------------------------------------------------------------------------------------- measuring


def measure(case: Case, rounds: int, seconds: float, with_compile: bool = False) -> dict[str, Any]:
    """Checks all sides, then times them in turn; the limit of memory before and after, if that is what counts."""
    import nitinol

    arrays = [nitinol.from_numpy(x) for x in case.inputs]
    compiled = nitinol.compile(case.function)
    reference = case.reference(*(x.astype(np.float64) for x in case.inputs))
    errors = {"nitinol": error(compiled(*arrays).numpy(), reference)}
    best = min(case.peers, key=lambda name: min(seconds_per_call(case.peers[name], 1) for _ in range(3)))
    sides = {"nitinol": lambda: compiled(*arrays), "torch": case.peers[best]}
    peers = dict(case.peers)
    if with_compile:
        import torch

        sides["torch.compile"] = peers["torch.compile"] = torch.compile(list(case.peers.values())[-1])
    for name, peer in peers.items():
        result = peer()
        result = result[0] if isinstance(result, tuple) else result
        errors[name] = error(result.numpy().reshape(reference.shape), reference)
    for name, found in errors.items():
        if not found <= case.tolerance:
            raise SystemExit(f"{case.name}: {name} is wrong by {found:.2g} of the largest value, more than "
                             f"{case.tolerance:g}; no time is worth reporting")  # fmt: skip
    del reference
    result: dict[str, Any] = {"name": case.name, "nbytes": case.nbytes, "operations": case.operations,
                              "reads": case.reads, "peer": best, "errors": errors}  # fmt: skip
    of_memory = case.nbytes > IN_CACHE and not computes(result)

    def limits() -> list[dict[str, float]]:
        streams = case.nbytes // (case.reads + 1)
        return [stream_bandwidth(nitinol.get_device(), case.reads, streams)] if of_memory else []

    found = limits()
    times = alternate(sides, rounds, seconds)
    if found := found + limits():
        result["stream_gb_s"] = {kind: max(one[kind] for one in found) for kind in found[0]}
    return {**result, "seconds": times, "median_s": {name: median(found) for name, found in times.items()}}


def error(result: np.ndarray, reference: np.ndarray) -> float:
    return float(np.abs(result - reference).max() / np.abs(reference).max())


def computes(result: dict[str, Any]) -> bool:
    """Whether multiplying is what takes time: no machine does 10 operations in the time of a byte from memory."""
    return result["operations"] / result["nbytes"] > 10


def floor(result: dict[str, Any], limits: dict[str, float]) -> float | None:
    """The least time in seconds; None for what fits the caches and computes little."""
    if computes(result):
        return result["operations"] / limits["float32_gflop_s"] / 1e9
    return result["nbytes"] / max(result["stream_gb_s"].values()) / 1e9 if "stream_gb_s" in result else None


def rows(results: list[dict[str, Any]], limits: dict[str, float]) -> list[list[str]]:
    found = []
    for result in results:
        least = floor(result, limits)
        ours, theirs = result["median_s"]["nitinol"], result["median_s"]["torch"]
        rate, unit = (result["operations"], "GFLOP/s") if computes(result) else (result["nbytes"], "GB/s")
        found.append([
            result["name"], f"{least * 1e3:.2f} ms" if least else NOT_MEASURED, f"{ours * 1e3:.2f} ms",
            f"{rate / ours / 1e9:.0f} {unit}", percent(least, ours), f"{theirs * 1e3:.2f} ms", f"{theirs / ours:.2f}×",
            *(f"{time / ours:.2f}×" for name, time in result["median_s"].items() if name == "torch.compile"),
        ])  # fmt: skip
    return found


HEAD = ["case", "floor", "Nitinol", "rate", "of the floor's rate", "PyTorch", "ratio"]
COMPILED = "ratio, torch.compile"


def render(document: dict[str, Any]) -> str:
    """The tables for docs/performance.md."""
    limits = document["limits"]
    streams = "; ".join(
        f"{result['name']}, " + ", ".join(f"{kind} stores {rate:.1f}" for kind, rate in result["stream_gb_s"].items())
        for result in document["results"] if "stream_gb_s" in result)  # fmt: skip
    return "\n".join([
        table(HEAD + [COMPILED] * ("torch.compile" in document["results"][0]["median_s"]),
              rows(document["results"], limits)), "",
        f"Limits, {document['threads']} threads: {limits['float32_gflop_s']:.0f} GFLOP/s of fp32 multiply-add"
        + (f"; GB/s of a loop with the same streams: {streams}." if streams else "."),
        unsteady({f"{result['name']}, {side}": times for result in document["results"]
                  for side, times in result["seconds"].items()}),
    ])  # fmt: skip


def main() -> None:
    options = parser("The library's kernels beside PyTorch's.")
    options.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(cases(False))} (default: all)")
    options.add_argument("--rounds", type=int, default=9, help="default: 9")
    options.add_argument("--seconds", type=float, default=0.15, help="for one side in one round (default: 0.15)")
    options.add_argument("--compile", action="store_true", help="also against torch.compile")
    options.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    given = options.parse_args()
    keep_freed_memory()
    try:
        import torch
    except ImportError:
        raise SystemExit("this comparison needs PyTorch: pip install torch==2.13.0") from None
    import nitinol
    from nitinol.runtime.peak import measure_peak_rates

    device = nitinol.CpuDevice(given.threads)
    nitinol.set_device(device)
    torch.set_num_threads(device.threads)
    makers = cases(given.quick)
    unknown = [name for name in given.cases if name not in makers]
    if unknown:
        options.error(f"there is no case {unknown[0]!r}; choose from {', '.join(makers)}")
    print(describe(machine()) + f"; {device.threads} threads", file=sys.stderr)
    rng, results = np.random.default_rng(), []
    for name in given.cases or makers:
        results.append(measure(makers[name](rng), given.rounds, 0.001 if given.quick else given.seconds,
                               given.compile))
        print(f"{results[-1]['name']}: {results[-1]['median_s']}", file=sys.stderr)
    limits = {"float32_gflop_s": measure_peak_rates(device)["float32"]}
    document = {"benchmark": "kernels", "threads": device.threads, "limits": limits, "results": results}
    print(render(document))
    write_json(given.json, document)


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""The sampler, one kernel, beside the same as PyTorch's operations in a row, as model libraries write it.

    python benchmarks/sampling.py [--threads N] [--rounds N] [--quick] [--json FILE]

Both take turns on the same logits (random, spread like a language model's) on the CPU, for one sequence: temperature
0.7 alone, with top-p 0.95, and with top-k 40. Before the timing, the kernel's tokens of many draws must lie among those
that PyTorch keeps, and the likeliest near its frequency.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from common import alternate, describe, machine, median, parser, table, unsteady, write_json

import nitinol
import nitinol as na
from nitinol.ops.sampling import SamplingState, sample

TEMPERATURE = 0.7
CASES = {"temperature": (1.0, 0), "top-p 0.95": (0.95, 0), "top-k 40": (1.0, 40)}  # top_p, top_k


def state_of(top_p: float, top_k: int, seed: int = 1) -> SamplingState:
    return SamplingState(
        na.array(np.zeros(1, np.int32)), na.array(np.zeros(1, np.int32)), na.array(np.zeros((1, 4096), np.int32)),
        na.array(np.array([[TEMPERATURE, top_p, 0, 1]], np.float32)), na.array(np.array([[seed, top_k, 0]], np.int64)),
    )  # fmt: skip


def kept(z: torch.Tensor, top_p: float, top_k: int) -> torch.Tensor:
    """The probabilities from which to choose."""
    z = z / TEMPERATURE
    if top_k:
        z = z.masked_fill(z < torch.topk(z, min(top_k, len(z))).values[-1], -torch.inf)
    if top_p < 1:
        ordered, places = torch.sort(z, descending=True)
        p = torch.softmax(ordered, 0)
        dropped = torch.zeros_like(z, dtype=torch.bool).scatter(0, places, torch.cumsum(p, 0) - p >= top_p)
        z = z.masked_fill(dropped, -torch.inf)
    return torch.softmax(z, 0)


def check(logits: np.ndarray, top_p: float, top_k: int, draws: int = 400) -> None:
    """SystemExit if the kernel draws what PyTorch does not keep, or the likeliest token far too often or seldom."""
    p = kept(torch.from_numpy(logits), top_p, top_k).numpy().astype(np.float64)
    p /= p.sum()
    state, z = state_of(top_p, top_k), na.array(logits[None])
    tokens = []
    for _ in range(draws):
        sample(z, state)
        tokens.append(int(state.token.numpy()[0]))
    if not (p[tokens] > 0).all():
        raise SystemExit(f"top_p {top_p}, top_k {top_k}: the sampler chose a token that is not kept")
    best = int(p.argmax())
    found, spread = tokens.count(best) / draws, 5 * np.sqrt(p[best] * (1 - p[best]) / draws)
    if abs(found - p[best]) > spread:
        raise SystemExit(f"top_p {top_p}, top_k {top_k}: the likeliest token came {found:.3f} of the time, expected "
                         f"{p[best]:.3f} ± {spread:.3f}")  # fmt: skip


def measure(name: str, vocabulary: int, rounds: int, seconds: float) -> dict[str, Any]:
    top_p, top_k = CASES[name]
    logits = (np.random.default_rng().standard_normal(vocabulary) * 2.5).astype(np.float32)
    check(logits, top_p, top_k)
    state, z, tensor = state_of(top_p, top_k), na.array(logits[None]).evaluate(), torch.from_numpy(logits)

    def fused(z: Any, token: Any, history: Any, options: Any, limits: Any) -> Any:
        now = SamplingState(token, na.zeros((1,), "int32"), history, options, limits)
        sample(z, now)
        return now.token

    step = na.compile(fused)
    operands = (z, state.token, state.history, state.options, state.limits)
    times = alternate({
        "nitinol": lambda: step(*operands), "torch": lambda: torch.multinomial(kept(tensor, top_p, top_k), 1)
    }, rounds, seconds)  # fmt: skip
    return {"name": f"{name}, {vocabulary} tokens", "seconds": times,
            "median_s": {side: median(found) for side, found in times.items()}}  # fmt: skip


def main() -> None:
    options = parser(str(__doc__).partition("\n")[0])
    options.add_argument("--rounds", type=int, default=7, help="default: 7")
    options.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    given = options.parse_args()
    nitinol.set_device(nitinol.CpuDevice(given.threads))
    torch.set_num_threads(nitinol.get_device().threads)
    print(describe(machine()), file=sys.stderr)
    results = [
        measure(name, vocabulary, given.rounds, 0.01 if given.quick else 0.2)
        for vocabulary in ((100,) if given.quick else (32_000, 128_256)) for name in CASES
    ]  # fmt: skip
    rows = []
    for result in results:
        ours, theirs = result["median_s"]["nitinol"], result["median_s"]["torch"]
        rows.append([result["name"], f"{ours * 1e6:.0f} µs", f"{theirs * 1e6:.0f} µs", f"{theirs / ours:.1f}×"])
    print(table(["sampling", "one kernel", "PyTorch", "ratio"], rows))
    print(unsteady({f"{r['name']}, {side}": t for r in results for side, t in r["seconds"].items()}))
    write_json(given.json, {"device": "cpu", "results": results})


if __name__ == "__main__":
    main()

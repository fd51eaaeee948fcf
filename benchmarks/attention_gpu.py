"""FlashAttention for training on an NVIDIA GPU, forward and backward, against PyTorch's fused attention (its
FlashAttention and cuDNN backends) and, with --unfused, against the composition of Nitinol's own operations.

    python benchmarks/attention_gpu.py [--tokens 4096] [--heads 32] [--head-dims 64 128] [--batch 2] [--unfused]

bfloat16; both sides have the same values. Sides alternate; figures are medians of the rounds, of calls between two
synchronisations of milliseconds each. Nitinol's results are compared with PyTorch's first. Needs torch with CUDA.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from common import command, parser, table, write_json

CALLS = 5  # between two synchronisations


def main() -> None:
    import torch

    from nitinol.runtime import set_device

    options = parser(__doc__ or "", threads=False)
    options.add_argument("--tokens", type=int, nargs="+", default=[4096])
    options.add_argument("--heads", type=int, default=32)
    options.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    options.add_argument("--batch", type=int, default=2)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--unfused", action="store_true", help="also the composition of Nitinol's operations")
    chosen = options.parse_args()
    set_device("cuda")
    rows, results = [], []
    for tokens in chosen.tokens:
        for head_dim in chosen.head_dims:
            for causal in (True, False):
                shape = (chosen.batch, chosen.heads, tokens, head_dim)
                sides = cases(shape, causal, chosen.unfused)
                found: dict[str, list[float]] = {name: [] for name in sides}
                for _ in range(chosen.rounds):
                    for name, call in sides.items():
                        found[name].append(seconds(torch, call))
                middle = {name: statistics.median(times) for name, times in found.items()}
                results.append({"shape": shape, "causal": causal, "seconds": found})
                for way in ("forward", "backward"):
                    ours = middle[f"nitinol {way}"]
                    others = {n: m for n, m in middle.items() if n.endswith(way) and not n.startswith("nitinol")}
                    rows.append([f"{tokens} x {head_dim}, {'causal' if causal else 'full'}, {way}",
                                 f"{ours * 1e3:.2f} ms",
                                 *(f"{others[n] * 1e3:.2f} ms, {others[n] / ours:.2f}x" if n in others else ""
                                   for n in (f"flash {way}", f"cudnn {way}", f"unfused {way}"))])  # fmt: skip
    print(torch.cuda.get_device_name(), "torch", torch.__version__, command())
    print(table(["tokens x head_dim", "Nitinol", "FlashAttention", "cuDNN", "unfused"], rows))
    write_json(chosen.json, {"attention": results})


def seconds(torch: Any, call: Callable[[], Any]) -> float:
    call()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(CALLS):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - begun) / CALLS


def cases(shape: tuple[int, ...], causal: bool, unfused: bool) -> dict[str, Callable[[], Any]]:
    """The sides of one comparison."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    import nitinol
    from nitinol.ops.flash_attention import attention_backward, attention_forward

    attend = torch.nn.functional.scaled_dot_product_attention
    tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    d_out = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    q, k, v, g = (nitinol.from_dlpack(t.detach()) for t in (*tensors, d_out))
    forward = nitinol.compile(lambda q, k, v: attention_forward("cuda", q, k, v, causal=causal))
    backward = nitinol.compile(lambda *operands: attention_backward("cuda", *operands, causal=causal))
    out, lse = (x.evaluate() for x in forward(q, k, v))
    sides: dict[str, Callable[[], Any]] = {
        "nitinol forward": lambda: forward(q, k, v), "nitinol backward": lambda: backward(q, k, v, out, lse, g),
    }  # fmt: skip
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        try:
            with sdpa_kernel(backend):
                result = attend(*tensors, is_causal=causal)
        except RuntimeError:  # not in this build
            continue
        theirs = torch.autograd.grad(result, tensors, d_out, retain_graph=True)
        compare(torch, backward(q, k, v, out, lse, g), theirs)

        def run_forward(backend: Any = backend) -> Any:
            with sdpa_kernel(backend), torch.no_grad():
                return attend(*tensors, is_causal=causal)

        sides[f"{name} forward"] = run_forward
        sides[f"{name} backward"] = lambda result=result: torch.autograd.grad(
            result, tensors, d_out, retain_graph=True)  # fmt: skip
    if unfused:
        scale = shape[-1] ** -0.5

        def composed(q: Any, k: Any, v: Any) -> Any:
            scores = (q @ k.mT) * scale
            if causal:
                scores = nitinol.where(nitinol.tril(nitinol.ones(scores.shape[-2:])) > 0, scores, float("-inf"))
            return nitinol.softmax(scores) @ v

        plain = nitinol.compile(composed)
        sides["unfused forward"] = lambda: plain(q, k, v)
    return sides


def compare(torch: Any, ours: Any, theirs: Any) -> None:
    """AssertionError where gradients differ by more than products of bfloat16 do: 2^-8 a product, averaged."""
    for a, b in zip(ours, theirs):
        a, b = torch.from_dlpack(a).float(), b.float()
        error = ((a - b).norm() / b.norm()).item()
        assert error < 5e-3, f"gradients differ by {error:.2g}"


if __name__ == "__main__":
    main()

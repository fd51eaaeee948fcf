"""FlashAttention for training, forward and backward, against PyTorch's scaled_dot_product_attention and against its
unfused composition (product, softmax, product), on this machine's CPU.

    python benchmarks/attention.py [--tokens 1024 4096] [--heads 8] [--head-dims 64 128] [--dtype float32] [--unfused]

Sides alternate; figures are medians of the rounds. GF/s count the products: 4 T^2 head_dim a head forward and 2.5 times
that backward, half of them where it is causal. The peak is what the matrix product of 1024 x 1024 reaches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from common import alternate, command, describe, machine, median, parser, table, unsteady, write_json


def main() -> None:
    import torch

    options = parser(__doc__ or "")
    options.add_argument("--tokens", type=int, nargs="+", default=[1024])
    options.add_argument("--heads", type=int, default=8)
    options.add_argument("--head-dims", type=int, nargs="+", default=[64])
    options.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--unfused", action="store_true", help="also the composition of Nitinol's operations")
    chosen = options.parse_args()
    facts = machine()
    torch.set_num_threads(chosen.threads or facts["cores"])
    if chosen.threads:
        from nitinol.runtime import set_device
        from nitinol.runtime.cpu import CpuDevice

        set_device(CpuDevice(threads=chosen.threads))
    print(describe(facts))
    rows, times, results = [], {}, []
    for tokens in chosen.tokens:
        for head_dim in chosen.head_dims:
            for causal in (False, True):
                name = f"{chosen.heads} x {tokens} x {head_dim}, {'causal' if causal else 'full'}"
                sides = cases(chosen.heads, tokens, head_dim, causal, chosen.dtype, chosen.unfused)
                seconds = alternate(sides, chosen.rounds, 0.1)
                middle = {side: median(found) for side, found in seconds.items()}
                times.update({f"{name}, {side}": found for side, found in seconds.items()})
                results.append({"case": name, "dtype": chosen.dtype, "seconds": seconds})
                products = 4e-9 * chosen.heads * tokens**2 * head_dim * (0.5 if causal else 1)
                for label, other, factor in (("forward", "forward", 1.0), ("backward", "backward", 2.5)):
                    ours, theirs = middle[f"nitinol {label}"], middle[f"torch {other}"]
                    rows.append([f"{name}, {label}", f"{ours * 1e3:.1f} ms", f"{theirs * 1e3:.1f} ms",
                                 f"{theirs / ours:.2f}", f"{products * factor / ours:.0f}"])  # fmt: skip
                if chosen.unfused:
                    ours, theirs = middle["nitinol forward"], middle["unfused"]
                    rows.append([f"{name}, unfused", f"{ours * 1e3:.1f} ms", f"{theirs * 1e3:.1f} ms",
                                 f"{theirs / ours:.2f}", f"{products / ours:.0f}"])  # fmt: skip
    print(table([f"heads x tokens x head_dim, {chosen.dtype}", "Nitinol", "other", "ratio", "GF/s"], rows))
    print(f"Peak: {peak():.0f} GF/s (fp32). {command()}")
    print(unsteady(times))
    write_json(chosen.json, {"attention": results})


def cases(
    heads: int, tokens: int, head_dim: int, causal: bool, dtype: str, unfused: bool
) -> dict[str, Callable[[], Any]]:
    """The sides of one comparison; both have the same values, and must agree on the result."""
    import torch

    import nitinol as na
    from nitinol.ops.flash_attention import attention_backward, attention_forward

    rng = np.random.default_rng()
    values = [rng.normal(size=(1, heads, tokens, head_dim)).astype(np.float32) for _ in range(4)]
    q, k, v, d_out = (na.array(x).astype(dtype).evaluate() for x in values)
    tensors = [torch.from_numpy(x).to(getattr(torch, dtype)).requires_grad_() for x in values[:3]]
    d_tensor = torch.from_numpy(values[3]).to(getattr(torch, dtype))
    attend = torch.nn.functional.scaled_dot_product_attention
    result = attend(*tensors, is_causal=causal)
    out, lse = (x.evaluate() for x in attention_forward("cpu", q, k, v, causal=causal))
    np.testing.assert_allclose(out.astype("float32").numpy(), result.detach().float().numpy(), atol=0.05)

    def without_gradients() -> Any:
        with torch.no_grad():
            return attend(*tensors, is_causal=causal)

    def backward() -> None:
        for gradient in attention_backward("cpu", q, k, v, out, lse, d_out, causal=causal):
            gradient.evaluate()

    sides = {
        "nitinol forward": lambda: attention_forward("cpu", q, k, v, causal=causal)[0].evaluate(),
        "torch forward": without_gradients,
        "nitinol backward": backward,
        "torch backward": lambda: torch.autograd.grad(result, tensors, d_tensor, retain_graph=True),
    }
    if unfused:
        sides["unfused"] = lambda: composition(q[0], k[0], v[0], causal).evaluate()
    return sides


def composition(q: Any, k: Any, v: Any, causal: bool) -> Any:
    """The same of operations that leave all scores in memory."""
    import nitinol as na
    from nitinol.ops.matmul import matmul
    from nitinol.ops.softmax import softmax

    scores = matmul(q, k.swapaxes(1, 2)) * q.shape[-1] ** -0.5
    if causal:
        place = na.arange(q.shape[1])
        scores = na.where(place[None, :] <= place[:, None], scores, float("-inf"))
    return matmul(softmax(scores), v)


def peak() -> float:
    """GF/s of a matrix product in fp32, what a kernel of products can reach at most."""
    import nitinol as na
    from nitinol.ops.matmul import matmul

    a, b = (na.array(np.random.default_rng().normal(size=(1024, 1024)).astype(np.float32)).evaluate() for _ in "ab")
    return 2e-9 * 1024**3 / min(alternate({"product": lambda: matmul(a, b).evaluate()}, 3, 0.1)["product"])


if __name__ == "__main__":
    main()

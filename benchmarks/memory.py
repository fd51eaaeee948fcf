#!/usr/bin/env python
"""Peak memory of a generation, and what one token costs in allocations and in Python.

    python benchmarks/memory.py [--threads N] [--context N] [--json FILE] [MODEL ...]

Each model (default: the files that against_llama_cpp.py uses) runs in a fresh process: a prompt of 512 tokens, then 64
tokens of text by `model.generate`, as `nitinol run` does it. Peak memory is what the system says (VmHWM), mapped
weights included, and is held against the file's size, the attention cache and 300 MB for everything else.

The steady state begins after 8 tokens. From there on: allocations and reuses of pooled memory by the device's
counters, and the time from the end of one command list to the start of the next, which is all of Python's: choosing
the list, the text of the token, the loop.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import ROOT, describe, machine, median, parser, table, write_json

OTHER_BYTES = 300_000_000  # Python, LLVM, machine code, tokenizer, activations
WARM_TOKENS = 8
COUNTED = ("submits", "waits", "allocations", "pool_hits")


class TimedExecutor:
    """The device's native executor, noting for each command list the seconds inside and those in Python before."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor
        self._left = 0.0  # when the native code was left
        self.lists: list[list[float]] = []  # [inside, outside]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def run(self, *arguments: int) -> int:
        self.lists.append([0.0, 0.0])
        return self._timed(self._executor.run, arguments)

    def wait(self, *arguments: int) -> None:  # after 50 ms `run` comes back and the device goes on waiting
        self._timed(self._executor.wait, arguments)

    def _timed(self, function: Any, arguments: tuple[int, ...]) -> Any:
        begun = time.perf_counter()
        self.lists[-1][1] += begun - self._left
        result = function(*arguments)
        self._left = time.perf_counter()
        self.lists[-1][0] += self._left - begun
        return result


def measure(path: str, threads: int | None, context: int, prompt: int, gen: int) -> dict[str, Any]:
    """In this process; the peak includes whatever has been done here before."""
    from nitinol.commands.run import peak_rss_bytes
    from nitinol.generate.model import load
    from nitinol.models.memory import cache_bytes_per_token

    model = load(path, threads=threads, context=context)
    device = model.device
    loaded = peak_rss_bytes()
    ids = [(i * 7919 + 1) % (model.config.vocab * 3 // 4) for i in range(prompt)]  # few of these are control tokens
    generation = model.generate(ids, max_tokens=WARM_TOKENS + gen)
    pieces = iter(generation)
    while len(generation.tokens) <= WARM_TOKENS and next(pieces, None) is not None:
        pass
    executor = device._executor = TimedExecutor(device._executor)
    before, first = {key: getattr(device.counters, key) for key in COUNTED}, len(generation.tokens)
    for _ in pieces:
        pass
    tokens = len(generation.tokens) - first
    if tokens < 2:
        raise SystemExit(f"the model ended after {len(generation.tokens)} tokens, before there is a steady state")
    counters = {key: (getattr(device.counters, key) - before[key]) / tokens for key in COUNTED}
    inside, between = zip(*executor.lists[1:])
    return {
        "name": Path(path).stem, "file_bytes": sum(len(part) for part in model.file.parts), "context": context,
        "prompt": prompt, "tokens": tokens, "cache_bytes": context * cache_bytes_per_token(model.config),
        "loaded_rss_bytes": loaded, "peak_rss_bytes": peak_rss_bytes(), "per_token": counters,
        "between_lists_ms": [1e3 * seconds for seconds in between], "python_ms": 1e3 * median(between),
        "python_max_ms": 1e3 * max(between), "native_ms": 1e3 * median(inside),
    }  # fmt: skip


MEMORY_HEAD = ["model", "file", "cache", "limit", "peak", "beyond file and cache"]
TOKEN_HEAD = ["model", "submissions", "waits", "allocations", "pool reuses", "Python", "largest", "device"]


def render(document: dict[str, Any]) -> str:
    """The tables for docs/performance.md."""
    memory, token = [], []
    for r in document["results"]:
        known = r["file_bytes"] + r["cache_bytes"]
        megabytes = (r["file_bytes"], r["cache_bytes"], known + OTHER_BYTES, r["peak_rss_bytes"],
                     r["peak_rss_bytes"] - known)  # fmt: skip
        memory.append([f"{r['name']}, context {r['context']}", *(f"{x / 1e6:.0f} MB" for x in megabytes)])
        token.append([r["name"], *(f"{r['per_token'][key]:g}" for key in COUNTED),
                      *(f"{r[key]:.3f} ms" for key in ("python_ms", "python_max_ms", "native_ms"))])
    return "\n".join([table(MEMORY_HEAD, memory), "", "For each token in the steady state:", "",
                      table(TOKEN_HEAD, token)])  # fmt: skip


def main() -> None:
    options = parser("Peak memory of a generation, and what a token costs in allocations and in Python.")
    options.add_argument("models", nargs="*", metavar="MODEL", help="paths, or demo")
    options.add_argument("--context", type=int, default=1024, help="default: 1024")
    options.add_argument("--prompt", type=int, default=512, help="tokens (default: 512)")
    options.add_argument("--gen", type=int, default=64, help="tokens (default: 64)")
    options.add_argument("--here", action="store_true", help="one model in this process; prints its figures as JSON")
    given = options.parse_args()
    models = given.models or [str(ROOT / "models" / f"1b-{format}.gguf") for format in ("Q8_0", "Q4_0", "Q4_K")]
    missing = [path for path in models if path != "demo" and not Path(path).exists()]
    if missing:
        raise SystemExit(f"{missing[0]} is not there; benchmarks/against_llama_cpp.py makes it")
    if given.here:
        print(json.dumps(measure(models[0], given.threads, given.context, given.prompt, given.gen)))
        return
    print(describe(machine()), file=sys.stderr)
    results = []
    for path in models:
        command = [sys.executable, __file__, path, "--here", "--context", str(given.context), "--prompt",
                   str(given.prompt), "--gen", str(given.gen)]  # fmt: skip
        command += ["--threads", str(given.threads)] if given.threads else []
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if child.returncode:
            raise SystemExit(child.returncode)
        results.append(json.loads(child.stdout))
    document = {"benchmark": "memory", "results": results}
    print(render(document))
    write_json(given.json, document)


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Decoding and prefill beside llama.cpp: the same files and threads, in one process, in turn, medians of rounds.

    python benchmarks/against_llama_cpp.py [--formats Q8_0 Q4_0 Q4_K] [--threads N] [--rounds N] [--json FILE]

The files are random models of Llama 3.2 1B's shape, made by tools/make_random_model.py where they are missing. The
other side is the package llama-cpp-python, built for this machine (a ready-made wheel is for an older processor):

    CMAKE_ARGS="-DGGML_NATIVE=ON" pip install llama-cpp-python --no-binary llama-cpp-python

Without it, or where it does not know a format, Nitinol is measured alone. llama.cpp is called as its own llama-bench
does it: `llama_decode` through ctypes with default parameters, no sampling. Nitinol's times include choosing the next
token among the whole vocabulary and everything in Python. Weights and caches are as each program has them by default
(fp16 caches on both sides; llama.cpp rearranges Q4_0 and Q4_K weights when it loads them).

The limit of decoding is memory: every weight is read once a token, and the cache up to the position.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import NOT_MEASURED, PAUSE_S, ROOT, describe, machine, median, parser, percent, table, unsteady, write_json

FORMATS = ("Q8_0", "Q4_0", "Q4_K")


def model_file(folder: Path, preset: str, format: str) -> Path:
    """The random model, made now if it is not there: 1 GB and some 20 s for a 1B model."""
    path = folder / f"{preset.removeprefix('llama-3.2-')}-{format}.gguf"
    if not path.exists():
        sys.path.insert(0, str(ROOT / "tools"))
        import make_random_model as maker

        from nitinol.formats.gguf_writer import write_gguf

        print(f"making {path}", file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        shape = maker.PRESETS[preset]
        part = path.with_suffix(".part")
        write_gguf(part, maker.metadata(shape, format, path.stem), maker.tensors(shape, format, 0))
        part.rename(path)
    return path


# -------------------------------------------------------------------------------------------------------- the two sides


class Nitinol:
    """One model; `prefill` starts anew, `step` adds a token."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        import nitinol.generate.model
        from nitinol.generate.options import Options

        self.model = nitinol.generate.model.load(path, threads=threads, context=context)
        self.options = Options()

    def prefill(self, ids: Sequence[int]) -> None:
        self.model.session.begin(None)
        self.model.session.cache.move(0)
        self.model.session.prefill(ids, self.options)

    def step(self) -> None:
        self.model.session.step()

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        return self.model.logits(ids)[-1]

    def close(self) -> None:
        self.model.device.close()


class LlamaCpp:
    """The same by way of llama.cpp's C interface. Each step takes the same token: which one does not matter."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        import ctypes

        import llama_cpp

        self.c, self._ctypes = llama_cpp, ctypes
        self._silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = context, 512, 512
        parameters.n_threads = parameters.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context of {context} tokens for {path}")

    def prefill(self, ids: Sequence[int]) -> None:
        self.c.llama_memory_clear(self.c.llama_get_memory(self._context), True)
        self._decode(ids)
        self._last = ids[-1]

    def step(self) -> None:
        self._decode([self._last])

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        self.prefill(ids)
        vocab = self.c.llama_vocab_n_tokens(self.c.llama_model_get_vocab(self._model))
        return np.ctypeslib.as_array(self.c.llama_get_logits_ith(self._context, -1), (vocab,)).copy()

    def close(self) -> None:
        self.c.llama_free(self._context)
        self.c.llama_model_free(self._model)

    def _decode(self, ids: Sequence[int]) -> None:
        for start in range(0, len(ids), 512):
            chunk = ids[start:start + 512]
            tokens = (self.c.llama_token * len(chunk))(*chunk)
            if self.c.llama_decode(self._context, self.c.llama_batch_get_one(tokens, len(chunk))):
                raise RuntimeError("llama_decode failed")
            self.c.llama_synchronize(self._context)


def llama_cpp_available(folder: str | None) -> bool:
    """Whether llama-cpp-python can be imported; folder: where it lies, if it is not installed."""
    if folder:
        sys.path.append(folder)  # at the end: its copies of other packages shall not be used
    try:
        import llama_cpp  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        print(f"llama.cpp is not there ({error}); measuring Nitinol alone", file=sys.stderr)
        return False
    return True


# ---------------------------------------------------------------------------------------------------------- measuring


def measure(path: Path, format: str, threads: int, prompts: Sequence[int], gen: int, rounds: int,
            with_peer: bool) -> dict[str, Any]:
    """All rounds of one file: seconds of each prefill and of each `gen` steps after the first, by side."""
    from nitinol.commands.bench import decode_bytes
    from nitinol.runtime.bandwidth import measure_read_bandwidth

    context = max(prompts) + gen
    context += -context % 256
    sides: dict[str, Any] = {"nitinol": Nitinol(path, threads, context)}
    if with_peer:
        sides["llama.cpp"] = LlamaCpp(path, threads, context)
    ours = sides["nitinol"].model
    rng = np.random.default_rng()
    ids = rng.integers(256, ours.config.vocab - 256, max(prompts)).tolist()
    agreement = compare([side.logits(ids[:32]) for side in sides.values()])
    seconds: dict[str, dict[str, list[float]]] = {
        name: {what: [] for what in (*(f"prefill-{n}" for n in prompts), "decode")} for name in sides}
    bandwidths = []

    def timed(name: str, what: str, work: Callable[[], None]) -> None:
        begun = time.perf_counter()
        work()
        seconds[name][what].append(time.perf_counter() - begun)

    def steps(side: Any) -> None:
        for _ in range(gen):
            side.step()

    for side in sides.values():  # compile, map, touch
        for n in prompts:
            side.prefill(ids[:n])
        side.step()
    order = list(sides)
    for _ in range(rounds):
        for name in order:
            side = sides[name]
            time.sleep(PAUSE_S)
            for n in reversed(prompts):  # the shortest last: steps come after it
                timed(name, f"prefill-{n}", lambda side=side, n=n: side.prefill(ids[:n]))  # type: ignore[misc]
            side.step()
            timed(name, "decode", lambda side=side: steps(side))  # type: ignore[misc]
        order.append(order.pop(0))
        time.sleep(PAUSE_S)
        bandwidths.append(measure_read_bandwidth(ours.device))
    result = {
        "format": format, "file_bytes": path.stat().st_size, "prompts": list(prompts), "gen": gen,
        "decode_bytes_per_token": decode_bytes(ours, min(prompts) + 1 + gen / 2), "logits": agreement,
        "read_bandwidth_gb_s": median(bandwidths), "bandwidths_gb_s": bandwidths, "seconds": seconds,
        "tok_s": {name: {what: (gen if what == "decode" else int(what.split("-")[1])) / median(times)
                         for what, times in found.items()} for name, found in seconds.items()},
    }  # fmt: skip
    for side in sides.values():
        side.close()
    return result


def compare(logits: list[np.ndarray]) -> dict[str, float] | None:
    """How alike both sides' logits are: both round activations to 8 bits, differently for K formats. The same model
    gives a correlation near 1; a wrong one would not."""
    if len(logits) < 2:
        return None
    correlation = float(np.corrcoef(logits[0], logits[1])[0, 1])
    if not correlation > 0.98:
        raise SystemExit(f"the logits of both sides have a correlation of {correlation:.3f}: they do not compute the "
                         "same, and no time is worth reporting")
    return {"correlation": correlation}


HEAD = ["case", "floor", "Nitinol", "of the floor's rate", "llama.cpp", "llama.cpp of it", "ratio"]


def render(document: dict[str, Any]) -> str:
    """The tables for docs/performance.md; rates in tokens a second."""
    rows = []
    peak = document["peak_gop_s"]["int8"]
    for result in document["results"]:
        ours, theirs = result["tok_s"]["nitinol"], result["tok_s"].get("llama.cpp", {})
        for what in ("decode", *(f"prefill-{n}" for n in result["prompts"])):
            if what == "decode":
                least = result["read_bandwidth_gb_s"] * 1e9 / result["decode_bytes_per_token"]
            else:
                least = peak * 1e9 / document["operations_per_token"]
            peer = theirs.get(what)
            rows.append([
                f"{result['format']}, {what.replace('-', ' ')}", f"{least:.1f}", f"{ours[what]:.1f}",
                percent(ours[what], least), f"{peer:.1f}" if peer else NOT_MEASURED, percent(peer, least),
                f"{ours[what] / peer:.2f}×" if peer else NOT_MEASURED,
            ])  # fmt: skip
    bandwidth = median([result["read_bandwidth_gb_s"] for result in document["results"]])
    return "\n".join([
        table(HEAD, rows), "",
        f"Tokens a second. Limits, {document['threads']} threads: reading {bandwidth:.1f} GB/s; {peak:.0f} "
        f"GOP/s of int8 products, {document['operations_per_token'] / 1e9:.2f} GOP a token.",
        unsteady({f"{result['format']}, {what}, {side}": times for result in document["results"]
                  for side, found in result["seconds"].items() for what, times in found.items()}),
    ])  # fmt: skip


def main() -> None:
    options = parser("Decoding and prefill beside llama.cpp.")
    options.add_argument("--formats", nargs="+", default=FORMATS, help=f"default: {' '.join(FORMATS)}")
    options.add_argument("--models", type=Path, default=ROOT / "models", help="where the files are (default: models)")
    options.add_argument("--preset", default="llama-3.2-1b", help="of make_random_model.py (default: llama-3.2-1b)")
    options.add_argument("--prompts", type=int, nargs="+", default=(128, 512), help="default: 128 512")
    options.add_argument("--gen", type=int, default=32, help="tokens to decode (default: 32)")
    options.add_argument("--rounds", type=int, default=5, help="default: 5")
    options.add_argument("--llama-cpp", metavar="FOLDER", help="where llama_cpp lies, if it is not installed")
    given = options.parse_args()
    from nitinol.models import open_model
    from nitinol.models.memory import parameters
    from nitinol.runtime import host
    from nitinol.runtime.cpu import CpuDevice
    from nitinol.runtime.peak import measure_peak_rates

    threads = given.threads or host.default_threads()
    with_peer = llama_cpp_available(given.llama_cpp)
    print(describe(machine()) + f"; {threads} threads", file=sys.stderr)
    results = []
    for format in given.formats:
        path = model_file(given.models, given.preset, format)
        _, config = open_model(path)
        results.append(measure(path, format, threads, sorted(given.prompts), given.gen, given.rounds, with_peer))
        print(f"{format}: {results[-1]['tok_s']}", file=sys.stderr)
    # Prefill needs the logits of the last token alone, so that the output matrix counts for nothing.
    matrices = parameters(config) - config.vocab * config.hidden * (1 if config.tied else 2)
    document = {"benchmark": "llama_cpp", "threads": threads, "peak_gop_s": measure_peak_rates(CpuDevice(threads)),
                "operations_per_token": 2 * matrices, "results": results}
    print(render(document))
    write_json(given.json, document)


if __name__ == "__main__":
    main()

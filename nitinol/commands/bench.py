"""`nitinol bench`: tokens a second, and how much of the memory's speed decoding gets."""

from __future__ import annotations

import statistics
import time
from typing import Any

from nitinol.commands.output import Progress, print_json
from nitinol.commands.run import Settings, peak_rss_bytes
from nitinol.generate.model import Model
from nitinol.generate.options import Options
from nitinol.models import open_model
from nitinol.models.memory import cache_bytes_read
from nitinol.runtime.bandwidth import measure_read_bandwidth


def bench_model(path: str, prompt: int, gen: int, reps: int, device: str | None, threads: int | None,
                as_json: bool) -> None:
    for name, value in (("--prompt", prompt), ("--gen", gen), ("--reps", reps)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    _, config = open_model(path)
    if prompt + gen > config.context:
        raise ValueError(f"--prompt {prompt} and --gen {gen} do not fit the context of {config.context} tokens")
    model = Settings(device, threads, prompt + gen, "fp16").load(path, as_json)
    with Progress("measuring", as_json) as progress:
        result = measure(model, prompt, gen, reps, progress)
    if as_json:
        print_json(result)
        return
    print(f"{result['model']} on {result['description']}, medians of {reps}")
    print(f"prefill   {result['prefill_tok_s']:.1f} tokens/s ({prompt} tokens)")
    print(f"decode    {result['decode_tok_s']:.2f} tokens/s ({gen} tokens)")
    print(f"memory    {result['read_bandwidth_gb_s']:.1f} GB/s measured; decode reads "
          f"{result['decode_bytes_per_token'] / 1e6:.1f} MB a token: {result['decode_bandwidth_fraction']:.0%} of that")
    print(f"peak      {result['peak_rss_bytes'] / 1e6:.0f} MB resident")


def measure(model: Model, prompt: int, gen: int, reps: int, progress: Progress) -> dict[str, Any]:
    """Runs a warm-up and `reps` repetitions; the bandwidth is measured between them, under the same conditions."""
    # Spread over the vocabulary; what the tokens are does not matter for the work.
    ids = [(i * 7919 + 1) % model.config.vocab for i in range(prompt)]
    runs, bandwidths = [], []
    for repetition in range(reps + 1):
        progress(repetition, reps + 1)
        run = generate(model, ids, gen if repetition else min(gen, 2))
        if repetition:
            runs.append(run)
            bandwidths.append(measure_read_bandwidth(model.device))
    decode = statistics.median(run["decode_tok_s"] for run in runs)
    bandwidth = statistics.median(bandwidths)
    read = decode_bytes(model, prompt + gen / 2)
    return {
        "model": model.config.name, "device": model.device.name, "description": model.device.description,
        **({"threads": model.device.threads} if model.device.name == "cpu" else {}),
        "prompt": prompt, "gen": gen, "reps": reps,
        "prefill_tok_s": statistics.median(run["prefill_tok_s"] for run in runs), "decode_tok_s": decode,
        "read_bandwidth_gb_s": bandwidth, "decode_bytes_per_token": read,
        "decode_bandwidth_fraction": decode * read / 1e9 / bandwidth,
        "peak_rss_bytes": runs[0]["peak_rss_bytes"],  # before the bandwidth's buffers
    }


def generate(model: Model, ids: list[int], gen: int) -> dict[str, Any]:
    """One repetition: prefill from nothing, then gen tokens, whatever they are (a random model may end at once)."""
    session = model.session
    session.begin(None)
    session.cache.move(0)
    begun = time.perf_counter()
    session.prefill(ids, Options())
    read = time.perf_counter()
    for left in reversed(range(gen)):
        session.step(more=left > 0)
    ended = time.perf_counter()
    return {"prefill_tok_s": len(ids) / (read - begun), "decode_tok_s": gen / (ended - read),
            "peak_rss_bytes": peak_rss_bytes()}


def decode_bytes(model: Model, position: float) -> int:
    """What a decode step must read: every weight once (of the embedding, unless it is the output matrix too, only one
    row), and the cache up to the position."""
    tensors = model.file.tensors
    weights = sum(tensor.nbytes for tensor in tensors.values())
    if not model.config.tied:
        embedding = tensors["token_embd.weight"]
        weights -= embedding.nbytes - embedding.nbytes // embedding.shape[0]
    return int(weights + cache_bytes_read(model.config, position, model.session.cache_dtype))

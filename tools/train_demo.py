"""Train the bundled model on one GPU and write it as a GGUF file.

    python tools/train_demo.py --corpus corpus.jsonl.xz --minutes 8.4 --out build/demo.gguf

The corpus comes from `demo_data.py`. Needs `torch`, `tokenizers` and `gguf`. Beside the GGUF file it
writes the weights in float16, the tokenizer and a JSON report: sizes, steps, loss curve, held-out bits
per byte and samples.
"""

from __future__ import annotations

import argparse
import ast
import json
import lzma
import math
import multiprocessing
import random
import time
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from demo_model import END, Config, forward, generate, initial_weights, read_gguf, write_gguf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

SEQUENCES, MICRO_BATCH = 128, 128  # a step is 128 sequences of the context's length
MUON_RATE, ADAM_RATE, WEIGHT_DECAY, WARM_UP_STEPS = 6e-3, 1e-2, 0.05, 100
DECAY = 0.6  # the learning rate is constant, then falls linearly to zero over this part of the run
SNIPPETS, FILE_STARTS = 0.20, 0.15  # shares of a batch; the rest are windows from anywhere in the files
PROMPTS = (
    "def fibonacci(n):",
    "def factorial(n):",
    "def is_prime(n):",
    "class Stack:",
    "def binary_search(items, target):",
    "import os\n\ndef list_files(path):",
    "def bubble_sort(numbers):\n",
    "def read_json(path):",
)


def read_corpus(path: Path) -> list[dict]:
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def train_tokenizer(texts: Iterator[str], size: int) -> Tokenizer:
    """Byte-level BPE with GPT-2's splitting, under which a line break and its indentation make one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, max_token_length=24, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def snippets(text: str) -> list[str]:
    """The short functions and classes of a module, each as a document of its own.

    They teach the model what follows a bare `def` or `class` line, and to stop when it is done.
    """
    lines, found = text.split("\n"), []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body = ast.parse(text).body
    except SyntaxError:  # of a later Python than this one
        return []
    for node in body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.decorator_list:
            continue
        length = (node.end_lineno or 0) - node.lineno + 1
        if 3 <= length <= 60 and not node.name.lower().startswith("test"):
            found.append("\n".join(lines[node.lineno - 1 : node.end_lineno]) + "\n")
    return found


def pieces(text: str, generator: random.Random) -> list[str]:
    """Cut a text at random places, every other one at the end of a line, about once in 800 characters.

    Pieces are tokenised apart, so the model sees the token boundaries that the end of a prompt makes.
    """
    cuts = {0, len(text)}
    for _ in range(round(len(text) / 800 * 2 * generator.random())):
        cut = generator.randrange(len(text))
        if generator.random() < 0.5:
            cut = text.find("\n", cut) + generator.randrange(2)
        cuts.add(max(cut, 0))
    ordered = sorted(cuts)
    return [text[a:b] for a, b in pairwise(ordered)]


def tokenize(tokenizer: Tokenizer, documents: list[tuple[str, int]], cut: bool) -> np.ndarray:
    """Token ids (uint16) of all documents, each `weight` times and each after the end-of-text token."""
    generator, stream = random.Random(0), []
    for start in range(0, len(documents), 20000):
        block = documents[start : start + 20000]
        parts = [pieces(text, generator) if cut else [text] for text, _ in block]
        encoded = iter(tokenizer.encode_batch_fast([piece for part in parts for piece in part]))
        for part, (_, weight) in zip(parts, block, strict=True):
            ids = [0] + [token for _ in part for token in next(encoded).ids]
            stream.extend([np.array(ids, np.uint16)] * weight)
    generator.shuffle(stream)
    return np.concatenate(stream)


class Stream:
    """Tokens on the GPU, from which windows are drawn at random or at the starts of documents."""

    def __init__(self, tokens: np.ndarray, device: str) -> None:
        self.tokens = torch.from_numpy(tokens.astype(np.int16)).to(device)  # 8192 ids fit
        starts = np.flatnonzero(tokens == 0)
        self.starts = torch.from_numpy(starts[starts < len(tokens) - 4096]).to(device)

    def draw(self, count: int, length: int, at_starts: bool) -> Tensor:
        limit = len(self.starts) if at_starts else len(self.tokens) - length
        index = torch.randint(limit, (count,), device=self.tokens.device)
        first = self.starts[index] if at_starts else index
        return self.tokens[first[:, None] + torch.arange(length, device=index.device)].long()


def loss_of(weights: dict[str, Tensor], window: Tensor, config: Config) -> Tensor:
    logits = forward(weights, window[:, :-1], config)
    return F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(weights: dict[str, Tensor], tokens: np.ndarray, byte_count: int, config: Config) -> float:
    """Of a token stream in windows of the model's context that don't overlap, computed in float32."""
    device, total = weights["token_embd.weight"].device, 0.0
    for start in range(0, len(tokens) - 1, 32 * config.context):
        part = torch.from_numpy(tokens[start : start + 32 * config.context + 1].astype(np.int64)).to(device)
        whole = (len(part) - 1) // config.context * config.context
        for begin, end, width in ((0, whole, config.context), (whole, len(part) - 1, len(part) - 1 - whole)):
            if end > begin:
                logits = forward(weights, part[begin:end].view(-1, width), config)
                total += F.cross_entropy(logits.flatten(0, 1), part[begin + 1 : end + 1], reduction="sum").item()
    return total / math.log(2) / byte_count


def train(
    weights: dict[str, Tensor], files: Stream, parts: Stream, minutes: float, config: Config
) -> list[tuple[int, float, float]]:
    """Train in place for a stretch of wall-clock time; return (step, seconds, loss) as they were logged.

    Matrices learn by Muon (Jordan et al. 2024), the embedding and the norms by AdamW.
    """
    matrices = [weight for name, weight in weights.items() if weight.ndim == 2 and name.startswith("blk.")]
    others = [weight for name, weight in weights.items() if weight.ndim == 1 or not name.startswith("blk.")]
    muon = torch.optim.Muon(
        matrices, lr=MUON_RATE, weight_decay=WEIGHT_DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    compiled = torch.compile(loss_of)
    log: list[tuple[int, float, float]] = []
    step, started = 0, 0.0
    while True:
        if step == 2:  # the clock starts when everything is compiled
            torch.cuda.synchronize()
            started = time.monotonic()
        progress = (time.monotonic() - started) / (60 * minutes) if step >= 2 else 0.0
        if progress >= 1:
            return log
        scale = min(1.0, (step + 1) / WARM_UP_STEPS, (1 - progress) / DECAY)
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = scale * MUON_RATE, scale * ADAM_RATE
        counts = round(SNIPPETS * SEQUENCES), round(FILE_STARTS * SEQUENCES)
        length = config.context + 1
        batch = torch.cat(
            (
                parts.draw(counts[0], length, at_starts=True),
                files.draw(counts[1], length, at_starts=True),
                files.draw(SEQUENCES - sum(counts), length, at_starts=False),
            )
        )
        batch = batch[torch.randperm(SEQUENCES, device=batch.device)]
        for micro in batch.split(MICRO_BATCH):
            with torch.autocast("cuda", torch.bfloat16):
                loss = compiled(weights, micro, config)
            (loss * MICRO_BATCH / SEQUENCES).backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0:
            log.append((step, time.monotonic() - started if step >= 2 else 0.0, loss.item()))
            print(f"step {step} seconds {log[-1][1]:.1f} loss {log[-1][2]:.4f}", flush=True)
        if step % 10 == 0:
            torch.cuda.synchronize()  # or the clock would run ahead of the GPU
        step += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="JSON lines through xz, from demo_data.py")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json to use; left out, one is trained")
    parser.add_argument("--minutes", type=float, default=8.4, help="of training, at a constant and then falling rate")
    parser.add_argument("--out", type=Path, required=True, help="the GGUF file to write")
    arguments = parser.parse_args()
    config, device, began = Config(), "cuda", time.monotonic()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")

    corpus = read_corpus(arguments.corpus)
    training = [record for record in corpus if record["part"] == "train"]
    if arguments.tokenizer:
        tokenizer = Tokenizer.from_file(str(arguments.tokenizer))
    else:
        sample = random.Random(0).choices(training, [r["weight"] for r in training], k=len(training) // 4)
        tokenizer = train_tokenizer((record["text"] for record in sample), config.vocabulary)
    print(f"{time.monotonic() - began:.0f} s: corpus read", flush=True)
    with multiprocessing.get_context("fork").Pool() as pool:
        found = pool.map(snippets, [record["text"] for record in training], chunksize=64)
    documents = [(record["text"], record["weight"]) for record in training]
    # Snippets of the primer come up twice only: they are in its files too.
    small = [(text, min(r["weight"], 2)) for r, texts in zip(training, found, strict=True) for text in texts]
    files = Stream(tokenize(tokenizer, documents, cut=True), device)
    parts = Stream(tokenize(tokenizer, small, cut=True), device)
    print(f"{time.monotonic() - began:.0f} s: {len(files.tokens)} tokens of files, {len(parts.tokens)} of snippets")

    weights = initial_weights(config, device)
    log = train(weights, files, parts, arguments.minutes, config)
    steps = log[-1][0]
    for weight in weights.values():
        weight.requires_grad_(False)
    write_gguf(arguments.out, weights, config, tokenizer)
    tokenizer.save(str(arguments.out.with_name("tokenizer.json")))
    torch.save({name: w.half().cpu() for name, w in weights.items()}, arguments.out.with_suffix(".pt"))

    torch.set_float32_matmul_precision("highest")
    from_file = read_gguf(arguments.out, device)
    scores = {}
    for part in ("held-out file", "held-out package"):
        texts = [record["text"] for record in corpus if record["part"] == part]
        tokens = tokenize(tokenizer, [(text, 1) for text in texts], cut=False)
        size = sum(len(text.encode()) for text in texts)
        both = [bits_per_byte(w, tokens, size, config) for w in (weights, from_file)]
        scores[part] = {"bytes": size, "tokens": len(tokens), "float32": both[0], "Q8_0": both[1]}
    samples = []
    for prompt in PROMPTS:
        for temperature in (0.0, 0.8):
            ids = generate(from_file, config, tokenizer.encode(END + prompt).ids, 160, temperature)
            samples.append((prompt, temperature, tokenizer.decode(ids)))
            print(f"----- temperature {temperature}\n{prompt}{samples[-1][2]}")
    report = {
        "parameters": sum(weight.numel() for weight in weights.values()),
        "stream_tokens": {"files": len(files.tokens), "snippets": len(parts.tokens)},
        "steps": steps,
        "tokens": steps * SEQUENCES * config.context,
        "seconds": log[-1][1],
        "device": torch.cuda.get_device_name(),
        "bits_per_byte": scores,
        "loss": log,
        "samples": samples,
    }
    arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=1))
    print(json.dumps({key: value for key, value in report.items() if key not in ("loss", "samples")}, indent=1))


if __name__ == "__main__":
    main()

"""`nitinol inspect`, `tokenize` and `devices`: facts, nothing is computed."""

from __future__ import annotations

from collections import Counter
from typing import Any

from nitinol.commands.output import print_json, print_table
from nitinol.formats.gguf import GGUF, FormatError
from nitinol.generate.tokenizer import Tokenizer
from nitinol.models import architecture, open_model
from nitinol.models.base import Config
from nitinol.models.memory import gigabytes, memory_needed


def inspect_model(path: str, tensors: bool, context: int | None, as_json: bool) -> None:
    file, config = open_model(path)
    if context is not None and not 1 <= context <= config.context:
        raise ValueError(f"--context is {context}, but {config.name} was made for 1 to {config.context} tokens")
    facts = describe(file, config, context)
    if as_json:
        listed = [{"name": t.name, "shape": t.shape, "format": t.format, "bytes": t.nbytes}
                  for t in file.tensors.values()]
        print_json(facts | ({"tensors": listed} if tensors else {}))
        return
    rope = f"base {config.rope.base:g}" + (", Llama 3 scaling" if "rope_freqs.weight" in file.tensors else "") + (
        f", linear scaling by {config.rope.divisor:g}" if config.rope.divisor != 1 else "")
    windows = [window for layer in range(config.layers) if (window := config.window_of(layer))]
    sharing = config.heads // config.kv_heads
    attention = (f"{config.heads} heads of {config.head_dim}" if sharing == 1 else
                 f"{config.heads} heads of {config.head_dim}, {config.kv_heads} key-value heads ({sharing} share one)")
    if windows:
        attention += f"; {len(windows)} of {config.layers} layers see the last {max(windows):,} tokens"
    formats = ", ".join(f"{name} {part:.0%}" if part >= 0.01 else f"{name} <1%"
                        for name, part in facts["formats"].items())
    weights = facts["weights_bytes"]
    for title, value in (
        ("model", config.name),
        ("family", f"{facts['family']} ({config.arch})"),
        ("parameters", f"{facts['parameters']:,}"),
        ("weights", f"{gigabytes(weights)}, {8 * weights / facts['parameters']:.2f} bits each ({formats})"),
        ("layers", f"{config.layers}, width {config.hidden}, feed-forward {config.ffn}"),
        ("attention", attention),
        ("positions", f"RoPE, {rope}"),
        ("context", f"{config.context:,} tokens"),
        ("output", "shares the embedding's matrix" if config.tied else "a matrix of its own"),
        ("tokenizer", facts["tokenizer"]["summary"]),
        *((f"memory at {need['context']:,}",
           f"{gigabytes(need['total_bytes'])} (cache {gigabytes(need['cache_bytes'])})") for need in facts["memory"]),
    ):
        print(f"{title:<18}{value}")
    if tensors:
        print()
        print_table(("tensor", "shape", "format", "bytes"),
                    [(t.name, " x ".join(map(str, t.shape)), t.format, f"{t.nbytes:,}") for t in file.tensors.values()],
                    numbers=(3,))


def describe(file: GGUF, config: Config, context: int | None) -> dict[str, Any]:
    """What `inspect --json` prints, less the tensors."""
    sizes: Counter[str] = Counter()
    parameters = 0
    for tensor in file.tensors.values():
        sizes[tensor.format] += tensor.nbytes
        count = 1
        for extent in tensor.shape:
            count *= extent
        parameters += count
    weights = sum(sizes.values())
    contexts = [context] if context else sorted({min(n, config.context) for n in (2048, 8192, 32768, config.context)})
    memory = []
    for tokens in contexts:
        need = memory_needed(config, weights, tokens)
        memory.append({"context": tokens, "total_bytes": need.total, "weights_bytes": need.weights,
                       "cache_bytes": need.cache, "activations_bytes": need.activations})
    return {
        "path": str(file.path), "name": config.name, "architecture": config.arch,
        "family": architecture(config.arch).Network.family, "parameters": parameters, "weights_bytes": weights,
        "formats": {name: size / weights for name, size in sizes.most_common()},
        "layers": config.layers, "hidden": config.hidden, "feed_forward": config.ffn, "heads": config.heads,
        "kv_heads": config.kv_heads, "head_dim": config.head_dim, "context": config.context, "vocab": config.vocab,
        "tied": config.tied, "rope_base": config.rope.base, "tokenizer": _describe_tokenizer(file), "memory": memory,
    }


def _describe_tokenizer(file: GGUF) -> dict[str, Any]:
    """A file without a tokenizer can still be inspected."""
    try:
        tokenizer = Tokenizer.from_gguf(file.metadata)
    except FormatError as error:
        return {"summary": f"none that can be used: {error}"}
    kind = {"gpt2": "byte-level BPE", "llama": "SentencePiece BPE"}[file.metadata["tokenizer.ggml.model"]]
    chat = "with a chat template" if tokenizer.chat_template else "no chat template"
    return {"summary": f"{kind}, {tokenizer.vocab_size:,} tokens, {chat}", "kind": kind,
            "tokens": tokenizer.vocab_size, "chat_template": tokenizer.chat_template is not None,
            "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "stop_ids": sorted(tokenizer.stop_ids)}


def tokenize_text(path: str, text: str, special: bool, as_json: bool) -> None:
    file, _ = open_model(path)
    tokenizer = Tokenizer.from_gguf(file.metadata)
    ids = tokenizer.encode(text, parse_special=special)
    texts = [tokenizer.token_bytes(id, skip_special=False).decode("utf-8", errors="replace") for id in ids]
    if as_json:
        print_json({"ids": ids, "texts": texts})
        return
    print_table(("id", "text"), [(id, repr(text)) for id, text in zip(ids, texts)], numbers=(0,))
    print(f"{len(ids)} tokens")


def list_devices(as_json: bool) -> None:
    found = [device_facts(name) for name in ("metal", "cuda", "cpu")]
    if as_json:
        print_json(found)
        return
    rows = [(d["name"], d.get("description") or f"not here: {d['missing']}", gigabytes(d["memory_bytes"]) if
             d.get("memory_bytes") else "") for d in found]
    print_table(("device", "what it is", "memory free"), rows, numbers=(2,))
    print(f"without --device: {next(d['name'] for d in found if d['default'])}")


def device_facts(name: str) -> dict[str, Any]:
    """Name, description and free memory in bytes of a device (of the CPU also its cores, the threads used by default
    and its vector unit), or why it is `missing`; whether it is the `default`."""
    from nitinol.runtime import default_device, host, open_device
    from nitinol.runtime.device import DeviceError

    try:
        device = open_device(name)
    except DeviceError as error:
        return {"name": name, "default": False, "missing": str(error)}
    facts = {"name": name, "default": device is default_device(), "description": device.description,
             "memory_bytes": device.available_memory()}
    if name == "cpu":
        facts |= {"cores": host.logical_cores(), "threads": device.threads, "simd": host.simd_level()}
    return facts

"""A model's weights: which tensors an architecture has, and the file's bytes as arrays, in place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from nitinol.formats.blocks import FORMATS
from nitinol.formats.gguf import GGUF, FormatError
from nitinol.models.config import Config
from nitinol.runtime.device import Progress

FLOATS = ("F32", "F16", "BF16")


def expected_tensors(config: Config) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Name, shape and whether it must be there, under llama.cpp's names."""
    hidden, head = config.hidden, config.head_dim
    widths = {"q": config.q_width, "k": config.kv_width, "v": config.kv_width}
    yield "token_embd.weight", (config.vocab, hidden), True
    yield "output_norm.weight", (hidden,), True
    yield "output.weight", (config.vocab, hidden), False
    if config.arch == "llama":
        yield "rope_freqs.weight", (config.head_dim // 2,), False
    for layer in range(config.layers):
        block = f"blk.{layer}."
        yield block + "attn_norm.weight", (hidden,), True
        for name, width in widths.items():
            yield f"{block}attn_{name}.weight", (width, hidden), True
            if config.arch == "qwen2":
                yield f"{block}attn_{name}.bias", (width,), True
            if config.arch == "qwen3" and name != "v":
                yield f"{block}attn_{name}_norm.weight", (head,), True
        yield block + "attn_output.weight", (hidden, config.q_width), True
        yield block + "ffn_norm.weight", (hidden,), True
        yield block + "ffn_gate.weight", (config.ffn, hidden), True
        yield block + "ffn_up.weight", (config.ffn, hidden), True
        yield block + "ffn_down.weight", (hidden, config.ffn), True


def check_tensors(file: GGUF, config: Config) -> None:
    """FormatError, naming the tensor, unless the file has exactly the tensors of its metadata's model."""
    def fail(sentence: str) -> FormatError:
        return FormatError(f"{file.path}: {sentence}")

    known = set()
    for name, shape, required in expected_tensors(config):
        known.add(name)
        tensor = file.tensors.get(name)
        if tensor is None:
            if required:
                raise fail(f"tensor {name!r} of shape {shape} is missing; the file is incomplete or its metadata wrong")
            continue
        if tensor.shape != shape:
            raise fail(f"tensor {name!r} has shape {tensor.shape}, but the metadata asks for {shape}; the file is "
                       "damaged or was converted wrongly")
        if tensor.format not in FORMATS:
            raise fail(f"tensor {name!r} has format {tensor.format}, which is not supported; use a file with "
                       f"{', '.join(FORMATS)}")
        if tensor.offset % 4:
            raise fail(f"tensor {name!r} lies at byte {tensor.offset}, expected a multiple of 4; convert the model "
                       "with the usual alignment")
        if len(shape) == 1 and tensor.format not in FLOATS:
            raise fail(f"tensor {name!r} has format {tensor.format}, but a vector is expected in {', '.join(FLOATS)}")
    for name in file.tensors:
        # Old converters stored what follows from the metadata: frequencies and masks.
        if name not in known and not re.search(r"rope_freqs|rotary_emb|attn_rot_embd|masked_bias", name):
            raise fail(f"tensor {name!r:.80} does not belong to a {config.arch} model of {config.layers} blocks; this "
                       "variant is not supported, or the file is damaged")


def wrap_weights(file: GGUF, config: Config, device: Any, progress: Progress | None = None) -> SimpleNamespace:
    """Arrays over the mapped file, in place if the device can: `token_embd`, `output_norm`, `output`, and `blocks`, a
    namespace for each with `attn_q`, `attn_q_bias`, ... Also `rope`, the frequencies in radians a position, float32
    [head_dim / 2]. progress: told of bytes that are copied to the device, of how many.
    """
    from nitinol.graph.conversion import array as array_of  # late: `nitinol inspect` needs no arrays and no compiler
    from nitinol.ops.quantized import stored_array
    from nitinol.ops.rope import rope_frequencies

    parts, before, total = [], 0, sum(part.nbytes for part in file.parts)

    def told(done: int, _: int) -> None:
        if progress is not None:
            progress(before + done, total)

    for part in file.parts:
        parts.append(device.wrap(part, told))
        before += part.nbytes
    top: dict[str, Any] = {}
    blocks: list[dict[str, Any]] = [{} for _ in range(config.layers)]
    for name, tensor in file.tensors.items():
        array = stored_array(parts[tensor.part].view(tensor.offset, tensor.nbytes), tensor.format, tensor.shape)
        match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
        place, short = (blocks[int(match[1])], match[2]) if match else (top, name)
        place[short.removesuffix(".weight").replace(".", "_")] = array
    top.setdefault("output", top["token_embd"])
    factors = top["rope_freqs"].numpy() if "rope_freqs" in top else 1.0
    if not np.all(np.isfinite(factors)) or np.any(np.less_equal(factors, 0)):
        raise FormatError(f"{file.path}: tensor 'rope_freqs.weight' has values that are not above 0; it is damaged")
    factors = np.broadcast_to(np.multiply(factors, config.rope_divisor), config.head_dim // 2)
    rope = array_of(rope_frequencies(config.head_dim, config.rope_base, factors), device=device)
    return SimpleNamespace(**top, blocks=[SimpleNamespace(**block) for block in blocks], rope=rope)

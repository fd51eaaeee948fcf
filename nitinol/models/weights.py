"""A model's weights: a file's tensors checked against those of an architecture, and its bytes as arrays, in place."""

from __future__ import annotations

import re
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np

from nitinol.formats.blocks import FORMATS
from nitinol.formats.gguf import GGUF, FormatError
from nitinol.models.base import Config, Tensor
from nitinol.runtime.device import Progress

FLOATS = ("F32", "F16", "BF16")


def check_tensors(file: GGUF, config: Config, expected: Iterable[Tensor]) -> None:
    """FormatError, naming the tensor, unless the file has exactly the expected tensors, in formats that are known."""
    def fail(sentence: str) -> FormatError:
        return FormatError(f"{file.path}: {sentence}")

    known = set()
    for name, shape, required in expected:
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


def wrap_weights(file: GGUF, layers: int, device: Any, progress: Progress | None = None) -> SimpleNamespace:
    """Arrays over the mapped file, in place if the device can: `token_embd`, `output_norm`, `output`, and `blocks`, a
    namespace for each of `layers` with `attn_q`, `attn_q_bias`, ... All are Arrays, in blocks as the file has them;
    `rope_freqs`, if the file has it, is NumPy's. progress: told of bytes that are copied to the device, of how many.
    FormatError where factors of frequencies are not above 0.
    """
    from nitinol.ops.quantized import stored_array  # late: `nitinol inspect` needs no arrays and no compiler

    parts, before, total = [], 0, sum(part.nbytes for part in file.parts)

    def told(done: int, _: int) -> None:
        if progress is not None:
            progress(before + done, total)

    for part in file.parts:
        parts.append(device.wrap(part, told))
        before += part.nbytes
    top: dict[str, Any] = {}
    blocks: list[dict[str, Any]] = [{} for _ in range(layers)]
    for name, tensor in file.tensors.items():
        array = stored_array(parts[tensor.part].view(tensor.offset, tensor.nbytes), tensor.format, tensor.shape)
        match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
        place, short = (blocks[int(match[1])], match[2]) if match else (top, name)
        place[short.removesuffix(".weight").replace(".", "_")] = array
    top.setdefault("output", top["token_embd"])
    if "rope_freqs" in top:
        factors = top["rope_freqs"] = top["rope_freqs"].numpy()
        if not np.all(np.isfinite(factors)) or np.any(np.less_equal(factors, 0)):
            raise FormatError(f"{file.path}: tensor 'rope_freqs.weight' has values that are not above 0; it is damaged")
    return SimpleNamespace(**top, blocks=[SimpleNamespace(**block) for block in blocks])

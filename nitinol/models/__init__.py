"""Architectures, and a model's file opened and checked."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from nitinol.formats.gguf import GGUF, FormatError, open_gguf
from nitinol.models.base import Config, Metadata, Network
from nitinol.models.weights import check_tensors, wrap_weights
from nitinol.runtime.device import Progress

DEMO = Path(__file__).parent.parent / "data" / "demo.gguf"
# What `general.architecture` may be: each is a file here with a `Config`, `tensors(config)` and a `Network`.
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")


def open_model(path: str | os.PathLike[str]) -> tuple[GGUF, Config]:
    """The mapped file ("demo": the model that comes with the package) and its hyper-parameters, both checked.

    Raises FormatError where the file is not a model that can be computed, OSError where it cannot be opened.
    """
    file = open_gguf(DEMO if str(path) == "demo" else path)
    arch = file.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        found = f"the architecture is {arch!r:.40}" if arch is not None else "general.architecture is missing"
        raise FormatError(f"{file.path}: {found}, but only {', '.join(ARCHITECTURES)} are supported; use a model of "
                          "these families")
    metadata = Metadata(file, arch)
    config = architecture(arch).Config.read(metadata)
    metadata.finish()
    check_tensors(file, config, architecture(arch).tensors(config))
    return file, config


def architecture(name: str) -> Any:
    """The module of an architecture."""
    return import_module(f"nitinol.models.{name}")


def make_network(file: GGUF, config: Config, device: Any, progress: Progress | None = None) -> Network:
    """The file's network on a device; progress: told of bytes that are copied to it, of how many."""
    weights = wrap_weights(file, config.layers, device, progress)
    return architecture(config.arch).Network(config, weights, device)  # type: ignore[no-any-return]

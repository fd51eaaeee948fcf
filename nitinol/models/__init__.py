"""Architectures, and a model's file opened and checked."""

from __future__ import annotations

import os
from pathlib import Path

from nitinol.formats.gguf import GGUF, open_gguf
from nitinol.models.config import Config, read_config
from nitinol.models.weights import check_tensors

DEMO = Path(__file__).parent.parent / "data" / "demo.gguf"


def open_model(path: str | os.PathLike[str]) -> tuple[GGUF, Config]:
    """The mapped file ("demo": the model that comes with the package) and its hyper-parameters, both checked.

    Raises FormatError where the file is not a model that can be computed, OSError where it cannot be opened.
    """
    file = open_gguf(DEMO if str(path) == "demo" else path)
    config = read_config(file)
    check_tensors(file, config)
    return file, config

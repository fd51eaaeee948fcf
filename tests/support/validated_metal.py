"""The software Metal device with its validation on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import nitinol
import softmetal
from nitinol.runtime.metal import MetalDevice


@contextmanager
def validated_metal() -> Iterator[MetalDevice]:
    """A device of its own, the current one: new buffers have exactly the arrays' lengths, so that bounds are exact."""
    before, opened = nitinol.get_device(), MetalDevice()
    nitinol.set_device(opened)
    softmetal.set_validation(True)
    yield opened
    softmetal.set_validation(False)
    softmetal.set_seed(0)
    nitinol.set_device(before)
    opened.close()

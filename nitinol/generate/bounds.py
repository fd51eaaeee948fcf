"""A stranger's code within bounds: a chat template that loops for ever or asks for all memory ends with an error."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

SECONDS = 5.0  # a template of a thousand messages takes about 0.1
MEMORY_BYTES = 1 << 30  # beyond what the process has; the longest prompts have some MB


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """TimeoutError from Python code that runs longer than `SECONDS` (of this thread), MemoryError for memory beyond
    `MEMORY_BYTES` (of the process, meanwhile; Linux only, other systems do not hold to the limit)."""
    end = time.monotonic() + SECONDS

    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > end:
            raise TimeoutError(f"it runs for longer than {SECONDS:g} s")
        return watch

    before = sys.gettrace()
    with _limited_memory():
        sys.settrace(watch)  # called at every line; a timer's signal would reach the main thread only
        try:
            yield
        finally:
            sys.settrace(before)


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    import resource

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = before = resource.getrlimit(resource.RLIMIT_AS)
    limits = [used + MEMORY_BYTES, *(limit for limit in before if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

"""Validation, counting, seeds: how kernels are executed; and the counters and reports that come of it."""

from __future__ import annotations

import os
import threading
from typing import Any

from softmetal import native
from softmetal.objects import limits

_lock = threading.Lock()
_counts = {"submits": 0, "waits": 0, "allocations": 0}
_state: dict[str, Any] = {
    "validate": os.environ.get("SOFTMETAL_VALIDATION", "") not in ("", "0"),
    "count": os.environ.get("SOFTMETAL_COUNT", "") not in ("", "0"),
    "seed": int(os.environ.get("SOFTMETAL_SEED", "0") or 0),
}
SPACES = ("device", "constant", "threadgroup")
found: list[str] = []


def set_validation(on: bool) -> None:
    """Checks bounds, races, barriers and uninitialised threadgroup memory in every dispatch from now on."""
    _state["validate"] = bool(on)


def set_counting(on: bool) -> None:
    """Counts bytes loaded and stored, operations and barriers from now on (several times slower)."""
    _state["count"] = bool(on)


def set_seed(seed: int) -> None:
    """Shuffles threads between barriers, threadgroups and unordered dispatches; 0 runs them in order."""
    _state["seed"] = int(seed)


def instrumented() -> bool:
    return bool(_state["validate"] or _state["count"])


def seed() -> int:
    return int(_state["seed"])


def validating() -> bool:
    return bool(_state["validate"])


def apply() -> None:
    limit = int((limits.get("timeout_seconds") or 600) * 1e9)
    native.runtime().sm_set_mode(int(_state["validate"]), int(_state["count"]), limit)


def count(what: str) -> None:
    with _lock:
        _counts[what] += 1


def counters() -> dict[str, int]:
    """Since the last reset: submits, waits, allocations, dispatches, groups, threads; and where counting or
    validation is on, barriers and simd_ops (one per simdgroup), matrix_ops (8x8x8 products), atomics, and
    loaded_device, stored_device, loaded_constant, loaded_threadgroup, stored_threadgroup in bytes."""
    c = native.read_counters()
    result = dict(_counts)
    for name in ("dispatches", "groups", "threads", "barriers", "simd_ops", "matrix_ops", "atomics"):
        result[name] = int(getattr(c, name))
    for i, space in enumerate(SPACES):
        result[f"loaded_{space}"], result[f"stored_{space}"] = int(c.loaded[i]), int(c.stored[i])
    return result


def reset_counters() -> None:
    """All counters to zero."""
    native.read_counters(reset=True)
    with _lock:
        for name in _counts:
            _counts[name] = 0


def reports() -> list[str]:
    """What validation has found since the last call, one text each."""
    with _lock:
        result = list(found)
        found.clear()
    return result

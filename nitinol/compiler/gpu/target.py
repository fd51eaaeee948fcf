"""A kernel's source for a GPU target by name, kept on disk from one process to the next."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from types import ModuleType

from nitinol.compiler import cache
from nitinol.compiler.gpu import Executable, compile_function
from nitinol.compiler.ir import Function


def compile_for(
    target: str, name: str, source: Callable[[], Function], aliases: tuple[int, ...] = (), key: str = "",
    warps: int = 0, stages: int = 0,
) -> Executable:  # fmt: skip
    """The executable of a kernel for "metal", or "cuda": for compute capability 9.0, "cuda:86" for 8.6 and so on.

    `source` gives its tile IR; it is not asked if the result is in the cache on disk under `key`, which must identify
    the kernel and its specialisation ("": not cached). `aliases`, `warps`, `stages`: see `compile_function`.
    """
    if key:
        facts = [key, aliases, target, warps, stages, cache.compiler_version()]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        stored = cache.get(key)
        if stored is not None:
            return pickle.loads(stored)
    made = compile_function(source(), aliases, warps, dialect(target), name, stages)
    if key:
        cache.put(key, pickle.dumps(made))
    return made


def dialect(target: str) -> ModuleType:
    """The module with what a GPU language differs in."""
    if target == "metal":
        from nitinol.compiler.gpu import metal

        return metal
    from nitinol.compiler.gpu import cuda

    capability = target.partition(":")[2]
    return cuda.for_capability(int(capability)) if capability else cuda

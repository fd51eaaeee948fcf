"""Several kernels on one problem, whose values have names: each kernel takes those that it has parameters for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nitinol.graph.launch import Output, launch
from nitinol.language.jit import JITFunction


def launch_on(
    problem: dict[str, Any], kernel: JITFunction, grid: Sequence[int], outputs: dict[str, Output | None], **others: Any
) -> list[Any]:
    """The outputs of a kernel as Arrays, in the order given here; None where that is None.

    Its arguments are the outputs, the others, and of the problem's values those that it has parameters for.
    """
    names = [parameter.name for parameter in kernel.parameters]
    arguments = {name: problem[name] for name in names if name in problem} | outputs | others
    made = launch(kernel, grid, **arguments)
    arrays = iter(made if isinstance(made, tuple) else (made,))  # in the order of the kernel's parameters
    found = {name: next(arrays) for name in names if outputs.get(name) is not None}
    return [found.get(name) for name in outputs]

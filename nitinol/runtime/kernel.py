"""`nitinol.jit`: kernels that can be launched, `kernel[grid](*arguments)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nitinol.language.core import unwrap
from nitinol.language.jit import JITFunction, known_options
from nitinol.language.types import DType
from nitinol.runtime import launch


class Kernel(JITFunction):
    """A kernel: `kernel[grid](*arguments)` compiles and runs it, calls from other kernels are inlined."""

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        """The launcher for a grid: a tuple of one to three extents, or a function of the arguments giving one."""
        return lambda *arguments, **keywords: launch.launch(self, grid, arguments, keywords)

    def run(self, *arguments: Any, grid: Any, warmup: bool = False, **keywords: Any) -> Any:
        """`kernel[grid](...)` spelt as a method."""
        return self.warmup(*arguments, grid=grid, **keywords) if warmup else self[grid](*arguments, **keywords)

    def warmup(self, *arguments: Any, grid: Any = (1,), **keywords: Any) -> Any:
        """Compiles for these arguments without running; a dtype stands for an aligned array of it.

        Returns the compiled kernel: `.asm["ir"]`, `.asm["llvm"]`, `.asm["asm"]` are what was made.
        """
        given = self.bind(arguments, keywords)
        for parameter in self.parameters:
            value = unwrap(given.get(parameter.name))
            if isinstance(value, DType) and not parameter.is_constexpr:
                given[parameter.name] = _Placeholder(value)
        return launch.warmup(self, given, keywords)


class _Placeholder:
    """Stands for an aligned array of a dtype in `warmup`."""

    def __init__(self, dtype: DType) -> None:
        self.__nitinol_pointer__ = (0, dtype)


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Makes a Python function, or a kernel of `nitinol.language.jit`, a kernel that can be launched. Options:
    `do_not_specialize` and `do_not_specialize_on_alignment` (names or indices of parameters); Triton's `version`,
    `debug`, `noinline`, `repr`, `launch_metadata` are ignored.
    """
    if function is None:
        return lambda f: jit(f, **options)
    if isinstance(function, Kernel):
        return function
    if isinstance(function, JITFunction):
        kernel = Kernel.__new__(Kernel)
        vars(kernel).update(vars(function))  # its text too, which may be another one in the file by now
        return kernel
    return Kernel(function, **known_options(options))

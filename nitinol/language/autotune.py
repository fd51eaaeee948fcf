"""Wrappers that choose constexpr arguments: `@autotune` with a list of `Config`, and `@heuristics`.

`autotune` takes the first configuration that is left after `prune_configs_by`; it does not measure yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nitinol.language.core import unwrap
from nitinol.language.jit import JITFunction, jit


class Config:
    """Values for constexpr parameters, warps and stages for a GPU; `pre_hook` gets the arguments. Further options of
    Triton's are ignored."""

    def __init__(
        self, kwargs: Mapping[str, Any], num_warps: int = 4, num_stages: int = 3, pre_hook: Any = None, **ignored: Any
    ) -> None:
        self.kwargs = dict(kwargs)
        self.num_warps, self.num_stages, self.pre_hook = num_warps, num_stages, pre_hook

    def __repr__(self) -> str:
        return f"Config({self.kwargs})"


class Chooser:
    """A kernel some of whose arguments are chosen at each launch: `choose(arguments by name) -> more arguments`."""

    def __init__(self, kernel: Any, choose: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
        self.fn = kernel
        self.jit_function: JITFunction = getattr(kernel, "jit_function", None) or jit(kernel)
        self.choose = choose
        self.__name__ = self.jit_function.__name__

    def _complete(self, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
        given = {**dict(zip(self.jit_function.arg_names, arguments)), **keywords}
        known = {p.name: p.default for p in self.jit_function.parameters if p.has_default}
        return {**keywords, **self.choose({**known, **given})}

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return lambda *arguments, **keywords: self.fn[grid](*arguments, **self._complete(arguments, keywords))

    def run(self, *arguments: Any, grid: Any, warmup: bool = False, **keywords: Any) -> Any:
        return self.fn.run(*arguments, grid=grid, warmup=warmup, **self._complete(arguments, keywords))

    def warmup(self, *arguments: Any, **keywords: Any) -> Any:
        return self.fn.warmup(*arguments, **self._complete(arguments, keywords))


def heuristics(values: Mapping[str, Callable[[dict[str, Any]], Any]]) -> Callable[[Any], Chooser]:
    """Computes arguments from the others: each function gets all arguments by name, earlier results included."""

    def choose(arguments: dict[str, Any]) -> dict[str, Any]:
        chosen: dict[str, Any] = {}
        for name, function in values.items():
            chosen[name] = unwrap(function({**arguments, **chosen}))
        return chosen

    return lambda kernel: Chooser(kernel, choose)


def autotune(
    configs: Sequence[Config], key: Sequence[str] = (), prune_configs_by: Any = None, **ignored: Any
) -> Callable[[Any], Chooser]:
    """Fills in the arguments of a configuration: the first, or the first that `early_config_prune` keeps."""
    if not configs:
        raise ValueError("autotune needs at least one Config")
    prune = (prune_configs_by or {}).get("early_config_prune")

    def choose(arguments: dict[str, Any]) -> dict[str, Any]:
        kept = prune(list(configs), arguments) if prune else configs
        if not kept:
            raise ValueError(f"early_config_prune kept none of the {len(configs)} configurations")
        if kept[0].pre_hook is not None:
            kept[0].pre_hook({**arguments, **kept[0].kwargs})
        return {**kept[0].kwargs, "num_warps": kept[0].num_warps, "num_stages": kept[0].num_stages}

    return lambda kernel: Chooser(kernel, choose)

"""`@jit`: a Python function as a kernel, and the specialisation of a kernel on the arguments of a call.

A kernel here is source and parameters; `nitinol.jit` (runtime/kernel.py) makes one that can also be launched.

As in Triton a kernel is compiled once for every combination of argument types, constexpr values, integers equal to 1
(they become constants) and integers and addresses divisible by 16.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from nitinol.language import core
from nitinol.language.source import Source, known_text
from nitinol.language.types import DTYPES, DType, PointerType, Type

# Launch options of Triton that say how to schedule on a GPU. num_warps and num_stages go to the GPU target; the others
# are accepted and ignored. A parameter of that name gets the value instead.
OPTIONS = frozenset("num_warps num_stages num_ctas maxnreg enable_fp_fusion launch_cooperative_grid debug".split())

Dtypes = {
    "bool": "int1", "int8": "int8", "int16": "int16", "int32": "int32", "int64": "int64", "uint8": "uint8",
    "uint16": "uint16", "uint32": "uint32", "uint64": "uint64", "float16": "fp16", "bfloat16": "bf16",
    "float32": "fp32", "float64": "fp64",
}  # fmt: skip
_array_tags: dict[Any, str] = {}  # a library's dtype object -> the type's name here


@dataclass(frozen=True)
class Parameter:
    """What a kernel declares about one parameter."""

    name: str
    is_constexpr: bool
    specialise_value: bool
    specialise_divisibility: bool
    dtype: DType | None
    default: Any

    @property
    def has_default(self) -> bool:
        return self.default is not inspect.Parameter.empty


@dataclass(frozen=True)
class Signature:
    """What a kernel is compiled for. `tags` has one text per parameter, and with the kernel is the cache key:

    "*fp32:16" (a pointer, address divisible by 16), "int32:1" (an integer of which nothing is known) or "=..." (a
    value known at compile time, found in `constants`).
    """

    names: tuple[str, ...]
    tags: tuple[str, ...]
    constants: dict[str, Any] = field(compare=False)
    warps: int = 0  # simdgroups (warps) that run a program instance on a GPU; 0: the compiler chooses
    stages: int = 0  # how many iterations' loads a GPU has in flight; 0: the compiler chooses

    @property
    def parameters(self) -> list[tuple[str, Type, int]]:
        """Name, type and known divisor of each run-time parameter."""
        found: list[tuple[str, Type, int]] = []
        for name, tag in zip(self.names, self.tags):
            if tag[0] != "=":
                kind, divisor = tag.split(":")
                type = PointerType(DTYPES[kind[1:]]) if kind[0] == "*" else DTYPES[kind]
                found.append((name, type, int(divisor)))
        return found

    def __str__(self) -> str:
        parameters = [f"{name}{tag}" if tag[0] == "=" else f"{name}: {tag}" for name, tag in zip(self.names, self.tags)]
        options = [f"{n} {what}" for n, what in ((self.warps, "warps"), (self.stages, "stages")) if n]
        return ", ".join([*parameters, *options])


class JITFunction(Source):
    """A kernel: calls from other kernels are inlined."""

    def __init__(
        self,
        function: Callable[..., Any],
        do_not_specialize: Sequence[str | int] = (),
        do_not_specialize_on_alignment: Sequence[str | int] = (),
    ) -> None:
        super().__init__(function)
        self._unspecialised = frozenset(do_not_specialize)
        self._unaligned = frozenset(do_not_specialize_on_alignment)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        if core._state.builder is None:
            raise RuntimeError(f"{self.__name__} is a kernel: launch it as {self.__name__}[grid](...)")
        return core.builder().call(self, arguments, keywords)

    # ------------------------------------------------------------------------------------------- parameters

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        found = []
        for index, p in enumerate(inspect.signature(self.fn).parameters.values()):
            if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
                if p.kind == p.VAR_KEYWORD:
                    raise TypeError(f"{self.__name__}: a kernel cannot take **{p.name}")
                found.append(Parameter("*" + p.name, False, True, True, None, ()))
                continue
            note = p.annotation
            is_constexpr = note is core.constexpr or (isinstance(note, str) and "constexpr" in note)
            dtype = note if isinstance(note, DType) else None
            names = {p.name, index}
            default = core.unwrap(p.default) if p.default is not p.empty else p.empty
            specialise = not names & self._unspecialised
            aligned = specialise and not names & self._unaligned
            found.append(Parameter(p.name, is_constexpr, specialise, aligned, dtype, default))
        return tuple(found)

    @property
    def arg_names(self) -> list[str]:
        """The parameters' names, in order."""
        return [p.name for p in self.parameters]

    def bind(self, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
        """Values by parameter name, defaults filled in, launch options dropped; TypeError as Python's for calls."""
        parameters = self.parameters
        if len(arguments) > len(parameters) and not (parameters and parameters[-1].name[0] == "*"):
            raise TypeError(f"{self.__name__} takes {len(parameters)} arguments, found {len(arguments)}")
        bound: dict[str, Any] = {}
        for index, p in enumerate(parameters):
            if p.name[0] == "*":
                bound[p.name] = tuple(arguments[index:])
            elif index < len(arguments):
                if p.name in keywords:
                    raise TypeError(f"{self.__name__} got the argument {p.name!r} twice")
                bound[p.name] = arguments[index]
            elif p.name in keywords:
                bound[p.name] = keywords[p.name]
            elif p.has_default:
                bound[p.name] = p.default
            else:
                raise TypeError(f"{self.__name__} needs an argument for {p.name!r}")
        for name in keywords:
            if name not in bound and name not in OPTIONS:
                raise TypeError(f"{self.__name__} has no parameter {name!r}; it has {', '.join(self.arg_names)}")
        return bound


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Makes a Python function a kernel. Options: `do_not_specialize` and `do_not_specialize_on_alignment` (names or
    indices of parameters); Triton's `version`, `debug`, `noinline`, `repr`, `launch_metadata` are ignored."""
    if function is None:
        return lambda f: jit(f, **options)
    return function if isinstance(function, JITFunction) else JITFunction(function, **known_options(options))


def known_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `jit`'s options that are not ignored."""
    return {k: v for k, v in options.items() if k.startswith("do_not_specialize") and v is not None}


# -------------------------------------------------------------------------------------------------- specialisation


def specialise(
    kernel: JITFunction, arguments: Mapping[str, Any] | Sequence[Any], warps: int = 0, stages: int = 0
) -> tuple[Signature, list[Any]]:
    """What to compile the kernel for, and the values of the run-time parameters in order.

    `arguments` are values by name (all parameters, as `bind` gives) or in order. An array becomes its address in
    bytes: NumPy arrays, torch tensors on the CPU, and objects whose `__nitinol_pointer__` is (address, DType).
    """
    parameters = kernel.parameters
    if isinstance(arguments, Mapping):
        arguments = [arguments[p.name] for p in parameters]
    elif len(arguments) != len(parameters):
        raise TypeError(f"{kernel.__name__} takes {len(parameters)} arguments, found {len(arguments)}")
    kernel.check_globals()
    tags: list[str] = []
    constants: dict[str, Any] = {}
    values: list[Any] = []
    for parameter, value in zip(parameters, arguments):
        value = core.unwrap(value)
        if parameter.is_constexpr:
            tags.append(constant_tag(kernel, parameter.name, value))
            constants[parameter.name] = value
            continue
        tag, value = describe(kernel, parameter, value)
        tags.append(tag)
        if tag[0] == "=":
            constants[parameter.name] = value
        else:
            values.append(value)
    return Signature(tuple([p.name for p in parameters]), tuple(tags), constants, warps, stages), values


def describe(kernel: JITFunction, parameter: Parameter, value: Any) -> tuple[str, Any]:
    """The tag of a run-time argument and the value to pass."""
    kind = type(value)
    if kind is int or kind is bool:
        if parameter.dtype is not None:
            name = parameter.dtype.name
            if parameter.dtype.is_float:
                return f"{name}:1", float(value)
        elif kind is bool:
            return "int1:1", value
        elif value == 1 and parameter.specialise_value:
            return "=1", 1
        elif -(2**31) <= value < 2**31:
            name = "int32"
        elif -(2**63) <= value < 2**63:
            name = "int64"
        elif 0 <= value < 2**64:
            name = "uint64"
        else:
            raise ValueError(f"{kernel.__name__}: {parameter.name}={value} does not fit into 64 bits")
        return (f"{name}:16" if value % 16 == 0 and parameter.specialise_divisibility else f"{name}:1"), value
    if kind is float:
        return ("fp32:1" if parameter.dtype is None else f"{parameter.dtype.name}:1"), value
    address, element = _pointer(kernel, parameter, value)
    if element is None:
        return describe(kernel, parameter, address) if address is not value else _known(kernel, parameter, value)
    return (f"*{element}:16" if address % 16 == 0 and parameter.specialise_divisibility else f"*{element}:1"), address


def _pointer(kernel: JITFunction, parameter: Parameter, value: Any) -> tuple[Any, str | None]:
    """Address and element type of an array; (another value, None) of a number in disguise, else (value, None)."""
    pointer = getattr(value, "__nitinol_pointer__", None)
    if pointer is not None:
        address, dtype = pointer() if callable(pointer) else pointer
        return address, dtype.name
    if hasattr(value, "__array_interface__") and hasattr(value, "ctypes"):  # NumPy, without importing it
        name = _array_tags.get(value.dtype)
        if name is None:
            name = Dtypes.get(value.dtype.name) if value.dtype.isnative else None
            if name is None:
                raise TypeError(
                    f"{kernel.__name__}: {parameter.name} has dtype {value.dtype}, which kernels do not know"
                )
            _array_tags[value.dtype] = name
        return value.__array_interface__["data"][0], name
    if hasattr(value, "data_ptr"):  # torch
        if value.device.type != "cpu":
            raise TypeError(f"{kernel.__name__}: {parameter.name} is on {value.device}, expected a tensor on the CPU")
        name = _array_tags.get(value.dtype)
        if name is None:
            name = Dtypes.get(str(value.dtype).removeprefix("torch."))
            if name is None:
                raise TypeError(
                    f"{kernel.__name__}: {parameter.name} has dtype {value.dtype}, which kernels do not know"
                )
            _array_tags[value.dtype] = name
        return value.data_ptr(), name
    if type(value).__module__ == "numpy" and hasattr(value, "item"):  # a NumPy scalar
        return value.item(), None
    if isinstance(value, (int, float)):  # a subclass, such as an enumeration
        return (int(value) if isinstance(value, int) else float(value)), None
    return value, None


def _known(kernel: JITFunction, parameter: Parameter, value: Any) -> tuple[str, Any]:
    """None, strings, dtypes, functions and tuples of known values are constants wherever they stand."""
    if value is None or isinstance(value, (str, DType, PointerType, JITFunction, tuple)):
        return constant_tag(kernel, parameter.name, value), value
    raise TypeError(
        f"{kernel.__name__}: {parameter.name} is of type {type(value).__name__}, expected an array, a number, or a "
        "constexpr parameter"
    )


def constant_tag(kernel: JITFunction, name: str, value: Any) -> str:
    kind = type(value)
    if kind is int or kind is bool or value is None or kind is float or kind is str:
        return f"={value!r}"
    text = known_text(value)
    if text is None:
        raise TypeError(
            f"{kernel.__name__}: the constexpr {name} is of type {kind.__name__}, expected a number, text, dtype, "
            "function or a tuple of these"
        )
    return "=" + text

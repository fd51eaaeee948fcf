"""`nitinol compile`: what becomes of one kernel of a file, as text."""

from __future__ import annotations

import ast
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nitinol.commands.output import print_json
from nitinol.language.jit import JITFunction, Signature, specialise
from nitinol.language.types import DTYPES

MADE = {"cpu": ("asm", "llvm", "ir"), "metal": ("msl", "ir"), "cuda": ("cuda", "ir")}  # the first is shown by default
SHORT = {**{f"i{n}": f"int{n}" for n in (1, 8, 16, 32, 64)}, **{f"u{n}": f"uint{n}" for n in (8, 16, 32, 64)},
         "float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64", "bool": "int1"}  # fmt: skip
ADDRESSING = ("load", "store", "make_block_ptr", "advance")


def compile_file(place: str, target: str, show: str | None, output: Path | None, types: Sequence[str],
                 values: Sequence[str], warps: int, as_json: bool) -> None:  # fmt: skip
    from nitinol.compiler.driver import compile_kernel

    if target not in MADE:
        raise ValueError(f"--target is {target!r}, expected {', '.join(MADE)}")
    if show not in (None, *MADE[target]):
        raise ValueError(f"--show is {show!r}, but for --target {target} there is {', '.join(MADE[target])}")
    kernel = load_kernel(place)
    signature = signature_of(kernel, place, assignments("--arg", types), assignments("--set", values), warps)
    text = compile_kernel(kernel, signature, target=target).asm[show or MADE[target][0]]
    if output is not None:
        output.write_text(text)
    if as_json:
        print_json({"kernel": kernel.__name__, "target": target, "show": show or MADE[target][0],
                    "parameters": dict(zip(signature.names, signature.tags)), "text": text})  # fmt: skip
    elif output is None:
        print(text)
    else:
        print(f"{kernel.__name__}({signature}) for {target}: {output}", file=sys.stderr)


def load_kernel(place: str) -> JITFunction:
    """The kernel FILE.py:NAME, after executing the file; NAME may be left out where there is only one."""
    file, _, name = place.partition(".py:")
    path = Path(place if not name else f"{file}.py")
    spec = importlib.util.spec_from_file_location(f"nitinol_compile_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"there is no Python file {str(path)!r}; give FILE.py:KERNEL")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} cannot be executed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    kernels = {n: k for n, k in vars(module).items() if isinstance(k, JITFunction) and k.__module__ == module.__name__}
    if not name and len(kernels) == 1:
        return next(iter(kernels.values()))
    if name not in kernels:
        what = f"no kernel {name!r} (a function with @nitinol.jit)" if name else "not just one kernel"
        raise ValueError(f"{path} has {what}; its kernels: {', '.join(kernels) or 'none'}")
    return kernels[name]


def signature_of(
    kernel: JITFunction, place: str, types: dict[str, str], values: dict[str, str], warps: int = 0
) -> Signature:
    """What to compile for. `types`: by parameter "*fp32" (a pointer, divisible by 16), "int32", "int32:16" (divisible
    by 16), a number (what a launch would know of it) or "none"; by default pointers to fp32, and int32 for what no
    address is made of. `values`: of constexpr parameters, as Python writes them."""
    by_name = {p.name: p for p in kernel.parameters}
    inferred = pointers(kernel)
    for option, given, constant in (("--arg", types, False), ("--set", values, True)):
        for name in given:
            if name not in by_name:
                raise ValueError(f"{option} {name}: {kernel.__name__} has the parameters {', '.join(by_name)}")
            if by_name[name].is_constexpr != constant:
                kind, other = ("not ", "--arg") if constant else ("", "--set")
                raise ValueError(f"{option} {name}: this parameter is {kind}a tl.constexpr; use {other} {name}=...")
    arguments: dict[str, Any] = {}
    tags: dict[str, str] = {}
    missing = []
    for parameter in kernel.parameters:
        name = parameter.name
        if name in values:
            arguments[name] = constant_of(values[name])
        elif parameter.is_constexpr or (parameter.has_default and name not in types):
            if not parameter.has_default:
                missing.append(name)
            arguments[name] = parameter.default
        else:
            default = parameter.dtype.name if parameter.dtype else "*fp32" if name in inferred else "int32"
            arguments[name], tags[name] = argument_of(name, types.get(name, default))
    if missing:
        known = ", ".join(f"{n}={tag}" for n, tag in tags.items() if tag)
        example = " ".join(f"--set {name}=64" for name in missing)
        raise ValueError(
            f"{kernel.__name__} is compiled for values of {', '.join(missing)}, which were not given"
            f"{f' (the other parameters would be {known})' if known else ''}; for example: "
            f"nitinol compile {shlex.quote(place)} {example}"
        )
    made, _ = specialise(kernel, arguments, warps)
    given_tags = tuple([tags.get(name) or tag for name, tag in zip(made.names, made.tags)])
    return Signature(made.names, given_tags, made.constants, warps)


def assignments(option: str, texts: Sequence[str]) -> dict[str, str]:
    """NAME=TEXT pairs."""
    for text in texts:
        if not text.partition("=")[0].strip() or not text.partition("=")[2].strip():
            raise ValueError(f"{option} {text}: expected NAME={'TYPE' if option == '--arg' else 'VALUE'}")
    return {name.strip(): value.strip() for name, _, value in (text.partition("=") for text in texts)}


def argument_of(name: str, text: str) -> tuple[Any, str]:
    """An argument of a type or value, and its tag if it is a type ("" for a value: `specialise` knows)."""
    if text.lower() == "none":
        return None, ""
    try:
        return (float(text) if set(text) & set(".einf") else int(text, 0)), ""
    except ValueError:
        kind, _, divisor = text.partition(":")
    bare = kind.removeprefix("*")
    bare = SHORT.get(bare, bare)
    is_pointer = kind.startswith("*")
    if bare not in DTYPES or divisor not in ("", "1", "16"):
        raise ValueError(f"--arg {name}={text}: expected *fp32 (a pointer), int32, int32:16 (divisible by 16), a "
                         f"number or none; the types are {', '.join(DTYPES)}")  # fmt: skip
    tag = f"{'*' if is_pointer else ''}{bare}:{divisor or ('16' if is_pointer else '1')}"
    return 2, tag  # of the number nothing is used


def constant_of(text: str) -> Any:
    """A constexpr value: a Python literal, a dtype as tl.float32, otherwise the text itself."""
    name = SHORT.get(text.removeprefix("tl."), text.removeprefix("tl."))
    if text.startswith("tl.") and name in DTYPES:
        return DTYPES[name]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


# ------------------------------------------------------------------------------------------- what is a pointer


def pointers(kernel: JITFunction, inside: tuple[JITFunction, ...] = ()) -> set[str]:
    """The parameters that become addresses of loads and stores: through sums, variables and calls of other kernels."""
    addresses: list[ast.expr] = []
    for call in (node for node in ast.walk(kernel.tree) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        callee = called(kernel, call)
        if callee is not None and callee not in inside:
            addresses += passed(callee, call, pointers(callee, (*inside, kernel)))
        elif name in ADDRESSING or name.startswith("atomic_"):
            addresses += [*call.args[:1], *[k.value for k in call.keywords if k.arg in ("pointer", "base")]]
    return origins(kernel, addresses, inside)


def origins(kernel: JITFunction, addresses: Sequence[ast.expr], inside: tuple[JITFunction, ...]) -> set[str]:
    """The parameters from which addresses are counted."""
    sources: dict[str, list[ast.expr]] = {}
    for node in ast.walk(kernel.tree):
        for target in node.targets if isinstance(node, ast.Assign) else ():
            if isinstance(target, ast.Name):
                sources.setdefault(target.id, []).append(node.value)  # type: ignore[attr-defined]
    found: set[str] = set()
    todo = list(addresses)
    while todo:
        e = todo.pop()
        if isinstance(e, ast.Name) and e.id not in found:
            found.add(e.id)
            todo += sources.get(e.id, [])
        elif isinstance(e, ast.BinOp) and isinstance(e.op, ast.Add | ast.Sub):  # the pointer comes first
            todo.append(e.right if isinstance(e.left, ast.BinOp) and isinstance(e.left.op, ast.Mult) else e.left)
        elif isinstance(e, ast.IfExp):
            todo += [e.body, e.orelse]
        elif isinstance(e, ast.Subscript):  # pointers[:, None]
            todo.append(e.value)
        elif isinstance(e, ast.Call) and isinstance(e.func, ast.Attribute) and e.func.attr == "to":  # a cast
            todo.append(e.func.value)
        elif isinstance(e, ast.Call) and (callee := called(kernel, e)) is not None and callee not in inside:
            results = [n.value for n in ast.walk(callee.tree) if isinstance(n, ast.Return) and n.value is not None]
            todo += passed(callee, e, origins(callee, results, (*inside, kernel)))
    return found & {p.name for p in kernel.parameters if not p.is_constexpr}


def called(kernel: JITFunction, call: ast.Call) -> JITFunction | None:
    """The kernel that a call calls."""
    found = kernel.fn.__globals__.get(call.func.id) if isinstance(call.func, ast.Name) else None
    return found if isinstance(found, JITFunction) else None


def passed(callee: JITFunction, call: ast.Call, names: set[str]) -> list[ast.expr]:
    """What a call passes to these parameters."""
    return [*[a for p, a in zip(callee.parameters, call.args) if p.name in names],
            *[k.value for k in call.keywords if k.arg in names]]  # fmt: skip

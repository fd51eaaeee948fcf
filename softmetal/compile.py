"""clang from the `ziglang` wheel: preprocess, check, compile, link; everything cached on disk.

The cache (`$SOFTMETAL_CACHE`, else `~/.cache/softmetal`) is keyed by source, options, headers, flags, compiler
version and processor. Files appear under their final name in one step, so processes may share it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from softmetal import check, mixed, source
from softmetal.kernels import Argument, Kernel, entry
from softmetal.parse import MetalError
from softmetal.source import Constant

HERE = Path(__file__).parent
FREESTANDING = [
    *("-nostdinc", "-fPIC", "-fno-exceptions", "-fno-plt", "-fno-stack-protector"),
    "-fno-asynchronous-unwind-tables",
]
DIALECT = [
    *("-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", "-Xclang", "-cl-ext=+all"),
    *("-cl-single-precision-constant", "-ffp-contract=fast", "-fno-math-errno", "-w"),
]
# A call of the runtime is one place in the program: machine code must neither merge two nor copy one, and places
# must lie in the order of the program.
ONE_PLACE = [
    *("-fno-optimize-sibling-calls", "-mllvm", "-enable-tail-merge=0", "-mllvm", "-disable-tail-duplicate"),
    *("-mllvm", "-disable-early-taildup", "-mllvm", "-tail-dup-placement=0", "-mllvm", "-disable-block-placement"),
]
# Clang leaves one access of every vectorised pair out when it instruments, hence no vectoriser there.
INSTRUMENTED = [
    *(
        "-fsanitize=thread",
        "-fno-vectorize",
        "-fno-slp-vectorize",
        "-gdwarf-4",
        "-gline-tables-only",
        "-DSM_INSTRUMENTED",
    ),
    *("-mllvm", "-tsan-instrument-func-entry-exit=0", "-mllvm", "-tsan-instrument-read-before-write"),
]


class CompilerMissing(RuntimeError):
    """There is no ziglang wheel."""


@functools.cache
def zig() -> str:
    spec = importlib.util.find_spec("ziglang")
    if spec is None or not spec.submodule_search_locations:
        raise CompilerMissing("softmetal compiles Metal with clang from the ziglang package, which is not installed: "
                              "run `pip install ziglang`")  # fmt: skip
    return str(Path(next(iter(spec.submodule_search_locations))) / ("zig.exe" if os.name == "nt" else "zig"))


def target() -> list[str]:
    return [
        "-target",
        f"{platform.machine()}-linux-gnu",
        "-march=native" if platform.machine() == "x86_64" else "-mcpu=native",
    ]


def run(arguments: Sequence[str], text: str | None = None) -> str:
    """Runs a tool of the compiler; its output. MetalError with its messages if it fails."""
    done = subprocess.run([zig(), *arguments], input=text, capture_output=True, text=True)
    if done.returncode:
        raise MetalError(done.stderr.strip() or f"the compiler ended with status {done.returncode}")
    return done.stdout


def cache_folder() -> Path:
    chosen = os.environ.get("SOFTMETAL_CACHE")
    folder = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "softmetal"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def fingerprint() -> str:
    """Of everything but the source: compiler, processor, headers, flags, rewriter."""
    h = hashlib.sha256()
    with contextlib.suppress(OSError):
        h.update(
            "".join(
                sorted(set(re.findall(r"^(?:flags|Features).*$", Path("/proc/cpuinfo").read_text(), re.M)))
            ).encode()
        )
    h.update(f"{zig()} {os.stat(zig()).st_size} {os.stat(zig()).st_mtime_ns}".encode())
    for path in sorted([*HERE.glob("include/*.h"), *HERE.glob("native/*"), *HERE.glob("*.py")]):
        h.update(path.name.encode() + path.read_bytes())
    return h.hexdigest()


def key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([fingerprint(), *parts]).encode()).hexdigest()[:32]


def runtime() -> Path:
    """The runtime library, compiled on first use."""
    path = cache_folder() / f"runtime-{key('runtime')}.so"
    if not path.exists():
        flags = ["-x", "c++", "-std=c++17", "-O2", "-fno-rtti", "-w", *FREESTANDING, *target()]
        build(path, [(str(f), flags) for f in sorted((HERE / "native").glob("*.cpp"))], None)
    return path


def build(path: Path, units: list[tuple[str, list[str]]], text: str | None) -> None:
    """Compiles the units (file, or "-" for `text`) and links them into the library `path`."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        objects = []
        for i, (unit, flags) in enumerate(units):
            objects.append(f"{scratch}/{i}.o")
            run(["clang", *flags, "-c", unit, "-o", objects[-1]], text)
        run(["ld.lld", "-shared", "-Bsymbolic", "-z", "noexecstack", *objects, "-o", f"{scratch}/library.so"])
        os.replace(f"{scratch}/library.so", path)


def flags(instrumented: bool) -> list[str]:
    # stack-clash protection: a large frame touches every page of it, so the guard page catches an overflow
    return [
        *DIALECT,
        "-O2",
        "-fstack-clash-protection",
        *ONE_PLACE,
        *FREESTANDING,
        *target(),
        *(INSTRUMENTED if instrumented else ()),
    ]


@functools.cache
def header(instrumented: bool) -> Path:
    """The language's header, read once for all: a kernel then compiles in 30 ms instead of 145."""
    path = cache_folder() / f"metal-{key(str(HERE), instrumented)}.pch"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            once = ["-c", "-Xclang", "-emit-pch", "-Xclang", "-fno-pch-timestamp"]
            run(["clang", *flags(instrumented), *once, str(HERE / "include" / "metal.h"), "-o", f"{scratch}/pch"])
            os.replace(f"{scratch}/pch", path)
    return path


def defines(macros: Mapping[str, str | None]) -> list[str]:
    return [f"-D{k}={v}" for k, v in macros.items() if v is not None]


PREDEFINED = {
    "__METAL__": "1", "__METAL_VERSION__": "320", "__METAL_MACOS__": "1", "__HAVE_BFLOAT__": "1", "__air__": "1",
    "__HAVE_SIMDGROUP_MATRIX__": "1", "__HAVE_SIMDGROUP_REDUCTION__": "1", "__APPLE__": "1", "__cplusplus": "201703L",
    "METAL_FUNC": "inline __attribute__((always_inline))", "METAL_CONST_ARG(x)": "", "coherent(x)": "",
}  # fmt: skip


def language(version: int) -> dict[str, str | None]:
    """What a language version changes in the predefined macros; None: not defined."""
    if version == 0x30002:
        return {}
    number = f"{version >> 16}{version & 0xFFFF}0"
    return {"__METAL_VERSION__": number, **({} if version > 0x30000 else {"__HAVE_BFLOAT__": None})}


OURS = re.compile(
    r"^[ \t]*#[ \t]*(?:include|import)[ \t]*[<\"](?:metal_\w+|simd/simd\.h|TargetConditionals\.h)[>\"].*$", re.M
)
UNROLL = re.compile(r"^([ \t]*#pragma unroll)[ \t]*\(.*[A-Za-z_].*$", re.M)


def preprocess(text: str, macros: Mapping[str, str | None]) -> str:
    """Expands the user's macros; what the language's own headers define stays for the compiler. In `#pragma unroll (N)`
    nothing is expanded, so N, a hint, goes."""
    flags = ["-E", "-undef", "-nostdinc", "-x", "c++", "-std=c++17", *defines({**PREDEFINED, **macros})]
    done = run(
        ["clang", *flags, "-Wno-builtin-macro-redefined", "-w", "-"], '# 1 "program_source"\n' + OURS.sub("", text)
    )
    return UNROLL.sub(r"\1", done)


class Compiled:
    """A Metal library: its kernels and function constants, and the machine code made so far."""

    def __init__(self, text: str, macros: Mapping[str, str | None]) -> None:
        self.source, self.macros = text, macros
        self.identity = key(text, sorted(macros.items()))
        path = cache_folder() / f"{self.identity}.json"
        if path.exists():
            facts = json.loads(path.read_text())
        else:
            if "bfloat" in self.source and None in macros.values():
                check.no_bfloat(self.preprocessed)
            program, choices = self.checked(self.preprocessed)
            facts = {
                "kernels": [k.json() for k in program.kernels],
                "constants": [vars(c) for c in program.constants],
                "choices": choices,
            }
            replace(path, json.dumps(facts))
        self.choices = facts["choices"]
        self.kernels = [Kernel(**{**k, "arguments": [Argument(**a) for a in k["arguments"]]}) for k in facts["kernels"]]
        self.constants = [Constant(**c) for c in facts["constants"]]

    @functools.cached_property
    def preprocessed(self) -> str:
        return preprocess(self.source, self.macros)

    def flags(self, instrumented: bool) -> list[str]:
        return [*flags(instrumented), "-include-pch", str(header(instrumented))]

    def text(self, program: source.Program, wanted: Sequence[int]) -> str:
        entries = "".join(entry(program.kernels[n], n) for n in wanted)
        return f'{program.text}\n# 1 "softmetal_entries"\n{entries}'

    def checked(self, text: str) -> tuple[source.Program, list[int]]:
        """The rewritten program, free of errors, and the lines whose `?:` had to be rewritten for that."""
        choices: set[int] = set()
        while True:
            program = source.rewrite(text, choices=choices)
            try:
                self.syntax(program)
                return program, sorted(choices)
            except MetalError as e:
                found = {int(n) for n in AMBIGUOUS.findall(str(e))} - choices
                if not found:
                    raise
                choices |= found

    def syntax(self, program: source.Program) -> None:
        """Type-checks everything, every kernel included; raises MetalError with clang's messages."""
        flags = [*self.flags(False), "-fsyntax-only", *mixed.RANGES]
        text = self.text(program, range(len(program.kernels)))
        try:
            text = mixed.settled(text, lambda t: run(["clang", *flags, "-"], t) + t)
        except MetalError as e:
            raise MetalError(readable(str(e))) from None
        calls: dict[str, set[str]] = {}
        for name in program.suspects:
            dump = run(["clang", *flags, "-Xclang", "-ast-dump=json", f"-Xclang=-ast-dump-filter={name}", "-"], text)
            calls |= references(dump)
        if name := cycle(calls):
            raise MetalError(
                f"program_source: error: the function '{name.split(' ')[0]}' calls itself; Metal has no recursion"
            )

    def wanted(self, number: int, values: dict[str, str]) -> list[int]:
        """What is compiled with kernel `number`: all kernels if they are few and nothing is specialised."""
        alone = bool(values or self.constants or len(self.kernels) > 24)
        return [number] if alone else list(range(len(self.kernels)))

    def library_path(self, number: int, values: dict[str, str], instrumented: bool) -> Path:
        """Where the machine code of kernel `number` is kept."""
        wanted = self.wanted(number, values)
        return cache_folder() / f"{key(self.identity, wanted, sorted(values.items()), instrumented)}.so"

    def library(self, number: int, values: dict[str, str], instrumented: bool) -> Path:
        """Machine code of kernel `number`, compiled if it is not there."""
        path, wanted = self.library_path(number, values, instrumented), self.wanted(number, values)
        if not path.exists():
            program = source.rewrite(self.preprocessed, values, instrumented, self.choices)
            unit = [("-", [*self.flags(instrumented), *mixed.RANGES])]
            try:
                mixed.settled(self.text(program, wanted), lambda t: build(path, unit, t))
            except MetalError as e:
                raise MetalError(readable(str(e))) from None
        return path


def replace(path: Path, content: str | bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as f:
        f.write(content.encode() if isinstance(content, str) else content)
    os.replace(name, path)


AMBIGUOUS = re.compile(
    r"program_source:(\d+):\d+:\S* error: (?:conditional expression is ambiguous|incompatible operand types)"
)
SPELLINGS = [
    (re.compile(r"(:\d+):(?:\{[\d:-]+\})+:"), r"\1:"),
    (re.compile(r"__global_device\b"), "device"),
    (re.compile(r"const __global\b|__global const\b"), "constant"),
    (re.compile(r"__global\b"), "device"),
    (re.compile(r"__local\b"), "threadgroup"),
    (re.compile(r"__private\b ?"), ""),
    (re.compile(r"__generic\b ?"), ""),
    (re.compile(r"sm_make<([\w:]+)>"), r"\1"),
]


def readable(messages: str) -> str:
    for pattern, spelling in SPELLINGS:
        messages = pattern.sub(spelling, messages)
    return "\n".join(line for line in messages.splitlines() if not line.startswith("zig: "))


def references(dump: str) -> dict[str, set[str]]:
    """The functions of a dumped syntax tree, as "name type", with the functions that each refers to."""
    found: dict[str, set[str]] = {}
    decoder, at = json.JSONDecoder(), 0
    while (at := dump.find("{", at)) >= 0:
        node, at = decoder.raw_decode(dump, at)
        for f in walk(node):
            if f.get("kind") in ("FunctionDecl", "CXXMethodDecl"):
                used = [
                    d["referencedDecl"] for d in walk(f) if d.get("kind") == "DeclRefExpr" and "referencedDecl" in d
                ]
                found.setdefault(identity(f), set()).update(identity(d) for d in used)
    return found


def identity(declaration: dict[str, Any]) -> str:
    return f"{declaration.get('name')} {declaration.get('type', {}).get('qualType')}"


def cycle(calls: dict[str, set[str]]) -> str:
    """A function that reaches itself, or nothing."""
    for start in calls:
        todo, seen = [start], set()
        while todo:
            for other in calls.get(todo.pop(), ()):
                if other == start:
                    return start
                if other not in seen:
                    seen.add(other)
                    todo.append(other)
    return ""


def walk(node: Any) -> Any:
    if isinstance(node, dict):
        yield node
        for child in node.get("inner", ()):
            yield from walk(child)


if sys.platform == "win32":
    raise ImportError("softmetal runs on Linux")

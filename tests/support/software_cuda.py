"""Runs CUDA source on the CPU: the text that NVRTC would get, compiled by clang behind software_cuda.h.

What the text says in PTX becomes a call of a function named like the instruction, with the operands of the `asm`
statement; an instruction that the header does not have is an error of the compiler.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import fake_cuda
import numpy as np
import pytest

pytest.importorskip("ziglang", reason="CUDA in software needs clang: pip install ziglang")

from nitinol.compiler import ir
from nitinol.compiler.driver import prepare, tile_ir
from nitinol.compiler.gpu import LOG_BYTES, Executable, compile_function, cuda
from nitinol.language.jit import specialise
from nitinol.runtime import cuda as runtime
from nitinol.runtime import cuda_driver
from nitinol.runtime.cuda import CudaDevice
from softmetal import compile as clang

HEADER = Path(__file__).with_name("software_cuda.h").read_text()
FLAGS = [
    *("-x", "c++", "-std=c++17", "-O1", "-w", "-fwrapv", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-rtti"),
    *("-mllvm", "-unroll-threshold=60"),
]
MATHS = ctypes.CDLL("libm.so.6", ctypes.RTLD_GLOBAL)
PAGE = mmap.PAGESIZE
LIBC: Any = ctypes.CDLL(None)
LIBC.mmap.restype, LIBC.munmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t]
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


# ------------------------------------------------------------------------------------------------------- source


def host_source(name: str, source: str) -> str:
    """C++ for clang: the header, the kernel's text without PTX, a function that takes the addresses of its arguments,
    and their sizes."""
    text = without_ptx(source)
    text = re.sub(r"#pragma unroll.*", "", text)
    text = re.sub(r"extern __shared__ .*? uchar scratch\[\];", "uchar *const scratch = cuda::shared;", text)
    head = re.search(rf'extern "C" __global__ void __launch_bounds__\([\d, ]+\) {name}\((.*?)\)\n\{{', text, re.S)
    assert head is not None, f"no kernel {name} in\n{text}"
    types = [re.sub(r"\w+$", "", p.replace("__grid_constant__", "").replace("const ", "").strip())
             for p in head[1].replace("__restrict__", "").split(",")]  # fmt: skip
    given = ", ".join(f"*({kind} *)p[{number}]" for number, kind in enumerate(types))
    sizes = ", ".join(f"sizeof({kind})" for kind in types)
    return (f'{HEADER}\n{text}\nextern "C" void cuda_body(void **p) {{ {name}({given}); }}\n'
            f'extern "C" const unsigned cuda_sizes[] = {{{sizes}, 0}};\n')  # fmt: skip


def without_ptx(text: str) -> str:
    """Every `asm` statement as a call of a function of the header."""
    out, end = [], 0
    for match in re.finditer(r"\basm\s*(?:volatile\s*)?\(", text):
        depth, at, quoted = 1, match.end(), False
        sections, start = [], at
        while depth:
            c = text[at]
            if c == '"':
                quoted = not quoted
            elif not quoted:
                depth += (c in "([{") - (c in ")]}")
                if depth == 0 or (depth == 1 and c == ":"):
                    sections.append(text[start:at])
                    start = at + 1
            at += 1
        out += [text[end : match.start()], call(sections)]
        end = at
    return "".join(out) + text[end:]


def call(sections: Sequence[str]) -> str:
    template = "".join(re.findall(r'"([^"]*)"', sections[0]))
    outputs, inputs = ([*map(operand, split(s))] for s in (*sections[1:3], "", "")[:2])
    instructions = [i for i in re.split(r"[{;]\s+|;", template) if re.match(r"[a-z]\w*\.", i)]
    instructions = [i for i in instructions if not i.startswith("setp.")]
    if not instructions:
        return f"ptx::nothing({', '.join([*outputs, *inputs])})"
    (instruction,) = instructions
    name = re.sub(r"\W+", "_", instruction.split()[0])
    if name.startswith("wgmma_mma"):
        return f"ptx::{name}({{{', '.join(f'&({o})' for o in outputs)}}}, {', '.join(inputs)})"
    numbers = [int(n) for n in re.findall(r"%(\d+)", instruction)]
    if not numbers:  # operands only for what the compiler must not move over it
        return f"ptx::{name}({', '.join(inputs)})"
    assert list(dict.fromkeys(numbers)) == list(range(len(outputs) + len(inputs))), f"operands out of order: {template}"
    return f"ptx::{name}({', '.join([*outputs, *inputs])})"


def operand(text: str) -> str:
    """The expression of `"constraint"(expression)`."""
    return text.strip().split("(", 1)[1][:-1]


def split(text: str) -> list[str]:
    """What commas outside of parentheses divide."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and not depth:
            parts.append("")
        else:
            parts[-1] += c
    return [part for part in parts if part.strip()]


# ------------------------------------------------------------------------------------------------------- running


class Late(ctypes.Structure):
    _fields_ = [("to", ctypes.c_void_p), ("given", ctypes.c_void_p), ("nbytes", ctypes.c_size_t)]


class Kernel:
    """A kernel as machine code for this processor."""

    def __init__(self, name: str, source: str) -> None:
        text = host_source(name, source)
        flags = [*FLAGS, *clang.FREESTANDING, *clang.target()]
        path = clang.cache_folder() / f"cuda-{clang.key(text, flags)}.so"
        if not path.exists():
            try:
                clang.build(path, [("-", flags)], text)
            except clang.MetalError as problem:
                raise AssertionError(f"{problem}\n{source}") from None
        self.name, self.code = name, ctypes.CDLL(str(path))
        self.code.cuda_launch.restype = ctypes.c_char_p
        numbers = (ctypes.c_uint32 * 1024).in_dll(self.code, "cuda_sizes")
        self.sizes = list(itertools.takewhile(bool, numbers))  # of the parameters, in bytes

    def __call__(
        self, grid: Sequence[int], threads: int, shared: int, words: Sequence[bytes],
        programs: Iterable[tuple[int, int, int]] | None = None, seed: int | None = None,
        late: Sequence[tuple[np.ndarray, np.ndarray]] = (),
    ) -> None:  # fmt: skip
        """Runs the programs of the grid (default: all) on parameters given as bytes. AssertionError for an access
        outside of memory, and for threads that wait for each other for ever. `seed`: which threads run first. `late`:
        memory, and what kernels before this one write there, which it has to wait for."""
        if programs is None:
            programs = ((x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0]))
        numbers = list(itertools.chain(*programs))
        storage = [ctypes.create_string_buffer(word + bytes(-len(word) % 8)) for word in words]
        parameters = (ctypes.c_void_p * len(words))(*(ctypes.addressof(word) for word in storage))
        copies = (Late * len(late))(*((to.ctypes.data, given.ctypes.data, to.nbytes) for to, given in late))
        ctypes.c_void_p.in_dll(self.code, "cuda_late").value = ctypes.addressof(copies)
        waits = ctypes.c_uint32.in_dll(self.code, "cuda_late_count")
        waits.value = len(late)
        seed = int(np.random.default_rng().integers(1 << 32)) if seed is None else seed
        told = self.code.cuda_launch(
            self.code.cuda_body, parameters, threads, shared, (ctypes.c_uint32 * 3)(*grid),
            (ctypes.c_uint32 * len(numbers))(*numbers), len(numbers) // 3, ctypes.c_uint32(seed),
        ).decode()  # fmt: skip
        if not told and waits.value and len(numbers):
            told = "it does not wait for those before it"
        if told:
            raise AssertionError(f"kernel {self.name}: {told} (seed {seed})")


kernel = functools.cache(Kernel)


class _Interface:
    def __init__(self, address: int, nbytes: int) -> None:
        self.__array_interface__ = {"data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}


def guarded(nbytes: int, shift: int = 0) -> np.ndarray:
    """Bytes that end where nobody may read or write, but for what it takes to begin at `shift` modulo 16 (kernels know
    no more of addresses). Memory that is not touched costs nothing, however large it is."""
    size = -(-(nbytes + 16) // PAGE) * PAGE
    start = LIBC.mmap(None, size + 2 * PAGE, 0, 0x4022, -1, 0)  # PROT_NONE, private, anonymous, no reserve
    assert start not in (None, (1 << 64) - 1) and LIBC.mprotect(start + PAGE, size, 3) == 0, "no memory"
    end = start + PAGE + size
    first = end - nbytes
    first -= (first - shift) % 16
    return np.asarray(_Interface(first, nbytes))


def release(memory: np.ndarray) -> None:
    """Gives memory of `guarded` back."""
    size = -(-(memory.nbytes + 16) // PAGE) * PAGE
    end = -(-(memory.ctypes.data + memory.nbytes) // PAGE) * PAGE
    LIBC.munmap(end - size - PAGE, size + 2 * PAGE)


def run(
    executable: Executable, grid: Sequence[int], values: Sequence[Any],
    programs: Iterable[tuple[int, int, int]] | None = None, seed: int | None = None,
) -> None:  # fmt: skip
    """Launches the kernel on NumPy arrays, which are changed in place. AssertionError as of `Kernel`, and with the
    message of an assertion of the kernel that fails."""
    grid = (*grid, 1, 1)[:3]
    copies: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    words = []
    for index in executable.pointers:
        value = getattr(values[index], "array", values[index])
        if id(value) not in copies:
            assert value.flags.c_contiguous
            memory = guarded(value.nbytes, value.ctypes.data % 16)
            copies[id(value)] = (value, memory)
        words.append(copies[id(value)][1].ctypes.data.to_bytes(8, "little"))
    words.append(executable.arguments(values, grid))
    extra = [guarded(n) for n in [4] * bool(executable.asserts) + [LOG_BYTES] * bool(executable.prints)]
    words += [memory.ctypes.data.to_bytes(8, "little") for memory in extra]
    try:
        made = kernel(executable.name, executable.source)
        there = {id(getattr(values[i], "array", values[i])) for i in executable.early}  # nobody before it writes that
        late = []
        for value, memory in copies.values():
            given = value.reshape(-1).view(np.uint8)
            if "griddepcontrol.wait" in executable.source and id(value) not in there:
                memory[:] = 255  # NaN
                late.append((memory, given))
            else:
                memory[:] = given
        made(grid, executable.threads, executable.threadgroup_bytes, words, programs, seed, late)
        for value, memory in copies.values():
            if value.flags.writeable:
                value.reshape(-1).view(np.uint8)[:] = memory
        if executable.prints and (lines := executable.printed(extra[-1].tobytes())):
            print(*lines, sep="\n")
        if executable.asserts and (failed := int(extra[0].view(np.uint32)[0])):
            raise AssertionError(executable.asserts[failed])
    except AssertionError as problem:
        names = [executable.function.parameters[index].name for index in executable.pointers]
        places = {name: hex(int.from_bytes(word, "little")) for name, word in zip(names, words)}
        raise AssertionError(f"{problem}; buffers {places}") from None
    finally:
        for memory in [*(memory for _, memory in copies.values()), *extra]:
            release(memory)


class Gpu(fake_cuda.Driver):
    """An NVIDIA GPU whose kernels run here, for the driver of Nitinol: every allocation ends at a guard page."""

    def __init__(self, capability: tuple[int, int] = (9, 0), total: int = 80 << 30) -> None:
        super().__init__(capability=capability, total=total)

    def cuMemAlloc(self, nbytes: int) -> Any:
        memory = guarded(nbytes)
        self.memory[memory.ctypes.data] = memory
        return 0, memory.ctypes.data

    def cuMemFree(self, address: int) -> Any:
        release(self.memory.pop(address))
        return (0,)

    def cuGraphAddKernelNode(self, graph: list[Any], before: list[Any], count: int, node: Any) -> Any:
        made = node.func
        pointers = (ctypes.c_void_p * len(made.sizes)).from_address(node.kernelParams)
        words = [ctypes.string_at(pointer, size) for pointer, size in zip(pointers, made.sizes)]
        grid = node.gridDimX, node.gridDimY, node.gridDimZ
        run = functools.partial(self.start, made, grid, node, words)
        return self._add(graph, fake_cuda.Node(f"kernel {made.name}", before, run))

    def start(self, made: Kernel, grid: tuple[int, int, int], node: Any, words: list[bytes]) -> None:
        made(grid, node.blockDimX, node.sharedMemBytes, words)

    def cuModuleGetFunction(self, module: Any, name: bytes) -> Any:
        return 0, module


def open_gpu(monkeypatch: pytest.MonkeyPatch, gpu: Gpu) -> CudaDevice:
    """The device that Nitinol's driver makes of it."""
    for module in (runtime, cuda_driver):
        monkeypatch.setattr(module, "bindings", lambda: (gpu, fake_cuda.Nvrtc()))
    monkeypatch.setattr(runtime, "compile_cubin", lambda name, source, *_: kernel(name, source))
    return CudaDevice()


# ------------------------------------------------------------------------------------------------------- kernels


def executable(
    function: ir.Function, name: str, warps: int = 4, aliases: tuple[int, ...] = (), capability: int = 90
) -> Executable:
    return compile_function(prepare(function), aliases, warps, cuda.for_capability(capability), name)


def compiled(
    kernel: Any, warps: int = 0, capability: int = 90, stages: int = 0, **arguments: Any
) -> tuple[Executable, list[Any]]:
    """The kernel's executable for these arguments, and the values of its run-time parameters."""
    bound = kernel.bind((), arguments)
    signature, _ = specialise(kernel, bound)
    made = compile_function(tile_ir(kernel, signature), (), warps, cuda.for_capability(capability), stages=stages)
    return made, [bound[parameter] for parameter, _, _ in signature.parameters]


def launch(
    kernel: Any, grid: Sequence[int], warps: int = 0, capability: int = 90, stages: int = 0,
    programs: Iterable[tuple[int, int, int]] | None = None, **arguments: Any,
) -> Executable:  # fmt: skip
    made, values = compiled(kernel, warps, capability, stages, **arguments)
    run(made, grid, values, programs)
    return made

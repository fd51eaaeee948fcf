"""The host CPU as LLVM sees it, and the last step: LLVM text to machine code in this process."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import llvmlite.binding as llvm


@dataclass(frozen=True)
class Target:
    """`vector_bytes`: width of the widest registers worth using; `features`: LLVM's names of what the CPU has."""

    triple: str
    cpu: str
    features: frozenset[str]
    vector_bytes: int
    vector_registers: int

    @property
    def key(self) -> str:
        return f"{self.triple}/{self.cpu}/{','.join(sorted(self.features))}"

    def has(self, *features: str) -> bool:
        return all(f in self.features for f in features)


@functools.cache
def host_target() -> Target:
    """This machine."""
    initialise()
    features = frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)
    if "avx512f" in features and "avx512vl" in features and "avx512bw" in features:
        width, registers = 64, 32
    elif "avx2" in features:
        width, registers = 32, 16
    else:  # NEON, SSE: 128 bits; twice that a step keeps more operations in flight
        width, registers = 16, 32 if "neon" in features else 16
    return Target(llvm.get_default_triple(), llvm.get_host_cpu_name(), features, width, registers)


@functools.cache
def initialise() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


@functools.cache
def _machine() -> llvm.TargetMachine:
    target = host_target()
    features = ",".join("+" + f for f in sorted(target.features))
    if target.vector_bytes == 64:
        features += ",-prefer-256-bit"
    return llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features=features, opt=3, reloc="static", codemodel="jitdefault", jit=True
    )


def optimise(text: str) -> llvm.ModuleRef:
    """LLVM IR text through the standard pipeline; our loops are already vectors, so LLVM's vectorisers are off."""
    initialise()
    module = llvm.parse_assembly(text)
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = False
    options.slp_vectorization = False
    options.loop_interleaving = False
    options.loop_unrolling = False  # our loops are unrolled as far as pays
    builder = llvm.create_pass_builder(_machine(), options)
    builder.getModulePassManager().run(module, builder)
    return module


def assemble(module: llvm.ModuleRef) -> bytes:
    """Machine code as an object file."""
    return _machine().emit_object(module)


def assembly(module: llvm.ModuleRef) -> str:
    return _machine().emit_assembly(module)


_engines: list[llvm.ExecutionEngine] = []  # code lives as long as the process


def load_object(data: bytes, symbol: str) -> int:
    """Links an object file into this process; the address of one function in it."""
    initialise()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), llvm.Target.from_triple(
        host_target().triple).create_target_machine(jit=True))
    engine.add_object_file(llvm.ObjectFileRef.from_data(data))
    engine.finalize_object()
    _engines.append(engine)
    address = engine.get_function_address(symbol)
    if not address:
        raise RuntimeError(f"the compiled code does not contain {symbol}")
    return address

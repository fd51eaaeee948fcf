"""How fast this machine can multiply and add: the limit that prefill, which is all matrix products, is held to."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

from nitinol.runtime.native import PREFIX, Body, compile_module, constant

STEPS = 20_000  # of the inner loop in one program: some 50 us
ACCUMULATORS = 24  # independent sums: more than latency times units (8 to 10) on any core, fewer than 32 registers
LANES = 16  # of 32 bits; LLVM splits the vector where the machine's are narrower


def measure_peak_rates(device: Any, repetitions: int = 5) -> dict[str, float]:
    """10⁹ operations a second with all workers on register operands, a product and its sum counting as two.

    "float32": fused multiply-add; "int8": the byte dot instruction where there is one, else the same as float32
    arithmetic. The best of `repetitions`; takes about 20 ms. For a GPU see `gpu_limits.peak_rates`.
    """
    if device.target != "cpu":
        from nitinol.runtime.gpu_limits import peak_rates

        return peak_rates(device, repetitions)
    vnni = llvm.get_host_cpu_features().get("avx512vnni", False)
    rates = {"float32": _rate(device, _kernel("fma"), 2 * LANES, repetitions)}
    rates["int8"] = _rate(device, _kernel("vnni"), 8 * LANES, repetitions) if vnni else rates["float32"]
    return rates


def _rate(device: Any, module: ir.Module, operations: int, repetitions: int) -> float:
    engine = compile_module(module, level=2)
    kernel = SimpleNamespace(name="peak", address=engine.get_function_address(PREFIX + "peak"), scratch_bytes=0)
    programs = 8 * device.threads
    sums, commands = device.allocate(4 * LANES * programs), device.command_list()
    sums.as_numpy()[:] = 0
    commands.launch(kernel, (programs,), [sums])
    best = 0.0
    for _ in range(repetitions):
        start = time.perf_counter()
        device.run(commands)
        seconds = time.perf_counter() - start
        best = max(best, programs * STEPS * ACCUMULATORS * operations / seconds / 1e9)
    return best


def _kernel(kind: str) -> ir.Module:
    """Program p adds up products in ACCUMULATORS vectors and writes their sum to vector p of args[0]."""
    module = ir.Module(f"nitinol_peak_{kind}")
    f = Body(module, "peak", "args scratch grid first last")
    element: Any = ir.FloatType() if kind == "fma" else ir.IntType(32)
    vector, b = ir.VectorType(element, LANES), f.b
    intrinsic = {"fma": f"llvm.fma.v{LANES}f32", "vnni": "llvm.x86.avx512.vpdpbusd.512"}[kind]
    # Since LLVM 22 the byte dot takes its factors as bytes, before as vectors of i32.
    factor = ir.VectorType(ir.IntType(8), 4 * LANES) if kind == "vnni" and llvm.llvm_version_info[0] >= 22 else vector
    factors = [vector, factor, factor] if kind == "vnni" else [vector] * 3
    multiply = ir.Function(module, ir.FunctionType(vector, factors), intrinsic)
    args, _, _, first, last = f.parameters
    sums = f.get(args, 0)
    accumulators = [b.alloca(vector) for _ in range(ACCUMULATORS)]
    program, step = f.variable(first), f.variable(0)
    with f.loop() as (_, end):
        f.jump_if(f.test(f.read(program), ">=", last), end)
        place = b.inttoptr(b.add(sums, b.mul(f.read(program), constant(4 * LANES))), vector.as_pointer())
        start = b.load(place, align=4, typ=vector)  # unknown to the compiler, which so cannot compute ahead
        operand = b.bitcast(start, factor)
        for accumulator in accumulators:
            b.store(start, accumulator)
        b.store(constant(0), step)
        with f.loop() as (_, done):
            f.jump_if(f.test(f.read(step), ">=", STEPS), done)
            for accumulator in accumulators:
                total = b.load(accumulator, typ=vector)
                terms = [total, operand, operand] if kind == "vnni" else [operand, operand, total]
                b.store(b.call(multiply, terms), accumulator)
            f.step(step)
        total = b.load(accumulators[0], typ=vector)
        for accumulator in accumulators[1:]:
            add = b.fadd if kind == "fma" else b.add
            total = add(total, b.load(accumulator, typ=vector))
        b.store(total, place, align=4)
        f.step(program)
    f.finish()
    return module

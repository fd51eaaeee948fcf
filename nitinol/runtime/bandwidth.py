"""How fast this machine reads memory: the limit that decoding, which reads every weight once a token, is held to."""

from __future__ import annotations

import mmap
import time
from types import SimpleNamespace
from typing import Any

from llvmlite import ir

from nitinol.runtime.cpu import CpuDevice
from nitinol.runtime.device import DeviceError
from nitinol.runtime.memory import available_memory
from nitinol.runtime.native import I64, PREFIX, Body, compile_module, constant

BLOCK = 1 << 20  # bytes that one program reads
LANES = 8  # int64 in a vector of 512 bits; LLVM splits it where the machine's are narrower
# Two streams of four vectors: on a 2-core Zen 5 server two threads read 36 GB/s from one stream each and 43 GB/s
# from two; more streams, more accumulators and software prefetch change nothing.
STREAMS, VECTORS = 2, 4


def measure_read_bandwidth(device: Any, threads: int | None = None, nbytes: int = 512 << 20,
                           repetitions: int = 7) -> float:
    """Read `nbytes` (rounded down to MiB; should be far larger than the caches) with all workers and combine them.

    threads: another number of workers than the CPU device has. Returns GB/s (10⁹ bytes), the best of `repetitions`.
    The memory is on ordinary pages, like a mapped file. With little memory left, a smaller buffer is used. A GPU reads
    eight times as much.
    """
    if device.target != "cpu":
        from nitinol.runtime.gpu_limits import read_bandwidth

        return read_bandwidth(device, min(8 * nbytes, device.available_memory() // 2), repetitions)
    if threads is not None and threads != device.threads:
        other = CpuDevice(threads)
        try:
            return measure_read_bandwidth(other, None, nbytes, repetitions)
        finally:
            other.close()
    blocks = min(nbytes, (available_memory() or nbytes) // 2) // BLOCK
    if blocks < 1:
        raise DeviceError(f"a bandwidth measurement over {nbytes} bytes is too small; read at least {BLOCK}")
    nbytes = blocks * BLOCK
    engine = compile_module(_read_kernel(), level=2)
    kernel = SimpleNamespace(name="read", address=engine.get_function_address(PREFIX + "read"), scratch_bytes=0)
    source, sums = device.wrap(mmap.mmap(-1, nbytes)), device.allocate(8 * blocks)
    touch, read = device.command_list(), device.command_list()
    touch.fill(source, 1)  # untouched pages would all be one page of zeros, in the cache
    device.run(touch)
    read.launch(kernel, (blocks,), [source, sums])
    best = 0.0
    for _ in range(repetitions):
        start = time.perf_counter()
        device.run(read)
        best = max(best, nbytes / (time.perf_counter() - start) / 1e9)
    return best


def _read_kernel() -> ir.Module:
    """Program p combines block p of args[0] by exclusive or into int64 number p of args[1]."""
    module = ir.Module("nitinol_bandwidth")
    f = Body(module, "read", "args scratch grid first last")
    b, vector = f.b, ir.VectorType(I64, LANES)
    args, _, _, first, last = f.parameters
    source, sums = f.get(args, 0), f.get(args, 1)
    accumulators = [b.alloca(vector) for _ in range(STREAMS * VECTORS)]
    program, offset = f.variable(first), f.variable(0)
    with f.loop() as (_, end):
        f.jump_if(f.test(f.read(program), ">=", last), end)
        for accumulator in accumulators:
            b.store(ir.Constant(vector, [0] * LANES), accumulator)
        b.store(constant(0), offset)
        block = b.add(source, b.mul(f.read(program), constant(BLOCK)))
        with f.loop() as (_, done):
            f.jump_if(f.test(f.read(offset), ">=", BLOCK // STREAMS), done)
            for number, accumulator in enumerate(accumulators):
                stream, step = divmod(number, VECTORS)
                place = b.add(b.add(block, f.read(offset)), constant(stream * (BLOCK // STREAMS) + step * 8 * LANES))
                value = b.load(b.inttoptr(place, vector.as_pointer()), align=64, typ=vector)
                b.store(b.xor(b.load(accumulator, typ=vector), value), accumulator)
            f.step(offset, VECTORS * 8 * LANES)
        total = b.load(accumulators[0], typ=vector)
        for accumulator in accumulators[1:]:
            total = b.xor(total, b.load(accumulator, typ=vector))
        lanes = [b.extract_element(total, constant(lane)) for lane in range(LANES)]
        for lane in lanes[1:]:
            lanes[0] = b.xor(lanes[0], lane)
        f.put(b.add(sums, b.shl(f.read(program), constant(3))), 0, lanes[0])
        f.step(program)
    f.finish()
    return module

"""What this machine's memory gives to a loop that reads and writes, written by hand as LLVM IR.

The yardstick for kernels that stream: no tile language, no arrays, only vector loads, additions and stores. There are
two ways to write: ordinary stores, before which the processor reads the lines that are to be overwritten, and
non-temporal stores, which do without and go around the caches. The better one is the limit. Reading alone is
`nitinol.runtime.bandwidth`.
"""

from __future__ import annotations

import time
from types import SimpleNamespace

from llvmlite import ir

from nitinol.runtime.cpu import CpuDevice
from nitinol.runtime.native import PREFIX, Body, compile_module, constant

BLOCK = 1 << 16  # bytes of each stream that one program handles
LANES, VECTORS = 16, 4  # float32 in a vector of 512 bits; vectors in a step


def stream_bandwidth(device: CpuDevice, reads: int, nbytes: int = 128 << 20, repetitions: int = 5) -> dict[str, float]:
    """GB/s (10⁹ bytes, those of the lines read before being overwritten not counted) of out = sum of `reads` streams of
    `nbytes` each, rounded down to 64 KiB: the best of `repetitions`, by kind of store."""
    blocks = nbytes // BLOCK
    streams = [device.allocate(blocks * BLOCK) for _ in range(reads + 1)]
    commands = device.command_list()
    for stream in streams:
        commands.fill(stream, 0)
    device.run(commands)
    return {kind: _measure(device, streams, blocks, kind == "non-temporal", repetitions)
            for kind in ("ordinary", "non-temporal")}


def _measure(device: CpuDevice, streams: list, blocks: int, non_temporal: bool, repetitions: int) -> float:
    engine = compile_module(_kernel(len(streams) - 1, non_temporal), level=2)
    kernel = SimpleNamespace(name="stream", address=engine.get_function_address(PREFIX + "stream"), scratch_bytes=0)
    commands = device.command_list()
    commands.launch(kernel, (blocks,), streams)
    best = 0.0
    for _ in range(repetitions):
        start = time.perf_counter()
        device.run(commands)
        best = max(best, len(streams) * blocks * BLOCK / (time.perf_counter() - start) / 1e9)
    return best


def _kernel(reads: int, non_temporal: bool) -> ir.Module:
    """Program p: block p of the last argument becomes the sum of blocks p of the others."""
    module = ir.Module("nitinol_stream")
    f = Body(module, "stream", "args scratch grid first last")
    b, vector = f.b, ir.VectorType(ir.FloatType(), LANES)
    args, _, _, first, last = f.parameters
    streams = [f.get(args, i) for i in range(reads + 1)]
    flag = module.add_metadata([ir.Constant(ir.IntType(32), 1)])
    offset = f.variable(b.mul(first, constant(BLOCK)))
    end_offset = b.mul(last, constant(BLOCK))
    with f.loop() as (_, end):
        f.jump_if(f.test(f.read(offset), ">=", end_offset), end)
        for step in range(VECTORS):
            place = b.add(f.read(offset), constant(step * 4 * LANES))
            pointers = [b.inttoptr(b.add(stream, place), vector.as_pointer()) for stream in streams]
            total = b.load(pointers[0], align=64, typ=vector)
            for pointer in pointers[1:-1]:
                total = b.fadd(total, b.load(pointer, align=64, typ=vector))
            store = b.store(total, pointers[-1], align=64)
            if non_temporal:
                store.set_metadata("nontemporal", flag)
        f.step(offset, VECTORS * 4 * LANES)
    f.finish()
    return module

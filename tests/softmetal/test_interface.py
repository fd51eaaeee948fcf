# ruff: noqa: E501  (Metal source in strings)
"""Buffers, queues, events, indirect command buffers, limits and errors, as a program on a Mac would use them."""

from __future__ import annotations

import mmap
import threading
import time

import numpy as np
import pytest
from metal_runner import Metal, Runner, three

import softmetal

SOURCE = """
#include <metal_stdlib>
using namespace metal;
kernel void add_one(device float* x [[buffer(0)]], uint i [[thread_position_in_grid]]) { x[i] += 1; }
kernel void twice(device float* x [[buffer(0)]], uint i [[thread_position_in_grid]]) { x[i] *= 2; }
kernel void copy(device const float* x [[buffer(0)]], device float* y [[buffer(1)]], constant float& by [[buffer(2)]],
                 uint i [[thread_position_in_grid]]) { y[i] = x[i] + by; }
kernel void memory(device float* x [[buffer(0)]], threadgroup float* t [[threadgroup(0)]], uint i [[thread_position_in_grid]]) {
    threadgroup float s[4096];
    s[i] = x[i]; t[i] = s[i]; x[i] = t[i];
}
kernel void deep(device float* x [[buffer(0)]], uint i [[thread_position_in_grid]]) {
    float a[20000];
    for (int k = 0; k < 20000; k++) a[k] = x[(i + k) % 32];
    threadgroup_barrier(mem_flags::mem_device);
    x[i] = a[int(x[i]) * 7];
}
kernel void forever(device atomic_uint* x [[buffer(0)]]) { while (atomic_load_explicit(x, memory_order_relaxed) < 9) {} }
kernel void meeting_forever(device float* x [[buffer(0)]], uint i [[thread_position_in_grid]]) {
    while (simd_sum(x[i]) < 9) {} }
#ifdef SCALE
kernel void scaled(device float* x [[buffer(0)]], uint i [[thread_position_in_grid]]) { x[i] *= SCALE; }
#endif
"""
DEVICE = Metal.MTLCreateSystemDefaultDevice()


@pytest.fixture(scope="module")
def runner():
    return Runner(SOURCE)


def buffer(array):
    return DEVICE.newBufferWithBytes_length_options_(array, array.nbytes, Metal.MTLResourceStorageModeShared)


def array(b, count=None):
    return np.frombuffer(b.contents().as_buffer(b.length()), "f", count=-1 if count is None else count)


def encode(encoder, pipeline, buffers, threads=32, size=32):
    encoder.setComputePipelineState_(pipeline)
    for i, b in enumerate(buffers):
        encoder.setBuffer_offset_atIndex_(b, 0, i)
    encoder.dispatchThreads_threadsPerThreadgroup_(three(threads), three(size))


def described(runner, name, **properties):
    """The descriptor of a pipeline."""
    d = Metal.MTLComputePipelineDescriptor.alloc().init()
    d.setComputeFunction_(runner.library.newFunctionWithName_(name))
    for key, value in properties.items():
        getattr(d, f"set{key[0].upper()}{key[1:]}_")(value)
    return d


def made(descriptor, options=0):
    return DEVICE.newComputePipelineStateWithDescriptor_options_reflection_error_(descriptor, options, None, None)


def finish(commands):
    commands.commit()
    commands.waitUntilCompleted()
    assert commands.status() == Metal.MTLCommandBufferStatusCompleted, commands.error()


def test_device_says_what_it_is():
    assert DEVICE.name() and DEVICE.hasUnifiedMemory() and DEVICE.maxThreadgroupMemoryLength() == 32768
    assert DEVICE.maxThreadsPerThreadgroup().width == 1024
    assert DEVICE.recommendedMaxWorkingSetSize() > 0 and DEVICE.maxBufferLength() > 0
    assert DEVICE.supportsFamily_(Metal.MTLGPUFamilyApple7) and DEVICE.supportsFamily_(Metal.MTLGPUFamilyMetal3)
    softmetal.configure(working_set_bytes=1 << 20, buffer_bytes=1 << 16, family=7)
    assert DEVICE.recommendedMaxWorkingSetSize() == 1 << 20 and not DEVICE.supportsFamily_(Metal.MTLGPUFamilyApple8)
    assert DEVICE.newBufferWithLength_options_((1 << 16) + 1, 0) is None


def test_buffers():
    before = DEVICE.currentAllocatedSize()
    b = DEVICE.newBufferWithLength_options_(100, Metal.MTLResourceStorageModeShared)
    assert DEVICE.currentAllocatedSize() == before + 100 and b.length() == 100 and b.gpuAddress() % 4096 == 0
    view = b.contents().as_buffer(100)
    assert bytes(view) == bytes(100)
    view[3] = 7
    assert b.contents().as_buffer(4)[3] == 7
    b.setLabel_("weights")
    assert b.label() == "weights" and b.device() is DEVICE
    assert DEVICE.newBufferWithLength_options_(16, Metal.MTLResourceStorageModePrivate).contents() is None
    assert DEVICE.newBufferWithLength_options_(0, 0) is None
    del b
    assert DEVICE.currentAllocatedSize() == before


def test_buffer_without_copy(runner, tmp_path):
    """Memory of the program is used in place, read-only file mappings too; it must be whole pages."""
    page = mmap.PAGESIZE
    memory, freed = mmap.mmap(-1, page), []
    b = DEVICE.newBufferWithBytesNoCopy_length_options_deallocator_(memory, page, 0, lambda p, n: freed.append(n))
    x = np.frombuffer(memory, "f")
    x[:] = 3
    commands = runner.queue.commandBuffer()
    encoder = commands.computeCommandEncoder()
    encode(encoder, runner.pipeline("twice"), [b], threads=page // 4)
    encoder.endEncoding()
    finish(commands)
    assert np.all(x == 6)
    del b, encoder, commands
    assert freed == [page]
    (tmp_path / "file").write_bytes(np.arange(page // 4, dtype="f").tobytes())
    with open(tmp_path / "file", "rb") as f:
        mapped = mmap.mmap(f.fileno(), page, access=mmap.ACCESS_READ)
    b = DEVICE.newBufferWithBytesNoCopy_length_options_deallocator_(mapped, page, 0, None)
    out = np.zeros(page // 4, "f")
    o = buffer(out)
    commands = runner.queue.commandBuffer()
    encoder = commands.computeCommandEncoder()
    encoder.setBytes_length_atIndex_(np.float32(1), 4, 2)
    encode(encoder, runner.pipeline("copy"), [b, o], threads=page // 4)
    encoder.endEncoding()
    finish(commands)
    assert np.array_equal(array(o), np.arange(page // 4) + 1)
    with pytest.raises(softmetal.UsageError, match="page size"):
        DEVICE.newBufferWithBytesNoCopy_length_options_deallocator_(memory, page - 4, 0, None)


def test_macros_of_compile_options():
    options = Metal.MTLCompileOptions.alloc().init()
    options.setPreprocessorMacros_({"SCALE": "5.0f"})
    x = np.ones(8, "f")
    Runner(SOURCE, options).run("scaled", [x], threads=8, size=8)
    assert np.all(x == 5)
    assert "scaled" not in Runner(SOURCE).library.functionNames()


def test_one_command_buffer_many_dispatches(runner):
    softmetal.reset_counters()
    b = buffer(np.zeros(64, "f"))
    commands = runner.queue.commandBufferWithUnretainedReferences()
    encoder = commands.computeCommandEncoderWithDispatchType_(Metal.MTLDispatchTypeConcurrent)
    for _ in range(5):
        encode(encoder, runner.pipeline("add_one"), [b], threads=64)
        encoder.memoryBarrierWithScope_(Metal.MTLBarrierScopeBuffers)
        encode(encoder, runner.pipeline("twice"), [b], threads=64)
        encoder.memoryBarrierWithResources_count_([b], 1)
    encoder.endEncoding()
    seen = []
    commands.addCompletedHandler_(lambda c: seen.append(c.status()))
    finish(commands)
    assert np.all(array(b) == 62) and seen == [Metal.MTLCommandBufferStatusCompleted]
    assert 0 < commands.GPUStartTime() <= commands.GPUEndTime()
    c = softmetal.counters()
    assert (c["submits"], c["waits"], c["allocations"], c["dispatches"], c["threads"]) == (1, 1, 1, 10, 640)


@pytest.mark.parametrize("barrier", [True, False])
def test_a_missing_barrier_between_dispatches_is_found(runner, barrier):
    softmetal.set_validation(True)
    b = buffer(np.zeros(64, "f"))
    commands = runner.queue.commandBuffer()
    encoder = commands.computeCommandEncoderWithDispatchType_(Metal.MTLDispatchTypeConcurrent)
    encode(encoder, runner.pipeline("add_one"), [b], threads=64)
    if barrier:
        encoder.memoryBarrierWithScope_(Metal.MTLBarrierScopeBuffers)
    encode(encoder, runner.pipeline("twice"), [b], threads=64)
    encoder.endEncoding()
    commands.commit()
    commands.waitUntilCompleted()
    texts = softmetal.reports()
    assert not texts if barrier else "another threadgroup or dispatch" in texts[0]


@pytest.mark.parametrize("barrier", [True, False])
def test_a_missing_barrier_between_indirect_commands_is_found(runner, barrier):
    d = Metal.MTLIndirectCommandBufferDescriptor.alloc().init()
    d.setCommandTypes_(Metal.MTLIndirectCommandTypeConcurrentDispatch)
    d.setMaxKernelBufferBindCount_(1)
    commands = DEVICE.newIndirectCommandBufferWithDescriptor_maxCommandCount_options_(d, 2, 0)
    b = buffer(np.zeros(64, "f"))
    for i, name in enumerate(("add_one", "twice")):
        c = commands.indirectComputeCommandAtIndex_(i)
        c.setComputePipelineState_(made(described(runner, name, supportIndirectCommandBuffers=True))[0])
        c.setKernelBuffer_offset_atIndex_(b, 0, 0)
        c.concurrentDispatchThreadgroups_threadsPerThreadgroup_(three(2), three(32))
        if i and barrier:
            c.setBarrier()
    softmetal.set_validation(True)
    submitted = runner.queue.commandBuffer()
    encoder = submitted.computeCommandEncoder()
    encoder.useResource_usage_(b, Metal.MTLResourceUsageRead | Metal.MTLResourceUsageWrite)
    encoder.executeCommandsInBuffer_withRange_(commands, (0, 2))
    encoder.endEncoding()
    submitted.commit()
    submitted.waitUntilCompleted()
    texts = softmetal.reports()
    assert not texts if barrier else "another threadgroup or dispatch" in texts[0]


def test_indirect_command_buffer(runner):
    d = Metal.MTLIndirectCommandBufferDescriptor.alloc().init()
    d.setCommandTypes_(
        Metal.MTLIndirectCommandTypeConcurrentDispatch | Metal.MTLIndirectCommandTypeConcurrentDispatchThreads
    )
    d.setInheritBuffers_(False)
    d.setInheritPipelineState_(False)
    d.setMaxKernelBufferBindCount_(3)
    commands = DEVICE.newIndirectCommandBufferWithDescriptor_maxCommandCount_options_(d, 4, 0)
    x, y, by = buffer(np.arange(64, dtype="f")), buffer(np.zeros(64, "f")), buffer(np.array([10], "f"))
    for i in range(3):
        c = commands.indirectComputeCommandAtIndex_(i)
        pipeline, error = made(described(runner, ["add_one", "copy", "twice"][i], supportIndirectCommandBuffers=True))
        assert error is None and pipeline.supportIndirectCommandBuffers()
        c.setComputePipelineState_(pipeline)
        for k, b in enumerate([[x], [x, y, by], [y]][i]):
            c.setKernelBuffer_offset_atIndex_(b, 0, k)
        if i == 1:
            c.concurrentDispatchThreads_threadsPerThreadgroup_(Metal.MTLSizeMake(64, 1, 1), Metal.MTLSizeMake(48, 1, 1))
        else:
            c.concurrentDispatchThreadgroups_threadsPerThreadgroup_(
                Metal.MTLSizeMake(2, 1, 1), Metal.MTLSizeMake(32, 1, 1)
            )
        if i:
            c.setBarrier()
    residency, error = DEVICE.newResidencySetWithDescriptor_error_(Metal.MTLResidencySetDescriptor.alloc().init(), None)
    assert error is None
    residency.addAllocation_(y)
    residency.commit()
    queue = DEVICE.newCommandQueue()
    queue.addResidencySet_(residency)

    def run(resident):
        buffer = queue.commandBuffer()
        encoder = buffer.computeCommandEncoder()
        for b in resident:
            encoder.useResource_usage_(b, Metal.MTLResourceUsageRead | Metal.MTLResourceUsageWrite)
        encoder.executeCommandsInBuffer_withRange_(commands, (0, 4))
        encoder.endEncoding()
        buffer.commit()
        buffer.waitUntilCompleted()
        return buffer

    for step in (1, 2):  # encoded once, run twice
        assert run([x, by]).error() is None
        assert np.array_equal(array(y), (np.arange(64) + step + 10) * 2)
    softmetal.set_validation(True)
    assert run([x, by]).error() is None
    assert "neither in a residency set nor passed to useResource" in run([by]).error().localizedDescription()
    with pytest.raises(softmetal.UsageError, match="maxKernelBufferBindCount"):
        commands.indirectComputeCommandAtIndex_(0).setKernelBuffer_offset_atIndex_(x, 0, 3)
    with pytest.raises(softmetal.UsageError, match=r"'add_one' .* setSupportIndirectCommandBuffers"):
        commands.indirectComputeCommandAtIndex_(0).setComputePipelineState_(runner.pipeline("add_one"))


def test_binary_archive_spares_the_compiler(tmp_path, monkeypatch):
    def archive(url=None):
        d = Metal.MTLBinaryArchiveDescriptor.alloc().init()
        d.setUrl_(url)
        return DEVICE.newBinaryArchiveWithDescriptor_error_(d, None)

    def in_new_cache(name):
        monkeypatch.setenv("SOFTMETAL_CACHE", str(tmp_path / name))
        return Runner(SOURCE.replace("x[i] += 1", "x[i] += 5"))

    runner, url = in_new_cache("first"), Metal.NSURL.fileURLWithPath_(str(tmp_path / "kernels"))
    empty, error = archive()
    assert error is None
    only_from_archive = Metal.MTLPipelineOptionFailOnBinaryArchiveMiss
    pipeline, error = made(described(runner, "add_one", binaryArchives=[empty]), only_from_archive)
    assert pipeline is None and "'add_one' is in none of the binary archives" in error.localizedDescription()
    assert empty.addComputePipelineFunctionsWithDescriptor_error_(described(runner, "add_one"), None) == (True, None)
    assert empty.serializeToURL_error_(url, None) == (True, None)

    runner = in_new_cache("second")
    full, error = archive(url)
    assert error is None
    monkeypatch.setattr("softmetal.compile.build", lambda *_: pytest.fail("the compiler ran"))
    pipeline, error = made(described(runner, "add_one", binaryArchives=[full]), only_from_archive)
    b, commands = buffer(np.zeros(32, "f")), runner.queue.commandBuffer()
    encoder = commands.computeCommandEncoder()
    encode(encoder, pipeline, [b])
    encoder.endEncoding()
    finish(commands)
    assert np.all(array(b) == 5)

    (tmp_path / "kernels").write_bytes(b"PK\3\4 damaged")
    damaged, error = archive(url)
    assert damaged is None and error.code() == Metal.MTLBinaryArchiveErrorInvalidFile
    done, error = empty.serializeToURL_error_(Metal.NSURL.fileURLWithPath_(str(tmp_path / "no/such/place")), None)
    assert not done and "cannot be written" in error.localizedDescription()


def test_indirect_dispatch_reads_its_size_when_it_runs(runner):
    b, size = buffer(np.zeros(96, "f")), buffer(np.array([2, 1, 1], "u4"))
    for groups in (2, 3, 0):
        np.frombuffer(size.contents().as_buffer(12), "u4")[0] = groups
        commands = runner.queue.commandBuffer()
        encoder = commands.computeCommandEncoder()
        encoder.setComputePipelineState_(runner.pipeline("add_one"))
        encoder.setBuffer_offset_atIndex_(b, 0, 0)
        encoder.dispatchThreadgroupsWithIndirectBuffer_indirectBufferOffset_threadsPerThreadgroup_(size, 0, (32, 1, 1))
        encoder.endEncoding()
        finish(commands)
    assert list(array(b)[::32]) == [2, 2, 1]


def test_shared_events_order_queues_and_the_host(runner):
    b, event = buffer(np.ones(32, "f")), DEVICE.newSharedEvent()
    other, heard = DEVICE.newCommandQueue(), threading.Event()
    event.notifyListener_atValue_block_(Metal.MTLSharedEventListener.alloc().init(), 2, lambda e, v: heard.set())
    second = other.commandBuffer()
    second.encodeWaitForEvent_value_(event, 2)
    encoder = second.computeCommandEncoder()
    encode(encoder, runner.pipeline("twice"), [b])
    encoder.endEncoding()
    second.commit()
    first = runner.queue.commandBuffer()
    first.encodeWaitForEvent_value_(event, 1)
    encoder = first.computeCommandEncoder()
    encode(encoder, runner.pipeline("add_one"), [b])
    encoder.endEncoding()
    first.encodeSignalEvent_value_(event, 2)
    first.commit()
    time.sleep(0.02)
    assert np.all(array(b) == 1) and first.status() < Metal.MTLCommandBufferStatusCompleted
    assert not event.waitUntilSignaledValue_timeoutMS_(2, 1)
    event.setSignaledValue_(1)
    second.waitUntilCompleted()
    assert np.all(array(b) == 4) and heard.wait(5) and event.waitUntilSignaledValue_timeoutMS_(2, 1000)
    assert event.signaledValue() == 2


def test_blits_and_fences(runner):
    a, b = buffer(np.arange(8, dtype="f")), buffer(np.zeros(8, "f"))
    fence, commands = DEVICE.newFence(), runner.queue.commandBuffer()
    blit = commands.blitCommandEncoder()
    blit.copyFromBuffer_sourceOffset_toBuffer_destinationOffset_size_(a, 8, b, 4, 12)
    blit.fillBuffer_range_value_(b, (28, 4), 0)
    blit.updateFence_(fence)
    blit.endEncoding()
    encoder = commands.computeCommandEncoder()
    encoder.waitForFence_(fence)
    encode(encoder, runner.pipeline("add_one"), [b], threads=8)
    encoder.endEncoding()
    finish(commands)
    assert list(array(b)) == [1, 3, 4, 5, 1, 1, 1, 1]
    with pytest.raises(softmetal.UsageError, match="copyFromBuffer"):
        commands = runner.queue.commandBuffer()
        commands.blitCommandEncoder().copyFromBuffer_sourceOffset_toBuffer_destinationOffset_size_(a, 8, b, 24, 12)


def test_a_failed_kernel_fails_its_command_buffer_only(runner):
    b, commands = buffer(np.zeros(32, "f")), runner.queue.commandBuffer()
    encoder = commands.computeCommandEncoder()
    encode(encoder, runner.pipeline("add_one"), [b], threads=2048)  # its page, and the one after it
    encode(encoder, runner.pipeline("add_one"), [b])
    encoder.endEncoding()
    commands.commit()
    commands.waitUntilCompleted()
    assert commands.status() == Metal.MTLCommandBufferStatusError
    assert (
        commands.error().code() == Metal.MTLCommandBufferErrorPageFault
        and "'add_one'" in commands.error().localizedDescription()
    )
    runner.run("add_one", [np.zeros(32, "f")], threads=32)


def test_too_much_memory_of_a_thread(runner):
    commands = runner.run("deep", [np.zeros(32, "f")], groups=1, check=False)
    assert "stack overflow: kernel 'deep'" in commands.error().localizedDescription()


@pytest.mark.parametrize("name", ["forever", "meeting_forever"])
@pytest.mark.parametrize("validate", [False, True])
def test_a_kernel_that_does_not_end_is_ended(runner, name, validate):
    softmetal.configure(timeout_seconds=0.3)
    softmetal.set_validation(validate)
    commands = runner.run(name, [np.zeros(64, "f")], groups=2, check=False)
    assert commands.status() == Metal.MTLCommandBufferStatusError
    assert commands.error().code() == Metal.MTLCommandBufferErrorTimeout
    assert f"kernel '{name}'" in commands.error().localizedDescription()
    x = np.zeros(64, "f")
    runner.run("add_one", [x], threads=64)
    assert np.all(x == 1)


def test_wrong_uses_are_told_in_a_sentence(runner):
    pipeline, b = runner.pipeline("add_one"), buffer(np.zeros(32, "f"))

    def attempt(match, act):
        encoder = runner.queue.commandBuffer().computeCommandEncoder()
        with pytest.raises(softmetal.UsageError, match=match):
            act(encoder)

    attempt("without setComputePipelineState", lambda e: e.dispatchThreads_threadsPerThreadgroup_((1, 1, 1), (1, 1, 1)))
    attempt(r"nothing is bound to \[\[buffer\(0\)\]\]", lambda e: encode(e, pipeline, []))
    attempt("at least 1", lambda e: encode(e, pipeline, [b], threads=0))
    attempt("at most 1024", lambda e: encode(e, pipeline, [b], threads=2048, size=1025))
    attempt("0 to 30", lambda e: e.setBuffer_offset_atIndex_(b, 0, 31))
    attempt("outside the buffer", lambda e: e.setBuffer_offset_atIndex_(b, 128, 0))
    attempt("1 to 4096", lambda e: e.setBytes_length_atIndex_(bytes(5000), 5000, 0))
    attempt("there are 3 bytes", lambda e: e.setBytes_length_atIndex_(bytes(3), 4, 0))
    attempt("multiple of 16", lambda e: e.setThreadgroupMemoryLength_atIndex_(20, 0))
    attempt("not a buffer", lambda e: e.setBuffer_offset_atIndex_(np.zeros(3), 0, 0))
    attempt("not a pipeline", lambda e: e.setComputePipelineState_(None))
    other = type(DEVICE)()
    attempt("another device", lambda e: e.setBuffer_offset_atIndex_(other.newBufferWithLength_options_(16, 0), 0, 0))
    attempt("setThreadgroupMemoryLength was not called", lambda e: encode(e, runner.pipeline("memory"), [b]))

    def too_much(e):
        e.setThreadgroupMemoryLength_atIndex_(16400, 0)
        encode(e, runner.pipeline("memory"), [b])

    attempt("32784 bytes of threadgroup memory; the limit is 32768", too_much)
    commands = runner.queue.commandBuffer()
    commands.computeCommandEncoder()
    with pytest.raises(softmetal.UsageError, match="before endEncoding"):
        commands.commit()
    with pytest.raises(softmetal.UsageError, match="one encoder at a time"):
        commands.blitCommandEncoder()
    with pytest.raises(softmetal.UsageError, match="never end"):
        runner.queue.commandBuffer().waitUntilCompleted()


def test_threads_share_a_device(runner):
    pipeline, results = runner.pipeline("add_one"), []

    def work(value):
        queue, b = DEVICE.newCommandQueue(), buffer(np.full(64, value, "f"))
        for _ in range(20):
            commands = queue.commandBuffer()
            encoder = commands.computeCommandEncoder()
            encode(encoder, pipeline, [b], threads=64)
            encoder.endEncoding()
            commands.commit()
        commands.waitUntilCompleted()
        results.append(np.all(array(b) == value + 20))

    threads = [threading.Thread(target=work, args=(100 * i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == [True] * 4


def test_traffic_is_counted(runner):
    softmetal.set_counting(True)
    softmetal.reset_counters()
    x, y = np.zeros(64, "f"), np.zeros(64, "f")
    runner.run("copy", [x, y, np.float32(1)], threads=64)
    c = softmetal.counters()
    assert (c["loaded_device"], c["stored_device"], c["loaded_constant"]) == (256, 256, 256)
    assert np.all(y == 1) and not softmetal.reports()

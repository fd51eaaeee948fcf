# ruff: noqa: E501  (Metal source in strings)
"""Kernels that are wrong in one way each, and are caught; the same kernels put right are clean."""

from __future__ import annotations

import numpy as np
import pytest
from metal_runner import Runner

import softmetal

SOURCE = """
#include <metal_stdlib>
using namespace metal;
kernel void shift(device float* x [[buffer(0)]], constant int& by [[buffer(1)]], device float* y [[buffer(2)]], uint i [[thread_position_in_grid]]) {
    y[i] = 1.0f +
        x[i + by];                                          // line 6
}
kernel void store_past(device float* x [[buffer(0)]], uint i [[thread_position_in_grid]]) {
    x[2 * i] = 3.0f;                                        // line 9
}
kernel void past_threadgroup(device float* x [[buffer(0)]], constant uint& n [[buffer(1)]],
                             uint i [[thread_index_in_threadgroup]]) {
    threadgroup float a[64];
    threadgroup float b[64];
    a[i] = x[i];
    b[i] = 0;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    x[i] = a[i + n] + b[i];                                 // line 18
}
kernel void reverse(device float* x [[buffer(0)]], uint i [[thread_index_in_threadgroup]],
                    uint n [[threads_per_threadgroup]]) {
    threadgroup float a[256];
    a[i] = x[i];                                            // line 23
    x[i] = a[n - 1 - i];                                    // line 24
}
kernel void reverse_right(device float* x [[buffer(0)]], uint i [[thread_index_in_threadgroup]],
                          uint n [[threads_per_threadgroup]]) {
    threadgroup float a[256];
    a[i] = x[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    x[i] = a[n - 1 - i];
}
kernel void wrong_fence(device float* x [[buffer(0)]], device float* y [[buffer(1)]],
                        uint i [[thread_index_in_threadgroup]]) {
    x[i] = 1;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    y[i] = x[i ^ 1];                                        // line 37
}
kernel void everyone(device float* x [[buffer(0)]], uint g [[threadgroup_position_in_grid]]) {
    x[0] = g;                                               // line 40
}
kernel void neighbour_group(device float* x [[buffer(0)]], uint i [[thread_position_in_grid]]) {
    x[i] = x[i ^ 32] + 1;                                   // line 43
}
kernel void diverge(device float* x [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
    if (i < 16) {
        x[i] += 1;
        threadgroup_barrier(mem_flags::mem_device);         // line 48
    } else {
        x[i] += 2;
        threadgroup_barrier(mem_flags::mem_device);         // line 51
    }
}
kernel void leave(device float* x [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
    if (i == 7) return;
    x[i] += 2;
    threadgroup_barrier(mem_flags::mem_device);             // line 57
}
kernel void uninitialised(device float* x [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
    threadgroup float a[64];
    if (i < 31) a[i] = x[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    x[i] = a[i];                                            // line 63
}
kernel void atomics(device atomic_uint* n [[buffer(0)]], uint i [[thread_position_in_grid]]) {
    atomic_fetch_add_explicit(n, 1, memory_order_relaxed);
}
kernel void atomic_and_plain(device atomic_uint* n [[buffer(0)]], device uint* plain [[buffer(1)]],
                             uint i [[thread_position_in_grid]]) {
    atomic_fetch_add_explicit(n, 1, memory_order_relaxed);
    if (i == 5) ((device uint*)n)[0] = 3;                   // line 71
}
kernel void within_simdgroup(device float* x [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
    threadgroup float a[64];
    a[i] = x[i];
    simdgroup_barrier(mem_flags::mem_threadgroup);
    x[i] = a[i ^ 1];
}
kernel void across_simdgroups(device float* x [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
    threadgroup float a[64];
    a[i] = x[i];
    simdgroup_barrier(mem_flags::mem_threadgroup);
    x[i] = a[i ^ 32];                                       // line 83
}
kernel void dynamic_memory(device float* x [[buffer(0)]], threadgroup float* a [[threadgroup(0)]],
                           uint i [[thread_index_in_threadgroup]]) {
    a[i] = x[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    x[i] = a[(i + 1) % 64];
}
struct Item { float a; int b[3]; };
kernel void copy_struct(device Item* x [[buffer(0)]], device Item* y [[buffer(1)]], uint i [[thread_position_in_grid]]) {
    Item t = x[i + 1];                                      // line 93
    y[i] = t;
}
kernel void misaligned(device float* x [[buffer(0)]], constant int& by [[buffer(1)]], device float4* y [[buffer(2)]]) {
    y[0] = *(device float4*)(x + by);                       // line 97
}
constant float table[3] = {1, 2, 3};
kernel void tables(device float* x [[buffer(0)]], uint i [[thread_position_in_grid]]) { x[i] = table[i % 3]; }
"""


@pytest.fixture(scope="module")
def runner():
    return Runner(SOURCE)


def found(runner, name, arrays, **how):
    softmetal.set_validation(True)
    commands = runner.run(name, arrays, check=False, **how)
    texts = softmetal.reports()
    if texts:
        assert commands.status() == 5 and texts[0] in commands.error().localizedDescription()
    return texts


@pytest.fixture
def x():
    return np.ones(64, "f")


def test_load_out_of_bounds(runner, x):
    (text,) = found(runner, "shift", [x, np.int32(1), x.copy()], groups=2)
    assert "out of bounds" in text and "'shift'" in text and "(31, 0, 0) of threadgroup (1, 0, 0)" in text
    assert "line 6" in text and "reads 4 bytes 256 bytes after the start of memory of 256 bytes" in text
    assert not found(runner, "shift", [x, np.int32(0), x.copy()], groups=2)


def test_load_before_the_start(runner, x):
    (text,) = found(runner, "shift", [x, np.int32(-1), x.copy()], groups=2)
    assert "out of bounds" in text and "thread (0, 0, 0) of threadgroup (0, 0, 0)" in text


def test_store_out_of_bounds(runner, x):
    (text,) = found(runner, "store_past", [x], groups=2)
    assert "out of bounds" in text and "line 9" in text and "writes 4 bytes" in text


def test_struct_copy_out_of_bounds(runner):
    a, b = np.zeros((2, 32, 4), "f")
    (text,) = found(runner, "copy_struct", [a, b], groups=1)
    assert "out of bounds" in text and ("line 93" in text or "line 94" in text)  # clang may move the load


def test_threadgroup_memory_out_of_bounds(runner, x):
    (text,) = found(runner, "past_threadgroup", [x, np.uint32(1)], groups=1, size=64)
    assert "out of bounds" in text and "line 18" in text and "of memory of 256 bytes" in text
    assert not found(runner, "past_threadgroup", [x, np.uint32(0)], groups=1, size=64)


@pytest.mark.parametrize("seed", range(3))
def test_missing_barrier(runner, x, seed):
    softmetal.set_seed(seed)
    texts = [t for t in found(runner, "reverse", [x], groups=1, size=64) if "data race" in t]
    assert texts and "threadgroup memory" in texts[0] and ("line 24" in texts[0] or "line 23" in texts[0])
    assert not found(runner, "reverse_right", [x], groups=1, size=64)


def test_barrier_that_orders_the_wrong_memory(runner, x):
    text = found(runner, "wrong_fence", [x, x.copy()], groups=1, size=64)[0]
    assert "data race" in text and "line 37" in text and "device memory" in text


def test_race_across_threadgroups(runner, x):
    assert "another threadgroup" in found(runner, "everyone", [x], groups=3, size=1)[0]
    assert not found(runner, "everyone", [x], groups=1, size=1)
    text = found(runner, "neighbour_group", [x], groups=2)[0]
    assert "another threadgroup" in text and "line 43" in text


def test_divergent_barrier(runner, x):
    text = found(runner, "diverge", [x], groups=1)[0]
    assert "divergent barrier" in text and ("line 48" in text or "line 51" in text)
    text = found(runner, "leave", [x], groups=1)[0]
    assert "divergent barrier" in text and "line 57" in text and "ended" in text


def test_uninitialised_threadgroup_memory(runner, x):
    (text,) = found(runner, "uninitialised", [x], groups=1)
    assert "uninitialised" in text and "thread (31, 0, 0)" in text and "line 63" in text


def test_atomics_do_not_race_with_each_other_but_with_plain_accesses(runner):
    n = np.zeros(1, "u4")
    assert not found(runner, "atomics", [n], groups=2)
    assert n[0] == 64
    text = found(runner, "atomic_and_plain", [n, n.copy()], groups=2)[0]
    assert "data race" in text


def test_simdgroup_barrier_orders_a_simdgroup_only(runner, x):
    assert not found(runner, "within_simdgroup", [x], groups=1, size=64)
    text = " ".join(found(runner, "across_simdgroups", [x], groups=1, size=64))
    assert "data race" in text and "line 83" in text


def test_dynamic_threadgroup_memory(runner, x):
    assert not found(runner, "dynamic_memory", [x], groups=1, size=64, memory=[256])
    assert "out of bounds" in found(runner, "dynamic_memory", [x], groups=1, size=64, memory=[128])[0]


def test_misaligned_vectors(runner, x):
    (text,) = found(runner, "misaligned", [x, np.int32(1), x.copy()], groups=1, size=1)
    assert "misaligned" in text and "line 97" in text
    assert not found(runner, "misaligned", [x, np.int32(4), x.copy()], groups=1, size=1)


def test_constant_tables_are_no_bounds_error(runner, x):
    assert not found(runner, "tables", [x], groups=2)
    assert np.array_equal(x, np.arange(64) % 3 + 1)


def test_a_wild_access_without_validation_is_an_error_not_a_crash(runner, x):
    # 4096 bytes on: the page after every buffer faults
    commands = runner.run("shift", [x, np.int32(1024), x.copy()], groups=1, check=False)
    assert commands.status() == 5 and "page fault" in commands.error().localizedDescription()
    runner.run("reverse_right", [x], groups=1, size=64)  # the device goes on

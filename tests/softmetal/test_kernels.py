# ruff: noqa: E501  (Metal source in strings)
"""Kernels in the style of other people's Metal code, compared with NumPy; each also clean under validation."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from metal_runner import Metal, Runner

import softmetal

SOURCE = """
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

// ---- matrix-vector product over blocks of 32 quantised weights, several rows to a simdgroup
#define BLOCK 32
typedef struct { half d; int8_t qs[BLOCK]; } block_q8;
struct MatvecArguments { int columns; int rows; int stride; };

template <typename block_t>
static inline float block_dot(device const block_t* b, thread const float* y, uint half_of) {
    float s = 0.f;
    for (int k = 0; k < 16; k++) s += b->qs[half_of * 16 + k] * y[k];
    return s * (float) b->d;
}

template <typename block_t, int ROWS>
kernel void matvec(constant MatvecArguments& args [[buffer(0)]], device const block_t* w [[buffer(1)]],
                   device const float* x [[buffer(2)]], device float* out [[buffer(3)]],
                   uint3 group [[threadgroup_position_in_grid]], ushort lane [[thread_index_in_simdgroup]],
                   ushort simd [[simdgroup_index_in_threadgroup]]) {
    const int blocks = args.columns / BLOCK;
    const int first = (group.x * 2 + simd) * ROWS;
    float sums[ROWS] = {0.f};
    float y[16];
    for (int b = lane / 2; b < blocks; b += 16) {
        device const float4* y4 = (device const float4*) (x + b * BLOCK + (lane & 1) * 16);
        for (int k = 0; k < 4; ++k) {
            const float4 v = y4[k];
            y[4 * k] = v.x; y[4 * k + 1] = v.y; y[4 * k + 2] = v.z; y[4 * k + 3] = v.w;
        }
        for (int r = 0; r < ROWS && first + r < args.rows; r++)
            sums[r] += block_dot(w + (first + r) * blocks + b, y, lane & 1);
    }
    for (int r = 0; r < ROWS && first + r < args.rows; ++r) {
        const float total = simd_sum(sums[r]);
        if (lane == 0) out[first + r] = total;
    }
}
typedef decltype(matvec<block_q8, 2>) matvec_t;
template [[host_name("matvec_q8_2")]] kernel matvec_t matvec<block_q8, 2>;
template [[host_name("matvec_q8_3")]] kernel matvec_t matvec<block_q8, 3>;

// ---- tiled product of half matrices, 32x32 to a threadgroup of 4 simdgroups, 16x16 to a simdgroup
template <typename T, typename A>
[[kernel]] void gemm(device const T* a [[buffer(0)]], device const T* b [[buffer(1)]], device float* c [[buffer(2)]],
                     constant uint3& mnk [[buffer(3)]], uint3 group [[threadgroup_position_in_grid]],
                     uint thread_index [[thread_index_in_threadgroup]], uint simd [[simdgroup_index_in_threadgroup]]) {
    constexpr int TILE = 32, DEPTH = 16;
    threadgroup T as[TILE * DEPTH];
    threadgroup T bs[DEPTH * TILE];
    const uint K = mnk.z, N = mnk.y;
    const uint2 origin = group.xy * TILE;
    simdgroup_matrix<A, 8, 8> acc[2][2];
    for (short i = 0; i < 2; i++)
        for (short j = 0; j < 2; j++) acc[i][j] = make_filled_simdgroup_matrix<A, 8, 8>(0.f);
    for (uint k0 = 0; k0 < K; k0 += DEPTH) {
        for (uint t = thread_index; t < TILE * DEPTH; t += 128) {
            as[t] = a[(origin.y + t / DEPTH) * K + k0 + t % DEPTH];
            bs[t] = b[(k0 + t / TILE) * N + origin.x + t % TILE];
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (ushort k = 0; k < DEPTH; k += 8) {
            simdgroup_matrix<T, 8, 8> fa[2], fb[2];
            for (short i = 0; i < 2; i++) {
                simdgroup_load(fa[i], as + ((simd / 2) * 16 + i * 8) * DEPTH + k, DEPTH);
                simdgroup_load(fb[i], &bs[k * TILE + (simd % 2) * 16 + i * 8], TILE, 0, false);
            }
            simdgroup_barrier(mem_flags::mem_none);
            for (short i = 0; i < 2; i++)
                for (short j = 0; j < 2; j++) simdgroup_multiply_accumulate(acc[i][j], fa[i], fb[j], acc[i][j]);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    for (short i = 0; i < 2; i++)
        for (short j = 0; j < 2; j++)
            simdgroup_store(acc[i][j], c, N, ulong2(origin.x + (simd % 2) * 16 + j * 8, origin.y + (simd / 2) * 16 + i * 8));
}
#define instantiate_gemm(name, T) template [[host_name("gemm_" #name)]] [[kernel]] decltype(gemm<T, float>) gemm<T, float>;
instantiate_gemm(half, half)
instantiate_gemm(bfloat, bfloat)
instantiate_gemm(float, float)

// ---- a sum over a row: registers, simdgroup, threadgroup
struct Sum { template <typename T> T operator()(T a, T b) { return a + b; } static constexpr constant float init = 0; };
struct Max { template <typename T> T operator()(T a, T b) { return metal::max(a, b); } static constexpr constant float init = -INFINITY; };
template <typename T, typename Op>
kernel void reduce_rows(const device T* in [[buffer(0)]], device T* out [[buffer(1)]], constant size_t& n [[buffer(2)]],
                        threadgroup float* shared [[threadgroup(0)]], uint tid [[thread_position_in_threadgroup]],
                        uint row [[threadgroup_position_in_grid]], uint threads [[threads_per_threadgroup]],
                        uint lane [[thread_index_in_simdgroup]], uint simd [[simdgroup_index_in_threadgroup]]) {
    Op op;
    float value = Op::init;
    for (size_t i = tid; i < n; i += threads) value = op(value, static_cast<float>(in[row * n + i]));
    for (ushort offset = 16; offset > 0; offset /= 2) value = op(value, simd_shuffle_down(value, offset));
    if (lane == 0) shared[simd] = value;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simd == 0) {
        value = lane < (threads + 31) / 32 ? shared[lane] : Op::init;
        for (ushort offset = 16; offset > 0; offset /= 2) value = op(value, simd_shuffle_down(value, offset));
        if (lane == 0) out[row] = static_cast<T>(value);
    }
}
template [[host_name("row_sum")]] kernel void reduce_rows<float, Sum>(const device float*, device float*, constant size_t&, threadgroup float*, uint, uint, uint, uint, uint);
template [[host_name("row_max")]] kernel void reduce_rows<half, Max>(const device half*, device half*, constant size_t&, threadgroup float*, uint, uint, uint, uint, uint);

// ---- bitonic sort of a row in threadgroup memory, each thread two elements
kernel void bitonic_sort(device int* data, constant uint& n, threadgroup int* s [[threadgroup(0)]],
                         uint t [[thread_index_in_threadgroup]], uint row [[threadgroup_position_in_grid]]) {
    s[2 * t] = data[row * n + 2 * t];
    s[2 * t + 1] = data[row * n + 2 * t + 1];
    for (uint k = 2; k <= n; k <<= 1) {
        for (uint j = k >> 1; j > 0; j >>= 1) {
            threadgroup_barrier(mem_flags::mem_threadgroup);
            const uint lo = (t & ~(j - 1)) << 1 | (t & (j - 1)), hi = lo | j;
            const bool up = (lo & k) == 0;
            const int x = s[lo], y = s[hi];
            if ((x > y) == up) { s[lo] = y; s[hi] = x; }
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    data[row * n + 2 * t] = s[2 * t];
    data[row * n + 2 * t + 1] = s[2 * t + 1];
}

// ---- an inclusive scan of a row by one threadgroup
[[max_total_threads_per_threadgroup(256)]] kernel void scan(device const uint* in [[buffer(0)]], device uint* out [[buffer(1)]], constant uint& n [[buffer(2)]],
                 uint tid [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                 uint simd [[simdgroup_index_in_threadgroup]], uint simds [[simdgroups_per_threadgroup]]) {
    threadgroup uint totals[32], carry;
    if (tid == 0) carry = 0;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint start = 0; start < n; start += simds * 32) {
        const uint i = start + tid;
        uint v = simd_prefix_inclusive_sum(i < n ? in[i] : 0u);
        if (lane == 31) totals[simd] = v;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (simd == 0) {
            const uint before = simd_prefix_exclusive_sum(lane < simds ? totals[lane] : 0u);
            if (lane < simds) totals[lane] = before;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        v += totals[simd] + carry;
        if (i < n) out[i] = v;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (tid == simds * 32 - 1) carry = v;
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
}

// ---- softmax of a row, one simdgroup
kernel void softmax(device const float* x [[buffer(0)]], device float* out [[buffer(1)]], constant int& n [[buffer(2)]],
                    uint row [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
    x += row * n; out += row * n;
    float m = -numeric_limits<float>::infinity();
    for (int i = lane; i < n; i += 32) m = max(m, x[i]);
    m = simd_max(m);
    float s = 0;
    for (int i = lane; i < n; i += 32) { float e = fast::exp(x[i] - m); out[i] = e; s += e; }
    s = simd_sum(s);
    for (int i = lane; i < n; i += 32) out[i] *= 1.0f / s;
}

// ---- attention for one query per simdgroup, keys in blocks of 32, running maximum
constant int head_size [[function_constant(0)]];
constant bool causal [[function_constant(1)]];
constant float scale_given [[function_constant(2)]];
constant float scale = is_function_constant_defined(scale_given) ? scale_given : 0.25f;
kernel void attention(device const half* q [[buffer(0)]], device const half* k [[buffer(1)]], device const half* v [[buffer(2)]],
                      device float* out [[buffer(3)]], constant uint2& sizes [[buffer(4)]],
                      uint2 at [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
    const uint queries = sizes.x, keys = sizes.y, query = at.x, head = at.y;
    q += (head * queries + query) * head_size;
    k += head * keys * head_size;
    v += head * keys * head_size;
    float m = -INFINITY, l = 0, acc[4] = {0, 0, 0, 0};
    for (uint start = 0; start < keys; start += 32) {
        const uint key = start + lane;
        float s = -INFINITY;
        if (key < keys && (!causal || key <= query + keys - queries)) {
            s = 0;
            for (int d = 0; d < head_size; d += 4)
                s += dot(float4(*(device const half4*)(q + d)), (float4) *(device const half4*)(k + key * head_size + d));
            s *= scale;
        }
        const float mm = max(m, simd_max(s)), p = mm == -INFINITY ? 0.0f : exp(s - mm), c = m == -INFINITY ? 0.0f : exp(m - mm);
        l = l * c + simd_sum(p);
        m = mm;
        for (int d = lane, e = 0; d < head_size; d += 32, e++) {
            float o = acc[e] * c;
            acc[e] = o;
        }
        for (ushort j = 0; j < 32 && start + j < keys; j++) {
            const float pj = simd_broadcast(p, j);
            for (int d = lane, e = 0; d < head_size; d += 32, e++) acc[e] += pj * v[(start + j) * head_size + d];
        }
    }
    for (int d = lane, e = 0; d < head_size; d += 32, e++) out[(head * queries + query) * head_size + d] = acc[e] / l;
}

// ---- a histogram with atomics in both memories
kernel void histogram(device const uchar* in [[buffer(0)]], device atomic_uint* bins [[buffer(1)]], constant uint& n [[buffer(2)]],
                      uint t [[thread_index_in_threadgroup]], uint size [[threads_per_threadgroup]],
                      uint group [[threadgroup_position_in_grid]], uint groups [[threadgroups_per_grid]]) {
    threadgroup atomic_uint local[256];
    for (uint i = t; i < 256; i += size) atomic_store_explicit(&local[i], 0, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = group * size + t; i < n; i += size * groups) atomic_fetch_add_explicit(&local[in[i]], 1u, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = t; i < 256; i += size) {
        uint count = atomic_load_explicit(&local[i], memory_order_relaxed);
        if (count) atomic_fetch_add_explicit(&bins[i], count, memory_order_relaxed);
    }
}

// ---- a grid with ragged edges
kernel void ragged(device uint4* out [[buffer(0)]], constant uint& width [[buffer(1)]], uint2 p [[thread_position_in_grid]],
                   uint2 size [[threads_per_threadgroup]], uint2 nominal [[dispatch_threads_per_threadgroup]],
                   uint2 grid [[threads_per_grid]], uint index [[thread_index_in_threadgroup]]) {
    out[p.y * width + p.x] = uint4(size.x * 100 + size.y, nominal.x * 100 + nominal.y, grid.x * 100 + grid.y, index);
}
"""


@pytest.fixture(scope="module")
def runner():
    return Runner(SOURCE)


@pytest.fixture(params=["fast", "validated", "shuffled"])
def mode(request):
    """Plain execution, validation, and validation with shuffled threads; nothing may be found."""
    softmetal.set_validation(request.param != "fast")
    softmetal.set_seed(int(np.random.default_rng().integers(1, 1 << 31)) if request.param == "shuffled" else 0)
    softmetal.reports()
    yield
    assert not softmetal.reports()


@pytest.mark.parametrize("rows_each", [2, 3])
@pytest.mark.parametrize("rows,columns", [(16, 512), (13, 96)])
def test_matvec_over_blocks(runner, mode, rng, rows, columns, rows_each):
    d = rng.uniform(0.01, 0.1, (rows, columns // 32)).astype(np.float16)
    q = rng.integers(-127, 128, (rows, columns // 32, 32)).astype(np.int8)
    packed = np.concatenate([d[..., None].view(np.int8), q], axis=-1)
    x, out = rng.standard_normal(columns).astype("f"), np.full(rows, np.nan, "f")
    arguments = struct.pack("3i", columns, rows, columns)
    runner.run(f"matvec_q8_{rows_each}", [arguments, packed, x, out], groups=-(-rows // (2 * rows_each)), size=64)
    expected = (q * d[..., None].astype("d")).reshape(rows, -1) @ x.astype("d")
    assert np.allclose(out, expected, rtol=1e-4, atol=1e-3)  # float sums of 512 terms up to about 10


@pytest.mark.parametrize("kind", ["half", "bfloat", "float"])
def test_tiled_product(runner, mode, rng, kind):
    m, n, k = 64, 32, 48
    a, b = rng.standard_normal((m, k)).astype("f"), rng.standard_normal((k, n)).astype("f")
    if kind == "half":
        a, b = a.astype(np.float16), b.astype(np.float16)
    if kind == "bfloat":
        a, b = a.view("u4") >> 16, b.view("u4") >> 16
        da, db = ((x << 16).astype("u4").view("f") for x in (a, b))
        a, b = a.astype("u2"), b.astype("u2")
    else:
        da, db = a, b
    c = np.full((m, n), np.nan, "f")
    runner.run(f"gemm_{kind}", [a, b, c, np.array([m, n, k, 0], "u4").tobytes()], groups=(n // 32, m // 32), size=128)
    assert np.allclose(c, da.astype("d") @ db.astype("d"), atol=1e-4)  # exact products, float sums of 48 terms


@pytest.mark.parametrize("n,size", [(1000, 256), (37, 64), (5, 32), (4096, 1024)])
def test_row_reductions(runner, mode, rng, n, size):
    x, out = rng.standard_normal((3, n)).astype("f"), np.full(3, np.nan, "f")
    runner.run("row_sum", [x, out, np.uint64(n)], groups=3, size=size, memory=[128])
    assert np.allclose(out, x.sum(1), atol=1e-3)
    h, top = x.astype(np.float16), np.zeros(3, np.float16)
    runner.run("row_max", [h, top, np.uint64(n)], groups=3, size=size, memory=[128])
    assert np.array_equal(top, h.max(1))


@pytest.mark.parametrize("n", [4, 64, 512])
def test_bitonic_sort(runner, mode, rng, n):
    x = rng.integers(-1000, 1000, (3, n)).astype("i4")
    expected = np.sort(x, axis=1)
    runner.run("bitonic_sort", [x, np.uint32(n)], groups=3, size=n // 2, memory=[4 * max(n, 4)])
    assert np.array_equal(x, expected)


@pytest.mark.parametrize("n,size", [(1000, 128), (1, 32), (255, 256)])
def test_scan(runner, mode, rng, n, size):
    x, out = rng.integers(0, 100, n).astype("u4"), np.zeros(n, "u4")
    runner.run("scan", [x, out, np.uint32(n)], groups=1, size=size)
    assert np.array_equal(out, np.cumsum(x))
    assert runner.pipeline("scan").maxTotalThreadsPerThreadgroup() == 256
    assert runner.pipeline("scan").staticThreadgroupMemoryLength() == 144


@pytest.mark.parametrize("n", [1, 33, 300])
def test_softmax(runner, mode, rng, n):
    x, out = rng.standard_normal((5, n)).astype("f") * 5, np.full((5, n), np.nan, "f")
    runner.run("softmax", [x, out, np.int32(n)], groups=5)
    e = np.exp(x.astype("d") - x.max(1, keepdims=True))
    assert np.allclose(out, e / e.sum(1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size,keys", [(64, 70), (128, 9)])
def test_attention(runner, mode, rng, size, keys, causal):
    queries, heads = 3, 2
    q, k, v = (rng.standard_normal((heads, n, size)).astype(np.float16) for n in (queries, keys, keys))
    out = np.full((heads, queries, size), np.nan, "f")
    constants = Metal.MTLFunctionConstantValues.alloc().init()
    constants.setConstantValue_type_atIndex_(np.int32(size), Metal.MTLDataTypeInt, 0)
    constants.setConstantValue_type_atIndex_(np.bool_(causal), Metal.MTLDataTypeBool, 1)
    if size == 64:
        constants.setConstantValue_type_withName_(np.float32(0.125), Metal.MTLDataTypeFloat, "scale_given")
    runner.run(
        "attention",
        [q, k, v, out, np.array([queries, keys], "u4").tobytes()],
        groups=(queries, heads),
        constants=constants,
    )
    s = np.einsum("hqd,hkd->hqk", q.astype("d"), k.astype("d")) * (0.125 if size == 64 else 0.25)
    if causal:
        s[:, np.arange(keys)[None] > np.arange(queries)[:, None] + keys - queries] = -np.inf
    p = np.exp(s - s.max(-1, keepdims=True))
    expected = np.einsum("hqk,hkd->hqd", p / p.sum(-1, keepdims=True), v.astype("d"))
    assert np.allclose(out, expected, atol=1e-4)


def test_histogram(runner, mode, rng):
    x, bins = rng.integers(0, 256, 5000).astype("u1"), np.zeros(256, "u4")
    runner.run("histogram", [x, bins, np.uint32(5000)], groups=7, size=96)
    assert np.array_equal(bins, np.bincount(x, minlength=256))


def test_ragged_grid(runner, mode):
    out = np.full((5, 11, 4), 99999, "u4")
    runner.run("ragged", [out, np.uint32(11)], threads=(11, 5), size=(4, 2))
    for y in range(5):
        for x in range(11):
            sx, sy = min(4, 11 - x // 4 * 4), min(2, 5 - y // 2 * 2)
            assert list(out[y, x]) == [sx * 100 + sy, 402, 1105, y % 2 * sx + x % 4]

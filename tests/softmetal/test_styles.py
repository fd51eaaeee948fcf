# ruff: noqa: E501  (Metal source in strings)
"""What published Metal programs (matrix libraries, language models, sorting) do with the language, in kernels of ours."""

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

// ---- a decoder as template argument: 4-bit blocks with a minimum, a table, and plain halves, in one product
#define FOR_UNROLL(n) _Pragma("unroll") for (short i = 0; i < (n); ++i)
#define STEPS 4
struct block_q4 { half2 dm; uint8_t qs[16]; };
struct block_table { half d; uint8_t qs[16]; };
constant int8_t values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

template <typename T4x4> void decode_q4(device const block_q4 *xb, short il, thread T4x4 &reg) {
    const float d = xb->dm.x, m = xb->dm.y;
    for (int i = 0; i < 16; i++) reg[i / 4][i % 4] = d * (il ? xb->qs[i] >> 4 : xb->qs[i] & 0xF) + m;
}
template <typename T4x4> void decode_table(device const block_table *xb, short il, thread T4x4 &reg) {
    device const uint16_t *q = (device const uint16_t *)xb->qs;
    #pragma unroll (MIN(8, 2 * STEPS))
    for (int i = 0; i < 8; i++) {
        const uchar2 pair = as_type<uchar2>(ushort(q[i] >> (il ? 4 : 0) & 0x0F0F));
        reg[i / 2][2 * (i % 2)] = float(xb->d) * values[pair.x];
        reg[i / 2][2 * (i % 2) + 1] = float(xb->d) * values[pair.y];
    }
}
template <typename T4x4> void decode_half(device const half4x4 *xb, short il, thread T4x4 &reg) { reg = T4x4(xb[0]); }

template <typename block_t, short per_block, void (*decode)(device const block_t *, short, thread float4x4 &)>
kernel void matvec(device const block_t *w [[buffer(0)]], device const float4 *x [[buffer(1)]],
                   device float *out [[buffer(2)]], constant int &sixteens [[buffer(3)]],
                   uint row [[threadgroup_position_in_grid]], ushort lane [[thread_index_in_simdgroup]]) {
    float4 sums = {0.f}, other {1.f};
    float4x4 reg;
    for (int at = lane; at < sixteens; at += 32) {
        decode(w + (row * sixteens + at) / per_block, at % per_block, reg);
        for (short i = 0; i < 4; ++i) sums[i] += dot(reg[i], x[4 * at + i]);
    }
    const float total = simd_sum(dot(sums, float4(1)));
    if (simd_is_first()) out[row] = total + other.y;
}
typedef decltype(matvec<half4x4, 1, decode_half>) matvec_t;
template [[host_name("matvec_q4")]]    kernel decltype(matvec<block_q4, 2, decode_q4>) matvec<block_q4, 2, decode_q4>;
template [[host_name("matvec_table")]] kernel decltype(matvec<block_table, 2, decode_table>) matvec<block_table, 2, decode_table<float4x4>>;
template [[host_name("matvec_half")]]  kernel matvec_t matvec<half4x4, 1, &decode_half>;

// ---- a product of layers of templates: loader, fragments with a static layout, epilogue, function constants
constant bool has_bias [[function_constant(0)]];
#define GEMM 40
constant int activation [[function_constant(GEMM + 2)]];
constant int unused [[function_constant(GEMM)]];
constant int kind = is_function_constant_defined(activation) ? activation : 0;
template <int V> struct Int { static constexpr constant int value = V; constexpr operator int() const { return V; } };

template <typename T, short ROWS, short COLUMNS, short THREADS> struct Loader {
    static constexpr constant short each = ROWS * COLUMNS / THREADS;
    const device T *source;
    threadgroup T *target;
    const int stride;
    const short r, c;
    METAL_FUNC Loader(const device T *s, int stride_, threadgroup T *t, ushort i)
        : source(s + (i * each / COLUMNS) * stride_ + i * each % COLUMNS), target(t + i * each), stride(stride_),
          r(i * each / COLUMNS), c(i * each % COLUMNS) {}
    METAL_FUNC void load(short2 inside) const {
        FOR_UNROLL(each) target[i] = r < inside.y && c + i < inside.x ? source[i] : T(0);
    }
    METAL_FUNC void next(int step) { source += step; }
};
template <typename A, typename T> struct Fragments {
    typedef metal::vec<A, 2> pair;
    simdgroup_matrix<T, 8, 8> a, b;
    simdgroup_matrix<A, 8, 8> sum[2][2];
    METAL_FUNC void clear() { FOR_UNROLL(4) sum[i / 2][i % 2] = make_filled_simdgroup_matrix<A, 8>(A(0)); }
    METAL_FUNC void multiply(const threadgroup T *as, const threadgroup T *bs) {
        for (short k = 0; k < 16; k += 8)
            FOR_UNROLL(4) {
                simdgroup_load(a, as + i / 2 * 8 * 16 + k, 16);
                simdgroup_load(b, bs + k * 32 + i % 2 * 8, 32);
                simdgroup_barrier(mem_flags::mem_none);
                simdgroup_multiply_accumulate(sum[i / 2][i % 2], a, b, sum[i / 2][i % 2]);
            }
    }
    template <typename F> METAL_FUNC void each(thread const F &f) { FOR_UNROLL(4) {
        thread auto &e = sum[i / 2][i % 2].thread_elements(); e[0] = f(e[0], i, 0); e[1] = f(e[1], i, 1); } }
};
struct Epilogue {
    const device float *bias;
    int column;
    float operator()(float v, short i, short j) const {
        if (has_bias) v += bias[column + i % 2 * 8 + j];
        return kind == 1 ? max(v, 0.f) : kind == 2 ? v * (1 / (1 + exp(-v))) : v;
    }
};
struct Sizes { int m, n, k; };
template <typename T, typename Step>
[[kernel, max_total_threads_per_threadgroup(128)]] void gemm(
        const device T *a [[buffer(0)]], const device T *b [[buffer(1)]], device float *c [[buffer(2)]],
        constant Sizes &s [[buffer(3)]], const device float *bias [[buffer(4), function_constant(has_bias)]],
        uint3 group [[threadgroup_position_in_grid]], uint thread_index [[thread_index_in_threadgroup]],
        uint simd [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
    threadgroup T as[32 * 16], bs[16 * 32];
    const int row = group.y * 32, column = group.x * 32;
    Loader<T, 32, 16, 128> la(a + row * s.k, s.k, as, thread_index);
    Loader<T, 16, 32, 128> lb(b + column, s.n, bs, thread_index);
    Fragments<float, T> f;
    f.clear();
    for (int k = 0; k < s.k; k += 16) {
        la.load(short2(min(s.k - k, 16), min(s.m - row, 32)));
        lb.load(short2(min(s.n - column, 32), min(s.k - k, 16)));
        threadgroup_barrier(mem_flags::mem_threadgroup);
        f.multiply(as + simd / 2 * 16 * 16, bs + simd % 2 * 16);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        la.next(16); lb.next(16 * s.n);
    }
    const short lr = (lane >> 4) * 4 + (lane >> 1 & 3), lc = (lane >> 3 & 1) * 4 + (lane & 1) * 2;
    const int r0 = row + simd / 2 * 16 + lr, c0 = column + simd % 2 * 16 + lc;
    Epilogue e{bias, c0};
    if (!has_bias || c0 + 9 < s.n) f.each(e);
    FOR_UNROLL(8) {
        const int r = r0 + i / 4 * 8, q = c0 + i / 2 % 2 * 8 + i % 2;
        device float *to = c + r * s.n + q;
        to += Step();
        if (r < s.m && q < s.n) to[0] = f.sum[i / 4][i / 2 % 2].thread_elements()[i % 2];
    }
}
#define instantiate(name, T) template [[host_name(#name "_" #T)]] [[kernel]] decltype(gemm<T, Int<0>>) gemm<T, Int<0>>;
instantiate(gemm, half)
instantiate(gemm, float)

// ---- matrices of two types in a product
kernel void mixed(device const half *a [[buffer(0)]], device const float *b [[buffer(1)]], device float *c [[buffer(2)]]) {
    simdgroup_half8x8 x; simdgroup_float8x8 y, z = make_filled_simdgroup_matrix<float, 8>(1.f);
    simdgroup_load(x, a); simdgroup_load(y, b);
    simdgroup_multiply_accumulate(z, x, y, z);
    simdgroup_store(z, c);
}

// ---- sorting indices: bitonic, a comparator as template argument
typedef bool (*less_t)(float, float);
METAL_FUNC bool ascending(float a, float b) { return a < b; }
METAL_FUNC bool descending(float a, float b) { return a > b; }
template <less_t LESS>
kernel void argsort(device const float *x [[buffer(0)]], device int *out [[buffer(1)]], constant int &n [[buffer(2)]],
                    threadgroup int *at [[threadgroup(0)]], uint row [[threadgroup_position_in_grid]],
                    uint i [[thread_position_in_threadgroup]], uint size [[threads_per_threadgroup]]) {
    device const float *from = x + row * n;
    at[i] = i;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint k = 2; k <= size; k *= 2)
        for (uint j = k / 2; j > 0; j /= 2) {
            const uint other = i ^ j;
            if (other > i) {
                const int p = at[i], q = at[other];
                const bool swap = i & k ? p < n && (q >= n || LESS(from[p], from[q])) : q < n && (p >= n || LESS(from[q], from[p]));
                if (swap) { at[i] = q; at[other] = p; }
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
        }
    if (int(i) < n) out[row * n + i] = at[i];
}
template [[host_name("argsort_up")]] kernel void argsort<ascending>(device const float *, device int *, constant int &, threadgroup int *, uint, uint, uint);
template [[host_name("argsort_down")]] kernel void argsort<descending>(device const float *, device int *, constant int &, threadgroup int *, uint, uint, uint);

// ---- one pass of a radix sort: ballots give the rank of a key among equal digits of its simdgroup
kernel void radix_pass(device const uint *keys [[buffer(0)]], device uint *out [[buffer(1)]], constant uint &shift [[buffer(2)]],
                       device atomic_uint *histogram [[buffer(3)]], uint i [[thread_position_in_threadgroup]],
                       ushort lane [[thread_index_in_simdgroup]], ushort simd [[simdgroup_index_in_threadgroup]],
                       ushort simds [[simdgroups_per_threadgroup]]) {
    threadgroup uint counts[16][8];
    const uint key = keys[i], digit = extract_bits(key, shift, 4);
    uint mine = 0;
    for (uint d = 0; d < 16; ++d) {
        const uint vote = uint(static_cast<simd_vote::vote_t>(simd_ballot(digit == d)));
        if (d == digit) mine = popcount(vote & ((1u << lane) - 1));
        if (simd_is_first()) counts[d][simd] = popcount(vote);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint before = mine;
    for (uint d = 0; d < 16; ++d)
        for (ushort s = 0; s < simds; ++s) before += select(0u, counts[d][s], d < digit || (d == digit && s < simd));
    out[before] = key;
    atomic_fetch_add_explicit(&histogram[digit], 1, memory_order_relaxed);
}

// ---- running sums of any length by one threadgroup
kernel void running(device const int *x [[buffer(0)]], device int *out [[buffer(1)]], constant uint &n [[buffer(2)]],
                    ushort i [[thread_index_in_threadgroup]], ushort lane [[thread_index_in_simdgroup]],
                    ushort simd [[simdgroup_index_in_threadgroup]], ushort size [[threads_per_threadgroup]]) {
    threadgroup int parts[32];
    int carry = 0;
    for (uint start = 0; start < n; start += size) {
        const int inside = simd_prefix_inclusive_sum(start + i < n ? x[start + i] : 0);
        if (lane == 31) parts[simd] = inside;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (simd == 0) parts[lane] = simd_prefix_exclusive_sum(lane < size / 32 ? parts[lane] : 0);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        const int sum = carry + parts[simd] + inside;
        if (start + i < n) out[start + i] = sum;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (i == size - 1) parts[0] = sum;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        carry = parts[0];
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
}

// ---- im2col over a ragged three-dimensional grid, strides in a struct
struct Image { int32_t ic, ih, iw, oh, ow, kh, kw; int32_t s[2], p[2]; };
template <typename T>
kernel void im2col(device const float *x, device T *out, constant Image &g, uint3 at [[thread_position_in_grid]], uint3 all [[threads_per_grid]]) {
    const int y = at.y / g.ow * g.s[0] + at.x / g.kw % g.kh - g.p[0], z = at.y % g.ow * g.s[1] + at.x % g.kw - g.p[1];
    const bool in = y >= 0 && y < g.ih && z >= 0 && z < g.iw;
    const int c = at.x / (g.kh * g.kw);
    out[(at.z * all.y + at.y) * all.x + at.x] = in ? T(x[((at.z * g.ic + c) * g.ih + y) * g.iw + z]) : T(0);
}
template [[host_name("im2col_half")]] kernel void im2col<half>(device const float *, device half *, constant Image &, uint3, uint3);

// ---- packed vectors, swizzles as lvalues, constant tables, lanes of four
struct Body { packed_float3 at; float mass; packed_half2 tag; };
constant packed_float3 weights[2] = {packed_float3(1, 2, 3), packed_float3(4, 5, 6)};
template <typename T> struct Pairs { using pair = metal::vec<T, 2>; pair v; };
kernel void bodies(device Body *b [[buffer(0)]], device float4 *out [[buffer(1)]], uint g [[thread_position_in_grid]]) {
    Body l = b[g];
    l.at.x += 1; b[g].at.yz = float2(l.at.z, l.at.y); b[g].at.z *= 2;
    float4 v = float4(b[g].at, l.mass);
    v.zx = v.xz + weights[g & 1].xy;
    v.w = mad(l.mass, 2.f, float(l.tag.y)) + quad_sum(l.mass) + quad_shuffle_xor(l.mass, 1) + quad_broadcast(l.mass, 3);
    Pairs<bool> p; p.v[0] = all(v > 0); p.v[1] = any(v == l.mass);
    v = select(v, float4(as_type<float>(0x40490fdbu)), p.v[0] && l.mass > 3);
    out[g] = v + float4(clz(uint(g) + 1), p.v[1], 0, 0);
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


TABLE = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])


@pytest.mark.parametrize("kind", ["q4", "table", "half"])
def test_a_decoder_is_a_template_argument(runner, mode, rng, kind):
    rows, columns = 5, 96 * 16
    nibbles = rng.integers(0, 16, (rows, columns // 32, 32))
    bytes_ = (nibbles[..., :16] | nibbles[..., 16:] << 4).astype("u1")
    d = rng.uniform(0.01, 0.1, (rows, columns // 32, 2)).astype("f2")
    if kind == "q4":
        memory, w = np.concatenate([d.view("u1"), bytes_], axis=-1), nibbles * d[..., :1].astype("f") + d[..., 1:].astype("f")
    elif kind == "table":
        d = np.ascontiguousarray(d[..., :1])
        memory, w = np.concatenate([d.view("u1"), bytes_], axis=-1), TABLE[nibbles] * d.astype("f")
    else:
        memory = w = rng.standard_normal((rows, columns)).astype("f2")
    x, out = rng.standard_normal(columns).astype("f"), np.full(rows, np.nan, "f")
    runner.run(f"matvec_{kind}", [np.ascontiguousarray(memory), x, out, np.int32(columns // 16)], groups=rows)
    expected = w.reshape(rows, -1).astype("d") @ x.astype("d")
    assert np.allclose(out, expected, atol=2e-3)  # float sums of 1536 terms up to about 10


@pytest.mark.parametrize("bias,activation", [(False, None), (True, None), (True, 2), (False, 1)])
@pytest.mark.parametrize("kind", ["half", "float"])
def test_a_product_of_layered_templates_with_function_constants(runner, mode, rng, kind, bias, activation):
    m, n, k = (45, 64, 40) if bias else (33, 45, 23)  # with a bias, columns in whole blocks
    a, b = (rng.standard_normal(s).astype("f2" if kind == "half" else "f") for s in ((m, k), (k, n)))
    c, added = np.full((m, n), np.nan, "f"), rng.standard_normal(n).astype("f")
    constants = Metal.MTLFunctionConstantValues.alloc().init()
    constants.setConstantValue_type_atIndex_(np.bool_(bias).tobytes(), Metal.MTLDataTypeBool, 0)
    if activation is not None:
        constants.setConstantValue_type_atIndex_(np.int32(activation).tobytes(), Metal.MTLDataTypeInt, 42)
        constants.setConstantValue_type_atIndex_(np.int32(7).tobytes(), Metal.MTLDataTypeInt, 40)
    runner.run(f"gemm_{kind}", [a, b, c, struct.pack("3i", m, n, k), *([added] if bias else [])],
               groups=(-(-n // 32), -(-m // 32)), size=128, constants=constants)  # fmt: skip
    expected = a.astype("d") @ b.astype("d") + (added if bias else 0)
    if activation:
        expected = np.maximum(expected, 0) if activation == 1 else expected / (1 + np.exp(-expected))
    assert np.allclose(c, expected, atol=1e-4)  # float sums of 40 terms


def test_matrices_of_two_types(runner, mode, rng):
    a, b, c = rng.standard_normal((8, 8)).astype("f2"), rng.standard_normal((8, 8)).astype("f"), np.zeros((8, 8), "f")
    runner.run("mixed", [a, b, c], groups=1)
    assert np.allclose(c, 1 + a.astype("d") @ b, atol=1e-5)


@pytest.mark.parametrize("n", [1, 37, 256])
def test_argsort_with_a_comparator_as_template_argument(runner, mode, rng, n):
    x, out = rng.permutation(3 * n).reshape(3, n).astype("f"), np.zeros((3, n), "i4")
    size = max(2, 1 << (n - 1).bit_length())
    for name, key in (("argsort_up", x), ("argsort_down", -x)):
        runner.run(name, [x, out, np.int32(n)], groups=3, size=size, memory=[4 * max(size, 4)])
        assert np.array_equal(out, np.argsort(key, axis=1))


def test_radix_sort_by_ballots(runner, mode, rng):
    keys = rng.integers(0, 1 << 16, 256).astype("u4")
    source, histogram = keys.copy(), np.zeros((4, 16), "u4")
    for number in range(4):
        out = np.zeros(256, "u4")
        runner.run("radix_pass", [source, out, np.uint32(4 * number), histogram[number]], groups=1, size=256)
        source = out
    assert np.array_equal(source, np.sort(keys))
    assert np.array_equal(histogram[2], np.bincount(keys >> 8 & 15, minlength=16))


@pytest.mark.parametrize("n,size", [(1, 32), (1000, 128), (777, 1024)])
def test_running_sums(runner, mode, rng, n, size):
    x, out = rng.integers(-1000, 1000, n).astype("i4"), np.zeros(n, "i4")
    runner.run("running", [x, out, np.uint32(n)], groups=1, size=size)
    assert np.array_equal(out, np.cumsum(x))


def test_im2col_over_a_ragged_grid(runner, mode, rng):
    n, c, h, w, kernel, stride, pad = 2, 3, 7, 9, (3, 2), (2, 1), (1, 1)
    oh, ow = (h + 2 * pad[0] - kernel[0]) // stride[0] + 1, (w + 2 * pad[1] - kernel[1]) // stride[1] + 1
    x = rng.standard_normal((n, c, h, w)).astype("f")
    out = np.full((n, oh * ow, c * kernel[0] * kernel[1]), np.nan, "f2")
    arguments = struct.pack("11i", c, h, w, oh, ow, *kernel, *stride, *pad)
    runner.run("im2col_half", [x, out, arguments], threads=(out.shape[2], out.shape[1], n), size=(4, 8, 2))
    padded = np.pad(x, ((0, 0), (0, 0), (pad[0],) * 2, (pad[1],) * 2))
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=(2, 3))[:, :, :: stride[0], :: stride[1]]
    expected = windows.transpose(0, 2, 3, 1, 4, 5).reshape(out.shape)
    assert np.array_equal(out, expected.astype("f2"))


def test_packed_vectors_swizzles_tables_and_quads(runner, mode, rng):
    count = 8
    kind = np.dtype([("at", "f4", 3), ("mass", "f4"), ("tag", "f2", 2)])
    b, out = np.zeros(count, kind), np.zeros((count, 4), "f")
    b["at"], b["mass"], b["tag"] = (rng.integers(-5, 6, (count, *shape)) for shape in ((3,), (), (2,)))
    old = b.copy()
    runner.run("bodies", [b, out], threads=count, size=count)
    x, y, z = old["at"].T
    assert np.array_equal(b["at"], np.stack([x, z, 2 * y], axis=1))
    mass, lane = old["mass"], np.arange(count)
    v = np.stack([x, z, 2 * y, mass], axis=1)
    weights = np.array([[1, 2], [4, 5]])[lane & 1]
    v[:, 2], v[:, 0] = v[:, 0] + weights[:, 0], v[:, 2] + weights[:, 1]
    quads = mass.reshape(-1, 4)
    v[:, 3] = 2 * mass + old["tag"][:, 1] + quads.sum(1).repeat(4) + mass[lane ^ 1] + quads[:, 3].repeat(4)
    equal = (v == mass[:, None]).any(1)
    v[(v > 0).all(1) & (mass > 3)] = np.pi
    v[:, 0] += 31 - np.floor(np.log2(lane + 1))
    v[:, 1] += equal
    assert np.allclose(out, v)

# ruff: noqa: E501  (Metal source in strings)
"""The language: operations between lanes, vectors, conversions, the library, classes and templates."""

from __future__ import annotations

import math

import numpy as np
import pytest
from metal_runner import Runner

import softmetal

SIMD = """
#include <metal_stdlib>
using namespace metal;
static int walk(int v, uint lane) { int s = 0; for (uint k = 0; k < lane % 4; k++) s += simd_sum(v) + (int)k; return s; }
static int nest(int v, uint lane) {
    int s = 0;
    for (int k = 0; k < 3; k++) {
        if ((lane + k) % 3 == 0) continue;
        if (lane & 1) { s += simd_sum(v); if (lane & 2) s += simd_max(v) * 3; }
        else s += simd_min(v) * 5;
        s += simd_shuffle_xor(v, 2);
    }
    return s;
}
#define K(NAME, T, EXPRESSION) \\
    kernel void k_##NAME(device const T* in [[buffer(0)]], device T* out [[buffer(1)]], constant ushort& d [[buffer(2)]], \\
                     uint i [[thread_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) { \\
        T v = in[i]; out[i] = EXPRESSION; }
#define BOTH(NAME) K(simd_##NAME##_f, float, simd_##NAME(v)) K(quad_##NAME##_f, float, quad_##NAME(v)) K(simd_##NAME##_i, int, simd_##NAME(v))
BOTH(sum) BOTH(product) BOTH(min) BOTH(max)
BOTH(prefix_inclusive_sum) BOTH(prefix_exclusive_sum) BOTH(prefix_inclusive_product) BOTH(prefix_exclusive_product)
K(simd_and_i, int, simd_and(v)) K(simd_or_i, int, simd_or(v)) K(simd_xor_i, int, simd_xor(v))
K(quad_and_i, int, quad_and(v)) K(quad_or_i, int, quad_or(v)) K(quad_xor_i, int, quad_xor(v))
#define SHUFFLES(G) \\
    K(G##_shuffle, float, G##_shuffle(v, (ushort)((lane * 7 + d) % 32))) K(G##_broadcast, float, G##_broadcast(v, d)) \\
    K(G##_shuffle_xor, float, G##_shuffle_xor(v, d)) K(G##_shuffle_up, float, G##_shuffle_up(v, d)) \\
    K(G##_shuffle_down, float, G##_shuffle_down(v, d)) K(G##_shuffle_rotate_up, float, G##_shuffle_rotate_up(v, d)) \\
    K(G##_shuffle_rotate_down, float, G##_shuffle_rotate_down(v, d)) K(G##_broadcast_first, float, G##_broadcast_first(v)) \\
    K(G##_shuffle_and_fill_up, float, G##_shuffle_and_fill_up(v, -v, d)) \\
    K(G##_shuffle_and_fill_down, float, G##_shuffle_and_fill_down(v, -v, d))
SHUFFLES(simd) SHUFFLES(quad)
K(votes, uint, (uint)(ulong)simd_ballot(v & 1) + (simd_all(v < 1000) ? 1 : 0) + (simd_any(v == 7) ? 2 : 0))
K(divergent, int, lane < 12 ? simd_sum(v) : lane % 2 ? simd_max(v) : simd_sum(v) * (simd_is_first() ? 2 : 1))
K(active, uint, lane % 3 ? (uint)(ulong)simd_active_threads_mask() : popcount((uint)(ulong)simd_active_threads_mask()))
K(loop, int, walk(v, lane)) K(nested, int, nest(v, lane))
K(half_sum, half, simd_sum(v)) K(byte_max, char, simd_max(v)) K(long_sum, long, simd_sum(v)) K(vector_sum, float4, simd_sum(v))
K(modulo, float, simd_shuffle_and_fill_up(v, -v, d, (ushort)8) + simd_shuffle_and_fill_down(v, -v, d, (ushort)8))
"""


@pytest.fixture(scope="module")
def library():
    return Runner(SIMD)


@pytest.fixture(params=["in order", "shuffled"])
def simd(request, library):
    """With shuffled lanes everything must come out the same."""
    softmetal.set_seed(int(np.random.default_rng().integers(1, 1 << 31)) if request.param == "shuffled" else 0)
    return library


def lanes(runner, name, x, d=0, size=32):
    out = np.zeros_like(x)
    runner.run("k_" + name, [x, out, np.uint16(d)], groups=1, size=size)
    return out


def scan(x, op, first, inclusive):
    total, out = first, []
    for v in x:
        out.append(op(total, v) if inclusive else total)
        total = op(total, v)
    return np.array(out, x.dtype)


@pytest.mark.parametrize("width,group", [(32, "simd"), (4, "quad")])
def test_reductions_and_scans(simd, rng, width, group):
    x = rng.uniform(0.5, 1.5, 64).astype("f")
    rows = x.reshape(-1, width)
    for name, f in {"sum": np.sum, "product": np.prod, "min": np.min, "max": np.max}.items():
        expected = np.repeat(f(rows.astype("d"), axis=1), width)
        assert np.allclose(lanes(simd, f"{group}_{name}_f", x, size=64), expected, rtol=1e-5), name
    for name, op, first in (("sum", np.add, 0), ("product", np.multiply, 1)):
        for kind in ("inclusive", "exclusive"):
            expected = np.concatenate([scan(r, op, np.float32(first), kind == "inclusive") for r in rows])
            assert np.allclose(lanes(simd, f"{group}_prefix_{kind}_{name}_f", x, size=64), expected, rtol=1e-5), (
                kind,
                name,
            )
    n = rng.integers(-(1 << 20), 1 << 20, 32).astype("i4")
    for name, f in {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}.items():
        assert np.array_equal(
            lanes(simd, f"{group}_{name}_i", n), np.repeat(f.reduce(n.reshape(-1, width), axis=1), width)
        )
    if group == "simd":
        assert np.array_equal(lanes(simd, "simd_sum_i", n), np.full(32, n.sum()))
        assert np.array_equal(lanes(simd, "simd_max_i", n), np.full(32, n.max()))
        assert np.array_equal(lanes(simd, "simd_prefix_inclusive_sum_i", n), np.cumsum(n))


@pytest.mark.parametrize("width,group", [(32, "simd"), (4, "quad")])
@pytest.mark.parametrize("d", [0, 1, 3])
def test_shuffles(simd, rng, width, group, d):
    x, at = rng.standard_normal(32).astype("f"), np.arange(32)
    base, inside = at // width * width, at % width
    expected = {
        "shuffle": x[base + (at * 7 + d) % 32 % width], "broadcast": x[base + d], "shuffle_xor": x[at ^ d],
        "shuffle_up": np.where(inside >= d, x[(at - d) % 32], x),
        "shuffle_down": np.where(inside + d < width, x[(at + d) % 32], x),
        "shuffle_rotate_up": x[base + (inside - d) % width], "shuffle_rotate_down": x[base + (inside + d) % width],
        "broadcast_first": x[base],
        "shuffle_and_fill_up": np.where(inside >= d, 1, -1) * x[base + (inside - d) % width],
        "shuffle_and_fill_down": np.where(inside + d < width, 1, -1) * x[base + (inside + d) % width],
    }  # fmt: skip
    for name, y in expected.items():
        assert np.array_equal(lanes(simd, f"{group}_{name}", x, d), y), name


def test_votes_divergence_and_types(simd, rng):
    n = rng.integers(0, 900, 32).astype("u4")
    expected = sum(int(v & 1) << i for i, v in enumerate(n)) + 1 + (2 if 7 in n else 0)
    assert np.array_equal(lanes(simd, "votes", n), np.full(32, expected & 0xFFFFFFFF, "u4"))
    i, lane = n.astype("i4"), np.arange(32)
    low, odd, even = lane < 12, (lane >= 12) & (lane % 2 == 1), (lane >= 12) & (lane % 2 == 0)
    want = np.where(low, i[low].sum(), np.where(odd, i[odd].max(), i[even].sum()))
    want[12] *= 2
    assert np.array_equal(lanes(simd, "divergent", i), want)
    mask = sum(1 << k for k in range(32) if k % 3)
    assert np.array_equal(lanes(simd, "active", n), np.where(lane % 3, mask, 11).astype("u4"))
    assert lanes(simd, "half_sum", np.full(32, 0.5, np.float16))[3] == 16
    assert lanes(simd, "byte_max", np.arange(-40, -8).astype("i1"))[0] == -9
    assert lanes(simd, "long_sum", np.full(32, 1 << 40, "i8"))[0] == 1 << 45
    v = rng.integers(0, 9, (32, 4)).astype("f")
    assert np.array_equal(lanes(simd, "vector_sum", v)[5], v.sum(0))


def test_divergent_loops(simd, rng):
    v, lane = rng.integers(-50, 50, 32).astype("i4"), np.arange(32)
    out = lanes(simd, "loop", v)
    rounds = [v[lane % 4 > k].sum() + k for k in range(3)]
    assert np.array_equal(out, [sum(rounds[: i % 4]) for i in lane])
    expected = np.zeros(32, int)
    for k in range(3):
        on = (lane + k) % 3 != 0
        odd, deep, even = on & (lane % 2 == 1), on & (lane % 4 == 3), on & (lane % 2 == 0)
        expected[odd] += v[odd].sum()
        expected[deep] += 3 * v[deep].max()
        expected[even] += 5 * v[even].min()
        expected[on] += np.where(on[lane ^ 2], v[lane ^ 2], v)[on]
    assert np.array_equal(lanes(simd, "nested", v), expected)


def test_partial_simdgroup(simd, rng):
    x = rng.integers(1, 9, 13).astype("i4")
    assert np.array_equal(lanes(simd, "simd_sum_i", x, size=13), np.full(13, x.sum()))


VECTORS = """
#include <metal_stdlib>
using namespace metal;
struct Pair { packed_float3 p; uchar tag; half2 h; float get() const { return p[0]; }
              void set(float v) device { p[0] = v; } void set(float v) thread { p[0] = v + 100; } };
static_assert(sizeof(packed_float3) == 12 && sizeof(float3) == 16 && sizeof(half3) == 8 && sizeof(packed_half4) == 8, "sizes");
static_assert(sizeof(Pair) == 20 && sizeof(float3x3) == 48 && alignof(float4) == 16 && sizeof(size_t) == 8, "sizes");
constant float weights[2][3] = {{1, 2, 3}, {4, 5, 6}};
constant half4 h4_table[2] = {half4(1, 2, 3, 4), half4(0.5h)};
constant uint bits = 1u << 5;
template <typename T, typename U> T convert(U u) { return static_cast<T>(u); }
template <typename T> T twice(vec<T, 4> v) { return (v + v).w; }
template <typename T> struct Load { static T from(device const T* p) { return p[1]; } static T from(threadgroup const T* p) { return p[0]; } };
enum class Mode : uint { a = 1, b };
kernel void vectors(device float* o [[buffer(0)]], device float4* in [[buffer(1)]], device Pair* pairs [[buffer(2)]],
                    constant float4x4& m [[buffer(3)]], device packed_float3* packed [[buffer(4)]], device int* n [[buffer(5)]]) {
    float4 v = in[0];
    v.xz = v.yw;                       o[0] = v.x; o[1] = v.z;
    v.wzyx = in[0];                    o[2] = v.x; o[3] = v.w;
    in[1].yw = float2(7, 8);           o[4] = in[1].y + in[1].w;
    v.r += 1; v.gb *= 2.0f;            o[5] = v.r; o[6] = v.g;
    o[7] = float4(float2(1, 2), 3, 4).z + float4(1.0f, float3(2, 3, 4)).w + float3(v.xy, 5)[2];
    o[8] = ((float4) half4(1.5h)).x + float2(int2(3, 4)).y + (float) 2;
    int4 c = (int4) float4(1.9f, -1.9f, 2.5f, 0);     o[9] = c.x * 100 + c.y * 10 + c.z;
    uchar4 b = uchar4(250, 1, 2, 3); b += uchar4(10); o[10] = b.x;
    o[11] = as_type<float>(0x3f800000u) + as_type<half2>(0x3c004000u).x;
    o[12] = twice(half4(3)) + convert<float>(int(4)) + weights[1][2] + h4_table[0].w + h4_table[1].x + bits;
    bool4 q = v < float4(1e9f);        o[13] = all(q) + any(!q) + select(2.0f, 3.0f, q.x);
    o[14] = select(float4(1), float4(2), float4(1, 2, 3, 4) > 2.5f).z;
    float3x3 r = float3x3(float3(1, 2, 3), float3(4, 5, 6), float3(7, 8, 10));
    o[15] = (r * float3(1, 0, 2)).y + (float3(1, 0, 2) * r).y + determinant(r) + transpose(r)[0][1];
    float4x4 t = m * m; t[1][2] += 1;  o[16] = t[1][2]; o[17] = (m * float4(1, 2, 3, 4)).w + m[2].y;
    packed_float3 p = packed[0]; p += float3(1); packed[1] = p * 2.0f; packed[2][1] = 9;
    float3 u = packed[0]; u += packed[1];  o[18] = u.z + dot(float3(p), float3(1));
    Pair local = pairs[0]; local.set(5);   o[19] = local.get();
    pairs[1].set(6); pairs[1].tag = 7;     o[20] = pairs[1].get() + pairs[1].tag + (float) pairs[0].h.y;
    o[21] = Load<float>::from(o + 8) + float(Mode::b) + uint(Mode::a);
    auto f = [&](float a) { return a * v.x; }; o[22] = f(2.0f);
    float arr[4] = {1, 2, 3}; thread float* ap = arr; ap[3] = 4; float total = 0;
    #pragma unroll
    for (ushort k = 0; k < 4; k++) total += ap[k];
    o[23] = total;
    n[0] = clz(1u) + ctz(8) * 100 + popcount(255u) * 10000;
    n[1] = mulhi(1 << 20, 1 << 20); n[2] = (int) reverse_bits(1u); n[3] = rotate(0x80000001u, 1u);
    n[4] = extract_bits(0x1234u, 4, 8); n[5] = insert_bits(0u, 0xffu, 4, 4); n[6] = absdiff(-5, 7); n[7] = addsat((char) 100, (char) 100);
    n[8] = max3(1, 9, 4) * 100 + min3(5, 3, 4) * 10 + median3(1, 9, 4); n[9] = hadd(7, 8) * 10 + rhadd(7, 8);
    n[10] = (int) subsat(3u, 5u) + mad24(3, 4, 5) + abs(-3) + (char) 200;
    bfloat4 bf = bfloat4(1.5f); bf = bf * bf + bf;      o[24] = float(bf.x) + (float) bfloat(3.14159f) + float4(bf)[1];
    half3 hh = half3(1, 2, 3); hh.xy /= 3.0h;           o[25] = float(hh.x) + (hh.y == half(2.0h / 3.0h));
    o[26] = float(half(65504.0h) * 2.0h) == INFINITY;   o[27] = pack_float_to_unorm4x8(float4(1, 0, 0.5f, 1)) == 0xff8000ffu;
    o[28] = unpack_snorm4x8_to_float(0x7f810000u).w + length(float2(3, 4)) + distance(float2(0), float2(6, 8)) + cross(float3(1, 0, 0), float3(0, 1, 0)).z;
    int e; float fr = frexp(10.0f, e); float ip; float md = modf(2.75f, ip); float cs; float sn = sincos(0.5f, cs);
    float4 u1 = float4(float4(1, 2, 3, 4) < 2.5f) + (float4)(half4(2) == half4(1, 2, 3, 2)) * 10.0f;
    o[32] = u1.x; o[33] = u1.y; o[34] = u1.w; o[35] = float(v.x > 1e9f) + dot(float2(int2(3, 4) >= 4), float2(1));
    o[29] = fr * 1000 + e; o[30] = ip * 10 + md; o[31] = sn * sn + cs * cs;
}
"""


def test_vectors_and_conversions(rng):
    r = Runner(VECTORS)
    o, n = np.zeros(40, "f"), np.zeros(16, "i4")
    v = rng.integers(1, 9, (2, 4)).astype("f")
    pairs = np.zeros((2, 20), "u1")
    pairs[0, 16:20].view(np.float16)[:] = 0.5, 0.25
    m = rng.integers(-3, 4, (4, 4)).astype("f")
    packed = rng.integers(1, 9, (3, 3)).astype("f")
    p0 = packed[0].copy()
    r.run("vectors", [o, v.copy(), pairs, m.tobytes(), packed, n], groups=1, size=1)
    x, y, z, w = v[0]
    mm = m.T @ m.T  # columns of the Metal matrix are rows here
    expected = [
        y, w, w, x, 15, w + 1, z * 2, 3 + 4 + 5, 1.5 + 4 + 2, 100 - 10 + 2, 4, 1 + 2, 6 + 4 + 6 + 4 + 0.5 + 32, 1 + 0 + 3, 2,
        2 + 16 + 4 + 18 - 5 + 2 - 0, 0, 0,
    ]  # fmt: skip
    expected[15] = (2 + 2 * 8) + (4 + 2 * 6) + np.linalg.det([[1, 4, 7], [2, 5, 8], [3, 6, 10]]) + 4
    expected[16] = mm[2, 1] + 1
    expected[17] = (m.T @ np.array([1, 2, 3, 4]))[3] + m[2, 1]
    assert np.allclose(o[:18], expected, rtol=1e-6), np.nonzero(~np.isclose(o[:18], expected))
    assert np.array_equal(packed[1], (p0 + 1) * 2) and packed[2][1] == 9
    assert o[18] == p0[2] + (p0[2] + 1) * 2 + (p0 + 1).sum()
    assert o[19] == 105 and o[20] == 6 + 7 + 0.25 and o[21] == o[9] + 3 and o[22] == 2 * o[5] and o[23] == 10
    assert list(n[:6]) == [31 + 300 + 80000, 256, -(1 << 31), 3, 0x23, 0xF0]
    assert list(n[6:11]) == [12, 127, 934, 78, 0 + 17 + 3 - 56]
    assert o[24] == 3.75 + 3.140625 + 3.75
    assert o[25] == np.float32(np.float16(1) / np.float16(3)) + 1
    assert list(o[26:28]) == [1, 1] and o[28] == 1 + 5 + 10 + 1
    assert np.allclose(o[29:32], [625 + 4, 20.75, 1])
    assert list(o[32:36]) == [1, 11, 10, 1]


MATH = (
    "acos asin atan atanh cos cosh exp exp2 exp10 log log2 log10 sin sinh tan tanh sqrt rsqrt ceil floor trunc rint round "
    "fract fabs sign saturate asinh sinpi cospi"
).split()
PLAIN = {
    "acos": np.arccos, "asin": np.arcsin, "atan": np.arctan, "atanh": np.arctanh, "exp10": lambda x: 10.0**x, "rsqrt": lambda x: x**-0.5,
    "round": lambda x: np.floor(x + 0.5), "fract": lambda x: x - np.floor(x), "saturate": lambda x: np.clip(x, 0, 1),
    "asinh": np.arcsinh, "sinpi": lambda x: np.sin(np.pi * x), "cospi": lambda x: np.cos(np.pi * x),
}  # fmt: skip


def test_mathematics(rng):
    """float, half, bfloat, vectors, and the fast:: and precise:: forms, against float64."""
    kernels = "\n".join(
        f"kernel void {f}_(device const float* x [[buffer(0)]], device float4* o [[buffer(1)]], uint i [[thread_position_in_grid]]) {{"
        f"float4 v = float4(x[i]); o[i] = float4({f}(x[i]), float({f}(half(x[i]))), metal::precise::{f}(v).z, "
        f"metal::fast::{f}(float(bfloat(x[i]))));}}"
        for f in MATH
    )
    r = Runner("#include <metal_stdlib>\nusing namespace metal;\n" + kernels)
    x = rng.uniform(0.05, 0.95, 64).astype("f")
    h, b = x.astype(np.float16), (x.view("u4") + 0x8000 & 0xFFFF0000).view("f")
    for f in MATH:
        out, plain = np.zeros((64, 4), "f"), PLAIN.get(f) or getattr(np, f)
        r.run(f + "_", [x, out], threads=64)
        assert np.allclose(out[:, 0], plain(x.astype("d")), rtol=1e-5, atol=1e-6), f
        assert np.array_equal(out[:, 0], out[:, 2])
        assert np.allclose(out[:, 1], plain(h.astype("d")), rtol=1e-3, atol=1e-3), f  # half has 11 bits
        assert np.allclose(out[:, 3], plain(b.astype("d")), rtol=1e-5, atol=1e-6), f


def test_functions_of_two_and_three(rng):
    names = {
        "pow(a, b)": lambda a, b, c: a**b, "fmod(a, b)": lambda a, b, c: np.fmod(a, b), "atan2(a, b)": lambda a, b, c: np.arctan2(a, b),
        "max(a, b)": lambda a, b, c: np.maximum(a, b), "min(a, 0.5f)": lambda a, b, c: np.minimum(a, 0.5),
        "clamp(a, b, b + c)": lambda a, b, c: np.clip(a, b, b + c), "mix(a, b, c)": lambda a, b, c: a + (b - a) * c,
        "fma(a, b, c)": lambda a, b, c: a * b + c, "step(a, b)": lambda a, b, c: (b >= a) * 1.0, "copysign(a, -b)": lambda a, b, c: -a,
        "smoothstep(0.2f, 0.7f, a)": lambda a, b, c: (t := np.clip((a - 0.2) / 0.5, 0, 1)) * t * (3 - 2 * t),
        "fdim(a, b)": lambda a, b, c: np.maximum(a - b, 0), "median3(a, b, c)": lambda a, b, c: np.median([a, b, c], axis=0),
        "ldexp(a, 3)": lambda a, b, c: a * 8, "max3(a, b, c)": lambda a, b, c: np.maximum(a, np.maximum(b, c)),
        "normalize(float3(a, b, c)).y": lambda a, b, c: b / np.sqrt(a * a + b * b + c * c),
        "reflect(float2(a, b), float2(0, 1)).y": lambda a, b, c: -b,
    }  # fmt: skip
    kernels = "\n".join(
        f"kernel void f{i}(device const float* x [[buffer(0)]], device float* o [[buffer(1)]], uint i [[thread_position_in_grid]])"
        f"{{ float a = x[3 * i], b = x[3 * i + 1], c = x[3 * i + 2]; o[i] = {e}; }}"
        for i, e in enumerate(names)
    )
    r = Runner("#include <metal_stdlib>\nusing namespace metal;\n" + kernels)
    x = rng.uniform(0.1, 2, (50, 3)).astype("f")
    for i, (e, plain) in enumerate(names.items()):
        out = np.zeros(50, "f")
        r.run(f"f{i}", [x, out], threads=50)
        assert np.allclose(out, plain(*x.astype("d").T), rtol=1e-5, atol=1e-6), e


ATOMICS = """
#include <metal_stdlib>
using namespace metal;
kernel void all(device atomic_int* i [[buffer(0)]], device atomic<uint>* u [[buffer(1)]], device atomic_float* f [[buffer(2)]],
                device int* order [[buffer(3)]], uint t [[thread_position_in_grid]]) {
    atomic_fetch_add_explicit(&i[0], int(t), memory_order_relaxed);
    atomic_fetch_sub_explicit(&i[1], 1, memory_order_relaxed);
    atomic_fetch_max_explicit(&i[2], int(t) - 50, memory_order_relaxed);
    atomic_fetch_min_explicit(&i[3], int(t) - 50, memory_order_relaxed);
    atomic_fetch_or_explicit(u, 1u << (t % 32), memory_order_relaxed);
    atomic_fetch_and_explicit(u + 1, ~(1u << (t % 16)), memory_order_relaxed);
    atomic_fetch_xor_explicit(u + 2, t, memory_order_relaxed);
    atomic_fetch_add_explicit(f, 0.5f, memory_order_relaxed);
    uint slot = atomic_fetch_add_explicit(u + 3, 1, memory_order_relaxed);
    order[slot] = atomic_exchange_explicit(u + 4, t, memory_order_relaxed);
    float seen = atomic_load_explicit(f + 1, memory_order_relaxed);
    while (!atomic_compare_exchange_weak_explicit(f + 1, &seen, max(seen, float(t)), memory_order_relaxed, memory_order_relaxed));
}
"""


def test_atomics():
    r, t = Runner(ATOMICS), np.arange(200)
    i, u, f = np.zeros(4, "i4"), np.array([0, 0xFFFFFFFF, 0, 0, 777], "u4"), np.zeros(2, "f")
    order = np.full(200, -1, "i4")
    r.run("all", [i, u, f, order], groups=20, size=10)
    assert list(i) == [t.sum(), -200, 149, -50]
    assert list(u[:4]) == [0xFFFFFFFF, 0xFFFF0000, np.bitwise_xor.reduce(t), 200]
    assert sorted([*order, u[4]]) == sorted([777, *t]) and list(f) == [100, 199]


def test_thread_elements_layout():
    """Each lane holds two neighbours of a row; loads with origin, row length and transposition agree with it."""
    r = Runner("""
#include <metal_stdlib>
using namespace metal;
kernel void where(device float* m [[buffer(0)]], device float* out [[buffer(1)]], uint lane [[thread_index_in_simdgroup]]) {
    simdgroup_float8x8 a, b;
    simdgroup_load(a, m, 20, ulong2(3, 2));
    simdgroup_load(b, m, 20, ulong2(3, 2), true);
    out[lane * 2] = a.thread_elements()[0]; out[lane * 2 + 1] = a.thread_elements()[1];
    out[64 + lane * 2] = b.thread_elements().x; out[64 + lane * 2 + 1] = b.thread_elements().y;
    b.thread_elements()[0] = 1;
    simdgroup_store(simdgroup_float8x8(2.0f), out + 128);
    simdgroup_float8x8 c = make_filled_simdgroup_matrix<float, 8, 8>(3.0f), d;
    simdgroup_multiply(d, c, simdgroup_float8x8(2.0f));
    simdgroup_store(d, out + 192, 8, 0, true);
}""")
    m, out = np.arange(400, dtype="f"), np.zeros(256, "f")
    r.run("where", [m, out], groups=1)
    grid = m.reshape(20, 20)
    for lane in range(32):
        quad = lane // 4
        row, column = (quad & 4) + (lane // 2) % 4, (quad & 2) * 2 + (lane % 2) * 2
        assert list(out[2 * lane : 2 * lane + 2]) == list(grid[2 + row, 3 + column : 5 + column])
        assert list(out[64 + 2 * lane : 66 + 2 * lane]) == [grid[2 + column, 3 + row], grid[3 + column, 3 + row]]
    assert np.array_equal(out[128:192].reshape(8, 8), 2 * np.eye(8)) and np.all(out[192:] == 6)


def test_half_rounds_after_each_operation(rng):
    r = Runner("""
#include <metal_stdlib>
using namespace metal;
kernel void f(device const half* a [[buffer(0)]], device const half* b [[buffer(1)]], device half* o [[buffer(2)]],
              uint i [[thread_position_in_grid]]) { half t = a[i] * b[i]; o[i] = t + a[i]; }""")
    a, b, o = (rng.standard_normal(1000).astype(np.float16) for _ in range(3))
    r.run("f", [a, b, o], threads=1000)
    fused = (a.astype("d") * b.astype("d") + a.astype("d")).astype(np.float16)
    assert np.all((o == a * b + a) | (o == fused))  # contraction is allowed, as in Metal's fast mathematics


def test_scalar_types_and_constants():
    r = Runner("""
#include <metal_stdlib>
using namespace metal;
kernel void f(device float* o [[buffer(0)]]) {
    o[0] = M_PI_F; o[1] = numeric_limits<int>::max(); o[2] = (uint8_t) 300; o[3] = int8_t(200); o[4] = float(1ul << 40);
    o[5] = -7 / 2; o[6] = -7 % 3; o[7] = (char) 200 >> 1; o[8] = 0.1h; o[9] = HALF_MAX; o[10] = isnan(NAN); o[11] = 3.0 / 2;
    o[12] = bool(2) + true; o[13] = uint(-1) == 0xffffffff; o[14] = numeric_limits<half>::lowest();
}""")
    o = np.zeros(16, "f")
    r.run("f", [o], groups=1, size=1)
    expected = [math.pi, 2**31, 44, -56, 2**40, -3, -1, -28, np.float16(0.1), 65504, 1, 1.5, 2, 1, -65504, 0]
    assert np.allclose(o, np.array(expected, "f"), rtol=1e-7)


def test_half_vectors_and_float_scalars(rng):
    """The scalar is converted to the vector's element type, in templates and nested expressions too."""
    r = Runner("""
#include <metal_stdlib>
using namespace metal;
template <typename T> vec<T, 2> f(vec<T, 2> a, vec<T, 2> b) { return a - 0.5 * b; }
#define HALVE(x) ((x) * 0.5f)
kernel void k(device half4* x [[buffer(0)]], device float2* y [[buffer(1)]], constant float& s [[buffer(2)]]) {
    half4 h = x[0]; h *= 2.0; h = 0.25 * ((h + 1.0f * s) * s) + HALVE(h);
    x[0] = h; y[0] = f<float>(y[0], y[1]) + float2(f<half>(half2(1), half2(3)));
}""")
    x, y = rng.integers(-8, 9, 4).astype(np.float16), rng.integers(-8, 9, (2, 2)).astype("f")
    h, before = x * 2, y.copy()
    r.run("k", [x, y, np.float32(2)], groups=1, size=1)
    assert np.array_equal(x, 0.25 * (h + 2) * 2 + h / 2)
    assert np.array_equal(y[0], before[0] - 0.5 * before[1] - 0.5)

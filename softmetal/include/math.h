// The mathematical, common, integer, relational and geometric functions of the standard library.
// float functions are those of the C library; half computes in float and rounds once; bfloat has none of its own,
// it converts to float, as in Metal.
extern "C" {
float acosf(float); float acoshf(float); float asinf(float); float asinhf(float); float atanf(float);
float atanhf(float); float cosf(float); float coshf(float); float expf(float); float exp2f(float); float exp10f(float);
float logf(float); float log2f(float); float log10f(float); float sinf(float); float sinhf(float); float tanf(float);
float tanhf(float); float powf(float, float); float fmodf(float, float); float atan2f(float, float);
float nextafterf(float, float); int ilogbf(float); float ldexpf(float, int); float remainderf(float, float);
}

#define SM_V1(NAME, R, T) \
    SM_INLINE R##2 NAME(T##2 a) { return R##2{NAME(a.x), NAME(a.y)}; } \
    SM_INLINE R##3 NAME(T##3 a) { return R##3{NAME(a.x), NAME(a.y), NAME(a.z)}; } \
    SM_INLINE R##4 NAME(T##4 a) { return R##4{NAME(a.x), NAME(a.y), NAME(a.z), NAME(a.w)}; }
#define SM_V2(NAME, T) \
    SM_INLINE T##2 NAME(T##2 a, T##2 b) { return T##2{NAME(a.x, b.x), NAME(a.y, b.y)}; } \
    SM_INLINE T##3 NAME(T##3 a, T##3 b) { return T##3{NAME(a.x, b.x), NAME(a.y, b.y), NAME(a.z, b.z)}; } \
    SM_INLINE T##4 NAME(T##4 a, T##4 b) { return T##4{NAME(a.x, b.x), NAME(a.y, b.y), NAME(a.z, b.z), NAME(a.w, b.w)}; }
#define SM_V3(NAME, T) \
    SM_INLINE T##2 NAME(T##2 a, T##2 b, T##2 c) { return T##2{NAME(a.x, b.x, c.x), NAME(a.y, b.y, c.y)}; } \
    SM_INLINE T##3 NAME(T##3 a, T##3 b, T##3 c) { \
        return T##3{NAME(a.x, b.x, c.x), NAME(a.y, b.y, c.y), NAME(a.z, b.z, c.z)}; } \
    SM_INLINE T##4 NAME(T##4 a, T##4 b, T##4 c) { \
        return T##4{NAME(a.x, b.x, c.x), NAME(a.y, b.y, c.y), NAME(a.z, b.z, c.z), NAME(a.w, b.w, c.w)}; }
#define SM_F1(NAME, EXPRESSION) \
    SM_INLINE float NAME(float a) { return EXPRESSION; } \
    SM_INLINE half NAME(half a) { return (half)NAME((float)a); } \
    SM_V1(NAME, float, float) SM_V1(NAME, half, half)
#define SM_F2(NAME, EXPRESSION) \
    SM_INLINE float NAME(float a, float b) { return EXPRESSION; } \
    SM_INLINE half NAME(half a, half b) { return (half)NAME((float)a, (float)b); } \
    SM_V2(NAME, float) SM_V2(NAME, half)
#define SM_F3(NAME, EXPRESSION) \
    SM_INLINE float NAME(float a, float b, float c) { return EXPRESSION; } \
    SM_INLINE half NAME(half a, half b, half c) { return (half)NAME((float)a, (float)b, (float)c); } \
    SM_V3(NAME, float) SM_V3(NAME, half)
#define SM_INTEGERS(M) M(char) M(uchar) M(short) M(ushort) M(int) M(uint) M(long) M(ulong)

namespace metal {
// ------------------------------------------------------------------------------------------ mathematics
SM_F1(acos, acosf(a)) SM_F1(acosh, acoshf(a)) SM_F1(asin, asinf(a)) SM_F1(asinh, asinhf(a)) SM_F1(atan, atanf(a))
SM_F1(atanh, atanhf(a)) SM_F1(ceil, __builtin_ceilf(a)) SM_F1(cos, cosf(a)) SM_F1(cosh, coshf(a))
SM_F1(cospi, cosf(a * 3.14159265358979f)) SM_F1(exp, expf(a)) SM_F1(exp2, exp2f(a)) SM_F1(exp10, exp10f(a))
SM_F1(fabs, __builtin_fabsf(a)) SM_F1(floor, __builtin_floorf(a)) SM_F1(fract, __builtin_fminf(a - __builtin_floorf(a), 0x1.fffffep-1f))
SM_F1(log, logf(a)) SM_F1(log2, log2f(a)) SM_F1(log10, log10f(a)) SM_F1(rint, __builtin_rintf(a))
SM_F1(round, __builtin_roundf(a)) SM_F1(rsqrt, 1.0f / __builtin_sqrtf(a)) SM_F1(sin, sinf(a)) SM_F1(sinh, sinhf(a))
SM_F1(sinpi, sinf(a * 3.14159265358979f)) SM_F1(sqrt, __builtin_sqrtf(a)) SM_F1(tan, tanf(a)) SM_F1(tanh, tanhf(a))
SM_F1(tanpi, tanf(a * 3.14159265358979f)) SM_F1(trunc, __builtin_truncf(a))
SM_F1(saturate, __builtin_fminf(__builtin_fmaxf(a, 0.0f), 1.0f))
SM_F1(sign, a > 0 ? 1.0f : a < 0 ? -1.0f : 0.0f)
SM_F2(atan2, atan2f(a, b)) SM_F2(copysign, __builtin_copysignf(a, b)) SM_F2(fdim, a > b ? a - b : 0.0f)
SM_F2(fmax, __builtin_fmaxf(a, b)) SM_F2(fmin, __builtin_fminf(a, b)) SM_F2(fmod, fmodf(a, b)) SM_F2(pow, powf(a, b))
SM_F2(powr, powf(a, b)) SM_F2(divide, a / b) SM_F2(nextafter, nextafterf(a, b)) SM_F2(remainder, remainderf(a, b))
SM_F2(max, __builtin_fmaxf(a, b)) SM_F2(min, __builtin_fminf(a, b)) SM_F2(step, b < a ? 0.0f : 1.0f)
SM_F3(fma, __builtin_fmaf(a, b, c)) SM_F3(mad, a * b + c) SM_F3(mix, a + (b - a) * c)
SM_F3(clamp, __builtin_fminf(__builtin_fmaxf(a, b), c))
SM_F3(fmax3, __builtin_fmaxf(a, __builtin_fmaxf(b, c))) SM_F3(fmin3, __builtin_fminf(a, __builtin_fminf(b, c)))
SM_F3(fmedian3, __builtin_fmaxf(__builtin_fminf(a, b), __builtin_fminf(__builtin_fmaxf(a, b), c)))
SM_INLINE float sm_smooth(float t) { return t * t * (3 - 2 * t); }
SM_F3(smoothstep, sm_smooth(__builtin_fminf(__builtin_fmaxf((c - a) / (b - a), 0.0f), 1.0f)))

#define SM_OUT(T) /* a second result by reference */ \
    SM_INLINE T sincos(T a, thread T &c) { c = cos(a); return sin(a); } \
    SM_INLINE T modf(T a, thread T &i) { i = trunc(a); return a - i; }
#define SM_OUTS(T) SM_OUT(T) SM_OUT(T##2) SM_OUT(T##3) SM_OUT(T##4)
SM_OUTS(float) SM_OUTS(half)
SM_INLINE int ilogb(float a) { return ilogbf(a); }
SM_INLINE float ldexp(float a, int e) { return ldexpf(a, e); }
SM_INLINE half ldexp(half a, int e) { return (half)ldexpf((float)a, e); }
SM_INLINE float4 ldexp(float4 a, int4 e) {
    return float4{ldexpf(a.x, e.x), ldexpf(a.y, e.y), ldexpf(a.z, e.z), ldexpf(a.w, e.w)}; }
SM_INLINE float frexp(float a, thread int &e) {
    if (a == 0 || a - a != 0) { e = 0; return a; }
    e = ilogbf(a) + 1;
    return ldexpf(a, -e);
}

// -------------------------------------------------------------------------------------------- integers
#define SM_INTEGER1(NAME, T, EXPRESSION) \
    SM_INLINE T NAME(T a) { return EXPRESSION; } SM_V1(NAME, T, T)
#define SM_INTEGER2(NAME, T, EXPRESSION) \
    SM_INLINE T NAME(T a, T b) { return EXPRESSION; } SM_V2(NAME, T)
#define SM_INTEGER3(NAME, T, EXPRESSION) \
    SM_INLINE T NAME(T a, T b, T c) { return EXPRESSION; } SM_V3(NAME, T)
template <class T> SM_INLINE constexpr T sm_high(T a, T b) {
    if constexpr (sizeof(T) == 8) return (T)(((T)-1 < 0 ? (T)((__int128)a * b >> 64) : (T)((unsigned __int128)a * b >> 64)));
    else return (T)(((T)-1 < 0 ? (long)a * (long)b : (long)((ulong)a * (ulong)b)) >> (8 * sizeof(T)));
}
template <class T> SM_INLINE T sm_addsat(T a, T b) {
    T r;
    if (!__builtin_add_overflow(a, b, &r)) return r;
    T low = (T)-1 < 0 ? (T)((T)1 << (8 * sizeof(T) - 1)) : 0;
    return b < 0 ? low : (T)~low;
}
template <class T> SM_INLINE T sm_subsat(T a, T b) {
    T r;
    if (!__builtin_sub_overflow(a, b, &r)) return r;
    T low = (T)-1 < 0 ? (T)((T)1 << (8 * sizeof(T) - 1)) : 0;
    return (T)-1 < 0 && b < 0 ? (T)~low : low;
}
template <class T> SM_INLINE T sm_clz(T a) {
    constexpr int extra = 64 - 8 * (int)sizeof(T);
    ulong bits = (ulong)a << extra;
    return (T)(bits ? __builtin_clzl(bits) : 8 * sizeof(T));
}
template <class T> SM_INLINE T sm_ctz(T a) {
    return (T)(a ? __builtin_ctzl((ulong)a) : 8 * sizeof(T));
}
template <class T> SM_INLINE T sm_popcount(T a) {
    return (T)__builtin_popcountl((ulong)a << (64 - 8 * sizeof(T)));
}
template <class T> SM_INLINE T sm_reverse(T a) { return (T)(__builtin_bitreverse64((ulong)a) >> (64 - 8 * sizeof(T))); }
template <class T> SM_INLINE T sm_rotate(T a, T b) {
    constexpr ulong bits = 8 * sizeof(T), all = ~0ul >> (64 - bits);
    ulong v = (ulong)a & all, n = (ulong)b & (bits - 1);
    return (T)(n ? v << n | v >> (bits - n) : v);
}
#define SM_INTEGER(T) \
    SM_INTEGER2(max, T, a > b ? a : b) SM_INTEGER2(min, T, a < b ? a : b) \
    SM_INTEGER3(clamp, T, a < b ? b : a > c ? c : a) SM_INTEGER1(abs, T, (T)(a < 0 ? -a : a)) \
    SM_INTEGER2(absdiff, T, (T)(a > b ? a - b : b - a)) SM_INTEGER2(addsat, T, sm_addsat<T>(a, b)) \
    SM_INTEGER2(subsat, T, sm_subsat<T>(a, b)) SM_INTEGER1(clz, T, sm_clz<T>(a)) SM_INTEGER1(ctz, T, sm_ctz<T>(a)) \
    SM_INTEGER1(popcount, T, sm_popcount<T>(a)) SM_INTEGER1(reverse_bits, T, sm_reverse<T>(a)) \
    SM_INTEGER2(rotate, T, sm_rotate<T>(a, b)) SM_INTEGER2(mulhi, T, sm_high<T>(a, b)) \
    SM_INTEGER3(madhi, T, (T)(sm_high<T>(a, b) + c)) SM_INTEGER3(madsat, T, sm_addsat<T>((T)(a * b), c)) \
    SM_INTEGER2(hadd, T, (T)((a & b) + ((a ^ b) >> 1))) SM_INTEGER2(rhadd, T, (T)((a | b) - ((a ^ b) >> 1))) \
    SM_INTEGER3(max3, T, max(a, max(b, c))) SM_INTEGER3(min3, T, min(a, min(b, c))) \
    SM_INTEGER3(median3, T, max(min(a, b), min(max(a, b), c))) \
    SM_INLINE T extract_bits(T a, uint at, uint n) { \
        if (!n) return 0; return (T)((T)(a << (8 * sizeof(T) - at - n)) >> (8 * sizeof(T) - n)); } \
    SM_INLINE T insert_bits(T a, T v, uint at, uint n) { \
        ulong m = (n >= 64 ? ~0ul : (1ul << n) - 1) << at; return (T)(((ulong)a & ~m) | (((ulong)v << at) & m)); }
SM_INTEGERS(SM_INTEGER)
SM_INTEGER2(mul24, int, (a << 8 >> 8) * (b << 8 >> 8)) SM_INTEGER2(mul24, uint, (a & 0xffffff) * (b & 0xffffff))
SM_INTEGER3(mad24, int, (a << 8 >> 8) * (b << 8 >> 8) + c) SM_INTEGER3(mad24, uint, (a & 0xffffff) * (b & 0xffffff) + c)
SM_F1(abs, __builtin_fabsf(a)) SM_F3(max3, __builtin_fmaxf(a, __builtin_fmaxf(b, c)))
SM_F3(min3, __builtin_fminf(a, __builtin_fminf(b, c)))
SM_F3(median3, __builtin_fmaxf(__builtin_fminf(a, b), __builtin_fminf(__builtin_fmaxf(a, b), c)))

// ------------------------------------------------------------------------------------------- relations
#define SM_TEST(NAME, EXPRESSION) \
    SM_INLINE bool NAME(float a) { return EXPRESSION; } SM_INLINE bool NAME(half a) { return NAME((float)a); } \
    SM_V1(NAME, bool, float) SM_V1(NAME, bool, half)
SM_TEST(isnan, __builtin_isnan(a)) SM_TEST(isinf, __builtin_isinf(a)) SM_TEST(isfinite, __builtin_isfinite(a))
SM_TEST(isnormal, __builtin_isnormal(a)) SM_TEST(signbit, __builtin_signbit(a) != 0)
SM_INLINE bool isordered(float a, float b) { return !isnan(a) && !isnan(b); }
SM_INLINE bool isunordered(float a, float b) { return isnan(a) || isnan(b); }
template <class V> SM_INLINE bool all(V v) {
    if constexpr (sm_traits<V>::count <= 1) return (bool)v;
    else { bool r = true; for (int i = 0; i < (int)sm_traits<V>::count; i++) r &= v[i] != 0; return r; }
}
template <class V> SM_INLINE bool any(V v) {
    if constexpr (sm_traits<V>::count <= 1) return (bool)v;
    else { bool r = false; for (int i = 0; i < (int)sm_traits<V>::count; i++) r |= v[i] != 0; return r; }
}
template <class V> SM_INLINE V select(V a, V b, bool c) { return c ? b : a; }
template <class V, class C, class = typename sm_if<(sm_traits<C>::count > 1)>::type> SM_INLINE V select(V a, V b, C c) {
    for (int i = 0; i < (int)sm_traits<V>::count; i++) if (c[i]) a[i] = b[i];
    return a;
}

// -------------------------------------------------------------------------------------------- geometry
#define SM_GEOMETRY(T, V, N) \
    SM_INLINE T dot(V a, V b) { T r = a[0] * b[0]; for (int i = 1; i < N; i++) r += a[i] * b[i]; return r; } \
    SM_INLINE T length_squared(V a) { return dot(a, a); } \
    SM_INLINE T length(V a) { return sqrt(dot(a, a)); } \
    SM_INLINE T distance(V a, V b) { return length(a - b); } \
    SM_INLINE T distance_squared(V a, V b) { return dot(a - b, a - b); } \
    SM_INLINE V normalize(V a) { return a * rsqrt(dot(a, a)); } \
    SM_INLINE V faceforward(V n, V i, V r) { return dot(i, r) < (T)0 ? n : -n; } \
    SM_INLINE V reflect(V i, V n) { return i - n * (T)((T)2 * dot(n, i)); } \
    SM_INLINE V refract(V i, V n, T eta) { \
        T d = dot(n, i), k = (T)1 - eta * eta * ((T)1 - d * d); \
        return k < (T)0 ? V((T)0) : i * eta - n * (T)(eta * d + sqrt(k)); }
#define SM_GEOMETRIES(T) SM_GEOMETRY(T, T##2, 2) SM_GEOMETRY(T, T##3, 3) SM_GEOMETRY(T, T##4, 4) \
    SM_INLINE T##3 cross(T##3 a, T##3 b) { return a.yzx * b.zxy - a.zxy * b.yzx; }
SM_GEOMETRIES(float) SM_GEOMETRIES(half)

// ----------------------------------------------------------------------------------------- pack, unpack
SM_INLINE float4 unpack_unorm4x8_to_float(uint v) {
    return float4{(float)(v & 255), (float)(v >> 8 & 255), (float)(v >> 16 & 255), (float)(v >> 24)} / 255.0f; }
SM_INLINE float4 unpack_snorm4x8_to_float(uint v) {
    float4 r = float4{(float)(char)v, (float)(char)(v >> 8), (float)(char)(v >> 16), (float)(char)(v >> 24)} / 127.0f;
    return max(r, float4(-1.0f)); }
SM_INLINE half4 unpack_unorm4x8_to_half(uint v) { return __builtin_convertvector(unpack_unorm4x8_to_float(v), half4); }
SM_INLINE float2 unpack_unorm2x16_to_float(uint v) { return float2{(float)(v & 65535), (float)(v >> 16)} / 65535.0f; }
SM_INLINE float2 unpack_snorm2x16_to_float(uint v) {
    return max(float2{(float)(short)v, (float)(short)(v >> 16)} / 32767.0f, float2(-1.0f)); }
SM_INLINE uint pack_float_to_unorm4x8(float4 v) {
    v = rint(saturate(v) * 255.0f);
    return (uint)v.x | (uint)v.y << 8 | (uint)v.z << 16 | (uint)v.w << 24; }
SM_INLINE uint pack_float_to_snorm4x8(float4 v) {
    v = rint(clamp(v, float4(-1.0f), float4(1.0f)) * 127.0f);
    return ((uint)(int)v.x & 255) | ((uint)(int)v.y & 255) << 8 | ((uint)(int)v.z & 255) << 16 | (uint)(int)v.w << 24; }
SM_INLINE uint pack_float_to_unorm2x16(float2 v) {
    v = rint(saturate(v) * 65535.0f);
    return (uint)v.x | (uint)v.y << 16; }

// fast:: and precise:: are the same functions here. Not by `using namespace`: a program may add overloads there.
#define SM_FORMS \
    using metal::acos; using metal::acosh; using metal::asin; using metal::asinh; using metal::atan; \
    using metal::atan2; using metal::atanh; using metal::ceil; using metal::copysign; using metal::cos; \
    using metal::cosh; using metal::cospi; using metal::divide; using metal::exp; using metal::exp10; \
    using metal::exp2; using metal::fabs; using metal::abs; using metal::fdim; using metal::floor; \
    using metal::fma; using metal::fmax; using metal::fmax3; using metal::fmedian3; using metal::fmin; \
    using metal::fmin3; using metal::fmod; using metal::fract; using metal::frexp; using metal::ilogb; \
    using metal::isfinite; using metal::isinf; using metal::isnan; using metal::isnormal; \
    using metal::isordered; using metal::isunordered; using metal::ldexp; using metal::log; \
    using metal::log10; using metal::log2; using metal::max; using metal::max3; using metal::median3; \
    using metal::min; using metal::min3; using metal::modf; using metal::nextafter; using metal::pow; \
    using metal::powr; using metal::rint; using metal::round; using metal::rsqrt; using metal::select; \
    using metal::signbit; using metal::sin; using metal::sincos; using metal::sinh; using metal::sinpi; \
    using metal::sqrt; using metal::tan; using metal::tanh; using metal::tanpi; using metal::trunc; \
    using metal::clamp; using metal::mix; using metal::saturate; using metal::sign; \
    using metal::smoothstep; using metal::step; using metal::distance; using metal::length; \
    using metal::normalize;
namespace fast { SM_FORMS }
namespace precise { SM_FORMS }
}

#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LOG10E_F 0.43429448190325182765f
#define M_LN2_F 0.69314718055994530942f
#define M_LN10_F 2.30258509299404568402f
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_PI_4_F 0.78539816339744830962f
#define M_1_PI_F 0.31830988618379067154f
#define M_2_PI_F 0.63661977236758134308f
#define M_2_SQRTPI_F 1.12837916709551257390f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f
#define M_PI_H 3.140625h
#define M_LN2_H 0.6933594h
#define M_LOG2E_H 1.442383h
#define INFINITY __builtin_inff()
#define HUGE_VALF __builtin_inff()
#define HUGE_VALH ((half)__builtin_inff())
#define NAN __builtin_nanf("")
#define MAXFLOAT 0x1.fffffep127f
#define FLT_MAX 0x1.fffffep127f
#define FLT_MIN 0x1.0p-126f
#define FLT_EPSILON 0x1.0p-23f
#define FLT_DIG 6
#define FLT_MANT_DIG 24
#define HALF_MAX 65504.0h
#define MAXHALF 65504.0h
#define HALF_MIN 0x1.0p-14h
#define HALF_EPSILON 0x1.0p-10h
#define CHAR_BIT 8
#define CHAR_MAX 127
#define CHAR_MIN (-128)
#define SCHAR_MAX 127
#define SCHAR_MIN (-128)
#define UCHAR_MAX 255
#define SHRT_MAX 32767
#define SHRT_MIN (-32768)
#define USHRT_MAX 65535
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define LONG_MAX 0x7fffffffffffffffl
#define LONG_MIN (-0x7fffffffffffffffl - 1)
#define ULONG_MAX 0xfffffffffffffffful

namespace metal {
template <class T> struct _numeric_limits_impl {  // programs add their types under this name of Apple's header
    static constexpr bool is_signed = (T)-1 < (T)0;
    static constexpr constant int digits = 8 * sizeof(T) - ((T)-1 < (T)0);
    static constexpr T min() { return (T)-1 < (T)0 ? (T)((ulong)1 << (8 * sizeof(T) - 1)) : (T)0; }
    static constexpr T max() { return (T)-1 < (T)0 ? (T)(((ulong)1 << (8 * sizeof(T) - 1)) - 1) : (T)~(T)0; }
    static constexpr T lowest() { return min(); }
};
#define SM_LIMITS(T, LOW, MIN, MAX, EPSILON) \
    template <> struct _numeric_limits_impl<T> { \
        static constexpr T min() { return (T)MIN; } static constexpr T max() { return (T)MAX; } \
        static constexpr T lowest() { return (T)LOW; } static constexpr T epsilon() { return (T)EPSILON; } \
        static constexpr T infinity() { return (T)__builtin_inff(); } \
        static constexpr T quiet_NaN() { return (T)__builtin_nanf(""); } };
SM_LIMITS(float, -FLT_MAX, FLT_MIN, FLT_MAX, FLT_EPSILON)
SM_LIMITS(half, -65504.0f, 0x1.0p-14f, 65504.0f, 0x1.0p-10f)
SM_LIMITS(bfloat, -0x1.fep127f, 0x1.0p-126f, 0x1.fep127f, 0x1.0p-7f)
template <class T> struct numeric_limits : _numeric_limits_impl<T> {};
}

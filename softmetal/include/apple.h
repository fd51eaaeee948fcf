// Names that Apple's own headers use inside, and that programs which add overloads for their types call.
#define SM_APPLE1(NAME) SM_INLINE float __metal_##NAME(float a, bool = true) { return metal::NAME(a); }
#define SM_APPLE2(NAME) SM_INLINE float __metal_##NAME(float a, float b, bool = true) { return metal::NAME(a, b); }
#define SM_APPLE3(NAME) SM_INLINE float __metal_##NAME(float a, float b, float c, bool = true) { return metal::NAME(a, b, c); }
SM_APPLE1(fabs) SM_APPLE1(trunc) SM_APPLE1(tanpi) SM_APPLE1(tanh) SM_APPLE1(tan) SM_APPLE1(sqrt)
SM_APPLE1(sinpi) SM_APPLE1(sinh) SM_APPLE1(sin) SM_APPLE1(rsqrt) SM_APPLE1(round) SM_APPLE1(rint)
SM_APPLE1(log2) SM_APPLE1(log10) SM_APPLE1(log) SM_APPLE1(fract) SM_APPLE1(floor) SM_APPLE1(exp2)
SM_APPLE1(exp10) SM_APPLE1(exp) SM_APPLE1(cospi) SM_APPLE1(cosh) SM_APPLE1(cos) SM_APPLE1(ceil)
SM_APPLE1(atanh) SM_APPLE1(atan) SM_APPLE1(asinh) SM_APPLE1(asin) SM_APPLE1(acosh) SM_APPLE1(acos)
SM_APPLE2(fmin) SM_APPLE2(fmax) SM_APPLE2(powr) SM_APPLE2(pow) SM_APPLE2(fmod) SM_APPLE2(divide)
SM_APPLE2(atan2) SM_APPLE2(nextafter)
SM_APPLE3(fmin3) SM_APPLE3(fmedian3) SM_APPLE3(fmax3) SM_APPLE3(fma)
SM_INLINE float __metal_ldexp(float a, int e, bool = true) { return metal::ldexp(a, e); }
SM_INLINE float __metal_frexp(float a, thread int *e, bool = true) { return metal::frexp(a, *e); }
SM_INLINE float __metal_frexp(float a, thread int &e, bool = true) { return metal::frexp(a, e); }
#define SM_APPLE_LANES(NAME) template <class T> SM_INLINE T __metal_simd_##NAME(T v) { return metal::simd_##NAME(v); }
#define SM_APPLE_SHUFFLE(NAME) \
    template <class T> SM_INLINE T __metal_simd_##NAME(T v, ushort d) { return metal::simd_##NAME(v, d); }
SM_APPLE_LANES(sum) SM_APPLE_LANES(product) SM_APPLE_LANES(min) SM_APPLE_LANES(max)
template <class T> SM_INLINE T __metal_simd_xor(T v) {
    typedef typename sm_bits<sizeof(T)>::type B;
    return __builtin_bit_cast(T, metal::simd_xor(__builtin_bit_cast(B, v)));
}
SM_APPLE_LANES(prefix_inclusive_sum) SM_APPLE_LANES(prefix_exclusive_sum)
SM_APPLE_LANES(prefix_inclusive_product) SM_APPLE_LANES(prefix_exclusive_product)
SM_APPLE_SHUFFLE(broadcast) SM_APPLE_SHUFFLE(shuffle) SM_APPLE_SHUFFLE(shuffle_xor) SM_APPLE_SHUFFLE(shuffle_up)
SM_APPLE_SHUFFLE(shuffle_down) SM_APPLE_SHUFFLE(shuffle_rotate_up) SM_APPLE_SHUFFLE(shuffle_rotate_down)
template <class T> SM_INLINE T __metal_simd_shuffle_and_fill_up(T v, T fill, ushort d, ushort modulo) {
    return metal::simd_shuffle_and_fill_up(v, fill, d, modulo); }
template <class T> SM_INLINE T __metal_simd_shuffle_and_fill_down(T v, T fill, ushort d, ushort modulo) {
    return metal::simd_shuffle_and_fill_down(v, fill, d, modulo); }
SM_INLINE ushort __metal_get_simdgroup_size(ushort) { return 32; }
SM_INLINE ushort __metal_get_thread_index_in_simdgroup(ushort) { return (ushort)sm_lane_index(); }
template <class T> struct vec_elements { enum { value = sm_traits<T>::count }; };
template <class T> struct __is_valid_simdgroup_type { enum { value = sm_traits<T>::count > 0 && !sm_same<T, bool>::value }; };
#define __METAL_MAYBE_FAST_MATH__ true
#define __METAL_FAST_MATH__ true
#define __METAL_PRECISE_MATH__ false
#define __METAL_MEMORY_SCOPE_SYSTEM__ 0

// Scalars, vectors, packed vectors, constructors and conversions.
//
// Vectors are clang's ext_vector_type: swizzles, also as lvalues, come with them. What clang lacks is added by
// the source rewriter (softmetal/source.py): `float4(...)` becomes `sm_make<float4>(...)`, and a cast
// `(float4)x` becomes `sm_caster<float4>{} ->* x`, an operator that binds as tightly as a cast.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma OPENCL EXTENSION __cl_clang_function_pointers : enable
#pragma clang diagnostic ignored "-Wduplicate-decl-specifier"

#define SM_INLINE __attribute__((always_inline, nodebug)) inline
#define device __attribute__((opencl_global_device))
#define constant const __global
#define threadgroup __local
#define thread __private
#define device_method __global

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __bf16 bfloat;
typedef char int8_t;
typedef uchar uint8_t;
typedef short int16_t;
typedef ushort uint16_t;
typedef int int32_t;
typedef uint uint32_t;
typedef long int64_t;
typedef ulong uint64_t;
typedef ulong size_t;
typedef long ptrdiff_t;
typedef long intptr_t;
typedef ulong uintptr_t;

template <class T, int N> using sm_vec = T __attribute__((ext_vector_type(N)));
template <class T, class U> struct sm_same { enum { value = 0 }; };
template <class T> struct sm_same<T, T> { enum { value = 1 }; };
template <bool B, class T = void> struct sm_if {};
template <class T> struct sm_if<true, T> { typedef T type; };

#define SM_VECTORS(T) \
    typedef T T##2 __attribute__((ext_vector_type(2))); \
    typedef T T##3 __attribute__((ext_vector_type(3))); \
    typedef T T##4 __attribute__((ext_vector_type(4)));
SM_VECTORS(char)
SM_VECTORS(uchar)
SM_VECTORS(short)
SM_VECTORS(ushort)
SM_VECTORS(int)
SM_VECTORS(uint)
SM_VECTORS(long)
SM_VECTORS(ulong)
SM_VECTORS(half)
SM_VECTORS(float)
SM_VECTORS(bfloat)

// ------------------------------------------------------------------------------- what a type is made of
template <class T> struct sm_traits { typedef T element; enum { count = 0 }; };   // a struct, or a scalar:
#define SM_SCALAR(T) template <> struct sm_traits<T> { typedef T element; enum { count = 1 }; };
SM_SCALAR(bool) SM_SCALAR(char) SM_SCALAR(signed char) SM_SCALAR(uchar) SM_SCALAR(short) SM_SCALAR(ushort)
SM_SCALAR(int) SM_SCALAR(uint) SM_SCALAR(long) SM_SCALAR(ulong) SM_SCALAR(half) SM_SCALAR(float) SM_SCALAR(bfloat)
template <class T, int N> struct sm_traits<sm_vec<T, N>> {
    typedef T element;
    enum { count = N };
};
template <class T> struct sm_is_float { enum { value = 0 }; };
template <> struct sm_is_float<float> { enum { value = 1 }; };
template <> struct sm_is_float<half> { enum { value = 1 }; };
template <> struct sm_is_float<bfloat> { enum { value = 1 }; };
template <class T> struct sm_is_scalar { enum { value = sm_traits<T>::count == 1 }; };

// Comparisons of vectors give vectors of integers; a boolN is what a program keeps them in.
#define SM_BOOL(N, FIELDS) \
    struct bool##N { \
        bool FIELDS; \
        bool##N() = default; \
        SM_INLINE bool##N(bool b) { for (int i = 0; i < N; i++) (*this)[i] = b; } \
        template <class... A> SM_INLINE bool##N(bool a, bool b, A... c) { \
            bool all[] = {a, b, (bool)c...}; for (int i = 0; i < N; i++) (*this)[i] = all[i]; } \
        template <class E> SM_INLINE bool##N(sm_vec<E, N> v) { \
            for (int i = 0; i < N; i++) (*this)[i] = v[i] != 0; } \
        SM_INLINE bool operator[](uint i) const { return (&x)[i]; } \
        SM_INLINE bool &operator[](uint i) { return (&x)[i]; } \
        friend SM_INLINE bool##N operator!(bool##N a) { for (int i = 0; i < N; i++) a[i] = !a[i]; return a; } \
        friend SM_INLINE bool##N operator~(bool##N a) { return !a; } \
        SM_BOOL_OP(N, &&, &) SM_BOOL_OP(N, ||, |) SM_BOOL_OP(N, &, &) SM_BOOL_OP(N, |, |) SM_BOOL_OP(N, ^, ^) \
        SM_BOOL_OP(N, ==, ==) SM_BOOL_OP(N, !=, !=) \
    }; \
    template <> struct sm_traits<bool##N> { typedef bool element; enum { count = N }; };
#define SM_BOOL_OP(N, OP, ELEMENT) \
    friend SM_INLINE bool##N operator OP(bool##N a, bool##N b) { \
        for (int i = 0; i < N; i++) a[i] = a[i] ELEMENT b[i]; return a; }
#define SM_XY x, y
#define SM_XYZ x, y, z
#define SM_XYZW x, y, z, w
SM_BOOL(2, SM_XY)
SM_BOOL(3, SM_XYZ)
SM_BOOL(4, SM_XYZW)

// --------------------------------------------------------------------------------------------- conversion
template <class To, class From> struct sm_convert {          // one value to another type
    static constexpr SM_INLINE To to(From v) {
        if constexpr (sm_same<To, From>::value) return v;
        else if constexpr (sm_traits<To>::count > 1 && sm_traits<From>::count == sm_traits<To>::count) {
            To r = {};
            for (int i = 0; i < (int)sm_traits<To>::count; i++)
                r[i] = sm_convert<typename sm_traits<To>::element, typename sm_traits<From>::element>::to(v[i]);
            return r;
        } else if constexpr (sm_is_float<To>::value && sm_is_float<From>::value) return (To)(float)v;   // half to bfloat
        else return (To)v;
    }
};
template <class V, class A> SM_INLINE void sm_append(thread V &v, thread int &at, A a) {
    typedef typename sm_traits<V>::element E;
    if constexpr (sm_traits<A>::count > 1)
        for (int i = 0; i < (int)sm_traits<A>::count; i++) v[at++] = (E)a[i];
    else v[at++] = (E)a;
}

template <class T> SM_INLINE constexpr T sm_make() { return T(); }
template <class T, class A> SM_INLINE constexpr T sm_make(A a) {
    if constexpr (sm_traits<T>::count > 1 && sm_traits<A>::count == 1) return T((typename sm_traits<T>::element)a);
    else return sm_convert<T, A>::to(a);
}
template <class... A> struct sm_all_scalars;
template <> struct sm_all_scalars<> { enum { value = 1 }; };
template <class A, class... B> struct sm_all_scalars<A, B...> {
    enum { value = sm_is_scalar<A>::value && sm_all_scalars<B...>::value };
};
template <class T, class A, class B, class... C> SM_INLINE constexpr T sm_make(A a, B b, C... c) {
    typedef typename sm_traits<T>::element E;
    if constexpr (sm_traits<T>::count <= 1 && __is_aggregate(T)) return T{a, b, c...};
    else if constexpr (sm_traits<T>::count <= 1) return T(a, b, c...);
    else if constexpr (sm_all_scalars<A, B, C...>::value && !sm_same<E, bool>::value) {
        static_assert(sizeof...(C) + 2 == sm_traits<T>::count, "wrong number of elements for this vector type");
        return T{(E)a, (E)b, (E)c...};
    } else {
        T r;
        int at = 0;
        sm_append(r, at, a);
        sm_append(r, at, b);
        (sm_append(r, at, c), ...);
        return r;
    }
}

template <class T, class... A> SM_INLINE T sm_fill(A... a) {        // `float4 v = {x, y};`
    T r = T((typename sm_traits<T>::element)0);
    int at = 0;
    (sm_append(r, at, a), ...);
    return r;
}
// An argument `{x, y}`: becomes whatever the parameter is.
template <class... A> struct sm_braces;
template <class A> struct sm_braces<A> { A a; template <class T> SM_INLINE operator T() const { return sm_make<T>(a); } };
template <class A, class B> struct sm_braces<A, B> {
    A a; B b;
    template <class T> SM_INLINE operator T() const { return sm_make<T>(a, b); } };
template <class A, class B, class C> struct sm_braces<A, B, C> {
    A a; B b; C c;
    template <class T> SM_INLINE operator T() const { return sm_make<T>(a, b, c); } };
template <class A, class B, class C, class D> struct sm_braces<A, B, C, D> {
    A a; B b; C c; D d;
    template <class T> SM_INLINE operator T() const { return sm_make<T>(a, b, c, d); } };
template <class... A> SM_INLINE sm_braces<A...> sm_list(A... a) { return {a...}; }

template <class T> SM_INLINE constexpr T sm_mask(T v) {           // of a comparison: 1 where it holds
    if constexpr (sm_traits<T>::count > 1 && !sm_same<typename sm_traits<T>::element, bool>::value) return -v;
    else return v;
}
template <class V, class S> SM_INLINE constexpr typename sm_traits<V>::element sm_fit(S v) {   // mixed.py
    return (typename sm_traits<V>::element)v;
}
template <class T> SM_INLINE constexpr T sm_copy(T v) { return v; }

template <class T> struct sm_caster {};
template <class T, class A> SM_INLINE constexpr T operator->*(sm_caster<T>, A a) { return sm_make<T>(a); }

template <class To, class From> SM_INLINE To as_type(From v) {
    static_assert(sizeof(To) == sizeof(From), "as_type between types of different size");
    return __builtin_bit_cast(To, v);
}

// --------------------------------------------------------------------------------- packed vectors, no padding
template <class T, int N, int... AT> struct sm_swizzle {        // `.xz` of one
    T all[N];
    SM_INLINE operator sm_vec<T, sizeof...(AT)>() const { return sm_vec<T, sizeof...(AT)>{all[AT]...}; }
    SM_INLINE void operator=(sm_vec<T, sizeof...(AT)> v) { int i = 0; ((all[AT] = v[i++]), ...); }
#define SM_SWIZZLE_OP(OP) \
    friend SM_INLINE sm_vec<T, sizeof...(AT)> operator OP(sm_swizzle a, sm_vec<T, sizeof...(AT)> b) { \
        return (sm_vec<T, sizeof...(AT)>)a OP b; } \
    friend SM_INLINE sm_vec<T, sizeof...(AT)> operator OP(sm_vec<T, sizeof...(AT)> a, sm_swizzle b) { \
        return a OP (sm_vec<T, sizeof...(AT)>)b; } \
    friend SM_INLINE sm_vec<T, sizeof...(AT)> operator OP(sm_swizzle a, T b) { return (sm_vec<T, sizeof...(AT)>)a OP b; } \
    friend SM_INLINE sm_vec<T, sizeof...(AT)> operator OP(T a, sm_swizzle b) { return a OP (sm_vec<T, sizeof...(AT)>)b; } \
    friend SM_INLINE sm_vec<T, sizeof...(AT)> operator OP(sm_swizzle a, sm_swizzle b) { \
        return (sm_vec<T, sizeof...(AT)>)a OP (sm_vec<T, sizeof...(AT)>)b; }
    SM_SWIZZLE_OP(+) SM_SWIZZLE_OP(-) SM_SWIZZLE_OP(*) SM_SWIZZLE_OP(/)
};
template <class T, int N> struct sm_elements;
template <class T> struct sm_elements<T, 2> {
    union { T e[2]; struct { T x, y; }; struct { T r, g; }; sm_swizzle<T, 2, 0, 1> xy; sm_swizzle<T, 2, 1, 0> yx; };
};
template <class T> struct sm_elements<T, 3> {
    union {
        T e[3]; struct { T x, y, z; }; struct { T r, g, b; };
        sm_swizzle<T, 3, 0, 1> xy, rg; sm_swizzle<T, 3, 1, 2> yz; sm_swizzle<T, 3, 0, 2> xz;
        sm_swizzle<T, 3, 0, 1, 2> xyz, rgb; sm_swizzle<T, 3, 2, 1, 0> zyx, bgr;
    };
};
template <class T> struct sm_elements<T, 4> {
    union {
        T e[4]; struct { T x, y, z, w; }; struct { T r, g, b, a; };
        sm_swizzle<T, 4, 0, 1> xy, rg; sm_swizzle<T, 4, 2, 3> zw, ba; sm_swizzle<T, 4, 0, 2> xz; sm_swizzle<T, 4, 1, 3> yw;
        sm_swizzle<T, 4, 0, 1, 2> xyz, rgb; sm_swizzle<T, 4, 1, 2, 3> yzw; sm_swizzle<T, 4, 0, 1, 2, 3> xyzw, rgba;
    };
};
template <class T, int N> struct sm_packed : sm_elements<T, N> {
    using sm_elements<T, N>::e;
    sm_packed() = default;
    constexpr SM_INLINE sm_packed(T v) { for (int i = 0; i < N; i++) e[i] = v; }
    template <class... A> constexpr SM_INLINE sm_packed(T a, T b, A... c) : sm_elements<T, N>{{{a, b, (T)c...}}} {}
    SM_INLINE sm_packed(sm_vec<T, N> v) { for (int i = 0; i < N; i++) e[i] = v[i]; }
    SM_INLINE operator sm_vec<T, N>() const {
        sm_vec<T, N> v;
        for (int i = 0; i < N; i++) v[i] = e[i];
        return v;
    }
    SM_INLINE T operator[](uint i) const { return e[i]; }
    SM_INLINE T &operator[](uint i) { return e[i]; }
    SM_INLINE device T &operator[](uint i) device_method { return ((device T *)e)[i]; }
#define SM_PACKED_SET(OP) \
    template <class A> SM_INLINE sm_packed &operator OP##=(A a) { \
        *this = sm_packed((sm_vec<T, N>)*this OP sm_operand(a)); return *this; }
    template <class A> static SM_INLINE A sm_operand(A a) { return a; }
    static SM_INLINE sm_vec<T, N> sm_operand(sm_packed a) { return a; }
    SM_PACKED_SET(+) SM_PACKED_SET(-) SM_PACKED_SET(*) SM_PACKED_SET(/)
#define SM_PACKED_OP(OP) \
    friend SM_INLINE sm_vec<T, N> operator OP(sm_packed a, sm_packed b) { \
        return (sm_vec<T, N>)a OP (sm_vec<T, N>)b; } \
    friend SM_INLINE sm_vec<T, N> operator OP(sm_packed a, sm_vec<T, N> b) { return (sm_vec<T, N>)a OP b; } \
    friend SM_INLINE sm_vec<T, N> operator OP(sm_vec<T, N> a, sm_packed b) { return a OP (sm_vec<T, N>)b; } \
    friend SM_INLINE sm_vec<T, N> operator OP(sm_packed a, T b) { return (sm_vec<T, N>)a OP b; } \
    friend SM_INLINE sm_vec<T, N> operator OP(T a, sm_packed b) { return a OP (sm_vec<T, N>)b; }
    SM_PACKED_OP(+) SM_PACKED_OP(-) SM_PACKED_OP(*) SM_PACKED_OP(/)
#define SM_PACKED_INTO(OP) \
    friend SM_INLINE thread sm_vec<T, N> &operator OP##=(thread sm_vec<T, N> &a, sm_packed b) { \
        a = a OP (sm_vec<T, N>)b; return a; }
    SM_PACKED_INTO(+) SM_PACKED_INTO(-) SM_PACKED_INTO(*) SM_PACKED_INTO(/)
};
template <class T, int N> struct sm_traits<sm_packed<T, N>> { typedef T element; enum { count = N }; };

#define SM_PACKED(T) \
    typedef sm_packed<T, 2> packed_##T##2; \
    typedef sm_packed<T, 3> packed_##T##3; \
    typedef sm_packed<T, 4> packed_##T##4;
SM_PACKED(char) SM_PACKED(uchar) SM_PACKED(short) SM_PACKED(ushort) SM_PACKED(int) SM_PACKED(uint)
SM_PACKED(long) SM_PACKED(ulong) SM_PACKED(half) SM_PACKED(float) SM_PACKED(bfloat)

namespace metal {
template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));
template <class T, size_t N> struct array {
    T __elems_[N];
    SM_INLINE T operator[](size_t i) const { return __elems_[i]; }
    SM_INLINE T &operator[](size_t i) { return __elems_[i]; }
    static constexpr size_t size() { return N; }
};
template <class T, int N> struct sm_vector_of { typedef vec<T, N> type; };
template <> struct sm_vector_of<bool, 1> { typedef array<bool, 1> type; };
template <> struct sm_vector_of<bool, 2> { typedef bool2 type; };
template <> struct sm_vector_of<bool, 3> { typedef bool3 type; };
template <> struct sm_vector_of<bool, 4> { typedef bool4 type; };
template <class T, int N> using sm_vector = typename sm_vector_of<T, N>::type;   // vectors.py
template <class T, int N> using packed_vec = sm_packed<T, N>;
template <class T, class U> constexpr bool is_same_v = sm_same<T, U>::value;
template <class T, class U> struct is_same { static constexpr constant bool value = sm_same<T, U>::value; };
template <class T> constexpr bool is_floating_point_v = sm_is_float<T>::value;
template <class T> struct is_floating_point { static constexpr constant bool value = sm_is_float<T>::value; };
template <class T> constexpr bool is_integral_v = sm_traits<T>::count == 1 && !sm_is_float<T>::value;
template <class T> struct is_integral { static constexpr constant bool value = is_integral_v<T>; };
template <class T> constexpr bool is_scalar_v = sm_traits<T>::count == 1;
template <class T> constexpr bool is_signed_v = (T)-1 < (T)0;
template <class T> constexpr bool is_unsigned_v = !is_signed_v<T>;
template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { typedef T type; };
template <bool B, class T = void> using enable_if_t = typename enable_if<B, T>::type;
template <bool B, class T, class F> struct conditional { typedef T type; };
template <class T, class F> struct conditional<false, T, F> { typedef F type; };
template <bool B, class T, class F> using conditional_t = typename conditional<B, T, F>::type;
template <class T> struct make_scalar { typedef typename sm_traits<T>::element type; };
template <class T> using make_scalar_t = typename make_scalar<T>::type;
template <class A, class B> constexpr bool is_convertible_v = __is_convertible(A, B);
template <class A, class B> struct is_convertible { static constexpr constant bool value = __is_convertible(A, B); };
template <class A, class B> constexpr bool is_base_of_v = __is_base_of(A, B);
template <class A, class... B> constexpr bool is_constructible_v = __is_constructible(A, B...);
template <class T> constexpr bool is_arithmetic_v = sm_traits<T>::count == 1;
template <class T> struct is_arithmetic { static constexpr constant bool value = is_arithmetic_v<T>; };
template <class T> constexpr bool is_vector_v = (sm_traits<T>::count > 1);
template <class T> struct is_vector { static constexpr constant bool value = is_vector_v<T>; };
template <class T> constexpr bool is_enum_v = __is_enum(T);
template <class T> constexpr bool is_class_v = __is_class(T);
template <class T> constexpr bool is_pointer_v = __is_pointer(T);
template <class T> constexpr bool is_const_v = __is_const(T);
template <class T> constexpr bool is_void_v = __is_void(T);
template <class T> constexpr bool is_empty_v = __is_empty(T);
template <class T> struct is_signed { static constexpr constant bool value = is_signed_v<T>; };
template <class T> struct is_unsigned { static constexpr constant bool value = is_unsigned_v<T>; };
template <class T> using make_unsigned_t = __make_unsigned(T);
template <class T> using make_signed_t = __make_signed(T);
template <class T> struct make_unsigned { typedef __make_unsigned(T) type; };
template <class T> struct make_signed { typedef __make_signed(T) type; };
template <class T> using underlying_type_t = __underlying_type(T);
template <class T> using decay_t = __decay(T);
template <class T> struct decay { typedef __decay(T) type; };
template <class... B> constexpr bool disjunction_v = (B::value || ...);
template <class... B> constexpr bool conjunction_v = (B::value && ...);
template <class... B> struct disjunction { static constexpr constant bool value = (B::value || ...); };
template <class... B> struct conjunction { static constexpr constant bool value = (B::value && ...); };
template <class B> struct negation { static constexpr constant bool value = !B::value; };
template <class... B> using _disjunction = disjunction<B...>;
template <class... B> using _conjunction = conjunction<B...>;
template <class T> using uniform = T;
template <class T> SM_INLINE constexpr T make_uniform(T v) { return v; }
template <class T> struct remove_addrspace { typedef T type; };
template <class T> struct remove_addrspace<device T> { typedef T type; };
template <class T> struct remove_addrspace<__global T> { typedef T type; };
template <class T> struct remove_addrspace<threadgroup T> { typedef T type; };
template <class T> struct remove_addrspace<thread T> { typedef T type; };
template <class T> using remove_addrspace_t = typename remove_addrspace<T>::type;
template <class T> struct remove_reference { typedef T type; };
template <class T> struct remove_reference<T &> { typedef T type; };
template <class T> using remove_reference_t = typename remove_reference<T>::type;
template <class T> struct remove_cv { typedef T type; };
template <class T> struct remove_cv<const T> { typedef T type; };
template <class T> using remove_cv_t = typename remove_cv<T>::type;
template <class T, T V> struct integral_constant {
    static constexpr constant T value = V;
    using value_type = T;
    using type = integral_constant;
    constexpr operator T() const { return V; }
};
template <bool B> using bool_constant = integral_constant<bool, B>;
typedef bool_constant<true> true_type;
typedef bool_constant<false> false_type;
using ::as_type;

struct os_log {        // messages of kernels go nowhere
    template <class A, class B> constexpr os_log(A, B) {}
    template <class F, class... A> SM_INLINE void log(F, A...) const {}
    template <class F, class... A> SM_INLINE void log_debug(F, A...) const {}
    template <class F, class... A> SM_INLINE void log_info(F, A...) const {}
    template <class F, class... A> SM_INLINE void log_error(F, A...) const {}
    template <class F, class... A> SM_INLINE void log_fault(F, A...) const {}
};
}

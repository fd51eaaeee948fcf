// Atomics: the processor's own, since threadgroups run on several cores. All are sequentially consistent,
// whatever order is asked for.
template <int BYTES> struct sm_bits;
template <> struct sm_bits<1> { typedef uchar type; };
template <> struct sm_bits<2> { typedef ushort type; };
template <> struct sm_bits<4> { typedef uint type; };
template <> struct sm_bits<8> { typedef ulong type; };

namespace metal {
enum memory_order { memory_order_relaxed = 0, memory_order_acquire = 2, memory_order_release = 3,
                    memory_order_acq_rel = 4, memory_order_seq_cst = 5 };
enum thread_scope { thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup, thread_scope_device };
template <class T> struct _atomic { T value; };
template <class T> using atomic = _atomic<T>;
template <class T> struct sm_self_type { typedef T type; };   // keeps an argument out of deduction
#define SM_ATOMICS(SPACE) \
    template <class T> SM_INLINE T atomic_load_explicit(const volatile SPACE _atomic<T> *p, memory_order) { \
        typedef typename sm_bits<sizeof(T)>::type B; \
        return __builtin_bit_cast(T, __atomic_load_n((SPACE B *)p, 5)); } \
    template <class T> SM_INLINE void atomic_store_explicit(volatile SPACE _atomic<T> *p, typename sm_self_type<T>::type v, memory_order) { \
        typedef typename sm_bits<sizeof(T)>::type B; \
        __atomic_store_n((SPACE B *)p, __builtin_bit_cast(B, v), 5); } \
    template <class T> SM_INLINE T atomic_exchange_explicit(volatile SPACE _atomic<T> *p, typename sm_self_type<T>::type v, memory_order) { \
        typedef typename sm_bits<sizeof(T)>::type B; \
        return __builtin_bit_cast(T, __atomic_exchange_n((SPACE B *)p, __builtin_bit_cast(B, v), 5)); } \
    template <class T> SM_INLINE bool atomic_compare_exchange_weak_explicit(volatile SPACE _atomic<T> *p, \
            thread T *expected, typename sm_self_type<T>::type v, memory_order, memory_order) { \
        typedef typename sm_bits<sizeof(T)>::type B; \
        B seen = __builtin_bit_cast(B, *expected); \
        bool done = __atomic_compare_exchange_n((SPACE B *)p, &seen, __builtin_bit_cast(B, v), 0, 5, 5); \
        *expected = __builtin_bit_cast(T, seen); \
        return done; } \
    SM_ATOMIC_INT(SPACE, add, old + v) SM_ATOMIC_INT(SPACE, sub, old - v) SM_ATOMIC_INT(SPACE, and, old & v) \
    SM_ATOMIC_INT(SPACE, or, old | v) SM_ATOMIC_INT(SPACE, xor, old ^ v) \
    SM_ATOMIC_OP(SPACE, min, metal::min(old, v)) SM_ATOMIC_OP(SPACE, max, metal::max(old, v))
#define SM_ATOMIC_OP(SPACE, NAME, EXPRESSION) \
    template <class T> SM_INLINE T atomic_fetch_##NAME##_explicit(volatile SPACE _atomic<T> *p, typename sm_self_type<T>::type v, memory_order o) { \
        T old = atomic_load_explicit(p, o), to; \
        do to = (T)(EXPRESSION); while (!atomic_compare_exchange_weak_explicit(p, &old, to, o, o)); \
        return old; }
#define SM_ATOMIC_INT(SPACE, NAME, EXPRESSION) \
    template <class T> SM_INLINE T atomic_fetch_##NAME##_explicit(volatile SPACE _atomic<T> *p, typename sm_self_type<T>::type v, memory_order o) { \
        if constexpr (!sm_is_float<T>::value) return __atomic_fetch_##NAME((SPACE T *)p, v, 5); \
        else { \
            T old = atomic_load_explicit(p, o), to; \
            do to = (T)(EXPRESSION); while (!atomic_compare_exchange_weak_explicit(p, &old, to, o, o)); \
            return old; \
        } }
SM_ATOMICS(device)
SM_ATOMICS(threadgroup)
SM_INLINE void atomic_thread_fence(mem_flags, memory_order) {}
SM_INLINE void atomic_thread_fence(mem_flags, memory_order, thread_scope) {}
}
// clang has types of these names for OpenCL
#define atomic_int sm_atomic_int
#define atomic_uint sm_atomic_uint
#define atomic_bool sm_atomic_bool
#define atomic_float sm_atomic_float
#define atomic_ulong sm_atomic_ulong
typedef metal::_atomic<int> atomic_int;
typedef metal::_atomic<uint> atomic_uint;
typedef metal::_atomic<bool> atomic_bool;
typedef metal::_atomic<float> atomic_float;
typedef metal::_atomic<ulong> atomic_ulong;
namespace metal { using ::atomic_int; using ::atomic_uint; using ::atomic_bool; using ::atomic_float; using ::atomic_ulong; }

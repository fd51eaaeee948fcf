// Operations of a simdgroup: each lane hands its value over (sm_exchangeN, in the runtime) and gets a record
// with the values of all lanes that take part; the first lane to go on computes what all of them need.
extern "C" {
void sm_exchange1(uchar);
void sm_exchange2(ushort);
void sm_exchange4(uint);
void sm_exchange8(ulong);
void sm_exchange16(const void *);
void sm_exchange32(const void *);
void sm_fence(uint);
void sm_barrier(uint);
void sm_count_matrix(void);
}

SM_INLINE uint sm_lane_index() {
    ulong at = (ulong)__builtin_frame_address(0);
    return (uint)(at >> SM_STACK_BITS) & 31;
}
template <class T> SM_INLINE sm_phase *sm_exchange(T v) {
    if constexpr (sizeof(T) == 1) sm_exchange1(__builtin_bit_cast(uchar, v));
    else if constexpr (sizeof(T) == 2) sm_exchange2(__builtin_bit_cast(ushort, v));
    else if constexpr (sizeof(T) == 4) sm_exchange4(__builtin_bit_cast(uint, v));
    else if constexpr (sizeof(T) == 8) sm_exchange8(__builtin_bit_cast(ulong, v));
    else if constexpr (sizeof(T) == 16) sm_exchange16(&v);
    else sm_exchange32(&v);
    ulong at = (ulong)__builtin_frame_address(0);
    sm_simd *s = (sm_simd *)((at & ~((1ul << SM_ARENA_BITS) - 1)) + SM_SIMD_AT) + (at >> (SM_STACK_BITS + 5) & 31);
    return &s->phase[s->parity ^ 1];
}
template <class T> SM_INLINE T *sm_values(sm_phase *p) { return (T *)p->slots; }

template <class T> SM_INLINE T sm_map2_add(T a, T b) { return a + b; }

namespace metal {
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4,
                       mem_threadgroup_imageblock = 8, mem_object_data = 16 };
SM_INLINE mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((int)a | (int)b); }
SM_INLINE void threadgroup_barrier(mem_flags f) { sm_barrier((uint)f); }
SM_INLINE void simdgroup_barrier(mem_flags f) {
    sm_exchange4(0);
#ifdef SM_INSTRUMENTED
    sm_fence((uint)f);
#endif
}
}
namespace metal {
template <class T> SM_INLINE T simd_sum(T v) {
    sm_phase *p = sm_exchange(v);
    if (!p->done) {
        T r = 0;
        for (int i = 0; i < 32; i++) if (p->mask >> i & 1) r += sm_values<T>(p)[i];
        *(T *)p->result = r;
        p->done = 1;
    }
    return *(T *)p->result;
}
}

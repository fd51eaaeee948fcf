// Operations of a simdgroup: each lane hands its value over (sm_exchangeN, in the runtime) and gets a record
// with the values of all lanes that take part; the first lane to go on computes what all of them need.
extern "C" {
#define SM_MEETS __attribute__((preserve_none)) void
SM_MEETS sm_exchange1(uint);
SM_MEETS sm_exchange2(uint);
SM_MEETS sm_exchange4(uint);
SM_MEETS sm_exchange8(ulong);
SM_MEETS sm_exchange16(const void *);
SM_MEETS sm_exchange32(const void *);
SM_MEETS sm_join(void);
SM_MEETS sm_barrier(uint);
void sm_fence(uint);
void sm_count_matrix(void);
}

SM_INLINE uint sm_lane_index() {
    ulong at = (ulong)__builtin_frame_address(0);
    return (uint)(at >> SM_STACK_BITS) & 31;
}
template <class T> struct sm_padded { T value; char pad[(sizeof(T) > 16 ? 32 : 16) - sizeof(T)]; };
template <class T> SM_INLINE sm_phase *sm_exchange(T v) {
    if constexpr (sizeof(T) == 1) sm_exchange1(__builtin_bit_cast(uchar, v));
    else if constexpr (sizeof(T) == 2) sm_exchange2(__builtin_bit_cast(ushort, v));
    else if constexpr (sizeof(T) == 4) sm_exchange4(__builtin_bit_cast(uint, v));
    else if constexpr (sizeof(T) == 8) sm_exchange8(__builtin_bit_cast(ulong, v));
    else if constexpr (sizeof(T) == 16) sm_exchange16(&v);
    else {
        static_assert(sizeof(T) == 32, "a value that cannot be exchanged between lanes");
        sm_exchange32(&v);
    }
    ulong at = (ulong)__builtin_frame_address(0);
    sm_simd *s = (sm_simd *)((at & ~((1ul << SM_ARENA_BITS) - 1)) + SM_SIMD_AT) + (at >> (SM_STACK_BITS + 5) & 31);
    return s->current;
}
template <class T> SM_INLINE T sm_value(sm_phase *p, uint lane) { return ((T *)p->slots)[lane]; }
template <class T> struct sm_two { T a, b; };

// The type to accumulate in, and the operations
template <class T> struct sm_wide { typedef T type; };
template <> struct sm_wide<half> { typedef float type; };
template <> struct sm_wide<bfloat> { typedef float type; };
#define SM_OPERATION(NAME, IDENTITY, EXPRESSION) \
    struct sm_op_##NAME { \
        template <class T> static SM_INLINE T identity() { typedef typename sm_traits<T>::element E; return T((E)(IDENTITY)); } \
        template <class T> static SM_INLINE T apply(T a, T b) { return EXPRESSION; } };
SM_OPERATION(sum, 0, a + b)
SM_OPERATION(product, 1, a * b)
SM_OPERATION(and, ~(E)0, a & b)
SM_OPERATION(or, 0, a | b)
SM_OPERATION(xor, 0, a ^ b)
template <class E, bool F> struct sm_extremes;
template <class E> struct sm_extremes<E, true> {
    static E low() { return (E)-__builtin_inff(); }
    static E high() { return (E)__builtin_inff(); }
};
template <class E> struct sm_extremes<E, false> {
    static E low() { return metal::numeric_limits<E>::min(); }
    static E high() { return metal::numeric_limits<E>::max(); }
};
#define SM_LOW sm_extremes<E, sm_is_float<E>::value>::low()
#define SM_HIGH sm_extremes<E, sm_is_float<E>::value>::high()
SM_OPERATION(max, SM_LOW, metal::max(a, b))
SM_OPERATION(min, SM_HIGH, metal::min(a, b))

// A fixed tree, so that sums do not depend on the order of the lanes.
template <class OP, class T> __attribute__((noinline, nodebug, no_sanitize("thread"))) void sm_reduce(sm_phase *p) {
    typedef typename sm_wide<T>::type W;
    W t[32];
    for (int i = 0; i < 32; i++) t[i] = (W)((T *)p->slots)[i];
    if (p->mask != ~0u)
        for (int i = 0; i < 32; i++) if (!(p->mask >> i & 1)) t[i] = OP::template identity<W>();
    for (int i = 0; i < 16; i++) t[i] = OP::template apply<W>(t[i], t[i + 16]);
    for (int i = 0; i < 8; i++) t[i] = OP::template apply<W>(t[i], t[i + 8]);
    for (int i = 0; i < 4; i++) t[i] = OP::template apply<W>(t[i], t[i + 4]);
    for (int i = 0; i < 2; i++) t[i] = OP::template apply<W>(t[i], t[i + 2]);
    *(T *)p->result = (T)OP::template apply<W>(t[0], t[1]);
    p->done = 1;
}
template <class OP, class T> SM_INLINE T sm_simd_reduce(T v) {
    sm_phase *p = sm_exchange(v);
    if (!p->done) sm_reduce<OP, T>(p);
    return *(T *)p->result;
}
template <class OP, class T> SM_INLINE T sm_simd_prefix(T v, bool inclusive) {
    typedef typename sm_wide<T>::type W;
    sm_phase *p = sm_exchange(v);
    W r = OP::template identity<W>();
    uint lane = sm_lane_index();
    for (uint i = 0; i < lane + inclusive; i++)
        if (p->mask >> i & 1) r = OP::template apply<W>(r, (W)sm_value<T>(p, i));
    return (T)r;
}
template <class OP, class T> SM_INLINE T sm_quad_reduce(T v) {
    typedef typename sm_wide<T>::type W;
    sm_phase *p = sm_exchange(v);
    W r = OP::template identity<W>();
    uint base = sm_lane_index() & ~3u;
    for (uint i = base; i < base + 4; i++) if (p->mask >> i & 1) r = OP::template apply<W>(r, (W)sm_value<T>(p, i));
    return (T)r;
}
template <class OP, class T> SM_INLINE T sm_quad_prefix(T v, bool inclusive) {
    typedef typename sm_wide<T>::type W;
    sm_phase *p = sm_exchange(v);
    W r = OP::template identity<W>();
    uint lane = sm_lane_index();
    for (uint i = lane & ~3u; i < lane + inclusive; i++)
        if (p->mask >> i & 1) r = OP::template apply<W>(r, (W)sm_value<T>(p, i));
    return (T)r;
}

namespace metal {
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4,
                       mem_threadgroup_imageblock = 8, mem_object_data = 16 };
SM_INLINE constexpr mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((int)a | (int)b); }
SM_INLINE void threadgroup_barrier(mem_flags f) { sm_barrier((uint)f); }
SM_INLINE void simdgroup_barrier(mem_flags f) {
    sm_phase *p = sm_exchange(0u);
#ifdef SM_INSTRUMENTED
    if (!p->done) {
        p->done = 1;
        sm_fence((uint)f);
    }
#endif
}

#define SM_REDUCE(NAME) \
    template <class T> SM_INLINE T simd_##NAME(T v) { return sm_simd_reduce<sm_op_##NAME, T>(v); } \
    template <class T> SM_INLINE T quad_##NAME(T v) { return sm_quad_reduce<sm_op_##NAME, T>(v); }
SM_REDUCE(sum) SM_REDUCE(product) SM_REDUCE(min) SM_REDUCE(max) SM_REDUCE(and) SM_REDUCE(or) SM_REDUCE(xor)
#define SM_PREFIX(NAME) \
    template <class T> SM_INLINE T simd_prefix_inclusive_##NAME(T v) { return sm_simd_prefix<sm_op_##NAME, T>(v, true); } \
    template <class T> SM_INLINE T simd_prefix_exclusive_##NAME(T v) { return sm_simd_prefix<sm_op_##NAME, T>(v, false); } \
    template <class T> SM_INLINE T quad_prefix_inclusive_##NAME(T v) { return sm_quad_prefix<sm_op_##NAME, T>(v, true); } \
    template <class T> SM_INLINE T quad_prefix_exclusive_##NAME(T v) { return sm_quad_prefix<sm_op_##NAME, T>(v, false); }
SM_PREFIX(sum) SM_PREFIX(product)

// Shuffles. What comes from a lane outside the group, or one that takes no part, is the lane's own value.
#define SM_FROM(LANE, INSIDE) \
    sm_phase *p = sm_exchange(v); \
    uint lane = sm_lane_index(), from = (LANE); \
    return (INSIDE) && (p->mask >> (from & 31) & 1) ? sm_value<T>(p, from & 31) : v;
template <class T> SM_INLINE T simd_shuffle(T v, ushort source) { SM_FROM(source, (void(lane), from < 32)) }
template <class T> SM_INLINE T simd_broadcast(T v, ushort source) { SM_FROM(source, (void(lane), from < 32)) }
template <class T> SM_INLINE T simd_shuffle_xor(T v, ushort m) { SM_FROM(lane ^ m, from < 32) }
template <class T> SM_INLINE T simd_shuffle_up(T v, ushort d) { SM_FROM(lane - d, d <= lane) }
template <class T> SM_INLINE T simd_shuffle_down(T v, ushort d) { SM_FROM(lane + d, from < 32) }
template <class T> SM_INLINE T simd_shuffle_rotate_up(T v, ushort d) { SM_FROM((lane - d) & 31, true) }
template <class T> SM_INLINE T simd_shuffle_rotate_down(T v, ushort d) { SM_FROM((lane + d) & 31, true) }
template <class T> SM_INLINE T simd_broadcast_first(T v) {
    sm_phase *p = sm_exchange(v);
    return sm_value<T>(p, (uint)__builtin_ctz(p->mask));
}
template <class T> SM_INLINE T quad_shuffle(T v, ushort s) { SM_FROM((lane & ~3u) + (s & 3u), true) }
template <class T> SM_INLINE T quad_broadcast(T v, ushort s) { SM_FROM((lane & ~3u) + (s & 3u), true) }
template <class T> SM_INLINE T quad_shuffle_xor(T v, ushort m) { SM_FROM(lane ^ (m & 3u), true) }
template <class T> SM_INLINE T quad_shuffle_up(T v, ushort d) { SM_FROM(lane - d, d <= (lane & 3)) }
template <class T> SM_INLINE T quad_shuffle_down(T v, ushort d) { SM_FROM(lane + d, (lane & 3) + d < 4) }
template <class T> SM_INLINE T quad_shuffle_rotate_up(T v, ushort d) { SM_FROM((lane & ~3u) + ((lane - d) & 3), true) }
template <class T> SM_INLINE T quad_shuffle_rotate_down(T v, ushort d) { SM_FROM((lane & ~3u) + ((lane + d) & 3), true) }
template <class T> SM_INLINE T quad_broadcast_first(T v) {
    sm_phase *p = sm_exchange(v);
    uint base = sm_lane_index() & ~3u;
    return sm_value<T>(p, base + (uint)__builtin_ctz(p->mask >> base));
}
#define SM_FILL(GROUP, WIDTH) /* lanes that nothing reaches take the other operand of the lanes at the far end */ \
    template <class T> SM_INLINE T GROUP##_shuffle_and_fill_up(T v, T fill, ushort d, ushort modulo) { \
        T a = v, b = fill; \
        sm_phase *p = sm_exchange(sm_two<T>{a, b}); \
        uint lane = sm_lane_index(), base = lane / modulo * modulo, at = lane - base; \
        sm_two<T> x = sm_value<sm_two<T>>(p, base + (at + modulo - d % modulo) % modulo); \
        return at < d ? x.b : x.a; } \
    template <class T> SM_INLINE T GROUP##_shuffle_and_fill_down(T v, T fill, ushort d, ushort modulo) { \
        sm_phase *p = sm_exchange(sm_two<T>{v, fill}); \
        uint lane = sm_lane_index(), base = lane / modulo * modulo, at = lane - base; \
        sm_two<T> x = sm_value<sm_two<T>>(p, base + (at + d) % modulo); \
        return at + d >= modulo ? x.b : x.a; } \
    template <class T> SM_INLINE T GROUP##_shuffle_and_fill_up(T v, T fill, ushort d) { \
        return GROUP##_shuffle_and_fill_up(v, fill, d, (ushort)WIDTH); } \
    template <class T> SM_INLINE T GROUP##_shuffle_and_fill_down(T v, T fill, ushort d) { \
        return GROUP##_shuffle_and_fill_down(v, fill, d, (ushort)WIDTH); }
SM_FILL(simd, 32) SM_FILL(quad, 4)

// Votes
struct simd_vote {
    typedef ulong vote_t;
    vote_t bits;
    simd_vote() = default;
    explicit constexpr simd_vote(vote_t b) : bits(b) {}
    explicit constexpr operator vote_t() const { return bits; }
    bool all() const { return bits == 0xffffffff; }
    bool any() const { return bits != 0; }
};
struct quad_vote {
    typedef uint vote_t;
    vote_t bits;
    explicit constexpr quad_vote(vote_t b) : bits(b) {}
    explicit constexpr operator vote_t() const { return bits; }
    bool all() const { return bits == 15; }
    bool any() const { return bits != 0; }
};
SM_INLINE uint sm_ballot(bool b, thread uint &active) {
    sm_phase *p = sm_exchange(b);
    if (!p->done) {
        uint bits = 0;
        for (int i = 0; i < 32; i++) bits |= (uint)(p->slots[i] != 0) << i;
        *(uint *)p->result = bits & p->mask;
        p->done = 1;
    }
    active = p->mask;
    return *(uint *)p->result;
}
SM_INLINE simd_vote simd_ballot(bool b) { uint active; return simd_vote(sm_ballot(b, active)); }
SM_INLINE simd_vote simd_active_threads_mask() { uint active; sm_ballot(true, active); return simd_vote(active); }
SM_INLINE bool simd_all(bool b) { uint active, bits = sm_ballot(b, active); return bits == active; }
SM_INLINE bool simd_any(bool b) { uint active; return sm_ballot(b, active) != 0; }
SM_INLINE bool simd_is_first() { uint active; sm_ballot(true, active); return (uint)__builtin_ctz(active) == sm_lane_index(); }
SM_INLINE bool simd_is_helper_thread() { return false; }
SM_INLINE quad_vote quad_ballot(bool b) { uint a; return quad_vote(sm_ballot(b, a) >> (sm_lane_index() & ~3u) & 15); }
SM_INLINE quad_vote quad_active_threads_mask() { return quad_ballot(true); }
SM_INLINE bool quad_all(bool b) {
    uint active, bits = sm_ballot(b, active), base = sm_lane_index() & ~3u;
    return (bits >> base & 15) == (active >> base & 15);
}
SM_INLINE bool quad_any(bool b) { uint active; return (sm_ballot(b, active) >> (sm_lane_index() & ~3u) & 15) != 0; }
SM_INLINE bool quad_is_first() {
    uint base = sm_lane_index() & ~3u;
    return base + (uint)__builtin_ctz((uint)(quad_ballot(true).bits)) == sm_lane_index();
}
}

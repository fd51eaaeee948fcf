// The lanes of a threadgroup: which of them runs, what they hand to each other, where they wait.
//
// The 32 lanes of a simdgroup run one after another up to the next exchange, and the first goes on when the last has
// arrived, so an exchange costs one switch per lane. As long as all take the same path, in order, only the place is
// noted at which lane 0 waits (`open`), and the last lane to arrive does everything else.
#include "runtime.h"
#include "switch.h"

SM_CODE_AROUND

static inline sm_uint random_below(sm_group *g, sm_uint n) {
    g->seed = g->seed * 1664525u + 1013904223u;
    return (sm_uint)(((sm_ulong)g->seed * n) >> 32);
}

static inline sm_uint pick(sm_group *g, sm_uint bits) {            // the lowest set bit, or with a seed any
    if (!g->seed) return (sm_uint)__builtin_ctz(bits);
    for (sm_uint n = random_below(g, (sm_uint)__builtin_popcount(bits)); n; n--) bits &= bits - 1;
    return (sm_uint)__builtin_ctz(bits);
}

// Lanes of a simdgroup wait at different places: release those whose place comes first in the program, as
// the hardware does when paths diverge. The values of the others are kept aside.
static __attribute__((noinline)) sm_uint untangle(char *arena, sm_simd *s) {
    sm_lane *lanes = sm_lane_of(arena, s->number * SM_WIDTH);
    char(*aside)[SM_SLOT] = (char(*)[SM_SLOT])(arena + SM_STRAY_AT) + s->number * SM_WIDTH;
    void *first = (void *)~0ul;
    for (sm_uint i = 0; i < SM_WIDTH; i++)
        if (s->waiting >> i & 1 && lanes[i].site < first) first = lanes[i].site;
    sm_uint chosen = 0;
    char *slots = s->phase[s->parity].slots;
    for (sm_uint i = 0; i < SM_WIDTH; i++) {
        if (!(s->waiting >> i & 1)) continue;
        if (lanes[i].site == first) chosen |= 1u << i;
        else if (!(s->strays >> i & 1)) {
            lanes[i].stray_size = s->size;
            memcpy(aside[i], slots + i * s->size, s->size);
            s->strays |= 1u << i;
        }
    }
    for (sm_uint i = 0; i < SM_WIDTH; i++)
        if (chosen & s->strays & 1u << i) memcpy(slots + i * lanes[i].stray_size, aside[i], lanes[i].stray_size);
    s->strays &= ~chosen;
    s->site = 0;
    return chosen;
}

static inline void complete(sm_simd *s, sm_uint lanes) {           // the exchange of these lanes
    sm_phase *p = &s->phase[s->parity];
    p->mask = lanes;
    p->done = 0;
    s->parity ^= 1;
    s->current = p;
    s->slots = s->phase[s->parity].slots;
}

static inline void release(char *arena, sm_simd *s) {
    sm_uint chosen = s->strays ? untangle(arena, s) : s->waiting;
    complete(s, chosen);
    s->run = chosen;
    s->waiting &= ~chosen;
}

// What `open` left out, when a lane does not come to the same place as those before it.
static void settle(sm_simd *s, sm_lane *l) {
    if (!s->open) return;
    sm_lane *first = l - l->lane;
    for (sm_lane *x = first; x < l; x++) x->site = s->open;
    *(s->open_barrier ? &s->at_barrier : &s->waiting) = (1u << l->lane) - 1;
    s->run = ~1u << l->lane;
    s->open = 0;
}

// The next lane to run when this one cannot: of the same simdgroup first, then another simdgroup; when all
// wait at the barrier, it opens.
sm_lane *sm_next_lane(char *arena, sm_group *g, sm_simd *s) {
    for (;;) {
        if (!s->run && s->waiting) release(arena, s);
        if (s->run && !(g->seed && random_below(g, 8) == 0)) break;
        if (!s->run) g->ready &= ~(1u << s->number);
        if (g->ready) {
            s = sm_simd_of(arena, pick(g, g->ready));
            if (s->run || s->waiting) {
                if (!s->run) release(arena, s);
                break;
            }
            g->ready &= ~(1u << s->number);
            continue;
        }
        if (g->finished == g->count) return 0;
        for (sm_uint i = 0; i < g->simds; i++) {                   // everyone is at the barrier
            sm_simd *t = sm_simd_of(arena, i);
            t->run = t->at_barrier;
            t->at_barrier = 0;
            if (t->run) g->ready |= 1u << i;
        }
        if (sm_validate) sm_validate_barrier(g);
        if (!(g->ready >> s->number & 1)) s = sm_simd_of(arena, pick(g, g->ready));
    }
    sm_uint i = pick(g, s->run);
    s->run &= ~(1u << i);
    return sm_lane_of(arena, s->number * SM_WIDTH + i);
}

// The usual next lane is the next number: its stack pointer is then known without waiting for `run`.
static inline sm_lane *neighbour(sm_group *g, sm_simd *s, sm_lane *l) {
    sm_uint next = (l->lane + 1) % SM_WIDTH;
    if (__builtin_expect(!(s->run >> next & 1) || g->careful, 0)) return 0;
    s->run &= ~(1u << next);
    return l - l->lane + next;
}

static __attribute__((noinline)) void *all_here(sm_simd *s, sm_lane *l) {   // the last lane is, at `open`
    s->open = 0;
    complete(s, ~0u);
    s->run = ~1u;
    s->waiting = 0;
    return (l - (SM_WIDTH - 1))->sp;
}

static inline char *slot_for(char *arena, sm_lane *l, sm_simd *s, sm_uint size, void *site) {
    if (!s->waiting) {
        s->site = site;
        s->size = size;
    } else if (__builtin_expect(s->site != site, 0)) {
        s->strays |= 1u << l->lane;
        l->stray_size = size;
        return arena + SM_STRAY_AT + l->index * SM_SLOT;
    }
    return s->slots + l->lane * size;
}

static inline bool may_open(sm_group *g, sm_simd *s, sm_lane *l) { return !l->lane && s->run == ~1u && !g->careful; }

template <typename T> static __attribute__((noinline)) void *exchange_any(T value, void *site, bool counted) {
    char *arena = sm_arena();
    sm_group *g = sm_group_of(arena);
    sm_lane *l = sm_self(arena);
    sm_simd *s = sm_simd_of(arena, l->simd);
    settle(s, l);
    *(T *)slot_for(arena, l, s, sizeof(T), site) = value;
    s->waiting |= 1u << l->lane;
    l->site = site;
    if (may_open(g, s, l)) {
        s->open = site;
        s->open_barrier = 0;
        return l[1].sp;
    }
    if (sm_lane *next = neighbour(g, s, l)) return next->sp;
    if (g->careful && counted) sm_count.simd_ops++;
    return sm_next_lane(arena, g, s)->sp;
}

template <typename T> static inline void *exchange(T value, void *site, void *sp, bool counted = true) {
    char *arena = sm_arena();
    sm_uint index = sm_index(), lane = index % SM_WIDTH;
    sm_lane *l = sm_lane_of(arena, index);
    sm_simd *s = sm_simd_of(arena, index / SM_WIDTH);
    l->sp = sp;
    if (__builtin_expect(s->open != site, 0)) return exchange_any(value, site, counted);
    ((T *)s->slots)[lane] = value;
    return __builtin_expect(lane < SM_WIDTH - 1, 1) ? l[1].sp : all_here(s, l);
}

struct bytes16 { sm_ulong x, y; };
struct bytes32 { sm_ulong x, y, z, w; };

extern "C" {
// Hands `value` to the other lanes of the simdgroup that reach the same place.
void *sm_exchange1_next(sm_uint v, void *site, void *sp) { return exchange((unsigned char)v, site, sp); }
void *sm_exchange2_next(sm_uint v, void *site, void *sp) { return exchange((unsigned short)v, site, sp); }
void *sm_exchange4_next(sm_uint v, void *site, void *sp) { return exchange(v, site, sp); }
void *sm_exchange8_next(sm_ulong v, void *site, void *sp) { return exchange(v, site, sp); }
void *sm_exchange16_next(const bytes16 *v, void *site, void *sp) { return exchange(*v, site, sp); }
void *sm_exchange32_next(const bytes32 *v, void *site, void *sp) { return exchange(*v, site, sp); }
void *sm_join_next(sm_uint, void *site, void *sp) { return exchange((sm_uint)0, site, sp, false); }
SM_STUB(sm_join)
SM_STUB(sm_exchange1)
SM_STUB(sm_exchange2)
SM_STUB(sm_exchange4)
SM_STUB(sm_exchange8)
SM_STUB(sm_exchange16)
SM_STUB(sm_exchange32)

void sm_fence(sm_uint flags) {                                     // after a simdgroup barrier
    char *arena = sm_arena();
    if (sm_validate) sm_validate_simd_barrier(sm_group_of(arena), sm_simd_of(arena, sm_index() / SM_WIDTH), flags);
}

static __attribute__((noinline)) void *barrier_any(sm_uint flags, void *site) {
    char *arena = sm_arena();
    sm_group *g = sm_group_of(arena);
    sm_lane *l = sm_self(arena);
    sm_simd *s = sm_simd_of(arena, l->simd);
    if (s->open == site) {                                         // the last lane
        s->open = 0;
        s->at_barrier = ~0u;
        s->run = 0;
        return sm_next_lane(arena, g, s)->sp;
    }
    settle(s, l);
    l->site = site;
    l->state = flags;
    s->at_barrier |= 1u << l->lane;
    if (may_open(g, s, l)) {
        s->open = site;
        s->open_barrier = 1;
        return l[1].sp;
    }
    if (sm_lane *next = neighbour(g, s, l)) return next->sp;
    if (g->careful) sm_count.barriers++;
    return sm_next_lane(arena, g, s)->sp;
}

void *sm_barrier_next(sm_uint flags, void *site, void *sp) {
    char *arena = sm_arena();
    sm_uint index = sm_index();
    sm_lane *l = sm_lane_of(arena, index);
    sm_simd *s = sm_simd_of(arena, index / SM_WIDTH);
    l->sp = sp;
    if (__builtin_expect(s->open == site && index % SM_WIDTH < SM_WIDTH - 1, 1)) return l[1].sp;
    return barrier_any(flags, site);
}
SM_STUB(sm_barrier)

void sm_count_matrix(void) {
    if (sm_counting) sm_count.matrix_ops++;
}

void *sm_threadgroup(sm_uint index, sm_ulong size) {               // a threadgroup variable of the kernel
    sm_group *g = sm_group_of(sm_arena());
    if (void *p = g->tg_table[index]) return p;
    sm_uint red_zone = sm_validate ? 256 : 0;
    if (g->tg_used + size + red_zone > SM_TG_ARENA) {
        sm_new_report(SM_TG_TOO_LARGE, g, sm_self(sm_arena()), (sm_ulong)__builtin_return_address(0), 0);
        sm_abandon(g);
    }
    void *p = sm_arena() + SM_TG_AT + g->tg_used;
    if (sm_validate) {
        g->dispatch->ranges[2 * g->dispatch->range_count] = (sm_ulong)p;
        g->dispatch->ranges[2 * g->dispatch->range_count++ + 1] = size;
    }
    g->tg_used += ((sm_uint)size + 63) / 64 * 64 + red_zone;
    if (index >= g->decl_count) g->decl_count = index + 1;
    return g->tg_table[index] = p;
}

void sm_lane_main(void) {
    char *arena = sm_arena();
    sm_group *g = sm_group_of(arena);
    sm_lane *l = sm_self(arena);
    if (g->dispatch->fibers) {
        ((void (*)(sm_lane *, sm_group *))g->dispatch->entry)(l, g);
        sm_simd *s = sm_simd_of(arena, l->simd);
        settle(s, l);
        g->finished++;
        s->alive &= ~(1u << l->lane);
        sm_lane *next = neighbour(g, s, l);
        if (next || (next = sm_next_lane(arena, g, s))) sm_jump(next->sp);
    } else {
        ((void (*)(sm_group *))g->dispatch->entry)(g);
    }
    sm_jump(sm_main_stack());
}
}

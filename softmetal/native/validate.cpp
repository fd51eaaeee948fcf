// Behind the compiler's instrumentation: every access of a kernel is counted, checked against the memory that
// the dispatch may touch, and compared with who touched the same bytes before.
//
// Every byte of device and threadgroup memory has two stamps, last write and last read: when (an interval that
// grows with each barrier), where in the code, which thread, atomic or not. Validation runs on one OS thread, so
// "when" is a counter, and two accesses are ordered when a barrier, or a new epoch, lies between them.
#include "runtime.h"

sm_ulong sm_epoch_first;
static sm_ulong now = 1;

enum { SIMD_READERS = 1024, MANY_READERS = 2046, OTHER_GROUPS = 2047, THREAD_MASK = 2047, ATOMIC = 2048 };
struct stamps { sm_ulong written[65536], read[65536]; };      // of 64 KiB of memory

static sm_ulong chunk_keys[1 << 16];
static stamps *chunks[1 << 16];
static sm_ulong last_key;
static stamps *last_chunk;

static stamps *chunk_of(sm_ulong address) {
    sm_ulong key = address >> 16;
    if (key == last_key) return last_chunk;
    sm_ulong at = key * 0x9e3779b97f4a7c15ul >> 48;
    while (chunk_keys[at] && chunk_keys[at] != key) at = (at + 1) & 0xffff;
    if (!chunk_keys[at]) {
        chunk_keys[at] = key;
        chunks[at] = (stamps *)mmap(0, sizeof(stamps), 3, 0x4022, -1, 0);
    }
    last_key = key;
    return last_chunk = chunks[at];
}

void sm_validate_epoch(void) { sm_epoch_first = ++now; }

static void start_phase(sm_group *g, int memory) {
    g->phase_first[memory] = ++now;
    for (sm_uint i = 0; i < g->simds; i++) sm_simd_of((char *)g - SM_GROUP_AT, i)->interval[memory] = now;
}

void sm_validate_start(sm_group *g) {
    g->group_first = ++now;
    start_phase(g, 0);
    start_phase(g, 1);
}

void sm_validate_simd_barrier(sm_group *, sm_simd *s, sm_uint flags) {
    for (int memory = 0; memory < 2; memory++)
        if (flags >> memory & 1) s->interval[memory] = ++now;
}

void sm_validate_barrier(sm_group *g) {
    char *arena = (char *)g - SM_GROUP_AT;
    sm_lane *first = 0;
    sm_uint flags = 3;
    for (sm_uint i = 0; i < g->count; i++) {
        sm_lane *l = sm_lane_of(arena, i);
        if (!(sm_simd_of(arena, l->simd)->run >> l->lane & 1)) continue;
        flags &= l->state;
        if (!first) first = l;
        else if (l->site != first->site) {
            if (sm_report *r = sm_new_report(SM_DIVERGENT, g, l, (sm_ulong)l->site, (sm_ulong)first->site))
                r->other_thread = first->index;
        }
    }
    if (g->finished && first) sm_new_report(SM_DIVERGENT, g, first, (sm_ulong)first->site, 0);
    for (int memory = 0; memory < 2; memory++)
        if (flags >> memory & 1) start_phase(g, memory);
}

// 0: no conflict, otherwise the kind of report
static inline sm_uint conflict(sm_ulong before, sm_group *g, sm_simd *s, sm_uint thread, int memory, bool atomic) {
    sm_ulong when = before >> 32;
    if (when < sm_epoch_first || (atomic && before & ATOMIC)) return 0;
    sm_uint other = before & THREAD_MASK;
    if (when < g->group_first) return memory ? 0 : SM_RACE_ACROSS;
    if (other == OTHER_GROUPS) return SM_RACE_ACROSS;
    if (other == thread) return 0;
    sm_uint simd = other < SIMD_READERS ? other / SM_WIDTH : other - SIMD_READERS;
    return when >= (simd == s->number ? s->interval[memory] : g->phase_first[memory]) ? SM_RACE : 0;
}

static void report(sm_uint kind, sm_group *g, sm_lane *l, sm_ulong address, sm_uint size, bool write, sm_ulong pc, sm_ulong before,
                   bool other_write, sm_uint space) {
    sm_ulong other_pc = before >> 12 & 0xfffff;
    sm_report *r = sm_new_report(kind, g, l, pc, other_pc ? g->dispatch->code_start + other_pc : 0);
    if (!r) return;
    r->space = space;
    r->size = size;
    r->write = write;
    r->address = address;
    r->other_write = other_write;
    r->other_thread = before & THREAD_MASK;
}

static void out_of_bounds(sm_group *g, sm_lane *l, sm_ulong address, sm_uint size, bool write, sm_ulong pc, sm_uint space) {
    sm_dispatch *d = g->dispatch;
    if (sm_report *r = sm_new_report(SM_BOUNDS, g, l, pc, 0)) {
        r->space = space;
        r->size = size;
        r->write = write;
        r->address = address;
        sm_ulong best = ~0ul;
        for (sm_uint i = 0; i < SM_MAX_BUFFERS + d->range_count; i++) {        // the memory it starts in or overran
            sm_ulong start = i < SM_MAX_BUFFERS ? d->buffers[i] : d->ranges[2 * (i - SM_MAX_BUFFERS)];
            sm_ulong length = i < SM_MAX_BUFFERS ? d->lengths[i] : d->ranges[2 * (i - SM_MAX_BUFFERS) + 1];
            if (length && address >= start && address - start < best && address - start < length + (1ul << 32)) {
                best = address - start;
                r->offset = best;
                r->length = length;
            }
        }
    }
    sm_abandon(g);
}

static void aligned(sm_ulong address, sm_uint size, bool write, void *site) {
    if (!(address & ((size < 8 ? size : 8) - 1)) || !sm_validate) return;
    char *arena = sm_arena();
    sm_group *g = sm_group_of(arena);
    if (sm_report *r = sm_new_report(SM_MISALIGNED, g, sm_self(arena), (sm_ulong)site, 0)) {
        r->size = size;
        r->write = write;
        r->address = address;
    }
    sm_abandon(g);
}

static void access(sm_ulong address, sm_uint size, bool write, bool atomic, void *site) {
    char *arena = sm_arena();
    sm_group *g = sm_group_of(arena);
    sm_dispatch *d = g->dispatch;
    sm_ulong pc = (sm_ulong)site;
    sm_uint space;
    if (address - (sm_ulong)arena < 1ul << SM_ARENA_BITS) {
        if (address - (sm_ulong)arena < SM_TG_AT) return;          // the thread's stack, or the runtime's own
        space = SM_THREADGROUP;
    } else if (address - d->code_start < d->code_end - d->code_start) {
        sm_count.loaded[SM_CONSTANT] += size;                      // a table of the program
        return;
    } else space = SM_DEVICE;
    sm_lane *l = sm_self(arena);
    bool inside = false;
    if (space == SM_DEVICE)
        for (sm_uint i = 0; i < SM_MAX_BUFFERS && !inside; i++) {
            if (address - d->buffers[i] >= d->lengths[i] || address - d->buffers[i] + size > d->lengths[i]) continue;
            inside = true;
            space = d->spaces[i];
        }
    for (sm_uint i = 0; i < d->range_count && !inside; i++)
        inside = address - d->ranges[2 * i] < d->ranges[2 * i + 1] && address - d->ranges[2 * i] + size <= d->ranges[2 * i + 1];
    if (inside) (write ? sm_count.stored : sm_count.loaded)[space] += size;
    if (!sm_validate) return;
    if (!inside) out_of_bounds(g, l, address, size, write, pc, space);

    sm_simd *s = sm_simd_of(arena, l->simd);
    int memory = space == SM_THREADGROUP;
    sm_ulong relative = pc - d->code_start;
    sm_ulong stamp = s->interval[memory] << 32 | (relative < 1 << 20 ? relative << 12 : 0) | (atomic ? ATOMIC : 0) | l->index;
    for (sm_ulong at = address; at < address + size; at++) {
        stamps *c = chunk_of(at);
        sm_ulong *written = &c->written[at & 0xffff], *read = &c->read[at & 0xffff];
        if (sm_uint kind = conflict(*written, g, s, l->index, memory, atomic)) {
            report(kind, g, l, address, size, write, pc, *written, true, space);
            return;
        }
        if (write) {
            if (sm_uint kind = conflict(*read, g, s, l->index, memory, atomic)) {
                report(kind, g, l, address, size, write, pc, *read, false, space);
                return;
            }
            *written = stamp;
            continue;
        }
        if (memory && *written >> 32 < g->group_first)
            report(SM_UNINITIALISED, g, l, address, size, write, pc, 0, false, space);
        sm_ulong before = *read, when = before >> 32, kept = stamp;
        sm_uint other = before & THREAD_MASK;
        if (when >= sm_epoch_first && !memory && (when < g->group_first || other == OTHER_GROUPS)) kept |= OTHER_GROUPS;
        else if (when >= g->phase_first[memory] && other != l->index) {
            sm_uint simd = other < SIMD_READERS ? other / SM_WIDTH : other - SIMD_READERS;
            sm_uint code = simd == s->number ? SIMD_READERS + simd : MANY_READERS;
            kept = (stamp & ~(sm_ulong)THREAD_MASK) | code;
        }
        if (!(before & ATOMIC) && kept != stamp) kept &= ~(sm_ulong)ATOMIC;
        *read = kept;
    }
}

extern "C" {
#define SM_HOOKS(N) \
    void __tsan_read##N(void *p) { \
        aligned((sm_ulong)p, N, false, __builtin_return_address(0)); \
        access((sm_ulong)p, N, false, false, __builtin_return_address(0)); } \
    void __tsan_write##N(void *p) { \
        aligned((sm_ulong)p, N, true, __builtin_return_address(0)); \
        access((sm_ulong)p, N, true, false, __builtin_return_address(0)); } \
    void __tsan_unaligned_read##N(void *p) { access((sm_ulong)p, N, false, false, __builtin_return_address(0)); } \
    void __tsan_unaligned_write##N(void *p) { access((sm_ulong)p, N, true, false, __builtin_return_address(0)); }
SM_HOOKS(1) SM_HOOKS(2) SM_HOOKS(4) SM_HOOKS(8) SM_HOOKS(16)
void __tsan_init(void) {}
void *__tsan_memset(void *p, int v, sm_ulong n) {
    access((sm_ulong)p, (sm_uint)n, true, false, __builtin_return_address(0));
    return memset(p, v, n);
}
void *__tsan_memcpy(void *to, const void *from, sm_ulong n) {
    access((sm_ulong)from, (sm_uint)n, false, false, __builtin_return_address(0));
    access((sm_ulong)to, (sm_uint)n, true, false, __builtin_return_address(0));
    return memmove(to, from, n);
}
void *__tsan_memmove(void *to, const void *from, sm_ulong n) {
    access((sm_ulong)from, (sm_uint)n, false, false, __builtin_return_address(0));
    access((sm_ulong)to, (sm_uint)n, true, false, __builtin_return_address(0));
    return memmove(to, from, n);
}
#define SM_ATOMIC(BITS, T) \
    T __tsan_atomic##BITS##_load(T *p, int) { \
        access((sm_ulong)p, sizeof(T), false, true, __builtin_return_address(0)); sm_count.atomics++; \
        return __atomic_load_n(p, 5); } \
    void __tsan_atomic##BITS##_store(T *p, T v, int) { \
        access((sm_ulong)p, sizeof(T), true, true, __builtin_return_address(0)); sm_count.atomics++; \
        __atomic_store_n(p, v, 5); } \
    T __tsan_atomic##BITS##_compare_exchange_val(T *p, T expected, T v, int, int) { \
        access((sm_ulong)p, sizeof(T), true, true, __builtin_return_address(0)); sm_count.atomics++; \
        __atomic_compare_exchange_n(p, &expected, v, 0, 5, 5); return expected; } \
    SM_ATOMIC_RMW(BITS, T, exchange, __atomic_exchange_n) SM_ATOMIC_RMW(BITS, T, fetch_add, __atomic_fetch_add) \
    SM_ATOMIC_RMW(BITS, T, fetch_sub, __atomic_fetch_sub) SM_ATOMIC_RMW(BITS, T, fetch_and, __atomic_fetch_and) \
    SM_ATOMIC_RMW(BITS, T, fetch_or, __atomic_fetch_or) SM_ATOMIC_RMW(BITS, T, fetch_xor, __atomic_fetch_xor) \
    SM_ATOMIC_RMW(BITS, T, fetch_nand, __atomic_fetch_nand)
#define SM_ATOMIC_RMW(BITS, T, NAME, BUILTIN) \
    T __tsan_atomic##BITS##_##NAME(T *p, T v, int) { \
        access((sm_ulong)p, sizeof(T), true, true, __builtin_return_address(0)); sm_count.atomics++; \
        return BUILTIN(p, v, 5); }
SM_ATOMIC(8, unsigned char) SM_ATOMIC(16, unsigned short) SM_ATOMIC(32, sm_uint) SM_ATOMIC(64, sm_ulong)
void __tsan_atomic_thread_fence(int) {}
}

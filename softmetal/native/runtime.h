// Shared by the parts of the runtime. It uses no system headers, so that it compiles with nothing but clang.
#pragma once
#include "abi.h"

extern "C" {
void *mmap(void *, sm_ulong, int, int, int, long);
int munmap(void *, sm_ulong);
int mprotect(void *, sm_ulong, int);
int madvise(void *, sm_ulong, int);
void *memcpy(void *, const void *, sm_ulong);
void *memmove(void *, const void *, sm_ulong);
void *memset(void *, int, sm_ulong);
}

struct sm_report {        // what validation (or a fault) found
    sm_uint kind, kernel, space, size, write, other_write;
    sm_ulong address, pc, other_pc, offset, length;
    sm_uint group[3], thread[3], other_thread, index;
};
enum { SM_BOUNDS = 1, SM_RACE, SM_RACE_ACROSS, SM_DIVERGENT, SM_UNINITIALISED, SM_FAULT, SM_TG_TOO_LARGE, SM_TIMEOUT, SM_MISALIGNED, SM_STACK };

struct sm_counters {
    sm_ulong dispatches, groups, threads, barriers, simd_ops, matrix_ops;
    sm_ulong loaded[3], stored[3], atomics;
};

extern sm_counters sm_count;
extern sm_uint sm_validate, sm_counting;   // set from Python; either needs instrumented kernels
extern sm_ulong sm_epoch_first;            // validation: accesses with a smaller interval are ordered before now

static inline sm_ulong sm_stack_pointer(void) {
    sm_ulong sp;
#if defined(__x86_64__)
    asm("movq %%rsp, %0" : "=r"(sp));
#else
    asm("mov %0, sp" : "=r"(sp));
#endif
    return sp;
}
static inline char *sm_arena(void) { return (char *)(sm_stack_pointer() & ~((1ul << SM_ARENA_BITS) - 1)); }
static inline sm_group *sm_group_of(char *arena) { return (sm_group *)(arena + SM_GROUP_AT); }
static inline sm_simd *sm_simd_of(char *arena, sm_uint i) { return (sm_simd *)(arena + SM_SIMD_AT) + i; }
static inline sm_lane *sm_lane_of(char *arena, sm_uint i) { return (sm_lane *)(arena + SM_LANE_AT) + i; }
static inline sm_uint sm_index(void) {
    return (sm_stack_pointer() >> SM_STACK_BITS) & (SM_LANES - 1);
}
static inline sm_lane *sm_self(char *arena) { return sm_lane_of(arena, sm_index()); }

sm_report *sm_new_report(sm_uint kind, sm_group *, sm_lane *, sm_ulong pc, sm_ulong other_pc);
sm_lane *sm_next_lane(char *arena, sm_group *, sm_simd *);   // null when all have ended
void *sm_main_stack(void);                 // of the OS thread, where a threadgroup was entered
void sm_abandon(sm_group *);               // gives up the dispatch; does not return
void sm_validate_start(sm_group *);        // a threadgroup begins
void sm_validate_barrier(sm_group *);      // all wait at one; it opens
void sm_validate_simd_barrier(sm_group *, sm_simd *, sm_uint flags);
void sm_validate_epoch(void);              // everything before is ordered before everything after

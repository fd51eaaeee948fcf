// What a compiled kernel and the runtime know about each other. Read by both: the kernel side as C++ for
// OpenCL, the runtime as C++17, so only plain structs, and pointers that the kernel side never follows
// except through these names.
#pragma once

typedef unsigned int sm_uint;
typedef unsigned long sm_ulong;

enum {
    SM_STACK_BITS = 16,           // a fiber's stack: 64 KiB
    SM_ARENA_BITS = 27,           // an arena: 64 MiB of stacks, then 64 MiB of everything else
    SM_LANES = 1024,              // threads of a threadgroup at most
    SM_WIDTH = 32,                // lanes of a simdgroup
    SM_MAX_BUFFERS = 31,
    SM_MAX_DECLS = 64,            // threadgroup variables declared in one kernel
    SM_SLOT = 32,                 // bytes that a lane can hand to the others in one exchange
    SM_TG_ARENA = 1 << 20         // room for threadgroup memory with the red zones of validation mode
};

struct sm_dispatch {
    void *entry;                  // a function that takes the lane, or the group where `fibers` is 0
    sm_uint fibers, kernel_id;
    sm_uint groups[3], size[3];   // threadgroups per grid, threads per threadgroup as dispatched
    sm_uint threads[3];           // threads per grid; smaller than groups * size at ragged edges
    sm_uint width;                // always 32
    sm_uint *indirect;            // where not null, `groups` is read from here when the dispatch starts
    sm_ulong buffers[SM_MAX_BUFFERS];
    sm_ulong lengths[SM_MAX_BUFFERS];   // bytes from the bound offset to the end of the buffer
    sm_uint spaces[SM_MAX_BUFFERS];     // SM_DEVICE or SM_CONSTANT, as the kernel declares the parameter
    sm_uint tg_lengths[SM_MAX_BUFFERS]; // dynamic threadgroup memory by index
    sm_ulong *ranges;             // validation: start, length of the other memory the kernel may touch
    sm_ulong range_count;
    sm_ulong code_start, code_end;
};

struct sm_lane {                  // one cache line
    void *sp;
    void *site;                   // where it waits: an address in the kernel
    sm_uint tid[3], index, lane, simd, stray_size, state;
    sm_ulong unused[2];
};

struct sm_phase {                 // one exchange of a simdgroup
    sm_uint mask, done;           // the lanes that take part; whether `result` is filled
    sm_uint pad[14];
    char result[512];
    char slots[SM_WIDTH * SM_SLOT];
};

struct sm_simd {
    void *site;                   // of the lanes whose values are in the slots
    sm_uint run, waiting, at_barrier, strays, alive, size, parity, number;
    sm_ulong interval[2];         // validation: last barrier, by memory (device, threadgroup)
    void *open;                   // lanes 0, 1, ... arrive here in turn, all others ready: nothing else is kept up
    char *slots;                  // where values are put
    struct sm_phase *current;     // the last exchange that was completed
    sm_ulong open_barrier, pad[5];
    struct sm_phase phase[2];
    char pad_to_4096[4096 - 128 - 2 * 1600];
};

struct sm_group {
    struct sm_dispatch *dispatch;
    sm_uint position[3], size[3]; // size: of this group, smaller at ragged edges
    sm_uint count, simds, finished, ready, seed;
    sm_uint careful;              // a seed is set, or something is counted or checked: take the long way
    sm_uint tg_used, decl_count;
    void *tg_table[SM_MAX_DECLS]; // threadgroup variables of the kernel, null until first reached
    void *tg_dynamic[SM_MAX_BUFFERS];
    sm_uint tid_size[3];          // the size for which the lanes' positions are filled in
    sm_uint number;
    sm_ulong group_first, phase_first[2];
};

enum { SM_DEVICE = 0, SM_CONSTANT = 1, SM_THREADGROUP = 2 };
enum { SM_GROUP_AT = 1 << 26, SM_SIMD_AT = SM_GROUP_AT + (1 << 16), SM_LANE_AT = SM_GROUP_AT + (1 << 18),
       SM_STRAY_AT = SM_GROUP_AT + (1 << 19), SM_TG_AT = SM_GROUP_AT + (1 << 20), SM_DISPATCH_AT = SM_GROUP_AT + (1 << 15) };

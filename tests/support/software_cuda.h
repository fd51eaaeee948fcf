// The words of CUDA that emitted kernels use, for one kernel on a CPU (software_cuda.py puts its text behind this file).
//
// Threads of a block are fibers. They change only where they wait: in operations that a warp does together, and at
// barriers. One warp runs as far as it can before the next begins, in an order that the seed chooses, so that a missing
// barrier shows. Copies that are asynchronous are made when they are waited for, and their targets are garbage until
// then. What kernels before this one write comes when it waits for them. Operands of matrix products of warp groups must be the same when they are waited for. Shared memory and every stack end (or
// begin) at pages that nobody may touch; a fault ends the launch with a message.
//
// Fragments and shared memory descriptors: PTX ISA, "Matrix multiply-accumulate operation" (mma.m16n8k*, ldmatrix) and
// "Asynchronous warpgroup level matrix multiply-accumulate" (wgmma).
#pragma once

using size_type = decltype(sizeof 0);

extern "C" {
void *mmap(void *, size_type, int, int, int, long);
int mprotect(void *, size_type, int);
int munmap(void *, size_type);
int sigaction(int, const void *, void *);
int sigaltstack(const void *, void *);
void cuda_switch(void **from, void *to);
void cuda_begin(void);
}
void *operator new(size_type, void *at) noexcept { return at; }
#define memcpy __builtin_memcpy
#define memset __builtin_memset

#if defined(__x86_64__)
asm(".text\n.globl cuda_switch, cuda_begin\ncuda_switch:\n pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
    " movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
    " popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n"
    "cuda_begin:\n andq $-16, %rsp\n call cuda_thread\n ud2\n");
enum { SAVED = 6, ENTRY = 6 };                     // words on a stack that waits; which of them is the address
#else
asm(".text\n.globl cuda_switch, cuda_begin\ncuda_switch:\n sub sp, sp, #160\n stp x19, x20, [sp]\n stp x21, x22, [sp, #16]\n stp x23, x24, [sp, #32]\n"
    " stp x25, x26, [sp, #48]\n stp x27, x28, [sp, #64]\n stp x29, x30, [sp, #80]\n stp d8, d9, [sp, #96]\n"
    " stp d10, d11, [sp, #112]\n stp d12, d13, [sp, #128]\n stp d14, d15, [sp, #144]\n mov x9, sp\n str x9, [x0]\n"
    " mov sp, x1\n ldp x19, x20, [sp]\n ldp x21, x22, [sp, #16]\n ldp x23, x24, [sp, #32]\n ldp x25, x26, [sp, #48]\n"
    " ldp x27, x28, [sp, #64]\n ldp x29, x30, [sp, #80]\n ldp d8, d9, [sp, #96]\n ldp d10, d11, [sp, #112]\n"
    " ldp d12, d13, [sp, #128]\n ldp d14, d15, [sp, #144]\n add sp, sp, #160\n ret\n"
    "cuda_begin:\n bl cuda_thread\n brk #1\n");
enum { SAVED = 19, ENTRY = 11 };
#endif

namespace cuda {

typedef unsigned int word;
typedef unsigned long long address;
struct position { word x, y, z; };
enum { MOST = 1024, STACK = 512 << 10, PAGE = 4096, SHARED_AT = 1024, COPIES = 256, PRODUCTS = 64, EXCHANGE = 8 };

struct meeting { word arrived, times, kind; };
struct late { void *to; const void *from; size_type nbytes; };
struct copy { unsigned char *to; const void *from; int nbytes; word group; };
struct product { address a, b, seen; int n; bool a_turned, b_turned; word group; };
struct warp { meeting meet; word given[2][32][EXCHANGE]; };

struct thread {
    void *stack;
    meeting *at;                                   // what it waits for, and how often that had happened
    word times;
    bool done;
    position index;
    copy copies[COPIES];
    product products[PRODUCTS];
    word copies_made, copy_groups, products_made, product_groups;
};

static thread *threads, *current;
static warp *warps;
static meeting everybody;
static word count, order[MOST], place[MOST], shared_bytes;
static void *back, *ignored;
static char message[400];
static unsigned char *shared, *memory;
static position block, blocks;
static void (*body)(void **);
static void **parameters;

static void say(const char *text) {
    word n = 0, length = 0;
    while (message[length]) length++;
    for (; text[n] && length + 1 < sizeof message; n++) message[length++] = text[n];
    message[length] = 0;
}

static void say(address number, word base = 10) {
    char text[24] = {}, *at = text + 23;
    do *--at = "0123456789abcdef"[number % base];
    while (number /= base);
    say(at);
}

static void where() {
    say(", block (");
    say(block.x), say(", "), say(block.y), say(", "), say(block.z);
    say("), thread ");
    say(current->index.x);
}

[[noreturn]] static void fail(const char *why) {
    say(why), where();
    cuda_switch(&ignored, back);
    __builtin_unreachable();
}

static void on_fault(int, void *info, void *) {
    say("an access outside of memory, at 0x"), say(*(address *)((char *)info + 16), 16), where();
    cuda_switch(&ignored, back);
}

static bool ready(const thread &t) { return !t.done && (!t.at || t.at->times != t.times); }

// Another thread goes on: of the same warp if one can.
static void rest() {
    word from = place[current->index.x];
    for (word i = 1; i < 32 + count; i++) {
        word next = i < 32 ? (from & ~31u) | ((from + i) & 31) : ((from & ~31u) + i) % count;
        thread &t = threads[order[next]];
        if (!ready(t)) continue;
        thread *old = current;
        current = &t;
        if (old != current) cuda_switch(&old->stack, t.stack);
        current->at = nullptr;
        return;
    }
    thread &t = *current;
    if (ready(t)) return;
    for (word i = 0; i < count; i++)
        if (!threads[i].done) fail("threads wait for others that have ended or wait elsewhere");
    cuda_switch(&ignored, back);
    __builtin_unreachable();
}

static void meet(meeting &m, word members, word kind) {
    if (m.arrived && m.kind != kind) fail("threads of a warp or block meet in different operations");
    m.kind = kind;
    if (++m.arrived == members) {
        m.arrived = 0, m.times++;
        return;
    }
    current->at = &m, current->times = m.times;
    rest();
}

// What every lane of the warp gives; nobody may keep it beyond his next operation of the warp.
template <int N> static const word (*exchange(const word (&mine)[N], word kind))[EXCHANGE] {
    static_assert(N <= EXCHANGE, "room");
    warp &w = warps[current->index.x >> 5];
    word (*given)[EXCHANGE] = w.given[w.meet.times & 1];
    memcpy(given[current->index.x & 31], mine, sizeof mine);
    meet(w.meet, 32, kind);
    return given;
}

static unsigned char *shared_cell(word at, word nbytes) {
    if (at < SHARED_AT || at + nbytes > SHARED_AT + shared_bytes) fail("an access outside of shared memory");
    if (at % nbytes) fail("a misaligned access of shared memory");
    return shared + (at - SHARED_AT);
}

static float half_number(unsigned short bits) {
    _Float16 x;
    memcpy(&x, &bits, 2);
    return (float)x;
}
static float bfloat_number(unsigned short bits) {
    word wide = (word)bits << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
}
enum { FP16, BF16 };
static float number(int form, unsigned short bits) { return form == FP16 ? half_number(bits) : bfloat_number(bits); }

// The 16-bit element of a matrix that a descriptor of wgmma tells of: `along` of 16 products, `across` of rows or columns.
static unsigned short described(address d, bool turned, word across, word along) {
    word start = (d & 0x3fff) << 4, leading = (d >> 16 & 0x3fff) << 4, stride = (d >> 32 & 0x3fff) << 4, swizzle = d >> 62;
    if (!swizzle) fail("a matrix descriptor without swizzle");
    word width = 256 >> swizzle, line = turned ? along : across, byte = 2 * (turned ? across : along);
    word at = start + byte / width * leading + line / 8 * stride + line % 8 * width + byte % width;
    at ^= (at >> 7 & (width / 16 - 1)) << 4;
    unsigned short bits;
    memcpy(&bits, shared_cell(at, 2), 2);
    return bits;
}

static word first_row() { return (current->index.x >> 5 & 3) * 16 + current->index.x % 32 / 4; }
static word column_of(word i) { return i / 2 * 8 + current->index.x % 4 * 2 + i % 2; }

// A number for what this thread's part of a product reads from shared memory.
static address contents(const product &p) {
    address sum = 0;
    for (word k = 0; k < 16; k++) {
        for (word i = 0; i < 2 && p.a; i++) sum = sum * 0x9e3779b97f4a7c15 + described(p.a, p.a_turned, first_row() + 8 * i, k);
        for (word i = 0; i < p.n / 4; i++) sum = sum * 0x9e3779b97f4a7c15 + described(p.b, p.b_turned, column_of(i), k);
    }
    return sum;
}

extern "C" void cuda_thread() {
    body(parameters);
    if (current->copies_made) fail("a thread ends before its asynchronous copies");
    if (current->products_made) fail("a thread ends before its asynchronous products");
    current->done = true;
    rest();
    __builtin_trap();
}

static unsigned char *guarded(size_type nbytes) {                // a page that may not be touched on both sides
    nbytes = (nbytes + PAGE - 1) / PAGE * PAGE;
    unsigned char *at = (unsigned char *)mmap(0, nbytes + 2 * PAGE, 0, 0x4022, -1, 0);
    mprotect(at + PAGE, nbytes, 3);
    return at + PAGE;
}

static void run_block() {
    memset(shared, 0xff, shared_bytes);
    memset(&everybody, 0, sizeof everybody);
    for (word i = 0; i < count; i++) {
        thread &t = threads[i];
        t.at = nullptr, t.done = false, t.index = {i, 0, 0};
        t.copies_made = t.copy_groups = t.products_made = t.product_groups = 0;
        void **top = (void **)(memory + (size_type)(i + 1) * STACK - 64) - SAVED - 1;
        memset(top, 0, (SAVED + 1) * sizeof(void *));
        top[ENTRY] = (void *)cuda_begin;
        t.stack = top;
    }
    for (word i = 0; i < count / 32; i++) warps[i].meet = {};
    current = &threads[order[0]];
    cuda_switch(&back, current->stack);
}

// Threads of warps from the first or the last on, and their lanes, by the seed.
static void shuffle_threads(word seed) {
    word n = count / 32, numbers[32];
    for (word i = 0; i < n; i++) numbers[i] = i;
    for (word i = n; i > 1; i--) {
        seed = seed * 1664525 + 1013904223;
        word j = (seed >> 8) % i, t = numbers[i - 1];
        numbers[i - 1] = numbers[j], numbers[j] = t;
    }
    for (word i = 0; i < count; i++) {
        order[i] = numbers[i / 32] * 32 + (i & 31 ^ (seed >> 20 & 31));
        place[order[i]] = i;
    }
}

}  // namespace cuda

// What the kernels before this one write: it is there once they have been waited for.
extern "C" { const cuda::late *cuda_late; cuda::word cuda_late_count; }

// Runs the blocks `programs` (three numbers each, `many` of them); what went wrong, or "".
extern "C" const char *cuda_launch(void (*body)(void **), void **parameters, cuda::word threads, cuda::word shared_bytes,
                                   const cuda::word *grid, const cuda::word *programs, cuda::word many, cuda::word seed) {
    using namespace cuda;
    cuda::body = body, cuda::parameters = parameters, count = threads, message[0] = 0;
    blocks = {grid[0], grid[1], grid[2]};
    cuda::shared_bytes = (shared_bytes + 15) / 16 * 16;
    size_type states = sizeof(thread) * count, groups = sizeof(warp) * (count / 32);
    size_type sizes[] = {states, groups, (size_type)count * STACK, cuda::shared_bytes, 64 << 10};
    unsigned char *parts[5];
    for (int i = 0; i < 5; i++) parts[i] = guarded(sizes[i]);
    cuda::threads = (thread *)parts[0], warps = (warp *)parts[1], memory = parts[2];
    shared = parts[3] + (PAGE - cuda::shared_bytes % PAGE) % PAGE;
    for (word i = 0; i < count; i++) mprotect(memory + (size_type)i * STACK, PAGE, 0);
    struct { void *at; int flags; size_type nbytes; } stack = {parts[4], 0, 64 << 10}, old_stack;
    struct { void *handler; address mask[16]; int flags; void *restorer; } action = {}, old[2];
    action.handler = (void *)on_fault;
    action.flags = 0x4 | 0x08000000 | 0x40000000;                // SA_SIGINFO, SA_ONSTACK, SA_NODEFER
    sigaltstack(&stack, &old_stack);
    sigaction(11, &action, &old[0]), sigaction(7, &action, &old[1]);
    shuffle_threads(seed);
    for (word i = 0; i < many && !message[0]; i++) {
        block = {programs[3 * i], programs[3 * i + 1], programs[3 * i + 2]};
        run_block();
    }
    sigaction(11, &old[0], 0), sigaction(7, &old[1], 0);
    sigaltstack(&old_stack, 0);
    for (int i = 0; i < 5; i++) munmap(parts[i] - PAGE, (sizes[i] + PAGE - 1) / PAGE * PAGE + 2 * PAGE);
    return message;
}

// ------------------------------------------------------------------------------------------------- CUDA's own words

#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__
#define __align__(n)
#define threadIdx (cuda::current->index)
#define blockIdx (cuda::block)
#define gridDim (cuda::blocks)
using uint3 = cuda::position;

template <typename To, typename From> inline To cuda_bits(From x) {
    To y;
    static_assert(sizeof x == sizeof y, "as many bits");
    memcpy(&y, &x, sizeof y);
    return y;
}
#define __int_as_float(x) cuda_bits<float>(int(x))
#define __uint_as_float(x) cuda_bits<float>((unsigned int)(x))
#define __float_as_int(x) cuda_bits<int>(float(x))

// Towards zero: to the nearest, then one step back if that was too far.
template <typename T> inline float cuda_towards_zero(T x) {
    float f = float(x);
    long double exact = (long double)x, size = exact < 0 ? -exact : exact, found = f < 0 ? -(long double)f : f;
    return found > size ? cuda_bits<float>(cuda_bits<unsigned int>(f) - 1) : f;
}
#define __int2float_rz cuda_towards_zero
#define __uint2float_rz cuda_towards_zero
#define __ll2float_rz cuda_towards_zero
#define __ull2float_rz cuda_towards_zero
#define __double2float_rz cuda_towards_zero

#define CUDA_FUNCTION(NAME) \
    inline float NAME(float x) { return __builtin_##NAME##f(x); } inline double NAME(double x) { return __builtin_##NAME(x); }
CUDA_FUNCTION(exp) CUDA_FUNCTION(exp2) CUDA_FUNCTION(log) CUDA_FUNCTION(log2) CUDA_FUNCTION(sqrt) CUDA_FUNCTION(sin)
CUDA_FUNCTION(cos) CUDA_FUNCTION(tanh) CUDA_FUNCTION(floor) CUDA_FUNCTION(ceil) CUDA_FUNCTION(erf) CUDA_FUNCTION(fabs)
inline float rsqrt(float x) { return 1.0f / sqrt(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float fma(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
inline double fma(double x, double y, double z) { return __builtin_fma(x, y, z); }
inline float fmod(float x, float y) { return __builtin_fmodf(x, y); }
inline double fmod(double x, double y) { return __builtin_fmod(x, y); }
inline float fmin(float x, float y) { return __builtin_fminf(x, y); }
inline double fmin(double x, double y) { return __builtin_fmin(x, y); }
inline float fmax(float x, float y) { return __builtin_fmaxf(x, y); }
inline double fmax(double x, double y) { return __builtin_fmax(x, y); }
template <typename T> inline T min(T x, T y) { return y < x ? y : x; }
template <typename T> inline T max(T x, T y) { return x < y ? y : x; }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned count) {
    return unsigned(((unsigned long long)high << 32 | low) >> (count & 31));
}
inline int __mulhi(int x, int y) { return int((long long)x * y >> 32); }
inline unsigned int __umulhi(unsigned int x, unsigned int y) { return (unsigned int)((unsigned long long)x * y >> 32); }
inline long long __mul64hi(long long x, long long y) { return (long long)((__int128)x * y >> 64); }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
    return (unsigned long long)((unsigned __int128)x * y >> 64);
}

inline void __syncthreads() { cuda::meet(cuda::everybody, cuda::count, 1); }
inline void __threadfence() { }

enum { LANE_XOR = 2, LANE_UP, LANE_DOWN, LANE_FROM, LANE_REDUCE, LANE_MMA, LANE_LDMATRIX, LANE_WGMMA };
template <typename T> inline T cuda_shuffle(T x, int other, int kind) {
    int lane = cuda::current->index.x & 31;
    int from = kind == LANE_XOR ? lane ^ other : kind == LANE_UP ? lane - other : kind == LANE_DOWN ? lane + other : other & 31;
    if (from < 0 || from > 31) from = lane;
    cuda::word mine[2] = {};
    memcpy(mine, &x, sizeof x);
    memcpy(&x, cuda::exchange(mine, kind)[from], sizeof x);
    return x;
}
template <typename T> inline T __shfl_sync(unsigned, T x, int lane) { return cuda_shuffle(x, lane, LANE_FROM); }
template <typename T> inline T __shfl_xor_sync(unsigned, T x, int lane) { return cuda_shuffle(x, lane, LANE_XOR); }
template <typename T> inline T __shfl_up_sync(unsigned, T x, int lane) { return cuda_shuffle(x, lane, LANE_UP); }
template <typename T> inline T __shfl_down_sync(unsigned, T x, int lane) { return cuda_shuffle(x, lane, LANE_DOWN); }
#define CUDA_REDUCE(NAME, WHAT) template <typename T> inline T __reduce_##NAME##_sync(unsigned, T x) { \
    cuda::word mine[1] = {cuda::word(x)}; const auto given = cuda::exchange(mine, LANE_REDUCE); \
    T all = T(given[0][0]); for (int i = 1; i < 32; i++) { T y = T(given[i][0]); all = WHAT; } return all; }
CUDA_REDUCE(add, T(cuda::word(all) + cuda::word(y))) CUDA_REDUCE(min, all < y ? all : y) CUDA_REDUCE(max, all < y ? y : all)
CUDA_REDUCE(and, all & y) CUDA_REDUCE(or, all | y) CUDA_REDUCE(xor, all ^ y)

#define CUDA_ATOMIC(NAME, WHAT) template <typename T> inline T atomic##NAME(T *cell, T x) { \
    T old = *cell; *cell = WHAT; return old; }
CUDA_ATOMIC(Add, T(old + x)) CUDA_ATOMIC(Min, old < x ? old : x) CUDA_ATOMIC(Max, old < x ? x : old) CUDA_ATOMIC(Exch, x)
CUDA_ATOMIC(And, old & x) CUDA_ATOMIC(Or, old | x) CUDA_ATOMIC(Xor, old ^ x)
template <typename T> inline T atomicCAS(T *cell, T expected, T x) {
    T old = *cell;
    if (old == expected) *cell = x;
    return old;
}

inline size_type __cvta_generic_to_shared(const void *x) {
    size_type at = (const unsigned char *)x - cuda::shared;
    if (at > cuda::shared_bytes) cuda::fail("a pointer that is not into shared memory");
    return at + cuda::SHARED_AT;
}
inline void *__cvta_shared_to_generic(unsigned int at) { return cuda::shared_cell(at, 1); }

// ------------------------------------------------------------------------------- instructions of PTX, by their names

namespace ptx {

using cuda::address;
using cuda::word;

template <typename... T> inline void nothing(T &&...) { }
inline void fence_proxy_async_shared_cta() { }

inline void cvt_rn_f16_f32(unsigned short &to, float x) { to = cuda_bits<unsigned short>((_Float16)x); }
inline void cvt_f32_f16(float &to, unsigned short x) { to = cuda::half_number(x); }
inline void cvt_rn_bf16_f32(unsigned short &to, float x) {
    word bits = cuda_bits<word>(x);
    to = x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline void mov_b32(unsigned short &low, unsigned short &high, word x) { low = x, high = x >> 16; }
inline void mov_b32(word &to, unsigned short low, unsigned short high) { to = low | word(high) << 16; }
inline void mov_b32(float &to, unsigned short low, unsigned short high) {
    to = cuda_bits<float>(low | word(high) << 16);
}
#define PTX_HALF(NAME, SIGN) inline void NAME##_rn_f16(unsigned short &to, unsigned short x, unsigned short y) { \
    to = cuda_bits<unsigned short>((_Float16)(cuda_bits<_Float16>(x) SIGN cuda_bits<_Float16>(y))); }
PTX_HALF(add, +) PTX_HALF(sub, -) PTX_HALF(mul, *)
inline void ex2_approx_ftz_f32(float &to, float x) { to = __builtin_exp2f(x); }

template <typename A, typename B> inline int dp4a(word x, word y, int z) {
    for (int i = 0; i < 32; i += 8) z += int(A(x >> i)) * int(B(y >> i));
    return z;
}
#define PTX_DP4A(NAME, A, B) inline void dp4a_##NAME(int &to, word x, word y, int z) { to = dp4a<A, B>(x, y, z); }
PTX_DP4A(s32_s32, signed char, signed char) PTX_DP4A(s32_u32, signed char, unsigned char)
PTX_DP4A(u32_s32, unsigned char, signed char) PTX_DP4A(u32_u32, unsigned char, unsigned char)

// Sums of the products of two words, one after another.
struct halves { static void add(float &c, word x, word y) {
    c += cuda::half_number(x) * cuda::half_number(y), c += cuda::half_number(x >> 16) * cuda::half_number(y >> 16); } };
struct bfloats { static void add(float &c, word x, word y) {
    c += cuda::bfloat_number(x) * cuda::bfloat_number(y), c += cuda::bfloat_number(x >> 16) * cuda::bfloat_number(y >> 16); } };
struct floats { static void add(float &c, word x, word y) {      // the lowest 13 bits are not looked at
    c += cuda_bits<float>(x & ~0x1fffu) * cuda_bits<float>(y & ~0x1fffu); } };
template <typename A, typename B> struct bytes { static void add(int &c, word x, word y) { c = dp4a<A, B>(x, y, c); } };

// c [16, 8] += a b. Lane 4 g + t has rows g and g + 8 of a and column g of b, products t of each word; of c columns 2 t, 2 t + 1.
template <typename How, int A, typename C> inline void mma(C (&c)[4], const word *mine) {
    word given[A + A / 2], lane = cuda::current->index.x & 31;
    memcpy(given, mine, sizeof given);
    const auto all = cuda::exchange(given, LANE_MMA);
    for (int i = 0; i < 4; i++)
        for (int h = 0; h < A / 2; h++)
            for (int t = 0; t < 4; t++)
                How::add(c[i], all[lane / 4 * 4 + t][2 * h + i / 2], all[(2 * (lane % 4) + i % 2) * 4 + t][A + h]);
}
#define PTX_MMA4(NAME, HOW, C) inline void mma_sync_aligned_##NAME(C &c0, C &c1, C &c2, C &c3, \
        word a0, word a1, word a2, word a3, word b0, word b1) { \
    C c[4] = {c0, c1, c2, c3}; word x[6] = {a0, a1, a2, a3, b0, b1}; \
    mma<HOW, 4>(c, x); c0 = c[0], c1 = c[1], c2 = c[2], c3 = c[3]; }
#define PTX_MMA2(NAME, HOW, C) inline void mma_sync_aligned_##NAME(C &c0, C &c1, C &c2, C &c3, word a0, word a1, word b0) { \
    C c[4] = {c0, c1, c2, c3}; word x[3] = {a0, a1, b0}; mma<HOW, 2>(c, x); c0 = c[0], c1 = c[1], c2 = c[2], c3 = c[3]; }
#define PTX_BYTES(TYPES, A, B) using TYPES##_bytes = bytes<A, B>; \
    PTX_MMA4(m16n8k32_row_col_s32_##TYPES##_s32, TYPES##_bytes, int) PTX_MMA2(m16n8k16_row_col_s32_##TYPES##_s32, TYPES##_bytes, int)
PTX_MMA4(m16n8k16_row_col_f32_f16_f16_f32, halves, float) PTX_MMA4(m16n8k16_row_col_f32_bf16_bf16_f32, bfloats, float)
PTX_MMA4(m16n8k8_row_col_f32_tf32_tf32_f32, floats, float)
PTX_BYTES(s8_s8, signed char, signed char) PTX_BYTES(u8_u8, unsigned char, unsigned char)
PTX_BYTES(s8_u8, signed char, unsigned char) PTX_BYTES(u8_s8, unsigned char, signed char)

template <int N, bool TURNED> inline void ldmatrix(word *to, word at) {
    word mine[1] = {at}, lane = cuda::current->index.x & 31;
    const auto rows = cuda::exchange(mine, LANE_LDMATRIX);
    for (int i = 0; i < N; i++) {
        if (!TURNED) {
            memcpy(to + i, cuda::shared_cell(rows[8 * i + lane / 4][0], 16) + lane % 4 * 4, 4);
            continue;
        }
        for (int j = 0; j < 2; j++)
            memcpy((char *)(to + i) + 2 * j, cuda::shared_cell(rows[8 * i + lane % 4 * 2 + j][0], 16) + lane / 4 * 2, 2);
    }
}
#define PTX_LDMATRIX(NAME, TURNED) \
    inline void ldmatrix_sync_aligned_m8n8_x1##NAME(word &a, word at) { ldmatrix<1, TURNED>(&a, at); } \
    inline void ldmatrix_sync_aligned_m8n8_x2##NAME(word &a, word &b, word at) { \
        word x[2]; ldmatrix<2, TURNED>(x, at); a = x[0], b = x[1]; } \
    inline void ldmatrix_sync_aligned_m8n8_x4##NAME(word &a, word &b, word &c, word &d, word at) { \
        word x[4]; ldmatrix<4, TURNED>(x, at); a = x[0], b = x[1], c = x[2], d = x[3]; }
PTX_LDMATRIX(_shared_b16, false) PTX_LDMATRIX(_trans_shared_b16, true)

inline void griddepcontrol_launch_dependents() { }
inline void keep(const void *p) { asm volatile("" :: "r"(p) : "memory"); }  // no access moves over it
template <typename... T> inline void griddepcontrol_wait(T *...pointers) {
    (keep(pointers), ...);
    for (; cuda_late_count; cuda_late_count--) {
        const cuda::late &l = cuda_late[cuda_late_count - 1];
        memcpy(l.to, l.from, l.nbytes);
    }
    (keep(pointers), ...);
}
inline void cp_async_cg_shared_global(word to, const void *from, int nbytes = 16) {
    cuda::thread &t = *cuda::current;
    if (t.copies_made == cuda::COPIES) cuda::fail("too many asynchronous copies at a time");
    if ((address)from % 16 && nbytes) cuda::fail("an asynchronous copy from a misaligned address");
    unsigned char *cell = cuda::shared_cell(to, 16);
    memset(cell, 0xff, 16);
    t.copies[t.copies_made++] = {cell, from, nbytes, t.copy_groups};
}
inline void cp_async_commit_group() { cuda::current->copy_groups++; }
inline void cp_async_wait_group(word pending) {
    cuda::thread &t = *cuda::current;
    word kept = 0;
    for (word i = 0; i < t.copies_made; i++) {
        cuda::copy c = t.copies[i];
        if (c.group + pending >= t.copy_groups) {
            t.copies[kept++] = c;
            continue;
        }
        memset(c.to, 0, 16);
        memcpy(c.to, c.from, c.nbytes);
    }
    t.copies_made = kept;
}

inline void wgmma_fence_sync_aligned() { cuda::word x[1] = {}; cuda::exchange(x, LANE_WGMMA); }
inline void wgmma_commit_group_sync_aligned() { cuda::current->product_groups++; }
inline void wgmma_wait_group_sync_aligned(word pending) {
    cuda::thread &t = *cuda::current;
    word kept = 0;
    for (word i = 0; i < t.products_made; i++) {
        cuda::product p = t.products[i];
        if (p.group + pending >= t.product_groups) t.products[kept++] = p;
        else if (p.seen != cuda::contents(p)) cuda::fail("shared memory changes while a matrix product reads it");
    }
    t.products_made = kept;
}
// c += a b for this thread's two rows of a and quarter of the columns of b.
template <int FORM, int N> void wgmma(float *const (&cells)[N], const float (&a)[2][16], cuda::product p) {
    cuda::thread &t = *cuda::current;
    if (t.products_made == cuda::PRODUCTS) cuda::fail("too many asynchronous products at a time");
    p.n = 2 * N, p.group = t.product_groups, p.seen = cuda::contents(p);
    t.products[t.products_made++] = p;
    for (int i = 0; i < N / 2; i++) {
        float &first = *cells[i / 2 * 4 + i % 2], &second = *cells[i / 2 * 4 + i % 2 + 2];
        for (int k = 0; k < 16; k++) {
            float b = cuda::number(FORM, cuda::described(p.b, p.b_turned, cuda::column_of(i), k));
            first += a[0][k] * b, second += a[1][k] * b;
        }
    }
}
template <int FORM, int N> void wgmma(float *const (&cells)[N], address a, address b, int a_turned, int b_turned, int one) {
    float rows[2][16];
    for (int i = 0; i < 32; i++)
        rows[i / 16][i % 16] = cuda::number(FORM, cuda::described(a, a_turned, cuda::first_row() + i / 16 * 8, i % 16));
    if (!one) cuda::fail("a product that does not add");
    wgmma<FORM>(cells, rows, cuda::product{a, b, 0, 0, bool(a_turned), bool(b_turned), 0});
}
template <int FORM, int N>
void wgmma(float *const (&cells)[N], word a0, word a1, word a2, word a3, address b, int b_turned, int one) {
    word mine[4] = {a0, a1, a2, a3}, lane = cuda::current->index.x & 31;
    const auto all = cuda::exchange(mine, LANE_WGMMA);
    float rows[2][16];
    for (int i = 0; i < 32; i++)
        rows[i / 16][i % 16] = cuda::number(FORM, all[lane / 4 * 4 + i % 8 / 2][i / 16 + i % 16 / 8 * 2] >> i % 2 * 16);
    if (!one) cuda::fail("a product that does not add");
    wgmma<FORM>(cells, rows, cuda::product{0, b, 0, 0, false, bool(b_turned), 0});
}
#define PTX_WGMMA(N) \
    template <int M, typename... T> void wgmma_mma_async_sync_aligned_m64n##N##k16_f32_f16_f16(float *const (&c)[M], T... x) { \
        static_assert(2 * M == N, "as many cells"); wgmma<cuda::FP16>(c, x...); } \
    template <int M, typename... T> void wgmma_mma_async_sync_aligned_m64n##N##k16_f32_bf16_bf16(float *const (&c)[M], T... x) { \
        static_assert(2 * M == N, "as many cells"); wgmma<cuda::BF16>(c, x...); }
PTX_WGMMA(8) PTX_WGMMA(16) PTX_WGMMA(32) PTX_WGMMA(64) PTX_WGMMA(128) PTX_WGMMA(256)

}  // namespace ptx

"""CUDA C++ that generated kernels build on: the types, and functions that are written out where a kernel uses them."""

from __future__ import annotations

from nitinol.compiler.gpu.effects import LOG_RECORDS, RECORD_WORDS

HEADER = """using schar = signed char;
using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using long64 = long long;
using ulong64 = unsigned long long;
#define INLINE __device__ __forceinline__
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)

template <typename T, int N> struct alignas(N * sizeof(T)) Vector { T at[N]; };

template <typename To, typename From> INLINE To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "as many bits");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}
"""

_NARROW = """struct {name} {{
    ushort bits;
    {name}() = default;
    INLINE explicit {name}(float x) {{ asm("cvt.rn.{ptx}.f32 %0, %1;" : "=h"(bits) : "f"(x)); }}
    template <typename T> INLINE explicit {name}(T x) : {name}(odd_float(x)) {{ }}
    INLINE operator float() const {{ {to_float} }}
}};
INLINE {name} {name}_of(ushort bits) {{ {name} x; x.bits = bits; return x; }}
INLINE {name} operator-({name} x) {{ return {name}_of(x.bits ^ 0x8000); }}
INLINE {name} operator+({name} x, {name} y) {{ {add} }}
INLINE {name} operator-({name} x, {name} y) {{ {sub} }}
INLINE {name} operator*({name} x, {name} y) {{ {mul} }}
INLINE {name} operator/({name} x, {name} y) {{ return {name}(float(x) / float(y)); }}"""


def _native(kind: str, ptx: str) -> dict[str, str]:
    text = 'ushort z; asm("{0}.rn.{1} %0, %1, %2;" : "=h"(z) : "h"(x.bits), "h"(y.bits)); return {2}_of(z);'
    return {op: text.format(op, ptx, kind) for op in ("add", "sub", "mul")}


_SHUFFLE = """template <typename T> INLINE T NAME(T x, int lane) {
    if constexpr (sizeof(T) == 8) return bits_as<T>(HOW(0xffffffffu, bits_as<ulong64>(x), lane));
    else if constexpr (sizeof(T) == 4) return bits_as<T>(HOW(0xffffffffu, bits_as<uint>(x), lane));
    else if constexpr (sizeof(T) == 2) return bits_as<T>(ushort(HOW(0xffffffffu, uint(bits_as<ushort>(x)), lane)));
    else return T(HOW(0xffffffffu, uint(x), lane));
}"""

def _mma(name: str, shape: str, types: str, words: int) -> str:
    """One warp's product of matrices, with a in `words` registers and b in half as many."""
    kind, register = ("float", "f") if types.startswith("f32") else ("int", "r")
    c = ", ".join(f'"+{register}"(c[{i}])' for i in range(4))
    given = ", ".join(f'"r"(bits_as<uint>({x}[{i}]))' for x, n in (("a", words), ("b", words // 2)) for i in range(n))
    numbers = [f"%{4 + i}" for i in range(words + words // 2)]
    a, b = ", ".join(numbers[:words]), ", ".join(numbers[words:])
    return f"""template <typename A, typename B>
INLINE void {name}({kind} (&c)[4], const A (&a)[{words}], const B (&b)[{words // 2}]) {{
    asm("mma.sync.aligned.{shape}.row.col.{types} {{%0, %1, %2, %3}}, {{{a}}}, {{{b}}}, {{%0, %1, %2, %3}};"
        : {c}
        : {given});
}}"""


def _wgmma(name: str, ptx: str, n: int, where: str) -> str:
    """c[at], c[at + 1], ... += a b for 64 rows and n columns; a in shared memory or in registers."""
    count = n // 2
    cells = ", ".join(f'"+f"(c[at + {i // 4}][{i % 4}])' for i in range(count))
    targets = ", ".join(f"%{i}" for i in range(count))
    if where == "memory":
        parameters, operand = "int A_TURNED, int B_TURNED, int C", "ulong64 a"
        given, turned = f"%{count}", f"%{count + 2}, %{count + 3}"
        inputs = '"l"(a), "l"(b), "n"(A_TURNED), "n"(B_TURNED)'
        second, one = f"%{count + 1}", f"%{count + 4}"
    else:
        parameters, operand = "int B_TURNED, int C", "const uint (&a)[4]"
        given = "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}"
        turned, inputs = f"%{count + 5}", '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(B_TURNED)'
        second, one = f"%{count + 4}", f"%{count + 6}"
    return f"""template <{parameters}> INLINE void {name}(float (&c)[C][4], int at, {operand}, ulong64 b) {{
    asm volatile("{{ .reg .pred p; setp.ne.b32 p, {one}, 0; "
        "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{ptx}.{ptx} {{{targets}}}, {given}, {second}, "
        "p, 1, 1, {turned}; }}"
        : {cells}
        : {inputs}, "r"(1));
}}"""


def _ldmatrix(count: int, trans: str) -> str:
    """Functions that fill words of one matrix, or of two of half as many."""
    name, how = f"ldmatrix_x{count}{trans}", f"ldmatrix.sync.aligned.m8n8.x{count}{trans.replace('_', '.')}.shared.b16"
    targets = ", ".join(f"%{i}" for i in range(count))
    text = ""
    for arrays in (1, 2) if count > 1 else (1,):
        each = count // arrays
        parameters = ", ".join(f"uint (&{x})[{each}]" for x in "xy"[:arrays])
        outputs = ", ".join(f'"=r"({x}[{i}])' for x in "xy"[:arrays] for i in range(each))
        text += f"""INLINE void {name}({parameters}, uint address) {{
    asm volatile("{how} {{{targets}}}, [%{count}];" : {outputs} : "r"(address) : "memory");
}}
"""
    return text.rstrip()


HELPERS = {
    "odd_float": """// The float nearest towards 0, with its last bit set if that is not the number:
// rounding it once more, to 16 bits, gives what rounding the number would.
INLINE float sticky(float near, bool exact) { return exact ? near : __int_as_float(__float_as_int(near) | 1); }
INLINE float odd_float(int x) { float f = __int2float_rz(x); return sticky(f, int(f) == x); }
INLINE float odd_float(uint x) { float f = __uint2float_rz(x); return sticky(f, uint(f) == x); }
INLINE float odd_float(long64 x) { float f = __ll2float_rz(x); return sticky(f, long64(f) == x); }
INLINE float odd_float(ulong64 x) { float f = __ull2float_rz(x); return sticky(f, ulong64(f) == x); }
INLINE float odd_float(double x) { float f = __double2float_rz(x); return sticky(f, double(f) == x || x != x); }""",
    "half": _NARROW.format(
        name="half", ptx="f16", to_float='float x; asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits)); return x;',
        **_native("half", "f16"),
    ),
    "bfloat": _NARROW.format(
        name="bfloat", ptx="bf16",
        to_float='float x; asm("mov.b32 %0, {%1, %2};" : "=f"(x) : "h"(ushort(0)), "h"(bits)); return x;',
        **{op: f"return bfloat(float(x) {sign} float(y));" for op, sign in (("add", "+"), ("sub", "-"), ("mul", "*"))},
    ),
    **{
        name: _SHUFFLE.replace("NAME", name).replace("HOW", f"__{name.replace('shuffle', 'shfl')}_sync")
        for name in ("shuffle", "shuffle_xor", "shuffle_up", "shuffle_down")
    },
    "quotient_by": """// x / d by way of 1 / d
INLINE float quotient_by(float x, float d, float inverse) {
    float q = x * inverse;
    return fma(fma(-q, d, x), inverse, q);
}""",
    "ordinary": """// Whether no step of quotient_by can over- or underflow; inverse() gives NaN where one might.
INLINE bool ordinary(float x, float inverse) {
    float size = fabs(x);
    return (size <= 0x1p60f) & ((size >= 0x1p-60f) | (x == 0.0f)) & (inverse == inverse);
}""",
    "inverse": """INLINE float inverse(float d) {
    float size = fabs(d);
    return size >= 0x1p-40f && size <= 0x1p40f ? 1.0f / d : NAN;
}""",
    # One instruction, to 2 units in the last place; CUDA's exp2 takes three more for results below 2**-126.
    "power_of_two": """INLINE float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
INLINE double power_of_two(double x) { return exp2(x); }""",
    # Triton's: 2**(x log2 e), whose rounded exponent costs up to |x| units in the last place. CUDA's exp takes 8
    # instructions, with which a cross entropy loses a quarter of its speed.
    "exponential": """INLINE float exponential(float x) { return power_of_two(x * 1.44269504f); }
INLINE double exponential(double x) { return exp(x); }""",
    # 16 bytes of a half block of 34: 5 loads and 4 shifts instead of 8 loads and 4 PRMT. A warp's load of these takes a
    # cycle of the L1 cache for each of the 5 lines that it touches, which at 8 loads was what limited the kernel.
    "loose_load": """// N words at `past` = 0 or 2 bytes past an aligned address, from all aligned words with bytes
// of them.
template <int N> INLINE Vector<uint, N> loose_load(const void *from, uint past) {
    const uchar *first = (const uchar *)from - past, *last = (const uchar *)from + past;
    Vector<uint, N> words;
    uint low = *(const uint *)first;
#pragma unroll
    for (int i = 0; i < N; i++) {
        uint high = *(const uint *)((i < N - 1 ? first + 4 : last) + 4 * i);
        words.at[i] = __funnelshift_r(low, high, past << 3);
        low = high;
    }
    return words;
}""",
    "opaque": """INLINE int opaque(int x) {
    asm("" : "+r"(x));
    return x;
}""",
    "mulhi": """INLINE int mulhi(int x, int y) { return __mulhi(x, y); }
INLINE uint mulhi(uint x, uint y) { return __umulhi(x, y); }
INLINE long64 mulhi(long64 x, long64 y) { return __mul64hi(x, y); }
INLINE ulong64 mulhi(ulong64 x, ulong64 y) { return __umul64hi(x, y); }""",
    # Division by 0 gives 0 and leaves the dividend as remainder; the smallest integer by -1 wraps.
    "quotient": """template <typename T> INLINE T quotient(T x, T y) {
    return y == 0 ? T(0) : T(-1) < T(0) && y == T(-1) ? T(0ull - ulong64(x)) : T(x / y);
}""",
    "modulo": """template <typename T> INLINE T modulo(T x, T y) {
    return y == 0 ? x : T(-1) < T(0) && y == T(-1) ? T(0) : T(x % y);
}""",
    "nan_min": "template <typename T> INLINE T nan_min(T x, T y) { return x != x ? x : y != y ? y : fmin(x, y); }",
    "nan_max": "template <typename T> INLINE T nan_max(T x, T y) { return x != x ? x : y != y ? y : fmax(x, y); }",
    # Sums and differences of the bytes of words: the carry into a byte's top bit is kept out of the next byte.
    "add_bytes": """INLINE uint add_bytes(uint x, uint y) {
    return ((x & 0x7f7f7f7fu) + (y & 0x7f7f7f7fu)) ^ ((x ^ y) & 0x80808080u);
}""",
    "sub_bytes": """INLINE uint sub_bytes(uint x, uint y) {
    return ((x | 0x80808080u) - (y & 0x7f7f7f7fu)) ^ ((x ^ ~y) & 0x80808080u);
}""",
    **{
        f"dot4_{a}{b}": f"""INLINE int dot4_{a}{b}(uint x, uint y, int z) {{
    int sum;
    asm("dp4a.{a}32.{b}32 %0, %1, %2, %3;" : "=r"(sum) : "r"(x), "r"(y), "r"(z));
    return sum;
}}"""
        for a in "su" for b in "su"
    },
    "log_value": f"""INLINE void log_value(uint *log, uint site, uint3 group, uint place, ulong64 value) {{
    uint record = atomicAdd(log, 1u);
    if (record >= {LOG_RECORDS}) return;
    uint *words = log + 1 + {RECORD_WORDS} * record;
    words[0] = site; words[1] = group.x; words[2] = group.y; words[3] = group.z;
    words[4] = place; words[5] = uint(value); words[6] = uint(value >> 32);
}}""",
    # Atomics whose old value is used order memory around them, as those of Triton do: locks are made of them.
    "compare_and_swap": """template <typename T> INLINE T compare_and_swap(T *cell, T expected, T desired) {
    __threadfence();
    T old;
    if constexpr (sizeof(T) == 8) {
        old = bits_as<T>(atomicCAS((ulong64 *)cell, bits_as<ulong64>(expected), bits_as<ulong64>(desired)));
    } else if constexpr (sizeof(T) == 4) {
        old = bits_as<T>(atomicCAS((uint *)cell, bits_as<uint>(expected), bits_as<uint>(desired)));
    } else {
        old = bits_as<T>(atomicCAS((ushort *)cell, bits_as<ushort>(expected), bits_as<ushort>(desired)));
    }
    __threadfence();
    return old;
}""",
    "atomic_add": """template <typename T> INLINE T atomic_add(T *cell, T x) {
    if constexpr (sizeof(T) == 8) return T(atomicAdd((ulong64 *)cell, ulong64(x)));
    else return atomicAdd(cell, x);
}
INLINE double atomic_add(double *cell, double x) { return atomicAdd(cell, x); }""",
    "atomic_xchg": """template <typename T> INLINE T atomic_xchg(T *cell, T x) {
    __threadfence();
    T old;
    if constexpr (sizeof(T) == 8) old = bits_as<T>(atomicExch((ulong64 *)cell, bits_as<ulong64>(x)));
    else old = bits_as<T>(atomicExch((uint *)cell, bits_as<uint>(x)));
    __threadfence();
    return old;
}""",
    **{
        f"atomic_{name.lower()}": f"""template <typename T> INLINE T atomic_{name.lower()}(T *cell, T x) {{
    return atomic{name}(cell, x);
}}"""
        for name in ("Min", "Max", "And", "Or", "Xor")
    },
    "Min": "struct Min { template <typename T> INLINE static T of(T x, T y) { return T(fmin(x, y)); } };",
    "Max": "struct Max { template <typename T> INLINE static T of(T x, T y) { return T(fmax(x, y)); } };",
    "Add": "struct Add { template <typename T> INLINE static T of(T x, T y) { return x + y; } };",
    "Xchg": "struct Xchg { template <typename T> INLINE static T of(T x, T y) { return y; } };",
    "same_bits": """template <typename T> INLINE bool same_bits(T x, T y) {
    if constexpr (sizeof(T) == 8) return bits_as<ulong64>(x) == bits_as<ulong64>(y);
    else if constexpr (sizeof(T) == 4) return bits_as<uint>(x) == bits_as<uint>(y);
    else return bits_as<ushort>(x) == bits_as<ushort>(y);
}""",
    "atomic_update": """template <typename How, typename T> INLINE T atomic_update(T *cell, T x) {
    for (T old = *cell;;) {
        T found = compare_and_swap(cell, old, How::of(old, x));
        if (same_bits(found, old)) return found;
        old = found;
    }
}""",
    "pack": """template <typename T> INLINE uint pack(T x) { return bits_as<uint>(x); }
template <typename T> INLINE uint pack(T x, T y) {
    uint word;
    asm("mov.b32 %0, {%1, %2};" : "=r"(word) : "h"(bits_as<ushort>(x)), "h"(bits_as<ushort>(y)));
    return word;
}
template <typename T> INLINE uint pack(T x, T y, T z, T w) {
    return uint(uchar(x)) | uint(uchar(y)) << 8 | uint(uchar(z)) << 16 | uint(uchar(w)) << 24;
}""",
    **{
        f"mma_{name}_{k}": _mma(f"mma_{name}_{k}", f"m16n8k{k}", types, words)
        for name, k, types, words in (
            ("fp16", 16, "f32.f16.f16.f32", 4), ("bf16", 16, "f32.bf16.bf16.f32", 4),
            ("fp32", 8, "f32.tf32.tf32.f32", 4),
            *((name, k, f"s32.{ptx}.s32", k // 8) for k in (16, 32) for name, ptx in (
                ("int8", "s8.s8"), ("uint8", "u8.u8"), ("int8_uint8", "s8.u8"), ("uint8_int8", "u8.s8"))),
        )
    },
    # By mov, as ptxas sees through it both where halves become floats and where they are packed again.
    **{
        f"{name}_half": f"""template <typename T> INLINE T {name}_half(uint word) {{
    ushort lower, upper;
    asm("mov.b32 {{%0, %1}}, %2;" : "=h"(lower), "=h"(upper) : "r"(word));
    return bits_as<T>({name});
}}"""
        for name in ("lower", "upper")
    },
    # What is stored is computed before the condition is looked at, which leaves one instruction under a predicate. The
    # compiler would put off all that leads to it, behind a branch, and keep what it needs for that in registers.
    "store_if": """template <typename T, int N> INLINE void store_if(bool condition, void *at, Vector<T, N> x) {
    uint words[N * sizeof(T) / 4];
    memcpy(words, &x, sizeof(x));
#pragma unroll
    for (int i = 0; i < N * sizeof(T) / 4; i++) asm volatile("" : "+r"(words[i]));
    memcpy(&x, words, sizeof(x));
    if (condition) *(Vector<T, N> *)at = x;
}""",
    "shared_address": """INLINE uint shared_address(const void *x) { return uint(__cvta_generic_to_shared(x)); }""",
    "shared_store": """template <typename T, int N> INLINE void shared_store(uint address, Vector<T, N> x) {
    *(Vector<T, N> *)__cvta_shared_to_generic(address) = x;
}""",
    "shared_load": """template <typename T> INLINE T shared_load(uint address) {
    return *(T *)__cvta_shared_to_generic(address);
}""",
    "cp_async": """INLINE void cp_async(uint to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(to), "l"(from) : "memory");
}
INLINE void cp_async(uint to, const void *from, bool inside) {
    int nbytes = inside ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(from), "r"(nbytes) : "memory");
}""",
    "cp_async_commit": """INLINE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }""",
    "cp_async_wait": """template <int pending> INLINE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" :: "n"(pending) : "memory");
}""",
    **{
        f"ldmatrix_x{count}{trans}": _ldmatrix(count, trans)
        for count in (1, 2, 4) for trans in ("", "_trans")
    },
    # Matrix instructions of four warps, asynchronous: between the fence and the wait nobody may touch accumulators.
    "fence_shared": """// What this thread wrote to shared memory is seen by matrix instructions.
INLINE void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }""",
    "wgmma_fence": """INLINE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }""",
    "wgmma_commit": """INLINE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }""",
    "wgmma_wait": """template <int pending> INLINE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(pending) : "memory");
}""",
    "settle": """// The compiler keeps reads of c behind this, and writes before it.
template <int C> INLINE void settle(float (&c)[C][4]) {
#pragma unroll
    for (int i = 0; i < C; i++)
        asm volatile("" : "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3]) :: "memory");
}
template <int C> INLINE void settle(float (&c)[C]) {
#pragma unroll
    for (int i = 0; i < C; i++) asm volatile("" : "+f"(c[i]) :: "memory");
}""",
    "uniform": "INLINE uint uniform(uint x) { return __shfl_sync(0xffffffffu, x, 0); }",
    "descriptor": """// Where and how a matrix lies in shared memory: bytes between its parts, and the swizzle.
INLINE ulong64 descriptor(uint address, uint leading, uint stride, uint swizzle) {
    return ulong64(address >> 4 & 0x3fff) | ulong64(leading >> 4) << 16 | ulong64(stride >> 4) << 32
        | ulong64(swizzle) << 62;
}""",
    **{
        f"wgmma_{name}_{n}_{where}": _wgmma(f"wgmma_{name}_{n}_{where}", ptx, n, where)
        for name, ptx in (("fp16", "f16"), ("bf16", "bf16")) for n in (8, 16, 32, 64, 128, 256)
        for where in ("memory", "registers")
    },
}

"""The Metal dialect: everything that the emitter's text needs and that differs between GPU languages.

A CUDA dialect is another module with these names; the emitter takes the module. A matrix instruction is described by
its fragments, which are layouts, and by the text that fills, multiplies and reads one: nothing else is known of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from nitinol.compiler.gpu.dot import Fragment, Instruction
from nitinol.compiler.gpu.effects import LOG_RECORDS, RECORD_WORDS
from nitinol.compiler.gpu.layout import LANE_BITS
from nitinol.compiler.ir import Op
from nitinol.language.types import DType, PointerType, bfloat16, float16, float32, float64, int1

NAME = "Metal"
LANGUAGE = "msl"  # the key of the source among a kernel's texts
SHARED_LIMIT = 32768  # bytes of threadgroup memory of every Apple GPU
SHARED_ROOMY = 16384  # up to here conversions get memory of their own; with more, fewer threadgroups share a core
MOST_THREADS = 1024
ASYNCHRONOUS = False  # whether loads go to threadgroup memory ahead of time (pipeline.py)
RUNS = (16, 8, 4)  # bytes that a thread loads side by side, of elements smaller than 4 bytes: the choices
PIECES = (2.0, 10.0)  # prices of 64 bytes that a simdgroup touches, and where others do too: from a cache, at best
PREDICATES = False  # whether a load under a condition is one instruction
DIRECT = False  # whether small loads are made by all threads that want them, not by one of them for all
RESIDENT = 0  # threads that a core shall have at least, where the language lets one say so
LOOSE = False  # whether words at even addresses are made of aligned ones
MOST_BUFFERS = 31
EARLY_START = False  # whether a kernel may start while those before it run, and waits for them itself

TYPES = {
    "int1": "bool", "int8": "char", "int16": "short", "int32": "int", "int64": "long", "uint8": "uchar",
    "uint16": "ushort", "uint32": "uint", "uint64": "ulong", "fp16": "half", "bf16": "bfloat", "fp32": "float",
}  # fmt: skip
SUFFIXES = {"int32": "", "uint32": "u", "int64": "l", "uint64": "ul"}  # of numbers in the text
OPTIONS = ()

# What a variable must not be called: words of the language and functions that the emitter uses.
RESERVED = frozenset(
    """INFINITY MAXFLOAT M_PI_F NAN abs alignas alignof all and any arguments array as_type asm atomic auto barrier
    bfloat bfloat2 bfloat4 bool break buffer case catch ceil char char4 clamp class clz coherent compl const
    constant constexpr continue cos cross ctz decltype default delete depth2d device discard_fragment distance
    do dot double dynamic_cast else enum erf exp exp2 explicit export extern false fast float float2 float3
    float4 floor fma fmax fmin fmod for fract fragment friend function_ref generic global goto grid group half
    half2 half4 if imageblock inline int int2 int3 int32_t int4 intersection isnan kernel lane length local log
    log2 long main matrix max mesh metal min mix mulhi modulo mutable namespace new noexcept normalize not nullptr
    object operator or packed patch pipe popcount pow precise private protected public quad quotient r ray_data register
    reinterpret_cast restrict return rotate round rsqrt sampler saturate scratch select short short4 sign signed
    simd simd_shuffle simd_shuffle_xor simd_sum simdgroup sin size_t sizeof sqrt static static_assert status
    step struct switch tanh template texture texture2d this thread threadgroup throw tile true trunc try typedef
    typeid typename uchar uchar4 uint uint2 uint3 uint4 ulong uniform union unsigned ushort ushort4 using vec
    vertex visible void volatile warp while wide xor""".split()
)

HEADER = """#include <metal_stdlib>
using namespace metal;
"""


class Unsupported(Exception):
    """What Metal lacks, as the end of a sentence about an operation."""


def type_name(element: DType | PointerType) -> str:
    if isinstance(element, PointerType):
        return f"device {memory_type(element.element)} *"
    if element == float64:
        raise Unsupported("fp64: Apple GPUs have no 64-bit floats; use fp32")
    return TYPES[element.name]


def memory_type(element: DType) -> str:
    """The type of an element in device memory."""
    return "uchar" if element == int1 else type_name(element)


def shared_pointer(element: DType | PointerType, name: str, offset: int) -> str:
    """Declares a view of the threadgroup memory."""
    kind = "ulong" if isinstance(element, PointerType) else type_name(element)  # pointers as numbers
    return f"threadgroup {kind} *{name} = (threadgroup {kind} *)(scratch + {offset});"


def shared_memory(nbytes: int) -> str:
    return f"threadgroup ulong scratch_memory[{(nbytes + 7) // 8}];\n    " \
        "threadgroup uchar *scratch = (threadgroup uchar *)scratch_memory;"  # fmt: skip


def barrier(spaces: set[str]) -> str:
    flags = " | ".join(f"mem_flags::mem_{space}" for space in sorted(spaces))
    return f"threadgroup_barrier({flags});"


def vector(element: DType, count: int) -> str:
    return f"{memory_type(element)}{count}"


def wide_load(element: DType, count: int, address: str) -> tuple[str, str, list[str]]:
    """Type, text and the elements' texts (of a variable `wide`) of one load of 2, 4, 8 or 16 neighbours."""
    if count <= 4:
        kind = vector(element, count)
        return kind, f"*(device {kind} *)({address})", [f"wide.{c}" for c in "xyzw"[:count]]
    words, each = count * element.nbytes // 4, 4 // element.nbytes
    part = vector(element, each)
    parts = [f"as_type<{part}>(wide.{c}).{d}" for c in "xyzw"[:words] for d in "xyzw"[:each]]
    return f"uint{words}", f"*(device uint{words} *)({address})", parts


def wide_store(element: DType, address: str, values: Sequence[str], condition: str = "") -> str:
    guard = f"if ({condition}) " if condition else ""
    if len(values) <= 4:
        kind = vector(element, len(values))
        return f"{guard}*(device {kind} *)({address}) = {kind}({', '.join(values)});"
    each = 4 // element.nbytes
    part = vector(element, each)
    words = [f"as_type<uint>({part}({', '.join(values[i : i + each])}))" for i in range(0, len(values), each)]
    return f"{guard}*(device uint{len(words)} *)({address}) = uint{len(words)}({', '.join(words)});"


# ---------------------------------------------------------------------------------------------------------- lanes


SHUFFLES = {"from": "simd_shuffle", "xor": "simd_shuffle_xor", "up": "simd_shuffle_up", "down": "simd_shuffle_down"}


def shuffle(element: DType | PointerType, value: str, lane: str, which: str = "from") -> str:
    """The value of another lane: lane number `lane`, or own number xor, minus ("up") or plus ("down") it.

    The language shuffles numbers of 16 and 32 bits and vectors of those.
    """
    how = SHUFFLES[which]
    if isinstance(element, PointerType):
        bits = f"as_type<uint2>((ulong)({value}))"
        return f"({type_name(element)})as_type<ulong>({how}({bits}, ushort({lane})))"
    if element == int1:
        return f"bool({how}(ushort({value}), ushort({lane})))"
    if element == bfloat16:
        return f"as_type<bfloat>({how}(as_type<ushort>({value}), ushort({lane})))"
    if element.nbytes == 8:
        return f"as_type<{type_name(element)}>({how}(as_type<uint2>({value}), ushort({lane})))"
    return f"{how}({value}, ushort({lane}))"


def reduce_lanes(kind: str, element: DType, value: str) -> str | None:
    """A reduction over all lanes in one operation, the same in every lane; None if there is none of that meaning."""
    names = {"add": "sum", "mul": "product", "and": "and", "or": "or", "xor": "xor", "min": "min", "max": "max"}
    if element.nbytes not in (2, 4) or element == bfloat16 or kind not in names:
        return None
    return f"simd_{names[kind]}({value})"


# ------------------------------------------------------------------------------------------------------ arithmetic

UNROLL = "#pragma clang loop unroll(full)"


def bit_cast(kind: str, text: str) -> str:
    return f"as_type<{kind}>({text})"


def narrow_number(element: DType, value: float, text: str) -> str:
    """A constant of a 16-bit float type."""
    return f"{type_name(element)}({text})"


def wide_byte(text: str) -> str:
    """A byte on its way to a wider type."""
    return text


def zero(element: DType) -> str:
    return f"{type_name(element)}(0)"


def to_number(pointer: str) -> str:
    """A pointer as a 64-bit number."""
    return f"(ulong)({pointer})"


FUNCTIONS = {
    name: f"precise::{name}" for name in "exp exp2 log log2 sqrt rsqrt sin cos tanh".split()
} | {"floor": "floor", "ceil": "ceil", "erf": "erf", "mulhi": "mulhi"}  # fmt: skip

BYTES = {"s": "char4", "u": "uchar4"}

# Division by 0 gives 0 and leaves the dividend as remainder; the smallest integer by -1 wraps.
HELPERS = {
    "quotient": """template <typename T> T quotient(T x, T y) {
    return y == 0 ? T(0) : T(-1) < T(0) && y == T(-1) ? T(0ul - ulong(x)) : T(x / y);
}""",
    "modulo": """template <typename T> T modulo(T x, T y) {
    return y == 0 ? x : T(-1) < T(0) && y == T(-1) ? T(0) : T(x % y);
}""",
    "nan_min": "template <typename T> T nan_min(T x, T y) { return x != x ? x : y != y ? y : fmin(x, y); }",
    "nan_max": "template <typename T> T nan_max(T x, T y) { return x != x ? x : y != y ? y : fmax(x, y); }",
    # Sums and differences of the bytes of words: the carry into a byte's top bit is kept out of the next byte.
    "add_bytes": """uint add_bytes(uint x, uint y) {
    return ((x & 0x7f7f7f7fu) + (y & 0x7f7f7f7fu)) ^ ((x ^ y) & 0x80808080u);
}""",
    "sub_bytes": """uint sub_bytes(uint x, uint y) {
    return ((x | 0x80808080u) - (y & 0x7f7f7f7fu)) ^ ((x ^ ~y) & 0x80808080u);
}""",
    **{
        f"dot4_{a}{b}": f"""int dot4_{a}{b}(uint x, uint y, int z) {{
    int4 products = int4(as_type<{BYTES[a]}>(x)) * int4(as_type<{BYTES[b]}>(y));
    return z + products.x + products.y + products.z + products.w;
}}"""
        for a in "su" for b in "su"
    },
    "log_value": f"""void log_value(device atomic_uint *log, uint site, uint3 group, uint place, ulong value) {{
    uint record = atomic_fetch_add_explicit(log, 1u, memory_order_relaxed);
    if (record >= {LOG_RECORDS}) return;
    device uint *words = (device uint *)(log + 1 + {RECORD_WORDS} * record);
    words[0] = site; words[1] = group.x; words[2] = group.y; words[3] = group.z;
    words[4] = place; words[5] = uint(value); words[6] = uint(value >> 32);
}}""",
    "compare_and_swap": """// The weak form may fail where the values are equal: then once more.
template <typename T, typename A> T compare_and_swap(device A *cell, T expected, T desired) {
    T found = expected;
    while (!atomic_compare_exchange_weak_explicit(cell, &found, desired, memory_order_relaxed, memory_order_relaxed)
           && found == expected) { }
    return found;
}""",
    "erf": """// 1 - exp(-t * p(t)) with t = |x|; below 1/2 the Taylor series, so that small results keep their digits.
float erf(float x) {
    float t = min(abs(x), 3.95f), q = x * x;
    float near = x * (1.1283791671f + q * (-0.3761263890f + q * (0.1128379167f + q * (-0.0268661706f
        + q * (0.0052239776f - 0.00085483270f * q)))));
    float p = -9.448724e-06f;
    p = p * t + 0.00011936129f;
    p = p * t - 0.0006389704f;
    p = p * t + 0.001678234f;
    p = p * t - 0.00017160283f;
    p = p * t - 0.019146996f;
    p = p * t + 0.102776185f;
    p = p * t + 0.63661957f;
    p = p * t + 0.12837917f;
    float far = copysign(1.0f - precise::exp(-t - t * p), x);
    return x != x ? x : t < 0.5f ? near : far;
}""",
}


# -------------------------------------------------------------------------------------------------------- matrices

# The 8x8 matrices of a simdgroup, two neighbours of a row per lane, as observed on Apple GPUs (MLX relies on it too).
MATRIX_SIDES = (8, 8, 8)  # rows, columns, products in a sum
BYTES_AS_HALVES = True  # they take no integers
_MATRIX = Fragment(((1, 0),), ((1, 1), (0, 0), (0, 1), (1, 2), (0, 2)))


def matrix_instruction(op: Op) -> Instruction | None:
    """simdgroup_matrix 8x8x8 for a dot, if it has these types and at least this size."""
    a, b, acc = op.operands
    large = all(x >= side for x, side in zip((a.shape[-2], b.shape[-1], a.shape[-1]), MATRIX_SIDES))
    fits = a.element == b.element and a.element in (float16, bfloat16, float32) and acc.element == float32
    return Instruction(_MATRIX, _MATRIX, _MATRIX) if large and fits else None


def prelude(text: str, wanted: set[str]) -> list[str]:
    """What stands before a kernel."""
    return [HEADER, *(HELPERS[name] + "\n" for name in sorted(wanted))]


def matrix_declare(element: DType, name: str, count: int, values: int) -> str:
    """Declares `count` matrices, of which each thread holds `values` elements."""
    return f"simdgroup_matrix<{TYPES[element.name]}, 8, 8> {name}[{count}];"


def matrix_set(matrix: str, values: Sequence[str], element: DType) -> list[str]:
    return [f"{matrix}.thread_elements()[{i}] = {v};" for i, v in enumerate(values)]


def matrix_get(matrix: str, number: int) -> str:
    return f"{matrix}.thread_elements()[{number}]"


def matrix_product(c: str, a: str, b: str, elements: Sequence[DType], instruction: Instruction) -> str:
    return f"simdgroup_multiply_accumulate({c}, {a}, {b}, {c});"


# ---------------------------------------------------------------------------------------------------------- atomics


def atomic_cas(element: DType, pointer: str, expected: str, desired: str, helpers: set[str]) -> str:
    """Returns the old value; floats are compared by their bits."""
    if element.bits != 32:
        raise Unsupported(f"{element}: Apple GPUs compare and swap 32-bit values only")
    helpers.add("compare_and_swap")
    if element.is_float:
        bits = f"(device atomic_uint *)({pointer}), as_type<uint>({expected}), as_type<uint>({desired})"
        return f"as_type<float>(compare_and_swap<uint>({bits}))"
    name = type_name(element)
    return f"compare_and_swap<{name}>((device atomic_{name} *)({pointer}), {expected}, {desired})"


def atomic(kind: str, element: DType, pointer: str, value: str) -> str:
    """Returns the old value. 32-bit integers, and float addition."""
    names = {"add": "add", "max": "max", "min": "min", "and": "and", "or": "or", "xor": "xor"}
    name = type_name(element)
    if element.bits == 32 and (element.is_int or kind in ("add", "xchg")):
        operation = "exchange" if kind == "xchg" else f"fetch_{names[kind]}"
        return f"atomic_{operation}_explicit((device atomic_{name} *)({pointer}), {value}, memory_order_relaxed)"
    raise Unsupported(f"{kind} of {element}: Apple GPUs have them for 32-bit integers and add for fp32")


# ---------------------------------------------------------------------------------------------------------- kernel


def kernel(name: str, parameters: Sequence[tuple[str, str]], fields: Sequence[tuple[str, str]], threads: int,
           asserts: bool, prints: bool, meeting: Sequence[bool], resident: int) -> tuple[str, str]:  # fmt: skip
    """The struct of scalar arguments and the kernel's head.

    `parameters`: element type and name of each buffer; `fields`: type and name of each scalar. The grid's extents end
    the struct. `meeting`: which buffers may share memory with another.
    """
    lines = [f"struct {name}_arguments {{"]
    lines += [f"    {kind} {field};" for kind, field in fields]
    lines += ["    int grid[3];", "};", ""]
    head = [f"[[kernel, max_total_threads_per_threadgroup({threads})]] void {name}("]
    for number, (kind, parameter) in enumerate(parameters):
        head.append(f"    device {kind} *{parameter} [[buffer({number})]],")
    head.append(f"    constant {name}_arguments &arguments [[buffer({len(parameters)})]],")
    if asserts:
        head.append(f"    device atomic_uint *status [[buffer({len(parameters) + 1})]],")
    if prints:
        head.append(f"    device atomic_uint *log [[buffer({len(parameters) + 1 + asserts})]],")
    head += [
        "    uint3 group [[threadgroup_position_in_grid]],",
        "    ushort lane [[thread_index_in_simdgroup]],",
        "    ushort warp [[simdgroup_index_in_threadgroup]])",
        "{",
    ]
    return "\n".join(lines), "\n".join(head)


def program_id(axis: int) -> str:
    return f"int(group.{'xyz'[axis]})"


def log_bits(element: DType | PointerType, text: str) -> str:
    """A value as the 64 bits of a record: floats as float, integers extended."""
    if isinstance(element, PointerType):
        return to_number(text)
    if element.is_float:
        return f"ulong(as_type<uint>(float({text})))"
    return f"ulong(long({text}))" if element.is_signed else f"ulong({text})"


def fail(number: int) -> str:
    """Records that an assertion does not hold."""
    return f"atomic_store_explicit(status, {number}u, memory_order_relaxed);"


assert LANE_BITS == 5

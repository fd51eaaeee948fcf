"""The Metal dialect: everything that the emitter's text needs and that differs between GPU languages.

A CUDA dialect is another module with these names; the emitter takes the module. Fragments of matrix instructions are
layouts, so the emitter needs no other knowledge of them than `matrix_fragments` and the text of one product.
"""

from __future__ import annotations

from collections.abc import Sequence

from nitinol.compiler.gpu.layout import LANE_BITS
from nitinol.compiler.ir import Op
from nitinol.language.types import DType, PointerType, bfloat16, float16, float32, float64, int1

NAME = "Metal"
SHARED_LIMIT = 32768  # bytes of threadgroup memory of every Apple GPU
SHARED_ROOMY = 16384  # up to here conversions get memory of their own; with more, fewer threadgroups share a core
MOST_THREADS = 1024
MOST_BUFFERS = 31

TYPES = {
    "int1": "bool", "int8": "char", "int16": "short", "int32": "int", "int64": "long", "uint8": "uchar",
    "uint16": "ushort", "uint32": "uint", "uint64": "ulong", "fp16": "half", "bf16": "bfloat", "fp32": "float",
}  # fmt: skip

# What a variable must not be called: words of the language and functions that the emitter uses.
RESERVED = frozenset(
    """alignas alignof and asm atomic auto bfloat bfloat2 bfloat4 bool break buffer case catch char class compl const
    constant constexpr continue decltype default delete device discard_fragment do double dynamic_cast else enum
    explicit export extern false float for fragment friend goto half if inline int int32_t kernel lane long metal mutable
    namespace new noexcept not nullptr object operator or patch precise fast private protected public r ray_data
    register reinterpret_cast restrict return sampler scratch short signed size_t sizeof static static_assert struct
    switch template texture this thread threadgroup throw true try typedef typeid typename uchar uint ulong union
    unsigned ushort using vertex visible void volatile warp while wide xor arguments status grid group as_type select min max
    abs exp exp2 log log2 sqrt rsqrt sin cos tanh erf floor ceil fma fmod fmin fmax mulhi isnan clamp sign step mix dot
    length cross distance normalize round trunc fract pow any all popcount clz ctz rotate saturate INFINITY NAN quad
    simd_sum simd_shuffle simd_shuffle_xor barrier vec matrix packed array half2 half4 float2 float3 float4 int2 int3
    int4 uint2 uint3 uint4 char4 uchar4 short4 ushort4 local global generic pipe uniform M_PI_F MAXFLOAT main
    simdgroup simd coherent depth2d texture2d imageblock mesh intersection function_ref tile""".split()
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
    kind = "ulong" if isinstance(element, PointerType) else type_name(element)
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


def wide_store(element: DType, address: str, values: Sequence[str]) -> str:
    if len(values) <= 4:
        kind = vector(element, len(values))
        return f"*(device {kind} *)({address}) = {kind}({', '.join(values)});"
    each = 4 // element.nbytes
    part = vector(element, each)
    words = [f"as_type<uint>({part}({', '.join(values[i : i + each])}))" for i in range(0, len(values), each)]
    return f"*(device uint{len(words)} *)({address}) = uint{len(words)}({', '.join(words)});"


# ---------------------------------------------------------------------------------------------------------- lanes


def shuffle(element: DType | PointerType, value: str, lane: str, how: str = "simd_shuffle") -> str:
    """The value that another lane has. The language shuffles numbers of 16 and 32 bits and vectors of those."""
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


def shuffle_xor(element: DType | PointerType, value: str, mask: int) -> str:
    return shuffle(element, value, str(mask), "simd_shuffle_xor")


def reduce_lanes(kind: str, element: DType, value: str) -> str | None:
    """A reduction over all lanes in one operation, the same in every lane; None if there is none of that meaning."""
    names = {"add": "sum", "mul": "product", "and": "and", "or": "or", "xor": "xor", "min": "min", "max": "max"}
    if element.nbytes not in (2, 4) or element == bfloat16 or kind not in names:
        return None
    return f"simd_{names[kind]}({value})"


# ------------------------------------------------------------------------------------------------------ arithmetic

FUNCTIONS = {
    name: f"precise::{name}" for name in "exp exp2 log log2 sqrt rsqrt sin cos tanh".split()
} | {"floor": "floor", "ceil": "ceil", "erf": "erf"}  # fmt: skip

HELPERS = {
    "nan_min": "template <typename T> T nan_min(T x, T y) { return x != x ? x : y != y ? y : fmin(x, y); }",
    "nan_max": "template <typename T> T nan_max(T x, T y) { return x != x ? x : y != y ? y : fmax(x, y); }",
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

MATRIX_TYPES = {float16: "half", bfloat16: "bfloat", float32: "float"}
MATRIX_SIDE_BITS = 3

# The 8x8 matrices of a simdgroup, two neighbours of a row per lane, as observed on Apple GPUs (MLX relies on it too):
# (row bit or column bit, place) of the register bit and of the five lane bits.
MATRIX_REGISTER = ("column", 0)
MATRIX_LANES = (("column", 1), ("row", 0), ("row", 1), ("column", 2), ("row", 2))


def matrix_supported(op: Op) -> bool:
    """Whether a dot can go through simdgroup_matrix."""
    a, b, acc = op.operands
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    return a.element == b.element and a.element in MATRIX_TYPES and acc.element == float32 and min(m, n, k) >= 8


def matrix_declare(element: DType, name: str, count: int) -> str:
    return f"simdgroup_matrix<{MATRIX_TYPES[element]}, 8, 8> {name}[{count}];"


def matrix_set(name: str, index: str, values: tuple[str, str]) -> list[str]:
    return [f"{name}[{index}].thread_elements()[{i}] = {v};" for i, v in enumerate(values)]


def matrix_get(name: str, index: str, part: int) -> str:
    return f"{name}[{index}].thread_elements()[{part}]"


def matrix_product(c: str, a: str, b: str) -> str:
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
           asserts: bool) -> tuple[str, str]:  # fmt: skip
    """The struct of scalar arguments and the kernel's head.

    `parameters`: element type and name of each buffer; `fields`: type and name of each scalar. The grid's extents end
    the struct.
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
    head += [
        "    uint3 group [[threadgroup_position_in_grid]],",
        "    ushort lane [[thread_index_in_simdgroup]],",
        "    ushort warp [[simdgroup_index_in_threadgroup]])",
        "{",
    ]
    return "\n".join(lines), "\n".join(head)


def program_id(axis: int) -> str:
    return f"int(group.{'xyz'[axis]})"


def fail(number: int) -> str:
    """Records that an assertion does not hold."""
    return f"atomic_store_explicit(status, {number}u, memory_order_relaxed);"


assert LANE_BITS == 5

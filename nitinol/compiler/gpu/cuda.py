"""The CUDA dialect: C++ for NVRTC, without headers, for compute capability 8.0 and newer.

The 16-bit floats are structs of their bits with the conversions of PTX, so that nothing needs to be installed but the
compiler. Products go through `mma.sync` (mma.py); the fragments are those of the PTX manual.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from types import ModuleType

import numpy as np

from nitinol.compiler.gpu import metal
from nitinol.compiler.gpu.cuda_helpers import HEADER as HEADER
from nitinol.compiler.gpu.cuda_helpers import HELPERS as HELPERS
from nitinol.compiler.gpu.dot import Fragment, Instruction
from nitinol.compiler.ir import Op
from nitinol.compiler.semantics import to_memory
from nitinol.language.types import DType, PointerType, bfloat16, float16, float32, int1, int8, int32, uint8

NAME = "CUDA"
LANGUAGE = "cuda"  # the key of the source among a kernel's texts
OPTIONS = ("--std=c++17",)
SHARED_LIMITS = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
SHARED_LIMIT = SHARED_LIMITS[90]
SHARED_ROOMY = 32768  # up to here conversions get memory of their own; with more, fewer blocks share a multiprocessor
MOST_THREADS = 1024
ASYNCHRONOUS = True  # whether loads go to shared memory ahead of time (pipeline.py)
WARP_GROUPS = True  # wgmma, of compute capability 9.0 only
RUNS = (16, 32, 8, 4)  # bytes that a thread loads side by side, of elements smaller than 4 bytes: the choices
PIECES = (0.125, 0.125)  # prices of 64 bytes that a warp touches, and where other warps do too: the L1 cache has them
PREDICATES = True  # whether a load under a condition is one instruction
DIRECT = True  # whether small loads are made by all threads that want them, not by one of them for all
# Threads that a multiprocessor shall have where four products of bytes are added in an instruction: with 128 registers
# for each, all loads of a matrix-vector product's run come before the first is used. Left to itself NVRTC gives 64 to
# blocks of one warp, and waits for memory two or three times a run.
RESIDENT = 512
LOOSE = True  # whether words at even addresses are made of aligned ones (loose_load)
EARLY_START = True  # programmatic dependent launch, of compute capability 9.0 and newer
MOST_BUFFERS = 480  # 8 bytes each of the 4 KB of a kernel's parameters

TYPES = {
    "int1": "bool", "int8": "schar", "int16": "short", "int32": "int", "int64": "long64", "uint8": "uchar",
    "uint16": "ushort", "uint32": "uint", "uint64": "ulong64", "fp16": "half", "bf16": "bfloat", "fp32": "float",
    "fp64": "double",
}  # fmt: skip
SUFFIXES = {"int32": "", "uint32": "u", "int64": "ll", "uint64": "ull"}

RESERVED = metal.RESERVED | frozenset(
    """Vector __global__ __shared__ asm atomicAdd atomicAnd atomicCAS atomicExch atomicMax atomicMin atomicOr atomicXor
    at blockDim blockIdx cbrt double exp10 fabs gridDim long64 memcpy pow rcbrt schar sinpi threadIdx tgamma typedef
    ulong64 unroll warpSize""".split()
)


@functools.cache
def for_capability(capability: int) -> ModuleType:
    """This dialect for GPUs of another compute capability than 9.0, 86 for 8.6."""
    if capability < 80:
        raise ValueError(f"compute capability {capability / 10} is too old: kernels need 8.0 or newer")
    module = ModuleType(f"{__name__}_{capability}")
    module.__dict__.update(globals())
    module.__dict__["SHARED_LIMIT"] = SHARED_LIMITS.get(capability, min(SHARED_LIMITS.values()))
    module.__dict__["WARP_GROUPS"] = capability == 90
    module.__dict__["EARLY_START"] = capability >= 90
    return module


class Unsupported(Exception):
    """What CUDA lacks, as the end of a sentence about an operation."""


def type_name(element: DType | PointerType) -> str:
    if isinstance(element, PointerType):
        return f"{memory_type(element.element)} *"
    return TYPES[element.name]


def memory_type(element: DType) -> str:
    """The type of an element in device memory."""
    return "uchar" if element == int1 else type_name(element)


def shared_pointer(element: DType | PointerType, name: str, offset: int) -> str:
    """Declares a view of the block's shared memory."""
    kind = "ulong64" if isinstance(element, PointerType) else type_name(element)  # pointers as numbers
    return f"{kind} *{name} = ({kind} *)(scratch + {offset});"


def shared_memory(nbytes: int) -> str:
    return "extern __shared__ __align__(1024) uchar scratch[];"


def barrier(spaces: set[str]) -> str:
    return "__syncthreads();"


LET_NEXT_START = 'asm volatile("griddepcontrol.launch_dependents;");'  # once all blocks have come here or ended


def wait_for_previous(pointers: Sequence[str]) -> list[str]:
    """Waits until the kernels before this one have ended and what they wrote is visible.

    The pointers are operands because the compiler could otherwise take memory that this kernel only reads for constant
    (they are __restrict__), and does load from it before the wait.
    """
    groups = [pointers[i : i + 16] for i in range(0, len(pointers), 16)] or [()]
    texts = [", ".join(f'"l"({pointer})' for pointer in group) for group in groups]
    return [f'asm volatile("{"" if i else "griddepcontrol.wait;"}" :: {t} : "memory");' for i, t in enumerate(texts)]


def wide_load(element: DType, count: int, address: str) -> tuple[str, str, list[str]]:
    """Type, text and the elements' texts (of a variable `wide`) of one load of 2, 4, 8 or 16 neighbours.

    Elements of 16 bits come as words: the compiler keeps those of a struct in a register each.
    """
    name = memory_type(element)
    if element.nbytes == 2:
        kind = f"Vector<uint, {count // 2}>"
        parts = [f"{half}_half<{name}>(wide.at[{i}])" for i in range(count // 2) for half in ("lower", "upper")]
    else:
        kind, parts = f"Vector<{name}, {count}>", [f"wide.at[{i}]" for i in range(count)]
    return kind, f"*({kind} *)({address})", parts


def wide_value(element: DType, values: Sequence[str]) -> str:
    """An initialiser of what `wide_load` loads."""
    if element.nbytes == 2:
        name = memory_type(element)
        values = [f"pack<{name}>({low}, {high})" for low, high in zip(values[::2], values[1::2])]
    return f"{{{{{', '.join(values)}}}}}"


def loose_load(count: int, address: str, past: str) -> tuple[str, str, list[str]]:
    """The same for 32-bit words at an address of bytes that is `past` & 2 past a multiple of 4."""
    read = f"loose_load<{count}>({address}, {past} & 2)"
    return f"Vector<uint, {count}>", read, [f"wide.at[{i}]" for i in range(count)]


def wide_store(element: DType, address: str, values: Sequence[str], condition: str = "") -> str:
    kind = wide_load(element, len(values), address)[0]
    value = f"{kind}{wide_value(element, values)}"
    if condition and len(values) * element.nbytes >= 4:
        return f"store_if({condition}, {address}, {value});"
    return f"{f'if ({condition}) ' if condition else ''}*({kind} *)({address}) = {value};"


# ---------------------------------------------------------------------------------------------------------- lanes

SHUFFLES = {"from": "shuffle", "xor": "shuffle_xor", "up": "shuffle_up", "down": "shuffle_down"}


def shuffle(element: DType | PointerType, value: str, lane: str, which: str = "from") -> str:
    """The value of another lane: lane number `lane`, or own number xor, minus ("up") or plus ("down") it."""
    if isinstance(element, PointerType):
        return f"({type_name(element)}){SHUFFLES[which]}((ulong64)({value}), {lane})"
    return f"{SHUFFLES[which]}({value}, {lane})"


def reduce_lanes(kind: str, element: DType, value: str) -> str | None:
    """A reduction over all lanes in one operation, the same in every lane; None if there is none of that meaning."""
    if element.bits != 32 or element.is_float or kind not in ("add", "min", "max", "and", "or", "xor"):
        return None
    if kind in ("and", "or", "xor"):
        return f"{type_name(element)}(__reduce_{kind}_sync(0xffffffffu, uint({value})))"
    return f"__reduce_{kind}_sync(0xffffffffu, {value})"


# ------------------------------------------------------------------------------------------------------ arithmetic

UNROLL = "#pragma unroll"


def bit_cast(kind: str, text: str) -> str:
    return f"bits_as<{kind}>({text})"


def narrow_number(element: DType, value: float, text: str) -> str:
    """A constant of a 16-bit float type, by its bits."""
    bits = int(to_memory(np.asarray(value, np.float16 if element == float16 else np.float32), element).view(np.uint16))
    return f"{type_name(element)}_of(0x{bits:04x})"


def wide_byte(text: str) -> str:
    """A byte as an int, hidden: NVRTC 12.9 and 13.0 make sums of products of bytes into dp4a and dp2a, and lose a
    byte's shift to the right in doing so, or (bytes 0 and 2 of a word) its sign."""
    return f"opaque({text})"


def zero(element: DType) -> str:
    return f"{type_name(element)}{{}}"


def to_number(pointer: str) -> str:
    """A pointer as a 64-bit number."""
    return f"(ulong64)({pointer})"


FUNCTIONS = {
    name: name for name in "log log2 sqrt rsqrt sin cos tanh floor ceil erf".split()
} | {"exp": "exponential", "exp2": "power_of_two", "mulhi": "mulhi"}  # fmt: skip


def prelude(text: str, wanted: set[str]) -> list[str]:
    """Definitions that stand before a kernel: those that its text mentions and those that they mention."""
    found: set[str] = set()
    pending = [text, *wanted]
    while pending:
        words = set(re.findall(r"\w+", pending.pop()))
        new = {name for name in HELPERS if name in words or f"{name}_of" in words} - found
        found |= new
        pending += [HELPERS[name] for name in new]
    return [HEADER, *(HELPERS[name] + "\n" for name in HELPERS if name in found)]


# -------------------------------------------------------------------------------------------------------- matrices

BYTES_AS_HALVES = False
MATRIX_SIDES = (16, 8, 8)  # rows, columns, products in a sum: fewer are rewritten or padded
_C = Fragment(((1, 0), (0, 3)), ((1, 1), (1, 2), (0, 0), (0, 1), (0, 2)))
HALVES = Instruction(  # m16n8k16
    Fragment(((1, 0), (0, 3), (1, 3)), ((1, 1), (1, 2), (0, 0), (0, 1), (0, 2))),
    Fragment(((0, 0), (0, 3)), ((0, 1), (0, 2), (1, 0), (1, 1), (1, 2))),
    _C,
)
BYTES = Instruction(  # m16n8k32
    Fragment(((1, 0), (1, 1), (0, 3), (1, 4)), ((1, 2), (1, 3), (0, 0), (0, 1), (0, 2))),
    Fragment(((0, 0), (0, 1), (0, 4)), ((0, 2), (0, 3), (1, 0), (1, 1), (1, 2))),
    _C,
)

HALF_BYTES = Instruction(  # m16n8k16 of bytes
    Fragment(((1, 0), (1, 1), (0, 3)), ((1, 2), (1, 3), (0, 0), (0, 1), (0, 2))),
    Fragment(((0, 0), (0, 1)), ((0, 2), (0, 3), (1, 0), (1, 1), (1, 2))),
    _C,
)
FLOATS = Instruction(  # m16n8k8, of floats cut to 10 bits of mantissa
    Fragment(((0, 3), (1, 2)), ((1, 0), (1, 1), (0, 0), (0, 1), (0, 2))),
    Fragment(((0, 2),), ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2))),
    _C,
)


def matrix_instruction(op: Op) -> Instruction | None:
    """mma.sync for a dot, if it has these types and at least this size."""
    a, b, acc = op.operands
    m, n, k = a.shape[-2], b.shape[-1], a.shape[-1]
    if a.element == b.element and a.element in (float16, bfloat16) and acc.element == float32:
        return HALVES if m >= 16 and n >= 8 and k >= 16 else None
    if a.element in (int8, uint8) and b.element in (int8, uint8) and acc.element == int32:
        return (BYTES if k >= 32 else HALF_BYTES) if m >= 16 and n >= 8 and k >= 16 else None
    if op.attributes.get("tf32"):
        return FLOATS if m >= 16 and n >= 8 and k >= 8 else None
    return None


def by_warp_groups(op: Op, warps: int) -> bool:
    """Whether a dot can go to wgmma, which four warps issue together for 64 rows."""
    a, b, acc = op.operands
    (m, k), n = a.shape[-2:], b.shape[-1]
    fits = a.element == b.element and a.element in (float16, bfloat16) and acc.element == float32
    groups = warps // 4
    return (
        fits and len(a.shape) == 2 and k >= 16 and m >= 64 and groups > 0
        and n >= 16 * max(1, groups // (m // 64)) * (2 if groups > m // 64 else 1)
    )  # fmt: skip


def matrix_declare(element: DType, name: str, count: int, values: int) -> str:
    """Declares `count` matrices, of which each thread holds `values` elements, packed into 32-bit words."""
    if element.nbytes >= 4:
        return f"{type_name(element)} {name}[{count}][{values}];"
    return f"uint {name}[{count}][{values * element.nbytes // 4}];"


def matrix_set(matrix: str, values: Sequence[str], element: DType) -> list[str]:
    if element.nbytes >= 4:
        return [f"{matrix}[{i}] = {v};" for i, v in enumerate(values)]
    each = 4 // element.nbytes
    words = [", ".join(values[i : i + each]) for i in range(0, len(values), each)]
    return [f"{matrix}[{i}] = pack({word});" for i, word in enumerate(words)]


def matrix_get(matrix: str, number: int) -> str:
    return f"{matrix}[{number}]"


def matrix_product(c: str, a: str, b: str, elements: Sequence[DType], instruction: Instruction) -> str:
    names = "_".join(dict.fromkeys(e.name for e in elements))
    return f"mma_{names}_{1 << instruction.a.bits(1)}({c}, {a}, {b});"


# ---------------------------------------------------------------------------------------------------------- atomics


def atomic_cas(element: DType, pointer: str, expected: str, desired: str, helpers: set[str]) -> str:
    """Returns the old value; floats are compared by their bits."""
    return f"compare_and_swap({pointer}, {expected}, {desired})"


def atomic(kind: str, element: DType, pointer: str, value: str) -> str:
    """Returns the old value."""
    if element.bits == 16 or (element.is_float and kind in ("min", "max")):
        return f"atomic_update<{kind.title()}>({pointer}, {value})"
    return f"atomic_{kind}({pointer}, {value})"


# ---------------------------------------------------------------------------------------------------------- kernel


def kernel(name: str, parameters: Sequence[tuple[str, str]], fields: Sequence[tuple[str, str]], threads: int,
           asserts: bool, prints: bool, meeting: Sequence[bool], resident: int) -> tuple[str, str]:  # fmt: skip
    """The struct of scalar arguments and the kernel's head. `resident`: how many blocks at least shall fit on a
    multiprocessor, 0 to leave it to NVRTC.

    `parameters`: element type and name of each pointer; `fields`: type and name of each scalar. The grid's extents end
    the struct. `meeting`: which pointers may share memory with another.
    """
    lines = [f"struct {name}_arguments {{"]
    lines += [f"    {kind} {field};" for kind, field in fields]
    lines += ["    int grid[3];", "};", ""]
    bounds = f"{threads}, {resident}" if resident else str(threads)
    head = [f'extern "C" __global__ void __launch_bounds__({bounds}) {name}(']
    for number, (kind, parameter) in enumerate(parameters):
        restrict = "" if meeting[number] else "__restrict__ "
        head.append(f"    {kind} *{restrict}{parameter},")
    head.append(f"    const __grid_constant__ {name}_arguments arguments,")
    if asserts:
        head.append("    uint *status,")
    if prints:
        head.append("    uint *log,")
    head[-1] = head[-1].rstrip(",") + ")"
    head += ["{", "    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;"]
    if prints:
        head.append("    const uint3 group = blockIdx;")
    return "\n".join(lines), "\n".join(head)


def program_id(axis: int) -> str:
    return f"int(blockIdx.{'xyz'[axis]})"


def log_bits(element: DType | PointerType, text: str) -> str:
    """A value as the 64 bits of a record: floats as float, integers extended."""
    if isinstance(element, PointerType):
        return to_number(text)
    if element.is_float:
        return f"ulong64(bits_as<uint>(float({text})))"
    return f"ulong64(long64({text}))" if element.is_signed else f"ulong64({text})"


def fail(number: int) -> str:
    """Records that an assertion does not hold."""
    return f"*(volatile uint *)status = {number}u;"


assert float32.nbytes == 4

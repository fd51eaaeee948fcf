"""The tile language, as `import nitinol.language as tl`: Triton's names and semantics (docs/tile-language.md)."""

# ruff: noqa: F401
from nitinol.language import extra as extra
from nitinol.language import math as math
from nitinol.language.autotune import Config, autotune, heuristics
from nitinol.language.block_pointer import advance, make_block_ptr, make_tensor_descriptor
from nitinol.language.combine import associative_scan, dot, reduce
from nitinol.language.core import block_type, constexpr, range, static_range, tensor
from nitinol.language.debug import (
    assume,
    debug_barrier,
    device_assert,
    device_print,
    max_constancy,
    max_contiguous,
    multiple_of,
    static_assert,
    static_print,
)
from nitinol.language.jit import JITFunction, Signature, jit, specialise
from nitinol.language.math import (
    PropagateNan,
    abs,
    ceil,
    clamp,
    cos,
    div_rn,
    erf,
    exp,
    exp2,
    fdiv,
    floor,
    fma,
    log,
    log2,
    maximum,
    minimum,
    rsqrt,
    sin,
    sqrt,
    sqrt_rn,
    tanh,
    umulhi,
)
from nitinol.language.memory import (
    atomic_add,
    atomic_and,
    atomic_cas,
    atomic_max,
    atomic_min,
    atomic_or,
    atomic_xchg,
    atomic_xor,
    load,
    store,
)
from nitinol.language.operations import arange, full, num_programs, program_id, where, zeros
from nitinol.language.operations import cast_to as cast
from nitinol.language.random import (
    pair_uniform_to_normal,
    philox,
    rand,
    rand4x,
    randint,
    randint4x,
    randn,
    randn4x,
    uint_to_uniform_float,
)
from nitinol.language.shapes import broadcast_both as broadcast
from nitinol.language.shapes import (
    broadcast_to,
    cat,
    expand_dims,
    gather,
    join,
    permute,
    reshape,
    split,
    trans,
    view,
)
from nitinol.language.standard import (
    argmax,
    argmin,
    cdiv,
    cumprod,
    cumsum,
    flip,
    full_like,
    interleave,
    max,
    min,
    next_power_of_2,
    ravel,
    reduce_or,
    sigmoid,
    softmax,
    sort,
    sum,
    swizzle2d,
    xor_sum,
    zeros_like,
)
from nitinol.language.types import DType as dtype
from nitinol.language.types import PointerType as pointer_type
from nitinol.language.types import (
    bfloat16,
    float16,
    float32,
    float64,
    int1,
    int8,
    int16,
    int32,
    int64,
    uint8,
    uint16,
    uint32,
    uint64,
)

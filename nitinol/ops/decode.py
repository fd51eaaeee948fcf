"""Quantised weights inside kernels: bytes to integers, scales and minimums, in registers.

`decode` reads a run of whole blocks of several rows; the layouts are those of nitinol/formats/blocks.py. All formats
come out the same way, as groups of 32 values:

    quants   int8 or uint8, a tuple of slices side by side: [rows, groups, 32], or twice [rows, groups, 16]
    scale    float32 [rows, groups, parts]      parts = 1, or 2 where every 16 values have a scale of their own
    minimum  the same, or None where the format has none
    value[r, g, i] = scale[r, g, p] * quant[r, g, i] + minimum[r, g, p]      with p = i // (32 // parts)

so one float decode and one integer product serve every format. Bytes are loaded in contiguous runs of 16 to 64; cutting
them into planes and putting planes side by side is a matter of which register is asked for, nothing is moved.
"""

# Kernels follow the tile language's types, which are not those that mypy sees in their Python.
# mypy: disable-error-code="attr-defined,arg-type,operator,assignment,misc"

from __future__ import annotations

import nitinol.language as tl
from nitinol.formats.blocks import FORMATS
from nitinol.language.jit import jit
from nitinol.ops.tiles import beside, stack

BLOCK_FORMATS = tuple(name for name, format in FORMATS.items() if format.values > 1)
FLOAT_FORMATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def blocks_per_run(format: str, columns: int, values: int = 256) -> int:
    """How many blocks of a row a kernel decodes at a time: the most that divide the row, at most `values` values.

    ValueError if a row of `columns` values is not a whole number of blocks.
    """
    block = FORMATS[format].values
    if columns % block:
        raise ValueError(f"{format} weights have rows of {columns} values, expected a multiple of {block}")
    blocks, run = columns // block, max(1, values // block)
    while blocks % run:
        run //= 2
    return run


def lanes_of(format: str) -> int:
    """Into how many 32-bit lanes a group's products of four bytes add up: a slice's bytes over 4."""
    return 4 if format in ("Q4_0", "Q4_1", "Q5_0", "Q5_1") else 8


def centre_of(format: str) -> int:
    """What `decode` subtracts from stored quants."""
    return {"Q3_K": 4, "Q4_0": 8, "Q5_0": 16, "Q6_K": 32}.get(format, 0)


def has_minimum(format: str) -> bool:
    """Whether `decode` gives a format a minimum."""
    return format in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")


@jit
def decode(row_pointers, first, FORMAT: tl.constexpr, BLOCKS: tl.constexpr, STORED: tl.constexpr = False):
    """Blocks first .. first + BLOCKS of rows that start at `row_pointers` (uint8 pointers [rows]).

    STORED: as suits the threads of a GPU. Quants are as they are stored, centre_of(FORMAT) too large; the first 16
    bytes of blocks of Q4_K and Q5_K come in one load instead of ten (with which a CPU's loop would be 265 instructions
    instead of 229).
    """
    if FORMAT == "Q8_0":
        return decode_q8_0(row_pointers, first, BLOCKS)
    if FORMAT == "Q4_0" or FORMAT == "Q4_1" or FORMAT == "Q5_0" or FORMAT == "Q5_1":
        return decode_4_5(row_pointers, first, BLOCKS, FORMAT == "Q5_0" or FORMAT == "Q5_1", FORMAT[-1] == "1", STORED)
    if FORMAT == "Q2_K":
        return decode_q2_k(row_pointers, first, BLOCKS)
    if FORMAT == "Q3_K":
        return decode_q3_k(row_pointers, first, BLOCKS, STORED)
    if FORMAT == "Q4_K" or FORMAT == "Q5_K":
        return decode_q4_k_q5_k(row_pointers, first, BLOCKS, FORMAT == "Q5_K", STORED)
    tl.static_assert(FORMAT == "Q6_K", "decode: not a block format of the kernels")
    return decode_q6_k(row_pointers, first, BLOCKS, STORED)


@jit
def decode_values(row_pointers, first, FORMAT: tl.constexpr, BLOCKS: tl.constexpr):
    """The same run as float32 values [rows, groups, 32], bit for bit those of formats.quantization.dequantize."""
    slices, scale, minimum = decode(row_pointers, first, FORMAT, BLOCKS)
    quants = side_by_side(slices)
    rows: tl.constexpr = quants.shape[0]
    groups: tl.constexpr = quants.shape[1]
    parts: tl.constexpr = scale.shape[2]
    quants = tl.reshape(quants, (rows, groups * parts, 32 // parts)).to(tl.float32)
    values = tl.reshape(scale, (rows, groups * parts))[:, :, None] * quants
    if minimum is not None:
        values += tl.reshape(minimum, (rows, groups * parts))[:, :, None]
    return tl.reshape(values, (rows, groups, 32))


@jit
def side_by_side(slices):
    """The slices of groups as one tile [rows, groups, 32]."""
    if len(slices) == 1:
        return slices[0]
    return beside(slices[0], slices[1])


# ------------------------------------------------------------------------------------------------ fields of blocks


@jit
def field(blocks, offset: tl.constexpr, count: tl.constexpr):
    """`count` bytes at an offset in each block: pointers [rows, blocks] to uint8 [rows, blocks, count]."""
    return tl.load(blocks[:, :, None] + (offset + tl.arange(0, count))[None, None, :])


@jit
def half(blocks, offset: tl.constexpr):
    """The float16 at an offset in each block, as float32 [rows, blocks]."""
    return tl.load((blocks + offset).to(tl.pointer_type(tl.float16), bitcast=True)).to(tl.float32)


@jit
def words(blocks):
    """The first 16 bytes of each block, which are aligned to 4: four tiles uint32 [rows, blocks]."""
    pointers = blocks.to(tl.pointer_type(tl.uint32), bitcast=True)
    four = tl.load(pointers[:, :, None] + tl.arange(0, 4)[None, None, :])
    even, odd = tl.split(tl.reshape(four, (blocks.shape[0], blocks.shape[1], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@jit
def bytes_of(words):
    """Words [rows, blocks] as four bytes each, in float32: [rows, blocks, 4]."""
    return ((words[:, :, None] >> (8 * tl.arange(0, 4))[None, None, :]) & 255).to(tl.float32)


@jit
def halves(words):
    """The float16 in the low halves of words, in float32."""
    return words.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@jit
def block_pointers(row_pointers, first, BLOCKS: tl.constexpr, BYTES: tl.constexpr):
    """Pointers [rows, BLOCKS] to blocks first, first + 1, ..."""
    return row_pointers[:, None] + (first * BYTES + tl.arange(0, BLOCKS) * BYTES)[None, :]


@jit
def planes(bytes, BITS: tl.constexpr):
    """Plane p of bytes [rows, n, span] is (byte >> BITS * p) & mask: uint8 [rows, n * 8 // BITS, span]."""
    span: tl.constexpr = bytes.shape[2]
    rows: tl.constexpr = bytes.shape[0]
    count: tl.constexpr = bytes.shape[1] * (8 // BITS)
    MASK: tl.constexpr = (1 << BITS) - 1
    if BITS == 4:
        both = stack(bytes & MASK, bytes >> 4)
    elif BITS == 2:
        both = four(bytes & MASK, (bytes >> 2) & MASK, (bytes >> 4) & MASK, bytes >> 6)
    else:
        low = four(bytes & 1, (bytes >> 1) & 1, (bytes >> 2) & 1, (bytes >> 3) & 1)
        high = four((bytes >> 4) & 1, (bytes >> 5) & 1, (bytes >> 6) & 1, bytes >> 7)
        both = tl.permute(tl.join(low, high), (0, 1, 4, 2, 3))
    return tl.reshape(both, (rows, count, span))


@jit
def four(a, b, c, d):
    """Four tiles [rows, n, span] as one [rows, n, 4, span]."""
    pairs = tl.join(tl.join(a, c), tl.join(b, d))  # [..., i, j] is tile 2 i + j
    pairs = tl.permute(pairs, (0, 1, 3, 4, 2))
    return tl.reshape(pairs, (a.shape[0], a.shape[1], 4, a.shape[2]))


# ---------------------------------------------------------------------------------------------------- the formats


@jit
def decode_q8_0(row_pointers, first, BLOCKS: tl.constexpr):
    """0 d f16; 2 quants i8[32]"""
    blocks = block_pointers(row_pointers, first, BLOCKS, 34)
    return (field(blocks, 2, 32).to(tl.int8, bitcast=True),), half(blocks, 0)[:, :, None], None


@jit
def decode_4_5(
    row_pointers, first, BLOCKS: tl.constexpr, FIVE: tl.constexpr, MINIMUM: tl.constexpr, STORED: tl.constexpr
):
    """0 d f16; [2 m f16;] [high 1:1 u8[4];] low 4:16 u8[16]. Without a minimum the quants are centred."""
    high_at: tl.constexpr = 4 if MINIMUM else 2
    low_at: tl.constexpr = high_at + 4 if FIVE else high_at
    blocks = block_pointers(row_pointers, first, BLOCKS, low_at + 16)
    bytes = field(blocks, low_at, 16)
    low, high = bytes & 15, bytes >> 4
    if FIVE:  # the four bytes lie at even addresses: two words of 16 bits, bit i of a word is its value i
        low |= sixteen_bits(blocks + high_at)
        high |= sixteen_bits(blocks + (high_at + 2))
    scale = half(blocks, 0)[:, :, None]
    if MINIMUM:
        return (low, high), scale, half(blocks, 2)[:, :, None]
    if STORED:
        return (low, high), scale, None
    CENTRE: tl.constexpr = 16 if FIVE else 8
    return (low.to(tl.int8, bitcast=True) - CENTRE, high.to(tl.int8, bitcast=True) - CENTRE), scale, None


@jit
def sixteen_bits(pointers):
    """The bits of a word of 16 bits as the fifth bits of 16 values: pointers [rows, blocks] to [rows, blocks, 16]."""
    word = tl.load(pointers.to(tl.pointer_type(tl.uint16), bitcast=True))[:, :, None]
    bit = (1 << tl.arange(0, 16)).to(tl.uint16)[None, None, :]
    return tl.where((word & bit) != 0, tl.full((1, 1, 1), 16, tl.uint8), tl.zeros((1, 1, 1), tl.uint8))


@jit
def decode_q2_k(row_pointers, first, BLOCKS: tl.constexpr):
    """0 scales u8[16]; 16 low 2:32 u8[64]; 80 d f16; 82 dmin f16"""
    blocks = block_pointers(row_pointers, first, BLOCKS, 84)
    scales = field(blocks, 0, 16)
    scale = half(blocks, 80)[:, :, None] * (scales & 15).to(tl.float32)
    minimum = -(half(blocks, 82)[:, :, None] * (scales >> 4).to(tl.float32))
    return (planes(runs(field(blocks, 16, 64), 32), 2),), runs(scale, 2), runs(minimum, 2)


@jit
def decode_q3_k(row_pointers, first, BLOCKS: tl.constexpr, STORED: tl.constexpr):
    """0 high 1:32 u8[32]; 32 low 2:32 u8[64]; 96 scales u8[12]; 108 d f16

    Scales: (bytes 0-7 as 4:8) + 16 * (bytes 8-11 as 2:4).
    """
    blocks = block_pointers(row_pointers, first, BLOCKS, 110)
    low = planes(runs(field(blocks, 32, 64), 32), 2)
    quants = low | (planes(field(blocks, 0, 32), 1) << 2)
    low_scales = tl.reshape(planes(field(blocks, 96, 8), 4), (low.shape[0], BLOCKS, 16))
    high_scales = tl.reshape(planes(field(blocks, 104, 4), 2), (low.shape[0], BLOCKS, 16))
    scales = (low_scales | (high_scales << 4)).to(tl.int8, bitcast=True) - 32
    scale = runs(half(blocks, 108)[:, :, None] * scales.to(tl.float32), 2)
    if STORED:
        return (quants,), scale, None
    return (quants.to(tl.int8, bitcast=True) - 4,), scale, None


@jit
def decode_q4_k_q5_k(row_pointers, first, BLOCKS: tl.constexpr, FIVE: tl.constexpr, STORED: tl.constexpr):
    """0 d f16; 2 dmin f16; 4 scales u8[12]; [16 high 1:32 u8[32];] low 4:32 u8[128]

    Scales, of 6 bits: 0-3 and minimums 0-3 are the low bits of bytes 0-3 and 4-7; 4-7 of both have their low four bits
    in bytes 8-11 and their high two at the top of bytes 0-3 and 4-7.
    """
    low_at: tl.constexpr = 48 if FIVE else 16
    blocks = block_pointers(row_pointers, first, BLOCKS, low_at + 128)
    quants = planes(runs(field(blocks, low_at, 128), 32), 4)
    if FIVE:
        quants |= planes(field(blocks, 16, 32), 1) << 4
    if STORED:
        head, high, low, both = words(blocks)
        scales = beside(bytes_of(high & 0x3F3F3F3F), bytes_of((both & 0x0F0F0F0F) | ((high >> 2) & 0x30303030)))
        minimums = beside(bytes_of(low & 0x3F3F3F3F), bytes_of(((both >> 4) & 0x0F0F0F0F) | ((low >> 2) & 0x30303030)))
        scale = halves(head)[:, :, None] * scales
        minimum = -(halves(head >> 16)[:, :, None] * minimums)
    else:
        a, b, c = field(blocks, 4, 4), field(blocks, 8, 4), field(blocks, 12, 4)
        scales = beside(a & 63, (c & 15) | ((a >> 6) << 4))
        minimums = beside(b & 63, (c >> 4) | ((b >> 6) << 4))
        scale = half(blocks, 0)[:, :, None] * scales.to(tl.float32)
        minimum = -(half(blocks, 2)[:, :, None] * minimums.to(tl.float32))
    return (quants,), runs(scale, 1), runs(minimum, 1)


@jit
def decode_q6_k(row_pointers, first, BLOCKS: tl.constexpr, STORED: tl.constexpr):
    """0 low 4:64 u8[128]; 128 high 2:32 u8[64]; 192 scales i8[16]; 208 d f16"""
    blocks = block_pointers(row_pointers, first, BLOCKS, 210)
    low = runs(planes(runs(field(blocks, 0, 128), 64), 4), 32)
    quants = low | (planes(runs(field(blocks, 128, 64), 32), 2) << 4)
    scales = field(blocks, 192, 16).to(tl.int8, bitcast=True)
    scale = runs(half(blocks, 208)[:, :, None] * scales.to(tl.float32), 2)
    if STORED:
        return (quants,), scale, None
    return (quants.to(tl.int8, bitcast=True) - 32,), scale, None


@jit
def runs(tile, LENGTH: tl.constexpr):
    """[rows, n, m] cut into runs: [rows, n * m // LENGTH, LENGTH]."""
    return tl.reshape(tile, (tile.shape[0], tile.shape[1] * tile.shape[2] // LENGTH, LENGTH))

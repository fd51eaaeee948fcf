"""Block formats of quantised weights: what the bytes mean.

A row of weights is cut into blocks of 32 or 256 values; each block keeps small integers and a scale. Every
block format here is one formula

    value[i] = scale[g] * quant[i] + minimum[g]          with g the group that holds i

evaluated in float32 as one product and one sum (no fused multiply-add); formats without a minimum leave the
sum out. `unpack` gives the three parts; `quantization.py` has the values (`dequantize`) and the way back (`quantize`).

Layouts (source: ggml's block structures; all fields little-endian, f16 is IEEE half, fields are packed with
no gaps, and blocks follow each other with no gaps, so a block starts at any even address):

**Planes.** `b:s` below means that a field holds b-bit integers in planes of s: cut the bytes into groups of s;
in each group byte j's lowest b bits are value j, its next b bits value j + s, the next j + 2s, and so on; the
next group goes on from there. So `4:16` puts values 0-15 into the low nibbles and 16-31 into the high ones.

| format | values | bytes | fields: offset name type                                                          |
| ------ | ------ | ----- | --------------------------------------------------------------------------------- |
| F32    | 1      | 4     | 0 value f32                                                                       |
| F16    | 1      | 2     | 0 value f16                                                                       |
| BF16   | 1      | 2     | 0 value: the upper 16 bits of an f32                                              |
| Q8_0   | 32     | 34    | 0 d f16; 2 quants i8[32]                                                          |
| Q4_0   | 32     | 18    | 0 d f16; 2 low 4:16 u8[16]                                                        |
| Q4_1   | 32     | 20    | 0 d f16; 2 m f16; 4 low 4:16 u8[16]                                               |
| Q5_0   | 32     | 22    | 0 d f16; 2 high 1:1 u8[4] (a u32: bit i is value i); 6 low 4:16 u8[16]            |
| Q5_1   | 32     | 24    | 0 d f16; 2 m f16; 4 high 1:1 u8[4]; 8 low 4:16 u8[16]                             |
| Q2_K   | 256    | 84    | 0 scales u8[16]; 16 low 2:32 u8[64]; 80 d f16; 82 dmin f16                        |
| Q3_K   | 256    | 110   | 0 high 1:32 u8[32]; 32 low 2:32 u8[64]; 96 scales u8[12]; 108 d f16               |
| Q4_K   | 256    | 144   | 0 d f16; 2 dmin f16; 4 scales u8[12]; 16 low 4:32 u8[128]                         |
| Q5_K   | 256    | 176   | 0 d f16; 2 dmin f16; 4 scales u8[12]; 16 high 1:32 u8[32]; 48 low 4:32 u8[128]    |
| Q6_K   | 256    | 210   | 0 low 4:64 u8[128]; 128 high 2:32 u8[64]; 192 scales i8[16]; 208 d f16            |

| format     | quant[i]                  | group | scale[g]              | minimum[g]                      |
| ---------- | ------------------------- | ----- | --------------------- | ------------------------------- |
| Q8_0       | quants                    | 32    | d                     |                                 |
| Q4_0       | low - 8                   | 32    | d                     |                                 |
| Q4_1       | low                       | 32    | d                     | m                               |
| Q5_0       | (low + 16 high) - 16      | 32    | d                     |                                 |
| Q5_1       | low + 16 high             | 32    | d                     | m                               |
| Q2_K       | low                       | 16    | d * (scales[g] & 15)  | -(dmin * (scales[g] >> 4))      |
| Q3_K       | (low + 4 high) - 4        | 16    | d * (s6[g] - 32)      |                                 |
| Q4_K       | low                       | 32    | d * sc[g]             | -(dmin * mn[g])                 |
| Q5_K       | low + 16 high             | 32    | d * sc[g]             | -(dmin * mn[g])                 |
| Q6_K       | (low + 16 high) - 32      | 16    | d * scales[g]         |                                 |

Q3_K's sixteen 6-bit scales: s6 = (scales[0:8] as 4:8) + 16 * (scales[8:12] as 2:4).
Q4_K's and Q5_K's eight 6-bit scales and minimums, with s = scales and g = 0..3:
    sc[g]     = s[g] & 63                              mn[g]     = s[g+4] & 63
    sc[g + 4] = (s[g+8] & 15) | (s[g] >> 6) << 4       mn[g + 4] = (s[g+8] >> 4) | (s[g+4] >> 6) << 4
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Blocks = NDArray[Any]  # one structured element per block, its dtype is the format's layout
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


class BlockFormat(NamedTuple):
    """One block format: `id` is ggml's number for it, `values` and `bytes` are per block, `group` is how many
    neighbouring values share a scale, `layout` is the block as a packed NumPy structure."""

    name: str
    id: int
    values: int
    bytes: int
    group: int
    layout: np.dtype[Any]

    def nbytes(self, values: int) -> int:
        """Bytes that hold `values` values; `values` must be a multiple of `self.values`."""
        return values // self.values * self.bytes


def _format(name: str, id: int, values: int, group: int, *fields: tuple[Any, ...]) -> BlockFormat:
    layout = np.dtype(list(fields))
    return BlockFormat(name, id, values, layout.itemsize, group, layout)


_D, _M, _DMIN = ("d", "<f2"), ("m", "<f2"), ("dmin", "<f2")
_LOW16, _LOW64, _LOW128 = ("low", "u1", 16), ("low", "u1", 64), ("low", "u1", 128)
_HIGH4, _HIGH32, _HIGH64 = ("high", "u1", 4), ("high", "u1", 32), ("high", "u1", 64)
_SCALES12, _SCALES16 = ("scales", "u1", 12), ("scales", "u1", 16)

FORMATS: dict[str, BlockFormat] = {
    format.name: format
    for format in (
        _format("F32", 0, 1, 1, ("value", "<f4")),
        _format("F16", 1, 1, 1, ("value", "<f2")),
        _format("BF16", 30, 1, 1, ("value", "<u2")),
        _format("Q8_0", 8, 32, 32, _D, ("quants", "i1", 32)),
        _format("Q4_0", 2, 32, 32, _D, _LOW16),
        _format("Q4_1", 3, 32, 32, _D, _M, _LOW16),
        _format("Q5_0", 6, 32, 32, _D, _HIGH4, _LOW16),
        _format("Q5_1", 7, 32, 32, _D, _M, _HIGH4, _LOW16),
        _format("Q2_K", 10, 256, 16, _SCALES16, _LOW64, _D, _DMIN),
        _format("Q3_K", 11, 256, 16, _HIGH32, _LOW64, _SCALES12, _D),
        _format("Q4_K", 12, 256, 32, _D, _DMIN, _SCALES12, _LOW128),
        _format("Q5_K", 13, 256, 32, _D, _DMIN, _SCALES12, _HIGH32, _LOW128),
        _format("Q6_K", 14, 256, 16, _LOW128, _HIGH64, ("scales", "i1", 16), _D),
    )
}


def planes(packed: Bytes, bits: int, span: int) -> Bytes:
    """The integers in `bits:span` planes: `[n, bytes]` uint8 to `[n, bytes * 8 // bits]` uint8."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    groups = packed.reshape(len(packed), -1, 1, span) >> shifts
    return (groups & np.uint8((1 << bits) - 1)).reshape(len(packed), -1)


def pack_planes(integers: NDArray[Any], bits: int, span: int) -> Bytes:
    """The inverse of `planes`; the integers must fit `bits` bits."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    groups = integers.astype(np.uint8).reshape(len(integers), -1, 8 // bits, span) << shifts
    return np.bitwise_or.reduce(groups, axis=2).reshape(len(integers), -1)


def _scales_and_minimums(packed: Bytes) -> tuple[NDArray[Any], NDArray[Any]]:
    """The 6-bit scales and minimums of Q4_K and Q5_K: `[n, 12]` to two `[n, 8]`."""
    a, b, c = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([a & 63, (c & 15) | (a >> 6) << 4], axis=1)
    minimums = np.concatenate([b & 63, (c >> 4) | (b >> 6) << 4], axis=1)
    return scales, minimums


def quants_of(blocks: Blocks, name: str) -> NDArray[np.int8]:
    """The integers of each block, int8 `[blocks, values]`."""
    match name:
        case "Q8_0":
            return np.ascontiguousarray(blocks["quants"])
        case "Q4_0":
            return planes(blocks["low"], 4, 16).view(np.int8) - np.int8(8)
        case "Q4_1":
            return planes(blocks["low"], 4, 16).view(np.int8)
        case "Q5_0" | "Q5_1":
            q = (planes(blocks["low"], 4, 16) | planes(blocks["high"], 1, 1) << 4).view(np.int8)
            return q - np.int8(16) if name == "Q5_0" else q
        case "Q2_K":
            return planes(blocks["low"], 2, 32).view(np.int8)
        case "Q3_K":
            return (planes(blocks["low"], 2, 32) | planes(blocks["high"], 1, 32) << 2).view(np.int8) - np.int8(4)
        case "Q4_K":
            return planes(blocks["low"], 4, 32).view(np.int8)
        case "Q5_K":
            return (planes(blocks["low"], 4, 32) | planes(blocks["high"], 1, 32) << 4).view(np.int8)
        case "Q6_K":
            return (planes(blocks["low"], 4, 64) | planes(blocks["high"], 2, 32) << 4).view(np.int8) - np.int8(32)
    raise ValueError(f"{name} keeps values, not scales and integers")


def scales_of(blocks: Blocks, name: str) -> tuple[Floats, Floats | None]:
    """The scales and minimums of each block, float32 `[blocks, groups]`."""
    d = blocks["d"].astype(np.float32)[:, None]
    scales: NDArray[Any]
    match name:
        case "Q4_1" | "Q5_1":
            return d, blocks["m"].astype(np.float32)[:, None]
        case "Q2_K":
            scales, minimums = blocks["scales"] & 15, blocks["scales"] >> 4
        case "Q4_K" | "Q5_K":
            scales, minimums = _scales_and_minimums(blocks["scales"])
        case "Q3_K":
            low, high = np.split(blocks["scales"], [8], axis=1)
            scales = (planes(low, 4, 8) | planes(high, 2, 4) << 4).view(np.int8) - np.int8(32)
            return d * scales, None
        case "Q6_K":
            return d * blocks["scales"], None
        case _:
            return d, None
    dmin = blocks["dmin"].astype(np.float32)[:, None]
    return d * scales, -(dmin * minimums)


def lookup(format: str) -> BlockFormat:
    """The format of that name, or ValueError."""
    if format not in FORMATS:
        raise ValueError(f"block format {format!r} is not one of {', '.join(FORMATS)}")
    return FORMATS[format]


def as_blocks(data: NDArray[Any], layout: BlockFormat) -> Blocks:
    """The bytes of `data` seen as one structured element per block, or ValueError."""
    flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    if flat.size % layout.bytes:
        raise ValueError(f"{flat.size} bytes are not a whole number of {layout.name} blocks of {layout.bytes}")
    return flat.view(layout.layout)


def unpack(data: NDArray[Any], format: str) -> tuple[Floats, NDArray[np.int8], Floats | None]:
    """The parts of quantised blocks: scales float32 `[blocks, groups]`, quants int8 `[blocks, values]`, and
    minimums float32 `[blocks, groups]` (None where the format has none). Not for F32, F16 and BF16."""
    blocks = as_blocks(data, lookup(format))
    quants = quants_of(blocks, format)
    scales, minimums = scales_of(blocks, format)
    return scales, quants, minimums

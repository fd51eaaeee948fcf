"""GGUF files, versions 2 and 3, little-endian: the reader.

The file (source: the GGUF specification in the ggml repository): magic "GGUF", version u32, number of tensors
u64, number of metadata entries u64; the metadata entries (key, type u32, value); the tensors' descriptions
(name, number of dimensions u32, dimensions u64 with the innermost first, format u32, offset u64); padding to the
alignment (`general.alignment`, 32 by default); the tensors' bytes, at offsets that count from here. A string
is a length u64 and UTF-8 bytes; an array is an element type u32, a count u64 and the elements.

Files are hostile until shown otherwise: every length is compared with what is left of the file before it is
used, so a file can neither make us read outside it nor allocate more than a small multiple of its own size.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import stat
import struct
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from nitinol.formats.blocks import FORMATS, Bytes

DEFAULT_ALIGNMENT = 32
UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
NUMBERS: dict[int, np.dtype[Any]] = {
    UINT8: np.dtype("u1"), INT8: np.dtype("i1"), UINT16: np.dtype("<u2"), INT16: np.dtype("<i2"),
    UINT32: np.dtype("<u4"), INT32: np.dtype("<i4"), FLOAT32: np.dtype("<f4"), BOOL: np.dtype("?"),
    UINT64: np.dtype("<u8"), INT64: np.dtype("<i8"), FLOAT64: np.dtype("<f8"),
}  # fmt: skip

# Known formats that we do not compute: id -> name, values per block, bytes per block. Their sizes are checked
# like all others, so that such a file can be listed; asking for the bytes is the error.
_UNSUPPORTED = {
    9: ("Q8_1", 32, 40), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 31: ("Q4_0_4_4", 32, 18),
    32: ("Q4_0_4_8", 32, 18), 33: ("Q4_0_8_8", 32, 18), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
_BLOCKS = {f.id: (f.name, f.values, f.bytes) for f in FORMATS.values()} | _UNSUPPORTED

# Far above any real file (a vocabulary has 10^5 entries, a model 10^4 tensors), and low enough that a hostile
# file of many gigabytes is refused in seconds.
_MOST_KEYS, _MOST_TENSORS, _MOST_ELEMENTS, _DEEPEST_ARRAY = 1 << 16, 1 << 20, 1 << 24, 4

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


class FormatError(ValueError):
    """A file is not what it should be; the message is one sentence for a person and names the file."""


@dataclass(frozen=True)
class Tensor:
    """A tensor in a mapped file. `shape` has the outermost dimension first, `offset` counts bytes from the
    start of the file `part` (an index into `GGUF.parts`), rows are contiguous blocks of `format`."""

    name: str
    shape: tuple[int, ...]
    format: str
    offset: int
    nbytes: int
    part: int
    _file: Bytes
    _path: Path

    @property
    def data(self) -> Bytes:
        """The bytes, a read-only uint8 view of the mapping (no copy). FormatError for unsupported formats."""
        if self.format not in FORMATS:
            raise FormatError(
                f"{self._path}: tensor {self.name!r} has format {self.format}, which is not supported; "
                f"use a file with {', '.join(FORMATS)}"
            )
        return self._file[self.offset : self.offset + self.nbytes]

    @property
    def address(self) -> int:
        """The address of the first byte, valid as long as any view of the mapping lives."""
        return int(self._file.ctypes.data) + self.offset


@dataclass
class GGUF:
    """An open file (or set of split files).

    `metadata`: key to int, float, bool, str, a NumPy array (copied, of the file's element type), or a list of
    strings or of arrays. `tensors`: name to `Tensor`, in file order. `parts`: the bytes of each mapped file,
    whole and page-aligned, for a runtime to wrap (views of a `FileMapping`); a tensor lies at `tensor.offset` of
    `parts[tensor.part]`.
    """

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    parts: list[Bytes]

    def close(self) -> None:
        """Let go of the files. A mapping lives on until the last view of it is gone, so that no view ever
        dangles."""
        self.tensors, self.parts = {}, []

    def __enter__(self) -> GGUF:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Cursor:
    """A position in one file; every read checks first that the bytes are there."""

    def __init__(self, path: Path, file: mmap.mmap) -> None:
        self.path, self.file, self.size = path, file, len(file)
        self.position = 0
        self.elements_left = _MOST_ELEMENTS

    def fail(self, sentence: str) -> NoReturn:
        raise FormatError(f"{self.path}: {sentence}")

    def need(self, nbytes: int, what: str) -> None:
        left = self.size - self.position
        if nbytes > left:
            self.fail(
                f"{what} at byte {self.position} needs {nbytes} bytes, but the file ends after {left} more; "
                "it is truncated or corrupt"
            )

    def integer(self, layout: struct.Struct, what: str) -> int:
        self.need(layout.size, what)
        (value,) = layout.unpack_from(self.file, self.position)
        self.position += layout.size
        return int(value)

    def count(self, limit: int, element_bytes: int, what: str) -> int:
        """A number of things to come, each of `element_bytes` bytes at least."""
        count = self.integer(_U64, f"the number of {what}")
        left = self.size - self.position
        if count > limit or count * element_bytes > left:
            most = min(limit, left // element_bytes)
            self.fail(f"{count} {what} are announced, but at most {most} can follow; it is truncated or corrupt")
        return count

    def string(self, what: str) -> str:
        return self.strings(1, what)[0]

    def strings(self, count: int, what: str) -> list[str]:
        """One tight loop: a vocabulary and its merges have 400 000 strings, at 0.25 µs each."""
        file, size, position, unpack = self.file, self.size, self.position, _U64.unpack_from
        found: list[str] = []
        append = found.append
        try:
            for _ in range(count):
                start = position + 8
                position = start + unpack(file, position)[0]
                if position > size:
                    self.fail(
                        f"{what} has a string at byte {start} of length {position - start}, but only "
                        f"{size - start} bytes follow; it is truncated or corrupt"
                    )
                append(file[start:position].decode())
        except struct.error:
            self.position = position
            self.need(8, f"the length of a string of {what}")
            raise
        except UnicodeDecodeError as error:
            self.fail(f"{what} has a string at byte {start} that is not UTF-8 ({error.reason})")
        self.position = position
        return found

    def numbers(self, type: int, count: int, what: str) -> np.ndarray[Any, Any]:
        dtype = NUMBERS[type]
        self.need(count * dtype.itemsize, what)
        start = self.position
        self.position += count * dtype.itemsize
        raw = self.file[start : self.position]
        if type == BOOL and raw.translate(None, b"\x00\x01"):
            self.fail(f"{what} has a truth value that is neither 0 nor 1")
        return np.frombuffer(raw, dtype=dtype)

    def value(self, type: int, what: str, depth: int = 0) -> Any:
        if type in NUMBERS:
            return self.numbers(type, 1, what)[0].item()
        if type == STRING:
            return self.string(what)
        if type != ARRAY:
            self.fail(f"{what} has type {type}, expected 0 to {FLOAT64}")
        if depth == _DEEPEST_ARRAY:
            self.fail(f"{what} has arrays nested more than {_DEEPEST_ARRAY} deep")
        element = self.integer(_U32, f"the element type of {what}")
        smallest = 12 if element == ARRAY else 8 if element == STRING else 1
        count = self.count(self.elements_left, smallest, f"elements of {what}")
        self.elements_left -= count
        if element in NUMBERS:
            return self.numbers(element, count, what)
        if element == STRING:
            return self.strings(count, what)
        if element != ARRAY:
            self.fail(f"{what} has elements of type {element}, expected 0 to {FLOAT64}")
        return [self.value(ARRAY, what, depth + 1) for _ in range(count)]


class FileMapping(mmap.mmap):
    """A whole file in memory, read-only, that stays open for those who would rather read it: through `descriptor`, the
    same bytes at the same offsets. It is closed with the mapping."""

    path: Path
    descriptor: int


def _map(path: Path) -> FileMapping:
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise FormatError(f"{path}: expected a GGUF file, found something that is not a regular file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 24:
            raise FormatError(f"{path}: {size} bytes are too few for a GGUF file, whose header alone has 24")
        mapping = FileMapping(file.fileno(), size, access=mmap.ACCESS_READ)
        mapping.path, mapping.descriptor = path, os.dup(file.fileno())
        weakref.finalize(mapping, os.close, mapping.descriptor)
        return mapping


def _version(cursor: _Cursor) -> int:
    magic = cursor.file[:4]
    if magic != b"GGUF":
        cursor.fail(f"the file starts with {magic!r}, expected b'GGUF'; it is not a GGUF model")
    cursor.position = 4
    version = cursor.integer(_U32, "the version")
    if version not in (2, 3):
        order = " (a big-endian file?)" if version in (2 << 24, 3 << 24) else ""
        cursor.fail(f"GGUF version {version}{order} is not supported, expected 2 or 3 in little-endian order")
    return version


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(count):
        key = cursor.string(f"the key of metadata entry {index}")
        what = f"metadata {key[:80]!r}"
        if key in metadata:
            cursor.fail(f"{what} occurs twice")
        metadata[key] = cursor.value(cursor.integer(_U32, f"the type of {what}"), what)
    return metadata


def _show(value: Any) -> str:
    """A metadata value for a message: whole when it is small, else its type."""
    return f"{value!r:.40}" if isinstance(value, (int, float, str)) else f"of type {type(value).__name__}"


def _alignment(cursor: _Cursor, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        cursor.fail(f"general.alignment is {_show(alignment)}, expected a power of two")
    return alignment


def _tensors(cursor: _Cursor, count: int, alignment: int, file: Bytes, part: int) -> dict[str, Tensor]:
    found: list[tuple[str, tuple[int, ...], str, int, int]] = []
    for index in range(count):
        name = cursor.string(f"the name of tensor {index}")
        what = f"tensor {name[:80]!r}"
        rank = cursor.integer(_U32, f"the number of dimensions of {what}")
        if rank > 4:
            cursor.fail(f"{what} has {rank} dimensions, expected at most 4")
        shape = tuple(cursor.integer(_U64, f"a dimension of {what}") for _ in range(rank))[::-1]
        format_id = cursor.integer(_U32, f"the format of {what}")
        offset = cursor.integer(_U64, f"the offset of {what}")
        if 0 in shape:
            cursor.fail(f"{what} has shape {shape}, expected dimensions of at least 1")
        if format_id not in _BLOCKS:
            cursor.fail(f"{what} has the unknown format {format_id}; supported are {', '.join(FORMATS)}")
        format, values, block_bytes = _BLOCKS[format_id]
        row = shape[-1] if shape else 1
        if row % values:
            cursor.fail(f"{what} has rows of {row} values, expected a multiple of {values} for {format}")
        if offset % alignment:
            cursor.fail(f"{what} has offset {offset}, expected a multiple of the alignment {alignment}")
        found.append((name, shape, format, offset, math.prod(shape) // values * block_bytes))
    base = -(-cursor.position // alignment) * alignment
    end, before = base, ""
    for name, _, _, offset, nbytes in sorted(found, key=lambda tensor: tensor[3]):
        what = f"tensor {name[:80]!r}"
        if base + offset < end:
            cursor.fail(f"{what} at byte {base + offset} overlaps tensor {before[:80]!r}, which ends at {end}")
        end, before = base + offset + nbytes, name
        if end > cursor.size:
            cursor.fail(f"{what} ends at byte {end}, but the file has {cursor.size}; it is truncated or corrupt")
    tensors: dict[str, Tensor] = {}
    for name, shape, format, offset, nbytes in found:
        if name in tensors:
            cursor.fail(f"tensor {name[:80]!r} occurs twice")
        tensors[name] = Tensor(name, shape, format, base + offset, nbytes, part, file, cursor.path)
    return tensors


def _open_part(path: Path, part: int) -> GGUF:
    mapping = _map(path)
    cursor = _Cursor(path, mapping)
    version = _version(cursor)
    tensor_count = cursor.count(_MOST_TENSORS, 24, "tensors")
    key_count = cursor.count(_MOST_KEYS, 13, "metadata entries")
    metadata = _metadata(cursor, key_count)
    file = np.frombuffer(mapping, dtype=np.uint8)
    tensors = _tensors(cursor, tensor_count, _alignment(cursor, metadata), file, part)
    return GGUF(path, version, metadata, tensors, [file])


def _split_key(file: GGUF, key: str) -> int:
    value = file.metadata.get(key)
    if type(value) is not int or value < 0:
        raise FormatError(f"{file.path}: {key} is {_show(value)}, expected a number in a split file")
    return value


def _add_parts(first: GGUF) -> None:
    """Open the other files of a split model; each must say that it is the part that its name says."""
    count = _split_key(first, "split.count")
    name = _SPLIT_NAME.fullmatch(first.path.name)
    if name is None or int(name[3]) != count:
        raise FormatError(
            f"{first.path}: the file is one of {count} parts, but its name does not end in "
            f"-00001-of-{count:05}.gguf; rename the parts as they were"
        )
    paths = [first.path.with_name(f"{name[1]}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    if name[2] != "00001":
        raise FormatError(f"{first.path}: this is a later part of a split model; open {paths[0].name} instead")
    for index, path in enumerate(paths):
        if index:
            try:
                part = _open_part(path, index)
            except OSError as error:
                reason = error.strerror or type(error).__name__
                raise FormatError(f"{path}: part {index + 1} of {count} cannot be opened: {reason}") from None
        else:
            part = first
        number, total = _split_key(part, "split.no"), _split_key(part, "split.count")
        if (number, total) != (index, count):
            raise FormatError(
                f"{path}: the file says it is part {number + 1} of {total}, expected part {index + 1} of {count}"
            )
        if index:
            for tensor in part.tensors:
                if tensor in first.tensors:
                    raise FormatError(f"{path}: tensor {tensor[:80]!r} is in an earlier part, too")
            first.tensors.update(part.tensors)
            first.parts += part.parts
    expected = _split_key(first, "split.tensors.count")
    if len(first.tensors) != expected:
        raise FormatError(f"{first.path}: its {count} parts have {len(first.tensors)} tensors, expected {expected}")


def open_gguf(path: str | os.PathLike[str]) -> GGUF:
    """Open a GGUF model, memory-mapped and checked; of a split model, open its first part.

    Raises FormatError when the content is not as it should be (any part of a split model missing included),
    and the usual OSError when the file itself cannot be opened. Formats that are known but not supported
    raise only when the tensor's `data` is asked for. A file must not be cut short by others while it is open:
    the operating system ends a program that reads a mapping beyond its file.
    """
    file = _open_part(Path(path), 0)
    if "split.count" in file.metadata and _split_key(file, "split.count") > 1:
        _add_parts(file)
    return file

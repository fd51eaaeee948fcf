"""The GGUF reader and writer: against the `gguf` package in both directions, and against broken files."""

import gc
import os
import re
import struct
import tracemalloc

import gguf
import numpy as np
import pytest

from nitinol.formats.blocks import FORMATS
from nitinol.formats.gguf import FormatError, open_gguf
from nitinol.formats.gguf_writer import TensorSource, write_gguf
from nitinol.formats.quantization import dequantize, quantize


@pytest.fixture
def rng():
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def u32(n):
    return struct.pack("<I", n)


def u64(n):
    return struct.pack("<Q", n)


def text(s):
    s = s if isinstance(s, bytes) else s.encode()
    return u64(len(s)) + s


def describe(name="x", dims=(32,), format=0, offset=0, rank=None):
    rank = len(dims) if rank is None else rank
    return text(name) + u32(rank) + b"".join(map(u64, dims)) + u32(format) + u64(offset)


def raw(entries=(), tensors=(), data=b"", version=3, magic=b"GGUF", keys=None, count=None):
    """A file byte by byte; entries and tensors are already encoded."""
    head = magic + u32(version) + u64(len(tensors) if count is None else count)
    head += u64(len(entries) if keys is None else keys) + b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def entry(key, type, value):
    return text(key) + u32(type) + value


# ---- with the gguf package -------------------------------------------------------------------------------


def random_tensors(rng):
    """One tensor of each format: name -> (shape, format, bytes as the gguf package wants them)."""
    found = {}
    for name, layout in FORMATS.items():
        outer = rng.integers(1, 5, rng.integers(0, 4)).tolist()
        shape = (*outer, layout.values * int(rng.integers(1, 4)))
        x = rng.standard_normal(shape).astype(np.float32)
        found[f"blk.0.{name}.weight"] = (shape, name, quantize(x, name))
    return found


def test_reads_what_the_gguf_package_writes(tmp_path, rng):
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -128)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -32768)
    writer.add_uint32("u32", (1 << 32) - 1)
    writer.add_int32("i32", -(1 << 31))
    writer.add_float32("f32", 0.1)
    writer.add_bool("yes", True)
    writer.add_bool("no", False)
    writer.add_string("s", "schön 東京 🜂")
    writer.add_uint64("u64", (1 << 64) - 1)
    writer.add_int64("i64", -(1 << 63))
    writer.add_float64("f64", 0.1)
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("floats", [0.5, 1e-30])
    writer.add_array("bools", [True, False, True])
    words = [f"w{i}é" * int(rng.integers(0, 4)) for i in range(1000)]
    writer.add_array("words", words)
    writer.add_array("nested", [[1, 2], [3]])
    writer.add_array("deeper", [[["a"], ["b", "c"]], [[""]]])
    tensors = random_tensors(rng)
    for name, (shape, format, data) in tensors.items():
        rows = data.reshape(*shape[:-1], -1)
        kind = gguf.GGMLQuantizationType[format]
        writer.add_tensor(name, rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(path) as model:
        found = dict(model.metadata)
        assert model.version == 3
        assert found.pop("general.architecture") == "llama" and found.pop("general.alignment") == 64
        arrays = {key: found.pop(key) for key in ("ints", "floats", "bools")}
        assert arrays["ints"].tolist() == [1, -2, 3] and arrays["ints"].dtype == np.int32
        assert arrays["floats"].tolist() == np.float32([0.5, 1e-30]).tolist()
        assert arrays["bools"].tolist() == [True, False, True] and arrays["bools"].dtype == bool
        assert [part.tolist() for part in found.pop("nested")] == [[1, 2], [3]]
        assert found == {
            "u8": 255, "i8": -128, "u16": 65535, "i16": -32768, "u32": (1 << 32) - 1, "i32": -(1 << 31),
            "f32": float(np.float32(0.1)), "yes": True, "no": False, "s": "schön 東京 🜂",
            "u64": (1 << 64) - 1, "i64": -(1 << 63), "f64": 0.1, "words": words,
            "deeper": [[["a"], ["b", "c"]], [[""]]],
        }  # fmt: skip
        assert found["yes"] is True and type(found["u8"]) is int
        assert list(model.tensors) == list(tensors)
        for name, (shape, format, data) in tensors.items():
            tensor = model.tensors[name]
            assert (tensor.shape, tensor.format, tensor.nbytes) == (shape, format, data.size)
            assert tensor.offset % 64 == 0
            assert np.array_equal(tensor.data, data)


def test_the_gguf_package_reads_what_we_write(tmp_path, rng):
    path = tmp_path / "a.gguf"
    tensors = random_tensors(rng)
    metadata = {
        "general.architecture": "llama", "general.alignment": 128, "small": 7, "negative": -7, "large": 1 << 40,
        "huge": (1 << 64) - 1, "f": 1.5, "t": True, "s": "東京", "u16": np.uint16(9), "f64": np.float64(0.1),
        "strings": ["a", "", "🜂"], "ints": [1, -1], "big": [1 << 40], "bools": [True, False], "empty": [],
        "scores": np.float32([0.25, -1]), "nested": [["a"], ["b", "c"]],
    }  # fmt: skip
    sources = [
        TensorSource(n, shape, format, data if i % 2 else lambda data=data: np.array_split(data, 3))
        for i, (n, (shape, format, data)) in enumerate(tensors.items())
    ]
    write_gguf(path, metadata, sources)
    reader = gguf.GGUFReader(path)
    kinds = {key: [t.name for t in reader.fields[key].types] for key in metadata}
    assert kinds == {
        "general.architecture": ["STRING"], "general.alignment": ["UINT32"], "small": ["UINT32"],
        "negative": ["INT32"], "large": ["INT64"], "huge": ["UINT64"], "f": ["FLOAT32"], "t": ["BOOL"],
        "s": ["STRING"], "u16": ["UINT16"], "f64": ["FLOAT64"], "strings": ["ARRAY", "STRING"],
        "ints": ["ARRAY", "INT32"], "big": ["ARRAY", "INT64"], "bools": ["ARRAY", "BOOL"], "empty": ["ARRAY"],
        "scores": ["ARRAY", "FLOAT32"], "nested": kinds["nested"],
    }  # fmt: skip
    for key in metadata.keys() - {"empty", "scores", "nested"}:
        assert reader.fields[key].contents() == metadata[key]
    assert reader.fields["scores"].contents() == [0.25, -1]
    assert [t.name for t in reader.tensors] == list(tensors)
    for theirs in reader.tensors:
        shape, format, data = tensors[theirs.name]
        assert tuple(reversed(theirs.shape.tolist())) == shape and theirs.tensor_type.name == format
        assert theirs.data_offset % 128 == 0
        assert np.array_equal(np.ascontiguousarray(theirs.data).reshape(-1).view(np.uint8), data)
    ours = open_gguf(path)
    assert ours.metadata["nested"] == metadata["nested"] and ours.metadata["empty"] == []
    assert ours.metadata["large"] == 1 << 40 and ours.metadata["f64"] == 0.1


def test_version_2(tmp_path, rng):
    path = tmp_path / "a.gguf"
    x = rng.standard_normal((3, 32)).astype(np.float32)
    write_gguf(path, {"a": 1}, [TensorSource("x", x.shape, "F32", x)])
    content = bytearray(path.read_bytes())
    content[4] = 2
    path.write_bytes(content)
    model = open_gguf(path)
    assert model.version == 2 and model.metadata == {"a": 1}
    assert np.array_equal(dequantize(model.tensors["x"].data, "F32", x.shape), x)


def test_a_scalar_and_a_file_without_tensors(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(raw([entry("a", 4, u32(1))], [describe(dims=())], struct.pack("<f", 2.5)))
    tensor = open_gguf(path).tensors["x"]
    assert tensor.shape == () and tensor.data.view("<f4")[0] == 2.5
    path.write_bytes(raw()[:24])
    assert open_gguf(path).tensors == {}


# ---- the mapping -----------------------------------------------------------------------------------------


def test_data_is_a_read_only_view_of_the_mapping(tmp_path, rng):
    path = tmp_path / "a.gguf"
    x = rng.standard_normal((5, 64)).astype(np.float32)
    write_gguf(path, {}, [TensorSource(n, x.shape, "F32", x) for n in "ab"])
    model = open_gguf(path)
    (whole,) = model.parts
    assert whole.size == path.stat().st_size and whole.ctypes.data % 4096 == 0
    b = model.tensors["b"]
    assert np.shares_memory(b.data, whole) and not b.data.flags.writeable and b.part == 0
    assert b.address == b.data.ctypes.data == whole.ctypes.data + b.offset
    assert path.read_bytes()[b.offset : b.offset + b.nbytes] == x.tobytes()
    view = b.data
    del whole, b
    model.close()
    assert model.tensors == {} and model.parts == []
    assert np.array_equal(view.view("<f4").reshape(x.shape), x), "a view must outlive close()"


def test_the_file_stays_open_as_long_as_its_mapping(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, {}, [TensorSource("a", (64,), "F32", np.ones(64, np.float32))])
    view = open_gguf(path).tensors["a"].data
    mapping = view.base.base.obj
    descriptor = mapping.descriptor
    assert mapping.path == path and os.path.samestat(os.fstat(descriptor), path.stat())
    os.lseek(descriptor, 0, os.SEEK_SET)
    assert os.read(descriptor, 1 << 20) == path.read_bytes() == mapping[:]
    del view, mapping
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


# ---- split files -----------------------------------------------------------------------------------------


def write_split(folder, numbers=(0, 1, 2), counts=(3, 3, 3), total=6, names=("ab", "cd", "ef"), **more):
    paths = [folder / f"m-{i + 1:05}-of-{len(numbers):05}.gguf" for i in range(len(numbers))]
    for index, path in enumerate(paths):
        metadata = {"split.no": np.uint16(numbers[index]), "split.count": np.uint16(counts[index])}
        metadata["split.tensors.count"] = np.int32(total)
        if index == 0:
            metadata |= {"general.name": "whole"} | more
        sources = [TensorSource(n, (4,), "F32", np.full(4, ord(n), np.float32)) for n in names[index]]
        write_gguf(path, {k: v for k, v in metadata.items() if v is not None}, sources)
    return paths


def test_split_files(tmp_path):
    paths = write_split(tmp_path)
    model = open_gguf(paths[0])
    assert model.metadata["general.name"] == "whole"
    assert list(model.tensors) == list("abcdef")
    assert len(model.parts) == 3
    for name, tensor in model.tensors.items():
        assert tensor.part == "abcdef".index(name) // 2
        assert tensor.data.view("<f4").tolist() == [ord(name)] * 4
        assert np.shares_memory(tensor.data, model.parts[tensor.part])


def test_split_files_of_the_gguf_package(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    for i in range(5):
        writer.add_tensor(f"t{i}", np.full((2, 3), i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = open_gguf(tmp_path / "m-00001-of-00003.gguf")
    assert {n: t.data.view("<f4").tolist() for n, t in model.tensors.items()} == {
        f"t{i}": [float(i)] * 6 for i in range(5)
    }


def test_a_part_is_missing(tmp_path):
    write_split(tmp_path)[1].unlink()
    with pytest.raises(FormatError, match=r"m-00002-of-00003.gguf: part 2 of 3 cannot be opened: No such file"):
        open_gguf(tmp_path / "m-00001-of-00003.gguf")


def test_a_later_part_is_opened(tmp_path):
    with pytest.raises(FormatError, match=r"later part of a split model; open m-00001-of-00003.gguf instead"):
        open_gguf(write_split(tmp_path)[2])


def test_a_cycle_of_parts(tmp_path):
    paths = write_split(tmp_path)
    paths[1].unlink()
    paths[1].symlink_to(paths[0])
    with pytest.raises(FormatError, match="says it is part 1 of 3, expected part 2 of 3"):
        open_gguf(paths[0])


def test_a_renamed_part(tmp_path):
    (one, _, _) = write_split(tmp_path)
    other = one.rename(tmp_path / "m.gguf")
    with pytest.raises(FormatError, match="one of 3 parts, but its name does not end in"):
        open_gguf(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"numbers": (0, 2, 1)}, "says it is part 3 of 3, expected part 2 of 3"),
        ({"numbers": (1, 1, 2)}, "says it is part 2 of 3, expected part 1 of 3"),
        ({"counts": (3, 4, 3)}, "says it is part 2 of 4, expected part 2 of 3"),
        ({"counts": (4, 4, 4)}, "one of 4 parts, but its name does not end in"),
        ({"names": ("ab", "ad", "ef")}, "m-00002-of-00003.gguf: tensor 'a' is in an earlier part, too"),
        ({"total": 7}, "3 parts have 6 tensors, expected 7"),
        ({"split.tensors.count": None}, "split.tensors.count is of type NoneType, expected a number"),
        ({"split.no": None}, "split.no is of type NoneType, expected a number"),
        ({"split.count": "three"}, "split.count is 'three', expected a number"),
        ({"split.count": True}, "split.count is True, expected a number"),
        ({"split.count": [3, 3]}, "split.count is of type ndarray, expected a number"),
        ({"split.count": -3}, "split.count is -3, expected a number"),
        ({"split.count": 1 << 60}, "one of 1152921504606846976 parts, but its name"),
    ],
)
def test_inconsistent_parts(tmp_path, change, message):
    with pytest.raises(FormatError, match=re.escape(message)):
        open_gguf(write_split(tmp_path, **change)[0])


# ---- hostile files ---------------------------------------------------------------------------------------

FAR = (1 << 64) - 1
X = bytes(128)
NESTED_TOO_DEEP = b"".join(u32(9) + u64(1) for _ in range(50))
HOSTILE = {
    "empty": (b"", "0 bytes are too few"),
    "short": (b"GGUF" + u32(3), "8 bytes are too few"),
    "magic": (raw(magic=b"GGML"), "starts with b'GGML', expected b'GGUF'"),
    "version 1": (raw(version=1), "GGUF version 1 is not supported, expected 2 or 3"),
    "version 4": (raw(version=4), "GGUF version 4 is not supported"),
    "big-endian": (raw(version=3 << 24), "version 50331648 (a big-endian file?) is not supported"),
    "tensor count": (raw(count=FAR), f"{FAR} tensors are announced, but at most 0 can follow"),
    "key count": (raw(keys=FAR), f"{FAR} metadata entries are announced"),
    "one key too many": (raw([entry("a", 0, b"1")], keys=2)[:38], "metadata entries are announced"),
    "key beyond the end": (raw([u64(FAR) + bytes(99)]), f"has a string at byte 32 of length {FAR}, but only"),
    "key ends beyond the end": (raw([u64(1 << 20) + bytes(99)]), "of length 1048576, but only"),
    "key not UTF-8": (raw([entry(b"\xff\xfe", 0, b"1")]), "key of metadata entry 0 has a string at byte 32 that is"),
    "key twice": (raw([entry("a", 0, b"1")] * 2), "metadata 'a' occurs twice"),
    "type 13": (raw([entry("a", 13, bytes(20))]), "metadata 'a' has type 13, expected 0 to 12"),
    "bool 2": (raw([entry("a", 7, b"\x02")]), "metadata 'a' has a truth value that is neither 0 nor 1"),
    "bools 2": (raw([entry("a", 9, u32(7) + u64(3) + b"\0\1\2")]), "has a truth value that is neither"),
    "no value": (raw([entry("a", 12, b"")])[:38], "metadata 'a' at byte 37 needs 8 bytes, but the file ends after 1"),
    "string": (raw([entry("a", 8, u64(FAR))]), f"metadata 'a' has a string at byte 45 of length {FAR}"),
    "string not UTF-8": (raw([entry("a", 8, text(b"a\xc3"))]), "byte 45 that is not UTF-8 (unexpected end of data)"),
    "surrogate": (raw([entry("a", 8, text(b"\xed\xa0\x80"))]), "is not UTF-8"),
    "numbers": (raw([entry("a", 9, u32(10) + u64(9) + bytes(64))])[:113], "metadata 'a' at byte 49 needs 72 bytes"),
    "absurd numbers": (raw([entry("a", 9, u32(0) + u64(FAR))]), f"{FAR} elements of metadata 'a' are announced"),
    "overflowing numbers": (raw([entry("a", 9, u32(12) + u64(1 << 61))]), "elements of metadata 'a' are announced"),
    "absurd strings": (raw([entry("a", 9, u32(8) + u64(1 << 40))]), "1099511627776 elements of metadata 'a' are"),
    "strings run out": (
        raw([entry("a", 9, u32(8) + u64(3) + text("b") + u64(9) + bytes(9))])[:75],
        "the length of a string of metadata 'a' at byte 75 needs 8 bytes",
    ),
    "element type": (raw([entry("a", 9, u32(99) + u64(1) + X)]), "metadata 'a' has elements of type 99"),
    "nested": (raw([entry("a", 9, NESTED_TOO_DEEP)]), "metadata 'a' has arrays nested more than 4 deep"),
    "alignment 0": (raw([entry("general.alignment", 4, u32(0))]), "alignment is 0, expected a power of two"),
    "alignment 24": (raw([entry("general.alignment", 4, u32(24))]), "alignment is 24, expected a power"),
    "alignment true": (raw([entry("general.alignment", 7, b"\1")]), "alignment is True, expected a power"),
    "alignment text": (raw([entry("general.alignment", 8, text("32"))]), "alignment is '32', expected a power"),
    "alignment array": (
        raw([entry("general.alignment", 9, u32(4) + u64(2) + u64(32))]),
        "alignment is of type ndarray, expected a power",
    ),
    "alignment beyond the file": (
        raw([entry("general.alignment", 4, u32(1 << 31))], [describe()], X),
        "ends at byte 2147483776, but the file has",
    ),
    "name not UTF-8": (raw([], [describe(b"\x80")], X), "name of tensor 0 has a string at byte 32 that is not UTF-8"),
    "rank": (raw([], [describe(dims=(1,) * 5)], X), "tensor 'x' has 5 dimensions, expected at most 4"),
    "absurd rank": (raw([], [describe(rank=1 << 31)], X), "tensor 'x' has 2147483648 dimensions"),
    "dimension 0": (raw([], [describe(dims=(32, 0))], X), "has shape (0, 32), expected dimensions of at least 1"),
    "dimensions overflow": (
        raw([], [describe(dims=(1 << 32, 1 << 32, 1 << 62, 4))], X),
        f"ends at byte {(1 << 130) + 96}, but the file has",
    ),
    "offset": (raw([], [describe(offset=FAR - 31)], X), "tensor 'x' ends at byte"),
    "offset just outside": (raw([], [describe(offset=32)], X), "ends at byte 224, but the file has 192"),
    "data cut": (raw([], [describe()], X[:-1]), "ends at byte 192, but the file has 191; it is truncated"),
    "offset not aligned": (raw([], [describe(offset=8)], X + X), "has offset 8, expected a multiple of the"),
    "row": (raw([], [describe(dims=(33,), format=8)], X), "rows of 33 values, expected a multiple of 32 for Q8_0"),
    "row of an unsupported format": (raw([], [describe(dims=(32,), format=23)], X), "a multiple of 256 for IQ4_XS"),
    "format": (raw([], [describe("blk.0.w", format=77)], X), "tensor 'blk.0.w' has the unknown format 77"),
    "removed format": (raw([], [describe(format=4)], X), "tensor 'x' has the unknown format 4"),
    "tensor twice": (raw([], [describe(), describe(offset=128)], X + X), "tensor 'x' occurs twice"),
    "overlap": (
        raw([], [describe("a"), describe("b", offset=96)], X + X),
        "tensor 'b' at byte 192 overlaps tensor 'a', which ends at 224",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(tmp_path, case):
    content, message = HOSTILE[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=re.escape(message)) as caught:
            open_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20, "an absurd count must not be allocated"
    finally:
        tracemalloc.stop()
    sentence = str(caught.value)
    assert sentence.startswith(f"{path}: ") and "\n" not in sentence and len(sentence) < len(str(path)) + 300


def test_the_same_file_without_its_fault_opens(tmp_path):
    """The builder of the hostile files makes good files when it is not asked for a fault."""
    path = tmp_path / "good.gguf"
    path.write_bytes(raw([entry("a", 8, text("é"))], [describe("a"), describe("b", offset=128)], X + X))
    assert list(open_gguf(path).tensors) == ["a", "b"]


def test_a_control_character_does_not_reach_the_terminal(tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw([], [describe("a\x1b[2J\n" + "b" * 5000, format=77)], X))
    with pytest.raises(FormatError) as caught:
        open_gguf(path)
    assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_very_many_strings_are_refused_before_they_are_read(tmp_path):
    """A sparse file of 144 MB that announces 18 million empty strings."""
    path = tmp_path / "bad.gguf"
    with open(path, "wb") as file:
        file.write(raw([entry("a", 9, u32(8) + u64(18 << 20))]))
        file.truncate((18 << 23) + 1000)
    with pytest.raises(FormatError, match="at most 16777216 can follow"):
        open_gguf(path)


@pytest.mark.parametrize(("id", "name"), [(23, "IQ4_XS"), (35, "TQ2_0"), (26, "I32"), (39, "MXFP4")])
def test_unsupported_formats_are_named_when_asked_for(tmp_path, id, name):
    path = tmp_path / "a.gguf"
    path.write_bytes(raw([], [describe("blk.7.w", dims=(256,), format=id)], bytes(1024)))
    tensor = open_gguf(path).tensors["blk.7.w"]
    assert tensor.format == name and tensor.shape == (256,)
    with pytest.raises(FormatError, match=f"tensor 'blk.7.w' has format {name}, which is not supported"):
        _ = tensor.data


def test_sizes_of_unsupported_formats_are_ggmls():
    from nitinol.formats.gguf import _BLOCKS

    for kind, size in gguf.GGML_QUANT_SIZES.items():
        assert _BLOCKS[kind] == (kind.name, *size)


def test_not_a_file(tmp_path):
    import os

    with pytest.raises(FormatError, match="not a regular file"):
        open_gguf(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="not a regular file"):
        open_gguf(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        open_gguf(tmp_path / "none.gguf")


# ---- the writer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "source", "message"),
    [
        ({}, TensorSource("x", (2, 32), "F32", np.zeros(63, np.float32)), "gave 252 bytes, but shape"),
        ({}, TensorSource("x", (2, 33), "Q8_0", np.zeros(68, np.uint8)), "rows of Q8_0 need a multiple of 32"),
        ({}, TensorSource("x", (2, 32), "IQ2_S", np.zeros(68, np.uint8)), "'IQ2_S' is not one of"),
        ({"a": object()}, None, "metadata 'a' is a object, which GGUF cannot hold"),
        ({"a": [1, "b"]}, None, "metadata 'a' is a list of unlike things"),
        ({"a": 1 << 64}, None, "out of bounds|too large"),
        ({"general.alignment": 48}, None, "general.alignment is 48, expected a power of two"),
    ],
)  # fmt: skip
def test_the_writer_refuses_and_leaves_nothing(tmp_path, metadata, source, message):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"as before")
    with pytest.raises((ValueError, TypeError, OverflowError), match=message):
        write_gguf(path, metadata, [source] if source else [])
    assert path.read_bytes() == b"as before" and list(tmp_path.iterdir()) == [path]


def test_the_writer_streams(tmp_path):
    """64 MB in pieces of 1 MB: never more than a few pieces in memory."""
    piece = np.arange(1 << 18, dtype=np.float32)
    source = TensorSource("x", (64, 1 << 18), "F32", lambda: (piece + i for i in range(64)))
    tracemalloc.start()
    try:
        write_gguf(tmp_path / "a.gguf", {}, [source, source._replace(name="y", data=piece, shape=(1 << 18,))])
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    model = open_gguf(tmp_path / "a.gguf")
    x = model.tensors["x"].data.view("<f4").reshape(64, -1)
    assert np.array_equal(x[63], piece + 63) and np.array_equal(model.tensors["y"].data.view("<f4"), piece)


# ---- tools/make_random_model.py --------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "format"), [("llama", "Q4_K"), ("qwen2", "Q8_0"), ("qwen3", "F16")])
def test_random_models(tmp_path, monkeypatch, arch, format):
    import runpy
    from pathlib import Path

    tool = Path(__file__).parents[2] / "tools" / "make_random_model.py"
    for name in ("a", "b"):
        argv = [str(tool), "--arch", arch, "--format", format, "--layers", "1", "--seed", "5", str(tmp_path / name)]
        monkeypatch.setattr("sys.argv", argv)
        runpy.run_path(str(tool), run_name="__main__")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes(), "the same seed gives the same file"
    model = open_gguf(tmp_path / "a")
    tokens = model.metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == len(set(tokens)) == model.metadata[f"{arch}.vocab_size"] == 2048
    assert model.tensors["token_embd.weight"].shape == (2048, 256)
    assert model.tensors["token_embd.weight"].format == {"Q4_K": "Q6_K"}.get(format, format)
    for tensor in model.tensors.values():
        if len(tensor.shape) == 2:
            weights = dequantize(tensor.data, tensor.format, tensor.shape)
            # 32768 values or more: the mean is within 4 standard errors and some slack for shared scales.
            assert abs(weights.mean()) < 0.001 and abs(weights.std() - 0.02) < 0.001

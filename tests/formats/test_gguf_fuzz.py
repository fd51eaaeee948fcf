"""Thousands of mutated GGUF files: each opens, or is refused with a FormatError; nothing else may come out."""

import struct

import numpy as np
import pytest

from nitinol.formats.blocks import FORMATS
from nitinol.formats.gguf import FormatError, open_gguf
from nitinol.formats.gguf_writer import TensorSource, write_gguf

MUTATIONS = 5000  # of each of four files, at about 0.3 ms
INTERESTING = [0, 1, 2, 7, 8, 9, 12, 13, 31, 32, 33, 255, 256, 1 << 16, 1 << 24, 1 << 31, (1 << 32) - 1, 1 << 32,
               1 << 40, 1 << 61, 1 << 63, (1 << 64) - 32, (1 << 64) - 1]  # fmt: skip


def base_files(folder, rng):
    """Small files in which every feature of the format occurs; the last two are the parts of a split model."""

    def sources(formats):
        for name in formats:
            layout = FORMATS[name]
            data = rng.integers(0, 256, 2 * layout.bytes, dtype=np.uint8)
            yield TensorSource(f"blk.{name}", (2, layout.values), name, data)

    everything = {
        "general.architecture": "llama", "general.alignment": 32, "i8": np.int8(-1), "u64": np.uint64(5),
        "f64": np.float64(0.5), "yes": True, "bools": [True, False], "tokens": ["a", "bc", "é", "", "🜂"] * 3,
        "scores": np.float32([0, 1, 2]), "nested": [[1, 2], [3]], "deeper": [[["a"], ["b"]], [["c", "d"]]],
    }  # fmt: skip
    write_gguf(folder / "full.gguf", everything, list(sources(FORMATS)))
    write_gguf(folder / "small.gguf", {"general.alignment": 64, "s": "x"}, list(sources(["F32", "Q4_0"])))
    for index, formats in enumerate((["F16", "Q8_0"], ["BF16"])):
        split = {"split.no": np.uint16(index), "split.count": np.uint16(2), "split.tensors.count": np.int32(3)}
        write_gguf(folder / f"m-{index + 1:05}-of-00002.gguf", split, list(sources(formats)))
    return [folder / name for name in ("full.gguf", "small.gguf", "m-00001-of-00002.gguf", "m-00002-of-00002.gguf")]


def mutate(content, rng):
    """One to three random faults. Most hit the header: that is where lengths and counts are."""
    content = bytearray(content)
    header = min(len(content), 900)
    for _ in range(rng.integers(1, 4)):
        if len(content) < 8:
            break
        at = int(rng.integers(0, min(header, len(content)) if rng.random() < 0.9 else len(content)))
        length = int(rng.integers(1, 64))
        match rng.integers(0, 7):
            case 0:
                del content[at:]
            case 1:
                content[at] ^= 1 << int(rng.integers(0, 8))
            case 2:
                width = (2, 4, 8)[rng.integers(0, 3)]
                value = INTERESTING[rng.integers(0, len(INTERESTING))] % (1 << (8 * width))
                content[at : at + width] = value.to_bytes(width, "little")
            case 3:  # a length or count is off by a little
                if at + 8 <= len(content):
                    (value,) = struct.unpack_from("<Q", content, at)
                    struct.pack_into("<Q", content, at, (value + int(rng.integers(-9, 10))) % (1 << 64))
            case 4:
                del content[at : at + length]
            case 5:  # a piece of the file appears in another place, over or between what was there
                source = int(rng.integers(0, len(content)))
                piece = content[source : source + length]
                content[at : at + (length if rng.random() < 0.5 else 0)] = piece
            case 6:
                content[at : at + length] = rng.bytes(length)
    return bytes(content)


def read_everything(path):
    model = open_gguf(path)
    repr(model.metadata)
    for tensor in model.tensors.values():
        assert tensor.offset + tensor.nbytes <= model.parts[tensor.part].size
        if tensor.format in FORMATS:
            assert tensor.data.size == tensor.nbytes
            tensor.data.sum()


@pytest.mark.parametrize("which", range(4), ids=["full", "small", "first part", "second part"])
def test_mutated_files(tmp_path, which):
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    paths = base_files(tmp_path, rng)
    target, opened = paths[which], paths[min(which, 2)]
    read_everything(opened)
    content = target.read_bytes()
    outcomes = {"opened": 0, "refused": 0}
    for index in range(MUTATIONS):
        broken = mutate(content, rng)
        target.write_bytes(broken)
        try:
            read_everything(opened)
            outcomes["opened"] += 1
        except FormatError as error:
            outcomes["refused"] += 1
            assert "\n" not in str(error) and len(str(error)) < 1000
        except BaseException:
            print(f"mutation {index} of {target.name}: {broken[:1200].hex()}")
            raise
    print(outcomes)
    assert min(outcomes.values()) > MUTATIONS // 100, "the mutations are all harmless, or all hopeless"


def test_every_truncation(tmp_path):
    path = base_files(tmp_path, np.random.default_rng(0))[1]
    content = path.read_bytes()
    last = max(tensor.offset + tensor.nbytes for tensor in open_gguf(path).tensors.values())
    for length in range(last):
        path.write_bytes(content[:length])
        with pytest.raises(FormatError):
            open_gguf(path)

"""Block formats: the decode is bit-exact with the `gguf` package, the encode is exact or within theory."""

import re

import gguf
import numpy as np
import pytest

from nitinol.formats import blocks, quantization
from nitinol.formats.blocks import FORMATS, pack_planes, planes, unpack
from nitinol.formats.quantization import dequantize, quantize

QUANTISED = [name for name, layout in FORMATS.items() if layout.values > 1]
SAME_ENCODER = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


@pytest.fixture
def rng():
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def same_bits(a, b):
    """Equal bit for bit; NaNs only have to be NaNs, since which payload survives a product is the CPU's choice."""
    nan = np.isnan(a)
    return np.array_equal(nan, np.isnan(b)) and np.array_equal(a[~nan].view("u4"), b[~nan].view("u4"))


def random_bytes(rng, name, rows, row_blocks):
    """Rows of random blocks whose scales are all finite."""
    layout = FORMATS[name]
    data = rng.integers(0, 256, (rows, row_blocks * layout.bytes), dtype=np.uint8)
    fields = data.view(layout.layout)
    for field in {"d", "m", "dmin"} & set(layout.layout.names):
        fields[field] = rng.standard_normal(fields.shape) * 10.0 ** rng.integers(-7, 4, fields.shape)
    return data


def test_the_table_is_ggml():
    for name, layout in FORMATS.items():
        kind = gguf.GGMLQuantizationType[name]
        assert (layout.id, layout.values, layout.bytes) == (kind, *gguf.GGML_QUANT_SIZES[kind])


def test_the_documented_layout_is_the_one_in_use():
    documented = {}
    for row in re.findall(r"^\| (\w+) +\| (\d+) +\| (\d+) +\| (.*?) *\|$", blocks.__doc__, re.M):
        name, values, size, fields = row
        documented[name] = (int(values), int(size), re.findall(r"(?:^|; )(\d+) (\w+)", fields))
    assert documented.keys() == FORMATS.keys()
    for name, layout in FORMATS.items():
        fields = [(str(offset), field) for field, (_, offset) in layout.layout.fields.items()]
        assert documented[name] == (layout.values, layout.bytes, fields)


@pytest.mark.parametrize("name", FORMATS)
def test_dequantize_is_bit_exact(name, rng):
    rows, row_blocks = int(rng.integers(1, 9)), int(rng.integers(1, 6))
    shape = (rows, row_blocks * FORMATS[name].values)
    data = random_bytes(rng, name, rows, row_blocks)
    expected = gguf.dequantize(data, gguf.GGMLQuantizationType[name])
    assert same_bits(dequantize(data, name, shape), expected)
    if name in QUANTISED:
        assert np.isfinite(expected).all(), "the inputs were meant to be finite"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the gguf package, for infinity times zero
def test_dequantize_is_bit_exact_on_any_bytes(name, rng):
    count = 300 if name in QUANTISED else 3000  # a scale is not finite once in 32 blocks, a BF16 once in 256
    values = count * FORMATS[name].values
    data = rng.integers(0, 256, (4, count * FORMATS[name].bytes), dtype=np.uint8)
    expected = gguf.dequantize(data, gguf.GGMLQuantizationType[name])
    assert same_bits(dequantize(data, name, (4, values)), expected)
    assert name == "F32" or not np.isfinite(expected).all(), "some scale should be infinite or NaN"


@pytest.mark.parametrize("name", QUANTISED)
def test_unpack_is_the_formula(name, rng):
    data = random_bytes(rng, name, 3, 2)
    scales, quants, minimums = unpack(data, name)
    layout = FORMATS[name]
    assert quants.shape == (6, layout.values) and quants.dtype == np.int8
    values = np.repeat(scales, layout.group, axis=1) * quants
    if minimums is not None:
        values += np.repeat(minimums, layout.group, axis=1)
    assert same_bits(values.astype(np.float32).reshape(-1), dequantize(data, name, (6 * layout.values,)))


@pytest.mark.parametrize(("bits", "span"), [(4, 16), (4, 32), (4, 64), (2, 32), (1, 32), (1, 1), (2, 4)])
def test_planes_and_back(bits, span, rng):
    packed = rng.integers(0, 256, (5, 64), dtype=np.uint8)
    integers = planes(packed, bits, span)
    # Straight from the definition: group, then plane, then byte.
    expected = [
        (int(packed[2, g * span + j]) >> (p * bits)) % (1 << bits)
        for g in range(64 // span)
        for p in range(8 // bits)
        for j in range(span)
    ]
    assert integers[2].tolist() == expected
    assert np.array_equal(pack_planes(integers, bits, span), packed)


@pytest.mark.parametrize("name", SAME_ENCODER)
def test_quantize_is_ggmls(name, rng):
    x = rng.standard_normal((7, 320)).astype(np.float32) * 10.0 ** rng.integers(-4, 3, (7, 1)).astype(np.float32)
    x[1, :32] = 0
    x[2, :32] = 0.75
    x[3] = rng.integers(-127, 128, 320) / 2  # ties
    x[4, :32] = 1e-6
    ours = quantize(x, name)
    with np.errstate(over="ignore"):
        theirs = gguf.quantize(x, gguf.GGMLQuantizationType[name])
    assert np.array_equal(ours, theirs.reshape(-1).view(np.uint8))


def test_bf16_rounds_as_torch(rng):
    torch = pytest.importorskip("torch")
    bits = rng.integers(0, 1 << 32, 100_000, dtype=np.uint32)
    x = bits.view(np.float32)
    x = x[~np.isnan(x)]
    expected = torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(quantize(x, "BF16").view(np.uint16), expected)


@pytest.mark.parametrize("name", QUANTISED)
def test_quantize_error_is_what_the_bits_allow(name, rng):
    """Normal values: a group's range is about 6 deviations, cut into 2^bits steps, and rounding to a step leaves
    step / sqrt(12); the largest of 16 or 32 values is 2 to 3 deviations, so this is an upper estimate."""
    bits = int(name[1])
    deviation = 10.0 ** rng.integers(-3, 3)
    x = (rng.standard_normal((64, 512)) * deviation).astype(np.float32)
    y = dequantize(quantize(x, name), name, x.shape)
    error = np.sqrt(np.mean((x - y).astype(np.float64) ** 2)) / deviation
    assert 0 < error < 6 / 2**bits / np.sqrt(12)


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros(name):
    zeros = np.zeros((2, 512), dtype=np.float32)
    assert not dequantize(quantize(zeros, name), name, zeros.shape).any()


@pytest.mark.parametrize("name", FORMATS)
def test_steps_do_not_show(name, rng, monkeypatch):
    x = rng.standard_normal((5, 1536)).astype(np.float32)
    whole = quantize(x, name)
    values = dequantize(whole, name, x.shape)
    monkeypatch.setattr(quantization, "_STEP_VALUES", 512)
    assert np.array_equal(quantize(x, name), whole)
    assert np.array_equal(dequantize(whole, name, x.shape), values)


@pytest.mark.parametrize("name", QUANTISED)
def test_not_finite_is_refused(name):
    row = np.ones(256, dtype=np.float32)
    for bad, message in ((np.nan, "NaN or infinity"), (np.inf, "NaN or infinity"), (3e38, "float16")):
        row[77] = bad
        with pytest.raises(ValueError, match=message):
            quantize(row, name)


def test_wrong_sizes_and_names():
    with pytest.raises(ValueError, match="multiple of 32 values, but the shape is \\(2, 33\\)"):
        quantize(np.zeros((2, 33)), "Q8_0")
    with pytest.raises(ValueError, match="35 bytes are not a whole number of Q8_0 blocks of 34"):
        dequantize(np.zeros(35, np.uint8), "Q8_0", (32,))
    with pytest.raises(ValueError, match="holds 32 values, but shape \\(2, 32\\) has 64"):
        dequantize(np.zeros(34, np.uint8), "Q8_0", (2, 32))
    with pytest.raises(ValueError, match="'IQ2_S' is not one of F32"):
        dequantize(np.zeros(34, np.uint8), "IQ2_S", (32,))
    with pytest.raises(ValueError, match="F16 keeps values"):
        unpack(np.zeros(34, np.uint8), "F16")

"""Whole models on Metal: the same greedy tokens as the CPU, clean in validation mode, and what a step costs."""

from __future__ import annotations

import gc
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_files import SMALL_WINDOW, mixed_file, random_file
from same_tokens import check_same_tokens, follow

from nitinol.cli import main
from nitinol.formats.blocks import FORMATS
from nitinol.generate.model import Model, load
from nitinol.generate.profile import moved
from nitinol.models import ARCHITECTURES
from nitinol.runtime import open_device, using_device
from nitinol.runtime.device import DeviceError
from nitinol.runtime.metal import MetalDevice

try:
    open_device("metal")
except DeviceError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_the_tokens_of_the_cpu(format: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """From one token on, so through the kernels of decoding alone."""
    path = random_file(tmp_path / f"{format}.gguf", format, seed=int(rng.integers(1 << 31)), ffn=256, tied=False)
    check_same_tokens(path, "metal", rng, 1)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_gives_the_tokens_of_the_cpu(arch: str, rng: np.random.Generator, tmp_path: Path) -> None:
    path = random_file(tmp_path / f"{arch}.gguf", "Q8_0", arch, seed=int(rng.integers(1 << 31)), ffn=256, tied=False,
                       change=SMALL_WINDOW if arch == "gemma3" else None)
    check_same_tokens(path, "metal", rng, 9)


def test_a_prompt_through_all_formats_gives_the_tokens_of_the_cpu(rng: np.random.Generator, tmp_path: Path) -> None:
    """12 formats in one model, each in a matrix product and a matrix-vector product."""
    path = mixed_file(tmp_path / "mixed.gguf", int(rng.integers(12)), int(rng.integers(1 << 31)))
    check_same_tokens(path, "metal", rng, 9)


# --------------------------------------------------------------------------------------- with the software's counters

CODE = "def fib(n):\n"


@pytest.fixture
def software() -> Iterator[Any]:
    """softmetal, in its plain mode again afterwards."""
    softmetal = pytest.importorskip("softmetal")
    if getattr(sys.modules["Metal"], "__package__", "") != "softmetal":
        pytest.skip("a real GPU does not count")
    yield softmetal
    softmetal.set_validation(False)
    softmetal.set_counting(False)
    softmetal.set_seed(0)
    softmetal.configure()


def demo() -> tuple[Model, list[int]]:
    model = load("demo", device="metal", context=256)
    return model, model.encode(CODE)


def test_a_step_is_one_command_buffer_and_one_wait_and_allocates_nothing(software: Any) -> None:
    model, ids = demo()
    follow(model, ids, ids[:3])  # the list is made, submitted directly, then made an indirect command buffer
    software.reset_counters()
    before = vars(model.device.counters).copy()
    for _ in range(5):
        model.session.step()
    after, theirs = vars(model.device.counters), software.counters()
    launches = 5 * len(model.session.decode_list.records)
    changed = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert changed == {"submits": 5, "waits": 5, "dispatches": launches}
    assert (theirs["submits"], theirs["waits"], theirs["allocations"], theirs["dispatches"]) == (5, 5, 0, launches)


def test_the_demo_in_validation_mode_and_its_traffic(software: Any) -> None:
    """A prefill and decode steps are clean, and the same under two orders of threads as without validation; and a step
    moves little more than it must (one test, as both need the kernels compiled once more).

    What must move: all weights, the cache up to the position, and activations. The counters know no caches: a program
    of a matrix-vector product has 16 rows and loads its activations for itself, 1/16 of a byte for a byte of Q8_0. A
    GPU's first cache holds these (400 bytes); here they are counted once per program, and left out the second time."""
    model, ids = demo()
    plain = follow(model, ids, [5, 6])
    software.set_validation(True)
    for seed in (1, 2):
        software.set_seed(seed)
        assert follow(model, ids, [5, 6]) == plain  # DeviceError where validation finds something
    software.set_validation(False)
    software.set_seed(0)
    software.set_counting(True)
    position = len(model.session.cache.tokens)
    software.reset_counters()
    model.session.step()
    counted = software.counters()
    found = counted["loaded_device"] + counted["stored_device"]
    records = model.session.decode_list.records
    least = sum(moved(records, model, position, 1))
    again = sum((record.grid[0] - 1) * (record.shapes[0][1] + 4 * record.shapes[1][1]) for record in records
                if record.name == "matvec_kernel")  # int8 values, float32 scales
    assert found <= 1.05 * (least + again), (found, least, again)
    assert found <= 1.10 * least


def test_a_model_that_does_not_fit_is_refused_before_anything_is_allocated(software: Any) -> None:
    """With the figures, and with what would fit."""
    gc.collect()
    used = open_device("metal")._device.currentAllocatedSize()  # by other tests in this process
    software.configure(working_set_bytes=used + 30_000_000)
    small = MetalDevice()
    before = vars(small.counters).copy()
    with using_device(small), pytest.raises(MemoryError) as caught:
        load("demo", context=1024)
    assert vars(small.counters) == before
    text = str(caught.value)
    assert re.search(r"needs 30\.\d MB at a context of 1024 tokens \(weights 15\.\d MB, cache .* 30\.0 MB are", text)
    fits = re.search(r"a context of (\d+) tokens would fit", text)
    assert fits
    with using_device(small):
        assert len(follow(load("demo", context=int(fits[1])), [1], [2])) == 2
    small.close()


# --------------------------------------------------------------------------------------------------- the command line


def test_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def result(*arguments: str) -> Any:
        assert main(arguments) == 0
        return json.loads(capsys.readouterr().out)

    texts = {device: result("run", "demo", CODE, "--max-tokens", "8", "--device", device, "--json")["text"]
             for device in ("cpu", "metal")}
    assert texts["cpu"] == texts["metal"]
    assert main(["run", "demo", CODE, "--max-tokens", "2", "--device", "metal"]) == 0
    name = open_device("metal").description
    assert f"on {name}" in capsys.readouterr().err
    facts = {device["name"]: device for device in result("devices", "--json")}
    assert facts["metal"]["description"] == name and facts["metal"]["memory_bytes"] > 1e8
    picture = tmp_path / "token.svg"
    found = result("trace", "demo", CODE, "--device", "metal", "--svg", str(picture), "--json")
    decode = found["phases"][-1]
    assert found["device"] == "metal" and found["limits"]["bandwidth_gb_s"] > 0
    assert decode["counters"] == {"submits": 1, "waits": 1, "allocations": 0, "dispatches": len(decode["rows"])}
    assert all(row["time_us"] > 0 for row in decode["rows"])
    assert name in picture.read_text()
    found = result("bench", "demo", "--prompt", "6", "--gen", "3", "--reps", "1", "--device", "metal", "--json")
    assert found["device"] == "metal" and found["decode_tok_s"] > 0 and "threads" not in found
    assert main(["run", "demo", CODE, "--device", "metal", "--threads", "2"]) == 2
    assert "only the CPU has a number of threads" in capsys.readouterr().err

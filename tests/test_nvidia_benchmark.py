"""benchmarks/nvidia.py without a GPU: its kernels compute what they should on the CPU; it says what is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import use_fake

import nitinol
from nitinol.runtime import cuda_transfer, open_device

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import nvidia  # noqa: E402


@pytest.fixture(scope="module")
def kernels() -> Any:
    return nvidia.load_kernels("nitinol")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    power = np.exp(x - x.max(-1, keepdims=True))
    return power / power.sum(-1, keepdims=True)


# fp32 sums of some hundred terms near 1: errors stay below 100 * 2**-24 of the largest.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def test_elementwise(kernels: Any, rng: np.random.Generator) -> None:
    n = 1000
    x, y, out = *normal(rng, 2, n), np.full(n, np.nan, np.float32)
    kernels.add[(8,)](x, y, out, n, BLOCK=128)
    np.testing.assert_array_equal(out, x + y)
    kernels.swiglu[(8,)](x, y, out, n, BLOCK=128)
    np.testing.assert_allclose(out, x.astype(np.float64) / (1 + np.exp(-x.astype(np.float64))) * y, **CLOSE)


def test_rows(kernels: Any, rng: np.random.Generator) -> None:
    rows, columns = 5, 100
    x, weight, bias, out = normal(rng, rows, columns), *normal(rng, 2, columns), np.full((5, 100), np.nan, np.float32)
    exact = x.astype(np.float64)
    kernels.softmax[(rows,)](x, out, columns, BLOCK=128)
    np.testing.assert_allclose(out, softmax(exact), **CLOSE)
    kernels.rms_norm[(rows,)](x, weight, out, columns, 1e-5, BLOCK=128)
    np.testing.assert_allclose(out, exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5) * weight, **CLOSE)
    kernels.layer_norm[(rows,)](x, weight, bias, out, columns, 1e-5, BLOCK=128)
    centred = exact - exact.mean(-1, keepdims=True)
    np.testing.assert_allclose(out, centred / np.sqrt(exact.var(-1, keepdims=True) + 1e-5) * weight + bias, **CLOSE)
    target, loss = rng.integers(0, columns, rows), np.full(rows, np.nan, np.float32)
    kernels.cross_entropy[(rows,)](x, target, loss, columns, BLOCK=32)
    np.testing.assert_allclose(loss, -np.log(softmax(exact)[np.arange(rows), target]), **CLOSE)


def test_rope(kernels: Any, rng: np.random.Generator) -> None:
    tokens, heads, half = 3, 5, 8
    x, angle = normal(rng, tokens, heads, 2 * half), normal(rng, tokens, half)
    out, cos, sin = np.full_like(x, np.nan), np.cos(angle), np.sin(angle)
    kernels.rope[(tokens, 2)](x, cos, sin, out, heads, HALF=half, BLOCK=4)
    a, b, c, s = x[..., :half], x[..., half:], cos[:, None], sin[:, None]
    np.testing.assert_allclose(out, np.concatenate([a * c - b * s, b * c + a * s], -1), **CLOSE)


def test_matmul(kernels: Any, rng: np.random.Generator) -> None:
    m, n, k = 96, 64, 48
    a, b, out = normal(rng, m, k), normal(rng, k, n), np.full((m, n), np.nan, np.float32)
    kernels.matmul[(6,)](a, b, out, m, n, k, BLOCK_M=32, BLOCK_N=32, BLOCK_K=16, GROUP=2)
    np.testing.assert_allclose(out, a.astype(np.float64) @ b, rtol=1e-5, atol=1e-4)


def test_attention(kernels: Any, rng: np.random.Generator) -> None:
    heads, tokens, d = 2, 64, 16
    q, k, v = normal(rng, 3, heads, tokens, d)
    out = np.full_like(q, np.nan)
    kernels.attention[(2, heads)](q, k, v, out, d**-0.5, tokens, D=d, BLOCK_M=32, BLOCK_N=16)
    scores = q.astype(np.float64) @ k.transpose(0, 2, 1) * d**-0.5
    scores[:, np.triu(np.ones((tokens, tokens), bool), 1)] = -np.inf
    np.testing.assert_allclose(out, softmax(scores) @ v, **CLOSE)


def test_tables() -> None:
    result = nvidia.Result("case", {"nitinol": [2e-6, 1e-6, 3e-6], "triton": [1e-6]}, {"nitinol": "BLOCK 4"}, 4000, 10)
    text = nvidia.kernel_table([result, nvidia.Result("other", problem="wrong by 1")], {"read_gb_s": 4})
    assert "| case  |        2.0 |       1.0 |            0.50× |                  50% |" in text
    assert "other: wrong by 1." in text and "Geometric mean 0.500×" in text


def test_the_table_of_uploads() -> None:
    found = {"bytes": 16e9, "upload": [0.5, 0.32, 0.31], "load": [0.4]}
    lines = nvidia.upload_table({"BF16": found}, {"link_gb_s": 62.5}).splitlines()
    assert [cell.strip() for cell in lines[-1].strip("|").split("|")] == [
        "BF16", "16.00", "0.320", "50.0", "62.5", "80%", "0.400"]  # fmt: skip


def test_an_upload_is_measured_each_time_from_the_beginning(monkeypatch: Any) -> None:
    """Over a stand-in for the driver: memory and staging buffers are allocated in every round, and given back."""
    demo = Path(nitinol.__file__).parent / "data" / "demo.gguf"
    monkeypatch.setattr(cuda_transfer, "PIECE", 1 << 20)
    monkeypatch.setattr(cuda_transfer, "STAGES", 1)
    driver = use_fake(monkeypatch)
    device = open_device("cuda")
    assert nvidia.link_bandwidth(device, 1 << 20) > 0 and driver.calls["cuMemcpyHtoDAsync"] == 8
    nvidia.measure_upload(demo, 1)
    before, used, pinned = driver.calls.copy(), driver.used, len(driver.pinned)
    found = nvidia.measure_upload(demo, 3)
    assert len(found["upload"]) == len(found["load"]) == 3 and found["bytes"] == demo.stat().st_size
    assert (driver.used, len(driver.pinned)) == (used, pinned)
    calls = driver.calls - before
    assert calls["cuMemHostRegister"] == 3  # each device's staging buffer
    assert calls["cuMemHostAlloc"] == 0  # status words come with the lists of kernels that assert something


def test_without_a_gpu_it_says_so() -> None:
    hidden = {"PYTHONPATH": str(BENCHMARKS.parent), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(BENCHMARKS / "nvidia.py"), "limits"], capture_output=True, text=True,
                          env=hidden, check=False)  # fmt: skip
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("no figures for NVIDIA GPUs: ")

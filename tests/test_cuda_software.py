"""CUDA source that runs: on the CPU, through Nitinol's own driver, with every buffer before a guard page."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
from software_cuda import Gpu, open_gpu


@pytest.fixture
def gpu(monkeypatch):
    device = open_gpu(monkeypatch, Gpu())
    yield device
    device.close()


# -------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("nbytes", [1 << 10, 1 << 20])
def test_memory_in_a_cycle_of_garbage_stays_allocated(gpu, nbytes):
    """The pool gets such memory back when the collector runs; the GPU must not."""
    owner = SimpleNamespace(buffer=gpu.allocate(nbytes))
    owner.me = owner
    address = owner.buffer.address
    del owner
    gc.collect()
    assert gpu.allocate(nbytes).address == address
    assert any(start <= address < start + memory.nbytes for start, memory in gpu.cu.memory.items())

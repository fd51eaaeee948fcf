"""The benchmarks run: each script once at a tiny size, in a process of its own. Nothing here is about speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import against_llama_cpp  # noqa: E402
import common  # noqa: E402
import kernels  # noqa: E402
import memory  # noqa: E402
import run  # noqa: E402
import startup  # noqa: E402


def results(tmp_path: Path, script: str, *options: str) -> tuple[str, dict[str, Any]]:
    """What a script prints and writes; the machine and the command are checked here."""
    file = tmp_path / "results.json"
    done = subprocess.run([sys.executable, str(BENCHMARKS / script), *options, "--json", str(file)],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(file.read_text())
    assert document["machine"]["processor"] and document["machine"]["cores"] >= 1
    assert document["machine"]["memory_bytes"] > 0 and document["machine"]["versions"]["nitinol"]
    assert script == "run.py" or document["command"] == " ".join(["python", f"benchmarks/{script}", *options])
    return done.stdout, document


@pytest.mark.slow
def test_kernels_are_checked_and_timed(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    text, document = results(tmp_path, "kernels.py", "--quick", "--rounds", "2", "--threads", "1")
    assert document["threads"] == 1 and document["limits"]["float32_gflop_s"] > 0
    found = document["results"]
    assert len(found) == len(kernels.cases(quick=True))
    for result in found:
        assert result["name"] in text
        assert set(result["errors"]) > {"nitinol"}
        assert [len(times) for times in result["seconds"].values()] == [2, 2]


@pytest.mark.slow
def test_training_kernels_agree_and_are_timed(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    text, document = results(tmp_path, "training_kernels.py", "--quick", "--rounds", "2", "--threads", "1")
    assert document["device"] == "cpu" and len(document["results"]) >= 9
    for result in document["results"]:
        assert result["name"] in text and {"fused", "torch"} <= set(result["median_s"])


@pytest.mark.slow
def test_the_sampler_draws_what_pytorch_keeps_and_is_timed(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    text, document = results(tmp_path, "sampling.py", "--quick", "--rounds", "2", "--threads", "1")
    assert len(document["results"]) == 3
    for result in document["results"]:
        assert result["name"] in text and set(result["median_s"]) == {"nitinol", "torch"}


def test_a_wrong_kernel_is_not_timed() -> None:
    torch = pytest.importorskip("torch")
    import numpy as np

    case = kernels.add(np.random.default_rng(), 1000)
    case.function = lambda x, y: x + y * 1.0001
    with pytest.raises(SystemExit, match="nitinol is wrong by"):
        kernels.measure(case, 1, 0.0)
    case = kernels.add(np.random.default_rng(), 1000)
    case.peers = {"nothing": lambda: torch.zeros(1000)}
    with pytest.raises(SystemExit, match="nothing is wrong by"):
        kernels.measure(case, 1, 0.0)


@pytest.mark.slow
def test_models_alone_and_the_memory_of_one(tmp_path: Path) -> None:
    """An empty package of llama.cpp's name: whether the real one is installed does not matter here."""
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('not for this test')")
    text, document = results(
        tmp_path, "against_llama_cpp.py", "--preset", "tiny", "--formats", "Q4_K", "--models", str(tmp_path),
        "--prompts", "8", "3", "--gen", "2", "--rounds", "2")
    (result,) = document["results"]
    assert list(result["tok_s"]["nitinol"]) == ["prefill-3", "prefill-8", "decode"]
    assert all(len(times) == 2 for times in result["seconds"]["nitinol"].values())
    assert 0 < result["decode_bytes_per_token"] <= result["file_bytes"] + 1e6
    assert "| Q4_K, prefill 8 " in text
    file = tmp_path / "tiny-Q4_K.gguf"
    text, document = results(tmp_path, "memory.py", str(file), "--prompt", "9", "--gen", "5", "--context", "64")
    (result,) = document["results"]
    assert result["file_bytes"] == file.stat().st_size < result["peak_rss_bytes"]
    assert result["cache_bytes"] == 64 * 2 * 2 * 128 * 2  # tokens, layers, keys and values, 2 heads of 64, fp16
    assert result["per_token"] == {"submits": 1, "waits": 1, "allocations": 0, "pool_hits": 0}
    assert len(result["between_lists_ms"]) == result["tokens"] - 1 and min(result["between_lists_ms"]) > 0


def test_logits_that_differ_stop_the_comparison() -> None:
    import numpy as np

    x, y = np.random.default_rng().standard_normal((2, 1000))
    assert against_llama_cpp.compare([x]) is None
    same = against_llama_cpp.compare([x, x + 0.01 * y])
    assert same is not None and same["correlation"] > 0.99
    with pytest.raises(SystemExit, match="correlation"):
        against_llama_cpp.compare([x, y])


@pytest.mark.slow
def test_startup_and_the_summary_of_all(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- startup -->\nold\n<!-- end -->\nafter\n")
    text, document = results(tmp_path, "run.py", "startup", "--quick", "--fill", str(page))
    lines = page.read_text().splitlines()
    assert lines[:2] == ["before", "<!-- startup -->"] and lines[-2:] == ["<!-- end -->", "after"]
    assert lines[2].startswith("| what") and "old" not in lines
    found = document["benchmarks"]["startup"]["results"]
    assert document["quick"] and "### Start" in text
    assert len(found["first_start"]) == 1 and len(found["second_start"]) == 3
    assert all(0 < first <= end for first, end in found["first_start"] + found["second_start"])
    assert list(found["imports"]) == list(startup.IMPORTS)


@pytest.mark.slow
def test_small_things(tmp_path: Path) -> None:
    text, document = results(tmp_path, "small.py", "--calls", "20")
    assert "kernel[grid], three NumPy arrays" in text
    for sides in document["microseconds"].values():
        assert all(0 < smallest <= median for median, smallest in sides.values())
    assert list(document["first_call_milliseconds"]) == ["cold", "from disk"]


def test_sides_take_turns() -> None:
    calls: list[str] = []
    sides = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = common.alternate(sides, rounds=3, seconds=0.0)
    assert [len(times[name]) for name in "ab"] == [3, 3]
    # Two calls each to find the number of calls, then a warm-up and a timed one; the first is second in the next round.
    assert "".join(calls) == "aabb" + "aabb" + "bbaa" + "aabb"


def test_tables_are_markdown() -> None:
    assert common.table(["case", "rate"], [["one", "1.5"], ["another", "–"]]).splitlines() == [
        "| case    | rate |", "| ------- | ---: |", "| one     |  1.5 |", "| another |    – |"]
    assert common.unsteady({"calm": [1.0, 1.2], "busy": [1.0, 1.4, 1.0]}).endswith(": busy.")
    assert common.unsteady({"calm": [1.0, 1.2]}) == ""
    assert common.percent(1, 3) == "33%" and common.percent(None, 3) == common.percent(1, None) == "–"


def test_bad_choices_are_explained(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "speed"])
    with pytest.raises(SystemExit):
        run.main()
    with pytest.raises(SystemExit, match="no place for the tables of memory"):
        run.fill(Path(__file__), "memory", "")
    assert "there is no benchmark 'speed'; choose from kernels, llama_cpp, memory, startup" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["memory.py", "nowhere.gguf"])
    with pytest.raises(SystemExit, match=r"nowhere\.gguf is not there"):
        memory.main()

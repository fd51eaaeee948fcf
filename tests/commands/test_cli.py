"""The command line, in this process: what it prints, and that every bad input is one sentence and exit code 2."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from model_files import random_file

from nitinol.cli import main


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(random_file(tmp_path_factory.mktemp("models") / "tiny.gguf", ffn=256, heads=2, kv_heads=1))


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(random_file(tmp_path_factory.mktemp("models") / "chat.gguf", chat=True, ffn=256, heads=2, kv_heads=1))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that must fail."""
    code = main(arguments)
    captured = capsys.readouterr()
    assert code == 2, captured
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("nitinol: "), captured.err
    assert "Traceback" not in captured.err and "internal error" not in captured.err
    return captured.err


def result(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(arguments) == 0
    return json.loads(capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------ good input


@pytest.mark.parametrize("command", ["run", "inspect", "trace", "bench", "tokenize", "devices"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Usage" in text and "--json" in text and "--help" in text


def test_inspect_shows_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "demo", "--tensors"]) == 0
    text = capsys.readouterr().out
    assert "Llama" in text and "1,024 tokens" in text and "blk.0.attn_q.weight" in text
    facts = result(capsys, "inspect", "demo", "--json", "--context", "100")
    per_token = 2 * 2 * facts["layers"] * facts["kv_heads"] * facts["head_dim"]  # keys and values in fp16
    assert facts["memory"][0]["cache_bytes"] == 100 * per_token
    assert facts["architecture"] == "llama" and facts["parameters"] == 14_555_520


def test_tokenize_gives_ids_that_decode_to_the_text(capsys: pytest.CaptureFixture[str], tiny: str) -> None:
    found = result(capsys, "tokenize", tiny, "hello <|eot_id|>", "--json")
    assert "".join(found["texts"][1:]) == "hello <|eot_id|>"  # after BOS
    special = result(capsys, "tokenize", tiny, "hello <|eot_id|>", "--json", "--special")
    assert special["texts"][-1] == "<|eot_id|>" and len(special["ids"]) < len(found["ids"])


def test_devices_lists_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    facts = {device["name"]: device for device in found}
    assert list(facts) == ["metal", "cuda", "cpu"]
    assert 1 <= facts["cpu"]["threads"] <= facts["cpu"]["cores"] and facts["cpu"]["simd"]
    assert facts["cpu"]["memory_bytes"] > 1 << 28
    assert all("missing" in device or device["description"] for device in found)


def test_run_json_and_text_agree(capsys: pytest.CaptureFixture[str], tiny: str) -> None:
    arguments = ("run", tiny, "hello", "--max-tokens", "5", "--raw")
    found = result(capsys, *arguments, "--json")
    wanted = {"text", "tokens", "prompt_tokens", "stop_reason", "prefill_tok_s", "decode_tok_s", "ttft_s",
              "peak_rss_bytes"}
    assert wanted <= found.keys()
    assert found["tokens"] <= 5 and found["prefill_tok_s"] > 0 and found["ttft_s"] > 0
    assert found["peak_rss_bytes"] > 10_000_000
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out == "hello" + found["text"] + "\n"
    assert "tokens read" in captured.err and captured.err.count("\n") == 1


def test_chat_from_a_pipe(capsys: pytest.CaptureFixture[str], chatty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello\n\nagain\n")))
    assert main(["run", chatty, "--max-tokens", "4"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("tokens read") == 2


def test_bench_measures(capsys: pytest.CaptureFixture[str], tiny: str) -> None:
    found = result(capsys, "bench", tiny, "--prompt", "12", "--gen", "4", "--reps", "1", "--json")
    for key in ("prefill_tok_s", "decode_tok_s", "read_bandwidth_gb_s", "decode_bandwidth_fraction"):
        assert found[key] > 0


def test_trace_accounts_for_every_launch(capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path) -> None:
    chrome, svg = tmp_path / "trace.json", tmp_path / "token.svg"
    found = result(capsys, "trace", tiny, "hello", "--json", "--chrome", str(chrome), "--svg", str(svg))
    prefill, decode = found["phases"]
    assert prefill["tokens"] > 1 and decode["tokens"] == 1
    assert decode["counters"] | {"dispatches": 0} == {"submits": 1, "waits": 1, "allocations": 0, "dispatches": 0}
    assert decode["counters"]["dispatches"] == len(decode["rows"])
    weights = Path(tiny).stat().st_size
    assert decode["bytes"] > 0.9 * weights - 200_000  # all weights are read once; the file holds a tokenizer, too
    for row in decode["rows"]:
        assert row["time_us"] >= 0 and row["kernel"] and ".py:" in row["line"]
    assert any(row["line"].startswith("llama.py:") for row in decode["rows"])
    events = json.loads(chrome.read_text())["traceEvents"]
    assert sum(event.get("cat") == "kernel" for event in events) == len(prefill["rows"]) + len(decode["rows"])
    assert svg.read_text().startswith("<svg") and svg.read_text().count("<rect") > len(decode["rows"])
    assert main(["trace", tiny, "hello"]) == 0
    text = capsys.readouterr().out
    assert "submits 1, waits 1, allocations 0" in text and "GB/s" in text


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("arguments, words", [
    (["run", "/no/such/file.gguf", "x"], "No such file"),
    (["run", "{tmp}", "x"], "regular file"),
    (["inspect", "/no/such/file.gguf"], "No such file"),
    (["run", "{model}", ""], "prompt is empty"),
    (["run", "{model}", "x", "--threads", "0"], "threads"),
    (["run", "{model}", "x", "--threads", "many"], "--threads"),
    (["run", "{model}", "x", "--threads", "100000"], "threads"),
    (["run", "{model}", "x", "--device", "abacus"], "abacus"),
    (["run", "{model}", "x", "--device", ""], "there is no device ''"),
    (["run", "{model}", "x", "--context", "0"], "context"),
    (["run", "{model}", "x", "--context", "1000000"], "context"),
    (["run", "{model}", "x", "--cache", "fp3"], "fp16"),
    (["run", "{model}", "x", "--max-tokens", "0"], "max_tokens"),
    (["run", "{model}", "x", "--temperature", "-1"], "temperature"),
    (["run", "{model}", "x", "--temperature", "nan"], "temperature"),
    (["run", "{model}", "x", "--top-k", "-1"], "top_k"),
    (["run", "{model}", "x", "--top-p", "0"], "top_p"),
    (["run", "{model}", "x", "--min-p", "2"], "min_p"),
    (["run", "{model}", "x", "--repeat-penalty", "0"], "repeat_penalty"),
    (["run", "{model}", "x", "--seed", "-3"], "seed"),
    (["run", "{model}", "x", "--stop", ""], "stop"),
    (["run", "{model}", "hello " * 300], "context"),
    (["run", "{model}", "caf\udce9"], "UTF-8"),
    (["run", "{model}", "x", "--chat"], "chat template"),
    (["run", "{model}", "x", "--system", "be nice"], "--system"),
    (["run", "{model}", "--json"], "--json"),
    (["run"], "MODEL"),
    (["run", "{model}", "x", "--nonsense"], "--nonsense"),
    (["nonsense"], "nonsense"),
    (["inspect", "{model}", "--context", "100000"], "context"),
    (["trace", "{model}", ""], "prompt is empty"),
    (["trace", "{model}", "x", "--svg", "/no/such/folder/x.svg"], "folder"),
    (["bench", "{model}", "--prompt", "0"], "--prompt"),
    (["bench", "{model}", "--prompt", "250", "--gen", "100"], "context"),
    (["bench", "{model}", "--reps", "0"], "--reps"),
    (["tokenize", "{model}", "\udcff"], "UTF-8"),
])
def test_bad_arguments(capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path, arguments: list[str],
                       words: str) -> None:
    text = refused(capsys, *(a.replace("{model}", tiny).replace("{tmp}", str(tmp_path)) for a in arguments))
    assert words in text


def test_bad_files(capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path) -> None:
    whole = Path(tiny).read_bytes()
    for name, data, words in (("empty", b"", "too few"), ("short", whole[:100_000], "truncated"),
                              ("magic", b"GGML" + whole[4:], "GGUF"),
                              ("version", whole[:4] + b"\x63" + whole[5:], "version"),
                              ("noise", os.urandom(5000), "GGUF")):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(data)
        assert words in refused(capsys, "run", str(path), "x")


@pytest.mark.parametrize("change, words", [
    ({"general.architecture": "mamba"}, "mamba"),
    ({"general.architecture": None}, "architecture"),
    ({"llama.block_count": None}, "block_count"),
    ({"llama.block_count": 1}, "blk.1"),
    ({"llama.block_count": 4_000_000_000}, "block_count"),
    ({"llama.embedding_length": 255}, "token_embd.weight"),
    ({"llama.embedding_length": -4}, "embedding_length"),
    ({"llama.attention.head_count": 0}, "head_count"),
    ({"llama.attention.head_count": "four"}, "head_count"),
    ({"llama.attention.head_count_kv": 3}, "share"),
    ({"llama.attention.key_length": 63}, "63"),
    ({"llama.attention.layer_norm_rms_epsilon": None}, "epsilon"),
    ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "epsilon"),
    ({"llama.rope.freq_base": 0.0}, "freq_base"),
    ({"llama.rope.scaling.type": "yarn"}, "yarn"),
    ({"llama.expert_count": 8}, "experts"),
    ({"llama.vocab_size": 77}, "vocab_size"),
    ({"llama.feed_forward_length": 512}, "ffn_gate"),
    ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model"),
    ({"tokenizer.ggml.tokens": ["a", "b"]}, "token"),
    ({"tokenizer.ggml.merges": None}, "merges"),
])
def test_bad_metadata(capsys: pytest.CaptureFixture[str], tmp_path: Path, change: dict, words: str) -> None:
    path = random_file(tmp_path / "bad.gguf", ffn=256, heads=2, kv_heads=1, change=change)
    assert words in refused(capsys, "run", str(path), "x")


def test_too_little_memory(capsys: pytest.CaptureFixture[str], tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = Path(tiny).stat().st_size
    monkeypatch.setattr("nitinol.runtime.cpu.available_memory", lambda: weights + 500_000)
    text = refused(capsys, "run", tiny, "x")
    assert "available" in text and "MB" in text


@pytest.mark.parametrize("arguments, head", [('inspect "{model}" --tensors', "head -n 1"),
                                             ('run demo "def f" --max-tokens 200', "head -c 3")])
def test_broken_pipe_is_quiet(tiny: str, arguments: str, head: str) -> None:
    command = f"{sys.executable} -m nitinol {arguments.replace('{model}', tiny)} | {head}"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=60)
    assert done.stderr == "" and done.stdout


def test_a_chat_survives_a_message_that_is_too_long(chatty: str) -> None:
    """At a terminal: the sentence, then the next message; from a pipe it is an error."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "nitinol", "run", chatty, "--max-tokens", "2"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        for line in (b"hello " * 200 + b"\r", b"hello\r", b"\x04"):
            while not shown.endswith(b"> "):  # its prompt
                shown += os.read(ours, 1 << 16)
            shown = b""
            os.write(ours, line)
        while os.read(ours, 1 << 16):
            pass
    errors = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 0, errors
    assert errors.count("but the context has") == 1 and errors.count("tokens read") == 1
    done = subprocess.run(command, input=b"hello " * 200 + b"\nhello\n", capture_output=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("streams, words", [
    (">&-", "tokens read"), ("2>&-", ""), ("<&-", "tokens read"), (">&- 2>&- <&-", ""),
    (">/dev/full", "nitinol: cannot write: No space left on device\n")])
def test_closed_and_full_streams(tiny: str, streams: str, words: str) -> None:
    command = f"{sys.executable} -m nitinol run {tiny} hello --max-tokens 2 {streams}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == (2 if "full" in streams else 0)
    assert words in done.stderr and done.stderr.count("\n") == bool(words)


@pytest.mark.parametrize("prompt", [["def fibonacci(n):\n"], []])
def test_ctrl_c_ends_with_130(prompt: list[str]) -> None:
    """In the middle of an answer of up to 1,000 tokens (some seconds), and while waiting for a line of a chat."""
    process = subprocess.Popen([sys.executable, "-m", "nitinol", "run", "demo", *prompt, "--temperature", "0.5"],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    if prompt:
        process.stdout.read(len(prompt[0]) + 2)  # two characters of the answer are there
    else:
        time.sleep(1.5)  # it waits for a line by now, or is still starting: both must end well
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and b"Traceback" not in errors, errors


@pytest.mark.parametrize("when", [
    "sys.meta_path.insert(0, type('', (), {'find_spec': lambda *_: kill()}))",  # as nitinol.cli is imported
    "cli.main = kill",
    "cli.main = lambda: exec('kill()')",  # what makes Python end by the signal, if KeyboardInterrupt itself passes
    "cli.main = lambda: setattr(cli, 'x', type('', (), {'__del__': kill})()) or delattr(cli, 'x')",
    "atexit.register(kill); cli.main = lambda: 0",
])
def test_ctrl_c_at_any_moment(when: str) -> None:
    """Before there is anything to stop, where exceptions are lost, and after the end: exit code 130, no traceback."""
    before = "" if "meta_path" in when else "import nitinol.cli as cli"
    program = f"""
import atexit, os, signal, sys
import nitinol.__main__ as start
{before}
def kill(*_):
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(10000): pass  # Python delivers it at the next jump backwards
{when}
sys.exit(start.main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.strip()) == (130, "nitinol: stopped")

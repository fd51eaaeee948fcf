"""`nitinol compile`: texts for every target, types from the command line or the kernel, and errors for people."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nitinol.cli import main
from nitinol.commands.compile import load_kernel, pointers

SOURCE = '''
import nitinol
import nitinol.language as tl


@nitinol.jit
def softmax(x, y, columns, BLOCK: tl.constexpr, TYPE: tl.constexpr = tl.float32):
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    value = tl.load(x + row * columns + lane, mask=lane < columns, other=-float("inf")).to(TYPE)
    value = tl.exp(value.to(tl.float32) - tl.max(value, axis=0))
    tl.store(y + row * columns + lane, value / tl.sum(value, axis=0), mask=lane < columns)


@nitinol.jit
def wrong(x):
    tl.store(x + tl.arange(0, 48), 0.0)
'''


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "kernels.py"
    path.write_text(SOURCE)
    return str(path)


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code = main(["compile", *arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["compile", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("nitinol: ")
    assert "Traceback" not in captured.err and "internal error" not in captured.err
    return captured.err


@pytest.mark.parametrize(("options", "words"), [
    ([], ["[[kernel", "softmax(", "device float *x [[buffer(0)]]", "int columns;", "// line 10"]),
    (["--arg", "x=*fp16", "--set", "TYPE=tl.float16"], ["device half *x"]),
    (["--target", "cuda"], ["__global__", "softmax("]),
    (["--target", "cpu"], ["kernel:", "ret"]),
    (["--target", "cpu", "--show", "llvm"], ["define"]),
    (["--show", "ir", "--arg", "columns=int64:16"], ["%x: *fp32", "%columns: int64 /* multiple of 16 */"]),
    (["--show", "ir", "--arg", "columns=48", "--arg", "x=*float32:1"], ["%columns: int32 /* multiple of 16 */"]),
])  # fmt: skip
def test_texts(file: str, capsys: pytest.CaptureFixture[str], options: list[str], words: list[str]) -> None:
    text = output(capsys, f"{file}:softmax", "--set", "BLOCK=64", *options)
    for word in words:
        assert word in text


def test_warps_json_and_output(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = f"{file}:softmax"
    found = json.loads(output(capsys, place, "--set", "BLOCK=64", "--warps", "2", "--json"))
    assert found["parameters"] == {"x": "*fp32:16", "y": "*fp32:16", "columns": "int32:1", "BLOCK": "=64",
                                   "TYPE": found["parameters"]["TYPE"]}  # fmt: skip
    assert found["kernel"] == "softmax" and found["target"] == "metal" and "_threadgroup(64)" in found["text"]
    written = tmp_path / "softmax.metal"
    assert output(capsys, place, "--set", "BLOCK=64", "--warps", "2", "-o", str(written)) == ""
    assert written.read_text() == found["text"]
    assert output(capsys, "--help").count("Usage") == 1


@pytest.mark.parametrize(("options", "words"), [
    ([":softmax"], ["compiled for values of BLOCK", "x=*fp32:16, y=*fp32:16, columns=int32:1", "--set BLOCK=64"]),
    (["", "--set", "BLOCK=64"], ["not just one kernel", "softmax, wrong"]),
    ([":missing"], ["no kernel 'missing'", "softmax, wrong"]),
    ([":softmax", "--arg", "z=int32"], ["--arg z", "x, y, columns, BLOCK"]),
    ([":softmax", "--arg", "x=*fp31"], ["*fp31", "fp32"]),
    ([":softmax", "--arg", "x=*fp32:8"], ["*fp32:8", "divisible by 16"]),
    ([":softmax", "--arg", "BLOCK=64"], ["a tl.constexpr; use --set BLOCK="]),
    ([":softmax", "--set", "columns=64"], ["not a tl.constexpr; use --arg columns="]),
    ([":softmax", "--set", "BLOCK"], ["NAME=VALUE"]),
    ([":softmax", "--show", "llvm"], ["msl, ir"]),
    ([":softmax", "--target", "vulkan"], ["metal"]),
    ([":softmax", "--set", "BLOCK=64", "--arg", "y=*fp64"], ["kernels.py:", "no 64-bit floats"]),
    (["x:softmax"], ["no Python file"]),
])  # fmt: skip
def test_errors(file: str, capsys: pytest.CaptureFixture[str], options: list[str], words: list[str]) -> None:
    text = refused(capsys, file + options[0], *options[1:])
    for word in words:
        assert word in text


def test_an_error_in_the_kernel_has_its_line_and_a_caret(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, line, caret = refused(capsys, f"{file}:wrong").splitlines()
    assert "kernels.py:17: " in first and "power of two" in first
    assert line.strip() == "tl.store(x + tl.arange(0, 48), 0.0)"
    assert line[caret.index("^") : caret.rindex("^") + 1] == "tl.arange(0, 48)"


def test_a_file_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.py"
    for text, words in (("import nothing_like_it\n", "ModuleNotFoundError"), ("def f(:\n", "SyntaxError")):
        path.write_text(text)
        assert words in refused(capsys, f"{path}:f")


def test_pointers_of_the_library_are_recognised() -> None:
    folder = Path(__file__).parents[2] / "nitinol" / "ops"
    for place, others in (
        ("matmul_kernels.py:quantized_matmul_kernel", {"tokens", "rows", "columns", "row_bytes"}),
        ("attention.py:decode_attention_kernel", {"context", "scale"}),
        ("sampling.py:sample_kernel", {"vocabulary", "tokens", "context"}),
    ):
        kernel = load_kernel(str(folder / place))
        assert {p.name for p in kernel.parameters if not p.is_constexpr} - pointers(kernel) == others, place

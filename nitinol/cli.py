"""The command line: what there is to type, its help, and errors as one sentence. The work is in nitinol/commands/."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from nitinol.commands import STOPPED

Model = Annotated[str, typer.Argument(metavar="MODEL", show_default=False,
                                      help="Path of a GGUF file, or 'demo' for the small model that comes along.")]
Json = Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object instead of text for people.")]
Device = Annotated[str | None, typer.Option(
    metavar="metal|cuda|cpu", show_default="the first of these that is there",
    help="Where to compute; `nitinol devices` lists what there is.")]
Threads = Annotated[int | None, typer.Option(
    metavar="N", show_default="one per core", help="Processor threads that work.")]
Context = Annotated[int | None, typer.Option(
    metavar="TOKENS", show_default="the model's, at most 4096",
    help="Tokens of prompt and answer together that are provided for.")]

app = typer.Typer(name="nitinol", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  context_settings={"help_option_names": ["-h", "--help"]},
                  help="Run language models from GGUF files, with every kernel a Python function. "
                       "Start with: nitinol run demo 'def fibonacci(n):'")


def _show_version(wanted: bool) -> None:
    if wanted:
        import nitinol

        print(f"nitinol {nitinol.__version__}")
        raise typer.Exit


@app.callback()
def _nitinol(version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True,
                                                   help="Print the version and exit.")] = False) -> None:
    pass


@app.command()
def run(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(
        metavar="PROMPT", show_default=False,
        help="The text to continue or the question to answer; without it, a chat starts, one message a line, until "
             "the end of the input (Ctrl-D).")] = None,
    device: Device = None,
    threads: Threads = None,
    context: Context = None,
    cache: Annotated[str, typer.Option(metavar="fp16|fp32", help="Precision of the attention cache.")] = "fp16",
    max_tokens: Annotated[int | None, typer.Option(
        metavar="N", show_default="until the model ends or the context is full",
        help="At most so many new tokens.")] = None,
    temperature: Annotated[float, typer.Option(
        metavar="T",
        help="How freely to choose: 0 always takes the most likely token, 1 follows the model's probabilities.")] = 0.0,
    top_k: Annotated[int, typer.Option(metavar="K", help="Choose among the K most likely tokens; 0: among all.")] = 0,
    top_p: Annotated[float, typer.Option(metavar="P", help="Choose among the likeliest tokens that together have this "
                                                           "probability; 1: among all.")] = 1.0,
    min_p: Annotated[float, typer.Option(metavar="P", help="Leave out tokens less likely than this fraction of the "
                                                           "likeliest's probability; 0: none.")] = 0.0,
    repeat_penalty: Annotated[float, typer.Option(metavar="X", help="Above 1: make tokens that occurred already less "
                                                                    "likely; try 1.1 against loops.")] = 1.0,
    seed: Annotated[int | None, typer.Option(
        metavar="N", show_default="another every time", help="The same seed gives the same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(
        metavar="TEXT", show_default=False, help="A text at which to stop; may be given several times.")] = None,
    chat: Annotated[bool | None, typer.Option(
        "--chat/--raw", metavar="", show_default="chat, if the model has a template for it",
        help="Treat the prompt as a message to answer, or as plain text to continue.")] = None,
    system: Annotated[str | None, typer.Option(
        metavar="TEXT", show_default=False, help="Instructions to put before a chat.")] = None,
    json: Json = False,
) -> None:
    """Complete a prompt, or chat. Text streams to stdout, a line of figures goes to stderr."""
    from nitinol.commands.run import Settings, run_model
    from nitinol.generate.options import Options

    options = Options(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                      repeat_penalty=repeat_penalty, seed=seed, stop=stop or ())
    run_model(model, prompt, options, Settings(device, threads, context, cache), chat, system, json)


@app.command()
def inspect(
    model: Model,
    tensors: Annotated[bool, typer.Option("--tensors", metavar="", help="List every tensor: name, shape, format, "
                                                                           "bytes.")] = False,
    context: Annotated[int | None, typer.Option(
        metavar="TOKENS", show_default="a few", help="Say how much memory this many tokens need.")] = None,
    json: Json = False,
) -> None:
    """Say what is in a model file: family, sizes, quantisation, tokenizer, memory needed. Computes nothing."""
    from nitinol.commands.inspect import inspect_model

    inspect_model(model, tensors, context, json)


@app.command()
def trace(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", show_default=False,
                                          help="The text to run through the model.")],
    device: Device = None,
    threads: Threads = None,
    context: Context = None,
    chrome: Annotated[Path | None, typer.Option(
        metavar="FILE", show_default=False, help="Write a trace that ui.perfetto.dev opens.")] = None,
    svg: Annotated[Path | None, typer.Option(
        metavar="FILE", show_default=False, help="Write a picture of where a token's time goes.")] = None,
    json: Json = False,
) -> None:
    """Show the way from prompt to token: every kernel launch with its source line, bytes, time and rate."""
    from nitinol.commands.run import Settings
    from nitinol.commands.trace import trace_model

    trace_model(model, prompt, Settings(device, threads, context, "fp16"), chrome, svg, json)


@app.command()
def bench(
    model: Model,
    prompt: Annotated[int, typer.Option(metavar="TOKENS", help="Length of the prompt.")] = 128,
    gen: Annotated[int, typer.Option(metavar="TOKENS", help="Tokens to generate after it.")] = 32,
    reps: Annotated[int, typer.Option(metavar="N", help="Repetitions; the median counts.")] = 3,
    device: Device = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Measure prefill and decode, and decode against the machine's memory bandwidth."""
    from nitinol.commands.bench import bench_model

    bench_model(model, prompt, gen, reps, device, threads, json)


@app.command()
def tokenize(
    model: Model,
    text: Annotated[str, typer.Argument(metavar="TEXT", show_default=False, help="The text to cut into tokens.")],
    special: Annotated[bool, typer.Option("--special", metavar="", help="Read control tokens such as <|im_end|> as "
                                                                        "such, not as text.")] = False,
    json: Json = False,
) -> None:
    """Cut a text into the model's tokens and show their numbers."""
    from nitinol.commands.inspect import tokenize_text

    tokenize_text(model, text, special, json)


@app.command()
def compile(
    kernel: Annotated[str, typer.Argument(
        metavar="FILE.py:KERNEL", show_default=False,
        help="A Python file and the @nitinol.jit function in it. The file is executed, as `import` would.")],
    target: Annotated[str, typer.Option(metavar="metal|cuda|cpu", help="What to compile for.")] = "metal",
    show: Annotated[str | None, typer.Option(
        metavar="msl|cuda|llvm|asm|ir", show_default="msl, cuda or asm, by target",
        help="Which text: Metal or CUDA source, LLVM IR or assembly for this CPU, or the tile IR that all targets "
             "begin with.")] = None,
    arg: Annotated[list[str] | None, typer.Option(
        metavar="NAME=TYPE", show_default="*fp32 for pointers, int32 for the rest",
        help="A run-time parameter: *fp16 (a pointer), int32, int32:16 (divisible by 16), a number, or none. Once for "
             "each.")] = None,
    set: Annotated[list[str] | None, typer.Option(
        metavar="NAME=VALUE", show_default="the kernel's own defaults",
        help="A tl.constexpr parameter, for example BLOCK=1024. Once for each.")] = None,
    warps: Annotated[int, typer.Option(metavar="N", help="SIMD-groups (warps) that share a program on a GPU; 0: the "
                                                         "compiler chooses.")] = 0,
    output: Annotated[Path | None, typer.Option(
        "--output", "-o", metavar="FILE", show_default="standard output", help="Where to write the text.")] = None,
    json: Json = False,
) -> None:
    """Show what becomes of a kernel: Metal or CUDA source, machine code, or tile IR. Needs no GPU.

    For example: nitinol compile softmax.py:softmax --set BLOCK=1024 --arg 'x=*fp16'
    """
    from nitinol.commands.compile import compile_file

    compile_file(kernel, target, show, output, arg or (), set or (), warps, json)


@app.command()
def devices(json: Json = False) -> None:
    """List the devices that Nitinol can compute on, here and now."""
    from nitinol.commands.inspect import list_devices

    list_devices(json)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0; 2 after an error, in one sentence on stderr; 130 after Ctrl-C. Never a traceback.

    NITINOL_DEBUG=1 lets exceptions through.
    """
    warnings.showwarning = lambda message, *_, **__: print(f"nitinol: warning: {message}", file=sys.stderr)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the parent, as in `nitinol ... >&-`
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? instead of failing
    try:
        result = app(None if arguments is None else list(arguments), standalone_mode=False, prog_name="nitinol")
        if result == STOPPED:  # what newer versions of Typer make of Ctrl-C
            raise KeyboardInterrupt
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        print("\nnitinol: stopped", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("NITINOL_DEBUG"):
            raise
        sys.stdout.flush()
        if text := sentence(error):  # the help that a bare `nitinol` shows arrives as an error without a text
            print(f"nitinol: {text}", file=sys.stderr)
        if hasattr(error, "source_line"):  # a kernel's: the line and a caret, and the calls that led there
            print(*str(error).split("\n")[1:], sep="\n", file=sys.stderr)
        return 2


def sentence(error: Exception) -> str:
    """An exception as one line for a person."""
    usage: Any = getattr(error, "format_message", None)
    if usage is not None:  # of the command line itself
        text = usage() and f"{usage().rstrip('.')}; see `nitinol --help`"
    elif isinstance(error, OSError) and error.filename is not None:
        text = f"cannot use {str(error.filename)!r}: {error.strerror}"
    elif isinstance(error, OSError) and error.strerror is not None:  # of a standard stream, then
        text = f"cannot write: {error.strerror}"
    elif hasattr(error, "location") and hasattr(error, "message"):  # a kernel that does not compile
        text = f"{error.location}: {error.message}"
    elif isinstance(error, MemoryError) and not str(error):
        text = "out of memory; use a smaller model or context, or close other programs"
    elif type(error).__module__.startswith("nitinol") or isinstance(error, (ValueError, OSError, MemoryError)):
        text = str(error)
    else:
        text = (f"internal error, {type(error).__name__}: {error} (this is a fault of Nitinol's; NITINOL_DEBUG=1 shows "
                "where)")
    return " ".join(text.split())

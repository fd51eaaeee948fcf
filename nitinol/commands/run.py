"""`nitinol run`: a completion or a chat in the terminal, or one JSON object."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

from nitinol.commands.output import Progress, print_json
from nitinol.generate.generation import Generation
from nitinol.generate.model import Model, load
from nitinol.generate.options import Options


class Settings(NamedTuple):
    device: str | None
    threads: int | None
    context: int | None
    cache: str

    def load(self, path: str, quiet: bool) -> Model:
        with Progress("loading the model", quiet) as progress:
            return load(path, self.device, self.threads, self.context, self.cache, progress)


def run_model(path: str, prompt: str | None, options: Options, settings: Settings, chat: bool | None,
              system: str | None, as_json: bool) -> None:
    if prompt is not None and not prompt:
        raise ValueError("the prompt is empty; give a text to continue, or none at all for a chat")
    if prompt is None and as_json:
        raise ValueError("--json needs a PROMPT, because a chat has no single result")
    model = settings.load(path, as_json)
    if chat is None:
        chat = model.tokenizer.chat_template is not None
    if system is not None and not chat:
        raise ValueError("--system belongs to a chat, but this prompt is continued as plain text; leave it out or use "
                         "--chat")
    before = [{"role": "system", "content": system}] if system else []
    if prompt is None:
        converse(model, options, before, chat)
        return
    with Progress("reading the prompt", as_json) as progress:
        if chat:
            generation = model.chat([*before, {"role": "user", "content": prompt}], options, progress)
        else:
            generation = model.generate(prompt, options, progress)
        if as_json:
            text = "".join(generation)
        else:
            show(generation, progress, "" if chat else prompt)
    if as_json:
        print_json(figures(generation) | {"text": text})


def converse(model: Model, options: Options, messages: list[dict[str, str]], chat: bool) -> None:
    """One message a line until the input ends. Without a chat template every line is continued by itself."""
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  (editing and history for input())

        print(f"{model.config.name}: type a message, Ctrl-D to end" if chat else
              f"{model.config.name}: type a text to be continued, Ctrl-D to end", file=sys.stderr)
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # the tokenizer says what is wrong
    while True:
        try:
            line = input("> ") if interactive else input()
        except EOFError:
            break
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        try:
            with Progress("reading the prompt") as progress:
                generation = (model.chat(messages, options, progress) if chat else
                              model.generate(line, options, progress))
                answer = show(generation, progress, "")
        except ValueError as error:  # too long, or no text: a person can say something else
            if not interactive:
                raise
            messages.pop()
            print(f"nitinol: {error}", file=sys.stderr)
            continue
        messages.append({"role": "assistant", "content": answer})
    if interactive:
        print(file=sys.stderr)


def show(generation: Generation, progress: Progress, prompt: str) -> str:
    """Streams to stdout as it comes; then the figures. The prompt comes with the first piece: until then the line is
    the progress bar's, or a warning's."""
    text = ""
    for piece in generation:
        progress.__exit__()  # the answer begins
        sys.stdout.write(piece if text else prompt + piece)
        sys.stdout.flush()
        text += piece
    sys.stdout.write("\n" if text else prompt + "\n")
    sys.stdout.flush()
    f = figures(generation)
    print(f"{f['prompt_tokens']} tokens read at {f['prefill_tok_s']:.0f}/s, {f['tokens']} written at "
          f"{f['decode_tok_s']:.1f}/s, first after {f['ttft_s']:.2f} s; ended by {ENDS[f['stop_reason']]}; peak memory "
          f"{f['peak_rss_bytes'] / 1e6:.0f} MB; on {generation.model.device.description}", file=sys.stderr)
    return text


ENDS = {"length": "--max-tokens", "stop": "a stop text", "end_of_turn": "the model", "context": "a full context"}


def figures(generation: Generation) -> dict[str, Any]:
    """What `run --json` prints, less the text. Rates are tokens a second, 0 where nothing was measured."""
    return {
        "tokens": len(generation.tokens),
        "prompt_tokens": generation.prompt_tokens,
        "stop_reason": generation.stop_reason,
        "prefill_tok_s": _rate(generation.prefilled_tokens, generation.prefill_s),
        "decode_tok_s": _rate(len(generation.tokens) - 1, generation.decode_s),
        "ttft_s": generation.ttft_s,
        "peak_rss_bytes": peak_rss_bytes(),
        "device": generation.model.device.name,
        "seed": generation.options.seed,
    }


def _rate(count: int, seconds: float) -> float:
    return count / seconds if count > 0 and seconds > 0 else 0.0


def peak_rss_bytes() -> int:
    """The most memory that this process has had resident, mapped files included; 0 where the system does not say."""
    try:  # resource's figure would include what the parent process had before exec
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

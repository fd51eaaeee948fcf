"""Chat messages to prompt text, by the Jinja template that a model's file carries.

The environment is the one in which templates are written and tried, that of `transformers`
(utils/chat_template_utils.py): blocks trimmed, `raise_exception`, `strftime_now`, `tojson` that keeps
non-ASCII letters, `break` and `continue`, `{% generation %}`. Templates come with downloaded files, so they
run in Jinja's immutable sandbox and cannot reach Python's internals.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from nitinol.generate.bounds import bounded

# A prompt of the longest contexts in use (1 M tokens) has about 4 MB.
_MAX_CHARACTERS = 16 << 20


def render_chat(template: str | None, messages: Sequence[Mapping[str, Any]], *, bos_token: str | None,
                eos_token: str | None, add_generation_prompt: bool = True, tools: Sequence[Any] | None = None,
                **extra: Any) -> str:
    """The prompt for `messages` (mappings with `role` and `content`), to be encoded with
    `add_special=False, parse_special=True`, because templates write BOS themselves.

    `extra` are further variables for the template (`enable_thinking=False`, `documents=...`). Raises
    ValueError, in one sentence, where there is no template, where it is faulty or hostile, and where it
    refuses the messages.
    """
    if not template:
        raise ValueError("this model's file has no chat template, so it was probably not made for chats; "
                         "use --raw to let it continue plain text")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"a chat message must have a role and a content, but one is {message!r:.100}")
    import jinja2

    variables = {"messages": messages, "tools": tools, "documents": None, "bos_token": bos_token or "",
                 "eos_token": eos_token or "", "add_generation_prompt": add_generation_prompt, **extra}
    try:
        _environment()  # importing Jinja is not the template's doing
        pieces, length = [], 0
        with bounded():  # compiling too, for Jinja computes constants then
            for piece in _compile(template).generate(variables):
                pieces.append(piece)
                length += len(piece)
                if length > _MAX_CHARACTERS:
                    raise ValueError(f"it wrote more than {_MAX_CHARACTERS:,} characters")
        return "".join(pieces)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the model's chat template has a syntax error in line {error.lineno}: "
                         f"{_one_line(error.message)}; use --raw, or another file of the model") from None
    except _refusal() as error:
        raise ValueError(f"the model's chat template refuses these messages: {_one_line(error)}") from None
    except Exception as error:  # whatever a stranger's code may raise: type errors, recursion, memory
        raise ValueError(f"the model's chat template failed with {type(error).__name__}: {_one_line(error)}; "
                         "use --raw, or another file of the model") from None


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or "no message"


@lru_cache(maxsize=1)
def _refusal() -> type[Exception]:
    """What `raise_exception` raises. Made late, like the environment: importing Jinja takes 50 ms."""
    import jinja2

    return type("ChatRefusal", (jinja2.TemplateError,), {})


@lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    return _environment().from_string(template)


@lru_cache(maxsize=1)
def _environment() -> Any:
    from jinja2 import nodes, parser
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's text for training; here its content is just content."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: parser.Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Environment(ImmutableSandboxedEnvironment):
        # `"x" * 10**10` and `9 ** 9**9` would take all memory or all time in a single operation.
        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if isinstance(left, int) and isinstance(right, int):
                bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
                if bits > 4096:
                    raise SecurityError("arithmetic makes too large a number")
            for value, times in ((left, right), (right, left)) if operator == "*" else ():
                if isinstance(value, Sequence) and isinstance(times, int) and len(value) * times > _MAX_CHARACTERS:
                    raise SecurityError("repetition makes too long a text")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise _refusal()(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
               separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment

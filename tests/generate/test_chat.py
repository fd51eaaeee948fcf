"""Chat templates in the styles of the field, against `transformers`, and faulty and hostile ones."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import datetime

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from nitinol.generate.chat import render_chat

CHATML = """\
{%- if tools %}
    {{- '<|im_start|>tools\\n' + (tools | tojson) + '<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
    {% if loop.first and message.role != 'system' %}
{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- set ns = namespace(found=false) %}
{%- for m in messages %}
    {%- if m.role == 'system' %}{% set ns.found = true %}{% endif %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if not ns.found %}{{- '<!-- no system -->' }}{%- endif %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

MISTRAL = """\
{{ bos_token }}{% for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Roles must alternate user/assistant/user/assistant') }}
    {%- endif -%}
    {%- if message.content == 'stop here' %}{% break %}{% endif -%}
    {%- if message.role == 'user' -%}
        {{ '[INST] ' + message.content + ' [/INST]' }}
    {%- else -%}
        {% generation %}{{ message.content + eos_token }}{% endgeneration %}
    {%- endif -%}
{% endfor %}"""

TALK = [{"role": "user", "content": " Grüß dich <b> "}, {"role": "assistant", "content": "Hi, 你好"},
        {"role": "user", "content": "Bye"}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def test_chatml():
    assert render_chat(CHATML, TALK[2:], **TOKENS) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n")
    assert render_chat(CHATML, TALK[2:], **TOKENS, enable_thinking=False).endswith(
        "<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_llama3():
    assert render_chat(LLAMA3, [{"role": "system", "content": "Be brief. "}, TALK[2]], **TOKENS) == (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert render_chat(LLAMA3, [], bos_token=None, eos_token=None, add_generation_prompt=False) == "<!-- no system -->"


def test_mistral():
    assert render_chat(MISTRAL, TALK, **TOKENS) == "<s>[INST]  Grüß dich <b>  [/INST]Hi, 你好</s>[INST] Bye [/INST]"
    assert render_chat(MISTRAL, [*TALK[:2], {"role": "user", "content": "stop here"}, *TALK], **TOKENS).endswith("</s>")
    with pytest.raises(ValueError, match=r"refuses these messages: Roles must alternate user/assistant"):
        render_chat(MISTRAL, TALK[1:], **TOKENS)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL, "{{ messages | tojson(indent=2) }}", (
    "  {% if true %}\n  x {{ messages[0].content | upper }}\n  {% endif %}\n  {# note #}\n y\n")])
@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "größe", "arg": "<&>"}}]])
@pytest.mark.parametrize("prompt", [False, True])
def test_same_text_as_transformers(template, tools, prompt):
    rendered, _ = render_jinja_template([TALK], tools=tools, chat_template=template, add_generation_prompt=prompt,
                                        **TOKENS)
    assert render_chat(template, TALK, tools=tools, add_generation_prompt=prompt, **TOKENS) == rendered[0]


def test_tojson_and_date():
    assert json.loads(render_chat("{{ messages | tojson }}", TALK, **TOKENS)) == TALK
    assert "你好" in render_chat("{{ messages | tojson }}", TALK, **TOKENS)
    date = render_chat("{{ strftime_now('%d %b %Y') }}", TALK, **TOKENS)
    assert datetime.strptime(date, "%d %b %Y").year >= 2025


@pytest.mark.parametrize("template", [None, ""])
def test_no_template_suggests_raw(template):
    with pytest.raises(ValueError, match=r"no chat template.*--raw"):
        render_chat(template, TALK, **TOKENS)


@pytest.mark.parametrize("messages", [["hello"], [{"content": "no role"}], [{"role": 3, "content": ""}]])
def test_bad_messages(messages):
    with pytest.raises(ValueError, match="must have a role and a content"):
        render_chat(CHATML, messages, **TOKENS)


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not hold to a limit of memory")


@pytest.mark.parametrize("template, message", [
    ("{% for m in messages %}\n{{ m.role }}", "syntax error in line 2"),
    ("{{ 'a' ", "syntax error in line 1"),
    ("{% include 'x' %}", "failed with TypeError: no loader"),
    ("{{ messages[0].content.nothing.at_all }}", "UndefinedError"),
    ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ("{{ messages + 3 }}", "TypeError"),
    ("{{ raise_exception() }}", "TypeError"),
    # Out of the sandbox
    ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__'"),
    ("{{ messages.__class__.__base__.__subclasses__() }}", "SecurityError"),
    ("{{ raise_exception.__globals__['json'] }}", "SecurityError"),
    ("{{ strftime_now.__code__.co_consts }}", "SecurityError"),
    ("{{ '{0.__class__.__name__}'.format(messages) }}", "SecurityError"),
    ("{{ (messages | map(attribute='__class__') | list)[0].mro() }}", "SecurityError|UndefinedError"),
    ("{{ messages.append(1) }}", "SecurityError"),
    ("{{ messages[0].update({'role': 'x'}) }}", "SecurityError"),
    # Out of memory or time
    ("{% for i in range(1000000000) %}{% endfor %}", "OverflowError"),
    ("{{ 'x' * 10000000000 }}", "SecurityError: repetition"),
    ("{{ 10000000000 * [1] }}", "SecurityError: repetition"),
    ("{{ 9 ** (9 ** 9) }}", "SecurityError: arithmetic"),
    ("{{ 9 ** 64 ** 64 ** 64 }}", "SecurityError: arithmetic"),
    ("{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
     "SecurityError: arithmetic"),
    ("{{ 9.0 ** 9999 }}", "OverflowError"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' * 999 }}{% endfor %}{% endfor %}",
     "more than 16,777,216 characters"),
    pytest.param("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
                 "TimeoutError: it runs for longer", marks=pytest.mark.slow),
    pytest.param("{% set ns = namespace(s='x' * 1000) %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}"
                 "{% endfor %}", "MemoryError", marks=LINUX),
    pytest.param("{{ ('\t' * 60000).expandtabs(60000) }}", "MemoryError", marks=LINUX),
    pytest.param("{{ ('%' ~ '99999999999d') % 3 }}", "failed with|characters", marks=LINUX),
    ("{{ " + "(" * 100_000, "RecursionError|syntax error"),
    ("{% if 1 %}" * 5000 + "{% endif %}" * 5000, "failed with|syntax error"),
    ("{% for i in [1] %}" * 50 + "{% endfor %}" * 50, "failed with SyntaxError"),
])
def test_faulty_and_hostile_templates(template, message, monkeypatch):
    monkeypatch.setattr("nitinol.generate.bounds.SECONDS", 2.0)
    monkeypatch.setattr("nitinol.generate.bounds.MEMORY_BYTES", 1 << 28)
    with pytest.raises(ValueError, match=message) as caught:
        render_chat(template, TALK, **TOKENS)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500 and not re.search(r"\.\s*;", text)


@LINUX
def test_bounds_are_taken_back():
    import resource

    before = sys.gettrace(), resource.getrlimit(resource.RLIMIT_AS)
    render_chat(CHATML, TALK, **TOKENS)
    with pytest.raises(ValueError):
        render_chat("{{ 1 / 0 }}", TALK, **TOKENS)
    assert (sys.gettrace(), resource.getrlimit(resource.RLIMIT_AS)) == before


def test_internals_read_as_nothing():
    for template in ("{{ messages.__class__ }}", "{{ raise_exception.__globals__ }}", "{{ strftime_now.__code__ }}"):
        assert render_chat(template, TALK, **TOKENS) == ""


def test_arithmetic_still_works():
    template = "{{ 6 * 7 }} {{ 2 ** 10 }} {{ 2 ** -1 }} {{ '-' * 3 }} {{ 0.5 * 3 }}"
    assert render_chat(template, TALK, **TOKENS) == "42 1024 0.5 --- 1.5"


def test_jinja_is_imported_late():
    code = "import sys, nitinol.generate.chat; print('jinja2' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"

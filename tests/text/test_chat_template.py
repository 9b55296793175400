"""Conversations against transformers, and templates that loop, grow or fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import jinja2
import pytest
from jinja2.exceptions import SecurityError

from gllm_engine.os_process import wait_end
from gllm_engine.sampling import InvalidField
from gllm_engine.text import chat_template, deepseek_template
from gllm_engine.text.chat_template import ChatTemplate
from gllm_engine.text.template_renderer import Renderer, Unusable
from gllm_engine.text.template_source import Template
from gllm_engine.text.tokenizer import TextError, Tokenizer

USER = {"role": "user", "content": "hé 🙂"}
PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
# In the manner of Qwen's: tools, calls and their results, what was thought, a switch.
TEMPLATE = """\
{%- if tools %}{{ '<tools>' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{{ '<user>' + message.content }}
    {%- elif message.role == 'tool' %}{{ '<result>' + message.content }}
    {%- else %}
        {%- generation %}{{ '<assistant>' }}
        {%- if message.reasoning_content and enable_thinking is not false %}
            {{- '<think>' + message.reasoning_content + '</think>' }}
        {%- endif %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {%- for name, value in call.function.arguments.items() %}
                {{- '<' ~ name ~ '=' ~ value ~ '>' }}
            {%- endfor %}
        {%- endfor %}
        {{- eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""


def render(source: str, messages, tools=None, special=(), **kwargs) -> str:
    """By the renderer's code in this process."""
    checked = chat_template.check_messages(messages)
    renderer = Renderer({"default": source}, dict(special), 1 << 30)
    return renderer.render(checked, tools, kwargs)


# ---------------------------------------------------------------- what a template is given


def test_chat_equals_transformers(tokenizer, reference):
    assert tokenizer.chat_template.render([USER]).startswith("<s><|im_start|>user\n")
    messages = [{"role": "system", "content": "Be brief."}, USER]
    expected = reference.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert tokenizer.chat(messages) == expected
    parts = [{"type": "text", "text": "hé 🙂"}]
    assert tokenizer.chat([messages[0], {"role": "user", "content": parts}]) == expected
    without = tokenizer.chat(messages, chat_template_kwargs={"add_generation_prompt": False})
    assert expected[: len(without)] == without != expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tools": [WEATHER]},
        {"enable_thinking": False},
        {"add_generation_prompt": False},
        {"continue_final_message": True},
    ],
    ids=str,
)
def test_a_whole_conversation_equals_transformers(reference, options):
    call = {"type": "function", "id": "1", "function": {"name": "weather"}}
    arguments = {"place": "Köln", "days": 2}
    messages = [
        USER,
        {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "name": None},
        {"role": "assistant", "content": "It is sunny "},
    ]
    call["function"]["arguments"] = arguments
    options = {"add_generation_prompt": "continue_final_message" not in options} | options
    expected = reference.apply_chat_template(
        messages, chat_template=TEMPLATE, tokenize=False, **options
    )
    call["function"]["arguments"] = json.dumps(arguments)
    assert render(TEMPLATE, messages, special=reference.special_tokens_map, **options) == expected
    assert "<place=Köln><days=2>" in expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ strftime_now('%Y') }}",
        "{{ dict(a=1, b='<é&') | tojson(indent=2) }}{{ messages | tojson(sort_keys=true) }}",
        "  {% if true %}\n  a{% endif %}\nb  {# c #}\n",
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
        "{{ missing }}|{{ messages[0].missing }}|{{ messages[0].content is string }}",
        "{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}{{ tools is none }}",
    ],
)
def test_the_environment_is_transformers(reference, source):
    messages = [USER, USER]
    expected = reference.apply_chat_template(messages, chat_template=source, tokenize=False)
    assert render(source, messages) == expected


@pytest.mark.parametrize("source", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"])
def test_the_environment_is_a_sandbox(source):
    with pytest.raises(SecurityError):
        render(source + "{{ 1 }}", [USER])


@pytest.mark.parametrize("arguments", [None, "", "{}", {}])
def test_a_call_without_arguments_has_an_empty_object(arguments):
    calls = [{"function": {"name": "now", "arguments": arguments}}]
    messages = [{"role": "assistant", "content": None, "tool_calls": calls}]
    assert render("{{ messages[0].tool_calls[0].function.arguments | tojson }}", messages) == "{}"


LOOPS = [
    "{% for m in messages %}{% for c in m.content %}{{ c }}{% endfor %}{% endfor %}",
    "{% for m in messages[1:] %}{% for c in m['content'] %}{{ c }}{% endfor %}{% endfor %}",
    "{% set rest = messages %}{% for m in rest | list %}{% set content = m.content or [] %}"
    "{% for c in content | selectattr('type', 'equalto', 'text') %}{{ c }}{% endfor %}{% endfor %}",
    "{% macro show(parts) %}{% for p in parts %}{{ p.text }}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ show(m.content) }}{% endfor %}",
    "{% set first = messages[0] %}{% for c in first.content %}{{ c.text }}{% endfor %}",
    "{% set m = messages[loop.index0] %}{% for c in m.content %}{{ c.text }}{% endfor %}",
]
NO_LOOPS = [
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{% for c in m.tool_calls %}{{ c }}{% endfor %}{% endfor %}",
    "{% for m in messages %}{% for c in m.content.split('x') %}{{ c }}{% endfor %}{% endfor %}",
    "{% macro show(parts) %}{% for p in parts %}{{ p }}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ show(m.tool_calls) }}{{ m.content }}{% endfor %}",
    "{% for tool in tools %}{% for c in tool.content %}{{ c }}{% endfor %}{% endfor %}",
]


@pytest.mark.parametrize("source", LOOPS)
def test_templates_that_iterate_content(source):
    assert Template(source).takes_parts


@pytest.mark.parametrize("source", NO_LOOPS)
def test_templates_that_want_strings(source):
    assert not Template(source).takes_parts
    message = {"role": "user", "content": PARTS}
    assert render("{% for m in messages %}{{ m.content }}{% endfor %}", [message]) == "one\ntwo"


def test_templates_that_iterate_get_parts():
    source = "{% for m in messages %}{% for c in m.content %}[{{ c.text }}]{% endfor %}{% endfor %}"
    messages = [{"role": "user", "content": PARTS}, USER]
    assert render(source, messages) == "[one][two][hé 🙂]"
    # One that tells strings from parts gets what came.
    tells = (
        "{% for m in messages %}{% if m.content is string %}={{ m.content }}"
        "{% else %}{% for c in m.content %}[{{ c.text }}]{% endfor %}{% endif %}{% endfor %}"
    )
    assert render(tells, messages) == "[one][two]=hé 🙂"


def test_a_template_of_its_own_for_tools():
    templates = {"default": "plain", "tool_use": "{{ tools | length }} tools"}
    renderer = Renderer(templates, {}, 1 << 30)
    assert renderer.render([USER], None, {}) == "plain"
    assert renderer.render([USER], [WEATHER], {}) == "1 tools"
    with pytest.raises(Unusable, match="no default chat template, only rag"):
        Renderer({"rag": "x"}, {}, 1 << 30).render([USER], None, {})


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "messages: expected a non-empty list of {role, content} objects"),
        ("hello", "messages: expected a non-empty list of {role, content} objects"),
        (["hello"], "messages: message 0 is not an object with role and content"),
        ([{"content": "x"}], "messages: message 0 has no role (a string such as 'user')"),
        ([{"role": "user"}], "messages: message 0 has no content (a string)"),
        (
            [{"role": "user", "content": "x"}, {"role": "user", "content": [{"type": "image"}]}],
            "messages: message 1 has a content part that is not text",
        ),
        (
            [{"role": "wizard", "content": "x"}],
            "messages: the chat template refused them (unknown role wizard)",
        ),
        (
            [USER | {"tool_calls": {"a": 1}}],
            "messages: message 0: tool_calls is not a list of objects",
        ),
        (
            [USER | {"tool_calls": [{"function": {"arguments": "{"}}]}],
            "messages: message 0: tool_calls[0]: function.arguments is not JSON",
        ),
        (
            [USER | {"tool_calls": [{"function": {"arguments": "[" * 100_000}}]}],
            "messages: message 0: tool_calls[0]: function.arguments is not JSON",
        ),
        (
            [USER | {"tool_calls": [{"function": {"arguments": "[1]"}}]}],
            "messages: message 0: tool_calls[0]: function.arguments is not an object",
        ),
        (
            [USER | {"x": {1, 2}}],
            "messages: not expressible as JSON (Object of type set is not JSON serializable)",
        ),
    ],
)
def test_bad_messages_get_a_sentence(tokenizer, messages, sentence):
    with pytest.raises(InvalidField) as caught:
        tokenizer.chat(messages)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tools": {"a": 1}}, "tools: expected a list of {type, function} objects"),
        ({"tools": [WEATHER]}, "tools: this model's chat template takes no tools"),
        ({"chat_template_kwargs": ["a"]}, "chat_template_kwargs: expected an object"),
        (
            {"chat_template_kwargs": {"enable_thinkin": True}},
            "chat_template_kwargs: 'enable_thinkin' means nothing to this model's chat template; "
            "it knows add_generation_prompt, continue_final_message",
        ),
        (
            {"chat_template_kwargs": {"messages": []}},
            "chat_template_kwargs: messages cannot be given here",
        ),
        (
            {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
            "chat_template_kwargs: 'chat_template' means nothing to this model's chat template; "
            "it knows add_generation_prompt, continue_final_message",
        ),
        (
            {"chat_template_kwargs": {"add_generation_prompt": "no"}},
            "chat_template_kwargs: add_generation_prompt is 'no', but true or false is expected",
        ),
        (
            {"chat_template_kwargs": dict.fromkeys(
                ("add_generation_prompt", "continue_final_message"), True
            )},
            "chat_template_kwargs: continue_final_message and add_generation_prompt exclude each "
            "other",
        ),
    ],
)  # fmt: skip
def test_bad_options_get_a_sentence(tokenizer, options, sentence):
    with pytest.raises(InvalidField) as caught:
        tokenizer.chat([USER], **options)
    assert str(caught.value) == sentence
    assert tokenizer.chat([USER], tools=[], chat_template_kwargs={}) == tokenizer.chat([USER])


def test_a_model_without_template_says_so(tokenizer_dir, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tokenizer_dir / name).read_bytes())
    with pytest.raises(InvalidField, match="no chat template"):
        Tokenizer(tmp_path).chat([USER])
    # Processors keep theirs in a file of their own.
    (tmp_path / "chat_template.json").write_text('{"chat_template": "{{ messages[0].content }}"}')
    loaded = Tokenizer(tmp_path)
    assert loaded.chat([USER]) == loaded.encode(USER["content"], add_special_tokens=False)
    for odd, words in (
        (5, "neither text nor texts"),
        ("x" * (2**20 + 1), "more than 1048576 char"),
    ):
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": odd}))
        with pytest.raises(TextError, match=words):
            Tokenizer(tmp_path)


# ---------------------------------------------------------------- limits

HOSTILE = """\
{%- macro again() %}{{ again() }}{% endmacro %}
{%- set what, n = messages[0].content, messages[0].n %}
{%- if what == 'loop' %}{% for a in range(n) %}{% for b in range(n) %}{% endfor %}{% endfor %}
{%- elif what == 'range' %}{% for i in range(n ** 2) %}{% endfor %}
{%- elif what == 'power' %}{{ n ** (n ** 3) }}
{%- elif what == 'multiply' %}{{ 'x' * n ** 3 }}
{%- elif what == 'center' %}{{ 'x'.center(n ** 3) }}
{%- elif what == 'filter' %}{{ 'x' | center(n ** 3) }}
{%- elif what == 'tojson' %}{{ ([messages] * n ** 2) | tojson }}
{%- elif what == 'indent' %}{{ messages | tojson(indent=n ** 3) }}
{%- elif what == 'double' %}
    {%- set all = namespace(text='x') %}
    {%- for i in range(60) %}{% set all.text = all.text ~ all.text %}{% endfor %}
{%- elif what == 'macro' %}{{ again() }}
{%- elif what == 'complain' %}{{ raise_exception('x' * n ** 2) }}
{%- elif what == 'long' %}{{ 'x' * n }}
{%- else %}{{ what }}{% endif %}"""


def say(template: ChatTemplate, what: str) -> str:
    return template.render([{"role": "user", "content": what, "n": 9999}], max_chars=1000)


@pytest.fixture(scope="module")
def hostile():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template, "CPU_LIMIT_S", 0.5)
        yield ChatTemplate({"default": HOSTILE}, {})


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("loop", "messages: the chat template takes more than 0.5 s of processor time for them"),
        ("power", "messages: the chat template takes more than 0.5 s of processor time for them"),
        ("range", "messages: the chat template refused them \\(Range too big"),
        ("multiply", "messages: the chat template takes more than 1024 MiB of memory for them"),
        ("center", "messages: the chat template takes more than 1024 MiB of memory for them"),
        ("filter", "messages: the chat template takes more than 1024 MiB of memory for them"),
        ("tojson", "messages: the chat template takes more than "),
        ("indent", "messages: the chat template takes more than "),
        ("double", "messages: the chat template takes more than "),
        ("macro", "messages: the chat template refused them \\(maximum recursion depth"),
        ("complain", "messages: the chat template refused them \\(x{300}\\)$"),
        ("long", "prompt: its 9999 characters are more than 1000, the most that this model can"),
    ],
)
def test_a_template_without_bound_costs_its_own_request_only(hostile, what, sentence):
    with pytest.raises(InvalidField, match=sentence):
        say(hostile, what)
    assert say(hostile, "fine") == "fine"


def test_conversations_of_others_go_on(hostile):
    answers, started = {}, threading.Barrier(3)

    def ask(what):
        started.wait()
        try:
            answers[what] = say(hostile, what)
        except InvalidField as error:
            answers[what] = str(error)

    threads = [threading.Thread(target=ask, args=(what,)) for what in ("loop", "one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers.pop("loop").endswith("processor time for them")
    assert answers == {"one": "one", "two": "two"}


@pytest.mark.parametrize("source", ["{% if %}", "{{ " + "(" * 100_000, "{% include 'x' %}"])
def test_a_template_that_is_none(source):
    request = {"messages": [USER], "tools": None, "chat_template_kwargs": {}, "max_chars": 9}
    reply = Renderer({"default": source}, {}, 1 << 30).answer(json.dumps(request).encode())
    assert reply["field"] == "messages"
    assert reply["problem"].startswith("the chat template refused them (")


def worker_of(template: ChatTemplate) -> int:
    pid = template._renderer._process.pid
    (worker,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(worker)


def test_a_renderer_that_ends_is_replaced(hostile):
    assert say(hostile, "before") == "before"
    process = hostile._renderer._process
    os.kill(worker_of(hostile), signal.SIGINT)  # Ctrl-C at a terminal reaches it too
    assert say(hostile, "between") == "between"
    assert hostile._renderer._process is process
    process.kill()
    process.wait()
    assert say(hostile, "after") == "after"
    worker = worker_of(hostile)
    os.kill(worker, signal.SIGSTOP)
    threading.Timer(0.2, os.kill, (worker, signal.SIGKILL)).start()
    with pytest.raises(InvalidField, match="messages: the process that renders .* ended"):
        say(hostile, "killed")
    assert say(hostile, "after") == "after"


def test_the_renderer_ends_with_its_template(hostile):
    template = ChatTemplate({"default": "{{ messages[0].content }}"}, {})
    assert say(template, "x") == "x"
    process, pidfd = template._renderer._process, os.pidfd_open(worker_of(template))
    del template
    assert process.returncode is not None
    assert wait_end(pidfd, 60)
    os.close(pidfd)


def test_the_renderer_ends_with_its_process():
    """It and its fork, though they are stopped."""
    code = (
        "import os, signal; from gllm_engine.text.chat_template import ChatTemplate;"
        "t = ChatTemplate({'default': 'x'}, {}); t.render([dict(role='user', content='x')]);"
        "print(t._renderer._process.pid, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        pid = int(parent.stdout.readline())
        (fork,) = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        pidfds = [os.pidfd_open(pid), os.pidfd_open(fork)]
        for each in (pid, fork):
            os.kill(each, signal.SIGSTOP)
        parent.kill()
    try:
        assert all(wait_end(pidfd, 60) for pidfd in pidfds)
    finally:
        for pidfd in pidfds:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)


def test_no_renderer_starts_before_it_is_needed(tokenizer_dir):
    assert Tokenizer(tokenizer_dir).chat_template._renderer is None


# ---------------------------------------------------------------- DeepSeek V3.2


def deepseek(messages, tools=None, **kwargs) -> str:
    special = {"bos_token": "<bos>", "eos_token": "<eos>"}
    return render(deepseek_template.TEMPLATE, messages, tools, special, **kwargs)


def called(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather?"}]
CALLS = [called("weather", place="Köln", days=2, hours=["é", 3]), called("time")]
ASKED = [
    *QUESTION,
    {"role": "assistant", "content": None, "reasoning": "Two calls.", "tool_calls": CALLS},
    {"role": "tool", "content": "sunny"},
    {"role": "tool", "content": "noon"},
]
TOLD = [*ASKED, {"role": "assistant", "content": "Sun.", "reasoning_content": "Told."}]
# As DeepSeek's own encoder writes them.
BEGIN = "<bos>Be brief.<｜User｜>Weather?<｜Assistant｜>"
CALLED = (
    "\n\n<｜DSML｜function_calls>\n"
    '<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="place" string="true">Köln</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="hours" string="false">["é", 3]</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n"
    '<｜DSML｜invoke name="time">\n\n</｜DSML｜invoke>\n'
    "</｜DSML｜function_calls><eos>"
)
RESULTS = (
    "\n\n<function_results>\n<result>sunny</result>\n<result>noon</result>\n</function_results>\n\n"
)


def test_deepseek_answers_with_or_without_thinking():
    assert deepseek(QUESTION) == f"{BEGIN}</think>"
    assert deepseek(QUESTION, thinking=True) == f"{BEGIN}<think>"
    assert deepseek(QUESTION, add_generation_prompt=False) == BEGIN.removesuffix("<｜Assistant｜>")


def test_deepseek_calls_tools():
    assert deepseek(ASKED) == f"{BEGIN}</think>{CALLED}{RESULTS}</think>"
    thought = f"{BEGIN}<think>Two calls.</think>{CALLED}{RESULTS}<think>"
    assert deepseek(ASKED, thinking=True) == thought
    assert deepseek(TOLD, thinking=True) == f"{thought}Told.</think>Sun.<eos>"
    assert deepseek(TOLD) == f"{BEGIN}</think>{CALLED}{RESULTS}</think>Sun.<eos>"
    without = deepseek(ASKED, add_generation_prompt=False)
    assert without == f"{BEGIN}</think>{CALLED}{RESULTS}".rstrip("\n")


def test_deepseek_forgets_what_it_thought_before_the_last_question():
    again = [*TOLD, {"role": "user", "content": "Sure?"}]
    told = f"{BEGIN}</think>{CALLED}{RESULTS}</think>Sun.<eos><｜User｜>Sure?<｜Assistant｜>"
    assert deepseek(again, thinking=True) == f"{told}<think>"
    assert deepseek(again) == f"{told}</think>"


def test_deepseek_reads_descriptions_of_tools():
    """After the system message, which is empty if there is none."""
    text = deepseek(QUESTION, [WEATHER, WEATHER])
    start, end = "<bos>Be brief.\n\n## Tools\n\nYou have access to", "<｜User｜>Weather?"
    schema = '{"name": "weather", "parameters": {"type": "object"}}\n'
    assert text.startswith(start)
    assert f"<functions>\n{schema}{schema}</functions>\n{end}" in text
    assert '"<｜DSML｜function_calls>" block' in text
    alone = deepseek(QUESTION[1:], [WEATHER])
    assert alone == text.replace("Be brief.", "", 1).replace(schema, "", 1)


def test_deepseek_continues_an_answer():
    messages = [*QUESTION, {"role": "assistant", "content": "It is "}]
    assert deepseek(messages, continue_final_message=True) == f"{BEGIN}</think>It is "


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([*QUESTION, {"role": "tool", "content": "x"}], "a result of a tool without a call of it"),
        ([{"role": "tool", "content": "x"}], "a result of a tool without a call of it"),
        ([{"role": "critic", "content": "x"}], "the role critic is unknown"),
    ],
)
def test_deepseek_refuses(messages, problem):
    with pytest.raises(jinja2.TemplateError, match=problem):
        deepseek(messages)


def test_deepseek_v32_has_its_template_though_its_checkpoint_has_none(tokenizer_dir, tmp_path):
    for file in tokenizer_dir.glob("tokenizer*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for architecture, has in (("DeepseekV32ForCausalLM", True), ("DeepseekV3ForCausalLM", False)):
        config = {"architectures": [architecture]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        template = Tokenizer(tmp_path).chat_template
        assert (template is not None) == has
        if template is not None:
            assert template.render(QUESTION).endswith("Weather?<｜Assistant｜></think>")

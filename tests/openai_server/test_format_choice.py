"""The format of a model: by name, by the marks in its chat template, by its architecture."""

from __future__ import annotations

from pathlib import Path

import pytest

from gllm_client.openai_server.formats.choice import choose
from gllm_client.openai_server.formats.table import THOUGHTS, TOOLS
from gllm_engine.text.deepseek_template import TEMPLATE as DEEPSEEK_V32

# What tells each family's chat template from the others.
TEMPLATES = {
    ("hermes", "think"): "{{ '<tool_call>\\n{\"name\": \"' }} {{ '<think>\\n' }} {{ '</think>' }}",
    ("hermes", "none"): "within <tool_call></tool_call> XML tags",
    ("qwen3_coder", "think"): "<tool_call>\n<function=example_function_name>\n"
    "<parameter=example_parameter_1>\nvalue_1\n</parameter> {{ '<think>\\n\\n</think>' }}",
    ("glm45", "think"): "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n"
    "<arg_value>{arg-value-1}</arg_value> {{ '<think></think>' }}",
    ("glm47", "think"): "<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key><arg_value>"
    "{arg-value-1}</arg_value> </think>",
    ("minimax_m2", "think"): "{%- set begin = '<minimax:tool_call>' -%} '<think>' '</think>'",
    ("deepseek_v3", "think"): "'<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + '\\n' + "
    "'```json' {{ '</think>' }}",
    ("deepseek_v31", "think"): "tool['function']['name'] + '<｜tool▁sep｜>' {{ '</think>' }}",
    ("deepseek_v32", "think"): DEEPSEEK_V32,
    ("kimi_k2", "none"): "<|tool_call_begin|>{{ id }}<|tool_call_argument_begin|>",
    ("mistral", "mistral"): "'[TOOL_CALLS]' + name + '[ARGS]' '[THINK]' '[/THINK]'",
    ("mistral_list", "none"): "{{- '[TOOL_CALLS] [' }}",
    ("granite", "granite"): "<|tool_call|> Here is my thought process: Here is my response:",
    ("gpt_oss", "gpt_oss"): "'<|start|>assistant<|channel|>analysis<|message|>'",
    ("llama3_json", "none"): '\'Respond in the format {"name": function name, "parameters": '
    "dictionary of argument name and its value}.' <|python_tag|>",
    ("llama4_pythonic", "none"): "<|python_start|> [func_name1(params_name1=params_value1...)]",
    ("pythonic", "none"): "put it in the format of [func_name1(params_name1=params_value1...)]",
    ("none", "none"): "{{ message['content'] }}",
}


@pytest.mark.parametrize("names", TEMPLATES)
def test_templates_tell_their_format(names):
    chosen = choose({"chat_template": TEMPLATES[names]}, None, None)
    assert (chosen.tool_format, chosen.reasoning_format) == names


def test_every_format_is_told_by_a_template():
    assert {names[0] for names in TEMPLATES} == {*TOOLS, "none"}


def test_names_come_first_and_architectures_last():
    describe = {
        "chat_template": TEMPLATES["hermes", "think"],
        "architectures": ["LlamaForCausalLM"],
    }
    chosen = choose(describe, "kimi_k2", "mistral")
    assert (chosen.tool_format, chosen.reasoning_format) == ("kimi_k2", "mistral")
    assert choose(describe, "none", "none").spelling is None
    assert choose(describe, "none", "none").thoughts is None
    assert choose(describe, None, None).tool_format == "hermes"
    assert choose(describe | {"chat_template": None}, None, None).tool_format == "llama3_json"
    assert (
        choose({"architectures": ["GptOssForCausalLM"]}, None, None).reasoning_format == "gpt_oss"
    )


def test_an_architecture_stands_for_one_format():
    named = [name for spelling in TOOLS.values() for name in spelling.architectures]
    assert len(named) == len(set(named))


def test_unknown_names_are_refused():
    known = ", ".join([*TOOLS, "none"])
    with pytest.raises(ValueError, match=f"the tool format 'xml' is unknown; known are {known}"):
        choose({}, "xml", None)
    with pytest.raises(ValueError, match=f"known are {', '.join([*THOUGHTS, 'none'])}"):
        choose({}, None, "r1")
    with pytest.raises(ValueError, match="gpt_oss is a format of tools and of reasoning"):
        choose({}, "gpt_oss", "think")


def test_special_tokens_are_needed_if_a_mark_is_one():
    assert not choose({"special_tokens": {"<|im_end|>": 0}}, "hermes", "think").needs_special_tokens
    assert choose({"special_tokens": {"</think>": 7}}, "hermes", "think").needs_special_tokens
    assert choose({"special_tokens": {"<|call|>": 0}}, "gpt_oss", None).needs_special_tokens
    assert choose({"special_tokens": {"｜DSML｜": 0}}, "deepseek_v32", None).needs_special_tokens
    assert not choose({"special_tokens": {"</s>": 0}}, "none", "none").needs_special_tokens


def test_a_prompt_ends_inside_thoughts():
    qwen = choose({"special_tokens": {"<|im_start|>": 0, "<|im_end|>": 1}}, "hermes", "think")
    end = "<|im_end|>\n<|im_start|>assistant\n"
    assert qwen.in_thoughts(f"<|im_start|>user\nhi{end}<think>\n")
    assert qwen.in_thoughts(f"<|im_start|>user\nhi{end}<think>\nI was thinking")
    assert not qwen.in_thoughts(f"<|im_start|>user\nhi{end}")
    assert not qwen.in_thoughts(f"<|im_start|>user\nhi{end}<think>\n\n</think>\n\n")
    assert not qwen.in_thoughts(f"<|im_start|>user\nwhat is <think>?{end}")
    oss = choose({"special_tokens": {"<|end|>": 0, "<|start|>": 1}}, "gpt_oss", None)
    assert oss.in_thoughts("<|start|>assistant<|channel|>analysis<|message|>So")
    assert not oss.in_thoughts("<|channel|>analysis<|message|>So<|end|><|start|>assistant")


def test_the_documentation_names_every_format():
    page = (Path(__file__).parents[2] / "docs/openai.md").read_text()
    for row, table in (("tools", TOOLS), ("thoughts", THOUGHTS)):
        names = ", ".join(f"`{name}`" for name in (*table, "none"))
        assert f"| {row} | {names} |" in page

"""Random turns of a model, and writers that spell them as each format's chat template does."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from hypothesis import strategies as st

from gllm_client.openai_server.conversation import Tool
from gllm_client.openai_server.events import CallArguments, CallBegin, Reasoning, Text
from gllm_client.openai_server.formats.choice import Format, choose

PROPERTIES = {
    "text": {"type": "string"},
    "unit": {"enum": ["celsius", "kelvin"]},
    "count": {"type": "integer"},
    "ratio": {"type": "number"},
    "flag": {"type": "boolean"},
    "items": {"type": "array"},
    "place": {"$ref": "#/$defs/Place"},
    "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
}
SCHEMA = {
    "type": "object",
    "properties": PROPERTIES,
    "required": ["text", "count"],
    "additionalProperties": False,
    "$defs": {"Place": {"type": "object"}},
}
OPEN = {"type": "object"}
TOOLS = (Tool("get_weather", parameters=SCHEMA), Tool("search.web-2", parameters=SCHEMA))

# Special tokens of each format's models, as far as they matter.
SPECIAL = {
    "deepseek_v3": ["<｜end▁of▁sentence｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"]
    + ["<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"],
    "deepseek_v31": ["<｜end▁of▁sentence｜>"],  # these models' marks are no special tokens
    "deepseek_v32": ["<｜end▁of▁sentence｜>", "｜DSML｜"],
    "kimi_k2": ["<|im_end|>", "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"]
    + ["<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"],
    "mistral": ["</s>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"],
    "mistral_list": ["</s>", "[TOOL_CALLS]", "[THINK]", "[/THINK]"],
    "granite": ["<|end_of_text|>", "<|tool_call|>"],
    "llama3_json": ["<|eot_id|>", "<|python_tag|>"],
    "llama4_pythonic": ["<|eot|>", "<|python_start|>", "<|python_end|>"],
    "gpt_oss": ["<|return|>", "<|call|>", "<|end|>", "<|start|>", "<|channel|>", "<|message|>"]
    + ["<|constrain|>"],
}
REASONING = {"mistral": "mistral", "mistral_list": "mistral", "gpt_oss": "gpt_oss"}


@dataclass(frozen=True)
class Turn:
    thoughts: str = ""
    text: str = ""
    calls: list[tuple[str, dict]] = field(default_factory=list)


def format_of(name: str) -> Format:
    special = SPECIAL.get(name, ["<|im_end|>"])
    tokens = {token: 256 + n for n, token in enumerate(special)}
    return choose({"special_tokens": tokens}, name, REASONING.get(name, "think"))


def _json(name: str, arguments: dict, key: str = "arguments") -> str:
    return dumps({"name": name, key: arguments})


def dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _raw(value: object) -> str:
    return value if isinstance(value, str) else dumps(value)


def _python_call(name: str, arguments: dict) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def hermes(calls) -> str:
    return "\n".join(f"<tool_call>\n{_json(*call)}\n</tool_call>" for call in calls)


def qwen3_coder(calls) -> str:
    text = []
    for name, arguments in calls:
        inner = "".join(
            f"<parameter={key}>\n{_raw(value)}\n</parameter>\n" for key, value in arguments.items()
        )
        text.append(f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>")
    return "\n".join(text)


def glm45(calls) -> str:
    text = []
    for name, arguments in calls:
        inner = "".join(
            f"<arg_key>{key}</arg_key>\n<arg_value>{_raw(value)}</arg_value>\n"
            for key, value in arguments.items()
        )
        text.append(f"<tool_call>{name}\n{inner}</tool_call>")
    return "\n".join(text)


def glm47(calls) -> str:
    text = ""
    for name, arguments in calls:
        inner = "".join(
            f"<arg_key>{key}</arg_key><arg_value>{_raw(value)}</arg_value>"
            for key, value in arguments.items()
        )
        text += f"<tool_call>{name}{inner}</tool_call>"
    return text


def minimax_m2(calls) -> str:
    text = ""
    for name, arguments in calls:
        inner = "".join(
            f'<parameter name="{key}">{_raw(value)}</parameter>\n'
            for key, value in arguments.items()
        )
        text += f'<invoke name="{name}">\n{inner}</invoke>\n'
    return f"<minimax:tool_call>\n{text}</minimax:tool_call>"


def deepseek_v32(calls) -> str:
    text = ""
    for name, arguments in calls:
        text += f'<｜DSML｜invoke name="{name}">\n'
        for key, value in arguments.items():
            is_string = "true" if isinstance(value, str) else "false"
            text += f'<｜DSML｜parameter name="{key}" string="{is_string}">{_raw(value)}'
            text += "</｜DSML｜parameter>\n"
        text += "</｜DSML｜invoke>\n"
    return f"<｜DSML｜function_calls>\n{text}</｜DSML｜function_calls>"


def deepseek_v31(calls) -> str:
    text = "".join(
        f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{dumps(arguments)}<｜tool▁call▁end｜>"
        for name, arguments in calls
    )
    return f"<｜tool▁calls▁begin｜>{text}<｜tool▁calls▁end｜>"


def deepseek_v3(calls) -> str:
    text = "\n".join(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n"
        f"```json\n{dumps(arguments)}\n```<｜tool▁call▁end｜>"
        for name, arguments in calls
    )
    return f"<｜tool▁calls▁begin｜>{text}<｜tool▁calls▁end｜>"


def kimi_k2(calls) -> str:
    text = "".join(
        f"<|tool_call_begin|>functions.{name}:{index}"
        f"<|tool_call_argument_begin|>{dumps(arguments)}<|tool_call_end|>"
        for index, (name, arguments) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{text}<|tool_calls_section_end|>"


def mistral(calls) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{dumps(arguments)}" for name, arguments in calls)


def mistral_list(calls) -> str:
    return f"[TOOL_CALLS][{', '.join(_json(*call) for call in calls)}]"


def granite(calls) -> str:
    return f"<|tool_call|>[{', '.join(_json(*call) for call in calls)}]"


def llama3_json(calls) -> str:
    return "; ".join(_json(*call, "parameters") for call in calls)


def pythonic(calls) -> str:
    return f"[{', '.join(_python_call(*call) for call in calls)}]"


WRITERS = {
    "hermes": hermes,
    "qwen3_coder": qwen3_coder,
    "glm45": glm45,
    "glm47": glm47,
    "minimax_m2": minimax_m2,
    "deepseek_v3": deepseek_v3,
    "deepseek_v31": deepseek_v31,
    "deepseek_v32": deepseek_v32,
    "kimi_k2": kimi_k2,
    "mistral": mistral,
    "mistral_list": mistral_list,
    "granite": granite,
    "llama3_json": llama3_json,
    "pythonic": pythonic,
    "llama4_pythonic": pythonic,
}
FORMATS = [*WRITERS, "gpt_oss"]


def write(name: str, turn: Turn, in_thoughts: bool = False) -> str:
    """The answer as a model writes it; after a prompt that ends in thoughts if `in_thoughts`."""
    if name == "gpt_oss":
        return _channels(turn, in_thoughts)
    begin, end = ("[THINK]", "[/THINK]") if name.startswith("mistral") else ("<think>", "</think>")
    text = ""
    if turn.thoughts or in_thoughts:
        text = ("" if in_thoughts else begin + "\n") + f"{turn.thoughts}\n{end}\n\n"
    text += turn.text
    if turn.calls:
        text += ("\n" if turn.text else "") + WRITERS[name](turn.calls)
    return text


def _channels(turn: Turn, in_thoughts: bool) -> str:
    messages = []
    if turn.thoughts or in_thoughts:
        head = "" if in_thoughts else "<|channel|>analysis<|message|>"
        messages.append(f"{head}{turn.thoughts}<|end|>")
    if turn.text:
        channel = "commentary" if turn.calls else "final"
        end = "<|end|>" if turn.calls else "<|return|>"
        messages.append(f"<|channel|>{channel}<|message|>{turn.text}{end}")
    for index, (name, arguments) in enumerate(turn.calls):
        head = f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
        if index:
            head = f" to=functions.{name}<|channel|>commentary json<|message|>"
        messages.append(f"{head}{dumps(arguments)}<|call|>")
    return "<|start|>assistant".join(messages)


# Pieces of text that could be taken for something else.
FRAGMENTS = [
    "a",
    "é",
    "😀",
    "日本",
    " ",
    "\n",
    "\\",
    '"',
    "'",
    "{",
    "}",
    "[",
    "]",
    "<",
    "</",
    "(",
    "=",
    ",",
]
FRAGMENTS += [
    "<tool_call>",
    "</tool_call>",
    "</think>",
    "<think>",
    "</parameter>",
    "\n</parameter>\n",
]
FRAGMENTS += [
    "<function=",
    "<arg_key>",
    "</arg_value>",
    "<｜tool",
    "<|end|>",
    "<|call|>",
    "```",
    "[TOOL_",
]
FRAGMENTS += [
    "</invoke>",
    "</｜DSML｜parameter>",
    "\\u00e9",
    "null",
    "True",
    "12",
    '": ',
    "\x85",
    "\t",
]

prose = st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join)
numbers = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | prose,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(prose, inner, max_size=3),
    max_leaves=6,
)
arguments = st.fixed_dictionaries(
    {"text": prose, "count": st.integers()},
    optional={
        "unit": st.sampled_from(PROPERTIES["unit"]["enum"]),
        "ratio": numbers,
        "flag": st.booleans(),
        "items": st.lists(values, max_size=3),
        "place": st.dictionaries(prose, values, max_size=3),
        "maybe": st.none() | prose.map("x".__add__),
    },
).map(lambda found: {key: found[key] for key in PROPERTIES if key in found})
calls = st.lists(st.tuples(st.sampled_from([tool.name for tool in TOOLS]), arguments), max_size=3)


@st.composite
def turns(draw, name: str):
    """A turn that `name` can spell: no text holds the mark that would end it."""
    chosen = format_of(name)
    spelling = chosen.spelling
    marks = [*chosen.special_tokens, *(mark.strip() for mark in spelling.marks if mark.strip())]
    if chosen.thoughts:
        marks += [chosen.thoughts.begin, chosen.thoughts.end]
    marks = [mark for mark in marks if len(mark) > 2]

    def clean(text: str) -> str:
        while any(mark in text for mark in marks):
            for mark in marks:
                text = text.replace(mark, "~")
        return text

    def readable(arguments: dict) -> dict:
        """Bare text between marks cannot hold the mark at its end."""
        if spelling.kind != "tagged":
            return arguments
        end = spelling.value_end.strip()
        return json.loads(dumps(arguments).replace(end, "~"))

    found = [(tool, readable(arguments)) for tool, arguments in draw(calls)]
    thoughts = clean(draw(prose)).strip()
    text = clean(draw(prose)).strip()
    if spelling.bare and (found or text.startswith(spelling.bare)):
        text = ""
    return Turn(thoughts, text, found)


def joined(events) -> Turn:
    """What the events say. Their order is checked too."""
    calls: list[list] = []
    for event in events:
        if isinstance(event, CallBegin):
            assert event.index == len(calls) and event.id
            calls.append([event.name, ""])
        elif isinstance(event, CallArguments):
            assert event.index == len(calls) - 1 and event.text
            calls[-1][1] += event.text
        else:
            assert event.text
    thoughts = "".join(event.text for event in events if isinstance(event, Reasoning))
    text = "".join(event.text for event in events if isinstance(event, Text))
    return Turn(thoughts, text, [(name, arguments) for name, arguments in calls])

"""How model families write thoughts and calls, as data: the texts of their own chat templates.

Spellings hold exactly what a model is trained to write, white space included; grammar.py enforces
them as they are. Parsers read the same marks but are lenient about white space.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class Spelling:
    """How calls are written. `kind` says what stands between the marks:

    json: {"name": NAME, `arguments_key`: {...}}, or with `is_list` a list of these.
    named: NAME, `name_end`, {...}.
    tagged: NAME, `name_end`, then key and value of every argument between marks.
    pythonic: [NAME(key=value, ...), ...].
    channels: messages of gpt-oss, whose header names the function.

    `begin`, `end`: around one call. `section`: around all calls, or with `single` around each.
    `between`: between calls, or between their sections. `bare`: the answer may begin with a call
    without a mark. `signs`: all stand in the source of a chat template of this format.
    """

    kind: str
    signs: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    begin: str = ""
    end: str = ""
    section: tuple[str, str] = ("", "")
    single: bool = False
    between: str = ""
    bare: str = ""  # the first character of a call without a mark
    loose: bool = False  # models leave out the section's marks
    arguments_key: str = "arguments"
    is_list: bool = False
    name_end: str = ""
    id_mark: str = ""  # between the name and the id of a call, where a model writes one
    numbered: bool = False  # a name is written functions.NAME:NUMBER, which is also the id
    short_ids: bool = False  # the chat template takes only ids of nine letters and digits
    key_begin: str = ""
    # The end of a key -> how the value is written: "string" (as it is), "json", or "" if the
    # tool's schema decides.
    key_ends: Mapping[str, str] = field(default_factory=dict)
    value_begin: str = ""
    value_end: str = ""

    @property
    def marks(self) -> tuple[str, ...]:
        """All texts that are no part of a call's content."""
        keys = (self.key_begin, *self.key_ends, self.value_begin, self.value_end)
        return (*self.section, self.begin, self.name_end, self.id_mark, *keys, self.end)

    @property
    def triggers(self) -> tuple[str, ...]:
        """The marks that begin calls in free text."""
        marks = [self.section[0] or self.begin]
        if self.loose:
            marks.append(self.begin)
        return tuple(mark.strip() for mark in marks if mark)


@dataclass(frozen=True, slots=True)
class Thoughts:
    """The marks around thoughts."""

    begin: str
    end: str
    signs: tuple[str, ...] = ()


_HERMES = Spelling(
    "json",
    ("<tool_call>",),
    ("Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
    begin="<tool_call>\n",
    end="\n</tool_call>",
    between="\n",
)
_DEEPSEEK = Spelling(
    "named",
    ("<｜tool▁sep｜>",),
    section=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    begin="<｜tool▁call▁begin｜>",
    name_end="<｜tool▁sep｜>",
    end="<｜tool▁call▁end｜>",
)
_MISTRAL_LIST = Spelling(
    "json",
    ("[TOOL_CALLS]",),
    ("MistralForCausalLM", "MixtralForCausalLM"),
    begin="[TOOL_CALLS]",
    is_list=True,
    short_ids=True,
)
_LLAMA = Spelling(
    "json",
    ('{"name": function name, "parameters":',),
    ("LlamaForCausalLM",),
    between="; ",
    bare="{",
    begin="<|python_tag|>",
    arguments_key="parameters",
)
_GLM = Spelling(
    "tagged",
    ("<arg_key>",),
    ("Glm4MoeForCausalLM",),
    begin="<tool_call>",
    name_end="\n",
    key_begin="<arg_key>",
    key_ends={"</arg_key>\n": ""},
    value_begin="<arg_value>",
    value_end="</arg_value>\n",
    end="</tool_call>",
    between="\n",
)
_PYTHONIC = Spelling("pythonic", ("[func_name1(",), bare="[")

# In the order in which their signs are looked for: the particular before the general.
TOOLS: Mapping[str, Spelling] = {
    "gpt_oss": Spelling("channels", ("<|channel|>", "<|message|>"), ("GptOssForCausalLM",)),
    "deepseek_v32": Spelling(
        "tagged",
        ("｜DSML｜",),
        ("DeepseekV32ForCausalLM",),
        section=("<｜DSML｜function_calls>\n", "</｜DSML｜function_calls>"),
        begin='<｜DSML｜invoke name="',
        name_end='">\n',
        key_begin='<｜DSML｜parameter name="',
        key_ends={'" string="true">': "string", '" string="false">': "json"},
        value_end="</｜DSML｜parameter>\n",
        end="</｜DSML｜invoke>\n",
    ),
    "deepseek_v3": replace(
        _DEEPSEEK,
        signs=("<｜tool▁sep｜>", "```json"),
        architectures=("DeepseekV3ForCausalLM",),
        begin="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        name_end="\n```json\n",
        end="\n```<｜tool▁call▁end｜>",
        between="\n",
    ),
    "deepseek_v31": _DEEPSEEK,
    "kimi_k2": Spelling(
        "named",
        ("<|tool_call_argument_begin|>",),
        ("KimiK25ForConditionalGeneration",),
        section=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        begin="<|tool_call_begin|>",
        name_end="<|tool_call_argument_begin|>",
        end="<|tool_call_end|>",
        numbered=True,
    ),
    "glm47": replace(
        _GLM,
        signs=("</arg_key><arg_value>",),
        architectures=("Glm4MoeLiteForCausalLM",),
        name_end="",
        key_ends={"</arg_key>": ""},
        value_end="</arg_value>",
        between="",
    ),
    "glm45": _GLM,
    "minimax_m2": Spelling(
        "tagged",
        ("minimax:tool_call",),
        ("MiniMaxM2ForCausalLM",),
        section=("<minimax:tool_call>\n", "</minimax:tool_call>"),
        begin='<invoke name="',
        name_end='">\n',
        key_begin='<parameter name="',
        key_ends={'">': ""},
        value_end="</parameter>\n",
        end="</invoke>\n",
    ),
    "qwen3_coder": Spelling(
        "tagged",
        ("<function=", "<parameter="),
        ("Qwen3NextForCausalLM", "Qwen3_5ForConditionalGeneration"),
        section=("<tool_call>\n", "</tool_call>"),
        single=True,
        loose=True,
        between="\n",
        begin="<function=",
        name_end=">\n",
        key_begin="<parameter=",
        key_ends={">\n": ""},
        value_end="\n</parameter>\n",
        end="</function>\n",
    ),
    "mistral": replace(
        _MISTRAL_LIST,
        kind="named",
        signs=("[TOOL_CALLS]", "[ARGS]"),
        architectures=("Mistral3ForConditionalGeneration", "Ministral3ForCausalLM"),
        is_list=False,
        name_end="[ARGS]",
        id_mark="[CALL_ID]",
    ),
    "mistral_list": _MISTRAL_LIST,
    "granite": Spelling(
        "json", ("<|tool_call|>",), ("GraniteForCausalLM",), begin="<|tool_call|>", is_list=True
    ),
    "hermes": _HERMES,
    "llama4_pythonic": replace(
        _PYTHONIC,
        signs=("[func_name1(", "<|python_start|>"),
        architectures=("Llama4ForConditionalGeneration", "Llama4ForCausalLM"),
        begin="<|python_start|>",
        end="<|python_end|>",
    ),
    "pythonic": _PYTHONIC,
    "llama3_json": _LLAMA,
}

_THINK = Thoughts("<think>", "</think>", ("</think>",))

# gpt_oss has no marks of its own here: its channels tell thoughts and calls alike.
THOUGHTS: Mapping[str, Thoughts | None] = {
    "gpt_oss": None,
    "mistral": Thoughts("[THINK]", "[/THINK]", ("[/THINK]",)),
    "seed_oss": Thoughts("<seed:think>", "</seed:think>", ("</seed:think>",)),
    "kimi_vl": Thoughts("◁think▷", "◁/think▷", ("◁/think▷",)),
    "granite": Thoughts(
        "Here is my thought process:", "Here is my response:", ("Here is my thought process:",)
    ),
    "think": _THINK,
}

CHANNELS = "gpt_oss"
NONE = "none"

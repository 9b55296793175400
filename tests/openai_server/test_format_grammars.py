"""Grammars allow what a format's model writes, and nothing that breaks the tools' schemas."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from written_turns import FORMATS, TOOLS, Turn, dumps, format_of, joined, turns, write

from gllm_client.openai_server.conversation import Conversation, Tool, ToolChoice
from gllm_client.openai_server.errors import ApiError
from gllm_client.openai_server.responses_request import read_tools
from gllm_engine.sampling import StructuredOutputs
from gllm_engine.text.grammar import Vocabulary, compile_grammar, ll_tokenizer, translate

few = settings(max_examples=5, deadline=None)
STRICT = tuple(replace(tool, strict=True) for tool in TOOLS)
FORM = {"json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}
GOOD = ("get_weather", {"text": "Paris", "count": 1})


@lru_cache
def compiled(name: str, grammar: str):
    special = format_of(name).special_tokens
    tokens = (
        [bytes([byte]) for byte in range(256)] + [token.encode() for token in special] + [b"<end>"]
    )
    end = len(tokens) - 1
    vocabulary = Vocabulary(tokens, list(range(256, len(tokens))), [end])
    lark = translate(StructuredOutputs(grammar=grammar), vocabulary)
    return compile_grammar(ll_tokenizer(vocabulary), lark)


def encode(name: str, text: str) -> list[int]:
    ids = []
    special = format_of(name).special_tokens
    while text:
        found = [token for token in special if text.startswith(token)]
        ids += [special[found[0]]] if found else text[0].encode()
        text = text[len(found[0]) if found else 1 :]
    return ids


def accepts(name: str, text: str, in_thoughts: bool = False, **asked) -> bool:
    asked = {"messages": [], "tools": TOOLS, **asked}
    constraint = format_of(name).constraint(Conversation(**asked), in_thoughts)
    matcher = compiled(name, constraint["grammar"]).deep_copy()
    for ending in ("<|call|>", "<|return|>"):
        text = text.removesuffix(ending)
    ids = encode(name, text)
    return (
        matcher.validate_tokens(ids) == len(ids)
        and matcher.consume_tokens(ids)
        and (matcher.is_accepting())
    )


REQUIRED = {"tool_choice": ToolChoice("required")}


@pytest.mark.parametrize("name", FORMATS)
@few
@given(data=st.data())
def test_calls_as_they_are_written_are_allowed(name, data):
    special = format_of(name).special_tokens

    def is_written(turn: Turn) -> bool:  # strings hold no special tokens, only their names
        return bool(turn.calls) and not any(token in dumps(turn.calls) for token in special)

    turn = replace(data.draw(turns(name).filter(is_written)), text="")
    if name == "gpt_oss":
        turn = replace(turn, calls=turn.calls[:1])
    in_thoughts = data.draw(st.booleans())
    text = write(name, turn, in_thoughts)
    assert accepts(name, text, in_thoughts, **REQUIRED)
    assert accepts(name, text, in_thoughts, tools=STRICT, form=FORM)
    if name != "gpt_oss" and len(turn.calls) > 1:
        assert not accepts(name, text, in_thoughts, parallel_tool_calls=False, **REQUIRED)


SMALL = {
    "type": "object",
    "properties": {
        "unit": {"enum": ["celsius", "kelvin"]},
        "count": {"type": "integer"},
        "maybe": {"enum": ["a", None]},
        "items": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["unit", "count"],
    "additionalProperties": False,
}


def walk(name: str, grammar: str, seed: int) -> str | None:
    """A random text of a grammar, mostly without white space; None if it has no end."""
    rng = random.Random(seed)
    matcher = compiled(name, grammar).deep_copy()
    special = list(format_of(name).special_tokens)
    end = 256 + len(special)
    text = b""
    for _ in range(500):
        mask = matcher.compute_bitmask()
        ids = [id for id in range(end + 1) if mask[id >> 3] >> (id & 7) & 1]
        if end in ids:
            return text.decode()
        readable = [id for id in ids if 32 < id < 127 or id > 255]
        id = rng.choice(readable if readable and rng.random() < 0.7 else ids)
        assert matcher.consume_token(id)
        text += bytes([id]) if id < 256 else special[id - 256].encode()
    return None


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_grammar_allows_is_read_as_calls(name):
    tools = (Tool("f", parameters=SMALL, strict=True),)
    chosen = format_of(name)
    if name != "gpt_oss":  # random thoughts have no end
        chosen = replace(chosen, reasoning_format="none")
    asked = Conversation([], tools, ToolChoice("required"))
    grammar = chosen.constraint(asked, False)["grammar"]
    texts = [text for seed in range(8) if (text := walk(name, grammar, seed)) is not None]
    assert texts
    for text in texts:
        parser = chosen.parser(tools, False, list(chosen.special_tokens))
        turn = joined(parser.feed(text) + parser.finish())
        assert turn.calls and not turn.text and parser.malformed == 0, text
        for tool, arguments in turn.calls:
            found = json.loads(arguments)
            assert tool == "f" and {"unit", "count"} <= set(found) <= set(SMALL["properties"])
            assert found["unit"] in ("celsius", "kelvin") and type(found["count"]) is int
            assert found.get("maybe") in ("a", None) and type(found.get("items", [])) is list


def wrong_calls(name):
    yield "get_weather", {"count": 1}
    yield "get_weather", {"text": "x", "count": "many"}
    yield "get_weather", {"text": "x", "count": 1, "flag": 3}
    yield "get_weather", {"text": "x", "count": 1, "more": 3}
    yield "get_weather", {"text": "x", "unit": "miles", "count": 1}
    yield "delete_all", {"text": "x", "count": 1}


@pytest.mark.parametrize("name", FORMATS)
def test_calls_that_break_the_schema_are_not_allowed(name):
    good = write(name, Turn(calls=[GOOD]))
    assert accepts(name, good, **REQUIRED)
    for call in wrong_calls(name):
        assert not accepts(name, write(name, Turn(calls=[call])), **REQUIRED), call
    for text in ("", "hello", "hello " + good, good + " hello", good[:-20]):
        assert not accepts(name, text, **REQUIRED), text
    other = {"tool_choice": ToolChoice("named", TOOLS[1].name)}
    assert not accepts(name, good, **other)
    assert accepts(name, write(name, Turn(calls=[(TOOLS[1].name, GOOD[1])])), **other)


@pytest.mark.parametrize("name", FORMATS)
def test_with_strict_tools_text_is_free_and_calls_are_not(name):
    spelling = format_of(name).spelling
    for turn in (
        Turn("", "hello"),
        Turn("hm", "hello"),
        Turn(calls=[GOOD]),
        Turn("hm", "", [GOOD]),
    ):
        assert accepts(name, write(name, turn), tools=STRICT), turn
    if not spelling.bare and name != "gpt_oss":
        text = write(name, Turn("hm", "so", [GOOD, GOOD]))
        assert accepts(name, text, tools=STRICT)
        text = write(name, Turn("", "so", [GOOD]))
        assert accepts(name, text, tools=STRICT, parallel_tool_calls=False)
    for call in wrong_calls(name):
        for parallel in (True, False):
            asked = {"tools": STRICT, "parallel_tool_calls": parallel}
            assert not accepts(name, write(name, Turn(calls=[call])), **asked), call
    loose = (STRICT[0], TOOLS[1])
    anything = (TOOLS[1].name, {"other": "x"})
    assert accepts(name, write(name, Turn(calls=[anything])), tools=loose)
    assert not accepts(
        name, write(name, Turn(calls=[("get_weather", {"other": "x"})])), tools=loose
    )


@pytest.mark.parametrize("name", FORMATS)
def test_a_form_holds_after_thoughts(name):
    for tools in ((), TOOLS):
        for in_thoughts in (False, True):
            asked = {"tools": tools, "form": FORM, "in_thoughts": in_thoughts}
            assert accepts(name, write(name, Turn("hm", '{"a": 1}'), in_thoughts), **asked)
            assert not accepts(name, write(name, Turn("hm", '{"a": "x"}'), in_thoughts), **asked)
            assert not accepts(name, write(name, Turn("hm", "so"), in_thoughts), **asked)
    assert accepts(name, write(name, Turn("hm", "", [GOOD])), form=FORM)


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        ({"choice": ['a "b"', "c"]}, 'a "b"', "b"),
        ({"regex": r"\d+/[\w.]"}, "12/x", "٣/x"),
        ({"json_object": True}, '{"b": []}', "[]"),
        ({"json": '{"type": "integer"}'}, "5", '"5"'),
        ({"json": {}, "disable_any_whitespace": True}, '{"a":1}', '{"a": 1}'),
        ({"json": {}, "whitespace_pattern": "_?"}, '{_"a":1}', '{ "a":1}'),
        ({"grammar": 'start: "a" start | word\nword: "start"'}, "aastart", "aa"),
    ],
)
def test_every_form_can_follow_thoughts(form, good, bad):
    for name in ("hermes", "gpt_oss"):
        assert accepts(name, write(name, Turn("hm", good)), tools=(), form=form)
        assert not accepts(name, write(name, Turn("hm", bad)), tools=(), form=form)


def test_forms_that_cannot_follow_thoughts():
    def constraint(name, form, in_thoughts):
        return format_of(name).constraint(Conversation([], form=form), in_thoughts)

    gbnf = {"grammar": 'root ::= "a"'}
    tag = {"structural_tag": "{}"}
    assert constraint("hermes", gbnf, False) == gbnf
    assert constraint("hermes", tag, True) == tag
    for name, form in (("hermes", gbnf), ("gpt_oss", gbnf), ("mistral", tag), ("gpt_oss", tag)):
        with pytest.raises(ApiError, match="this form cannot follow the model's thoughts"):
            constraint(name, form, True)


def test_nothing_is_enforced_that_nobody_demands():
    hermes = format_of("hermes")
    assert hermes.constraint(Conversation([], tools=TOOLS), True) is None
    assert hermes.constraint(Conversation([], STRICT, ToolChoice("none")), True) is None
    plain = replace(hermes, tool_format="none", reasoning_format="none")
    assert plain.constraint(Conversation([], form=FORM), False) == FORM
    assert plain.constraint(Conversation([], tools=STRICT), False) is None
    with pytest.raises(ApiError, match="tool_choice: the tool format of this model is unknown"):
        plain.constraint(Conversation([], TOOLS, ToolChoice("required")), False)
    with pytest.raises(ApiError, match="no tool has this name"):
        hermes.constraint(Conversation([], TOOLS, ToolChoice("named", "other")), False)


def test_tools_without_arguments_or_with_any():
    tools = (
        Tool("now", parameters={"type": "object", "properties": {}, "additionalProperties": False}),
    )
    tools += (Tool("log"),)
    for name in FORMATS:
        asked = {"tools": tools, **REQUIRED}
        assert accepts(name, write(name, Turn(calls=[("now", {})])), **asked)
        assert not accepts(name, write(name, Turn(calls=[("now", {"a": 1})])), **asked)
        assert accepts(name, write(name, Turn(calls=[("log", {"a": "x", "b": [1]})])), **asked)


PATCH = r"""start: begin hunk+ end
begin: "*** Begin Patch" LF
end: "*** End Patch" LF?
hunk: "*** Add File: " filename LF line+
filename: /(.+)/
line: "+" /(.*)/ LF -> line
%import common.LF
"""
NOT_BARE = [name for name in FORMATS if not format_of(name).spelling.bare]
IN_TEXT = [name for name in FORMATS if format_of(name).spelling.kind == "tagged"]


def custom(syntax: str, definition: str) -> Tool:
    spec = {"type": "custom", "name": "patch"}
    spec["format"] = {"type": "grammar", "syntax": syntax, "definition": definition}
    return read_tools([spec])["patch"].tool


GRAMMARS = [
    ("lark", r'start: "a" start? [/[\n"b]/]', ["aaa", "a\n", 'aab"'], ["", "b", "a\\"]),
    ("lark", 'start: "(" start* ")"\n%ignore /\\s/', ["(())", "( ()\n\t)"], ["(", "(x)"]),
    ("lark", r"start: /[^a]\D(?s:.)(\w|\x22){2}/", ['\n"\nx"', r"\\\xx"], ["aaaaa", "b5xxx"]),
    ("lark", "start: (/\\w+/ LF)+\n%import common.LF", ["a\nb\n"], ["a", "a b\n"]),
    ("regex", r'\d+/"[a-z\n]*"', ['12/"a\nb"'], ["12", 'x/""']),
]
PATCHES = (
    "lark",
    PATCH,
    ['*** Begin Patch\n*** Add File: a"\\é.py\n+x = "\t"\n+\n*** End Patch\n'],
    ["*** Begin Patch\n*** End Patch", "*** Begin Patch\n*** Add: a\n+x\n*** End Patch"],
)


@pytest.mark.parametrize(
    ("name", "syntax", "definition", "good", "bad"),
    [(name, *grammar) for name in NOT_BARE for grammar in GRAMMARS]
    + [(name, *PATCHES) for name in IN_TEXT],
)
def test_the_grammar_of_a_custom_tool_holds(name, syntax, definition, good, bad):
    asked = {"tools": (custom(syntax, definition), TOOLS[0]), "tool_choice": ToolChoice("required")}
    loose = asked | {"tool_choice": ToolChoice()}
    for text in good:
        turn = Turn("hm", calls=[("patch", {"input": text})])
        assert accepts(name, write(name, turn), **asked), text
        assert accepts(name, write(name, turn), **loose), text
    for text in bad:
        turn = Turn(calls=[("patch", {"input": text})])
        assert not accepts(name, write(name, turn), **asked), text
        assert not accepts(name, write(name, turn), **loose), text
    assert accepts(name, write(name, Turn(calls=[GOOD])), **asked)
    assert accepts(name, write(name, Turn("hm", "so")), **loose)


def refused(name: str, tool: Tool) -> str:
    with pytest.raises(ApiError) as caught:
        format_of(name).constraint(Conversation([], (tool,)), False)
    assert caught.value.param == "tools"
    return caught.value.message


@pytest.mark.parametrize(
    "part",
    ['"a".."z"', "%import common.ESCAPED_STRING", "%import common.LF -> X", "%json {}", "/[[b]a]/"]
    + [r"/\p{L}/", "%import common (LF, WS)"],
)
def test_a_grammar_that_cannot_stand_in_json_is_refused(part):
    message = refused("hermes", custom("lark", f"start: A\nA: {part}"))
    assert message.startswith("tools: the grammar of patch: this server cannot enforce")
    assert "%import common.LF and /(.*)/ within JSON" in refused("hermes", custom("lark", PATCH))


def test_a_grammar_that_the_format_cannot_hold_is_refused():
    for name in ("pythonic", "llama4_pythonic", "llama3_json"):
        assert "format" in refused(name, custom("lark", 'start: "a"'))
    assert "format" in refused("pythonic", custom("regex", "a+"))
    asked = {"tools": (custom("regex", "a+"),), **REQUIRED}
    for text in ("aa", "b"):
        call = write("llama3_json", Turn(calls=[("patch", {"input": text})]))
        assert accepts("llama3_json", call, **asked) is (text == "aa")


PATTERNS = [
    ("^[a-z]{2,4}$", ["ab", "abcd"], ["a", "abcde", "ab1", ""]),
    (r"\d-\d", ["x1-2\ny", "1-2"], ["1", "a-b"]),
    (r"^a", ["abc\n</b>"], ["ba"]),
    (r"\$$", ["x$"], ["$x", "x"]),
    (r"</?b>$", ["a</b>", "<b>"], ["b"]),
    ("^$", [""], ["x"]),
    ("", ["", "x\n"], []),
    ("^.*$", ["a<b", "", "</parameter", "</"], ["a\nb"]),
]


def with_strings(schema: object) -> Tool:
    properties = {"s": schema, "n": {"type": "integer"}}
    parameters = {"type": "object", "properties": properties, "required": ["s"]}
    return Tool("f", "", parameters | {"additionalProperties": False}, strict=True)


@pytest.mark.parametrize("name", [n for n in FORMATS if format_of(n).spelling.kind != "pythonic"])
@pytest.mark.parametrize(("pattern", "good", "bad"), PATTERNS)
def test_patterns_of_strings_hold(name, pattern, good, bad):
    tools = (with_strings({"type": "string", "pattern": pattern}),)
    for text in (*good, *bad):
        for more in ({}, {"n": 5}):
            written = write(name, Turn(calls=[("f", {"s": text} | more)]))
            for asked in ({"tools": tools}, {"tools": tools, **REQUIRED}):
                assert accepts(name, written, **asked) is (text in good), text


def test_a_pattern_in_a_part_of_a_schema_is_refused_where_arguments_are_text():
    tool = with_strings({"anyOf": [{"type": "string", "pattern": "^a"}, {"type": "null"}]})
    for name in IN_TEXT:
        assert "cannot enforce one of the patterns" in refused(name, tool)
        assert "ends within an escape" in refused(
            name, with_strings({"type": "string", "pattern": "a\\"})
        )
    loose = replace(tool, strict=False)
    assert accepts(
        "qwen3_coder",
        write("qwen3_coder", Turn(calls=[("f", {"s": "b"})])),
        tools=(loose,),
        **REQUIRED,
    )
    assert not accepts("hermes", write("hermes", Turn(calls=[("f", {"s": "b"})])), tools=(tool,))

"""Texts of models become events, however the text is cut and whatever is wrong with it."""

from __future__ import annotations

import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from written_turns import FORMATS, FRAGMENTS, TOOLS, Turn, format_of, joined, turns, write

from gllm_client.openai_server.events import CallArguments, CallBegin, Reasoning, Text
from gllm_client.openai_server.formats.values import types_of

few = settings(max_examples=10, deadline=None)


def parse(name, text, cuts=(), *, in_thoughts=False, tools=TOOLS, parallel=True):
    chosen = format_of(name)
    parser = chosen.parser(tools, in_thoughts, list(chosen.special_tokens), parallel)
    events = []
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    for start, end in zip(edges, edges[1:], strict=False):
        events += parser.feed(text[start:end])
    return events + parser.finish(), parser


def loaded(turn: Turn) -> Turn:
    return Turn(turn.thoughts, turn.text, [(name, json.loads(text)) for name, text in turn.calls])


@pytest.mark.parametrize("name", FORMATS)
@few
@given(data=st.data())
def test_what_is_written_is_read(name, data):
    turn = data.draw(turns(name))
    in_thoughts = data.draw(st.booleans())
    text = write(name, turn, in_thoughts)
    whole, parser = parse(name, text, in_thoughts=in_thoughts)
    assert loaded(joined(whole)) == turn
    assert parser.malformed == parser.dropped == 0 and not parser.in_thoughts
    pieces, _ = parse(name, text, range(len(text)), in_thoughts=in_thoughts)
    assert joined(pieces) == joined(whole)
    cuts = data.draw(st.lists(st.integers(0, len(text)), min_size=1, max_size=6))
    pieces, _ = parse(name, text, cuts, in_thoughts=in_thoughts)
    assert joined(pieces) == joined(whole)
    unfinished = text[: cuts[0]]
    whole, _ = parse(name, unfinished, in_thoughts=in_thoughts)
    pieces, _ = parse(name, unfinished, cuts[1:], in_thoughts=in_thoughts)
    assert joined(pieces) == joined(whole)


def garbage(name):
    """Marks and pieces of calls in any order, and words that are easily found again."""
    chosen = format_of(name)
    marks = [mark for mark in (*chosen.spelling.marks, *chosen.special_tokens) if mark]
    if chosen.thoughts:
        marks += [chosen.thoughts.begin, chosen.thoughts.end]
    pieces = [
        *marks,
        *FRAGMENTS,
        '{"name": "get_weather", "arguments": {',
        "get_weather",
        "functions.",
    ]
    pieces += [
        '"arguments":',
        "[get_weather(text=",
        "commentary to=functions.get_weather",
        "analysis",
    ]
    word = st.integers(0, 99).map("word{}!".format)
    return st.lists(st.sampled_from(pieces) | word, max_size=14).map("".join)


@pytest.mark.parametrize("name", FORMATS)
@few
@given(data=st.data())
def test_garbage_is_text_and_no_word_is_lost(name, data):
    text = data.draw(garbage(name))
    in_thoughts = data.draw(st.booleans())
    check_cuts(name, text, in_thoughts)


def check_cuts(name, text, in_thoughts=False):
    whole, one = parse(name, text, in_thoughts=in_thoughts)
    cut, other = parse(name, text, range(len(text)), in_thoughts=in_thoughts)
    assert joined(cut) == joined(whole) and one.malformed == other.malformed
    if name != "gpt_oss":  # the header of a message is no text
        seen = "".join(f"{e.id} {e.name}" if isinstance(e, CallBegin) else e.text for e in whole)
        assert set(re.findall(r"word\d+!", text)) <= set(re.findall(r"word\d+!", seen))


@pytest.mark.parametrize(
    "between", ["x <tool_call>\n", " x\n\ny ", "\n\n", "x", " ", "<parameter", ""]
)
@pytest.mark.parametrize(
    "end", ["", "</function>\n</tool_call>", "<parameter=a>\n1\n</parameter>\n"]
)
def test_text_between_arguments_is_kept_however_it_is_cut(between, end):
    text = f"<tool_call>\n<function=get_weather>\n{between}{end} word1!"
    check_cuts("qwen3_coder", text)
    events, parser = parse(
        "qwen3_coder", f"<tool_call>\n<function=f>\n{between}</function>\n</tool_call>"
    )
    words = "".join(event.text for event in events if isinstance(event, Text))
    assert words.strip() == between.strip() and parser.malformed == bool(words)


@pytest.mark.parametrize("name", FORMATS)
def test_arguments_come_before_the_call_is_complete(name):
    text = write(name, Turn(calls=[("get_weather", {"text": "x" * 300, "count": 1})]))
    chosen = format_of(name)
    parser = chosen.parser(TOOLS, False, list(chosen.special_tokens))
    events = parser.feed(text[: text.index("xxx") + 200])
    assert isinstance(events[0], CallBegin)
    assert sum(e.text.count("x") for e in events if isinstance(e, CallArguments)) > 150


@pytest.mark.parametrize("name", FORMATS)
def test_without_tools_there_are_no_calls(name):
    turn = Turn("t", "hello", [("get_weather", {"text": "x", "count": 1})])
    events, parser = parse(name, write(name, turn), tools=())
    assert joined(events).calls == [] and joined(events).thoughts == "t"
    assert joined(events).text.startswith("hello") and parser.malformed <= 1


@pytest.mark.parametrize("name", FORMATS)
def test_calls_after_the_first_are_dropped_where_one_is_allowed(name):
    calls = [("get_weather", {"text": "x", "count": n}) for n in range(3)]
    events, parser = parse(name, write(name, Turn(calls=calls)), parallel=False)
    assert loaded(joined(events)).calls == calls[:1] and parser.dropped == 2


LONG = {"text": 'a "quoted" line\n' * 24_000, "count": 1}


ONE_OF_EACH_KIND = ["hermes", "deepseek_v31", "qwen3_coder", "pythonic", "gpt_oss"]


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_a_call_of_100_000_tokens_takes_under_a_second(name):
    text = write(name, Turn(calls=[("get_weather", LONG)]))
    pieces = [text[at : at + 4] for at in range(0, len(text), 4)]
    assert len(pieces) > 90_000

    def processor_time() -> float:
        parser = format_of(name).parser(TOOLS, False, list(format_of(name).special_tokens))
        start = time.process_time()
        for piece in pieces:
            parser.feed(piece)
        return time.process_time() - start

    assert any(processor_time() < 1 for _ in range(3))  # neighbours may slow one


@pytest.mark.parametrize("name", ["hermes", "mistral", "qwen3_coder", "gpt_oss"])
@pytest.mark.parametrize("piece", ["x", "\n", "<", "[", '{"', "<tool_call>{", '[TOOL_CALLS][{"a'])
def test_no_text_costs_more_than_linear_time(name, piece):
    text = piece * (30_000 // len(piece))
    chosen = format_of(name)
    parser = chosen.parser(
        TOOLS, False, [*chosen.special_tokens, *map("[control_{}]".format, range(999))]
    )
    start = time.process_time()
    for at in range(0, len(text), 3):
        parser.feed(text[at : at + 3])
    parser.finish()
    assert time.process_time() - start < 2


def test_marks_inside_strings_are_arguments():
    arguments = {"text": "</tool_call><|call|><tool_call>", "count": 1}
    for name in ("hermes", "gpt_oss", "kimi_k2"):
        events, _ = parse(name, write(name, Turn(calls=[("get_weather", arguments)])))
        assert loaded(joined(events)).calls == [("get_weather", arguments)]


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', [("f", {"a": 1})]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [("f", {"a": 1})]),
        ('<tool_call>{"name": "f"}</tool_call>', [("f", {})]),
        ('<tool_call>[{"name": "f", "arguments": {}}, {"name": "g"}]', [("f", {}), ("g", {})]),
    ],
)
def test_other_orders_of_json_calls(text, calls):
    assert loaded(joined(parse("hermes", text)[0])).calls == calls


def test_values_are_typed_by_the_schema():
    def read(**texts):
        inner = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in texts.items())
        text = f"<tool_call>\n<function=get_weather>\n{inner}</function>\n</tool_call>"
        return loaded(joined(parse("qwen3_coder", text)[0])).calls[0][1]

    assert read(text="12", count="12", flag="True", ratio="1e3") == {
        "text": "12",
        "count": 12,
        "flag": True,
        "ratio": 1000.0,
    }
    assert read(count="many", items="[1", maybe="null") == {
        "count": "many",
        "items": "[1",
        "maybe": None,
    }
    assert read(unknown="5", other="five") == {"unknown": 5, "other": "five"}
    assert read(unit="celsius", place='{"a": [1]}') == {"unit": "celsius", "place": {"a": [1]}}


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": ["integer", "null"]}, {"integer", "null"}),
        ({"enum": ["a", 1, None]}, {"string", "integer", "null"}),
        ({"oneOf": [{"const": True}, {"$ref": "#/$defs/many"}]}, {"boolean", "array"}),
        ({"anyOf": [{"type": "string"}, {}]}, set()),
        ({"allOf": [{"minimum": 1}, {"type": "number"}]}, {"number"}),
        ({"$ref": "#/$defs/wide"}, set()),  # endless
        ({"type": {}, "enum": 3, "anyOf": 4, "allOf": {"a": 1}}, set()),
        ({"$ref": "#/$defs/missing"}, set()),
        (True, set()),
    ],
)
def test_types_of_schemas(schema, types):
    wide = {"anyOf": [{"$ref": "#/$defs/wide"}] * 10}
    assert types_of(schema, {"$defs": {"many": {"type": "array"}, "wide": wide}}) == types


def test_malformed_calls_are_text_and_counted():
    for text in ("<tool_call>nothing", '<tool_call>\n{"name": "f", "argum', "<tool_call>{}"):
        events, parser = parse("hermes", f"so {text}")
        assert joined(events) == Turn("", f"so {text}") and parser.malformed == 1
    events, parser = parse("hermes", '<tool_call>{"name": "f", "arguments": {"a": }}</tool_call>')
    assert joined(events).calls == [("f", '{"a": }')] and parser.malformed == 1


def test_ids():
    for name, pattern in (("hermes", "call_[0-9a-f]{24}"), ("mistral", "[a-zA-Z0-9]{9}")):
        text = write(name, Turn(calls=[("get_weather", {})] * 2))
        ids = [e.id for e in parse(name, text)[0] if isinstance(e, CallBegin)]
        assert all(re.fullmatch(pattern, id) for id in ids) and len(set(ids)) == 2
    text = write("kimi_k2", Turn(calls=[("search.web-2", {})]))
    assert parse("kimi_k2", text)[0][0] == CallBegin(0, "functions.search.web-2:0", "search.web-2")
    text = "[TOOL_CALLS]f[CALL_ID]a1B2c3D4e[ARGS]{}"
    assert parse("mistral", text)[0][0] == CallBegin(0, "a1B2c3D4e", "f")


def test_thoughts_end_at_a_call_only_if_its_mark_is_a_special_token():
    call = write("kimi_k2", Turn(calls=[("get_weather", {})]))
    events, _ = parse("kimi_k2", f"hm {call}", in_thoughts=True)
    assert joined(events) == Turn("hm", "", [("get_weather", "{}")])
    call = write("hermes", Turn(calls=[("get_weather", {})]))
    assert joined(parse("hermes", f"hm {call}", in_thoughts=True)[0]) == Turn(f"hm {call}")


def test_special_tokens_are_not_visible():
    events, _ = parse("kimi_k2", "a <|im_end|>b<|im_end|>")
    assert joined(events).text == "a b"


def test_a_mark_of_thoughts_in_the_text_is_text():
    events, _ = parse("hermes", "The tag <think> begins thoughts, </think> ends them.")
    assert joined(events) == Turn("", "The tag <think> begins thoughts, </think> ends them.")


def test_json_that_is_no_call_is_text():
    for text in ('{"city": "Paris"}', '{"name": "Paul", "parameters": {}}', " {", "{}"):
        events, parser = parse("llama3_json", text)
        assert joined(events) == Turn("", text) and parser.malformed == 0
    for text in ("[1, 2]", "[get_weather", "[Paris(x=1)]"):
        assert joined(parse("pythonic", text)[0]) == Turn("", text)


def test_messages_of_one_kind_are_lines():
    text = "<|channel|>analysis<|message|>one<|end|><|start|>assistant" * 2
    text += "<|channel|>final<|message|>two<|return|>"
    assert joined(parse("gpt_oss", text)[0]) == Turn("one\none", "two")


def test_an_answer_without_channels_is_text():
    assert joined(parse("gpt_oss", "Hello")[0]) == Turn("", "Hello")
    assert joined(parse("gpt_oss", "Hello " * 100)[0]) == Turn("", "Hello " * 99 + "Hello")


def test_thinking_is_told_on_the_way():
    chosen = format_of("hermes")
    parser = chosen.parser(TOOLS, False, [])
    parser.feed("<think>a")
    assert parser.in_thoughts
    assert parser.feed("</think>b") == [Text("b")] and not parser.in_thoughts
    parser = format_of("hermes").parser(TOOLS, True, [])
    assert parser.feed("\nhm ") == [Reasoning("hm")] and parser.in_thoughts

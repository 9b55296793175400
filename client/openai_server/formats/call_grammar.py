"""Grammars of calls, in the spelling of a format, whose arguments keep to the tools' schemas."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gllm_client.openai_server.conversation import Tool
from gllm_client.openai_server.errors import ApiError, invalid
from gllm_client.openai_server.formats.channels import CALL_HEADERS, FINAL_HEADER
from gllm_client.openai_server.formats.grammar import TEXT, Grammar
from gllm_client.openai_server.formats.quoted import Unquotable, quote
from gllm_client.openai_server.formats.table import Spelling
from gllm_client.openai_server.formats.values import choices, definition, types_of

Lead = Callable[[str], str]  # the part of a text that begins calls

_ANY_KEY = r'/[^<>"\n]{1,200}/'
_NUMBER = r"-?(0|[1-9][0-9]*)(\.[0-9]+)?(e[+-]?[0-9]+)?"
_CHARACTER = r"[^%s\\\n]|\\[\\'\"abfnrtv]|\\x[0-9a-f]{2}|\\u[0-9a-f]{4}|\\U[0-9a-f]{8}"
_PYTHON = (
    "gllm_value: GLLM_STRING | GLLM_WORD | gllm_list | gllm_dict\n"
    'gllm_list: "[" (gllm_value (", " gllm_value)*)? "]"\n'
    'gllm_dict: "{" (gllm_pair (", " gllm_pair)*)? "}"\n'
    'gllm_pair: GLLM_STRING ": " gllm_value\n'
    f"GLLM_WORD: /True|False|None|{_NUMBER}/\n"
    f"GLLM_STRING: /'({_CHARACTER % chr(39)})*'|\"({_CHARACTER % chr(34)})*\"/"
)
_PYTHON_TYPES = {
    "string": "GLLM_STRING",
    "integer": "/-?(0|[1-9][0-9]*)/",
    "number": f"/{_NUMBER}/",
    "boolean": "/True|False/",
    "null": '"None"',
    "array": "gllm_list",
    "object": "gllm_dict",
}


class CallGrammar:
    """`is_required`: the answer is calls; else it is free text in which a call keeps to its schema.

    Without `is_required`, only the arguments of strict tools are more than an object.
    """

    def __init__(
        self, grammar: Grammar, spelling: Spelling, tools: Sequence[Tool], is_required: bool
    ) -> None:
        self._grammar = grammar
        self._spelling = spelling
        self._tools = tools
        self._is_required = is_required
        if spelling.kind == "pythonic":
            grammar.add(_PYTHON)
        is_bare = spelling.bare and spelling.kind == "json"
        for tool in tools if spelling.bare else ():
            if tool.grammar is not None and not (is_bare and tool.is_regex):
                raise _unenforced(tool, "it in the calls of this model's format")

    def calls(self, parallel: bool) -> str:
        """The part for one call, or for one or more if `parallel`."""
        spelling = self._spelling
        grammar = self._grammar
        if spelling.kind == "channels":
            return self._each(self._message)
        in_list = spelling.is_list or spelling.kind == "pythonic"
        head = "[" * in_list
        tail = "]" * in_list
        between = ", " if in_list else spelling.between
        if spelling.is_list:
            head = spelling.begin + head
        if spelling.section[0] and not spelling.single:
            head = spelling.section[0]
            tail = spelling.section[1]
        one = self._each(lambda tool: self._call(tool, grammar.text if head else self._lead))
        more = f"({grammar.text(between)} {one})*" if parallel else ""
        if not head and not self._is_required:
            more = ""  # what stands between calls is text
        return f"{self._lead(head)} {one} {more} {grammar.text(tail)}"

    def answer(self, parallel: bool) -> str:
        """The part for free text in which calls keep to their schemas."""
        calls = self.calls(parallel)
        if self._spelling.kind == "channels":
            return f"{calls} | {self._grammar.text(FINAL_HEADER)} {TEXT}"
        if self._spelling.bare:
            return rf"{calls} | /([ \n\t]*[^ \n\t\{self._spelling.bare}](.|\n)*)?/"
        return f"({calls})* {TEXT}" if parallel else f"{calls} | {TEXT}"

    def _lead(self, text: str) -> str:
        """The text that begins calls, after any other text if that may come before."""
        triggers = self._spelling.triggers
        if self._is_required or not triggers or not text.startswith(triggers[0]):
            return self._grammar.text(text)
        rest = self._grammar.text(text[len(triggers[0]) :])
        return f"{self._grammar.until(triggers[0])} {rest}"

    def _each(self, spell: Callable[[Tool], str]) -> str:
        return self._grammar.either([spell(tool) for tool in self._tools])

    def _schema(self, tool: Tool) -> dict[str, Any]:
        return tool.parameters if self._is_required or tool.strict else {}

    def _object(self, tool: Tool) -> str:
        if tool.grammar is not None and not tool.is_regex:
            try:
                grammar = quote(tool.grammar)
            except Unquotable as error:
                raise _unenforced(tool, f"{error} within JSON") from None
            head = self._grammar.text('{"input": "')
            return f'{head} {self._grammar.nested(grammar)} "\\"}}"'
        return self._grammar.json({"type": "object"} | self._schema(tool), tool.strict)

    def _message(self, tool: Tool) -> str:
        heads = [self._grammar.text(header % tool.name) for header in CALL_HEADERS]
        return f"({' | '.join(heads)}) {self._object(tool)}"

    def _call(self, tool: Tool, lead: Lead) -> str:
        spelling = self._spelling
        text = self._grammar.text
        begin = (spelling.section[0] if spelling.single else "") + spelling.begin
        end = spelling.end + (spelling.section[1] if spelling.single else "")
        if spelling.kind == "json":
            head = json.dumps({"name": tool.name}, ensure_ascii=False)[:-1]
            head += f', "{spelling.arguments_key}": '
            if spelling.bare:
                return self._bare(tool)
            if spelling.is_list:
                return f'{text(head)} {self._object(tool)} "}}"'
            return f"{lead(begin + head)} {self._object(tool)} {text('}' + end)}"
        if spelling.kind == "named":
            name = f"functions.{tool.name}:" if spelling.numbered else tool.name
            number = "/[0-9]{1,6}/ " if spelling.numbered else ""
            head = f"{lead(begin + name)} {number}{text(spelling.name_end)}"
            return f"{head} {self._object(tool)} {text(end)}"
        if spelling.kind == "tagged":
            arguments = " ".join(self._tagged(tool))
            return f"{lead(begin + tool.name + spelling.name_end)} {arguments} {text(end)}"
        return f"{text(tool.name + '(')} {self._python(tool)} {json.dumps(')')}"

    def _bare(self, tool: Tool) -> str:
        """A call that is JSON alone, so that llguidance can choose between it and other JSON."""
        arguments = {"type": "object"} | self._schema(tool)
        properties = {"name": {"const": tool.name}, self._spelling.arguments_key: arguments}
        schema = {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
        return self._grammar.json(_rooted(schema, arguments), tool.strict)

    def _arguments(self, tool: Tool) -> Iterator[tuple[str, bool]]:
        """Names of arguments in the schema's order, and whether they must be given."""
        schema = self._schema(tool)
        properties = schema.get("properties")
        required = schema.get("required")
        for name in properties if isinstance(properties, dict) else ():
            yield name, isinstance(required, list) and name in required

    def _tagged(self, tool: Tool) -> Iterator[str]:
        spelling = self._spelling
        schema = self._schema(tool)
        if tool.grammar is not None:
            (key,) = schema["properties"]
            head, *_ = (mark for mark, kind in spelling.key_ends.items() if kind != "json")
            begin = self._grammar.text(spelling.key_begin + key + head + spelling.value_begin)
            end = self._grammar.text(spelling.value_end)
            yield f"{begin} {self._grammar.nested(tool.grammar)} {end}"
            return
        for name, is_required in self._arguments(tool):
            values = self._tagged_values(definition(schema, name), schema, tool.strict)
            head = self._grammar.text(spelling.key_begin + name)
            yield f"{head} ({values})" if is_required else f"({head} ({values}))?"
        if not schema.get("properties") and schema.get("additionalProperties") is not False:
            values = self._tagged_values({}, {}, tool.strict)
            yield f"({self._grammar.text(spelling.key_begin)} {_ANY_KEY} ({values}))*"

    def _tagged_values(self, schema: Any, root: Any, strict: bool) -> str:
        """Alternatives for the end of a key, its value and the value's end."""
        spelling = self._spelling
        types = types_of(schema, root)
        is_text = not types or "string" in types
        found = []
        for mark, kind in spelling.key_ends.items():
            head = mark + spelling.value_begin
            if is_text and kind != "json":
                found += self._tagged_texts(head, schema, strict)
            elif kind != "string" and types != {"string"}:
                value = self._grammar.json(_rooted(schema, root), strict)
                end = self._grammar.text(spelling.value_end)
                found.append(f"{self._grammar.text(head)} {value} {end}")
        return " | ".join(found)

    def _tagged_texts(self, head: str, schema: Any, strict: bool) -> list[str]:
        end = self._spelling.value_end
        if listed := choices(schema):
            texts = [value if isinstance(value, str) else json.dumps(value) for value in listed]
            return [self._grammar.text(head + text + end) for text in texts]
        pattern = schema.get("pattern") if isinstance(schema, dict) else None
        if isinstance(pattern, str):
            value = self._grammar.matching(pattern, end)
        elif strict and '"pattern"' in json.dumps(schema):
            told = json.dumps(schema)[:200]
            raise invalid("tools", f"this server cannot enforce one of the patterns in {told}")
        else:
            value = self._grammar.until(end)
        return [f"{self._grammar.text(head)} {value}"]

    def _python(self, tool: Tool) -> str:
        """The part for arguments as Python writes them, with commas between the given ones."""
        schema = self._schema(tool)
        arguments = list(self._arguments(tool))
        if not arguments:
            pair = '/[A-Za-z_][A-Za-z0-9_]{0,99}/ "=" gllm_value'
            is_closed = schema.get("additionalProperties") is False
            return '""' if is_closed else f'({pair} (", " {pair})*)?'
        first = '""'
        later = '""'
        for name, is_required in reversed(arguments):
            values = self._python_values(definition(schema, name), schema)
            part = f"{json.dumps(name + '=')} ({values})"
            only = f"{part} {later}" if is_required else f"{part} {later} | {first}"
            after = f'", " {part} {later}' if is_required else f'", " {part} {later} | {later}'
            first = self._grammar.rule(only)
            later = self._grammar.rule(after)
        return first

    def _python_values(self, schema: Any, root: Any) -> str:
        if listed := choices(schema):
            return " | ".join(json.dumps(repr(value)) for value in listed)
        types = types_of(schema, root)
        return (
            " | ".join(_PYTHON_TYPES.get(name, "gllm_value") for name in sorted(types))
            or "gllm_value"
        )


def _unenforced(tool: Tool, what: str) -> ApiError:
    return invalid("tools", f"the grammar of {tool.name}: this server cannot enforce {what}")


def _rooted(schema: Any, root: Any) -> Any:
    """A part of a schema with the definitions that it may refer to."""
    kept = {key: root[key] for key in ("$defs", "definitions") if key in root}
    return kept | schema if isinstance(schema, dict) else schema

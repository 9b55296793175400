"""Which format a model writes, and what a request makes of it: parser and grammar."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gllm_client.openai_server.conversation import Conversation, Tool
from gllm_client.openai_server.errors import invalid
from gllm_client.openai_server.formats import channels
from gllm_client.openai_server.formats.call_grammar import CallGrammar
from gllm_client.openai_server.formats.grammar import GAP, TEXT, Grammar
from gllm_client.openai_server.formats.parser import OutputParser
from gllm_client.openai_server.formats.table import (
    CHANNELS,
    NONE,
    THOUGHTS,
    TOOLS,
    Spelling,
    Thoughts,
)


@dataclass(frozen=True, slots=True)
class Format:
    """`tool_format`, `reasoning_format`: names of the tables, or "none".

    `special_tokens`: the ids of the model's, by their texts.
    """

    tool_format: str
    reasoning_format: str
    special_tokens: Mapping[str, int]

    @property
    def spelling(self) -> Spelling | None:
        return TOOLS.get(self.tool_format)

    @property
    def thoughts(self) -> Thoughts | None:
        return THOUGHTS.get(self.reasoning_format)

    @property
    def needs_special_tokens(self) -> bool:
        """Whether the text must be asked for with its special tokens."""
        return any(token in mark for mark in self._marks() for token in self.special_tokens)

    def _marks(self) -> Iterable[str]:
        if self.tool_format == CHANNELS:
            yield from channels.MARKS
        if self.thoughts:
            yield self.thoughts.begin
            yield self.thoughts.end
        if self.spelling:
            yield from self.spelling.marks

    def in_thoughts(self, prompt_text: str) -> bool:
        """Whether the prompt ends inside thoughts, so that the answer begins with them."""
        begin = channels.THOUGHTS_HEADER if self.tool_format == CHANNELS else ""
        ends: tuple[str, ...] = (channels.END,)
        if self.thoughts:
            begin = self.thoughts.begin
            ends = (self.thoughts.end,)
        start = prompt_text.rfind(begin) if begin else -1
        if start < 0:
            return False
        rest = prompt_text[start + len(begin) :]
        # What a user wrote about thoughts is followed by the marks of the next turn.
        return not any(mark in rest for mark in (*ends, *self.special_tokens))

    def parser(
        self,
        tools: Sequence[Tool],
        in_thoughts: bool,
        special_tokens: Sequence[str],
        parallel: bool = True,
    ) -> OutputParser:
        """The parser of one answer.

        Without `tools`, marks of calls are text. `special_tokens`: the model's; they are dropped
        from the visible text if it is asked for with them. `parallel` false: calls after the first
        are dropped.
        """
        special = special_tokens if self.needs_special_tokens else ()
        return OutputParser(self.spelling, self.thoughts, tools, in_thoughts, special, parallel)

    def constraint(self, conversation: Conversation, in_thoughts: bool) -> dict[str, Any] | None:
        """The sampling parameter structured_outputs that enforces what the request demands.

        Raises ApiError for demands that cannot be met.
        """
        choice = conversation.tool_choice
        tools = () if choice.kind == "none" else conversation.tools
        is_required = choice.forces_a_call
        if choice.kind == "named":
            tools = tuple(tool for tool in tools if tool.name == choice.name)
        if is_required and not tools:
            raise invalid("tool_choice", "no tool has this name" if choice.name else "needs tools")
        form = None if is_required else conversation.form
        if form is None and not is_required and not any(tool.strict for tool in tools):
            return None
        if tools and self.spelling is None:
            if is_required:
                raise invalid(
                    "tool_choice",
                    "the tool format of this model is unknown; name it with --tool-format",
                )
            tools = ()
        grammar = Grammar(self.special_tokens)
        body = grammar.form(form) if form else None
        if form and body is None:
            return self._unchanged(form, in_thoughts)
        if form and not tools and self.thoughts is None and self.tool_format != CHANNELS:
            return form
        if body and self.tool_format == CHANNELS:
            body = f"{grammar.text(channels.FINAL_HEADER)} ({body})"
        if tools:
            assert self.spelling is not None
            calls = CallGrammar(grammar, self.spelling, tools, is_required or body is not None)
            parallel = conversation.parallel_tool_calls
            if is_required:
                body = calls.calls(parallel)
            elif body is not None:
                body = f"{calls.calls(parallel)} | {body}"
            else:
                body = calls.answer(parallel)
        if body is None:
            return None
        return {"grammar": grammar.finish(self._after_thoughts(grammar, body, in_thoughts))}

    def _unchanged(self, form: dict[str, Any], in_thoughts: bool) -> dict[str, Any]:
        """A form that no grammar can say after thoughts."""
        is_special = self.thoughts is not None and self.thoughts.end in self.special_tokens
        is_free = form.get("structural_tag") is not None and not is_special
        if self.tool_format == CHANNELS or (in_thoughts and not is_free):
            raise invalid(
                "structured_outputs",
                "this form cannot follow the model's thoughts; give a JSON schema, a regex, "
                "choices or a Lark grammar, or turn thinking off",
            )
        return form

    def _after_thoughts(self, grammar: Grammar, body: str, in_thoughts: bool) -> str:
        if self.tool_format == CHANNELS:
            end = f"{TEXT} {grammar.text(channels.NEXT)}"
            before = f"{end} " if in_thoughts else ""
            return f"{before}({grammar.text(channels.THOUGHTS_HEADER)} {end})* ({body})"
        if self.thoughts is None:
            return body
        end = grammar.until(self.thoughts.end)
        if in_thoughts:
            return f"{end} {GAP} ({body})"
        return f"({GAP} {grammar.text(self.thoughts.begin)} {end} {GAP})? ({body})"


def choose(
    describe: Mapping[str, Any], tool_format: str | None, reasoning_format: str | None
) -> Format:
    """The format of a model: by name, else by its chat template, else by its architecture.

    `describe`: the backend's description of the model; `chat_template`, `architectures` and
    `special_tokens` are read. Raises ValueError for unknown names.
    """
    source = describe.get("chat_template") or ""
    architectures = set(describe.get("architectures") or ())
    tokens = describe.get("special_tokens") or {}
    tool = _named("tool format", tool_format, TOOLS) or _found(source, TOOLS)
    for name, spelling in TOOLS.items():
        if tool is None and architectures.intersection(spelling.architectures):
            tool = name
    reasoning = _named("reasoning format", reasoning_format, THOUGHTS)
    if CHANNELS in (tool, reasoning):
        if tool_format not in (None, CHANNELS) or reasoning_format not in (None, CHANNELS):
            raise ValueError(f"{CHANNELS} is a format of tools and of reasoning, never of one")
        return Format(CHANNELS, CHANNELS, tokens)
    if reasoning is None:
        signs = {name: marks for name, marks in THOUGHTS.items() if marks is not None}
        reasoning = _found(source, signs)
    return Format(tool or NONE, reasoning or NONE, tokens)


def _named(what: str, name: str | None, table: Mapping[str, Any]) -> str | None:
    if name is None or name in table or name == NONE:
        return name
    raise ValueError(f"the {what} {name!r} is unknown; known are {', '.join([*table, NONE])}")


def _found(source: str, table: Mapping[str, Spelling] | Mapping[str, Thoughts]) -> str | None:
    for name, marks in table.items():
        if marks.signs and all(sign in source for sign in marks.signs):
            return name
    return None

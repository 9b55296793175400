"""What a request to /v1/responses means: its JSON becomes a Conversation. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from uuid import uuid4

import msgspec

from gllm_client.openai_server import fields
from gllm_client.openai_server.body import Json, convert
from gllm_client.openai_server.chat import MAX_TOOLS, check_name, effort_variables
from gllm_client.openai_server.conversation import Conversation, Message, Tool, ToolChoice
from gllm_client.openai_server.errors import invalid
from gllm_client.openai_server.formats.grammar import regex_part
from gllm_client.openai_server.models import ServedModel
from gllm_client.openai_server.turns import (
    call_message,
    media_part,
    merge,
    read_arguments,
    text_part,
)
from gllm_client.protocol import shown

Items = list[Json]
LOGPROBS = "message.output_text.logprobs"
_HOSTED = "this server has no hosted tools, only function, custom and namespace are allowed"


class ReasoningConfig(msgspec.Struct, frozen=True):
    effort: fields.Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None  # its old name


class TextFormat(msgspec.Struct, frozen=True):
    type: Literal["text", "json_object", "json_schema"]
    schema: Json | None = None


class TextConfig(msgspec.Struct, frozen=True):
    format: TextFormat | None = None


class ResponsesRequest(fields.Common, kw_only=True, frozen=True):
    """The body of a request."""

    input: str | Items
    instructions: str | None = None
    max_output_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    store: bool = True
    previous_response_id: str | None = None
    include: list[str] = []  # but for LOGPROBS it asks for what no answer has
    tools: Items = []
    tool_choice: Literal["none", "auto", "required"] | Json = "auto"
    parallel_tool_calls: bool = True
    n: Literal[1] = 1
    reasoning: ReasoningConfig = ReasoningConfig()
    include_reasoning: bool = True
    text: Json = {}  # TextConfig, and the verbosity, which changes nothing
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] = 0
    truncation: Literal["auto", "disabled"] = "disabled"
    chat_template_kwargs: Json = {}
    metadata: dict[str, str] = {}
    # Accepted; they change nothing.
    max_tool_calls: Any = None  # of hosted tools
    client_metadata: Any = None
    stream_options: Any = None
    # Refused by name.
    background: bool = False
    conversation: Any = None
    prompt: Any = None
    moderation: Any = None
    context_management: Any = None


_REFUSED = {
    "background": "this server answers at once and has no background mode",
    "conversation": "this server has no conversations, previous_response_id continues an answer",
    "prompt": "this server has no stored prompts",
    "moderation": "this server has no moderation",
    "context_management": "this server does not compact conversations",
    "max_tokens": "its name is max_output_tokens",
    "response_format": "its name is text.format",
    "prompt_logprobs": "responses have no place for it",
    "return_token_ids": "responses have no place for them",
    "return_tokens_as_token_ids": "responses have no place for them",
}


@dataclass(frozen=True, slots=True)
class Declared:
    """A tool by the names that the client knows it by; the model knows it by `tool.name`."""

    tool: Tool
    name: str
    namespace: str | None = None


Toolbox = dict[str, Declared]  # by the model's name


def to_conversation(
    request: ResponsesRequest, model: ServedModel, earlier: Items
) -> tuple[Conversation, Toolbox]:
    """The conversation, after the items of `earlier` answers. Raises ApiError."""
    fields.check(request)
    for field, why in _REFUSED.items():
        if getattr(request, field):
            raise invalid(field, why)
    toolbox = read_tools(request.tools)
    if len(toolbox) > MAX_TOOLS:
        raise invalid("tools", f"{len(toolbox)} tools given, at most {MAX_TOOLS}")
    sampling = fields.sampling(request)
    if request.top_logprobs or LOGPROBS in request.include:
        sampling["logprobs"] = request.top_logprobs
    conversation = Conversation(
        messages=_messages(request, model, earlier),
        tools=tuple(declared.tool for declared in toolbox.values()),
        tool_choice=_read_choice(request.tool_choice, toolbox),
        parallel_tool_calls=request.parallel_tool_calls and isinstance(request.tool_choice, str),
        sampling=sampling,
        template=_template(request, model),
        max_tokens=request.max_output_tokens,
        form=_form(request),
        include_reasoning=request.include_reasoning,
        truncate_prompt_tokens=-1
        if request.truncation == "auto"
        else request.truncate_prompt_tokens,
    )
    return conversation, toolbox


def input_items(request: ResponsesRequest) -> Items:
    """The input as items; a text is a message of the user."""
    if isinstance(request.input, str):
        return [{"role": "user", "content": request.input}]
    return request.input


def listed(items: Items) -> Items:
    """The items of an input as a client may list them: with ids, the content as parts."""
    return [
        {"id": f"item_{uuid4().hex}", "type": "message"} | item | _parts(item) for item in items
    ]


def _parts(item: Json) -> Json:
    """The content of a message that is a text, as a part."""
    text = item.get("content")
    kind = "output_text" if item.get("role") == "assistant" else "input_text"
    return {"content": [{"type": kind, "text": text}]} if isinstance(text, str) else {}


def _messages(request: ResponsesRequest, model: ServedModel, earlier: Items) -> list[Message]:
    reader = _ItemReader(model)
    messages = [reader.read(item, "previous_response_id") for item in earlier]
    for index, item in enumerate(input_items(request)):
        messages.append(reader.read(item, f"input[{index}]"))
    if request.instructions:
        messages.insert(0, {"role": "system", "content": request.instructions})
    if not messages:
        raise invalid("input", "it is empty")
    return merge(messages)


def _template(request: ResponsesRequest, model: ServedModel) -> Json:
    effort = request.reasoning.effort
    variables = {} if effort is None else effort_variables(model, effort, "reasoning.effort")
    return variables | request.chat_template_kwargs


def _form(request: ResponsesRequest) -> Json | None:
    asked = convert(request.text, TextConfig, "text").format
    if asked is None or asked.type == "text":
        return request.structured_outputs
    if request.structured_outputs is not None:
        raise invalid("structured_outputs", "it and text.format exclude each other")
    if asked.type == "json_object":
        if asked.schema is not None:
            raise invalid("text.format.schema", "it goes with json_schema")
        return {"json_object": True}
    if asked.schema is None:
        raise invalid("text.format.schema", "json_schema needs it")
    return {"json": asked.schema}


# Tools


class CustomFormat(msgspec.Struct, frozen=True):
    type: Literal["text", "grammar"] = "text"
    syntax: Literal["lark", "regex"] | None = None
    definition: str | None = None


class ToolSpec(msgspec.Struct, frozen=True):
    type: str
    name: str = ""
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None
    format: CustomFormat | None = None
    tools: Items | None = None


def read_tools(tools: Items, path: str = "tools", namespace: str | None = None) -> Toolbox:
    """The tools that the model is offered. Raises ApiError."""
    toolbox: Toolbox = {}
    for index, value in enumerate(tools):
        where = f"{path}[{index}]"
        spec = convert(value, ToolSpec, where)
        if is_left_out(value):
            continue
        found = _read_tool(spec, where, namespace)
        if twice := found.keys() & toolbox.keys():
            raise invalid(f"{where}.name", f"{shown(twice.pop())} is the name of two tools")
        toolbox |= found
    return toolbox


def is_left_out(tool: Json) -> bool:
    """The web search that the Codex CLI declares unless told not to; it can do without."""
    return tool.get("type") == "web_search" and "external_web_access" in tool


def _read_tool(spec: ToolSpec, path: str, namespace: str | None) -> Toolbox:
    if spec.type not in ("function", "custom", "namespace"):
        raise invalid(f"{path}.type", f"{shown(spec.type)} is not supported: {_HOSTED}")
    check_name(f"{path}.name", spec.name)
    if spec.type == "namespace":
        if namespace is not None:
            raise invalid(f"{path}.type", "a namespace cannot hold another")
        return read_tools(spec.tools or [], f"{path}.tools", spec.name)
    name = model_name(spec.name, namespace)
    make = _function_tool if spec.type == "function" else _custom_tool
    return {name: Declared(make(name, spec, path), spec.name, namespace)}


def model_name(name: str, namespace: str | None) -> str:
    """The one name by which the model knows a tool of a namespace."""
    return f"{namespace.removesuffix('__')}__{name}" if namespace else name


def _function_tool(name: str, spec: ToolSpec, path: str) -> Tool:
    return Tool(name, spec.description or "", spec.parameters or {}, spec.strict is True)


def _custom_tool(name: str, spec: ToolSpec, path: str) -> Tool:
    """A tool that takes text: a function whose only argument is the text.

    Its grammar is enforced, and the model reads it in the description.
    """
    asked = spec.format or CustomFormat()
    text: Json = {"type": "string"}
    description = spec.description or ""
    grammar = None
    if asked.type == "grammar":
        if asked.syntax is None or asked.definition is None:
            raise invalid(f"{path}.format", "a grammar needs syntax and definition")
        description += f"\n\nThe input keeps to this {asked.syntax} grammar:\n{asked.definition}"
        grammar = asked.definition
        if asked.syntax == "regex":
            text["pattern"] = f"^(?:{grammar})$"
            grammar = f"start: {regex_part(grammar)}"
    parameters = {
        "type": "object",
        "properties": {"input": text},
        "required": ["input"],
        "additionalProperties": False,
    }
    return Tool(
        name,
        description.strip(),
        parameters,
        strict=grammar is not None,
        takes_text=True,
        grammar=grammar,
        is_regex=asked.syntax == "regex",
    )


def _read_choice(choice: str | Json, toolbox: Toolbox) -> ToolChoice:
    if isinstance(choice, dict):
        return ToolChoice("named", _chosen(choice, toolbox))
    if choice == "required" and not toolbox:
        raise invalid("tool_choice", "required needs tools")
    return ToolChoice(choice)


class ChosenTool(msgspec.Struct, frozen=True):
    type: str
    name: str = ""
    namespace: str | None = None


def _chosen(choice: Json, toolbox: Toolbox) -> str:
    chosen = convert(choice, ChosenTool, "tool_choice")
    if chosen.type not in ("function", "custom"):
        raise invalid("tool_choice.type", f"{shown(chosen.type)} is not function or custom")
    name = model_name(chosen.name, chosen.namespace)
    if name not in toolbox:
        raise invalid("tool_choice.name", f"{shown(chosen.name)} is not among tools")
    return name


# Items


class Part(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None


Content = str | list[Part] | None


class Item(msgspec.Struct, frozen=True):
    """The fields of all kinds of items that are read."""

    type: str = "message"
    role: Literal["user", "assistant", "system", "developer"] = "user"
    content: Content = None
    summary: list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: str | None = None
    input: str | None = None
    output: Content = None


_NEEDED: Mapping[str, Sequence[str]] = {
    "message": ["content"],
    "reasoning": [],
    "function_call": ["call_id", "name", "arguments"],
    "function_call_output": ["call_id", "output"],
    "custom_tool_call": ["call_id", "name", "input"],
    "custom_tool_call_output": ["call_id", "output"],
}


class _ItemReader:
    """Makes messages of items; knows the calls before, so that results find theirs."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._names: dict[str | None, str] = {}  # call id -> the function's name

    def read(self, value: Json, path: str) -> Message:
        """The message of one item. Raises ApiError."""
        item = convert(value, Item, path)
        if item.type not in _NEEDED:
            kinds = ", ".join(_NEEDED)
            raise invalid(f"{path}.type", f"{shown(item.type)} is not supported, only {kinds} are")
        for field in _NEEDED[item.type]:
            if getattr(item, field) is None:
                raise invalid(f"{path}.{field}", f"{item.type} needs it")
        return self._message(item, path)

    def _message(self, item: Item, path: str) -> Message:
        if item.type == "message":
            role = "system" if item.role == "developer" else item.role
            return {"role": role, "content": self._content(item.content, f"{path}.content")}
        if item.type == "reasoning":
            thoughts = read_text(item.content or item.summary, f"{path}.content")
            return {"role": "assistant", "content": "", "reasoning_content": thoughts}
        if item.type.endswith("_output"):
            return self._result(item, path)
        assert item.call_id is not None and item.name is not None
        name = model_name(item.name, item.namespace)
        self._names[item.call_id] = name
        if item.input is not None:
            return call_message(item.call_id, name, {"input": item.input})
        return call_message(item.call_id, name, read_arguments(item.arguments or ""))

    def _result(self, item: Item, path: str) -> Message:
        if item.call_id not in self._names:
            raise invalid(f"{path}.call_id", f"no call {shown(item.call_id)} comes before it")
        content = self._content(item.output, f"{path}.output")
        name = self._names[item.call_id]
        return {"role": "tool", "tool_call_id": item.call_id, "name": name, "content": content}

    def _content(self, content: Content, path: str) -> str | Items:
        """The text of parts, or with images the parts."""
        if not isinstance(content, list) or all(part.type != "input_image" for part in content):
            return read_text(content, path)
        parts = []
        for index, part in enumerate(content):
            where = f"{path}[{index}]"
            if part.type == "input_image":
                parts.append(media_part("image", part.image_url, where, self._model))
            else:
                parts.append(text_part(_part_text(part, where)))
        return parts


def read_text(content: Content, path: str) -> str:
    """The text of parts, one under the other. Raises ApiError for a part that is not text."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = [_part_text(part, f"{path}[{index}]") for index, part in enumerate(content)]
    return "\n".join(texts)


def _part_text(part: Part, path: str) -> str:
    text = part.refusal if part.type == "refusal" else part.text
    if text is None:
        raise invalid(f"{path}.type", f"{shown(part.type)} is not supported, only text is")
    return text

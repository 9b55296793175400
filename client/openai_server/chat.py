"""POST /v1/chat/completions: from OpenAI's JSON to a Conversation, from events to its answers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from gllm_client.openai_server import fields
from gllm_client.openai_server.body import Json, convert
from gllm_client.openai_server.conversation import Conversation, Tool, ToolChoice
from gllm_client.openai_server.errors import invalid
from gllm_client.openai_server.events import (
    CallArguments,
    CallBegin,
    End,
    Event,
    Reasoning,
    Text,
    Tokens,
)
from gllm_client.openai_server.generation import Answer, Batch, answer
from gllm_client.openai_server.logprobs import chat_logprob
from gllm_client.openai_server.models import ServedModel
from gllm_client.openai_server.turns import media_part, read_arguments, text_part
from gllm_client.openai_server.writer import Choice, Writer
from gllm_client.protocol import shown

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_TOOLS = 1024
_NAME = re.compile(r"[\w.:-]{1,128}", re.ASCII)
# Keys that the SDK's own answers have, which their users send back; they say nothing when empty.
_EMPTY_KEYS = ("refusal", "annotations", "audio", "function_call", "tool_calls")


class Function(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class FunctionTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An entry of `tools`."""

    type: Literal["function"]
    function: Function


class FunctionName(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The function of a tool_choice."""

    name: str


class NamedTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tool_choice that is an object."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(fields.Common, frozen=True, kw_only=True):
    """The body of a chat request."""

    messages: list[Json]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    tools: list[FunctionTool] = []
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
    reasoning_effort: fields.Effort | None = None
    include_reasoning: bool = True
    chat_template_kwargs: Json = {}
    documents: list[Json] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    modalities: list[Literal["text"]] = []
    add_special_tokens: Literal[False] = False
    echo: Literal[False] = False


async def begin(asked: ChatRequest, model: ServedModel, id: str) -> ChatWriter:
    """Render and check the prompt; the answer begins when it is written. Raises ApiError."""
    answered = await answer(model, to_conversation(asked, model), id)
    return ChatWriter(asked, model, answered, id)


# ------------------------------------------------------------ from JSON to a conversation


def to_conversation(asked: ChatRequest, model: ServedModel) -> Conversation:
    """Check the request's fields. Raises ApiError."""
    fields.check(asked)
    sampling = fields.sampling(asked)
    if asked.logprobs:
        sampling["logprobs"] = asked.top_logprobs
    elif asked.top_logprobs:
        raise invalid("top_logprobs", "it goes with logprobs: true")
    if not 0 <= asked.top_logprobs <= fields.MAX_TOP_LOGPROBS:
        raise invalid(
            "top_logprobs", f"{asked.top_logprobs} is outside [0, {fields.MAX_TOP_LOGPROBS}]"
        )
    tools = to_tools(asked.tools)
    limit = asked.max_completion_tokens
    return Conversation(
        messages=to_messages(asked.messages, model),
        tools=tools,
        tool_choice=_tool_choice(asked, tools),
        parallel_tool_calls=asked.parallel_tool_calls and isinstance(asked.tool_choice, str),
        sampling=sampling,
        template=_template(asked, model),
        max_tokens=asked.max_tokens if limit is None else limit,
        form=fields.form(asked),
        include_reasoning=asked.include_reasoning,
        truncate_prompt_tokens=asked.truncate_prompt_tokens,
    )


def to_tools(given: list[FunctionTool]) -> tuple[Tool, ...]:
    """The tools of a request, checked."""
    if len(given) > MAX_TOOLS:
        raise invalid("tools", f"{len(given)} tools given, at most {MAX_TOOLS}")
    tools: dict[str, Tool] = {}
    for index, entry in enumerate(given):
        path = f"tools[{index}].function.name"
        function = entry.function
        check_name(path, function.name)
        if function.name in tools:
            raise invalid(path, f"{shown(function.name)} is the name of an earlier tool")
        tools[function.name] = Tool(
            name=function.name,
            description=function.description or "",
            parameters=function.parameters or {"type": "object", "properties": {}},
            strict=bool(function.strict),
        )
    return tuple(tools.values())


def check_name(path: str, name: str) -> None:
    """Raise ApiError for what cannot be the name of a tool."""
    if not _NAME.fullmatch(name):
        allowed = "1 to 128 letters, digits, '_', '-', '.' and ':'"
        raise invalid(path, f"{shown(name)} is not valid ({allowed})")


def _tool_choice(asked: ChatRequest, tools: tuple[Tool, ...]) -> ToolChoice:
    choice = asked.tool_choice
    if isinstance(choice, NamedTool):
        name = choice.function.name
        if name not in {tool.name for tool in tools}:
            raise invalid("tool_choice.function.name", f"{shown(name)} is not among tools")
        return ToolChoice("named", name)
    if choice == "required" and not tools:
        raise invalid("tool_choice", "required needs tools")
    return ToolChoice(choice)


def _template(asked: ChatRequest, model: ServedModel) -> Json:
    given = {
        "documents": asked.documents,
        "add_generation_prompt": asked.add_generation_prompt,
        "continue_final_message": asked.continue_final_message,
    }
    variables = {name: value for name, value in given.items() if value is not None}
    if asked.add_generation_prompt and asked.continue_final_message:
        raise invalid("continue_final_message", "it cannot go with add_generation_prompt")
    if asked.documents is not None and "documents" not in model.facts["chat_template"]:
        raise invalid("documents", "this model's chat template takes none")
    if asked.reasoning_effort is not None:
        variables |= effort_variables(model, asked.reasoning_effort)
    return variables | asked.chat_template_kwargs


def effort_variables(model: ServedModel, effort: str, field: str = "reasoning_effort") -> Json:
    """The variables by which a model's chat template takes a reasoning effort."""
    source = model.facts["chat_template"]
    values = {"reasoning_effort": effort, "enable_thinking": effort != "none"}
    known = {name: value for name, value in values.items() if name in source}
    if not known and effort != "none":
        problem = "this model's chat template knows neither reasoning_effort nor enable_thinking"
        raise invalid(field, problem)
    return known


def to_messages(given: list[Json], model: ServedModel) -> list[Json]:
    """The messages as chat templates read them. Their inner form is checked by the backend."""
    if not given:
        raise invalid("messages", "the list is empty")
    roles = {} if "developer" in (model.facts["chat_template"]) else _AS_SYSTEM
    return [
        _message(f"messages[{index}]", message, roles, model) for index, message in enumerate(given)
    ]


_AS_SYSTEM = {"developer": "system"}


def _message(path: str, message: Json, roles: dict[str, str], model: ServedModel) -> Json:
    role = message.get("role")
    if role not in ROLES:
        raise invalid(f"{path}.role", f"{shown(role)} is not one of {', '.join(ROLES)}")
    empty = [key for key in _EMPTY_KEYS if key in message and not message[key]]
    checked = {key: value for key, value in message.items() if key not in empty}
    for key in ("audio", "function_call"):
        if key in checked:
            raise invalid(f"{path}.{key}", "it is not supported")
    for key in ("reasoning", "reasoning_content"):
        _text(checked.get(key) or "", f"{path}.{key}")
    refusal = checked.pop("refusal", None)
    content = message.get("content", refusal)
    if isinstance(content, list):
        content = [_part(f"{path}.content[{i}]", part, model) for i, part in enumerate(content)]
    if content is None and role == "assistant" and "tool_calls" not in checked:
        content = refusal or ""
    if role != "assistant" and not isinstance(content, str | list):
        raise invalid(f"{path}.content", f"{shown(content)} is neither text nor a list of parts")
    calls = convert(checked.get("tool_calls", []), list[Json], f"{path}.tool_calls")
    for index, call in enumerate(calls):
        function = call.get("function")
        if not isinstance(function, dict):
            raise invalid(f"{path}.tool_calls[{index}].function", "it is required")
        _text(function.get("name"), f"{path}.tool_calls[{index}].function.name")
        if isinstance(text := function.get("arguments"), str):
            function = function | {"arguments": read_arguments(text)}
            calls[index] = call | {"function": function}
    if calls:
        checked["tool_calls"] = calls
    return checked | {"role": roles.get(role, role), "content": content}


def _text(value: Any, path: str) -> None:
    if not isinstance(value, str):
        raise invalid(path, f"{shown(value)} is not text")


def _part(path: str, part: Any, model: ServedModel) -> Json:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("image_url", "video_url"):
        given = part.get(kind)
        source = given.get("url") if isinstance(given, dict) else given
        return media_part(kind.removesuffix("_url"), source, path, model)
    if kind not in ("text", "refusal"):
        problem = f"{shown(kind)} is not supported, only text, image_url and video_url"
        raise invalid(f"{path}.type", problem)
    _text(part.get(kind), f"{path}.{kind}")
    return text_part(part[kind])


# ------------------------------------------------------------ from events to JSON


class _Choice(Choice):
    """A choice of a chat. A stream needs no more of the message than which calls it has."""

    def __init__(self) -> None:
        super().__init__()
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[CallBegin] = []
        self.arguments: list[list[str]] = []

    def message(self) -> Json:
        content = "".join(self.content)
        message: Json = {
            "role": "assistant",
            "content": content if content or not self.calls else None,
            "refusal": None,
        }
        if self.reasoning:
            message |= _thoughts("".join(self.reasoning))
        if self.calls:
            pairs = zip(self.calls, self.arguments, strict=True)
            message["tool_calls"] = [_call(call, "".join(parts)) for call, parts in pairs]
        return message

    def take(self, event: Event) -> None:
        """Keep a part of the message."""
        match event:
            case Text(text):
                self.content.append(text)
            case Reasoning(text):
                self.reasoning.append(text)
            case CallBegin():
                self.calls.append(event)
                self.arguments.append([])
            case CallArguments(index, text):
                self.arguments[index].append(text)


def _thoughts(text: str) -> dict[str, str]:
    """Thoughts under vLLM's and DeepSeek's names."""
    return {"reasoning": text, "reasoning_content": text}


def _call(begin: CallBegin, arguments: str = "") -> Json:
    function = {"name": begin.name, "arguments": arguments}
    return {"id": begin.id, "type": "function", "function": function}


def _delta(event: Event) -> Json:
    match event:
        case Text(text):
            return {"content": text}
        case Reasoning(text):
            return _thoughts(text)
        case CallBegin(index):
            return {"tool_calls": [{"index": index} | _call(event)]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
    return {}


class ChatWriter(Writer[Batch]):
    """Writes the answer to a chat request. A part: the events of one response of Triton."""

    def __init__(self, asked: ChatRequest, model: ServedModel, answered: Answer, id: str) -> None:
        about = {"id": f"chatcmpl-{id}", "model": model.name}
        kinds = ("chat.completion", "chat.completion.chunk")
        super().__init__(asked, about, kinds, answered.num_prompt_tokens, answered.batches())
        self._asked = asked
        self._answer = answered
        self._choices = [_Choice() for _ in range(asked.n)]

    async def whole(self) -> Json:
        body = await super().whole()
        if self._asked.prompt_logprobs is not None:
            body["prompt_logprobs"] = self._answer.prompt_logprobs
        if self._asked.return_token_ids:
            body["prompt_token_ids"] = self._answer.prompt_ids
        return body

    def _written(self) -> list[Json]:
        return [
            {"index": index, "message": choice.message()} | self._rest(choice)
            for index, choice in enumerate(self._choices)
        ]

    def _take(self, batch: Batch) -> None:
        for index, event in batch:
            choice = self._choices[index]
            self._note(choice, event)
            choice.take(event)

    def _numbered(self, batch: Batch) -> Iterator[tuple[int, Json]]:
        for index, event in batch:
            choice = self._choices[index]
            if not choice.started:
                choice.started = True
                role = {"role": "assistant", "content": ""}
                yield index, {"delta": role} | self._rest(_Choice())
            self._note(choice, event)
            if isinstance(event, Tokens):
                continue
            if isinstance(event, CallBegin):
                choice.calls.append(event)
            yield index, {"delta": _delta(event)} | self._rest(choice)
            choice.logprobs = []
            choice.token_ids = []

    def _note(self, choice: _Choice, event: Event) -> None:
        """Keep what is beside the message."""
        if isinstance(event, Tokens):
            self._usage.num_prompt = self._answer.num_prompt_tokens
            self._usage.num_cached = self._answer.num_cached_tokens
            self._usage.add(event)
            if self._asked.return_token_ids:
                choice.token_ids += event.ids
            if event.logprobs is not None:
                named = self._asked.return_tokens_as_token_ids
                pairs = zip(event.ids, event.logprobs, strict=True)
                top = self._asked.top_logprobs
                choice.logprobs += [chat_logprob(id, entry, top, named) for id, entry in pairs]
        elif isinstance(event, End):
            has_calls = choice.calls and not isinstance(self._asked.tool_choice, NamedTool)
            choice.reason = "tool_calls" if event.reason == "stop" and has_calls else event.reason
            choice.stop_reason = event.stop_reason

    def _rest(self, choice: _Choice) -> Json:
        """A choice's fields beside its message or delta."""
        scored = {"content": choice.logprobs, "refusal": None} if self._asked.logprobs else None
        return self._beside(choice, scored)

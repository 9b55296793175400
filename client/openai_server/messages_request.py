"""What a request to /v1/messages means: Anthropic's JSON becomes a Conversation. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec

from gllm_client.openai_server.body import Json
from gllm_client.openai_server.chat import MAX_TOOLS, check_name
from gllm_client.openai_server.conversation import Conversation, Message, Tool, ToolChoice
from gllm_client.openai_server.errors import invalid
from gllm_client.openai_server.models import ServedModel
from gllm_client.openai_server.turns import (
    call_message,
    media_part,
    merge,
    text_part,
    thinking_variables,
)
from gllm_client.protocol import shown

# Claude Code's first line, different in every request: no prefix of its prompts would be cached.
_CHANGING_LINE = "x-anthropic-billing-header:"
_REFUSED = {
    "container": "this server runs no code",
    "mcp_servers": "this server calls no tools itself",
}
Names = dict[str | None, str]  # of functions, by the ids of their calls
# What a block needs, by its type.
_BLOCKS: dict[str, dict[str, list[str]]] = {
    "user": {"text": ["text"], "image": ["source"], "tool_result": ["tool_use_id"]},
    "system": {"text": ["text"]},
    "assistant": {
        "text": ["text"],
        "thinking": ["thinking"],
        "redacted_thinking": [],
        "tool_use": ["id", "name", "input"],
    },
}


class Source(msgspec.Struct, frozen=True):
    """Where the bytes of an image are."""

    type: Literal["base64", "url"]
    media_type: str = ""
    data: str | None = None
    url: str | None = None


class Block(msgspec.Struct, frozen=True):
    """The fields of all kinds of content blocks that are read."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[Block] | None = None
    is_error: bool | None = None
    source: Source | None = None


class InputMessage(msgspec.Struct, frozen=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class ToolSpec(msgspec.Struct, frozen=True):
    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class Choice(msgspec.Struct, frozen=True):
    type: Literal["auto", "any", "tool", "none"] = "auto"
    name: str = ""
    disable_parallel_tool_use: bool = False


class Thinking(msgspec.Struct, frozen=True):
    """`budget_tokens` is not enforced: only max_tokens limits thoughts."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"] = "disabled"
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(msgspec.Struct, frozen=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, frozen=True):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class MessagesRequest(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The body; for count_tokens only what makes the prompt counts."""

    model: str
    messages: list[InputMessage]
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    system: str | list[Block] = ""
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    tools: list[ToolSpec] = []
    tool_choice: Choice = Choice()
    thinking: Thinking = Thinking()
    output_config: OutputConfig = OutputConfig()
    output_format: OutputFormat | None = None  # the former place of output_config.format
    container: Any = None
    mcp_servers: Any = None
    # Accepted; they change nothing.
    cache_control: Any = None  # prefixes are cached without it; likewise in blocks and tools
    metadata: Any = None
    context_management: Any = None
    service_tier: Any = None
    betas: Any = None
    diagnostics: Any = None
    inference_geo: Any = None
    speed: Any = None
    user_profile_id: Any = None
    workspace_id: Any = None

    @property
    def thinks(self) -> bool:
        return self.thinking.type != "disabled"


def to_conversation(asked: MessagesRequest, model: ServedModel) -> Conversation:
    """Check the fields. Raises ApiError."""
    for field, why in _REFUSED.items():
        if getattr(asked, field):
            raise invalid(field, why)
    tools = _tools(asked.tools)
    form = asked.output_config.format or asked.output_format
    sampling = {
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": asked.top_k,
        "stop": asked.stop_sequences,
    }
    messages = _messages(asked, model)
    effort = asked.output_config.effort if asked.thinks else None
    template = thinking_variables(asked.thinks, effort, model.facts["chat_template"])
    if messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]:
        template |= {"add_generation_prompt": False, "continue_final_message": True}
    return Conversation(
        messages=messages,
        tools=tools,
        tool_choice=_tool_choice(asked.tool_choice, tools),
        parallel_tool_calls=not asked.tool_choice.disable_parallel_tool_use,
        sampling={name: value for name, value in sampling.items() if value is not None},
        template=template,
        max_tokens=asked.max_tokens,
        form={"json": form.schema} if form else None,
        include_reasoning=asked.thinks and asked.thinking.display != "omitted",
    )


def _tools(specs: list[ToolSpec]) -> tuple[Tool, ...]:
    if len(specs) > MAX_TOOLS:
        raise invalid("tools", f"{len(specs)} tools given, at most {MAX_TOOLS}")
    tools: dict[str, Tool] = {}
    for index, spec in enumerate(specs):
        path = f"tools[{index}]"
        if spec.type not in (None, "custom"):
            problem = "is not supported, only tools with an input_schema of their own are"
            raise invalid(f"{path}.type", f"{shown(spec.type)} {problem}")
        if spec.input_schema is None:
            raise invalid(f"{path}.input_schema", "it is required")
        check_name(f"{path}.name", spec.name)
        if spec.name in tools:
            raise invalid(f"{path}.name", f"{shown(spec.name)} is the name of an earlier tool")
        strict = spec.strict is True
        tools[spec.name] = Tool(spec.name, spec.description or "", spec.input_schema, strict)
    return tuple(tools.values())


def _tool_choice(choice: Choice, tools: tuple[Tool, ...]) -> ToolChoice:
    kinds = {"auto": "auto", "any": "required", "tool": "named", "none": "none"}
    if choice.type == "any" and not tools:
        raise invalid("tool_choice", "any needs tools")
    if choice.type == "tool" and choice.name not in {tool.name for tool in tools}:
        raise invalid("tool_choice.name", f"{shown(choice.name)} is not among tools")
    return ToolChoice(kinds[choice.type], choice.name)


def _messages(asked: MessagesRequest, model: ServedModel) -> list[Message]:
    if not asked.messages:
        raise invalid("messages", "the list is empty")
    system = InputMessage("system", asked.system)
    names: Names = {}
    messages = list(_blocks(system, "system", names, model)) if asked.system else []
    for index, message in enumerate(asked.messages):
        messages += _blocks(message, f"messages[{index}].content", names, model)
    return merge(messages)


def _blocks(
    message: InputMessage, path: str, names: Names, model: ServedModel
) -> Iterator[Message]:
    """A message for each block, tool results first, as they follow their calls."""
    if isinstance(message.content, str):
        yield {"role": message.role, "content": message.content}
        return
    if not message.content:
        raise invalid(path, "the list is empty")
    numbered = enumerate(message.content)
    for index, block in sorted(numbered, key=lambda pair: pair[1].type != "tool_result"):
        needed = _BLOCKS[message.role].get(block.type)
        where = f"{path}[{index}]"
        if needed is None:
            allowed = ", ".join(_BLOCKS[message.role])
            problem = f"is not supported in a {message.role} message, only {allowed}"
            raise invalid(f"{where}.type", f"{shown(block.type)} {problem}")
        for field in needed:
            if getattr(block, field) is None:
                raise invalid(f"{where}.{field}", "it is required")
        yield _message(message.role, block, where, names, model)


def _message(role: str, block: Block, path: str, names: Names, model: ServedModel) -> Message:
    match block.type:
        case "thinking":
            return {"role": role, "content": "", "reasoning_content": block.thinking}
        case "tool_use":
            names[block.id] = block.name or ""
            return call_message(block.id or "", block.name or "", block.input or {})
        case "tool_result":
            if block.tool_use_id not in names:
                problem = f"no tool_use {shown(block.tool_use_id)} comes before it"
                raise invalid(f"{path}.tool_use_id", problem)
            content = _result(block, f"{path}.content", model)
            name = names[block.tool_use_id]
            return {
                "role": "tool",
                "tool_call_id": block.tool_use_id,
                "name": name,
                "content": content,
            }
        case "image":
            return {"role": role, "content": [_image(block, path, model)]}
    is_kept = block.type == "text" and not (block.text or "").startswith(_CHANGING_LINE)
    return {"role": role, "content": block.text if is_kept else ""}


def _image(block: Block, path: str, model: ServedModel) -> Json:
    source = block.source or Source("url")
    url = source.url
    if source.type == "base64" and source.data is not None:
        url = f"data:{source.media_type};base64,{source.data}"
    return media_part("image", url, path, model)


def _result(block: Block, path: str, model: ServedModel) -> str | list[Json]:
    """The text of a result, or with images its parts."""
    given = [Block("text", block.content)] if isinstance(block.content, str) else block.content
    texts = []
    images = []
    for index, part in enumerate(given or []):
        where = f"{path}[{index}]"
        if part.type == "image":
            images.append(_image(part, where, model))
        elif part.type != "text" or part.text is None:
            problem = f"{shown(part.type)} is not supported, only text and image"
            raise invalid(f"{where}.type", problem)
        else:
            texts.append(part.text)
    text = ("Error: " if block.is_error else "") + "\n".join(texts)
    return [text_part(text), *images] if images else text

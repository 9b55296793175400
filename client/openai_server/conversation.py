"""What a chat request means, independent of the API that it came by.

chat.py, responses.py and messages.py make a Conversation from their JSON; generation.py answers it
with events. Both sides depend on this module alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gllm_client.openai_server.body import Json

Message = Json  # role, content, tool_calls, ... as the model's chat template reads them


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str = ""
    parameters: Json = field(default_factory=dict)  # a JSON schema of one object
    strict: bool = False  # arguments must keep to the schema, so decoding is constrained
    # For tools whose input is text, held by the only argument: the text's Lark grammar, or None.
    takes_text: bool = False
    grammar: str | None = None
    is_regex: bool = False  # then the schema has it too, as a pattern

    def for_template(self) -> Json:
        """The tool in the form that chat templates expect."""
        function: Json = {"name": self.name, "parameters": self.parameters}
        if self.description:
            function["description"] = self.description
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """`kind`: "none", "auto", "required" (any tool, at least one) or "named" (the tool `name`)."""

    kind: str = "auto"
    name: str = ""

    @property
    def forces_a_call(self) -> bool:
        return self.kind in ("required", "named")


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat request whose fields have been checked.

    `sampling`: Triton's sampling parameters, n among them. `template`: variables of the chat
    template, such as enable_thinking. `max_tokens` None: to the end of the model's length.
    `form`: structured outputs for the visible answer, in the form of the sampling parameter
    structured_outputs; thoughts stay free.
    """

    messages: list[Message]
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    parallel_tool_calls: bool = True
    sampling: Json = field(default_factory=dict)
    template: Json = field(default_factory=dict)
    max_tokens: int | None = None
    form: Json | None = None
    include_reasoning: bool = True
    truncate_prompt_tokens: int | None = None

"""What answers a body, by the path of its route: the same for a server and for a batch's lines."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from gllm_client.openai_server import chat, completions
from gllm_client.openai_server.fields import Common
from gllm_client.openai_server.models import ServedModel
from gllm_client.openai_server.writer import Writer

# The type of the body, and what begins the answer for a model and a request's id.
Endpoint = tuple[type[Common], Callable[[Any, ServedModel, str], Awaitable[Writer[Any]]]]

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
ENDPOINTS: Mapping[str, Endpoint] = {
    CHAT: (chat.ChatRequest, chat.begin),
    COMPLETIONS: (completions.CompletionRequest, completions.begin),
}

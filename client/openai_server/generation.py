"""Answers a Conversation: renders the prompt, asks tritonserver, turns its text into events.

    answer = await generation.answer(model, conversation, request_id)   # ApiError: a status
    async with aclosing(answer) as events:
        async for index, event in events:                               # ApiError: mid-stream

Closing the answer, or cancelling the task that iterates, cancels the Triton request.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from gllm_client.openai_server.conversation import Conversation
from gllm_client.openai_server.events import Event
from gllm_client.openai_server.models import ServedModel


class Answer:
    """A request under way: an async iterator of (choice, event).

    The events of one choice are in order and end with End; the n choices interleave.
    """

    def __init__(self, prompt_ids: list[int], prompt_text: str) -> None:
        self.prompt_ids = prompt_ids
        self.prompt_text = prompt_text  # with special tokens
        self.num_cached_tokens = 0  # of the prompt; known when the first event comes

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        raise NotImplementedError

    def batches(self) -> AsyncIterator[list[tuple[int, Event]]]:
        """The events by the Triton responses that brought them; never an empty list."""
        raise NotImplementedError

    async def aclose(self) -> None:
        """Cancel what has not ended."""
        raise NotImplementedError


async def answer(model: ServedModel, conversation: Conversation, request_id: str) -> Answer:
    """Render and check the prompt, and send the request.

    Raises ApiError. The Triton request begins with the first iteration; its refusal (a full queue)
    is raised by that.
    """
    raise NotImplementedError


async def count_tokens(model: ServedModel, conversation: Conversation) -> int:
    """The length of the prompt that `answer` would send. Raises ApiError."""
    raise NotImplementedError

"""Answers a Conversation: renders the prompt, asks tritonserver, turns its text into events.

    answer = await generation.answer(model, conversation, request_id)   # ApiError: a status
    async with aclosing(answer) as events:
        async for index, event in events:                               # ApiError: mid-stream

Closing the answer, or cancelling the task that iterates, cancels the Triton request.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection
from contextlib import aclosing
from typing import Any

from gllm_client import Chunk, Output
from gllm_client.openai_server.conversation import Conversation
from gllm_client.openai_server.errors import ApiError, as_given, invalid
from gllm_client.openai_server.events import (
    CallArguments,
    CallBegin,
    End,
    Event,
    Reasoning,
    Text,
    Tokens,
)
from gllm_client.openai_server.formats.parser import OutputParser
from gllm_client.openai_server.models import ServedModel
from gllm_client.openai_server.turns import Media, without_media

Batch = list[tuple[int, Event]]  # of each event its choice


class Answer:
    """A request under way: an async iterator of (choice, event).

    The events of one choice are in order and end with End; the n choices interleave.
    """

    def __init__(
        self,
        prompt_ids: list[int],
        prompt_text: str,
        chunks: AsyncGenerator[Chunk, None],
        choices: list[_Choice],
        form_fields: Collection[str] = (),
    ) -> None:
        self.prompt_ids = prompt_ids  # with one token for each image
        self.num_prompt_tokens = len(prompt_ids)  # with images: known when the first event comes
        self.prompt_text = prompt_text  # with special tokens
        self.num_cached_tokens = 0  # of the prompt; known when the first event comes
        self.prompt_logprobs: list[Any] | None = None  # likewise, if requested
        self._chunks = chunks
        self._choices = choices
        self._form_fields = form_fields  # which the structured outputs are of, if that is known

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        async for batch in self.batches():
            for numbered in batch:
                yield numbered

    async def batches(self) -> AsyncGenerator[Batch, None]:
        """The events by the Triton responses that brought them; never an empty list.

        Closing the generator cancels what has not ended.
        """
        try:
            async with aclosing(self._chunks) as chunks:
                async for chunk in chunks:
                    self.num_cached_tokens = chunk.num_cached_tokens or self.num_cached_tokens
                    self.num_prompt_tokens = chunk.num_input_tokens or self.num_prompt_tokens
                    self.prompt_logprobs = chunk.prompt_logprobs or self.prompt_logprobs
                    batch: Batch = []
                    for index, output in enumerate(chunk.outputs):
                        batch += [(index, event) for event in self._choices[index].feed(output)]
                    if batch:
                        yield batch
        except ApiError as error:
            raise as_given(error, self._form_fields) from None

    async def aclose(self) -> None:
        """Cancel what has not ended."""
        await self._chunks.aclose()


class _Choice:
    """One choice's way from Triton's outputs to events."""

    def __init__(
        self,
        parser: OutputParser,
        include_reasoning: bool,
        stops: Any,
        count_malformed: Callable[[int], None],
    ) -> None:
        self._parser = parser
        self._include_reasoning = include_reasoning
        self._stops = stops
        self._count_malformed = count_malformed
        self._thinks = parser.in_thoughts
        self._ended = False

    def feed(self, output: Output) -> list[Event]:
        if self._ended:  # the other choices go on
            return []
        events = self._parser.feed(output.text) if output.text else []
        if output.finish_reason is not None:
            self._ended = True
            events += self._parser.finish()
            self._count_malformed(self._parser.malformed)
            events.append(End(output.finish_reason, stop_reason(output, self._stops)))
        if output.token_ids:
            count = self._count_thoughts(events, len(output.token_ids))
            events.insert(0, Tokens(output.token_ids, output.logprobs, count))
        if not self._include_reasoning:
            events = [event for event in events if not isinstance(event, Reasoning)]
        return events

    def _count_thoughts(self, events: list[Event], num_tokens: int) -> int:
        """How many of the tokens are thoughts. If they bring visible text too: by its share."""
        thinks = self._thinks
        self._thinks = self._parser.in_thoughts
        thoughts = 0
        others = 0
        for event in events:
            if isinstance(event, Reasoning):
                thoughts += len(event.text)
            elif isinstance(event, Text | CallArguments):
                others += len(event.text)
            elif isinstance(event, CallBegin):
                others += max(1, len(event.name))
        if others:
            return round(num_tokens * thoughts / (thoughts + others))
        return num_tokens if thinks or thoughts else 0


def stop_reason(output: Output, stops: Any) -> str | int | None:
    """The stop string, or the id of the stop token, that ended the answer."""
    reason = output.stop_reason
    is_string = reason is None or reason in stops or not reason.isdecimal()
    return reason if is_string else int(reason)


async def answer(model: ServedModel, conversation: Conversation, request_id: str) -> Answer:
    """Render and check the prompt, and send the request.

    Raises ApiError. The Triton request begins with the first iteration; its refusal (a full queue)
    is raised by that.
    """
    ids, text, media = await render(model, conversation, request_id)
    thinks = model.format.in_thoughts(text)
    sampling = with_defaults(model, conversation.sampling)
    form = model.format.constraint(conversation, thinks)
    form_fields: Collection[str] = ()
    if form is not None:
        sampling["structured_outputs"] = form
        is_of_tools = conversation.form is None or conversation.tool_choice.forces_a_call
        form_fields = ("tools",) if is_of_tools else ()
    special: list[str] = []  # those that the text may hold
    if model.format.needs_special_tokens:
        special = list(model.format.special_tokens)
        sampling["skip_special_tokens"] = False
    sampling["max_tokens"] = limit_tokens(model, len(ids), conversation.max_tokens)
    tools = () if conversation.tool_choice.kind == "none" else conversation.tools
    stops = sampling.get("stop", ())
    choices = []
    for _ in range(sampling.get("n", 1)):
        parser = model.format.parser(tools, thinks, special, conversation.parallel_tool_calls)
        choices.append(
            _Choice(parser, conversation.include_reasoning, stops, model.count_malformed)
        )
    chunks = model.generate(ids, sampling, request_id, media)
    return Answer(ids, text, chunks, choices, form_fields)


async def count_tokens(model: ServedModel, conversation: Conversation, request_id: str = "") -> int:
    """The length of the prompt that `answer` would send. Raises ApiError."""
    ids, _, _ = await render(model, conversation, request_id, with_media=True)
    return len(ids)


async def render(
    model: ServedModel, conversation: Conversation, request_id: str, with_media: bool = False
) -> tuple[list[int], str, Media]:
    """The prompt's token ids and text, and its images and videos. Raises ApiError.

    `with_media`: these are loaded, and have all their tokens. Otherwise each has one.
    """
    messages, media = without_media(conversation.messages)
    template: dict[str, Any] = {}
    if conversation.template:
        template["chat_template_kwargs"] = conversation.template
    if conversation.tools and conversation.tool_choice.kind != "none":
        template["tools"] = [tool.for_template() for tool in conversation.tools]
    messages = conversation.messages if with_media else messages
    ids, text = await model.tokenize(request_id, messages=messages, **template)
    limit = conversation.truncate_prompt_tokens
    if limit is not None and not media:
        ids = truncate(model, ids, limit, conversation.max_tokens)
    elif limit is not None and limit != -1:
        raise invalid("truncate_prompt_tokens", "it does not go with images, which are never cut")
    return ids, text, media


def truncate(model: ServedModel, ids: list[int], limit: int, max_tokens: int | None) -> list[int]:
    """The last `limit` tokens; -1: as many as leave room for the answer."""
    if limit == -1:
        limit = max(1, model.max_model_len - (max_tokens or 1))
    return ids[-limit:]


def with_defaults(model: ServedModel, sampling: dict[str, Any]) -> dict[str, Any]:
    """Sampling parameters, completed by those of the checkpoint's generation_config.json."""
    defaults = dict(model.facts["generation_config"])
    defaults.pop("max_new_tokens", None)
    return defaults | sampling


def limit_tokens(model: ServedModel, num_prompt: int, max_tokens: int | None) -> int:
    """The most tokens that an answer may have; without `max_tokens` generation_config.json's, else
    to the end of the model's length. Raises ApiError for a prompt that is too long."""
    room = model.max_model_len - num_prompt
    if room < 1:
        raise ApiError(
            400,
            # Clients that then shorten the conversation look for these words.
            f"prompt is too long: {num_prompt} tokens > {model.max_model_len - 1}; prompt and "
            f"answer together are limited to {model.max_model_len} tokens",
            code="context_length_exceeded",
        )
    if max_tokens is None:
        max_tokens = model.facts["generation_config"].get("max_new_tokens", room)
    return min(max_tokens, room)

"""POST /v1/messages and its count_tokens: Anthropic's API, which coding agents speak."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from uuid import uuid4

import msgspec
from fastapi import APIRouter, Request, Response

from gllm_client.openai_server import generation
from gllm_client.openai_server.body import Json
from gllm_client.openai_server.errors import ApiError, invalid
from gllm_client.openai_server.events import Event
from gllm_client.openai_server.messages_request import MessagesRequest, to_conversation
from gllm_client.openai_server.parts import Part, Parts, collect, relay
from gllm_client.openai_server.routing import (
    ERROR_FORMS,
    EventStream,
    JsonResponse,
    find_model,
    read_body,
    request_id,
    sse,
)
from gllm_client.openai_server.turns import parse_object

router = APIRouter()
# Thinking blocks need a signature, which clients send back; this server signs and checks nothing.
_SIGNATURE = "unsigned"
_DELTAS = {
    "text": ("text_delta", "text"),
    "thoughts": ("thinking_delta", "thinking"),
    "call": ("input_json_delta", "partial_json"),
}
_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic_error(error: ApiError) -> Json:
    """Anthropic's error object."""
    default = "invalid_request_error" if error.status < 500 else "api_error"
    kind = _ERROR_TYPES.get(error.status, default)
    return {"type": "error", "error": {"type": kind, "message": error.message}}


ERROR_FORMS["/v1/messages"] = anthropic_error


class Run:
    """One request, from its answer's first event to the whole message."""

    def __init__(self, asked: MessagesRequest, model: str, answer: generation.Answer) -> None:
        self._asked = asked
        self._answer = answer
        self._parts = Parts()
        head = {"id": f"msg_{uuid4().hex}", "type": "message", "role": "assistant", "model": model}
        self._head = head | {"stop_reason": None, "stop_sequence": None}

    async def whole(self) -> Json:
        """The message. Raises ApiError."""
        await collect(self._answer, self._write)
        return self._message() | self._stop()

    def stream(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events."""
        return relay(self._answer, self._begin, self._write, self._end, _encode)

    def _begin(self) -> list[Json]:
        return [{"type": "message_start", "message": self._message()}, {"type": "ping"}]

    def _end(self, error: ApiError | None) -> list[Json]:
        if error is not None:
            return [anthropic_error(error)]
        delta = {"type": "message_delta", "delta": self._stop(), "usage": self._usage()}
        return [delta, {"type": "message_stop"}]

    def _message(self) -> Json:
        """The message as far as it has come."""
        content = [block(part) for part in self._parts.all]
        return self._head | {"content": content, "usage": self._usage()}

    def _write(self, event: Event) -> Iterator[Json]:
        for step in self._parts.add(event):
            index = {"index": step.part.index}
            if step.what == "begin":
                yield {"type": "content_block_start", "content_block": block(step.part)} | index
            elif step.what == "text":
                kind, field = _DELTAS[step.part.kind]
                delta = {"type": kind, field: step.text}
                yield {"type": "content_block_delta", "delta": delta} | index
            else:
                if step.part.kind == "thoughts":
                    delta = {"type": "signature_delta", "signature": _SIGNATURE}
                    yield {"type": "content_block_delta", "delta": delta} | index
                yield {"type": "content_block_stop"} | index

    def _stop(self) -> Json:
        end = self._parts.end
        assert end is not None
        limit = self._asked.max_tokens
        sequence = end.stop_reason if isinstance(end.stop_reason, str) else None
        if end.reason == "length":
            at_limit = limit is None or self._parts.num_tokens >= limit
            reason = "max_tokens" if at_limit else "model_context_window_exceeded"
        elif sequence is not None:
            reason = "stop_sequence"
        else:
            has_calls = any(part.kind == "call" for part in self._parts.all)
            reason = "tool_use" if has_calls else "end_turn"
        return {"stop_reason": reason, "stop_sequence": sequence}

    def _usage(self) -> Json:
        """Tokens of the prompt that were cached count apart from the others."""
        num_cached = self._answer.num_cached_tokens
        return {
            "input_tokens": self._answer.num_prompt_tokens - num_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": num_cached,
            "output_tokens": self._parts.num_tokens,
            "output_tokens_details": {"thinking_tokens": self._parts.num_reasoning},
        }


def block(part: Part) -> Json:
    """A content block as far as it has come."""
    text = part.text
    if part.kind == "text":
        return {"type": "text", "text": text}
    if part.kind == "thoughts":
        return {"type": "thinking", "thinking": text, "signature": _SIGNATURE if text else ""}
    assert part.call is not None
    call = {"type": "tool_use", "id": part.call.id, "name": part.call.name}
    return call | {"input": parse_object(text) or {}}  # one that is cut off is no JSON


def _encode(event: Json) -> bytes:
    return sse(msgspec.json.encode(event), event["type"])


@router.post("/v1/messages")
async def create(request: Request) -> Response:
    """Answer a request, whole or as a stream."""
    asked = await read_body(request, MessagesRequest)
    if asked.max_tokens is None:
        raise invalid("max_tokens", "it is required")
    model = await find_model(request, asked.model)
    answer = await generation.answer(model, to_conversation(asked, model), request_id(request))
    run = Run(asked, model.name, answer)
    if asked.stream:
        return EventStream(run.stream())
    return JsonResponse(await run.whole())


@router.post("/v1/messages/count_tokens")
async def count_tokens(request: Request) -> Response:
    """How many tokens the prompt of a request has."""
    asked = await read_body(request, MessagesRequest)
    model = await find_model(request, asked.model)
    return JsonResponse(
        {"input_tokens": await generation.count_tokens(model, to_conversation(asked, model))}
    )

"""POST /v1/responses: OpenAI's Responses API, and the answers that it stores.

request --responses_request--> Conversation --generation--> events --Writer--> items, stream
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Annotated, Any, Literal
from uuid import uuid4

import msgspec
from fastapi import APIRouter, Request, Response

from gllm_client.openai_server import generation
from gllm_client.openai_server.body import Json, convert, decode
from gllm_client.openai_server.errors import ApiError, invalid
from gllm_client.openai_server.events import Event
from gllm_client.openai_server.parts import Part, Parts, Step, collect, relay
from gllm_client.openai_server.response_store import ResponseStore, StoredResponse
from gllm_client.openai_server.responses_request import (
    Items,
    ResponsesRequest,
    Toolbox,
    input_items,
    is_left_out,
    listed,
    to_conversation,
)
from gllm_client.openai_server.routing import (
    EventStream,
    JsonResponse,
    find_model,
    read_body,
    request_id,
    sse,
)
from gllm_client.openai_server.turns import parse_object
from gllm_client.protocol import shown

router = APIRouter()
_ERROR_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}  # of a response that failed
_REPEATED = (
    "instructions max_output_tokens max_tool_calls previous_response_id prompt_cache_key"
    " reasoning safety_identifier temperature top_logprobs top_p user"
).split()


@dataclass(frozen=True, slots=True)
class _Form:
    """How a part of an answer is written as an output item, and streamed.

    `field`: what the item's text is called. `holder`: the item's list whose only entry, of type
    `entry`, holds the text; "" if the item holds it itself.
    """

    item: str
    id_prefix: str
    stream: str  # events response.{stream}.delta and .done
    field: str = "text"
    entry: str = ""
    holder: str = ""
    entry_stream: str = "content_part"
    index: str = "content_index"


_MESSAGE = _Form("message", "msg", "output_text", entry="output_text", holder="content")
_THOUGHTS = _Form("reasoning", "rs", "reasoning_text", entry="reasoning_text", holder="content")
_SUMMARY = _Form(
    "reasoning",
    "rs",
    "reasoning_summary_text",
    entry="summary_text",
    holder="summary",
    entry_stream="reasoning_summary_part",
    index="summary_index",
)
_CALL = _Form("function_call", "fc", "function_call_arguments", "arguments")
_CUSTOM_CALL = _Form("custom_tool_call", "ctc", "custom_tool_call_input", "input")


class Writer:
    """Makes the output items of an answer, and the stream events that tell of them.

    `summarize`: thoughts become the summary of their item instead of its content.
    """

    def __init__(self, toolbox: Toolbox, summarize: bool = False, top_logprobs: int = 0) -> None:
        self.items: Items = []
        self.parts = Parts(top_logprobs)
        self._toolbox = toolbox
        self._thoughts = _SUMMARY if summarize else _THOUGHTS
        self._form = _MESSAGE  # of the part under way
        self._fields: Json = {}  # of its item, those that do not change

    def write(self, event: Event) -> Iterator[Json]:
        """The stream events of an event, without their numbers. Read the iterator to its end."""
        for step in self.parts.add(event):
            if step.what == "begin":
                yield from self._begin(step.part)
            elif step.what == "done":
                yield from self._done(step.part)
            elif self._form is not _CUSTOM_CALL:  # its input is known when its JSON is whole
                yield self._delta(step)

    def _begin(self, part: Part) -> Iterator[Json]:
        fields: Json = {}
        if part.kind == "text":
            self._form = _MESSAGE
            fields["role"] = "assistant"
        elif part.kind == "thoughts":
            self._form = self._thoughts
            fields["summary"] = []
        else:
            fields |= self._begin_call(part)
        head = {"id": new_id(self._form.id_prefix), "type": self._form.item}
        self._fields = head | fields
        item = self._item("in_progress", "", [])
        yield {"type": "response.output_item.added", "output_index": part.index, "item": item}
        if self._form.entry:
            added = self._place("added", self._form.entry_stream, part)
            yield added | {"part": self._entry("", [])}

    def _begin_call(self, part: Part) -> Json:
        assert part.call is not None
        declared = self._toolbox.get(part.call.name)
        self._form = _CUSTOM_CALL if declared and declared.tool.takes_text else _CALL
        fields = {"call_id": part.call.id, "name": declared.name if declared else part.call.name}
        if declared and declared.namespace:
            fields["namespace"] = declared.namespace
        return fields

    def _delta(self, step: Step) -> Json:
        delta = self._place("delta", self._form.stream, step.part) | {"delta": step.text}
        if self._form is _MESSAGE:
            delta["logprobs"] = step.logprobs
        return delta

    def _done(self, part: Part) -> Iterator[Json]:
        form = self._form
        text = part.text
        if form is _CUSTOM_CALL:
            given = (parse_object(text) or {}).get("input")
            text = given if isinstance(given, str) else text
            yield self._delta(Step("text", part, text))
        done = self._place("done", form.stream, part) | {form.field: text}
        if form is _MESSAGE:
            done["logprobs"] = part.logprobs
        yield done
        if form.entry:
            entry = self._entry(text, part.logprobs)
            yield self._place("done", form.entry_stream, part) | {"part": entry}
        item = self._item("incomplete" if part.is_cut else "completed", text, part.logprobs)
        self.items.append(item)
        yield {"type": "response.output_item.done", "output_index": part.index, "item": item}

    def _place(self, what: str, stream: str, part: Part) -> Json:
        """An event's type, and where the answer changes."""
        place = {"item_id": self._fields["id"], "output_index": part.index}
        index = {self._form.index: 0} if self._form.entry else {}
        return {"type": f"response.{stream}.{what}"} | place | index

    def _entry(self, text: str, logprobs: list[Json]) -> Json:
        entry: Json = {"type": self._form.entry, "text": text}
        if self._form is _MESSAGE:
            entry |= {"annotations": [], "logprobs": logprobs}
        return entry

    def _item(self, status: str, text: str, logprobs: list[Json]) -> Json:
        form = self._form
        item = self._fields | {"status": status}
        if not form.entry:
            return item | {form.field: text}
        return item | {form.holder: [self._entry(text, logprobs)] if text else []}


def new_id(prefix: str) -> str:
    return f"{prefix}_{uuid4().hex}"


class Run:
    """One request, from its answer's first event to the whole response."""

    def __init__(
        self, request: ResponsesRequest, model: str, answer: generation.Answer, toolbox: Toolbox
    ) -> None:
        summarize = bool(request.reasoning.summary or request.reasoning.generate_summary)
        self.writer = Writer(toolbox, summarize, request.top_logprobs)
        self.settings = {"id": new_id("resp"), "model": model} | _settings(request)
        self._answer = answer
        self._number = count()

    async def whole(self) -> Json:
        """The response. Raises ApiError."""
        await collect(self._answer, self.writer.write)
        return self.response()

    def stream(self, finish: Callable[[Json], None]) -> AsyncGenerator[bytes, None]:
        """Server-sent events; `finish` gets the response, unless it failed, before they end."""

        def begin() -> list[Json]:
            return [self._state("created"), self._state("in_progress")]

        def end(error: ApiError | None) -> list[Json]:
            response = self.response(error)
            if error is None:
                finish(response)
            return [{"type": f"response.{response['status']}", "response": response}]

        return relay(self._answer, begin, self.writer.write, end, self._encode)

    def _state(self, name: str) -> Json:
        response = self.settings | {"status": "in_progress", "output": []}
        return {"type": f"response.{name}", "response": response}

    def response(self, error: ApiError | None = None) -> Json:
        """The response object at the end."""
        end = self.writer.parts.end
        ended: Json = {
            "status": "completed",
            "completed_at": int(time.time()),
            "output": self.writer.items,
            "usage": self._usage(),
        }
        if error is not None:
            code = _ERROR_CODES.get(error.status, "server_error")
            ended |= {"status": "failed", "error": {"code": code, "message": error.message}}
        elif end is not None and end.reason == "length":
            details = {"reason": "max_output_tokens"}
            ended |= {"status": "incomplete", "incomplete_details": details}
        return self.settings | ended

    def _usage(self) -> Json:
        num_prompt = self._answer.num_prompt_tokens
        parts = self.writer.parts
        cached = {"cached_tokens": self._answer.num_cached_tokens, "cache_write_tokens": 0}
        return {
            "input_tokens": num_prompt,
            "input_tokens_details": cached,
            "output_tokens": parts.num_tokens,
            "output_tokens_details": {"reasoning_tokens": parts.num_reasoning},
            "total_tokens": num_prompt + parts.num_tokens,
        }

    def _encode(self, event: Json) -> bytes:
        numbered = event | {"sequence_number": next(self._number)}
        return sse(msgspec.json.encode(numbered), event["type"])


def _settings(request: ResponsesRequest) -> Json:
    """The fields of a response that repeat the request or never change."""
    given = {name: getattr(request, name) for name in _REPEATED}
    fixed = {
        "object": "response",
        "created_at": int(time.time()),
        "background": False,
        "error": None,
        "incomplete_details": None,
        "usage": None,
        "service_tier": "default",
        "store": request.store,
        "metadata": request.metadata,
        "parallel_tool_calls": request.parallel_tool_calls,
        "text": request.text or {"format": {"type": "text"}},
        "tool_choice": request.tool_choice,
        "tools": [tool for tool in request.tools if not is_left_out(tool)],
        "truncation": request.truncation,
    }
    return given | fixed


class Page(msgspec.Struct, forbid_unknown_fields=True):
    """The query of a list of items."""

    limit: Annotated[int, msgspec.Meta(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None
    include: Any = None  # it changes nothing


def _store(request: Request) -> ResponseStore:
    store: ResponseStore = request.app.state.response_store
    return store


def _find(request: Request, id: str) -> StoredResponse | None:
    return _store(request).get((request.state.owner, id))


def _earlier(request: Request, id: str | None) -> Items:
    """The conversation that a stored answer ended. Raises ApiError."""
    if id is None:
        return []
    stored = _find(request, id)
    if stored is None:
        field = "previous_response_id"
        problem = f"{field}: no answer {shown(id)} is stored (any more): send the whole input"
        raise ApiError(400, problem, field, "previous_response_not_found")
    items: Items = msgspec.json.decode(stored.items)
    return items


@router.post("/v1/responses")
async def create(request: Request) -> Response:
    """Answer a request, whole or as a stream."""
    asked = await read_body(request, ResponsesRequest)
    store = _store(request)
    asked = msgspec.structs.replace(asked, store=asked.store and store.max_responses > 0)
    model = await find_model(request, asked.model)
    earlier = _earlier(request, asked.previous_response_id)
    conversation, toolbox = to_conversation(asked, model, earlier)
    answer = await generation.answer(model, conversation, request_id(request))
    run = Run(asked, model.name, answer, toolbox)

    def finish(response: Json) -> None:
        if asked.store:
            items = earlier + listed(input_items(asked)) + run.writer.items
            stored = StoredResponse(msgspec.json.encode(response), msgspec.json.encode(items))
            store.put((request.state.owner, response["id"]), stored)

    if asked.stream:
        return EventStream(run.stream(finish))
    response = await run.whole()
    finish(response)
    return JsonResponse(response)


@router.get("/v1/responses/{id}")
async def retrieve(request: Request, id: str) -> Response:
    """A stored response."""
    if request.query_params.get("stream", "false") != "false":
        raise invalid("stream", "a stored response cannot be streamed again")
    return Response(_stored(request, id).response, media_type="application/json")


@router.get("/v1/responses/{id}/input_items")
async def list_input(request: Request, id: str) -> Response:
    """A page of the items that a stored response answers, earlier answers' among them."""
    stored = _stored(request, id)
    asked = convert(dict(request.query_params), Page, strict=False)
    num_output = len(decode(stored.response)["output"])
    items = msgspec.json.decode(stored.items)[: -num_output or None]
    if asked.order == "desc":
        items.reverse()
    ids = [item["id"] for item in items]
    if asked.after is not None and asked.after not in ids:
        raise invalid("after", f"{shown(asked.after)} is the id of no item")
    start = ids.index(asked.after) + 1 if asked.after else 0
    end = start + asked.limit
    ends = ids[start:end] or [None]
    page = {"object": "list", "data": items[start:end], "has_more": end < len(items)}
    return JsonResponse(page | {"first_id": ends[0], "last_id": ends[-1]})


@router.delete("/v1/responses/{id}")
async def delete(request: Request, id: str) -> Response:
    """Forget a stored response."""
    _stored(request, id)
    _store(request).delete((request.state.owner, id))
    return JsonResponse({"id": id, "object": "response", "deleted": True})


@router.post("/v1/responses/{id}/cancel")
async def cancel(request: Request, id: str) -> Response:
    """Always refused."""
    _stored(request, id)
    raise ApiError(400, "only background responses can be cancelled, and this server has none")


def _stored(request: Request, id: str) -> StoredResponse:
    stored = _find(request, id)
    if stored is None:
        raise ApiError(404, f"no response {shown(id)} is stored", code="not_found")
    return stored

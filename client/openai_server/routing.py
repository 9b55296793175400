"""What all routes share: JSON bodies, errors, server-sent events, the request's id and model.

A route is `async def route(request: Request) -> Response` on an APIRouter that app.py mounts; it
raises ApiError, which becomes the answer in the form of ERROR_FORMS:

    router = APIRouter()

    @router.post("/v1/responses")
    async def create(request: Request) -> Response:
        body = await read_body(request, ResponsesRequest)
        model = await find_model(request, body.model)
        ...
        return EventStream(events)        # or JsonResponse(value)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from gllm_client.openai_server.body import convert, decode
from gllm_client.openai_server.endpoints import ENDPOINTS
from gllm_client.openai_server.errors import ApiError, openai_error
from gllm_client.openai_server.models import ServedModel
from gllm_client.protocol import shown

T = TypeVar("T")
RETRY_AFTER = {429: "1", 503: "5"}  # seconds
# Path prefix -> the form of errors under it; the longest prefix counts. Other APIs add theirs:
# ERROR_FORMS["/v1/messages"] = anthropic_error
ERROR_FORMS: dict[str, Callable[[ApiError], dict[str, Any]]] = {"": openai_error}


def error_response(path: str, error: ApiError) -> Response:
    """The answer for an error, in the form of the API that `path` belongs to."""
    prefix = max((p for p in ERROR_FORMS if path.startswith(p)), key=len)
    wait = RETRY_AFTER.get(error.status)
    headers = {"retry-after": wait} if wait else None
    return JsonResponse(ERROR_FORMS[prefix](error), error.status, headers)


async def read_body(request: Request, kind: type[T]) -> T:
    """The JSON body as a msgspec Struct; null means not given. From here on, a client that leaves
    cancels the route.

    Raises ApiError 400 (not JSON, a wrong field), 413 (too large), 415 (another content type or an
    encoding of it).
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise ApiError(415, f"content-type: application/json is expected, got {shown(media)}")
    if encoding := request.headers.get("content-encoding"):
        raise ApiError(415, f"content-encoding: {shown(encoding)} is not supported")
    body = await _read(request, request.app.state.options.max_body_size)
    request.state.watch = asyncio.create_task(_watch(request, asyncio.current_task()))
    value = decode(body)
    request.state.given = value.keys()
    return convert(value, kind)


async def _read(request: Request, limit: int) -> bytes:
    problem = ApiError(413, f"the body is larger than {limit} bytes (--max-body-size)")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > limit:
        raise problem
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise problem
    return bytes(body)


async def _watch(request: Request, task: asyncio.Task[Any] | None) -> None:
    """Cancel the route's task when its client leaves before the whole answer is sent."""
    while (await request.receive())["type"] != "http.disconnect":
        continue
    if task is not None and not request.state.answered:
        request.state.left = True
        task.cancel()


async def find_model(request: Request, name: str | None) -> ServedModel:
    """The model of that name, for the request's tenant; None: the only one.

    Raises ApiError, see Models.find.
    """
    model: ServedModel = await request.app.state.models.find(name)
    return replace(model, tenant=request.state.tenant)


async def serve_endpoint(request: Request) -> Response:
    """The route of each of ENDPOINTS: its answer, whole or as a stream."""
    kind, begin = ENDPOINTS[request.url.path]
    asked = await read_body(request, kind)
    writer = await begin(asked, await find_model(request, asked.model), request_id(request))
    if asked.stream:
        return EventStream(writer.stream())
    return JsonResponse(await writer.whole())


def request_id(request: Request) -> str:
    """The id of this request: the client's x-request-id, or a new one."""
    return str(request.state.request_id)


def sse(data: bytes, event: str = "") -> bytes:
    """One server-sent event."""
    name = b"event: %s\n" % event.encode() if event else b""
    return b"%sdata: %s\n\n" % (name, data)


class JsonResponse(Response):
    """Any value that msgspec can encode, as JSON."""

    media_type = "application/json"

    def __init__(
        self, content: Any, status_code: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(content, status_code, headers)

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


class EventStream(Response):
    """A text/event-stream of the pieces (whole events) that an async generator yields.

    The status is sent with the first piece, so an ApiError before it becomes an ordinary answer
    with its own status. Later ones the generator must turn into events itself. The generator is
    closed at the end, and when the client leaves.
    """

    media_type = "text/event-stream"

    def __init__(
        self, pieces: AsyncGenerator[bytes, None], headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache"} | (headers or {}))
        del self.headers["content-length"]
        self.pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.pieces) as pieces:
            first = await anext(pieces, b"")
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            await send({"type": "http.response.body", "body": first, "more_body": True})
            # Layers between here and the server have work with an answer's first and last message.
            send_piece = scope["state"]["send"]
            async for piece in pieces:
                await send_piece({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

"""What all routes share: JSON bodies, errors, server-sent events, the request's id and model.

A route is `async def route(request: Request) -> Response` on an APIRouter that app.py mounts; it
raises ApiError, which becomes the answer in the form of ERROR_FORMS:

    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await read_body(request, ChatRequest)
        model = await find_model(request, body.model)
        ...
        return EventStream(events)        # or JsonResponse(value)
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from fastapi import Request, Response

from gllm_client.openai_server.errors import ApiError
from gllm_client.openai_server.models import ServedModel

T = TypeVar("T")


def openai_error(error: ApiError) -> dict[str, Any]:
    """OpenAI's error object."""
    raise NotImplementedError


# Path prefix -> the form of errors under it; the longest prefix counts. Other APIs add theirs:
# ERROR_FORMS["/v1/messages"] = anthropic_error
ERROR_FORMS: dict[str, Callable[[ApiError], dict[str, Any]]] = {"": openai_error}


async def read_body(request: Request, kind: type[T]) -> T:
    """The JSON body as a msgspec Struct. From here on, a client that leaves cancels the route.

    Raises ApiError 400 (not JSON, a wrong field), 413 (too large), 415 (another content type).
    """
    raise NotImplementedError


def convert(value: Any, kind: type[T], path: str = "") -> T:
    """A JSON value as a msgspec type; its error names the field: `path`, then what is below it."""
    raise NotImplementedError


async def find_model(request: Request, name: str | None) -> ServedModel:
    """The model of that name; None: the only one. Raises ApiError 404, with code model_not_found."""
    raise NotImplementedError


def request_id(request: Request) -> str:
    """The id of this request: the client's x-request-id, or a new one."""
    raise NotImplementedError


def sse(data: bytes, event: str = "") -> bytes:
    """One server-sent event."""
    raise NotImplementedError


class JsonResponse(Response):
    """Any value that msgspec can encode, as JSON."""

    media_type = "application/json"


class EventStream(Response):
    """A text/event-stream of the pieces (whole events) that an async generator yields.

    The status is sent with the first piece, so an ApiError before it becomes an ordinary answer
    with its own status. Later ones the generator must turn into events itself. The generator is
    closed at the end, and when the client leaves.
    """

    media_type = "text/event-stream"

    def __init__(self, pieces: AsyncIterator[bytes], headers: dict[str, str] | None = None) -> None:
        super().__init__(headers=headers)
        self.pieces = pieces

"""The lines of OpenAI's batch files: what is a request, and how its answer is written.

A body is answered by the code that answers it in the OpenAI server (openai_server/endpoints.py).
Knows neither files nor the source of answers.
"""

from __future__ import annotations

from uuid import uuid4

import msgspec

from gllm_client.openai_server.body import Body, Json, convert, decode
from gllm_client.openai_server.endpoints import CHAT, ENDPOINTS
from gllm_client.openai_server.errors import ApiError, as_given, invalid, openai_error
from gllm_client.openai_server.fields import Common
from gllm_client.openai_server.models import ServedModel
from gllm_client.protocol import shorten, shown

KEYS = ("custom_id", "method", "url", "body")


class BadLine(ValueError):
    """An input line that is not a valid request; the message says why."""


def is_openai(line: Json) -> bool:
    """Whether an input line has OpenAI's form, even if it is not valid."""
    return not line.keys().isdisjoint(KEYS)


def read(line: Json) -> tuple[str, Body]:
    """The URL and the body of an input line. Raises BadLine for a line that is no request."""
    if unknown := sorted(line.keys() - set(KEYS)):
        raise BadLine(f"{shorten(unknown[0])}: unknown key; known are {', '.join(KEYS)}")
    if line.get("method") != "POST":
        raise BadLine(f"method: {shown(line.get('method'))} is not POST")
    url = line.get("url")
    if not isinstance(url, str) or url not in ENDPOINTS:
        raise BadLine(f"url: {shown(url)} is not supported; {' and '.join(ENDPOINTS)} are")
    body = line.get("body")
    if not isinstance(body, dict | bytes):
        raise BadLine("body: a JSON object is needed")
    return url, body


def read_body(url: str, body: Body, flags: Json) -> Common:
    """The request that a body is. `flags`: sampling parameters for what it does not say.

    Raises ApiError.
    """
    given = decode(body)
    defaults: Json = msgspec.to_builtins(flags, str_keys=True)
    if "response_format" in given:
        defaults.pop("structured_outputs", None)
    top = defaults.get("logprobs")
    if url == CHAT and top is not None:
        chosen = {"logprobs": True, "top_logprobs": top}
        defaults |= chosen if given.keys().isdisjoint(chosen) else {"logprobs": None}
    kind, _ = ENDPOINTS[url]
    asked = convert({name: v for name, v in (defaults | given).items() if v is not None}, kind)
    if asked.stream:
        raise invalid("stream", "a batch has no streams")
    return asked


async def answer(url: str, asked: Common, model: ServedModel) -> Json:
    """The output line of a request's answer. Raises ApiError."""
    _, begin = ENDPOINTS[url]
    try:
        writer = await begin(asked, model, uuid4().hex)
        return _response(200, await writer.whole())
    except ApiError as error:
        fields = msgspec.structs.asdict(asked).items()
        raise as_given(error, {name for name, value in fields if value}) from None


# ---------------------------------------------------------------- output lines, without custom_id


def no_request(message: str) -> Json:
    """The output line of an input line that is no request."""
    return _line(None, {"code": "invalid_line", "message": message})


def refusal(error: ApiError) -> Json:
    """The output line of a request that was refused or has failed."""
    return _response(error.status, openai_error(error))


def _response(status: int, body: Json) -> Json:
    request_id = f"req_{uuid4().hex}"
    return _line({"status_code": status, "request_id": request_id, "body": body}, None)


def _line(response: Json | None, error: Json | None) -> Json:
    return {"id": f"batch_req_{uuid4().hex}", "response": response, "error": error}

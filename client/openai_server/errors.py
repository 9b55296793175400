"""Errors of the HTTP API: a status, and the sentence that the client gets.

Each API renders an ApiError in its own form (OpenAI's error object, Anthropic's).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from typing import Any

from gllm_client.protocol import GenerateError

# The gRPC status of a failed Triton request -> HTTP status.
_STATUSES = {
    "INVALID_ARGUMENT": 400,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
    "INTERNAL": 500,
}
# A failed stream has no status (see SyncClient.with_status), so the sentence tells; the first match
# counts. Other sentences are of an engine that takes no requests now.
_SENTENCES = {
    "the queue is full": 429,
    "The KV cache holds": 400,
    "timeout: ": 504,
    "Request was cancelled": 499,
    "an internal error": 500,
    r"Request for unknown model": 404,
    r"\w[\w.\[\]]*: ": 400,  # a field and its problem
}
_ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
# The names of a prompt's tensors, which clients know by another name.
_RENAMED = {"text_input": "prompt", "input_ids": "prompt"}
# Fields of which Triton's parameters are made.
_FIELDS = {
    "structured_outputs": "response_format text output_config output_format tools",
    "max_tokens": "max_completion_tokens max_output_tokens",
    "stop": "stop_sequences",
    "prompt": "tokens",
}


class ApiError(Exception):
    """A request that is refused or has failed. `param`: the field that is wrong, if one is."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code


def invalid(param: str, problem: str) -> ApiError:
    """A field that is wrong: `param` is its path, such as "messages[0].content"."""
    return ApiError(400, f"{param}: {problem}", param)


def as_given(error: ApiError, given: Collection[str]) -> ApiError:
    """The error with the client's name for what Triton calls otherwise, or its names if it is made
    of several fields. `given`: the client's fields.
    """
    field = error.param or ""
    first = field.partition(".")[0]
    names = [name for name in _FIELDS.get(first, "").split() if name in given]
    if not names or first in given:
        return error
    return invalid(" or ".join(names), error.message.removeprefix(f"{field}: "))


def from_triton(error: GenerateError) -> ApiError:
    """The HTTP form of a Triton error."""
    # Some of the template's variables are fields here.
    sentence = re.sub(r"^chat_template_kwargs: (?=\w+: )", "", str(error))
    by_sentence = next((s for text, s in _SENTENCES.items() if re.match(text, sentence)), 503)
    status = _STATUSES.get(error.status or "", by_sentence)
    if by_sentence == 429 and status == 503:  # Triton's backends have no status for a full queue
        status = 429
    field = re.match(r"(\w[\w.\[\]]*): (.*)", sentence, re.DOTALL) if status == 400 else None
    if field is None:
        return ApiError(status, sentence)
    if sentence.startswith("prompt: its "):  # characters or tokens are too many
        problem = f"prompt is too long: {field[2]}"
        return ApiError(status, problem, "prompt", "context_length_exceeded")
    return invalid(_RENAMED.get(field[1], field[1]), field[2])


def as_api_error(error: Exception) -> ApiError:
    """The error itself, or for a fault of this program, which goes to the log, a status of 500."""
    if isinstance(error, ApiError):
        return error
    logging.getLogger("gllm.openai").error("a request failed", exc_info=error)
    return ApiError(500, "an internal error, see the server's log")


def openai_error(error: ApiError) -> dict[str, Any]:
    """OpenAI's error object."""
    default = "invalid_request_error" if error.status < 500 else "server_error"
    kind = _ERROR_TYPES.get(error.status, default)
    about = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return {"error": about}

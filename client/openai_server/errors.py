"""Errors of the HTTP API: a status, and the sentence that the client gets.

Each API renders an ApiError in its own form (OpenAI's error object, Anthropic's).
"""

from __future__ import annotations

import re

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


def from_triton(error: GenerateError) -> ApiError:
    """The HTTP form of a Triton error."""
    sentence = str(error)
    by_sentence = next((s for text, s in _SENTENCES.items() if re.match(text, sentence)), 503)
    status = _STATUSES.get(error.status or "", by_sentence)
    if by_sentence == 429 and status == 503:  # Triton's backends have no status for a full queue
        status = 429
    field = re.match(r"(\w[\w.\[\]]*): ", sentence) if status == 400 else None
    if field and sentence.startswith("prompt: its "):  # characters or tokens are too many
        problem = f"prompt is too long: {sentence.removeprefix('prompt: ')}"
        return ApiError(status, problem, "prompt", "context_length_exceeded")
    return ApiError(status, sentence, field and field[1])

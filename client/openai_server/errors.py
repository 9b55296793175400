"""Errors of the HTTP API: a status, and the sentence that the client gets.

Each API renders an ApiError in its own form (OpenAI's error object, Anthropic's).
"""

from __future__ import annotations

from gllm_client.protocol import GenerateError

# The gRPC status of a failed Triton request -> HTTP status.
_STATUSES = {
    "INVALID_ARGUMENT": 400,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
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
    return ApiError(_STATUSES.get(error.status or "", 500), str(error))

"""The door: keys, limits, request ids and the drain, before any route sees a request.

Owns the number of running requests and the rules about who gets in. Knows no route but /health.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import re
import secrets
from hashlib import sha256
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gllm_client.openai_server.errors import ApiError
from gllm_client.openai_server.routing import as_api_error, error_response

_ID = re.compile(r"[\w.:/-]{1,128}", re.ASCII)
_LOG = logging.getLogger("gllm.openai")


class Keys:
    """The API keys in a file, one a line; a blank line or one that begins with # is none.

    A change of the file counts from the next request on. While it cannot be read, or holds no key,
    the keys before the change count. Raises ValueError if the first reading fails.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._digests: list[bytes] = []
        try:
            self._read()
        except OSError as error:
            raise ValueError(f"--api-key-file: {path}: {error.strerror}") from None
        if not self._digests:
            raise ValueError(f"--api-key-file: {path} holds no key")

    def _read(self) -> None:
        status = os.stat(self._path)
        seen = (status.st_mtime_ns, status.st_size, status.st_ino)
        if seen == self._seen:
            return
        lines = [line.strip() for line in self._path.read_bytes().splitlines()]
        keys = [line for line in lines if line and not line.startswith(b"#")]
        if not keys:
            _LOG.warning("%s holds no key, the earlier keys stay", self._path)
        self._seen = seen
        self._digests = [sha256(key).digest() for key in keys] or self._digests

    def hold(self, key: str) -> bool:
        """Whether a key is among them; takes the same time for every wrong key."""
        try:
            self._read()
        except OSError as error:
            _LOG.warning("the earlier keys stay: %s", error)
        digest = sha256(key.encode("utf-8", "replace")).digest()
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


class Door:
    """Who may come in, and how many are in."""

    def __init__(self, keys: Keys | None, max_concurrency: int) -> None:
        self._keys = keys
        self._max_concurrency = max_concurrency
        self.draining = False
        self.running = 0  # POST requests that have not ended

    def check(self, scope: Scope) -> None:
        """Raise ApiError for a request that may not come in; it counts as running already."""
        if self.draining:
            raise ApiError(503, "this server is about to stop")
        keys = None if scope["path"] == "/health" else self._keys
        if keys is not None and not keys.hold(_key(scope)):
            problem = "a valid API key is required, as Authorization: Bearer KEY"
            raise ApiError(401, problem, code="invalid_api_key")
        if scope["method"] == "POST" and self.running > self._max_concurrency:
            problem = f"{self._max_concurrency} requests are running (--max-concurrency)"
            raise ApiError(429, problem, code="rate_limit_exceeded")


class Gate:
    """An ASGI application around another one, with a door."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app = app
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        given = Headers(scope=scope).get("x-request-id", "")
        state["request_id"] = given if _ID.fullmatch(given) else secrets.token_hex(16)
        state["answered"] = False
        started = False

        async def reply(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = state["request_id"]
            elif not message.get("more_body", False):
                state["answered"] = True
            await send(message)

        counted = scope["method"] == "POST"
        self._door.running += counted
        try:
            self._door.check(scope)
            await self._app(scope, receive, reply)
        except asyncio.CancelledError:
            if "left" not in state:
                raise
            _LOG.info("request %s: its client has left", state["request_id"])
        except Exception as error:
            if started:  # the connection is broken off, so that the client notices
                raise
            await error_response(scope["path"], as_api_error(error))(scope, receive, reply)
        finally:
            self._door.running -= counted
            if "watch" in state:
                state["watch"].cancel()


def _key(scope: Scope) -> str:
    """The key that a request carries, in OpenAI's header or in Anthropic's."""
    headers = Headers(scope=scope)
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")

"""The door: keys, limits, request ids and the drain, before any route sees a request.

Owns the number of running requests and the rules about who gets in. Knows no route.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import re
import secrets
from collections.abc import Collection
from hashlib import sha256
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gllm_client.openai_server.errors import ApiError, as_api_error, as_given
from gllm_client.openai_server.routing import error_response

_ID = re.compile(r"[\w.:/-]{1,128}", re.ASCII)
_LOG = logging.getLogger("gllm.openai")


class Keys:
    """The API keys in a file, one a line; a blank line or one that begins with # is none.

    A key may be followed by the name of the tenant whose key it is. A change of the file counts
    from the next request on. While it cannot be read, or holds no key, the keys before the change
    count. Raises ValueError if the first reading fails.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._tenants: dict[bytes, str] = {}  # by the key's digest
        try:
            self._read()
        except OSError as error:
            raise ValueError(f"--api-key-file: {path}: {error.strerror}") from None
        if not self._tenants:
            raise ValueError(f"--api-key-file: {path} holds no key")

    def _read(self) -> None:
        status = os.stat(self._path)
        seen = (status.st_mtime_ns, status.st_size, status.st_ino)
        if seen == self._seen:
            return
        lines = [line.split(None, 1) for line in self._path.read_bytes().splitlines()]
        keys = [words for words in lines if words and not words[0].startswith(b"#")]
        if not keys:
            _LOG.warning("%s holds no key, the earlier keys stay", self._path)
        self._seen = seen
        self._tenants = {
            sha256(key).digest(): b"".join(name).strip().decode("utf-8", "replace")
            for key, *name in keys
        } or self._tenants

    def find(self, key: str) -> tuple[str, bytes] | None:
        """The tenant of a key, "" if it has none, and the key's digest; None for a wrong key, of
        which every one takes the same time.
        """
        try:
            self._read()
        except OSError as error:
            _LOG.warning("the earlier keys stay: %s", error)
        digest = sha256(key.encode("utf-8", "replace")).digest()
        found = [known for known in self._tenants if hmac.compare_digest(digest, known)]
        return (self._tenants[digest], digest) if found else None


class Door:
    """Who may come in, and how many are in. `open_paths` need no key."""

    def __init__(
        self, keys: Keys | None, max_concurrency: int, open_paths: Collection[str]
    ) -> None:
        self._keys = keys
        self._open_paths = open_paths
        self._max_concurrency = max_concurrency
        self.draining = False
        self.running = 0  # POST requests that have not ended

    def check(self, scope: Scope) -> tuple[str, bytes]:
        """The tenant of a request that may come in, and if it has none, the digest of its key; it
        counts as running already.

        Raises ApiError for any other. Without keys, the header x-tenant names the tenant.
        """
        if self.draining:
            raise ApiError(503, "this server is about to stop")
        tenant = Headers(scope=scope).get("x-tenant", "")
        digest = b""
        if self._keys is not None and scope["path"] not in self._open_paths:
            if tenant:
                raise ApiError(400, "x-tenant: here the API key names the tenant", "x-tenant")
            found = self._keys.find(_key(scope))
            if found is None:
                problem = "a valid API key is required, as Authorization: Bearer KEY"
                raise ApiError(401, problem, code="invalid_api_key")
            tenant, digest = found
        if scope["method"] == "POST" and self.running > self._max_concurrency:
            problem = f"{self._max_concurrency} requests are running (--max-concurrency)"
            raise ApiError(429, problem, code="rate_limit_exceeded")
        return tenant, b"" if tenant else digest


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
        state["send"] = send
        started = False

        async def reply(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name in ("x-request-id", "request-id"):  # the second one is Anthropic's
                    headers[name] = state["request_id"]
            elif not message.get("more_body", False):
                state["answered"] = True
            await send(message)

        counted = scope["method"] == "POST"
        self._door.running += counted
        try:
            state["owner"] = self._door.check(scope)  # of what is stored
            state["tenant"] = state["owner"][0]
            if scope["method"] == "HEAD":  # the server keeps the answer's body to itself
                scope = {**scope, "method": "GET"}
            await self._app(scope, receive, reply)
        except (asyncio.CancelledError, ClientDisconnect) as error:
            if "left" not in state and isinstance(error, asyncio.CancelledError):
                raise
            _LOG.info("request %s: its client has left", state["request_id"])
        except Exception as error:
            if started:  # the connection is broken off, so that the client notices
                raise
            failure = as_given(as_api_error(error), state.get("given", ()))
            await error_response(scope["path"], failure)(scope, receive, reply)
        finally:
            self._door.running -= counted
            if "watch" in state:
                state["watch"].cancel()


def _key(scope: Scope) -> str:
    """The key that a request carries, in OpenAI's header or in Anthropic's."""
    headers = Headers(scope=scope)
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")

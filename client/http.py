"""A client over HTTP (Triton's generate and generate_stream), for networks without gRPC.

Owns the JSON bodies and server-sent events. Use it at a moderate rate: tritonserver's HTTP
front end can lose events when it serves many fast streams.
"""

from __future__ import annotations

import http.client
import json
import math
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from urllib.parse import quote

from gllm_client.protocol import (
    BlockingAsking,
    Chunk,
    GenerateError,
    Inputs,
    check_timeout,
    shown,
    to_chunk,
)

# Triton answers 400 for many different gRPC status codes, so 400 has no status here.
_STATUS = {404: "NOT_FOUND", 503: "UNAVAILABLE", 500: "INTERNAL", 499: "CANCELLED"}
_READ_SIZE = 65536  # bytes


def read_events(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the data of every complete server-sent event. Pieces may end anywhere."""
    rest = b""
    event = []
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            field, _, value = line.removesuffix(b"\r").partition(b":")
            if field == b"data":
                event.append(value.removeprefix(b" "))
            elif not field and not value and event:  # a blank line; ": x" is a comment
                yield b"\n".join(event)
                event = []


class HttpClient(BlockingAsking):
    """A blocking HTTP client with the methods of `SyncClient`. Every request has a connection."""

    def __init__(self, address: str = "127.0.0.1:8000", model: str | None = None) -> None:
        """`model`: the default of calls that name none. Raises ValueError for an invalid port."""
        check_port(address)
        self._address = address
        self._model = model

    def close(self) -> None:
        """Nothing is kept open between requests."""

    def _stream(
        self, model: str, inputs: Inputs, request_id: str, timeout: float | None
    ) -> Iterator[Chunk]:
        kind = "generate_stream" if inputs.get("stream") else "generate"
        body: dict[str, Any] = inputs | ({"id": request_id} if request_id else {})
        deadline = time.monotonic() + (math.inf if timeout is None else timeout)
        if timeout is not None:  # for the server too: it may not notice that the client has left
            body["timeout"] = math.ceil(timeout * 1e6)
        path = f"/v2/models/{quote(model)}/{kind}"
        with self._exchange("POST", path, body, timeout) as (answer, connected):
            if answer.getheader("Content-Type", "").partition(";")[0] != "text/event-stream":
                yield _chunk(answer.read(), answer.status, request_id)
                return
            last = None
            for event in read_events(iter(partial(_read, answer, connected, deadline), b"")):
                last = _chunk(event, answer.status, request_id)
                yield last
            if last is None or ("return_finish_reason" in inputs and not _is_final(last)):
                raise GenerateError("the stream ended before the answer did", "UNAVAILABLE")

    def is_live(self, timeout: float = 5.0) -> bool:
        """Whether a server answers."""
        return self._is("/v2/health/live", timeout)

    def is_ready(self, model: str | None = None, timeout: float = 5.0) -> bool:
        """Whether the server, or one of its models, takes requests."""
        path = "/v2/health/ready" if model is None else f"/v2/models/{quote(model)}/ready"
        return self._is(path, timeout)

    def load(self, model: str, timeout: float | None = None) -> None:
        """Load a model, or reload it if its files have changed; returns when it is ready."""
        self._ask("POST", f"/v2/repository/models/{quote(model)}/load", timeout)

    def unload(self, model: str, timeout: float | None = None) -> None:
        """Take a model out of service; returns before its running requests end."""
        self._ask("POST", f"/v2/repository/models/{quote(model)}/unload", timeout)

    def index(self, timeout: float | None = 5.0) -> list[dict[str, str]]:
        """The models in the repository: name, version, state ("READY", ...) and reason."""
        entries = json.loads(self._ask("POST", "/v2/repository/index", timeout))
        keys = ("name", "version", "state", "reason")
        return [{key: entry.get(key, "") for key in keys} for entry in entries]

    def metrics(self, timeout: float | None = 5.0) -> dict[str, float]:
        """Prometheus samples, by name with labels; ask at the server's metrics address."""
        lines = self._ask("GET", "/metrics", timeout).decode("utf-8").splitlines()
        samples = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    def _is(self, path: str, timeout: float) -> bool:
        try:
            self._ask("GET", path, timeout)
        except GenerateError:
            return False
        return True

    def _ask(self, method: str, path: str, timeout: float | None) -> bytes:
        timeout = check_timeout(timeout)
        with self._exchange(method, path, {}, timeout) as (answer, _):
            data = answer.read()
            if answer.status != 200:
                raise _refusal(data, answer.status)
            return data

    @contextmanager
    def _exchange(
        self, method: str, path: str, body: dict[str, Any], timeout: float | None
    ) -> Iterator[tuple[http.client.HTTPResponse, socket.socket]]:
        """Send a request; leaving the block closes the connection, which cancels the request."""
        connection = http.client.HTTPConnection(self._address, timeout=timeout)
        try:
            connection.connect()
            connected = connection.sock
            connection.request(method, path, json.dumps(body) if method == "POST" else None)
            with connection.getresponse() as answer:
                yield answer, connected
        except TimeoutError:
            problem = f"no whole answer within the timeout of {timeout:g} s"
            raise GenerateError(problem, "DEADLINE_EXCEEDED") from None
        except ConnectionRefusedError:
            raise GenerateError(f"no server listens at {self._address}", "UNAVAILABLE") from None
        except (OSError, http.client.HTTPException) as error:
            problem = f"the connection to {self._address} failed ({error or type(error).__name__})"
            raise GenerateError(problem, "UNAVAILABLE") from None
        finally:
            connection.close()


def check_port(address: str) -> None:
    """Raise ValueError if the PORT of HOST:PORT is not a port number."""
    host, colon, port = address.rpartition(":")
    if not colon or address.endswith("]"):  # no port given; the colon may be of an IPv6 address
        return
    known = port.isascii() and port.isdecimal() and len(port) < 6 and 0 < int(port) < 65536
    if not known:
        raise ValueError(f"address: {shown(port)} after {host} is not a port (1 to 65535)")


def read_metrics(address: str = "127.0.0.1:8002", timeout: float | None = 5.0) -> dict[str, float]:
    """Prometheus samples of a server, by name with labels (`nv_gpu_utilization{gpu="0"}`)."""
    return HttpClient(address).metrics(timeout)


def _is_final(chunk: Chunk) -> bool:
    return all(output.finish_reason is not None for output in chunk.outputs)


def _read(answer: http.client.HTTPResponse, connected: socket.socket, deadline: float) -> bytes:
    """Read the available bytes, at least one; b"" at the end. Raises TimeoutError."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    connected.settimeout(left if left < math.inf else None)
    return answer.read1(_READ_SIZE)


def _chunk(data: bytes, status: int, request_id: str) -> Chunk:
    try:
        answer = json.loads(data)
    except ValueError:
        raise _refusal(data, status) from None
    if not isinstance(answer, dict) or "error" in answer:
        raise _refusal(data, status)
    # Triton sends a tensor of one element as a plain value, any other tensor as a list.
    tensors = {key: v if isinstance(v, list) else [v] for key, v in answer.items()}
    return to_chunk(tensors, request_id)


def _refusal(data: bytes, status: int) -> GenerateError:
    text = data.decode("utf-8", "replace")
    try:
        message = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        message = f"the server answered {status} {http.client.responses.get(status, '')}: {text}"
    return GenerateError(message.strip().rstrip(":"), _STATUS.get(status))

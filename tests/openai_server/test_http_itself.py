"""HTTP itself: methods, paths, encodings, clients that vanish, heads without an end."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import chain, repeat
from typing import Any

import pytest
import uvicorn
from patience import SOON_S
from serving import Served

from gllm_client.openai_server import bounded_http
from gllm_client.openai_server.bounded_http import MAX_HEAD, BoundedHttp

CHAT = "/v1/chat/completions"


def wait_for(true: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON_S
    while not true() and time.monotonic() < end:
        time.sleep(0.005)
    assert true()


def connect(served: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), SOON_S)


def test_head_is_get_without_a_body(served: Served) -> None:
    for path in ("/health", "/v1/models", "/v1/models/none"):
        head, get = served.http.head(path), served.http.get(path)
        assert head.status_code == get.status_code and not head.content
        assert head.headers["content-length"] == get.headers["content-length"]


def test_a_wrong_method_tells_the_right_one(served: Served) -> None:
    for method, path, allowed in (
        ("GET", CHAT, {"POST"}),
        ("HEAD", CHAT, {"POST"}),
        ("POST", "/v1/models", {"GET"}),
        ("OPTIONS", "/health", {"GET"}),
    ):
        answer = served.http.request(method, path)
        assert answer.status_code == 405 and {*answer.headers["allow"].split(", ")} == allowed


def test_a_path_is_never_another_one(served: Served) -> None:
    """A redirection's address would be made of the client's Host and of http."""
    for path in (f"{CHAT}/", "/health/", "/v1/responses/", "//v1/models"):
        assert served.http.post(path, json={}, follow_redirects=False).status_code == 404


def test_a_body_that_is_compressed_is_refused(served: Served) -> None:
    body: Any = {"messages": [{"role": "user", "content": "a"}]}
    answer = served.http.post(CHAT, json=body, headers={"content-encoding": "gzip"})
    assert answer.status_code == 415 and "'gzip'" in answer.json()["error"]["message"]


def test_a_client_that_leaves_while_it_sends_is_no_fault(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "gllm.openai")
    with connect(served) as client:
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
            b"content-type: application/json\r\ncontent-length: 100\r\n\r\n{"
        )
        wait_for(lambda: served.app.state.door.running == 1)
    wait_for(lambda: served.app.state.door.running == 0)
    (told,) = [record for record in caplog.records if record.name == "gllm.openai"]
    assert told.levelname == "INFO" and "its client has left" in told.message


async def count(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers with the length of the body."""
    length = 0
    while (message := await receive()).get("more_body"):
        length += len(message["body"])
    length += len(message.get("body", b""))
    if (b"x-a", b"slow") in scope["headers"]:
        await asyncio.sleep(0.2)
    headers = [] if scope["path"] == "/stays" else [(b"connection", b"close")]
    headers.append((b"content-length", b"%d" % len(b"length %d" % length)))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"length %d" % length})


@asynccontextmanager
async def listening(patience_s: float = 75) -> AsyncIterator[Any]:
    """The address of a server of `count`."""
    config = uvicorn.Config(count, lifespan="off", log_config=None)
    config.load()
    config.timeout_keep_alive = patience_s  # type: ignore[assignment]
    make = partial(BoundedHttp, config, uvicorn.server.ServerState(), {})
    server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()


async def exchange(pieces: Iterable[bytes], patience_s: float = 75) -> tuple[int, bytes]:
    """Bytes that the server takes before it closes the connection, and its answer."""
    async with listening(patience_s) as address:
        reader, writer = await asyncio.open_connection(*address)
        number = 0
        answer = b""
        with suppress(ConnectionError):
            for piece in pieces:
                writer.write(piece)
                number += len(piece)
                await writer.drain()
                await asyncio.sleep(0)
            answer = await reader.read()
        writer.close()
    return number, answer


HEAD = b"POST / HTTP/1.1\r\nx-a: "
LENGTH = b"content-length: 2\r\n\r\n"


@pytest.mark.parametrize("begin", [b"", b"\r\n", HEAD, HEAD + b"b\r\n" + LENGTH + b"a"])
def test_a_client_that_is_silent_is_left(begin: bytes) -> None:
    taken, answer = asyncio.run(asyncio.wait_for(exchange([begin], 0.05), SOON_S))
    assert taken == len(begin) and not answer


def test_a_client_that_drips_a_head_is_left() -> None:
    """Also after an answer: each byte would begin the time of an idle connection anew."""

    async def drip() -> bytes:
        async with listening(0.1) as address:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(b"GET /stays HTTP/1.1\r\n\r\n")
            answer = await reader.readuntil(b"length 0")
            writer.write(HEAD)
            with suppress(ConnectionError):
                while not reader.at_eof():
                    writer.write(b"a")
                    await writer.drain()
                    await asyncio.sleep(0.01)
            writer.close()
            return answer

    assert asyncio.run(asyncio.wait_for(drip(), SOON_S)).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("more", [HEAD, HEAD + b"b\r\n" + LENGTH + b"a"])
def test_a_slow_answer_is_not_broken_off(more: bytes) -> None:
    """Also if a part of the next request has come."""
    body = HEAD + b"slow\r\n" + LENGTH + b"ab"
    _, answer = asyncio.run(asyncio.wait_for(exchange([body + more], 0.05), SOON_S))
    assert answer.endswith(b"length 2")


def test_idle_connections_keep_out_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_http, "MAX_WAITING", 10)

    async def crowd() -> bytes:
        async with listening() as address:
            idle = [await asyncio.open_connection(*address) for _ in range(1000)]
            assert await idle[0][0].read() == b"" and not idle[-1][0].at_eof()
            reader, writer = await asyncio.open_connection(*address)
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            answer = await reader.read()
            for _, each in [*idle, (reader, writer)]:
                each.close()
            return answer

    assert asyncio.run(asyncio.wait_for(crowd(), SOON_S)).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("more", [0, 1])
def test_a_head_has_exactly_its_limit(more: int) -> None:
    begin = b"GET / HTTP/1.1\r\nx-a: "
    head = begin + b"a" * (MAX_HEAD + more - len(begin) - 4) + b"\r\n\r\n"
    _, answer = asyncio.run(exchange([head]))
    assert answer.startswith(b"HTTP/1.1 400 " if more else b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (b"GET / HTTP/1.1\r\nx-a: ", b"a" * 4096),
        (b"GET / HTTP/1.1\r\n", b"x-a: b\r\n" * 512),
        (
            b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n",
            b"x: b\r\n" * 512,
        ),
    ],
    ids=["value", "fields", "trailer"],
)
def test_a_head_without_an_end_is_bounded(begin: bytes, piece: bytes) -> None:
    taken, _ = asyncio.run(exchange(chain([begin], repeat(piece, 4096))))
    assert 1 << 16 <= taken < 1 << 23  # what the kernel holds is taken too


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_no_head(chunked: bool) -> None:
    kind = b"transfer-encoding: chunked" if chunked else b"content-length: 1048576"
    piece = b"1000\r\n" + b"a" * 4096 + b"\r\n" if chunked else b"a" * 4096
    end = [b"0\r\n\r\n"] if chunked else []
    begin = b"POST / HTTP/1.1\r\n" + kind + b"\r\n\r\n"
    _, answer = asyncio.run(exchange(chain([begin], repeat(piece, 256), end)))
    assert answer.startswith(b"HTTP/1.1 200 ") and b"length 1048576" in answer

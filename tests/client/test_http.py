"""Server-sent events and the HTTP client, against a small server in this process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st
from patience import SOON_S

from gllm_client import GenerateError, HttpClient, merge, read_metrics
from gllm_client.http import read_events

Serve = Callable[[BaseHTTPRequestHandler, dict], None]


@contextmanager
def serving(serve: Serve) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            size = int(self.headers.get("Content-Length", 0))
            serve(self, json.loads(self.rfile.read(size) or "{}"))

        def do_GET(self) -> None:
            serve(self, {})

        def log_message(self, *words: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def respond(handler: BaseHTTPRequestHandler, status: int, body: str, kind: str) -> None:
    data = body.encode()
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def begin_events(handler: BaseHTTPRequestHandler, status: int = 200) -> Callable[[bytes], None]:
    handler.send_response(status)
    handler.send_header("Content-Type", "text/event-stream; charset=utf-8")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()

    def write(data: bytes) -> None:
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        handler.wfile.flush()

    return write


def event(text: str, reason: str = "None") -> bytes:
    answer = {"text_output": text, "finish_reason": reason, "token_ids": 5, "num_output_tokens": 1}
    return f"data: {json.dumps(answer, ensure_ascii=False)}\n\n".encode()


payloads = st.text(st.characters(blacklist_characters="\r\n", blacklist_categories=("Cs",)))


@given(
    st.lists(st.lists(payloads, min_size=1, max_size=3), max_size=5),
    st.sampled_from(["\n", "\r\n"]),
    st.data(),
)
def test_events_survive_any_cut(events: list[list[str]], newline: str, data: st.DataObject) -> None:
    stream = "".join(
        "".join(f"data: {line}{newline}" for line in lines) + f": comment{newline}{newline}"
        for lines in events
    ).encode()
    pieces, rest = [], stream
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        pieces.append(rest[:size])
        rest = rest[size:]
    assert list(read_events(pieces)) == ["\n".join(lines).encode() for lines in events]


def test_an_event_is_given_out_as_soon_as_it_is_whole() -> None:
    pieces = iter([b"data: one\n", b"\ndata: tw", b"o\n\n", b"data: cut off\n"])
    found = read_events(pieces)
    assert next(found) == b"one" and next(pieces) == b"o\n\n"  # no more was taken than needed
    assert list(read_events([b"\r\n\r\n", b"data: a\rb\r\ndata\r\ndatum: c\n\n"])) == [b"a\rb\n"]


def test_a_stream_comes_in_chunks() -> None:
    seen: list = []

    def serve(handler: BaseHTTPRequestHandler, body: dict) -> None:
        seen.append((handler.path, body))
        write = begin_events(handler)
        stream = event("é ") + event("two", "stop")
        for i in range(0, len(stream), 7):
            write(stream[i : i + 7])
        write(b"")

    with serving(serve) as address:
        chunks = list(HttpClient(address, "m x").generate("Hi", max_tokens=2, request_id="r1"))
    assert [c.text for c in chunks] == ["é ", "two"]
    assert [c.finish_reason for c in chunks] == [None, "stop"]
    assert merge(chunks).token_ids == (5, 5) and chunks[0].request_id == "r1"
    ((path, body),) = seen
    assert path == "/v2/models/m%20x/generate_stream"
    assert body["text_input"] == "Hi" and body["id"] == "r1" and body["stream"] is True


def test_a_whole_answer() -> None:
    def serve(handler: BaseHTTPRequestHandler, body: dict) -> None:
        assert handler.path == "/v2/models/m/generate" and body["input_ids"] == [1, 2]
        answer = {"text_output": ["a", "b"], "finish_reason": ["stop", "length"]}
        respond(handler, 200, json.dumps(answer), "application/json")

    with serving(serve) as address:
        chunk = HttpClient(address).complete(model="m", input_ids=[1, 2], n=2)
    assert [(o.text, o.finish_reason) for o in chunk.outputs] == [("a", "stop"), ("b", "length")]


def test_tokenize_detokenize_and_describe() -> None:
    def serve(handler: BaseHTTPRequestHandler, body: dict) -> None:
        assert handler.path == "/v2/models/m/generate"
        # Triton sends a tensor of one element as a plain value.
        answer = {"text_output": json.dumps(body), "token_ids": 3, "num_input_tokens": 1}
        respond(handler, 200, json.dumps(answer), "application/json")

    with serving(serve) as address:
        client = HttpClient(address, "m")
        tokens = client.tokenize("x")
        assert (tokens.token_ids, tokens.num_input_tokens) == ((3,), 1)
        assert json.loads(tokens.text) == {"operation": "tokenize", "text_input": "x"}
        for operation in ("detokenize", "token_texts"):
            sent = json.loads(client.detokenize([5], operation=operation))
            assert (sent["operation"], sent["input_ids"]) == (operation, [5])
        assert client.describe() == {"operation": "describe"}


@pytest.mark.parametrize(
    ("status", "body", "message", "name"),
    [
        (400, '{"error": "seed: no"}', "seed: no", None),
        (404, '{"error": "unknown model"}', "unknown model", "NOT_FOUND"),
        (503, "busy", "the server answered 503 Service Unavailable: busy", "UNAVAILABLE"),
        (200, '{"error": "exactly 1 response"}', "exactly 1 response", None),
        (500, "", "the server answered 500 Internal Server Error", "INTERNAL"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals(status: int, body: str, message: str, name: str | None, stream: bool) -> None:
    with (
        serving(lambda h, b: respond(h, status, body, "application/json")) as address,
        pytest.raises(GenerateError) as caught,
    ):
        HttpClient(address, "m").complete("x", stream=stream)
    assert (str(caught.value), caught.value.status) == (message, name)


def test_an_error_in_the_middle_of_a_stream() -> None:
    def serve(handler: BaseHTTPRequestHandler, body: dict) -> None:
        write = begin_events(handler)
        write(event("one") + b'data: {"error": "engine died"}\n\n')
        write(b"")

    with serving(serve) as address:
        chunks = HttpClient(address, "m").generate("x")
        assert next(chunks).text == "one"
        with pytest.raises(GenerateError, match="^engine died$"):
            next(chunks)


@pytest.mark.parametrize("proper_end", [True, False])
def test_a_stream_that_stops_short_is_an_error(proper_end: bool) -> None:
    def serve(handler: BaseHTTPRequestHandler, body: dict) -> None:
        write = begin_events(handler)
        write(event("one"))
        if proper_end:  # events were lost, the answer's end among them
            write(b"")
        handler.close_connection = True

    with serving(serve) as address:
        chunks = HttpClient(address, "m").generate("x")
        assert next(chunks).text == "one"
        with pytest.raises(GenerateError, match="ended before|failed"):
            next(chunks)


def test_closing_the_iterator_closes_the_connection() -> None:
    gone = threading.Event()

    def serve(handler: BaseHTTPRequestHandler, body: dict) -> None:
        write = begin_events(handler)
        try:
            while True:
                write(event("x"))
                time.sleep(0.01)
        except OSError:
            gone.set()

    with serving(serve) as address:
        chunks = HttpClient(address, "m").generate("x")
        next(chunks)
        chunks.close()
        assert gone.wait(SOON_S)


def test_the_timeout_is_for_the_whole_answer() -> None:
    bodies = []

    def serve(handler: BaseHTTPRequestHandler, body: dict) -> None:
        bodies.append(body)
        write = begin_events(handler)
        try:
            while True:
                write(event("x"))
                time.sleep(0.05)
        except OSError:
            return

    with serving(serve) as address:
        with pytest.raises(GenerateError, match=r"timeout of 0\.3 s") as caught:
            HttpClient(address, "m").complete("x", stream=True, timeout=0.3)
    assert caught.value.status == "DEADLINE_EXCEEDED"
    assert [body["timeout"] for body in bodies] == [300_000]  # the server is to end it too


def test_no_server() -> None:
    client = HttpClient("127.0.0.1:9", "m")
    with pytest.raises(GenerateError, match="no server listens at 127.0.0.1:9") as caught:
        client.complete("x")
    assert caught.value.status == "UNAVAILABLE"
    assert not client.is_live() and not client.is_ready("m")


def test_index_readiness_and_metrics() -> None:
    def serve(handler: BaseHTTPRequestHandler, body: dict) -> None:
        bodies = {
            "/v2/health/live": "",
            "/v2/models/m/ready": "",
            "/v2/repository/index": '[{"name": "m", "version": "1", "state": "READY"}]',
            "/metrics": '# HELP x\nx{a="b c"} 3\ny 1.5\n',
        }
        found = handler.path in bodies
        respond(handler, 200 if found else 400, bodies.get(handler.path, ""), "text/plain")

    with serving(serve) as address:
        client = HttpClient(address)
        assert client.is_live() and client.is_ready("m") and not client.is_ready("other")
        assert client.index() == [{"name": "m", "version": "1", "state": "READY", "reason": ""}]
        assert read_metrics(address) == {'x{a="b c"}': 3.0, "y": 1.5}


@pytest.mark.parametrize("port", ["x", "", "0", "65536", "9/", "9" * 400, "-1", "\u0663"])
def test_an_address_has_a_port_that_is_one(port: str) -> None:
    for address in (f"localhost:{port}", f"[::1]:{port}"):
        with pytest.raises(ValueError, match="is not a port") as caught:
            HttpClient(address)
        assert len(str(caught.value)) < 130
    for address in ("localhost", "localhost:80", "[::1]", "[::1]:8000"):
        HttpClient(address)


def test_a_timeout_that_cannot_be_waited_is_an_error_at_once() -> None:
    client = HttpClient("127.0.0.1:9", "m")
    for timeout in (float("nan"), float("inf"), -1, 0, 10**400, "3"):
        for call in (client.generate, client.complete, client.load, client.unload):
            with pytest.raises(ValueError, match="^timeout: "):
                call("x", timeout=timeout)
        for ask in (client.is_live, client.is_ready, client.index, client.metrics):
            with pytest.raises(ValueError, match="^timeout: "):
                ask(timeout=timeout)


def test_an_answer_that_is_no_object() -> None:
    body = '["odd"]'
    with (
        serving(lambda h, _: respond(h, 200, body, "application/json")) as address,
        pytest.raises(GenerateError, match="the server answered 200 OK: .*odd"),
    ):
        HttpClient(address, "m").complete("x")


def test_a_model_must_be_named() -> None:
    with pytest.raises(ValueError, match="model: none given"):
        HttpClient("127.0.0.1:9").generate("x")

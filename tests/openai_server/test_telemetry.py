"""Traces of requests, as a collector gets them."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from patience import SOON_S
from scripted_triton import Asked
from serving import Served, serve

from gllm_client.openai_server.app import make_app
from gllm_client.openai_server.options import Options

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "req-7"}


class Collector(http.server.ThreadingHTTPServer):
    """Takes spans by OTLP over HTTP; `spans`: all of them."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[Any] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def named(self, name: str) -> list[Any]:
        return [span for span in self.spans if span.name == name]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        body = self.rfile.read(int(self.headers["content-length"]))
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@contextmanager
def traced(served: Served, collector: Collector) -> Iterator[Served]:
    """A server whose spans have all arrived when the block has ended."""
    with serve(served.triton, otlp_endpoint=collector.url) as server:
        yield server


def generated(served: Served) -> Asked:
    """The one request for an answer, among those for a description of the model."""
    (asked,) = (each for each in served.model.asked if "operation" not in each.inputs)
    return asked


def attributes(span: Any) -> dict[str, Any]:
    return {
        each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes
    }


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_and_its_phases(served: Served, collector: Collector, stream: bool) -> None:
    with traced(served, collector) as server:
        answer = server.http.post(CHAT, json=BODY | {"stream": stream}, headers=HEADERS)
        assert answer.status_code == 200
        server.http.get("/v1/models")
    (whole,) = collector.named(f"POST {CHAT}")
    assert (whole.trace_id.hex(), whole.parent_span_id.hex()) == (TRACE, PARENT)
    about = attributes(whole)
    assert (about["gllm.request_id"], about["http.response.status_code"]) == ("req-7", 200)
    phases = [collector.named(name) for name in ("queue", "prefill", "decode")]
    assert [len(spans) for spans in phases] == [1, 1, 1] and len(collector.spans) == 4
    end = 0
    for (span,), seconds in zip(phases, served.model.request_times, strict=True):
        assert (span.trace_id, span.parent_span_id) == (whole.trace_id, whole.span_id)
        assert span.end_time_unix_nano - span.start_time_unix_nano == round(seconds * 1e9)
        assert span.start_time_unix_nano >= whole.start_time_unix_nano and end in (
            0,
            span.start_time_unix_nano,
        )
        end = span.end_time_unix_nano
        assert attributes(span) == {
            "gen_ai.request.model": "m",
            "gen_ai.usage.output_tokens": len("Hello!"),
            "gllm.request_id": "req-7",
        }
    # Triton continues the trace, below this server's span.
    sent = generated(served).metadata["traceparent"]
    assert sent == f"00-{TRACE}-{whole.span_id.hex()}-01"


def test_several_prompts_have_phases_of_their_own(served: Served, collector: Collector) -> None:
    with traced(served, collector) as server:
        assert server.post("/v1/completions", prompt=["a", "b"]).status_code == 200
    (whole,) = collector.named("POST /v1/completions")
    queues = collector.named("queue")
    assert {span.parent_span_id for span in queues} == {whole.span_id} and len(queues) == 2
    id = attributes(whole)["gllm.request_id"]
    assert {attributes(span)["gllm.request_id"] for span in queues} == {f"{id}-0", f"{id}-1"}
    assert whole.parent_span_id == b""


def test_what_is_refused_or_fails_has_a_span_too(served: Served, collector: Collector) -> None:
    with traced(served, collector) as server:
        assert server.post(CHAT, **BODY, frobnicate=1).status_code == 400
        assert server.post("/nothing/12345").status_code == 404
        served.model.refusal = "an internal error, see the server's log"
        assert server.post(CHAT, **BODY).status_code == 500
    refused, failed = collector.named(f"POST {CHAT}")
    (unknown,) = collector.named("POST")
    statuses = [
        attributes(span)["http.response.status_code"] for span in (refused, unknown, failed)
    ]
    assert statuses == [400, 404, 500]
    assert (refused.status.code, failed.status.code) == (0, 2)
    assert [event.name for event in failed.events] == ["exception"]
    assert len(collector.spans) == 3


def test_a_client_that_leaves(served: Served, collector: Collector) -> None:
    served.model.pause = threading.Event()
    served.model.request_times = (0.0, 0.0, 0.0)  # the real ones are less than the time so far
    with traced(served, collector) as server:
        with httpx.Client(base_url=server.url, trust_env=False) as client:
            with client.stream("POST", CHAT, json=BODY | {"stream": True}) as answer:
                assert "Hel" in next(answer.iter_text())
        assert generated(served).cancelled.wait(SOON_S)
    (whole,) = collector.named(f"POST {CHAT}")
    assert attributes(whole)["gllm.client_left"] is True
    check_cut_phases(served, collector)


def check_cut_phases(served: Served, collector: Collector) -> None:
    """Queue and prefill are the engine's; decode lasts until the end of the request."""
    (whole,) = collector.named(f"POST {CHAT}")
    (queue,), (prefill,), (decode,) = (
        collector.named(name) for name in ("queue", "prefill", "decode")
    )
    seconds = served.model.request_times[:2]
    for span, duration in zip((queue, prefill), seconds, strict=True):
        assert span.end_time_unix_nano - span.start_time_unix_nano == round(duration * 1e9)
    assert decode.start_time_unix_nano == prefill.end_time_unix_nano
    assert decode.start_time_unix_nano <= decode.end_time_unix_nano <= whole.end_time_unix_nano
    assert attributes(decode)["gen_ai.usage.output_tokens"] == served.model.tokens_per_chunk
    assert len(collector.spans) == 4


def test_an_answer_that_fails_half_way_has_the_phases_that_it_came_to(
    served: Served, collector: Collector
) -> None:
    served.model.refusal = "the engine has ended"
    served.model.refuse_after = 1
    served.model.request_times = (0.0, 0.0, 0.0)
    with traced(served, collector) as server:
        assert "the engine has ended" in server.post(CHAT, **BODY, stream=True).text
    check_cut_phases(served, collector)


def test_nothing_is_traced_unless_it_is_wanted(served: Served) -> None:
    assert served.http.post(CHAT, json=BODY, headers=HEADERS).status_code == 200
    asked = generated(served)
    assert "traceparent" not in asked.metadata and "return_request_times" not in asked.inputs


def test_a_collector_that_is_away_harms_no_request(served: Served) -> None:
    with serve(served.triton, otlp_endpoint="http://127.0.0.1:1") as server:
        assert server.post(CHAT, **BODY).status_code == 200


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4318", "grpc://127.0.0.1:4317", "http://"])
def test_a_wrong_address_is_refused(endpoint: str) -> None:
    with pytest.raises(ValueError, match="--otlp-endpoint: .* is not http://HOST:PORT"):
        make_app(Options(otlp_endpoint=endpoint))

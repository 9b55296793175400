"""Traces of requests for an OpenTelemetry collector; its packages are imported only if one is
named.

    POST /v1/chat/completions  -+- queue      the span of a request and, below it, the times that
                                +- prefill    the engine measured
                                +- decode

The parent of a request's span is the client's, by the header traceparent. Triton gets the header
of this span as gRPC metadata, so that its traces continue this one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gllm_client import Chunk, GenerateError

CLOSE_S = 1.0  # at the end, for the last spans
_PHASES = ("queue", "prefill", "decode")
_CURRENT: ContextVar[Trace | None] = ContextVar("trace", default=None)


def current_trace() -> Trace | None:
    """The trace of the request that this task answers; None if it is not traced."""
    return _CURRENT.get()


def grpc_metadata() -> Iterable[tuple[str, str]]:
    """What a request to Triton carries, so that its trace continues this one."""
    trace = _CURRENT.get()
    return () if trace is None else trace.headers().items()


class Telemetry:
    """Makes spans and sends them to a collector, in the background; what it does not take is lost.

    `endpoint`: its OTLP address over HTTP, such as http://127.0.0.1:4318. OpenTelemetry's
    environment variables hold. Raises ValueError for an invalid address, or without the packages.
    """

    def __init__(self, endpoint: str) -> None:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"--otlp-endpoint: {endpoint} is not http://HOST:PORT")
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
        except ImportError as error:
            problem = f"--otlp-endpoint needs {error.name}: pip install 'gllm-triton[telemetry]'"
            raise ValueError(problem) from None
        base = endpoint.rstrip("/").removesuffix("/v1/traces")
        self._provider = TracerProvider(resource=Resource.create({"service.name": "gllm-openai"}))
        self._exporter = OTLPSpanExporter(f"{base}/v1/traces")
        self._tracer = self._provider.get_tracer("gllm")

    def start(self) -> None:
        """Begin to send, on a thread: so in the process that serves."""
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))

    @contextmanager
    def trace(self, scope: Scope) -> Iterator[Trace]:
        """The trace of a request, the current one within the block."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(dict(Headers(scope=scope)))
        attributes = {"http.request.method": scope["method"], "url.path": scope["path"]}
        with self._tracer.start_as_current_span(
            scope["method"], parent, SpanKind.SERVER, attributes
        ) as span:
            trace = Trace(self._tracer, span)
            token = _CURRENT.set(trace)
            try:
                yield trace
            finally:
                _CURRENT.reset(token)

    def close(self) -> None:
        """Send what is left. After CLOSE_S a collector that does not take it is left alone."""
        give_up = threading.Timer(CLOSE_S, self._exporter.shutdown)
        give_up.start()
        self._provider.shutdown()
        give_up.cancel()


class Trace:
    """The span of one HTTP request, and the spans below it."""

    def __init__(self, tracer: Any, span: Any) -> None:
        self._tracer = tracer
        self._span = span

    def headers(self) -> dict[str, str]:
        """traceparent, and tracestate if there is one: this span as a parent."""
        from opentelemetry.trace import set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, set_span_in_context(self._span))
        return carrier

    def answer(self, scope: Scope, status: int) -> None:
        """Note the status of the answer. An unknown path names no span."""
        from opentelemetry.trace import StatusCode

        if status != 404:
            self._span.update_name(f"{scope['method']} {scope['path']}")
        self._span.set_attribute("http.response.status_code", status)
        if status >= 500:
            self._span.set_status(StatusCode.ERROR)

    def end(self, state: dict[str, Any]) -> None:
        """Note what the gate knows of the request."""
        self._span.set_attribute("gllm.request_id", state["request_id"])
        if state.get("left"):
            self._span.set_attribute("gllm.client_left", True)

    async def watch(
        self, chunks: AsyncGenerator[Chunk, None], model: str, request_id: str
    ) -> AsyncGenerator[Chunk, None]:
        """Pass on the chunks of an answer. Its end adds the spans below this one.

        An answer that fails, or whose client leaves, has those of the phases that it came to: with
        its first token it tells of the first two, and the third lasts until now.
        """
        began = time.time_ns()
        num_tokens = 0
        times: tuple[float, ...] | None = None
        is_whole = False
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    num_tokens += sum(len(output.token_ids) for output in chunk.outputs)
                    times = chunk.request_times or times
                    is_whole = all(output.finish_reason is not None for output in chunk.outputs)
                    yield chunk
        except GenerateError as error:
            self._span.record_exception(error)
            raise
        finally:
            if times:
                if not is_whole:
                    queue, prefill, _ = times
                    times = (queue, prefill, (time.time_ns() - began) / 1e9 - queue - prefill)
                attributes = {
                    "gen_ai.request.model": model,
                    "gen_ai.usage.output_tokens": num_tokens,
                    "gllm.request_id": request_id,
                }
                self._add(began, times, attributes)

    def _add(self, began: int, seconds: Iterable[float], attributes: dict[str, Any]) -> None:
        """Add a span for each phase. They follow each other from `began` on, ns since 1970."""
        from opentelemetry.trace import set_span_in_context

        parent = set_span_in_context(self._span)
        for name, duration in zip(_PHASES, seconds, strict=True):
            span = self._tracer.start_span(name, parent, attributes=attributes, start_time=began)
            began += round(duration * 1e9)
            span.end(began)


class Tracing:
    """An ASGI application around the gate: a trace for each POST request."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self._app = app
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        with self._telemetry.trace(scope) as trace:

            async def reply(message: Message) -> None:
                if message["type"] == "http.response.start":
                    trace.answer(scope, message["status"])
                await send(message)

            try:
                await self._app(scope, receive, reply)
            finally:
                trace.end(scope["state"])

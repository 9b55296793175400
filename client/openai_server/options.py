"""The options of `gllm openai`. The fields are its flags; importing this needs no web framework."""

from __future__ import annotations

from typing import Annotated

import msgspec

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**40)]


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How the OpenAI server listens, finds tritonserver and limits its clients."""

    url: str = "grpc://127.0.0.1:8001"  # tritonserver's gRPC address
    host: str = "127.0.0.1"  # address to listen at
    port: Port = 9000
    # processes that share the port, for more streams than one core can write; they store no answers
    processes: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1
    # tritonserver's metrics page, such as http://127.0.0.1:8002/metrics, passed on as /metrics
    metrics_url: str | None = None
    # a file of API keys, one a line, read again when it changes; after a key may stand the tenant
    # that it belongs to. Without a file everybody may ask, and the header x-tenant names a tenant
    api_key_file: str | None = None
    tls_certificate: str | None = None  # a PEM file; with it and the key, HTTPS is served
    tls_key: str | None = None  # a PEM file
    max_body_size: Positive = 32 << 20  # bytes of a request's body
    # requests that run at a time; further ones get status 429. Several processes share it equally
    max_concurrency: Positive = 4096
    allow_origin: tuple[
        str, ...
    ] = ()  # web pages of this origin may ask; * is all; may be repeated
    # answers of /v1/responses that clients can read or continue later, at most so many and of so
    # many bytes together, in this process's memory; 0: none are kept. Default: 1000, or none with
    # several processes
    stored_responses: Annotated[int, msgspec.Meta(ge=0, le=10_000)] | None = None
    stored_bytes: Positive = 256 << 20
    # how models write calls of tools; default: chosen by the model's chat template
    tool_format: str | None = None
    # how models write thoughts; default: chosen by the model's chat template
    reasoning_format: str | None = None
    # an OpenTelemetry collector's OTLP address over HTTP, such as http://127.0.0.1:4318, to which
    # traces of requests go; it needs the [telemetry] extra
    otlp_endpoint: str | None = None
    ui: bool = False  # a page for chats at /
    # at a stop, running answers have so long to end
    drain_timeout_s: Positive = 30

"""The application and its life: start, serve, drain.

After the first SIGTERM or SIGINT running answers end, new requests get status 503, and so does
/health; a second signal ends them too.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from resource import RLIMIT_NOFILE, getrlimit, setrlimit
from types import FrameType

import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from gllm_client import Client
from gllm_client.openai_server import messages, pages, responses, web_page
from gllm_client.openai_server.bounded_http import BoundedHttp
from gllm_client.openai_server.endpoints import ENDPOINTS
from gllm_client.openai_server.errors import ApiError
from gllm_client.openai_server.formats.choice import choose
from gllm_client.openai_server.gate import Door, Gate, Keys
from gllm_client.openai_server.models import Models
from gllm_client.openai_server.options import Options
from gllm_client.openai_server.processes import bind, run_processes
from gllm_client.openai_server.response_store import ResponseStore
from gllm_client.openai_server.routing import error_response, serve_endpoint
from gllm_client.openai_server.telemetry import Telemetry, Tracing, grpc_metadata

TICK_S = 0.05  # between two looks whether all answers have ended
STORED = 1000  # answers of /v1/responses, if the options do not say
KEEP_ALIVE_S = 75  # a client that is to send something may be silent for so long


def make_app(options: Options) -> FastAPI:
    """The application. Its state: options, models, door and the store of answers.

    Raises ValueError for a wrong option.
    """
    scheme, _, address = options.url.rpartition("://")
    if scheme not in ("", "grpc"):
        raise ValueError(f"--url: {options.url} has scheme {scheme}; grpc is needed here")
    keys = Keys(Path(options.api_key_file)) if options.api_key_file else None
    choose({}, options.tool_format, options.reasoning_format)
    telemetry = Telemetry(options.otlp_endpoint) if options.otlp_endpoint else None

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        if telemetry is not None:
            telemetry.start()
        async with Client(address, metadata=grpc_metadata) as client:
            models = Models(client, options.tool_format, options.reasoning_format)
            app.state.models = models
            watch = asyncio.create_task(models.watch())
            yield
            watch.cancel()
        if telemetry is not None:
            await asyncio.to_thread(telemetry.close)

    app = FastAPI(openapi_url=None, lifespan=life, redirect_slashes=False)
    app.state.options = options
    open_paths = {"/health", *(web_page.FILES if options.ui else ())}
    app.state.door = Door(keys, -(-options.max_concurrency // options.processes), open_paths)
    app.state.response_store = ResponseStore(_num_stored(options), options.stored_bytes)
    for path in ENDPOINTS:
        app.add_route(path, serve_endpoint, methods=["POST"])
    for part in (responses, messages, pages):
        app.include_router(part.router)
    if options.ui:
        app.include_router(web_page.router)
    app.add_middleware(Gate, door=app.state.door)
    if telemetry is not None:
        app.add_middleware(Tracing, telemetry=telemetry)
    if options.allow_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.allow_origin),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    app.add_exception_handler(HTTPException, _explain)
    return app


def _num_stored(options: Options) -> int:
    """How many answers are stored. Each process would know its own alone, so several store none."""
    if options.processes == 1:
        return STORED if options.stored_responses is None else options.stored_responses
    if options.stored_responses:
        problem = "answers are kept in one process's memory, with --processes above 1 none can be"
        raise ValueError(f"--stored-responses: {problem}")
    return 0


async def _explain(request: Request, error: Exception) -> Response:
    """The answer to a request for an unknown path or with another method."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    problem = f"{request.method} {path}: {error.detail}"
    answer = error_response(path, ApiError(error.status_code, problem))
    answer.headers.update(error.headers or {})  # Allow, of a wrong method
    return answer


class _Server(uvicorn.Server):
    """A server whose first signal begins the drain, and whose second one ends it."""

    def __init__(
        self, config: uvicorn.Config, door: Door, options: Options, tells: bool = True
    ) -> None:
        super().__init__(config)
        self._door = door
        self._options = options
        self._tells = tells  # its address, once it listens

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = self._door.draining
        self._door.draining = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        gc.freeze()  # what stays for ever need not be looked at again and again
        if self._tells:
            self._tell()
        self._draining = asyncio.create_task(self._drain())

    def _tell(self) -> None:
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        scheme = "https" if self.config.is_ssl else "http"
        where = f"{scheme}://{host}:{port} for tritonserver at {self._options.url}"
        print(f"gllm openai: listening at {where}", flush=True)

    async def _drain(self) -> None:
        """Wait for the first signal and then for the running answers, and end the server."""
        while not self._door.draining:
            await asyncio.sleep(TICK_S)
        limit = time.monotonic() + self._options.drain_timeout_s
        while self._door.running and time.monotonic() < limit:
            await asyncio.sleep(TICK_S)
        self.should_exit = True


def serve(options: Options) -> int:
    """Serve until a signal; returns the exit status. Raises ValueError for a wrong option."""
    logging.basicConfig(level=logging.INFO, format="gllm openai: %(message)s")
    if (options.tls_certificate is None) != (options.tls_key is None):
        raise ValueError("--tls-certificate and --tls-key go together")
    app = make_app(options)
    # Each connection is a file, and nothing else bounds those that never end their TLS handshake.
    most = min(getrlimit(RLIMIT_NOFILE)[1], 16_384)
    setrlimit(RLIMIT_NOFILE, (most, most))
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        http=BoundedHttp,
        ssl_certfile=options.tls_certificate,
        ssl_keyfile=options.tls_key,
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=1,
    )
    if options.processes == 1:
        _Server(config, app.state.door, options).run()
        return 0
    config.load()  # a wrong certificate is refused here

    def run(at: socket.socket, tells: bool) -> None:
        _Server(config, app.state.door, options, tells).run([at])

    return run_processes(bind(options.host, options.port, options.processes), run)

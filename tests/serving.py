"""A fake Triton and the OpenAI server in front of it, on real sockets of the test's own process."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import uvicorn
from patience import SOON_S
from scripted_triton import FakeModel, FakeTriton

from gllm_client.openai_server.app import make_app
from gllm_client.openai_server.options import Options


class Served:
    """A running server; `triton.models` may change at any time."""

    def __init__(self, triton: FakeTriton, app: Any, url: str) -> None:
        self.triton = triton
        self.app = app
        self.url = url
        self.http = httpx.Client(base_url=url, timeout=SOON_S, trust_env=False)
        self.sdk = openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=self.http
        )

    @property
    def model(self) -> FakeModel:
        return self.triton.models["m"]

    def forget(self) -> None:
        """Let the next request look at the models anew."""
        self.app.state.models.known = {}
        self.app.state.models._refreshed = -math.inf

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def refused(self, path: str, **body: Any) -> tuple[int, str | None, str]:
        """The status, the field and the sentence of a request that fails."""
        answer = self.post(path, **body)
        error = answer.json()["error"]
        return answer.status_code, error["param"], error["message"]


@contextmanager
def serve(triton: FakeTriton, **options: Any) -> Iterator[Served]:
    app = make_app(Options(url=triton.address, **options))
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    limit = time.monotonic() + SOON_S
    while not server.started and time.monotonic() < limit:
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    served = Served(triton, app, f"http://127.0.0.1:{port}")
    try:
        yield served
    finally:
        served.http.close()
        server.should_exit = True
        thread.join(SOON_S)

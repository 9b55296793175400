"""Two tenants of a real server get what their weights say, however much more one of them asks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from live import Server
from patience import WAIT_S
from repository import write_model
from serving import serve as serve_openai

from gllm_benchmarks import fairness
from gllm_benchmarks.fairness import ASKED, CASES, ENGINE, share
from gllm_benchmarks.openai_api import OpenAIClient
from gllm_client import Client

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]
WEIGHTS = CASES["1 : 3"]
# While both have waiting requests, two tenants are apart by less than the running answers of both,
# divided by the weights: 2,667 tokens. That is below 5% of a share of 60,000 for a weight of 1.
TOKENS = 240_000


@pytest.fixture(scope="module")
def instant(
    tmp_path_factory: pytest.TempPathFactory,
    serve_for: Callable[[ExitStack], Callable[..., Server]],
) -> Iterator[Server]:
    repository = tmp_path_factory.mktemp("repository")
    write_model(repository, "m", 1, **ENGINE, tenant_weights=WEIGHTS)
    with ExitStack() as stack:
        yield serve_for(stack)(repository)


def check(figures: dict[str, Any]) -> None:
    assert sum(figures["tokens"].values()) >= TOKENS
    assert figures["few_to_many_by_weight"] == pytest.approx(1, abs=0.05), figures


async def over_grpc(server: Server) -> dict[str, Any]:
    async with Client(server.grpc, "m") as client:
        ask = partial(client.complete, **ASKED)
        return await share(ask, server.metrics_address, WEIGHTS, 0, TOKENS)


def test_tenants_get_their_weights(instant: Server) -> None:
    check(asyncio.run(over_grpc(instant)))
    instant.wait_idle("m")


def test_keys_of_the_openai_server_are_tenants(
    instant: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fairness, "ALIVE", {"many": 200, "few": 100})  # each has a connection
    (tmp_path / "keys").write_text("key-many many\nkey-few few\n")
    body = {"prompt": ASKED["input_ids"]} | ASKED
    del body["input_ids"]

    async def measured(url: str) -> dict[str, Any]:
        async with AsyncExitStack() as stack:
            clients = {}
            for tenant in WEIGHTS:
                (tmp_path / tenant).write_text(f"key-{tenant}")
                client = OpenAIClient(url, "m", key_file=tmp_path / tenant)
                clients[tenant] = await stack.enter_async_context(client)

            async def ask(tenant: str) -> Any:
                return await clients[tenant].post("/completions", body, timeout=WAIT_S)

            return await share(ask, instant.metrics_address, WEIGHTS, 0, TOKENS)

    triton: Any = SimpleNamespace(address=instant.grpc)
    with serve_openai(triton, api_key_file=str(tmp_path / "keys")) as gateway:
        check(asyncio.run(measured(gateway.url)))
    instant.wait_idle("m")


def test_an_empty_queue_gives_no_figures(instant: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of so few requests the queue may be empty between two looks."""
    monkeypatch.setattr(fairness, "ALIVE", {"many": 40, "few": 4})
    with pytest.raises(RuntimeError, match="queue may have been empty"):
        asyncio.run(over_grpc(instant))
    instant.wait_idle("m")

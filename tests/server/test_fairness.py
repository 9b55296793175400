"""Two tenants of a real server, of which one asks ten times as much, get what their weights say."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from live import Server
from repository import write_model
from serving import serve as serve_openai

from gllm_benchmarks.fairness import CASES, FEW, TIMES, WEIGHTS, Tenants
from gllm_benchmarks.load import TritonClient
from gllm_benchmarks.openai_api import OpenAIClient

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]
# One runs at a time, so the tenants are never apart by more than an answer of each. The tenant with
# the least has 3,000 tokens or more, so even that, at the beginning and at the end, is below 5%.
OUTPUT_LEN = 50
TOKENS = {"1 : 1": 8_000, "1 : 3": 12_000}
MAX_WAITING = TIMES * FEW - 10


@pytest.fixture(scope="module")
def instant(
    tmp_path_factory: pytest.TempPathFactory,
    serve_for: Callable[[ExitStack], Callable[..., Server]],
) -> Iterator[Server]:
    repository = tmp_path_factory.mktemp("repository")
    write_model(
        repository,
        "m",
        1,
        device="none",
        max_num_seqs=1,
        max_waiting=MAX_WAITING,
        tenant_weights=WEIGHTS,
    )
    with ExitStack() as stack:
        yield serve_for(stack)(repository)


def check(figures: dict[str, Any]) -> None:
    assert figures["few_to_many_by_weight"] == pytest.approx(1, abs=0.05), figures
    many, few = figures["refusals"].values()
    assert many > 0 and few == 0, figures


def test_tenants_get_their_weights(instant: Server) -> None:
    case = "1 : 3"
    tenants = Tenants(*CASES[case], OUTPUT_LEN)
    check(asyncio.run(tenants.share(lambda _: TritonClient(instant.grpc, "m"), 0, TOKENS[case])))


def test_keys_of_the_openai_server_are_tenants(instant: Server, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("key-a a\nkey-b b\n")
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"key-{name}")
    triton: Any = SimpleNamespace(address=instant.grpc)
    with serve_openai(triton, api_key_file=str(tmp_path / "keys")) as gateway:

        def connect(name: str) -> OpenAIClient:
            return OpenAIClient(gateway.url, "m", key_file=tmp_path / name)

        case = "1 : 1"
        check(asyncio.run(Tenants(*CASES[case], OUTPUT_LEN).share(connect, 0, TOKENS[case])))

"""Servers for these tests: one on the shipped model for the whole session, others on demand.

A failed test's report carries what its servers said during it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from live import MODEL, SHIPPED, Server

from gllm_engine import LLM
from gllm_engine.model.tiny import write_tiny_model

Serve = Callable[..., Server]
_SERVERS = pytest.StashKey[dict[Server, int]]()  # servers alive -> log size when a test began


def _started(config: pytest.Config, repository: Path, *flags: str, log: Path) -> Server:
    """A server that is ready; its processes are gone when it cannot be."""
    server = Server(repository, *flags, log=log)
    config.stash.setdefault(_SERVERS, {})[server] = 0
    try:
        return server.wait_ready()
    except BaseException:
        _ended(config, server)
        raise


def _ended(config: pytest.Config, server: Server) -> None:
    config.stash[_SERVERS].pop(server, None)
    server.stop()


@pytest.fixture(scope="session")
def server(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[Server]:
    """The shipped model, served for the whole session. Leave it as it was found: idle."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    running = _started(pytestconfig, SHIPPED, log=log)
    yield running
    _ended(pytestconfig, running)


@pytest.fixture(scope="session")
def serve_for(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Callable[[ExitStack], Serve]:
    """For fixtures of a wider scope: `serve_for(stack)` is a `serve` whose servers end with it."""

    def bind(stack: ExitStack) -> Serve:
        def serve(repository: Path, *flags: str) -> Server:
            log = tmp_path_factory.mktemp("server") / "server.log"
            running = _started(pytestconfig, repository, *flags, log=log)
            stack.callback(_ended, pytestconfig, running)
            return running

        return serve

    return bind


@pytest.fixture
def serve(serve_for: Callable[[ExitStack], Serve]) -> Iterator[Serve]:
    """`serve(repository, *flags) -> Server`, ready; all are stopped when the test ends."""
    with ExitStack() as stack:
        yield serve_for(stack)


@pytest.fixture(scope="session")
def narrow(
    tmp_path_factory: pytest.TempPathFactory, serve_for: Callable[[ExitStack], Serve]
) -> Iterator[Server]:
    """A server of the tiny model `narrow`: one runs, two wait, 16,384 tokens fit its KV pool.

    Its 16,000 tokens take some ten seconds, and each is a response of its own.
    """
    repository = tmp_path_factory.mktemp("repository")
    checkpoint = repository / "narrow/1"
    write_tiny_model(checkpoint, "Qwen3ForCausalLM", seed=1, max_position_embeddings=32768)
    # The model's length is given: else it would be what the pool holds.
    engine = {"model": ".", "max_num_seqs": 1, "max_waiting": 2, "num_pages": 1024}
    engine |= {"max_model_len": 32768}
    (checkpoint / "model.json").write_text(json.dumps(engine))
    (repository / "narrow/config.pbtxt").write_text(
        'backend: "gllm"\n'
        "instance_group [{ count: 1 kind: KIND_MODEL }]\n"
        'parameters { key: "coalesce" value { string_value: "false" } }\n'
    )
    with ExitStack() as stack:
        yield serve_for(stack)(repository)


@pytest.fixture(scope="session")
def offline() -> Iterator[LLM]:
    """The shipped model in this process: what every answer is compared with."""
    with LLM(model=str(SHIPPED / MODEL / "1")) as llm:
        yield llm


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    servers = item.config.stash.get(_SERVERS, {})
    for running in servers:
        servers[running] = running.log_size()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Any:
    report = yield
    if report.failed:
        for running, start in item.config.stash.get(_SERVERS, {}).items():
            report.sections.append((f"log of the server at {running.http}", running.tail(start)))
    return report

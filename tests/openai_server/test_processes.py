"""Several processes on one port: a dead one is replaced, a stop reaches all, answers end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from patience import SOON_S, WAIT_S
from serving import Served
from test_gate import wait_for

from gllm_client.openai_server.app import make_app
from gllm_client.openai_server.options import Options
from gllm_client.openai_server.processes import bind

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "stream": True}


def children(pid: int) -> set[int]:
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def test_a_dead_process_is_replaced_and_all_drain(served: Served) -> None:
    """Also if more connections are idle than a process may have open files."""
    served.model.pause = threading.Event()
    command = [
        "prlimit",
        "--nofile=64:4096",
        sys.executable,
        "-m",
        "gllm_client",
        "openai",
        "--port",
        "0",
        "--processes",
        "2",
    ]
    command += ["--url", f"grpc://{served.triton.address}"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        url = process.stdout.readline().split()[4]
        wait_for(lambda: len(children(process.pid)) == 2)
        first, second = children(process.pid)
        os.kill(first, signal.SIGKILL)
        assert f"process {first} ended by itself" in process.stderr.readline()
        wait_for(lambda: len(children(process.pid) - {first, second}) == 1)
        at = ("127.0.0.1", int(url.rpartition(":")[2]))
        idle = [socket.create_connection(at, SOON_S) for _ in range(300)]
        for _ in range(8):  # each by a connection of its own, so by either process
            assert httpx.get(f"{url}/health", timeout=SOON_S, trust_env=False).status_code == 200
        with (
            httpx.Client(base_url=url, timeout=SOON_S, trust_env=False) as client,
            client.stream("POST", "/v1/chat/completions", json=BODY) as answer,
        ):
            pieces = answer.iter_text()
            assert "Hel" in next(pieces)
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: client.get("/health").status_code == 503)
            served.model.pause.set()
            assert "".join(pieces).endswith("data: [DONE]\n\n")
        assert process.wait(WAIT_S) == 0
        for connection in idle:
            connection.close()
    assert not Path(f"/proc/{second}").exists()


def test_several_processes_store_no_answers() -> None:
    assert make_app(Options(processes=2)).state.response_store.max_responses == 0
    assert make_app(Options()).state.response_store.max_responses > 0
    with pytest.raises(ValueError, match="--stored-responses: .* --processes"):
        make_app(Options(processes=2, stored_responses=5))


def test_processes_share_the_limit() -> None:
    assert make_app(Options(processes=3, max_concurrency=10)).state.door._max_concurrency == 4


def test_a_port_in_use_is_refused() -> None:
    sockets = bind("127.0.0.1", 0, 2)
    try:
        port = sockets[0].getsockname()[1]
        assert {at.getsockname()[1] for at in sockets} == {port}
        sockets[0].listen()
        with pytest.raises(ValueError, match=f"port {port} on 127.0.0.1 .*in use"):
            bind("127.0.0.1", port, 2)
    finally:
        for at in sockets:
            at.close()

"""`gllm serve` around a real tritonserver, with a small Python model instead of an engine."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from patience import WAIT_S

from gllm_client import GenerateError, HttpClient, SyncClient
from gllm_client.supervisor import ProcessRow, descendants, find_stubs, process_table
from gllm_client.tritonserver import SHM
from gllm_engine import owned_prefix

pytestmark = pytest.mark.server

MODEL = """
import time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        for name, kind in FLAGS:
            config.add_input({"name": name, "data_type": kind, "dims": [1], "optional": True})
        config.add_output({"name": "text_output", "data_type": "TYPE_STRING", "dims": [-1]})
        config.set_model_transaction_policy({"decoupled": True})
        config.set_max_batch_size(0)
        return config

    def initialize(self, args):
        FAIL

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            text = pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy()
            answer = pb_utils.InferenceResponse([pb_utils.Tensor("text_output", text)])
            sender.send(answer, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
FLAGS = [
    ("text_input", "TYPE_STRING"),
    *(
        (name, "TYPE_BOOL")
        for name in (
            "stream",
            "exclude_input_in_output",
            "return_finish_reason",
            "return_num_input_tokens",
            "return_num_output_tokens",
            "return_token_ids",
        )
    ),
]


def wait_for(condition: Callable[[], object], timeout_s: float = WAIT_S) -> bool:
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def still_there(family: set[ProcessRow]) -> list[ProcessRow]:
    """Those that run yet, orphans too: their parent is another now."""
    rows = process_table()
    return [row for row in family if row.pid in rows and rows[row.pid].start == row.start]


class Serve:
    """A `gllm serve` of one model, "echo", of two instances."""

    def __init__(self, directory: Path, fail: str = "pass") -> None:
        version = directory / "repo/echo/1"
        version.mkdir(parents=True)
        code = MODEL.replace("FLAGS", repr(FLAGS)).replace("FAIL", fail)
        (version / "model.py").write_text(code)
        (version.parent / "config.pbtxt").write_text(
            'backend: "python"\ninstance_group [{ count: 2 kind: KIND_MODEL }]\n'
        )
        self.ports = free_ports(3)
        flags = zip(("--http-port", "--grpc-port", "--metrics-port"), self.ports, strict=True)
        self.log = directory / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gllm_client", "serve", str(directory / "repo")]
                + [f"{flag}={port}" for flag, port in flags]
                + ["--exit-timeout-s=5"],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=dict(os.environ) | {"TMPDIR": str(directory)},
            )
        self.directory = directory
        self.prefix = owned_prefix(self.process.pid)

    def ready(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    @property
    def server(self) -> int:
        (row,) = [r for r in process_table().values() if r.parent == self.process.pid]
        return row.pid

    def stubs(self) -> set[int]:
        return {row.pid for row in find_stubs(self.server).get("echo", ())}

    def echo(self, text: str) -> str:
        with SyncClient(f"127.0.0.1:{self.ports[1]}", "echo") as client:
            return client.complete(text, timeout=WAIT_S).text

    def leftovers(self) -> list[Path]:
        return [*SHM.glob(f"{self.prefix}*"), *self.directory.glob(f"{self.prefix}*")]

    def close(self) -> None:
        """Leave nothing. A stub of Triton's own backend can outlive a server that was killed."""
        family = descendants(self.process.pid)
        self.process.kill()
        self.process.communicate()
        for row in still_there(family):
            with contextlib.suppress(ProcessLookupError):
                os.kill(row.pid, signal.SIGKILL)
        for region in SHM.glob(f"{self.prefix}*"):
            region.unlink()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    serve = Serve(tmp_path)
    yield serve
    serve.close()


def test_start_lose_a_front_end_and_stop(serve: Serve) -> None:
    http, grpc, metrics = serve.ports
    assert serve.ready() == (
        f"ready: echo at http://127.0.0.1:{http} grpc://127.0.0.1:{grpc} "
        f"metrics http://127.0.0.1:{metrics}/metrics\n"
    )
    assert serve.echo("é") == "é"
    with HttpClient(f"127.0.0.1:{http}", "echo") as client:
        assert client.complete("over HTTP").text == "over HTTP" and client.is_ready("echo")
    before = serve.stubs()
    assert len(before) == 2 and serve.leftovers()
    os.kill(min(before), signal.SIGKILL)
    assert wait_for(lambda: "a front end of model echo died" in serve.log.read_text())
    assert wait_for(lambda: "model echo is back after" in serve.log.read_text())
    assert len(serve.stubs() - before) == 2
    assert serve.echo("again") == "again"
    family = descendants(serve.process.pid)
    serve.process.send_signal(signal.SIGTERM)
    assert serve.process.wait(WAIT_S) == 0
    assert not still_there(family)
    assert not serve.leftovers()


def test_its_own_death_takes_the_server_along(serve: Serve) -> None:
    assert serve.ready().startswith("ready")
    family = descendants(serve.process.pid)
    serve.process.kill()
    assert wait_for(lambda: not still_there(family))


def test_the_servers_death_ends_it(serve: Serve) -> None:
    assert serve.ready().startswith("ready")
    family = descendants(serve.process.pid)
    os.kill(serve.server, signal.SIGKILL)
    assert serve.process.wait(WAIT_S) == 128 + signal.SIGKILL
    assert "tritonserver ended by itself with status 137" in serve.log.read_text()
    assert not still_there(family) and not serve.leftovers()


def test_a_model_that_fails_to_load(tmp_path: Path) -> None:
    serve = Serve(tmp_path, fail='raise ValueError("no such weights")')
    try:
        assert serve.process.wait(WAIT_S) == 1
        last = serve.log.read_text().splitlines()[-1]
        assert last.startswith("gllm serve: model echo cannot be loaded: ")
        assert "no such weights" in serve.log.read_text() and serve.ready() == ""
        assert not serve.leftovers()
    finally:
        serve.close()


def test_errors_of_the_server_are_generate_errors(serve: Serve) -> None:
    assert serve.ready().startswith("ready")
    http, grpc, _ = serve.ports
    with HttpClient(f"127.0.0.1:{http}") as client:
        with pytest.raises(GenerateError, match="unknown model") as caught:
            client.complete("x", model="nope")
        assert caught.value.status == "NOT_FOUND"
    with SyncClient(f"127.0.0.1:{grpc}") as client:
        with pytest.raises(GenerateError, match="unknown model"):
            client.complete("x", model="nope")
        with pytest.raises(GenerateError, match="expected number of inputs"):
            client.complete("x", model="echo", return_cumulative_logprob=True)
        client.unload("echo")
        assert wait_for(lambda: client.index()[0]["state"] == "UNAVAILABLE")
        client.load("echo")
        assert client.num_stubs("echo") == 2
    assert serve.echo("back") == "back"

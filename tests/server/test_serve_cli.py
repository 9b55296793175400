"""How servers begin and end: ports, signals, a plain tritonserver, little shared memory.

What may happen to models and engines meanwhile is test_lifecycle's.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from live import Server, free_ports
from patience import SOON_S, WAIT_S
from repository import write_model
from streams import Streams
from traces import Launched, Traces, regions, wait_gone

from gllm_client import GenerateError

pytestmark = pytest.mark.server

Launch = Callable[..., Launched]
IN_PRIVATE_SHM = 'mount -t tmpfs -o size="$0" tmpfs /dev/shm && exec "$@"'


@pytest.fixture
def traces() -> Iterator[Traces]:
    traces = Traces().begin()
    yield traces
    traces.end()


@pytest.fixture
def launch(traces: Traces, tmp_path: Path) -> Iterator[Launch]:
    """`launch(command, ...) -> Launched`; stopped at the end, its log in a failed test's report."""
    launched: list[Launched] = []

    def start(*command: str, before: tuple[str, ...] = ()) -> Launched:
        log = tmp_path / f"log-{len(launched)}"
        launched.append(Launched(*command, log=log, before=before))
        return launched[-1]

    yield start
    for server in launched:
        server.stop()
        print(f"----- {server.process.args}\n{server.tail()}")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model, "quick": two front ends, and an engine that computes nothing."""
    repository = tmp_path_factory.mktemp("repository")
    write_model(repository, "quick", 2, device="none")
    return repository


def next_start(server: Server) -> None:
    """Begin to start a plain tritonserver, as far as it cleans up after dead ones."""
    nowhere = server.log_path.parent / "nowhere"
    command = [sys.executable, "-m", "gllm_client", "tritonserver", f"--model-repository={nowhere}"]
    assert subprocess.run(command, capture_output=True, timeout=WAIT_S).returncode != 0


def private_directories(server: Server, traces: Traces) -> list[Path]:
    return [path for path in traces.directory.iterdir() if f"-{server.pid}-" in path.name]


@pytest.mark.parametrize("kind", ["http", "grpc", "metrics"])
def test_a_port_in_use_is_named_at_once(repository: Path, kind: str) -> None:
    ports = dict(zip(("http", "grpc", "metrics"), free_ports(3), strict=True))
    with socket.create_server(("127.0.0.1", ports[kind])):
        flags = [f"--{name}-port={port}" for name, port in ports.items()]
        command = [sys.executable, "-m", "gllm_client", "serve", str(repository), *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 1 and not done.stdout
    # Nothing else: no server was begun, no model loaded.
    assert done.stderr.splitlines() == [
        f"gllm serve: port {ports[kind]} on 127.0.0.1 is in use; choose another with --{kind}-port"
    ]


def test_a_plain_tritonserver_names_a_port_in_use(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        # Triton binds with SO_REUSEPORT unless told otherwise; of two equal flags the last counts.
        server = launch(
            "tritonserver", f"--model-repository={tmp_path}/models", "--reuse-http-port=0"
        )
        server.stop()
        command = [arg for arg in server.process.args if not arg.startswith("--http-port")]
        done = subprocess.run(
            [*command, f"--http-port={port}"], capture_output=True, text=True, timeout=WAIT_S
        )
    assert done.returncode != 0
    assert f"127.0.0.1:{port}" in done.stderr and "already in use" in done.stderr


def test_a_plain_tritonserver_serves_and_stops(
    launch: Launch, traces: Traces, repository: Path
) -> None:
    server = launch("tritonserver", f"--model-repository={repository}").wait_models_ready("quick")
    assert len(traces.engines()) == 1 and len(traces.stubs()) == 2
    with Streams(server, "quick", 4, max_tokens=8000) as streams:
        server.process.terminate()
        streams.wait_whole()
    assert server.wait_ended(WAIT_S) == 0
    assert not traces.processes() and not regions(server.pid)
    assert not list(traces.private.iterdir())
    assert private_directories(server, traces)  # it has become tritonserver, which knows nothing
    next_start(server)
    assert not private_directories(server, traces)


def test_sigkill_of_a_plain_tritonserver_leaves_no_orphan(
    launch: Launch, traces: Traces, repository: Path
) -> None:
    server = launch("tritonserver", f"--model-repository={repository}").wait_models_ready("quick")
    # A server, an engine, two front ends, and of each the two that render chat templates.
    assert len(traces.processes()) == 8
    with Streams(server, "quick", 2, max_tokens=8000):
        server.process.kill()
        server.process.wait()
        wait_gone(traces)
    assert not list(traces.private.iterdir())  # the engine has seen to it
    next_start(server)
    assert not private_directories(server, traces) and not regions(server.pid)


def test_without_metrics_it_serves_too_and_ends_with_its_tritonserver(
    launch: Launch, traces: Traces, repository: Path
) -> None:
    server = launch("serve", str(repository), "--", "--allow-metrics=false").wait_ready()
    with server.client("quick") as client:
        assert client.complete("Once", max_tokens=5, ignore_eos=True).num_output_tokens == 5
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://{server.metrics_address}/metrics")
    os.kill(server.triton_pid, signal.SIGKILL)
    assert server.wait_ended(SOON_S) == 128 + signal.SIGKILL
    assert server.log().endswith("tritonserver ended by itself with status 137\n")
    assert not traces.processes() and not traces.files() and not regions(server.pid)


def shared_memory_of(size: str) -> tuple[str, ...]:
    """What to put before a command for a /dev/shm of its own; skips where that is not allowed."""
    prefix = ("unshare", "--mount", "sh", "-c", IN_PRIVATE_SHM, size)
    tried = subprocess.run([*prefix, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no mount namespace can be made here: {tried.stderr.strip()}")
    return prefix


def test_prompts_beyond_the_shared_memory_are_refused_alone(
    launch: Launch, traces: Traces, tmp_path: Path
) -> None:
    write_model(tmp_path / "models", "quick", 1, device="none")
    server = launch("serve", str(tmp_path / "models"), before=shared_memory_of("40m")).wait_ready()
    huge, long = "x" * (30 << 20), "x " * 20_000

    def ask(prompt: str) -> str:
        with server.client("quick") as client:
            try:
                return str(client.complete(prompt, max_tokens=5, ignore_eos=True).num_output_tokens)
            except GenerateError as error:
                return str(error)

    prompts = ["Once", huge, "upon", huge, long, huge, "a time"] * 2
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(ask, prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        if prompt is huge:
            assert "Failed to increase the shared memory pool size" in answer
        elif prompt is long:
            assert "8192" in answer  # as many tokens as the model takes
        else:
            assert answer == "5"
    assert ask("Once") == "5"
    server.wait_idle("quick")
    assert server.stop() == 0 and not traces.processes() and not traces.files()


def test_too_little_shared_memory_to_load_is_said(
    launch: Launch, traces: Traces, repository: Path
) -> None:
    server = launch("serve", str(repository), before=shared_memory_of("8m"))
    assert server.wait_ended(WAIT_S) == 1
    last = server.log().splitlines()[-1]
    assert last.startswith("gllm serve: model quick cannot be loaded: ") and "shared memory" in last
    assert not traces.processes() and not traces.files()

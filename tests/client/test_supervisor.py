"""`gllm serve` without a tritonserver: ports, repositories, processes. With one: test_serving."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from patience import SOON_S

from gllm_client import supervisor as module
from gllm_client.__main__ import make_parser
from gllm_client.flags import struct_values
from gllm_client.openai_server.options import Options
from gllm_client.protocol import GenerateError
from gllm_client.supervisor import (
    ProcessRow,
    Server,
    Signals,
    Supervisor,
    caught_signals,
    check_ports,
    descendants,
    find_stubs,
    openai_command,
    prepare_repository,
    process_table,
    server_flags,
)
from gllm_client.tritonserver import STUB, ServerError, Serving

SLEEP = ["/bin/sleep", "60"]


def wait_for(condition: Callable[[], object], timeout_s: float = SOON_S) -> bool:
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {port} on 127.0.0.1 is in use.*--grpc-port"):
            check_ports(Serving(path=Path(), http_port=0, grpc_port=port, metrics_port=1))
    check_ports(Serving(path=Path(), http_port=0, grpc_port=port, metrics_port=18999))


def test_flags_of_ours_cannot_be_given_behind_our_back() -> None:
    flags = server_flags(
        Serving(path=Path(), grpc_port=5, arguments=("--log-verbose=1",)), Path("/r")
    )
    assert "--model-repository=/r" in flags and "--grpc-port=5" in flags
    assert flags[-1] == "--log-verbose=1"
    with pytest.raises(ServerError, match="--grpc-port is set by gllm serve"):
        server_flags(Serving(path=Path(), arguments=("--grpc-port=5",)), Path("/r"))


def test_a_port_given_twice_is_named() -> None:
    with pytest.raises(ServerError, match="port 0 is given for both http and metrics"):
        check_ports(Serving(path=Path(), http_port=0, grpc_port=18998, metrics_port=0))


def test_the_openai_servers_port_is_checked_and_its_flags_are_flags_of_its_command() -> None:
    ports = {"http_port": 0, "grpc_port": 18997, "metrics_port": 1}
    with pytest.raises(ServerError, match="port 18998 is given for both"):
        check_ports(Serving(path=Path(), **ports | {"metrics_port": 18998}, openai_port=18998))
    serving = Serving(
        path=Path(),
        host="::",
        openai_port=9,
        openai={"api_key_file": "keys", "allow_origin": ("https://a", "https://b")},
    )
    _, *command = openai_command(serving, "[::1]")
    options = make_parser().parse_args(command[2:])
    assert Options(**struct_values(options, Options)) == Options(
        url="grpc://[::1]:8001",
        host="::",
        port=9,
        metrics_url="http://[::1]:8002/metrics",
        drain_timeout_s=serving.exit_timeout_s,
        api_key_file="keys",
        allow_origin=("https://a", "https://b"),
    )


def test_a_checkpoint_becomes_a_repository(tmp_path: Path) -> None:
    checkpoint, private = tmp_path / "tiny", tmp_path / "private"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    serving = Serving(path=checkpoint, engine={"max_num_seqs": 8}, front_ends=3)
    assert prepare_repository(serving, private) == (private, ["tiny"])
    assert json.loads((private / "tiny/1/model.json").read_text()) == {
        "model": str(checkpoint),
        "max_num_seqs": 8,
    }
    config = (private / "tiny/config.pbtxt").read_text().splitlines()
    assert config[0] == 'backend: "gllm"' and len(config) == 3
    assert config[2] == "instance_group [{ count: 3 kind: KIND_MODEL }]"
    assert prepare_repository(Serving(path=checkpoint, name="other"), private)[1] == ["other"]
    with pytest.raises(ServerError, match="'a b' cannot be a model's name"):
        prepare_repository(Serving(path=checkpoint, name="a b"), private)


def test_a_repository_is_served_as_it_is(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"repo/{name}/1").mkdir(parents=True)
        (tmp_path / f"repo/{name}/config.pbtxt").touch()
    (tmp_path / "repo/notes").mkdir()
    (tmp_path / "private").mkdir()
    repository = tmp_path / "repo"
    found = prepare_repository(Serving(path=repository), tmp_path / "private")
    assert found == (repository, ["a", "b"])
    one = prepare_repository(Serving(path=repository / "a"), tmp_path / "private")
    assert one == (tmp_path / "private", ["a"])
    assert (tmp_path / "private/a/1").is_dir()
    with pytest.raises(ServerError, match="is not a checkpoint .*model.json"):
        prepare_repository(Serving(path=repository, engine={"page_size": 8}), tmp_path)
    with pytest.raises(ServerError, match="neither a checkpoint"):
        prepare_repository(Serving(path=tmp_path / "private/a/1"), tmp_path)


def test_the_family_of_a_process_is_found() -> None:
    script = "sleep 60 & sh -c 'sleep 60 & wait' & wait"
    with subprocess.Popen(["/bin/sh", "-c", script], start_new_session=True) as shell:
        try:
            assert wait_for(lambda: len(descendants(shell.pid)) == 3)
            rows = descendants(shell.pid)
            assert shell.pid in {row.parent for row in rows}
            assert shell.pid not in {row.pid for row in rows}
            assert descendants(os.getpid()) >= rows
        finally:
            os.killpg(shell.pid, signal.SIGKILL)


def test_a_zombie_does_not_run() -> None:
    child = subprocess.Popen(["true"])
    path = Path(f"/proc/{child.pid}/stat")
    assert wait_for(lambda: path.read_text().rpartition(")")[2].split()[0] == "Z")
    assert child.pid not in process_table()
    child.wait()


class Stubs:
    """Children of this process that look as the server's stubs do."""

    def __init__(self, repository: Path) -> None:
        self._repository = repository
        self._children: list[subprocess.Popen[bytes]] = []

    def start(self, model: str) -> subprocess.Popen[bytes]:
        script = self._repository / model / "1/model.py"
        if not script.exists():  # a shell may be about to read it, and ends if it is empty
            script.parent.mkdir(parents=True)
            script.write_text("read line")
        child = subprocess.Popen(
            [f"/backends/gllm/{STUB}", str(script), "region"],
            executable="/bin/sh",
            stdin=subprocess.PIPE,
        )
        self._children.append(child)
        wait_for(lambda: child.pid in {row.pid for row in find_stubs(os.getpid()).get(model, ())})
        return child

    def close(self) -> None:
        for child in self._children:
            child.kill()
            child.communicate()


@pytest.fixture
def stubs(tmp_path: Path) -> Iterator[Stubs]:
    stubs = Stubs(tmp_path / "repo")
    yield stubs
    stubs.close()


def test_stubs_are_found_by_model(stubs: Stubs) -> None:
    pids = {stubs.start("m").pid, stubs.start("m").pid}
    other = stubs.start("n")
    found = find_stubs(os.getpid())
    assert {row.pid for row in found["m"]} == pids and len(found["n"]) == 1
    other.kill()
    assert wait_for(lambda: "n" not in find_stubs(os.getpid()))
    assert find_stubs(min(pids)) == {}


def test_the_server_ends_with_its_parent(tmp_path: Path) -> None:
    """SIGKILL of `gllm serve` leaves no server behind."""
    code = (
        "import os, time; from gllm_client.supervisor import Server\n"
        f"server = Server({SLEEP!r}, dict(os.environ))\n"
        "print(server.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        server = int(parent.stdout.readline())
        command = Path(f"/proc/{server}/cmdline")
        assert wait_for(lambda: command.read_text().startswith("/bin/sleep"))
        parent.kill()
        assert wait_for(lambda: server not in process_table())


@pytest.mark.parametrize("stubborn", [False, True])
def test_stopping_leaves_nothing(stubborn: bool) -> None:
    """The server's child has a session of its own and outlives it: it is found all the same."""
    ignore = "trap '' TERM; " if stubborn else ""
    script = f"{ignore}setsid sleep 60 & while :; do sleep 0.1; done"
    server = Server(["/bin/sh", "-c", script], dict(os.environ))
    assert wait_for(lambda: len(descendants(server.pid)) >= 2)
    family = {row.pid for row in descendants(server.pid)}
    began = time.monotonic()
    assert server.stop(0.5, lambda: False) is not stubborn
    assert time.monotonic() - began < SOON_S
    assert not family & process_table().keys()
    assert server.poll() == (128 + signal.SIGKILL if stubborn else 128 + signal.SIGTERM)


def test_a_server_that_dies_by_itself_leaves_nothing() -> None:
    server = Server(["/bin/sh", "-c", "setsid sleep 60 & wait"], dict(os.environ))
    assert wait_for(lambda: len(descendants(server.pid)) == 1)
    (orphan,) = descendants(server.pid)
    assert wait_for(lambda: server.poll() is None and server.family == {orphan})
    os.kill(server.pid, signal.SIGKILL)
    assert wait_for(lambda: server.poll() is not None)
    assert orphan.pid in process_table()
    server.stop(0.5, lambda: False)
    assert orphan.pid not in process_table()


def test_impatience_cuts_the_wait_short() -> None:
    server = Server(["/bin/sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"], {})
    assert wait_for(lambda: descendants(server.pid))
    began = time.monotonic()
    assert server.stop(60, lambda: True) is False
    assert time.monotonic() - began < SOON_S


def test_signals_are_counted_while_serving() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with caught_signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert wait_for(lambda: signals.count == 2)
    assert signal.getsignal(signal.SIGTERM) is before


class FakeServer:
    """This process stands in for the server; its children for the stubs."""

    pid = os.getpid()

    def __init__(self) -> None:
        self.family: set[ProcessRow] = set()
        self.status: int | None = None
        self.stopped = False

    def poll(self) -> int | None:
        return self.status

    def look(self) -> None:
        """Nothing: the children are found when they are counted."""

    def stop(self, timeout_s: float, impatient: Callable[[], bool]) -> bool:
        self.stopped = True
        return True


class FakeClient:
    """A server with model m of two instances; loading starts its stubs anew."""

    def __init__(self, stubs: Stubs) -> None:
        self.stubs, self.calls, self.state = stubs, list[str](), "UNAVAILABLE"
        self.failures = 0
        self.pids: list[int] = []

    def is_live(self, timeout: float) -> bool:
        return True

    def load(self, model: str) -> None:
        self.calls.append("load")
        if self.failures:
            self.failures -= 1
            raise GenerateError("no such weights;")
        self.pids = [self.stubs.start(model).pid for _ in range(2)]
        self.state = "READY"

    def unload(self, model: str) -> None:
        self.calls.append("unload")
        self.state = "UNAVAILABLE"

    def index(self) -> list[dict[str, str]]:
        return [{"name": "m", "state": self.state}]

    def num_stubs(self, model: str) -> int:
        return 2

    def close(self) -> None: ...


class Watched:
    """A supervisor at work on a thread of its own."""

    def __init__(self, client: FakeClient) -> None:
        self.client, self.server, self.signals = client, FakeServer(), Signals()
        self.supervisor = Supervisor(self.server, Serving(path=Path()), ["m"], self.signals)  # type: ignore[arg-type]
        self.status: int | None = None
        self.looks = self.counts = 0  # at the known stubs, and of all of them
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.status = self.supervisor.run()

    def wait_looks(self, count: int) -> None:
        """Until the stubs have been looked at so many times more."""
        until = self.looks + count
        assert wait_for(lambda: self.looks >= until)

    def join(self) -> int | None:
        self._thread.join(SOON_S)
        return self.status


@pytest.fixture
def metrics() -> dict[str, float]:
    """What the server's /metrics tells."""
    return {}


@pytest.fixture
def watched(
    stubs: Stubs, metrics: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Watched]:
    client = FakeClient(stubs)
    monkeypatch.setattr(module, "SyncClient", lambda address: client)
    monkeypatch.setattr(module, "read_metrics", lambda address: metrics)
    monkeypatch.setattr(module, "ENGINES_S", 0.1)
    watched = Watched(client)
    find = find_stubs
    is_intact = Supervisor._is_intact

    def find_and_count(server_pid: int) -> dict[str, set[ProcessRow]]:
        watched.counts += 1
        return find(server_pid)

    def look_and_count(supervisor: Supervisor) -> bool:
        watched.looks += 1
        return is_intact(supervisor)

    monkeypatch.setattr(module, "find_stubs", find_and_count)
    monkeypatch.setattr(Supervisor, "_is_intact", look_and_count)
    yield watched
    watched.signals.count += 1
    watched.join()


def test_a_dead_stub_means_a_reload(watched: Watched, capfd: pytest.CaptureFixture[str]) -> None:
    client = watched.client
    assert wait_for(lambda: len(client.pids) == 2)
    watched.wait_looks(3)  # all is well: nothing happens
    assert client.calls == ["load"]
    for round in (1, 2):  # the second time the first load's other stub still lives
        victim = client.pids[0]
        os.kill(victim, signal.SIGKILL)
        assert wait_for(lambda: client.calls == ["load", *["unload", "load"] * round])  # noqa: B023
        assert wait_for(lambda: capfd.readouterr().err.count("model m is back after") == 1)
        assert victim not in client.pids


def test_all_processes_are_looked_at_only_when_some_have_changed(watched: Watched) -> None:
    assert wait_for(lambda: watched.supervisor._settled)
    watched.wait_looks(1)
    counts = watched.counts
    watched.wait_looks(3)
    assert watched.counts == counts
    watched.server.family = {ProcessRow(1, 1, 1)}
    watched.wait_looks(2)
    assert watched.counts == counts + 1


def test_descendants_are_recorded_the_more_rarely_the_longer_they_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    looks: list[float] = []
    family = {ProcessRow(1, 1, 1)}
    monkeypatch.setattr(module, "descendants", lambda pid: looks.append(now) or set(family))
    server = Server(SLEEP, dict(os.environ))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    for tick in range(400):
        now = 100 + tick / 10
        if now == 130:
            family.add(ProcessRow(2, 1, 1))
        assert server.poll() is None
    monkeypatch.undo()
    server.stop(0, lambda: True)
    pauses = [after - before for before, after in pairwise(looks)]
    assert pauses[:7] == pytest.approx([0.6, 1.1, 2.1, 4.1, 8.1, 8.1, 8.1], abs=0.11)
    changed = next(i for i, at in enumerate(looks) if at >= 130)
    assert pauses[changed] < 0.8 and len(looks) < 14


def test_a_signal_and_the_servers_end_are_seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after the pause that they come in."""
    monkeypatch.setattr(module, "WATCH_S", 60.0)
    for end in (signal.SIGTERM, signal.SIGKILL):
        server = Server(SLEEP, dict(os.environ))
        with caught_signals() as signals:
            supervisor = Supervisor(server, Serving(path=Path()), [], signals)
            target = os.getpid() if end == signal.SIGTERM else server.pid
            threading.Timer(0.2, os.kill, (target, end)).start()
            began = time.monotonic()
            with pytest.raises((module.Stopped, module.Exited)):
                supervisor._pause(60)
            assert time.monotonic() - began < SOON_S
            supervisor._stop()


def test_a_stopped_stub_is_killed_and_replaced(
    watched: Watched, capfd: pytest.CaptureFixture[str]
) -> None:
    """tritonserver would not survive that it goes on, and its requests hang until then."""
    client = watched.client
    assert wait_for(lambda: len(client.pids) == 2)
    victim, other = client.pids
    os.kill(victim, signal.SIGSTOP)
    assert wait_for(lambda: client.calls == ["load", "unload", "load"])
    assert wait_for(lambda: "model m is back after" in (err := capfd.readouterr().err) and err)
    assert victim not in process_table() and other in process_table()
    watched.wait_looks(3)
    assert client.calls == ["load", "unload", "load"]


def test_a_reload_that_fails_is_tried_again(watched: Watched) -> None:
    client = watched.client
    assert wait_for(lambda: len(client.pids) == 2)
    client.failures = 2
    os.kill(client.pids[1], signal.SIGKILL)
    assert wait_for(lambda: client.calls == ["load", *["unload", "load"] * 3])
    assert watched.status is None


def test_a_reload_that_keeps_failing_ends_the_program(watched: Watched) -> None:
    client = watched.client
    assert wait_for(lambda: len(client.pids) == 2)
    client.failures = 99
    os.kill(client.pids[1], signal.SIGKILL)
    assert watched.join() == 1 and watched.server.stopped


def test_an_engine_that_cannot_be_got_back_ends_the_program(
    watched: Watched, metrics: dict[str, float], capfd: pytest.CaptureFixture[str]
) -> None:
    sample = 'gllm:engine_failed_starts{model="m",version="1"}'
    for count in (0.0, module.MAX_FAILED_STARTS - 1.0):
        metrics |= {sample: count, "nv_gpu_utilization": 99.0}
        looked = threading.Event()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "read_metrics", lambda address: looked.set() or metrics)  # noqa: B023
            assert looked.wait(10)
        assert watched.status is None
    metrics[sample] = module.MAX_FAILED_STARTS
    assert watched.join() == 1 and watched.server.stopped
    assert "model m has lost its engine, and 5 attempts to start another" in capfd.readouterr().err


def test_metrics_may_be_switched_off(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()

    def refuse(address: str) -> dict[str, float]:
        asked.set()
        raise GenerateError("no server listens")

    monkeypatch.setattr(module, "read_metrics", refuse)
    assert asked.wait(10)
    os.kill(watched.client.pids[0], signal.SIGKILL)
    assert wait_for(lambda: watched.client.calls == ["load", "unload", "load"])


def test_a_model_that_was_unloaded_stays_so(watched: Watched) -> None:
    client = watched.client
    assert wait_for(lambda: len(client.pids) == 2)
    client.state = "UNAVAILABLE"
    for pid in client.pids:
        os.kill(pid, signal.SIGKILL)
    watched.wait_looks(3)
    assert client.calls == ["load"] and watched.status is None


@pytest.mark.parametrize(("ended_with", "status"), [(7, 7), (0, 1)])
def test_the_server_ending_by_itself_ends_the_program(
    watched: Watched, capfd: pytest.CaptureFixture[str], ended_with: int, status: int
) -> None:
    assert wait_for(lambda: watched.client.state == "READY")
    watched.server.status = ended_with
    assert watched.join() == status
    assert f"ended by itself with status {ended_with}" in capfd.readouterr().err


def test_a_signal_ends_the_program(watched: Watched, capfd: pytest.CaptureFixture[str]) -> None:
    ready: list[str] = []
    assert wait_for(lambda: ready.append(capfd.readouterr().out) or any(ready))
    assert "".join(ready) == (
        "ready: m at http://127.0.0.1:8000 grpc://127.0.0.1:8001 "
        "metrics http://127.0.0.1:8002/metrics\n"
    )
    watched.signals.count = 1
    assert watched.join() == 0 and watched.server.stopped


def test_a_model_that_cannot_be_loaded_ends_the_program(
    stubs: Stubs, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    client = FakeClient(stubs)
    client.failures = 1
    monkeypatch.setattr(module, "SyncClient", lambda address: client)
    assert Watched(client).join() == 1
    assert capfd.readouterr().err == "gllm serve: model m cannot be loaded: no such weights\n"


def test_process_rows_tell_a_pid_taken_over() -> None:
    mine = process_table()[os.getpid()]
    assert mine == ProcessRow(os.getpid(), os.getppid(), mine.start) and mine.start > 0

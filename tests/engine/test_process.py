"""The engine as a process: joined, shared, replaced, killed, outlived by nobody.

Each test is an owner of its own (a sleeping process), so that scopes never meet. Front ends are
threads of this process or, where one must die, processes that run this file.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import zmq

import gllm_engine  # its write_tiny_model needs torch, which processes that run this file do not
from gllm_engine import (
    EngineClient,
    EngineConfig,
    EngineError,
    EngineUnavailable,
    ModelInfo,
    Outputs,
    Request,
    SamplingParams,
    Stats,
    heartbeat,
    make_config,
    wire,
)
from gllm_engine.engine import attach, core, process
from gllm_engine.engine import client as client_module
from gllm_engine.engine.attach import (
    _LONGEST_HOME,
    _SOCKET,
    EngineRecord,
    _locked,
    _remove,
    _root,
)
from gllm_engine.engine.null_runner import NullRunner, NullStep
from gllm_engine.engine.process import BROKEN, EngineProcess, close, listen, main
from gllm_engine.images.video import Task
from gllm_engine.images.video_rule import Stamped
from gllm_engine.os_process import Process, pid_namespace, wait_end
from gllm_engine.sched import IntegrityError
from gllm_engine.socket_directory import socket_parent
from gllm_engine.types import Image, StepPlan

# As patience.py's, which a process that runs this file does not find.
WAIT_S = 180.0
SOON_S = 15.0
DRAIN_S = 1.0
ENDLESS = SamplingParams(max_tokens=None, ignore_eos=True)
BUSY_S = 4.0
MANY, LONG = 2000, 20_000  # messages that are not sent in no time, and characters in each


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    gllm_engine.write_tiny_model(path, "Qwen3ForCausalLM")
    return str(path)


@pytest.fixture
def owner() -> Iterator[int]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process.pid
        process.kill()


@contextlib.contextmanager
def running_elsewhere(model: str, owner: int, instance: str) -> Iterator[subprocess.Popen[bytes]]:
    """A front end in a process of its own, with an endless sequence; killed at the end."""
    command = [sys.executable, __file__, model, str(owner), instance]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"running\n"
            yield process
        finally:
            process.kill()


def front_ends(owner: int) -> dict[str, Process]:
    """Those on record, by instance name."""
    process = Process.of(owner)
    assert process is not None
    records = _root().glob(f"{process.pid}.{process.start}/*/record.json")
    found = [msgspec.json.decode(path.read_bytes(), type=EngineRecord) for path in records]
    return {name: front for record in found for name, front in record.front_ends.items()}


class Front:
    """A front end that keeps what it is told."""

    owner: int

    def __init__(self, model: str, owner: int, instance: str = "m_0_0", **config: Any) -> None:
        self.outputs: queue.Queue[Any] = queue.Queue()
        self.stats: list[Any] = []
        self.lost: list[str] = []
        self.client = EngineClient(
            make_config({"model": model, "device": "none", "drain_timeout_s": DRAIN_S, **config}),
            scope="m/1",
            instance=instance,
            owner_pid=owner,
            on_outputs=self.outputs.put,
            on_stats=self.stats.append,
            on_lost=self.lost.append,
        )

    @property
    def engine(self) -> Process:
        return self.client._engine.attached.engine

    def generate(self, id: int = 1, num: int = 5) -> list[int]:
        params = SamplingParams(max_tokens=num, ignore_eos=True)
        self.client.submit([Request(id, [3, 4, 5], params, 7)])
        return self.collect(id)

    def collect(self, id: int) -> list[int]:
        tokens: list[int] = []
        while True:
            outputs = self.outputs.get(timeout=WAIT_S)
            tokens += [t for i, t in zip(outputs.ids, outputs.tokens, strict=True) if i == id]
            if id in outputs.finished:
                return tokens


def until(condition: Callable[[], bool], timeout_s: float = WAIT_S) -> float:
    """Wait for it; returns the seconds it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout_s, "waited in vain"
        time.sleep(0.01)
    return time.monotonic() - start


def test_generates_and_ends_with_its_only_front_end(model: str, owner: int) -> None:
    front = Front(model, owner)
    assert front.client.info.vocab_size == 384
    assert len(front.generate(1, 5)) == 5
    assert len(front.generate(2, 7)) == 7
    engine = front.engine
    assert "libtorch" not in Path(f"/proc/{engine.pid}/maps").read_text()  # slow to import
    directory = front.client._engine.attached.directory
    assert directory.stat().st_mode & 0o777 == 0o700
    front.client.close()
    assert not engine.alive
    assert not directory.exists()
    assert front.lost == []
    with pytest.raises(EngineUnavailable, match="unloaded"):
        front.client.submit([])


def test_an_unloaded_engine_writes_its_timeline(model: str, owner: int, tmp_path: Path) -> None:
    from trace_checks import read_trace, tracks  # processes that run this file do not find it

    path = tmp_path / "out.json"
    front = Front(model, owner, timeline=str(path))
    assert len(front.generate(1, 30)) == 30
    assert path.read_bytes() == b""
    front.client.close()
    trace = read_trace(path)
    (share,) = trace["otherData"]["summary"]["shares"]
    assert share["busy"] == 0 < share["host_bound"]  # no device computes here
    (events,) = tracks(trace).values()
    assert {"plan", "dispatch", "commit", "between steps"} <= {each["name"] for each in events}
    with pytest.raises(EngineError, match="timeline: .* cannot be written"):
        Front(model, owner, timeline=str(tmp_path))


def test_front_ends_share_one_engine_until_the_last_leaves(model: str, owner: int) -> None:
    a, b = Front(model, owner, "m_0_0"), Front(model, owner, "m_0_1")
    assert a.engine == b.engine
    assert front_ends(owner).keys() == {"m_0_0", "m_0_1"}
    assert len(a.generate(1)) == len(b.generate(1)) == 5  # ids are each front end's own
    a.client.close()
    assert a.engine.alive
    assert len(b.generate(2)) == 5
    b.client.close()
    assert not b.engine.alive
    assert front_ends(owner) == {}


def test_statistics_go_to_one_front_end_and_start_at_zero(model: str, owner: int) -> None:
    a, b = Front(model, owner, "m_0_0"), Front(model, owner, "m_0_1")
    a.generate(1, 50)
    until(lambda: bool(a.stats) and a.stats[-1].steps >= 50)
    assert not b.stats
    a.client.close()
    b.generate(1, 5)
    until(lambda: bool(b.stats))
    assert b.stats[-1].steps < 50
    b.client.close()


def test_a_killed_engine_is_lost_at_once_and_comes_back(model: str, owner: int) -> None:
    a, b = Front(model, owner, "m_0_0"), Front(model, owner, "m_0_1")
    a.client.submit([Request(1, [3], SamplingParams(max_tokens=None, ignore_eos=True), 7)])
    old = a.engine
    os.kill(old.pid, signal.SIGKILL)
    assert until(lambda: bool(a.lost and b.lost)) < SOON_S
    assert "restarted" in a.lost[0]

    def serves(front: Front) -> bool:
        try:
            return len(front.generate(2)) == 5
        except EngineUnavailable as error:
            assert "restarted" in str(error)
            return False

    until(lambda: serves(a))
    until(lambda: serves(b))
    assert a.engine == b.engine != old
    assert len(a.lost) == len(b.lost) == 1
    a.client.close()
    b.client.close()


def popen_fragile(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """In place of attach's Popen: an engine with the runner _Fragile."""
    return subprocess.Popen([command[0], __file__, "fragile", *command[-2:]], **options)


def popen_busy(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """In place of attach's Popen: an engine whose steps take BUSY_S, without any other thread."""
    return subprocess.Popen([command[0], __file__, "busy", *command[-2:]], **options)


@pytest.mark.parametrize("bad", [1, 3], ids=["dead device", "failing steps"])
def test_a_broken_engine_ends_and_another_comes(
    model: str, owner: int, bad: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`bad`: the token that breaks it, which is also after how many failed steps it ends."""
    fragile = SimpleNamespace(Popen=popen_fragile, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr("gllm_engine.engine.attach.subprocess", fragile)
    front, other = Front(model, owner, "m_0_0"), Front(model, owner, "m_0_1")
    first, child = front.engine, front.client._engine.attached.child
    assert child is not None and len(front.generate(1)) == 5
    endless = SamplingParams(max_tokens=None, ignore_eos=True)
    for id in range(2, 2 + bad):
        assert first.alive and not front.lost
        front.client.submit([Request(id, [bad], endless, 7)])
        while not (outputs := front.outputs.get(timeout=WAIT_S)).finished:
            continue
        assert outputs.finished[id].status == "internal"
        assert "The engine failed in a step" in outputs.finished[id].message
    until(lambda: bool(front.lost and other.lost))
    sentences = {
        1: "the engine's device can compute nothing any more (Fault)",
        3: "3 steps of the engine failed in a row (Fault)",
    }
    assert front.lost == other.lost == [f"{sentences[bad]}; it is being restarted"]

    def serves() -> bool:
        with contextlib.suppress(EngineUnavailable):
            return len(front.generate(9)) == 5
        return False

    until(serves)
    assert front.engine != first and child.wait() == BROKEN
    front.client.close()
    other.client.close()


def test_a_stopped_engine_is_killed_and_another_comes(
    model: str, owner: int, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = Front(model, owner, "m_0_0"), Front(model, owner, "m_0_1")
    a.client.submit([Request(1, [3], ENDLESS, 7)])
    old = a.engine
    os.kill(old.pid, signal.SIGSTOP)
    until(lambda: bool(a.lost and b.lost))
    assert not old.alive
    silent = "the engine has not answered for 5 s or more and has not ended: it is stopped, or"
    assert silent in caplog.text
    assert any(silent in sentence and "restarted" in sentence for sentence in a.lost + b.lost)
    until(lambda: a.client.trouble is None and b.client.trouble is None)
    assert len(a.generate(2)) == len(b.generate(2)) == 5 and a.engine == b.engine != old
    a.client.close()
    b.client.close()


def test_images_that_the_engine_has_not_read_are_bounded(
    model: str, owner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is counted until then, whatever becomes of its request: this model takes none."""
    monkeypatch.setattr(client_module, "MAX_UNREAD_BYTES", 100)
    front = Front(model, owner)

    def submit(id: int, size: int) -> None:
        image = Image(b"%16d" % id, 0, 1, 1, 1, 1, 1, bytes(size))
        front.client.submit([Request(id, [3], ENDLESS, 7, images=(image, image))])

    submit(1, 1000)  # alone it may be larger
    assert not front.collect(1) and not front.client._unread
    os.kill(front.engine.pid, signal.SIGSTOP)
    submit(2, 60)
    submit(3, 40)
    with pytest.raises(EngineUnavailable, match="not read 100 bytes .* with these 1 .* than 100"):
        submit(4, 1)
    front.client.submit([Request(5, [3], ENDLESS, 7)])
    os.kill(front.engine.pid, signal.SIGCONT)
    finished: set[int] = set()
    while not finished >= {2, 3}:
        finished |= front.outputs.get(timeout=WAIT_S).finished.keys()
    submit(6, 99)
    assert not front.collect(6)
    front.client.close()


def test_an_engine_that_is_stopped_for_a_moment_goes_on(model: str, owner: int) -> None:
    front = Front(model, owner)
    front.client.submit([Request(1, [3], ENDLESS, 7)])
    os.kill(front.engine.pid, signal.SIGSTOP)
    time.sleep(heartbeat.ENGINE / 1000 / 2)
    os.kill(front.engine.pid, signal.SIGCONT)
    while not front.outputs.empty():
        front.outputs.get()
    assert front.outputs.get(timeout=WAIT_S).ids == [1] and not front.lost
    front.client.close()


def test_an_engine_that_is_stopped_at_its_start_is_killed(
    model: str, owner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gllm_engine.engine.client.OPEN_S", 1.0)

    def stop_at_once(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(command, **options)
        child.send_signal(signal.SIGSTOP)
        return child

    stopped = SimpleNamespace(Popen=stop_at_once, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr("gllm_engine.engine.attach.subprocess", stopped)
    with pytest.raises(EngineError, match="not opened its socket in 1 s and has not ended"):
        Front(model, owner)
    assert not engines(owner) and not list(_root().glob(f"{owner}.*"))


def test_an_engine_that_is_stopped_while_it_loads_is_killed(
    model: str, owner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    children: list[subprocess.Popen[bytes]] = []

    def load_long(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        child = subprocess.Popen([command[0], __file__, "loading", *command[-2:]], **options)
        children.append(child)
        return child

    loading = SimpleNamespace(Popen=load_long, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr("gllm_engine.engine.attach.subprocess", loading)
    watches: list[heartbeat.ConnectionWatch] = []

    class Watch(heartbeat.ConnectionWatch):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            watches.append(self)

    monkeypatch.setattr(heartbeat, "ConnectionWatch", Watch)
    with ThreadPoolExecutor(1) as pool:
        front = pool.submit(Front, model, owner)
        until(lambda: bool(watches) and watches[0].connected)
        children[0].send_signal(signal.SIGSTOP)
        with pytest.raises(EngineError, match="not answered for 5 s or more and has not ended"):
            front.result(WAIT_S)
    assert children[0].poll() is not None and not list(_root().glob(f"{owner}.*"))


def test_a_busy_engine_is_left_alone(
    model: str, owner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the interpreter's lock for longer than heartbeats may stay without an answer."""
    busy = SimpleNamespace(Popen=popen_busy, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr("gllm_engine.engine.attach.subprocess", busy)
    monkeypatch.setattr(heartbeat, "ENGINE", 1_000)
    monkeypatch.setattr("gllm_engine.engine.client.END_S", 0.5)
    front = Front(model, owner)
    engine = front.engine
    start = time.monotonic()
    assert len(front.generate()) == 5
    assert time.monotonic() - start > BUSY_S and front.engine == engine and not front.lost
    front.client.close()


def test_the_engine_dies_with_its_owner(model: str) -> None:
    sleeper = subprocess.Popen(["sleep", "600"])
    front = Front(model, sleeper.pid)
    directory = front.client._engine.attached.directory
    front.client.submit([Request(1, [3], SamplingParams(max_tokens=None, ignore_eos=True), 7)])
    sleeper.kill()
    sleeper.wait()
    assert until(lambda: not front.engine.alive) < SOON_S
    until(lambda: not directory.exists())
    front.client.close()


@pytest.mark.parametrize("end", ["orderly", "broken"])
def test_what_is_the_owners_goes_whichever_thread_ends_the_engine(model: str, end: str) -> None:
    """Its front ends die with the owner, and the main thread may see that before the watch does."""
    sleeper = subprocess.Popen(["sleep", "600"])
    owner = Process.of(sleeper.pid)
    assert owner is not None
    theirs = _root() / f"{owner.pid}.{owner.start}"
    directory = theirs / "scope/1"
    directory.mkdir(parents=True)
    config = make_config({"model": model, "device": "none"})
    (directory / "config.json").write_bytes(msgspec.json.encode(config))
    command = [sys.executable, __file__, f"unwatched {end}", str(directory), str(owner.pid)]
    engine = subprocess.Popen(command)
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(f"ipc://{directory}/engine.sock")
        socket.send_multipart(wire.encode(wire.Hello(wire.PROTOCOL, os.getpid())))
        assert socket.poll(WAIT_S * 1000)  # it is loaded
    sleeper.kill()
    sleeper.wait()
    engine.terminate()
    assert engine.wait(WAIT_S) == (BROKEN if end == "broken" else 0)
    assert not theirs.exists()


def test_a_front_end_that_dies_takes_only_its_own_sequences(model: str, owner: int) -> None:
    ours = Front(model, owner, "m_0_0")
    with running_elsewhere(model, owner, "m_0_1"):
        until(lambda: bool(ours.stats) and ours.stats[-1].running == 1)
    until(lambda: ours.stats[-1].running == 0)
    assert ours.stats[-1].kv_usage == 0
    assert len(ours.generate(1)) == 5
    assert [name for name, f in front_ends(owner).items() if not f.alive] == ["m_0_1"]
    ours.client.close()
    assert not ours.engine.alive


def put_on_record(front: Front, front_ends: dict[str, Process]) -> None:
    path = front.client._engine.attached.directory.parent / "record.json"
    record = msgspec.json.decode(path.read_bytes(), type=EngineRecord)
    record.front_ends = front_ends
    path.write_bytes(msgspec.json.encode(record))


@pytest.mark.parametrize("instances", [("m_0_0", "m_0_1"), ("m_0_1", "m_0_0")])
def test_a_new_load_repairs_one_that_lost_a_front_end(
    model: str, owner: int, instances: tuple[str, str]
) -> None:
    """Whichever front end comes first: the engine stays, and what the living one runs goes on.

    Triton never ends the living one. The engine ends with the new load all the same.
    """
    survivor = Front(model, owner, "m_0_1")
    engine = survivor.engine
    older = Process.of(os.getppid())  # stands for the survivor, which a new load is younger than
    assert older is not None
    put_on_record(survivor, {"m_0_0": Process(older.pid, 1), "m_0_1": older})
    new = [Front(model, owner, name) for name in instances]
    assert front_ends(owner).keys() == {"m_0_0", "m_0_1"} and engines(owner) == [engine.pid]
    for front in (survivor, *new):
        assert front.engine == engine and len(front.generate()) == 5 and not front.lost
    for front in new:
        front.client.close()
    assert not engine.alive
    until(lambda: bool(survivor.lost))
    survivor.client.close()
    assert not list(_root().glob(f"{owner}.*"))


def test_front_ends_that_leave_while_the_engine_restarts_leave_nothing(
    model: str, owner: int
) -> None:
    """One has started the next engine and leaves first; the other has not joined it yet."""
    a, b = Front(model, owner, "m_0_0"), Front(model, owner, "m_0_1")
    old = a.engine
    with contextlib.ExitStack() as stack:
        rejoin = b.client._rejoin
        let_go = threading.Event()
        stack.callback(let_go.set)
        b.client._rejoin = lambda why: let_go.wait(WAIT_S) and rejoin(why)  # type: ignore[method-assign]
        os.kill(old.pid, signal.SIGKILL)
        until(lambda: a.engine != old and a.client.trouble is None)
        a.client.close()
        assert list(front_ends(owner)) == ["m_0_1"]
        b.client._closing = True  # as close() does, which would wait
    b.client._thread.join(WAIT_S)
    assert not engines(owner) and not list(_root().glob(f"{owner}.*"))
    os.close(b.client._wake)


def test_a_load_that_fails_at_once_leaves_nothing(
    model: str, owner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(config: EngineConfig) -> str:
        raise EngineError("the checkpoint is gone")

    monkeypatch.setattr("gllm_engine.engine.attach._fingerprint", refuse)
    with pytest.raises(EngineError, match="is gone"):
        Front(model, owner)
    assert not list(_root().glob(f"{owner}.*"))


def test_an_engine_whose_owner_is_gone_leaves_nothing(model: str) -> None:
    """It is killed, or ends, before it could watch its owner; the next sweep is not needed."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    directory = _root() / f"{gone.pid}.1/scope/1"
    directory.mkdir(parents=True)
    command = [sys.executable, "-m", "gllm_engine.engine.process", str(directory), str(gone.pid)]
    assert subprocess.run(command, timeout=WAIT_S).returncode == 1
    assert not directory.parents[1].exists()


def test_a_reload_waits_for_running_work_and_gets_a_new_engine(model: str, owner: int) -> None:
    with running_elsewhere(model, owner, "m_0_0") as older:
        start = time.monotonic()
        with running_elsewhere(model, owner, "m_0_0") as newer:
            assert time.monotonic() - start >= DRAIN_S  # the other's endless work was waited for
            assert older.stdout is not None and older.stdout.readline() == b"lost\n"
            assert older.stdout.readline() == b"stale: a newer load of this model is serving\n"
            assert [f.pid for f in front_ends(owner).values()] == [newer.pid]


def test_changed_files_mean_another_engine(tmp_path: Path, owner: int) -> None:
    gllm_engine.write_tiny_model(tmp_path, "Qwen3ForCausalLM")
    a = Front(str(tmp_path), owner, "m_0_0")
    first = a.engine
    (tmp_path / "model.safetensors").touch()
    b = Front(str(tmp_path), owner, "m_0_1")
    assert b.engine != first

    def stale() -> bool:
        with pytest.raises(EngineUnavailable) as caught:
            a.client.submit([])
        return "a newer load" in str(caught.value)

    until(lambda: bool(a.lost) and stale())
    assert len(b.generate()) == 5
    a.client.close()
    b.client.close()
    assert not b.engine.alive


def test_processes_agree_on_what_they_serve(tmp_path: Path) -> None:
    """A tokenizer of its own directory: strings hash differently in every process."""
    for name in ("model", "tokenizer"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    script = (
        "import sys; from gllm_engine import make_config; from gllm_engine.engine import attach\n"
        "config = make_config({'model': sys.argv[1], 'tokenizer': sys.argv[2]})\n"
        "print(attach._fingerprint(config))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "model"), str(tmp_path / "tokenizer")]
    found = {
        subprocess.run(
            command,
            env=os.environ | {"PYTHONHASHSEED": str(seed)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in range(5)
    }
    assert len(found) == 1


def test_sigterm_lets_work_end_first(model: str, owner: int) -> None:
    front = Front(model, owner, drain_timeout_s=30)
    params = SamplingParams(max_tokens=1500, ignore_eos=True)
    front.client.submit([Request(1, [3], params, 7)])
    engine = front.engine
    front.outputs.get(timeout=WAIT_S)
    os.kill(engine.pid, signal.SIGTERM)
    assert len(front.collect(1)) == 1499
    until(lambda: not engine.alive)
    front.client.close()


def test_what_an_engine_said_last_is_heard(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/socket"
    with subprocess.Popen([sys.executable, __file__, address]) as engine, zmq.Context() as context:
        with context.socket(zmq.DEALER) as socket:
            socket.set(zmq.RCVHWM, 0)
            socket.connect(address)
            socket.send_multipart(wire.encode(wire.Hello(wire.PROTOCOL, os.getpid())))
            assert isinstance(wire.decode(socket.recv_multipart()), wire.Welcome)
            engine.wait(WAIT_S)
            heard = 0
            while socket.poll(1000):
                message = wire.decode(socket.recv_multipart())
                heard += isinstance(message, wire.Refusal)
            assert heard == MANY


def test_a_message_that_cannot_be_sent_harms_nobody(model: str, owner: int) -> None:
    front = Front(model, owner)
    with pytest.raises(UnicodeEncodeError):
        front.client.submit([Request(1, [3], SamplingParams(cache_salt="\ud800"), 7)])
    assert len(front.generate(2)) == 5
    front.client.close()


def test_close_does_not_wait_for_an_engine_that_is_being_restarted(
    model: str, owner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gllm_engine.engine.client.ENDS_S", 0.2)
    front = Front(model, owner)
    record = front.client._engine.attached.directory.parent / "record.json"
    old = front.engine
    os.kill(old.pid, signal.SIGKILL)

    def engine() -> Process:
        return Process(**json.loads(record.read_bytes())["engine"])

    until(lambda: engine() != old)
    new = engine()
    os.kill(new.pid, signal.SIGSTOP)  # it never says that it is ready
    closing = threading.Thread(target=front.client.close, daemon=True)
    closing.start()
    closing.join(timeout=WAIT_S / 2)
    assert not closing.is_alive()
    assert not new.alive
    assert not record.parent.parent.exists()  # the last front end leaves nothing


def engines(owner: int) -> list[int]:
    """Pids of the engine processes that live with `owner`, on record or not."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_text().split("\0")
            if "gllm_engine.engine.process" in words and words[-2] == str(owner):
                found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("file", ["config.json", "record.json.new"])
def test_a_full_disk_delays_the_next_engine(
    model: str, owner: int, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what was half made nor an engine that nobody knows of stands in the way later."""
    front = Front(model, owner)
    attempts, is_full, write = [], True, Path.write_bytes

    def written(path: Path, data: bytes) -> int:
        if path.name == file and is_full:
            attempts.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    monkeypatch.setattr("gllm_engine.engine.client.RETRY_S", (0.05,))
    monkeypatch.setattr(Path, "write_bytes", written)
    os.kill(front.engine.pid, signal.SIGKILL)
    until(lambda: len(attempts) > 2)
    with pytest.raises(EngineUnavailable, match="No space left on device"):
        front.generate()
    is_full = False
    until(lambda: front.client._trouble is None)
    assert len(front.generate()) == 5
    assert engines(owner) == [front.engine.pid]
    front.client.close()


def test_a_model_that_cannot_load_says_why(tmp_path: Path, owner: int) -> None:
    gllm_engine.write_tiny_model(tmp_path, "Qwen3ForCausalLM")
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchForCausalLM"]}')
    with pytest.raises(EngineError, match="NoSuchForCausalLM.*Qwen3ForCausalLM"):
        Front(str(tmp_path), owner)
    assert not list(_root().glob(f"{owner}.*"))


def test_whoever_waits_for_a_directory_that_is_removed_makes_it_again(tmp_path: Path) -> None:
    home, inside = tmp_path / "owner" / "scope", 0

    def come_and_go() -> None:
        nonlocal inside
        for _ in range(200):
            with _locked(home):
                inside += 1
                assert inside == 1 and home.is_dir()
                inside -= 1
                _remove(home)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(come_and_go) for _ in range(4)]:
            done.result(WAIT_S)


def test_a_lock_on_a_directory_that_was_moved_away_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may move the directory between the moment it is opened and the lock."""
    home, moved, lock = tmp_path / "home", tmp_path / "moved", fcntl.flock

    def move_then_lock(file: int, operation: int) -> None:
        if not moved.exists():
            home.rename(moved)
            home.mkdir()
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", move_then_lock)
    with _locked(home):
        for path, is_free in [(home, False), (moved, True)]:
            directory = os.open(path, os.O_RDONLY)
            with contextlib.nullcontext() if is_free else pytest.raises(BlockingIOError):
                lock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(directory)


def test_the_private_directory_is_refused_when_it_is_not_private(
    monkeypatch: pytest.MonkeyPatch, model: str, owner: int
) -> None:
    with tempfile.TemporaryDirectory(prefix="gt-", dir="/tmp") as temporary:
        monkeypatch.setattr("tempfile.gettempdir", lambda: temporary)
        assert _root().parent == Path(temporary)
        _root().chmod(0o755)
        with pytest.raises(EngineError, match="0700"):
            Front(model, owner)


def test_every_path_of_a_socket_is_short_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest temporary directory that is used: its sockets' paths fit, whatever the pids."""
    monkeypatch.setattr(os, "access", lambda *_: True)
    for length in range(1, 107):
        monkeypatch.setattr("tempfile.gettempdir", lambda: "/" * length)  # noqa: B023
        assert len(str(socket_parent(below=50))) <= 57
    name = f"/gllm-{os.getuid()}-{pid_namespace()}"
    longest = f"{name}/4194304.9999999999/{'a' * 12}/99999/engine.sock"
    assert len(longest) == len(f"{name}/{_LONGEST_HOME}/{_SOCKET}")


def test_without_any_directory_for_sockets_a_start_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, owner: int
) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/tmp/" + "x" * 95)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(EngineError, match="TMPDIR: /tmp/x* cannot hold sockets.* and has 100; nei"):
        Front(model, owner)


def describe_with(**fields: type) -> str:
    inner = msgspec.defstruct("Inner", [*fields.items()], array_like=True)
    return wire.describe([msgspec.defstruct("Outer", [("a", int), ("b", list[inner])])])  # type: ignore[valid-type]


def test_the_protocol_changes_with_any_field_of_any_message() -> None:
    old = describe_with(a=int, b=str)
    assert old == describe_with(a=int, b=str)
    for different in ({"a": int}, {"b": str, "a": int}, {"a": int, "c": str}, {"a": int, "b": int}):
        assert describe_with(**different) != old
    default = [msgspec.defstruct("S", [("a", int, i)], omit_defaults=True) for i in (1, 2)]
    assert wire.describe(default[:1]) != wire.describe(default[1:])
    described = wire.describe(wire._TYPES)
    for inner in ("Request", "SamplingParams", "StructuredOutputs", "EngineConfig", "Chunk"):
        assert f"\n{inner} " in described


def test_other_software_means_another_engine(
    model: str, owner: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An upgrade under a running server: the next load of the model gets an engine of its own.

    All this with a temporary directory whose path is too long for a socket's.
    """
    long = tmp_path / ("long" * 25)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    monkeypatch.setenv("TMPDIR", str(long))
    a = Front(model, owner, "m_0_0")
    first = a.engine
    monkeypatch.setattr("gllm_engine.engine.attach._SOFTWARE", "gllm 9.9.9 (code 00000000)")
    b = Front(model, owner, "m_0_1")
    assert b.engine != first
    until(lambda: bool(a.lost))
    assert len(b.generate()) == 5
    assert b.client._engine.attached.directory.is_relative_to("/tmp") and not list(long.iterdir())
    a.client.close()
    b.client.close()


def test_an_engine_of_another_protocol_is_not_used(
    model: str, owner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code was replaced on disk after this process had read its own."""
    monkeypatch.setattr(wire, "PROTOCOL", "another")
    with pytest.raises(
        EngineError, match="the front end speaks protocol another, the engine .*: t"
    ):
        Front(model, owner)
    assert not list(_root().glob(f"{owner}.*"))


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (wire.encode(wire.Ready(1, 0, 1)), "the engine answers with a message of type Ready"),
        ([b"\xff", b""], "the engine is of another version, its answer is not a message of proto"),
    ],
    ids=["Ready", "no message"],
)
def test_an_engine_that_answers_a_greeting_oddly_is_not_used(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: list[bytes], sentence: str
) -> None:
    pidfd = os.pidfd_open(os.getpid())
    attached = SimpleNamespace(address=f"ipc://{tmp_path}/engine.sock", pidfd=pidfd, child=None)
    monkeypatch.setattr("gllm_engine.engine.client.attach", lambda *_: attached)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as engine:
        engine.bind(attached.address)

        def greet() -> None:
            identity, *_ = engine.recv_multipart()
            engine.send_multipart([identity, *answer])

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(EngineError, match=sentence):
            Front(model, os.getpid())
        thread.join()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(pidfd)


@pytest.fixture(scope="module")
def shared(model: str) -> Iterator[Front]:
    """A front end that others can come to, with the engine that it keeps."""
    with subprocess.Popen(["sleep", "600"]) as sleeper:
        front = Front(model, sleeper.pid, "m_0_0")
        front.owner = sleeper.pid
        yield front
        assert len(front.generate()) == 5 and not front.lost  # whatever others have done
        front.client.close()
        sleeper.kill()


def lose_once(front: Front, misunderstand: Callable[[], None], sentence: str) -> None:
    """What a front end runs is lost, with a sentence, and nothing else: it goes on."""
    front.client.submit([Request(1, [3], ENDLESS, 7)])
    front.outputs.get(timeout=WAIT_S)
    misunderstand()
    until(lambda: bool(front.lost))
    assert sentence in front.lost[0]
    while not front.outputs.empty():
        front.outputs.get()
    assert len(front.generate(2)) == 5
    assert len(front.lost) == 1 and front.client.trouble is None


def test_an_odd_message_costs_its_sender_what_it_runs_and_no_more(
    model: str, shared: Front
) -> None:
    front = Front(model, shared.owner, "m_0_1")
    for frames in ([b"\xff", b""], [b"\x03", b"\x05"], [b"\x03"], [b"\x00", b"\x91\x01"]):
        front.lost.clear()

        def send() -> None:
            with front.client._lock:
                front.client._outgoing.append(frames)  # noqa: B023
                os.eventfd_write(front.client._wake, 1)

        sentence = (
            "different versions" if frames[0] == b"\0" else "the engine got what is not a mess"
        )
        lose_once(front, send, sentence)
        until(lambda: shared.stats[-1].running == 0)  # the engine has dropped it, too
    assert front.engine == shared.engine
    front.client.close()


@pytest.mark.parametrize("how", ["not a message", "of type Ready"])
def test_an_odd_answer_costs_the_streams_and_not_the_connection(
    model: str, shared: Front, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    front = Front(model, shared.owner, "m_0_1")

    def misunderstand() -> None:
        odd = [b"\xff", b""] if how == "not a message" else wire.encode(wire.Ready(1, 0, 1))
        handle = front.client._handle

        def handle_odd(message: Any) -> None:
            monkeypatch.setattr(front.client, "_handle", handle)
            handle(wire.decode(odd))

        monkeypatch.setattr(front.client, "_handle", handle_odd)

    lose_once(front, misunderstand, how)
    until(lambda: shared.stats[-1].running == 0)
    front.client.close()


def test_a_connection_that_fails_says_so(
    model: str, shared: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong on the client's thread: it does not end in silence."""
    front = Front(model, shared.owner, "m_0_2")
    monkeypatch.setattr(front.client, "_receive", lambda: 1 / 0)
    sentence = "the connection to the engine failed (ZeroDivisionError: division by zero)"
    with contextlib.suppress(EngineUnavailable):
        front.client.submit([Request(1, [3], ENDLESS, 7)])
    until(lambda: front.lost == [sentence])
    with pytest.raises(EngineUnavailable, match="division by zero"):
        front.client.submit([])
    assert front.client.trouble == sentence
    front.client.close()


def test_strangers_are_refused_and_harm_nobody(shared: Front) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(shared.client._engine.attached.address)
        strange = [
            (wire.encode(wire.Abort([1])), "a front end that is not attached"),
            (wire.encode(wire.Hello(wire.PROTOCOL, -1)), "process -1: Invalid argument"),
            (wire.encode(wire.Hello("1", os.getpid())), "protocol 1, the engine"),
            ([b"\0", b"\x92\x01\x05"], "protocol another, the engine"),  # an integer
            ([b"\xfe", b""], "the engine got what is not a message of protocol"),
        ]
        for frames, sentence in strange:
            socket.send_multipart(frames)
            assert sentence in wire.decode(socket.recv_multipart()).message


def test_an_idle_engine_checks_its_bookkeeping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once after each time of work. A fault ends the process, and another engine starts."""
    checks: list[int] = []
    turns = 0

    class Idle:
        broken = None
        has_work = False
        awaits_images = False

        def sockets(self) -> list[zmq.Socket[bytes]]:
            return []

        def watch(self) -> None:
            nonlocal turns
            turns += 1
            self.has_work = turns in (3, 20)

        def step(self) -> dict[bytes, Outputs]:
            self.has_work = False
            return {}

        def check_integrity(self) -> None:
            checks.append(turns)
            if turns > 20:
                raise IntegrityError("Page 7 counts 2 references, 1 exist.")

    monkeypatch.setattr(process, "IDLE_S", 0.0)
    monkeypatch.setattr(process, "STATS_EVERY_S", 0.001)
    server = EngineProcess(Idle(), listen(f"ipc://{tmp_path}/s"))
    try:
        sentence = process._run(server)
    finally:
        close(server.socket)
    assert sentence == "the engine failed (IntegrityError: Page 7 counts 2 references, 1 exist.)"
    assert checks == [4, 21]


def test_an_engine_that_awaits_images_sleeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until an encoder tells something, however long that takes."""
    with (
        zmq.Context() as context,
        context.socket(zmq.PAIR) as here,
        context.socket(zmq.PAIR) as there,
    ):
        here.bind("inproc://encoder")
        there.connect("inproc://encoder")

        class Waiting:
            broken: str | None = None
            has_work = True
            awaits_images = True
            num_steps = 0

            def sockets(self) -> list[zmq.Socket[bytes]]:
                return [here]

            def step(self) -> dict[bytes, Outputs]:
                self.num_steps += 1
                if here.poll(0):
                    self.broken = here.recv().decode()
                elif self.num_steps == 3:
                    monkeypatch.setattr(process, "STATS_EVERY_S", 2 * WAIT_S)
                    there.send(b"enough")
                return {}

        monkeypatch.setattr(process, "STATS_EVERY_S", 0.05)
        engine = Waiting()
        server = EngineProcess(engine, listen(f"ipc://{tmp_path}/s"))  # type: ignore[arg-type]
        start = time.monotonic()
        try:
            server.run()
        finally:
            close(server.socket)
        assert 0.15 <= time.monotonic() - start < WAIT_S
        assert engine.num_steps == 4


def test_a_dead_thread_ends_its_process() -> None:
    """A thread of the engine's, or of a worker's, that ends in silence would never be missed."""
    script = (
        "import threading, time; from gllm_engine.os_process import end_with_any_thread\n"
        "end_with_any_thread(); threading.Thread(target=lambda: 1 / 0).start(); time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=WAIT_S)
    assert done.returncode == 1 and b"ZeroDivisionError" in done.stderr


def test_a_stopped_child_ends_with_its_parent() -> None:
    """But not with the thread of it that has started the child."""
    child = (
        "import os, sys; from gllm_engine.os_process import Process, end_with\n"
        "end_with(Process.of(os.getppid()), lambda: print('cleared', flush=True))\n"
        "print(os.getpid(), flush=True); sys.stdin.read()"
    )
    parent = (
        "import subprocess, sys, threading\n"
        f"start = lambda: subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "thread = threading.Thread(target=start); thread.start(); thread.join()\n"
        "print('joined', flush=True); threading.Event().wait()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", parent], **pipes) as started:
        assert started.stdout is not None and started.stdin is not None
        lines = [started.stdout.readline().strip() for _ in range(2)]
        lines.remove(b"joined")
        pidfd = os.pidfd_open(int(lines[0]))
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
            stat = Path(f"/proc/{int(lines[0])}/stat")
            until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
            started.kill()
            assert started.stdout.readline() == b"cleared\n"
            assert wait_end(pidfd, WAIT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)


_PARENT = """
import os, subprocess, sys
owner = [str(os.getpid())] if sys.argv[2] == "--owned" else []
command = [sys.executable, "-m", *sys.argv[1:2], *sys.argv[3:], *owner]
print(subprocess.Popen(command, stdin=subprocess.PIPE).pid, flush=True)
sys.stdin.read()
"""
_MEMBER = ["--engine", "ipc://{home}/engine.sock", "--model", "{home}", "--owner"]
_TASK = Task("gif", Stamped(32, 1, 2, 2, 2.0, 4, 8, 0), 10, 10, 60)


@pytest.mark.parametrize(
    "command",
    [
        ["gllm_engine.worker", "--owned", "--nnodes", "1", *_MEMBER],
        ["gllm_engine.encoder", "--owned", "--number", "0", *_MEMBER],
        ["gllm_engine.images.video_decoder", "", msgspec.json.encode(_TASK).decode(), "-1"],
        ["gllm_engine.text.grammar_trial", "--owned"],
        ["gllm_engine.text.template_renderer", ""],
    ],
    ids=lambda command: command[0],
)
def test_every_kind_of_child_ends_with_its_parent_though_it_is_stopped(
    command: list[str], tmp_path: Path
) -> None:
    """Also an engine's directory goes then, of which a rank or an encoder knows."""
    home = tmp_path / "home"
    gllm_engine.write_tiny_model(home, "Qwen3ForCausalLM")  # else a rank ends by itself
    command = [part.replace("{home}", str(home)) for part in command]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", _PARENT, *command], **pipes) as started:
        assert started.stdout is not None
        child = Path("/proc") / started.stdout.readline().decode().strip()
        pidfd = os.pidfd_open(int(child.name))
        try:
            until(lambda: len([*(child / "task").iterdir()]) > 1)  # one watches the parent
            signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
            until(lambda: (child / "stat").read_text().rpartition(")")[2].split()[0] == "T")
            started.kill()
            assert wait_end(pidfd, WAIT_S)
            assert home.exists() != ("--engine" in command)
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)


def test_an_engine_that_cannot_be_got_back_is_counted(
    tmp_path: Path, owner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gllm_engine.engine.client.RETRY_S", (0.0,))
    config = (
        gllm_engine.write_tiny_model(tmp_path, "Qwen3ForCausalLM") / "config.json"
    ).read_text()
    front = Front(str(tmp_path), owner)
    assert front.client.failed_starts == 0
    (tmp_path / "config.json").write_text("{}")
    os.kill(front.engine.pid, signal.SIGKILL)
    until(lambda: front.client.failed_starts > 0)
    assert "the engine cannot start" in str(front.client.trouble) and len(front.lost) == 1
    (tmp_path / "config.json").write_text(config)
    until(lambda: front.client.trouble is None)
    assert front.client.failed_starts == 0 and len(front.generate()) == 5
    front.client.close()


@pytest.mark.parametrize("ends_before", ["it is on record", "it is joined"])
def test_an_engine_that_ends_at_once_tells_why(
    ends_before: str, tmp_path: Path, owner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    name = "_start" if ends_before == "it is on record" else "_write"
    original = getattr(attach, name)

    def wait_for_the_end(*arguments: Any) -> Any:
        result = original(*arguments)
        process = arguments[1].engine if name == "_write" else result
        until(lambda: Process.of(process.pid) is None)
        return result

    monkeypatch.setattr(attach, name, wait_for_the_end)
    with pytest.raises(EngineError, match=r"the engine cannot start: .*architectures is None"):
        Front(str(tmp_path), owner)


def _run_as_front_end(model: str, owner: int, instance: str) -> None:
    """A front end with one endless sequence; tells what happens to it."""
    front = Front(model, owner, instance)
    params = SamplingParams(max_tokens=None, ignore_eos=True)
    front.client.submit([Request(1, [3], params, 7)])
    front.outputs.get(timeout=WAIT_S)
    print("running", flush=True)
    number = 2
    while not front.lost:
        try:
            outputs = front.outputs.get(timeout=0.05)
        except queue.Empty:
            continue
        if outputs.finished:
            with contextlib.suppress(EngineUnavailable):
                front.client.submit([Request(number, [3], params, 7)])
            number += 1
    print("lost", flush=True)
    while True:
        try:
            front.client.submit([])
        except EngineUnavailable as error:
            if "newer" in str(error):
                print(f"stale: {error}", flush=True)
                break
        time.sleep(0.01)
    time.sleep(600)


class _LastWords:
    """An engine that has MANY long messages for its front end, and then no work."""

    info = ModelInfo(10, 10, 10, 16, ())
    has_work = True
    awaits_images = False
    broken = None

    def sockets(self) -> list[zmq.Socket[bytes]]:
        return []

    def watch(self) -> None:
        pass

    def step(self) -> dict[bytes, Outputs]:
        for client in server.front_ends:
            for _ in range(MANY):
                server._send(client, wire.Refusal("x" * LONG))
            self.has_work = False
        return {}

    def stats(self) -> Stats:
        return Stats()


class _Fragile(NullRunner):
    """Fails for good after a step with the token 1, its device dead, or for steps with a 3."""

    alive = True

    def launch(self, plan: StepPlan) -> NullStep:
        tokens = {token for chunk in plan.chunks for token in chunk.tokens[:1]}
        self.alive = self.alive and 1 not in tokens
        if not self.alive or tokens == {3} and len(plan.chunks[0].tokens) == 1:
            raise Fault
        return super().launch(plan)

    def is_alive(self) -> bool:
        return self.alive


class _Busy(NullRunner):
    """Holds the interpreter's lock in its first step."""

    rested = False

    def launch(self, plan: StepPlan) -> NullStep:
        if not self.rested:
            self.rested = True
            ctypes.PyDLL(None).usleep(int(BUSY_S * 1e6))  # PyDLL keeps the lock, unlike CDLL
        return super().launch(plan)


class _Loading(NullRunner):
    """Its load takes very long."""

    def __init__(self, *arguments: Any) -> None:
        time.sleep(600)
        super().__init__(*arguments)


class Fault(Exception):
    pass


_RUNNERS = {"fragile": _Fragile, "busy": _Busy, "loading": _Loading}


def _main_unwatched(how: str) -> int:
    """An engine's main, whose watch over the owner never gets to run."""
    process.end_with = lambda *_: None
    run = EngineProcess.run

    def run_and_break(server: EngineProcess) -> None:
        run(server)
        server.engine.broken = "it broke"

    if how.endswith("broken"):
        EngineProcess.run = run_and_break  # type: ignore[method-assign]
    return main()


if __name__ == "__main__":
    if sys.argv[1] in _RUNNERS:
        core.NullRunner = _RUNNERS[sys.argv.pop(1)]  # type: ignore[misc]
        sys.exit(main())
    if sys.argv[1].startswith("unwatched"):
        sys.exit(_main_unwatched(sys.argv.pop(1)))
    if len(sys.argv) == 2:
        socket = listen(sys.argv[1])
        server = EngineProcess(_LastWords(), socket)  # type: ignore[arg-type]
        server.draining = True
        server.run()
        close(socket)
        os._exit(0)
    _run_as_front_end(sys.argv[1], int(sys.argv[2]), sys.argv[3])

"""Encoders as processes: what lands is what the tower makes, whoever dies, stops, joins or leaves.

tests/workers/test_gpu_encoders.py has the same on GPUs.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import shutil
import signal
import socket as sockets
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
import zmq
from forked import FAULT, LOG, Fork
from hall import Hall
from odd_tower import BROKEN, HELD, POISON, held_by
from traced import SOON_S, wait_for

from gllm_engine import wire, write_tiny_model
from gllm_engine.config import ConfigError, EngineConfig
from gllm_engine.os_process import Process
from gllm_engine.runner import Landing
from gllm_engine.runner import landing as landings
from gllm_engine.workers import channel, meeting, member
from gllm_engine.workers import encoders as engine_side
from gllm_engine.workers.build_runner import check_encoder_gpus, device_of
from gllm_engine.workers.encoders import Encoders
from gllm_engine.workers.meeting import GroupLost
from gllm_engine.workers.member import Member

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("quick_starts")]

CPU = torch.device("cpu")
# The largest image has 16 tokens, the landing takes 32.
SMALL = {
    "cpu_threads": 1, "max_num_seqs": 4, "encoder_budget": 16, "image_cache_tokens": 64,
    "encoder_workers": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings are added after two of its layers, too."""
    path = tmp_path_factory.mktemp("tiny")
    return write_tiny_model(path, "Qwen3VLForConditionalGeneration", seed=4)


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Encoders that start now have the tower of odd_tower.py."""
    monkeypatch.setenv(FAULT, str(tmp_path))
    monkeypatch.setattr(engine_side, "_PAUSE_S", 0.0)
    return tmp_path


def hall(model: Path, **config: Any) -> Hall:
    return Hall(model, CPU, **SMALL | config)


def test_what_lands_is_what_the_tower_makes(model: Path) -> None:
    """Bit by bit. Also in batches, with fewer places than images, and one that nobody needs."""
    with hall(model) as here:
        here.is_exact = True
        for number, size in enumerate([(4, 2), (1, 3), (2, 2), (5, 3)], 100):
            here.submit(number, *size)  # alone: encoders are idle, or have one
        here.wait_done()
        here.taken.clear()
        here.is_exact = False
        for number, size in enumerate([(4, 4), (2, 3), (1, 1), (3, 2), (4, 4), (2, 2), (1, 4)]):
            here.submit(number, *size)
        one, other = here.encoders._encoders
        # Each where less waits, up to two batches.
        assert sorted([one.tokens, other.tokens]) == [6 + 1, 16 + 6]
        assert here.encoders.stats() == (2, 3, 4, 0)
        here.encoders.cancel(2)  # an encoder has it
        here.encoders.cancel(5)  # it waits
        here.encoders.cancel(5)
        here.encoders.cancel(77)
        here.wait_done()
        assert here.taken == {0, 1, 3, 4, 6}
        here.submit(8, 5, 7)
        here.poll()
        assert here.refused == {8: "it has 35 tokens, encoders take 32 at most"}
        pids = here.pids()
        directory = here.encoders._meeting.directory
        assert len(pids) == 2 and directory.exists()
    assert not any(Process.of(pid) for pid in pids) and not directory.exists()


def test_places_are_nobody_elses_until_they_are_released(model: Path) -> None:
    with hall(model) as here:
        here.keeps = True
        for number in range(3):
            here.submit(number, 4, 4)
        here.wait(lambda: len(here.kept) == 2, "two land")
        assert set(here.kept.values()) == {0, 16}
        assert here.encoders.stats() == (2, 1, 0, 0)
        here.take()
        here.wait(lambda: here.kept == {2: 0}, "there is room for the third")
        here.encoders.cancel(2)  # too late: its place is still to be released
        here.take()
        here.wait_done()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_an_encoder_that_dies_or_stops_costs_no_image(
    model: Path, faults: Path, caplog: pytest.LogCaptureFixture, number: signal.Signals
) -> None:
    caplog.set_level(logging.INFO, "gllm.group")
    with hall(model) as here:
        here.submit(0, fault=HELD)
        here.wait(lambda: held_by(faults), "an encoder has it")
        pid = held_by(faults)
        assert pid is not None
        for i in range(1, 9):
            here.submit(i)
        here.encoders.cancel(8)
        (holder,) = [e for e in here.encoders._encoders if e.slot.child.pid == pid]
        here.wait(lambda: here.encoders.stats() == (2, 0, 1 + len(holder.batches[1]), 0), "a jam")
        assert 0 not in here.taken
        os.kill(pid, number)
        here.wait(lambda: here.taken == set(range(8)), "all land", SOON_S)
        assert f"{holder.name} is lost: " in caplog.text
        here.wait(lambda: here.encoders.stats().encoders == 2, "another one is started")
        assert Process.of(pid) is None
        assert caplog.text.count(f"{holder.name} takes images") == 2
        here.wait_done()


def test_bad_images_cost_themselves_alone(model: Path, faults: Path) -> None:
    with hall(model) as here:
        here.submit(0, fault=POISON)
        for number in range(1, 6):
            here.submit(number)
        here.submit(6, fault=BROKEN)
        here.submit(7)
        here.wait_done()
        assert here.refused.pop(0) == "3 encoders have ended while they encoded it"
        assert here.refused.pop(6).startswith("the vision tower fails on it (ValueError)")
        assert here.taken == {1, 2, 3, 4, 5, 7} and not here.refused


def test_without_encoders_images_wait_and_are_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_side, "_PAUSE_S", 0.0)
    path = shutil.copytree(model, tmp_path / "model")
    with hall(path, encoder_workers=1) as here:
        weights = path / "model.safetensors"
        weights.rename(path / "hidden")
        (pid,) = here.pids()
        os.kill(pid, signal.SIGKILL)
        here.wait(lambda: not here.encoders.stats().encoders, "it is missed")
        here.submit(0)
        assert here.encoders.stats() == (0, 1, 0, 0)
        here.wait(lambda: here.refused, "starts fail")
        assert here.encoders._slots[0].failed_starts == engine_side._MOST_FAILED_STARTS
        (slot,) = here.encoders._slots
        late = wire.Join(
            wire.PROTOCOL, channel.rank_software(), channel.digest(path), 0, 0, 0, 0, "encoder"
        )
        with monkeypatch.context() as between_two_starts:
            between_two_starts.setattr(slot, "child", None)
            between_two_starts.setattr(slot, "encoder", None)
            here.encoders._welcome(here.encoders._meeting.sockets[0], b"ended", late)
            assert slot.encoder is None
        slot.failed_starts = 2000  # after most of a day
        here.wait(lambda: slot.failed_starts > 2000, "starts go on")
        here.submit(1)
        here.poll()
        why = "no encoder runs, the log says why"
        assert [here.refused.pop(number) for number in range(2)] == [why, why]
        with pytest.raises(GroupLost, match="encoder 0 cannot start: LoadError: "):
            here.start()  # as another engine would
        (path / "hidden").rename(weights)
        here.wait(lambda: here.encoders.stats().encoders, "one starts")
        here.submit(2)
        here.wait_done()
        assert here.taken == {2}


def test_a_machine_that_starts_no_process_says_so(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    names = SimpleNamespace(Popen=no_memory, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(meeting, "subprocess", names)
    with pytest.raises(GroupLost, match="encoder 1 cannot start: .* Cannot allocate memory"):
        hall(model)


@pytest.fixture
def stopped_children(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Those that start now are stopped at once."""
    fork = meeting.subprocess.Popen
    children = []

    def start(*given: Any, **named: Any) -> Any:
        child = fork(*given, **named)
        os.kill(child.pid, signal.SIGSTOP)
        children.append(child)
        return child

    names = SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(meeting, "subprocess", names)
    monkeypatch.setattr(engine_side, "FIRST_COMES_S", 0.0)
    return children


def test_an_encoder_that_does_not_join_is_killed(model: Path, stopped_children: list[Any]) -> None:
    with pytest.raises(GroupLost, match="encoder 0 cannot start: it was started and has not joi"):
        hall(model, encoder_workers=1)
    assert stopped_children[0].poll() is not None


def test_a_start_does_not_wait_for_what_cannot_be_killed(
    model: Path,
    stopped_children: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(engine_side, "ENDS_S", 0.0)
    monkeypatch.setattr(meeting, "ENDS_S", 0.0)
    kill = Fork.kill
    monkeypatch.setattr(Fork, "kill", lambda _: None)
    try:
        with pytest.raises(
            GroupLost, match="encoder 0 cannot start: .* does not end though it was"
        ):
            hall(model, encoder_workers=1)
        (child,) = stopped_children
        assert f"processes [{child.pid}] do not end though they were killed" in caplog.text
    finally:
        for each in stopped_children:
            kill(each)


def test_an_encoder_that_never_loads_is_killed(
    model: Path, faults: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (faults / "slow").touch()
    monkeypatch.setattr(engine_side, "_LOADS_S", 0.0)
    with pytest.raises(GroupLost, match="encoder 0 cannot start: it was started and has not load"):
        hall(model, encoder_workers=1)


def test_a_living_encoder_may_load_for_long(model: Path, faults: Path) -> None:
    """One that is stopped while it loads is killed."""
    with hall(model, encoder_workers=1) as here:
        (slot,) = here.encoders._slots
        slow = faults / "slow"
        slow.touch()

        def begin_anew(number: signal.Signals) -> int:
            """The process that loads after this one has got a signal."""
            assert slot.child is not None
            pid = slot.child.pid
            os.kill(pid, number)
            joined = lambda: slot.child and slot.child.pid != pid and slot.encoder  # noqa: E731
            here.wait(joined, "the next one loads", SOON_S)
            assert Process.of(pid) is None and not slot.has_served
            assert slot.late_at > time.monotonic() + 10 * engine_side.FIRST_COMES_S
            return slot.child.pid

        begin_anew(signal.SIGKILL)
        pid = begin_anew(signal.SIGSTOP)
        slow.unlink()
        here.wait(lambda: slot.has_served, "it serves")
        assert here.pids() == [pid]


def test_a_start_tells_what_it_waits_for(
    model: Path, faults: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gllm.group")
    monkeypatch.setattr(engine_side, "REMIND_S", 0.0)
    slow = faults / "slow"
    slow.touch()
    told = "waiting for encoders to load: [0]"
    look = Encoders._look_after

    def look_on(encoders: Encoders) -> None:
        look(encoders)
        if told in caplog.text:
            slow.unlink(missing_ok=True)

    monkeypatch.setattr(Encoders, "_look_after", look_on)
    with hall(model, encoder_workers=1):
        assert told in caplog.text


def test_an_encoder_joins_before_it_imports_torch() -> None:
    """Its heartbeats tell that it lives, however slow the disk is."""
    code = "import sys, gllm_engine.workers.encoder; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


def test_encoders_that_cannot_be_killed_cost_their_places_alone(
    model: Path, faults: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Until they end at last."""
    monkeypatch.setattr(engine_side, "ENDS_S", 0.0)
    kill = Fork.kill
    stuck = []

    def stick(encoder: Any) -> None:
        child = encoder.slot.child
        os.kill(child.pid, signal.SIGSTOP)
        stuck.append(child)
        here.wait(lambda: here.encoders.stats().stuck == len(stuck), "it is given up", SOON_S)

    with hall(model) as here, monkeypatch.context() as patch:
        patch.setattr(Fork, "kill", lambda each: None if each in stuck else kill(each))
        here.submit(0, 4, 4, fault=HELD)
        here.wait(lambda: held_by(faults), "an encoder has it")
        one, other = here.encoders._encoders
        if not one.batches:
            one, other = other, one
        other.is_ready = False
        here.submit(1, 3, 3)
        other.is_ready = True
        here.submit(2, 2, 3)
        stick(one)
        assert f"encoder {one.slot.number}: process {stuck[0].pid} does not end" in caplog.text
        assert "25 of the 32 tokens of the landing are lost" in caplog.text
        here.wait(lambda: 2 in here.taken, "the other one goes on")
        for number, tokens in ((0, 16), (1, 9)):
            assert here.refused.pop(number).startswith(f"it has {tokens} tokens, and encoders that")
        here.submit(3, 1, 7)
        here.submit(4, 2, 4)
        here.wait(lambda: 3 in here.taken, "what finds a place is encoded")
        assert here.refused.keys() == {4}
        stick(other)
        here.submit(5, 1, 1)
        here.poll()
        assert here.refused[5] == "no encoder runs, the log says why"
        for each in stuck:
            kill(each)
        here.wait(lambda: here.encoders.stats()[::3] == (2, 0), "others are started")
        here.submit(6, 4, 4)
        here.submit(7, 4, 4)
        here.wait_done()
        assert {6, 7} <= here.taken


@pytest.fixture
def others(tmp_path: Path) -> dict[str, Any]:
    """The configuration with which encoders of other machines may join."""
    key = tmp_path / "key"
    key.touch(0o600)
    key.write_text("a secret of two machines, thirty-two bytes at least")
    with sockets.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return {"master_addr": "127.0.0.1", "master_port": port - 2, "cluster_key_file": str(key)}


def command(model: Path, others: dict[str, Any], **options: Any) -> list[str]:
    """By which an encoder joins from another machine."""
    options = {"model": model, "cluster-key-file": others["cluster_key_file"]} | options
    given = [f"--{key}={value}" for key, value in options.items()]
    engine = f"--engine=tcp://127.0.0.1:{others['master_port'] + 2}"
    return [sys.executable, "-m", "gllm_engine.encoder", engine, *given]


def fork(command: list[str], log: Path) -> Any:
    return meeting.subprocess.Popen(
        command,
        cwd=log.parent,
        env=os.environ | {LOG: str(log)},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def test_remote_encoders_join_and_leave_while_images_flow(
    model: Path, faults: Path, others: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gllm.group")
    with hall(model, encoder_workers=1, **others) as here:
        here.submit(0, fault=HELD)
        here.wait(lambda: held_by(faults), "the only encoder has it")
        for i in range(1, 12):
            here.submit(i, 3, 2)
        remote = fork(command(model, others), faults / "log")
        here.wait(lambda: len(here.taken) > 3, "another one helps")
        assert here.sent
        for i in range(12, 15):
            here.submit(i, 4, 4)
        os.kill(remote.pid, signal.SIGTERM)
        here.wait(lambda: "remote encoder 1 has left" in caplog.text, "it leaves")
        wait_for(lambda: remote.poll() is not None, "it ends")
        assert here.encoders.stats().encoders == 1 and "is lost" not in caplog.text
        here.encoders._encoders[0].slot.child.kill()
        here.wait_done()
        assert here.taken == set(range(15))


def test_strangers_are_refused(
    model: Path, tmp_path: Path, others: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """And an encoder that answers oddly costs no image."""
    other_model = shutil.copytree(model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (other_model / "config.json").write_text(json.dumps(config | {"comment": "another"}))
    other_key = shutil.copy(others["cluster_key_file"], tmp_path / "other")
    with Path(other_key).open("a") as file:
        file.write("!")
    log = tmp_path / "log"
    with hall(model, encoder_workers=1, **others) as here, zmq.Context() as context:
        strangers = [
            fork(command(other_model, others), log),
            fork(command(model, others, **{"cluster-key-file": other_key}), log),
        ]
        told = [
            "the encoder has a model whose config.json has digest",
            "this encoder goes on trying",
        ]
        here.wait(lambda: log.exists() and all(each in log.read_text() for each in told), "told")
        for stranger in strangers:
            stranger.kill()
        secret = channel.read_secret(Path(others["cluster_key_file"]))
        address = f"tcp://127.0.0.1:{others['master_port'] + 2}"
        odd, monitor = channel.connect(context, address, secret)
        software, digest = channel.rank_software(), channel.digest(model)
        good = wire.Join(wire.PROTOCOL, software, digest, 1, 0, 0, 0, "encoder")

        def hear() -> Any:
            here.wait(lambda: odd.poll(0), "it is told something")
            message = wire.decode(odd.recv_multipart())
            return hear() if isinstance(message, wire.Ping) else message

        def answer(frames: list[bytes]) -> Any:
            odd.send_multipart(frames)
            return hear()

        tag, _ = wire.encode(good)
        for frames, problem in [
            (wire.encode(msgspec.structs.replace(good, role="worker")), "only encoders join"),
            (wire.encode(msgspec.structs.replace(good, software="x")), "the encoder runs x, the"),
            (wire.encode(msgspec.structs.replace(good, protocol="0")), "speaks protocol 0, the"),
            ([tag, b"\x91\x01"], "the encoder speaks another protocol than the engine"),
        ]:
            assert problem in answer(frames).message
        for oddity in (wire.Encoded(1, b"short"), wire.Encoded(7), wire.Ping()):
            assigned = answer(wire.encode(good))
            assert assigned.dtype == "float32" and not assigned.landings
            here.taken.clear()
            here.submit(0)
            odd.send_multipart(wire.encode(wire.EncoderReady()))
            here.wait(lambda: here.encoders.stats().encoders == 2, "it is taken for one")
            here.wait(lambda: 0 in here.taken, "the other one is idle")
            here.taken.clear()
            here.submit(0)
            here.submit(1)
            assert isinstance(hear(), wire.Encode)
            assert isinstance(answer(wire.encode(oddity)), wire.Leave)
            here.wait_done()
            assert here.taken == {0, 1}
        monitor.close()
        odd.close(0)
    assert "it has sent 5 bytes for an image of " in caplog.text
    assert "it has answered for image 7, which it has not" in caplog.text
    assert "it has sent what is no answer (Ping)" in caplog.text


def test_an_encoder_that_loses_its_engine_waits_for_the_next(
    model: Path, tmp_path: Path, others: dict[str, Any]
) -> None:
    """A process as one is started by hand."""
    log = tmp_path / "log"
    with log.open("wb") as errors, subprocess.Popen(command(model, others), stderr=errors) as own:
        try:
            for _ in range(2):
                with hall(model, encoder_workers=1, **others) as here:
                    here.wait(lambda: here.encoders.stats().encoders == 2, log.read_text())  # noqa: B023
                    for number in range(4):
                        here.submit(number)
                    here.wait_done()
                    assert here.sent
                    if "this encoder waits for another" in log.read_text():
                        own.send_signal(signal.SIGTERM)
                        here.wait(lambda: own.poll() is not None, "it leaves")
                wait_for(
                    lambda: "this encoder waits for another" in log.read_text(),
                    "it misses the engine",
                )
            assert own.returncode == 0
        finally:
            own.kill()


@pytest.mark.parametrize("leaves", [False, True])
def test_an_encoder_that_leaves_waits_for_no_other_engine(
    monkeypatch: pytest.MonkeyPatch, leaves: bool
) -> None:
    """Its engine may end before it has answered."""

    def end(status: int) -> None:
        raise SystemExit(status)

    def begin_anew(*_: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(channel, "await_loss", lambda *_: None)
    monkeypatch.setattr(member, "time", SimpleNamespace(sleep=lambda _: None))
    calls = {"_exit": end, "execv": begin_anew, "listdir": lambda _: []}
    monkeypatch.setattr(member, "os", SimpleNamespace(**calls))
    lost = object.__new__(Member)
    lost._role = "encoder"
    lost._monitor = None
    lost._options = SimpleNamespace(engine="tcp://127.0.0.1:1")
    lost._leaves = leaves
    with pytest.raises(SystemExit if leaves else InterruptedError):
        lost._begin_anew_once_lost()


def test_an_interrupt_within_a_message_loses_the_encoders(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with hall(model, encoder_workers=1) as here:
        with monkeypatch.context() as patch:
            patch.setattr(here.encoders, "_tell", interrupted)
            with pytest.raises(KeyboardInterrupt):
                here.submit(0)
        with pytest.raises(GroupLost, match="a message to or from one was interrupted"):
            here.poll()


def test_encoders_need_gpus_of_their_own(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    config = EngineConfig(model=str(model), tensor_parallel_size=2, encoder_workers=2)
    check_encoder_gpus(config, torch.device("cuda"))
    config = msgspec.structs.replace(config, encoder_workers=3)
    check_encoder_gpus(config, CPU)
    with pytest.raises(ConfigError, match="encoder_workers: 3 encoders need a GPU each beside the"):
        check_encoder_gpus(config, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="device: GPU 4 of this machine .* torch finds 4$"):
        device_of(msgspec.structs.replace(config, device="cuda"), 4)


def test_a_landing_of_another_size_is_not_opened() -> None:
    landing = Landing.make(8, 6, torch.bfloat16, CPU)
    handle = landing.handle
    Landing.open(handle).write(3, torch.full((2, 5, 3), 7, dtype=torch.bfloat16))
    assert landing.read(3, (30,)).tolist() == [7.0] * 30 and not landing.read(0, (18,)).any()
    assert not landing.read(8, (0,)).numel()
    for wrong in ({"tokens": 9}, {"numbers": 5}, {"dtype": "float32"}):
        with pytest.raises(ValueError, match="a landing has 96 bytes, its tokens and numbers take"):
            Landing.open(msgspec.structs.replace(handle, **wrong))
    with pytest.raises(ValueError, match="dtype: 'int8' is none of float32, bfloat16, float16"):
        Landing.open(msgspec.structs.replace(handle, dtype="int8"))
    for place, count in ((-1, 6), (8, 1), (7, 7)):
        with pytest.raises(ValueError, match=f"place {place}: {count} numbers there are not with"):
            landing.read(place, (count,))
    del landing
    with pytest.raises(OSError, match="No such file"):
        Landing.open(handle)


def test_memory_of_a_gpu_is_shared_by_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a made up one. Torch would leave a file in /dev/shm; see test_gpu_encoders.py."""
    memory = torch.zeros(64, dtype=torch.uint8)
    here = memory.data_ptr()

    def find(first: Any, size: None, address: Any) -> int:
        first._obj.value = address.value - 512
        return 0

    def share(handle: Any, first: Any) -> int:
        ctypes.memmove(handle, ctypes.byref(first), 8)
        return 0

    def open_again(first: Any, handle: Any, flags: int) -> int:
        ctypes.memmove(first, ctypes.byref(handle), 8)
        return 0 if flags == 1 else 1

    driver = {"cuMemGetAddressRange_v2": find, "cuIpcGetMemHandle": share}
    monkeypatch.setattr(ctypes, "CDLL", {"libcuda.so.1": driver}.__getitem__)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch, "as_tensor", lambda given, device: given.__cuda_array_interface__)
    on_gpu: Any = SimpleNamespace(data_ptr=lambda: here, device=torch.device("cuda", 3), nbytes=64)
    shared = landings._share(on_gpu)
    assert shared.device == 3 and len(shared.handle) == 64 and shared.offset == 512
    driver["cuIpcOpenMemHandle_v2"] = open_again
    opened: Any = landings._open(shared)
    assert opened["data"] == (here, False) and opened["shape"] == (64,)
    driver["cuIpcOpenMemHandle_v2"] = lambda *_: 201
    with pytest.raises(RuntimeError, match="^cuIpcOpenMemHandle_v2 fails with CUDA's error 201$"):
        landings._open(shared)
    driver["cuIpcGetMemHandle"] = lambda *_: 1
    with pytest.raises(RuntimeError, match="CUDA's error 1; .* if PYTORCH_ALLOC_CONF has expand"):
        landings._share(on_gpu)

"""Workers that die, stop, cannot start or fail: noticed, named, cleared away, and begun anew.

Run as a program, this file is a worker with a fault of its own.
"""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import zmq
from traced import SOON_S, WAIT_S, Traces, traced, wait_for

from gllm_engine import (
    LLM,
    ConfigError,
    EngineBroken,
    EngineClient,
    EngineError,
    EngineUnavailable,
    Request,
    SamplingParams,
    make_config,
    wire,
    write_tiny_model,
)
from gllm_engine.arch import ArchError, read_arch
from gllm_engine.os_process import Process, pid_namespace
from gllm_engine.parallel import pipe
from gllm_engine.runner import PlanError
from gllm_engine.timeline import OFF
from gllm_engine.types import StepPlan
from gllm_engine.workers import group as groups
from gllm_engine.workers import meeting
from gllm_engine.workers import member as joining
from gllm_engine.workers import worker as member
from gllm_engine.workers.meeting import GroupLost, Meeting

pytestmark = pytest.mark.timeout(300)

SMALL = {"device": "cpu", "cpu_threads": 1, "max_model_len": 4096, "num_pages": 1024}
PAIR = SMALL | {"tensor_parallel_size": 2}
PIPE = SMALL | {"pipeline_parallel_size": 2, "assigned_layers": "1,1"}
SHORT = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
# The tokens at which faulty workers fail, or refuse a step.
FAULTY, REFUSED_BY_ALL, REFUSED_BY_ONE = 1, 1, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path, "Qwen3ForCausalLM", seed=3, max_position_embeddings=4096)
    return str(path)


@pytest.fixture(scope="module")
def expected(model: str) -> list[int]:
    with LLM(model, **SMALL) as llm:
        return llm.generate([5, 6, 7], SHORT)[0].outputs[0].token_ids


@pytest.fixture
def traces() -> Iterator[Traces]:
    with traced() as traces:
        yield traces


class Front:
    """A front end of an engine process."""

    def __init__(self, model: str, **config: Any) -> None:
        self.outputs: queue.Queue[Any] = queue.Queue()
        self.lost: list[tuple[float, str]] = []  # when, and why
        self.client = EngineClient(
            make_config({"model": model, **config}),
            scope="m/1",
            instance="m_0_0",
            owner_pid=os.getpid(),
            on_outputs=self.outputs.put,
            on_stats=lambda _: None,
            on_lost=lambda why: self.lost.append((time.monotonic(), why)),
        )

    def begin(self) -> None:
        """Have an endless sequence run."""
        self.client.submit([Request(1, [3, 4, 5], ENDLESS, 7)])
        self.outputs.get(timeout=WAIT_S)

    def answer(self) -> list[int] | None:
        """What it generates; None while there is no engine."""
        with contextlib.suppress(EngineUnavailable):
            self.client.submit([Request(2, [5, 6, 7], SHORT, 7)])
            tokens: list[int] = []
            while True:
                outputs = self.outputs.get(timeout=WAIT_S)
                pairs = zip(outputs.ids, outputs.tokens, strict=True)
                tokens += [token for id, token in pairs if id == 2]
                if 2 in outputs.finished:
                    return tokens
        return None


def test_whoever_dies_is_missed_and_another_comes(
    model: str, expected: list[int], traces: Traces
) -> None:
    """A worker that is killed: tests/server/test_served_ranks.py."""
    front = Front(model, **PAIR)
    losses = [
        ("worker 0 is stopped while there is nothing to do", signal.SIGSTOP, 0, False),
        ("the engine is killed", signal.SIGKILL, None, True),
    ]
    for times, (what, number, rank, busy) in enumerate(losses, 1):
        assert front.answer() == expected, what
        if busy:
            front.begin()
        engine = front.client._engine.attached.engine
        workers = traces.workers()
        assert len(workers) == 2
        directory = traces.directories()
        os.kill(engine.pid if rank is None else by_rank(workers)[rank], number)
        killed = time.monotonic()
        wait_for(lambda: len(front.lost) == times, f"{what}: noticed")  # noqa: B023
        when, why = front.lost[-1]
        assert when - killed < SOON_S, what
        name = "the engine process died" if rank is None else f"worker {rank} (node 0) is lost: "
        assert name in why and "it is being restarted" in why
        gone = lambda: not engine.alive and not set(workers) & set(traces.processes())  # noqa: E731, B023
        wait_for(gone, f"{what}: nobody is left", SOON_S)
        wait_for(lambda: not directory[0].exists(), "its directory is gone", SOON_S)  # noqa: B023
        while not front.outputs.empty():
            front.outputs.get()
        wait_for(front.answer, f"{what}: served again")
    assert front.answer() == expected
    front.client.close()
    traces.wait_gone()


def by_rank(workers: list[int]) -> dict[int, int]:
    found = {}
    for pid in workers:
        settings = Path(f"/proc/{pid}/environ").read_text().split("\0")
        (rank,) = [s.removeprefix("LOCAL_RANK=") for s in settings if s.startswith("LOCAL_RANK=")]
        found[int(rank)] = pid
    return found


def test_a_checkpoint_that_does_not_load_is_told_to_who_started(
    tmp_path: Path, traces: Traces
) -> None:
    write_tiny_model(tmp_path, "Qwen3ForCausalLM", max_position_embeddings=4096)
    weights = tmp_path / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    sentence = r"worker \d \(node 0\) is lost: LoadError: .*not a complete safetensors file"
    with pytest.raises(EngineError, match=f"the engine cannot start: {sentence}"):
        Front(str(tmp_path), **PAIR)
    assert not traces.processes()
    traces.wait_gone()


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"tensor_parallel_size": 3}, "3 does not divide the model's num_attention_heads=4"),
        ({"pipeline_parallel_size": 3}, "3 is more than the 2 layers of the model"),
        (
            {"pipeline_parallel_size": 2, "assigned_layers": "1,2"},
            "assigned_layers: 1,2 is 3 layers, the model has 2",
        ),
    ],
)
def test_what_cannot_be_shared_out_is_refused_before_anybody_is_started(
    model: str, config: dict[str, Any], sentence: str
) -> None:
    with pytest.raises((ConfigError, ArchError), match=sentence):
        LLM(model, **SMALL | config)


@pytest.mark.parametrize("text", ["x", "-1", "9" * 400, "1.5", ""])
def test_numbers_of_ranks_that_are_none(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        with monkeypatch.context() as environment:
            environment.setenv(name, text)
            with pytest.raises(ConfigError, match=f"^{name}: .* is not a whole number from 0"):
                member._Worker(member._parser().parse_args(["--engine=ipc:x", "--model=m"]))
    for name in ("--node-rank", "--nnodes"):
        arguments = ["--engine=ipc:x", "--model=m", f"{name}={text}"]
        with pytest.raises(ConfigError, match=f"^{name}: .* is not a whole number from 0"):
            member._Worker(member._parser().parse_args(arguments))


def faulty(fault: str) -> SimpleNamespace:
    """In place of meeting.py's subprocess: workers with a fault."""

    def popen(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        assert command[1:3] == ["-m", "gllm_engine.worker"]
        return subprocess.Popen([command[0], __file__, fault, *command[3:]], **options)

    return SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL)


def test_a_step_that_fails_names_the_rank(
    model: str, traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not its neighbours, whose connections to it break."""
    monkeypatch.setattr(meeting, "subprocess", faulty("step"))
    with LLM(model, **PIPE) as llm:
        assert llm.generate([5, 6, 7], SHORT)[0].error is None
        why = r"worker 1 \(node 0\) is lost: ValueError: broken on purpose; how far other ranks"
        with pytest.raises(EngineBroken, match=why):
            llm.generate([[FAULTY, 5], [5, 6]], SHORT)
        with pytest.raises(EngineBroken, match=why):
            llm.generate([5, 6, 7], SHORT)
        traces.wait_gone()


class _Over(Exception):
    pass


@pytest.mark.parametrize(
    "message",
    [StepPlan(1, [], [], [], []), wire.PutImages([]), wire.MoveLayers(), wire.Ping()],
    ids=lambda message: type(message).__name__,
)
def test_an_error_with_any_message_says_what_follows(
    message: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []

    def fail(self: Any, sentence: str) -> None:
        told.append(sentence)
        raise _Over

    def no_memory(*_: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(member._Worker, "_fail", fail)
    monkeypatch.setattr(member._Worker, "_report", lambda *_: None)
    monkeypatch.setattr(member._Worker, "_receive", lambda _: message)
    monkeypatch.setattr(member._Worker, "_move_layers", no_memory)
    worker = object.__new__(member._Worker)
    runner: Any = SimpleNamespace(recorder=OFF, put_images=no_memory, launch=no_memory)
    with pytest.raises(_Over):
        worker._work(runner, cast(Any, None), layers_move=False)
    error = "RuntimeError: the engine sent a Ping" if message == wire.Ping() else "MemoryError: no"
    assert told[0].startswith(error) and told[0].endswith("so all of them begin anew")


def test_a_worker_that_ends_while_it_starts(
    model: str, traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "subprocess", faulty("start"))
    with pytest.raises(GroupLost, match=r"worker \d \(node 0\) is lost: .* ended with status 3"):
        LLM(model, **PAIR)
    traces.wait_gone()


def test_a_stopped_worker_that_never_comes_is_named(
    model: str, traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "subprocess", faulty("stop"))
    monkeypatch.setattr(groups, "_OTHERS_COME_S", 0.5)
    with pytest.raises(GroupLost, match=r"worker 1 \(node 0\) is lost: it was started and has not"):
        LLM(model, **PAIR)
    traces.wait_gone()


def test_a_step_that_all_refuse_costs_no_more_and_one_that_some_refuse_the_group(
    model: str, expected: list[int], traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "subprocess", faulty("refuse"))
    monkeypatch.setattr(groups, "_AGREE_S", 1.0)
    with LLM(model, **PIPE) as llm:
        for _ in range(2):
            failed, other = llm.generate([[REFUSED_BY_ALL, 5], [5, 6]], SHORT)
            why = "The engine failed in a step .* \\(PlanError: refused on purpose\\)"
            assert re.search(why, str(failed.error)) and re.search(why, str(other.error))
            assert llm.generate([5, 6, 7], SHORT)[0].outputs[0].token_ids == expected
            llm.engine.check_integrity()
        assert not llm.engine._runner._refused
        why = (
            r"worker 1 \(node 0\) is lost: PlanError: refused on purpose; other ranks did that step"
        )
        with pytest.raises(EngineBroken, match=why):
            llm.generate([[REFUSED_BY_ONE, 5], [5, 6]], SHORT)
        traces.wait_gone()


def greet(address: str, *greetings: list[bytes]) -> Any:
    """What a group answers to the last of these messages, of one that it does not know; in time."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.connect(address)
        for frames in greetings:
            stranger.send_multipart(frames)
        return wire.decode(stranger.recv_multipart()) if stranger.poll(10_000) else None


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (wire.encode(wire.Join("1", "", "", 0, 1, 0, 2))[1], "the worker speaks protocol 1, the e"),
        (b"\x91\x01", "the worker speaks another protocol than the engine, which speaks"),
    ],
)
def test_a_worker_of_another_version_is_refused_and_harms_nobody(
    model: str, monkeypatch: pytest.MonkeyPatch, body: bytes, sentence: str
) -> None:
    """And what is no greeting is the end of a group: it may be what a member had to say."""

    def no_workers(group: groups.WorkerGroup, address: str) -> None:
        group._late_at = float("inf")

        def talk() -> None:
            answers.append(
                greet(address, [wire.encode(wire.Join("", "", "", 0, 0, 0, 0))[0], body])
            )
            greet(address, [b"\xff", b""])

        threading.Thread(target=talk, daemon=True).start()

    answers: list[Any] = []
    monkeypatch.setattr(groups.WorkerGroup, "_start_workers", no_workers)
    monkeypatch.setattr(groups.WorkerGroup, "_look_at_processes", lambda group: None)
    with pytest.raises(GroupLost, match="a worker has sent what is not a message of protocol"):
        groups.WorkerGroup(
            make_config({"model": model, "tensor_parallel_size": 2}), read_arch(model)
        )
    assert isinstance(answers[0], wire.Refusal) and sentence in answers[0].message


ODD_ANSWERS = [
    (wire.encode(wire.Ready(1, 0, 1)), "the engine answers with a message of type Ready"),
    ([b"\xff", b""], "the engine is of another version, its answer is not a message of protocol"),
]


@pytest.mark.parametrize(("answer", "sentence"), ODD_ANSWERS, ids=["Ready", "no message"])
def test_a_worker_does_not_join_an_engine_that_answers_oddly(
    model: str, traces: Traces, monkeypatch: pytest.MonkeyPatch, answer: list[bytes], sentence: str
) -> None:
    # The end of this engine would end the process of these tests.
    monkeypatch.setattr(member._Worker, "_begin_anew_once_lost", lambda worker: None)
    address = f"ipc://{traces.directory}/engine.sock"
    with zmq.Context() as context, context.socket(zmq.ROUTER) as engine:
        engine.bind(address)

        def refuse() -> None:
            identity, *_ = engine.recv_multipart()
            engine.send_multipart([identity, *answer])

        thread = threading.Thread(target=refuse)
        thread.start()
        worker = member._Worker(
            member._parser().parse_args(["--engine", address, "--model", model])
        )
        with pytest.raises(joining.Refused, match=sentence):
            worker._join()
        thread.join()
        worker._context.destroy(0)


def test_a_worker_that_gets_no_plan_says_so(model: str, traces: Traces) -> None:
    with LLM(model, **PAIR) as llm:
        llm.engine._runner._tell(1, wire.encode(wire.Refusal("this is no plan")))
        why = r"worker 1 \(node 0\) is lost: RuntimeError: the engine sent a Refusal, not a plan"
        with pytest.raises(EngineBroken, match=why):
            llm.generate([5, 6, 7], SHORT)
        traces.wait_gone()


def test_sockets_of_workers_have_short_paths(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("long" * 25)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))

    def note(group: groups.WorkerGroup, address: str) -> None:
        raise InterruptedError(address)

    monkeypatch.setattr(groups.WorkerGroup, "_start_workers", note)
    with pytest.raises(InterruptedError, match=r"ipc:///tmp/gllm-[0-9a-f]{10}-\d+-.{8}/engine"):
        groups.WorkerGroup(make_config({"model": model, **PAIR}), read_arch(model))


def test_directories_of_engines_that_were_killed_with_all_are_removed(
    traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may have made any names there; the kernel may hide their processes."""

    find = Process.of

    def of(pid: int) -> Process | None:
        if pid == 5:
            raise PermissionError
        return find(pid)

    monkeypatch.setattr(Process, "of", of)
    with subprocess.Popen(["true"]) as ended:
        pass
    namespace = pid_namespace()
    names = [f"gllm-{namespace}-{pid}-x" for pid in (ended.pid, os.getpid(), 5, "x", "²")]
    names.append(f"gllm-1{namespace}-{ended.pid}-x")
    for name in names:
        (traces.directory / name / "inner").mkdir(parents=True)
    made = Meeting()
    assert {*traces.directories()} == {made.directory, *(traces.directory / n for n in names[1:])}
    made.end()
    assert not made.directory.exists()


def test_pids_of_another_boot_have_another_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines that share a directory have the same number of their first namespace."""
    here = pid_namespace()
    assert re.fullmatch("[0-9a-f]{10}", here) and here == pid_namespace()
    monkeypatch.setattr(Path, "read_text", lambda _: "another boot")
    assert pid_namespace() != here


def test_ctrl_c_costs_what_runs_and_no_more(
    model: str, expected: list[int], traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps under way go on in the workers: what they sample is nobody's."""
    llm = LLM(model, **PIPE)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for _ in range(3):
        with monkeypatch.context() as patch:
            stream = llm.stream([3, 4, 5], ENDLESS)
            next(stream)
            patch.setattr(groups._GroupStep, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                for _ in stream:
                    pass
        assert llm.generate([5, 6, 7], SHORT)[0].outputs[0].token_ids == expected
    llm.engine.check_integrity()
    monkeypatch.setattr(groups.WorkerGroup, "_tell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([5, 6, 7], SHORT)
    monkeypatch.undo()
    with pytest.raises(EngineBroken, match="interrupted within a message"):
        llm.generate([5, 6, 7], SHORT)
    del llm, stream  # it was not closed
    gc.collect()
    traces.wait_gone()


def test_a_send_that_never_says_it_is_done_is_waited_for_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As gloo's: else every tensor ever sent would be kept."""
    waited = []
    work = SimpleNamespace(is_completed=lambda: False, wait=lambda: waited.append(1))
    monkeypatch.setattr(pipe.dist, "isend", lambda *_: work)
    sender = pipe.GroupLink(1, None)
    tensor = SimpleNamespace(contiguous=lambda: None)
    for _ in range(200):
        sender.send(tensor)  # type: ignore[arg-type]
    assert len(sender._sending) == pipe._MOST_SENDING + 1
    assert len(waited) == 200 - len(sender._sending)


def _work_with_a_fault(fault: str) -> int:
    if fault == "start":
        return 3
    if fault == "stop" and os.environ["LOCAL_RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    launch = member.Runner.launch

    def launch_or_fail(runner: Any, plan: Any) -> Any:
        tokens = {token for chunk in plan.chunks for token in chunk.tokens}
        if not runner.pipe.is_first and FAULTY in tokens and fault == "step":
            raise ValueError("broken on purpose")
        refused = {REFUSED_BY_ALL} if runner.pipe.is_first else {REFUSED_BY_ALL, REFUSED_BY_ONE}
        if refused & tokens and fault == "refuse":
            raise PlanError("refused on purpose")
        return launch(runner, plan)

    member.Runner.launch = launch_or_fail  # type: ignore[method-assign]
    return member.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(_work_with_a_fault(sys.argv[1]))

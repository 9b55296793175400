"""Two machines, as two network namespaces: who may join, what is heard where, and a cable cut.

Run as a program, this file is a front end.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
import zmq
from network import ADDRESSES, Node, two_nodes
from traced import SOON_S, WAIT_S, Traces, traced, wait_for

from gllm_engine import (
    LLM,
    ConfigError,
    Request,
    SamplingParams,
    make_config,
    wire,
    write_tiny_model,
)
from gllm_engine.engine import client
from gllm_engine.workers import channel

pytestmark = pytest.mark.timeout(300)

SMALL = {"device": "cpu", "cpu_threads": 1, "max_model_len": 4096, "num_pages": 1024}
PORT = 29500
ENGINE = f"tcp://{ADDRESSES[0]}:{PORT}"
PROMPT = [5, 6, 7]
SHORT = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    return write_tiny_model(path, "Qwen3ForCausalLM", seed=3, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def expected(model: Path) -> list[int]:
    with LLM(str(model), **SMALL) as llm:
        return llm.generate(PROMPT, SHORT)[0].outputs[0].token_ids


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Iterator[Traces]:
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # torchrun's, another listener
    with traced() as traces:
        yield traces


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    try:
        made = two_nodes()
        nodes = made.__enter__()
    except OSError as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    try:
        yield nodes
    finally:
        while Program.all:
            Program.all.pop().end()
        made.__exit__(None, None, None)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return write_key(tmp_path / "key", "a secret of two machines, thirty-two bytes at least")


def write_key(path: Path, secret: str) -> Path:
    path.touch(0o600)
    path.write_text(secret)
    return path


class Program:
    """A command on a node: its lines on stdout by and by, stderr in a file."""

    all: ClassVar[list[Program]] = []  # to be ended with the nodes

    def __init__(self, node: Node, command: list[Any], log: Path) -> None:
        self.log_path, self.lines = log, queue.Queue[str]()
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [*node.inside, *map(str, command)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        self.all.append(self)

    def end(self) -> None:
        self.process.kill()
        self.reader.join()
        with self.process:
            return

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.lines.put(line)

    def log(self) -> str:
        return self.log_path.read_text()

    def wait_log(self, words: str, timeout_s: float = WAIT_S) -> None:
        wait_for(lambda: words in self.log(), f"{words!r} in\n{self.log()}", timeout_s)

    def hear(self) -> Any:
        try:
            return json.loads(self.lines.get(timeout=WAIT_S))
        except queue.Empty:
            raise AssertionError(f"nothing is heard:\n{self.log()}") from None

    def say(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def ask(self) -> Any:
        self.say("ask")
        return self.hear()


def front_end(node: Node, model: Path, key: Path, **config: Any) -> Program:
    config |= SMALL | {"model": str(model), "nnodes": 2, "cluster_key_file": str(key)}
    config |= {"master_addr": node.address, "master_port": PORT}
    command = [sys.executable, __file__, json.dumps(config)]
    return Program(node, command, key.parent / "front.log")


def worker_options(model: Path, key: Path) -> list[Any]:
    options = ["--engine", ENGINE, "--model", model, "--node-rank", 1, "--nnodes", 2]
    return [*options, "--cluster-key-file", key]


def torchrun(node: Node, model: Path, key: Path) -> Program:
    """With --standalone its own store would listen on every address."""
    launcher: list[Any] = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 1]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file"]
    launcher += ["--rdzv-endpoint", key.parent / "rendezvous", "-m", "gllm_engine.worker"]
    return Program(node, launcher + worker_options(model, key), key.parent / "torchrun.log")


def one_worker(node: Node, log: Path, options: list[Any]) -> Program:
    return Program(node, [sys.executable, "-m", "gllm_engine.worker", *options], log)


def join(model: Path, secret: bytes | None, **different: Any) -> Any:
    """What the engine answers to one who joins as a worker of node 1 would, but for something."""
    fields = {"protocol": wire.PROTOCOL, "software": channel.software(), "node": 1, "nnodes": 2}
    fields |= {"model": channel.digest(model), "local_rank": 0, "local_size": 1}
    with zmq.Context() as context:
        socket, monitor = channel.connect(context, ENGINE, secret)
        socket.set(zmq.LINGER, 0)
        socket.send_multipart(wire.encode(wire.Join(**fields | different)))
        try:
            return (
                wire.decode(socket.recv_multipart())
                if socket.poll(3000 if secret else 1000)
                else None
            )
        finally:
            monitor.close()
            socket.close()


def test_a_pipeline_over_two_nodes(
    model: Path, expected: list[int], key: Path, nodes: tuple[Node, Node], traces: Traces,
    tmp_path: Path,
) -> None:  # fmt: skip
    first, second = nodes
    front = front_end(first, model, key, pipeline_parallel_size=2)
    front.wait_log("workers of other nodes join at")
    refuse_strangers(second, model, key, tmp_path)
    launcher = torchrun(second, model, key)
    assert front.hear() == "ready"
    assert front.ask() == expected

    assert first.listening() <= {first.address, "127.0.0.1"}
    assert second.listening() <= {second.address, "127.0.0.1"}

    front.say("stream")
    assert front.hear() == "streaming"
    first.plug(False)
    cut = time.monotonic()
    when, why = front.hear()
    assert when - cut < SOON_S
    assert "worker 1 (node 1) is lost: it was killed, stopped or cut off" in why
    assert "it is being restarted" in why
    launcher.wait_log("the engine is lost; this worker waits for another", SOON_S)
    wait_for(lambda: not second.listening(), "nothing is left open of what it was", SOON_S)
    assert "is being restarted" in front.ask()
    first.plug(True)
    wait_for(lambda: front.ask() == expected, "it is served again")
    assert launcher.process.poll() is None

    front.process.terminate()
    launcher.process.terminate()
    launcher.process.wait(WAIT_S)
    traces.wait_gone()


DIFFERENT = [
    ({"protocol": 0}, "the worker speaks protocol 0, the engine expects "),
    ({"software": "gllm 0.0, torch 1.0"}, "the worker runs gllm 0.0, torch 1.0, the engine exp"),
    ({"nnodes": 3}, "was started for a number of nodes of 3, the engine expects 2"),
    ({"local_size": 8}, "was started with a number of workers a node of 8, the engine expects 1"),
    ({"node": 0}, "the worker's node rank is 0; the engine's own node is 0, others are 1 to 1"),
    ({"node": 2}, "the worker's node rank is 2; the engine's own node is 0, others are 1 to 1"),
    ({"local_rank": 1}, "the worker is number 1 of 1, counted from 0"),
]


def refuse_strangers(node: Node, model: Path, key: Path, directory: Path) -> None:
    """Each of these is kept out, and told why, or its log says so."""
    other_model = directory / "model"
    shutil.copytree(model, other_model)
    config = json.loads((model / "config.json").read_text())
    (other_model / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    other_key = write_key(directory / "other", "another secret, which is as long as the first one")
    elsewhere = one_worker(node, directory / "one.log", worker_options(other_model, key))
    locked_out = one_worker(node, directory / "two.log", worker_options(model, other_key))
    for different, sentence in DIFFERENT:
        answer = node.run(lambda: join(model, key.read_bytes(), **different))  # noqa: B023
        assert isinstance(answer, wire.Refusal) and sentence in answer.message
    assert node.run(lambda: join(model, None)) is None
    elsewhere.wait_log("the worker has a model whose config.json has digest")
    assert elsewhere.process.wait(WAIT_S) == os.EX_CONFIG
    locked_out.wait_log("its key is not the one in")
    assert locked_out.process.poll() is None  # in case it is the engine that is a stranger
    locked_out.process.kill()


def test_a_layer_over_two_nodes(
    model: Path, expected: list[int], key: Path, nodes: tuple[Node, Node], traces: Traces
) -> None:
    """The other node is there first."""
    torchrun(nodes[1], model, key)
    front = front_end(nodes[0], model, key, tensor_parallel_size=2)
    assert front.hear() == "ready"
    assert front.ask() == expected


@pytest.mark.parametrize(
    ("mode", "secret", "sentence"),
    [
        (0o640, "x" * 40, "others may read .*; its mode must be 0600"),
        (0o600, "x" * 31, "holds 31 bytes, at least 32 are needed"),
        (None, "", "cannot be read"),
    ],
)
def test_a_bad_key_file_is_refused(
    model: Path, tmp_path: Path, mode: int | None, secret: str, sentence: str
) -> None:
    path = tmp_path / "key"
    if mode is not None:
        path.write_text(secret)
        path.chmod(mode)
    config = {"tensor_parallel_size": 2, "nnodes": 2, "master_addr": "127.0.0.1"}
    with pytest.raises(ConfigError, match=f"cluster_key_file: .*{sentence}"):
        LLM(str(model), **SMALL, **config, cluster_key_file=str(path))


def test_an_address_of_another_machine_is_refused(model: Path, key: Path) -> None:
    config = {"tensor_parallel_size": 2, "nnodes": 2, "master_addr": "192.0.2.1"}
    with pytest.raises(ConfigError, match="master_addr: cannot listen on tcp://192.0.2.1"):
        LLM(str(model), **SMALL, **config, cluster_key_file=str(key))


def _serve(config: dict[str, Any]) -> None:
    """A front end: tells what happens, a JSON value a line, and does as it is told."""
    outputs: queue.Queue[Any] = queue.Queue()
    tell = lambda value: print(json.dumps(value), flush=True)  # noqa: E731
    engine = client.EngineClient(
        make_config(config),
        scope="m/1",
        instance="m_0_0",
        owner_pid=os.getpid(),
        on_outputs=outputs.put,
        on_stats=lambda _: None,
        on_lost=lambda why: tell([time.monotonic(), why]),
    )
    tell("ready")
    for line in sys.stdin:
        params = ENDLESS if line.strip() == "stream" else SHORT
        try:
            engine.submit([Request(2, PROMPT, msgspec.convert(params, SamplingParams), 7)])
        except client.EngineUnavailable as error:
            tell(str(error))
            time.sleep(0.1)
            continue
        if params is ENDLESS:
            outputs.get(timeout=WAIT_S)
            tell("streaming")
            continue
        while outputs.qsize():  # a stream's
            outputs.get()
        tokens: list[int] = []
        while len(tokens) < SHORT.max_tokens:  # type: ignore[operator]
            tokens += outputs.get(timeout=WAIT_S).tokens
        tell(tokens)


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))

"""Through the real tritonserver: models come and go, front ends and engines die, work goes on.

What becomes of everything when the server itself ends is test_serve_cli's.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from live import Server, wait_for
from patience import SOON_S, WAIT_S
from repository import ENGINE, write_model
from streams import Streams
from traces import Traces, regions, wait_gone

from gllm_client import GenerateError, HttpClient, SyncClient

pytestmark = pytest.mark.server

NUM_STREAMS = 8
LONG = 600  # tokens: seconds of work for all streams together


class Pair:
    """`gllm serve` with model "tiny" on two front ends and "quick", which computes nothing."""

    def __init__(self, repository: Path, traces: Traces, serve: Callable[..., Server]) -> None:
        self.repository, self.traces = repository, traces
        self.tiny = write_model(repository, "tiny", 2)
        self.quick = write_model(repository, "quick", 1, device="none")
        self.server = serve(repository)

    def client(self, kind: str = "grpc") -> SyncClient | HttpClient:
        return self.server.http_client() if kind == "http" else self.server.client()

    def engine(self, model: Path) -> int:
        """The pid of the one engine process of a model."""
        (pid,) = self.traces.engines(model)
        return pid

    def answers(self, model: str = "tiny", num: int = 4) -> bool:
        """Whether the model answers `num` requests at a time: as many as front ends, twice."""
        with Streams(self.server, model, num, max_tokens=8) as streams:
            streams.wait()
            return streams.whole == streams.all


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory, serve_for: Callable[[ExitStack], Any]
) -> Iterator[Pair]:
    with ExitStack() as stack:
        traces = Traces().begin()
        stack.callback(traces.end)
        yield Pair(tmp_path_factory.mktemp("pair"), traces, serve_for(stack))


def test_front_ends_of_a_model_share_one_engine(pair: Pair) -> None:
    stubs = pair.server.stubs()
    assert {model: len(rows) for model, rows in stubs.items()} == {"tiny": 2, "quick": 1}
    assert len(pair.traces.engines()) == 2
    assert pair.engine(pair.tiny) != pair.engine(pair.quick)
    assert pair.answers("tiny")


def test_two_models_at_once(pair: Pair) -> None:
    with (
        Streams(pair.server, "tiny", 4, max_tokens=200) as tiny,
        Streams(pair.server, "quick", 4, max_tokens=2000) as quick,
    ):
        tiny.wait_whole()
        quick.wait_whole()
    for model in ("tiny", "quick"):
        pair.server.wait_idle(model)


@pytest.mark.parametrize("kind", ["grpc", "http"])
def test_unload_and_load(pair: Pair, kind: str) -> None:
    old = pair.engine(pair.quick)
    with pair.client(kind) as client:
        assert client.is_ready("quick")
        client.unload("quick")
        wait_for(lambda: not pair.traces.engines(pair.quick), "the engine has ended")
        wait_for(lambda: "quick" not in pair.server.stubs(), "its front end has ended")
        assert not client.is_ready("quick")
        with pytest.raises(GenerateError, match="quick.*not (found|ready)|no available versions"):
            client.complete("Once", model="quick", max_tokens=4)
        assert pair.answers("tiny")  # is not concerned
        client.load("quick")
        assert client.is_ready("quick")
        assert client.complete("Once", model="quick", max_tokens=4).finish_reason == "length"
    assert pair.engine(pair.quick) != old


def test_unload_lets_running_streams_end(pair: Pair) -> None:
    engine = pair.engine(pair.tiny)
    with pair.client() as client, Streams(pair.server, "tiny", NUM_STREAMS, LONG) as streams:
        client.unload("tiny")
        assert len(streams.open) == NUM_STREAMS
        with pytest.raises(GenerateError):
            client.complete("Once", model="tiny", max_tokens=4)
        assert pair.engine(pair.tiny) == engine
        streams.wait_whole()
        wait_for(lambda: not pair.traces.engines(pair.tiny), "the engine has ended")
        wait_for(lambda: "tiny" not in pair.server.stubs(), "its front ends have ended")
        client.load("tiny")
    assert pair.answers("tiny")


def test_reload_lets_running_streams_end(pair: Pair) -> None:
    """Triton brings up the new load beside the old one; the engines follow one another."""
    engine = pair.engine(pair.tiny)
    with pair.client() as client, Streams(pair.server, "tiny", NUM_STREAMS, LONG) as streams:
        (pair.tiny / "model.json").write_text(json.dumps(ENGINE | {"max_model_len": 64}))
        client.load("tiny")
        streams.wait_whole()
        answer = client.complete("Once", model="tiny", max_tokens=LONG, ignore_eos=True)
        assert answer.num_output_tokens + answer.num_input_tokens == 64
    wait_for(lambda: len(pair.traces.engines(pair.tiny)) == 1, "the old engine has ended")
    assert pair.engine(pair.tiny) != engine
    wait_for(lambda: len(pair.server.stubs()["tiny"]) == 2, "the old front ends have ended")
    assert pair.answers("tiny")
    (pair.tiny / "model.json").write_text(json.dumps(ENGINE))
    with pair.client() as client:
        client.load("tiny")


def _unknown_key(version: Path) -> None:
    (version / "model.json").write_text(json.dumps(ENGINE | {"max_sequences": 8}))


def _bad_json(version: Path) -> None:
    (version / "model.json").write_text('{"model": ".",')


def _no_weights(version: Path) -> None:
    (version / "model.safetensors").unlink()


def _truncated_weights(version: Path) -> None:
    weights = version / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)


def _unknown_architecture(version: Path) -> None:
    config = json.loads((version / "config.json").read_text())
    config["architectures"] = ["AbacusForCausalLM"]
    (version / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "kind", "sentence"),
    [
        (_unknown_key, "grpc", "unknown key 'max_sequences'; known keys are model, tokenizer,"),
        (_bad_json, "http", "model.json: not valid JSON"),
        (_no_weights, "http", "neither model.safetensors nor model.safetensors.index.json"),
        (_truncated_weights, "grpc", "model.safetensors: not a complete safetensors file"),
        (_unknown_architecture, "http", "AbacusForCausalLM.*supported are LlamaForCausalLM, "),
    ],
)
def test_a_model_that_cannot_be_loaded_says_why(
    pair: Pair, spoil: Callable[[Path], None], kind: str, sentence: str
) -> None:
    name = spoil.__name__.strip("_")
    version = write_model(pair.repository, name, 1)
    spoil(version)
    try:
        with Streams(pair.server, "tiny", 2, LONG) as others, pair.client(kind) as client:
            with pytest.raises(GenerateError, match=sentence):
                client.load(name)
            (entry,) = [e for e in client.index() if e["name"] == name]
            assert entry["state"] == "UNAVAILABLE"
            assert not client.is_ready(name)
            others.wait_whole()
        wait_for(lambda: not pair.traces.engines(version), "no engine of it is left")
        wait_for(lambda: name not in pair.server.stubs(), "no front end of it is left")
    finally:
        shutil.rmtree(pair.repository / name)


def test_a_killed_engine_ends_streams_at_once_and_comes_back(pair: Pair) -> None:
    old, start = pair.engine(pair.tiny), pair.server.log_size()
    with Streams(pair.server, "tiny", NUM_STREAMS, LONG) as streams:
        os.kill(old, signal.SIGKILL)
        killed = time.monotonic()
        streams.wait()
        assert streams.failed == streams.all
        for stream in streams.all:
            assert stream.ended_at is not None and stream.ended_at - killed < SOON_S
            assert "the engine process died" in str(stream.error)
            assert "it is being restarted" in str(stream.error)
    for i in range(NUM_STREAMS):  # the status code, which a stream of errors does not show
        line = f"request 'stream-{i}': unavailable: "
        wait_for(lambda line=line: line in pair.server.log(start), line)  # written after its end
    wait_for(lambda: pair.answers("tiny"), "both front ends answer again")
    assert pair.engine(pair.tiny) != old
    assert len(pair.server.stubs()["tiny"]) == 2
    assert "a front end of model" not in pair.server.log(start)  # no reload was needed
    pair.server.wait_idle("tiny")


def test_the_vllm_backends_health_check_takes_a_model_without_an_engine_out(pair: Pair) -> None:
    version = write_model(pair.repository, "checked", 1, device="none")
    with (version.parent / "config.pbtxt").open("a") as file:
        file.write(
            'parameters { key: "ENABLE_VLLM_HEALTH_CHECK" value { string_value: "true" } }\n'
        )
    try:
        with pair.client() as client:
            client.load("checked")
            assert client.complete("Once", model="checked", max_tokens=4).num_output_tokens == 4
            os.kill(pair.engine(version), signal.SIGKILL)
            wait_for(lambda: not client.is_ready("checked"), "it is not ready any more")
            (entry,) = [e for e in client.index() if e["name"] == "checked"]
            assert entry["state"] != "READY"
            with pytest.raises(GenerateError, match="no available versions|not ready|not found"):
                client.complete("Once", model="checked", max_tokens=4)
            wait_for(lambda: "checked" not in pair.server.stubs(), "its front end has ended")
            assert not pair.traces.engines(version)
            client.load("checked")
            assert client.complete("Once", model="checked", max_tokens=4).num_output_tokens == 4
            client.unload("checked")
            wait_for(lambda: not pair.traces.engines(version), "the engine has ended")
    finally:
        shutil.rmtree(pair.repository / "checked")


def test_sigterm_lets_running_streams_end_and_leaves_nothing(pair: Pair) -> None:
    """The last on this server, which has seen models come and go, fail and lose an engine."""
    server, traces = pair.server, pair.traces
    with Streams(server, "tiny", NUM_STREAMS, LONG) as streams:
        server.process.terminate()
        # Said by tritonserver once it refuses requests, a while after it has received the signal.
        stopping = "Waiting for in-flight requests to complete"
        wait_for(lambda: stopping in server.log(), "tritonserver takes no more requests")
        assert len(streams.open) == NUM_STREAMS
        with pair.client() as client, pytest.raises(GenerateError):
            client.complete("Once", model="tiny", max_tokens=4)
        streams.wait_whole()
    assert server.process.wait(WAIT_S) == 0
    assert not traces.processes() and not traces.files() and not regions(server.pid)


@pytest.fixture(scope="module")
def doomed(
    tmp_path_factory: pytest.TempPathFactory, serve_for: Callable[[ExitStack], Any]
) -> Iterator[Pair]:
    """Another one, to be left in a state in which tritonserver no longer stops by itself."""
    with ExitStack() as stack:
        traces = Traces().begin()
        stack.callback(traces.end)
        yield Pair(tmp_path_factory.mktemp("doomed"), traces, serve_for(stack))


def test_a_killed_front_end_costs_its_own_streams_alone(doomed: Pair) -> None:
    """The engine pauses while the front end is killed, so that this is not within a response: a
    stub that dies while it holds one of the locks it shares with tritonserver takes that along."""
    server, old = doomed.server, doomed.engine(doomed.tiny)
    victim, survivor = sorted(server.stubs()["tiny"])
    start = server.log_size()
    num = 2 * NUM_STREAMS  # Triton deals them out as it likes: so many that both have some
    running = lambda: server.metric("num_requests_running", "tiny")  # noqa: E731
    with Streams(server, "tiny", num, LONG) as streams:
        wait_for(lambda: running() == num, "the metrics know of all streams")
        os.kill(old, signal.SIGSTOP)
        streams.wait_still()
        os.kill(victim.pid, signal.SIGKILL)
        killed = time.monotonic()
        os.kill(old, signal.SIGCONT)
        # The engine drops the dead one's sequences, and with them their pages.
        wait_for(lambda: running() != num, "the engine has dropped some", SOON_S)
        left = running()
        noticed = "a front end of model tiny died; loading the model anew"
        wait_for(lambda: noticed in server.log(start), "gllm serve has noticed", SOON_S)
        assert time.monotonic() - killed < SOON_S
        wait_for(lambda: "model tiny is back" in server.log(start), "the model is back")
        assert doomed.answers("tiny")
        wait_for(lambda: len(streams.whole) == left, "the other front end's streams are whole")
        assert 0 < left < num
        assert not streams.failed  # the rest hangs: tritonserver does not tell of a stub's death
    assert doomed.engine(doomed.tiny) == old  # neither the model nor other streams are disturbed
    serving = server.stubs()["tiny"] - {survivor}
    assert len(serving) == 2 and victim not in serving
    assert doomed.answers("quick")
    server.wait_idle("tiny")


def test_sigkill_of_gllm_serve_ends_everything(doomed: Pair) -> None:
    """Also what a killed front end has left behind."""
    assert len(doomed.traces.processes()) >= 6  # gllm serve, tritonserver, 2 engines, stubs
    doomed.server.process.kill()
    doomed.server.process.wait()
    wait_gone(doomed.traces)
    assert not list(doomed.traces.private.iterdir())

"""Every way in which a client can go away, before its first token and midway; and timeouts.

After each the engine's gauges are zero again within `SOON_S`, though the work asked for takes
longer, and the cancellation is counted.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import tritonclient.grpc.aio as triton_aio
from asking import GrpcStream, ask, generate, generate_stream, sampled, tensor
from live import Server, wait_for
from patience import SOON_S
from tritonclient.utils import InferenceServerException

from gllm_client import GenerateError, connect

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

MODEL = "narrow"  # one request runs, others wait
LONG = {"max_tokens": 16_000, "ignore_eos": True, "temperature": 0}
TENSORS = {"text_input": "abc", "stream": True} | sampled(**LONG)
SHORT = {"text_input": "abc"} | sampled(max_tokens=5, ignore_eos=True, temperature=0)
Wait = Callable[[], None]

# ---------------------------------------------------------------- ways to go away
# Each sends a request, calls `ready`, which returns when the server has got so far, and leaves.


async def _requests() -> Any:
    inputs = [tensor(name, value) for name, value in TENSORS.items()]
    yield {"model_name": MODEL, "inputs": inputs}


def aio_iterator_cancel(server: Server, ready: Wait) -> None:
    async def run() -> None:
        async with triton_aio.InferenceServerClient(server.grpc) as client:
            answers = client.stream_infer(_requests())
            first = asyncio.ensure_future(anext(answers))  # this sends the request
            await asyncio.to_thread(ready)
            assert answers.cancel()
            with pytest.raises((asyncio.CancelledError, InferenceServerException)):
                await first
                async for _ in answers:  # what had come before the cancellation
                    continue

    asyncio.run(run())


def aio_task_cancel(server: Server, ready: Wait) -> None:
    async def consume() -> None:
        async with triton_aio.InferenceServerClient(server.grpc) as client:
            async for _, error in client.stream_infer(_requests()):
                assert error is None

    async def run() -> None:
        task = asyncio.create_task(consume())
        await asyncio.to_thread(ready)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


def sync_stop_stream(server: Server, ready: Wait) -> None:
    stream = GrpcStream(server)
    stream.send(TENSORS, MODEL)
    ready()
    stream.close(cancel=True)


def sigkill(server: Server, ready: Wait) -> None:
    program = (
        "import sys; from gllm_client import SyncClient\n"
        f"list(SyncClient(sys.argv[1], {MODEL!r}).generate('abc', sampling={LONG}))"
    )
    process = subprocess.Popen([sys.executable, "-c", program, server.grpc])
    try:
        ready()
    finally:
        process.kill()
        status = process.wait()
    assert status == -signal.SIGKILL


def closed_generate_stream(server: Server, ready: Wait) -> None:
    with unread(server, "generate_stream", TENSORS):
        ready()


@contextmanager
def unread(server: Server, kind: str, body: dict[str, Any]) -> Iterator[None]:
    """A request over HTTP whose connection is closed without reading any answer."""
    connection = http.client.HTTPConnection(server.http)
    try:
        connection.request("POST", f"/v2/models/{MODEL}/{kind}", json.dumps(body))
        yield
    finally:
        connection.close()


GRPC = [aio_iterator_cancel, aio_task_cancel, sync_stop_stream, sigkill]


# ---------------------------------------------------------------- what the server makes of it


class Watch:
    """The metrics of `narrow`, against those when the watch began."""

    def __init__(self, server: Server) -> None:
        self._server = server
        server.settle(MODEL)
        self._before = {name: self._now(name) for name in ("cancellations", "errors")}
        self._tokens = self._now("tokens")

    def _now(self, name: str) -> float:
        full = {
            "cancellations": "request_cancellations_total",
            "errors": "request_errors_total",
            "tokens": "generation_tokens_total",
            "waiting": "num_requests_waiting",
        }
        return self._server.metric(full[name], MODEL)

    def is_midway(self) -> None:
        """Some tokens of the one request are there."""
        wait_for(lambda: self._now("tokens") > self._tokens + 20, "the request is midway")

    def one_waits(self) -> None:
        wait_for(lambda: self._now("waiting") == 1, "a request waits")

    def none_waits(self) -> None:
        wait_for(lambda: self._now("waiting") == 0, "the waiting request is gone", SOON_S)

    def check(self, *, cancellations: int = 0, errors: int = 0) -> None:
        """So many requests were cancelled and failed, not one more."""
        wanted = {"cancellations": cancellations, "errors": errors}
        wait_for(
            lambda: {name: self._now(name) - was for name, was in self._before.items()} == wanted,
            f"counted: {wanted}",
            SOON_S,
        )

    def num_ended(self) -> float:
        """Requests cancelled or failed since the watch began."""
        return sum(self._now(name) - was for name, was in self._before.items())

    def is_over(self) -> None:
        """Nothing runs, long before all tokens could have been made; and the next one works."""
        self._server.wait_idle(MODEL, SOON_S)
        assert self._now("tokens") - self._tokens < LONG["max_tokens"]
        (response,) = ask(self._server, SHORT | {"return_token_ids": True}, MODEL)
        assert len(response.outputs["token_ids"]) == 5


@contextmanager
def busy(server: Server) -> Iterator[Iterator[Any]]:
    """A stream that holds the one slot, so that others wait for their first token."""
    with server.client(MODEL) as client:
        answer = client.generate("abc", **LONG)
        next(answer)
        yield answer
        next(answer)  # nothing that happened to another one has ended it
        answer.close()


@pytest.mark.parametrize("leave", [*GRPC, closed_generate_stream], ids=lambda way: way.__name__)
def test_leaving_midway(narrow: Server, leave: Callable[[Server, Wait], None]) -> None:
    watch = Watch(narrow)
    leave(narrow, watch.is_midway)
    watch.check(cancellations=1)
    watch.is_over()


@pytest.mark.parametrize("leave", GRPC, ids=lambda way: way.__name__)
def test_leaving_before_the_first_token(
    narrow: Server, leave: Callable[[Server, Wait], None]
) -> None:
    watch = Watch(narrow)
    with busy(narrow):
        leave(narrow, watch.one_waits)
        watch.none_waits()
        watch.check(cancellations=1)
    watch.check(cancellations=2)
    watch.is_over()


def test_a_generate_stream_left_while_it_waits_ends_with_its_first_tokens(narrow: Server) -> None:
    """tritonserver looks at a connection when it writes to it, so it cannot know sooner."""
    watch = Watch(narrow)
    with busy(narrow):
        closed_generate_stream(narrow, watch.one_waits)
    watch.check(cancellations=2)
    watch.is_over()


@pytest.mark.parametrize("waits", [False, True], ids=["midway", "before the first token"])
def test_a_generate_that_was_left_ends_by_its_timeout_at_the_latest(
    narrow: Server, waits: bool
) -> None:
    """tritonserver 2.51 does not tell a backend that the client of /generate is gone."""
    watch = Watch(narrow)
    body = TENSORS | {"stream": False, "timeout": 2_000_000}
    with busy(narrow) if waits else nullcontext(), unread(narrow, "generate", body):
        watch.one_waits() if waits else watch.is_midway()
    wait_for(lambda: watch.num_ended() == 1 + waits, "all have ended", SOON_S)
    watch.is_over()


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_closing_an_answer_of_the_own_client(narrow: Server, scheme: str) -> None:
    watch = Watch(narrow)
    with connect(f"{scheme}://{narrow.address(scheme)}", MODEL) as client:
        client.generate("abc", **LONG).close()  # never begun: nothing was asked
        answer = client.generate("abc", **LONG)
        next(answer)
        answer.close()
    watch.check(cancellations=1)
    watch.is_over()


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_client_that_waits_no_longer_has_cancelled(narrow: Server, scheme: str) -> None:
    watch = Watch(narrow)
    with busy(narrow), connect(f"{scheme}://{narrow.address(scheme)}", MODEL) as client:
        with pytest.raises(GenerateError, match="timeout"):
            client.complete("abc", timeout=0.5, **LONG)
        watch.none_waits()
    wait_for(lambda: watch.num_ended() == 2, "both have ended", SOON_S)
    watch.is_over()


def test_a_cancellation_is_logged_with_the_requests_id(narrow: Server) -> None:
    start = narrow.log_size()
    stream = GrpcStream(narrow)
    stream.send(TENSORS, MODEL, request_id="leaver")
    stream.take()
    stream.close(cancel=True)
    line = "request 'leaver': cancelled: Request was cancelled"
    wait_for(lambda: line in narrow.log(start), line)


def test_many_leave_at_once(server: Server) -> None:
    """The shipped model, on two front ends: of 40 streams every second one is cancelled."""
    server.settle()
    before = server.metric("request_cancellations_total")
    fields = sampled(max_tokens=900, ignore_eos=True, temperature=0)
    leavers = [GrpcStream(server) for _ in range(20)]
    stayers = [GrpcStream(server) for _ in range(20)]
    for leaver, stayer in zip(leavers, stayers, strict=True):
        leaver.send({"text_input": "ROMEO:", "stream": True} | fields)
        short = {"text_input": "ROMEO:", "return_token_ids": True}
        stayer.send(short | sampled(max_tokens=30, ignore_eos=True, temperature=0))
    for leaver in leavers:
        leaver.take()
        leaver.close(cancel=True)
    answers = [stayer.take() for stayer in stayers]
    for stayer in stayers:
        stayer.close()
    assert {len(answer.outputs["token_ids"]) for answer in answers} == {30}
    assert len({answer.text for answer in answers}) == 1
    wait_for(
        lambda: server.metric("request_cancellations_total") - before == 20, "20 cancellations"
    )
    server.wait_idle()


# ---------------------------------------------------------------- Triton's request timeout


def _by_grpc(server: Server, streaming: bool) -> str:
    with GrpcStream(server) as stream, pytest.raises(InferenceServerException) as refused:
        stream.send(TENSORS | {"stream": streaming}, MODEL, timeout=300_000)
        while True:
            stream.take()
    return refused.value.message()


def _by_http(server: Server, streaming: bool) -> str:
    body = TENSORS | {"stream": streaming, "timeout": 300_000}
    if not streaming:
        status, answer = generate(server, body, MODEL)
        assert status == 400  # Triton's HTTP side has this one code for what a backend reports
        return answer["error"]
    with pytest.raises(AssertionError) as refused:
        generate_stream(server, body, MODEL)
    return str(refused.value)


@pytest.mark.parametrize("streaming", [False, True], ids=["one-shot", "stream"])
@pytest.mark.parametrize("by", [_by_grpc, _by_http], ids=["grpc", "http"])
def test_a_timeout_ends_a_request(
    narrow: Server, by: Callable[[Server, bool], str], streaming: bool
) -> None:
    watch = Watch(narrow)
    began = time.monotonic()
    assert "timeout: 300000 microseconds are over" in by(narrow, streaming)
    assert 0.3 <= time.monotonic() - began < SOON_S
    watch.check(errors=1)
    watch.is_over()


def test_a_timeout_ends_a_request_that_waits(narrow: Server) -> None:
    watch = Watch(narrow)
    with busy(narrow):
        assert "timeout: 300000 microseconds are over" in _by_grpc(narrow, True)
        watch.none_waits()
        watch.check(errors=1)
    watch.check(errors=1, cancellations=1)
    watch.is_over()


def test_a_timeout_that_is_not_reached_changes_nothing(narrow: Server) -> None:
    watch = Watch(narrow)
    for response in ask(narrow, SHORT, MODEL, timeout=100_000_000):
        assert response.text
    assert generate(narrow, SHORT | {"timeout": 100_000_000}, MODEL)[0] == 200
    watch.check()
    watch.is_over()

"""Whatever order things happen in: one FINAL, the right text in the right order, one thread."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from unittest import mock

import fake_triton
from fake_triton import TritonError
from front import front_end, request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gllm_engine import Finish

NUM = 4
STEPS = st.one_of(
    st.tuples(st.just("token"), st.lists(st.integers(0, NUM - 1), min_size=1, unique=True)),
    st.tuples(st.just("finish"), st.integers(0, NUM - 1)),
    st.tuples(st.just("error"), st.integers(0, NUM - 1)),
    st.tuples(st.just("cancel"), st.integers(0, NUM - 1)),
    st.tuples(st.just("gone"), st.integers(0, NUM - 1)),
    st.tuples(st.just("pause"), st.integers(1, 3)),
    st.just(("lost", None)),
)


class Script:
    """Plays steps to a front end and knows what each request must have seen in the end."""

    def __init__(self, model, client, streaming: list[bool]) -> None:
        self.client = client
        self.requests = [
            request(stream=s, request_id=str(i), exclude_input_in_output=True)
            for i, s in enumerate(streaming)
        ]
        for i, r in enumerate(self.requests):
            r.record.before_send = lambda number, i=i: time.sleep(0.0005 * ((number + i) % 3))
        model.execute(self.requests)
        self.ids = [r.id for r in client.submitted]
        self.said = [""] * NUM  # before the end
        self.end: list[str | None] = [None] * NUM
        self.gone = [False] * NUM

    def play(self, kind: str, value) -> None:
        if kind == "token":
            running = [i for i in value if self.end[i] is None]
            if running:
                self.client.say([self.ids[i] for i in running], "é")  # two tokens a character
            for i in running:
                self.said[i] += "é"
        elif kind == "finish":
            self.finish(value, Finish("stop"), "finish")
        elif kind == "error":
            self.finish(value, Finish("error", status="internal", message="broken"), "error")
        elif kind == "cancel":
            self.requests[value].record.cancelled = True
        elif kind == "gone":
            self.requests[value].record.fail_at = 1
            self.gone[value] = True
        elif kind == "pause":
            time.sleep(0.002 * value)
        else:
            self.client.on_lost("lost")
            self.end = [end or "lost" for end in self.end]

    def finish(self, i: int, finish: Finish, end: str) -> None:
        if self.end[i] is None:  # the engine says nothing of a sequence that has ended
            self.client.say(self.ids[i], "z", finish)
            self.said[i] += "z"
            self.end[i] = end

    def check(self, i: int) -> None:
        record = self.requests[i].record
        assert not record.violations
        if self.gone[i]:
            assert self.said[i].startswith(record.text())
            return
        record.check()
        if record.cancelled and record.error is not None:
            assert record.error.code() in (TritonError.CANCELLED, *self.codes(i))
            assert self.said[i].startswith(record.text())
            return
        assert record.error is None or record.error.code() in self.codes(i)
        whole = record.error is None or len(record.data) > 0
        assert (record.error is None) == (self.end[i] == "finish")
        if whole:
            assert record.text() == self.said[i]

    def codes(self, i: int) -> tuple[int, ...]:
        code = {"error": TritonError.INTERNAL, "lost": TritonError.UNAVAILABLE}.get(self.end[i])
        return () if code is None else (code,)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=st.lists(STEPS, max_size=25),
    streaming=st.lists(st.booleans(), min_size=NUM, max_size=NUM),
    coalesce=st.booleans(),
    threads=st.integers(1, 3),
)
def test_every_interleaving_ends_well(steps, streaming, coalesce, threads) -> None:
    fake_triton.new_server()
    parameters = {"sender_threads": str(threads), "coalesce": str(coalesce).lower()}
    with (
        mock.patch("gllm_backend.gllm.model.SWEEP_S", 0.001),
        tempfile.TemporaryDirectory() as directory,
        front_end(Path(directory), parameters) as (model, client),
    ):
        script = Script(model, client, streaming)
        for kind, value in steps:
            script.play(kind, value)
        for i in range(NUM):
            if script.end[i] is None:
                script.play("finish", i)
        model.finalize()
        for i in range(NUM):
            script.check(i)
        assert not model.live
        assert not model._sequences

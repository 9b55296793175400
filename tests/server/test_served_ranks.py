"""Through the real tritonserver: a model on two ranks, and what becomes of streams without one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from live import Server, wait_for
from patience import SOON_S
from repository import ENGINE, write_model
from streams import Streams
from traces import Traces

from gllm_engine import LLM, SamplingParams

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

PROMPTS = ["Once upon a time", "def add(a, b):", "你好,世界。", "The capital of France"]
WORKER = "gllm_engine.worker"


def workers(traces: Traces) -> list[int]:
    return sorted(pid for pid, command in traces.processes().items() if WORKER in command)


def test_two_ranks_behind_tritonserver(tmp_path: Path, serve: Callable[..., Server]) -> None:
    model = write_model(tmp_path, "pair", 2, tensor_parallel_size=2)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    alone = {"cpu_threads": 1, "num_pages": 256, "max_model_len": ENGINE["max_model_len"]}
    with LLM(str(model), **alone) as llm:
        expected = [output.outputs[0].text for output in llm.generate(PROMPTS, params)]
    traces = Traces().begin()
    try:
        server = serve(tmp_path)
        ask_killing_one_between(server, traces, expected)
        assert server.stop() == 0
        wait_for(lambda: not traces.processes(), "every process has ended")
        assert not traces.files()
    finally:
        traces.end()


def ask_killing_one_between(server: Server, traces: Traces, expected: list[str]) -> None:
    def answers() -> list[str]:
        with server.client("pair") as client:
            options = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
            streams = [client.generate(prompt, **options) for prompt in PROMPTS]
            return ["".join(chunk.text for chunk in stream) for stream in streams]

    assert answers() == expected
    old = workers(traces)
    assert len(old) == 2
    with Streams(server, "pair", 4, 4000) as streams:
        os.kill(old[1], signal.SIGKILL)
        killed = time.monotonic()
        streams.wait()
        assert streams.failed == streams.all
        for stream in streams.all:
            assert stream.ended_at is not None and stream.ended_at - killed < SOON_S
            assert "(node 0) is lost: " in str(stream.error)
    wait_for(lambda: len(set(workers(traces)) - set(old)) == 2, "there are two workers again")

    def answers_again() -> bool:
        with Streams(server, "pair", 4, 8) as streams:
            streams.wait()
            return streams.whole == streams.all

    wait_for(answers_again, "it is served again")
    assert answers() == expected and not set(old) & set(workers(traces))

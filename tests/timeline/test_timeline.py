"""The recorder, the arithmetic of shares on made-up spans, and the file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trace_checks import covered, read_trace, tracks

from gllm_engine import LLM, ConfigError, SamplingParams, write_tiny_model
from gllm_engine.config import EngineConfig, make_config
from gllm_engine.runner.step_timer import EventClock
from gllm_engine.timeline import OFF, Recorder, Timeline, activity, check_writable
from gllm_engine.timeline.intervals import Times, length, minus, overlap, union
from gllm_engine.timeline.shares import find_shares
from gllm_engine.types import RankSpans, Span

SMALL = {"device": "cpu", "cpu_threads": 1, "max_model_len": 128, "num_pages": 64}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PAIRS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=6)


def points(times: Times) -> set[int]:
    return {point for begin, end in times for point in range(begin, end)}


@given(PAIRS, PAIRS)
def test_intervals_are_sets_of_points(some: Times, others: Times) -> None:
    a, b = union(some), union(others)
    assert points(a) == points(some) and length(a) == len(points(some))
    assert points(overlap(a, b)) == points(a) & points(b)
    assert points(minus(a, b)) == points(a) - points(b)
    for times in (a, overlap(a, b), minus(a, b)):
        assert times == union(times)


def device(name: str, step: int, begin: int, end: int) -> Span:
    return Span("device", name, step, begin, end)


def host(name: str, begin: int, end: int, step: int = -1) -> Span:
    return Span("host", name, step, begin, end)


def percent(share: Any) -> dict[str, int]:
    names = ("busy", "communication", "bubble", "host_bound", "no_work", "launching")
    return {name: round(100 * getattr(share, name)) for name in names}


ENGINE = [
    host(activity.PLAN, 0, 5),
    host(activity.AWAIT_RESULT, 5, 80),
    host(activity.COMMIT, 80, 84, 1),
    host(activity.NO_WORK, 84, 100),
]
FIRST = [
    host(activity.AWAIT_PLAN, 0, 5),
    host(activity.LAUNCH, 5, 15, 1),
    host(activity.AWAIT_PLAN, 15, 100),
    device(activity.COMPUTE, 1, 8, 40),
    device(activity.COLLECTIVE, 1, 10, 14),
    device(activity.COLLECTIVE, 1, 30, 36),
]
SECOND = [
    host(activity.AWAIT_PLAN, 0, 5),
    host(activity.RECEIVE, 5, 6, 1),
    host(activity.LAUNCH, 6, 12, 1),
    host(activity.SAMPLE, 12, 20, 1),
    host(activity.AWAIT_PLAN, 20, 100),
    device(activity.RECEIVE, 1, 6, 45),
    device(activity.COMPUTE, 1, 45, 70),
    device(activity.SAMPLE, 1, 70, 75),
]


def test_shares_of_two_stages() -> None:
    """By hand, over 100 ns.

    First stage: idle 0-8, when the engine and then its host work; 8-40 computing, 10 of them in
    collectives and 3 of the others (8-10, 14-15) under launch; idle 40-84, when all wait but for
    the 4 of commit; no work 84-100. Second stage: idle 0-6, 5 of plan and the next one is its
    host's wait for data; receives 6-45, of which the first stage computes until 40; idle 75-84.
    """
    first, second = find_shares(ENGINE, [FIRST, SECOND], 2, (0, 100))
    parts = {"busy": 22, "communication": 10, "bubble": 40, "host_bound": 12}
    assert percent(first) == parts | {"no_work": 16, "launching": 3}
    parts = {"busy": 30, "communication": 5, "bubble": 34 + 1 + 5, "host_bound": 5 + 4}
    assert percent(second) == parts | {"no_work": 16, "launching": 0}
    assert (first.stage, first.steps, second.rank, second.stage) == (0, 1, 1, 1)


def test_a_single_stage_has_no_bubble() -> None:
    (alone,) = find_shares(ENGINE, [FIRST], 1, (0, 100))
    assert percent(alone)["bubble"] == 0 and percent(alone)["host_bound"] == 12 + 40
    both = find_shares(ENGINE, [FIRST, FIRST], 1, (0, 100))
    assert percent(both[0]) == percent(both[1]) == percent(alone)


def test_a_part_of_the_time() -> None:
    first, _ = find_shares(ENGINE, [FIRST, SECOND], 2, (8, 28))
    assert percent(first)["busy"] == 80 and percent(first)["communication"] == 20
    assert first.seconds == 20e-9 and first.steps == 0  # its step ends later


def recorded(steps: int, max_spans: int = 1000) -> Recorder:
    recorder = Recorder(max_spans)
    for step in range(steps):
        recorder.mark(activity.PLAN)
        recorder.mark(activity.AWAIT_RESULT)
        now = time.monotonic_ns()
        recorder.add(device(activity.COMPUTE, step, now - 10, now))
        recorder.mark(activity.COMMIT, step)
    return recorder


def test_memory_is_bounded_and_a_summary_begins_where_all_is_kept() -> None:
    spans = recorded(500, max_spans=100).spans(0)
    assert len(spans.spans) == 100
    config = EngineConfig(model=".")
    (share,) = Timeline(config, spans, []).summary().shares
    assert 20 <= share.steps <= 26 and share.seconds < 1
    assert spans.complete_from == min(s.end for s in spans.spans if s.track == "host")
    assert recorded(5).spans(0).complete_from == 0


def test_nothing_is_recorded_when_it_is_off() -> None:
    OFF.mark(activity.PLAN)
    OFF.add(device(activity.COMPUTE, 1, 2, 3))
    assert OFF.spans(0).spans == []


def test_ranks_of_other_hosts_are_put_on_the_engines_clock(tmp_path: Path) -> None:
    """The second host's monotonic clock is ahead by 1,000 ns."""
    config = EngineConfig(
        model=".",
        pipeline_parallel_size=2,
        nnodes=2,
        master_addr="10.0.0.1",
        cluster_key_file="key",
    )
    late = [Span(s.track, s.name, s.step, s.begin + 1000, s.end + 1000) for s in SECOND]
    ranks = [RankSpans(1, 5000, 0, late), RankSpans(0, 6000, 0, FIRST)]
    timeline = Timeline(config, RankSpans(0, 6000, 0, ENGINE), ranks)
    assert timeline.missing == []
    # rank 1's time of day: 5000 + 1000 + t; the engine's: 6000 + t
    here = Timeline(
        EngineConfig(model=".", pipeline_parallel_size=2),
        RankSpans(0, 0, 0, ENGINE),
        [RankSpans(0, 0, 0, FIRST), RankSpans(1, 0, 0, SECOND)],
    )
    assert timeline.summary() == here.summary()
    timeline.write(str(tmp_path / "out.json"))
    clock = json.loads((tmp_path / "out.json").read_text())["otherData"]["clock"]
    assert "time of day" in clock


def test_a_rank_that_does_not_answer_is_told(tmp_path: Path) -> None:
    config = EngineConfig(model=".", pipeline_parallel_size=2)
    engine = RankSpans(0, 0, 0, ENGINE)
    timeline = Timeline(config, engine, [RankSpans(1, 0, 0, SECOND)])
    assert timeline.missing == [0]
    (share,) = timeline.write(str(tmp_path / "out.json")).shares
    assert share.rank == 1
    named = tracks(json.loads((tmp_path / "out.json").read_text()))
    assert {process for process, _ in named} == {"engine", "rank 1, stage 1"}
    assert Timeline(config, RankSpans(0, 0, 0, []), []).summary().shares == []


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: path.mkdir(), r"cannot be written \(Is a directory\)"),
        (lambda path: os.mkfifo(path), r"cannot be written \(No such device or address\)"),
        (lambda path: path.symlink_to("/dev/null"), "is not a file"),
        (lambda path: path.symlink_to(path), "cannot be written"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_at_the_start(
    tmp_path: Path, make: Any, sentence: str
) -> None:
    path = tmp_path / "out.json"
    make(path)
    with pytest.raises(ConfigError, match=f"timeline: .*out.json {sentence}"):
        check_writable(str(path))
    with pytest.raises(ConfigError, match=r"absent/out.json cannot be written \(No such file"):
        check_writable(str(tmp_path / "absent/out.json"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), "Qwen3ForCausalLM", seed=3)


def test_the_engine_refuses_it_before_the_model_is_read(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="timeline: .* cannot be written"):
        LLM(str(model), **SMALL, load_format="dummy", timeline=str(tmp_path))
    config = make_config({"model": str(model), "timeline": "out.json"}, tmp_path)
    assert config.timeline == str(tmp_path / "out.json")


def test_a_model_in_one_process(model: Path, tmp_path: Path) -> None:
    """One thread is the engine's and the rank's: its spans follow each other without gaps."""
    path = tmp_path / "out.json"
    with LLM(str(model), **SMALL, timeline=str(path)) as llm:
        llm.generate("once upon a time", GREEDY)
        begin = time.monotonic_ns()
        llm.generate(["a", "the quick brown fox"] * 3, GREEDY)
        end = time.monotonic_ns()
        summary = llm.engine.timeline().summary((begin, end))
        assert path.read_text() == ""
    trace = read_trace(path)
    found = tracks(trace)
    assert found.keys() == {("rank 0, stage 0", "host"), ("rank 0, stage 0", "device")}
    origin = trace["otherData"]["begin_ns"]
    period = (begin - origin) / 1000, (end - origin) / 1000
    assert covered(found["rank 0, stage 0", "host"], *period) > 0.95
    (share,) = summary.shares
    assert share.steps == 12 and share.busy > 0.2 and share.bubble == share.communication == 0
    (activities,) = summary.hosts.values()
    assert 0.95 < sum(activities.values()) <= 1 + 1e-9
    told = trace["otherData"]["summary"]["shares"][0]
    assert told["no_work"] < 0.5 and told["steps"] == 24
    assert {activity.PLAN, activity.LAUNCH, activity.SAMPLE, activity.COMMIT} <= activities.keys()
    before = path.read_bytes()
    llm.close()
    assert path.read_bytes() == before


def test_without_the_key_nothing_is_recorded(model: Path) -> None:
    with LLM(str(model), **SMALL) as llm:
        llm.generate("a", GREEDY)
        assert llm.engine.timeline().summary().shares == []


def test_a_disk_that_is_full_at_the_end_is_told(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "dir").mkdir()
    llm = LLM(str(model), **SMALL, timeline=str(tmp_path / "dir/out.json"))
    llm.generate("a", GREEDY)
    (tmp_path / "dir/out.json").unlink()
    (tmp_path / "dir").rmdir()
    llm.close()
    assert "out.json cannot be written (No such file or directory)" in caplog.text


class FakeEvent:
    """An event of a GPU whose clock started elsewhere and is fast by 100 microseconds a second."""

    gpu_now_ns = 0.0
    rate = 1.0001

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.gpu_now_ns * self.rate + 7e9

    def synchronize(self) -> None:
        """Complete at once."""

    def elapsed_time(self, other: FakeEvent) -> float:
        return (other.at - self.at) / 1e6


@contextmanager
def on_stream(stream: object) -> Iterator[None]:
    yield


def test_events_of_a_gpu_are_put_on_the_hosts_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a minute, whatever the drift; steps do not overlap."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: None)
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    clock = EventClock(torch.device("cpu"))
    told: list[int] = []
    for ms in range(0, 60_000, 20):
        monkeypatch.setattr(time, "monotonic_ns", lambda ms=ms: 10**15 + ms * 10**6)
        moments = []
        anchor = clock.anchor()
        for later_ms in (0, 15, 20, 17):
            FakeEvent.gpu_now_ns = (ms + later_ms) * 1e6
            moments.append(clock.now())
        begin, compute, end, collective = clock.times(anchor, moments)
        assert begin < compute < collective < end
        assert abs(end - (10**15 + (ms + 20) * 10**6)) < 0.15e6
        assert not told or begin >= told[-1]
        told.append(end)
        FakeEvent.gpu_now_ns = (ms + 20) * 1e6


def test_a_slow_reading_of_the_clocks_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy GPU reaches an event late, at the end of what the host has waited for it."""
    host = [10**15]

    class LateEvent(FakeEvent):
        waits_ms = iter([3.0, 0.02, 5.0, 0.4])

        def record(self) -> None:
            host[0] += round(next(self.waits_ms, 0.0) * 1e6)
            FakeEvent.gpu_now_ns = host[0] - 10**15
            super().record()

    monkeypatch.setattr(torch.cuda, "Event", LateEvent)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: None)
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(time, "monotonic_ns", lambda: host[0])
    clock = EventClock(torch.device("cpu"))
    (now,) = clock.times(clock.anchor(), [clock.now()])
    assert abs(now - host[0]) < 0.02e6

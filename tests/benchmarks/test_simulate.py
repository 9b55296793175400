"""The simulator against cases small enough to do by hand, and against the scheduler alone."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import deque
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from gllm_benchmarks import simulate
from gllm_benchmarks.simulate import (
    DEFAULTS,
    Pipeline,
    Roofline,
    Run,
    make_costs,
)
from gllm_benchmarks.workloads import lengths, poisson
from gllm_engine import (
    POLICIES,
    CostModel,
    EngineConfig,
    SamplingParams,
    Scheduler,
    Sequence,
    StepPlan,
    StepResult,
    Work,
    read_arch,
)
from gllm_engine.types import Chunk

SHAPE = Path(simulate.__file__).parent / "models" / "qwen3-0.6b"


def free(work: Work) -> float:
    return 0.0


def configure(depth: int, stages: int = 1, **values: Any) -> EngineConfig:
    ranks = {"plans_in_flight": depth, "pipeline_parallel_size": stages}
    return EngineConfig(model=".", **DEFAULTS | ranks | values)


def play(
    policy: str,
    pipeline: Pipeline,
    pairs: list[tuple[int, int]],
    arrivals: list[float],
    **config: Any,
) -> Run:
    stages = len(pipeline.busy)
    depth = config.pop("depth", stages + 1)
    rule = POLICIES[policy]
    return simulate.simulate(configure(depth, stages, **config), rule, pipeline, pairs, arrivals)


def prompts(step: int, *slots_and_lengths: tuple[int, int]) -> StepPlan:
    chunks = [Chunk(slot, 0, [0] * length, True) for slot, length in slots_and_lengths]
    return StepPlan(step, [], [], [], chunks)


def decodes(step: int, *slots: int) -> StepPlan:
    return StepPlan(step, [], [], list(slots), [])


# ------------------------------------------------------------ the tandem queue


def test_steps_follow_one_another_through_the_stages() -> None:
    """Stages of 1 s and 3 s a token, the head 0.5 s a row, 0.25 s between stages."""
    stages = [CostModel(0.0, token=1.0).seconds, CostModel(0.0, token=3.0).seconds]
    pipeline = Pipeline(stages, CostModel(0.0, sequence=0.5).seconds, lambda work: 0.25)
    # Two tokens: 0-2 on the first stage, from 2.25 on the second, 2 x 3 + 0.5 there.
    assert pipeline.launch(prompts(1, (0, 2)), 0.0) == (8.75, StepResult(1, [0], seconds=6.5))
    # One: 2-3 on the first, there at 3.25, but the second is free at 8.75.
    assert pipeline.launch(prompts(2, (1, 1)), 0.0)[0] == 8.75 + 3.5
    # Ready before the first stage is used again: 20-21, 21.25-24.75.
    assert pipeline.launch(prompts(3, (2, 1)), 20.0)[0] == 24.75
    assert pipeline.busy == [4.0, 6.5 + 3.5 + 3.5]


def test_a_decode_waits_for_its_token_and_costs_its_context() -> None:
    costs = [CostModel(1.0, kv=0.1).seconds] * 2
    pipeline = Pipeline(costs, free, free)
    first, _ = pipeline.launch(prompts(1, (0, 10)), 0.0)
    assert first == 4.0  # 10 tokens to load on each
    other, _ = pipeline.launch(prompts(2, (1, 20)), 0.0)
    assert other == 5.0 + 3.0  # the first stage has it at 2-5, the second is free at 4
    # The first stage is free at 2 and at 6.1, but the tokens are known at 4 and at 8.2.
    pipeline = Pipeline(costs, free, free)
    pipeline.launch(prompts(1, (0, 10)), 0.0)
    end, _ = pipeline.launch(decodes(2, 0), 0.0)
    assert end == pytest.approx(4.0 + 2 * 2.1)
    end, _ = pipeline.launch(decodes(3, 0), 0.0)
    assert end == pytest.approx(8.2 + 2 * 2.2)


def test_chunks_that_do_not_sample_need_no_head() -> None:
    pipeline = Pipeline([free], CostModel(1.0).seconds, free)
    plan = StepPlan(1, [], [], [], [Chunk(0, 0, [0] * 8, False)])
    assert pipeline.launch(plan, 0.0) == (0.0, StepResult(1, []))
    assert pipeline._work(StepPlan(2, [], [], [], [Chunk(0, 8, [0] * 2, True)])) == (2, 19, 10, 1)


def test_two_requests_on_two_stages_by_hand() -> None:
    """A second a step and stage: of each request a token every 2 s."""
    pipeline = Pipeline([CostModel(1.0).seconds] * 2, free, free)
    run = play("chunked_prefill", pipeline, [(4, 3), (4, 3)], [0.0, 0.5])
    # The first is launched at 0, its second step behind it. The second is seen when the first
    # step ends, at 2, and goes behind that second step; from then on they take turns.
    assert run.records[0].times == [2.0, 4.0, 6.0]
    assert run.records[1].times == [5.0, 7.0, 9.0]
    assert (run.steps, run.preemptions) == (6, 0)
    assert run.idle == [pytest.approx(1 / 3)] * 2


def test_stages_idle_by_what_the_slowest_takes() -> None:
    stages = [CostModel(1.0).seconds, CostModel(4.0).seconds]
    run = play("token_throttling", Pipeline(stages, free, free), [(64, 200)] * 30, [0.0] * 30)
    assert run.idle[0] == pytest.approx(0.75, abs=0.02) and run.idle[1] < 0.02


# ------------------------------------------------------------ with the real scheduler


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("depth", [1, 2])
def test_at_no_cost_it_takes_the_steps_of_the_scheduler_alone(policy: str, depth: int) -> None:
    pairs = lengths("share")[:60]
    run = play(policy, Pipeline([free], free, free), pairs, [0.0] * 60, depth=depth)
    config = configure(depth, schedule_policy=policy)
    scheduler = Scheduler(config, DEFAULTS["num_pages"], 10_000, ())
    for number, (prompt_len, output_len) in enumerate(pairs):
        sampling = SamplingParams(max_tokens=output_len, ignore_eos=True)
        scheduler.add(Sequence((b"", number), [0] * prompt_len, sampling, 0))
    plans: deque[StepPlan] = deque()
    while scheduler.has_work:
        plan = scheduler.schedule() if len(plans) < depth else None
        if plan is not None:
            plans.append(plan)
        if plan is None or len(plans) == depth:
            done = plans.popleft()
            sampled = len(done.decode_slots) + sum(chunk.samples for chunk in done.chunks)
            scheduler.commit(StepResult(done.step, [0] * sampled))
    assert run.steps == scheduler.stats().steps > max(n for _, n in pairs)
    assert all(record.is_complete for record in run.records)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_ends_and_the_same_seed_gives_the_same_times(policy: str) -> None:
    pairs, arrivals = lengths("share")[:40], poisson(40, 20.0, seed=3)
    cost = CostModel(3e-3, 25e-6, 1e-9, 15e-9, 1e-6).seconds

    def once() -> Run:
        return play(policy, Pipeline([cost] * 3, free, free), pairs, arrivals, num_pages=400)

    run = once()
    assert run == once()
    for record, due in zip(run.records, arrivals, strict=True):
        assert record.is_complete and record.times == sorted(record.times)
        assert record.times[0] >= due + 3 * 3e-3  # every token passes all stages
        assert all(b - a >= 3 * 3e-3 for a, b in zip(record.times, record.times[1:], strict=False))


def test_what_needs_tokens_in_flight_leaves_a_pipeline_empty() -> None:
    """chunked_prefill puts every decode into every step, so on stages they go one by one."""
    cost, pairs = CostModel(1e-3).seconds, [(16, 100)] * 40
    runs = {
        name: play(name, Pipeline([cost] * 4, free, free), pairs, [0.0] * 40)
        for name in ("chunked_prefill", "token_throttling")
    }
    assert min(runs["chunked_prefill"].idle) > 0.7 > 0.3 > max(runs["token_throttling"].idle)


def test_phases_win_where_mixed_steps_are_launched_by_the_host() -> None:
    """And lose where a mixed step computes prompts while it reads the weights for the decodes."""
    pairs = lengths("share")[:400]
    part = Roofline(4.3e12, 6.5e14, 8e9, kv_bytes=65_536)
    ends = {}
    for launch in (0.0, 0.02):
        for name in ("token_throttling", "prefill_then_decode"):
            cost = part._replace(launch=launch).seconds
            pipeline = Pipeline([cost] * 4, free, free)
            run = play(name, pipeline, pairs, [0.0] * 400, num_pages=4096, max_num_seqs=256)
            ends[launch, name] = max(record.times[-1] for record in run.records)
            assert run.preemptions == 0
    assert ends[0.0, "token_throttling"] < ends[0.0, "prefill_then_decode"]
    assert ends[0.02, "prefill_then_decode"] < 0.8 * ends[0.02, "token_throttling"]


def test_under_load_of_mixed_contexts_cost_throttling_is_sooner_in_everything() -> None:
    pairs = [(20_000, 200) if i % 16 == 0 else (300, 200) for i in range(160)]
    cost = Roofline(4.3e12, 6.5e14, 8e9, kv_bytes=65_536, pair_flops=524_288).seconds
    idle, first, later = {}, {}, {}
    for name in ("chunked_prefill", "token_throttling", "cost_throttling"):
        run = play(name, Pipeline([cost] * 4, free, free), pairs, poisson(160, 16.0))
        idle[name] = run.idle[0]
        first[name] = mean(r.times[0] - r.due for r in run.records)
        later[name] = mean(r.times[-1] - r.times[0] for r in run.records)
    for figure, factor in ((idle, 0.5), (first, 0.9), (later, 0.92)):
        sooner = factor * min(figure["token_throttling"], figure["chunked_prefill"])
        assert figure["cost_throttling"] < sooner


# ------------------------------------------------------------ where costs come from


@pytest.mark.parametrize("policy", ["token_throttling", "cost_throttling"])
def test_prefill_is_even_when_slots_are_the_limit(policy: str) -> None:
    """Slots become free a few at a time. Each step prefills for its share of them."""
    cost = CostModel(step=8e-3, token=50e-6).seconds
    pairs = [(200, 20 + 7 * i % 160) for i in range(600)]
    run = play(policy, Pipeline([cost] * 2, free, free), pairs, [0.0] * 600, max_num_seqs=128)
    assert max(run.idle) < 0.05


def test_roofline_by_hand() -> None:
    part = Roofline(100.0, 1000.0, params=50.0, kv_bytes=2.0, pair_flops=4.0, step=1.0)
    # Weights: 100 bytes in 1 s; 1 token computes 100 flops in 0.1 s, 20 tokens 2 s.
    assert part.seconds(Work(1, 0, 0, 1)) == 1 + 1
    assert part.seconds(Work(20, 0, 0, 1)) == 1 + 2
    assert part.seconds(Work(1, 500, 25, 1)) == 1 + 1 + 0.5 + 2
    launched = part._replace(launch=5.0)
    assert launched.seconds(Work(20, 0, 0, 20)) == 3  # decodes alone, from a graph
    assert launched.seconds(Work(20, 0, 0, 1)) == 5
    assert launched.seconds(Work(60, 0, 0, 1)) == 7
    experts = part._replace(active=5.0)
    assert experts.seconds(Work(4, 0, 0, 1)) == pytest.approx(1 + 4 * 0.1)  # 20 of the 50 read
    assert experts.seconds(Work(40, 0, 0, 1)) == 1 + 1  # all are


def arguments(tmp_path: Path, **given: Any) -> argparse.Namespace:
    values = {"steps": None, "model": None, "stage": [], "head": [], "pp": 4}
    values |= {"gpus_per_stage": 2, "bandwidth": 1e12, "flops": 1e15}
    return argparse.Namespace(**values | given)


def test_costs_of_a_shape(tmp_path: Path) -> None:
    (stage, *others), head = make_costs(arguments(tmp_path, model=SHAPE))
    assert others == [stage] * 3
    arch = read_arch(SHAPE)
    inside = arch.num_params() - arch.vocab * arch.dim  # tied
    assert stage(Work(1, 0, 0, 1)) == pytest.approx(2 * inside / 4 / 2e12)
    # 28 layers of 8 heads of 128, K and V of 2 bytes each
    pages = stage(Work(1, 0, 1000, 1)) - stage(Work(1, 0, 0, 1))
    assert pages == pytest.approx(1000 * 28 * 8 * 128 * 2 * 2 / 4 / 2e12)
    assert head(Work(1, 0, 0, 1)) == pytest.approx(2 * arch.vocab * arch.dim / 2e12)
    path = tmp_path / "costs.json"
    steps = [[[n, 0, 0, n], 1.0 + n] for n in range(1, 9)]
    path.write_text(json.dumps({"otherData": {"steps": [steps]}}))
    (stage, *others), head = make_costs(arguments(tmp_path, steps=path))
    assert stage(Work(7, 0, 0, 7)) == pytest.approx(8.0) and others == [stage] * 3
    assert head(Work(1, 0, 0, 1)) == 0.0


@pytest.mark.parametrize("more", ["--stage params=1", "--head params=1", "--model ."])
def test_measured_steps_need_no_other_costs(
    more: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", f"simulate --steps steps.json {more}".split())
    with pytest.raises(SystemExit):
        simulate.parse_arguments()
    assert "--steps: it is of all costs" in capsys.readouterr().err


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "plot.svg"
    words = "simulate --pp 2 --stage params=1e9 kv_bytes=1000 --limit 12 --rate 5,50"
    words += f" --slo ttft=1,tpot=0.1 --plot {plot} --config max_num_batched_tokens=1024"
    words += " --policies chunked_prefill:4,chunked_prefill,cost_throttling"
    monkeypatch.setattr(sys, "argv", words.split())
    simulate.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    assert figures["simulated"] is True
    assert list(figures["policies"]) == ["chunked_prefill:4", "chunked_prefill", "cost_throttling"]
    small, large, _ = (runs["50 requests/s"]["steps"] for runs in figures["policies"].values())
    assert small > 1.2 * large  # in steps of 4 tokens
    for runs in figures["policies"].values():
        assert [run["rate"] for run in runs.values()] == [5, 50]
        assert all(run["completed"] == 12 and len(run["idle"]) == 2 for run in runs.values())
    assert figures["served_rate"] == dict.fromkeys(figures["policies"], 50)
    curves = re.findall('<path d="([^"]*)" clip-path', plot.read_text())
    assert [len(re.findall("[ML]", curve)) for curve in curves] == [2] * 3 * 3
    assert all(plot.read_text().count(f">{name}<") == 3 for name in figures["policies"])
    for words, problem in (
        ("simulate --pp 2", "no costs"),
        ("simulate --stage params=1 --policies best", "best is none of"),
    ):
        monkeypatch.setattr(sys, "argv", words.split())
        with pytest.raises(SystemExit):
            simulate.main()
        assert problem in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", "simulate --stage size=1".split())
    with pytest.raises(SystemExit, match="unexpected keyword argument 'size'"):
        simulate.main()

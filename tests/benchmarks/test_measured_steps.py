"""Costs from timelines: by hand, and of simulated pipelines whose costs are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gllm_benchmarks.measured_steps import Cost, fit_cost
from gllm_benchmarks.simulate import DEFAULTS, Pipeline, Roofline, Run, read_costs, simulate
from gllm_benchmarks.workloads import lengths, poisson
from gllm_engine import POLICIES, CostModel, EngineConfig, StepPlan, StepResult, Work
from gllm_engine.timeline import Timeline, activity
from gllm_engine.timeline.shares import stage_steps
from gllm_engine.types import RankSpans, Span

FREE = CostModel(0.0).seconds
# Weights are read in 2 ms, which is also the time to compute 130 tokens.
STAGE = Roofline(4e12, 5.2e14, 4e9, kv_bytes=65_536, pair_flops=262_144, step=1e-3)
LAST = STAGE._replace(step=3e-3)


class Taped(Pipeline):
    """A pipeline that writes the timeline of its steps, in nanoseconds of the simulated time."""

    def __init__(self, stages: list[Cost]) -> None:
        self.works: list[Work] = []
        self._ends: dict[int, int] = {}
        self._spans: list[list[Span]] = [[] for _ in range(len(stages) + 1)]  # the engine's first
        taped = [self._taped(i, cost) for i, cost in enumerate(stages)]
        super().__init__(taped, FREE, FREE)

    def _taped(self, stage: int, cost: Cost) -> Cost:
        def seconds(work: Work) -> float:
            self.works.append(work)
            return cost(work)

        return seconds

    def launch(self, plan: StepPlan, now: float) -> tuple[float, StepResult]:
        begun = len(self.works)
        busy = list(self.busy)
        end, result = super().launch(plan, now)
        work = self.works[begun]
        moment = round(now * 1e9)
        self._spans[0].append(Span("host", activity.DISPATCH, plan.step, moment, moment))
        for stage, free in enumerate(self._free):
            took = self.busy[stage] - busy[stage]
            begin = round((free - took) * 1e9)
            span = Span("device", activity.COMPUTE, plan.step, begin, round(free * 1e9), work)
            self._spans[stage + 1].append(span)
        return end, result

    def trace(self, path: Path) -> Any:
        engine, *ranks = [RankSpans(i - 1, 0, 0, spans) for i, spans in enumerate(self._spans)]
        if len(ranks) == 1:  # without workers the engine is the rank
            engine.spans.extend(ranks[0].spans)
        config = EngineConfig(model=".", pipeline_parallel_size=len(ranks))
        Timeline(config, engine, ranks).write(str(path))
        return json.loads(path.read_text())


def play(pipeline: Pipeline, pairs: list[tuple[int, int]], arrivals: list[float]) -> Run:
    stages = len(pipeline.busy)
    keys = {"pipeline_parallel_size": stages, "plans_in_flight": stages + 1}
    config = EngineConfig(model=".", **DEFAULTS | keys)
    return simulate(config, POLICIES["token_throttling"], pipeline, pairs, arrivals)


def figures(run: Run) -> tuple[float, float, float]:
    """The end, the mean time to the first token and the mean of the rest of a request."""
    first = [record.times[0] - record.due for record in run.records]
    rest = [record.times[-1] - record.times[0] for record in run.records]
    count = len(run.records)
    return max(r.times[-1] for r in run.records), sum(first) / count, sum(rest) / count


@pytest.fixture(scope="module")
def taped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Taped, Any]:
    """All requests at once, to the last sequence, which is alone: steps of all sizes."""
    pipeline = Taped([STAGE.seconds, LAST.seconds])
    play(pipeline, lengths("share")[:150], [0.0] * 150)
    return pipeline, pipeline.trace(tmp_path_factory.mktemp("taped") / "out.json")


def test_the_steps_in_a_timeline_have_the_costs_that_made_it(taped: tuple[Taped, Any]) -> None:
    pipeline, trace = taped
    stages = trace["otherData"]["steps"]
    assert len(stages) == 2
    for cost, steps in zip((STAGE, LAST), stages, strict=True):
        assert [Work(*work) for work, _ in steps] == pipeline.works[4::2]  # but of the first two
        for work, seconds in steps:
            assert seconds == pytest.approx(cost.seconds(Work(*work)), abs=1e-8)


@pytest.mark.parametrize("rate", [None, 4.0, 12.0])
def test_a_simulation_by_a_timeline_agrees_with_the_pipeline_it_is_of(
    rate: float | None, taped: tuple[Taped, Any]
) -> None:
    """Also under loads other than that of the timeline."""
    pairs = lengths("share")[200:300]
    arrivals = [0.0] * 100 if rate is None else poisson(100, rate)
    true = play(Pipeline([STAGE.seconds, LAST.seconds], FREE, FREE), pairs, arrivals)
    found = play(Pipeline(read_costs(taped[1], 2), FREE, FREE), pairs, arrivals)
    assert figures(found) == pytest.approx(figures(true), rel=0.03)


def test_steps_of_one_stage_stand_for_all(taped: tuple[Taped, Any], tmp_path: Path) -> None:
    alone = Taped([STAGE.seconds])
    play(alone, lengths("share")[:60], [0.0] * 60)
    costs = read_costs(alone.trace(tmp_path / "out.json"), 4)
    assert len(costs) == 4 and len(set(costs)) == 1
    with pytest.raises(ValueError, match="the timeline is of 2 stages, --pp says 4"):
        read_costs(taped[1], 4)
    for other in ({"traceEvents": [], "otherData": {}}, [{"ph": "X"}], {"step": 1.0}):
        with pytest.raises(ValueError, match="it is no timeline of an engine"):
            read_costs(other, 4)
    empty = Taped([STAGE.seconds, STAGE.seconds])
    play(empty, [(8, 1)], [0.0])
    with pytest.raises(ValueError, match="there are no measured steps"):
        read_costs(empty.trace(tmp_path / "empty.json"), 2)


def test_a_step_begins_when_its_plan_and_its_input_are_there_by_hand() -> None:
    """Milliseconds. What the host of a stage does before it computes is a part of the step.

    Step 4, first stage: free at 10, planned at 12, computes 14 to 20. Second: free at 19 and the
    input there at 20, computes 21 to 26. Step 5 waits for a token of step 4 and computes 27 to 32;
    on the second stage, free at 26, it computes 33 to 36 and samples to 37.
    """
    work = Work.row(10, 1)

    def computed(*times: tuple[int, int]) -> list[Span]:
        return [
            Span("device", activity.COMPUTE, step, begin * 10**6, end * 10**6, work)
            for step, (begin, end) in enumerate(times, 1)
        ]

    first = computed((0, 1), (0, 1), (1, 10), (14, 20), (27, 32), (40, 50))
    last = computed((0, 1), (0, 1), (11, 19), (21, 26), (33, 36))
    last.append(Span("device", activity.SAMPLE, 5, 36 * 10**6, 37 * 10**6, work))
    last.append(Span("host", activity.SAMPLE, 5, 30 * 10**6, 31 * 10**6))
    engine = [
        Span("host", activity.DISPATCH, step, at * 10**6, at * 10**6)
        for step, at in ((3, 0), (4, 12), (5, 13), (6, 14))
    ]
    found = stage_steps(engine, [first, [], last, []], 2)
    taken = [[round(1e3 * seconds, 6) for _, seconds in steps] for steps in found]
    # Step 6 has not ended on the last stage.
    assert taken == [[10 - 1, 20 - 12, 32 - 26], [19 - 10, 26 - 20, 37 - 32]]
    assert {counts for steps in found for counts, _ in steps} == {work}
    assert stage_steps(engine, [first, []], 2) == [[], []]  # a rank that does not answer


def test_costs_have_knees_and_delays_count_little() -> None:
    """Weights that are read once, and weights of experts, which more tokens read more of."""
    dense = Roofline(4e12, 5e14, 4e9, step=1e-3).seconds
    experts = Roofline(4e12, 5e14, 8e9, active=8e8, step=1e-3).seconds
    sizes = [Work.row(100, 1)._replace(tokens=n, sequences=n) for n in range(1, 600, 7)]
    for cost in (dense, experts):
        steps = [(work, cost(work)) for work in sizes]
        fitted = fit_cost(steps)
        steps[40] = sizes[40], 10.0  # once in the run the machine stood still
        delayed = fit_cost(steps)
        for work in sizes:
            assert fitted(work) == pytest.approx(cost(work), rel=0.1)
            assert delayed(work) == pytest.approx(cost(work), rel=0.15)


def test_steps_with_prompts_may_cost_more() -> None:
    """Those are launched kernel by kernel."""
    steps = []
    for count in range(1, 40):
        decodes = Work(count, count * 50, count * 50, count)
        steps.append((decodes, 2e-3 + 1e-5 * count))
        mixed = decodes.plus(Work.row(0, 30))
        steps.append((mixed, 9e-3 + 1e-5 * mixed.tokens))
    fitted = fit_cost(steps)
    for work, seconds in steps:
        assert fitted(work) == pytest.approx(seconds, rel=0.02)

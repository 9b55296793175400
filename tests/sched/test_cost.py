"""The cost model, its fit, and what cost throttling makes of both with the real scheduler."""

from __future__ import annotations

import random
from collections import deque
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_policy import USUAL, loads

from gllm_engine.config import EngineConfig
from gllm_engine.sampling import SamplingParams
from gllm_engine.sched import Scheduler, Sequence
from gllm_engine.sched.cost import PRIOR, CostModel, Fit, Work
from gllm_engine.sched.policy import cost_throttling
from gllm_engine.types import StepPlan, StepResult

# A quarter of a 32-billion-parameter model on an H100: what is learned, and unlike the prior.
TRUE = CostModel(step=3e-3, token=40e-6, context=0.8e-9, kv=15e-9, sequence=1e-6)
COEFFICIENT = st.floats(0, 1e-3)
COSTS = st.builds(CostModel, *[COEFFICIENT] * 5)


# ------------------------------------------------------------ the model


def test_work_by_hand() -> None:
    # Positions 3 and 4 attend to 4 and 5 tokens; a decode row at length 8 to 8.
    assert Work.row(3, 2) == (2, 9, 5, 1)
    assert Work.row(7, 1) == (1, 8, 8, 1)
    work = Work.row(3, 2).plus(Work.row(7, 1), Work.row(0, 1))
    assert work == (4, 18, 14, 3)
    model = CostModel(step=1.0, token=10.0, context=100.0, kv=1000.0, sequence=10_000.0)
    assert model.seconds(work) == 1 + model.rows(work) == 1 + 40 + 1800 + 14_000 + 30_000


@given(st.integers(0, 1000), st.integers(1, 200))
def test_a_row_is_the_sum_of_its_tokens(start: int, count: int) -> None:
    row = Work.row(start, count)
    assert row.context == sum(range(start + 1, start + count + 1))
    assert (row.tokens, row.kv) == (count, start + count)


@given(COSTS, st.integers(0, 200_000), st.floats(0, 1), st.integers(0, 8192))
def test_the_longest_row_within_a_time(
    cost: CostModel, start: int, seconds: float, most: int
) -> None:
    count = cost.longest(start, seconds, most)
    assert 0 <= count <= most
    if count:
        assert cost.rows(Work.row(start, count)) <= seconds * (1 + 1e-9)
    if count < most:
        assert cost.rows(Work.row(start, count + 1)) >= seconds * (1 - 1e-9)


def test_a_chunk_at_100k_takes_as_long_as_one_at_1k() -> None:
    short, long = (TRUE.longest(start, 0.02, 8192) for start in (1000, 100_000))
    assert short > 2.5 * long > 0
    for start, count in ((1000, short), (100_000, long)):
        assert TRUE.rows(Work.row(start, count)) == pytest.approx(0.02, rel=0.01)


# ------------------------------------------------------------ the fit


def some_work(draws: random.Random) -> Work:
    length = draws.randint(100, 3000)
    rows = [Work.row(length, 1)] * draws.randint(1, 200)
    chunks = [Work.row(draws.randint(0, 20_000), draws.randint(1, 2000))] * draws.randint(0, 2)
    return rows[0].plus(*rows[1:], *chunks)


def worst_error(fit: Fit, draws: random.Random, speed: float = 1.0) -> float:
    work = [some_work(draws) for _ in range(200)]
    return max(abs(fit.model.seconds(each) / TRUE.seconds(each) / speed - 1) for each in work)


@pytest.mark.parametrize("seed", range(3))
def test_known_coefficients_are_recovered_from_noisy_steps(seed: int) -> None:
    draws, fit = random.Random(seed), Fit()
    errors = {0: worst_error(fit, draws)}
    for count in range(1, 2001):
        work = some_work(draws)
        fit.observe(work, TRUE.seconds(work) * draws.uniform(0.9, 1.1))
        if count in (50, 2000):
            errors[count] = worst_error(fit, draws)
    assert errors[0] > 0.3 and errors[50] < 0.15 and errors[2000] < 0.05
    for name in ("token", "context", "kv"):
        assert getattr(fit.model, name) == pytest.approx(getattr(TRUE, name), rel=0.15)
    exact = Fit(kept=1.0)
    steps = [some_work(draws) for _ in range(300)]
    for work in steps * 20:
        exact.observe(work, TRUE.seconds(work))
    assert worst_error(exact, draws) < 0.01


@pytest.mark.parametrize("speed", [0.01, 1.0, 100.0])
def test_steps_that_all_look_alike_teach_their_own_time_and_spoil_nothing(speed: float) -> None:
    fit, work = Fit(), Work(64, 64_000, 64_000, 64)
    for _ in range(20_000):
        fit.observe(work, speed * TRUE.seconds(work))
    assert fit.model.seconds(work) == pytest.approx(speed * TRUE.seconds(work), rel=0.01)
    # What comes then is learned at once, not after it has outweighed what came before.
    draws = random.Random(0)
    for _ in range(300):
        other = some_work(draws)
        fit.observe(other, speed * TRUE.seconds(other))
    assert worst_error(fit, draws, speed) < 0.2


def test_a_step_that_was_held_up_changes_little() -> None:
    draws, fit = random.Random(5), Fit()
    for count in range(1000):
        work = some_work(draws)
        fit.observe(work, 30.0 if count % 100 == 99 else TRUE.seconds(work))
    assert worst_error(fit, draws) < 0.05


@given(st.lists(st.tuples(st.integers(0, 2**40), st.floats(1e-9, 1e6)), max_size=20))
def test_no_observation_makes_a_coefficient_negative(steps: list[tuple[int, float]]) -> None:
    fit = Fit()
    for size, seconds in steps:
        fit.observe(Work(size % 8192, size, size % 999_983, size % 1024), seconds)
        assert all(0 <= coefficient < 1e9 for coefficient in fit.model)


# ------------------------------------------------------------ the policy as numbers


@given(loads(), COSTS, st.integers(0, 10**8))
def test_budgets_are_bounded(load: object, cost: CostModel, context: int) -> None:
    load = load._replace(cost=cost, context=context if load.num_decoding else 0)
    budget = cost_throttling(load)
    assert (budget.decodes, budget.prefill_tokens) == (load.num_decoding, load.max_tokens)
    assert budget.decode_seconds >= 0
    count = load.num_decoding
    whole = cost.rows(Work(count, load.context + count, load.context + count, count))
    share = whole / load.stages
    assert share <= budget.seconds <= share + cost.token * load.max_tokens
    assert share <= budget.decode_seconds <= share + whole / max(1, count)


@given(loads(), COSTS, st.integers(0, 200_000), st.integers(0, 10_000), st.integers(0, 10**6))
def test_more_waiting_or_more_memory_never_means_less_prefill(
    load: object, cost: CostModel, waiting: int, pages: int, context: int
) -> None:
    load = load._replace(cost=cost)
    budget = cost_throttling(load)
    more = cost_throttling(load._replace(backlog=load.backlog + waiting))
    assert more.seconds >= budget.seconds
    fewer = cost_throttling(load._replace(num_free_pages=max(0, load.num_free_pages - pages)))
    assert fewer.seconds <= budget.seconds
    assert fewer.decode_seconds == more.decode_seconds == budget.decode_seconds
    if load.num_decoding:
        longer = cost_throttling(load._replace(context=load.context + context))
        assert longer.decode_seconds >= budget.decode_seconds
        assert longer.seconds >= budget.seconds


def test_prefill_by_hand() -> None:
    # 200 rows: 200 (25 + 5) us, and 200,200 tokens of 0.021 us; a quarter of that is a step's.
    load = USUAL._replace(context=200_000)
    share = (6e-3 + 200_200 * 2.1e-8) / 4
    waiting, rest = 8000 * 25e-6, 5e-3 + share
    by_waiting = (waiting * rest / 8) ** 0.5  # 13.7 ms, where one in eight tokens took 25 ms
    assert cost_throttling(load).seconds == pytest.approx(share + by_waiting)
    assert 0.0136 < by_waiting < 0.0138
    few_pages = load._replace(num_free_pages=290)  # 190 of the 1,900
    assert cost_throttling(few_pages).seconds == pytest.approx(share + 2048 * 25e-6 / 10)
    assert cost_throttling(load._replace(num_free_pages=0)).seconds == pytest.approx(share)
    # Nobody decodes: three steps' time until the fourth stage has one; at one device, all at once.
    alone = load._replace(num_decoding=0, context=0, backlog=1000)
    assert cost_throttling(alone).seconds == pytest.approx((25e-3 * 5e-3 / 3) ** 0.5)
    assert cost_throttling(alone._replace(stages=1)).seconds == pytest.approx(2048 * 25e-6)


# ------------------------------------------------------------ whole runs


class Decoding:
    """Sequences of these contexts, all decoding under TRUE costs on so many stages."""

    def __init__(self, policy: str, contexts: list[int], stages: int, room: int = 0) -> None:
        most = sum(contexts) + room
        config = EngineConfig(
            model=".",
            schedule_policy=policy,
            pipeline_parallel_size=stages,
            plans_in_flight=stages + 1,
            max_num_seqs=len(contexts) + 1,
            max_num_batched_tokens=max(most, 4096),
            prefill_drain_steps=1,
            enable_prefix_caching=False,
        )
        self.scheduler = Scheduler(config, most // 16 + 100 * len(contexts), 2**20, ())
        self.stages, self.contexts = stages, contexts
        self.plans: list[StepPlan] = []
        self.results: deque[StepResult] = deque()
        self.lengths: dict[int, int] = {}  # by slot
        self.works: list[Work] = []
        for number, length in enumerate(contexts):
            sampling = SamplingParams(max_tokens=1000, ignore_eos=True)
            self.scheduler.add(Sequence((b"", number), [0] * length, sampling, 0))
        while len(self.lengths) < len(contexts) or self.plans[-1].chunks:
            self.turn()
        self.turns(10 * stages)
        self.plans.clear()
        self.works.clear()

    def turns(self, count: int) -> None:
        for _ in range(count):
            self.turn()

    def turn(self) -> None:
        plan = self.scheduler.schedule()
        if plan is not None:
            rows = [Work.row(c.start, len(c.tokens)) for c in plan.chunks]
            for chunk in plan.chunks:
                self.lengths[chunk.slot] = chunk.start + len(chunk.tokens)
            for slot in plan.decode_slots:
                rows.append(Work.row(self.lengths[slot], 1))
                self.lengths[slot] += 1
            self.plans.append(plan)
            self.works.append(rows[0].plus(*rows[1:]))
            sampled = len(plan.decode_slots) + sum(chunk.samples for chunk in plan.chunks)
            seconds = TRUE.seconds(self.works[-1])
            self.results.append(StepResult(plan.step, [0] * sampled, seconds=seconds))
        if plan is None or len(self.results) > self.stages:
            self.scheduler.commit(self.results.popleft())

    def spreads(self) -> list[float]:
        """Of each `stages` steps in a row, how much longer the longest is than the shortest."""
        times = [TRUE.seconds(work) for work in self.works]
        count = len(times) - self.stages + 1
        rounds = [times[i : i + self.stages] for i in range(count)]
        return [max(times) / min(times) - 1 for times in rounds]

    def gaps(self) -> set[int]:
        """After how many steps a sequence has its next token."""
        found, last = set(), {}
        for step, plan in enumerate(self.plans):
            for slot in plan.decode_slots:
                if slot in last:
                    found.add(step - last[slot])
                last[slot] = step
        return found


CONTEXTS = st.lists(
    st.one_of(st.integers(10, 2000), st.integers(2000, 20_000)), min_size=20, max_size=80
)


@given(CONTEXTS, st.integers(2, 5))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_steps_of_mixed_contexts_take_the_same_time_and_serve_everyone(
    contexts: list[int], stages: int
) -> None:
    run = Decoding("cost_throttling", contexts, stages)
    run.turns(20 * stages)
    assert run.gaps() <= {stages, stages + 1}
    assert max(run.spreads()) < 0.12


@pytest.mark.parametrize("stages", [2, 3, 5])
def test_the_steps_are_more_even_than_by_token_throttling(stages: int) -> None:
    """The longest contexts arrived first, as where long prompts have long outputs."""
    contexts = [20_000] * 10 + [1000] * 90
    by_count, by_cost = (
        Decoding(policy, contexts, stages) for policy in ("token_throttling", "cost_throttling")
    )
    for run in (by_count, by_cost):
        run.turns(20 * stages)
    assert mean(by_cost.spreads()) < 0.1 and mean(by_count.spreads()) > 0.5
    assert by_cost.gaps() == {stages}


def test_only_measured_steps_are_learned_from() -> None:
    run = Decoding("cost_throttling", [500] * 8, 1)
    while run.results:
        run.scheduler.commit(run.results.popleft())
    before = run.scheduler._fit.model
    assert before != PRIOR
    plan = run.scheduler.schedule()
    assert plan is not None
    run.scheduler.commit(StepResult(plan.step, [0] * 8))
    assert run.scheduler._fit.model == before
    plan = run.scheduler.schedule()
    assert plan is not None
    run.scheduler.commit(StepResult(plan.step, [0] * 8, seconds=1.0))
    assert run.scheduler._fit.model != before


def test_chunks_of_a_long_prompt_shrink_with_its_context_while_others_decode() -> None:
    run = Decoding("cost_throttling", [500] * 40, 3, room=60_000)
    late = Sequence((b"late", 0), [0] * 60_000, SamplingParams(max_tokens=1), 0)
    run.scheduler.add(late)
    while late.planned < 60_000:
        run.turn()
    chunks = [(plan.chunks[0].start, len(plan.chunks[0].tokens)) for plan in run.plans]
    assert all(start == sum(n for _, n in chunks[:i]) for i, (start, _) in enumerate(chunks))
    # What is left to do also shrinks, so compare by what the policy wanted: sqrt of the rest.
    early, tail = chunks[5], chunks[len(chunks) * 2 // 3]
    worth = [TRUE.rows(Work.row(*chunk)) / (60_000 - chunk[0]) ** 0.5 for chunk in (early, tail)]
    assert worth[1] == pytest.approx(worth[0], rel=0.15)
    assert tail[1] / (60_000 - tail[0]) ** 0.5 < 0.7 * early[1] / (60_000 - early[0]) ** 0.5
    assert run.gaps() == {3}

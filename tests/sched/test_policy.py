"""Policies as numbers, and what a policy makes of whole runs with the real scheduler."""

from __future__ import annotations

from collections import deque
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_mock import EOS, VOCAB, PagedMock, reference

from gllm_engine.config import EngineConfig
from gllm_engine.sampling import SamplingParams
from gllm_engine.sched import Scheduler, Sequence
from gllm_engine.sched.cost import CostModel, Work
from gllm_engine.sched.policy import (
    POLICIES,
    Budget,
    Load,
    chunked_prefill,
    prefill_then_decode,
    token_throttling,
)
from gllm_engine.types import StepPlan, StepResult

MODEL_LEN = 400


@st.composite
def loads(draw: st.DrawFn, max_decoding: int = 4096) -> Load:
    """Any load that a scheduler can be under."""
    num_pages = draw(st.integers(1, 10_000))
    num_decoding = draw(st.integers(0, max_decoding))
    return Load(
        max_tokens=draw(st.integers(1, 8192)),
        num_decoding=num_decoding,
        backlog=draw(st.integers(0, 200_000)),
        num_free_pages=draw(st.integers(0, num_pages)),
        num_reserved_pages=min(num_decoding, num_pages // 20),
        num_pages=num_pages,
        step=draw(st.integers(0, 1000)),
        stages=draw(st.integers(1, 64)),
        prefill_drain_steps=draw(st.integers(1, 1024)),
        min_prefill_tokens=draw(st.integers(1, 4096)),
    )


def test_every_policy_of_the_config_exists() -> None:
    asked = set(get_args(get_type_hints(EngineConfig)["schedule_policy"]))
    assert {"auto", *POLICIES} == asked


@given(loads())
def test_chunked_prefill_takes_all_decodes_and_fills_the_step(load: Load) -> None:
    assert chunked_prefill(load) == Budget(load.num_decoding, load.max_tokens)


# ------------------------------------------------------------ token throttling as numbers

# gLLM's defaults; 2,000 pages of which 100 (5 %) are reserved, so 1,900 are the whole.
USUAL = Load(
    max_tokens=2048,
    num_decoding=200,
    backlog=8000,
    num_free_pages=2000,
    num_reserved_pages=100,
    num_pages=2000,
    step=0,
    stages=4,
    prefill_drain_steps=8,
    min_prefill_tokens=32,
)


@pytest.mark.parametrize(
    ("change", "prefill_tokens"),
    [
        ({}, 1000),  # 8000 / 8
        ({"backlog": 8001}, 1001),  # the last one is not left behind
        ({"backlog": 100}, 32),  # 100 / 8 = 12.5, less than the least
        ({"backlog": 20_000}, 2048),  # 2500, more than a step
        ({"backlog": 8000, "prefill_drain_steps": 4}, 2000),
        ({"num_free_pages": 575}, 512),  # 2048 (0.2875 - 0.05) / 0.95 = 2048 / 4
        ({"num_free_pages": 575, "backlog": 4000}, 500),  # now the waiting tokens bind
        ({"num_free_pages": 119}, 32),  # 2048 * 19 / 1900 = 20.48
        ({"num_free_pages": 100}, 32),  # at the threshold
        ({"num_free_pages": 0}, 32),  # and below
        ({"num_free_pages": 0, "max_tokens": 16}, 16),
        ({"num_decoding": 0, "num_reserved_pages": 0, "num_free_pages": 0}, 2048),
    ],
)
def test_prefill_by_hand(change: dict[str, int], prefill_tokens: int) -> None:
    assert token_throttling(USUAL._replace(**change)).prefill_tokens == prefill_tokens


@pytest.mark.parametrize(
    ("num_decoding", "stages", "decodes"),
    [
        (200, 4, [50, 50, 50, 50]),
        (10, 4, [2, 2, 3, 3]),
        (9, 2, [4, 5]),
        (9, 1, [9]),
        (2, 4, [1, 1, 1, 1]),  # never none, or nothing would move
        (0, 4, [0, 0, 0, 0]),
    ],
)
def test_decodes_by_hand(num_decoding: int, stages: int, decodes: list[int]) -> None:
    load = USUAL._replace(num_decoding=num_decoding, stages=stages)
    assert [token_throttling(load._replace(step=k)).decodes for k in range(stages)] == decodes


@given(loads())
def test_throttled_budgets_are_bounded(load: Load) -> None:
    budget = token_throttling(load)
    least = min(load.min_prefill_tokens, load.max_tokens)
    assert 1 <= least <= budget.prefill_tokens <= load.max_tokens
    assert min(1, load.num_decoding) <= budget.decodes <= load.num_decoding
    if load.stages == 1:
        assert budget.decodes == load.num_decoding


@given(loads(), st.integers(0, 200_000), st.integers(0, 10_000))
def test_more_waiting_or_more_memory_never_means_less_prefill(
    load: Load, waiting: int, pages: int
) -> None:
    budget = token_throttling(load)
    more = token_throttling(load._replace(backlog=load.backlog + waiting))
    assert more.prefill_tokens >= budget.prefill_tokens
    fewer_pages = max(0, load.num_free_pages - pages)
    less = token_throttling(load._replace(num_free_pages=fewer_pages))
    assert less.prefill_tokens <= budget.prefill_tokens
    assert less.decodes == more.decodes == budget.decodes


@given(loads())
def test_the_stages_share_the_decodes_evenly(load: Load) -> None:
    stages = load.stages
    shares = [token_throttling(load._replace(step=load.step + k)).decodes for k in range(stages)]
    assert max(shares) - min(shares) <= 1
    if load.num_decoding >= stages:
        assert sum(shares) == load.num_decoding


# ------------------------------------------------------------ prefill, then decode, as numbers

# 100 sequences hold 20,000 tokens on 1,000 of 2,000 pages; 900 are free beside the reserve.
PHASES = USUAL._replace(
    num_decoding=100,
    context=19_900,
    num_free_pages=1000,
    backlog=100_000,
    held_back=1,
    output_len=200.0,
    cost=CostModel(step=5e-3, token=25e-6),
)


def is_prefill(load: Load) -> bool:
    return prefill_then_decode(load).is_exclusive


@pytest.mark.parametrize(
    ("change", "prefill_tokens"),
    [
        ({}, 2048),
        # 900 / 1000 = 0.9 times as much would fit now; with a growth by 80 %, 0.1 / 1.8 of 20,000.
        ({"growth": lambda: 16_000.0}, 1111),
        ({"growth": lambda: 17_999.0}, 1),  # half a token: one is taken
        ({"growth": lambda: 18_000.0}, 0),
        ({"num_free_pages": 100}, 0),
        ({"backlog": 0}, 0),
        ({"backlog": 1}, 2048),  # an upper bound; there is one token
        ({"num_decoding": 0, "context": 0, "num_free_pages": 0}, 2048),
    ],
)
def test_a_phase_of_prefill_ends_when_memory_or_work_does(
    change: dict[str, Any], prefill_tokens: int
) -> None:
    budget = prefill_then_decode(PHASES._replace(in_prefill=True, **change))
    assert budget.prefill_tokens == prefill_tokens
    assert budget.is_exclusive == (prefill_tokens > 0)


def test_a_phase_of_decodes_ends_when_it_has_wasted_a_change() -> None:
    """B = 5 ms + 3 steps of 5 ms + 2048 x 25 us; y - 1 - ln y = B / (200 x 4 x 5 ms)."""
    threshold = (5e-3 + 3 * (5e-3 + 2048 * 25e-6)) / (200 * 4 * 5e-3)
    assert threshold == pytest.approx(0.0434)
    more = 0.3239  # 0.3239 - ln 1.3239 = 0.0433
    for backlog, ends in ((int(20_000 * more), False), (int(20_000 * (more + 2e-3)), True)):
        assert is_prefill(PHASES._replace(backlog=backlog)) == ends
        assert is_prefill(PHASES._replace(backlog=backlog, in_prefill=True))
        assert is_prefill(PHASES._replace(backlog=backlog, held_back=0))  # all that waits
    # Memory limits it as well: 900 pages less 18,000 x 0.69 / 20 leave 0.9 - 0.62 of 1.62.
    assert is_prefill(PHASES)
    assert not is_prefill(PHASES._replace(growth=lambda: 0.62 * 20_000))
    # Longer outputs waste the same in fewer changes; the constant cost alone is wasted.
    assert is_prefill(PHASES._replace(backlog=int(20_000 * 0.2), output_len=800.0))
    assert not is_prefill(PHASES._replace(cost=CostModel(step=0.0, token=25e-6)))


def test_in_both_phases_steps_are_of_equal_seconds() -> None:
    cost = CostModel(step=5e-3, token=25e-6, context=1e-9, kv=2e-8, sequence=5e-6)
    load = PHASES._replace(cost=cost, in_prefill=True)
    budget = prefill_then_decode(load)
    assert budget.seconds == cost.rows(Work.row(0, 2048))
    decoding = cost.rows(Work(100, 20_000, 20_000, 100))
    for step in range(4):
        budget = prefill_then_decode(load._replace(backlog=0, step=step))
        assert budget.decode_seconds == pytest.approx(
            decoding / 4 + decoding / 100 * (step + 0.5) / 4
        )
        assert (budget.decodes, budget.prefill_tokens) == (100, 0)


@given(loads(), st.booleans(), st.integers(0, 10_000), st.floats(0, 1e6), st.floats(1, 1e5))
def test_a_phase_never_leaves_both_budgets_empty(
    load: Load, in_prefill: bool, held_back: int, grown: float, output_len: float
) -> None:
    budget = prefill_then_decode(
        load._replace(
            in_prefill=in_prefill,
            held_back=held_back,
            growth=lambda: grown,
            output_len=output_len,
            context=load.num_decoding * 7,
        )
    )
    assert budget.decodes == load.num_decoding
    assert budget.is_exclusive == (budget.prefill_tokens > 0)
    assert budget.decodes or budget.prefill_tokens == load.max_tokens
    assert 0 <= budget.prefill_tokens <= load.max_tokens


# ------------------------------------------------------------ whole runs


class Run:
    """A scheduler and a runner that checks every plan; in a pipeline one more than its stages."""

    def __init__(self, policy: str, stages: int, num_pages: int = 1000, **config: Any) -> None:
        values = {"max_num_seqs": 32, "max_num_batched_tokens": 64, "min_prefill_tokens": 4}
        self.config = EngineConfig(
            model=".",
            schedule_policy=policy,
            pipeline_parallel_size=stages,
            plans_in_flight=stages + (stages > 1),
            **{**values, **config},
        )
        self.scheduler = Scheduler(self.config, num_pages, MODEL_LEN, EOS)
        self.runner = PagedMock(self.config, num_pages)
        self.results: deque[StepResult] = deque()
        self.plans: list[StepPlan] = []
        self.sequences: list[Sequence] = []
        self.finished: set[Sequence] = set()

    def add(self, prompt_len: int, max_tokens: int) -> Sequence:
        number = len(self.sequences)
        prompt = [2 + (number + i) % (VOCAB - 2) for i in range(prompt_len)]
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        self.sequences.append(Sequence((b"", number), prompt, sampling, number))
        self.scheduler.add(self.sequences[-1])
        return self.sequences[-1]

    def turn(self) -> None:
        """As the engine's: plan if there is room; take in the oldest if not, or if nothing."""
        plan = (
            self.scheduler.schedule() if len(self.results) < self.config.plans_in_flight else None
        )
        if plan is not None:
            self.plans.append(plan)
            self.results.append(self.runner.run(plan))
        if plan is None or len(self.results) == self.config.plans_in_flight:
            assert self.results, "there is work, but nothing is planned and nothing in flight"
            committed = self.scheduler.commit(self.results.popleft())
            self.finished.update(sequence for sequence, _ in committed.finished)
        self.scheduler.check_integrity()

    def finish(self) -> list[list[int]]:
        """The outputs, after as many turns as it takes."""
        for _ in range(5000):
            if not self.scheduler.has_work:
                assert self.finished == set(self.sequences)
                return [s.tokens[s.prompt_len :] for s in self.sequences]
            self.turn()
        raise AssertionError("livelock")


@given(
    requests=st.lists(
        st.tuples(st.integers(1, 150), st.integers(1, 40), st.integers(0, 6)),
        min_size=1,
        max_size=20,
    ),
    stages=st.sampled_from([1, 2, 4]),
    num_pages=st.sampled_from([12, 30, 1000]),  # 12 x 16 tokens just hold the longest request
    max_num_seqs=st.sampled_from([2, 32]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_whatever_the_policy_every_request_ends_with_its_tokens(
    requests: list[tuple[int, int, int]], stages: int, num_pages: int, max_num_seqs: int
) -> None:
    for policy in POLICIES:
        run = Run(policy, stages, num_pages, max_num_seqs=max_num_seqs, enable_prefix_caching=False)
        for prompt_len, max_tokens, turns_before_the_next in requests:
            run.add(prompt_len, max_tokens)
            for _ in range(turns_before_the_next):
                if run.scheduler.has_work:
                    run.turn()
        assert run.finish() == [
            reference(
                sequence.tokens[: sequence.prompt_len],
                sequence.sampling,
                sequence.seed,
                None,
                max_model_len=MODEL_LEN,
                capacity=num_pages * run.config.page_size,
            )[0]
            for sequence in run.sequences
        ]
        if not run.scheduler.stats().preemptions:  # then nothing was computed twice, or left out
            needed = sum(prompt_len + max_tokens - 1 for prompt_len, max_tokens, _ in requests)
            assert run.runner.num_computed == needed


@pytest.mark.parametrize("policy", ["token_throttling", "cost_throttling"])
@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("num_sequences", [4, 7, 10, 25])
def test_in_steady_state_steps_under_way_are_of_one_size(
    policy: str, stages: int, num_sequences: int
) -> None:
    run = Run(policy, stages)
    for i in range(num_sequences):
        run.add(1 + 5 * i % 23, 100)
    while run.scheduler.stats().waiting or run.scheduler._prefilling:
        run.turn()
    begin = len(run.plans) + 2 * stages  # by then all were planned under this load
    for _ in range(10 * stages):
        run.turn()
    assert not run.finished
    plans = run.plans[begin:]
    for i in range(len(plans) - stages + 1):
        rows = [plan.decode_slots for plan in plans[i : i + stages]]
        assert max(map(len, rows)) - min(map(len, rows)) <= 1
        assert len(set().union(*rows)) == sum(map(len, rows)) == num_sequences


def test_a_prompt_beside_decodes_takes_the_steps_of_the_equations() -> None:
    for waiting, least in ((150, 4), (300, 1), (64, 32)):
        run = Run("token_throttling", 1, prefill_drain_steps=8, min_prefill_tokens=least)
        run.add(1, 300)
        run.turn()
        late = run.add(waiting, 10)
        left, sizes = waiting, []
        while left:
            sizes.append(min(max(-(-left // 8), least), left))
            left -= sizes[-1]
        while late.planned < waiting:
            run.turn()
        assert [len(plan.chunks[0].tokens) for plan in run.plans[1:]] == sizes
        assert all(plan.decode_slots for plan in run.plans[1:])


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 5)), min_size=1, max_size=6),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_alone_a_request_takes_no_more_steps_than_with_chunked_prefill(
    requests: list[tuple[int, int]],
) -> None:
    steps = []
    for policy in POLICIES:
        run = Run(policy, 1)
        for prompt_len, max_tokens in requests:
            run.add(prompt_len, max_tokens)
            run.finish()
        steps.append(len(run.plans))
    assert steps[0] == steps[1]


def test_a_prompt_that_fills_the_cache_is_not_slowed_by_the_pages_it_holds_itself() -> None:
    """Its pages are all taken at admission, but what is not planned yet counts as free."""
    run = Run("token_throttling", 1, num_pages=22, prefill_drain_steps=1, min_prefill_tokens=1)
    run.add(1, 300)
    run.turn()
    long = run.add(300, 2)  # 19 of the 22 pages
    run.turn()
    assert run.scheduler.stats().kv_usage > 0.9
    # 21 pages free, 1 reserved, of 21 that are not: 64 * 20 / 21 = 60.95
    assert long.planned == 60
    run.turn()
    # 2 free ones, and 240 tokens = 15 pages to come: 64 * 16 / 21 = 48.8
    assert long.planned == 60 + 48


@pytest.mark.parametrize("policy", ["token_throttling", "cost_throttling"])
def test_a_waiting_request_gets_in_however_many_others_decode(policy: str) -> None:
    run = Run(policy, 4, num_pages=200)
    for _ in range(31):
        run.add(8, 300)
    for _ in range(20):
        run.turn()
    late = run.add(40, 1)
    planned = len(run.plans)
    while late not in run.finished:
        run.turn()
    # 40 / 8 = 5, then 5, ... down to the least of 4 a step, and the plans in flight
    assert len(run.plans) - planned <= 40 // 4 + 5


# ------------------------------------------------------------ phases


def phases(plans: list[StepPlan]) -> list[bool]:
    """Whether each phase is one of prefill. Every plan must have work of one kind."""
    kinds = [bool(plan.chunks) for plan in plans]
    assert not any(plan.chunks and plan.decode_slots for plan in plans)
    return [kind for i, kind in enumerate(kinds) if not i or kinds[i - 1] != kind]


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize(("num_pages", "max_num_seqs"), [(60, 64), (1000, 12)])
def test_phases_are_long_and_take_turns(stages: int, num_pages: int, max_num_seqs: int) -> None:
    """Memory is the limit in one case, slots in the other."""
    run = Run("prefill_then_decode", stages, num_pages, max_num_seqs=max_num_seqs, page_size=8)
    for i in range(120):
        run.add(10 + 7 * i % 31, 5 + 11 * i % 40)
    run.finish()
    turns = phases(run.plans)
    assert turns[0] and len(turns) >= 6
    assert len(turns) < len(run.plans) / 3
    assert run.scheduler.stats().preemptions == 0


@given(
    requests=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=40),
    stages=st.sampled_from([1, 2, 4]),
    num_pages=st.integers(16, 60),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_preemption_never_thrashes_however_small_the_cache(
    requests: list[tuple[int, int]], stages: int, num_pages: int
) -> None:
    """A phase may admit one step too many, and nothing is admitted before its decodes go on."""
    run = Run("prefill_then_decode", stages, num_pages, page_size=8, max_num_batched_tokens=32)
    for prompt_len, max_tokens in requests:
        run.add(prompt_len, max_tokens)
    run.finish()
    phases(run.plans)
    needed = sum(prompt_len + max_tokens - 1 for prompt_len, max_tokens in requests)
    assert run.runner.num_computed <= 2 * needed


def test_outputs_longer_than_predicted_cost_each_sequence_one_preemption_at_most() -> None:
    """Outputs end early at first, so too many are admitted when they do not."""
    run = Run("prefill_then_decode", 2, 60, page_size=8, max_num_seqs=64)
    for _ in range(100):
        run.scheduler._outputs.observe(1, 100)
    for i in range(60):
        run.add(12 + i % 9, 60)
    run.finish()
    phases(run.plans)
    assert 0 < run.scheduler.stats().preemptions <= 60


@pytest.mark.parametrize("stages", [1, 4])
def test_a_late_request_waits_for_a_phase_and_no_longer(stages: int) -> None:
    """Others keep coming, so there is never nothing that waits."""
    run = Run("prefill_then_decode", stages, 100, max_num_seqs=8, page_size=8)
    for _ in range(20):
        run.add(20, 30)
    late = run.add(20, 1)
    ahead = set(run.sequences) - {late}
    while late not in run.finished:
        run.add(20, 30)
        for _ in range(3):
            run.turn()
    assert late.num_cached_tokens == 0 and len(run.finished & ahead) >= 12
    after = [s for s in run.finished if s not in ahead and s is not late]
    assert len(after) <= 8

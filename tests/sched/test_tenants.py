"""Tenants get shares by their weights, whatever they send; nobody starves, or fills all queues."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gllm_engine.config import EngineConfig
from gllm_engine.engine.null_runner import NullRunner
from gllm_engine.sampling import SamplingParams
from gllm_engine.sched import Amount, Refused, Room, Scheduler, Sequence
from gllm_engine.sched.tenants import OUTPUT_WEIGHT
from gllm_engine.types import StepPlan, TenantStats

MINUTE = 3000  # steps of 20 ms


class Load:
    """An engine's loop on the null runner, and the service of each tenant as the plans tell it."""

    def __init__(self, num_pages: int = 4096, **config: Any) -> None:
        values = {"max_num_seqs": 16, "max_num_batched_tokens": 128, "enable_prefix_caching": False}
        self.config = EngineConfig(model=".", **values | config)
        self.scheduler = Scheduler(self.config, num_pages, 2000, ())
        self.runner = NullRunner(100, self.config)
        self.sequences: list[Sequence] = []
        self.live: dict[str, int] = {}
        self.service: dict[str, int] = {}
        self.finished: list[int] = []
        self.owners: dict[int, str] = {}  # by slot
        self.names: list[str] = []  # by sequence

    def add(
        self, name: str, prompt: int, output: int, tenant: str | None = None, **more: Any
    ) -> None:
        """`tenant`: as the request tells it; None: `name`."""
        number = len(self.names)
        tenant = name if tenant is None else tenant
        sampling = SamplingParams(max_tokens=output, ignore_eos=True, tenant=tenant, **more)
        self.scheduler.add(Sequence((b"", number), [7] * prompt, sampling, seed=number))
        self.names.append(name)
        self.live[name] = self.live.get(name, 0) + 1

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule()
        assert plan is not None
        self.owners.update({new.slot: self.names[new.seed] for new in plan.new})
        for slot in plan.decode_slots:
            name = self.owners[slot]
            self.service[name] = self.service.get(name, 0) + OUTPUT_WEIGHT
        for chunk in plan.chunks:
            name = self.owners[chunk.slot]
            self.service[name] = self.service.get(name, 0) + len(chunk.tokens)
        committed = self.scheduler.commit(self.runner.launch(plan).wait())
        for sequence, _ in committed.finished:
            self.finished.append(sequence.key[1])
            self.live[self.names[sequence.key[1]]] -= 1
        return plan


def add_up(load: Load, rng: random.Random, name: str, live: int, tenant: str | None = None) -> None:
    """Keep `live` requests of a tenant alive: "a" has long prompts, "b" has long outputs."""
    while load.live.get(name, 0) < live:
        if name == "a":
            load.add(name, rng.randint(50, 200), rng.randint(1, 20), tenant)
        else:
            load.add(name, rng.randint(1, 40), rng.randint(20, 90), tenant)


@pytest.mark.parametrize(
    ("weights", "num_pages"),
    [
        ({}, 4096),
        ({"a": 3.0}, 4096),
        ({"b": 3.0}, 4096),
        ({}, 60),  # 960 tokens: sequences are preempted all the time
    ],
)
def test_two_tenants_at_ten_to_one_get_their_weights(
    weights: dict[str, float], num_pages: int
) -> None:
    load = Load(num_pages, tenant_weights=weights)
    rng = random.Random(1)
    at = {"a": 0, "b": 0}
    for step in range(MINUTE):
        add_up(load, rng, "a", 320)
        add_up(load, rng, "b", 32)
        for new in load.step().new:
            assert step - at[load.names[new.seed]] < 150  # nobody starves
            at[load.names[new.seed]] = step
    assert bool(load.scheduler.stats().preemptions) == (num_pages == 60)
    expected = weights.get("a", 1) / weights.get("b", 1)
    computed = load.service["a"] / load.service["b"]
    assert computed == pytest.approx(expected, rel=0.05)


def test_without_tenants_the_greater_load_gets_more() -> None:
    """The control: the shares above come from tenants and from nothing else."""
    load = Load()
    rng = random.Random(1)
    for _ in range(500):
        add_up(load, rng, "a", 320, tenant="")
        add_up(load, rng, "b", 32, tenant="")
        load.step()
    assert load.service["a"] > 4 * load.service["b"]


@given(
    st.lists(st.sampled_from([0.5, 1.0, 2.0, 5.0]), min_size=2, max_size=5),
    st.sampled_from([4, 8]),
    st.booleans(),
    st.integers(0, 1000),
)
@settings(max_examples=4, deadline=None, derandomize=True)
def test_any_number_of_tenants_get_their_weights(
    weights: list[float], slots: int, caching: bool, seed: int
) -> None:
    """Equal prompts, with caching: what is not computed does not count."""
    rng = random.Random(seed)
    names = [str(i) for i in range(len(weights))]
    given = dict(zip(names, weights, strict=True))
    load = Load(max_num_seqs=slots, enable_prefix_caching=caching, tenant_weights=given)
    longest = {name: rng.choice([2, 5, 12]) for name in names}
    for _ in range(500):
        for name in names:
            while load.live.get(name, 0) <= 2 * slots:
                load.add(name, rng.randint(1, 64), rng.randint(1, longest[name]))
        load.step()
    shares = [load.service[name] / given[name] for name in names]
    bound = 2 * OUTPUT_WEIGHT * slots * (64 + 12) / min(weights)  # theorem 4.4 of the paper
    assert max(shares) - min(shares) < bound
    stats = load.scheduler.stats().tenants
    counted = {n: t.prefill_tokens + OUTPUT_WEIGHT * t.decode_tokens for n, t in stats.items()}
    lag = OUTPUT_WEIGHT * load.config.page_size * slots
    assert all(0 <= load.service[name] - counted[name] <= lag for name in names)


def test_an_idle_tenant_saves_up_nothing() -> None:
    load = Load()
    rng = random.Random(2)
    load.add("b", 1, 1)
    for _ in range(1000):
        add_up(load, rng, "a", 60)
        load.step()
    before = dict(load.service)
    for _ in range(MINUTE):
        add_up(load, rng, "a", 60)
        add_up(load, rng, "b", 60)
        load.step()
    got = [load.service[name] - before[name] for name in ("a", "b")]
    assert got[0] / got[1] == pytest.approx(1, rel=0.05)


def test_use_while_nobody_waits_is_no_debt() -> None:
    load = Load(max_num_seqs=2)
    load.add("a", 1000, 10)
    while load.scheduler.has_work:
        load.step()
    for _ in range(4):
        load.add("b", 10, 5)
    load.add("a", 10, 5)
    while len(load.finished) < 4:
        load.step()
    assert 5 in load.finished  # third, although "a" has had a hundred times as much


def served(load: Load) -> list[int]:
    """The sequences in the order of their admission."""
    order = []
    while load.scheduler.has_work:
        order += [new.seed for new in load.step().new]
        load.scheduler.check_integrity()
    return order


def test_turns_are_of_tokens_and_ties_go_by_arrival() -> None:
    load = Load(max_num_seqs=1)
    for _ in range(3):
        load.add("a", 100, 1)
    for _ in range(6):
        load.add("b", 40, 1)
    assert served(load) == [0, 3, 4, 5, 1, 6, 7, 2, 8]


def test_priority_goes_before_tenants_and_a_low_one_earns_no_credit() -> None:
    load = Load(max_num_seqs=1)
    load.add("low", 10, 1, priority=1)
    for _ in range(8):
        load.add("high", 100, 1)
    load.add("low", 10, 1, priority=1)
    load.add("new", 10, 1, priority=1)
    load.add("low", 10, 1, priority=1)
    # By then "low" is lifted to where "high" was; a newcomer waits for one turn of its only.
    assert served(load) == [1, 2, 3, 4, 5, 6, 7, 8, 0, 10, 9, 11]


def test_the_sequence_admitted_last_is_preempted_first() -> None:
    """Not the one that arrived last: who has waited for a turn keeps it."""
    load = Load(num_pages=6, max_num_batched_tokens=32)
    load.add("a", 30, 60)
    load.step()
    load.add("a", 30, 60)
    load.add("b", 30, 60)
    assert [new.seed for new in load.step().new] == [2, 1]
    scheduler = load.scheduler
    while not scheduler.stats().preemptions:
        load.step()
    assert (scheduler.waiting_of("a").sequences, scheduler.waiting_of("b").sequences) == (1, 0)


# ------------------------------------------------------------ queues


@pytest.mark.parametrize(
    ("limits", "prompt", "sentence"),
    [
        (
            {"max_waiting": 4},
            5,
            "the queue is full for tenant 'a': 4 requests are waiting, and with the 1 of this "
            "prompt they would be more than 4 (max_waiting)",
        ),
        (
            {"max_waiting_tokens": 20},
            5,
            "the queue is full for tenant 'a': 20 tokens are waiting, and with the 5 of this "
            "prompt they would be more than 20 (max_waiting_tokens)",
        ),
    ],
)
def test_a_full_queue_is_its_tenants_own(
    limits: dict[str, int], prompt: int, sentence: str
) -> None:
    load = Load(**limits)
    for _ in range(4):
        load.add("a", prompt, 1)
    with pytest.raises(Refused) as refused:
        load.add("a", prompt, 1)
    assert (refused.value.status, refused.value.message) == ("unavailable", sentence)
    for name in ("b", "", "b"):
        load.add(name, 1, 1)
    with pytest.raises(Refused, match=r"tenant 'a'.*, less half of the \d+ of others\)"):
        load.add("a", 1, 1)
    load.scheduler.check_integrity()


@given(st.integers(1, 60), st.lists(st.integers(0, 9), max_size=400))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_greedy_tenants_leave_room_for_one_more(limit: int, arrivals: list[int]) -> None:
    room = Room(limit, 2**40)
    waiting: dict[int, int] = {}

    def fits(tenant: int) -> bool:
        own = Amount(waiting.get(tenant, 0))
        return room.refusal(str(tenant), own, Amount(sum(waiting.values())), Amount(1)) is None

    for tenant in arrivals:
        if fits(tenant):
            waiting[tenant] = waiting.get(tenant, 0) + 1
    assert sum(waiting.values()) < 2 * limit + 1
    assert fits(-1) or limit < len(waiting) + 1
    if len(waiting) == 1:
        assert max(waiting.values()) == min(limit, len(arrivals))


# ------------------------------------------------------------ invented names


def test_invented_names_cost_bounded_memory_and_a_bounded_delay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gllm_engine.sched.tenants.MAX_TENANTS", 8)
    load = Load(max_num_seqs=1, tenant_weights={"known": 1.0})
    tenants = load.scheduler._waiting._tenants
    for _ in range(4):
        load.add("known", 20, 1)
    for number in range(4 * 20 * (8 + 2)):
        load.add(f"invented {number}", 1, 1)
        load.step()
        assert len(tenants) <= 8 + 2
    assert {0, 1, 2, 3} <= {*load.finished}
    served(load)
    stats = load.scheduler.stats().tenants
    assert stats["known"] == TenantStats(prefill_tokens=80)
    assert stats["other"] == TenantStats(prefill_tokens=number + 1)


def test_places_in_the_heap_are_bounded() -> None:
    """Aborted sequences leave stale places behind, and no step comes that would drop them."""
    load = Load(max_num_seqs=1)
    load.add("a", 1, 100)
    load.step()
    waiting = load.scheduler._waiting
    for number in range(200):
        sequence = Sequence((b"", number), [7], SamplingParams(tenant=str(number % 3)), 0)
        load.scheduler.add(sequence)
        load.scheduler.abort(sequence)
        assert len(waiting._heap) <= 2 * len(waiting._tenants) + 1
    load.scheduler.check_integrity()


def test_an_overlong_name_is_refused() -> None:
    SamplingParams(tenant="ü" * 128)
    with pytest.raises(ValueError, match="tenant: 129 characters given, at most 128"):
        SamplingParams(tenant="x" * 129)

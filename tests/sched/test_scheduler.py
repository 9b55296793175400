"""What the random schedules do not state: order, victims, refusals, the shape of plans."""

from __future__ import annotations

from typing import Any

import pytest
from paged_mock import EOS, PagedMock

from gllm_engine.config import EngineConfig
from gllm_engine.sampling import SamplingParams
from gllm_engine.sched import Committed, IntegrityError, Refused, Scheduler, Sequence
from gllm_engine.sched.policy import POLICIES, Budget
from gllm_engine.types import Finish, NewPages, NewSequence, StepPlan, StepResult, TokenLogprobs

PAGE = 4


def make(num_pages: int = 64, max_model_len: int = 200, **config: Any) -> Scheduler:
    values = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "page_size": PAGE} | config
    return Scheduler(EngineConfig(model=".", **values), num_pages, max_model_len, EOS)


def add(scheduler: Scheduler, prompt: list[int], number: int = 0, **sampling: Any) -> Sequence:
    params = SamplingParams(**{"max_tokens": None} | sampling)
    sequence = Sequence((b"", number), prompt, params, seed=7)
    scheduler.add(sequence)
    return sequence


def plan(scheduler: Scheduler) -> StepPlan:
    made = scheduler.schedule()
    assert made is not None
    return made


def commit(scheduler: Scheduler, made: StepPlan, token: int = 5) -> Committed:
    rows = len(made.decode_slots) + sum(chunk.samples for chunk in made.chunks)
    committed = scheduler.commit(StepResult(made.step, [token] * rows))
    scheduler.check_integrity()
    return committed


def step(scheduler: Scheduler, token: int = 5) -> tuple[StepPlan, Committed]:
    made = plan(scheduler)
    return made, commit(scheduler, made, token)


def test_the_first_plans_of_a_sequence() -> None:
    scheduler = make(max_num_batched_tokens=6)
    sequence = add(scheduler, list(range(10, 20)))
    first, made = step(scheduler)
    assert first.step == 1 and not made.tokens
    assert first.new == [NewSequence(0, 7, 10, sequence.sampling)]
    assert first.new_pages == [NewPages(0, 0, [0, 1, 2])]
    (chunk,) = first.chunks
    assert (chunk.slot, chunk.start, chunk.tokens, chunk.samples, chunk.targets) == (
        0, 0, [10, 11, 12, 13, 14, 15], False, [],
    )  # fmt: skip
    second, made = step(scheduler, token=21)
    assert (second.new, second.new_pages, second.decode_slots) == ([], [], [])
    assert (second.chunks[0].start, second.chunks[0].samples) == (6, True)
    assert made.tokens == [(sequence, 21)] and sequence.tokens[10:] == [21]
    third, _ = step(scheduler)
    assert (third.decode_slots, third.chunks, third.new_pages) == ([0], [], [])
    step(scheduler)
    fifth, _ = step(scheduler)  # position 12 begins a page
    assert fifth.new_pages == [NewPages(0, 3, [3])]


def test_decodes_go_before_prefill_and_prefill_fills_the_step() -> None:
    scheduler = make(max_num_batched_tokens=8)
    add(scheduler, [9] * 3)
    step(scheduler)
    add(scheduler, [8] * 12)
    add(scheduler, [7] * 2)
    made, _ = step(scheduler)
    assert made.decode_slots == [0]
    assert [(c.slot, c.start, len(c.tokens)) for c in made.chunks] == [(1, 0, 7)]
    made, _ = step(scheduler)
    assert made.decode_slots == [0]
    assert [(c.slot, c.start, len(c.tokens)) for c in made.chunks] == [(1, 7, 5), (2, 0, 2)]


def test_lower_priority_numbers_first_and_fifo_within() -> None:
    scheduler = make(max_num_seqs=1)
    for number, priority in enumerate([0, 1, -1, 0, -1]):
        add(scheduler, [9], number, priority=priority, max_tokens=1)
    served = [step(scheduler)[1].finished[0][0].key[1] for _ in range(5)]
    assert served == [2, 4, 0, 3, 1]


def test_victims_are_of_lowest_priority_then_latest() -> None:
    scheduler = make(num_pages=8)
    for number, priority in enumerate([0, 1, 0, 0]):
        add(scheduler, [9 + number] * 7, number, priority=priority, presence_penalty=1.0)
    step(scheduler)
    step(scheduler)
    assert scheduler.stats().kv_usage == 1.0
    made, committed = step(scheduler)  # position 8 begins a page for each
    assert [sequence.key[1] for sequence, _ in committed.tokens] == [0, 2]
    assert scheduler.stats().waiting == scheduler.stats().preemptions == 2
    made, _ = step(scheduler)
    assert len(made.decode_slots) == 2 and not made.new


def test_a_victim_may_be_in_prefill_or_decode_whichever_is_worse() -> None:
    for priority in (1, 0):
        scheduler = make(num_pages=6, max_num_batched_tokens=8)
        first = add(scheduler, [9] * 3)
        decoding = add(scheduler, [8] * 3, priority=priority)
        step(scheduler)
        prefilling = add(scheduler, [7] * 15)
        step(scheduler)  # which leaves no page, and 9 tokens of the third to compute
        made, _ = step(scheduler)
        assert made.decode_slots[0] == first.slot
        assert list(scheduler._waiting) == [decoding if priority else prefilling]


def test_a_victim_that_was_to_decode_later_in_the_step_is_not_in_the_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = make(num_pages=4)
    a, b, c, d = (add(scheduler, [9 + i] * (1 if i < 2 else 4)) for i in range(4))
    step(scheduler)
    monkeypatch.setattr(scheduler, "_policy", lambda load: Budget(2, 8))
    first = plan(scheduler)
    assert first.decode_slots == [a.slot, b.slot]
    slot = c.slot
    second = plan(scheduler)  # c and d are the two without a token in flight; c needs a page
    assert second.decode_slots == [slot] and d.slot < 0
    assert commit(scheduler, first).tokens == [(a, 5), (b, 5)]
    assert commit(scheduler, second).tokens == [(c, 5)]


def test_a_preempted_sequence_is_computed_again_from_its_known_tokens() -> None:
    scheduler = make(num_pages=4, enable_prefix_caching=False)
    one = add(scheduler, [9] * 7, max_tokens=4)
    two = add(scheduler, [8] * 6, max_tokens=4, repetition_penalty=1.5)
    while one.queue is not None:
        step(scheduler)
    assert two.slot < 0 and two.tokens[6:] == [5, 5]
    made, committed = step(scheduler)
    assert made.chunks[0].tokens == [8] * 6 + [5, 5]
    assert made.new[0].prompt_len == 6 and made.chunks[0].samples
    assert committed.tokens == [(two, 5)]


def test_a_preempted_sequence_waits_for_its_tokens_in_flight() -> None:
    scheduler = make(num_pages=4, max_model_len=20)
    one = add(scheduler, [9] * 7, max_tokens=3)
    two = add(scheduler, [8] * 6, max_tokens=9)
    plans = [plan(scheduler) for _ in range(3)]
    assert two.slot < 0 and len(two.tokens) == 6 and two.prefill_len == 8
    scheduler.abort(one)
    assert scheduler.schedule() is None  # there are pages, but its last token is not known
    commit(scheduler, plans[0])
    assert scheduler.schedule() is None
    commit(scheduler, plans[1])
    made = plan(scheduler)
    assert len(made.new) == 1 and made.chunks[0].samples
    assert commit(scheduler, plans[2]).tokens == []
    assert commit(scheduler, made).tokens == [(two, 5)]


@pytest.mark.parametrize(
    ("prompt_len", "sampling", "status", "message"),
    [
        (0, {}, "invalid", "empty"),
        (200, {}, "invalid", "its 200 tokens.* limited to 200 tokens"),
        (40, {}, "invalid", "its 40 tokens do not fit the KV cache, which holds 40 tokens"),
        (41, {"max_tokens": 1}, "invalid", "holds 40 tokens"),
    ],
)
def test_refusals(prompt_len: int, sampling: dict[str, Any], status: str, message: str) -> None:
    scheduler = make(num_pages=10)
    with pytest.raises(Refused, match=message) as refused:
        add(scheduler, [9] * prompt_len, **sampling)
    assert refused.value.status == status and refused.value.message == str(refused.value)
    assert not scheduler.has_work


def test_the_queue_is_bounded() -> None:
    scheduler = make(max_waiting=2)
    add(scheduler, [9])
    waiting = add(scheduler, [9])
    with pytest.raises(Refused, match="queue is full: 2 requests are waiting") as refused:
        add(scheduler, [9])
    assert refused.value.status == "unavailable"
    scheduler.abort(waiting)
    add(scheduler, [9])


def test_the_tokens_in_the_queue_are_bounded() -> None:
    scheduler = make(max_waiting_tokens=5)
    waiting = [add(scheduler, [9] * 7)]  # alone, and so taken
    with pytest.raises(
        Refused, match="queue is full: 7 tokens are waiting, and with the 1"
    ) as full:
        add(scheduler, [9])
    assert full.value.status == "unavailable"
    scheduler.abort(waiting.pop())
    waiting += [add(scheduler, [9] * 4), add(scheduler, [9])]
    assert scheduler.stats().waiting_tokens == 5
    with pytest.raises(Refused, match="more than 5 .max_waiting_tokens"):
        add(scheduler, [9])
    scheduler.schedule()  # those that run wait no more
    assert scheduler.stats().waiting_tokens == 0
    add(scheduler, [9] * 5)


def test_a_sequence_is_added_once() -> None:
    scheduler = make()
    sequence = add(scheduler, [9], 5)
    scheduler.abort(sequence)
    with pytest.raises(ValueError, match=r"sequence \(b'', 5\) was added before"):
        scheduler.add(sequence)


def test_a_prompt_that_fills_the_pool_gets_its_one_token() -> None:
    scheduler = make(num_pages=2)
    sequence = add(scheduler, [9] * 8, max_tokens=1)
    _, made = step(scheduler)
    assert made.finished == [(sequence, Finish("length"))]


def test_outgrowing_the_pool_is_an_error() -> None:
    scheduler = make(num_pages=2)
    sequence = add(scheduler, [9] * 6)
    for _ in range(2):
        assert not step(scheduler)[1].finished
    _, made = step(scheduler)
    assert len(sequence.tokens) == 9
    ((who, finish),) = made.finished
    assert who is sequence and (finish.reason, finish.status) == ("error", "invalid")
    assert "holds 8 tokens" in finish.message and "3 tokens of output" in finish.message
    assert not scheduler.has_work


@pytest.mark.parametrize(
    ("sampling", "token", "finish"),
    [
        ({}, EOS[0], Finish("stop", stop_token=EOS[0])),
        ({}, EOS[1], Finish("stop", stop_token=EOS[1])),
        ({"ignore_eos": True}, EOS[0], None),
        ({"ignore_eos": True, "stop_token_ids": (0, 9)}, 9, Finish("stop", stop_token=9)),
        ({"ignore_eos": True, "stop_token_ids": (0, 9)}, 0, Finish("stop", stop_token=0)),
        ({"max_tokens": 1}, 9, Finish("length")),
        ({"max_tokens": 1}, EOS[0], Finish("stop", stop_token=EOS[0])),
    ],
)
def test_stops(sampling: dict[str, Any], token: int, finish: Finish | None) -> None:
    scheduler = make()
    sequence = add(scheduler, [9], **sampling)
    _, made = step(scheduler, token)
    assert made.tokens == [(sequence, token)]
    assert made.finished == ([] if finish is None else [(sequence, finish)])


def test_nothing_is_planned_past_the_end() -> None:
    scheduler = make(max_model_len=6)
    short, full = add(scheduler, [9], max_tokens=2), add(scheduler, [8] * 3)
    plans = [plan(scheduler) for _ in range(3)]
    assert [len(p.decode_slots) for p in plans] == [0, 2, 1]
    assert scheduler.schedule() is None
    finished = [commit(scheduler, p).finished for p in plans]
    assert finished == [[], [(short, Finish("length"))], [(full, Finish("length"))]]
    assert not scheduler.has_work and scheduler.stats().kv_usage == 0


def test_the_runner_hears_which_tokens_min_tokens_forbids() -> None:
    scheduler = make()
    add(scheduler, [1, 2], min_tokens=3)
    add(scheduler, [1, 2], min_tokens=3, ignore_eos=True)
    add(scheduler, [1, 2])
    assert [new.eos_token_ids for new in plan(scheduler).new] == [EOS, EOS, ()]


def test_tokens_after_a_stop_are_dropped_and_never_credited_to_the_next_owner() -> None:
    scheduler = make(max_num_seqs=1)
    first, second = add(scheduler, [9] * 3), add(scheduler, [8] * 3)
    plans = [plan(scheduler) for _ in range(3)]
    assert commit(scheduler, plans[0], EOS[0]).finished[0][0] is first
    takeover = plan(scheduler)
    assert takeover.new[0].slot == plans[2].decode_slots[0] == second.slot
    assert commit(scheduler, plans[1], 6).tokens == []
    assert commit(scheduler, plans[2], EOS[0]) == Committed()
    assert commit(scheduler, takeover, 11).tokens == [(second, 11)]
    assert second.tokens == [8, 8, 8, 11] and first.tokens == [9, 9, 9, EOS[0]]


def test_abort_everywhere_and_again() -> None:
    scheduler = make(max_num_batched_tokens=8)
    decoding, prefilling, waiting = (add(scheduler, [9 + i] * 6) for i in range(3))
    first, second = plan(scheduler), plan(scheduler)
    assert prefilling.slot >= 0 and decoding.slot >= 0
    never = Sequence((b"", 0), [1], SamplingParams(), 0)
    for sequence in (decoding, prefilling, waiting, waiting, decoding, never):
        scheduler.abort(sequence)
        scheduler.check_integrity()
    assert scheduler.stats().kv_usage == 0 and scheduler.has_work
    assert scheduler.schedule() is None
    assert commit(scheduler, first) == commit(scheduler, second) == Committed()
    assert not scheduler.has_work


def test_prefix_hits_are_counted_and_reported() -> None:
    scheduler = make()
    prompt = list(range(10, 22))
    add(scheduler, prompt, max_tokens=1)
    step(scheduler)
    add(scheduler, prompt, max_tokens=1)
    made, committed = step(scheduler)
    assert made.chunks[0].start == 8 and made.chunks[0].tokens == prompt[8:]
    assert [sequence.num_cached_tokens for sequence in committed.begun] == [8]
    stats = scheduler.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (24, 8)


def test_a_prefix_is_shared_by_sequences_of_the_same_step_and_outputs_are_shared() -> None:
    scheduler = make()
    first = add(scheduler, [9] * 9, max_tokens=8)
    add(scheduler, [9] * 9, max_tokens=1)
    made, _ = step(scheduler)
    assert [chunk.start for chunk in made.chunks] == [0, 8]
    assert made.new_pages[1].pages[:2] == made.new_pages[0].pages[:2]
    for _ in range(7):
        step(scheduler)
    assert not scheduler.has_work and len(first.tokens) == 17
    add(scheduler, [*first.tokens, 6])
    assert plan(scheduler).chunks[0].start == 16


def test_prompt_logprobs_take_no_hits_and_report_each_position_once() -> None:
    scheduler = make(num_pages=5, max_num_batched_tokens=4)
    runner = PagedMock(EngineConfig(model=".", max_num_seqs=4, max_num_batched_tokens=4,
                                    page_size=PAGE), 5)  # fmt: skip
    prompt = list(range(10, 20))
    first = add(scheduler, prompt, max_tokens=1)
    while scheduler.has_work:
        scheduler.commit(runner.run(plan(scheduler)))
    scored = add(scheduler, prompt, max_tokens=6, prompt_logprobs=0, ignore_eos=True)
    made = plan(scheduler)
    assert made.chunks[0].start == 0 and made.chunks[0].targets == prompt[1:5]
    results = [runner.run(made), runner.run(plan(scheduler))]
    scheduler._preempt(scored)
    scheduler.check_integrity()
    entries: list[TokenLogprobs] = []
    while scheduler.has_work:
        committed = scheduler.commit(results.pop(0))
        for sequence, more in committed.prompt_logprobs:
            assert sequence is scored
            entries += more
        made_or_none = scheduler.schedule()
        if made_or_none is not None:
            results.append(runner.run(made_or_none))
    assert [entry.token_ids for entry in entries] == [[token] for token in prompt[1:]]
    assert first.tokens[:10] == scored.tokens[:10] and len(scored.tokens) == 16
    assert scheduler.stats().prefix_queries == 10


def test_constrained_sequences_are_planned_one_token_at_a_time() -> None:
    scheduler = make()
    seen: list[list[int]] = []

    def constraint(tokens: list[int]) -> bytes | None:
        seen.append(list(tokens))
        return bytes([len(tokens)]) if len(tokens) != 3 else None

    sequence = Sequence((b"", 0), [9], SamplingParams(max_tokens=3), 0, constraint)
    scheduler.add(sequence)
    free = add(scheduler, [8], max_tokens=3)
    first = plan(scheduler)
    assert first.masks == {sequence.slot: b"\x01"}
    second = plan(scheduler)
    assert (second.decode_slots, second.masks) == ([free.slot], {})
    commit(scheduler, first)
    third = plan(scheduler)
    assert third.decode_slots == [sequence.slot, free.slot]
    assert third.masks == {sequence.slot: b"\x02"}
    commit(scheduler, second)
    commit(scheduler, third)
    fourth, made = step(scheduler)
    assert (fourth.masks, made.finished) == ({}, [(sequence, Finish("length"))])
    assert seen == [[9], [9, 5], [9, 5, 5]]


def test_logprobs_go_to_the_owner_of_the_row() -> None:
    scheduler = make(max_num_seqs=2)
    one, two = add(scheduler, [9], logprobs=0), add(scheduler, [8], logprobs=0)
    made = plan(scheduler)
    late = plan(scheduler)
    entry = TokenLogprobs([5], [-1.0], [1])
    committed = scheduler.commit(
        StepResult(made.step, [5, EOS[0]], {one.slot: entry, two.slot: entry})
    )
    assert committed.logprobs == [(one, entry), (two, entry)]  # also of the token that ends it
    slots = late.decode_slots
    committed = scheduler.commit(StepResult(late.step, [5, 5], dict.fromkeys(slots, entry)))
    assert committed.logprobs == [(one, entry)]


def test_a_policy_can_share_out_the_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        POLICIES, "chunked_prefill", lambda load: Budget(-(-load.num_decoding // 2), 3)
    )
    scheduler = make()
    sequences = [add(scheduler, [9 + i]) for i in range(4)]
    commit(scheduler, plan(scheduler))
    made = plan(scheduler)  # the fourth waited for prefill budget
    assert len(made.decode_slots) == 2 and len(made.chunks) == 1
    commit(scheduler, made)
    slots = [sequence.slot for sequence in sequences]
    a, b = plan(scheduler), plan(scheduler)
    assert (a.decode_slots, b.decode_slots) == (slots[::2], slots[1::2])  # who waited longest
    assert plan(scheduler).decode_slots == slots[::2]  # whose turn it is, known token or not
    commit(scheduler, a)
    assert plan(scheduler).decode_slots == slots[1::2]


def test_in_a_pipeline_a_step_waits_for_no_token_that_is_still_far_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(
        POLICIES, "chunked_prefill", lambda load: Budget(-(-load.num_decoding // 2), 4)
    )
    scheduler = make(pipeline_parallel_size=2, schedule_policy="chunked_prefill")
    sequences = [add(scheduler, [9 + i]) for i in range(4)]
    commit(scheduler, plan(scheduler))
    slots = [sequence.slot for sequence in sequences]
    a, b, c = (plan(scheduler) for _ in range(3))
    # The third step's tokens come back while the second step is on the last stage.
    assert [each.decode_slots for each in (a, b, c)] == [slots[:2], slots[2:], slots[:2]]
    scheduler.abort(sequences[2])
    scheduler.abort(sequences[3])
    # Two are left, a step each, and both are in the newest step: only one that knows its token.
    assert scheduler.schedule() is None
    for made in (a, b, c):
        commit(scheduler, made)
    assert plan(scheduler).decode_slots == slots[:1]


def test_admission_leaves_spare_pages_to_those_decoding() -> None:
    scheduler = make(num_pages=40, max_num_batched_tokens=200)
    add(scheduler, [9] * 120)
    add(scheduler, [8] * 30)
    add(scheduler, [7] * 5)  # 40 - 30 - 8 = 2 are left, one for each of the others
    made, _ = step(scheduler)
    assert len(made.new) == 2 and scheduler.stats().waiting == 1


def test_results_must_be_of_the_oldest_plan() -> None:
    scheduler = make()
    with pytest.raises(ValueError, match="got the result of step 1, expected none"):
        scheduler.commit(StepResult(1, []))
    sequence = add(scheduler, [9])
    first, second = plan(scheduler), plan(scheduler)
    with pytest.raises(ValueError, match="got the result of step 2, expected step 1"):
        scheduler.commit(StepResult(second.step, [5]))
    with pytest.raises(ValueError, match="step 1 has 2 tokens for 1 sampling rows"):
        scheduler.commit(StepResult(first.step, [5, 5]))
    assert commit(scheduler, first).tokens == [(sequence, 5)]


def test_reset_drops_everything_and_goes_on() -> None:
    scheduler = make(max_num_seqs=1)
    prompt = list(range(10, 20))
    running, waiting = add(scheduler, prompt), add(scheduler, prompt)
    late = plan(scheduler)
    assert scheduler.reset() == [running, waiting]
    assert not scheduler.has_work and scheduler.num_in_flight == 0
    scheduler.check_integrity()
    with pytest.raises(ValueError, match="expected none"):
        scheduler.commit(StepResult(late.step, [5]))
    add(scheduler, prompt)
    made, _ = step(scheduler)
    assert made.step == late.step + 1 and made.chunks[0].start == 0  # nothing is cached


def test_stats() -> None:
    scheduler = make(num_pages=8, max_num_seqs=1)
    add(scheduler, [9] * 5)
    add(scheduler, [9] * 5)
    step(scheduler)
    stats = scheduler.stats()
    assert (stats.running, stats.waiting, stats.kv_usage, stats.steps) == (1, 1, 0.25, 1)


def test_check_integrity_finds_faults() -> None:
    def fault(expected: str) -> None:
        with pytest.raises(IntegrityError, match=expected):
            scheduler.check_integrity()

    scheduler = make()
    one, two = add(scheduler, [9] * 4, 1), add(scheduler, [9] * 4)
    step(scheduler)
    scheduler._decoding.reverse()
    fault("A queue is out of order")
    scheduler._decoding.reverse()
    two.queue = None
    fault("does not know of")
    two.queue = one.queue
    one.planned += 4
    fault(r"\(b'', 1\) has too few pages")
    one.planned -= 4
    two.slot = one.slot
    fault("Slots are lost or owned twice")
    two.slot = 1 - one.slot
    scheduler._backlog += 1
    fault("The backlog is 0 tokens, but 1 counted")
    scheduler._backlog -= 1
    scheduler.check_integrity()

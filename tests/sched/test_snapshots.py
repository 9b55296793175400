"""Which prefixes of a model with a state per sequence are found again, by their snapshots."""

from __future__ import annotations

import random

from paged_mock import VOCAB, PagedMock

from gllm_engine.config import EngineConfig
from gllm_engine.sampling import SamplingParams
from gllm_engine.sched import Scheduler, Sequence

PAGE = 4


class Engine:
    def __init__(self, num_snapshots: int, num_pages: int = 1000) -> None:
        config = EngineConfig(
            model=".", max_num_seqs=4, max_num_batched_tokens=64, page_size=PAGE, plans_in_flight=1
        )
        self.scheduler = Scheduler(config, num_pages, 4000, (), num_snapshots=num_snapshots)
        self.runner = PagedMock(config, num_pages, num_snapshots=num_snapshots)
        self.number = 0

    def generate(self, prompts: list[list[int]], max_tokens: int = 1) -> list[Sequence]:
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        sequences = []
        for prompt in prompts:
            self.number += 1
            sequences.append(Sequence((b"", self.number), prompt, sampling, 0))
            self.scheduler.add(sequences[-1])
        while self.scheduler.has_work:
            plan = self.scheduler.schedule()
            assert plan is not None
            self.scheduler.commit(self.runner.run(plan))
            self.scheduler.check_integrity()
        return sequences

    def num_cached(self, prompt: list[int]) -> int:
        return self.generate([prompt])[0].num_cached_tokens


def text(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(2, VOCAB), k=length)


def test_a_longer_prompt_finds_the_end_of_a_shorter_one() -> None:
    engine = Engine(10)
    prompt = text(1, 101)
    assert engine.num_cached(prompt) == 0
    assert engine.num_cached(prompt) == 100
    assert engine.num_cached(prompt[:100]) == 0  # its K and V are there, the state is not
    assert engine.num_cached(prompt + text(2, 50)) == 100


def test_a_common_beginning_is_found_from_its_third_prompt_on() -> None:
    """The second one computes it anew, and copies the state where it branches off."""
    engine = Engine(10)
    beginning = text(1, 202)
    cached = [engine.num_cached(beginning + text(i, 40)) for i in range(2, 7)]
    assert cached == [0, 0, 200, 200, 200]


def test_every_turn_of_a_conversation_finds_the_turn_before() -> None:
    engine = Engine(10)
    known: list[int] = []
    found = asked = 0
    for turn in range(8):
        prompt = known + text(turn, 125)
        (sequence,) = engine.generate([prompt], max_tokens=125)
        found += sequence.num_cached_tokens
        asked += len(known)
        known = sequence.tokens
    assert found >= 0.97 * asked


def test_equal_prompts_in_one_step_do_not_share_a_state() -> None:
    engine = Engine(10)
    prompt = text(1, 17)
    sequences = engine.generate([prompt] * 3, max_tokens=9)
    assert len({tuple(s.tokens) for s in sequences}) == 1
    assert engine.num_cached(prompt) == 16


def test_equal_prompts_begin_from_one_snapshot() -> None:
    engine = Engine(10)
    prompt = text(1, 200)
    first, second, third = engine.generate([prompt] * 3, max_tokens=9)
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == third.num_cached_tokens == 196


def test_prompts_that_are_cut_do_not_keep_others_waiting() -> None:
    """Each prompt is cut before its last page; a step has room for four of them."""
    engine = Engine(10)
    engine.generate([text(seed, 15) for seed in range(4)])
    assert engine.scheduler.stats().steps == 2


def test_hits_are_counted_by_the_kind_of_snapshot() -> None:
    engine = Engine(10)
    beginning = text(1, 200)
    (one,) = engine.generate([beginning + text(2, 41)], max_tokens=100)
    for prompt in (
        one.tokens,
        one.tokens[:241] + text(3, 9),
        *(beginning + text(i, 9) for i in (4, 5)),
    ):
        engine.num_cached(prompt)
    stats = engine.scheduler.stats()
    assert stats.answer_snapshot_hits == 1
    assert stats.prompt_snapshot_hits == 1
    assert stats.branch_snapshot_hits == 1
    assert stats.prefix_stored > stats.prefix_hits > 0


def test_the_least_recent_snapshot_is_the_first_to_go() -> None:
    engine = Engine(2)
    prompts = [text(seed, 41) for seed in range(3)]
    for prompt in (prompts[0], prompts[1], prompts[0], prompts[2]):
        engine.num_cached(prompt)
    assert [engine.num_cached(prompts[i]) for i in (0, 2, 1)] == [40, 40, 0]


def test_without_snapshots_every_prompt_is_computed() -> None:
    engine = Engine(0)
    assert [engine.num_cached(text(1, 41)) for _ in range(3)] == [0, 0, 0]

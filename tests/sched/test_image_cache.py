"""Which images a plan encodes and forgets, and where chunks end for them."""

from __future__ import annotations

from typing import Any

import pytest

from gllm_engine.config import EngineConfig, settle
from gllm_engine.sampling import SamplingParams
from gllm_engine.sched import ImageCache, Refused, Scheduler, Sequence
from gllm_engine.types import Image, ImageRun, StepPlan, StepResult

PLACEHOLDER = 9


class World:
    """A scheduler whose steps end at once. `has`: the numbers that the runner has."""

    def __init__(self, budget: int, room: int, **config: Any) -> None:
        values = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "page_size": 4} | config
        config = EngineConfig(model=".", encoder_budget=budget, image_cache_tokens=room, **values)
        self.scheduler = Scheduler(config, 64, 200, (), images=ImageCache(config))
        self.has: set[int] = set()

    def add(self, *parts: int | tuple[bytes, int], salt: str = "") -> Sequence:
        """A prompt of so many tokens of text, or of images of (name, tokens)."""
        prompt: list[int] = []
        images = []
        for part in parts:
            if isinstance(part, int):
                prompt += [1] * part
            else:
                name, size = part
                images.append(
                    Image(name * 16, len(prompt), 1, size, size, 1, size, name * 3 * size)
                )
                prompt += [PLACEHOLDER] * size
        params = SamplingParams(max_tokens=2, ignore_eos=True, cache_salt=salt)
        sequence = Sequence((b"", 0), prompt, params, 0, images=tuple(images))
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule()
        assert plan is not None
        assert [image.number for image in self.scheduler.to_encode] == plan.encode
        self.has -= set(plan.forget)
        assert not self.has & set(plan.encode)
        self.has |= set(plan.encode)
        assert {run.image for chunk in plan.chunks for run in chunk.images} <= self.has
        rows = len(plan.decode_slots) + sum(chunk.samples for chunk in plan.chunks)
        self.scheduler.commit(StepResult(plan.step, [5] * rows))
        self.scheduler.check_integrity()
        return plan


def test_a_chunk_ends_before_an_image_of_the_next_step() -> None:
    world = World(budget=8, room=40)
    world.add(2, (b"a", 6), 2, (b"b", 4), 1)
    world.add(3)
    first = world.step()
    assert first.encode == [0]
    assert [(c.start, len(c.tokens)) for c in first.chunks] == [(0, 10), (0, 3)]
    assert first.chunks[0].images == [ImageRun(0, 0, 2, 6)]
    second = world.step()
    assert (second.encode, second.forget) == ([1], [])
    assert second.chunks[0].images == [ImageRun(1, 0, 0, 4)]
    assert second.chunks[0].samples


def test_a_chunk_may_end_inside_an_image_whose_rows_lie_apart() -> None:
    world = World(budget=8, room=40, max_num_batched_tokens=6)
    image = Image(b"a" * 16, 1, 2, 3, 5, 1, 1, b"")
    sequence = Sequence((b"", 1), [1] * 10, SamplingParams(max_tokens=1), 0, images=(image,))
    world.scheduler.add(sequence)
    assert world.step().chunks[0].images == [ImageRun(0, 0, 1, 3)]
    last = world.step()
    assert last.chunks[0].images == [ImageRun(0, 3, 0, 3)] and not last.encode


def test_a_larger_image_than_the_budget_is_encoded_alone() -> None:
    world = World(budget=8, room=48)
    world.add((b"a", 4), 1)
    world.add((b"b", 12), 1)
    world.add((b"c", 4), 1)
    assert world.step().encode == [0, 1]  # c still fits the budget of the step
    last = world.step()
    assert last.encode == [2] and [c.samples for c in last.chunks] == [True]


def test_an_image_that_is_too_large_is_refused() -> None:
    world = World(budget=8, room=40)
    world.add((b"a", 10), 1)
    with pytest.raises(Refused, match=r"^image: it takes 11 tokens, an image may take 10 \("):
        world.add((b"a", 11), 1)
    assert World(budget=8, room=4).scheduler._images.most == 4
    assert settle(EngineConfig(model="."), 80 << 30, 0).largest_image == 16384
    assert settle(EngineConfig(model=".", max_model_len=512), 80 << 30, 0).largest_image == 8192


def test_an_image_is_encoded_once_for_all_its_sequences() -> None:
    world = World(budget=8, room=40, enable_prefix_caching=False)
    world.add((b"a", 6), 1)
    world.add(2, (b"a", 6), 3, (b"a", 6))
    assert world.step().encode == [0]
    world.step()
    world.add((b"a", 6))
    assert not world.step().encode


def test_a_cached_prefix_needs_no_image() -> None:
    world = World(budget=8, room=10)
    world.add(1, (b"a", 6), 4)
    world.step()
    world.step()
    world.add(1, (b"b", 8), 4)
    assert world.step().forget == [0]
    world.step()
    world.add(1, (b"a", 6), 4)
    plan = world.step()
    assert plan.chunks[0].start == 8 and not plan.encode and not plan.chunks[0].images
    world.add(1, (b"a", 6))  # only its first page is cached: a last token is always computed
    plan = world.step()
    assert (plan.encode, plan.chunks[0].images) == ([2], [ImageRun(2, 3, 0, 3)])


def test_the_least_recently_used_image_is_forgotten() -> None:
    world = World(budget=8, room=12, enable_prefix_caching=False)
    for name in (b"a", b"b", b"c"):
        world.add((name, 4))
        world.step()
    world.add((b"a", 4), 1)
    assert not world.step().encode
    world.add((b"d", 4))
    plan = world.step()
    assert (plan.forget, plan.encode) == ([1], [3])


def test_an_image_stays_until_its_last_token_is_computed() -> None:
    """Its sequence goes on, though one before it waits for the room. Nothing else is encoded: small
    images would take the room for ever.
    """
    world = World(budget=8, room=10, max_num_batched_tokens=8, enable_prefix_caching=False)
    world.add((b"a", 4), 1)
    world.add((b"b", 8), 1)
    world.add((b"c", 4), 1)
    first = world.step()
    assert first.encode == [0, 1]  # a and c; with b they would be more than the budget
    assert [(c.start, len(c.tokens)) for c in first.chunks] == [(0, 5), (0, 3)]
    world.add((b"d", 2), 1)
    second = world.step()
    assert (second.encode, second.forget) == ([], [])
    assert [(c.start, len(c.tokens)) for c in second.chunks] == [(3, 2)]
    third = world.step()
    assert (third.encode, third.forget) == ([2], [0, 1])
    assert world.step().encode == [3]


def test_after_a_failed_step_nothing_is_there() -> None:
    world = World(budget=8, room=40)
    world.add((b"a", 6), 1)
    world.step()
    world.scheduler.reset()
    world.scheduler.check_integrity()
    world.add((b"a", 6), 1)
    plan = world.step()
    assert (plan.forget, plan.encode) == ([0], [1])
    assert not world.step().forget


def test_what_a_failed_step_was_told_is_told_again() -> None:
    """The runner may not have come to it; else it would keep the embeddings for ever."""
    world = World(budget=8, room=12, enable_prefix_caching=False)
    world.add((b"a", 8), 1)
    world.step()
    world.add((b"b", 8), 1)
    failed = world.scheduler.schedule()
    assert failed is not None and failed.forget == [0]
    world.scheduler.reset()
    world.add((b"c", 8), 1)
    assert sorted(world.step().forget) == [0, 1]


def test_an_aborted_sequence_keeps_no_image() -> None:
    world = World(budget=8, room=12, max_num_batched_tokens=5)
    sequence = world.add((b"a", 8), 1)
    world.step()
    world.scheduler.abort(sequence)
    world.add((b"b", 8))
    plan = world.step()
    assert (plan.forget, plan.encode) == ([0], [1])


def test_tenants_with_other_salts_share_no_embeddings() -> None:
    world = World(budget=8, room=40)
    for salt, encoded in (("a", [0]), ("a", []), ("b", [1]), ("", [2]), ("b", [])):
        world.add((b"x", 4), 1, salt=salt)
        assert world.step().encode == encoded

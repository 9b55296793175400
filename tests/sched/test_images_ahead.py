"""Which images encoders are asked for, who waits for them, and what those that wait hold."""

from __future__ import annotations

from typing import Any

import pytest

from gllm_engine.config import EngineConfig
from gllm_engine.sampling import SamplingParams
from gllm_engine.sched import ImageCache, IntegrityError, Scheduler, Sequence
from gllm_engine.sched.pages import CachedPrefix, Pages
from gllm_engine.sched.tenants import Waiting
from gllm_engine.types import Image, ImagePixels, LandedImage, StepPlan, StepResult

PLACEHOLDER = 9


class World:
    """A scheduler whose steps end at once. `asked`: images that encoders have, by name; an image
    lands at a place that nobody else has.
    """

    def __init__(self, room: int = 40, pages: int = 64, **config: Any) -> None:
        values = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "page_size": 4} | config
        values |= {"encoder_budget": 8, "image_cache_tokens": room, "encoder_workers": 1}
        made = EngineConfig(model=".", **values)
        self.images = ImageCache(made)
        self.scheduler = Scheduler(made, pages, 200, (), images=self.images)
        self.asked: dict[str, int] = {}  # number
        self.cancelled: list[int] = []
        self.released: list[int] = []
        self.finished: set[Sequence] = set()
        self.num_landed = self.num_added = 0

    def add(self, *parts: int | tuple[str, int], max_tokens: int = 1, **params: Any) -> Sequence:
        """A prompt of so many tokens of a text of its own, or of images of (name, tokens)."""
        prompt: list[int] = []
        images = []
        self.num_added += 1
        for part in parts:
            if isinstance(part, int):
                prompt += [PLACEHOLDER + self.num_added] * part
                continue
            name, size = part
            pixels = name.encode() * 3 * size
            digest = name.encode() * 16
            images.append(Image(digest, len(prompt), 1, size, size, 1, size, pixels))
            prompt += [PLACEHOLDER] * size
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **params)
        sequence = Sequence((b"", 0), prompt, sampling, 0, images=tuple(images))
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> StepPlan | None:
        plan = self.scheduler.schedule()
        self._order()
        if plan is not None:
            rows = len(plan.decode_slots) + sum(chunk.samples for chunk in plan.chunks)
            committed = self.scheduler.commit(StepResult(plan.step, [5] * rows))
            self.finished |= {sequence for sequence, _ in committed.finished}
            self._order()
        self.scheduler.check_integrity()
        return plan

    def rest(self) -> list[StepPlan]:
        """Until nothing can run; returns the plans."""
        plans = []
        while (plan := self.step()) is not None:
            plans.append(plan)
        return plans

    def _order(self) -> None:
        orders = self.images.take_orders()
        self.asked |= {name_of(image): image.number for image in orders.encode}
        self.cancelled += orders.cancel
        self.released += orders.release

    def land(self, *names: str) -> None:
        for name in names:
            self.images.landed(self.asked.pop(name), self.num_landed)
            self.num_landed += 1


def name_of(image: ImagePixels) -> str:
    return chr(image.pixels[0])


def test_images_are_asked_for_in_the_order_of_turns() -> None:
    world = World(room=40)  # an image has 10 tokens at most, encoders have 20
    world.add(3, ("a", 8), ("b", 6))
    world.add(2, ("c", 4), max_tokens=2)
    world.add(("d", 8), 1)
    world.rest()
    assert list(world.asked) == ["a", "b", "c"]  # d would be too much for the landing
    world.land("b")
    world.rest()
    assert list(world.asked) == ["a", "c", "d"]
    first = world.add(("e", 4), 1, priority=-1)
    world.rest()
    assert list(world.asked) == ["a", "c", "d"]
    world.land("c")
    world.rest()
    assert list(world.asked) == ["a", "d", "e"] and first not in world.finished
    world.land("a", "e", "d")
    world.rest()
    assert len(world.finished) == 4 and len(world.released) == 5 and not world.cancelled


def test_a_place_is_free_once_the_plan_that_fetches_is_done() -> None:
    world = World()
    world.add(("a", 4), 2)
    world.rest()
    world.land("a")
    plan = world.scheduler.schedule()
    assert plan is not None and plan.arrived == [LandedImage(0, 0, 4)]
    world._order()
    assert not world.released
    world.scheduler.commit(StepResult(plan.step, [5]))
    world._order()
    assert world.released == [0]


def test_what_lands_is_fetched_though_nothing_can_run() -> None:
    """Else it would take the room of the image that comes first."""
    world = World()
    world.add(("a", 10), ("b", 10), ("c", 4))
    world.rest()
    assert list(world.asked) == ["a", "b"]
    world.land("b")
    (plan,) = world.rest()
    assert [image.number for image in plan.arrived] == [1] and not plan.chunks and not plan.new
    assert world.released == [0] and list(world.asked) == ["a", "c"]


def test_a_sequence_waits_without_pages_and_others_pass_it() -> None:
    world = World()
    waiting = world.add(("a", 4), 2)
    text = world.add(20)
    world.rest()
    assert world.finished == {text} and world.scheduler.stats().kv_usage == 0
    other = world.add(("b", 4), 2)
    world.rest()
    world.land("b")
    world.rest()
    assert world.finished == {text, other} and waiting.slot == -1
    assert world.scheduler.stats().images_waiting == 1


def test_who_passes_others_never_waits() -> None:
    world = World()
    world.add(("a", 8), 1)
    passing = world.add(4, ("b", 4), 2)
    world.rest()
    assert passing.slot == -1
    world.land("b")
    world.rest()
    assert world.finished == {passing}


@pytest.mark.parametrize("part", [3, ("b", 2)])
def test_a_long_queue_costs_a_step_little(
    part: int | tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step orders few of those that wait; a text far behind is found all the same."""
    world = World(max_num_seqs=2, max_num_batched_tokens=4)
    for number in range(400):
        world.add(part, tenant=f"t{number % 3}")
    text = world.add(4)
    num_ordered = 0
    order = Waiting._order

    def counted(*arguments: Any) -> Any:
        nonlocal num_ordered
        num_ordered += 1
        return order(*arguments)

    monkeypatch.setattr(Waiting, "_order", counted)
    assert world.scheduler.schedule() is not None
    assert num_ordered < 300
    assert (text.slot == -1) == isinstance(part, int)


def test_a_prefix_is_looked_up_once_until_pages_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether to ask for images, to begin, or to pass others."""
    world = World(pages=200, room=100)
    running = world.add(8, 1, max_tokens=40)
    world.step()
    waiting = []
    for number in range(5):
        world.num_added = 0  # the same text again, which is cached
        waiting.append(world.add(8, (chr(97 + number), 2), 1))
    world.step()
    looked_up: list[Pages] = []
    look_up = Pages._look_up

    def counted(pages: Pages, tokens: list[int]) -> CachedPrefix:
        looked_up.append(pages)
        return look_up(pages, tokens)

    monkeypatch.setattr(Pages, "_look_up", counted)
    counts = []
    for _ in range(12):
        looked_up.clear()
        assert world.step() is not None
        counts.append(len(looked_up))
    # The running sequence fills a page in every fourth step.
    assert sorted(counts) == [0] * 9 + [len(waiting)] * 3
    assert running.slot != -1 and all(sequence.slot == -1 for sequence in waiting)


def test_nobody_with_images_passes_one_that_lacks_room_in_the_cache() -> None:
    """They could keep the room in use for ever. Texts pass it."""
    world = World(room=18, max_num_seqs=4, max_num_batched_tokens=6)
    world.add(("d", 2), 1)
    world.rest()
    world.land("d")
    world.rest()
    within = world.add(("b", 8), 1)
    world.rest()
    world.land("b")
    assert world.step() is not None and within.planned == 6
    world.add(("a", 8), 1)
    world.add(("c", 8), 1)
    ready = world.add(("d", 2), 1)
    text = world.add(3)
    plan = world.step()
    assert plan is not None and list(world.asked) == ["a"]
    assert (ready.slot, text.planned, text.slot) == (-1, 3, -1)
    world.rest()
    assert world.finished >= {within, text} and list(world.asked) == ["a", "c"]
    world.land("a", "c")  # for which d was forgotten
    world.rest()
    world.land("d")
    world.rest()
    assert ready in world.finished and not world.scheduler.has_work


def test_those_that_wait_with_pages_leave_half_of_them_to_others() -> None:
    world = World(pages=16)
    early = [world.add(4, (name, 4), 4) for name in "abc"]  # three pages each
    world.rest()
    assert [sequence.planned for sequence in early] == [4, 4, 0]
    text = world.add(39)
    world.rest()
    assert world.finished == {text}


def test_those_that_wait_with_pages_give_them_to_one_that_need_not() -> None:
    """Only if nothing else runs. They go on once all their images are there."""
    world = World(pages=16, enable_prefix_caching=False)
    early = [world.add(4, (name, 4), 4) for name in "ab"]
    world.rest()
    text = world.add(45, max_tokens=2)  # twelve pages
    world.rest()
    assert world.finished == {text}
    assert world.scheduler.stats().preemptions == 1
    assert [sequence.planned for sequence in early] == [4, 0]
    world.land("b", "a")
    world.rest()
    assert world.finished == {text, *early}


def test_one_at_a_time_has_more_images_than_the_cache_holds() -> None:
    world = World(room=10)
    one, other = [world.add(1, (a, 8), 1, (b, 8), 1) for a, b in ("ab", "cd")]
    world.rest()
    assert one.planned == 1 and other.slot == -1
    for name in "abcd":
        world.land(name)
        world.rest()
    assert world.finished == {one, other}


def test_more_images_than_the_cache_holds() -> None:
    """The sequence goes on image by image, and lets nobody take the room."""
    world = World(room=10)
    large = world.add(1, ("a", 8), 1, ("b", 8), 1, ("c", 8), 1)
    later = [world.add(2, (name, 4), 1) for name in "def"]
    for name in "abc":
        world.rest()
        assert [*world.asked][0] == name
        world.land(name)
    world.rest()
    assert large in world.finished
    for name in "def":
        world.land(name)
        world.rest()
    assert world.finished == {large, *later}


def test_an_image_first_needed_gets_the_room_of_later_ones() -> None:
    world = World(room=16)  # for two images of 8
    later = world.add(("a", 8), 1, ("b", 8), 1)
    world.rest()
    world.land("b")
    world.rest()
    first = world.add(("c", 8), 1, priority=-1)
    world.rest()
    assert list(world.asked) == ["a", "c"]
    world.land("c")
    (plan,) = world.rest()
    assert world.finished == {first} and plan.forget == [1]
    assert list(world.asked) == ["a", "b"]
    world.land("a", "b")
    world.rest()
    assert world.finished == {first, later}


def test_what_nobody_needs_is_cancelled() -> None:
    world = World()
    one, other = world.add(("a", 4), 2), world.add(("a", 4), 3)
    world.rest()
    world.scheduler.abort(one)
    world.step()
    assert not world.cancelled
    number = world.asked["a"]
    world.scheduler.abort(other)
    world.step()
    assert world.cancelled == [number]
    world.images.landed(number, 7)  # too late
    world.step()
    assert world.released == [7]
    world.add(("a", 4), 2)
    world.rest()
    assert world.asked["a"] == number + 1


def test_an_image_that_cannot_be_encoded_ends_those_that_need_it() -> None:
    world = World()
    both = [world.add(2, ("a", 4)), world.add(2, ("b", 4), ("a", 4))]
    good = world.add(2, ("b", 4))
    world.rest()
    assert set(world.scheduler.not_landed(world.asked.pop("a"))) == set(both)
    world.step()
    assert not world.scheduler.not_landed(99)
    world.land("b")
    world.rest()
    assert world.finished == {good}
    world.add(2, ("a", 4))
    world.rest()
    assert [*world.asked] == ["a"]


def test_a_cached_prefix_needs_no_image() -> None:
    world = World(room=10)
    world.add(1, ("a", 7), 4)
    world.rest()
    world.land("a")
    world.rest()
    world.add(("b", 8), 1)
    world.rest()
    world.land("b")
    world.rest()  # a is forgotten
    world.num_added = 0  # the first text again
    again = world.add(1, ("a", 7), 4)
    world.rest()
    assert again in world.finished and not world.asked


def test_after_a_failed_step_images_are_asked_for_again() -> None:
    world = World()
    world.add(("a", 4), ("b", 4), ("c", 4))
    world.rest()
    world.land("a", "b")
    plan = world.scheduler.schedule()
    assert plan is not None and len(plan.arrived) == 2
    world.scheduler.reset()
    world.step()
    assert (world.cancelled, world.released) == ([2], [0, 1])
    world.add(("a", 4), 1)
    world.rest()
    assert world.asked["a"] == 3
    world.land("a")
    (plan,) = world.rest()
    assert sorted(plan.forget) == [0, 1]


def test_hits_and_encoded_images_are_counted() -> None:
    world = World(enable_prefix_caching=False)
    for salt in ("", "", "x"):
        world.add(1, ("a", 4), 1, ("b", 4), 1, cache_salt=salt)
        world.rest()
        world.land(*world.asked)
        world.rest()
    stats = world.scheduler.stats()
    assert (stats.images_encoded, stats.image_hits, stats.images_waiting) == (4, 2, 0)


def test_the_check_can_fail() -> None:
    world = World()
    world.add(("a", 4), 2)
    world.rest()
    world.images._landing += 1
    with pytest.raises(IntegrityError, match="Encoders have 4 tokens, 5 counted"):
        world.scheduler.check_integrity()
    world.images._landing -= 1
    world.images._users.clear()
    with pytest.raises(IntegrityError, match="that need an image are miscounted"):
        world.scheduler.check_integrity()

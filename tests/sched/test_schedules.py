"""Random schedules against the mock runner: whatever happens, every sequence gets its tokens."""

from __future__ import annotations

import random
import time
from collections import deque

import msgspec
import pytest
from fake_encoders import FakeEncoders
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from paged_mock import EOS, VOCAB, PagedMock, history_of, odd_or_even, reference

from gllm_engine.arch import CacheGroup
from gllm_engine.config import EngineConfig
from gllm_engine.sampling import SamplingParams
from gllm_engine.sched import ImageCache, Refused, Scheduler, Sequence
from gllm_engine.sched.pages import capacity, make_groups
from gllm_engine.sched.policy import POLICIES, Budget, Load, Policy
from gllm_engine.types import Finish, Image, StepResult
from gllm_engine.workers.encoders import Landed

MODEL_LEN = 48
MAX_WAITING = 8
STEMS = ([2, 3, 4, 5] * 12, [7] * 48, [*range(2, 20), *range(2, 20), *range(2, 14)])


# Byte that its pixels are, rows, columns, stride. The first two differ in nothing else.
PICTURES = ((1, 2, 3, 3), (2, 2, 3, 3), (3, 1, 1, 1), (4, 3, 2, 3), (5, 2, 5, 5))
PLACEHOLDER = VOCAB - 1
BREAK = VOCAB - 2


def with_images(text: list[int], pictures: list[int]) -> tuple[list[int], tuple[Image, ...]]:
    """The text with an image after every third token, while there are any left."""
    prompt: list[int] = []
    images = []
    for place, picture in enumerate(pictures):
        prompt += text[3 * place : 3 * place + 3]
        byte, rows, columns, stride = PICTURES[picture]
        pixels = bytes([byte]) * (3 * rows * columns)
        digest = bytes([byte]) * 16
        images.append(Image(digest, len(prompt), rows, columns, stride, rows, columns, pixels))
        line = [PLACEHOLDER] * columns + [BREAK] * (stride - columns)
        prompt += (line * rows)[: (rows - 1) * stride + columns]
    return prompt + text[3 * len(pictures) :], tuple(images)


def shares(load: Load) -> Budget:
    """Half of the decodes, half of the prefill tokens: plans take turns."""
    return Budget((load.num_decoding + 1) // 2, (load.max_tokens + 1) // 2)


ANY_POLICY = [*POLICIES.values(), shares]
# A group without layers keeps token ids only, and is there if no other one keeps all tokens.
ANY_GROUPS = [
    (CacheGroup(),),
    (CacheGroup(None), CacheGroup(5)),
    (CacheGroup(1), CacheGroup(None), CacheGroup(1)),
    (CacheGroup(11), CacheGroup(None, ())),
    (CacheGroup(3), CacheGroup(16), CacheGroup(None, ())),
]


class World:
    """A scheduler, a runner that checks every plan, and what came of each sequence."""

    def __init__(
        self,
        page_size: int,
        num_pages: int,
        num_slots: int,
        extra_tokens: int,
        caching: bool,
        depth: int,
        policy: Policy,
        groups: tuple[CacheGroup, ...] = (CacheGroup(),),
        num_snapshots: int | None = None,
        tenants: bool = True,
        encoder_budget: int = 6,
        image_cache_tokens: int = 12,
        encoders: bool = False,
    ) -> None:
        """`tenants`: whether requests have tenants; otherwise the order is that of arrival."""
        config = EngineConfig(
            model=".",
            max_num_seqs=num_slots,
            max_num_batched_tokens=num_slots + extra_tokens,
            max_waiting=MAX_WAITING,
            page_size=page_size,
            enable_prefix_caching=caching,
            plans_in_flight=depth,
            prefill_drain_steps=3,
            min_prefill_tokens=2,
            tenant_weights={"a": 2.5},
            encoder_budget=encoder_budget,
            image_cache_tokens=image_cache_tokens,
            encoder_workers=int(encoders),
        )
        self.scheduler_config = config
        self.encoders: FakeEncoders | None = None
        if encoders:
            self.encoders = FakeEncoders(
                config.landing_tokens,
                lambda image: len(image.pixels) // 3,
                lambda place, image: self.runner.landing.update({place: image.pixels}),
            )
        self.tenants = tenants
        own = make_groups(groups, config, num_pages)
        self.images = ImageCache(config, num_positions=MODEL_LEN)
        self.scheduler = Scheduler(
            config, num_pages, MODEL_LEN, EOS, policy, own, num_snapshots, self.images
        )
        self.runner = PagedMock(config, num_pages, groups, num_snapshots)
        self.capacity = capacity(own, MODEL_LEN)
        self.depth = depth
        self.results: deque[StepResult] = deque()  # of plans in flight
        self.sequences: list[Sequence] = []
        self.output: dict[Sequence, list[int]] = {}
        self.prompt_logprobs: dict[Sequence, list[float]] = {}
        self.finished: dict[Sequence, Finish] = {}
        self.aborted: set[Sequence] = set()

    def add(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        constrained: bool,
        images: tuple[Image, ...] = (),
    ) -> None:
        number = len(self.sequences)
        constraint = odd_or_even if constrained and not images else None
        if not self.tenants:
            sampling = msgspec.structs.replace(sampling, tenant="")
        sequence = Sequence((b"", number), prompt, sampling, number, constraint, images)
        own = self.scheduler.waiting_of(sampling.tenant).sequences
        full = own >= MAX_WAITING - (self.scheduler.stats().waiting - own) // 2
        needs = len(prompt) + (sampling.max_tokens != 1)  # as far as anyone can know now
        fits = 0 < len(prompt) < MODEL_LEN and min(needs, MODEL_LEN - 1) <= self.capacity
        most = self.scheduler_config.largest_image
        fits = fits and all(image.rows * image.columns <= most for image in images)
        try:
            self.scheduler.add(sequence)
        except Refused as refused:
            assert refused.status == ("unavailable" if fits else "invalid")
            assert full or not fits
            return
        assert fits and not full
        self.sequences.append(sequence)
        self.output[sequence] = []
        self.prompt_logprobs[sequence] = []

    def abort(self, choice: int) -> None:
        if self.sequences:
            sequence = self.sequences[choice % len(self.sequences)]
            self.scheduler.abort(sequence)
            if sequence not in self.finished:
                self.aborted.add(sequence)

    def plan(self) -> None:
        if len(self.results) < self.depth:
            plan = self.scheduler.schedule()
            self.order_images()
            if plan is not None:
                self.runner.put_images(self.scheduler.to_encode)
                self.results.append(self.runner.run(plan))

    def order_images(self) -> None:
        orders = self.images.take_orders()
        if self.encoders is None:
            assert orders == ([], [], [])
            return
        for number in orders.cancel:
            self.encoders.cancel(number)
        self.encoders.release(orders.release)
        for image in orders.encode:
            self.encoders.submit(image)

    def land(self, choice: int, fails: bool = False) -> None:
        if self.encoders is None:
            return
        if fails:
            self.encoders.fail(choice)
        else:
            self.encoders.land(choice)
        for event in self.encoders.poll():
            if isinstance(event, Landed):
                self.images.landed(event.number, event.place)
                continue
            ended = self.scheduler.not_landed(event.number)
            assert all(sequence.images for sequence in ended)
            self.aborted.update(ended)

    def commit(self) -> None:
        if not self.results:
            return
        committed = self.scheduler.commit(self.results.popleft())
        scored = dict(committed.logprobs)
        assert len({sequence for sequence, _ in committed.tokens}) == len(committed.tokens)
        for sequence, token in committed.tokens:
            assert sequence not in self.aborted and sequence not in self.finished
            if sequence.sampling.logprobs is not None:
                assert scored.pop(sequence).token_ids == [token]
            self.output[sequence].append(token)
        assert not scored
        first = {sequence for sequence, _ in committed.tokens if len(self.output[sequence]) == 1}
        assert first == set(committed.begun) and len(first) == len(committed.begun)
        for sequence in committed.begun:
            assert 0 < sequence.admitted_at < time.monotonic()
            assert 0 <= sequence.num_cached_tokens < sequence.prompt_len
            if sequence.sampling.prompt_logprobs is not None:
                assert sequence.num_cached_tokens == 0
        for sequence, entries in committed.prompt_logprobs:
            assert sequence not in self.aborted
            self.prompt_logprobs[sequence] += [entry.logprobs[0] for entry in entries]
        for sequence, finish in committed.finished:
            assert sequence not in self.aborted and sequence not in self.finished
            self.finished[sequence] = finish
            self.check_finished(sequence, finish)

    def turn(self) -> None:
        self.plan()
        if len(self.results) == self.depth:
            self.commit()

    def fail(self) -> None:
        """A step failed: everything is dropped, and the engine goes on with an empty cache."""
        dropped = self.scheduler.reset()
        live = [s for s in self.sequences if s not in self.finished and s not in self.aborted]
        assert sorted(s.key for s in dropped) == [s.key for s in live]
        self.aborted.update(dropped)
        self.results.clear()
        self.runner.cells.clear()
        self.order_images()
        assert not self.scheduler.has_work

    def check_finished(self, sequence: Sequence, finish: Finish) -> None:
        tokens, reason = reference(
            history_of(sequence.tokens[: sequence.prompt_len], sequence.images),
            sequence.sampling,
            sequence.seed,
            sequence.constraint,
            max_model_len=MODEL_LEN,
            capacity=self.capacity,
        )
        assert self.output[sequence] == tokens
        assert finish.reason == reason
        assert finish.stop_token == (tokens[-1] if reason == "stop" else None)
        assert (finish.status is not None) == (reason == "error") == bool(finish.message)
        if sequence.sampling.prompt_logprobs is not None:
            positions = range(1, sequence.prompt_len)
            assert self.prompt_logprobs[sequence] == [-float(p) for p in positions]

    def check(self) -> None:
        self.scheduler.check_integrity()
        elsewhere = {*self.images._asked, *self.images._landed}
        there = {h.number for h in self.images._held.values()} - elsewhere
        # A lost plan may have run: then the next one forgets what is gone already.
        assert there <= self.runner.embeddings.keys() <= there | {*self.images._forgotten}
        assert self.scheduler.num_in_flight == len(self.results)
        if not self.tenants and self.encoders is None:
            live = [s for s in self.sequences if s.queue is not None]
            assert sorted(live) == sorted(live, key=lambda s: (s.sampling.priority, s.key))

    def drain(self) -> None:
        turns = 0
        while self.scheduler.has_work:
            self.plan()
            if not self.results and self.encoders is not None:
                self.check_that_images_alone_wait()
                assert self.encoders.busy, "images are awaited that no encoder has"
                self.land(turns)
                continue
            assert self.results, "there is work, but nothing is planned and nothing in flight"
            if len(self.results) == self.depth or turns % 3 == 0:
                self.commit()
            turns += 1
            assert turns < 5000, "livelock"
        self.check()
        assert self.scheduler.schedule() is None
        stats = self.scheduler.stats()
        assert (stats.running, stats.waiting, stats.kv_usage) == (0, 0, 0.0)
        assert stats.images_waiting == 0
        if self.encoders is not None:
            self.order_images()
            assert self.encoders.is_idle
        assert len(self.finished) + len(self.aborted) == len(self.sequences)
        counted = [t.prefill_tokens + t.decode_tokens for t in stats.tenants.values()]
        assert sum(counted) == self.runner.num_computed

    def check_that_images_alone_wait(self) -> None:
        """Nothing runs: every live sequence has an image that an encoder has to encode.

        But one with more images than the cache holds goes on when it has pages, and one that waits
        for room in the cache lets only those pass that need none.
        """
        live = [s for s in self.sequences if s.queue is not None]
        if all(self.images.fits(s) for s in live):
            for s in live:
                waits = self.images.ready_len(s, s.planned) < s.prefill_len
                assert waits or s.images and self.images.lacks_room


class Schedules(RuleBasedStateMachine):
    """Short schedules that hypothesis chooses, and shrinks when one fails."""

    world: World | None = None

    @initialize(
        page_size=st.sampled_from([1, 2, 4, 8]),
        num_pages=st.integers(1, 20),
        num_slots=st.integers(1, 5),
        extra_tokens=st.integers(0, 20),
        caching=st.booleans(),
        depth=st.integers(1, 4),
        policy=st.sampled_from(ANY_POLICY),
        groups=st.sampled_from(ANY_GROUPS),
        num_snapshots=st.sampled_from([None, None, 0, 1, 2, 5, 20]),
        tenants=st.booleans(),
        encoder_budget=st.sampled_from([1, 6, 30]),
        image_cache_tokens=st.sampled_from([10, 14, 40]),
        encoders=st.booleans(),
    )
    def begin(self, **setup: object) -> None:
        self.world = World(**setup)

    @rule(
        stem=st.sampled_from(STEMS),
        shared=st.integers(0, 40),
        own=st.lists(st.integers(2, VOCAB - 1), max_size=6),
        constrained=st.sampled_from([False, False, True]),
        pictures=st.lists(st.integers(0, len(PICTURES) - 1), max_size=3),
        sampling=st.builds(
            SamplingParams,
            max_tokens=st.one_of(st.none(), st.integers(1, 30)),
            ignore_eos=st.sampled_from([True, True, False]),  # EOS is 2 of 24 tokens
            stop_token_ids=st.sampled_from([(), (), (9,), (0, 5)]),
            priority=st.sampled_from([0, 0, 0, -1, 1]),
            cache_salt=st.sampled_from(["", "", "other"]),
            tenant=st.sampled_from(["", "a", "b", "c"]),
            presence_penalty=st.sampled_from([0.0, 0.5]),
            logprobs=st.sampled_from([None, 0]),
            prompt_logprobs=st.sampled_from([None, None, None, 0]),
        ),
    )
    def add(
        self,
        stem: list[int],
        shared: int,
        own: list[int],
        constrained: bool,
        pictures: list[int],
        sampling: SamplingParams,
    ) -> None:
        prompt, images = with_images(stem[:shared] + own, pictures)
        self.world.add(prompt, sampling, constrained, images)

    @rule(choice=st.integers(0, 1000))
    def abort(self, choice: int) -> None:
        self.world.abort(choice)

    @rule()
    def plan(self) -> None:
        self.world.plan()

    @rule()
    def commit(self) -> None:
        self.world.commit()

    @rule()
    def turns(self) -> None:
        for _ in range(6):
            self.world.turn()

    @rule(choice=st.integers(0, 9), fails=st.sampled_from([False, False, False, True]))
    def land(self, choice: int, fails: bool) -> None:
        self.world.land(choice, fails)

    @rule(luck=st.integers(0, 30))
    def fail(self, luck: int) -> None:
        if luck == 13:  # rarely, or no sequence would get far
            self.world.fail()

    @invariant()
    def integrity(self) -> None:
        if self.world is not None:
            self.world.check()

    def teardown(self) -> None:
        if self.world is not None:
            self.world.drain()


Schedules.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
TestSchedules = Schedules.TestCase


@pytest.mark.parametrize("seed", range(60))
def test_long_schedules(seed: int) -> None:
    """Long ones under load, where sequences are preempted again and again."""
    rng = random.Random(seed)
    world = World(
        page_size=rng.choice([1, 2, 4, 8]),
        num_pages=rng.choice([6, 10, 16, 30, 50]),
        num_slots=rng.randint(1, 6),
        extra_tokens=rng.choice([0, 4, 30]),
        caching=rng.random() < 0.7,
        depth=rng.randint(1, 4),
        policy=rng.choice(ANY_POLICY),
        groups=rng.choice(ANY_GROUPS),
        num_snapshots=rng.choice([None, 1, 3, 10, 30]),
        tenants=rng.random() < 0.5,
        encoder_budget=rng.choice([1, 6, 30]),
        image_cache_tokens=rng.choice([10, 14, 40]),
        encoders=rng.random() < 0.5,
    )
    aborts = rng.choice([0, 0.01, 0.05])
    for _ in range(rng.randint(100, 250)):
        draw = rng.random()
        if draw < 0.3:
            own = [rng.randrange(2, VOCAB) for _ in range(rng.randint(0, 6))]
            sampling = SamplingParams(
                max_tokens=rng.choice([None, 3, 8, 20, 40]),
                ignore_eos=rng.random() < 0.8,
                stop_token_ids=rng.choice([(), (), (9,)]),
                priority=rng.choice([0, 0, 0, -1, 1]),
                cache_salt=rng.choice(["", "", "", "other"]),
                tenant=rng.choice(["", "a", "b", "c"]),
                repetition_penalty=rng.choice([1.0, 1.2]),
                logprobs=rng.choice([None, 0]),
                prompt_logprobs=rng.choice([None, None, None, 0]),
            )
            prompt = rng.choice(STEMS)[: rng.randint(0, 30)] + own
            pictures = [rng.choice([0, 1, 0, 1, 2, 3, 4]) for _ in range(rng.choice([0, 0, 1, 2]))]
            prompt, images = with_images(prompt, pictures)
            world.add(prompt, sampling, rng.random() < 0.2, images)
        elif draw < 0.3 + aborts:
            world.abort(rng.randrange(1000))
        elif draw < 0.352:
            if draw > 0.35:
                world.fail()
        elif draw < 0.42:
            world.land(rng.randrange(10), rng.random() < 0.1)
        elif draw < 0.7:
            world.plan()
        else:
            world.commit()
        world.check()
    world.drain()

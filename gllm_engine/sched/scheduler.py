"""Continuous batching: makes the plan of each step and processes the step's result.

This module owns every live sequence, its slot and its pages. It knows nothing of text, clients,
tensors or how a step runs. It relies on steps running one after another, in the order planned.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import accumulate, chain, islice
from operator import attrgetter
from typing import NamedTuple

from gllm_engine.arch import CacheGroup
from gllm_engine.config import EngineConfig
from gllm_engine.sched.cost import Fit, Work
from gllm_engine.sched.forecast import Outputs, growth
from gllm_engine.sched.images import ImageCache
from gllm_engine.sched.pages import (
    CachedPrefix,
    Group,
    IntegrityError,
    PagePool,
    Pages,
    capacity,
    make_groups,
)
from gllm_engine.sched.policy import POLICIES, Budget, Load, Policy
from gllm_engine.sched.rotary import RotaryPositions
from gllm_engine.sched.sequence import NO_SLOT, Queue, Sequence
from gllm_engine.sched.snapshots import SnapshotKind, SnapshotPool
from gllm_engine.sched.tenants import Amount, Room, Waiting
from gllm_engine.types import (
    NO_SNAPSHOT,
    Chunk,
    Finish,
    ImagePixels,
    NewPages,
    NewSequence,
    Stats,
    Status,
    StepPlan,
    StepResult,
    TokenLogprobs,
)

# Of so many waiting sequences encoders get the images ahead. To order all of them takes longer than
# a step.
_IMAGES_AHEAD = 64
# A step takes all ready decodes if they exceed the decode budget by at most this fraction of it.
LEEWAY = 1 / 16

_PLANNED_BY = attrgetter("planned_by")


class Refused(Exception):
    """The scheduler refuses a sequence; `message` is a sentence for the user."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass(frozen=True, slots=True)
class Committed:
    """The outputs of one step for the sequences that are still live."""

    tokens: list[tuple[Sequence, int]] = field(default_factory=list)
    finished: list[tuple[Sequence, Finish]] = field(default_factory=list)
    logprobs: list[tuple[Sequence, TokenLogprobs]] = field(default_factory=list)
    # Consecutive prompt positions, from 1 on. Each position is reported once.
    prompt_logprobs: list[tuple[Sequence, list[TokenLogprobs]]] = field(default_factory=list)
    # Sequences that got their first token.
    begun: list[Sequence] = field(default_factory=list)


@dataclass(slots=True)
class _Draft:
    """A plan in the making, and the owners of its decode rows and chunks."""

    plan: StepPlan  # whose decode_slots come last
    decodes: list[Sequence] = field(default_factory=list)
    chunked: list[Sequence] = field(default_factory=list)
    cut: set[Sequence] = field(default_factory=set)  # their chunks end where others may go on
    copied: list[int] = field(default_factory=list)  # snapshots that nobody holds after this plan
    work: Work | None = None  # set if the policy bounds seconds


class _Flight(NamedTuple):
    """A plan in flight.

    It records the owners of its rows, because a slot may have a new owner when the result arrives.
    """

    plan: StepPlan
    sampling: list[Sequence]  # owners of the rows that sample, in the order of rows
    chunked: list[Sequence]  # owners of plan.chunks
    work: Work | None


class Scheduler:
    """schedule() returns the next plan; commit() takes each result, in the order of the plans.

    Any number of plans may be in flight. Running sequences are in `_prefilling` or `_decoding`;
    they hold a slot, and pages for all their planned tokens. Between calls every live sequence is
    in one of these two queues or in its tenant's queue in `_waiting`. A sequence in no queue has
    ended, so its results in flight are dropped.
    """

    def __init__(
        self,
        config: EngineConfig,
        num_pages: int,
        max_model_len: int,
        eos_token_ids: tuple[int, ...],
        policy: Policy | None = None,
        groups: tuple[Group, ...] | None = None,
        num_snapshots: int | None = None,
        images: ImageCache | None = None,
    ) -> None:
        """`policy`: overrides the policy that the configuration names.

        `groups`: from make_groups; None: one group of `num_pages` pages. `num_snapshots`: of the
        states of layers that keep one per sequence; None: the model has no such layers. `images`:
        None: no sequence has images.
        """
        self._groups = groups or make_groups((CacheGroup(),), config, num_pages)
        self._pools: list[PagePool] = list(dict.fromkeys(group.pool for group in self._groups))
        self._pool = self._groups[0].pool
        self._snapshots: SnapshotPool | None = None
        if num_snapshots is not None and config.enable_prefix_caching:
            self._snapshots = SnapshotPool(num_snapshots, config.page_size)
            self._pools.append(self._snapshots)
        self._images = images
        self._num_whole = sum(g.window is None and g.pool is self._pool for g in self._groups)
        self._page_size = config.page_size
        self._capacity = capacity(self._groups, max_model_len)  # tokens
        self._max_model_len = max_model_len
        self._max_tokens = config.max_num_batched_tokens
        self._max_slots = config.max_num_seqs
        self._room = Room(config.max_waiting, config.max_waiting_tokens)
        self._eos_token_ids = eos_token_ids
        self._policy = policy or POLICIES[config.policy]
        self._fit = Fit()
        self._outputs = Outputs()
        self._in_prefill = False  # the latest plan has chunks
        self._stages = config.pipeline_parallel_size
        self._drain_steps = config.prefill_drain_steps
        self._min_prefill = config.min_prefill_tokens
        self._waiting = Waiting(config.tenant_weights)
        self._prefilling = Queue()
        self._decoding = Queue()
        self._backlog = 0  # sum over live sequences of Sequence.backlog
        self._context = 0  # sum over decoding sequences of Sequence.planned
        self._slots = list(range(config.max_num_seqs - 1, -1, -1))  # free ones
        self._flights: deque[_Flight] = deque()
        self._steps = self._preemptions = 0
        self._prefix_queries = self._prefix_stored = self._prefix_hits = 0
        self._snapshot_hits = Counter[SnapshotKind]()

    # ------------------------------------------------------------ sequences come and go

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. Raises Refused if the queue is full or the prompt never fits."""
        if sequence.rank[2]:
            raise ValueError(f"sequence {sequence.key!r} was added before")
        length = sequence.prompt_len
        sampling = sequence.sampling
        if not length:
            raise Refused("invalid", "prompt: it is empty, at least one token is needed")
        if length >= self._max_model_len:
            raise Refused(
                "invalid",
                f"prompt: its {length} tokens leave no room for output; prompt and output together "
                f"are limited to {self._max_model_len} tokens (max_model_len)",
            )
        sequence.rotary = self._rotary(sequence)
        wanted = self._wanted(sequence)
        if min(length + 1, wanted - 1) > self._capacity:  # the last token is never computed
            raise Refused(
                "invalid",
                f"prompt: its {length} tokens do not fit the KV cache, which holds "
                f"{self._capacity} tokens",
            )
        for image in sequence.images:
            if self._images is None or image.rows * image.columns > self._images.most:
                most = 0 if self._images is None else self._images.most
                raise Refused(
                    "invalid",
                    f"image: it takes {image.rows * image.columns} tokens, an image may take "
                    f"{most} (image_cache_tokens, encoder_budget)",
                )
        tenant = self._waiting.tenant(sampling.tenant)
        refusal = self._room.refusal(
            sampling.tenant, tenant.waiting, self._waiting.amount, Amount(1, length)
        )
        if refusal is not None:
            raise Refused("unavailable", refusal)
        sequence.limit = min(wanted, self._capacity + 1)
        eos = () if sampling.ignore_eos else self._eos_token_ids
        sequence.stops = frozenset(eos + sampling.stop_token_ids)
        salt = sampling.cache_salt
        sequence.pages = Pages(self._groups, salt, self._snapshots, sequence.images)
        sequence.commit_check = length + 1  # its first token
        self._waiting.join(sequence, tenant)
        self._backlog += length
        if self._images is not None:
            self._images.join(sequence)

    def waiting_of(self, tenant: str) -> Amount:
        """What a tenant has waiting."""
        return self._waiting.tenant(tenant).waiting

    def abort(self, sequence: Sequence) -> None:
        """End a sequence now. Does nothing for a sequence that has ended or was never added."""
        if sequence.queue is not None:
            self._remove(sequence)

    def reset(self) -> list[Sequence]:
        """End every sequence, forget plans in flight and the cache. Used after a failed step."""
        dropped = [*self._decoding, *self._prefilling, *self._waiting]
        for sequence in dropped:
            self._remove(sequence)
        for pool in self._pools:
            pool.forget()
        if self._images is not None:
            self._images.forget(flight.plan for flight in self._flights)
        self._flights.clear()
        return dropped

    def _rotary(self, sequence: Sequence) -> RotaryPositions | None:
        """See Sequence.rotary. Raises Refused if they leave no position for output."""
        if not sequence.images or self._images is None or not self._images.num_positions:
            return None
        rotary = RotaryPositions(sequence.prompt_len, sequence.images)
        after = sequence.prompt_len + rotary.offset
        if after >= self._images.num_positions:
            raise Refused(
                "invalid",
                f"video: after its times text goes on at position {after}, the checkpoint has "
                f"{self._images.num_positions} positions",
            )
        return rotary

    def _wanted(self, sequence: Sequence) -> int:
        """Prompt plus requested output tokens, limited by the model's length and positions."""
        most = self._max_model_len
        if sequence.rotary is not None and self._images is not None:
            most = min(most, self._images.num_positions - sequence.rotary.offset)
        max_tokens = sequence.sampling.max_tokens
        return most if max_tokens is None else min(sequence.prompt_len + max_tokens, most)

    def _remove(self, sequence: Sequence) -> None:
        """Remove a sequence from its queue and free its slot and pages for the next plan.

        Plans in flight may still write to those pages, but they run before any later plan.
        """
        assert sequence.queue is not None
        if self._images is not None and sequence.queue is not self._decoding:
            self._images.leave(sequence)
        if sequence.slot == NO_SLOT:
            self._waiting.take(sequence)
        else:
            if sequence.queue is self._decoding:
                self._context -= sequence.planned
                self._charge_decodes(sequence)
            sequence.queue.take(sequence)
            self._waiting.leave(sequence)
        self._backlog -= sequence.backlog
        self._release_rolling(sequence)
        sequence.pages.release()
        if sequence.slot != NO_SLOT:
            self._slots.append(sequence.slot)
            sequence.slot = NO_SLOT

    @staticmethod
    def _charge_decodes(sequence: Sequence) -> None:
        """Add the tokens of decode rows since the last call to the tenant's service."""
        sequence.tenant.decode += sequence.planned - sequence.charged
        sequence.charged = sequence.planned

    def _release_rolling(self, sequence: Sequence) -> None:
        """Make the snapshot that a sequence has written while it decoded findable by others."""
        snapshot = sequence.rolling
        if self._snapshots is None or snapshot == NO_SNAPSHOT:
            return
        # A plan in flight may have written it after a token that does not count any more.
        if sequence.rolling_len <= len(sequence.tokens):
            num_pages = sequence.rolling_len // self._page_size
            sequence.pages.publish_snapshot(snapshot, sequence.tokens, num_pages)
        self._snapshots.give_back([snapshot])
        sequence.rolling = NO_SNAPSHOT

    def _preempt(self, sequence: Sequence) -> None:
        """Return a sequence to the waiting queue, to be recomputed. Its tokens in flight count."""
        if self._images is not None:  # first, so that its images stay wanted
            self._images.join(sequence)
        self._remove(sequence)
        sequence.prefill_len = max(len(sequence.tokens), sequence.planned + 1)
        sequence.planned = sequence.plan_check = 0
        self._backlog += sequence.prefill_len
        self._waiting.put(sequence)
        self._preemptions += 1

    # ------------------------------------------------------------ plan

    def schedule(self) -> StepPlan | None:
        """The next step's plan; None if no step is possible before a commit or an add."""
        plan = StepPlan(self._steps + 1, [], [], [], [])
        draft = _Draft(plan)
        if self._images is not None:
            self._begin_images(self._images)
        preemptions = self._preemptions
        budget = self._policy(self._load())
        self._plan_decodes(draft, budget._replace(decodes=0) if budget.is_exclusive else budget)
        self._plan_chunks(draft, budget)
        if budget.is_exclusive and not plan.chunks:
            self._plan_decodes(draft, budget)
        fetches = self._images is not None and self._images.has_landed
        if not draft.decodes and not plan.chunks and not fetches:
            self._make_way()
            # Preempted sequences have freed pages, so another sequence can run now.
            return self.schedule() if self._preemptions > preemptions else None
        self._steps += 1
        self._in_prefill = bool(plan.chunks)
        if self._snapshots is not None:
            for snapshot in draft.copied:  # only now, so that each is the target of one copy
                self._snapshots.give_back([snapshot])
        if self._images is not None:
            self._images.finish(plan)
        plan.decode_slots.extend([sequence.slot for sequence in draft.decodes])
        sampling = draft.decodes + [s for s in draft.chunked if s.queue is self._decoding]
        self._flights.append(_Flight(plan, sampling, draft.chunked, draft.work))
        return plan

    def _begin_images(self, images: ImageCache) -> None:
        images.begin()
        if images.is_ahead:
            first = islice(self._waiting.in_order(), _IMAGES_AHEAD)
            waiting = ((s, self._num_cached(s)) for s in first if s.images)
            now = [(s, s.planned) for s in self._prefilling]
            images.ask(chain(now, waiting), self._prefilling)

    def _make_way(self) -> None:
        """If only sequences that wait for images have pages, preempt one for one that need not."""
        if self._flights or self._images is None or not self._images.is_ahead:
            return
        victims = [s for s in self._prefilling if self._images.fits(s)]
        if victims and self._next_waiting() is not None:
            self._preempt(victims[-1])

    def _load(self) -> Load:
        unplanned = sum(sequence.backlog for sequence in self._prefilling)  # usually one sequence
        waiting = every = self._backlog - unplanned
        if len(self._waiting) > len(self._slots):
            waiting = waiting * len(self._slots) // len(self._waiting)
        return Load(
            max_tokens=self._max_tokens,
            num_decoding=len(self._decoding),
            backlog=unplanned + waiting,
            num_free_pages=self._pool.num_free + self._num_whole * unplanned // self._page_size,
            num_reserved_pages=self._num_reserved,
            num_pages=self._pool.num_pages,
            step=self._steps,
            stages=self._stages,
            prefill_drain_steps=self._drain_steps,
            min_prefill_tokens=self._min_prefill,
            cost=self._fit.model,
            context=self._context,
            in_prefill=self._in_prefill,
            held_back=every - waiting,
            output_len=self._outputs.mean,
            growth=self._growth,
        )

    def _growth(self) -> float:
        """As Load.growth. The last page of each sequence is counted as full."""
        share = self._outputs.share
        page = self._page_size
        return growth((s.planned, share * (s.limit - s.planned) + page) for s in self._decoding)

    @property
    def _num_reserved(self) -> int:
        """Number of free pages that admission leaves to decoding sequences.

        A decoding sequence takes its next page within page_size steps. Without a spare page for
        each of them, a newly admitted sequence would soon be preempted and recomputed. 5 % of the
        pool is enough, and costs little if sequences are too short to need another page.
        """
        return min(len(self._decoding), self._pool.num_pages // 20)

    def _plan_decodes(self, draft: _Draft, budget: Budget) -> None:
        """Plan one token for each decoding sequence that has a token to compute, in order of rank.

        Preemption takes the running sequence of the lowest priority. The loop has not reached it
        yet, or it is not decoding, so its row is never in this plan already. A preemption shortens
        the queue at its end while the loop iterates over it.
        """
        decoding: list[Sequence] = self._decoding
        if self._stages > 1 or budget.decodes < len(decoding) or budget.decode_seconds is not None:
            decoding = self._next_to_decode(budget)
        append = draft.decodes.append
        step = self._steps + 1
        for sequence in decoding:
            planned = sequence.planned
            if planned == sequence.plan_check and not self._may_decode(draft, sequence):
                continue
            sequence.planned = planned + 1
            sequence.planned_by = step
            append(sequence)
        self._context += len(draft.decodes)
        if budget.decode_seconds is not None:
            context = sum([sequence.planned for sequence in draft.decodes])
            draft.work = Work(len(draft.decodes), context, context, len(draft.decodes))

    def _next_to_decode(self, budget: Budget) -> list[Sequence]:
        """The ready sequences that the budget allows, in order of rank.

        Sequences that were planned least recently are chosen first.
        """
        ready = self._ready()
        turns = sorted(ready, key=_PLANNED_BY)[: budget.decodes]
        if budget.decode_seconds is not None:
            turns = self._first_within(turns, budget.decode_seconds)
        chosen = set(turns)
        return ready if len(turns) == len(ready) else [s for s in ready if s in chosen]

    def _ready(self) -> list[Sequence]:
        """Decoding sequences whose last token is known, or will be before the first stage is idle.

        A token returns from the last stage after `stages` further steps. Fewer decoding sequences
        than stages leave stages idle anyway. Such sequences are planned before their tokens return,
        which saves the latency of the host, but only while no sequence waits or prefills, because
        these plans would delay it.
        """
        spread = self._stages
        decoding = self._decoding
        if not self._waiting and not self._prefilling:
            spread = min(spread, len(decoding))
        latest = self._steps + 1 - spread
        return [
            s
            for s in decoding
            if (ahead := s.planned - len(s.tokens)) < 0 or ahead == 0 and s.planned_by <= latest
        ]

    def _first_within(self, ready: list[Sequence], seconds: float) -> list[Sequence]:
        """The first sequences of `ready` whose predicted decode time fits `seconds`, at least one.

        Returns all of them if they exceed `seconds` by at most LEEWAY: a slightly longer step
        costs less than making a sequence wait for the next step.
        """
        cost = self._fit.model
        each = cost.context + cost.kv
        first = cost.token + cost.sequence + each
        planned = [s.planned for s in ready]
        if first * len(ready) + each * sum(planned) <= seconds * (1 + LEEWAY):
            return ready
        ends = list(accumulate([first + each * tokens for tokens in planned]))
        return ready[: max(1, bisect_right(ends, seconds))]

    def _may_decode(self, draft: _Draft, sequence: Sequence) -> bool:
        """Whether to decode the token at `planned`, which equals plan_check.

        Takes a page if the token begins a new page, and sets the next plan_check.
        """
        planned = sequence.planned
        last = sequence.limit - 1
        if planned == last or sequence.queue is not self._decoding:
            return False  # all its tokens are planned or it was just preempted
        constraint = sequence.constraint
        if constraint is not None and planned == len(sequence.tokens):
            return False  # the mask depends on a token in flight
        if planned % self._page_size == 0:
            self._charge_decodes(sequence)
            sequence.pages.drop_unneeded(planned)
            if not self._make_room(sequence):
                return False
            self._grow(draft, sequence, planned + 1)
            self._roll(draft, sequence)
        if constraint is None:
            sequence.plan_check = min(last, planned - planned % self._page_size + self._page_size)
        else:
            sequence.plan_check = planned + 1
            self._add_mask(draft, sequence)
        return True

    def _make_room(self, sequence: Sequence) -> bool:
        """Preempt sequences of the lowest priority until pages for the next token are free.

        Returns False if `sequence` itself was preempted. The running sequence of the highest
        priority is preempted last, and it fits the cache alone, so it always makes progress.
        """
        while not sequence.pages.can_grow(sequence.planned + 1):
            victim = max(q[-1] for q in (self._decoding, self._prefilling) if q)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    @staticmethod
    def _grow(draft: _Draft, sequence: Sequence, length: int) -> None:
        """Take pages for `length` tokens, and put them into the plan."""
        for group, first, pages in sequence.pages.grow(length):
            draft.plan.new_pages.append(NewPages(sequence.slot, first, pages, group))

    def _admit(self, draft: _Draft) -> bool:
        """Admit the next waiting sequence if a slot and enough pages are free; whether it was.

        The sequence gets pages for all its known tokens in groups without a window, so that its
        prefill does not run out of these. The reserved pages stay free.
        """
        reserve = self._num_reserved
        if not self._waiting or not self._slots or self._pool.num_free <= reserve:
            return False
        sequence = self._next_waiting()
        if sequence is None or len(sequence.tokens) < sequence.prefill_len:
            return False
        tokens = sequence.tokens
        pages = sequence.pages
        cached = self._find_cached(sequence)
        if not pages.fit(tokens, cached, reserve) or self._is_coming(sequence, cached):
            return False
        self._waiting.admit(sequence)
        self._prefilling.put(sequence)
        pages.open(tokens, cached)
        sequence.slot = self._slots.pop()
        sequence.planned = cached.num_pages * self._page_size
        self._backlog -= sequence.planned
        if sequence.num_cached_tokens < 0:
            sequence.num_cached_tokens = sequence.planned
            sequence.admitted_at = time.monotonic()
            if sequence.sampling.prompt_logprobs is None and self._pool.caching:
                self._count_hits(sequence, cached)
        snapshot = self._restore(sequence, cached)
        sampling = sequence.sampling
        eos = self._eos_token_ids if sampling.min_tokens else ()
        draft.plan.new.append(
            NewSequence(
                sequence.slot,
                sequence.seed,
                sequence.prompt_len,
                sampling,
                eos,
                snapshot,
                sequence.rotary.offset if sequence.rotary is not None else 0,
            )
        )
        for group, part in enumerate(pages.groups):
            if part.ids:
                draft.plan.new_pages.append(
                    NewPages(sequence.slot, part.first, list(part.ids), group)
                )
        return True

    def _find_cached(self, sequence: Sequence) -> CachedPrefix:
        if sequence.sampling.prompt_logprobs is not None:  # every position is computed
            return sequence.pages.nothing_cached()
        return sequence.pages.find_cached(sequence.tokens)

    def _num_cached(self, sequence: Sequence) -> int:
        """Tokens of the prefix that a waiting sequence need not compute."""
        return self._find_cached(sequence).num_pages * self._page_size

    def _next_waiting(self) -> Sequence | None:
        """The first waiting sequence that can begin now; others wait for encoders.

        Those pass it that wait for none. While one lacks room in the cache of images, they are
        those without images: others could take the room for ever.
        """
        images = self._images
        if images is None or not images.is_ahead:
            return self._waiting.first()
        for num_passed, sequence in enumerate(islice(self._waiting.in_order(), _IMAGES_AHEAD)):
            if not sequence.images:
                return sequence
            if not num_passed or not images.lacks_room:
                if self._may_begin(images, sequence, passes=num_passed > 0):
                    return sequence
        return self._waiting.first_text()

    def _may_begin(self, images: ImageCache, sequence: Sequence, passes: bool) -> bool:
        """Whether a sequence may begin, though it may have to wait for more images.

        A sequence that waits holds a slot and pages. So those that may wait leave half of them to
        others, and do so once; or they are the only one with images that the cache cannot hold.
        """
        start = self._num_cached(sequence)
        ready = images.ready_len(sequence, start)
        if ready == sequence.prefill_len:
            return True
        if ready == start or passes:
            return False
        if not images.fits(sequence):
            return all(map(images.fits, self._prefilling))
        is_first_time = sequence.num_cached_tokens < 0
        leaves_half = len(self._slots) * 2 > self._max_slots and sequence.pages.fit(
            sequence.tokens, self._find_cached(sequence), self._pool.num_pages // 2
        )
        return is_first_time and leaves_half

    def _is_coming(self, sequence: Sequence, cached: CachedPrefix) -> bool:
        """Whether the next plan copies a state that the sequence could begin from, but lacks now.

        So it is for all but the first of several sequences with one prompt.
        """
        if cached.num_stored == cached.num_pages:
            return False
        end = cached.num_stored * self._page_size
        digest = sequence.pages.digest(sequence.tokens, cached.num_stored)
        return any(
            end in other.snapshots_due
            and other.planned == end
            and other.pages.digest(other.tokens, cached.num_stored) == digest
            for other in self._prefilling
        )

    def _count_hits(self, sequence: Sequence, cached: CachedPrefix) -> None:
        self._prefix_queries += sequence.prompt_len
        self._prefix_stored += cached.num_stored * self._page_size
        self._prefix_hits += cached.num_pages * self._page_size
        if self._snapshots is not None and cached.snapshot is not None:
            self._snapshot_hits[self._snapshots.kinds[cached.snapshot]] += 1

    def _restore(self, sequence: Sequence, cached: CachedPrefix) -> int:
        """The snapshot from which a new sequence starts. Also decides where the state of its prompt
        is copied.

        A plan takes snapshots for copies before it restores any, and runs in the same order: what
        it restores, it does not overwrite.
        """
        if self._snapshots is None:
            return NO_SNAPSHOT
        last = (len(sequence.tokens) - 1) // self._page_size
        due: dict[int, SnapshotKind] = {cached.num_stored: "branch", last: "prompt"}
        sequence.snapshots_due = {
            num * self._page_size: kind for num, kind in due.items() if num > cached.num_pages
        }
        if cached.snapshot is None:
            return NO_SNAPSHOT
        self._snapshots.touch(cached.snapshot)
        return cached.snapshot

    def _snap(self, draft: _Draft, sequence: Sequence, kind: SnapshotKind) -> None:
        """Copy the state of a prefilling sequence, and make the copy findable."""
        num_pages = sequence.planned // self._page_size
        if sequence.pages.find_snapshot(sequence.tokens, num_pages) is not None:
            return  # an equal prompt was faster
        snapshot = self._copy_state(draft, sequence, kind)
        if snapshot != NO_SNAPSHOT:
            sequence.pages.publish_snapshot(snapshot, sequence.tokens, num_pages)
            draft.copied.append(snapshot)

    def _roll(self, draft: _Draft, sequence: Sequence) -> None:
        """Copy the state of a decoding sequence that has just filled a page."""
        if sequence.rolling == NO_SNAPSHOT:
            sequence.rolling = self._copy_state(draft, sequence, "answer")
        else:
            draft.plan.snapshots.append((sequence.slot, sequence.rolling))
        sequence.rolling_len = sequence.planned

    def _copy_state(self, draft: _Draft, sequence: Sequence, kind: SnapshotKind) -> int:
        """Take a snapshot and copy the state to it; NO_SNAPSHOT if there is none."""
        snapshot = None if self._snapshots is None else self._snapshots.take_one(kind)
        if snapshot is None:
            return NO_SNAPSHOT
        draft.plan.snapshots.append((sequence.slot, snapshot))
        return snapshot

    def _plan_chunks(self, draft: _Draft, budget: Budget) -> None:
        """Plan chunks of prefilling sequences in order of rank, then of newly admitted ones."""
        cost = self._fit.model
        work = draft.work
        left = min(budget.prefill_tokens, self._max_tokens - len(draft.decodes))
        least = self._min_prefill
        seconds = budget.seconds - (cost.rows(work) if work else 0.0)
        while left > 0 and (sequence := self._next_to_prefill(draft)) is not None:
            start = sequence.planned
            fits = cost.longest(start, seconds, left)
            count = self._plan_chunk(draft, sequence, max(fits, min(left, least)))
            if not count:
                if sequence in draft.cut:
                    continue
                break
            if work is not None:
                chunk = Work.row(start, count)
                draft.work = work = work.plus(chunk)
                seconds -= cost.rows(chunk)
            is_whole = sequence.queue is not self._prefilling
            if seconds <= 0 or not is_whole and sequence not in draft.cut:
                break
            least = 1
            left = left - count

    def _next_to_prefill(self, draft: _Draft) -> Sequence | None:
        """The first prefilling sequence without a chunk in this plan, or a newly admitted one.

        Sequences whose chunk in this plan was cut, because the next plan copies their state or a
        later one encodes their image, do not keep others waiting. With windows they do: the
        sequences could take each other's pages.
        """
        step = self._steps + 1
        while True:
            late = (s for s in self._prefilling if s.planned_by < step and s not in draft.cut)
            ready = next(late, None)
            if ready is not None:
                return ready
            if self._prefilling and self._num_whole < len(self._groups):
                return None
            if not self._admit(draft):
                return None

    def _plan_chunk(self, draft: _Draft, sequence: Sequence, max_tokens: int) -> int:
        """Plan up to max_tokens known tokens of a prefilling sequence; returns their number.

        It is 0 if a group with a window lacks pages. A sequence fits the cache alone, so others
        are decoding then, and free pages at the latest when they end. It is 0, too, if the next
        token is an image's, which has to be encoded later.
        """
        tokens = sequence.tokens
        start = sequence.planned
        end = min(start + max_tokens, sequence.prefill_len)
        end = min([end, *(due for due in sequence.snapshots_due if due > start)])
        sequence.pages.drop_unneeded(start)
        while end > start and not sequence.pages.can_grow(end):
            end -= (end - 1) % self._page_size + 1  # one page less
        if end > start and self._images is not None:
            most = end
            end = self._images.reach(sequence, most, self._prefilling)
            if end < most:
                draft.cut.add(sequence)
        if end <= start:
            return 0
        if end in sequence.snapshots_due:
            draft.cut.add(sequence)
        self._grow(draft, sequence, end)
        if start in sequence.snapshots_due:
            self._snap(draft, sequence, sequence.snapshots_due[start])
        samples = end == sequence.prefill_len
        targets: list[int] = []
        if sequence.sampling.prompt_logprobs is not None:
            if end > sequence.num_prompt_logprobs:
                targets = tokens[start + 1 : min(end + 1, sequence.prompt_len)]
        rotary = sequence.rotary.packed(start, end) if sequence.rotary is not None else b""
        runs = self._images.runs(sequence, start, end) if self._images is not None else []
        draft.plan.chunks.append(
            Chunk(sequence.slot, start, tokens[start:end], samples, targets, rotary, runs)
        )
        draft.chunked.append(sequence)
        sequence.planned = end
        sequence.planned_by = self._steps + 1
        sequence.charged = end
        sequence.tenant.prefill += end - start
        self._backlog -= end - start
        sequence.pages.publish(tokens, end)
        if samples:
            if self._images is not None:
                self._images.leave(sequence)
            self._prefilling.take(sequence)
            self._decoding.put(sequence)
            self._context += end
            sequence.plan_check = end  # the first decode takes the slow path
            if sequence.constraint is not None:
                self._add_mask(draft, sequence)
        return end - start

    def _add_mask(self, draft: _Draft, sequence: Sequence) -> None:
        assert sequence.constraint is not None
        mask = sequence.constraint(sequence.tokens)
        if mask is not None:
            draft.plan.masks[sequence.slot] = mask

    # ------------------------------------------------------------ commit

    def commit(self, result: StepResult) -> Committed:
        """Process the result of the oldest plan in flight.

        Raises ValueError, and changes nothing, if the result does not match that plan.
        """
        flight = self._flights[0] if self._flights else None
        if flight is None or flight.plan.step != result.step:
            expected = "none" if flight is None else f"step {flight.plan.step}"
            raise ValueError(f"got the result of step {result.step}, expected {expected}")
        if len(result.tokens) != len(flight.sampling):
            raise ValueError(
                f"step {result.step} has {len(result.tokens)} tokens for "
                f"{len(flight.sampling)} sampling rows"
            )
        self._flights.popleft()
        if self._images is not None:
            self._images.done(flight.plan)
        if flight.work is not None and result.seconds > 0:
            self._fit.observe(flight.work, result.seconds)
        committed = Committed()
        if result.logprobs or result.prompt_logprobs:
            self._take_logprobs(flight, result, committed)
        append = committed.tokens.append
        for sequence, token in zip(flight.sampling, result.tokens, strict=True):
            if sequence.queue is None:
                continue  # the sequence ended while this plan was in flight
            tokens = sequence.tokens
            tokens.append(token)
            append((sequence, token))
            if token in sequence.stops or len(tokens) == sequence.commit_check:
                if len(tokens) == sequence.prompt_len + 1:
                    committed.begun.append(sequence)
                finish = self._look(sequence, token)
                if finish is not None:
                    allowed = sequence.limit - sequence.prompt_len
                    self._outputs.observe(len(tokens) - sequence.prompt_len, allowed)
                    self._remove(sequence)
                    committed.finished.append((sequence, finish))
        return committed

    def _look(self, sequence: Sequence, token: int) -> Finish | None:
        """Handle a first token, or one that ends the sequence or completes a page; returns its
        Finish, if any."""
        length = len(sequence.tokens)
        if sequence.slot != NO_SLOT:
            # The newest token was sampled from the one before it, so that one is planned.
            sequence.pages.publish(sequence.tokens, length - 1)
        if token in sequence.stops:
            return Finish("stop", stop_token=token)
        if length == sequence.limit:
            if length == self._wanted(sequence):
                return Finish("length")
            return Finish(
                "error",
                status="invalid",
                message=f"The KV cache holds {self._capacity} tokens, too few for the prompt of "
                f"{sequence.prompt_len} tokens and more than {length - sequence.prompt_len} "
                "tokens of output.",
            )
        sequence.commit_check = self._next_commit_check(sequence)
        return None

    def _next_commit_check(self, sequence: Sequence) -> int:
        """The next length at which _look is due: one token more than fills a page, or the limit."""
        if not self._pool.caching:
            return sequence.limit
        pages = -(-len(sequence.tokens) // self._page_size)
        return min(sequence.limit, pages * self._page_size + 1)

    def _take_logprobs(self, flight: _Flight, result: StepResult, committed: Committed) -> None:
        plan = flight.plan
        slots = plan.decode_slots + [chunk.slot for chunk in plan.chunks if chunk.samples]
        for slot, sequence in zip(slots, flight.sampling, strict=True):
            if sequence.queue is not None and slot in result.logprobs:
                committed.logprobs.append((sequence, result.logprobs[slot]))
        for chunk, sequence in zip(plan.chunks, flight.chunked, strict=True):
            if sequence.queue is not None and chunk.slot in result.prompt_logprobs:
                known = max(0, sequence.num_prompt_logprobs - chunk.start)  # before a preemption
                fresh = result.prompt_logprobs[chunk.slot][known:]
                sequence.num_prompt_logprobs += len(fresh)
                if fresh:
                    committed.prompt_logprobs.append((sequence, fresh))

    # ------------------------------------------------------------ state

    @property
    def to_encode(self) -> list[ImagePixels]:
        """The images that the latest plan encodes."""
        return [] if self._images is None else self._images.fresh

    def not_landed(self, number: int) -> list[Sequence]:
        """End the sequences that need an image that cannot be encoded; returns them."""
        assert self._images is not None
        keys = self._images.not_landed(number)
        starts = {s: s.planned for s in self._prefilling}
        for sequence in self._waiting:
            if self._images.needs(sequence, 0, keys):
                starts[sequence] = self._num_cached(sequence)
        ended = [s for s, start in starts.items() if self._images.needs(s, start, keys)]
        for sequence in ended:
            self._remove(sequence)
        return ended

    @property
    def has_work(self) -> bool:
        """Whether a sequence is live or a plan is in flight."""
        return bool(self._waiting or self._prefilling or self._decoding or self._flights)

    @property
    def num_in_flight(self) -> int:
        """Number of plans whose results have not been committed."""
        return len(self._flights)

    def stats(self) -> Stats:
        return Stats(
            running=len(self._prefilling) + len(self._decoding),
            waiting=len(self._waiting),
            kv_usage=1 - self._pool.num_free / self._pool.num_pages,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
            prefix_stored=self._prefix_stored,
            prompt_snapshot_hits=self._snapshot_hits["prompt"],
            branch_snapshot_hits=self._snapshot_hits["branch"],
            answer_snapshot_hits=self._snapshot_hits["answer"],
            preemptions=self._preemptions,
            steps=self._steps,
            waiting_tokens=self._waiting.num_tokens,
            tenants=self._waiting.stats(),
            images_encoded=0 if self._images is None else self._images.num_encoded,
            image_hits=0 if self._images is None else self._images.num_hits,
            images_waiting=0 if self._images is None else self._images.num_waiting,
        )

    def check_integrity(self) -> None:
        """Raise IntegrityError if the bookkeeping contradicts itself; the message says how."""
        running = [*self._prefilling, *self._decoding]
        live = [*self._waiting, *running]
        parts = [part for sequence in live for part in sequence.pages.groups]
        for pool in {group.pool for group in self._groups}:
            pool.check_integrity(part.ids for part in parts if part.group.pool is pool)
        if self._snapshots is not None:
            self._snapshots.check_integrity([s.rolling] for s in live if s.rolling != NO_SNAPSHOT)
        if self._images is not None:
            flights = [flight.plan for flight in self._flights]
            self._images.check_integrity([*self._waiting, *self._prefilling], flights)
        self._waiting.check_integrity(running)
        for queue in (*self._waiting.queues(), self._prefilling, self._decoding):
            if any(sequence.queue is not queue for sequence in queue):
                raise IntegrityError("A sequence is in a queue it does not know of.")
            if queue != sorted(queue) or len({s.rank for s in queue}) < len(queue):
                raise IntegrityError("A queue is out of order.")
        for sequence in running:
            for part in sequence.pages.groups:
                if part.end * self._page_size < sequence.planned:
                    raise IntegrityError(f"Sequence {sequence.key!r} has too few pages.")
        slots = sorted(self._slots + [sequence.slot for sequence in running])
        if slots != list(range(self._max_slots)):
            raise IntegrityError(f"Slots are lost or owned twice: free and owned are {slots}.")
        backlog = sum(sequence.backlog for sequence in live)
        if backlog != self._backlog:
            raise IntegrityError(f"The backlog is {backlog} tokens, but {self._backlog} counted.")
        context = sum(sequence.planned for sequence in self._decoding)
        if context != self._context:
            raise IntegrityError(f"The context is {context} tokens, but {self._context} counted.")

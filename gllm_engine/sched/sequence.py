"""A sequence as the scheduler sees it, and lists of sequences kept in order of service.

Owns the per-sequence counters. Knows nothing of slots' or pages' availability, text or tensors.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from typing import TYPE_CHECKING

from gllm_engine.sampling import SamplingParams

if TYPE_CHECKING:
    from gllm_engine.sched.pages import Pages

# All known tokens (prompt and output) -> mask of allowed next tokens, one bit a token id, least
# significant bit first; None: all are allowed. Must not raise and must not change the list.
Constraint = Callable[[list[int]], "bytes | None"]

# Whose sequence it is, and its number among those of that client.
SequenceKey = tuple[bytes, int]

NO_SLOT = -1


class Sequence:
    """One prompt and the tokens generated for it so far; the scheduler alone changes it.

    There is no prefill phase: `planned` catches up with the known tokens, by chunks up to
    `prefill_len`, and from there by decode rows, whose input may be a token still in flight.
    """

    __slots__ = (
        # The caller's; the scheduler never looks into `key`.
        "key",
        "prompt_len",
        "tokens",  # known ones: prompt, then output
        "sampling",
        "seed",
        "constraint",
        # Set once by Scheduler.add.
        "rank",  # (priority, arrival): the smaller is served sooner
        "limit",  # tokens: no more than these can ever be known
        "stops",  # token ids that end it
        "pages",
        # Where it is: `queue` is None before add and after its end.
        "queue",
        "slot",
        # Tokens 0..planned-1 are computed by plans already made, the last of them by plan number
        # `planned_by`.
        "planned",
        "planned_by",
        # Tokens that chunks compute. Fixed when the sequence begins to wait, and then counts its
        # tokens in flight too: it is admitted once all of these are known.
        "prefill_len",
        # Where the step loops must stop and think: schedule at planned == plan_check, commit at
        # len(tokens) == commit_check.
        "plan_check",
        "commit_check",
        "num_cached_tokens",  # at first admission; -1 before
        "num_prompt_logprobs",  # prompt positions already reported
    )

    def __init__(
        self,
        key: SequenceKey,
        prompt: list[int],
        sampling: SamplingParams,
        seed: int,
        constraint: Constraint | None = None,
    ) -> None:
        self.key = key
        self.prompt_len = len(prompt)
        self.tokens = list(prompt)
        self.sampling = sampling
        self.seed = seed
        self.constraint = constraint
        self.rank = (sampling.priority, 0)
        self.limit = 0
        self.stops: frozenset[int] = frozenset()
        self.pages: Pages
        self.queue: Queue | None = None
        self.slot = NO_SLOT
        self.planned = self.planned_by = 0
        self.prefill_len = self.prompt_len
        self.plan_check = 0
        self.commit_check = 0
        self.num_cached_tokens = -1
        self.num_prompt_logprobs = 0

    def __lt__(self, other: Sequence) -> bool:
        """Served sooner."""
        return self.rank < other.rank

    @property
    def backlog(self) -> int:
        """Tokens that chunks have still to compute."""
        return max(0, self.prefill_len - self.planned)


class Queue(list[Sequence]):
    """Sequences by rank, the one to serve first in front. A sequence is in at most one queue."""

    def put(self, sequence: Sequence) -> None:
        insort(self, sequence)
        sequence.queue = self

    def take(self, sequence: Sequence) -> None:
        del self[bisect_left(self, sequence)]
        sequence.queue = None

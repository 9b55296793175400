"""The scheduler's state of a sequence, and lists of sequences in order of service.

This module owns the counters of a sequence. It does not know which slots or pages are free, and
knows nothing of text or tensors.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from typing import TYPE_CHECKING

from gllm_engine.sampling import SamplingParams
from gllm_engine.types import NO_SNAPSHOT, Image

if TYPE_CHECKING:
    from gllm_engine.sched.pages import Pages
    from gllm_engine.sched.rotary import RotaryPositions
    from gllm_engine.sched.snapshots import SnapshotKind
    from gllm_engine.sched.tenants import Tenant

# Maps all known tokens (prompt and output) to a mask of allowed next tokens: one bit per token id,
# least significant bit first. None allows every token. Must not raise and must not change the list.
Constraint = Callable[[list[int]], "bytes | None"]

# The client that owns the sequence, and the sequence's number at that client.
SequenceKey = tuple[bytes, int]

NO_SLOT = -1
NOT_ADMITTED = 2**62  # comes after the number of every admission


def image_end(image: Image) -> int:
    """The index after the last token whose embedding is the image's."""
    return image.first + (image.rows - 1) * image.stride + image.columns


class Sequence:
    """One prompt and the tokens generated for it so far; the scheduler alone changes it.

    `planned` follows the number of known tokens: chunks raise it to `prefill_len`, and then each
    decode row adds one. The input of a decode row may be a token still in flight.
    """

    __slots__ = (
        # Set by the caller. The scheduler does not interpret `key`.
        "key",
        "prompt_len",
        "tokens",  # known tokens: prompt, then output
        "sampling",
        "seed",
        "constraint",
        "images",
        # (priority, number of the first admission, arrival): smaller ranks are served sooner.
        "rank",
        # Set once by Scheduler.add.
        "tenant",
        "limit",  # largest possible number of known tokens
        "stops",  # token ids that end the sequence
        "pages",
        "rotary",  # RotaryPositions, for a model with sections if there are images; else None
        # If the model keeps a state per sequence: token counts at which a chunk must end, so that
        # the state can be copied there, and the kinds of the copies; and the snapshot that is
        # written again and again while the sequence decodes, and its token count.
        "snapshots_due",
        "rolling",
        "rolling_len",
        # `queue` is None before Scheduler.add and after the sequence's end.
        "queue",
        "slot",
        # Plans already made compute tokens 0..planned-1; plan number `planned_by` computes the
        # last one of these.
        "planned",
        "planned_by",
        # Number of tokens that chunks compute. It is fixed when the sequence begins to wait, and
        # includes tokens in flight then: admission waits until all of them are known.
        "prefill_len",
        # The per-step loops take the slow path for this sequence only when planned == plan_check
        # (in schedule) or len(tokens) == commit_check (in commit).
        "plan_check",
        "commit_check",
        "charged",  # while decoding: its tenant's service includes tokens 0..charged-1
        "num_cached_tokens",  # set at first admission; -1 before
        "admitted_at",  # the same, seconds of the monotonic clock
        "num_prompt_logprobs",  # prompt positions already reported
    )

    def __init__(
        self,
        key: SequenceKey,
        prompt: list[int],
        sampling: SamplingParams,
        seed: int,
        constraint: Constraint | None = None,
        images: tuple[Image, ...] = (),
    ) -> None:
        self.key = key
        self.prompt_len = len(prompt)
        self.tokens = list(prompt)
        self.sampling = sampling
        self.seed = seed
        self.constraint = constraint
        self.images = images
        self.rank = (sampling.priority, 0, 0)
        self.tenant: Tenant
        self.limit = 0
        self.stops: frozenset[int] = frozenset()
        self.pages: Pages
        self.rotary: RotaryPositions | None = None
        self.snapshots_due: dict[int, SnapshotKind] = {}
        self.rolling = NO_SNAPSHOT
        self.rolling_len = 0
        self.queue: Queue | None = None
        self.slot = NO_SLOT
        self.planned = self.planned_by = 0
        self.prefill_len = self.prompt_len
        self.plan_check = 0
        self.charged = 0
        self.commit_check = 0
        self.num_cached_tokens = -1
        self.admitted_at = 0.0
        self.num_prompt_logprobs = 0

    def __lt__(self, other: Sequence) -> bool:
        """Whether this sequence is served sooner than `other`."""
        return self.rank < other.rank

    @property
    def backlog(self) -> int:
        """Number of tokens that chunks have still to compute."""
        return max(0, self.prefill_len - self.planned)


class Queue(list[Sequence]):
    """Sequences in ascending order of rank. A sequence is in at most one queue."""

    def put(self, sequence: Sequence) -> None:
        insort(self, sequence)
        sequence.queue = self

    def take(self, sequence: Sequence) -> None:
        del self[bisect_left(self, sequence)]
        sequence.queue = None

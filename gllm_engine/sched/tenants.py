"""The waiting sequences, and which of them is next: fair between tenants, in tokens.

The algorithm is start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996). A packet's length is
known when it is sent; a sequence's is not, so tokens count when they are planned, as in the virtual
token counter of Sheng et al. (Fairness in Serving Large Language Models, OSDI 2024, arXiv
2401.00588). The service of a tenant is the number of its computed tokens, with OUTPUT_WEIGHT for
those of decode rows, divided by the tenant's weight. Tokens from the prefix cache are not computed,
and tokens after a preemption are computed again.

The next sequence is of the best priority, then of the tenant with the least service, then of the
best rank. Virtual time is the service of the tenant that was admitted last, at that admission. A
tenant with less service is lifted to it: neither idle time nor time behind a better priority earns
credit. While nothing waits, nobody keeps anybody waiting, and all tenants become equal.

This module knows nothing of slots, pages or plans.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush, heapreplace, merge
from operator import add
from typing import NamedTuple

from gllm_engine.config import OTHER_TENANTS
from gllm_engine.sampling import shown
from gllm_engine.sched.pages import IntegrityError
from gllm_engine.sched.sequence import NOT_ADMITTED, Queue, Sequence
from gllm_engine.types import TenantStats

# Service of a token of output; of a computed prompt token it is 1. The value is that of the paper:
# decode rows read the weights for one token, chunks for many.
OUTPUT_WEIGHT = 2
# Tenants with a service of their own, beside those of the configuration. When so many are known,
# a new name counts as no tenant, so invented names cost neither memory nor others' turns.
MAX_TENANTS = 1024


class Amount(NamedTuple):
    """Sequences in a queue and the tokens of their prompts; bytes of images in live requests."""

    sequences: int = 0
    tokens: int = 0
    pixels: int = 0

    def plus(self, more: Amount) -> Amount:
        return Amount(*map(add, self, more))


_KINDS = (
    ("requests are waiting", "max_waiting"),
    ("tokens are waiting", "max_waiting_tokens"),
    ("bytes of images are held", "image_memory_gib"),
)


class Room(NamedTuple):
    """How many sequences and tokens may wait.

    A tenant alone may use all of it. What others have there takes half as much from it. So one
    tenant leaves half of the room to a second, `n` greedy tenants share evenly and leave a part
    like theirs to one more, and all tenants together stay below twice the room. (Choudhury and
    Hahne, Dynamic Queue Length Thresholds, 1998.)
    """

    sequences: int  # max_waiting
    tokens: int  # max_waiting_tokens
    pixels: int = 0  # image_memory_gib, in bytes

    def refusal(self, name: str, own: Amount, total: Amount, more: Amount) -> str | None:
        """Why tenant `name` may not add `more` now, as a sentence; None if it may.

        `own`: what it has waiting, which is a part of `total`.
        """
        full = f"the queue is full for tenant {shown(name)}" if name else "the queue is full"
        is_alone = not any(total) and more.sequences <= 1
        for (what, key), room, mine, every, added in zip(
            _KINDS, self, own, total, more, strict=True
        ):
            others = every - mine
            most = room - others // 2
            if added and mine + added > most and not is_alone:
                beside = f", less half of the {others} of others" if others else ""
                return (
                    f"{full}: {mine} {what}, and with the {added} of this prompt they would be "
                    f"more than {most} ({key}{beside})"
                )
        return None


class Tenant:
    """One tenant's waiting sequences and its tokens computed so far."""

    __slots__ = (
        "weight",
        "queue",
        "num_waiting_tokens",
        "num_running",
        "prefill",
        "decode",
        "lift",
    )

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.queue = Queue()
        self.num_waiting_tokens = 0
        self.num_running = 0
        self.prefill = 0  # tokens of chunks
        self.decode = 0  # tokens of decode rows
        self.lift = 0.0  # service that was not given, see the head of this file

    @property
    def service(self) -> float:
        return self.lift + (self.prefill + OUTPUT_WEIGHT * self.decode) / self.weight

    @property
    def waiting(self) -> Amount:
        return Amount(len(self.queue), self.num_waiting_tokens)


# The place of a tenant among others: priority, service and rank of its first waiting sequence.
_Place = tuple[int, float, tuple[int, int, int], Tenant]


class Waiting:
    """The waiting sequences of all tenants.

    A heap has one place or more of every tenant with a waiting sequence. Places only get worse with
    time, but for that of a tenant whose new sequence goes before its others; then the better place
    is added. So the first place that is still right is the best of all.
    """

    def __init__(self, weights: dict[str, float]) -> None:
        """`weights`: by name; other tenants have weight 1."""
        self._named = {name: Tenant(weight) for name, weight in weights.items()}
        self._anonymous = self._named.get("") or Tenant(1.0)
        self._tenants = {"": self._anonymous, **self._named}
        self._max_tenants = len(self._tenants) + MAX_TENANTS
        self._forgotten = TenantStats()
        self._heap: list[_Place] = []
        self._time = 0.0  # virtual time
        self._latest = 0.0  # the greatest service of a tenant when one of its sequences ended
        self._num_sequences = self._arrivals = self._admissions = 0
        self.num_tokens = 0  # to be computed before the waiting sequences can go on

    # ------------------------------------------------------------ tenants

    def tenant(self, name: str) -> Tenant:
        """The tenant of this name; the one without a name if too many are known."""
        tenant = self._tenants.get(name)
        if tenant is not None:
            return tenant
        if len(self._tenants) >= self._max_tenants:
            self._forget()
        if len(self._tenants) >= self._max_tenants:
            return self._anonymous
        return self._tenants.setdefault(name, Tenant(1.0))

    def _forget(self) -> None:
        """Forget tenants that new ones would equal. Those of the configuration stay."""
        for name, tenant in list(self._tenants.items()):
            if name and name not in self._named and not tenant.queue and not tenant.num_running:
                if tenant.service <= self._time:
                    self._forgotten = _sum([self._forgotten, _stats(tenant)])
                    del self._tenants[name]

    def stats(self) -> dict[str, TenantStats]:
        """By name for tenants of the configuration, and for OTHER_TENANTS; empty without any."""
        if not self._named:
            return {}
        stats = {name: _stats(tenant) for name, tenant in self._named.items()}
        others = [_stats(tenant) for name, tenant in self._tenants.items() if name not in stats]
        return stats | {OTHER_TENANTS: _sum([self._forgotten, *others])}

    # ------------------------------------------------------------ sequences

    def __len__(self) -> int:
        return self._num_sequences

    @property
    def amount(self) -> Amount:
        return Amount(self._num_sequences, self.num_tokens)

    def __iter__(self) -> Iterator[Sequence]:
        return iter([s for tenant in self._tenants.values() for s in tenant.queue])

    def queues(self) -> list[Queue]:
        return [tenant.queue for tenant in self._tenants.values()]

    def join(self, sequence: Sequence, tenant: Tenant) -> None:
        """Queue a new sequence, behind all of its tenant and priority."""
        self._arrivals += 1
        sequence.rank = (sequence.sampling.priority, NOT_ADMITTED, self._arrivals)
        sequence.tenant = tenant
        self.put(sequence)

    def put(self, sequence: Sequence) -> None:
        """Queue a sequence that runs no more, or a new one."""
        if not self._num_sequences:
            self._time = max(self._time, self._latest)
        tenant = sequence.tenant
        tenant.queue.put(sequence)
        tenant.num_waiting_tokens += sequence.backlog
        self.num_tokens += sequence.backlog
        self._num_sequences += 1
        if tenant.queue[0] is sequence:
            if len(self._heap) > 2 * len(self._tenants):
                self._heap = [self._place(each) for each in self._tenants.values() if each.queue]
                heapify(self._heap)
            else:
                heappush(self._heap, self._place(tenant))

    def take(self, sequence: Sequence) -> None:
        tenant = sequence.tenant
        tenant.queue.take(sequence)
        tenant.num_waiting_tokens -= sequence.backlog
        self.num_tokens -= sequence.backlog
        self._num_sequences -= 1

    def first(self) -> Sequence:
        """The next sequence to admit. One must be waiting."""
        heap = self._heap
        while True:
            place = heap[0]
            tenant = place[3]
            if not tenant.queue:
                heappop(heap)
                continue
            current = self._place(tenant)
            if current == place:
                return tenant.queue[0]
            heapreplace(heap, current)

    def in_order(self) -> Iterator[Sequence]:
        """All sequences in the order of their admission, as far as it is known now."""
        queues = [tenant.queue for tenant in self._tenants.values() if tenant.queue]
        return merge(*queues, key=self._order)

    def first_text(self) -> Sequence | None:
        """The first sequence in that order without images."""
        texts = [next((s for s in queue if not s.images), None) for queue in self.queues()]
        return min((s for s in texts if s is not None), key=self._order, default=None)

    def _order(self, sequence: Sequence) -> tuple[int, float, tuple[int, int, int]]:
        rank = sequence.rank
        return rank[0], max(sequence.tenant.service, self._time), rank

    def admit(self, sequence: Sequence) -> None:
        """Take a sequence, because it runs now. Its rank is that of its first admission."""
        self.take(sequence)
        tenant = sequence.tenant
        tenant.num_running += 1
        tenant.lift += max(0.0, self._time - tenant.service)
        self._time = max(self._time, tenant.service)
        priority, admission, arrival = sequence.rank
        if admission == NOT_ADMITTED:
            self._admissions += 1
            sequence.rank = (priority, self._admissions, arrival)

    def leave(self, sequence: Sequence) -> None:
        """Note that an admitted sequence runs no more."""
        tenant = sequence.tenant
        tenant.num_running -= 1
        self._latest = max(self._latest, tenant.service)

    def check_integrity(self, running: list[Sequence]) -> None:
        """Raise IntegrityError if the counts are wrong or `first` would err."""
        waiting = list(self)
        for tenant in self._tenants.values():
            tokens = sum([sequence.backlog for sequence in tenant.queue])
            num_running = sum([sequence.tenant is tenant for sequence in running])
            if (tokens, num_running) != (tenant.num_waiting_tokens, tenant.num_running):
                raise IntegrityError("A tenant's sequences are miscounted.")
        amount = Amount(len(waiting), sum([sequence.backlog for sequence in waiting]))
        if amount != self.amount:
            raise IntegrityError(f"{amount} is waiting, but {self.amount} counted.")
        if waiting:
            places = [self._place(tenant) for tenant in self._tenants.values() if tenant.queue]
            if self.first() is not min(places)[3].queue[0]:
                raise IntegrityError("A sequence is first that is not the next.")

    def _place(self, tenant: Tenant) -> _Place:
        return *self._order(tenant.queue[0]), tenant


def _stats(tenant: Tenant) -> TenantStats:
    return TenantStats(tenant.num_running, len(tenant.queue), tenant.prefill, tenant.decode)


def _sum(stats: list[TenantStats]) -> TenantStats:
    return TenantStats(
        sum([each.running for each in stats]),
        sum([each.waiting for each in stats]),
        sum([each.prefill_tokens for each in stats]),
        sum([each.decode_tokens for each in stats]),
    )

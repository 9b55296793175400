"""How many tokens of each kind a step may take: pure functions of the load.

Owns the trade between prefill and decode. Knows nothing of sequences, pages or slots: a policy
sees numbers and answers with numbers, and the scheduler obeys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Load(NamedTuple):
    """What a policy may look at; the scheduler fills it before each step."""

    max_tokens: int  # in one step
    num_decoding: int  # sequences that have all their known tokens planned
    backlog: int  # tokens that chunks have still to compute, waiting sequences included
    num_free_pages: int
    num_pages: int


class Budget(NamedTuple):
    """Upper bounds for one step; the step never exceeds max_tokens whatever they are.

    With fewer `decodes` than sequences decoding, those with no token in flight are taken, so that
    plans in flight share the sequences out among themselves. Must not be (0, 0) while there is
    work of either kind and nothing in flight, or nothing would ever move again.
    """

    decodes: int
    prefill_tokens: int


Policy = Callable[[Load], Budget]


def chunked_prefill(load: Load) -> Budget:
    """All decodes, then prefill fills the step (Sarathi-Serve, arXiv 2403.02310, section 4)."""
    return Budget(decodes=load.num_decoding, prefill_tokens=load.max_tokens)


POLICIES: dict[str, Policy] = {"chunked_prefill": chunked_prefill}

"""How many tokens of each kind a step may take: pure functions of the load.

Owns the trade between prefill and decode. Knows nothing of sequences, pages or slots: a policy
sees numbers and answers with numbers, and the scheduler obeys.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, sqrt
from typing import NamedTuple

from gllm_engine.sched.cost import PRIOR, CostModel, Work


class Load(NamedTuple):
    """What a policy may look at; the scheduler fills it before each step."""

    max_tokens: int  # in one step
    num_decoding: int  # sequences that have all their known tokens planned
    backlog: int  # tokens that chunks have still to compute, waiting sequences included
    num_free_pages: int  # also those given to chunks that are not planned yet
    num_reserved_pages: int  # free pages that admission leaves to those decoding
    num_pages: int
    step: int  # steps planned so far
    # Of the configuration.
    stages: int  # of the pipeline; so many steps are computed at the same time
    prefill_drain_steps: int
    min_prefill_tokens: int
    # What a step's time is made of.
    cost: CostModel = PRIOR
    context: int = 0  # tokens computed so far of the sequences decoding, together


class Budget(NamedTuple):
    """Upper bounds for one step; the step never exceeds max_tokens whatever they are.

    In a pipeline a step takes only sequences whose last token is known or about to be, so that
    steps under way share the sequences out among themselves. Must not be (0, 0) while there is
    work of either kind and nothing in flight, or nothing would ever move again.

    Whatever the seconds, `min_prefill_tokens` of the first chunk and the first decode are taken.
    """

    decodes: int
    prefill_tokens: int
    # Of what `cost` predicts for the rows, without the time that every step takes.
    decode_seconds: float | None = None
    seconds: float = inf  # the decodes' included: prefill gets what they leave


Policy = Callable[[Load], Budget]


def chunked_prefill(load: Load) -> Budget:
    """All decodes, then prefill fills the step (Sarathi-Serve, arXiv 2403.02310, section 4)."""
    return Budget(decodes=load.num_decoding, prefill_tokens=load.max_tokens)


def token_throttling(load: Load) -> Budget:
    """Even steps: a share of the decodes, and prefill by what waits and by what memory is free.

    gLLM (SC'25, arXiv 2504.14775), in its terms: #T = prefill_drain_steps, #MinP =
    min_prefill_tokens, #MaxP = max_tokens, #WP = backlog, #RD = num_decoding, #PP_depth =
    stages, KV_thresh = num_reserved_pages / num_pages (5 % when many decode), and

        #P = max(min(#WP / #T, #MaxP (KV_free - KV_thresh) / (1 - KV_thresh)), #MinP)
        #D = #RD / #PP_depth

    Three things differ. #D is rounded down in some steps and up in others, so that any
    `stages` steps in a row take #RD together; always up would starve the last of them.
    Below KV_thresh #P is #MinP and not 0: nobody is admitted then, and those who were hold their
    pages already. With nobody decoding there is nobody to slow down, so prefill fills the step.
    """
    if not load.num_decoding:
        return Budget(decodes=0, prefill_tokens=load.max_tokens)
    stages = load.stages
    decodes = max(1, (load.num_decoding + load.step % stages) // stages)
    by_waiting = -(-load.backlog // load.prefill_drain_steps)
    spare = max(0, load.num_free_pages - load.num_reserved_pages)
    by_memory = load.max_tokens * spare // (load.num_pages - load.num_reserved_pages)
    prefill_tokens = max(min(by_waiting, by_memory), load.min_prefill_tokens)
    return Budget(decodes, min(prefill_tokens, load.max_tokens))


def cost_throttling(load: Load) -> Budget:
    """Token throttling in predicted seconds: steps in flight take the same time, not tokens.

    A step takes its share of the time that one token of every decoding sequence takes, so the
    fewer sequences the longer their contexts. To that it adds P seconds of prefill: a chunk is the
    shorter the longer the context before it, and gets what the decodes leave of the sum.

    With Q the seconds of all that waits for prefill, and R those of a step without any, P = Q / #T
    as above makes a step grow with the queue though beyond R there is little to win: to work it
    off takes Q (1 + R / P). So P minimises that plus #T times the step's own time R + P, which is
    at P = sqrt(Q R / #T). As above, P shrinks with the pages that are free. With nobody decoding,
    what counts besides Q (1 + R / P) is the time until the last stage has a step, which is
    stages - 1 steps: a prompt alone is computed by all stages at once.

    Shares are rounded down in some steps and up in others, by a sequence of mean length.
    """
    cost = load.cost
    stages = load.stages
    count = load.num_decoding
    context = load.context + count  # what the next token of each attends to
    decoding = cost.rows(Work(count, context, context, count))
    share = decoding / stages
    dither = (load.step % stages + 0.5) / stages / max(1, count)
    most = prefill = cost.token * load.max_tokens
    weight = load.prefill_drain_steps if count else stages - 1
    if weight > 0:
        waiting = cost.token * load.backlog
        rest = cost.step + share
        prefill = min(prefill, sqrt(waiting * rest / weight))
    if count:
        spare = max(0, load.num_free_pages - load.num_reserved_pages)
        prefill = min(prefill, most * spare / (load.num_pages - load.num_reserved_pages))
    return Budget(count, load.max_tokens, share + decoding * dither, share + prefill)


POLICIES: dict[str, Policy] = {
    "chunked_prefill": chunked_prefill,
    "token_throttling": token_throttling,
    "cost_throttling": cost_throttling,
}

"""Scheduling policies: pure functions from the load to a step's budget of prefill and decode.

This module owns the trade between prefill and decode. A policy gets and returns numbers only; it
knows nothing of sequences, pages or slots. The scheduler keeps to the budget.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, log, sqrt
from typing import NamedTuple

from gllm_engine.sched.cost import PRIOR, CostModel, Work


class Load(NamedTuple):
    """The input of a policy; the scheduler fills it before each step."""

    max_tokens: int  # token limit of one step
    num_decoding: int  # sequences whose prefill is planned completely
    # Tokens that prefill has still to compute, of sequences that have a slot and of as many waiting
    # ones as slots are free. If all waiting sequences counted, the one step that finds slots free
    # would prefill for all of them, and the next steps for none.
    backlog: int
    num_free_pages: int  # includes pages that sequences hold for chunks not yet planned
    num_reserved_pages: int  # free pages that admission leaves to decoding sequences
    num_pages: int
    step: int  # steps planned so far
    # From the configuration.
    stages: int  # pipeline stages, and so steps that are computed at the same time
    prefill_drain_steps: int
    min_prefill_tokens: int
    # For predicting a step's time.
    cost: CostModel = PRIOR
    context: int = 0  # tokens computed so far, summed over decoding sequences
    # For policies with phases.
    in_prefill: bool = False  # the latest step has chunks
    held_back: int = 0  # tokens of waiting sequences beyond the free slots, which are no backlog
    output_len: float = 1.0  # predicted tokens of an output
    # Predicts by how many tokens the decoding sequences will exceed `context` at the worst moment.
    growth: Callable[[], float] = lambda: 0.0


class Budget(NamedTuple):
    """Upper bounds for one step. The step never exceeds max_tokens, whatever the bounds are.

    In a pipeline a step takes only sequences whose last token is known or will be soon, so the
    steps in flight divide the sequences among themselves. The budget must not be (0, 0) while no
    step is in flight and work remains, or the engine would stall.

    The bounds in seconds never exclude the first decode and the first `min_prefill_tokens` of the
    first chunk.
    """

    decodes: int
    prefill_tokens: int
    # Predicted seconds of the rows, without the constant cost of a step.
    decode_seconds: float | None = None
    seconds: float = inf  # decodes and prefill together
    # The step takes prefill alone, or decodes alone if no prefill is possible.
    is_exclusive: bool = False


Policy = Callable[[Load], Budget]


def chunked_prefill(load: Load) -> Budget:
    """Take all decodes, then fill the step with prefill (Sarathi-Serve, arXiv 2403.02310, §4)."""
    return Budget(decodes=load.num_decoding, prefill_tokens=load.max_tokens)


def token_throttling(load: Load) -> Budget:
    """Balance steps: each takes a share of the decodes, and prefill by backlog and free memory.

    gLLM (SC'25, arXiv 2504.14775), in its terms: #T = prefill_drain_steps, #MinP =
    min_prefill_tokens, #MaxP = max_tokens, #WP = backlog, #RD = num_decoding, #PP_depth =
    stages, KV_thresh = num_reserved_pages / num_pages (5 % with many decoding sequences), and

        #P = max(min(#WP / #T, #MaxP (KV_free - KV_thresh) / (1 - KV_thresh)), #MinP)
        #D = #RD / #PP_depth

    This function differs from the paper in three points. #D is rounded down in some steps and up
    in others, so that `stages` consecutive steps take exactly #RD; rounding up always would starve
    the last step. Below KV_thresh #P is #MinP and not 0, because no sequence is admitted then, and
    admitted sequences already hold their pages. While no sequence is decoding, prefill fills the
    step, because it delays no decode.
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
    """Token throttling in predicted seconds: balances the time of steps and not their tokens.

    The decode budget is an equal share, 1 / stages, of the predicted time to decode one token of
    every decoding sequence. So a step takes fewer sequences when their contexts are long. The step
    adds P seconds of prefill. A chunk after a long context is shorter, and prefill also gets the
    seconds that the decodes leave unused.

    Q is the time to compute the whole backlog, and R the time of a step without prefill. To drain
    the backlog takes Q (1 + R / P). P = Q / #T, as above, would let a step grow with the backlog
    although P far beyond R gains little. So P minimises Q (1 + R / P) + #T (R + P), where R + P is
    the step's own time: P = sqrt(Q R / #T). As above, P shrinks with the number of free pages.
    While no sequence is decoding, stages - 1 takes the place of #T: the last stage gets its first
    step after stages - 1 steps, so short chunks let all stages compute a single prompt at once.

    Shares are rounded down in some steps and up in others, by one sequence of mean length.
    """
    cost = load.cost
    count = load.num_decoding
    share, rounded = _equal_share(load)
    most = prefill = cost.token * load.max_tokens
    weight = load.prefill_drain_steps if count else load.stages - 1
    if weight > 0:
        waiting = cost.token * load.backlog
        rest = cost.step + share
        prefill = min(prefill, sqrt(waiting * rest / weight))
    if count:
        spare = max(0, load.num_free_pages - load.num_reserved_pages)
        prefill = min(prefill, most * spare / (load.num_pages - load.num_reserved_pages))
    return Budget(count, load.max_tokens, rounded, share + prefill)


def _equal_share(load: Load) -> tuple[float, float]:
    """Seconds of 1 / stages of all decodes: exactly, and rounded to whole sequences."""
    stages = load.stages
    count = load.num_decoding
    context = load.context + count  # tokens that the next decodes attend to
    decoding = load.cost.rows(Work(count, context, context, count))
    share = decoding / stages
    dither = (load.step % stages + 0.5) / stages / max(1, count)
    return share, share + decoding * dither


def prefill_then_decode(load: Load) -> Budget:
    """Take turns: prefill until the memory is full, then decode until batches are too small.

    For offline work. It is TD-Pipe's temporal disaggregation (arXiv 2506.10470): steps of one kind
    take equal time, so that stages do not wait for each other. In the decode phase each step takes
    an equal share of the decodes, in seconds. Latencies are long, because a phase is.

    A phase of prefill ends when slots, waiting sequences or memory are used up. Memory is used up
    when the decoding sequences are predicted to need all of it at some time.

    A phase of decodes ends when it has wasted as much as a change of phase costs. A round of decode
    steps takes `stages` times the constant cost of a step, however many sequences are left. Let N
    sequences be there at first, m the mean output, so that N exp(-t / m) are left after t rounds;
    y = N / n when n are left. The loss per token is least if the phase ends at

        y - 1 - ln y = B / (m stages step)

    where B is the cost of a change: a step's constant cost, and the time that the first step of
    prefill takes to reach the last stage. y is taken from what could be admitted now. If all that
    waits can be, the phase ends at once, because nothing is gained by waiting.
    """
    count = load.num_decoding
    cost = load.cost
    most = cost.rows(Work.row(0, load.max_tokens))
    decode = Budget(count, 0, _equal_share(load)[1])
    prefill = decode._replace(prefill_tokens=load.max_tokens, seconds=most, is_exclusive=True)
    if not count:
        return prefill
    if not load.backlog:
        return decode
    # In multiples of what the decoding sequences hold, so that shared pages count as such.
    held = load.context + count
    grown = load.growth() / held
    used = max(1, load.num_pages - load.num_free_pages)
    free = load.num_free_pages - load.num_reserved_pages
    room = (free / used - grown) / (1 + grown)
    wanted = load.backlog / held
    more = min(wanted, room)
    if more <= 0:
        return decode
    change = cost.step + (load.stages - 1) * (cost.step + most)
    wasted = (more - log(1 + more)) * load.output_len * load.stages * cost.step
    if load.in_prefill or wasted >= change or not load.held_back and wanted <= room:
        tokens = max(1, int(room * held))
        return prefill._replace(prefill_tokens=min(load.max_tokens, tokens))
    return decode


POLICIES: dict[str, Policy] = {
    "chunked_prefill": chunked_prefill,
    "token_throttling": token_throttling,
    "cost_throttling": cost_throttling,
    "prefill_then_decode": prefill_then_decode,
}

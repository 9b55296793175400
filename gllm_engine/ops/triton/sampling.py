"""Plain sampling: draws a token from raw logits, in two passes and without a sort.

The first pass reads every logit once. For each group of _GROUP tokens it stores the largest logit,
the mass and the most likely token. The second pass finds the group in which the cumulative mass
passes the row's random number, then the token in that group. The arithmetic is that of
reference.sample_plain: vocabulary order, sums over groups and tokens in float64, and a random
number that depends only on (seed, position).

Tensor-parallel ranks each have a shard of the vocabulary. They exchange the results of the first
pass, which are small beside the logits:

    gather   peaks, masses and most likely tokens of all groups         same on every rank
    choose   the rank with the chosen group offers its token + _MARK    one marked offer per row
             every other rank offers the most likely token
    max      of all ranks' offers                                       same on every rank

If ranks round differently, they may choose different groups, and mark two tokens or none. The
maximum is still the same token of the vocabulary on every rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gllm_engine.ops.batch import TensorGroup
from gllm_engine.ops.protocol import PlainSampling
from gllm_engine.ops.triton.launch_sizes import cdiv, next_power_of_2
from gllm_engine.ops.triton.memory import load, own_range

_GROUP = 2048
# Larger than every token id; marks the offer of the rank with the chosen group.
_MARK = tl.constexpr(1 << 40)
# Rows of one program of _record.
_RECORDED = 256


# A step's slots may start anywhere in a packed array: one kernel serves all alignments.
@triton.jit(do_not_specialize_on_alignment=["slots"])
def _look(
    scores, slots, temperature, peaks, masses, bests, width, own, base,
    GROUP: tl.constexpr,
):  # fmt: skip
    """`width`: of a row of scores, of which the first `own` are of tokens, from token `base` on."""
    row, group, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    at = group * GROUP + tl.arange(0, GROUP)
    heat = tl.load(temperature + tl.load(slots + row)).to(tl.float32)
    x = tl.load(scores + row.to(tl.int64) * width + at, mask=at < own, other=-float("inf"))
    x = x.to(tl.float32) / tl.where(heat > 0, heat, 1.0)
    # NaN compares false with every number: a NaN peak would give an index past the row's end.
    peak, best = tl.max(tl.where(x == x, x, -float("inf")), 0, return_indices=True)
    mass = tl.sum(tl.exp(x - tl.where(peak == -float("inf"), 0.0, peak)), 0)
    tl.store(peaks + row * groups + group, peak)
    tl.store(masses + row * groups + group, mass)
    tl.store(bests + row * groups + group, base + group * GROUP + best)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _first_above(weights, target, at):
    """Index of the first positive weight whose running sum exceeds target, else of the last."""
    passed = tl.sum((tl.cumsum(weights, 0) <= target).to(tl.int32), 0)
    return tl.minimum(passed, tl.max(tl.where(weights > 0, at, 0), 0))


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _choose(
    scores, slots, temperature, seeds, prompt_lens, lengths, last_tokens,
    peaks, masses, bests, tokens, width, own, groups, rank, ranks,
    GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    group = tl.arange(0, GROUPS)
    peak = tl.load(peaks + row * groups + group, mask=group < groups, other=-float("inf"))
    top, likely = tl.max(peak, 0, return_indices=True)
    slot = tl.load(slots + row)
    heat = tl.load(temperature + slot).to(tl.float32)
    chosen = likely
    token = tl.load(bests + row * groups + likely)
    ours = groups // ranks  # groups of one rank; this rank has groups rank * ours onward
    if heat > 0:
        seed = _mix(tl.load(seeds + slot).to(tl.uint64))
        position = tl.load(lengths + slot) - tl.load(prompt_lens + slot)
        step = (position + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
        uniform = (_mix(seed + step) >> 11).to(tl.float64) * (1.0 / 9007199254740992.0)
        mass = load(masses + row * groups + group, group < groups)
        weights = (mass * tl.exp(peak - top)).to(tl.float64)
        target = uniform * tl.sum(weights, 0)
        chosen = _first_above(weights, target, group)
        rest = tl.maximum(target - tl.sum(tl.where(group < chosen, weights, 0.0), 0), 0.0)
        member = tl.arange(0, GROUP)
        at = (chosen - rank * ours) * GROUP + member
        x = tl.load(
            scores + row.to(tl.int64) * width + at,
            mask=(at >= 0) & (at < own), other=-float("inf"),
        )  # fmt: skip
        members = tl.exp(x.to(tl.float32) / heat - top).to(tl.float64)
        first = rank * width + (chosen - rank * ours) * GROUP
        token = first + _first_above(members, rest, member)
    if ranks == 1:
        tl.store(tokens + row, token.to(tl.int64))
        tl.store(last_tokens + slot, token.to(tl.int64))
    else:
        most_likely = tl.load(bests + row * groups + likely).to(tl.int64)
        offer = tl.where(chosen // ours == rank, token.to(tl.int64) + _MARK, most_likely)
        tl.store(tokens + row, offer)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["slots"])
def _record(offers, slots, last_tokens, rows, BLOCK: tl.constexpr):
    """Turn offers into tokens, in place, and record them as their slots' last tokens."""
    row = own_range(0, BLOCK)
    inside = row < rows
    token = tl.load(offers + row, mask=inside, other=0) & (_MARK - 1)
    tl.store(offers + row, token, mask=inside)
    tl.store(last_tokens + tl.load(slots + row, mask=inside, other=0), token, mask=inside)


def sample_plain(
    scores: Tensor,
    slots: Tensor,
    state: PlainSampling,
    out: Tensor | None = None,
    ranks: TensorGroup | None = None,
    vocab: int | None = None,
) -> Tensor:
    """See Ops.sample_plain."""
    rows, width = scores.shape
    rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    own = width if vocab is None else min(width, vocab - rank * width)
    groups = cdiv(width, _GROUP)
    left = torch.empty(3 * rows, groups, dtype=torch.float32, device=scores.device)
    peaks, masses, bests = left.chunk(3)
    tokens = torch.empty_like(slots) if out is None else out
    _look[(rows, groups)](
        scores, slots, state.temperature, peaks, masses, bests.view(torch.int32), width,
        own, rank * width, GROUP=_GROUP,
    )  # fmt: skip
    if ranks is not None:
        peaks, masses, bests = ranks.gather(left).chunk(3)
    _choose[(rows,)](
        scores, slots, *state, peaks, masses, bests.view(torch.int32), tokens, width,
        own, size * groups, rank, size,
        GROUP=_GROUP, GROUPS=next_power_of_2(size * groups),
    )  # fmt: skip
    if ranks is not None and size > 1:
        ranks.max(tokens)
        _record[(cdiv(rows, _RECORDED),)](tokens, slots, state.last_tokens, rows, BLOCK=_RECORDED)
    return tokens

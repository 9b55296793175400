"""Drawing a token from raw logits, in two passes and without a sort.

The first pass reads every logit once and leaves, for each group of tokens, its largest logit, its
mass and its most likely token. The second finds the group where the inverse CDF passes the row's
random number, and then the token in it. Arithmetic as reference.sample: vocabulary order, sums of
groups and tokens in float64, the random number a function of (seed, position) alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_GROUP = 2048


# A step's slots may begin anywhere among its packed numbers: one kernel for all alignments.
@triton.jit(do_not_specialize_on_alignment=["slots"])
def _look(scores, slots, temperature, peaks, masses, bests, vocab, GROUP: tl.constexpr):
    row, group, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    at = group * GROUP + tl.arange(0, GROUP)
    heat = tl.load(temperature + tl.load(slots + row)).to(tl.float32)
    x = tl.load(scores + row.to(tl.int64) * vocab + at, mask=at < vocab, other=-float("inf"))
    x = x.to(tl.float32) / tl.where(heat > 0, heat, 1.0)
    # No comparison with NaN is true: as the largest it would bring an index beyond the row.
    peak, best = tl.max(tl.where(x == x, x, -float("inf")), 0, return_indices=True)
    mass = tl.sum(tl.exp(x - tl.where(peak == -float("inf"), 0.0, peak)), 0)
    tl.store(peaks + row * groups + group, peak)
    tl.store(masses + row * groups + group, mass)
    tl.store(bests + row * groups + group, group * GROUP + best)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _first_above(weights, target, at):
    """Index of the first positive weight whose running sum exceeds target, or the last one's."""
    passed = tl.sum((tl.cumsum(weights, 0) <= target).to(tl.int32), 0)
    return tl.minimum(passed, tl.max(tl.where(weights > 0, at, 0), 0))


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _choose(
    scores, slots, temperature, seeds, prompt_lens, lengths, last_tokens,
    peaks, masses, bests, tokens, vocab, groups,
    GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    group = tl.arange(0, GROUPS)
    peak = tl.load(peaks + row * groups + group, mask=group < groups, other=-float("inf"))
    top, likely = tl.max(peak, 0, return_indices=True)
    slot = tl.load(slots + row)
    heat = tl.load(temperature + slot).to(tl.float32)
    if heat > 0:
        seed = _mix(tl.load(seeds + slot).to(tl.uint64))
        position = tl.load(lengths + slot) - tl.load(prompt_lens + slot)
        step = (position + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
        uniform = (_mix(seed + step) >> 11).to(tl.float64) * (1.0 / 9007199254740992.0)
        mass = tl.load(masses + row * groups + group, mask=group < groups, other=0.0)
        weights = (mass * tl.exp(peak - top)).to(tl.float64)
        target = uniform * tl.sum(weights, 0)
        chosen = _first_above(weights, target, group)
        rest = tl.maximum(target - tl.sum(tl.where(group < chosen, weights, 0.0), 0), 0.0)
        member = tl.arange(0, GROUP)
        at = chosen * GROUP + member
        x = tl.load(scores + row.to(tl.int64) * vocab + at, mask=at < vocab, other=-float("inf"))
        members = tl.exp(x.to(tl.float32) / heat - top).to(tl.float64)
        token = chosen * GROUP + _first_above(members, rest, member)
    else:
        token = tl.load(bests + row * groups + likely)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(last_tokens + slot, token.to(tl.int64))


def sample(
    scores: Tensor,
    slots: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    prompt_lens: Tensor,
    lengths: Tensor,
    last_tokens: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """One token for each row of scores [rows, vocab]; see reference.sample."""
    rows, vocab = scores.shape
    groups = triton.cdiv(vocab, _GROUP)
    peaks = torch.empty(rows, groups, dtype=torch.float32, device=scores.device)
    masses, bests = torch.empty_like(peaks), torch.empty_like(peaks, dtype=torch.int32)
    tokens = torch.empty_like(slots) if out is None else out
    _look[(rows, groups)](
        scores, slots, temperature, peaks, masses, bests, vocab, GROUP=_GROUP,
    )  # fmt: skip
    _choose[(rows,)](
        scores, slots, temperature, seeds, prompt_lens, lengths, last_tokens,
        peaks, masses, bests, tokens, vocab, groups,
        GROUP=_GROUP, GROUPS=triton.next_power_of_2(groups),
    )  # fmt: skip
    return tokens

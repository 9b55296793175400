"""Logits to tokens, on batched tensors: every sampling parameter, and log probabilities.

Owns the order in which parameters act and how a token is drawn. Knows nothing of slots, plans or
the model: it gets logits [rows, vocab] and one SamplingBatch that already speaks of those rows.

Order: logit_bias, min_tokens, masks, penalties, temperature, min_p, top_k, top_p. The three last
only ever find a probability below which tokens are dropped: equal tokens share their fate, and
neither the vocabulary's order nor the rest of the batch decides who is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gllm_engine.ops.reference import draw, uniforms
from gllm_engine.runner.token_history import TokenHistory

# Added to a token that min_tokens forbids. Finite, so that it still is chosen where a mask allows
# nothing else (a grammar that can only end here): all minus infinity would be no distribution.
FORBIDDEN = -1e30
# Rows whose top_k is at most this share a partial sort, others may have to sort the vocabulary.
MAX_PARTIAL_SORT = 1024
# So many scores are ranked, masked or penalized at once: it takes several times their memory.
MAX_AT_ONCE = 2**24


@dataclass(frozen=True)
class Penalties:
    """Presence, frequency and repetition penalties of the m rows that have any."""

    rows: Tensor  # [m] int64, rows of the batch
    history: TokenHistory  # of these rows
    has_repetition: bool  # whether any row has a repetition penalty
    presence: Tensor  # [m] float32
    frequency: Tensor  # [m] float32
    repetition: Tensor  # [m] float32


@dataclass(frozen=True)
class SamplingBatch:
    """How to choose a token for each row; SamplingState fills it.

    Whether any row uses a feature is known to the host, so asking it never waits for a device.
    """

    temperature: Tensor  # [rows] float32; 0: the most likely token
    min_p: Tensor  # [rows] float32
    top_p: Tensor  # [rows] float64
    top_k: Tensor  # [rows] int64, at least 1
    seeds: Tensor  # [rows] int64
    output_lens: Tensor  # [rows] int64: tokens of the output before this one
    has_random: bool
    has_greedy: bool
    has_min_p: bool
    # Groups of rows with top_k or top_p, and how many of the largest scores decide about them.
    truncations: tuple[tuple[Tensor, int], ...] = ()
    # logit_bias and what min_tokens forbids: rows [m], token ids [m, n], what to add [m, n].
    added: tuple[tuple[Tensor, Tensor, Tensor], ...] = ()
    masks: tuple[Tensor, Tensor] | None = None  # rows [m], uint8 [m, bytes]: one bit a token
    penalties: Penalties | None = None


def sample(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """One token for each row [rows] int64. Overwrites `logits` [rows, vocab] float32."""
    _adjust(logits, batch)
    if not batch.has_random:
        return logits.argmax(-1)
    temperature = batch.temperature
    greedy = None
    if batch.has_greedy:
        temperature = torch.where(temperature > 0, temperature, 1.0)
        greedy = logits.argmax(-1)
    weights = logits.div_(temperature[:, None]).softmax(-1)
    if batch.has_min_p:
        weights *= weights >= batch.min_p[:, None] * weights.amax(-1, keepdim=True)
    _truncate(weights, batch)
    tokens = draw(weights, uniforms(batch.seeds, batch.output_lens))
    return tokens if greedy is None else torch.where(batch.temperature > 0, tokens, greedy)


def _adjust(logits: Tensor, batch: SamplingBatch) -> None:
    for rows, ids, values in batch.added:
        logits.index_put_((rows[:, None], ids), values, accumulate=True)
    if batch.masks is not None:
        rows, packed = batch.masks
        for part in _parts(len(rows), logits.shape[1]):
            _mask(logits, rows[part], packed[part])
    if batch.penalties is not None:
        for part in _parts(len(batch.penalties.rows), logits.shape[1]):
            _penalize(logits, batch.penalties, part)


def _parts(num_rows: int, width: int) -> list[slice]:
    """Rows 0 .. num_rows - 1, so many at a time that these have MAX_AT_ONCE numbers of `width`."""
    size = max(1, MAX_AT_ONCE // width)
    return [slice(first, first + size) for first in range(0, num_rows, size)]


def _mask(logits: Tensor, rows: Tensor, packed: Tensor) -> None:
    bits = packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    banned = (bits & 1).flatten(1)[:, : logits.shape[1]] == 0
    logits.index_copy_(0, rows, logits[rows].masked_fill_(banned, -torch.inf))


def _penalize(logits: Tensor, penalties: Penalties, part: slice) -> None:
    """Repetition (Keskar et al. 2019) on prompt and output; the others on the output alone.

    `part`: which of the rows with penalties.
    """
    rows = penalties.rows[part]
    vocab = logits.shape[1]
    scores = logits.index_select(0, rows)
    counts = penalties.history.count_output(part, vocab)
    in_output = counts > 0
    if penalties.has_repetition:
        seen = penalties.history.find_in_prompt(part, vocab).logical_or_(in_output)
        # Products with booleans: on a CPU several times faster than torch.where.
        divisor = seen * penalties.repetition[part, None] + ~seen
        scores = scores.clamp(min=0) / divisor + scores.clamp(max=0) * divisor
    scores -= penalties.frequency[part, None] * counts
    scores -= penalties.presence[part, None] * in_output
    logits.index_copy_(0, rows, scores)


def _truncate(weights: Tensor, batch: SamplingBatch) -> None:
    """Make the weights 0 that top_k and top_p leave out, in rows that have these."""
    for rows, num_ranked in batch.truncations:
        if num_ranked > MAX_PARTIAL_SORT and weights.device.type == "cpu":
            rows = _truncate_peaked(weights, rows, batch)
        for part in _parts(len(rows), num_ranked):
            _truncate_rows(weights, rows[part], num_ranked, batch)


def _truncate_rows(weights: Tensor, rows: Tensor, num_ranked: int, batch: SamplingBatch) -> None:
    chosen = weights.index_select(0, rows)
    if num_ranked < weights.shape[1]:
        ranked = chosen.topk(num_ranked).values
    else:
        ranked = chosen.sort(descending=True).values
    lowest = _lowest_kept(ranked, batch.top_k[rows], batch.top_p[rows], None)
    weights.index_copy_(0, rows, chosen.mul_(chosen >= lowest))


def _truncate_peaked(weights: Tensor, rows: Tensor, batch: SamplingBatch) -> Tensor:
    """Do those rows whose top_p mass lies in a few tokens; returns the rest.

    Which rows these are must be looked at: free on a CPU, where sorting is what costs.
    """
    chosen = weights.index_select(0, rows)
    top_k = batch.top_k[rows]
    top_p = batch.top_p[rows]
    ranked = chosen.topk(MAX_PARTIAL_SORT).values
    total = chosen.sum(-1).double()
    enough = (ranked.double().sum(-1) > top_p * total) & (top_k >= weights.shape[1])
    lowest = _lowest_kept(ranked, top_k, top_p, total).masked_fill_(~enough[:, None], 0)
    weights.index_copy_(0, rows, chosen.mul_(chosen >= lowest))
    return rows[~enough]


def _lowest_kept(ranked: Tensor, top_k: Tensor, top_p: Tensor, total: Tensor | None) -> Tensor:
    """[rows, 1]: the smallest weight to keep, from the n largest, ranked [rows, n].

    top_p keeps the shortest run of the top_k whose mass reaches it, the most likely token always
    (nucleus sampling, Holtzman et al. 2019). `total`: the mass top_p is a share of, by default
    that of the top_k. float64, so that n, which the batch decides, never moves a boundary.
    """
    within = torch.arange(ranked.shape[1], device=ranked.device) < top_k[:, None]
    counted = ranked.double() * within
    running = counted.cumsum(-1)
    mass = torch.where(top_p < 1, top_p * (running[:, -1] if total is None else total), torch.inf)
    kept = (running - counted < mass[:, None]) & within
    last = kept.sum(-1, keepdim=True).clamp_(min=1) - 1
    return ranked.gather(1, last)


def log_probabilities(logits: Tensor, tokens: Tensor, num_top: int) -> tuple[Tensor, ...]:
    """Token ids, log probabilities and ranks, each [rows, 1 + num_top], of the raw logits.

    Column 0 is `tokens` [rows], the others the most likely tokens (fewer if the vocabulary is
    smaller). Rank 1 is the most likely; tokens of equal probability share the better rank.
    """
    scores = logits.log_softmax(-1)
    actual = scores.gather(1, tokens[:, None])
    rank = (scores > actual).sum(-1, keepdim=True) + 1
    top = scores.topk(min(num_top, scores.shape[1]))
    ranks = torch.arange(1, top.indices.shape[1] + 1, device=logits.device).expand_as(top.indices)
    return (
        torch.cat([tokens[:, None], top.indices], 1),
        torch.cat([actual, top.values], 1),
        torch.cat([rank, ranks], 1),
    )

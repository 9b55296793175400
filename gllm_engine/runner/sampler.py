"""Samples tokens from logits on batched tensors: all sampling parameters, and log probabilities.

Owns the order in which parameters act and the draw of a token. Knows nothing of slots, plans or the
model: its inputs are logits [rows, vocab] and one SamplingBatch for the same rows.

Order: logit_bias, min_tokens, masks, penalties, temperature, min_p, top_k, top_p. Each of the last
three computes a threshold and drops the tokens of lower probability. So tokens of equal probability
are all kept or all dropped, and neither the vocabulary's order nor the other rows of the batch
change the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gllm_engine.ops.reference import draw, uniforms
from gllm_engine.runner.token_history import TokenHistory

# Added to the logit of a token that min_tokens forbids. It is finite, so that such a token is still
# sampled if the mask allows no other token (a grammar that can only end here): a row of only minus
# infinity has no distribution.
FORBIDDEN = -1e30
# Rows with top_k up to this share a partial sort; other rows may sort the whole vocabulary.
MAX_PARTIAL_SORT = 1024
# Most logits ranked, masked or penalized at once: temporaries take several times their memory.
MAX_AT_ONCE = 2**24
# Most logits of prompt positions computed at once.
MAX_SCORED_LOGITS = 2**24


@dataclass(frozen=True)
class Penalties:
    """Presence, frequency and repetition penalties of the m rows that have a penalty."""

    rows: Tensor  # [m] int64, rows of the batch
    history: TokenHistory  # of these rows
    has_repetition: bool  # whether any row has a repetition penalty
    presence: Tensor  # [m] float32
    frequency: Tensor  # [m] float32
    repetition: Tensor  # [m] float32


@dataclass(frozen=True)
class SamplingBatch:
    """The sampling parameters of each row; SamplingState fills them.

    The has_... fields are host values, so reading them never waits for the device.
    """

    temperature: Tensor  # [rows] float32; 0: greedy
    min_p: Tensor  # [rows] float32
    top_p: Tensor  # [rows] float64
    top_k: Tensor  # [rows] int64, at least 1
    seeds: Tensor  # [rows] int64
    output_lens: Tensor  # [rows] int64: tokens of the output before this one
    has_random: bool
    has_greedy: bool
    has_min_p: bool
    # Groups of rows [m] with top_k or top_p, and how many of the largest weights to rank for each.
    truncations: tuple[tuple[Tensor, int], ...] = ()
    # logit_bias, and tokens that min_tokens forbids: rows [m], token ids [m, n], addends [m, n].
    added: tuple[tuple[Tensor, Tensor, Tensor], ...] = ()
    masks: tuple[Tensor, Tensor] | None = None  # rows [m], uint8 [m, bytes]: one bit per token
    penalties: Penalties | None = None


def sample(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Sample one token per row: [rows] int64. Overwrites `logits` [rows, vocab] float32."""
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
    """Slices of rows 0 .. num_rows - 1, each of at most MAX_AT_ONCE / `width` rows, at least 1."""
    size = max(1, MAX_AT_ONCE // width)
    return [slice(first, first + size) for first in range(0, num_rows, size)]


def _mask(logits: Tensor, rows: Tensor, packed: Tensor) -> None:
    bits = packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    banned = (bits & 1).flatten(1)[:, : logits.shape[1]] == 0
    logits.index_copy_(0, rows, logits[rows].masked_fill_(banned, -torch.inf))


def _penalize(logits: Tensor, penalties: Penalties, part: slice) -> None:
    """Apply the repetition penalty (Keskar et al. 2019) to tokens of prompt and output, and the
    presence and frequency penalties to tokens of the output alone.

    `part`: a slice of the rows in `penalties`.
    """
    rows = penalties.rows[part]
    vocab = logits.shape[1]
    scores = logits.index_select(0, rows)
    counts = penalties.history.count_output(part, vocab)
    in_output = counts > 0
    if penalties.has_repetition:
        seen = penalties.history.find_in_prompt(part, vocab).logical_or_(in_output)
        # Products with booleans are several times faster than torch.where on a CPU.
        divisor = seen * penalties.repetition[part, None] + ~seen
        scores = scores.clamp(min=0) / divisor + scores.clamp(max=0) * divisor
    scores -= penalties.frequency[part, None] * counts
    scores -= penalties.presence[part, None] * in_output
    logits.index_copy_(0, rows, scores)


def _truncate(weights: Tensor, batch: SamplingBatch) -> None:
    """Set the weights of tokens outside top_k or top_p to 0, in rows that have either."""
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
    """Truncate the rows whose top_p mass lies in their MAX_PARTIAL_SORT largest weights.

    Returns the other rows. Indexing by a boolean waits for the device: that is free on a CPU, where
    sorting is the expensive part.
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
    """[rows, 1]: the smallest weight to keep. `ranked`: [rows, n] the n largest, descending.

    top_p keeps the shortest prefix of the top_k weights whose mass reaches top_p * total, but at
    least the most likely token (nucleus sampling, Holtzman et al. 2019). `total`: [rows], default
    the mass of the top_k. Sums are float64: n depends on the batch and must not move the threshold.
    """
    within = torch.arange(ranked.shape[1], device=ranked.device) < top_k[:, None]
    counted = ranked.double() * within
    running = counted.cumsum(-1)
    mass = torch.where(top_p < 1, top_p * (running[:, -1] if total is None else total), torch.inf)
    kept = (running - counted < mass[:, None]) & within
    last = kept.sum(-1, keepdim=True).clamp_(min=1) - 1
    return ranked.gather(1, last)


def scored_at_once(vocab: int) -> int:
    """The most prompt positions whose logits, [positions, vocab], are computed at once."""
    return max(1, MAX_SCORED_LOGITS // vocab)


def log_probabilities(logits: Tensor, tokens: Tensor, num_top: int) -> tuple[Tensor, ...]:
    """Token ids, log probabilities and ranks, each [rows, 1 + num_top], of raw `logits`.

    Column 0 is for `tokens` [rows], the other columns for the most likely tokens (fewer if the
    vocabulary is smaller). Rank 1 is the most likely token. In column 0, tokens of equal
    probability share the better rank.
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

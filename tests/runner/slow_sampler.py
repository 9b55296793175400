"""The sampler's slow twin: one row at a time, in plain float64, from the published definitions."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from gllm_engine.sampling import SamplingParams

MASK64 = 2**64 - 1


@dataclass(frozen=True)
class SlowRow:
    """One sequence about to get a token."""

    sampling: SamplingParams
    seed: int = 0
    prompt: list[int] = field(default_factory=lambda: [0])
    output: list[int] = field(default_factory=list)
    mask: bytes | None = None


def uniform(seed: int, position: int) -> float:
    """Splitmix64 in plain integers."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
        return x ^ (x >> 31)

    start = mix(seed & MASK64)
    return (mix((start + (position + 1) * 0x9E3779B97F4A7C15) & MASK64) >> 11) / 2**53


def adjusted(logits: np.ndarray, row: SlowRow, eos: tuple[int, ...]) -> np.ndarray:
    """Logits after bias, min_tokens, mask and penalties."""
    x, s = logits.astype(np.float64).copy(), row.sampling
    for token, bias in s.logit_bias.items():
        x[token] += bias
    if len(row.output) < s.min_tokens:
        for token in (*eos, *s.stop_token_ids):
            x[token] = -1e30
    if row.mask is not None:
        for token in range(len(x)):
            if not row.mask[token // 8] >> (token % 8) & 1:
                x[token] = -np.inf
    for token in range(len(x)):
        if token in row.prompt or token in row.output:
            x[token] = (
                x[token] / s.repetition_penalty
                if x[token] > 0
                else (x[token] * s.repetition_penalty)
            )
        count = row.output.count(token)
        x[token] -= s.frequency_penalty * count + s.presence_penalty * (count > 0)
    return x


def distribution(x: np.ndarray, sampling: SamplingParams, slack: float = 0.0) -> np.ndarray:
    """Probabilities after temperature, min_p, top_k, top_p; `slack` moves the two boundaries."""
    scores = (x - x.max()) / sampling.temperature
    weights = np.exp(scores)
    weights[weights < min(1.0, sampling.min_p * (1 + slack))] = 0
    scores = np.where(weights > 0, scores, -np.inf)
    top_k = min(sampling.top_k, len(x)) if sampling.top_k > 0 else len(x)
    ranked = np.sort(scores)[::-1][:top_k]
    lowest = ranked[-1]
    if sampling.top_p < 1:
        mass = np.exp(ranked) / np.exp(ranked).sum()
        before = mass.cumsum() - mass
        num_kept = max(1, int((before < sampling.top_p + slack).sum()))
        lowest = ranked[num_kept - 1]
    weights = np.where(scores >= lowest, weights, 0)
    return weights / weights.sum()


def acceptable(logits: np.ndarray, row: SlowRow, eos: tuple[int, ...] = ()) -> set[int]:
    """The tokens a correct sampler may return: one, or two where float32 may round either way."""
    # Scores that are equal in float32 are tied, however little a penalty lies between them.
    x = adjusted(logits, row, eos).astype(np.float32).astype(np.float64)
    if row.sampling.temperature < 1e-5:
        return set(np.flatnonzero(x >= x.max() - 1e-4 * max(1, abs(x.max()))).tolist())
    found: set[int] = set()
    for slack in (-1e-5, 0.0, 1e-5):
        p = distribution(x, row.sampling, slack)
        ends = p.cumsum()
        u = uniform(row.seed, len(row.output))
        found |= {
            int(i) for i in np.flatnonzero((ends >= u - 1e-5) & (ends - p <= u + 1e-5) & (p > 0))
        }
    return found

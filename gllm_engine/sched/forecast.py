"""Predicts the lengths of outputs, and the most memory that decoding sequences will need at a time.

This module owns the statistics of outputs that have ended. It knows nothing of pages or plans.
"""

from __future__ import annotations

from collections.abc import Iterable

_KEPT = 0.995  # the effective number of outputs is then 200
_PRIOR = 256.0  # tokens of one output before the first, at its full length


class Outputs:
    """The outputs that have ended, and the share of their allowed length that they had."""

    def __init__(self) -> None:
        self._count = 1.0
        self._tokens = self._allowed = _PRIOR

    def observe(self, tokens: int, allowed: int) -> None:
        """Learn from one output: it has `tokens` of at most `allowed` tokens, which is above 0."""
        self._count = _KEPT * self._count + 1
        self._tokens = _KEPT * self._tokens + tokens
        self._allowed = _KEPT * self._allowed + allowed

    @property
    def mean(self) -> float:
        """Tokens of an output."""
        return self._tokens / self._count

    @property
    def share(self) -> float:
        """Tokens of an output by its allowed tokens, 0..1.

        A sequence is predicted to take this share of the tokens still allowed to it. That is exact
        if outputs always have their full length. If most end long before it, the rest hardly
        depends on what a sequence has already made, as if each token were the last one with the
        same probability.
        """
        return self._tokens / self._allowed


def growth(sequences: Iterable[tuple[float, float]]) -> float:
    """By how many tokens the sequences will exceed what they hold now, at the worst moment.

    `sequences`: (tokens held, tokens still to come). Each takes a token a step, and gives all of
    its tokens back at its end. TD-Pipe (arXiv 2506.10470, §3.3) predicts memory in the same way.
    """
    held = peak = 0.0
    ordered = sorted(sequences, key=lambda each: each[1], reverse=True)
    for count, (tokens, rest) in enumerate(ordered, 1):
        held += tokens
        peak = max(peak, held + count * rest)  # `rest` steps from now these `count` are left
    return peak - held

"""Predicts a step's time as a linear function of its work, and learns the function from steps.

This module owns the counts that a step's time depends on, and the fit. It knows nothing of
sequences, plans or policies. The time is that of the slowest pipeline stage, which sets the pace.
"""

from __future__ import annotations

from math import sqrt
from operator import mul
from typing import NamedTuple

_KEPT = 0.995  # the effective number of observations is then 200
# Weight of the prior, in observations; it never decays. The prior determines those coefficients
# that similar steps cannot tell apart.
_PRIOR_WEIGHT = 0.01


class Work(NamedTuple):
    """The work of a step, summed over its rows. A row computes `n` tokens from position `s`.

    `context` and `kv` differ, because a chunk loads K and V once for all its tokens. Decode time
    depends on `kv` (memory), and prefill time on `context` (arithmetic).
    """

    tokens: int  # n
    context: int  # tokens attended to, over all tokens computed: n s + n (n + 1) / 2
    kv: int  # tokens whose K and V are loaded: s + n
    sequences: int  # 1 per row

    @staticmethod
    def row(start: int, count: int) -> Work:
        """The work of one row: `count` tokens from position `start`."""
        return Work(count, count * start + count * (count + 1) // 2, start + count, 1)

    def plus(self, *more: Work) -> Work:
        return Work(*map(sum, zip(self, *more, strict=True)))


class CostModel(NamedTuple):
    """Seconds of an empty step, and seconds per unit of Work. No coefficient is negative."""

    step: float
    token: float = 0.0
    context: float = 0.0
    kv: float = 0.0
    sequence: float = 0.0

    def rows(self, work: Work) -> float:
        """Seconds that rows add to a step."""
        return sum(map(mul, self[1:], work), 0.0)

    def seconds(self, work: Work) -> float:
        """Seconds of a whole step."""
        return self.step + self.rows(work)

    def longest(self, start: int, seconds: float, most: int) -> int:
        """Token count of the longest row from position `start` within `seconds`; at most `most`."""
        if most <= 0 or self.rows(Work.row(start, most)) <= seconds:
            return most
        # Solves rows(Work.row(start, n)) = seconds for n, in the form that allows context == 0.
        half = self.context / 2
        linear = self.token + self.kv + self.context * start + half
        rest = seconds - self.sequence - self.kv * start
        if rest <= 0:
            return 0
        return min(most, int(2 * rest / (linear + sqrt(linear * linear + 4 * half * rest))))


# Roughly an 8-billion-parameter stage on an H100. Used until the first observation.
PRIOR = CostModel(step=5e-3, token=25e-6, context=1e-9, kv=2e-8, sequence=5e-6)


class Fit:
    """Fits a CostModel to the last few hundred steps.

    Recursive least squares with forgetting (Ljung, System Identification, 2nd ed., section 11.2)
    in information form: it keeps sums of products of the observations, and not their inverse,
    which grows without bound when all observations are alike. Coordinate descent finds the
    coefficients, which are not negative, in units of the prior's. Errors are relative to the
    step's observed or predicted time, whichever is larger, so neither a delayed step nor a long
    step outweighs the others. The first observation scales the prior to the machine's speed, so
    only the prior's proportions matter.
    """

    def __init__(self, prior: CostModel = PRIOR, kept: float = _KEPT) -> None:
        """`kept`: the factor by which each observation reduces the weight of older ones."""
        self.model = prior
        self._prior = prior
        self._kept = kept
        self._observed = False
        size = range(len(prior))
        self._scale = [1.0 for _ in size]  # in units of the prior's coefficients
        self._products = [[_PRIOR_WEIGHT * (i == j) for j in size] for i in size]
        self._targets = [_PRIOR_WEIGHT for _ in size]

    def observe(self, work: Work, seconds: float) -> None:
        """Learn from one step: it did `work` in `seconds`, which must be above 0."""
        if not self._observed:
            self._observed = True
            ratio = seconds / self._prior.seconds(work)
            self._prior = self.model = CostModel(*(ratio * c for c in self._prior))
        unit = max(seconds, self.model.seconds(work))
        parts = [c * x / unit for c, x in zip(self._prior, (1, *work), strict=True)]
        target = seconds / unit
        kept = self._kept
        again = (1 - self._kept) * _PRIOR_WEIGHT
        for i, (part, row) in enumerate(zip(parts, self._products, strict=True)):
            row[:] = [kept * old + part * other for old, other in zip(row, parts, strict=True)]
            row[i] += again
            self._targets[i] = kept * self._targets[i] + part * target + again
        scale = self._scale
        for i, row in enumerate(self._products):  # one sweep per step
            error = self._targets[i] - sum(map(mul, row, scale))
            scale[i] = max(0.0, scale[i] + error / row[i])
        self.model = CostModel(*map(mul, scale, self._prior))

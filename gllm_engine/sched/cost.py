"""How long a step takes, as a linear function of what it computes; learned while steps run.

Owns the counts that a step's time depends on and the arithmetic between both. Knows nothing of
sequences, plans or policies. The time is that of one stage; of a pipeline's stages any will do,
for they are about equal, and policies only compare.
"""

from __future__ import annotations

from math import sqrt
from operator import mul
from typing import NamedTuple

_KEPT = 0.995  # so observations count as much as 200
# The prior counts as much as so many observations, always: that holds what steps that all look
# alike say nothing of.
_PRIOR_WEIGHT = 0.01


class Work(NamedTuple):
    """What a step computes: sums over its rows. A row computes `n` tokens from position `s`.

    `context` and `kv` differ, because a chunk loads K and V once for all its tokens: what
    decoding costs is `kv` (memory), what chunks cost is `context` (arithmetic).
    """

    tokens: int  # n
    context: int  # tokens attended to, over all tokens computed: n s + n (n + 1) / 2
    kv: int  # tokens whose K and V are loaded: s + n
    sequences: int  # 1: a row is a sequence's

    @staticmethod
    def row(start: int, count: int) -> Work:
        """Of one row: `count` tokens from position `start`."""
        return Work(count, count * start + count * (count + 1) // 2, start + count, 1)

    def plus(self, *more: Work) -> Work:
        return Work(*map(sum, zip(self, *more, strict=True)))


class CostModel(NamedTuple):
    """Seconds of a step, and seconds more for each unit of Work; none is below 0."""

    step: float
    token: float = 0.0
    context: float = 0.0
    kv: float = 0.0
    sequence: float = 0.0

    def rows(self, work: Work) -> float:
        """Seconds that rows add to a step, or take of it."""
        return sum(map(mul, self[1:], work), 0.0)

    def seconds(self, work: Work) -> float:
        """Of a whole step."""
        return self.step + self.rows(work)

    def longest(self, start: int, seconds: float, most: int) -> int:
        """Tokens from position `start`, at most `most`, of the longest row within `seconds`."""
        if most <= 0 or self.rows(Work.row(start, most)) <= seconds:
            return most
        # The n of rows(Work.row(start, n)) = seconds, in the form that stands a context of 0.
        half = self.context / 2
        linear = self.token + self.kv + self.context * start + half
        rest = seconds - self.sequence - self.kv * start
        if rest <= 0:
            return 0
        return min(most, int(2 * rest / (linear + sqrt(linear * linear + 4 * half * rest))))


# About an 8-billion-parameter stage on an H100. Only what holds until the first observations.
PRIOR = CostModel(step=5e-3, token=25e-6, context=1e-9, kv=2e-8, sequence=5e-6)


class Fit:
    """The CostModel that explains the last few hundred steps best.

    Recursive least squares with forgetting (Ljung, System Identification, 2nd ed., section 11.2)
    in information form: sums of products of the observations, not an inverse that winds up when
    all look alike. The coefficients are found by coordinate descent with none below 0, in units of
    the prior's. Errors count relative to the step's time, observed or predicted, whichever is the
    larger: so neither a step that was held up nor a long one outweighs the others. The first
    observation says how fast the machine is, so of the prior only the proportions matter.
    """

    def __init__(self, prior: CostModel = PRIOR, kept: float = _KEPT) -> None:
        """`kept`: the share of what observations count that is left after one more."""
        self.model = prior
        self._prior = prior
        self._kept = kept
        self._observed = False
        size = range(len(prior))
        self._scale = [1.0 for _ in size]  # of the prior's coefficients
        self._products = [[_PRIOR_WEIGHT * (i == j) for j in size] for i in size]
        self._targets = [_PRIOR_WEIGHT for _ in size]

    def observe(self, work: Work, seconds: float) -> None:
        """Take in that a step of this work took so long; `seconds` must be above 0."""
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
        for i, row in enumerate(self._products):  # one sweep: the next step brings the next
            error = self._targets[i] - sum(map(mul, row, scale))
            scale[i] = max(0.0, scale[i] + error / row[i])
        self.model = CostModel(*map(mul, scale, self._prior))

"""What a pipeline stage's step costs, fitted to measured steps.

This module knows neither timelines nor simulated time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from operator import mul

import numpy as np

from gllm_engine import Work

Cost = Callable[[Work], float]  # seconds
Steps = Sequence[tuple[Work, float]]  # with seconds

_ROUNDS = 5
# A step that took more than so many times what is predicted counts as one that took that long.
_MOST_DELAY = 3.0
_MOST_ERROR = 0.25  # squared, of a step, where costs are compared
_KNEES = (0.0, *(2.0 ** (i / 2) for i in range(27)))  # tokens
# A larger knee must reduce the error by this share. Steps that are all larger tell nothing of it.
_LEAST_GAIN = 0.01


def fit_cost(steps: Steps) -> Cost:
    """The cost of a stage's step: linear in its work, but for two knees in the number of tokens.

    Reading all weights takes as long for one token as for many, so up to the first knee they cost
    nothing. Up to the second one they cost more, as each has weights of its own, those of experts.

    Raises ValueError if there is no step.
    """
    if not steps:
        raise ValueError("there are no measured steps")
    knees: tuple[float, ...] = (0.0, 0.0)
    least, factors = _fit(steps, knees)
    for which, knee in product((0, 1), _KNEES):
        tried = (*knees[:which], knee, *knees[which + 1 :])
        error, found = _fit(steps, tried)
        if error < least * (1 - _LEAST_GAIN):
            least = error
            factors = found
            knees = tried
    return lambda work: sum(map(mul, factors, _parts(work, knees)))


def _parts(work: Work, knees: tuple[float, ...]) -> tuple[float, ...]:
    """What a step's time is a sum of. Steps with prompts are launched in another way."""
    first, second = knees
    tokens = work.tokens
    has_prompts = tokens > work.sequences
    return 1.0, has_prompts, max(first, tokens), min(second, tokens), *work[1:]


def _fit(steps: Steps, knees: tuple[float, ...]) -> tuple[float, list[float]]:
    """Least squares of errors relative to the prediction, with no factor below 0.

    Relative to what was measured, delayed steps would count for less than quick ones, and the
    mean would be too small. Returns the error and a factor for each of `_parts`.
    """
    rows = np.array([_parts(work, knees) for work, _ in steps], float)
    scale = np.maximum(rows.max(0), 1.0)
    rows /= scale
    seconds = np.array([each for _, each in steps])
    unit = seconds
    for _ in range(_ROUNDS):
        kept = list(range(len(scale)))
        while True:
            part = rows[:, kept] / unit[:, None]
            found = np.zeros(len(scale))
            found[kept] = np.linalg.lstsq(part, seconds / unit, rcond=None)[0]
            if found[kept].min() >= 0:
                break
            del kept[found[kept].argmin()]
        unit = np.maximum(rows @ found, seconds / _MOST_DELAY)
    errors = ((seconds - rows @ found) / unit) ** 2
    return float(np.minimum(errors, _MOST_ERROR).sum()), (found / scale).tolist()

"""Which rates to measure to find the highest one within an SLO, and which one that is.

This module knows nothing of what is measured, or how.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile

from gllm_benchmarks.record import Figures

Runs = dict[str, Figures]  # load -> the figures of serve.summarize(), and the rate


def search(
    send: Callable[[list[float]], Runs], rates: list[float], share: float, within: float
) -> Runs:
    """The runs at `rates`, ascending, up to the first that misses the SLO, then by bisection.

    `send`: measures one load for each of some rates. A rate is good if `share` of its requests meet
    the SLO. Bisection ends when the lowest rate that is not good exceeds the highest good one by
    the fraction `within` at most. It does not begin without a good one, or without a bad one.
    """
    runs: Runs = {}

    def is_good(rate: float) -> bool:
        ((load, run),) = send([rate]).items()
        runs[load] = run | {"rate": rate}
        return bool(run["goodput"]["share"] >= share)

    rates = sorted(rates)
    good = list(takewhile(is_good, rates))
    if good and len(good) < len(rates):
        low = good[-1]
        high = rates[len(good)]
        while high > low * (1 + within):
            middle = (low + high) / 2
            if is_good(middle):
                low = middle
            else:
                high = middle
    return runs


def served_rate(runs: Runs, share: float) -> float | None:
    """The highest rate up to which `share` of requests meet the SLO at every rate."""
    by_rate = sorted(runs.values(), key=lambda run: run["rate"])
    good = takewhile(lambda run: run["goodput"]["share"] >= share, by_rate)
    return max((run["rate"] for run in good), default=None)

"""Which rates a sweep measures, and which one it tells, against what is known of the server."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_benchmarks.rates import Runs, search, served_rate


class Known:
    """A server that serves `limit` requests/s within the SLO, and notes the rates asked of it."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.asked: list[float] = []

    def send(self, rates: list[float]) -> Runs:
        self.asked += rates
        return {f"{r:g} requests/s": {"goodput": {"share": float(r <= self.limit)}} for r in rates}


@pytest.mark.parametrize(
    ("limit", "asked", "served"),
    [
        # Up to the first that is too fast, then halves of what is left until it is 10 % at most.
        (11.0, [4, 8, 16, 12, 10, 11], 11.0),
        (8.2, [4, 8, 16, 12, 10, 9, 8.5], 8.0),
        (15.9, [4, 8, 16, 12, 14, 15], 15.0),
        (100.0, [4, 8, 16, 32], 32.0),  # more was not asked
        (3.9, [4], None),
        (4.0, [4, 8, 6, 5, 4.5, 4.25], 4.0),
    ],
)
def test_bisection_by_hand(limit: float, asked: list[float], served: float | None) -> None:
    known = Known(limit)
    runs = search(known.send, [16, 4, 32, 8], share=0.95, within=0.1)
    assert known.asked == asked
    assert [run["rate"] for run in runs.values()] == asked
    assert list(runs) == [f"{rate:g} requests/s" for rate in asked]
    assert served_rate(runs, 0.95) == served


@given(
    limit=st.floats(1, 100),
    rates=st.lists(st.floats(1, 100), min_size=1, max_size=6),
    within=st.sampled_from([0.01, 0.05, 0.5]),
)
def test_the_rate_is_as_near_as_asked(limit: float, rates: list[float], within: float) -> None:
    served = served_rate(search(Known(limit).send, rates, 0.9, within), 0.9)
    if served is None:
        assert limit < min(rates)
    else:
        assert served <= limit
        assert served == max(rates) or limit < served * (1 + within)


def test_a_share_is_enough() -> None:
    def send(rates: list[float]) -> Runs:
        (rate,) = rates
        return {f"{rate:g}": {"goodput": {"share": 1 - rate / 100}}}

    assert served_rate(search(send, [2, 20], 0.9, 0.01), 0.9) == pytest.approx(10, rel=0.01)
    assert served_rate(search(send, [2, 20], 0.95, 0.01), 0.95) == pytest.approx(5, rel=0.01)


def test_the_rate_that_is_served() -> None:
    def runs(**shares: float) -> dict[str, dict[str, Any]]:
        return {
            name: {"rate": float(name[1:]), "goodput": {"share": share}}
            for name, share in shares.items()
        }

    assert served_rate(runs(r2=1.0, r4=0.95, r8=0.5), 0.9) == 4
    assert served_rate(runs(r8=0.9, r2=1.0, r4=0.8), 0.9) == 2  # not 8, where 4 is not
    assert served_rate(runs(r2=0.8), 0.9) is None

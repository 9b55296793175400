"""Predicted lengths and memory against small cases by hand, and against a count of every step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_engine.sched.forecast import Outputs, growth


@pytest.mark.parametrize(
    ("sequences", "expected"),
    [
        ([], 0),
        ([(100, 50)], 50),
        ([(100, 50), (200, 50)], 100),  # both at their ends
        ([(100, 50), (10, 80)], 100),  # 210 after 50 steps, of 110; 90 after 80
        ([(100, 10), (10, 200)], 100),  # when the first has long ended: 210 of 110
        ([(500, 10), (10, 200)], 20),  # the first at its end
        ([(100, 0), (100, 0)], 0),
    ],
)
def test_growth_by_hand(sequences: list[tuple[float, float]], expected: float) -> None:
    assert growth(sequences) == expected


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 60)), max_size=20))
def test_growth_is_that_of_the_worst_step(sequences: list[tuple[int, int]]) -> None:
    held = [sum(tokens + step for tokens, rest in sequences if rest >= step) for step in range(61)]
    assert growth(sequences) == max(held) - held[0]


def test_outputs() -> None:
    outputs = Outputs()
    assert (outputs.mean, outputs.share) == (256, 1)  # nothing is known: all are of full length
    outputs.observe(10, 100)
    assert outputs.mean == pytest.approx((0.995 * 256 + 10) / 1.995)
    assert outputs.share == pytest.approx((0.995 * 256 + 10) / (0.995 * 256 + 100))
    for _ in range(2000):
        outputs.observe(30, 120)
    assert outputs.mean == pytest.approx(30, rel=1e-3)
    assert outputs.share == pytest.approx(0.25, rel=1e-3)

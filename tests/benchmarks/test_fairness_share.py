"""The fairness benchmark counts only time in which both tenants had requests waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from gllm_benchmarks import fairness

WEIGHTS = {"many": 1.0, "few": 3.0}


def measure(looks: Iterator[list[float]], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`looks`: requests of both tenants that wait, and tokens of both so far."""

    async def never(tenant: str) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(fairness, "LOOK_S", 0.0)
    monkeypatch.setattr(fairness, "metric_sums", lambda *_: next(looks))
    return asyncio.run(fairness.share(never, "", WEIGHTS, 0, 5000))


def test_a_measurement_begins_again_when_a_queue_was_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = [
        [100, 0, 0, 0],  # the queues fill
        [400, 40, 100, 100],
        [400, 2, 900, 700],
        [400, 40, 1000, 900],  # between this look and the last one a queue may have been empty
        [400, 10, 1500, 1000],
        [400, 40, 2000, 3000],
        [400, 40, 3000, 6000],
        [400, 40, 4000, 9000],
    ]
    found = measure(iter(looks), monkeypatch)
    assert found["tokens"] == {"many": 2000, "few": 6000}
    assert found["few_to_many_by_weight"] == 1


def test_queues_that_do_not_fill_give_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness, "FILL_S", 0.0)
    with pytest.raises(RuntimeError, match=r"the queues hold \[400\.  *2\.\] after 0 s"):
        measure(iter([[400.0, 2.0, 0.0, 0.0]] * 9), monkeypatch)

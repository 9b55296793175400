"""Measures whether tenants get their weights: scripts/bench fairness.

A tritonserver whose engine answers at once serves two tenants, of which `many` keeps ten times as
many requests alive as `few`. Weights share out the tokens only while requests of both wait in the
engine. So answers are long and come whole: they cost clients and front ends little, and requests
are in the queue again long before it is empty. Every look at the metrics proves that no queue has
been empty since the look before it; else the measurement begins again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from gllm_benchmarks.record import Figures, make_parser, number, print_table, record
from gllm_benchmarks.served_model import MODEL, SHIPPED, metric_sums, server
from gllm_client import Client

ALIVE = {"many": 400, "few": 40}  # requests of each tenant
# The weights of both.
CASES = {
    "1 : 1": {"many": 1.0, "few": 1.0},
    "1 : 3": {"many": 1.0, "few": 3.0},
    "3 : 1": {"many": 3.0, "few": 1.0},
}
SLOTS = 2  # sequences that run at a time
ENGINE: dict[str, Any] = {"device": "none", "max_num_seqs": SLOTS}
OUTPUT_LEN = 1000
ASKED: dict[str, Any] = {"input_ids": [7] * 8, "max_tokens": OUTPUT_LEN, "ignore_eos": True}
SUMS = [*product(("tenant_requests_waiting", "tenant_decode_tokens"), ('"many"', '"few"'))]
LOOK_S = 0.1  # between looks at the metrics; the server writes them as often
TRIES = 5  # measurements
FILL_S = 240.0  # within which half of the requests alive have to wait in the queues
HEADER = ["weights of many : few", "tokens of many", "of few", "few : many by weight"]


async def share(
    ask: Callable[..., Awaitable[Any]],
    metrics: str,
    weights: dict[str, float],
    seconds: float,
    tokens: int,
) -> Figures:
    """The figures of that time, and of that many output tokens, at least.

    `ask`: gets a whole answer; its argument `tenant` says for whom. `metrics`: the server's, as
    host:port. If a queue may have been empty, as when clients wait for a processor, the measurement
    begins again. Raises RuntimeError after TRIES of them or if the queues do not fill within FILL_S
    seconds, and what `ask` raises.
    """

    async def keep_asking(tenant: str) -> None:
        while True:
            await ask(tenant=tenant)

    alive = [tenant for tenant, count in ALIVE.items() for _ in range(count)]
    asking = asyncio.gather(*map(keep_asking, alive))
    last: Any = None
    got = np.zeros(2)
    since = time.monotonic()
    tries = 1
    try:
        while last is None or time.monotonic() < since + seconds or got.sum() < tokens:
            await asyncio.wait([asking], timeout=LOOK_S)
            if asking.done():
                await asking  # raises: nothing but an error ends it
            now = np.reshape(metric_sums(metrics, *SUMS), (2, 2))
            if last is not None:
                more = now[1] - last[1]
                # Whoever was admitted since the last look still runs, or has got a whole answer.
                admitted = SLOTS + 1 + more.sum() / OUTPUT_LEN
                if min(last[0]) <= admitted:
                    told = f"of {last[0]} that waited, up to {admitted:g} ran before the next look"
                    if tries == TRIES:
                        raise RuntimeError(f"a tenant's queue may have been empty: {told}")
                    tries += 1
                    last = None
                    since = time.monotonic()
                    continue
                got += more
            elif min(now[0] / [*ALIVE.values()]) < 0.5:
                if time.monotonic() > since + FILL_S:
                    raise RuntimeError(f"the queues hold {now[0]} after {FILL_S:g} s")
                continue
            else:
                since = time.monotonic()
                got[:] = 0
            last = now
        seconds = time.monotonic() - since
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    many, few = got / [*weights.values()]
    shares = dict(zip(weights, got.tolist(), strict=True))
    return {"seconds": seconds, "tokens": shares, "few_to_many_by_weight": few / many}


async def measure(seconds: float) -> Figures:
    """The figures of every case, each with a server of its own."""
    found = {}
    for case, weights in CASES.items():
        with server(SHIPPED, 1, {}, ENGINE | {"tenant_weights": weights}) as addresses:
            async with Client(addresses.grpc, MODEL) as client:
                ask = partial(client.complete, **ASKED)
                found[case] = await share(ask, addresses.metrics, weights, seconds, 0)
    return found


def rows(figures: Figures) -> list[list[Any]]:
    return [
        [
            case,
            *(f"{n:,.0f}" for n in run["tokens"].values()),
            f"{run['few_to_many_by_weight']:.3f}",
        ]
        for case, run in figures.items()
    ]


def main() -> None:
    parser = make_parser("fairness", __doc__)
    parser.add_argument("--seconds", type=number(float, 0, 3600), default=60, help="of each case")
    arguments = parser.parse_args()
    figures = asyncio.run(measure(arguments.seconds))
    print_table("Output tokens of two tenants", HEADER, rows(figures))
    record(arguments, "fairness", figures)


if __name__ == "__main__":
    main()

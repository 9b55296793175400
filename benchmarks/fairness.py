"""Measures whether tenants get their weights: scripts/bench fairness.

A tritonserver whose engine answers at once serves two tenants. One keeps TIMES as many requests
alive as the other; both always have some waiting, so the weights alone should share out the tokens.
Each comparison is made over gRPC and through the OpenAI server, where keys name the tenants.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

from gllm_benchmarks.load import TritonClient
from gllm_benchmarks.openai_api import OpenAIClient
from gllm_benchmarks.record import add_arguments, number, print_table, record
from gllm_benchmarks.served_model import MODEL, free_ports, server
from gllm_client import GenerateError

CONFIG = "model_repository/shakespeare/1"
WEIGHTS = {"gold": 3.0}  # others have 1
# Four run. The tenant with many requests has more of them than may wait.
ENGINE = {"device": "none", "max_num_seqs": 4, "max_waiting": 190, "tenant_weights": WEIGHTS}
OUTPUT_LEN = 500  # so long that a client asks again before its tenant has nothing left to wait
CASES = {"1 : 1": ("a", "b"), "1 : 3": ("a", "gold"), "3 : 1": ("gold", "a")}  # (many, few)
FEW = 20
TIMES = 10
RETRY_S = 0.5  # after a refusal
TIMEOUT_S = 100.0  # of a request
Connect = Callable[[str], Any]  # to a client's connection, from its tenant


class Tenants:
    """Two tenants' requests, and what they have received."""

    def __init__(self, many: str, few: str, output_len: int = OUTPUT_LEN) -> None:
        self.alive = {many: TIMES * FEW, few: FEW}
        self._options = {"max_tokens": output_len, "ignore_eos": True}
        self._warm = 4 * output_len  # tokens of each tenant before those that count
        self.tokens = Counter[str]()
        self.refusals = Counter[str]()
        self._tasks: list[asyncio.Task[None]] = []

    async def share(self, connect: Connect, seconds: float, tokens: int) -> dict[str, Any]:
        """The figures of that time at least, and of that many tokens together."""
        async with AsyncExitStack() as stack:
            for tenant, count in self.alive.items():
                client = await stack.enter_async_context(connect(tenant))
                asks = [asyncio.create_task(self._ask(client, tenant)) for _ in range(count)]
                self._tasks += asks
            try:
                await self._until(
                    lambda: min(self.tokens[name] for name in self.alive) > self._warm
                )
                begin = time.monotonic()
                warm = self.tokens.copy()
                end = warm.total() + tokens
                await self._until(
                    lambda: time.monotonic() > begin + seconds and self.tokens.total() > end
                )
                return self._figures(self.tokens - warm, time.monotonic() - begin)
            finally:
                for task in self._tasks:
                    task.cancel()
                await asyncio.wait(self._tasks)

    async def _ask(self, client: Any, tenant: str) -> None:
        own = {} if isinstance(client, OpenAIClient) else {"tenant": tenant}
        while True:
            try:
                async for response in client.ask([7] * 8, self._options | own, TIMEOUT_S):
                    self.tokens[tenant] += response.tokens
            except GenerateError as error:
                if f"the queue is full for tenant '{tenant}'" not in str(error):
                    raise
                self.refusals[tenant] += 1
                await asyncio.sleep(RETRY_S)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            ended, _ = await asyncio.wait(self._tasks, timeout=0.02)
            for task in ended:
                task.result()  # only an error ends one

    def _figures(self, tokens: Counter[str], seconds: float) -> dict[str, Any]:
        many, few = [tokens[name] / WEIGHTS.get(name, 1.0) for name in self.alive]
        return {
            "seconds": seconds,
            "tokens_per_s": tokens.total() / seconds,
            "tokens": dict(tokens),
            "refusals": {name: self.refusals[name] for name in self.alive},
            "few_to_many_by_weight": few / many,
        }


@contextmanager
def openai_server(grpc: str, keys: dict[str, Path]) -> Iterator[str]:
    """Run `gllm openai` with a key a tenant, which is written to its file in `keys`."""
    (port,) = free_ports(1)
    lines = []
    for tenant, path in keys.items():
        path.write_text(f"key-of-{tenant}")
        lines.append(f"key-of-{tenant} {tenant}\n")
    file = path.with_name("keys")
    file.write_text("".join(lines))
    command = [sys.executable, "-m", "gllm_client", "openai", f"--url=grpc://{grpc}"]
    command += [f"--port={port}", f"--api-key-file={file}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            if process.stdout is None or not process.stdout.readline():
                raise RuntimeError("gllm openai did not become ready")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


async def measure(seconds: float) -> dict[str, Any]:
    """The figures of every case by way and weights."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        keys = {name: Path(directory, name) for name in ("a", "b", "gold")}
        with (
            server(Path(CONFIG), 1, {}, ENGINE) as addresses,
            openai_server(addresses.grpc, keys) as url,
        ):
            ways: dict[str, Connect] = {
                "gRPC": lambda _: TritonClient(addresses.grpc, MODEL),
                "OpenAI server": lambda name: OpenAIClient(url, MODEL, key_file=keys[name]),
            }
            for way, connect in ways.items():
                for weights, (many, few) in CASES.items():
                    shared = await Tenants(many, few).share(connect, seconds, 0)
                    found[f"{way}, {weights}"] = shared
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=number(float, 0, 3600), default=60)
    add_arguments(parser)
    args = parser.parse_args()
    os.chdir(Path(__file__).resolve().parents[1])
    found = asyncio.run(measure(args.seconds))  # one loop: gRPC's poller keeps to the first
    rows = [
        [case, f"{run['tokens_per_s']:.0f}", f"{run['few_to_many_by_weight']:.3f}"]
        for case, run in found.items()
    ]
    print_table(f"{TIMES} : 1 requests", ["weights", "tokens/s", "few : many by weight"], rows)
    record("fairness", {"requests": [TIMES * FEW, FEW], "runs": found}, args.save)


if __name__ == "__main__":
    main()

"""Sends requests over gRPC streams from several client processes and records response times.

This module owns the client processes and their clocks. It knows nothing of the server or of the
evaluation of the times. All times are from the monotonic clock, which all processes of a machine
share.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gllm_benchmarks.workloads import Job
from gllm_client import Client, GenerateError

# Request the text and its token count only.
LEAN = {
    "return_token_ids": False,
    "return_finish_reason": False,
    "return_num_input_tokens": False,
}
# Seconds from the connection of the last client to the start of the load in all clients.
BEGIN_AFTER_S = 0.25
GIVE_UP_S = 30.0  # in addition to the timeout of requests


class RequestRecord(NamedTuple):
    """One request: its due time (in closed loops, its send time), send time and responses."""

    due: float
    sent: float
    times: list[float]
    tokens: list[int]  # number in each response
    wanted: int  # requested output tokens
    error: str | None

    @property
    def is_complete(self) -> bool:
        return self.error is None and sum(self.tokens) == self.wanted


def run_load(
    address: str,
    model: str,
    jobs: list[Job],
    arrivals: list[float] | int,
    clients: int = 1,
    sampling: dict[str, Any] | None = None,
    timeout: float = 600.0,
) -> list[RequestRecord]:
    """Send all jobs and wait for their ends; returns the records in the order of the jobs.

    `arrivals`: each job's seconds from the start, or the number of concurrent requests.
    `timeout`: seconds for all jobs together; requests that have not ended then have failed. Raises
    RuntimeError if a client process fails.
    """
    clients = min(clients, len(jobs), arrivals if isinstance(arrivals, int) else len(jobs))
    with tempfile.TemporaryDirectory(prefix="gllm-load-") as directory:
        tasks = []
        for i in range(clients):
            mine = arrivals[i::clients] if isinstance(arrivals, list) else None
            slots = len(range(i, arrivals, clients)) if isinstance(arrivals, int) else None
            task: dict[str, Any] = {"address": address, "model": model, "slots": slots}
            task |= {"arrivals": mine, "sampling": sampling or {}, "timeout": timeout}
            task["jobs"] = jobs[i::clients]
            tasks.append(Path(directory, f"{i}.json"))
            tasks[-1].write_text(json.dumps(task))
        _run_clients(tasks, timeout)
        found = [json.loads(task.with_suffix(".out").read_text()) for task in tasks]
    # Client i had jobs i, i + clients, ...
    return [RequestRecord(*found[i % clients][i // clients]) for i in range(len(jobs))]


def _run_clients(tasks: list[Path], timeout: float) -> None:
    command = [sys.executable, "-m", "gllm_benchmarks.load"]
    with contextlib.ExitStack() as stack:
        processes = []
        for task in tasks:
            process = subprocess.Popen(
                [*command, str(task)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        for process in processes:
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise RuntimeError("a load client failed before it began")
        begin = time.monotonic() + BEGIN_AFTER_S
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(f"{begin}\n")
            process.stdin.flush()
        for process in processes:
            if process.wait(timeout + GIVE_UP_S):
                raise RuntimeError(f"a load client ended with status {process.returncode}")


async def play(task: dict[str, Any]) -> list[RequestRecord]:
    """Send one client's share of the jobs."""
    jobs = [Job(*job) for job in task["jobs"]]
    records: dict[int, RequestRecord] = {}

    async def one(client: Client, number: int, due: float | None) -> None:
        job = jobs[number]
        times = []
        tokens = []
        error = None
        if due is not None:
            await asyncio.sleep(due - time.monotonic())
        sent = time.monotonic()
        options = LEAN | {"max_tokens": job.output_len, "ignore_eos": True} | task["sampling"]
        left = max(begin + task["timeout"] - sent, 1e-3)
        try:
            chunks = client.generate(input_ids=job.prompt, timeout=left, **options)
            async for chunk in chunks:
                times.append(time.monotonic())
                tokens.append(chunk.num_output_tokens)
        except GenerateError as problem:
            error = str(problem)
        due = sent if due is None else due
        records[number] = RequestRecord(due, sent, times, tokens, job.output_len, error)

    async def slot(client: Client, numbers: Iterator[int]) -> None:
        for number in numbers:
            await one(client, number, None)

    async with Client(task["address"], task["model"]) as client:
        if not await client.is_ready(task["model"]):
            raise RuntimeError(f"{task['address']} serves no model {task['model']}")
        gc.freeze()
        print("ready", flush=True)
        begin = float(sys.stdin.readline())
        if task["arrivals"] is None:
            await asyncio.sleep(begin - time.monotonic())
            numbers = iter(range(len(jobs)))
            await asyncio.gather(*(slot(client, numbers) for _ in range(task["slots"])))
        else:
            dues = [begin + at for at in task["arrivals"]]
            await asyncio.gather(*(one(client, i, due) for i, due in enumerate(dues)))
    return [records[i] for i in range(len(jobs))]


def main() -> None:
    path = Path(sys.argv[1])
    records = asyncio.run(play(json.loads(path.read_text())))
    path.with_suffix(".out").write_text(json.dumps(records))


if __name__ == "__main__":
    main()

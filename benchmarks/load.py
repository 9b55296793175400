"""Requests over gRPC streams from several client processes, and when each response came.

Owns the clients' processes and clocks. Knows nothing of what serves them, nor what is made of the
times. All times are of the monotonic clock that the machine's processes share.
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

# Ask for the text and its token count, nothing else.
LEAN = {
    "return_token_ids": False,
    "return_finish_reason": False,
    "return_num_input_tokens": False,
}
# Clients begin so many seconds after the last one is connected, for all to hear of it.
BEGIN_AFTER_S = 0.25
GIVE_UP_S = 30.0  # beyond the timeout of requests


class RequestRecord(NamedTuple):
    """One request: when it was due (closed loops: sent) and sent, and each of its responses."""

    due: float
    sent: float
    times: list[float]
    tokens: list[int]  # in each response
    wanted: int  # output tokens
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
    """Send all jobs and wait for their ends, in this order of jobs.

    `arrivals`: seconds from the beginning for each, or how many are under way at a time.
    `timeout`: seconds for all; what has not ended then has failed. Raises RuntimeError when a
    client fails as a whole.
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
    """A client's part."""
    jobs = [Job(*job) for job in task["jobs"]]
    records: dict[int, RequestRecord] = {}

    async def one(client: Client, number: int, due: float | None) -> None:
        job, times, tokens, error = jobs[number], [], [], None
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

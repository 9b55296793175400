"""Sends requests from several client processes and records response times.

The requests go to tritonserver over gRPC streams, or to an OpenAI server as streams of events.

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
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gllm_benchmarks.openai_api import OpenAIClient, Response
from gllm_benchmarks.record import told
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
    tokens: list[int]  # number in each response; the last has all of those of an OpenAI server
    wanted: int  # requested output tokens
    error: str | None
    cached: int | None = None  # prompt tokens from the prefix cache, if the server tells

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
    api: str = "grpc",
    key_file: Path | None = None,
    salts: list[str] | None = None,
) -> list[RequestRecord]:
    """Send all jobs and wait for their ends; returns the records in the order of the jobs.

    `address`: of gRPC, or with `api` "completions" or "chat" the URL of an OpenAI server, whose key
    is in `key_file`. `arrivals`: each job's seconds from the start, or the number of concurrent
    requests. `salts`: each job's cache_salt.
    `timeout`: seconds for all jobs together; requests that have not ended then have failed. Raises
    SystemExit if a client process fails.
    """
    clients = min(clients, len(jobs), arrivals if isinstance(arrivals, int) else len(jobs))
    with tempfile.TemporaryDirectory(prefix="gllm-load-") as directory:
        tasks = []
        for i in range(clients):
            part: Any = (
                len(range(i, arrivals, clients))
                if isinstance(arrivals, int)
                else arrivals[i::clients]
            )
            task = {
                "address": address,
                "model": model,
                "arrivals": part,
                "sampling": sampling or {},
                "timeout": timeout,
                "api": api,
                "key_file": key_file and str(key_file),
                "jobs": jobs[i::clients],
                "salts": salts[i::clients] if salts else None,
            }
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
                raise SystemExit("a load client failed before it began")
        begin = time.monotonic() + BEGIN_AFTER_S
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(f"{begin}\n")
            process.stdin.flush()
        for process in processes:
            if process.wait(timeout + GIVE_UP_S):
                raise SystemExit(f"a load client ended with status {process.returncode}")


class TritonClient(Client):
    """Requests to one model of tritonserver, as OpenAIClient's."""

    async def ask(
        self, prompt: list[int], options: dict[str, Any], timeout: float
    ) -> AsyncIterator[Response]:
        options = LEAN | options
        async for chunk in self.generate(input_ids=prompt, timeout=timeout, **options):
            yield Response(chunk.num_output_tokens)


async def play(task: dict[str, Any]) -> list[RequestRecord]:
    """Send one client's share of the jobs."""
    jobs = [Job(*job) for job in task["jobs"]]
    records: dict[int, RequestRecord] = {}

    async def one(number: int, due: float | None) -> None:
        job = jobs[number]
        times: list[float] = []
        tokens: list[int] = []
        cached = None
        error = None
        if due is not None:
            await asyncio.sleep(due - time.monotonic())
        sent = time.monotonic()
        options = {"max_tokens": job.output_len, "ignore_eos": True, "temperature": 1.0}
        options |= task["sampling"]
        if task["salts"]:
            options["cache_salt"] = task["salts"][number]
        if job.images:
            options["images"] = job.images
        left = max(begin + task["timeout"] - sent, 1e-3)
        try:
            async for response in client.ask(job.prompt, options, left):
                if response.is_output or not tokens:
                    times.append(time.monotonic())
                    tokens.append(0)
                tokens[-1] += response.tokens
                cached = response.cached
        except GenerateError as problem:
            error = str(problem)
        due = sent if due is None else due
        records[number] = RequestRecord(due, sent, times, tokens, job.output_len, error, cached)

    async def slot(numbers: Iterator[int]) -> None:
        for number in numbers:
            await one(number, None)

    address = task["address"]
    model = task["model"]
    arrivals = task["arrivals"]
    if task["api"] == "grpc":
        connection: Any = TritonClient(address, model)
    else:
        connection = OpenAIClient(address, model, task["api"], task["key_file"])
    async with connection as client:
        if not await client.is_ready(model):
            raise SystemExit(f"{address} serves no model {model}")
        gc.freeze()
        print("ready", flush=True)
        begin = float(sys.stdin.readline())
        if isinstance(arrivals, int):
            await asyncio.sleep(begin - time.monotonic())
            numbers = iter(range(len(jobs)))
            await asyncio.gather(*(slot(numbers) for _ in range(arrivals)))
        else:
            dues = [begin + at for at in arrivals]
            await asyncio.gather(*(one(i, due) for i, due in enumerate(dues)))
    return [records[i] for i in range(len(jobs))]


@told()
def main() -> None:
    path = Path(sys.argv[1])
    records = asyncio.run(play(json.loads(path.read_text())))
    path.with_suffix(".out").write_text(json.dumps(records))


if __name__ == "__main__":
    main()

"""What the host costs, on one machine and with no GPU: scripts/bench host.

Three questions: what does the scheduler take of a step; how much of the engine's offline speed
arrives at Triton clients; and what do front ends and coalescing carry when the engine answers at
once. Each comparison is made in one run, on the same work.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gllm_benchmarks.record import add_arguments, print_table, record
from gllm_benchmarks.streams import run_streams
from gllm_client import SyncClient
from gllm_engine import LLM, EngineConfig, SamplingParams, Scheduler, Sequence, StepResult

SHAKESPEARE = Path("model_repository/shakespeare/1")
START_TIMEOUT_S = 120.0


def step_cost(num_sequences: int, num_steps: int) -> float:
    """Median microseconds of one schedule() and one commit(), all sequences decoding."""
    config = EngineConfig(
        model=".", max_num_seqs=num_sequences, max_num_batched_tokens=max(2048, num_sequences)
    )
    num_pages = num_sequences * ((64 + num_steps) // config.page_size + 2)
    scheduler = Scheduler(config, num_pages, max_model_len=4096, eos_token_ids=(1, 2))
    sampling = SamplingParams(max_tokens=None, stop_token_ids=(3,))
    for i in range(num_sequences):
        prompt = [10 + i % 1000] * (32 + i % 16)  # so that pages do not all end at once
        scheduler.add(Sequence(i, prompt, sampling, seed=i))

    def turn() -> float:
        start = time.perf_counter()
        plan = scheduler.schedule()
        middle = time.perf_counter()
        assert plan is not None
        num_rows = len(plan.decode_slots) + sum(chunk.samples for chunk in plan.chunks)
        result = StepResult(plan.step, [100] * num_rows)
        again = time.perf_counter()
        scheduler.commit(result)
        return time.perf_counter() - again + middle - start

    while scheduler.stats().waiting:
        turn()
    gc.collect()
    return statistics.median(turn() for _ in range(num_steps)) * 1e6


@contextlib.contextmanager
def server(
    model: Path, front_ends: int, parameters: dict[str, str], config: dict[str, Any]
) -> Iterator[str]:
    """A plain tritonserver on `model`, under the name "m"; gives its gRPC address."""
    with tempfile.TemporaryDirectory(prefix="gllm-bench-") as directory:
        repository = Path(directory)
        version = repository / "m" / "1"
        version.mkdir(parents=True)
        (version / "model.json").write_text(json.dumps({"model": str(model.resolve())} | config))
        settings = "".join(
            f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'
            for key, value in parameters.items()
        )
        (repository / "m" / "config.pbtxt").write_text(
            f'backend: "gllm"\n{settings}'
            f"instance_group [{{ count: {front_ends}, kind: KIND_MODEL }}]\n"
        )
        http, grpc, metrics = free_ports(3)
        command = [sys.executable, "-m", "gllm_client", "tritonserver"]
        command += [f"--model-repository={repository}", f"--http-port={http}"]
        command += [f"--grpc-port={grpc}", f"--metrics-port={metrics}"]
        log = (repository / "log").open("w+")
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            await_ready(process, f"127.0.0.1:{grpc}", Path(log.name))
            yield f"127.0.0.1:{grpc}"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
            log.close()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports: list[int] = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def await_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    with SyncClient(address) as client:
        while not client.is_ready("m"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"tritonserver did not become ready:\n{log.read_text()}")
            time.sleep(0.1)


def offline_speed(streams: int, tokens: int, config: dict[str, Any]) -> float:
    """Output tokens per second of the engine called in this process, best of three."""
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.8, top_p=0.95)
    prompts = [f"{i}. First Citizen:\nBefore we proceed" for i in range(streams)]
    speeds = []
    with LLM(model=str(SHAKESPEARE), **config) as llm:
        llm.generate(prompts, SamplingParams(max_tokens=4))
        for _ in range(3):
            start = time.perf_counter()
            answers = llm.generate(prompts, sampling)
            seconds = time.perf_counter() - start
            speeds.append(sum(len(a.outputs[0].token_ids) for a in answers) / seconds)
    return max(speeds)


def served_speed(
    streams: int, tokens: int, front_ends: int, coalesce: bool, config: dict[str, Any]
) -> dict[str, float]:
    """What `streams` gRPC streams receive, best of three: tokens/s and tokens a response."""
    sampling = {"max_tokens": tokens, "ignore_eos": True, "temperature": 0.8, "top_p": 0.95}
    parameters = {"coalesce": "true" if coalesce else "false"}
    with server(SHAKESPEARE, front_ends, parameters, config) as address:
        run_streams(address, "m", streams, sampling | {"max_tokens": 4})
        runs = [run_streams(address, "m", streams, sampling) for _ in range(3)]
    for run in runs:
        assert run["tokens"] == streams * tokens, f"tokens were lost: {run}"
    best = min(runs, key=lambda run: run["seconds"])
    return {
        "tokens_per_s": round(best["tokens"] / best["seconds"]),
        "tokens_per_response": round(best["tokens"] / best["responses"], 1),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "scheduler_us_per_step": {
            str(n): round(step_cost(n, args.steps), 1) for n in (16, 256, 1024)
        }
    }
    rows = [[n, us, round(us / int(n), 2)] for n, us in figures["scheduler_us_per_step"].items()]
    print_table("Scheduler, schedule + commit", ["running", "us a step", "us a sequence"], rows)

    # One thread of tensor work in both, so that server and client have a core in the second.
    config = {"cpu_threads": 1}
    offline = offline_speed(args.streams, args.tokens, config)
    served = served_speed(args.streams, args.tokens, args.front_ends, True, config)
    share = served["tokens_per_s"] / offline
    figures["offline_tokens_per_s"] = round(offline)
    figures["through_triton"] = served | {"share_of_offline": round(share, 3)}
    print_table(
        f"The shipped model, {args.streams} streams of {args.tokens} tokens",
        ["", "tokens/s", "of offline", "tokens a response"],
        [
            ["offline", round(offline), "", ""],
            ["gRPC streams", served["tokens_per_s"], f"{share:.0%}", served["tokens_per_response"]],
        ],
    )

    instant = {"device": "none"}
    figures["instant_engine"] = {
        f"F={f} {'coalesced' if c else 'one token a response'}": served_speed(
            args.streams, args.tokens if not c else 4 * args.tokens, f, c, instant
        )
        for f in (1, 2)
        for c in (False, True)
    }
    print_table(
        f"An engine that answers at once, {args.streams} streams",
        ["front ends", "tokens/s", "tokens a response"],
        [[name, *run.values()] for name, run in figures["instant_engine"].items()],
    )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200, help="output tokens a stream")
    parser.add_argument("--steps", type=int, default=400, help="scheduler steps timed")
    parser.add_argument("--front-ends", type=int, default=2)
    add_arguments(parser)
    args = parser.parse_args()
    os.chdir(Path(__file__).resolve().parents[1])
    record("host", measure(args), args.save)


if __name__ == "__main__":
    main()

"""Many gRPC streams at once against a running server, in a process of its own.

Counts what arrives: tokens, responses, seconds from the first request to the last chunk. Prints
one JSON line. Knows nothing of what serves it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from typing import Any

from gllm_client import Client

# Ask for the text and its token count, nothing else.
LEAN = {
    "return_token_ids": False,
    "return_finish_reason": False,
    "return_num_input_tokens": False,
}


async def stream_all(
    address: str, model: str, num_streams: int, sampling: dict[str, Any]
) -> dict[str, float]:
    """Start `num_streams` streams together and wait for all of them."""
    tokens = responses = 0

    async def one(client: Client, number: int) -> None:
        nonlocal tokens, responses
        prompt = f"{number}. First Citizen:\nBefore we proceed"
        async for chunk in client.generate(prompt, **LEAN, **sampling):
            responses += 1
            tokens += chunk.num_output_tokens

    async with Client(address, model) as client:
        start = time.perf_counter()
        await asyncio.gather(*(one(client, i) for i in range(num_streams)))
        seconds = time.perf_counter() - start
    return {"tokens": tokens, "responses": responses, "seconds": seconds}


def run_streams(
    address: str, model: str, num_streams: int, sampling: dict[str, Any]
) -> dict[str, float]:
    """`stream_all` in a process of its own, so that it shares no interpreter with the caller."""
    command = [sys.executable, "-m", "gllm_benchmarks.streams", address, model]
    command += [str(num_streams), json.dumps(sampling)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the streaming client failed:\n{done.stderr}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", help="host:port of the server's gRPC endpoint")
    parser.add_argument("model")
    parser.add_argument("num_streams", type=int)
    parser.add_argument("sampling", type=json.loads, help="sampling parameters as JSON")
    args = parser.parse_args()
    print(json.dumps(asyncio.run(stream_all(**vars(args)))))


if __name__ == "__main__":
    main()

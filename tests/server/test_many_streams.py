"""Many streams at once, and the numbers that /metrics shows for known work."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from asking import ALL_FLAGS, ask, generate, generate_stream, joined, sampled, text_of
from live import MODEL, Server, wait_for

from gllm_client import Chunk, Client
from gllm_engine import LLM, SamplingParams

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

NAMES = ("ROMEO", "JULIET", "HAMLET", "First Citizen", "KING LEAR", "MACBETH", "PORTIA", "IAGO")


def cases(count: int) -> list[tuple[str, dict[str, Any]]]:
    """Different prompts, lengths and ways of sampling; each asks for an exact number of tokens."""
    return [
        (
            f"{NAMES[i % len(NAMES)]}, the {i}th:",
            {
                "temperature": 0.0 if i % 2 else 0.8,
                "seed": 1000 + i,
                "max_tokens": 4 + i % 7,
                "ignore_eos": True,
            },
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def alone(offline: LLM) -> list[tuple[str, list[int]]]:
    """What the offline engine makes of each while it has nothing else to do."""
    answers = []
    for prompt, fields in cases(64):
        output = offline.generate([prompt], SamplingParams(**fields))[0].outputs[0]
        answers.append((output.text, output.token_ids))
    return answers


def test_64_grpc_streams_each_as_if_it_were_alone(
    server: Server, alone: list[tuple[str, list[int]]]
) -> None:
    asked = cases(64)

    async def one(client: Client, prompt: str, fields: dict[str, Any]) -> list[Chunk]:
        return [chunk async for chunk in client.generate(prompt, sampling=fields)]

    async def run() -> list[list[Chunk]]:
        async with Client(server.grpc, MODEL) as client:
            return await asyncio.gather(*(one(client, *case) for case in asked))

    answers = asyncio.run(run())
    for (_, fields), (text, token_ids), chunks in zip(asked, alone, answers, strict=True):
        assert sum(chunk.num_output_tokens for chunk in chunks) == fields["max_tokens"]
        assert [token for chunk in chunks for token in chunk.token_ids] == token_ids
        assert "".join(chunk.text for chunk in chunks) == text
        assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
        assert all(chunk.num_output_tokens > 0 for chunk in chunks)
    server.wait_idle()


def test_32_http_streams_lose_no_chunk(server: Server, alone: list[tuple[str, list[int]]]) -> None:
    """Every chunk carries tokens, so none is lost when all tokens are there."""
    asked = cases(32)

    def one(case: tuple[str, dict[str, Any]]) -> Any:
        prompt, fields = case
        tensors = {"text_input": prompt, "stream": True} | ALL_FLAGS | sampled(**fields)
        return generate_stream(server, tensors)

    with ThreadPoolExecutor(len(asked)) as threads:
        answers = list(threads.map(one, asked))
    for (_, fields), (text, token_ids), events in zip(asked, alone[:32], answers, strict=True):
        counts = joined(events, "num_output_tokens")
        assert len(counts) == len(events) and min(counts) > 0
        assert sum(counts) == fields["max_tokens"]
        assert joined(events, "token_ids") == token_ids
        assert text_of(events) == text
    server.wait_idle()


# ---------------------------------------------------------------- metrics

GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage")
COUNTERS = (
    "prompt_tokens_total",
    "generation_tokens_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "request_cancellations_total",
)
HISTOGRAMS = (
    "time_to_first_token_seconds",
    "time_per_output_token_seconds",
    "e2e_request_latency_seconds",
)


def test_every_metric_is_there_and_labelled(server: Server) -> None:
    generate(server, {"text_input": "ROMEO:", "max_tokens": 1})
    generate(server, {"text_input": "ROMEO:", "n": 0})
    labels = f'{{model="{MODEL}",version="1"'
    wanted = {f"gllm:{name}{labels}}}" for name in (*GAUGES, *COUNTERS)}
    wanted |= {f"gllm:{name}_{part}{labels}}}" for name in HISTOGRAMS for part in ("count", "sum")}
    wanted |= {f'gllm:{name}_bucket{labels},le="+Inf"}}' for name in HISTOGRAMS}
    wait_for(lambda: wanted <= server.metrics().keys(), f"all of {sorted(wanted)}")
    for name, label in (("success", 'finished_reason="length"'), ("errors", 'status="invalid"')):
        wait_for(
            lambda name=name, label=label: any(
                sample.startswith(f"gllm:request_{name}_total{{") and label in sample
                for sample in server.metrics()
            ),
            f"{name} with {label}",
        )


def test_known_work_is_counted_exactly(server: Server, offline: LLM) -> None:
    server.settle()
    counted = (
        *COUNTERS,
        *(f"{name}_count" for name in HISTOGRAMS),
        "request_success_total",
        "request_errors_total",
    )

    def read() -> dict[str, float]:
        return {name: server.metric(name) for name in counted}

    before = read()
    prompt = "Friends, Romans, countrymen"
    length = len(offline.tokenizer.encode(prompt))
    for fields in ({"max_tokens": 1}, {"max_tokens": 9}, {"max_tokens": 5, "n": 3}):
        ask(server, {"text_input": prompt} | sampled(ignore_eos=True, **fields))
    ask(server, {"text_input": prompt, "stream": True} | sampled(max_tokens=7, ignore_eos=True))
    assert generate(server, {"text_input": prompt, "max_tokens": 0})[0] == 400
    wanted = {
        "prompt_tokens_total": 4 * length,
        "generation_tokens_total": 1 + 9 + 3 * 5 + 7,
        "num_preemptions_total": 0,
        "request_cancellations_total": 0,
        "time_to_first_token_seconds_count": 4,
        "time_per_output_token_seconds_count": 3,  # one answer has no second token
        "e2e_request_latency_seconds_count": 4,
        "request_success_total": 1 + 1 + 3 + 1,
        "request_errors_total": 1,
    }

    def is_counted() -> bool:
        now = read()
        return all(now[name] - before[name] == value for name, value in wanted.items())

    wait_for(is_counted, f"{wanted} more than {before}")
    server.settle()
    assert is_counted()  # and no more came


def test_latencies_add_up(server: Server) -> None:
    """TTFT lies within the whole latency, and TPOT times tokens is about the rest."""
    sums = [f"{name}_sum" for name in HISTOGRAMS]
    server.settle()
    before = [server.metric(name) for name in sums]
    count = server.metric("e2e_request_latency_seconds_count")
    ask(server, {"text_input": "ROMEO:", "stream": True} | sampled(max_tokens=51, ignore_eos=True))
    wait_for(
        lambda: server.metric("e2e_request_latency_seconds_count") == count + 1, "it is measured"
    )
    first, each, whole = (server.metric(name) - was for name, was in zip(sums, before, strict=True))
    assert 0 < first < whole and 0 < each
    assert first + 50 * each <= whole + 1e-3


def test_a_second_prompt_comes_out_of_the_prefix_cache(server: Server, offline: LLM) -> None:
    prompt = "Now is the winter of our discontent made glorious summer by this sun of York; " * 4
    length = len(offline.tokenizer.encode(prompt))
    fields = sampled(max_tokens=4, temperature=0, cache_salt="winter")
    server.settle()
    names = ("prefix_cache_queries_total", "prefix_cache_hits_total")
    before = [server.metric(name) for name in names]
    texts = [text_of(ask(server, {"text_input": prompt} | fields)) for _ in range(2)]
    assert texts[0] == texts[1]

    def hits() -> float:
        queries, hits = (server.metric(name) - was for name, was in zip(names, before, strict=True))
        return hits if queries == 2 * length else 0

    found = wait_for(hits, "two prompts are looked up, one is found")
    assert length - 17 <= found < length  # whole pages of 16, and never the last token

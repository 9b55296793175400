"""Evaluates a served model: scripts/bench evaluate gsm8k --url URL --model NAME --data DIR.

The server is any OpenAI server. Perplexity and RULER's needle tasks are made here; the others are
run by their own harnesses, which must be installed. The figures are recorded as a benchmark's.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from gllm_benchmarks.evaluate import harness, perplexity, ruler
from gllm_benchmarks.openai_api import OpenAIClient, Post
from gllm_benchmarks.record import (
    Figures,
    make_parser,
    number,
    print_table,
    record,
    rounded,
    told,
)
from gllm_engine import LLM


def parse_arguments() -> Namespace:
    parser = make_parser("evaluate", __doc__)
    add = parser.add_argument
    add("task", choices=(*OWN, *harness.TASKS))
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="of an OpenAI server, with --model")
    where.add_argument("--offline", metavar="MODEL", help="an engine in this process: perplexity")
    add("--model", help="the model's name at --url")
    add("--api-key-file", type=Path)
    add("--data", type=Path, help="the data sets' directory; for perplexity a text file")
    add("--concurrency", type=number(int, 1, 4096), default=16, help="requests at a time")
    add("--timeout", type=number(float, 1, 1e6), default=600, help="seconds for one request")
    add(
        "--length", type=number(int, 256, 10**8), default=4096, help="of RULER's samples, in tokens"
    )
    add("--samples", type=number(int, 1, 10**5), default=20, help="of each of RULER's tasks")
    add("--max-tokens", type=number(int, 1, 10**6), default=128, help="of RULER's answers")
    add("--harness-args", default="", help="further arguments of the harness, as one text")
    arguments = parser.parse_args()
    if arguments.url and not arguments.model:
        parser.error("--url: --model is needed too")
    if arguments.offline and arguments.task != "perplexity":
        parser.error(f"--offline: {arguments.task} needs a server, --url")
    return arguments


def ask_server(arguments: Namespace, work: Callable[[Post], Awaitable[Any]]) -> Any:
    """What `work` makes of the server. Raises GenerateError, and what `work` raises."""

    async def connected() -> Any:
        server = OpenAIClient(arguments.url, arguments.model, key_file=arguments.api_key_file)
        async with server as client:
            return await work(partial(client.post, timeout=arguments.timeout))

    return asyncio.run(connected())


def measure_perplexity(arguments: Namespace) -> Figures:
    texts = perplexity.paragraphs(arguments.data or perplexity.HELD_OUT)
    if arguments.offline:
        with told(ValueError):  # of the checkpoint
            llm = LLM(model=arguments.offline)
        with llm:
            scores = perplexity.by_engine(llm, texts)
    else:
        scores = ask_server(arguments, partial(perplexity.by_openai, texts))
    return {"text": perplexity.summarize(scores, texts)}


def measure_ruler(arguments: Namespace) -> Any:
    sizes = (arguments.length, arguments.samples, arguments.max_tokens, arguments.concurrency)
    return ask_server(arguments, partial(ruler.run, *sizes))


OWN = {"perplexity": measure_perplexity, "ruler": measure_ruler}


def table(figures: Figures) -> tuple[list[str], list[list[Any]]]:
    """The header and a row for each part of a task."""
    header = list(dict.fromkeys(key for each in figures.values() for key in each))
    rows = [[name, *(each.get(key, "") for key in header)] for name, each in figures.items()]
    return ["", *header], rows


@told()
def main() -> None:
    arguments = parse_arguments()
    figures = rounded(OWN.get(arguments.task, harness.run)(arguments))
    print_table(arguments.task, *table(figures))
    model = Path(arguments.offline or arguments.model).name
    record(arguments, f"evaluate-{arguments.task}-{model}", figures)

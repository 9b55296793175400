"""Workloads whose prompts share prefixes, and how much of them a cache without limits would hold.

This module knows no engine. Answers in a conversation's history are random ids too, as in the
traces: what a cache keeps of real answers comes on top.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NamedTuple

from gllm_benchmarks.workloads import Job, is_count, parsed

PAGE = 16  # tokens; a cache holds whole pages
TRACE_BLOCK = 512  # tokens that a hash id of a Mooncake trace stands for


class Chats(NamedTuple):
    """Users who take turns. Lengths are tokens; a user has one of the system prompts."""

    users: int
    rounds: int
    systems: int
    system_len: int
    question_len: int
    answer_len: int


def chats(name: str) -> Chats:
    """Parse chats:USERS:ROUNDS:SYSTEMS:SYSTEM:QUESTION:ANSWER. Raises SystemExit."""
    kind, *numbers = name.split(":")
    if kind != "chats" or len(numbers) != len(Chats._fields) or not all(map(is_count, numbers)):
        raise SystemExit(f"workload {name!r} is not chats:{':'.join(Chats._fields)}")
    return Chats(*map(int, numbers))


def make_chats(sizes: Chats, vocab: int, seed: int = 1) -> list[Job]:
    """The first round of every user, then the second: each prompt begins with the one before."""
    draws = random.Random(seed)

    def ids(count: int) -> list[int]:
        return draws.choices(range(vocab), k=count)

    systems = [ids(sizes.system_len) for _ in range(sizes.systems)]
    histories = [list(systems[user % sizes.systems]) for user in range(sizes.users)]
    jobs = []
    for _ in range(sizes.rounds):
        for history in histories:
            history += ids(sizes.question_len)
            jobs.append(Job(list(history), sizes.answer_len))
            history += ids(sizes.answer_len)
    return jobs


def read_mooncake(
    path: Path, vocab: int, limit: int | None = None, block: int = TRACE_BLOCK
) -> list[Job]:
    """The requests of a Mooncake trace in their order; equal ids stand for equal tokens.

    `path`: JSON lines with input_length, output_length and hash_ids. `block`: tokens of an id;
    fewer than 512 shorten all lengths alike. Raises SystemExit for a file that is no such trace.
    """
    blocks: dict[int, list[int]] = {}

    def parse(line: str) -> Job:
        about = json.loads(line)
        prompt_len, output_len = (
            max(about[f"{part}_length"] * block // TRACE_BLOCK, 1) for part in ("input", "output")
        )
        ids: list[int] = about["hash_ids"]
        for id in ids:
            if id not in blocks:
                blocks[id] = random.Random(f"block {id}").choices(range(vocab), k=block)
        prompt = [token for id in ids for token in blocks[id]]
        if len(prompt) < prompt_len:
            raise ValueError("the ids are of fewer tokens than the input")
        return Job(prompt[:prompt_len], output_len)

    with path.open() as lines:
        return parsed(path, lines, parse, limit)


def ideal_rate(prompts: list[list[int]]) -> float:
    """The share of prompt tokens that a cache without limits would hold, 0..1.

    Such a cache has every whole page of every earlier prompt. A prompt's last token is computed in
    any case.
    """
    seen: set[int] = set()
    hits = 0
    for prompt in prompts:
        prefix = 0
        known = True
        for end in range(PAGE, len(prompt) + 1, PAGE):
            prefix = hash((prefix, *prompt[end - PAGE : end]))
            known = known and prefix in seen
            if known and end < len(prompt):
                hits += PAGE
            seen.add(prefix)
    return hits / sum(map(len, prompts))

"""Perplexity of a text: how well a model predicts it, by an engine or by an OpenAI server.

Each paragraph is predicted from itself alone, all but its first token. Two ways to run one model
give the same figure, so it is a check of a whole server that needs no data. The text that comes
with this module, some of Shakespeare's sonnets, is not in what the shipped model has learned.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from gllm_benchmarks.openai_api import Post
from gllm_engine import LLM, SamplingParams

HELD_OUT = Path(__file__).with_name("held_out.txt")
Scores = list[list[float]]  # of each paragraph's tokens but the first: log probabilities


def paragraphs(path: Path = HELD_OUT) -> list[str]:
    """The paragraphs of a file. Raises SystemExit if there is none."""
    found = [text.strip() for text in path.read_text().split("\n\n") if text.strip()]
    if not found:
        raise SystemExit(f"{path}: holds no paragraph")
    return found


def by_engine(llm: LLM, texts: list[str]) -> Scores:
    """Raises SystemExit for a paragraph that the engine refuses, as one that is too long."""
    answers = llm.generate(texts, SamplingParams(max_tokens=1, prompt_logprobs=0))
    for answer in answers:
        if answer.error is not None:
            raise SystemExit(answer.error)
    return [actual_scores(answer.prompt_logprobs) for answer in answers]


async def by_openai(texts: list[str], post: Post) -> Scores:
    """By the echo of the prompt. Raises GenerateError."""
    scores = []
    for text in texts:
        body = {"prompt": text, "echo": True, "logprobs": 1, "max_tokens": 1}
        answer = await post("/completions", body)
        (choice,) = answer["choices"]
        scores.append(choice["logprobs"]["token_logprobs"][1:-1])  # the last token is new
    return scores


def actual_scores(entries: Any) -> list[float]:
    """From prompt_logprobs: the actual token is first in its entry; the first token has none."""
    return [next(iter(entry.values()))["logprob"] for entry in entries[1:]]


def summarize(scores: Scores, texts: list[str]) -> dict[str, float]:
    nats = -math.fsum(score for each in scores for score in each)
    tokens = sum(map(len, scores))
    return {
        "tokens": tokens,
        "nats_per_token": nats / tokens,
        "nats_per_character": nats / sum(map(len, texts)),
        "perplexity": math.exp(nats / tokens),
    }
